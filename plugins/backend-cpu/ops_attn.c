/*
 * attn_prepare and attn_paged.
 *
 * Softmax runs online over blocks of 32 keys at absolute multiples of 32, and within splits of 512 keys at absolute multiples of
 * 512; the splits of a row are then merged from the first to the last. A row does the same arithmetic whether it is a decode row,
 * whose splits run in parallel, or part of a prefill tile, whose rows share each block of keys while it is in cache.
 */
#include "cpu.h"

/* Byte address of the entry of position p of sequence s. */
static char *entry_at(const struct arle_paged *kv, const struct arle_batch *b, int64_t s, int64_t p)
{
    int64_t page = b->block_table[s * b->table_stride + p / b->page_tokens];
    return (char *)kv->base + (size_t)page * kv->page_stride + kv->offset + (size_t)(p % b->page_tokens) * kv->entry_stride;
}

static bool kv_dtype_ok(uint32_t dtype, uint32_t head_dim)
{
    switch (dtype) {
    case ARLE_F32: case ARLE_BF16: case ARLE_I8: case ARLE_F8E4M3: return true;
    case ARLE_I4G: return head_dim % 32 == 0;
    default: return false;
    }
}

static size_t code_bytes(uint32_t dtype, uint32_t head_dim)
{
    return dtype == ARLE_I4G ? head_dim / 2 : dtype == ARLE_I8 || dtype == ARLE_F8E4M3 ? head_dim : head_dim * act_size(dtype);
}

static size_t scale_bytes(uint32_t dtype, uint32_t head_dim)
{
    return dtype == ARLE_I4G ? head_dim / 16 : 4;
}

/* ---- attn_prepare -------------------------------------------------------------------------------------------------- */

/* Width of the rotation of 4-bit entries: the largest power of two up to 128 that divides head_dim. */
static unsigned rotation_width(unsigned head_dim)
{
    unsigned w = 128;
    while (head_dim % w)
        w /= 2;
    return w;
}

/* In place, orthonormal and its own inverse. */
static void hadamard(float *x, unsigned head_dim)
{
    unsigned w = rotation_width(head_dim);
    float norm = 1.0f / sqrtf((float)w);
    for (float *b = x; b < x + head_dim; b += w) {
        for (unsigned h = 1; h < w; h *= 2)
            for (unsigned i = 0; i < w; i += 2 * h)
                for (unsigned j = i; j < i + h; j++) {
                    float lo = b[j], hi = b[j + h];
                    b[j] = lo + hi;
                    b[j + h] = lo - hi;
                }
        for (unsigned i = 0; i < w; i++)
            b[i] *= norm;
    }
}

static float abs_max(const float *x, unsigned n)
{
    float m = 0;
    for (unsigned i = 0; i < n; i++)
        m = fabsf(x[i]) > m ? fabsf(x[i]) : m;
    return m;
}

static void store_i8(const float *x, unsigned n, int8_t *codes, void *scale)
{
    float s = abs_max(x, n) / 127.0f;
    for (unsigned i = 0; i < n; i++)
        codes[i] = s > 0 ? (int8_t)rintf(fminf(fmaxf(x[i] / s, -127.0f), 127.0f)) : 0;
    memcpy(scale, &s, 4);
}

static void store_f8(const float *x, unsigned n, uint8_t *codes, void *scale)
{
    float s = abs_max(x, n) / 448.0f;
    for (unsigned i = 0; i < n; i++)
        codes[i] = s > 0 ? f32_to_e4m3(x[i] / s) : 0;
    memcpy(scale, &s, 4);
}

static void store_i4(float *x, unsigned n, uint8_t *codes, uint16_t *scales)
{
    hadamard(x, n);
    for (unsigned g = 0; g < n / 32; g++) {
        uint16_t h = f32_to_f16(abs_max(x + g * 32, 32) / 7.0f);
        float s = f16_to_f32(h);
        unsigned c[32];
        memcpy(scales + g, &h, 2);
        for (unsigned i = 0; i < 32; i++)
            c[i] = (unsigned)(int)(fminf(fmaxf(s > 0 ? rintf(x[g * 32 + i] / s) : 0.0f, -7.0f), 7.0f) + 8.0f);
        for (unsigned i = 0; i < 16; i++)
            codes[g * 16 + i] = (uint8_t)(c[2 * i] | c[2 * i + 1] << 4);
    }
}

