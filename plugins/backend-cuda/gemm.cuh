/*
 * gemm_stream: y[t, n] = sum_k x[t, k] W[n, k] for few tokens, made to stream W once at memory speed.
 *
 * W is the mma's A operand (16 rows), tokens its B operand (8 columns). A tile is 128 rows of W by NT * 8 tokens; its work is
 * cut into units of 64 along K. All units of all tiles form one line, and each block takes an equal, contiguous piece of it, so
 * that every multiprocessor reads the same number of bytes whatever the shape. A tile that more than one block worked on is
 * summed by the block that finishes last, always in the order of the blocks: results do not depend on timing.
 *
 * cp.async fills a ring of kStages units. The first kStages - 1 units of W are asked for before pdl_wait(), so the memory
 * system is busy while the kernel before this one finishes.
 *
 * Grouped (routed experts): group g has its own W and the tokens start[g] .. start[g+1] of a list sorted by group.
 */
#ifndef BACKEND_CUDA_GEMM_CUH
#define BACKEND_CUDA_GEMM_CUH

#include "common.cuh"

enum gemm_out { GEMM_BF16 = 0, GEMM_BF16_ADD, GEMM_F32, GEMM_F32_ADD, GEMM_SILU };

struct gemm_args {
    const bf16 *w;              /* [groups][n][k] */
    const bf16 *x; int64_t ld_x;
    void *y; int64_t ld_y;
    int n, k, rows;             /* rows of W per group, inner dimension, tokens (all groups) */
    int out;                    /* enum gemm_out */
    int n_out;                  /* columns of y: n, or I for GEMM_SILU */
    float limit;                /* GEMM_SILU */
    int whole_tiles;            /* 1: no tile is split, results depend on nothing but the tile */
    float *partial;
    unsigned *tickets;
    /* grouped only */
    int groups;
    const int32_t *start;       /* [groups + 1] first entry of each group in the sorted list */
    const int32_t *tiles;       /* [groups + 1] first tile of each group */
    const int32_t *src;         /* sorted entry -> row of x; NULL: the entry itself */
    const int32_t *dst;         /* sorted entry -> row of y; NULL: the entry itself */
    const int32_t *pair;        /* sorted entry -> index into scale */
    const float *scale;         /* GEMM_SILU: multiplies the result, or NULL */
};

template <int NT> struct gemm_shape {
    static constexpr int BM = 128, BK = 64, THREADS = 256;
    static constexpr int TN = NT * 8;
    static constexpr int WARPS_N = NT >= 8 ? 2 : 1, WARPS_M = 8 / WARPS_N;
    static constexpr int MT = BM / 16 / WARPS_M, NW = NT / WARPS_N;     /* mma tiles per warp */
    static constexpr int W_BYTES = BM * BK * 2, X_BYTES = TN * BK * 2;
    static constexpr int STAGE = W_BYTES + X_BYTES;
    static constexpr int STAGES = NT <= 2 ? 6 : NT <= 4 ? 5 : NT <= 8 ? 4 : 3;
    static constexpr int SMEM = STAGE * STAGES;
    static constexpr int ACC = MT * NW * 4;
};

static __device__ __forceinline__ float silu_limited(float g, float u, float limit)
{
    if (limit > 0.f) {
        g = fminf(g, limit);
        u = fminf(fmaxf(u, -limit), limit);
    }
    return siluf(g) * u;
}

/* What gemm_put adds to, for those who can ask early. */
static __device__ __forceinline__ float gemm_was(const gemm_args &a, int64_t t, int n)
{
    const int64_t i = t * a.ld_y + n;
    return a.out == GEMM_BF16_ADD ? __bfloat162float(((const bf16 *)a.y)[i]) : a.out == GEMM_F32_ADD ? ((const float *)a.y)[i] : 0.f;
}

static __device__ __forceinline__ void gemm_put(const gemm_args &a, int64_t t, int n, float v, float was)
{
    const int64_t i = t * a.ld_y + n;
    if (a.out == GEMM_BF16 || a.out == GEMM_BF16_ADD)
        ((bf16 *)a.y)[i] = __float2bfloat16_rn(v + was);
    else
        ((float *)a.y)[i] = v + was;
}

