/*
 * gemm_tma: y[t, n] = sum_k x[t, k] W[n, k] for 3 to 64 tokens on compute capability 9.0, W streamed once at memory speed.
 *
 * Two threads ask the copy engine for boxes of W and x, one warpgroup multiplies them where they land; nothing else passes through
 * registers. Tokens are the product's 64 rows (fewer: the rows past them multiply what lies there, and are dropped), rows of W its
 * columns: 64 to 160, so chosen that every multiprocessor gets one tile. Where W has too few rows for that, the blocks of a cluster
 * share a tile along K; parts are added up in the order of the blocks, so that results do not depend on timing.
 *
 * The next kernel is let in shortly before the last box of W is asked for. Its own first boxes of W then follow at once, while
 * this one finishes. A norm before the product: x is multiplied with its weights on the way to the product's operand, which then
 * comes from the registers, and the scale of a token comes after it.
 */
#ifndef BACKEND_CUDA_GEMM_TMA_CUH
#define BACKEND_CUDA_GEMM_TMA_CUH

#include "gemm.cuh"
#include "wgmma.cuh"

/*
 * Bytes. kTmaMemory: the ring of a block, two of which fit one multiprocessor. kTmaFlight: W under way at a time; whatever else a
 * multiprocessor asks of the memory, the last steps of the kernel before this one among it, waits behind that. kTmaLeft: W not yet asked
 * for when the next kernel is let in, up to 16 tokens and from there on. H100, four products of a layer at 16 rows: 85 us (36, 50 KB); 86
 * and 90 (24 and 60 KB under way); 91 and 90 (nothing and 100 KB left). A step with 50, 64, 80, 110 KB left: 3.82, 3.81, 3.82, 3.96 ms at
 * 8 rows; 7.29 (50), 7.33, 7.36 ms at 64 rows.
 */
const int kTmaMemory = 108 * 1024, kTmaFlight = 36 * 1024, kTmaLeft = 64 * 1024, kTmaLeftMany = 50 * 1024,
          kTmaStages = 10;

struct tma_args {
    gemm_args g;
    int split;                  /* blocks that share a tile */
    const float *norm_w;        /* NULL: x as it is */
    float eps, w_offset;
};

/* TN: tokens; N16: rows of W per tile, in sixteens. A stage: [TN] then [16 N16] rows of 64 columns. */
template <int TN, int N16> struct tma_shape {
    static constexpr int N = N16 * 16, X_BYTES = TN * 128, STAGE = X_BYTES + N * 128;
    static constexpr int FIT = kTmaMemory / STAGE, STAGES = FIT < kTmaStages ? FIT : kTmaStages;
    static constexpr int SMEM = STAGE * STAGES + 1024;      /* boxes are aligned to 1024 bytes */
    static constexpr int LINES = TN * (N + 8) * 4;          /* for tma_store_lines */
    static constexpr int BARS = 3 * STAGES + 1, STATIC = BARS * 8 + STAGES * 256 + 256;     /* STATIC: shared memory besides, at least */
    static constexpr int THREADS = N16 < 9 ? 512 : 384;    /* at most; 192 work, see gemm_tma_launch */
    static constexpr int UNDER_WAY = (kTmaFlight + N * 128 - 1) / (N * 128), FLIGHT = UNDER_WAY < STAGES ? UNDER_WAY : STAGES;
    static constexpr int LEFT = (TN > 16 ? kTmaLeftMany : kTmaLeft) / (N * 128);        /* as FLIGHT: boxes of W */
};

/* Whether rows of results end with an eight and are aligned for pairs. */
static __host__ __device__ __forceinline__ bool tma_eights(const gemm_args &a)
{
    return a.n % 8 == 0 && a.n_out % 8 == 0 && a.ld_y % 2 == 0 && ((uintptr_t)a.y & 7) == 0;
}

/* Whether results leave by tma_store_lines, which takes memory of its own. */
static __host__ __device__ __forceinline__ bool tma_lines(const tma_args &a, bool once)
{
    return !once && a.norm_w == NULL && a.g.out == GEMM_F32 && a.g.n % 4 == 0 && a.g.ld_y % 4 == 0 && ((uintptr_t)a.g.y & 15) == 0;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* A box at column k of row `row`; zeros where it leaves the matrix. */
static __device__ __forceinline__ void tma_box(uint32_t dst, const CUtensorMap *map, int k, int row, uint32_t bar, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(dst), "l"(map), "r"(k), "r"(row), "r"(bar), "l"(policy) : "memory");
}

