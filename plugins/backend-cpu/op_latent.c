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

static void hc_expand_rows(void *arg, uint32_t t0, uint32_t t1)
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

/* Four interleaved chains, merged in a fixed order: vectorises without changing with the caller. */
static float dot_f32(const float *x, const float *y, uint32_t n)
{
    float s[16] = { 0 };
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++)
            s[j] += x[i + j] * y[i + j];
    for (; i < n; i++)
        s[0] += x[i] * y[i];
    for (int w = 8; w > 0; w /= 2)
        for (int j = 0; j < w; j++)
            s[j] += s[j + w];
    return s[0];
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
            for (uint32_t k = 0; k < S; k++)
                A[j * S + k] /= sum + eps;
        }
        for (uint32_t k = 0; k < S; k++) {
            float sum = 0;
            for (uint32_t j = 0; j < S; j++)
                sum += A[j * S + k];
            for (uint32_t j = 0; j < S; j++)
                A[j * S + k] /= sum + eps;
        }
    }
}

#define HC_MAX 8

static void hc_pre_rows(void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_hc_pre_args *a = arg;
    uint32_t S = a->streams, n = S * a->dim;
    float *x = lat_scratch((size_t)n + a->dim), *u = x + n;
    for (uint32_t t = t0; t < t1; t++) {
        float mix[(2 + HC_MAX) * HC_MAX], pre[HC_MAX];
        float *post = a->coef + (size_t)t * (S + S * S), *A = post + S;
        lat_load(a->dtype, a->x, (size_t)t * n, x, n);
        float r = 1.0f / sqrtf(dot_f32(x, x, n) / (float)n + a->norm_eps);
        for (uint32_t o = 0; o < (2 + S) * S; o++)
            mix[o] = dot_f32(a->fn + (size_t)o * n, x, n) * r;
        for (uint32_t j = 0; j < S; j++) {
            pre[j] = sigmoid_f32(mix[j] * a->scale[0] + a->base[j]) + a->eps;
            post[j] = 2.0f * sigmoid_f32(mix[S + j] * a->scale[1] + a->base[S + j]);
        }
        for (uint32_t i = 0; i < S * S; i++)
            A[i] = mix[2 * S + i] * a->scale[2] + a->base[2 * S + i];
        sinkhorn(A, S, a->iters, a->eps);
        for (uint32_t i = 0; i < a->dim; i++) {
            float v = 0;
            for (uint32_t j = 0; j < S; j++)
                v += pre[j] * x[j * a->dim + i];
            u[i] = v;
        }
        lat_store(a->dtype, a->u, (size_t)t * a->dim, u, a->dim);
    }
}

int cpu_hc_pre(struct arle_device *dev, struct arle_stream *st, const struct arle_hc_pre_args *a)
{
    if (a->streams == 0 || a->streams > HC_MAX || (size_t)(a->streams + 1) * a->dim > LAT_SCRATCH)
        return -EINVAL;
    count(dev, N_hc_pre, 1);
    return lat_parallel(dev, a->n_tokens, (double)a->streams * a->dim * (2 + a->streams) * a->streams * 0.1, hc_pre_rows, (void *)a);
}

static void hc_post_rows(void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_hc_post_args *a = arg;
    uint32_t S = a->streams, n = S * a->dim;
    float *x = lat_scratch((size_t)2 * n + a->dim), *y = x + n, *f = y + n;
    for (uint32_t t = t0; t < t1; t++) {
        const float *post = a->coef + (size_t)t * (S + S * S), *A = post + S;
        lat_load(a->dtype, a->x, (size_t)t * n, x, n);
        lat_load(a->dtype, a->f, (size_t)t * a->dim, f, a->dim);
        for (uint32_t k = 0; k < S; k++)
            for (uint32_t i = 0; i < a->dim; i++) {
                float v = post[k] * f[i];
                for (uint32_t j = 0; j < S; j++)
                    v += A[j * S + k] * x[j * a->dim + i];
                y[k * a->dim + i] = v;
            }
        lat_store(a->dtype, a->x, (size_t)t * n, y, n);
    }
}

int cpu_hc_post(struct arle_device *dev, struct arle_stream *st, const struct arle_hc_post_args *a)
{
    if ((size_t)(2 * a->streams + 1) * a->dim > LAT_SCRATCH)
        return -EINVAL;
    return lat_parallel(dev, a->n_tokens, (double)a->streams * a->dim * (1 + a->streams) * 0.2, hc_post_rows, (void *)a);
}

