/* embed, rmsnorm, silu_mul, seq_shift: short kernels over rows, sixteen bytes per thread and access. */
#include "common.cuh"
#include <errno.h>

namespace {

const uint32_t kManyRows = 1024;        /* from here on a warp per row; below, a block per row ends sooner */

struct norm_args {
    const bf16 *x; int64_t ld_x;
    const int32_t *rows;
    const float *w;
    bf16 *out; int64_t ld_out;
    int dim;
    float eps, w_offset;
};

/* Eight elements of a row: the sum of their squares, and their norm. */
__device__ __forceinline__ float square8(uint4 v)
{
    const uint32_t *p = (const uint32_t *)&v;
    float s = 0.f;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float2 f = unpack2(p[e]);
        s += f.x * f.x + f.y * f.y;
    }
    return s;
}

__device__ __forceinline__ uint4 norm8(uint4 v, const float *weights, float rho, float w_offset)
{
    const uint32_t *p = (const uint32_t *)&v;
    const float4 wa = ((const float4 *)weights)[0], wb = ((const float4 *)weights)[1];
    const float w[8] = { wa.x, wa.y, wa.z, wa.w, wb.x, wb.y, wb.z, wb.w };
    uint32_t o[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float2 f = unpack2(p[e]);
        o[e] = pack2(f.x * rho * (w_offset + w[2 * e]), f.y * rho * (w_offset + w[2 * e + 1]));
    }
    return make_uint4(o[0], o[1], o[2], o[3]);
}

/* One block per row; a row of up to 8 * 8 * 256 elements stays in registers between the two passes. */
__global__ void __launch_bounds__(256) rmsnorm_kernel(norm_args a)
{
    __shared__ float sh[32];
    constexpr int V = 8;
    pdl_launch();
    pdl_wait();
    int64_t r = a.rows != NULL ? a.rows[blockIdx.x] : blockIdx.x;
    const uint4 *x = (const uint4 *)(a.x + r * a.ld_x);
    uint4 v[V];
    float s = 0.f;
    int n = a.dim >> 3;
#pragma unroll
    for (int j = 0; j < V; j++) {
        int i = threadIdx.x + j * 256;
        if (i < n) {
            v[j] = x[i];
            s += square8(v[j]);
        }
    }
    float rho = rsqrtf(block_sum(s, sh) / (float)a.dim + a.eps);
    uint4 *out = (uint4 *)(a.out + (int64_t)blockIdx.x * a.ld_out);
#pragma unroll
    for (int j = 0; j < V; j++) {
        int i = threadIdx.x + j * 256;
        if (i < n) {
            out[i] = norm8(v[j], a.w + i * 8, rho, a.w_offset);
        }
    }
}

/* One warp per row of up to V * 256 elements: many rows need no barrier to keep the memory busy. */
template <int V>
__global__ void __launch_bounds__(256) rmsnorm_warp_kernel(norm_args a, int n_rows)
{
    const int t = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31, n = a.dim >> 3;
    pdl_launch();
    pdl_wait();
    if (t >= n_rows)
        return;
    const uint4 *x = (const uint4 *)(a.x + (int64_t)(a.rows != NULL ? a.rows[t] : t) * a.ld_x);
    uint4 v[V];
#pragma unroll
    for (int j = 0; j < V; j++)
        v[j] = lane + j * 32 < n ? x[lane + j * 32] : make_uint4(0, 0, 0, 0);
    float s = 0.f;
#pragma unroll
    for (int j = 0; j < V; j++)
        s += square8(v[j]);
    const float rho = rsqrtf(warp_sum(s) / (float)a.dim + a.eps);
    uint4 *out = (uint4 *)(a.out + (int64_t)t * a.ld_out);
#pragma unroll
    for (int j = 0; j < V; j++)
        if (lane + j * 32 < n)
            out[lane + j * 32] = norm8(v[j], a.w + (lane + j * 32) * 8, rho, a.w_offset);
}

