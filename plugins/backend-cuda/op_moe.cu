/*
 * moe_route and moe_experts. The (token, expert) pairs are sorted by expert on the device; gate_up and down are then grouped
 * products of gemm_stream, which reads the weights of each expert in use once per tile of tokens, or of gemm_wide for many tokens;
 * the last kernel sums the experts of a token in routing order.
 */
#include "gemm_wide.cuh"
#include "gemv.cuh"
#include <errno.h>

namespace {

const int kMaxExperts = 1024, kMaxPick = 32;

struct route_args {
    const float *logits;
    int n_tokens, n_experts, k, score;
    float route_scale;
    const float *bias;
    const int32_t *table, *token_ids, *sampled;
    int32_t *ids;
    float *weights;
};

__device__ __forceinline__ float score_of(float l, int kind, float max)
{
    if (kind == ARLE_MOE_SOFTMAX)
        return expf(l - max);
    return sqrtf(l > 20.f ? l : log1pf(expf(l)));
}

/* One warp per token; lane l holds experts l, l + 32, ..., KEYS of them. */
template <int KEYS>
__global__ void __launch_bounds__(128) route_kernel(route_args a)
{
    const int t = blockIdx.x * 4 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    pdl_launch();
    pdl_wait();
    if (t >= a.n_tokens)
        return;
    const float *l = a.logits + (int64_t)t * a.n_experts;
    float key[KEYS], max = -INFINITY;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        int e = lane + i * 32;
        key[i] = e < a.n_experts ? l[e] : -INFINITY;
        max = fmaxf(max, key[i]);
    }
    max = warp_max(max);
    if (a.score == ARLE_MOE_SOFTMAX) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < KEYS; i++)
            sum += lane + i * 32 < a.n_experts ? expf(key[i] - max) : 0.f;
        max += logf(warp_sum(sum));         /* so that score_of gives probabilities: a bias is added to those */
    }
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        int e = lane + i * 32;
        if (e < a.n_experts)
            key[i] = score_of(key[i], a.score, max) + (a.bias != NULL ? a.bias[e] : 0.f);
    }
    float picked = 0.f, total = 0.f;
    int mine = 0;
    for (int j = 0; j < a.k; j++) {
        int e;
        if (a.table != NULL) {
            e = a.table[(int64_t)token_id(a.token_ids, a.sampled, t) * a.k + j];
        } else {
            float best = -INFINITY;
            int at = kMaxExperts;
#pragma unroll
            for (int i = 0; i < KEYS; i++)
                if (key[i] > best) {
                    best = key[i];
                    at = lane + i * 32;
                }
#pragma unroll
            for (int o = 16; o > 0; o >>= 1) {
                float b = __shfl_xor_sync(0xffffffffu, best, o);
                int x = __shfl_xor_sync(0xffffffffu, at, o);
                if (b > best || (b == best && x < at)) {
                    best = b;
                    at = x;
                }
            }
            e = at;
            if (e >= a.n_experts)
                e = 0;          /* only when logits are not numbers: padding rows */
#pragma unroll
            for (int i = 0; i < KEYS; i++)
                if (lane + i * 32 == e)
                    key[i] = -INFINITY;
        }
        float s = score_of(l[e], a.score, max);
        total += s;
        if (lane == j) {
            picked = s;
            mine = e;
        }
    }
    if (lane < a.k) {
        a.ids[(int64_t)t * a.k + lane] = mine;
        a.weights[(int64_t)t * a.k + lane] = picked / total * a.route_scale;
    }
}

struct sort_args {
    const int32_t *ids;
    int n_pairs, n_experts, k;
    int m_tiles_up, m_tiles_down, tile_tokens;
    int32_t *start, *tiles_up, *tiles_down, *src, *pair;
    unsigned *shared;           /* [kMaxExperts + 2] of several blocks: counts, blocks that counted, that read; zero between kernels */
};

/* Several blocks: count becomes the sum over all of them, before[e] the entries of the blocks that were sooner. All blocks are resident
 * at some time, since the kernels before this one do not wait for it. */