/* Writes vector `vec` (k heads, then v heads) of an entry of n_vec; x may be changed. */
static void store_vector(char *entry, uint32_t dtype, unsigned n_vec, unsigned vec, unsigned head_dim, float *x)
{
    char *codes = entry + vec * code_bytes(dtype, head_dim);
    char *scale = entry + n_vec * code_bytes(dtype, head_dim) + vec * scale_bytes(dtype, head_dim);
    if (dtype == ARLE_I8)
        store_i8(x, head_dim, (int8_t *)codes, scale);
    else if (dtype == ARLE_F8E4M3)
        store_f8(x, head_dim, (uint8_t *)codes, scale);
    else if (dtype == ARLE_I4G)
        store_i4(x, head_dim, (uint8_t *)codes, (uint16_t *)(void *)scale);
    else
        for (unsigned i = 0; i < head_dim; i++)
            act_set(codes, dtype, i, x[i]);
}

struct prepare_job {
    struct arle_device *dev;
    const struct arle_attn_prepare_args *a;
};

/* One head: norm, rounding to act, rotation, rounding to act; the result in x as f32. */
static void prepare_head(const struct prepare_job *j, int64_t t, int64_t off, const float *norm, const struct rope_args *rope, float *x)
{
    const struct arle_attn_prepare_args *a = j->a;
    const void *src = act_at(a->qkv, a->dtype, t, a->ld_qkv, off);
    _Alignas(64) float normed[CPU_MAX_HEAD];
    if (norm != NULL) {
        j->dev->k->rmsnorm(src, a->head_dim, a->eps, a->w_offset, norm, normed, a->dtype);
        src = normed;
    }
    j->dev->k->to_f32(src, a->dtype, a->head_dim, x);
    if (rope->rot_dim != 0)
        j->dev->k->rope(rope, x);
}

static void prepare_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct prepare_job *j = arg;
    const struct arle_attn_prepare_args *a = j->a;
    const struct arle_batch *b = a->batch;
    const struct kernels *k = j->dev->k;
    _Alignas(64) float cs[CPU_MAX_HEAD], x[CPU_MAX_HEAD];
    struct rope_args rope = { .rot_dim = a->rot_dim, .rot_off = a->rot_off, .interleaved = a->interleaved, .cs = cs };
    for (int64_t t = part_begin(b->n_tokens, part, n_parts); t < part_begin(b->n_tokens, part + 1, n_parts); t++) {
        int64_t p = (int64_t)b->pos[t] + a->pos_shift;
        if (p < 0)
            continue;
        char *entry = entry_at(&a->kv, b, b->seq_of[t], p);
        k->sincos(a->rot_dim / 2, (float)p, a->inv_freq, a->rope_scale, cs);
        for (unsigned h = 0; h < a->n_q; h++) {
            prepare_head(j, t, a->q_off + h * a->q_head_stride, a->q_norm, &rope, x);
            k->store_row(x, a->head_dim, act_at_w(a->q_out, a->dtype, t, (int64_t)a->n_q * a->head_dim, (int64_t)h * a->head_dim),
                         a->dtype, false);
        }
        for (unsigned h = 0; h < a->n_kv; h++) {
            prepare_head(j, t, a->k_off + (int64_t)h * a->head_dim, a->k_norm, &rope, x);
            store_vector(entry, a->kv.dtype, 2 * a->n_kv, h, a->head_dim, x);
            k->to_f32(act_at(a->qkv, a->dtype, t, a->ld_qkv, a->v_off + (int64_t)h * a->head_dim), a->dtype, a->head_dim, x);
            store_vector(entry, a->kv.dtype, 2 * a->n_kv, a->n_kv + h, a->head_dim, x);
        }
    }
}

int cpu_attn_prepare(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_prepare_args *a)
{
    struct prepare_job j = { dev, a };
    if ((a->dtype != ARLE_F32 && a->dtype != ARLE_BF16) || a->head_dim == 0 || a->head_dim > CPU_MAX_HEAD || a->rot_dim % 2
        || a->rot_off + a->rot_dim > a->head_dim || !kv_dtype_ok(a->kv.dtype, a->head_dim))
        return -EINVAL;
    count(dev, N_attn_prepare, 1);
    run_parts(dev, (double)a->batch->n_tokens * (a->n_q + 2 * a->n_kv) * a->head_dim * 0.5, prepare_part, &j);
    return 0;
}

