/*
 * The ops of latent attention and hyper-connections against double-precision loops written from the formulas in
 * <arle/ops.h>, and the properties that the formulas imply. Runs on the backend named by ARLE_TEST_BACKEND (default: cpu).
 */
#include "config/config.h"
#include "plugin/registry.h"
#include "tap.h"

#include <arle/ops.h>

static const struct arle_backend_api *be;
static const struct arle_ops *ops;
static struct arle_device *dev;
static struct arle_stream *st;
static uint64_t rng = 1;
static void *kept[1024];               /* freed at the end */
static size_t n_kept;

static float uniform(void)
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(rng >> 40) * 0x1p-23 - 1);
}

static void *device_mem(size_t bytes)
{
    void *p = NULL;
    struct arle_err err;
    if (n_kept == sizeof kept / sizeof kept[0] || be->mem.alloc(dev, ARLE_MEM_DEVICE, bytes, &p, &err) < 0)
        abort();
    return kept[n_kept++] = p;
}

static float *floats(size_t n)
{
    float *host = malloc(n * 4), *p = device_mem(n * 4);
    struct arle_err err;
    for (size_t i = 0; i < n; i++)
        host[i] = uniform();
    be->mem.copy(dev, st, p, host, n * 4, ARLE_COPY_H2D);
    be->mem.stream_sync(dev, st, &err);
    free(host);
    return p;
}

static int32_t *ints(const int32_t *v, size_t n)
{
    struct arle_err err;
    int32_t *p = device_mem(n * 4);
    be->mem.copy(dev, st, p, v, n * 4, ARLE_COPY_H2D);
    be->mem.stream_sync(dev, st, &err);
    return p;
}

static float *host_of(const float *p, size_t n)
{
    struct arle_err err;
    float *h = malloc(n * 4);
    be->mem.copy(dev, st, h, p, n * 4, ARLE_COPY_D2H);
    be->mem.stream_sync(dev, st, &err);
    return h;
}

static double worst(const float *got, const double *want, size_t n)
{
    double w = 0;
    for (size_t i = 0; i < n; i++)
        w = fmax(w, fabs(got[i] - want[i]));
    return w;
}

/* ---- hyper-connections ---- */

enum { S = 4, D = 40, T = 3 };

static void mixing(const float *x, const float *fn, const float *base, const float *scale, double *pre, double *post, double A[S][S])
{
    double sq = 0, mix[(2 + S) * S];
    for (int i = 0; i < S * D; i++)
        sq += (double)x[i] * x[i];
    double r = 1 / sqrt(sq / (S * D) + 1e-6);
    for (int o = 0; o < (2 + S) * S; o++) {
        mix[o] = 0;
        for (int i = 0; i < S * D; i++)
            mix[o] += (double)fn[o * S * D + i] * x[i];
        mix[o] *= r;
    }
    for (int j = 0; j < S; j++) {
        pre[j] = 1 / (1 + exp(-(mix[j] * scale[0] + base[j]))) + 1e-6;
        post[j] = 2 / (1 + exp(-(mix[S + j] * scale[1] + base[S + j])));
        double sum = 0;
        for (int k = 0; k < S; k++)
            sum += A[j][k] = exp(mix[2 * S + S * j + k] * scale[2] + base[2 * S + S * j + k]);
        for (int k = 0; k < S; k++)
            A[j][k] = A[j][k] / sum + 1e-6;
    }
    for (int it = 0; it < 20; it++)
        for (int pass = it == 0; pass < 2; pass++)
            for (int a = 0; a < S; a++) {
                double sum = 1e-6;
                for (int b = 0; b < S; b++)
                    sum += pass ? A[b][a] : A[a][b];
                for (int b = 0; b < S; b++)
                    *(pass ? &A[b][a] : &A[a][b]) /= sum;
            }
}

