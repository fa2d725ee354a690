/* The gated delta net in chunks of 64 tokens, four kernels on tensor cores, for GPUs without warpgroup products. */
#ifndef BACKEND_CUDA_GDN_CHUNK_CUH
#define BACKEND_CUDA_GDN_CHUNK_CUH

#include "gdn.cuh"

namespace {

/* ---- chunks: convolution --------------------------------------------------------------------------------------------- */

const int kConvTok = 32, kConvAhead = 8;

/* Four channels of the piece's token i as they were before the convolution. */
__device__ __forceinline__ uint2 conv_in4(const gdn_args &a, const bf16 *rec, int t0, int i, int c)
{
    return i >= 0 ? *(const uint2 *)(a.proj + (int64_t)(t0 + i) * a.ld_proj + a.u_off + c)
                  : *(const uint2 *)(rec + (int64_t)(3 + i) * a.n_conv + c);
}

__device__ __forceinline__ void unpack4(uint2 v, float *f)
{
    float2 x = unpack2(v.x), y = unpack2(v.y);
    f[0] = x.x;
    f[1] = x.y;
    f[2] = y.x;
    f[3] = y.y;
}

/* Thread: 4 channels of 32 tokens, eight tokens asked for at a time. A warp is one head of 128, so norms are shuffles.
 * grid (token runs, channel blocks, seq) */
__global__ void __launch_bounds__(256, 4) conv_kernel(const gdn_args a)
{
    pdl_launch();
    const int s = a.seq0 + blockIdx.z, t0 = a.cu[s], n = a.cu[s + 1] - t0, i0 = blockIdx.x * kConvTok;
    const int c = (blockIdx.y * 256 + threadIdx.x) * 4;
    pdl_wait();
    if (i0 >= n || c >= a.n_conv)
        return;
    const bf16 *rec = conv_state(a, s);
    const int kind = c / kDim < a.n_k ? 0 : c / kDim < 2 * a.n_k ? 1 : 2;      /* q, k, v */
    float4 w[4];
    float h0[4], h1[4], h2[4];
    unpack4(conv_in4(a, rec, t0, i0 - 3, c), h0);
    unpack4(conv_in4(a, rec, t0, i0 - 2, c), h1);
    unpack4(conv_in4(a, rec, t0, i0 - 1, c), h2);
#pragma unroll
    for (int e = 0; e < 4; e++)
        w[e] = *(const float4 *)(a.conv_w + (int64_t)(c + e) * 4);
    const int m = min(kConvTok, n - i0);
    for (int i = 0; i < m; i += kConvAhead) {
        uint2 raw[kConvAhead];
#pragma unroll
        for (int j = 0; j < kConvAhead; j++)
            raw[j] = conv_in4(a, rec, t0, i0 + min(i + j, m - 1), c);
#pragma unroll
        for (int j = 0; j < kConvAhead; j++) {
            float u[4], y[4], ss = 0.f;
            unpack4(raw[j], u);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                y[e] = round_bf(siluf(w[e].x * h0[e] + w[e].y * h1[e] + w[e].z * h2[e] + w[e].w * u[e]));
                h0[e] = h1[e];
                h1[e] = h2[e];
                h2[e] = u[e];
                ss += y[e] * y[e];
            }
            if (kind < 2) {
                float r = rsqrtf(warp_sum(ss) + 1e-6f) * (kind == 0 ? 0.08838834764831845f : 1.f);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    y[e] *= r;
            }
            if (i + j < m)
                *(uint2 *)(a.qkv + (int64_t)(t0 + i0 + i + j - a.tok0) * a.n_conv + c) = make_uint2(pack2(y[0], y[1]), pack2(y[2], y[3]));
        }
    }
}

/* ---- chunks: prepare ------------------------------------------------------------------------------------------------- */

const int kLd = 72;                         /* row stride of the f32 triangle, in floats: no bank twice in a fragment */
const int kTile = kChunk * kDim * 2;        /* bytes of one 64 x 128 operand */
const int kPrepSmem = 4 * kTile + 2 * kChunk * kLd * 4 + 8 * kChunk * 4;

