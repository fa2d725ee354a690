/*
 * Step times of a published shape with random weights on the GPU, without the engine: decode steps as replayed graphs, prefill as
 * plain launches, beside the bytes that a step must move and the ceilings of the same run. One JSON line per case.
 *
 *   bench_cuda_model 4b|35b [key=value ...] decode:ROWS:CONTEXT ... prefill:TOKENS ...      (key: of backend-cuda)
 */
#include "config/config.h"
#include "plugin/registry.h"
#include "weights/weights.h"

#include <arle/model.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* expert_bytes: of one routed expert, all layers together; 256 experts of which a token takes 8. */
struct shape { const char *name, *config; double expert_bytes; };

static const struct shape shapes[] = {
    { "4b", "{\"model_type\":\"qwen3_5_text\",\"architectures\":[\"Qwen3_5ForCausalLM\"],\"vocab_size\":248320,\"hidden_size\":2560,"
            "\"intermediate_size\":9216,\"num_hidden_layers\":32,\"num_attention_heads\":16,\"num_key_value_heads\":4,\"head_dim\":256,"
            "\"linear_num_key_heads\":16,\"linear_num_value_heads\":32,\"linear_key_head_dim\":128,\"linear_value_head_dim\":128,"
            "\"linear_conv_kernel_dim\":4,\"full_attention_interval\":4,\"max_position_embeddings\":262144,\"tie_word_embeddings\":true,"
            "\"rms_norm_eps\":1e-6,\"hidden_act\":\"silu\",\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000000.0,"
            "\"partial_rotary_factor\":0.25},\"attn_output_gate\":true,\"dtype\":\"bfloat16\"}", 0 },
    { "35b", "{\"model_type\":\"qwen3_5_moe_text\",\"architectures\":[\"Qwen3_5MoeForCausalLM\"],\"vocab_size\":248320,\"hidden_size\":2048,"
             "\"num_hidden_layers\":40,\"num_attention_heads\":16,\"num_key_value_heads\":2,\"head_dim\":256,"
             "\"linear_num_key_heads\":16,\"linear_num_value_heads\":32,\"linear_key_head_dim\":128,\"linear_value_head_dim\":128,"
             "\"linear_conv_kernel_dim\":4,\"full_attention_interval\":4,\"max_position_embeddings\":262144,\"tie_word_embeddings\":false,"
             "\"moe_intermediate_size\":512,\"shared_expert_intermediate_size\":512,\"num_experts\":256,\"num_experts_per_tok\":8,"
             "\"rms_norm_eps\":1e-6,\"hidden_act\":\"silu\",\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000000.0,"
             "\"partial_rotary_factor\":0.25},\"attn_output_gate\":true,\"dtype\":\"bfloat16\"}", 40 * 3.0 * 2048 * 512 * 2 },
};

enum { MAX_ROWS = 64, PAGE = 16, MAX_TOKENS = 8192, MAX_CTX = 131072 + PAGE };

static const struct arle_backend_api *be;
static const struct arle_model_api *api;
static struct arle_device *dev;
static struct arle_stream *st;
static struct arle_model *model;
static const struct arle_model_desc *desc;
static struct arle_cache_binding caches;
static int32_t *ints;
static float *logits;
static double read_ceiling, flop_ceiling;
static uint32_t n_pages;
static double expert_bytes;
static struct { int32_t *ids, *top_ids; float *lp, *target, *top_lp, *top; struct arle_sample_row *rows; } pick;

static void die(const char *what, const struct arle_err *err)
{
    fprintf(stderr, "bench_cuda_model: %s: %s\n", what, err->msg);
    exit(1);
}

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void *device(size_t bytes)
{
    struct arle_err err = ARLE_ERR_INIT;
    void *p = NULL;
    if (be->mem.alloc(dev, ARLE_MEM_DEVICE, bytes, &p, &err) < 0)
        die("memory", &err);
    return p;
}

static void sync(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    if (be->mem.stream_sync(dev, st, &err) < 0)
        die("device", &err);
}

