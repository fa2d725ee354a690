/* The gated delta net in chunks of 64 tokens on compute capability 9.0: what its two kernels share, and the first, tile. */
#ifndef BACKEND_CUDA_GDN_TILE_CUH
#define BACKEND_CUDA_GDN_TILE_CUH

#include "gdn_chunk.cuh"

namespace {

/* ---- chunks on compute capability 9.0 ---------------------------------------------------------------------------------- */

/*
 * The same chunks in two kernels, for machines with warpgroup products and bulk copies:
 *   tile   per chunk and key head: convolution of q and k, A = (I + M)^-1 diag(beta), P. Written as the tiles that `walk` reads.
 *   walk   per (sequence, head, 64 value columns), chunk after chunk: R = V - e^gamma K S, Vn = A R, O = e^gamma Q S + P Vn,
 *          S' = e^Gamma S + K^T (e^(Gamma - gamma) Vn). Its warpgroups: state (R, Vn, S'), outputs (O), convolution of v, and two
 *          for the gated norm. With few sequences a pair of blocks (gdn_pair.cuh) takes the place of each, with Vn = U - W S,
 *          U = A V, W = A diag(e^gamma) K.
 * What passes between them is K and Q [2][64][128] and A and P [2][64][64], bf16 in swizzled panels, and the two decays in f32.
 */
const int kKQ = 2 * kTile, kRec = 2 * kChunk * kChunk * 2 + 2 * kChunk * 4;
const int kWalkCols = 64, kStages = 3, kStage = (kKQ + kRec + 1023) / 1024 * 1024;
const int kColTile = kChunk * kWalkCols * 2, kRawTile = (kChunk + 3) * kWalkCols * 2;
const int kWalkSmem = 1024 + kStages * kStage + 5 * kColTile + kTile + 2 * kRawTile, kWalkThreads = 640;
const int kTileSmem = 1024 + kKQ + 2 * kChunk * kLd * 4 + 8 * kChunk * 4;
static_assert((kChunk + 3) * 2 * kDim * 2 <= 2 * kChunk * kLd * 4, "q and k before the convolution lie in the place of the triangles");

const int kSums = 2 * 6 * kChunk * 8;       /* [half][chunk % 6][64] of a sum and the number of its chunk plus one */

size_t tile_scratch(const gdn_args *a, int n_tokens)
{
    return ((size_t)n_tokens / kChunk + a->n_seqs) * ((size_t)a->n_k * kKQ + (size_t)a->n_v * kRec) + (size_t)a->n_seqs * a->n_v * kSums;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* mbar_wait with a time to sleep for: without it the waiting warps ask again every few dozen cycles and take the issue slots of the others. */
__device__ __forceinline__ void mbar_sleep(uint32_t bar, int parity)
{
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2;\n@p bra done;\nbra again;\ndone:\n}\n"
                 ::"r"(bar), "r"(parity), "r"(10000000) : "memory");
}

/* One arrival of a warp, after all of its lanes have come here. */
__device__ __forceinline__ void warp_arrive(uint32_t bar)
{
    __syncwarp();
    if ((threadIdx.x & 31) == 0)
        mbar_arrive(bar);
}

__device__ __forceinline__ void bulk_store(void *dst, uint32_t src, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}

/* Returns when shared memory may be written again. */
__device__ __forceinline__ void bulk_store_wait()
{
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ float exp2_fast(float x)
{
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

/* silu of eight values, one operation on all after the other: a warp that is alone with its scheduler waits for none of them. */
__device__ __forceinline__ void silu8(float (&x)[8])
{
    float e[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        e[i] = -1.4426950408889634f * x[i];
#pragma unroll
    for (int i = 0; i < 8; i++)
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(e[i]));
#pragma unroll
    for (int i = 0; i < 8; i++)
        e[i] += 1.f;
#pragma unroll
    for (int i = 0; i < 8; i++)
        asm volatile("rcp.approx.ftz.f32 %0, %0;" : "+f"(e[i]));
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] *= e[i];
}

__device__ __forceinline__ void stsm4(uint32_t addr, const uint32_t *r)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(addr), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

/* 64 rows whose columns lie in panels of 64, as operands: with the columns inside, step ks has 16 of them; else 16 rows. */
__device__ __forceinline__ uint64_t panels(uint32_t base) { return wgmma_desc(base, kChunk * 128); }
__device__ __forceinline__ uint64_t panel_step(uint64_t p, int ks) { return p + (((ks >> 2) * (kChunk * 128) + (ks & 3) * 32) >> 4); }
__device__ __forceinline__ uint64_t panel_rows(uint64_t p, int ks) { return p + (ks * 16 * 128 >> 4); }

template <int HALF> __device__ __forceinline__ void fold(float (&v)[8], bool up)
{
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float x = __shfl_xor_sync(0xffffffffu, up ? v[i] : v[i + HALF], HALF);
        v[i] = up ? v[i + HALF] : v[i];
        v[i] += x;
    }
}

