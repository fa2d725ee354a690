/* The engine on its own thread, with many consumers that read, dawdle, stop, cancel and leave. Meant for the thread sanitizer. */
#include "kv/kv.h"
#include "sched_fake.h"
#include "tap.h"
#include "util/clock.h"

#define CLIENTS 6
#define ROUNDS 25

static struct arle_device dev;
static struct engine *eng;
static struct arle_err err;
static _Atomic uint32_t wrong, notified, completed;

static void open_threaded(uint32_t max_seqs, int64_t watchdog_ms)
{
    struct engine_config c = fake_config(&dev);
    c.manual = false;
    c.clock_us = NULL;
    c.max_seqs = max_seqs;
    c.prefix_cache = true;
    c.kv_snapshot_bytes = 1 << 16;
    c.watchdog_ms = watchdog_ms;
    c.kv_bytes = 200 * 64 + 4096;       /* pages are scarce: sequences are moved away all the time */
    eng = NULL;
    if (engine_open(&eng, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err) < 0)
        TAP_FAIL("engine_open: %s", err.msg);
}

static void ring_bell(void *arg)
{
    atomic_fetch_add(&notified, 1);
    atomic_fetch_add((_Atomic uint32_t *)arg, 1);
}

/* Reads to the end; true when the answer was as the model makes it. */
static void consume(struct request *rq, const int32_t *all, uint32_t n_prompt, uint32_t n_new, uint32_t quit_after, int how)
{
    struct token_event ev;
    uint32_t n = 0, finish = 0;
    int r;
    while ((r = request_next(rq, &ev)) != -EPIPE) {
        if (r == 0) {
            request_wait(rq, 1000);
            continue;
        }
        if (ev.kind == EV_TOKEN && ev.id != all[n_prompt + n++])
            atomic_fetch_add(&wrong, 1);
        if (ev.kind == EV_FINISH)
            finish = ev.finish;
        if (n == quit_after && how == 0)
            return;
        if (n == quit_after && how == 1)
            request_cancel(rq);
        if (n == quit_after && how == 2)
            request_stop(rq, 0);
        if (n == quit_after && how == 3)
            engine_cancel(eng, request_id(rq));
    }
    struct request_usage u;
    if (!request_usage(rq, &u) || (finish == FINISH_LENGTH && n != n_new))
        atomic_fetch_add(&wrong, 1);
    atomic_fetch_add(&completed, finish == FINISH_LENGTH);
}

static void *client(void *arg)
{
    uint64_t seed = (uint64_t)(uintptr_t)arg;
    for (uint32_t i = 0; i < ROUNDS; i++) {
        uint64_t h = fake_mix(seed * 100 + i, 3);
        uint32_t n_prompt = 1 + (uint32_t)(h % 150), n_new = 1 + (uint32_t)(h >> 8) % 60;
        int32_t all[256];
        _Atomic uint32_t bell = 0;      /* on our stack: after request_unref nobody may ring it */
        struct arle_err why;
        struct request *rq;
        fake_prompt(all, n_prompt, i % 5);
        for (uint32_t k = n_prompt; k < n_prompt + n_new; k++)
            all[k] = fake_oracle(all, k);
        struct request_args a = fake_args(all, n_prompt, n_new);
        a.notify = ring_bell;
        a.notify_arg = &bell;
        a.tenant = seed % 2 ? "odd" : "even";
        a.priority = (int32_t)(h >> 20) % 3;
        if (engine_submit(eng, &a, &rq, NULL, &why) < 0) {
            atomic_fetch_add(&wrong, 1);
            continue;
        }
        consume(rq, all, n_prompt, n_new, 1 + (uint32_t)(h >> 16) % 40, (int)(h >> 24) % 6);
        request_unref(rq);
    }
    return NULL;
}

static void *onlooker(void *arg)
{
    struct engine_stats st;
    struct engine_hists hs;
    struct kv_stats kv;
    while (!atomic_load((_Atomic bool *)arg)) {
        engine_stat(eng, &st);
        engine_hist(eng, &hs);
        engine_kv_stat(eng, &kv);
        usleep(200);
    }
    return NULL;
}

/* An operator who pins what the clients ask, while they ask it. */
static void *pinner(void *arg)
{
    uint32_t pinned = 0;
    for (uint32_t i = 0; !atomic_load((_Atomic bool *)arg); i++) {
        uint64_t h = fake_mix(i, 11);
        int32_t all[150];
        struct kv_pinned p;
        struct arle_err why = ARLE_ERR_INIT;
        struct pin_args a = { .what = h % 3 ? PIN_TAKE : PIN_RELEASE, .tokens = all, .n_tokens = 30 + (uint32_t)(h >> 8) % 120,
                              .tenant = h >> 20 & 1 ? "odd" : "even" };
        fake_prompt(all, 150, i % 5);
        int r = engine_kv_pin(eng, &a, &p, 10000, &why);
        if (r != 0 && r != -ENOENT && r != -ENOSPC)
            atomic_fetch_add(&wrong, 1);
        pinned += r == 0 && a.what == PIN_TAKE;
    }
    struct pin_args all = { .what = PIN_RELEASE_ALL };
    struct kv_pinned p;
    if (engine_kv_pin(eng, &all, &p, 10000, NULL) < 0)
        atomic_fetch_add(&wrong, 1);
    printf("# pinned %u times\n", pinned);
    return NULL;
}