/* 64 x 128 tile: 256-byte rows of 16 chunks of 16 bytes. */
__device__ __forceinline__ uint32_t at128(int row, int chunk) { return row * 256 + ((chunk ^ (row & 7)) << 4); }
/* 64 x 64 tile: 128-byte rows. */
__device__ __forceinline__ uint32_t at64(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

__device__ __forceinline__ int64_t chunk_id(const gdn_args &a, int s, int c)
{
    return (a.cu[s] - a.tok0) / kChunk + (s - a.seq0) + c;
}

__device__ __forceinline__ void load_rows(const gdn_args &a, uint32_t dst, int t, int n, int channel, int tid, int n_threads)
{
    for (int i = tid; i < kChunk * 16; i += n_threads) {
        int r = i >> 4, c = i & 15;
        bool ok = r < n;
        cp16(dst + at128(r, c), a.qkv + (int64_t)(t - a.tok0 + (ok ? r : 0)) * a.n_conv + channel + c * 8, ok);
    }
}

__device__ __forceinline__ uint32_t tf32(float x)
{
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ void mma_tf32(float *d, const uint32_t *a, uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* acc (16 x 16 as two 16 x 8) += L R, both 16 x 16 f32 tiles in shared memory with row stride kLd; tf32 products. */
__device__ __forceinline__ void tile_mma(float acc[2][4], const float *L, const float *R, int lane)
{
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int k = 0; k < 16; k += 8) {
        const uint32_t a[4] = { tf32(L[g * kLd + k + t]), tf32(L[(g + 8) * kLd + k + t]), tf32(L[g * kLd + k + t + 4]),
                                tf32(L[(g + 8) * kLd + k + t + 4]) };
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t b0 = tf32(R[(k + t) * kLd + n * 8 + g]), b1 = tf32(R[(k + t + 4) * kLd + n * 8 + g]);
            mma_tf32(acc[n], a, b0, b1);
        }
    }
}

__device__ __forceinline__ void tile_put(float *dst, const float acc[2][4], float sign, int lane)
{
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        *(float2 *)(dst + g * kLd + n * 8 + 2 * t) = make_float2(sign * acc[n][0], sign * acc[n][1]);
        *(float2 *)(dst + (g + 8) * kLd + n * 8 + 2 * t) = make_float2(sign * acc[n][2], sign * acc[n][3]);
    }
}

/* In place: the diagonal 16 x 16 block of I + M becomes its inverse, by forward substitution; lane j < 16 has column j. */
__device__ __forceinline__ void invert_diagonal(float *M, int lane)
{
    float x[16];
    const int j = lane & 15;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float v[4] = { i == j ? 1.f : 0.f, 0.f, 0.f, 0.f };
#pragma unroll
        for (int l = 0; l < i; l += 4) {
            const float4 m = *(const float4 *)(M + i * kLd + l);
            v[0] -= m.x * x[l];
            if (l + 1 < i)
                v[1] -= m.y * x[l + 1];
            if (l + 2 < i)
                v[2] -= m.z * x[l + 2];
            if (l + 3 < i)
                v[3] -= m.w * x[l + 3];
        }
        x[i] = (v[0] + v[1]) + (v[2] + v[3]);
    }
    __syncwarp();
    if (lane < 16)
#pragma unroll
        for (int i = 0; i < 16; i++)
            M[i * kLd + j] = x[i];
    __syncwarp();
}

/* (I + M)^-1 of a 64 x 64 unit lower triangle, in place, by four warps: diagonal blocks of 16, then 16 -> 32 -> 64 with
 * A21 = -A22 M21 A11. All threads of the block call it together. */
