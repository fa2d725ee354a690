/* Start and stop of host.h. */
#include "daemon/host.h"

#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sched/engine.h"
#include "util/clock.h"
#include "util/log.h"
#include "util/sbuf.h"
#include "util/place.h"

struct host {
    const struct config *cfg;
    struct registry *reg;
    struct served_model **models; size_t n_models;
    bool progress;
};

/* ---- small helpers ---- */

static int read_file(const char *path, size_t max, struct sbuf *out, struct arle_err *err)
{
    char buf[16384];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return arle_err_set(err, -errno, "%s: %s", path, strerror(errno));
    ssize_t n;
    while ((n = read(fd, buf, sizeof buf)) > 0 && out->n <= max)
        sbuf_add(out, buf, (size_t)n);
    int r = n < 0 ? arle_err_set(err, -errno, "%s: %s", path, strerror(errno)) : 0;
    if (r == 0 && out->n > max)
        r = arle_err_set(err, -EINVAL, "%s: longer than %zu bytes", path, max);
    if (r == 0 && out->failed)
        r = arle_err_set(err, -ENOMEM, "%s: no memory", path);
    close(fd);
    return r;
}

static uint32_t model_or(const struct config *cfg, const char *section, const char *key, const char *common)
{
    int64_t own = config_i64(cfg, section, key);
    return (uint32_t)(own > 0 ? own : config_i64(cfg, common, key));
}

struct load_bar {
    const char *name;
    bool shown;
    int64_t last_ms;
};

static void show_progress(void *arg, uint64_t done, uint64_t total)
{
    struct load_bar *bar = arg;
    int64_t now = clock_mono_ms();
    if (total == 0 || (now - bar->last_ms < 100 && done < total))
        return;
    bar->last_ms = now;
    bar->shown = true;
    fprintf(stderr, "\rloading %s %3u%% of %.1f MB", bar->name, (unsigned)(done * 100 / total), (double)total / 1e6);
    fflush(stderr);
}

/* ---- models ---- */

static void fill_engine_config(const struct host *h, size_t i, const char *backend, struct engine_config *ec)
{
    const struct config *cfg = h->cfg;
    const char *s = config_model_section(cfg, i);
    int64_t device_bytes = config_i64(cfg, s, "device_bytes");
    *ec = (struct engine_config){
        .model_dir = config_str(cfg, s, "path"),
        .max_seqs = model_or(cfg, s, "max_seqs", "scheduler"),
        .max_tokens = model_or(cfg, s, "max_tokens", "scheduler"),
        .max_queue = model_or(cfg, s, "max_queue", "scheduler"),
        .page_tokens = (uint32_t)config_i64(cfg, "kv", "page_tokens"),
        .context = (uint32_t)config_i64(cfg, s, "context"),
        .kv_bytes = (uint64_t)(device_bytes > 0 ? device_bytes : config_i64(cfg, "kv", "device_bytes")),
        .kv_snapshot_bytes = (uint64_t)config_i64(cfg, "kv", "snapshot_bytes"),
        .kv_host_bytes = (uint64_t)config_i64(cfg, "kv", "host_bytes"),
        .kv_disk_bytes = (uint64_t)config_i64(cfg, "kv", "disk_bytes"),
        .kv_snapshot_cadence = (uint32_t)config_i64(cfg, "kv", "snapshot_cadence"),
        .kv_pin_pct = (uint32_t)config_i64(cfg, "kv", "pin_pct"),
        .kv_tenant_quota_pct = (uint32_t)config_i64(cfg, "kv", "tenant_quota_pct"),
        .kv_host_state_pct = (uint32_t)config_i64(cfg, "kv", "host_state_pct"),
        .kv_strict = config_bool(cfg, "kv", "strict"),
        .kv_disk_no_sync = strcmp(config_str(cfg, "kv", "disk_fsync"), "never") == 0,
        .kv_store_deadline_ms = (uint32_t)config_i64(cfg, "kv", "store_deadline"),
        .kv_store_min_bytes_s = (uint64_t)config_i64(cfg, "kv", "store_min_bytes_s"),
        .kv_disk_dir = config_str(cfg, "kv", "disk_dir"),
        .kv_dtype = config_str(cfg, s, "kv_dtype"),
        .compute = config_compute(cfg, i, backend),
        .secret_file = config_str(cfg, "kv", "secret_file"),
        .prefix_cache = config_bool(cfg, "kv", "prefix_cache"),
        .random_weights = config_bool(cfg, s, "random_weights"),
        .drafts = config_bool(cfg, s, "drafts"),
        .parity = config_bool(cfg, s, "parity"),
        .deadline_ms = config_i64(cfg, "server", "deadline"),
        .queue_deadline_ms = config_i64(cfg, "scheduler", "max_wait"),
        .step_graphs = config_bool(cfg, "scheduler", "step_graphs"),
        .run_ahead = config_bool(cfg, "scheduler", "run_ahead"),
    };
}

