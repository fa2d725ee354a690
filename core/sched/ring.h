/*
 * The token ring of one request: events from the engine thread to its one consumer.
 *
 * It is sized, when the request is made, for everything that the request can ever emit, so a push cannot fail and a slow
 * consumer never holds the engine: it costs memory, at most ring_bytes(), of which only what is written becomes resident.
 * For the same reason places are not reused; the indices only grow. Single producer, single consumer, no lock.
 */
#ifndef CORE_SCHED_RING_H
#define CORE_SCHED_RING_H

#include "sched/engine.h"
#include <stdatomic.h>

struct ring {
    uint8_t *bytes;
    size_t cap;
    size_t tail;                    /* producer only */
    size_t seen;                    /* consumer only */
    _Atomic size_t head;            /* release by the producer after a record, acquire by the consumer */
    _Atomic uint32_t bell;          /* futex word: counts pushes that may have a sleeper */
    _Atomic uint32_t sleepers;
};

/** Bytes for n_events, of which n_with_top carry n_top alternatives; SIZE_MAX when it does not fit. */
size_t ring_bytes(uint64_t n_events, uint64_t n_with_top, uint32_t n_top);
int ring_init(struct ring *r, size_t cap);
void ring_fini(struct ring *r);

/* Producer. push makes a record, publish shows everything pushed so far and wakes a sleeper. */
void ring_push(struct ring *r, const struct token_event *ev);
/** As ring_push of an EV_TOKEN without alternatives: what nearly all events are. */
void ring_push_token(struct ring *r, uint32_t index, int32_t id, uint32_t pos, float logprob, float top_logit);
void ring_publish(struct ring *r);

/* Consumer. 1: *out filled; 0: nothing there. */
int ring_pop(struct ring *r, struct token_event *out);
/** Sleeps until something was published after the last pop, or the time passed. 1 when there is something. */
int ring_wait(struct ring *r, int64_t timeout_ms);

/* Memory that is touched late and in order: large blocks come from the kernel directly and cost nothing until written. */
void *lazy_alloc(size_t bytes);
void lazy_free(void *p, size_t bytes);

/* One futex word: waits while *word == seen, at most timeout_us (< 0: for ever). */
void bell_wait(_Atomic uint32_t *word, uint32_t seen, int64_t timeout_us);
void bell_wake(_Atomic uint32_t *word);

#endif