static void hyper_connection_follows_its_formula(void)
{
    float *x = floats(T * S * D), *fn = floats((2 + S) * S * S * D), *base = floats((2 + S) * S), *scale = floats(3), *f = floats(T * D);
    float *u = device_mem(T * D * 4), *coef = device_mem(T * (S + S * S) * 4);
    float *hx = host_of(x, T * S * D), *hfn = host_of(fn, (2 + S) * S * S * D), *hb = host_of(base, (2 + S) * S), *hs = host_of(scale, 3);
    float *hf = host_of(f, T * D);
    const struct arle_hc_pre_args a = { .dtype = ARLE_F32, .n_tokens = T, .dim = D, .streams = S, .iters = 20, .norm_eps = 1e-6f,
                                        .eps = 1e-6f, .x = x, .fn = fn, .base = base, .scale = scale, .u = u, .coef = coef };
    EXPECT_EQ(ops->hc_pre(dev, st, &a), 0);
    const struct arle_hc_post_args p = { .dtype = ARLE_F32, .n_tokens = T, .dim = D, .streams = S, .x = x, .f = f, .coef = coef };
    EXPECT_EQ(ops->hc_post(dev, st, &p), 0);
    float *gu = host_of(u, T * D), *gc = host_of(coef, T * (S + S * S)), *gx = host_of(x, T * S * D);
    for (int t = 0; t < T; t++) {
        double pre[S], post[S], A[S][S], col;
        mixing(hx + t * S * D, hfn, hb, hs, pre, post, A);
        EXPECT(worst(gc + t * (S + S * S), post, S) < 1e-5);
        EXPECT(worst(gc + t * (S + S * S) + S, &A[0][0], S * S) < 1e-5);
        for (int k = 0; k < S; k++) {
            col = 0;
            for (int j = 0; j < S; j++)
                col += gc[t * (S + S * S) + S + j * S + k];
            EXPECT_NEAR(col, 1, 4e-6);          /* the last pass is over columns */
        }
        for (int i = 0; i < D; i++) {
            double want = 0;
            for (int j = 0; j < S; j++)
                want += pre[j] * hx[(t * S + j) * D + i];
            EXPECT_NEAR(gu[t * D + i], want, 1e-5);
            for (int k = 0; k < S; k++) {       /* A is used transposed: source j, destination k */
                want = post[k] * hf[t * D + i];
                for (int j = 0; j < S; j++)
                    want += A[j][k] * hx[(t * S + j) * D + i];
                EXPECT_NEAR(gx[(t * S + k) * D + i], want, 2e-5);
            }
        }
    }
    free(hx); free(hfn); free(hb); free(hs); free(hf); free(gu); free(gc); free(gx);
}

/* ---- one sequence of N tokens with page table, for the cached ops ---- */

enum { N = 61, PAGE = 16, DIM = 32, ROT = 8 };
static const float freq[ROT / 2] = { 1.0f, 0.5f, 0.1f, 0.01f };
static float *dfreq;

static struct arle_batch one_sequence(int from, int n)
{
    int32_t v[4 * N] = { 0 }, cu[2] = { 0, n }, slot = 1, ctx = from + n, table[8] = { 5, 2, 7, 1, 3, 4, 6, 8 };
    for (int i = 0; i < n; i++)
        v[i] = from + i;
    static const int32_t zeros[N];
    return (struct arle_batch){ .struct_size = sizeof(struct arle_batch), .n_tokens = (uint32_t)n, .n_seqs = 1, .max_new = (uint32_t)n,
        .max_ctx = (uint32_t)(from + n), .page_tokens = PAGE, .table_stride = 8, .pos = ints(v, (size_t)n), .seq_of = ints(zeros, (size_t)n),
        .cu = ints(cu, 2), .slot = ints(&slot, 1), .ctx_len = ints(&ctx, 1), .block_table = ints(table, 8) };
}

static const int page_of[8] = { 5, 2, 7, 1, 3, 4, 6, 8 };

static void rotate(double *x, int pos, int sign)
{
    for (int j = 0; j < ROT / 2; j++) {
        double t = (double)((float)pos * freq[j]) * sign, a = x[2 * j], b = x[2 * j + 1];
        x[2 * j] = a * cos(t) - b * sin(t);
        x[2 * j + 1] = a * sin(t) + b * cos(t);
    }
}

static void pooled(const float *proj, int width, const float *ape, const float *norm, int ratio, bool overlap, int w, double *out)
{
    double sq = 0;
    for (int i = 0; i < DIM; i++) {
        double den = 0, num = 0;
        for (int r = overlap && w > 0 ? -ratio : 0; r < ratio; r++) {
            int t = w * ratio + r, col = overlap && r >= 0 ? DIM + i : i;
            double e = exp((double)proj[t * 2 * width + width + col] + ape[(t % ratio) * width + col]);
            den += e;
            num += e * proj[t * 2 * width + col];
        }
        out[i] = num / den;
        sq += out[i] * out[i];
    }
    for (int i = 0; i < DIM; i++)
        out[i] = out[i] / sqrt(sq / DIM + 1e-6) * norm[i];
    rotate(out + DIM - ROT, w * ratio, 1);
}

