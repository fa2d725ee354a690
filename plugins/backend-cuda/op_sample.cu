/*
 * sample: logits to token ids without the host. Several blocks per row find maximum and log-sum; rows with edits are edited in a
 * copy; one block per row then decides. The draw takes survivors in order of their ids: u in [0, 1) from Philox, the answer is the
 * first id at which the running sum of probabilities exceeds u times their total. Sums of probabilities are integers (2^40
 * is the most likely id's), so that no order of summation shows in the result.
 */
#include "common.cuh"
#include <errno.h>

namespace {

typedef unsigned long long u64;

const int kSlices = 32, kThreads = 1024, kBuckets = 4096, kList = 16384;
const int kNearPer = 512;               /* ids of one slice that are kept for the draw */
const float kNear = 8.f;                /* nats below the best within which they are kept */
const float kPerNat = 128.f;            /* buckets per nat; the last takes everything below e^-32 of the best */

struct part { float max, sum, edited_max; int id, edited_id, near; u64 mass, near_mass; };

struct sample_dev {
    arle_sample_args a;
    int row0;
    part *parts;                /* [rows][kSlices] */
    float *edited;              /* [rows][vocab] or NULL */
    unsigned *seen;             /* [rows][vocab]: occurrences in the output << 1 | occurs at all */
    u64 *list;                  /* [rows][kList] */
    u64 *near;                  /* [rows][kSlices][kNearPer]: keys near the best one, in order of their ids */
};

__device__ __forceinline__ bool has_penalty(const arle_sample_row &r)
{
    return r.history != NULL && r.n_history > 0
        && ((r.repetition != 1.f && r.repetition > 0.f) || r.presence != 0.f || r.frequency != 0.f);
}

__device__ __forceinline__ bool has_edits(const arle_sample_row &r) { return r.n_bias > 0 || r.mask != NULL || has_penalty(r); }

__device__ __forceinline__ const float *raw_row(const sample_dev &s, int r) { return s.a.logits + (int64_t)(s.row0 + r) * s.a.ld; }

__device__ __forceinline__ const float *row_of(const sample_dev &s, int r)
{
    return s.edited != NULL && has_edits(s.a.rows[s.row0 + r]) ? s.edited + (int64_t)r * s.a.vocab : raw_row(s, r);
}

/* ---- edits ----------------------------------------------------------------------------------------------------------- */

__global__ void copy_kernel(const sample_dev s)
{
    const int r = blockIdx.y;
    pdl_launch();
    pdl_wait();
    if (!has_edits(s.a.rows[s.row0 + r]))
        return;
    const float *x = raw_row(s, r);
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < s.a.n_valid; i += gridDim.x * blockDim.x) {
        s.edited[(int64_t)r * s.a.vocab + i] = x[i];
        s.seen[(int64_t)r * s.a.vocab + i] = 0;
    }
}

__global__ void note_kernel(const sample_dev s)
{
    const int r = blockIdx.x;
    pdl_launch();
    pdl_wait();
    const arle_sample_row &row = s.a.rows[s.row0 + r];
    for (unsigned i = threadIdx.x; i < row.n_bias; i += blockDim.x)
        if (row.bias[i].id >= 0 && (unsigned)row.bias[i].id < s.a.n_valid)
            atomicAdd(&s.edited[(int64_t)r * s.a.vocab + row.bias[i].id], row.bias[i].value);
    if (!has_penalty(row))
        return;
    for (unsigned i = threadIdx.x; i < row.n_history; i += blockDim.x) {
        int id = row.history[i];
        if (id < 0 || (unsigned)id >= s.a.n_valid)
            continue;
        atomicOr(&s.seen[(int64_t)r * s.a.vocab + id], 1u);
        if (i >= row.n_prompt)
            atomicAdd(&s.seen[(int64_t)r * s.a.vocab + id], 2u);
    }
}

