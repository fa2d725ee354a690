/*
 * What all .cu files share: the device record, launching with programmatic dependency, error latch, and small device
 * functions. Nothing here is visible outside the plugin.
 *
 * Programmatic dependent launch: every kernel calls pdl_launch() first (its successor may become resident) and pdl_wait()
 * before it touches memory that earlier kernels write or read. Only weights and the batch's tables may be read before.
 * Two know more and say why: few_kernel, and walk_kernel after tile_kernel, which lets it in only after its own wait.
 */
#ifndef BACKEND_CUDA_COMMON_CUH
#define BACKEND_CUDA_COMMON_CUH

#include "backend.h"
#include <atomic>
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef __nv_bfloat16 bf16;

struct cuda_ctx {
    cuda_conf conf;
    const arle_log_service *log;
    int n_devices;
};

/* Counters of paths taken; the names are in device.cu in the same order. */
enum cuda_count {
    COUNT_GEMV, COUNT_GEMV_ROW, COUNT_GEMM_STREAM, COUNT_GEMM_TMA, COUNT_GEMM_LT, COUNT_GEMM_WIDE, COUNT_GEMM_EXPERTS,
    COUNT_ATTN_DECODE, COUNT_ATTN_PREFILL, COUNT_GDN_FEW, COUNT_GDN_DECODE, COUNT_GDN_STEP, COUNT_GDN_CHUNK, COUNT_GDN_SAVE, COUNT_MOE,
    COUNT_MOE_DECODE, COUNT_MOE_FUSED, COUNT_SAMPLE,
    COUNT_GRAPH_LAUNCH, COUNT_GRAPH_CAPTURE, COUNT_PDL, COUNT_COPY_BYTES, COUNT_COPY_DIRECT, COUNT_ALLOC_BYTES, COUNT_N
};

struct lt_plan;
struct graph_gaps;
struct cuda_loader;

/* One opened GPU. Workspaces are shared by all ops, so ops of one device run on one stream at a time (the engine's). */
struct arle_device {
    cuda_ctx *cx;
    int ordinal, n_sm, cc;              /* cc: 90 for compute capability 9.0 */
    size_t max_smem, sm_smem;           /* shared memory of a block at most, of a multiprocessor */
    bool pdl, deterministic;
    int stream_rows, tma_rows;
    std::atomic<int> dead;
    pthread_mutex_t mu;                 /* guards reason */
    char reason[256];
    std::atomic<uint64_t> count[COUNT_N];
    std::atomic<uint64_t> mem_used;
    std::atomic<int64_t> fault_kernel, fault_alloc;     /* count down to the injected fault; below zero: off */

    int tma_code;                       /* gemm_tma.cuh: 1 its kernels are in this build and run here, -1 they do not, 0 not asked yet */
    bool tma_by_regs;                   /* its last launch took more than half of a multiprocessor's registers, see gemm_tma_launch */
    int tma_clusters[4];                /* clusters of 1, 2, 4, 8 of its blocks that run at a time, no two on a multiprocessor */
    bool counted;                       /* among the open records of its GPU */
    bool no_wide;                       /* gemm_wide.cu has found that its kernels do not run here */
    int wide_clusters;                  /* how many pairs of its blocks are resident at a time, once it has asked */
    cublasLtHandle_t lt;
    void *lt_work;
    size_t lt_work_bytes;
    cuda_loader *loader;                /* weights.cu; NULL until the first weight */
    lt_plan *plans;                     /* hash table of matmul plans by shape; engine thread only */

    float *partial;                     /* split sums of gemm_stream */
    unsigned *tickets;                  /* zero between kernels: 65536 of gemm_stream, 65537 of gdn */
    void *attn_work;                    /* split-KV partial results */
    size_t attn_work_bytes;
    void *sample_work;
    size_t sample_work_bytes;
    graph_gaps *gaps;                   /* mem.cu; NULL unless they are measured */
};

struct arle_weight {
    uint32_t role, n_experts;
    int64_t n, k;                       /* rows per expert as stored (padded for gate_up), inner dimension */
    int64_t n_real;                     /* rows of result: N, or I for gate_up */
    bf16 *data;
    float *vec;
    uint64_t bytes;
};

struct arle_stream;
struct arle_event;
struct arle_graph { cudaGraph_t graph; cudaGraphExec_t exec; };

static inline cudaStream_t cs(arle_stream *st) { return reinterpret_cast<cudaStream_t>(st); }

/** Records a failure; sticky errors make the device dead. Returns -ENOMEM for memory, else -EIO. */
int cuda_fail(arle_device *dev, cudaError_t e, const char *what, const char *file, int line);
/** -EIO when the device is dead or has just died of an injected fault; call first in each op. */
int cuda_enter(arle_device *dev, cudaStream_t st);

#define CUDA_TRY(dev, call) do { \
        cudaError_t e_ = (call); \
        if (e_ != cudaSuccess) \
            return cuda_fail((dev), e_, #call, __FILE__, __LINE__); \
    } while (0)

#define OP_ENTER(dev, st) do { int r_ = cuda_enter((dev), cs(st)); if (r_ < 0) return r_; } while (0)

static inline void bump(arle_device *dev, int c, uint64_t by = 1)
{
    dev->count[c].fetch_add(by, std::memory_order_relaxed);
}

/**
 * Launches with programmatic dependency on the kernel before it (where enabled), so that launch gaps and prologues overlap.
 * cluster: blocks that share their memory (compute capability 9.0 and up), 1 = none.
 */
