/*
 * The trained checkpoints through the engine on the CPU, in f32: prompt log-probabilities, greedy tokens and drafts of the
 * reference; and the same bits whether a sequence runs alone or among others, in large or small chunks, cold or from the
 * prefix cache at any position and in any tier, undisturbed or after it lost its pages.
 * With ON_CUDA the same on a GPU, in bf16 and deterministic mode (the reference within the bounds of cuda_golden); skips without one.
 */
#include "kv/kv.h"
#include "plugin/registry.h"
#include "sched/engine.h"
#include "tap.h"
#include <json-c/json.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef ON_CUDA
#define ON_CUDA 0
#endif
#define MAX_CASES 32
#define MAX_NEW 48

struct gcase { char name[48]; int32_t ids[2048]; uint32_t n; double nll; int32_t greedy[MAX_NEW]; double margin[MAX_NEW]; uint32_t n_greedy;
               int32_t draft[2100]; uint32_t n_draft; };
struct answer { int32_t ids[MAX_NEW]; float lp[MAX_NEW], top[MAX_NEW], top_lp[MAX_NEW][ARLE_MAX_TOP]; uint32_t n, cached; double nll; int32_t draft[2100]; int finish; };

static struct gcase cases[MAX_CASES];
static uint32_t n_cases;
static struct registry *reg;
static struct config *cfg;
static const struct plugin_info *backend, *model;
static char dir[1024];
static struct arle_err err;

static uint32_t ints(json_object *o, const char *key, int32_t *out, uint32_t cap)
{
    json_object *a;
    if (!json_object_object_get_ex(o, key, &a) || !json_object_is_type(a, json_type_array))
        return 0;
    uint32_t n = (uint32_t)json_object_array_length(a);
    for (uint32_t i = 0; i < n && i < cap; i++)
        out[i] = json_object_get_int(json_object_array_get_idx(a, i));
    return n < cap ? n : cap;
}

static bool read_cases(void)
{
    char path[1100];
    snprintf(path, sizeof path, "%s/golden.json", dir);
    json_object *root = json_object_from_file(path), *v;
    n_cases = 0;
    if (root == NULL)
        return false;
    json_object_object_foreach(root, name, o) {
        struct gcase *c = &cases[n_cases];
        if (!json_object_is_type(o, json_type_object) || n_cases == MAX_CASES || !json_object_object_get_ex(o, "ids", &v))
            continue;
        memset(c, 0, sizeof *c);
        snprintf(c->name, sizeof c->name, "%s", name);
        c->n = ints(o, "ids", c->ids, 2048);
        c->n_greedy = ints(o, "greedy_ids", c->greedy, MAX_NEW);
        c->n_draft = ints(o, "mtp_draft_argmax_per_position", c->draft, 2100);
        if (json_object_object_get_ex(o, "mean_nll", &v))
            c->nll = json_object_get_double(v);
        if (json_object_object_get_ex(o, "greedy_margin", &v))
            for (uint32_t i = 0; i < c->n_greedy && i < json_object_array_length(v); i++)
                c->margin[i] = json_object_get_double(json_object_array_get_idx(v, i));
        n_cases++;
    }
    json_object_put(root);
    return n_cases > 0;
}

static bool find_plugins(const char *name)
{
    const char *models = getenv("ARLE_TEST_MODELS"), *plugins = getenv("ARLE_TEST_PLUGINS");
    char set[1200], path[1100], text[65536];
    if (models == NULL || plugins == NULL)
        return false;
    snprintf(dir, sizeof dir, "%s/%s", models, name);
    snprintf(set, sizeof set, "plugins.dir=%s", plugins);
    const char *sets[] = { set, "backend-cuda.deterministic=yes" };
    if (cfg == NULL && (config_open(&cfg, NULL, sets, ON_CUDA ? 2 : 1, &err) < 0 || registry_open(&reg, cfg, REGISTRY_LENIENT, &err) < 0)) {
        printf("Bail out! %s\n", err.msg);
        exit(1);
    }
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "re");
    size_t n = f != NULL ? fread(text, 1, sizeof text, f) : 0;
    if (f != NULL)
        fclose(f);
    return n > 0 && registry_backend(reg, ON_CUDA ? "cuda" : "cpu", &backend, &err) == 0 && registry_model(reg, text, n, &model, &err) == 0 && read_cases();
}