__global__ void edit_kernel(const sample_dev s)
{
    const int r = blockIdx.y;
    pdl_launch();
    pdl_wait();
    const arle_sample_row &row = s.a.rows[s.row0 + r];
    if (!has_edits(row))
        return;
    float *x = s.edited + (int64_t)r * s.a.vocab;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < s.a.n_valid; i += gridDim.x * blockDim.x) {
        float v = x[i];
        unsigned seen = s.seen[(int64_t)r * s.a.vocab + i];
        bool allowed = row.mask == NULL || (row.mask[i / 32] >> (i % 32) & 1);
        if (!allowed)
            v = -INFINITY;
        if (seen != 0) {
            if (row.repetition != 1.f && row.repetition > 0.f)
                v = v > 0.f ? v / row.repetition : v * row.repetition;
            if (seen >> 1)
                v -= row.presence + row.frequency * (float)(seen >> 1);
        }
        if (seen != 0 || !allowed)
            x[i] = v;
    }
}

/* ---- maximum and log-sum --------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void best_of(float &v, int &id, float v2, int id2)
{
    if (v2 > v || (v2 == v && id2 < id)) {
        v = v2;
        id = id2;
    }
}

__device__ void block_best(float &v, int &id, float *shv, int *shi)
{
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        float v2 = __shfl_xor_sync(0xffffffffu, v, o);
        int id2 = __shfl_xor_sync(0xffffffffu, id, o);
        best_of(v, id, v2, id2);
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) {
        shv[threadIdx.x >> 5] = v;
        shi[threadIdx.x >> 5] = id;
    }
    __syncthreads();
    v = shv[0];
    id = shi[0];
    for (int i = 1; i < (int)(blockDim.x >> 5); i++)
        best_of(v, id, shv[i], shi[i]);
}

__device__ void slice_best(const float *x, int from, int to, float *v, int *id, float *shv, int *shi)
{
    float best = -INFINITY;
    int at = from;
    for (int i = from + (int)threadIdx.x; i < to; i += 4 * blockDim.x) {
        float y[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            y[j] = i + j * (int)blockDim.x < to ? x[i + j * blockDim.x] : -INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (y[j] > best) {
                best = y[j];
                at = i + j * blockDim.x;
            }
    }
    block_best(best, at, shv, shi);
    *v = best;
    *id = at;
}

__global__ void __launch_bounds__(256) stats_kernel(const sample_dev s)
{
    __shared__ float sh[32], shv[32];
    __shared__ int shi[32];
    const int r = blockIdx.y, n = (int)s.a.n_valid;
    const int from = (int)((int64_t)n * blockIdx.x / kSlices), to = (int)((int64_t)n * (blockIdx.x + 1) / kSlices);
    pdl_launch();
    pdl_wait();
    const float *x = raw_row(s, r), *e = row_of(s, r);
    part p;
    slice_best(x, from, to, &p.max, &p.id, shv, shi);
    float sum = 0.f;
    for (int i = from + threadIdx.x; i < to; i += 256)
        sum += expf(x[i] - p.max);
    p.sum = block_sum(sum, sh);
    p.edited_max = p.max;
    p.edited_id = p.id;
    if (e != x)
        slice_best(e, from, to, &p.edited_max, &p.edited_id, shv, shi);
    if (threadIdx.x == 0)
        s.parts[r * kSlices + blockIdx.x] = p;
}

/* ---- choosing -------------------------------------------------------------------------------------------------------- */

/* Larger logit, then lower id: larger key. */
__device__ __forceinline__ u64 key_of(float x, int id)
{
    unsigned b = __float_as_uint(x);
    b = b & 0x80000000u ? ~b : b | 0x80000000u;
    return (u64)b << 32 | (unsigned)~id;
}

__device__ __forceinline__ u64 mass_of(float x, float top, float inv_t)
{
    return (u64)(exp2f((x - top) * inv_t * 1.4426950408889634f) * 1099511627776.f);
}

