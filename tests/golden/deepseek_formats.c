/*
 * The published layout of DeepSeek-V4: the tiny checkpoint converted to E4M3 and E2M1 with official names, the published
 * configurations with random weights and few layers, and the drafter.
 */
#include "model_harness.h"
#include "plugin_util.h"
#include "tap.h"

#include <math.h>
#include <unistd.h>

static char source[512], converted[] = "/tmp/arle-ds4-XXXXXX";

static double mean_nll_diff(const char *dir, bool parity, uint32_t compute, uint32_t *greedy_equal, uint32_t *greedy_all)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *h = NULL;
    struct golden *g = NULL;
    const struct harness_options o = { .model_dir = dir, .compute = compute, .kv_dtype = compute, .page_tokens = 64, .max_tokens = 512,
                                       .n_seqs = 1, .seq_tokens = 512, .parity = parity };
    double sum = 0;
    if (golden_open(&g, source, &err) < 0 || harness_open(&h, &o, &err) < 0) {
        TAP_FAIL("%s", err.msg);
        return NAN;
    }
    *greedy_equal = *greedy_all = 0;
    for (uint32_t i = 0; i < golden_count(g); i++) {
        struct golden_result r;
        if (golden_run(h, golden_at(g, i), 512, 0.1, false, &r, &err) < 0)
            TAP_FAIL("%s", err.msg);
        sum += r.nll_diff;
        *greedy_equal += r.greedy_equal;
        *greedy_all += golden_at(g, i)->n_greedy;
    }
    uint32_t n = golden_count(g);
    harness_close(h);
    golden_close(g);
    return sum / n;
}

static void converted_checkpoint_loads_and_stays_close(void)
{
    char cmd[2048];
    uint32_t eq, all;
    snprintf(cmd, sizeof cmd, "python3 '%s/scripts/convert_deepseek_v4.py' '%s' '%s'", getenv("top_srcdir"), source, converted);
    if (system("command -v python3 >/dev/null 2>&1") != 0)
        SKIP("no python3");
    REQUIRE(system(cmd) == 0);
    double bf16 = mean_nll_diff(source, false, ARLE_BF16, &eq, &all);
    printf("# bf16 weights, bf16 activations:            mean |NLL change| %.4f, greedy %u of %u\n", bf16, eq, all);
    double weights = mean_nll_diff(converted, true, ARLE_F32, &eq, &all);
    printf("# FP8/FP4 weights, f32 activations:          mean |NLL change| %.4f, greedy %u of %u\n", weights, eq, all);
    double full = mean_nll_diff(converted, false, ARLE_BF16, &eq, &all);
    printf("# FP8/FP4 weights, quantised activations:    mean |NLL change| %.4f, greedy %u of %u\n", full, eq, all);
    EXPECT(bf16 < 0.02);
    EXPECT(weights > 1e-5);                 /* a change of exactly nothing would mean that nothing was quantised */
    EXPECT(weights < 0.25);                 /* untrained for 4-bit experts; the figure is reported, the bound catches mix-ups */
    EXPECT(full < 0.35);
    EXPECT(full != weights);
}

/* Logits of a prompt by one instruction set, which the machine may lack (NULL). The caller frees. */
static float *logits_by(const char *isa, const struct golden_case *c, uint32_t *out_n, uint32_t chunk)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *h = NULL;
    char set[64];
    snprintf(set, sizeof set, "backend-cpu.isa=%s", isa);
    const struct harness_options o = { .model_dir = converted, .compute = ARLE_F32, .kv_dtype = ARLE_F32, .page_tokens = 64, .max_tokens = 128,
                                       .n_seqs = 1, .seq_tokens = 128, .parity = true, .sets = { set } };
    if (harness_open(&h, &o, &err) < 0) {
        printf("# %s: %s\n", isa, err.msg);
        return NULL;
    }
    uint32_t n = c->n_ids < 96 ? c->n_ids : 96, V = harness_desc(h)->vocab;
    float *keep = malloc((size_t)n * V * 4);
    harness_reset(h, 0);
    for (uint32_t at = 0; at < n; at += chunk) {
        const float *x;
        struct harness_piece p = { 0, at, c->ids + at, n - at < chunk ? n - at : chunk };
        if (harness_step(h, &p, 1, &x, NULL, &err) < 0)
            TAP_FAIL("%s: %s", isa, err.msg);
        else
            memcpy(keep + (size_t)at * V, x, (size_t)p.n * V * 4);
    }
    *out_n = n * V;
    harness_close(h);
    return keep;
}

