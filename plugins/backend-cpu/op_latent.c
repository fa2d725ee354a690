/*
 * Ops of decoders with residual streams and one latent key/value vector per token: hyper-connections, windowed,
 * compressed and indexed attention. Owns no memory but per-thread scratch that grows to the largest call. Called through
 * the op table. Every op splits its work by token, sequence or (token, head); no sum is ever split, so rows are
 * bit-identical whatever else is in the call.
 */
#include "cpu.h"
#include "latent_math.h"

#include <stdlib.h>

/* ---- hyper-connections ----------------------------------------------------------------------------------------------- */

static void hc_expand_rows(const struct kernels *k, void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_hc_expand_args *a = arg;
    size_t es = arle_dtype_size(a->dtype), row = a->dim * es;
    for (uint32_t t = t0; t < t1; t++)
        for (uint32_t s = 0; s < a->streams; s++)
            memcpy((char *)a->out + ((size_t)t * a->streams + s) * row, (const char *)a->x + (size_t)t * a->ld_x * es, row);
}

int cpu_hc_expand(struct arle_device *dev, struct arle_stream *st, const struct arle_hc_expand_args *a)
{
    return lat_parallel(dev, a->n_tokens, a->dim * a->streams * 0.1, hc_expand_rows, (void *)a);
}

/* A[j][k], row softmax, then alternating normalisation that ends with columns. */
static void sinkhorn(float *A, uint32_t S, uint32_t iters, float eps)
{
    for (uint32_t j = 0; j < S; j++) {
        float mx = A[j * S], sum = 0;
        for (uint32_t k = 1; k < S; k++)
            mx = fmaxf(mx, A[j * S + k]);
        for (uint32_t k = 0; k < S; k++)
            sum += A[j * S + k] = expf(A[j * S + k] - mx);
        for (uint32_t k = 0; k < S; k++)
            A[j * S + k] = A[j * S + k] / sum + eps;
    }
    for (uint32_t it = 0; it < iters; it++) {
        for (uint32_t j = 0; it > 0 && j < S; j++) {
            float sum = 0;
            for (uint32_t k = 0; k < S; k++)
                sum += A[j * S + k];
            sum = 1.0f / (sum + eps);
            for (uint32_t k = 0; k < S; k++)
                A[j * S + k] *= sum;
        }
        for (uint32_t k = 0; k < S; k++) {
            float sum = 0;
            for (uint32_t j = 0; j < S; j++)
                sum += A[j * S + k];
            sum = 1.0f / (sum + eps);
            for (uint32_t j = 0; j < S; j++)
                A[j * S + k] *= sum;
        }
    }
}

#define HC_MAX 8

/*
 * Dot products of up to HC_TOKENS token rows x (act type, n values each) with n_fn rows of fn, and each row's 1 / RMS. A sum does
 * not depend on how many tokens are taken together. wide holds n floats.
 */
#define HC_TOKENS 8
static void hc_mix(const struct kernels *k, uint32_t dtype, const void *const *x, uint32_t n_tokens, const float *fn, uint32_t n_fn,
                   uint32_t n, float eps, float *wide, float mix[(2 + HC_MAX) * HC_MAX * CPU_KEY_BLOCK], float *rms)
{
    struct attn_block b = { .q = fn, .n_q = n_fn, .head_dim = n, .n_keys = n_tokens, .dtype = dtype };
    memcpy(b.k, x, n_tokens * sizeof *x);
    k->scores(&b, mix);
    for (uint32_t t = 0; t < n_tokens; t++) {
        k->to_f32(x[t], dtype, n, wide);
        rms[t] = 1.0f / sqrtf(k->dot(n, wide, wide) / (float)n + eps);
    }
}

/* out = round(sum_j p[j] x[j]), x in f32. */
static void hc_merge(const struct kernels *k, const float *p, uint32_t streams, const float *x, uint32_t dim, float *u, void *out,
                     uint32_t dtype)
{
    memset(u, 0, dim * sizeof *u);
    for (uint32_t j = 0; j < streams; j++)
        k->axpy(dim, p[j], x + (size_t)j * dim, u);
    k->store_row(u, dim, out, dtype, false);
}