__device__ __forceinline__ float logit_of(u64 key)
{
    unsigned b = (unsigned)(key >> 32);
    return __uint_as_float(b & 0x80000000u ? b & 0x7fffffffu : ~b);
}

__device__ __forceinline__ int bucket_of(float x, float top, float inv_t)
{
    float d = (top - x) * inv_t * kPerNat;
    return d < (float)(kBuckets - 1) ? (int)d : kBuckets - 1;
}

/* ---- what is near the best ------------------------------------------------------------------------------------------- */

/* Per slice: mass of all ids at the row's temperature, and the keys within kNear nats of the best, in order of their ids. */
__global__ void __launch_bounds__(256) gather_kernel(const sample_dev s)
{
    __shared__ u64 sh[2][8];
    __shared__ int warps[2][8];
    const int r = blockIdx.y, n = (int)s.a.n_valid, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int from = (int)((int64_t)n * blockIdx.x / kSlices), to = (int)((int64_t)n * (blockIdx.x + 1) / kSlices);
    pdl_launch();
    pdl_wait();
    const arle_sample_row &row = s.a.rows[s.row0 + r];
    if (!(row.temperature > 1e-6f))
        return;
    const float top = warp_max(s.parts[r * kSlices + lane].edited_max), inv_t = 1.f / row.temperature;
    const float *x = row_of(s, r);
    u64 *near = s.near + ((int64_t)r * kSlices + blockIdx.x) * kNearPer, mass = 0, near_mass = 0;
    int count = 0, turn = 0;
    for (int base = from; base < to; base += 1024, turn ^= 1) {
        /* Four neighbours per thread, so that the order of ids is that of threads. */
        float v[4];
        int mine = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int i = base + (int)threadIdx.x * 4 + j;
            v[j] = i < to ? x[i] : -INFINITY;
            u64 w = mass_of(v[j], top, inv_t);
            bool is_near = (top - v[j]) * inv_t < kNear;
            mass += w;
            near_mass += is_near ? w : 0;
            mine += is_near;
        }
        int scan = mine;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            int up = __shfl_up_sync(0xffffffffu, scan, o);
            scan += lane >= o ? up : 0;
        }
        if (lane == 31)
            warps[turn][warp] = scan;
        __syncthreads();
        int at = count + scan - mine;
        for (int w = 0; w < 8; w++) {
            at += w < warp ? warps[turn][w] : 0;
            count += warps[turn][w];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if ((top - v[j]) * inv_t < kNear) {
                if (at < kNearPer)
                    near[at] = key_of(v[j], base + (int)threadIdx.x * 4 + j);
                at++;
            }
        }
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        mass += __shfl_xor_sync(0xffffffffu, mass, o);
        near_mass += __shfl_xor_sync(0xffffffffu, near_mass, o);
    }
    if (lane == 0) {
        sh[0][warp] = mass;
        sh[1][warp] = near_mass;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        part *p = &s.parts[r * kSlices + blockIdx.x];
        u64 m0 = 0, m1 = 0;
        for (int w = 0; w < 8; w++) {
            m0 += sh[0][w];
            m1 += sh[1][w];
        }
        p->mass = m0;
        p->near_mass = m1;
        p->near = count;
    }
}

struct select_mem {
    u64 mass[kBuckets];
    unsigned count[kBuckets];
    u64 have, sum;              /* what lies above the border found so far */
    int bin, n_list;
};

