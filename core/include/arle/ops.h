/*
 * The op table. Every op has the signature
 *     int op(struct arle_device *dev, struct arle_stream *st, const struct arle_<op>_args *a);
 * enqueues on st, allocates nothing, never waits, may be captured in a graph, and returns 0, -EINVAL (arguments the op
 * does not handle, stated per op) or -EIO (device dead). Args are read during the call; the memory they point to is
 * borrowed until the stream has passed.
 *
 * Conventions. Row-major; `ld*` are row strides in elements; all pointers are device pointers, 16-byte aligned. "act" is the
 * activation type of the call (`dtype`: ARLE_F32 or ARLE_BF16). Sums accumulate in f32 (f32 act: f32). "round" means rounding
 * to act, to nearest even (nothing for f32). A result row depends only on its own inputs, never on how many other rows are in
 * the call, how a sequence was cut into chunks, or the number of threads: on backend-cpu bit for bit, elsewhere as far as
 * the backend promises (deterministic = true).
 * n_tokens == 0 is legal and does nothing.
 *
 * Adding an op: append X(name) here and its args below, never reorder. Model plugins check ARLE_HAS(ops, struct arle_ops, x).
 * Args have no size of their own and a step holds a batch in its midst, so neither ever changes: what an op is to do beside what
 * it did, a new op does (tests/abi/layout.c holds their layouts).
 */
#ifndef ARLE_OPS_H
#define ARLE_OPS_H

#include <arle/backend.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ARLE_OPS_V1(X) \
    X(embed) X(rmsnorm) X(linear) X(norm_linear) X(silu_mul) X(gate_up) X(attn_prepare) X(attn_paged) \
    X(gdn) X(moe_route) X(moe_experts) X(seq_shift) X(sample) \
    X(hc_expand) X(hc_pre) X(hc_post) X(hc_head) X(head_rope) X(window_store) X(compress) X(index_select) X(attn_latent) \
    X(norm_moe) X(gdn_keep) X(seq_shift_keep)

/*
 * The batch of one step as ops see it. Sequences are numbered 0..n_seqs-1; the first n_decode of them have exactly one
 * new token each (decode rows), the others one or more. Tokens of a sequence are adjacent and in order, sequences in order.
 * Page 0 and state slot 0 belong to nobody: rows that only pad a batch point there and their results are thrown away.
 */
struct arle_batch {
    uint32_t struct_size;
    uint32_t n_tokens, n_seqs, n_decode;
    uint32_t max_new;               /* largest number of new tokens of one sequence */
    uint32_t max_ctx;               /* upper bound of ctx_len, for choosing kernels; in captured steps the largest ever */
    uint32_t page_tokens;           /* token positions per page */
    uint32_t table_stride;          /* block_table row stride, entries */
    const int32_t *ids;             /* [n_tokens] token ids; -1-r means "row r of sampled" */
    const int32_t *sampled;         /* ids sampled by the previous step */
    const int32_t *pos;             /* [n_tokens] absolute positions */
    const int32_t *seq_of;          /* [n_tokens] sequence of each token */
    const int32_t *cu;              /* [n_seqs + 1] first token of each sequence */
    const int32_t *ctx_len;         /* [n_seqs] length after this step = last position + 1 */
    const int32_t *slot;            /* [n_seqs] state slot */
    const int32_t *block_table;     /* [n_seqs, table_stride] page of positions [i*page_tokens, (i+1)*page_tokens) */
};

/* Where one layer's part of a paged cache group lies: entry of position p is at
 *   base + block_table[p / page_tokens] * page_stride + offset + (p % page_tokens) * entry_stride        (bytes) */
struct arle_paged {
    void *base;
    size_t page_stride, offset, entry_stride;
    uint32_t dtype;                 /* ARLE_F32, ARLE_BF16, or a quantised form of <arle/kv.h> */
};

/* Where one layer's part of a state record lies: base + slot * stride + offset (bytes). */
struct arle_state {
    void *base;
    size_t stride, offset;
};

