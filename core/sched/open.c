/*
 * From a configuration to a running engine, and back: device, checkpoint, model, sizes of the caches, buffers of a step.
 * Everything that can be refused is refused here.
 */
#include "sched/sched.h"
#include "util/clock.h"
#include "util/log.h"
#include "weights/weights.h"
#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_CONFIG_BYTES (16u << 20)
#define HIST_BYTES ((size_t)64 << 20)   /* device memory for the token histories that penalties need */
#define PROMPT_ROWS 64u                 /* rows beyond one per sequence, for log-probabilities of prompts */
#define MIN_PAGES 2u
#define MAX_PAGE_TOKENS 1024u

static int64_t real_clock(void *arg)
{
    return clock_mono_us();
}

/* ---- files ---- */

/* NULL and 0 when the file is not there. */
static int read_text(const char *dir, const char *name, char **out, size_t *out_len, struct arle_err *err)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    *out = NULL;
    *out_len = 0;
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return errno == ENOENT ? 0 : arle_err_set(err, -errno, "%s: %s", path, strerror(errno));
    char *buf = malloc(MAX_CONFIG_BYTES);
    size_t n = buf == NULL ? 0 : fread(buf, 1, MAX_CONFIG_BYTES, f);
    bool bad = ferror(f) != 0;
    fclose(f);
    if (buf == NULL || bad || n == MAX_CONFIG_BYTES) {
        free(buf);
        return arle_err_set(err, -EIO, "%s cannot be read, or is larger than %u MiB", path, MAX_CONFIG_BYTES >> 20);
    }
    *out = realloc(buf, n + 1);
    (*out)[n] = '\0';
    *out_len = n;
    return 0;
}

static int read_secret(const char *path, uint8_t out[32], struct arle_err *err)
{
    if (getrandom(out, 32, 0) != 32)
        return arle_err_set(err, -EIO, "no random bytes for the cache secret");
    if (path == NULL || path[0] == '\0')
        return 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t n = read(fd, out, 32);
        close(fd);
        return n == 32 ? 0 : arle_err_param(err, -EINVAL, "kv.secret_file", "%s must hold 32 bytes", path);
    }
    if (errno == ENOENT)
        fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return arle_err_param(err, -errno, "kv.secret_file", "%s: %s", path, strerror(errno));
    ssize_t n = write(fd, out, 32);
    int r = n == 32 && fsync(fd) == 0 ? 0 : -EIO;
    close(fd);
    return r < 0 ? arle_err_param(err, r, "kv.secret_file", "%s cannot be written", path) : 0;
}

/* ---- choices ---- */

static int dtype_named(const char *word, uint32_t automatic, uint32_t *out)
{
    static const struct { const char *word; uint32_t dtype; } names[] = {
        { "f32", ARLE_F32 }, { "bf16", ARLE_BF16 }, { "int8", ARLE_I8 }, { "i8", ARLE_I8 }, { "fp8", ARLE_F8E4M3 },
        { "f8e4m3", ARLE_F8E4M3 }, { "int4", ARLE_I4G }, { "i4", ARLE_I4G }, { "4bit", ARLE_I4G },
    };
    *out = automatic;
    if (word == NULL || word[0] == '\0' || strcmp(word, "auto") == 0)
        return 0;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(word, names[i].word) == 0) {
            *out = names[i].dtype;
            return 0;
        }
    return -EINVAL;
}

static int choose_dtypes(struct engine *e, struct arle_model_load *load, struct arle_err *err)
{
    if (dtype_named(e->cfg.compute, e->info.default_compute, &load->compute) < 0 ||
        (load->compute != ARLE_F32 && load->compute != ARLE_BF16))
        return arle_err_param(err, -EINVAL, "compute", "compute is \"%s\", must be auto, f32 or bf16", e->cfg.compute);
    if (dtype_named(e->cfg.kv_dtype, load->compute, &load->kv_dtype) < 0)
        return arle_err_param(err, -EINVAL, "kv_dtype", "kv_dtype is \"%s\", must be auto, f32, bf16, int8, fp8 or int4", e->cfg.kv_dtype);
    return 0;
}