__device__ void sum_counts(const sort_args &a, int *count, int *before)
{
    __shared__ bool last;
    for (int e = threadIdx.x; e < a.n_experts; e += 1024)
        before[e] = count[e] > 0 ? (int)atomicAdd(&a.shared[e], (unsigned)count[e]) : 0;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(&a.shared[kMaxExperts], 1u);
        while (*(volatile unsigned *)&a.shared[kMaxExperts] < gridDim.x)
            ;
        __threadfence();
    }
    __syncthreads();
    for (int e = threadIdx.x; e < a.n_experts; e += 1024)
        count[e] = (int)__ldcg(&a.shared[e]);
    __syncthreads();
    if (threadIdx.x == 0)
        last = atomicAdd(&a.shared[kMaxExperts + 1], 1u) == gridDim.x - 1;
    __syncthreads();
    if (last)
        for (int e = threadIdx.x; e < kMaxExperts + 2; e += 1024)
            a.shared[e] = 0;
}

/* Count, prefix, scatter. Order within an expert is free: rows of a product do not see each other. */
__global__ void __launch_bounds__(1024) sort_kernel(sort_args a)
{
    __shared__ int count[kMaxExperts + 1], cursor[kMaxExperts];
    pdl_launch();
    pdl_wait();
    const int first = blockIdx.x * 1024 + threadIdx.x, step = gridDim.x * 1024;
    for (int e = threadIdx.x; e < a.n_experts; e += 1024)
        count[e] = cursor[e] = 0;
    __syncthreads();
    for (int i = first; i < a.n_pairs; i += step)
        atomicAdd(&count[min(max(a.ids[i], 0), a.n_experts - 1)], 1);
    __syncthreads();
    if (gridDim.x > 1)
        sum_counts(a, count, cursor);
    if (threadIdx.x < 32) {
        /* Three prefix sums by one warp: entries, and tiles of either product. */
        int lane = threadIdx.x, base = 0, base_t = 0;
        for (int e0 = 0; e0 < a.n_experts; e0 += 32) {
            int e = e0 + lane, c = e < a.n_experts ? count[e] : 0, t = (c + a.tile_tokens - 1) / a.tile_tokens;
            int cs = c, ts = t;
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                int x = __shfl_up_sync(0xffffffffu, cs, o), y = __shfl_up_sync(0xffffffffu, ts, o);
                if (lane >= o) {
                    cs += x;
                    ts += y;
                }
            }
            if (e < a.n_experts)
                cursor[e] += base + cs - c;
            if (e < a.n_experts && blockIdx.x == 0) {
                a.start[e] = base + cs - c;
                a.tiles_up[e] = (base_t + ts - t) * a.m_tiles_up;
                a.tiles_down[e] = (base_t + ts - t) * a.m_tiles_down;
            }
            base += __shfl_sync(0xffffffffu, cs, 31);
            base_t += __shfl_sync(0xffffffffu, ts, 31);
        }
        if (lane == 0 && blockIdx.x == 0) {
            a.start[a.n_experts] = base;
            a.tiles_up[a.n_experts] = base_t * a.m_tiles_up;
            a.tiles_down[a.n_experts] = base_t * a.m_tiles_down;
        }
    }
    __syncthreads();
    for (int i = first; i < a.n_pairs; i += step) {
        int at = atomicAdd(&cursor[min(max(a.ids[i], 0), a.n_experts - 1)], 1);
        a.src[at] = i / a.k;
        a.pair[at] = i;
    }
}

struct sum_args {
    const void *e;              /* [pairs][H] bf16 or f32, rows in routing order */
    const void *shared;         /* [tokens][H] likewise, or NULL */
    const float *weights, *shared_gate;
    const bf16 *x; int64_t ld_x;
    bf16 *y; int64_t ld_y;
    int k, h, weight_first, accumulate;
};