template <bool FIRST> static __device__ __forceinline__ uint64_t tma_policy()
{
    uint64_t p;
    if (FIRST)
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
    else
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
    return p;
}

/* d (+)= A B^T: A 64 x 16, B 16, 32 or 64 x 16, both in shared memory with the inner dimension contiguous. */
static __device__ __forceinline__ void tma_product(float (&d)[8], uint64_t a, uint64_t b, int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
                 : "l"(a), "l"(b), "r"(accumulate));
}
static __device__ __forceinline__ void tma_product(float (&d)[16], uint64_t a, uint64_t b, int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
                 : "l"(a), "l"(b), "r"(accumulate));
}
static __device__ __forceinline__ void tma_product(float (&d)[32], uint64_t a, uint64_t b, int accumulate)
{
    wgmma_ss(d, a, b, accumulate);
}

/* The same with A in registers. */
static __device__ __forceinline__ void tma_product(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, "
                 "p, 1, 1, 0;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
static __device__ __forceinline__ void tma_product(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
static __device__ __forceinline__ void tma_product(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate)
{
    wgmma_reg_64x64(d, a, b, accumulate);
}

/* One step of 16 columns: d[token][row of W] (+)= x W^T. x: in shared memory (wgmma_desc), or in registers. */
template <int N, class A>
static __device__ __forceinline__ void tma_products(float (&d)[N / 2], const A &x, uint32_t w, int accumulate)
{
    constexpr int full = N / 64, half = N & 32, quarter = N & 16;
#pragma unroll
    for (int i = 0; i < full; i++)
        tma_product(*reinterpret_cast<float (*)[32]>(d + i * 32), x, wgmma_desc(w + i * 8192, 16), accumulate);
    if (half)
        tma_product(*reinterpret_cast<float (*)[16]>(d + full * 32), x, wgmma_desc(w + full * 8192, 16), accumulate);
    if (quarter)
        tma_product(*reinterpret_cast<float (*)[8]>(d + full * 32 + half / 2), x, wgmma_desc(w + full * 8192 + half * 128, 16),
                    accumulate);
}

/* The warpgroup that multiplies, without the warps that load. */
static __device__ __forceinline__ void tma_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

/* The threads of a cluster's blocks wait for each other (those that have left do not count); says nothing about memory. */
static __device__ __forceinline__ void cluster_arrive()
{
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
static __device__ __forceinline__ void cluster_wait()
{
    __syncwarp();
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

/* `bytes` from here to `dst` in the shared memory of block `rank` of the cluster, counted by the barrier at `bar` there. */
static __device__ __forceinline__ void cluster_copy(uint32_t dst, uint32_t bar, int rank, uint32_t src, int bytes)
{
    asm volatile("{\n.reg .b32 r, b;\nmapa.shared::cluster.u32 r, %0, %2;\nmapa.shared::cluster.u32 b, %1, %2;\n"
                 "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [r], [%3], %4, [b];\n}\n"
                 ::"r"(dst), "r"(bar), "r"(rank), "r"(src), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void shared_put2(uint32_t addr, float x, float y)
{
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(addr), "f"(x), "f"(y) : "memory");
}
static __device__ __forceinline__ float4 shared4(uint32_t addr)
{
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(addr) : "memory");
    return v;
}

/* A tile from the registers: a lane holds tokens t and t + 8, of every eight rows of W two neighbours. Rows end with an eight. */
template <int N>
static __device__ __forceinline__ void tma_store(const gemm_args &a, int m0, const float (&d)[N / 2], int t, int lane,
                                                 const float (&scale)[2])
{
#pragma unroll
    for (int e = 0; e < 2; e++) {
        if (t + e * 8 >= a.rows)
            continue;
        const float s = scale[e];
        const int64_t row = (t + e * 8) * a.ld_y;
        if (a.out == GEMM_SILU) {
            bf16 *y = (bf16 *)a.y + row + m0 / 2 + 2 * (lane & 3);
#pragma unroll
            for (int j = 0; j < N / 8; j += 2) {
                const float *g = d + 4 * j + 2 * e, *u = g + 4;
                if (m0 / 2 + j * 4 < a.n_out)
                    *(uint32_t *)(y + j * 4) = pack2(silu_limited(g[0] * s, u[0] * s, a.limit),
                                                     silu_limited(g[1] * s, u[1] * s, a.limit));
            }
        } else if (a.out == GEMM_F32) {
            float *y = (float *)a.y + row + m0 + 2 * (lane & 3);
#pragma unroll
            for (int j = 0; j < N / 8; j++)
                if (m0 + j * 8 < a.n)
                    *(float2 *)(y + j * 8) = make_float2(d[4 * j + 2 * e] * s, d[4 * j + 2 * e + 1] * s);
        } else {
            bf16 *y = (bf16 *)a.y + row + m0 + 2 * (lane & 3);
#pragma unroll
            for (int j = 0; j < N / 8; j++)
                if (m0 + j * 8 < a.n)
                    *(uint32_t *)(y + j * 8) = pack2(d[4 * j + 2 * e] * s, d[4 * j + 2 * e + 1] * s);
        }
    }
}

/* Four neighbours of a tile, from n on. `whole`: they all exist and are aligned. */
static __device__ __forceinline__ void tma_put4(const gemm_args &a, int t, int n, float4 v, bool whole, uint2 old)
{
    const int64_t i = t * a.ld_y + n;
    if (whole && a.out == GEMM_F32) {
        *(float4 *)((float *)a.y + i) = v;
    } else if (whole && (a.out == GEMM_BF16 || a.out == GEMM_BF16_ADD)) {
        const float2 lo = unpack2(old.x), hi = unpack2(old.y);      /* zeros for GEMM_BF16 */
        *(uint2 *)((bf16 *)a.y + i) = make_uint2(pack2(v.x + lo.x, v.y + lo.y), pack2(v.z + hi.x, v.w + hi.y));
    } else {
        const float f[4] = { v.x, v.y, v.z, v.w };
#pragma unroll 1
        for (int e = 0; e < 4 && n + e < a.n; e++)
            gemm_put(a, t, n + e, e == 0 ? f[0] : e == 1 ? f[1] : e == 2 ? f[2] : f[3]);
    }
}

/* Four units of an MLP from their gates and their other halves, from o on. */
static __device__ __forceinline__ void tma_units4(const gemm_args &a, int t, int o, float4 g, float4 u, bool whole)
{
    const float f[4] = { silu_limited(g.x, u.x, a.limit), silu_limited(g.y, u.y, a.limit), silu_limited(g.z, u.z, a.limit),
                         silu_limited(g.w, u.w, a.limit) };
    bf16 *y = (bf16 *)a.y + t * a.ld_y + o;
    if (whole && o + 3 < a.n_out) {
        *(uint2 *)y = make_uint2(pack2(f[0], f[1]), pack2(f[2], f[3]));
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        if (o + e < a.n_out)
            y[e] = __float2bfloat16_rn(f[e]);
}

/* A tile of f32 results by way of shared memory, so that whole lines are written, and while the next tile is worked on. They leave the
 * cache before anything else does: logits of 64 rows do not fit there. `stage`: [token][N + 8] floats. */
template <int N>
static __device__ __forceinline__ void tma_store_lines(const gemm_args &a, int m0, const float (&d)[N / 2], uint32_t stage, int warp,
                                                       int tid)
{
    const int lane = tid & 31, t = warp * 16 + (lane >> 2);
    if (tid < a.rows)
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    tma_sync();             /* the tile before has been read */
    if (warp * 16 < a.rows) {
        const uint32_t at = stage + (t * (N + 8) + 2 * (lane & 3)) * 4;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            shared_put2(at + j * 32, d[4 * j], d[4 * j + 1]);
            shared_put2(at + j * 32 + (N + 8) * 32, d[4 * j + 2], d[4 * j + 3]);
        }
    }
    wgmma_publish();
    tma_sync();
    if (tid < a.rows)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;\ncp.async.bulk.commit_group;"
                     ::"l"((float *)a.y + tid * a.ld_y + m0), "r"(stage + tid * (N + 8) * 4), "r"(min(N, a.n - m0) * 4),
                       "l"(tma_policy<true>()) : "memory");
}

/* What a block finishes of a tile: whole tokens, four neighbours (item) at a time. */
struct tma_part {
    int t0, own, items;         /* first token, tokens, items */
    uint2 old[4];               /* GEMM_BF16_ADD: what a thread's first four items are added to */
    bool whole;                 /* fours are aligned, and end where W ends */
};

static __device__ __forceinline__ uint2 tma_old(const gemm_args &a, int t, int n, bool whole)
{
    return whole && a.out == GEMM_BF16_ADD && n < a.n ? *(const uint2 *)((const bf16 *)a.y + t * a.ld_y + n) : make_uint2(0, 0);
}

template <int TN, int N>
static __device__ __forceinline__ tma_part tma_part_of(const gemm_args &a, int m0, int split, int rank, int tid, bool may_add)
{
    tma_part p = {};
    p.own = TN / split;
    p.t0 = rank * p.own;
    p.items = min(max(a.rows - p.t0, 0), p.own) * (a.out == GEMM_SILU ? N / 8 : N / 4);
    p.whole = (a.n & 3) == 0 && (a.ld_y & 3) == 0 && ((uintptr_t)a.y & 15) == 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int i = tid + j * 128;
        if (i < p.items && may_add)
            p.old[j] = tma_old(a, p.t0 + i / (N / 4), m0 + i % (N / 4) * 4, p.whole);
    }
    return p;
}

/*
 * The end of a block's only tile, in the place of the ring: [token][N + 8] floats of this block; behind them [block][token][N + 8] of
 * the tokens that this block finishes, each part copied by the block that made it, and added up in the order of the blocks. Code that
 * runs once costs its way from memory, so it is short. bar: nobody's yet.
 */
template <int TN, int N>
static __device__ __forceinline__ void tma_finish(const tma_args &a, int m0, uint32_t own, const float (&d)[N / 2], const float *scale,
                                                  uint32_t bar, const tma_part &p, int rank, int tid)
{
    constexpr int PAD = N + 8;      /* two tokens' pairs fall into different banks */
    const int lane = tid & 31, t = (tid >> 5) * 16 + (lane >> 2);
    if (a.split > 1)
        cluster_arrive();   /* this warp is done with the ring */
    tma_sync();             /* and so are the slower ones */
    if (t < TN) {
        const uint32_t at = own + (t * PAD + 2 * (lane & 3)) * 4;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            shared_put2(at + j * 32, d[4 * j], d[4 * j + 1]);
            shared_put2(at + j * 32 + PAD * 32, d[4 * j + 2], d[4 * j + 3]);
        }
    }
    uint32_t red = own;
    if (a.split > 1) {
        const int bytes = p.own * PAD * 4;
        red = own + TN * PAD * 4;
        if (tid == 0)
            mbar_expect(bar, bytes * a.split);
        wgmma_publish();
        tma_sync();
        cluster_wait();     /* all rings are done with */
        if (tid < a.split)
            cluster_copy(red + rank * bytes, bar, tid, own + tid * bytes, bytes);
        mbar_wait(bar, 0);
        cluster_arrive();
    } else {
        tma_sync();
    }
    auto sum = [&](int token, int r) {
        const uint32_t at = red + (token * PAD + r) * 4;
        float4 s = shared4(at);
#pragma unroll 4
        for (int b = 1; b < a.split; b++) {
            const float4 v = shared4(at + b * p.own * PAD * 4);
            s = make_float4(s.x + v.x, s.y + v.y, s.z + v.z, s.w + v.w);
        }
        const float f = scale != NULL ? scale[token] : 1.f;
        return make_float4(s.x * f, s.y * f, s.z * f, s.w * f);
    };
    if (a.g.out == GEMM_SILU)
#pragma unroll 2
        for (int i = tid; i < p.items; i += 128) {
            const int token = i / (N / 8), q = i % (N / 8), r = (q >> 1) * 16 + (q & 1) * 4;
            tma_units4(a.g, p.t0 + token, m0 / 2 + q * 4, sum(token, r), sum(token, r + 8), p.whole);
        }
    else
#pragma unroll 1
        for (int i = tid, j = 0; i < p.items; i += 128, j++) {
            const int token = i / (N / 4), q = i % (N / 4);
            if (m0 + q * 4 >= a.g.n)
                continue;
            uint2 old = j == 0 ? p.old[0] : j == 1 ? p.old[1] : j == 2 ? p.old[2] : p.old[3];
            if (j > 3)
                old = tma_old(a.g, p.t0 + token, m0 + q * 4, p.whole);
            tma_put4(a.g, p.t0 + token, m0 + q * 4, sum(token, q * 4), p.whole, old);
        }
    if (a.split > 1)
        cluster_wait();     /* what the others were sent lay here until they had it */
}

/*
 * Sixteen tokens, a warp's, of a box of x times the norm's weights, as operands of four steps; ss gathers the squares of a lane's two
 * tokens. x: where this lane's pieces begin (tma_piece); nw: the box's 64 weights, from this lane's first pair on.
 */
static __device__ __forceinline__ void tma_normed(uint32_t (&f)[4][4], uint32_t x, uint32_t nw, float offset, float (&ss)[2])
{
    float2 w[8];
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        ldsm4(f[kk], x ^ kk * 32);
#pragma unroll
    for (int c = 0; c < 8; c++)
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(w[c].x), "=f"(w[c].y) : "r"(nw + c * 32) : "memory");
#pragma unroll
    for (int c = 0; c < 8; c++) {
        w[c].x += offset;
        w[c].y += offset;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t &p = f[c >> 1][2 * (c & 1) + e];
            const float2 v = unpack2(p);
            ss[e] = fmaf(v.x, v.x, ss[e]);
            ss[e] = fmaf(v.y, v.y, ss[e]);
            p = pack2(v.x * w[c].x, v.y * w[c].y);
        }
    }
}

