/*
 * Load, predict, describe, bind, destroy: everything that spends memory, so that a step spends none.
 * tensors.c packs the weights; forward.c runs them.
 */
#include "model.h"
#include "entry.h"

#include <stdlib.h>
#include <string.h>

static uint64_t align_up(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

static uint32_t act_bytes(const struct qwen35_caps *k)
{
    return k->compute == ARLE_BF16 ? 2 : 4;
}

/* ---- what is asked of us -------------------------------------------------------------------------------------------- */

static int check_args(const struct arle_model_load *a, struct qwen35_caps *k, struct qwen35_config *c, struct arle_err *err)
{
    if (a->compute != ARLE_F32 && a->compute != ARLE_BF16)
        return arle_err_param(err, -EINVAL, "compute", "compute must be f32 or bf16 for this model");
    if (arle_kv_vector_bytes(a->kv_dtype, c->head_dim) == 0)
        return arle_err_param(err, -EINVAL, "kv_dtype", "this KV dtype is not supported by this model");
    if (a->kv_dtype == ARLE_I4G && c->head_dim % 128 != 0)
        return arle_err_param(err, -EINVAL, "kv_dtype", "4-bit KV entries need a head_dim that is a multiple of 128");
    if (a->page_tokens == 0 || a->page_tokens > 1u << 16)
        return arle_err_param(err, -EINVAL, "page_tokens", "page_tokens must lie from 1 to 65536");
    if (a->max_tokens == 0 || a->max_tokens > 1u << 20 || a->max_seqs == 0 || a->max_seqs > 1u << 20)
        return arle_err_param(err, -EINVAL, a->max_seqs == 0 ? "max_seqs" : "max_tokens",
                              "max_tokens and max_seqs must lie from 1 to 1048576");
    if (a->context > c->context)
        return arle_err_param(err, -EINVAL, "context", "context of %u positions exceeds the model's %u", a->context, c->context);
    if (a->context > 0)
        c->context = a->context;
    *k = (struct qwen35_caps){ .compute = a->compute, .kv_dtype = a->kv_dtype, .page_tokens = a->page_tokens,
                               .max_tokens = a->max_tokens, .max_seqs = a->max_seqs,
                               .max_rows = a->max_rows ? a->max_rows : 1 };
    return 0;
}

static int check_ops(const struct arle_model_load *a, const struct qwen35_config *c, bool drafter, struct arle_err *err)
{
    const struct arle_ops *ops = a->backend->ops;
    bool moe = c->n_experts > 0;
    const struct { const char *name; bool there, needed; } table[] = {
        { "embed", ARLE_HAS(ops, struct arle_ops, embed), true },
        { "rmsnorm", ARLE_HAS(ops, struct arle_ops, rmsnorm), true },
        { "linear", ARLE_HAS(ops, struct arle_ops, linear), true },
        { "silu_mul (or gate_up)",
          ARLE_HAS(ops, struct arle_ops, silu_mul) || ARLE_HAS(ops, struct arle_ops, gate_up), !moe },
        { "attn_prepare", ARLE_HAS(ops, struct arle_ops, attn_prepare), true },
        { "attn_paged", ARLE_HAS(ops, struct arle_ops, attn_paged), true },
        { "gdn", ARLE_HAS(ops, struct arle_ops, gdn), true },
        { "moe_route", ARLE_HAS(ops, struct arle_ops, moe_route), moe },
        { "moe_experts", ARLE_HAS(ops, struct arle_ops, moe_experts), moe },
        { "seq_shift", ARLE_HAS(ops, struct arle_ops, seq_shift), drafter },
        { "sample", ARLE_HAS(ops, struct arle_ops, sample), drafter },
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (table[i].needed && !table[i].there)
            return arle_err_param(err, -ENOTSUP, table[i].name, "the backend lacks op %s, which this model needs", table[i].name);
    return 0;
}

/* ---- layout of caches and scratch ----------------------------------------------------------------------------------- */

/*
 * Page: [attention layer][token][entry], the drafter's layer last. Record: per delta net layer the conv inputs, then S; last
 * the drafter's previous hidden state. m->layer may be NULL (prediction).
 */
static void lay_out_caches(struct arle_model *m)
{
    const struct qwen35_config *c = &m->cfg;
    uint32_t es = act_bytes(&m->caps);
    uint64_t page = 0, record = 0;
    m->entry_stride = align_up(2ull * c->n_kv * arle_kv_vector_bytes(m->caps.kv_dtype, c->head_dim), 16);
    for (uint32_t i = 0; i < c->n_layers + m->has_drafter; i++) {
        struct qwen35_layer *l = m->layer == NULL ? NULL : i < c->n_layers ? &m->layer[i] : &m->mtp.layer;
        if (i == c->n_layers || c->full[i]) {
            if (l != NULL)
                l->kv_offset = page;
            page += m->entry_stride * m->caps.page_tokens;
            continue;
        }
        if (l != NULL) {
            l->conv_offset = record;
            l->s_offset = align_up(record + 3ull * qwen35_conv_dim(c) * es, 256);
        }
        record = align_up(record + 3ull * qwen35_conv_dim(c) * es, 256) + align_up(4ull * c->n_v * c->dk * c->dv, 256);
    }
    m->prev_hidden_offset = record;
    if (m->has_drafter)
        record += align_up((uint64_t)c->hidden * es, 256);
    m->groups[0] = (struct arle_cache_group){ .name = "kv", .kind = ARLE_CACHE_PAGED, .tokens_per_entry = 1,
                                              .dtype = m->caps.kv_dtype, .page_bytes = page };
    m->groups[1] = (struct arle_cache_group){ .name = "delta", .kind = ARLE_CACHE_STATE, .tokens_per_entry = 1,
                                              .dtype = ARLE_F32, .record_bytes = record };
}

static uint64_t region(struct qwen35_scratch *s, uint64_t bytes)
{
    uint64_t at = s->total;
    s->total = align_up(at + bytes, 256);
    return at;
}

static uint64_t max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static uint64_t work_bytes(const struct qwen35_config *c, uint64_t n, uint32_t es)
{
    uint64_t gdn = n * (qwen35_conv_dim(c) + (uint64_t)c->n_v * (c->dk + 2 * c->dv + 8)) * 4;
    uint64_t dense = n * (c->hidden + 2ull * c->inter) * es;
    uint64_t width = max_u64(c->moe_inter, c->shared_inter);
    uint64_t moe = c->n_experts == 0 ? 0 : n * ((c->top_k + 1) * (3 * width + c->hidden) + c->hidden) * 4 + 65536;
    return max_u64(max_u64(gdn, dense), moe);
}

/* How many rows of draft logits exist at a time: T x vocab of them would dwarf everything else. */
static uint32_t draft_rows(const struct arle_model *m)
{
    return m->caps.max_rows < m->caps.max_tokens ? m->caps.max_rows : m->caps.max_tokens;
}

static void lay_out_scratch(struct arle_model *m)
{
    const struct qwen35_config *c = &m->cfg;
    uint64_t n = m->caps.max_tokens, es = act_bytes(&m->caps), row = (uint64_t)c->hidden * es;
    struct qwen35_scratch s = { .ld_proj = align_up(max_u64(qwen35_linear_columns(c), qwen35_full_columns(c)), 64) };
    uint64_t heads = (uint64_t)c->n_heads * c->head_dim, values = (uint64_t)c->n_v * c->dv;
    s.h = region(&s, n * row);
    s.x = region(&s, n * row);
    s.proj = region(&s, n * s.ld_proj * es);
    s.q = region(&s, n * heads * es);
    s.mix = region(&s, n * max_u64(heads, values) * es);
    s.act = region(&s, n * c->inter * es);
    s.work_bytes = work_bytes(c, n, (uint32_t)es);
    s.work = region(&s, s.work_bytes);
    s.route_ids = region(&s, n * c->top_k * 4);
    s.route_weights = region(&s, n * c->top_k * 4);
    s.route_scores = region(&s, n * c->n_experts * 4);
    s.y = region(&s, m->caps.max_rows * row);
    if (m->has_drafter) {
        uint64_t rows = draft_rows(m);
        s.hidden_all = region(&s, n * row);
        s.shifted = region(&s, n * row);
        s.pair = region(&s, n * 2 * row);
        s.logits = region(&s, rows * c->vocab * 4);
        s.picks = region(&s, rows * (3 + 2 * ARLE_MAX_TOP) * 4);       /* what sample reports beside the ids */
        s.pick_rows = region(&s, rows * sizeof(struct arle_sample_row));
    }
    m->at = s;
}

/* Small models, and the two smallest published ones, answer directly unless asked to think; larger ones think by default. */
bool qwen35_thinks(const struct qwen35_config *c)
{
    return c->n_layers > 24;
}

static const char *chat_options(const struct qwen35_config *c)
{
    if (qwen35_thinks(c))
        return c->json_arguments ? "{\"enable_thinking\": true, \"template\": \"3.6\"}"
                                 : "{\"enable_thinking\": true, \"template\": \"3.5\"}";
    return c->json_arguments ? "{\"enable_thinking\": false, \"template\": \"3.6\"}"
                             : "{\"enable_thinking\": false, \"template\": \"3.5\"}";
}

static void fill_desc(struct arle_model *m, const struct qwen35_totals *t, const struct arle_backend_api *be)
{
    const struct qwen35_config *c = &m->cfg;
    m->desc = (struct arle_model_desc){
        .struct_size = sizeof m->desc, .vocab = c->vocab, .n_valid = c->n_valid, .context = c->context, .n_groups = 2,
        .page_multiple = 1, .has_drafter = m->has_drafter, .hidden = c->hidden, .groups = m->groups,
        .weight_bytes = t->device_bytes, .scratch_bytes = m->at.total, .step_weight_bytes = t->step_bytes,
        .n_params = t->n_params, .max_saves = be != NULL && arle_ops_keep(be->ops) ? ARLE_MAX_SAVES : 0,
        .arch = c->n_experts > 0 ? "Qwen3.5 MoE" : "Qwen3.5", .chat_options = chat_options(c),
    };
}

/* Everything of a model that costs no memory: configuration, checks, sizes. */
static int prepare(const struct arle_model_load *a, struct arle_model *m, struct qwen35_totals *t, struct arle_err *err)
{
    int r = qwen35_config_parse(a->config_json, a->config_len, &m->cfg, err);
    if (r == 0)
        r = check_args(a, &m->caps, &m->cfg, err);
    if (r == 0 && a->backend != NULL)
        r = check_ops(a, &m->cfg, false, err);
    if (r == 0)
        r = qwen35_tensors(a, &m->cfg, NULL, 0, t, err);
    if (r == 0 && a->backend != NULL)
        r = check_ops(a, &m->cfg, t->has_drafter, err);
    if (r < 0)
        return r;
    m->has_drafter = t->has_drafter;
    lay_out_caches(m);
    lay_out_scratch(m);
    fill_desc(m, t, a->backend);
    return 0;
}

int qwen35_predict(void *ctx, const struct arle_model_load *args, struct arle_model_desc *out, struct arle_err *err)
{
    /* The answer points at its groups; a later call of the same thread reuses them. */
    static _Thread_local struct arle_cache_group groups[2];
    struct arle_model m = { 0 };
    struct qwen35_totals t;
    int r = prepare(args, &m, &t, err);
    if (r < 0)
        return r;
    memcpy(groups, m.groups, sizeof groups);
    m.desc.groups = groups;
    memcpy(out, &m.desc, out->struct_size < sizeof m.desc ? out->struct_size : sizeof m.desc);
    return 0;
}

/* ---- load ----------------------------------------------------------------------------------------------------------- */

/* A vector that is no tensor of the checkpoint. */
static int make_constant(struct arle_model *m, const float *data, uint32_t n, struct arle_weight **out, struct arle_err *err)
{
    struct arle_tensor t = { .name = "inv_freq", .dtype = ARLE_F32, .n_dims = 1, .dim = { n }, .data = data, .bytes = n * 4ull };
    struct arle_weight_part part = { .t = &t, .n_rows = n, .scale2 = 1 };
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = ARLE_W_VECTOR, .n_experts = 1, .n_parts = 1, .parts = &part,
                                  .k = n, .name = "inv_freq" };
    return m->backend->weight_create(m->dev, &d, out, err);
}

/* The drafter picks greedily: the same row description for every row, written once. */
static int write_pick_rows(struct arle_model *m, struct arle_err *err)
{
    const struct arle_mem_ops *mem = &m->backend->mem;
    uint32_t n = draft_rows(m);
    struct arle_sample_row *rows = calloc(n, sizeof *rows);
    struct arle_stream *st = NULL;
    if (rows == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the drafter's rows");
    for (uint32_t i = 0; i < n; i++)
        rows[i] = (struct arle_sample_row){ .top_p = 1, .repetition = 1, .target = -1 };
    int r = mem->stream_create(m->dev, &st, err);
    if (r == 0) {
        r = mem->copy(m->dev, st, m->scratch + m->at.pick_rows, rows, n * sizeof *rows, ARLE_COPY_H2D);
        if (r < 0)
            arle_err_set(err, r, "cannot copy the drafter's rows to the device");
        else
            r = mem->stream_sync(m->dev, st, err);
        mem->stream_destroy(m->dev, st);
    }
    free(rows);
    return r;
}

int qwen35_load(void *ctx, const struct arle_model_load *args, struct arle_model **out, struct arle_err *err)
{
    if (args->weights == NULL || args->backend == NULL || args->device == NULL)
        return arle_err_set(err, -EINVAL, "a load needs weights, a backend and a device");
    struct arle_model *m = calloc(1, sizeof *m);
    struct qwen35_totals t, packed;
    if (m == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the model");
    m->backend = args->backend;
    m->dev = args->device;
    m->coarse_norm = ARLE_HAS(args->backend->ops, struct arle_ops, norm_linear);
    m->coarse_gate_up = ARLE_HAS(args->backend->ops, struct arle_ops, gate_up);
    m->coarse_moe = ARLE_HAS(args->backend->ops, struct arle_ops, norm_moe);

    int r = prepare(args, m, &t, err);
    if (r < 0)
        goto fail;
    m->layer = calloc(m->cfg.n_layers, sizeof *m->layer);
    if (m->layer == NULL) {
        r = arle_err_set(err, -ENOMEM, "no memory for the list of layers");
        goto fail;
    }
    r = qwen35_tensors(args, &m->cfg, m, t.device_bytes, &packed, err);
    if (r == 0)
        r = make_constant(m, m->cfg.inv_freq, m->cfg.rot_dim / 2, &m->inv_freq, err);
    if (r < 0)
        goto fail;
    lay_out_caches(m);                      /* again: now there are layers to tell */

    m->desc.weight_bytes = 0;
    for (size_t i = 0; i < m->n_all; i++)
        m->desc.weight_bytes += m->backend->weight_bytes(m->all[i]);
    r = m->backend->mem.alloc(m->dev, ARLE_MEM_DEVICE, m->at.total, (void **)&m->scratch, err);
    if (r == 0 && m->has_drafter)
        r = write_pick_rows(m, err);
    if (r < 0)
        goto fail;
    qwen35_loaded(ctx, &m->cfg);
    *out = m;
    return 0;
fail:
    qwen35_destroy(m);
    return r;
}

void qwen35_destroy(struct arle_model *m)
{
    if (m == NULL)
        return;
    if (m->scratch != NULL)
        m->backend->mem.free(m->dev, ARLE_MEM_DEVICE, m->scratch);
    for (size_t i = m->n_all; i-- > 0;)
        m->backend->weight_destroy(m->dev, m->all[i]);
    if (m->inv_freq != NULL)
        m->backend->weight_destroy(m->dev, m->inv_freq);
    free(m->all);
    free(m->layer);
    free(m);
}

const struct arle_model_desc *qwen35_describe(const struct arle_model *m)
{
    return &m->desc;
}

int qwen35_bind(struct arle_model *m, const struct arle_cache_binding *caches, struct arle_err *err)
{
    if (caches->n_groups != 2 || caches->group[0].base == NULL || caches->group[1].base == NULL)
        return arle_err_set(err, -EINVAL, "this model binds two cache groups, kv and delta");
    if (caches->group[0].stride < m->groups[0].page_bytes || caches->group[1].stride < m->groups[1].record_bytes)
        return arle_err_set(err, -EINVAL, "a cache group is bound with less memory per page or record than it asked for");
    m->kv.base = caches->group[0].base;
    m->kv.stride = caches->group[0].stride;
    m->delta.base = caches->group[1].base;
    m->delta.stride = caches->group[1].stride;
    return 0;
}
