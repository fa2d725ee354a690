/* The list of plugins: scanning directories, what the configuration demands of them, and opening them when asked for. */
#include "plugin/registry.h"
#include "plugin/judge.h"
#include "util/log.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

struct registry {
    const struct config *cfg;
    struct plugin **list; size_t n;
    struct plugin **opened; size_t n_opened;    /* in order of opening; room for n */
};

/* ---- one plugin ---- */

const char *plugin_keep(struct plugin *p, const char *s)
{
    char **t = realloc(p->text, (p->n_text + 1) * sizeof *t);
    if (t == NULL)
        return "";
    p->text = t;
    t[p->n_text] = strdup(s);
    return t[p->n_text] != NULL ? t[p->n_text++] : "";
}

struct plugin *plugin_new(const char *path, struct arle_err *err)
{
    struct plugin *p = calloc(1, sizeof *p);
    if (p == NULL) {
        arle_err_set(err, -ENOMEM, "no memory for plugin %s", path);
        return NULL;
    }
    p->info.path = plugin_keep(p, path);
    p->info.reason = p->info.name = p->info.version = p->info.license = p->info.summary = p->info.detail = "";
    return p;
}

void plugin_free(struct plugin *p)
{
    if (p == NULL)
        return;
    for (size_t i = 0; i < p->n_text; i++)
        free(p->text[i]);
    free(p->text);
    free(p->own_keys);
    conf_close(p->conf);
    free(p);
}

void plugin_refuse(struct plugin *p, const char *fmt, ...)
{
    char why[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof why, fmt, ap);
    va_end(ap);
    p->info.reason = plugin_keep(p, why);
    p->info.state = PLUGIN_REFUSED;
}

/* ---- scanning ---- */

