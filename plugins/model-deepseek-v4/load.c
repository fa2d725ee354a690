/*
 * From checkpoint tensors to a model: finds each tensor under its published name or the names transformers uses, checks
 * shape and dtype, packs it, and lays out caches and scratch. The same walk with `dry` set only adds up what it would
 * take, so that predict() and load() cannot disagree. Called by entry.c; forward.c uses the result.
 */
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PARTS_EXTRA 16

struct builder {
    const struct arle_model_load *a;
    struct arle_model *m;
    const struct ds_config *c;
    bool dry;
    uint64_t weight_bytes, scratch_bytes, params, step_bytes, done, total;
    struct arle_tensor *made;           /* descriptions of tensors that no file holds */
    char (*made_name)[96];
    uint32_t n_made, cap_made;
    struct arle_weight_part *parts;     /* of the weight being gathered */
    uint32_t n_parts;
    bool part_quant;                    /* the parts gathered so far are quantised: activations are too */
    struct arle_err *err;
};

/* Published name first, then what transformers saves, then its module names; %s is the part after the layer prefix. */
static const struct { const char *name, *alias[3]; } aliases[] = {
    { "embed.weight", { "embed_tokens.weight" } },
    { "head.weight", { "lm_head.weight" } },
    { "hc_head_fn", { "hc_head.hc_fn" } }, { "hc_head_base", { "hc_head.hc_base" } }, { "hc_head_scale", { "hc_head.hc_scale" } },
    { "attn_norm.weight", { "input_layernorm.weight" } },
    { "ffn_norm.weight", { "post_attention_layernorm.weight" } },
    { "hc_attn_fn", { "attn_hc.fn" } }, { "hc_attn_base", { "attn_hc.base" } }, { "hc_attn_scale", { "attn_hc.scale" } },
    { "hc_ffn_fn", { "ffn_hc.fn" } }, { "hc_ffn_base", { "ffn_hc.base" } }, { "hc_ffn_scale", { "ffn_hc.scale" } },
    { "attn.attn_sink", { "self_attn.sinks" } },
    { "attn.wq_a.weight", { "self_attn.q_a_proj.weight" } }, { "attn.q_norm.weight", { "self_attn.q_a_norm.weight" } },
    { "attn.wq_b.weight", { "self_attn.q_b_proj.weight" } }, { "attn.wkv.weight", { "self_attn.kv_proj.weight" } },
    { "attn.kv_norm.weight", { "attn.norm.weight", "self_attn.kv_norm.weight" } },
    { "attn.wo_a.weight", { "self_attn.o_a_proj.weight" } }, { "attn.wo_b.weight", { "self_attn.o_b_proj.weight" } },
    { "attn.compressor.ape", { "self_attn.compressor.position_bias" } },
    { "attn.compressor.wkv.weight", { "self_attn.compressor.kv_proj.weight" } },
    { "attn.compressor.wgate.weight", { "self_attn.compressor.gate_proj.weight" } },
    { "attn.compressor.norm.weight", { "self_attn.compressor.kv_norm.weight" } },
    { "attn.indexer.wq_b.weight", { "self_attn.compressor.indexer.q_b_proj.weight" } },
    { "attn.indexer.weights_proj.weight", { "self_attn.compressor.indexer.weights_proj.weight",
                                            "self_attn.compressor.indexer.scorer.weights_proj.weight" } },
    { "attn.indexer.compressor.ape", { "self_attn.compressor.indexer.position_bias" } },
    { "attn.indexer.compressor.wkv.weight", { "self_attn.compressor.indexer.kv_proj.weight" } },
    { "attn.indexer.compressor.wgate.weight", { "self_attn.compressor.indexer.gate_proj.weight" } },
    { "attn.indexer.compressor.norm.weight", { "self_attn.compressor.indexer.kv_norm.weight" } },
    { "ffn.gate.weight", { "mlp.gate.weight" } },
    { "ffn.gate.bias", { "mlp.gate.e_score_correction_bias" } },
    { "ffn.gate.tid2eid", { "mlp.gate.tid2eid" } },
    { "ffn.shared_experts.w1.weight", { "mlp.shared_experts.gate_proj.weight" } },
    { "ffn.shared_experts.w3.weight", { "mlp.shared_experts.up_proj.weight" } },
    { "ffn.shared_experts.w2.weight", { "mlp.shared_experts.down_proj.weight" } },
};

/* prefix: "" for global tensors, "layers.3." or "mtp.0." for blocks. */
static const struct arle_tensor *lookup(const struct arle_weights *w, const char *prefix, const char *name)
{
    static const char *const roots[] = { "", "model." };
    char full[160];
    for (size_t r = 0; r < 2; r++) {
        snprintf(full, sizeof full, "%s%s%s", roots[r], prefix, name);
        const struct arle_tensor *t = w->find(w, full);
        if (t != NULL)
            return t;
        for (size_t i = 0; i < sizeof aliases / sizeof aliases[0]; i++)
            for (size_t j = 0; strcmp(aliases[i].name, name) == 0 && j < 3 && aliases[i].alias[j]; j++) {
                snprintf(full, sizeof full, "%s%s%s", roots[r], prefix, aliases[i].alias[j]);
                if ((t = w->find(w, full)) != NULL)
                    return t;
            }
    }
    return NULL;
}

static bool from_file(const struct builder *b)
{
    return b->a->weights != NULL && !b->a->weights->random;
}