static void fill_defaults(struct engine *e)
{
    struct engine_config *c = &e->cfg;
    if (c->clock_us == NULL)
        c->clock_us = real_clock;
    if (c->max_seqs == 0)
        c->max_seqs = e->info.async ? 64 : 16;
    if (e->info.max_rows > 0 && c->max_seqs > e->info.max_rows)
        c->max_seqs = e->info.max_rows;
    if (c->max_tokens == 0)
        c->max_tokens = e->info.async ? 2048 : 512;        /* as fast as larger chunks, and decode rows wait a quarter as long */
    /* A step must be able to give one aligned chunk to somebody even when every seat has a decode row. */
    if (c->max_tokens < c->max_seqs + SCHED_ALIGN)
        c->max_tokens = c->max_seqs + SCHED_ALIGN;
    if (e->info.max_rows > 0 && c->max_tokens > e->info.max_rows)
        c->max_tokens = e->info.max_rows;
    if (c->max_queue == 0)
        c->max_queue = 256;
    if (c->page_tokens == 0)
        c->page_tokens = 16;
    if (c->watchdog_ms == 0)
        c->watchdog_ms = 10000;
    if (c->aging_ms == 0)
        c->aging_ms = 5000;
}

/* ---- model ---- */

static int check_backend(const struct arle_backend_api *be, struct arle_err *err)
{
    if (!ARLE_HAS(be, struct arle_backend_api, open_device) || !ARLE_HAS(be, struct arle_backend_api, ops) ||
        !ARLE_HAS(be->ops, struct arle_ops, sample))
        return arle_err_set(err, -ENOTSUP, "the backend lacks op sample");
    return 0;
}

static int open_device(struct engine *e, void *backend_ctx, uint32_t index, struct arle_err *err)
{
    uint32_t n = e->be->n_devices(backend_ctx);
    if (index >= n)
        return arle_err_param(err, -ENODEV, "device", "device %u does not exist; the backend has %u", index, n);
    e->info.struct_size = sizeof e->info;
    int r = e->be->device_info(backend_ctx, index, &e->info, err);
    if (r == 0)
        r = e->be->open_device(backend_ctx, index, &e->dev, err);
    if (r == 0)
        r = e->mem->stream_create(e->dev, &e->stream, err);
    e->be_ctx = backend_ctx;
    e->device_index = index;
    return r;
}

static int load_once(struct engine *e, struct arle_model_load *load, struct arle_err *err)
{
    int r = e->api->load(e->model_ctx, load, &e->model, err);
    if (r == 0) {
        /* A plugin of an older minor version knows fewer members: the rest stays zero. */
        const struct arle_model_desc *d = e->api->describe(e->model);
        memset(&e->desc, 0, sizeof e->desc);
        memcpy(&e->desc, d, d->struct_size < sizeof e->desc ? d->struct_size : sizeof e->desc);
    }
    return r;
}

/* Pages must be a multiple of what the model's groups need. Only the model knows, so it is asked before memory is spent: it
 * either says the multiple, or refuses a page that is too small, and then larger ones are tried. */
static int choose_page(struct engine *e, struct arle_model_load *load, struct arle_err *err)
{
    struct arle_model_desc d = { .struct_size = sizeof d };
    const struct arle_weights *w = load->weights;
    uint32_t wanted = load->page_tokens;
    int r;
    if (!ARLE_HAS(e->api, struct arle_model_api, predict))
        return 0;
    load->weights = NULL;
    while ((r = e->api->predict(e->model_ctx, load, &d, err)) == -EINVAL && strstr(err->param, "page_tokens") != NULL &&
           load->page_tokens < MAX_PAGE_TOKENS)
        load->page_tokens *= 2;
    load->weights = w;
    if (r < 0)
        return r;
    uint32_t m = d.page_multiple ? d.page_multiple : 1;
    load->page_tokens = (load->page_tokens + m - 1) / m * m;
    if (load->page_tokens != wanted)
        log_info("sched", "page_tokens", "model=%s from=%u to=%u reason=\"the model's cache entries span several tokens\"", e->name,
                 wanted, load->page_tokens);
    e->cfg.page_tokens = load->page_tokens;
    return 0;
}

