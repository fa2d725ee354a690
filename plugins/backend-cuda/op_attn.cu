/*
 * attn_paged for heads of 256. The query heads that share a key head are packed into the rows of one matrix product, so that
 * each key and value is read once. Decode rows: the context is split over blocks (split-KV) and a second kernel joins the
 * pieces. Other rows: a block takes 128 (token, head) rows and walks the context in tiles of 64 with a running softmax.
 *
 * Running softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; tiling: Dao 2023, arXiv:2307.08691.
 */
#include "wgmma.cuh"
#include <errno.h>

namespace {

const int kHead = 256, kRow = kHead * 2;        /* bytes of one key in shared memory, bf16 */
const int kWorkRow = kHead + 4;                 /* floats of one head of a split: values, maximum, sum; 16-byte aligned */

struct attn_args {
    const bf16 *q;
    const char *kv; size_t page_stride, kv_offset, entry_stride;
    const bf16 *gate; int64_t ld_gate, gate_off, gate_head_stride;
    bf16 *out; int64_t ld_out;
    const int32_t *pos, *cu, *table;
    int n_q, n_kv, group, window, first, pos_shift, page_tokens, page_shift, table_stride, seq0;
    float scale_log2;               /* scale * log2(e): the softmax runs in powers of two */
    int n_splits, split_blocks;     /* decode; split_blocks 0: share the context evenly */
    float *work;
    uint32_t kv_dtype;              /* of quantised entries */
};

__device__ __forceinline__ uint32_t swizzled(int row, int chunk) { return row * kRow + ((chunk ^ (row & 7)) << 4); }

__device__ __forceinline__ const char *entry_of(const attn_args &a, const int32_t *table, int p)
{
    int page, at;
    if (a.page_shift >= 0) {
        page = p >> a.page_shift;
        at = p & (a.page_tokens - 1);
    } else {
        page = p / a.page_tokens;
        at = p - page * a.page_tokens;
    }
    return a.kv + (size_t)table[page] * a.page_stride + a.kv_offset + (size_t)at * a.entry_stride;
}

/* ---- quantised entries: sixteen values of one vector as bf16 --------------------------------------------------------- */

__device__ __forceinline__ void expand16(const char *entry, int vec, int n_vec, int chunk16, uint32_t dtype, uint32_t *out)
{
    /* Entries are 520 bytes per key head: aligned to eight. */
    uint2 raw[2] = { *(const uint2 *)(entry + (size_t)vec * kHead + chunk16 * 16),
                     *(const uint2 *)(entry + (size_t)vec * kHead + chunk16 * 16 + 8) };
    float s = ((const float *)(entry + (size_t)n_vec * kHead))[vec];
    const uint8_t *c = (const uint8_t *)&raw;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float lo, hi;
        if (dtype == ARLE_I8) {
            lo = (float)(int8_t)c[2 * i];
            hi = (float)(int8_t)c[2 * i + 1];
        } else {
            __nv_fp8_e4m3 x, y;
            x.__x = c[2 * i];
            y.__x = c[2 * i + 1];
            lo = (float)x;
            hi = (float)y;
        }
        out[i] = pack2(lo * s, hi * s);
    }
}

/* One key or value vector of 256, half a warp: lane l16 takes values 16 l16 .. 16 l16 + 15. I4G needs its rotation undone, which
 * is its own inverse: values are spread over the half warp, so the butterflies go through shuffles. */
__device__ __forceinline__ void expand_i4(const char *entry, int vec, int n_vec, int l16, float *v)
{
    uint2 raw = *(const uint2 *)(entry + (size_t)vec * (kHead / 2) + l16 * 8);
    float s = __half2float(((const __half *)(entry + (size_t)n_vec * (kHead / 2)))[vec * (kHead / 32) + l16 / 2]);
    const uint8_t *c = (const uint8_t *)&raw;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[2 * i] = (float)((int)(c[i] & 15) - 8) * s;
        v[2 * i + 1] = (float)((int)(c[i] >> 4) - 8) * s;
    }
#pragma unroll
    for (int len = 1; len < 16; len <<= 1)
#pragma unroll
        for (int i = 0; i < 16; i++)
            if ((i & len) == 0) {
                float x = v[i], y = v[i + len];
                v[i] = x + y;
                v[i + len] = x - y;
            }
#pragma unroll
    for (int d = 1; d < 8; d <<= 1)
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float o = __shfl_xor_sync(0xffffffffu, v[i], d);
            v[i] = (l16 & d) ? o - v[i] : v[i] + o;
        }
#pragma unroll
    for (int i = 0; i < 16; i++)
        v[i] *= 0.08838834764831845f;
}

/* Brings `rows` keys and values from position p0 on into shared memory as bf16 (K at dst, V at dst + rows * kRow), with n_lanes
 * threads. Positions from `end` on become zeros: their scores are masked, but 0 * garbage would still be NaN. */
