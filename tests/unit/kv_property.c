/*
 * Random workloads against the whole plane: many sequences at once over a small vocabulary of shared beginnings, with decoding,
 * rejected drafts, cancels, parking and pools that are far too small. After everything: no restored byte was ever wrong, all
 * books balance, and every mechanism was in fact used.
 */
#include "tap.h"
#include "kv_model.h"

#include <unistd.h>

#define MAX_RUN 12

struct run {
    struct kv_seq *s;
    const uint8_t *salt;
    uint32_t n_prompt, at, left;        /* prefilled so far; tokens to decode */
    bool parked;
};

static uint64_t rng = 42;

static uint32_t rnd(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(rng >> 16) % n;
}

/* Prompts from a grammar with few choices, so that they share beginnings of all lengths. */
static uint32_t make_prompt(int32_t *out, uint32_t max)
{
    uint32_t n = 0, parts = 1 + rnd(6);
    for (uint32_t p = 0; p < parts; p++) {
        uint32_t which = rnd(3), len = 1 + (which * 97 + p * 61) % 190;
        if (rnd(8) == 0)
            len = 1 + rnd(len);
        for (uint32_t i = 0; i < len && n < max; i++)
            out[n++] = (int32_t)(p * 1000003 + which * 7919 + i);
    }
    return n;
}

static void close_run(struct run *r, bool keep)
{
    kv_seq_close(r->s, keep);
    r->s = NULL;
}

static void try_open(struct fm *fm, struct run *r, uint8_t salts[3][KV_SALT_BYTES])
{
    int32_t prompt[2048];
    struct kv_hit hit;
    r->n_prompt = make_prompt(prompt, 1500);
    r->salt = salts[rnd(3)];
    int e = fm_open(fm, r->salt, prompt, r->n_prompt, &r->s, &hit);
    if (e < 0) {
        r->s = NULL;
        EXPECT(e == -EAGAIN);
        return;
    }
    EXPECT(hit.cached_tokens < r->n_prompt);
    EXPECT(hit.matched_tokens >= hit.cached_tokens);
    EXPECT_EQ(hit.from_device + hit.from_host + hit.from_disk + hit.from_store, hit.cached_tokens);
    r->at = hit.cached_tokens;
    r->left = rnd(120);
    r->parked = false;
    for (uint32_t i = rnd(3); i > 0; i--)
        kv_seq_mark(r->s, rnd(r->n_prompt + 1));
}

static void advance(struct fm *fm, struct run *r)
{
    uint32_t n;
    if (r->at < r->n_prompt) {
        uint32_t want = r->at + 64 + rnd(300), room = rnd(FM_SIDE + 1);
        uint32_t end = fm_chunk(fm, r->s, r->salt, r->at, want < r->n_prompt ? want : r->n_prompt, room);
        EXPECT(end > r->at && end <= r->n_prompt);
        r->at = end;
        return;
    }
    kv_seq_tokens(r->s, &n);
    if (r->left == 0) {
        close_run(r, rnd(8) != 0);
        return;
    }
    if (kv_seq_reserve(r->s, n + 4) < 0) {
        if (kv_seq_park(r->s) == 0)
            r->parked = true;
        else
            close_run(r, true);
        return;
    }
    if (rnd(6) == 0) {                  /* drafts that are all rejected */
        kv_seq_push(r->s, -9);
        kv_seq_push(r->s, -8);
        kv_seq_truncate(r->s, n);
    }
    kv_seq_push(r->s, (int32_t)(n * 31 + rnd(2)));
    fm_step(fm, r->s, r->salt, n, n + 1);
    kv_seq_computed(r->s, n + 1);
    r->left--;
}

