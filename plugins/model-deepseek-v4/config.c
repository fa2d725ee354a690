/*
 * Reads config.json: the published form (compress_ratios, rope_scaling) and the form that transformers saves
 * (layer_types, compress_rates, rope_parameters). Only values in the file count; there are no defaults for shapes.
 */
#include "model.h"

#include <json-c/json.h>
#include <math.h>
#include <string.h>

static struct json_object *member(struct json_object *o, const char *key)
{
    struct json_object *v = NULL;
    if (o == NULL || !json_object_is_type(o, json_type_object) || !json_object_object_get_ex(o, key, &v))
        return NULL;
    return v;
}

static int get_u32(struct json_object *o, const char *key, uint32_t min, uint32_t max, uint32_t *out, struct arle_err *err)
{
    struct json_object *v = member(o, key);
    if (v == NULL || !json_object_is_type(v, json_type_int))
        return arle_err_param(err, -EINVAL, key, "config.json: %s is %s", key, v ? "not an integer" : "missing");
    int64_t n = json_object_get_int64(v);
    if (n < (int64_t)min || n > (int64_t)max)
        return arle_err_param(err, -EINVAL, key, "config.json: %s = %lld, must be %u to %u", key, (long long)n, min, max);
    *out = (uint32_t)n;
    return 0;
}

static int get_f64(struct json_object *o, const char *key, double def, double *out, struct arle_err *err)
{
    struct json_object *v = member(o, key);
    *out = def;
    if (v == NULL && !isnan(def))
        return 0;
    if (v == NULL || !(json_object_is_type(v, json_type_int) || json_object_is_type(v, json_type_double)))
        return arle_err_param(err, -EINVAL, key, "config.json: %s is %s", key, v ? "not a number" : "missing");
    *out = json_object_get_double(v);
    if (!isfinite(*out) || *out < 0)
        return arle_err_param(err, -EINVAL, key, "config.json: %s must be finite and not negative", key);
    return 0;
}

static bool str_is(struct json_object *v, const char *s)
{
    return v != NULL && json_object_is_type(v, json_type_string) && strcmp(json_object_get_string(v), s) == 0;
}

/* compress_ratios: one number per layer, then the drafter's. */
static int read_ratios(struct json_object *root, struct json_object *arr, struct ds_config *c, struct arle_err *err)
{
    size_t n = json_object_array_length(arr);
    if (n < c->L || n > c->L + 3)
        return arle_err_param(err, -EINVAL, "compress_ratios", "config.json: compress_ratios has %zu entries for %u layers", n, c->L);
    for (size_t i = 0; i < n && i <= c->L; i++) {
        struct json_object *v = json_object_array_get_idx(arr, i);
        int64_t r = json_object_is_type(v, json_type_int) ? json_object_get_int64(v) : -1;
        if (r != 0 && r != 4 && r != 128)
            return arle_err_param(err, -EINVAL, "compress_ratios",
                                  "config.json: compress_ratios[%zu] = %lld; this plugin knows 0, 4 and 128", i, (long long)r);
        c->ratio[i] = (uint32_t)r;
        c->kind[i] = r == 0 ? DS_SWA : r == 4 ? DS_CSA : DS_HCA;
    }
    uint32_t hash = 0;
    int r = member(root, "num_hash_layers") ? get_u32(root, "num_hash_layers", 0, c->L, &hash, err) : 0;
    for (uint32_t i = 0; i < hash; i++)
        c->hash[i] = true;
    return r;
}

