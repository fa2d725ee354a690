/*
 * Who waits, and who is next. Requests come by a mailbox (a stack that the engine empties at once), wait in one list, and are
 * chosen by aged priority, then by the least served tenant, then by arrival. See docs/scheduler.md for the why.
 */
#include "sched/sched.h"
#include "util/clock.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_IDLE_TENANTS 1024u

void queue_wake(struct engine *e)
{
    /* Pairs with the engine going to sleep: it sets sleeping, then looks at its mail once more before it waits on bell. */
    atomic_fetch_add(&e->bell, 1);
    if (atomic_load(&e->sleeping))
        bell_wake(&e->bell);
}

/* ---- tenants ---- */

/* The least served of those who are here, or 0. */
static uint64_t least_service(const struct engine *e)
{
    uint64_t least = UINT64_MAX;
    for (const struct tenant *t = e->tenants; t != NULL; t = t->next)
        if (t->live > 0 && t->service < least)
            least = t->service;
    return least == UINT64_MAX ? 0 : least;
}

static void tenants_trim(struct engine *e)
{
    for (struct tenant **p = &e->tenants; *p != NULL;) {
        struct tenant *t = *p;
        if (t->live == 0) {
            *p = t->next;
            e->n_tenants--;
            free(t);
        } else {
            p = &t->next;
        }
    }
}

/* Takes the request's own record into the table unless its tenant is there already. */
static void tenant_join(struct engine *e, struct request *rq)
{
    struct tenant *t = e->tenants;
    while (t != NULL && strcmp(t->name, rq->tenant_own->name) != 0)
        t = t->next;
    if (t == NULL) {
        if (e->n_tenants >= MAX_IDLE_TENANTS)
            tenants_trim(e);
        t = rq->tenant_own;
        rq->tenant_own = NULL;
        t->next = e->tenants;
        e->tenants = t;
        e->n_tenants++;
    }
    rq->tenant = t;
    /* Who was away cannot have saved up service, or it would lock everybody else out on its return. */
    uint64_t floor = t->live == 0 ? least_service(e) : 0;
    if (t->service < floor)
        t->service = floor;
    t->live += rq->n;
}

void queue_leave_tenant(struct engine *e, struct seq *sq)
{
    sq->rq->tenant->live--;
}

void queue_tenants_free(struct engine *e)
{
    while (e->tenants != NULL) {
        struct tenant *t = e->tenants;
        e->tenants = t->next;
        free(t);
    }
}

/* ---- the waiting list ---- */

void queue_add(struct engine *e, struct seq *sq)
{
    sq->prev = NULL;
    sq->next = e->wait_head;
    if (sq->next != NULL)
        sq->next->prev = sq;
    e->wait_head = sq;
    e->n_wait++;
    e->n_parked += sq->state == SEQ_PARKED;
    e->admit_again = true;
}

void queue_remove(struct engine *e, struct seq *sq)
{
    if (sq->prev != NULL)
        sq->prev->next = sq->next;
    else
        e->wait_head = sq->next;
    if (sq->next != NULL)
        sq->next->prev = sq->prev;
    sq->next = sq->prev = NULL;
    e->n_wait--;
    e->n_parked -= sq->state == SEQ_PARKED;
    e->n_followers -= sq->leader != NULL;
    sq->leader = NULL;
}

/* ---- common prefixes ---- */

static uint32_t common_tokens(const struct seq *a, const struct seq *b)
{
    uint32_t n = a->n_tokens < b->n_tokens ? a->n_tokens : b->n_tokens, i = 0;
    while (i < n && a->tokens[i] == b->tokens[i])
        i++;
    return i;
}

static bool follows(const struct seq *sq)
{
    return sq->leader != NULL && sq->leader->n_computed < sq->lead_until;
}

/*
 * Many clients start with the same long prefix at once. Somebody who runs is about to compute it: it is asked to leave a
 * snapshot where the two part, and the other one waits for that point instead of computing the same tokens beside it.
 */
bool queue_follow(struct engine *e, struct seq *sq)
{
    if (!e->cfg.prefix_cache || sq->state != SEQ_WAITING || sq->leader != NULL)
        return false;
    for (uint32_t i = 0; i < e->n_run; i++) {
        struct seq *r = e->run[i];
        if (r->n_computed >= r->n_prompt || memcmp(r->rq->salt, sq->rq->salt, sizeof r->rq->salt) != 0)
            continue;
        uint32_t until = common_tokens(r, sq) / SCHED_ALIGN * SCHED_ALIGN;
        if (until <= r->n_computed || until == 0)
            continue;
        kv_seq_mark(r->kv, until);
        sq->leader = r;
        sq->lead_until = until;
        e->n_followers++;
        return true;
    }
    return false;
}

/* The leader does not run any more, wherever it got to. */
void queue_unfollow(struct engine *e, const struct seq *leader)
{
    for (struct seq *sq = e->wait_head; sq != NULL && e->n_followers > 0; sq = sq->next)
        if (sq->leader == leader) {
            sq->leader = NULL;
            e->n_followers--;
            e->admit_again = true;
        }
}