static int add_store(struct host *h, struct engine_config *ec, struct arle_err *err)
{
    const char *name = config_str(h->cfg, "kv", "store");
    const struct plugin_info *p;
    if (*name == '\0')
        return 0;
    int r = registry_find(h->reg, ARLE_KIND_KV_STORE, name, &p, err);
    if (r < 0)
        return r;
    ec->store = p->ops;
    ec->store_ctx = p->ctx;
    return 0;
}

static int open_engine(struct host *h, size_t i, struct served_model *m, struct arle_err *err)
{
    const char *section = config_model_section(h->cfg, i);
    const struct plugin_info *backend, *model;
    struct engine_config ec;
    struct engine *engine = NULL;
    struct sbuf json = SBUF_INIT;
    struct load_bar bar = { .name = m->name };
    char path[PATH_MAX];
    int64_t start = clock_mono_ms();
    snprintf(path, sizeof path, "%s/config.json", config_str(h->cfg, section, "path"));
    int r = read_file(path, 16 << 20, &json, err);
    if (r == 0)
        r = registry_backend(h->reg, config_str(h->cfg, section, "backend"), &backend, err);
    if (r == 0)
        r = registry_model(h->reg, sbuf_text(&json), json.n, &model, err);
    if (r == 0) {
        fill_engine_config(h, i, backend->name, &ec);
        r = add_store(h, &ec, err);
    }
    if (r == 0) {
        ec.name = m->name;
        if (h->progress) {
            ec.progress = show_progress;
            ec.progress_arg = &bar;
        }
        r = engine_open(&engine, &ec, backend->ops, backend->ctx, (uint32_t)config_i64(h->cfg, section, "device"), model->ops,
                        model->ctx, err);
    }
    if (bar.shown)
        fputs("\r\033[K", stderr);
    sbuf_fini(&json);
    if (r == 0 && (r = served_attach(m, engine, model->ops, model->ctx, err)) < 0)
        engine_close(engine);
    if (r == 0)
        log_info("daemon", "model_open", "name=%s arch=%s backend=%s context=%u ms=%lld", m->name, engine_model(engine)->arch,
                 backend->name, served_context(m), (long long)(clock_mono_ms() - start));
    return r;
}

static int open_model(struct host *h, size_t i, struct arle_err *err)
{
    const char *section = config_model_section(h->cfg, i), *name = config_str(h->cfg, section, "served_name");
    struct served_model *m = NULL;
    if (*config_str(h->cfg, section, "path") == '\0')
        return arle_err_param(err, -EINVAL, "path", "[%s] has no path", section);
    int r = served_open(&m, *name ? name : config_model_name(h->cfg, i), config_str(h->cfg, section, "path"),
                        config_bool(h->cfg, section, "special_in_content"), err);
    if (r == 0)
        r = served_keep_calls(m, (uint32_t)config_i64(h->cfg, section, "kept_calls"),
                              (size_t)config_i64(h->cfg, section, "kept_call_bytes"), err);
    if (r == 0)
        r = open_engine(h, i, m, err);
    if (r < 0) {
        served_close(m);
        return r;
    }
    h->models[h->n_models++] = m;
    return 0;
}