/* After the wait for products: until here their operands stay in these registers. */
static __device__ __forceinline__ void tma_hold(uint32_t (&f)[4][4])
{
#pragma unroll
    for (int i = 0; i < 16; i++)
        asm volatile("" : "+r"(f[i >> 2][i & 3])::"memory");
}

/* Of a box of x: where the piece lies that a lane names to ldsm4; that of step kk is 32 kk further, by the swizzle. */
static __device__ __forceinline__ uint32_t tma_piece(int warp, int lane)
{
    const int row = warp * 16 + (lane & 15);
    return row * 128 + (((lane >> 4) ^ (row & 7)) << 4);
}

/* Keeps the compiler from working an address out again each time. */
static __device__ __forceinline__ uint32_t tma_kept(uint32_t addr)
{
    asm volatile("" : "+r"(addr));
    return addr;
}

#endif

template <int TN, int N16, bool NORM>
static __global__ void __launch_bounds__(tma_shape<TN, N16>::THREADS)
gemm_tma_kernel(const __grid_constant__ tma_args a, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using S = tma_shape<TN, N16>;
    extern __shared__ unsigned char tma_mem[];
    __shared__ __align__(8) uint64_t bars[S::BARS];
    __shared__ __align__(128) float norm_w[S::STAGES][64];
    __shared__ float scale[64];         /* the norm's, of each token */
    const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
    if (warp > 5)
        return;             /* there for their registers */
    const uint32_t smem = (smem_u32(tma_mem) + 1023) & ~1023u, w_full = smem_u32(bars), x_full = w_full + 8 * S::STAGES,
                   empty = x_full + 8 * S::STAGES, join = empty + 8 * S::STAGES;

    /* A cluster takes a tile, a block its part of the tile's units; blocks without partners walk over the tiles. */
    const int n_tiles = (a.g.n + S::N - 1) / S::N, ku = (a.g.k + 63) / 64;
    const int rank = blockIdx.x % a.split, tile0 = blockIdx.x / a.split;
    const int kb0 = ku * rank / a.split, kb1 = ku * (rank + 1) / a.split, step = gridDim.x / a.split;
    const int len = kb1 - kb0, nu = (n_tiles - tile0 + step - 1) / step * len;
    if (tid == 0) {
        for (int s = 0; s < S::STAGES; s++) {
            mbar_init(w_full + 8 * s, 1);
            mbar_init(x_full + 8 * s, 1);
            mbar_init(empty + 8 * s, 4);        /* one arrival a warp */
        }
        mbar_init(join, 1);
        mbar_publish();
    }
    if (NORM && a.g.k % 64 != 0 && tid < 64) {      /* past the end x is zero, and no weights come: what lies there must be numbers */
        for (int s = 0; s < S::STAGES; s++)
            norm_w[s][tid] = 0.f;
        wgmma_publish();
    }
    __syncthreads();

    if (warp >= 4) {
        /* Warp 4 asks for W, warp 5 for x. */
        if (lane != 0)
            return;
        const bool is_w = warp == 4;
        const uint64_t policy = is_w ? tma_policy<true>() : tma_policy<false>();
        int tile = tile0, j = 0;
        auto norm_weights = [&](int s, int kb) {
            const int bytes = NORM ? min(a.g.k - kb * 64, 64) * 4 : 0;
            if (bytes > 0)
                bulk_load(smem_u32(norm_w[s]), a.norm_w + kb * 64, bytes, x_full + 8 * s);
            return bytes;
        };
        int early = 0;      /* boxes whose weights of the norm are asked for before the kernel before this one has ended */
        if (!is_w) {
            for (; NORM && early < min(len, S::STAGES); early++)
                norm_weights(early, kb0 + early);
            pdl_wait();
        }
        for (int i = 0; i < nu; i++) {
            const int s = i % S::STAGES, kb = kb0 + j;
            if (i >= S::STAGES)
                mbar_wait(empty + 8 * s, (i / S::STAGES - 1) & 1);
            if (is_w) {
                const int before = i - S::FLIGHT;
                if (before >= 0)
                    mbar_wait(w_full + 8 * (before % S::STAGES), before / S::STAGES & 1);
                mbar_expect(w_full + 8 * s, S::N * 128);
                tma_box(smem + s * S::STAGE + S::X_BYTES, &w_map, kb * 64, tile * S::N, w_full + 8 * s, policy);
            } else {
                mbar_expect(x_full + 8 * s, S::X_BYTES + (i < early ? min(a.g.k - kb * 64, 64) * 4 : norm_weights(s, kb)));
                tma_box(smem + s * S::STAGE, &x_map, kb * 64, 0, x_full + 8 * s, policy);
            }
            if (++j == len) {
                j = 0;
                tile += step;
            }
            /* Not earlier: the first boxes of what runs next are to come after the last of these. */
            if (is_w && i == max(nu - 1 - S::LEFT, 0))
                pdl_launch();
        }
        return;
    }

    const bool once = nu == len;
    /* With tokens enough for all warps, results may go from the registers where they can. */
    const bool direct = TN > 16 && a.split == 1 && a.g.out != GEMM_BF16_ADD && a.g.out != GEMM_F32_ADD && tma_eights(a.g);
    static_assert(S::SMEM - 1024 >= 2 * TN * (S::N + 8) * 4, "parts meet in the place of the ring");
    const bool lines = tma_lines(a, once);
    float d[S::N / 2];
    const uint32_t piece = tma_kept(smem + tma_piece(warp, lane)), weights = tma_kept(smem_u32(norm_w) + (lane & 3) * 8),
                   full = tma_kept(w_full);
    pdl_wait();             /* y belongs to the kernels before until now */
    tma_part part = {};
    if (once && !direct)
        part = tma_part_of<TN, S::N>(a.g, tile0 * S::N, a.split, rank, tid, !NORM);
    int s = 0, last = 0;    /* stages of this box and of the one before */
    uint32_t parity = 0;
    auto next = [&]() {
        last = s;
        if (++s == S::STAGES) {
            s = 0;
            parity ^= 1;
        }
    };
    for (int tile = tile0; tile < n_tiles; tile += step) {
        float ss[2] = {};
        uint32_t even[4][4] = {}, odd[4][4] = {};       /* x of this box and of the one before, which may still be read */
        for (int j = 0; j < len; j++, next()) {
            const uint32_t xs = smem + s * S::STAGE, ws = xs + S::X_BYTES, ready = full + 8 * s, done = full + 8 * (2 * S::STAGES + last);
            /* f: this box's operands. Those before it are free once the products before have ended, and their stage with them. */
            auto normed = [&](uint32_t (&f)[4][4], uint32_t (&before)[4][4]) {
                if (warp * 16 < TN) {
                    mbar_wait(ready + 8 * S::STAGES, parity);
                    tma_normed(f, piece + s * S::STAGE, weights + s * 256, a.w_offset, ss);
                }
                mbar_wait(ready, parity);
                wgmma_wait<0>();
                tma_hold(before);
                if (j > 0 && lane == 0)
                    mbar_arrive(done);
                wgmma_fence();
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
                    tma_products<S::N>(d, f[kk], ws + kk * 32, j > 0 || kk > 0);
                wgmma_commit();
            };
            if (NORM) {
                if (j & 1)
                    normed(odd, even);
                else
                    normed(even, odd);
                continue;
            }
            mbar_wait(ready + 8 * S::STAGES, parity);
            mbar_wait(ready, parity);
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
                tma_products<S::N>(d, wgmma_desc(xs + kk * 32, 16), ws + kk * 32, j > 0 || kk > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (j > 0 && lane == 0)
                mbar_arrive(done);
        }
        wgmma_wait<0>();
        wgmma_hold(d);
        if (NORM) {
            tma_hold(even);
            tma_hold(odd);
        }
        if (lane == 0)
            mbar_arrive(empty + 8 * last);
        if (NORM) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float v = ss[e];
                v += __shfl_xor_sync(0xffffffffu, v, 1);
                v += __shfl_xor_sync(0xffffffffu, v, 2);
                if ((lane & 3) == 0 && warp * 16 < TN)
                    scale[warp * 16 + (lane >> 2) + e * 8] = rsqrtf(v / (float)a.g.k + a.eps);
            }
            tma_sync();
        }
        if (once && !direct) {
            tma_finish<TN, S::N>(a, tile * S::N, smem, d, NORM ? scale : NULL, join, part, rank, tid);
            break;
        }
        if (lines) {
            tma_store_lines<S::N>(a.g, tile * S::N, d, smem + S::STAGE * S::STAGES, warp, tid);
            continue;
        }
        const int t = warp * 16 + (lane >> 2);
        if (warp * 16 < TN) {
            const float f[2] = { NORM ? scale[t] : 1.f, NORM ? scale[t + 8] : 1.f };
            tma_store<S::N>(a.g, tile * S::N, d, t, lane, f);
        }
    }
    if (lines && tid < a.g.rows)
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