/* Sums over the warp of 8 values at once; lane l gets that of value l & 7. */
__device__ __forceinline__ float warp_sum8(float (&v)[8], int lane)
{
    fold<4>(v, lane & 4);
    fold<2>(v, lane & 2);
    fold<1>(v, lane & 1);
    v[0] += __shfl_xor_sync(0xffffffffu, v[0], 8);
    return v[0] + __shfl_xor_sync(0xffffffffu, v[0], 16);
}

/* q and k of the key head before the convolution, [67][2][128], from three tokens before the chunk on. */
__device__ __forceinline__ void load_raw(const gdn_args &a, uint32_t dst, int s, int t_seq, int first, int n_seq, int kh, int tid)
{
    const int piece = tid & 31, r0 = tid >> 5, i0 = first + r0 - 3, ld = (int)a.ld_proj;
    const int ch = ((piece >> 4 ? a.n_k : 0) + kh) * kDim + (piece & 15) * 8;
    dst += r0 * 512 + piece * 16;
    if (first > 0 && first + kChunk <= n_seq) {
        const bf16 *row = a.proj + (int64_t)(t_seq + i0) * ld + a.u_off + ch;
#pragma unroll
        for (int j = 0; j < 8; j++, row += 8 * ld)
            cp16(dst + j * 8 * 512, row, true);
        if (r0 < 3)
            cp16(dst + 64 * 512, row, true);
        return;
    }
    for (int j = 0; j < 9; j++) {
        const int i = min(i0 + j * 8, n_seq - 1);
        if (r0 + j * 8 < kChunk + 3)
            cp16(dst + j * 8 * 512,
                 i >= 0 ? a.proj + (int64_t)(t_seq + i) * ld + a.u_off + ch : conv_state(a, s) + (int64_t)(3 + i) * a.n_conv + ch, true);
    }
}

/* Convolution of k (even warps) and q (odd warps), to the panels at kq; a warp has 16 tokens, a lane 4 channels. */
__device__ __forceinline__ void conv_key_head(const gdn_args &a, uint32_t raw, uint32_t kq, int is_q, int run, int n, int kh, int lane)
{
    const int c = ((is_q ? 0 : a.n_k) + kh) * kDim + lane * 4;
    const uint32_t from = raw + run * 16 * 512 + (is_q ^ 1) * 256 + lane * 8, to = kq + is_q * kTile + (lane & 1) * 8;
    auto token = [&](int i, float *f) {
        uint2 v;
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from + i * 512));
        unpack4(v, f);
    };
    float h0[4], h1[4], h2[4];
    float4 w[4];
    token(0, h0);
    token(1, h1);
    token(2, h2);
#pragma unroll
    for (int e = 0; e < 4; e++)
        w[e] = *(const float4 *)(a.conv_w + (int64_t)(c + e) * 4);
#pragma unroll
    for (int i0 = 0; i0 < 16; i0 += 8) {
        float ss[8];
        uint2 y[8];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float f[8];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float u[4];
                token(3 + i0 + i + j, u);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    f[4 * j + e] = w[e].x * h0[e] + w[e].y * h1[e] + w[e].z * h2[e] + w[e].w * u[e];
                    h0[e] = h1[e];
                    h1[e] = h2[e];
                    h2[e] = u[e];
                }
            }
            silu8(f);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float v[4];
                y[i + j] = make_uint2(pack2(f[4 * j], f[4 * j + 1]), pack2(f[4 * j + 2], f[4 * j + 3]));
                unpack4(y[i + j], v);
                ss[i + j] = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
            }
        }
        const float r = rsqrtf(warp_sum8(ss, lane) + 1e-6f) * (is_q ? 0.08838834764831845f : 1.f);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = run * 16 + i0 + i;
            float f[4], scale = __shfl_sync(0xffffffffu, r, i);
            unpack4(y[i], f);
            scale = row < n ? scale : 0.f;
            asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + panel_at<kChunk>(row, lane >> 1)), "r"(pack2(f[0] * scale, f[1] * scale)),
                         "r"(pack2(f[2] * scale, f[3] * scale)) : "memory");
        }
    }
}

