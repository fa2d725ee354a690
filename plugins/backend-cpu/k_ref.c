/*
 * The reference kernels: plain loops after the formulas of <arle/ops.h>, one element at a time, in float. Slow on purpose; the
 * fast kernels are compared with these, and these with double-precision loops in the tests.
 */
#include "cpu.h"

static void ref_gemm_f32_wbf16(const void *xp, unsigned rows, int64_t k2, const void *wp, size_t block_bytes, unsigned blocks, float *out)
{
    const float *x = xp;
    for (unsigned b = 0; b < blocks; b++) {
        const uint16_t *w = (const uint16_t *)(const void *)((const char *)wp + b * block_bytes);
        for (unsigned r = 0; r < rows; r++)
            for (unsigned c = 0; c < CPU_BLOCK; c++) {
                float sum = 0;
                for (int64_t i = 0; i < k2; i++)
                    for (unsigned j = 0; j < 2; j++)
                        sum += x[(i * rows + r) * 2 + j] * bf16_to_f32(w[(i * CPU_BLOCK + c) * 2 + j]);
                out[r * blocks * CPU_BLOCK + b * CPU_BLOCK + c] = sum;
            }
    }
}

static void ref_gemm_f32_wf32(const void *xp, unsigned rows, int64_t k2, const void *wp, size_t block_bytes, unsigned blocks, float *out)
{
    const float *x = xp;
    for (unsigned b = 0; b < blocks; b++) {
        const float *w = (const float *)(const void *)((const char *)wp + b * block_bytes);
        for (unsigned r = 0; r < rows; r++)
            for (unsigned c = 0; c < CPU_BLOCK; c++) {
                float sum = 0;
                for (int64_t i = 0; i < k2; i++)
                    for (unsigned j = 0; j < 2; j++)
                        sum += x[(i * rows + r) * 2 + j] * w[(i * 2 + j) * CPU_BLOCK + c];
                out[r * blocks * CPU_BLOCK + b * CPU_BLOCK + c] = sum;
            }
    }
}

static void ref_store_row(const float *acc, int64_t n, void *y, uint32_t dtype, bool accumulate)
{
    for (int64_t i = 0; i < n; i++)
        act_set(y, dtype, i, acc[i] + (accumulate ? act_get(y, dtype, i) : 0.0f));
}

static void ref_silu_mul(const float *g, const float *u, int64_t n, float limit, float weight, void *out, uint32_t dtype,
                         uint32_t round_dtype)
{
    for (int64_t i = 0; i < n; i++) {
        float a = act_round(round_dtype, g[i]), b = act_round(round_dtype, u[i]);
        if (limit > 0) {
            a = fminf(a, limit);
            b = fminf(fmaxf(b, -limit), limit);
        }
        float v = silu_f32(a) * b;
        act_set(out, dtype, i, weight == 1.0f ? v : v * weight);
    }
}

static void ref_to_f32(const void *x, uint32_t dtype, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = act_get(x, dtype, i);
}

static void ref_rmsnorm(const void *x, int64_t n, float eps, float w_offset, const float *w, void *out, uint32_t dtype)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += act_get(x, dtype, i) * act_get(x, dtype, i);
    float rho = 1.0f / sqrtf(sum / (float)n + eps);
    for (int64_t i = 0; i < n; i++)
        act_set(out, dtype, i, act_get(x, dtype, i) * rho * (w_offset + w[i]));
}

static void ref_axpy(int64_t n, float w, const float *x, float *y)
{
    for (int64_t i = 0; i < n; i++)
        y[i] += w * x[i];
}

static float ref_dot(int64_t n, const float *a, const float *b)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static void ref_sincos(int64_t n, float pos, const float *inv_freq, float scale, float *cs)
{
    for (int64_t i = 0; i < n; i++) {
        float angle = pos * inv_freq[i];        /* rounded to f32 here: part of the models' definition */
        cs[i] = cosf(angle) * scale;
        cs[n + i] = sinf(angle) * scale;
    }
}

static void ref_rope(const struct rope_args *a, float *x)
{
    unsigned half = a->rot_dim / 2;
    for (unsigned j = 0; j < half; j++) {
        float *pa = x + a->rot_off + (a->interleaved ? 2 * j : j), *pb = a->interleaved ? pa + 1 : pa + half;
        float va = *pa, vb = *pb, c = a->cs[j], s = a->cs[half + j];
        *pa = va * c - vb * s;
        *pb = vb * c + va * s;
    }
}

