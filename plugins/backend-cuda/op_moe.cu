/*
 * moe_route, moe_experts and norm_moe. Up to four tokens: moe_decode.cuh. More: the (token, expert) pairs are sorted by expert on the
 * device; gate_up and down are then grouped products of gemm_stream, which reads the weights of each expert in use once per tile of
 * tokens, or of gemm_wide for many tokens; the last kernel sums the experts of a token in routing order.
 */
#include "gemm_wide.cuh"
#include "moe_decode.cuh"
#include <errno.h>

namespace {

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

size_t decode_scratch(const arle_moe_experts_args *a)
{
    return 256 + (size_t)a->n_tokens * (a->k + 1) * a->gate_up->n_real * 2;
}

/* Whether moe_decode.cuh takes this call: few tokens, and a shared expert of the routed experts' shape or none. */
bool decode_fits(const arle_device *dev, const arle_moe_experts_args *a)
{
    const arle_weight *u = a->gate_up, *d = a->down, *su = a->shared_gate_up, *sd = a->shared_down;
    return !dev->deterministic && a->n_tokens <= (uint32_t)kMoeTokens && a->k < (uint32_t)kMaxPick && u->k % 8 == 0 && d->k % kPickWarps == 0 && u->k == d->n
        && decode_scratch(a) <= a->scratch_bytes && a->n_tokens * (size_t)u->k * 2 <= 96 * 1024 && (a->k + 1) * (size_t)d->k * 2 <= 48 * 1024
        && (sd == NULL || (su->n == u->n && su->n_real == u->n_real && su->k == u->k && sd->n == d->n && sd->k == d->k));
}

moe_args decode_args(const arle_moe_experts_args *a)
{
    moe_args m = {};
    m.n_tokens = (int)a->n_tokens;
    m.h = (int)a->gate_up->k;
    m.width = (int)a->gate_up->n_real;
    m.up_rows = (int)a->gate_up->n;
    m.n_pairs = (int)(a->n_tokens * a->k);
    m.per_token = (int)a->k;
    m.has_shared = a->shared_down != NULL;
    m.weight_first = a->weight_first != 0;
    m.accumulate = a->accumulate != 0;
    m.limit = a->limit;
    m.x = (const bf16 *)a->x;
    m.ld_x = a->ld_x;
    m.up = a->gate_up->data;
    m.down = a->down->data;
    if (m.has_shared) {
        m.shared_up = a->shared_gate_up->data;
        m.shared_down = a->shared_down->data;
        m.shared_gate = a->shared_gate;
    }
    m.gates = (float *)a->scratch;
    m.f = (bf16 *)a->scratch + 128;
    m.y = (bf16 *)a->y;
    m.ld_y = a->ld_y;
    m.route.ids = const_cast<int32_t *>(a->ids);
    m.route.weights = const_cast<float *>(a->weights);
    return m;
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

route_args routing(const arle_moe_route_args *a)
{
    return { a->scratch, (int)a->n_tokens, (int)a->n_experts, (int)a->k, (int)a->score, a->route_scale, a->bias, a->table, a->token_ids, a->sampled,
             a->ids, a->weights };
}

bool route_valid(const arle_moe_route_args *a)
{
    return a->dtype == ARLE_BF16 && a->n_experts <= (uint32_t)kMaxExperts && a->k <= (uint32_t)kMaxPick && a->k <= a->n_experts && a->k > 0
        && a->scratch != NULL;
}

bool experts_valid(const arle_moe_experts_args *a)
{
    const arle_weight *u = a->gate_up, *d = a->down;
    return a->dtype == ARLE_BF16 && u != NULL && d != NULL && u->role == ARLE_W_EXPERTS_GATE_UP && d->role == ARLE_W_EXPERTS
        && u->n_experts == a->n_experts && d->n_experts == a->n_experts && a->n_experts <= (uint32_t)kMaxExperts && d->k == u->n_real
        && d->n % 8 == 0 && a->ld_x % 8 == 0 && a->ld_y % 8 == 0 && (a->shared_gate_up == NULL) == (a->shared_down == NULL) && a->scratch != NULL;
}

} // namespace

extern "C" int cuda_moe_route(struct arle_device *dev, struct arle_stream *st, const struct arle_moe_route_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_tokens == 0)
        return 0;
    if (!route_valid(a))
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
    const route_args p = routing(a);
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
    if (!experts_valid(a))
        return -EINVAL;
    bump(dev, COUNT_MOE);
    if (decode_fits(dev, a)) {
        const moe_args m = decode_args(a);
        bump(dev, COUNT_MOE_DECODE);
        int r = launch_up(dev, cs(st), m, false);
        return r < 0 ? r : launch_sum_down(dev, cs(st), m);
    }
    /* Many tokens: expert outputs are rounded to bf16 before the sum, which halves the largest traffic of the op. */
    const bool f32 = dev->deterministic || a->n_tokens <= 256;
    const moe_scratch s = cut((char *)a->scratch, a, f32);
    if (s.bytes > a->scratch_bytes)
        return -EINVAL;
    int r = run_routed(dev, cs(st), a, &s, f32);
    if (r == 0 && a->shared_down != NULL)
        r = run_shared(dev, st, a, &s, f32);
    if (r < 0)
        return r;
    sum_args m = { s.e, s.ys, a->weights, a->shared_gate, (const bf16 *)a->x, a->ld_x, (bf16 *)a->y, a->ld_y, (int)a->k, (int)a->down->n,
                   (int)a->weight_first, (int)a->accumulate };
    if (f32)
        return launch(dev, cs(st), sum_kernel<true>, dim3(a->n_tokens), dim3(256), 0, m);
    return launch(dev, cs(st), sum_kernel<false>, dim3(a->n_tokens), dim3(256), 0, m);
}