static void hc_pre_token(const struct arle_hc_pre_args *a, const float *mix, float rms, float *pre, float *coef)
{
    uint32_t S = a->streams;
    float *post = coef, *A = coef + S;
    for (uint32_t j = 0; j < S; j++) {
        pre[j] = sigmoid_f32(mix[j * CPU_KEY_BLOCK] * rms * a->scale[0] + a->base[j]) + a->eps;
        post[j] = 2.0f * sigmoid_f32(mix[(S + j) * CPU_KEY_BLOCK] * rms * a->scale[1] + a->base[S + j]);
    }
    for (uint32_t i = 0; i < S * S; i++)
        A[i] = mix[(2 * S + i) * CPU_KEY_BLOCK] * rms * a->scale[2] + a->base[2 * S + i];
    sinkhorn(A, S, a->iters, a->eps);
}

static void hc_pre_rows(const struct kernels *k, void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_hc_pre_args *a = arg;
    uint32_t S = a->streams, n = S * a->dim;
    float *wide = lat_scratch((size_t)n + a->dim), *u = wide + n;
    float mix[(2 + HC_MAX) * HC_MAX * CPU_KEY_BLOCK], pre[HC_MAX], rms[HC_TOKENS];
    for (uint32_t t = t0; t < t1; t += HC_TOKENS) {
        uint32_t m = t1 - t < HC_TOKENS ? t1 - t : HC_TOKENS;
        const void *x[HC_TOKENS];
        for (uint32_t i = 0; i < m; i++)
            x[i] = act_at(a->x, a->dtype, t + i, n, 0);
        hc_mix(k, a->dtype, x, m, a->fn, (2 + S) * S, n, a->norm_eps, wide, mix, rms);
        for (uint32_t i = 0; i < m; i++) {
            hc_pre_token(a, mix + i, rms[i], pre, a->coef + (size_t)(t + i) * (S + S * S));
            k->to_f32(x[i], a->dtype, n, wide);
            hc_merge(k, pre, S, wide, a->dim, u, act_at_w(a->u, a->dtype, t + i, a->dim, 0), a->dtype);
        }
    }
}

int cpu_hc_pre(struct arle_device *dev, struct arle_stream *st, const struct arle_hc_pre_args *a)
{
    if (a->streams == 0 || a->streams > HC_MAX || (size_t)(a->streams + 1) * a->dim > LAT_SCRATCH)
        return -EINVAL;
    count(dev, N_hc_pre, 1);
    return lat_parallel(dev, a->n_tokens, (double)a->streams * a->dim * (2 + a->streams) * a->streams * 0.05 + 2000, hc_pre_rows, (void *)a);
}

static void hc_post_rows(const struct kernels *k, void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_hc_post_args *a = arg;
    uint32_t S = a->streams, D = a->dim, n = S * D;
    float *x = lat_scratch((size_t)n + 2 * D), *y = x + n, *f = y + D;
    for (uint32_t t = t0; t < t1; t++) {
        const float *post = a->coef + (size_t)t * (S + S * S), *A = post + S;
        k->to_f32(act_at(a->x, a->dtype, t, n, 0), a->dtype, n, x);
        k->to_f32(act_at(a->f, a->dtype, t, D, 0), a->dtype, D, f);
        for (uint32_t o = 0; o < S; o++) {
            memset(y, 0, D * sizeof *y);
            k->axpy(D, post[o], f, y);
            for (uint32_t j = 0; j < S; j++)
                k->axpy(D, A[j * S + o], x + (size_t)j * D, y);
            k->store_row(y, D, act_at_w(a->x, a->dtype, t, n, (int64_t)o * D), a->dtype, false);
        }
    }
}

int cpu_hc_post(struct arle_device *dev, struct arle_stream *st, const struct arle_hc_post_args *a)
{
    if ((size_t)(a->streams + 2) * a->dim > LAT_SCRATCH)
        return -EINVAL;
    return lat_parallel(dev, a->n_tokens, (double)a->streams * a->dim * (1 + a->streams) * 0.1, hc_post_rows, (void *)a);
}

