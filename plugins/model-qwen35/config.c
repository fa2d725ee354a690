/*
 * Reads config.json (config.h). Two passes over the same tree: the sizes, then what must not be there. A key's path, such as
 * text_config.attention_bias, is what errors name, since people must find it in their file.
 */
#include "config.h"

#include <json-c/json.h>
#include <math.h>
#include <string.h>

#define MAX_CONFIG_BYTES ((size_t)16 << 20)

struct reader {
    struct json_object *root, *cfg;     /* cfg: text_config if there is one, else root */
    bool nested;
    struct arle_err *err;
};

static int refuse(struct reader *rd, const char *key, const char *why)
{
    char path[64];
    snprintf(path, sizeof path, "%s%s", rd->nested ? "text_config." : "", key);
    return arle_err_param(rd->err, -EINVAL, path, "config.json: %s: %s", path, why);
}

/* A key of the text part, NULL when absent or null. */
static struct json_object *get(const struct reader *rd, const char *key)
{
    struct json_object *v = NULL;
    return json_object_object_get_ex(rd->cfg, key, &v) ? v : NULL;
}

static struct json_object *root_get(const struct reader *rd, const char *key)
{
    struct json_object *v = NULL;
    return json_object_object_get_ex(rd->root, key, &v) ? v : NULL;
}

static const char *text_or(struct json_object *v, const char *def)
{
    return json_object_is_type(v, json_type_string) ? json_object_get_string(v) : def;
}

static int get_u32(struct reader *rd, const char *key, uint32_t def, uint32_t min, uint32_t max, uint32_t *out)
{
    struct json_object *v = get(rd, key);
    if (v == NULL) {
        *out = def;
        return 0;
    }
    int64_t n = json_object_get_int64(v);
    if (!json_object_is_type(v, json_type_int) || n < (int64_t)min || n > (int64_t)max) {
        char why[96];
        snprintf(why, sizeof why, "must be a whole number from %u to %u", min, max);
        return refuse(rd, key, why);
    }
    *out = (uint32_t)n;
    return 0;
}

static int get_number(struct reader *rd, struct json_object *obj, const char *key, double def, double *out)
{
    struct json_object *v = NULL;
    if (obj == NULL || !json_object_object_get_ex(obj, key, &v) || v == NULL) {
        *out = def;
        return 0;
    }
    if (!json_object_is_type(v, json_type_int) && !json_object_is_type(v, json_type_double))
        return refuse(rd, key, "must be a number");
    *out = json_object_get_double(v);
    return isfinite(*out) ? 0 : refuse(rd, key, "must be finite");
}

static int get_bool(struct reader *rd, const char *key, bool def, bool *out)
{
    struct json_object *v = get(rd, key);
    if (v != NULL && !json_object_is_type(v, json_type_boolean))
        return refuse(rd, key, "must be true or false");
    *out = v != NULL ? json_object_get_boolean(v) : def;
    return 0;
}

/* ---- recognition ---------------------------------------------------------------------------------------------------- */

static struct json_object *parse_json(const char *json, size_t len)
{
    if (json == NULL || len == 0 || len > MAX_CONFIG_BYTES)
        return NULL;
    struct json_tokener *tok = json_tokener_new_ex(32);
    if (tok == NULL)
        return NULL;
    struct json_object *root = json_tokener_parse_ex(tok, json, (int)len);
    if (json_tokener_get_error(tok) != json_tokener_success || !json_object_is_type(root, json_type_object)) {
        json_object_put(root);
        root = NULL;
    }
    json_tokener_free(tok);
    return root;
}

static bool known_type(const char *type, bool *moe)
{
    static const char *const dense[] = { "qwen3_5", "qwen3_5_text", "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM" };
    static const char *const mixed[] = { "qwen3_5_moe", "qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration",
                                         "Qwen3_5MoeForCausalLM" };
    for (size_t i = 0; i < 4; i++) {
        if (strcmp(type, dense[i]) == 0)
            return *moe = false, true;
        if (strcmp(type, mixed[i]) == 0)
            return *moe = true, true;
    }
    return false;
}

