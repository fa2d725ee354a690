/* Reading of request bodies; see json_in.h. A new sampling option is one row in the field tables and one line in a reader. */
#include "http/json_in.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include <json-c/json.h>

#include "config/config.h"
#include "util/jfield.h"

/* ---- known fields ---- */

#define COMMON_FIELDS \
    "model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", \
    "repetition_penalty", "logit_bias", "seed", "max_tokens", "stop", "stop_token_ids", "n", "logprobs", "ignore_eos", "user", \
    "priority", "cache_salt", "include_cache_detail", "return_token_ids", "return_drafts", "skip_special_tokens", "return_tokens_as_token_ids"

/* Read by the chat's own reader, or accepted because they change nothing here (see unused_fields). */
static const char *const chat_fields[] = {
    COMMON_FIELDS, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format",
    "chat_template_kwargs", "reasoning_effort", "add_generation_prompt", "continue_final_message", "include_reasoning",
    "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key", "modalities",
    "verbosity", NULL
};
static const char *const completion_fields[] = {
    COMMON_FIELDS, "prompt", "echo", "best_of", "suffix", "add_special_tokens", NULL
};

/* OpenAI fields that ask for something this server does not do: refused with a reason rather than as unknown. */
static const char *const refused_fields[] = {
    "functions", "function_call", "audio", "prediction", "web_search_options", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "structured_outputs", "min_tokens", "prompt_logprobs", "use_beam_search", "length_penalty", NULL
};

/* Accepted because they change nothing here, with the type that they must have all the same. */
static const struct { const char *key; json_type type; const char *wanted; const char *choices; } unused_fields[] = {
    { "include_reasoning", json_type_boolean, "a boolean", NULL }, { "metadata", json_type_object, "an object", NULL },
    { "store", json_type_boolean, "a boolean", NULL }, { "parallel_tool_calls", json_type_boolean, "a boolean", NULL },
    { "service_tier", json_type_string, "a string", "auto default flex scale priority" },
    { "safety_identifier", json_type_string, "a string", NULL }, { "prompt_cache_key", json_type_string, "a string", NULL },
    { "verbosity", json_type_string, "a string", "low medium high" }, { "add_special_tokens", json_type_boolean, "a boolean", NULL },
};

static bool in_words(const char *word, const char *words)
{
    size_t n = strlen(word);
    for (; *words != '\0'; words += strcspn(words, " "), words += *words == ' ')
        if (strcspn(words, " ") == n && memcmp(words, word, n) == 0)
            return true;
    return false;
}

static int check_unused(struct json_object *body, struct arle_err *err)
{
    struct json_object *v;
    for (size_t i = 0; i < sizeof unused_fields / sizeof unused_fields[0]; i++) {
        const char *key = unused_fields[i].key, *choices = unused_fields[i].choices;
        if (!jfield_get(body, key, &v))
            continue;
        if (json_object_get_type(v) != unused_fields[i].type)
            return jfield_wrong_type("", key, unused_fields[i].wanted, v, err);
        if (choices != NULL && !in_words(json_object_get_string(v), choices))
            return arle_err_param(err, -EINVAL, key, "'%s' must be one of: %s", key, choices);
        if (unused_fields[i].type != json_type_object)
            continue;
        json_object_object_foreach(v, name, value)
            if (!json_object_is_type(value, json_type_string))
                return jfield_wrong_type("metadata.", name, "a string", value, err);
    }
    return 0;
}

const char *const *dialect_fields(enum dialect dialect)
{
    return dialect == DIALECT_CHAT ? chat_fields : completion_fields;
}

static size_t count_words(const char *const *words)
{
    size_t n = 0;
    while (words[n] != NULL)
        n++;
    return n;
}

static bool listed(const char *word, const char *const *words)
{
    for (; *words != NULL; words++)
        if (strcmp(word, *words) == 0)
            return true;
    return false;
}

static int check_fields(enum dialect dialect, struct json_object *body, struct arle_err *err)
{
    const char *const *known = dialect_fields(dialect);
    json_object_object_foreach(body, key, value) {
        if (listed(key, known) || value == NULL)
            continue;
        if (listed(key, refused_fields))
            return arle_err_param(err, -ENOTSUP, key, "'%.40s' is not supported by this server", key);
        const char *near = nearest_word(key, known, count_words(known));
        return arle_err_param(err, -ENOKEY, key, "unknown field '%.80s'%s%s%s", key, near ? "; did you mean '" : "",
                              near ? near : "", near ? "'?" : "");
    }
    return 0;
}

