/*
 * gemm_wide: y[t, n] = sum_k x[t, k] W[n, k] for many tokens on compute capability 9.0, where the tensor cores are the limit and the
 * weights are read from the cache. Used where the epilogue saves a pass over memory (silu(gate) * up) or where cuBLASLt has no
 * form (routed experts).
 *
 * A tile is 128 rows of W by up to 256 tokens. One warpgroup brings pieces of 64 along K into a ring of shared memory, two
 * multiply 64 rows of W each and store. Each warpgroup walks the ring on its own: while one stores, the other has the tensor
 * cores. Blocks stay for the whole product. In a cluster of two, both blocks take the same tokens and each brings half of
 * them for both.
 *
 * Grouped (routed experts): group g has its own W and the entries start[g] .. start[g+1] of a list sorted by group. The producer
 * finds the tile and hands it to the others with its first piece.
 */
#include "gemm_wide.cuh"
#include "wgmma.cuh"
#include <errno.h>

namespace {

const int kWideRows = 128, kWideTokens = GEMM_WIDE_TOKENS, kWideStages = 4, kWideRing = 8;
const int kWideW = kWideRows * 128, kWideStage = kWideW + kWideTokens * 128;     /* bytes: 64 columns of bf16 are 128 */
const int kWidePart = 16384;                                                    /* results of a warpgroup on their way out */
const int kWideSmem = kWideStages * kWideStage + 2 * kWidePart + 1024;

struct wide_args {
    gemm_args g;
    int m_tiles, t_tiles, panel;        /* tiles of a cluster along W and along the tokens; token tiles that go together */
};

/* w_row: of the first block of the cluster, groups counted through; n: columns, a multiple of 32. */
struct wide_tile { int w_row, m0, t0, t_end, n; };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* ---- instructions ------------------------------------------------------------------------------------------------------------ */

#define WIDE_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WIDE_R1 WIDE_R0 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WIDE_R2 WIDE_R1 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WIDE_R3 WIDE_R2 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WIDE_R4 WIDE_R3 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WIDE_R5 WIDE_R4 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WIDE_R6 WIDE_R5 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WIDE_R7 WIDE_R6 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WIDE_16(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
                   "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), "+f"(d[i + 12]), \
                   "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define WIDE_MMA(n, regs, a_at, b_at, p_at, ...) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" regs "}, %" #a_at ", %" #b_at ", p, 1, 1, 0, 0;\n}\n" \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate))

/* d (+)= A B^T: A 64 x 16 and B N x 16, both in shared memory with the inner dimension contiguous. */
template <int N>
__device__ __forceinline__ void wide_mma(float (&d)[128], uint64_t a, uint64_t b, int accumulate)
{
    if constexpr (N == 32)
        WIDE_MMA(32, WIDE_R0, 16, 17, 18, WIDE_16(0));
    else if constexpr (N == 64)
        WIDE_MMA(64, WIDE_R1, 32, 33, 34, WIDE_16(0), WIDE_16(16));
    else if constexpr (N == 96)
        WIDE_MMA(96, WIDE_R2, 48, 49, 50, WIDE_16(0), WIDE_16(16), WIDE_16(32));
    else if constexpr (N == 128)
        WIDE_MMA(128, WIDE_R3, 64, 65, 66, WIDE_16(0), WIDE_16(16), WIDE_16(32), WIDE_16(48));
    else if constexpr (N == 160)
        WIDE_MMA(160, WIDE_R4, 80, 81, 82, WIDE_16(0), WIDE_16(16), WIDE_16(32), WIDE_16(48), WIDE_16(64));
    else if constexpr (N == 192)
        WIDE_MMA(192, WIDE_R5, 96, 97, 98, WIDE_16(0), WIDE_16(16), WIDE_16(32), WIDE_16(48), WIDE_16(64), WIDE_16(80));
    else if constexpr (N == 224)
        WIDE_MMA(224, WIDE_R6, 112, 113, 114, WIDE_16(0), WIDE_16(16), WIDE_16(32), WIDE_16(48), WIDE_16(64), WIDE_16(80), WIDE_16(96));
    else
        WIDE_MMA(256, WIDE_R7, 128, 129, 130, WIDE_16(0), WIDE_16(16), WIDE_16(32), WIDE_16(48), WIDE_16(64), WIDE_16(80), WIDE_16(96),
                 WIDE_16(112));
}

