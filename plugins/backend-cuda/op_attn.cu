/*
 * attn_paged for heads of 256. The query heads that share a key head are packed into the rows of one matrix product, so that
 * each key and value is read once. Decode rows: the contexts of all rows are shared evenly by all warps, and a second kernel joins
 * the pieces. Other rows: a block takes 128 (token, head) rows and walks the context in tiles with a running softmax.
 *
 * Running softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; tiling: Dao 2023, arXiv:2307.08691; copying warp, warpgroups taking
 * turns: Shah et al. 2024, arXiv:2407.08608.
 */
#include "wgmma.cuh"
#include <errno.h>
#include <limits.h>

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

const int kDecStages = 3, kDecTok = 16, kDecStage = kDecTok * kRow * 2, kDecLeast = 2;

/* What a row attends: nb blocks of 16 positions from lo on, up to end - 1. A row that attends nothing has one block all the same. */
struct row_span { int lo, end, nb; };

__device__ __forceinline__ row_span span_of(const attn_args &a, int row)
{
    const int p = a.pos[a.cu[a.seq0 + row]] + a.pos_shift;
    row_span s;
    s.end = p + 1;
    s.lo = a.window > 0 && p - a.window + 1 > a.first ? p - a.window + 1 : a.first;
    s.nb = max((s.end - s.lo + kDecTok - 1) / kDecTok, 1);
    return s;
}

/* A block of keys of one row and key head. */
struct dec_place {
    int row, kvh, b;
    row_span span;

    __device__ __forceinline__ void next_pair(const attn_args &a)
    {
        b = 0;
        if (++kvh == a.n_kv) {
            kvh = 0;
            if (++row < a.n_rows)
                span = span_of(a, row);
        }
    }
};

/*
 * All blocks of all rows in one line, row by row, in it head by head: each warp takes the same share of it, however long the rows
 * are. All of a warp calls these.
 */
struct dec_line {
    int total, share;

    __device__ __forceinline__ dec_line(const attn_args &a)
    {
        total = 0;
        for (int row = threadIdx.x & 31; row < a.n_rows; row += 32)
            total += span_of(a, row).nb * a.n_kv;
#pragma unroll
        for (int d = 16; d > 0; d >>= 1)
            total += __shfl_xor_sync(0xffffffffu, total, d);
        share = max((total + a.n_splits - 1) / a.n_splits, kDecLeast);
    }

    /* Blocks before a row. */
    static __device__ __forceinline__ int before(const attn_args &a, int row)
    {
        int n = 0;
        for (int r = threadIdx.x & 31; r < row; r += 32)
            n += span_of(a, r).nb * a.n_kv;
#pragma unroll
        for (int d = 16; d > 0; d >>= 1)
            n += __shfl_xor_sync(0xffffffffu, n, d);
        return n;
    }

    __device__ __forceinline__ dec_place find(const attn_args &a, int at) const
    {
        const int lane = threadIdx.x & 31;
        dec_place w;
        for (int group = 0;; group += 32) {
            const row_span mine = span_of(a, min(group + lane, a.n_rows - 1));
            const int n = group + lane < a.n_rows ? mine.nb * a.n_kv : 0;
            int sum = n;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                int v = __shfl_up_sync(0xffffffffu, sum, d);
                sum += lane >= d ? v : 0;
            }
            const int here = __shfl_sync(0xffffffffu, sum, 31);
            if (at >= here) {
                at -= here;
                continue;
            }
            const int who = __ffs(__ballot_sync(0xffffffffu, sum > at)) - 1;
            at -= __shfl_sync(0xffffffffu, sum - n, who);
            w.row = group + who;
            w.span.lo = __shfl_sync(0xffffffffu, mine.lo, who);
            w.span.end = __shfl_sync(0xffffffffu, mine.end, who);
            w.span.nb = __shfl_sync(0xffffffffu, mine.nb, who);
            w.kvh = at / w.span.nb;
            w.b = at - w.kvh * w.span.nb;
            return w;
        }
    }
};

__device__ __forceinline__ float *work_of(const attn_args &a, int slot) { return a.work + (int64_t)slot * a.group * kWorkRow; }

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

/* A row of sums over all keys of a row and head: lane j of four has columns 8 d + 2 j and the next. */
__device__ __forceinline__ void store_whole(const attn_args &a, int row, int kvh, int r, const float (&o)[32][4], int half, float l)
{
    const int t = a.cu[a.seq0 + row], h = kvh * a.group + r, c = (threadIdx.x & 3) * 2;
    const float inv = l > 0.f ? 1.f / l : 0.f;
    bf16 *out = a.out + (int64_t)t * a.ld_out + (int64_t)h * kHead + c;
    uint32_t g[32];
    if (a.gate != NULL)
#pragma unroll
        for (int d = 0; d < 32; d++)
            g[d] = *(const uint32_t *)(a.gate + (int64_t)t * a.ld_gate + a.gate_off + h * a.gate_head_stride + c + d * 8);
#pragma unroll
    for (int d = 0; d < 32; d++) {
        float u = o[d][2 * half] * inv, v = o[d][2 * half + 1] * inv;
        if (a.gate != NULL) {
            float2 x = unpack2(g[d]);
            u *= sigmoidf(x.x);
            v *= sigmoidf(x.y);
        }
        *(uint32_t *)(out + d * 8) = pack2(u, v);
    }
}

/* The same over some of the keys, for combine_kernel. */
__device__ __forceinline__ void store_part(const attn_args &a, int slot, int r, const float (&o)[32][4], int half, float m, float l)
{
    float *w = work_of(a, slot), *to = w + r * kHead + (threadIdx.x & 3) * 2;
#pragma unroll
    for (int d = 0; d < 32; d++)
        *(float2 *)(to + d * 8) = make_float2(o[d][2 * half], o[d][2 * half + 1]);
    if ((threadIdx.x & 3) == 0)
        *(float2 *)(w + a.group * kHead + 2 * r) = make_float2(m, l);
}

