/*
 * The gated delta net for heads of 128 (Yang et al. 2024, arXiv:2412.06464), from the fused projection to the gated norm.
 *
 * Steps (decode rows, short pieces): one block per (sequence, value head) keeps S in registers, so it is read and written once.
 * Chunks of 64 tokens (prefill), on tensor cores, with the notation of the paper's chunked form:
 *   conv     convolution, silu, norms of q and k                       -> qkv, bf16
 *   prepare  per chunk, all at once: A = (I + M)^-1, U = A diag(beta) V, W = A diag(beta e^gamma) K, P = (Q K^T) . D
 *   scan     per (sequence, head, 16 value columns), chunk after chunk: Vn = U - W S, O = e^gamma Q S + P Vn, S' = ...
 *            A warp holds S^T [16 x 64] as the accumulator of its products; accumulator and operand layouts agree when the value
 *            dimension is the row. Two warps hold the two halves of the keys and exchange their parts of W S and Q S.
 *   gate     norm over the head and silu(z), in place
 * On compute capability 9.0 two other kernels, tile and walk, take the place of these four; see there.
 */
#include "wgmma.cuh"
#include <errno.h>

namespace {

const int kDim = 128, kChunk = 64, kStepLimit = 16;

struct gdn_args {
    int n_k, n_v, ratio, n_conv, seq0, n_seqs;
    float eps;
    const bf16 *proj; int64_t ld_proj, u_off, z_off, a_off, b_off;
    const float *conv_w, *A_log, *dt_bias, *norm_w;
    char *conv_base; size_t conv_stride, conv_offset;
    char *s_base; size_t s_stride, s_offset;
    const int32_t *cu, *slot;
    bf16 *out; int64_t ld_out;
    unsigned *tickets;
    /* chunked form */
    int tok0;                   /* first token of the chunked part of the batch */
    bf16 *qkv;                  /* [tokens][n_conv], from tok0 */
    bf16 *ut;                   /* [chunks][n_v][128][64] */
    bf16 *w;                    /* [chunks][n_v][64][128] */
    bf16 *p;                    /* [chunks][n_v][64][64] */
    float *decay;               /* [chunks][n_v][2][64]: e^gamma, e^(Gamma - gamma) */
    unsigned char *kq;          /* [chunks][n_k][kKQ] */
    unsigned char *rec;         /* [chunks][n_v][kRec] */
    unsigned char *sums;        /* [n_seqs][n_v][kSums]: where helpers of two column halves exchange sums of squares; NULL: they do not */
};

__device__ __forceinline__ bf16 *conv_state(const gdn_args &a, int s)
{
    return (bf16 *)(a.conv_base + (size_t)a.slot[s] * a.conv_stride + a.conv_offset);
}

__device__ __forceinline__ float *s_state(const gdn_args &a, int s, int h)
{
    return (float *)(a.s_base + (size_t)a.slot[s] * a.s_stride + a.s_offset) + (int64_t)h * kDim * kDim;
}

__device__ __forceinline__ float decay_log(float A_log, float x)
{
    float sp = x > 20.f ? x : log1pf(expf(x));
    return -expf(A_log) * sp;
}

/* Input channel c of the token `back` places before the piece's token i; earlier ones are in the state. */
__device__ __forceinline__ float conv_in(const gdn_args &a, const bf16 *rec, int t0, int i, int c)
{
    return i >= 0 ? __bfloat162float(a.proj[(int64_t)(t0 + i) * a.ld_proj + a.u_off + c])
                  : __bfloat162float(rec[(int64_t)(3 + i) * a.n_conv + c]);
}

/* ---- steps ----------------------------------------------------------------------------------------------------------- */

struct tap { float h0, h1, h2; float4 w; };

__device__ __forceinline__ float conv_step(tap *p, float u)
{
    float y = p->w.x * p->h0 + p->w.y * p->h1 + p->w.z * p->h2 + p->w.w * u;
    p->h0 = p->h1;
    p->h1 = p->h2;
    p->h2 = u;
    return round_bf(siluf(y));
}

__device__ __forceinline__ tap tap_load(const gdn_args &a, const bf16 *rec, int c)
{
    tap p;
    p.w = *(const float4 *)(a.conv_w + (int64_t)c * 4);
    p.h0 = __bfloat162float(rec[c]);
    p.h1 = __bfloat162float(rec[a.n_conv + c]);
    p.h2 = __bfloat162float(rec[2 * a.n_conv + c]);
    return p;
}

__device__ __forceinline__ void tap_store(const gdn_args &a, bf16 *rec, int c, const tap &p)
{
    rec[c] = __float2bfloat16_rn(p.h0);
    rec[a.n_conv + c] = __float2bfloat16_rn(p.h1);
    rec[2 * a.n_conv + c] = __float2bfloat16_rn(p.h2);
}

const int kStepSmem = kDim * kDim * 4;

/*
 * Warp w holds rows 16 w .. 16 w + 15 of S (key index), lane l columns 4 l .. 4 l + 3 (value index). Blocks walk over (sequence, head)
 * pairs; the next S is on its way to shared memory, each thread its own part, while the present one is worked on.
 */
__global__ void __launch_bounds__(256, 2) step_kernel(const gdn_args a)
{
    extern __shared__ __align__(16) float next_s[];
    __shared__ __align__(16) float sq[kDim], sk[kDim], sv[kDim];
    __shared__ __align__(16) float part_k[8][kDim], part_q[8][kDim];
    __shared__ float sums[3][8];
    __shared__ int sh_last;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, items = a.n_seqs * a.n_v;
    const uint32_t slot = smem_u32(next_s) + (warp * 16 * kDim + lane * 4) * 4;
    pdl_launch();
    {
        const float *S = s_state(a, a.seq0 + (int)blockIdx.x / a.n_v, (int)blockIdx.x % a.n_v);
        l2_prefetch(S + tid * 32);
        l2_prefetch(S + (tid + 256) * 32);
    }
    pdl_wait();
    auto fetch = [&](int item) {
        if (item < items) {
            const float *S = s_state(a, a.seq0 + item / a.n_v, item % a.n_v) + warp * 16 * kDim + lane * 4;
#pragma unroll
            for (int j = 0; j < 16; j++)
                cp16(slot + j * kDim * 4, S + j * kDim, true);
        }
        cp_commit();
    };
    fetch(blockIdx.x);
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int h = item % a.n_v, s = a.seq0 + item / a.n_v, kh = h / a.ratio;
        float *S = s_state(a, s, h);
        const int t0 = a.cu[s], n = a.cu[s + 1] - t0;
        if (n == 0) {
            cp_wait<0>();
            fetch(item + gridDim.x);
            continue;
        }

        bf16 *rec = conv_state(a, s);
        const int i = tid & 127;
        const bool is_v = tid >= 128;
        const int c1 = is_v ? 2 * a.n_k * kDim + h * kDim + i : kh * kDim + i, c2 = a.n_k * kDim + kh * kDim + i;
        tap p1 = tap_load(a, rec, c1), p2 = tap_load(a, rec, c2);
        float4 st[16];
        cp_wait<0>();
#pragma unroll
        for (int j = 0; j < 16; j++)
            st[j] = *(const float4 *)(next_s + (warp * 16 + j) * kDim + lane * 4);
        fetch(item + gridDim.x);

        for (int t = t0; t < t0 + n; t++) {
            const bf16 *row = a.proj + (int64_t)t * a.ld_proj;
            float y1 = conv_step(&p1, __bfloat162float(row[a.u_off + c1])), y2 = 0.f;
            if (!is_v)
                y2 = conv_step(&p2, __bfloat162float(row[a.u_off + c2]));
            float beta = sigmoidf(__bfloat162float(row[a.b_off + h]));
            float decay = expf(decay_log(a.A_log[h], __bfloat162float(row[a.a_off + h]) + a.dt_bias[h]));
            if (!is_v) {
                float qq = warp_sum(y1 * y1), kk = warp_sum(y2 * y2), kq = warp_sum(y1 * y2);
                if (lane == 0) {
                    sums[0][warp] = qq;
                    sums[1][warp] = kk;
                    sums[2][warp] = kq;
                }
                sq[i] = y1;
                sk[i] = y2;
            } else {
                sv[i] = y1;
            }
            __syncthreads();
            if (t == t0 && tid == 0) {
                /* Value heads that share a key head read its convolution state; this one has. The last moves it on, below. */
                unsigned *ticket = a.tickets + (s - a.seq0) * a.n_k + kh;
                sh_last = atomicAdd(ticket, 1u) == (unsigned)(a.ratio - 1);
                if (sh_last)
                    *ticket = 0;
            }
            float rq = rsqrtf(sums[0][0] + sums[0][1] + sums[0][2] + sums[0][3] + 1e-6f) * 0.08838834764831845f;
            float rk = rsqrtf(sums[1][0] + sums[1][1] + sums[1][2] + sums[1][3] + 1e-6f);
            float kq = (sums[2][0] + sums[2][1] + sums[2][2] + sums[2][3]) * rq * rk;
            float4 mk = make_float4(0.f, 0.f, 0.f, 0.f), mq = mk;
#pragma unroll
            for (int j = 0; j < 16; j++) {
                float k = sk[warp * 16 + j] * rk, q = sq[warp * 16 + j] * rq;
                mk.x += st[j].x * k;
                mk.y += st[j].y * k;
                mk.z += st[j].z * k;
                mk.w += st[j].w * k;
                mq.x += st[j].x * q;
                mq.y += st[j].y * q;
                mq.z += st[j].z * q;
                mq.w += st[j].w * q;
            }
            *(float4 *)&part_k[warp][lane * 4] = mk;
            *(float4 *)&part_q[warp][lane * 4] = mq;
            __syncthreads();
            float4 m = make_float4(0.f, 0.f, 0.f, 0.f), o = m;
#pragma unroll
            for (int w = 0; w < 8; w++) {
                float4 x = *(const float4 *)&part_k[w][lane * 4], y = *(const float4 *)&part_q[w][lane * 4];
                m.x += x.x;
                m.y += x.y;
                m.z += x.z;
                m.w += x.w;
                o.x += y.x;
                o.y += y.y;
                o.z += y.z;
                o.w += y.w;
            }
            float4 v = *(const float4 *)&sv[lane * 4], d;
            d.x = beta * (v.x - decay * m.x);
            d.y = beta * (v.y - decay * m.y);
            d.z = beta * (v.z - decay * m.z);
            d.w = beta * (v.w - decay * m.w);
#pragma unroll
            for (int j = 0; j < 16; j++) {
                float k = sk[warp * 16 + j] * rk;
                st[j].x = decay * st[j].x + k * d.x;
                st[j].y = decay * st[j].y + k * d.y;
                st[j].z = decay * st[j].z + k * d.z;
                st[j].w = decay * st[j].w + k * d.w;
            }
            if (warp == 0) {
                /* o = S'^T q = decay S^T q + (k . q) d: no second pass over S. */
                o.x = round_bf(decay * o.x + kq * d.x);
                o.y = round_bf(decay * o.y + kq * d.y);
                o.z = round_bf(decay * o.z + kq * d.z);
                o.w = round_bf(decay * o.w + kq * d.w);
                float rho = rsqrtf(warp_sum(o.x * o.x + o.y * o.y + o.z * o.z + o.w * o.w) / (float)kDim + a.eps);
                uint2 z2 = *(const uint2 *)(row + a.z_off + h * kDim + lane * 4);
                float2 za = unpack2(z2.x), zb = unpack2(z2.y);
                float4 w = *(const float4 *)(a.norm_w + lane * 4);
                *(uint2 *)(a.out + (int64_t)t * a.ld_out + h * kDim + lane * 4) =
                    make_uint2(pack2(o.x * rho * w.x * siluf(za.x), o.y * rho * w.y * siluf(za.y)),
                               pack2(o.z * rho * w.z * siluf(zb.x), o.w * rho * w.w * siluf(zb.y)));
            }
            if (t + 1 < t0 + n)
                __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < 16; j++)
            *(float4 *)(S + (warp * 16 + j) * kDim + lane * 4) = st[j];

        if (is_v)
            tap_store(a, rec, c1, p1);
        if (sh_last && !is_v) {
            tap_store(a, rec, c1, p1);
            tap_store(a, rec, c2, p2);
        }
        __syncthreads();        /* sh_last and the vectors are written again for the next pair */
    }
    cp_wait<0>();
}