static struct engine_config plain_config(void)
{
    return (struct engine_config){ .name = "golden", .model_dir = dir, .max_seqs = 1, .max_tokens = 600, .max_queue = 64,
                                   .compute = ON_CUDA ? "bf16" : "f32", .step_graphs = ON_CUDA, .run_ahead = ON_CUDA, .parity = true, .manual = true, .page_tokens = 16, .kv_bytes = 96 << 20,
                                   .context = 1024 };
}

static void drain(struct request *rq, struct answer *a)
{
    struct token_event ev;
    uint32_t n_prompt = 0;
    while (request_next(rq, &ev) == 1) {
        if (ev.kind == EV_PROMPT && !isnan(ev.logprob))
            a->nll -= ev.logprob, n_prompt++;
        if (ev.kind == EV_DRAFT && ev.pos < 2100)
            a->draft[ev.pos] = ev.id;
        if (ev.kind == EV_FINISH)
            a->finish = ev.finish;
        if (ev.kind != EV_TOKEN || a->n == MAX_NEW)
            continue;
        a->ids[a->n] = ev.id, a->lp[a->n] = ev.logprob, a->top[a->n] = ev.top_logit;
        memcpy(a->top_lp[a->n++], ev.top_logprobs, sizeof ev.top_logprobs);
    }
    a->nll /= n_prompt ? n_prompt : 1;
    struct request_usage u;
    if (request_usage(rq, &u))
        a->cached = u.cached_tokens;
}

/* Answers to all cases at once (or one after the other), `times` in a row on the same engine; the last ones are kept. */
static void answer_all(struct engine_config c, bool at_once, int times, bool prompt_logprobs, bool drafts, struct answer *out, struct engine_stats *st)
{
    struct engine *e = NULL;
    struct request *rq[MAX_CASES];
    if (engine_open(&e, &c, backend->ops, backend->ctx, 0, model->ops, model->ctx, &err) < 0) {
        TAP_FAIL("engine_open: %s", err.msg);
        return;
    }
    for (int k = 0; k < times; k++) {
        memset(out, 0, MAX_CASES * sizeof *out);
        for (uint32_t i = 0; i < n_cases; i++) {
            struct request_args a = { .tokens = cases[i].ids, .n_tokens = cases[i].n, .max_new = cases[i].n_greedy, .n = 1,
                                      .prompt_logprobs = prompt_logprobs, .drafts = drafts,
                                      .sampling = { .top_p = 1, .repetition = 1, .want_logprobs = true, .n_top = 20 } };
            rq[i] = NULL;
            if (engine_submit(e, &a, &rq[i], NULL, &err) < 0)
                TAP_FAIL("%s: %s", cases[i].name, err.msg);
            while (!at_once && engine_turn(e) > 0)
                ;
        }
        while (engine_turn(e) > 0)
            ;
        for (uint32_t i = 0; i < n_cases; i++) {
            if (rq[i] != NULL)
                drain(rq[i], &out[i]);
            request_unref(rq[i]);
        }
    }
    engine_turn(e);
    engine_stat(e, st);
    engine_close(e);
}

static void same_bits(const struct answer *a, const struct answer *b, const char *what)
{
    for (uint32_t i = 0; i < n_cases; i++)
        if (a[i].n != b[i].n || memcmp(a[i].ids, b[i].ids, sizeof a->ids) || memcmp(a[i].lp, b[i].lp, sizeof a->lp) ||
            memcmp(a[i].top, b[i].top, sizeof a->top) || memcmp(a[i].top_lp, b[i].top_lp, sizeof a->top_lp)) {
            uint32_t t = 0;
            while (t < a[i].n && a[i].ids[t] == b[i].ids[t] && memcmp(a[i].top_lp[t], b[i].top_lp[t], sizeof a[i].top_lp[t]) == 0)
                t++;
            TAP_FAIL("%s differs %s, first at token %u of %u", cases[i].name, what, t, a[i].n);
        }
}

