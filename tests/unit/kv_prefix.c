/* Prefix reuse on the device: what hits, how deep, for whom, and that every restored byte is right. */
#include "tap.h"
#include "kv_model.h"
#include "kv/kv_int.h"

static int32_t doc[1 << 16];
static uint8_t alice[KV_SALT_BYTES], bob[KV_SALT_BYTES];

static struct kv_config base_config(void)
{
    return (struct kv_config){ .page_tokens = 16, .n_pages = 400, .n_slots = 4, .max_seq_tokens = 4096, .prefix_cache = true,
                               .snapshot_bytes = 64 * sizeof(struct fm_state), .snapshot_cadence = 1024 };
}

static bool start(struct fm *fm, struct kv_config cfg, bool has_state)
{
    memset(fm, 0, sizeof *fm);
    if (fm_init(fm, &cfg, has_state, true) < 0) {
        printf("# %s\n", fm->err.msg);
        return false;
    }
    kv_salt(fm->kv, "alice", "", alice);
    kv_salt(fm->kv, "bob", "", bob);
    return true;
}

static void stop(struct fm *fm)
{
    struct kv_stats st;
    fake_run_all(&fm->dev);
    kv_settle(fm->kv, 1000);
    kv_flush(fm->kv);
    kv_step_end(fm->kv);
    kv_stat(fm->kv, &st);
    EXPECT_EQ(st.pages_free, st.pages_total);       /* nothing leaks */
    EXPECT_EQ(st.slots_free, st.slots_total);
    EXPECT_EQ(st.snapshots, 0);
    EXPECT_EQ(st.snapshot_bytes, 0);
    EXPECT_EQ(fm->wrong, 0);
    if (fm->wrong > 0)
        printf("# %s\n", fm->first_wrong);
    fm_fini(fm);
}

static void same_prompt_hits_to_its_last_chunk(void)
{
    struct fm fm;
    REQUIRE(start(&fm, base_config(), true));
    struct kv_hit cold = fm_request(&fm, alice, doc, 1000, NULL, 0, doc, 5);
    EXPECT_EQ(cold.cached_tokens, 0);
    EXPECT_EQ(cold.miss, KV_MISS_COLD);
    struct kv_hit warm = fm_request(&fm, alice, doc, 1000, NULL, 0, doc, 5);
    EXPECT_EQ(warm.cached_tokens, 960);             /* the largest multiple of 64 */
    EXPECT_EQ(warm.from_device, 960);
    EXPECT_EQ(warm.miss, KV_MISS_LAST_TOKEN);
    fake_run_all(&fm.dev);
    EXPECT_EQ(fm.computed, 1000 + 5 + 40 + 5);
    stop(&fm);
}

static void prompt_on_the_grid_hits_too(void)
{
    struct fm fm;
    REQUIRE(start(&fm, base_config(), true));
    fm_request(&fm, alice, doc, 640, NULL, 0, doc, 3);
    EXPECT_EQ(fm_request(&fm, alice, doc, 640, NULL, 0, doc, 3).cached_tokens, 576);
    EXPECT_EQ(fm_request(&fm, alice, doc, 641, NULL, 0, doc, 3).cached_tokens, 640);
    stop(&fm);
}

static void pages_alone_hit_to_the_last_token(void)
{
    struct fm fm;
    REQUIRE(start(&fm, base_config(), false));
    fm_request(&fm, alice, doc, 1000, NULL, 0, doc + 5000, 5);
    struct kv_hit warm = fm_request(&fm, alice, doc, 1000, NULL, 0, doc + 6000, 5);
    EXPECT_EQ(warm.cached_tokens, 999);
    EXPECT_EQ(warm.miss, KV_MISS_LAST_TOKEN);
    int32_t fork[1000];
    memcpy(fork, doc, sizeof fork);
    fork[507] = -5;
    warm = fm_request(&fm, alice, fork, 1000, NULL, 0, doc + 6000, 5);
    EXPECT_EQ(warm.cached_tokens, 507);             /* inside a page: its copy is shared up to there */
    EXPECT_EQ(warm.miss, KV_MISS_DIVERGED);
    stop(&fm);
}