/* First bin (in the order `down` asks) at which count or mass reaches its goal; the last one if none does. Warp 0. */
__device__ void find_bin(select_mem *m, int bins, bool down, u64 most, u64 goal)
{
    if (threadIdx.x >= 32)
        return;
    const int lane = threadIdx.x, per = bins / 32;
    auto at = [&](int i) { return down ? bins - 1 - i : i; };
    u64 c = 0, w = 0;
    for (int i = 0; i < per; i++) {
        c += m->count[at(lane * per + i)];
        w += m->mass[at(lane * per + i)];
    }
    u64 ci = c, wi = w;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        u64 x = __shfl_up_sync(0xffffffffu, ci, o), y = __shfl_up_sync(0xffffffffu, wi, o);
        if (lane >= o) {
            ci += x;
            wi += y;
        }
    }
    bool reached = m->have + ci >= most || m->sum + wi >= goal;
    unsigned votes = __ballot_sync(0xffffffffu, reached);
    int who = votes != 0 ? __ffs(votes) - 1 : 31;
    u64 have = m->have + ci - c, sum = m->sum + wi - w;
    __syncwarp();
    if (lane == who) {
        int last = -1;          /* last bin with anything in it, should no bin reach the goal */
        u64 last_have = have, last_sum = sum;
        int i = 0;
        for (; i < per; i++) {
            int b = at(lane * per + i);
            if (have + m->count[b] >= most || sum + m->mass[b] >= goal)
                break;
            if (m->count[b] > 0) {
                last = b;
                last_have = have;
                last_sum = sum;
            }
            have += m->count[b];
            sum += m->mass[b];
        }
        if (i < per) {
            m->bin = at(lane * per + i);
            m->have = have;
            m->sum = sum;
        } else if (last >= 0) {
            m->bin = last;
            m->have = last_have;
            m->sum = last_sum;
        } else {
            m->bin = at(bins - 1);
            m->have = have;
            m->sum = sum;
        }
    }
    __syncwarp();
}

__device__ void clear_bins(select_mem *m, int bins)
{
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += kThreads) {
        m->count[i] = 0;
        m->mass[i] = 0;
    }
    __syncthreads();
}

/*
 * Key of the last of the best `most` ids, or of the last one needed to reach mass `goal`, whichever comes first, among ids whose
 * key is at least `from`. One histogram over the row, then the bucket of the border is narrowed byte by byte of the key.
 */
template <class Src>
__device__ u64 cut(const Src &src, int n, float top, float inv_t, u64 from, u64 most, u64 goal, u64 *list, select_mem *m)
{
    clear_bins(m, kBuckets);
    if (threadIdx.x == 0) {
        m->have = m->sum = 0;
        m->n_list = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
        u64 k = src(i);
        if (k >= from) {
            float v = logit_of(k);
            int b = bucket_of(v, top, inv_t);
            atomicAdd(&m->count[b], 1u);
            atomicAdd(&m->mass[b], mass_of(v, top, inv_t));
        }
    }
    __syncthreads();
    find_bin(m, kBuckets, false, most, goal);
    __syncthreads();
    const int bucket = m->bin;
    const bool fits = m->count[bucket] <= kList;
    if (fits) {
        for (int i = threadIdx.x; i < n; i += kThreads) {
            u64 k = src(i);
            if (k >= from && bucket_of(logit_of(k), top, inv_t) == bucket)
                list[atomicAdd(&m->n_list, 1)] = k;
        }
    }
    __syncthreads();
    const int n_list = fits ? m->n_list : n;
    u64 prefix = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        clear_bins(m, 256);
        for (int i = threadIdx.x; i < n_list; i += kThreads) {
            u64 k = fits ? list[i] : src(i);
            if (!fits && (k < from || bucket_of(logit_of(k), top, inv_t) != bucket))
                continue;
            if (shift == 56 || (k >> (shift + 8)) == prefix) {
                int d = (int)(k >> shift) & 255;
                atomicAdd(&m->count[d], 1u);
                atomicAdd(&m->mass[d], mass_of(logit_of(k), top, inv_t));
            }
        }
        __syncthreads();
        find_bin(m, 256, true, most, goal);
        __syncthreads();
        prefix = prefix << 8 | (unsigned)m->bin;
    }
    __syncthreads();
    return prefix;
}

__device__ u64 block_sum64(u64 v, u64 *sh)
{
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, o);
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        sh[threadIdx.x >> 5] = v;
    __syncthreads();
    u64 r = 0;
    for (int i = 0; i < kThreads / 32; i++)
        r += sh[i];
    return r;
}

