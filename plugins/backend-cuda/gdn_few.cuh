/*
 * The gated delta net for the few decode rows whose heads alone would not fill the GPU: two blocks for each head, 64 value columns each,
 * and the blocks of all heads that share a key head as one cluster, which lets the convolution state move on without tickets. The
 * state is on its way before the kernel before this one has ended, in registers, so that the next kernel's blocks find shared memory free.
 * Compute capability 9.0.
 */
#ifndef BACKEND_CUDA_GDN_FEW_CUH
#define BACKEND_CUDA_GDN_FEW_CUH

#include "gdn.cuh"

namespace {

const int kFewCols = 64, kFewParts = kDim / kFewCols, kFewRatio = 2;        /* value heads on one key head, at most */

/* 320 threads for the sake of the registers: 96, so that a block fits beside two of gemv. */
__global__ void __launch_bounds__(320, 2) few_kernel(const gdn_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ __align__(16) float2 qk[kDim];
    __shared__ __align__(16) float2 part[2][8][kFewCols / 2];
    __shared__ float vs[kFewCols], sums[3][4], squares[2][kFewParts * kFewRatio];
    __shared__ __align__(8) unsigned long long heard[2];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, pair = blockIdx.x / kFewParts, mine = blockIdx.x % kFewParts;
    const int s = pair / a.n_v, h = pair % a.n_v, col = mine * kFewCols + lane * 2;
    /* Threads 0 to 127 have a channel of q and one of k, the next 64 one of v; for S a lane has two columns. */
    const bool is_qk = warp < 4, is_v = warp == 4 || warp == 5;
    const int c1 = is_qk ? h / a.ratio * kDim + tid : 2 * a.n_k * kDim + h * kDim + mine * kFewCols + (tid - kDim), c2 = c1 + a.n_k * kDim;
    const int rank = (int)cluster_rank(), blocks = a.ratio * kFewParts;
    pdl_launch();
    if (tid == 0) {
        for (int i = 0; i < 2; i++) {
            mbar_init(smem_u32(heard + i), 1);
            mbar_expect(smem_u32(heard + i), blocks * 4);
        }
        mbar_publish();
    }
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");        /* waited for below */

    /* Nothing in flight may write a decode row's state: a step begins and ends with copies that wait for all before them, and each layer
     * has a state of its own. */
    bf16 *rec = conv_state(a, s);
    float *S = s_state(a, s, h) + warp * 16 * kDim + col;
    bf16 r1[3], r2[3];
    float4 w1 = make_float4(0.f, 0.f, 0.f, 0.f), w2 = w1;
    if (is_qk || is_v) {
        w1 = *(const float4 *)(a.conv_w + (int64_t)c1 * 4);
#pragma unroll
        for (int j = 0; j < 3; j++)
            r1[j] = rec[(int64_t)j * a.n_conv + c1];
    }
    if (is_qk) {
        w2 = *(const float4 *)(a.conv_w + (int64_t)c2 * 4);
#pragma unroll
        for (int j = 0; j < 3; j++)
            r2[j] = rec[(int64_t)j * a.n_conv + c2];
    }
    float2 st[16];
#pragma unroll
    for (int j = 0; j < 16; j++)
        st[j] = *(const float2 *)(S + j * kDim);
    const float A_log = a.A_log[h], dt_bias = a.dt_bias[h];
    const float2 norm_w = *(const float2 *)(a.norm_w + col);
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    /*
     * Between two layers the weights drive a kernel's code out of the caches, and every line of it would then be waited for in turn: it
     * runs once for nothing, on whatever is there, before the kernel before this one has ended.
     */
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        if (turn == 1)
            pdl_wait();
        const bf16 *row = a.proj + (int64_t)s * a.ld_proj;
        bf16 u1 = row[a.u_off + (is_qk || is_v ? c1 : 0)], u2 = row[a.u_off + (is_qk ? c2 : 0)];
        const float beta = sigmoidf(__bfloat162float(row[a.b_off + h]));
        const float decay = expf(decay_log(A_log, __bfloat162float(row[a.a_off + h]) + dt_bias));
        const uint32_t z2 = *(const uint32_t *)(row + a.z_off + h * kDim + col);
        auto conv = [](const bf16 (&r)[3], float4 w, bf16 u) {
            return round_bf(siluf(w.x * __bfloat162float(r[0]) + w.y * __bfloat162float(r[1]) + w.z * __bfloat162float(r[2])
                                  + w.w * __bfloat162float(u)));
        };
        if (is_qk) {
            const float q = conv(r1, w1, u1), k = conv(r2, w2, u2);
            const float qq = warp_sum(q * q), kk = warp_sum(k * k), kq = warp_sum(k * q);
            if (lane == 0) {
                sums[0][warp] = qq;
                sums[1][warp] = kk;
                sums[2][warp] = kq;
            }
            qk[tid] = make_float2(q, k);
        } else if (is_v) {
            vs[tid - kDim] = conv(r1, w1, u1);
        }
        __syncthreads();
        const float rq = rsqrtf(sums[0][0] + sums[0][1] + sums[0][2] + sums[0][3] + 1e-6f) * 0.08838834764831845f;
        const float rk = rsqrtf(sums[1][0] + sums[1][1] + sums[1][2] + sums[1][3] + 1e-6f);
        const float kq = (sums[2][0] + sums[2][1] + sums[2][2] + sums[2][3]) * rq * rk;
        float2 mk = make_float2(0.f, 0.f), mq = mk;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const float2 x = qk[warp * 16 + j];
            const float q = x.x * rq, k = x.y * rk;
            mk.x += st[j].x * k;
            mk.y += st[j].y * k;
            mq.x += st[j].x * q;
            mq.y += st[j].y * q;
        }
        part[0][warp][lane] = mk;
        part[1][warp][lane] = mq;
        __syncthreads();
        float2 m = make_float2(0.f, 0.f), o = m;
#pragma unroll
        for (int w = 0; w < 8; w++) {
            const float2 x = part[0][w][lane], y = part[1][w][lane];
            m.x += x.x;
            m.y += x.y;
            o.x += y.x;
            o.y += y.y;
        }
        const float2 d = make_float2(beta * (vs[lane * 2] - decay * m.x), beta * (vs[lane * 2 + 1] - decay * m.y));
        /* o = S'^T q = decay S^T q + (k . q) d. Its squares over the head come from all blocks of the head. */
        o.x = round_bf(decay * o.x + kq * d.x);
        o.y = round_bf(decay * o.y + kq * d.y);
        if (warp == 0) {
            const float sum = warp_sum(o.x * o.x + o.y * o.y);
            if (lane < blocks)
                asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                             ::"r"(of_rank(smem_u32(&squares[turn][rank]), lane)), "f"(sum), "r"(of_rank(smem_u32(&heard[turn]), lane)) : "memory");
        }
        if (turn == 1)
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const float k = qk[warp * 16 + j].y * rk;
                *(float2 *)(S + j * kDim) = make_float2(decay * st[j].x + k * d.x, decay * st[j].y + k * d.y);
            }
        mbar_wait(smem_u32(&heard[turn]), 0);
        if (turn == 0)
            continue;
        if (warp == 0) {
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < kFewParts; i++)
                sum += squares[1][rank - mine + i];
            const float rho = rsqrtf(sum / (float)kDim + a.eps);
            const float2 z = unpack2(z2);
            *(uint32_t *)(a.out + (int64_t)s * a.ld_out + h * kDim + col) =
                pack2(o.x * rho * norm_w.x * siluf(z.x), o.y * rho * norm_w.y * siluf(z.y));
        }
        /* All blocks of the cluster have read the state of their key head. */
        if (is_v || (is_qk && rank == 0)) {
            rec[c1] = r1[1];
            rec[a.n_conv + c1] = r1[2];
            rec[2 * (int64_t)a.n_conv + c1] = u1;
        }
        if (is_qk && rank == 0) {
            rec[c2] = r2[1];
            rec[a.n_conv + c2] = r2[2];
            rec[2 * (int64_t)a.n_conv + c2] = u2;
        }
    }
#endif
}

} // namespace

#endif