static void short_system_prompt_is_shared(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.page_tokens = 128;          /* the snapshot lies inside the first page */
    REQUIRE(start(&fm, cfg, true));
    int32_t prompt[400];
    uint32_t mark = 100;
    for (int user = 0; user < 4; user++) {
        memcpy(prompt, doc, 100 * sizeof *doc);
        memcpy(prompt + 100, doc + 1000 * (user + 1), 300 * sizeof *doc);
        struct kv_hit hit = fm_request(&fm, alice, prompt, 400, &mark, 1, doc, 3);
        EXPECT_EQ(hit.cached_tokens, user == 0 ? 0 : 64);
    }
    stop(&fm);
}

/* Without a mark: the second prompt shows where prompts diverge, the third one profits. */
static void divergence_is_learned(void)
{
    struct fm fm;
    REQUIRE(start(&fm, base_config(), true));
    int32_t prompt[900];
    uint32_t want[4] = { 0, 0, 512, 512 };
    for (int user = 0; user < 4; user++) {
        memcpy(prompt, doc, 520 * sizeof *doc);
        memcpy(prompt + 520, doc + 1000 * (user + 1), 380 * sizeof *doc);
        struct kv_hit hit = fm_request(&fm, alice, prompt, 900, NULL, 0, doc, 3);
        EXPECT_EQ(hit.cached_tokens, want[user]);
        EXPECT_EQ(hit.matched_tokens, user == 0 ? 0 : 520);
        EXPECT_EQ(hit.miss, user == 0 ? KV_MISS_COLD : user == 1 ? KV_MISS_NO_STATE : KV_MISS_DIVERGED);
    }
    stop(&fm);
}

/*
 * A chat re-sent each turn: system, then (user, answer) pairs. keep: the answer returns as it was sampled; otherwise its first
 * 40 tokens (the reasoning) are dropped, and the text diverges 4 tokens before the generation prompt ended.
 */
static void chat(bool keep, uint32_t pt)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.page_tokens = pt;
    cfg.n_pages = 4096 * 2 / pt;
    REQUIRE(start(&fm, cfg, true));
    int32_t text[4096];
    uint32_t n = 100, msg = 90, gen = 120, marks[2] = { 100, 0 };
    memcpy(text, doc, 100 * sizeof *doc);
    for (uint32_t turn = 0; turn < 12; turn++) {
        uint32_t stable = n + msg - 4;
        memcpy(text + n, doc + 1000 + turn * 500, msg * sizeof *doc);
        n += msg;
        marks[1] = stable;
        uint64_t before = fm.computed;
        struct kv_hit hit = fm_request(&fm, alice, text, n, marks, 2, doc + 20000 + turn * 300, gen);
        fake_run_all(&fm.dev);
        uint64_t prefilled = fm.computed - before - gen;
        /* New since the last turn: the message; without reasoning also the answer as it reads now. */
        uint32_t fresh = turn == 0 ? n : keep ? msg : msg + 4 + gen - 40;
        EXPECT(prefilled <= fresh + 64);
        EXPECT_EQ(hit.cached_tokens, n - prefilled);
        if (keep) {
            memcpy(text + n, doc + 20000 + turn * 300, gen * sizeof *doc);
            n += gen;
        } else {
            n = stable;
            text[n++] = -1;
            memcpy(text + n, doc + 20000 + turn * 300 + 40, (gen - 40) * sizeof *doc);
            n += gen - 40;
        }
    }
    stop(&fm);
}

static void chat_recomputes_only_the_new_message(void) { chat(true, 16); }
static void chat_without_reasoning_too(void) { chat(false, 16); }
static void chat_with_large_pages(void) { chat(true, 256); }
static void chat_with_large_pages_without_reasoning(void) { chat(false, 256); }

static void tenants_share_nothing(void)
{
    struct fm fm;
    uint8_t narrowed[KV_SALT_BYTES];
    REQUIRE(start(&fm, base_config(), true));
    kv_salt(fm.kv, "alice", "mine", narrowed);
    fm_request(&fm, alice, doc, 500, NULL, 0, doc, 3);
    EXPECT_EQ(fm_request(&fm, bob, doc, 500, NULL, 0, doc, 3).matched_tokens, 0);
    EXPECT_EQ(fm_request(&fm, narrowed, doc, 500, NULL, 0, doc, 3).matched_tokens, 0);
    EXPECT_EQ(fm_request(&fm, alice, doc, 500, NULL, 0, doc, 3).cached_tokens, 448);
    EXPECT_EQ(fm_request(&fm, bob, doc, 500, NULL, 0, doc, 3).cached_tokens, 448);
    stop(&fm);
}

