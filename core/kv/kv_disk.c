/*
 * The disk tier: segments, chunks, budget and the objects they make up. The manifest's records are in kv_manifest.c.
 *
 * Segments are only ever appended to, by one process, and never after a restart; a new process starts a new one. Room is made a
 * segment at a time: one that is mostly dead is copied together when the write amplification allows it, otherwise the segment
 * whose content was used least recently is dropped with everything that hangs on it. Chunks are known by a 128-bit BLAKE2b.
 */
#include "kv/kv_disk.h"
#include "kv/kv_check.h"
#include "kv/kv_hash.h"
#include "kv/kv_manifest.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define SEG_HEAD 16u
#define CHUNK_HEAD 32u
#define BUCKETS 65536u
#define LOOKS 3                 /* reading a folder that changes is tried again so often */
#define AMP_LIMIT 1.2           /* copying live chunks stops above this write amplification */

static const char SEG_MAGIC[8] = { 'A', 'R', 'L', 'E', 'K', 'V', 'S', '1' };

struct chunk { struct kv_chunk_ref ref; uint32_t refs; int32_t next; };      /* refs 0: free */

struct object {
    struct kv_disk_object o;            /* tokens and salt are owned */
    int32_t *chunks; uint32_t n_chunks;
    uint64_t used;                      /* clock at last use of it or of something below it */
    bool moved;                         /* compaction is moving one of its chunks */
    bool pinned;
    struct object *up, *kids, *prev, *next, *hnext;
};

struct segment { uint32_t num; int fd; uint64_t bytes, live, used; bool pinned; };     /* used, pinned: see seg_ages */

struct kv_disk {
    char *path, *identity;
    uint64_t budget, seg_bytes;
    uint32_t fsync;
    bool read_only, loading;            /* loading: later records may still refer to a segment that looks dead */
    int dir_fd, lock_fd, man_fd;
    uint32_t man_num, next_seg;
    uint64_t man_bytes, man_dead, clock;
    struct segment *segs; uint32_t n_segs, cap_segs;
    int32_t cur;                        /* index of the segment that is written, -1 = none */
    struct chunk *chunks; uint32_t n_chunks, cap_chunks; int32_t free_chunk;
    int32_t *chunk_table;               /* [BUCKETS] by hash */
    struct object **table;              /* [BUCKETS] by id */
    struct { uint64_t id; uint32_t kind; int32_t handle; } *lost; uint32_t n_lost, cap_lost;
    uint8_t *buf;                       /* CHUNK_HEAD + KV_CHUNK_BYTES */
    struct kv_disk_stats st;
};

/* ---- small things --------------------------------------------------------------------------------------------------- */

static uint64_t files_bytes(const struct kv_disk *d)
{
    uint64_t sum = 2 * d->man_bytes;    /* twice: while it is rewritten both are there */
    for (uint32_t i = 0; i < d->n_segs; i++)
        sum += d->segs[i].bytes;
    return sum;
}

static bool grow(void **p, uint32_t *cap, uint32_t need, size_t size)
{
    if (need <= *cap)
        return true;
    uint32_t n = *cap ? *cap * 2 : 64;
    void *q = realloc(*p, n * size);
    if (q == NULL)
        return false;
    *p = q;
    *cap = n;
    return true;
}

static bool write_all(int fd, const void *data, size_t len, uint64_t off)
{
    const uint8_t *p = data;
    while (len > 0) {
        ssize_t n = pwrite(fd, p, len, (off_t)off);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        off += (uint64_t)n;
        len -= (size_t)n;
    }
    return true;
}

static bool read_all(int fd, void *data, size_t len, uint64_t off)
{
    uint8_t *p = data;
    while (len > 0) {
        ssize_t n = pread(fd, p, len, (off_t)off);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        off += (uint64_t)n;
        len -= (size_t)n;
    }
    return true;
}

static void seg_name(char out[32], uint32_t num)
{
    snprintf(out, 32, "seg-%08u.kvs", num);
}

static void man_name(char out[32], uint32_t num)
{
    snprintf(out, 32, "manifest-%08u.kvm", num);
}

/* ---- objects and chunks in memory ------------------------------------------------------------------------------------ */

static struct object *obj_find(const struct kv_disk *d, uint64_t id)
{
    struct object *o = d->table[id % BUCKETS];
    while (o != NULL && o->o.id != id)
        o = o->hnext;
    return o;
}

static struct segment *seg_find(struct kv_disk *d, uint32_t num)
{
    for (uint32_t i = 0; i < d->n_segs; i++)
        if (d->segs[i].num == num)
            return &d->segs[i];
    return NULL;
}

static uint32_t hash_bucket(const uint8_t hash[16])
{
    uint32_t b;
    memcpy(&b, hash, 4);
    return b % BUCKETS;
}

static int32_t chunk_find(const struct kv_disk *d, const uint8_t hash[16], uint32_t len)
{
    for (int32_t i = d->chunk_table[hash_bucket(hash)]; i >= 0; i = d->chunks[i].next)
        if (d->chunks[i].ref.len == len && memcmp(d->chunks[i].ref.hash, hash, 16) == 0)
            return i;
    return -1;
}