static int load_model(struct engine *e, const char *config_json, size_t config_len, struct arle_err *err)
{
    struct arle_model_load load = {
        .struct_size = sizeof load, .page_tokens = e->cfg.page_tokens, .max_tokens = e->cfg.max_tokens,
        .max_seqs = e->cfg.max_seqs, .max_rows = e->max_rows, .context = e->cfg.context, .drafts = e->cfg.drafts,
        .parity = e->cfg.parity, .config_json = config_json, .config_len = config_len, .weights = e->weights,
        .backend = e->be, .device = e->dev, .progress = e->cfg.progress, .progress_arg = e->cfg.progress_arg,
    };
    int r = choose_dtypes(e, &load, err);
    if (r == 0)
        r = choose_page(e, &load, err);
    if (r == 0)
        r = load_once(e, &load, err);
    if (r < 0)
        return r;
    e->compute = load.compute;
    e->kv_dtype = load.kv_dtype;
    e->page_tokens = e->cfg.page_tokens;
    e->context = e->cfg.context > 0 && e->cfg.context < e->desc.context ? e->cfg.context : e->desc.context;
    if (e->desc.n_valid == 0 || e->desc.n_valid > e->desc.vocab || e->context == 0)
        return arle_err_set(err, -EINVAL, "the model describes itself wrongly: %u ids of %u, context %u", e->desc.n_valid,
                            e->desc.vocab, e->context);
    e->desc.has_drafter = e->desc.has_drafter && e->cfg.drafts;
    return e->cfg.random_weights ? 0 : weights_unclaimed(e->weights, err);
}

/* ---- buffers of a step ---- */

