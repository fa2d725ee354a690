/*
 * The fast kernels, written once against the sixteen lanes of vec_*.h and compiled once per instruction set: the including file
 * sets the target, INLINE, FAST(name) and the lane header, and gives the table its name.
 *
 * Every element of a result is the same chain of operations whatever tile computes it. Error bounds of the elementary functions,
 * in units of the last place of the exact value: exp 2 (subnormal results: 2 of the smallest), silu 4; sin and cos are
 * within 1.5e-7 of the exact value for angles up to 1.5e6 (beyond, the C library takes over).
 */

/* ---- elementary functions ------------------------------------------------------------------------------------------- */

/* e^x: 2^n e^r with |r| <= ln2/2; the polynomial is the Taylor series to r^7/7!, good to 2^-26 there. NaN stays NaN. */
static INLINE vf vf_exp(vf x)
{
    x = vf_min(vf_set1(89.0f), vf_max(vf_set1(-105.0f), x));
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504088896341f)));
    vf r = vf_fnma(n, vf_set1(0x1.62e4p-1f), x);
    r = vf_fnma(n, vf_set1(0x1.7f7d1cp-20f), r);
    vf p = vf_set1(1.0f / 5040);
    p = vf_fma(p, r, vf_set1(1.0f / 720));
    p = vf_fma(p, r, vf_set1(1.0f / 120));
    p = vf_fma(p, r, vf_set1(1.0f / 24));
    p = vf_fma(p, r, vf_set1(1.0f / 6));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_scale2(p, n);
}

static INLINE vf vf_sigmoid(vf x)
{
    return vf_div(vf_set1(1.0f), vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), x))));
}

static INLINE vf vf_silu(vf x)
{
    return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), x))));
}

/* Reduction by pi/2 in three parts with fused multiply-adds; polynomials of degree 7 and 8 on [-pi/4, pi/4]. */
static INLINE void vf_sincos(vf x, vf *out_sin, vf *out_cos)
{
    vf q = vf_round(vf_mul(x, vf_set1(0x1.45f306p-1f)));
    vf r = vf_fnma(q, vf_set1(0x1.921fb6p+0f), x);
    r = vf_fnma(q, vf_set1(-0x1.777a5cp-25f), r);
    r = vf_fnma(q, vf_set1(-0x1.ee59dap-50f), r);
    vf r2 = vf_mul(r, r);
    vf s = vf_fma(vf_set1(-1.9515295891e-4f), r2, vf_set1(8.3321608736e-3f));
    s = vf_fma(s, r2, vf_set1(-1.6666654611e-1f));
    s = vf_fma(vf_mul(s, r2), r, r);
    vf c = vf_fma(vf_set1(2.443315711809948e-5f), r2, vf_set1(-1.388731625493765e-3f));
    c = vf_fma(c, r2, vf_set1(4.166664568298827e-2f));
    c = vf_fma(c, r2, vf_set1(-0.5f));
    c = vf_fma(c, r2, vf_set1(1.0f));
    vf_quadrant(q, s, c, out_sin, out_cos);
}

/* ---- loads and stores of act rows ----------------------------------------------------------------------------------- */

static INLINE vf get16(const void *p, uint32_t dtype, int64_t i, int64_t n)
{
    if (n >= 16)
        return dtype == ARLE_BF16 ? vf_loadh((const uint16_t *)p + i) : vf_load((const float *)p + i);
    return dtype == ARLE_BF16 ? vf_loadhn((const uint16_t *)p + i, n) : vf_loadn((const float *)p + i, n);
}

static INLINE void put16(void *p, uint32_t dtype, int64_t i, int64_t n, vf v)
{
    if (n >= 16) {
        if (dtype == ARLE_BF16)
            vf_storeh((uint16_t *)p + i, v);
        else
            vf_store((float *)p + i, v);
    } else if (dtype == ARLE_BF16) {
        vf_storehn((uint16_t *)p + i, v, n);
    } else {
        vf_storen((float *)p + i, v, n);
    }
}

static INLINE vf round_act(uint32_t dtype, vf v)
{
    return dtype == ARLE_BF16 ? vf_round_bf16(v) : v;
}

/* ---- matrix tiles --------------------------------------------------------------------------------------------------- */

#define PREFETCH_AHEAD 1536     /* bytes; with it one row reads at the ceiling on 2 cores of a Zen 5 server, 2026-11 */

/* k pairs of a tile; `next` is how far what will be read PREFETCH_AHEAD bytes later lies from here, 0 for no prefetch. */
static INLINE void steps_f32_wbf16(const float *x, unsigned rows, int64_t n, const char *w, size_t block_bytes, unsigned blocks,
                                   size_t next, vf *acc)
{
    for (int64_t k = 0; k < n; k++) {
        UNROLL for (unsigned b = 0; b < blocks; b++) {
            vf w0, w1;
            vf_load_pair(w + b * block_bytes, &w0, &w1);
            if (next != 0)
                __builtin_prefetch(w + b * block_bytes + next);
            UNROLL for (unsigned r = 0; r < rows; r++) {
                acc[r * blocks + b] = vf_fma(vf_set1(x[r * 2]), w0, acc[r * blocks + b]);
                acc[r * blocks + b] = vf_fma(vf_set1(x[r * 2 + 1]), w1, acc[r * blocks + b]);
            }
        }
        w += 64;
        x += rows * 2;
    }
}