static void hc_head_rows(const struct kernels *k, void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_hc_head_args *a = arg;
    uint32_t S = a->streams, n = S * a->dim;
    float *wide = lat_scratch((size_t)n + a->dim), *u = wide + n;
    for (uint32_t t = t0; t < t1; t++) {
        float mix[(2 + HC_MAX) * HC_MAX * CPU_KEY_BLOCK], p[HC_MAX], rms;
        const void *x = act_at(a->x, a->dtype, a->rows ? a->rows[t] : (int64_t)t, n, 0);
        hc_mix(k, a->dtype, &x, 1, a->fn, S, n, a->norm_eps, wide, mix, &rms);
        for (uint32_t j = 0; j < S; j++)
            p[j] = sigmoid_f32(mix[j * CPU_KEY_BLOCK] * rms * a->scale[0] + a->base[j]) + a->eps;
        hc_merge(k, p, S, wide, a->dim, u, act_at_w(a->out, a->dtype, t, a->dim, 0), a->dtype);
    }
}

int cpu_hc_head(struct arle_device *dev, struct arle_stream *st, const struct arle_hc_head_args *a)
{
    if (a->streams == 0 || a->streams > HC_MAX || (size_t)(a->streams + 1) * a->dim > LAT_SCRATCH)
        return -EINVAL;
    return lat_parallel(dev, a->n_tokens, (double)a->streams * a->dim * (1 + a->streams) * 0.2, hc_head_rows, (void *)a);
}

/* ---- heads: norm, rotation, simulated quantisation --------------------------------------------------------------------- */

#define ROPE_HEADS 16           /* heads of one token that share a table of angles, and the heads of one attention item */

/* Angles of one position: cos and sin, sin negated for the inverse. */
static void rope_table(const struct kernels *k, uint32_t rot_dim, int32_t pos, const float *inv_freq, bool inverse, float *cs)
{
    uint32_t half = rot_dim / 2;
    k->sincos(half, (float)pos, inv_freq, 1.0f, cs);
    for (uint32_t i = half; inverse && i < rot_dim; i++)
        cs[i] = -cs[i];
}

/* Rotates the last rot_dim of a head of act type in place. tmp holds rot_dim floats. */
static void rope_head(const struct kernels *k, uint32_t dtype, void *head, uint32_t dim, uint32_t rot_dim, const float *cs, float *tmp)
{
    const struct rope_args ra = { .rot_dim = rot_dim, .interleaved = 1, .cs = cs };
    void *at = (char *)head + (size_t)(dim - rot_dim) * arle_dtype_size(dtype);
    k->to_f32(at, dtype, rot_dim, tmp);
    k->rope(&ra, tmp);
    k->store_row(tmp, rot_dim, at, dtype, false);
}

static void head_rope_rows(const struct kernels *k, void *arg, uint32_t i0, uint32_t i1)
{
    const struct arle_head_rope_args *a = arg;
    uint32_t d = a->head_dim, groups = (a->n_heads + ROPE_HEADS - 1) / ROPE_HEADS;
    float *cs = lat_scratch((size_t)a->rot_dim * 2 + 2 * d), *tmp = cs + a->rot_dim, *x = tmp + a->rot_dim, *zero = x + d;
    memset(zero, 0, d * sizeof *zero);
    for (uint32_t i = i0; i < i1; i++) {
        uint32_t t = i / groups, h = i % groups * ROPE_HEADS, end = h + ROPE_HEADS < a->n_heads ? h + ROPE_HEADS : a->n_heads;
        rope_table(k, a->rot_dim, a->pos[t], a->inv_freq, a->inverse, cs);
        for (; h < end; h++) {
            void *head = act_at_w(a->x, a->dtype, t, a->ld_x, (int64_t)h * d);
            if (a->norm)
                k->rmsnorm(head, d, a->eps, a->norm == 2 ? 0.0f : 1.0f, a->norm == 2 ? a->w : zero, head, a->dtype);
            rope_head(k, a->dtype, head, d, a->rot_dim, cs, tmp);
            if (a->quant == ARLE_FQ_NONE)
                continue;
            k->to_f32(head, a->dtype, d, x);
            lat_fake_quant(a->dtype, x, d, a->rot_dim, a->quant);
            k->store_row(x, d, head, a->dtype, false);
        }
    }
}

