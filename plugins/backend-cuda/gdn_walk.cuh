/* The gated delta net in chunks of 64 tokens on compute capability 9.0: its second kernel, walk. */
#ifndef BACKEND_CUDA_GDN_WALK_CUH
#define BACKEND_CUDA_GDN_WALK_CUH

#include "gdn_tile.cuh"

namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* d (+)= A B: A 64 x 16 in registers, B 16 x 128 in shared memory, its 128 contiguous. */
__device__ __forceinline__ void wgmma_64x128(float (&d)[64], const uint32_t *a, uint64_t b, int accumulate = 1)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
                 " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
                 " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                   "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
                   "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                   "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

const int kTurns = 3;       /* in pairs of blocks: warpgroups that take turns at v, and at outputs; each has a place of its own */
static_assert(kTurns == kStages, "one count serves both");

/* Barriers: of tiles, v, outputs, W and U, state, Vn; of the sums of the other block. Where there is one of `empty`, all users of a phase
 * pass before the next can come, so a parity tells phases apart. */
struct walk_bars {
    uint64_t full[kStages], empty[kStages], v_full[kTurns], v_empty[kTurns], o_full[kTurns], o_empty[kTurns], wu_full[2], wu_empty[2];
    uint64_t s_full, s_empty, d_full, d_empty, peer[2];
};

/* What a warpgroup of `walk` needs to know. */
struct walk {
    int s, h, kh, cb, t0, n, n_chunks;
    int64_t id0;
    uint32_t stage, v, o, wu, state, delta;     /* shared memory; v, o, wu twice, or v and o kTurns times; bf16 S^T, Vn^T of the chunk */
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
    const float *S = s_state(a, k.s, k.h) + k.cb * kWalkCols + w * 16 + g;
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
                     : "r"(k.stage + at * kStage + kKQ + 2 * kHalf + (kChunk - 1) * 4));
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
    auto store = [&](float *to) {
        to += k.cb * kWalkCols + w * 16 + g;
#pragma unroll
        for (int i = 0; i < 64; i++)
            to[((i >> 2) * 8 + 2 * tq + (i & 1)) * kDim + ((i >> 1) & 1) * 8] = st[i];
    };
    gdn_due due = next_save(a, k.s, 0);
    take_values(0);
    take_tiles(0, 0);
    ask_state(0);
    for (int c = 0, at = 0, phase = 0; c < k.n_chunks; c++) {
        const uint32_t k_s = k.stage + at * kStage, a_s = k_s + kKQ, eg_s = a_s + 2 * kHalf + 8 * tq;
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
        if ((c + 1) * kChunk == due.n) {
            store(s_of_slot(a, due.slot, k.h));
            due = next_save(a, k.s, due.n);
        }
        ask_state(at);          /* after the last chunk for nothing: products under a condition would be serialized */
    }
    wgmma_wait<0>();
    wgmma_hold(x);
    store(s_state(a, k.s, k.h));
}

/* d (+)= A B^T, 16 STEPS columns of each in panels; done when this returns. */
template <int STEPS> __device__ __forceinline__ void whole_product(float (&d)[32], uint32_t a, uint32_t b, int accumulate)
{
    wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < STEPS; ks++)
        wgmma_ss(d, panel_step(panels(a), ks), panel_step(panels(b), ks), accumulate || ks > 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(d);
}

/* A warpgroup's outputs, tokens along the rows, to the tile at `to`. */
__device__ __forceinline__ void store_outputs(const float (&o)[32], uint32_t to, int row, int right)
{
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const uint32_t r[4] = { pack2(o[4 * j], o[4 * j + 1]), pack2(o[4 * j + 2], o[4 * j + 3]), pack2(o[4 * j + 4], o[4 * j + 5]),
                                pack2(o[4 * j + 6], o[4 * j + 7]) };
        stsm4(to + at64(row, j + right), r);
    }
}

