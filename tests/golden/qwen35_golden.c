/*
 * The three Qwen3.5 checkpoints against their golden outputs (f32, computed by an independent implementation), in both
 * arithmetics, drafts and rendered chats included; and the invariants that scheduler and KV plane build on: any cut of the
 * prompt, alone or in company, decode or prefill, resumed anywhere, one thread or two: the same bits.
 */
#include "model_harness.h"
#include "tap.h"

static const char *const models[] = { "qwen35-tiny", "qwen35-micro", "qwen35-moe-tiny" };
static char dirs[3][512];

static struct harness_options base(int model, uint32_t compute)
{
    return (struct harness_options){ .model_dir = dirs[model], .compute = compute, .kv_dtype = compute, .page_tokens = 16,
                                     .max_tokens = 512, .n_seqs = 16, .seq_tokens = 512, .drafts = true };
}

struct bounds { double logit, nll, margin; bool argmax; };

static const char *extra_set;       /* configuration of the cases that want another than the default */

static void golden(int model, uint32_t compute, const struct bounds *b)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness *h = NULL;
    struct golden *g = NULL;
    struct harness_options o = base(model, compute);
    o.sets[0] = extra_set;
    if (golden_open(&g, dirs[model], &err) < 0 || harness_open(&h, &o, &err) < 0) {
        if (strstr(err.msg, "lacks the instructions") != NULL)
            tap_skip = "this machine lacks the instructions";
        else
            TAP_FAIL("%s: %s", models[model], err.msg);
        if (g != NULL)
            golden_close(g);
        return;
    }
    EXPECT_EQ(harness_desc(h)->has_drafter, model == 0);
    EXPECT_EQ(golden_count(g), 10);
    uint32_t whole_rows = 0;
    for (uint32_t i = 0; i < golden_count(g); i++) {
        const struct golden_case *c = golden_at(g, i);
        struct golden_result r;
        if (golden_run(h, c, i % 2 ? 512 : 37, b->margin, model == 0, &r, &err) < 0)
            TAP_FAIL("%s: %s", c->name, err.msg);
        printf("# %s %-16s worst logit %.2e, NLL %.1e, argmax wrong %u, greedy %u of %u (%u required), drafts %u of %u\n",
               models[model], c->name, r.worst_logit, r.nll_diff, r.argmax_wrong, r.greedy_equal, c->n_greedy, r.greedy_must,
               r.drafts_seen - r.drafts_wrong, r.drafts_seen);
        EXPECT_EQ(c->n_top, 20);
        whole_rows += c->logits != NULL;
        EXPECT(r.worst_logit <= b->logit);
        EXPECT(r.nll_diff <= b->nll);
        if (b->argmax) {
            EXPECT_EQ(r.argmax_wrong, 0);
            EXPECT_EQ(r.drafts_wrong, 0);
        }
        EXPECT(r.greedy_equal >= r.greedy_must);
        if (model == 0)
            EXPECT(r.drafts_seen + 1 >= c->n_ids);
    }
    EXPECT(whole_rows >= 3);
    harness_close(h);
    golden_close(g);
}

static const struct bounds f32 = { 2e-3, 1e-3, 0.02, true }, bf16 = { INFINITY, 0.01, 0.1, false };

static void tiny_f32(void) { golden(0, ARLE_F32, &f32); }
static void micro_f32(void) { golden(1, ARLE_F32, &f32); }
static void moe_f32(void) { golden(2, ARLE_F32, &f32); }
static void tiny_bf16(void) { golden(0, ARLE_BF16, &bf16); }
/* Instruction sets add in other orders and round in other places; none may drift. Those that the machine lacks are skipped. */
static void tiny_bf16_with(const char *isa)
{
    extra_set = isa;
    golden(0, ARLE_BF16, &bf16);
    extra_set = NULL;
}
static void tiny_bf16_on_reference(void) { tiny_bf16_with("backend-cpu.isa=reference"); }
static void tiny_bf16_on_avx2(void) { tiny_bf16_with("backend-cpu.isa=avx2"); }
static void tiny_bf16_on_avx512(void) { tiny_bf16_with("backend-cpu.isa=avx512"); }
static void tiny_bf16_on_amx(void) { tiny_bf16_with("backend-cpu.isa=amx"); }
static void micro_bf16(void) { golden(1, ARLE_BF16, &bf16); }
static void moe_bf16(void) { golden(2, ARLE_BF16, &bf16); }

/* ---- the same bits -------------------------------------------------------------------------------------------------- */

/* What one run over a prompt gave: logits and drafts of every position. */
struct trace { float *logits; int32_t *drafts; uint32_t n, vocab; };

static void trace_free(struct trace *t)
{
    free(t->logits);
    free(t->drafts);
}

