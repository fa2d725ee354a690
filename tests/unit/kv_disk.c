/*
 * The disk tier by itself: what was put comes back, across restarts, kills at any moment, torn tails and flipped bytes; the budget
 * holds; the write amplification is what is claimed. KV_KILLS=1000 runs the long form of the kill test.
 */
#include "tap.h"
#include "kv/kv_admin.h"
#include "kv/kv_hash.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char dir[64];
static const uint8_t salt[32] = "a salt for the tests of the disk";

static void clear_dir(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    if (system(cmd) != 0)
        printf("# cannot clear %s\n", dir);
}

static struct kv_disk *open_it(uint64_t budget, const char *identity)
{
    struct kv_disk *d = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    struct kv_disk_config cfg = { .dir = dir, .identity = identity, .budget = budget, .fsync = 1 };
    if (kv_disk_open(&d, &cfg, &err) < 0)
        printf("# %s\n", err.msg);
    return d;
}

/* The bytes of object id: a function of id, so that the reader knows them. Every fourth object repeats the one before. */
static void fill(uint8_t *out, uint64_t bytes, uint64_t id)
{
    uint64_t x = (id - (id % 4 == 3)) * 0x9e3779b97f4a7c15u + bytes;
    for (uint64_t i = 0; i < bytes; i += 8) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        memcpy(out + i, &x, bytes - i < 8 ? bytes - i : 8);
    }
}

static uint64_t size_of(uint64_t id)
{
    uint64_t base = id - (id % 4 == 3);
    return 1000 + (base * 7919) % 150000;
}

static int put(struct kv_disk *d, uint64_t id, uint64_t parent)
{
    static uint8_t data[200000];
    int32_t tokens[16];
    struct arle_err err = ARLE_ERR_INIT;
    for (int i = 0; i < 16; i++)
        tokens[i] = (int32_t)(id * 16 + (uint64_t)i);
    fill(data, size_of(id), id);
    struct kv_disk_object o = { .id = id, .parent = parent, .kind = KV_DISK_PAGE, .start = parent == 0 ? 0 : 16, .n_tokens = 16,
                                .tokens = tokens, .salt = salt, .bytes = size_of(id), .handle = (int32_t)id };
    return kv_disk_put(d, &o, data, &err);
}

/* 0: right bytes; else what get said; 1: wrong bytes. */
static int check(struct kv_disk *d, uint64_t id)
{
    static uint8_t got[200000], want[200000];
    struct arle_err err = ARLE_ERR_INIT;
    int r = kv_disk_get(d, id, got, size_of(id), &err);
    if (r < 0)
        return r;
    fill(want, size_of(id), id);
    return memcmp(got, want, size_of(id)) != 0;
}

static void comes_back_after_a_restart(void)
{
    clear_dir();
    struct kv_disk *d = open_it(64 << 20, "model A");
    REQUIRE(d != NULL);
    for (uint64_t id = 1; id <= 60; id++)
        EXPECT_EQ(put(d, id, id % 5 == 1 ? 0 : id - 1), 0);
    EXPECT_EQ(put(d, 60, 0), -EEXIST);
    EXPECT_EQ(put(d, 99, 98), -ENOENT);
    struct kv_disk_stats st;
    kv_disk_stat(d, &st);
    EXPECT(st.dedup_bytes > 500000);
    for (int round = 0; round < 3; round++) {
        for (uint64_t id = 1; id <= 60; id++)
            EXPECT_EQ(check(d, id), 0);
        EXPECT_EQ(kv_disk_verify(d), 0);
        kv_disk_close(d);
        d = open_it(64 << 20, "model A");
        REQUIRE(d != NULL);
        EXPECT_EQ(kv_disk_max_id(d), 60);
    }
    kv_disk_remove(d, 2);               /* and 3, 4, 5 below it */
    EXPECT_EQ(check(d, 4), -ENOENT);
    EXPECT_EQ(check(d, 1), 0);
    kv_disk_close(d);
    d = open_it(64 << 20, "model A");
    EXPECT_EQ(check(d, 5), -ENOENT);
    EXPECT_EQ(check(d, 6), 0);
    kv_disk_close(d);
}

