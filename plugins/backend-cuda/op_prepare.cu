/* attn_prepare: norm of q and k heads, rotary embedding, write of k and v to the paged cache, in the cache's dtype. */
#include "common.cuh"
#include <errno.h>

namespace {

const int kMaxHead = 512, kWarps = 8;

struct prepare_args {
    int n_q, n_kv, head_dim, rot_dim, rot_off, interleaved, page_tokens, table_stride, pos_shift;
    float eps, w_offset, rope_scale;
    const int32_t *pos, *seq_of, *table;
    const bf16 *qkv; int64_t ld_qkv, q_off, q_head_stride, k_off, v_off;
    const float *q_norm, *k_norm, *inv_freq;
    char *kv; size_t page_stride, kv_offset, entry_stride;
    uint32_t kv_dtype;
    bf16 *q_out;
};

__device__ __forceinline__ void load_head(const bf16 *src, int dim, float *x, int lane)
{
    for (int i = lane * 2; i < dim; i += 64) {
        float2 f = unpack2(*(const uint32_t *)(src + i));
        x[i] = f.x;
        x[i + 1] = f.y;
    }
    __syncwarp();
}

__device__ void norm_head(float *x, int dim, const float *w, float eps, int lane)
{
    float s = 0.f;
    for (int i = lane; i < dim; i += 32)
        s += x[i] * x[i];
    float rho = rsqrtf(warp_sum(s) / (float)dim + eps);
    for (int i = lane; i < dim; i += 32)
        x[i] = round_bf(x[i] * rho * w[i]);
    __syncwarp();
}

__device__ void rotate_head(float *x, const prepare_args &a, const float2 *cs, int lane)
{
    int half = a.rot_dim / 2;
    for (int j = lane; j < half; j += 32) {
        int i0 = a.rot_off + (a.interleaved ? 2 * j : j), i1 = a.rot_off + (a.interleaved ? 2 * j + 1 : j + half);
        float u = x[i0], v = x[i1];
        x[i0] = (u * cs[j].x - v * cs[j].y) * a.rope_scale;
        x[i1] = (v * cs[j].x + u * cs[j].y) * a.rope_scale;
    }
    __syncwarp();
}

__device__ void store_bf16(bf16 *dst, const float *x, int dim, int lane)
{
    for (int i = lane * 2; i < dim; i += 64)
        *(uint32_t *)(dst + i) = pack2(x[i], x[i + 1]);
}

/* Sylvester-Hadamard of each 128-wide half, orthonormal. */
__device__ void hadamard(float *x, int dim, int lane)
{
    for (int len = 1; len < 128; len <<= 1) {
        for (int p = lane; p < dim / 2; p += 32) {
            int i = (p / len) * 2 * len + p % len;
            float u = x[i], v = x[i + len];
            x[i] = u + v;
            x[i + len] = u - v;
        }
        __syncwarp();
    }
    for (int i = lane; i < dim; i += 32)
        x[i] *= 0.08838834764831845f;
    __syncwarp();
}

/* Vector `vec` of an entry of n_vec vectors in the forms of <arle/kv.h>. */
__device__ void store_quantised(char *entry, int vec, int n_vec, float *x, int dim, uint32_t dtype, int lane)
{
    float amax = 0.f;
    if (dtype == ARLE_I4G) {
        hadamard(x, dim, lane);
        uint8_t *codes = (uint8_t *)entry + (size_t)vec * (dim / 2);
        __half *scales = (__half *)(entry + (size_t)n_vec * (dim / 2)) + vec * (dim / 32);
        for (int g = lane; g < dim / 32; g += 32) {
            amax = 0.f;
            for (int i = 0; i < 32; i++)
                amax = fmaxf(amax, fabsf(x[g * 32 + i]));
            __half s = __float2half_rn(amax / 7.f);
            float inv = __half2float(s) > 0.f ? 1.f / __half2float(s) : 0.f;
            scales[g] = s;
            for (int i = 0; i < 32; i += 2) {
                int lo = __float2int_rn(x[g * 32 + i] * inv) + 8, hi = __float2int_rn(x[g * 32 + i + 1] * inv) + 8;
                lo = min(max(lo, 1), 15);
                hi = min(max(hi, 1), 15);
                codes[g * 16 + i / 2] = (uint8_t)(lo | hi << 4);
            }
        }
        return;
    }
    for (int i = lane; i < dim; i += 32)
        amax = fmaxf(amax, fabsf(x[i]));
    amax = warp_max(amax);
    float s = amax / (dtype == ARLE_I8 ? 127.f : 448.f), inv = s > 0.f ? 1.f / s : 0.f;
    uint8_t *codes = (uint8_t *)entry + (size_t)vec * dim;
    for (int i = lane; i < dim; i += 32) {
        float q = x[i] * inv;
        codes[i] = dtype == ARLE_I8 ? (uint8_t)(int8_t)__float2int_rn(q) : (uint8_t)__nv_fp8_e4m3(q).__x;
    }
    if (lane == 0)
        ((float *)(entry + (size_t)n_vec * dim))[vec] = s;
}

/* A warp per head, blocks (token, part of the heads). All that does not come from the kernel before this one is at hand when that ends. */
__global__ void __launch_bounds__(kWarps * 32) prepare_kernel(prepare_args a)
{
    __shared__ float xs[kWarps][kMaxHead], norm[2][kMaxHead];
    __shared__ float2 cs[kMaxHead / 2];
    const int t = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    pdl_launch();
    const int pos = a.pos[t] + a.pos_shift, at = max(pos, 0);
    const int page = a.table[(int64_t)a.seq_of[t] * a.table_stride + at / a.page_tokens];
    for (int j = threadIdx.x; j < a.rot_dim / 2; j += blockDim.x) {
        float s, c;
        sincosf((float)pos * a.inv_freq[j], &s, &c);
        cs[j] = make_float2(c, s);
    }
    for (int i = threadIdx.x; i < a.head_dim; i += blockDim.x) {
        norm[0][i] = a.q_norm != NULL ? a.w_offset + a.q_norm[i] : 1.f;
        norm[1][i] = a.k_norm != NULL ? a.w_offset + a.k_norm[i] : 1.f;
    }
    __syncthreads();
    pdl_wait();
    if (pos < 0)
        return;
    char *entry = a.kv + (size_t)page * a.page_stride + a.kv_offset + (size_t)(at % a.page_tokens) * a.entry_stride;
    const bf16 *row = a.qkv + (int64_t)t * a.ld_qkv;
    float *x = xs[warp];
    for (int h = blockIdx.y * kWarps + warp; h < a.n_q + 2 * a.n_kv; h += gridDim.y * kWarps) {
        bool is_q = h < a.n_q, is_k = !is_q && h < a.n_q + a.n_kv;
        int vec = h - a.n_q;
        const bf16 *src = is_q ? row + a.q_off + h * a.q_head_stride
                               : is_k ? row + a.k_off + (int64_t)vec * a.head_dim
                                      : row + a.v_off + (int64_t)(vec - a.n_kv) * a.head_dim;
        load_head(src, a.head_dim, x, lane);
        if (is_q ? a.q_norm != NULL : is_k && a.k_norm != NULL)
            norm_head(x, a.head_dim, norm[is_k], a.eps, lane);
        if (is_q || is_k)
            rotate_head(x, a, cs, lane);
        if (is_q) {
            store_bf16(a.q_out + ((int64_t)t * a.n_q + h) * a.head_dim, x, a.head_dim, lane);
        } else if (a.kv_dtype == ARLE_BF16) {
            store_bf16((bf16 *)entry + (int64_t)vec * a.head_dim, x, a.head_dim, lane);
        } else {
            if (a.kv_dtype != ARLE_F32)
                for (int i = lane; i < a.head_dim; i += 32)
                    x[i] = round_bf(x[i]);
            __syncwarp();
            store_quantised(entry, vec, 2 * a.n_kv, x, a.head_dim, a.kv_dtype, lane);
        }
        __syncwarp();
    }
}

/* ---- prefill of the usual shape: heads of 256, rotation of the first 64, bf16 cache ------------------------------------------------- */

const int kFewTokens = 64, kManyNew = 32;        /* new tokens of a sequence from which on a warp takes a whole token: fewer are too few warps */

/* Lane l holds elements 8 l .. 8 l + 7 of each head, half of whose rotated pairs are four lanes away. cs: of angle (8 l + e) % 32. */
__device__ __forceinline__ uint4 prepared_head(uint4 raw, const float (&w)[8], bool norm, float eps, const float2 (&cs)[8], float rope_scale,
                                               int lane)
{
    const uint32_t *p = (const uint32_t *)&raw;
    float x[8], s = 0.f;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float2 f = unpack2(p[e]);
        x[2 * e] = f.x;
        x[2 * e + 1] = f.y;
        s += f.x * f.x + f.y * f.y;
    }
    if (norm) {
        const float rho = rsqrtf(warp_sum(s) / 256.f + eps);
#pragma unroll
        for (int e = 0; e < 8; e++)
            x[e] = round_bf(x[e] * rho * w[e]);
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const float other = __shfl_xor_sync(0xffffffffu, x[e], 4);
        if (lane < 8)
            x[e] = (x[e] * cs[e].x + (lane < 4 ? -other : other) * cs[e].y) * rope_scale;
    }
    return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}