static struct answer ref[MAX_CASES], other[MAX_CASES];

/* bf16 is bound as in cuda_golden. */
static double nll_bound(uint32_t n)
{
    return !ON_CUDA ? 1e-3 : n < 64 ? 0.01 * sqrt(64.0 / n) : 0.01;
}

static void reference(void)
{
    struct engine_stats st;
    struct engine_config c = plain_config();
    c.drafts = cases[0].n_draft > 0;
    answer_all(c, false, 1, true, c.drafts, ref, &st);
    for (uint32_t i = 0; i < n_cases; i++) {
        const struct gcase *g = &cases[i];
        EXPECT_NEAR(ref[i].nll, g->nll, nll_bound(g->n));
        EXPECT(ON_CUDA || ref[i].n == g->n_greedy);
        for (uint32_t t = 0; t < g->n_greedy && t < ref[i].n; t++) {
            if (ref[i].ids[t] != g->greedy[t] && g->margin[t] < (ON_CUDA ? 0.1 : 0.02))
                break;      /* another rounding may choose otherwise; what follows differs */
            if (ref[i].ids[t] != g->greedy[t])
                TAP_FAIL("%s: token %u is %d, expected %d (margin %g)", g->name, t, ref[i].ids[t], g->greedy[t], g->margin[t]);
        }
        for (uint32_t p = 0; c.drafts && p + 1 < g->n; p++)     /* the draft for p + 2 is made at p + 1 */
            if (!ON_CUDA && ref[i].draft[p + 2] != g->draft[p])
                TAP_FAIL("%s: draft for position %u is %d, expected %d", g->name, p + 2, ref[i].draft[p + 2], g->draft[p]);
    }
}

static void invariance(void)
{
    struct engine_stats st;
    struct engine_config c = plain_config();
    answer_all(c, false, 1, false, false, ref, &st);
    c.max_seqs = 16;
    answer_all(c, true, 1, false, false, other, &st);
    same_bits(ref, other, "among others");
    c.max_tokens = 80;
    answer_all(c, true, 1, false, false, other, &st);
    same_bits(ref, other, "in small chunks");
    c.prefix_cache = true;
    c.kv_snapshot_bytes = 64 << 20;
    c.kv_snapshot_cadence = 64;
    c.max_tokens = 600;
    answer_all(c, true, 2, false, false, other, &st);
    same_bits(ref, other, "from the prefix cache");
    uint32_t warm = 0;
    for (uint32_t i = 0; i < n_cases; i++)
        warm += other[i].cached > 0;
    EXPECT(warm > 0);
}

struct sizes { uint64_t page, slot; uint32_t page_tokens; };

/* What the model's caches take. */
static struct sizes sizes_of(const struct engine_config *c)
{
    struct sizes z = { 0 };
    struct engine *e = NULL;
    struct engine_stats st;
    if (engine_open(&e, c, backend->ops, backend->ctx, 0, model->ops, model->ctx, &err) < 0) {
        TAP_FAIL("engine_open: %s", err.msg);
        return z;
    }
    const struct arle_model_desc *d = engine_model(e);
    engine_stat(e, &st);
    for (uint32_t i = 0; i < d->n_groups; i++)
        *(d->groups[i].kind == ARLE_CACHE_PAGED ? &z.page : &z.slot) += d->groups[i].kind == ARLE_CACHE_PAGED ? d->groups[i].page_bytes : d->groups[i].record_bytes;
    z.page_tokens = st.page_tokens;
    engine_close(e);
    return z;
}

/* A pool that holds the longest case and little more: others are moved away and computed again. */
static void scarce(void)
{
    struct engine_stats st;
    struct engine_config c = plain_config();
    uint32_t longest = 0;
    for (uint32_t i = 0; i < n_cases; i++)
        longest = cases[i].n + MAX_NEW > longest ? cases[i].n + MAX_NEW : longest;
    struct sizes z = sizes_of(&c);
    c.page_tokens = z.page_tokens;
    c.max_seqs = 16;
    c.context = longest;
    c.kv_bytes = z.slot * 17 + z.page * (longest / c.page_tokens + 4);
    answer_all(c, true, 1, false, false, other, &st);
    same_bits(ref, other, "when pages are scarce");
    EXPECT_EQ(st.errors, 0);
}