/* A tensor that exists only as a description: predict() without weights, or random mode. */
static const struct arle_tensor *make(struct builder *b, const char *prefix, const char *name, uint32_t dtype,
                                      int64_t rows, int64_t cols, double mean, double scale)
{
    if (b->n_made == b->cap_made)
        return NULL;
    char *full = b->made_name[b->n_made];
    snprintf(full, sizeof b->made_name[0], "%s%s", prefix, name);
    int64_t dim[2] = { rows, cols };
    uint32_t n_dims = cols ? 2 : 1;
    if (b->a->weights != NULL) {
        if (b->a->weights->want(b->a->weights, full, dtype, n_dims, dim, mean, scale, b->err) < 0)
            return NULL;
        b->n_made++;
        return b->a->weights->find(b->a->weights, full);
    }
    struct arle_tensor *t = &b->made[b->n_made++];
    *t = (struct arle_tensor){ .name = full, .dtype = dtype, .n_dims = n_dims, .dim = { rows, cols },
                               .bytes = arle_dtype_size(dtype) * (size_t)rows * (size_t)(cols ? cols : 1) };
    return t;
}

static int64_t folded_rows(const struct arle_tensor *t)
{
    int64_t n = 1;
    for (uint32_t i = 0; i + 1 < t->n_dims; i++)
        n *= t->dim[i];
    return n;
}

static int bad_shape(struct builder *b, const struct arle_tensor *t, int64_t rows, int64_t cols)
{
    return arle_err_param(b->err, -EINVAL, t->name, "tensor %s has shape [%lld, %lld], config.json asks for [%lld, %lld]", t->name,
                          (long long)folded_rows(t), (long long)(t->n_dims ? t->dim[t->n_dims - 1] : 0), (long long)rows, (long long)cols);
}

static int missing(struct builder *b, const char *prefix, const char *name)
{
    if (b->err != NULL && b->err->code < 0)
        return b->err->code;
    return arle_err_param(b->err, -ENOENT, name, "tensor %s%s is missing from the checkpoint", prefix, name);
}

/* The scale tensor of a quantised matrix: X.scale, or X.weight_scale_inv as transformers calls it. */
static const struct arle_tensor *lookup_scale(const struct arle_weights *w, const char *prefix, const char *name)
{
    char alt[96];
    size_t stem = strlen(name) - strlen(".weight");
    snprintf(alt, sizeof alt, "%.*s.scale", (int)stem, name);
    const struct arle_tensor *t = lookup(w, prefix, alt);
    if (t != NULL)
        return t;
    snprintf(alt, sizeof alt, "%s_scale_inv", name);
    return lookup(w, prefix, alt);
}

static int check_scale(struct builder *b, const struct arle_tensor *t, const struct arle_tensor *s, int64_t rows, int64_t cols,
                       bool fp4)
{
    int64_t want_r = fp4 ? rows : (rows + 127) / 128, want_c = fp4 ? (cols + 31) / 32 : (cols + 127) / 128;
    if (s == NULL)
        return arle_err_param(b->err, -ENOENT, t->name, "tensor %s is quantised and has no scale tensor", t->name);
    if (s->n_dims != 2 || s->dim[0] != want_r || s->dim[1] != want_c)
        return bad_shape(b, s, want_r, want_c);
    if (s->dtype != ARLE_F8E8M0 && s->dtype != ARLE_F32 && s->dtype != ARLE_BF16)
        return arle_err_param(b->err, -EINVAL, s->name, "tensor %s: scales must be E8M0, F32 or BF16", s->name);
    return 0;
}

enum quant_class { Q_NONE, Q_DENSE, Q_EXPERT };

/* Adds the matrix [rows, cols] to the weight being gathered; row0 > 0 takes rows of a taller, fused tensor. */
static int part(struct builder *b, const char *prefix, const char *name, int64_t rows, int64_t cols, enum quant_class q)
{
    const struct arle_tensor *t, *s = NULL;
    if (from_file(b)) {
        t = lookup(b->a->weights, prefix, name);
    } else {
        bool fp8 = b->c->quantised && q != Q_NONE, fp4 = fp8 && q == Q_EXPERT && b->c->fp4_experts;
        t = make(b, prefix, name, fp4 ? ARLE_I8 : fp8 ? ARLE_F8E4M3 : ARLE_BF16, rows, fp4 ? cols / 2 : cols, 0, 0.02);
        if (t != NULL && fp8) {
            char alt[96];
            snprintf(alt, sizeof alt, "%.*s.scale", (int)(strlen(name) - strlen(".weight")), name);
            s = make(b, prefix, alt, ARLE_F8E8M0, fp4 ? rows : (rows + 127) / 128, fp4 ? (cols + 31) / 32 : (cols + 127) / 128, 0, 1);
        }
    }
    if (t == NULL)
        return missing(b, prefix, name);
    bool fp4 = t->dtype == ARLE_I8 || t->dtype == ARLE_U8, fp8 = t->dtype == ARLE_F8E4M3;
    int64_t stored = fp4 ? cols / 2 : cols;
    if (t->n_dims != 2 || t->dim[0] != rows || t->dim[1] != stored)
        return bad_shape(b, t, rows, stored);
    if (!fp4 && !fp8 && t->dtype != ARLE_BF16 && t->dtype != ARLE_F32 && t->dtype != ARLE_F16)
        return arle_err_param(b->err, -EINVAL, t->name, "tensor %s has a dtype that is not handled", t->name);
    struct arle_weight_part *p = &b->parts[b->n_parts++];
    *p = (struct arle_weight_part){ .t = t, .n_rows = rows, .scale2 = 1 };
    if (fp4 || fp8) {
        if (from_file(b))
            s = lookup_scale(b->a->weights, prefix, name);
        int r = check_scale(b, t, s, rows, cols, fp4);
        if (r < 0)
            return r;
        p->scale = s;
        p->format = fp4 ? ARLE_FMT_FP4_GROUP : ARLE_FMT_FP8_BLOCK;
        p->bn = fp4 ? 1 : 128, p->bk = fp4 ? 32 : 128;
        b->part_quant = true;
    }
    b->params += (uint64_t)rows * (uint64_t)cols;
    return 0;
}

