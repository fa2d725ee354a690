/* The gated delta net in chunks of 64 tokens on compute capability 9.0: what its two kernels share, and the first, tile. */
#ifndef BACKEND_CUDA_GDN_TILE_CUH
#define BACKEND_CUDA_GDN_TILE_CUH

#include "gdn_chunk.cuh"

namespace {

/* ---- chunks on compute capability 9.0 ---------------------------------------------------------------------------------- */

/*
 * The same chunks in two kernels, for machines with warpgroup products and bulk copies:
 *   tile   per chunk, key head and two of its value heads: convolution of q and k, A = (I + M)^-1 diag(beta), P. Written as the tiles
 *          that `walk` reads.
 *   walk   per (sequence, head, 64 value columns), chunk after chunk: R = V - e^gamma K S, Vn = A R, O = e^gamma Q S + P Vn,
 *          S' = e^Gamma S + K^T (e^(Gamma - gamma) Vn). Its warpgroups: state (R, Vn, S'), outputs (O), convolution of v, and two
 *          for the gated norm. With few sequences a pair of blocks (gdn_pair.cuh) takes the place of each, with Vn = U - W S,
 *          U = A V, W = A diag(e^gamma) K.
 * What passes between them is K and Q [2][64][128] and A and P [2][64][64], bf16 in swizzled panels, and the two decays in f32.
 */
/* Bytes of A or P; of K and Q; of the rest of a chunk and head. */
const int kHalf = kChunk * kChunk * 2, kKQ = 2 * kTile, kRec = 2 * kHalf + 2 * kChunk * 4;
const int kWalkCols = 64, kStages = 3, kStage = (kKQ + kRec + 1023) / 1024 * 1024;
const int kPairStage = (kKQ + kHalf + 2 * kChunk * 4 + 1023) / 1024 * 1024;     /* of the state's block in a pair: K, Q, P, decays */
const int kColTile = kChunk * kWalkCols * 2, kRawTile = (kChunk + 3) * kWalkCols * 2;
const int kWalkSmem = 1024 + kStages * kStage + 5 * kColTile + kTile + 2 * kRawTile, kWalkThreads = 640;
const int kTriTile = 16 * 16 * 4, kTriangle = 10 * kTriTile;        /* of a tile of the triangle; of those on and below its diagonal */
const int kTileSmem = 1024 + kKQ + 2 * kTriangle + 8 * kChunk * 4;

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

/* As stsm4, each tile of 8 x 8 transposed. */
__device__ __forceinline__ void stsm4t(uint32_t addr, const uint32_t *r)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(addr), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

/* ---- tile: convolution ------------------------------------------------------------------------------------------------- */

/* q or k of a key head before the convolution, by a warpgroup: tokens of the chunk to the panels at `to`, the three before to `before`. */
__device__ __forceinline__ void load_raw(const gdn_args &a, uint32_t to, uint32_t before, int s, int t_seq, int first, int n_seq, int ch,
                                         int tid)
{
    const int piece = tid & 15, r0 = (tid >> 4) - 3, i0 = first + r0, ld = (int)a.ld_proj;
    const uint32_t at = panel_at<kChunk>(r0 & 7, piece), first_to = r0 < 0 ? before + at : to + at;
    ch += piece * 8;
    to += at - (r0 < 0 ? 1024 : 0);
    if (first > 0 && first + kChunk <= n_seq) {
        const bf16 *row = a.proj + (int64_t)(t_seq + i0) * ld + a.u_off + ch;
        cp16(first_to, row, true);
#pragma unroll
        for (int j = 1; j < 8; j++)
            cp16(to + j * 1024, row += 8 * ld, true);
        if (r0 < 0)
            cp16(to + 8 * 1024, row + 8 * ld, true);
        return;
    }
    for (int j = 0; j < 9; j++) {
        const int i = min(i0 + j * 8, n_seq - 1);
        if (r0 + j * 8 < kChunk)
            cp16(j == 0 ? first_to : to + j * 1024,
                 i >= 0 ? a.proj + (int64_t)(t_seq + i) * ld + a.u_off + ch : conv_state(a, s) + (int64_t)(3 + i) * a.n_conv + ch, true);
    }
}

/*
 * Weights of a channel as they stand in operands: the convolution is a product with a diagonal matrix for each of the four taps. Each is
 * split in two bf16, which do for 16 bits of it.
 */
const int kTaps = 2 * 2 * kDim * 16;        /* bytes: halves of weights, [2][256 channels][4] of 32 bits */
const float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ void put_taps(uint32_t taps, float4 v, int channel)
{
    const float w[4] = { v.x, v.y, v.z, v.w };
    const int shift = (channel & 1) * 16;
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        hi[i] = pack2(w[i], 0.f);
        lo[i] = pack2(w[i] - unpack2(hi[i]).x, 0.f) << shift;
        hi[i] <<= shift;
    }
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"r"(taps + channel * 16), "r"(hi[0]), "r"(hi[1]), "r"(hi[2]), "r"(hi[3]) : "memory");
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"r"(taps + kTaps / 2 + channel * 16), "r"(lo[0]), "r"(lo[1]), "r"(lo[2]), "r"(lo[3]) : "memory");
}