__device__ void invert_triangle(float *M, float *T, int wh, int lane, bool active)
{
    if (active)
        invert_diagonal(M + wh * 16 * kLd + wh * 16, lane);
    __syncthreads();
    if (active && wh < 2) {
        float *b10 = M + (wh * 2 + 1) * 16 * kLd + wh * 32, *d0 = M + wh * 32 * kLd + wh * 32, *d1 = d0 + 16 * kLd + 16;
        float *tmp = T + wh * 16 * kLd;
        float acc[2][4] = {};
        tile_mma(acc, b10, d0, lane);
        tile_put(tmp, acc, 1.f, lane);
        __syncwarp();
        float acc2[2][4] = {};
        tile_mma(acc2, d1, tmp, lane);
        __syncwarp();
        tile_put(b10, acc2, -1.f, lane);
    }
    __syncthreads();
    const int i = wh >> 1, j = wh & 1;
    float *mine = M + (32 + i * 16) * kLd + j * 16;
    if (active) {
        float acc[2][4] = {};
        tile_mma(acc, M + (32 + i * 16) * kLd, M + j * 16, lane);
        tile_mma(acc, M + (32 + i * 16) * kLd + 16, M + 16 * kLd + j * 16, lane);
        tile_put(T + i * 16 * kLd + j * 16, acc, 1.f, lane);
    }
    __syncthreads();
    if (active) {
        float acc[2][4] = {};
        tile_mma(acc, M + (32 + i * 16) * kLd + 32, T + j * 16, lane);
        if (i == 1)
            tile_mma(acc, M + 48 * kLd + 48, T + 16 * kLd + j * 16, lane);
        tile_put(mine, acc, -1.f, lane);
    }
    __syncthreads();
}

