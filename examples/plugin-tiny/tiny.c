/*
 * A whole model architecture for ARLE in one file: a trigram model that predicts a token from the two before it.
 *
 *   e_t = E[x_t]                                         E [vocab, hidden]        tensor "embed.weight"
 *   logits_t = A norm(e_t) + B norm(e_{t-1})             A, B [vocab, hidden]     "now.weight", "before.weight"
 *   norm(v) = v / rms(v) * g                             g [hidden]               "norm.weight"
 *
 * e_{t-1} crosses step borders, so it lives in a state record of the sequence: the host keeps, shares and restores it, and
 * the op seq_shift reads and writes it. That is all a recurrent architecture has to do to be batched, paged and cached.
 */
#include <arle/model.h>

#include <stdlib.h>
#include <string.h>

enum { MAX_DIM = 1 << 20 };

struct config { int64_t vocab, hidden, context; };

struct arle_model {
    struct arle_model_desc desc;
    struct arle_cache_group group;
    const struct arle_backend_api *be;
    struct arle_device *dev;
    struct arle_weight *embed, *now, *before, *norm;
    uint32_t dtype;
    int64_t hidden;
    void *e, *prev, *e_norm, *prev_norm;        /* [max_tokens, hidden] and [max_rows, hidden], act */
    struct arle_state state;                    /* where records are; known after bind() */
};

/* ---- config.json ---- */

/* Start of the value of a key at any depth, or NULL. A real plugin takes a JSON library; this one shows that none is needed. */
static const char *value_of(const char *json, size_t len, const char *key)
{
    size_t n = strlen(key);
    for (size_t i = 0; i + n + 2 < len; i++) {
        if (json[i] != '"' || memcmp(json + i + 1, key, n) != 0 || json[i + 1 + n] != '"')
            continue;
        size_t at = i + n + 2;
        while (at < len && strchr(" \t\r\n", json[at]) != NULL)
            at++;
        if (at >= len || json[at++] != ':')
            continue;
        while (at < len && strchr(" \t\r\n", json[at]) != NULL)
            at++;
        return at < len ? json + at : NULL;
    }
    return NULL;
}

static int64_t number_of(const char *json, size_t len, const char *key, int64_t otherwise)
{
    const char *v = value_of(json, len, key), *end = json + len;
    int64_t n = 0;
    if (v == NULL)
        return otherwise;
    if (*v < '0' || *v > '9')
        return -1;
    while (v < end && *v >= '0' && *v <= '9' && n <= MAX_DIM)
        n = n * 10 + (*v++ - '0');
    return n;
}

static int read_dim(const char *json, size_t len, const char *key, int64_t otherwise, int64_t *out, struct arle_err *err)
{
    *out = number_of(json, len, key, otherwise);
    if (*out < 1 || *out > MAX_DIM)
        return arle_err_param(err, -EINVAL, key, "config.json: %s must be a whole number from 1 to %d", key, MAX_DIM);
    return 0;
}

static int recognise(void *ctx, const char *json, size_t len, struct arle_err *err)
{
    static const char name[] = "\"tiny_trigram\"";
    const char *type = value_of(json, len, "model_type");
    return type != NULL && (size_t)(json + len - type) >= sizeof name - 1 && memcmp(type, name, sizeof name - 1) == 0;
}

static int read_config(const struct arle_model_load *a, struct config *c, struct arle_err *err)
{
    int r = read_dim(a->config_json, a->config_len, "vocab_size", 0, &c->vocab, err);
    if (r == 0)
        r = read_dim(a->config_json, a->config_len, "hidden_size", 0, &c->hidden, err);
    if (r == 0)
        r = read_dim(a->config_json, a->config_len, "max_position_embeddings", 4096, &c->context, err);
    return r;
}

/* ---- what the host is told ---- */

static size_t act_bytes(const struct arle_model_load *a)
{
    return a->compute == ARLE_BF16 ? 2 : 4;
}

static void fill_desc(const struct arle_model_load *a, const struct config *c, struct arle_cache_group *g, struct arle_model_desc *d)
{
    *g = (struct arle_cache_group){ .name = "before", .kind = ARLE_CACHE_STATE, .dtype = a->compute,
        .record_bytes = (uint64_t)c->hidden * act_bytes(a) };
    *d = (struct arle_model_desc){
        .struct_size = sizeof *d,
        .vocab = (uint32_t)c->vocab,
        .n_valid = (uint32_t)c->vocab,
        .context = a->context != 0 && a->context < c->context ? a->context : (uint32_t)c->context,
        .n_groups = 1,
        .page_multiple = 1,
        .hidden = (uint32_t)c->hidden,
        .groups = g,
        .scratch_bytes = 2 * ((uint64_t)a->max_tokens + a->max_rows) * (uint64_t)c->hidden * act_bytes(a),
        .step_weight_bytes = (uint64_t)c->vocab * (uint64_t)c->hidden * 2 * 2,
        .n_params = (uint64_t)c->vocab * (uint64_t)c->hidden * 3 + (uint64_t)c->hidden,
        .arch = "tiny-trigram",
    };
}