static __device__ __forceinline__ void gemm_put(const gemm_args &a, int64_t t, int n, float v)
{
    int64_t i = t * a.ld_y + n;
    if (a.out == GEMM_BF16)
        ((bf16 *)a.y)[i] = __float2bfloat16_rn(v);
    else if (a.out == GEMM_BF16_ADD)
        ((bf16 *)a.y)[i] = __float2bfloat16_rn(v + __bfloat162float(((bf16 *)a.y)[i]));
    else if (a.out == GEMM_F32)
        ((float *)a.y)[i] = v;
    else
        ((float *)a.y)[i] += v;
}

/* A tile of the line: which rows of W, which tokens. */
struct gemm_tile {
    int64_t w_row;              /* first row of W, groups counted through */
    int m0;                     /* first row within the group */
    int t0, t_end;              /* entries */
};

template <int NT, bool GROUPED>
static __device__ __forceinline__ gemm_tile gemm_locate(const gemm_args &a, int tile, int m_tiles)
{
    gemm_tile g;
    if (!GROUPED) {
        int mt = tile % m_tiles, tt = tile / m_tiles;
        g.m0 = mt * 128;
        g.w_row = g.m0;
        g.t0 = tt * NT * 8;
        g.t_end = a.rows;
        return g;
    }
    int lo = 0, hi = a.groups;      /* last group whose first tile is <= tile */
    while (hi - lo > 1) {
        int mid = (lo + hi) >> 1;
        if (a.tiles[mid] <= tile)
            lo = mid;
        else
            hi = mid;
    }
    int in = tile - a.tiles[lo], end = a.start[lo + 1];
    int t_tiles = (end - a.start[lo] + NT * 8 - 1) / (NT * 8);
    g.m0 = in / t_tiles * 128;
    g.w_row = (int64_t)lo * a.n + g.m0;
    g.t0 = a.start[lo] + in % t_tiles * NT * 8;
    g.t_end = end;
    return g;
}

template <bool GROUPED>
static __device__ __forceinline__ int64_t gemm_row(const gemm_args &a, int t) { return GROUPED && a.dst != NULL ? a.dst[t] : t; }

/* Any output: lane holds rows r and r + 8 of W for tokens 2 (lane & 3) and the next. */
template <class S, bool GROUPED>
static __device__ __forceinline__ void gemm_store(const gemm_args &a, const gemm_tile &g, const float (&acc)[S::MT][S::NW][4], int wm, int wn,
                                                  int lane)
{
#pragma unroll
    for (int n = 0; n < S::NW; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int t = g.t0 + (wn * S::NW + n) * 8 + (lane & 3) * 2 + e;
            if (t >= g.t_end)
                continue;
            int64_t d = gemm_row<GROUPED>(a, t);
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                int r = g.m0 + (wm * S::MT + m) * 16 + (lane >> 2);
                if (r < a.n)
                    gemm_put(a, d, r, acc[m][n][e]);
                if (r + 8 < a.n)
                    gemm_put(a, d, r + 8, acc[m][n][2 + e]);
            }
        }
}

static __device__ __forceinline__ uint32_t gemm_transpose(uint32_t v)
{
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

/* bf16 results: 8 x 8 pieces are turned in registers, so that a lane stores two neighbours of one token. */
template <class S, bool GROUPED>
static __device__ __forceinline__ void gemm_store_bf16(const gemm_args &a, const gemm_tile &g, const float (&acc)[S::MT][S::NW][4], int wm,
                                                       int wn, int lane)
{
#pragma unroll
    for (int n = 0; n < S::NW; n++) {
        const int t = g.t0 + (wn * S::NW + n) * 8 + (lane >> 2), c = (lane & 3) * 2;
        const bool ok = t < g.t_end;
        bf16 *row = (bf16 *)a.y + (ok ? gemm_row<GROUPED>(a, t) * a.ld_y : 0);
        float scale[2] = { 1.f, 1.f };
        if (GROUPED && a.scale != NULL)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int te = g.t0 + (wn * S::NW + n) * 8 + c + e;
                scale[e] = te < g.t_end ? a.scale[a.pair[te]] : 0.f;
            }
#pragma unroll
        for (int m = 0; m < S::MT; m++) {
            const float *v = acc[m][n];
            const int r = g.m0 + (wm * S::MT + m) * 16;
            if (a.out == GEMM_SILU) {
                uint32_t o = gemm_transpose(pack2(silu_limited(v[0], v[2], a.limit) * scale[0], silu_limited(v[1], v[3], a.limit) * scale[1]));
                if (ok && r / 2 + c < a.n_out)
                    row[r / 2 + c] = __ushort_as_bfloat16((unsigned short)o);
                if (ok && r / 2 + c + 1 < a.n_out)
                    row[r / 2 + c + 1] = __ushort_as_bfloat16((unsigned short)(o >> 16));
            } else {
                uint32_t lo = gemm_transpose(pack2(v[0], v[1])), hi = gemm_transpose(pack2(v[2], v[3]));
                if (ok && r < a.n)
                    *(uint32_t *)(row + r + c) = lo;
                if (ok && r + 8 < a.n)
                    *(uint32_t *)(row + r + 8 + c) = hi;
            }
        }
    }
}