/* Philox4x32-10 (Salmon et al. 2011): counter {c, 0}, key seed; the first word gives 24 bits. */
__device__ unsigned uniform24(u64 seed, u64 counter)
{
    unsigned c0 = (unsigned)counter, c1 = (unsigned)(counter >> 32), c2 = 0, c3 = 0, k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        unsigned h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0, h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0 >> 8;
}

/* What is walked over: keys by index, in order of their ids; 0 where there is none. */
struct from_row {
    const float *x;
    int first;
    __device__ u64 operator()(int i) const { return key_of(x[first + i], first + i); }
};

struct from_near {
    const u64 *keys;
    const part *parts;
    __device__ u64 operator()(int i) const { return i % kNearPer < parts[i / kNearPer].near ? keys[i] : 0; }
};

/* Warps own contiguous pieces: their masses say which warp holds the answer, which then walks its piece. goal: ~0 takes u24 of
 * the total. */
template <class Src>
__device__ int walk(const Src &src, int n, float top, float inv_t, u64 from, unsigned u24, u64 goal, u64 *sh, int *sh_id)
{
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, per = ((n + 31) / 32 + 31) & ~31;
    const int i0 = warp * per, i1 = min(i0 + per, n);
    u64 mass = 0;
    for (int i = i0 + lane; i < i1; i += 32) {
        u64 k = src(i);
        if (k >= from)
            mass += mass_of(logit_of(k), top, inv_t);
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        mass += __shfl_xor_sync(0xffffffffu, mass, o);
    __syncthreads();
    if (lane == 0)
        sh[warp] = mass;
    if (threadIdx.x == 0)
        *sh_id = -1;
    __syncthreads();
    u64 total = 0, before = 0;
    for (int w = 0; w < 32; w++) {
        before += w < warp ? sh[w] : 0;
        total += sh[w];
    }
    if (goal == ~0ull)
        goal = __umul64hi((u64)u24 << 40, total);
    if (goal >= before && goal < before + mass) {
        u64 sum = before;
        for (int i = i0 + lane; i - lane < i1; i += 32) {
            u64 k = i < i1 ? src(i) : 0;
            u64 v = i < i1 && k >= from ? mass_of(logit_of(k), top, inv_t) : 0, scan = v;
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                u64 up = __shfl_up_sync(0xffffffffu, scan, o);
                scan += lane >= o ? up : 0;
            }
            unsigned votes = __ballot_sync(0xffffffffu, sum + scan > goal);
            if (votes != 0) {
                if (lane == __ffs(votes) - 1)
                    *sh_id = (int)~(unsigned)k;
                break;
            }
            sum += __shfl_sync(0xffffffffu, scan, 31);
        }
    }
    __syncthreads();
    return *sh_id;
}

template <class Src>
__device__ u64 mass_from(const Src &src, int n, float top, float inv_t, u64 from, u64 *sh)
{
    u64 mass = 0;
    for (int i = threadIdx.x; i < n; i += kThreads) {
        u64 k = src(i);
        if (k >= from)
            mass += mass_of(logit_of(k), top, inv_t);
    }
    return block_sum64(mass, sh);
}

/* all: mass of every id, or 0 when src holds them all. */
template <class Src>
__device__ int draw(const arle_sample_row &row, const Src &src, int n, int n_ids, u64 all, float top, u64 *list, select_mem *m, u64 *sh,
                    int *sh_id)
{
    const float inv_t = 1.f / row.temperature;
    const bool by_k = row.top_k > 0 && row.top_k < n_ids, by_p = row.top_p < 1.f && row.top_p > 0.f;
    u64 from = key_of(-3.402823466e38f, 0x7fffffff);
    if (by_k)
        from = cut(src, n, top, inv_t, from, (u64)row.top_k, ~0ull, list, m);
    if (by_p) {
        u64 mass = !by_k && all != 0 ? all : mass_from(src, n, top, inv_t, from, sh);
        from = cut(src, n, top, inv_t, from, ~0ull, (u64)((double)row.top_p * (double)mass), list, m);
    }
    if (row.min_p > 0.f) {
        u64 least = key_of(top + row.temperature * logf(row.min_p), 0) & ~0xffffffffull;
        from = least > from ? least : from;
    }
    return walk(src, n, top, inv_t, from, uniform24(row.seed, row.counter), ~0ull, sh, sh_id);
}

