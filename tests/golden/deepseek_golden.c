/*
 * deepseek-v4-tiny against its golden outputs (f32, computed by an independent implementation), and the invariants that
 * the KV plane builds on: any chunking, alone or in company, decode or prefill, resumed anywhere: the same bits.
 */
#include "model_harness.h"
#include "tap.h"

static struct harness *h;
static struct golden *g;
static const char *dir;

static struct harness_options base(uint32_t compute)
{
    return (struct harness_options){ .model_dir = dir, .compute = compute, .kv_dtype = compute, .page_tokens = 64, .max_tokens = 512,
                                     .n_seqs = 16, .seq_tokens = 512 };
}

static void golden_outputs_f32(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    uint32_t whole_rows = 0;
    for (uint32_t i = 0; i < golden_count(g); i++) {
        const struct golden_case *c = golden_at(g, i);
        struct golden_result r;
        int e = golden_run(h, c, i % 2 ? 512 : 37, 0.02, false, &r, &err);
        if (e < 0)
            TAP_FAIL("%s: %s", c->name, err.msg);
        printf("# %-16s worst logit %.2e, NLL %.1e, argmax wrong %u, greedy %u of %u (%u required)\n", c->name, r.worst_logit,
               r.nll_diff, r.argmax_wrong, r.greedy_equal, c->n_greedy, r.greedy_must);
        EXPECT_EQ(c->n_top, 20);
        whole_rows += c->logits != NULL;
        EXPECT(r.worst_logit <= 2e-3);
        EXPECT(r.nll_diff <= 1e-3);
        EXPECT_EQ(r.argmax_wrong, 0);
        EXPECT(r.greedy_equal >= r.greedy_must);
    }
    EXPECT(whole_rows >= 3);
}

static const struct golden_case *longest(void)
{
    const struct golden_case *best = golden_at(g, 0);
    for (uint32_t i = 1; i < golden_count(g); i++)
        if (golden_at(g, i)->n_ids > best->n_ids)
            best = golden_at(g, i);
    return best;
}

/* Logits of the whole prompt in one step; the caller frees. */
static float *whole(struct harness *hh, const int32_t *ids, uint32_t n)
{
    struct arle_err err = ARLE_ERR_INIT;
    const float *x;
    struct harness_piece p = { 0, 0, ids, n };
    harness_reset(hh, 0);
    if (harness_step(hh, &p, 1, &x, NULL, &err) < 0) {
        TAP_FAIL("%s", err.msg);
        return NULL;
    }
    size_t bytes = (size_t)n * harness_desc(hh)->vocab * 4;
    float *keep = malloc(bytes);
    memcpy(keep, x, bytes);
    return keep;
}

static bool same_in_chunks(struct harness *hh, const float *want, const int32_t *ids, uint32_t n, uint32_t chunk, uint32_t from)
{
    struct arle_err err = ARLE_ERR_INIT;
    const float *x;
    uint32_t V = harness_desc(hh)->vocab;
    for (uint32_t at = from; at < n; at += chunk) {
        struct harness_piece p = { 0, at, ids + at, n - at < chunk ? n - at : chunk };
        if (harness_step(hh, &p, 1, &x, NULL, &err) < 0 || memcmp(x, want + (size_t)at * V, (size_t)p.n * V * 4) != 0) {
            printf("# chunk %u differs at %u %s\n", chunk, at, err.msg);
            return false;
        }
    }
    return true;
}

static void any_chunking(struct harness *hh)
{
    static const uint32_t chunks[] = { 1, 2, 3, 4, 5, 7, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129 };
    const struct golden_case *c = longest();
    uint32_t n = c->n_ids < 300 ? c->n_ids : 300;
    float *want = whole(hh, c->ids, n);
    REQUIRE(want != NULL);
    for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++) {
        harness_reset(hh, 0);
        EXPECT(same_in_chunks(hh, want, c->ids, n, chunks[i], 0));
    }
    free(want);
}

static void any_chunking_gives_the_same_bits(void)
{
    any_chunking(h);
}

