/* Pins: what an operator wants to stay stays, for whom it gives way all the same, and that the books are right afterwards. */
#include "tap.h"
#include "kv_model.h"

#include <unistd.h>

static int32_t doc[1 << 16];
static uint8_t alice[KV_SALT_BYTES], bob[KV_SALT_BYTES];

static struct kv_config base_config(void)
{
    return (struct kv_config){ .page_tokens = 16, .n_pages = 100, .n_slots = 4, .max_seq_tokens = 2048, .prefix_cache = true,
                               .snapshot_bytes = 16 * sizeof(struct fm_state), .snapshot_cadence = 512 };
}

static bool start(struct fm *fm, struct kv_config cfg, bool has_state, bool lazy)
{
    if (!fm_start(fm, cfg, has_state, lazy))
        return false;
    kv_salt(fm->kv, "alice", "", alice);
    kv_salt(fm->kv, "bob", "", bob);
    return true;
}

static struct kv_stats stats(struct fm *fm)
{
    struct kv_stats st;
    kv_step_end(fm->kv);
    kv_stat(fm->kv, &st);
    return st;
}

static uint32_t ask(struct fm *fm, const uint8_t *salt, const int32_t *prompt, uint32_t n)
{
    struct kv_hit hit = fm_request(fm, salt, prompt, n, NULL, 0, doc, 1);
    fake_run_all(&fm->dev);
    return hit.cached_tokens;
}

/* Until all that can move has moved. */
static void settle(struct fm *fm)
{
    for (int i = 0; i < 20; i++) {
        kv_settle(fm->kv, 1000);
        fake_run_all(&fm->dev);
    }
}

/* More other prompts than the pool, and the snapshots, hold. */
static void flood(struct fm *fm, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        ask(fm, bob, doc + 20000 + 1000 * i, 320);
        kv_settle(fm->kv, 1000);
    }
}

static int pin(struct fm *fm, const int32_t *prompt, uint32_t n, struct kv_pinned *out)
{
    return kv_pin(fm->kv, alice, prompt, n, NULL, 0, out, &fm->err);
}

static void pinned_prompts_stay(bool has_state)
{
    struct fm fm;
    struct kv_pinned p;
    uint32_t want = has_state ? 448 : 499, depth = has_state ? 448 : 500;
    REQUIRE(start(&fm, base_config(), has_state, true));
    ask(&fm, alice, doc, 500);
    ask(&fm, alice, doc + 2000, 500);                   /* the control */
    REQUIRE(pin(&fm, doc, 500, &p) == 0);
    EXPECT_EQ(p.tokens, depth);
    EXPECT_EQ(p.pages, has_state ? 28 : 32);
    EXPECT_EQ(p.states, has_state);
    flood(&fm, 30);
    EXPECT_EQ(ask(&fm, alice, doc + 2000, 500), 0);
    EXPECT_EQ(ask(&fm, alice, doc, 500), want);
    flood(&fm, 30);
    EXPECT_EQ(ask(&fm, alice, doc, 500), want);
    EXPECT_EQ(stats(&fm).pins_yielded, 0);
    EXPECT_EQ(kv_unpin(fm.kv, alice, doc, 500, &p, &fm.err), 0);
    EXPECT_EQ(p.all_pages + p.all_states + p.pins, 0);
    EXPECT_EQ(kv_unpin(fm.kv, alice, doc, 500, &p, &fm.err), -ENOENT);
    flood(&fm, 30);
    EXPECT_EQ(ask(&fm, alice, doc, 500), 0);
    fm_stop(&fm);
}

static void what_is_pinned_stays(void) { pinned_prompts_stay(true); }
static void pages_alone_stay_too(void) { pinned_prompts_stay(false); }

