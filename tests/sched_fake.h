/*
 * A fake backend and a fake model for tests of the scheduler. The model's next token is a pure function of the whole token
 * history. It carries that history twice, as a hash in the state record and as tokens in the pages, and compares the two:
 * a lost token, a mixed-up slot, page or row, or a state at another position shows as the token FAKE_POISON.
 *
 * Streams run at once, or (async) only when somebody waits for them, like a device that is arbitrarily late: whatever is
 * overwritten too early in a staging buffer is then seen. Captured graphs replay with the pointers they were captured with.
 * Time is virtual: a step takes 1 ms plus 10 us per token.
 */
#ifndef ARLE_TESTS_SCHED_FAKE_H
#define ARLE_TESTS_SCHED_FAKE_H

#include "sched/engine.h"
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FAKE_VOCAB 256
#define FAKE_POISON 1
#define FAKE_EOS 0              /* never produced unless it is biased */
#define FAKE_OPS 65536u

enum fake_kind { FAKE_COPY = 1, FAKE_FILL, FAKE_RECORD, FAKE_WAIT, FAKE_STEP, FAKE_SAMPLE };
struct arle_event { uint64_t recorded, passed; };
struct fake_op {
    enum fake_kind kind;
    void *dst; const void *src; size_t bytes; int byte;
    struct arle_event *ev; uint64_t ticket;
    struct arle_model *model;
    struct arle_step step;
    struct arle_save saves[ARLE_MAX_SAVES];
    struct arle_sample_args sample;
};
struct arle_graph { struct fake_op ops[8]; uint32_t n; };
struct arle_stream { struct fake_op *ops; uint32_t head, tail; struct arle_graph *capture; };
struct fake_pin { uint8_t *p; size_t n; };

/* The backend's ctx and its only device. Set the knobs before engine_open. */
struct arle_device {
    pthread_mutex_t mu;
    bool async, graphs, paged_only;
    bool quick;                             /* no comparison of pages and state: a real device would not evict the host's caches */
    uint32_t context, max_saves;            /* max_saves: as the model describes itself */
    uint64_t mem_free;
    uint64_t die_at_step, fail_at_step;     /* event_sync says -EIO; model->step says -EINVAL */
    int32_t nan_after;                      /* a row whose last token is this one gets logits that are no numbers; 0 none */
    int64_t sleep_us;                       /* real time per step */
    _Atomic int64_t clock_us;               /* virtual */
    struct arle_stream *streams[8]; uint32_t n_streams;
    struct fake_pin pins[64]; uint32_t n_pins;
    uint64_t steps, copies, captures, launches, padded_rows, max_queue, saved;
    int64_t own_us, own_runs;               /* real time spent in here, and how often it was looked at */
    bool dead;
    int allocs_left;                        /* > 0: that many allocations succeed */
};

static inline uint64_t fake_mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * 0x9E3779B97F4A7C15ull;
    return h ^ (h >> 29);
}
static inline int32_t fake_next(uint64_t h) { return 2 + (int32_t)(fake_mix(h, 77) % (FAKE_VOCAB - 2)); }
/* Processor time of the calling thread: what others do on the machine does not count. */
static inline int64_t fake_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

struct fake_record { uint64_t hash, count; };
struct arle_model {
    struct arle_device *dev;
    struct arle_model_desc desc;
    struct arle_cache_group groups[2];
    struct arle_cache_binding bind;
    uint32_t page_tokens;
    uint64_t *hash;             /* [max_tokens] of the step that runs */
};

/* ---- running ops ---- */