static INLINE void tile_f32_wbf16(const float *x, unsigned rows, int64_t k2, const char *w, size_t block_bytes, unsigned blocks,
                                  float *out, unsigned ld_out)
{
    vf acc[VEC_ROWS * 8];
    UNROLL for (unsigned i = 0; i < rows * blocks; i++)
        acc[i] = vf_zero();
    if (rows == 1 && k2 > PREFETCH_AHEAD / 64) {
        /* Near the end of these blocks the next group is due, which lies behind the other blocks of this one. */
        int64_t n = k2 - PREFETCH_AHEAD / 64;
        steps_f32_wbf16(x, rows, n, w, block_bytes, blocks, PREFETCH_AHEAD, acc);
        steps_f32_wbf16(x + n * 2, rows, PREFETCH_AHEAD / 64, w + n * 64, block_bytes, blocks,
                        PREFETCH_AHEAD + (blocks - 1) * block_bytes, acc);
    } else {
        steps_f32_wbf16(x, rows, k2, w, block_bytes, blocks, 0, acc);
    }
    UNROLL for (unsigned i = 0; i < rows * blocks; i++)
        vf_store(out + i / blocks * ld_out + i % blocks * CPU_BLOCK, acc[i]);
}

static INLINE void tile_f32_wf32(const float *x, unsigned rows, int64_t k2, const char *w, size_t block_bytes, unsigned blocks,
                                 float *out, unsigned ld_out)
{
    vf acc[VEC_ROWS * 8];
    UNROLL for (unsigned i = 0; i < rows * blocks; i++)
        acc[i] = vf_zero();
    for (int64_t k = 0; k < k2; k++) {
        UNROLL for (unsigned b = 0; b < blocks; b++) {
            vf w0 = vf_load((const float *)(const void *)(w + b * block_bytes));
            vf w1 = vf_load((const float *)(const void *)(w + b * block_bytes) + 16);
            UNROLL for (unsigned r = 0; r < rows; r++) {
                acc[r * blocks + b] = vf_fma(vf_set1(x[r * 2]), w0, acc[r * blocks + b]);
                acc[r * blocks + b] = vf_fma(vf_set1(x[r * 2 + 1]), w1, acc[r * blocks + b]);
            }
        }
        w += 128;
        x += rows * 2;
    }
    UNROLL for (unsigned i = 0; i < rows * blocks; i++)
        vf_store(out + i / blocks * ld_out + i % blocks * CPU_BLOCK, acc[i]);
}

/* One function per tile shape, so that the sums of each stay in registers. */
typedef void (*tile_fn)(const void *x, int64_t k2, const char *w, size_t block_bytes, float *out, unsigned ld_out);

