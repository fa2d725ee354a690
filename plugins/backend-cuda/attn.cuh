/* Paged attention for heads of 256: arguments of its kernels, and keys and values on their way to shared memory. */
#ifndef BACKEND_CUDA_ATTN_CUH
#define BACKEND_CUDA_ATTN_CUH

#include "wgmma.cuh"

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
    int n_rows, n_splits, split_blocks;     /* decode; split_blocks 0: n_splits warps share all blocks of all rows evenly */
    float *work;
    uint32_t kv_dtype;              /* of quantised entries */
    const int32_t *seq_of;          /* decode: row i is token seq0 + i, of this sequence; NULL: it is the one token of sequence seq0 + i */
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

/* Sixteen values of vector `vec` of a quantised entry as eight packed pairs, half a warp a vector. */
__device__ __forceinline__ void expand_packed(const attn_args &a, const char *entry, int vec, int l16, uint32_t *v)
{
    if (a.kv_dtype == ARLE_I4G) {
        float f[16];
        expand_i4(entry, vec, 2 * a.n_kv, l16, f);
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = pack2(f[2 * j], f[2 * j + 1]);
    } else {
        expand16(entry, vec, 2 * a.n_kv, l16, a.kv_dtype, v);
    }
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
            expand_packed(a, entry_of(a, table, p), head + half * a.n_kv, l16, v);
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

} // namespace

#endif