/* Arrives once all earlier cp.async of this thread have landed. */
__device__ __forceinline__ void mbar_arrive_copies(uint64_t *bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_u32(bar)) : "memory");
}

template <int CLUSTER>
__device__ __forceinline__ void meet()
{
    if (CLUSTER > 1)
        cluster_sync();
    else
        __syncthreads();
}

__device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap *map, int x, int y, uint64_t *bar)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(dst), "l"(map), "r"(x), "r"(y), "r"(smem_u32(bar)) : "memory");
}

/* The same place of both blocks of the cluster, and the barrier of each. */
__device__ __forceinline__ void tma_load_both(uint32_t dst, const CUtensorMap *map, int x, int y, uint64_t *bar)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(dst), "l"(map), "r"(x), "r"(y), "r"(smem_u32(bar)), "h"((uint16_t)3) : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap *map, uint32_t src, int x, int y)
{
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\ncp.async.bulk.commit_group;"
                 ::"l"(map), "r"(x), "r"(y), "r"(src) : "memory");
}

/* Four 8 x 8 pieces of bf16, turned: what a lane holds of row r becomes element r of the rows that the lanes' addresses name. */
__device__ __forceinline__ void store_turned(uint32_t addr, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(addr), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

/* ---- tiles ------------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ wide_tile dense_tile(const wide_args &a, int cluster_rows, int tile)
{
    const int panel = tile / (a.panel * a.m_tiles), in = tile % (a.panel * a.m_tiles), width = min(a.panel, a.t_tiles - panel * a.panel);
    wide_tile t;
    t.m0 = t.w_row = in / width * cluster_rows;
    t.t0 = (panel * a.panel + in % width) * kWideTokens;
    t.t_end = a.g.rows;
    t.n = kWideTokens;
    return t;
}

/* By a whole warp: the last group whose first tile is <= tile, 32 candidates at a time. A group's tokens are shared out evenly, or, where
 * blocks take tiles as they become free, into full tiles and a rest, which is less to do. */
template <bool EVEN>
__device__ __forceinline__ wide_tile grouped_tile(const wide_args &a, int cluster_rows, int tile, int lane)
{
    int lo = 0, span = a.g.groups;
    while (span > 1) {
        int step = (span + 31) / 32, at = lo + lane * step;
        unsigned below = __ballot_sync(0xffffffffu, lane * step < span && a.g.tiles[at] <= tile);
        int last = 31 - __clz(below);
        lo += last * step;
        span = min(step, span - last * step);
    }
    const int in = tile - a.g.tiles[lo], from = a.g.start[lo], end = a.g.start[lo + 1];
    const int t_tiles = (end - from + kWideTokens - 1) / kWideTokens;
    const int each = EVEN ? ((end - from + t_tiles - 1) / t_tiles + 31) & ~31 : kWideTokens;
    wide_tile t;
    t.m0 = (EVEN ? in / t_tiles : in % a.m_tiles) * cluster_rows;
    t.w_row = lo * a.g.n + t.m0;
    t.t0 = from + (EVEN ? in % t_tiles : in / a.m_tiles) * each;
    t.t_end = min(end, t.t0 + each);
    t.n = EVEN ? each : (t.t_end - t.t0 + 31) & ~31;
    return t;
}

/* ---- who brings the operands ---------------------------------------------------------------------------------------------------- */

struct wide_shared {
    uint64_t full[kWideStages], empty[kWideStages];
    wide_tile ring[kWideRing];          /* grouped: tiles on their way from the producer; more than the stages can be apart */
};

/* The producer's two warps meet once per tile. */
__device__ __forceinline__ void producer_sync() { asm volatile("bar.sync 3, 64;" ::: "memory"); }

/* Second warp: finds each tile while the first one is busy with the tile before. */
__device__ __forceinline__ void find_tiles(const wide_args &a, wide_shared &sh, int cluster, int n_tiles)
{
    const int lane = threadIdx.x & 31;
    int j = 0;
    for (int tile = blockIdx.x / cluster; tile < n_tiles; tile += gridDim.x / cluster, j++) {
        const wide_tile t = grouped_tile<true>(a, kWideRows * cluster, tile, lane);
        if (lane == 0)
            sh.ring[j % kWideRing] = t;
        producer_sync();
    }
}

/* First warp; tokens come as boxes of the copy engine. */
template <int CLUSTER, bool GROUPED>
__device__ __forceinline__ void produce(const CUtensorMap *mw, const CUtensorMap *mx, const wide_args &a, wide_shared &sh, uint32_t smem,
                                        int rank, int n_tiles)
{
    const int lane = threadIdx.x & 31, ku = (a.g.k + 63) / 64;
    int it = 0, j = 0;
    for (int tile = blockIdx.x / CLUSTER; tile < n_tiles; tile += gridDim.x / CLUSTER, j++) {
        if (GROUPED)
            producer_sync();
        const wide_tile t = GROUPED ? sh.ring[j % kWideRing] : dense_tile(a, kWideRows * CLUSTER, tile);
        if (lane == 0) {
            const int mine = t.n / CLUSTER, from = rank * mine;
            for (int kb = 0; kb < ku; kb++, it++) {
                const int s = it % kWideStages;
                const uint32_t dst = smem + s * kWideStage;
                mbar_wait(smem_u32(&sh.empty[s]), it / kWideStages & 1 ^ 1);
                mbar_expect(smem_u32(&sh.full[s]), kWideW + t.n * 128);
                tma_load(dst, mw, kb * 64, t.w_row + rank * kWideRows, &sh.full[s]);
                const int box = GROUPED ? 16 : mine;
                for (int r = 0; r < mine; r += box) {
                    if (CLUSTER > 1)
                        tma_load_both(dst + kWideW + (from + r) * 128, mx, kb * 64, t.t0 + from + r, &sh.full[s]);
                    else
                        tma_load(dst + kWideW + (from + r) * 128, mx, kb * 64, t.t0 + from + r, &sh.full[s]);
                }
            }
        }
        __syncwarp();
    }
}

/* The number of a tile that nobody has taken; the last number given out, one past the end to each block, leaves a zero. */
__device__ __forceinline__ int take_tile(const wide_args &a, int n_tiles)
{
    const int tile = (int)atomicAdd(a.g.tickets, 1u);
    if (tile == n_tiles + (int)gridDim.x - 1)
        *a.g.tickets = 0;
    return tile;
}

/* Warp 0: the tile of this number goes into the ring, or the end. */
__device__ __forceinline__ void post_tile(const wide_args &a, wide_shared &sh, int at, int tile, int n_tiles)
{
    const int lane = threadIdx.x & 31;
    tile = __shfl_sync(0xffffffffu, tile, 0);
    wide_tile t = {};
    if (tile < n_tiles)
        t = grouped_tile<false>(a, kWideRows, tile, lane);
    if (lane == 0)
        sh.ring[at % kWideRing] = t;
}

/* Four warps; the rows of x are found through src, which the copy engine cannot do. Tiles cost different times, so a block takes the
 * next one when it gets there; the number is asked for two tiles ahead, its place found one ahead. */
__device__ __forceinline__ void produce_gathered(const CUtensorMap *mw, const wide_args &a, wide_shared &sh, uint32_t smem, int n_tiles)
{
    const int row0 = threadIdx.x >> 3, ch = threadIdx.x & 7, ku = (a.g.k + 63) / 64;
    int it = 0, next = n_tiles;
    bool more = true;
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0)
            next = take_tile(a, n_tiles);
        post_tile(a, sh, 0, next, n_tiles);
        more = __shfl_sync(0xffffffffu, next, 0) < n_tiles;
        if (threadIdx.x == 0 && more)
            next = take_tile(a, n_tiles);
    }
    for (int j = 0;; j++) {
        asm volatile("bar.sync 3, 128;" ::: "memory");
        const wide_tile t = sh.ring[j % kWideRing];
        if (t.n == 0)
            break;
        uint32_t at[kWideTokens / 16];          /* in pieces of 16 bytes; past the end: the last row again */
#pragma unroll
        for (int i = 0; i < kWideTokens / 16; i++)
            at[i] = i * 16 < t.n ? (uint32_t)a.g.src[min(t.t0 + row0 + i * 16, t.t_end - 1)] * (uint32_t)(a.g.ld_x >> 3) + ch : 0;
        if (threadIdx.x < 32) {
            post_tile(a, sh, j + 1, next, n_tiles);
            more = __shfl_sync(0xffffffffu, next, 0) < n_tiles;
            if (threadIdx.x == 0 && more)
                next = take_tile(a, n_tiles);
        }
        for (int kb = 0; kb < ku; kb++, it++) {
            const int s = it % kWideStages;
            const uint32_t dst = smem + s * kWideStage, xs = dst + kWideW + row0 * 128 + ((ch ^ (row0 & 7)) << 4);
            mbar_wait(smem_u32(&sh.empty[s]), it / kWideStages & 1 ^ 1);
            if (threadIdx.x == 0) {
                mbar_expect(smem_u32(&sh.full[s]), kWideW);
                tma_load(dst, mw, kb * 64, t.w_row, &sh.full[s]);
            }
            const bool ok = kb * 64 + ch * 8 < a.g.k;
            const uint4 *x = (const uint4 *)a.g.x + (ok ? kb * 8 : 0);
#pragma unroll
            for (int i = 0; i < kWideTokens / 16; i++)
                if (i * 16 < t.n)
                    cp16(xs + i * 2048, x + at[i], ok);
            mbar_arrive_copies(&sh.full[s]);
        }
    }
    /* One more stage with nothing in it, so that the end is seen. */
    mbar_wait(smem_u32(&sh.empty[it % kWideStages]), it / kWideStages & 1 ^ 1);
    if (threadIdx.x == 0)
        mbar_expect(smem_u32(&sh.full[it % kWideStages]), 0);
    mbar_arrive_copies(&sh.full[it % kWideStages]);
}