template <bool QUANT, int ROWS>
__device__ __forceinline__ void load_kv(const attn_args &a, const int32_t *table, int head, int p0, int end, unsigned char *dst,
                                        int lane, int n_lanes)
{
    if (!QUANT) {
        uint32_t to = smem_u32(dst);
#pragma unroll 4
        for (int i = lane; i < ROWS * 32; i += n_lanes) {
            int r = i >> 5, c = i & 31, p = p0 + r;
            bool ok = p < end;
            const char *e = ok ? entry_of(a, table, p) + (size_t)head * kRow + c * 16 : a.kv;
            cp16(to + swizzled(r, c), e, ok);
            cp16(to + ROWS * kRow + swizzled(r, c), ok ? e + (size_t)a.n_kv * kRow : a.kv, ok);
        }
    } else for (int i = lane; i < ROWS * 32; i += n_lanes) {
        int r = i >> 5, half = (i >> 4) & 1, l16 = i & 15, p = p0 + r;     /* half 0: key, 1: value */
        uint32_t v[8];
        if (p < end) {
            const char *e = entry_of(a, table, p);
            int vec = head + half * a.n_kv;
            if (a.kv_dtype == ARLE_I4G) {
                float f[16];
                expand_i4(e, vec, 2 * a.n_kv, l16, f);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    v[j] = pack2(f[2 * j], f[2 * j + 1]);
            } else {
                expand16(e, vec, 2 * a.n_kv, l16, a.kv_dtype, v);
            }
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                v[j] = 0;
        }
        unsigned char *to = dst + half * ROWS * kRow;
        *(uint4 *)(to + swizzled(r, l16 * 2)) = make_uint4(v[0], v[1], v[2], v[3]);
        *(uint4 *)(to + swizzled(r, l16 * 2 + 1)) = make_uint4(v[4], v[5], v[6], v[7]);
    }
}

/* ---- decode ---------------------------------------------------------------------------------------------------------- */

/* As load_kv for one warp and sixteen bf16 keys: lane r finds entry r, the others get its address by shuffle. */
__device__ __forceinline__ void load_kv16(const attn_args &a, const int32_t *table, int head, int p0, int end, uint32_t dst, int lane)
{
    const int mine = min(p0 + (lane & 15), end - 1);
    const unsigned long long at = (unsigned long long)(entry_of(a, table, mine) + (size_t)head * kRow);
    const size_t value = (size_t)a.n_kv * kRow;
#pragma unroll
    for (int r = 0; r < 16; r++) {
        const char *e = (const char *)__shfl_sync(0xffffffffu, at, r) + lane * 16;
        const bool ok = p0 + r < end;
        const uint32_t to = dst + swizzled(r, lane);
        cp16(to, e, ok);
        cp16(to + 16 * kRow, e + value, ok);
    }
}

const int kDecWarps = 2, kDecStages = 3, kDecTok = 16;
const int kDecStage = kDecTok * kRow * 2;
const int kDecSmem = 16 * kRow + kDecWarps * kDecStages * kDecStage;

/* The part of the context that split `z` of a row covers, in blocks of 16 positions from lo on. */
struct span { int lo, end, b0, b1, valid; };

__device__ __forceinline__ span span_of(const attn_args &a, int p, int z)
{
    span s;
    s.end = p + 1;
    s.lo = a.window > 0 && p - a.window + 1 > a.first ? p - a.window + 1 : a.first;
    int nb = s.end > s.lo ? (s.end - s.lo + kDecTok - 1) / kDecTok : 0;
    int per = a.split_blocks > 0 ? a.split_blocks : max((nb + a.n_splits - 1) / a.n_splits, 4);
    s.b0 = z * per;
    s.b1 = min(s.b0 + per, nb);
    s.valid = max((nb + per - 1) / per, 1);
    return s;
}

__device__ __forceinline__ float *work_of(const attn_args &a, int s, int kvh, int z)
{
    return a.work + (((int64_t)s * a.n_kv + kvh) * a.n_splits + z) * a.group * kWorkRow;
}

__device__ __forceinline__ void store_gated(const attn_args &a, int t, int h, int d, float4 o)
{
    if (a.gate != NULL) {
        uint2 g = *(const uint2 *)(a.gate + (int64_t)t * a.ld_gate + a.gate_off + h * a.gate_head_stride + d);
        float2 x = unpack2(g.x), y = unpack2(g.y);
        o.x *= sigmoidf(x.x);
        o.y *= sigmoidf(x.y);
        o.z *= sigmoidf(y.x);
        o.w *= sigmoidf(y.y);
    }
    *(uint2 *)(a.out + (int64_t)t * a.ld_out + (int64_t)h * kHead + d) = make_uint2(pack2(o.x, o.y), pack2(o.z, o.w));
}

/* Block (z, key head, sequence). Each warp walks its own 16-position blocks with its own copy pipeline; no block-wide barrier
 * until the warps' results are joined. */
