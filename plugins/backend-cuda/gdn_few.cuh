/*
 * decode_kernel for so few pairs that each has a multiprocessor of its own: what counts is the time from the end of the projection to the last
 * store. The weights of the convolution and the gates are read before the kernel waits, and the states brought to the L2, as behind the
 * next kernel's weights they would wait for microseconds.
 */
#ifndef BACKEND_CUDA_GDN_FEW_CUH
#define BACKEND_CUDA_GDN_FEW_CUH

#include "gdn_step.cuh"

namespace {

__global__ void __launch_bounds__(256, 2) decode_few_kernel(const gdn_args a)
{
    __shared__ __align__(16) float vec[3][kDim];                /* q, k, v */
    __shared__ __align__(16) float part[2][8][kDim];            /* S^T k, S^T q by warp */
    __shared__ float sums[3][4];
    __shared__ int sh_last;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, i = tid & 127, h = blockIdx.x % a.n_v, s = blockIdx.x / a.n_v;
    const bool is_v = tid >= 128;
    const int c1 = is_v ? 2 * a.n_k * kDim + h * kDim + i : h / a.ratio * kDim + i, c2 = c1 + a.n_k * kDim;
    float *S = s_state(a, s, h) + warp * 16 * kDim + lane * 4;
    bf16 *rec = conv_state(a, s);
    pdl_launch();
    l2_prefetch(S - lane * 4 + lane * 64);
    l2_prefetch(S - lane * 4 + lane * 64 + 32);
    if (lane % 16 == 0)
        for (int j = 0; j < 3; j++) {
            l2_prefetch(rec + (int64_t)j * a.n_conv + c1);
            if (!is_v)
                l2_prefetch(rec + (int64_t)j * a.n_conv + c2);
        }
    const float4 hw = *(const float4 *)(a.conv_w + (int64_t)c1 * 4);
    const float4 gw = is_v ? make_float4(0.f, 0.f, 0.f, 0.f) : *(const float4 *)(a.conv_w + (int64_t)c2 * 4);
    const float A_log = a.A_log[h], dt_bias = a.dt_bias[h];
    if (warp == 0)
        l2_prefetch(a.norm_w + lane * 4);
    pdl_wait();

    const bf16 *row = a.proj + (int64_t)s * a.ld_proj;
    float4 st[16];
#pragma unroll
    for (int j = 0; j < 16; j++)
        st[j] = *(const float4 *)(S + j * kDim);
    const bf16 u = row[a.u_off + c1], b0 = row[a.b_off + h], a0 = row[a.a_off + h], zero = __float2bfloat16_rn(0.f), w = is_v ? zero : row[a.u_off + c2];
    bf16 h1[3], h2[3];
#pragma unroll
    for (int j = 0; j < 3; j++) {
        h1[j] = rec[(int64_t)j * a.n_conv + c1];
        h2[j] = is_v ? zero : rec[(int64_t)j * a.n_conv + c2];
    }
    const uint2 z = warp == 0 ? *(const uint2 *)(row + a.z_off + h * kDim + lane * 4) : make_uint2(0, 0);

    auto conv = [](const float4 &w, const bf16 (&old)[3], bf16 now) {
        return round_bf(siluf(w.x * __bfloat162float(old[0]) + w.y * __bfloat162float(old[1]) + w.z * __bfloat162float(old[2])
                              + w.w * __bfloat162float(now)));
    };
    const float y1 = conv(hw, h1, u), y2 = conv(gw, h2, w);
    const float beta = sigmoidf(__bfloat162float(b0)), decay = expf(decay_log(A_log, __bfloat162float(a0) + dt_bias));
    if (is_v) {
        vec[2][i] = y1;
    } else {
        const float qq = warp_sum(y1 * y1), kk = warp_sum(y2 * y2), kq = warp_sum(y1 * y2);
        if (lane == 0) {
            sums[0][warp] = qq;
            sums[1][warp] = kk;
            sums[2][warp] = kq;
        }
        vec[0][i] = y1;
        vec[1][i] = y2;
    }
    __syncthreads();
    if (tid == 128) {
        /* Value heads that share a key head read its convolution state; this one has. The last moves it on, below. */
        unsigned *ticket = a.tickets + s * a.n_k + h / a.ratio;
        sh_last = atomicAdd(ticket, 1u) == (unsigned)(a.ratio - 1);
        if (sh_last)
            *ticket = 0;
    }
    const float rq = rsqrtf(sums[0][0] + sums[0][1] + sums[0][2] + sums[0][3] + 1e-6f) * 0.08838834764831845f;
    const float rk = rsqrtf(sums[1][0] + sums[1][1] + sums[1][2] + sums[1][3] + 1e-6f);
    const float kq = (sums[2][0] + sums[2][1] + sums[2][2] + sums[2][3]) * rq * rk;
    float4 mk = make_float4(0.f, 0.f, 0.f, 0.f), mq = mk;
    row_products(st, vec[1] + warp * 16, vec[0] + warp * 16, rk, rq, mk, mq);
    *(float4 *)&part[0][warp][lane * 4] = mk;
    *(float4 *)&part[1][warp][lane * 4] = mq;
    __syncthreads();
    float4 m = make_float4(0.f, 0.f, 0.f, 0.f), o = m;
    join_parts(part[0], part[1], lane, m, o);
    const float4 v = *(const float4 *)&vec[2][lane * 4];
    const float4 d = make_float4(beta * (v.x - decay * m.x), beta * (v.y - decay * m.y), beta * (v.z - decay * m.z), beta * (v.w - decay * m.w));
    if (warp == 0)
        put_result(a, s, h, lane, o, d, decay, kq, [&] { return z; });
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const float k = vec[1][warp * 16 + j] * rk;
        *(float4 *)(S + j * kDim) = make_float4(decay * st[j].x + k * d.x, decay * st[j].y + k * d.y, decay * st[j].z + k * d.z,
                                                decay * st[j].w + k * d.w);
    }
    auto move_on = [&](int c, const bf16 (&old)[3], bf16 now) {
        rec[c] = old[1];
        rec[(int64_t)a.n_conv + c] = old[2];
        rec[2 * (int64_t)a.n_conv + c] = now;
    };
    if (is_v || sh_last)
        move_on(c1, h1, u);
    if (!is_v && sh_last)
        move_on(c2, h2, w);
}

} // namespace

#endif