int cpu_head_rope(struct arle_device *dev, struct arle_stream *st, const struct arle_head_rope_args *a)
{
    if (a->rot_dim % 2 != 0 || a->rot_dim > a->head_dim || (size_t)(a->rot_dim + a->head_dim) * 2 > LAT_SCRATCH)
        return -EINVAL;
    return lat_parallel(dev, a->n_tokens * ((a->n_heads + ROPE_HEADS - 1) / ROPE_HEADS),
                        (a->n_heads < ROPE_HEADS ? a->n_heads : ROPE_HEADS) * a->head_dim * (a->quant ? 3 : 0.5), head_rope_rows, (void *)a);
}

/* ---- window and compressor --------------------------------------------------------------------------------------------- */

static void window_store_seqs(const struct kernels *k, void *arg, uint32_t s0, uint32_t s1)
{
    const struct arle_window_store_args *a = arg;
    const struct arle_batch *b = a->batch;
    size_t es = arle_dtype_size(a->dtype), row = a->dim * es;
    for (uint32_t s = s0; s < s1; s++) {
        char *ring = (char *)a->ring.base + (size_t)b->slot[s] * a->ring.stride + a->ring.offset;
        int32_t first = b->cu[s + 1] - b->cu[s] > (int32_t)a->window ? b->cu[s + 1] - (int32_t)a->window : b->cu[s];
        for (int32_t t = first; t < b->cu[s + 1]; t++)
            memcpy(ring + (size_t)(b->pos[t] % (int32_t)a->window) * row, (const char *)a->x + (size_t)t * a->ld_x * es, row);
    }
}

int cpu_window_store(struct arle_device *dev, struct arle_stream *st, const struct arle_window_store_args *a)
{
    return lat_parallel(dev, a->batch->n_seqs, a->dim * 0.1, window_store_seqs, (void *)a);
}

static char *entry_at(const struct arle_paged *p, const struct arle_batch *b, uint32_t seq, uint32_t ratio, uint32_t w)
{
    uint32_t per_page = b->page_tokens / ratio;
    int32_t page = b->block_table[(size_t)seq * b->table_stride + w / per_page];
    return (char *)p->base + (size_t)page * p->page_stride + p->offset + (size_t)(w % per_page) * p->entry_stride;
}

/* The record of a compressor: rows of the unfinished group, behind those of the group before where groups overlap; values, then
 * gates with their position term. */
static float *record_of(const struct arle_compress_args *a, uint32_t seq)
{
    return (float *)(void *)((char *)a->record.base + (size_t)a->batch->slot[seq] * a->record.stride + a->record.offset);
}

static uint32_t record_width(const struct arle_compress_args *a)
{
    return (a->overlap ? 2 : 1) * a->dim;
}

/* Sequences of a step with their entries that become complete, counted through. */
static uint32_t entries_of(const struct arle_compress_args *a, uint32_t seq, uint32_t *first)
{
    const struct arle_batch *b = a->batch;
    uint32_t n = (uint32_t)(b->cu[seq + 1] - b->cu[seq]), from = n ? (uint32_t)b->pos[b->cu[seq]] : 0;
    *first = from / a->ratio;
    return n ? (from + n) / a->ratio - *first : 0;
}

/* Where the row of position p lies: in this step's projections, or in the record, row `slot`, with its position term added. */
static void row_at(const struct arle_compress_args *a, uint32_t seq, uint32_t p, uint32_t slot, uint32_t column, const float **kv,
                   const float **g, const float **ape)
{
    const struct arle_batch *b = a->batch;
    uint32_t first = (uint32_t)b->pos[b->cu[seq]], width = record_width(a), c = a->overlap ? 2 : 1;
    if (p >= first) {
        *kv = a->proj + (size_t)((uint32_t)b->cu[seq] + p - first) * (size_t)a->ld_proj + column;
        *g = *kv + width;
        *ape = a->ape + (size_t)(p % a->ratio) * width + column;
        return;
    }
    *kv = record_of(a, seq) + (size_t)slot * width + column;
    *g = *kv + (size_t)c * a->ratio * width;
    *ape = NULL;
}

/* Entry w of a sequence: pooled, normed, rotated, quantised, stored into its page. The record is only read. row has room for
 * 6 * ratio addresses, e for dim + 2 * rot_dim floats. */
