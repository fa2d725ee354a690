/* Sections and values of an open configuration, and what --set means. Reading a file is read.c, printing is print.c. */
#include "config/config_impl.h"
#include "util/place.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define BUG(...) (fprintf(stderr, "arle: bug: " __VA_ARGS__), abort())

/* ---- sections ---- */

static const struct config_section *row_of(const char *name)
{
    size_t n;
    const struct config_section *t = config_table(&n);
    for (size_t i = 0; i < n; i++) {
        if (strcmp(t[i].name, name) == 0)
            return &t[i];
    }
    return NULL;
}

static struct arle_conf *find_section(const struct config *cfg, const char *header)
{
    for (size_t i = 0; i < cfg->n_fixed; i++) {
        if (strcmp(cfg->fixed[i].section, header) == 0)
            return &cfg->fixed[i];
    }
    for (size_t i = 0; i < cfg->n_models; i++) {
        if (strcmp(cfg->models[i].section, header) == 0)
            return &cfg->models[i];
    }
    return NULL;
}

static struct raw_section *find_plugin(const struct config *cfg, const char *name)
{
    for (size_t i = 0; i < cfg->n_plugins; i++) {
        if (strcmp(cfg->plugins[i].name, name) == 0)
            return &cfg->plugins[i];
    }
    return NULL;
}

static int no_memory(struct arle_err *err)
{
    return arle_err_set(err, -ENOMEM, "no memory for the configuration");
}

static int add_model(struct config *cfg, const char *header, struct arle_err *err)
{
    struct arle_conf *p = realloc(cfg->models, (cfg->n_models + 1) * sizeof *p);
    if (p == NULL)
        return no_memory(err);
    cfg->models = p;
    int r = conf_init(&p[cfg->n_models], header, row_of("model")->keys, err);
    if (r < 0)
        conf_fini(&p[cfg->n_models]);
    else
        cfg->n_models++;
    return r;
}

static int add_plugin(struct config *cfg, const char *name, int line, struct arle_err *err)
{
    struct raw_section *p = realloc(cfg->plugins, (cfg->n_plugins + 1) * sizeof *p);
    if (p == NULL)
        return no_memory(err);
    cfg->plugins = p;
    p[cfg->n_plugins] = (struct raw_section){ .name = strdup(name), .line = line };
    if (p[cfg->n_plugins].name == NULL)
        return no_memory(err);
    cfg->n_plugins++;
    return 0;
}

static const char *nearest_section(const char *word)
{
    size_t n;
    const struct config_section *t = config_table(&n);
    const char *words[16];
    for (size_t i = 0; i < n && i < 16; i++)
        words[i] = t[i].name;
    return nearest_word(word, words, n);
}

static int unknown_section(const char *header, const char *where, struct arle_err *err)
{
    char first[64];
    snprintf(first, sizeof first, "%.*s", (int)strcspn(header, " "), header);
    const char *near = nearest_section(first);
    return arle_err_param(err, -EINVAL, header, "%s: unknown section [%.48s]%s%s%s", where, header,
                          near != NULL ? "; did you mean [" : "", near != NULL ? near : "", near != NULL ? "]?" : "");
}

/* Names travel into file names, labels and messages. */
static bool is_name(const char *s)
{
    if (*s == '\0' || strlen(s) > 100)
        return false;
    for (; *s != '\0'; s++) {
        if (!isalnum((unsigned char)*s) && strchr("._-+:/@", *s) == NULL)
            return false;
    }
    return true;
}

int config_enter(struct config *cfg, const char *header, const char *where, int line, struct arle_err *err)
{
    char kind[16] = "";
    const char *space = strchr(header, ' ');
    const char *name = space != NULL ? space + strspn(space, " ") : "";
    snprintf(kind, sizeof kind, "%.*s", (int)strcspn(header, " "), header);
    const struct config_section *row = row_of(kind);
    if (row == NULL)
        return unknown_section(header, where, err);
    if (!row->named)
        return space == NULL ? 0 : arle_err_param(err, -EINVAL, header, "%s: section [%s] takes no name", where, kind);
    if (!is_name(name) || name != space + 1)
        return arle_err_param(err, -EINVAL, header, "%s: section [%s NAME] needs one name of letters, digits and . _ - + : / @",
                              where, kind);
    if (strcmp(kind, "model") == 0)
        return find_section(cfg, header) != NULL ? 0 : add_model(cfg, header, err);
    return find_plugin(cfg, name) != NULL ? 0 : add_plugin(cfg, name, line, err);
}

