/*
 * What a Qwen3.5 config.json says, checked: nested (multimodal) and flat (text only), dense and mixture of experts.
 * Everything that this plugin cannot compute is refused here, by the name of the key.
 */
#ifndef MODEL_QWEN35_CONFIG_H
#define MODEL_QWEN35_CONFIG_H

#include <arle/err.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QWEN35_MAX_LAYERS 512
#define QWEN35_MAX_ROT 512

struct qwen35_config {
    uint32_t vocab, n_valid;            /* n_valid: ids from here on are padding rows of the embedding */
    uint32_t hidden, inter, n_layers;   /* inter: dense MLP width, 0 for mixtures */
    uint32_t n_heads, n_kv, head_dim;   /* full attention */
    uint32_t n_k, n_v, dk, dv;          /* delta net */
    uint32_t n_experts, top_k, moe_inter, shared_inter;     /* n_experts 0: dense */
    uint32_t mtp_layers;                /* what the config says; the checkpoint may lack them */
    uint32_t context;                   /* positions, context extension included */
    uint32_t rot_dim;
    float rope_scale;                   /* YaRN's factor on sine and cosine, else 1 */
    float eps;
    bool tied, fp8;
    bool json_arguments;                /* chat template of 3.6 and later: tool arguments as JSON (told by output_gate_type) */
    bool state_f32;                     /* false: the config asks for another state dtype; f32 is used all the same */
    uint8_t full[QWEN35_MAX_LAYERS];    /* 1: full attention, 0: delta net */
    float inv_freq[QWEN35_MAX_ROT / 2];
};

/** 1 when the text is a config.json of this family, 0 when it is not (or is no JSON at all). */
int qwen35_config_is_ours(const char *json, size_t len);

/** Reads and checks. -EINVAL: err->param is the key at fault. Any thread. */
int qwen35_config_parse(const char *json, size_t len, struct qwen35_config *out, struct arle_err *err);

#endif
