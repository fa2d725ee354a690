/*
 * The conformance kit: contract tests of one plugin file, as TAP lines for people and machines. Our own plugins are held to
 * it like everybody else's. The tests of a loaded plugin run in a child process: a crash is a failed line.
 */
#ifndef CORE_PLUGIN_CONFORM_H
#define CORE_PLUGIN_CONFORM_H

#include "plugin/registry.h"

#include <stdio.h>

struct conform {
    FILE *out;
    int n, failed, skipped;
    const struct config *cfg;
    struct registry *reg;           /* where other plugins are found, e.g. a reference backend */
    const struct plugin_info *self; /* opened */
    const char *model_dir;          /* a checkpoint for a model plugin, or NULL */
};

/** One line. why: "" or the reason of a failure. Returns ok. */
bool conform_case(struct conform *c, bool ok, const char *name, const char *why);
void conform_skip(struct conform *c, const char *name, const char *why);

/** Runs everything on the file; model_dir: a checkpoint that a model plugin must know, or NULL. Returns the number of failed
 *  cases. */
int conform_file(const char *path, const struct config *cfg, const char *model_dir, FILE *out);

/* By kind; self is open. */
void conform_backend(struct conform *c);
void conform_ops(struct conform *c, struct arle_device *dev);       /* every op against the reference backend */
void conform_model(struct conform *c);
void conform_checkpoint(struct conform *c, const char *dir);
void conform_tool(struct conform *c);
void conform_store(struct conform *c);

#endif