/* ---- attn_paged ---------------------------------------------------------------------------------------------------- */

struct attn_job {
    struct arle_device *dev;
    const struct arle_attn_paged_args *a;
    unsigned group;             /* query heads of one kv head */
    unsigned tile_heads;        /* query heads of one item: group, or less when it is very wide */
    unsigned tile_rows;
    unsigned n_chunks;          /* of tile_heads in a group */
    bool split;                 /* decode rows: one item per split, partial results in dev->pack */
    unsigned n_splits;
};

/* What one work item is about, and its work area. */
struct attn_item {
    int64_t seq, row0;
    unsigned rows, kv_head, head0, heads;       /* q heads head0 .. head0 + heads */
    int64_t pos0;                               /* position of row0; rows follow */
    float *q, *m, *l, *o;                       /* [rows * heads] vectors; running values of the current split */
    float *tm, *tl, *to;                        /* of all splits so far */
    float *kbuf, *vbuf;                         /* dequantised keys and values of a block */
};

static void item_area(struct attn_item *it, float *area, unsigned head_dim)
{
    size_t n = (size_t)CPU_MAX_QVEC * head_dim;
    it->m = area;
    it->l = it->m + CPU_MAX_QVEC;
    it->tm = it->l + CPU_MAX_QVEC;
    it->tl = it->tm + CPU_MAX_QVEC;
    it->q = it->tl + CPU_MAX_QVEC;
    it->o = it->q + n;
    it->to = it->o + n;
    it->kbuf = it->to + n;
    it->vbuf = it->kbuf + (size_t)CPU_KEY_BLOCK * head_dim;
}

static void load_queries(const struct attn_job *j, const struct attn_item *it)
{
    const struct arle_attn_paged_args *a = j->a;
    for (unsigned r = 0; r < it->rows; r++)
        for (unsigned h = 0; h < it->heads; h++) {
            float *q = it->q + (size_t)(r * it->heads + h) * a->head_dim;
            j->dev->k->to_f32(act_at(a->q, a->dtype, it->row0 + r, (int64_t)a->n_q * a->head_dim, (int64_t)(it->head0 + h) * a->head_dim),
                              a->dtype, a->head_dim, q);
            for (unsigned i = 0; i < a->head_dim; i++)
                q[i] *= a->scale;
            if (a->kv.dtype == ARLE_I4G)
                hadamard(q, a->head_dim);       /* a rotation of both sides leaves the products alone; values turn back at the end */
        }
}

#define WIDEN_VECTORS 16        /* half an item; decode rows have fewer and read the cache as it is */

/* Points a block at keys [j0, j1), unpacking quantised ones, and bf16 where the kernel would rather unpack once than for every few
 * query vectors: the values are the same. */
static void load_keys(const struct attn_job *j, const struct attn_item *it, int64_t j0, int64_t j1, struct attn_block *blk)
{
    const struct arle_attn_paged_args *a = j->a;
    unsigned hd = a->head_dim, n_vec = 2 * a->n_kv;
    size_t cb = code_bytes(a->kv.dtype, hd), sb = scale_bytes(a->kv.dtype, hd);
    bool widen = a->kv.dtype == ARLE_BF16 && j->dev->k->attn_f32 && it->rows * it->heads >= WIDEN_VECTORS;
    bool plain = a->kv.dtype == ARLE_F32 || (a->kv.dtype == ARLE_BF16 && !widen);
    blk->n_keys = (unsigned)(j1 - j0);
    blk->dtype = plain ? a->kv.dtype : ARLE_F32;
    for (unsigned i = 0; i < blk->n_keys; i++) {
        const char *e = entry_at(&a->kv, a->batch, it->seq, j0 + i), *scales = e + n_vec * cb;
        const char *kc = e + it->kv_head * cb, *vc = e + (a->n_kv + it->kv_head) * cb;
        if (plain) {
            blk->k[i] = kc;
            blk->v[i] = vc;
            continue;
        }
        float *kf = it->kbuf + (size_t)i * hd, *vf = it->vbuf + (size_t)i * hd;
        blk->k[i] = kf;
        blk->v[i] = vf;
        if (widen) {
            j->dev->k->to_f32(kc, ARLE_BF16, hd, kf);
            j->dev->k->to_f32(vc, ARLE_BF16, hd, vf);
            continue;
        }
        j->dev->k->dequant(kc, scales + it->kv_head * sb, a->kv.dtype, hd, kf);
        j->dev->k->dequant(vc, scales + (a->n_kv + it->kv_head) * sb, a->kv.dtype, hd, vf);
    }
}