/* The chunk at this place with one more reference; -1: no memory. */
static int32_t chunk_ref(struct kv_disk *d, const struct kv_chunk_ref *ref)
{
    int32_t i = chunk_find(d, ref->hash, ref->len);
    if (i < 0) {
        i = d->free_chunk;
        if (i >= 0)
            d->free_chunk = d->chunks[i].next;
        else if (grow((void **)&d->chunks, &d->cap_chunks, d->n_chunks + 1, sizeof *d->chunks))
            i = (int32_t)d->n_chunks++;
        else
            return -1;
        int32_t *bucket = &d->chunk_table[hash_bucket(ref->hash)];
        d->chunks[i] = (struct chunk){ .ref = *ref, .next = *bucket };
        *bucket = i;
        struct segment *s = seg_find(d, ref->seg);
        if (s != NULL)
            s->live += CHUNK_HEAD + ref->len;
    }
    d->chunks[i].refs++;
    return i;
}

static void seg_unlink(struct kv_disk *d, struct segment *s)
{
    char name[32];
    uint32_t i = (uint32_t)(s - d->segs);
    seg_name(name, s->num);
    unlinkat(d->dir_fd, name, 0);
    if (s->fd >= 0)
        close(s->fd);
    d->segs[i] = d->segs[--d->n_segs];
    if (d->cur == (int32_t)i)
        d->cur = -1;
    else if (d->cur == (int32_t)d->n_segs)
        d->cur = (int32_t)i;
}

static void chunk_unref(struct kv_disk *d, int32_t i)
{
    struct chunk *c = &d->chunks[i];
    if (--c->refs > 0)
        return;
    int32_t *at = &d->chunk_table[hash_bucket(c->ref.hash)];
    while (*at != i)
        at = &d->chunks[*at].next;
    *at = c->next;
    c->next = d->free_chunk;
    d->free_chunk = i;
    struct segment *s = seg_find(d, c->ref.seg);
    if (s == NULL)
        return;
    s->live -= CHUNK_HEAD + c->ref.len;
    if (s->live == 0 && (d->cur < 0 || s != &d->segs[d->cur]) && !d->read_only && !d->loading)
        seg_unlink(d, s);
}

static void obj_free(struct object *o)
{
    free((void *)o->o.tokens);
    free((void *)o->o.salt);
    free(o->chunks);
    free(o);
}

/* Enters an object whose chunks are there. NULL: no memory. Takes nothing over. */
static struct object *obj_add(struct kv_disk *d, const struct kv_disk_object *src, const struct kv_chunk_ref *refs, uint32_t n_refs)
{
    struct object *o = calloc(1, sizeof *o);
    int32_t *tokens = malloc(((size_t)src->n_tokens + 1) * 4);
    uint8_t *salt = src->parent == 0 ? malloc(KV_DISK_SALT) : NULL;
    if (o == NULL || tokens == NULL || (src->parent == 0 && salt == NULL)
        || (o->chunks = calloc((size_t)n_refs + 1, sizeof *o->chunks)) == NULL) {
        free(tokens);
        free(salt);
        free(o);
        return NULL;
    }
    o->o = *src;
    if (src->n_tokens > 0)
        memcpy(tokens, src->tokens, (size_t)src->n_tokens * 4);
    o->o.tokens = tokens;
    if (salt != NULL)
        memcpy(salt, src->salt, KV_DISK_SALT);
    o->o.salt = salt;
    for (uint32_t i = 0; i < n_refs; i++) {
        o->chunks[i] = chunk_ref(d, &refs[i]);
        if (o->chunks[i] < 0) {
            while (i > 0)
                chunk_unref(d, o->chunks[--i]);
            obj_free(o);
            return NULL;
        }
        o->n_chunks = i + 1;
    }
    o->hnext = d->table[src->id % BUCKETS];
    d->table[src->id % BUCKETS] = o;
    o->up = src->parent != 0 ? obj_find(d, src->parent) : NULL;
    if (o->up != NULL) {
        o->next = o->up->kids;
        if (o->next != NULL)
            o->next->prev = o;
        o->up->kids = o;
    }
    d->st.objects++;
    d->st.pages += src->kind == KV_DISK_PAGE;
    d->st.states += src->kind == KV_DISK_STATE;
    return o;
}

static void obj_touch(struct kv_disk *d, struct object *o)
{
    for (d->clock++; o != NULL; o = o->up)
        o->used = d->clock;
}

static void obj_unlink(struct kv_disk *d, struct object *o)
{
    struct object **at = &d->table[o->o.id % BUCKETS];
    while (*at != o)
        at = &(*at)->hnext;
    *at = o->hnext;
    if (o->prev != NULL)
        o->prev->next = o->next;
    else if (o->up != NULL)
        o->up->kids = o->next;
    if (o->next != NULL)
        o->next->prev = o->prev;
    d->st.objects--;
    d->st.pages -= o->o.kind == KV_DISK_PAGE;
    d->st.states -= o->o.kind == KV_DISK_STATE;
}

/* ---- the manifest file ------------------------------------------------------------------------------------------------ */

static bool man_append(struct kv_disk *d, const void *rec, size_t len)
{
    if (!write_all(d->man_fd, rec, len, d->man_bytes)) {
        if (ftruncate(d->man_fd, (off_t)d->man_bytes) < 0) {
            /* the torn record stays behind the end and is overwritten by the next one */
        }
        return false;
    }
    d->man_bytes += len;
    d->st.written_bytes += len;
    return true;
}