static void compress_entry(const struct kernels *k, const struct arle_compress_args *a, uint32_t seq, uint32_t w, const float **row,
                           float *e)
{
    uint32_t m = a->ratio, n = 0, d = a->dim, first = (uint32_t)a->batch->pos[a->batch->cu[seq]];
    float *cs = e + d, *tmp = cs + a->rot_dim;
    const float **kv = row, **g = kv + 2 * m, **ape = g + 2 * m;
    for (uint32_t i = 0; a->overlap && w > 0 && i < m; i++, n++)        /* the group before is in the record's upper rows while it
                                                                         * is the unfinished one */
        row_at(a, seq, (w - 1) * m + i, first / m == w - 1 ? m + i : i, 0, &kv[n], &g[n], &ape[n]);
    for (uint32_t i = 0; i < m; i++, n++)
        row_at(a, seq, w * m + i, a->overlap ? m + i : i, a->overlap ? d : 0, &kv[n], &g[n], &ape[n]);
    const struct pool_rows rows = { .n_rows = n, .n = d, .kv = kv, .g = g, .ape = ape };
    k->pool(&rows, e);
    void *out = entry_at(&a->out, a->batch, seq, m, w);
    k->store_row(e, d, out, a->dtype, false);
    k->rmsnorm(out, d, a->eps, 0.0f, a->norm_w, out, a->dtype);
    rope_table(k, a->rot_dim, (int32_t)(w * m), a->inv_freq, false, cs);
    rope_head(k, a->dtype, out, d, a->rot_dim, cs, tmp);
    if (a->quant == ARLE_FQ_NONE)
        return;
    k->to_f32(out, a->dtype, d, e);
    lat_fake_quant(a->dtype, e, d, a->rot_dim, a->quant);
    k->store_row(e, d, out, a->dtype, false);
}

static size_t compress_scratch(const struct arle_compress_args *a)
{
    return 12 * (size_t)a->ratio + (size_t)a->dim + 2 * (size_t)a->rot_dim;
}

static void compress_entries(const struct kernels *k, void *arg, uint32_t i0, uint32_t i1)
{
    const struct arle_compress_args *a = arg;
    const float **row = (const float **)(void *)lat_scratch(compress_scratch(a));
    float *e = (float *)(void *)(row + 6 * (size_t)a->ratio);
    uint32_t at = 0, first;
    for (uint32_t s = 0; s < a->batch->n_seqs && at < i1; s++) {
        uint32_t n = entries_of(a, s, &first);
        for (uint32_t i = i0 > at ? i0 - at : 0; i < n && at + i < i1; i++)
            compress_entry(k, a, s, first + i, row, e);
        at += n;
    }
}

/* Row `row` of the record becomes the row of position p of this step. */
static void keep_row(const struct arle_compress_args *a, uint32_t seq, uint32_t p, uint32_t row)
{
    const struct arle_batch *b = a->batch;
    uint32_t width = record_width(a), c = a->overlap ? 2 : 1;
    const float *src = a->proj + (size_t)((uint32_t)b->cu[seq] + p - (uint32_t)b->pos[b->cu[seq]]) * (size_t)a->ld_proj;
    const float *ape = a->ape + (size_t)(p % a->ratio) * width;
    float *kv = record_of(a, seq) + (size_t)row * width, *g = kv + (size_t)c * a->ratio * width;
    memcpy(kv, src, width * sizeof *kv);
    for (uint32_t i = 0; i < width; i++)
        g[i] = src[width + i] + ape[i];
}

/* Moves the records on to the end of the step, after the entries were made. */
static void compress_records(const struct kernels *k, void *arg, uint32_t s0, uint32_t s1)
{
    const struct arle_compress_args *a = arg;
    const struct arle_batch *b = a->batch;
    uint32_t m = a->ratio, width = record_width(a);
    for (uint32_t s = s0; s < s1; s++) {
        if (b->cu[s + 1] == b->cu[s])
            continue;
        uint32_t first = (uint32_t)b->pos[b->cu[s]], end = first + (uint32_t)(b->cu[s + 1] - b->cu[s]), group = end / m;
        float *kv = record_of(a, s), *g = kv + (size_t)2 * m * width;
        if (a->overlap && group > first / m) {
            if (group - 1 == first / m) {                       /* the beginning of that group lies in the upper rows */
                memcpy(kv, kv + (size_t)m * width, (size_t)(first % m) * width * sizeof *kv);
                memcpy(g, g + (size_t)m * width, (size_t)(first % m) * width * sizeof *g);
            }
            for (uint32_t p = (group - 1) * m > first ? (group - 1) * m : first; p < group * m; p++)
                keep_row(a, s, p, p % m);
        }
        for (uint32_t p = group * m > first ? group * m : first; p < end; p++)
            keep_row(a, s, p, p % m + (a->overlap ? m : 0));
    }
}