#define TILE_FN(kind, type, R, C) \
    static void FAST(kind##_##R##_##C)(const void *x, int64_t k2, const char *w, size_t block_bytes, float *out, unsigned ld_out) \
    { kind((const type *)x, R, k2, w, block_bytes, C, out, ld_out); }
#if VEC_ROWS == 12
#define TILE_ROWS_8(X, ...) X(__VA_ARGS__, 1, 8) X(__VA_ARGS__, 2, 8) X(__VA_ARGS__, 3, 8)
#define TILE_ROWS_4(X, ...) X(__VA_ARGS__, 1, 4) X(__VA_ARGS__, 2, 4) X(__VA_ARGS__, 3, 4) X(__VA_ARGS__, 4, 4) X(__VA_ARGS__, 5, 4) \
    X(__VA_ARGS__, 6, 4)
#define TILE_ROWS_N(X, C, ...) X(__VA_ARGS__, 1, C) X(__VA_ARGS__, 2, C) X(__VA_ARGS__, 3, C) X(__VA_ARGS__, 4, C) \
    X(__VA_ARGS__, 5, C) X(__VA_ARGS__, 6, C) X(__VA_ARGS__, 7, C) X(__VA_ARGS__, 8, C) X(__VA_ARGS__, 9, C) X(__VA_ARGS__, 10, C) \
    X(__VA_ARGS__, 11, C) X(__VA_ARGS__, 12, C)
#define TILE_ROWS_2(X, ...) TILE_ROWS_N(X, 2, __VA_ARGS__)
#define TILE_ROWS_1(X, ...) TILE_ROWS_N(X, 1, __VA_ARGS__)
#else
#define TILE_ROWS_8(X, ...)
#define TILE_ROWS_4(X, ...) X(__VA_ARGS__, 1, 4)
#define TILE_ROWS_2(X, ...) X(__VA_ARGS__, 1, 2) X(__VA_ARGS__, 2, 2) X(__VA_ARGS__, 3, 2)
#define TILE_ROWS_1(X, ...) X(__VA_ARGS__, 1, 1) X(__VA_ARGS__, 2, 1) X(__VA_ARGS__, 3, 1) X(__VA_ARGS__, 4, 1) X(__VA_ARGS__, 5, 1) \
    X(__VA_ARGS__, 6, 1)
#endif
#define TILE_ENTRY(kind, type, R, C) [R] = FAST(kind##_##R##_##C),

/* Hands a strip of blocks to the widest tiles that the number of rows allows. */
static INLINE void strip(const tile_fn *t8, const tile_fn *t4, const tile_fn *t2, const tile_fn *t1, const void *x, unsigned rows,
                         int64_t k2, const void *wp, size_t block_bytes, unsigned blocks, float *out)
{
    const char *w = wp;
    for (unsigned b = 0, step; b < blocks; b += step) {
        unsigned left = blocks - b;
        step = left >= 8 && t8[rows] ? 8 : left >= 4 && t4[rows] ? 4 : left >= 2 && t2[rows] ? 2 : 1;
        const tile_fn *t = step == 8 ? t8 : step == 4 ? t4 : step == 2 ? t2 : t1;
        t[rows](x, k2, w + b * block_bytes, block_bytes, out + b * CPU_BLOCK, blocks * CPU_BLOCK);
    }
}

#define GEMM(name, kind, type) \
    TILE_ROWS_8(TILE_FN, kind, type) TILE_ROWS_4(TILE_FN, kind, type) TILE_ROWS_2(TILE_FN, kind, type) TILE_ROWS_1(TILE_FN, kind, type) \
    static void FAST(name)(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out) \
    { \
        static const tile_fn t8[VEC_ROWS + 1] = { TILE_ROWS_8(TILE_ENTRY, kind, type) }; \
        static const tile_fn t4[VEC_ROWS + 1] = { TILE_ROWS_4(TILE_ENTRY, kind, type) }; \
        static const tile_fn t2[VEC_ROWS + 1] = { TILE_ROWS_2(TILE_ENTRY, kind, type) }; \
        static const tile_fn t1[VEC_ROWS + 1] = { TILE_ROWS_1(TILE_ENTRY, kind, type) }; \
        strip(t8, t4, t2, t1, x, rows, k2, w, block_bytes, blocks, out); \
    }

GEMM(gemm_f32_wbf16, tile_f32_wbf16, float)
GEMM(gemm_f32_wf32, tile_f32_wf32, float)

/* ---- rows ----------------------------------------------------------------------------------------------------------- */

static void FAST(store_row)(const float *acc, int64_t n, void *y, uint32_t dtype, bool accumulate)
{
    for (int64_t i = 0; i < n; i += 16) {
        vf v = get16(acc, ARLE_F32, i, n - i);
        if (accumulate)
            v = vf_add(v, get16(y, dtype, i, n - i));
        put16(y, dtype, i, n - i, v);
    }
}

static void FAST(silu_mul)(const float *g, const float *u, int64_t n, float limit, float weight, void *out, uint32_t dtype,
                           uint32_t round_dtype)
{
    for (int64_t i = 0; i < n; i += 16) {
        vf a = round_act(round_dtype, get16(g, ARLE_F32, i, n - i)), b = round_act(round_dtype, get16(u, ARLE_F32, i, n - i));
        if (limit > 0) {
            a = vf_min(vf_set1(limit), a);
            b = vf_min(vf_set1(limit), vf_max(vf_set1(-limit), b));
        }
        vf v = vf_mul(vf_silu(a), b);
        put16(out, dtype, i, n - i, weight == 1.0f ? v : vf_mul(v, vf_set1(weight)));
    }
}

static void FAST(to_f32)(const void *x, uint32_t dtype, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i += 16)
        put16(out, ARLE_F32, i, n - i, get16(x, dtype, i, n - i));
}

static INLINE float sum_squares(const void *x, uint32_t dtype, int64_t n)
{
    vf s0 = vf_zero(), s1 = vf_zero();
    for (int64_t i = 0; i < n; i += 32) {
        vf a = get16(x, dtype, i, n - i), b = i + 16 < n ? get16(x, dtype, i + 16, n - i - 16) : vf_zero();
        s0 = vf_fma(a, a, s0);
        s1 = vf_fma(b, b, s1);
    }
    return vf_sum(vf_add(s0, s1));
}

static void FAST(rmsnorm)(const void *x, int64_t n, float eps, float w_offset, const float *w, void *out, uint32_t dtype)
{
    vf rho = vf_set1(1.0f / sqrtf(sum_squares(x, dtype, n) / (float)n + eps)), off = vf_set1(w_offset);
    for (int64_t i = 0; i < n; i += 16)
        put16(out, dtype, i, n - i, vf_mul(vf_mul(get16(x, dtype, i, n - i), rho), vf_add(off, get16(w, ARLE_F32, i, n - i))));
}

static void FAST(axpy)(int64_t n, float w, const float *x, float *y)
{
    for (int64_t i = 0; i < n; i += 16)
        put16(y, ARLE_F32, i, n - i, vf_fma(vf_set1(w), get16(x, ARLE_F32, i, n - i), get16(y, ARLE_F32, i, n - i)));
}