/* In lanes where `mine` holds; others keep what they have. */
__device__ __forceinline__ void take_taps(uint32_t (&hi)[4], uint32_t (&lo)[4], uint32_t addr, int mine)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %9, 0;\n"
                 "@p ld.shared.v4.b32 {%0, %1, %2, %3}, [%8];\n@p ld.shared.v4.b32 {%4, %5, %6, %7}, [%8 + 4096];\n}\n"
                 : "+r"(hi[0]), "+r"(hi[1]), "+r"(hi[2]), "+r"(hi[3]), "+r"(lo[0]), "+r"(lo[1]), "+r"(lo[2]), "+r"(lo[3])
                 : "r"(addr), "r"(mine) : "memory");
}

/* Asked for again where else what follows from it would take registers that are scarce in between. */
__device__ __forceinline__ int thread_again()
{
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/*
 * Convolution, silu and norm of q or k, in place; a warp has 16 tokens of a warpgroup's 64. Channels c and c + 64 at a time; rows of the
 * operands are tokens, their inner dimension 8 channels at one tap and the same 8 at the next. Rows past the end have copies of the last
 * token, which count for nothing since their beta is zero.
 */
template <int WIDE> __device__ __forceinline__ void conv_key_head(uint32_t kq, uint32_t rest, int tid)
{
    const int lane = tid & 31, g = lane >> 2, mine = (lane & 3) == g >> 1, r = (tid >> 5 & 3) * 16 + (lane & 15) + (lane >> 4) - 3;
    const uint32_t tile = kq + (tid >> 7) * kTile, before = rest + (tid >> 7) * 1024;
    const uint32_t taps = rest + kTriangle + (tid >> 7) * kDim * 16 + g * 16;
    auto place = [&](int i) { return (i < 0 ? before : tile + (i & ~7) * 128) + (i & 7) * 144; };       /* of its first 8 channels */
    const uint32_t from0 = place(r), from2 = place(r + 2);
    uint32_t y[16][2], hi[WIDE][4] = {}, lo[WIDE][4] = {};
    float s0 = 0.f, s1 = 0.f;
#pragma unroll
    for (int c = 0; c < 8; c++) {
        float f[8] = {};
#pragma unroll
        for (int p = 0; p < 2; p += WIDE) {
            uint32_t x0[WIDE][4], x2[WIDE][4];
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
                take_taps(hi[i], lo[i], taps + ((p + i) * 8 + c) * 128, mine);
                ldsm4(x0[i], (from0 ^ c << 4) + (p + i) * kChunk * 128);
                ldsm4(x2[i], (from2 ^ c << 4) + (p + i) * kChunk * 128);
            }
            /* Products of one sum wait for each other. */
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int i = 0; i < WIDE; i++) {
                    const uint32_t *w = (j & 2 ? lo[i] : hi[i]) + 2 * (j & 1);
                    mma16816(f + 4 * (p + i), j & 1 ? x2[i] : x0[i], w[0], w[1]);
                }
        }
        silu8(f);
#pragma unroll
        for (int p = 0; p < 8; p += 4) {
            s0 += f[p] * f[p] + f[p + 1] * f[p + 1];
            s1 += f[p + 2] * f[p + 2] + f[p + 3] * f[p + 3];
            y[2 * p + c][0] = pack2(f[p], f[p + 1]);
            y[2 * p + c][1] = pack2(f[p + 2], f[p + 3]);
        }
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) {
        s0 += __shfl_xor_sync(0xffffffffu, s0, o);
        s1 += __shfl_xor_sync(0xffffffffu, s1, o);
    }
    /* Times the norm in two bf16, of which the second does for the bits that the first lacks. */
    const int again = thread_again(), is_q = again >> 7, row = again & 15, i0 = (again >> 5 & 3) * 16;
    const float norm = is_q ? 0.08838834764831845f : 1.f;
    const float n0 = norm * rsqrtf(s0 + 1e-6f), n1 = norm * rsqrtf(s1 + 1e-6f);
    const __nv_bfloat162 big[2] = { __float2bfloat162_rn(n0), __float2bfloat162_rn(n1) };
    const __nv_bfloat162 small[2] = { __float2bfloat162_rn(n0 - __low2float(big[0])), __float2bfloat162_rn(n1 - __low2float(big[1])) };
    bar_sync(1 + is_q, 128);    /* all have read their rows */
    const uint32_t to = kq + is_q * kTile + (again >> 4 & 1) * kChunk * 128 + (i0 + (row & 8)) * 128 + (row & 7) * 144;