__global__ void embed_kernel(const int32_t *ids, const int32_t *sampled, const bf16 *table, int64_t n_rows, int k, bf16 *out,
                             int64_t ld_out)
{
    pdl_launch();
    pdl_wait();
    int64_t id = token_id(ids, sampled, blockIdx.x);
    if (id < 0 || id >= n_rows)
        id = 0;         /* padding rows may carry anything */
    const uint4 *src = (const uint4 *)(table + id * k);
    uint4 *dst = (uint4 *)(out + (int64_t)blockIdx.x * ld_out);
    for (int i = threadIdx.x; i < k / 8; i += blockDim.x)
        dst[i] = src[i];
}

__device__ __forceinline__ uint4 silu_mul8(uint4 g, uint4 u, float limit)
{
    const uint32_t *gp = (const uint32_t *)&g, *up = (const uint32_t *)&u;
    uint32_t o[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float2 a = unpack2(gp[e]), b = unpack2(up[e]);
        if (limit > 0.f) {
            a.x = fminf(a.x, limit);
            a.y = fminf(a.y, limit);
            b.x = fminf(fmaxf(b.x, -limit), limit);
            b.y = fminf(fmaxf(b.y, -limit), limit);
        }
        o[e] = pack2(siluf(a.x) * b.x, siluf(a.y) * b.y);
    }
    return make_uint4(o[0], o[1], o[2], o[3]);
}

/* step: distance in elements from one block of eight gates to the next; up: distance from a gate to its up product. */
__global__ void silu_mul_kernel(const bf16 *gu, int64_t ld_gu, int64_t step, int64_t up, bf16 *out, int64_t ld_out, int dim8, float limit)
{
    pdl_launch();
    pdl_wait();
    const bf16 *row = gu + (int64_t)blockIdx.y * ld_gu;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < dim8; i += gridDim.x * blockDim.x) {
        uint4 g = *(const uint4 *)(row + i * step), u = *(const uint4 *)(row + i * step + up);
        *(uint4 *)(out + (int64_t)blockIdx.y * ld_out + i * 8) = silu_mul8(g, u, limit);
    }
}

struct shift_args {
    const int32_t *seq_of, *cu, *slot;
    const bf16 *x; int64_t ld_x;
    char *base; size_t stride, offset;
    bf16 *out; int64_t ld_out;
    int dim8, n_saves;
    arle_save saves[ARLE_MAX_SAVES];
};

/* The block of a sequence's first token also moves the record on: it alone reads and writes it. */
__global__ void seq_shift_kernel(shift_args a)
{
    pdl_launch();
    pdl_wait();
    int t = blockIdx.x, s = a.seq_of[t];
    bool first = t == a.cu[s];
    uint4 *rec = (uint4 *)(a.base + (size_t)a.slot[s] * a.stride + a.offset);
    const uint4 *prev = first ? rec : (const uint4 *)(a.x + (int64_t)(t - 1) * a.ld_x);
    const uint4 *last = (const uint4 *)(a.x + (int64_t)(a.cu[s + 1] - 1) * a.ld_x);
    uint4 *out = (uint4 *)(a.out + (int64_t)t * a.ld_out);
    for (int i = threadIdx.x; i < a.dim8; i += blockDim.x) {
        uint4 v = prev[i];
        if (first)
            rec[i] = last[i];
        out[i] = v;
    }
    for (int k = 0; k < a.n_saves; k++)
        if (a.saves[k].seq == (uint32_t)s && t == a.cu[s] + (int)a.saves[k].n_tokens - 1)
            for (int i = threadIdx.x; i < a.dim8; i += blockDim.x)
                ((uint4 *)(a.base + (size_t)a.saves[k].slot * a.stride + a.offset))[i] = ((const uint4 *)(a.x + (int64_t)t * a.ld_x))[i];
}

int launch_silu(arle_device *dev, cudaStream_t st, const bf16 *gu, int64_t ld_gu, int64_t step, int64_t up, bf16 *out, int64_t ld_out,
                int64_t n_tokens, int64_t dim, float limit)
{
    int dim8 = (int)(dim / 8);
    dim3 grid((unsigned)ceil_div(dim8, 256), (unsigned)(n_tokens < 65535 ? n_tokens : 65535));
    for (int64_t t = 0; t < n_tokens; t += 65535) {
        grid.y = (unsigned)(n_tokens - t < 65535 ? n_tokens - t : 65535);
        int r = launch(dev, st, silu_mul_kernel, grid, dim3(256), 0, gu + t * ld_gu, ld_gu, step, up, out + t * ld_out, ld_out, dim8, limit);
        if (r < 0)
            return r;
    }
    return 0;
}

} // namespace