/* Block (chunk, key head, sequence), 8 warps; two value heads at a time, four warps each. */
__global__ void __launch_bounds__(256, 2) prepare_kernel(const gdn_args a)
{
    extern __shared__ __align__(128) unsigned char gdn_smem[];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, kh = blockIdx.y;
    const int s = a.seq0 + blockIdx.z, c = blockIdx.x;
    pdl_launch();
    pdl_wait();
    const int t_seq = a.cu[s], n_seq = a.cu[s + 1] - t_seq, t = t_seq + c * kChunk;
    if (c * kChunk >= n_seq)
        return;
    const int n = min(kChunk, n_seq - c * kChunk);
    const int64_t id = chunk_id(a, s, c);
    const uint32_t q_s = smem_u32(gdn_smem), k_s = q_s + kTile, v_s = k_s + kTile;
    float *tri = (float *)(gdn_smem + 4 * kTile);
    float *gam = tri + 2 * kChunk * kLd, *bet = gam + 2 * kChunk, *egb = bet + 2 * kChunk;     /* [2][64] each */

    load_rows(a, q_s, t, n, kh * kDim, tid, 256);
    load_rows(a, k_s, t, n, (a.n_k + kh) * kDim, tid, 256);
    cp_commit();

    /* The last chunk also moves the convolution state on: every reader of it was in the kernel before. */
    if (c * kChunk + n == n_seq) {
        bf16 *rec = conv_state(a, s);
        for (int i = tid; i < (2 + a.ratio) * kDim; i += 256) {
            int head = i / kDim, ch = i % kDim;
            ch += (head == 0 ? kh : head == 1 ? a.n_k + kh : 2 * a.n_k + kh * a.ratio + head - 2) * kDim;
            float u0 = conv_in(a, rec, t_seq, n_seq - 3, ch), u1 = conv_in(a, rec, t_seq, n_seq - 2, ch);
            float u2 = conv_in(a, rec, t_seq, n_seq - 1, ch);
            rec[ch] = __float2bfloat16_rn(u0);
            rec[a.n_conv + ch] = __float2bfloat16_rn(u1);
            rec[2 * a.n_conv + ch] = __float2bfloat16_rn(u2);
        }
    }

    const int mt = warp & 3, nh = warp >> 2, g = lane >> 2, tq = lane & 3;
    for (int h0 = 0; h0 < a.ratio; h0 += 2) {
        const int heads = min(2, a.ratio - h0), h = kh * a.ratio + h0;
        __syncthreads();
        for (int v = 0; v < heads; v++)
            load_rows(a, v_s + v * kTile, t, n, (2 * a.n_k + h + v) * kDim, tid, 256);
        cp_commit();
        if (tid < heads * 64) {
            int hh = h + (tid >> 6), i = tid & 63;
            float gi = 0.f, b = 0.f;
            if (i < n) {
                const bf16 *row = a.proj + (int64_t)(t + i) * a.ld_proj;
                gi = decay_log(a.A_log[hh], __bfloat162float(row[a.a_off + hh]) + a.dt_bias[hh]);
                b = sigmoidf(__bfloat162float(row[a.b_off + hh]));
            }
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                float up = __shfl_up_sync(0xffffffffu, gi, o);
                gi += lane >= o ? up : 0.f;
            }
            gam[tid] = gi;
            bet[tid] = b;
        }
        __syncthreads();
        float base = tid < heads * 64 && (tid & 32) ? gam[(tid & ~63) + 31] : 0.f;
        __syncthreads();
        if (tid < heads * 64)
            gam[tid] += base;
        cp_wait<0>();
        __syncthreads();
        if (tid < heads * 64) {
            float eg = expf(gam[tid]);
            egb[tid] = eg * bet[tid];
            float *d = a.decay + (id * a.n_v + h + (tid >> 6)) * 2 * kChunk;
            d[tid & 63] = eg;
            d[kChunk + (tid & 63)] = expf(gam[tid | 63] - gam[tid]);
        }
        /* Again for each pair of heads: keeping it would cost 32 registers per thread through the rest of the loop. */
        float kk[4][4] = {}, qk[4][4] = {};
#pragma unroll
        for (int ks = 0; ks < 8; ks++) {
            uint32_t ak[4], aq[4];
            ldsm4(ak, k_s + at128(mt * 16 + (lane & 15), ks * 2 + (lane >> 4)));
            ldsm4(aq, q_s + at128(mt * 16 + (lane & 15), ks * 2 + (lane >> 4)));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t b[4];
                ldsm4(b, k_s + at128(nh * 32 + j * 16 + (lane & 7) + ((lane >> 4) << 3), ks * 2 + ((lane >> 3) & 1)));
                mma16816(kk[2 * j], ak, b[0], b[1]);
                mma16816(kk[2 * j + 1], ak, b[2], b[3]);
                mma16816(qk[2 * j], aq, b[0], b[1]);
                mma16816(qk[2 * j + 1], aq, b[2], b[3]);
            }
        }
        for (int v = 0; v < heads; v++) {
            bf16 *p = a.p + (id * a.n_v + h + v) * kChunk * kChunk;
            const float *ga = gam + v * 64, *be = bet + v * 64;
            float *M = tri + v * kChunk * kLd;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int col = nh * 32 + j * 8 + 2 * tq;
                if (nh * 2 > mt)
                    break;              /* the upper right quarter: nobody reads it */
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int row = mt * 16 + g + r * 8;
                    /* Masked before the exponential: above the diagonal the exponent is positive and may overflow. */
                    float d0 = row >= col ? __expf(ga[row] - ga[col]) : 0.f, d1 = row >= col + 1 ? __expf(ga[row] - ga[col + 1]) : 0.f;
                    *(float2 *)(M + row * kLd + col) =
                        make_float2(row > col ? be[row] * kk[j][2 * r] * d0 : 0.f, row > col + 1 ? be[row] * kk[j][2 * r + 1] * d1 : 0.f);
                    *(uint32_t *)(p + row * kChunk + col) = pack2(qk[j][2 * r] * d0, qk[j][2 * r + 1] * d1);
                }
            }
        }
        __syncthreads();
        const int v = warp >> 2, wq = warp & 3;
        float *A = tri + v * kChunk * kLd;
        invert_triangle(A, A + 32, wq, lane, v < heads);        /* the upper right quarter is free: nothing reads it */
        if (v >= heads)
            continue;

        /* U^T [value 32 wq .. + 31][token] = V^T (A diag(beta))^T */
        const float *be = bet + v * 64, *eb = egb + v * 64;
        bf16 *ut = a.ut + (id * a.n_v + h + v) * kDim * kChunk;