int64_t queue_aged(const struct engine *e, const struct seq *sq, int64_t now)
{
    return (int64_t)sq->rq->priority - (now - sq->since_us) / (e->cfg.aging_ms * 1000);
}

static bool before(const struct engine *e, const struct seq *a, const struct seq *b, int64_t now)
{
    int64_t pa = queue_aged(e, a, now), pb = queue_aged(e, b, now);
    if (pa != pb)
        return pa < pb;
    if (a->rq->tenant != b->rq->tenant && a->rq->tenant->service != b->rq->tenant->service)
        return a->rq->tenant->service < b->rq->tenant->service;
    if (a->rq->id != b->rq->id)
        return a->rq->id < b->rq->id;
    return a->index < b->index;
}

struct seq *queue_best(struct engine *e, int64_t now)
{
    struct seq *best = NULL;
    for (struct seq *sq = e->wait_head; sq != NULL; sq = sq->next)
        if (!sq->moving && !follows(sq) && (best == NULL || before(e, sq, best, now)))
            best = sq;
    return best;
}

/* ---- mail ---- */

static void take_request(struct engine *e, struct request *rq)
{
    tenant_join(e, rq);
    e->st.requests++;
    if (rq->queue_deadline_us < e->next_deadline_us)
        e->next_deadline_us = rq->queue_deadline_us;
    for (uint32_t i = 0; i < rq->n; i++)
        queue_add(e, &rq->seq[i]);
    if (rq->prompt_logprobs) {      /* nothing predicts the first token */
        struct token_event ev = { .kind = EV_PROMPT, .id = rq->seq[0].tokens[0], .logprob = NAN, .top_logit = NAN };
        seq_emit(e, &rq->seq[0], &ev);
        rq->seq[0].n_reported = 1;
    }
    /* Nothing to compute: the prompt comes back as it is . */
    if (rq->max_new > 0 || (rq->prompt_logprobs && rq->n_prompt > 1))
        return;
    for (uint32_t i = 0; i < rq->n; i++)
        seq_finish(e, &rq->seq[i], FINISH_LENGTH, 0);
}

static bool take_mail(struct engine *e)
{
    struct request *rq = atomic_exchange_explicit(&e->mail, NULL, memory_order_acquire), *fifo = NULL;
    while (rq != NULL) {        /* the stack has the newest on top */
        struct request *next = rq->mail_next;
        rq->mail_next = fifo;
        fifo = rq;
        rq = next;
    }
    bool any = fifo != NULL;
    while (fifo != NULL) {
        struct request *next = fifo->mail_next;
        take_request(e, fifo);
        fifo = next;
    }
    return any;
}

/* Calls fn for every answer that has not ended. fn may end it. */
static void each_live(struct engine *e, void (*fn)(struct engine *e, struct seq *sq, int64_t now), int64_t now)
{
    for (struct seq *sq = e->wait_head, *next; sq != NULL; sq = next) {
        next = sq->next;
        fn(e, sq, now);
    }
    for (uint32_t i = e->n_run; i-- > 0;)
        fn(e, e->run[i], now);
}

static void heed_flags(struct engine *e, struct seq *sq, int64_t now)
{
    if (atomic_load(&sq->rq->cancel))
        seq_finish(e, sq, FINISH_CANCELLED, 0);
    else if (atomic_load(&sq->rq->stop[sq->index]))
        seq_finish(e, sq, FINISH_STOP, 0);
}

static void heed_deadline(struct engine *e, struct seq *sq, int64_t now)
{
    int64_t at = sq->rq->left_queue ? sq->rq->deadline_us : sq->rq->queue_deadline_us;
    if (now >= at)
        seq_finish(e, sq, FINISH_DEADLINE, 0);
    else if (at < e->next_deadline_us)
        e->next_deadline_us = at;
}

static void cancel_by_id(struct engine *e, uint64_t id)
{
    for (struct seq *sq = e->wait_head; sq != NULL; sq = sq->next)
        if (sq->rq->id == id)
            atomic_store(&sq->rq->cancel, 1);
    for (uint32_t i = 0; i < e->n_run; i++)
        if (e->run[i]->rq->id == id)
            atomic_store(&e->run[i]->rq->cancel, 1);
}

/* ---- notes ---- */

static void order_unref(struct pin_order *o)
{
    if (atomic_fetch_sub(&o->refs, 1) == 1)
        free(o);
}

static void order_run(struct engine *e, struct pin_order *o, bool closing)
{
    uint32_t asked = PIN_ASKED;
    if (!atomic_compare_exchange_strong(&o->state, &asked, PIN_BUSY)) {
        order_unref(o);
        return;
    }
    if (closing)
        o->result = arle_err_set(&o->err, -ESHUTDOWN, "the engine is closing");
    else if (o->what == PIN_TAKE)
        o->result = kv_pin(e->kv, o->salt, o->tokens, o->n_tokens, o->marks, o->n_marks, &o->out, &o->err);
    else if (o->what == PIN_RELEASE)
        o->result = kv_unpin(e->kv, o->salt, o->tokens, o->n_tokens, &o->out, &o->err);
    else
        kv_unpin_all(e->kv);
    atomic_store_explicit(&o->state, PIN_DONE, memory_order_release);
    order_unref(o);
}