__device__ __forceinline__ void norm_weights(const float *w, float w_offset, int lane, float (&out)[8])
{
#pragma unroll
    for (int e = 0; e < 8; e++)
        out[e] = w != NULL ? w_offset + w[lane * 8 + e] : 1.f;
}

/* Cosine and sine of a position for the pairs that a lane of prepared_head holds; a lane works out one of the 32. */
__device__ __forceinline__ void rotation(const prepare_args &a, int pos, int lane, float2 (&cs)[8])
{
    float2 angle;
    sincosf((float)pos * a.inv_freq[lane], &angle.y, &angle.x);
#pragma unroll
    for (int e = 0; e < 8; e++) {
        cs[e].x = __shfl_sync(0xffffffffu, angle.x, (lane & 3) * 8 + e);
        cs[e].y = __shfl_sync(0xffffffffu, angle.y, (lane & 3) * 8 + e);
    }
}

/* One warp per token; four heads are on their way at a time. */
__global__ void __launch_bounds__(128) prepare_many_kernel(prepare_args a, int n_tokens)
{
    const int t = blockIdx.x * 4 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    pdl_launch();
    pdl_wait();
    if (t >= n_tokens)
        return;
    const int pos = a.pos[t] + a.pos_shift;
    if (pos < 0)
        return;
    float2 cs[8];
    rotation(a, pos, lane, cs);
    const int32_t *table = a.table + (int64_t)a.seq_of[t] * a.table_stride;
    char *entry = a.kv + (size_t)table[pos / a.page_tokens] * a.page_stride + a.kv_offset + (size_t)(pos % a.page_tokens) * a.entry_stride;
    const bf16 *row = a.qkv + (int64_t)t * a.ld_qkv + lane * 8;
    float w[8];
    norm_weights(a.q_norm, a.w_offset, lane, w);
    bf16 *out = a.q_out + (int64_t)t * a.n_q * 256 + lane * 8;
    for (int h0 = 0; h0 < a.n_q; h0 += 4) {
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = *(const uint4 *)(row + a.q_off + min(h0 + i, a.n_q - 1) * a.q_head_stride);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 o = prepared_head(v[i], w, a.q_norm != NULL, a.eps, cs, a.rope_scale, lane);
            if (h0 + i < a.n_q)
                *(uint4 *)(out + (h0 + i) * 256) = o;
        }
    }
    norm_weights(a.k_norm, a.w_offset, lane, w);
    bf16 *kv = (bf16 *)entry + lane * 8;
    for (int h = 0; h < a.n_kv; h++) {
        const uint4 k = *(const uint4 *)(row + a.k_off + h * 256), v = *(const uint4 *)(row + a.v_off + h * 256);
        *(uint4 *)(kv + h * 256) = prepared_head(k, w, a.k_norm != NULL, a.eps, cs, a.rope_scale, lane);
        *(uint4 *)(kv + (a.n_kv + h) * 256) = v;
    }
}

