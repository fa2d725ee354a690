/*
 * gemv: products for at most four tokens, where nothing counts but the stream of weights and the time between kernels.
 *
 * A tile is 16 rows of W; a unit is 512 of its columns, 64 for each of eight warps. Every warp copies what it multiplies, so
 * there is no barrier before the end of a tile, where the warps' sums are joined in order. Tiles are never split: a result depends
 * on its row of W and its token alone. The tokens lie in shared memory whole, normed there when a norm is asked for, so that
 * no kernel for the norm runs before this one.
 *
 * The first stages are asked for one after the other, as they arrive, until the kernel before this one has ended: it, and small kernels
 * between two products, would wait for whatever little they read behind all that is asked for at once (3 to 6 us each).
 */
#ifndef BACKEND_CUDA_GEMV_CUH
#define BACKEND_CUDA_GEMV_CUH

#include "gemm.cuh"
#include "wgmma.cuh"

const int kGemvRows = 4, kGemvUnit = 512, kGemvStage = 16 * kGemvUnit * 2;
const int kGemvNorm = 2, kGemvAtOnce = 5;       /* pieces of 2048 columns: with a norm at most, of x asked for together */

struct gemv_args {
    gemm_args g;
    const float *norm_w;        /* NULL: x as it is */
    float eps, w_offset;
};

/* Registers for three blocks: two, and one of the delta net's that comes next, on one multiprocessor. */
template <int STAGES>
static __global__ void __launch_bounds__(256, 3) gemv_kernel(const gemv_args a)
{
    extern __shared__ __align__(128) unsigned char gemv_mem[];
    __shared__ float sums[2][8][16][kGemvRows], sh[8][kGemvRows];
    __shared__ volatile int go;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int n_tiles = (a.g.n + 15) / 16, ku = (a.g.k + kGemvUnit - 1) / kGemvUnit;
    const int tile0 = (int)((int64_t)n_tiles * blockIdx.x / gridDim.x), tile1 = (int)((int64_t)n_tiles * (blockIdx.x + 1) / gridDim.x);
    const int nu = (tile1 - tile0) * ku;
    bf16 *xs = (bf16 *)(gemv_mem + STAGES * kGemvStage);
    const int ld = a.g.k + 8;                           /* rows of x start four banks apart */
    const uint32_t ring = smem_u32(gemv_mem) + warp * 2048;    /* a stage: [warp][16 rows][128 bytes] */

    pdl_launch();
    if (tid == 0)
        go = 0;
    __syncthreads();
    int l_tile = tile0, l_unit = 0;
    auto load = [&](int stage) {
        const int r0 = lane >> 3, ch = lane & 7, kk = l_unit * kGemvUnit + warp * 64 + ch * 8;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int r = r0 + j * 4, n = l_tile * 16 + r;
            bool ok = n < a.g.n && kk < a.g.k;
            cp16(ring + stage * kGemvStage + r * 128 + ((ch ^ (r & 7)) << 4), ok ? a.g.w + (int64_t)n * a.g.k + kk : a.g.w, ok);
        }
        if (++l_unit == ku) {
            l_unit = 0;
            l_tile++;
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < nu)
            load(s);
        cp_commit();
        if (warp > 0 && !go)        /* warp 0 goes on, to tell the others */
            cp_wait<0>();
    }
    /* What follows the wait is a chain of latencies with nothing else to do: each link is one round of loads. */
    float4 nw[kGemvNorm][2];
    if (a.norm_w != NULL)