#pragma unroll
    for (int c = 0; c < 8; c++) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const __nv_bfloat162 x = *(const __nv_bfloat162 *)&y[c + (i >> 1) * 8][i & 1];
            const __nv_bfloat162 z = __hfma2(x, big[i & 1], __hmul2(x, small[i & 1]));
            v[i] = *(const uint32_t *)&z;
        }
        stsm4(to ^ c << 4, v);
    }
}

/* ---- tile: gates, triangle and products -------------------------------------------------------------------------------------- */

/* Gates of a value head, of tokens lane and lane + 32, zero past the end: sums over the chunk of log2 of the decays, and those of the
 * record. */
__device__ __forceinline__ void sum_gates(const unsigned short (&gates)[2], int n, float A_log, float dt_bias, float *gam, float *decay,
                                          int lane)
{
    float x[2] = { __uint_as_float(gates[0] << 16), __uint_as_float(gates[1] << 16) };
    const float rate = -expf(A_log);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        x[i] = (x[i] + dt_bias) * kLog2e;
        x[i] = lane + 32 * i < n ? rate * (fmaxf(x[i], 0.f) + __log2f(1.f + exp2_fast(-fabsf(x[i])))) : 0.f;
    }
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const float u = __shfl_up_sync(0xffffffffu, x[0], o), v = __shfl_up_sync(0xffffffffu, x[1], o);
        x[0] += lane >= o ? u : 0.f;
        x[1] += lane >= o ? v : 0.f;
    }
    x[1] += __shfl_sync(0xffffffffu, x[0], 31);
    const float last = __shfl_sync(0xffffffffu, x[1], 31);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        gam[lane + 32 * i] = x[i];
        decay[lane + 32 * i] = exp2_fast(x[i]);
        decay[kChunk + lane + 32 * i] = exp2_fast(last - x[i]);
    }
}

__device__ __forceinline__ void put_betas(const unsigned short (&gates)[2], int n, float *bet, int lane)
{
#pragma unroll
    for (int i = 0; i < 2; i++)
        bet[lane + 32 * i] = lane + 32 * i < n ? sigmoidf(__uint_as_float(gates[i] << 16)) : 0.f;
}