static int step_init(struct engine *e, struct step *s, struct arle_err *err)
{
    s->part = calloc(e->cfg.max_seqs, sizeof *s->part);
    s->row = calloc(e->max_rows, sizeof *s->row);
    s->shadow = calloc(e->cfg.max_seqs, sizeof *s->shadow);
    if (s->part == NULL || s->row == NULL || s->shadow == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for step plans");
    int r = e->mem->alloc(e->dev, ARLE_MEM_PINNED, e->in_bytes, (void **)&s->in, err);
    if (r == 0)
        r = e->mem->alloc(e->dev, ARLE_MEM_PINNED, e->out_bytes, (void **)&s->out, err);
    return r == 0 ? e->mem->event_create(e->dev, &s->done, err) : r;
}

static void step_fini(struct engine *e, struct step *s)
{
    if (s->done != NULL)
        e->mem->event_destroy(e->dev, s->done);
    if (s->in != NULL)
        e->mem->free(e->dev, ARLE_MEM_PINNED, s->in);
    if (s->out != NULL)
        e->mem->free(e->dev, ARLE_MEM_PINNED, s->out);
    free(s->part);
    free(s->shadow);
    free(s->row);
}

static int init_histories(struct engine *e, struct arle_err *err)
{
    e->hist_stride = e->context;
    size_t fit = HIST_BYTES / ((size_t)e->hist_stride * 4);
    e->hist_slots = fit < 1 ? 1 : fit > e->cfg.max_seqs ? e->cfg.max_seqs : (uint32_t)fit;
    e->hist_free = calloc(e->hist_slots, sizeof *e->hist_free);
    if (e->hist_free == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for histories");
    for (uint32_t i = 0; i < e->hist_slots; i++)
        e->hist_free[e->n_hist_free++] = (int32_t)i;
    return e->mem->alloc(e->dev, ARLE_MEM_DEVICE, (size_t)e->hist_slots * e->hist_stride * 4, (void **)&e->d_hist, err);
}

static int init_buffers(struct engine *e, struct arle_err *err)
{
    e->max_stride = (e->context + e->page_tokens - 1) / e->page_tokens;
    e->bias_cap = MAX_BIAS + 64 * e->cfg.max_seqs;
    e->in_bytes = plan_layout(e->cfg.max_tokens, e->cfg.max_seqs, e->max_rows, e->max_stride, e->bias_cap).end;
    e->draft_at = results_bytes(e->max_rows);
    e->out_bytes = e->draft_at + (size_t)e->cfg.max_tokens * 4;
    e->cap_touched = 2 * e->cfg.max_seqs + 64;
    e->touched = calloc(e->cap_touched, sizeof *e->touched);
    e->run = calloc(e->cfg.max_seqs, sizeof *e->run);
    if (e->touched == NULL || e->run == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the scheduler");
    size_t logits;
    if (arle_mul_size(&logits, (size_t)e->max_rows * e->desc.vocab, 4) < 0)
        return arle_err_set(err, -EOVERFLOW, "logits of %u rows are too large", e->max_rows);
    int r = e->mem->alloc(e->dev, ARLE_MEM_DEVICE, logits, (void **)&e->d_logits, err);
    if (r == 0)
        r = e->mem->alloc(e->dev, ARLE_MEM_DEVICE, e->in_bytes, (void **)&e->d_in, err);
    if (r == 0)
        r = e->mem->alloc(e->dev, ARLE_MEM_DEVICE, e->out_bytes, (void **)&e->d_out, err);
    if (r == 0)
        r = init_histories(e, err);
    if (r == 0)
        r = step_init(e, &e->step[0], err);
    return r == 0 ? step_init(e, &e->step[1], err) : r;
}

/* ---- caches ---- */

struct kv_sizes { uint64_t page, slot; };

static struct kv_sizes group_sizes(const struct engine *e)
{
    struct kv_sizes z = { 0, 0 };
    for (uint32_t i = 0; i < e->desc.n_groups; i++) {
        const struct arle_cache_group *g = &e->desc.groups[i];
        *(g->kind == ARLE_CACHE_PAGED ? &z.page : &z.slot) += g->kind == ARLE_CACHE_PAGED ? g->page_bytes : g->record_bytes;
    }
    return z;
}

/*
 * Without a configured size: most of what is free on a device with memory of its own, a modest share of ordinary memory, which
 * belongs to others too. Never more than every seat at full context and as much again to remember.
 */
static uint64_t auto_bytes(const struct engine *e, uint64_t full)
{
    struct arle_device_info now = e->info;
    struct arle_err ignored = ARLE_ERR_INIT;
    now.struct_size = sizeof now;
    if (e->be->device_info(e->be_ctx, e->device_index, &now, &ignored) < 0)
        now = e->info;
    uint64_t free_bytes = now.mem_free > e->cfg.kv_snapshot_bytes ? now.mem_free - e->cfg.kv_snapshot_bytes : 0;
    uint64_t share = e->info.async ? free_bytes / 100 * 88 : free_bytes / 4;
    if (!e->info.async && share > (uint64_t)4 << 30)
        share = (uint64_t)4 << 30;
    return share < 2 * full ? share : 2 * full;
}

/* Without them a prompt is cut at every snapshot position, and each piece reads the weights again; with memory of one's own they cost little. */
static uint32_t side_records(const struct engine *e, const struct kv_sizes *z)
{
    uint32_t want = e->info.async ? SIDE_RECORDS : SIDE_RECORDS_HOST;
    if (z->slot == 0 || !e->cfg.prefix_cache)
        return 0;
    return want < e->desc.max_saves ? want : e->desc.max_saves;
}

static int choose_pages(struct engine *e, uint32_t *n_pages, struct arle_err *err)
{
    struct kv_sizes z = group_sizes(e);
    e->n_side = side_records(e, &z);
    uint64_t slots = (e->cfg.max_seqs + 1ull + e->n_side) * z.slot, per_seq = (e->context + e->page_tokens - 1) / e->page_tokens;
    uint64_t full = slots + per_seq * e->cfg.max_seqs * z.page;
    uint64_t bytes = e->cfg.kv_bytes > 0 ? e->cfg.kv_bytes : auto_bytes(e, full);
    uint64_t pages = bytes <= slots ? 0 : z.page == 0 ? per_seq * e->cfg.max_seqs : (bytes - slots) / z.page;
    if (pages > INT32_MAX / 4)
        pages = INT32_MAX / 4;
    if (pages < MIN_PAGES + 1)
        return arle_err_param(err, -ENOMEM, "kv_bytes", "%llu bytes for the cache: %u sequences need %llu for states and %llu per page of %u tokens",
                              (unsigned long long)bytes, e->cfg.max_seqs, (unsigned long long)slots, (unsigned long long)z.page, e->page_tokens);
    *n_pages = (uint32_t)pages - 1;
    if ((uint64_t)*n_pages * e->page_tokens < e->context) {
        log_warn("sched", "context", "model=%s from=%u to=%u reason=\"the cache holds no more; raise kv.device_bytes\"", e->name,
                 e->context, *n_pages * e->page_tokens);
        e->context = *n_pages * e->page_tokens;
    }
    return 0;
}

/* What must be equal for a cached entry to be usable: model, weights, arithmetic and layout. */
static uint64_t hash_bytes(uint64_t h, const void *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        h = (h ^ ((const uint8_t *)p)[i]) * 0x100000001B3ull;      /* FNV-1a */
    return h;
}

static uint64_t hash_checkpoint(const char *dir)
{
    uint64_t sum = 0;
    DIR *d = dir != NULL ? opendir(dir) : NULL;
    struct dirent *f;
    while (d != NULL && (f = readdir(d)) != NULL) {
        struct stat st;
        size_t n = strlen(f->d_name);
        if (n < 12 || strcmp(f->d_name + n - 12, ".safetensors") != 0 || fstatat(dirfd(d), f->d_name, &st, 0) < 0)
            continue;
        int64_t figures[3] = { st.st_size, st.st_mtim.tv_sec, st.st_mtim.tv_nsec };
        sum += hash_bytes(hash_bytes(0xCBF29CE484222325ull, f->d_name, n), figures, sizeof figures);      /* any order */
    }
    if (d != NULL)
        closedir(d);
    return sum;
}

static int open_kv(struct engine *e, const char *config_json, size_t config_len, struct arle_err *err)
{
    char identity[512];
    uint64_t config = hash_bytes(0xCBF29CE484222325ull, config_json, config_len);
    uint64_t weights = e->cfg.random_weights ? 0 : hash_checkpoint(e->cfg.model_dir);
    snprintf(identity, sizeof identity, "%s/%s/config=%016llx/weights=%016llx/compute=%u/kv=%u/page=%u/parity=%d/drafts=%d", e->name,
             e->desc.arch ? e->desc.arch : "", (unsigned long long)config, (unsigned long long)weights, e->compute, e->kv_dtype,
             e->page_tokens, e->cfg.parity, e->cfg.drafts);
    struct kv_config kc = {
        .page_tokens = e->page_tokens, .n_pages = e->n_pages, .n_slots = e->cfg.max_seqs, .n_side = e->n_side, .max_seq_tokens = e->context,
        .prefix_cache = e->cfg.prefix_cache, .snapshot_bytes = e->cfg.kv_snapshot_bytes,
        .snapshot_cadence = e->cfg.kv_snapshot_cadence, .host_bytes = e->cfg.kv_host_bytes, .disk_dir = e->cfg.kv_disk_dir,
        .disk_bytes = e->cfg.kv_disk_bytes, .store = e->cfg.store, .store_ctx = e->cfg.store_ctx, .identity = identity,
        .snapshot_align = SCHED_ALIGN, .pin_pct = e->cfg.kv_pin_pct,
        .tenant_quota_pct = e->cfg.kv_tenant_quota_pct, .host_state_pct = e->cfg.kv_host_state_pct, .strict = e->cfg.kv_strict,
        .disk_fsync = e->cfg.kv_disk_no_sync ? KV_FSYNC_NEVER : KV_FSYNC_COMMIT, .store_deadline_ms = e->cfg.kv_store_deadline_ms,
        .store_min_bytes_s = e->cfg.kv_store_min_bytes_s,
    };
    int r = read_secret(e->cfg.secret_file, kc.secret, err);
    if (r == 0)
        r = kv_create(&e->kv, &kc, e->dev, e->mem, e->stream, e->desc.groups, e->desc.n_groups, err);
    if (r < 0)
        return r;
    struct arle_cache_binding bind;
    kv_binding(e->kv, &bind);
    return e->api->bind(e->model, &bind, err);
}

/* ---- open and close ---- */

static int read_configs(struct engine *e, char **out_config, size_t *out_len, struct arle_err *err)
{
    char *gen = NULL;
    size_t gen_len = 0;
    int r = 0;
    *out_config = NULL;
    if (e->cfg.config_json != NULL) {
        *out_config = strndup(e->cfg.config_json, e->cfg.config_len);
        *out_len = e->cfg.config_len;
        r = *out_config == NULL ? arle_err_set(err, -ENOMEM, "no memory for config.json") : 0;
    } else {
        r = read_text(e->cfg.model_dir, "config.json", out_config, out_len, err);
        if (r == 0 && *out_config == NULL)
            r = arle_err_param(err, -ENOENT, "path", "%s has no config.json", e->cfg.model_dir);
    }
    if (r == 0 && e->cfg.model_dir != NULL)
        r = read_text(e->cfg.model_dir, "generation_config.json", &gen, &gen_len, err);
    if (r == 0)
        r = generation_parse(gen, gen_len, *out_config, *out_len, &e->gen, err);
    free(gen);
    return r;
}

static int open_parts(struct engine *e, void *backend_ctx, uint32_t device_index, struct arle_err *err)
{
    char *config = NULL;
    size_t config_len = 0;
    int r = read_configs(e, &config, &config_len, err);
    if (r == 0)
        r = e->cfg.random_weights ? weights_random(&e->weights, 1, err) : weights_open(e->cfg.model_dir, &e->weights, err);
    if (r == 0)
        r = open_device(e, backend_ctx, device_index, err);
    if (r == 0) {
        fill_defaults(e);
        e->max_rows = e->cfg.max_seqs + PROMPT_ROWS;
        e->ahead = e->cfg.run_ahead && e->info.async;
        e->graphs_on = e->cfg.step_graphs && e->info.graphs && ARLE_HAS(e->be, struct arle_backend_api, graph_launch);
        r = load_model(e, config, config_len, err);
    }
    if (r == 0)
        r = choose_pages(e, &e->n_pages, err);
    e->desc.context = e->context;       /* what callers see is what they can use */
    if (r == 0)
        r = init_buffers(e, err);
    if (r == 0)
        r = open_kv(e, config, config_len, err);
    free(config);
    return r;
}

static void init_sync(struct engine *e)
{
    pthread_condattr_t attr;
    pthread_mutex_init(&e->pub_mu, NULL);
    pthread_mutex_init(&e->watch_mu, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&e->watch_cv, &attr);
    pthread_condattr_destroy(&attr);
}

int engine_open(struct engine **out, const struct engine_config *cfg, const struct arle_backend_api *backend, void *backend_ctx,
                uint32_t device_index, const struct arle_model_api *model, void *model_ctx, struct arle_err *err)
{
    int r = check_backend(backend, err);
    if (r < 0)
        return r;
    if (cfg->model_dir == NULL && (cfg->config_json == NULL || !cfg->random_weights))
        return arle_err_param(err, -EINVAL, "path", "neither a model folder nor a configuration for random weights");
    struct engine *e = calloc(1, sizeof *e);
    if (e == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for an engine");
    e->cfg = *cfg;
    e->be = backend;
    e->mem = &backend->mem;
    e->api = model;
    e->model_ctx = model_ctx;
    e->next_deadline_us = INT64_MAX;
    e->name = strdup(cfg->name != NULL ? cfg->name : "model");
    init_sync(e);
    if (!cfg->manual && getrandom(&e->seed_salt, sizeof e->seed_salt, 0) != sizeof e->seed_salt)
        e->seed_salt = (uint64_t)clock_mono_us();
    r = e->name == NULL ? arle_err_set(err, -ENOMEM, "no memory for an engine") : open_parts(e, backend_ctx, device_index, err);
    if (r == 0) {
        e->st.n_pages = e->n_pages;
        e->st.page_tokens = e->page_tokens;
        r = engine_start(e, err);
    }
    if (r < 0) {
        engine_close(e);
        return r;
    }
    log_info("sched", "open", "model=%s device=\"%s\" compute=%s context=%u seqs=%u step_tokens=%u pages=%u page_tokens=%u ahead=%d graphs=%d",
             e->name, e->info.name, engine_compute(e), e->context, e->cfg.max_seqs, e->cfg.max_tokens, e->n_pages,
             e->page_tokens, e->ahead, e->graphs_on);
    *out = e;
    return 0;
}

void engine_close(struct engine *e)
{
    if (e == NULL)
        return;
    engine_halt(e);
    queue_notes_free(e);
    if (e->stream != NULL) {
        struct arle_err ignored = ARLE_ERR_INIT;
        e->mem->stream_sync(e->dev, e->stream, &ignored);
        step_graphs_free(e);
        step_fini(e, &e->step[0]);
        step_fini(e, &e->step[1]);
    }
    kv_destroy(e->kv);
    if (e->model != NULL)
        e->api->destroy(e->model);
    weights_close(e->weights);
    void *device[] = { e->d_in, e->d_out, e->d_logits, e->d_hist };
    for (size_t i = 0; i < sizeof device / sizeof device[0]; i++)
        if (device[i] != NULL)
            e->mem->free(e->dev, ARLE_MEM_DEVICE, device[i]);
    if (e->stream != NULL)
        e->mem->stream_destroy(e->dev, e->stream);
    if (e->dev != NULL)
        e->be->close_device(e->dev);
    queue_tenants_free(e);
    pthread_mutex_destroy(&e->pub_mu);
    pthread_mutex_destroy(&e->watch_mu);
    pthread_cond_destroy(&e->watch_cv);
    free(e->hist_free);
    free(e->touched);
    free(e->run);
    free(e->name);
    free(e);
}
