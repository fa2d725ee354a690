/*
 * Who runs: takes waiting answers in while pages, slots and seats last, moves others away when pages run out, and ends
 * answers. Called between two steps by the engine thread.
 *
 * When it is called, every sequence that a launched step holds has been computed exactly up to its known tokens (results of
 * all steps but the newest were read), so closing or parking it is consistent; see docs/scheduler.md.
 */
#include "sched/sched.h"
#include "util/log.h"
#include <string.h>

#define GROWTH_MIN 16u
#define GROWTH_MAX 1024u
#define GROWTH_STEPS 64u

/* ---- ends ---- */

void seq_flush_events(struct engine *e)
{
    for (uint32_t i = 0; i < e->n_touched; i++) {
        struct request *rq = e->touched[i];
        rq->touched = false;
        ring_publish(&rq->ring);
        uint32_t idle = 0;
        if (rq->notify == NULL || !atomic_compare_exchange_strong(&rq->notify_state, &idle, 1))
            continue;       /* nobody listens, or the consumer let go */
        rq->notify(rq->notify_arg);
        atomic_store(&rq->notify_state, 0);
    }
    e->n_touched = 0;
}

static void touch(struct engine *e, struct request *rq)
{
    if (rq->touched)
        return;
    if (e->n_touched == e->cap_touched)
        seq_flush_events(e);
    rq->touched = true;
    e->touched[e->n_touched++] = rq;
}

void seq_emit(struct engine *e, struct seq *sq, struct token_event *ev)
{
    ev->index = sq->index;
    ring_push(&sq->rq->ring, ev);
    touch(e, sq->rq);
}

void seq_emit_token(struct engine *e, struct seq *sq, int32_t id, float logprob, float top_logit)
{
    ring_push_token(&sq->rq->ring, sq->index, id, sq->n_tokens, logprob, top_logit);
    touch(e, sq->rq);
}

static void leave_queue(struct engine *e, struct request *rq)
{
    if (!rq->left_queue)
        atomic_fetch_sub(&e->queued, 1);
    rq->left_queue = true;
}

static void run_remove(struct engine *e, struct seq *sq)
{
    uint32_t i = 0;
    while (e->run[i] != sq)
        i++;
    e->n_run--;
    memmove(&e->run[i], &e->run[i + 1], (e->n_run - i) * sizeof e->run[0]);
    if (e->n_followers > 0)
        queue_unfollow(e, sq);
}

/* Higher rank first: smaller priority (aged when it was admitted), then earlier arrival. The last one is the first to be moved away. */
static bool outranks(const struct seq *a, const struct seq *b)
{
    if (a->prio != b->prio)
        return a->prio < b->prio;
    if (a->rq->id != b->rq->id)
        return a->rq->id < b->rq->id;
    return a->index < b->index;
}

static void run_insert(struct engine *e, struct seq *sq)
{
    uint32_t i = e->n_run;
    for (; i > 0 && outranks(sq, e->run[i - 1]); i--)
        e->run[i] = e->run[i - 1];
    e->run[i] = sq;
    e->n_run++;
}

static void hist_release(struct engine *e, struct seq *sq)
{
    if (sq->hist >= 0)
        e->hist_free[e->n_hist_free++] = sq->hist;
    sq->hist = -1;
}

static void request_ended(struct engine *e, struct request *rq, int64_t now)
{
    rq->usage.prompt_tokens = rq->n_prompt;
    rq->usage.total_us = now - rq->submit_us;
    int64_t mean = atomic_load_explicit(&e->mean_request_us, memory_order_relaxed);
    atomic_store_explicit(&e->mean_request_us, mean + (rq->usage.total_us - mean) / 8, memory_order_relaxed);
    leave_queue(e, rq);
    atomic_store_explicit(&rq->ended, true, memory_order_release);      /* pairs with request_usage */
    atomic_fetch_sub(&e->live, 1);
}

void seq_finish(struct engine *e, struct seq *sq, enum finish_reason why, int error)
{
    struct request *rq = sq->rq;
    if (sq->state == SEQ_DONE)
        return;
    if (sq->state == SEQ_RUNNING)
        run_remove(e, sq);
    else
        queue_remove(e, sq);
    sq->state = SEQ_DONE;
    sq->finish = why;
    bool told = why == FINISH_STOP && atomic_load(&rq->stop[sq->index]);
    struct token_event ev = { .kind = EV_FINISH, .finish = told ? FINISH_NONE : why, .pos = sq->n_tokens, .error = error };
    seq_emit(e, sq, &ev);
    e->st.finished += why == FINISH_STOP || why == FINISH_LENGTH;
    e->st.cancelled += why == FINISH_CANCELLED || why == FINISH_DEADLINE;
    e->st.errors += why == FINISH_ERROR;
    rq->usage.completion_tokens += sq->n_tokens - sq->n_prompt;
    queue_leave_tenant(e, sq);
    sq->next = e->done_head;
    e->done_head = sq;
    e->admit_again = true;
    e->hold = false;
    if (--rq->n_unfinished == 0)
        request_ended(e, rq, engine_now(e));
}