static void only_one_process_and_one_identity(void)
{
    clear_dir();
    struct arle_err err = ARLE_ERR_INIT;
    struct kv_disk *d = open_it(1 << 20, "model A"), *e = NULL;
    REQUIRE(d != NULL);
    put(d, 1, 0);
    struct kv_disk_config cfg = { .dir = dir, .identity = "model A", .budget = 1 << 20, .fsync = 1 };
    EXPECT_EQ(kv_disk_open(&e, &cfg, &err), -EBUSY);
    kv_disk_close(d);
    d = open_it(1 << 20, "model B");            /* another dtype, say: beside it, and empty */
    REQUIRE(d != NULL);
    EXPECT_EQ(check(d, 1), -ENOENT);
    kv_disk_close(d);
    /* A folder of A's put in B's place is refused by what its manifest says. */
    uint8_t a[8], b[8];
    char cmd[400];
    kv_blake(a, 8, "model A", 7);
    kv_blake(b, 8, "model B", 7);
    snprintf(cmd, sizeof cmd, "cd '%s' && rm -rf %02x%02x%02x* && mv %02x%02x%02x* %02x%02x%02x%02x%02x%02x%02x%02x", dir, b[0], b[1], b[2],
             a[0], a[1], a[2], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]);
    EXPECT_EQ(system(cmd), 0);
    cfg.identity = "model B";
    EXPECT_EQ(kv_disk_open(&e, &cfg, &err), -EINVAL);
    EXPECT(strstr(err.msg, "another model") != NULL);
}

static uint64_t dir_bytes(void)
{
    char cmd[160], line[64] = "0";
    snprintf(cmd, sizeof cmd, "find '%s' -type f -printf '%%s\\n' | awk '{s+=$1} END {printf \"%%d\", s}'", dir);
    FILE *f = popen(cmd, "r");
    if (f != NULL && fgets(line, sizeof line, f) == NULL)
        line[0] = '\0';
    if (f != NULL)
        pclose(f);
    return strtoull(line, NULL, 10);
}

static void budget_holds_and_little_is_written_twice(void)
{
    enum { BUDGET = 6 << 20 };
    clear_dir();
    struct kv_disk *d = open_it(BUDGET, "model A");
    REQUIRE(d != NULL);
    uint64_t user = 0, max = 0;
    uint32_t there = 0;
    for (uint64_t id = 1; user < 10ull * BUDGET; id++) {
        int r = put(d, id, id % 3 == 1 ? 0 : id - 1);
        EXPECT(r == 0 || r == -ENOENT);
        user += size_of(id);
        if (id % 7 == 0)
            kv_disk_remove(d, id - 5);
        if (id % 10 == 0) {
            uint64_t now = dir_bytes();
            max = now > max ? now : max;
        }
    }
    struct kv_disk_stats st;
    kv_disk_stat(d, &st);
    printf("# budget %d, most on disk %" PRIu64 ", user bytes %" PRIu64 ", written %" PRIu64 " (amplification %.3f), %" PRIu64
           " evicted, %" PRIu64 " compacted bytes, %" PRIu64 " not written twice\n", BUDGET, max, st.user_bytes, st.written_bytes,
           (double)st.written_bytes / (double)st.user_bytes, st.evicted, st.compacted_bytes, st.dedup_bytes);
    EXPECT(max <= BUDGET);
    EXPECT(max > BUDGET / 2);
    EXPECT((double)st.written_bytes / (double)(st.user_bytes - st.dedup_bytes) <= 1.3);
    EXPECT(st.evicted > 0);
    for (uint64_t id = 1; id < kv_disk_max_id(d) + 1; id++) {
        int r = check(d, id);
        EXPECT(r == 0 || r == -ENOENT);
        there += r == 0;
    }
    EXPECT(there > 20);
    uint64_t id, lost = 0;
    uint32_t kind;
    int32_t handle;
    while (kv_disk_next_lost(d, &id, &kind, &handle)) {
        EXPECT_EQ(handle, (int32_t)id);
        lost++;
    }
    EXPECT(lost >= st.evicted);
    kv_disk_close(d);
    d = open_it(BUDGET / 2, "model A");         /* a smaller budget after a restart */
    REQUIRE(d != NULL);
    EXPECT(dir_bytes() <= BUDGET / 2);
    kv_disk_close(d);
}