static bool family(struct json_object *root, bool *moe)
{
    struct json_object *v = NULL, *arch = NULL;
    if (json_object_object_get_ex(root, "model_type", &v) && known_type(text_or(v, ""), moe))
        return true;
    return json_object_object_get_ex(root, "architectures", &arch) && json_object_is_type(arch, json_type_array)
           && json_object_array_length(arch) > 0 && known_type(text_or(json_object_array_get_idx(arch, 0), ""), moe);
}

int qwen35_config_is_ours(const char *json, size_t len)
{
    bool moe;
    struct json_object *root = parse_json(json, len);
    int ours = root != NULL && family(root, &moe);
    json_object_put(root);
    return ours;
}

/* ---- sizes ---------------------------------------------------------------------------------------------------------- */

static int read_sizes(struct reader *rd, struct qwen35_config *c, bool moe)
{
    const struct { const char *key; uint32_t dense, mixed, min, max, *out; } table[] = {
        { "vocab_size", 248320, 248320, 1, 1u << 24, &c->vocab },
        { "hidden_size", 4096, 2048, 8, 1u << 16, &c->hidden },
        { "num_hidden_layers", 32, 40, 1, QWEN35_MAX_LAYERS, &c->n_layers },
        { "num_attention_heads", 16, 16, 1, 1024, &c->n_heads },
        { "num_key_value_heads", 4, 2, 1, 1024, &c->n_kv },
        { "head_dim", 256, 256, 8, 1024, &c->head_dim },
        { "linear_num_key_heads", 16, 16, 1, 1024, &c->n_k },
        { "linear_num_value_heads", 32, 32, 1, 1024, &c->n_v },
        { "linear_key_head_dim", 128, 128, 8, 1024, &c->dk },
        { "linear_value_head_dim", 128, 128, 8, 1024, &c->dv },
        { "max_position_embeddings", 32768, 32768, 1, 1u << 24, &c->context },
        { "mtp_num_hidden_layers", 0, 0, 0, 16, &c->mtp_layers },
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        int r = get_u32(rd, table[i].key, moe ? table[i].mixed : table[i].dense, table[i].min, table[i].max, table[i].out);
        if (r < 0)
            return r;
    }
    if (c->hidden % 8 != 0)
        return refuse(rd, "hidden_size", "must be a multiple of 8");
    if (c->head_dim % 8 != 0)
        return refuse(rd, "head_dim", "must be a multiple of 8");
    if (c->n_heads % c->n_kv != 0)
        return refuse(rd, "num_key_value_heads", "must divide num_attention_heads");
    if (c->n_v % c->n_k != 0)
        return refuse(rd, "linear_num_key_heads", "must divide linear_num_value_heads");
    if (c->dk % 8 != 0 || c->dv % 8 != 0)
        return refuse(rd, c->dk % 8 ? "linear_key_head_dim" : "linear_value_head_dim", "must be a multiple of 8");

    double eps;
    int r = get_number(rd, rd->cfg, "rms_norm_eps", 1e-6, &eps);
    if (r == 0 && !(eps > 0 && eps < 1))
        r = refuse(rd, "rms_norm_eps", "must lie between 0 and 1");
    c->eps = (float)eps;
    /* The published vocabulary is padded; shipped tokenizers end here. Other sizes have no padding that we know of. */
    c->n_valid = c->vocab == 248320 ? 248077 : c->vocab;
    return r;
}

static int read_mlp(struct reader *rd, struct qwen35_config *c, bool moe)
{
    int r = get_u32(rd, "num_experts", moe ? 256 : 0, 0, 4096, &c->n_experts);
    if (r < 0)
        return r;
    if (moe != (c->n_experts > 0))
        return refuse(rd, "num_experts", moe ? "a mixture-of-experts architecture needs experts"
                                             : "a dense architecture has no experts");
    if (!moe) {
        r = get_u32(rd, "intermediate_size", 12288, 8, 1u << 20, &c->inter);
        return r == 0 && c->inter % 8 != 0 ? refuse(rd, "intermediate_size", "must be a multiple of 8") : r;
    }
    r = get_u32(rd, "num_experts_per_tok", 8, 1, c->n_experts, &c->top_k);
    if (r == 0)
        r = get_u32(rd, "moe_intermediate_size", 512, 8, 1u << 20, &c->moe_inter);
    if (r == 0)
        r = get_u32(rd, "shared_expert_intermediate_size", 512, 8, 1u << 20, &c->shared_inter);
    if (r == 0 && (c->moe_inter % 8 != 0 || c->shared_inter % 8 != 0))
        r = refuse(rd, c->moe_inter % 8 ? "moe_intermediate_size" : "shared_expert_intermediate_size",
                   "must be a multiple of 8");
    return r;
}

