/* generation_config.json: how a checkpoint wants to be sampled when a request does not say. */
#include "sched/engine.h"
#include <json-c/json.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static int parse(const char *what, const char *text, size_t len, json_object **out, struct arle_err *err)
{
    *out = NULL;
    if (text == NULL)
        return 0;
    json_tokener *tok = json_tokener_new();
    if (tok == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for %s", what);
    if (len <= INT_MAX)
        *out = json_tokener_parse_ex(tok, text, (int)len);
    enum json_tokener_error e = json_tokener_get_error(tok);
    json_tokener_free(tok);
    if (*out != NULL && json_object_is_type(*out, json_type_object))
        return 0;
    json_object_put(*out);
    *out = NULL;
    return arle_err_set(err, -EINVAL, "%s is not a JSON object: %s", what, e == json_tokener_success ? "wrong type" : json_tokener_error_desc(e));
}

static int number(json_object *o, const char *key, double lo, double hi, double *out, struct arle_err *err)
{
    json_object *v;
    if (o == NULL || !json_object_object_get_ex(o, key, &v) || v == NULL)
        return 0;
    if (!json_object_is_type(v, json_type_double) && !json_object_is_type(v, json_type_int))
        return arle_err_param(err, -EINVAL, key, "generation_config.json: %s must be a number", key);
    double x = json_object_get_double(v);
    if (!(x >= lo && x <= hi))
        return arle_err_param(err, -EINVAL, key, "generation_config.json: %s must be between %g and %g", key, lo, hi);
    *out = x;
    return 0;
}

static int add_eos(struct generation_defaults *g, json_object *v, struct arle_err *err)
{
    int64_t id = json_object_get_int64(v);
    if (!json_object_is_type(v, json_type_int) || id < 0 || id > INT32_MAX)
        return arle_err_param(err, -EINVAL, "eos_token_id", "eos_token_id must be a token id or a list of them");
    for (uint32_t i = 0; i < g->n_eos; i++)
        if (g->eos[i] == id)
            return 0;
    if (g->n_eos == GEN_MAX_EOS)
        return arle_err_param(err, -EINVAL, "eos_token_id", "more than %d end tokens", GEN_MAX_EOS);
    g->eos[g->n_eos++] = (int32_t)id;
    return 0;
}

static int read_eos(struct generation_defaults *g, json_object *o, struct arle_err *err)
{
    json_object *v;
    if (o == NULL || !json_object_object_get_ex(o, "eos_token_id", &v) || v == NULL)
        return 0;
    if (!json_object_is_type(v, json_type_array))
        return add_eos(g, v, err);
    int r = 0;
    for (size_t i = 0; i < json_object_array_length(v) && r == 0; i++)
        r = add_eos(g, json_object_array_get_idx(v, i), err);
    return r;
}

/* The end tokens of config.json count only when generation_config.json names none: it is the newer statement of the two. */
static int read_all_eos(struct generation_defaults *g, json_object *gen, json_object *config, struct arle_err *err)
{
    json_object *text = NULL;
    int r = read_eos(g, gen, err);
    if (r == 0 && g->n_eos == 0)
        r = read_eos(g, config, err);
    if (r == 0 && g->n_eos == 0 && config != NULL && json_object_object_get_ex(config, "text_config", &text) &&
        json_object_is_type(text, json_type_object))
        r = read_eos(g, text, err);
    return r;
}

static int read_numbers(struct generation_defaults *g, json_object *gen, struct arle_err *err)
{
    double temperature = 1, top_p = 1, min_p = 0, repetition = 1, top_k = 0;
    json_object *v;
    int r = number(gen, "temperature", 0, 100, &temperature, err);
    if (r == 0)
        r = number(gen, "top_p", 0, 1, &top_p, err);
    if (r == 0)
        r = number(gen, "min_p", 0, 1, &min_p, err);
    if (r == 0)
        r = number(gen, "repetition_penalty", 0, 10, &repetition, err);
    if (r == 0)
        r = number(gen, "top_k", 0, INT32_MAX, &top_k, err);
    if (r < 0)
        return r;
    if (gen != NULL && json_object_object_get_ex(gen, "do_sample", &v) && v != NULL && !json_object_get_boolean(v))
        temperature = 0;
    g->temperature = (float)temperature;
    g->top_p = top_p > 0 ? (float)top_p : 1;
    g->min_p = (float)min_p;
    g->repetition = repetition > 0 ? (float)repetition : 1;
    g->top_k = (int32_t)top_k;
    return 0;
}

int generation_parse(const char *gen_json, size_t gen_len, const char *config_json, size_t config_len,
                     struct generation_defaults *out, struct arle_err *err)
{
    json_object *gen = NULL, *config = NULL;
    struct generation_defaults g = { 0 };
    int r = parse("generation_config.json", gen_json, gen_len, &gen, err);
    if (r == 0)
        r = parse("config.json", config_json, config_len, &config, err);
    if (r == 0)
        r = read_numbers(&g, gen, err);
    if (r == 0)
        r = read_all_eos(&g, gen, config, err);
    json_object_put(gen);
    json_object_put(config);
    if (r == 0)
        *out = g;
    return r;
}