static void hc_head_rows(void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_hc_head_args *a = arg;
    uint32_t S = a->streams, n = S * a->dim;
    float *x = lat_scratch((size_t)n + a->dim), *h = x + n;
    for (uint32_t t = t0; t < t1; t++) {
        float p[HC_MAX];
        lat_load(a->dtype, a->x, (size_t)(a->rows ? a->rows[t] : (int32_t)t) * n, x, n);
        float r = 1.0f / sqrtf(dot_f32(x, x, n) / (float)n + a->norm_eps);
        for (uint32_t j = 0; j < S; j++)
            p[j] = sigmoid_f32(dot_f32(a->fn + (size_t)j * n, x, n) * r * a->scale[0] + a->base[j]) + a->eps;
        for (uint32_t i = 0; i < a->dim; i++) {
            float v = 0;
            for (uint32_t j = 0; j < S; j++)
                v += p[j] * x[j * a->dim + i];
            h[i] = v;
        }
        lat_store(a->dtype, a->out, (size_t)t * a->dim, h, a->dim);
    }
}

int cpu_hc_head(struct arle_device *dev, struct arle_stream *st, const struct arle_hc_head_args *a)
{
    if (a->streams == 0 || a->streams > HC_MAX || (size_t)(a->streams + 1) * a->dim > LAT_SCRATCH)
        return -EINVAL;
    return lat_parallel(dev, a->n_tokens, (double)a->streams * a->dim * (1 + a->streams) * 0.2, hc_head_rows, (void *)a);
}

/* ---- heads: norm, rotation, simulated quantisation --------------------------------------------------------------------- */

static void head_rope_rows(void *arg, uint32_t i0, uint32_t i1)
{
    const struct arle_head_rope_args *a = arg;
    uint32_t d = a->head_dim;
    float *x = lat_scratch(d);
    for (uint32_t i = i0; i < i1; i++) {
        uint32_t t = i / a->n_heads, h = i % a->n_heads;
        size_t at = (size_t)t * a->ld_x + (size_t)h * d;
        lat_load(a->dtype, a->x, at, x, d);
        if (a->norm)
            lat_rmsnorm(a->dtype, x, d, a->eps, a->norm == 2 ? a->w : NULL);
        lat_rope(a->dtype, x + d - a->rot_dim, a->rot_dim, a->pos[t], a->inv_freq, a->inverse);
        lat_fake_quant(a->dtype, x, d, a->rot_dim, a->quant);
        lat_store(a->dtype, a->x, at, x, d);
    }
}

int cpu_head_rope(struct arle_device *dev, struct arle_stream *st, const struct arle_head_rope_args *a)
{
    if (a->rot_dim % 2 != 0 || a->rot_dim > a->head_dim)
        return -EINVAL;
    return lat_parallel(dev, a->n_tokens * a->n_heads, a->head_dim * 0.5 + a->rot_dim * 10, head_rope_rows, (void *)a);
}

/* ---- window and compressor: one sequence after another, since records are rewritten in token order --------------------- */

static void window_store_seqs(void *arg, uint32_t s0, uint32_t s1)
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

/* Softmax-weighted sum over the rows of a group, per channel; rows in token order. */
static void pool_group(const struct arle_compress_args *a, const float *kv, const float *g, bool with_previous, float *e)
{
    uint32_t m = a->ratio, width = (a->overlap ? 2 : 1) * a->dim, total = a->overlap ? 2 * m : m;
    for (uint32_t i = 0; i < a->dim; i++) {
        float mx = -INFINITY, den = 0, num = 0;
        for (uint32_t r = a->overlap && !with_previous ? m : 0; r < total; r++)
            mx = fmaxf(mx, g[(size_t)r * width + (a->overlap && r >= m ? a->dim : 0) + i]);
        for (uint32_t r = a->overlap && !with_previous ? m : 0; r < total; r++) {
            size_t at = (size_t)r * width + (a->overlap && r >= m ? a->dim : 0) + i;
            float p = expf(g[at] - mx);
            den += p;
            num += p * kv[at];
        }
        e[i] = num / den;
    }
}

