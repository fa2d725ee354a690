/*
 * The parsed tokenizer as one block of memory: built once from the loader's parts, then used in place. The same block
 * is what the cache keeps on disk, so everything in it is an offset, and adopting one checks all of them.
 */
#include <stdlib.h>
#include <string.h>

#include "chat/tok_int.h"

#define IMAGE_MAGIC 0x4B4F5445u     /* also tells the byte order */
#define IMAGE_VERSION 1u

struct image {
    uint32_t magic, version;
    uint64_t bytes;
    uint32_t n_ids, nfc, ignore_merges, n_stages;
    struct {
        uint32_t kind, off, len;
    } stage[TOK_MAX_STAGES];
    uint32_t merge_bits, whole_bits;    /* whole_bits 0: no such table */
    uint32_t n_raw, n_normal, blob_len, reserved;
    uint32_t byte_id[256];
};

/* Where each array begins; all are multiples of 16. */
struct layout {
    size_t text_off, kind, merge, whole, raw, normal, blob, end;
};

static size_t align16(size_t n)
{
    return (n + 15) & ~(size_t)15;
}

/* Counts are below 2^32 and elements at most 16 bytes, so 64-bit sums cannot wrap. */
static struct layout layout_of(const struct image *im)
{
    struct layout l;
    l.text_off = align16(sizeof *im);
    l.kind = l.text_off + align16(((size_t)im->n_ids + 1) * sizeof(uint32_t));
    l.merge = l.kind + align16(im->n_ids);
    l.whole = l.merge + ((size_t)sizeof(struct tok_merge) << im->merge_bits);
    l.raw = l.whole + (im->whole_bits ? (size_t)sizeof(uint32_t) << im->whole_bits : 0);
    l.normal = l.raw + align16((size_t)im->n_raw * sizeof(struct tok_added));
    l.blob = l.normal + align16((size_t)im->n_normal * sizeof(struct tok_added));
    l.end = l.blob + align16((size_t)im->blob_len + TOK_BUF_SLACK);
    return l;
}

static void point_into(struct tok_tables *t, struct image *im, const struct layout *l)
{
    uint8_t *base = (uint8_t *)im;
    t->n_ids = im->n_ids;
    t->nfc = im->nfc;
    t->ignore_merges = im->ignore_merges;
    t->n_stages = im->n_stages;
    for (uint32_t i = 0; i < im->n_stages; i++)
        t->stage[i] = (struct tok_stage){ im->stage[i].kind, im->stage[i].off, im->stage[i].len, NULL };
    memcpy(t->byte_id, im->byte_id, sizeof t->byte_id);
    t->text_off = (const uint32_t *)(const void *)(base + l->text_off);
    t->kind = base + l->kind;
    t->merge = (const struct tok_merge *)(const void *)(base + l->merge);
    t->merge_bits = im->merge_bits;
    t->whole = im->whole_bits ? (const uint32_t *)(const void *)(base + l->whole) : NULL;
    t->whole_bits = im->whole_bits;
    t->raw.list = (const struct tok_added *)(const void *)(base + l->raw);
    t->raw.n = im->n_raw;
    t->normal.list = (const struct tok_added *)(const void *)(base + l->normal);
    t->normal.n = im->n_normal;
    t->blob = base + l->blob;
    t->blob_len = im->blob_len;
    t->image = im;
    t->image_len = l->end;
}

/* ---- building ---- */

/* A quarter full while that stays within a second-level cache (searches rarely probe twice), else half full. */
static uint32_t bits_for(size_t n)
{
    uint32_t bits = 4;
    while (((size_t)1 << bits) < 2 * n || (((size_t)1 << bits) < 4 * n && bits < 15))
        bits++;
    return bits;
}

/* A pair that is listed twice counts as listed last, as in the reference. */
static void put_merge(struct tok_merge *table, uint32_t bits, const struct tok_merge *m)
{
    uint32_t mask = (1u << bits) - 1, i = tok_merge_hash(m->left, m->right, bits);
    while (table[i].left != TOK_NONE && (table[i].left != m->left || table[i].right != m->right))
        i = (i + 1) & mask;
    table[i] = *m;
}

static void put_whole(uint32_t *table, const struct tok_parts *ps, uint32_t bits, uint32_t id)
{
    uint32_t mask = (1u << bits) - 1, off = ps->text_off[id];
    uint32_t i = tok_bytes_hash(ps->blob.p + off, ps->text_off[id + 1] - off, bits);
    while (table[i] != TOK_NONE)
        i = (i + 1) & mask;
    table[i] = id;
}