static void a_tenant_keeps_to_its_quota(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.tenant_quota_pct = 25;      /* 100 pages */
    REQUIRE(start(&fm, cfg, true));
    fm_request(&fm, bob, doc, 640, NULL, 0, doc, 3);
    for (int i = 0; i < 20; i++)
        fm_request(&fm, alice, doc + 1000 * i, 640, NULL, 0, doc, 3);
    struct kv_stats st;
    kv_step_end(fm.kv);
    kv_stat(fm.kv, &st);
    EXPECT(st.pages_cached <= 100 + 42);
    EXPECT(st.pages_cached >= 100);
    EXPECT_EQ(fm_request(&fm, bob, doc, 640, NULL, 0, doc, 3).cached_tokens, 576);     /* the other one is untouched */
    stop(&fm);
}

static void a_tenant_keeps_to_its_share_of_states(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.snapshot_bytes = 16 * sizeof(struct fm_state);
    cfg.tenant_quota_pct = 50;
    REQUIRE(start(&fm, cfg, true));
    fm_request(&fm, bob, doc, 160, NULL, 0, doc, 3);
    uint32_t own = fm.kv->tenants[0].dev_snaps;
    EXPECT(own > 0 && own <= 8);
    for (int i = 0; i < 20; i++)
        fm_request(&fm, alice, doc + 1000 * i, 160, NULL, 0, doc, 3);
    EXPECT_EQ(fm.kv->n_tenants, 2);
    EXPECT_EQ(fm.kv->tenants[0].dev_snaps, own);
    EXPECT_EQ(fm.kv->tenants[1].dev_snaps, 8);
    EXPECT_EQ(fm_request(&fm, bob, doc, 160, NULL, 0, doc, 3).cached_tokens, 128);
    stop(&fm);
}

static void the_reason_of_a_miss(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.n_pages = 100;
    REQUIRE(start(&fm, cfg, true));
    for (int i = 0; i < 4; i++)
        EXPECT_EQ(fm_request(&fm, alice, doc + 2000 * i, 800, NULL, 0, doc, 1).miss, KV_MISS_COLD);
    EXPECT_EQ(fm_request(&fm, alice, doc, 800, NULL, 0, doc, 1).miss, KV_MISS_EVICTED);
    stop(&fm);
    cfg.prefix_cache = false;
    REQUIRE(start(&fm, cfg, true));
    fm_request(&fm, alice, doc, 800, NULL, 0, doc, 1);
    EXPECT_EQ(fm_request(&fm, alice, doc, 800, NULL, 0, doc, 1).miss, KV_MISS_OFF);
    stop(&fm);
}

static void strict_means_the_same_chunk_borders(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.strict = true;
    REQUIRE(start(&fm, cfg, true));
    fm.check_border = true;
    uint64_t rng = 3;
    for (int i = 0; i < 300; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        uint32_t n = 2 + (rng >> 33) % 1500, mark = (rng >> 50) % n;
        fm_request(&fm, alice, doc + (rng >> 60) * 100 % 300, n, &mark, 1, doc + 9000, (rng >> 20) % 90);
    }
    struct kv_stats st;
    kv_stat(fm.kv, &st);
    EXPECT(st.hits > 200);
    stop(&fm);
}