static void compress_token(const struct arle_compress_args *a, uint32_t seq, int32_t t, float *kv, float *g, float *e)
{
    const struct arle_batch *b = a->batch;
    uint32_t m = a->ratio, width = (a->overlap ? 2 : 1) * a->dim, p = (uint32_t)b->pos[t];
    uint32_t row = p % m + (a->overlap ? m : 0);
    const float *src = a->proj + (size_t)t * a->ld_proj;
    memcpy(kv + (size_t)row * width, src, width * sizeof *kv);
    for (uint32_t i = 0; i < width; i++)
        g[(size_t)row * width + i] = src[width + i] + a->ape[(size_t)(p % m) * width + i];
    if (p % m != m - 1)
        return;
    uint32_t w = p / m;
    pool_group(a, kv, g, w > 0, e);
    lat_round(a->dtype, e, a->dim);
    lat_rmsnorm(a->dtype, e, a->dim, a->eps, a->norm_w);
    lat_rope(a->dtype, e + a->dim - a->rot_dim, a->rot_dim, (int32_t)(w * m), a->inv_freq, 0);
    lat_fake_quant(a->dtype, e, a->dim, a->rot_dim, a->quant);
    lat_store(a->dtype, entry_at(&a->out, b, seq, m, w), 0, e, a->dim);
    if (a->overlap) {
        memcpy(kv, kv + (size_t)m * width, (size_t)m * width * sizeof *kv);
        memcpy(g, g + (size_t)m * width, (size_t)m * width * sizeof *g);
    }
}

static void compress_seqs(void *arg, uint32_t s0, uint32_t s1)
{
    const struct arle_compress_args *a = arg;
    const struct arle_batch *b = a->batch;
    uint32_t c = a->overlap ? 2 : 1;
    float *e = lat_scratch(a->dim);
    for (uint32_t s = s0; s < s1; s++) {
        float *kv = (float *)(void *)((char *)a->record.base + (size_t)b->slot[s] * a->record.stride + a->record.offset);
        float *g = kv + (size_t)c * a->ratio * c * a->dim;
        for (int32_t t = b->cu[s]; t < b->cu[s + 1]; t++)
            compress_token(a, s, t, kv, g, e);
    }
}

int cpu_compress(struct arle_device *dev, struct arle_stream *st, const struct arle_compress_args *a)
{
    if (a->ratio == 0 || a->batch->page_tokens % a->ratio != 0 || a->dim > LAT_SCRATCH)
        return -EINVAL;
    if (a->batch->n_seqs == 0)
        return 0;
    count(dev, N_compress, 1);
    return lat_parallel(dev, a->batch->n_seqs, (double)a->batch->n_tokens / a->batch->n_seqs * a->dim * 10, compress_seqs, (void *)a);
}

/* ---- indexer -------------------------------------------------------------------------------------------------------------- */

static float bf16_round(float x)
{
    lat_round(ARLE_BF16, &x, 1);
    return x;
}

static float index_score(const struct arle_index_select_args *a, const float *q, const float *wgt, const float *key)
{
    float sum = 0;
    for (uint32_t h = 0; h < a->n_heads; h++) {
        float dot = dot_f32(q + (size_t)h * a->dim, key, a->dim);
        if (a->round_scores) {
            float v = bf16_round(fmaxf(bf16_round(dot), 0.0f) * bf16_round(bf16_round(wgt[h]) * a->scale));
            sum = sum + v;
        } else {
            sum += fmaxf(dot, 0.0f) * (wgt[h] * a->scale);
        }
    }
    return a->round_scores ? bf16_round(sum) : sum;
}

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

static void index_select_rows(void *arg, uint32_t t0, uint32_t t1)
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
        float *q = lat_scratch((size_t)nq + a->dim + n), *key = q + nq, *score = key + a->dim;
        lat_load(a->dtype, a->q, (size_t)t * a->ld_q, q, nq);
        for (uint32_t c = 0; c < n; c++) {
            lat_load(a->dtype, entry_at(&a->keys, b, seq, a->ratio, c), 0, key, a->dim);
            score[c] = index_score(a, q, a->weight + (size_t)t * a->ld_weight, key);
        }
        select_top(score, n, sel, a->topk);
    }
}

int cpu_index_select(struct arle_device *dev, struct arle_stream *st, const struct arle_index_select_args *a)
{
    uint32_t most = a->ratio ? a->batch->max_ctx / a->ratio : 0;
    if (a->ratio == 0 || a->batch->page_tokens % a->ratio != 0 || ((size_t)a->n_heads + 1) * a->dim + most > LAT_SCRATCH)
        return -EINVAL;
    count(dev, most > a->topk ? N_index_scored : N_index_all, 1);
    return lat_parallel(dev, a->batch->n_tokens, most > a->topk ? (double)most * a->n_heads * a->dim * 0.1 : 100, index_select_rows, (void *)a);
}

