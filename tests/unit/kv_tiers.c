/* Tiers below the device: what returns from them, from where, and what becomes of it when a tier is full, slow or wrong. */
#include "tap.h"
#include "kv_model.h"
#include "kv/kv_disk.h"

#include <fcntl.h>
#include <ftw.h>
#include <pthread.h>
#include <sys/stat.h>
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
    if (!fm_start(fm, cfg, has_state, lazy))
        return false;
    kv_salt(fm->kv, "alice", "", alice);
    return true;
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
    fm_stop(&fm);
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
    EXPECT_EQ(hit.miss, KV_MISS_NOT_WORTH);
    fm_stop(&fm);
}

/* Opens a prompt that waits on the host and polls until it is ready; whoever asked does not come back. */
static void abandon(struct fm *fm, const int32_t *prompt, uint32_t n)
{
    struct kv_seq *s;
    struct kv_hit hit;
    REQUIRE(kv_seq_open(fm->kv, alice, prompt, n, &s, &hit, &fm->err) == -EINPROGRESS);
    int ready = 0;
    for (int i = 0; i < 20 && ready == 0; i++) {
        fake_run_all(&fm->dev);
        ready = kv_poll(fm->kv);
    }
    EXPECT(ready > 0);
}

/* What was fetched for somebody who has gone holds nobody up: neither who needs the room, nor who wants the same, nor more of it. */
static void abandoned_fetches_keep_nobody_waiting(void)
{
    struct fm fm;
    struct kv_seq *s, *t;
    struct kv_hit hit;
    struct kv_config cfg = base_config();
    int32_t other[800];
    cfg.host_bytes = 1 << 20;
    REQUIRE(start(&fm, cfg, true, true));
    kv_report_prefill(fm.kv, 100, 1000000);
    fill(&fm, 8);
    abandon(&fm, doc, 800);
    REQUIRE(kv_seq_open(fm.kv, alice, doc + 40000, 960, &s, &hit, &fm.err) == 0);       /* 60 of 100 pages */
    kv_seq_close(s, false);

    fake_run_all(&fm.dev);
    abandon(&fm, doc + 2000, 800);
    REQUIRE(kv_seq_open(fm.kv, alice, doc + 2000, 800, &s, &hit, &fm.err) == 0);
    EXPECT_EQ(hit.cached_tokens, 768);
    REQUIRE(kv_seq_open(fm.kv, alice, doc + 2000, 800, &t, &hit, &fm.err) == 0);        /* nothing is left of the promotion */
    kv_seq_close(s, false);
    kv_seq_close(t, false);

    fake_run_all(&fm.dev);
    abandon(&fm, doc + 4000, 800);
    memcpy(other, doc + 4000, 520 * sizeof *doc);
    memcpy(other + 520, doc + 50000, 280 * sizeof *doc);
    REQUIRE(fm_open(&fm, alice, other, 800, &s, &hit) == 0);
    EXPECT_EQ(hit.cached_tokens, 512);          /* the cadence left a state there */
    kv_seq_close(s, false);
    fm_stop(&fm);
}

/* More of them than there are places: the one that has been ready longest goes. */
static void abandoned_fetches_leave_places(void)
{
    struct fm fm;
    struct kv_seq *s;
    struct kv_hit hit;
    struct kv_config cfg = base_config();
    enum { MANY = 70 };
    cfg.n_pages = 400;
    cfg.host_bytes = 4 << 20;
    cfg.snapshot_bytes = 100 * sizeof(struct fm_state);
    REQUIRE(start(&fm, cfg, true, true));
    kv_report_prefill(fm.kv, 100, 1000000);
    for (int i = 0; i < MANY + 120; i++) {      /* the last ones push the first off the device */
        fm_request(&fm, alice, doc + 100 * i, 81, NULL, 0, doc, 1);
        for (int k = 0; k < 5; k++) {
            kv_step_end(fm.kv);
            fake_run_all(&fm.dev);
            kv_settle(fm.kv, 1000);
        }
    }
    for (int i = 0; i < MANY; i++)
        abandon(&fm, doc + 100 * i, 81);
    REQUIRE(fm_open(&fm, alice, doc + 100 * (MANY - 1), 81, &s, &hit) == 0);
    EXPECT_EQ(hit.cached_tokens, 64);
    kv_seq_close(s, false);
    fm_stop(&fm);
}