/* Gate and beta of token i of the chunk, zero past its end; the gate as log2 of the decay. */
__device__ __forceinline__ void token_gates(const gdn_args &a, int t, int i, int n, int h, float *gam, float *bet)
{
    const bf16 *row = a.proj + (int64_t)(t + min(i, n - 1)) * a.ld_proj;
    const float x = __bfloat162float(row[a.a_off + h]), y = __bfloat162float(row[a.b_off + h]);
    *gam = i < n ? decay_log(a.A_log[h], x + a.dt_bias[h]) * 1.4426950408889634f : 0.f;
    *bet = i < n ? sigmoidf(y) : 0.f;
}

/* Gates of a value head are summed over the chunk by one warp, which also writes the decays of the record. */
__device__ __forceinline__ void sum_gates(float *gam, float *decay, int lane)
{
    float x = gam[lane], y = gam[lane + 32];
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        float u = __shfl_up_sync(0xffffffffu, x, o), v = __shfl_up_sync(0xffffffffu, y, o);
        x += lane >= o ? u : 0.f;
        y += lane >= o ? v : 0.f;
    }
    y += __shfl_sync(0xffffffffu, x, 31);
    const float last = __shfl_sync(0xffffffffu, y, 31);
    gam[lane] = x;
    gam[lane + 32] = y;
    decay[lane] = exp2f(x);
    decay[lane + 32] = exp2f(y);
    decay[kChunk + lane] = exp2f(last - x);
    decay[kChunk + lane + 32] = exp2f(last - y);
}

/* From K K^T (first warpgroup) the triangle M in f32, from Q K^T (second) P in bf16; w: warp of the warpgroup, with 16 rows. */
__device__ __forceinline__ void mask_products(const float (&d)[32], bool is_p, float *M, unsigned char *p, const float *gam, const float *bet,
                                              int w, int lane)
{
    const int g = lane >> 2, tq = lane & 3, row = w * 16 + g;
    const float ga0 = gam[row], ga1 = gam[row + 8], b0 = bet[row], b1 = bet[row + 8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int col = j * 8 + 2 * tq;
        float x[4] = { 0.f, 0.f, 0.f, 0.f };
        if (j <= 2 * w + 1) {
            /* Masked before the exponential: above the diagonal the exponent is positive and may overflow. */
            const float2 gc = *(const float2 *)(gam + col);
            x[0] = row >= col ? d[4 * j] * exp2_fast(ga0 - gc.x) : 0.f;
            x[1] = row >= col + 1 ? d[4 * j + 1] * exp2_fast(ga0 - gc.y) : 0.f;
            x[2] = row + 8 >= col ? d[4 * j + 2] * exp2_fast(ga1 - gc.x) : 0.f;
            x[3] = row + 8 >= col + 1 ? d[4 * j + 3] * exp2_fast(ga1 - gc.y) : 0.f;
        }
        if (is_p) {
            *(uint32_t *)(p + at64(row, j) + tq * 4) = pack2(x[0], x[1]);
            *(uint32_t *)(p + at64(row + 8, j) + tq * 4) = pack2(x[2], x[3]);
        } else if (w >= 2 || j < 4) {       /* the upper right quarter serves invert_triangle */
            *(float2 *)(M + row * kLd + col) = make_float2(row > col ? b0 * x[0] : 0.f, row > col + 1 ? b0 * x[1] : 0.f);
            *(float2 *)(M + (row + 8) * kLd + col) = make_float2(row + 8 > col ? b1 * x[2] : 0.f, row + 8 > col + 1 ? b1 * x[3] : 0.f);
        }
    }
}

/*
 * Block (key head, chunk, sequence), two warpgroups; two value heads at a time. Shared memory is used twice, so that three blocks fit a
 * multiprocessor: what goes to the convolution lies where the triangles will be, and P and A of the heads go over K and Q.
 */
