/* Memory, streams, events, copies and step graphs: thin over the CUDA runtime, with the error latch and the memory limit. */
#include "common.cuh"
#include <errno.h>

/* Sizes are kept in a header-less way: the limit counts what cudaMalloc was asked for, found again by a small table. */
namespace {
struct block { void *ptr; size_t bytes; block *next; };
pthread_mutex_t blocks_mu = PTHREAD_MUTEX_INITIALIZER;      /* guards blocks and pinned */
block *blocks[256];
block *pinned;          /* host memory: a few staging areas */

block **list_of(const void *p) { return &blocks[(unsigned)(((uintptr_t)p >> 8) * 2654435761u >> 24) & 255u]; }

/* Without memory for the entry the limit counts the block until the device is closed, or its copies go through the copy engine. */
void remember(block **list, void *p, size_t bytes)
{
    block *b = (block *)malloc(sizeof *b);
    if (b == NULL)
        return;
    pthread_mutex_lock(&blocks_mu);
    *b = { p, bytes, *list };
    *list = b;
    pthread_mutex_unlock(&blocks_mu);
}

size_t forget(block **list, void *p)
{
    size_t bytes = 0;
    pthread_mutex_lock(&blocks_mu);
    for (block **at = list; *at != NULL; at = &(*at)->next) {
        if ((*at)->ptr == p) {
            block *b = *at;
            *at = b->next;
            bytes = b->bytes;
            free(b);
            break;
        }
    }
    pthread_mutex_unlock(&blocks_mu);
    return bytes;
}

bool is_pinned(const void *p, size_t bytes)
{
    bool found = false;
    pthread_mutex_lock(&blocks_mu);
    for (const block *b = pinned; b != NULL && !found; b = b->next)
        found = (const char *)p >= (const char *)b->ptr && (const char *)p + bytes <= (const char *)b->ptr + b->bytes;
    pthread_mutex_unlock(&blocks_mu);
    return found;
}

/* Up to this size a kernel that reads or writes pinned memory itself is done before the copy engine has begun: inputs and results of steps. */
const size_t kDirectCopy = 65536;

__global__ void direct_copy_kernel(char *dst, const char *src, int bytes)
{
    const int at = (int)(blockIdx.x * blockDim.x + threadIdx.x) * 16;
    if (at + 16 <= bytes)
        *(uint4 *)(dst + at) = __ldcv((const uint4 *)(src + at));
    else
        for (int i = at; i < bytes; i++)
            dst[i] = __ldcv(src + i);
    __threadfence();        /* a kernel further on may read a step's arrays before its wait, which is for the kernel before it */
}

bool copies_directly(const void *dst, const void *src, size_t bytes, uint32_t dir)
{
    return dir != ARLE_COPY_D2D && bytes <= kDirectCopy && ((uintptr_t)dst | (uintptr_t)src) % 16 == 0
           && is_pinned(dir == ARLE_COPY_H2D ? src : dst, bytes);
}

int no_memory(arle_device *dev, size_t bytes, struct arle_err *err)
{
    size_t free_bytes = 0, total = 0;
    cudaMemGetInfo(&free_bytes, &total);
    uint64_t limit = dev->cx->conf.memory, used = dev->mem_used.load();
    if (limit != 0 && limit - (used < limit ? used : limit) < free_bytes)
        return arle_err_set(err, -ENOMEM, "GPU %d: %.1f MB asked, %.1f MB left of the plugin's limit of %.1f MB (key memory)",
                            dev->ordinal, bytes / 1e6, (limit - (used < limit ? used : limit)) / 1e6, limit / 1e6);
    return arle_err_set(err, -ENOMEM, "GPU %d: %.1f MB asked, %.1f MB free of %.1f MB", dev->ordinal, bytes / 1e6,
                        free_bytes / 1e6, total / 1e6);
}
} // namespace

