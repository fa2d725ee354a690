/*
 * Byte-pair merging of one piece: merge the pair of lowest rank, leftmost among equals, until none is left. Almost
 * every piece of real text is found in the piece cache; the rest are short (a scan over an array) or long (a tournament
 * tree over the ranks, so that a megabyte of one letter costs n log n). Source: Sennrich et al. 2016, arXiv:1508.07909,
 * section 3.2; the byte alphabet is that of GPT-2.
 */
#include <stdlib.h>
#include <string.h>

#include "chat/tok_int.h"

#define SHORT_PIECE 48      /* symbols; a scan per merge beats the tree below about this length */

int tok_buf_reserve(struct tok_buf *b, size_t more)
{
    if (b->cap >= TOK_BUF_SLACK && more <= b->cap - TOK_BUF_SLACK - b->n)
        return 0;
    size_t need, cap;
    if (__builtin_add_overflow(b->n, more, &need) || need > SIZE_MAX / 2)
        return -ENOMEM;
    cap = need + need / 2 + 4096 + TOK_BUF_SLACK;
    uint8_t *p = realloc(b->p, cap);
    if (p == NULL)
        return -ENOMEM;
    b->p = p;
    b->cap = cap;
    return 0;
}

void tok_buf_fini(struct tok_buf *b)
{
    free(b->p);
    *b = (struct tok_buf){ 0 };
}

int tok_ids_grow(struct tok_ids *ids, size_t more)
{
    size_t cap = ids->n + ids->n / 2 + more + 256;
    if (cap > SIZE_MAX / sizeof *ids->ids)
        return -ENOMEM;
    int32_t *p = realloc(ids->ids, cap * sizeof *p);
    if (p == NULL)
        return -ENOMEM;
    ids->ids = p;
    ids->cap = cap;
    return 0;
}

uint32_t tok_bytes_hash(const uint8_t *p, size_t n, uint32_t bits)
{
    uint64_t h = n * UINT64_C(0x9E3779B97F4A7C15);
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        h = (h ^ w) * UINT64_C(0xD6E8FEB86659FD93);
        h ^= h >> 29;
    }
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * UINT64_C(0xD6E8FEB86659FD93);
    h ^= h >> 32;
    return (uint32_t)((h * UINT64_C(0x9E3779B97F4A7C15)) >> (64 - bits));
}

uint32_t tok_whole_find(const struct tok_tables *t, const uint8_t *p, size_t n)
{
    uint32_t mask = (1u << t->whole_bits) - 1;
    for (uint32_t i = tok_bytes_hash(p, n, t->whole_bits);; i = (i + 1) & mask) {
        uint32_t id = t->whole[i];
        if (id == TOK_NONE)
            return id;
        if (t->text_off[id + 1] - t->text_off[id] == n && memcmp(t->blob + t->text_off[id], p, n) == 0)
            return id;
    }
}

/* A symbol of a short piece with what its pair with the next symbol would become. */
struct sym {
    uint32_t id, rank, to;      /* rank TOK_NONE: no merge */
};

static inline void pair_of(const struct tok_tables *t, struct sym *s, uint32_t next)
{
    const struct tok_merge *m = tok_merge_find(t, s->id, next);
    s->rank = m ? m->rank : TOK_NONE;
    s->to = m ? m->id : 0;
}

static size_t merge_short(const struct tok_tables *t, const uint8_t *p, size_t n, int32_t *out)
{
    struct sym s[SHORT_PIECE];
    for (size_t i = 0; i < n; i++)
        s[i].id = t->byte_id[p[i]];
    for (size_t i = 0; i + 1 < n; i++)
        pair_of(t, &s[i], s[i + 1].id);
    s[n - 1].rank = TOK_NONE;
    while (n > 1) {
        size_t at = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (s[i].rank < s[at].rank)
                at = i;
        if (s[at].rank == TOK_NONE)
            break;
        s[at].id = s[at].to;
        memmove(&s[at + 1], &s[at + 2], (n - at - 2) * sizeof s[0]);
        n--;
        s[at].rank = TOK_NONE;
        if (at + 1 < n)
            pair_of(t, &s[at], s[at + 1].id);
        if (at > 0)
            pair_of(t, &s[at - 1], s[at].id);
    }
    for (size_t i = 0; i < n; i++)
        out[i] = (int32_t)s[i].id;
    return n;
}