/* Pages of a prefix whose state is gone are computed again: the running sequence must not keep both copies. */
static void computed_again_is_held_once(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    struct kv_seq *s;
    struct kv_hit hit;
    cfg.n_pages = 32;
    cfg.host_bytes = 0;
    cfg.snapshot_bytes = sizeof(struct fm_state);
    REQUIRE(start(&fm, cfg, true, false));
    fm_request(&fm, alice, doc, 300, NULL, 0, doc, 1);
    fm_request(&fm, alice, doc + 2000, 64, NULL, 0, doc, 1);       /* takes the only record */
    REQUIRE(fm_open(&fm, alice, doc, 400, &s, &hit) == 0);
    EXPECT_EQ(hit.cached_tokens, 0);
    EXPECT(fm_prefill(&fm, s, alice, 0, 400, 128));
    EXPECT_EQ(kv_pages_lost(fm.kv), 0);
    EXPECT_EQ(kv_seq_reserve(s, 32 * 16), 0);
    EXPECT_EQ(kv_pages_lost(fm.kv), 0);
    kv_seq_close(s, true);
    EXPECT_EQ(kv_pages_lost(fm.kv), 0);
    fm_stop(&fm);
}

static void pump(struct fm *fm)
{
    fake_pump(&fm->dev, 50);
    kv_poll(fm->kv);
    kv_step_end(fm->kv);
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
            int r;
            for (int k = 0; k < 100 && (r = kv_seq_resume(s[i])) == -EAGAIN; k++)      /* moves hold pages */
                pump(&fm);
            EXPECT_EQ(r, 0);
            for (int k = 0; k < 7; k++) {
                for (int p = 0; p < 100 && (r = fm_decode(&fm, s[i], alice, 6 + k)) == -EAGAIN; p++)
                    pump(&fm);
                EXPECT_EQ(r, 0);
            }
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
    fm_stop(&fm);
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
    fm_stop(&fm);
}

/* Roots of salts that are not used are given to others. A parked sequence keeps its own. */
static void a_parked_sequence_keeps_its_tenant(void)
{
    struct fm fm;
    struct kv_config cfg = base_config();
    struct kv_seq *s, *other;
    struct kv_hit hit;
    cfg.n_pages = 600;
    cfg.host_bytes = 4 << 20;
    REQUIRE(start(&fm, cfg, true, true));
    REQUIRE(fm_open(&fm, alice, doc, 300, &s, &hit) == 0);
    EXPECT(fm_prefill(&fm, s, alice, 0, 300, 128));
    EXPECT_EQ(kv_seq_park(s), 0);
    fake_run_all(&fm.dev);
    EXPECT_EQ(kv_settle(fm.kv, 5000), 0);
    kv_flush(fm.kv);
    for (int i = 0; i < 300; i++) {
        char name[16];
        uint8_t salt[KV_SALT_BYTES];
        snprintf(name, sizeof name, "other %d", i);
        kv_salt(fm.kv, name, "", salt);
        if (i < 200) {                          /* comes and leaves nothing */
            REQUIRE(kv_seq_open(fm.kv, salt, doc, 3, &other, &hit, &fm.err) == 0);
            kv_seq_close(other, false);
        } else {
            fm_request(&fm, salt, doc, 33, NULL, 0, doc, 1);
            fake_run_all(&fm.dev);
        }
    }
    REQUIRE(kv_seq_resume(s) == 0);
    EXPECT_EQ(fm_decode(&fm, s, alice, 7), 0);
    fake_run_all(&fm.dev);
    EXPECT_EQ(fm.wrong, 0);
    kv_seq_close(s, true);
    fm_stop(&fm);
}

/* ---- disk ---------------------------------------------------------------------------------------------------------------- */

static char dir[64];