/*
 * Tiles of 16 x 16 of the triangle in f32, rounded to tf32, as a lane needs them: of a tile of 8 x 8 row lane / 4 and columns 2 (lane % 4)
 * and the one after (so accumulators come, too), the upper and the lower tile of the left half, then those of the right half. As that
 * operand whose columns are the rows of the tile: inner dimensions are numbered so that 2 i and 2 i + 1 are the i-th and the (i + 4)-th.
 */
__device__ __forceinline__ uint32_t below(int i, int k) { return (i * (i - 1) / 2 + k) * kTriTile; }
__device__ __forceinline__ uint32_t diagonal(int i) { return (6 + i) * kTriTile; }

__device__ __forceinline__ void put4(uint32_t addr, float x, float y, float z, float w)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(tf32(x)), "r"(tf32(y)), "r"(tf32(z)), "r"(tf32(w)) : "memory");
}

/* d += X T^T, with X as operand_of left it and the tile T at addr. */
__device__ __forceinline__ void mma_tile(float (&d)[8], const uint32_t (&x)[8], uint32_t addr)
{
#pragma unroll
    for (int ks = 0; ks < 2; ks++) {
        uint32_t b[4];
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(addr + ks * 512));
        mma_tf32(d, x + 4 * ks, b[0], b[1]);
        mma_tf32(d + 4, x + 4 * ks, b[2], b[3]);
    }
}

__device__ __forceinline__ void operand_of(uint32_t (&x)[8], const float (&d)[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = tf32(d[(i & 4) | (i & 1) << 1 | (i >> 1 & 1)]);
}

/* Products of two rows, whose sums of gates are ga0 and ga1, and 16 columns, of which gam has them from a lane's first on, times the
 * decay between. */
__device__ __forceinline__ void decayed(float (&x)[8], const float *v, float ga0, float ga1, const float *gam)
{
#pragma unroll
    for (int ks = 0; ks < 2; ks++) {
        const float2 gc = *(const float2 *)(gam + ks * 8);
        x[4 * ks] = v[4 * ks] * exp2_fast(ga0 - gc.x);
        x[4 * ks + 1] = v[4 * ks + 1] * exp2_fast(ga0 - gc.y);
        x[4 * ks + 2] = v[4 * ks + 2] * exp2_fast(ga1 - gc.x);
        x[4 * ks + 3] = v[4 * ks + 3] * exp2_fast(ga1 - gc.y);
    }
}

/* From K K^T this warp's row of tiles of the triangle. That on the diagonal is returned in f32, two values of each of its quarters: lower
 * right, lower left, upper left. */
__device__ __forceinline__ void triangle_row(const float (&d)[32], uint32_t tri, const float *gam, const float *bet, float (&on)[6], int w,
                                             int lane)
{
    const int g = lane >> 2, tq = lane & 3, row = w * 16 + g;
    const float ga0 = gam[row] + __log2f(bet[row]), ga1 = gam[row + 8] + __log2f(bet[row + 8]);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k > w)
            break;
        float x[8];
        decayed(x, d + 8 * k, ga0, ga1, gam + k * 16 + 2 * tq);
        if (k < w) {
            put4(tri + below(w, k) + lane * 16, x[0], x[1], x[2], x[3]);
            put4(tri + below(w, k) + lane * 16 + 512, x[4], x[5], x[6], x[7]);
        } else {        /* what lies on or above the diagonal may have overflowed */
            on[0] = g > 2 * tq ? x[6] : 0.f;
            on[1] = g > 2 * tq + 1 ? x[7] : 0.f;
            on[2] = x[2];
            on[3] = x[3];
            on[4] = g > 2 * tq ? x[0] : 0.f;
            on[5] = g > 2 * tq + 1 ? x[1] : 0.f;
        }
    }
}