static void one_round(struct fm *fm, struct run *r, uint8_t salts[3][KV_SALT_BYTES])
{
    if (r->s == NULL) {
        if (rnd(3) == 0)
            try_open(fm, r, salts);
    } else if (r->parked) {
        int e = kv_seq_resume(r->s);
        EXPECT(e == 0 || e == -EAGAIN || e == -EINPROGRESS);
        if (e == 0)
            r->parked = false;
        else if (e == -EAGAIN && rnd(40) == 0)
            close_run(r, true);
    } else if (rnd(200) == 0) {
        close_run(r, rnd(2));
    } else if (rnd(60) == 0) {
        r->parked = kv_seq_park(r->s) == 0;
    } else {
        advance(fm, r);
    }
}

/* Pins come and go at random over prompts of the same grammar, computed or not, and must end with the cache. */
static void pin_or_unpin(struct fm *fm, uint8_t salts[3][KV_SALT_BYTES])
{
    int32_t prompt[2048];
    uint32_t n = make_prompt(prompt, 1500), mark = rnd(n + 1);
    struct kv_pinned p;
    const uint8_t *salt = salts[rnd(3)];
    int r = rnd(3) > 0 ? kv_pin(fm->kv, salt, prompt, n, &mark, 1, &p, &fm->err) : kv_unpin(fm->kv, salt, prompt, n, &p, &fm->err);
    EXPECT(r == 0 || r == -ENOENT || r == -ENOSPC);
    EXPECT(r < 0 || p.tokens <= n);
    if (rnd(100) == 0)
        kv_unpin_all(fm->kv);
}

static void workload(struct kv_config cfg, bool has_state, uint32_t rounds, struct kv_stats *st)
{
    struct fm fm = { 0 };
    struct run run[MAX_RUN] = { 0 };
    uint8_t salts[3][KV_SALT_BYTES];
    fm.dev.rng = 7 + rng;
    REQUIRE(fm_init(&fm, &cfg, has_state, true) == 0);
    for (int i = 0; i < 3; i++)
        kv_salt(fm.kv, i < 2 ? "a" : "b", i == 1 ? "x" : "", salts[i]);
    for (uint32_t i = 0; i < rounds && fm.wrong == 0 && !tap_case_failed; i++) {
        one_round(&fm, &run[rnd(MAX_RUN)], salts);
        kv_step_end(fm.kv);
        kv_poll(fm.kv);
        fake_pump(&fm.dev, rnd(12));
        if (rnd(3000) == 0)
            kv_flush(fm.kv);
        if (rnd(50) == 0)
            pin_or_unpin(&fm, salts);
    }
    for (int i = 0; i < MAX_RUN; i++)
        if (run[i].s != NULL)
            close_run(&run[i], rnd(2));
    fake_run_all(&fm.dev);
    EXPECT_EQ(kv_settle(fm.kv, 5000), 0);
    kv_stat(fm.kv, st);
    EXPECT(st->pinned_pages <= (uint64_t)cfg.n_pages / 2 && (st->pinned_pages > 0) == (st->pins > 0));
    kv_unpin_all(fm.kv);
    kv_flush(fm.kv);
    struct kv_stats end;
    kv_stat(fm.kv, &end);
    EXPECT_EQ(end.pages_free, end.pages_total);
    EXPECT_EQ(end.pages_cached, 0);
    EXPECT_EQ(end.pins + end.pinned_pages + end.pinned_states, 0);
    EXPECT_EQ(kv_pages_lost(fm.kv), 0);
    EXPECT_EQ(end.slots_free, end.slots_total);
    EXPECT_EQ(end.snapshots, 0);
    EXPECT_EQ(end.snapshot_bytes, 0);
    EXPECT_EQ(end.host_bytes, 0);
    EXPECT_EQ(fm.wrong, 0);
    if (fm.wrong > 0)
        printf("# %s\n", fm.first_wrong);
    fm_fini(&fm);
}

static struct kv_config tight(uint32_t pt)
{
    return (struct kv_config){ .page_tokens = pt, .n_pages = 6000 / pt, .n_slots = 8, .max_seq_tokens = 2048, .prefix_cache = true,
                               .snapshot_bytes = 24 * sizeof(struct fm_state), .snapshot_cadence = 256 };
}