static inline void fake_run_seq(struct arle_model *m, const struct arle_step *st, uint32_t s)
{
    const struct arle_batch *b = &st->batch;
    uint32_t pt = b->page_tokens;
    const int32_t *table = b->block_table + (size_t)s * b->table_stride;
    struct fake_record own = { 0, 0 }, *rec = &own;
    if (b->slot[s] == 0)
        return;                 /* padding */
    if (!m->dev->paged_only)
        rec = (struct fake_record *)((char *)m->bind.group[1].base + (uint64_t)b->slot[s] * m->bind.group[1].stride);
    bool bad = b->ctx_len[s] != b->pos[b->cu[s + 1] - 1] + 1 || (uint32_t)b->ctx_len[s] > b->max_ctx;
    for (int32_t t = b->cu[s]; t < b->cu[s + 1]; t++) {
        int32_t id = b->ids[t] >= 0 ? b->ids[t] : b->sampled[-1 - b->ids[t]];
        uint32_t pos = (uint32_t)b->pos[t];
        bad |= b->seq_of[t] != (int32_t)s || table[pos / pt] == 0 || id < 0;
        ((int32_t *)((char *)m->bind.group[0].base + (uint64_t)table[pos / pt] * m->bind.group[0].stride))[pos % pt] = id;
        if (!m->dev->paged_only) {
            bad |= rec->count != pos;
            rec->hash = fake_mix(rec->hash, (uint64_t)id);
            rec->count = pos + 1;
            m->hash[t] = rec->hash;
            for (uint32_t i = 0; i < st->n_saves; i++)
                if (st->saves[i].seq == s && t + 1 == b->cu[s] + (int32_t)st->saves[i].n_tokens) {
                    bad |= st->saves[i].n_tokens % 64 != 0 || t + 1 == b->cu[s + 1];
                    *(struct fake_record *)((char *)m->bind.group[1].base + (uint64_t)st->saves[i].slot * m->bind.group[1].stride) = *rec;
                    m->dev->saved++;
                }
        }
    }
    uint64_t h = 0;
    for (uint32_t p = 0; p < (uint32_t)b->ctx_len[s] && !m->dev->quick; p++) {
        int32_t id = ((int32_t *)((char *)m->bind.group[0].base + (uint64_t)table[p / pt] * m->bind.group[0].stride))[p % pt];
        h = fake_mix(h, (uint64_t)id);
        if (p >= (uint32_t)b->pos[b->cu[s]] && m->dev->paged_only)
            m->hash[b->cu[s] + (int32_t)(p - (uint32_t)b->pos[b->cu[s]])] = h;
    }
    bad |= !m->dev->paged_only && !m->dev->quick && h != rec->hash;
    for (int32_t t = b->cu[s]; bad && t < b->cu[s + 1]; t++)
        m->hash[t] = 0;
}

static inline void fake_run_step(struct arle_model *m, const struct arle_step *st)
{
    struct arle_device *d = m->dev;
    for (uint32_t s = 0; s < st->batch.n_seqs; s++) {
        d->padded_rows += st->batch.slot[s] == 0;
        fake_run_seq(m, st, s);
    }
    for (uint32_t r = 0; r < st->n_rows; r++) {
        float *row = st->logits + (size_t)r * (size_t)st->ld_logits;
        uint64_t h = m->hash[st->rows[r]];
        memset(row, 0, FAKE_VOCAB * sizeof *row);
        row[h == 0 ? FAKE_POISON : fake_next(h)] = 8;
        if (d->nan_after != 0 && st->batch.ids[st->rows[r]] == d->nan_after)
            for (int32_t v = 0; v < FAKE_VOCAB; v++)
                row[v] = NAN;
    }
    for (uint32_t t = 0; (st->flags & ARLE_STEP_DRAFTS) && t < st->batch.n_tokens; t++)
        st->drafts[t] = st->batch.pos[t] == 0 ? -1 : fake_next(m->hash[t]);
    d->steps++;
    atomic_fetch_add(&d->clock_us, 1000 + 10 * (int64_t)st->batch.n_tokens);
    if (d->sleep_us > 0)
        usleep((useconds_t)d->sleep_us);
}

static inline int32_t fake_sample_id(int32_t best, const struct arle_sample_row *r)
{
    uint64_t h = (uint64_t)best;
    if (best == FAKE_POISON || best == FAKE_EOS || (r->temperature <= 0 && r->history == NULL))
        return best;
    if (r->temperature > 0)
        h = fake_mix(fake_mix(h, r->seed), r->counter);
    for (uint32_t i = 0; r->history != NULL && i < r->n_history; i++)
        h = fake_mix(h, (uint64_t)r->history[i]);
    return fake_next(h);
}

