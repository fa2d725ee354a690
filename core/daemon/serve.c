/* The life of a server; see serve.h. The main thread waits for signals and looks after the engines twice a second. */
#include "daemon/serve.h"

#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "ctl/ctl.h"
#include "daemon/host.h"
#include "daemon/kv_command.h"
#include "kv/kv.h"
#include "util/clock.h"
#include "util/log.h"

struct server {
    struct config **cfg;
    const struct serve_opts *o;
    struct host *host;
    struct http_server *http;
    struct ctl_server *ctl;
    pthread_mutex_t cfg_mu;         /* guards *cfg against a reload while the control thread prints it */
    struct config *old[64]; size_t n_old;       /* configurations whose strings the engines may still borrow */
    atomic_bool want_drain, want_reload;
    pthread_t main;
    int64_t start_us;
};

/* ---- telling the service manager ---- */

static void notify_manager(const char *state)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un sa = { .sun_family = AF_UNIX };
    if (path == NULL || (path[0] != '/' && path[0] != '@') || strlen(path) >= sizeof sa.sun_path)
        return;
    memcpy(sa.sun_path, path, strlen(path));
    socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
    if (path[0] == '@')
        sa.sun_path[0] = '\0';
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    if (sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&sa, len) < 0)
        log_warn("daemon", "notify", "error=\"%s\"", strerror(errno));
    close(fd);
}

/* ---- reload ---- */

struct changes {
    struct sbuf live, restart;      /* JSON lists of keys */
};

static void on_change(void *arg, const char *section, const struct arle_conf_key *key, const char *was, const char *is)
{
    struct changes *c = arg;
    struct sbuf *b = (key->flags & ARLE_CONF_RELOAD) != 0 ? &c->live : &c->restart;
    if (b->n > 0)
        sbuf_char(b, ',');
    sbuf_fmt(b, "\"%s.%s\"", section, key->name);
}

static int reload(struct server *s, struct sbuf *out, struct arle_err *err)
{
    struct config *fresh = NULL;
    struct http_options ho;
    struct changes c = { { 0 }, { 0 } };
    char *keys = NULL;
    enum arle_log_level level;
    const char *path = config_path(*s->cfg);
    if (s->n_old == sizeof s->old / sizeof s->old[0])
        return arle_err_set(err, -ENOSPC, "too many reloads; restart the daemon");
    int r = config_open(&fresh, *path ? path : NULL, s->o->sets, s->o->n_sets, err);
    if (r == 0)
        r = host_http_options(fresh, &ho, &keys, err);
    if (r == 0)
        r = http_server_update(s->http, &ho, err);
    host_forget_keys(keys);
    if (r < 0) {
        config_close(fresh);
        return r;
    }
    config_diff(*s->cfg, fresh, on_change, &c);
    if (log_level_parse(config_str(fresh, "log", "level"), &level) == 0)
        log_set_level(level);
    pthread_mutex_lock(&s->cfg_mu);
    s->old[s->n_old++] = *s->cfg;
    *s->cfg = fresh;
    pthread_mutex_unlock(&s->cfg_mu);
    log_info("daemon", "reloaded", "live=[%s] needs_restart=[%s]", sbuf_text(&c.live), sbuf_text(&c.restart));
    if (out != NULL)
        sbuf_fmt(out, "{\"applied\":[%s],\"needs_restart\":[%s]}", sbuf_text(&c.live), sbuf_text(&c.restart));
    sbuf_fini(&c.live);
    sbuf_fini(&c.restart);
    return 0;
}

/* ---- control commands ---- */

static long peak_kb(void)
{
    struct rusage ru;
    return getrusage(RUSAGE_SELF, &ru) == 0 ? ru.ru_maxrss : 0;
}

static void put_engine(struct sbuf *b, const struct served_model *m)
{
    struct engine_stats st = { 0 };
    struct kv_stats kv = { 0 };
    engine_stat(m->engine, &st);
    engine_kv_stat(m->engine, &kv);
    sbuf_str(b, "{\"name\":");
    sbuf_json_cstr(b, m->name);
    sbuf_fmt(b, ",\"running\":%u,\"waiting\":%u,\"parked\":%u,\"requests\":%llu,\"finished\":%llu,\"cancelled\":%llu,"
             "\"errors\":%llu,\"steps\":%llu,\"decode_rows\":%llu,\"prefill_tokens\":%llu,\"pages\":%llu,\"pages_free\":%llu,"
             "\"pages_cached\":%llu,\"slots\":%llu,\"slots_free\":%llu,\"dead\":%s}", st.running, st.waiting, st.parked,
             (unsigned long long)st.requests, (unsigned long long)st.finished, (unsigned long long)st.cancelled,
             (unsigned long long)st.errors, (unsigned long long)st.steps, (unsigned long long)st.decode_rows,
             (unsigned long long)st.prefill_tokens, (unsigned long long)kv.pages_total, (unsigned long long)kv.pages_free,
             (unsigned long long)kv.pages_cached, (unsigned long long)kv.slots_total, (unsigned long long)kv.slots_free,
             st.dead ? "true" : "false");
}

