/* The manifest log: building and reading its records. Little-endian on every machine that is supported; see docs/kv-plane.md. */
#include "kv/kv_manifest.h"
#include "kv/kv_hash.h"

#include <stdlib.h>
#include <string.h>

static const char MAGIC[8] = { 'A', 'R', 'L', 'E', 'K', 'V', 'M', '1' };
static const char TAG[4] = { 'K', 'V', 'R', '1' };

#define MAX_RECORD (1u << 26)

static void put32(uint8_t **p, uint32_t v)
{
    memcpy(*p, &v, 4);
    *p += 4;
}

static void put64(uint8_t **p, uint64_t v)
{
    memcpy(*p, &v, 8);
    *p += 8;
}

static uint32_t get32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static uint64_t get64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

size_t manifest_header_size(const char *identity)
{
    return 8 + 4 + 4 + strlen(identity) + 4;
}

void manifest_header(uint8_t *out, const char *identity)
{
    uint8_t *p = out;
    uint32_t n = (uint32_t)strlen(identity);
    memcpy(p, MAGIC, 8);
    p += 8;
    put32(&p, 1);
    put32(&p, n);
    memcpy(p, identity, n);
    p += n;
    put32(&p, kv_crc32c(0, out, (size_t)(p - out)));
}

static void record_seal(uint8_t *rec, uint32_t type, size_t payload)
{
    uint8_t *p = rec;
    memcpy(p, TAG, 4);
    p += 4;
    put32(&p, type);
    put32(&p, (uint32_t)payload);
    uint32_t crc = kv_crc32c(0, rec + 4, 8);
    put32(&p, kv_crc32c(crc, rec + MANIFEST_RECORD_HEAD, payload));
}

size_t manifest_put_size(const struct kv_disk_object *o, uint32_t n_refs)
{
    return MANIFEST_RECORD_HEAD + 44 + (o->parent == 0 ? KV_DISK_SALT : 0) + (size_t)o->n_tokens * 4 + (size_t)n_refs * MANIFEST_REF_BYTES;
}

void manifest_put(uint8_t *out, const struct kv_disk_object *o, const struct kv_chunk_ref *refs, uint32_t n_refs)
{
    uint8_t *p = out + MANIFEST_RECORD_HEAD;
    put64(&p, o->id);
    put64(&p, o->parent);
    put64(&p, o->bytes);
    put32(&p, o->kind);
    put32(&p, o->start);
    put32(&p, o->n_tokens);
    put32(&p, n_refs);
    put32(&p, 0);
    if (o->parent == 0) {
        memcpy(p, o->salt, KV_DISK_SALT);
        p += KV_DISK_SALT;
    }
    if (o->n_tokens > 0)
        memcpy(p, o->tokens, (size_t)o->n_tokens * 4);
    p += (size_t)o->n_tokens * 4;
    for (uint32_t i = 0; i < n_refs; i++) {
        put64(&p, refs[i].off);
        put32(&p, refs[i].seg);
        put32(&p, refs[i].len);
        put32(&p, refs[i].crc);
        memcpy(p, refs[i].hash, 16);
        p += 16;
    }
    record_seal(out, MANIFEST_PUT, (size_t)(p - out) - MANIFEST_RECORD_HEAD);
}

void manifest_del(uint8_t out[MANIFEST_DEL_SIZE], uint64_t id)
{
    uint8_t *p = out + MANIFEST_RECORD_HEAD;
    put64(&p, id);
    record_seal(out, MANIFEST_DEL, 8);
}

