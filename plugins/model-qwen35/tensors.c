/*
 * The checkpoint's tensors by name: which there must be, of which shape, and which are packed together.
 *
 * The same walk runs twice. First it only looks: a tensor that is missing, misshapen or of an unusable type is an error before
 * any device memory is spent, and the sizes are summed. Then it packs. Layouts it knows: multimodal and text-only prefixes,
 * experts fused in one tensor or one by one, tied and untied heads, FP8 with 128x128 blocks (told by X.weight_scale_inv beside
 * X.weight). Foreign ones (MLX, GGUF, packed 4-bit) are recognised to be refused with a reason.
 */
#include "model.h"

#include <stdlib.h>
#include <string.h>

struct walk {
    const struct arle_model_load *a;
    const struct qwen35_config *c;
    struct arle_model *m;           /* NULL: look only */
    const char *prefix;             /* "model.language_model." or "model." */
    char layer[64];                 /* "model.layers.3." : prefix of the tensors at hand */
    struct qwen35_totals sum;
    uint64_t total, packed;         /* for progress */
    bool aside;                     /* what is packed now is not read by a decode row of the target model */
    double read_share;              /* part of the weight that one decode row reads: k / E for experts */
    struct arle_err *err;
};

/* The parts of one weight. Tensors that exist only as a shape live in `shape`. */
struct parts {
    struct arle_weight_part *p;
    struct arle_tensor *shape;
    uint32_t n, cap;
    int64_t rows;
    int failed;                     /* first error; later calls do nothing */
};

#define RMS0_STD 0.02               /* random mode: norm weights around their centre, projections as initialised */
#define LINEAR_STD 0.02

static bool has(const struct walk *w, const char *name)
{
    return w->a->weights != NULL && !w->a->weights->random && w->a->weights->find(w->a->weights, name) != NULL;
}

static bool from_file(const struct walk *w)
{
    return w->a->weights != NULL && !w->a->weights->random;
}

static int parts_init(struct walk *w, struct parts *ps, uint32_t cap)
{
    *ps = (struct parts){ .cap = cap };
    ps->p = calloc(cap, sizeof *ps->p);
    ps->shape = calloc(cap, sizeof *ps->shape);
    if (ps->p == NULL || ps->shape == NULL)
        ps->failed = arle_err_set(w->err, -ENOMEM, "no memory to list the parts of a weight");
    return ps->failed;
}

static void parts_fini(struct parts *ps)
{
    free(ps->p);
    free(ps->shape);
}

static const char *shape_text(uint32_t n, const int64_t *dim, char *buf, size_t cap)
{
    size_t at = (size_t)snprintf(buf, cap, "[");
    for (uint32_t i = 0; i < n && at < cap; i++)
        at += (size_t)snprintf(buf + at, cap - at, "%s%lld", i ? ", " : "", (long long)dim[i]);
    if (at < cap)
        snprintf(buf + at, cap - at, "]");
    return buf;
}

/* What a tensor should be. */
struct spec { const char *name; uint32_t n_dims; int64_t dim[3]; double mean, std; };

static int check_file_tensor(struct walk *w, const struct spec *s, const struct arle_tensor *t)
{
    char want[64], got[64];
    if (t == NULL)
        return arle_err_param(w->err, -EINVAL, s->name, "tensor %s is missing (expected shape %s)", s->name,
                              shape_text(s->n_dims, s->dim, want, sizeof want));
    if (t->n_dims != s->n_dims || memcmp(t->dim, s->dim, s->n_dims * sizeof s->dim[0]) != 0)
        return arle_err_param(w->err, -EINVAL, s->name, "tensor %s has shape %s, expected %s", s->name,
                              shape_text(t->n_dims, t->dim, got, sizeof got),
                              shape_text(s->n_dims, s->dim, want, sizeof want));
    return 0;
}

