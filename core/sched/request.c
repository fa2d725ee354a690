/*
 * What callers hold: a request is checked and copied here, on the caller's thread, with all the memory it will ever need, so
 * that the engine thread allocates nothing for it while it runs.
 */
#include "sched/sched.h"
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

static int check_sampling(const struct sampling *s, uint32_t n_valid, struct arle_err *err)
{
    if (!(s->temperature >= 0 && s->temperature <= 100))
        return arle_err_param(err, -EINVAL, "temperature", "temperature must be between 0 and 100");
    if (!(s->top_p > 0 && s->top_p <= 1))
        return arle_err_param(err, -EINVAL, "top_p", "top_p must be above 0 and at most 1");
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return arle_err_param(err, -EINVAL, "min_p", "min_p must be between 0 and 1");
    if (s->top_k < 0)
        return arle_err_param(err, -EINVAL, "top_k", "top_k must be 0 (off) or more");
    if (!(s->repetition > 0 && s->repetition <= 10))
        return arle_err_param(err, -EINVAL, "repetition_penalty", "repetition_penalty must be above 0 and at most 10");
    if (!(s->presence >= -10 && s->presence <= 10))
        return arle_err_param(err, -EINVAL, "presence_penalty", "presence_penalty must be between -10 and 10");
    if (!(s->frequency >= -10 && s->frequency <= 10))
        return arle_err_param(err, -EINVAL, "frequency_penalty", "frequency_penalty must be between -10 and 10");
    if (s->n_top > ARLE_MAX_TOP)
        return arle_err_param(err, -EINVAL, "top_logprobs", "at most %d alternatives per token", ARLE_MAX_TOP);
    if (s->n_bias > MAX_BIAS)
        return arle_err_param(err, -EINVAL, "logit_bias", "at most %u entries", MAX_BIAS);
    for (uint32_t i = 0; i < s->n_bias; i++)
        if (s->bias[i].id < 0 || (uint32_t)s->bias[i].id >= n_valid || !isfinite(s->bias[i].value))
            return arle_err_param(err, -EINVAL, "logit_bias", "entry %u: id must be below %u and the value finite", i, n_valid);
    return 0;
}

static int check_args(const struct engine *e, const struct request_args *a, struct arle_err *err)
{
    if (a->n_tokens == 0)
        return arle_err_param(err, -EINVAL, "prompt", "the prompt is empty");
    for (uint32_t i = 0; i < a->n_tokens; i++)
        if (a->tokens[i] < 0 || (uint32_t)a->tokens[i] >= e->desc.n_valid)
            return arle_err_param(err, -EINVAL, "prompt", "token id %d at %u is not below %u", a->tokens[i], i, e->desc.n_valid);
    if (a->n < 1 || a->n > MAX_ANSWERS)
        return arle_err_param(err, -EINVAL, "n", "n must be between 1 and %u", MAX_ANSWERS);
    if (a->n_stop_ids > MAX_STOP_IDS)
        return arle_err_param(err, -EINVAL, "stop_token_ids", "at most %u", MAX_STOP_IDS);
    if (a->drafts && !(e->cfg.drafts && e->desc.has_drafter))
        return arle_err_param(err, -EINVAL, "drafts", "this model is served without a drafter");
    if (a->n_tokens > e->context || (a->max_new > 0 && a->n_tokens == e->context))
        return arle_err_param(err, -E2BIG, "prompt", "the prompt has %u tokens; the context is %u", a->n_tokens, e->context);
    if (a->max_new > e->context - a->n_tokens)
        return arle_err_param(err, -E2BIG, "max_tokens", "%u prompt tokens and %u to generate exceed the context of %u",
                              a->n_tokens, a->max_new, e->context);
    return check_sampling(&a->sampling, e->desc.n_valid, err);
}

/* Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators": the SplitMix64 finaliser. */
static uint64_t mix64(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

/* Seeds of the n answers differ; the first is the given one, so that n = 1 and n = 2 agree on it. */
static uint64_t answer_seed(uint64_t seed, uint32_t index)
{
    return index == 0 ? seed : mix64(seed + index * 0x9E3779B97F4A7C15ull);
}

static void request_free(struct request *rq)
{
    if (rq == NULL)
        return;
    ring_fini(&rq->ring);
    lazy_free(rq->prompt_mem, rq->prompt_bytes);
    free(rq->tenant_own);
    free(rq->bias);
    free(rq->stop_ids);
    free(rq->marks);
    free((void *)rq->stop);
    free(rq->seq);
    free(rq);
}

void request_drop(struct request *rq)
{
    /* Both sides release what they wrote, the last one acquires it before freeing. */
    if (atomic_fetch_sub_explicit(&rq->refs, 1, memory_order_acq_rel) == 1)
        request_free(rq);
}

static void *copy_of(const void *src, size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (p != NULL && n > 0)
        memcpy(p, src, n * size);
    return p;
}

/* Every event this request can emit: see ring.h. */
static size_t events_bytes(const struct request_args *a, uint32_t n_top)
{
    uint64_t tokens = (uint64_t)a->n * a->max_new, prompt = a->prompt_logprobs ? a->n_tokens : 0;
    uint64_t drafts = a->drafts ? (uint64_t)a->n * ((uint64_t)a->n_tokens + a->max_new) : 0;
    return ring_bytes(tokens + prompt + drafts + a->n, tokens + prompt, n_top);
}

static int copy_arrays(struct request *rq, const struct request_args *a, struct arle_err *err)
{
    size_t limit = (size_t)a->n_tokens + a->max_new, name = strlen(a->tenant ? a->tenant : "");
    uint32_t n_top = a->sampling.want_logprobs ? a->sampling.n_top : 0;
    rq->prompt_bytes = a->n * limit * sizeof(int32_t);
    rq->prompt_mem = lazy_alloc(rq->prompt_bytes);
    rq->seq = aligned_alloc(CACHE_LINE, a->n * sizeof *rq->seq);
    rq->stop = calloc(a->n, sizeof *rq->stop);
    rq->bias = copy_of(a->sampling.bias, a->sampling.n_bias, sizeof *rq->bias);
    rq->stop_ids = copy_of(a->stop_ids, a->n_stop_ids, sizeof *rq->stop_ids);
    rq->marks = copy_of(a->marks, a->n_marks, sizeof *rq->marks);
    rq->tenant_own = calloc(1, sizeof *rq->tenant_own + name + 1);
    if (rq->prompt_mem == NULL || rq->seq == NULL || rq->stop == NULL || rq->bias == NULL || rq->stop_ids == NULL ||
        rq->marks == NULL || rq->tenant_own == NULL || ring_init(&rq->ring, events_bytes(a, n_top)) < 0)
        return arle_err_set(err, -ENOMEM, "no memory for a request of %u tokens", a->n_tokens);
    memcpy(rq->tenant_own->name, a->tenant ? a->tenant : "", name + 1);
    rq->sampling.n_top = n_top;
    rq->sampling.bias = rq->bias;
    rq->n_stop_ids = a->n_stop_ids;
    rq->n_marks = a->n_marks;
    return 0;
}

static void init_answers(struct engine *e, struct request *rq, const struct request_args *a)
{
    uint32_t limit = a->n_tokens + a->max_new;
    uint64_t seed = a->sampling.has_seed ? a->sampling.seed : mix64(e->seed_salt + rq->id);
    for (uint32_t i = 0; i < a->n; i++) {
        struct seq *sq = &rq->seq[i];
        *sq = (struct seq){ .rq = rq, .index = i, .state = SEQ_WAITING, .tokens = rq->prompt_mem + (size_t)i * limit,
                            .n_prompt = a->n_tokens, .n_tokens = a->n_tokens, .n_limit = limit, .hist = -1,
                            .seed = answer_seed(seed, i), .since_us = rq->submit_us };
        memcpy(sq->tokens, a->tokens, a->n_tokens * sizeof(int32_t));
    }
}

static int request_make(struct engine *e, const struct request_args *a, struct request **out, struct arle_err *err)
{
    struct request *rq = aligned_alloc(CACHE_LINE, sizeof *rq);
    if (rq == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for a request");
    memset(rq, 0, sizeof *rq);
    rq->eng = e;
    rq->id = atomic_fetch_add(&e->next_id, 1) + 1;
    rq->sampling = a->sampling;
    int r = copy_arrays(rq, a, err);
    if (r < 0) {
        request_free(rq);
        return r;
    }
    const struct sampling *s = &rq->sampling;
    rq->n = rq->n_unfinished = rq->n_unreleased = rq->n_unadmitted = a->n;
    rq->n_prompt = a->n_tokens;
    rq->max_new = a->max_new;
    rq->ignore_eos = a->ignore_eos;
    rq->prompt_logprobs = a->prompt_logprobs;
    rq->drafts = a->drafts;
    rq->penalties = s->repetition != 1 || s->presence != 0 || s->frequency != 0;
    rq->priority = a->priority;
    rq->notify = a->notify;
    rq->notify_arg = a->notify_arg;
    rq->submit_us = engine_now(e);
    int64_t ms = a->deadline_ms > 0 ? a->deadline_ms : e->cfg.deadline_ms;
    rq->deadline_us = ms > 0 ? rq->submit_us + ms * 1000 : INT64_MAX;
    rq->queue_deadline_us = e->cfg.queue_deadline_ms > 0 ? rq->submit_us + e->cfg.queue_deadline_ms * 1000 : INT64_MAX;
    if (rq->queue_deadline_us > rq->deadline_us)
        rq->queue_deadline_us = rq->deadline_us;
    /* Rows that must all be computed (log-probabilities, drafts of the prompt) cannot start behind a remembered prefix: such a
     * request gets a salt that nobody shares. */
    char own[32] = "";
    rq->private_salt = a->prompt_logprobs || a->drafts;
    if (rq->private_salt)
        snprintf(own, sizeof own, "\1own %llx", (unsigned long long)rq->id);
    kv_salt(e->kv, a->tenant ? a->tenant : "", own[0] ? own : a->cache_salt ? a->cache_salt : "", rq->salt);
    init_answers(e, rq, a);
    atomic_init(&rq->refs, 2);
    *out = rq;
    return 0;
}

/* Half of a mean request's time per request that waits for a seat: a guess, between 1 s and a minute. */
static int retry_after(struct engine *e, uint32_t waiting)
{
    int64_t s = atomic_load(&e->mean_request_us) * (int64_t)(waiting + 1) / ((int64_t)e->cfg.max_seqs * 1000000) + 1;
    return s > 60 ? 60 : (int)s;
}

int engine_submit(struct engine *e, const struct request_args *a, struct request **out, int *retry_after_s, struct arle_err *err)
{
    if (atomic_load(&e->is_dead))
        return arle_err_set(err, -EIO, "the device is dead");
    if (atomic_load(&e->draining) || atomic_load(&e->closing))
        return arle_err_set(err, -ESHUTDOWN, "the server is shutting down");
    int r = check_args(e, a, err);
    if (r < 0)
        return r;
    uint32_t waiting = atomic_fetch_add(&e->queued, 1);
    if (waiting >= e->cfg.max_queue) {
        atomic_fetch_sub(&e->queued, 1);
        atomic_fetch_add(&e->rejected, 1);
        if (retry_after_s != NULL)
            *retry_after_s = retry_after(e, waiting);
        return arle_err_set(err, -EAGAIN, "%u requests are waiting already", waiting);
    }
    struct request *rq = NULL;
    r = request_make(e, a, &rq, err);
    if (r < 0) {
        atomic_fetch_sub(&e->queued, 1);
        return r;
    }
    *out = rq;      /* before the engine can call notify */
    atomic_fetch_add(&e->live, 1);
    /* Release: pairs with the acquire exchange in queue_intake. */
    rq->mail_next = atomic_load_explicit(&e->mail, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&e->mail, &rq->mail_next, rq, memory_order_release, memory_order_relaxed))
        ;
    queue_wake(e);
    return 0;
}

uint64_t request_id(const struct request *rq)
{
    return rq->id;
}

int request_next(struct request *rq, struct token_event *out)
{
    while (ring_pop(&rq->ring, out)) {
        rq->ended_seen += out->kind == EV_FINISH;
        if (out->kind != EV_FINISH || out->finish != FINISH_NONE)       /* NONE: the consumer stopped it and knows */
            return 1;
    }
    return rq->ended_seen == rq->n ? -EPIPE : 0;
}

int request_wait(struct request *rq, int64_t timeout_ms)
{
    return rq->ended_seen == rq->n ? 1 : ring_wait(&rq->ring, timeout_ms);
}

static void flag_engine(struct request *rq)
{
    if (atomic_load_explicit(&rq->ended, memory_order_acquire))
        return;
    atomic_store(&rq->eng->attention, 1);
    queue_wake(rq->eng);
}

void request_stop(struct request *rq, uint32_t index)
{
    if (index >= rq->n)
        return;
    atomic_store(&rq->stop[index], 1);
    flag_engine(rq);
}

void request_cancel(struct request *rq)
{
    if (atomic_exchange(&rq->cancel, 1) == 0)
        flag_engine(rq);
}

bool request_usage(const struct request *rq, struct request_usage *out)
{
    /* Acquire: pairs with the release in seq_finish; usage does not change after it. */
    if (!atomic_load_explicit(&rq->ended, memory_order_acquire))
        return false;
    *out = rq->usage;
    return true;
}

void request_unref(struct request *rq)
{
    if (rq == NULL)
        return;
    uint32_t idle = 0;
    while (!atomic_compare_exchange_weak(&rq->notify_state, &idle, 2)) {
        idle = 0;
        sched_yield();      /* a notify is running; it does not block */
    }
    request_cancel(rq);
    request_drop(rq);
}