/* ---- readers ---- */

static int read_f32(struct json_object *body, const char *key, double min, double max, float *out, struct arle_err *err)
{
    double v;
    int r = jfield_f64(body, "", key, min, max, &v, err);
    if (r > 0)
        *out = (float)v;
    return r < 0 ? r : 0;
}

static int read_bool(struct json_object *body, const char *key, bool *out, struct arle_err *err)
{
    int r = jfield_bool(body, "", key, out, err);
    return r < 0 ? r : 0;
}

static int read_i64(struct json_object *body, const char *key, int64_t min, int64_t max, int64_t *out, struct arle_err *err)
{
    int r = jfield_i64(body, "", key, min, max, out, err);
    return r < 0 ? r : 0;
}

static int read_bias(struct gen_params *p, struct json_object *body, uint32_t vocab, struct arle_err *err)
{
    struct json_object *map = NULL;
    int r = jfield_object(body, "", "logit_bias", &map, err);
    if (r <= 0)
        return r;
    size_t n = (size_t)json_object_object_length(map);
    if (n > 1024)
        return arle_err_param(err, -ERANGE, "logit_bias", "'logit_bias' holds %zu tokens; at most 1024 are accepted", n);
    p->bias = calloc(n ? n : 1, sizeof *p->bias);
    if (p->bias == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for logit_bias");
    json_object_object_foreach(map, key, value) {
        char *end;
        errno = 0;
        long id = strtol(key, &end, 10);
        if (strspn(key, "0123456789") != strlen(key) || *key == '\0' || *end != '\0' || errno != 0 || id < 0 || id >= (long)vocab)
            return arle_err_param(err, -ERANGE, "logit_bias", "'logit_bias': \"%.40s\" is not a token id below %u", key, vocab);
        if (!json_object_is_type(value, json_type_int) && !json_object_is_type(value, json_type_double))
            return jfield_wrong_type("logit_bias.", key, "a number", value, err);
        double v = json_object_get_double(value);
        if (!(v >= -100 && v <= 100))
            return arle_err_param(err, -ERANGE, "logit_bias", "'logit_bias.%s' must be between -100 and 100", key);
        p->bias[p->sampling.n_bias++] = (struct arle_bias){ .id = (int32_t)id, .value = (float)v };
    }
    p->sampling.bias = p->bias;
    return 0;
}

static int read_sampling(struct gen_params *p, struct json_object *body, const struct gen_defaults *d, struct arle_err *err)
{
    struct sampling *s = &p->sampling;
    int64_t top_k = d->top_k, seed = 0;
    int r;
    s->temperature = d->temperature;
    s->top_p = d->top_p;
    s->min_p = d->min_p;
    s->repetition = d->repetition;
    if ((r = read_f32(body, "temperature", 0, 2, &s->temperature, err)) < 0 ||
        (r = read_f32(body, "top_p", 0, 1, &s->top_p, err)) < 0 || (r = read_f32(body, "min_p", 0, 1, &s->min_p, err)) < 0 ||
        (r = read_f32(body, "presence_penalty", -2, 2, &s->presence, err)) < 0 ||
        (r = read_f32(body, "frequency_penalty", -2, 2, &s->frequency, err)) < 0 ||
        (r = read_f32(body, "repetition_penalty", 0.01, 10, &s->repetition, err)) < 0 ||
        (r = read_i64(body, "top_k", -1, INT32_MAX, &top_k, err)) < 0 ||
        (r = jfield_i64(body, "", "seed", INT64_MIN, INT64_MAX, &seed, err)) < 0)
        return r;
    s->has_seed = r > 0;
    s->seed = (uint64_t)seed;
    s->top_k = top_k > 0 ? (int32_t)top_k : 0;
    if (s->top_p <= 0)              /* OpenAI allows 0: the most likely token only */
        s->top_p = 1e-6f;
    return 0;
}

static int add_stop(struct json_object *v, const char **stops, size_t *lens, size_t *n, struct arle_err *err)
{
    if (!json_object_is_type(v, json_type_string))
        return jfield_wrong_type("", "stop", "a string or an array of strings", v, err);
    size_t len = (size_t)json_object_get_string_len(v);
    if (len == 0 || len > 4096)
        return arle_err_param(err, -EINVAL, "stop", "'stop': a stop string must have 1 to 4096 bytes");
    stops[*n] = json_object_get_string(v);
    lens[(*n)++] = len;
    return 0;
}

static int read_stops(struct gen_params *p, struct json_object *body, uint32_t vocab, struct arle_err *err)
{
    struct json_object *v, *ids = NULL;
    const char *stops[MAX_STOPS];
    size_t lens[MAX_STOPS], n = 0;
    int r = 0;
    if (jfield_get(body, "stop", &v)) {
        size_t count = json_object_is_type(v, json_type_array) ? json_object_array_length(v) : 1;
        if (count > MAX_STOPS)
            return arle_err_param(err, -ERANGE, "stop", "'stop' holds %zu strings; at most %d are accepted", count, MAX_STOPS);
        for (size_t i = 0; i < count && r == 0; i++)
            r = add_stop(json_object_is_type(v, json_type_array) ? json_object_array_get_idx(v, i) : v, stops, lens, &n, err);
        if (r == 0 && n > 0)
            r = stop_set_create(&p->stops, stops, lens, n, err);
        if (r < 0)
            return r;
    }
    r = jfield_array(body, "", "stop_token_ids", &ids, err);
    if (r <= 0)
        return r;
    size_t count = json_object_array_length(ids);
    if (count > 256)
        return arle_err_param(err, -ERANGE, "stop_token_ids", "'stop_token_ids' holds %zu ids; at most 256 are accepted", count);
    if ((r = check_token_ids(ids, "stop_token_ids", vocab, err)) < 0)
        return r;
    p->stop_ids = calloc(count ? count : 1, sizeof *p->stop_ids);
    if (p->stop_ids == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for stop_token_ids");
    for (size_t i = 0; i < count; i++)
        p->stop_ids[p->n_stop_ids++] = json_object_get_int(json_object_array_get_idx(ids, i));
    return 0;
}

static int read_stream(struct gen_params *p, struct json_object *body, struct arle_err *err)
{
    struct json_object *opts = NULL;
    int r = read_bool(body, "stream", &p->stream, err);
    if (r == 0)
        r = jfield_object(body, "", "stream_options", &opts, err);
    if (r <= 0)
        return r;
    if (!p->stream)
        return arle_err_param(err, -EINVAL, "stream_options", "'stream_options' is only allowed when 'stream' is true");
    bool obfuscation;
    json_object_object_foreach(opts, key, value)
        if (value != NULL && strcmp(key, "include_usage") != 0 && strcmp(key, "include_obfuscation") != 0)
            return arle_err_param(err, -ENOKEY, "stream_options", "unknown field 'stream_options.%.80s'", key);
    r = jfield_bool(opts, "stream_options.", "include_usage", &p->include_usage, err);
    if (r >= 0)
        r = jfield_bool(opts, "stream_options.", "include_obfuscation", &obfuscation, err);
    return r < 0 ? r : 0;
}

static int read_extensions(struct gen_params *p, struct json_object *body, struct arle_err *err)
{
    int64_t priority = 0;
    bool skip_special = true;
    const char *user;
    int r;
    p->cache_salt = "";
    if ((r = read_bool(body, "ignore_eos", &p->ignore_eos, err)) < 0 ||
        (r = read_bool(body, "return_token_ids", &p->return_token_ids, err)) < 0 ||
        (r = read_bool(body, "return_drafts", &p->return_drafts, err)) < 0 ||
        (r = read_bool(body, "return_tokens_as_token_ids", &p->tokens_as_ids, err)) < 0 ||
        (r = read_bool(body, "skip_special_tokens", &skip_special, err)) < 0 ||
        (r = read_bool(body, "include_cache_detail", &p->cache_detail, err)) < 0 ||
        (r = read_i64(body, "priority", -1000000, 1000000, &priority, err)) < 0 ||
        (r = jfield_str(body, "", "cache_salt", &p->cache_salt, NULL, err)) < 0 ||
        (r = jfield_str(body, "", "user", &user, NULL, err)) < 0)
        return r;
    p->keep_special = !skip_special;
    p->priority = (int32_t)priority;
    return 0;
}

/* ---- chat ---- */

static int read_chat_logprobs(struct gen_params *p, struct json_object *body, struct arle_err *err)
{
    int64_t top = 0;
    int r = read_bool(body, "logprobs", &p->sampling.want_logprobs, err);
    if (r == 0)
        r = jfield_i64(body, "", "top_logprobs", 0, ARLE_MAX_TOP, &top, err);
    if (r < 0)
        return r;
    if (r > 0 && !p->sampling.want_logprobs)
        return arle_err_param(err, -EINVAL, "top_logprobs", "'top_logprobs' needs 'logprobs' to be true");
    p->sampling.n_top = (uint32_t)top;
    return 0;
}

static int read_tool_choice(struct gen_params *p, struct json_object *body, struct arle_err *err)
{
    struct json_object *tools = NULL, *choice;
    int r = jfield_array(body, "", "tools", &tools, err);
    if (r < 0)
        return r;
    p->use_tools = p->parse_calls = tools != NULL && json_object_array_length(tools) > 0;
    if (!jfield_get(body, "tool_choice", &choice))
        return 0;
    if (json_object_is_type(choice, json_type_object))
        return arle_err_param(err, -ENOTSUP, "tool_choice",
                              "'tool_choice': a named tool cannot be enforced, this server does not constrain output; use auto or none");
    if (!json_object_is_type(choice, json_type_string))
        return jfield_wrong_type("", "tool_choice", "a string or an object", choice, err);
    const char *word = json_object_get_string(choice);
    if (strcmp(word, "required") == 0)
        return arle_err_param(err, -ENOTSUP, "tool_choice",
                              "'tool_choice': \"required\" cannot be enforced, this server does not constrain output; use auto or none");
    if (strcmp(word, "none") == 0)
        p->use_tools = p->parse_calls = false;
    else if (strcmp(word, "auto") != 0)
        return arle_err_param(err, -EINVAL, "tool_choice", "'tool_choice' must be none or auto, not \"%.40s\"", word);
    return 0;
}

static int check_response_format(struct json_object *body, struct arle_err *err)
{
    struct json_object *format = NULL;
    const char *type = NULL;
    int r = jfield_object(body, "", "response_format", &format, err);
    if (r <= 0)
        return r;
    r = jfield_str(format, "response_format.", "type", &type, NULL, err);
    if (r < 0)
        return r;
    if (r == 0)
        return arle_err_param(err, -ENODATA, "response_format.type", "'response_format.type' is missing");
    if (strcmp(type, "text") == 0)
        return 0;
    if (strcmp(type, "json_object") != 0 && strcmp(type, "json_schema") != 0)
        return arle_err_param(err, -EINVAL, "response_format.type", "'response_format.type' must be text, not \"%.40s\"", type);
    return arle_err_param(err, -ENOTSUP, "response_format.type",
                          "'response_format.type': \"%.40s\" is not supported, this server does not constrain output", type);
}

static int check_modalities(struct json_object *body, struct arle_err *err)
{
    struct json_object *list = NULL;
    int r = jfield_array(body, "", "modalities", &list, err);
    for (size_t i = 0; r > 0 && i < json_object_array_length(list); i++) {
        struct json_object *v = json_object_array_get_idx(list, i);
        if (!json_object_is_type(v, json_type_string) || strcmp(json_object_get_string(v), "text") != 0)
            return arle_err_param(err, -ENOTSUP, "modalities", "'modalities': only text is supported");
    }
    return r < 0 ? r : 0;
}

static int read_chat(struct gen_params *p, struct json_object *body, struct arle_err *err)
{
    int64_t n = -1;
    int r;
    if ((r = read_i64(body, "max_tokens", 1, INT32_MAX, &n, err)) < 0 ||
        (r = read_i64(body, "max_completion_tokens", 1, INT32_MAX, &n, err)) < 0 ||
        (r = read_chat_logprobs(p, body, err)) < 0 || (r = read_tool_choice(p, body, err)) < 0 ||
        (r = check_response_format(body, err)) < 0)
        return r;
    p->max_new = n;
    return check_modalities(body, err);
}

/* ---- completions ---- */

static int read_completions(struct gen_params *p, struct json_object *body, struct arle_err *err)
{
    struct json_object *v;
    const char *suffix = "";
    int64_t max = -1, top = 0, best_of = 0;
    int r;
    if ((r = read_bool(body, "echo", &p->echo, err)) < 0)
        return r;
    if ((r = read_i64(body, "max_tokens", p->echo ? 0 : 1, INT32_MAX, &max, err)) < 0 ||
        (r = read_i64(body, "best_of", 1, MAX_ANSWERS, &best_of, err)) < 0 ||
        (r = jfield_str(body, "", "suffix", &suffix, NULL, err)) < 0)
        return r;
    if (best_of > (int64_t)p->n)
        return arle_err_param(err, -ENOTSUP, "best_of", "'best_of' above 'n' is not supported");
    if (*suffix != '\0')
        return arle_err_param(err, -ENOTSUP, "suffix", "'suffix' is not supported");
    p->max_new = max;
    if (jfield_get(body, "logprobs", &v) && json_object_is_type(v, json_type_boolean)) {     /* a chat habit; harmless */
        p->sampling.want_logprobs = json_object_get_boolean(v);
        return 0;
    }
    r = jfield_i64(body, "", "logprobs", 0, ARLE_MAX_TOP, &top, err);
    p->sampling.want_logprobs = r > 0;
    p->sampling.n_top = (uint32_t)top;
    return r < 0 ? r : 0;
}

int check_token_ids(struct json_object *ids, const char *key, uint32_t vocab, struct arle_err *err)
{
    for (size_t i = 0; i < json_object_array_length(ids); i++) {
        struct json_object *v = json_object_array_get_idx(ids, i);
        if (!json_object_is_type(v, json_type_int))
            return arle_err_param(err, -EPROTO, key, "'%s[%zu]' must be a token id, not %s", key, i, json_kind(v));
        int64_t id = json_object_get_int64(v);
        if (id < 0 || id >= (int64_t)vocab)
            return arle_err_param(err, -ERANGE, key, "'%s[%zu]': %lld is not a token id of this model (0 to %u)", key, i,
                                  (long long)id, vocab - 1);
    }
    return 0;
}

static int set_prompt(struct json_object *v, uint32_t vocab, struct raw_prompt *out, struct arle_err *err)
{
    if (json_object_is_type(v, json_type_string)) {
        *out = (struct raw_prompt){ .text = json_object_get_string(v), .len = (size_t)json_object_get_string_len(v) };
        return out->len > 0 ? 0 : arle_err_param(err, -EINVAL, "prompt", "'prompt' is empty");
    }
    if (!json_object_is_type(v, json_type_array))
        return jfield_wrong_type("", "prompt", "a string, an array of token ids, or an array of these", v, err);
    if (json_object_array_length(v) == 0)
        return arle_err_param(err, -EINVAL, "prompt", "'prompt' is empty");
    *out = (struct raw_prompt){ .ids = v };
    return check_token_ids(v, "prompt", vocab, err);
}

int completion_prompts(struct json_object *body, uint32_t vocab, struct raw_prompt out[MAX_PROMPTS], uint32_t *count,
                       struct arle_err *err)
{
    struct json_object *v;
    if (!jfield_get(body, "prompt", &v))
        return arle_err_param(err, -ENODATA, "prompt", "'prompt' is missing");
    struct json_object *first = json_object_is_type(v, json_type_array) && json_object_array_length(v) > 0
                                    ? json_object_array_get_idx(v, 0) : NULL;
    if (first == NULL || json_object_is_type(first, json_type_int)) {
        *count = 1;
        return set_prompt(v, vocab, &out[0], err);
    }
    size_t n = json_object_array_length(v);
    if (n > MAX_PROMPTS)
        return arle_err_param(err, -ERANGE, "prompt", "'prompt' holds %zu prompts; at most %d are accepted", n, MAX_PROMPTS);
    for (size_t i = 0; i < n; i++) {
        int r = set_prompt(json_object_array_get_idx(v, i), vocab, &out[i], err);
        if (r < 0)
            return r;
    }
    *count = (uint32_t)n;
    return 0;
}

/* ---- both ---- */

int gen_model_name(struct json_object *body, const char **out, struct arle_err *err)
{
    *out = NULL;
    int r = jfield_str(body, "", "model", out, NULL, err);
    return r < 0 ? r : 0;
}

int gen_params_read(struct gen_params *p, enum dialect dialect, struct json_object *body, const struct gen_defaults *defaults,
                    uint32_t vocab, struct arle_err *err)
{
    int64_t n = 1;
    *p = (struct gen_params){ .cache_salt = "" };
    int r = check_fields(dialect, body, err);
    if (r == 0)
        r = check_unused(body, err);
    if (r == 0)
        r = read_i64(body, "n", 1, MAX_ANSWERS, &n, err);
    p->n = (uint32_t)n;
    if (r == 0)
        r = read_sampling(p, body, defaults, err);
    if (r == 0)
        r = read_bias(p, body, vocab, err);
    if (r == 0)
        r = read_stops(p, body, vocab, err);
    if (r == 0)
        r = read_stream(p, body, err);
    if (r == 0)
        r = read_extensions(p, body, err);
    if (r == 0)
        r = dialect == DIALECT_CHAT ? read_chat(p, body, err) : read_completions(p, body, err);
    return r;
}

void gen_params_fini(struct gen_params *p)
{
    free(p->bias);
    free(p->stop_ids);
    stop_set_destroy(p->stops);
    *p = (struct gen_params){ .cache_salt = "" };
}