#pragma unroll
        for (int j = 0; j < kGemvNorm; j++)
            if (tid * 8 + j * 2048 < a.g.k) {
                nw[j][0] = *(const float4 *)(a.norm_w + tid * 8 + j * 2048);
                nw[j][1] = *(const float4 *)(a.norm_w + tid * 8 + j * 2048 + 4);
            }
    pdl_wait();
    if (tid == 0)
        go = 1;

    float ss[kGemvRows] = {};
    for (int r = 0; r < a.g.rows; r++)
        for (int i0 = tid * 8; i0 < a.g.k; i0 += 2048 * kGemvAtOnce) {
            uint4 v[kGemvAtOnce];
#pragma unroll
            for (int j = 0; j < kGemvAtOnce; j++)
                v[j] = i0 + j * 2048 < a.g.k ? *(const uint4 *)(a.g.x + r * a.g.ld_x + i0 + j * 2048) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < kGemvAtOnce; j++) {
                if (i0 + j * 2048 < a.g.k)
                    *(uint4 *)(xs + r * ld + i0 + j * 2048) = v[j];
                if (a.norm_w == NULL)
                    continue;
                const uint32_t *p = (const uint32_t *)&v[j];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float2 f = unpack2(p[e]);
#pragma unroll
                    for (int q = 0; q < kGemvRows; q++)
                        ss[q] += q == r ? f.x * f.x + f.y * f.y : 0.f;
                }
            }
        }
    if (a.norm_w != NULL) {
#pragma unroll
        for (int r = 0; r < kGemvRows; r++) {
            float v = warp_sum(ss[r]);
            if (lane == 0)
                sh[warp][r] = v;
        }
        __syncthreads();
        for (int r = 0; r < a.g.rows; r++) {
            float s = 0.f;
#pragma unroll
            for (int w = 0; w < 8; w++)
                s += sh[w][r];
            float rho = rsqrtf(s / (float)a.g.k + a.eps);
#pragma unroll
            for (int j = 0; j < kGemvNorm; j++) {
                const int i = tid * 8 + j * 2048;
                if (i >= a.g.k)
                    continue;
                uint32_t *p = (uint32_t *)(xs + r * ld + i);
                const float4 wa = nw[j][0], wb = nw[j][1];
                const float w[8] = { wa.x, wa.y, wa.z, wa.w, wb.x, wb.y, wb.z, wb.w };
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float2 f = unpack2(p[e]);
                    p[e] = pack2(f.x * rho * (a.w_offset + w[2 * e]), f.y * rho * (a.w_offset + w[2 * e + 1]));
                }
            }
        }
    }
    __syncthreads();

    float acc[4] = {}, was = 0.f;
    const int g = lane >> 2, tq = lane & 3, o_row = tid & 15, o_t = tid >> 4;
    const bool token = g < a.g.rows;
    int tile = tile0, unit = 0;
    for (int i = 0; i < nu; i++) {
        if (unit == 0 && o_t < a.g.rows && tile * 16 + o_row < a.g.n)
            was = gemm_was(a.g, o_t, tile * 16 + o_row);
        cp_wait<STAGES - 2>();
        __syncwarp();
        if (i + STAGES - 1 < nu)
            load((i + STAGES - 1) % STAGES);
        cp_commit();
        const uint32_t ws = ring + i % STAGES * kGemvStage;
        const int k0 = unit * kGemvUnit + warp * 64 + 2 * tq;
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            uint32_t af[4], b0 = 0, b1 = 0;
            int r = lane & 15, c = kk * 2 + (lane >> 4);
            ldsm4(af, ws + r * 128 + ((c ^ (r & 7)) << 4));
            if (token && k0 + kk * 16 < a.g.k) {
                b0 = *(const uint32_t *)(xs + g * ld + k0 + kk * 16);
                b1 = k0 + kk * 16 + 8 < a.g.k ? *(const uint32_t *)(xs + g * ld + k0 + kk * 16 + 8) : 0;
            }
            mma16816(acc, af, b0, b1);
        }
        if (++unit < ku)
            continue;
        unit = 0;
        /* Two buffers: a warp cannot be two tiles ahead of another, as there is a barrier in each. */
        float (*out)[16][kGemvRows] = sums[tile & 1];
        if (tq < kGemvRows / 2) {
            out[warp][g][2 * tq] = acc[0];
            out[warp][g][2 * tq + 1] = acc[1];
            out[warp][g + 8][2 * tq] = acc[2];
            out[warp][g + 8][2 * tq + 1] = acc[3];
        }
        acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
        __syncthreads();
        if (tid < 16 * kGemvRows) {
            float v = 0.f;
#pragma unroll
            for (int w = 0; w < 8; w++)
                v += out[w][o_row][o_t];
            if (a.g.out == GEMM_SILU) {
                float up = __shfl_down_sync(0xffffffffu, v, 8);
                int o = tile * 8 + o_row;
                if (o_row < 8 && o < a.g.n_out && o_t < a.g.rows)
                    ((bf16 *)a.g.y)[o_t * a.g.ld_y + o] = __float2bfloat16_rn(silu_limited(v, up, a.g.limit));
            } else if (o_t < a.g.rows && tile * 16 + o_row < a.g.n) {
                gemm_put(a.g, o_t, tile * 16 + o_row, v, was);
            }
        }
        tile++;
    }
    cp_wait<0>();
}