static void open_all(const struct shape *s, const char *const *sets, size_t n_sets)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct config *cfg;
    struct registry *reg;
    struct arle_weights *w;
    const struct plugin_info *pb, *pm;
    const char *all[16];
    char dir[512], text[8][128];
    snprintf(dir, sizeof dir, "plugins.dir=%s", getenv("ARLE_TEST_PLUGINS") ? getenv("ARLE_TEST_PLUGINS") : ".plugins");
    all[0] = dir;
    for (size_t i = 0; i < n_sets && i < 8; i++) {
        snprintf(text[i], sizeof text[i], "backend-cuda.%s", sets[i]);
        all[i + 1] = text[i];
    }
    if (config_open(&cfg, NULL, all, n_sets + 1, &err) < 0 || registry_open(&reg, cfg, 0, &err) < 0
        || registry_backend(reg, "cuda", &pb, &err) < 0 || registry_model(reg, s->config, strlen(s->config), &pm, &err) < 0)
        die("plugins", &err);
    be = pb->ops;
    api = pm->ops;
    if (be->open_device(pb->ctx, 0, &dev, &err) < 0 || be->mem.stream_create(dev, &st, &err) < 0
        || be->ceiling(dev, &read_ceiling, &flop_ceiling, &err) < 0 || weights_random(&w, 1, &err) < 0)
        die("device", &err);
    double t0 = now();
    const struct arle_model_load load = { .struct_size = sizeof load, .compute = ARLE_BF16, .kv_dtype = ARLE_BF16, .page_tokens = PAGE,
        .max_tokens = MAX_TOKENS, .max_seqs = MAX_ROWS, .max_rows = MAX_ROWS, .config_json = s->config, .config_len = strlen(s->config),
        .weights = w, .backend = be, .device = dev };
    if (api->load(pm->ctx, &load, &model, &err) < 0)
        die("load", &err);
    sync();
    desc = api->describe(model);
    printf("{\"shape\": \"%s\", \"read_ceiling_gb_s\": %.0f, \"flop_ceiling_tf_s\": %.0f, \"weights_gb\": %.3f, \"step_weights_gb\": %.3f, "
           "\"load_s\": %.2f}\n", s->name, read_ceiling * 1e-9, flop_ceiling * 1e-12, (double)desc->weight_bytes * 1e-9,
           (double)desc->step_weight_bytes * 1e-9, now() - t0);
    n_pages = 1 + (MAX_ROWS * (4096 + PAGE)) / PAGE;
    caches = (struct arle_cache_binding){ .struct_size = sizeof caches, .n_groups = desc->n_groups };
    for (uint32_t g = 0; g < desc->n_groups; g++) {
        const struct arle_cache_group *cg = &desc->groups[g];
        bool paged = cg->kind == ARLE_CACHE_PAGED;
        caches.group[g].stride = ((paged ? cg->page_bytes : cg->record_bytes) + 255) & ~255ull;
        caches.group[g].base = device(caches.group[g].stride * (paged ? n_pages : MAX_ROWS + 1));
    }
    if (api->bind(model, &caches, &err) < 0)
        die("bind", &err);
    ints = device((size_t)(4 * MAX_TOKENS + 8 * MAX_ROWS + MAX_ROWS * (MAX_CTX / PAGE + 1)) * 4);
    logits = device((size_t)MAX_ROWS * desc->vocab * 4);
    pick.ids = device(MAX_ROWS * 4);
    pick.lp = device(MAX_ROWS * 4);
    pick.target = device(MAX_ROWS * 4);
    pick.top = device(MAX_ROWS * 4);
    pick.top_ids = device(MAX_ROWS * ARLE_MAX_TOP * 4);
    pick.top_lp = device(MAX_ROWS * ARLE_MAX_TOP * 4);
    struct arle_sample_row rows[MAX_ROWS];
    for (int i = 0; i < MAX_ROWS; i++)
        rows[i] = (struct arle_sample_row) { .top_p = 1, .repetition = 1, .target = -1 };
    pick.rows = device(sizeof rows);
    be->mem.copy(dev, st, pick.rows, rows, sizeof rows, ARLE_COPY_H2D);
    sync();
}

/* The step of `rows` sequences with `fresh` new tokens each after ctx - fresh earlier ones. Long contexts share pages: what is
 * read is the same amount, from the same places as often as there are more sequences than pages. */
static struct arle_step step_of(uint32_t rows, uint32_t fresh, uint32_t ctx)
{
    uint32_t T = rows * fresh, stride = (ctx + PAGE - 1) / PAGE, at = 0, page = 0;
    int32_t *x = calloc((size_t)(4 * T + 8 * rows + 64) + (size_t)rows * stride, 4);
#define ARRAY(name, count) uint32_t name = at; at += ((count) + 3) & ~3u
    ARRAY(ids, T); ARRAY(pos, T); ARRAY(seq, T); ARRAY(want, rows); ARRAY(cu, rows + 1); ARRAY(len, rows); ARRAY(slot, rows);
    ARRAY(table, rows * stride);
#undef ARRAY
    for (uint32_t s = 0, t = 0; s < rows; s++) {
        for (uint32_t i = 0; i < fresh; i++, t++) {
            x[ids + t] = (int32_t)((t * 7919u + 13) % 200000);
            x[pos + t] = (int32_t)(ctx - fresh + i);
            x[seq + t] = (int32_t)s;
        }
        x[want + s] = (int32_t)(t - 1);
        x[cu + s + 1] = (int32_t)t;
        x[len + s] = (int32_t)ctx;
        x[slot + s] = (int32_t)s + 1;
        for (uint32_t i = 0; i < stride; i++)
            x[table + s * stride + i] = (int32_t)(1 + page++ % (n_pages - 1));
    }
    be->mem.copy(dev, st, ints, x, (size_t)at * 4, ARLE_COPY_H2D);
    sync();
    free(x);
    return (struct arle_step) { .struct_size = sizeof(struct arle_step),
        .batch = { .struct_size = sizeof(struct arle_batch), .n_tokens = T, .n_seqs = rows, .n_decode = fresh == 1 ? rows : 0, .max_new = fresh,
                   .max_ctx = ctx, .page_tokens = PAGE, .table_stride = stride, .ids = ints + ids, .sampled = ints, .pos = ints + pos,
                   .seq_of = ints + seq, .cu = ints + cu, .ctx_len = ints + len, .slot = ints + slot, .block_table = ints + table },
        .n_rows = rows, .rows = ints + want, .logits = logits, .ld_logits = desc->vocab };
}