__device__ __forceinline__ void tile_block(const gdn_args &a, unsigned char *smem)
{
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, kh = blockIdx.x, c = blockIdx.y, s = a.seq0 + blockIdx.z;
    const int t_seq = a.cu[s], n_seq = a.cu[s + 1] - t_seq, n = min(kChunk, n_seq - c * kChunk);
    if (n <= 0)
        return;
    const int64_t id = chunk_id(a, s, c);
    const uint32_t kq = smem_u32(smem);
    float *tri = (float *)(smem + kKQ), *gam = tri + 2 * kChunk * kLd, *bet = gam + 2 * kChunk, *decay = bet + 2 * kChunk;
    const int half = kChunk * kChunk * 2;       /* bytes of P or A */
    unsigned char *p = smem, *am = smem + 2 * half;

    load_raw(a, smem_u32(tri), s, t_seq, c * kChunk, n_seq, kh, tid);
    cp_commit();
    if (c == 0 && a.sums != NULL)       /* no chunk's sums have been posted yet */
        for (int i = tid; i < a.ratio * kSums / 16; i += 256)
            ((uint4 *)(a.sums + ((int64_t)blockIdx.z * a.n_v + kh * a.ratio) * kSums))[i] = make_uint4(0, 0, 0, 0);
    int heads = min(2, a.ratio);
    if (tid < heads * kChunk)
        token_gates(a, t_seq + c * kChunk, tid & 63, n, kh * a.ratio + (tid >> 6), gam + tid, bet + tid);
    cp_wait<0>();
    __syncthreads();
    conv_key_head(a, smem_u32(tri), kq, warp & 1, warp >> 1, n, kh, lane);
    wgmma_publish();
    __syncthreads();
    if (tid == 0)
        bulk_store(a.kq + (id * a.n_k + kh) * kKQ, kq, kKQ);

    const int wg = warp >> 2, w = warp & 3;
    float d[32];
    wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < 8; ks++)
        wgmma_ss(d, panel_step(panels(kq + wg * kTile), ks), panel_step(panels(kq), ks), ks > 0);
    wgmma_commit();
    if (w == 3 && wg < heads)
        sum_gates(gam + wg * 64, decay + wg * 2 * kChunk, lane);
    wgmma_wait<0>();
    wgmma_hold(d);
    if (tid == 0)
        bulk_store_wait();
    __syncthreads();

    for (int h0 = 0; h0 < a.ratio; h0 += 2) {
        heads = min(2, a.ratio - h0);
        if (h0 > 0) {
            if (tid < 2)
                bulk_store_wait();
            __syncthreads();
            if (tid < heads * kChunk)
                token_gates(a, t_seq + c * kChunk, tid & 63, n, kh * a.ratio + h0 + (tid >> 6), gam + tid, bet + tid);
            __syncthreads();
            if (w == 3 && wg < heads)
                sum_gates(gam + wg * 64, decay + wg * 2 * kChunk, lane);
            __syncthreads();
        }
        for (int v = 0; v < heads; v++)
            mask_products(d, wg == 1, tri + v * kChunk * kLd, p + v * half, gam + v * 64, bet + v * 64, w, lane);
        __syncthreads();
        float *A = tri + wg * kChunk * kLd;
        invert_triangle(A, A + 32, w, lane, wg < heads);
        if (wg < heads) {
            const float2 be = *(const float2 *)(bet + wg * 64 + 2 * lane);
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int row = w * 16 + i, col = 2 * lane;
                const float2 x = *(const float2 *)(A + row * kLd + col);
                *(uint32_t *)(am + wg * half + at64(row, lane >> 2) + (lane & 3) * 4) =
                    pack2(col <= row ? x.x * be.x : 0.f, col < row ? x.y * be.y : 0.f);
            }
        }
        wgmma_publish();
        __syncthreads();
        if (tid < heads) {
            unsigned char *rec = a.rec + (id * a.n_v + kh * a.ratio + h0 + tid) * kRec;
            bulk_store(rec, smem_u32(am) + tid * half, half);
            bulk_store(rec + half, smem_u32(p) + tid * half, half);
            bulk_store(rec + 2 * half, smem_u32(decay) + tid * 2 * kChunk * 4, 2 * kChunk * 4);
        }
    }
    if (tid < 2)
        bulk_store_wait();
}

#endif

__global__ void __launch_bounds__(256, 3) tile_kernel(const gdn_args a)
{
    extern __shared__ __align__(128) unsigned char gdn_smem[];
    pdl_launch();
    pdl_wait();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    tile_block(a, gdn_smem + (-smem_u32(gdn_smem) & 1023));
#endif
}

} // namespace

#endif