/* Packs what part() gathered. always = the share of its bytes that every decode row reads. */
static int finish(struct builder *b, uint32_t role, uint32_t n_experts, int64_t k, bool act_quant, double always, const char *name,
                  struct arle_weight **out)
{
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = role, .n_experts = n_experts, .n_parts = b->n_parts,
                                  .parts = b->parts, .k = k, .name = name,
                                  .act_quant = act_quant && b->part_quant && b->c->quantised && !b->a->parity };
    uint64_t bytes = b->a->backend->weight_predict(b->a->device, &d);
    int r = 0;
    b->weight_bytes += bytes;
    b->step_bytes += (uint64_t)((double)bytes * always);
    if (!b->dry) {
        r = b->a->backend->weight_create(b->a->device, &d, out, b->err);
        for (uint32_t i = 0; r == 0 && from_file(b) && b->a->weights->done && i < b->n_parts; i++)
            b->a->weights->done(b->a->weights, b->parts[i].t);
        b->done += bytes;
        if (r == 0 && b->a->progress)
            b->a->progress(b->a->progress_arg, b->done, b->total);
    }
    b->n_parts = 0;
    b->n_made = 0;
    b->part_quant = false;
    return r;
}

static int linear(struct builder *b, const char *prefix, const char *name, int64_t rows, int64_t cols, enum quant_class q,
                  struct arle_weight **out)
{
    int r = part(b, prefix, name, rows, cols, q);
    return r < 0 ? r : finish(b, ARLE_W_LINEAR, 1, cols, q != Q_NONE, 1, name, out);
}

static int vector(struct builder *b, const char *prefix, const char *name, int64_t rows, int64_t cols, double mean, double scale,
                  struct arle_weight **owner, const float **out)
{
    int64_t n = rows * (cols ? cols : 1);
    const struct arle_tensor *t = from_file(b) ? lookup(b->a->weights, prefix, name) : make(b, prefix, name, ARLE_BF16, rows, cols, mean, scale);
    if (t == NULL)
        return missing(b, prefix, name);
    if (folded_rows(t) * (t->n_dims ? t->dim[t->n_dims - 1] : 1) != n || (t->n_dims > 0 && t->dim[0] != rows))
        return bad_shape(b, t, rows, cols);
    b->parts[b->n_parts++] = (struct arle_weight_part){ .t = t, .n_rows = folded_rows(t), .scale2 = 1 };
    b->params += (uint64_t)n;
    int r = finish(b, ARLE_W_VECTOR, 1, n, false, 1, name, owner);
    if (r == 0 && !b->dry && (*out = b->a->backend->weight_data(*owner)) == NULL)
        return arle_err_param(b->err, -EINVAL, name, "the backend gives no vector for %s%s", prefix, name);
    return r;
}

static int layer_vector(struct builder *b, struct ds_layer *l, const char *prefix, const char *name, int64_t rows, int64_t cols,
                        double mean, double scale, const float **out)
{
    int r = vector(b, prefix, name, rows, cols, mean, scale, &l->vec[l->n_vec], out);
    if (r == 0 && !b->dry)
        l->n_vec++;
    return r;
}

static int block_alloc(struct builder *b, size_t bytes, void **out)
{
    b->scratch_bytes += bytes;
    if (b->dry)
        return 0;
    int r = b->a->backend->mem.alloc(b->a->device, ARLE_MEM_DEVICE, bytes, out, b->err);
    if (r == 0)
        b->m->blocks[b->m->n_blocks++] = *out;
    return r;
}

static int upload(struct builder *b, const void *src, size_t bytes, void **out)
{
    const struct arle_mem_ops *mem = &b->a->backend->mem;
    struct arle_stream *st;
    void *stage;
    int r = block_alloc(b, bytes, out);
    if (r < 0 || b->dry)
        return r;
    if ((r = mem->stream_create(b->a->device, &st, b->err)) < 0)
        return r;
    if ((r = mem->alloc(b->a->device, ARLE_MEM_PINNED, bytes, &stage, b->err)) == 0) {
        memcpy(stage, src, bytes);
        r = mem->copy(b->a->device, st, *out, stage, bytes, ARLE_COPY_H2D);
        if (r == 0)
            r = mem->stream_sync(b->a->device, st, b->err);
        mem->free(b->a->device, ARLE_MEM_PINNED, stage);
    }
    mem->stream_destroy(b->a->device, st);
    return r;
}

/* Hash routing: expert ids by token, int64 on disk. */
static int hash_table(struct builder *b, struct ds_layer *l, const char *prefix)
{
    const struct ds_config *c = b->c;
    size_t n = (size_t)c->vocab * c->K;
    const struct arle_tensor *t = from_file(b) ? lookup(b->a->weights, prefix, "ffn.gate.tid2eid") : NULL;
    if (from_file(b) && t == NULL)
        return missing(b, prefix, "ffn.gate.tid2eid");
    if (t != NULL && (t->n_dims != 2 || t->dim[0] != c->vocab || t->dim[1] != c->K))
        return bad_shape(b, t, c->vocab, c->K);
    if (t != NULL && t->dtype != ARLE_I64 && t->dtype != ARLE_I32)
        return arle_err_param(b->err, -EINVAL, t->name, "tensor %s must be I64 or I32", t->name);
    int32_t *ids = b->dry ? NULL : malloc(n * sizeof *ids);
    if (!b->dry && ids == NULL)
        return arle_err_set(b->err, -ENOMEM, "no memory for %ssffn.gate.tid2eid", prefix);
    int r = 0;
    for (size_t i = 0; !b->dry && i < n && r == 0; i++) {
        int64_t e = t == NULL ? (int64_t)((i / c->K * 7 + i % c->K) % c->E)
                  : t->dtype == ARLE_I64 ? ((const int64_t *)t->data)[i] : ((const int32_t *)t->data)[i];
        if (e < 0 || e >= (int64_t)c->E)
            r = arle_err_param(b->err, -EINVAL, t->name, "tensor %s names expert %lld of %u", t->name, (long long)e, c->E);
        ids[i] = (int32_t)e;
    }
    if (r == 0)
        r = upload(b, ids, n * sizeof *ids, (void **)&l->tid2eid);
    free(ids);
    return r;
}