#define RESUME_NEW 4

/* One request to its end. salt keeps it from what others remembered. */
static void ask(struct engine *e, const int32_t *ids, uint32_t n, uint32_t max_new, const char *salt, struct answer *out)
{
    struct request *rq = NULL;
    struct request_args a = { .tokens = ids, .n_tokens = n, .max_new = max_new, .n = 1, .ignore_eos = true, .cache_salt = salt,
                              .sampling = { .top_p = 1, .repetition = 1, .want_logprobs = true, .n_top = 20 } };
    memset(out, 0, sizeof *out);
    if (engine_submit(e, &a, &rq, NULL, &err) < 0) {
        TAP_FAIL("submit: %s", err.msg);
        return;
    }
    struct request_usage u;
    for (int idle = 0; idle < 5000 && !request_usage(rq, &u);)      /* moves between tiers run on a thread of their own */
        if (engine_turn(e) <= 0 && ++idle)
            usleep(1000);
    drain(rq, out);
    request_unref(rq);
}

static bool same_answer(const struct answer *a, const struct answer *b)
{
    return a->n == b->n && memcmp(a->ids, b->ids, sizeof a->ids) == 0 && memcmp(a->lp, b->lp, sizeof a->lp) == 0
        && memcmp(a->top, b->top, sizeof a->top) == 0 && memcmp(a->top_lp, b->top_lp, sizeof a->top_lp) == 0;
}

static const struct gcase *longest_case(void)
{
    const struct gcase *c = &cases[0];
    for (uint32_t i = 1; i < n_cases; i++)
        if (cases[i].n > c->n)
            c = &cases[i];
    return c;
}

/* A prompt is remembered up to position p, then a longer one continues from there: the bits of a cold run, from exactly p. */
static void resume_anywhere(void)
{
    struct engine_config c = plain_config();
    struct engine *cold = NULL, *warm = NULL;
    const struct gcase *g = longest_case();
    struct answer want, got;
    uint32_t n = g->n < 300 ? g->n : 300, resumed = 0;
    bool every = getenv("ARLE_TEST_LARGE") != NULL;         /* all positions: minutes instead of seconds */
    c.context = 512;
    REQUIRE(engine_open(&cold, &c, backend->ops, backend->ctx, 0, model->ops, model->ctx, &err) == 0);
    ask(cold, g->ids, n, RESUME_NEW, NULL, &want);
    engine_close(cold);
    EXPECT_EQ(want.n, RESUME_NEW);
    c.prefix_cache = true;
    c.kv_snapshot_bytes = 256 << 20;
    REQUIRE(engine_open(&warm, &c, backend->ops, backend->ctx, 0, model->ops, model->ctx, &err) == 0);
    for (uint32_t p = 1; p < n; p++) {
        char salt[16];
        if (!every && p % 13 != 0 && p % 32 > 1 && p % 64 != 63)
            continue;               /* every alignment to groups of entries and pages */
        snprintf(salt, sizeof salt, "%u", p);
        ask(warm, g->ids, p, 1, salt, &got);
        EXPECT_EQ(got.cached, 0);
        ask(warm, g->ids, n, RESUME_NEW, salt, &got);
        EXPECT_EQ(got.cached, p);
        resumed += got.cached == p;
        if (!same_answer(&want, &got))
            TAP_FAIL("%s: resumed at %u of %u: other bits", g->name, p, n);
    }
    printf("# resumed at %u positions\n", resumed);
    EXPECT(resumed > 20);
    struct kv_stats st;
    engine_turn(warm);
    engine_kv_stat(warm, &st);
    EXPECT_EQ(engine_model(warm)->max_saves > 0, st.snapshots_inside > 0);
    struct engine_stats es;
    engine_stat(warm, &es);
    EXPECT_EQ(ON_CUDA, es.graph_launches > 0);
    engine_close(warm);
}