static void a_mark_is_pinned_for_others(void)
{
    struct fm fm;
    struct kv_pinned p;
    int32_t other[500];
    uint32_t mark = 200;            /* the end of a system prompt, say: its state is at 192 */
    REQUIRE(start(&fm, base_config(), true, true));
    fm_request(&fm, alice, doc, 500, &mark, 1, doc, 1);
    REQUIRE(kv_pin(fm.kv, alice, doc, 500, &mark, 1, &p, &fm.err) == 0);
    EXPECT_EQ(p.states, 2);
    flood(&fm, 30);
    memcpy(other, doc, 200 * sizeof *doc);
    memcpy(other + 200, doc + 5000, 300 * sizeof *doc);
    EXPECT_EQ(ask(&fm, alice, other, 500), 192);
    EXPECT_EQ(ask(&fm, alice, doc, 500), 448);
    fm_stop(&fm);
}

static void overlapping_pins_count(void)
{
    struct fm fm;
    struct kv_pinned p;
    int32_t two[500];
    uint32_t mark = 256;
    memcpy(two, doc, 256 * sizeof *doc);
    memcpy(two + 256, doc + 5000, 244 * sizeof *doc);
    REQUIRE(start(&fm, base_config(), true, true));
    fm_request(&fm, alice, doc, 500, &mark, 1, doc, 1);
    EXPECT_EQ(ask(&fm, alice, two, 500), 256);
    REQUIRE(kv_pin(fm.kv, alice, doc, 500, &mark, 1, &p, &fm.err) == 0);
    EXPECT_EQ(p.all_pages, 28);
    EXPECT_EQ(p.all_states, 2);
    REQUIRE(kv_pin(fm.kv, alice, two, 500, &mark, 1, &p, &fm.err) == 0);
    EXPECT_EQ(p.all_pages, 28 + 12);                    /* 256 tokens are common */
    EXPECT_EQ(p.all_states, 3);
    for (int i = 0; i < 3; i++)
        REQUIRE(kv_pin(fm.kv, alice, two, 500, &mark, 1, &p, &fm.err) == 0);
    EXPECT_EQ(p.pins, 2);
    EXPECT_EQ(p.all_pages, 28 + 12);
    EXPECT_EQ(kv_unpin(fm.kv, alice, doc, 500, &p, &fm.err), 0);
    EXPECT_EQ(p.all_pages, 28);
    EXPECT_EQ(p.all_states, 2);
    flood(&fm, 30);
    EXPECT_EQ(ask(&fm, alice, two, 500), 448);
    EXPECT_EQ(ask(&fm, alice, doc, 500), 256);
    EXPECT_EQ(kv_unpin_all(fm.kv), 1);
    fm_stop(&fm);
}

/* The next turn of a chat has more to offer than the last one had. */
static void pinning_again_renews(void)
{
    struct fm fm;
    struct kv_pinned p;
    REQUIRE(start(&fm, base_config(), true, true));
    fm_request(&fm, alice, doc, 300, NULL, 0, doc + 300, 1);
    REQUIRE(pin(&fm, doc, 600, &p) == 0);
    EXPECT_EQ(p.tokens, 301);                        /* a sequence is remembered where it ended */
    ask(&fm, alice, doc, 600);
    REQUIRE(pin(&fm, doc, 600, &p) == 0);
    EXPECT_EQ(p.tokens, 576);
    EXPECT_EQ(p.pins, 1);
    EXPECT_EQ(p.all_pages, 36);
    EXPECT_EQ(p.all_states, 1);
    fm_stop(&fm);
}