static int open_models(struct host *h, struct arle_err *err)
{
    size_t n = config_n_models(h->cfg);
    h->models = calloc(n ? n : 1, sizeof *h->models);
    if (h->models == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for models");
    for (size_t i = 0; i < n; i++) {
        struct arle_err why = ARLE_ERR_INIT;
        int r = open_model(h, i, &why);
        if (r < 0 && config_bool(h->cfg, config_model_section(h->cfg, i), "required"))
            return arle_err_param(err, r, why.param, "model %s: %.440s", config_model_name(h->cfg, i), why.msg);
        if (r < 0)
            log_warn("daemon", "model_left_out", "name=%s reason=\"%s\"", config_model_name(h->cfg, i), why.msg);
    }
    return h->n_models > 0 ? 0 : arle_err_set(err, -ENOENT, "no model to serve: the configuration has no usable [model NAME]");
}

int host_open(struct host **out, const struct config *cfg, bool progress, struct arle_err *err)
{
    struct host *h = calloc(1, sizeof *h);
    if (h == NULL)
        return arle_err_set(err, -ENOMEM, "no memory to start");
    h->cfg = cfg;
    h->progress = progress && isatty(STDERR_FILENO);
    int r = registry_open(&h->reg, cfg, 0, err);
    if (r == 0)
        r = open_models(h, err);
    if (r < 0) {
        host_close(h);
        return r;
    }
    *out = h;
    return 0;
}

struct served_model *const *host_models(const struct host *h, size_t *n)
{
    *n = h->n_models;
    return h->models;
}

struct registry *host_registry(const struct host *h)
{
    return h->reg;
}

bool host_dead(const struct host *h, char *reason, size_t cap)
{
    for (size_t i = 0; i < h->n_models; i++) {
        struct engine_stats st = { 0 };
        engine_stat(h->models[i]->engine, &st);
        if (st.dead) {
            snprintf(reason, cap, "%s: %s", h->models[i]->name, st.dead_reason);
            return true;
        }
    }
    return false;
}

int host_drain(struct host *h, int64_t deadline_ms)
{
    int64_t end = clock_mono_ms() + deadline_ms;
    int cut = 0;
    for (size_t i = 0; i < h->n_models; i++) {
        int64_t left = end - clock_mono_ms();
        int n = engine_drain(h->models[i]->engine, left > 0 ? left : 0);
        cut += n > 0 ? n : 0;
    }
    return cut;
}

void host_close(struct host *h)
{
    if (h == NULL)
        return;
    for (size_t i = 0; i < h->n_models; i++) {
        engine_close(h->models[i]->engine);
        served_close(h->models[i]);
    }
    free(h->models);
    if (h->reg != NULL)
        registry_close(h->reg);
    free(h);
}

/* ---- HTTP options ---- */

/* Lines of the keys file without comments, appended to `out`. */
static int add_keys_file(const char *path, struct sbuf *out, struct arle_err *err)
{
    struct stat st;
    struct sbuf text = SBUF_INIT;
    if (stat(path, &st) < 0)
        return arle_err_param(err, -errno, "auth.keys_file", "%s: %s", path, strerror(errno));
    if ((st.st_mode & 0007) != 0)
        return arle_err_param(err, -EACCES, "auth.keys_file", "%s can be read by everybody; chmod o= it", path);
    int r = read_file(path, 1 << 20, &text, err);
    for (const char *p = sbuf_text(&text); r == 0 && *p != '\0';) {
        size_t line = strcspn(p, "\n"), keep = strcspn(p, "#\n");
        sbuf_char(out, ' ');
        sbuf_add(out, p, keep);
        p += line + (p[line] == '\n');
    }
    sbuf_fini(&text);
    return r;
}

int host_http_options(const struct config *cfg, struct http_options *out, char **keys_text, struct arle_err *err)
{
    struct sbuf keys = SBUF_INIT;
    const char *file = config_str(cfg, "auth", "keys_file");
    sbuf_str(&keys, config_str(cfg, "auth", "keys"));
    int r = *file != '\0' ? add_keys_file(file, &keys, err) : 0;
    if (r == 0 && keys.failed)
        r = arle_err_set(err, -ENOMEM, "no memory for keys");
    if (r < 0) {
        host_forget_keys(keys.p);
        return r;
    }
    *keys_text = keys.p;
    *out = (struct http_options){
        .listen = config_str(cfg, "server", "listen"),
        .force_open = config_bool(cfg, "server", "force_open"),
        .threads = (uint32_t)config_i64(cfg, "server", "threads"),
        .max_connections = (uint32_t)config_i64(cfg, "server", "max_connections"),
        .idle_timeout_ms = config_i64(cfg, "server", "idle_timeout"),
        .max_body = (uint64_t)config_i64(cfg, "server", "max_body"),
        .deadline_ms = config_i64(cfg, "server", "deadline"),
        .keepalive_ms = config_i64(cfg, "server", "keepalive"),
        .cors = config_str(cfg, "server", "cors"),
        .keys = keys.p,
        .log_requests = config_bool(cfg, "log", "requests"),
    };
    return 0;
}

void host_forget_keys(char *keys_text)
{
    if (keys_text != NULL)
        explicit_bzero(keys_text, strlen(keys_text));
    free(keys_text);
}

/* ---- default model ---- */

int host_default_model(char *out, size_t cap, struct arle_err *err)
{
    const char *places[] = { getenv("ARLE_MODELS"), place_models() };
    for (size_t i = 0; i < 2; i++) {
        char probe[PATH_MAX];
        if (places[i] == NULL || *places[i] == '\0')
            continue;
        snprintf(out, cap, "%s/%s", places[i], ARLE_DEFAULT_MODEL);
        snprintf(probe, sizeof probe, "%s/config.json", out);
        if (access(probe, R_OK) == 0)
            return 0;
    }
    return arle_err_set(err, -ENOENT, "no --model given, and there is no %s/%s", place_models(), ARLE_DEFAULT_MODEL);
}
