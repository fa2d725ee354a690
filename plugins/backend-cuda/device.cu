/*
 * Devices: what is there, opening and closing, the latch of sticky errors, counters, and measured ceilings. Owns the
 * workspaces that ops share.
 */
#include "common.cuh"
#include <errno.h>
#include <stdio.h>

namespace {

const char *const count_names[COUNT_N] = {
    "gemv", "gemv_row", "gemm_stream", "gemm_tma", "gemm_lt", "gemm_wide", "gemm_experts", "attn_decode",
    "attn_prefill", "gdn_few", "gdn_decode", "gdn_step", "gdn_chunk", "gdn_save", "moe", "moe_decode", "moe_fused", "sample",
    "graph_launch", "graph_capture", "pdl_launch", "copy_bytes", "copy_direct", "alloc_bytes",
};

/* Architectures this file was compiled for; the oldest that runs is 8.0. */
const int kMinCc = 80;

/* Open records by ordinal, for device_alone(). */
std::atomic<int> open_on[64];

int driver_reason(struct arle_err *err, cudaError_t e)
{
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0)
        return arle_err_set(err, -ENODEV, "no NVIDIA driver on this machine (%s); install the driver", cudaGetErrorString(e));
    return arle_err_set(err, -ENODEV, "%s: driver speaks CUDA %d.%d, this plugin needs %d.%d", cudaGetErrorString(e),
                        driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
}

__global__ void probe_kernel() {}

__global__ void trap_kernel() { asm volatile("trap;"); }

/* Reads n 16-byte words once. The sum is stored only if it is a value that never comes, so that loads stay. */
__global__ void read_kernel(const uint4 *p, size_t n, uint32_t *sink)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, step = (size_t)gridDim.x * blockDim.x;
    uint32_t s = 0;
    for (; i + 7 * step < n; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = __ldcs(p + i + j * step);
#pragma unroll
        for (int j = 0; j < 8; j++)
            s ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (s == 0x9e3779b9u)
        *sink = s;
}

__global__ void noise_kernel(bf16 *p, size_t n)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)i * 2654435761u;
        h ^= h >> 15;
        h *= 2246822519u;
        h ^= h >> 13;
        p[i] = __float2bfloat16_rn((float)(int)(h & 0xffff) / 32768.f - 1.f);
    }
}

} // namespace

extern "C" int cuda_probe(struct arle_probe *out, struct arle_err *err)
{
    struct arle_err why = ARLE_ERR_INIT;
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0) {
        out->usable = 0;
        driver_reason(&why, e != cudaSuccess ? e : cudaErrorNoDevice);
        snprintf(out->detail, sizeof out->detail, "%.250s", why.msg);
        return 0;
    }
    cudaDeviceProp p;
    e = cudaGetDeviceProperties(&p, 0);
    if (e != cudaSuccess) {
        out->usable = 0;
        snprintf(out->detail, sizeof out->detail, "GPU 0 does not answer: %s", cudaGetErrorString(e));
        return 0;
    }
    cudaFuncAttributes fa;
    int driver = 0;
    cudaDriverGetVersion(&driver);
    e = cudaFuncGetAttributes(&fa, (const void *)probe_kernel);
    if (e != cudaSuccess && e != cudaErrorNoKernelImageForDevice && e != cudaErrorInvalidDeviceFunction) {
        out->usable = 0;
        snprintf(out->detail, sizeof out->detail, "%s does not start: %s", p.name, cudaGetErrorString(e));
        return 0;
    }
    if (p.major * 10 + p.minor < kMinCc || e != cudaSuccess) {
        out->usable = 0;
        snprintf(out->detail, sizeof out->detail, "%s has compute capability %d.%d, for which this plugin was not built "
                 "(configure --with-cuda-arch)", p.name, p.major, p.minor);
        return 0;
    }
    out->usable = 1;
    snprintf(out->detail, sizeof out->detail, "%s, %.0f GB, compute capability %d.%d, driver for CUDA %d.%d%s", p.name,
             (double)p.totalGlobalMem / 1e9, p.major, p.minor, driver / 1000, driver % 1000 / 10, n > 1 ? ", more GPUs" : "");
    (void)err;
    return 0;
}