/* Outputs, tokens along the rows: O = e^gamma Q S + P Vn. One of its threads asks for the tiles. */
__device__ __forceinline__ void walk_outputs(const gdn_args &a, const walk &k)
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
    if (tid == 0) {
        pdl_wait();     /* for `tile`; what came before it has ended when a block of this kernel runs, see there */
        for (int c = 0; c < min(kStages, k.n_chunks); c++)
            ask(c, c);
    }
    for (int c = 0, at = 0, phase = 0; c < k.n_chunks; c++) {
        const uint32_t q_s = k.stage + at * kStage + kTile, p_s = q_s + kTile + kHalf;
        mbar_sleep(smem_u32(&k.bars->full[at]), phase);
        float e0, e1;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(e0) : "r"(p_s + kHalf + (w * 16 + (lane >> 2)) * 4));
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(e1) : "r"(p_s + kHalf + (w * 16 + (lane >> 2) + 8) * 4));
        mbar_sleep(smem_u32(&k.bars->s_full), c & 1);
        whole_product<8>(o, q_s, k.state, 0);
        warp_arrive(smem_u32(&k.bars->s_empty));
#pragma unroll
        for (int i = 0; i < 32; i++)
            o[i] *= i & 2 ? e1 : e0;
        mbar_sleep(smem_u32(&k.bars->d_full), c & 1);
        whole_product<4>(o, p_s, k.delta, 1);
        warp_arrive(smem_u32(&k.bars->d_empty));
        warp_arrive(smem_u32(&k.bars->empty[at]));
        mbar_sleep(smem_u32(&k.bars->o_empty[c & 1]), ((c >> 1) & 1) ^ 1);
        store_outputs(o, k.o + (c & 1) * kColTile, row, right);
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

/* Convolution of v: a warp has 16 tokens of a chunk, a lane two channels. Inputs of the next chunk are on their way meanwhile. SPLIT: of
 * every third chunk, for the helper's products (gdn_pair.cuh). */
template <bool SPLIT> __device__ __forceinline__ void walk_values(const gdn_args &a, const walk &k, int first, uint32_t raw)
{
    const int step = SPLIT ? kTurns : 1;
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
        const int place = SPLIT ? first : c & 1, turn = SPLIT ? half : (c >> 1) & 1;
        const uint32_t from = raw + half * kRawTile + w * 16 * 128 + lane * 4, to = k.v + place * kColTile + (lane & 3) * 4;
        auto token = [&](int i) {
            uint32_t v;
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from + i * 128));
            return unpack2(v);
        };
        mbar_sleep(smem_u32(&k.bars->v_empty[place]), turn ^ 1);
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
        warp_arrive(smem_u32(&k.bars->v_full[place]));
    }
    if (first == 0 && w == 0) {     /* every reader of the state was before the first barrier; these channels are this block's alone */
        pdl_wait();
        uint32_t r[3];
#pragma unroll
        for (int i = 0; i < 3; i++)
            r[i] = *(const uint32_t *)(input(k.n - 3 + i) + lane * 2);
#pragma unroll
        for (int i = 0; i < 3; i++)
            *(uint32_t *)(conv_state(a, k.s) + (int64_t)i * a.n_conv + ch + lane * 2) = r[i];
    }
}

/* The z of four tokens of chunk c, 16 apart from row0 on, zero past the end. */
__device__ __forceinline__ void gate_ask(uint4 (&zv)[4], const gdn_args &a, const walk &k, int c, int row0, int col)
{
    const int ld = (int)a.ld_proj;
    const bf16 *row = a.proj + (int64_t)(k.t0 + c * kChunk + row0) * ld + a.z_off + col;
#pragma unroll
    for (int p = 0; p < 4; p++)
        zv[p] = c * kChunk + p * 16 + row0 < k.n ? *(const uint4 *)(row + (int64_t)p * 16 * ld) : make_uint4(0, 0, 0, 0);
}

/* Four tokens, 16 apart, of outputs: eight columns of each, from `from` on. */
__device__ __forceinline__ void gate_outputs(uint4 (&ov)[4], uint32_t from)
{
#pragma unroll
    for (int p = 0; p < 4; p++)
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(ov[p].x), "=r"(ov[p].y), "=r"(ov[p].z), "=r"(ov[p].w)
                     : "r"(from + p * 16 * 128));
}

/* Their squares, summed over the 8 threads that have the 64 columns of a token. */
__device__ __forceinline__ void gate_squares(const uint4 (&ov)[4], float (&ss)[4])
{
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
}