static void compressor(int ratio, bool overlap)
{
    int width = (overlap ? 2 : 1) * DIM;
    float *proj = floats((size_t)N * 2 * (size_t)width), *ape = floats((size_t)ratio * (size_t)width), *norm = floats(DIM);
    float *record = device_mem(2 * 4 * (size_t)ratio * 2 * (size_t)width * 4), *pages = device_mem(9 * PAGE * DIM * 4);
    float *hp = host_of(proj, (size_t)N * 2 * (size_t)width), *ha = host_of(ape, (size_t)ratio * (size_t)width), *hn = host_of(norm, DIM);
    for (int from = 0; from < N; from += 13) {              /* cuts inside groups */
        int n = N - from < 13 ? N - from : 13;
        struct arle_batch b = one_sequence(from, n);
        const struct arle_compress_args a = { .dtype = ARLE_F32, .dim = DIM, .ratio = (uint32_t)ratio, .overlap = overlap, .rot_dim = ROT,
            .eps = 1e-6f, .batch = &b, .proj = proj + from * 2 * width, .ld_proj = 2 * width, .ape = ape, .norm_w = norm,
            .inv_freq = dfreq, .record = { record, 4 * (size_t)ratio * (size_t)width * 4, 0 },
            .out = { pages, PAGE * DIM * 4, 0, DIM * 4, ARLE_F32 } };
        EXPECT_EQ(ops->compress(dev, st, &a), 0);
    }
    float *got = host_of(pages, 9 * PAGE * DIM);
    for (int w = 0; w < N / ratio; w++) {
        double want[DIM];
        pooled(hp, width, ha, hn, ratio, overlap, w, want);
        const float *e = got + (page_of[w * ratio / PAGE] * PAGE + w % (PAGE / ratio)) * DIM;
        EXPECT(worst(e, want, DIM) < 1e-5);
    }
    free(hp); free(ha); free(hn); free(got);
}

static void compressor_pools_own_group(void) { compressor(8, false); }
static void compressor_overlaps_the_group_before(void) { compressor(4, true); }

/* ---- attention ---- */

static void attention(int ratio, bool indexed, float sink_value)
{
    enum { H = 3, W = 12, K = 4 };
    float *q = floats(N * H * DIM), *kv = floats(N * DIM), *pages = floats(9 * PAGE * DIM), *ring = device_mem(2 * W * DIM * 4);
    float *out = device_mem(N * H * DIM * 4), *sink = floats(H), hs[H];
    struct arle_err err;
    for (int h = 0; h < H; h++)
        hs[h] = sink_value;
    be->mem.copy(dev, st, sink, hs, sizeof hs, ARLE_COPY_H2D);
    be->mem.stream_sync(dev, st, &err);
    int32_t sel[N * K], n_sel[N];
    for (int t = 0; t < N; t++) {
        int visible = (t + 1) / ratio;
        n_sel[t] = visible < K ? visible : K;
        for (int i = 0; i < n_sel[t]; i++)
            sel[t * K + i] = visible <= K ? i : i * visible / K;
    }
    int32_t *dsel = ints(sel, N * K), *dn = ints(n_sel, N);
    for (int from = 0; from < N; from += 17) {
        int n = N - from < 17 ? N - from : 17;
        struct arle_batch b = one_sequence(from, n);
        const struct arle_attn_latent_args a = { .dtype = ARLE_F32, .n_heads = H, .dim = DIM, .window = W, .ratio = (uint32_t)ratio,
            .topk = K, .rot_dim = ROT, .scale = 0.3f, .batch = &b, .q = q + from * H * DIM, .ld_q = H * DIM, .kv_new = kv + from * DIM,
            .ld_kv = DIM, .ring = { ring, W * DIM * 4, 0 }, .entries = { pages, PAGE * DIM * 4, 0, DIM * 4, ARLE_F32 },
            .sel = indexed ? dsel + from * K : NULL, .n_sel = dn + from, .sink = sink, .inv_freq = dfreq, .out = out + from * H * DIM,
            .ld_out = H * DIM };
        EXPECT_EQ(ops->attn_latent(dev, st, &a), 0);
        const struct arle_window_store_args w = { .dtype = ARLE_F32, .dim = DIM, .window = W, .batch = &b, .x = kv + from * DIM,
                                                  .ld_x = DIM, .ring = a.ring };
        EXPECT_EQ(ops->window_store(dev, st, &w), 0);
    }
    float *hq = host_of(q, N * H * DIM), *hk = host_of(kv, N * DIM), *hp = host_of(pages, 9 * PAGE * DIM), *got = host_of(out, N * H * DIM);
    for (int t = 0; t < N; t++) {
        const float *key[N + W];
        int n = 0;
        for (int j = t - W + 1 < 0 ? 0 : t - W + 1; j <= t; j++)
            key[n++] = hk + j * DIM;
        for (int i = 0; i < (indexed ? n_sel[t] : (t + 1) / ratio); i++) {
            int c = indexed ? sel[t * K + i] : i;
            key[n++] = hp + (page_of[c * ratio / PAGE] * PAGE + c % (PAGE / ratio)) * DIM;
        }
        for (int h = 0; h < H; h++) {
            double den = exp(sink_value), o[DIM] = { 0 };
            for (int j = 0; j < n; j++) {
                double s = 0;
                for (int i = 0; i < DIM; i++)
                    s += (double)hq[(t * H + h) * DIM + i] * key[j][i];
                double e = exp(s * 0.3);
                den += e;
                for (int i = 0; i < DIM; i++)
                    o[i] += e * key[j][i];
            }
            for (int i = 0; i < DIM; i++)
                o[i] /= den;
            rotate(o + DIM - ROT, t, -1);
            EXPECT(worst(got + (t * H + h) * DIM, o, DIM) < 2e-5);
        }
    }
    free(hq); free(hk); free(hp); free(got);
}