/* Many times the budget passes by: what is pinned is still there, what was written beside it is not. */
static void pinned_objects_go_last(void)
{
    enum { BUDGET = 6 << 20 };
    clear_dir();
    struct kv_disk *d = open_it(BUDGET, "model A");
    REQUIRE(d != NULL);
    uint64_t user = 0, id;
    for (id = 1; user < 10ull * BUDGET; id++) {
        EXPECT_EQ(put(d, id, id >= 2 && id <= 4 ? id - 1 : 0), 0);
        kv_disk_pin(d, id, id <= 4);
        user += size_of(id);
    }
    for (uint64_t i = 1; i <= 4; i++)
        EXPECT_EQ(check(d, i), 0);
    EXPECT_EQ(check(d, 60), -ENOENT);
    for (uint64_t i = 1; i <= 4; i++)
        kv_disk_pin(d, i, false);
    for (user = 0; user < 3ull * BUDGET; id++) {
        EXPECT_EQ(put(d, id, 0), 0);
        user += size_of(id);
    }
    EXPECT_EQ(check(d, 1), -ENOENT);
    for (uint64_t end = id + 1000; id < end; id++) {       /* pins everywhere do not stop the tier */
        EXPECT_EQ(put(d, id, 0), 0);
        kv_disk_pin(d, id, true);
    }
    kv_disk_close(d);
}

/* Chunks of one object end up in several segments, of which the first hold nothing else. */
static void objects_larger_than_a_segment(void)
{
    clear_dir();
    struct kv_disk *d = open_it(2 << 20, "model A");        /* segments of 64 KiB */
    REQUIRE(d != NULL);
    for (uint64_t id = 1; id <= 9; id++)
        EXPECT_EQ(put(d, id, 0), 0);
    for (int round = 0; round < 2; round++) {
        for (uint64_t id = 1; id <= 9; id++)
            EXPECT_EQ(check(d, id), 0);
        EXPECT_EQ(kv_disk_verify(d), 0);
        kv_disk_close(d);
        d = open_it(2 << 20, "model A");
        REQUIRE(d != NULL);
    }
    kv_disk_close(d);
}

/* Most of what is there is removed here and there: the rest is copied together, and is still right. */
static void compaction_keeps_what_lives(void)
{
    clear_dir();
    struct kv_disk *d = open_it(32 << 20, "model A");
    REQUIRE(d != NULL);
    for (uint64_t id = 1; id <= 1600; id += 4)          /* no duplicates */
        EXPECT_EQ(put(d, id, 0), 0);
    for (uint64_t id = 1; id <= 1600; id += 4)
        if (id % 40 != 1)
            kv_disk_remove(d, id);
    struct kv_disk_stats st;
    for (uint64_t id = 10001; id <= 10400; id += 4)
        put(d, id, 0);
    kv_disk_stat(d, &st);
    EXPECT(st.compacted_bytes > 0);
    for (int round = 0; round < 2; round++) {
        uint32_t there = 0;
        for (uint64_t id = 1; id <= 1600; id += 40) {
            int r = check(d, id);
            EXPECT(r == 0 || r == -ENOENT);
            there += r == 0;
        }
        EXPECT(there >= 20);
        kv_disk_close(d);
        d = open_it(32 << 20, "model A");
        REQUIRE(d != NULL);
    }
    EXPECT_EQ(kv_disk_verify(d), 0);
    kv_disk_close(d);
}

/* ---- violence --------------------------------------------------------------------------------------------------------- */

/* When the k-th writer is killed: some time after its start, which may be while it still opens the store; or, every third, some time
   after its first word, so that however slow the machine is there is something to lose. The word goes to *word; returns whether
   there is one. */
static bool wait_to_kill(int in, long k, long least_ns, long span_ns, int64_t *word)
{
    bool said = k % 3 == 0 && read(in, word, 8) == 8;
    struct timespec nap = { .tv_nsec = least_ns + (long)((uint64_t)(k * 7919 + 13) * 104729 % (uint64_t)span_ns) };
    nanosleep(&nap, NULL);
    return said;
}