static void crowd(bool async)
{
    pthread_t t[CLIENTS], look, pins;
    _Atomic bool over = false;
    struct engine_stats st;
    struct engine_hists hs;
    fake_init(&dev);
    dev.async = dev.graphs = async;
    atomic_store(&wrong, 0);
    atomic_store(&completed, 0);
    atomic_store(&notified, 0);
    open_threaded(8, 10000);
    REQUIRE(eng != NULL);
    pthread_create(&look, NULL, onlooker, &over);
    pthread_create(&pins, NULL, pinner, &over);
    for (uintptr_t i = 0; i < CLIENTS; i++)
        pthread_create(&t[i], NULL, client, (void *)(i + 1));
    for (int i = 0; i < CLIENTS; i++)
        pthread_join(t[i], NULL);
    EXPECT_EQ(engine_drain(eng, 2000), 0);
    atomic_store(&over, true);
    pthread_join(look, NULL);
    pthread_join(pins, NULL);
    usleep(150000);     /* an idle engine publishes everything */
    engine_stat(eng, &st);
    engine_hist(eng, &hs);
    EXPECT_EQ(atomic_load(&wrong), 0);
    EXPECT(atomic_load(&completed) > CLIENTS * ROUNDS / 3);
    EXPECT(atomic_load(&notified) > 0);
    EXPECT_EQ(st.finished + st.cancelled, CLIENTS * ROUNDS);
    EXPECT_EQ(st.errors, 0);
    EXPECT_EQ(st.running + st.waiting + st.parked, 0);
    EXPECT_EQ(hs.step.count, st.steps);
    struct kv_stats kv;
    engine_kv_stat(eng, &kv);
    EXPECT_EQ(kv.slots_free, kv.slots_total);
    EXPECT_EQ(kv.pages_free + kv.pages_cached, kv.pages_total);
    EXPECT_EQ(kv.pins + kv.pinned_pages, 0);
    engine_close(eng);
}
static void crowd_plain(void) { crowd(false); }
static void crowd_ahead(void) { crowd(true); }

/* Nobody reads for the whole answer: the engine goes on, others get theirs, and nothing is lost. */
static void a_consumer_that_does_not_read(void)
{
    int32_t all[512];
    struct request *slow, *quick;
    fake_init(&dev);
    dev.async = true;
    open_threaded(4, 10000);
    REQUIRE(eng != NULL);
    fake_prompt(all, 10, 1);
    for (uint32_t k = 10; k < 490; k++)
        all[k] = fake_oracle(all, k);
    struct request_args a = fake_args(all, 10, 480);
    REQUIRE(engine_submit(eng, &a, &slow, NULL, &err) == 0);
    a = fake_args(all, 10, 40);
    REQUIRE(engine_submit(eng, &a, &quick, NULL, &err) == 0);
    atomic_store(&wrong, 0);
    consume(quick, all, 10, 40, 9999, 9);
    struct request_usage u;
    for (int i = 0; i < 500 && !request_usage(slow, &u); i++)
        usleep(10000);
    EXPECT(request_usage(slow, &u));
    consume(slow, all, 10, 480, 9999, 9);
    EXPECT_EQ(atomic_load(&wrong), 0);
    request_unref(slow);
    request_unref(quick);
    engine_close(eng);
}

static void a_slow_step_is_seen(void)
{
    int32_t all[16];
    struct request *rq;
    struct engine_stats st = { 0 };
    fake_init(&dev);
    dev.async = true;
    dev.sleep_us = 60000;
    open_threaded(2, 20);
    REQUIRE(eng != NULL);
    fake_prompt(all, 16, 1);
    struct request_args a = fake_args(all, 16, 4);
    REQUIRE(engine_submit(eng, &a, &rq, NULL, &err) == 0);
    bool stalled = false;
    for (int i = 0; i < 500 && !request_wait(rq, 1); i++) {
        engine_stat(eng, &st);
        stalled |= st.stalled && st.step_age_us > 20000;
    }
    EXPECT(stalled);
    EXPECT_EQ(engine_drain(eng, 5000), 0);
    usleep(150000);
    engine_stat(eng, &st);
    EXPECT(st.slow_steps >= 1);
    request_unref(rq);
    engine_close(eng);
}

static void drain_cuts_off(void)
{
    int32_t all[16];
    struct request *rq;
    fake_init(&dev);
    dev.async = true;
    dev.sleep_us = 2000;
    open_threaded(2, 10000);
    REQUIRE(eng != NULL);
    fake_prompt(all, 16, 1);
    struct request_args a = fake_args(all, 16, 450);
    REQUIRE(engine_submit(eng, &a, &rq, NULL, &err) == 0);
    int64_t t0 = clock_mono_ms();
    EXPECT_EQ(engine_drain(eng, 50), 1);
    EXPECT(clock_mono_ms() - t0 < 700);
    struct request *late;
    EXPECT_EQ(engine_submit(eng, &a, &late, NULL, &err), -ESHUTDOWN);
    struct token_event ev = { 0 };
    while (request_next(rq, &ev) != -EPIPE)
        request_wait(rq, 100);
    EXPECT_EQ(ev.finish, FINISH_CANCELLED);
    request_unref(rq);
    /* A drained engine sleeps until it is closed. */
    struct timespec before, after;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    usleep(300000);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    EXPECT((after.tv_sec - before.tv_sec) * 1000 + (after.tv_nsec - before.tv_nsec) / 1000000 < 100);
    engine_close(eng);
}

int main(void)
{
    RUN(crowd_plain);
    RUN(crowd_ahead);
    RUN(a_consumer_that_does_not_read);
    RUN(a_slow_step_is_seen);
    RUN(drain_cuts_off);
    return tap_done();
}