/* How a product is cut: rows of W per tile in sixteens, blocks that share a tile, bytes that the busiest multiprocessor moves. */
struct tma_plan { int n16, split; int64_t cost; };

/*
 * The cut that leaves the busiest multiprocessor the least to move: its tiles; x at a quarter, since it comes from the L2 cache; parts of
 * a shared tile, at 14 KB/us where a multiprocessor's part of the memory's bandwidth is 23 (H100). Clusters do not reach all
 * multiprocessors (of four blocks, 30 on 132); one cluster more, and two of its blocks share one with others: 20 % slower.
 */
static inline tma_plan tma_choose(const arle_device *dev, int64_t n, int64_t k, int tokens, int most_split)
{
    tma_plan best = { 8, 1, INT64_MAX };
    const int64_t ku = ceil_div(k, 64);
    for (int n16 = 4; n16 <= 10; n16++)
        for (int i = 0, split = 1; split <= most_split; i++, split *= 2) {
            const int64_t rows = n16 * 16, tiles = ceil_div(n, rows), joined = split > 1 ? tokens * (rows + 8) * 4 * 8 / 5 : 0;
            const int64_t cost = ceil_div(tiles * split, dev->n_sm) * ceil_div(ku, split) * (rows + tokens / 4) * 128 + joined;
            if (split > 1 && (tiles > dev->tma_clusters[i] || ku < 2 * split))
                continue;
            if (tiles > dev->n_sm && kTmaMemory / ((tokens + rows) * 128) < 5)
                continue;       /* fewer stages do not last while the results of a tile leave */
            if (cost < best.cost)
                best = { n16, split, cost };
        }
    return best;
}