/* Writes on until it is killed; says each id after it was committed, and each removal before it is asked for. */
static void writer(int out, uint64_t from, uint64_t seed)
{
    struct kv_disk *d = open_it(3 << 20, "model A");
    if (d == NULL)
        _exit(3);
    uint64_t x = seed * 0x9e3779b97f4a7c15u;
    for (uint64_t id = from;; id++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        int64_t word = (int64_t)id;
        if (put(d, id, (x >> 40) % 3 == 0 || id == from ? 0 : id - 1) == 0 && write(out, &word, 8) != 8)
            _exit(4);
        if ((x >> 50) % 5 == 0) {
            word = -(int64_t)(id - 1 - (x >> 20) % 6);
            if (write(out, &word, 8) != 8)
                _exit(4);
            kv_disk_remove(d, (uint64_t)-word);
        }
        uint64_t lost;
        uint32_t kind;
        int32_t handle;
        while (kv_disk_next_lost(d, &lost, &kind, &handle)) {
            word = -(int64_t)lost;
            if (write(out, &word, 8) != 8)
                _exit(4);
        }
    }
}

static void nothing_committed_is_lost_to_kill(void)
{
    enum { SPAN = 100000 };
    static uint8_t state[SPAN];         /* 1 committed, 2 removed or evicted (with what hangs on it) */
    long kills = getenv("KV_KILLS") != NULL ? atol(getenv("KV_KILLS")) : 50;
    uint64_t next = 1, served = 0, gone = 0;
    clear_dir();
    memset(state, 0, sizeof state);
    for (long k = 0; k < kills && !tap_case_failed && next < SPAN - 2000; k++) {
        int fd[2];
        REQUIRE(pipe(fd) == 0);
        pid_t pid = fork();
        if (pid == 0) {
            close(fd[0]);
            writer(fd[1], next, (uint64_t)k + 1);
        }
        close(fd[1]);
        int64_t word;
        bool said = wait_to_kill(fd[0], k, 1000000, 25000000, &word);
        kill(pid, SIGKILL);
        for (; said || read(fd[0], &word, 8) == 8; said = false) {
            uint64_t id = (uint64_t)(word < 0 ? -word : word);
            if (id < SPAN)
                state[id] = word < 0 ? 2 : 1;
            if (word > 0 && id >= next)
                next = id + 1;
        }
        close(fd[0]);
        waitpid(pid, NULL, 0);
        next += 2;                      /* one may have been committed without being told */
        struct kv_disk *d = open_it(3 << 20, "model A");
        REQUIRE(d != NULL);
        EXPECT_EQ(kv_disk_verify(d), 0);
        uint64_t from = next > 300 ? next - 300 : 1;
        for (uint64_t id = from; id < next && id < SPAN; id++) {
            int r = check(d, id);
            EXPECT(r == 0 || r == -ENOENT);     /* never wrong bytes, never damage */
            served += r == 0;
            gone += r != 0 && state[id] == 1;
            if (r != 0 && state[id] == 1)
                state[id] = 3;
        }
        kv_disk_close(d);
    }
    /* Committed and gone may only be what hung on something removed or evicted; the last of each life never is. */
    printf("# %ld kills, %" PRIu64 " objects written, %" PRIu64 " reads right, %" PRIu64 " gone with their ancestors\n", kills, next,
           served, gone);
    EXPECT(served > (uint64_t)kills / 3);
    EXPECT(next > (uint64_t)kills * 2);
}

/* No eviction and no removal here: every single object that was said to be committed must be there. */
static void strictly_nothing_is_lost_to_kill(void)
{
    uint64_t next = 1;
    long kills = getenv("KV_KILLS") != NULL ? atol(getenv("KV_KILLS")) / 10 : 15;
    clear_dir();
    for (long k = 0; k < kills && !tap_case_failed; k++) {
        int fd[2];
        REQUIRE(pipe(fd) == 0);
        pid_t pid = fork();
        if (pid == 0) {
            struct kv_disk *d = open_it(1ull << 30, "model A");
            if (d == NULL)
                _exit(3);
            for (uint64_t id = next;; id++)
                if (put(d, id, id == 1 || id % 9 == 0 || id == next ? 0 : id - 1) == 0 && write(fd[1], &id, 8) != 8)
                    _exit(4);
        }
        close(fd[1]);
        int64_t word;
        uint64_t id, first = next, last = wait_to_kill(fd[0], k, 500000, 15000000, &word) ? (uint64_t)word : 0;
        kill(pid, SIGKILL);
        while (read(fd[0], &word, 8) == 8)
            last = (uint64_t)word;
        close(fd[0]);
        waitpid(pid, NULL, 0);
        struct kv_disk *d = open_it(1ull << 30, "model A");
        REQUIRE(d != NULL);
        for (id = first; id <= last; id++)
            EXPECT_EQ(check(d, id), 0);
        EXPECT_EQ(kv_disk_verify(d), 0);
        next = kv_disk_max_id(d) + 1;
        kv_disk_close(d);
    }
    EXPECT(next > (uint64_t)kills / 3);
    printf("# %ld kills, all of %" PRIu64 " committed objects there\n", kills, next - 1);
}