/*
 * A state to keep from the midst of a step: what a state op leaves in the record of sequence `seq` after the first n_tokens of its new
 * tokens goes to record `slot` of the same group as well. n_tokens is a multiple of 64, at least 64, and less than the sequence's new
 * tokens; nobody reads or writes `slot` otherwise during the step. Host memory, read during the call. Steps with saves are not captured.
 */
#define ARLE_MAX_SAVES 8u
struct arle_save { uint32_t seq, n_tokens, slot; };

/* out[t] = table[id], id = ids[t] >= 0 ? ids[t] : sampled[-1 - ids[t]].    out [n_tokens, K] act */
struct arle_embed_args {
    uint32_t dtype, n_tokens;
    const int32_t *ids, *sampled;
    const struct arle_weight *table;        /* ARLE_W_EMBED */
    void *out; int64_t ld_out;
};

/* r = rows ? rows[t] : t;  rho = 1/sqrt(mean_i x[r,i]^2 + eps);  out[t,i] = round(x[r,i] * rho * (w_offset + w[i]))
 * x [*, dim] act; w [dim] f32; out [n_tokens, dim] act. out may equal x when rows is NULL.  Zhang & Sennrich 2019, arXiv:1910.07467. */
struct arle_rmsnorm_args {
    uint32_t dtype, n_tokens, dim;
    float eps, w_offset;
    const void *x; int64_t ld_x;
    const int32_t *rows;
    const float *w;
    void *out; int64_t ld_out;
};

/* y[t,n] = round_out( sum_k x[t,k] W[n,k]  (+ y[t,n] if accumulate) ).   x act [n_tokens, K]; y of out_dtype (act or f32) [n_tokens, N].
 * With weights made with act_quant, x is quantised first as described at struct arle_weight_desc. */
struct arle_linear_args {
    uint32_t dtype, out_dtype, n_tokens, accumulate;
    const void *x; int64_t ld_x;
    const struct arle_weight *w;            /* ARLE_W_LINEAR or ARLE_W_EMBED */
    void *y; int64_t ld_y;
};

/* y = linear(rmsnorm(x)): the coarse form of both. scratch: [n_tokens, K] act, contents undefined afterwards. */
struct arle_norm_linear_args {
    uint32_t dtype, out_dtype, n_tokens;
    float eps, w_offset;
    const void *x; int64_t ld_x;
    const float *norm_w;
    const struct arle_weight *w;
    void *y; int64_t ld_y;
    void *scratch;
};

/* out[t,i] = round( silu(gu[t,i]) * gu[t,dim+i] ), silu(x) = x / (1 + e^-x).    gu [n_tokens, 2 dim], out [n_tokens, dim] act
 * limit > 0: gate = min(gate, limit), up = clamp(up, -limit, limit) first. */
struct arle_silu_mul_args {
    uint32_t dtype, n_tokens, dim;
    float limit;
    const void *gu; int64_t ld_gu;
    void *out; int64_t ld_out;
};

/* out = silu_mul( linear(rmsnorm(x), W) ), W an ARLE_W_GATE_UP weight; gate and up products are rounded to act before silu
 * unless the op is fused; either is within tolerance, backend-cpu rounds.  scratch: [n_tokens, K + 2 I] act. */
struct arle_gate_up_args {
    uint32_t dtype, n_tokens;
    float eps, w_offset, limit;
    const void *x; int64_t ld_x;
    const float *norm_w;                    /* NULL: x is already normed */
    const struct arle_weight *w;
    void *out; int64_t ld_out;
    void *scratch;
};