static inline void fake_run_sample(const struct arle_sample_args *a)
{
    for (uint32_t i = 0; i < a->n_rows; i++) {
        float *row = a->logits + (size_t)i * (size_t)a->ld;
        const struct arle_sample_row *r = &a->rows[i];
        int32_t best = 0;
        for (uint32_t k = 0; k < r->n_bias; k++)
            row[r->bias[k].id] += r->bias[k].value;
        for (int32_t v = 1; v < FAKE_VOCAB; v++)
            if (row[v] > row[best])
                best = v;
        a->top_logits[i] = row[best];
        a->ids[i] = fake_sample_id(best, r);
        a->logprob[i] = -(float)a->ids[i];
        a->target_logprob[i] = r->target >= 0 ? -(float)r->target : 0.0f / 1.0f;
        for (uint32_t k = 0; k < r->n_top; k++) {
            a->top_ids[i * ARLE_MAX_TOP + k] = best + (int32_t)k;
            a->top_logprobs[i * ARLE_MAX_TOP + k] = -(float)k;
        }
    }
}

static inline bool fake_run_one(struct arle_device *d, struct arle_stream *st)
{
    if (st->head == st->tail)
        return false;
    struct fake_op *o = &st->ops[st->head % FAKE_OPS];
    if (o->kind == FAKE_WAIT && o->ev->passed < o->ticket)
        return false;
    st->head++;
    switch (o->kind) {
    case FAKE_COPY: memmove(o->dst, o->src, o->bytes); break;
    case FAKE_FILL: memset(o->dst, o->byte, o->bytes); break;
    case FAKE_RECORD: if (o->ev->passed < o->ticket) o->ev->passed = o->ticket; break;
    case FAKE_STEP:
        o->step.saves = o->saves;
        fake_run_step(o->model, &o->step);
        break;
    case FAKE_SAMPLE: fake_run_sample(&o->sample); break;
    case FAKE_WAIT: break;
    }
    return true;
}

static inline void fake_run_all(struct arle_device *d)
{
    int64_t t0 = fake_now();
    for (bool any = true; any;) {
        any = false;
        for (uint32_t i = 0; i < d->n_streams; i++)
            while (fake_run_one(d, d->streams[i]))
                any = true;
    }
    d->own_us += fake_now() - t0;
    d->own_runs++;
}

static inline int fake_push(struct arle_device *d, struct arle_stream *st, const struct fake_op *op)
{
    pthread_mutex_lock(&d->mu);
    if (st->capture != NULL) {
        st->capture->ops[st->capture->n++] = *op;
    } else {
        if (st->tail - st->head == FAKE_OPS)
            fake_run_all(d);
        st->ops[st->tail++ % FAKE_OPS] = *op;
        if (st->tail - st->head > d->max_queue)
            d->max_queue = st->tail - st->head;
        if (!d->async)
            fake_run_all(d);
    }
    pthread_mutex_unlock(&d->mu);
    return d->dead ? -EIO : 0;
}

/* ---- memory, streams, copies ---- */