/*
 * A multiprocessor is to take a block of one product and one of the next, but not two of the same, which are what it would be given where
 * it is early done with the product before: up to 52 of 132, then, and as many none. So blocks take more than half of one thing, in turns
 * of the shared memory and of the registers, by threads that end at once. Up to 16 tokens that makes no difference.
 */
template <int TN, int N16, bool NORM>
static int gemm_tma_launch(arle_device *dev, cudaStream_t st, const tma_args &a)
{
    using S = tma_shape<TN, N16>;
    static int regs;
    CUtensorMap w, x;
    if (!matrix_map(&w, a.g.w, a.g.n, a.g.k, a.g.k, S::N, 64) || !matrix_map(&x, a.g.x, a.g.rows, a.g.k, a.g.ld_x, TN, 64))
        return cuda_fail(dev, cudaErrorInvalidValue, "cuTensorMapEncodeTiled", __FILE__, __LINE__);
    if (regs == 0) {
        cudaFuncAttributes f;
        CUDA_TRY(dev, cudaFuncGetAttributes(&f, (const void *)gemm_tma_kernel<TN, N16, NORM>));
        CUDA_TRY(dev, share_sm((const void *)gemm_tma_kernel<TN, N16, NORM>, TN > 16));
        regs = (f.numRegs + 7) / 8 * 8;
    }
    bump(dev, COUNT_GEMM_TMA);
    const int64_t blocks = ceil_div(a.g.n, S::N) * a.split;
    const bool once = blocks <= dev->n_sm;
    int smem = S::SMEM + (tma_lines(a, once) ? S::LINES : 0), threads = 192;
    const int half = (int)dev->sm_smem / 2 - 1024 + 128 - S::STATIC + (NORM ? 0 : 256);     /* no scales without a norm */
    dev->tma_by_regs = smem < half && !dev->tma_by_regs;
    if (TN > 16 && dev->tma_by_regs)
        threads = 32 * (32768 / (32 * regs) + 1);
    else if (TN > 16 && smem < half)
        smem = half;
    return launch_clusters(dev, st, a.split, gemm_tma_kernel<TN, N16, NORM>, dim3((unsigned)(once ? blocks : dev->n_sm)),
                           dim3(threads < 192 ? 192 : threads > S::THREADS ? S::THREADS : threads), smem, a, w, x);
}