extern "C" int cuda_ctx_open(const struct cuda_conf *conf, const struct arle_log_service *log, struct cuda_ctx **out,
                             struct arle_err *err)
{
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0)
        return driver_reason(err, e != cudaSuccess ? e : cudaErrorNoDevice);
    if (conf->device >= n)
        return arle_err_param(err, -EINVAL, "device", "device %lld: this machine has %d GPUs", (long long)conf->device, n);
    cuda_ctx *cx = (cuda_ctx *)calloc(1, sizeof *cx);
    if (cx == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the plugin's context");
    cx->conf = *conf;
    cx->log = log;
    cx->n_devices = n - (int)conf->device;
    *out = cx;
    return 0;
}

extern "C" void cuda_ctx_close(struct cuda_ctx *cx) { free(cx); }

extern "C" uint32_t cuda_n_devices(void *ctx) { return (uint32_t)((cuda_ctx *)ctx)->n_devices; }

extern "C" int cuda_device_info(void *ctx, uint32_t index, struct arle_device_info *out, struct arle_err *err)
{
    cuda_ctx *cx = (cuda_ctx *)ctx;
    if (index >= (uint32_t)cx->n_devices)
        return arle_err_set(err, -ENODEV, "GPU %u: there are %d", index, cx->n_devices);
    int ordinal = (int)(cx->conf.device + index);
    cudaDeviceProp p;
    size_t free_bytes = 0, total = 0;
    cudaError_t e = cudaGetDeviceProperties(&p, ordinal);
    if (e == cudaSuccess)
        e = cudaSetDevice(ordinal);
    if (e == cudaSuccess)
        e = cudaMemGetInfo(&free_bytes, &total);
    if (e != cudaSuccess)
        return arle_err_set(err, -EIO, "GPU %d: %s", ordinal, cudaGetErrorString(e));
    arle_device_info i = {};
    i.struct_size = sizeof i;
    i.threads = (uint32_t)p.multiProcessorCount;
    snprintf(i.name, sizeof i.name, "%.90s", p.name);
    i.mem_total = total;
    i.mem_free = free_bytes;
    if (cx->conf.memory != 0 && cx->conf.memory < i.mem_free)
        i.mem_free = cx->conf.memory;
    i.async = 1;
    i.default_compute = ARLE_BF16;
    i.graphs = 1;
    *out = i;
    return 0;
}