int tok_image_build(struct tok_tables *t, const struct tok_parts *ps, struct arle_err *err)
{
    struct image head = {
        .magic = IMAGE_MAGIC, .version = IMAGE_VERSION, .n_ids = ps->n_ids, .nfc = ps->nfc,
        .ignore_merges = ps->ignore_merges, .n_stages = ps->n_stages, .merge_bits = bits_for(ps->n_merges),
        .whole_bits = ps->ignore_merges ? bits_for(ps->n_ids) : 0, .n_raw = ps->n_raw, .n_normal = ps->n_normal,
        .blob_len = (uint32_t)ps->blob.n,
    };
    for (uint32_t i = 0; i < ps->n_stages; i++) {
        head.stage[i].kind = ps->stage[i].kind;
        head.stage[i].off = ps->stage[i].pattern_off;
        head.stage[i].len = ps->stage[i].pattern_len;
    }
    memcpy(head.byte_id, ps->byte_id, sizeof head.byte_id);
    struct layout l = layout_of(&head);
    head.bytes = l.end;
    uint8_t *base = calloc(1, l.end);
    if (base == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the tokenizer's tables (%zu bytes)", l.end);
    memcpy(base, &head, sizeof head);
    memcpy(base + l.text_off, ps->text_off, ((size_t)ps->n_ids + 1) * sizeof(uint32_t));
    memcpy(base + l.kind, ps->kind, ps->n_ids);
    memcpy(base + l.raw, ps->raw, ps->n_raw * sizeof *ps->raw);
    memcpy(base + l.normal, ps->normal, ps->n_normal * sizeof *ps->normal);
    memcpy(base + l.blob, ps->blob.p, ps->blob.n);

    struct tok_merge *merge = (struct tok_merge *)(void *)(base + l.merge);
    memset(merge, 0xFF, sizeof *merge << head.merge_bits);
    for (uint32_t i = 0; i < ps->n_merges; i++)
        put_merge(merge, head.merge_bits, &ps->merges[i]);
    if (ps->ignore_merges) {
        uint32_t *whole = (uint32_t *)(void *)(base + l.whole);
        memset(whole, 0xFF, sizeof *whole << head.whole_bits);
        for (uint32_t id = 0; id < ps->n_ids; id++)
            if (ps->kind[id] == TOK_KIND_PLAIN && ps->text_off[id + 1] > ps->text_off[id])
                put_whole(whole, ps, head.whole_bits, id);
    }
    point_into(t, (struct image *)(void *)base, &l);
    return 0;
}

/* ---- adopting ---- */

static bool texts_ok(const struct tok_tables *t)
{
    for (uint32_t i = 0; i < t->n_ids; i++)
        if (t->text_off[i] > t->text_off[i + 1] || t->kind[i] > TOK_KIND_SPECIAL)
            return false;
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] >= t->n_ids)
            return false;
    return t->text_off[t->n_ids] <= t->blob_len;
}

/* Every id in range, and a free slot, which ends every search. */
static bool merges_ok(const struct tok_tables *t)
{
    size_t n_free = 0;
    for (size_t i = 0; i < (size_t)1 << t->merge_bits; i++) {
        const struct tok_merge *m = &t->merge[i];
        if (m->left == TOK_NONE)
            n_free++;
        else if (m->id >= t->n_ids || m->rank == TOK_NONE)
            return false;
    }
    return n_free > 0;
}

static bool whole_ok(const struct tok_tables *t)
{
    if (t->whole_bits == 0)
        return !t->ignore_merges;
    size_t n_free = 0;
    for (size_t i = 0; i < (size_t)1 << t->whole_bits; i++) {
        if (t->whole[i] == TOK_NONE)
            n_free++;
        else if (t->whole[i] >= t->n_ids)
            return false;
    }
    return n_free > 0;
}

static bool literals_ok(const struct tok_tables *t, const struct tok_literals *set)
{
    for (uint32_t i = 0; i < set->n; i++) {
        uint32_t id = set->list[i].id;
        if (id >= t->n_ids || t->text_off[id] == t->text_off[id + 1])
            return false;
        if (i == 0)
            continue;
        uint32_t prev = set->list[i - 1].id;
        size_t na = t->text_off[prev + 1] - t->text_off[prev], nb = t->text_off[id + 1] - t->text_off[id];
        int c = memcmp(t->blob + t->text_off[prev], t->blob + t->text_off[id], na < nb ? na : nb);
        if (c > 0 || (c == 0 && na >= nb))
            return false;
    }
    return true;
}

static bool stages_ok(const struct tok_tables *t)
{
    for (uint32_t i = 0; i < t->n_stages; i++)
        if (t->stage[i].kind > TOK_STAGE_PCRE2 || t->stage[i].pattern_off > t->blob_len ||
            t->stage[i].pattern_len > t->blob_len - t->stage[i].pattern_off)
            return false;
    return true;
}

int tok_image_adopt(struct tok_tables *t, void *image, size_t len)
{
    struct image *im = image;
    if (len < sizeof *im || im->magic != IMAGE_MAGIC || im->version != IMAGE_VERSION || im->bytes != len)
        return -EINVAL;
    if (im->n_ids == 0 || im->n_ids > INT32_MAX || im->n_stages > TOK_MAX_STAGES || im->merge_bits < 4 ||
        im->merge_bits > 28 || im->whole_bits > 28)
        return -EINVAL;
    struct layout l = layout_of(im);
    if (l.end != len)
        return -EINVAL;
    struct tok_tables tmp = { 0 };
    point_into(&tmp, im, &l);
    if (!texts_ok(&tmp) || !merges_ok(&tmp) || !whole_ok(&tmp) || !literals_ok(&tmp, &tmp.raw) ||
        !literals_ok(&tmp, &tmp.normal) || !stages_ok(&tmp))
        return -EINVAL;
    *t = tmp;
    return 0;
}

void tok_tables_fini(struct tok_tables *t)
{
    tok_stages_free(t);
    free(t->image);
    *t = (struct tok_tables){ 0 };
}
