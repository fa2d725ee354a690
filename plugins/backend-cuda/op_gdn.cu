/*
 * The gated delta net for heads of 128 (Yang et al. 2024, arXiv:2412.06464), from the fused projection to the gated norm.
 *
 * Steps (decode rows, short pieces): one block per (sequence, value head) keeps S in registers, so it is read and written once.
 * Chunks of 64 tokens (prefill), on tensor cores, with the notation of the paper's chunked form:
 *   conv     convolution, silu, norms of q and k                       -> qkv, bf16
 *   prepare  per chunk, all at once: A = (I + M)^-1, U = A diag(beta) V, W = A diag(beta e^gamma) K, P = (Q K^T) . D
 *   scan     per (sequence, head, 16 value columns), chunk after chunk: Vn = U - W S, O = e^gamma Q S + P Vn, S' = ...
 *            A warp holds S^T [16 x 64] as the accumulator of its products; accumulator and operand layouts agree when the value
 *            dimension is the row. Two warps hold the two halves of the keys and exchange their parts of W S and Q S.
 *   gate     norm over the head and silu(z), in place
 * On compute capability 9.0 two other kernels, tile and walk, take the place of these four; see there.
 */
#include "gdn_few.cuh"
#include "gdn_step.cuh"
#include "gdn_pair.cuh"
#include <errno.h>

namespace {

/* ---- launch ---------------------------------------------------------------------------------------------------------- */

int run_chunks(arle_device *dev, cudaStream_t st, gdn_args a, const arle_batch *b, char *scratch)
{
    const int n_tokens = (int)(b->n_tokens - b->n_decode);
    const int64_t chunks = n_tokens / kChunk + a.n_seqs;
    a.qkv = (bf16 *)scratch;
    a.ut = a.qkv + (int64_t)n_tokens * a.n_conv;
    a.w = a.ut + chunks * a.n_v * kDim * kChunk;
    a.p = a.w + chunks * a.n_v * kDim * kChunk;
    a.decay = (float *)(a.p + chunks * a.n_v * kChunk * kChunk);
    const unsigned per_seq = (unsigned)ceil_div(b->max_new, kChunk);
    bump(dev, COUNT_GDN_CHUNK);
    int r = launch(dev, st, conv_kernel, dim3((unsigned)ceil_div(b->max_new, kConvTok), (unsigned)ceil_div(a.n_conv, 1024), a.n_seqs),
                   dim3(256), 0, a);
    if (r == 0)
        r = launch(dev, st, prepare_kernel, dim3(per_seq, a.n_k, a.n_seqs), dim3(256), kPrepSmem, a);
    /* Too few blocks for two on each multiprocessor must not be packed onto half of them: ask for memory that only one can have. */
    const bool alone = kDim / kScanCols * a.n_v * a.n_seqs <= dev->n_sm && dev->max_smem >= (size_t)kScanSmem + 8192;
    if (r == 0)
        r = launch(dev, st, scan_kernel, dim3(kDim / kScanCols, a.n_v, a.n_seqs), dim3(kScanWarps * 32), kScanSmem + (alone ? 8192 : 0), a);
    if (r == 0)
        r = launch(dev, st, gate_kernel, dim3(n_tokens), dim3(256), 0, a);
    return r;
}

size_t chunk_scratch(const gdn_args *a, int n_tokens)
{
    size_t chunks = n_tokens / kChunk + a->n_seqs;
    return (size_t)n_tokens * a->n_conv * 2 + chunks * a->n_v * (2 * kDim * kChunk * 2 + kChunk * kChunk * 2 + 2 * kChunk * 4);
}

/* Is the code for compute capability 9.0 in this build, and does the device run it? */
bool have_walk(const arle_device *dev)
{
    return dev->cc == 90 && dev->max_smem >= (size_t)kWalkSmem + 1024 && has_code((const void *)walk_kernel);
}

/* walk_kernel or pair_kernel in clusters of two: the column halves of a head, or block and helper of one half. */
struct walk_launch {
    cudaLaunchConfig_t cfg;
    cudaLaunchAttribute attr[2];