/* X.weight_scale_inv beside X.weight, checked; NULL when there is none. */
static int find_scale(struct walk *w, const struct spec *s, const struct arle_tensor **out)
{
    char name[320], want[64], got[64];
    *out = NULL;
    size_t n = strlen(s->name);
    if (n < 7 || strcmp(s->name + n - 7, ".weight") != 0)
        return 0;
    snprintf(name, sizeof name, "%s_scale_inv", s->name);
    const struct arle_tensor *t = w->a->weights->find(w->a->weights, name);
    if (t == NULL)
        return 0;
    int64_t dim[2] = { (s->dim[0] + 127) / 128, (s->dim[1] + 127) / 128 };
    if (s->n_dims != 2 || t->n_dims != 2 || t->dim[0] != dim[0] || t->dim[1] != dim[1])
        return arle_err_param(w->err, -EINVAL, name, "tensor %s has shape %s, expected %s", name,
                              shape_text(t->n_dims, t->dim, got, sizeof got), shape_text(2, dim, want, sizeof want));
    if (t->dtype != ARLE_BF16 && t->dtype != ARLE_F32)
        return arle_err_param(w->err, -EINVAL, name, "tensor %s: block scales must be BF16 or F32", name);
    *out = t;
    return 0;
}

static int check_dtype(struct walk *w, const struct spec *s, const struct arle_tensor *t, const struct arle_tensor *scale)
{
    if (scale != NULL && t->dtype != ARLE_F8E4M3)
        return arle_err_param(w->err, -EINVAL, s->name, "tensor %s has block scales, but is not F8_E4M3", s->name);
    if (scale == NULL && t->dtype == ARLE_F8E4M3)
        return arle_err_param(w->err, -EINVAL, s->name, "tensor %s is F8_E4M3 without %s_scale_inv", s->name, s->name);
    if (scale == NULL && t->dtype != ARLE_BF16 && t->dtype != ARLE_F16 && t->dtype != ARLE_F32)
        return arle_err_param(w->err, -EINVAL, s->name, "tensor %s: only BF16, F16, F32 and block-scaled F8_E4M3 are supported",
                              s->name);
    return 0;
}

/* The tensor of that name, checked: from the file, declared to the random view, or (predicting) a shape in *made. */
static int obtain(struct walk *w, const struct spec *s, struct arle_tensor *made, const struct arle_tensor **out,
                  const struct arle_tensor **out_scale)
{
    const struct arle_weights *view = w->a->weights;
    *out_scale = NULL;
    if (view != NULL && !view->random) {
        const struct arle_tensor *t = view->find(view, s->name), *scale = NULL;
        int r = check_file_tensor(w, s, t);
        if (r == 0)
            r = find_scale(w, s, &scale);
        if (r == 0)
            r = check_dtype(w, s, t, scale);
        if (r < 0)
            return r;
        *out = t;
        *out_scale = scale;
        return 0;
    }
    if (view != NULL) {
        int r = view->want(view, s->name, ARLE_BF16, s->n_dims, s->dim, s->mean, s->std, w->err);
        if (r < 0)
            return r;
        *out = view->find(view, s->name);
        return *out != NULL ? 0 : arle_err_param(w->err, -EINVAL, s->name, "tensor %s was declared but not found", s->name);
    }
    *made = (struct arle_tensor){ .name = "predicted", .dtype = ARLE_BF16, .n_dims = s->n_dims, .bytes = 2 };
    for (uint32_t i = 0; i < s->n_dims; i++) {
        made->dim[i] = s->dim[i];
        made->bytes *= (size_t)s->dim[i];
    }
    *out = made;
    return 0;
}

/* Adds rows [row0, row0 + n_rows) of a tensor to the weight. */
static void add_rows(struct walk *w, struct parts *ps, const struct spec *s, int64_t row0, int64_t n_rows)
{
    if (ps->failed)
        return;
    struct arle_weight_part *p = &ps->p[ps->n];
    ps->failed = obtain(w, s, &ps->shape[ps->n], &p->t, &p->scale);
    if (ps->failed)
        return;
    p->row0 = row0;
    p->n_rows = n_rows;
    p->format = p->scale != NULL ? ARLE_FMT_FP8_BLOCK : ARLE_FMT_PLAIN;
    p->bn = p->bk = p->scale != NULL ? 128 : 0;
    p->scale2 = 1;
    ps->n++;
    ps->rows += n_rows;
}