static int64_t first_key(const struct arle_attn_paged_args *a, int64_t p)
{
    int64_t first = a->first > 0 ? a->first : 0, seen = a->window != 0 ? p + 1 - a->window : 0;
    return seen > first ? seen : first;
}

/* The keys of one block for all rows of the item: at once when every row sees the whole block, else row by row. */
static void attend_block(const struct attn_job *j, const struct attn_item *it, int64_t b0)
{
    const struct arle_attn_paged_args *a = j->a;
    unsigned hd = a->head_dim;
    int64_t last = it->pos0 + it->rows - 1, b1 = b0 + CPU_KEY_BLOCK;
    int64_t lo = first_key(a, it->pos0) > b0 ? first_key(a, it->pos0) : b0, hi = last + 1 < b1 ? last + 1 : b1;
    struct attn_block all, blk = { .head_dim = hd };
    if (lo >= hi)
        return;
    load_keys(j, it, lo, hi, &blk);
    all = blk;
    bool whole = lo >= first_key(a, last) && hi <= it->pos0 + 1;
    unsigned step = whole ? it->rows : 1;
    for (unsigned r = 0; r < it->rows; r += step) {
        int64_t p = it->pos0 + r, rlo = first_key(a, p) > lo ? first_key(a, p) : lo, rhi = p + 1 < hi ? p + 1 : hi;
        size_t v = (size_t)r * it->heads;
        if (!whole) {
            if (rlo >= rhi)
                continue;
            blk.n_keys = (unsigned)(rhi - rlo);
            memcpy(blk.k, all.k + (rlo - lo), blk.n_keys * sizeof *blk.k);
            memcpy(blk.v, all.v + (rlo - lo), blk.n_keys * sizeof *blk.v);
        }
        blk.q = it->q + v * hd;
        blk.n_q = step * it->heads;
        blk.m = it->m + v;
        blk.l = it->l + v;
        blk.o = it->o + v * hd;
        j->dev->k->attn(&blk);
    }
}

static void attend_split(const struct attn_job *j, const struct attn_item *it, int64_t split)
{
    size_t n = (size_t)it->rows * it->heads;
    int64_t end = (split + 1) * CPU_KEY_SPLIT, last = it->pos0 + it->rows;
    for (size_t i = 0; i < n; i++) {
        it->m[i] = -INFINITY;
        it->l[i] = 0;
    }
    memset(it->o, 0, n * j->a->head_dim * sizeof *it->o);
    for (int64_t b = split * CPU_KEY_SPLIT; b < end && b < last; b += CPU_KEY_BLOCK)
        attend_block(j, it, b);
}

/* total = merge(total, part) for n vectors; a part that saw no key changes nothing. */
static void merge(unsigned n, unsigned head_dim, const float *m, const float *l, const float *o, float *tm, float *tl, float *to)
{
    for (unsigned i = 0; i < n; i++) {
        if (m[i] == -INFINITY)
            continue;
        float *t = to + (size_t)i * head_dim;
        const float *s = o + (size_t)i * head_dim;
        if (tm[i] == -INFINITY) {
            tm[i] = m[i];
            tl[i] = l[i];
            memcpy(t, s, head_dim * sizeof *t);
            continue;
        }
        float top = m[i] > tm[i] ? m[i] : tm[i], ct = expf(tm[i] - top), cs = expf(m[i] - top);
        tl[i] = tl[i] * ct + l[i] * cs;
        for (unsigned d = 0; d < head_dim; d++)
            t[d] = t[d] * ct + s[d] * cs;
        tm[i] = top;
    }
}

static void clear_total(const struct attn_item *it, unsigned head_dim)
{
    size_t n = (size_t)it->rows * it->heads;
    for (size_t i = 0; i < n; i++) {
        it->tm[i] = -INFINITY;
        it->tl[i] = 0;
    }
    memset(it->to, 0, n * head_dim * sizeof *it->to);
}