/*
 * Long pieces. Leaf i of the tree holds the rank of the pair that starts at byte i (TOK_NONE: none, or the symbol was
 * merged away); inner nodes hold the smaller of two. 20 bytes per byte of text, whatever the merges do.
 */
struct long_piece {
    const struct tok_tables *t;
    uint32_t *id, *next, *prev, *tree;
    uint32_t n, leaves;
};

static void tree_set(struct long_piece *lp, uint32_t i, uint32_t rank)
{
    uint32_t node = lp->leaves + i;
    lp->tree[node] = rank;
    while (node > 1) {
        uint32_t a = lp->tree[node], b = lp->tree[node ^ 1], low = a < b ? a : b;
        node >>= 1;
        if (lp->tree[node] == low)
            break;
        lp->tree[node] = low;
    }
}

static uint32_t tree_leftmost_min(const struct long_piece *lp)
{
    uint32_t node = 1, low = lp->tree[1];
    while (node < lp->leaves)
        node = lp->tree[2 * node] == low ? 2 * node : 2 * node + 1;
    return node - lp->leaves;
}

static uint32_t rank_at(const struct long_piece *lp, uint32_t i)
{
    if (lp->next[i] == lp->n)
        return TOK_NONE;
    const struct tok_merge *m = tok_merge_find(lp->t, lp->id[i], lp->id[lp->next[i]]);
    return m ? m->rank : TOK_NONE;
}

static void merge_at(struct long_piece *lp, uint32_t i)
{
    uint32_t j = lp->next[i];
    lp->id[i] = tok_merge_find(lp->t, lp->id[i], lp->id[j])->id;
    lp->next[i] = lp->next[j];
    if (lp->next[i] != lp->n)
        lp->prev[lp->next[i]] = i;
    tree_set(lp, j, TOK_NONE);
    tree_set(lp, i, rank_at(lp, i));
    if (lp->prev[i] != TOK_NONE)
        tree_set(lp, lp->prev[i], rank_at(lp, lp->prev[i]));
}

static int merge_long(struct tok_run *run, const uint8_t *p, size_t n)
{
    if (n > UINT32_MAX / 4)
        return arle_err_set(run->err, -E2BIG, "text has an unbroken piece of %zu bytes", n);
    struct long_piece lp = { .t = run->t, .n = (uint32_t)n, .leaves = 1 };
    while (lp.leaves < lp.n)
        lp.leaves *= 2;
    struct tok_buf *work = &run->s->work;
    work->n = 0;
    if (tok_buf_reserve(work, (3 * n + 2 * (size_t)lp.leaves) * sizeof(uint32_t)) < 0)
        return arle_err_set(run->err, -ENOMEM, "no memory to merge a piece of %zu bytes", n);
    lp.id = (uint32_t *)(void *)work->p;
    lp.next = lp.id + n;
    lp.prev = lp.next + n;
    lp.tree = lp.prev + n;
    for (uint32_t i = 0; i < lp.n; i++) {
        lp.id[i] = run->t->byte_id[p[i]];
        lp.next[i] = i + 1;
        lp.prev[i] = i - 1;         /* TOK_NONE for the first */
    }
    for (uint32_t i = 0; i < lp.leaves; i++)
        lp.tree[lp.leaves + i] = i < lp.n ? rank_at(&lp, i) : TOK_NONE;
    for (uint32_t i = lp.leaves - 1; i > 0; i--)
        lp.tree[i] = lp.tree[2 * i] < lp.tree[2 * i + 1] ? lp.tree[2 * i] : lp.tree[2 * i + 1];
    while (lp.tree[1] != TOK_NONE)
        merge_at(&lp, tree_leftmost_min(&lp));
    for (uint32_t i = 0; i != lp.n; i = lp.next[i])
        run->out->ids[run->out->n++] = (int32_t)lp.id[i];
    return 0;
}