/*
 * Decode: as step_kernel, for sequences of exactly one token, which are the batch's first: sequence s is token s. What a pair needs besides
 * S is loaded one pair ahead, since a block's time was the sum of these latencies and not its bytes; two buffers for what the warps
 * exchange leave two barriers a pair.
 */
struct step_in {
    float h[3], u, g[3], w;         /* taps and input of channel c1, and of c2 */
    float4 hw, gw;                  /* their weights */
    float beta, decay;
    uint2 z;
};

__global__ void __launch_bounds__(256, 2) decode_kernel(const gdn_args a)
{
    extern __shared__ __align__(16) float next_s[];
    __shared__ __align__(16) float vec[2][3][kDim];             /* q, k, v */
    __shared__ __align__(16) float part[2][2][8][kDim];         /* S^T k, S^T q by warp */
    __shared__ float sums[2][3][4];
    __shared__ int sh_last;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, items = a.n_seqs * a.n_v, i = tid & 127;
    const bool is_v = tid >= 128;
    const uint32_t slot = smem_u32(next_s) + (warp * 16 * kDim + lane * 4) * 4;
    pdl_launch();
    {
        const float *S = s_state(a, (int)blockIdx.x / a.n_v, (int)blockIdx.x % a.n_v);
        l2_prefetch(S + tid * 32);
        l2_prefetch(S + (tid + 256) * 32);
    }
    pdl_wait();
    auto channel = [&](int h) { return is_v ? 2 * a.n_k * kDim + h * kDim + i : h / a.ratio * kDim + i; };
    auto fetch = [&](int item) {
        if (item < items) {
            const float *S = s_state(a, item / a.n_v, item % a.n_v) + warp * 16 * kDim + lane * 4;
#pragma unroll
            for (int j = 0; j < 16; j++)
                cp16(slot + j * kDim * 4, S + j * kDim, true);
        }
        cp_commit();
    };
    auto load = [&](int item, step_in &x) {
        if (item >= items)
            return;
        const int s = item / a.n_v, h = item % a.n_v, c1 = channel(h), c2 = c1 + a.n_k * kDim;
        const bf16 *row = a.proj + (int64_t)s * a.ld_proj, *rec = conv_state(a, s);
        x.u = __bfloat162float(row[a.u_off + c1]);
        x.beta = __bfloat162float(row[a.b_off + h]);
        x.decay = __bfloat162float(row[a.a_off + h]);
        x.hw = *(const float4 *)(a.conv_w + (int64_t)c1 * 4);
#pragma unroll
        for (int j = 0; j < 3; j++)
            x.h[j] = __bfloat162float(rec[(int64_t)j * a.n_conv + c1]);
        if (!is_v) {
            x.w = __bfloat162float(row[a.u_off + c2]);
            x.gw = *(const float4 *)(a.conv_w + (int64_t)c2 * 4);
#pragma unroll
            for (int j = 0; j < 3; j++)
                x.g[j] = __bfloat162float(rec[(int64_t)j * a.n_conv + c2]);
        }
        if (warp == 0)
            x.z = *(const uint2 *)(row + a.z_off + h * kDim + lane * 4);
    };
    step_in x = {};
    fetch(blockIdx.x);
    load(blockIdx.x, x);
    int turn = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x, turn ^= 1) {
        const int h = item % a.n_v, s = item / a.n_v;
        float *S = s_state(a, s, h);
        bf16 *rec = conv_state(a, s);
        const int c1 = channel(h), c2 = c1 + a.n_k * kDim;
        float (*v)[kDim] = vec[turn];
        const float y1 = round_bf(siluf(x.hw.x * x.h[0] + x.hw.y * x.h[1] + x.hw.z * x.h[2] + x.hw.w * x.u));
        const float beta = sigmoidf(x.beta), decay = expf(decay_log(a.A_log[h], x.decay + a.dt_bias[h]));
        const uint2 z2 = x.z;
        bf16 keep1[3] = { __float2bfloat16_rn(x.h[1]), __float2bfloat16_rn(x.h[2]), __float2bfloat16_rn(x.u) }, keep2[3];
        if (is_v) {
            v[2][i] = y1;
#pragma unroll
            for (int j = 0; j < 3; j++)
                rec[(int64_t)j * a.n_conv + c1] = keep1[j];
        } else {
            const float y2 = round_bf(siluf(x.gw.x * x.g[0] + x.gw.y * x.g[1] + x.gw.z * x.g[2] + x.gw.w * x.w));
            const float qq = warp_sum(y1 * y1), kk = warp_sum(y2 * y2), kq = warp_sum(y1 * y2);
            if (lane == 0) {
                sums[turn][0][warp] = qq;
                sums[turn][1][warp] = kk;
                sums[turn][2][warp] = kq;
            }
            v[0][i] = y1;
            v[1][i] = y2;
            keep2[0] = __float2bfloat16_rn(x.g[1]);
            keep2[1] = __float2bfloat16_rn(x.g[2]);
            keep2[2] = __float2bfloat16_rn(x.w);
        }
        float4 st[16];
        cp_wait<0>();
#pragma unroll
        for (int j = 0; j < 16; j++)
            st[j] = *(const float4 *)(next_s + (warp * 16 + j) * kDim + lane * 4);
        fetch(item + gridDim.x);
        load(item + gridDim.x, x);
        __syncthreads();
        if (tid == 0) {
            /* Value heads that share a key head read its convolution state; this one has. The last moves it on, below. */
            unsigned *ticket = a.tickets + s * a.n_k + h / a.ratio;
            sh_last = atomicAdd(ticket, 1u) == (unsigned)(a.ratio - 1);
            if (sh_last)
                *ticket = 0;
        }
        const float (*n)[4] = sums[turn];
        const float rq = rsqrtf(n[0][0] + n[0][1] + n[0][2] + n[0][3] + 1e-6f) * 0.08838834764831845f;
        const float rk = rsqrtf(n[1][0] + n[1][1] + n[1][2] + n[1][3] + 1e-6f);
        const float kq = (n[2][0] + n[2][1] + n[2][2] + n[2][3]) * rq * rk;
        float4 mk = make_float4(0.f, 0.f, 0.f, 0.f), mq = mk;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const float k = v[1][warp * 16 + j] * rk, q = v[0][warp * 16 + j] * rq;
            mk.x += st[j].x * k;
            mk.y += st[j].y * k;
            mk.z += st[j].z * k;
            mk.w += st[j].w * k;
            mq.x += st[j].x * q;
            mq.y += st[j].y * q;
            mq.z += st[j].z * q;
            mq.w += st[j].w * q;
        }
        *(float4 *)&part[turn][0][warp][lane * 4] = mk;
        *(float4 *)&part[turn][1][warp][lane * 4] = mq;
        __syncthreads();
        if (sh_last && !is_v)
