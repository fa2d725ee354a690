/* The gated delta net in chunks of 64 tokens on compute capability 9.0: walk for few sequences, in pairs of blocks. */
#ifndef BACKEND_CUDA_GDN_PAIR_CUH
#define BACKEND_CUDA_GDN_PAIR_CUH

#include "gdn_walk.cuh"

namespace {

/* Shared memory: kPairStage each (helper: K, A, decays); then W and U, outputs, state, Vn. */
const int kHelpStage = kTile + kHalf + 1024;
const int kPairTiles = (kStages * (kHelpStage + 2 * kRawTile) + 1023) / 1024 * 1024, kWu = kTile + kColTile;
const int kPairSmem = 1024 + kPairTiles + 2 * kWu + 4 * kColTile + kTile;
static_assert(kStages * kPairStage <= kPairTiles, "v before the convolution lies behind the helper's tiles");
static_assert(kSums == 2 * 2 * kStages * kChunk * 8, "a warpgroup's sums have two places in turn");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/*
 * A second block, the helper, does what need not be in the block of the serial part, and tiles go from block to block within a cluster.
 * (Clusters of four, with both halves of the columns, did not all fit an H100 at once.) With W = A diag(e^gamma) K and U = A V, which do
 * not depend on S, the serial part has two products that wait for each other instead of three:
 *   Vn = U - W S, O = e^gamma Q S + P Vn, S' = e^Gamma S + K^T (e^(Gamma - gamma) Vn)
 * Warpgroups of the helper: products (-W and U), three for the convolution of v in turn, one for the gated norm of every third chunk. Of
 * the other block: state (Vn, S'), outputs (O), one that passes tiles on, two for the other norms.
 */

/* d (+)= A B^T: A 64 x 16 in shared memory with its 64 contiguous, B 64 x 16 there with the inner dimension contiguous. */
__device__ __forceinline__ void wgmma_cols(float (&d)[32], uint64_t a, uint64_t b, int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 1, 0;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "l"(a), "l"(b), "r"(accumulate));
}

/* mbar_sleep for two barriers, whose answers are on their way together. */
__device__ __forceinline__ void mbar_sleep2(uint32_t b0, int p0, uint32_t b1, int p1)
{
    asm volatile("{\n.reg .pred p, q;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %4;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 q, [%2], %3, %4;\n"
                 "and.pred p, p, q;\n@p bra done;\nbra again;\ndone:\n}\n"
                 ::"r"(b0), "r"(p0), "r"(b1), "r"(p1), "r"(10000000) : "memory");
}

/* Copies a tile to the same place in the other block, where it counts towards `bar`. */
__device__ __forceinline__ void tile_send(uint32_t tile, int bytes, uint32_t bar, int rank)
{
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(of_rank(tile, rank)), "r"(tile), "r"(bytes), "r"(of_rank(bar, rank)) : "memory");
}

/* The serial part, which sets the pace: S^T [64 values][128 keys] is the accumulator, operands come from registers (see walk_state).
 * What no product waits for stands behind the first product of a row. */