/*
 * Per token: norm of q and k heads, rotary embedding, and the write of k and v to the paged cache.
 *   qkv[t] holds, in elements: q heads at q_off (head h at q_off + h * q_head_stride), k at k_off, v at v_off (heads adjacent)
 *   q_h = rmsnorm(q_h, q_norm) (k likewise; NULL: no norm), rounded; then on dims [rot_off, rot_off + rot_dim):
 *   half-split:  (a, b) = (x[j], x[j + rot_dim/2]);  interleaved: (x[2j], x[2j+1]);  angle = f32(pos) * inv_freq[j]
 *                a' = (a cos - b sin) * rope_scale;  b' = (b cos + a sin) * rope_scale        j < rot_dim/2
 *   q_out[t,h] = round(q);  cache K entry = round(k), V entry = round(v) in the cache dtype.
 * An entry holds k heads then v heads: [2, n_kv, head_dim] (then the scales of a quantised dtype).
 * q_out [n_tokens, n_q * head_dim] act. Angles and their sine and cosine with full range reduction in f32.
 */
struct arle_attn_prepare_args {
    uint32_t dtype, n_q, n_kv, head_dim, rot_dim, rot_off, interleaved;
    float eps, w_offset, rope_scale;
    const struct arle_batch *batch;         /* host struct with device pointers; read during the call */
    const void *qkv; int64_t ld_qkv, q_off, q_head_stride, k_off, v_off;
    const float *q_norm, *k_norm;           /* [head_dim] f32 or NULL */
    const float *inv_freq;                  /* [rot_dim / 2] f32 */
    struct arle_paged kv;
    void *q_out;
    int32_t pos_shift;                      /* added to every position for cache addressing and angle; rows that fall below 0 are skipped */
};

/*
 * Causal attention over the paged cache. For token t of sequence s at position p, query head h, kv head h / (n_q / n_kv):
 *   s_j = scale * q . K_j for j in [max(first, p - window + 1), p] (window 0: [first, p]);  P = softmax(s) in f32
 *   o = sum_j P_j V_j;  gate given: o *= sigmoid(gate[t, h]);  out = round(o)
 * gate: element offset gate_off + h * gate_head_stride in row t of gate_src (the raw projection). pos_shift as above.
 * scratch: at least scratch_bytes as attn_scratch() of the backend's documentation; may be NULL for backends that need none.
 */
struct arle_attn_paged_args {
    uint32_t dtype, n_q, n_kv, head_dim, window;
    float scale;
    const struct arle_batch *batch;
    const void *q;                          /* [n_tokens, n_q * head_dim] act */
    struct arle_paged kv;
    const void *gate_src; int64_t ld_gate, gate_off, gate_head_stride;
    void *out; int64_t ld_out;
    int32_t pos_shift;
    int32_t first;                          /* entries at positions below it are not attended; a token that attends none gives zeros */
};

/*
 * Gated delta net, from the fused projection to the gated norm (Yang et al. 2024, arXiv:2412.06464). Columns of proj[t]:
 *   u at u_off: q (n_k * dk), k (n_k * dk), v (n_v * dv), before the convolution; z at z_off (n_v * dv); a, b at a_off, b_off (n_v)
 *   conv: y_c = round(silu(sum_{i<4} conv_w[c,i] u[t-3+i, c])), earlier tokens from the conv state
 *   beta = sigmoid(b); g = -exp(A_log) softplus(a + dt_bias)                                               f32
 *   q = q / sqrt(sum q^2 + 1e-6) / sqrt(dk), k = k / sqrt(sum k^2 + 1e-6); v head h uses k head h / (n_v / n_k)
 *   S = e^g S; d = beta (v - S^T k); S += k d^T; o = S^T q                    S [n_v][dk][dv] f32, in token order
 *   out[t,h] = round( o rho norm_w silu(z) ), rho = 1/sqrt(mean o^2 + eps)  (o stays f32: one rounding)
 * State record of the layer: conv part [3][n_conv] act (oldest first; n_conv = 2 n_k dk + n_v dv), then S at s_state.
 * A sequence whose first position is 0 finds its record zeroed.
 */