    walk_launch(const arle_device *dev, cudaStream_t st, const gdn_args &a, bool split) : cfg(), attr()
    {
        attr[0].id = cudaLaunchAttributeClusterDimension;
        attr[0].val.clusterDim.x = 2;
        attr[0].val.clusterDim.y = attr[0].val.clusterDim.z = 1;
        attr[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[1].val.programmaticStreamSerializationAllowed = 1;
        cfg.gridDim = dim3(split ? 4 : 2, a.n_v, a.n_seqs);
        cfg.blockDim = dim3(kWalkThreads);
        cfg.dynamicSmemBytes = split ? kPairSmem : kWalkSmem;
        cfg.stream = st;
        cfg.attrs = attr;
        cfg.numAttrs = dev->pdl ? 2 : 1;
    }
};

/* Helpers wait for each other, so all of them must run at once: on a GPU of their own, and where the whole grid fits. */
bool split_fits(const arle_device *dev, cudaStream_t st, const gdn_args &a)
{
    int n = 0;
    if (4 * a.n_v * a.n_seqs > dev->n_sm || !device_alone(dev))
        return false;
    const walk_launch l(dev, st, a, true);
    return cudaFuncSetAttribute((const void *)pair_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPairSmem) == cudaSuccess
           && cudaOccupancyMaxActiveClusters(&n, pair_kernel, &l.cfg) == cudaSuccess && n >= 2 * a.n_v * a.n_seqs;
}

int run_tiles(arle_device *dev, cudaStream_t st, gdn_args a, const arle_batch *b, char *scratch)
{
    const int64_t chunks = (b->n_tokens - b->n_decode) / kChunk + a.n_seqs;
    a.kq = (unsigned char *)scratch;
    a.rec = a.kq + chunks * a.n_k * kKQ;
    const bool split = split_fits(dev, st, a);
    a.sums = split ? a.rec + chunks * a.n_v * kRec : NULL;
    bump(dev, COUNT_GDN_CHUNK);
    const dim3 grid(a.n_k * ((a.ratio + 1) / 2), (unsigned)ceil_div(b->max_new, kChunk), a.n_seqs);
    const bool few = (int64_t)grid.x * grid.y * grid.z <= 2 * dev->n_sm;
    int r = launch(dev, st, few ? tile_kernel<2> : tile_kernel<4>, grid, dim3(256), kTileSmem, a);
    if (r < 0)
        return r;
    const walk_launch l(dev, st, a, split);
    void (*kernel)(gdn_args) = split ? pair_kernel : walk_kernel;
    CUDA_TRY(dev, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)l.cfg.dynamicSmemBytes));
    if (dev->pdl)
        bump(dev, COUNT_PDL);
    CUDA_TRY(dev, cudaLaunchKernelEx(&l.cfg, kernel, a));
    return 0;
}

/* The convolution states to keep: the three inputs before each, which are all of this step. */
__global__ void keep_taps_kernel(const gdn_args a)
{
    pdl_launch();
    pdl_wait();
    const arle_save &k = a.saves[blockIdx.z];
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < a.n_conv)
        ((bf16 *)(a.conv_base + (size_t)k.slot * a.conv_stride + a.conv_offset))[(int64_t)blockIdx.y * a.n_conv + c] =
            a.proj[(int64_t)(a.cu[k.seq] + (int)k.n_tokens - 3 + (int)blockIdx.y) * a.ld_proj + a.u_off + c];
}