/* Norm and gate of every second chunk: 8 threads have a token's 64 columns, the other block sums the squares of the other 64. */
__device__ __forceinline__ void walk_gate(const gdn_args &a, const walk &k, int first)
{
    const int tid = threadIdx.x & 127, piece = tid & 7, row0 = tid >> 3;
    const int col = k.h * kDim + k.cb * kWalkCols + piece * 8, ld_out = (int)a.ld_out;
    const float4 *w4 = (const float4 *)(a.norm_w + k.cb * kWalkCols + piece * 8);
    const float4 wa = w4[0], wb = w4[1];
    const float wn[8] = { wa.x, wa.y, wa.z, wa.w, wb.x, wb.y, wb.z, wb.w };
    const uint32_t sums = smem_u32(k.sums) + (first * 2 * kChunk + row0 * 4) * 4, peer = smem_u32(&k.bars->peer[first]);
    const uint32_t far_sums = of_rank(sums, k.cb ^ 1), far_peer = of_rank(peer, k.cb ^ 1);
    const uint32_t from = k.o + first * kColTile + at64(row0, piece);
    uint4 zv[4];
    pdl_wait();         /* `tile` clears the sums, and reads the convolution state */
    gate_ask(zv, a, k, first, row0, col);
    for (int c = first; c < k.n_chunks; c += 2) {
        uint4 ov[4];
        float ss[4];
        mbar_sleep(smem_u32(&k.bars->o_full[first]), (c >> 1) & 1);
        gate_outputs(ov, from);
        gate_squares(ov, ss);
        float far[4];
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
        gate_ask(zv, a, k, c + 2, row0, col);
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

/* Where a block finds what; its barriers are still to be made. False: the sequence has no tokens. */
__device__ __forceinline__ bool walk_place(const gdn_args &a, walk &k, int cb, uint32_t smem, walk_bars *bars, float *sums)
{
    k.cb = cb;
    k.h = blockIdx.y;
    k.kh = k.h / a.ratio;
    k.s = a.seq0 + blockIdx.z;
    k.t0 = a.cu[k.s];
    k.n = a.cu[k.s + 1] - k.t0;
    k.n_chunks = (k.n + kChunk - 1) / kChunk;
    k.id0 = chunk_id(a, k.s, 0);
    k.stage = smem;
    k.bars = bars;
    k.sums = sums;
    return k.n > 0;
}

/* For many sequences: the two blocks of a cluster are the column halves of a head. */
__device__ __forceinline__ void walk_block(const gdn_args &a, uint32_t smem, walk_bars *bars, float *sums)
{
    walk k;
    if (!walk_place(a, k, blockIdx.x, smem, bars, sums))
        return;
    k.v = k.stage + kStages * kStage;
    k.o = k.v + 2 * kColTile;
    k.state = k.o + 2 * kColTile;
    k.delta = k.state + kTile;
    if (threadIdx.x == 0) {
        auto init = [&](uint64_t &bar, int count) { mbar_init(smem_u32(&bar), count); };
        for (int i = 0; i < kStages; i++) {
            init(bars->full[i], 1);
            init(bars->empty[i], 8);
        }
        for (int i = 0; i < 2; i++) {
            init(bars->v_full[i], 4);
            init(bars->v_empty[i], 4);
            init(bars->o_full[i], 4);
            init(bars->o_empty[i], 4);
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
    /* Registers: 192 + 2 * 64 + 2 * 80 make the 480 of five warpgroups of 96. */
    if (role == 0) {
        registers_up<192>();
        walk_state(a, k);
    } else if (role == 1) {
        registers_down<64>();
        walk_outputs(a, k);
    } else if (role == 2) {
        registers_down<64>();
        walk_values<false>(a, k, 0, k.delta + kColTile);
    } else {
        registers_down<80>();
        walk_gate(a, k, role - 3);
        if (threadIdx.x < 3 * 128 + 32 && k.h % a.ratio == 0)
            move_conv_state(a, k, threadIdx.x & 31);
    }
}

#endif

__global__ void __launch_bounds__(kWalkThreads, 1) walk_kernel(const gdn_args a)
{
    extern __shared__ __align__(128) unsigned char gdn_smem[];
    pdl_launch();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ walk_bars bars;          /* its presence tells have_walk() that the code is there */
    __shared__ __align__(16) float sums[4 * kChunk];
    walk_block(a, smem_u32(gdn_smem) + (-smem_u32(gdn_smem) & 1023), &bars, sums);
#endif
}

} // namespace

#endif
