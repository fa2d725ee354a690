/* See model_harness.h. */
#include "model_harness.h"

#include "config/config.h"
#include "plugin/registry.h"
#include "plugin_util.h"
#include "weights/weights.h"

#include <math.h>

enum { MAX_GRAPHS = 16 };

struct harness {
    struct harness_options o;
    struct config *cfg;
    struct registry *reg;
    const struct arle_backend_api *be;
    struct arle_backend_api counting;   /* be with a weight_create that adds up what was made */
    const struct arle_model_api *api;
    struct arle_device *dev;
    struct arle_stream *st;
    struct arle_weights *weights;
    struct arle_model *model;
    const struct arle_model_desc *desc;
    struct arle_cache_binding bind;
    uint32_t pages_per_seq, n_pages;
    char *json;
    size_t json_len;
    int32_t *ints;                      /* device: every int array of a step, one after another */
    float *logits;
    int32_t *drafts;
    float *host_logits;
    int32_t *host_drafts;
    struct arle_graph *graph[MAX_GRAPHS];       /* of 1, 2, ... rows */
};

static int dev_alloc(struct harness *h, size_t bytes, void **out, struct arle_err *err)
{
    return h->be->mem.alloc(h->dev, ARLE_MEM_DEVICE, bytes ? bytes : 1, out, err);
}

static void copy(struct harness *h, void *dst, const void *src, size_t bytes, uint32_t dir)
{
    struct arle_err err;
    h->be->mem.copy(h->dev, h->st, dst, src, bytes, dir);
    h->be->mem.stream_sync(h->dev, h->st, &err);
}

static int (*real_create)(struct arle_device *, const struct arle_weight_desc *, struct arle_weight **, struct arle_err *);
static uint64_t (*real_bytes)(const struct arle_weight *);
static uint64_t created_bytes;

static int counting_create(struct arle_device *dev, const struct arle_weight_desc *d, struct arle_weight **out, struct arle_err *err)
{
    int r = real_create(dev, d, out, err);
    created_bytes += r == 0 ? real_bytes(*out) : 0;
    return r;
}

static int open_parts(struct harness *h, struct arle_err *err)
{
    const struct harness_options *o = &h->o;
    char dir[512], path[600];
    const char *sets[6] = { dir };
    size_t n = 1;
    snprintf(dir, sizeof dir, "plugins.dir=%s", getenv("ARLE_TEST_PLUGINS") ? getenv("ARLE_TEST_PLUGINS") : ".plugins");
    for (size_t i = 0; i < 4 && o->sets[i]; i++)
        sets[n++] = o->sets[i];
    int r = config_open(&h->cfg, NULL, sets, n, err);
    if (r == 0)
        r = registry_open(&h->reg, h->cfg, 0, err);
    if (r < 0)
        return r;
    if (o->config_json) {
        h->json = strdup(o->config_json);
        h->json_len = strlen(h->json);
    } else {
        snprintf(path, sizeof path, "%s/config.json", o->model_dir);
        h->json = read_file(path, &h->json_len);
    }
    if (h->json == NULL)
        return arle_err_set(err, -ENOENT, "no config.json in %s", o->model_dir);
    const struct plugin_info *be, *mo;
    const char *want = getenv("ARLE_TEST_BACKEND");
    if ((r = registry_backend(h->reg, want ? want : "cpu", &be, err)) < 0 || (r = registry_model(h->reg, h->json, h->json_len, &mo, err)) < 0)
        return r;
    h->be = be->ops;
    h->api = mo->ops;
    if ((r = h->be->open_device(be->ctx, 0, &h->dev, err)) < 0 || (r = h->be->mem.stream_create(h->dev, &h->st, err)) < 0)
        return r;
    r = o->random ? weights_random(&h->weights, 1, err) : weights_open(o->model_dir, &h->weights, err);
    if (r < 0)
        return r;
    h->counting = *h->be;
    h->counting.weight_create = counting_create;
    real_create = h->be->weight_create, real_bytes = h->be->weight_bytes;
    created_bytes = 0;
    const struct arle_model_load load = { .struct_size = sizeof load, .compute = o->compute, .kv_dtype = o->kv_dtype,
        .page_tokens = o->page_tokens, .max_tokens = o->max_tokens, .max_seqs = o->n_seqs, .max_rows = o->max_tokens,
        .drafts = o->drafts, .parity = o->parity, .config_json = h->json, .config_len = h->json_len, .weights = h->weights,
        .backend = &h->counting, .device = h->dev };
    if ((r = h->api->load(mo->ctx, &load, &h->model, err)) < 0)
        return r;
    h->desc = h->api->describe(h->model);
    return o->random ? 0 : weights_unclaimed(h->weights, err);
}