template <int TN, bool NORM>
static int gemm_tma_tokens(arle_device *dev, cudaStream_t st, tma_args a)
{
    const tma_plan p = tma_choose(dev, a.g.n, a.g.k, TN, a.norm_w != NULL ? 1 : 8);
    a.split = p.split;
    switch (p.n16) {
    case 4: return gemm_tma_launch<TN, 4, NORM>(dev, st, a);
    case 5: return gemm_tma_launch<TN, 5, NORM>(dev, st, a);
    case 6: return gemm_tma_launch<TN, 6, NORM>(dev, st, a);
    case 7: return gemm_tma_launch<TN, 7, NORM>(dev, st, a);
    case 8: return gemm_tma_launch<TN, 8, NORM>(dev, st, a);
    case 9: return gemm_tma_launch<TN, 9, NORM>(dev, st, a);
    default: return gemm_tma_launch<TN, 10, NORM>(dev, st, a);
    }
}

static inline bool tma_ready(arle_device *dev)
{
    if (dev->tma_code != 0)
        return dev->tma_code > 0;
    const void *kernel = (const void *)gemm_tma_kernel<16, 4, false>;
    const int alone = (int)dev->max_smem - 8192;       /* no two blocks have so much; some of it is static */
    dev->tma_code = has_code(kernel) ? 1 : -1;
    for (int i = 0; i < 4 && dev->tma_code > 0; i++) {
        cudaLaunchAttribute attr = {};
        attr.id = cudaLaunchAttributeClusterDimension;
        attr.val.clusterDim.x = 1u << i;
        attr.val.clusterDim.y = attr.val.clusterDim.z = 1;
        cudaLaunchConfig_t cfg = {};
        cfg.gridDim = dim3(8);
        cfg.blockDim = dim3(192);
        cfg.dynamicSmemBytes = alone;
        cfg.attrs = &attr;
        cfg.numAttrs = 1;
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, alone) != cudaSuccess
            || cudaOccupancyMaxActiveClusters(&dev->tma_clusters[i], kernel, &cfg) != cudaSuccess) {
            cudaGetLastError();
            dev->tma_clusters[i] = 0;
        }
    }
    return dev->tma_code > 0;
}
const int kTmaFrom = 2;         /* up to so many rows gemv is faster */