static int experts(struct builder *b, struct ds_layer *l, const char *prefix)
{
    const struct ds_config *c = b->c;
    double used = (double)c->K / c->E;
    char name[64];
    int r = 0;
    const struct arle_tensor *gu = from_file(b) ? lookup(b->a->weights, prefix, "mlp.experts.gate_up_proj") : NULL;
    const struct arle_tensor *down = gu ? lookup(b->a->weights, prefix, "mlp.experts.down_proj") : NULL;
    if (gu != NULL) {
        if (down == NULL)
            return missing(b, prefix, "mlp.experts.down_proj");
        if (folded_rows(gu) != 2 * (int64_t)c->E * c->I || gu->dim[gu->n_dims - 1] != c->D)
            return bad_shape(b, gu, 2 * (int64_t)c->E * c->I, c->D);
        if (folded_rows(down) != (int64_t)c->E * c->D || down->dim[down->n_dims - 1] != c->I)
            return bad_shape(b, down, (int64_t)c->E * c->D, c->I);
        for (uint32_t i = 0; i < 2 * c->E; i++)
            b->parts[b->n_parts++] = (struct arle_weight_part){ .t = gu, .row0 = (int64_t)i * c->I, .n_rows = c->I, .scale2 = 1 };
        b->params += 3ull * c->E * c->I * c->D;
    }
    for (uint32_t e = 0; r == 0 && gu == NULL && e < c->E; e++)
        for (int w = 1; r == 0 && w <= 3; w += 2) {
            snprintf(name, sizeof name, "ffn.experts.%u.w%d.weight", e, w);
            r = part(b, prefix, name, c->I, c->D, Q_EXPERT);
        }
    if (r == 0)
        r = finish(b, ARLE_W_EXPERTS_GATE_UP, c->E, c->D, true, used, "ffn.experts.w1w3", &l->gate_up);
    for (uint32_t e = 0; r == 0 && e < c->E; e++) {
        if (gu != NULL) {
            b->parts[b->n_parts++] = (struct arle_weight_part){ .t = down, .row0 = (int64_t)e * c->D, .n_rows = c->D, .scale2 = 1 };
            continue;
        }
        snprintf(name, sizeof name, "ffn.experts.%u.w2.weight", e);
        r = part(b, prefix, name, c->D, c->I, Q_EXPERT);
    }
    return r < 0 ? r : finish(b, ARLE_W_EXPERTS, c->E, c->I, true, used, "ffn.experts.w2", &l->down);
}

static int moe(struct builder *b, struct ds_layer *l, const char *prefix, bool hash)
{
    const struct ds_config *c = b->c;
    int r = linear(b, prefix, "ffn.gate.weight", c->E, c->D, Q_NONE, &l->router);
    if (r == 0)
        r = hash ? hash_table(b, l, prefix) : layer_vector(b, l, prefix, "ffn.gate.bias", c->E, 0, 0, 0.1, &l->bias);
    if (r == 0)
        r = experts(b, l, prefix);
    if (r == 0)
        r = part(b, prefix, "ffn.shared_experts.w1.weight", c->I, c->D, Q_DENSE);
    if (r == 0)
        r = part(b, prefix, "ffn.shared_experts.w3.weight", c->I, c->D, Q_DENSE);
    if (r == 0)
        r = finish(b, ARLE_W_GATE_UP, 1, c->D, true, 1, "ffn.shared_experts.w1w3", &l->shared_gate_up);
    return r < 0 ? r : linear(b, prefix, "ffn.shared_experts.w2.weight", c->D, c->I, Q_DENSE, &l->shared_down);
}

static int compressor(struct builder *b, struct ds_layer *l, const char *prefix)
{
    const struct ds_config *c = b->c;
    int64_t w = (l->kind == DS_CSA ? 2 : 1) * (int64_t)c->d, iw = 2 * (int64_t)c->index_dim;
    int r = part(b, prefix, "attn.compressor.wkv.weight", w, c->D, Q_NONE);
    if (r == 0)
        r = part(b, prefix, "attn.compressor.wgate.weight", w, c->D, Q_NONE);
    l->cproj_width = (uint32_t)(2 * w);
    if (r == 0 && l->kind == DS_CSA) {
        r = part(b, prefix, "attn.indexer.compressor.wkv.weight", iw, c->D, Q_NONE);
        if (r == 0)
            r = part(b, prefix, "attn.indexer.compressor.wgate.weight", iw, c->D, Q_NONE);
        if (r == 0)
            r = part(b, prefix, "attn.indexer.weights_proj.weight", c->index_heads, c->D, Q_NONE);
        l->index.proj_off = 2 * w;
        l->index_weight_off = 2 * w + 2 * iw;
        l->cproj_width += (uint32_t)(2 * iw) + c->index_heads;
    }
    if (r == 0)
        r = finish(b, ARLE_W_LINEAR, 1, c->D, false, 1, "attn.compressor", &l->cproj);
    if (r == 0)
        r = layer_vector(b, l, prefix, "attn.compressor.ape", l->ratio, w, 0, 0.1, &l->main.ape);
    if (r == 0)
        r = layer_vector(b, l, prefix, "attn.compressor.norm.weight", c->d, 0, 1, 0.1, &l->main.norm);
    if (r < 0 || l->kind != DS_CSA)
        return r;
    r = linear(b, prefix, "attn.indexer.wq_b.weight", (int64_t)c->index_heads * c->index_dim, c->Q, Q_DENSE, &l->index_q_b);
    if (r == 0)
        r = layer_vector(b, l, prefix, "attn.indexer.compressor.ape", l->ratio, iw, 0, 0.1, &l->index.ape);
    return r < 0 ? r : layer_vector(b, l, prefix, "attn.indexer.compressor.norm.weight", c->index_dim, 0, 1, 0.1, &l->index.norm);
}