/*
 * A warp takes its share of the line of blocks: the end of one row and head, perhaps several whole, the beginning of another. What is
 * not whole goes to slots 2 z (its beginning is another warp's) and 2 z + 1. With fixed splits (split_blocks > 0) block (z, key head,
 * row) takes split z, and every split is a slot.
 */
template <bool QUANT>
__global__ void __launch_bounds__(32) decode_kernel(const attn_args a)
{
    extern __shared__ __align__(128) unsigned char attn_smem[];
    const int lane = threadIdx.x, z = blockIdx.x;
    unsigned char *ring = attn_smem;
    const uint32_t qs = smem_u32(attn_smem) + kDecStages * kDecStage;
    pdl_launch();
    dec_place at = {};
    int n, slot = 2 * z;
    if (a.split_blocks > 0) {
        at = { (int)blockIdx.z, (int)blockIdx.y, z * a.split_blocks, span_of(a, blockIdx.z) };
        n = min(at.span.nb - at.b, a.split_blocks);
        slot = (at.row * a.n_kv + at.kvh) * a.n_splits + z;
    } else {
        const dec_line line(a);
        n = min(line.total - z * line.share, line.share);
        if (n > 0)
            at = line.find(a, z * line.share);
    }
    dec_place next = at;        /* the block to be copied next; `at` is the one to be multiplied */
    int filled = 0;
    auto fill = [&]() {
        if (filled < n) {
            const int p0 = next.span.lo + next.b * kDecTok;
            const int32_t *table = a.table + (int64_t)(a.seq0 + next.row) * a.table_stride;
            unsigned char *to = ring + filled % kDecStages * kDecStage;
            if (next.span.lo >= next.span.end)
                ;
            else if (QUANT)
                load_kv<true, kDecTok>(a, table, next.kvh, p0, next.span.end, to, lane, 32);
            else
                load_kv16(a, table, next.kvh, p0, next.span.end, smem_u32(to), lane);
            if (++next.b == next.span.nb)
                next.next_pair(a);
        }
        filled++;
        cp_commit();
    };
    /* The step's own key, in the last block of a row, is written by the kernel before this one. A warp that has it among its first only
     * brings them as far as the L2; the others start copying. */
    const bool early = !QUANT && n > 0 && at.b + min(n, kDecStages - 1) < at.span.nb;
    if (early) {
        for (int i = 0; i < kDecStages - 1; i++)
            fill();
    } else for (int i = 0; i < min(n, kDecStages - 1) && at.b + i < at.span.nb && at.span.lo < at.span.end; i++) {
        const int mine = min(at.span.lo + (at.b + i) * kDecTok + (lane & 15), at.span.end - 1);
        const char *e = entry_of(a, a.table + (int64_t)(a.seq0 + at.row) * a.table_stride, mine)
            + (size_t)(at.kvh + (lane >> 4) * a.n_kv) * (QUANT ? kHead : kRow);
        l2_prefetch(e);
        l2_prefetch(e + 128);
        l2_prefetch(e + (QUANT ? 0 : 256));
        l2_prefetch(e + (QUANT ? 0 : 384));
    }
    pdl_wait();
    if (n <= 0)
        return;
    if (!early)
        for (int i = 0; i < kDecStages - 1; i++)
            fill();

    float o[32][4], m0, m1, l0, l1;
    int first_b;
    auto begin = [&]() {
        const int64_t q0 = ((int64_t)a.cu[a.seq0 + at.row] * a.n_q + at.kvh * a.group) * kHead;
        for (int r = 0; r < a.group; r++)
            cp16(qs + swizzled(r, lane), a.q + q0 + r * kHead + lane * 8, true);
        cp_commit();
        m0 = m1 = -INFINITY;
        l0 = l1 = 0.f;
#pragma unroll
        for (int d = 0; d < 32; d++)
            o[d][0] = o[d][1] = o[d][2] = o[d][3] = 0.f;
        first_b = at.b;
    };
    begin();
    for (int i = 0; i < n; i++) {
        __syncwarp();
        fill();
        if (at.b == first_b)
            cp_wait<1>();           /* the queries came last */
        else
            cp_wait<kDecStages - 1>();
        __syncwarp();
        if (at.span.lo < at.span.end) {
            const uint32_t ks = smem_u32(ring + i % kDecStages * kDecStage), vs = ks + kDecTok * kRow;
            const int q_row = min(lane & 15, a.group - 1);         /* rows past the group are not used */
            float sc[2][4] = {}, sd[2][4] = {};                    /* two chains of products, since each waits for the one before it */
#pragma unroll
            for (int kk = 0; kk < 16; kk++) {
                uint32_t af[4], b[4];
                ldsm4(af, qs + swizzled(q_row, kk * 2 + (lane >> 4)));
                ldsm4(b, ks + swizzled((lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
                mma16816(kk & 1 ? sd[0] : sc[0], af, b[0], b[1]);
                mma16816(kk & 1 ? sd[1] : sc[1], af, b[2], b[3]);
            }
            const int p0 = at.span.lo + at.b * kDecTok + (lane & 3) * 2;
            float x0 = -INFINITY, x1 = -INFINITY;
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    bool ok = p0 + j * 8 + e < at.span.end;
                    sc[j][e] = ok ? (sc[j][e] + sd[j][e]) * a.scale_log2 : -INFINITY;
                    sc[j][2 + e] = ok ? (sc[j][2 + e] + sd[j][2 + e]) * a.scale_log2 : -INFINITY;
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
        if (++at.b < at.span.nb && i + 1 < n)
            continue;
        l0 += __shfl_xor_sync(0xffffffffu, l0, 1);
        l0 += __shfl_xor_sync(0xffffffffu, l0, 2);
        l1 += __shfl_xor_sync(0xffffffffu, l1, 1);
        l1 += __shfl_xor_sync(0xffffffffu, l1, 2);
        const bool whole = first_b == 0 && at.b == at.span.nb;
        const int to = a.split_blocks > 0 ? slot : slot + (first_b == 0);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = (lane >> 2) + half * 8;
            if (r < a.group) {
                if (whole)
                    store_whole(a, at.row, at.kvh, r, o, half, half ? l1 : l0);
                else
                    store_part(a, to, r, o, half, half ? m1 : m0, half ? l1 : l0);
            }
        }
        if (i + 1 < n) {
            at.next_pair(a);
            __syncwarp();
            begin();
        }
    }
    cp_wait<0>();
}

/* Joins the parts of 256 / PARTS values of one (row, query head). Groups of 64 / PARTS threads take every (4 PARTS)-th part, always in
 * the same order, and ask for several at once. */
template <int PARTS>
__global__ void __launch_bounds__(256) combine_kernel(const attn_args a)
{
    const int kGroups = 4 * PARTS, kWide = 64 / PARTS, kAtOnce = PARTS == 1 ? 5 : 9;
    __shared__ float4 part[kGroups][kWide];
    __shared__ float part_m[kGroups], part_l[kGroups];
    const int h = blockIdx.x, row = blockIdx.y, kvh = h / a.group, r = h % a.group;
    const int group = threadIdx.x / kWide, at = threadIdx.x % kWide, d = (blockIdx.z * kWide + at) * 4;
    pdl_launch();
    const int t = a.cu[a.seq0 + row], nb = span_of(a, row).nb;
    int n, slot0, slot1, step;          /* parts; slot of part 0, of part i > 0: slot1 + i * step */
    if (a.split_blocks > 0) {
        n = (nb + a.split_blocks - 1) / a.split_blocks;
        slot0 = slot1 = (row * a.n_kv + kvh) * a.n_splits;
        step = 1;
    } else {
        const dec_line line(a);
        const int begin = dec_line::before(a, row) + kvh * nb, z = begin / line.share;
        n = (begin + nb - 1) / line.share - z + 1;
        slot0 = 2 * z + 1;
        slot1 = 2 * z;
        step = 2;
    }
    pdl_wait();
    if (n == 1)
        return;
    float m = -INFINITY, l = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int i0 = group; i0 < n; i0 += kGroups * kAtOnce) {
        float2 ml[kAtOnce];
        float4 v[kAtOnce];
        float top = m;
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
            const int i = i0 + k * kGroups;
            ml[k] = make_float2(-INFINITY, 0.f);
            v[k] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (i < n) {
                const float *w = work_of(a, i == 0 ? slot0 : slot1 + i * step);
                ml[k] = *(const float2 *)(w + a.group * kHead + 2 * r);
                v[k] = *(const float4 *)(w + r * kHead + d);
            }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; k++)
            top = fmaxf(top, ml[k].x);
        float f = exp2f(m - top);           /* a part has keys, so top is finite */
        sum.x *= f;
        sum.y *= f;
        sum.z *= f;
        sum.w *= f;
        l *= f;
        m = top;
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
            f = exp2f(ml[k].x - m);
            sum.x += f * v[k].x;
            sum.y += f * v[k].y;
            sum.z += f * v[k].z;
            sum.w += f * v[k].w;
            l += f * ml[k].y;
        }
    }
    part[group][at] = sum;
    if (at == 0) {
        part_m[group] = m;
        part_l[group] = l;
    }
    __syncthreads();
    if (group > 0)
        return;
    for (int g = 1; g < kGroups; g++)
        m = fmaxf(m, part_m[g]);
    l = 0.f;
    sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
        const float f = exp2f(part_m[g] - m);
        const float4 v = part[g][at];
        sum.x += f * v.x;
        sum.y += f * v.y;
        sum.z += f * v.z;
        sum.w += f * v.w;
        l += f * part_l[g];
    }
    const float inv = 1.f / l;
    store_gated(a, t, h, d, make_float4(sum.x * inv, sum.y * inv, sum.z * inv, sum.w * inv));
}