/* ---- who multiplies and stores ---------------------------------------------------------------------------------------------------- */

/* All of K for one tile; `it` counts pieces since the kernel began. The first piece is known to be there. */
template <int N, int CLUSTER, bool GATHER>
__device__ __forceinline__ void multiply(float (&acc)[128], wide_shared &sh, uint32_t smem, int wg, int ku, int *count)
{
    const int tid = threadIdx.x & 127;
    int it = *count;
    for (int kb = 0; kb < ku; kb++, it++) {
        const int s = it % kWideStages;
        mbar_wait(smem_u32(&sh.full[s]), it / kWideStages & 1);
        if (GATHER)
            wgmma_publish();            /* cp.async writes as threads do, the products read past them */
        const uint64_t w = wgmma_desc(smem + s * kWideStage + wg * (kWideW / 2), 16), x = wgmma_desc(smem + s * kWideStage + kWideW, 16);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            wide_mma<N>(acc, w + kk * 2, x + kk * 2, kb > 0 || kk > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (kb > 0 && tid < CLUSTER)
            mbar_arrive_at(of_rank(smem_u32(&sh.empty[(it + kWideStages - 1) % kWideStages]), tid));
    }
    wgmma_wait<0>();
    wgmma_hold(acc);
    if (tid < CLUSTER)
        mbar_arrive_at(of_rank(smem_u32(&sh.empty[(it + kWideStages - 1) % kWideStages]), tid));
    *count = it;
}

template <int CLUSTER, bool GATHER>
__device__ __forceinline__ void multiply_any(float (&acc)[128], wide_shared &sh, uint32_t smem, int wg, int ku, int *count, int n)
{
    switch (n >> 5) {
    case 1: return multiply<32, CLUSTER, GATHER>(acc, sh, smem, wg, ku, count);
    case 2: return multiply<64, CLUSTER, GATHER>(acc, sh, smem, wg, ku, count);
    case 3: return multiply<96, CLUSTER, GATHER>(acc, sh, smem, wg, ku, count);
    case 4: return multiply<128, CLUSTER, GATHER>(acc, sh, smem, wg, ku, count);
    case 5: return multiply<160, CLUSTER, GATHER>(acc, sh, smem, wg, ku, count);
    case 6: return multiply<192, CLUSTER, GATHER>(acc, sh, smem, wg, ku, count);
    case 7: return multiply<224, CLUSTER, GATHER>(acc, sh, smem, wg, ku, count);
    default: return multiply<256, CLUSTER, GATHER>(acc, sh, smem, wg, ku, count);
    }
}

__device__ __forceinline__ void part_sync(int wg) { asm volatile("bar.sync %0, 128;" ::"r"(wg + 1) : "memory"); }

/* The warpgroup's part of shared memory may be written again. */
template <bool GROUPED>
__device__ __forceinline__ void part_free(int wg)
{
    if (!GROUPED && (threadIdx.x & 127) == 0)
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    part_sync(wg);
}

__device__ __forceinline__ uint4 part_get(uint32_t addr)
{
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr) : "memory");
    return v;
}