/* wo_a is block-diagonal: group g maps its own heads to its own R rows. Kept without activation quantisation. */
static int grouped_out(struct builder *b, struct ds_layer *l, const char *prefix)
{
    const struct ds_config *c = b->c;
    int64_t k = (int64_t)c->H / c->G * c->d, rows = (int64_t)c->G * c->R;
    for (uint32_t g = 0; g < c->G; g++) {
        int r = part(b, prefix, "attn.wo_a.weight", rows, k, Q_DENSE);
        if (r < 0)
            return r;
        b->parts[0].row0 = (int64_t)g * c->R;
        b->parts[0].n_rows = c->R;
        b->params -= g == 0 ? 0 : (uint64_t)rows * (uint64_t)k;
        if ((r = finish(b, ARLE_W_LINEAR, 1, k, false, 1, "attn.wo_a", &l->wo_a[g])) < 0)
            return r;
    }
    return linear(b, prefix, "attn.wo_b.weight", c->D, rows, Q_DENSE, &l->wo_b);
}

static int block(struct builder *b, uint32_t i, const char *prefix)
{
    const struct ds_config *c = b->c;
    struct ds_layer *l = &b->m->layer[i];
    int64_t SD = (int64_t)c->S * c->D, mix = (int64_t)(2 + c->S) * c->S;
    l->kind = c->kind[i], l->ratio = c->ratio[i];
    const struct { const char *name; int64_t rows, cols; double mean, scale; const float **out; } v[] = {
        { "attn_norm.weight", c->D, 0, 1, 0.1, &l->attn_norm }, { "ffn_norm.weight", c->D, 0, 1, 0.1, &l->ffn_norm },
        { "hc_attn_fn", mix, SD, 0, 0.02, &l->hc_attn_fn }, { "hc_attn_base", mix, 0, 0, 0.5, &l->hc_attn_base },
        { "hc_attn_scale", 3, 0, 1, 0.1, &l->hc_attn_scale }, { "hc_ffn_fn", mix, SD, 0, 0.02, &l->hc_ffn_fn },
        { "hc_ffn_base", mix, 0, 0, 0.5, &l->hc_ffn_base }, { "hc_ffn_scale", 3, 0, 1, 0.1, &l->hc_ffn_scale },
        { "attn.q_norm.weight", c->Q, 0, 1, 0.1, &l->q_norm }, { "attn.kv_norm.weight", c->d, 0, 1, 0.1, &l->kv_norm },
        { "attn.attn_sink", c->H, 0, 0, 1, &l->sink } };
    int r = 0;
    for (size_t j = 0; r == 0 && j < sizeof v / sizeof v[0]; j++)
        r = layer_vector(b, l, prefix, v[j].name, v[j].rows, v[j].cols, v[j].mean, v[j].scale, v[j].out);
    if (r == 0)
        r = part(b, prefix, "attn.wq_a.weight", c->Q, c->D, Q_DENSE);
    if (r == 0)
        r = part(b, prefix, "attn.wkv.weight", c->d, c->D, Q_DENSE);
    if (r == 0)
        r = finish(b, ARLE_W_LINEAR, 1, c->D, true, 1, "attn.wq_a+wkv", &l->qkv);
    if (r == 0)
        r = linear(b, prefix, "attn.wq_b.weight", (int64_t)c->H * c->d, c->Q, Q_DENSE, &l->q_b);
    if (r == 0)
        r = grouped_out(b, l, prefix);
    if (r == 0 && l->ratio != 0)
        r = compressor(b, l, prefix);
    return r < 0 ? r : moe(b, l, prefix, c->hash[i]);
}

static int global_vector(struct builder *b, const char *prefix, const char *name, int64_t rows, int64_t cols, const float **out)
{
    struct arle_model *m = b->m;
    int r = vector(b, prefix, name, rows, cols, cols ? 0 : 1, cols ? 0.02 : 0.1, &m->gvec[m->n_gvec], out);
    if (r == 0 && !b->dry)
        m->n_gvec++;
    return r;
}

static int drafter(struct builder *b)
{
    const struct ds_config *c = b->c;
    struct arle_model *m = b->m;
    int r = block(b, c->L, "mtp.0.");
    if (r == 0)
        r = linear(b, "mtp.0.", "e_proj.weight", c->D, c->D, Q_DENSE, &m->e_proj);
    if (r == 0)
        r = linear(b, "mtp.0.", "h_proj.weight", c->D, c->D, Q_DENSE, &m->h_proj);
    const struct { const char *name; int64_t rows, cols; const float **out; } v[] = {
        { "enorm.weight", c->D, 0, &m->enorm }, { "hnorm.weight", c->D, 0, &m->hnorm }, { "norm.weight", c->D, 0, &m->mtp_norm },
        { "hc_head_fn", c->S, (int64_t)c->S * c->D, &m->mtp_head_fn }, { "hc_head_base", c->S, 0, &m->mtp_head_base },
        { "hc_head_scale", 1, 0, &m->mtp_head_scale } };
    for (size_t j = 0; r == 0 && j < sizeof v / sizeof v[0]; j++)
        r = global_vector(b, "mtp.0.", v[j].name, v[j].rows, v[j].cols, v[j].out);
    return r;
}