static void check_use(const struct kv_stats *st, bool has_state)
{
    printf("# %" PRIu64 " of %" PRIu64 " lookups hit, %" PRIu64 " of %" PRIu64 " tokens; %" PRIu64 " pages and %" PRIu64 " of %" PRIu64
           " snapshots evicted; parked %" PRIu64 ", resumed %" PRIu64 "; bytes down %" PRIu64
           " up %" PRIu64 "; pinned %" PRIu64 " pages, %" PRIu64 " yielded\n", st->hits, st->lookups, st->hit_tokens, st->lookup_tokens,
           st->pages_evicted, st->snapshots_evicted, st->snapshots_taken, st->parked, st->resumed, st->demoted_bytes[1],
           st->promoted_bytes[1], st->pinned_pages, st->pins_yielded);
    EXPECT(st->hits > st->lookups / (has_state ? 12 : 3));
    EXPECT(st->hit_tokens > 0 && st->pages_evicted > 0);
    EXPECT_EQ(has_state, st->snapshots_taken > 0);
    EXPECT_EQ(has_state, st->snapshots_inside > 0 && st->snapshots_inside < st->snapshots_taken);
    EXPECT_EQ(has_state, st->snapshots_restored > 0);
    EXPECT_EQ(has_state, st->snapshots_evicted > 0);
}

static void device_only(void)
{
    static const uint32_t pts[] = { 8, 16, 64, 128, 256 };
    for (int i = 0; i < 5; i++)
        for (int state = 0; state < 2; state++) {
            struct kv_stats st = { 0 };
            workload(tight(pts[i]), state, 15000, &st);
            check_use(&st, state);
        }
}

static void odd_grid_and_quota(void)
{
    struct kv_stats st = { 0 };
    struct kv_config cfg = tight(16);
    cfg.snapshot_align = 1;
    cfg.tenant_quota_pct = 40;
    workload(cfg, true, 15000, &st);
    check_use(&st, true);
}

static void with_host_tier(void)
{
    static const uint32_t pts[] = { 16, 128 };
    for (int i = 0; i < 2; i++)
        for (int state = 0; state < 2; state++) {
            struct kv_stats st = { 0 };
            struct kv_config cfg = tight(pts[i]);
            cfg.host_bytes = 200000;
            workload(cfg, state, 40000, &st);
            check_use(&st, state);
            EXPECT(st.parked > 100 && st.resumed > 50);
            EXPECT(st.promoted_bytes[1] > 0 && st.demoted_bytes[1] > 0);
        }
}

/* Twice over the same folder, so that the second run begins with what the first one left on disk. */
static void with_disk(void)
{
    char dir[64], cmd[100];
    snprintf(dir, sizeof dir, "/tmp/arle-kv-property-%d", (int)getpid());
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    uint64_t promoted = 0;
    for (int i = 0; i < 4; i++) {
        struct kv_stats st = { 0 };
        struct kv_config cfg = tight(i < 2 ? 16 : 64);
        cfg.host_bytes = i % 2 == 0 ? 0 : 100000;
        cfg.disk_dir = dir;
        cfg.disk_bytes = i < 2 ? 4 << 20 : 300000;          /* the second pair evicts on disk all the time */
        cfg.disk_fsync = KV_FSYNC_NEVER;
        workload(cfg, true, 20000, &st);
        check_use(&st, true);
        promoted += st.promoted_bytes[2];
        EXPECT(st.demoted_bytes[2] > 0);
    }
    EXPECT(promoted > 0);
    EXPECT_EQ(system(cmd), 0);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        rng = strtoull(argv[1], NULL, 10);
    RUN(device_only);
    RUN(odd_grid_and_quota);
    RUN(with_host_tier);
    RUN(with_disk);
    return tap_done();
}