/* The request goes when no answer of it is in a step any more. */
void seq_release(struct engine *e, struct seq *sq)
{
    struct request *rq = sq->rq;
    if (--rq->n_unreleased > 0)
        return;
    if (rq->touched)
        seq_flush_events(e);
    request_drop(rq);
}

static bool keeps(const struct engine *e, const struct seq *sq)
{
    return e->cfg.prefix_cache && !sq->rq->private_salt;
}

void seq_reap(struct engine *e)
{
    while (e->done_head != NULL) {
        struct seq *sq = e->done_head;
        e->done_head = sq->next;
        if (sq->kv != NULL)
            kv_seq_close(sq->kv, sq->finish != FINISH_ERROR && keeps(e, sq));
        sq->kv = NULL;
        hist_release(e, sq);
        if (sq->inflight == 0)
            seq_release(e, sq);         /* else by the collection of the last step that holds it */
        else
            sq->reaped = true;
    }
}

void seq_all_fail(struct engine *e, enum finish_reason why, int error)
{
    while (e->n_run > 0)
        seq_finish(e, e->run[e->n_run - 1], why, error);
    while (e->wait_head != NULL)
        seq_finish(e, e->wait_head, why, error);
}

/* ---- headroom ---- */

/*
 * Answers grow after they were admitted. How many pages to leave for that is learned: after each time that pages ran out twice
 * as much is left per running answer, and it shrinks while they do not. A pool that suffices is used to its last page.
 */
static void headroom_learn(struct engine *e)
{
    e->growth = e->growth == 0 ? GROWTH_MIN : e->growth < GROWTH_MAX ? e->growth * 2 : e->growth;
    e->growth_step = e->st.steps;
}

static uint64_t growth_pages(const struct engine *e, const struct seq *sq)
{
    uint32_t left = sq->n_limit - sq->n_tokens, room = left < e->growth ? left : e->growth;
    return (room / 2 + e->page_tokens - 1) / e->page_tokens;        /* half: they end at different times */
}

/* Pages that may be given to newcomers now. */
static int64_t headroom(struct engine *e)
{
    struct kv_stats st;
    uint64_t keep = 0;
    if (e->growth > 0 && e->st.steps - e->growth_step > GROWTH_STEPS) {
        e->growth = e->growth > GROWTH_MIN ? e->growth / 2 : 0;
        e->growth_step = e->st.steps;
    }
    if (e->growth == 0 || e->n_run == 0)
        return INT64_MAX;
    for (uint32_t i = 0; i < e->n_run; i++)
        keep += growth_pages(e, e->run[i]);
    kv_stat(e->kv, &st);
    return (int64_t)(st.pages_free + st.pages_cached) - (int64_t)keep;
}

static int64_t pages_wanted(const struct engine *e, const struct seq *sq)
{
    return (int64_t)((sq->n_tokens + e->page_tokens - 1) / e->page_tokens + growth_pages(e, sq));
}

/* ---- moving away ---- */

/* Parks a running sequence, or gives its pages up to be computed again. Reads the newest step's results first if it is in it. */
static void preempt(struct engine *e, struct seq *sq)
{
    if (sq->inflight > 0 && e->prev != NULL) {
        struct step *s = e->prev;
        e->prev = NULL;
        step_collect(e, s);
        if (sq->state != SEQ_RUNNING) {
            seq_reap(e);
            return;
        }
    }
    run_remove(e, sq);
    hist_release(e, sq);
    if (kv_seq_park(sq->kv) == 0) {
        sq->state = SEQ_PARKED;
    } else {
        kv_seq_close(sq->kv, keeps(e, sq));
        sq->kv = NULL;
        sq->state = SEQ_WAITING;
    }
    queue_add(e, sq);
    e->st.preempted++;
}

bool admit_reserve(struct engine *e)
{
    for (uint32_t i = 0; i < e->n_run && !atomic_load_explicit(&e->is_dead, memory_order_relaxed);) {
        struct seq *sq = e->run[i];
        if (i + PREFETCH_FAR < e->n_run)
            prefetch_lines(e->run[i + PREFETCH_FAR], SEQ_HOT);
        if (i + PREFETCH_NEAR < e->n_run)
            kv_seq_prefetch(e->run[i + PREFETCH_NEAR]->kv);
        if (!seq_ready(sq)) {
            i++;
            continue;
        }
        int r = kv_seq_reserve(sq->kv, sq->n_computed + 1);
        if (r == -EAGAIN && e->n_run > 1) {
            if (!e->hold)
                headroom_learn(e);
            preempt(e, e->run[e->n_run - 1]);
            e->hold = true;
            i = 0;      /* ends may have been read meanwhile */
            continue;
        }
        if (r < 0 && r != -EAGAIN)
            seq_finish(e, sq, FINISH_ERROR, r);
        else
            i++;        /* alone and without a page: one is on its way from a move; plan_step leaves it out */
    }
    return !atomic_load_explicit(&e->is_dead, memory_order_relaxed);
}