template <bool QUANT>
__global__ void __launch_bounds__(kDecWarps * 32) decode_kernel(const attn_args a)
{
    extern __shared__ __align__(128) unsigned char attn_smem[];
    __shared__ float sh_m[kDecWarps][16], sh_l[kDecWarps][16];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int z = blockIdx.x, kvh = blockIdx.y, s = blockIdx.z;
    pdl_launch();
    const int t = a.cu[a.seq0 + s], p = a.pos[t] + a.pos_shift;
    const span sp = span_of(a, p, z);
    const int32_t *table = a.table + (int64_t)(a.seq0 + s) * a.table_stride;
    unsigned char *ring = attn_smem + 16 * kRow + warp * kDecStages * kDecStage;
    const int n = z < sp.valid ? max((sp.b1 - sp.b0 - warp + kDecWarps - 1) / kDecWarps, 0) : 0;
    auto fill = [&](int i) {
        const int p0 = sp.lo + (sp.b0 + warp + i * kDecWarps) * kDecTok;
        unsigned char *to = ring + i % kDecStages * kDecStage;
        if (QUANT)
            load_kv<true, kDecTok>(a, table, kvh, p0, sp.end, to, lane, 32);
        else
            load_kv16(a, table, kvh, p0, sp.end, smem_u32(to), lane);
    };
    /* The step's own key is written by the kernel before this one, so nothing is read yet; but it may come as far as the L2. */
    for (int i = 0; i < 2 && i < n; i++) {
        const int mine = min(sp.lo + (sp.b0 + warp + i * kDecWarps) * kDecTok + (lane & 15), sp.end - 1);
        const char *e = entry_of(a, table, mine) + (size_t)(kvh + (lane >> 4) * a.n_kv) * (QUANT ? kHead : kRow);
        l2_prefetch(e);
        l2_prefetch(e + 128);
        l2_prefetch(e + (QUANT ? 0 : 256));
        l2_prefetch(e + (QUANT ? 0 : 384));
    }
    pdl_wait();
    if (z >= sp.valid)
        return;

    /* Rows past the group are zeros. */
    for (int i = threadIdx.x; i < 16 * 32; i += kDecWarps * 32) {
        int r = i >> 5, c = i & 31;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (r < a.group)
            v = *(const uint4 *)(a.q + ((int64_t)t * a.n_q + kvh * a.group + r) * kHead + c * 8);
        *(uint4 *)(attn_smem + swizzled(r, c)) = v;
    }
#pragma unroll
    for (int i = 0; i < kDecStages - 1; i++) {
        if (i < n)
            fill(i);
        cp_commit();
    }
    __syncthreads();

    float o[32][4], m0 = -INFINITY, m1 = -INFINITY, l0 = 0.f, l1 = 0.f;
#pragma unroll
    for (int d = 0; d < 32; d++)
        o[d][0] = o[d][1] = o[d][2] = o[d][3] = 0.f;
    const uint32_t qs = smem_u32(attn_smem);
    for (int i = 0; i < n; i++) {
        __syncwarp();
        if (i + kDecStages - 1 < n)
            fill(i + kDecStages - 1);
        cp_commit();
        cp_wait<kDecStages - 1>();
        __syncwarp();
        const uint32_t ks = smem_u32(ring + i % kDecStages * kDecStage), vs = ks + kDecTok * kRow;
        float sc[2][4] = {};
#pragma unroll
        for (int kk = 0; kk < 16; kk++) {
            uint32_t af[4], b[4];
            ldsm4(af, qs + swizzled(lane & 15, kk * 2 + (lane >> 4)));
            ldsm4(b, ks + swizzled((lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
            mma16816(sc[0], af, b[0], b[1]);
            mma16816(sc[1], af, b[2], b[3]);
        }
        int p0 = sp.lo + (sp.b0 + warp + i * kDecWarps) * kDecTok + (lane & 3) * 2;
        float x0 = -INFINITY, x1 = -INFINITY;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                bool ok = p0 + j * 8 + e < sp.end;
                sc[j][e] = ok ? sc[j][e] * a.scale_log2 : -INFINITY;
                sc[j][2 + e] = ok ? sc[j][2 + e] * a.scale_log2 : -INFINITY;
                x0 = fmaxf(x0, sc[j][e]);
                x1 = fmaxf(x1, sc[j][2 + e]);
            }
        x0 = fmaxf(x0, __shfl_xor_sync(0xffffffffu, x0, 1));
        x0 = fmaxf(x0, __shfl_xor_sync(0xffffffffu, x0, 2));
        x1 = fmaxf(x1, __shfl_xor_sync(0xffffffffu, x1, 1));
        x1 = fmaxf(x1, __shfl_xor_sync(0xffffffffu, x1, 2));
        x0 = fmaxf(x0, m0);
        x1 = fmaxf(x1, m1);
        /* A block always has its first position within the context, so x0 and x1 are finite here. */
        float f0 = exp2f(m0 - x0), f1 = exp2f(m1 - x1);
        if (__any_sync(0xffffffffu, x0 != m0 || x1 != m1)) {
#pragma unroll
            for (int d = 0; d < 32; d++) {
                o[d][0] *= f0;
                o[d][1] *= f0;
                o[d][2] *= f1;
                o[d][3] *= f1;
            }
            l0 *= f0;
            l1 *= f1;
            m0 = x0;
            m1 = x1;
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                sc[j][e] = exp2f(sc[j][e] - m0);
                sc[j][2 + e] = exp2f(sc[j][2 + e] - m1);
                l0 += sc[j][e];
                l1 += sc[j][2 + e];
            }
        uint32_t pf[4] = { pack2(sc[0][0], sc[0][1]), pack2(sc[0][2], sc[0][3]), pack2(sc[1][0], sc[1][1]), pack2(sc[1][2], sc[1][3]) };
#pragma unroll
        for (int d = 0; d < 16; d++) {
            uint32_t b[4];
            ldsm4t(b, vs + swizzled((lane & 7) + ((lane >> 3) & 1) * 8, d * 2 + (lane >> 4)));
            mma16816(o[2 * d], pf, b[0], b[1]);
            mma16816(o[2 * d + 1], pf, b[2], b[3]);
        }
    }
    cp_wait<0>();
    l0 += __shfl_xor_sync(0xffffffffu, l0, 1);
    l0 += __shfl_xor_sync(0xffffffffu, l0, 2);
    l1 += __shfl_xor_sync(0xffffffffu, l1, 1);
    l1 += __shfl_xor_sync(0xffffffffu, l1, 2);

    /* Join the warps through shared memory; each writes over its own ring. */
    __syncwarp();
    float *mine = (float *)ring;
    const int g = lane >> 2, c = (lane & 3) * 2;
#pragma unroll
    for (int d = 0; d < 32; d++) {
        *(float2 *)(mine + g * kHead + d * 8 + c) = make_float2(o[d][0], o[d][1]);
        *(float2 *)(mine + (g + 8) * kHead + d * 8 + c) = make_float2(o[d][2], o[d][3]);
    }
    if ((lane & 3) == 0) {
        sh_m[warp][g] = m0;
        sh_m[warp][g + 8] = m1;
        sh_l[warp][g] = l0;
        sh_l[warp][g + 8] = l1;
    }
    __syncthreads();
    float *work = work_of(a, s, kvh, z);
    const int d = threadIdx.x * 4;
    for (int r = 0; r < a.group; r++) {
        float m = -INFINITY, l = 0.f;
#pragma unroll
        for (int w = 0; w < kDecWarps; w++)
            m = fmaxf(m, sh_m[w][r]);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < kDecWarps; w++) {
            float f = sh_m[w][r] == -INFINITY ? 0.f : exp2f(sh_m[w][r] - m);
            float4 v = *(const float4 *)(attn_smem + 16 * kRow + w * kDecStages * kDecStage + (r * kHead + d) * 4);
            sum.x += f * v.x;
            sum.y += f * v.y;
            sum.z += f * v.z;
            sum.w += f * v.w;
            l += f * sh_l[w][r];
        }
        if (sp.valid == 1) {
            float inv = l > 0.f ? 1.f / l : 0.f;
            store_gated(a, t, kvh * a.group + r, d, make_float4(sum.x * inv, sum.y * inv, sum.z * inv, sum.w * inv));
        } else {
            *(float4 *)(work + r * kHead + d) = sum;
            if (threadIdx.x == 0) {
                work[a.group * kHead + 2 * r] = m;
                work[a.group * kHead + 2 * r + 1] = l;
            }
        }
    }
}

/* Joins the splits of one (sequence, query head). Quarter q of the block takes splits q, q + 4, ...: always the same order. */
__global__ void __launch_bounds__(256) combine_kernel(const attn_args a)
{
    __shared__ float4 part[4][64];
    __shared__ float part_l[4];
    const int h = blockIdx.x, s = blockIdx.y, kvh = h / a.group, r = h % a.group, quarter = threadIdx.x >> 6;
    pdl_launch();
    const int t = a.cu[a.seq0 + s];
    const span sp = span_of(a, a.pos[t] + a.pos_shift, 0);
    pdl_wait();
    if (sp.valid == 1)
        return;
    float m = -INFINITY;
    for (int z = threadIdx.x & 31; z < sp.valid; z += 32)
        m = fmaxf(m, work_of(a, s, kvh, z)[a.group * kHead + 2 * r]);
    m = warp_max(m);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    float l = 0.f;
    const int d = (threadIdx.x & 63) * 4;
#pragma unroll 8
    for (int z = quarter; z < sp.valid; z += 4) {
        const float *w = work_of(a, s, kvh, z);
        float f = exp2f(w[a.group * kHead + 2 * r] - m);
        float4 v = *(const float4 *)(w + r * kHead + d);
        sum.x += f * v.x;
        sum.y += f * v.y;
        sum.z += f * v.z;
        sum.w += f * v.w;
        l += f * w[a.group * kHead + 2 * r + 1];
    }
    part[quarter][threadIdx.x & 63] = sum;
    if ((threadIdx.x & 63) == 0)
        part_l[quarter] = l;
    __syncthreads();
    if (quarter > 0)
        return;
    l = part_l[0] + part_l[1] + part_l[2] + part_l[3];
#pragma unroll
    for (int q = 1; q < 4; q++) {
        float4 v = part[q][threadIdx.x];
        sum.x += v.x;
        sum.y += v.y;
        sum.z += v.z;
        sum.w += v.w;
    }
    float inv = 1.f / l;
    store_gated(a, t, h, d, make_float4(sum.x * inv, sum.y * inv, sum.z * inv, sum.w * inv));
}

/* ---- prefill --------------------------------------------------------------------------------------------------------- */

const int kPreRows = 128, kPreTok = 64, kPreStage = kPreTok * kRow * 2;
const int kPreSmem = kPreRows * kRow + 2 * kPreStage + 1024;       /* operands of warpgroup products are aligned to 1024 */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Brings 64 keys (half 0) or values (half 1) from position p0 on into shared memory as panels, with 256 threads; positions from
 * `end` on become zeros. */
template <bool QUANT>
__device__ __forceinline__ void load_panels(const attn_args &a, const int32_t *table, int head, int half, int p0, int end, unsigned char *dst)
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (!QUANT) {
        /* Warp w brings rows 8 w .. 8 w + 7; lane r finds row r, the others get its address by shuffle. */
        const int mine = min(p0 + warp * 8 + (lane & 7), end - 1);
        const unsigned long long at = (unsigned long long)(entry_of(a, table, mine) + (size_t)(head + half * a.n_kv) * kRow);
        const uint32_t to = smem_u32(dst);
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const char *e = (const char *)__shfl_sync(0xffffffffu, at, r) + lane * 16;
            cp16(to + panel_at<kPreTok>(warp * 8 + r, lane), e, p0 + warp * 8 + r < end);
        }
    } else for (int i = threadIdx.x; i < kPreTok * 16; i += 256) {
        int r = i >> 4, l16 = i & 15, p = p0 + r, vec = head + half * a.n_kv;
        uint32_t v[8] = {};
        /* Both halves of the warp take part in shuffles; past the end they read the last entry and write zeros. */
        const char *e = entry_of(a, table, min(p, end - 1));
        if (a.kv_dtype == ARLE_I4G) {
            float f[16];
            expand_i4(e, vec, 2 * a.n_kv, l16, f);
#pragma unroll
            for (int j = 0; j < 8; j++)
                v[j] = pack2(f[2 * j], f[2 * j + 1]);
        } else {
            expand16(e, vec, 2 * a.n_kv, l16, a.kv_dtype, v);
        }
        if (p >= end)
#pragma unroll
            for (int j = 0; j < 8; j++)
                v[j] = 0;
        *(uint4 *)(dst + panel_at<kPreTok>(r, l16 * 2)) = make_uint4(v[0], v[1], v[2], v[3]);
        *(uint4 *)(dst + panel_at<kPreTok>(r, l16 * 2 + 1)) = make_uint4(v[4], v[5], v[6], v[7]);
    }
}