/* ---- prefill --------------------------------------------------------------------------------------------------------- */

const int kPreRows = 128, kPreTok = 64, kPreStage = kPreTok * kRow * 2;
const int kPreSmem = kPreRows * kRow + 2 * kPreStage + 1024;       /* operands of warpgroup products are aligned to 1024 */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Keys and values lie in groups of eight rows, each four panels: what one tensor copy brings. */
const int kGroup = 8 * kRow, kPanel = 8 * 128;
__device__ __forceinline__ uint32_t grouped_at(int row, int chunk) { return (row >> 3) * kGroup + panel_at<8>(row & 7, chunk); }

/* Brings 64 keys (half 0) or values (half 1) from position p0 on into shared memory in groups, with 256 threads; positions from
 * `end` on become zeros. */
template <bool QUANT>
__device__ __forceinline__ void load_groups(const attn_args &a, const int32_t *table, int head, int half, int p0, int end,
                                            unsigned char *dst)
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
            cp16(to + grouped_at(warp * 8 + r, lane), e, p0 + warp * 8 + r < end);
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
        *(uint4 *)(dst + grouped_at(r, l16 * 2)) = make_uint4(v[0], v[1], v[2], v[3]);
        *(uint4 *)(dst + grouped_at(r, l16 * 2 + 1)) = make_uint4(v[4], v[5], v[6], v[7]);
    }
}

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Scores of a tile to weights: masked at an edge, exponentials in place. m, in powers of two, moves on only once it has fallen 8
 * behind: a weight is 256 at most and older sums rarely shrink. Returns whether they do, by f. */