extern "C" int cuda_norm_moe(struct arle_device *dev, struct arle_stream *st, const struct arle_norm_moe_args *a)
{
    OP_ENTER(dev, st);
    const arle_moe_route_args *ro = &a->route;
    const arle_moe_experts_args *ex = &a->experts;
    if (ex->n_tokens == 0)
        return 0;
    if (!route_valid(ro) || !experts_valid(ex) || ro->n_tokens != ex->n_tokens || ro->n_experts != ex->n_experts || ro->k != ex->k
        || ro->x != ex->x || ro->ld_x != ex->ld_x || a->ld_h % 8 != 0)
        return -EINVAL;
    if (decode_fits(dev, ex) && ex->n_experts <= 256 && ex->n_experts % 2 == 0) {
        moe_args m = decode_args(ex);
        m.route = routing(ro);
        m.h_rows = (const bf16 *)a->h;
        m.ld_h = a->ld_h;
        m.norm_w = a->norm_w;
        m.eps = a->eps;
        m.w_offset = a->w_offset;
        m.router = ro->router->data;
        m.logits = ro->scratch;
        m.x_out = (bf16 *)ro->x;
        bump(dev, COUNT_MOE);
        bump(dev, COUNT_MOE_FUSED);
        int r = launch_route_up(dev, cs(st), m);
        if (r == 0)
            r = launch_up(dev, cs(st), m, true);
        return r < 0 ? r : launch_sum_down(dev, cs(st), m);
    }
    arle_rmsnorm_args n = {};
    n.dtype = ex->dtype;
    n.n_tokens = ex->n_tokens;
    n.dim = (uint32_t)ex->down->n;
    n.eps = a->eps;
    n.w_offset = a->w_offset;
    n.x = a->h;
    n.ld_x = a->ld_h;
    n.w = a->norm_w;
    n.out = const_cast<void *>(ex->x);
    n.ld_out = ex->ld_x;
    int r = launch_rmsnorm(dev, cs(st), &n);
    if (r == 0)
        r = cuda_moe_route(dev, st, ro);
    return r < 0 ? r : cuda_moe_experts(dev, st, ex);
}