static void finish(const struct attn_job *j, const struct attn_item *it)
{
    const struct arle_attn_paged_args *a = j->a;
    for (unsigned r = 0; r < it->rows; r++)
        for (unsigned h = 0; h < it->heads; h++) {
            unsigned i = r * it->heads + h;
            float *o = it->to + (size_t)i * a->head_dim;
            const void *gate = a->gate_src == NULL ? NULL
                : act_at(a->gate_src, a->dtype, it->row0 + r, a->ld_gate, a->gate_off + (it->head0 + h) * a->gate_head_stride);
            if (it->tl[i] == 0) {               /* no key at or after `first` */
                memset(act_at_w(a->out, a->dtype, it->row0 + r, a->ld_out, (int64_t)(it->head0 + h) * a->head_dim), 0,
                       a->head_dim * act_size(a->dtype));
                continue;
            }
            if (a->kv.dtype == ARLE_I4G)
                hadamard(o, a->head_dim);
            j->dev->k->attn_finish(a->head_dim, o, it->tl[i], gate,
                                   act_at_w(a->out, a->dtype, it->row0 + r, a->ld_out, (int64_t)(it->head0 + h) * a->head_dim), a->dtype);
        }
}

static int64_t first_split(const struct arle_attn_paged_args *a, int64_t p)
{
    return first_key(a, p) / CPU_KEY_SPLIT;
}

/* Rows before position 0 see nothing: their output is zero. */
static void zero_rows(const struct attn_job *j, const struct attn_item *it, unsigned rows)
{
    const struct arle_attn_paged_args *a = j->a;
    for (unsigned r = 0; r < rows; r++)
        memset(act_at_w(a->out, a->dtype, it->row0 + r, a->ld_out, (int64_t)it->head0 * a->head_dim), 0,
               (size_t)it->heads * a->head_dim * act_size(a->dtype));
}

/* Sets position and rows of an item; false when no row of it is at or after position 0. */
static bool place_rows(const struct attn_job *j, struct attn_item *it, int64_t row0, unsigned rows)
{
    it->row0 = row0;
    it->rows = rows;
    it->pos0 = (int64_t)j->a->batch->pos[row0] + j->a->pos_shift;
    if (it->pos0 < 0) {
        unsigned skip = -it->pos0 < (int64_t)rows ? (unsigned)-it->pos0 : rows;
        zero_rows(j, it, skip);
        it->row0 += skip;
        it->rows -= skip;
        it->pos0 += skip;
    }
    return it->rows != 0;
}

static void place_heads(const struct attn_job *j, struct attn_item *it, unsigned index)
{
    it->kv_head = index / j->n_chunks;
    it->head0 = it->kv_head * j->group + index % j->n_chunks * j->tile_heads;
    unsigned end = (it->kv_head + 1) * j->group;
    it->heads = end - it->head0 < j->tile_heads ? end - it->head0 : j->tile_heads;
}

/* Tiles are dealt out in turn: later tiles of a prefill see more keys, so contiguous ranges would be uneven. */
static void tile_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct attn_job *j = arg;
    const struct arle_batch *b = j->a->batch;
    unsigned per_tile = j->a->n_kv * j->n_chunks;
    int64_t item = 0;
    for (int64_t s = 0; s < b->n_seqs; s++)
        for (int64_t r = b->cu[s]; r < b->cu[s + 1]; r += j->tile_rows)
            for (unsigned h = 0; h < per_tile; h++, item++) {
                struct attn_item it = { .seq = s };
                if (item % n_parts != part)
                    continue;
                item_area(&it, thread_scratch(j->dev, part), j->a->head_dim);
                place_heads(j, &it, h);
                if (!place_rows(j, &it, r, b->cu[s + 1] - r < j->tile_rows ? (unsigned)(b->cu[s + 1] - r) : j->tile_rows))
                    continue;
                load_queries(j, &it);
                clear_total(&it, j->a->head_dim);
                int64_t last = it.pos0 + it.rows - 1;
                for (int64_t sp = first_split(j->a, it.pos0); sp <= last / CPU_KEY_SPLIT; sp++) {
                    attend_split(j, &it, sp);
                    merge(it.rows * it.heads, j->a->head_dim, it.m, it.l, it.o, it.tm, it.tl, it.to);
                }
                finish(j, &it);
            }
}

/* Partial result of one (row, head chunk, split): m, l, o of its heads. */
static float *partial_at(const struct attn_job *j, int64_t index)
{
    return (float *)(void *)j->dev->pack + (size_t)index * j->tile_heads * (j->a->head_dim + 2);
}