/*
 * Few tokens: one warp for each head of each token. Between two layers the weights drive a kernel's code out of the caches, and every
 * line of it would then be waited for in turn: the code runs once for nothing, on whatever is there, before the kernel before this one has
 * ended.
 */
__global__ void __launch_bounds__(32) prepare_few_kernel(prepare_args a)
{
    const int t = blockIdx.y, h = blockIdx.x, lane = threadIdx.x;
    pdl_launch();
    const int pos = a.pos[t] + a.pos_shift, at = max(pos, 0);
    const bool is_q = h < a.n_q, is_k = !is_q && h < a.n_q + a.n_kv;
    const float *norm = is_q ? a.q_norm : is_k ? a.k_norm : NULL;
    const bf16 *from = a.qkv + (int64_t)t * a.ld_qkv + lane * 8
        + (is_q ? a.q_off + h * a.q_head_stride : (is_k ? a.k_off : a.v_off) + (h - a.n_q - (is_k ? 0 : a.n_kv)) * 256);
    const int page = a.table[(int64_t)a.seq_of[t] * a.table_stride + at / a.page_tokens];
    char *entry = a.kv + (size_t)page * a.page_stride + a.kv_offset + (size_t)(at % a.page_tokens) * a.entry_stride;
    bf16 *to = is_q ? a.q_out + ((int64_t)t * a.n_q + h) * 256 : (bf16 *)entry + (h - a.n_q) * 256;
    float2 cs[8];
    rotation(a, pos, lane, cs);
    float w[8];
    norm_weights(norm, a.w_offset, lane, w);
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        if (turn == 1)
            pdl_wait();
        uint4 raw;
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "l"(from) : "memory");
        const uint4 x = is_q || is_k ? prepared_head(raw, w, norm != NULL, a.eps, cs, a.rope_scale, lane) : raw;
        if (turn == 1 && pos >= 0)
            *(uint4 *)(to + lane * 8) = x;
    }
}