/* Adds the whole matrix `layer``name` [rows, k]. */
static void add(struct walk *w, struct parts *ps, const char *name, int64_t rows, int64_t k)
{
    char full[256];
    snprintf(full, sizeof full, "%s%s", w->layer, name);
    add_rows(w, ps, &(struct spec){ full, 2, { rows, k }, 0, LINEAR_STD }, 0, rows);
}

static int keep(struct walk *w, struct arle_weight *packed)
{
    struct arle_model *m = w->m;
    if (m->n_all == m->cap_all) {
        size_t cap = m->cap_all ? m->cap_all * 2 : 256;
        struct arle_weight **all = reallocarray(m->all, cap, sizeof *all);
        if (all == NULL) {
            m->backend->weight_destroy(m->dev, packed);
            return arle_err_set(w->err, -ENOMEM, "no memory for the list of weights");
        }
        m->all = all;
        m->cap_all = cap;
    }
    m->all[m->n_all++] = packed;
    return 0;
}

/* Ends a weight: sums it, or packs it into *slot and lets go of the file's pages. Frees the parts. */
static int finish(struct walk *w, struct parts *ps, const char *name, uint32_t role, uint32_t n_experts, int64_t k,
                  struct arle_weight **slot)
{
    char label[128];
    snprintf(label, sizeof label, "%s%s", w->layer, name);
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = role, .n_experts = n_experts, .n_parts = ps->n,
                                  .parts = ps->p, .k = k, .name = label };
    const struct arle_backend_api *be = w->a->backend;
    int r = ps->failed;
    if (r < 0)
        goto out;
    if (w->m == NULL) {
        uint64_t elements = (uint64_t)ps->rows * (role == ARLE_W_VECTOR ? 1 : (uint64_t)k);
        uint64_t bytes = be != NULL && ARLE_HAS(be, struct arle_backend_api, weight_predict)
                         ? be->weight_predict(w->a->device, &d) : elements * (role == ARLE_W_VECTOR ? 4 : 2);
        w->sum.device_bytes += bytes;
        w->sum.n_params += elements;
        if (!w->aside)
            w->sum.step_bytes += (uint64_t)((double)bytes * w->read_share);
        goto out;
    }
    r = be->weight_create(w->a->device, &d, slot, w->err);
    if (r == 0 && (r = keep(w, *slot)) < 0)
        *slot = NULL;
    if (r < 0)
        goto out;
    const struct arle_weights *view = w->a->weights;
    for (uint32_t i = 0; i < ps->n && view->done != NULL; i++)
        if (i + 1 == ps->n || ps->p[i + 1].t != ps->p[i].t)
            view->done(view, ps->p[i].t);
    w->packed += be->weight_bytes(*slot);
    if (w->a->progress != NULL)
        w->a->progress(w->a->progress_arg, w->packed, w->total);
out:
    parts_fini(ps);
    return r;
}

static int matrix(struct walk *w, const char *name, uint32_t role, int64_t rows, int64_t k, struct arle_weight **slot)
{
    struct parts ps;
    if (parts_init(w, &ps, 1) == 0)
        add(w, &ps, name, rows, k);
    return finish(w, &ps, name, role, 1, k, slot);
}

/* A vector of n values around `mean`, whatever its shape in the file. */
static int vector(struct walk *w, const struct spec *s, struct arle_weight **slot)
{
    struct parts ps;
    char full[256];
    struct spec named = *s;
    snprintf(full, sizeof full, "%s%s", w->layer, s->name);
    named.name = full;
    int64_t n = 1;
    for (uint32_t i = 0; i < s->n_dims; i++)
        n *= s->dim[i];
    if (parts_init(w, &ps, 1) == 0)
        add_rows(w, &ps, &named, 0, n);
    return finish(w, &ps, s->name, ARLE_W_VECTOR, 1, n, slot);
}