static int alloc_device(arle_device *dev, size_t bytes, void **out, struct arle_err *err)
{
    uint64_t limit = dev->cx->conf.memory;
    if (limit != 0 && dev->mem_used.load() + bytes > limit)
        return no_memory(dev, bytes, err);
    void *p = NULL;
    cudaError_t e = cudaMalloc(&p, bytes);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return no_memory(dev, bytes, err);
    }
    if (e == cudaSuccess)
        e = cudaMemset(p, 0, bytes);
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(cudaStreamLegacy);
    if (e != cudaSuccess) {
        cuda_fail(dev, e, "cudaMalloc", __FILE__, __LINE__);
        return cuda_dead(dev, err);
    }
    remember(list_of(p), p, bytes);
    dev->mem_used.fetch_add(bytes);
    bump(dev, COUNT_ALLOC_BYTES, bytes);
    *out = p;
    return 0;
}

extern "C" int cuda_alloc(struct arle_device *dev, uint32_t kind, size_t bytes, void **out, struct arle_err *err)
{
    if (dev->dead.load())
        return cuda_dead(dev, err);
    if (dev->fault_alloc.load() > 0 && dev->fault_alloc.fetch_sub(1) == 1)
        return arle_err_set(err, -ENOMEM, "GPU %d: injected failure of an allocation of %zu bytes", dev->ordinal, bytes);
    cudaSetDevice(dev->ordinal);
    if (bytes == 0)
        bytes = 256;
    if (kind == ARLE_MEM_DEVICE)
        return alloc_device(dev, bytes, out, err);
    void *p = NULL;
    cudaError_t e = cudaHostAlloc(&p, bytes, cudaHostAllocPortable);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return arle_err_set(err, -ENOMEM, "%.1f MB of pinned host memory asked, the system has not that much to pin", bytes / 1e6);
    }
    if (e != cudaSuccess) {
        cuda_fail(dev, e, "cudaHostAlloc", __FILE__, __LINE__);
        return cuda_dead(dev, err);
    }
    memset(p, 0, bytes);
    remember(&pinned, p, bytes);
    *out = p;
    return 0;
}

extern "C" void cuda_free(struct arle_device *dev, uint32_t kind, void *ptr)
{
    if (ptr == NULL)
        return;
    cudaSetDevice(dev->ordinal);
    if (kind == ARLE_MEM_DEVICE) {
        dev->mem_used.fetch_sub(forget(list_of(ptr), ptr));
        cudaFree(ptr);
    } else {
        forget(&pinned, ptr);
        cudaFreeHost(ptr);
    }
}

/* Turns the result of a CUDA call into the api's: 0, or -EIO with the latched reason. */
static int answer(arle_device *dev, cudaError_t e, const char *what, struct arle_err *err)
{
    if (e == cudaSuccess)
        return 0;
    int r = cuda_fail(dev, e, what, __FILE__, __LINE__);
    if (r == -ENOMEM)
        return arle_err_set(err, r, "GPU %d: %s: out of memory", dev->ordinal, what);
    return cuda_dead(dev, err);
}

