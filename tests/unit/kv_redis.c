/*
 * The cluster tier against a real redis-server: blocks come back, another machine profits, and a server that is killed, paused,
 * full or corrupted during a run costs errors that are counted and nothing else.
 */
#include "tap.h"
#include "kv_model.h"

#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

extern const struct arle_plugin arle_plugin_v1;

static char dir[64], sock[96];
static pid_t server;
static void *ctx;
static int32_t doc[1 << 15];
static uint8_t alice[KV_SALT_BYTES];

static const char *conf_str(const struct arle_conf *conf, const char *key)
{
    (void)conf;
    return strcmp(key, "address") == 0 ? sock : strcmp(key, "prefix") == 0 ? "test:" : "";
}

static int64_t conf_i64(const struct arle_conf *conf, const char *key)
{
    (void)conf;
    return strcmp(key, "ttl") == 0 ? 60000 : 0;
}

static const struct arle_conf_service conf = { .struct_size = sizeof conf, .str = conf_str, .i64 = conf_i64 };

static const void *service(const struct arle_host *host, const char *name, uint32_t version)
{
    (void)host;
    return strcmp(name, "conf") == 0 && version == 1 ? &conf : NULL;
}

static const struct arle_host host = { .struct_size = sizeof host, .service = service };

static const struct arle_kv_store_api *api(void)
{
    return arle_plugin_v1.ops;
}

static bool server_start(const char *maxmemory)
{
    server = fork();
    if (server == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        dup2(null, 2);
        execlp("redis-server", "redis-server", "--port", "0", "--unixsocket", sock, "--save", "", "--appendonly", "no", "--dir", dir,
               "--maxmemory", maxmemory, "--maxmemory-policy", "noeviction", (char *)NULL);
        _exit(127);
    }
    for (int i = 0; i < 400; i++) {
        redisContext *c = redisConnectUnix(sock);
        bool up = c != NULL && c->err == 0;
        redisReply *r = up ? redisCommand(c, "PING") : NULL;
        up = r != NULL && r->type == REDIS_REPLY_STATUS;
        if (r != NULL)
            freeReplyObject(r);
        if (c != NULL)
            redisFree(c);
        if (up)
            return true;
        if (waitpid(server, NULL, WNOHANG) == server) {
            server = 0;
            return false;
        }
        usleep(10000);
    }
    return false;
}

static void server_stop(void)
{
    if (server > 0) {
        kill(server, SIGCONT);
        kill(server, SIGKILL);
        waitpid(server, NULL, 0);
    }
    server = 0;
    unlink(sock);
}

#define NEED_SERVER(mem) do { if (!server_start(mem)) { SKIP("no redis-server here"); } } while (0)

static void blocks_come_back(void)
{
    NEED_SERVER("0");
    enum { N = 600 };
    static struct arle_kv_item items[N];
    static uint8_t data[N][700], got[N][700], present[N];
    struct arle_err err = ARLE_ERR_INIT;
    for (int i = 0; i < N; i++) {
        memset(data[i], i, sizeof data[i]);
        memset(items[i].key, 0, 32);
        memcpy(items[i].key, &i, 4);
        items[i].data = data[i];
        items[i].len = 1 + (uint64_t)i;
    }
    EXPECT_EQ(api()->put(ctx, items, N / 2, 2000, &err), 0);
    EXPECT_EQ(api()->exists(ctx, items, N, present, 2000, &err), 0);
    for (int i = 0; i < N; i++) {
        EXPECT_EQ(present[i], i < N / 2);
        items[i].data = got[i];
        items[i].cap = sizeof got[i];
        items[i].len = 77;
    }
    items[5].cap = 3;                   /* too small for what is there: absent, nothing overrun */
    EXPECT_EQ(api()->get(ctx, items, N, 2000, &err), 0);
    for (int i = 0; i < N; i++) {
        EXPECT_EQ(items[i].len, i < N / 2 && i != 5 ? (uint64_t)i + 1 : 0);
        EXPECT(memcmp(got[i], data[i], items[i].len) == 0);
    }
    EXPECT_EQ(api()->remove(ctx, items, N, 2000, &err), 0);
    EXPECT_EQ(api()->exists(ctx, items, N, present, 2000, &err), 0);
    EXPECT_EQ(present[0], 0);
    server_stop();
}

