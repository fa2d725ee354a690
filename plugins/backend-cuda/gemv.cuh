/*
 * gemv: products for at most four tokens, where nothing counts but the stream of weights and the time between kernels.
 *
 * A tile is 16 rows of W; a unit is 512 of its columns, 64 for each of eight warps. Every warp copies what it multiplies, so
 * there is no barrier before the end of a tile, where the warps' sums are joined in order. Tiles are never split: a result depends
 * on its row of W and its token alone. The tokens lie in shared memory whole, normed there when a norm is asked for, so that
 * no kernel for the norm runs before this one.
 */
#ifndef BACKEND_CUDA_GEMV_CUH
#define BACKEND_CUDA_GEMV_CUH

#include "gemm.cuh"

const int kGemvRows = 4, kGemvUnit = 512, kGemvStage = 16 * kGemvUnit * 2;

struct gemv_args {
    gemm_args g;
    const float *norm_w;        /* NULL: x as it is */
    float eps, w_offset;
};

template <int STAGES>
static __global__ void __launch_bounds__(256, 2) gemv_kernel(const gemv_args a)
{
    extern __shared__ __align__(128) unsigned char gemv_mem[];
    __shared__ float sums[2][8][16][kGemvRows], sh[8][kGemvRows];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int n_tiles = (a.g.n + 15) / 16, ku = (a.g.k + kGemvUnit - 1) / kGemvUnit;
    const int tile0 = (int)((int64_t)n_tiles * blockIdx.x / gridDim.x), tile1 = (int)((int64_t)n_tiles * (blockIdx.x + 1) / gridDim.x);
    const int nu = (tile1 - tile0) * ku;
    bf16 *xs = (bf16 *)(gemv_mem + STAGES * kGemvStage);
    const int ld = a.g.k + 8;                           /* rows of x start four banks apart */
    const uint32_t ring = smem_u32(gemv_mem) + warp * 2048;    /* a stage: [warp][16 rows][128 bytes] */

    pdl_launch();
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
    }
    pdl_wait();

    float ss[kGemvRows] = {};
    for (int r = 0; r < a.g.rows; r++)
        for (int i = tid * 8; i < a.g.k; i += 2048) {
            uint4 v = *(const uint4 *)(a.g.x + r * a.g.ld_x + i);
            *(uint4 *)(xs + r * ld + i) = v;
            const uint32_t *p = (const uint32_t *)&v;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 f = unpack2(p[e]);
#pragma unroll
                for (int q = 0; q < kGemvRows; q++)
                    ss[q] += q == r ? f.x * f.x + f.y * f.y : 0.f;
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
            for (int i = tid * 8; i < a.g.k; i += 2048) {
                uint32_t *p = (uint32_t *)(xs + r * ld + i);
                float4 wa = *(const float4 *)(a.norm_w + i), wb = *(const float4 *)(a.norm_w + i + 4);
                float w[8] = { wa.x, wa.y, wa.z, wa.w, wb.x, wb.y, wb.z, wb.w };
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float2 f = unpack2(p[e]);
                    p[e] = pack2(f.x * rho * (a.w_offset + w[2 * e]), f.y * rho * (a.w_offset + w[2 * e + 1]));
                }
            }
        }
    }
    __syncthreads();

    float acc[4] = {};
    const int g = lane >> 2, tq = lane & 3;
    const bool token = g < a.g.rows;
    int tile = tile0, unit = 0;
    for (int i = 0; i < nu; i++) {
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
            const int row = tid & 15, t = tid >> 4;
            float v = 0.f;
#pragma unroll
            for (int w = 0; w < 8; w++)
                v += out[w][row][t];
            if (a.g.out == GEMM_SILU) {
                float up = __shfl_down_sync(0xffffffffu, v, 8);
                int o = tile * 8 + row;
                if (row < 8 && o < a.g.n_out && t < a.g.rows)
                    ((bf16 *)a.g.y)[t * a.g.ld_y + o] = __float2bfloat16_rn(silu_limited(v, up, a.g.limit));
            } else if (t < a.g.rows && tile * 16 + row < a.g.n) {
                gemm_put(a.g, t, tile * 16 + row, v);
            }
        }
        tile++;
    }
    cp_wait<0>();
}

/*
 * gemv_row: a warp per row of W, for one or two tokens and no more rows than warps that fit: matrices whose 16-row tiles would be dealt
 * unevenly (2560 rows are 160 tiles for 132 multiprocessors, but 19.4 rows for each). W passes through registers, kRowAhead
 * pieces of 256 columns ahead, the first of them before pdl_wait().
 */
const int kRowWarps = 10, kRowAhead = 12, kRowTokens = 2;