static float FAST(dot)(int64_t n, const float *a, const float *b)
{
    vf s = vf_zero();
    for (int64_t i = 0; i < n; i += 16)
        s = vf_fma(get16(a, ARLE_F32, i, n - i), get16(b, ARLE_F32, i, n - i), s);
    return vf_sum(s);
}

static void FAST(l2norm)(int64_t n, float eps, float scale, float *x)
{
    vf f = vf_set1(scale / sqrtf(sum_squares(x, ARLE_F32, n) + eps));
    for (int64_t i = 0; i < n; i += 16)
        put16(x, ARLE_F32, i, n - i, vf_mul(get16(x, ARLE_F32, i, n - i), f));
}

static void FAST(gated_norm)(int64_t n, const float *o, const void *z, const float *w, float eps, void *out, uint32_t dtype)
{
    vf rho = vf_set1(1.0f / sqrtf(sum_squares(o, ARLE_F32, n) / (float)n + eps));
    for (int64_t i = 0; i < n; i += 16) {
        vf v = vf_mul(vf_mul(get16(o, ARLE_F32, i, n - i), rho), get16(w, ARLE_F32, i, n - i));
        put16(out, dtype, i, n - i, vf_mul(v, vf_silu(get16(z, dtype, i, n - i))));
    }
}