static bool has_drafts(struct harness *h)
{
    return harness_desc(h)->has_drafter;
}

/* Runs ids[from, n) of sequence `seq` in chunks; false and a note when any row differs from `want` (fills it when empty). */
static bool same(struct harness *h, struct trace *want, uint32_t seq, const int32_t *ids, uint32_t from, uint32_t n, uint32_t chunk)
{
    struct arle_err err = ARLE_ERR_INIT;
    uint32_t V = harness_desc(h)->vocab;
    bool fill = want->logits == NULL;
    if (fill) {
        *want = (struct trace){ malloc((size_t)n * V * 4), calloc(n, 4), n, V };
        if (want->logits == NULL || want->drafts == NULL)
            return false;
    }
    for (uint32_t at = from; at < n; at += chunk) {
        const float *x;
        const int32_t *d = want->drafts + at;
        struct harness_piece p = { seq, at, ids + at, n - at < chunk ? n - at : chunk };
        if (harness_step(h, &p, 1, &x, has_drafts(h) ? &d : NULL, &err) < 0) {
            printf("# %s\n", err.msg);
            return false;
        }
        if (fill) {
            memcpy(want->logits + (size_t)at * V, x, (size_t)p.n * V * 4);
            memcpy(want->drafts + at, d, (size_t)p.n * 4);
        } else if (memcmp(x, want->logits + (size_t)at * V, (size_t)p.n * V * 4) != 0
                   || memcmp(d, want->drafts + at, (size_t)p.n * 4) != 0) {
            printf("# chunk of %u at %u differs\n", p.n, at);
            return false;
        }
    }
    return true;
}

struct subject { struct harness *h; struct golden *g; const struct golden_case *c; uint32_t n; struct trace want; };

static bool subject_open(struct subject *s, int model, uint32_t compute, const char *set)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness_options o = base(model, compute);
    o.sets[0] = set;
    *s = (struct subject){ 0 };
    if (golden_open(&s->g, dirs[model], &err) < 0 || harness_open(&s->h, &o, &err) < 0) {
        TAP_FAIL("%s: %s", models[model], err.msg);
        return false;
    }
    for (uint32_t i = 0; i < golden_count(s->g); i++)
        if (strcmp(golden_at(s->g, i)->name, "long_needle") == 0)
            s->c = golden_at(s->g, i);
    s->n = s->c->n_ids;
    harness_reset(s->h, 0);
    bool ok = same(s->h, &s->want, 0, s->c->ids, 0, s->n, s->n);
    if (!ok)
        TAP_FAIL("the whole prompt does not run");
    return ok;
}

static void subject_close(struct subject *s)
{
    trace_free(&s->want);
    harness_close(s->h);
    if (s->g != NULL)
        golden_close(s->g);
}

static void any_cut(struct subject *s)
{
    static const uint32_t chunks[] = { 1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 100, 127, 128, 129 };
    for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++) {
        harness_reset(s->h, 0);
        EXPECT(same(s->h, &s->want, 0, s->c->ids, 0, s->n, chunks[i]));
    }
    if (has_drafts(s->h))
        EXPECT_EQ(s->want.drafts[0], -1);
}

static void resumed(struct subject *s)
{
    static const uint32_t cuts[] = { 1, 2, 3, 15, 16, 17, 64, 100, 200 };
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        harness_reset(s->h, 1);
        EXPECT(same(s->h, &s->want, 1, s->c->ids, 0, cuts[i], 37));
        struct harness_snapshot *snap = harness_save(s->h, 1, cuts[i]);
        harness_restore(s->h, 5, snap);
        EXPECT(same(s->h, &s->want, 5, s->c->ids, cuts[i], s->n, 64));
        harness_snapshot_free(snap);
    }
}

/* Strangers decode beside it: fifteen sequences of other prompts, which advance by one token each while it is in chunks. */
static void in_company(struct subject *s)
{
    struct arle_err err = ARLE_ERR_INIT;
    uint32_t V = s->want.vocab, at = 0, turn = 0;
    for (uint32_t q = 0; q < 16; q++)
        harness_reset(s->h, q);
    while (at < s->n) {
        struct harness_piece p[16];
        const float *x;
        const int32_t *d = NULL;
        uint32_t take = s->n - at < 40 ? s->n - at : 40;
        for (uint32_t q = 0; q < 15; q++)
            p[q] = (struct harness_piece){ q + 1, turn, golden_at(s->g, q % golden_count(s->g))->ids + turn, 1 };
        p[15] = (struct harness_piece){ 0, at, s->c->ids + at, take };
        if (harness_step(s->h, p, 16, &x, has_drafts(s->h) ? &d : NULL, &err) < 0) {
            TAP_FAIL("%s", err.msg);
            return;
        }
        EXPECT(memcmp(x + 15 * (size_t)V, s->want.logits + (size_t)at * V, (size_t)take * V * 4) == 0);
        if (d != NULL)
            EXPECT(memcmp(d + 15, s->want.drafts + at, take * 4) == 0);
        at += take;
        turn++;
    }
}