static int read_layer_types(struct reader *rd, struct qwen35_config *c)
{
    uint32_t interval, n_full = 0;
    int r = get_u32(rd, "full_attention_interval", 4, 1, QWEN35_MAX_LAYERS, &interval);
    if (r < 0)
        return r;
    struct json_object *list = get(rd, "layer_types");
    if (list != NULL && (!json_object_is_type(list, json_type_array) || json_object_array_length(list) != c->n_layers))
        return refuse(rd, "layer_types", "must be a list with one entry per layer");
    for (uint32_t i = 0; i < c->n_layers; i++) {
        c->full[i] = (i + 1) % interval == 0;
        if (list != NULL) {
            const char *kind = text_or(json_object_array_get_idx(list, i), "");
            c->full[i] = strcmp(kind, "full_attention") == 0;
            if (!c->full[i] && strcmp(kind, "linear_attention") != 0)
                return refuse(rd, "layer_types", "knows only linear_attention and full_attention");
        }
        n_full += c->full[i];
    }
    if (n_full == 0 || n_full == c->n_layers)
        return refuse(rd, list != NULL ? "layer_types" : "full_attention_interval",
                      "both linear_attention and full_attention layers are needed");
    return 0;
}

static int read_tied(struct reader *rd, struct qwen35_config *c)
{
    struct json_object *v = root_get(rd, "tie_word_embeddings");    /* the root's word counts over the text part's */
    if (v == NULL)
        return get_bool(rd, "tie_word_embeddings", false, &c->tied);
    if (!json_object_is_type(v, json_type_boolean))
        return arle_err_param(rd->err, -EINVAL, "tie_word_embeddings", "config.json: tie_word_embeddings: must be true or false");
    c->tied = json_object_get_boolean(v);
    return 0;
}

/* ---- rope ----------------------------------------------------------------------------------------------------------- */

static double correction_dim(double rotations, double dim, double theta, double original)
{
    return dim * log(original / (rotations * 2 * M_PI)) / (2 * log(theta));
}

static double yarn_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

/*
 * YaRN (Peng et al. 2023, arXiv:2309.00071), as the reference computes it: slow frequencies are interpolated, fast ones kept,
 * with a ramp between; sine and cosine are scaled. It is static: short contexts change too.
 */
static int apply_yarn(struct reader *rd, struct json_object *rope, double theta, struct qwen35_config *c)
{
    double factor, original, fast, slow, attention, mscale, mscale_all;
    if (get_number(rd, rope, "factor", 0, &factor) < 0 || get_number(rd, rope, "original_max_position_embeddings", 262144, &original) < 0
        || get_number(rd, rope, "beta_fast", 32, &fast) < 0 || get_number(rd, rope, "beta_slow", 1, &slow) < 0
        || get_number(rd, rope, "attention_factor", 0, &attention) < 0 || get_number(rd, rope, "mscale", 0, &mscale) < 0
        || get_number(rd, rope, "mscale_all_dim", 0, &mscale_all) < 0)
        return -EINVAL;
    if (!(factor >= 1 && factor <= 1024))
        return refuse(rd, "rope_parameters.factor", "must lie from 1 to 1024");
    if (!(original >= 1 && factor * original <= 1 << 24))
        return refuse(rd, "rope_parameters.original_max_position_embeddings", "out of range");
    if (!(slow > 0 && fast > slow))
        return refuse(rd, "rope_parameters.beta_fast", "must be above beta_slow, and both positive");

    struct json_object *v = NULL;
    bool truncate = !(json_object_object_get_ex(rope, "truncate", &v) && json_object_is_type(v, json_type_boolean)
                      && !json_object_get_boolean(v));
    double lo = correction_dim(fast, c->rot_dim, theta, original), hi = correction_dim(slow, c->rot_dim, theta, original);
    if (truncate) {
        lo = floor(lo);
        hi = ceil(hi);
    }
    lo = fmax(lo, 0);
    hi = fmin(hi, c->rot_dim - 1);
    if (lo == hi)
        hi += 0.001;
    for (uint32_t j = 0; j < c->rot_dim / 2; j++) {
        float ramp = (float)fmin(fmax((j - lo) / (hi - lo), 0), 1);
        float keep = 1 - ramp;
        c->inv_freq[j] = c->inv_freq[j] / (float)factor * (1 - keep) + c->inv_freq[j] * keep;
    }
    if (attention > 0)
        c->rope_scale = (float)attention;
    else if (mscale > 0 && mscale_all > 0)
        c->rope_scale = (float)(yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all));
    else
        c->rope_scale = (float)yarn_mscale(factor, 1);
    c->context = (uint32_t)fmax(c->context, factor * original);
    return 0;
}

