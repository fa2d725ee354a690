/* The text side of a served model; see served.h. */
#include "chat/served.h"

#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <json-c/json.h>

#include "chat/calls.h"
#include "util/clock.h"
#include "util/jfield.h"

#define MAX_CONFIG (16u << 20)

/* Reads DIR/FILE as a JSON object. -ENOENT when it is not there. */
static int read_object(const char *dir, const char *file, struct json_object **out, struct arle_err *err)
{
    char path[PATH_MAX];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", dir, file);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return arle_err_set(err, -errno, "%s: %s", path, strerror(errno));
    char *text = NULL;
    int r = 0;
    ssize_t n = 0;
    if (fstat(fd, &st) < 0 || st.st_size > MAX_CONFIG || (text = malloc((size_t)st.st_size + 1)) == NULL)
        r = arle_err_set(err, -EINVAL, "%s: cannot be read, or longer than 16 MiB", path);
    else if ((n = read(fd, text, (size_t)st.st_size)) != st.st_size)
        r = arle_err_set(err, -EIO, "%s: short read", path);
    close(fd);
    struct arle_err why = ARLE_ERR_INIT;
    if (r == 0 && json_text_parse_object(text, (size_t)n, file, out, &why) < 0)
        r = arle_err_set(err, -EINVAL, "%s: %.400s", path, why.msg);
    free(text);
    return r;
}

bool served_is_eos(const struct served_model *m, int32_t id)
{
    for (uint32_t i = 0; i < m->n_eos; i++)
        if (m->eos[i] == id)
            return true;
    return false;
}

static int add_eos(struct served_model *m, int64_t id)
{
    if (id < 0 || id > INT32_MAX || served_is_eos(m, (int32_t)id))
        return 0;
    int32_t *p = realloc(m->eos, (m->n_eos + 1) * sizeof *p);
    if (p == NULL)
        return -ENOMEM;
    m->eos = p;
    p[m->n_eos++] = (int32_t)id;
    return 0;
}

/* eos_token_id: a number or a list of them. */
static int add_eos_of(struct served_model *m, struct json_object *obj)
{
    struct json_object *v;
    int r = 0;
    if (!jfield_get(obj, "eos_token_id", &v))
        return 0;
    if (json_object_is_type(v, json_type_int))
        return add_eos(m, json_object_get_int64(v));
    for (size_t i = 0; json_object_is_type(v, json_type_array) && i < json_object_array_length(v) && r == 0; i++)
        r = add_eos(m, json_object_get_int64(json_object_array_get_idx(v, i)));
    return r;
}

static int read_generation(struct served_model *m, struct arle_err *err)
{
    struct json_object *obj = NULL;
    int r = read_object(m->dir, "generation_config.json", &obj, err);
    if (r < 0)
        return r == -ENOENT ? 0 : r;
    bool sample = true;
    double temperature = 1, top_p = 1, min_p = 0, repetition = 1;
    int64_t top_k = 0;
    if ((r = add_eos_of(m, obj)) < 0 || (r = jfield_bool(obj, "", "do_sample", &sample, err)) < 0 ||
        (r = jfield_f64(obj, "", "temperature", 0, 100, &temperature, err)) < 0 ||
        (r = jfield_f64(obj, "", "top_p", 0, 1, &top_p, err)) < 0 || (r = jfield_f64(obj, "", "min_p", 0, 1, &min_p, err)) < 0 ||
        (r = jfield_f64(obj, "", "repetition_penalty", 0.01, 100, &repetition, err)) < 0 ||
        (r = jfield_i64(obj, "", "top_k", -1, INT32_MAX, &top_k, err)) < 0) {
        json_object_put(obj);
        return r;
    }
    m->defaults = (struct gen_defaults){ .temperature = sample ? (float)temperature : 0, .top_p = (float)top_p,
                                         .min_p = (float)min_p, .repetition = (float)repetition,
                                         .top_k = top_k > 0 ? (int32_t)top_k : 0 };
    json_object_put(obj);
    return 0;
}

