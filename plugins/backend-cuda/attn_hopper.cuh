/* Paged attention of many tokens on compute capability 9.0, bf16 cache: tensor copies, pairs of blocks, warpgroups in turns. */
#ifndef BACKEND_CUDA_ATTN_HOPPER_CUH
#define BACKEND_CUDA_ATTN_HOPPER_CUH

#include "attn_prefill.cuh"

namespace {

/* ---- prefill with a warp that only copies ---------------------------------------------------------------------------- */

/*
 * The form for bf16 caches on compute capability 9.0. Clusters of two blocks, one a multiprocessor, take pairs of query tiles from a
 * shared counter; the tiles of a pair follow one another, so both blocks walk the same keys, and each copies half of them to both:
 * without that, reading the L2 is the limit. In a block warpgroup 0 asks for what the other two multiply, tensor copies into a ring;
 * those two, 64 rows each, take turns.
 */
const int kHopTok = 80, kHopHalf = kHopTok * kRow, kHopStages = 4, kHopThreads = 384;
const int kHopSmem = kPreRows * kRow + kHopStages * kHopHalf + 1024;

struct hop_args {
    CUtensorMap q, kv;              /* [token][head][256]; [page][key and value heads][panel][position][64] */
    attn_args a;
    int n_seqs;
    unsigned *ticket;               /* zero between kernels */
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* A pair of tiles of queries: n_tok tokens from t0 on, the first at pos0; keys lo .. end - 1 in n tiles from base on. */
struct hop_pair { int seq, kvh, t0, n_tok, pos0, lo, end, base, n; };

struct hop_shared {
    uint64_t full[kHopStages], empty[kHopStages], q_full, q_empty, pair_full[2], pair_empty[2];     /* pair_empty: of rank 0 */
    hop_pair pair[2];               /* seq < 0: no more */
    float held[256];                /* of wait_values */
};

/* Finds the pair of a ticket: sequence by sequence, head by head, the longest first. All of a warp calls it, with rising tickets.
 * 32 sequences are held at a time, one a lane: n pairs, `sum` with those before it in the group. */
struct hop_finder {
    int group, before, n, sum;

    __device__ __forceinline__ void load(const hop_args &p)
    {
        const int lane = threadIdx.x & 31, i = group + lane, tokens = kPreRows / p.a.group * 2;
        n = 0;
        if (i < p.n_seqs)
            n = (p.a.cu[p.a.seq0 + i + 1] - p.a.cu[p.a.seq0 + i] + tokens - 1) / tokens * p.a.n_kv;
        sum = n;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            int v = __shfl_up_sync(0xffffffffu, sum, d);
            sum += lane >= d ? v : 0;
        }
    }