/* CHUNKS pieces of 16 bytes per token, from token t0 on and column c0 on, out of the warpgroup's part, to rows d[0 .. 7] of y. */
template <int CHUNKS>
__device__ __forceinline__ void store_rows(const gemm_args &g, uint32_t part, const int32_t *d, int t0, int t_end, int c0)
{
    const int tid = threadIdx.x & 127, ch = tid % CHUNKS, row0 = tid / CHUNKS;
    if (c0 + ch * 8 >= g.n_out)
        return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int r = row0 + i * (128 / CHUNKS), sw = CHUNKS == 8 ? r & 7 : r >> 1 & 3;
        const uint4 v = part_get(part + r * (CHUNKS * 16) + ((ch ^ sw) << 4));
        if (t0 + r < t_end)
            *(uint4 *)((bf16 *)g.y + (int64_t)d[i] * g.ld_y + c0 + ch * 8) = v;
    }
}

/* silu(gate) * up: rows r and r + 8 of W are in one thread. 32 columns of y, 256 tokens. */
template <bool GROUPED>
__device__ __forceinline__ void store_silu(const float (&acc)[128], const CUtensorMap *my, const gemm_args &g, const wide_tile &t, uint32_t part,
                                           int wg, int m0)
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, c0 = m0 / 2 + wg * 32;
    part_free<GROUPED>(wg);