template <class... P, class... A>
static inline int launch_clusters(arle_device *dev, cudaStream_t st, int cluster, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem,
                                  A... args)
{
    if (smem > 48 * 1024)
        CUDA_TRY(dev, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    cudaLaunchConfig_t cfg = {};
    cfg.gridDim = grid;
    cfg.blockDim = block;
    cfg.dynamicSmemBytes = smem;
    cfg.stream = st;
    cudaLaunchAttribute attr[2];
    cfg.attrs = attr;
    if (dev->pdl) {
        attr[cfg.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[cfg.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
        bump(dev, COUNT_PDL);
    }
    if (cluster > 1) {
        attr[cfg.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attr[cfg.numAttrs].val.clusterDim.x = (unsigned)cluster;
        attr[cfg.numAttrs].val.clusterDim.y = attr[cfg.numAttrs].val.clusterDim.z = 1;
        cfg.numAttrs++;
    }
    CUDA_TRY(dev, cudaLaunchKernelEx(&cfg, kernel, static_cast<P>(args)...));
    return 0;
}

template <class... P, class... A>
static inline int launch(arle_device *dev, cudaStream_t st, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A... args)
{
    return launch_clusters(dev, st, 1, kernel, grid, block, smem, args...);
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/** Whether no other record of this process is open on the same GPU. Kernels whose blocks wait for each other need all of them to be
 * resident, which other streams' kernels of the same kind could prevent. */
bool device_alone(const arle_device *dev);
/** Whether the build has code for this GPU in a kernel whose body is for 9.0 with the "a" alone: elsewhere it has no shared memory either. */
static inline bool has_code(const void *kernel)
{
    cudaFuncAttributes fa;
    if (cudaFuncGetAttributes(&fa, kernel) == cudaSuccess)
        return fa.sharedSizeBytes > 0;
    cudaGetLastError();
    return false;
}
/** For kernels that need much shared memory and are to run beside others: by itself the driver sets aside what the one needs, and a
 * multiprocessor changes that only while it is empty. */
static inline cudaError_t share_sm(const void *kernel, bool share)
{
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                share ? cudaSharedmemCarveoutMaxShared : cudaSharedmemCarveoutDefault);
}
/** Measuring the time between step graphs, where it is asked for; what was found is logged at the end. */
int gaps_open(arle_device *dev, struct arle_err *err);
void gaps_close(arle_device *dev);
/** Waits, once, for weights that are still on their way. */
int loader_settle(arle_device *dev);
void loader_free(arle_device *dev);
/** Norm of whole rows; shared by rmsnorm, norm_linear and gate_up. */
int launch_rmsnorm(arle_device *dev, cudaStream_t st, const arle_rmsnorm_args *a);
/** silu(gate) * up over the interleaved columns that a gate_up weight gives. */
int launch_silu_interleaved(arle_device *dev, cudaStream_t st, const bf16 *gu, int64_t ld_gu, bf16 *out, int64_t ld_out,
                            int64_t n_tokens, int64_t dim, float limit);
/** Large matrix product through cuBLASLt: y[t, n] = x W^T (+ y). */
int lt_matmul(arle_device *dev, cudaStream_t st, const bf16 *w, int64_t n, int64_t k, const bf16 *x, int64_t ld_x, int64_t rows,
              void *y, int64_t ld_y, bool f32_out, bool accumulate);
void lt_plans_free(arle_device *dev);

#ifdef __CUDACC__
/* ---- device functions ------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ void pdl_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ void pdl_launch()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ uint32_t smem_u32(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 16 bytes, zero-filled unless ok. */
static __device__ __forceinline__ void cp16(uint32_t dst, const void *src, bool ok)
{
    int n = ok ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(n) : "memory");
}
static __device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

static __device__ __forceinline__ void l2_prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

static __device__ __forceinline__ void ldsm4(uint32_t *r, uint32_t addr)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
static __device__ __forceinline__ void ldsm2(uint32_t *r, uint32_t addr)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(addr) : "memory");
}
static __device__ __forceinline__ void ldsm4t(uint32_t *r, uint32_t addr)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
static __device__ __forceinline__ void ldsm2t(uint32_t *r, uint32_t addr)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(addr) : "memory");
}

/* d += a b, a 16x16 row-major, b 16x8 column-major, bf16 in, f32 sums. */
static __device__ __forceinline__ void mma16816(float *d, const uint32_t *a, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ uint32_t pack2(float lo, float hi)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<uint32_t *>(&v);
}
static __device__ __forceinline__ float2 unpack2(uint32_t v)
{
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}
static __device__ __forceinline__ float round_bf(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
static __device__ __forceinline__ float sigmoidf(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
static __device__ __forceinline__ float siluf(float x) { return __fdividef(x, 1.f + __expf(-x)); }

static __device__ __forceinline__ float warp_sum(float v)
{
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
static __device__ __forceinline__ float warp_max(float v)
{
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

/* Sum over the block, same result in every thread; sh: 32 floats. Blocks of whole warps. */
static __device__ __forceinline__ float block_sum(float v, float *sh)
{
    v = warp_sum(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        sh[threadIdx.x >> 5] = v;
    __syncthreads();
    float r = 0.f;
    int n = (blockDim.x + 31) >> 5;
    for (int i = 0; i < n; i++)
        r += sh[i];
    return r;
}

static __device__ __forceinline__ int32_t token_id(const int32_t *ids, const int32_t *sampled, int64_t t)
{
    int32_t id = ids[t];
    return id >= 0 ? id : sampled[-1 - id];
}
#endif
#endif
