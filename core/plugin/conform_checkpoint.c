/* A model plugin with one of its checkpoints: what it says of itself, and what it does about a tensor that is missing. */
#include "plugin/conform.h"
#include "weights/weights.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum { CONFIG_LIMIT = 1 << 20, PAGE_TOKENS = 256 };

/* A view of a checkpoint in which the tensor that was asked for first does not exist. */
struct hiding {
    struct arle_weights view;
    const struct arle_weights *inner;
    char hidden[256];
};

static const struct arle_tensor *hiding_find(const struct arle_weights *w, const char *name)
{
    struct hiding *h = w->ctx;
    if (h->hidden[0] == '\0' && h->inner->find(h->inner, name) != NULL)
        snprintf(h->hidden, sizeof h->hidden, "%s", name);
    return strcmp(h->hidden, name) == 0 ? NULL : h->inner->find(h->inner, name);
}

static size_t hiding_ignore(const struct arle_weights *w, const char *prefix)
{
    const struct hiding *h = w->ctx;
    return h->inner->ignore(h->inner, prefix);
}

static const struct arle_tensor *hiding_at(const struct arle_weights *w, size_t i)
{
    const struct hiding *h = w->ctx;
    return h->inner->at(h->inner, i);
}

static char *read_config(const char *dir, size_t *len)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "re");
    char *text = f != NULL ? calloc(1, CONFIG_LIMIT) : NULL;
    *len = text != NULL ? fread(text, 1, CONFIG_LIMIT - 1, f) : 0;
    if (f != NULL)
        fclose(f);
    return text;
}

static bool good_group(const struct arle_cache_group *g)
{
    if (g->name == NULL || g->name[0] == '\0' || g->name[strspn(g->name, "abcdefghijklmnopqrstuvwxyz0123456789_")] != '\0')
        return false;
    if (g->kind == ARLE_CACHE_PAGED)
        return g->page_bytes > 0 && g->tokens_per_entry > 0 && PAGE_TOKENS % g->tokens_per_entry == 0;
    return (g->kind == ARLE_CACHE_STATE || g->kind == ARLE_CACHE_WINDOW) && g->record_bytes > 0;
}

static void check_desc(struct conform *c, const struct arle_model_desc *d)
{
    conform_case(c, d != NULL && d->n_valid > 0 && d->n_valid <= d->vocab && d->context > 0 && d->hidden > 0 && d->n_params > 0
                        && d->arch != NULL && d->arch[0] != '\0',
                 "describe() gives vocabulary, context, width, parameters and a name", "");
    bool good = d != NULL && d->n_groups >= 1 && d->n_groups <= ARLE_MAX_CACHE_GROUPS;
    for (uint32_t i = 0; good && i < d->n_groups; i++)
        good = good_group(&d->groups[i]);
    conform_case(c, good, "its cache groups have names, kinds and sizes", "");
}

static void check_predict(struct conform *c, const struct arle_model_load *load, const struct arle_model_desc *d)
{
    const struct arle_model_api *api = c->self->ops;
    struct arle_model_desc p = { .struct_size = sizeof p };
    struct arle_err err = ARLE_ERR_INIT;
    if (!ARLE_HAS(api, struct arle_model_api, predict)) {
        conform_skip(c, "predict() agrees with describe()", "it has none");
        return;
    }
    int r = api->predict(c->self->ctx, load, &p, &err);
    bool same = r == 0 && p.vocab == d->vocab && p.context == d->context && p.n_groups == d->n_groups;
    for (uint32_t i = 0; same && p.groups != NULL && i < p.n_groups; i++)      /* groups may stay behind: they live in a model */
        same = p.groups[i].page_bytes == d->groups[i].page_bytes && p.groups[i].record_bytes == d->groups[i].record_bytes;
    conform_case(c, same, "predict() agrees with describe()", err.msg);
}

static void check_missing(struct conform *c, const struct arle_model_load *whole)
{
    const struct arle_model_api *api = c->self->ops;
    struct hiding h = { .view = *whole->weights, .inner = whole->weights };
    struct arle_model_load load = *whole;
    struct arle_model *m = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    h.view.ctx = &h;
    h.view.find = hiding_find;
    h.view.ignore = hiding_ignore;
    h.view.at = hiding_at;
    h.view.done = NULL;
    load.weights = &h.view;
    int r = api->load(c->self->ctx, &load, &m, &err);
    /* Where a checkpoint may use several names, the message has the published one. */
    bool named = strstr(err.msg, h.hidden) != NULL || err.param[0] != '\0';
    conform_case(c, r < 0 && m == NULL && named, "a missing tensor is refused by name", err.msg);
    if (r == 0)
        api->destroy(m);
}

static void check_loaded(struct conform *c, const struct arle_model_load *load)
{
    const struct arle_model_api *api = c->self->ops;
    struct arle_model *m = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    check_missing(c, load);
    int r = api->load(c->self->ctx, load, &m, &err);
    if (!conform_case(c, r == 0 && m != NULL, "load() takes the checkpoint", err.msg))
        return;
    conform_case(c, weights_unclaimed(load->weights, &err) == 0, "every tensor is taken or ignored", err.msg);
    check_desc(c, api->describe(m));
    check_predict(c, load, api->describe(m));
    api->destroy(m);
}

static void with_backend(struct conform *c, struct arle_model_load *load)
{
    const struct plugin_info *be = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int r = registry_backend(c->reg, "auto", &be, &err);
    if (!conform_case(c, r == 0, "there is a backend to load it on", err.msg))
        return;
    load->backend = be->ops;
    r = load->backend->open_device(be->ctx, 0, &load->device, &err);
    if (!conform_case(c, r == 0, "its device opens", err.msg))
        return;
    check_loaded(c, load);
    load->backend->close_device(load->device);
}

void conform_checkpoint(struct conform *c, const char *dir)
{
    const struct arle_model_api *api = c->self->ops;
    struct arle_err err = ARLE_ERR_INIT;
    struct arle_weights *w = NULL;
    struct arle_model_load load = { .struct_size = sizeof load, .compute = ARLE_F32, .kv_dtype = ARLE_F32, .page_tokens = PAGE_TOKENS,
        .max_tokens = 32, .max_seqs = 4, .max_rows = 4, .drafts = 1 };
    char *config = read_config(dir, &load.config_len);
    if (!conform_case(c, config != NULL, "the checkpoint has a config.json", dir))
        return;
    load.config_json = config;
    int r = api->recognise(c->self->ctx, config, load.config_len, &err);
    if (conform_case(c, r == 1, "recognise() knows the config.json", err.msg)) {
        r = weights_open(dir, &w, &err);
        if (conform_case(c, r == 0, "its tensors can be read", err.msg)) {
            load.weights = w;
            with_backend(c, &load);
            weights_close(w);
        }
    }
    free(config);
}