extern "C" int cuda_stream_create(struct arle_device *dev, struct arle_stream **out, struct arle_err *err)
{
    if (dev->dead.load())
        return cuda_dead(dev, err);
    cudaSetDevice(dev->ordinal);
    cudaStream_t s = NULL;
    int r = answer(dev, cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreate", err);
    if (r == 0)
        *out = reinterpret_cast<arle_stream *>(s);
    return r;
}

extern "C" void cuda_stream_destroy(struct arle_device *dev, struct arle_stream *st)
{
    (void)dev;
    if (st != NULL)
        cudaStreamDestroy(cs(st));
}

extern "C" int cuda_stream_sync(struct arle_device *dev, struct arle_stream *st, struct arle_err *err)
{
    if (dev->dead.load())
        return cuda_dead(dev, err);
    return answer(dev, cudaStreamSynchronize(cs(st)), "cudaStreamSynchronize", err);
}

extern "C" int cuda_event_create(struct arle_device *dev, struct arle_event **out, struct arle_err *err)
{
    if (dev->dead.load())
        return cuda_dead(dev, err);
    cudaSetDevice(dev->ordinal);
    cudaEvent_t e = NULL;
    int r = answer(dev, cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "cudaEventCreate", err);
    if (r == 0)
        *out = reinterpret_cast<arle_event *>(e);
    return r;
}

static inline cudaEvent_t ce(arle_event *ev) { return reinterpret_cast<cudaEvent_t>(ev); }

extern "C" void cuda_event_destroy(struct arle_device *dev, struct arle_event *ev)
{
    (void)dev;
    if (ev != NULL)
        cudaEventDestroy(ce(ev));
}

extern "C" int cuda_event_record(struct arle_device *dev, struct arle_event *ev, struct arle_stream *st)
{
    if (dev->dead.load())
        return -EIO;
    CUDA_TRY(dev, cudaEventRecord(ce(ev), cs(st)));
    return 0;
}

extern "C" int cuda_event_query(struct arle_device *dev, struct arle_event *ev)
{
    if (dev->dead.load())
        return -EIO;
    cudaError_t e = cudaEventQuery(ce(ev));
    if (e == cudaErrorNotReady) {
        cudaGetLastError();
        return 0;
    }
    CUDA_TRY(dev, e);
    return 1;
}

extern "C" int cuda_event_sync(struct arle_device *dev, struct arle_event *ev, struct arle_err *err)
{
    if (dev->dead.load())
        return cuda_dead(dev, err);
    return answer(dev, cudaEventSynchronize(ce(ev)), "cudaEventSynchronize", err);
}

extern "C" int cuda_stream_wait(struct arle_device *dev, struct arle_stream *st, struct arle_event *ev)
{
    if (dev->dead.load())
        return -EIO;
    CUDA_TRY(dev, cudaStreamWaitEvent(cs(st), ce(ev), 0));
    return 0;
}

extern "C" int cuda_copy(struct arle_device *dev, struct arle_stream *st, void *dst, const void *src, size_t bytes, uint32_t dir)
{
    static const cudaMemcpyKind kinds[] = { cudaMemcpyDefault, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                                            cudaMemcpyDeviceToDevice };
    if (dir < ARLE_COPY_H2D || dir > ARLE_COPY_D2D)
        return -EINVAL;
    if (dev->dead.load())
        return -EIO;
    if (bytes == 0)
        return 0;
    bump(dev, COUNT_COPY_BYTES, bytes);
    if (copies_directly(dst, src, bytes, dir)) {
        cudaSetDevice(dev->ordinal);
        direct_copy_kernel<<<(unsigned)ceil_div((int64_t)bytes, 16 * 256), 256, 0, cs(st)>>>((char *)dst, (const char *)src, (int)bytes);
        CUDA_TRY(dev, cudaGetLastError());
        bump(dev, COUNT_COPY_DIRECT);
        return 0;
    }
    CUDA_TRY(dev, cudaMemcpyAsync(dst, src, bytes, kinds[dir], cs(st)));
    return 0;
}

extern "C" int cuda_fill(struct arle_device *dev, struct arle_stream *st, void *dst, int byte, size_t bytes)
{
    if (dev->dead.load())
        return -EIO;
    if (bytes == 0)
        return 0;
    CUDA_TRY(dev, cudaMemsetAsync(dst, byte, bytes, cs(st)));
    return 0;
}

/* Device time between the end of one graph and the start of the next: last end, sum, number, largest, in nanoseconds. */
struct graph_gaps { unsigned long long end, sum, n, max; };

static __global__ void graph_starts(graph_gaps *g)
{
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (g->end != 0 && now > g->end) {
        g->sum += now - g->end;
        g->n++;
        g->max = now - g->end > g->max ? now - g->end : g->max;
    }
}

static __global__ void graph_ends(graph_gaps *g)
{
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(g->end));
}

