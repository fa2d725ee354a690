/* The gated delta net, token after token: decode rows, short pieces, and everything in deterministic mode. */
#ifndef BACKEND_CUDA_GDN_STEP_CUH
#define BACKEND_CUDA_GDN_STEP_CUH

#include "gdn.cuh"

namespace {

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

/* Adds this warp's sixteen rows of S to S^T k and S^T q; k and q are scaled on the way. */
__device__ __forceinline__ void row_products(const float4 (&st)[16], const float *sk, const float *sq, float rk, float rq, float4 &mk,
                                             float4 &mq)
{
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const float k = sk[j] * rk, q = sq[j] * rq;
        mk.x += st[j].x * k;
        mk.y += st[j].y * k;
        mk.z += st[j].z * k;
        mk.w += st[j].w * k;
        mq.x += st[j].x * q;
        mq.y += st[j].y * q;
        mq.z += st[j].z * q;
        mq.w += st[j].w * q;
    }
}

/* Adds the eight warps' parts of S^T k and S^T q, in order. */
__device__ __forceinline__ void join_parts(const float (*part_k)[kDim], const float (*part_q)[kDim], int lane, float4 &m, float4 &o)
{
#pragma unroll
    for (int w = 0; w < 8; w++) {
        const float4 x = *(const float4 *)&part_k[w][lane * 4], y = *(const float4 *)&part_q[w][lane * 4];
        m.x += x.x;
        m.y += x.y;
        m.z += x.z;
        m.w += x.w;
        o.x += y.x;
        o.y += y.y;
        o.z += y.z;
        o.w += y.w;
    }
}

/* The gated norm of token t, head h, from o = S^T q before the update, by one warp: o = S'^T q = decay S^T q + (k . q) d, so that no second
 * pass over S is needed. gate() gives the lane's four values of z. */