__device__ __forceinline__ void pair_state(const gdn_args &a, const walk &k)
{
    const int tid = threadIdx.x & 127, w = tid >> 5, lane = tid & 31, g = lane >> 2, tq = lane & 3;
    const int row = w * 16 + ((lane >> 3) & 1) * 8 + (lane & 7), right = lane >> 4;
    const float *S = s_state(a, k.s, k.h) + k.cb * kWalkCols + w * 16 + g;
    float st[64], x[32], ed[16], last;
    uint32_t sb[32], r[16], vn[16];
#pragma unroll
    for (int i = 0; i < 64; i++)
        st[i] = S[((i >> 2) * 8 + 2 * tq + (i & 1)) * kDim + ((i >> 1) & 1) * 8];
    auto store = [&](float *to) {
        to += k.cb * kWalkCols + w * 16 + g;
#pragma unroll
        for (int i = 0; i < 64; i++)
            to[((i >> 2) * 8 + 2 * tq + (i & 1)) * kDim + ((i >> 1) & 1) * 8] = st[i];
    };
    /* What chunk c needs beside S: U, where the product with -W is added, and decays. */
    auto take = [&](int c, int at) {
        const uint32_t u_s = k.wu + (c & 1) * kWu + kTile + tid * 16, e_s = k.stage + at * kPairStage + kKQ + kHalf;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t u[4];
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(u[0]), "=r"(u[1]), "=r"(u[2]), "=r"(u[3]) : "r"(u_s + j * 2048));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 f = unpack2(u[i]);
                x[8 * j + 2 * i] = f.x;
                x[8 * j + 2 * i + 1] = f.y;
            }
        }
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(last) : "r"(e_s + (kChunk - 1) * 4));
#pragma unroll
        for (int j = 0; j < 8; j++)
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(ed[2 * j]), "=f"(ed[2 * j + 1])
                         : "r"(e_s + kChunk * 4 + j * 32 + 8 * tq));
    };
    gdn_due due = next_save(a, k.s, 0);
    mbar_sleep2(smem_u32(&k.bars->full[0]), 0, smem_u32(&k.bars->wu_full[0]), 0);
    take(0, 0);
    for (int c = 0, at = 0, phase = 0; c < k.n_chunks; c++) {
        const uint32_t k_s = k.stage + at * kPairStage, w_s = k.wu + (c & 1) * kWu;
#pragma unroll
        for (int i = 0; i < 32; i++)
            sb[i] = pack2(st[2 * i], st[2 * i + 1]);
        wgmma_fence();
        wgmma_reg_64x64(x, sb, panels(w_s), 1);
        mbar_sleep(smem_u32(&k.bars->s_empty), (c & 1) ^ 1);
#pragma unroll
        for (int ks = 0; ks < 8; ks++) {
            if (ks > 0)
                wgmma_reg_64x64(x, sb + 4 * ks, panel_step(panels(w_s), ks), 1);
            stsm4(k.state + panel_at<kChunk>(row, 2 * ks + right), sb + 4 * ks);
#pragma unroll
            for (int i = 0; i < 8; i++)
                st[8 * ks + i] *= last;
        }
        wgmma_commit();
        warp_arrive(smem_u32(&k.bars->s_full));
        wgmma_wait<0>();
        wgmma_hold(x);
        if (lane == 0)
            mbar_arrive_at(of_rank(smem_u32(&k.bars->wu_empty[c & 1]), 1));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            r[2 * j] = pack2(ed[2 * j] * x[4 * j], ed[2 * j + 1] * x[4 * j + 1]);
            r[2 * j + 1] = pack2(ed[2 * j] * x[4 * j + 2], ed[2 * j + 1] * x[4 * j + 3]);
        }
        wgmma_fence();
        wgmma_64x128(st, r, panel_rows(panels(k_s), 0));
#pragma unroll
        for (int i = 0; i < 16; i++)
            vn[i] = pack2(x[2 * i], x[2 * i + 1]);
        mbar_sleep(smem_u32(&k.bars->d_empty), (c & 1) ^ 1);
#pragma unroll
        for (int ks = 1; ks < 4; ks++) {
            wgmma_64x128(st, r + 4 * ks, panel_rows(panels(k_s), ks));
            if (ks == 1)
                stsm4(k.delta + panel_at<kChunk>(row, right), vn);
            stsm4(k.delta + panel_at<kChunk>(row, 2 * ks + right), vn + 4 * ks);
        }
        wgmma_commit();
        warp_arrive(smem_u32(&k.bars->d_full));
        const int here = at;
        at = at + 1 == kStages ? 0 : at + 1;
        phase ^= at == 0;
        if (c + 1 < k.n_chunks)
            mbar_sleep2(smem_u32(&k.bars->full[at]), phase, smem_u32(&k.bars->wu_full[(c + 1) & 1]), ((c + 1) >> 1) & 1);
        take(c + 1, at);        /* after the last chunk for nothing: under the condition, what it loads would have two places */
        wgmma_wait<0>();
        wgmma_hold(st);
        warp_arrive(smem_u32(&k.bars->empty[here]));
        if ((c + 1) * kChunk == due.n) {
            store(s_of_slot(a, due.slot, k.h));
            due = next_save(a, k.s, due.n);
        }
    }
    store(s_state(a, k.s, k.h));
}