static int predict(void *ctx, const struct arle_model_load *a, struct arle_model_desc *out, struct arle_err *err)
{
    static _Thread_local struct arle_cache_group group;
    struct config c;
    int r = read_config(a, &c, err);
    if (r == 0)
        fill_desc(a, &c, &group, out);
    return r;
}

/* ---- weights ---- */

/* Missing ops are reported by name, before any memory is spent. */
static int check_ops(const struct arle_ops *ops, struct arle_err *err)
{
#define NEED(op) if (!ARLE_HAS(ops, struct arle_ops, op)) return arle_err_set(err, -ENOTSUP, "the backend lacks op " #op)
    NEED(embed);
    NEED(seq_shift);
    NEED(rmsnorm);
    NEED(linear);
#undef NEED
    return 0;
}

static int pack(struct arle_model *m, const struct arle_weights *w, const char *name, uint32_t role, int64_t rows, int64_t k,
                struct arle_weight **out, struct arle_err *err)
{
    const int64_t dim[2] = { role == ARLE_W_VECTOR ? k : rows, k };
    const uint32_t n_dims = role == ARLE_W_VECTOR ? 1 : 2;
    int r = w->random ? w->want(w, name, ARLE_BF16, n_dims, dim, role == ARLE_W_VECTOR ? 1.0 : 0.0, 0.02, err) : 0;
    if (r < 0)
        return r;
    const struct arle_tensor *t = w->find(w, name);
    if (t == NULL)
        return arle_err_param(err, -EINVAL, name, "tensor %s is missing", name);
    if (t->n_dims != n_dims || t->dim[0] != dim[0] || (n_dims == 2 && t->dim[1] != k))
        return arle_err_param(err, -EINVAL, name, "tensor %s has the wrong shape", name);
    struct arle_weight_part part = { .t = t, .n_rows = n_dims == 2 ? rows : 1, .scale2 = 1 };
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = role, .n_experts = 1, .n_parts = 1, .parts = &part, .k = k, .name = name };
    r = m->be->weight_create(m->dev, &d, out, err);
    if (r == 0)
        m->desc.weight_bytes += m->be->weight_bytes(*out);
    return r;
}

static void destroy(struct arle_model *m)
{
    if (m == NULL)
        return;
    struct arle_weight *weights[] = { m->embed, m->now, m->before, m->norm };
    void *buffers[] = { m->e, m->prev, m->e_norm, m->prev_norm };
    for (int i = 0; i < 4; i++) {
        if (weights[i] != NULL)
            m->be->weight_destroy(m->dev, weights[i]);
        if (buffers[i] != NULL)
            m->be->mem.free(m->dev, ARLE_MEM_DEVICE, buffers[i]);
    }
    free(m);
}

static int load_into(struct arle_model *m, const struct arle_model_load *a, const struct config *c, struct arle_err *err)
{
    const struct arle_weights *w = a->weights;
    const size_t row = (size_t)c->hidden * act_bytes(a);
    int r = pack(m, w, "embed.weight", ARLE_W_EMBED, c->vocab, c->hidden, &m->embed, err);
    if (r == 0)
        r = pack(m, w, "now.weight", ARLE_W_LINEAR, c->vocab, c->hidden, &m->now, err);
    if (r == 0)
        r = pack(m, w, "before.weight", ARLE_W_LINEAR, c->vocab, c->hidden, &m->before, err);
    if (r == 0)
        r = pack(m, w, "norm.weight", ARLE_W_VECTOR, 1, c->hidden, &m->norm, err);
    if (r == 0)
        r = m->be->mem.alloc(m->dev, ARLE_MEM_DEVICE, row * a->max_tokens, &m->e, err);
    if (r == 0)
        r = m->be->mem.alloc(m->dev, ARLE_MEM_DEVICE, row * a->max_tokens, &m->prev, err);
    if (r == 0)
        r = m->be->mem.alloc(m->dev, ARLE_MEM_DEVICE, row * a->max_rows, &m->e_norm, err);
    if (r == 0)
        r = m->be->mem.alloc(m->dev, ARLE_MEM_DEVICE, row * a->max_rows, &m->prev_norm, err);
    return r;
}

