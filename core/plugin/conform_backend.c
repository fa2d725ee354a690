/* What every backend must do with devices, memory, streams, events and copies; ops are in conform_ops.c. */
#include "plugin/conform.h"

#include <stdlib.h>
#include <string.h>

enum { N_BYTES = 1 << 16 };

struct bench_dev {
    struct conform *c;
    const struct arle_mem_ops *mem;
    struct arle_device *dev;
    struct arle_stream *st;
    unsigned char *host;        /* pinned, 2 * N_BYTES */
    void *a, *b;                /* device, N_BYTES each */
};

static bool all_are(const unsigned char *p, size_t n, unsigned char v)
{
    for (size_t i = 0; i < n; i++) {
        if (p[i] != v)
            return false;
    }
    return true;
}

static int sync(struct bench_dev *d)
{
    return d->mem->stream_sync(d->dev, d->st, NULL);
}

static void check_zeroed(struct bench_dev *d)
{
    memset(d->host, 7, N_BYTES);
    int r = d->mem->copy(d->dev, d->st, d->host, d->a, N_BYTES, ARLE_COPY_D2H);
    conform_case(d->c, r == 0 && sync(d) == 0 && all_are(d->host, N_BYTES, 0), "fresh device memory is zero", "alloc must fill with zero");
    conform_case(d->c, ((uintptr_t)d->a & 255) == 0, "device memory is 256-byte aligned", "");
}

static void check_copies(struct bench_dev *d)
{
    unsigned char *src = d->host, *dst = d->host + N_BYTES;
    for (size_t i = 0; i < N_BYTES; i++)
        src[i] = (unsigned char)(i * 31 + (i >> 8));
    memset(dst, 0, N_BYTES);
    int r = d->mem->copy(d->dev, d->st, d->a, src, N_BYTES, ARLE_COPY_H2D);
    r |= d->mem->copy(d->dev, d->st, d->b, d->a, N_BYTES, ARLE_COPY_D2D);
    r |= d->mem->copy(d->dev, d->st, dst, d->b, N_BYTES, ARLE_COPY_D2H);
    conform_case(d->c, r == 0 && sync(d) == 0 && memcmp(src, dst, N_BYTES) == 0, "copies run in stream order", "");
    r = d->mem->fill(d->dev, d->st, d->b, 0x5A, 1000);
    r |= d->mem->copy(d->dev, d->st, dst, d->b, N_BYTES, ARLE_COPY_D2H);
    conform_case(d->c, r == 0 && sync(d) == 0 && all_are(dst, 1000, 0x5A) && memcmp(dst + 1000, src + 1000, N_BYTES - 1000) == 0,
                 "fill writes what it was asked to and no more", "");
}

static void check_events(struct bench_dev *d)
{
    struct arle_event *ev = NULL;
    struct arle_stream *other = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int r = d->mem->event_create(d->dev, &ev, &err);
    if (!conform_case(d->c, r == 0 && ev != NULL, "an event can be made", err.msg))
        return;
    r = d->mem->event_record(d->dev, ev, d->st);
    conform_case(d->c, r == 0 && d->mem->event_sync(d->dev, ev, &err) == 0 && d->mem->event_query(d->dev, ev) == 1,
                 "a waited-for event has passed", err.msg);
    r = d->mem->stream_create(d->dev, &other, &err);
    if (conform_case(d->c, r == 0 && other != NULL, "a second stream can be made", err.msg)) {
        conform_case(d->c, d->mem->stream_wait(d->dev, other, ev) == 0 && d->mem->stream_sync(d->dev, other, &err) == 0,
                     "a stream waits for an event of another", err.msg);
        d->mem->stream_destroy(d->dev, other);
    }
    d->mem->event_destroy(d->dev, ev);
}

static void check_refusals(struct bench_dev *d, const struct arle_backend_api *api)
{
    struct arle_err err = ARLE_ERR_INIT;
    void *p = NULL;
    int r = d->mem->alloc(d->dev, ARLE_MEM_DEVICE, (size_t)1 << 50, &p, &err);
    conform_case(d->c, r == -ENOMEM && p == NULL && err.msg[0] != '\0', "a petabyte is refused with -ENOMEM and a reason", err.msg);
    struct arle_device *none = NULL;
    err = (struct arle_err)ARLE_ERR_INIT;
    r = api->open_device(d->c->self->ctx, api->n_devices(d->c->self->ctx) + 5, &none, &err);
    conform_case(d->c, r < 0 && err.msg[0] != '\0', "a device that is not there is refused with a reason", err.msg);
    float data[16] = { 0 };
    struct arle_tensor t = { .name = "kit", .dtype = ARLE_BOOL, .n_dims = 2, .dim = { 4, 4 }, .data = data, .bytes = 16 };
    struct arle_weight_part part = { .t = &t, .n_rows = 4, .scale2 = 1 };
    struct arle_weight_desc desc = { .struct_size = sizeof desc, .role = ARLE_W_LINEAR, .n_experts = 1, .n_parts = 1, .parts = &part,
        .k = 4, .name = "kit" };
    struct arle_weight *w = NULL;
    err = (struct arle_err)ARLE_ERR_INIT;
    r = api->weight_create(d->dev, &desc, &w, &err);
    conform_case(d->c, r == -EINVAL && w == NULL && err.msg[0] != '\0', "a weight of booleans is refused with -EINVAL and a reason", err.msg);
}