/* The helper's products: -W, tokens along the rows, as `pair_state` wants it for an operand, and U^T as its accumulator's registers. */
__device__ __forceinline__ void pair_products(const gdn_args &a, const walk &k)
{
    const int tid = threadIdx.x & 127, w = tid >> 5, lane = tid & 31, tq = lane & 3;
    const int row = w * 16 + ((lane >> 3) & 1) * 8 + (lane & 7), right = lane >> 4;
    const int64_t kq_step = (int64_t)a.n_k * kKQ, rec_step = (int64_t)a.n_v * kRec;
    const unsigned char *kq = a.kq + k.id0 * kq_step + k.kh * kKQ, *rec = a.rec + k.id0 * rec_step + k.h * kRec;
    /* Tiles of a chunk are asked for by two warps. */
    auto ask = [&](int at) {
        const uint32_t full = smem_u32(&k.bars->full[at]), stage = k.stage + at * kHelpStage;
        if (tid == 32) {
            mbar_expect(full, kTile + kHalf + kChunk * 4);
            bulk_load(stage, kq, kTile, full);
        } else if (tid == 64) {
            bulk_load(stage + kTile, rec, kHalf, full);
            bulk_load(stage + kTile + kHalf, rec + 2 * kHalf, kChunk * 4, full);
        }
        kq += kq_step;
        rec += rec_step;
    };
    pdl_wait();         /* for `tile`; what came before it has ended when a block of this kernel runs, see there */
    for (int c = 0; c < min(kStages, k.n_chunks); c++)
        ask(c);
    uint32_t am[16], p[32], q[16];
    float d[64], u[32];
    float2 e[8];
    auto take = [&](int at) {
        const uint32_t a_s = k.stage + at * kHelpStage + kTile;
#pragma unroll
        for (int ks = 0; ks < 4; ks++)
            ldsm4(am + 4 * ks, a_s + at64(row, 2 * ks + right));
#pragma unroll
        for (int j = 0; j < 8; j++)
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(e[j].x), "=f"(e[j].y) : "r"(a_s + kHalf + j * 32 + 8 * tq));
    };
    auto scale = [&] {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 f = unpack2(am[i]);
            am[i] = pack2(-e[i >> 1].x * f.x, -e[i >> 1].y * f.y);
        }
    };
    mbar_sleep(smem_u32(&k.bars->full[0]), 0);
    take(0);
    scale();
    for (int c = 0, at = 0, phase = 0; c < k.n_chunks; c++) {
        const uint32_t k_s = k.stage + at * kHelpStage, a_s = k_s + kTile, v_s = k.v + at * kColTile, to = k.wu + (c & 1) * kWu;
        wgmma_fence();
#pragma unroll
        for (int ks = 0; ks < 4; ks++)
            wgmma_64x128(d, am + 4 * ks, panel_rows(panels(k_s), ks), ks > 0);
        wgmma_commit();
        mbar_sleep(smem_u32(&k.bars->v_full[at]), phase);
        wgmma_fence();
#pragma unroll
        for (int ks = 0; ks < 4; ks++)
            wgmma_cols(u, panel_rows(panels(v_s), ks), panel_step(panels(a_s), ks), ks > 0);
        wgmma_commit();
        const int here = at;
        at = at + 1 == kStages ? 0 : at + 1;
        phase ^= at == 0;
        if (c + 1 < k.n_chunks)
            mbar_sleep(smem_u32(&k.bars->full[at]), phase);
        wgmma_wait<1>();
        wgmma_hold(d);
        take(at);
#pragma unroll
        for (int i = 0; i < 32; i++)
            p[i] = pack2(d[2 * i], d[2 * i + 1]);
        scale();
        wgmma_wait<0>();
        wgmma_hold(u);
        warp_arrive(smem_u32(&k.bars->v_empty[here]));
#pragma unroll
        for (int i = 0; i < 16; i++)
            q[i] = pack2(u[2 * i], u[2 * i + 1]);
        mbar_sleep(smem_u32(&k.bars->wu_empty[c & 1]), ((c >> 1) & 1) ^ 1);
#pragma unroll
        for (int ks = 0; ks < 8; ks++)
            stsm4(to + panel_at<kChunk>(row, 2 * ks + right), p + 4 * ks);
#pragma unroll
        for (int j = 0; j < 4; j++)
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                         ::"r"(to + kTile + j * 2048 + tid * 16), "r"(q[4 * j]), "r"(q[4 * j + 1]), "r"(q[4 * j + 2]), "r"(q[4 * j + 3])
                         : "memory");
        wgmma_publish();
        bar_sync(4, 128);
        if (tid == 0)
            tile_send(to, kWu, smem_u32(&k.bars->wu_full[c & 1]), 0);
        if (c + kStages < k.n_chunks)
            ask(here);
    }
}