template <bool F32>
__device__ __forceinline__ void row8(const void *p, int64_t i, float *v)
{
    if (F32) {
        float4 x = *(const float4 *)((const float *)p + i), y = *(const float4 *)((const float *)p + i + 4);
        v[0] = x.x;
        v[1] = x.y;
        v[2] = x.z;
        v[3] = x.w;
        v[4] = y.x;
        v[5] = y.y;
        v[6] = y.z;
        v[7] = y.w;
        return;
    }
    uint4 r = *(const uint4 *)((const bf16 *)p + i);
    const uint32_t *w = (const uint32_t *)&r;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float2 f = unpack2(w[e]);
        v[2 * e] = f.x;
        v[2 * e + 1] = f.y;
    }
}

template <bool F32>
__global__ void __launch_bounds__(256) sum_kernel(sum_args a)
{
    __shared__ float sh[32];
    const int64_t t = blockIdx.x;
    pdl_launch();
    pdl_wait();
    float s = 1.f;
    if (a.shared != NULL && a.shared_gate != NULL) {
        float d = 0.f;
        for (int i = threadIdx.x; i < a.h; i += 256)
            d += __bfloat162float(a.x[t * a.ld_x + i]) * a.shared_gate[i];
        s = sigmoidf(block_sum(d, sh));
    }
    for (int c = threadIdx.x * 8; c < a.h; c += 2048) {
        float sum[8] = {}, v[8];
        for (int j = 0; j < a.k; j++) {
            float w = a.weight_first ? 1.f : a.weights[t * a.k + j];
            row8<F32>(a.e, (t * a.k + j) * a.h + c, v);
#pragma unroll
            for (int e = 0; e < 8; e++)
                sum[e] += w * v[e];
        }
        if (a.shared != NULL) {
            row8<F32>(a.shared, t * a.h + c, v);
#pragma unroll
            for (int e = 0; e < 8; e++)
                sum[e] += s * v[e];
        }
        bf16 *y = a.y + t * a.ld_y + c;
        if (a.accumulate) {
            row8<false>(y, 0, v);
#pragma unroll
            for (int e = 0; e < 8; e++)
                sum[e] += v[e];
        }
        *(uint4 *)y = make_uint4(pack2(sum[0], sum[1]), pack2(sum[2], sum[3]), pack2(sum[4], sum[5]), pack2(sum[6], sum[7]));
    }
}

/* Device memory of one call, cut from the caller's scratch. */
struct moe_scratch {
    int32_t *start, *tiles_up, *tiles_down, *src, *pair;
    bf16 *f, *fs, *gu;
    void *e, *ys;
    size_t bytes;
};

moe_scratch cut(char *base, const arle_moe_experts_args *a, bool f32)
{
    moe_scratch s = {};
    size_t at = 0, pairs = (size_t)a->n_tokens * a->k, item = f32 ? 4 : 2;
    size_t h = a->down->n, i = a->gate_up->n_real, is = a->shared_down != NULL ? a->shared_down->k : 0;
    auto take = [&](size_t bytes) {
        char *p = base + at;
        at += (bytes + 255) & ~(size_t)255;
        return p;
    };
    s.start = (int32_t *)take((a->n_experts + 1) * 4);
    s.tiles_up = (int32_t *)take((a->n_experts + 1) * 4);
    s.tiles_down = (int32_t *)take((a->n_experts + 1) * 4);
    s.src = (int32_t *)take(pairs * 4);
    s.pair = (int32_t *)take(pairs * 4);
    s.f = (bf16 *)take(pairs * i * 2);
    s.e = take(pairs * h * item);
    if (is > 0) {
        s.fs = (bf16 *)take((size_t)a->n_tokens * is * 2);
        s.ys = take((size_t)a->n_tokens * h * item);
        s.gu = (bf16 *)take((size_t)a->n_tokens * (is * 2 + h) * 2);
    }
    s.bytes = at;
    return s;
}

int run_shared(arle_device *dev, arle_stream *st, const arle_moe_experts_args *a, const moe_scratch *s, bool f32)
{
    arle_gate_up_args g = {};
    g.dtype = a->dtype;
    g.n_tokens = a->n_tokens;
    g.limit = a->limit;
    g.x = a->x;
    g.ld_x = a->ld_x;
    g.w = a->shared_gate_up;
    g.out = s->fs;
    g.ld_out = a->shared_down->k;
    g.scratch = s->gu;
    int r = cuda_gate_up(dev, st, &g);
    if (r < 0)
        return r;
    arle_linear_args l = {};
    l.dtype = a->dtype;
    l.out_dtype = f32 ? ARLE_F32 : ARLE_BF16;
    l.n_tokens = a->n_tokens;
    l.x = s->fs;
    l.ld_x = a->shared_down->k;
    l.w = a->shared_down;
    l.y = s->ys;
    l.ld_y = a->down->n;
    return cuda_linear(dev, st, &l);
}