static inline int fake_alloc(struct arle_device *d, uint32_t kind, size_t bytes, void **out, struct arle_err *err)
{
    if (d->allocs_left > 0 && --d->allocs_left == 0)
        return arle_err_set(err, -ENOMEM, "fake device is out of memory for %zu bytes", bytes);
    *out = calloc(1, bytes ? bytes : 1);
    pthread_mutex_lock(&d->mu);
    if (kind == ARLE_MEM_PINNED && d->n_pins < 64)
        d->pins[d->n_pins++] = (struct fake_pin){ *out, bytes };
    pthread_mutex_unlock(&d->mu);
    return *out != NULL ? 0 : arle_err_set(err, -ENOMEM, "no memory");
}
static inline void fake_free(struct arle_device *d, uint32_t kind, void *p)
{
    pthread_mutex_lock(&d->mu);
    fake_run_all(d);
    pthread_mutex_unlock(&d->mu);
    free(p);
}
static inline int fake_stream_create(struct arle_device *d, struct arle_stream **out, struct arle_err *err)
{
    struct arle_stream *st = calloc(1, sizeof *st);
    st->ops = calloc(FAKE_OPS, sizeof *st->ops);
    pthread_mutex_lock(&d->mu);
    d->streams[d->n_streams++] = st;
    pthread_mutex_unlock(&d->mu);
    *out = st;
    return 0;
}
static inline void fake_stream_destroy(struct arle_device *d, struct arle_stream *st)
{
    pthread_mutex_lock(&d->mu);
    fake_run_all(d);
    for (uint32_t i = 0; i < d->n_streams; i++)
        if (d->streams[i] == st)
            d->streams[i] = d->streams[--d->n_streams];
    pthread_mutex_unlock(&d->mu);
    free(st->ops);
    free(st);
}
static inline int fake_stream_sync(struct arle_device *d, struct arle_stream *st, struct arle_err *err)
{
    pthread_mutex_lock(&d->mu);
    fake_run_all(d);
    pthread_mutex_unlock(&d->mu);
    return 0;
}
static inline int fake_event_create(struct arle_device *d, struct arle_event **out, struct arle_err *err)
{
    *out = calloc(1, sizeof **out);
    return *out != NULL ? 0 : -ENOMEM;
}
static inline void fake_event_destroy(struct arle_device *d, struct arle_event *ev)
{
    fake_stream_sync(d, NULL, NULL);
    free(ev);
}
static inline int fake_event_record(struct arle_device *d, struct arle_event *ev, struct arle_stream *st)
{
    pthread_mutex_lock(&d->mu);
    uint64_t ticket = ++ev->recorded;
    pthread_mutex_unlock(&d->mu);
    return fake_push(d, st, &(struct fake_op){ .kind = FAKE_RECORD, .ev = ev, .ticket = ticket });
}
static inline int fake_event_query(struct arle_device *d, struct arle_event *ev)
{
    pthread_mutex_lock(&d->mu);
    fake_run_all(d);
    int passed = ev->passed >= ev->recorded;
    pthread_mutex_unlock(&d->mu);
    return passed;
}
static inline int fake_event_sync(struct arle_device *d, struct arle_event *ev, struct arle_err *err)
{
    pthread_mutex_lock(&d->mu);
    fake_run_all(d);
    bool dies = d->die_at_step != 0 && d->steps >= d->die_at_step;
    d->dead |= dies;
    pthread_mutex_unlock(&d->mu);
    return dies ? arle_err_set(err, -EIO, "fake device died at step %llu", (unsigned long long)d->steps) : 0;
}
static inline int fake_stream_wait(struct arle_device *d, struct arle_stream *st, struct arle_event *ev)
{
    pthread_mutex_lock(&d->mu);
    uint64_t ticket = ev->recorded;
    pthread_mutex_unlock(&d->mu);
    return fake_push(d, st, &(struct fake_op){ .kind = FAKE_WAIT, .ev = ev, .ticket = ticket });
}
static inline int fake_copy(struct arle_device *d, struct arle_stream *st, void *dst, const void *src, size_t bytes, uint32_t dir)
{
    bool pinned = dir != ARLE_COPY_H2D;
    pthread_mutex_lock(&d->mu);
    d->copies++;
    for (uint32_t i = 0; i < d->n_pins && !pinned; i++)
        pinned = (const uint8_t *)src >= d->pins[i].p && (const uint8_t *)src < d->pins[i].p + d->pins[i].n;
    if (!pinned) {      /* pageable memory: done when the call returns, behind what is queued */
        fake_run_all(d);
        memcpy(dst, src, bytes);
    }
    pthread_mutex_unlock(&d->mu);
    return pinned ? fake_push(d, st, &(struct fake_op){ .kind = FAKE_COPY, .dst = dst, .src = src, .bytes = bytes }) : d->dead ? -EIO : 0;
}
static inline int fake_fill(struct arle_device *d, struct arle_stream *st, void *dst, int byte, size_t bytes)
{
    return fake_push(d, st, &(struct fake_op){ .kind = FAKE_FILL, .dst = dst, .byte = byte, .bytes = bytes });
}