static int norm(struct walk *w, const char *name, int64_t n, struct arle_weight **slot)
{
    return vector(w, &(struct spec){ name, 1, { n }, 0, RMS0_STD }, slot);
}

/* ---- layers --------------------------------------------------------------------------------------------------------- */

/* qkv | z | a | b are one matrix when they are stored alike; FP8 packs keep a and b in bf16, which then stand apart. */
static int delta_net(struct walk *w, struct qwen35_layer *l)
{
    const struct qwen35_config *c = w->c;
    int64_t values = (int64_t)c->n_v * c->dv, conv = qwen35_conv_dim(c);
    struct parts ps, ab;
    if (parts_init(w, &ps, 4) == 0) {
        add(w, &ps, "linear_attn.in_proj_qkv.weight", conv, c->hidden);
        add(w, &ps, "linear_attn.in_proj_z.weight", values, c->hidden);
    }
    if (parts_init(w, &ab, 2) == 0) {
        add(w, &ab, "linear_attn.in_proj_a.weight", c->n_v, c->hidden);
        add(w, &ab, "linear_attn.in_proj_b.weight", c->n_v, c->hidden);
    }
    if (ps.failed == 0)
        ps.failed = ab.failed;
    bool apart = ps.failed == 0 && ab.p[0].format != ps.p[0].format;
    if (ps.failed == 0 && !apart) {
        memcpy(ps.p + 2, ab.p, 2 * sizeof *ab.p);      /* their shapes stay alive until finish() below */
        ps.n = 4;
        ps.rows += ab.rows;
    }
    int r = finish(w, &ps, "linear_attn.in_proj", ARLE_W_LINEAR, 1, c->hidden, &l->proj);
    if (apart && r == 0)
        r = finish(w, &ab, "linear_attn.in_proj_ab", ARLE_W_LINEAR, 1, c->hidden, &l->proj_ab);
    else
        parts_fini(&ab);

    if (r == 0)
        r = vector(w, &(struct spec){ "linear_attn.conv1d.weight", 3, { conv, 1, 4 }, 0, 0.3 }, &l->conv);
    if (r == 0)
        r = vector(w, &(struct spec){ "linear_attn.A_log", 1, { c->n_v }, 1, 0.5 }, &l->A_log);
    if (r == 0)
        r = vector(w, &(struct spec){ "linear_attn.dt_bias", 1, { c->n_v }, 1, 0.1 }, &l->dt_bias);
    if (r == 0)
        r = vector(w, &(struct spec){ "linear_attn.norm.weight", 1, { c->dv }, 1, 0.1 }, &l->gate_norm);
    return r < 0 ? r : matrix(w, "linear_attn.out_proj.weight", ARLE_W_LINEAR, c->hidden, values, &l->out);
}

static int attention(struct walk *w, struct qwen35_layer *l)
{
    const struct qwen35_config *c = w->c;
    int64_t q = (int64_t)c->n_heads * c->head_dim, kv = (int64_t)c->n_kv * c->head_dim;
    struct parts ps;
    if (parts_init(w, &ps, 3) == 0) {
        add(w, &ps, "self_attn.q_proj.weight", 2 * q, c->hidden);      /* per head: query, then gate */
        add(w, &ps, "self_attn.k_proj.weight", kv, c->hidden);
        add(w, &ps, "self_attn.v_proj.weight", kv, c->hidden);
    }
    int r = finish(w, &ps, "self_attn.qkv_proj", ARLE_W_LINEAR, 1, c->hidden, &l->proj);
    if (r == 0)
        r = norm(w, "self_attn.q_norm.weight", c->head_dim, &l->q_norm);
    if (r == 0)
        r = norm(w, "self_attn.k_norm.weight", c->head_dim, &l->k_norm);
    return r < 0 ? r : matrix(w, "self_attn.o_proj.weight", ARLE_W_LINEAR, c->hidden, q, &l->out);
}

static bool has_gate_up_op(const struct walk *w)
{
    return w->a->backend == NULL || ARLE_HAS(w->a->backend->ops, struct arle_ops, gate_up);
}