static void clear_dir(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    EXPECT_EQ(system(cmd), 0);
}

static struct kv_config disk_config(void)
{
    struct kv_config cfg = base_config();
    cfg.n_pages = 160;
    cfg.disk_dir = dir;
    cfg.disk_bytes = 64 << 20;
    cfg.disk_fsync = KV_FSYNC_NEVER;
    return cfg;
}

static void prefixes_survive_a_restart(void)
{
    clear_dir();
    for (int lazy = 0; lazy < 2; lazy++) {
        struct fm fm;
        struct kv_stats st;
        REQUIRE(start(&fm, disk_config(), true, lazy));
        kv_report_prefill(fm.kv, 100, 1000000);
        fill(&fm, 6);
        kv_settle(fm.kv, 5000);
        kv_stat(fm.kv, &st);
        EXPECT(st.demoted_bytes[2] > 0 || lazy > 0);            /* the second time all of it is on disk already */
        EXPECT(st.disk_bytes > 0);
        fm_fini(&fm);
        EXPECT_EQ(fm.wrong, 0);
        REQUIRE(start(&fm, disk_config(), true, lazy));
        kv_report_prefill(fm.kv, 100, 1000000);
        for (int i = 0; i < 6; i++) {
            struct kv_hit hit = fm_request(&fm, alice, doc + 2000 * i, 800, NULL, 0, doc, 1);
            EXPECT_EQ(hit.cached_tokens, 768);
            EXPECT_EQ(hit.from_disk, 768);
            if (hit.cached_tokens != 768)
                printf("# prompt %d: matched %u, %s\n", i, hit.matched_tokens, kv_miss_text(hit.miss));
            fake_run_all(&fm.dev);
        }
        kv_step_end(fm.kv);
        kv_stat(fm.kv, &st);
        EXPECT(st.promoted_bytes[2] > 0);
        EXPECT_EQ(fm.wrong, 0);
        fm_fini(&fm);
    }
}

static void other_layouts_and_secrets_see_nothing(void)
{
    struct fm fm;
    struct kv_config cfg = disk_config();
    cfg.identity = "fake model 1 with another dtype";
    REQUIRE(start(&fm, cfg, true, false));
    EXPECT_EQ(fm_request(&fm, alice, doc, 800, NULL, 0, doc, 1).matched_tokens, 0);
    fm_fini(&fm);
    cfg = disk_config();
    cfg.page_tokens = 32;
    REQUIRE(start(&fm, cfg, true, false));
    EXPECT_EQ(fm_request(&fm, alice, doc, 800, NULL, 0, doc, 1).matched_tokens, 0);
    fm_fini(&fm);
    REQUIRE(start(&fm, disk_config(), true, false));
    kv_salt(fm.kv, "bob", "", alice);
    EXPECT_EQ(fm_request(&fm, alice, doc, 800, NULL, 0, doc, 1).matched_tokens, 0);
    kv_salt(fm.kv, "alice", "", alice);
    EXPECT(fm_request(&fm, alice, doc, 800, NULL, 0, doc, 1).matched_tokens >= 768);
    fm_fini(&fm);
}

static long damage_step;

/* A byte of every damage_step of a segment is not what was written. */
static int damage_file(const char *path, const struct stat *st, int type, struct FTW *at)
{
    size_t n = strlen(path);
    int fd = type == FTW_F && n > 4 && strcmp(path + n - 4, ".kvs") == 0 ? open(path, O_RDWR) : -1;
    uint8_t byte;
    for (off_t i = damage_step / 2; fd >= 0 && i < st->st_size; i += damage_step)
        if (pread(fd, &byte, 1, i) != 1 || (byte ^= 0x40, pwrite(fd, &byte, 1, i)) != 1)
            return -1;
    return fd >= 0 ? close(fd) : 0;
}