template <int N>
__device__ __forceinline__ bool soften(const attn_args &a, float (&sc)[N], int p0, bool edge, const int *row_pos, float *m, float *l,
                                       float *f)
{
    const int lane = threadIdx.x & 31;
    if (edge) {
        int from[2], to[2];             /* what a row attends, counted from the lane's first key */
#pragma unroll
        for (int h = 0; h < 2; h++) {
            to[h] = row_pos[h] - p0 - (lane & 3) * 2;
            from[h] = max(a.first - row_pos[h], a.window > 0 ? 1 - a.window : INT_MIN) + to[h];
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int at = (i >> 2) * 8 + (i & 1), h = (i >> 1) & 1;
            if (at > to[h] || at < from[h])
                sc[i] = -INFINITY;
        }
    }
    float x[2][2] = { { sc[0], sc[2] }, { sc[1], sc[3] } };
#pragma unroll
    for (int i = 4; i < N; i++)
        x[i & 1][(i >> 1) & 1] = fmaxf(x[i & 1][(i >> 1) & 1], sc[i]);
    bool grew = false;
    float b[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = fmaxf(x[0][h], x[1][h]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)) * a.scale_log2;
        f[h] = 1.f;
        if (top > m[h] + 8.f) {
            f[h] = exp2_fast(m[h] - top);
            m[h] = top;
            l[h] *= f[h];
            grew = true;
        }
        b[h] = m[h] == -INFINITY ? 0.f : -m[h];
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        sc[i] = exp2_fast(fmaf(sc[i], a.scale_log2, b[(i >> 1) & 1]));
        l[(i >> 1) & 1] += sc[i];
    }
    return __any_sync(0xffffffffu, grew);
}

/* Products of 64 queries and 2 N keys, into sc. */
template <int N>
__device__ __forceinline__ void scores(float (&sc)[N], uint32_t q_s, uint32_t k_s)
{
    const wgmma_operand q(q_s, 16, 1024), k(k_s, 16, kGroup);
#pragma unroll
    for (int kk = 0; kk < 16; kk++)
        wgmma_ss(sc, q.at((kk >> 2) * (kPreRows * 128) + (kk & 3) * 32), k.at((kk >> 2) * kPanel + (kk & 3) * 32), kk > 0);
}

/* o += weights of 4 N keys times their values. */
template <int N>
__device__ __forceinline__ void weigh(float (&o)[128], const uint32_t (&pf)[N], uint32_t v_s)
{
    const wgmma_operand v(v_s, kPanel, kGroup);
#pragma unroll
    for (int k = 0; k < N / 4; k++)
        wgmma_64x256(o, pf + 4 * k, v.at(k * 2 * kGroup));
}

template <int N>
__device__ __forceinline__ void pack_weights(uint32_t (&pf)[N], const float (&sc)[2 * N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        pf[i] = pack2(sc[2 * i], sc[2 * i + 1]);
}

/* Waits for the values' products once the weights beside them are made. ptxas would wait first, for nothing ties the wait to the
 * weights; it moves no wait across a store, and this one needs all of the weights. held: one word a thread. */
__device__ __forceinline__ void wait_values(float (&o)[128], const float *l, float *held)
{
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(smem_u32(held + (threadIdx.x & 255))), "f"(l[0] + l[1]) : "memory");
    wgmma_wait<0>();
    wgmma_hold(o);
}

__device__ __forceinline__ void shrink(float (&o)[128], const float *f)
{
#pragma unroll
    for (int d = 0; d < 128; d++)
        o[d] *= f[(d >> 1) & 1];
}

/*
 * Sums of one tile of queries over positions lo .. end - 1; a warpgroup has 64 rows. Scores of tile i run together with the values
 * of tile i - 1, which go on while the weights of tile i are made. So K of the next tile and V of the present one arrive together.
 */
template <bool QUANT>
__device__ __forceinline__ void walk_context(const attn_args &a, const int32_t *table, int kvh, int lo, int end, const int *row_pos,
                                             unsigned char *smem, float (&o)[128], float *m, float *l)
{
    const int wg = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0), n = (end - lo + kPreTok - 1) / kPreTok;
    unsigned char *kv = smem + kPreRows * kRow;
    const uint32_t q_s = smem_u32(smem) + wg * 64 * 128, kv_s = smem_u32(kv);
    const int half = kPreTok * kRow;            /* ring: K of even tiles, V, K of odd tiles, V */
    /* Rows of the warp in order of position: its first and last decide whether any pair is masked. */
    const int first = __shfl_sync(0xffffffffu, row_pos[0], 0), last = __shfl_sync(0xffffffffu, row_pos[1], 31);
    auto is_edge = [&](int p0) { return p0 + kPreTok - 1 > first || (a.window > 0 && p0 <= last - a.window) || p0 < a.first; };
    __shared__ float held[256];
    float sc[32], f[2];
    uint32_t pf[16];

    load_groups<QUANT>(a, table, kvh, 0, lo, end, kv);
    cp_commit();
    cp_wait<0>();
    wgmma_publish();
    __syncthreads();
    load_groups<QUANT>(a, table, kvh, 0, lo + kPreTok, end, kv + kPreStage);
    load_groups<QUANT>(a, table, kvh, 1, lo, end, kv + half);
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
        load_groups<QUANT>(a, table, kvh, 0, p0 + kPreTok, end, kv + there);
        load_groups<QUANT>(a, table, kvh, 1, p0, end, kv + here + half);
        cp_commit();
        wgmma_wait<1>();
        wgmma_hold(sc);
        const bool grew = soften(a, sc, p0, is_edge(p0), row_pos, m, l, f);
        wait_values(o, l, held);
        if (grew)
            shrink(o, f);
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

/* Rows r0 and r0 + 8 of a tile of n_tok tokens from t0 on, as a warp's sums have them: lane j of four has columns 8 d + 2 j and the
 * next. For memory two lanes exchange halves, so that each has four columns side by side, of chunk 2 k or 2 k + 1. */
struct row_place {
    bool ok[2];
    const bf16 *gate[2];
    bf16 *out[2];

    __device__ __forceinline__ row_place(const attn_args &a, int r0, int t0, int n_tok, int kvh)
    {
        const int lane = threadIdx.x & 31, col = (lane & 1) * 8 + ((lane >> 1) & 1) * 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int r = r0 + h * 8, tok = r / a.group, t = t0 + tok, head = kvh * a.group + r - tok * a.group;
            ok[h] = tok < n_tok;
            gate[h] = a.gate + (int64_t)t * a.ld_gate + a.gate_off + head * a.gate_head_stride + col;
            out[h] = a.out + (int64_t)t * a.ld_out + (int64_t)head * kHead + col;
        }
    }
};