/* gate and up, packed for the fused op when the backend has it. The shared expert is always packed for moe_experts. */
static int gate_up(struct walk *w, const char *gate, const char *up, int64_t inter, uint32_t role, struct arle_weight **slot)
{
    struct parts ps;
    if (parts_init(w, &ps, 2) == 0) {
        add(w, &ps, gate, inter, w->c->hidden);
        add(w, &ps, up, inter, w->c->hidden);
    }
    return finish(w, &ps, gate, role, 1, w->c->hidden, slot);
}

/* All experts in one tensor [E, 2m, H] and [E, H, m]. */
static int fused_experts(struct walk *w, struct qwen35_mlp *l)
{
    const struct qwen35_config *c = w->c;
    int64_t n = c->n_experts, m = c->moe_inter, h = c->hidden;
    char up[160], down[160];
    snprintf(up, sizeof up, "%smlp.experts.gate_up_proj", w->layer);
    snprintf(down, sizeof down, "%smlp.experts.down_proj", w->layer);
    struct parts ps;
    int r = parts_init(w, &ps, 2 * c->n_experts);
    for (int64_t i = 0; r == 0 && i < 2 * n; i++)
        add_rows(w, &ps, &(struct spec){ up, 3, { n, 2 * m, h }, 0, LINEAR_STD }, i * m, m);
    r = finish(w, &ps, "mlp.experts.gate_up", ARLE_W_EXPERTS_GATE_UP, c->n_experts, h, &l->experts_gate_up);
    if (r < 0)
        return r;
    r = parts_init(w, &ps, c->n_experts);
    for (int64_t i = 0; r == 0 && i < n; i++)
        add_rows(w, &ps, &(struct spec){ down, 3, { n, h, m }, 0, LINEAR_STD }, i * h, h);
    return finish(w, &ps, "mlp.experts.down", ARLE_W_EXPERTS, c->n_experts, m, &l->experts_down);
}

static int single_experts(struct walk *w, struct qwen35_mlp *l)
{
    const struct qwen35_config *c = w->c;
    char name[96];
    struct parts ps;
    int r = parts_init(w, &ps, 2 * c->n_experts);
    for (uint32_t e = 0; r == 0 && e < c->n_experts; e++) {
        snprintf(name, sizeof name, "mlp.experts.%u.gate_proj.weight", e);
        add(w, &ps, name, c->moe_inter, c->hidden);
        snprintf(name, sizeof name, "mlp.experts.%u.up_proj.weight", e);
        add(w, &ps, name, c->moe_inter, c->hidden);
    }
    r = finish(w, &ps, "mlp.experts.gate_up", ARLE_W_EXPERTS_GATE_UP, c->n_experts, c->hidden, &l->experts_gate_up);
    if (r < 0)
        return r;
    r = parts_init(w, &ps, c->n_experts);
    for (uint32_t e = 0; r == 0 && e < c->n_experts; e++) {
        snprintf(name, sizeof name, "mlp.experts.%u.down_proj.weight", e);
        add(w, &ps, name, c->hidden, c->moe_inter);
    }
    return finish(w, &ps, "mlp.experts.down", ARLE_W_EXPERTS, c->n_experts, c->moe_inter, &l->experts_down);
}

static int experts(struct walk *w, struct qwen35_mlp *l)
{
    char one[160];
    snprintf(one, sizeof one, "%smlp.experts.0.gate_proj.weight", w->layer);
    w->read_share = (double)w->c->top_k / w->c->n_experts;
    int r = has(w, one) ? single_experts(w, l) : fused_experts(w, l);
    w->read_share = 1;
    return r;
}

static int mixture(struct walk *w, struct qwen35_mlp *l)
{
    const struct qwen35_config *c = w->c;
    int r = matrix(w, "mlp.gate.weight", ARLE_W_LINEAR, c->n_experts, c->hidden, &l->router);
    if (r == 0)
        r = experts(w, l);
    if (r == 0)
        r = gate_up(w, "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight", c->shared_inter,
                    ARLE_W_GATE_UP, &l->gate_up);
    if (r == 0)
        r = matrix(w, "mlp.shared_expert.down_proj.weight", ARLE_W_LINEAR, c->hidden, c->shared_inter, &l->down);
    return r < 0 ? r : vector(w, &(struct spec){ "mlp.shared_expert_gate.weight", 2, { 1, c->hidden }, 0, LINEAR_STD },
                              &l->shared_gate);
}