int cpu_compress(struct arle_device *dev, struct arle_stream *st, const struct arle_compress_args *a)
{
    uint32_t rows = (a->overlap ? 2 : 1) * a->ratio, entries = 0, first;
    if (a->ratio == 0 || a->batch->page_tokens % a->ratio != 0 || compress_scratch(a) > LAT_SCRATCH)
        return -EINVAL;
    if (a->batch->n_seqs == 0)
        return 0;
    count(dev, N_compress, 1);
    for (uint32_t s = 0; s < a->batch->n_seqs; s++)
        entries += entries_of(a, s, &first);
    lat_parallel(dev, entries, (double)rows * a->dim * 0.8, compress_entries, (void *)a);
    return lat_parallel(dev, a->batch->n_seqs, (double)a->batch->n_tokens / a->batch->n_seqs * 100, compress_records, (void *)a);
}

/* ---- indexer -------------------------------------------------------------------------------------------------------------- */

/* Keeps the k best of n scores, lower index first among equals: a min-heap whose root is the worst kept. */
static bool worse(const float *score, int32_t x, int32_t y)
{
    return score[x] < score[y] || (score[x] == score[y] && x > y);
}

static void heap_down(int32_t *heap, uint32_t n, uint32_t i, const float *score)
{
    for (;;) {
        uint32_t c = 2 * i + 1;
        if (c >= n)
            return;
        if (c + 1 < n && worse(score, heap[c + 1], heap[c]))
            c++;
        if (!worse(score, heap[c], heap[i]))
            return;
        int32_t tmp = heap[i];
        heap[i] = heap[c], heap[c] = tmp;
        i = c;
    }
}

static int by_index(const void *x, const void *y)
{
    int32_t a = *(const int32_t *)x, b = *(const int32_t *)y;
    return (a > b) - (a < b);
}

static void select_top(const float *score, uint32_t n, int32_t *sel, uint32_t k)
{
    for (uint32_t i = 0; i < k; i++)
        sel[i] = (int32_t)i;
    for (uint32_t i = k / 2; i-- > 0;)
        heap_down(sel, k, i, score);
    for (uint32_t c = k; c < n; c++)
        if (worse(score, sel[0], (int32_t)c)) {
            sel[0] = (int32_t)c;
            heap_down(sel, k, 0, score);
        }
    qsort(sel, k, sizeof *sel, by_index);
}

static void index_select_rows(const struct kernels *k, void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_index_select_args *a = arg;
    const struct arle_batch *b = a->batch;
    uint32_t nq = a->n_heads * a->dim;
    for (uint32_t t = t0; t < t1; t++) {
        uint32_t n = ((uint32_t)b->pos[t] + 1) / a->ratio, seq = (uint32_t)b->seq_of[t];
        int32_t *sel = a->sel + (size_t)t * a->topk;
        a->n_sel[t] = (int32_t)(n < a->topk ? n : a->topk);
        if (n <= a->topk) {
            for (uint32_t c = 0; c < n; c++)
                sel[c] = (int32_t)c;
            continue;
        }
        float *q = lat_scratch((size_t)nq + a->n_heads * (CPU_KEY_BLOCK + 1) + n + CPU_KEY_BLOCK), *w = q + nq, *s = w + a->n_heads;
        float *score = s + (size_t)a->n_heads * CPU_KEY_BLOCK;
        k->to_f32(act_at(a->q, a->dtype, t, a->ld_q, 0), a->dtype, nq, q);
        for (uint32_t h = 0; h < a->n_heads; h++) {
            float v = a->weight[(size_t)t * (size_t)a->ld_weight + h];
            w[h] = a->round_scores ? act_round(ARLE_BF16, act_round(ARLE_BF16, v) * a->scale) : v * a->scale;
        }
        for (uint32_t c = 0; c < n; c += CPU_KEY_BLOCK) {
            struct attn_block blk = { .q = q, .n_q = a->n_heads, .head_dim = a->dim, .dtype = a->dtype,
                                      .n_keys = n - c < CPU_KEY_BLOCK ? n - c : CPU_KEY_BLOCK };
            for (uint32_t j = 0; j < blk.n_keys; j++)
                blk.k[j] = entry_at(&a->keys, b, seq, a->ratio, c + j);
            k->scores(&blk, s);
            k->index_sum(a->n_heads, s, w, a->round_scores, score + c);
        }
        select_top(score, n, sel, a->topk);
    }
}