static int open_caches(struct harness *h, struct arle_err *err)
{
    const struct harness_options *o = &h->o;
    h->pages_per_seq = (o->seq_tokens + o->page_tokens - 1) / o->page_tokens;
    h->n_pages = 1 + o->n_seqs * h->pages_per_seq;
    h->bind = (struct arle_cache_binding){ .struct_size = sizeof h->bind, .n_groups = h->desc->n_groups };
    for (uint32_t g = 0; g < h->desc->n_groups; g++) {
        const struct arle_cache_group *cg = &h->desc->groups[g];
        bool paged = cg->kind == ARLE_CACHE_PAGED;
        h->bind.group[g].stride = ((paged ? cg->page_bytes : cg->record_bytes) + 255) & ~255ull;
        int r = dev_alloc(h, h->bind.group[g].stride * (paged ? h->n_pages : o->n_seqs + 1), &h->bind.group[g].base, err);
        if (r < 0)
            return r;
    }
    size_t T = o->max_tokens, S = o->n_seqs;
    h->host_logits = malloc(T * h->desc->vocab * 4);
    h->host_drafts = malloc(T * 4);
    int r = h->api->bind(h->model, &h->bind, err);
    if (r == 0)
        r = dev_alloc(h, (5 * T + 3 * S + 2 + S * h->pages_per_seq + 64) * 4, (void **)&h->ints, err);
    if (r == 0)
        r = dev_alloc(h, T * h->desc->vocab * 4, (void **)&h->logits, err);
    return r < 0 ? r : dev_alloc(h, T * 4, (void **)&h->drafts, err);
}

int harness_open(struct harness **out, const struct harness_options *o, struct arle_err *err)
{
    struct harness *h = calloc(1, sizeof *h);
    h->o = *o;
    int r = open_parts(h, err);
    if (r == 0)
        r = open_caches(h, err);
    if (r < 0) {
        harness_close(h);
        return r;
    }
    *out = h;
    return 0;
}

void harness_close(struct harness *h)
{
    if (h == NULL)
        return;
    if (h->model)
        h->api->destroy(h->model);
    if (h->dev) {
        for (uint32_t i = 0; i < MAX_GRAPHS; i++)
            if (h->graph[i])
                h->be->graph_destroy(h->dev, h->graph[i]);
        for (uint32_t g = 0; g < h->bind.n_groups; g++)
            h->be->mem.free(h->dev, ARLE_MEM_DEVICE, h->bind.group[g].base);
        h->be->mem.free(h->dev, ARLE_MEM_DEVICE, h->ints);
        h->be->mem.free(h->dev, ARLE_MEM_DEVICE, h->logits);
        h->be->mem.free(h->dev, ARLE_MEM_DEVICE, h->drafts);
        if (h->st)
            h->be->mem.stream_destroy(h->dev, h->st);
        h->be->close_device(h->dev);
    }
    weights_close(h->weights);
    if (h->reg)
        registry_close(h->reg);
    config_close(h->cfg);
    free(h->json);
    free(h->host_logits);
    free(h->host_drafts);
    free(h);
}

const struct arle_model_desc *harness_desc(const struct harness *h)
{
    return h->desc;
}

uint64_t harness_weight_bytes_created(const struct harness *h)
{
    return created_bytes;
}

const struct arle_model_api *harness_api(const struct harness *h)
{
    return h->api;
}

/* Pages of sequences interleave, so that neighbours in a page pool belong to different sequences. */
static int32_t page_of(const struct harness *h, uint32_t s, uint32_t i)
{
    return (int32_t)(1 + i * h->o.n_seqs + s);
}

void harness_reset(struct harness *h, uint32_t s)
{
    for (uint32_t g = 0; g < h->desc->n_groups; g++)
        if (h->desc->groups[g].kind != ARLE_CACHE_PAGED)
            h->be->mem.fill(h->dev, h->st, (char *)h->bind.group[g].base + (s + 1) * h->bind.group[g].stride, 0, h->bind.group[g].stride);
}