static int say_status(struct server *s, struct sbuf *out)
{
    size_t n;
    struct served_model *const *models = host_models(s->host, &n);
    sbuf_fmt(out, "{\"pid\":%ld,\"uptime_s\":%.1f,\"url\":\"%s\",\"peak_memory_bytes\":%lld,\"state\":\"%s\",\"generations\":",
             (long)getpid(), (double)(clock_mono_us() - s->start_us) / 1e6, http_server_url(s->http), (long long)peak_kb() * 1024,
             atomic_load(&s->want_drain) ? "draining" : "running");
    http_server_list(s->http, out);
    sbuf_str(out, ",\"models\":[");
    for (size_t i = 0; i < n; i++) {
        if (i > 0)
            sbuf_char(out, ',');
        put_engine(out, models[i]);
    }
    sbuf_str(out, "]}");
    return 0;
}

static int say_models(struct server *s, struct sbuf *out)
{
    size_t n;
    struct served_model *const *models = host_models(s->host, &n);
    sbuf_char(out, '[');
    for (size_t i = 0; i < n; i++) {
        const struct arle_model_desc *d = engine_model(models[i]->engine);
        sbuf_str(out, i ? ",{\"name\":" : "{\"name\":");
        sbuf_json_cstr(out, models[i]->name);
        sbuf_str(out, ",\"path\":");
        sbuf_json_cstr(out, models[i]->dir);
        sbuf_str(out, ",\"arch\":");
        sbuf_json_cstr(out, d->arch);
        sbuf_fmt(out, ",\"context\":%u,\"vocab\":%u,\"parameters\":%llu,\"weight_bytes\":%llu,\"drafter\":%s}", d->context, d->vocab,
                 (unsigned long long)d->n_params, (unsigned long long)d->weight_bytes, d->has_drafter ? "true" : "false");
    }
    sbuf_char(out, ']');
    return 0;
}

static int say_plugins(struct server *s, struct sbuf *out)
{
    static const char *const states[] = { "", "refused", "ready", "open" };
    struct registry *reg = host_registry(s->host);
    sbuf_char(out, '[');
    for (size_t i = 0; i < registry_count(reg); i++) {
        const struct plugin_info *p = registry_at(reg, i);
        sbuf_str(out, i ? ",{\"file\":" : "{\"file\":");
        sbuf_json_cstr(out, p->path);
        sbuf_fmt(out, ",\"state\":\"%s\",\"kind\":\"%s\",\"name\":", states[p->state & 3], plugin_kind_name(p->kind));
        sbuf_json_cstr(out, p->name);
        sbuf_str(out, ",\"version\":");
        sbuf_json_cstr(out, p->version);
        sbuf_str(out, ",\"detail\":");
        sbuf_json_cstr(out, p->state == PLUGIN_REFUSED ? p->reason : p->detail);
        sbuf_char(out, '}');
    }
    sbuf_char(out, ']');
    return 0;
}

