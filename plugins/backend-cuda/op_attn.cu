/*
 * attn_paged for heads of 256. The query heads that share a key head are packed into the rows of one matrix product, so that
 * each key and value is read once. Decode rows: the contexts of all rows are shared evenly by all warps, and a second kernel joins
 * the pieces. Other rows: a block takes 128 (token, head) rows and walks the context in tiles with a running softmax.
 *
 * Running softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; tiling: Dao 2023, arXiv:2307.08691; copying warp, warpgroups taking
 * turns: Shah et al. 2024, arXiv:2407.08608.
 */
#include "attn_decode.cuh"
#include "attn_hopper.cuh"
#include <errno.h>
#include <limits.h>

namespace {

/* ---- launch ---------------------------------------------------------------------------------------------------------- */

/* Joins what several warps have of one row and head: four blocks for each where they all run at once, but at fixed splits always one,
 * for the order of the sums must not depend on other rows. */
int run_combine(arle_device *dev, cudaStream_t st, const attn_args &a)
{
    return a.split_blocks == 0 && a.n_q * a.n_rows <= dev->n_sm / 2
        ? launch(dev, st, combine_kernel<4>, dim3(a.n_q, a.n_rows, 4), dim3(256), 0, a)
        : launch(dev, st, combine_kernel<1>, dim3(a.n_q, a.n_rows), dim3(256), 0, a);
}

/* Splits at fixed positions, as many rows at once as there is room for their parts. */
template <bool QUANT>
int run_decode_fixed(arle_device *dev, cudaStream_t st, attn_args a, int n_rows, int max_ctx, size_t smem)
{
    a.split_blocks = 64;
    a.n_splits = (int)ceil_div(max_ctx, a.split_blocks * kDecTok);
    int at_once = (int)(dev->attn_work_bytes / ((size_t)a.n_splits * a.n_q * kWorkRow * 4));
    if (at_once < 1)
        return -EINVAL;
    at_once = at_once < 65535 ? at_once : 65535;
    const int seq0 = a.seq0;
    for (int s = 0; s < n_rows; s += at_once) {
        a.seq0 = seq0 + s;
        a.n_rows = n_rows - s < at_once ? n_rows - s : at_once;
        int r = launch(dev, st, decode_kernel<QUANT>, dim3(a.n_splits, a.n_kv, a.n_rows), dim3(32), smem, a);
        if (r == 0 && a.n_splits > 1)
            r = run_combine(dev, st, a);
        if (r < 0)
            return r;
    }
    return 0;
}

template <bool QUANT>
int run_decode(arle_device *dev, cudaStream_t st, attn_args a, int n_rows, int max_ctx)
{
    const size_t smem = kDecStages * kDecStage + a.group * kRow;
    bump(dev, COUNT_ATTN_DECODE);
    if (dev->deterministic)
        return run_decode_fixed<QUANT>(dev, st, a, n_rows, max_ctx, smem);
    /* As many warps as run at once, about four a multiprocessor; a block's memory costs 1 KB more than it asks for. */
    const int64_t warps = dev->n_sm * (int64_t)((dev->max_smem + 1024) / (smem + 1024));
    const int64_t most = ceil_div(n_rows * a.n_kv * ceil_div(max_ctx, kDecTok), kDecLeast);
    a.n_rows = n_rows;
    a.n_splits = (int)(warps < most ? warps : most);
    int r = launch(dev, st, decode_kernel<QUANT>, dim3(a.n_splits), dim3(32), smem, a);
    if (r == 0 && max_ctx > kDecTok)
        r = run_combine(dev, st, a);
    return r;
}

/* Launches the form with tensor copies; 1 where it does not apply: other devices, pages that are no multiple of 8 positions. */
int run_hopper(arle_device *dev, cudaStream_t st, const attn_args &a, const arle_batch *b)
{
    cudaFuncAttributes fa;
    if (dev->cc != 90 || tensor_map_encoder() == NULL || a.page_tokens % 8 != 0)
        return 1;
    CUDA_TRY(dev, cudaFuncGetAttributes(&fa, prefill_hopper_kernel));
    if (fa.maxThreadsPerBlock != kHopThreads)
        return 1;
    hop_args p;
    memset(&p, 0, sizeof p);
    p.a = a;
    p.n_seqs = (int)(b->n_seqs - b->n_decode);
    p.ticket = dev->tickets;
    const cuuint64_t q_dim[3] = { kHead, (cuuint64_t)a.n_q, b->n_tokens }, q_stride[2] = { kRow, (cuuint64_t)a.n_q * kRow };
    const cuuint32_t q_box[3] = { 64, (cuuint32_t)a.group, (cuuint32_t)(kPreRows / a.group) };
    /* How many pages there are is not known here; any that the table names is there. */
    const cuuint64_t kv_dim[5] = { 64, (cuuint64_t)a.page_tokens, 4, 2 * (cuuint64_t)a.n_kv, 1u << 31 };
    const cuuint64_t kv_stride[4] = { a.entry_stride, 128, kRow, a.page_stride };
    const cuuint32_t kv_box[5] = { 64, 8, 4, 1, 1 };
    if (!tensor_map(&p.q, a.q, 3, q_dim, q_stride, q_box)
        || !tensor_map(&p.kv, a.kv + a.kv_offset, 5, kv_dim, kv_stride, kv_box))
        return 1;
    const int64_t pairs = ceil_div(b->max_new, kPreRows / a.group * 2) * a.n_kv * p.n_seqs, most = dev->n_sm / 2;
    return launch(dev, st, prefill_hopper_kernel, dim3((unsigned)(pairs < most ? pairs : most) * 2), dim3(kHopThreads), kHopSmem, p);
}

template <bool QUANT>
int run(arle_device *dev, cudaStream_t st, attn_args a, const arle_batch *b)
{
    int r = 0;
    if (dev->deterministic) {       /* one form for all tokens, or a sequence would show where its steps began */
        a.seq_of = b->seq_of;
        return run_decode<QUANT>(dev, st, a, (int)b->n_tokens, (int)b->max_ctx);
    }
    if (b->n_decode > 0)
        r = run_decode<QUANT>(dev, st, a, (int)b->n_decode, (int)b->max_ctx);
    if (r < 0 || b->n_seqs == b->n_decode)
        return r;
    a.seq0 = (int)b->n_decode;
    bump(dev, COUNT_ATTN_PREFILL);
    if (!QUANT && (r = run_hopper(dev, st, a, b)) <= 0)
        return r;
    return launch(dev, st, prefill_kernel<QUANT>, dim3((unsigned)ceil_div(b->max_new, kPreRows / a.group), a.n_kv, b->n_seqs - b->n_decode),
                  dim3(256), kPreSmem, a);
}

} // namespace