template <int ROWS>
static __global__ void __launch_bounds__(320, 2) gemv_row_kernel(const gemm_args a)
{
    extern __shared__ __align__(128) unsigned char gemv_mem[];
    const int tid = threadIdx.x, lane = tid & 31, row = blockIdx.x * kRowWarps + (tid >> 5), n_pieces = (a.k + 255) / 256;
    const bool live = row < a.n;
    const bf16 *w = a.w + (int64_t)(live ? row : 0) * a.k + lane * 8;
    bf16 *xs = (bf16 *)gemv_mem;

    pdl_launch();
    uint4 v[kRowAhead];
    auto piece = [&](int p) -> uint4 {
        uint4 r = make_uint4(0, 0, 0, 0);
        if (live && p * 256 + lane * 8 < a.k)
            asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(w + p * 256));
        return r;
    };
#pragma unroll
    for (int j = 0; j < kRowAhead; j++)
        v[j] = piece(j);
    pdl_wait();

    float was[ROWS];
#pragma unroll
    for (int t = 0; t < ROWS; t++) {
        for (int i = tid * 8; i < a.k; i += 320 * 8)
            *(uint4 *)(xs + t * a.k + i) = *(const uint4 *)(a.x + t * a.ld_x + i);
        was[t] = 0.f;
        if (lane == 0 && live && a.out == GEMM_BF16_ADD)
            was[t] = __bfloat162float(((const bf16 *)a.y)[t * a.ld_y + row]);
        if (lane == 0 && live && a.out == GEMM_F32_ADD)
            was[t] = ((const float *)a.y)[t * a.ld_y + row];
    }
    __syncthreads();

    float acc[ROWS] = {};
    for (int p0 = 0; p0 < n_pieces; p0 += kRowAhead)
#pragma unroll
        for (int j = 0; j < kRowAhead; j++) {
            const int p = p0 + j, at = p * 256 + lane * 8;
            const uint4 c = v[j];
            v[j] = piece(p + kRowAhead);
            if (at >= a.k)
                continue;
            const float2 w0 = unpack2(c.x), w1 = unpack2(c.y), w2 = unpack2(c.z), w3 = unpack2(c.w);
#pragma unroll
            for (int t = 0; t < ROWS; t++) {
                const uint4 x = *(const uint4 *)(xs + t * a.k + at);
                const float2 x0 = unpack2(x.x), x1 = unpack2(x.y), x2 = unpack2(x.z), x3 = unpack2(x.w);
                acc[t] = fmaf(w0.x, x0.x, fmaf(w0.y, x0.y, acc[t]));
                acc[t] = fmaf(w1.x, x1.x, fmaf(w1.y, x1.y, acc[t]));
                acc[t] = fmaf(w2.x, x2.x, fmaf(w2.y, x2.y, acc[t]));
                acc[t] = fmaf(w3.x, x3.x, fmaf(w3.y, x3.y, acc[t]));
            }
        }
#pragma unroll
    for (int t = 0; t < ROWS; t++) {
        float sum = warp_sum(acc[t]) + was[t];
        if (lane != 0 || !live)
            continue;
        if (a.out == GEMM_BF16 || a.out == GEMM_BF16_ADD)
            ((bf16 *)a.y)[t * a.ld_y + row] = __float2bfloat16_rn(sum);
        else
            ((float *)a.y)[t * a.ld_y + row] = sum;
    }
}

static bool gemv_row_fits(const arle_device *dev, const gemv_args &a)
{
    int tiles = (a.g.n + 15) / 16;
    return a.norm_w == NULL && a.g.out != GEMM_SILU && a.g.rows <= kRowTokens && a.g.n <= 2 * dev->n_sm * kRowWarps && tiles > dev->n_sm
        && a.g.k % 8 == 0 && (size_t)a.g.rows * a.g.k * 2 <= 96 * 1024;
}

static int gemv_row(arle_device *dev, cudaStream_t st, const gemm_args &a)
{
    dim3 grid((unsigned)((a.n + kRowWarps - 1) / kRowWarps));
    size_t smem = (size_t)a.rows * a.k * 2;
    bump(dev, COUNT_GEMV_ROW);
    return a.rows == 1 ? launch(dev, st, gemv_row_kernel<1>, grid, dim3(320), smem, a) : launch(dev, st, gemv_row_kernel<2>, grid, dim3(320), smem, a);
}

static inline size_t gemv_bytes(int stages, int rows, int k) { return (size_t)stages * kGemvStage + (size_t)rows * (k + 8) * 2; }

/** True when the tokens fit beside the ring; then launches. x, norm and result as in gemv_args. */
static bool gemv_fits(const gemv_args &a) { return a.g.rows <= kGemvRows && gemv_bytes(3, a.g.rows, a.g.k) <= 112 * 1024; }

static int gemv(arle_device *dev, cudaStream_t st, const gemv_args &a)
{
    if (gemv_row_fits(dev, a))
        return gemv_row(dev, st, a.g);
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