static void check_vector(struct bench_dev *d, const struct arle_backend_api *api)
{
    float data[24], *back = (float *)d->host;
    for (int i = 0; i < 24; i++)
        data[i] = (float)i / 3 - 2;
    struct arle_tensor t = { .name = "kit.vector", .dtype = ARLE_F32, .n_dims = 1, .dim = { 24 }, .data = data, .bytes = sizeof data };
    struct arle_weight_part part = { .t = &t, .n_rows = 1, .scale2 = 1 };
    struct arle_weight_desc desc = { .struct_size = sizeof desc, .role = ARLE_W_VECTOR, .n_experts = 1, .n_parts = 1, .parts = &part,
        .k = 24, .name = "kit.vector" };
    struct arle_weight *w = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int r = api->weight_create(d->dev, &desc, &w, &err);
    if (!conform_case(d->c, r == 0 && w != NULL, "a vector weight can be packed", err.msg))
        return;
    r = api->weight_data(w) == NULL ? -EINVAL : d->mem->copy(d->dev, d->st, back, api->weight_data(w), sizeof data, ARLE_COPY_D2H);
    conform_case(d->c, r == 0 && sync(d) == 0 && memcmp(back, data, sizeof data) == 0, "weight_data() of a vector holds its values", "");
    conform_case(d->c, api->weight_bytes(w) >= sizeof data && api->weight_predict(d->dev, &desc) >= api->weight_bytes(w),
                 "weight_predict() promises no less than weight_bytes() takes", "");
    api->weight_destroy(d->dev, w);
}

static void check_device(struct conform *c, const struct arle_backend_api *api, struct arle_device *dev)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct bench_dev d = { .c = c, .mem = &api->mem, .dev = dev };
    void *host = NULL;
    int r = d.mem->stream_create(dev, &d.st, &err);
    if (r == 0)
        r = d.mem->alloc(dev, ARLE_MEM_PINNED, 2 * N_BYTES, &host, &err);
    if (r == 0)
        r = d.mem->alloc(dev, ARLE_MEM_DEVICE, N_BYTES, &d.a, &err);
    if (r == 0)
        r = d.mem->alloc(dev, ARLE_MEM_DEVICE, N_BYTES, &d.b, &err);
    if (!conform_case(c, r == 0, "stream, pinned and device memory can be had", err.msg))
        return;
    d.host = host;
    check_zeroed(&d);
    check_copies(&d);
    check_events(&d);
    check_vector(&d, api);
    check_refusals(&d, api);
    if (ARLE_HAS(api, struct arle_backend_api, dead))
        conform_case(c, api->dead(dev, &err) == 0, "the device lives after all refusals", err.msg);
    conform_ops(c, dev);
    d.mem->free(dev, ARLE_MEM_DEVICE, d.a);
    d.mem->free(dev, ARLE_MEM_DEVICE, d.b);
    d.mem->free(dev, ARLE_MEM_PINNED, host);
    d.mem->stream_destroy(dev, d.st);
}

void conform_backend(struct conform *c)
{
    const struct arle_backend_api *api = c->self->ops;
    struct arle_err err = ARLE_ERR_INIT;
    struct arle_device_info info = { .struct_size = sizeof info };
    uint32_t n = api->n_devices(c->self->ctx);
    if (!conform_case(c, n > 0, "it has a device", "n_devices() is 0 although probe() said usable"))
        return;
    int r = api->device_info(c->self->ctx, 0, &info, &err);
    conform_case(c, r == 0 && info.name[0] != '\0' && memchr(info.name, '\0', sizeof info.name) != NULL && info.mem_total > 0
                        && (info.default_compute == ARLE_F32 || info.default_compute == ARLE_BF16),
                 "device_info() gives name, memory and default arithmetic", err.msg);
    struct arle_device *dev = NULL;
    r = api->open_device(c->self->ctx, 0, &dev, &err);
    if (!conform_case(c, r == 0 && dev != NULL, "device 0 opens", err.msg))
        return;
    check_device(c, api, dev);
    api->close_device(dev);
    conform_case(c, true, "the device closes", "");
}