#pragma unroll
    for (int q = 0; q < 8; q++) {
        if (GROUPED && q * 32 >= t.n)
            break;
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *v = acc + (q * 4 + i) * 4;
            r[i] = pack2(silu_limited(v[0], v[2], g.limit), silu_limited(v[1], v[3], g.limit));
        }
        const int row = q * 32 + lane;
        store_turned(part + row * 64 + ((warp ^ (row >> 1 & 3)) << 4), r);
    }
    if (GROUPED) {
        part_sync(wg);
        int32_t d[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            d[i] = t.t0 + (threadIdx.x >> 2 & 31) + i * 32;
        store_rows<4>(g, part, d, t.t0, t.t_end, c0);
        return;
    }
    wgmma_publish();
    part_sync(wg);
    if ((threadIdx.x & 127) == 0)
        tma_store(my, part, c0, t.t0);
}

/* Rows of y that this thread stores a piece of, for store_plain: asked for before the products, used after them. */
__device__ __forceinline__ void find_rows(const gemm_args &g, const wide_tile &t, int32_t (&d)[16])
{
#pragma unroll
    for (int i = 0; i < 16; i++)
        d[i] = __ldg(g.dst + min(t.t0 + (int)(threadIdx.x >> 3 & 15) + i * 16, t.t_end - 1));
}

/* 64 columns of y, 128 tokens at a time; experts only. */
__device__ __forceinline__ void store_plain(const float (&acc)[128], const gemm_args &g, const wide_tile &t, uint32_t part, int wg, int m0,
                                            const int32_t (&d)[16])
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (h * 128 >= t.n)
            break;
        part_sync(wg);
#pragma unroll
        for (int q = 0; q < 8; q++) {
            const float *v = acc + (h * 16 + q * 2) * 4;
            const uint32_t r[4] = { pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]) };
            const int row = q * 16 + (lane >> 4) * 8 + (lane & 7), ch = warp * 2 + (lane >> 3 & 1);
            store_turned(part + row * 128 + ((ch ^ (row & 7)) << 4), r);
        }
        part_sync(wg);
        store_rows<8>(g, part, d + h * 8, t.t0 + h * 128, t.t_end, m0 + wg * 64);
    }
}

#endif

