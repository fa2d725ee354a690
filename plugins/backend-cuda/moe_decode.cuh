/*
 * A mixture of experts for at most four tokens, where nothing counts but the stream of weights and the time between kernels.
 *
 *   route_up   norm, router, and of the shared expert gate and up: everything that does not hang on the routing, weights asked for early
 *   up         each block picks the experts from the logits by itself; gate and up of the routed experts
 *   sum_down   a warp per column of y: down of all experts of a token, weighted and summed in ids order, shared last, residual
 *
 * A warp multiplies whole rows of W, which pass through its registers; a result depends on its row and its token alone. Shapes of 35B-A3B
 * give each multiprocessor its rows at once: 4096 outputs are a warp each of up, 2048 columns a warp each of sum_down.
 *
 * up lets sum_down in only once its own predecessor has ended and the ids are written, so that sum_down may ask for its
 * weights before it waits.
 */
#ifndef BACKEND_CUDA_MOE_DECODE_CUH
#define BACKEND_CUDA_MOE_DECODE_CUH

#include "gemm.cuh"

namespace {

const int kMaxExperts = 1024, kMaxPick = 32;
const int kMoeTokens = 4, kRouteWarps = 5, kPickWarps = 8, kSumWarps = 4, kSumAhead = 18;

struct route_args {
    const float *logits;
    int n_tokens, n_experts, k, score;
    float route_scale;
    const float *bias;
    const int32_t *table, *token_ids, *sampled;
    int32_t *ids;
    float *weights;
};

struct moe_args {
    int n_tokens, h, width;             /* of x and y; of an expert */
    int up_rows;                        /* of W per expert, gate and up interleaved by eights */
    int n_pairs, per_token;             /* routed (token, expert) pairs, of a token */
    bool has_shared, weight_first, accumulate;
    float limit;
    const bf16 *x; int64_t ld_x;        /* normed */
    const bf16 *up, *down, *shared_up, *shared_down;
    const float *shared_gate;           /* NULL: the shared expert counts whole */
    float *gates;                       /* [n_tokens], of the shared expert */
    bf16 *f;                            /* [n_pairs, then n_tokens of the shared expert][width] */
    bf16 *y; int64_t ld_y;
    route_args route;                   /* ids and weights; the rest where up chooses */
    /* route_up only */
    const bf16 *h_rows; int64_t ld_h;
    const float *norm_w;
    float eps, w_offset;
    const bf16 *router;
    float *logits;
    bf16 *x_out;
};

/* ---- routing --------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float score_of(float l, int kind, float max)
{
    if (kind == ARLE_MOE_SOFTMAX)
        return expf(l - max);
    return sqrtf(l > 20.f ? l : log1pf(expf(l)));
}

/* Keys as integers of the same order; 0 stands for "not to be had" and what is not a number. */
__device__ __forceinline__ uint32_t ordered(float f)
{
    const uint32_t b = __float_as_uint(f);
    return f == f ? b ^ ((uint32_t)((int32_t)b >> 31) | 0x80000000u) : 0;
}
__device__ __forceinline__ float from_ordered(uint32_t o) { return __uint_as_float(o & 0x80000000u ? o ^ 0x80000000u : ~o); }

/* The first n picks of token t by one warp; lane l holds experts l, l + 32, ..., KEYS of them. Lane j gets the j-th pick and, for n = k, its
 * weight. */
template <int KEYS>
__device__ __forceinline__ void route_token(const route_args &a, int t, int n, int lane, int *id, float *weight)
{
    const float *l = a.logits + (int64_t)t * a.n_experts;
    const bool plain = a.score == ARLE_MOE_SOFTMAX && a.bias == NULL && a.table == NULL;
    float v[KEYS], max = 0.f;
    uint32_t key[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; i++)
        v[i] = lane + i * 32 < a.n_experts ? __ldcg(l + lane + i * 32) : -INFINITY;
    if (!plain && a.score == ARLE_MOE_SOFTMAX) {
        float sum = 0.f;
        max = v[0];
#pragma unroll
        for (int i = 1; i < KEYS; i++)
            max = fmaxf(max, v[i]);
        max = warp_max(max);
#pragma unroll
        for (int i = 0; i < KEYS; i++)
            sum += lane + i * 32 < a.n_experts ? expf(v[i] - max) : 0.f;
        max += logf(warp_sum(sum));         /* so that score_of gives probabilities: a bias is added to those */
    }
    /* Softmax keeps the order, and weights are relative: without a bias the logits will do. */
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        int e = lane + i * 32;
        key[i] = e >= a.n_experts ? 0 : ordered(plain ? v[i] : score_of(v[i], a.score, max) + (a.bias != NULL ? a.bias[e] : 0.f));
    }
    float mine = 0.f;
    *id = 0;
    for (int j = 0; j < n; j++) {
        int e;
        float s;
        if (a.table != NULL) {
            e = a.table[(int64_t)token_id(a.token_ids, a.sampled, t) * a.k + j];
            s = __ldcg(l + e);
        } else {
            uint32_t best = key[0], at = kMaxExperts;
#pragma unroll
            for (int i = 1; i < KEYS; i++)
                best = key[i] > best ? key[i] : best;
            const uint32_t top = __reduce_max_sync(0xffffffffu, best);
#pragma unroll
            for (int i = KEYS - 1; i >= 0; i--)
                at = key[i] == top ? lane + i * 32 : at;
            e = (int)__reduce_min_sync(0xffffffffu, at);
            if (top == 0)
                e = 0;          /* only when logits are not numbers: padding rows */
#pragma unroll
            for (int i = 0; i < KEYS; i++)
                key[i] = lane + i * 32 == e ? 0 : key[i];
            s = plain ? from_ordered(top) : __ldcg(l + e);
        }
        if (plain && j == 0)
            max = s;
        if (lane == j) {
            mine = s;
            *id = e;
        }
    }
    mine = lane < a.k ? score_of(mine, a.score, max) : 0.f;
    *weight = mine / warp_sum(mine) * a.route_scale;
}