#pragma unroll 1
        for (int m = 0; m < 2; m++) {
            float acc[8][4] = {};
#pragma unroll
            for (int ks = 0; ks < 4; ks++) {
                uint32_t av[4];
                ldsm4t(av, v_s + v * kTile + at128(ks * 16 + (lane & 7) + ((lane >> 4) << 3), wq * 4 + m * 2 + ((lane >> 3) & 1)));
                float2 b0 = *(const float2 *)(be + ks * 16 + 2 * tq), b1 = *(const float2 *)(be + ks * 16 + 8 + 2 * tq);
#pragma unroll
                for (int j = 2 * ks; j < 8; j++) {
                    const float *Ar = A + (j * 8 + g) * kLd + ks * 16 + 2 * tq;
                    float2 x = *(const float2 *)Ar, y = *(const float2 *)(Ar + 8);
                    mma16816(acc[j], av, pack2(x.x * b0.x, x.y * b0.y), pack2(y.x * b1.x, y.y * b1.y));
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                bf16 *o = ut + (wq * 32 + m * 16 + g) * kChunk + j * 8 + 2 * tq;
                *(uint32_t *)o = pack2(acc[j][0], acc[j][1]);
                *(uint32_t *)(o + 8 * kChunk) = pack2(acc[j][2], acc[j][3]);
            }
        }

        /* W [token][key 32 wq .. + 31] = A diag(beta e^gamma) K */
        bf16 *w = a.w + (id * a.n_v + h + v) * kChunk * kDim;
#pragma unroll 1
        for (int jp = 0; jp < 2; jp++) {
            float acc[4][2][4] = {};
#pragma unroll
            for (int ks = 0; ks < 4; ks++) {
                uint32_t b[4];
                ldsm4t(b, k_s + at128(ks * 16 + (lane & 7) + ((lane >> 3) & 1) * 8, wq * 4 + jp * 2 + (lane >> 4)));
                float2 e0 = *(const float2 *)(eb + ks * 16 + 2 * tq), e1 = *(const float2 *)(eb + ks * 16 + 8 + 2 * tq);
#pragma unroll
                for (int m = ks; m < 4; m++) {
                    const float *Ar = A + (m * 16 + g) * kLd + ks * 16 + 2 * tq;
                    float2 x0 = *(const float2 *)Ar, x1 = *(const float2 *)(Ar + 8 * kLd);
                    float2 x2 = *(const float2 *)(Ar + 8), x3 = *(const float2 *)(Ar + 8 * kLd + 8);
                    uint32_t af[4] = { pack2(x0.x * e0.x, x0.y * e0.y), pack2(x1.x * e0.x, x1.y * e0.y),
                                       pack2(x2.x * e1.x, x2.y * e1.y), pack2(x3.x * e1.x, x3.y * e1.y) };
                    mma16816(acc[m][0], af, b[0], b[1]);
                    mma16816(acc[m][1], af, b[2], b[3]);
                }
            }
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    bf16 *o = w + (m * 16 + g) * kDim + wq * 32 + jp * 16 + j * 8 + 2 * tq;
                    *(uint32_t *)o = pack2(acc[m][j][0], acc[m][j][1]);
                    *(uint32_t *)(o + 8 * kDim) = pack2(acc[m][j][2], acc[m][j][3]);
                }
        }
    }
}

/* ---- chunks: scan ---------------------------------------------------------------------------------------------------- */

const int kScanWarps = 4, kScanCols = kScanWarps / 2 * 16;
const int kScanStage = 3 * kTile + kChunk * kChunk * 2 + 2 * kChunk * 4;
const int kScanSwap = 12 * 32 * 16;         /* what a warp hands to its partner: 12 float4 per lane */
const int kScanSmem = 2 * kScanStage;        /* two blocks fit one multiprocessor, to the kilobyte */
static_assert(kScanWarps * kScanSwap <= 2 * kTile, "parts are exchanged in the place of W and Q");