/*
 * Few tokens: one product per (token, expert) pair straight from the routing, without sorting. As gemv, but a tile takes its weights
 * from the pair's expert; the shared expert is one more pair per token. Tiles of 16 rows, units of 512 columns, 64 to a warp.
 */
struct pair_args {
    const bf16 *w, *w_shared;
    const int32_t *ids;
    int n_pairs, n_rows;        /* routed pairs; with those of the shared expert */
    int per_token;              /* routed pairs that share one row of x; 0: every pair has its own row */
    int n, k, x_rows;
    const bf16 *x; int64_t ld_x;
    void *y;                    /* [n_rows][n_out]: bf16 of silu products, or f32 */
    int n_out, silu;
    float limit;
    const float *scale;         /* [n_pairs] or NULL */
};

template <int STAGES>
__global__ void __launch_bounds__(256, 2) pairs_kernel(const pair_args a)
{
    extern __shared__ __align__(128) unsigned char gemv_mem[];
    __shared__ float sums[2][8][16];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int per = (a.n + 15) / 16, n_tiles = per * a.n_rows, ku = (a.k + kGemvUnit - 1) / kGemvUnit;
    const int tile0 = (int)((int64_t)n_tiles * blockIdx.x / gridDim.x), tile1 = (int)((int64_t)n_tiles * (blockIdx.x + 1) / gridDim.x);
    const int nu = (tile1 - tile0) * ku, ld = a.k + 8;
    bf16 *xs = (bf16 *)(gemv_mem + STAGES * kGemvStage);
    const uint32_t ring = smem_u32(gemv_mem) + warp * 2048;
    pdl_launch();
    pdl_wait();

    int l_tile = tile0, l_unit = 0;
    auto load = [&](int stage) {
        const int r0 = lane >> 3, ch = lane & 7, kk = l_unit * kGemvUnit + warp * 64 + ch * 8, pair = l_tile / per;
        const bf16 *w = pair < a.n_pairs ? a.w + (int64_t)a.ids[pair] * a.n * a.k : a.w_shared;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int r = r0 + j * 4, n = l_tile % per * 16 + r;
            bool ok = n < a.n && kk < a.k;
            cp16(ring + stage * kGemvStage + r * 128 + ((ch ^ (r & 7)) << 4), ok ? w + (int64_t)n * a.k + kk : w, ok);
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
    for (int i = tid; i < a.x_rows * (a.k / 8); i += 256) {
        int r = i / (a.k / 8), c = i % (a.k / 8) * 8;
        *(uint4 *)(xs + r * ld + c) = *(const uint4 *)(a.x + r * a.ld_x + c);
    }
    __syncthreads();

    float acc[4] = {};
    const int g = lane >> 2, tq = lane & 3;
    int tile = tile0, unit = 0;
    for (int i = 0; i < nu; i++) {
        cp_wait<STAGES - 2>();
        __syncwarp();
        if (i + STAGES - 1 < nu)
            load((i + STAGES - 1) % STAGES);
        cp_commit();
        const uint32_t ws = ring + i % STAGES * kGemvStage;
        const int k0 = unit * kGemvUnit + warp * 64 + 2 * tq, pair = tile / per;
        const bf16 *x = xs + (a.per_token == 0 ? pair : pair < a.n_pairs ? pair / a.per_token : pair - a.n_pairs) * ld;
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            uint32_t af[4], b0 = 0, b1 = 0;
            int r = lane & 15, c = kk * 2 + (lane >> 4);
            ldsm4(af, ws + r * 128 + ((c ^ (r & 7)) << 4));
            if (g == 0 && k0 + kk * 16 < a.k) {
                b0 = *(const uint32_t *)(x + k0 + kk * 16);
                b1 = k0 + kk * 16 + 8 < a.k ? *(const uint32_t *)(x + k0 + kk * 16 + 8) : 0;
            }
            mma16816(acc, af, b0, b1);
        }
        if (++unit < ku)
            continue;
        unit = 0;
        float (*out)[16] = sums[tile & 1];
        if (tq == 0) {
            out[warp][g] = acc[0];
            out[warp][g + 8] = acc[2];
        }
        acc[0] = acc[1] = acc[2] = acc[3] = 0.f;
        __syncthreads();
        if (tid < 32) {
            const int row = tid & 15;
            float v = 0.f;
#pragma unroll
            for (int w = 0; w < 8; w++)
                v += out[w][row];
            float up = __shfl_down_sync(0xffffffffu, v, 8);
            if (a.silu) {
                int o = tile % per * 8 + tid;
                if (tid < 8 && o < a.n_out) {
                    float f = silu_limited(v, up, a.limit);
                    if (a.scale != NULL && pair < a.n_pairs)
                        f *= a.scale[pair];
                    ((bf16 *)a.y)[(int64_t)pair * a.n_out + o] = __float2bfloat16_rn(f);
                }
            } else if (tid < 16 && tile % per * 16 + row < a.n) {
                ((float *)a.y)[(int64_t)pair * a.n_out + tile % per * 16 + row] = v;
            }
        }
        tile++;
    }
    cp_wait<0>();
}