static int mlp(struct walk *w, struct qwen35_mlp *l)
{
    const struct qwen35_config *c = w->c;
    int r = norm(w, "post_attention_layernorm.weight", c->hidden, &l->norm);
    if (r < 0 || c->n_experts > 0)
        return r < 0 ? r : mixture(w, l);
    r = gate_up(w, "mlp.gate_proj.weight", "mlp.up_proj.weight", c->inter,
                has_gate_up_op(w) ? ARLE_W_GATE_UP : ARLE_W_LINEAR, &l->gate_up);
    return r < 0 ? r : matrix(w, "mlp.down_proj.weight", ARLE_W_LINEAR, c->hidden, c->inter, &l->down);
}

static int layer(struct walk *w, struct qwen35_layer *l, bool full)
{
    char log_name[96], q_name[96];
    snprintf(log_name, sizeof log_name, "%slinear_attn.A_log", w->layer);
    snprintf(q_name, sizeof q_name, "%sself_attn.q_proj.weight", w->layer);
    const char *wrong = full ? log_name : q_name;
    if (has(w, wrong))
        return arle_err_param(w->err, -EINVAL, wrong, "tensor %s contradicts layer_types, which says %s there", wrong,
                              full ? "full_attention" : "linear_attention");
    l->full = full;
    int r = norm(w, "input_layernorm.weight", w->c->hidden, &l->norm);
    if (r == 0)
        r = full ? attention(w, l) : delta_net(w, l);
    return r < 0 ? r : mlp(w, &l->mlp);
}

static int drafter(struct walk *w)
{
    struct qwen35_layer none = { 0 };
    struct arle_weight *slot[4] = { 0 };
    int64_t h = w->c->hidden;
    w->aside = true;
    snprintf(w->layer, sizeof w->layer, "mtp.");
    int r = norm(w, "pre_fc_norm_embedding.weight", h, &slot[0]);
    if (r == 0)
        r = norm(w, "pre_fc_norm_hidden.weight", h, &slot[1]);
    if (r == 0)
        r = matrix(w, "fc.weight", ARLE_W_LINEAR, h, 2 * h, &slot[2]);
    if (r == 0)
        r = norm(w, "norm.weight", h, &slot[3]);
    if (r == 0) {
        snprintf(w->layer, sizeof w->layer, "mtp.layers.0.");
        r = layer(w, w->m != NULL ? &w->m->mtp.layer : &none, true);
    }
    if (r == 0 && w->m != NULL) {
        w->m->mtp.norm_embed = slot[0];
        w->m->mtp.norm_hidden = slot[1];
        w->m->mtp.fc = slot[2];
        w->m->mtp.norm = slot[3];
    }
    w->aside = false;
    return r;
}

/* ---- the whole ------------------------------------------------------------------------------------------------------ */

static int find_prefix(struct walk *w)
{
    static const char *const known[] = { "model.language_model.", "model." };
    char name[96];
    w->prefix = known[1];
    if (!from_file(w))
        return 0;
    for (size_t i = 0; i < 2; i++) {
        snprintf(name, sizeof name, "%sembed_tokens.weight", known[i]);
        if (has(w, name)) {
            w->prefix = known[i];
            return 0;
        }
    }
    if (has(w, "language_model.model.embed_tokens.weight") || has(w, "language_model.model.norm.weight"))
        return arle_err_param(w->err, -EINVAL, "language_model.model.embed_tokens.weight", "this is an MLX conversion (tensors "
                              "language_model.model.*), whose norms are stored differently; use the original checkpoint");
    if (has(w, "token_embd.weight"))
        return arle_err_param(w->err, -EINVAL, "token_embd.weight", "this is a GGUF conversion (tensor token_embd.weight), whose "
                              "heads are stored in another order; use the original checkpoint");
    return arle_err_param(w->err, -EINVAL, "model.embed_tokens.weight",
                          "neither model.language_model.embed_tokens.weight nor model.embed_tokens.weight is there");
}