/* Asks for the gates of a row. */
__device__ __forceinline__ void load_gates(const attn_args &a, const row_place &to, int h, uint2 (&g)[16])
{
#pragma unroll
    for (int k = 0; k < 16; k++)
        g[k] = a.gate != NULL && to.ok[h] ? *(const uint2 *)(to.gate[h] + k * 16) : make_uint2(0, 0);
}

/* Divides, gates and stores a row; all lanes take part. */
__device__ __forceinline__ void store_row(const attn_args &a, const row_place &to, int h, const float (&o)[128], float l,
                                          const uint2 (&g)[16])
{
    const bool odd = threadIdx.x & 1;
    l += __shfl_xor_sync(0xffffffffu, l, 1);
    l += __shfl_xor_sync(0xffffffffu, l, 2);
    const float inv = l > 0.f ? 1.f / l : 0.f;
#pragma unroll
    for (int k = 0; k < 16; k++) {
        float x[4] = { o[8 * k + 2 * h] * inv, o[8 * k + 2 * h + 1] * inv, o[8 * k + 4 + 2 * h] * inv, o[8 * k + 5 + 2 * h] * inv };
        if (a.gate != NULL) {
            const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? g[k].x : g[k].y, 1);
            const float2 u = unpack2(odd ? other : g[k].x), v = unpack2(odd ? g[k].y : other);
            x[0] *= sigmoidf(u.x);
            x[1] *= sigmoidf(u.y);
            x[2] *= sigmoidf(v.x);
            x[3] *= sigmoidf(v.y);
        }
        const uint32_t u = pack2(x[0], x[1]), v = pack2(x[2], x[3]), other = __shfl_xor_sync(0xffffffffu, odd ? u : v, 1);
        if (to.ok[h])
            *(uint2 *)(to.out[h] + k * 16) = odd ? make_uint2(other, v) : make_uint2(u, other);
    }
}

__device__ __forceinline__ void store_rows(const attn_args &a, const float (&o)[128], const float *l, int r0, int t0, int n_tok, int kvh)
{
    const row_place to(a, r0, t0, n_tok, kvh);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint2 g[16];
        load_gates(a, to, h, g);
        store_row(a, to, h, o, l[h], g);
    }
}

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
    store_rows(a, o, l, r0, t0, n_tok, kvh);
}

/* ---- prefill with a warp that only copies ---------------------------------------------------------------------------- */

/*
 * The form for bf16 caches on compute capability 9.0. Clusters of two blocks, one a multiprocessor, take pairs of query tiles from a
 * shared counter; the tiles of a pair follow one another, so both blocks walk the same keys, and each copies half of them to both:
 * without that, reading the L2 is the limit. In a block warpgroup 0 asks for what the other two multiply, tensor copies into a ring;
 * those two, 64 rows each, take turns.
 */
const int kHopTok = 80, kHopHalf = kHopTok * kRow, kHopStages = 4, kHopThreads = 384;
const int kHopSmem = kPreRows * kRow + kHopStages * kHopHalf + 1024;

struct hop_args {
    CUtensorMap q, kv;              /* [token][head][256]; [page][key and value heads][panel][position][64] */
    attn_args a;
    int n_seqs;
    unsigned *ticket;               /* zero between kernels */
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* A pair of tiles of queries: n_tok tokens from t0 on, the first at pos0; keys lo .. end - 1 in n tiles from base on. */
struct hop_pair { int seq, kvh, t0, n_tok, pos0, lo, end, base, n; };

struct hop_shared {
    uint64_t full[kHopStages], empty[kHopStages], q_full, q_empty, pair_full[2], pair_empty[2];     /* pair_empty: of rank 0 */
    hop_pair pair[2];               /* seq < 0: no more */
    float held[256];                /* of wait_values */
};

/* Finds the pair of a ticket: sequence by sequence, head by head, the longest first. All of a warp calls it, with rising tickets.
 * 32 sequences are held at a time, one a lane: n pairs, `sum` with those before it in the group. */
struct hop_finder {
    int group, before, n, sum;

    __device__ __forceinline__ void load(const hop_args &p)
    {
        const int lane = threadIdx.x & 31, i = group + lane, tokens = kPreRows / p.a.group * 2;
        n = 0;
        if (i < p.n_seqs)
            n = (p.a.cu[p.a.seq0 + i + 1] - p.a.cu[p.a.seq0 + i] + tokens - 1) / tokens * p.a.n_kv;
        sum = n;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            int v = __shfl_up_sync(0xffffffffu, sum, d);
            sum += lane >= d ? v : 0;
        }
    }

    /* Gives seq -1 past the last; `before` is then the number of all pairs. */
    __device__ __forceinline__ hop_pair find(const hop_args &p, int ticket)
    {
        const attn_args &a = p.a;
        hop_pair t = { -1 };
        int of_group;
        while (ticket >= before + (of_group = __shfl_sync(0xffffffffu, sum, 31))) {
            before += of_group;
            group += 32;
            if (group >= p.n_seqs)
                return t;
            load(p);
        }
        const int tokens = kPreRows / a.group * 2, who = __ffs(__ballot_sync(0xffffffffu, before + sum > ticket)) - 1;
        const int pairs = __shfl_sync(0xffffffffu, n, who) / a.n_kv;
        const int i = ticket - before - __shfl_sync(0xffffffffu, sum - n, who);
        t.seq = a.seq0 + group + who;
        t.kvh = i / pairs;
        t.t0 = a.cu[t.seq] + (pairs - 1 - i % pairs) * tokens;
        t.n_tok = min(tokens, a.cu[t.seq + 1] - t.t0);
        t.pos0 = a.pos[t.t0] + a.pos_shift;             /* positions of a sequence's tokens are consecutive */
        t.end = t.pos0 + t.n_tok;
        t.lo = a.window > 0 && t.pos0 - a.window + 1 > a.first ? t.pos0 - a.window + 1 : a.first;
        t.base = t.lo & -8;
        t.n = t.end > t.lo ? (t.end - t.base + kHopTok - 1) / kHopTok : 0;
        return t;
    }
};

