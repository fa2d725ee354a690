/*
 * The loop and its thread. One turn: read the mail, admit, plan a step and launch it, then wait for the step before it (run
 * ahead) or for this one, and give the tokens out. Also here: figures for other threads, the watchdog, drain and the end.
 */
#include "sched/sched.h"
#include "util/clock.h"
#include "util/log.h"
#include <stdlib.h>
#include <string.h>

#define POLL_US 500             /* idle, but somebody waits for a tier or for pages */
#define IDLE_US 100000          /* so that finished moves between tiers are seen without traffic */
#define ROLL_US 10000000        /* between two rolling log lines */

/* ---- figures ---- */

const int64_t hist_bounds_us[HIST_BUCKETS - 1] = {
    100, 250, 500, 1000, 2000, 3000, 5000, 7500, 10000, 20000, 50000, 100000, 200000, 500000, 1000000, 2500000, 5000000, 15000000,
    60000000,
};

void hist_add(struct hist *h, int64_t us, uint64_t times)
{
    uint32_t i = 0;
    while (i < HIST_BUCKETS - 1 && us > hist_bounds_us[i])
        i++;
    h->bucket[i] += times;
    h->count += times;
    h->sum_us += us > 0 ? (uint64_t)us * times : 0;
}

/* Copies the figures out. While steps run it never waits for a reader: the next step publishes again. */
static void publish(struct engine *e, bool wait)
{
    e->st.running = e->n_run;
    e->st.waiting = e->n_wait - e->n_parked;
    e->st.parked = e->n_parked;
    if (wait)
        pthread_mutex_lock(&e->pub_mu);
    else if (pthread_mutex_trylock(&e->pub_mu) != 0) {
        e->unpublished = true;
        return;
    }
    e->pub = e->st;
    e->pub_hists = e->hists;
    pthread_mutex_unlock(&e->pub_mu);
    e->unpublished = false;
}

void engine_stat(const struct engine *ce, struct engine_stats *out)
{
    struct engine *e = (struct engine *)ce;     /* the mutex is not part of what "const" promises */
    pthread_mutex_lock(&e->pub_mu);
    *out = e->pub;
    pthread_mutex_unlock(&e->pub_mu);
    int64_t started = atomic_load_explicit(&e->step_started_us, memory_order_relaxed);
    out->rejected = atomic_load(&e->rejected);
    out->step_age_us = started == 0 ? 0 : clock_mono_us() - started;
    out->stalled = out->step_age_us > e->cfg.watchdog_ms * 1000;
}

void engine_hist(const struct engine *ce, struct engine_hists *out)
{
    struct engine *e = (struct engine *)ce;
    pthread_mutex_lock(&e->pub_mu);
    *out = e->pub_hists;
    pthread_mutex_unlock(&e->pub_mu);
}

void engine_kv_stat(const struct engine *e, struct kv_stats *out)
{
    kv_stat(e->kv, out);
}

const struct arle_model_desc *engine_model(const struct engine *e)
{
    return &e->desc;
}

const struct generation_defaults *engine_defaults(const struct engine *e)
{
    return &e->gen;
}

const char *engine_compute(const struct engine *e)
{
    return e->compute == ARLE_BF16 ? "bf16" : "f32";
}

uint32_t engine_context(const struct engine *e)
{
    return e->context;
}

/* ---- the loop ---- */

void engine_die(struct engine *e, const struct arle_err *err)
{
    if (atomic_exchange(&e->is_dead, true))
        return;
    e->st.dead = true;
    snprintf(e->st.dead_reason, sizeof e->st.dead_reason, "%.255s", err->msg[0] ? err->msg : "the device answers no more");
    log_error("sched", "dead", "model=%s reason=\"%s\"", e->name, e->st.dead_reason);
    e->prev = NULL;
    for (uint32_t i = 0; i < 2; i++)
        if (e->step[i].in_flight)
            step_abandon(e, &e->step[i], -EIO);
    seq_all_fail(e, FINISH_ERROR, -EIO);
    seq_reap(e);
    seq_flush_events(e);
    publish(e, true);
    if (e->cfg.on_dead != NULL)
        e->cfg.on_dead(e->cfg.on_dead_arg);
}