static float FAST(max)(int64_t n, const float *x)
{
    vf m = vf_set1(-INFINITY);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        m = vf_max(vf_load(x + i), m);          /* m when x is NaN */
    float top = vf_hmax(m);
    for (; i < n; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

static double FAST(sum_exp)(int64_t n, const float *x, float m, float inv_t)
{
    double total = 0;
    for (int64_t b = 0; b < n; b += 4096) {
        int64_t end = b + 4096 < n ? b + 4096 : n, i = b;
        vf s = vf_zero();
        for (; i + 16 <= end; i += 16)
            s = vf_add(s, vf_exp(vf_mul(vf_sub(vf_load(x + i), vf_set1(m)), vf_set1(inv_t))));
        total += vf_sum(s);
        for (; i < end; i++)
            total += exp((double)(x[i] - m) * inv_t);
    }
    return total;
}

static void FAST(exps)(int64_t n, const float *x, float m, float inv_t, float *out)
{
    for (int64_t i = 0; i < n; i += 16)
        put16(out, ARLE_F32, i, n - i, vf_exp(vf_mul(vf_sub(get16(x, ARLE_F32, i, n - i), vf_set1(m)), vf_set1(inv_t))));
}

/* ---- attention ------------------------------------------------------------------------------------------------------ */

static void FAST(sincos)(int64_t n, float pos, const float *inv_freq, float scale, float *cs)
{
    for (int64_t i = 0; i < n; i += 16) {
        int64_t left = n - i < 16 ? n - i : 16;
        vf s, c, x = vf_mul(vf_set1(pos), get16(inv_freq, ARLE_F32, i, left));
        vf_sincos(x, &s, &c);
        put16(cs, ARLE_F32, i, left, vf_mul(c, vf_set1(scale)));
        put16(cs, ARLE_F32, n + i, left, vf_mul(s, vf_set1(scale)));
        for (int64_t j = i; j < i + left; j++) {
            float angle = pos * inv_freq[j];
            if (fabsf(angle) > 1.5e6f) {
                cs[j] = cosf(angle) * scale;
                cs[n + j] = sinf(angle) * scale;
            }
        }
    }
}

static void FAST(rope)(const struct rope_args *a, float *x)
{
    unsigned half = a->rot_dim / 2;
    if (a->interleaved) {
        for (unsigned j = 0; j < half; j++) {
            float *p = x + a->rot_off + 2 * j, va = p[0], vb = p[1], c = a->cs[j], s = a->cs[half + j];
            p[0] = va * c - vb * s;
            p[1] = vb * c + va * s;
        }
        return;
    }
    float *pa = x + a->rot_off, *pb = pa + half;
    for (unsigned j = 0; j < half; j += 16) {
        int64_t n = half - j;
        vf va = get16(pa, ARLE_F32, j, n), vb = get16(pb, ARLE_F32, j, n);
        vf c = get16(a->cs, ARLE_F32, j, n), s = get16(a->cs, ARLE_F32, half + j, n);
        put16(pa, ARLE_F32, j, n, vf_fnma(vb, s, vf_mul(va, c)));
        put16(pb, ARLE_F32, j, n, vf_fma(va, s, vf_mul(vb, c)));
    }
}

/* s[q][key] = q . key for n_q query vectors and VEC_ACC / n_q keys. */
static INLINE void score_tile(const struct attn_block *b, uint32_t dtype, const float *q, unsigned n_q, const void *const *keys, float *s)
{
    enum { MAX_KEYS = VEC_ACC };
    unsigned n_k = VEC_ACC / n_q;
    vf acc[VEC_ACC];
    float sums[VEC_ACC];
    UNROLL for (unsigned i = 0; i < VEC_ACC; i++)
        acc[i] = vf_zero();
    for (int64_t d = 0; d < b->head_dim; d += 16) {
        int64_t n = b->head_dim - d;
        vf x[4];
        UNROLL for (unsigned i = 0; i < n_q; i++)
            x[i] = get16(q + i * b->head_dim, ARLE_F32, d, n);
        UNROLL for (unsigned j = 0; j < n_k; j++) {
            vf k = get16(keys[j], dtype, d, n);
            UNROLL for (unsigned i = 0; i < n_q; i++)
                acc[i * n_k + j] = vf_fma(x[i], k, acc[i * n_k + j]);
        }
    }
    vf_sums(acc, sums);
    UNROLL for (unsigned i = 0; i < n_q; i++)
        memcpy(s + i * CPU_KEY_BLOCK, sums + i * n_k, n_k * sizeof *s);
}

/* Scores become weights; the running maximum and sum move on. Returns what the values so far must be scaled with. */
static INLINE float softmax_block(float *s, unsigned n_keys, float *m, float *l)
{
    for (unsigned j = n_keys; j < CPU_KEY_BLOCK; j++)
        s[j] = -INFINITY;
    vf a = vf_load(s), b = vf_load(s + 16), old = vf_set1(*m);
    vf top = vf_set1(vf_hmax(vf_max(vf_max(a, b), old)));
    a = vf_exp(vf_sub(a, top));
    b = vf_exp(vf_sub(b, top));
    vf_store(s, a);
    vf_store(s + 16, b);
    float keep[16], t[16];
    vf_store(keep, vf_exp(vf_sub(old, top)));
    vf_store(t, top);
    *m = t[0];
    *l = *l * keep[0] + vf_sum(vf_add(a, b));
    return keep[0];
}

/* o[q] = o[q] * keep[q] + sum_j p[q][j] v_j, on n_d vectors of dimensions from d. */
static INLINE void value_tile(const struct attn_block *b, uint32_t dtype, const float *p, const float *keep, unsigned n_q, unsigned n_d,
                              int64_t d, int64_t n, float *o)
{
    vf acc[VEC_PV_Q * VEC_PV_D];
    UNROLL for (unsigned i = 0; i < n_q; i++)
        UNROLL for (unsigned c = 0; c < n_d; c++)
            acc[i * n_d + c] = vf_mul(get16(o + i * b->head_dim, ARLE_F32, d + c * 16, n - c * 16), vf_set1(keep[i]));
    for (unsigned j = 0; j < b->n_keys; j++) {
        UNROLL for (unsigned c = 0; c < n_d; c++) {
            vf v = get16(b->v[j], dtype, d + c * 16, n - c * 16);
            UNROLL for (unsigned i = 0; i < n_q; i++)
                acc[i * n_d + c] = vf_fma(vf_set1(p[i * CPU_KEY_BLOCK + j]), v, acc[i * n_d + c]);
        }
    }
    UNROLL for (unsigned i = 0; i < n_q; i++)
        UNROLL for (unsigned c = 0; c < n_d; c++)
            put16(o + i * b->head_dim, ARLE_F32, d + c * 16, n - c * 16, acc[i * n_d + c]);
}

static INLINE void attn_vectors(const struct attn_block *b, uint32_t dtype, unsigned first, unsigned n_q)
{
    _Alignas(64) float s[4 * CPU_KEY_BLOCK + VEC_ACC];
    float keep[4];
    const float *q = b->q + (size_t)first * b->head_dim;
    float *o = b->o + (size_t)first * b->head_dim;
    unsigned n_k = VEC_ACC / n_q;
    for (unsigned j = 0; j < b->n_keys; j += n_k) {
        const void *keys[VEC_ACC];
        for (unsigned i = 0; i < n_k; i++)      /* past the end: the last key again, its scores are dropped */
            keys[i] = b->k[j + i < b->n_keys ? j + i : b->n_keys - 1];
        score_tile(b, dtype, q, n_q, keys, s + j);
    }
    for (unsigned i = 0; i < n_q; i++)
        keep[i] = softmax_block(s + i * CPU_KEY_BLOCK, b->n_keys, &b->m[first + i], &b->l[first + i]);
    for (unsigned i = 0; i < n_q; i += VEC_PV_Q) {
        int64_t d = 0, hd = b->head_dim;
        const float *p = s + i * CPU_KEY_BLOCK;
        float *oi = o + i * (size_t)hd;
        if (n_q >= VEC_PV_Q) {
            for (; d + VEC_PV_D * 16 <= hd; d += VEC_PV_D * 16)
                value_tile(b, dtype, p, keep + i, VEC_PV_Q, VEC_PV_D, d, VEC_PV_D * 16, oi);
            for (; d < hd; d += 16)
                value_tile(b, dtype, p, keep + i, VEC_PV_Q, 1, d, hd - d, oi);
        } else {
            for (unsigned r = i; r < n_q; r++) {
                for (d = 0; d + VEC_PV_D * 16 <= hd; d += VEC_PV_D * 16)
                    value_tile(b, dtype, s + r * CPU_KEY_BLOCK, keep + r, 1, VEC_PV_D, d, VEC_PV_D * 16, o + r * (size_t)hd);
                for (; d < hd; d += 16)
                    value_tile(b, dtype, s + r * CPU_KEY_BLOCK, keep + r, 1, 1, d, hd - d, o + r * (size_t)hd);
            }
        }
    }
}

static INLINE void attn_typed(const struct attn_block *b, uint32_t dtype)
{
    unsigned i = 0;
    for (; i + 4 <= b->n_q; i += 4)
        attn_vectors(b, dtype, i, 4);
    if (i + 2 <= b->n_q) {
        attn_vectors(b, dtype, i, 2);
        i += 2;
    }
    if (i < b->n_q)
        attn_vectors(b, dtype, i, 1);
}

static void FAST(attn)(const struct attn_block *b)
{
    if (b->dtype == ARLE_BF16)
        attn_typed(b, ARLE_BF16);
    else
        attn_typed(b, ARLE_F32);
}

static void FAST(attn_finish)(int64_t n, const float *o, float l, const void *gate, void *out, uint32_t dtype)
{
    vf inv = vf_set1(1.0f / l);
    for (int64_t i = 0; i < n; i += 16) {
        vf v = vf_mul(get16(o, ARLE_F32, i, n - i), inv);
        if (gate != NULL)
            v = vf_mul(v, vf_sigmoid(get16(gate, dtype, i, n - i)));
        put16(out, dtype, i, n - i, v);
    }
}

static void FAST(dequant)(const void *codes, const void *scales, uint32_t kv_dtype, unsigned head_dim, float *out)
{
    float s;
    if (kv_dtype == ARLE_I4G) {
        for (unsigned i = 0; i < head_dim; i += 16) {
            uint16_t h;
            memcpy(&h, (const char *)scales + i / 32 * 2, 2);
            __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)((const char *)codes + i / 2)), low = _mm_set1_epi8(15);
            __m128i c = _mm_unpacklo_epi8(_mm_and_si128(b, low), _mm_and_si128(_mm_srli_epi16(b, 4), low));
            vf_store(out + i, vf_mul(vf_bytes(_mm_sub_epi8(c, _mm_set1_epi8(8))), vf_set1(f16_to_f32(h))));
        }
        return;
    }
    memcpy(&s, scales, 4);
    unsigned i = 0;
    for (; i + 16 <= head_dim; i += 16) {
        const char *p = (const char *)codes + i;
        vf_store(out + i, vf_mul(kv_dtype == ARLE_I8 ? vf_loadi8(p) : vf_loadf8(p), vf_set1(s)));
    }
    for (; i < head_dim; i++)
        out[i] = (kv_dtype == ARLE_I8 ? (float)((const int8_t *)codes)[i] : e4m3_to_f32(((const uint8_t *)codes)[i])) * s;
}