extern "C" int cuda_attn_paged(struct arle_device *dev, struct arle_stream *st, const struct arle_attn_paged_args *a)
{
    OP_ENTER(dev, st);
    const arle_batch *b = a->batch;
    if (b->n_tokens == 0)
        return 0;
    if (a->dtype != ARLE_BF16 || a->head_dim != kHead || a->n_kv == 0 || a->n_q % a->n_kv != 0 || a->n_q / a->n_kv > 16
        || a->ld_out % 4 != 0 || (a->gate_src != NULL && (a->ld_gate | a->gate_off | a->gate_head_stride) % 4 != 0))
        return -EINVAL;
    attn_args p = {};
    p.q = (const bf16 *)a->q;
    p.kv = (const char *)a->kv.base;
    p.page_stride = a->kv.page_stride;
    p.kv_offset = a->kv.offset;
    p.entry_stride = a->kv.entry_stride;
    p.gate = (const bf16 *)a->gate_src;
    p.ld_gate = a->ld_gate;
    p.gate_off = a->gate_off;
    p.gate_head_stride = a->gate_head_stride;
    p.out = (bf16 *)a->out;
    p.ld_out = a->ld_out;
    p.pos = b->pos;
    p.cu = b->cu;
    p.table = b->block_table;
    p.n_q = (int)a->n_q;
    p.n_kv = (int)a->n_kv;
    p.group = (int)(a->n_q / a->n_kv);
    p.window = (int)a->window;
    p.first = a->first > 0 ? a->first : 0;
    p.pos_shift = a->pos_shift;
    p.page_tokens = (int)b->page_tokens;
    p.page_shift = (b->page_tokens & (b->page_tokens - 1)) == 0 ? __builtin_ctz(b->page_tokens) : -1;
    p.table_stride = (int)b->table_stride;
    p.scale_log2 = a->scale * 1.4426950408889634f;
    p.work = (float *)dev->attn_work;
    p.kv_dtype = a->kv.dtype;
    switch (a->kv.dtype) {
    case ARLE_BF16: return run<false>(dev, cs(st), p, b);
    case ARLE_I8: case ARLE_F8E4M3: case ARLE_I4G: return run<true>(dev, cs(st), p, b);
    default: return -EINVAL;
    }
}