static int read_layer_types(struct json_object *root, struct json_object *types, struct ds_config *c, struct arle_err *err)
{
    struct json_object *rates = member(root, "compress_rates"), *mlp = member(root, "mlp_layer_types");
    if (json_object_array_length(types) != c->L)
        return arle_err_param(err, -EINVAL, "layer_types", "config.json: layer_types has %zu entries for %u layers",
                              json_object_array_length(types), c->L);
    if (mlp != NULL && (!json_object_is_type(mlp, json_type_array) || json_object_array_length(mlp) != c->L))
        return arle_err_param(err, -EINVAL, "mlp_layer_types", "config.json: mlp_layer_types must have %u entries", c->L);
    for (uint32_t i = 0; i < c->L; i++) {
        struct json_object *t = json_object_array_get_idx(types, i);
        struct json_object *m = mlp ? json_object_array_get_idx(mlp, i) : NULL;
        if (str_is(t, "sliding_attention")) {
            c->kind[i] = DS_SWA;
        } else if (str_is(t, "heavily_compressed_attention") || str_is(t, "compressed_sparse_attention")) {
            c->kind[i] = str_is(t, "compressed_sparse_attention") ? DS_CSA : DS_HCA;
            int r = get_u32(rates, json_object_get_string(t), 1, 4096, &c->ratio[i], err);
            if (r < 0)
                return r;
        } else {
            return arle_err_param(err, -EINVAL, "layer_types", "config.json: layer_types[%u] is not a known attention kind", i);
        }
        if (m != NULL && !str_is(m, "moe") && !str_is(m, "hash_moe"))
            return arle_err_param(err, -EINVAL, "mlp_layer_types", "config.json: mlp_layer_types[%u] is not moe or hash_moe", i);
        c->hash[i] = str_is(m, "hash_moe");
    }
    return 0;
}

static int read_rope(struct json_object *root, struct ds_config *c, struct arle_err *err)
{
    struct json_object *params = member(root, "rope_parameters"), *main = member(params, "main");
    struct json_object *comp = member(params, "compress"), *yarn = comp ? comp : member(root, "rope_scaling");
    double attention = 1;
    int r = get_f64(main ? main : root, "rope_theta", NAN, &c->theta, err);
    if (r == 0)
        r = comp ? get_f64(comp, "rope_theta", NAN, &c->compress_theta, err)
                 : get_f64(root, "compress_rope_theta", NAN, &c->compress_theta, err);
    c->yarn_factor = 1;
    struct json_object *type = member(yarn, "rope_type") ? member(yarn, "rope_type") : member(yarn, "type");
    if (r < 0 || yarn == NULL || json_object_is_type(yarn, json_type_null) || str_is(type, "default"))
        return r;
    if (!str_is(type, "yarn"))
        return arle_err_param(err, -EINVAL, "rope_scaling.type", "config.json: rope type is not yarn or default");
    if ((r = get_f64(yarn, "factor", NAN, &c->yarn_factor, err)) < 0 ||
        (r = get_f64(yarn, "beta_fast", 32, &c->beta_fast, err)) < 0 ||
        (r = get_f64(yarn, "beta_slow", 1, &c->beta_slow, err)) < 0 ||
        (r = get_f64(yarn, "attention_factor", 1, &attention, err)) < 0 ||
        (r = get_f64(yarn, "original_max_position_embeddings", NAN, &c->yarn_original, err)) < 0)
        return r;
    if (attention != 1)
        return arle_err_param(err, -EINVAL, "attention_factor", "config.json: attention_factor other than 1 is not supported");
    if (c->yarn_factor < 1 || c->beta_fast <= 0 || c->beta_slow <= 0 || c->yarn_original < 1)
        return arle_err_param(err, -EINVAL, "rope_scaling", "config.json: yarn parameters out of range");
    return 0;
}

static int read_quantisation(struct json_object *root, struct ds_config *c, struct arle_err *err)
{
    struct json_object *q = member(root, "quantization_config");
    if (q == NULL || json_object_is_type(q, json_type_null))
        return 0;
    if (!str_is(member(q, "quant_method"), "fp8") || !str_is(member(q, "scale_fmt"), "ue8m0"))
        return arle_err_param(err, -EINVAL, "quantization_config",
                              "config.json: only quant_method fp8 with scale_fmt ue8m0 is supported");
    c->quantised = true;
    /* The first published configuration has no expert_dtype; its experts are FP4. */
    struct json_object *e = member(root, "expert_dtype");
    c->fp4_experts = e == NULL || str_is(e, "fp4");
    return 0;
}