/* The same draw from what gather_kernel found, where that provably holds every id that can be drawn. -2: it does not. */
__device__ int draw_near(const sample_dev &s, int r, const arle_sample_row &row, const float *x, float top, u64 *list, select_mem *m,
                         u64 *sh, int *sh_id)
{
    const part *p = s.parts + r * kSlices;
    const int n = (int)s.a.n_valid;
    u64 all = 0, near_mass = 0;
    int near = 0, most = 0;
    for (int i = 0; i < kSlices; i++) {
        all += p[i].mass;
        near_mass += p[i].near_mass;
        near += p[i].near;
        most = max(most, p[i].near);
    }
    const bool by_k = row.top_k > 0 && row.top_k < n, by_p = row.top_p < 1.f && row.top_p > 0.f;
    if (!by_k && !by_p && !(row.min_p > 0.f)) {
        u64 goal = __umul64hi((u64)uniform24(row.seed, row.counter) << 40, all);
        int i = 0;
        for (; i < kSlices - 1 && goal >= p[i].mass; i++)
            goal -= p[i].mass;
        const int from = (int)((int64_t)n * i / kSlices), to = (int)((int64_t)n * (i + 1) / kSlices);
        return walk(from_row{ x, from }, to - from, top, 1.f / row.temperature, key_of(-3.402823466e38f, 0x7fffffff), 0, goal, sh, sh_id);
    }
    if (most > kNearPer || (by_k && near < row.top_k) || (by_p && !by_k && (double)near_mass < (double)row.top_p * (double)all)
        || (!by_k && !by_p && row.min_p < 1e-3f))
        return -2;
    return draw(row, from_near{ s.near + (int64_t)r * kSlices * kNearPer, p }, kSlices * kNearPer, n, all, top, list, m, sh, sh_id);
}

__device__ void report_top(const sample_dev &s, int r, const float *x, int n, int n_top, float top, float lse, u64 *list, select_mem *m)
{
    u64 from = cut(from_row{ x, 0 }, n, top, 1.f, 0, (u64)n_top, ~0ull, list, m);
    if (threadIdx.x == 0)
        m->n_list = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads)
        if (key_of(x[i], i) >= from) {
            int at = atomicAdd(&m->n_list, 1);
            if (at < ARLE_MAX_TOP)
                m->mass[at] = key_of(x[i], i);
        }
    __syncthreads();
    const int k = min(m->n_list, n_top);
    if ((int)threadIdx.x < k) {
        int rank = 0;
        for (int i = 0; i < k; i++)
            rank += m->mass[i] > m->mass[threadIdx.x];
        int64_t at = (int64_t)(s.row0 + r) * ARLE_MAX_TOP + rank;
        s.a.top_ids[at] = (int)~(unsigned)m->mass[threadIdx.x];
        s.a.top_logprobs[at] = logit_of(m->mass[threadIdx.x]) - lse;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads) choose_kernel(const sample_dev s)
{
    extern __shared__ __align__(16) unsigned char sample_smem[];
    __shared__ u64 sh[32];
    __shared__ int sh_id;
    const int r = blockIdx.x, n = (int)s.a.n_valid;
    pdl_launch();
    pdl_wait();
    const arle_sample_row &row = s.a.rows[s.row0 + r];
    const part *p = s.parts + r * kSlices;
    float max = -INFINITY, top = -INFINITY, sum = 0.f;
    int id = 0, unused = 0x7fffffff;
    for (int i = 0; i < kSlices; i++) {
        best_of(max, unused, p[i].max, p[i].id);
        if (p[i].edited_max > top) {
            top = p[i].edited_max;
            id = p[i].edited_id;
        }
    }
    for (int i = 0; i < kSlices; i++)
        sum += p[i].sum * expf(p[i].max - max);
    const float lse = max + logf(sum);
    const float *x = raw_row(s, r);
    select_mem *m = (select_mem *)sample_smem;
    u64 *list = s.list + (int64_t)r * kList;
    if (s.a.any_draw && row.temperature > 1e-6f && row.top_k != 1 && isfinite(top)) {
        int drawn = draw_near(s, r, row, row_of(s, r), top, list, m, sh, &sh_id);
        if (drawn == -2)
            drawn = draw(row, from_row{ row_of(s, r), 0 }, n, n, 0, top, list, m, sh, &sh_id);
        id = drawn >= 0 ? drawn : id;
    }
    if (s.a.any_top && row.n_top > 0)
        report_top(s, r, x, n, min((int)row.n_top, ARLE_MAX_TOP), max, lse, list, m);
    if (threadIdx.x == 0) {
        int64_t at = s.row0 + r;
        s.a.ids[at] = s.a.pos != NULL && s.a.pos[at] <= 0 ? -1 : id;
        s.a.logprob[at] = x[id] - lse;
        s.a.top_logits[at] = max;
        s.a.target_logprob[at] = row.target >= 0 && row.target < n ? x[row.target] - lse : __int_as_float(0x7fc00000);
    }
}

} // namespace

