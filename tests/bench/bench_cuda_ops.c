/*
 * Speed of backend-cuda's ops at the published 4B shape (hidden 2560, MLP 9216, 16/4 heads of 256, delta net 16/32 heads of 128),
 * with the fraction of the floor: bytes over the read rate, or flop over the matrix rate, both measured in the same run. Each case
 * is a captured graph of several calls on different memory, so that nothing is found in the cache.
 *
 *   bench_cuda_ops backend-cuda.so [key=value ...] [case ...]      (case: prefix of a name)
 */
#include "ops_cases.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct ops_backend b;
static double read_ceiling, flop_ceiling;
static const char *only[16];
static int n_only;

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static bool wanted(const char *name)
{
    for (int i = 0; i < n_only; i++)
        if (strncmp(only[i], name, strlen(only[i])) == 0)
            return true;
    return n_only == 0;
}

static void sync(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    if (b.api->mem.stream_sync(b.dev, b.st, &err) < 0 || b.failed < 0) {
        fprintf(stderr, "bench_cuda_ops: %s %s\n", b.why, err.msg);
        exit(1);
    }
}

/* Times `calls` calls of fn as one graph; bytes and flop are of one call. */
static void measure(const char *name, void (*fn)(int i), int calls, double bytes, double flop)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct arle_graph *g = NULL;
    for (int i = 0; i < calls; i++)
        fn(i);
    sync();
    b.api->graph_begin(b.dev, b.st, &err);
    for (int i = 0; i < calls; i++)
        fn(i);
    if (b.api->graph_end(b.dev, b.st, &g, &err) < 0) {
        fprintf(stderr, "bench_cuda_ops: %s\n", err.msg);
        exit(1);
    }
    double best = 1e9, t0 = now();
    b.api->graph_launch(b.dev, g, b.st);
    sync();
    int reps = (int)(2e-3 / (now() - t0)) + 2;
    for (int r = 0; r < 4; r++) {
        t0 = now();
        for (int i = 0; i < reps; i++)
            b.api->graph_launch(b.dev, g, b.st);
        sync();
        double t = (now() - t0) / reps / calls;
        best = t < best ? t : best;
    }
    double by_bytes = bytes / read_ceiling, by_flop = flop / flop_ceiling, floor = by_bytes > by_flop ? by_bytes : by_flop;
    printf("{\"op\": \"%s\", \"us\": %.2f, \"gb_s\": %.0f, \"tf_s\": %.1f, \"of_floor\": %.3f}\n", name, best * 1e6, bytes / best * 1e-9,
           flop / best * 1e-12, floor / best);
    fflush(stdout);
    b.api->graph_destroy(b.dev, g);
}

static struct arle_weight *random_weight(uint32_t role, int64_t n, int64_t k, uint32_t n_experts)
{
    static uint64_t seed;
    struct arle_tensor t = { .name = "w", .dtype = ARLE_BF16, .n_dims = 2, .dim = { n, k }, .rand_seed = ++seed, .rand_std = 0.02 };
    static struct arle_weight_part p[1024];
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = role, .n_experts = n_experts, .parts = p, .k = k, .name = "w" };
    struct arle_weight *w = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    d.n_parts = role == ARLE_W_GATE_UP || role == ARLE_W_EXPERTS_GATE_UP ? 2 * n_experts : n_experts;
    for (uint32_t i = 0; i < d.n_parts; i++)
        p[i] = (struct arle_weight_part) { .t = &t, .row0 = n / d.n_parts * i, .n_rows = n / d.n_parts, .scale2 = 1 };
    if (b.api->weight_create(b.dev, &d, &w, &err) < 0) {
        fprintf(stderr, "bench_cuda_ops: %s\n", err.msg);
        exit(1);
    }
    b.weight[b.n_weights++] = w;
    return w;
}