static int add(struct registry *reg, const char *path, struct plugin **out, struct arle_err *err)
{
    struct plugin **l = realloc(reg->list, (reg->n + 1) * sizeof *l);
    if (l != NULL)
        reg->list = l;
    struct plugin *p = l != NULL ? plugin_new(path, err) : NULL;
    if (p == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the list of plugins");
    p->cfg = reg->cfg;
    reg->list[reg->n++] = p;
    *out = p;
    return 0;
}

static int is_plugin_file(const struct dirent *e)
{
    size_t n = strlen(e->d_name);
    return e->d_name[0] != '.' && n > 3 && strcmp(e->d_name + n - 3, ".so") == 0;
}

static void check_file(struct plugin *p)
{
    struct arle_err err = ARLE_ERR_INIT;
    if (stat(p->info.path, &p->st) < 0)
        plugin_refuse(p, "%s: %s; remove it or repair the link", p->info.path, strerror(errno));
    else if (!S_ISREG(p->st.st_mode))
        plugin_refuse(p, "%s: is no regular file; remove it", p->info.path);
    else if (check_trusted(p->info.path, &p->st, &err) < 0)
        plugin_refuse(p, "%s", err.msg);
}

static int scan_dir(struct registry *reg, const char *dir, struct arle_err *err)
{
    struct stat st;
    struct plugin *p;
    struct arle_err why = ARLE_ERR_INIT;
    if (stat(dir, &st) < 0) {
        if (errno == ENOENT)
            return 0;
        arle_err_set(&why, -errno, "%s: %s; correct plugins.dir", dir, strerror(errno));
    } else if (!S_ISDIR(st.st_mode)) {
        arle_err_set(&why, -ENOTDIR, "%s: is no directory; correct plugins.dir", dir);
    } else {
        check_trusted(dir, &st, &why);
    }
    if (why.code < 0) {     /* one line for the directory; none of its files is looked at */
        int r = add(reg, dir, &p, err);
        if (r == 0)
            plugin_refuse(p, "%s", why.msg);
        return r;
    }
    struct dirent **names = NULL;
    int n = scandir(dir, &names, is_plugin_file, alphasort), r = 0;
    for (int i = 0; i < n; i++) {
        char path[4096];
        if (r == 0 && (size_t)snprintf(path, sizeof path, "%s/%s", dir, names[i]->d_name) < sizeof path) {
            r = add(reg, path, &p, err);
            if (r == 0)
                check_file(p);
        }
        free(names[i]);
    }
    free(names);
    return r;
}

static int scan(struct registry *reg, const char *dirs, struct arle_err *err)
{
    char *copy = strdup(dirs), *rest = copy;
    int r = copy == NULL ? arle_err_set(err, -ENOMEM, "no memory for plugins.dir") : 0;
    for (char *dir; r == 0 && (dir = strsep(&rest, ":")) != NULL;) {
        if (dir[0] != '\0')
            r = scan_dir(reg, dir, err);
    }
    free(copy);
    return r;
}

static void refuse_doubles(struct registry *reg)
{
    for (size_t i = 0; i < reg->n; i++) {
        struct plugin *p = reg->list[i];
        for (size_t k = 0; p->info.state == PLUGIN_READY && k < i; k++) {
            const struct plugin_info *first = &reg->list[k]->info;
            if (first->state == PLUGIN_READY && strcmp(first->name, p->info.name) == 0)
                plugin_refuse(p, "%s: is called %s like %s, which is used; remove one of the two", p->info.path, p->info.name, first->path);
        }
    }
}

/* ---- what the configuration says ---- */

static bool is_name_of(const struct plugin_info *info, const char *name)
{
    if (info->name[0] != '\0')
        return strcmp(info->name, name) == 0;
    /* Refused before its name was known: the file's name has to do ("backend_cpu.so", "backend-cpu.so"). */
    const char *base = strrchr(info->path, '/');
    base = base != NULL ? base + 1 : info->path;
    size_t n = strlen(name), i = 0;
    while (i < n && (base[i] == name[i] || (base[i] == '_' && name[i] == '-')))
        i++;
    return i == n && strcmp(base + n, ".so") == 0;
}

static struct plugin *by_name(const struct registry *reg, const char *name)
{
    struct plugin *refused = NULL;
    for (size_t i = 0; i < reg->n; i++) {
        struct plugin *p = reg->list[i];
        if (!is_name_of(&p->info, name))
            continue;
        if (p->info.state != PLUGIN_REFUSED)
            return p;
        refused = p;
    }
    return refused;
}

static const char *nearest_plugin(const struct registry *reg, const char *name)
{
    const char *words[256];
    size_t n = 0;
    for (size_t i = 0; i < reg->n && n < 256; i++) {
        if (reg->list[i]->info.name[0] != '\0')
            words[n++] = reg->list[i]->info.name;
    }
    return nearest_word(name, words, n);
}

static int missing(const struct registry *reg, const char *who, const char *name, struct arle_err *err)
{
    const char *near = nearest_plugin(reg, name);
    return arle_err_param(err, -ENOENT, name, "%s: there is no plugin %s in %.200s; install it, or correct the name%s%s%s", who, name,
                          config_str(reg->cfg, "plugins", "dir"), near != NULL ? " (did you mean " : "", near != NULL ? near : "",
                          near != NULL ? "?)" : "");
}

static int demand(const struct registry *reg, const char *who, const char *name, struct arle_err *err)
{
    const struct plugin *p = by_name(reg, name);
    if (p == NULL)
        return missing(reg, who, name, err);
    if (p->info.state == PLUGIN_REFUSED)
        return arle_err_param(err, -ENOEXEC, name, "%s needs plugin %s, which was refused: %s", who, name, p->info.reason);
    return 0;
}

static bool is_yes(const char *text)
{
    return text != NULL && (strcasecmp(text, "yes") == 0 || strcasecmp(text, "true") == 0 || strcasecmp(text, "on") == 0
                            || strcmp(text, "1") == 0);
}

static void full_name(const char *prefix, const char *name, char *out, size_t cap)
{
    size_t n = strlen(prefix);
    bool has = strncmp(name, prefix, n) == 0 && name[n] == '-';
    snprintf(out, cap, "%s%s%s", has ? "" : prefix, has ? "" : "-", name);
}

static int check_sections(const struct registry *reg, struct arle_err *err)
{
    for (size_t i = 0; i < config_n_plugin_sections(reg->cfg); i++) {
        const char *name = config_plugin_section(reg->cfg, i);
        char who[256];
        snprintf(who, sizeof who, "%.160s [plugin %.60s]", config_plugin_origin(reg->cfg, i), name);
        int r = is_yes(config_plugin_text(reg->cfg, name, "required")) ? demand(reg, who, name, err)
                : by_name(reg, name) == NULL                           ? missing(reg, who, name, err)
                                                                       : 0;
        if (r < 0)
            return r;
    }
    for (size_t i = 0; i < config_n_models(reg->cfg); i++) {
        const char *section = config_model_section(reg->cfg, i), *backend = config_str(reg->cfg, section, "backend");
        char name[128], who[160];
        full_name("backend", backend, name, sizeof name);
        snprintf(who, sizeof who, "[%s] backend = %.40s", section, backend);
        int r = strcmp(backend, "auto") != 0 && config_bool(reg->cfg, section, "required") ? demand(reg, who, name, err) : 0;
        if (r < 0)
            return r;
    }
    return 0;
}

/* Checks every ready plugin's section; a wrong value is an error of the configuration, not of the plugin. */
static int read_sections(struct registry *reg, uint32_t flags, struct arle_err *err)
{
    for (size_t i = 0; i < reg->n; i++) {
        struct plugin *p = reg->list[i];
        struct arle_err why = ARLE_ERR_INIT;
        if (p->info.state != PLUGIN_READY)
            continue;
        int r = config_plugin(NULL, p->info.name, p->info.kind, p->own_keys, &p->conf, &why);
        if (r < 0) {        /* without any section: its own table is wrong */
            plugin_refuse(p, "%s: %s; repair the plugin's key table", p->info.path, why.msg);
            continue;
        }
        conf_close(p->conf);
        p->conf = NULL;
        r = config_plugin(reg->cfg, p->info.name, p->info.kind, p->own_keys, &p->conf, &why);
        if (r < 0 && (flags & REGISTRY_LENIENT) == 0) {
            *err = why;
            return r;
        }
        if (r < 0)
            plugin_refuse(p, "%s: %s", p->info.path, why.msg);
    }
    return 0;
}

static void log_refusals(const struct registry *reg)
{
    for (size_t i = 0; i < reg->n; i++) {
        const struct plugin_info *info = &reg->list[i]->info;
        if (info->state == PLUGIN_REFUSED)
            log_info("plugin", "refused", "reason=\"%s\"", info->reason);
        else
            log_debug("plugin", "ready", "name=%s version=%s detail=\"%s\" judged=%.1fms", info->name, info->version, info->detail,
                      (double)info->judge_us / 1000);
    }
}

int registry_open(struct registry **out, const struct config *cfg, uint32_t flags, struct arle_err *err)
{
    struct registry *reg = calloc(1, sizeof *reg);
    if (reg == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the list of plugins");
    reg->cfg = cfg;
    int r = scan(reg, config_str(cfg, "plugins", "dir"), err);
    if (r == 0) {
        reg->opened = calloc(reg->n + 1, sizeof *reg->opened);
        r = reg->opened == NULL ? arle_err_set(err, -ENOMEM, "no memory for the list of plugins") : 0;
    }
    if (r == 0) {
        judge_all(reg->list, reg->n, config_i64(cfg, "plugins", "probe_timeout"));
        refuse_doubles(reg);
        r = read_sections(reg, flags, err);
    }
    if (r == 0 && (flags & REGISTRY_LENIENT) == 0) {
        log_refusals(reg);
        r = check_sections(reg, err);
    }
    if (r < 0) {
        registry_close(reg);
        return r;
    }
    *out = reg;
    return 0;
}

void registry_close(struct registry *reg)
{
    if (reg == NULL)
        return;
    while (reg->n_opened > 0) {
        struct plugin *p = reg->opened[--reg->n_opened];
        if (p->desc->close != NULL)
            p->desc->close(p->info.ctx);
    }
    for (size_t i = 0; i < reg->n; i++)
        plugin_free(reg->list[i]);
    free(reg->list);
    free(reg->opened);
    free(reg);
}

size_t registry_count(const struct registry *reg)
{
    return reg->n;
}

const struct plugin_info *registry_at(const struct registry *reg, size_t i)
{
    return &reg->list[i]->info;
}

/* ---- opening ---- */

static bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_ino == b->st_ino && a->st_dev == b->st_dev && a->st_size == b->st_size && a->st_mtim.tv_sec == b->st_mtim.tv_sec
        && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

/* Loads a judged plugin into this process and opens it; on failure it is refused from now on. */
static int open_plugin(struct registry *reg, struct plugin *p, struct arle_err *err)
{
    struct stat st;
    struct arle_err why = ARLE_ERR_INIT;
    void *ctx = NULL;
    if (stat(p->info.path, &st) < 0 || !same_file(&st, &p->st)) {
        plugin_refuse(p, "%s: was replaced after it was judged; start again", p->info.path);
        return arle_err_set(err, -ENOEXEC, "%s", p->info.reason);
    }
    int r = load_descriptor(p->info.path, &p->desc, &why);
    if (r < 0) {
        plugin_refuse(p, "%s", why.msg);
        return arle_err_set(err, r, "%.500s", p->info.reason);
    }
    r = p->desc->open(plugin_host(), p->conf, &ctx, &why);
    if (r < 0) {
        why.msg[sizeof why.msg - 1] = '\0';
        plugin_refuse(p, "%s: open failed: %s", p->info.path, why.msg[0] != '\0' ? why.msg : strerror(-r));
        return arle_err_param(err, r, p->info.name, "%.500s", p->info.reason);
    }
    p->info.ops = p->desc->ops;
    p->info.ctx = ctx;
    p->info.state = PLUGIN_OPEN;
    reg->opened[reg->n_opened++] = p;
    log_debug("plugin", "opened", "name=%s version=%s", p->info.name, p->info.version);
    return 0;
}

static int not_there(const struct registry *reg, uint32_t kind, const char *name, struct arle_err *err)
{
    char have[256] = "";
    for (size_t i = 0; i < reg->n; i++) {
        const struct plugin_info *info = &reg->list[i]->info;
        if (info->kind == kind && info->state != PLUGIN_REFUSED)
            snprintf(have + strlen(have), sizeof have - strlen(have), "%s%s", have[0] != '\0' ? ", " : "", info->name);
    }
    return arle_err_param(err, -ENOENT, name, "there is no %s plugin %s in %.160s; there is %s", plugin_kind_name(kind), name,
                          config_str(reg->cfg, "plugins", "dir"), have[0] != '\0' ? have : "none");
}

int registry_find(struct registry *reg, uint32_t kind, const char *name, const struct plugin_info **out, struct arle_err *err)
{
    char full[128];
    full_name(kind == ARLE_KIND_KV_STORE ? "kv" : plugin_kind_name(kind), name, full, sizeof full);
    struct plugin *p = by_name(reg, name);
    if (p == NULL)
        p = by_name(reg, full);
    if (p == NULL || (p->info.kind != 0 && p->info.kind != kind))
        return not_there(reg, kind, name, err);
    int r = 0;
    if (p->info.state == PLUGIN_REFUSED)
        return arle_err_param(err, -ENOEXEC, name, "%.500s", p->info.reason);
    if (p->info.state == PLUGIN_READY)
        r = open_plugin(reg, p, err);
    if (r == 0)
        *out = &p->info;
    return r;
}

size_t registry_load_all(struct registry *reg, uint32_t kind)
{
    size_t n = 0;
    for (size_t i = 0; i < reg->n; i++) {
        struct plugin *p = reg->list[i];
        if (kind != 0 && p->info.kind != kind)
            continue;
        if (p->info.state == PLUGIN_READY)
            open_plugin(reg, p, NULL);
        n += p->info.state == PLUGIN_OPEN;
    }
    return n;
}

const struct plugin_info *registry_opened(const struct registry *reg, uint32_t kind, size_t i)
{
    for (size_t k = 0; k < reg->n_opened; k++) {
        if (reg->opened[k]->info.kind == kind && i-- == 0)
            return &reg->opened[k]->info;
    }
    return NULL;
}

/* ---- choosing ---- */

static bool works(const struct plugin_info *info)
{
    const struct arle_backend_api *api = info->ops;
    return api->n_devices(info->ctx) > 0;
}

int registry_backend(struct registry *reg, const char *wanted, const struct plugin_info **out, struct arle_err *err)
{
    if (strcmp(wanted, "auto") != 0)
        return registry_find(reg, ARLE_KIND_BACKEND, wanted, out, err);
    for (int accelerator = 1; accelerator >= 0; accelerator--) {
        for (size_t i = 0; i < reg->n; i++) {
            struct plugin *p = reg->list[i];
            if (p->info.kind != ARLE_KIND_BACKEND || p->info.state == PLUGIN_REFUSED
                || ((p->info.caps & ARLE_CAP_ACCELERATOR) != 0) != (accelerator == 1))
                continue;
            if ((p->info.state == PLUGIN_OPEN || open_plugin(reg, p, NULL) == 0) && works(&p->info)) {
                *out = &p->info;
                return 0;
            }
        }
    }
    for (size_t i = 0; i < reg->n; i++) {
        if (reg->list[i]->info.state == PLUGIN_REFUSED && reg->list[i]->info.reason[0] != '\0')
            return arle_err_set(err, -ENOENT, "no backend works here; the first that was refused: %.400s", reg->list[i]->info.reason);
    }
    return not_there(reg, ARLE_KIND_BACKEND, "of any name", err);
}

int registry_model(struct registry *reg, const char *config_json, size_t len, const struct plugin_info **out, struct arle_err *err)
{
    char asked[256] = "";
    registry_load_all(reg, ARLE_KIND_MODEL);
    for (size_t i = 0; i < reg->n; i++) {
        const struct plugin_info *info = &reg->list[i]->info;
        if (info->kind != ARLE_KIND_MODEL || info->state != PLUGIN_OPEN)
            continue;
        const struct arle_model_api *api = info->ops;
        int r = api->recognise(info->ctx, config_json, len, err);
        if (r == 1) {
            *out = info;
            return 0;
        }
        if (r < 0)
            return r;
        snprintf(asked + strlen(asked), sizeof asked - strlen(asked), "%s%s", asked[0] != '\0' ? ", " : "", info->name);
    }
    return arle_err_param(err, -ENOENT, "config.json", "no plugin knows the architecture of this config.json; asked: %s",
                          asked[0] != '\0' ? asked : "none, since there is no model plugin");
}

/* ---- one file ---- */

int plugin_judge_file(const char *path, int64_t timeout_ms, struct plugin **out, struct arle_err *err)
{
    struct plugin *p = plugin_new(path, err);
    if (p == NULL)
        return -ENOMEM;
    check_file(p);
    judge_all(&p, 1, timeout_ms);
    *out = p;
    return 0;
}