static int take_workspaces(arle_device *dev, struct arle_err *err)
{
    struct { void **p; size_t bytes; } want[] = {
        { &dev->lt_work, dev->lt_work_bytes = 64u << 20 },
        { (void **)&dev->partial, (size_t)(2 * dev->n_sm) * 2 * 65536 },
        { (void **)&dev->tickets, (131072 + 1) * sizeof(unsigned) },
        { &dev->attn_work, dev->attn_work_bytes = 96u << 20 },
        { &dev->sample_work, dev->sample_work_bytes = 64u << 20 },
    };
    for (auto &w : want) {
        int r = cuda_alloc(dev, ARLE_MEM_DEVICE, w.bytes, w.p, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static void set_faults(arle_device *dev)
{
    long long n = 0;
    dev->fault_kernel = dev->fault_alloc = -1;
    if (sscanf(dev->cx->conf.inject_fault, "kernel:%lld", &n) == 1)
        dev->fault_kernel = n;
    else if (sscanf(dev->cx->conf.inject_fault, "alloc:%lld", &n) == 1)
        dev->fault_alloc = n;
}

extern "C" int cuda_open_device(void *ctx, uint32_t index, struct arle_device **out, struct arle_err *err)
{
    cuda_ctx *cx = (cuda_ctx *)ctx;
    if (index >= (uint32_t)cx->n_devices)
        return arle_err_set(err, -ENODEV, "GPU %u: there are %d", index, cx->n_devices);
    arle_device *dev = (arle_device *)calloc(1, sizeof *dev);
    if (dev == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the device record");
    dev->cx = cx;
    dev->ordinal = (int)(cx->conf.device + index);
    pthread_mutex_init(&dev->mu, NULL);
    cudaDeviceProp p;
    cudaError_t e = cudaSetDevice(dev->ordinal);
    if (e == cudaSuccess)
        e = cudaGetDeviceProperties(&p, dev->ordinal);
    int r = 0;
    if (e != cudaSuccess) {
        r = arle_err_set(err, -EIO, "GPU %d does not open: %s", dev->ordinal, cudaGetErrorString(e));
        goto fail;
    }
    dev->n_sm = p.multiProcessorCount;
    dev->cc = p.major * 10 + p.minor;
    dev->max_smem = p.sharedMemPerBlockOptin;
    dev->sm_smem = p.sharedMemPerMultiprocessor;
    dev->pdl = cx->conf.pdl && dev->cc >= 90;
    dev->deterministic = cx->conf.deterministic != 0;
    dev->stream_rows = (int)cx->conf.stream_rows;
    dev->tma_rows = (int)cx->conf.tma_rows;
    dev->fault_kernel = dev->fault_alloc = -1;
    if (cublasLtCreate(&dev->lt) != CUBLAS_STATUS_SUCCESS) {
        r = arle_err_set(err, -EIO, "cuBLASLt does not start on GPU %d", dev->ordinal);
        goto fail;
    }
    r = take_workspaces(dev, err);
    if (r < 0)
        goto fail;
    r = gaps_open(dev, err);
    if (r < 0)
        goto fail;
    set_faults(dev);
    if (dev->ordinal < 64) {
        open_on[dev->ordinal].fetch_add(1);
        dev->counted = true;
    }
    *out = dev;
    return 0;
fail:
    cuda_close_device(dev);
    return r;
}

extern "C" void cuda_close_device(struct arle_device *dev)
{
    if (dev == NULL)
        return;
    cudaSetDevice(dev->ordinal);
    if (dev->counted)
        open_on[dev->ordinal].fetch_sub(1);
    gaps_close(dev);
    loader_free(dev);
    lt_plans_free(dev);
    void *const mem[] = { dev->lt_work, dev->partial, dev->tickets, dev->attn_work, dev->sample_work };
    for (void *p : mem)
        cuda_free(dev, ARLE_MEM_DEVICE, p);
    if (dev->lt != NULL)
        cublasLtDestroy(dev->lt);
    pthread_mutex_destroy(&dev->mu);
    free(dev);
}

bool device_alone(const arle_device *dev) { return dev->counted && open_on[dev->ordinal].load() == 1; }

int cuda_fail(arle_device *dev, cudaError_t e, const char *what, const char *file, int line)
{
    cudaGetLastError();         /* clears errors that are not sticky */
    if (e == cudaErrorMemoryAllocation)
        return -ENOMEM;
    pthread_mutex_lock(&dev->mu);
    bool first = dev->dead.load() == 0;
    if (first) {
        const char *base = strrchr(file, '/');
        snprintf(dev->reason, sizeof dev->reason, "GPU %d: %s (%s) at %s:%d: %.100s", dev->ordinal, cudaGetErrorName(e),
                 cudaGetErrorString(e), base != NULL ? base + 1 : file, line, what);
        dev->dead.store(1, std::memory_order_release);
    }
    pthread_mutex_unlock(&dev->mu);
    if (first && dev->cx->log != NULL)
        dev->cx->log->write(ARLE_LOG_ERROR, "cuda", "device-dead", dev->reason);
    return -EIO;
}

int cuda_enter(arle_device *dev, cudaStream_t st)
{
    if (dev->dead.load(std::memory_order_relaxed))
        return -EIO;
    CUDA_TRY(dev, cudaSetDevice(dev->ordinal));         /* the engine's thread is not the one that opened the device */
    if (dev->fault_kernel.load(std::memory_order_relaxed) > 0 && dev->fault_kernel.fetch_sub(1) == 1)
        trap_kernel<<<1, 1, 0, st>>>();
    return loader_settle(dev);
}

extern "C" int cuda_dead(struct arle_device *dev, struct arle_err *err)
{
    if (dev->dead.load(std::memory_order_acquire) == 0)
        return 0;
    pthread_mutex_lock(&dev->mu);
    int r = arle_err_set(err, -EIO, "%s", dev->reason);
    pthread_mutex_unlock(&dev->mu);
    return r;
}

extern "C" uint32_t cuda_counters(struct arle_device *dev, struct arle_counter *out, uint32_t cap)
{
    for (uint32_t i = 0; i < COUNT_N && i < cap; i++) {
        out[i].name = count_names[i];
        out[i].value = dev->count[i].load(std::memory_order_relaxed);
    }
    return COUNT_N;
}

static int time_ms(arle_device *dev, cudaEvent_t a, cudaEvent_t b, float *ms)
{
    CUDA_TRY(dev, cudaEventSynchronize(b));
    CUDA_TRY(dev, cudaEventElapsedTime(ms, a, b));
    return 0;
}

static int measure(arle_device *dev, void *mem, size_t bytes, double *read_s, double *flop_s)
{
    cudaEvent_t a, b;
    cudaStream_t st;
    const int64_t n = 8192;
    CUDA_TRY(dev, cudaStreamCreateWithFlags(&st, cudaStreamNonBlocking));
    CUDA_TRY(dev, cudaEventCreate(&a));
    CUDA_TRY(dev, cudaEventCreate(&b));
    noise_kernel<<<dev->n_sm * 8, 256, 0, st>>>((bf16 *)mem, bytes / 2);
    CUDA_TRY(dev, cudaGetLastError());
    float best = 1e30f, ms = 0;
    int r = 0;
    for (int i = 0; i < 8 && r == 0; i++) {
        cudaEventRecord(a, st);
        read_kernel<<<dev->n_sm * 8, 512, 0, st>>>((const uint4 *)mem, bytes / 16, dev->tickets + 131071);
        cudaEventRecord(b, st);
        r = time_ms(dev, a, b, &ms);
        best = ms < best ? ms : best;
    }
    *read_s = (double)bytes / (best * 1e-3);
    const bf16 *w = (const bf16 *)mem, *x = w + n * n;
    float best2 = 1e30f;
    for (int i = 0; i < 8 && r == 0; i++) {
        cudaEventRecord(a, st);
        r = lt_matmul(dev, st, w, n, n, x, n, n, (bf16 *)mem + 2 * n * n, n, false, false);
        cudaEventRecord(b, st);
        if (r == 0)
            r = time_ms(dev, a, b, &ms);
        best2 = ms < best2 ? ms : best2;
    }
    *flop_s = 2.0 * n * n * n / (best2 * 1e-3);
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    cudaStreamDestroy(st);
    return r;
}

extern "C" int cuda_ceiling(struct arle_device *dev, double *read_bytes_s, double *bf16_flop_s, struct arle_err *err)
{
    /* Several times the L2, so that the rate is the memory's. */
    size_t bytes = (size_t)2 << 30;
    void *mem = NULL;
    int r = cuda_alloc(dev, ARLE_MEM_DEVICE, bytes, &mem, err);
    if (r < 0)
        return r;
    r = measure(dev, mem, bytes, read_bytes_s, bf16_flop_s);
    cuda_free(dev, ARLE_MEM_DEVICE, mem);
    if (r < 0)
        return cuda_dead(dev, err) < 0 ? -EIO : arle_err_set(err, r, "measuring the ceilings failed");
    return 0;
}
