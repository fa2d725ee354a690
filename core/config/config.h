/*
 * The configuration: one table of keys (keys.c) that feeds the reader, --help, arle.ini(5), completion and `config dump`.
 * A file is read with inih; `--set SECTION.KEY=VALUE` comes on top of it. Everything is checked when it is opened, with
 * file, line, field and the nearest known name; only [plugin NAME] sections wait for the registry, which knows their keys.
 *
 * A section is named as in the file: "server", "model small", "plugin backend-cpu".
 * Thread: an open configuration is constant and may be read by any thread. Strings live as long as it does.
 */
#ifndef CORE_CONFIG_CONFIG_H
#define CORE_CONFIG_CONFIG_H

#include <arle/plugin.h>
#include <stdbool.h>
#include <stdio.h>

struct config;

/* ---- the table ---- */
struct config_section {
    const char *name;                       /* "server"; "model" and "plugin" are written with a name behind it */
    bool named;
    const char *help;
    const struct arle_conf_key *keys;       /* ends with name == NULL */
};
const struct config_section *config_table(size_t *n);
/** Keys that the host adds to every plugin (required) and to every backend (compute). */
const struct arle_conf_key *config_plugin_keys(uint32_t kind);

/* ---- opening ---- */
/**
 * Reads `path` (NULL: defaults only), then applies sets in order, each "SECTION.KEY=VALUE":
 *   server.listen=..., model.NAME.KEY=... (NAME may hold dots; makes the model if it is new), model.KEY=... (the only model),
 *   backend-cpu.KEY=... or plugin.backend-cpu.KEY=...
 * -ENOENT, -EACCES: file; -EINVAL: anything wrong in it. err->param is "section.key" where there is one.
 */
int config_open(struct config **out, const char *path, const char *const *sets, size_t n_sets, struct arle_err *err);
/** As config_open, from an open file; name stands in messages and is not opened. NULL file: defaults only. */
int config_open_file(struct config **out, FILE *file, const char *name, const char *const *sets, size_t n_sets,
                     struct arle_err *err);
void config_close(struct config *cfg);      /* takes NULL */
const char *config_path(const struct config *cfg);      /* "" when there is none */

/* ---- values. Asking for a section or key that is not in the table is a bug and aborts; a model that is not there too. ---- */
const char *config_str(const struct config *cfg, const char *section, const char *key);
int64_t config_i64(const struct config *cfg, const char *section, const char *key);     /* I64, BYTES, DURATION (ms) */
double config_f64(const struct config *cfg, const char *section, const char *key);
bool config_bool(const struct config *cfg, const char *section, const char *key);
bool config_is_set(const struct config *cfg, const char *section, const char *key);     /* by file or --set */

size_t config_n_models(const struct config *cfg);
const char *config_model_name(const struct config *cfg, size_t i);          /* NAME of [model NAME], in order of appearance */
/** The section of that model: config_str(cfg, config_model_section(cfg, 0), "path"). */
const char *config_model_section(const struct config *cfg, size_t i);
/** "f32", "bf16" or "auto": the model's own `compute`, else that of its backend's section. backend: "cpu" or "backend-cpu". */
const char *config_compute(const struct config *cfg, size_t model, const char *backend);

/* ---- sections of plugins ---- */
struct arle_conf;
/**
 * Checks [plugin NAME] against the plugin's keys and the host's own for that kind. out_conf belongs to the caller.
 * keys are copied. -EINVAL names file, line, key and the nearest known one.
 */
int config_plugin(const struct config *cfg, const char *name, uint32_t kind, const struct arle_conf_key *keys,
                  struct arle_conf **out_conf, struct arle_err *err);
void conf_close(struct arle_conf *conf);    /* takes NULL */
const char *conf_str(const struct arle_conf *conf, const char *key);
int64_t conf_i64(const struct arle_conf *conf, const char *key);
double conf_f64(const struct arle_conf *conf, const char *key);
size_t config_n_plugin_sections(const struct config *cfg);
const char *config_plugin_section(const struct config *cfg, size_t i);      /* NAME */
/** Where [plugin NAME] came from, for messages: "arle.ini:12" or "--set". */
const char *config_plugin_origin(const struct config *cfg, size_t i);
/** The value as text of a key of [plugin NAME], before the plugin's table is known; NULL when it was not set. */
const char *config_plugin_text(const struct config *cfg, const char *name, const char *key);

/* ---- printing and comparing ---- */
/** The effective configuration as a file that can be read again; secrets are left out, and values that a file cannot hold
 *  (--set allows any) stand in comments. with_help adds help as comments. */
void config_dump(const struct config *cfg, FILE *out, bool with_help);
/** Type, range and unit of a key for people: "bytes, 1KiB to 1GiB". Writes at most cap bytes. */
const char *config_key_type(const struct arle_conf_key *key, char *buf, size_t cap);
/** Calls fn for every key whose value differs; flags are those of the key (ARLE_CONF_RELOAD: may change live). */
typedef void (*config_diff_fn)(void *arg, const char *section, const struct arle_conf_key *key, const char *was, const char *is);
void config_diff(const struct config *was, const struct config *is, config_diff_fn fn, void *arg);

/** Known word nearest to `word`, or NULL when none is near. For "did you mean". */
const char *nearest_word(const char *word, const char *const *words, size_t n);

#endif