/* ---- gated delta net ------------------------------------------------------------------------------------------------ */

static void FAST(conv)(const void *const u[4], const float *w, int64_t n, uint32_t dtype, float *y)
{
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) {
        vf taps[4], s;
        vf_load4(w + c * 4, taps);
        s = vf_mul(taps[0], get16(u[0], dtype, c, 16));
        s = vf_fma(taps[1], get16(u[1], dtype, c, 16), s);
        s = vf_fma(taps[2], get16(u[2], dtype, c, 16), s);
        s = vf_fma(taps[3], get16(u[3], dtype, c, 16), s);
        vf_store(y + c, round_act(dtype, vf_silu(s)));
    }
    for (; c < n; c++) {
        float s = 0;
        for (int i = 0; i < 4; i++)
            s += w[c * 4 + i] * act_get(u[i], dtype, c);
        y[c] = act_round(dtype, silu_f32(s));
    }
}

/*
 * nv vectors of columns over all tokens. S is kept undecayed between tokens: with m0 = S^T k and o0 = S^T q of the old S,
 * d = beta (v - e^g m0) and o = e^g o0 + (k . q) d, and the update S = e^g S + k d^T is made in the same pass over S that
 * takes the products with the next token's k and q.
 */
static INLINE void gdn_columns(const struct gdn_slice *a, unsigned nv, unsigned c, int64_t n)
{
    vf m[VEC_GDN], o[VEC_GDN], d[VEC_GDN];
    float *state = a->s + c;
    UNROLL for (unsigned j = 0; j < nv; j++)
        m[j] = o[j] = vf_zero();
    for (unsigned i = 0; i < a->dk; i++) {
        vf k = vf_set1(a->k[i]), q = vf_set1(a->q[i]);
        UNROLL for (unsigned j = 0; j < nv; j++) {
            vf s = get16(state + i * a->ld_s, ARLE_F32, j * 16, n - j * 16);
            m[j] = vf_fma(k, s, m[j]);
            o[j] = vf_fma(q, s, o[j]);
        }
    }
    for (unsigned t = 0; t < a->n_tokens; t++) {
        const float *g = a->gates + t * a->ld_gates, *k = a->k + t * a->ld_qkv;
        const float *v = a->v + t * a->ld_qkv + c;
        const float *k1 = k + a->ld_qkv, *q1 = a->q + (t + 1) * a->ld_qkv;
        float *out = a->o + t * a->ld_o + c;
        vf eg = vf_set1(g[0]), beta = vf_set1(g[1]), kq = vf_set1(g[2]);
        UNROLL for (unsigned j = 0; j < nv; j++) {
            d[j] = vf_mul(beta, vf_fnma(eg, m[j], get16(v, ARLE_F32, j * 16, n - j * 16)));
            put16(out, ARLE_F32, j * 16, n - j * 16, vf_fma(kq, d[j], vf_mul(eg, o[j])));
            m[j] = o[j] = vf_zero();
        }
        bool last = t + 1 == a->n_tokens;
        for (unsigned i = 0; i < a->dk; i++) {
            vf ki = vf_set1(k[i]), kn = last ? vf_zero() : vf_set1(k1[i]), qn = last ? vf_zero() : vf_set1(q1[i]);
            UNROLL for (unsigned j = 0; j < nv; j++) {
                float *p = state + i * a->ld_s;
                vf s = vf_fma(ki, d[j], vf_mul(eg, get16(p, ARLE_F32, j * 16, n - j * 16)));
                put16(p, ARLE_F32, j * 16, n - j * 16, s);
                m[j] = vf_fma(kn, s, m[j]);
                o[j] = vf_fma(qn, s, o[j]);
            }
        }
    }
}

