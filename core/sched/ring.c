/* The token ring and the futex under it. Used by the engine thread (push) and one consumer per request (pop). */
#include "sched/ring.h"
#include "util/clock.h"
#include <linux/futex.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LAZY_MIN ((size_t)128 << 10)

/* What an event takes in the ring; alternatives follow as n_top ids, then n_top logprobs. */
struct record {
    uint8_t kind, finish;
    uint16_t n_top;
    uint32_t index;
    int32_t id;
    uint32_t pos;
    float logprob, top_logit;
    int32_t error;
};

void *lazy_alloc(size_t bytes)
{
    if (bytes < LAZY_MIN)
        return malloc(bytes ? bytes : 1);
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

void lazy_free(void *p, size_t bytes)
{
    if (p == NULL)
        return;
    if (bytes < LAZY_MIN)
        free(p);
    else
        munmap(p, bytes);
}

void bell_wait(_Atomic uint32_t *word, uint32_t seen, int64_t timeout_us)
{
    struct timespec ts = { .tv_sec = timeout_us / 1000000, .tv_nsec = timeout_us % 1000000 * 1000 };
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout_us < 0 ? NULL : &ts, NULL, 0);
}

void bell_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

size_t ring_bytes(uint64_t n_events, uint64_t n_with_top, uint32_t n_top)
{
    size_t plain, tops, sum;
    if (arle_mul_size(&plain, n_events, sizeof(struct record)) < 0 || arle_mul_size(&tops, n_with_top, 8u * n_top) < 0 ||
        __builtin_add_overflow(plain, tops, &sum))
        return SIZE_MAX;
    return sum;
}

int ring_init(struct ring *r, size_t cap)
{
    memset(r, 0, sizeof *r);
    r->bytes = lazy_alloc(cap);
    r->cap = cap;
    return r->bytes == NULL ? -ENOMEM : 0;
}

void ring_fini(struct ring *r)
{
    lazy_free(r->bytes, r->cap);
    r->bytes = NULL;
}

/* Place for a record and its alternatives, or NULL. */
static inline uint8_t *take(struct ring *r, size_t bytes)
{
    if (r->cap - r->tail < bytes)
        return NULL;    /* the bound was computed when the request was made: cannot happen, and must not write past the end */
    uint8_t *p = r->bytes + r->tail;
    r->tail += bytes;
    return p;
}

void ring_push(struct ring *r, const struct token_event *ev)
{
    struct record rec = { ev->kind, ev->finish, ev->n_top, ev->index, ev->id, ev->pos, ev->logprob, ev->top_logit, ev->error };
    size_t tops = (size_t)ev->n_top * 4;
    uint8_t *p = take(r, sizeof rec + 2 * tops);
    if (p == NULL)
        return;
    memcpy(p, &rec, sizeof rec);
    memcpy(p + sizeof rec, ev->top_ids, tops);
    memcpy(p + sizeof rec + tops, ev->top_logprobs, tops);
}

void ring_push_token(struct ring *r, uint32_t index, int32_t id, uint32_t pos, float logprob, float top_logit)
{
    struct record rec = { .kind = EV_TOKEN, .index = index, .id = id, .pos = pos, .logprob = logprob, .top_logit = top_logit };
    uint8_t *p = take(r, sizeof rec);
    if (p != NULL)
        memcpy(p, &rec, sizeof rec);
}

void ring_publish(struct ring *r)
{
    /* Release: pairs with the acquire in ring_pop. The bell goes after it, so that a woken consumer finds the record. */
    atomic_store_explicit(&r->head, r->tail, memory_order_release);
    atomic_fetch_add(&r->bell, 1);
    if (atomic_load(&r->sleepers) > 0)
        bell_wake(&r->bell);
}

int ring_pop(struct ring *r, struct token_event *out)
{
    if (r->seen == atomic_load_explicit(&r->head, memory_order_acquire))
        return 0;
    struct record rec;
    const uint8_t *p = r->bytes + r->seen;
    memcpy(&rec, p, sizeof rec);
    size_t tops = (size_t)rec.n_top * 4;
    out->kind = rec.kind, out->finish = rec.finish, out->n_top = rec.n_top, out->index = rec.index;
    out->id = rec.id, out->pos = rec.pos, out->logprob = rec.logprob, out->top_logit = rec.top_logit, out->error = rec.error;
    memcpy(out->top_ids, p + sizeof rec, tops);
    memcpy(out->top_logprobs, p + sizeof rec + tops, tops);
    r->seen += sizeof rec + 2 * tops;
    return 1;
}

int ring_wait(struct ring *r, int64_t timeout_ms)
{
    int64_t end_us = clock_mono_us() + timeout_ms * 1000;
    int ready = 0;
    atomic_fetch_add(&r->sleepers, 1);
    for (;;) {
        uint32_t bell = atomic_load(&r->bell);
        ready = r->seen != atomic_load_explicit(&r->head, memory_order_acquire);
        int64_t left_us = timeout_ms < 0 ? -1 : end_us - clock_mono_us();
        if (ready || (timeout_ms >= 0 && left_us <= 0))
            break;
        bell_wait(&r->bell, bell, left_us);
    }
    atomic_fetch_sub(&r->sleepers, 1);
    return ready;
}