/* Packed experts, compressors, index and attention by vectors against plain loops; and cut differently, the same bits of each. */
static void every_instruction_set_agrees(void)
{
    static const char *const isas[] = { "avx2", "avx512", "avx512bf16" };
    struct arle_err err = ARLE_ERR_INIT;
    struct golden *g = NULL;
    REQUIRE(golden_open(&g, source, &err) == 0);
    const struct golden_case *c = golden_at(g, 0);
    uint32_t n = 0, m = 0;
    for (uint32_t i = 1; i < golden_count(g); i++)
        if (golden_at(g, i)->n_ids > c->n_ids)
            c = golden_at(g, i);
    float *want = logits_by("reference", c, &n, 128);
    REQUIRE(want != NULL);
    for (size_t i = 0; i < sizeof isas / sizeof isas[0]; i++) {
        float *got = logits_by(isas[i], c, &m, 128), *cut = got ? logits_by(isas[i], c, &m, 7) : NULL;
        if (got == NULL)
            continue;
        double worst = 0;
        for (uint32_t j = 0; j < n; j++)
            worst = fmax(worst, fabs((double)got[j] - want[j]));
        printf("# %s: %.1e from the reference\n", isas[i], worst);
        EXPECT(worst < 1e-4 && worst > 0);
        EXPECT(cut != NULL && memcmp(got, cut, (size_t)n * 4) == 0);
        free(got);
        free(cut);
    }
    free(want);
    golden_close(g);
}

static char *scaled_config(const char *name, uint32_t layers, const int *ratios, uint32_t drafts)
{
    char path[512];
    size_t n;
    snprintf(path, sizeof path, "%s/tests/golden/deepseek-configs/%s.json", getenv("top_srcdir"), name);
    char *text = read_file(path, &n);
    struct json_object *o = text ? json_tokener_parse(text) : NULL, *a = json_object_new_array();
    for (uint32_t i = 0; i <= layers; i++)
        json_object_array_add(a, json_object_new_int(i < layers ? ratios[i] : 0));
    json_object_object_add(o, "num_hidden_layers", json_object_new_int((int)layers));
    json_object_object_add(o, "compress_ratios", a);
    json_object_object_add(o, "num_hash_layers", json_object_new_int(1));
    json_object_object_add(o, "num_nextn_predict_layers", json_object_new_int((int)drafts));
    /* Eight experts: every other shape of a layer is the published one, and the test fits small machines. */
    json_object_object_add(o, "n_routed_experts", json_object_new_int(getenv("ARLE_TEST_LARGE") ? 256 : 8));
    char *out = strdup(json_object_to_json_string(o));
    json_object_put(o);
    free(text);
    return out;
}

static uint64_t resident(void)
{
    FILE *f = fopen("/proc/self/statm", "r");
    unsigned long size = 0, rss = 0;
    if (f != NULL) {
        if (fscanf(f, "%lu %lu", &size, &rss) != 2)
            rss = 0;
        fclose(f);
    }
    return (uint64_t)rss * (uint64_t)sysconf(_SC_PAGESIZE);
}

