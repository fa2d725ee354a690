/*
 * Finds, judges and keeps plugins. Every *.so in the directories of [plugins] dir is judged first in a child process with a
 * time limit: owner and mode, loading, descriptor, probe(). What is refused stays in the list with file, reason and cure.
 * What is accepted is loaded into this process when it is first asked for, and stays mapped until exit.
 *
 * Thread: open, load and close from one thread; open while no other threads run (it forks). Descriptors are constant.
 */
#ifndef CORE_PLUGIN_REGISTRY_H
#define CORE_PLUGIN_REGISTRY_H

#include "config/config.h"
#include <arle/backend.h>
#include <arle/kv.h>
#include <arle/model.h>
#include <arle/plugin.h>
#include <arle/tool.h>
#include <stdbool.h>

struct registry;

enum plugin_state {
    PLUGIN_REFUSED = 1,     /* reason says why and what to do */
    PLUGIN_READY,           /* judged well; not loaded here yet */
    PLUGIN_OPEN,            /* loaded, open() returned; ops and ctx are valid */
};

/* Everything here is a copy in host memory, but for ops and ctx. */
struct plugin_info {
    const char *path;
    enum plugin_state state;
    const char *reason;         /* one line: file, reason and cure; "" unless refused */
    const char *name, *version, *license, *summary;     /* "" where judging did not get that far */
    const char *detail;         /* what probe() found */
    uint32_t kind;              /* enum arle_plugin_kind; 0 unknown */
    uint16_t abi_major, abi_minor;
    uint64_t caps;
    int64_t judge_us;           /* time its judging took */
    const struct arle_conf_key *keys;   /* its configuration keys (a copy); never NULL for ready plugins */
    const void *ops;            /* PLUGIN_OPEN only: struct arle_backend_api, arle_model_api ... by kind */
    void *ctx;
};

#define REGISTRY_LENIENT 1u     /* for lists and diagnosis: required plugins and unknown [plugin X] sections do not fail */

/**
 * Scans and judges. A directory that does not exist is empty. Fails when a plugin that the configuration requires
 * ([plugin X] required = yes, or the backend that a model names) is missing or refused, when a [plugin X] section has keys
 * its plugin does not know, and when no such plugin exists; err then says all of that.
 */
int registry_open(struct registry **out, const struct config *cfg, uint32_t flags, struct arle_err *err);
/** Closes what was opened, last first. Files stay mapped. */
void registry_close(struct registry *reg);

/** All candidates, by path. */
size_t registry_count(const struct registry *reg);
const struct plugin_info *registry_at(const struct registry *reg, size_t i);

/**
 * The plugin of that kind and name, loaded and opened. name may leave the kind's prefix out ("cpu" for "backend-cpu").
 * -ENOENT: nothing of that name (err lists what there is); -ENOEXEC: refused (err has the reason); else what open() returned.
 */
int registry_find(struct registry *reg, uint32_t kind, const char *name, const struct plugin_info **out, struct arle_err *err);
/** Loads and opens every ready plugin of a kind (0: of every kind); failures become refusals. Returns how many are open. */
size_t registry_load_all(struct registry *reg, uint32_t kind);
/** i-th open plugin of a kind, NULL past the end. */
const struct plugin_info *registry_opened(const struct registry *reg, uint32_t kind, size_t i);

/**
 * The backend for a model whose configuration says `wanted` ("auto": the first in order of preference that opens: those with
 * devices of their own memory before the CPU). -ENOENT and -ENOEXEC as above.
 */
int registry_backend(struct registry *reg, const char *wanted, const struct plugin_info **out, struct arle_err *err);
/**
 * The model plugin that recognises a config.json. -ENOENT: none does (err lists the architectures that were asked);
 * -EINVAL: one knows it but cannot serve it (its reason).
 */
int registry_model(struct registry *reg, const char *config_json, size_t len, const struct plugin_info **out,
                   struct arle_err *err);

/** "backend", "model", "tool", "kv-store", "trainer" or "unknown". */
const char *plugin_kind_name(uint32_t kind);
const struct arle_host *plugin_host(void);      /* what plugins of this process are given */

#endif