static void a_pin_beyond_the_bound_changes_nothing(void)
{
    struct fm fm;
    struct kv_pinned p;
    struct kv_config cfg = base_config();
    struct kv_stats before, after;
    cfg.pin_pct = 40;
    REQUIRE(start(&fm, cfg, true, true));
    EXPECT_EQ(pin(&fm, doc, 500, &p), -ENOENT);
    ask(&fm, alice, doc, 300);
    REQUIRE(pin(&fm, doc, 300, &p) == 0);
    ask(&fm, alice, doc, 720);                          /* 44 pages to 704: 40 may be pinned */
    before = stats(&fm);
    EXPECT_EQ(pin(&fm, doc, 720, &p), -ENOSPC);
    EXPECT(strcmp(fm.err.param, "kv.pin_pct") == 0 && strstr(fm.err.msg, "kv.pin_pct") != NULL);
    after = stats(&fm);
    EXPECT_EQ(before.pins, after.pins);
    EXPECT_EQ(before.pinned_pages, after.pinned_pages);
    EXPECT_EQ(before.pinned_states, after.pinned_states);
    flood(&fm, 30);
    EXPECT(ask(&fm, alice, doc, 300) >= 256);
    fm_stop(&fm);
    cfg.prefix_cache = false;
    REQUIRE(start(&fm, cfg, true, true));
    EXPECT_EQ(pin(&fm, doc, 500, &p), -EINVAL);
    EXPECT(strcmp(fm.err.param, "kv.prefix_cache") == 0);
    fm_stop(&fm);
    cfg = base_config();
    cfg.snapshot_bytes = 3 * sizeof(struct fm_state);   /* half of three is one */
    REQUIRE(start(&fm, cfg, true, true));
    uint32_t mark = 128;
    fm_request(&fm, alice, doc, 300, &mark, 1, doc, 0);
    EXPECT_EQ(kv_pin(fm.kv, alice, doc, 300, &mark, 1, &p, &fm.err), -ENOSPC);
    EXPECT_EQ(pin(&fm, doc, 300, &p), 0);
    fm_stop(&fm);
}

/* All that may be pinned is, and one sequence grows over the whole pool: it must not wait for ever. */
static void a_growing_sequence_gets_the_whole_pool(void)
{
    for (int pct = 50; pct <= 100; pct += 50) {
        struct fm fm;
        struct kv_pinned p;
        struct kv_config cfg = base_config();
        struct kv_seq *s;
        struct kv_hit hit;
        cfg.pin_pct = (uint32_t)pct;
        cfg.snapshot_bytes = 64 * sizeof(struct fm_state);
        REQUIRE(start(&fm, cfg, true, true));
        for (int i = 0; i < 20; i++) {                  /* 5 pages each */
            ask(&fm, alice, doc + 1000 * i, 81);
            fake_run_all(&fm.dev);
            int r = pin(&fm, doc + 1000 * i, 81, &p);
            if (r < 0)
                break;
        }
        uint64_t pinned = stats(&fm).pinned_pages;
        EXPECT(pinned >= 40 && pinned <= (uint64_t)pct);
        REQUIRE(fm_open(&fm, bob, doc + 40000, 64, &s, &hit) == 0);
        EXPECT(fm_prefill(&fm, s, bob, 0, 64, 64));
        for (uint32_t n = 64; n < 1600; n++)
            if (fm_decode(&fm, s, bob, doc[n]) < 0) {
                printf("# stuck at %u\n", n);
                tap_case_failed = 1;
                break;
            }
        EXPECT_EQ(kv_seq_reserve(s, 1601), -EAGAIN);    /* the pool has no more */
        struct kv_stats st = stats(&fm);
        EXPECT_EQ(st.pins_yielded, pinned);
        EXPECT_EQ(st.pinned_pages + st.pinned_states + st.pins, 0);     /* there is no other tier */
        kv_seq_close(s, true);
        fm_stop(&fm);
    }
}

static void a_prompt_that_fits_gets_in(void)
{
    struct fm fm;
    struct kv_pinned p;
    struct kv_seq *a, *b;
    struct kv_hit hit;
    REQUIRE(start(&fm, base_config(), true, false));
    ask(&fm, alice, doc, 700);
    REQUIRE(pin(&fm, doc, 700, &p) == 0);
    REQUIRE(fm_open(&fm, bob, doc + 10000, 480, &a, &hit) == 0);        /* 30 pages: beside the pin */
    EXPECT_EQ(stats(&fm).pins_yielded, 0);
    EXPECT_EQ(kv_seq_open(fm.kv, bob, doc + 20000, 71 * 16, &b, &hit, &fm.err), -EAGAIN);
    EXPECT_EQ(stats(&fm).pins_yielded, 0);              /* it would not have been enough */
    REQUIRE(kv_seq_open(fm.kv, bob, doc + 20000, 70 * 16, &b, &hit, &fm.err) == 0);
    EXPECT_EQ(stats(&fm).pins_yielded, 40);
    kv_seq_close(a, false);
    kv_seq_close(b, false);
    fm_stop(&fm);
}