static void attention_over_window_and_all_entries(void) { attention(4, false, 0.7f); }
static void attention_over_chosen_entries(void) { attention(4, true, -0.4f); }
static void sink_of_minus_infinity_is_plain_softmax(void) { attention(8, false, -1e30f); }

/* ---- indexer ---- */

static void indexer_keeps_the_best(void)
{
    enum { H = 2, K = 5 };
    float *q = floats(N * H * DIM), *wgt = floats(N * H), *pages = floats(9 * PAGE * DIM);
    int32_t *sel = device_mem(N * K * 4), *n_sel = device_mem(N * 4);
    struct arle_batch b = one_sequence(0, N);
    const struct arle_index_select_args a = { .dtype = ARLE_F32, .n_heads = H, .dim = DIM, .ratio = 4, .topk = K, .scale = 0.125f,
        .batch = &b, .q = q, .ld_q = H * DIM, .weight = wgt, .ld_weight = H, .keys = { pages, PAGE * DIM * 4, 0, DIM * 4, ARLE_F32 },
        .sel = sel, .n_sel = n_sel };
    EXPECT_EQ(ops->index_select(dev, st, &a), 0);
    float *hq = host_of(q, N * H * DIM), *hw = host_of(wgt, N * H), *hp = host_of(pages, 9 * PAGE * DIM);
    int32_t *hs = (int32_t *)(void *)host_of((float *)(void *)sel, N * K), *hn = (int32_t *)(void *)host_of((float *)(void *)n_sel, N);
    for (int t = 0; t < N; t++) {
        int n = (t + 1) / 4;
        double score[N];
        EXPECT_EQ(hn[t], n < K ? n : K);
        for (int c = 0; c < n; c++) {
            const float *key = hp + (page_of[c * 4 / PAGE] * PAGE + c % (PAGE / 4)) * DIM;
            score[c] = 0;
            for (int h = 0; h < H; h++) {
                double dot = 0;
                for (int i = 0; i < DIM; i++)
                    dot += (double)hq[(t * H + h) * DIM + i] * key[i];
                score[c] += fmax(dot, 0) * hw[t * H + h] * 0.125;
            }
        }
        double least = INFINITY;
        bool in[N] = { false };
        for (int i = 0; i < hn[t]; i++) {
            EXPECT(i == 0 || hs[t * K + i] > hs[t * K + i - 1]);
            in[hs[t * K + i]] = true;
            least = fmin(least, score[hs[t * K + i]]);
        }
        for (int c = 0; c < n; c++)
            EXPECT(in[c] || score[c] <= least + 1e-6);
    }
    free(hq); free(hw); free(hp); free(hs); free(hn);
}

/* ---- rotation and simulated quantisation ---- */

static float quantised(float x, uint32_t quant)
{
    float *p = device_mem(DIM * 4), v[DIM] = { 0 };
    int32_t zero = 0;
    struct arle_err err;
    v[0] = x;
    be->mem.copy(dev, st, p, v, sizeof v, ARLE_COPY_H2D);
    be->mem.stream_sync(dev, st, &err);
    const struct arle_head_rope_args a = { .dtype = ARLE_F32, .n_tokens = 1, .n_heads = 1, .head_dim = DIM, .rot_dim = ROT, .quant = quant,
                                           .x = p, .ld_x = DIM, .inv_freq = dfreq, .pos = ints(&zero, 1) };
    EXPECT_EQ(ops->head_rope(dev, st, &a), 0);
    float *h = host_of(p, DIM), r = h[0];
    free(h);
    return r;
}