/* A tier moved something: whoever waited for it may ask again. */
static void poll_tiers(struct engine *e)
{
    if (kv_poll(e->kv) <= 0 || !e->moving)
        return;
    for (struct seq *sq = e->wait_head; sq != NULL; sq = sq->next)
        sq->moving = false;
    e->moving = false;
    e->admit_again = true;
}

static int dead_turn(struct engine *e)
{
    queue_intake(e);
    seq_all_fail(e, FINISH_ERROR, -EIO);
    seq_reap(e);
    seq_flush_events(e);
    return -EIO;
}

/* Launches a planned step, then reads the results that are due: the step before it when running ahead, else its own. */
static void run_step(struct engine *e, struct step *s, bool planned)
{
    struct step *due = e->prev;
    e->prev = NULL;
    if (planned && step_launch(e, s) == 0) {
        if (e->ahead) {
            e->st.ahead_steps += due != NULL;
            e->prev = s;
        } else {
            due = s;
        }
    }
    if (due != NULL && due->in_flight)
        step_collect(e, due);
}

int engine_turn(struct engine *e)
{
    if (atomic_load_explicit(&e->is_dead, memory_order_relaxed))
        return dead_turn(e);
    int64_t t0 = clock_mono_us();
    e->device_us = 0;
    bool busy = queue_intake(e);
    poll_tiers(e);
    seq_reap(e);
    admit(e);
    struct step *s = &e->step[e->prev == &e->step[0]];
    bool planned = admit_reserve(e) && plan_step(e, s);
    busy |= planned || e->prev != NULL;
    run_step(e, s, planned);
    seq_reap(e);
    seq_flush_events(e);
    if (atomic_load_explicit(&e->is_dead, memory_order_relaxed))
        return -EIO;
    if (planned)
        kv_step_end(e->kv);
    if (busy) {
        e->st.plan_us_sum += (uint64_t)(clock_mono_us() - t0 - e->device_us);
        publish(e, false);
    }
    return busy;
}

static bool has_mail(const struct engine *e)
{
    return atomic_load(&e->mail) != NULL || atomic_load(&e->notes) != NULL || atomic_load(&e->attention) ||
           atomic_load(&e->closing) || (atomic_load(&e->cut) && atomic_load(&e->live) > 0);
}

static void sleep_until_mail(struct engine *e)
{
    kv_step_end(e->kv);
    publish(e, true);
    int64_t us = e->next_deadline_us == INT64_MAX ? IDLE_US : e->next_deadline_us - engine_now(e);
    if (e->n_wait > 0 || e->n_run > 0)
        us = POLL_US;
    if (us > IDLE_US)
        us = IDLE_US;
    uint32_t seen = atomic_load(&e->bell);
    atomic_store(&e->sleeping, 1);
    if (!has_mail(e) && us > 0)
        bell_wait(&e->bell, seen, us);
    atomic_store(&e->sleeping, 0);
}

static void *engine_main(void *arg)
{
    struct engine *e = arg;
    for (;;) {
        int r = engine_turn(e);
        if (atomic_load(&e->closing) && r <= 0 && atomic_load(&e->live) == 0 && e->prev == NULL)
            break;
        if (r > 0)
            continue;
        if (r < 0)
            bell_wait(&e->bell, atomic_load(&e->bell), 20000);      /* dead: answer what still comes */
        else
            sleep_until_mail(e);
    }
    return NULL;
}

/* ---- watchdog and rolling line ---- */