template <int CLUSTER, bool GROUPED, bool GATHER, int OUT>
__global__ void __launch_bounds__(384, 1) wide_kernel(const __grid_constant__ CUtensorMap mw, const __grid_constant__ CUtensorMap mx,
                                                      const __grid_constant__ CUtensorMap my, const wide_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char wide_mem[];
    __shared__ wide_shared sh;
    const uint32_t smem = (smem_u32(wide_mem) + 1023) & ~1023u;
    const int rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0;
    pdl_launch();
    if (threadIdx.x == 0) {
        for (int s = 0; s < kWideStages; s++) {
            mbar_init(smem_u32(&sh.full[s]), GATHER ? 129 : 1);
            mbar_init(smem_u32(&sh.empty[s]), 2 * CLUSTER);
        }
        mbar_publish();
    }
    meet<CLUSTER>();
    pdl_wait();
    const int n_tiles = GROUPED ? a.g.tiles[a.g.groups] : a.m_tiles * a.t_tiles;
    const int warp = threadIdx.x >> 5;
    if (warp < 4) {
        registers_down<56>();
        if (GATHER)
            produce_gathered(&mw, a, sh, smem, n_tiles);
        else if (warp == 0)
            produce<CLUSTER, GROUPED>(&mw, &mx, a, sh, smem, rank, n_tiles);
        else if (GROUPED && warp == 1)
            find_tiles(a, sh, CLUSTER, n_tiles);
    } else {
        registers_up<224>();
        const int wg = (threadIdx.x >> 7) - 1, ku = (a.g.k + 63) / 64;
        const uint32_t part = smem + kWideStages * kWideStage + wg * kWidePart;
        float acc[128];
        int it = 0, j = 0;
        for (int tile = blockIdx.x / CLUSTER; GATHER || tile < n_tiles; tile += gridDim.x / CLUSTER, j++) {
            wide_tile t;
            int32_t d[16];
            if (GROUPED) {
                mbar_wait(smem_u32(&sh.full[it % kWideStages]), it / kWideStages & 1);
                t = sh.ring[j % kWideRing];
                if (GATHER && t.n == 0)
                    break;
                if (OUT == GEMM_BF16)
                    find_rows(a.g, t, d);
                multiply_any<CLUSTER, GATHER>(acc, sh, smem, wg, ku, &it, t.n);
            } else {
                t = dense_tile(a, kWideRows * CLUSTER, tile);
                multiply<256, CLUSTER, GATHER>(acc, sh, smem, wg, ku, &it);
            }
            if constexpr (OUT == GEMM_SILU)
                store_silu<GROUPED>(acc, &my, a.g, t, part, wg, t.m0 + rank * kWideRows);
            else
                store_plain(acc, a.g, t, part, wg, t.m0 + rank * kWideRows, d);
        }
        if (!GROUPED && (threadIdx.x & 127) == 0)
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    meet<CLUSTER>();            /* a block that has left can neither be written to nor signalled */
#endif
}

/* ---- the host's side -------------------------------------------------------------------------------------------------------------- */

template <int CLUSTER, bool GROUPED, bool GATHER, int OUT>
int wide_launch(arle_device *dev, cudaStream_t st, const gemm_args &g)
{
    wide_args a = {};
    a.g = g;
    a.g.tickets = dev->tickets;
    a.m_tiles = (int)ceil_div(g.n, kWideRows * CLUSTER);
    a.t_tiles = (int)ceil_div(g.rows, kWideTokens);
    a.panel = 8;          /* 4, 8, 16, 32 token tiles together: 1038, 1022, 1033, 1056 us for 8,192 x 18432 x 2560 on an H100 */
    CUtensorMap mw, mx, my;
    memset(&mx, 0, sizeof mx);
    memset(&my, 0, sizeof my);
    if (!matrix_map(&mw, g.w, (int64_t)(GROUPED ? g.groups : 1) * g.n, g.k, g.k, kWideRows, 64)
        || (!GATHER && !matrix_map(&mx, g.x, g.rows, g.k, g.ld_x, GROUPED ? 16 : kWideTokens / CLUSTER, 64))
        || (!GROUPED && !matrix_map(&my, g.y, g.rows, g.n_out, g.ld_y, kWideTokens, 32)))
        return cuda_fail(dev, cudaErrorInvalidValue, "cuTensorMapEncodeTiled", __FILE__, __LINE__);
    auto kernel = wide_kernel<CLUSTER, GROUPED, GATHER, OUT>;
    CUDA_TRY(dev, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWideSmem));
    cudaLaunchConfig_t cfg = {};
    const int clusters = CLUSTER > 1 ? dev->wide_clusters : dev->n_sm, most = GROUPED ? clusters : a.m_tiles * a.t_tiles;
    cfg.gridDim = dim3((unsigned)((most < clusters ? most : clusters) * CLUSTER));
    cfg.blockDim = dim3(384);
    cfg.dynamicSmemBytes = kWideSmem;
    cfg.stream = st;
    cudaLaunchAttribute attr[2];
    attr[0].id = cudaLaunchAttributeClusterDimension;
    attr[0].val.clusterDim.x = CLUSTER;
    attr[0].val.clusterDim.y = attr[0].val.clusterDim.z = 1;
    attr[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[1].val.programmaticStreamSerializationAllowed = 1;
    cfg.attrs = attr;
    cfg.numAttrs = dev->pdl ? 2 : 1;
    if (dev->pdl)
        bump(dev, COUNT_PDL);
    CUDA_TRY(dev, cudaLaunchKernelEx(&cfg, kernel, mw, mx, my, a));
    bump(dev, GROUPED ? COUNT_GEMM_EXPERTS : COUNT_GEMM_WIDE);
    return 0;
}

/* Clusters of two that are resident at a time: some GPUs have groups of multiprocessors of odd size. */
int clusters_of(const void *kernel, int n_sm)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    int n = 0;
    attr[0].id = cudaLaunchAttributeClusterDimension;
    attr[0].val.clusterDim.x = 2;
    attr[0].val.clusterDim.y = attr[0].val.clusterDim.z = 1;
    cfg.gridDim = dim3((unsigned)(n_sm & ~1));
    cfg.blockDim = dim3(384);
    cfg.dynamicSmemBytes = kWideSmem;
    cfg.attrs = attr;
    cfg.numAttrs = 1;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWideSmem) != cudaSuccess
        || cudaOccupancyMaxActiveClusters(&n, kernel, &cfg) != cudaSuccess)
        return 0;
    return n;
}