/*
 * gemv_row: a warp per row of W, for one or two tokens and long rows whose 16-row tiles would be dealt unevenly (2560 are 160 tiles for 132
 * multiprocessors, but 19.4 rows for each). The copy engine brings pieces of a row to the warp's own ring; the last warp asks for
 * the first of them, kRowFlight at a time until the kernel before this one has ended, then all. Compute capability 9.0.
 */
const int kRowWarps = 10, kRowTokens = 2, kRowStages = 3, kRowFlight = 10, kRowPiece = 3072, kRowLeast = 8192;

struct row_plan { int parts, piece, stages; };          /* pieces of a row, bytes of each, of a warp's ring */

template <int TOKENS>
static __global__ void __launch_bounds__(kRowWarps * 32 + 32) gemv_row_kernel(const gemm_args a, const row_plan l)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) unsigned char gemv_mem[];
    __shared__ __align__(8) unsigned long long full[kRowWarps * kRowStages];
    __shared__ volatile int go;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int row0 = (int)((int64_t)a.n * blockIdx.x / gridDim.x), row1 = (int)((int64_t)a.n * (blockIdx.x + 1) / gridDim.x);
    bf16 *xs = (bf16 *)(gemv_mem + kRowWarps * l.stages * l.piece);
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    auto load = [&](int w, int stage, int row, int part) {
        const int slot = w * l.stages + stage;
        mbar_expect(smem_u32(full + slot), l.piece);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                     ::"r"(smem_u32(gemv_mem) + slot * l.piece), "l"((const char *)(a.w + (int64_t)row * a.k) + part * l.piece),
                       "r"(l.piece), "r"(smem_u32(full + slot)), "l"(policy) : "memory");
    };
    /* A piece of a warp's rows, and the one after it. */
    struct place {
        int row, part;
        __device__ __forceinline__ void next(int parts)
        {
            if (++part == parts) {
                part = 0;
                row += kRowWarps;
            }
        }
    };

    pdl_launch();
    if (tid == 0)
        go = 0;
    if (tid < kRowWarps * l.stages) {
        mbar_init(smem_u32(full + tid), 1);
        mbar_publish();
    }
    __syncthreads();
    if (warp == kRowWarps) {
        if (lane != 0)
            return;
        place at = { row0, 0 }, old = at;       /* of warp 0; old: what is waited for */
        int old_w = 0, old_stage = 0, under_way = 0;
        for (int stage = 0; stage < l.stages; stage++, at.next(l.parts))
            for (int w = 0; w < kRowWarps && at.row + w < row1; w++) {
                if (under_way < kRowFlight) {
                    under_way++;
                } else {
                    /* Only before the warps begin: later the barrier may be in a phase after the next, which looks the same. */
                    while (!go && !mbar_over(smem_u32(full + old_w * l.stages + old_stage), 0))
                        ;
                    if (++old_w == kRowWarps || old.row + old_w >= row1) {
                        old_w = 0;
                        old_stage++;
                        old.next(l.parts);
                    }
                }
                load(w, stage, at.row + w, at.part);
            }
        return;
    }
    place ahead = { row0 + warp, 0 };
    for (int i = 0; i < l.stages; i++)
        ahead.next(l.parts);
    pdl_wait();
    if (tid == 0)
        go = 1;
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
        for (int i0 = tid * 8; i0 < a.k; i0 += kRowWarps * 256 * 4) {
            uint4 x[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i0 + j * kRowWarps * 256 < a.k)
                    x[j] = *(const uint4 *)(a.x + t * a.ld_x + i0 + j * kRowWarps * 256);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i0 + j * kRowWarps * 256 < a.k)
                    *(uint4 *)(xs + t * a.k + i0 + j * kRowWarps * 256) = x[j];
        }
    bar_sync(1, kRowWarps * 32);

    const int chunks = l.piece / 512;
    int stage = 0, phase = 0;
    for (int row = row0 + warp; row < row1; row += kRowWarps) {
        float acc[TOKENS] = {}, was[TOKENS] = {};
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (lane == 0)
                was[t] = gemm_was(a, t, row);
        for (int part = 0; part < l.parts; part++) {
            const int slot = warp * l.stages + stage;
            mbar_wait(smem_u32(full + slot), phase);
            const uint4 *ws = (const uint4 *)(gemv_mem + slot * l.piece) + lane;
            const bf16 *xp = xs + part * (l.piece / 2) + lane * 8;
#pragma unroll 4
            for (int c = 0; c < chunks; c++) {
                const uint4 v = ws[c * 32];
                const float2 w0 = unpack2(v.x), w1 = unpack2(v.y), w2 = unpack2(v.z), w3 = unpack2(v.w);
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    const uint4 x = *(const uint4 *)(xp + t * a.k + c * 256);
                    const float2 x0 = unpack2(x.x), x1 = unpack2(x.y), x2 = unpack2(x.z), x3 = unpack2(x.w);
                    acc[t] = fmaf(w0.x, x0.x, fmaf(w0.y, x0.y, acc[t]));
                    acc[t] = fmaf(w1.x, x1.x, fmaf(w1.y, x1.y, acc[t]));
                    acc[t] = fmaf(w2.x, x2.x, fmaf(w2.y, x2.y, acc[t]));
                    acc[t] = fmaf(w3.x, x3.x, fmaf(w3.y, x3.y, acc[t]));
                }
            }
            __syncwarp();
            if (ahead.row < row1) {
                if (lane == 0)
                    load(warp, stage, ahead.row, ahead.part);
                ahead.next(l.parts);
            }
            if (++stage == l.stages) {
                stage = 0;
                phase ^= 1;
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float v = warp_sum(acc[t]);
            if (lane == 0)
                gemm_put(a, t, row, v, was[t]);
        }
    }