#pragma unroll
            for (int j = 0; j < 3; j++) {
                rec[(int64_t)j * a.n_conv + c1] = keep1[j];
                rec[(int64_t)j * a.n_conv + c2] = keep2[j];
            }
        float4 m = make_float4(0.f, 0.f, 0.f, 0.f), o = m;
#pragma unroll
        for (int w = 0; w < 8; w++) {
            const float4 p = *(const float4 *)&part[turn][0][w][lane * 4], q = *(const float4 *)&part[turn][1][w][lane * 4];
            m.x += p.x;
            m.y += p.y;
            m.z += p.z;
            m.w += p.w;
            o.x += q.x;
            o.y += q.y;
            o.z += q.z;
            o.w += q.w;
        }
        const float4 vv = *(const float4 *)&v[2][lane * 4];
        const float4 d = make_float4(beta * (vv.x - decay * m.x), beta * (vv.y - decay * m.y), beta * (vv.z - decay * m.z),
                                     beta * (vv.w - decay * m.w));
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const float k = v[1][warp * 16 + j] * rk;
            *(float4 *)(S + (warp * 16 + j) * kDim + lane * 4) = make_float4(decay * st[j].x + k * d.x, decay * st[j].y + k * d.y,
                                                                             decay * st[j].z + k * d.z, decay * st[j].w + k * d.w);
        }
        if (warp == 0) {
            /* o = S'^T q = decay S^T q + (k . q) d: no second pass over S. */
            o.x = round_bf(decay * o.x + kq * d.x);
            o.y = round_bf(decay * o.y + kq * d.y);
            o.z = round_bf(decay * o.z + kq * d.z);
            o.w = round_bf(decay * o.w + kq * d.w);
            const float rho = rsqrtf(warp_sum(o.x * o.x + o.y * o.y + o.z * o.z + o.w * o.w) / (float)kDim + a.eps);
            const float2 za = unpack2(z2.x), zb = unpack2(z2.y);
            const float4 w = *(const float4 *)(a.norm_w + lane * 4);
            *(uint2 *)(a.out + (int64_t)s * a.ld_out + h * kDim + lane * 4) =
                make_uint2(pack2(o.x * rho * w.x * siluf(za.x), o.y * rho * w.y * siluf(za.y)),
                           pack2(o.z * rho * w.z * siluf(zb.x), o.w * rho * w.w * siluf(zb.y)));
        }
    }
    cp_wait<0>();
}

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