struct arle_gdn_args {
    uint32_t dtype, n_k, n_v, dk, dv, conv_width;      /* conv_width 4 */
    float eps;
    const struct arle_batch *batch;
    const void *proj; int64_t ld_proj, u_off, z_off, a_off, b_off;
    const float *conv_w;                    /* [n_conv, 4] f32 */
    const float *A_log, *dt_bias;           /* [n_v] f32 */
    const float *norm_w;                    /* [dv] f32, plain weight */
    struct arle_state conv_state, s_state;
    void *out; int64_t ld_out;              /* [n_tokens, n_v * dv] act */
    void *scratch; size_t scratch_bytes;    /* device memory for the chunked form: n_tokens * (n_conv + n_v * (dk + 2 dv + 8)) * 4 bytes suffice */
};

/* gdn that also keeps states from the midst of its step: the whole record of the layer. */
struct arle_gdn_keep_args {
    struct arle_gdn_args gdn;
    const struct arle_save *saves; uint32_t n_saves;        /* n_saves <= ARLE_MAX_SAVES, else -EINVAL */
};

enum arle_moe_score { ARLE_MOE_SOFTMAX = 0, ARLE_MOE_SQRTSOFTPLUS = 1 };

/*
 * Routing. l = x W^T in f32; score: softmax over experts, or sqrt(log(1 + e^l)).
 * Selection: the k largest of score + bias (ties: lower index), or ids = table[token id] when table is given.
 * weights_i = score_i / (sum of selected scores) * route_scale.    ids [n_tokens, k] int32 in selection order, weights [n_tokens, k] f32.
 */
struct arle_moe_route_args {
    uint32_t dtype, n_tokens, n_experts, k, score;
    float route_scale;
    const void *x; int64_t ld_x;
    const struct arle_weight *router;       /* ARLE_W_LINEAR [n_experts, H] */
    const float *bias;                      /* [n_experts] or NULL */
    const int32_t *table;                   /* [vocab, k] or NULL */
    const int32_t *token_ids, *sampled;     /* with table; as in embed */
    int32_t *ids;
    float *weights;
    float *scratch;                         /* [n_tokens, n_experts] f32 */
};

/*
 * Routed and shared experts.   e_i(x) = down_i( f_i ),  f_i = round( silu(gate_i x) * (up_i x) [* w_i when weight_first] )
 *   y = round( [y +] sum_i [w_i] e_i(x)  + s * shared(x) ),  s = sigmoid(shared_gate . x) or 1 when NULL
 * Products gate x and up x are rounded to act, the sum runs in f32 in ids order, one rounding at the end.
 */
struct arle_moe_experts_args {
    uint32_t dtype, n_tokens, n_experts, k, weight_first, accumulate;
    float limit;                            /* clamp as in silu_mul; 0 = none */
    const void *x; int64_t ld_x;
    const int32_t *ids; const float *weights;
    const struct arle_weight *gate_up, *down;               /* expert roles */
    const struct arle_weight *shared_gate_up, *shared_down; /* ARLE_W_GATE_UP, ARLE_W_LINEAR; NULL: none */
    const float *shared_gate;               /* [H] f32 or NULL */
    void *y; int64_t ld_y;
    void *scratch; size_t scratch_bytes;    /* n_tokens * ((k + 1) * (3 I + H) + H) * 4 + 64 KiB bytes suffice, I = max expert width */
};

/* moe_experts(moe_route(rmsnorm(h))): the coarse form of the three. route.x and experts.x are the same [n_tokens, H] act, and like all
 * scratch, ids and weights of undefined contents afterwards; experts.y may be h. */
struct arle_norm_moe_args {
    float eps, w_offset;
    const void *h; int64_t ld_h;            /* [n_tokens, H] act */
    const float *norm_w;                    /* [H] f32 */
    struct arle_moe_route_args route;
    struct arle_moe_experts_args experts;
};

/* out[t] = x[t-1] for tokens of one sequence; the first token of a sequence takes the record's row, and the record becomes
 * x[last].     x, out [n_tokens, dim] act; record [dim] act per slot. Zero record at position 0. */
struct arle_seq_shift_args {
    uint32_t dtype, dim;
    const struct arle_batch *batch;
    const void *x; int64_t ld_x;
    struct arle_state record;
    void *out; int64_t ld_out;
};