static int load(void *ctx, const struct arle_model_load *a, struct arle_model **out, struct arle_err *err)
{
    struct config c;
    int r = check_ops(a->backend->ops, err);
    if (r == 0)
        r = read_config(a, &c, err);
    if (r < 0)
        return r;
    struct arle_model *m = calloc(1, sizeof *m);
    if (m == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the model");
    m->be = a->backend;
    m->dev = a->device;
    m->dtype = a->compute;
    m->hidden = c.hidden;
    fill_desc(a, &c, &m->group, &m->desc);
    r = load_into(m, a, &c, err);
    if (r < 0) {
        destroy(m);
        return r;
    }
    *out = m;
    return 0;
}

static const struct arle_model_desc *describe(const struct arle_model *m)
{
    return &m->desc;
}

static int bind(struct arle_model *m, const struct arle_cache_binding *caches, struct arle_err *err)
{
    m->state = (struct arle_state){ .base = caches->group[0].base, .stride = caches->group[0].stride };
    return 0;
}

/* ---- a step: four kinds of ops, enqueued in order; nothing waits and nothing is allocated ---- */

static int norm_rows(struct arle_model *m, struct arle_stream *st, const struct arle_step *s, const void *x, void *out)
{
    const struct arle_rmsnorm_args a = { .dtype = m->dtype, .n_tokens = s->n_rows, .dim = (uint32_t)m->hidden, .eps = 1e-6f,
        .x = x, .ld_x = m->hidden, .rows = s->rows, .w = m->be->weight_data(m->norm), .out = out, .ld_out = m->hidden };
    return m->be->ops->rmsnorm(m->dev, st, &a);
}

static int project(struct arle_model *m, struct arle_stream *st, const struct arle_step *s, const struct arle_weight *w, const void *x,
                   uint32_t accumulate)
{
    const struct arle_linear_args a = { .dtype = m->dtype, .out_dtype = ARLE_F32, .n_tokens = s->n_rows, .accumulate = accumulate,
        .x = x, .ld_x = m->hidden, .w = w, .y = s->logits, .ld_y = s->ld_logits };
    return m->be->ops->linear(m->dev, st, &a);
}

static int step(struct arle_model *m, struct arle_stream *st, const struct arle_step *s, struct arle_err *err)
{
    const struct arle_embed_args embed = { .dtype = m->dtype, .n_tokens = s->batch.n_tokens, .ids = s->batch.ids,
        .sampled = s->batch.sampled, .table = m->embed, .out = m->e, .ld_out = m->hidden };
    const struct arle_seq_shift_args shift = { .dtype = m->dtype, .dim = (uint32_t)m->hidden, .batch = &s->batch, .x = m->e,
        .ld_x = m->hidden, .record = m->state, .out = m->prev, .ld_out = m->hidden };
    int r = m->be->ops->embed(m->dev, st, &embed);
    if (r == 0)
        r = m->be->ops->seq_shift(m->dev, st, &shift);
    if (r == 0)
        r = norm_rows(m, st, s, m->e, m->e_norm);
    if (r == 0)
        r = norm_rows(m, st, s, m->prev, m->prev_norm);
    if (r == 0)
        r = project(m, st, s, m->now, m->e_norm, 0);
    if (r == 0)
        r = project(m, st, s, m->before, m->prev_norm, 1);
    return r < 0 ? arle_err_set(err, r, "an op of the step failed") : 0;
}

/* ---- the plugin ---- */

static int open_plugin(const struct arle_host *host, const struct arle_conf *conf, void **out_ctx, struct arle_err *err)
{
    const struct arle_log_service *log = arle_host_log(host);
    if (log != NULL)
        log->write(ARLE_LOG_DEBUG, "tiny", "open", "");
    *out_ctx = NULL;        /* no state of its own */
    return 0;
}

static void close_plugin(void *ctx)
{
}

static const struct arle_model_api api = {
    .struct_size = sizeof api,
    .recognise = recognise,
    .load = load,
    .destroy = destroy,
    .describe = describe,
    .bind = bind,
    .step = step,
    .predict = predict,
    /* No chat_render: it serves completions only. */
};

ARLE_EXPORT extern const struct arle_plugin arle_plugin_v1;
const struct arle_plugin arle_plugin_v1 = {
    ARLE_PLUGIN_HEAD(ARLE_KIND_MODEL),
    .name = "model-tiny-trigram",
    .version = "1.0",
    .license = "MIT",
    .summary = "A trigram model, as an example of a plugin outside the tree.",
    .open = open_plugin,
    .close = close_plugin,
    .ops = &api,
};