/* Scores of a tile to weights: scaled, masked, exponentials in place; m and l move on, f is what older sums shrink by. */
__device__ __forceinline__ void soften(const attn_args &a, float (&sc)[32], int p0, bool edge, const int *row_pos, float *m, float *l, float *f)
{
    const int lane = threadIdx.x & 31;
    float x[2] = { m[0], m[1] };
    if (edge) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
            int p = p0 + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1), q = row_pos[(i >> 1) & 1];
            if (p > q || p < a.first || (a.window > 0 && p <= q - a.window))
                sc[i] = -INFINITY;
        }
    }
#pragma unroll
    for (int i = 0; i < 32; i++)
        x[(i >> 1) & 1] = fmaxf(x[(i >> 1) & 1], sc[i]);
    float b[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        x[h] = fmaxf(x[h], __shfl_xor_sync(0xffffffffu, x[h], 1));
        x[h] = fmaxf(x[h], __shfl_xor_sync(0xffffffffu, x[h], 2));
        b[h] = x[h] == -INFINITY ? 0.f : x[h] * a.scale_log2;
        f[h] = exp2f(m[h] * a.scale_log2 - b[h]);
        m[h] = x[h];
        l[h] *= f[h];
    }
#pragma unroll
    for (int i = 0; i < 32; i++) {
        sc[i] = exp2f(fmaf(sc[i], a.scale_log2, -b[(i >> 1) & 1]));
        l[(i >> 1) & 1] += sc[i];
    }
}