/* One warp per token. */
template <int KEYS>
__global__ void __launch_bounds__(128) route_kernel(route_args a)
{
    const int t = blockIdx.x * 4 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    pdl_launch();
    pdl_wait();
    if (t >= a.n_tokens)
        return;
    int id;
    float w;
    route_token<KEYS>(a, t, a.k, lane, &id, &w);
    if (lane < a.k) {
        a.ids[(int64_t)t * a.k + lane] = id;
        a.weights[(int64_t)t * a.k + lane] = w;
    }
}

/* ---- products -------------------------------------------------------------------------------------------------------- */

/* The lane's 16 bytes of a row from column `at` on; zero past its end. */
__device__ __forceinline__ uint4 row_piece(const bf16 *row, int at, int k)
{
    uint4 r = make_uint4(0, 0, 0, 0);
    if (at < k)
        asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(row + at));
    return r;
}

__device__ __forceinline__ float dot8(const uint4 &w, const uint4 &x, float sum)
{
    const uint32_t *p = (const uint32_t *)&w, *q = (const uint32_t *)&x;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float2 a = unpack2(p[e]), b = unpack2(q[e]);
        sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
    }
    return sum;
}

/* Two rows of W by one warp, AHEAD pieces of 256 columns of either under way. */
template <int AHEAD>
struct row_pair {
    uint4 va[AHEAD], vb[AHEAD];

    __device__ __forceinline__ void start(const bf16 *rows, int apart, int k, int lane)
    {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            va[j] = row_piece(rows, j * 256 + lane * 8, k);
            vb[j] = row_piece(rows + apart, j * 256 + lane * 8, k);
        }
    }
    /* Sums over the warp of both rows with each of TOKENS rows of xs; apart: elements between the rows. The rows at next, where there are any,
     * are then under way. */
    template <int TOKENS>
    __device__ __forceinline__ void finish(const bf16 *rows, int apart, const bf16 *next, const bf16 *xs, int k, int lane, float (&sum)[TOKENS][2])
    {
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            sum[t][0] = sum[t][1] = 0.f;
#pragma unroll 1
        for (int at0 = 0; at0 < k; at0 += AHEAD * 256) {
            const bool last = at0 + AHEAD * 256 >= k;
            const bf16 *then = last ? next : rows + at0 + AHEAD * 256;
            const int left = !last ? k - at0 - AHEAD * 256 : next != NULL ? k : 0;
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const int at = at0 + j * 256 + lane * 8;
#pragma unroll
                for (int t = 0; t < TOKENS && at < k; t++) {
                    const uint4 x = *(const uint4 *)(xs + t * k + at);
                    sum[t][0] = dot8(va[j], x, sum[t][0]);
                    sum[t][1] = dot8(vb[j], x, sum[t][1]);
                }
                va[j] = row_piece(then, j * 256 + lane * 8, left);
                vb[j] = row_piece(then + apart, j * 256 + lane * 8, left);
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            sum[t][0] = warp_sum(sum[t][0]);
            sum[t][1] = warp_sum(sum[t][1]);
        }
    }
};