int launch_rmsnorm(arle_device *dev, cudaStream_t st, const arle_rmsnorm_args *a)
{
    if (a->dtype != ARLE_BF16 || a->dim % 8 != 0 || a->dim > 16384 || a->ld_x % 8 != 0 || a->ld_out % 8 != 0)
        return -EINVAL;
    norm_args n = { (const bf16 *)a->x, a->ld_x, a->rows, a->w, (bf16 *)a->out, a->ld_out, (int)a->dim, a->eps, a->w_offset };
    const dim3 warps((unsigned)ceil_div(a->n_tokens, 8));
    /* The two kernels add in different orders. */
    const bool many = a->n_tokens >= kManyRows && !dev->deterministic;
    if (many && a->dim <= 2048)
        return launch(dev, st, rmsnorm_warp_kernel<8>, warps, dim3(256), 0, n, (int)a->n_tokens);
    if (many && a->dim <= 3072)
        return launch(dev, st, rmsnorm_warp_kernel<12>, warps, dim3(256), 0, n, (int)a->n_tokens);
    return launch(dev, st, rmsnorm_kernel, dim3(a->n_tokens), dim3(256), 0, n);
}

int launch_silu_interleaved(arle_device *dev, cudaStream_t st, const bf16 *gu, int64_t ld_gu, bf16 *out, int64_t ld_out,
                            int64_t n_tokens, int64_t dim, float limit)
{
    return launch_silu(dev, st, gu, ld_gu, 16, 8, out, ld_out, n_tokens, dim, limit);
}

extern "C" int cuda_rmsnorm(struct arle_device *dev, struct arle_stream *st, const struct arle_rmsnorm_args *a)
{
    OP_ENTER(dev, st);
    return a->n_tokens == 0 ? 0 : launch_rmsnorm(dev, cs(st), a);
}

extern "C" int cuda_embed(struct arle_device *dev, struct arle_stream *st, const struct arle_embed_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || a->table == NULL || a->table->data == NULL || a->ld_out % 8 != 0)
        return -EINVAL;
    return launch(dev, cs(st), embed_kernel, dim3(a->n_tokens), dim3(128), 0, a->ids, a->sampled, a->table->data, a->table->n,
                  (int)a->table->k, (bf16 *)a->out, a->ld_out);
}

extern "C" int cuda_silu_mul(struct arle_device *dev, struct arle_stream *st, const struct arle_silu_mul_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || a->dim % 8 != 0 || a->ld_gu % 8 != 0 || a->ld_out % 8 != 0)
        return -EINVAL;
    return launch_silu(dev, cs(st), (const bf16 *)a->gu, a->ld_gu, 8, a->dim, (bf16 *)a->out, a->ld_out, a->n_tokens, a->dim, a->limit);
}

static int shift(arle_device *dev, arle_stream *st, const arle_seq_shift_args *a, const arle_save *saves, uint32_t n_saves)
{
    OP_ENTER(dev, st);
    const arle_batch *b = a->batch;
    if (b->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || a->dim % 8 != 0 || a->ld_x % 8 != 0 || a->ld_out % 8 != 0 || n_saves > ARLE_MAX_SAVES)
        return -EINVAL;
    shift_args s = { b->seq_of, b->cu, b->slot, (const bf16 *)a->x, a->ld_x, (char *)a->record.base, a->record.stride,
                     a->record.offset, (bf16 *)a->out, a->ld_out, (int)(a->dim / 8), (int)n_saves, {} };
    for (uint32_t i = 0; i < n_saves; i++)
        s.saves[i] = saves[i];
    return launch(dev, cs(st), seq_shift_kernel, dim3(b->n_tokens), dim3(128), 0, s);
}

extern "C" int cuda_seq_shift(struct arle_device *dev, struct arle_stream *st, const struct arle_seq_shift_args *a)
{
    return shift(dev, st, a, NULL, 0);
}

extern "C" int cuda_seq_shift_keep(struct arle_device *dev, struct arle_stream *st, const struct arle_seq_shift_keep_args *a)
{
    return shift(dev, st, &a->shift, a->saves, a->n_saves);
}