/* (I + N)^-1 of a strict lower triangle of 8 x 8 that lies over the lanes as above. */
__device__ __forceinline__ void invert8(float *y, const float *n, int lane)
{
    y[0] = -n[0];
    y[1] = -n[1];
#pragma unroll
    for (int k = 1; k < 7; k++) {
        const float m = __shfl_sync(0xffffffffu, n[k & 1], (lane & 28) | k >> 1);
        const float u = __shfl_sync(0xffffffffu, y[0], k * 4 + (lane & 3)), v = __shfl_sync(0xffffffffu, y[1], k * 4 + (lane & 3));
        y[0] -= m * u;
        y[1] -= m * v;
    }
    y[0] += lane >> 2 == 2 * (lane & 3) ? 1.f : 0.f;
    y[1] += lane >> 2 == 2 * (lane & 3) + 1 ? 1.f : 0.f;
}

__device__ __forceinline__ void transpose8(float *t, const float *x, int lane)
{
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int from = (2 * (lane & 3) + e) * 4 + (lane >> 3);
        const float u = __shfl_sync(0xffffffffu, x[0], from), v = __shfl_sync(0xffffffffu, x[1], from);
        t[e] = lane & 4 ? v : u;
    }
}

/* D, the inverse of I + a diagonal tile: -D to `to`, D^T returned as accumulators lie. */
__device__ __forceinline__ void invert_diagonal_tile(const float (&on)[6], uint32_t to, float (&dt)[8], int lane)
{
    float d0[2], d1[2], x[4] = {}, z[4] = {}, low[2];
    invert8(d0, on + 4, lane);
    invert8(d1, on, lane);
    transpose8(dt, d0, lane);
    /* Its lower left quarter is -D1 N10 D0: transposed, rows 8 to 15 of the operands zero. */
    const uint32_t l0[4] = { tf32(dt[0]), 0, tf32(dt[1]), 0 };
    mma_tf32(x, l0, tf32(on[2]), tf32(on[3]));
    const uint32_t l1[4] = { tf32(x[0]), 0, tf32(x[1]), 0 };
    mma_tf32(z, l1, tf32(d1[0]), tf32(d1[1]));
    transpose8(low, z, lane);
    transpose8(dt + 6, d1, lane);
    dt[2] = dt[3] = 0.f;
    dt[4] = -z[0];
    dt[5] = -z[1];
    put4(to + lane * 16, -d0[0], -d0[1], low[0], low[1]);
    put4(to + lane * 16 + 512, 0.f, 0.f, -d1[0], -d1[1]);
}

/*
 * Columns 16 w .. 16 w + 15 of A = (I + M)^-1 diag(beta), tile after tile downwards: X_i = -(sum of X_k M_ik^T) D_i^T with the tiles
 * transposed, so that results are operands as they are. dt: the first, of which -D is with M at tri.
 */
__device__ __forceinline__ void solve_columns(uint32_t tri, float (&dt)[8], const float *bet, uint32_t am, int w, int lane)
{
    const float be0 = bet[w * 16 + (lane >> 2)], be1 = bet[w * 16 + (lane >> 2) + 8];
    const uint32_t to = am + (lane & 15) * 128 + (((w * 2 + (lane >> 4)) ^ (lane & 7)) << 4), zero[4] = {};
    uint32_t x[3][8];
    auto store = [&](int i, const float (&v)[8]) {
        const uint32_t r[4] = { pack2(v[0] * be0, v[1] * be0), pack2(v[4] * be0, v[5] * be0), pack2(v[2] * be1, v[3] * be1),
                                pack2(v[6] * be1, v[7] * be1) };
        stsm4t(to + i * 2048, r);
    };
    for (int i = 0; i < w; i++)
        stsm4t(to + i * 2048, zero);
    store(w, dt);
    operand_of(x[0], dt);
    tri += lane * 16;
#pragma unroll
    for (int di = 1; di < 4; di++) {
        if (w + di > 3)
            continue;       /* a break would keep the loop from being unrolled */
        float sum[8] = {}, v[8] = {};
        uint32_t left[8];
#pragma unroll
        for (int dk = 0; dk < di; dk++)
            mma_tile(sum, x[dk], tri + below(w + di, w + dk));
        operand_of(left, sum);
        mma_tile(v, left, tri + diagonal(w + di));
        store(w + di, v);
        if (di < 3)
            operand_of(x[di], v);
    }
}