int launch_pairs(arle_device *dev, cudaStream_t st, const pair_args &a)
{
    int tiles = (a.n + 15) / 16 * a.n_rows, most = 2 * dev->n_sm;
    dim3 grid((unsigned)(tiles < most ? tiles : most));
    if (gemv_bytes(5, a.x_rows, a.k) <= 112 * 1024)
        return launch(dev, st, pairs_kernel<5>, grid, dim3(256), gemv_bytes(5, a.x_rows, a.k), a);
    return launch(dev, st, pairs_kernel<3>, grid, dim3(256), gemv_bytes(3, a.x_rows, a.k), a);
}

/* Whether the pair form takes this call: few tokens, and a shared expert of the routed experts' shape or none. */
bool pairs_fit(const arle_device *dev, const arle_moe_experts_args *a)
{
    const arle_weight *u = a->gate_up, *d = a->down, *su = a->shared_gate_up, *sd = a->shared_down;
    int rows = (int)(a->n_tokens * (a->k + (sd != NULL)));
    return !dev->deterministic && a->n_tokens <= (uint32_t)kGemvRows && gemv_bytes(3, (int)a->n_tokens, (int)u->k) <= 112 * 1024
        && gemv_bytes(3, rows, (int)d->k) <= 112 * 1024
        && (sd == NULL || (su->n == u->n && su->n_real == u->n_real && su->k == u->k && sd->n == d->n && sd->k == d->k));
}

int run_pairs(arle_device *dev, cudaStream_t st, const arle_moe_experts_args *a, bf16 *f, float *e)
{
    pair_args p = {};
    p.w = a->gate_up->data;
    p.w_shared = a->shared_gate_up != NULL ? a->shared_gate_up->data : NULL;
    p.ids = a->ids;
    p.n_pairs = (int)(a->n_tokens * a->k);
    p.n_rows = p.n_pairs + (a->shared_down != NULL ? (int)a->n_tokens : 0);
    p.per_token = (int)a->k;
    p.n = (int)a->gate_up->n;
    p.k = (int)a->gate_up->k;
    p.x_rows = (int)a->n_tokens;
    p.x = (const bf16 *)a->x;
    p.ld_x = a->ld_x;
    p.y = f;
    p.n_out = (int)a->gate_up->n_real;
    p.silu = 1;
    p.limit = a->limit;
    p.scale = a->weight_first ? a->weights : NULL;
    int r = launch_pairs(dev, st, p);
    if (r < 0)
        return r;
    pair_args d = {};
    d.w = a->down->data;
    d.w_shared = a->shared_down != NULL ? a->shared_down->data : NULL;
    d.ids = a->ids;
    d.n_pairs = p.n_pairs;
    d.n_rows = d.x_rows = p.n_rows;
    d.n = d.n_out = (int)a->down->n;
    d.k = (int)a->down->k;
    d.x = f;
    d.ld_x = p.n_out;
    d.y = e;
    return launch_pairs(dev, st, d);
}