static void full_and_too_long(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.n_pages = 20;
    cfg.n_slots = 2;
    REQUIRE(start(&fm, cfg, true));
    struct kv_seq *a, *b, *c;
    struct kv_hit hit;
    EXPECT_EQ(kv_seq_open(fm.kv, alice, doc, 16 * 21, &a, &hit, &fm.err), -E2BIG);
    EXPECT_EQ(kv_seq_open(fm.kv, alice, doc, 5000, &a, &hit, &fm.err), -E2BIG);
    EXPECT_EQ(kv_seq_open(fm.kv, alice, doc, 0, &a, &hit, &fm.err), -EINVAL);
    REQUIRE(kv_seq_open(fm.kv, alice, doc, 160, &a, &hit, &fm.err) == 0);
    EXPECT_EQ(kv_seq_open(fm.kv, bob, doc, 161, &b, &hit, &fm.err), -EAGAIN);
    REQUIRE(kv_seq_open(fm.kv, bob, doc, 160, &b, &hit, &fm.err) == 0);
    EXPECT_EQ(kv_seq_open(fm.kv, bob, doc, 1, &c, &hit, &fm.err), -EAGAIN);
    EXPECT_EQ(kv_seq_reserve(a, 161), -EAGAIN);
    kv_seq_close(b, false);
    EXPECT_EQ(kv_seq_reserve(a, 161), 0);
    EXPECT_EQ(kv_seq_reserve(a, 4097), -E2BIG);
    kv_seq_close(a, false);
    stop(&fm);
}

static void running_ahead_publishes_what_is_known(void)
{
    struct fm fm;
    REQUIRE(start(&fm, base_config(), false));
    struct kv_seq *s;
    struct kv_hit hit;
    REQUIRE(kv_seq_open(fm.kv, alice, doc, 31, &s, &hit, &fm.err) == 0);
    kv_seq_reserve(s, 34);
    kv_seq_computed(s, 32);             /* the step that computes position 31 is enqueued before its token is known */
    kv_seq_push(s, doc[31]);
    kv_seq_push(s, 77);                 /* a draft */
    kv_seq_truncate(s, 32);
    kv_seq_close(s, true);
    REQUIRE(kv_seq_open(fm.kv, alice, doc, 40, &s, &hit, &fm.err) == 0);
    EXPECT_EQ(hit.cached_tokens, 32);
    kv_seq_close(s, false);
    stop(&fm);
}

/* The books of the tree are full, and what was entered first is one chain of which only the end may go: it is found. */
static void a_full_tree_finds_its_leaves(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    enum { LONG = 12001 * 4 };
    static int32_t prompt[LONG];
    cfg.page_tokens = 4;
    cfg.n_pages = 17000;
    cfg.max_seq_tokens = 1 << 16;
    REQUIRE(start(&fm, cfg, false));
    for (int32_t i = 0; i < LONG; i++)
        prompt[i] = i * 7919;
    for (int i = 0; i < 5000 && !tap_case_failed; i++) {
        struct kv_seq *s;
        struct kv_hit hit;
        uint8_t salt[KV_SALT_BYTES];
        char name[16];
        uint32_t n = i == 0 ? LONG : 4;
        snprintf(name, sizeof name, "tenant %d", i);
        kv_salt(fm.kv, name, "", salt);
        REQUIRE(kv_seq_open(fm.kv, salt, prompt, n, &s, &hit, &fm.err) == 0);
        for (uint32_t at = 0; at < n; at += 4)
            kv_seq_computed(s, at + 4);
        kv_seq_close(s, true);
    }
    stop(&fm);
}

int main(void)
{
    uint64_t rng = 1;
    for (size_t i = 0; i < sizeof doc / sizeof *doc; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        doc[i] = (int32_t)(rng >> 40);
    }
    RUN(same_prompt_hits_to_its_last_chunk);
    RUN(prompt_on_the_grid_hits_too);
    RUN(pages_alone_hit_to_the_last_token);
    RUN(short_system_prompt_is_shared);
    RUN(divergence_is_learned);
    RUN(chat_recomputes_only_the_new_message);
    RUN(chat_without_reasoning_too);
    RUN(chat_with_large_pages);
    RUN(chat_with_large_pages_without_reasoning);
    RUN(tenants_share_nothing);
    RUN(a_tenant_keeps_to_its_quota);
    RUN(a_tenant_keeps_to_its_share_of_states);
    RUN(the_reason_of_a_miss);
    RUN(strict_means_the_same_chunk_borders);
    RUN(full_and_too_long);
    RUN(running_ahead_publishes_what_is_known);
    RUN(a_full_tree_finds_its_leaves);
    return tap_done();
}
