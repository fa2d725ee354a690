/*
 * Internal types of the DeepSeek-V4 plugin: the configuration as the formulas use it, the packed weights of a layer, and
 * the loaded model. config.c fills the first, load.c the rest, forward.c reads them.
 */
#ifndef MODEL_DEEPSEEK_V4_MODEL_H
#define MODEL_DEEPSEEK_V4_MODEL_H

#include <arle/model.h>
#include <stdbool.h>

#define DS_MAX_LAYERS 128

enum ds_kind { DS_SWA = 0, DS_HCA, DS_CSA };       /* window only; heavily compressed; compressed and indexed */

struct ds_config {
    uint32_t vocab, D, L, H, d, rot, Q, G, R, W;
    uint32_t kind[DS_MAX_LAYERS + 1], ratio[DS_MAX_LAYERS + 1];     /* [L] is the drafter block */
    bool hash[DS_MAX_LAYERS + 1];
    uint32_t index_heads, index_dim, topk;
    uint32_t S, iters;                              /* residual streams, Sinkhorn iterations */
    float hc_eps, eps;
    uint32_t E, K, I;
    float route_scale, limit;
    double theta, compress_theta, yarn_factor, beta_fast, beta_slow, yarn_original;
    uint32_t context, nextn;
    bool quantised;                                 /* published FP8/FP4 checkpoint: activation quantisation is part of the model */
    bool fp4_experts;
};

int ds_config_parse(const char *json, size_t len, struct ds_config *out, struct arle_err *err);
/* 1, 0 or a negative error: as arle_model_api.recognise. */
int ds_config_recognise(const char *json, size_t len, struct arle_err *err);

struct ds_compressor {
    const float *ape, *norm;
    struct arle_state record;
    struct arle_paged out;
    int64_t proj_off;                               /* column in the f32 projection */
};

struct ds_layer {
    uint32_t kind, ratio, group;                    /* group: index of the paged cache group, if any */
    struct arle_weight *qkv, *q_b, *wo_a[64], *wo_b, *cproj, *index_q_b, *router, *gate_up, *down, *shared_gate_up, *shared_down;
    struct arle_weight *vec[24]; uint32_t n_vec;    /* owners of the f32 vectors below */
    const float *attn_norm, *ffn_norm, *q_norm, *kv_norm, *sink, *bias;
    const float *hc_attn_fn, *hc_attn_base, *hc_attn_scale, *hc_ffn_fn, *hc_ffn_base, *hc_ffn_scale;
    int32_t *tid2eid;
    struct ds_compressor main, index;
    int64_t index_weight_off;                       /* columns of weights_proj in the f32 projection */
    uint32_t cproj_width;
    struct arle_state ring;
    uint64_t ring_off, main_off, index_off;         /* offsets in the records */
    uint64_t page_off, index_page_off;              /* offsets in the page */
};

struct ds_scratch {
    void *X, *Xd, *u, *x, *qkv, *qr, *q, *o, *a, *f, *iq, *e, *h;
    float *cproj, *coef, *route_w, *route_s;
    int32_t *sel, *n_sel, *route_ids, *draft_ids;
    float *draft_logits, *draft_lp;
    struct arle_sample_row *draft_rows;
    void *moe; size_t moe_bytes;
};

struct arle_model {
    struct ds_config c;
    struct arle_model_desc desc;
    struct arle_cache_group groups[4];
    const struct arle_backend_api *be;
    const struct arle_ops *ops;
    struct arle_device *dev;
    uint32_t act, max_tokens, max_rows, page_tokens;
    bool simulate, drafter;
    uint32_t window_group, state_group;
    struct ds_layer layer[DS_MAX_LAYERS + 1];
    struct arle_weight *embed, *head, *e_proj, *h_proj, *gvec[16];
    uint32_t n_gvec;
    const float *norm, *hc_head_fn, *hc_head_base, *hc_head_scale;
    const float *enorm, *hnorm, *mtp_norm, *mtp_head_fn, *mtp_head_base, *mtp_head_scale;
    float *freq_main, *freq_compress;               /* device, [rot / 2] */
    struct arle_state previous;                     /* drafter: streams of the token before */
    uint64_t previous_off;
    void *blocks[DS_MAX_LAYERS + 64]; uint32_t n_blocks;            /* plain device allocations */
    struct ds_scratch s;
};

int ds_load(const struct arle_model_load *args, struct arle_model **out, struct arle_err *err);
int ds_predict(const struct arle_model_load *args, struct arle_model_desc *out, struct arle_err *err);
void ds_destroy(struct arle_model *m);
int ds_bind(struct arle_model *m, const struct arle_cache_binding *b, struct arle_err *err);
int ds_step(struct arle_model *m, struct arle_stream *st, const struct arle_step *step, struct arle_err *err);

int ds_chat_render(void *ctx, const char *json, size_t len, const struct arle_chat_sink *sink, struct arle_chat_result *out,
                   struct arle_err *err);
const struct arle_output_syntax *ds_chat_syntax(void *ctx);

#endif
