/*
 * What the scheduler and the KV plane cost per step with 256 running sequences, in processor time, and that a step allocates nothing. The
 * allocator is wrapped by the linker; the fake device's own time is taken off.
 */
#include "config.h"
#include "kv/kv.h"
#include "sched_fake.h"
#include "tap.h"

#define SEQS 256
#define STEPS 200
#define LIMIT_US 50

static _Atomic uint64_t n_allocs;
static _Atomic bool counting;

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);

static void count(void) { atomic_fetch_add(&n_allocs, atomic_load(&counting)); }
void *__wrap_malloc(size_t n) { count(); return __real_malloc(n); }
void *__wrap_calloc(size_t n, size_t size) { count(); return __real_calloc(n, size); }
void *__wrap_realloc(void *p, size_t n) { count(); return __real_realloc(p, n); }

static struct arle_device dev;

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void measure(bool ahead, bool prefix, uint32_t n_prompt)
{
    static struct request *rq[SEQS];
    static int32_t prompt[2048];
    static int64_t us[STEPS];
    struct arle_err err = ARLE_ERR_INIT;
    struct engine *e = NULL;
    struct engine_stats before, after;
    fake_init(&dev);
    dev.async = dev.graphs = ahead;
    dev.quick = true;
    struct engine_config c = fake_config(&dev);
    c.max_seqs = SEQS;
    c.max_tokens = 4096;
    c.context = 2048;
    c.max_queue = SEQS;
    c.prefix_cache = prefix;
    c.kv_snapshot_bytes = prefix ? 1 << 20 : 0;
    c.kv_bytes = 64 << 20;
    REQUIRE(engine_open(&e, &c, &fake_backend, &dev, 0, &fake_model, &dev, &err) == 0);
    for (uint32_t i = 0; i < SEQS; i++) {
        fake_prompt(prompt, n_prompt, i);
        struct request_args a = fake_args(prompt, n_prompt, 600);
        a.sampling.temperature = i % 2;
        a.tenant = i % 3 ? "one" : "two";
        REQUIRE(engine_submit(e, &a, &rq[i], NULL, &err) == 0);
    }
    uint64_t last;
    do {        /* until every sequence has a decode row in each step */
        engine_stat(e, &before);
        last = before.completion_tokens;
        engine_turn(e);
        engine_stat(e, &before);
    } while (before.completion_tokens < SEQS * 20u || before.completion_tokens - last != SEQS);
    for (int i = 0; i < 4; i++)     /* the shape is captured once */
        engine_turn(e);
    engine_stat(e, &before);
    EXPECT_EQ(before.running, SEQS);
    atomic_store(&n_allocs, 0);
    atomic_store(&counting, true);
    for (uint32_t i = 0; i < STEPS; i++) {
        int64_t own = dev.own_us, t0 = fake_now();
        engine_turn(e);
        us[i] = fake_now() - t0 - (dev.own_us - own);
    }
    atomic_store(&counting, false);
    engine_stat(e, &after);
    EXPECT_EQ(after.completion_tokens - before.completion_tokens, SEQS * STEPS);
    EXPECT_EQ(atomic_load(&n_allocs), 0);
    qsort(us, STEPS, sizeof us[0], by_value);
    printf("# %s, prefix cache %s, %u prompt tokens, %u sequences: median %lld us, p99 %lld us per step\n", ahead ? "running ahead" : "plain",
           prefix ? "on" : "off", n_prompt, SEQS, (long long)us[STEPS / 2], (long long)us[STEPS * 99 / 100]);
#ifndef ARLE_SANITIZED
    EXPECT(us[STEPS / 10] <= LIMIT_US);     /* not the median: others on the machine take cache and clock, and never give any */
#endif
    for (uint32_t i = 0; i < SEQS; i++)
        request_unref(rq[i]);
    engine_close(e);
}

static void plain(void) { measure(false, false, 64); }
static void ahead(void) { measure(true, false, 64); }
static void ahead_with_prefixes(void) { measure(true, true, 64); }
static void ahead_long(void) { measure(true, true, 1100); }

int main(void)
{
    RUN(plain);
    RUN(ahead);
    RUN(ahead_with_prefixes);
    RUN(ahead_long);
    return tap_done();
}
