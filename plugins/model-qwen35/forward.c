/*
 * One step, top to bottom as the papers have it: embedding, then per layer a mixer (gated delta net or gated attention) and an
 * MLP around one residual stream, final norm, head; then the drafter. Nothing here waits or allocates, and no value depends on
 * how a sequence was cut into steps: all of that is the ops' promise.
 *
 * Gated delta net: Yang et al. 2024, arXiv:2412.06464. Gated attention: Qiu et al. 2025, arXiv:2505.06708.
 * Multi-token prediction: DeepSeek-AI 2024, arXiv:2412.19437, section 2.2.
 */
#include "model.h"

struct run {
    struct arle_model *m;
    struct arle_stream *st;
    const struct arle_step *step;
    const struct arle_batch *b;
    uint32_t n_saves;
    struct arle_err *err;
};

#define OP(name, ...) run_##name(rn, &(struct arle_##name##_args){ __VA_ARGS__ })
#define TRY(call) do { int r_ = (call); if (r_ < 0) return r_; } while (0)
#define COMMON .dtype = rn->m->caps.compute, .n_tokens = rn->b->n_tokens

#define DEFINE_RUN(name) \
    static int run_##name(struct run *rn, const struct arle_##name##_args *a) \
    { \
        int r = rn->m->backend->ops->name(rn->m->dev, rn->st, a); \
        return r < 0 ? arle_err_set(rn->err, r, "op " #name " failed (%d)", r) : 0; \
    }
DEFINE_RUN(embed)
DEFINE_RUN(rmsnorm)
DEFINE_RUN(linear)
DEFINE_RUN(norm_linear)
DEFINE_RUN(silu_mul)
DEFINE_RUN(gate_up)
DEFINE_RUN(attn_prepare)
DEFINE_RUN(attn_paged)
DEFINE_RUN(gdn)
DEFINE_RUN(gdn_keep)
DEFINE_RUN(moe_route)
DEFINE_RUN(moe_experts)
DEFINE_RUN(norm_moe)
DEFINE_RUN(seq_shift)
DEFINE_RUN(seq_shift_keep)
DEFINE_RUN(sample)

static void *at(struct run *rn, uint64_t offset)
{
    return rn->m->scratch + offset;
}

/* Element `column` of a row of act. */
static void *column(struct run *rn, uint64_t offset, uint64_t column)
{
    return rn->m->scratch + offset + column * (rn->m->caps.compute == ARLE_BF16 ? 2 : 4);
}

static const float *data(struct run *rn, const struct arle_weight *w)
{
    return rn->m->backend->weight_data(w);
}

/* out = RMS0(x), whose weight is stored around zero. */
static int norm(struct run *rn, const struct arle_weight *w, const void *x, void *out, int64_t ld_out)
{
    const struct qwen35_config *c = &rn->m->cfg;
    return OP(rmsnorm, COMMON, .dim = c->hidden, .eps = c->eps, .w_offset = 1, .x = x, .ld_x = c->hidden, .w = data(rn, w),
              .out = out, .ld_out = ld_out);
}

/* y = W x, or y += W x. */
static int project(struct run *rn, const struct arle_weight *w, const void *x, int64_t ld_x, void *y, int64_t ld_y, bool add)
{
    return OP(linear, COMMON, .out_dtype = rn->m->caps.compute, .accumulate = add, .x = x, .ld_x = ld_x, .w = w, .y = y,
              .ld_y = ld_y);
}

/* proj = W RMS0(h). */
static int norm_project(struct run *rn, const struct qwen35_layer *l)
{
    struct arle_model *m = rn->m;
    const struct qwen35_config *c = &m->cfg;
    int64_t ld = (int64_t)m->at.ld_proj;
    if (m->coarse_norm && l->proj_ab == NULL)
        return OP(norm_linear, COMMON, .out_dtype = m->caps.compute, .eps = c->eps, .w_offset = 1, .x = at(rn, m->at.h),
                  .ld_x = c->hidden, .norm_w = data(rn, l->norm), .w = l->proj, .y = at(rn, m->at.proj), .ld_y = ld,
                  .scratch = at(rn, m->at.x));
    TRY(norm(rn, l->norm, at(rn, m->at.h), at(rn, m->at.x), c->hidden));
    TRY(project(rn, l->proj, at(rn, m->at.x), c->hidden, at(rn, m->at.proj), ld, false));
    if (l->proj_ab == NULL)
        return 0;
    return project(rn, l->proj_ab, at(rn, m->at.x), c->hidden,
                   column(rn, m->at.proj, qwen35_conv_dim(c) + (uint64_t)c->n_v * c->dv), ld, false);
}

static struct arle_state state_at(struct run *rn, uint64_t offset)
{
    return (struct arle_state){ .base = rn->m->delta.base, .stride = rn->m->delta.stride, .offset = offset };
}

/* h += W_out GDN(W_in RMS0(h)) */
static int delta_net(struct run *rn, const struct qwen35_layer *l)
{
    struct arle_model *m = rn->m;
    const struct qwen35_config *c = &m->cfg;
    int64_t conv = qwen35_conv_dim(c), values = (int64_t)c->n_v * c->dv;

    TRY(norm_project(rn, l));
    const struct arle_gdn_args a = {
        .dtype = m->caps.compute, .n_k = c->n_k, .n_v = c->n_v, .dk = c->dk, .dv = c->dv, .conv_width = 4, .eps = c->eps, .batch = rn->b,
        .proj = at(rn, m->at.proj), .ld_proj = (int64_t)m->at.ld_proj, .u_off = 0, .z_off = conv, .a_off = conv + values,
        .b_off = conv + values + c->n_v, .conv_w = data(rn, l->conv), .A_log = data(rn, l->A_log), .dt_bias = data(rn, l->dt_bias),
        .norm_w = data(rn, l->gate_norm), .conv_state = state_at(rn, l->conv_offset), .s_state = state_at(rn, l->s_offset),
        .out = at(rn, m->at.mix), .ld_out = values, .scratch = at(rn, m->at.work), .scratch_bytes = m->at.work_bytes,
    };
    TRY(rn->n_saves > 0 ? OP(gdn_keep, .gdn = a, .saves = rn->step->saves, .n_saves = rn->n_saves) : run_gdn(rn, &a));
    return project(rn, l->out, at(rn, m->at.mix), values, at(rn, m->at.h), c->hidden, true);
}

/* h += W_o (sigmoid(G) * attention(Q, K, V)).  `first`: the drafter has no entry at position 0. */
static int attention(struct run *rn, const struct qwen35_layer *l, int32_t first)
{
    struct arle_model *m = rn->m;
    const struct qwen35_config *c = &m->cfg;
    int64_t ld = (int64_t)m->at.ld_proj, heads = (int64_t)c->n_heads * c->head_dim;
    struct arle_paged kv = { .base = m->kv.base, .page_stride = m->kv.stride, .offset = l->kv_offset,
                             .entry_stride = m->entry_stride, .dtype = m->caps.kv_dtype };

    TRY(norm_project(rn, l));               /* per head: query, gate; then keys; then values */
    TRY(OP(attn_prepare, .dtype = m->caps.compute, .n_q = c->n_heads, .n_kv = c->n_kv, .head_dim = c->head_dim,
           .rot_dim = c->rot_dim, .eps = c->eps, .w_offset = 1, .rope_scale = c->rope_scale, .batch = rn->b,
           .qkv = at(rn, m->at.proj), .ld_qkv = ld, .q_off = 0, .q_head_stride = 2 * (int64_t)c->head_dim, .k_off = 2 * heads,
           .v_off = 2 * heads + (int64_t)c->n_kv * c->head_dim, .q_norm = data(rn, l->q_norm), .k_norm = data(rn, l->k_norm),
           .inv_freq = data(rn, m->inv_freq), .kv = kv, .q_out = at(rn, m->at.q)));
    TRY(OP(attn_paged, .dtype = m->caps.compute, .n_q = c->n_heads, .n_kv = c->n_kv, .head_dim = c->head_dim,
           .scale = 1.0f / __builtin_sqrtf((float)c->head_dim), .batch = rn->b, .q = at(rn, m->at.q), .kv = kv,
           .gate_src = at(rn, m->at.proj), .ld_gate = ld, .gate_off = c->head_dim,
           .gate_head_stride = 2 * (int64_t)c->head_dim, .out = at(rn, m->at.mix), .ld_out = heads, .first = first));
    return project(rn, l->out, at(rn, m->at.mix), heads, at(rn, m->at.h), c->hidden, true);
}

/* act = silu(W_gate x) * (W_up x), x = RMS0(h) */
static int gated_units(struct run *rn, const struct qwen35_mlp *l)
{
    struct arle_model *m = rn->m;
    const struct qwen35_config *c = &m->cfg;
    if (m->coarse_gate_up)
        return OP(gate_up, COMMON, .eps = c->eps, .w_offset = 1, .x = at(rn, m->at.h), .ld_x = c->hidden,
                  .norm_w = data(rn, l->norm), .w = l->gate_up, .out = at(rn, m->at.act), .ld_out = c->inter,
                  .scratch = at(rn, m->at.work));
    TRY(norm(rn, l->norm, at(rn, m->at.h), at(rn, m->at.x), c->hidden));
    TRY(project(rn, l->gate_up, at(rn, m->at.x), c->hidden, at(rn, m->at.work), 2 * (int64_t)c->inter, false));
    return OP(silu_mul, COMMON, .dim = c->inter, .gu = at(rn, m->at.work), .ld_gu = 2 * (int64_t)c->inter,
              .out = at(rn, m->at.act), .ld_out = c->inter);
}

/* h += sum of the chosen experts + sigmoid(g x) shared expert, x = RMS0(h) */
static int mixture(struct run *rn, const struct qwen35_mlp *l)
{
    struct arle_model *m = rn->m;
    const struct qwen35_config *c = &m->cfg;
    const struct arle_moe_route_args route = {
        COMMON, .n_experts = c->n_experts, .k = c->top_k, .score = ARLE_MOE_SOFTMAX, .route_scale = 1, .x = at(rn, m->at.x), .ld_x = c->hidden,
        .router = l->router, .ids = at(rn, m->at.route_ids), .weights = at(rn, m->at.route_weights), .scratch = at(rn, m->at.route_scores) };
    const struct arle_moe_experts_args experts = {
        COMMON, .n_experts = c->n_experts, .k = c->top_k, .accumulate = 1, .x = route.x, .ld_x = c->hidden, .ids = route.ids,
        .weights = route.weights, .gate_up = l->experts_gate_up, .down = l->experts_down, .shared_gate_up = l->gate_up, .shared_down = l->down,
        .shared_gate = data(rn, l->shared_gate), .y = at(rn, m->at.h), .ld_y = c->hidden, .scratch = at(rn, m->at.work),
        .scratch_bytes = m->at.work_bytes };
    if (m->coarse_moe)
        return OP(norm_moe, .eps = c->eps, .w_offset = 1, .h = at(rn, m->at.h), .ld_h = c->hidden, .norm_w = data(rn, l->norm), .route = route,
                  .experts = experts);
    TRY(norm(rn, l->norm, at(rn, m->at.h), at(rn, m->at.x), c->hidden));
    TRY(run_moe_route(rn, &route));
    return run_moe_experts(rn, &experts);
}

static int mlp(struct run *rn, const struct qwen35_mlp *l)
{
    struct arle_model *m = rn->m;
    if (m->cfg.n_experts > 0)
        return mixture(rn, l);
    TRY(gated_units(rn, l));
    return project(rn, l->down, at(rn, m->at.act), m->cfg.inter, at(rn, m->at.h), m->cfg.hidden, true);
}

/* logits = W_head RMS0(h) of the wanted rows, in f32 */
static int head(struct run *rn)
{
    struct arle_model *m = rn->m;
    const struct qwen35_config *c = &m->cfg;
    const struct arle_step *step = rn->step;
    if (step->n_rows == 0)
        return 0;
    TRY(OP(rmsnorm, .dtype = m->caps.compute, .n_tokens = step->n_rows, .dim = c->hidden, .eps = c->eps, .w_offset = 1,
           .x = at(rn, m->at.h), .ld_x = c->hidden, .rows = step->rows, .w = data(rn, m->norm), .out = at(rn, m->at.y),
           .ld_out = c->hidden));
    return OP(linear, .dtype = m->caps.compute, .out_dtype = ARLE_F32, .n_tokens = step->n_rows, .x = at(rn, m->at.y),
              .ld_x = c->hidden, .w = m->head, .y = step->logits, .ld_y = step->ld_logits);
}

/* Greedy picks from the drafter's hidden states in x, so many rows at a time that their logits fit. */
static int draft_picks(struct run *rn)
{
    struct arle_model *m = rn->m;
    const struct qwen35_config *c = &m->cfg;
    uint32_t n = rn->b->n_tokens, cap = m->caps.max_rows < m->caps.max_tokens ? m->caps.max_rows : m->caps.max_tokens;
    float *logits = at(rn, m->at.logits), *picks = at(rn, m->at.picks);
    for (uint32_t from = 0; from < n; from += cap) {
        uint32_t rows = n - from < cap ? n - from : cap;
        TRY(OP(linear, .dtype = m->caps.compute, .out_dtype = ARLE_F32, .n_tokens = rows,
               .x = column(rn, m->at.x, (uint64_t)from * c->hidden), .ld_x = c->hidden, .w = m->head, .y = logits,
               .ld_y = c->vocab));
        TRY(OP(sample, .n_rows = rows, .vocab = c->vocab, .n_valid = c->n_valid, .logits = logits, .ld = c->vocab,
               .rows = at(rn, m->at.pick_rows), .ids = rn->step->drafts + from, .logprob = picks, .target_logprob = picks + cap,
               .top_logits = picks + 2 * cap, .top_ids = (int32_t *)(picks + 3 * cap),
               .top_logprobs = picks + (3 + ARLE_MAX_TOP) * cap, .pos = rn->b->pos + from));
    }
    return 0;
}

/*
 * The drafter: for the token x_p, c = RMS0(y_{p-1}) and e = RMS0(embed(x_p)) become one vector, run through one attention layer
 * of its own, and the target's head names x_{p+1}. Its entry lies at position p and not at p - 1, where it would fall into
 * a page that other sequences share; position 0 has no y before it and is never attended. All positions are off by one
 * alike, which rotary embedding does not see.
 */
static int drafts(struct run *rn)
{
    struct arle_model *m = rn->m;
    const struct qwen35_config *c = &m->cfg;
    int64_t two = 2 * (int64_t)c->hidden;
    TRY(norm(rn, m->norm, at(rn, m->at.h), at(rn, m->at.hidden_all), c->hidden));
    const struct arle_seq_shift_args shift = {
        .dtype = m->caps.compute, .dim = c->hidden, .batch = rn->b, .x = at(rn, m->at.hidden_all), .ld_x = c->hidden,
        .record = state_at(rn, m->prev_hidden_offset), .out = at(rn, m->at.shifted), .ld_out = c->hidden,
    };
    TRY(rn->n_saves > 0 ? OP(seq_shift_keep, .shift = shift, .saves = rn->step->saves, .n_saves = rn->n_saves) : run_seq_shift(rn, &shift));
    TRY(OP(embed, COMMON, .ids = rn->b->ids, .sampled = rn->b->sampled, .table = m->embed, .out = at(rn, m->at.h),
           .ld_out = c->hidden));
    TRY(norm(rn, m->mtp.norm_embed, at(rn, m->at.h), at(rn, m->at.pair), two));
    TRY(norm(rn, m->mtp.norm_hidden, at(rn, m->at.shifted), column(rn, m->at.pair, c->hidden), two));
    TRY(project(rn, m->mtp.fc, at(rn, m->at.pair), two, at(rn, m->at.h), c->hidden, false));
    TRY(attention(rn, &m->mtp.layer, 1));
    TRY(mlp(rn, &m->mtp.layer.mlp));
    TRY(norm(rn, m->mtp.norm, at(rn, m->at.h), at(rn, m->at.x), c->hidden));
    return draft_picks(rn);
}

static int check_step(const struct arle_model *m, const struct arle_step *s, struct arle_err *err)
{
    if (m->kv.base == NULL)
        return arle_err_set(err, -EINVAL, "the model's caches are not bound");
    if (s->batch.n_tokens > m->caps.max_tokens || s->batch.n_seqs > m->caps.max_seqs || s->n_rows > m->caps.max_rows)
        return arle_err_set(err, -EINVAL, "step of %u tokens, %u sequences, %u rows exceeds what was loaded for (%u, %u, %u)",
                            s->batch.n_tokens, s->batch.n_seqs, s->n_rows, m->caps.max_tokens, m->caps.max_seqs,
                            m->caps.max_rows);
    if (s->batch.page_tokens != m->caps.page_tokens)
        return arle_err_set(err, -EINVAL, "step with pages of %u tokens, loaded for %u", s->batch.page_tokens,
                            m->caps.page_tokens);
    if ((s->flags & ARLE_STEP_DRAFTS) && (!m->has_drafter || s->drafts == NULL))
        return arle_err_set(err, -EINVAL, "drafts are asked of a model without a drafter, or without a place for them");
    return 0;
}

int qwen35_step(struct arle_model *m, struct arle_stream *st, const struct arle_step *step, struct arle_err *err)
{
    struct run run = { .m = m, .st = st, .step = step, .b = &step->batch, .err = err }, *rn = &run;
    TRY(check_step(m, step, err));
    if (step->struct_size >= offsetof(struct arle_step, n_saves) + sizeof step->n_saves)
        run.n_saves = step->n_saves;
    if (run.n_saves > m->desc.max_saves)
        return arle_err_set(err, -EINVAL, "step with %u states to keep, at most %u are possible", run.n_saves, m->desc.max_saves);
    if (step->batch.n_tokens == 0)
        return 0;
    TRY(OP(embed, COMMON, .ids = rn->b->ids, .sampled = rn->b->sampled, .table = m->embed, .out = at(rn, m->at.h),
           .ld_out = m->cfg.hidden));
    for (uint32_t i = 0; i < m->cfg.n_layers; i++) {
        const struct qwen35_layer *l = &m->layer[i];
        TRY(l->full ? attention(rn, l, 0) : delta_net(rn, l));
        TRY(mlp(rn, &l->mlp));
    }
    TRY(head(rn));
    return step->flags & ARLE_STEP_DRAFTS ? drafts(rn) : 0;
}