/* Outputs, tokens along the rows: O = e^gamma Q S + P Vn. */
__device__ __forceinline__ void pair_outputs(const walk &k)
{
    const int tid = threadIdx.x & 127, w = tid >> 5, lane = tid & 31;
    const int row = w * 16 + ((lane >> 3) & 1) * 8 + (lane & 7), right = lane >> 4;
    float o[32];
    for (int c = 0, at = 0, phase = 0; c < k.n_chunks; c++) {
        const uint32_t q_s = k.stage + at * kPairStage + kTile, p_s = q_s + kTile, e_s = p_s + kHalf;
        mbar_sleep(smem_u32(&k.bars->full[at]), phase);
        float e0, e1;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(e0) : "r"(e_s + (w * 16 + (lane >> 2)) * 4));
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(e1) : "r"(e_s + (w * 16 + (lane >> 2) + 8) * 4));
        mbar_sleep(smem_u32(&k.bars->s_full), c & 1);
        wgmma_publish();        /* here, and not where the serial part would have to wait for it */
        whole_product<8>(o, q_s, k.state, 0);
        warp_arrive(smem_u32(&k.bars->s_empty));
#pragma unroll
        for (int i = 0; i < 32; i++)
            o[i] *= i & 2 ? e1 : e0;
        mbar_sleep(smem_u32(&k.bars->d_full), c & 1);
        wgmma_publish();
        whole_product<4>(o, p_s, k.delta, 1);
        warp_arrive(smem_u32(&k.bars->d_empty));
        warp_arrive(smem_u32(&k.bars->empty[at]));
        mbar_sleep(smem_u32(&k.bars->o_empty[at]), phase ^ 1);
        store_outputs(o, k.o + at * kColTile, row, right);
        wgmma_publish();
        warp_arrive(smem_u32(&k.bars->o_full[at]));
        if (++at == kStages) {
            at = 0;
            phase ^= 1;
        }
    }
}

/* Norm and gate of every third chunk, the first ones in the helper: 8 threads have a token's 64 columns; another cluster sums the squares
 * of the other 64, but runs: the grid is launched so only where all of it fits. */