/* The arrays of a step lie in the same place each time, so that a graph of n rows serves every step of n rows. */
static int replay(struct harness *h, uint32_t n, struct arle_step *step, struct arle_err *err)
{
    struct arle_graph **g = &h->graph[n - 1];
    step->batch.max_ctx = h->o.seq_tokens;
    int r = 0;
    if (*g == NULL) {
        r = h->be->graph_begin(h->dev, h->st, err);
        if (r == 0)
            r = h->api->step(h->model, h->st, step, err);
        if (r == 0)
            r = h->be->graph_end(h->dev, h->st, g, err);
    }
    if (r == 0 && h->be->graph_launch(h->dev, *g, h->st) < 0)
        r = arle_err_set(err, -EIO, "the graph did not start");
    return r;
}

uint64_t harness_counter(const struct harness *h, const char *name)
{
    struct arle_counter c[64];
    uint32_t n = h->be->counters(h->dev, c, 64);
    for (uint32_t i = 0; i < n && i < 64; i++)
        if (strcmp(c[i].name, name) == 0)
            return c[i].value;
    return 0;
}

int harness_step(struct harness *h, const struct harness_piece *p, uint32_t n, const float **out_logits, const int32_t **out_drafts,
                 struct arle_err *err)
{
    uint32_t T = 0, n_decode = 0, max_new = 0, max_ctx = 0;
    for (uint32_t i = 0; i < n; i++) {
        T += p[i].n;
        n_decode += p[i].n == 1 && n_decode == i;
        max_new = p[i].n > max_new ? p[i].n : max_new;
        max_ctx = p[i].pos + p[i].n > max_ctx ? p[i].pos + p[i].n : max_ctx;
    }
    size_t total = 4 * (size_t)T + (size_t)n * (3 + h->pages_per_seq) + 1 + 48;
    int32_t *x = calloc(total, 4);
    size_t at = 0;
#define ARRAY(name, count) size_t name = at; at += ((count) + 3) & ~(size_t)3
    ARRAY(ids, T); ARRAY(pos, T); ARRAY(seq_of, T); ARRAY(rows, T); ARRAY(cu, n + 1); ARRAY(ctx, n); ARRAY(slot, n);
    ARRAY(table, (size_t)n * h->pages_per_seq);
#undef ARRAY
    uint32_t t = 0;
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < p[i].n; k++, t++) {
            x[ids + t] = p[i].tokens[k];
            x[pos + t] = (int32_t)(p[i].pos + k);
            x[seq_of + t] = (int32_t)i;
            x[rows + t] = (int32_t)t;
        }
        x[cu + i + 1] = (int32_t)t;
        x[ctx + i] = (int32_t)(p[i].pos + p[i].n);
        x[slot + i] = (int32_t)p[i].seq + 1;
        for (uint32_t k = 0; k < h->pages_per_seq; k++)
            x[table + (size_t)i * h->pages_per_seq + k] = page_of(h, p[i].seq, k);
    }
    copy(h, h->ints, x, at * 4, ARLE_COPY_H2D);
    free(x);
    struct arle_step step = { .struct_size = sizeof step, .flags = h->desc->has_drafter ? ARLE_STEP_DRAFTS : 0,
        .batch = { .struct_size = sizeof step.batch, .n_tokens = T, .n_seqs = n, .n_decode = n_decode, .max_new = max_new,
                   .max_ctx = max_ctx, .page_tokens = h->o.page_tokens, .table_stride = h->pages_per_seq, .ids = h->ints + ids,
                   .sampled = h->ints, .pos = h->ints + pos, .seq_of = h->ints + seq_of, .cu = h->ints + cu, .ctx_len = h->ints + ctx,
                   .slot = h->ints + slot, .block_table = h->ints + table },
        .n_rows = T, .rows = h->ints + rows, .logits = h->logits, .ld_logits = h->desc->vocab, .drafts = h->drafts };
    int r = h->o.graphs && T == n && n <= MAX_GRAPHS ? replay(h, n, &step, err) : h->api->step(h->model, h->st, &step, err);
    if (r < 0)
        return r;
    copy(h, h->host_logits, h->logits, (size_t)T * h->desc->vocab * 4, ARLE_COPY_D2H);
    *out_logits = h->host_logits;
    if (out_drafts != NULL) {
        copy(h, h->host_drafts, h->drafts, (size_t)T * 4, ARLE_COPY_D2H);
        *out_drafts = h->host_drafts;
    }
    return 0;
}

/* ---- snapshots ---- */

struct harness_snapshot { uint32_t n_pages; char *group[ARLE_MAX_CACHE_GROUPS]; };