static void ref_attn(const struct attn_block *b)
{
    for (unsigned i = 0; i < b->n_q; i++) {
        const float *q = b->q + (size_t)i * b->head_dim;
        float *o = b->o + (size_t)i * b->head_dim, s[CPU_KEY_BLOCK], top = b->m[i], sum = 0;
        for (unsigned j = 0; j < b->n_keys; j++) {
            s[j] = 0;
            for (unsigned d = 0; d < b->head_dim; d++)
                s[j] += q[d] * act_get(b->k[j], b->dtype, d);
            top = s[j] > top ? s[j] : top;
        }
        float keep = expf(b->m[i] - top);
        for (unsigned d = 0; d < b->head_dim; d++)
            o[d] *= keep;
        for (unsigned j = 0; j < b->n_keys; j++) {
            float p = expf(s[j] - top);
            sum += p;
            for (unsigned d = 0; d < b->head_dim; d++)
                o[d] += p * act_get(b->v[j], b->dtype, d);
        }
        b->m[i] = top;
        b->l[i] = b->l[i] * keep + sum;
    }
}

static void ref_attn_finish(int64_t n, const float *o, float l, const void *gate, void *out, uint32_t dtype)
{
    for (int64_t i = 0; i < n; i++) {
        float v = o[i] / l;
        act_set(out, dtype, i, gate == NULL ? v : v * sigmoid_f32(act_get(gate, dtype, i)));
    }
}

static void ref_dequant(const void *codes, const void *scales, uint32_t kv_dtype, unsigned head_dim, float *out)
{
    const uint8_t *c = codes;
    float s;
    for (unsigned i = 0; i < head_dim; i++) {
        if (kv_dtype == ARLE_I4G) {
            uint16_t h;
            memcpy(&h, (const char *)scales + i / 32 * 2, 2);
            out[i] = (float)((int)(i & 1 ? c[i / 2] >> 4 : c[i / 2] & 15) - 8) * f16_to_f32(h);
            continue;
        }
        memcpy(&s, scales, 4);
        out[i] = (kv_dtype == ARLE_I8 ? (float)(int8_t)c[i] : e4m3_to_f32(c[i])) * s;
    }
}

static void ref_conv(const void *const u[4], const float *w, int64_t n, uint32_t dtype, float *y)
{
    for (int64_t c = 0; c < n; c++) {
        float sum = 0;
        for (int i = 0; i < 4; i++)
            sum += w[c * 4 + i] * act_get(u[i], dtype, c);
        y[c] = act_round(dtype, silu_f32(sum));
    }
}

static void ref_l2norm(int64_t n, float eps, float scale, float *x)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    float f = scale / sqrtf(sum + eps);
    for (int64_t i = 0; i < n; i++)
        x[i] *= f;
}

static void ref_gdn(const struct gdn_slice *s)
{
    for (unsigned t = 0; t < s->n_tokens; t++) {
        const float *q = s->q + t * s->ld_qkv, *k = s->k + t * s->ld_qkv, *v = s->v + t * s->ld_qkv;
        const float *g = s->gates + t * s->ld_gates;
        for (unsigned c = 0; c < s->cols; c++) {
            float m = 0, o = 0;
            for (unsigned i = 0; i < s->dk; i++) {
                s->s[i * s->ld_s + c] *= g[0];
                m += s->s[i * s->ld_s + c] * k[i];
            }
            float d = g[1] * (v[c] - m);
            for (unsigned i = 0; i < s->dk; i++) {
                s->s[i * s->ld_s + c] += k[i] * d;
                o += s->s[i * s->ld_s + c] * q[i];
            }
            s->o[t * s->ld_o + c] = o;
        }
    }
}

static void ref_gated_norm(int64_t n, const float *o, const void *z, const float *w, float eps, void *out, uint32_t dtype)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += o[i] * o[i];
    float rho = 1.0f / sqrtf(sum / (float)n + eps);
    for (int64_t i = 0; i < n; i++)
        act_set(out, dtype, i, o[i] * rho * w[i] * silu_f32(act_get(z, dtype, i)));
}

static float ref_max(int64_t n, const float *x)
{
    float m = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        m = x[i] > m ? x[i] : m;
    return m;
}

static double ref_sum_exp(int64_t n, const float *x, float m, float inv_t)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += exp((double)(x[i] - m) * inv_t);
    return sum;
}

static void ref_exps(int64_t n, const float *x, float m, float inv_t, float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = expf((x[i] - m) * inv_t);
}

static void ref_scores(const struct attn_block *b, float *s)
{
    for (unsigned i = 0; i < b->n_q; i++)
        for (unsigned j = 0; j < b->n_keys; j++) {
            float sum = 0;
            for (unsigned d = 0; d < b->head_dim; d++)
                sum += b->q[(size_t)i * b->head_dim + d] * act_get(b->k[j], b->dtype, d);
            s[i * CPU_KEY_BLOCK + j] = sum;
        }
}