static int put_raw(struct raw_section *rs, const char *key, const char *text, const char *where, int line, struct arle_err *err)
{
    struct raw_value *v = NULL;
    if (key[0] == '\0' || key[strspn(key, "abcdefghijklmnopqrstuvwxyz0123456789_-")] != '\0')
        return arle_err_param(err, -EINVAL, key, "%s: \"%.48s\" is no key of a plugin; keys are of a-z, 0-9, _ and -", where, key);
    for (size_t i = 0; i < rs->n; i++) {
        if (strcmp(rs->values[i].key, key) == 0)
            v = &rs->values[i];
    }
    if (v != NULL && line > 0)
        return arle_err_param(err, -EINVAL, key, "%s: plugin %s.%s is set twice, first in line %d", where, rs->name, key, v->line);
    char *copy = strdup(text);
    if (copy == NULL)
        return no_memory(err);
    if (v != NULL) {
        free(v->text);
        v->text = copy;
        v->line = line;
        return 0;
    }
    struct raw_value *p = realloc(rs->values, (rs->n + 1) * sizeof *p);
    char *name = strdup(key);
    if (p != NULL)
        rs->values = p;
    if (p == NULL || name == NULL) {
        free(name);
        free(copy);
        return no_memory(err);
    }
    p[rs->n++] = (struct raw_value){ name, copy, line };
    return 0;
}

int config_put(struct config *cfg, const char *header, const char *key, const char *text, const char *where, int line,
               struct arle_err *err)
{
    if (strncmp(header, "plugin ", 7) == 0)
        return put_raw(find_plugin(cfg, header + 7), key, text, where, line, err);
    return conf_set(find_section(cfg, header), key, text, where, line, err);
}

/* ---- --set ---- */

/* Which section "model.KEY" means. */
static int only_model(const struct config *cfg, const char *set, char *header, size_t cap, struct arle_err *err)
{
    if (cfg->n_models != 1)
        return arle_err_param(err, -EINVAL, "model", "--set %.80s: there are %zu models; say which: model.NAME.KEY=VALUE", set,
                              cfg->n_models);
    snprintf(header, cap, "%s", cfg->models[0].section);
    return 0;
}

static int set_header(const struct config *cfg, const char *set, const char *dotted, char *header, size_t cap,
                      struct arle_err *err)
{
    const struct config_section *row = row_of(dotted);
    if (row != NULL && !row->named) {
        snprintf(header, cap, "%s", dotted);
        return 0;
    }
    if (strcmp(dotted, "model") == 0)
        return only_model(cfg, set, header, cap, err);
    if (strncmp(dotted, "model.", 6) == 0) {
        snprintf(header, cap, "model %s", dotted + 6);
        return 0;
    }
    const char *name = strncmp(dotted, "plugin.", 7) == 0 ? dotted + 7 : dotted;
    const char *near = nearest_section(dotted);
    if (name == dotted && (near != NULL || strchr(dotted, '-') == NULL))
        return unknown_section(dotted, "--set", err);
    snprintf(header, cap, "plugin %s", name);
    return 0;
}

static int apply_set(struct config *cfg, const char *set, struct arle_err *err)
{
    char dotted[160], header[176];
    const char *eq = strchr(set, '=');
    const char *dot = eq;
    while (dot != NULL && dot > set && *dot != '.')
        dot--;
    if (eq == NULL || dot == set || *dot != '.' || dot + 1 == eq || (size_t)(dot - set) >= sizeof dotted)
        return arle_err_param(err, -EINVAL, "--set", "--set %.120s: wants SECTION.KEY=VALUE, e.g. server.listen=127.0.0.1:8080", set);
    char key[64];
    snprintf(dotted, sizeof dotted, "%.*s", (int)(dot - set), set);
    snprintf(key, sizeof key, "%.*s", (int)(eq - dot - 1), dot + 1);
    int r = set_header(cfg, set, dotted, header, sizeof header, err);
    if (r == 0)
        r = config_enter(cfg, header, "--set", 0, err);
    if (r == 0)
        r = config_put(cfg, header, key, eq + 1, "--set", 0, err);
    return r;
}

/* ---- open ---- */

static int check_whole(const struct config *cfg, struct arle_err *err)
{
    int64_t page = config_i64(cfg, "kv", "page_tokens"), cadence = config_i64(cfg, "kv", "snapshot_cadence");
    if ((page & (page - 1)) != 0)
        return arle_err_param(err, -EINVAL, "kv.page_tokens", "kv.page_tokens: %lld is not a power of two", (long long)page);
    if (cadence % 64 != 0)
        return arle_err_param(err, -EINVAL, "kv.snapshot_cadence", "kv.snapshot_cadence: %lld is not a multiple of 64",
                              (long long)cadence);
    for (size_t i = 0; i < cfg->n_models; i++) {
        char param[64];
        snprintf(param, sizeof param, "%s.path", cfg->models[i].section);
        if (conf_str(&cfg->models[i], "path")[0] == '\0')
            return arle_err_param(err, -EINVAL, param, "[%s]: path is missing; it names the model's directory", cfg->models[i].section);
    }
    return 0;
}