__device__ __forceinline__ void pair_gate(const gdn_args &a, const walk &k, int first)
{
    const int tid = threadIdx.x & 127, piece = tid & 7, row0 = tid >> 3;
    const int col = k.h * kDim + k.cb * kWalkCols + piece * 8, ld_out = (int)a.ld_out;
    const float4 *w4 = (const float4 *)(a.norm_w + k.cb * kWalkCols + piece * 8);
    const float4 wa = w4[0], wb = w4[1];
    const float wn[8] = { wa.x, wa.y, wa.z, wa.w, wb.x, wb.y, wb.z, wb.w };
    unsigned char *posted = a.sums + ((int64_t)blockIdx.z * a.n_v + k.h) * kSums + row0 * 32;
    const uint32_t from = k.o + first * kColTile + at64(row0, piece);
    const uint32_t o_full = smem_u32(&k.bars->o_full[first]), o_empty = of_rank(smem_u32(&k.bars->o_empty[first]), 0);
    uint4 zv[4];
    pdl_wait();         /* `tile` clears the sums, and reads the convolution state */
    gate_ask(zv, a, k, first, row0, col);
    for (int c = first, turn = 0; c < k.n_chunks; c += kTurns, turn ^= 1) {
        uint4 ov[4];
        float ss[4];
        if (first == 0 && tid == 0)
            mbar_expect(o_full, kColTile);
        mbar_sleep(o_full, turn);
        gate_outputs(ov, from);
        __syncwarp();
        if ((tid & 31) == 0)
            mbar_arrive_at(o_empty);
        gate_squares(ov, ss);
        float far[4], y[4][8];
        unsigned char *mine = posted + (k.cb * 2 * kTurns + first + turn * kTurns) * kChunk * 8 + (piece & 1) * 16;
        const unsigned char *theirs = posted + ((k.cb ^ 1) * 2 * kTurns + first + turn * kTurns) * kChunk * 8;
        if (piece < 2)
            asm volatile("st.volatile.global.v4.b32 [%0], {%1, %2, %3, %2};"
                         ::"l"(mine), "r"(__float_as_int(piece ? ss[2] : ss[0])), "r"(c + 1), "r"(__float_as_int(piece ? ss[3] : ss[1]))
                         : "memory");
        /* While the sums are on their way: o silu(z) and the norm's weights. */
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const uint32_t op[4] = { ov[p].x, ov[p].y, ov[p].z, ov[p].w }, zp[4] = { zv[p].x, zv[p].y, zv[p].z, zv[p].w };
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 z = unpack2(zp[e]);
                y[p][2 * e] = z.x;
                y[p][2 * e + 1] = z.y;
            }
            silu8(y[p]);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 f = unpack2(op[e]);
                y[p][2 * e] *= f.x * wn[2 * e];
                y[p][2 * e + 1] *= f.y * wn[2 * e + 1];
            }
        }
        auto look = [](const unsigned char *at, float *x, int *tag) {
            asm volatile("ld.volatile.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(x[0]), "=r"(tag[0]), "=f"(x[1]), "=r"(tag[1]) : "l"(at) : "memory");
        };
        int tag[4];
        do {
            look(theirs, far, tag);
            look(theirs + 16, far + 2, tag + 2);
        } while (tag[0] != c + 1 || tag[1] != c + 1 || tag[2] != c + 1 || tag[3] != c + 1);
        bf16 *row = a.out + (int64_t)(k.t0 + c * kChunk + row0) * ld_out + col;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float rho;
            asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(rho) : "f"((ss[p] + far[p]) * (1.f / kDim) + a.eps));
            if (c * kChunk + p * 16 + row0 < k.n)
                *(uint4 *)(row + (int64_t)p * 16 * ld_out) =
                    make_uint4(pack2(rho * y[p][0], rho * y[p][1]), pack2(rho * y[p][2], rho * y[p][3]),
                               pack2(rho * y[p][4], rho * y[p][5]), pack2(rho * y[p][6], rho * y[p][7]));
        }
        gate_ask(zv, a, k, c + kTurns, row0, col);
    }
}