static void FAST(gdn)(const struct gdn_slice *a)
{
    unsigned c = 0;
    for (; c + VEC_GDN * 16 <= a->cols; c += VEC_GDN * 16)
        gdn_columns(a, VEC_GDN, c, VEC_GDN * 16);
    for (; c < a->cols; c += 16)
        gdn_columns(a, 1, c, a->cols - c);
}

/* ---- latent attention, compressors, packed weights ------------------------------------------------------------------- */

static INLINE void scores_typed(const struct attn_block *b, uint32_t dtype, unsigned first, unsigned n_q, float *s)
{
    unsigned n_k = VEC_ACC / n_q;
    for (unsigned j = 0; j < b->n_keys; j += n_k) {
        const void *keys[VEC_ACC];
        for (unsigned i = 0; i < n_k; i++)
            keys[i] = b->k[j + i < b->n_keys ? j + i : b->n_keys - 1];
        score_tile(b, dtype, b->q + (size_t)first * b->head_dim, n_q, keys, s + first * CPU_KEY_BLOCK + j);
    }
}

static INLINE void scores_all(const struct attn_block *b, uint32_t dtype, float *s)
{
    unsigned i = 0;
    for (; i + 4 <= b->n_q; i += 4)
        scores_typed(b, dtype, i, 4, s);
    for (; i < b->n_q; i++)
        scores_typed(b, dtype, i, 1, s);
}

static void FAST(scores)(const struct attn_block *b, float *s)
{
    if (b->dtype == ARLE_BF16)
        scores_all(b, ARLE_BF16, s);
    else
        scores_all(b, ARLE_F32, s);
}

static INLINE void weigh_typed(const struct attn_block *b, uint32_t dtype, const float *p)
{
    static const float keep[VEC_PV_Q] = { [0 ... VEC_PV_Q - 1] = 1.0f };
    int64_t hd = b->head_dim, d;
    for (unsigned i = 0; i < b->n_q;) {
        float *o = b->o + i * (size_t)hd;
        const float *pi = p + i * CPU_KEY_BLOCK;
        if (b->n_q - i >= VEC_PV_Q) {
            for (d = 0; d + VEC_PV_D * 16 <= hd; d += VEC_PV_D * 16)
                value_tile(b, dtype, pi, keep, VEC_PV_Q, VEC_PV_D, d, VEC_PV_D * 16, o);
            for (; d < hd; d += 16)
                value_tile(b, dtype, pi, keep, VEC_PV_Q, 1, d, hd - d, o);
            i += VEC_PV_Q;
        } else {
            for (d = 0; d + VEC_PV_D * 16 <= hd; d += VEC_PV_D * 16)
                value_tile(b, dtype, pi, keep, 1, VEC_PV_D, d, VEC_PV_D * 16, o);
            for (; d < hd; d += 16)
                value_tile(b, dtype, pi, keep, 1, 1, d, hd - d, o);
            i++;
        }
    }
}

static void FAST(weigh)(const struct attn_block *b, const float *p)
{
    if (b->dtype == ARLE_BF16)
        weigh_typed(b, ARLE_BF16, p);
    else
        weigh_typed(b, ARLE_F32, p);
}

static INLINE vf pool_gate(const struct pool_rows *p, unsigned r, int64_t c, int64_t n)
{
    vf g = get16(p->g[r], ARLE_F32, c, n);
    return p->ape[r] != NULL ? vf_add(g, get16(p->ape[r], ARLE_F32, c, n)) : g;
}