/* All six documents behind damaged segments; the tokens that were cached. */
static uint32_t read_damaged(long step)
{
    struct fm fm;
    uint32_t cached = 0;
    damage_step = step;
    EXPECT_EQ(nftw(dir, damage_file, 8, FTW_PHYS), 0);
    if (!start(&fm, disk_config(), true, true)) {
        TAP_FAIL("no start over damaged segments");
        return 0;
    }
    kv_report_prefill(fm.kv, 100, 1000000);
    for (int i = 0; i < 6; i++) {
        cached += fm_request(&fm, alice, doc + 2000 * i, 800, NULL, 0, doc, 1).cached_tokens;
        fake_run_all(&fm.dev);
    }
    EXPECT_EQ(fm.wrong, 0);
    fm_stop(&fm);
    return cached;
}

static void damage_on_disk_is_recomputed(void)
{
    uint32_t some = read_damaged(100000);       /* which objects that hits depends on when the mover wrote them */
    printf("# of 4800 tokens behind a few damaged bytes %u were found\n", some);
    EXPECT_EQ(read_damaged(32), 0);             /* the data of every object is longer */
}

static int put_page(struct kv_disk *d, uint64_t id, uint64_t parent, uint32_t start, const int32_t *tokens, uint32_t n)
{
    static uint8_t data[4096 * 10];
    struct arle_err err = ARLE_ERR_INIT;
    struct kv_disk_object o = { .id = id, .parent = parent, .kind = KV_DISK_PAGE, .start = start, .n_tokens = n, .tokens = tokens,
                                .salt = alice, .bytes = sizeof data, .handle = -1 };
    return kv_disk_put(d, &o, data, &err);
}

/*
 * The disk knows more pages than the tree has places for (equal bytes are stored once). While it is read, a page may lose its place
 * to another one; what hangs on it on disk must not be hung on that other one.
 */
static void more_on_disk_than_the_tree_holds(void)
{
    struct fm fm;
    struct kv_disk *d;
    struct kv_seq *s;
    struct kv_hit hit;
    struct arle_err err = ARLE_ERR_INIT;
    enum { PT = 4096, NODES = 10 + 4096 + (4 << 20) / (PT * 10) };
    struct kv_config cfg = { .page_tokens = PT, .n_pages = 10, .n_slots = 2, .max_seq_tokens = 3 * PT, .prefix_cache = true,
                             .disk_dir = dir, .disk_bytes = 4 << 20, .disk_fsync = KV_FSYNC_NEVER };
    struct kv_disk_config dc = { .dir = dir, .identity = "fake model 1|page_tokens=4096|page_bytes=40960|state_bytes=0",
                                 .budget = 4 << 20, .fsync = KV_FSYNC_NEVER };
    clear_dir();
    REQUIRE(start(&fm, cfg, false, false));             /* makes the salt */
    fm_fini(&fm);
    clear_dir();
    REQUIRE(kv_disk_open(&d, &dc, &err) == 0);
    EXPECT_EQ(put_page(d, 1, 0, 0, doc, PT), 0);
    for (int32_t i = 0; i < NODES - 2; i++) {           /* and the root */
        int32_t token = -1 - i;
        EXPECT_EQ(put_page(d, 2 + (uint64_t)i, 0, 0, &token, 1), 0);
    }
    EXPECT_EQ(put_page(d, NODES, 0, 0, doc + PT, PT), 0);               /* takes the place of the first */
    EXPECT_EQ(put_page(d, NODES + 1, 1, PT, doc + 2 * PT, PT), 0);      /* which this one belongs to */
    kv_disk_close(d);
    REQUIRE(start(&fm, cfg, false, false));
    kv_report_prefill(fm.kv, 1000000, 1);
    REQUIRE(fm_open(&fm, alice, doc + PT, 2 * PT + 1, &s, &hit) == 0);
    EXPECT_EQ(hit.matched_tokens, PT);
    kv_seq_close(s, false);
    fm_fini(&fm);
}

/*
 * A state on disk hangs on its page there. When the page of a prompt that ended on the grid is replaced by the longer one of the next
 * prompt, its object goes, and the state with it: what the tree knows must follow, or the state is lost with the next host copy.
 */
