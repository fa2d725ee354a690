/*
 * The judging of one candidate: in a child process, since loading runs constructors already. The child reports a verdict
 * through a pipe; a child that dies or hangs is a verdict too.
 */
#ifndef CORE_PLUGIN_JUDGE_H
#define CORE_PLUGIN_JUDGE_H

#include "plugin/registry.h"

#include <sys/stat.h>

/* A candidate; the registry's list is made of these. Strings of info point into text. */
struct plugin {
    struct plugin_info info;
    char **text; size_t n_text;             /* strings that info and own_keys point to */
    struct arle_conf_key *own_keys;         /* as the plugin declares them, copied */
    struct arle_conf *conf;                 /* checked section; NULL unless ready */
    struct stat st;                         /* of the file that was judged */
    const struct arle_plugin *desc;         /* in the loaded file; NULL until loaded */
    const struct config *cfg;
};

struct plugin *plugin_new(const char *path, struct arle_err *err);
void plugin_free(struct plugin *p);         /* takes NULL; does not close */
/** Makes it a refused one. The text is "FILE: reason; cure". */
void plugin_refuse(struct plugin *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/** Keeps a copy of s with the plugin; "" when there is no memory. */
const char *plugin_keep(struct plugin *p, const char *s);

/** Owner and mode of a file or directory. -EPERM with a reason and the cure. */
int check_trusted(const char *path, const struct stat *st, struct arle_err *err);
/** Reads a descriptor field by field. sym_bytes: size of the symbol in the file, 0 unknown. -ENOEXEC with the reason. */
int check_descriptor(const struct arle_plugin *d, size_t sym_bytes, struct arle_err *err);
/** Entries that the kind cannot do without. -ENOEXEC names the first that is missing. */
int check_table(const struct arle_plugin *d, struct arle_err *err);
/** dlopen and descriptor, no call into the plugin but its constructors. -ENOEXEC with the reason. */
int load_descriptor(const char *path, const struct arle_plugin **out, struct arle_err *err);

/** Judges all candidates that are not refused yet, several at a time, each within timeout_ms. */
void judge_all(struct plugin **list, size_t n, int64_t timeout_ms);

/** One file by itself, without a configuration: owner, mode, then as above. *out is released with plugin_free. */
int plugin_judge_file(const char *path, int64_t timeout_ms, struct plugin **out, struct arle_err *err);

/* The verdict on its way through the pipe. */
struct packet { char *data; size_t len, cap; size_t at; bool bad; };
void verdict_pack(struct packet *pk, const struct arle_plugin *d, const struct arle_probe *probe, const char *refusal);
/** -EBADMSG when the bytes are not a verdict. */
int verdict_unpack(struct packet *pk, struct plugin *p);

#endif