static int refuse(struct json_object *root, struct arle_err *err)
{
    static const struct { const char *key, *want; } words[] = {
        { "hidden_act", "silu" }, { "scoring_func", "sqrtsoftplus" }, { "topk_method", "noaux_tc" } };
    if (member(root, "dspark_block_size") != NULL)
        return arle_err_param(err, -EINVAL, "dspark_block_size", "config.json: DSpark drafters are not supported");
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (member(root, words[i].key) != NULL && !str_is(member(root, words[i].key), words[i].want))
            return arle_err_param(err, -EINVAL, words[i].key, "config.json: %s must be %s", words[i].key, words[i].want);
    if (json_object_get_boolean(member(root, "attention_bias")))
        return arle_err_param(err, -EINVAL, "attention_bias", "config.json: attention_bias true is not supported");
    if (json_object_get_boolean(member(root, "tie_word_embeddings")))
        return arle_err_param(err, -EINVAL, "tie_word_embeddings", "config.json: tied embeddings are not supported");
    struct json_object *norm = member(root, "norm_topk_prob");
    if (norm != NULL && !json_object_get_boolean(norm))
        return arle_err_param(err, -EINVAL, "norm_topk_prob", "config.json: norm_topk_prob false is not supported");
    return 0;
}

static int check_shapes(const struct ds_config *c, struct arle_err *err)
{
    if (c->rot % 2 != 0 || c->rot > c->d || c->rot > c->index_dim)
        return arle_err_param(err, -EINVAL, "qk_rope_head_dim", "config.json: qk_rope_head_dim = %u does not fit head_dim %u and "
                              "index_head_dim %u", c->rot, c->d, c->index_dim);
    if (c->H % c->G != 0 || c->G > 64)
        return arle_err_param(err, -EINVAL, "o_groups", "config.json: o_groups = %u must divide num_attention_heads = %u (at most 64)",
                              c->G, c->H);
    if (c->K > c->E)
        return arle_err_param(err, -EINVAL, "num_experts_per_tok", "config.json: %u of %u experts", c->K, c->E);
    if (c->index_dim & (c->index_dim - 1))
        return arle_err_param(err, -EINVAL, "index_head_dim", "config.json: index_head_dim must be a power of two");
    return 0;
}

