/*
 * A fake device for tests of the KV plane: host memory, and streams whose work runs when it is asked for. `lazy` keeps copies
 * queued until event_query, a sync or fake_pump runs some of them in an order that is random between streams, as a real device
 * may: a copy that forgot to wait for another stream then reads or destroys the wrong bytes, and the test sees it.
 */
#ifndef ARLE_TESTS_KV_FAKE_H
#define ARLE_TESTS_KV_FAKE_H

#include <arle/backend.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FAKE_QUEUE 65536u

struct arle_event { uint64_t recorded, passed; };
enum fake_op_kind { FAKE_COPY, FAKE_FILL, FAKE_RECORD, FAKE_WAIT, FAKE_CALL };
struct fake_op {
    enum fake_op_kind kind;
    void *dst; const void *src; size_t bytes; int byte;
    struct arle_event *ev; uint64_t ticket;
    void (*fn)(void *arg, uint64_t a, uint64_t b); void *arg; uint64_t a, b;
};
struct arle_stream { struct fake_op *ops; uint32_t head, tail; };
struct arle_device {
    bool lazy;
    uint64_t rng;
    struct arle_stream *streams[8]; uint32_t n_streams;
    uint64_t copies, copied_bytes, n_alloc, fail_alloc;
};

static inline uint64_t fake_rand(struct arle_device *d)
{
    d->rng ^= d->rng << 13;
    d->rng ^= d->rng >> 7;
    d->rng ^= d->rng << 17;
    return d->rng;
}

/* Runs the first queued op of st; false when it is empty or waits for another stream. */
static inline bool fake_run_one(struct arle_device *d, struct arle_stream *st)
{
    if (st->head == st->tail)
        return false;
    struct fake_op *o = &st->ops[st->head % FAKE_QUEUE];
    if (o->kind == FAKE_WAIT && o->ev->passed < o->ticket)
        return false;
    st->head++;
    switch (o->kind) {
    case FAKE_COPY: memcpy(o->dst, o->src, o->bytes); break;
    case FAKE_FILL: memset(o->dst, o->byte, o->bytes); break;
    case FAKE_RECORD: if (o->ev->passed < o->ticket) o->ev->passed = o->ticket; break;
    case FAKE_CALL: o->fn(o->arg, o->a, o->b); break;
    case FAKE_WAIT: break;
    }
    return true;
}

static inline void fake_pump(struct arle_device *d, uint32_t n)
{
    for (uint32_t i = 0; i < n && d->n_streams > 0; i++)
        fake_run_one(d, d->streams[fake_rand(d) % d->n_streams]);
}

static inline void fake_run_all(struct arle_device *d)
{
    for (bool any = true; any;) {
        any = false;
        for (uint32_t i = 0; i < d->n_streams; i++)
            while (fake_run_one(d, d->streams[i]))
                any = true;
    }
}

static inline int fake_push(struct arle_device *d, struct arle_stream *st, struct fake_op op)
{
    if (st->tail - st->head == FAKE_QUEUE)
        fake_run_all(d);
    st->ops[st->tail++ % FAKE_QUEUE] = op;
    if (!d->lazy)
        fake_run_all(d);
    return 0;
}

static inline int fake_call(struct arle_device *d, struct arle_stream *st, void (*fn)(void *, uint64_t, uint64_t), void *arg,
                            uint64_t a, uint64_t b)
{
    return fake_push(d, st, (struct fake_op){ .kind = FAKE_CALL, .fn = fn, .arg = arg, .a = a, .b = b });
}

static inline int fake_alloc(struct arle_device *d, uint32_t kind, size_t bytes, void **out, struct arle_err *err)
{
    (void)kind;
    if (d->fail_alloc != 0 && ++d->n_alloc == d->fail_alloc)
        return arle_err_set(err, -ENOMEM, "fake device is out of memory for %zu bytes", bytes);
    *out = calloc(1, bytes > 0 ? bytes : 1);
    return *out != NULL ? 0 : arle_err_set(err, -ENOMEM, "no memory");
}

static inline void fake_free(struct arle_device *d, uint32_t kind, void *p)
{
    (void)d; (void)kind;
    free(p);
}

static inline int fake_stream_create(struct arle_device *d, struct arle_stream **out, struct arle_err *err)
{
    (void)err;
    struct arle_stream *st = calloc(1, sizeof *st);
    st->ops = calloc(FAKE_QUEUE, sizeof *st->ops);
    d->streams[d->n_streams++] = st;
    *out = st;
    return 0;
}

static inline void fake_stream_destroy(struct arle_device *d, struct arle_stream *st)
{
    fake_run_all(d);
    for (uint32_t i = 0; i < d->n_streams; i++)
        if (d->streams[i] == st)
            d->streams[i] = d->streams[--d->n_streams];
    free(st->ops);
    free(st);
}

static inline int fake_stream_sync(struct arle_device *d, struct arle_stream *st, struct arle_err *err)
{
    (void)st; (void)err;
    fake_run_all(d);
    return 0;
}

static inline int fake_event_create(struct arle_device *d, struct arle_event **out, struct arle_err *err)
{
    (void)d; (void)err;
    *out = calloc(1, sizeof **out);
    return *out != NULL ? 0 : -ENOMEM;
}

static inline void fake_event_destroy(struct arle_device *d, struct arle_event *ev)
{
    (void)d;
    free(ev);
}

static inline int fake_event_record(struct arle_device *d, struct arle_event *ev, struct arle_stream *st)
{
    return fake_push(d, st, (struct fake_op){ .kind = FAKE_RECORD, .ev = ev, .ticket = ++ev->recorded });
}

static inline int fake_event_query(struct arle_device *d, struct arle_event *ev)
{
    fake_pump(d, 4);
    return ev->passed >= ev->recorded;
}

static inline int fake_event_sync(struct arle_device *d, struct arle_event *ev, struct arle_err *err)
{
    (void)ev; (void)err;
    fake_run_all(d);
    return 0;
}

static inline int fake_stream_wait(struct arle_device *d, struct arle_stream *st, struct arle_event *ev)
{
    return fake_push(d, st, (struct fake_op){ .kind = FAKE_WAIT, .ev = ev, .ticket = ev->recorded });
}

static inline int fake_copy(struct arle_device *d, struct arle_stream *st, void *dst, const void *src, size_t bytes, uint32_t dir)
{
    (void)dir;
    d->copies++;
    d->copied_bytes += bytes;
    return fake_push(d, st, (struct fake_op){ .kind = FAKE_COPY, .dst = dst, .src = src, .bytes = bytes });
}

static inline int fake_fill(struct arle_device *d, struct arle_stream *st, void *dst, int byte, size_t bytes)
{
    return fake_push(d, st, (struct fake_op){ .kind = FAKE_FILL, .dst = dst, .byte = byte, .bytes = bytes });
}

static const struct arle_mem_ops fake_mem = {
    .struct_size = sizeof(struct arle_mem_ops), .alloc = fake_alloc, .free = fake_free,
    .stream_create = fake_stream_create, .stream_destroy = fake_stream_destroy, .stream_sync = fake_stream_sync,
    .event_create = fake_event_create, .event_destroy = fake_event_destroy, .event_record = fake_event_record,
    .event_query = fake_event_query, .event_sync = fake_event_sync, .stream_wait = fake_stream_wait,
    .copy = fake_copy, .fill = fake_fill,
};

#endif