__device__ __forceinline__ void scores(float (&sc)[32], uint32_t q_s, uint32_t k_s)
{
#pragma unroll
    for (int kk = 0; kk < 16; kk++)
        wgmma_64x64(sc, wgmma_desc(q_s + (kk >> 2) * (kPreRows * 128) + (kk & 3) * 32, 16),
                    wgmma_desc(k_s + (kk >> 2) * (kPreTok * 128) + (kk & 3) * 32, 16), kk > 0);
}

__device__ __forceinline__ void weigh(float (&o)[128], const uint32_t *pf, uint32_t v_s)
{
#pragma unroll
    for (int k = 0; k < 4; k++)
        wgmma_64x256(o, pf + 4 * k, wgmma_desc(v_s + k * 16 * 128, kPreTok * 128));
}

__device__ __forceinline__ void pack_weights(uint32_t *pf, const float (&sc)[32])
{
#pragma unroll
    for (int k = 0; k < 4; k++) {
        pf[4 * k] = pack2(sc[8 * k], sc[8 * k + 1]);
        pf[4 * k + 1] = pack2(sc[8 * k + 2], sc[8 * k + 3]);
        pf[4 * k + 2] = pack2(sc[8 * k + 4], sc[8 * k + 5]);
        pf[4 * k + 3] = pack2(sc[8 * k + 6], sc[8 * k + 7]);
    }
}

/*
 * Sums of one tile of queries over positions lo .. end - 1; a warpgroup has 64 rows. Scores of tile i run together with the values
 * of tile i - 1, which go on while the weights of tile i are made. So K of the next tile and V of the present one arrive together.
 */