static void published(const char *name, const int *ratios, uint32_t layers)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *h = NULL;
    char *json = scaled_config(name, layers, ratios, 0);
    const struct harness_options o = { .model_dir = ".", .config_json = json, .random = true, .compute = ARLE_BF16, .kv_dtype = ARLE_BF16,
                                       .page_tokens = 128, .max_tokens = 16, .n_seqs = 1, .seq_tokens = 256 };
    uint64_t before = resident();
    if (harness_open(&h, &o, &err) < 0) {
        TAP_FAIL("%s: %s", name, err.msg);
        free(json);
        return;
    }
    uint64_t used = resident() - before, predicted = harness_desc(h)->weight_bytes;
    printf("# %s: %u layers, %.2f B parameters, weights predicted %.3f GB, process grew %.3f GB\n", name, layers,
           (double)harness_desc(h)->n_params / 1e9, (double)predicted / 1e9, (double)used / 1e9);
    EXPECT(harness_weight_bytes_created(h) == predicted);
    int32_t ids[12];
    for (int i = 0; i < 12; i++)
        ids[i] = 1000 + 77 * i;
    const float *x;
    struct harness_piece p = { 0, 0, ids, 12 };
    harness_reset(h, 0);
    REQUIRE(harness_step(h, &p, 1, &x, NULL, &err) == 0);
    bool finite = true;
    double spread = 0;
    for (uint32_t i = 0; i < harness_desc(h)->vocab; i++) {
        finite &= isfinite(x[11ul * harness_desc(h)->vocab + i]) != 0;
        spread = fmax(spread, fabs(x[11ul * harness_desc(h)->vocab + i]));
    }
    EXPECT(finite && spread > 0);
    harness_close(h);
    free(json);
}

static void flash_shapes_load_and_step(void)
{
    static const int ratios[] = { 0, 4, 128 };
    published("flash", ratios, 3);
}

static void pro_shapes_load_and_step(void)
{
    static const int ratios[] = { 128, 4 };
    published("pro", ratios, 2);
}

/* The tiny configuration with a drafter and random weights: drafts are the same however the prompt is cut. */
static void drafter_does_not_depend_on_chunking(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *h = NULL;
    char path[600];
    size_t n;
    snprintf(path, sizeof path, "%s/config.json", source);
    char *json = read_file(path, &n);
    const struct harness_options o = { .model_dir = ".", .config_json = json, .random = true, .compute = ARLE_F32, .kv_dtype = ARLE_F32,
                                       .page_tokens = 64, .max_tokens = 128, .n_seqs = 1, .seq_tokens = 128, .drafts = true };
    REQUIRE(harness_open(&h, &o, &err) == 0);
    EXPECT_EQ(harness_desc(h)->has_drafter, 1);
    int32_t ids[100], want[100], got[100];
    for (int i = 0; i < 100; i++)
        ids[i] = (i * 37 + 11) % 4000;
    const float *x;
    const int32_t *d;
    struct harness_piece p = { 0, 0, ids, 100 };
    harness_reset(h, 0);
    REQUIRE(harness_step(h, &p, 1, &x, &d, &err) == 0);
    memcpy(want, d, sizeof want);
    EXPECT_EQ(want[0], -1);
    harness_reset(h, 0);
    for (uint32_t at = 0; at < 100; at += 9) {
        p = (struct harness_piece){ 0, at, ids + at, 100 - at < 9 ? 100 - at : 9 };
        REQUIRE(harness_step(h, &p, 1, &x, &d, &err) == 0);
        memcpy(got + at, d, p.n * sizeof *got);
    }
    for (int i = 0; i < 100; i++)
        if (want[i] != got[i])
            TAP_FAIL("draft %d is %d in chunks, %d whole", i, got[i], want[i]);
    EXPECT(want[50] != want[51] || want[51] != want[52]);
    harness_close(h);
    free(json);
}

int main(void)
{
    char cmd[128];
    snprintf(source, sizeof source, "%s/deepseek-v4-tiny", getenv("ARLE_TEST_MODELS") ? getenv("ARLE_TEST_MODELS") : "models");
    if (mkdtemp(converted) == NULL)
        return 1;
    RUN(converted_checkpoint_loads_and_stays_close);
    RUN(every_instruction_set_agrees);
    RUN(flash_shapes_load_and_step);
    RUN(pro_shapes_load_and_step);
    RUN(drafter_does_not_depend_on_chunking);
    snprintf(cmd, sizeof cmd, "rm -rf %s", converted);
    return (system(cmd) != 0) + tap_done();
}