static void a_state_outlives_its_short_page(void)
{
    struct fm fm;
    struct kv_config cfg = disk_config();
    int32_t longer[400];
    clear_dir();
    cfg.page_tokens = 128;
    cfg.n_pages = 20;
    cfg.snapshot_bytes = 3 * sizeof(struct fm_state);
    REQUIRE(start(&fm, cfg, true, false));
    kv_report_prefill(fm.kv, 100, 1000000);
    fm_request(&fm, alice, doc, 64, NULL, 0, doc, 0);
    kv_settle(fm.kv, 5000);
    memcpy(longer, doc, 64 * sizeof *doc);
    memcpy(longer + 64, doc + 3000, 300 * sizeof *doc);
    EXPECT_EQ(fm_request(&fm, alice, longer, 300, NULL, 0, doc, 1).cached_tokens, 64);
    kv_settle(fm.kv, 5000);
    for (int i = 0; i < 30; i++) {              /* out of the device, and out of the staging area */
        fm_request(&fm, alice, doc + 5000 + 1000 * i, 640, NULL, 0, doc, 1);
        kv_settle(fm.kv, 5000);
    }
    memcpy(longer + 64, doc + 4000, 300 * sizeof *doc);
    EXPECT_EQ(fm_request(&fm, alice, longer, 300, NULL, 0, doc, 1).cached_tokens, 64);
    fm_stop(&fm);
}

/* ---- cluster ---------------------------------------------------------------------------------------------------------------- */

/* A store in memory, shared by several machines, that can be made slow, full, wrong or absent. Called from mover threads. */
static struct fake_store {
    pthread_mutex_t mu;
    struct { uint8_t key[32]; uint8_t *data; uint64_t len; } item[4096];
    uint32_t n;
    int fail, fail_get;         /* negative errno for every call; for those that read */
    int corrupt;                /* a byte of every answer is changed */
    uint32_t gets, puts, asks;
} store = { .mu = PTHREAD_MUTEX_INITIALIZER };

static int store_index(const uint8_t key[32])
{
    for (uint32_t i = 0; i < store.n; i++)
        if (memcmp(store.item[i].key, key, 32) == 0)
            return (int)i;
    return -1;
}

static int fs_get(void *ctx, struct arle_kv_item *items, uint32_t n, int64_t deadline_ms, struct arle_err *err)
{
    (void)ctx; (void)deadline_ms;
    pthread_mutex_lock(&store.mu);
    store.gets++;
    int r = store.fail_get < 0 ? store.fail_get : store.fail;
    for (uint32_t i = 0; i < n && r == 0; i++) {
        int at = store_index(items[i].key);
        items[i].len = 0;
        if (at < 0 || store.item[at].len > items[i].cap)
            continue;
        memcpy(items[i].data, store.item[at].data, store.item[at].len);
        items[i].len = store.item[at].len;
        if (store.corrupt)
            ((uint8_t *)items[i].data)[(size_t)rand() % items[i].len] ^= 4;
    }
    pthread_mutex_unlock(&store.mu);
    return r < 0 ? arle_err_set(err, r, "fake failure") : 0;
}

static int fs_put(void *ctx, const struct arle_kv_item *items, uint32_t n, int64_t deadline_ms, struct arle_err *err)
{
    (void)ctx; (void)deadline_ms;
    pthread_mutex_lock(&store.mu);
    store.puts++;
    int r = store.fail;
    for (uint32_t i = 0; i < n && r == 0; i++) {
        int at = store_index(items[i].key);
        if (at < 0 && store.n < 4096) {
            at = (int)store.n++;
            memcpy(store.item[at].key, items[i].key, 32);
        }
        if (at >= 0) {
            free(store.item[at].data);
            store.item[at].data = malloc(items[i].len);
            memcpy(store.item[at].data, items[i].data, items[i].len);
            store.item[at].len = items[i].len;
        }
    }
    pthread_mutex_unlock(&store.mu);
    return r < 0 ? arle_err_set(err, r, "fake failure") : 0;
}

