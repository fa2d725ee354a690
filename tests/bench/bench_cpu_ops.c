/*
 * Speed of backend-cpu's ops at the shapes of a small published model (hidden 1024, MLP 3584, vocabulary 248320, bf16), as JSON
 * lines: best and median of the runs, and the fraction of the ceiling measured beside it.
 *
 *   bench_cpu_ops [backend-cpu.so [only=WORD] [clock=cpu] [key=value ...]]      only: ops whose name starts with WORD
 *
 * clock=cpu counts processor time, with threads=1 what the op takes on a machine that does nothing else, but for shared caches.
 */
#include "ops_cases.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define HIDDEN 1024
#define MLP 3584
#define VOCAB 248320

static struct ops_backend b;
static double read_ceiling, flop_ceiling;
static uint32_t act = ARLE_BF16;
static const char *only = "";
static clockid_t clock_id = CLOCK_MONOTONIC;

static double now(void)
{
    struct timespec ts;
    clock_gettime(clock_id, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static int ascending(const void *x, const void *y)
{
    double d = *(const double *)x - *(const double *)y;
    return d < 0 ? -1 : d > 0;
}

static void report(const char *what, int rows, double *t, int n, double bytes, double flop)
{
    qsort(t, (size_t)n, sizeof *t, ascending);
    printf("{\"op\": \"%s\", \"rows\": %d, \"runs\": %d, \"best_us\": %.1f, \"median_us\": %.1f", what, rows, n, t[0] * 1e6, t[n / 2] * 1e6);
    if (bytes > 0)
        printf(", \"gb_s\": %.1f, \"of_read_ceiling\": %.3f", bytes / t[0] * 1e-9, bytes / t[0] / read_ceiling);
    if (flop > 0)
        printf(", \"gflop_s\": %.0f, \"of_flop_ceiling\": %.3f", flop / t[0] * 1e-9, flop / t[0] / flop_ceiling);
    printf("}\n");
    fflush(stdout);
}

static struct arle_weight *random_weight(uint32_t role, int64_t n, int64_t k)
{
    struct arle_tensor t = { .name = "w", .dtype = ARLE_BF16, .n_dims = 2, .dim = { n, k }, .rand_seed = 7, .rand_std = 0.02 };
    struct arle_weight_part p[2] = { { .t = &t, .n_rows = n, .scale2 = 1 } };
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = role, .n_experts = 1, .n_parts = 1, .parts = p, .k = k, .name = "w" };
    struct arle_weight *w = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    if (role == ARLE_W_GATE_UP) {
        p[1] = p[0];
        p[0].n_rows = p[1].n_rows = p[1].row0 = n / 2;
        d.n_parts = 2;
    }
    if (b.api->weight_create(b.dev, &d, &w, &err) < 0) {
        fprintf(stderr, "%s\n", err.msg);
        exit(1);
    }
    b.weight[b.n_weights++] = w;
    return w;
}

/* Layers of their own weights, so that a decode pass reads memory and not cache. */
static void bench_linear(const char *what, uint32_t role, int64_t n, int64_t k, int rows, int layers, int runs)
{
    if (strncmp(what, only, strlen(only)) != 0)
        return;
    struct arle_weight *w[64];
    double t[64];
    uint32_t out_dtype = n == VOCAB ? ARLE_F32 : act;
    for (int i = 0; i < layers; i++)
        w[i] = random_weight(role, n, k);
    float *x = calloc((size_t)(rows * k), 4);
    for (int64_t i = 0; i < rows * k; i++)
        x[i] = (float)(i % 13) * 0.1f - 0.6f;
    void *dx = ops_put_act(&b, act, x, rows * k, NULL), *y = ops_alloc(&b, (size_t)(rows * n) * 4);
    for (int r = -1; r < runs; r++) {
        double t0 = now();
        for (int i = 0; i < layers; i++) {
            struct arle_linear_args a = { .dtype = act, .out_dtype = out_dtype, .n_tokens = (uint32_t)rows, .x = dx, .ld_x = k, .w = w[i], .y = y, .ld_y = n };
            struct arle_gate_up_args g = { .dtype = act, .n_tokens = (uint32_t)rows, .x = dx, .ld_x = k, .w = w[i], .out = y, .ld_out = n / 2 };
            if (role == ARLE_W_GATE_UP)
                OPS_CALL(&b, gate_up, &g);
            else
                OPS_CALL(&b, linear, &a);
        }
        if (r >= 0)
            t[r] = (now() - t0) / layers;
    }
    report(what, rows, t, runs, rows < 16 ? (double)n * (double)k * 2 : 0, rows > 1 ? 2.0 * rows * (double)n * (double)k : 0);
    free(x);
    ops_release(&b);
}

static struct arle_batch one_sequence(int ctx, int fresh)
{
    int n = ctx + fresh, pages = (n + 15) / 16;
    int32_t *tmp = calloc((size_t)(n + 16), 4), cu[2] = { 0, fresh }, len = n, slot = 1;
    struct arle_batch ba = { .struct_size = sizeof ba, .n_tokens = (uint32_t)fresh, .n_seqs = 1, .page_tokens = 16, .table_stride = (uint32_t)pages,
                             .max_ctx = (uint32_t)n, .max_new = (uint32_t)fresh };
    ba.seq_of = ops_put(&b, tmp, (size_t)fresh * 4);
    for (int i = 0; i < fresh; i++)
        tmp[i] = ctx + i;
    ba.pos = ops_put(&b, tmp, (size_t)fresh * 4);
    for (int i = 0; i < pages; i++)
        tmp[i] = i + 1;
    ba.block_table = ops_put(&b, tmp, (size_t)pages * 4);
    ba.cu = ops_put(&b, cu, sizeof cu);
    ba.ctx_len = ops_put(&b, &len, 4);
    ba.slot = ops_put(&b, &slot, 4);
    free(tmp);
    return ba;
}

static void bench_attention(int ctx, int fresh, int runs, uint32_t kv_dtype, const char *what)
{
    if (strncmp(what, only, strlen(only)) != 0)
        return;
    enum { NQ = 8, NKV = 2, HD = 256 };
    struct arle_batch ba = one_sequence(ctx, fresh);
    size_t entry = 2 * NKV * arle_kv_vector_bytes(kv_dtype, HD);
    double t[64];
    struct arle_attn_paged_args a = { .dtype = act, .n_q = NQ, .n_kv = NKV, .head_dim = HD, .scale = 0.0625f, .batch = &ba,
                                      .q = ops_alloc(&b, (size_t)fresh * NQ * HD * 4), .kv = { .page_stride = 16 * entry, .entry_stride = entry, .dtype = kv_dtype },
                                      .out = ops_alloc(&b, (size_t)fresh * NQ * HD * 4), .ld_out = NQ * HD };
    a.kv.base = ops_alloc(&b, (size_t)((ctx + fresh) / 16 + 2) * 16 * entry);
    for (int r = -1; r < runs; r++) {
        double t0 = now();
        OPS_CALL(&b, attn_paged, &a);
        if (r >= 0)
            t[r] = now() - t0;
    }
    double keys = fresh * (ctx + (fresh + 1) / 2.0);
    report(what, fresh, t, runs, fresh == 1 ? (double)(ctx + 1) * (double)entry : 0, fresh > 1 ? 4.0 * keys * NQ * HD : 0);
    ops_release(&b);
}

static void bench_gdn(int fresh, int runs)
{
    if (strncmp("gdn", only, strlen(only)) != 0)
        return;
    enum { NK = 16, NV = 16, D = 128 };
    struct arle_batch ba = one_sequence(0, fresh);
    int64_t n_conv = 2 * NK * D + NV * D, ld = n_conv + NV * D + 2 * NV;
    size_t record = 3 * (size_t)n_conv * 4 + NV * D * D * 4, scratch = (size_t)fresh * (size_t)(n_conv + NV * (D + 2 * D + 8)) * 4;
    char *state = ops_alloc(&b, 2 * record);
    float *f = calloc((size_t)n_conv * 4 + 64, 4);
    double t[64];
    struct arle_gdn_args a = { .dtype = act, .n_k = NK, .n_v = NV, .dk = D, .dv = D, .conv_width = 4, .eps = 1e-6f, .batch = &ba,
                               .proj = ops_alloc(&b, (size_t)(fresh * ld) * 4), .ld_proj = ld, .z_off = n_conv, .a_off = n_conv + NV * D,
                               .b_off = n_conv + NV * D + NV, .conv_w = ops_put(&b, f, (size_t)n_conv * 16), .A_log = ops_put(&b, f, 256),
                               .dt_bias = ops_put(&b, f, 256), .norm_w = ops_put(&b, f, 1024), .conv_state = { state, record, 0 },
                               .s_state = { state, record, 3 * (size_t)n_conv * 4 }, .out = ops_alloc(&b, (size_t)fresh * NV * D * 4), .ld_out = NV * D,
                               .scratch = ops_alloc(&b, scratch), .scratch_bytes = scratch };
    for (int r = -1; r < runs; r++) {
        double t0 = now();
        OPS_CALL(&b, gdn, &a);
        if (r >= 0)
            t[r] = now() - t0;
    }
    report("gdn", fresh, t, runs, 0, 7.0 * D * D * NV * fresh);
    free(f);
    ops_release(&b);
}

static void bench_small(int runs)
{
    if (strncmp("small", only, strlen(only)) != 0)
        return;
    enum { REPEAT = 1000 };
    double t[64];
    float *x = calloc(HIDDEN, 4);
    void *dx = ops_put_act(&b, act, x, HIDDEN, NULL), *w = ops_put(&b, x, HIDDEN * 4);
    struct arle_rmsnorm_args a = { .dtype = act, .n_tokens = 1, .dim = HIDDEN, .eps = 1e-6f, .x = dx, .ld_x = HIDDEN, .w = w, .out = dx, .ld_out = HIDDEN };
    for (int r = 0; r < runs; r++) {
        double t0 = now();
        for (int i = 0; i < REPEAT; i++)
            OPS_CALL(&b, rmsnorm, &a);
        t[r] = (now() - t0) / REPEAT;
    }
    report("rmsnorm", 1, t, runs, 0, 0);
    struct arle_weight *pw = random_weight(ARLE_W_LINEAR, 512, 512);
    struct arle_linear_args l = { .dtype = act, .out_dtype = act, .n_tokens = 1, .x = dx, .ld_x = 512, .w = pw, .y = ops_alloc(&b, 2048), .ld_y = 512 };
    for (int r = 0; r < runs; r++) {
        double t0 = now();
        for (int i = 0; i < REPEAT; i++)
            OPS_CALL(&b, linear, &l);
        t[r] = (now() - t0) / REPEAT;
    }
    report("linear 512x512, in cache", 1, t, runs, 0, 2.0 * 512 * 512);
    free(x);
    ops_release(&b);
}

static void bench_sample(int runs)
{
    if (strncmp("sample", only, strlen(only)) != 0)
        return;
    double t[64];
    float *x = malloc(VOCAB * 4);
    uint64_t seed = 1;
    for (int i = 0; i < VOCAB; i++)
        x[i] = ops_random(&seed) * 10;
    struct arle_sample_row row = { .top_p = 1, .repetition = 1, .target = -1 };
    struct arle_sample_args a = { .n_rows = 1, .vocab = VOCAB, .n_valid = VOCAB, .logits = ops_put(&b, x, VOCAB * 4), .ld = VOCAB,
                                  .ids = ops_alloc(&b, 4), .logprob = ops_alloc(&b, 4), .target_logprob = ops_alloc(&b, 4), .top_ids = ops_alloc(&b, 80),
                                  .top_logprobs = ops_alloc(&b, 80), .top_logits = ops_alloc(&b, 4) };
    for (int form = 0; form < 3; form++) {
        row.temperature = form > 0;
        row.top_p = form == 2 ? 0.95f : 1;
        row.top_k = form == 2 ? 20 : 0;
        a.rows = ops_put(&b, &row, sizeof row);
        for (int r = 0; r < runs; r++) {
            double t0 = now();
            OPS_CALL(&b, sample, &a);
            t[r] = now() - t0;
        }
        report(form == 0 ? "sample argmax" : form == 1 ? "sample draw" : "sample top_k 20, top_p 0.95", 1, t, runs, 0, 0);
    }
    free(x);
    ops_release(&b);
}

int main(int argc, char **argv)
{
    struct arle_err err = ARLE_ERR_INIT;
    static const char *conf[65];
    int n = 0;
    for (int i = 2; i < argc && n < 64; i++) {
        char *eq = strchr(argv[i], '=');
        if (eq == NULL)
            continue;
        *eq = '\0';
        if (strcmp(argv[i], "only") == 0) {
            only = eq + 1;
            continue;
        }
        if (strcmp(argv[i], "clock") == 0) {
            clock_id = strcmp(eq + 1, "cpu") == 0 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC;
            continue;
        }
        conf[n++] = argv[i];
        conf[n++] = eq + 1;
    }
    if (ops_open(&b, argc > 1 ? argv[1] : ".plugins/backend-cpu.so", conf, &err) < 0) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    struct arle_device_info info = { .struct_size = sizeof info };
    b.api->device_info(b.ctx, 0, &info, &err);
    act = info.default_compute;
    b.api->ceiling(b.dev, &read_ceiling, &flop_ceiling, &err);
    printf("{\"device\": \"%s\", \"threads\": %u, \"compute\": \"%s\", \"read_gb_s\": %.1f, \"bf16_gflop_s\": %.0f}\n", info.name, info.threads,
           act == ARLE_BF16 ? "bf16" : "f32", read_ceiling * 1e-9, flop_ceiling * 1e-9);
    fflush(stdout);
    bench_linear("linear mixer in", ARLE_W_LINEAR, 8224, HIDDEN, 1, 12, 15);
    bench_linear("gate_up", ARLE_W_GATE_UP, 2 * MLP, HIDDEN, 1, 12, 15);
    bench_linear("linear down", ARLE_W_LINEAR, HIDDEN, MLP, 1, 24, 15);
    bench_linear("linear out", ARLE_W_LINEAR, HIDDEN, 2048, 1, 40, 15);
    bench_linear("linear head", ARLE_W_LINEAR, VOCAB, HIDDEN, 1, 1, 15);
    bench_linear("linear mixer in", ARLE_W_LINEAR, 8224, HIDDEN, 4, 12, 9);
    bench_linear("linear mixer in", ARLE_W_LINEAR, 8224, HIDDEN, 512, 2, 9);
    bench_linear("gate_up", ARLE_W_GATE_UP, 2 * MLP, HIDDEN, 512, 2, 9);
    bench_linear("linear down", ARLE_W_LINEAR, HIDDEN, MLP, 512, 4, 9);
    bench_linear("linear out", ARLE_W_LINEAR, HIDDEN, 2048, 512, 4, 9);
    bench_gdn(1, 15);
    bench_gdn(512, 5);
    bench_attention(512, 1, 15, ARLE_BF16, "attention decode at 512");
    bench_attention(8192, 1, 15, ARLE_BF16, "attention decode at 8192");
    bench_attention(8192, 1, 15, ARLE_I8, "attention decode at 8192, int8");
    bench_attention(0, 512, 5, ARLE_BF16, "attention prefill");
    bench_attention(4096, 512, 3, ARLE_BF16, "attention prefill at 4096");
    bench_sample(9);
    bench_small(9);
    ops_close(&b);
    return 0;
}