template <int NT, bool GROUPED>
static __global__ void __launch_bounds__(256, 2) gemm_stream_kernel(const gemm_args a)
{
    using S = gemm_shape<NT>;
    extern __shared__ __align__(128) unsigned char gemm_smem[];
    __shared__ unsigned sh_last;
    constexpr int kSumAhead = NT <= 2 ? 8 : NT <= 4 ? 4 : NT <= 8 ? 2 : 1;      /* pieces asked for before the first is added */
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int wm = warp % S::WARPS_M, wn = warp / S::WARPS_M;
    const uint32_t smem = smem_u32(gemm_smem);

    pdl_launch();
    if (GROUPED)
        pdl_wait();
    const int m_tiles = (a.n + 127) / 128, ku = (a.k + 63) / 64;
    const int n_tiles = GROUPED ? a.tiles[a.groups] : m_tiles * ((a.rows + S::TN - 1) / S::TN);
    const int64_t total = (int64_t)n_tiles * ku;
    /* No more blocks than units: every block between the first and the last of a tile must have a piece of it. */
    const int64_t most = a.whole_tiles ? n_tiles : total, grid = most < (int64_t)gridDim.x ? most : gridDim.x;
    int64_t u0 = 0, u1 = 0;
    if (blockIdx.x >= grid) {
        u1 = u0;
    } else if (a.whole_tiles) {
        u0 = (int64_t)n_tiles * blockIdx.x / grid * ku;
        u1 = (int64_t)n_tiles * (blockIdx.x + 1) / grid * ku;
    } else {
        u0 = total * blockIdx.x / grid;
        u1 = total * (blockIdx.x + 1) / grid;
    }
    const int nu = (int)(u1 - u0);
    if (nu <= 0) {
        if (!GROUPED)
            pdl_wait();
        return;
    }

    /* The loader runs ahead of the multiplier with its own position on the line. */
    int l_tile = (int)(u0 / ku), l_kb = (int)(u0 % ku);
    gemm_tile l = gemm_locate<NT, GROUPED>(a, l_tile, m_tiles);
    const int c_tile0 = l_tile, c_kb0 = l_kb;
    const int ch = tid & 7, row0 = tid >> 3;            /* 16-byte chunk and row this thread copies */

    auto load_w = [&](int stage) {
        const int kk = l_kb * 64 + ch * 8;
        const bf16 *src = a.w + (l.w_row + row0) * (int64_t)a.k + kk;
        uint32_t dst = smem + stage * S::STAGE + row0 * 128 + ((ch ^ (row0 & 7)) << 4);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            bool ok = l.m0 + row0 + j * 32 < a.n && kk < a.k;
            cp16(dst + j * 4096, ok ? src + (int64_t)j * 32 * a.k : a.w, ok);
        }
    };
    auto x_src = [&](int r, int kk, bool *ok) -> const bf16 * {
        int t = l.t0 + r;
        *ok = t < l.t_end && kk < a.k;
        if (!*ok)
            return a.x;
        if (GROUPED && a.src != NULL)
            t = a.src[t];
        return a.x + (int64_t)t * a.ld_x + kk;
    };
    auto load_x = [&](int stage) {
#pragma unroll
        for (int j = 0; j < (NT * 64 + 255) / 256; j++) {
            int i = tid + j * 256, r = i >> 3;
            if (NT * 64 % 256 == 0 || i < NT * 64) {
                bool ok;
                const bf16 *src = x_src(r, l_kb * 64 + ch * 8, &ok);
                cp16(smem + stage * S::STAGE + S::W_BYTES + r * 128 + ((ch ^ (r & 7)) << 4), src, ok);
            }
        }
    };
    auto advance = [&]() {
        if (++l_kb == ku) {
            l_kb = 0;
            l_tile++;
            if (l_tile < n_tiles)
                l = gemm_locate<NT, GROUPED>(a, l_tile, m_tiles);
        }
    };