bool usual_shape(const arle_attn_prepare_args *a)
{
    const int64_t pieces = a->ld_qkv | a->q_off | a->q_head_stride | a->k_off | a->v_off;
    const uintptr_t bytes = (uintptr_t)a->qkv | (uintptr_t)a->q_out | (uintptr_t)a->kv.base | a->kv.page_stride | a->kv.offset | a->kv.entry_stride;
    return a->head_dim == 256 && a->rot_dim == 64 && a->rot_off == 0 && !a->interleaved
        && a->kv.dtype == ARLE_BF16 && pieces % 8 == 0 && bytes % 16 == 0;
}

} // namespace

extern "C" int cuda_attn_prepare(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_prepare_args *a)
{
    OP_ENTER(dev, st);
    const arle_batch *b = a->batch;
    if (b->n_tokens == 0)
        return 0;
    uint32_t kd = a->kv.dtype;
    if (a->dtype != ARLE_BF16 || a->head_dim % 64 != 0 || a->head_dim > kMaxHead || a->rot_dim > a->head_dim
        || (kd != ARLE_BF16 && kd != ARLE_I8 && kd != ARLE_F8E4M3 && kd != ARLE_I4G) || (kd == ARLE_I4G && a->head_dim % 128 != 0)
        || (a->q_off | a->q_head_stride | a->k_off | a->v_off | a->ld_qkv) % 2 != 0)
        return -EINVAL;
    prepare_args p = {};
    p.n_q = (int)a->n_q;
    p.n_kv = (int)a->n_kv;
    p.head_dim = (int)a->head_dim;
    p.rot_dim = (int)a->rot_dim;
    p.rot_off = (int)a->rot_off;
    p.interleaved = (int)a->interleaved;
    p.page_tokens = (int)b->page_tokens;
    p.table_stride = (int)b->table_stride;
    p.pos_shift = a->pos_shift;
    p.eps = a->eps;
    p.w_offset = a->w_offset;
    p.rope_scale = a->rope_scale;
    p.pos = b->pos;
    p.seq_of = b->seq_of;
    p.table = b->block_table;
    p.qkv = (const bf16 *)a->qkv;
    p.ld_qkv = a->ld_qkv;
    p.q_off = a->q_off;
    p.q_head_stride = a->q_head_stride;
    p.k_off = a->k_off;
    p.v_off = a->v_off;
    p.q_norm = a->q_norm;
    p.k_norm = a->k_norm;
    p.inv_freq = a->inv_freq;
    p.kv = (char *)a->kv.base;
    p.page_stride = a->kv.page_stride;
    p.kv_offset = a->kv.offset;
    p.entry_stride = a->kv.entry_stride;
    p.kv_dtype = kd;
    p.q_out = (bf16 *)a->q_out;
    const bool usual = !dev->deterministic && usual_shape(a);      /* its sums run in another order */
    if (usual && b->n_tokens <= (uint32_t)kFewTokens)
        return launch(dev, cs(st), prepare_few_kernel, dim3(p.n_q + 2 * p.n_kv, b->n_tokens), dim3(32), 0, p);
    if (usual && b->max_new >= (uint32_t)kManyNew)
        return launch(dev, cs(st), prepare_many_kernel, dim3((unsigned)ceil_div(b->n_tokens, 4)), dim3(128), 0, p, (int)b->n_tokens);
    const int parts = b->n_tokens <= (uint32_t)dev->n_sm ? (int)ceil_div(p.n_q + 2 * p.n_kv, kWarps) : 1;
    return launch(dev, cs(st), prepare_kernel, dim3(b->n_tokens, parts), dim3(kWarps * 32), 0, p);
}