/* seq_shift that also keeps records from the midst of its step. */
struct arle_seq_shift_keep_args {
    struct arle_seq_shift_args shift;
    const struct arle_save *saves; uint32_t n_saves;        /* n_saves <= ARLE_MAX_SAVES, else -EINVAL */
};

#define ARLE_MAX_TOP 20
struct arle_bias { int32_t id; float value; };

/*
 * How one row of logits becomes a token. Order: bias and mask, penalties, temperature, top_k, top_p, min_p, draw.
 *   penalties: x = x > 0 ? x / repetition : x * repetition for ids that occur in the history; then x -= presence + frequency * n
 *              for ids that occur n > 0 times in its output part
 *   top_k: the k largest (ties: lower id); top_p: the shortest best-first run of these whose probability reaches top_p of theirs;
 *   min_p: those with p >= min_p * largest p
 *   draw: u = (w >> 8) * 2^-24, w the first word of Philox4x32-10 with counter {lo(counter), hi(counter), 0, 0} and key {lo(seed), hi(seed)};
 *         the first id, in order of ids, at which the running sum of the survivors' probabilities exceeds u times their total
 */
struct arle_sample_row {
    float temperature;              /* <= 1e-6: argmax (ties: lower id) */
    float top_p, min_p;             /* 1 and 0: off */
    float repetition, presence, frequency;      /* 1, 0, 0: off. repetition sees prompt and output, the others output only */
    int32_t top_k;                  /* 0: off */
    int32_t target;                 /* >= 0: report this id's logprob too (prompt logprobs) */
    uint32_t n_top;                 /* alternatives wanted, <= ARLE_MAX_TOP */
    uint32_t n_history, n_prompt;   /* tokens so far, how many of them are prompt */
    uint32_t n_bias;
    uint64_t seed, counter;         /* the draw is a pure function of (seed, counter) and the row: Philox4x32-10, Salmon et al. 2011 */
    const int32_t *history;         /* [n_history] or NULL when no penalty is on */
    const struct arle_bias *bias;   /* [n_bias] added to logits */
    const uint32_t *mask;           /* [ceil(vocab / 32)] allowed ids, or NULL */
};

/* Logprobs are log-softmax of the raw logits over the n_valid real ids, before bias, penalties and temperature. */
struct arle_sample_args {
    uint32_t n_rows, vocab, n_valid;        /* ids >= n_valid are never produced */
    float *logits; int64_t ld;              /* [n_rows, vocab] f32; may be overwritten */
    const struct arle_sample_row *rows;     /* [n_rows] device */
    int32_t *ids;                           /* [n_rows] */
    float *logprob, *target_logprob;        /* [n_rows]; NaN where no target */
    int32_t *top_ids; float *top_logprobs;  /* [n_rows, ARLE_MAX_TOP], best first */
    float *top_logits;                      /* [n_rows]: largest raw logit */
    uint32_t any_top, any_draw, any_edit;   /* hints: 0 = no row wants alternatives / draws / has bias, mask or penalties */
    const int32_t *pos;                     /* [n_rows] or NULL: rows with pos <= 0 give id -1, whatever their logits (drafts) */
};

/*
 * ---- compressed, windowed and indexed attention; hyper-connections --------------------------------------------------
 * These ops serve decoders with several residual streams and one latent key/value vector per token (see
 * arXiv:2606.19348). A model without them never calls them; a backend may leave them NULL.
 */

/* Simulated quantisation of a vector after other work on it; the values stay in act, on the quantised grid. */
enum arle_fake_quant {
    ARLE_FQ_NONE = 0,
    ARLE_FQ_FP8 = 1,        /* E4M3, blocks of `block`: s = 2^ceil(log2(max(amax, 1e-4) / 448)), x = e4m3(x / s) * s */
    ARLE_FQ_FP4_HADAMARD = 2,   /* x = H x / sqrt(n) (Sylvester order, n a power of two) first, then E2M1, blocks of 32, s from amax / 6 */
};