/* ---- latent attention ------------------------------------------------------------------------------------------------------- */

struct latent_keys {
    const float *row;       /* [n, dim] */
    uint32_t n;
};

/* Gathers the key rows of one query, window first, then compressed entries, widened to f32. */
static struct latent_keys gather_keys(const struct arle_attn_latent_args *a, uint32_t t, float *buf)
{
    const struct arle_batch *b = a->batch;
    uint32_t seq = (uint32_t)b->seq_of[t], d = a->dim, n = 0;
    int32_t p = b->pos[t], first_new = b->pos[b->cu[seq]];
    const char *ring = (const char *)a->ring.base + (size_t)b->slot[seq] * a->ring.stride + a->ring.offset;
    int32_t from = p - (int32_t)a->window + 1;
    for (int32_t j = from < a->first_key ? a->first_key : from; j <= p; j++, n++) {
        if (j >= first_new)
            lat_load(a->dtype, a->kv_new, (size_t)(b->cu[seq] + j - first_new) * a->ld_kv, buf + (size_t)n * d, d);
        else
            lat_load(a->dtype, ring, (size_t)(j % (int32_t)a->window) * d, buf + (size_t)n * d, d);
    }
    if (a->ratio != 0) {
        uint32_t visible = ((uint32_t)p + 1) / a->ratio, m = a->sel ? (uint32_t)a->n_sel[t] : visible;
        for (uint32_t i = 0; i < m; i++, n++) {
            uint32_t c = a->sel ? (uint32_t)a->sel[(size_t)t * a->topk + i] : i;
            lat_load(a->dtype, entry_at(&a->entries, b, seq, a->ratio, c), 0, buf + (size_t)n * d, d);
        }
    }
    return (struct latent_keys){ buf, n };
}

static void latent_head(const struct arle_attn_latent_args *a, const struct latent_keys *keys, const float *q, float sink,
                        float *score, float *o)
{
    uint32_t d = a->dim;
    float mx = -INFINITY, den = 0;
    for (uint32_t j = 0; j < keys->n; j++) {
        score[j] = a->scale * dot_f32(q, keys->row + (size_t)j * d, d);
        mx = fmaxf(mx, score[j]);
    }
    memset(o, 0, d * sizeof *o);
    for (uint32_t j = 0; j < keys->n; j++) {
        float e = expf(score[j] - mx);
        const float *k = keys->row + (size_t)j * d;
        den += e;
        lat_round(a->dtype, &e, 1);
        for (uint32_t i = 0; i < d; i++)
            o[i] += e * k[i];
    }
    den += expf(sink - mx);
    for (uint32_t i = 0; i < d && keys->n > 0; i++)
        o[i] /= den;
}

static void attn_latent_rows(void *arg, uint32_t t0, uint32_t t1)
{
    const struct arle_attn_latent_args *a = arg;
    const struct arle_batch *b = a->batch;
    uint32_t d = a->dim;
    for (uint32_t t = t0; t < t1; t++) {
        uint32_t most = a->window + (a->ratio == 0 ? 0 : a->sel ? a->topk : ((uint32_t)b->pos[t] + 1) / a->ratio);
        float *buf = lat_scratch((size_t)most * d + most + 2 * d), *score = buf + (size_t)most * d, *q = score + most, *o = q + d;
        struct latent_keys keys = gather_keys(a, t, buf);
        for (uint32_t h = 0; h < a->n_heads; h++) {
            lat_load(a->dtype, a->q, (size_t)t * a->ld_q + (size_t)h * d, q, d);
            latent_head(a, &keys, q, a->sink[h], score, o);
            lat_round(a->dtype, o, d);
            lat_rope(a->dtype, o + d - a->rot_dim, a->rot_dim, b->pos[t], a->inv_freq, 1);
            lat_store(a->dtype, a->out, (size_t)t * a->ld_out + (size_t)h * d, o, d);
        }
    }
}

int cpu_attn_latent(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_latent_args *a)
{
    uint32_t most = a->window + (a->ratio == 0 ? 0 : a->sel ? a->topk : a->batch->max_ctx / a->ratio);
    if (a->window == 0 || (a->ratio != 0 && a->batch->page_tokens % a->ratio != 0) || ((size_t)most + 2) * a->dim + most > LAT_SCRATCH)
        return -EINVAL;
    count(dev, N_attn_latent, 1);
    return lat_parallel(dev, a->batch->n_tokens, (double)most * a->n_heads * a->dim * 0.2, attn_latent_rows, (void *)a);
}
