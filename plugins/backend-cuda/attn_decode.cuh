/* Paged attention of decode rows: pieces of the context, and their join. */
#ifndef BACKEND_CUDA_ATTN_DECODE_CUH
#define BACKEND_CUDA_ATTN_DECODE_CUH

#include "attn.cuh"

namespace {

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

const int kDecStages = 3, kDecTok = 16, kDecStage = kDecTok * kRow * 2, kDecLeast = 1;

__device__ __forceinline__ int row_token(const attn_args &a, int row) { return a.seq_of != NULL ? a.seq0 + row : a.cu[a.seq0 + row]; }

__device__ __forceinline__ const int32_t *row_table(const attn_args &a, int row)
{
    return a.table + (int64_t)(a.seq_of != NULL ? a.seq_of[a.seq0 + row] : a.seq0 + row) * a.table_stride;
}

/* What a row attends: nb blocks of 16 positions from lo on, up to end - 1. A row that attends nothing has one block all the same. */
struct row_span { int lo, end, nb; };

__device__ __forceinline__ row_span span_of(const attn_args &a, int row)
{
    const int p = a.pos[row_token(a, row)] + a.pos_shift;
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
    const int t = row_token(a, row), h = kvh * a.group + r, c = (threadIdx.x & 3) * 2;
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
            const int32_t *table = row_table(a, next.row);
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
    /* The step's own key, in the last block of a decode row, is written by the kernel before this one. A warp that has it among its first only
     * brings them as far as the L2; the others start copying. Nothing in flight may write other keys of a decode row: a step begins and ends
     * with copies that wait for all before them, and each layer has a cache of its own. */
    const bool early = !QUANT && a.seq_of == NULL && n > 0 && at.b + min(n, kDecStages - 1) < at.span.nb;
    if (early) {
        for (int i = 0; i < kDecStages - 1; i++)
            fill();
    } else for (int i = 0; i < min(n, kDecStages - 1) && at.b + i < at.span.nb && at.span.lo < at.span.end; i++) {
        const int mine = min(at.span.lo + (at.b + i) * kDecTok + (lane & 15), at.span.end - 1);
        const char *e = entry_of(a, row_table(a, at.row), mine)
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
        const int64_t q0 = ((int64_t)row_token(a, at.row) * a.n_q + at.kvh * a.group) * kHead;
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
    const int t = row_token(a, row), nb = span_of(a, row).nb;
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

} // namespace

#endif