/* One warp of each block. Ring order is the order of use: K 0, K 1, V 0, K 2, V 1, ... */
__device__ __forceinline__ void hop_produce(const hop_args &p, hop_shared &sh, uint32_t smem)
{
    const attn_args &a = p.a;
    const int lane = threadIdx.x & 31, rank = cluster_rank(), rows = kPreRows / a.group * a.group;
    const bool copies = lane < kHopTok / 16;            /* lanes of a block's share: every second group of eight keys */
    const uint32_t ring = smem + kPreRows * kRow;
    struct place { int page, at; };                     /* of this lane's group in one tile of keys */
    hop_finder finder = {};
    if (rank == 0)
        finder.load(p);
    pdl_wait();
    int c = 0, nq = 0, ticket = blockIdx.x >> 1;
    unsigned got = 0;
    for (int it = 0;; it++) {
        const uint32_t full = smem_u32(&sh.pair_full[it & 1]), empty = smem_u32(&sh.pair_empty[it & 1]);
        hop_pair t;
        if (rank == 0) {
            t = finder.find(p, ticket);
            mbar_wait(empty, ((it >> 1) & 1) ^ 1);
            if (lane < 2) {
                const uint32_t to = of_rank(smem_u32(&sh.pair[it & 1]), lane);
                const int word[9] = { t.seq, t.kvh, t.t0, t.n_tok, t.pos0, t.lo, t.end, t.base, t.n };
#pragma unroll
                for (int k = 0; k < 9; k++)
                    cluster_store(to + k * 4, word[k]);
                mbar_arrive_written(of_rank(full, lane));
            }
        } else {
            mbar_wait_written(full, (it >> 1) & 1);
            t = sh.pair[it & 1];
            __syncwarp();
            if (lane == 0)
                mbar_arrive_at(of_rank(empty, 0));
        }
        if (t.seq < 0) {
            if (rank == 0 && lane == 0 && it > 0 && got == (unsigned)finder.before - 1)
                *p.ticket = 0;      /* each pair drew one number: this was the last */
            break;
        }
        if (rank == 0 && lane == 0)
            got = atomicAdd(p.ticket, 1u);
        const int32_t *table = a.table + (int64_t)t.seq * a.table_stride;
        auto look = [&](int i) {
            place w = {};
            if (copies) {
                /* Past the end the last group comes again: its keys are masked, its values cleared. */
                int pos = min(t.base + i * kHopTok + (lane * 2 + rank) * 8, (t.end - 1) & -8);
                int page = a.page_shift >= 0 ? pos >> a.page_shift : pos / a.page_tokens;
                w.at = pos - page * a.page_tokens;
                w.page = table[page];
            }
            return w;
        };
        auto copy = [&](const place &w, int half) {
            const int slot = c % kHopStages;
            const uint32_t bar = smem_u32(&sh.full[slot]);
            mbar_wait(smem_u32(&sh.empty[slot]), ((c / kHopStages) & 1) ^ 1);
            if (lane == 0)
                mbar_expect(bar, kHopHalf);
            __syncwarp();
            if (copies)
                tensor_copy_to(ring + slot * kHopHalf + (lane * 2 + rank) * kGroup, &p.kv, bar, 3, 0, w.at, 0, t.kvh + half * a.n_kv,
                               w.page);
            c++;
        };
        if (t.n > 0) {
            place next = look(0), now = {};
            mbar_wait(smem_u32(&sh.q_empty), (nq++ & 1) ^ 1);
            if (lane == 0)
                mbar_expect(smem_u32(&sh.q_full), rows * kRow);
            __syncwarp();
            if (lane < 4)
                tensor_copy(smem + lane * (kPreRows * 128), &p.q, smem_u32(&sh.q_full), lane * 64, t.kvh * a.group,
                            t.t0 + rank * (kPreRows / a.group));
            for (int i = 0; i <= t.n; i++) {
                const place old = now;
                now = next;
                if (i + 1 < t.n)
                    next = look(i + 1);
                if (i < t.n)
                    copy(now, 0);
                if (i > 0)
                    copy(old, 1);
            }
        }
        ticket = (int)(gridDim.x >> 1) + (int)__shfl_sync(0xffffffffu, got, 0);
    }
}

/* Values of positions outside lo .. end - 1 become zeros: their weights are zero, but 0 * garbage may be NaN. Both warpgroups write
 * them, each before its own product. */
__device__ __forceinline__ void hop_clear(unsigned char *v, int p0, int lo, int end, int wg)
{
    for (int i = threadIdx.x & 127; i < kHopTok * 32; i += 128) {
        const int pos = p0 + (i >> 5);
        if (pos < lo || pos >= end)
            *(uint4 *)(v + grouped_at(i >> 5, i & 31)) = make_uint4(0, 0, 0, 0);
    }
    wgmma_publish();
    bar_sync(1 + wg, 128);
}

/* What warps that multiply do with the c-th use of a slot: wait until it is filled, give it back to both blocks. */
__device__ __forceinline__ void hop_wait(hop_shared &sh, int c) { mbar_wait(smem_u32(&sh.full[c % kHopStages]), (c / kHopStages) & 1); }

__device__ __forceinline__ void hop_release(hop_shared &sh, int c)
{
    const int lane = threadIdx.x & 31;
    __syncwarp();
    if (lane < 2)
        mbar_arrive_at(of_rank(smem_u32(&sh.empty[c % kHopStages]), lane));
}

__device__ __forceinline__ void hop_release_q(hop_shared &sh)
{
    __syncwarp();
    if ((threadIdx.x & 31) == 0)
        mbar_arrive(smem_u32(&sh.q_empty));
}

/* Warpgroup wg of two, one tile: rows 64 wg .. 64 wg + 63, the tile's first token `ahead` of the pair's. Scores of keys i run together
 * with the values of keys i - 1, which go on while the weights of keys i are made. The warpgroups start these products in turns, so that
 * one makes weights while the other's scores run. */
