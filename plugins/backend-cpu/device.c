/*
 * The device: memory, copies, and streams, which on a CPU run everything at once: a call returns when its work is done.
 * Movers copy from their own threads; memcpy needs no order beyond that.
 */
#include "cpu.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct arle_stream { int unused; };
struct arle_event { int unused; };

#define HUGE_PAGE ((size_t)2 << 20)

/* Small blocks stay on the heap: a huge page each would waste most of it. */
void *pages_alloc(size_t bytes)
{
    if (bytes < HUGE_PAGE) {
        void *p = NULL;
        if (posix_memalign(&p, 256, bytes ? bytes : 1) != 0)
            return NULL;
        memset(p, 0, bytes);
        return p;
    }
    size_t len = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    if (len < bytes || len + HUGE_PAGE < len)
        return NULL;
    char *p = mmap(NULL, len + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    char *a = (char *)(((uintptr_t)p + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (a > p)
        munmap(p, (size_t)(a - p));
    if (p + HUGE_PAGE > a)
        munmap(a + len, (size_t)(p + HUGE_PAGE - a));
    madvise(a, len, MADV_HUGEPAGE);
    return a;
}

void pages_free(void *p, size_t bytes)
{
    if (p != NULL && bytes < HUGE_PAGE)
        free(p);
    else if (p != NULL)
        munmap(p, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}

/* free() is not told the length, so it stands before the block. */
#define BLOCK_HEAD 256

static int mem_alloc(struct arle_device *dev, uint32_t kind, size_t bytes, void **out, struct arle_err *err)
{
    size_t total;
    char *p = NULL;
    if (!__builtin_add_overflow(bytes, (size_t)BLOCK_HEAD, &total))
        p = pages_alloc(total);
    if (p == NULL)
        return arle_err_set(err, -ENOMEM, "cannot allocate %zu bytes of memory, %llu are free", bytes,
                            (unsigned long long)sysconf(_SC_AVPHYS_PAGES) * (unsigned long long)sysconf(_SC_PAGESIZE));
    memcpy(p, &total, sizeof total);
    *out = p + BLOCK_HEAD;
    return 0;
}

static void mem_free(struct arle_device *dev, uint32_t kind, void *ptr)
{
    size_t total;
    if (ptr == NULL)
        return;
    memcpy(&total, (char *)ptr - BLOCK_HEAD, sizeof total);
    pages_free((char *)ptr - BLOCK_HEAD, total);
}

static int stream_create(struct arle_device *dev, struct arle_stream **out, struct arle_err *err)
{
    struct arle_stream *st = calloc(1, sizeof *st);
    if (st == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for a stream");
    *out = st;
    return 0;
}

static void stream_destroy(struct arle_device *dev, struct arle_stream *st)
{
    free(st);
}

static int stream_sync(struct arle_device *dev, struct arle_stream *st, struct arle_err *err)
{
    return 0;
}

static int event_create(struct arle_device *dev, struct arle_event **out, struct arle_err *err)
{
    struct arle_event *ev = calloc(1, sizeof *ev);
    if (ev == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for an event");
    *out = ev;
    return 0;
}

static void event_destroy(struct arle_device *dev, struct arle_event *ev)
{
    free(ev);
}

static int event_record(struct arle_device *dev, struct arle_event *ev, struct arle_stream *st)
{
    return 0;
}

static int event_query(struct arle_device *dev, struct arle_event *ev)
{
    return 1;       /* work is done when the call that enqueued it has returned */
}

static int event_sync(struct arle_device *dev, struct arle_event *ev, struct arle_err *err)
{
    return 0;
}

static int stream_wait(struct arle_device *dev, struct arle_stream *st, struct arle_event *ev)
{
    return 0;
}

static int mem_copy(struct arle_device *dev, struct arle_stream *st, void *dst, const void *src, size_t bytes, uint32_t dir)
{
    if (bytes != 0)
        memmove(dst, src, bytes);
    count(dev, N_copied_bytes, bytes);
    return 0;
}

static int mem_fill(struct arle_device *dev, struct arle_stream *st, void *dst, int byte, size_t bytes)
{
    if (bytes != 0)
        memset(dst, byte, bytes);
    return 0;
}

static int cpu_dead(struct arle_device *dev, struct arle_err *err)
{
    return 0;
}

static uint32_t cpu_counters(struct arle_device *dev, struct arle_counter *out, uint32_t cap)
{
#define COUNTER_NAME_(name) #name,
    static const char *const names[] = { CPU_COUNTERS(COUNTER_NAME_) };
    for (uint32_t i = 0; i < N_COUNTERS && i < cap; i++)
        out[i] = (struct arle_counter) { names[i], atomic_load_explicit(&dev->counter[i], memory_order_relaxed) };
    return N_COUNTERS;
}

static void cpu_close_device(struct arle_device *dev)
{
    if (dev == NULL)
        return;
    pages_free(dev->pack, CPU_PACK_BYTES);
    pages_free(dev->scratch, dev->n_threads * CPU_THREAD_SCRATCH);
    free(dev->shares);
    free(dev);
}

static int cpu_open_device(void *ctx, uint32_t index, struct arle_device **out, struct arle_err *err)
{
    struct cpu_ctx *cx = ctx;
    struct arle_device *dev;
    if (index != 0)
        return arle_err_set(err, -EINVAL, "backend-cpu has one device, asked for number %u", index);
    dev = calloc(1, sizeof *dev);
    if (dev == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for a device");
    dev->cx = cx;
    dev->k = cx->k;
    dev->pool = cx->pool;
    dev->n_threads = cx->n_threads;
    dev->pack = pages_alloc(CPU_PACK_BYTES);
    dev->scratch = pages_alloc(dev->n_threads * CPU_THREAD_SCRATCH);
    dev->shares = aligned_alloc(_Alignof(struct share), dev->n_threads * sizeof *dev->shares);
    if (dev->pack == NULL || dev->scratch == NULL || dev->shares == NULL) {
        cpu_close_device(dev);
        return arle_err_set(err, -ENOMEM, "no memory for the work areas of %u threads", cx->n_threads);
    }
    *out = dev;
    return 0;
}

const struct arle_backend_api cpu_api = {
    .struct_size = sizeof cpu_api,
    .n_devices = cpu_n_devices, .device_info = cpu_device_info,
    .open_device = cpu_open_device, .close_device = cpu_close_device,
    .mem = {
        .struct_size = sizeof cpu_api.mem,
        .alloc = mem_alloc, .free = mem_free,
        .stream_create = stream_create, .stream_destroy = stream_destroy, .stream_sync = stream_sync,
        .event_create = event_create, .event_destroy = event_destroy, .event_record = event_record,
        .event_query = event_query, .event_sync = event_sync, .stream_wait = stream_wait,
        .copy = mem_copy, .fill = mem_fill,
    },
    .ops = &cpu_ops,
    .weight_create = cpu_weight_create, .weight_destroy = cpu_weight_destroy, .weight_data = cpu_weight_data,
    .weight_bytes = cpu_weight_bytes, .weight_predict = cpu_weight_predict,
    .dead = cpu_dead, .counters = cpu_counters, .ceiling = cpu_ceiling,
};