/* ---- coming in ---- */

static int take_history(struct engine *e, struct seq *sq)
{
    if (!sq->rq->penalties)
        return 0;
    if (e->n_hist_free == 0)
        return -EAGAIN;
    sq->hist = e->hist_free[--e->n_hist_free];
    return e->mem->copy(e->dev, e->stream, e->d_hist + (size_t)sq->hist * e->hist_stride, sq->tokens,
                        sq->n_tokens * sizeof(int32_t), ARLE_COPY_H2D);
}

static void first_admission(struct engine *e, struct seq *sq, const struct kv_hit *hit, int64_t now)
{
    struct request *rq = sq->rq;
    sq->opened = true;
    if (rq->left_queue)
        return;
    leave_queue(e, rq);
    if (rq->deadline_us < e->next_deadline_us)
        e->next_deadline_us = rq->deadline_us;
    rq->usage.queue_us = now - rq->submit_us;
    rq->usage.cached_tokens = hit->cached_tokens;
    rq->usage.from_device = hit->from_device, rq->usage.from_host = hit->from_host;
    rq->usage.from_disk = hit->from_disk, rq->usage.from_store = hit->from_store;
    rq->usage.miss = kv_miss_text(hit->miss);
    hist_add(&e->hists.queue, rq->usage.queue_us, 1);
}

static int open_seq(struct engine *e, struct seq *sq, int64_t now)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct kv_hit hit;
    int r = kv_seq_open(e->kv, sq->rq->salt, sq->tokens, sq->n_tokens, &sq->kv, &hit, &err);
    if (r < 0) {
        if (r != -EAGAIN && r != -EINPROGRESS)
            log_warn("sched", "refused", "req=%llx reason=\"%s\"", (unsigned long long)sq->rq->id, err.msg);
        sq->kv = NULL;
        return r;
    }
    for (uint32_t i = 0; i < sq->rq->n_marks; i++)
        kv_seq_mark(sq->kv, sq->rq->marks[i]);
    kv_seq_mark(sq->kv, sq->n_prompt);
    if (sq->opened)
        e->st.recomputed_tokens += sq->n_computed > hit.cached_tokens ? sq->n_computed - hit.cached_tokens : 0;
    else
        first_admission(e, sq, &hit, now);
    sq->n_computed = hit.cached_tokens;
    return 0;
}

/* 0: it runs. -EAGAIN: no room; -EINPROGRESS: on its way from a tier; else its own failure. */
static int seat(struct engine *e, struct seq *sq, int64_t now)
{
    if (e->n_run == e->cfg.max_seqs || (sq->rq->penalties && e->n_hist_free == 0))
        return -EAGAIN;
    int r = sq->state == SEQ_PARKED ? kv_seq_resume(sq->kv) : open_seq(e, sq, now);
    if (r < 0)
        return r;
    queue_remove(e, sq);
    e->st.resumed += sq->state == SEQ_PARKED;
    sq->state = SEQ_RUNNING;
    sq->seated = ++e->n_seated;
    sq->prio = queue_aged(e, sq, now);      /* who came in by age is not sent back by the next important one */
    run_insert(e, sq);
    return take_history(e, sq);
}

/* Somebody of lower priority makes room. */
static bool make_room(struct engine *e, const struct seq *sq)
{
    if (e->n_run == 0 || e->run[e->n_run - 1]->prio <= sq->rq->priority)
        return false;
    preempt(e, e->run[e->n_run - 1]);
    return !atomic_load_explicit(&e->is_dead, memory_order_relaxed);
}

void admit(struct engine *e)
{
    if (e->n_wait == 0 || !e->admit_again)
        return;
    e->admit_again = false;
    int64_t now = engine_now(e);
    int64_t room = headroom(e);
    struct seq *sq;
    while ((sq = queue_best(e, now)) != NULL) {
        /* After pages ran out, those who run keep what becomes free; else the newcomer would be the next one to be moved away. */
        if (e->hold && e->n_run > 0 && e->run[e->n_run - 1]->prio <= sq->rq->priority)
            break;
        if (e->n_run < e->cfg.max_seqs && queue_follow(e, sq))
            continue;
        int r = room < INT64_MAX && e->n_run > 0 && room < pages_wanted(e, sq) ? -EAGAIN : seat(e, sq, now);
        if (r == 0 && room < INT64_MAX)
            room -= pages_wanted(e, sq);
        if (r == -EINPROGRESS) {
            sq->moving = e->moving = true;
        } else if (r == -EAGAIN) {
            if (!make_room(e, sq))
                break;
        } else if (r < 0) {
            seq_finish(e, sq, FINISH_ERROR, r);
        }
    }
    if (e->n_run == 0)
        e->admit_again = e->n_wait > 0;     /* nobody whose end could free anything: ask again */
}