/* Turns until so many bytes have come to the disk and no more follow. */
static void let_write(struct engine *e)
{
    struct kv_stats st = { 0 };
    uint64_t was = 1;
    for (int i = 0; i < 100 && (st.demoted_bytes[2] == 0 || st.demoted_bytes[2] != was); i++) {
        was = st.demoted_bytes[2];
        for (int k = 0; k < 50; k++) {
            engine_turn(e);
            usleep(1000);
        }
        engine_kv_stat(e, &st);
    }
}

/* A prompt that left the device comes back from host memory, and after a restart from disk: the bits of a cold run. */
static void other_tiers(void)
{
    struct engine_config c = plain_config();
    struct engine *e = NULL;
    const struct gcase *g = longest_case();
    struct answer want, got;
    struct kv_stats st;
    uint32_t n = g->n < 300 ? g->n : 300;
    char folder[] = "/tmp/arle-tiers-XXXXXX", secret[64], command[64];
    REQUIRE(mkdtemp(folder) != NULL);
    snprintf(secret, sizeof secret, "%s/secret", folder);
    FILE *f = fopen(secret, "we");          /* a secret of its own, or a restart would see nothing */
    REQUIRE(f != NULL && fputs("thirty-two bytes that nobody saw", f) >= 0 && fclose(f) == 0 && chmod(secret, 0600) == 0);
    c.context = 512;
    c.prefix_cache = true;
    c.kv_snapshot_bytes = 8 * sizes_of(&c).slot;        /* few, so that the flood below takes them */
    c.secret_file = secret;
    c.kv_host_bytes = 256 << 20;
    c.kv_disk_dir = folder;
    c.kv_disk_bytes = 1ull << 30;
    REQUIRE(engine_open(&e, &c, backend->ops, backend->ctx, 0, model->ops, model->ctx, &err) == 0);
    ask(e, g->ids, n, RESUME_NEW, NULL, &want);
    EXPECT_EQ(want.cached, 0);
    for (int i = 0; i < 12; i++) {
        char salt[16];
        snprintf(salt, sizeof salt, "flood %d", i);
        ask(e, g->ids, n, 1, salt, &got);
    }
    ask(e, g->ids, n, RESUME_NEW, NULL, &got);
    EXPECT(got.cached > 0);
    EXPECT(same_answer(&want, &got));
    engine_turn(e);
    engine_kv_stat(e, &st);
    EXPECT(st.demoted_bytes[1] > 0 && st.promoted_bytes[1] > 0);
    let_write(e);
    engine_close(e);
    REQUIRE(engine_open(&e, &c, backend->ops, backend->ctx, 0, model->ops, model->ctx, &err) == 0);
    ask(e, g->ids, n, RESUME_NEW, NULL, &got);
    EXPECT(got.cached > 0);
    EXPECT(same_answer(&want, &got));
    engine_turn(e);
    engine_kv_stat(e, &st);
    EXPECT(st.promoted_bytes[2] > 0);
    engine_close(e);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    EXPECT_EQ(system(command), 0);
}

static void checkpoint(const char *name)
{
    char label[100];
    if (!find_plugins(name)) {
        snprintf(label, sizeof label, "%s # SKIP plugins or model not here: %.40s", name, err.msg);
        printf("ok %d - %s\n", ++tap_n, label);
        return;
    }
    snprintf(label, sizeof label, "%s: reference", name);
    tap_run(label, reference);
    snprintf(label, sizeof label, "%s: same bits in any company", name);
    tap_run(label, invariance);
    snprintf(label, sizeof label, "%s: same bits when pages are scarce", name);
    tap_run(label, scarce);
    snprintf(label, sizeof label, "%s: resumed anywhere, the same bits", name);
    tap_run(label, resume_anywhere);
    snprintf(label, sizeof label, "%s: from host and disk, the same bits", name);
    tap_run(label, other_tiers);
}

int main(void)
{
    checkpoint("qwen35-tiny");
    checkpoint("qwen35-micro");
    checkpoint("qwen35-moe-tiny");
    if (!ON_CUDA)
        checkpoint("deepseek-v4-tiny");
    if (reg != NULL)
        registry_close(reg);
    config_close(cfg);
    return tap_done();
}
