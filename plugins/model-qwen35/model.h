/*
 * The loaded model: packed weights, where each layer's memory lies, and the scratch of a step. Made by load.c, filled by
 * tensors.c, run by forward.c. Owned by the engine thread.
 */
#ifndef MODEL_QWEN35_MODEL_H
#define MODEL_QWEN35_MODEL_H

#include "config.h"
#include <arle/model.h>

struct qwen35_mlp {
    struct arle_weight *norm;               /* post_attention_layernorm */
    struct arle_weight *gate_up, *down;     /* dense, or the shared expert */
    struct arle_weight *router, *experts_gate_up, *experts_down, *shared_gate;     /* mixture; else NULL */
};

struct qwen35_layer {
    bool full;
    struct arle_weight *norm;               /* input_layernorm */
    struct arle_weight *proj;               /* delta net: qkv | z [| a | b]; attention: q and gate per head | k | v */
    struct arle_weight *proj_ab;            /* delta net whose a | b are stored in another format than qkv | z; else NULL */
    struct arle_weight *out;                /* out_proj or o_proj */
    struct arle_weight *conv, *A_log, *dt_bias, *gate_norm;        /* delta net */
    struct arle_weight *q_norm, *k_norm;    /* attention */
    struct qwen35_mlp mlp;
    uint64_t kv_offset;                     /* in a page of group "kv" */
    uint64_t conv_offset, s_offset;         /* in a record of group "delta" */
};

/* Byte offsets into the one scratch allocation. Regions that are never alive together share `work`. */
struct qwen35_scratch {
    uint64_t h;             /* [T, hidden] act: the residual stream */
    uint64_t x;             /* [T, hidden] act: normed input */
    uint64_t proj;          /* [T, ld_proj] act */
    uint64_t q;             /* [T, n_heads * head_dim] act */
    uint64_t mix;           /* [T, mixer width] act: what out_proj reads */
    uint64_t act;           /* [T, inter] act: dense MLP */
    uint64_t work, work_bytes;
    uint64_t route_ids, route_weights, route_scores;
    uint64_t y;             /* [max_rows, hidden] act: final norm of the wanted rows */
    uint64_t hidden_all, shifted, pair, logits, picks, pick_rows;      /* drafter */
    uint64_t total;
    uint64_t ld_proj;       /* row stride in elements */
};

struct qwen35_caps { uint32_t compute, kv_dtype, page_tokens, max_tokens, max_seqs, max_rows; };

struct arle_model {
    struct qwen35_config cfg;
    struct qwen35_caps caps;
    struct arle_model_desc desc;
    struct arle_cache_group groups[2];      /* 0 "kv", 1 "delta" */
    const struct arle_backend_api *backend;
    struct arle_device *dev;

    bool has_drafter, coarse_norm, coarse_gate_up, coarse_moe;
    struct qwen35_layer *layer;             /* [n_layers] */
    struct arle_weight *embed, *head, *norm;        /* head == embed when tied */
    struct arle_weight *inv_freq;
    struct { struct arle_weight *norm_embed, *norm_hidden, *fc, *norm; struct qwen35_layer layer; } mtp;
    uint64_t prev_hidden_offset;            /* in a record of group "delta" */
    uint64_t entry_stride;                  /* bytes of one token's entry of one layer */

    struct arle_weight **all; size_t n_all, cap_all;        /* everything to destroy */
    struct qwen35_scratch at;
    uint8_t *scratch;
    struct { uint8_t *base; uint64_t stride; } kv, delta;
};

static inline uint32_t qwen35_conv_dim(const struct qwen35_config *c)
{
    return 2 * c->n_k * c->dk + c->n_v * c->dv;
}

static inline uint32_t qwen35_linear_columns(const struct qwen35_config *c)
{
    return qwen35_conv_dim(c) + c->n_v * c->dv + 2 * c->n_v;
}

static inline uint32_t qwen35_full_columns(const struct qwen35_config *c)
{
    return 2 * c->n_heads * c->head_dim + 2 * c->n_kv * c->head_dim;
}

/* Sums made while weights are checked. */
struct qwen35_totals { uint64_t device_bytes, step_bytes, n_params; bool has_drafter; };

/**
 * Goes through every tensor of the checkpoint by name. m == NULL: checks names, shapes and dtypes and sums what packing would
 * take; a->weights may then be NULL, and tensors are as the config has them. Otherwise packs them into m; total_bytes is the
 * sum of the check, for progress. -EINVAL: err->param is the tensor.
 */
int qwen35_tensors(const struct arle_model_load *a, const struct qwen35_config *cfg, struct arle_model *m,
                   uint64_t total_bytes, struct qwen35_totals *out, struct arle_err *err);

int qwen35_load(void *ctx, const struct arle_model_load *args, struct arle_model **out, struct arle_err *err);
void qwen35_destroy(struct arle_model *m);
const struct arle_model_desc *qwen35_describe(const struct arle_model *m);
int qwen35_bind(struct arle_model *m, const struct arle_cache_binding *caches, struct arle_err *err);
int qwen35_predict(void *ctx, const struct arle_model_load *args, struct arle_model_desc *out, struct arle_err *err);
int qwen35_step(struct arle_model *m, struct arle_stream *st, const struct arle_step *step, struct arle_err *err);

#endif
