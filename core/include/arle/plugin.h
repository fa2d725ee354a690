/*
 * The descriptor that every plugin exports as data, under the one symbol `arle_plugin_v1`.
 *
 * The host reads and judges magic, version, size, kind and needs before it calls any function; all of that, and probe(),
 * runs first in a child process with a time limit. A plugin never calls exit or abort, installs no signal handler, prints
 * nothing (it logs through the host) and keeps its state behind the pointer that open() returns.
 */
#ifndef ARLE_PLUGIN_H
#define ARLE_PLUGIN_H

#include <arle/abi.h>
#include <arle/err.h>
#include <arle/host.h>

#ifdef __cplusplus
extern "C" {
#endif

enum arle_plugin_kind {
    ARLE_KIND_BACKEND = 1,      /* ops: struct arle_backend_api, <arle/backend.h> */
    ARLE_KIND_MODEL = 2,        /* ops: struct arle_model_api,   <arle/model.h>   */
    ARLE_KIND_TOOL = 3,         /* ops: struct arle_tool_api,    <arle/tool.h>    */
    ARLE_KIND_KV_STORE = 4,     /* ops: struct arle_kv_store_api, <arle/kv.h>     */
    ARLE_KIND_TRAINER = 5,
};

/* `needs` bits this host understands; a plugin with any other bit set is refused. */
#define ARLE_NEED_ENGINE_THREAD (1ull << 0)   /* all calls after open come from one engine thread */
#define ARLE_NEEDS_KNOWN (ARLE_NEED_ENGINE_THREAD)

/* `caps` bits. */
#define ARLE_CAP_ACCELERATOR (1ull << 0)      /* backend with devices of their own: chosen before others by backend = auto */

enum arle_conf_type {
    ARLE_CONF_STR = 1, ARLE_CONF_BOOL, ARLE_CONF_I64, ARLE_CONF_F64,
    ARLE_CONF_BYTES,            /* 512, 64KiB, 16MiB, 20GiB, 1TB */
    ARLE_CONF_DURATION,         /* 250ms, 10s, 5m, 1h; value in milliseconds */
    ARLE_CONF_ENUM,             /* `choices`: words separated by '|' */
};

#define ARLE_CONF_RELOAD 1u     /* may change while running */
#define ARLE_CONF_SECRET 2u     /* never printed */

/* One configuration key; rows with the same layout serve the core's own keys. A table ends with name == NULL. */
struct arle_conf_key {
    const char *name;
    uint32_t type;              /* enum arle_conf_type */
    uint32_t flags;
    const char *def;            /* default as text, as it would stand in the file */
    double min, max;            /* inclusive, for numbers, bytes and durations; min == max means unbounded */
    const char *choices;        /* for ARLE_CONF_ENUM */
    const char *unit;           /* "" if none */
    const char *help;           /* one sentence */
};

/* What probe() found, for `arle plugins` and `arle doctor`. Runs in the child: must not leave threads behind. */
struct arle_probe {
    uint32_t struct_size;
    uint32_t usable;            /* 0: refused here, `detail` says what is missing (driver, CPU feature, memory) */
    char detail[256];           /* e.g. "AVX-512 BF16, 2 threads" or "NVIDIA H100, 80 GB, driver 580.1" */
};

struct arle_plugin {
    uint32_t magic;                  /* ARLE_PLUGIN_MAGIC */
    uint16_t abi_major, abi_minor;   /* what the plugin was compiled against */
    uint32_t struct_size;            /* sizeof(struct arle_plugin) as the plugin saw it */
    uint32_t kind;                   /* enum arle_plugin_kind */
    uint64_t caps;                   /* offers: unknown bits are ignored by the host */
    uint64_t needs;                  /* demands: an unknown bit means "refuse me" */
    const char *name, *version, *license;   /* name: [a-z0-9-]+, unique among loaded plugins, e.g. "backend-cpu" */
    const char *summary;             /* one sentence for lists */
    const struct arle_conf_key *keys;       /* keys of section [plugin NAME] ([NAME] in --set); NULL if none */
    int  (*probe)(const struct arle_host *host, struct arle_probe *out, struct arle_err *err);   /* may be NULL */
    int  (*open)(const struct arle_host *host, const struct arle_conf *conf, void **out_ctx, struct arle_err *err);
    void (*close)(void *ctx);        /* frees memory; the file stays mapped until exit */
    const void *ops;                 /* the kind's table; starts with its own struct_size */
};

#define ARLE_PLUGIN_HEAD(kind_) \
    .magic = ARLE_PLUGIN_MAGIC, .abi_major = ARLE_ABI_MAJOR, .abi_minor = ARLE_ABI_MINOR, \
    .struct_size = sizeof(struct arle_plugin), .kind = (kind_)

#ifdef __cplusplus
}
#endif
#endif