static int all_weights(struct builder *b)
{
    const struct ds_config *c = b->c;
    struct arle_model *m = b->m;
    char prefix[32];
    b->weight_bytes = b->params = b->step_bytes = 0;
    int r = part(b, "", "embed.weight", c->vocab, c->D, Q_NONE);
    if (r == 0)
        r = finish(b, ARLE_W_EMBED, 1, c->D, false, 0, "embed", &m->embed);
    if (r == 0)
        r = linear(b, "", "head.weight", c->vocab, c->D, Q_NONE, &m->head);
    if (r == 0)
        r = global_vector(b, "", "norm.weight", c->D, 0, &m->norm);
    if (r == 0)
        r = global_vector(b, "", "hc_head_fn", c->S, (int64_t)c->S * c->D, &m->hc_head_fn);
    if (r == 0)
        r = global_vector(b, "", "hc_head_base", c->S, 0, &m->hc_head_base);
    if (r == 0)
        r = global_vector(b, "", "hc_head_scale", 1, 0, &m->hc_head_scale);
    for (uint32_t i = 0; r == 0 && i < c->L; i++) {
        snprintf(prefix, sizeof prefix, "layers.%u.", i);
        r = block(b, i, prefix);
    }
    if (r == 0 && m->drafter)
        r = drafter(b);
    else if (r == 0 && from_file(b))
        b->a->weights->ignore(b->a->weights, "mtp.");
    return r;
}

/* ---- caches -------------------------------------------------------------------------------------------------------------- */

static uint64_t round64(uint64_t n)
{
    return (n + 63) & ~63ull;
}

static uint32_t lcm(uint32_t a, uint32_t b)
{
    uint32_t x = a, y = b;
    while (y != 0) {
        uint32_t t = x % y;
        x = y, y = t;
    }
    return a / x * b;
}

/* One paged group per compression ratio, one window group with every ring, one state group with the unfinished groups. */
static int layout_caches(struct arle_model *m, struct arle_err *err)
{
    const struct ds_config *c = &m->c;
    struct arle_model_desc *d = &m->desc;
    uint64_t es = arle_dtype_size(m->act), window = 0, state = 0;
    uint32_t n_layers = c->L + (m->drafter ? 1 : 0);
    d->page_multiple = 1;
    for (uint32_t i = 0; i < n_layers; i++)
        if (c->ratio[i] != 0)
            d->page_multiple = lcm(d->page_multiple, c->ratio[i]);
    if (m->page_tokens != 0 && m->page_tokens % d->page_multiple != 0)
        return arle_err_param(err, -EINVAL, "kv.page_tokens", "page_tokens = %u must be a multiple of %u for this model",
                              m->page_tokens, d->page_multiple);
    for (uint32_t i = 0; i < n_layers; i++) {
        struct ds_layer *l = &m->layer[i];
        l->ring_off = window;
        window += round64((uint64_t)c->W * c->d * es);
        if (c->ratio[i] == 0)
            continue;
        uint32_t g = 0;
        while (g < d->n_groups && m->groups[g].tokens_per_entry != c->ratio[i])
            g++;
        if (g == 2)
            return arle_err_param(err, -EINVAL, "compress_ratios", "more than two compression ratios are not supported");
        if (g == d->n_groups) {
            d->n_groups++;
            m->groups[g] = (struct arle_cache_group){ .name = g == 0 ? "entries0" : "entries1", .kind = ARLE_CACHE_PAGED,
                                                      .tokens_per_entry = c->ratio[i], .dtype = m->act };
        }
        bool csa = c->kind[i] == DS_CSA;
        uint64_t per_page = m->page_tokens / c->ratio[i], width = (csa ? 2 : 1) * (uint64_t)c->ratio[i];
        l->group = g;
        l->page_off = m->groups[g].page_bytes;
        m->groups[g].page_bytes += round64(per_page * c->d * es);
        l->main_off = state;
        state += round64(2 * width * (csa ? 2 : 1) * c->d * 4);
        if (csa) {
            l->index_page_off = m->groups[g].page_bytes;
            m->groups[g].page_bytes += round64(per_page * c->index_dim * es);
            l->index_off = state;
            state += round64(2 * width * 2 * c->index_dim * 4);
        }
    }
    m->previous_off = state;
    state += m->drafter ? round64((uint64_t)c->S * c->D * es) : 0;
    m->window_group = d->n_groups++;
    m->groups[m->window_group] = (struct arle_cache_group){ .name = "window", .kind = ARLE_CACHE_WINDOW, .tokens_per_entry = 1,
                                                            .dtype = m->act, .window = c->W, .record_bytes = window };
    m->state_group = UINT32_MAX;
    if (state != 0) {
        m->state_group = d->n_groups++;
        m->groups[m->state_group] = (struct arle_cache_group){ .name = "tails", .kind = ARLE_CACHE_STATE, .tokens_per_entry = 1,
                                                               .dtype = ARLE_F32, .record_bytes = state };
    }
    d->groups = m->groups;
    return 0;
}

int ds_bind(struct arle_model *m, const struct arle_cache_binding *b, struct arle_err *err)
{
    const struct ds_config *c = &m->c;
    size_t es = arle_dtype_size(m->act);
    if (b->n_groups != m->desc.n_groups)
        return arle_err_set(err, -EINVAL, "binding has %u cache groups, the model has %u", b->n_groups, m->desc.n_groups);
    for (uint32_t i = 0; i < c->L + (m->drafter ? 1 : 0); i++) {
        struct ds_layer *l = &m->layer[i];
        l->ring = (struct arle_state){ b->group[m->window_group].base, b->group[m->window_group].stride, l->ring_off };
        if (l->ratio == 0)
            continue;
        char *pages = b->group[l->group].base, *records = b->group[m->state_group].base;
        size_t ps = b->group[l->group].stride, rs = b->group[m->state_group].stride;
        l->main.out = (struct arle_paged){ pages, ps, l->page_off, c->d * es, m->act };
        l->index.out = (struct arle_paged){ pages, ps, l->index_page_off, c->index_dim * es, m->act };
        l->main.record = (struct arle_state){ records, rs, l->main_off };
        l->index.record = (struct arle_state){ records, rs, l->index_off };
    }
    if (m->drafter)
        m->previous = (struct arle_state){ b->group[m->state_group].base, b->group[m->state_group].stride, m->previous_off };
    return 0;
}