int cpu_index_select(struct arle_device *dev, struct arle_stream *st, const struct arle_index_select_args *a)
{
    uint32_t most = a->ratio ? a->batch->max_ctx / a->ratio : 0;
    if (a->ratio == 0 || a->batch->page_tokens % a->ratio != 0 || (size_t)a->n_heads * (a->dim + CPU_KEY_BLOCK + 1) + most + 64 > LAT_SCRATCH)
        return -EINVAL;
    count(dev, most > a->topk ? N_index_scored : N_index_all, 1);
    return lat_parallel(dev, a->batch->n_tokens, most > a->topk ? (double)most * a->n_heads * a->dim * 0.03 : 100, index_select_rows, (void *)a);
}

/* ---- latent attention ------------------------------------------------------------------------------------------------------- */

/* Addresses of the key rows of one query, window first, then compressed entries. Returns their number. */
static uint32_t find_keys(const struct arle_attn_latent_args *a, uint32_t t, const void **key)
{
    const struct arle_batch *b = a->batch;
    uint32_t seq = (uint32_t)b->seq_of[t], n = 0;
    int32_t p = b->pos[t], first_new = b->pos[b->cu[seq]], from = p - (int32_t)a->window + 1;
    const char *ring = (const char *)a->ring.base + (size_t)b->slot[seq] * a->ring.stride + a->ring.offset;
    size_t row = a->dim * arle_dtype_size(a->dtype);
    for (int32_t j = from < a->first_key ? a->first_key : from; j <= p; j++, n++)
        key[n] = j >= first_new ? act_at(a->kv_new, a->dtype, b->cu[seq] + j - first_new, a->ld_kv, 0)
                                : (const void *)(ring + (size_t)(j % (int32_t)a->window) * row);
    if (a->ratio == 0)
        return n;
    uint32_t m = a->sel ? (uint32_t)a->n_sel[t] : ((uint32_t)p + 1) / a->ratio;
    for (uint32_t i = 0; i < m; i++, n++)
        key[n] = entry_at(&a->entries, b, seq, a->ratio, a->sel ? (uint32_t)a->sel[(size_t)t * a->topk + i] : i);
    return n;
}

/* Softmax weights of one head in place of its scores, in the act type, relative to the largest key; returns their sum and the
 * sink's share, of which the weights before rounding count. */
static float latent_softmax(const struct kernels *k, const struct arle_attn_latent_args *a, float *s, uint32_t n, float sink)
{
    static const float ones[CPU_KEY_BLOCK] = { [0 ... CPU_KEY_BLOCK - 1] = 1.0f };
    float top = k->max(n, s), den = 0;
    uint16_t half[CPU_KEY_BLOCK];
    k->exps(n, s, top, a->scale, s);
    for (uint32_t j = 0; j < n; j += CPU_KEY_BLOCK) {
        uint32_t m = n - j < CPU_KEY_BLOCK ? n - j : CPU_KEY_BLOCK;
        den += k->dot(m, s + j, ones);
        if (a->dtype == ARLE_BF16) {
            k->store_row(s + j, m, half, ARLE_BF16, false);
            k->to_f32(half, ARLE_BF16, m, s + j);
        }
    }
    return den + expf(sink - top * a->scale);
}