    /* Gives seq -1 past the last; `before` is then the number of all pairs. */
    __device__ __forceinline__ hop_pair find(const hop_args &p, int ticket)
    {
        const attn_args &a = p.a;
        hop_pair t = { -1 };
        int of_group;
        while (ticket >= before + (of_group = __shfl_sync(0xffffffffu, sum, 31))) {
            before += of_group;
            group += 32;
            if (group >= p.n_seqs)
                return t;
            load(p);
        }
        const int tokens = kPreRows / a.group * 2, who = __ffs(__ballot_sync(0xffffffffu, before + sum > ticket)) - 1;
        const int pairs = __shfl_sync(0xffffffffu, n, who) / a.n_kv;
        const int i = ticket - before - __shfl_sync(0xffffffffu, sum - n, who);
        t.seq = a.seq0 + group + who;
        t.kvh = i / pairs;
        t.t0 = a.cu[t.seq] + (pairs - 1 - i % pairs) * tokens;
        t.n_tok = min(tokens, a.cu[t.seq + 1] - t.t0);
        t.pos0 = a.pos[t.t0] + a.pos_shift;             /* positions of a sequence's tokens are consecutive */
        t.end = t.pos0 + t.n_tok;
        t.lo = a.window > 0 && t.pos0 - a.window + 1 > a.first ? t.pos0 - a.window + 1 : a.first;
        t.base = t.lo & -8;
        t.n = t.end > t.lo ? (t.end - t.base + kHopTok - 1) / kHopTok : 0;
        return t;
    }
};

/* One warp of each block. Ring order is the order of use: K 0, K 1, V 0, K 2, V 1, ... */
__device__ __forceinline__ void hop_produce(const hop_args &p, hop_shared &sh, uint32_t smem)
{
    const attn_args &a = p.a;
    const int lane = threadIdx.x & 31, rank = cluster_rank(), rows = kPreRows / a.group * a.group;
    const bool copies = lane < kHopTok / 16;            /* lanes of a block's share: every second group of eight keys */
    const uint32_t ring = smem + kPreRows * kRow;
    struct place { int page, at; };                     /* of this lane's group in one tile of keys */
    hop_finder finder = {};
    if (rank == 0)
        finder.load(p);
    pdl_wait();
    int c = 0, nq = 0, ticket = blockIdx.x >> 1;
    unsigned got = 0;
    for (int it = 0;; it++) {
        const uint32_t full = smem_u32(&sh.pair_full[it & 1]), empty = smem_u32(&sh.pair_empty[it & 1]);
        hop_pair t;
        if (rank == 0) {
            t = finder.find(p, ticket);
            mbar_wait(empty, ((it >> 1) & 1) ^ 1);
            if (lane < 2) {
                const uint32_t to = of_rank(smem_u32(&sh.pair[it & 1]), lane);
                const int word[9] = { t.seq, t.kvh, t.t0, t.n_tok, t.pos0, t.lo, t.end, t.base, t.n };
#pragma unroll
                for (int k = 0; k < 9; k++)
                    cluster_store(to + k * 4, word[k]);
                mbar_arrive_written(of_rank(full, lane));
            }
        } else {
            mbar_wait_written(full, (it >> 1) & 1);
            t = sh.pair[it & 1];
            __syncwarp();
            if (lane == 0)
                mbar_arrive_at(of_rank(empty, 0));
        }
        if (t.seq < 0) {
            if (rank == 0 && lane == 0 && it > 0 && got == (unsigned)finder.before - 1)
                *p.ticket = 0;      /* each pair drew one number: this was the last */
            break;
        }
        if (rank == 0 && lane == 0)
            got = atomicAdd(p.ticket, 1u);
        const int32_t *table = a.table + (int64_t)t.seq * a.table_stride;
        auto look = [&](int i) {
            place w = {};
            if (copies) {
                /* Past the end the last group comes again: its keys are masked, its values cleared. */
                int pos = min(t.base + i * kHopTok + (lane * 2 + rank) * 8, (t.end - 1) & -8);
                int page = a.page_shift >= 0 ? pos >> a.page_shift : pos / a.page_tokens;
                w.at = pos - page * a.page_tokens;
                w.page = table[page];
            }
            return w;
        };
        auto copy = [&](const place &w, int half) {
            const int slot = c % kHopStages;
            const uint32_t bar = smem_u32(&sh.full[slot]);
            mbar_wait(smem_u32(&sh.empty[slot]), ((c / kHopStages) & 1) ^ 1);
            if (lane == 0)
                mbar_expect(bar, kHopHalf);
            __syncwarp();
            if (copies)
                tensor_copy_to(ring + slot * kHopHalf + (lane * 2 + rank) * kGroup, &p.kv, bar, 3, 0, w.at, 0, t.kvh + half * a.n_kv,
                               w.page);
            c++;
        };
        if (t.n > 0) {
            place next = look(0), now = {};
            mbar_wait(smem_u32(&sh.q_empty), (nq++ & 1) ^ 1);
            if (lane == 0)
                mbar_expect(smem_u32(&sh.q_full), rows * kRow);
            __syncwarp();
            if (lane < 4)
                tensor_copy(smem + lane * (kPreRows * 128), &p.q, smem_u32(&sh.q_full), lane * 64, t.kvh * a.group,
                            t.t0 + rank * (kPreRows / a.group));
            for (int i = 0; i <= t.n; i++) {
                const place old = now;
                now = next;
                if (i + 1 < t.n)
                    next = look(i + 1);
                if (i < t.n)
                    copy(now, 0);
                if (i > 0)
                    copy(old, 1);
            }
        }
        ticket = (int)(gridDim.x >> 1) + (int)__shfl_sync(0xffffffffu, got, 0);
    }
}

/* Values of positions outside lo .. end - 1 become zeros: their weights are zero, but 0 * garbage may be NaN. Both warpgroups write
 * them, each before its own product. */
__device__ __forceinline__ void hop_clear(unsigned char *v, int p0, int lo, int end, int wg)
{
    for (int i = threadIdx.x & 127; i < kHopTok * 32; i += 128) {
        const int pos = p0 + (i >> 5);
        if (pos < lo || pos >= end)
            *(uint4 *)(v + grouped_at(i >> 5, i & 31)) = make_uint4(0, 0, 0, 0);
    }
    wgmma_publish();
    bar_sync(1 + wg, 128);
}

/* What warps that multiply do with the c-th use of a slot: wait until it is filled, give it back to both blocks. */
__device__ __forceinline__ void hop_wait(hop_shared &sh, int c) { mbar_wait(smem_u32(&sh.full[c % kHopStages]), (c / kHopStages) & 1); }

__device__ __forceinline__ void hop_release(hop_shared &sh, int c)
{
    const int lane = threadIdx.x & 31;
    __syncwarp();
    if (lane < 2)
        mbar_arrive_at(of_rank(smem_u32(&sh.empty[c % kHopStages]), lane));
}

__device__ __forceinline__ void hop_release_q(hop_shared &sh)
{
    __syncwarp();
    if ((threadIdx.x & 31) == 0)
        mbar_arrive(smem_u32(&sh.q_empty));
}

/* Warpgroup wg of two, one tile: rows 64 wg .. 64 wg + 63, the tile's first token `ahead` of the pair's. Scores of keys i run together
 * with the values of keys i - 1, which go on while the weights of keys i are made. The warpgroups start these products in turns, so that
 * one makes weights while the other's scores run. */
__device__ __forceinline__ void hop_multiply(const attn_args &a, hop_shared &sh, const hop_pair &t, unsigned char *smem, int wg,
                                             int ahead, int c)
{
    const int lane = threadIdx.x & 31, r0 = wg * 64 + ((threadIdx.x >> 5) & 3) * 16 + (lane >> 2);
    const uint32_t q_s = smem_u32(smem) + wg * 64 * 128;
    const bool turns = (t.n_tok - ahead) * a.group > 64;       /* the other warpgroup is at work too */
    unsigned char *ring = smem + kPreRows * kRow;
    auto slot = [&](int c) { return ring + c % kHopStages * kHopHalf; };
    float o[128], sc[kHopTok / 2], m[2] = { -INFINITY, -INFINITY }, l[2] = { 0.f, 0.f }, f[2];
    uint32_t pf[kHopTok / 4];
#pragma unroll
    for (int d = 0; d < 128; d++)
        o[d] = 0.f;
    int p0 = t.base;
    if (t.n > 0) {
        const int pos0 = t.pos0 + ahead, row_pos[2] = { pos0 + r0 / a.group, pos0 + (r0 + 8) / a.group };
        /* Rows of the warp in order of position: its first and last decide whether any pair is masked. */
        const int first = __shfl_sync(0xffffffffu, row_pos[0], 0), last = __shfl_sync(0xffffffffu, row_pos[1], 31);
        const int from = max(a.first, a.window > 0 ? last - a.window + 1 : 0);
        auto is_edge = [&](int p0) { return p0 + kHopTok - 1 > first || p0 < from; };
        hop_wait(sh, c);
        wgmma_fence();
        scores(sc, q_s, smem_u32(slot(c)));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(sc);
        hop_release(sh, c++);
        soften(a, sc, p0, is_edge(p0), row_pos, m, l, f);
        pack_weights(pf, sc);
        while ((p0 += kHopTok) < t.end) {
            if (p0 - kHopTok < t.lo) {
                hop_wait(sh, c + 1);
                hop_clear(slot(c + 1), p0 - kHopTok, t.lo, t.end, wg);
            }
            hop_wait(sh, c);
            if (turns)
                bar_sync(3 + wg, 256);
            wgmma_fence();
            scores(sc, q_s, smem_u32(slot(c)));
            wgmma_commit();
            hop_wait(sh, c + 1);
            wgmma_fence();
            weigh(o, pf, smem_u32(slot(c + 1)));
            wgmma_commit();
            if (turns)
                bar_arrive(4 - wg, 256);
            wgmma_wait<1>();
            wgmma_hold(sc);
            hop_release(sh, c);
            const bool grew = soften(a, sc, p0, is_edge(p0), row_pos, m, l, f);
            wait_values(o, l, sh.held);
            hop_release(sh, c + 1);
            if (grew)
                shrink(o, f);
            pack_weights(pf, sc);
            c += 2;
        }
        p0 -= kHopTok;
        hop_release_q(sh);
    }
    const row_place to(a, r0, t.t0 + ahead, min(t.n_tok - ahead, kPreRows / a.group), t.kvh);
    uint2 g[2][16];
    load_gates(a, to, 0, g[0]);
    if (t.n > 0) {
        hop_wait(sh, c);
        if (p0 + kHopTok > t.end || p0 < t.lo)
            hop_clear(slot(c), p0, t.lo, t.end, wg);
        wgmma_fence();
        weigh(o, pf, smem_u32(slot(c)));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(o);
        hop_release(sh, c);
    }
    load_gates(a, to, 1, g[1]);
#pragma unroll
    for (int h = 0; h < 2; h++)
        store_row(a, to, h, o, l[h], g[h]);
}

/* Warpgroup wg of two: its half of every tile. */
__device__ __forceinline__ void hop_consume(const hop_args &p, hop_shared &sh, unsigned char *smem, int wg)
{
    const attn_args &a = p.a;
    const int lane = threadIdx.x & 31, ahead = (int)cluster_rank() * (kPreRows / a.group);
    int c = 0, nq = 0;
    if (wg == 1)
        bar_arrive(3, 256);     /* the first turn is warpgroup 0's */
    for (int it = 0;; it++) {
        mbar_wait_written(smem_u32(&sh.pair_full[it & 1]), (it >> 1) & 1);
        const hop_pair &t = sh.pair[it & 1];
        if (t.seq < 0)
            break;
        if (t.n > 0)
            mbar_wait(smem_u32(&sh.q_full), nq++ & 1);
        if (wg * 64 < (t.n_tok - ahead) * a.group)
            hop_multiply(a, sh, t, smem, wg, ahead, __shfl_sync(0xffffffffu, c, 0));
        else if (t.n > 0) {
            hop_release_q(sh);
            for (int i = 0; i < 2 * t.n; i++) {         /* none of the rows is there, as in short pieces: all passes by */
                hop_wait(sh, c + i);
                hop_release(sh, c + i);
            }
        }
        c += 2 * t.n;
        __syncwarp();
        if (lane == 0)
            mbar_arrive_at(of_rank(smem_u32(&sh.pair_empty[it & 1]), 0));
    }
}

__global__ void __cluster_dims__(2) __launch_bounds__(kHopThreads, 1) prefill_hopper_kernel(const __grid_constant__ hop_args p)
{
    extern __shared__ __align__(128) unsigned char attn_smem[];
    __shared__ hop_shared sh;
    unsigned char *smem = attn_smem + (-smem_u32(attn_smem) & 1023);
    pdl_launch();
    if (threadIdx.x == 0) {
        tensor_prefetch_map(&p.q);
        tensor_prefetch_map(&p.kv);
        for (int i = 0; i < kHopStages; i++) {
            mbar_init(smem_u32(&sh.full[i]), 1);
            mbar_init(smem_u32(&sh.empty[i]), 16);      /* warps that multiply, of both blocks */
        }
        mbar_init(smem_u32(&sh.q_full), 1);
        mbar_init(smem_u32(&sh.q_empty), 8);
        for (int i = 0; i < 2; i++) {
            mbar_init(smem_u32(&sh.pair_full[i]), 1);
            mbar_init(smem_u32(&sh.pair_empty[i]), 17);     /* the same, and the copying warp of rank 1 */
        }
        mbar_publish();
    }
    cluster_sync();
    if (threadIdx.x < 128) {
        registers_down<40>();
        if (threadIdx.x < 32)
            hop_produce(p, sh, smem_u32(smem));
    } else {
        registers_up<232>();
        pdl_wait();
        hop_consume(p, sh, smem, __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0) - 1);
    }
    __syncwarp();
    cluster_sync();         /* the other block still arrives at this one's barriers */
}
#else
/* The launch bound tells the host that this code has no such form. */
__global__ void __launch_bounds__(32) prefill_hopper_kernel(const __grid_constant__ hop_args) {}
#endif

} // namespace

#endif