static int say_config(struct server *s, struct sbuf *out, struct arle_err *err)
{
    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    if (f == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the configuration");
    pthread_mutex_lock(&s->cfg_mu);
    config_dump(*s->cfg, f, false);
    pthread_mutex_unlock(&s->cfg_mu);
    fclose(f);
    sbuf_str(out, "{\"config\":");
    sbuf_json_str(out, text, len);
    sbuf_char(out, '}');
    free(text);
    return 0;
}

static int drain_by_command(struct server *s, struct sbuf *out)
{
    atomic_store(&s->want_drain, true);
    pthread_kill(s->main, SIGTERM);
    sbuf_str(out, "{\"state\":\"draining\"}");
    return 0;
}

/* Does not change while the daemon runs; the strings of older configurations are kept. */
static const char *disk_dir(struct server *s)
{
    pthread_mutex_lock(&s->cfg_mu);
    const char *dir = config_str(*s->cfg, "kv", "disk_dir");
    pthread_mutex_unlock(&s->cfg_mu);
    return dir;
}

static int on_command(void *arg, const char *command, const char *argument, struct sbuf *out, struct arle_err *err)
{
    struct server *s = arg;
    if (strcmp(command, "status") == 0)
        return say_status(s, out);
    if (strcmp(command, "models") == 0)
        return say_models(s, out);
    if (strcmp(command, "plugins") == 0)
        return say_plugins(s, out);
    if (strcmp(command, "kv") == 0)
        return kv_command(s->host, disk_dir(s), argument, out, err);
    if (strcmp(command, "config") == 0)
        return say_config(s, out, err);
    if (strcmp(command, "drain") == 0)
        return drain_by_command(s, out);
    if (strcmp(command, "reload") == 0)
        return reload(s, out, err);
    if (strcmp(command, "cancel") == 0) {
        if (http_server_cancel(s->http, argument) < 0)
            return arle_err_set(err, -ENOENT, "no generation with the id \"%.60s\"", argument);
        sbuf_str(out, "{\"cancelled\":true}");
        return 0;
    }
    return arle_err_set(err, -EINVAL, "unknown command \"%.60s\"; there is status, models, plugins, kv, config, drain, reload, cancel",
                        command);
}

/* ---- from start to exit ---- */

static int start(struct server *s, struct arle_err *err)
{
    struct http_options ho;
    char *keys = NULL, path[PATH_MAX];
    size_t n;
    int r = host_http_options(*s->cfg, &ho, &keys, err);
    if (r == 0)
        r = host_open(&s->host, *s->cfg, true, err);
    if (r == 0) {
        struct served_model *const *models = host_models(s->host, &n);
        r = http_server_start(&s->http, &ho, models, n, err);
    }
    host_forget_keys(keys);
    if (r < 0)
        return r;
    snprintf(path, sizeof path, "%s", config_str(*s->cfg, "server", "control"));
    if (path[0] == '\0')
        ctl_default_path(path, sizeof path, false);
    return path[0] != '\0' ? ctl_start(&s->ctl, path, on_command, s, err) : 0;
}

static void announce(const struct server *s)
{
    log_info("daemon", "ready", "url=%s start_ms=%.1f peak_memory_mb=%.1f", http_server_url(s->http),
             (double)(clock_mono_us() - s->start_us) / 1000, (double)peak_kb() / 1024);
    if (s->o->banner)
        fprintf(stderr, "%s: serving on %s\n", s->o->program, http_server_url(s->http));
    notify_manager("READY=1");
}

/* Waits for a reason to end. Returns the exit status. */
static int watch(struct server *s, const sigset_t *set)
{
    struct timespec half = { .tv_nsec = 500000000 };
    char reason[300];
    for (;;) {
        int sig = sigtimedwait(set, NULL, &half);
        if (sig == SIGTERM || sig == SIGINT)
            return 0;
        if (sig == SIGHUP) {
            struct arle_err err = ARLE_ERR_INIT;
            if (reload(s, NULL, &err) < 0)
                log_error("daemon", "reload", "error=\"%s\"", err.msg);
        }
        if (host_dead(s->host, reason, sizeof reason)) {
            log_error("daemon", "device_dead", "reason=\"%s\"", reason);
            return 75;
        }
    }
}

static void drain(struct server *s, int64_t deadline_ms)
{
    int64_t from = clock_mono_ms();
    notify_manager("STOPPING=1");
    atomic_store(&s->want_drain, true);
    http_server_drain(s->http);
    int cut = host_drain(s->host, deadline_ms);
    log_info("daemon", "drained", "cut_off=%d ms=%lld", cut, (long long)(clock_mono_ms() - from));
}

int serve(struct config **cfg, const struct serve_opts *opts)
{
    struct server s = { .cfg = cfg, .o = opts, .main = pthread_self(), .start_us = clock_mono_us() };
    struct arle_err err = ARLE_ERR_INIT;
    sigset_t set, before;
    pthread_mutex_init(&s.cfg_mu, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &set, &before);      /* threads inherit it; only watch() takes signals */
    signal(SIGPIPE, SIG_IGN);
    int status = 1;
    if (start(&s, &err) < 0) {
        fprintf(stderr, "%s: %s\n", opts->program, err.msg);
        if (s.http != NULL)
            http_server_stop(s.http);
    } else {
        announce(&s);
        status = watch(&s, &set);
        drain(&s, status == 0 ? config_i64(*cfg, "server", "drain_deadline") : 0);
        ctl_stop(s.ctl);
        http_server_stop(s.http);
    }
    host_close(s.host);
    http_server_destroy(s.http);
    for (size_t i = 0; i < s.n_old; i++)
        config_close(s.old[i]);
    pthread_mutex_destroy(&s.cfg_mu);
    /* A second SIGTERM during the drain must not kill the process now that it is about to end by itself. */
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}