template <bool QUANT>
__device__ __forceinline__ void walk_context(const attn_args &a, const int32_t *table, int kvh, int lo, int end, const int *row_pos,
                                             unsigned char *smem, float (&o)[128], float *m, float *l)
{
    const int wg = threadIdx.x >> 7, n = (end - lo + kPreTok - 1) / kPreTok;
    unsigned char *kv = smem + kPreRows * kRow;
    const uint32_t q_s = smem_u32(smem) + wg * 64 * 128, kv_s = smem_u32(kv);
    const int half = kPreTok * kRow;            /* ring: K of even tiles, V, K of odd tiles, V */
    /* Rows of the warp in order of position: its first and last decide whether any pair is masked. */
    const int first = __shfl_sync(0xffffffffu, row_pos[0], 0), last = __shfl_sync(0xffffffffu, row_pos[1], 31);
    auto is_edge = [&](int p0) { return p0 + kPreTok - 1 > first || (a.window > 0 && p0 <= last - a.window) || p0 < a.first; };
    float sc[32], f[2];
    uint32_t pf[16];

    load_panels<QUANT>(a, table, kvh, 0, lo, end, kv);
    cp_commit();
    cp_wait<0>();
    wgmma_publish();
    __syncthreads();
    load_panels<QUANT>(a, table, kvh, 0, lo + kPreTok, end, kv + kPreStage);
    load_panels<QUANT>(a, table, kvh, 1, lo, end, kv + half);
    cp_commit();
    wgmma_fence();
    scores(sc, q_s, kv_s);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(sc);
    soften(a, sc, lo, is_edge(lo), row_pos, m, l, f);
    pack_weights(pf, sc);
    for (int i = 1; i < n; i++) {
        const int p0 = lo + i * kPreTok, here = (i & 1) * kPreStage, there = kPreStage - here;
        cp_wait<0>();
        wgmma_publish();
        __syncthreads();
        wgmma_fence();
        scores(sc, q_s, kv_s + here);
        wgmma_commit();
        weigh(o, pf, kv_s + there + half);
        wgmma_commit();
        load_panels<QUANT>(a, table, kvh, 0, p0 + kPreTok, end, kv + there);
        load_panels<QUANT>(a, table, kvh, 1, p0, end, kv + here + half);
        cp_commit();
        wgmma_wait<1>();
        wgmma_hold(sc);
        soften(a, sc, p0, is_edge(p0), row_pos, m, l, f);
        wgmma_wait<0>();
        wgmma_hold(o);
        if (__any_sync(0xffffffffu, f[0] != 1.f || f[1] != 1.f)) {
#pragma unroll
            for (int d = 0; d < 128; d++)
                o[d] *= f[(d >> 1) & 1];
        }
        pack_weights(pf, sc);
    }
    cp_wait<0>();
    wgmma_publish();
    __syncthreads();
    wgmma_fence();
    weigh(o, pf, kv_s + ((n - 1) & 1) * kPreStage + half);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(o);
}

__device__ __forceinline__ uint32_t query_at(int row, int chunk) { return panel_at<kPreRows>(row, chunk); }

#else
__device__ __forceinline__ uint32_t query_at(int row, int chunk) { return swizzled(row, chunk); }