/* The state's block, a thread each: some outputs go to the helper, W and U are expected, tiles asked for. */
__device__ __forceinline__ void pair_relay(const gdn_args &a, const walk &k)
{
    const int warp = (threadIdx.x >> 5) & 3;
    pdl_wait();
    if ((threadIdx.x & 31) == 0)
        for (int c = 0, at = 0, phase = 0; c < k.n_chunks; c++) {
            if (warp == 0 && at == 0) {
                mbar_sleep(smem_u32(&k.bars->o_full[0]), phase);
                tile_send(k.o, kColTile, smem_u32(&k.bars->o_full[0]), 1);
            } else if (warp == 1) {
                if (c >= 2)
                    mbar_sleep(smem_u32(&k.bars->wu_full[c & 1]), ((c >> 1) & 1) ^ 1);
                mbar_expect(smem_u32(&k.bars->wu_full[c & 1]), kWu);
            } else if (warp == 2) {
                const uint32_t full = smem_u32(&k.bars->full[at]), to = k.stage + at * kPairStage;
                mbar_sleep(smem_u32(&k.bars->empty[at]), phase ^ 1);
                mbar_expect(full, kKQ + kRec - kHalf);
                bulk_load(to, a.kq + ((k.id0 + c) * a.n_k + k.kh) * kKQ, kKQ, full);
                bulk_load(to + kKQ, a.rec + ((k.id0 + c) * a.n_v + k.h) * kRec + kHalf, kRec - kHalf, full);
            }
            if (++at == kStages) {
                at = 0;
                phase ^= 1;
            }
        }
    __syncwarp();
}

__device__ __forceinline__ void pair_block(const gdn_args &a, uint32_t smem, walk_bars *bars)
{
    walk k;
    const bool helper = blockIdx.x & 1;
    if (!walk_place(a, k, blockIdx.x >> 1, smem, bars, NULL))
        return;
    k.wu = k.stage + kPairTiles;
    k.o = k.wu + 2 * kWu;
    k.state = k.v = k.o + kTurns * kColTile;    /* v only in the helper */
    k.delta = k.state + kTile;
    const uint32_t raw = k.stage + kStages * kHelpStage;
    if (threadIdx.x == 0) {
        auto init = [&](uint64_t &bar, int count) { mbar_init(smem_u32(&bar), count); };
        for (int i = 0; i < kStages; i++) {
            init(bars->full[i], 1);
            init(bars->empty[i], 8);
            init(bars->v_full[i], 4);
            init(bars->v_empty[i], 4);
            init(bars->o_full[i], helper ? 1 : 4);
            init(bars->o_empty[i], 4);
        }
        for (int i = 0; i < 2; i++) {
            init(bars->wu_full[i], 1);
            init(bars->wu_empty[i], 4);
        }
        init(bars->s_full, 4);
        init(bars->s_empty, 4);
        init(bars->d_full, 4);
        init(bars->d_empty, 4);
        mbar_publish();
    }
    cluster_sync();
    const int role = threadIdx.x >> 7;
    /* Registers: at most the 480 of five warpgroups of 96, which the norms keep. */
    if (role == 0) {
        if (helper) {
            registers_up<168>();
            pair_products(a, k);
        } else {
            registers_up<200>();
            pair_state(a, k);
        }
    } else if (helper ? role != 3 : role == 1) {
        registers_down<64>();
        if (helper)
            walk_values<true>(a, k, role == 4 ? 2 : role - 1, raw + (role == 4 ? 2 : role - 1) * 2 * kRawTile);
        else
            pair_outputs(k);
    } else if (role == 2) {
        registers_down<24>();
        pair_relay(a, k);
    } else {
        pair_gate(a, k, helper ? 0 : role - 2);
        if (helper && threadIdx.x < 3 * 128 + 32 && k.h % a.ratio == 0)
            move_conv_state(a, k, threadIdx.x & 31);
    }
    cluster_sync();     /* the blocks write into each other's memory, so none may go before the last */
}

#endif

__global__ void __launch_bounds__(kWalkThreads, 1) pair_kernel(const gdn_args a)
{
    extern __shared__ __align__(128) unsigned char gdn_smem[];
    pdl_launch();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ walk_bars bars;
    pair_block(a, smem_u32(gdn_smem) + (-smem_u32(gdn_smem) & 1023), &bars);
#endif
}

} // namespace

#endif