static int parse_root(struct json_object *root, struct ds_config *c, struct arle_err *err)
{
    const struct { const char *key; uint32_t min, max; uint32_t *out; } ints[] = {
        { "vocab_size", 1, 1u << 24, &c->vocab }, { "hidden_size", 1, 1u << 17, &c->D }, { "num_hidden_layers", 1, DS_MAX_LAYERS, &c->L },
        { "num_attention_heads", 1, 4096, &c->H }, { "head_dim", 2, 8192, &c->d }, { "qk_rope_head_dim", 2, 8192, &c->rot },
        { "q_lora_rank", 1, 1u << 16, &c->Q }, { "o_groups", 1, 64, &c->G }, { "o_lora_rank", 1, 1u << 16, &c->R },
        { "sliding_window", 1, 1u << 16, &c->W }, { "index_n_heads", 1, 1024, &c->index_heads },
        { "index_head_dim", 2, 1024, &c->index_dim }, { "index_topk", 1, 1u << 16, &c->topk }, { "hc_mult", 1, 8, &c->S },
        { "hc_sinkhorn_iters", 1, 1000, &c->iters }, { "n_routed_experts", 1, 4096, &c->E },
        { "num_experts_per_tok", 1, 64, &c->K }, { "moe_intermediate_size", 1, 1u << 17, &c->I },
        { "max_position_embeddings", 1, 1u << 24, &c->context } };
    double f[4];
    int r = refuse(root, err);
    for (size_t i = 0; r == 0 && i < sizeof ints / sizeof ints[0]; i++)
        r = get_u32(root, ints[i].key, ints[i].min, ints[i].max, ints[i].out, err);
    uint32_t shared = 1, kv_heads = 1;
    if (r == 0 && member(root, "n_shared_experts"))
        r = get_u32(root, "n_shared_experts", 1, 1, &shared, err);
    if (r == 0 && member(root, "num_key_value_heads"))
        r = get_u32(root, "num_key_value_heads", 1, 1, &kv_heads, err);
    if (r == 0 && member(root, "num_nextn_predict_layers"))
        r = get_u32(root, "num_nextn_predict_layers", 0, 1, &c->nextn, err);
    if (r < 0 || (r = get_f64(root, "hc_eps", NAN, &f[0], err)) < 0 || (r = get_f64(root, "rms_norm_eps", NAN, &f[1], err)) < 0 ||
        (r = get_f64(root, "routed_scaling_factor", NAN, &f[2], err)) < 0 || (r = get_f64(root, "swiglu_limit", 0, &f[3], err)) < 0)
        return r;
    c->hc_eps = (float)f[0], c->eps = (float)f[1], c->route_scale = (float)f[2], c->limit = (float)f[3];
    struct json_object *ratios = member(root, "compress_ratios"), *types = member(root, "layer_types");
    if (ratios != NULL && json_object_is_type(ratios, json_type_array))
        r = read_ratios(root, ratios, c, err);
    else if (types != NULL && json_object_is_type(types, json_type_array))
        r = read_layer_types(root, types, c, err);
    else
        r = arle_err_param(err, -EINVAL, "compress_ratios", "config.json: neither compress_ratios nor layer_types is an array");
    if (r == 0)
        r = read_rope(root, c, err);
    if (r == 0)
        r = read_quantisation(root, c, err);
    return r == 0 ? check_shapes(c, err) : r;
}

static struct json_object *parse(const char *json, size_t len)
{
    struct json_tokener *tok = json_tokener_new_ex(32);
    if (tok == NULL || len > INT32_MAX) {
        if (tok)
            json_tokener_free(tok);
        return NULL;
    }
    struct json_object *root = json_tokener_parse_ex(tok, json, (int)len);
    if (json_tokener_get_error(tok) == json_tokener_continue && root == NULL)
        root = NULL;
    json_tokener_free(tok);
    if (root != NULL && !json_object_is_type(root, json_type_object)) {
        json_object_put(root);
        root = NULL;
    }
    return root;
}

int ds_config_parse(const char *json, size_t len, struct ds_config *out, struct arle_err *err)
{
    struct ds_config c = { 0 };
    struct json_object *root = parse(json, len);
    if (root == NULL)
        return arle_err_set(err, -EINVAL, "config.json is not a JSON object");
    int r = parse_root(root, &c, err);
    json_object_put(root);
    if (r == 0)
        *out = c;
    return r;
}

int ds_config_recognise(const char *json, size_t len, struct arle_err *err)
{
    struct json_object *root = parse(json, len);
    if (root == NULL)
        return 0;
    bool ours = str_is(member(root, "model_type"), "deepseek_v4");
    bool near = !ours && member(root, "model_type") != NULL && json_object_is_type(member(root, "model_type"), json_type_string) &&
                strncmp(json_object_get_string(member(root, "model_type")), "deepseek_v4", 11) == 0;
    int r = ours ? 1 : 0;
    if (near)
        r = arle_err_param(err, -EINVAL, "model_type", "config.json: model_type %s is a later architecture that this plugin does not cover",
                           json_object_get_string(member(root, "model_type")));
    json_object_put(root);
    struct ds_config c;
    if (ours) {
        int e = ds_config_parse(json, len, &c, err);
        if (e < 0)
            r = e;
    }
    return r;
}