/* ---- backend ---- */

static inline uint32_t fake_n_devices(void *ctx) { return 1; }
static inline int fake_device_info(void *ctx, uint32_t i, struct arle_device_info *out, struct arle_err *err)
{
    struct arle_device *d = ctx;
    *out = (struct arle_device_info){ .struct_size = sizeof *out, .threads = 1, .name = "fake", .mem_total = 1u << 30,
                                      .mem_free = d->mem_free ? d->mem_free : 1u << 26, .async = d->async,
                                      .default_compute = ARLE_F32, .graphs = d->graphs };
    return 0;
}
static inline int fake_open_device(void *ctx, uint32_t i, struct arle_device **out, struct arle_err *err)
{
    *out = ctx;
    return 0;
}
static inline void fake_close_device(struct arle_device *d) { d->n_pins = 0; }
static inline int fake_op_sample(struct arle_device *d, struct arle_stream *st, const struct arle_sample_args *a)
{
    return fake_push(d, st, &(struct fake_op){ .kind = FAKE_SAMPLE, .sample = *a });
}
static inline int fake_graph_begin(struct arle_device *d, struct arle_stream *st, struct arle_err *err)
{
    st->capture = calloc(1, sizeof *st->capture);
    return 0;
}
static inline int fake_graph_end(struct arle_device *d, struct arle_stream *st, struct arle_graph **out, struct arle_err *err)
{
    *out = st->capture;
    st->capture = NULL;
    d->captures++;
    return 0;
}
static inline int fake_graph_launch(struct arle_device *d, struct arle_graph *g, struct arle_stream *st)
{
    int r = 0;
    for (uint32_t i = 0; i < g->n && r == 0; i++)
        r = fake_push(d, st, &g->ops[i]);
    d->launches++;
    return r;
}
static inline void fake_graph_destroy(struct arle_device *d, struct arle_graph *g) { free(g); }
static inline int fake_dead(struct arle_device *d, struct arle_err *err)
{
    return d->dead ? arle_err_set(err, -EIO, "fake device is dead") : 0;
}

static const struct arle_ops fake_ops = { .struct_size = sizeof(struct arle_ops), .sample = fake_op_sample };
static const struct arle_backend_api fake_backend = {
    .struct_size = sizeof(struct arle_backend_api), .n_devices = fake_n_devices, .device_info = fake_device_info,
    .open_device = fake_open_device, .close_device = fake_close_device,
    .mem = { .struct_size = sizeof(struct arle_mem_ops), .alloc = fake_alloc, .free = fake_free,
             .stream_create = fake_stream_create, .stream_destroy = fake_stream_destroy, .stream_sync = fake_stream_sync,
             .event_create = fake_event_create, .event_destroy = fake_event_destroy, .event_record = fake_event_record,
             .event_query = fake_event_query, .event_sync = fake_event_sync, .stream_wait = fake_stream_wait,
             .copy = fake_copy, .fill = fake_fill },
    .ops = &fake_ops, .graph_begin = fake_graph_begin, .graph_end = fake_graph_end, .graph_launch = fake_graph_launch,
    .graph_destroy = fake_graph_destroy, .dead = fake_dead,
};

/* ---- model; its ctx is the device ---- */