__device__ __forceinline__ uint32_t transpose8x8(uint32_t v)
{
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

__device__ __forceinline__ void scan_load(const gdn_args &a, uint32_t dst, int64_t id, int t, int n, int h, int tid)
{
    const int kh = h / a.ratio;
    const bf16 *w = a.w + (id * a.n_v + h) * kChunk * kDim, *p = a.p + (id * a.n_v + h) * kChunk * kChunk;
    const float *d = a.decay + (id * a.n_v + h) * 2 * kChunk;
    /* Counted by copies and not by position, so that the loop unrolls and addresses are two adds apart. */
    const int c = tid & 15, r0 = tid >> 4;
    const bf16 *row = a.qkv + (int64_t)(t - a.tok0 + r0) * a.n_conv + c * 8;
    const bf16 *q = row + kh * kDim, *k = row + (a.n_k + kh) * kDim;
    w += r0 * kDim + c * 8;
#pragma unroll
    for (int j = 0; j < kChunk / (kScanWarps * 2); j++) {
        const int r = r0 + j * kScanWarps * 2;
        const uint32_t to = dst + at128(r, c);
        const bool ok = r < n;
        const int64_t step = ok ? (int64_t)j * kScanWarps * 2 * a.n_conv : 0;
        cp16(to, w + j * kScanWarps * 2 * kDim, true);
        cp16(to + kTile, ok ? q + step : a.qkv, ok);
        cp16(to + 2 * kTile, ok ? k + step : a.qkv, ok);
    }
#pragma unroll
    for (int j = 0; j < kChunk / (kScanWarps * 4); j++) {
        const int i = tid + j * kScanWarps * 32;
        cp16(dst + 3 * kTile + at64(i >> 3, i & 7), p + i * 8, true);
    }
    for (int i = tid; i < 2 * kChunk / 4; i += kScanWarps * 32)
        cp16(dst + 3 * kTile + kChunk * kChunk * 2 + i * 16, d + i * 4, true);
}

/* The two warps of a pair; barrier 0 is the block's. */
__device__ __forceinline__ void pair_sync(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory"); }

/*
 * Block (slices of 32 value columns, value head, sequence). Two warps own 16 columns, each with the keys of one half: products with S
 * are sums of two parts, which they exchange. Of the outputs, half 0 finishes tokens 0 .. 15 and 48 .. 63, half 1 those between, so
 * that both have the same part of the triangle P.
 */
__global__ void __launch_bounds__(kScanWarps * 32) scan_kernel(const gdn_args a)
{
    extern __shared__ __align__(128) unsigned char gdn_smem[];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, tq = lane & 3, pair = warp >> 1, half = warp & 1;
    const int h = blockIdx.y, s = a.seq0 + blockIdx.z, dv = blockIdx.x * kScanCols + pair * 16, dk = half * (kDim / 2);
    pdl_launch();
    pdl_wait();
    const int t0 = a.cu[s], n = a.cu[s + 1] - t0, n_chunks = (n + kChunk - 1) / kChunk;
    if (n == 0)
        return;
    const int64_t id0 = chunk_id(a, s, 0);
    scan_load(a, smem_u32(gdn_smem), id0, t0, min(n, kChunk), h, tid);
    cp_commit();

    float *S = s_state(a, s, h);
    float st[8][4];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            st[j][e] = S[(dk + j * 8 + 2 * tq + (e & 1)) * kDim + dv + g + (e >> 1) * 8];

    /* U of tokens 32 half .. + 31, a chunk ahead. */
    uint32_t u[4][2];
    auto load_u = [&](int c) {
        const bf16 *ut = a.ut + ((id0 + c) * a.n_v + h) * kDim * kChunk + (dv + g) * kChunk + half * 32 + 2 * tq;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u[j][0] = *(const uint32_t *)(ut + j * 8);
            u[j][1] = *(const uint32_t *)(ut + 8 * kChunk + j * 8);
        }
    };
    load_u(0);
    auto store = [&](float *to) {
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                to[(dk + j * 8 + 2 * tq + (e & 1)) * kDim + dv + g + (e >> 1) * 8] = st[j][e];
    };
    gdn_due due = next_save(a, s, 0);

    for (int c = 0; c < n_chunks; c++) {
        if (c * kChunk == due.n) {
            store(s_of_slot(a, due.slot, h));
            due = next_save(a, s, due.n);
        }
        cp_wait<0>();
        __syncthreads();
        if (c + 1 < n_chunks)
            scan_load(a, smem_u32(gdn_smem) + ((c + 1) & 1) * kScanStage, id0 + c + 1, t0 + (c + 1) * kChunk,
                      min(n - (c + 1) * kChunk, kChunk), h, tid);
        cp_commit();
        const uint32_t w_s = smem_u32(gdn_smem) + (c & 1) * kScanStage, q_s = w_s + kTile, k_s = q_s + kTile, p_s = k_s + kTile;
        const float *eg = (const float *)(gdn_smem + (c & 1) * kScanStage + 3 * kTile + kChunk * kChunk * 2), *ed = eg + kChunk;

        /* vn: W S - U, the part of this half. */
        float vn[8][4], o[8][4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float2 x = unpack2(u[j & 3][0]), y = unpack2(u[j & 3][1]);
            const bool mine = (j >> 2) == half;
            vn[j][0] = mine ? -x.x : 0.f;
            vn[j][1] = mine ? -x.y : 0.f;
            vn[j][2] = mine ? -y.x : 0.f;
            vn[j][3] = mine ? -y.y : 0.f;
            o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
        }
        if (c + 1 < n_chunks)
            load_u(c + 1);
#pragma unroll
        for (int ks = 0; ks < 4; ks++) {
            uint32_t as[4] = { pack2(st[2 * ks][0], st[2 * ks][1]), pack2(st[2 * ks][2], st[2 * ks][3]),
                               pack2(st[2 * ks + 1][0], st[2 * ks + 1][1]), pack2(st[2 * ks + 1][2], st[2 * ks + 1][3]) };
            const int chunk = half * 8 + ks * 2 + ((lane >> 3) & 1);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t b[4], d[4];
                ldsm4(b, w_s + at128(j * 16 + (lane & 7) + ((lane >> 4) << 3), chunk));
                ldsm4(d, q_s + at128(j * 16 + (lane & 7) + ((lane >> 4) << 3), chunk));
                mma16816(vn[2 * j], as, b[0], b[1]);
                mma16816(vn[2 * j + 1], as, b[2], b[3]);
                mma16816(o[2 * j], as, d[0], d[1]);
                mma16816(o[2 * j + 1], as, d[2], d[3]);
            }
        }
        /* Runs of 16 tokens whose outputs this warp finishes; the rest of o goes to the partner, in the order of its runs. */
        const int run0 = half ? 1 : 0, run1 = half ? 2 : 3;
        float4 *swap = (float4 *)(gdn_smem + (c & 1) * kScanStage + warp * kScanSwap) + lane;
        const float4 *theirs = (const float4 *)(gdn_smem + (c & 1) * kScanStage + (warp ^ 1) * kScanSwap) + lane;
        float out[4][4];
        __syncthreads();        /* W and Q of this chunk are done with: the parts go over them */
#pragma unroll
        for (int j = 0; j < 8; j++)
            swap[j * 32] = make_float4(vn[j][0], vn[j][1], vn[j][2], vn[j][3]);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float *x = o[j], *y = o[2 + j], *z = o[4 + j], *w = o[6 + j];
            swap[(8 + j) * 32] = half ? make_float4(x[0], x[1], x[2], x[3]) : make_float4(y[0], y[1], y[2], y[3]);
            swap[(10 + j) * 32] = half ? make_float4(w[0], w[1], w[2], w[3]) : make_float4(z[0], z[1], z[2], z[3]);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                out[j][e] = half ? y[e] : x[e];
                out[2 + j][e] = half ? z[e] : w[e];
            }
        }
        pair_sync(pair);
        const float last = eg[kChunk - 1];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float4 x = theirs[j * 32];
            vn[j][0] = -(vn[j][0] + x.x);
            vn[j][1] = -(vn[j][1] + x.y);
            vn[j][2] = -(vn[j][2] + x.z);
            vn[j][3] = -(vn[j][3] + x.w);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float4 x = theirs[(8 + j) * 32];
            float2 e = *(const float2 *)(eg + (j < 2 ? run0 : run1) * 16 + (j & 1) * 8 + 2 * tq);
            out[j][0] = (out[j][0] + x.x) * e.x;
            out[j][1] = (out[j][1] + x.y) * e.y;
            out[j][2] = (out[j][2] + x.z) * e.x;
            out[j][3] = (out[j][3] + x.w) * e.y;
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                st[j][e] *= last;
#pragma unroll
        for (int ks = 0; ks < 4; ks++) {
            float2 e0 = *(const float2 *)(ed + ks * 16 + 2 * tq), e1 = *(const float2 *)(ed + ks * 16 + 8 + 2 * tq);
            uint32_t ad[4] = { pack2(vn[2 * ks][0] * e0.x, vn[2 * ks][1] * e0.y), pack2(vn[2 * ks][2] * e0.x, vn[2 * ks][3] * e0.y),
                               pack2(vn[2 * ks + 1][0] * e1.x, vn[2 * ks + 1][1] * e1.y),
                               pack2(vn[2 * ks + 1][2] * e1.x, vn[2 * ks + 1][3] * e1.y) };
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t b[4];
                ldsm4t(b, k_s + at128(ks * 16 + (lane & 7) + ((lane >> 3) & 1) * 8, half * 8 + j * 2 + (lane >> 4)));
                mma16816(st[2 * j], ad, b[0], b[1]);
                mma16816(st[2 * j + 1], ad, b[2], b[3]);
            }
            uint32_t av[4] = { pack2(vn[2 * ks][0], vn[2 * ks][1]), pack2(vn[2 * ks][2], vn[2 * ks][3]),
                               pack2(vn[2 * ks + 1][0], vn[2 * ks + 1][1]), pack2(vn[2 * ks + 1][2], vn[2 * ks + 1][3]) };
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int run = r ? run1 : run0;
                if (ks <= run) {
                    uint32_t b[4];
                    ldsm4(b, p_s + at64(run * 16 + (lane & 7) + ((lane >> 4) << 3), ks * 2 + ((lane >> 3) & 1)));
                    mma16816(out[2 * r], av, b[0], b[1]);
                    mma16816(out[2 * r + 1], av, b[2], b[3]);
                }
            }
        }
        const int m = n - c * kChunk;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            /* Token becomes the row: lane holds token g of eight, columns dv + 2 tq and dv + 8 + 2 tq. */
            uint32_t lo = transpose8x8(pack2(out[j][0], out[j][1])), hi = transpose8x8(pack2(out[j][2], out[j][3]));
            int r = (j < 2 ? run0 : run1) * 16 + (j & 1) * 8 + g;
            if (r < m) {
                bf16 *to = a.out + (int64_t)(t0 + c * kChunk + r) * a.ld_out + h * kDim + dv + 2 * tq;
                *(uint32_t *)to = lo;
                *(uint32_t *)(to + 8) = hi;
            }
        }
    }
    cp_wait<0>();
    store(S);
}