/* Blocks of keys between the scores of all, [n_heads][n_pad], and the compact block that kernels take. */
static void blocks_of(const struct kernels *k, struct attn_block *blk, const void *const *key, uint32_t n, uint32_t n_pad, float *all,
                      bool weigh)
{
    float part[ROPE_HEADS * CPU_KEY_BLOCK];
    for (uint32_t j = 0; j < n; j += CPU_KEY_BLOCK) {
        blk->n_keys = n - j < CPU_KEY_BLOCK ? n - j : CPU_KEY_BLOCK;
        memcpy(weigh ? blk->v : blk->k, key + j, blk->n_keys * sizeof *key);
        if (!weigh)
            k->scores(blk, part);
        for (uint32_t h = 0; h < blk->n_q; h++)
            if (weigh)
                memcpy(part + h * CPU_KEY_BLOCK, all + (size_t)h * n_pad + j, blk->n_keys * sizeof *all);
            else
                memcpy(all + (size_t)h * n_pad + j, part + h * CPU_KEY_BLOCK, blk->n_keys * sizeof *all);
        if (weigh)
            k->weigh(blk, part);
    }
}

static uint32_t most_keys(const struct arle_attn_latent_args *a, uint32_t context)
{
    uint32_t n = a->window + (a->ratio == 0 ? 0 : a->sel ? a->topk : context / a->ratio);
    return (n + CPU_KEY_BLOCK - 1) / CPU_KEY_BLOCK * CPU_KEY_BLOCK;
}

static void attn_latent_rows(const struct kernels *k, void *arg, uint32_t i0, uint32_t i1)
{
    const struct arle_attn_latent_args *a = arg;
    uint32_t d = a->dim, groups = (a->n_heads + ROPE_HEADS - 1) / ROPE_HEADS, found_for = UINT32_MAX, n = 0;
    uint32_t pad = most_keys(a, a->batch->max_ctx);
    float *q = lat_scratch((size_t)ROPE_HEADS * (2 * d + pad) + 2 * pad + 2 * a->rot_dim), *o = q + (size_t)ROPE_HEADS * d;
    float *s = o + (size_t)ROPE_HEADS * d, *cs = s + (size_t)ROPE_HEADS * pad, *tmp = cs + a->rot_dim;
    const void **key = (const void **)(void *)(tmp + a->rot_dim);
    for (uint32_t i = i0; i < i1; i++) {
        uint32_t t = i / groups, h0 = i % groups * ROPE_HEADS, heads = a->n_heads - h0 < ROPE_HEADS ? a->n_heads - h0 : ROPE_HEADS;
        struct attn_block blk = { .q = q, .n_q = heads, .head_dim = d, .dtype = a->dtype, .o = o };
        if (t != found_for) {
            n = find_keys(a, t, key);
            rope_table(k, a->rot_dim, a->batch->pos[t], a->inv_freq, true, cs);
            found_for = t;
        }
        k->to_f32(act_at(a->q, a->dtype, t, a->ld_q, (int64_t)h0 * d), a->dtype, (int64_t)heads * d, q);
        memset(o, 0, (size_t)heads * d * sizeof *o);
        blocks_of(k, &blk, key, n, pad, s, false);
        float den[ROPE_HEADS];
        for (uint32_t h = 0; h < heads; h++)
            den[h] = n > 0 ? latent_softmax(k, a, s + (size_t)h * pad, n, a->sink[h0 + h]) : 1.0f;
        blocks_of(k, &blk, key, n, pad, s, true);
        for (uint32_t h = 0; h < heads; h++) {
            void *out = act_at_w(a->out, a->dtype, t, a->ld_out, (int64_t)(h0 + h) * d);
            k->attn_finish(d, o + (size_t)h * d, den[h], NULL, out, a->dtype);
            rope_head(k, a->dtype, out, d, a->rot_dim, cs, tmp);
        }
    }
}

int cpu_attn_latent(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_latent_args *a)
{
    if (a->window == 0 || (a->ratio != 0 && a->batch->page_tokens % a->ratio != 0))
        return -EINVAL;
    uint32_t pad = most_keys(a, a->batch->max_ctx), groups = (a->n_heads + ROPE_HEADS - 1) / ROPE_HEADS;
    if ((size_t)ROPE_HEADS * (2 * (size_t)a->dim + pad) + 2 * (size_t)pad + 2 * (size_t)a->rot_dim > LAT_SCRATCH)
        return -EINVAL;
    count(dev, N_attn_latent, 1);
    return lat_parallel(dev, a->batch->n_tokens * groups, (double)pad * (a->n_heads < ROPE_HEADS ? a->n_heads : ROPE_HEADS) * a->dim * 0.05,
                        attn_latent_rows, (void *)a);
}