#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++) {
        if (s < nu) {
            load_w(s);
            if (GROUPED)
                load_x(s);
            advance();
        }
        cp_commit();
    }
    if (!GROUPED) {
        /* x of the first units goes through registers: waiting on its cp.async would mean waiting for all of W above too. */
        const int saved_kb = l_kb, saved_tile = l_tile;
        const gemm_tile saved = l;
        l_tile = c_tile0;
        l_kb = c_kb0;
        l = gemm_locate<NT, GROUPED>(a, l_tile, m_tiles);
        pdl_wait();
#pragma unroll
        for (int s = 0; s < S::STAGES - 1; s++) {
            if (s < nu) {
#pragma unroll
                for (int j = 0; j < (NT * 64 + 255) / 256; j++) {
                    int i = tid + j * 256, r = i >> 3;
                    if (NT * 64 % 256 == 0 || i < NT * 64) {
                        bool ok;
                        const bf16 *src = x_src(r, l_kb * 64 + ch * 8, &ok);
                        uint4 v = ok ? *(const uint4 *)src : make_uint4(0, 0, 0, 0);
                        *(uint4 *)(gemm_smem + s * S::STAGE + S::W_BYTES + r * 128 + ((ch ^ (r & 7)) << 4)) = v;
                    }
                }
                advance();
            }
        }
        l_kb = saved_kb;
        l_tile = saved_tile;
        l = saved;
    }

    float acc[S::MT][S::NW][4];
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int n = 0; n < S::NW; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[m][n][e] = 0.f;

    int tile = c_tile0, kb = c_kb0, seg_kb = c_kb0;
    bool first_seg = true;
    for (int i = 0; i < nu; i++) {
        cp_wait<S::STAGES - 2>();
        __syncthreads();
        if (i + S::STAGES - 1 < nu) {
            int stage = (i + S::STAGES - 1) % S::STAGES;
            load_w(stage);
            load_x(stage);
            advance();
        }
        cp_commit();

        const uint32_t ws = smem + (i % S::STAGES) * S::STAGE, xs = ws + S::W_BYTES;
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            uint32_t af[S::MT][4];
#pragma unroll
            for (int m = 0; m < S::MT; m++) {
                int r = (wm * S::MT + m) * 16 + (lane & 15), c = kk * 2 + (lane >> 4);
                ldsm4(af[m], ws + r * 128 + ((c ^ (r & 7)) << 4));
            }
            if (S::NW == 1) {
                uint32_t b[2];
                int r = lane & 7, c = kk * 2 + ((lane >> 3) & 1);
                ldsm2(b, xs + r * 128 + ((c ^ (r & 7)) << 4));
#pragma unroll
                for (int m = 0; m < S::MT; m++)
                    mma16816(acc[m][0], af[m], b[0], b[1]);
            } else {
#pragma unroll
                for (int n = 0; n < S::NW / 2; n++) {
                    uint32_t b[4];
                    int r = (wn * S::NW + n * 2) * 8 + (lane & 7) + ((lane >> 4) << 3), c = kk * 2 + ((lane >> 3) & 1);
                    ldsm4(b, xs + r * 128 + ((c ^ (r & 7)) << 4));
#pragma unroll
                    for (int m = 0; m < S::MT; m++) {
                        mma16816(acc[m][n * 2], af[m], b[0], b[1]);
                        mma16816(acc[m][(n * 2 + 1) % S::NW], af[m], b[2], b[3]);
                    }
                }
            }
        }
        if (++kb < ku && i + 1 < nu)
            continue;

        /* End of this block's piece of a tile. */
        bool mine = true;
        if (seg_kb != 0 || kb != ku) {
            float4 *slot = (float4 *)(a.partial + ((int64_t)blockIdx.x * 2 + (first_seg ? 0 : 1)) * (256 * S::ACC));
            const float4 *flat = (const float4 *)&acc[0][0][0];
#pragma unroll
            for (int e = 0; e < S::ACC / 4; e++)
                slot[e * 256 + tid] = flat[e];
            __threadfence();
            __syncthreads();
            const int64_t from = (int64_t)tile * ku, to = from + ku - 1;
            const int b0 = (int)(((from + 1) * grid - 1) / total), b1 = (int)(((to + 1) * grid - 1) / total);
            if (tid == 0) {
                unsigned t = atomicAdd(&a.tickets[tile], 1u);
                sh_last = t == (unsigned)(b1 - b0);
                if (sh_last)
                    a.tickets[tile] = 0;
            }
            __syncthreads();
            mine = sh_last != 0;
            if (mine) {
                __threadfence();
                float4 *sum = (float4 *)&acc[0][0][0];
#pragma unroll
                for (int e = 0; e < S::ACC / 4; e++)
                    sum[e] = make_float4(0.f, 0.f, 0.f, 0.f);
                for (int b = b0; b <= b1; b += kSumAhead) {
                    float4 v[kSumAhead][S::ACC / 4];
#pragma unroll
                    for (int j = 0; j < kSumAhead; j++) {
                        /* Block b0 may have begun with an earlier tile: then this piece was its last one. */
                        int which = b + j == b0 && total * (b + j) / grid < from ? 1 : 0;
                        const float4 *p = (const float4 *)(a.partial + ((int64_t)(b + j) * 2 + which) * (256 * S::ACC));
#pragma unroll
                        for (int e = 0; e < S::ACC / 4; e++)
                            v[j][e] = b + j <= b1 ? __ldcg(p + e * 256 + tid) : make_float4(0.f, 0.f, 0.f, 0.f);
                    }
#pragma unroll
                    for (int j = 0; j < kSumAhead; j++)
#pragma unroll
                        for (int e = 0; e < S::ACC / 4; e++) {
                            sum[e].x += v[j][e].x;
                            sum[e].y += v[j][e].y;
                            sum[e].z += v[j][e].z;
                            sum[e].w += v[j][e].w;
                        }
                }
            }
        }
        if (mine) {
            const gemm_tile g = gemm_locate<NT, GROUPED>(a, tile, m_tiles);
            if (a.out == GEMM_SILU || (a.out == GEMM_BF16 && (a.n & 7) == 0 && (a.ld_y & 1) == 0))
                gemm_store_bf16<S, GROUPED>(a, g, acc, wm, wn, lane);
            else
                gemm_store<S, GROUPED>(a, g, acc, wm, wn, lane);
        }