#endif
}

static size_t row_bytes(const row_plan &l, const gemm_args &a) { return (size_t)kRowWarps * l.stages * l.piece + (size_t)a.rows * a.k * 2; }

/** Whether gemv_row serves a, and how. */
static bool gemv_row_fits(const arle_device *dev, const gemv_args &a, row_plan *l)
{
    const int tiles = (a.g.n + 15) / 16, bytes = a.g.k * 2;
    if (dev->cc != 90 || a.norm_w != NULL || a.g.out == GEMM_SILU || a.g.rows > kRowTokens || a.g.k < kRowLeast || a.g.k % 256 != 0
        || tiles <= dev->n_sm || tiles >= 2 * dev->n_sm || !has_code((const void *)gemv_row_kernel<1>))
        return false;
    l->parts = (bytes + kRowPiece - 1) / kRowPiece;
    while (bytes % (l->parts * 512) != 0)
        l->parts++;
    l->piece = bytes / l->parts;
    for (l->stages = kRowStages; l->stages > 1 && row_bytes(*l, a.g) > 112 * 1024; l->stages--)
        ;
    return l->stages > 1;
}

static int gemv_row(arle_device *dev, cudaStream_t st, const gemm_args &a, const row_plan &l)
{
    dim3 grid(2 * dev->n_sm), block(kRowWarps * 32 + 32);
    bump(dev, COUNT_GEMV_ROW);
    return a.rows == 1 ? launch(dev, st, gemv_row_kernel<1>, grid, block, row_bytes(l, a), a, l)
                       : launch(dev, st, gemv_row_kernel<2>, grid, block, row_bytes(l, a), a, l);
}

static inline size_t gemv_bytes(int stages, int rows, int k) { return (size_t)stages * kGemvStage + (size_t)rows * (k + 8) * 2; }

/** True when the tokens fit beside the ring; then launches. x, norm and result as in gemv_args. */
static bool gemv_fits(const gemv_args &a) { return a.g.rows <= kGemvRows && (a.norm_w == NULL || a.g.k <= kGemvNorm * 2048) && gemv_bytes(3, a.g.rows, a.g.k) <= 112 * 1024; }

static int gemv(arle_device *dev, cudaStream_t st, const gemv_args &a)
{
    row_plan l;
    if (gemv_row_fits(dev, a, &l))
        return gemv_row(dev, st, a.g, l);
    int tiles = (a.g.n + 15) / 16, most = 2 * dev->n_sm;
    dim3 grid((unsigned)(tiles < most ? tiles : most));
    bump(dev, COUNT_GEMV);
    if (gemv_bytes(6, a.g.rows, a.g.k) <= 112 * 1024)
        return launch(dev, st, gemv_kernel<6>, grid, dim3(256), gemv_bytes(6, a.g.rows, a.g.k), a);
    size_t smem = gemv_bytes(5, a.g.rows, a.g.k);
    if (smem <= 112 * 1024)
        return launch(dev, st, gemv_kernel<5>, grid, dim3(256), smem, a);
    return launch(dev, st, gemv_kernel<3>, grid, dim3(256), gemv_bytes(3, a.g.rows, a.g.k), a);
}

#endif
