/*
 * One step, top to bottom in the order of the formulas (DeepSeek-AI 2026, arXiv:2606.19348). Every token carries S
 * residual streams; each block wraps attention and then the mixture of experts in a hyper-connection. Enqueues only.
 * Called by the engine thread through entry.c; load.c made everything it reads.
 */
#include "model.h"

#define TRY(call) do { int try_r = (call); if (try_r < 0) \
        return arle_err_set(err, try_r, "%s: %s failed (%d)", __func__, #call, try_r); } while (0)

static char *cols(const struct arle_model *m, void *p, int64_t elements)
{
    return (char *)p + (size_t)elements * arle_dtype_size(m->act);
}

static int norm(struct arle_model *m, struct arle_stream *st, uint32_t n, uint32_t dim, const void *x, int64_t ld_x, const float *w,
                void *out, int64_t ld_out)
{
    const struct arle_rmsnorm_args a = { .dtype = m->act, .n_tokens = n, .dim = dim, .eps = m->c.eps, .x = x, .ld_x = ld_x, .w = w,
                                         .out = out, .ld_out = ld_out };
    return m->ops->rmsnorm(m->dev, st, &a);
}

static int linear(struct arle_model *m, struct arle_stream *st, uint32_t n, const void *x, int64_t ld_x, const struct arle_weight *w,
                  void *y, int64_t ld_y, uint32_t out_dtype, bool accumulate)
{
    const struct arle_linear_args a = { .dtype = m->act, .out_dtype = out_dtype, .n_tokens = n, .accumulate = accumulate, .x = x,
                                        .ld_x = ld_x, .w = w, .y = y, .ld_y = ld_y };
    return m->ops->linear(m->dev, st, &a);
}

static int head_rope(struct arle_model *m, struct arle_stream *st, const struct arle_batch *b, const struct ds_layer *l, void *x,
                     int64_t ld, uint32_t n_heads, uint32_t dim, uint32_t norm_kind, uint32_t quant)
{
    const struct arle_head_rope_args a = { .dtype = m->act, .n_tokens = b->n_tokens, .n_heads = n_heads, .head_dim = dim,
        .rot_dim = m->c.rot, .norm = norm_kind, .quant = m->simulate ? quant : ARLE_FQ_NONE, .eps = m->c.eps, .x = x, .ld_x = ld,
        .inv_freq = l->ratio ? m->freq_compress : m->freq_main, .pos = b->pos };
    return m->ops->head_rope(m->dev, st, &a);
}

static int pool(struct arle_model *m, struct arle_stream *st, const struct arle_batch *b, const struct ds_layer *l,
                const struct ds_compressor *k, uint32_t dim, uint32_t quant)
{
    const struct arle_compress_args a = { .dtype = m->act, .dim = dim, .ratio = l->ratio, .overlap = l->kind == DS_CSA,
        .rot_dim = m->c.rot, .quant = m->simulate ? quant : ARLE_FQ_NONE, .eps = m->c.eps, .batch = b,
        .proj = m->s.cproj + k->proj_off, .ld_proj = l->cproj_width, .ape = k->ape, .norm_w = k->norm, .inv_freq = m->freq_compress,
        .record = k->record, .out = k->out };
    return m->ops->compress(m->dev, st, &a);
}

/* Compressed entries of this step, and for indexed layers the choice of entries per query. m->s.x, m->s.qr are ready. */
static int compressed(struct arle_model *m, struct arle_stream *st, const struct arle_batch *b, const struct ds_layer *l,
                      struct arle_err *err)
{
    const struct ds_config *c = &m->c;
    struct ds_scratch *s = &m->s;
    TRY(linear(m, st, b->n_tokens, s->x, c->D, l->cproj, s->cproj, l->cproj_width, ARLE_F32, false));
    TRY(pool(m, st, b, l, &l->main, c->d, ARLE_FQ_FP8));
    if (l->kind != DS_CSA)
        return 0;
    int64_t iw = (int64_t)c->index_heads * c->index_dim;
    TRY(pool(m, st, b, l, &l->index, c->index_dim, ARLE_FQ_FP4_HADAMARD));
    TRY(linear(m, st, b->n_tokens, s->qr, c->Q, l->index_q_b, s->iq, iw, m->act, false));
    TRY(head_rope(m, st, b, l, s->iq, iw, c->index_heads, c->index_dim, 0, ARLE_FQ_FP4_HADAMARD));
    const struct arle_index_select_args a = { .dtype = m->act, .n_heads = c->index_heads, .dim = c->index_dim, .ratio = l->ratio,
        .topk = c->topk, .round_scores = m->simulate, .scale = 1.0f / (__builtin_sqrtf((float)c->index_dim) *
        __builtin_sqrtf((float)c->index_heads)), .batch = b, .q = s->iq, .ld_q = iw, .weight = s->cproj + l->index_weight_off,
        .ld_weight = l->cproj_width, .keys = l->index.out, .sel = s->sel, .n_sel = s->n_sel };
    TRY(m->ops->index_select(m->dev, st, &a));
    return 0;
}

/* m->s.x (normed input) -> m->s.f. first_key: 0 for the trunk; the drafter has no row for position 0. */
static int attention(struct arle_model *m, struct arle_stream *st, const struct arle_batch *b, const struct ds_layer *l,
                     int32_t first_key, struct arle_err *err)
{
    const struct ds_config *c = &m->c;
    struct ds_scratch *s = &m->s;
    uint32_t n = b->n_tokens;
    int64_t ld = c->Q + c->d, Hd = (int64_t)c->H * c->d, per_group = Hd / c->G, GR = (int64_t)c->G * c->R;
    char *kv = cols(m, s->qkv, c->Q);

    TRY(linear(m, st, n, s->x, c->D, l->qkv, s->qkv, ld, m->act, false));
    TRY(norm(m, st, n, c->Q, s->qkv, ld, l->q_norm, s->qr, c->Q));
    TRY(linear(m, st, n, s->qr, c->Q, l->q_b, s->q, Hd, m->act, false));
    TRY(head_rope(m, st, b, l, s->q, Hd, c->H, c->d, 1, ARLE_FQ_NONE));
    TRY(norm(m, st, n, c->d, kv, ld, l->kv_norm, kv, ld));
    TRY(head_rope(m, st, b, l, kv, ld, 1, c->d, 0, ARLE_FQ_FP8));
    if (l->ratio != 0) {
        int r = compressed(m, st, b, l, err);
        if (r < 0)
            return r;
    }
    const struct arle_attn_latent_args at = { .dtype = m->act, .n_heads = c->H, .dim = c->d, .window = c->W, .ratio = l->ratio,
        .topk = c->topk, .rot_dim = c->rot, .first_key = first_key, .scale = 1.0f / __builtin_sqrtf((float)c->d), .batch = b, .q = s->q,
        .ld_q = Hd, .kv_new = kv, .ld_kv = ld, .ring = l->ring, .entries = l->main.out, .sel = l->kind == DS_CSA ? s->sel : NULL,
        .n_sel = s->n_sel, .sink = l->sink, .inv_freq = l->ratio ? m->freq_compress : m->freq_main, .out = s->o, .ld_out = Hd };
    TRY(m->ops->attn_latent(m->dev, st, &at));
    const struct arle_window_store_args ws = { .dtype = m->act, .dim = c->d, .window = c->W, .batch = b, .x = kv, .ld_x = ld,
                                               .ring = l->ring };
    TRY(m->ops->window_store(m->dev, st, &ws));
    for (uint32_t g = 0; g < c->G; g++)
        TRY(linear(m, st, n, cols(m, s->o, g * per_group), Hd, l->wo_a[g], cols(m, s->a, (int64_t)g * c->R), GR, m->act, false));
    TRY(linear(m, st, n, s->a, GR, l->wo_b, s->f, c->D, m->act, false));
    return 0;
}

/* m->s.x -> m->s.f */
static int experts(struct arle_model *m, struct arle_stream *st, const struct arle_batch *b, const struct ds_layer *l,
                   struct arle_err *err)
{
    const struct ds_config *c = &m->c;
    struct ds_scratch *s = &m->s;
    const struct arle_moe_route_args route = { .dtype = m->act, .n_tokens = b->n_tokens, .n_experts = c->E, .k = c->K,
        .score = ARLE_MOE_SQRTSOFTPLUS, .route_scale = c->route_scale, .x = s->x, .ld_x = c->D, .router = l->router, .bias = l->bias,
        .table = l->tid2eid, .token_ids = b->ids, .sampled = b->sampled, .ids = s->route_ids, .weights = s->route_w, .scratch = s->route_s };
    TRY(m->ops->moe_route(m->dev, st, &route));
    const struct arle_moe_experts_args e = { .dtype = m->act, .n_tokens = b->n_tokens, .n_experts = c->E, .k = c->K, .weight_first = 1,
        .limit = c->limit, .x = s->x, .ld_x = c->D, .ids = s->route_ids, .weights = s->route_w, .gate_up = l->gate_up, .down = l->down,
        .shared_gate_up = l->shared_gate_up, .shared_down = l->shared_down, .y = s->f, .ld_y = c->D, .scratch = s->moe,
        .scratch_bytes = s->moe_bytes };
    TRY(m->ops->moe_experts(m->dev, st, &e));
    return 0;
}

static int hc_pre(struct arle_model *m, struct arle_stream *st, uint32_t n, void *X, const float *fn, const float *base,
                  const float *scale)
{
    const struct arle_hc_pre_args a = { .dtype = m->act, .n_tokens = n, .dim = m->c.D, .streams = m->c.S, .iters = m->c.iters,
        .norm_eps = m->c.eps, .eps = m->c.hc_eps, .x = X, .fn = fn, .base = base, .scale = scale, .u = m->s.u, .coef = m->s.coef };
    return m->ops->hc_pre(m->dev, st, &a);
}

static int hc_post(struct arle_model *m, struct arle_stream *st, uint32_t n, void *X)
{
    const struct arle_hc_post_args a = { .dtype = m->act, .n_tokens = n, .dim = m->c.D, .streams = m->c.S, .x = X, .f = m->s.f,
                                         .coef = m->s.coef };
    return m->ops->hc_post(m->dev, st, &a);
}

static int block(struct arle_model *m, struct arle_stream *st, const struct arle_batch *b, const struct ds_layer *l, void *X,
                 int32_t first_key, struct arle_err *err)
{
    uint32_t n = b->n_tokens, D = m->c.D;
    TRY(hc_pre(m, st, n, X, l->hc_attn_fn, l->hc_attn_base, l->hc_attn_scale));
    TRY(norm(m, st, n, D, m->s.u, D, l->attn_norm, m->s.x, D));
    int r = attention(m, st, b, l, first_key, err);
    if (r < 0)
        return r;
    TRY(hc_post(m, st, n, X));
    TRY(hc_pre(m, st, n, X, l->hc_ffn_fn, l->hc_ffn_base, l->hc_ffn_scale));
    TRY(norm(m, st, n, D, m->s.u, D, l->ffn_norm, m->s.x, D));
    if ((r = experts(m, st, b, l, err)) < 0)
        return r;
    TRY(hc_post(m, st, n, X));
    return 0;
}

/* Merged streams of `rows`, final norm, logits. */
static int logits(struct arle_model *m, struct arle_stream *st, const void *X, const int32_t *rows, uint32_t n, const float *fn,
                  const float *base, const float *scale, const float *norm_w, float *out, int64_t ld, struct arle_err *err)
{
    uint32_t D = m->c.D;
    const struct arle_hc_head_args a = { .dtype = m->act, .n_tokens = n, .dim = D, .streams = m->c.S, .norm_eps = m->c.eps,
        .eps = m->c.hc_eps, .x = X, .rows = rows, .fn = fn, .base = base, .scale = scale, .out = m->s.h };
    TRY(m->ops->hc_head(m->dev, st, &a));
    TRY(norm(m, st, n, D, m->s.h, D, norm_w, m->s.h, D));
    TRY(linear(m, st, n, m->s.h, D, m->head, out, ld, ARLE_F32, false));
    return 0;
}

static int embed(struct arle_model *m, struct arle_stream *st, const struct arle_batch *b, void *out)
{
    const struct arle_embed_args a = { .dtype = m->act, .n_tokens = b->n_tokens, .ids = b->ids, .sampled = b->sampled,
                                       .table = m->embed, .out = out, .ld_out = m->c.D };
    return m->ops->embed(m->dev, st, &a);
}

static int expand(struct arle_model *m, struct arle_stream *st, uint32_t n, const void *x, void *X)
{
    const struct arle_hc_expand_args a = { .dtype = m->act, .n_tokens = n, .dim = m->c.D, .streams = m->c.S, .x = x, .ld_x = m->c.D,
                                           .out = X };
    return m->ops->hc_expand(m->dev, st, &a);
}

/*
 * The drafter sees, for the token at position p, the streams of position p - 1 and the token itself, and drafts p + 1.
 * Its cache row stands at p instead of p - 1: only distances matter, and position 0 has no row (first_key = 1).
 */
static int drafts(struct arle_model *m, struct arle_stream *st, const struct arle_step *step, struct arle_err *err)
{
    const struct ds_config *c = &m->c;
    const struct arle_batch *b = &step->batch;
    struct ds_scratch *s = &m->s;
    uint32_t n = b->n_tokens, D = c->D;
    int64_t SD = (int64_t)c->S * D;
    const struct arle_seq_shift_args sh = { .dtype = m->act, .dim = (uint32_t)SD, .batch = b, .x = s->X, .ld_x = SD,
                                            .record = m->previous, .out = s->Xd, .ld_out = SD };
    TRY(m->ops->seq_shift(m->dev, st, &sh));
    TRY(norm(m, st, n * c->S, D, s->Xd, D, m->hnorm, s->X, D));         /* the trunk's streams are no longer needed */
    TRY(embed(m, st, b, s->u));
    TRY(norm(m, st, n, D, s->u, D, m->enorm, s->e, D));
    TRY(linear(m, st, n, s->e, D, m->e_proj, s->u, D, m->act, false));
    TRY(expand(m, st, n, s->u, s->Xd));
    for (uint32_t i = 0; i < c->S; i++)
        TRY(linear(m, st, n, cols(m, s->X, (int64_t)i * D), SD, m->h_proj, cols(m, s->Xd, (int64_t)i * D), SD, m->act, true));
    int r = block(m, st, b, &m->layer[c->L], s->Xd, 1, err);
    for (uint32_t t = 0; r == 0 && t < n; t += m->max_rows) {
        uint32_t rows = n - t < m->max_rows ? n - t : m->max_rows;
        r = logits(m, st, cols(m, s->Xd, (int64_t)t * SD), NULL, rows, m->mtp_head_fn, m->mtp_head_base, m->mtp_head_scale, m->mtp_norm,
                   s->draft_logits, c->vocab, err);
        float *lp = s->draft_lp;
        const struct arle_sample_args sa = { .n_rows = rows, .vocab = c->vocab, .n_valid = c->vocab, .logits = s->draft_logits,
            .ld = c->vocab, .rows = s->draft_rows, .ids = step->drafts + t, .logprob = lp, .target_logprob = lp + m->max_rows,
            .top_ids = (int32_t *)(void *)(lp + 2 * m->max_rows), .top_logprobs = lp + (2 + ARLE_MAX_TOP) * (size_t)m->max_rows,
            .top_logits = lp, .pos = b->pos + t };
        if (r == 0)
            TRY(m->ops->sample(m->dev, st, &sa));
    }
    return r;
}

int ds_step(struct arle_model *m, struct arle_stream *st, const struct arle_step *step, struct arle_err *err)
{
    const struct arle_batch *b = &step->batch;
    if (b->n_tokens > m->max_tokens || step->n_rows > m->max_rows)
        return arle_err_set(err, -EINVAL, "step of %u tokens and %u rows exceeds the %u and %u of the load", b->n_tokens, step->n_rows,
                            m->max_tokens, m->max_rows);
    TRY(embed(m, st, b, m->s.u));
    TRY(expand(m, st, b->n_tokens, m->s.u, m->s.X));
    for (uint32_t i = 0; i < m->c.L; i++) {
        int r = block(m, st, b, &m->layer[i], m->s.X, 0, err);
        if (r < 0)
            return r;
    }
    int r = 0;
    if (step->n_rows > 0)
        r = logits(m, st, m->s.X, step->rows, step->n_rows, m->hc_head_fn, m->hc_head_base, m->hc_head_scale, m->norm, step->logits,
                   step->ld_logits, err);
    if (r == 0 && (step->flags & ARLE_STEP_DRAFTS) && m->drafter)
        r = drafts(m, st, step, err);
    return r;
}