/* acc (16 x 16 as two 16 x 8) += L R, both 16 x 16 f32 tiles in shared memory with row stride kLd; tf32 products. */
__device__ __forceinline__ void tile_mma(float acc[2][4], const float *L, const float *R, int lane)
{
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int k = 0; k < 16; k += 8) {
        uint32_t a0 = tf32(L[g * kLd + k + t]), a1 = tf32(L[(g + 8) * kLd + k + t]);
        uint32_t a2 = tf32(L[g * kLd + k + t + 4]), a3 = tf32(L[(g + 8) * kLd + k + t + 4]);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t b0 = tf32(R[(k + t) * kLd + n * 8 + g]), b1 = tf32(R[(k + t + 4) * kLd + n * 8 + g]);
            asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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

    for (int c = 0; c < n_chunks; c++) {
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
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            S[(dk + j * 8 + 2 * tq + (e & 1)) * kDim + dv + g + (e >> 1) * 8] = st[j][e];
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

/* ---- chunks on compute capability 9.0 ---------------------------------------------------------------------------------- */

/*
 * The same chunks in two kernels, for machines with warpgroup products and bulk copies:
 *   tile   per chunk and key head: convolution of q and k, A = (I + M)^-1 diag(beta), P. Written as the tiles that `walk` reads.
 *   walk   per (sequence, head, 64 value columns), chunk after chunk: R = V - e^gamma K S, Vn = A R, O = e^gamma Q S + P Vn,
 *          S' = e^Gamma S + K^T (e^(Gamma - gamma) Vn). Its warpgroups: state (R, Vn, S'), outputs (O), convolution of v, and two
 *          for the gated norm.
 * What passes between them is K and Q [2][64][128] and A and P [2][64][64], bf16 in swizzled panels, and the two decays in f32.
 */
const int kKQ = 2 * kTile, kRec = 2 * kChunk * kChunk * 2 + 2 * kChunk * 4;
const int kWalkCols = 64, kStages = 3, kStage = (kKQ + kRec + 1023) / 1024 * 1024;
const int kColTile = kChunk * kWalkCols * 2, kRawTile = (kChunk + 3) * kWalkCols * 2;
const int kWalkSmem = 1024 + kStages * kStage + 5 * kColTile + kTile + 2 * kRawTile, kWalkThreads = 640;
const int kTileSmem = 1024 + kKQ + 2 * kChunk * kLd * 4 + 8 * kChunk * 4;
static_assert((kChunk + 3) * 2 * kDim * 2 <= 2 * kChunk * kLd * 4, "q and k before the convolution lie in the place of the triangles");

const int kSums = 2 * 4 * kChunk * 8;       /* [half][chunk & 3][64] of a sum and the number of its chunk plus one */

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

__device__ __forceinline__ void bulk_load(uint32_t dst, const void *src, int bytes, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
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

/* d (+)= A B: A 64 x 16 in registers, B^T 64 x 16 in shared memory with the inner dimension contiguous. */
__device__ __forceinline__ void wgmma_reg_64x64(float (&d)[32], const uint32_t *a, uint64_t b, int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

/* d += A B: A 64 x 16 in registers, B 16 x 128 in shared memory, its 128 contiguous. */
__device__ __forceinline__ void wgmma_64x128(float (&d)[64], const uint32_t *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
                 " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
                 " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                   "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
                   "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                   "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
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

/* Barriers: of tiles, v, outputs, state, Vn; of the sums of the other block. Where there is one of `empty`, all users of a phase pass
 * before the next can come, so a parity tells phases apart. */
struct walk_bars {
    uint64_t full[kStages], empty[kStages], v_full[2], v_empty[2], o_full[2], o_empty[2], s_full, s_empty, d_full, d_empty, peer[2];
};

/* What a warpgroup of `walk` needs to know. */
struct walk {
    int s, h, kh, cb, t0, n, n_chunks;
    int64_t id0;
    uint32_t stage, v, o, state, delta;         /* shared memory; v and o twice; S^T and Vn^T of the present chunk, bf16 */
    walk_bars *bars;
    float *sums;                    /* [2][2][16][4]: sums of squares of the other block, even chunks, then odd; tokens 16 apart adjoin */
};

/*
 * The serial part, which sets the pace: S^T [64 values][128 keys] is the accumulator, and operands come from registers. Issuing such
 * products takes as long as running them, so other work of these warps stands between the products of a row.
 */
__device__ __forceinline__ void walk_state(const gdn_args &a, const walk &k)
{
    const int tid = threadIdx.x & 127, w = tid >> 5, lane = tid & 31, g = lane >> 2, tq = lane & 3;
    /* A lane's row in the tiles of 8 x 8 that it stores or loads four at a time: rows 0 .. 7 and 8 .. 15, then the next columns. */
    const int row = w * 16 + ((lane >> 3) & 1) * 8 + (lane & 7), right = lane >> 4;
    float *S = s_state(a, k.s, k.h) + k.cb * kWalkCols + w * 16 + g;
    float st[64], x[32];
    uint32_t sb[32], r[16], vw[16];
#pragma unroll
    for (int i = 0; i < 64; i++)
        st[i] = S[((i >> 2) * 8 + 2 * tq + (i & 1)) * kDim + ((i >> 1) & 1) * 8];
    /* What chunk c needs beside S is taken while the products of the one before run: values, then tiles and a place for its state. */
    float last = 1.f;
    auto take_values = [&](int c) {
        mbar_sleep(smem_u32(&k.bars->v_full[c & 1]), (c >> 1) & 1);
#pragma unroll
        for (int j = 0; j < 8; j += 2)
            ldsm4t(vw + 2 * j, k.v + (c & 1) * kColTile + at64((j + right) * 8 + (lane & 7), w * 2 + ((lane >> 3) & 1)));
        warp_arrive(smem_u32(&k.bars->v_empty[c & 1]));
    };
    auto take_tiles = [&](int at, int phase) {
        mbar_sleep(smem_u32(&k.bars->full[at]), phase);
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(last)
                     : "r"(k.stage + at * kStage + kKQ + 2 * kChunk * kChunk * 2 + (kChunk - 1) * 4));
    };
    /* S becomes the operand of K S and of the outputs' Q S, and then what the chunk leaves of it. */
    auto ask_state = [&](int at) {
        const uint32_t k_s = k.stage + at * kStage;
#pragma unroll
        for (int i = 0; i < 32; i++)
            sb[i] = pack2(st[2 * i], st[2 * i + 1]);
        wgmma_fence();
#pragma unroll
        for (int ks = 0; ks < 8; ks++) {
            wgmma_reg_64x64(x, sb + 4 * ks, panel_step(panels(k_s), ks), ks > 0);
            stsm4(k.state + panel_at<kChunk>(row, 2 * ks + right), sb + 4 * ks);
        }
        wgmma_commit();
#pragma unroll
        for (int i = 0; i < 64; i++)
            st[i] *= last;
    };
    take_values(0);
    take_tiles(0, 0);
    ask_state(0);
    for (int c = 0, at = 0, phase = 0; c < k.n_chunks; c++) {
        const uint32_t k_s = k.stage + at * kStage, a_s = k_s + kKQ, eg_s = a_s + 2 * kChunk * kChunk * 2 + 8 * tq;
        auto decay2 = [&](int j, int which) {
            float2 e;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(e.x), "=f"(e.y) : "r"(eg_s + which * kChunk * 4 + j * 32));
            return e;
        };
        wgmma_wait<0>();
        wgmma_hold(x);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 e = decay2(j, 0), v0 = unpack2(vw[2 * j]), v1 = unpack2(vw[2 * j + 1]);
            r[2 * j] = pack2(v0.x - e.x * x[4 * j], v0.y - e.y * x[4 * j + 1]);
            r[2 * j + 1] = pack2(v1.x - e.x * x[4 * j + 2], v1.y - e.y * x[4 * j + 3]);
        }
        wgmma_fence();
#pragma unroll
        for (int ks = 0; ks < 4; ks++)
            wgmma_reg_64x64(x, r + 4 * ks, panel_step(panels(a_s), ks), ks > 0);
        wgmma_commit();
        wgmma_publish();        /* here and not where the state was stored: nothing is left to wait for */
        warp_arrive(smem_u32(&k.bars->s_full));
        wgmma_wait<0>();
        wgmma_hold(x);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 e = decay2(j, 1);
            r[2 * j] = pack2(e.x * x[4 * j], e.y * x[4 * j + 1]);
            r[2 * j + 1] = pack2(e.x * x[4 * j + 2], e.y * x[4 * j + 3]);
            vw[2 * j] = pack2(x[4 * j], x[4 * j + 1]);
            vw[2 * j + 1] = pack2(x[4 * j + 2], x[4 * j + 3]);
        }
        mbar_sleep(smem_u32(&k.bars->d_empty), (c & 1) ^ 1);
        wgmma_fence();
#pragma unroll
        for (int ks = 0; ks < 4; ks++) {
            wgmma_64x128(st, r + 4 * ks, panel_rows(panels(k_s), ks));
            stsm4(k.delta + panel_at<kChunk>(row, 2 * ks + right), vw + 4 * ks);
        }
        wgmma_commit();
        const int here = at;
        const bool more = c + 1 < k.n_chunks;
        if (more)
            take_values(c + 1);
        wgmma_publish();
        warp_arrive(smem_u32(&k.bars->d_full));
        last = 1.f;
        if (more) {
            if (++at == kStages) {
                at = 0;
                phase ^= 1;
            }
            take_tiles(at, phase);
        }
        mbar_sleep(smem_u32(&k.bars->s_empty), c & 1);
        wgmma_wait<0>();
        wgmma_hold(st);
        warp_arrive(smem_u32(&k.bars->empty[here]));
        ask_state(at);          /* after the last chunk for nothing: products under a condition would be serialized */
    }
    wgmma_wait<0>();
    wgmma_hold(x);
#pragma unroll
    for (int i = 0; i < 64; i++)
        S[((i >> 2) * 8 + 2 * tq + (i & 1)) * kDim + ((i >> 1) & 1) * 8] = st[i];
}

/* Outputs, tokens along the rows: O = e^gamma Q S + P Vn. One of its threads asks for the tiles. */
template <bool SPLIT> __device__ __forceinline__ void walk_outputs(const gdn_args &a, const walk &k)
{
    const int tid = threadIdx.x & 127, w = tid >> 5, lane = tid & 31;
    const int row = w * 16 + ((lane >> 3) & 1) * 8 + (lane & 7), right = lane >> 4;
    float o[32];
    auto ask = [&](int c, int at) {
        const uint32_t full = smem_u32(&k.bars->full[at]), stage = k.stage + at * kStage;
        mbar_expect(full, kKQ + kRec);
        bulk_load(stage, a.kq + ((k.id0 + c) * a.n_k + k.kh) * kKQ, kKQ, full);
        bulk_load(stage + kKQ, a.rec + ((k.id0 + c) * a.n_v + k.h) * kRec, kRec, full);
    };
    if (tid == 0)
        for (int c = 0; c < min(kStages, k.n_chunks); c++)
            ask(c, c);
    for (int c = 0, at = 0, phase = 0; c < k.n_chunks; c++) {
        const uint32_t q_s = k.stage + at * kStage + kTile, p_s = q_s + kTile + kChunk * kChunk * 2;
        mbar_sleep(smem_u32(&k.bars->full[at]), phase);
        float e0, e1;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(e0) : "r"(p_s + kChunk * kChunk * 2 + (w * 16 + (lane >> 2)) * 4));
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(e1) : "r"(p_s + kChunk * kChunk * 2 + (w * 16 + (lane >> 2) + 8) * 4));
        mbar_sleep(smem_u32(&k.bars->s_full), c & 1);
        wgmma_fence();
#pragma unroll
        for (int ks = 0; ks < 8; ks++)
            wgmma_ss(o, panel_step(panels(q_s), ks), panel_step(panels(k.state), ks), ks > 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(o);
        warp_arrive(smem_u32(&k.bars->s_empty));
#pragma unroll
        for (int i = 0; i < 32; i++)
            o[i] *= i & 2 ? e1 : e0;
        mbar_sleep(smem_u32(&k.bars->d_full), c & 1);
        wgmma_fence();
#pragma unroll
        for (int ks = 0; ks < 4; ks++)
            wgmma_ss(o, panel_step(panels(p_s), ks), panel_step(panels(k.delta), ks), 1);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(o);
        warp_arrive(smem_u32(&k.bars->d_empty));
        warp_arrive(smem_u32(&k.bars->empty[at]));
        mbar_sleep(smem_u32(&k.bars->o_empty[c & 1]), ((c >> 1) & 1) ^ 1);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const uint32_t r[4] = { pack2(o[4 * j], o[4 * j + 1]), pack2(o[4 * j + 2], o[4 * j + 3]), pack2(o[4 * j + 4], o[4 * j + 5]),
                                    pack2(o[4 * j + 6], o[4 * j + 7]) };
            stsm4(k.o + (c & 1) * kColTile + at64(row, j + right), r);
        }
        if (SPLIT)
            wgmma_publish();
        warp_arrive(smem_u32(&k.bars->o_full[c & 1]));
        if (tid == 0 && c + kStages < k.n_chunks) {
            mbar_sleep(smem_u32(&k.bars->empty[at]), phase);
            ask(c + kStages, at);
        }
        if (++at == kStages) {
            at = 0;
            phase ^= 1;
        }
    }
}