static int fs_exists(void *ctx, const struct arle_kv_item *items, uint32_t n, uint8_t *present, int64_t deadline_ms, struct arle_err *err)
{
    (void)ctx; (void)deadline_ms;
    pthread_mutex_lock(&store.mu);
    store.asks++;
    int r = store.fail;
    for (uint32_t i = 0; i < n && r == 0; i++)
        present[i] = store_index(items[i].key) >= 0;
    pthread_mutex_unlock(&store.mu);
    return r < 0 ? arle_err_set(err, r, "fake failure") : 0;
}

static const struct arle_kv_store_api fake_store_api = {
    .struct_size = sizeof(struct arle_kv_store_api), .get = fs_get, .put = fs_put, .exists = fs_exists,
};

static void store_reset(void)
{
    while (store.n > 0) {
        free(store.item[--store.n].data);
        store.item[store.n].data = NULL;
    }
    store.fail = store.fail_get = store.corrupt = 0;
    store.gets = store.puts = store.asks = 0;
}

static struct kv_config store_config(void)
{
    struct kv_config cfg = base_config();
    cfg.n_pages = 160;              /* a fetch may find room whatever else is being moved */
    cfg.store = &fake_store_api;
    cfg.store_min_bytes_s = 1;
    return cfg;
}

static void another_machine_profits(void)
{
    for (int state = 0; state < 2; state++) {
        struct fm one, two;
        struct kv_stats st;
        store_reset();
        REQUIRE(start(&one, store_config(), state, true));
        fill(&one, 3);
        kv_settle(one.kv, 5000);
        kv_stat(one.kv, &st);
        EXPECT(st.store_puts > 100);
        EXPECT_EQ(st.store_errors, 0);
        fm_fini(&one);
        REQUIRE(start(&two, store_config(), state, true));
        kv_report_prefill(two.kv, 100, 1000000);
        for (int i = 0; i < 3; i++) {
            struct kv_hit hit = fm_request(&two, alice, doc + 2000 * i, 800, NULL, 0, doc, 1);
            EXPECT_EQ(hit.cached_tokens, state ? 768 : 799);
            EXPECT_EQ(hit.from_store, state ? 768 : 799);
            fake_run_all(&two.dev);
        }
        uint8_t bob[KV_SALT_BYTES];
        kv_salt(two.kv, "bob", "", bob);
        EXPECT_EQ(fm_request(&two, bob, doc, 800, NULL, 0, doc, 1).cached_tokens, 0);
        fm_stop(&two);
    }
}

/* The answer to a question that was asked for one tenant comes when its place among the roots has been given to another. */
static void late_answers_reach_nobody_else(void)
{
    struct fm one, two;
    struct kv_seq *s;
    struct kv_hit hit;
    uint8_t salt[200][KV_SALT_BYTES];
    store_reset();
    REQUIRE(start(&one, store_config(), false, true));
    fill(&one, 1);
    kv_settle(one.kv, 5000);
    fm_fini(&one);
    REQUIRE(start(&two, store_config(), false, true));
    kv_report_prefill(two.kv, 1000000, 1);
    pthread_mutex_lock(&store.mu);
    EXPECT_EQ(kv_seq_open(two.kv, alice, doc, 800, &s, &hit, &two.err), -EINPROGRESS);
    for (int i = 0; i < 200; i++) {
        char name[16];
        snprintf(name, sizeof name, "other %d", i);
        kv_salt(two.kv, name, "", salt[i]);
        REQUIRE(kv_seq_open(two.kv, salt[i], doc, 3, &s, &hit, &two.err) == 0);
        kv_seq_close(s, false);
    }
    pthread_mutex_unlock(&store.mu);
    kv_settle(two.kv, 5000);
    for (int i = 0; i < 200; i++) {
        REQUIRE(fm_open(&two, salt[i], doc, 800, &s, &hit) == 0);
        EXPECT_EQ(hit.matched_tokens, 0);
        kv_seq_close(s, false);
    }
    EXPECT_EQ(fm_request(&two, alice, doc, 800, NULL, 0, doc, 1).matched_tokens, 800);
    fm_stop(&two);
}