static void split_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct attn_job *j = arg;
    const struct arle_batch *b = j->a->batch;
    unsigned per_row = j->a->n_kv * j->n_chunks, hd = j->a->head_dim;
    int64_t n = (int64_t)b->n_tokens * per_row * j->n_splits;
    for (int64_t i = part; i < n; i += n_parts) {
        int64_t split = i % j->n_splits, row = i / j->n_splits / per_row;
        struct attn_item it = { .seq = b->seq_of[row] };
        item_area(&it, thread_scratch(j->dev, part), hd);
        place_heads(j, &it, (unsigned)(i / j->n_splits % per_row));
        float *out = partial_at(j, i);
        for (unsigned h = 0; h < it.heads; h++)
            out[h] = -INFINITY;
        if (b->pos[row] + j->a->pos_shift < 0 || !place_rows(j, &it, row, 1) || split < first_split(j->a, it.pos0) || split > it.pos0 / CPU_KEY_SPLIT)
            continue;
        it.m = out;
        it.l = out + j->tile_heads;
        it.o = out + 2 * j->tile_heads;
        load_queries(j, &it);
        attend_split(j, &it, split);
    }
}

static void merge_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct attn_job *j = arg;
    const struct arle_batch *b = j->a->batch;
    unsigned per_row = j->a->n_kv * j->n_chunks, hd = j->a->head_dim;
    int64_t n = (int64_t)b->n_tokens * per_row;
    for (int64_t i = part_begin(n, part, n_parts); i < part_begin(n, part + 1, n_parts); i++) {
        struct attn_item it = { .seq = b->seq_of[i / per_row] };
        item_area(&it, thread_scratch(j->dev, part), hd);
        place_heads(j, &it, (unsigned)(i % per_row));
        if (!place_rows(j, &it, i / per_row, 1))
            continue;
        clear_total(&it, hd);
        for (unsigned s = 0; s < j->n_splits; s++) {
            const float *p = partial_at(j, i * j->n_splits + s);
            merge(it.heads, hd, p, p + j->tile_heads, p + 2 * j->tile_heads, it.tm, it.tl, it.to);
        }
        finish(j, &it);
    }
}

int cpu_attn_paged(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_paged_args *a)
{
    const struct arle_batch *b = a->batch;
    struct attn_job j = { .dev = dev, .a = a };
    if ((a->dtype != ARLE_F32 && a->dtype != ARLE_BF16) || a->n_kv == 0 || a->n_q % a->n_kv != 0 || a->head_dim == 0
        || a->head_dim > CPU_MAX_HEAD || !kv_dtype_ok(a->kv.dtype, a->head_dim))
        return -EINVAL;
    if (b->n_tokens == 0)
        return 0;
    j.group = a->n_q / a->n_kv;
    j.tile_heads = j.group < CPU_MAX_QVEC ? j.group : CPU_MAX_QVEC;
    j.n_chunks = (j.group + j.tile_heads - 1) / j.tile_heads;
    j.tile_rows = 32 / j.tile_heads ? 32 / j.tile_heads : 1;
    int64_t longest = 1;
    for (int64_t s = 0; s < b->n_seqs; s++)
        longest = b->ctx_len[s] > longest ? b->ctx_len[s] : longest;
    longest += a->pos_shift > 0 ? a->pos_shift : 0;
    j.n_splits = (unsigned)((longest + CPU_KEY_SPLIT - 1) / CPU_KEY_SPLIT);
    size_t partials = (size_t)b->n_tokens * a->n_kv * j.n_chunks * j.n_splits * j.tile_heads * (a->head_dim + 2) * 4;
    double cost = (double)b->n_tokens * a->n_q * (double)longest * a->head_dim * 0.05;
    j.split = b->n_tokens == b->n_seqs && j.n_splits > 1 && partials <= CPU_PACK_BYTES && dev->n_threads > 1;
    if (a->kv.dtype != ARLE_F32 && a->kv.dtype != ARLE_BF16)
        count(dev, N_attn_quant, 1);
    count(dev, j.split ? N_attn_split : N_attn_tile, 1);
    if (j.split) {
        run_parts(dev, cost, split_part, &j);
        run_parts(dev, (double)partials * 0.1, merge_part, &j);
    } else {
        run_parts(dev, cost, tile_part, &j);
    }
    return 0;
}