static void invariants(int model, uint32_t compute)
{
    struct subject s;
    if (subject_open(&s, model, compute, NULL)) {
        any_cut(&s);
        resumed(&s);
        in_company(&s);
    }
    subject_close(&s);
}

static void same_bits_tiny_f32(void) { invariants(0, ARLE_F32); }
static void same_bits_tiny_bf16(void) { invariants(0, ARLE_BF16); }
static void same_bits_moe_f32(void) { invariants(2, ARLE_F32); }
static void same_bits_moe_bf16(void) { invariants(2, ARLE_BF16); }

static void one_thread_or_two(void)
{
    for (int model = 0; model < 3; model++) {
        struct subject one, two;
        uint32_t compute = model == 1 ? ARLE_F32 : ARLE_BF16;
        if (subject_open(&one, model, compute, "backend-cpu.threads=1") && subject_open(&two, model, compute, "backend-cpu.threads=2")) {
            EXPECT(memcmp(one.want.logits, two.want.logits, (size_t)one.n * one.want.vocab * 4) == 0);
            subject_close(&two);
        }
        subject_close(&one);
    }
}

/* ---- what the description says -------------------------------------------------------------------------------------- */

static void quantised_kv_stays_close(void)
{
    static const struct { uint32_t dtype; const char *name; double nll; } forms[] = {
        { ARLE_I8, "int8", 0.002 }, { ARLE_F8E4M3, "fp8", 0.01 }, { ARLE_I4G, "4-bit", 0.05 },
    };
    struct arle_err err = ARLE_ERR_INIT;
    struct golden *g;
    REQUIRE(golden_open(&g, dirs[0], &err) == 0);
    for (size_t i = 0; i < 3; i++) {
        struct harness_options o = base(0, ARLE_F32);
        struct harness *h;
        struct golden_result r;
        double worst = 0, sum = 0;
        o.kv_dtype = forms[i].dtype;
        if (harness_open(&h, &o, &err) < 0) {
            TAP_FAIL("%s: %s", forms[i].name, err.msg);
            continue;
        }
        EXPECT_EQ(harness_desc(h)->groups[0].dtype, forms[i].dtype);
        for (uint32_t k = 0; k < golden_count(g); k++) {
            EXPECT(golden_run(h, golden_at(g, k), 512, 1e9, false, &r, &err) == 0);
            worst = fmax(worst, r.nll_diff);
            sum += r.nll_diff;
            printf("#   %-16s %.5f\n", golden_at(g, k)->name, r.nll_diff);
        }
        printf("# KV %s: mean NLL difference %.5f over %u prompts, worst %.5f\n", forms[i].name, sum / golden_count(g), golden_count(g), worst);
        EXPECT(sum / golden_count(g) <= forms[i].nll);
        EXPECT(worst <= 4 * forms[i].nll);      /* one short prompt of text unlike the training data moves most */
        EXPECT(sum > 0);
        harness_close(h);
    }
    golden_close(g);
}

static void drafter_is_left_out_unless_wanted(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct harness_options o = base(0, ARLE_F32);
    struct harness *with, *without;
    REQUIRE(harness_open(&with, &o, &err) == 0);
    o.drafts = false;
    REQUIRE(harness_open(&without, &o, &err) == 0);         /* its tensors are known all the same */
    EXPECT_EQ(harness_desc(without)->has_drafter, 0);
    EXPECT(harness_desc(without)->weight_bytes < harness_desc(with)->weight_bytes);
    EXPECT(harness_desc(without)->groups[0].page_bytes * 3 == harness_desc(with)->groups[0].page_bytes * 2);
    EXPECT_EQ(harness_desc(without)->step_weight_bytes, harness_desc(with)->step_weight_bytes);
    harness_close(with);
    harness_close(without);
}

/* ---- rendered chats ------------------------------------------------------------------------------------------------- */

struct rendered { char text[16384]; size_t n; };

static int take_text(void *ctx, const char *text, size_t len, uint32_t flags)
{
    struct rendered *r = ctx;
    if (len > sizeof r->text - 1 - r->n)
        return -ENOSPC;
    memcpy(r->text + r->n, text, len);
    r->text[r->n += len] = '\0';
    return 0;
}