__device__ __forceinline__ void hop_multiply(const attn_args &a, hop_shared &sh, const hop_pair &t, unsigned char *smem, int wg,
                                             int ahead, int c)
{
    const int lane = threadIdx.x & 31, r0 = wg * 64 + ((threadIdx.x >> 5) & 3) * 16 + (lane >> 2);
    const uint32_t q_s = smem_u32(smem) + wg * 64 * 128;
    const bool turns = (t.n_tok - ahead) * a.group > 64;       /* the other warpgroup is at work too */
    unsigned char *ring = smem + kPreRows * kRow;
    auto slot = [&](int c) { return ring + c % kHopStages * kHopHalf; };
    float o[128], sc[kHopTok / 2], m[2] = { -INFINITY, -INFINITY }, l[2] = { 0.f, 0.f }, f[2];
    uint32_t pf[kHopTok / 4];
#pragma unroll
    for (int d = 0; d < 128; d++)
        o[d] = 0.f;
    int p0 = t.base;
    if (t.n > 0) {
        const int pos0 = t.pos0 + ahead, row_pos[2] = { pos0 + r0 / a.group, pos0 + (r0 + 8) / a.group };
        /* Rows of the warp in order of position: its first and last decide whether any pair is masked. */
        const int first = __shfl_sync(0xffffffffu, row_pos[0], 0), last = __shfl_sync(0xffffffffu, row_pos[1], 31);
        const int from = max(a.first, a.window > 0 ? last - a.window + 1 : 0);
        auto is_edge = [&](int p0) { return p0 + kHopTok - 1 > first || p0 < from; };
        hop_wait(sh, c);
        wgmma_fence();
        scores(sc, q_s, smem_u32(slot(c)));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(sc);
        hop_release(sh, c++);
        soften(a, sc, p0, is_edge(p0), row_pos, m, l, f);
        pack_weights(pf, sc);
        while ((p0 += kHopTok) < t.end) {
            if (p0 - kHopTok < t.lo) {
                hop_wait(sh, c + 1);
                hop_clear(slot(c + 1), p0 - kHopTok, t.lo, t.end, wg);
            }
            hop_wait(sh, c);
            if (turns)
                bar_sync(3 + wg, 256);
            wgmma_fence();
            scores(sc, q_s, smem_u32(slot(c)));
            wgmma_commit();
            hop_wait(sh, c + 1);
            wgmma_fence();
            weigh(o, pf, smem_u32(slot(c + 1)));
            wgmma_commit();
            if (turns)
                bar_arrive(4 - wg, 256);
            wgmma_wait<1>();
            wgmma_hold(sc);
            hop_release(sh, c);
            const bool grew = soften(a, sc, p0, is_edge(p0), row_pos, m, l, f);
            wait_values(o, l, sh.held);
            hop_release(sh, c + 1);
            if (grew)
                shrink(o, f);
            pack_weights(pf, sc);
            c += 2;
        }
        p0 -= kHopTok;
        hop_release_q(sh);
    }
    const row_place to(a, r0, t.t0 + ahead, min(t.n_tok - ahead, kPreRows / a.group), t.kvh);
    uint2 g[2][16];
    load_gates(a, to, 0, g[0]);
    if (t.n > 0) {
        hop_wait(sh, c);
        if (p0 + kHopTok > t.end || p0 < t.lo)
            hop_clear(slot(c), p0, t.lo, t.end, wg);
        wgmma_fence();
        weigh(o, pf, smem_u32(slot(c)));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(o);
        hop_release(sh, c);
    }
    load_gates(a, to, 1, g[1]);
#pragma unroll
    for (int h = 0; h < 2; h++)
        store_row(a, to, h, o, l[h], g[h]);
}

/* Warpgroup wg of two: its half of every tile. */
__device__ __forceinline__ void hop_consume(const hop_args &p, hop_shared &sh, unsigned char *smem, int wg)
{
    const attn_args &a = p.a;
    const int lane = threadIdx.x & 31, ahead = (int)cluster_rank() * (kPreRows / a.group);
    int c = 0, nq = 0;
    if (wg == 1)
        bar_arrive(3, 256);     /* the first turn is warpgroup 0's */
    for (int it = 0;; it++) {
        mbar_wait_written(smem_u32(&sh.pair_full[it & 1]), (it >> 1) & 1);
        const hop_pair &t = sh.pair[it & 1];
        if (t.seq < 0)
            break;
        if (t.n > 0)
            mbar_wait(smem_u32(&sh.q_full), nq++ & 1);
        if (wg * 64 < (t.n_tok - ahead) * a.group)
            hop_multiply(a, sh, t, smem, wg, ahead, __shfl_sync(0xffffffffu, c, 0));
        else if (t.n > 0) {
            hop_release_q(sh);
            for (int i = 0; i < 2 * t.n; i++) {         /* none of the rows is there, as in short pieces: all passes by */
                hop_wait(sh, c + i);
                hop_release(sh, c + i);
            }
        }
        c += 2 * t.n;
        __syncwarp();
        if (lane == 0)
            mbar_arrive_at(of_rank(smem_u32(&sh.pair_empty[it & 1]), 0));
    }
}