static void calls_end_by_their_deadline(void)
{
    NEED_SERVER("0");
    struct arle_kv_item item = { .key = { 1 } };
    struct arle_err err = ARLE_ERR_INIT;
    uint8_t present, buf[64] = "0123456789";
    item.data = buf;
    item.len = item.cap = 10;
    EXPECT_EQ(api()->put(ctx, &item, 1, 2000, &err), 0);
    kill(server, SIGSTOP);
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    EXPECT_EQ(api()->exists(ctx, &item, 1, &present, 100, &err), -ETIMEDOUT);
    clock_gettime(CLOCK_MONOTONIC, &b);
    double ms = (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6;
    printf("# gave up after %.0f ms of 100\n", ms);
    EXPECT(ms < 2000);                  /* the machine may be busy; what counts is that it ends */
    kill(server, SIGCONT);
    EXPECT_EQ(api()->exists(ctx, &item, 1, &present, 2000, &err), 0);      /* and no stale reply is read */
    EXPECT_EQ(present, 1);
    EXPECT_EQ(api()->get(ctx, &item, 1, 2000, &err), 0);
    EXPECT_EQ(item.len, 10);
    server_stop();
    EXPECT(api()->get(ctx, &item, 1, 200, &err) < 0);
    EXPECT(err.msg[0] != '\0');
}

/* ---- the whole plane over it --------------------------------------------------------------------------------------------- */

static bool start(struct fm *fm)
{
    struct kv_config cfg = { .page_tokens = 16, .n_pages = 100, .n_slots = 4, .max_seq_tokens = 1024, .prefix_cache = true,
                             .snapshot_bytes = 8 * sizeof(struct fm_state), .snapshot_cadence = 512, .store = api(), .store_ctx = ctx,
                             .store_min_bytes_s = 1, .store_deadline_ms = 200 };
    memset(fm, 0, sizeof *fm);
    if (fm_init(fm, &cfg, true, true) < 0)
        return false;
    kv_salt(fm->kv, "alice", "", alice);
    kv_report_prefill(fm->kv, 100, 1000000);
    return true;
}

static void fill(struct fm *fm, int n)
{
    for (int i = 0; i < n; i++) {
        fm_request(fm, alice, doc + 2000 * i, 800, NULL, 0, doc, 1);
        for (int k = 0; k < 20; k++) {
            kv_step_end(fm->kv);
            fake_run_all(&fm->dev);
            kv_settle(fm->kv, 3000);
        }
    }
}

static uint32_t cached_of(struct fm *fm, int i)
{
    struct kv_hit hit = fm_request(fm, alice, doc + 2000 * i, 800, NULL, 0, doc, 1);
    fake_run_all(&fm->dev);
    return hit.cached_tokens;
}

static uint64_t errors(struct fm *fm)
{
    struct kv_stats st;
    kv_step_end(fm->kv);
    kv_stat(fm->kv, &st);
    return st.store_errors;
}

static void another_machine_profits(void)
{
    NEED_SERVER("0");
    struct fm one, two;
    REQUIRE(start(&one));
    fill(&one, 3);
    EXPECT_EQ(errors(&one), 0);
    fm_fini(&one);
    REQUIRE(start(&two));
    for (int i = 0; i < 3; i++)
        EXPECT_EQ(cached_of(&two, i), 768);
    EXPECT_EQ(two.wrong, 0);
    fm_fini(&two);
    server_stop();
}

/* Every value gets a byte changed, behind everyone's back. */
static void corrupt_all(void)
{
    redisContext *c = redisConnectUnix(sock);
    redisReply *keys = c != NULL && c->err == 0 ? redisCommand(c, "KEYS *") : NULL;
    EXPECT(keys != NULL && keys->elements > 100);
    for (size_t i = 0; keys != NULL && i < keys->elements; i++) {
        redisReply *r = redisCommand(c, "SETRANGE %b %d %s", keys->element[i]->str, keys->element[i]->len, (int)(60 + i % 60), "\x01\x02");
        if (r != NULL)
            freeReplyObject(r);
    }
    if (keys != NULL)
        freeReplyObject(keys);
    if (c != NULL)
        redisFree(c);
}

static void a_bad_server_costs_errors_only(void)
{
    for (int how = 0; how < 3; how++) {
        NEED_SERVER("0");
        struct fm one, two;
        REQUIRE(start(&one));
        fill(&one, 3);
        fm_fini(&one);
        REQUIRE(start(&two));
        EXPECT_EQ(cached_of(&two, 0), 768);
        if (how == 0)
            kill(server, SIGSTOP);
        else if (how == 1)
            server_stop();
        else
            corrupt_all();
        EXPECT_EQ(cached_of(&two, 1), 0);
        EXPECT_EQ(cached_of(&two, 2), 0);
        EXPECT(errors(&two) > 0);
        EXPECT_EQ(two.wrong, 0);
        fm_fini(&two);
        EXPECT_EQ(two.wrong, 0);
        server_stop();
    }
}

static void a_full_server_takes_no_more(void)
{
    NEED_SERVER("1mb");                 /* what an empty server needs is about that: writes are refused */
    struct fm one;
    REQUIRE(start(&one));
    fill(&one, 4);
    EXPECT(errors(&one) > 0);
    EXPECT_EQ(one.wrong, 0);
    fm_fini(&one);
    server_stop();
}

int main(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    uint64_t rng = 1;
    for (size_t i = 0; i < sizeof doc / sizeof *doc; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        doc[i] = (int32_t)(rng >> 40);
    }
    snprintf(dir, sizeof dir, "/tmp/arle-kv-redis-XXXXXX");
    if (mkdtemp(dir) == NULL)
        return 1;
    snprintf(sock, sizeof sock, "%s/sock", dir);
    if (arle_plugin_v1.open(&host, NULL, &ctx, &err) < 0) {
        printf("Bail out! %s\n", err.msg);
        return 1;
    }
    RUN(blocks_come_back);
    RUN(calls_end_by_their_deadline);
    RUN(another_machine_profits);
    RUN(a_bad_server_costs_errors_only);
    RUN(a_full_server_takes_no_more);
    arle_plugin_v1.close(ctx);
    server_stop();
    rmdir(dir);
    return tap_done();
}