static int read_end_tokens(struct served_model *m, struct arle_err *err)
{
    struct json_object *obj = NULL, *text, *v;
    int r = read_object(m->dir, "config.json", &obj, err);
    if (r == 0) {
        r = add_eos_of(m, obj);
        if (r == 0 && jfield_get(obj, "text_config", &text) && json_object_is_type(text, json_type_object))
            r = add_eos_of(m, text);
        json_object_put(obj);
    }
    obj = NULL;
    if (r < 0 && r != -ENOENT)
        return r;
    r = read_object(m->dir, "tokenizer_config.json", &obj, err);
    if (r < 0)
        return r == -ENOENT ? 0 : r;
    if (jfield_get(obj, "eos_token", &v)) {
        struct json_object *content;
        if (json_object_is_type(v, json_type_object) && jfield_get(v, "content", &content))
            v = content;
        if (json_object_is_type(v, json_type_string))
            r = add_eos(m, tokenizer_added_id(m->tok, json_object_get_string(v)));
    }
    json_object_put(obj);
    return r;
}

int served_open(struct served_model **out, const char *name, const char *dir, bool special_in_content, struct arle_err *err)
{
    struct served_model *m = calloc(1, sizeof *m);
    if (m == NULL || (m->name = strdup(name)) == NULL || (m->dir = strdup(dir)) == NULL) {
        served_close(m);
        return arle_err_set(err, -ENOMEM, "no memory for model %s", name);
    }
    m->special_in_content = special_in_content;
    m->created_s = clock_wall_ms() / 1000;
    m->defaults = (struct gen_defaults){ .temperature = 1, .top_p = 1, .repetition = 1 };
    int r = tokenizer_open(&m->tok, dir, err);
    if (r == 0)
        r = read_generation(m, err);
    if (r == 0)
        r = read_end_tokens(m, err);
    if (r < 0) {
        served_close(m);
        return r;
    }
    *out = m;
    return 0;
}

int served_attach(struct served_model *m, struct engine *engine, const struct arle_model_api *api, void *api_ctx,
                  struct arle_err *err)
{
    const struct arle_model_desc *desc = engine_model(engine);
    m->engine = engine;
    m->api = api;
    m->api_ctx = api_ctx;
    if (ARLE_HAS(api, struct arle_model_api, chat_syntax))
        m->syntax = api->chat_syntax(api_ctx);
    if (ARLE_HAS(desc, struct arle_model_desc, chat_options)) {
        struct arle_err why = ARLE_ERR_INIT;
        if (json_text_parse_object(desc->chat_options, strlen(desc->chat_options), "chat_options", &m->chat_options, &why) < 0)
            return arle_err_set(err, -EINVAL, "model %s: chat options of its plugin: %.300s", m->name, why.msg);
    }
    return 0;
}

int served_keep_calls(struct served_model *m, uint32_t max_calls, size_t max_bytes, struct arle_err *err)
{
    if (max_calls == 0 || max_bytes == 0)
        return 0;
    m->calls = call_memory_create(max_calls, max_bytes);
    return m->calls != NULL ? 0 : arle_err_set(err, -ENOMEM, "no memory for model %s", m->name);
}

void served_close(struct served_model *m)
{
    if (m == NULL)
        return;
    call_memory_destroy(m->calls);
    tokenizer_close(m->tok);
    json_object_put(m->chat_options);
    free(m->eos);
    free(m->name);
    free(m->dir);
    free(m);
}

uint32_t served_context(const struct served_model *m)
{
    return engine_model(m->engine)->context;
}

uint32_t served_vocab(const struct served_model *m)
{
    const struct arle_model_desc *d = engine_model(m->engine);
    return d->n_valid > 0 && d->n_valid < d->vocab ? d->n_valid : d->vocab;
}