/* Sums of one tile of queries over positions lo .. end - 1; a warp has 16 rows. */
template <bool QUANT>
__device__ __forceinline__ void walk_context(const attn_args &a, const int32_t *table, int kvh, int lo, int end, const int *row_pos,
                                             unsigned char *smem, float (&o)[128], float *m, float *l)
{
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n = (end - lo + kPreTok - 1) / kPreTok;
    const int warp_first = __shfl_sync(0xffffffffu, row_pos[0], 0), warp_last = __shfl_sync(0xffffffffu, row_pos[1], 31);
    unsigned char *ring = smem + kPreRows * kRow;
    const uint32_t qs = smem_u32(smem);
    load_kv<QUANT, kPreTok>(a, table, kvh, lo, end, ring, threadIdx.x, 256);
    cp_commit();
    for (int i = 0; i < n; i++) {
        cp_wait<0>();
        __syncthreads();
        if (i + 1 < n)
            load_kv<QUANT, kPreTok>(a, table, kvh, lo + (i + 1) * kPreTok, end, ring + ((i + 1) & 1) * kPreStage, threadIdx.x, 256);
        cp_commit();
        const int p0 = lo + i * kPreTok;
        if (p0 > warp_last)
            continue;           /* all of the tile lies in this warp's future */
        const uint32_t ks = smem_u32(ring + (i & 1) * kPreStage), vs = ks + kPreTok * kRow;
        float sc[8][4];
#pragma unroll
        for (int j = 0; j < 8; j++)
            sc[j][0] = sc[j][1] = sc[j][2] = sc[j][3] = 0.f;
#pragma unroll
        for (int kk = 0; kk < 16; kk++) {
            uint32_t af[4];
            ldsm4(af, qs + swizzled(warp * 16 + (lane & 15), kk * 2 + (lane >> 4)));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t b[4];
                ldsm4(b, ks + swizzled(j * 16 + (lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
                mma16816(sc[2 * j], af, b[0], b[1]);
                mma16816(sc[2 * j + 1], af, b[2], b[3]);
            }
        }
        const bool edge = p0 + kPreTok - 1 > warp_first || (a.window > 0 && p0 <= warp_last - a.window) || p0 < a.first;
        float x[2] = { m[0], m[1] };
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float v = sc[j][e] * a.scale_log2;
                if (edge) {
                    int p = p0 + j * 8 + (lane & 3) * 2 + (e & 1), q = row_pos[e >> 1];
                    if (p > q || p < a.first || (a.window > 0 && p <= q - a.window))
                        v = -INFINITY;
                }
                sc[j][e] = v;
                x[e >> 1] = fmaxf(x[e >> 1], v);
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            x[h] = fmaxf(x[h], __shfl_xor_sync(0xffffffffu, x[h], 1));
            x[h] = fmaxf(x[h], __shfl_xor_sync(0xffffffffu, x[h], 2));
        }
        const float b0 = x[0] == -INFINITY ? 0.f : x[0], b1 = x[1] == -INFINITY ? 0.f : x[1];
        if (__any_sync(0xffffffffu, x[0] != m[0] || x[1] != m[1])) {
            float f0 = exp2f(m[0] - b0), f1 = exp2f(m[1] - b1);
#pragma unroll
            for (int d = 0; d < 32; d++) {
                o[4 * d] *= f0;
                o[4 * d + 1] *= f0;
                o[4 * d + 2] *= f1;
                o[4 * d + 3] *= f1;
            }
            l[0] *= f0;
            l[1] *= f1;
            m[0] = x[0];
            m[1] = x[1];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sc[j][0] = exp2f(sc[j][0] - b0);
            sc[j][1] = exp2f(sc[j][1] - b0);
            sc[j][2] = exp2f(sc[j][2] - b1);
            sc[j][3] = exp2f(sc[j][3] - b1);
            l[0] += sc[j][0] + sc[j][1];
            l[1] += sc[j][2] + sc[j][3];
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t pf[4] = { pack2(sc[2 * k][0], sc[2 * k][1]), pack2(sc[2 * k][2], sc[2 * k][3]),
                               pack2(sc[2 * k + 1][0], sc[2 * k + 1][1]), pack2(sc[2 * k + 1][2], sc[2 * k + 1][3]) };
#pragma unroll
            for (int d = 0; d < 16; d++) {
                uint32_t b[4];
                ldsm4t(b, vs + swizzled(k * 16 + (lane & 7) + ((lane >> 3) & 1) * 8, d * 2 + (lane >> 4)));
                mma16816(o + 8 * d, pf, b[0], b[1]);
                mma16816(o + 8 * d + 4, pf, b[2], b[3]);
            }
        }
    }
    cp_wait<0>();
}
#endif

/* Block (query tile from the last, key head, sequence); warp w has rows 16 w .. 16 w + 15. Row r: token r / group, head r % group. */
template <bool QUANT>
__global__ void __launch_bounds__(256, 1) prefill_kernel(const attn_args a)
{
    extern __shared__ __align__(128) unsigned char attn_smem[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int kvh = blockIdx.y, s = a.seq0 + blockIdx.z, tile = gridDim.x - 1 - blockIdx.x;
    const int per_tile = kPreRows / a.group;
    pdl_launch();
    pdl_wait();
    const int t_first = a.cu[s], t_end = a.cu[s + 1], t0 = t_first + tile * per_tile;
    if (t0 >= t_end)
        return;
    const int n_tok = min(per_tile, t_end - t0);
    const int pos0 = a.pos[t0] + a.pos_shift, end = pos0 + n_tok;      /* positions of a sequence's tokens are consecutive */
    const int lo = a.window > 0 && pos0 - a.window + 1 > a.first ? pos0 - a.window + 1 : a.first;
    const int32_t *table = a.table + (int64_t)s * a.table_stride;
    unsigned char *smem = attn_smem + (-smem_u32(attn_smem) & 1023);

    for (int i = threadIdx.x; i < kPreRows * 32; i += 256) {
        int r = i >> 5, c = i & 31, tok = r / a.group;
        bool ok = tok < n_tok;
        const bf16 *src = a.q + ((int64_t)(t0 + (ok ? tok : 0)) * a.n_q + kvh * a.group + (ok ? r % a.group : 0)) * kHead + c * 8;
        cp16(smem_u32(smem) + query_at(r, c), src, ok);
    }
    float o[128], m[2] = { -INFINITY, -INFINITY }, l[2] = { 0.f, 0.f };
#pragma unroll
    for (int d = 0; d < 128; d++)
        o[d] = 0.f;
    const int r0 = warp * 16 + (lane >> 2);
    const int row_pos[2] = { pos0 + r0 / a.group, pos0 + (r0 + 8) / a.group };
    if (end > lo)
        walk_context<QUANT>(a, table, kvh, lo, end, row_pos, smem, o, m, l);
    cp_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        l[h] += __shfl_xor_sync(0xffffffffu, l[h], 1);
        l[h] += __shfl_xor_sync(0xffffffffu, l[h], 2);
        int r = r0 + h * 8, tok = r / a.group;
        if (tok >= n_tok || r >= per_tile * a.group)
            continue;
        float inv = l[h] > 0.f ? 1.f / l[h] : 0.f;
        int t = t0 + tok, head = kvh * a.group + r % a.group;
        bf16 *out = a.out + (int64_t)t * a.ld_out + (int64_t)head * kHead + (lane & 3) * 2;
        const bf16 *gate = a.gate != NULL ? a.gate + (int64_t)t * a.ld_gate + a.gate_off + head * a.gate_head_stride + (lane & 3) * 2 : NULL;
#pragma unroll
        for (int d = 0; d < 32; d++) {
            float u = o[4 * d + 2 * h] * inv, v = o[4 * d + 2 * h + 1] * inv;
            if (gate != NULL) {
                float2 g = unpack2(*(const uint32_t *)(gate + d * 8));
                u *= sigmoidf(g.x);
                v *= sigmoidf(g.y);
            }
            *(uint32_t *)(out + d * 8) = pack2(u, v);
        }
    }
}

/* ---- launch ---------------------------------------------------------------------------------------------------------- */

template <bool QUANT>
int run_decode(arle_device *dev, cudaStream_t st, attn_args a, int n_rows, int max_ctx)
{
    /* Two blocks per multiprocessor fill the machine; in deterministic mode the cut depends on the position alone. */
    const int det_blocks = 64;
    if (dev->deterministic) {
        a.split_blocks = det_blocks;
        a.n_splits = (int)ceil_div(max_ctx, det_blocks * kDecTok);
    } else {
        a.n_splits = (int)ceil_div(2 * dev->n_sm, (int64_t)n_rows * a.n_kv);
        int most = (int)ceil_div(max_ctx, 4 * kDecTok);
        a.n_splits = a.n_splits > most ? most : a.n_splits;
    }
    if (a.n_splits < 1)
        a.n_splits = 1;
    size_t per_row = (size_t)a.n_splits * a.n_q * kWorkRow * 4;
    int at_once = a.n_splits == 1 ? n_rows : (int)(dev->attn_work_bytes / per_row);
    if (at_once < 1)
        return -EINVAL;
    for (int s = 0; s < n_rows; s += at_once) {
        int rows = n_rows - s < at_once ? n_rows - s : at_once;
        attn_args b = a;
        b.seq0 = a.seq0 + s;
        bump(dev, COUNT_ATTN_DECODE);
        int r = launch(dev, st, decode_kernel<QUANT>, dim3(a.n_splits, a.n_kv, rows), dim3(kDecWarps * 32), kDecSmem, b);
        if (r == 0 && a.n_splits > 1)
            r = launch(dev, st, combine_kernel, dim3(a.n_q, rows), dim3(256), 0, b);
        if (r < 0)
            return r;
    }
    return 0;
}

template <bool QUANT>
int run(arle_device *dev, cudaStream_t st, attn_args a, const arle_batch *b)
{
    int r = 0;
    if (b->n_decode > 0)
        r = run_decode<QUANT>(dev, st, a, (int)b->n_decode, (int)b->max_ctx);
    if (r < 0 || b->n_seqs == b->n_decode)
        return r;
    a.seq0 = (int)b->n_decode;
    bump(dev, COUNT_ATTN_PREFILL);
    return launch(dev, st, prefill_kernel<QUANT>, dim3((unsigned)ceil_div(b->max_new, kPreRows / a.group), a.n_kv, b->n_seqs - b->n_decode),
                  dim3(256), kPreSmem, a);
}

} // namespace