__global__ void __cluster_dims__(2) __launch_bounds__(kHopThreads, 1) prefill_hopper_kernel(const __grid_constant__ hop_args p)
{
    extern __shared__ __align__(128) unsigned char attn_smem[];
    __shared__ hop_shared sh;
    unsigned char *smem = attn_smem + (-smem_u32(attn_smem) & 1023);
    pdl_launch();
    if (threadIdx.x == 0) {
        tensor_prefetch_map(&p.q);
        tensor_prefetch_map(&p.kv);
        for (int i = 0; i < kHopStages; i++) {
            mbar_init(smem_u32(&sh.full[i]), 1);
            mbar_init(smem_u32(&sh.empty[i]), 16);      /* warps that multiply, of both blocks */
        }
        mbar_init(smem_u32(&sh.q_full), 1);
        mbar_init(smem_u32(&sh.q_empty), 8);
        for (int i = 0; i < 2; i++) {
            mbar_init(smem_u32(&sh.pair_full[i]), 1);
            mbar_init(smem_u32(&sh.pair_empty[i]), 17);     /* the same, and the copying warp of rank 1 */
        }
        mbar_publish();
    }
    cluster_sync();
    if (threadIdx.x < 128) {
        registers_down<40>();
        if (threadIdx.x < 32)
            hop_produce(p, sh, smem_u32(smem));
    } else {
        registers_up<232>();
        pdl_wait();
        hop_consume(p, sh, smem, __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0) - 1);
    }
    __syncwarp();
    cluster_sync();         /* the other block still arrives at this one's barriers */
}
#else
/* The launch bound tells the host that this code has no such form. */
__global__ void __launch_bounds__(32) prefill_hopper_kernel(const __grid_constant__ hop_args) {}
#endif

/* ---- launch ---------------------------------------------------------------------------------------------------------- */

/* Joins what several warps have of one row and head: four blocks for each where they all run at once, but at fixed splits always one,
 * for the order of the sums must not depend on other rows. */
int run_combine(arle_device *dev, cudaStream_t st, const attn_args &a)
{
    return a.split_blocks == 0 && a.n_q * a.n_rows <= dev->n_sm / 2
        ? launch(dev, st, combine_kernel<4>, dim3(a.n_q, a.n_rows, 4), dim3(256), 0, a)
        : launch(dev, st, combine_kernel<1>, dim3(a.n_q, a.n_rows), dim3(256), 0, a);
}

/* Splits at fixed positions, as many rows at once as there is room for their parts. */
template <bool QUANT>
int run_decode_fixed(arle_device *dev, cudaStream_t st, attn_args a, int n_rows, int max_ctx, size_t smem)
{
    a.split_blocks = 64;
    a.n_splits = (int)ceil_div(max_ctx, a.split_blocks * kDecTok);
    int at_once = (int)(dev->attn_work_bytes / ((size_t)a.n_splits * a.n_q * kWorkRow * 4));
    if (at_once < 1)
        return -EINVAL;
    const int seq0 = a.seq0;
    for (int s = 0; s < n_rows; s += at_once) {
        a.seq0 = seq0 + s;
        a.n_rows = n_rows - s < at_once ? n_rows - s : at_once;
        int r = launch(dev, st, decode_kernel<QUANT>, dim3(a.n_splits, a.n_kv, a.n_rows), dim3(32), smem, a);
        if (r == 0 && a.n_splits > 1)
            r = run_combine(dev, st, a);
        if (r < 0)
            return r;
    }
    return 0;
}

template <bool QUANT>
int run_decode(arle_device *dev, cudaStream_t st, attn_args a, int n_rows, int max_ctx)
{
    const size_t smem = kDecStages * kDecStage + a.group * kRow;
    bump(dev, COUNT_ATTN_DECODE);
    if (dev->deterministic)
        return run_decode_fixed<QUANT>(dev, st, a, n_rows, max_ctx, smem);
    /* As many warps as run at once, about four a multiprocessor; a block's memory costs 1 KB more than it asks for. */
    const int64_t warps = dev->n_sm * (int64_t)((dev->max_smem + 1024) / (smem + 1024));
    const int64_t most = ceil_div(n_rows * a.n_kv * ceil_div(max_ctx, kDecTok), kDecLeast);
    a.n_rows = n_rows;
    a.n_splits = (int)(warps < most ? warps : most);
    int r = launch(dev, st, decode_kernel<QUANT>, dim3(a.n_splits), dim3(32), smem, a);
    if (r == 0 && max_ctx > kDecTok)
        r = run_combine(dev, st, a);
    return r;
}

/* Launches the form with tensor copies; 1 where it does not apply: other devices, pages that are no multiple of 8 positions. */
int run_hopper(arle_device *dev, cudaStream_t st, const attn_args &a, const arle_batch *b)
{
    cudaFuncAttributes fa;
    if (dev->cc != 90 || tensor_map_encoder() == NULL || a.page_tokens % 8 != 0)
        return 1;
    CUDA_TRY(dev, cudaFuncGetAttributes(&fa, prefill_hopper_kernel));
    if (fa.maxThreadsPerBlock != kHopThreads)
        return 1;
    hop_args p;
    memset(&p, 0, sizeof p);
    p.a = a;
    p.n_seqs = (int)(b->n_seqs - b->n_decode);
    p.ticket = dev->tickets;
    const cuuint64_t q_dim[3] = { kHead, (cuuint64_t)a.n_q, b->n_tokens }, q_stride[2] = { kRow, (cuuint64_t)a.n_q * kRow };
    const cuuint32_t q_box[3] = { 64, (cuuint32_t)a.group, (cuuint32_t)(kPreRows / a.group) };
    /* How many pages there are is not known here; any that the table names is there. */
    const cuuint64_t kv_dim[5] = { 64, (cuuint64_t)a.page_tokens, 4, 2 * (cuuint64_t)a.n_kv, 1u << 31 };
    const cuuint64_t kv_stride[4] = { a.entry_stride, 128, kRow, a.page_stride };
    const cuuint32_t kv_box[5] = { 64, 8, 4, 1, 1 };
    if (!tensor_map(&p.q, a.q, 3, q_dim, q_stride, q_box)
        || !tensor_map(&p.kv, a.kv + a.kv_offset, 5, kv_dim, kv_stride, kv_box))
        return 1;
    const int64_t pairs = ceil_div(b->max_new, kPreRows / a.group * 2) * a.n_kv * p.n_seqs, most = dev->n_sm / 2;
    return launch(dev, st, prefill_hopper_kernel, dim3((unsigned)(pairs < most ? pairs : most) * 2), dim3(kHopThreads), kHopSmem, p);
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
    if (!QUANT && (r = run_hopper(dev, st, a, b)) <= 0)
        return r;
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