static void FAST(pool)(const struct pool_rows *p, float *out)
{
    for (int64_t c = 0; c < p->n; c += 16) {
        int64_t n = p->n - c;
        vf top = vf_set1(-INFINITY), den = vf_zero(), num = vf_zero();
        for (unsigned r = 0; r < p->n_rows; r++)
            top = vf_max(top, pool_gate(p, r, c, n));
        for (unsigned r = 0; r < p->n_rows; r++) {
            vf e = vf_exp(vf_sub(pool_gate(p, r, c, n), top));
            den = vf_add(den, e);
            num = vf_fma(e, get16(p->kv[r], ARLE_F32, c, n), num);
        }
        put16(out, ARLE_F32, c, n, vf_div(num, den));
    }
}

static void FAST(index_sum)(unsigned n_heads, const float *s, const float *w, bool round, float *out)
{
    uint32_t dtype = round ? ARLE_BF16 : ARLE_F32;
    for (unsigned j = 0; j < CPU_KEY_BLOCK; j += 16) {
        vf sum = vf_zero();
        for (unsigned h = 0; h < n_heads; h++) {
            vf v = vf_max(round_act(dtype, vf_load(s + h * CPU_KEY_BLOCK + j)), vf_zero());
            sum = vf_add(sum, round_act(dtype, vf_mul(v, vf_set1(w[h]))));
        }
        vf_store(out + j, round_act(dtype, sum));
    }
}

static void FAST(widen)(const uint8_t *codes, const uint8_t *scales, int64_t n_groups, uint16_t *out)
{
    for (int64_t g = 0; g < n_groups; g++, codes += 16 * CPU_BLOCK, scales += CPU_BLOCK, out += 32 * CPU_BLOCK) {
        bool plain = true;              /* every product is a normal bf16 */
        for (int c = 0; c < CPU_BLOCK; c++)
            plain &= scales[c] >= 2 && scales[c] <= 251;
        if (!plain) {
            kernels_ref.widen(codes, scales, 1, out);
            continue;
        }
        vscale sc = vf_fp4_scale(scales);
        for (int i = 0; i < 16; i++)
            vf_fp4_row(codes + i * CPU_BLOCK, sc, out + i * CPU_BLOCK * 2);
    }
}

/* ---- ceiling -------------------------------------------------------------------------------------------------------- */

/* By how much the sums of all lanes have grown, or NaN when they disagree. */
static INLINE float peak_end(const vf *acc, unsigned n, const float *start)
{
    vf low = vf_sub(acc[0], vf_load(start)), high = low;
    UNROLL for (unsigned i = 1; i < n; i++) {
        vf grown = vf_sub(acc[i], vf_load(start + 16 * i));
        low = vf_min(low, grown);
        high = vf_max(high, grown);
    }
    float top = vf_hmax(high), bottom = -vf_hmax(vf_sub(vf_zero(), low));
    return top == bottom ? top : NAN;
}

/* As many chains as a full tile of a matrix product has registers for: 12, and 8 keep two units of latency 4 busy. */
static float FAST(peak)(int64_t rounds, const float *start)
{
    vf acc[VEC_ROWS], one = vf_set1(start[1]);
    UNROLL for (unsigned i = 0; i < VEC_ROWS; i++)
        acc[i] = vf_load(start + 16 * i);
    for (int64_t k = 0; k < rounds; k++)
        UNROLL for (unsigned i = 0; i < VEC_ROWS; i++)
            acc[i] = vf_fma(one, one, acc[i]);
    return peak_end(acc, VEC_ROWS, start);
}

#define FAST_PEAK .peak = FAST(peak), .peak_flop = VEC_ROWS * 16 * 2, .peak_step = 1
#define FAST_TABLE \
    .max_rows = VEC_ROWS, \
    .tile_blocks = { 0, VEC_BLOCKS(1), VEC_BLOCKS(2), VEC_BLOCKS(3), VEC_BLOCKS(4), VEC_BLOCKS(5), VEC_BLOCKS(6), VEC_BLOCKS(7), \
                     VEC_BLOCKS(8), VEC_BLOCKS(9), VEC_BLOCKS(10), VEC_BLOCKS(11), VEC_BLOCKS(12) }, \
    .gemm_f32_wbf16 = FAST(gemm_f32_wbf16), .gemm_f32_wf32 = FAST(gemm_f32_wf32), .store_row = FAST(store_row), \
    .silu_mul = FAST(silu_mul), .to_f32 = FAST(to_f32), .rmsnorm = FAST(rmsnorm), .axpy = FAST(axpy), .dot = FAST(dot), \
    .sincos = FAST(sincos), .rope = FAST(rope), .attn = FAST(attn), .attn_finish = FAST(attn_finish), .dequant = FAST(dequant), \
    .conv = FAST(conv), .l2norm = FAST(l2norm), .gdn = FAST(gdn), .gated_norm = FAST(gated_norm), .max = FAST(max), \
    .sum_exp = FAST(sum_exp), .exps = FAST(exps), .scores = FAST(scores), .weigh = FAST(weigh), .pool = FAST(pool), \
    .index_sum = FAST(index_sum), .widen = FAST(widen)