struct harness_snapshot *harness_save(struct harness *h, uint32_t s, uint32_t n_tokens)
{
    struct harness_snapshot *snap = calloc(1, sizeof *snap);
    snap->n_pages = (n_tokens + h->o.page_tokens - 1) / h->o.page_tokens;
    for (uint32_t g = 0; g < h->desc->n_groups; g++) {
        size_t stride = h->bind.group[g].stride;
        bool paged = h->desc->groups[g].kind == ARLE_CACHE_PAGED;
        uint32_t n = paged ? snap->n_pages : 1;
        snap->group[g] = malloc(stride * n + 1);
        for (uint32_t i = 0; i < n; i++)
            copy(h, snap->group[g] + i * stride,
                 (char *)h->bind.group[g].base + (paged ? (size_t)page_of(h, s, i) : s + 1) * stride, stride, ARLE_COPY_D2H);
    }
    return snap;
}

void harness_restore(struct harness *h, uint32_t s, const struct harness_snapshot *snap)
{
    for (uint32_t g = 0; g < h->desc->n_groups; g++) {
        size_t stride = h->bind.group[g].stride;
        bool paged = h->desc->groups[g].kind == ARLE_CACHE_PAGED;
        for (uint32_t i = 0; i < (paged ? snap->n_pages : 1); i++)
            copy(h, (char *)h->bind.group[g].base + (paged ? (size_t)page_of(h, s, i) : s + 1) * stride, snap->group[g] + i * stride,
                 stride, ARLE_COPY_H2D);
    }
}

void harness_snapshot_free(struct harness_snapshot *snap)
{
    for (uint32_t g = 0; snap && g < ARLE_MAX_CACHE_GROUPS; g++)
        free(snap->group[g]);
    free(snap);
}

/* ---- golden files ---- */

struct golden {
    struct json_object *root;
    char *bytes;                        /* of golden.safetensors: tensors point into it */
    struct arle_weights *tensors;
    struct golden_case *cases;
    uint32_t n;
};

static int32_t *ints_of(struct json_object *o, const char *key, uint32_t *n)
{
    struct json_object *a = NULL;
    *n = 0;
    if (!json_object_object_get_ex(o, key, &a))
        return NULL;
    *n = (uint32_t)json_object_array_length(a);
    int32_t *out = malloc((*n + 1) * sizeof *out);
    for (uint32_t i = 0; i < *n; i++)
        out[i] = json_object_get_int(json_object_array_get_idx(a, i));
    return out;
}

static double *doubles_of(struct json_object *o, const char *key, uint32_t n)
{
    struct json_object *a = json_object_object_get(o, key);
    double *out = malloc((n + 1) * sizeof *out);
    for (uint32_t i = 0; i < n; i++)
        out[i] = json_object_get_double(json_object_array_get_idx(a, i));
    return out;
}

static void read_case(struct golden *g, struct golden_case *c, const char *name, struct json_object *o)
{
    uint32_t n;
    char tensor[128];
    c->name = name;
    c->text = json_object_get_string(json_object_object_get(o, "text"));
    c->mean_nll = json_object_get_double(json_object_object_get(o, "mean_nll"));
    c->ids = ints_of(o, "ids", &c->n_ids);
    c->argmax = ints_of(o, "argmax_per_position", &n);
    c->greedy = ints_of(o, "greedy_ids", &c->n_greedy);
    c->drafts = ints_of(o, "mtp_draft_argmax_per_position", &c->n_drafts);
    c->top_ids = ints_of(o, "last_top20_ids", &c->n_top);
    c->top_logits = doubles_of(o, "last_top20_logits", c->n_top);
    c->margin = doubles_of(o, "greedy_margin", c->n_greedy);
    snprintf(tensor, sizeof tensor, "%s.logits", name);
    const struct arle_tensor *t = g->tensors->find(g->tensors, tensor);
    if (t != NULL) {
        c->logits = t->data;
        c->n_logit_rows = (uint32_t)t->dim[0];
        c->vocab = (uint32_t)t->dim[1];
    }
}

int golden_open(struct golden **out, const char *dir, struct arle_err *err)
{
    char path[600];
    size_t len;
    struct golden *g = calloc(1, sizeof *g);
    snprintf(path, sizeof path, "%s/golden.json", dir);
    g->root = json_object_from_file(path);
    snprintf(path, sizeof path, "%s/golden.safetensors", dir);
    char *bytes = read_file(path, &len);
    if (g->root == NULL || bytes == NULL) {
        free(bytes);
        golden_close(g);
        return arle_err_set(err, -ENOENT, "no golden files in %s", dir);
    }
    g->bytes = bytes;
    int r = weights_from_memory("golden.safetensors", bytes, len, &g->tensors, err);
    if (r < 0) {
        golden_close(g);
        return r;
    }
    g->cases = calloc((size_t)json_object_object_length(g->root), sizeof *g->cases);
    json_object_object_foreach(g->root, key, v)
        read_case(g, &g->cases[g->n++], key, v);
    *out = g;
    return 0;
}

