/* One section's values, checked against a table of keys. Shared by the core's sections and those of plugins. */
#ifndef CORE_CONFIG_CONF_H
#define CORE_CONFIG_CONF_H

#include "config/config.h"

struct conf_value {
    char *text;                 /* as it stands in the file; owned */
    int64_t i64;
    double f64;
    bool set;                   /* by file or --set, not the default */
    int line;                   /* of the file, 0 for --set and defaults */
};

struct arle_conf {
    char *section;              /* "server", "model tiny", "plugin backend-cpu" */
    const struct arle_conf_key *keys;       /* borrowed, or own_keys */
    struct arle_conf_key *own_keys;         /* with strings in `arena`; NULL for static tables */
    char **arena; size_t n_arena;
    size_t n;
    struct conf_value *values;  /* one per key */
};

/** With all defaults in place. keys stay borrowed. */
int conf_init(struct arle_conf *conf, const char *section, const struct arle_conf_key *keys, struct arle_err *err);
void conf_fini(struct arle_conf *conf);
/** -1 when there is no such key. */
int conf_index(const struct arle_conf *conf, const char *key);
/** Checks and stores; `where` ("arle.ini:12") begins the message. line is remembered (0 for --set). */
int conf_set(struct arle_conf *conf, const char *key, const char *text, const char *where, int line, struct arle_err *err);
/** Checks text against the key. out is filled but for text, set and line. why: at least 160 bytes. */
int conf_parse(const struct arle_conf_key *key, const char *text, struct conf_value *out, char *why, size_t cap);

#endif