static size_t obj_record_size(const struct object *o)
{
    return manifest_put_size(&o->o, o->n_chunks);
}

static bool obj_record_write(struct kv_disk *d, const struct object *o, int fd, uint64_t *at)
{
    size_t len = obj_record_size(o);
    uint8_t *rec = malloc(len);
    struct kv_chunk_ref *refs = malloc(((size_t)o->n_chunks + 1) * sizeof *refs);
    bool ok = rec != NULL && refs != NULL;
    if (ok) {
        for (uint32_t i = 0; i < o->n_chunks; i++)
            refs[i] = d->chunks[o->chunks[i]].ref;
        manifest_put(rec, &o->o, refs, o->n_chunks);
        ok = write_all(fd, rec, len, *at);
        *at += ok ? len : 0;
    }
    free(rec);
    free(refs);
    return ok;
}

static void obj_log_del(struct kv_disk *d, const struct object *o)
{
    uint8_t rec[MANIFEST_DEL_SIZE];
    manifest_del(rec, o->o.id);
    man_append(d, rec, sizeof rec);     /* if it fails the object comes back after a restart: stale, but true */
    d->man_dead += sizeof rec + obj_record_size(o);
}

static void leaf_drop(struct kv_disk *d, struct object *o, bool log, bool lost)
{
    if (lost && grow((void **)&d->lost, &d->cap_lost, d->n_lost + 1, sizeof *d->lost)) {
        d->lost[d->n_lost].id = o->o.id;
        d->lost[d->n_lost].kind = o->o.kind;
        d->lost[d->n_lost++].handle = o->o.handle;
    }
    if (log)
        obj_log_del(d, o);
    obj_unlink(d, o);
    for (uint32_t i = 0; i < o->n_chunks; i++)
        chunk_unref(d, o->chunks[i]);
    obj_free(o);
}

/* Takes an object and all below it out, leaves first: a long prompt is a long chain. lost: the owner does not know and is told. */
static void obj_drop(struct kv_disk *d, struct object *top, bool log, bool lost)
{
    for (struct object *o = top, *up; o != NULL; o = up) {
        while (o->kids != NULL)
            o = o->kids;
        up = o != top ? o->up : NULL;
        leaf_drop(d, o, log, lost);
    }
}

static int by_id(const void *a, const void *b)
{
    uint64_t x = (*(struct object *const *)a)->o.id, y = (*(struct object *const *)b)->o.id;
    return x < y ? -1 : x > y;
}

static struct object **sorted(const struct kv_disk *d)
{
    struct object **all = malloc((d->st.objects + 1) * sizeof *all);
    size_t n = 0;
    if (all == NULL)
        return NULL;
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (struct object *o = d->table[b]; o != NULL; o = o->hnext)
            all[n++] = o;
    qsort(all, n, sizeof *all, by_id);
    return all;
}