static int make_fixed(struct config *cfg, struct arle_err *err)
{
    size_t n;
    const struct config_section *t = config_table(&n);
    cfg->fixed = calloc(n, sizeof *cfg->fixed);
    if (cfg->fixed == NULL)
        return no_memory(err);
    for (size_t i = 0; i < n; i++) {
        if (t[i].named)
            continue;
        int r = conf_init(&cfg->fixed[cfg->n_fixed++], t[i].name, t[i].keys, err);
        if (r < 0)
            return r;
    }
    return 0;
}

int config_open_file(struct config **out, FILE *file, const char *name, const char *const *sets, size_t n_sets,
                     struct arle_err *err)
{
    struct config *cfg = calloc(1, sizeof *cfg);
    if (cfg == NULL)
        return no_memory(err);
    int r = make_fixed(cfg, err);
    cfg->path = strdup(name);
    if (r == 0 && cfg->path == NULL)
        r = no_memory(err);
    if (r == 0 && file != NULL)
        r = config_read(cfg, file, name, err);
    for (size_t i = 0; r == 0 && i < n_sets; i++)
        r = apply_set(cfg, sets[i], err);
    if (r == 0 && !config_is_set(cfg, "plugins", "dir") && strcmp(place_plugins(), ARLE_PLUGIN_DIR) != 0)
        r = config_put(cfg, "plugins", "dir", place_plugins(), "the program's own folder", 0, err);
    if (r == 0)
        r = check_whole(cfg, err);
    if (r < 0) {
        config_close(cfg);
        return r;
    }
    *out = cfg;
    return 0;
}

int config_open(struct config **out, const char *path, const char *const *sets, size_t n_sets, struct arle_err *err)
{
    struct stat st;
    if (path == NULL)
        return config_open_file(out, NULL, "", sets, n_sets, err);
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return arle_err_set(err, -errno, "%s: %s", path, strerror(errno));
    int r = 0;
    if (fstat(fileno(f), &st) == 0 && S_ISDIR(st.st_mode))
        r = arle_err_set(err, -EISDIR, "%s: is a directory; name the file in it", path);
    else
        r = config_open_file(out, f, path, sets, n_sets, err);
    fclose(f);
    return r;
}

void config_close(struct config *cfg)
{
    if (cfg == NULL)
        return;
    for (size_t i = 0; i < cfg->n_fixed; i++)
        conf_fini(&cfg->fixed[i]);
    for (size_t i = 0; i < cfg->n_models; i++)
        conf_fini(&cfg->models[i]);
    for (size_t i = 0; i < cfg->n_plugins; i++) {
        struct raw_section *rs = &cfg->plugins[i];
        for (size_t k = 0; k < rs->n; k++) {
            free(rs->values[k].key);
            free(rs->values[k].text);
        }
        free(rs->values);
        free(rs->name);
    }
    free(cfg->fixed);
    free(cfg->models);
    free(cfg->plugins);
    free(cfg->path);
    free(cfg);
}

/* ---- values ---- */

const char *config_path(const struct config *cfg)
{
    return cfg->path;
}

static const struct arle_conf *must_find(const struct config *cfg, const char *section, const char *key)
{
    const struct arle_conf *conf = find_section(cfg, section);
    if (conf == NULL || conf_index(conf, key) < 0)
        BUG("no key %s.%s in the table of configuration keys\n", section, key);
    return conf;
}

const char *config_str(const struct config *cfg, const char *section, const char *key)
{
    return conf_str(must_find(cfg, section, key), key);
}

int64_t config_i64(const struct config *cfg, const char *section, const char *key)
{
    return conf_i64(must_find(cfg, section, key), key);
}

double config_f64(const struct config *cfg, const char *section, const char *key)
{
    return conf_f64(must_find(cfg, section, key), key);
}

bool config_bool(const struct config *cfg, const char *section, const char *key)
{
    return conf_i64(must_find(cfg, section, key), key) != 0;
}

bool config_is_set(const struct config *cfg, const char *section, const char *key)
{
    const struct arle_conf *conf = must_find(cfg, section, key);
    return conf->values[conf_index(conf, key)].set;
}

size_t config_n_models(const struct config *cfg)
{
    return cfg->n_models;
}

const char *config_model_name(const struct config *cfg, size_t i)
{
    return cfg->models[i].section + strlen("model ");
}

const char *config_model_section(const struct config *cfg, size_t i)
{
    return cfg->models[i].section;
}