/* Where in an expert's interleaved rows the gate of output o lies; its up lies eight further. */
__device__ __forceinline__ int64_t gate_row(int o) { return o / 8 * 16 + o % 8; }

__device__ __forceinline__ float shared_gate_of(const moe_args &a, const bf16 *x, int lane)
{
    float sum = 0.f;
    for (int i = lane * 4; i < a.h; i += 128) {
        const float4 g = *(const float4 *)(a.shared_gate + i);
        const float2 x0 = unpack2(*(const uint32_t *)(x + i)), x1 = unpack2(*(const uint32_t *)(x + i + 2));
        sum += g.x * x0.x + g.y * x0.y + g.z * x1.x + g.w * x1.y;
    }
    return sigmoidf(warp_sum(sum));
}

/*
 * Units of a warp: two rows of the router each; then an output of the shared expert each; then its gate. All tokens lie in shared memory,
 * as does the norm's weight.
 */
template <int TOKENS>
__global__ void __launch_bounds__(kRouteWarps * 32) route_up_kernel(const moe_args a)
{
    extern __shared__ __align__(16) unsigned char moe_mem[];
    __shared__ float sh[TOKENS][kRouteWarps];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, n_router = a.route.n_experts / 2;
    const int unit = blockIdx.x * kRouteWarps + warp, o = unit - n_router;
    float *nw = (float *)moe_mem;
    bf16 *xs = (bf16 *)(nw + a.h);
    const bool is_router = unit < n_router, is_up = !is_router && a.has_shared && o < a.width;
    pdl_launch();
    row_pair<8> rows;
    const bf16 *w = is_router ? a.router + (int64_t)(2 * unit) * a.h : a.shared_up + gate_row(o) * a.h;
    const int apart = is_router ? a.h : 8 * a.h;
    if (is_router || is_up)
        rows.start(w, apart, a.h, lane);
    for (int i = tid * 4; i < a.h; i += kRouteWarps * 128)
        *(float4 *)(nw + i) = *(const float4 *)(a.norm_w + i);
    pdl_wait();

#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float ss = 0.f;
        for (int i = tid * 8; t < a.n_tokens && i < a.h; i += kRouteWarps * 256) {
            const uint4 v = *(const uint4 *)(a.h_rows + t * a.ld_h + i);
            *(uint4 *)(xs + t * a.h + i) = v;
            ss = dot8(v, v, ss);
        }
        ss = warp_sum(ss);
        if (lane == 0)
            sh[t][warp] = ss;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float ss = 0.f;
#pragma unroll
        for (int w = 0; w < kRouteWarps; w++)
            ss += sh[t][w];
        const float rho = rsqrtf(ss / (float)a.h + a.eps);
        for (int i = tid * 8; t < a.n_tokens && i < a.h; i += kRouteWarps * 256) {
            uint4 v = *(const uint4 *)(xs + t * a.h + i);
            uint32_t *p = (uint32_t *)&v;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 f = unpack2(p[e]);
                p[e] = pack2(f.x * rho * (a.w_offset + nw[i + 2 * e]), f.y * rho * (a.w_offset + nw[i + 2 * e + 1]));
            }
            *(uint4 *)(xs + t * a.h + i) = v;
            if (blockIdx.x == 0)
                *(uint4 *)(a.x_out + t * a.ld_x + i) = v;
        }
    }
    __syncthreads();

    if (is_router || is_up) {
        float sum[TOKENS][2];
        rows.finish(w, apart, NULL, xs, a.h, lane, sum);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (t >= a.n_tokens || lane != 0)
                break;
            if (is_router)
                *(float2 *)(a.logits + (int64_t)t * a.route.n_experts + 2 * unit) = make_float2(sum[t][0], sum[t][1]);
            else
                a.f[(int64_t)(a.n_pairs + t) * a.width + o] = __float2bfloat16_rn(silu_limited(sum[t][0], sum[t][1], a.limit));
        }
    } else if (a.has_shared && a.shared_gate != NULL && o == a.width) {
        for (int t = 0; t < a.n_tokens; t++) {
            const float s = shared_gate_of(a, xs + t * a.h, lane);
            if (lane == 0)
                a.gates[t] = s;
        }
    }
}

/*
 * Gate and up, a warp per output, eight outputs of a pair at a time to a block. PICK: of the routed pairs, whose experts each block finds
 * out by itself. Otherwise the experts are known, pairs of the shared expert come first with weights asked for early, and its gates are
 * worked out as well.
 */