static inline void fake_describe_into(struct arle_model *m, const struct arle_model_load *a)
{
    m->page_tokens = a->page_tokens;
    m->groups[0] = (struct arle_cache_group){ .name = "kv", .kind = ARLE_CACHE_PAGED, .tokens_per_entry = 1, .dtype = ARLE_F32,
                                              .page_bytes = (uint64_t)a->page_tokens * 4 };
    m->groups[1] = (struct arle_cache_group){ .name = "hash", .kind = ARLE_CACHE_STATE, .record_bytes = sizeof(struct fake_record) };
    m->desc = (struct arle_model_desc){ .struct_size = sizeof m->desc, .vocab = FAKE_VOCAB, .n_valid = FAKE_VOCAB,
                                        .context = m->dev->context ? m->dev->context : 4096, .n_groups = m->dev->paged_only ? 1 : 2,
                                        .page_multiple = 4, .has_drafter = 1, .hidden = 8, .groups = m->groups, .arch = "fake",
                                        .max_saves = m->dev->max_saves };
}
static inline int fake_load(void *ctx, const struct arle_model_load *a, struct arle_model **out, struct arle_err *err)
{
    struct arle_model *m = calloc(1, sizeof *m);
    m->dev = ctx;
    m->hash = calloc(a->max_tokens, sizeof *m->hash);
    fake_describe_into(m, a);
    *out = m;
    return 0;
}
static inline void fake_destroy(struct arle_model *m)
{
    free(m->hash);
    free(m);
}
static inline const struct arle_model_desc *fake_describe(const struct arle_model *m) { return &m->desc; }
static inline int fake_bind(struct arle_model *m, const struct arle_cache_binding *c, struct arle_err *err)
{
    m->bind = *c;
    return 0;
}
static inline int fake_step(struct arle_model *m, struct arle_stream *st, const struct arle_step *step, struct arle_err *err)
{
    if (m->dev->fail_at_step != 0 && m->dev->steps + 1 >= m->dev->fail_at_step) {
        m->dev->fail_at_step = 0;
        return arle_err_set(err, -EINVAL, "fake model refuses this step");
    }
    struct fake_op op = { .kind = FAKE_STEP, .model = m, .step = *step };
    if (step->n_saves > m->desc.max_saves)
        return arle_err_set(err, -EINVAL, "%u states to keep", step->n_saves);
    memcpy(op.saves, step->saves, step->n_saves * sizeof *op.saves);     /* host memory, read during the call */
    return fake_push(m->dev, st, &op);
}
static const struct arle_model_api fake_model = {
    .struct_size = sizeof(struct arle_model_api), .load = fake_load, .destroy = fake_destroy, .describe = fake_describe,
    .bind = fake_bind, .step = fake_step,
};

/* ---- helpers ---- */

static inline int64_t fake_clock(void *arg) { return atomic_load(&((struct arle_device *)arg)->clock_us); }

static inline void fake_init(struct arle_device *d)
{
    memset(d, 0, sizeof *d);
    pthread_mutex_init(&d->mu, NULL);
}

static inline struct engine_config fake_config(struct arle_device *d)
{
    return (struct engine_config){ .name = "fake", .random_weights = true, .config_json = "{}", .config_len = 2, .max_seqs = 4,
                                   .max_tokens = 128, .page_tokens = 16, .max_queue = 64, .context = 512, .kv_bytes = 1 << 20,
                                   .step_graphs = true, .run_ahead = true, .clock_us = fake_clock, .clock_arg = d, .manual = true,
                                   .drafts = true };
}

static inline struct request_args fake_args(const int32_t *tokens, uint32_t n, uint32_t max_new)
{
    return (struct request_args){ .tokens = tokens, .n_tokens = n, .max_new = max_new, .n = 1,
                                  .sampling = { .top_p = 1, .repetition = 1 } };
}

/* Prompt of n tokens that depends on `seed`; never poison or end. */
static inline void fake_prompt(int32_t *out, uint32_t n, uint64_t seed)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = 2 + (int32_t)(fake_mix(seed * 1000003 + i, 5) % (FAKE_VOCAB - 2));
}

/* What greedy decoding must give after `tokens`. */
static inline int32_t fake_oracle(const int32_t *tokens, uint32_t n)
{
    uint64_t h = 0;
    for (uint32_t i = 0; i < n; i++)
        h = fake_mix(h, (uint64_t)tokens[i]);
    return fake_next(h);
}

#endif