int delta_net(arle_device *dev, arle_stream *st, const arle_gdn_args *g, const arle_save *saves, uint32_t n_saves)
{
    OP_ENTER(dev, st);
    const arle_batch *b = g->batch;
    if (b->n_tokens == 0)
        return 0;
    if (g->dtype != ARLE_BF16 || g->dk != (uint32_t)kDim || g->dv != (uint32_t)kDim || g->conv_width != 4 || g->n_k == 0
        || g->n_v % g->n_k != 0 || (g->ld_proj | g->u_off | g->z_off | g->ld_out) % 8 != 0 || (uint64_t)b->n_seqs * g->n_k > kTickets
        || n_saves > ARLE_MAX_SAVES)
        return -EINVAL;
    gdn_args a = {};
    a.n_k = (int)g->n_k;
    a.n_v = (int)g->n_v;
    a.ratio = a.n_v / a.n_k;
    a.n_conv = (2 * a.n_k + a.n_v) * kDim;
    a.eps = g->eps;
    a.proj = (const bf16 *)g->proj;
    a.ld_proj = g->ld_proj;
    a.u_off = g->u_off;
    a.z_off = g->z_off;
    a.a_off = g->a_off;
    a.b_off = g->b_off;
    a.conv_w = g->conv_w;
    a.A_log = g->A_log;
    a.dt_bias = g->dt_bias;
    a.norm_w = g->norm_w;
    a.conv_base = (char *)g->conv_state.base;
    a.conv_stride = g->conv_state.stride;
    a.conv_offset = g->conv_state.offset;
    a.s_base = (char *)g->s_state.base;
    a.s_stride = g->s_state.stride;
    a.s_offset = g->s_state.offset;
    a.cu = b->cu;
    a.slot = b->slot;
    a.out = (bf16 *)g->out;
    a.ld_out = g->ld_out;
    a.tickets = dev->tickets + 65536;

    a.n_saves = (int)n_saves;
    for (uint32_t i = 0; i < n_saves; i++)
        a.saves[i] = saves[i];

    uint32_t stepped = b->n_decode;
    gdn_args c = a;
    c.seq0 = (int)b->n_decode;
    c.n_seqs = (int)(b->n_seqs - b->n_decode);
    c.tok0 = (int)b->n_decode;
    const bool aligned = (g->conv_state.stride | g->conv_state.offset | (size_t)g->conv_state.base) % 16 == 0;
    const bool tiles = have_walk(dev);
    const int n_new = (int)(b->n_tokens - b->n_decode);
    bool chunked = aligned && c.n_seqs > 0 && b->max_new > (uint32_t)kStepLimit && !dev->deterministic && g->scratch != NULL
                   && (tiles ? tile_scratch(&c, n_new) : chunk_scratch(&c, n_new)) <= g->scratch_bytes;
    if (!chunked)
        stepped = b->n_seqs;        /* short pieces, deterministic mode: token after token */
    int r = 0;
    if (n_saves > 0) {
        bump(dev, COUNT_GDN_SAVE);
        r = launch(dev, cs(st), keep_taps_kernel, dim3((unsigned)ceil_div(a.n_conv, 256), 3, n_saves), dim3(256), 0, a);
    }
    const uint32_t decode = dev->deterministic ? 0 : b->n_decode;      /* there one kernel makes every token */
    if (r == 0 && decode > 0 && tiles && a.ratio <= kFewRatio && decode * a.n_v * kFewParts <= (unsigned)dev->n_sm) {
        bump(dev, COUNT_GDN_FEW);
        a.n_seqs = (int)decode;
        r = launch_clusters(dev, cs(st), kFewParts * a.ratio, few_kernel, dim3(decode * a.n_v * kFewParts), dim3(256), 0, a);
    } else if (r == 0 && decode > 0) {
        bump(dev, COUNT_GDN_DECODE);
        dev->tma_by_regs = true;        /* this kernel does: the product after it is to take shared memory */
        a.n_seqs = (int)decode;
        /* With few rows this is faster without the next product's weights coming in beside it. */
        CUDA_TRY(dev, share_sm((const void *)decode_kernel, decode > 16));
        int64_t items = (int64_t)a.n_seqs * a.n_v;
        r = launch(dev, cs(st), decode_kernel, dim3((unsigned)(items < dev->n_sm ? items : dev->n_sm)), dim3(256), kStepSmem, a);
    }
    if (r == 0 && stepped > decode) {
        bump(dev, COUNT_GDN_STEP);
        a.seq0 = (int)decode;
        a.n_seqs = (int)(stepped - decode);
        int64_t items = (int64_t)a.n_seqs * a.n_v;
        r = launch(dev, cs(st), step_kernel, dim3((unsigned)(items < 2 * dev->n_sm ? items : 2 * dev->n_sm)), dim3(256), kStepSmem, a);
    }
    if (r == 0 && chunked)
        r = tiles ? run_tiles(dev, cs(st), c, b, (char *)g->scratch) : run_chunks(dev, cs(st), c, b, (char *)g->scratch);
    return r;
}

} // namespace

extern "C" int cuda_gdn(struct arle_device *dev, struct arle_stream *st, const struct arle_gdn_args *a)
{
    return delta_net(dev, st, a, NULL, 0);
}

extern "C" int cuda_gdn_keep(struct arle_device *dev, struct arle_stream *st, const struct arle_gdn_keep_args *a)
{
    return delta_net(dev, st, &a->gdn, a->saves, a->n_saves);
}