/* out[t, s, :] = x[t, :] for s < streams.    x [n_tokens, dim] act, out [n_tokens, streams * dim] act */
struct arle_hc_expand_args {
    uint32_t dtype, n_tokens, dim, streams;
    const void *x; int64_t ld_x;
    void *out;
};

/*
 * Mixing coefficients of a hyper-connection and the input of the wrapped layer. S = streams, X = x[t] as [S, dim].
 *   r = 1/sqrt(mean(X^2) + norm_eps) over S*dim;   mix[o] = (fn[o] . X) r,  o < (2 + S) S
 *   pre_j  = sigmoid(mix[j] scale[0] + base[j]) + eps
 *   post_j = 2 sigmoid(mix[S+j] scale[1] + base[S+j])
 *   A[j][k] = mix[2S + S j + k] scale[2] + base[2S + S j + k];  A = softmax over k (row) + eps;  A /= column sum + eps;
 *             then iters-1 times: A /= row sum + eps; A /= column sum + eps
 *   u[t] = round( sum_j pre_j X_j );  coef[t] = post[S], A[S][S]
 * x [n_tokens, S*dim] act; fn [(2+S)S, S*dim], base [(2+S)S], scale [3] f32; u [n_tokens, dim] act; coef [n_tokens, S + S*S] f32.
 */
struct arle_hc_pre_args {
    uint32_t dtype, n_tokens, dim, streams, iters;
    float norm_eps, eps;
    const void *x;
    const float *fn, *base, *scale;
    void *u;
    float *coef;
};

/* X_k <- round( post_k f + sum_j A[j][k] X_j ), in place.    f [n_tokens, dim] act, coef from hc_pre */
struct arle_hc_post_args {
    uint32_t dtype, n_tokens, dim, streams;
    void *x;
    const void *f;
    const float *coef;
};

/* r as in hc_pre; p_j = sigmoid((fn[j] . X) r scale[0] + base[j]) + eps;  out[t] = round( sum_j p_j X_j ), X = x[rows ? rows[t] : t].
 * fn [S, S*dim], base [S], scale [1] f32 */
struct arle_hc_head_args {
    uint32_t dtype, n_tokens, dim, streams;
    float norm_eps, eps;
    const void *x; const int32_t *rows;
    const float *fn, *base, *scale;
    void *out;
};

/*
 * Per head, in place: optional RMS norm (norm 1: no weight, 2: with weight w), rotary embedding of dims
 * [head_dim - rot_dim, head_dim) in neighbouring pairs (x[2j], x[2j+1]) by angle f32(pos) * inv_freq[j], negated when
 * inverse; then simulated quantisation: ARLE_FQ_FP8 of dims [0, head_dim - rot_dim) in blocks of 64 (whole when narrower),
 * or ARLE_FQ_FP4_HADAMARD of the whole head. Rounded to act after the norm, after the rotation and after quantising.
 * x [n_tokens, n_heads * head_dim] act with row stride ld_x
 */
struct arle_head_rope_args {
    uint32_t dtype, n_tokens, n_heads, head_dim, rot_dim, norm, inverse, quant;
    float eps;
    void *x; int64_t ld_x;
    const float *w;
    const float *inv_freq;          /* [rot_dim / 2] */
    const int32_t *pos;             /* [n_tokens] */
};

/* Keeps the last `window` rows of each sequence: row of position p goes to ring place p % window of the record.
 * x [n_tokens, dim] act; record [window, dim] act. Runs after the attention of the same step, which reads older rows. */
struct arle_window_store_args {
    uint32_t dtype, dim, window;
    const struct arle_batch *batch;
    const void *x; int64_t ld_x;
    struct arle_state ring;
};