/* Convolution of v: a warp has 16 tokens of a chunk, a lane two channels. Inputs of the next chunk are on their way meanwhile. */
template <bool SPLIT> __device__ __forceinline__ void walk_values(const gdn_args &a, const walk &k, int first, int step, uint32_t raw)
{
    const int tid = threadIdx.x & 127, w = tid >> 5, lane = tid & 31;
    const int ch = 2 * a.n_k * kDim + k.h * kDim + k.cb * kWalkCols, ld = (int)a.ld_proj;
    const float4 *w4 = (const float4 *)(a.conv_w + (int64_t)(ch + lane * 2) * 4);
    const float4 wa = w4[0], wb = w4[1];
    auto input = [&](int i) {
        return i >= 0 ? a.proj + (int64_t)(k.t0 + i) * ld + a.u_off + ch : conv_state(a, k.s) + (int64_t)(3 + i) * a.n_conv + ch;
    };
    auto ask = [&](int c, int half) {       /* rows of 64 channels, from three tokens before the chunk on */
        const int r0 = tid >> 3, i0 = c * kChunk - 3 + r0, piece = (tid & 7) * 8;
        const uint32_t dst = raw + half * kRawTile + r0 * 128 + piece * 2;
        if (c > 0 && (c + 1) * kChunk <= k.n) {
            const bf16 *row = input(i0) + piece;
#pragma unroll
            for (int j = 0; j < 4; j++, row += 16 * ld)
                cp16(dst + j * 16 * 128, row, true);
            if (r0 < 3)
                cp16(dst + 64 * 128, row, true);
        } else {
            for (int j = 0; j < 5; j++)
                if (j * 16 + r0 < kChunk + 3)
                    cp16(dst + j * 16 * 128, input(min(i0 + j * 16, k.n - 1)) + piece, true);
        }
        cp_commit();
    };
    if (first < k.n_chunks)
        ask(first, 0);
    for (int c = first, half = 0; c < k.n_chunks; c += step, half ^= 1) {
        cp_wait<0>();
        asm volatile("bar.sync %0, 128;" ::"r"(first + 1) : "memory");      /* and all have left the other half */
        if (c + step < k.n_chunks)
            ask(c + step, half ^ 1);
        /* v and z of chunk c + 4: two warps each, a row per lane. */
        if (const int i = (c + 4) * kChunk + (w & 1) * 32 + lane; i < k.n)
            l2_prefetch(a.proj + (int64_t)(k.t0 + i) * ld + k.h * kDim + k.cb * kWalkCols + (w < 2 ? a.u_off + 2 * a.n_k * kDim : a.z_off));
        const uint32_t from = raw + half * kRawTile + w * 16 * 128 + lane * 4, to = k.v + (c & 1) * kColTile + (lane & 3) * 4;
        auto token = [&](int i) {
            uint32_t v;
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from + i * 128));
            return unpack2(v);
        };
        mbar_sleep(smem_u32(&k.bars->v_empty[c & 1]), ((c >> 1) & 1) ^ 1);
        float2 h0 = token(0), h1 = token(1), h2 = token(2);
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            float y[8];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 x = token(3 + i + j);
                y[2 * j] = wa.x * h0.x + wa.y * h1.x + wa.z * h2.x + wa.w * x.x;
                y[2 * j + 1] = wb.x * h0.y + wb.y * h1.y + wb.z * h2.y + wb.w * x.y;
                h0 = h1;
                h1 = h2;
                h2 = x;
            }
            silu8(y);
