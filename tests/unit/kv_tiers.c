/* Tiers below the device: what returns from them, from where, and what becomes of it when a tier is full, slow or wrong. */
#include "tap.h"
#include "kv_model.h"

#include <unistd.h>

static int32_t doc[1 << 16];
static uint8_t alice[KV_SALT_BYTES];

static struct kv_config base_config(void)
{
    return (struct kv_config){ .page_tokens = 16, .n_pages = 100, .n_slots = 4, .max_seq_tokens = 1024, .prefix_cache = true,
                               .snapshot_bytes = 8 * sizeof(struct fm_state), .snapshot_cadence = 512 };
}

static bool start(struct fm *fm, struct kv_config cfg, bool has_state, bool lazy)
{
    memset(fm, 0, sizeof *fm);
    if (fm_init(fm, &cfg, has_state, lazy) < 0) {
        printf("# %s\n", fm->err.msg);
        return false;
    }
    kv_salt(fm->kv, "alice", "", alice);
    return true;
}

static void stop(struct fm *fm)
{
    struct kv_stats st;
    fake_run_all(&fm->dev);
    EXPECT_EQ(kv_settle(fm->kv, 5000), 0);
    kv_flush(fm->kv);
    kv_stat(fm->kv, &st);
    EXPECT_EQ(st.pages_free, st.pages_total);
    EXPECT_EQ(st.host_bytes, 0);
    EXPECT_EQ(fm->wrong, 0);
    if (fm->wrong > 0)
        printf("# %s\n", fm->first_wrong);
    fm_fini(fm);
}

/* Runs eight prompts of which the device holds less than two, settling between them. */
static void fill(struct fm *fm, uint32_t n_docs)
{
    for (uint32_t i = 0; i < n_docs; i++) {
        fm_request(fm, alice, doc + 2000 * i, 800, NULL, 0, doc, 1);
        for (int k = 0; k < 20; k++) {
            kv_step_end(fm->kv);
            fake_run_all(&fm->dev);
            kv_settle(fm->kv, 1000);
        }
    }
}

static void host_case(bool has_state, bool lazy)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.host_bytes = 1 << 20;
    REQUIRE(start(&fm, cfg, has_state, lazy));
    kv_report_prefill(fm.kv, 100, 1000000);     /* computing is slower than even a fake copy */
    fill(&fm, 8);
    uint32_t want = has_state ? 768 : 799;
    for (int i = 0; i < 8; i++) {
        struct kv_hit hit = fm_request(&fm, alice, doc + 2000 * i, 800, NULL, 0, doc, 1);
        EXPECT_EQ(hit.cached_tokens, want);
        EXPECT(i > 4 || hit.from_host > 600);
        EXPECT_EQ(hit.from_host + hit.from_device, want);
        fake_run_all(&fm.dev);
    }
    struct kv_stats st;
    kv_step_end(fm.kv);
    kv_stat(fm.kv, &st);
    EXPECT(st.promoted_bytes[1] > 0 && st.demoted_bytes[1] > 0 && st.host_bytes > 0);
    stop(&fm);
}

static void prefixes_return_from_the_host(void) { host_case(true, true); }
static void pages_alone_return_from_the_host(void) { host_case(false, true); }
static void immediate_copies_need_no_waiting(void) { host_case(true, false); }

static void slow_fetches_are_not_made(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    cfg.host_bytes = 1 << 20;
    REQUIRE(start(&fm, cfg, true, true));
    kv_report_prefill(fm.kv, 1000000, 1);       /* computing is faster than any copy */
    fill(&fm, 8);
    struct kv_hit hit = fm_request(&fm, alice, doc, 800, NULL, 0, doc, 1);
    EXPECT_EQ(hit.cached_tokens, 0);
    EXPECT_EQ(hit.from_host, 0);
    stop(&fm);
}

static void parked_sequences_go_on(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    struct kv_seq *s[40];
    uint32_t n[40];
    cfg.host_bytes = 4 << 20;
    cfg.n_slots = 4;
    REQUIRE(start(&fm, cfg, true, true));
    for (int i = 0; i < 40; i++) {              /* the pages hold two of them at a time */
        struct kv_hit hit;
        n[i] = 600 + 5 * i;
        REQUIRE(fm_open(&fm, alice, doc + 700 * i, n[i], &s[i], &hit) == 0);
        EXPECT(fm_prefill(&fm, s[i], alice, hit.cached_tokens, n[i], 128));
        EXPECT_EQ(fm_decode(&fm, s[i], alice, 5), 0);
        EXPECT_EQ(kv_seq_park(s[i]), 0);
        EXPECT_EQ(kv_seq_slot(s[i]), -1);
    }
    for (int round = 0; round < 3; round++)
        for (int i = 0; i < 40; i++) {
            int r = kv_seq_resume(s[i]);
            EXPECT_EQ(r, 0);
            for (int k = 0; k < 7; k++)
                EXPECT_EQ(fm_decode(&fm, s[i], alice, 6 + k), 0);
            for (int k = 0; k < 100 && (r = kv_seq_park(s[i])) == -ENOSPC; k++) {       /* the resume is still being copied */
                fake_pump(&fm.dev, 50);
                kv_poll(fm.kv);
            }
            EXPECT_EQ(r, 0);
        }
    for (int i = 0; i < 40; i++)
        kv_seq_close(s[i], true);
    struct kv_stats st;
    kv_step_end(fm.kv);
    kv_stat(fm.kv, &st);
    EXPECT_EQ(st.parked, 160);
    EXPECT_EQ(st.resumed, 120);
    stop(&fm);
}

static void parking_needs_room(void)
{
    struct fm fm;
    struct kv_seq *s;
    struct kv_hit hit;
    REQUIRE(start(&fm, base_config(), true, true));
    REQUIRE(fm_open(&fm, alice, doc, 600, &s, &hit) == 0);
    EXPECT_EQ(kv_seq_park(s), -ENOSPC);
    EXPECT(fm_prefill(&fm, s, alice, 0, 600, 128));     /* and it can go on where it is */
    kv_seq_close(s, true);
    stop(&fm);
}

int main(void)
{
    uint64_t rng = 1;
    for (size_t i = 0; i < sizeof doc / sizeof *doc; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        doc[i] = (int32_t)(rng >> 40);
    }
    RUN(prefixes_return_from_the_host);
    RUN(pages_alone_return_from_the_host);
    RUN(immediate_copies_need_no_waiting);
    RUN(slow_fetches_are_not_made);
    RUN(parked_sequences_go_on);
    RUN(parking_needs_room);
    return tap_done();
}