static void rotation_and_its_inverse_cancel(void)
{
    float *x = floats(N * 2 * DIM), *was = host_of(x, N * 2 * DIM);
    struct arle_batch b = one_sequence(0, N);
    for (uint32_t inverse = 0; inverse < 2; inverse++) {
        const struct arle_head_rope_args a = { .dtype = ARLE_F32, .n_tokens = N, .n_heads = 2, .head_dim = DIM, .rot_dim = ROT,
                                               .inverse = inverse, .x = x, .ld_x = 2 * DIM, .inv_freq = dfreq, .pos = b.pos };
        EXPECT_EQ(ops->head_rope(dev, st, &a), 0);
        float *now = host_of(x, N * 2 * DIM);
        double diff = 0;
        for (int i = 0; i < N * 2 * DIM; i++)
            diff = fmax(diff, fabs((double)now[i] - was[i]));
        EXPECT(inverse ? diff < 1e-6 : diff > 0.1);
        free(now);
    }
    free(was);
}

/* One value alone in its block: the scale is that of its own magnitude. */
static void fp8_grid_and_scale_edges(void)
{
    EXPECT_NEAR(quantised(448, ARLE_FQ_FP8), 448, 0);       /* scale 1 */
    EXPECT_NEAR(quantised(450, ARLE_FQ_FP8), 448, 0);       /* scale 2: 225 rounds to 224 */
    EXPECT_NEAR(quantised(1, ARLE_FQ_FP8), 1, 0);           /* scale 2^-8 */
    EXPECT_NEAR(quantised(0, ARLE_FQ_FP8), 0, 0);
    EXPECT_NEAR(quantised(1.0625f, ARLE_FQ_FP8), 1, 0);     /* half way between 1 and 1.125: to even */
    EXPECT_NEAR(quantised(1.1875f, ARLE_FQ_FP8), 1.25, 0);
    EXPECT_NEAR(quantised(-0.3f, ARLE_FQ_FP8), -0.3125, 0);
}

static void fp4_after_hadamard_spreads_one_value(void)
{
    /* H e_0 / sqrt(32) is 1/sqrt(32) everywhere; scale 2^ceil(log2(0.17678 / 6)) = 2^-5, 5.657 rounds to 6: 0.1875 */
    EXPECT_NEAR(quantised(1, ARLE_FQ_FP4_HADAMARD), 0.1875, 0);
}

int main(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    char dir[512];
    const char *sets[1] = { dir };
    struct config *cfg = NULL;
    struct registry *reg = NULL;
    const struct plugin_info *p = NULL;
    snprintf(dir, sizeof dir, "plugins.dir=%s", getenv("ARLE_TEST_PLUGINS") ? getenv("ARLE_TEST_PLUGINS") : ".plugins");
    const char *want = getenv("ARLE_TEST_BACKEND");
    if (config_open(&cfg, NULL, sets, 1, &err) < 0 || registry_open(&reg, cfg, 0, &err) < 0 ||
        registry_backend(reg, want ? want : "cpu", &p, &err) < 0) {
        printf("1..0 # SKIP %s\n", err.msg);
        return 0;
    }
    be = p->ops;
    ops = be->ops;
    if (be->open_device(p->ctx, 0, &dev, &err) < 0 || be->mem.stream_create(dev, &st, &err) < 0) {
        printf("1..1\nnot ok 1 - %s\n", err.msg);
        return 1;
    }
    if (!ARLE_HAS(ops, struct arle_ops, attn_latent)) {
        printf("1..0 # SKIP this backend has no latent attention\n");
        return 0;
    }
    dfreq = device_mem(sizeof freq);
    be->mem.copy(dev, st, dfreq, freq, sizeof freq, ARLE_COPY_H2D);
    RUN(hyper_connection_follows_its_formula);
    RUN(compressor_pools_own_group);
    RUN(compressor_overlaps_the_group_before);
    RUN(attention_over_window_and_all_entries);
    RUN(attention_over_chosen_entries);
    RUN(sink_of_minus_infinity_is_plain_softmax);
    RUN(indexer_keeps_the_best);
    RUN(rotation_and_its_inverse_cancel);
    RUN(fp8_grid_and_scale_edges);
    RUN(fp4_after_hadamard_spreads_one_value);
    while (n_kept > 0)
        be->mem.free(dev, ARLE_MEM_DEVICE, kept[--n_kept]);
    be->mem.stream_destroy(dev, st);
    be->close_device(dev);
    registry_close(reg);
    config_close(cfg);
    return tap_done();
}
