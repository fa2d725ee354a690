/* Paged attention of many tokens, the form that takes every cache and page size. */
#ifndef BACKEND_CUDA_ATTN_PREFILL_CUH
#define BACKEND_CUDA_ATTN_PREFILL_CUH

#include "attn.cuh"

namespace {

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
        expand_packed(a, entry_of(a, table, min(p, end - 1)), vec, l16, v);
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

} // namespace

#endif