/* Tokens per tile: about twice the mean load of an expert, so that most experts need one tile. */
int tile_tokens_for(int64_t pairs, int64_t experts)
{
    int64_t want = 2 * ceil_div(pairs, experts);
    int tokens = 8;
    while (tokens < want && tokens < 128)
        tokens *= 2;
    return tokens;
}

/* Both products of the routed experts, before anything is known of tiles. */
void routed_products(const arle_moe_experts_args *a, const moe_scratch *s, gemm_args *up, gemm_args *down)
{
    gemm_args g = {};
    g.w = a->gate_up->data;
    g.x = (const bf16 *)a->x;
    g.ld_x = a->ld_x;
    g.y = s->f;
    g.ld_y = a->gate_up->n_real;
    g.n = (int)a->gate_up->n;
    g.n_out = (int)a->gate_up->n_real;
    g.k = (int)a->gate_up->k;
    g.rows = (int)(a->n_tokens * a->k);
    g.limit = a->limit;
    g.groups = (int)a->n_experts;
    g.start = s->start;
    g.tiles = s->tiles_up;
    g.src = s->src;
    if (a->weight_first) {
        g.pair = s->pair;
        g.scale = a->weights;
    }
    *up = g;
    gemm_args d = {};
    d.w = a->down->data;
    d.x = s->f;
    d.ld_x = a->gate_up->n_real;
    d.y = s->e;
    d.ld_y = a->down->n;
    d.n = d.n_out = (int)a->down->n;
    d.k = (int)a->down->k;
    d.rows = g.rows;
    d.groups = g.groups;
    d.start = s->start;
    d.tiles = s->tiles_down;
    d.dst = s->pair;
    *down = d;
}

int run_routed(arle_device *dev, cudaStream_t st, const arle_moe_experts_args *a, const moe_scratch *s, bool f32)
{
    gemm_args up, down;
    routed_products(a, s, &up, &down);
    const bool wide = a->n_tokens > 256 && !f32 && gemm_wide_fits(dev, up, GEMM_SILU) && gemm_wide_fits(dev, down, GEMM_BF16);
    const int tokens = wide ? GEMM_WIDE_TOKENS : dev->deterministic ? 8 : tile_tokens_for(up.rows, a->n_experts);
    sort_args so = {};
    so.ids = a->ids;
    so.n_pairs = up.rows;
    so.n_experts = (int)a->n_experts;
    so.k = (int)a->k;
    so.m_tiles_up = (int)ceil_div(up.n, wide ? GEMM_WIDE_SILU_ROWS : 128);
    so.m_tiles_down = (int)ceil_div(down.n, wide ? GEMM_WIDE_PLAIN_ROWS : 128);
    so.tile_tokens = tokens;
    so.start = s->start;
    so.tiles_up = s->tiles_up;
    so.tiles_down = s->tiles_down;
    so.src = s->src;
    so.pair = s->pair;
    so.shared = dev->tickets;
    const int blocks = up.rows < 4096 || !device_alone(dev) ? 1 : (int)ceil_div(up.rows, 1024), most = dev->n_sm < 64 ? dev->n_sm : 64;
    int r = launch(dev, st, sort_kernel, dim3(blocks < most ? blocks : most), dim3(1024), 0, so);
    if (r < 0)
        return r;
    if (wide) {
        r = gemm_wide(dev, st, up, GEMM_SILU);
        return r < 0 ? r : gemm_wide(dev, st, down, GEMM_BF16);
    }
    up.whole_tiles = down.whole_tiles = dev->deterministic || a->n_tokens > 256;
    r = gemm_stream<true>(dev, st, up, GEMM_SILU, tokens);
    return r < 0 ? r : gemm_stream<true>(dev, st, down, f32 ? GEMM_F32 : GEMM_BF16, tokens);
}

} // namespace