static void resume_at_every_position(void)
{
    const struct golden_case *c = longest();
    struct arle_err err = ARLE_ERR_INIT;
    uint32_t n = c->n_ids < 300 ? c->n_ids : 300;
    const float *x;
    float *want = whole(h, c->ids, n);
    REQUIRE(want != NULL);
    harness_reset(h, 1);
    for (uint32_t at = 1; at < n; at++) {
        struct harness_piece p = { 1, at - 1, c->ids + at - 1, 1 };
        REQUIRE(harness_step(h, &p, 1, &x, NULL, &err) == 0);
        if (at % 7 != 0 && at % 32 > 1 && at % 64 != 63)
            continue;                   /* every alignment to groups and pages; all 300 take minutes */
        struct harness_snapshot *s = harness_save(h, 1, at);
        harness_restore(h, 0, s);
        EXPECT(same_in_chunks(h, want, c->ids, n, 64, at));
        harness_snapshot_free(s);
    }
    free(want);
}

static void in_company(struct harness *hh)
{
    const struct golden_case *c = longest();
    struct arle_err err = ARLE_ERR_INIT;
    const float *x;
    uint32_t n = 200 < c->n_ids ? 200 : c->n_ids, V = harness_desc(hh)->vocab;
    float *want = whole(hh, c->ids, n);
    REQUIRE(want != NULL);
    struct harness_piece p[16];
    for (uint32_t s = 0; s < 16; s++)
        harness_reset(hh, s);
    for (uint32_t s = 0; s < 15; s++)                   /* strangers of other lengths first, one token each */
        p[s] = (struct harness_piece){ s + 1, 0, golden_at(g, s % golden_count(g))->ids, 1 };
    p[15] = (struct harness_piece){ 0, 0, c->ids, n };
    REQUIRE(harness_step(hh, p, 16, &x, NULL, &err) == 0);
    EXPECT(memcmp(x + 15 * (size_t)V, want, (size_t)n * V * 4) == 0);
    free(want);
}

static void alone_or_among_fifteen_others(void)
{
    in_company(h);
}

static void bf16_and_one_thread(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *two = NULL, *one = NULL;
    struct harness_options o = base(ARLE_BF16);
    REQUIRE(harness_open(&two, &o, &err) == 0);
    any_chunking(two);
    in_company(two);
    o.sets[0] = "backend-cpu.threads=1";
    REQUIRE(harness_open(&one, &o, &err) == 0);
    const struct golden_case *c = longest();
    uint32_t n = c->n_ids < 300 ? c->n_ids : 300;
    float *a = whole(one, c->ids, n), *b = whole(two, c->ids, n);
    EXPECT(a && b && memcmp(a, b, (size_t)n * harness_desc(one)->vocab * 4) == 0);
    free(a);
    free(b);
    harness_close(one);
    harness_close(two);
}

static void page_size_must_fit_the_ratios(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *bad = NULL;
    struct harness_options o = base(ARLE_F32);
    o.page_tokens = 24;
    EXPECT(harness_open(&bad, &o, &err) < 0);
    EXPECT(strstr(err.msg, "multiple of 32") != NULL);
}

int main(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    static char path[512];
    snprintf(path, sizeof path, "%s/deepseek-v4-tiny", getenv("ARLE_TEST_MODELS") ? getenv("ARLE_TEST_MODELS") : "models");
    dir = path;
    struct harness_options o = base(ARLE_F32);
    if (golden_open(&g, dir, &err) < 0 || harness_open(&h, &o, &err) < 0) {
        printf("1..1\nnot ok 1 - open # %s\n", err.msg);
        return 1;
    }
    RUN(golden_outputs_f32);
    RUN(any_chunking_gives_the_same_bits);
    RUN(resume_at_every_position);
    RUN(alone_or_among_fifteen_others);
    RUN(bf16_and_one_thread);
    RUN(page_size_must_fit_the_ratios);
    harness_close(h);
    golden_close(g);
    return tap_done();
}