/*
 * Pools every `ratio` tokens into one cache entry.   proj[t] f32: kv (c * dim) then gate (c * dim), c = overlap ? 2 : 1
 *   g = gate + ape[p mod ratio];  rows are kept in the record until their group is complete (p mod ratio == ratio - 1)
 *   overlap 0: entry w = sum over the group's rows of softmax(g) * kv, per channel
 *   overlap 1: columns [0, dim) of the previous group's rows and [dim, 2 dim) of this group's (w = 0: this group's only)
 *   e = round(e); e = rmsnorm(e, norm_w); rotary embedding of its last rot_dim dims at position w * ratio (pairs as head_rope);
 *   simulated quantisation as head_rope; stored as entry w of the page of position w * ratio:
 *   base + block_table[w * ratio / page_tokens] * page_stride + offset + (w % (page_tokens / ratio)) * entry_stride
 * ape [ratio, c * dim] f32; record f32 [2][c * ratio][c * dim] (kv rows, then g rows; overlap: the first `ratio` rows are the previous group).
 */
struct arle_compress_args {
    uint32_t dtype, dim, ratio, overlap, rot_dim, quant;
    float eps;
    const struct arle_batch *batch;
    const float *proj; int64_t ld_proj;
    const float *ape, *norm_w, *inv_freq;
    struct arle_state record;
    struct arle_paged out;          /* dtype act */
};

/*
 * Chooses cache entries for each query. Visible entries of position p: c < n = floor((p + 1) / ratio).
 *   score_c = sum_h relu(q_h . key_c) * weight_h * scale;  the min(topk, n) largest (ties: lower c), ascending by c.
 *   n <= topk: all, without scoring.
 * q [n_tokens, n_heads * dim] act; weight [n_tokens, n_heads] f32 (ld_weight); sel [n_tokens, topk] int32, n_sel [n_tokens].
 * round_scores 1: weights, dots, products, and the sum over heads are each rounded to bf16.  scratch: [max_ctx / ratio + 1] f32 per thread
 * is the backend's own.
 */
struct arle_index_select_args {
    uint32_t dtype, n_heads, dim, ratio, topk, round_scores;
    float scale;
    const struct arle_batch *batch;
    const void *q; int64_t ld_q;
    const float *weight; int64_t ld_weight;
    struct arle_paged keys;
    int32_t *sel, *n_sel;
};

/*
 * Attention with one latent vector per token that is key and value of every head. Keys of the query at position p, in order:
 *   window rows of positions max(first_key, p - window + 1)..p: from kv_new for tokens of this step, else from the ring;
 *   then compressed entries: those in sel[t, 0..n_sel[t]), or all c < floor((p + 1) / ratio) when sel is NULL; none when ratio is 0.
 *   s = scale q . key;  M = max s;  e = exp(s - M);  o = sum e key / (sum e + exp(sink_h - M)), rounded
 * then rotary embedding of the last rot_dim dims of o by -pos (pairs as head_rope), rounded.
 * q, out [n_tokens, n_heads * dim] act; kv_new [n_tokens, dim] act; sink [n_heads] f32.
 */
struct arle_attn_latent_args {
    uint32_t dtype, n_heads, dim, window, ratio, topk, rot_dim;
    int32_t first_key;              /* positions below it have no window row (0: all have); a query without keys gives 0 */
    float scale;
    const struct arle_batch *batch;
    const void *q; int64_t ld_q;
    const void *kv_new; int64_t ld_kv;
    struct arle_state ring;
    struct arle_paged entries;
    const int32_t *sel, *n_sel;
    const float *sink, *inv_freq;
    void *out; int64_t ld_out;
};

#define ARLE_OP_FIELD_(name) \
    int (*name)(struct arle_device *dev, struct arle_stream *st, const struct arle_##name##_args *a);
struct arle_ops {
    uint32_t struct_size;
    ARLE_OPS_V1(ARLE_OP_FIELD_)
};

/** Whether a backend can keep states from the midst of a step: one of an older minor version cannot. */
static inline int arle_ops_keep(const struct arle_ops *ops)
{
    return ARLE_HAS(ops, struct arle_ops, gdn_keep) && ARLE_HAS(ops, struct arle_ops, seq_shift_keep);
}

#ifdef __cplusplus
}
#endif
#endif