template <bool PICK>
__global__ void __launch_bounds__(kPickWarps * 32, 4) up_kernel(const moe_args a)
{
    extern __shared__ __align__(16) unsigned char moe_mem[];
    __shared__ int expert[kMoeTokens * kMaxPick];
    __shared__ float factor[kMoeTokens * kMaxPick];
    bf16 *xs = (bf16 *)moe_mem;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int per = a.width / kPickWarps, first = !PICK && a.has_shared ? a.n_tokens : 0, n_groups = (first + a.n_pairs) * per;
    auto rows_of = [&](int group) -> const bf16 * {
        const int pair = group / per - first;
        const bf16 *w = pair < 0 ? a.shared_up : a.up + (int64_t)expert[pair] * a.up_rows * a.h;
        return w + gate_row(group % per * kPickWarps + warp) * a.h;
    };
    row_pair<4> rows;
    const bf16 *w = NULL;
    int group = blockIdx.x;
    if (group < first * per) {
        w = rows_of(group);
        rows.start(w, 8 * a.h, a.h, lane);
    }
    const int routing = PICK ? a.n_tokens : 0;      /* the first warps, while the others copy x */
    pdl_wait();
    if (warp < routing) {
        /* A block with one pair of the only token needs no picks after its own, but the last one writes them all down. */
        const bool writes = blockIdx.x == gridDim.x - 1, one = a.n_tokens == 1 && (int)gridDim.x == n_groups && !writes && !a.weight_first;
        int id;
        float s;
        route_token<8>(a.route, warp, one ? group / per + 1 : a.per_token, lane, &id, &s);
        if (lane < a.per_token) {
            const int pair = warp * a.per_token + lane;
            expert[pair] = id;
            factor[pair] = a.weight_first ? s : 1.f;
            if (writes) {
                a.route.ids[pair] = id;
                a.route.weights[pair] = s;
                __threadfence();
            }
        }
    } else {
        for (int r = 0; r < a.n_tokens; r++)
            for (int i = (tid - routing * 32) * 8; i < a.h; i += (kPickWarps - routing) * 256)
                *(uint4 *)(xs + r * a.h + i) = *(const uint4 *)(a.x + r * a.ld_x + i);
    }
    if (!PICK && tid < a.n_pairs) {
        expert[tid] = a.route.ids[tid];
        factor[tid] = a.weight_first ? a.route.weights[tid] : 1.f;
    }
    __syncthreads();
    pdl_launch();

    if (w == NULL) {
        w = rows_of(group);
        rows.start(w, 8 * a.h, a.h, lane);
    }
    if (!PICK && a.has_shared && a.shared_gate != NULL && warp == 0 && blockIdx.x < a.n_tokens) {
        const float s = shared_gate_of(a, xs + blockIdx.x * a.h, lane);
        if (lane == 0)
            a.gates[blockIdx.x] = s;
    }
    for (; group < n_groups; group += gridDim.x) {
        const int pair = group / per - first, o = group % per * kPickWarps + warp;
        const bf16 *next = group + (int)gridDim.x < n_groups ? rows_of(group + gridDim.x) : NULL;
        float sum[1][2];
        rows.finish(w, 8 * a.h, next, xs + (pair < 0 ? pair + first : pair / a.per_token) * a.h, a.h, lane, sum);
        if (lane == 0) {
            const float f = silu_limited(sum[0][0], sum[0][1], a.limit) * (pair < 0 ? 1.f : factor[pair]);
            a.f[(pair < 0 ? a.n_pairs + first + pair : pair) * a.width + o] = __float2bfloat16_rn(f);
        }
        w = next;
    }
}

/*
 * A warp per column of y of token blockIdx.y, then the next. The pieces of 256 columns of W of all the token's experts form one line,
 * kSumAhead of them under way.
 */