/** Whether gemm_tma serves a (its `out` as well) here: 9.0, rows of 16 bytes, not in deterministic mode. */
static inline bool gemm_tma_fits(arle_device *dev, const gemm_args &a, bool norm)
{
    if (dev->cc != 90 || dev->deterministic || a.rows <= kTmaFrom || a.rows > dev->tma_rows || a.k % 8 != 0 || a.ld_x % 8 != 0
        || ((uintptr_t)a.x & 15) != 0 || tensor_map_encoder() == NULL || !tma_ready(dev))
        return false;
    const int tokens = a.rows <= 16 ? 16 : a.rows <= 32 ? 32 : 64;
    const tma_plan p = tma_choose(dev, a.n, a.k, tokens, norm ? 1 : 8);
    /* A norm is for blocks that see all of a token. Where shared tiles save more than a kernel for the norm takes (2 us), it has one. */
    if (norm && p.cost > tma_choose(dev, a.n, a.k, tokens, 8).cost + 48 * 1024)
        return false;
    /* Blocks with more than one tile store plain results in eights, and nothing else. */
    return ceil_div(a.n, p.n16 * 16) * p.split <= dev->n_sm
        || (tma_eights(a) && a.out != GEMM_BF16_ADD && a.out != GEMM_F32_ADD);
}

template <bool NORM>
static int gemm_tma_rows(arle_device *dev, cudaStream_t st, const tma_args &a)
{
    return a.g.rows <= 16   ? gemm_tma_tokens<16, NORM>(dev, st, a)
           : a.g.rows <= 32 ? gemm_tma_tokens<32, NORM>(dev, st, a)
                            : gemm_tma_tokens<64, NORM>(dev, st, a);
}

/** The product of a.g (its `out` as given), after the norm where norm_w is given; call where gemm_tma_fits. */
static int gemm_tma(arle_device *dev, cudaStream_t st, const tma_args &a)
{
    return a.norm_w != NULL ? gemm_tma_rows<true>(dev, st, a) : gemm_tma_rows<false>(dev, st, a);
}

#endif