/* Writes a manifest of what is alive under the next number, and makes it the one. The old one stands until the rename. */
static bool man_rewrite(struct kv_disk *d)
{
    char tmp[40], name[32], old[32];
    man_name(name, d->man_num + 1);
    man_name(old, d->man_num);
    snprintf(tmp, sizeof tmp, "%s.tmp", name);
    int fd = openat(d->dir_fd, tmp, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    struct object **all = sorted(d);
    size_t head_len = manifest_header_size(d->identity);
    uint8_t *head = malloc(head_len);
    uint64_t at = head_len;
    bool ok = fd >= 0 && all != NULL && head != NULL;
    if (ok) {
        manifest_header(head, d->identity);
        ok = write_all(fd, head, head_len, 0);
    }
    for (uint64_t i = 0; ok && i < d->st.objects; i++)
        ok = obj_record_write(d, all[i], fd, &at);
    ok = ok && (d->fsync == 1 || fsync(fd) == 0) && renameat(d->dir_fd, tmp, d->dir_fd, name) == 0;
    free(all);
    free(head);
    if (!ok) {
        if (fd >= 0)
            close(fd);
        unlinkat(d->dir_fd, tmp, 0);
        return false;
    }
    if (d->fsync != 1)
        fsync(d->dir_fd);
    if (d->man_fd >= 0) {
        close(d->man_fd);
        unlinkat(d->dir_fd, old, 0);
    }
    d->man_fd = fd;
    d->man_num++;
    d->man_bytes = at;
    d->man_dead = 0;
    d->st.written_bytes += at;
    return true;
}

/* ---- segments --------------------------------------------------------------------------------------------------------- */

static bool seg_new(struct kv_disk *d)
{
    char name[32];
    uint8_t head[SEG_HEAD] = { 0 };
    if (!grow((void **)&d->segs, &d->cap_segs, d->n_segs + 1, sizeof *d->segs))
        return false;
    seg_name(name, d->next_seg);
    int fd = openat(d->dir_fd, name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    memcpy(head, SEG_MAGIC, 8);
    memcpy(head + 8, &d->next_seg, 4);
    if (fd < 0 || !write_all(fd, head, SEG_HEAD, 0)) {
        if (fd >= 0) {
            close(fd);
            unlinkat(d->dir_fd, name, 0);
        }
        return false;
    }
    d->cur = (int32_t)d->n_segs;
    d->segs[d->n_segs++] = (struct segment){ .num = d->next_seg++, .fd = fd, .bytes = SEG_HEAD };
    d->st.written_bytes += SEG_HEAD;
    return true;
}

static void seg_finish(struct kv_disk *d)
{
    if (d->cur < 0)
        return;
    struct segment *s = &d->segs[d->cur];
    if (d->fsync != 1)
        fdatasync(s->fd);
    d->cur = -1;            /* it may look dead: chunks of an object that is not whole yet. reclaim() deletes what stays so */
}

/* Appends one chunk to the current segment; out says where. */
static bool chunk_write(struct kv_disk *d, const void *data, uint32_t len, const uint8_t hash[16], struct kv_chunk_ref *out)
{
    if (d->cur >= 0 && d->segs[d->cur].bytes > SEG_HEAD && d->segs[d->cur].bytes + CHUNK_HEAD + len > d->seg_bytes)
        seg_finish(d);
    if (d->cur < 0 && !seg_new(d))
        return false;
    struct segment *s = &d->segs[d->cur];
    uint8_t head[CHUNK_HEAD] = { 'K', 'V', 'C', '1' };
    uint32_t crc = kv_crc32c(0, data, len);
    memcpy(head + 4, &len, 4);
    memcpy(head + 8, &crc, 4);
    memcpy(head + 16, hash, 16);
    *out = (struct kv_chunk_ref){ .seg = s->num, .len = len, .off = s->bytes, .crc = crc };
    memcpy(out->hash, hash, 16);
    if (!write_all(s->fd, head, CHUNK_HEAD, s->bytes) || !write_all(s->fd, data, len, s->bytes + CHUNK_HEAD)) {
        int r = ftruncate(s->fd, (off_t)s->bytes);
        (void)r;                /* what is behind `bytes` is never referred to and is overwritten */
        return false;
    }
    s->bytes += CHUNK_HEAD + len;
    d->st.written_bytes += CHUNK_HEAD + len;
    return true;
}

static bool chunk_read(struct kv_disk *d, const struct kv_chunk_ref *ref, void *out, bool deep)
{
    struct segment *s = seg_find(d, ref->seg);
    uint8_t *buf = d->buf, hash[16];
    if (s == NULL || s->fd < 0 || !read_all(s->fd, buf, CHUNK_HEAD + ref->len, ref->off))
        return false;
    if (memcmp(buf, "KVC1", 4) != 0 || memcmp(buf + 4, &ref->len, 4) != 0 || memcmp(buf + 8, &ref->crc, 4) != 0
        || memcmp(buf + 16, ref->hash, 16) != 0 || kv_crc32c(0, buf + CHUNK_HEAD, ref->len) != ref->crc)
        return false;
    if (deep) {
        kv_blake(hash, 16, buf + CHUNK_HEAD, ref->len);
        if (memcmp(hash, ref->hash, 16) != 0)
            return false;
    }
    if (out != NULL)
        memcpy(out, buf + CHUNK_HEAD, ref->len);
    return true;
}

/* ---- room ------------------------------------------------------------------------------------------------------------- */

static bool obj_in_seg(const struct kv_disk *d, const struct object *o, uint32_t seg)
{
    for (uint32_t i = 0; i < o->n_chunks; i++)
        if (d->chunks[o->chunks[i]].ref.seg == seg)
            return true;
    return false;
}

static void seg_ages(struct kv_disk *d)
{
    for (uint32_t i = 0; i < d->n_segs; i++)
        d->segs[i].used = 0, d->segs[i].pinned = false;
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (struct object *o = d->table[b]; o != NULL; o = o->hnext)
            for (uint32_t i = 0; i < o->n_chunks; i++) {
                struct segment *s = seg_find(d, d->chunks[o->chunks[i]].ref.seg);
                if (s != NULL && s->used < o->used)
                    s->used = o->used;
                if (s != NULL)
                    s->pinned |= o->pinned;
            }
}

static bool obj_relog(struct kv_disk *d, struct object *o)
{
    uint64_t at = d->man_bytes;
    if (!obj_record_write(d, o, d->man_fd, &at))
        return false;
    d->man_dead += at - d->man_bytes;
    d->st.written_bytes += at - d->man_bytes;
    d->man_bytes = at;
    o->moved = false;
    return true;
}

static void chunk_move(struct kv_disk *d, struct chunk *c, const struct kv_chunk_ref *to)
{
    struct segment *from = seg_find(d, c->ref.seg), *into = seg_find(d, to->seg);
    if (from != NULL)
        from->live -= CHUNK_HEAD + c->ref.len;
    if (into != NULL)
        into->live += CHUNK_HEAD + c->ref.len;
    c->ref = *to;
}

/* Copies the live chunks of a segment behind the current one and lets it go. */
static bool seg_compact(struct kv_disk *d, uint32_t num)
{
    bool ok = true;
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (struct object *o = d->table[b]; o != NULL; o = o->hnext)
            o->moved = obj_in_seg(d, o, num);
    for (uint32_t i = 0; i < d->n_chunks && ok; i++) {
        struct chunk *c = &d->chunks[i];
        if (c->refs == 0 || c->ref.seg != num)
            continue;
        struct kv_chunk_ref to;
        uint8_t *copy = malloc(c->ref.len);
        ok = copy != NULL && chunk_read(d, &c->ref, copy, false) && chunk_write(d, copy, c->ref.len, c->ref.hash, &to);
        free(copy);
        if (ok) {
            d->st.compacted_bytes += c->ref.len;
            chunk_move(d, c, &to);
        }
    }
    ok = kv_disk_sync(d) == 0 && ok;
    /* Whoever had a chunk there says where it is now; the old segment stands until all of them have. */
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (struct object *o = d->table[b]; o != NULL; o = o->hnext)
            if (o->moved)
                ok = obj_relog(d, o) && ok;
    struct segment *s = seg_find(d, num);
    if (ok && s != NULL && s->live == 0 && kv_disk_sync(d) == 0)
        seg_unlink(d, s);
    return ok;
}

static void seg_evict(struct kv_disk *d, uint32_t num)
{
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (struct object *o = d->table[b]; o != NULL;) {
            if (obj_in_seg(d, o, num)) {
                d->st.evicted++;
                obj_drop(d, o, true, true);
                o = d->table[b];        /* what is below it may have been in this bucket */
            } else {
                o = o->hnext;
            }
        }
    struct segment *s = seg_find(d, num);
    if (s != NULL)
        seg_unlink(d, s);
}

static bool goes_before(const struct segment *a, const struct segment *b)
{
    return a->pinned != b->pinned ? b->pinned : a->used < b->used;
}

static bool reclaim(struct kv_disk *d)
{
    int32_t victim = -1;
    if (d->n_segs == 0 || (d->n_segs == 1 && d->cur == 0))
        seg_finish(d);
    seg_ages(d);
    for (uint32_t i = 0; i < d->n_segs; i++)
        if ((int32_t)i != d->cur && (victim < 0 || goes_before(&d->segs[i], &d->segs[victim])))
            victim = (int32_t)i;
    if (victim < 0)
        return false;
    seg_evict(d, d->segs[victim].num);
    return true;
}

/* Rewrites the manifest when more than half of it is dead, and copies together segments that are mostly dead. */
static void tidy(struct kv_disk *d)
{
    if (d->man_dead > 65536 && d->man_dead > d->man_bytes / 2)
        man_rewrite(d);
}

/* High watermark: room is made when the budget would be passed; low: until 1/16 of it is free, so that it is not made each time. */
static bool make_room(struct kv_disk *d, uint64_t need)
{
    if (files_bytes(d) + need <= d->budget)
        return true;
    uint64_t goal = need + d->budget / 16 < d->budget ? d->budget - d->budget / 16 - need : 0;
    for (uint32_t i = 0; i < d->n_segs && need + d->budget / 16 < d->budget; i++) {
        struct segment *s = &d->segs[i];
        double amp = ((double)d->st.written_bytes + (double)s->live * 1.1) / ((double)d->st.user_bytes + 1);
        if ((int32_t)i != d->cur && s->live < s->bytes / 4 && amp < AMP_LIMIT && files_bytes(d) + s->live + SEG_HEAD <= d->budget
            && seg_compact(d, s->num))
            i = UINT32_MAX;     /* the list has changed: from its start again */
    }
    while (files_bytes(d) > goal) {
        if (d->man_dead > d->man_bytes / 2 && man_rewrite(d))
            continue;
        if (!reclaim(d))
            break;
    }
    return files_bytes(d) + need <= d->budget;
}

/* ---- put, get, remove ----------------------------------------------------------------------------------------------------- */

int kv_disk_put(struct kv_disk *d, const struct kv_disk_object *o, const void *data, struct arle_err *err)
{
    uint32_t n = (uint32_t)((o->bytes + KV_CHUNK_BYTES - 1) / KV_CHUNK_BYTES);
    uint64_t record = manifest_put_size(o, n), need = o->bytes + (uint64_t)n * CHUNK_HEAD + 2 * record + SEG_HEAD;
    if (obj_find(d, o->id) != NULL)
        return arle_err_set(err, -EEXIST, "object %" PRIu64 " is already on disk", o->id);
    if (!make_room(d, need))
        return arle_err_set(err, -ENOSPC, "disk budget of %" PRIu64 " bytes has no room for %" PRIu64, d->budget, need);
    if (o->parent != 0 && obj_find(d, o->parent) == NULL)
        return arle_err_set(err, -ENOENT, "the page before is not on disk");
    struct kv_chunk_ref *refs = calloc((size_t)n + 1, sizeof *refs);
    uint8_t *rec = malloc(record);
    bool ok = refs != NULL && rec != NULL;
    for (uint32_t i = 0; i < n && ok; i++) {
        const uint8_t *part = (const uint8_t *)data + (uint64_t)i * KV_CHUNK_BYTES;
        uint32_t len = i + 1 < n ? KV_CHUNK_BYTES : (uint32_t)(o->bytes - (uint64_t)i * KV_CHUNK_BYTES);
        uint8_t hash[16];
        kv_blake(hash, 16, part, len);
        int32_t known = chunk_find(d, hash, len);
        for (uint32_t k = 0; k < i && known < 0; k++)
            if (refs[k].len == len && memcmp(refs[k].hash, hash, 16) == 0) {
                refs[i] = refs[k];
                d->st.dedup_bytes += len;
                known = -2;
            }
        if (known >= 0) {
            refs[i] = d->chunks[known].ref;
            d->st.dedup_bytes += len;
        } else if (known == -1) {
            ok = chunk_write(d, part, len, hash, &refs[i]);
        }
    }
    struct object *obj = NULL;
    if (ok) {
        manifest_put(rec, o, refs, n);
        ok = man_append(d, rec, record);
        obj = ok ? obj_add(d, o, refs, n) : NULL;
    }
    free(refs);
    free(rec);
    if (obj == NULL)
        return arle_err_set(err, errno == ENOSPC ? -ENOSPC : -EIO, "cannot write to %s: %s", d->path, strerror(errno));
    d->st.user_bytes += o->bytes;
    obj_touch(d, obj);
    tidy(d);
    return 0;
}

int kv_disk_sync(struct kv_disk *d)
{
    if (d->fsync == 1)
        return 0;
    if (d->cur >= 0 && fdatasync(d->segs[d->cur].fd) < 0)
        return -errno;
    return fdatasync(d->man_fd) < 0 ? -errno : 0;
}

int kv_disk_get(struct kv_disk *d, uint64_t id, void *data, uint64_t bytes, struct arle_err *err)
{
    struct object *o = obj_find(d, id);
    if (o == NULL || o->o.bytes != bytes)
        return arle_err_set(err, -ENOENT, "object %" PRIu64 " is not on disk", id);
    uint8_t *at = data;
    for (uint32_t i = 0; i < o->n_chunks; i++) {
        const struct kv_chunk_ref *ref = &d->chunks[o->chunks[i]].ref;
        if (!chunk_read(d, ref, at, false)) {
            d->st.bad_objects++;
            arle_err_set(err, -EBADMSG, "damaged chunk of segment %u at %" PRIu64, ref->seg, ref->off);
            if (!d->read_only)
                obj_drop(d, o, true, true);
            return -EBADMSG;
        }
        at += ref->len;
    }
    obj_touch(d, o);
    return 0;
}

void kv_disk_remove(struct kv_disk *d, uint64_t id)
{
    struct object *o = obj_find(d, id);
    if (o == NULL)
        return;
    obj_drop(d, o, true, false);
    tidy(d);
}

void kv_disk_pin(struct kv_disk *d, uint64_t id, bool pinned)
{
    struct object *o = obj_find(d, id);
    if (o != NULL)
        o->pinned = pinned;
}

bool kv_disk_next_lost(struct kv_disk *d, uint64_t *id, uint32_t *kind, int32_t *handle)
{
    if (d->n_lost == 0)
        return false;
    d->n_lost--;
    *id = d->lost[d->n_lost].id;
    *kind = d->lost[d->n_lost].kind;
    *handle = d->lost[d->n_lost].handle;
    return true;
}

void kv_disk_each(struct kv_disk *d, void (*fn)(void *arg, struct kv_disk_object *o), void *arg)
{
    uint64_t n = d->st.objects;
    struct object **all = sorted(d);
    for (uint64_t i = 0; all != NULL && i < n; i++)
        fn(arg, &all[i]->o);
    free(all);
}

uint64_t kv_disk_max_id(const struct kv_disk *d)
{
    uint64_t max = 0;
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (const struct object *o = d->table[b]; o != NULL; o = o->hnext)
            max = o->o.id > max ? o->o.id : max;
    return max;
}

uint64_t kv_disk_verify(struct kv_disk *d)
{
    uint64_t bad = 0;
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (const struct object *o = d->table[b]; o != NULL; o = o->hnext) {
            bool ok = true;
            for (uint32_t i = 0; i < o->n_chunks && ok; i++)
                ok = chunk_read(d, &d->chunks[o->chunks[i]].ref, NULL, true);
            bad += !ok;
        }
    return bad;
}

void kv_disk_stat(const struct kv_disk *d, struct kv_disk_stats *out)
{
    *out = d->st;
    out->segments = d->n_segs;
    out->budget = d->budget;
    out->file_bytes = d->man_bytes;
    out->live_bytes = 0;
    for (uint32_t i = 0; i < d->n_segs; i++) {
        out->file_bytes += d->segs[i].bytes;
        out->live_bytes += d->segs[i].live;
    }
}

/* ---- open and close --------------------------------------------------------------------------------------------------------- */

static void replay_del(void *arg, uint64_t id)
{
    struct kv_disk *d = arg;
    struct object *o = obj_find(d, id);
    if (o != NULL) {
        d->man_dead += obj_record_size(o);
        obj_drop(d, o, false, false);
    }
    d->man_dead += MANIFEST_DEL_SIZE;
}

static void replay_put(void *arg, const struct kv_disk_object *src, const struct kv_chunk_ref *refs, uint32_t n)
{
    struct kv_disk *d = arg;
    struct object *o = obj_find(d, src->id), *up = src->parent != 0 ? obj_find(d, src->parent) : NULL;
    if (o == NULL) {
        if (src->parent == 0 || (up != NULL && up->o.kind == KV_DISK_PAGE))
            obj_add(d, src, refs, n);
        return;                 /* an orphan: its ancestor was damaged */
    }
    if (o->n_chunks != n)
        return;
    d->man_dead += obj_record_size(o);
    for (uint32_t i = 0; i < n; i++) {  /* moved by compaction: the same bytes somewhere else */
        int32_t c = chunk_find(d, refs[i].hash, refs[i].len);
        if (c == o->chunks[i])
            chunk_move(d, &d->chunks[c], &refs[i]);
    }
}

static int list_files(struct kv_disk *d, uint32_t *out_man)
{
    int fd = openat(d->dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    struct dirent *e;
    if (dir == NULL)
        return -errno;
    *out_man = 0;
    while ((e = readdir(dir)) != NULL) {
        unsigned num;
        char tail[8] = "";
        struct stat sb;
        if (sscanf(e->d_name, "seg-%8u.%7s", &num, tail) == 2 && strcmp(tail, "kvs") == 0) {
            struct segment *known = seg_find(d, num);
            if (known != NULL) {
                if (fstat(known->fd, &sb) == 0)
                    known->bytes = (uint64_t)sb.st_size;
                continue;
            }
            int f = openat(d->dir_fd, e->d_name, d->read_only ? O_RDONLY | O_CLOEXEC : O_RDWR | O_CLOEXEC);
            if (f < 0 || fstat(f, &sb) < 0 || !grow((void **)&d->segs, &d->cap_segs, d->n_segs + 1, sizeof *d->segs)) {
                if (f >= 0)
                    close(f);
                continue;
            }
            d->segs[d->n_segs++] = (struct segment){ .num = num, .fd = f, .bytes = (uint64_t)sb.st_size };
            if (num >= d->next_seg)
                d->next_seg = num + 1;
        } else if (strstr(e->d_name, ".tmp") != NULL) {
            if (!d->read_only)
                unlinkat(d->dir_fd, e->d_name, 0);
        } else if (sscanf(e->d_name, "manifest-%8u.%7s", &num, tail) == 2 && strcmp(tail, "kvm") == 0 && num > *out_man) {
            *out_man = num;
        }
    }
    closedir(dir);
    return 0;
}

/* Objects whose chunks cannot be there are dropped; segments nobody refers to are deleted. */
static void settle(struct kv_disk *d)
{
    for (uint32_t b = 0; b < BUCKETS; b++)
        for (struct object *o = d->table[b]; o != NULL;) {
            bool ok = true;
            for (uint32_t i = 0; i < o->n_chunks && ok; i++) {
                const struct kv_chunk_ref *r = &d->chunks[o->chunks[i]].ref;
                const struct segment *s = seg_find(d, r->seg);
                ok = s != NULL && r->off <= s->bytes && r->len + CHUNK_HEAD <= s->bytes - r->off;
            }
            if (ok) {
                o = o->hnext;
                continue;
            }
            d->st.bad_objects++;
            obj_drop(d, o, false, false);
            d->man_dead = UINT64_MAX / 2;       /* rewrite */
            o = d->table[b];
        }
    for (uint32_t i = 0; i < d->n_segs;)
        if (d->segs[i].live == 0 && !d->read_only)
            seg_unlink(d, &d->segs[i]);
        else
            i++;
}

static int man_load(struct kv_disk *d, uint32_t num, struct arle_err *err)
{
    char name[32];
    struct stat sb;
    man_name(name, num);
    int fd = openat(d->dir_fd, name, d->read_only ? O_RDONLY | O_CLOEXEC : O_RDWR | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &sb) < 0) {
        if (fd >= 0)
            close(fd);
        return arle_err_set(err, -EIO, "%s/%s: %s", d->path, name, strerror(errno));
    }
    uint8_t *data = malloc((size_t)sb.st_size + 1);
    int64_t end = -ENOMEM;
    uint32_t ignored;
    if (data != NULL && read_all(fd, data, (size_t)sb.st_size, 0)
        && (!d->read_only || list_files(d, &ignored) == 0)) {       /* a writer has put chunks before their records: now they are seen */
        struct kv_manifest_sink sink = { .arg = d, .put = replay_put, .del = replay_del };
        end = kv_manifest_parse(data, (size_t)sb.st_size, d->identity, &sink, &d->st.skipped_bytes);
    }
    free(data);
    d->man_num = num;
    if (end < 0) {
        close(fd);
        return end == -EINVAL ? arle_err_param(err, -EINVAL, "kv_disk_dir", "%s/%s was written for another model, dtype or layout", d->path, name)
                              : arle_err_set(err, (int)end, "cannot read %s/%s", d->path, name);
    }
    d->man_fd = fd;
    d->man_bytes = (uint64_t)end;
    if (end == 0 || d->st.skipped_bytes > 0)
        d->man_dead = UINT64_MAX / 2;           /* damaged: what is sound goes into a new one */
    else if (!d->read_only && ftruncate(fd, (off_t)end) < 0)
        return arle_err_set(err, -EIO, "%s/%s: %s", d->path, name, strerror(errno));
    return 0;
}

static int open_dir(struct kv_disk *d, const struct kv_disk_config *cfg, struct arle_err *err)
{
    uint8_t id[8] = { 0 };
    char path[4096];
    int n;
    if (cfg->identity != NULL)
        kv_blake(id, sizeof id, cfg->identity, strlen(cfg->identity));
    if (cfg->identity == NULL)
        n = snprintf(path, sizeof path, "%s", cfg->dir);
    else
        n = snprintf(path, sizeof path, "%s/%02x%02x%02x%02x%02x%02x%02x%02x", cfg->dir, id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]);
    if (n < 0 || (size_t)n >= sizeof path)
        return arle_err_param(err, -EINVAL, "kv_disk_dir", "path too long");
    if (!cfg->read_only && ((mkdir(cfg->dir, 0700) < 0 && errno != EEXIST) || (mkdir(path, 0700) < 0 && errno != EEXIST)))
        return arle_err_param(err, -errno, "kv_disk_dir", "cannot make %s: %s", path, strerror(errno));
    d->path = strdup(path);
    d->dir_fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (d->path == NULL || d->dir_fd < 0)
        return arle_err_param(err, -errno, "kv_disk_dir", "cannot open %s: %s", path, strerror(errno));
    if (cfg->read_only)
        return 0;
    d->lock_fd = openat(d->dir_fd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (d->lock_fd < 0 || flock(d->lock_fd, LOCK_EX | LOCK_NB) < 0)
        return arle_err_param(err, -EBUSY, "kv_disk_dir", "%s is in use by another process", path);
    return 0;
}

static int open_once(struct kv_disk **out, const struct kv_disk_config *cfg, struct arle_err *err)
{
    struct kv_disk *d = calloc(1, sizeof *d);
    if (d == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the disk tier");
    d->dir_fd = d->lock_fd = d->man_fd = -1;
    d->cur = d->free_chunk = -1;
    d->next_seg = 1;
    d->budget = cfg->budget;
    d->fsync = cfg->fsync;
    d->read_only = cfg->read_only;
    d->seg_bytes = cfg->budget / 32 > (64u << 20) ? 64u << 20 : cfg->budget / 32;
    d->identity = cfg->identity != NULL ? strdup(cfg->identity) : NULL;
    d->table = calloc(BUCKETS, sizeof *d->table);
    d->chunk_table = malloc(BUCKETS * sizeof *d->chunk_table);
    d->buf = malloc(CHUNK_HEAD + KV_CHUNK_BYTES);
    int r = 0;
    uint32_t man = 0;
    if ((d->identity == NULL && (cfg->identity != NULL || !cfg->read_only)) || d->table == NULL || d->chunk_table == NULL || d->buf == NULL)
        r = arle_err_set(err, -ENOMEM, "no memory for the disk tier");
    else
        memset(d->chunk_table, 0xFF, BUCKETS * sizeof *d->chunk_table);
    if (r == 0)
        r = open_dir(d, cfg, err);
    if (r == 0 && (r = list_files(d, &man)) < 0)
        arle_err_set(err, r, "cannot list %s", d->path);
    d->loading = true;
    if (r == 0 && man > 0)
        r = man_load(d, man, err);
    for (uint32_t old = man; r == 0 && !d->read_only && old > 1 && old + 4 > man; old--) {
        char name[32];          /* what a rewrite left behind when it was killed before its last line */
        man_name(name, old - 1);
        unlinkat(d->dir_fd, name, 0);
    }
    d->loading = false;
    if (r == 0)
        settle(d);
    if (r == 0 && !d->read_only && (man == 0 || d->man_dead > d->man_bytes / 2) && !man_rewrite(d))
        r = arle_err_set(err, -EIO, "cannot write a manifest in %s: %s", d->path, strerror(errno));
    if (r == 0 && !d->read_only && files_bytes(d) > d->budget)
        make_room(d, 0);        /* the budget was made smaller */
    if (r < 0) {
        kv_disk_close(d);
        return r;
    }
    d->st.user_bytes = d->st.written_bytes = 0;
    *out = d;
    return 0;
}

int kv_disk_open(struct kv_disk **out, const struct kv_disk_config *cfg, struct arle_err *err)
{
    int r = open_once(out, cfg, err);
    /* An engine that writes meanwhile may have dropped a segment, or replaced the manifest, between two looks at the folder. */
    for (int i = 0; i < LOOKS && cfg->read_only && (r == -EIO || (r == 0 && (*out)->st.bad_objects > 0)); i++) {
        if (r == 0)
            kv_disk_close(*out);
        r = open_once(out, cfg, err);
    }
    return r;
}

void kv_disk_close(struct kv_disk *d)
{
    if (d == NULL)
        return;
    if (!d->read_only && d->man_fd >= 0)
        kv_disk_sync(d);
    for (uint32_t b = 0; d->table != NULL && b < BUCKETS; b++)
        while (d->table[b] != NULL) {
            struct object *o = d->table[b];
            d->table[b] = o->hnext;
            obj_free(o);
        }
    for (uint32_t i = 0; i < d->n_segs; i++)
        if (d->segs[i].fd >= 0)
            close(d->segs[i].fd);
    if (d->man_fd >= 0)
        close(d->man_fd);
    if (d->lock_fd >= 0)
        close(d->lock_fd);
    if (d->dir_fd >= 0)
        close(d->dir_fd);
    free(d->segs);
    free(d->chunks);
    free(d->chunk_table);
    free(d->table);
    free(d->lost);
    free(d->buf);
    free(d->identity);
    free(d->path);
    free(d);
}