/* A put whose counts do not add up is damage too: its checksum may be right in a file that was made to hurt. */
static bool read_put(const uint8_t *p, size_t len, const struct kv_manifest_sink *sink)
{
    if (len < 44)
        return false;
    struct kv_disk_object o = { .id = get64(p), .parent = get64(p + 8), .bytes = get64(p + 16), .kind = get32(p + 24),
                                .start = get32(p + 28), .n_tokens = get32(p + 32), .handle = -1 };
    uint32_t n_refs = get32(p + 36);
    size_t salt = o.parent == 0 ? KV_DISK_SALT : 0;
    if (o.id == 0 || o.parent >= o.id || (o.kind != KV_DISK_PAGE && o.kind != KV_DISK_STATE))
        return false;
    if (len != 44 + salt + (size_t)o.n_tokens * 4 + (size_t)n_refs * MANIFEST_REF_BYTES)
        return false;
    if (n_refs != (o.bytes + KV_CHUNK_BYTES - 1) / KV_CHUNK_BYTES || (o.kind == KV_DISK_STATE && o.parent == 0))
        return false;
    int32_t *tokens = malloc(((size_t)o.n_tokens + 1) * 4);     /* copies: the file gives no alignment */
    struct kv_chunk_ref *refs = malloc(((size_t)n_refs + 1) * sizeof *refs);
    bool ok = tokens != NULL && refs != NULL;
    if (ok) {
        uint64_t sum = 0;
        memcpy(tokens, p + 44 + salt, (size_t)o.n_tokens * 4);
        const uint8_t *r = p + 44 + salt + (size_t)o.n_tokens * 4;
        for (uint32_t i = 0; i < n_refs; i++, r += MANIFEST_REF_BYTES) {
            refs[i] = (struct kv_chunk_ref){ .off = get64(r), .seg = get32(r + 8), .len = get32(r + 12), .crc = get32(r + 16) };
            memcpy(refs[i].hash, r + 20, 16);
            sum += refs[i].len;
            ok = ok && refs[i].len <= KV_CHUNK_BYTES && refs[i].len > 0;
        }
        ok = ok && sum == o.bytes;
        o.tokens = tokens;
        o.salt = salt > 0 ? p + 44 : NULL;
        if (ok)
            sink->put(sink->arg, &o, refs, n_refs);
    }
    free(tokens);
    free(refs);
    return ok;
}

/* Length of the record at data, handed to the sink; 0 when there is no whole and sound one. */
static size_t read_record(const uint8_t *data, size_t len, const struct kv_manifest_sink *sink)
{
    if (len < MANIFEST_RECORD_HEAD || memcmp(data, TAG, 4) != 0)
        return 0;
    uint32_t type = get32(data + 4), n = get32(data + 8);
    if (n > MAX_RECORD || n > len - MANIFEST_RECORD_HEAD)
        return 0;
    uint32_t crc = kv_crc32c(0, data + 4, 8);
    if (kv_crc32c(crc, data + MANIFEST_RECORD_HEAD, n) != get32(data + 12))
        return 0;
    const uint8_t *p = data + MANIFEST_RECORD_HEAD;
    if (type == MANIFEST_PUT && !read_put(p, n, sink))
        return 0;
    if (type == MANIFEST_DEL && n != 8)
        return 0;
    if (type == MANIFEST_DEL)
        sink->del(sink->arg, get64(p));
    return MANIFEST_RECORD_HEAD + n;        /* unknown types are skipped: a newer writer may add some */
}

int64_t kv_manifest_parse(const uint8_t *data, size_t len, const char *identity, const struct kv_manifest_sink *sink,
                          uint64_t *skipped)
{
    *skipped = 0;
    if (len < 20 || memcmp(data, MAGIC, 8) != 0 || get32(data + 8) != 1)
        return 0;
    size_t n = get32(data + 12);
    if (n > len - 20 || kv_crc32c(0, data, 16 + n) != get32(data + 16 + n))
        return 0;
    if (identity != NULL && (n != strlen(identity) || memcmp(data + 16, identity, n) != 0))
        return -EINVAL;
    size_t at = 20 + n, end = at;
    while (at < len) {
        size_t rec = read_record(data + at, len - at, sink);
        if (rec > 0) {
            *skipped += at - end;
            at += rec;
            end = at;
            continue;
        }
        const uint8_t *next = memmem(data + at + 1, len - at - 1, TAG, 4);
        if (next == NULL)
            break;
        at = (size_t)(next - data);
    }
    return (int64_t)end;
}