static void roll(struct engine *e, struct engine_stats *was)
{
    struct engine_stats now;
    struct kv_stats kv;
    engine_stat(e, &now);
    engine_kv_stat(e, &kv);
    if (now.steps != was->steps)
        log_info("sched", "running", "model=%s steps=%llu prompt_tokens=%llu output_tokens=%llu running=%u waiting=%u parked=%u "
                 "preempted=%llu pages_free=%llu/%llu hit_tokens=%llu/%llu", e->name,
                 (unsigned long long)(now.steps - was->steps), (unsigned long long)(now.prefill_tokens - was->prefill_tokens),
                 (unsigned long long)(now.completion_tokens - was->completion_tokens), now.running, now.waiting, now.parked,
                 (unsigned long long)(now.preempted - was->preempted), (unsigned long long)kv.pages_free,
                 (unsigned long long)kv.pages_total, (unsigned long long)kv.hit_tokens, (unsigned long long)kv.lookup_tokens);
    *was = now;
}

static void *watch_main(void *arg)
{
    struct engine *e = arg;
    struct engine_stats was = { 0 };
    int64_t warned = 0, rolled = clock_mono_us();
    pthread_mutex_lock(&e->watch_mu);
    while (!e->watch_stop) {
        int64_t ms = e->cfg.watchdog_ms / 2 < 1000 ? e->cfg.watchdog_ms / 2 + 1 : 1000;
        int64_t wake = clock_mono_us() + ms * 1000;
        struct timespec ts = { .tv_sec = wake / 1000000, .tv_nsec = wake % 1000000 * 1000 };
        pthread_cond_timedwait(&e->watch_cv, &e->watch_mu, &ts);
        int64_t started = atomic_load_explicit(&e->step_started_us, memory_order_relaxed), now = clock_mono_us();
        if (started != 0 && started != warned && now - started > e->cfg.watchdog_ms * 1000) {
            warned = started;
            log_warn("sched", "step_stalled", "model=%s age_ms=%lld", e->name, (long long)(now - started) / 1000);
        }
        if (now - rolled >= ROLL_US) {
            rolled = now;
            roll(e, &was);
        }
    }
    pthread_mutex_unlock(&e->watch_mu);
    return NULL;
}

int engine_start(struct engine *e, struct arle_err *err)
{
    publish(e, true);
    if (e->cfg.manual)
        return 0;
    int r = pthread_create(&e->thread, NULL, engine_main, e);
    if (r != 0)
        return arle_err_set(err, -r, "cannot start the engine thread: %s", strerror(r));
    e->thread_on = true;
    r = pthread_create(&e->watch_thread, NULL, watch_main, e);
    e->watch_on = r == 0;
    return r == 0 ? 0 : arle_err_set(err, -r, "cannot start the watchdog thread: %s", strerror(r));
}

/* ---- the end ---- */

static void nap(struct engine *e, int64_t ms)
{
    struct timespec ts = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 };
    if (e->cfg.manual)
        engine_turn(e);
    else
        nanosleep(&ts, NULL);
}

int engine_drain(struct engine *e, int64_t deadline_ms)
{
    atomic_store(&e->draining, true);
    int64_t end_us = engine_now(e) + deadline_ms * 1000;
    while (atomic_load(&e->live) > 0 && engine_now(e) < end_us)
        nap(e, 2);
    int left = (int)atomic_load(&e->live);
    atomic_store(&e->cut, true);
    queue_wake(e);
    while (atomic_load(&e->live) > 0)
        nap(e, 1);
    return left;
}

void engine_halt(struct engine *e)
{
    atomic_store(&e->closing, true);
    queue_wake(e);
    if (e->thread_on)
        pthread_join(e->thread, NULL);
    while (e->cfg.manual && (atomic_load(&e->live) > 0 || e->prev != NULL))
        engine_turn(e);
    if (!e->watch_on)
        return;
    pthread_mutex_lock(&e->watch_mu);
    e->watch_stop = true;
    pthread_cond_signal(&e->watch_cv);
    pthread_mutex_unlock(&e->watch_mu);
    pthread_join(e->watch_thread, NULL);
}