/* Whether this GPU runs the kernels: their shared memory is only there in code built for sm_90a. */
bool wide_ready(arle_device *dev)
{
    if (dev->wide_clusters > 0 || dev->no_wide)
        return dev->wide_clusters > 0;
    const void *kernel = (const void *)wide_kernel<2, false, false, GEMM_SILU>;
    if (dev->cc != 90 || dev->max_smem < (size_t)kWideSmem + sizeof(int) * 512 || !has_code(kernel)
        || tensor_map_encoder() == NULL || (dev->wide_clusters = clusters_of(kernel, dev->n_sm)) == 0) {
        cudaGetLastError();
        dev->no_wide = true;
    }
    return !dev->no_wide;
}

/* Whether a dense product has work for four fifths of the rounds of tiles that it takes. */
bool wide_fills(const arle_device *dev, const gemm_args &a)
{
    const int64_t tile = 2 * kWideRows * kWideTokens, tiles = ceil_div(a.n, 2 * kWideRows) * ceil_div(a.rows, kWideTokens);
    return a.rows >= 2 * kWideTokens && (int64_t)a.rows * a.n * 5 >= ceil_div(tiles, dev->wide_clusters) * dev->wide_clusters * tile * 4;
}

} // namespace

bool gemm_wide_fits(arle_device *dev, const gemm_args &a, int out)
{
    if (dev->deterministic || (out != GEMM_SILU && (out != GEMM_BF16 || a.groups == 0)) || a.scale != NULL)
        return false;
    const int n = out == GEMM_SILU ? 2 * a.n_out : a.n_out;
    if (a.n != n || (a.n_out | a.k | a.ld_x | a.ld_y) % 8 != 0 || (((uintptr_t)a.x | (uintptr_t)a.y) & 15) != 0)
        return false;
    return wide_ready(dev) && (a.groups > 0 || wide_fills(dev, a));
}

int gemm_wide(arle_device *dev, cudaStream_t st, const gemm_args &a, int out)
{
    if (a.groups == 0)
        return wide_launch<2, false, false, GEMM_SILU>(dev, st, a);
    return out == GEMM_SILU ? wide_launch<1, true, true, GEMM_SILU>(dev, st, a) : wide_launch<2, true, false, GEMM_BF16>(dev, st, a);
}