#pragma unroll
            for (int j = 0; j < 4; j++)
                asm volatile("st.shared.b32 [%0], %1;"
                             ::"r"(to + at64(w * 16 + i + j, lane >> 2)), "r"(pack2(y[2 * j], y[2 * j + 1])) : "memory");
        }
        for (int i = max(k.n - c * kChunk - w * 16, 0); i < 16; i++)        /* tokens past the end */
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + at64(w * 16 + i, lane >> 2)), "r"(0) : "memory");
        if (SPLIT)
            wgmma_publish();
        warp_arrive(smem_u32(&k.bars->v_full[c & 1]));
    }
    if (first == 0 && w == 0) {     /* every reader of the state was before the first barrier; these channels are this block's alone */
        uint32_t r[3];
#pragma unroll
        for (int i = 0; i < 3; i++)
            r[i] = *(const uint32_t *)(input(k.n - 3 + i) + lane * 2);
#pragma unroll
        for (int i = 0; i < 3; i++)
            *(uint32_t *)(conv_state(a, k.s) + (int64_t)i * a.n_conv + ch + lane * 2) = r[i];
    }
}

/* Norm and gate of every second chunk: 8 threads have a token's 64 columns, the other block sums the squares of the other 64. */
template <bool SPLIT> __device__ __forceinline__ void walk_gate(const gdn_args &a, const walk &k, int first)
{
    const int tid = threadIdx.x & 127, piece = tid & 7, row0 = tid >> 3;
    const int col = k.h * kDim + k.cb * kWalkCols + piece * 8, ld = (int)a.ld_proj, ld_out = (int)a.ld_out;
    const float4 *w4 = (const float4 *)(a.norm_w + k.cb * kWalkCols + piece * 8);
    const float4 wa = w4[0], wb = w4[1];
    const float wn[8] = { wa.x, wa.y, wa.z, wa.w, wb.x, wb.y, wb.z, wb.w };
    const uint32_t sums = smem_u32(k.sums) + (first * 2 * kChunk + row0 * 4) * 4, peer = smem_u32(&k.bars->peer[first]);
    const uint32_t far_sums = SPLIT ? 0 : of_rank(sums, k.cb ^ 1), far_peer = SPLIT ? 0 : of_rank(peer, k.cb ^ 1);
    unsigned char *posted = a.sums + ((int64_t)blockIdx.z * a.n_v + k.h) * kSums + row0 * 32;
    const uint32_t from = k.o + first * kColTile + at64(row0, piece);
    uint4 zv[4];
    auto ask = [&](int c) {
        const bf16 *row = a.proj + (int64_t)(k.t0 + c * kChunk + row0) * ld + a.z_off + col;
#pragma unroll
        for (int p = 0; p < 4; p++)
            zv[p] = c * kChunk + p * 16 + row0 < k.n ? *(const uint4 *)(row + (int64_t)p * 16 * ld) : make_uint4(0, 0, 0, 0);
    };
    ask(first);
    for (int c = first; c < k.n_chunks; c += 2) {
        uint4 ov[4];
        float ss[4];
        mbar_sleep(smem_u32(&k.bars->o_full[first]), (c >> 1) & 1);
#pragma unroll
        for (int p = 0; p < 4; p++)
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(ov[p].x), "=r"(ov[p].y), "=r"(ov[p].z), "=r"(ov[p].w)
                         : "r"(from + p * 16 * 128));
        if (SPLIT)
            warp_arrive(smem_u32(&k.bars->o_empty[first]));
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float2 f = unpack2(ov[p].x), f1 = unpack2(ov[p].y), f2 = unpack2(ov[p].z), f3 = unpack2(ov[p].w);
            ss[p] = f.x * f.x + f.y * f.y + f1.x * f1.x + f1.y * f1.y + f2.x * f2.x + f2.y * f2.y + f3.x * f3.x + f3.y * f3.y;
        }
#pragma unroll
        for (int d = 1; d < 8; d <<= 1)
#pragma unroll
            for (int p = 0; p < 4; p++)
                ss[p] += __shfl_xor_sync(0xffffffffu, ss[p], d);
        float far[4];
        if (SPLIT) {
            /* The other half is in another cluster, but runs: the grid is launched so only where all of it fits. */
            unsigned char *mine = posted + (k.cb * 4 + (c & 3)) * kChunk * 8 + (piece & 1) * 16;
            const unsigned char *theirs = posted + ((k.cb ^ 1) * 4 + (c & 3)) * kChunk * 8;
            auto look = [](const unsigned char *at, float *x, int *tag) {
                asm volatile("ld.volatile.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(x[0]), "=r"(tag[0]), "=f"(x[1]), "=r"(tag[1]) : "l"(at) : "memory");
            };
            if (piece < 2)
                asm volatile("st.volatile.global.v4.b32 [%0], {%1, %2, %3, %2};"
                             ::"l"(mine), "r"(__float_as_int(piece ? ss[2] : ss[0])), "r"(c + 1), "r"(__float_as_int(piece ? ss[3] : ss[1]))
                             : "memory");
            int tag[4];
            do {
                look(theirs, far, tag);
                look(theirs + 16, far + 2, tag + 2);
            } while (tag[0] != c + 1 || tag[1] != c + 1 || tag[2] != c + 1 || tag[3] != c + 1);
        } else {
            /* Stores that complete a transaction: an arrival that releases would wait for all stores of outputs before it. Two places in
             * turn: the other block may send the next sums before these are read, but not those after, which need this block's next. */
            const int slot = ((c >> 1) & 1) * kChunk * 4;
            if (tid == 0)
                mbar_expect(peer, kChunk * 4);
            if (piece == 0)
                asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                             ::"r"(far_sums + slot), "f"(ss[0]), "f"(ss[1]), "f"(ss[2]), "f"(ss[3]), "r"(far_peer) : "memory");
            mbar_sleep(peer, (c >> 1) & 1);
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(far[0]), "=f"(far[1]), "=f"(far[2]), "=f"(far[3]) : "r"(sums + slot));
            /* Only now: were the next outputs there already, the barrier could complete its next phase before a slow warp has seen this
             * one (and then it would wait for ever), and fast warps could send their next sums before a slow one has sent these. */
            warp_arrive(smem_u32(&k.bars->o_empty[first]));
        }
        bf16 *row = a.out + (int64_t)(k.t0 + c * kChunk + row0) * ld_out + col;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float rho;
            asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(rho) : "f"((ss[p] + far[p]) * (1.f / kDim) + a.eps));
            const uint32_t op[4] = { ov[p].x, ov[p].y, ov[p].z, ov[p].w }, zp[4] = { zv[p].x, zv[p].y, zv[p].z, zv[p].w };
            uint32_t r[4];
            float y[8];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 z = unpack2(zp[e]);
                y[2 * e] = z.x;
                y[2 * e + 1] = z.y;
            }
            silu8(y);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 f = unpack2(op[e]);
                r[e] = pack2(f.x * rho * wn[2 * e] * y[2 * e], f.y * rho * wn[2 * e + 1] * y[2 * e + 1]);
            }
            if (c * kChunk + p * 16 + row0 < k.n)
                *(uint4 *)(row + (int64_t)p * 16 * ld_out) = make_uint4(r[0], r[1], r[2], r[3]);
        }
        ask(c + 2);
    }
}