#define TOOLS "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"shell\",\"description\":\"Run a shell command and return" \
    " its output.\",\"parameters\":{\"type\":\"object\",\"properties\":{\"command\":{\"type\":\"string\",\"description\":\"The command" \
    " line to run.\"}},\"required\":[\"command\"]}}},{\"type\":\"function\",\"function\":{\"name\":\"python\",\"description\":\"Run" \
    " Python code and return what it prints.\",\"parameters\":{\"type\":\"object\",\"properties\":{\"code\":{\"type\":\"string\"," \
    "\"description\":\"The Python code to run.\"}},\"required\":[\"code\"]}}}],"
#define USER(text) "{\"role\":\"user\",\"content\":\"" text "\"}"
#define THINK "\"options\":{\"enable_thinking\":true},"

/* The requests behind the golden chats, but for long_needle, whose question is cut out of its own text. */
static const struct { const char *name, *request; } chats[] = {
    { "chat_capital", "{\"messages\":[" USER("What is the capital of Japan?") "],\"add_generation_prompt\":true}" },
    { "chat_hello", "{\"messages\":[" USER("Hello from ARLE") "],\"add_generation_prompt\":true}" },
    { "think_sum", "{" THINK "\"messages\":[" USER("What is 48 + 37?") "],\"add_generation_prompt\":true}" },
    { "tool_shell", "{" THINK TOOLS "\"messages\":[" USER("How many files are in /tmp?") "],\"add_generation_prompt\":true}" },
    { "tool_python", "{" TOOLS "\"messages\":[" USER("What is 48213 + 9977?") "],\"add_generation_prompt\":true}" },
    { "multi_turn", "{\"messages\":[" USER("My name is Rosa.") ",{\"role\":\"assistant\",\"content\":\"Nice to meet you, Rosa!\"},"
                    USER("What is my name?") "],\"add_generation_prompt\":true}" },
    { "story", "{\"messages\":[" USER("Tell me a story about a fox.") "],\"add_generation_prompt\":true}" },
    { "system", "{\"messages\":[{\"role\":\"system\",\"content\":\"Answer briefly.\"}," USER("What sound does a cow make?")
                "],\"add_generation_prompt\":true}" },
};

static void rendered_chats_are_the_golden_texts(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct golden *g;
    struct harness *h;
    struct harness_options o = base(0, ARLE_F32);
    REQUIRE(golden_open(&g, dirs[0], &err) == 0 && harness_open(&h, &o, &err) == 0);
    unsigned compared = 0;
    for (uint32_t i = 0; i < golden_count(g); i++)
        for (size_t k = 0; k < sizeof chats / sizeof chats[0]; k++) {
            if (strcmp(golden_at(g, i)->name, chats[k].name) != 0)
                continue;
            struct rendered r = { .n = 0 };
            struct arle_chat_sink sink = { &r, take_text, NULL };
            struct arle_chat_result res;
            EXPECT_EQ(harness_api(h)->chat_render(NULL, chats[k].request, strlen(chats[k].request), &sink, &res, &err), 0);
            EXPECT_STR(r.text, golden_at(g, i)->text);
            EXPECT_EQ(res.starts_in_reasoning, strncmp(chats[k].request, "{" THINK, strlen("{" THINK)) == 0);
            compared++;
        }
    EXPECT_EQ(compared, 8);
    EXPECT_STR(harness_desc(h)->chat_options, "{\"enable_thinking\": false, \"template\": \"3.5\"}");
    harness_close(h);
    golden_close(g);
}

/* With an argument: only the cases whose names contain it. */
#define CASE(fn) do { if (argc < 2 || strstr(#fn, argv[1]) != NULL) RUN(fn); } while (0)

int main(int argc, char **argv)
{
    const char *root = getenv("ARLE_TEST_MODELS") ? getenv("ARLE_TEST_MODELS") : "models";
    for (int i = 0; i < 3; i++)
        snprintf(dirs[i], sizeof dirs[i], "%s/%s", root, models[i]);
    CASE(tiny_f32);
    CASE(micro_f32);
    CASE(moe_f32);
    CASE(tiny_bf16);
    CASE(tiny_bf16_on_reference);
    CASE(tiny_bf16_on_avx2);
    CASE(tiny_bf16_on_avx512);
    CASE(tiny_bf16_on_amx);
    CASE(micro_bf16);
    CASE(moe_bf16);
    CASE(same_bits_tiny_f32);
    CASE(same_bits_tiny_bf16);
    CASE(same_bits_moe_f32);
    CASE(same_bits_moe_bf16);
    CASE(one_thread_or_two);
    CASE(quantised_kv_stays_close);
    CASE(drafter_is_left_out_unless_wanted);
    CASE(rendered_chats_are_the_golden_texts);
    return tap_done();
}
