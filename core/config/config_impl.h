/* Inside of struct config, for the reader and the printer. */
#ifndef CORE_CONFIG_IMPL_H
#define CORE_CONFIG_IMPL_H

#include "config/conf.h"

/* One line of a [plugin NAME] section, kept as text until the registry knows the plugin's keys. */
struct raw_value { char *key, *text; int line; };
struct raw_section { char *name; int line; struct raw_value *values; size_t n; };

struct config {
    char *path;
    struct arle_conf *fixed; size_t n_fixed;            /* rows of the table that are not named, in its order */
    struct arle_conf *models; size_t n_models;
    struct raw_section *plugins; size_t n_plugins;
};

/** Opens the section of a header line ("server", "model x", "plugin x"), making named ones. where: "arle.ini:3". */
int config_enter(struct config *cfg, const char *header, const char *where, int line, struct arle_err *err);
/** Stores one value; header must have been entered. line 0: from --set, replaces what is there. */
int config_put(struct config *cfg, const char *header, const char *key, const char *text, const char *where, int line,
               struct arle_err *err);
/** Feeds a file through inih. */
int config_read(struct config *cfg, FILE *file, const char *path, struct arle_err *err);

#endif
