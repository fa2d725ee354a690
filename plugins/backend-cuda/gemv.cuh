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

static inline size_t gemv_bytes(int stages, int rows, int k) { return (size_t)stages * kGemvStage + (size_t)rows * (k + 8) * 2; }

/** True when the tokens fit beside the ring; then launches. x, norm and result as in gemv_args. */
static bool gemv_fits(const gemv_args &a) { return a.g.rows <= kGemvRows && gemv_bytes(3, a.g.rows, a.g.k) <= 112 * 1024; }

static int gemv(arle_device *dev, cudaStream_t st, const gemv_args &a)
{
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