/* ---- scratch and rope ------------------------------------------------------------------------------------------------------- */

static int scratch(struct builder *b)
{
    const struct ds_config *c = b->c;
    struct ds_scratch *s = &b->m->s;
    size_t T = b->a->max_tokens, es = arle_dtype_size(b->m->act), rows = b->a->max_rows > T ? b->a->max_rows : T;
    size_t cw = 2 * 2 * (size_t)c->d + 4 * (size_t)c->index_dim + c->index_heads;
    s->moe_bytes = T * ((size_t)(c->K + 1) * (3 * (size_t)c->I + c->D) + c->D) * 4 + (64u << 10);
    const struct { void **p; size_t bytes; } plan[] = {
        { &s->X, T * c->S * c->D * es }, { &s->u, T * c->D * es }, { &s->x, T * c->D * es }, { &s->qkv, T * (c->Q + c->d) * es },
        { &s->qr, T * c->Q * es }, { &s->q, T * c->H * c->d * es }, { &s->o, T * c->H * c->d * es }, { &s->a, T * c->G * c->R * es },
        { &s->f, T * c->D * es }, { &s->iq, T * c->index_heads * c->index_dim * es }, { (void **)&s->cproj, T * cw * 4 },
        { (void **)&s->coef, T * (c->S + c->S * c->S) * 4 }, { (void **)&s->route_ids, T * c->K * 4 }, { (void **)&s->route_w, T * c->K * 4 },
        { (void **)&s->route_s, T * c->E * 4 }, { (void **)&s->sel, T * c->topk * 4 }, { (void **)&s->n_sel, T * 4 },
        { &s->h, rows * c->D * es }, { &s->moe, s->moe_bytes },
        { &s->Xd, b->m->drafter ? T * c->S * c->D * es : 0 }, { &s->e, b->m->drafter ? T * c->D * es : 0 },
        { (void **)&s->draft_logits, b->m->drafter ? (size_t)b->a->max_rows * c->vocab * 4 : 0 },
        { (void **)&s->draft_lp, b->m->drafter ? (size_t)b->a->max_rows * 4 * (2 + 2 * ARLE_MAX_TOP) : 0 },
        { (void **)&s->draft_ids, b->m->drafter ? (size_t)b->a->max_rows * 4 : 0 } };
    int r = 0;
    for (size_t i = 0; r == 0 && i < sizeof plan / sizeof plan[0]; i++)
        if (plan[i].bytes != 0)
            r = block_alloc(b, plan[i].bytes, plan[i].p);
    if (r == 0 && b->m->drafter) {
        size_t bytes = b->a->max_rows * sizeof(struct arle_sample_row);
        struct arle_sample_row *host = calloc(b->a->max_rows, sizeof *host);
        if (host == NULL)
            return arle_err_set(b->err, -ENOMEM, "no memory for draft rows");
        for (uint32_t i = 0; i < b->a->max_rows; i++)
            host[i] = (struct arle_sample_row){ .top_p = 1, .repetition = 1, .target = -1 };
        r = upload(b, host, bytes, (void **)&s->draft_rows);
        free(host);
    }
    return r;
}

/* omega_i = base^(-2i/rot), and for compressed layers its YaRN blend, every step in f32 as the formulas say. */
static void frequencies(const struct ds_config *c, bool compress, float *out)
{
    double base = compress ? c->compress_theta : c->theta, lo = 0, hi = 0;
    bool yarn = compress && c->yarn_factor > 1;
    if (yarn) {
        double two_ln = 2 * log(base);
        lo = floor(c->rot * log(c->yarn_original / (c->beta_fast * 2 * M_PI)) / two_ln);
        hi = ceil(c->rot * log(c->yarn_original / (c->beta_slow * 2 * M_PI)) / two_ln);
        lo = fmax(lo, 0), hi = fmin(hi, c->rot - 1);
        hi = hi == lo ? lo + 0.001 : hi;
    }
    for (uint32_t i = 0; i < c->rot / 2; i++) {
        float f = 1.0f / powf((float)base, (float)(2 * i) / (float)c->rot);
        float t = yarn ? fminf(fmaxf(((float)i - (float)lo) / (float)(hi - lo), 0), 1) : 0;
        out[i] = yarn ? f * (1 - t) + f / (float)c->yarn_factor * t : f;
    }
}

static int ropes(struct builder *b)
{
    float f[4096];
    size_t bytes = b->c->rot / 2 * sizeof f[0];
    frequencies(b->c, false, f);
    int r = upload(b, f, bytes, (void **)&b->m->freq_main);
    frequencies(b->c, true, f);
    return r < 0 ? r : upload(b, f, bytes, (void **)&b->m->freq_compress);
}

/* ---- load, predict, destroy --------------------------------------------------------------------------------------------------- */