__global__ void __launch_bounds__(kSumWarps * 32, 4) sum_down_kernel(const moe_args a)
{
    extern __shared__ __align__(16) unsigned char moe_mem[];
    bf16 *fs = (bf16 *)moe_mem;
    const int tid = threadIdx.x, lane = tid & 31, t = blockIdx.y, step = gridDim.x * kSumWarps;
    const int n_slots = a.per_token + a.has_shared, per = (a.width + 255) / 256, n_pieces = n_slots * per;
    pdl_launch();
    const int id = lane < a.per_token ? __ldcg(a.route.ids + t * a.per_token + lane) : 0;
    int c = blockIdx.x * kSumWarps + (tid >> 5), slot = 0, in = 0, ask = c;     /* the column in work; slot, place and column of the piece asked for next */
    uint4 v[kSumAhead];
    auto piece = [&](int p) {
        const bf16 *w = slot < a.per_token ? a.down + (int64_t)__shfl_sync(0xffffffffu, id, slot & 31) * a.h * a.width : a.shared_down;
        const uint4 r = row_piece(w + (int64_t)ask * a.width, in * 256 + lane * 8, p < n_pieces && ask < a.h ? a.width : 0);
        if (++in == per) {
            in = 0;
            slot++;
        }
        return r;
    };
    auto residual = [&](int column) {
        return lane == 0 && column < a.h && a.accumulate ? __bfloat162float(__ldcg(a.y + t * a.ld_y + column)) : 0.f;
    };
#pragma unroll
    for (int j = 0; j < kSumAhead; j++)
        v[j] = piece(j);
    float was = residual(c);
    pdl_wait();

    for (int i = tid * 8; i < n_slots * a.width; i += kSumWarps * 256) {
        const int s = i / a.width;
        *(uint4 *)(fs + i) = *(const uint4 *)(a.f + (s < a.per_token ? (int64_t)t * a.per_token + s : a.n_pairs + t) * a.width + i - s * a.width);
    }
    float weight = 1.f;
    if (lane < a.per_token && !a.weight_first)
        weight = a.route.weights[t * a.per_token + lane];
    if (lane == a.per_token && a.has_shared && a.shared_gate != NULL)
        weight = a.gates[t];
    __syncthreads();

    for (; c < a.h; c += step) {
        const float was_next = residual(c + step);
        float acc = 0.f;
        int s = 0, i = 0;               /* of the piece that is worked on */
        for (int p0 = 0; p0 < n_pieces; p0 += kSumAhead) {
            int p_next = p0 + kSumAhead;
            if (p_next >= n_pieces) {
                p_next = slot = in = 0;
                ask = c + step;
            }
#pragma unroll
            for (int j = 0; j < kSumAhead; j++) {
                const int at = i * 256 + lane * 8;
                const float scale = __shfl_sync(0xffffffffu, weight, s & 31);
                if (p0 + j < n_pieces && at < a.width)
                    acc = fmaf(scale, dot8(v[j], *(const uint4 *)(fs + s * a.width + at), 0.f), acc);
                if (++i == per) {
                    i = 0;
                    s++;
                }
                v[j] = piece(p_next + j);
            }
        }
        acc = warp_sum(acc) + was;
        if (lane == 0)
            a.y[t * a.ld_y + c] = __float2bfloat16_rn(acc);
        was = was_next;
    }
}

int launch_up(arle_device *dev, cudaStream_t st, const moe_args &a, bool pick)
{
    const int groups = (a.n_pairs + (a.has_shared && !pick ? a.n_tokens : 0)) * (a.width / kPickWarps), most = 4 * dev->n_sm;
    const dim3 grid((unsigned)(groups < most ? groups : most)), block(kPickWarps * 32);
    const size_t smem = (size_t)a.n_tokens * a.h * 2;
    return pick ? launch(dev, st, up_kernel<true>, grid, block, smem, a) : launch(dev, st, up_kernel<false>, grid, block, smem, a);
}

int launch_sum_down(arle_device *dev, cudaStream_t st, const moe_args &a)
{
    const int64_t columns = ceil_div(a.h, kSumWarps), most = ceil_div(4 * dev->n_sm, a.n_tokens);
    const dim3 grid((unsigned)(columns < most ? columns : most), (unsigned)a.n_tokens);
    return launch(dev, st, sum_down_kernel, grid, dim3(kSumWarps * 32), (size_t)(a.per_token + a.has_shared) * a.width * 2, a);
}

int launch_route_up(arle_device *dev, cudaStream_t st, const moe_args &a)
{
    const int units = a.route.n_experts / 2 + (a.has_shared ? a.width + 1 : 0);
    const dim3 grid((unsigned)ceil_div(units, kRouteWarps)), block(kRouteWarps * 32);
    const size_t smem = (size_t)a.h * (4 + 2 * (a.n_tokens > 2 ? kMoeTokens : a.n_tokens));
    if (a.n_tokens == 1)
        return launch(dev, st, route_up_kernel<1>, grid, block, smem, a);
    if (a.n_tokens == 2)
        return launch(dev, st, route_up_kernel<2>, grid, block, smem, a);
    return launch(dev, st, route_up_kernel<kMoeTokens>, grid, block, smem, a);
}

} // namespace

#endif