extern "C" int cuda_sample(struct arle_device *dev, struct arle_stream *st, const struct arle_sample_args *a)
{
    OP_ENTER(dev, st);
    if (a->n_rows == 0)
        return 0;
    if (a->n_valid == 0 || a->n_valid > a->vocab)
        return -EINVAL;
    const size_t per_row = kSlices * sizeof(part) + (kList + kSlices * kNearPer) * sizeof(u64) + (a->any_edit ? (size_t)a->vocab * 8 : 0);
    size_t fit = dev->sample_work_bytes / per_row;
    if (fit == 0)
        return -EINVAL;
    const unsigned at_once = fit < a->n_rows ? (unsigned)fit : a->n_rows;
    sample_dev s = {};
    s.a = *a;
    char *work = (char *)dev->sample_work;
    s.list = (u64 *)work;
    work += (size_t)at_once * kList * sizeof(u64);
    s.near = (u64 *)work;
    work += (size_t)at_once * kSlices * kNearPer * sizeof(u64);
    if (a->any_edit) {
        s.edited = (float *)work;
        s.seen = (unsigned *)(s.edited + (size_t)at_once * a->vocab);
        work += (size_t)at_once * a->vocab * 8;
    }
    s.parts = (part *)work;
    bump(dev, COUNT_SAMPLE);
    for (unsigned row = 0; row < a->n_rows; row += at_once) {
        unsigned rows = a->n_rows - row < at_once ? a->n_rows - row : at_once;
        s.row0 = (int)row;
        int r = 0;
        if (a->any_edit) {
            r = launch(dev, cs(st), copy_kernel, dim3(64, rows), dim3(256), 0, s);
            if (r == 0)
                r = launch(dev, cs(st), note_kernel, dim3(rows), dim3(256), 0, s);
            if (r == 0)
                r = launch(dev, cs(st), edit_kernel, dim3(64, rows), dim3(256), 0, s);
        }
        if (r == 0)
            r = launch(dev, cs(st), stats_kernel, dim3(kSlices, rows), dim3(256), 0, s);
        if (r == 0 && a->any_draw)
            r = launch(dev, cs(st), gather_kernel, dim3(kSlices, rows), dim3(256), 0, s);
        if (r == 0)
            r = launch(dev, cs(st), choose_kernel, dim3(rows), dim3(kThreads), sizeof(select_mem), s);
        if (r < 0)
            return r;
    }
    return 0;
}