static void ref_weigh(const struct attn_block *b, const float *p)
{
    for (unsigned i = 0; i < b->n_q; i++)
        for (unsigned j = 0; j < b->n_keys; j++)
            for (unsigned d = 0; d < b->head_dim; d++)
                b->o[(size_t)i * b->head_dim + d] += p[i * CPU_KEY_BLOCK + j] * act_get(b->v[j], b->dtype, d);
}

static void ref_pool(const struct pool_rows *p, float *out)
{
    for (int64_t c = 0; c < p->n; c++) {
        float top = -INFINITY, den = 0, num = 0;
        for (unsigned r = 0; r < p->n_rows; r++)
            top = fmaxf(top, p->g[r][c] + (p->ape[r] ? p->ape[r][c] : 0));
        for (unsigned r = 0; r < p->n_rows; r++) {
            float e = expf(p->g[r][c] + (p->ape[r] ? p->ape[r][c] : 0) - top);
            den += e;
            num += e * p->kv[r][c];
        }
        out[c] = num / den;
    }
}

static void ref_index_sum(unsigned n_heads, const float *s, const float *w, bool round, float *out)
{
    uint32_t dtype = round ? ARLE_BF16 : ARLE_F32;
    for (unsigned j = 0; j < CPU_KEY_BLOCK; j++) {
        float sum = 0;
        for (unsigned h = 0; h < n_heads; h++)
            sum += act_round(dtype, fmaxf(act_round(dtype, s[h * CPU_KEY_BLOCK + j]), 0.0f) * w[h]);
        out[j] = act_round(dtype, sum);
    }
}

static void ref_widen(const uint8_t *codes, const uint8_t *scales, int64_t n_groups, uint16_t *out)
{
    for (int64_t g = 0; g < n_groups; g++) {
        uint32_t lut[CPU_BLOCK][16];        /* bf16 of every code times the group's scale */
        for (int64_t c = 0; c < CPU_BLOCK; c++) {
            float s = e8m0_to_f32(scales[g * CPU_BLOCK + c]);
            for (int v = 0; v < 16; v++)
                lut[c][v] = f32_to_bf16(e2m1_to_f32((uint8_t)v) * s);
        }
        for (int64_t i = g * 16; i < (g + 1) * 16; i++)
            for (int64_t c = 0; c < CPU_BLOCK; c++) {
                uint8_t b = codes[i * CPU_BLOCK + c];
                uint32_t pair = lut[c][b & 15] | lut[c][b >> 4] << 16;
                memcpy(out + (i * CPU_BLOCK + c) * 2, &pair, sizeof pair);
            }
    }
}

/* Four lanes are what every 64-bit machine multiplies at once without being asked. */
static float ref_peak(int64_t rounds, const float *start)
{
    enum { CHAINS = 12 };
    typedef float v4 __attribute__((vector_size(16)));
    v4 acc[CHAINS], one = { start[1], start[1], start[1], start[1] };
    memcpy(acc, start, sizeof acc);
    for (int64_t k = 0; k < rounds; k++)
        UNROLL for (unsigned i = 0; i < CHAINS; i++)
            acc[i] = acc[i] * one + one;            /* a product of constants would be taken out of the loop */
    for (unsigned i = 0; i < CHAINS * 4; i++)
        if (acc[i / 4][i % 4] - start[i] != acc[0][0] - start[0])
            return NAN;
    return acc[0][0] - start[0];
}

const struct kernels kernels_ref = {
    .name = "reference", .peak = ref_peak, .peak_flop = 12 * 4 * 2, .peak_step = 1, .max_rows = 8, .tile_blocks = { [0 ... CPU_MAX_ROWS] = 2 },
    .gemm_f32_wbf16 = ref_gemm_f32_wbf16, .gemm_f32_wf32 = ref_gemm_f32_wf32,
    .store_row = ref_store_row, .silu_mul = ref_silu_mul, .to_f32 = ref_to_f32, .rmsnorm = ref_rmsnorm, .axpy = ref_axpy,
    .dot = ref_dot, .sincos = ref_sincos, .rope = ref_rope, .attn = ref_attn, .attn_finish = ref_attn_finish,
    .dequant = ref_dequant, .conv = ref_conv, .l2norm = ref_l2norm, .gdn = ref_gdn, .gated_norm = ref_gated_norm, .max = ref_max,
    .sum_exp = ref_sum_exp, .exps = ref_exps, .scores = ref_scores, .weigh = ref_weigh, .pool = ref_pool,
    .index_sum = ref_index_sum, .widen = ref_widen,
};