static void heed_note(struct engine *e, struct note *note)
{
    if (note->pin != NULL) {
        order_run(e, note->pin, false);
    } else if (note->flush) {
        kv_flush(e->kv);
        atomic_fetch_add(&e->flushes, 1);
    } else {
        cancel_by_id(e, note->cancel_id);
    }
    free(note);
}

void queue_notes_free(struct engine *e)
{
    for (struct note *note = atomic_exchange(&e->notes, NULL), *next; note != NULL; note = next) {
        next = note->next;
        if (note->pin != NULL)
            order_run(e, note->pin, true);
        free(note);
    }
}

bool queue_intake(struct engine *e)
{
    int64_t now = engine_now(e);
    bool any = false;
    if (atomic_load_explicit(&e->mail, memory_order_relaxed) != NULL)
        any = take_mail(e);
    if (atomic_load_explicit(&e->notes, memory_order_relaxed) != NULL) {
        struct note *note = atomic_exchange_explicit(&e->notes, NULL, memory_order_acquire);
        while (note != NULL) {
            struct note *next = note->next;
            heed_note(e, note);
            note = next;
        }
        atomic_store(&e->attention, 1);
    }
    if (atomic_load_explicit(&e->attention, memory_order_relaxed) && atomic_exchange(&e->attention, 0)) {
        each_live(e, heed_flags, now);
        any = true;
    }
    if (now >= e->next_deadline_us) {
        e->next_deadline_us = INT64_MAX;
        each_live(e, heed_deadline, now);
        any = true;
    }
    if (atomic_load_explicit(&e->cut, memory_order_relaxed) || atomic_load_explicit(&e->closing, memory_order_relaxed))
        seq_all_fail(e, FINISH_CANCELLED, 0);
    return any;
}

static int post_note(struct engine *e, const struct note *what)
{
    struct note *note = malloc(sizeof *note);
    if (note == NULL)
        return -ENOMEM;
    *note = *what;
    note->next = atomic_load_explicit(&e->notes, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&e->notes, &note->next, note, memory_order_release, memory_order_relaxed))
        ;
    queue_wake(e);
    return 0;
}

int engine_cancel(struct engine *e, uint64_t id)
{
    return post_note(e, &(struct note){ .cancel_id = id });
}

int engine_kv_flush(struct engine *e, int64_t deadline_ms)
{
    uint64_t was = atomic_load(&e->flushes);
    int64_t end = clock_mono_ms() + deadline_ms;
    int r = post_note(e, &(struct note){ .flush = true });
    while (r == 0 && atomic_load(&e->flushes) == was) {
        if (clock_mono_ms() > end)
            return -ETIMEDOUT;
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    }
    return r;
}

static struct pin_order *order_new(const struct engine *e, const struct pin_args *a)
{
    uint32_t n = a->what == PIN_RELEASE_ALL ? 0 : a->n_tokens, n_marks = a->what == PIN_TAKE ? a->n_marks : 0;
    struct pin_order *o = calloc(1, sizeof *o + ((size_t)n + n_marks) * sizeof(int32_t));
    if (o == NULL)
        return NULL;
    atomic_init(&o->refs, 2);
    o->what = a->what;
    o->err = (struct arle_err)ARLE_ERR_INIT;
    o->n_tokens = n;
    o->n_marks = n_marks;
    o->tokens = (int32_t *)(o + 1);
    o->marks = (uint32_t *)(o->tokens + n);
    if (n > 0)
        memcpy(o->tokens, a->tokens, n * sizeof *o->tokens);
    if (n_marks > 0)
        memcpy(o->marks, a->marks, n_marks * sizeof *o->marks);
    kv_salt(e->kv, a->tenant ? a->tenant : "", a->cache_salt ? a->cache_salt : "", o->salt);
    return o;
}

int engine_kv_pin(struct engine *e, const struct pin_args *a, struct kv_pinned *out, int64_t deadline_ms, struct arle_err *err)
{
    int64_t end = clock_mono_ms() + deadline_ms;
    struct pin_order *o = order_new(e, a);
    if (o == NULL || post_note(e, &(struct note){ .pin = o }) < 0) {
        free(o);
        return arle_err_set(err, -ENOMEM, "no memory for a pin");
    }
    uint32_t asked = PIN_ASKED;
    while (atomic_load_explicit(&o->state, memory_order_acquire) != PIN_DONE) {
        if (clock_mono_ms() > end && asked == PIN_ASKED && atomic_compare_exchange_strong(&o->state, &asked, PIN_GIVEN_UP)) {
            order_unref(o);
            return arle_err_set(err, -ETIMEDOUT, "the engine did not get to it in %lld ms", (long long)deadline_ms);
        }
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    }
    int r = o->result;
    if (r < 0)
        *err = o->err;
    else
        *out = o->out;
    order_unref(o);
    return r;
}