static int read_rope(struct reader *rd, struct qwen35_config *c)
{
    struct json_object *rope = get(rd, "rope_parameters"), *v = NULL;
    const char *key = "rope_parameters";
    if (rope == NULL) {
        rope = get(rd, "rope_scaling");
        key = "rope_scaling";
    }
    if (rope != NULL && !json_object_is_type(rope, json_type_object))
        return refuse(rd, key, "must be an object");

    /* Older files keep theta and the rotated part beside the object. */
    double theta, partial;
    if (get_number(rd, rd->cfg, "rope_theta", 1e7, &theta) < 0 || get_number(rd, rope, "rope_theta", theta, &theta) < 0
        || get_number(rd, rd->cfg, "partial_rotary_factor", 0.25, &partial) < 0
        || get_number(rd, rope, "partial_rotary_factor", partial, &partial) < 0)
        return -EINVAL;
    if (!(theta > 1 && theta < 1e30))
        return refuse(rd, "rope_theta", "must be above 1");
    if (!(partial > 0 && partial <= 1))
        return refuse(rd, "partial_rotary_factor", "must lie between 0 and 1");
    c->rot_dim = (uint32_t)(c->head_dim * partial);
    if (c->rot_dim == 0 || c->rot_dim % 2 != 0 || c->rot_dim > QWEN35_MAX_ROT)
        return refuse(rd, "partial_rotary_factor", "leaves an unusable number of rotated channels");
    /* In float32 throughout, like the reference: near the end of the context the rounding of a frequency is visible. */
    for (uint32_t j = 0; j < c->rot_dim / 2; j++)
        c->inv_freq[j] = 1.0f / powf((float)theta, (float)(2 * j) / (float)c->rot_dim);
    c->rope_scale = 1;

    const char *type = "default";
    if (rope != NULL && (json_object_object_get_ex(rope, "rope_type", &v) || json_object_object_get_ex(rope, "type", &v)))
        type = text_or(v, "");
    if (strcmp(type, "yarn") == 0)
        return apply_yarn(rd, rope, theta, c);
    if (strcmp(type, "default") != 0 && strcmp(type, "mrope") != 0)
        return refuse(rd, "rope_parameters.rope_type", "only default, mrope and yarn are supported");
    return 0;
}

/* ---- what is refused ------------------------------------------------------------------------------------------------ */