static int each_file(int (*fn)(const char *path, uint64_t seed), uint64_t seed)
{
    char cmd[160], path[256];
    int n = 0;
    snprintf(cmd, sizeof cmd, "find '%s' -name '*.kv?' | sort", dir);
    FILE *f = popen(cmd, "r");
    while (f != NULL && fgets(path, sizeof path, f) != NULL) {
        path[strcspn(path, "\n")] = '\0';
        n += fn(path, seed * 31 + (uint64_t)n);
    }
    if (f != NULL)
        pclose(f);
    return n;
}

static int flip(const char *path, uint64_t seed)
{
    struct stat sb;
    uint8_t byte;
    int fd = open(path, O_RDWR);
    if (fd < 0 || fstat(fd, &sb) < 0 || sb.st_size == 0)
        return 0;
    off_t at = (off_t)(seed * 2654435761u % (uint64_t)sb.st_size);
    int ok = pread(fd, &byte, 1, at) == 1;
    byte ^= (uint8_t)(1u << seed % 8);
    ok = ok && pwrite(fd, &byte, 1, at) == 1;
    close(fd);
    return ok;
}

static int tear(const char *path, uint64_t seed)
{
    struct stat sb;
    if (stat(path, &sb) < 0)
        return 0;
    return truncate(path, (off_t)((uint64_t)sb.st_size - (uint64_t)sb.st_size * (seed % 10) / 40)) == 0;
}

static void damage_case(int (*fn)(const char *, uint64_t), int rounds)
{
    uint64_t served = 0, missing = 0;
    for (int round = 0; round < rounds && !tap_case_failed; round++) {
        clear_dir();
        struct kv_disk *d = open_it(4 << 20, "model A");
        REQUIRE(d != NULL);
        for (uint64_t id = 1; id <= 30; id++)
            put(d, id, id % 6 == 1 ? 0 : id - 1);
        kv_disk_close(d);
        EXPECT(each_file(fn, (uint64_t)round + 1) >= 2);
        d = open_it(4 << 20, "model A");
        REQUIRE(d != NULL);                     /* no manual step */
        for (uint64_t id = 1; id <= 30; id++) {
            int r = check(d, id);
            EXPECT(r == 0 || r == -ENOENT || r == -EBADMSG);
            served += r == 0;
            missing += r != 0;
        }
        EXPECT_EQ(put(d, 1000, 0), 0);          /* and it goes on */
        kv_disk_close(d);
        d = open_it(4 << 20, "model A");
        REQUIRE(d != NULL);
        EXPECT_EQ(kv_disk_verify(d), 0);
        EXPECT_EQ(check(d, 1000), 0);
        kv_disk_close(d);
    }
    printf("# %" PRIu64 " objects still served, %" PRIu64 " refused\n", served, missing);
    EXPECT(served > 0 && missing > 0);
}

static void flipped_bytes_are_never_served(void) { damage_case(flip, 60); }
static void torn_files_are_never_served(void) { damage_case(tear, 30); }

static void count_folder(void *arg, const struct kv_admin_folder *f)
{
    uint64_t *sum = arg;
    sum[0] += f->st.objects;
    sum[1] += f->bad;
    EXPECT_STR(f->identity, "model A");
}

/* A long prompt is a long chain: dropping it must not need a stack as deep. */
static void *drop_chain(void *arg)
{
    kv_disk_remove(arg, 1);
    return NULL;
}