static void a_flush_leaves_pins(void)
{
    struct fm fm;
    struct kv_pinned p;
    REQUIRE(start(&fm, base_config(), true, true));
    ask(&fm, alice, doc, 500);
    ask(&fm, alice, doc + 2000, 500);
    REQUIRE(pin(&fm, doc, 500, &p) == 0);
    kv_flush(fm.kv);
    struct kv_stats st = stats(&fm);
    EXPECT_EQ(st.pages_cached, 28);
    EXPECT_EQ(st.snapshots, 1);
    EXPECT_EQ(ask(&fm, alice, doc + 2000, 500), 0);
    EXPECT_EQ(ask(&fm, alice, doc, 500), 448);
    fm_stop(&fm);
}

static void quotas_count_pins_and_leave_them(void)
{
    struct fm fm;
    struct kv_pinned p;
    struct kv_config cfg = base_config();
    cfg.tenant_quota_pct = 30;
    REQUIRE(start(&fm, cfg, true, true));
    ask(&fm, alice, doc, 440);
    REQUIRE(pin(&fm, doc, 440, &p) == 0);
    for (int i = 1; i < 9; i++)
        ask(&fm, alice, doc + 2000 * i, 160);           /* 10 pages, and 3 are left to it */
    EXPECT(stats(&fm).pages_cached <= 27 + 11);
    EXPECT_EQ(ask(&fm, alice, doc, 440), 384);
    fm_stop(&fm);
}

/* ---- tiers ------------------------------------------------------------------------------------------------------------ */

/* Somebody needs the whole device; what was pinned waits on the host, whoever else wants to go there, and comes back. */
static void pins_keep_their_place_on_the_host(bool has_state, bool lazy)
{
    struct fm fm;
    struct kv_pinned p;
    struct kv_config cfg = base_config();
    struct kv_seq *s;
    struct kv_hit hit;
    uint32_t want = has_state ? 448 : 499;
    cfg.host_bytes = 2 * 60 * 160;                      /* 60 pages, or 120 without states */
    REQUIRE(start(&fm, cfg, has_state, lazy));
    kv_report_prefill(fm.kv, 100, 1000000);
    ask(&fm, alice, doc, 500);
    REQUIRE(pin(&fm, doc, 500, &p) == 0);
    settle(&fm);
    REQUIRE(fm_open(&fm, bob, doc + 40000, 1600, &s, &hit) == 0);
    struct kv_stats st = stats(&fm);
    EXPECT_EQ(st.pins_yielded, has_state ? 28 : 32);
    EXPECT_EQ(st.pinned_pages, has_state ? 28 : 32);
    EXPECT_EQ(st.pins, 1);
    kv_seq_close(s, false);
    flood(&fm, 30);
    struct kv_hit back = fm_request(&fm, alice, doc, 500, NULL, 0, doc, 1);
    EXPECT_EQ(back.cached_tokens, want);
    EXPECT_EQ(back.from_host, want);
    fake_run_all(&fm.dev);
    EXPECT_EQ(kv_unpin(fm.kv, alice, doc, 500, &p, &fm.err), 0);
    flood(&fm, 30);
    EXPECT_EQ(ask(&fm, alice, doc, 500), 0);
    fm_stop(&fm);
}

static void pins_wait_on_the_host(void) { pins_keep_their_place_on_the_host(true, true); }
static void pinned_pages_wait_on_the_host(void) { pins_keep_their_place_on_the_host(false, true); }
static void pins_wait_where_copies_are_immediate(void) { pins_keep_their_place_on_the_host(true, false); }