static int check_flags(struct reader *rd, bool moe, struct qwen35_config *c)
{
    const struct { const char *key; bool def, ok; const char *why; } flags[] = {
        { "attention_bias", false, false, "attention with bias is not supported" },
        { "attn_output_gate", true, true, "attention without its output gate is not supported" },
        { "mtp_use_dedicated_embeddings", false, false, "a drafter with its own embedding is not supported" },
        { "norm_topk_prob", true, true, "routing without renormalised weights is not supported" },
    };
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        bool v;
        int r = get_bool(rd, flags[i].key, flags[i].def, &v);
        if (r < 0)
            return r;
        if (v != flags[i].ok)
            return refuse(rd, flags[i].key, flags[i].why);
    }
    uint32_t n;
    if (get_u32(rd, "linear_conv_kernel_dim", 4, 4, 4, &n) < 0 || get_u32(rd, "decoder_sparse_step", 1, 1, 1, &n) < 0)
        return -EINVAL;
    if (c->mtp_layers > 1)
        return refuse(rd, "mtp_num_hidden_layers", "only one drafting layer is supported");
    if (strcmp(text_or(get(rd, "hidden_act"), "silu"), "silu") != 0)
        return refuse(rd, "hidden_act", "only silu is supported");
    struct json_object *gate = get(rd, "output_gate_type"), *only = get(rd, "mlp_only_layers");
    const char *gate_type = gate != NULL ? text_or(gate, "?") : "silu";
    if (strcmp(gate_type, "swish") != 0 && strcmp(gate_type, "silu") != 0)
        return refuse(rd, "output_gate_type", "only swish (silu) is supported");
    c->json_arguments = gate != NULL;
    if (moe && json_object_is_type(only, json_type_array) && json_object_array_length(only) > 0)
        return refuse(rd, "mlp_only_layers", "dense layers within a mixture of experts are not supported");
    c->state_f32 = strcmp(text_or(get(rd, "mamba_ssm_dtype"), "float32"), "float32") == 0;
    return 0;
}

static int check_fp8_block(struct reader *rd, struct json_object *q)
{
    struct json_object *block = NULL;
    if (!json_object_object_get_ex(q, "weight_block_size", &block) || !json_object_is_type(block, json_type_array)
        || json_object_array_length(block) != 2 || json_object_get_int(json_object_array_get_idx(block, 0)) != 128
        || json_object_get_int(json_object_array_get_idx(block, 1)) != 128)
        return arle_err_param(rd->err, -EINVAL, "quantization_config.weight_block_size",
                              "config.json: quantization_config.weight_block_size: only [128, 128] is supported for fp8");
    return 0;
}

static int check_quantisation(struct reader *rd, struct qwen35_config *c)
{
    if (root_get(rd, "quantization") != NULL)
        return arle_err_param(rd->err, -EINVAL, "quantization", "config.json: quantization: MLX-quantised weights are not "
                              "supported; use the original checkpoint");
    struct json_object *q = root_get(rd, "quantization_config"), *v = NULL;
    if (q == NULL)
        q = get(rd, "quantization_config");
    if (q == NULL)
        return 0;
    const char *method = json_object_is_type(q, json_type_object) && json_object_object_get_ex(q, "quant_method", &v)
                         ? text_or(v, "?") : "?";
    if (strcmp(method, "fp8") != 0)
        return arle_err_param(rd->err, -EINVAL, "quantization_config.quant_method", "config.json: quantization_config."
                              "quant_method: %.40s is not supported; bf16 and fp8 with 128x128 blocks are", method);
    c->fp8 = true;
    return check_fp8_block(rd, q);
}

static int read_all(struct reader *rd, bool moe, struct qwen35_config *c)
{
    int r = read_sizes(rd, c, moe);
    if (r == 0)
        r = read_mlp(rd, c, moe);
    if (r == 0)
        r = read_layer_types(rd, c);
    if (r == 0)
        r = read_tied(rd, c);
    if (r == 0)
        r = read_rope(rd, c);
    if (r == 0)
        r = check_flags(rd, moe, c);
    return r < 0 ? r : check_quantisation(rd, c);
}

int qwen35_config_parse(const char *json, size_t len, struct qwen35_config *out, struct arle_err *err)
{
    struct reader rd = { .root = parse_json(json, len), .err = err };
    bool moe = false;
    if (rd.root == NULL)
        return arle_err_set(err, -EINVAL, "config.json: not a JSON object");
    struct qwen35_config c = { 0 };
    int r;
    rd.cfg = root_get(&rd, "text_config");
    rd.nested = rd.cfg != NULL;
    if (!rd.nested)
        rd.cfg = rd.root;
    if (!family(rd.root, &moe))
        r = arle_err_param(err, -EINVAL, "model_type", "config.json: model_type: not of the Qwen3.5 family");
    else if (!json_object_is_type(rd.cfg, json_type_object))
        r = arle_err_param(err, -EINVAL, "text_config", "config.json: text_config: must be an object");
    else
        r = read_all(&rd, moe, &c);
    json_object_put(rd.root);
    if (r == 0)
        *out = c;
    return r;
}