template <class G>
__device__ __forceinline__ void put_result(const gdn_args &a, const float *norm_w, int t, int h, int lane, float4 o, float4 d, float decay, float kq, G gate)
{
    o.x = round_bf(decay * o.x + kq * d.x);
    o.y = round_bf(decay * o.y + kq * d.y);
    o.z = round_bf(decay * o.z + kq * d.z);
    o.w = round_bf(decay * o.w + kq * d.w);
    const float rho = rsqrtf(warp_sum(o.x * o.x + o.y * o.y + o.z * o.z + o.w * o.w) / (float)kDim + a.eps);
    const uint2 z2 = gate();
    const float2 za = unpack2(z2.x), zb = unpack2(z2.y);
    const float4 w = *(const float4 *)(norm_w + lane * 4);
    *(uint2 *)(a.out + (int64_t)t * a.ld_out + h * kDim + lane * 4) =
        make_uint2(pack2(o.x * rho * w.x * siluf(za.x), o.y * rho * w.y * siluf(za.y)),
                   pack2(o.z * rho * w.z * siluf(zb.x), o.w * rho * w.w * siluf(zb.y)));
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
        gdn_due due = next_save(a, s, 0);

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
            row_products(st, sk + warp * 16, sq + warp * 16, rk, rq, mk, mq);
            *(float4 *)&part_k[warp][lane * 4] = mk;
            *(float4 *)&part_q[warp][lane * 4] = mq;
            __syncthreads();
            float4 m = make_float4(0.f, 0.f, 0.f, 0.f), o = m;
            join_parts(part_k, part_q, lane, m, o);
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
                put_result(a, a.norm_w, t, h, lane, o, d, decay, kq, [&] { return *(const uint2 *)(row + a.z_off + h * kDim + lane * 4); });
            }
            if (t + 1 - t0 == due.n) {
                float *to = s_of_slot(a, due.slot, h);
#pragma unroll
                for (int j = 0; j < 16; j++)
                    *(float4 *)(to + (warp * 16 + j) * kDim + lane * 4) = st[j];
                due = next_save(a, s, due.n);
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
 * exchange leave two barriers a pair. One block per multiprocessor keeps the memory busy, and leaves room for a block of the product
 * before this and of the one after it, whose first loads overlap. Blocks take pairs in turn, as multiprocessors get unequal parts of
 * the memory's bandwidth; which block works on a pair does not change its results.
 */
struct step_in {
    int h, slot, c1, ticket;                /* head, place of the state; a channel of this thread (c1 + n_k kDim is the other) */
    unsigned short taps[3], u, more[3], w;  /* taps and input of both, as they come: conversion would wait for them */
    float4 tap_w, more_w;                   /* v has no other; in its place is what beta and the decay come from */
};

__device__ __forceinline__ float from_bits(unsigned short x) { return __uint_as_float((uint32_t)x << 16); }

/* With more registers no block of the next product fits beside one of these; with fewer, inputs go to local memory as they arrive, and
 * the block waits for them. */
#if CUDART_VERSION >= 12040
#define DECODE_BOUNDS __maxnreg__(160)
#else
#define DECODE_BOUNDS __launch_bounds__(384)
#endif

__global__ void DECODE_BOUNDS decode_kernel(const gdn_args a)
{
    extern __shared__ __align__(16) float next_s[];
    __shared__ __align__(16) float vec[2][3][kDim];             /* q, k, v */
    __shared__ __align__(16) float part[2][2][8][kDim];         /* S^T k, S^T q by warp */
    __shared__ float sums[2][3][4], gates[2][2];
    __shared__ __align__(16) float norm[kDim];
    __shared__ int sh_last, sh_next[2];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, items = a.n_seqs * a.n_v, i = tid & 127;
    const bool is_v = tid >= 128, taker = tid == 255;
    const uint32_t mine = smem_u32(next_s) + (warp * 16 * kDim + lane * 4) * 4;
    auto state = [&](int slot, int h) {
        return (float *)(a.s_base + (size_t)slot * a.s_stride + a.s_offset) + (h * kDim + warp * 16) * kDim + lane * 4;
    };
    auto fetch = [&](int slot, int h) {
        const float *S = state(slot, h);
#pragma unroll
        for (int j = 0; j < 16; j++)
            cp16(mine + j * kDim * 4, S + j * kDim, true);
        cp_commit();
    };
    auto load = [&](int s, int h, int slot, step_in &x) {
        const int kh = h / a.ratio, c1 = is_v ? 2 * a.n_k * kDim + h * kDim + i : kh * kDim + i, c2 = c1 + a.n_k * kDim;
        const unsigned short *row = (const unsigned short *)a.proj + (int64_t)s * a.ld_proj;
        const unsigned short *rec = (const unsigned short *)(a.conv_base + (size_t)slot * a.conv_stride + a.conv_offset);
        x.h = h;
        x.slot = slot;
        x.c1 = c1;
        x.ticket = s * a.n_k + kh;
        x.u = row[a.u_off + c1];
        x.tap_w = *(const float4 *)(a.conv_w + (int64_t)c1 * 4);
#pragma unroll
        for (int j = 0; j < 3; j++)
            x.taps[j] = rec[(int64_t)j * a.n_conv + c1];
        if (!is_v) {
            x.w = row[a.u_off + c2];
            x.more_w = *(const float4 *)(a.conv_w + (int64_t)c2 * 4);
#pragma unroll
            for (int j = 0; j < 3; j++)
                x.more[j] = rec[(int64_t)j * a.n_conv + c2];
        } else {
            x.w = row[a.b_off + h];
            x.more[0] = row[a.a_off + h];
            x.more_w.x = a.A_log[h];
            x.more_w.y = a.dt_bias[h];
        }
    };
    int s1 = blockIdx.x / a.n_v, h1 = blockIdx.x % a.n_v, slot1 = a.slot[s1];
    pdl_launch();
    fetch(slot1, h1);       /* nothing in flight writes S: the delta net of this layer was called a step ago */
    if (!is_v)
        norm[i] = a.norm_w[i];
    pdl_wait();
    step_in x = {};
    load(s1, h1, slot1, x);
    /* The pair after the one at hand. */
    int next = blockIdx.x + gridDim.x;
    auto look_up = [&]() {
        s1 = next / a.n_v;
        h1 = next - s1 * a.n_v;
        slot1 = a.slot[min(s1, a.n_seqs - 1)];
    };
    look_up();
    /* Value heads that share a key head read its convolution state; the last to do so moves it on, one pair later, when it has
     * learnt that it was the last. */
    uint32_t keep[3];           /* of both channels */
    unsigned short *keep_at = NULL;
    auto move_on = [&]() {
        if (!is_v && keep_at != NULL && sh_last)
#pragma unroll
            for (int j = 0; j < 3; j++) {
                keep_at[(int64_t)j * a.n_conv] = (unsigned short)keep[j];
                keep_at[(int64_t)j * a.n_conv + a.n_k * kDim] = (unsigned short)(keep[j] >> 16);
            }
    };
    int ticket = -1;
    unsigned place = 0;
    auto tell = [&]() {
        if (taker && ticket >= 0) {
            sh_last = place == (unsigned)(a.ratio - 1);
            if (sh_last)
                a.tickets[ticket] = 0;
        }
    };
    int turn = 0;
    for (int item = blockIdx.x; item < items; turn ^= 1) {
        unsigned short *rec = (unsigned short *)(a.conv_base + (size_t)x.slot * a.conv_stride + a.conv_offset) + x.c1;
        float *S = state(x.slot, x.h);
        const int ticket1 = x.ticket;
        float (*v)[kDim] = vec[turn];
        uint2 z;
        if (warp == 0)
            z = *(const uint2 *)(a.proj + item / a.n_v * a.ld_proj + a.z_off + item % a.n_v * kDim + lane * 4);
        unsigned taken = 0;
        if (taker)
            taken = atomicAdd(a.tickets + kTickets, 1u);
        const float y1 = round_bf(siluf(x.tap_w.x * from_bits(x.taps[0]) + x.tap_w.y * from_bits(x.taps[1]) + x.tap_w.z * from_bits(x.taps[2])
                                        + x.tap_w.w * from_bits(x.u)));
        const uint32_t now[3] = { x.taps[1] | (uint32_t)x.more[1] << 16, x.taps[2] | (uint32_t)x.more[2] << 16, x.u | (uint32_t)x.w << 16 };
        if (is_v) {
            v[2][i] = y1;
#pragma unroll
            for (int j = 0; j < 3; j++)
                rec[(int64_t)j * a.n_conv] = (unsigned short)now[j];
            if (i == 0) {
                gates[turn][0] = sigmoidf(from_bits(x.w));
                gates[turn][1] = expf(decay_log(x.more_w.x, from_bits(x.more[0]) + x.more_w.y));
            }
        } else {
            const float y2 = round_bf(siluf(x.more_w.x * from_bits(x.more[0]) + x.more_w.y * from_bits(x.more[1])
                                            + x.more_w.z * from_bits(x.more[2]) + x.more_w.w * from_bits(x.w)));
            const float qq = warp_sum(y1 * y1), kk = warp_sum(y2 * y2), kq = warp_sum(y1 * y2);
            if (lane == 0) {
                sums[turn][0][warp] = qq;
                sums[turn][1][warp] = kk;
                sums[turn][2][warp] = kq;
            }
            v[0][i] = y1;
            v[1][i] = y2;
        }
        float4 st[16];
        cp_wait<0>();
#pragma unroll
        for (int j = 0; j < 16; j++)
            st[j] = *(const float4 *)(next_s + (warp * 16 + j) * kDim + lane * 4);
        if (next < items) {
            fetch(slot1, h1);
            load(s1, h1, slot1, x);
        }
        tell();
        __syncthreads();
        move_on();
        keep_at = rec;
#pragma unroll
        for (int j = 0; j < 3; j++)
            keep[j] = now[j];
        if (taker) {
            ticket = ticket1;
            place = atomicAdd(a.tickets + ticket, 1u);
        }
        const float (*n)[4] = sums[turn];
        const float rq = rsqrtf(n[0][0] + n[0][1] + n[0][2] + n[0][3] + 1e-6f) * 0.08838834764831845f;
        const float rk = rsqrtf(n[1][0] + n[1][1] + n[1][2] + n[1][3] + 1e-6f);
        const float kq = (n[2][0] + n[2][1] + n[2][2] + n[2][3]) * rq * rk;
        float4 mk = make_float4(0.f, 0.f, 0.f, 0.f), mq = mk;
        row_products(st, v[1] + warp * 16, v[0] + warp * 16, rk, rq, mk, mq);
        *(float4 *)&part[turn][0][warp][lane * 4] = mk;
        *(float4 *)&part[turn][1][warp][lane * 4] = mq;
        if (taker) {
            sh_next[turn] = (int)(taken + 2 * gridDim.x);
            if (taken == (unsigned)items - 1)
                a.tickets[kTickets] = 0;        /* one is taken for each pair, so this was the last */
        }
        __syncthreads();
        float4 m = make_float4(0.f, 0.f, 0.f, 0.f), o = m;
        join_parts(part[turn][0], part[turn][1], lane, m, o);
        const float beta = gates[turn][0], decay = gates[turn][1];
        const float4 vv = *(const float4 *)&v[2][lane * 4];
        const float4 d = make_float4(beta * (vv.x - decay * m.x), beta * (vv.y - decay * m.y), beta * (vv.z - decay * m.z),
                                     beta * (vv.w - decay * m.w));
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const float k = v[1][warp * 16 + j] * rk;
            *(float4 *)(S + j * kDim) = make_float4(decay * st[j].x + k * d.x, decay * st[j].y + k * d.y, decay * st[j].z + k * d.z,
                                                    decay * st[j].w + k * d.w);
        }
        if (warp == 0)
            put_result(a, norm, item / a.n_v, item % a.n_v, lane, o, d, decay, kq, [&] { return z; });
        item = next;
        next = sh_next[turn];
        look_up();
    }
    tell();
    __syncthreads();
    move_on();
}

} // namespace

#endif