/* Moves the convolution state of the key head's q or k on; one warp, since the kernel before has read it. */
__device__ __forceinline__ void move_conv_state(const gdn_args &a, const walk &k, int lane)
{
    bf16 *rec = conv_state(a, k.s);
    const int ch = (k.cb * a.n_k + k.kh) * kDim + lane * 4;
    uint2 r[3];
#pragma unroll
    for (int i = 0; i < 3; i++)
        r[i] = conv_in4(a, rec, k.t0, k.n - 3 + i, ch);
#pragma unroll
    for (int i = 0; i < 3; i++)
        *(uint2 *)(rec + (int64_t)i * a.n_conv + ch) = r[i];
}

/*
 * Between the two blocks of a column half. Tiles finished here (`sent`) are copied to the same place of the other block and complete its
 * barrier; for tiles that come (`got`) bytes are expected; where readers here let such a tile go (`back`), the other block
 * is told.
 */
__device__ __forceinline__ void walk_relay(const walk &k, int other, uint32_t tile, uint64_t *sent, uint64_t *got, uint64_t *back)
{
    const int warp = (threadIdx.x >> 5) & 3;
    if ((threadIdx.x & 31) == 0)
        for (int c = 0; c < k.n_chunks; c++) {
            const int slot = c & 1, parity = (c >> 1) & 1;
            if (warp == 0) {
                const uint32_t src = tile + slot * kColTile;
                mbar_sleep(smem_u32(sent + slot), parity);
                asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                             ::"r"(of_rank(src, other)), "r"(src), "r"(kColTile), "r"(of_rank(smem_u32(sent + slot), other)) : "memory");
            } else if (warp == 1) {
                mbar_sleep(smem_u32(back + slot), parity);
                mbar_arrive_written(of_rank(smem_u32(back + slot), other));
            } else if (warp == 2) {
                if (c >= 2)
                    mbar_sleep(smem_u32(got + slot), parity ^ 1);
                mbar_expect(smem_u32(got + slot), kColTile);
            }
        }
    __syncwarp();
}

/*
 * SPLIT, for few sequences: a second block, the helper, does what need not be in the block of the serial part, and tiles of v and of
 * outputs go from block to block within a cluster. (Clusters of four, with both halves of the columns, did not all fit an H100 at once.)
 */
template <bool SPLIT> __device__ __forceinline__ void walk_block(const gdn_args &a, unsigned char *smem, walk_bars *bars, float *sums)
{
    walk k;
    const bool helper = SPLIT && (blockIdx.x & 1);
    k.cb = SPLIT ? blockIdx.x >> 1 : blockIdx.x;
    k.h = blockIdx.y;
    k.kh = k.h / a.ratio;
    k.s = a.seq0 + blockIdx.z;
    k.t0 = a.cu[k.s];
    k.n = a.cu[k.s + 1] - k.t0;
    if (k.n == 0)
        return;
    k.n_chunks = (k.n + kChunk - 1) / kChunk;
    k.id0 = chunk_id(a, k.s, 0);
    k.stage = smem_u32(smem);
    k.v = k.stage + kStages * kStage;
    k.o = k.v + 2 * kColTile;
    k.state = k.o + 2 * kColTile;
    k.delta = k.state + kTile;
    k.bars = bars;
    k.sums = sums;
    const uint32_t raw = SPLIT ? k.stage : k.delta + kColTile;
    if (threadIdx.x == 0) {
        auto init = [&](uint64_t &bar, int count) { mbar_init(smem_u32(&bar), count); };
        for (int i = 0; i < kStages; i++) {
            init(bars->full[i], 1);
            init(bars->empty[i], 8);
        }
        for (int i = 0; i < 2; i++) {
            init(bars->v_full[i], SPLIT && !helper ? 1 : 4);
            init(bars->v_empty[i], helper ? 1 : 4);
            init(bars->o_full[i], helper ? 1 : 4);
            init(bars->o_empty[i], SPLIT && !helper ? 1 : 4);
            init(bars->peer[i], 1);
        }
        init(bars->s_full, 4);
        init(bars->s_empty, 4);
        init(bars->d_full, 4);
        init(bars->d_empty, 4);
        mbar_publish();
    }
    cluster_sync();
    const int role = threadIdx.x >> 7;
    auto gate = [&] {
        walk_gate<SPLIT>(a, k, role - 3);
        if (threadIdx.x < 3 * 128 + 32 && k.h % a.ratio == 0)
            move_conv_state(a, k, threadIdx.x & 31);
    };
    /* Registers: 192 + 2 * 64 + 2 * 80 make the 480 of five warpgroups of 96. */
    if (helper) {
        if (role == 0)
            walk_relay(k, 0, k.v, bars->v_full, bars->o_full, bars->o_empty);
        else if (role <= 2)
            walk_values<SPLIT>(a, k, role - 1, 2, raw + (role - 1) * 2 * kRawTile);
        else
            gate();
    } else if (role == 0) {
        registers_up<192>();
        walk_state(a, k);
    } else if (role == 1) {
        registers_down<64>();
        walk_outputs<SPLIT>(a, k);
    } else if (role == 2) {
        registers_down<64>();
        if (SPLIT)
            walk_relay(k, 1, k.o, bars->o_full, bars->v_full, bars->v_empty);
        else
            walk_values<SPLIT>(a, k, 0, 1, raw);
    } else {
        registers_down<80>();
        if (!SPLIT)
            gate();
    }
    if (SPLIT)      /* blocks of a cluster write into each other's memory, so none may go before the last */
        cluster_sync();
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

template <bool SPLIT> __global__ void __launch_bounds__(kWalkThreads, 1) walk_kernel(const gdn_args a)
{
    extern __shared__ __align__(128) unsigned char gdn_smem[];
    pdl_launch();
    pdl_wait();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ walk_bars bars;          /* its presence tells have_walk() that the code is there */
    __shared__ __align__(16) float sums[4 * kChunk];
    walk_block<SPLIT>(a, gdn_smem + (-smem_u32(gdn_smem) & 1023), &bars, sums);
#endif
}

/* ---- launch ---------------------------------------------------------------------------------------------------------- */

int run_chunks(arle_device *dev, cudaStream_t st, gdn_args a, const arle_batch *b, char *scratch)
{
    const int n_tokens = (int)(b->n_tokens - b->n_decode);
    const int64_t chunks = n_tokens / kChunk + a.n_seqs;
    a.qkv = (bf16 *)scratch;
    a.ut = a.qkv + (int64_t)n_tokens * a.n_conv;
    a.w = a.ut + chunks * a.n_v * kDim * kChunk;
    a.p = a.w + chunks * a.n_v * kDim * kChunk;
    a.decay = (float *)(a.p + chunks * a.n_v * kChunk * kChunk);
    const unsigned per_seq = (unsigned)ceil_div(b->max_new, kChunk);
    bump(dev, COUNT_GDN_CHUNK);
    int r = launch(dev, st, conv_kernel, dim3((unsigned)ceil_div(b->max_new, kConvTok), (unsigned)ceil_div(a.n_conv, 1024), a.n_seqs),
                   dim3(256), 0, a);
    if (r == 0)
        r = launch(dev, st, prepare_kernel, dim3(per_seq, a.n_k, a.n_seqs), dim3(256), kPrepSmem, a);
    /* Too few blocks for two on each multiprocessor must not be packed onto half of them: ask for memory that only one can have. */
    const bool alone = kDim / kScanCols * a.n_v * a.n_seqs <= dev->n_sm && dev->max_smem >= (size_t)kScanSmem + 8192;
    if (r == 0)
        r = launch(dev, st, scan_kernel, dim3(kDim / kScanCols, a.n_v, a.n_seqs), dim3(kScanWarps * 32), kScanSmem + (alone ? 8192 : 0), a);
    if (r == 0)
        r = launch(dev, st, gate_kernel, dim3(n_tokens), dim3(256), 0, a);
    return r;
}

size_t chunk_scratch(const gdn_args *a, int n_tokens)
{
    size_t chunks = n_tokens / kChunk + a->n_seqs;
    return (size_t)n_tokens * a->n_conv * 2 + chunks * a->n_v * (2 * kDim * kChunk * 2 + kChunk * kChunk * 2 + 2 * kChunk * 4);
}

/* Is the code for compute capability 9.0 in this build, and does the device run it? */
bool have_walk(const arle_device *dev)
{
    cudaFuncAttributes f;
    return dev->cc == 90 && dev->max_smem >= (size_t)kWalkSmem + 1024 && cudaFuncGetAttributes(&f, walk_kernel<false>) == cudaSuccess
           && f.sharedSizeBytes > 0;
}

/* walk_kernel in clusters of two: the column halves of a head, or block and helper of one half. */
struct walk_launch {
    cudaLaunchConfig_t cfg;
    cudaLaunchAttribute attr[2];

    walk_launch(const arle_device *dev, cudaStream_t st, const gdn_args &a, bool split) : cfg(), attr()
    {
        attr[0].id = cudaLaunchAttributeClusterDimension;
        attr[0].val.clusterDim.x = 2;
        attr[0].val.clusterDim.y = attr[0].val.clusterDim.z = 1;
        attr[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[1].val.programmaticStreamSerializationAllowed = 1;
        cfg.gridDim = dim3(split ? 4 : 2, a.n_v, a.n_seqs);
        cfg.blockDim = dim3(kWalkThreads);
        cfg.dynamicSmemBytes = kWalkSmem;
        cfg.stream = st;
        cfg.attrs = attr;
        cfg.numAttrs = dev->pdl ? 2 : 1;
    }
};

/* Helpers wait for each other, so all of them must run at once. */
bool split_fits(const arle_device *dev, cudaStream_t st, const gdn_args &a)
{
    int n = 0;
    if (4 * a.n_v * a.n_seqs > dev->n_sm)
        return false;
    const walk_launch l(dev, st, a, true);
    return cudaFuncSetAttribute((const void *)walk_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, kWalkSmem) == cudaSuccess
           && cudaOccupancyMaxActiveClusters(&n, walk_kernel<true>, &l.cfg) == cudaSuccess && n >= 2 * a.n_v * a.n_seqs;
}

int run_tiles(arle_device *dev, cudaStream_t st, gdn_args a, const arle_batch *b, char *scratch)
{
    const int64_t chunks = (b->n_tokens - b->n_decode) / kChunk + a.n_seqs;
    a.kq = (unsigned char *)scratch;
    a.rec = a.kq + chunks * a.n_k * kKQ;
    const bool split = split_fits(dev, st, a);
    a.sums = split ? a.rec + chunks * a.n_v * kRec : NULL;
    bump(dev, COUNT_GDN_CHUNK);
    int r = launch(dev, st, tile_kernel, dim3(a.n_k, (unsigned)ceil_div(b->max_new, kChunk), a.n_seqs), dim3(256), kTileSmem, a);
    if (r < 0)
        return r;
    const walk_launch l(dev, st, a, split);
    void (*kernel)(gdn_args) = split ? walk_kernel<true> : walk_kernel<false>;
    CUDA_TRY(dev, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWalkSmem));
    if (dev->pdl)
        bump(dev, COUNT_PDL);
    CUDA_TRY(dev, cudaLaunchKernelEx(&l.cfg, kernel, a));
    return 0;
}

} // namespace