/* Packed formats are known by the names of their companions; said once, instead of thousands of unknown tensors. */
static int refuse_foreign(struct walk *w)
{
    static const struct { const char *suffix, *what; } foreign[] = {
        { ".weight_packed", "compressed-tensors (NVFP4)" }, { ".weight_scale_2", "ModelOpt (NVFP4)" },
        { ".qweight", "GPTQ or AWQ" }, { ".biases", "MLX quantised" },
    };
    const struct arle_tensor *t;
    for (size_t i = 0; from_file(w) && (t = w->a->weights->at(w->a->weights, i)) != NULL; i++) {
        size_t n = strlen(t->name);
        for (size_t j = 0; j < sizeof foreign / sizeof foreign[0]; j++) {
            size_t m = strlen(foreign[j].suffix);
            if (n > m && strcmp(t->name + n - m, foreign[j].suffix) == 0)
                return arle_err_param(w->err, -EINVAL, t->name, "tensor %s: %s weights are not supported; use the bf16 or fp8 "
                                      "checkpoint", t->name, foreign[j].what);
        }
    }
    return 0;
}

static int ends(struct walk *w)
{
    const struct qwen35_config *c = w->c;
    struct arle_model none = { 0 }, *m = w->m != NULL ? w->m : &none;
    snprintf(w->layer, sizeof w->layer, "%s", w->prefix);
    w->read_share = c->tied ? 1 : 0;                    /* a decode row reads one line of the embedding, but all of the head */
    int r = matrix(w, "embed_tokens.weight", ARLE_W_EMBED, c->vocab, c->hidden, &m->embed);
    w->read_share = 1;
    if (r == 0)
        r = norm(w, "norm.weight", c->hidden, &m->norm);
    if (r < 0)
        return r;
    snprintf(w->layer, sizeof w->layer, "%s", "");
    if (!c->tied)
        return matrix(w, "lm_head.weight", ARLE_W_LINEAR, c->vocab, c->hidden, &m->head);
    if (from_file(w))
        w->a->weights->ignore(w->a->weights, "lm_head.weight");        /* a copy of the embedding, if there at all */
    m->head = m->embed;
    return 0;
}

/* Vision towers are not ours; a drafter that is not wanted is passed over. */
static void ignore_rest(struct walk *w)
{
    static const char *const others[] = { "model.visual.", "visual.", "vision_tower." };
    for (size_t i = 0; from_file(w) && i < 3; i++)
        w->a->weights->ignore(w->a->weights, others[i]);
    if (from_file(w) && !w->a->drafts)
        w->a->weights->ignore(w->a->weights, "mtp.");
}

int qwen35_tensors(const struct arle_model_load *a, const struct qwen35_config *cfg, struct arle_model *m,
                   uint64_t total_bytes, struct qwen35_totals *out, struct arle_err *err)
{
    struct walk w = { .a = a, .c = cfg, .m = m, .total = total_bytes, .read_share = 1, .err = err };
    int r = refuse_foreign(&w);
    if (r == 0)
        r = find_prefix(&w);
    if (r == 0)
        r = ends(&w);
    for (uint32_t i = 0; r == 0 && i < cfg->n_layers; i++) {
        struct qwen35_layer none = { 0 };
        snprintf(w.layer, sizeof w.layer, "%slayers.%u.", w.prefix, i);
        r = layer(&w, m != NULL ? &m->layer[i] : &none, cfg->full[i]);
    }
    w.sum.has_drafter = a->drafts && (from_file(&w) ? has(&w, "mtp.fc.weight") : cfg->mtp_layers > 0);
    if (r == 0 && w.sum.has_drafter)
        r = drafter(&w);
    if (r < 0)
        return r;
    ignore_rest(&w);
    *out = w.sum;
    return 0;
}
