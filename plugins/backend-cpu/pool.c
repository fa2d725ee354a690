/*
 * Persistent workers that run parts of one op at a time. They spin for a while after each job, since ops follow each other by
 * microseconds during a step, and then sleep on a futex. Owns the threads; knows nothing of ops.
 *
 * How work is cut into parts is fixed; who runs a part is not. Every thread takes the part of its own number first and then any
 * that nobody has begun, so that a worker that the system keeps waiting for a CPU delays nobody.
 */
#include "cpu.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPINS_BEFORE_SLEEP 20000    /* about 200 us on a 2025 server core: longer than the gaps inside a step */
#define SPINS_BEFORE_YIELD 2000

struct worker {
    struct pool *pool;
    unsigned index;
    pthread_t thread;
};

/* A part belongs to whoever moves its word up to the serial of the job. Words of a finished job are all at its serial or beyond,
 * so that a thread which still looks at an old job can take nothing. */
struct claim {
    _Alignas(64) _Atomic uint64_t serial;
};

struct pool {
    unsigned n_threads;
    bool pin, caller_pinned;
    cpu_set_t cpus;
    struct worker *workers;             /* n_threads - 1 */
    struct claim *claims;               /* n_threads */
    atomic_flag busy;                   /* held by the thread whose job runs */
    part_fn fn;                         /* fn, arg: written before job is released, read by owners of its parts only */
    void *arg;
    _Alignas(64) _Atomic uint64_t job;  /* serial << 16 | n_parts; pairs with the acquire in worker_wait */
    _Alignas(64) _Atomic uint32_t left; /* parts that are not done; pairs with the acquire in pool_run */
    _Alignas(64) _Atomic uint32_t sleepers;
    _Atomic uint32_t wake;              /* futex word, raised to end all sleeps */
    _Atomic bool stop;
};

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t worker_wait(struct pool *p, uint64_t seen)
{
    uint64_t job;
    for (unsigned spin = 0; spin < SPINS_BEFORE_SLEEP; spin++) {
        job = atomic_load_explicit(&p->job, memory_order_acquire);
        if (job != seen)
            return job;
        cpu_relax();
    }
    /* Sequentially consistent on both sides: either the caller sees the sleeper or the sleeper sees the job. */
    atomic_fetch_add(&p->sleepers, 1);
    for (;;) {
        uint32_t word = atomic_load(&p->wake);
        job = atomic_load(&p->job);
        if (job != seen || atomic_load(&p->stop))
            break;
        syscall(SYS_futex, &p->wake, FUTEX_WAIT_PRIVATE, word, NULL, NULL, 0);
    }
    atomic_fetch_sub(&p->sleepers, 1);
    return job;
}

/* Runs parts of the job until all have an owner, beginning with number `first`. */
static void run_free_parts(struct pool *p, uint64_t job, unsigned first)
{
    uint64_t serial = job >> 16;
    unsigned n = job & 0xffff;
    for (unsigned i = 0; i < n; i++) {
        unsigned part = (first + i) % n;
        uint64_t seen = atomic_load_explicit(&p->claims[part].serial, memory_order_relaxed);
        if (seen < serial && atomic_compare_exchange_strong_explicit(&p->claims[part].serial, &seen, serial, memory_order_acq_rel,
                                                                     memory_order_relaxed)) {
            p->fn(p->arg, part, n);
            atomic_fetch_sub_explicit(&p->left, 1, memory_order_release);
        }
    }
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    struct pool *p = w->pool;
    uint64_t seen = 0;
    while (!atomic_load(&p->stop)) {
        uint64_t job = worker_wait(p, seen);
        if (job != seen && (job & 0xffff) != 0)
            run_free_parts(p, job, w->index);
        seen = job;
    }
    return NULL;
}

static void pin_thread(struct pool *p, pthread_t th, unsigned index)
{
    for (int c = 0; c < CPU_SETSIZE; c++) {
        if (CPU_ISSET(c, &p->cpus) && index-- == 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(c, &one);
            pthread_setaffinity_np(th, sizeof one, &one);
            return;
        }
    }
}

int pool_create(unsigned n_threads, bool pin, struct pool **out, struct arle_err *err)
{
    struct pool *p = NULL;
    if (posix_memalign((void **)&p, 64, sizeof *p) != 0)
        return arle_err_set(err, -ENOMEM, "no memory for the thread pool");
    memset(p, 0, sizeof *p);
    p->workers = calloc(n_threads, sizeof *p->workers);
    if (p->workers == NULL || posix_memalign((void **)&p->claims, 64, n_threads * sizeof *p->claims) != 0) {
        free(p->workers);
        free(p);
        return arle_err_set(err, -ENOMEM, "no memory for %u workers", n_threads);
    }
    memset(p->claims, 0, n_threads * sizeof *p->claims);
    p->pin = pin;
    if (sched_getaffinity(0, sizeof p->cpus, &p->cpus) != 0)
        p->pin = false;
    p->n_threads = 1;
    for (unsigned i = 1; i < n_threads; i++) {
        struct worker *w = &p->workers[i - 1];
        *w = (struct worker) { .pool = p, .index = i };
        int r = pthread_create(&w->thread, NULL, worker_main, w);
        if (r != 0) {
            pool_destroy(p);
            return arle_err_set(err, -r, "cannot start worker thread %u of %u: %s", i, n_threads, strerror(r));
        }
        p->n_threads++;
        if (p->pin)
            pin_thread(p, w->thread, i);
    }
    *out = p;
    return 0;
}

static void wake_all(struct pool *p)
{
    atomic_fetch_add(&p->wake, 1);
    syscall(SYS_futex, &p->wake, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

void pool_destroy(struct pool *p)
{
    if (p == NULL)
        return;
    atomic_store(&p->stop, true);
    /* A job of no parts ends the spinning. One store: a worker must not see the new serial with the last job's parts. */
    atomic_store(&p->job, ((atomic_load(&p->job) >> 16) + 1) << 16);
    wake_all(p);
    for (unsigned i = 1; i < p->n_threads; i++)
        pthread_join(p->workers[i - 1].thread, NULL);
    free(p->workers);
    free(p->claims);
    free(p);
}

unsigned pool_threads(const struct pool *p)
{
    return p->n_threads;
}

void pool_run(struct pool *p, unsigned want, part_fn fn, void *arg)
{
    unsigned n = want < p->n_threads ? want : p->n_threads;
    if (n <= 1) {
        fn(arg, 0, 1);
        return;
    }
    if (atomic_flag_test_and_set_explicit(&p->busy, memory_order_acquire)) {
        for (unsigned i = 0; i < n; i++)        /* another engine has the workers: the parts do not mind who runs them */
            fn(arg, i, n);
        return;
    }
    if (p->pin && !p->caller_pinned) {
        p->caller_pinned = true;
        pin_thread(p, pthread_self(), 0);
    }
    p->fn = fn;
    p->arg = arg;
    atomic_store_explicit(&p->left, n, memory_order_relaxed);
    uint64_t job = ((atomic_load_explicit(&p->job, memory_order_relaxed) >> 16) + 1) << 16 | n;
    atomic_store(&p->job, job);
    if (atomic_load(&p->sleepers) > 0)
        wake_all(p);
    run_free_parts(p, job, 0);
    for (unsigned spin = 0; atomic_load_explicit(&p->left, memory_order_acquire) != 0; spin++) {
        if (spin < SPINS_BEFORE_YIELD)
            cpu_relax();
        else
            sched_yield();
    }
    atomic_flag_clear_explicit(&p->busy, memory_order_release);
}