static void enqueue(const struct arle_step *s)
{
    struct arle_err err = ARLE_ERR_INIT;
    const struct arle_sample_args a = { .n_rows = s->n_rows, .vocab = desc->vocab, .n_valid = desc->n_valid, .logits = logits,
        .ld = desc->vocab, .rows = pick.rows, .ids = pick.ids, .logprob = pick.lp, .target_logprob = pick.target, .top_ids = pick.top_ids,
        .top_logprobs = pick.top_lp, .top_logits = pick.top };
    if (api->step(model, st, s, &err) < 0)
        die("step", &err);
    if (be->ops->sample(dev, st, &a) < 0)
        die("sample", &err);
}

static double state_bytes(void)
{
    double n = 0;
    for (uint32_t g = 0; g < desc->n_groups; g++)
        if (desc->groups[g].kind != ARLE_CACHE_PAGED)
            n += (double)desc->groups[g].record_bytes;
    return n;
}

static double kv_bytes(void)
{
    double n = 0;
    for (uint32_t g = 0; g < desc->n_groups; g++)
        if (desc->groups[g].kind == ARLE_CACHE_PAGED)
            n += (double)desc->groups[g].page_bytes / PAGE;
    return n;
}

static void bench_decode(uint32_t rows, uint32_t ctx)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct arle_graph *g = NULL;
    struct arle_step s = step_of(rows, 1, ctx);
    enqueue(&s);
    sync();
    if (be->graph_begin(dev, st, &err) < 0)
        die("capture", &err);
    enqueue(&s);
    if (be->graph_end(dev, st, &g, &err) < 0)
        die("capture", &err);
    for (int i = 0; i < 3; i++)
        be->graph_launch(dev, g, st);
    sync();
    double best = 1e9;
    for (int r = 0; r < 5; r++) {
        double t0 = now();
        for (int i = 0; i < 20; i++)
            be->graph_launch(dev, g, st);
        sync();
        double t = (now() - t0) / 20;
        best = t < best ? t : best;
    }
    /* Distinct experts of `rows` tokens, were routing uniform: 256 (1 - (1 - 8/256)^rows); one row's eight are in step_weight_bytes. */
    double distinct = 256, bytes = (double)desc->step_weight_bytes;
    for (uint32_t i = 0; i < rows; i++)
        distinct *= 1 - 8.0 / 256;
    bytes += expert_bytes * (256 - distinct - 8) + rows * (2 * state_bytes() + kv_bytes() * ctx);
    printf("{\"case\": \"decode\", \"rows\": %u, \"ctx\": %u, \"ms\": %.3f, \"gb\": %.3f, \"floor_ms\": %.3f, \"of_floor\": %.3f}\n", rows, ctx,
           best * 1e3, bytes * 1e-9, bytes / read_ceiling * 1e3, bytes / read_ceiling / best);
    fflush(stdout);
    be->graph_destroy(dev, g);
}

static void bench_prefill(uint32_t tokens)
{
    struct arle_step s = step_of(1, tokens, tokens);
    double best = 1e9;
    for (int r = 0; r < 4; r++) {
        double t0 = now();
        enqueue(&s);
        sync();
        double t = now() - t0;
        best = t < best ? t : best;
    }
    printf("{\"case\": \"prefill\", \"tokens\": %u, \"ms\": %.2f, \"tokens_s\": %.0f}\n", tokens, best * 1e3, tokens / best);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    const char *sets[8] = { NULL };
    size_t n_sets = 0;
    const struct shape *s = argc > 1 && strcmp(argv[1], "35b") == 0 ? &shapes[1] : &shapes[0];
    for (int i = 2; i < argc && n_sets < 8; i++)
        if (strchr(argv[i], '=') != NULL)
            sets[n_sets++] = argv[i];
    expert_bytes = s->expert_bytes;
    open_all(s, sets, n_sets);
    for (int i = 2; i < argc; i++) {
        unsigned a = 0, b = 0;
        if (sscanf(argv[i], "decode:%u:%u", &a, &b) == 2 && a > 0 && a <= MAX_ROWS && b > 0 && b < MAX_CTX)
            bench_decode(a, b);
        else if (sscanf(argv[i], "prefill:%u", &a) == 1 && a > 0 && a <= MAX_TOKENS)
            bench_prefill(a);
    }
    return 0;
}