#pragma unroll
        for (int m = 0; m < S::MT; m++)
#pragma unroll
            for (int n = 0; n < S::NW; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[m][n][e] = 0.f;
        if (kb == ku) {
            kb = 0;
            tile++;
        }
        seg_kb = kb;
        first_seg = false;
    }
    cp_wait<0>();
}

/** Launches gemm_stream for `tokens` columns per tile at most (8, 16, 32, 64 or 128). */
template <bool GROUPED>
static int gemm_stream(arle_device *dev, cudaStream_t st, gemm_args a, int out, int tokens)
{
    a.out = out;
    a.partial = dev->partial;
    a.tickets = dev->tickets;
    dim3 grid((unsigned)(2 * dev->n_sm));
    bump(dev, COUNT_GEMM_STREAM);
    if (tokens <= 8)
        return launch(dev, st, gemm_stream_kernel<1, GROUPED>, grid, dim3(256), gemm_shape<1>::SMEM, a);
    if (tokens <= 16)
        return launch(dev, st, gemm_stream_kernel<2, GROUPED>, grid, dim3(256), gemm_shape<2>::SMEM, a);
    if (tokens <= 32)
        return launch(dev, st, gemm_stream_kernel<4, GROUPED>, grid, dim3(256), gemm_shape<4>::SMEM, a);
    if (tokens <= 64)
        return launch(dev, st, gemm_stream_kernel<8, GROUPED>, grid, dim3(256), gemm_shape<8>::SMEM, a);
    return launch(dev, st, gemm_stream_kernel<16, GROUPED>, grid, dim3(256), gemm_shape<16>::SMEM, a);
}

#endif