static void *random_act(int64_t n, float scale)
{
    static uint64_t seed = 3;
    float *x = malloc((size_t)n * 4);
    for (int64_t i = 0; i < n; i++)
        x[i] = ops_random(&seed) * scale;
    void *d = ops_put_act(&b, ARLE_BF16, x, n, NULL);
    free(x);
    return d;
}

/* Rows of one piece of random values again and again, for inputs too large to make on the host. */
static void *repeated_act(int64_t rows, int64_t width, int64_t piece)
{
    if (rows <= piece)
        return random_act(rows * width, 1);
    char *x = ops_alloc(&b, (size_t)(rows * width) * 2), *one = random_act(piece * width, 1);
    for (int64_t t = 0; t < rows; t += piece)
        b.api->mem.copy(b.dev, b.st, x + t * width * 2, one, (size_t)((t + piece < rows ? piece : rows - t) * width) * 2, ARLE_COPY_D2D);
    return x;
}

static void *random_f32(int64_t n, float scale)
{
    static uint64_t seed = 4;
    float *x = malloc((size_t)n * 4);
    for (int64_t i = 0; i < n; i++)
        x[i] = ops_random(&seed) * scale;
    void *d = ops_put(&b, x, (size_t)n * 4);
    free(x);
    return d;
}

/* Bell-shaped with a deviation of 3, as logits are. */
static void *bell_f32(int64_t n)
{
    static uint64_t seed = 6;
    float *x = malloc((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) {
        x[i] = 0;
        for (int j = 0; j < 12; j++)
            x[i] += ops_random(&seed) * 1.5f;
    }
    void *d = ops_put(&b, x, (size_t)n * 4);
    free(x);
    return d;
}

/* ---- products ---------------------------------------------------------------------------------------------------------------- */

enum { LAYERS = 6 };
static struct arle_weight *ws[LAYERS];
static struct arle_linear_args lin;
static struct arle_norm_linear_args nlin;
static struct arle_gate_up_args gup;

static void call_linear(int i)
{
    lin.w = ws[i % LAYERS];
    OPS_CALL(&b, linear, &lin);
}

static void call_norm_linear(int i)
{
    nlin.w = ws[i % LAYERS];
    OPS_CALL(&b, norm_linear, &nlin);
}

static void call_gate_up(int i)
{
    gup.w = ws[i % LAYERS];
    OPS_CALL(&b, gate_up, &gup);
}

static void bench_products(void)
{
    static const struct { const char *name; int n, k, norm, add, f32; } shapes[] = {
        { "proj_gdn", 12352, 2560, 1, 0, 0 }, { "proj_attn", 10240, 2560, 1, 0, 0 }, { "out", 2560, 4096, 0, 1, 0 },
        { "down", 2560, 9216, 0, 1, 0 }, { "gate_up", 18432, 2560, 2, 0, 0 }, { "head", 248320, 2560, 0, 0, 1 },
    };
    static const int rows[] = { 1, 4, 16, 32, 64, 256, 8192 };
    for (unsigned s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        if (!wanted(shapes[s].name))
            continue;
        int n = shapes[s].n, k = shapes[s].k, n_layers = n > 100000 ? 2 : LAYERS;
        for (int i = 0; i < LAYERS; i++)
            ws[i] = i < n_layers ? random_weight(shapes[s].norm == 2 ? ARLE_W_GATE_UP : n > 100000 ? ARLE_W_EMBED : ARLE_W_LINEAR, n, k, 1) : ws[i % n_layers];
        for (unsigned r = 0; r < sizeof rows / sizeof *rows; r++) {
            int t = rows[r];
            unsigned bufs = b.n_bufs;
            if (n > 100000 && t > 64)
                continue;
            char name[64];
            snprintf(name, sizeof name, "%s %d", shapes[s].name, t);
            void *x = random_act((int64_t)t * k, 1), *y = ops_alloc(&b, (size_t)t * n * (shapes[s].f32 ? 4 : 2)), *w = random_f32(k, 0.1f);
            void *scratch = ops_alloc(&b, (size_t)t * (k + n) * 2);
            lin = (struct arle_linear_args) { .dtype = ARLE_BF16, .out_dtype = shapes[s].f32 ? ARLE_F32 : ARLE_BF16, .n_tokens = (uint32_t)t,
                                              .accumulate = (uint32_t)shapes[s].add, .x = x, .ld_x = k, .y = y, .ld_y = n };
            nlin = (struct arle_norm_linear_args) { .dtype = ARLE_BF16, .out_dtype = ARLE_BF16, .n_tokens = (uint32_t)t, .eps = 1e-6f,
                                                    .w_offset = 1, .x = x, .ld_x = k, .norm_w = w, .y = y, .ld_y = n, .scratch = scratch };
            gup = (struct arle_gate_up_args) { .dtype = ARLE_BF16, .n_tokens = (uint32_t)t, .eps = 1e-6f, .w_offset = 1, .x = x, .ld_x = k,
                                               .norm_w = w, .out = y, .ld_out = n / 2, .scratch = scratch };
            measure(name, shapes[s].norm == 2 ? call_gate_up : shapes[s].norm ? call_norm_linear : call_linear, n_layers * (t > 256 ? 1 : 4),
                    (double)n * k * 2, 2.0 * t * n * k);
            while (b.n_bufs > bufs)
                b.api->mem.free(b.dev, ARLE_MEM_DEVICE, b.buf[--b.n_bufs]);
        }
        ops_release(&b);
    }
}

/* ---- attention and delta net ---------------------------------------------------------------------------------------------------- */

static struct arle_batch batch;
static struct arle_attn_prepare_args prep;
static struct arle_attn_paged_args attn;
static struct arle_gdn_args gdn;
static size_t kv_layer, s_layer;
static char *kv_base, *s_base;

static void make_batch(int rows, int fresh, int ctx)
{
    int T = rows * fresh, stride = (ctx + 15) / 16;
    int32_t *pos = malloc((size_t)T * 4), *seq = malloc((size_t)T * 4), *cu = malloc((size_t)(rows + 1) * 4), *len = malloc((size_t)rows * 4);
    int32_t *slot = malloc((size_t)rows * 4), *table = malloc((size_t)rows * stride * 4);
    for (int s = 0; s < rows; s++) {
        for (int i = 0; i < fresh; i++) {
            pos[s * fresh + i] = ctx - fresh + i;
            seq[s * fresh + i] = s;
        }
        cu[s] = s * fresh;
        len[s] = ctx;
        slot[s] = s;
        for (int i = 0; i < stride; i++)
            table[s * stride + i] = s * stride + i;
    }
    cu[rows] = T;
    batch = (struct arle_batch) { .struct_size = sizeof batch, .n_tokens = (uint32_t)T, .n_seqs = (uint32_t)rows, .n_decode = fresh == 1 ? (uint32_t)rows : 0,
                                  .max_new = (uint32_t)fresh, .max_ctx = (uint32_t)ctx, .page_tokens = 16, .table_stride = (uint32_t)stride,
                                  .pos = ops_put(&b, pos, (size_t)T * 4), .seq_of = ops_put(&b, seq, (size_t)T * 4),
                                  .cu = ops_put(&b, cu, (size_t)(rows + 1) * 4), .ctx_len = ops_put(&b, len, (size_t)rows * 4),
                                  .slot = ops_put(&b, slot, (size_t)rows * 4), .block_table = ops_put(&b, table, (size_t)rows * stride * 4) };
    free(pos);
    free(seq);
    free(cu);
    free(len);
    free(slot);
    free(table);
}

static void call_attn(int i)
{
    attn.kv.base = kv_base + (size_t)i * kv_layer;
    OPS_CALL(&b, attn_paged, &attn);
}

static void call_prepare(int i)
{
    prep.kv.base = kv_base + (size_t)i * kv_layer;
    OPS_CALL(&b, attn_prepare, &prep);
}

static void bench_attention(int n_kv, int rows, int fresh, int ctx)
{
    enum { HD = 256, NQ = 16 };
    char name[64];
    int64_t T = (int64_t)rows * fresh, ld = (2 * NQ + 2 * n_kv) * HD, entry = 2 * n_kv * HD * 2;
    snprintf(name, sizeof name, "attn_%s %d ctx %d kv %d", fresh == 1 ? "decode" : "prefill", rows, ctx, n_kv);
    if (!wanted(name))
        return;
    make_batch(rows, fresh, ctx);
    int layers = (int)(256e6 / ((double)entry * ctx * rows)) + 1;
    layers = layers > 8 ? 8 : layers;
    kv_layer = (size_t)entry * 16 * (size_t)((ctx + 15) / 16) * (size_t)rows;
    kv_base = random_act((int64_t)kv_layer / 2, 1);
    char *one = kv_base;
    kv_base = ops_alloc(&b, kv_layer * (size_t)layers);
    for (int i = 0; i < layers; i++)
        b.api->mem.copy(b.dev, b.st, kv_base + (size_t)i * kv_layer, one, kv_layer, ARLE_COPY_D2D);
    struct arle_paged kv = { kv_base, (size_t)entry * 16, 0, (size_t)entry, ARLE_BF16 };
    void *qkv = random_act(T * ld, 1), *q = random_act(T * NQ * HD, 1), *out = ops_alloc(&b, (size_t)T * NQ * HD * 2), *w = random_f32(HD, 0.1f);
    prep = (struct arle_attn_prepare_args) { .dtype = ARLE_BF16, .n_q = NQ, .n_kv = (uint32_t)n_kv, .head_dim = HD, .rot_dim = 64, .eps = 1e-6f,
        .w_offset = 1, .rope_scale = 1, .batch = &batch, .qkv = qkv, .ld_qkv = ld, .q_head_stride = 2 * HD, .k_off = 2 * NQ * HD,
        .v_off = 2 * NQ * HD + n_kv * HD, .q_norm = w, .k_norm = w, .inv_freq = random_f32(32, 1), .kv = kv, .q_out = q };
    attn = (struct arle_attn_paged_args) { .dtype = ARLE_BF16, .n_q = NQ, .n_kv = (uint32_t)n_kv, .head_dim = HD, .scale = 0.0625f, .batch = &batch,
        .q = q, .kv = kv, .gate_src = qkv, .ld_gate = ld, .gate_off = HD, .gate_head_stride = 2 * HD, .out = out, .ld_out = NQ * HD };
    double flop = 4.0 * HD * NQ * (double)T * (ctx - (fresh - 1) / 2.0);
    if (fresh > 1)
        measure("attn_prepare", call_prepare, layers, (double)T * ld * 2, 0);
    measure(name, call_attn, layers, (double)entry * ctx * rows, flop);
    ops_release(&b);
}

static void call_gdn(int i)
{
    gdn.s_state.base = s_base + (size_t)i * s_layer;
    OPS_CALL(&b, gdn, &gdn);
}

static void bench_gdn(int rows, int fresh)
{
    enum { NK = 16, NV = 32, D = 128 };
    char name[64];
    int64_t T = (int64_t)rows * fresh, conv = (2 * NK + NV) * D, ld = conv + NV * D + 2 * NV;
    snprintf(name, sizeof name, "gdn_%s %d x %d", fresh == 1 ? "decode" : "prefill", rows, fresh);
    if (!wanted(name))
        return;
    make_batch(rows, fresh, fresh);
    int layers = fresh > 1 ? 2 : 8;
    size_t s_bytes = (size_t)NV * D * D * 4;
    s_layer = s_bytes * (size_t)rows;
    s_base = ops_alloc(&b, s_layer * (size_t)layers);
    size_t scratch = (size_t)(T * (conv + NV * (D + 2 * D + 8))) * 4;
    gdn = (struct arle_gdn_args) { .dtype = ARLE_BF16, .n_k = NK, .n_v = NV, .dk = D, .dv = D, .conv_width = 4, .eps = 1e-6f, .batch = &batch,
        .proj = repeated_act(T, ld, 8192), .ld_proj = ld, .z_off = conv, .a_off = conv + NV * D, .b_off = conv + NV * D + NV,
        .conv_w = random_f32(conv * 4, 0.5f), .A_log = random_f32(NV, 1), .dt_bias = random_f32(NV, 1), .norm_w = random_f32(D, 1),
        .conv_state = { ops_alloc(&b, (size_t)rows * 3 * conv * 2), 3 * conv * 2, 0 }, .s_state = { s_base, s_bytes, 0 },
        .out = ops_alloc(&b, (size_t)T * NV * D * 2), .ld_out = NV * D, .scratch = ops_alloc(&b, scratch), .scratch_bytes = scratch };
    double flop = fresh > 1 ? (10.0 * 64 * 128 + 6.0 * 128 * 128 + 2.0 / 3 * 64 * 64) * NV * (double)T : 0;
    measure(name, call_gdn, layers, fresh > 1 ? (double)T * (ld + NV * D) * 2 : 2.0 * (double)s_layer, flop);
    ops_release(&b);
}

/* ---- experts, sampling ------------------------------------------------------------------------------------------------------------ */

static struct arle_moe_experts_args moe;
static struct arle_sample_args smp;
static struct arle_weight *moe_gu[4], *moe_dn[4];

static void call_moe(int i)
{
    moe.gate_up = moe_gu[i % 4];
    moe.down = moe_dn[i % 4];
    OPS_CALL(&b, moe_experts, &moe);
}

static void call_sample(int i)
{
    OPS_CALL(&b, sample, &smp);
}

static void bench_moe(void)
{
    enum { E = 256, K = 8, H = 2048, I = 512 };
    static const int rows[] = { 1, 4, 16, 64, 8192 };
    if (!wanted("moe"))
        return;
    for (int i = 0; i < 4; i++) {
        moe_gu[i] = random_weight(ARLE_W_EXPERTS_GATE_UP, (int64_t)E * 2 * I, H, E);
        moe_dn[i] = random_weight(ARLE_W_EXPERTS, (int64_t)E * H, I, E);
    }
    struct arle_weight *su = random_weight(ARLE_W_GATE_UP, 2 * I, H, 1), *sd = random_weight(ARLE_W_LINEAR, H, I, 1);
    for (unsigned r = 0; r < sizeof rows / sizeof *rows; r++) {
        int t = rows[r];
        char name[64];
        snprintf(name, sizeof name, "moe %d", t);
        uint64_t seed = 77;
        int32_t *ids = malloc((size_t)t * K * 4);
        bool used[E] = { false };
        int distinct = 0;
        for (int i = 0; i < t * K; i++) {
            bool again;
            do {
                ids[i] = (int32_t)((ops_random(&seed) + 1) * 0.5f * E) % E;
                again = false;
                for (int j = i / K * K; j < i; j++)
                    again = again || ids[j] == ids[i];
            } while (again);
            distinct += !used[ids[i]];
            used[ids[i]] = true;
        }
        size_t scratch = (size_t)t * ((K + 1) * (3 * I + H) + H) * 4 + 65536;
        moe = (struct arle_moe_experts_args) { .dtype = ARLE_BF16, .n_tokens = (uint32_t)t, .n_experts = E, .k = K, .accumulate = 1,
            .x = random_act((int64_t)t * H, 1), .ld_x = H, .ids = ops_put(&b, ids, (size_t)t * K * 4), .weights = random_f32((int64_t)t * K, 1),
            .shared_gate_up = su, .shared_down = sd, .shared_gate = random_f32(H, 0.1f), .y = random_act((int64_t)t * H, 1), .ld_y = H,
            .scratch = ops_alloc(&b, scratch), .scratch_bytes = scratch };
        measure(name, call_moe, 4, (double)(distinct + 1) * 3 * H * I * 2, 2.0 * t * (K + 1) * 3 * H * I);
        free(ids);
    }
    ops_release(&b);
}

static void bench_sample(int rows, bool draw)
{
    enum { V = 248320 };
    char name[64];
    snprintf(name, sizeof name, "sample_%s %d", draw ? "draw" : "argmax", rows);
    if (!wanted(name))
        return;
    struct arle_sample_row *r = calloc((size_t)rows, sizeof *r);
    for (int i = 0; i < rows; i++)
        r[i] = (struct arle_sample_row) { .top_p = draw ? 0.9f : 1, .top_k = draw ? 50 : 0, .temperature = draw ? 0.7f : 0, .repetition = 1, .target = -1,
                                          .seed = 3, .counter = (uint64_t)i };
    smp = (struct arle_sample_args) { .n_rows = (uint32_t)rows, .vocab = V, .n_valid = 248077, .logits = bell_f32((int64_t)rows * V), .ld = V,
        .rows = ops_put(&b, r, (size_t)rows * sizeof *r), .ids = ops_alloc(&b, 4096), .logprob = ops_alloc(&b, 4096),
        .target_logprob = ops_alloc(&b, 4096), .top_ids = ops_alloc(&b, 65536), .top_logprobs = ops_alloc(&b, 65536),
        .top_logits = ops_alloc(&b, 4096), .any_draw = draw };
    measure(name, call_sample, 4, (double)rows * V * 4, 0);
    free(r);
    ops_release(&b);
}

int main(int argc, char **argv)
{
    static const char *conf[16];
    static char text[8][64];
    int n_conf = 0;
    struct arle_err err = ARLE_ERR_INIT;
    for (int i = 2; i < argc; i++) {
        char *eq = strchr(argv[i], '=');
        if (eq != NULL && n_conf < 14) {
            snprintf(text[n_conf / 2], sizeof text[0], "%.*s", (int)(eq - argv[i]), argv[i]);
            conf[n_conf] = text[n_conf / 2];
            conf[n_conf + 1] = eq + 1;
            n_conf += 2;
        } else if (n_only < 16) {
            only[n_only++] = argv[i];
        }
    }
    if (argc < 2 || ops_open(&b, argv[1], conf, &err) < 0 || b.api->ceiling(b.dev, &read_ceiling, &flop_ceiling, &err) < 0) {
        fprintf(stderr, "bench_cuda_ops: %s\n", argc < 2 ? "which backend?" : err.msg);
        return 1;
    }
    printf("{\"read_ceiling_gb_s\": %.0f, \"flop_ceiling_tf_s\": %.0f}\n", read_ceiling * 1e-9, flop_ceiling * 1e-12);
    bench_products();
    static const int decode[][2] = { { 1, 512 }, { 1, 4096 }, { 1, 32768 }, { 1, 131072 }, { 16, 2048 }, { 64, 2048 } };
    for (unsigned i = 0; i < sizeof decode / sizeof *decode; i++)
        bench_attention(4, decode[i][0], 1, decode[i][1]);
    bench_attention(2, 16, 1, 2048);
    bench_attention(4, 1, 8192, 8192);
    bench_attention(2, 1, 8192, 8192);
    bench_gdn(1, 1);
    bench_gdn(16, 1);
    bench_gdn(64, 1);
    bench_gdn(1, 512);
    bench_gdn(1, 2048);
    bench_gdn(1, 8192);
    bench_gdn(4, 8192);
    bench_gdn(32, 8192);
    bench_moe();
    bench_sample(1, false);
    bench_sample(16, false);
    bench_sample(64, false);
    bench_sample(1, true);
    bench_sample(16, true);
    ops_close(&b);
    return 0;
}