extern "C" int cuda_gdn(struct arle_device *dev, struct arle_stream *st, const struct arle_gdn_args *g)
{
    OP_ENTER(dev, st);
    const arle_batch *b = g->batch;
    if (b->n_tokens == 0)
        return 0;
    if (g->dtype != ARLE_BF16 || g->dk != (uint32_t)kDim || g->dv != (uint32_t)kDim || g->conv_width != 4 || g->n_k == 0
        || g->n_v % g->n_k != 0 || (g->ld_proj | g->u_off | g->z_off | g->ld_out) % 8 != 0 || (uint64_t)b->n_seqs * g->n_k > 65536)
        return -EINVAL;
    gdn_args a = {};
    a.n_k = (int)g->n_k;
    a.n_v = (int)g->n_v;
    a.ratio = a.n_v / a.n_k;
    a.n_conv = (2 * a.n_k + a.n_v) * kDim;
    a.eps = g->eps;
    a.proj = (const bf16 *)g->proj;
    a.ld_proj = g->ld_proj;
    a.u_off = g->u_off;
    a.z_off = g->z_off;
    a.a_off = g->a_off;
    a.b_off = g->b_off;
    a.conv_w = g->conv_w;
    a.A_log = g->A_log;
    a.dt_bias = g->dt_bias;
    a.norm_w = g->norm_w;
    a.conv_base = (char *)g->conv_state.base;
    a.conv_stride = g->conv_state.stride;
    a.conv_offset = g->conv_state.offset;
    a.s_base = (char *)g->s_state.base;
    a.s_stride = g->s_state.stride;
    a.s_offset = g->s_state.offset;
    a.cu = b->cu;
    a.slot = b->slot;
    a.out = (bf16 *)g->out;
    a.ld_out = g->ld_out;
    a.tickets = dev->tickets + 65536;

    uint32_t stepped = b->n_decode;
    gdn_args c = a;
    c.seq0 = (int)b->n_decode;
    c.n_seqs = (int)(b->n_seqs - b->n_decode);
    c.tok0 = (int)b->n_decode;
    const bool aligned = (g->conv_state.stride | g->conv_state.offset | (size_t)g->conv_state.base) % 16 == 0;
    const bool tiles = have_walk(dev);
    const int n_new = (int)(b->n_tokens - b->n_decode);
    bool chunked = aligned && c.n_seqs > 0 && b->max_new > (uint32_t)kStepLimit && !dev->deterministic && g->scratch != NULL
                   && (tiles ? tile_scratch(&c, n_new) : chunk_scratch(&c, n_new)) <= g->scratch_bytes;
    if (!chunked)
        stepped = b->n_seqs;        /* short pieces, deterministic mode: token after token */
    int r = 0;
    const uint32_t decode = dev->deterministic ? 0 : b->n_decode;      /* there one kernel makes every token */
    if (decode > 0) {
        bump(dev, COUNT_GDN_DECODE);
        a.n_seqs = (int)decode;
        int64_t items = (int64_t)a.n_seqs * a.n_v;
        r = launch(dev, cs(st), decode_kernel, dim3((unsigned)(items < 2 * dev->n_sm ? items : 2 * dev->n_sm)), dim3(256), kStepSmem, a);
    }
    if (r == 0 && stepped > decode) {
        bump(dev, COUNT_GDN_STEP);
        a.seq0 = (int)decode;
        a.n_seqs = (int)(stepped - decode);
        int64_t items = (int64_t)a.n_seqs * a.n_v;
        r = launch(dev, cs(st), step_kernel, dim3((unsigned)(items < 2 * dev->n_sm ? items : 2 * dev->n_sm)), dim3(256), kStepSmem, a);
    }
    if (r == 0 && chunked)
        r = tiles ? run_tiles(dev, cs(st), c, b, (char *)g->scratch) : run_chunks(dev, cs(st), c, b, (char *)g->scratch);
    return r;
}