/* From Q K^T this warp's rows of P. */
__device__ __forceinline__ void mask_outputs(const float (&d)[32], uint32_t p, const float *gam, int w, int lane)
{
    const int g = lane >> 2, tq = lane & 3, row = w * 16 + g;
    const float ga0 = gam[row], ga1 = gam[row + 8];
    const uint32_t to = p + (w * 16 + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t r[4] = {};
        if (k <= w) {
            float x[8];
            decayed(x, d + 8 * k, ga0, ga1, gam + k * 16 + 2 * tq);
            if (k == w) {       /* above the diagonal it may have overflowed */
                x[0] = g >= 2 * tq ? x[0] : 0.f;
                x[1] = g >= 2 * tq + 1 ? x[1] : 0.f;
                x[4] = x[5] = 0.f;
                x[6] = g >= 2 * tq ? x[6] : 0.f;
                x[7] = g >= 2 * tq + 1 ? x[7] : 0.f;
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                r[i] = pack2(x[2 * i], x[2 * i + 1]);
        }
        stsm4(to ^ k << 5, r);
    }
}

/* What a warpgroup of `tile` needs to know. */
struct tile {
    int tid, w, lane, wg, kh, v, h;                         /* v: value head among those of the key head */
    uint32_t kq, rest;                                      /* shared memory */
    float *gam, *bet, *decay;

    __device__ __forceinline__ tile(const gdn_args &a, unsigned char *smem)
    {
        const int x = thread_again();
        int y;
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(y));
        const int n_pairs = (a.ratio + 1) >> 1;
        wg = x >> 7;
        tid = x & 127;
        w = tid >> 5;
        lane = tid & 31;
        kh = y / n_pairs;
        v = y % n_pairs * 2 + wg;
        h = kh * a.ratio + min(v, a.ratio - 1);
        kq = smem_u32(smem);
        rest = kq + kKQ;
        gam = (float *)(smem + kKQ + 2 * kTriangle) + wg * 4 * kChunk;
        bet = gam + kChunk;
        decay = bet + kChunk;
    }
};

/* Tokens, gates and weights of the convolution come in, and K and Q come of them. */
template <int WIDE> __device__ __forceinline__ void tile_inputs(const gdn_args &a, const tile &k, int s, int t0, int n_seq)
{
    const int first = blockIdx.y * kChunk, n = min(kChunk, n_seq - first);
    const uint32_t mine = k.kq + k.wg * kTile, before = k.rest + k.wg * 1024, taps = k.rest + kTriangle;
    const int ch = ((k.wg ? 0 : a.n_k) + k.kh) * kDim;
    const float4 w4 = *(const float4 *)(a.conv_w + (int64_t)(ch + k.tid) * 4);
    const float A_log = a.A_log[k.h], dt_bias = a.dt_bias[k.h];
    pdl_wait();
    pdl_launch();       /* not before the wait: `walk` reads what the kernel before this one wrote without waiting for this one */
    /* Gates are asked for before the tokens, so that sums are made while those are on their way. */
    unsigned short gates[2] = {};
    if (k.w < 2)
#pragma unroll
        for (int i = 0; i < 2; i++)
            gates[i] = *((const unsigned short *)a.proj + (int64_t)(t0 + min(first + k.lane + 32 * i, n_seq - 1)) * a.ld_proj
                         + (k.w ? a.b_off : a.a_off) + k.h);
    load_raw(a, mine, before, s, t0, first, n_seq, ch, k.tid);
    cp_commit();
    put_taps(taps, w4, k.wg * kDim + k.tid);
    if (k.w == 0)
        sum_gates(gates, n, A_log, dt_bias, k.gam, k.decay, k.lane);
    else if (k.w == 1)
        put_betas(gates, n, k.bet, k.lane);
    else if (first == 0 && a.sums != NULL)      /* no chunk's sums have been posted yet */
        for (int i = k.tid - 64; i < kSums / 16; i += 64)
            ((uint4 *)(a.sums + ((int64_t)blockIdx.z * a.n_v + k.h) * kSums))[i] = make_uint4(0, 0, 0, 0);
    cp_wait<0>();
    bar_sync(1 + k.wg, 128);
    conv_key_head<WIDE>(k.kq, k.rest, thread_again());
    wgmma_publish();
    __syncthreads();
}