/* While a slow tier takes what was computed, nobody is kept from the device pages: the host has their bytes. */
static void slow_writes_hold_no_pages(void)
{
    for (int state = 0; state < 2; state++) {
        struct fm fm;
        struct kv_seq *s;
        struct kv_hit hit;
        store_reset();
        REQUIRE(start(&fm, store_config(), state, true));
        pthread_mutex_lock(&store.mu);
        store.fail = -EIO;
        pthread_mutex_unlock(&store.mu);
        fill(&fm, 1);                           /* refused at the first question; the tier is shut */
        store.fail = 0;
        kv_settle(fm.kv, 5000);
        struct timespec second = { .tv_sec = 1, .tv_nsec = 100000000 };
        nanosleep(&second, NULL);
        pthread_mutex_lock(&store.mu);          /* from now on it hangs */
        for (int i = 0; i < 20; i++) {
            kv_step_end(fm.kv);
            fake_run_all(&fm.dev);
            kv_poll(fm.kv);
        }
        int r = kv_seq_open(fm.kv, alice, doc + 40000, 64, &s, &hit, &fm.err);
        if (r == 0)
            r = kv_seq_reserve(s, 64 * 16);     /* 64 pages, and more below */
        EXPECT_EQ(r, 0);
        struct kv_stats st;
        kv_step_end(fm.kv);
        kv_stat(fm.kv, &st);
        EXPECT_EQ(st.pages_free + st.pages_cached, 160 - 64);
        pthread_mutex_unlock(&store.mu);
        kv_seq_close(s, false);
        fm_stop(&fm);
    }
}

/* What the cluster has but does not give now: the prompt starts without it, and says why. */
static void what_cannot_be_fetched_is_computed(void)
{
    struct fm one, two;
    struct kv_seq *s;
    struct kv_hit hit;
    store_reset();
    REQUIRE(start(&one, store_config(), true, true));
    fill(&one, 2);
    kv_settle(one.kv, 5000);
    fm_fini(&one);
    REQUIRE(start(&two, store_config(), true, true));
    kv_report_prefill(two.kv, 100, 1000000);
    for (int i = 0; i < 2; i++)
        EXPECT_EQ(kv_seq_open(two.kv, alice, doc + 2000 * i, 800, &s, &hit, &two.err), -EINPROGRESS);
    kv_settle(two.kv, 5000);                    /* both questions are answered */
    store.fail_get = -EIO;
    REQUIRE(fm_open(&two, alice, doc, 800, &s, &hit) == 0);
    kv_seq_close(s, false);
    REQUIRE(fm_open(&two, alice, doc + 2000, 800, &s, &hit) == 0);      /* the tier is shut for a second */
    EXPECT_EQ(hit.cached_tokens, 0);
    EXPECT_EQ(hit.miss, KV_MISS_NOT_FETCHED);
    kv_seq_close(s, false);
    fm_stop(&two);
    store_reset();
}

/* What is only known of the cluster takes places in the tree. Own states go first. */
static void states_of_the_cluster_displace_none(void)
{
    struct fm one, two;
    struct kv_seq *s;
    struct kv_hit hit;
    store_reset();
    REQUIRE(start(&one, store_config(), true, true));
    fill(&one, 8);
    kv_settle(one.kv, 5000);
    fm_fini(&one);
    struct kv_config cfg = store_config();
    cfg.snapshot_bytes = 4 * sizeof(struct fm_state);
    REQUIRE(start(&two, cfg, true, true));
    kv_report_prefill(two.kv, 1000000, 1);
    fm_request(&two, alice, doc + 50000, 300, NULL, 0, doc, 1);
    for (int i = 0; i < 8; i++) {
        EXPECT_EQ(kv_seq_open(two.kv, alice, doc + 2000 * i, 800, &s, &hit, &two.err), -EINPROGRESS);
        kv_settle(two.kv, 5000);
    }
    EXPECT_EQ(fm_request(&two, alice, doc + 50000, 300, NULL, 0, doc, 1).cached_tokens, 256);
    fm_request(&two, alice, doc + 51000, 300, NULL, 0, doc, 1);
    EXPECT_EQ(fm_request(&two, alice, doc + 51000, 300, NULL, 0, doc, 1).cached_tokens, 256);
    fm_stop(&two);
}