extern "C" int cuda_attn_paged(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_paged_args *a)
{
    OP_ENTER(dev, st);
    const arle_batch *b = a->batch;
    if (b->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || a->head_dim != kHead || a->n_kv == 0 || a->n_q % a->n_kv != 0 || a->n_q / a->n_kv > 16
        || a->ld_out % 4 != 0 || (a->gate_src != NULL && (a->ld_gate | a->gate_off | a->gate_head_stride) % 4 != 0))
        return -EINVAL;
    attn_args p = {};
    p.q = (const bf16 *)a->q;
    p.kv = (const char *)a->kv.base;
    p.page_stride = a->kv.page_stride;
    p.kv_offset = a->kv.offset;
    p.entry_stride = a->kv.entry_stride;
    p.gate = (const bf16 *)a->gate_src;
    p.ld_gate = a->ld_gate;
    p.gate_off = a->gate_off;
    p.gate_head_stride = a->gate_head_stride;
    p.out = (bf16 *)a->out;
    p.ld_out = a->ld_out;
    p.pos = b->pos;
    p.cu = b->cu;
    p.table = b->block_table;
    p.n_q = (int)a->n_q;
    p.n_kv = (int)a->n_kv;
    p.group = (int)(a->n_q / a->n_kv);
    p.window = (int)a->window;
    p.first = a->first > 0 ? a->first : 0;
    p.pos_shift = a->pos_shift;
    p.page_tokens = (int)b->page_tokens;
    p.page_shift = (b->page_tokens & (b->page_tokens - 1)) == 0 ? __builtin_ctz(b->page_tokens) : -1;
    p.table_stride = (int)b->table_stride;
    p.scale_log2 = a->scale * 1.4426950408889634f;
    p.work = (float *)dev->attn_work;
    p.kv_dtype = a->kv.dtype;
    switch (a->kv.dtype) {
    case ARLE_BF16: return run<false>(dev, cs(st), p, b);
    case ARLE_I8: case ARLE_F8E4M3: case ARLE_I4G: return run<true>(dev, cs(st), p, b);
    default: return -EINVAL;
    }
}