static int check_ops(const struct arle_ops *ops, struct arle_err *err)
{
#define NEED(op) if (!ARLE_HAS(ops, struct arle_ops, op)) \
        return arle_err_param(err, -ENOTSUP, #op, "the backend lacks the op %s, which this architecture needs", #op)
    NEED(embed); NEED(rmsnorm); NEED(linear); NEED(moe_route); NEED(moe_experts); NEED(sample); NEED(hc_expand); NEED(hc_pre);
    NEED(hc_post); NEED(hc_head); NEED(head_rope); NEED(window_store); NEED(compress); NEED(index_select); NEED(attn_latent);
    NEED(seq_shift);
#undef NEED
    return 0;
}

static int prepare(const struct arle_model_load *a, struct builder *b, struct arle_model *m, struct arle_err *err)
{
    int r = ds_config_parse(a->config_json, a->config_len, &m->c, err);
    if (r < 0)
        return r;
    if (a->context != 0)
        m->c.context = a->context < m->c.context ? a->context : m->c.context;
    m->be = a->backend, m->ops = a->backend->ops, m->dev = a->device;
    m->act = a->compute, m->max_tokens = a->max_tokens, m->max_rows = a->max_rows, m->page_tokens = a->page_tokens;
    m->simulate = m->c.quantised && !a->parity;
    m->drafter = a->drafts && m->c.nextn > 0;
    if (m->drafter && a->weights != NULL && !a->weights->random && lookup(a->weights, "mtp.0.", "enorm.weight") == NULL)
        m->drafter = false;             /* transformers drops the drafter when it saves */
    *b = (struct builder){ .a = a, .m = m, .c = &m->c, .err = err };
    b->cap_made = 4 * m->c.E + MAX_PARTS_EXTRA;
    b->made = calloc(b->cap_made, sizeof *b->made);
    b->made_name = calloc(b->cap_made, sizeof *b->made_name);
    b->parts = calloc(2 * (size_t)m->c.E + MAX_PARTS_EXTRA, sizeof *b->parts);
    if (b->made == NULL || b->made_name == NULL || b->parts == NULL)
        return arle_err_set(err, -ENOMEM, "no memory to describe %u experts", m->c.E);
    return layout_caches(m, err);
}

static void finish_desc(struct arle_model *m, const struct builder *b)
{
    struct arle_model_desc *d = &m->desc;
    d->struct_size = sizeof *d;
    d->vocab = d->n_valid = m->c.vocab;
    d->context = m->c.context;
    d->has_drafter = m->drafter;
    d->hidden = m->c.D;
    d->weight_bytes = b->weight_bytes, d->scratch_bytes = b->scratch_bytes;
    d->step_weight_bytes = b->step_bytes, d->n_params = b->params;
    d->arch = "DeepSeek-V4";
}

static void builder_fini(struct builder *b)
{
    free(b->made);
    free(b->made_name);
    free(b->parts);
}

static int dry_run(struct builder *b)
{
    b->dry = true;
    b->scratch_bytes = 0;
    int r = all_weights(b);
    if (r == 0)
        r = ropes(b);
    if (r == 0)
        r = scratch(b);
    b->total = b->weight_bytes;
    b->dry = false;
    return r;
}

int ds_load(const struct arle_model_load *args, struct arle_model **out, struct arle_err *err)
{
    int r = check_ops(args->backend->ops, err);
    struct arle_model *m = r < 0 ? NULL : calloc(1, sizeof *m);
    if (m == NULL)
        return r < 0 ? r : arle_err_set(err, -ENOMEM, "no memory for the model");
    struct builder b = { 0 };
    if ((r = prepare(args, &b, m, err)) < 0 || (r = dry_run(&b)) < 0)
        goto fail;
    b.scratch_bytes = 0;
    if ((r = all_weights(&b)) < 0 || (r = ropes(&b)) < 0 || (r = scratch(&b)) < 0)
        goto fail;
    finish_desc(m, &b);
    builder_fini(&b);
    *out = m;
    return 0;
fail:
    builder_fini(&b);
    ds_destroy(m);
    return r;
}

int ds_predict(const struct arle_model_load *args, struct arle_model_desc *out, struct arle_err *err)
{
    struct arle_model *m = calloc(1, sizeof *m);
    struct builder b = { 0 };
    if (m == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the model");
    int r = prepare(args, &b, m, err);
    if (r == 0)
        r = dry_run(&b);
    if (r == 0) {
        finish_desc(m, &b);
        *out = m->desc;
        out->groups = NULL;             /* lives in the model that is about to go */
    }
    builder_fini(&b);
    free(m);
    return r;
}

static void drop(struct arle_model *m, struct arle_weight **w)
{
    if (*w != NULL)
        m->be->weight_destroy(m->dev, *w);
    *w = NULL;
}

void ds_destroy(struct arle_model *m)
{
    if (m == NULL)
        return;
    for (uint32_t i = 0; i <= m->c.L && m->be != NULL; i++) {
        struct ds_layer *l = &m->layer[i];
        struct arle_weight **w[] = { &l->qkv, &l->q_b, &l->wo_b, &l->cproj, &l->index_q_b, &l->router, &l->gate_up, &l->down,
                                     &l->shared_gate_up, &l->shared_down };
        for (size_t j = 0; j < sizeof w / sizeof w[0]; j++)
            drop(m, w[j]);
        for (uint32_t g = 0; g < 64; g++)
            drop(m, &l->wo_a[g]);
        for (uint32_t j = 0; j < l->n_vec; j++)
            drop(m, &l->vec[j]);
    }
    if (m->be != NULL) {
        struct arle_weight **w[] = { &m->embed, &m->head, &m->e_proj, &m->h_proj };
        for (size_t j = 0; j < 4; j++)
            drop(m, w[j]);
        for (uint32_t j = 0; j < m->n_gvec; j++)
            drop(m, &m->gvec[j]);
        for (uint32_t j = 0; j < m->n_blocks; j++)
            m->be->mem.free(m->dev, ARLE_MEM_DEVICE, m->blocks[j]);
    }
    free(m);
}