int tok_bpe_merge(struct tok_run *run, const uint8_t *p, size_t n)
{
    struct tok_ids *out = run->out;
    if (tok_ids_reserve(out, n) < 0)
        return arle_err_set(run->err, -ENOMEM, "no memory for token ids");
    if (run->t->ignore_merges) {
        uint32_t id = tok_whole_find(run->t, p, n);
        if (id != TOK_NONE) {
            out->ids[out->n++] = (int32_t)id;
            return 0;
        }
    }
    if (n > SHORT_PIECE)
        return merge_long(run, p, n);
    out->n += merge_short(run->t, p, n, out->ids + out->n);
    return 0;
}

static const uint64_t key_mask[TOK_PIECE_MAX + 1][3] = {
#define M8(n) ((n) <= 0 ? 0 : (n) >= 8 ? UINT64_MAX : (UINT64_C(1) << (8 * ((n) & 7))) - 1)
#define ROW(n) { M8(n), M8((n) - 8), M8((n) - 16) }
    ROW(0), ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6), ROW(7), ROW(8), ROW(9), ROW(10), ROW(11), ROW(12),
    ROW(13), ROW(14), ROW(15), ROW(16), ROW(17), ROW(18), ROW(19), ROW(20), ROW(21), ROW(22), ROW(23), ROW(24),
};

static int piece_miss(struct tok_run *run, const uint8_t *p, size_t n, struct tok_piece *e, const uint64_t key[3])
{
    size_t before = run->out->n;
    int r = tok_bpe_merge(run, p, n);
    if (r < 0)
        return r;
    size_t made = run->out->n - before;
    if (made <= TOK_PIECE_IDS) {
        memcpy(e->key, key, sizeof e->key);
        memcpy(e->ids, run->out->ids + before, made * sizeof e->ids[0]);
        e->len_n = (uint32_t)n | (uint32_t)made << 8;
    }
    return 0;
}

int tok_bpe_piece(struct tok_run *run, const uint8_t *p, size_t n)
{
    if (n > TOK_PIECE_MAX)
        return tok_bpe_merge(run, p, n);

    uint64_t key[3];
    if (run->readable - p >= TOK_PIECE_MAX) {
        memcpy(key, p, sizeof key);
    } else {
        memset(key, 0, sizeof key);
        memcpy(key, p, n);
    }
    const uint64_t *mask = key_mask[n];
    key[0] &= mask[0];
    key[1] &= mask[1];
    key[2] &= mask[2];
    uint64_t h = (key[0] ^ key[1] * UINT64_C(0xC2B2AE3D27D4EB4F) ^ key[2] * UINT64_C(0x165667B19E3779F9)) *
                 UINT64_C(0x9E3779B97F4A7C15);
    h ^= h >> 32;
    struct tok_piece *e = &run->s->pieces[(h * UINT64_C(0xD6E8FEB86659FD93)) >> (64 - TOK_PIECE_BITS)];

    struct tok_ids *out = run->out;
    if (tok_ids_reserve(out, TOK_PIECE_IDS) < 0)
        return arle_err_set(run->err, -ENOMEM, "no memory for token ids");
    if (((e->len_n & 0xFF) ^ n) | (e->key[0] ^ key[0]) | (e->key[1] ^ key[1]) | (e->key[2] ^ key[2]))
        return piece_miss(run, p, n, e, key);
    memcpy(out->ids + out->n, e->ids, sizeof e->ids); /* all nine: cheaper than a loop that the processor must guess */
    out->n += e->len_n >> 8;
    return 0;
}