/* Of them P and A. id: of the chunk. */
__device__ __forceinline__ void tile_outputs(const gdn_args &a, const tile &k, int64_t id)
{
    const uint32_t tri = k.rest + k.wg * kTriangle, p = k.kq + k.wg * kHalf, am = k.kq + (2 + k.wg) * kHalf;
    const bool first = k.tid == 0 && k.wg == 0;
    float d[32], on[6], dt[8];
    auto products = [&](uint32_t left) {
        wgmma_fence();
#pragma unroll
        for (int ks = 0; ks < 8; ks++)
            wgmma_ss(d, panel_step(panels(left), ks), panel_step(panels(k.kq), ks), ks > 0);
        wgmma_commit();
    };
    products(k.kq);
    if (first && k.v == 0)
        bulk_store(a.kq + (id * a.n_k + k.kh) * kKQ, k.kq, kKQ);
    wgmma_wait<0>();
    wgmma_hold(d);
    triangle_row(d, tri, k.gam, k.bet, on, k.w, k.lane);
    products(k.kq + kTile);
    invert_diagonal_tile(on, tri + diagonal(k.w), dt, k.lane);
    wgmma_wait<0>();
    wgmma_hold(d);
    if (first)
        bulk_store_wait();
    __syncthreads();
    mask_outputs(d, p, k.gam, k.w, k.lane);
    solve_columns(tri, dt, k.bet, am, k.w, k.lane);
    wgmma_publish();
    bar_sync(1 + k.wg, 128);
    if (k.tid == 0 && k.v < a.ratio) {
        unsigned char *rec = a.rec + (id * a.n_v + k.h) * kRec;
        bulk_store(rec, am, kHalf);
        bulk_store(rec + kHalf, p, kHalf);
        bulk_store(rec + 2 * kHalf, smem_u32(k.decay), 2 * kChunk * 4);
        bulk_store_wait();
    }
}

/*
 * Block (key head and two of its value heads, chunk, sequence), two warpgroups: the first has k and one value head, the second q and the
 * other. Shared memory is used twice, so that several blocks fit a multiprocessor: q and k are loaded to where they stay, P and A of the
 * heads go over them, and the triangles over the weights of the convolution and the tokens before the chunk.
 */
template <int WIDE> __device__ __forceinline__ void tile_block(const gdn_args &a, unsigned char *smem)
{
    const int s = a.seq0 + blockIdx.z, t0 = a.cu[s], n_seq = a.cu[s + 1] - t0, id = (int)chunk_id(a, s, blockIdx.y);
    if (n_seq <= (int)blockIdx.y * kChunk)
        return;
    tile_inputs<WIDE>(a, tile(a, smem), s, t0, n_seq);
    tile_outputs(a, tile(a, smem), id);
}

#endif

/* PER_SM blocks on a multiprocessor: four, or with more registers two, where more there are not. */
template <int PER_SM> __global__ void __launch_bounds__(256, PER_SM) tile_kernel(const gdn_args a)
{
    extern __shared__ __align__(128) unsigned char gdn_smem[];
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    tile_block<PER_SM == 4 ? 1 : 2>(a, gdn_smem + (-smem_u32(gdn_smem) & 1023));
#endif
}

} // namespace

#endif