int gaps_open(arle_device *dev, struct arle_err *err)
{
    if (!dev->cx->conf.measure_gaps)
        return 0;
    void *p = NULL;
    int r = cuda_alloc(dev, ARLE_MEM_DEVICE, sizeof(graph_gaps), &p, err);
    dev->gaps = (graph_gaps *)p;
    if (r == 0 && cudaMemset(p, 0, sizeof(graph_gaps)) != cudaSuccess)
        r = arle_err_set(err, -EIO, "GPU %d does not clear memory", dev->ordinal);
    return r;
}

void gaps_close(arle_device *dev)
{
    graph_gaps g = {};
    if (dev->gaps == NULL)
        return;
    if (dev->dead.load() == 0 && cudaMemcpy(&g, dev->gaps, sizeof g, cudaMemcpyDeviceToHost) == cudaSuccess && g.n > 0 && dev->cx->log != NULL) {
        char text[128];
        snprintf(text, sizeof text, "between %llu step graphs: mean %.2f us, largest %.2f us", g.n, (double)g.sum / (double)g.n * 1e-3,
                 (double)g.max * 1e-3);
        dev->cx->log->write(ARLE_LOG_INFO, "cuda", "step-gaps", text);
    }
    cuda_free(dev, ARLE_MEM_DEVICE, dev->gaps);
    dev->gaps = NULL;
}

extern "C" int cuda_graph_begin(struct arle_device *dev, struct arle_stream *st, struct arle_err *err)
{
    if (dev->dead.load())
        return cuda_dead(dev, err);
    if (cudaSetDevice(dev->ordinal) != cudaSuccess || loader_settle(dev) < 0)
        return cuda_dead(dev, err) < 0 ? -EIO : arle_err_set(err, -EIO, "GPU %d cannot be chosen", dev->ordinal);
    /* Thread-local: movers may allocate and copy on their own threads while a step is being captured. */
    int r = answer(dev, cudaStreamBeginCapture(cs(st), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture", err);
    if (r == 0 && dev->gaps != NULL)
        graph_starts<<<1, 1, 0, cs(st)>>>(dev->gaps);
    return r;
}

extern "C" int cuda_graph_end(struct arle_device *dev, struct arle_stream *st, struct arle_graph **out, struct arle_err *err)
{
    cudaGraph_t graph = NULL;
    if (dev->gaps != NULL)
        graph_ends<<<1, 1, 0, cs(st)>>>(dev->gaps);
    int r = answer(dev, cudaStreamEndCapture(cs(st), &graph), "cudaStreamEndCapture", err);
    if (r < 0)
        return r;
    arle_graph *g = (arle_graph *)calloc(1, sizeof *g);
    if (g == NULL) {
        cudaGraphDestroy(graph);
        return arle_err_set(err, -ENOMEM, "no memory for a step graph");
    }
    g->graph = graph;
    r = answer(dev, cudaGraphInstantiate(&g->exec, graph, 0), "cudaGraphInstantiate", err);
    if (r < 0) {
        cuda_graph_destroy(dev, g);
        return r;
    }
    bump(dev, COUNT_GRAPH_CAPTURE);
    *out = g;
    return 0;
}

extern "C" int cuda_graph_launch(struct arle_device *dev, struct arle_graph *g, struct arle_stream *st)
{
    if (cuda_enter(dev, cs(st)) < 0)
        return -EIO;
    CUDA_TRY(dev, cudaGraphLaunch(g->exec, cs(st)));
    bump(dev, COUNT_GRAPH_LAUNCH);
    return 0;
}

extern "C" void cuda_graph_destroy(struct arle_device *dev, struct arle_graph *g)
{
    (void)dev;
    if (g == NULL)
        return;
    if (g->exec != NULL)
        cudaGraphExecDestroy(g->exec);
    cudaGraphDestroy(g->graph);
    free(g);
}