/* ---- chunks: gate ---------------------------------------------------------------------------------------------------- */

/* One warp takes two heads of a token; 16 lanes of eight values make a head. */
__global__ void __launch_bounds__(256) gate_kernel(const gdn_args a)
{
    pdl_launch();
    pdl_wait();
    const int t = a.tok0 + blockIdx.x;
    const float4 *w4 = (const float4 *)(a.norm_w + (threadIdx.x & 15) * 8);
    const float4 wa = w4[0], wb = w4[1];
    const float w[8] = { wa.x, wa.y, wa.z, wa.w, wb.x, wb.y, wb.z, wb.w };
    for (int i = threadIdx.x; i < a.n_v * 16; i += 256) {
        uint4 *o = (uint4 *)(a.out + (int64_t)t * a.ld_out + i * 8);
        uint4 ov = *o, zv = *(const uint4 *)(a.proj + (int64_t)t * a.ld_proj + a.z_off + i * 8);
        const uint32_t *op = (const uint32_t *)&ov, *zp = (const uint32_t *)&zv;
        float ss = 0.f;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float2 f = unpack2(op[e]);
            ss += f.x * f.x + f.y * f.y;
        }
#pragma unroll
        for (int d = 8; d > 0; d >>= 1)
            ss += __shfl_xor_sync(0xffffffffu, ss, d);
        float rho = rsqrtf(ss / (float)kDim + a.eps);
        uint32_t r[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float2 f = unpack2(op[e]), z = unpack2(zp[e]);
            r[e] = pack2(f.x * rho * w[2 * e] * siluf(z.x), f.y * rho * w[2 * e + 1] * siluf(z.y));
        }
        *o = make_uint4(r[0], r[1], r[2], r[3]);
    }
}

} // namespace

#endif