uint32_t golden_count(const struct golden *g)
{
    return g->n;
}

const struct golden_case *golden_at(const struct golden *g, uint32_t i)
{
    return &g->cases[i];
}

void golden_close(struct golden *g)
{
    for (uint32_t i = 0; i < g->n; i++) {
        free((void *)g->cases[i].ids);
        free((void *)g->cases[i].argmax);
        free((void *)g->cases[i].greedy);
        free((void *)g->cases[i].drafts);
        free((void *)g->cases[i].margin);
        free((void *)g->cases[i].top_ids);
        free((void *)g->cases[i].top_logits);
    }
    free(g->cases);
    weights_close(g->tensors);
    json_object_put(g->root);
    free(g->bytes);
    free(g);
}

static uint32_t argmax(const float *x, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

static double nll(const float *x, uint32_t n, int32_t id)
{
    double m = x[argmax(x, n)], sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += exp(x[i] - m);
    return m + log(sum) - x[id];
}

/* How far the reference's best id leads its second at a kept row. */
static double lead(const float *ref, uint32_t n)
{
    uint32_t best = argmax(ref, n);
    float second = -INFINITY;
    for (uint32_t i = 0; i < n; i++)
        if (i != best && ref[i] > second)
            second = ref[i];
    return ref[best] - second;
}

static void compare_row(const struct golden_case *c, uint32_t pos, const float *x, uint32_t vocab, struct golden_result *out)
{
    uint32_t first = c->n_ids - c->n_logit_rows;
    for (uint32_t i = 0; pos + 1 == c->n_ids && i < c->n_top; i++)
        out->worst_logit = fmax(out->worst_logit, fabs(x[c->top_ids[i]] - c->top_logits[i]));
    if (c->logits == NULL || pos < first)
        return;
    const float *ref = c->logits + (size_t)(pos - first) * c->vocab;
    for (uint32_t i = 0; i < vocab; i++)
        out->worst_logit = fmax(out->worst_logit, fabs((double)x[i] - ref[i]));
    if (lead(ref, vocab) > 0.02 && argmax(x, vocab) != (uint32_t)c->argmax[pos])
        out->argmax_wrong++;
}

static void compare_draft(const struct golden_case *c, uint32_t pos, int32_t draft, struct golden_result *out)
{
    if (c->drafts == NULL || pos == 0 || pos - 1 >= c->n_drafts)
        return;
    out->drafts_seen++;
    out->drafts_wrong += draft != c->drafts[pos - 1];
}

int golden_run(struct harness *h, const struct golden_case *c, uint32_t chunk, double margin_bound, bool drafts,
               struct golden_result *out, struct arle_err *err)
{
    uint32_t V = h->desc->vocab, last = 0;
    const float *x = NULL;
    const int32_t *d = NULL;
    double sum = 0;
    *out = (struct golden_result){ 0 };
    harness_reset(h, 0);
    for (uint32_t at = 0; at < c->n_ids; at += chunk) {
        uint32_t n = c->n_ids - at < chunk ? c->n_ids - at : chunk;
        struct harness_piece p = { 0, at, c->ids + at, n };
        int r = harness_step(h, &p, 1, &x, drafts ? &d : NULL, err);
        if (r < 0)
            return r;
        for (uint32_t i = 0; i < n; i++) {
            compare_row(c, at + i, x + (size_t)i * V, V, out);
            if (drafts)
                compare_draft(c, at + i, d[i], out);
            if (at + i + 1 < c->n_ids)
                sum += nll(x + (size_t)i * V, V, c->ids[at + i + 1]);
        }
        last = argmax(x + (size_t)(n - 1) * V, V);
    }
    out->nll_diff = fabs(sum / (c->n_ids - 1) - c->mean_nll);
    while (out->greedy_must < c->n_greedy && c->margin[out->greedy_must] >= margin_bound)
        out->greedy_must++;
    for (uint32_t i = 0; i < c->n_greedy && (int32_t)last == c->greedy[i]; i++) {
        struct harness_piece p = { 0, c->n_ids + i, &c->greedy[i], 1 };
        out->greedy_equal++;
        int r = harness_step(h, &p, 1, &x, drafts ? &d : NULL, err);
        if (r < 0)
            return r;
        if (drafts)
            compare_draft(c, c->n_ids + i, d[0], out);
        last = argmax(x, V);
    }
    return 0;
}