/* A prompt that waits on the host may not push pins off the device when it is fetched for a sequence that fits beside them. */
static void promotions_do_not_move_pins(void)
{
    struct fm fm;
    struct kv_pinned p;
    struct kv_config cfg = base_config();
    cfg.host_bytes = 1 << 20;
    cfg.pin_pct = 80;
    REQUIRE(start(&fm, cfg, true, true));
    kv_report_prefill(fm.kv, 100, 1000000);
    for (int i = 0; i < 3; i++) {
        ask(&fm, alice, doc + 2000 * i, 400);           /* 24 pages each */
        REQUIRE(pin(&fm, doc + 2000 * i, 400, &p) == 0);
        kv_settle(fm.kv, 1000);
    }
    flood(&fm, 6);
    EXPECT_EQ(ask(&fm, bob, doc + 20000, 320), 256);
    EXPECT_EQ(stats(&fm).pins_yielded, 0);
    for (int i = 0; i < 3; i++)
        EXPECT_EQ(ask(&fm, alice, doc + 2000 * i, 400), 384);
    EXPECT_EQ(stats(&fm).pins_yielded, 0);
    fm_stop(&fm);
}

/* The staging area of a disk tier is small and everything has to pass: pins do not clog it, and end when their data is lost. */
static void pins_pass_through_to_the_disk(void)
{
    struct fm fm;
    struct kv_pinned p;
    struct kv_seq *s;
    struct kv_hit hit;
    struct kv_config cfg = base_config();
    char dir[64], cmd[128];
    snprintf(dir, sizeof dir, "/tmp/arle-kv-pin-%d", (int)getpid());
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    cfg.disk_dir = dir;
    cfg.disk_bytes = 64 << 20;
    cfg.disk_fsync = KV_FSYNC_NEVER;
    REQUIRE(start(&fm, cfg, true, true));
    kv_report_prefill(fm.kv, 100, 1000000);
    ask(&fm, alice, doc, 500);
    REQUIRE(pin(&fm, doc, 500, &p) == 0);
    settle(&fm);
    REQUIRE(fm_open(&fm, bob, doc + 40000, 1600, &s, &hit) == 0);
    kv_seq_close(s, false);
    EXPECT_EQ(stats(&fm).pinned_pages, 28);
    flood(&fm, 40);
    struct kv_hit back = fm_request(&fm, alice, doc, 500, NULL, 0, doc, 1);
    EXPECT_EQ(back.cached_tokens, 448);
    fake_run_all(&fm.dev);
    EXPECT_EQ(stats(&fm).pinned_pages, 28);
    fm_fini(&fm);
    EXPECT_EQ(fm.wrong, 0);
    REQUIRE(start(&fm, cfg, true, true));               /* entries survive a restart, pins do not */
    EXPECT_EQ(stats(&fm).pins, 0);
    kv_report_prefill(fm.kv, 100, 1000000);
    EXPECT_EQ(ask(&fm, alice, doc, 500), 448);
    fm_stop(&fm);
    EXPECT_EQ(system(cmd), 0);
}

int main(void)
{
    uint64_t rng = 1;
    for (size_t i = 0; i < sizeof doc / sizeof *doc; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        doc[i] = (int32_t)(rng >> 40);
    }
    RUN(what_is_pinned_stays);
    RUN(pages_alone_stay_too);
    RUN(a_mark_is_pinned_for_others);
    RUN(overlapping_pins_count);
    RUN(pinning_again_renews);
    RUN(a_pin_beyond_the_bound_changes_nothing);
    RUN(a_growing_sequence_gets_the_whole_pool);
    RUN(a_prompt_that_fits_gets_in);
    RUN(a_flush_leaves_pins);
    RUN(quotas_count_pins_and_leave_them);
    RUN(pins_wait_on_the_host);
    RUN(pinned_pages_wait_on_the_host);
    RUN(pins_wait_where_copies_are_immediate);
    RUN(promotions_do_not_move_pins);
    RUN(pins_pass_through_to_the_disk);
    return tap_done();
}