const char *config_compute(const struct config *cfg, size_t model, const char *backend)
{
    char name[128];
    const char *own = conf_str(&cfg->models[model], "compute");
    if (strcmp(own, "auto") != 0)
        return own;
    snprintf(name, sizeof name, "%s%s", strncmp(backend, "backend-", 8) == 0 ? "" : "backend-", backend);
    const char *text = config_plugin_text(cfg, name, "compute");
    return text != NULL ? text : own;
}

/* ---- plugins ---- */

size_t config_n_plugin_sections(const struct config *cfg)
{
    return cfg->n_plugins;
}

const char *config_plugin_section(const struct config *cfg, size_t i)
{
    return cfg->plugins[i].name;
}

const char *config_plugin_origin(const struct config *cfg, size_t i)
{
    static _Thread_local char where[160];
    if (cfg->plugins[i].line == 0)
        return "--set";
    snprintf(where, sizeof where, "%s:%d", cfg->path, cfg->plugins[i].line);
    return where;
}

const char *config_plugin_text(const struct config *cfg, const char *name, const char *key)
{
    const struct raw_section *rs = find_plugin(cfg, name);
    for (size_t i = 0; rs != NULL && i < rs->n; i++) {
        if (strcmp(rs->values[i].key, key) == 0)
            return rs->values[i].text;
    }
    return NULL;
}

/* Keeps a copy of s with the section. NULL when there is no memory; "" for NULL. */
static const char *keep(struct arle_conf *conf, const char *s)
{
    char **p = realloc(conf->arena, (conf->n_arena + 1) * sizeof *p);
    if (p == NULL)
        return NULL;
    conf->arena = p;
    p[conf->n_arena] = strdup(s != NULL ? s : "");
    return p[conf->n_arena] != NULL ? p[conf->n_arena++] : NULL;
}

static bool has_key(const struct arle_conf_key *keys, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(keys[i].name, name) == 0)
            return true;
    }
    return false;
}

/* The plugin's rows, then those of the host that it does not declare itself. */
static struct arle_conf_key *join_keys(uint32_t kind, const struct arle_conf_key *keys)
{
    const struct arle_conf_key *host = config_plugin_keys(kind);
    size_t n = 0, h = 0;
    while (keys != NULL && keys[n].name != NULL)
        n++;
    while (host[h].name != NULL)
        h++;
    struct arle_conf_key *all = calloc(n + h + 1, sizeof *all);
    if (all == NULL)
        return NULL;
    if (n > 0)
        memcpy(all, keys, n * sizeof *all);
    for (size_t i = 0, m = n; i < h; i++) {
        if (!has_key(all, n, host[i].name))
            all[m++] = host[i];
    }
    return all;
}

static int own_strings(struct arle_conf *scratch, struct arle_conf_key *keys, struct arle_err *err)
{
    for (struct arle_conf_key *k = keys; k->name != NULL; k++) {
        k->name = keep(scratch, k->name);
        k->def = keep(scratch, k->def);
        k->choices = keep(scratch, k->choices);
        k->unit = keep(scratch, k->unit);
        k->help = keep(scratch, k->help);
        if (k->name == NULL || k->def == NULL || k->choices == NULL || k->unit == NULL || k->help == NULL)
            return no_memory(err);
    }
    return 0;
}

int config_plugin(const struct config *cfg, const char *name, uint32_t kind, const struct arle_conf_key *keys,
                  struct arle_conf **out_conf, struct arle_err *err)
{
    char header[176], where[160];
    struct arle_conf strings = { 0 };
    struct arle_conf *conf = calloc(1, sizeof *conf);
    struct arle_conf_key *all = join_keys(kind, keys);
    if (conf == NULL || all == NULL) {
        free(conf);
        free(all);
        return no_memory(err);
    }
    snprintf(header, sizeof header, "plugin %s", name);
    int r = own_strings(&strings, all, err);
    if (r == 0)
        r = conf_init(conf, header, all, err);
    conf->own_keys = all;
    conf->arena = strings.arena;
    conf->n_arena = strings.n_arena;

    const struct raw_section *rs = cfg != NULL ? find_plugin(cfg, name) : NULL;
    for (size_t i = 0; r == 0 && rs != NULL && i < rs->n; i++) {
        const struct raw_value *v = &rs->values[i];
        if (v->line > 0)
            snprintf(where, sizeof where, "%s:%d", cfg->path, v->line);
        else
            snprintf(where, sizeof where, "--set");
        r = conf_set(conf, v->key, v->text, where, 0, err);
    }
    if (r < 0) {
        conf_close(conf);
        return r;
    }
    *out_conf = conf;
    return 0;
}