extern "C" int cuda_moe_route(struct arle_device *dev, struct arle_stream *st, const struct arle_moe_route_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || a->n_experts > (uint32_t)kMaxExperts || a->k > (uint32_t)kMaxPick || a->k > a->n_experts
        || a->k == 0 || a->scratch == NULL)
        return -EINVAL;
    arle_linear_args l = {};
    l.dtype = a->dtype;
    l.out_dtype = ARLE_F32;
    l.n_tokens = a->n_tokens;
    l.x = a->x;
    l.ld_x = a->ld_x;
    l.w = a->router;
    l.y = a->scratch;
    l.ld_y = a->n_experts;
    int r = cuda_linear(dev, st, &l);
    if (r < 0)
        return r;
    route_args p = { a->scratch, (int)a->n_tokens, (int)a->n_experts, (int)a->k, (int)a->score, a->route_scale, a->bias, a->table,
                     a->token_ids, a->sampled, a->ids, a->weights };
    const dim3 grid((unsigned)ceil_div(a->n_tokens, 4));
    if (a->n_experts <= 256)
        return launch(dev, cs(st), route_kernel<8>, grid, dim3(128), 0, p);
    return launch(dev, cs(st), route_kernel<kMaxExperts / 32>, grid, dim3(128), 0, p);
}

extern "C" int cuda_moe_experts(struct arle_device *dev, struct arle_stream *st, const struct arle_moe_experts_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_tokens == 0)
        return 0;
    const arle_weight *u = a->gate_up, *d = a->down;
    if (a->dtype != ARLE_BF16 || u == NULL || d == NULL || u->role != ARLE_W_EXPERTS_GATE_UP || d->role != ARLE_W_EXPERTS
        || u->n_experts != a->n_experts || d->n_experts != a->n_experts || a->n_experts > (uint32_t)kMaxExperts || d->k != u->n_real
        || d->n % 8 != 0 || a->ld_x % 8 != 0 || a->ld_y % 8 != 0 || (a->shared_gate_up == NULL) != (a->shared_down == NULL))
        return -EINVAL;
    /* Many tokens: expert outputs are rounded to bf16 before the sum, which halves the largest traffic of the op. */
    const bool f32 = dev->deterministic || a->n_tokens <= 256;
    moe_scratch s = cut((char *)a->scratch, a, f32);
    if (a->scratch == NULL || s.bytes > a->scratch_bytes)
        return -EINVAL;
    bump(dev, COUNT_MOE);
    int r;
    const bool pairs = pairs_fit(dev, a);
    if (pairs) {
        /* Rows of the shared expert follow those of the routed pairs; cut() has room for them where it keeps both apart. */
        size_t rows = (size_t)a->n_tokens * (a->k + 1);
        bf16 *f = (bf16 *)a->scratch;
        float *e = (float *)((char *)a->scratch + ((rows * u->n_real * 2 + 255) & ~(size_t)255));
        if ((size_t)((char *)(e + rows * d->n) - (char *)a->scratch) > a->scratch_bytes)
            return -EINVAL;
        r = run_pairs(dev, cs(st), a, f, e);
        s.e = e;
        s.ys = e + (size_t)a->n_tokens * a->k * d->n;
        if (a->shared_down == NULL)
            s.ys = NULL;
    } else {
        r = run_routed(dev, cs(st), a, &s, f32);
    }
    if (r == 0 && !pairs && a->shared_down != NULL)
        r = run_shared(dev, st, a, &s, f32);
    if (r < 0)
        return r;
    sum_args m = { s.e, s.ys, a->weights, a->shared_gate, (const bf16 *)a->x, a->ld_x, (bf16 *)a->y, a->ld_y, (int)a->k, (int)d->n,
                   (int)a->weight_first, (int)a->accumulate };
    if (f32)
        return launch(dev, cs(st), sum_kernel<true>, dim3(a->n_tokens), dim3(256), 0, m);
    return launch(dev, cs(st), sum_kernel<false>, dim3(a->n_tokens), dim3(256), 0, m);
}