/* Pages larger than the grid of states: the cluster takes states at page ends, so that is where some are left too. */
static void large_pages_have_states_for_the_cluster(void)
{
    static const uint32_t pts[] = { 128, 256 };
    for (int i = 0; i < 2; i++) {
        struct fm one, two;
        struct kv_config cfg = store_config();
        uint32_t mark = 448;
        store_reset();
        cfg.page_tokens = pts[i];
        cfg.n_pages = 4000 / pts[i];
        cfg.snapshot_cadence = 0;
        REQUIRE(start(&one, cfg, true, true));
        EXPECT_EQ(fm_request(&one, alice, doc, 740, &mark, 1, doc, 1).cached_tokens, 0);
        EXPECT_EQ(fm_request(&one, alice, doc, 740, &mark, 1, doc, 1).cached_tokens, 704);      /* here nothing changes */
        fake_run_all(&one.dev);
        kv_settle(one.kv, 5000);
        fm_fini(&one);
        REQUIRE(start(&two, cfg, true, true));
        kv_report_prefill(two.kv, 100, 1000000);
        EXPECT_EQ(fm_request(&two, alice, doc, 740, NULL, 0, doc, 1).cached_tokens, 740 / pts[i] * pts[i]);
        fake_run_all(&two.dev);
        fm_stop(&two);
    }
}

static void a_bad_cluster_costs_nothing_but_time(void)
{
    static const int fails[] = { -EIO, -ETIMEDOUT, 0, -ENOSPC };
    for (int f = 0; f < 4; f++) {
        struct fm one, two;
        struct kv_stats st;
        store_reset();
        REQUIRE(start(&one, store_config(), true, true));
        fill(&one, 3);
        kv_settle(one.kv, 5000);
        fm_fini(&one);
        REQUIRE(start(&two, store_config(), true, true));
        kv_report_prefill(two.kv, 100, 1000000);
        store.fail = fails[f];
        store.corrupt = fails[f] == 0;
        for (int i = 0; i < 3; i++) {
            struct kv_hit hit = fm_request(&two, alice, doc + 2000 * i, 800, NULL, 0, doc, 1);
            EXPECT_EQ(hit.cached_tokens, 0);
            fake_run_all(&two.dev);
        }
        EXPECT(store.asks > 0);
        kv_step_end(two.kv);
        kv_stat(two.kv, &st);
        EXPECT(st.store_errors > 0);
        EXPECT_EQ(two.wrong, 0);
        fm_stop(&two);
    }
    store_reset();
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/arle-kv-tiers-%d", (int)getpid());
    uint64_t rng = 1;
    for (size_t i = 0; i < sizeof doc / sizeof *doc; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        doc[i] = (int32_t)(rng >> 40);
    }
    RUN(prefixes_return_from_the_host);
    RUN(pages_alone_return_from_the_host);
    RUN(immediate_copies_need_no_waiting);
    RUN(slow_fetches_are_not_made);
    RUN(abandoned_fetches_keep_nobody_waiting);
    RUN(abandoned_fetches_leave_places);
    RUN(computed_again_is_held_once);
    RUN(parked_sequences_go_on);
    RUN(parking_needs_room);
    RUN(a_parked_sequence_keeps_its_tenant);
    RUN(prefixes_survive_a_restart);
    RUN(other_layouts_and_secrets_see_nothing);
    RUN(damage_on_disk_is_recomputed);
    RUN(more_on_disk_than_the_tree_holds);
    RUN(a_state_outlives_its_short_page);
    RUN(another_machine_profits);
    RUN(late_answers_reach_nobody_else);
    RUN(slow_writes_hold_no_pages);
    RUN(what_cannot_be_fetched_is_computed);
    RUN(large_pages_have_states_for_the_cluster);
    RUN(states_of_the_cluster_displace_none);
    RUN(a_bad_cluster_costs_nothing_but_time);
    clear_dir();
    return tap_done();
}