static void long_chains_are_dropped(void)
{
    enum { LONG = 12000 };
    pthread_attr_t small;
    pthread_t t;
    uint8_t data[64] = "the same bytes";
    struct arle_err err = ARLE_ERR_INIT;
    struct kv_disk_stats st;
    clear_dir();
    struct kv_disk *d = open_it(64 << 20, "model A");
    REQUIRE(d != NULL);
    for (uint64_t id = 1; id <= LONG; id++) {
        int32_t token = (int32_t)id;
        struct kv_disk_object o = { .id = id, .parent = id - 1, .kind = KV_DISK_PAGE, .start = (uint32_t)id - 1, .n_tokens = 1,
                                    .tokens = &token, .salt = salt, .bytes = sizeof data, .handle = -1 };
        EXPECT_EQ(kv_disk_put(d, &o, data, &err), 0);
    }
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 256 << 10);
    REQUIRE(pthread_create(&t, &small, drop_chain, d) == 0);
    pthread_join(t, NULL);
    pthread_attr_destroy(&small);
    kv_disk_stat(d, &st);
    EXPECT_EQ(st.objects, 0);
    kv_disk_close(d);
}

static _Atomic bool writing;

static void *write_on(void *arg)
{
    uint64_t id = 1;
    for (; atomic_load(&writing); id++)
        if (put(arg, id, 0) < 0)
            break;
    return NULL;
}

/* A tool that looks on while an engine writes may miss the newest objects. It must not call them damaged. */
static void tools_may_look_on(void)
{
    clear_dir();
    pthread_t t;
    struct kv_disk *d = open_it(64 << 20, "model A");
    struct arle_err err = ARLE_ERR_INIT;
    struct dirent *e;
    char folder[400] = "";
    REQUIRE(d != NULL);
    put(d, 1000000, 0);
    DIR *list = opendir(dir);
    while ((e = readdir(list)) != NULL)
        if (strlen(e->d_name) == 16)
            snprintf(folder, sizeof folder, "%s/%s", dir, e->d_name);
    closedir(list);
    atomic_store(&writing, true);
    REQUIRE(pthread_create(&t, NULL, write_on, d) == 0);
    uint64_t bad = 0, seen = 0;
    for (int i = 0; i < 300; i++) {
        struct kv_disk_config cfg = { .dir = folder, .read_only = true };
        struct kv_disk *look;
        struct kv_disk_stats st;
        if (kv_disk_open(&look, &cfg, &err) < 0)
            continue;
        kv_disk_stat(look, &st);
        bad += st.bad_objects + (i % 30 == 0 ? kv_disk_verify(look) : 0);
        seen += st.objects;
        kv_disk_close(look);
    }
    atomic_store(&writing, false);
    pthread_join(t, NULL);
    EXPECT_EQ(bad, 0);
    EXPECT(seen > 1000);
    kv_disk_close(d);
}

static void tools_see_what_is_there(void)
{
    uint64_t sum[2] = { 0 };
    struct arle_err err = ARLE_ERR_INIT;
    clear_dir();
    EXPECT_EQ(kv_admin_each(dir, true, count_folder, sum, &err), -ENOENT);
    struct kv_disk *d = open_it(8 << 20, "model A");
    REQUIRE(d != NULL);
    for (uint64_t id = 1; id <= 20; id++)
        put(d, id, id % 6 == 1 ? 0 : id - 1);
    EXPECT_EQ(kv_admin_each(dir, true, count_folder, sum, &err), 1);       /* beside the process that has it */
    EXPECT_EQ(sum[0], 20);
    EXPECT_EQ(sum[1], 0);
    kv_disk_close(d);
    char cmd[200];
    snprintf(cmd, sizeof cmd, "for f in $(find '%s' -name '*.kvs'); do printf X | dd of=$f bs=1 seek=500 conv=notrunc 2>/dev/null; done", dir);
    EXPECT_EQ(system(cmd), 0);
    memset(sum, 0, sizeof sum);
    EXPECT_EQ(kv_admin_each(dir, true, count_folder, sum, &err), 1);
    EXPECT_EQ(sum[0], 20);
    EXPECT(sum[1] > 0);
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/arle-kv-disk-%d", (int)getpid());
    RUN(comes_back_after_a_restart);
    RUN(only_one_process_and_one_identity);
    RUN(budget_holds_and_little_is_written_twice);
    RUN(pinned_objects_go_last);
    RUN(objects_larger_than_a_segment);
    RUN(compaction_keeps_what_lives);
    RUN(nothing_committed_is_lost_to_kill);
    RUN(strictly_nothing_is_lost_to_kill);
    RUN(flipped_bytes_are_never_served);
    RUN(torn_files_are_never_served);
    RUN(tools_see_what_is_there);
    RUN(tools_may_look_on);
    RUN(long_chains_are_dropped);
    clear_dir();
    return tap_done();
}
