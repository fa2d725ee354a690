/* Reads what a file offers without calling it: trust in the file, loading, and the descriptor field by field. */
#include "plugin/judge.h"

#include <dlfcn.h>
#include <elf.h>
#include <inttypes.h>
#include <limits.h>
#include <link.h>
#include <string.h>
#include <unistd.h>

int check_trusted(const char *path, const struct stat *st, struct arle_err *err)
{
    if (st->st_uid != 0 && st->st_uid != geteuid())
        return arle_err_set(err, -EPERM, "%s: belongs to user %u, neither to root nor to user %u who runs this; chown root it", path,
                            (unsigned)st->st_uid, (unsigned)geteuid());
    if ((st->st_mode & (S_IWGRP | S_IWOTH)) != 0)
        return arle_err_set(err, -EPERM, "%s: mode %04o lets others write to it; chmod go-w it", path, (unsigned)(st->st_mode & 07777));
    return 0;
}

/* Size of the descriptor in the symbol table. A file that exports something smaller must not be read as a descriptor. */
static size_t symbol_bytes(const void *sym, bool *is_data)
{
    Dl_info info;
    ElfW(Sym) *elf = NULL;
    *is_data = true;
    if (dladdr1(sym, &info, (void **)&elf, RTLD_DL_SYMENT) == 0 || elf == NULL)
        return 0;
    *is_data = ELF64_ST_TYPE(elf->st_info) != STT_FUNC;
    return elf->st_size;
}

/* dlerror says what is wrong in its own words; the cure depends on which kind of wrong. */
static int explain_dlerror(const char *path, struct arle_err *err)
{
    const char *why = dlerror();
    if (why == NULL)
        why = "unknown reason";
    size_t n = strlen(path);
    if (strncmp(why, path, n) == 0 && why[n] == ':')
        why += n + 1 + strspn(why + n + 1, " ");
    const char *cure = "rebuild it for this machine";
    if (strstr(why, "undefined symbol") != NULL)
        cure = "rebuild it against the libraries of this machine, or link what holds the symbol";
    else if (strstr(why, "cannot open shared object") != NULL)
        cure = "install the package that holds this library";
    else if (strstr(why, "invalid ELF") != NULL || strstr(why, "file too short") != NULL)
        cure = "the file is damaged or no plugin; install it again or remove it";
    return arle_err_set(err, -ENOEXEC, "%.200s: cannot be loaded: %.160s; %s", path, why, cure);
}

int load_descriptor(const char *path, const struct arle_plugin **out, struct arle_err *err)
{
    /* Once loaded a file stays: runtimes of devices keep threads and exit handlers in it. */
    void *dl = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (dl == NULL)
        return explain_dlerror(path, err);
    const void *sym = dlsym(dl, "arle_plugin_v1");
    if (sym == NULL) {
        dlclose(dl);
        return arle_err_set(err, -ENOEXEC, "%.200s: does not export arle_plugin_v1, so it is no ARLE plugin; remove it, or export the "
                            "descriptor with ARLE_EXPORT", path);
    }
    bool is_data;
    size_t bytes = symbol_bytes(sym, &is_data);
    struct arle_err why = ARLE_ERR_INIT;
    int r = is_data ? check_descriptor(sym, bytes, &why)
                    : arle_err_set(&why, -ENOEXEC, "arle_plugin_v1 is a function; it must be a constant struct arle_plugin");
    if (r == 0)
        r = check_table(sym, &why);
    if (r < 0) {
        dlclose(dl);
        return arle_err_set(err, r, "%.200s: %.300s", path, why.msg);
    }
    *out = sym;
    return 0;
}

/* [a-z0-9-]+, as it becomes part of file names and configuration sections. */
static bool good_name(const char *s)
{
    size_t n = strspn(s, "abcdefghijklmnopqrstuvwxyz0123456789-");
    return n > 0 && n < 64 && s[n] == '\0';
}

static int check_version(const struct arle_plugin *d, struct arle_err *err)
{
    if (d->abi_major < ARLE_ABI_MAJOR)
        return arle_err_set(err, -ENOEXEC, "built for plugin ABI %u.%u, this program speaks %u.%u; install the plugin's version for %u.x",
                            d->abi_major, d->abi_minor, ARLE_ABI_MAJOR, ARLE_ABI_MINOR, ARLE_ABI_MAJOR);
    if (d->abi_major > ARLE_ABI_MAJOR)
        return arle_err_set(err, -ENOEXEC, "built for plugin ABI %u.%u, this program speaks %u.%u; update ARLE, or install the plugin's "
                            "version for %u.x", d->abi_major, d->abi_minor, ARLE_ABI_MAJOR, ARLE_ABI_MINOR, ARLE_ABI_MAJOR);
    return 0;
}

int check_descriptor(const struct arle_plugin *d, size_t sym_bytes, struct arle_err *err)
{
    /* What 1.0 had: later fields are optional and asked for with ARLE_HAS. */
    const size_t least = offsetof(struct arle_plugin, ops) + sizeof d->ops;
    if (sym_bytes != 0 && sym_bytes < offsetof(struct arle_plugin, kind))
        return arle_err_set(err, -ENOEXEC, "descriptor is %zu bytes, too short for any version; build it from struct arle_plugin", sym_bytes);
    if (d->magic != ARLE_PLUGIN_MAGIC)
        return arle_err_set(err, -ENOEXEC, "descriptor begins with 0x%08" PRIX32 " instead of the magic 0x%08X; it is no ARLE plugin, "
                            "build it with ARLE_PLUGIN_HEAD", d->magic, ARLE_PLUGIN_MAGIC);
    int r = check_version(d, err);
    if (r < 0)
        return r;
    if (d->struct_size < least || (sym_bytes != 0 && sym_bytes < least))
        return arle_err_set(err, -ENOEXEC, "descriptor is %" PRIu32 " bytes (%zu in the file), ABI %u.%u needs %zu; rebuild it against the "
                            "installed headers", d->struct_size, sym_bytes, d->abi_major, d->abi_minor, least);
    if (sym_bytes != 0 && d->struct_size > sym_bytes)
        return arle_err_set(err, -ENOEXEC, "descriptor claims %" PRIu32 " bytes but the file holds %zu; set struct_size with "
                            "ARLE_PLUGIN_HEAD", d->struct_size, sym_bytes);
    if ((d->needs & ~ARLE_NEEDS_KNOWN) != 0)
        return arle_err_set(err, -ENOEXEC, "needs 0x%" PRIx64 ", which this program does not offer; update ARLE",
                            d->needs & ~(uint64_t)ARLE_NEEDS_KNOWN);
    if (d->kind < ARLE_KIND_BACKEND || d->kind > ARLE_KIND_TRAINER)
        return arle_err_set(err, -ENOEXEC, "is of kind %" PRIu32 ", which this program does not know; update ARLE", d->kind);
    if (d->name == NULL || !good_name(d->name))
        return arle_err_set(err, -ENOEXEC, "has no proper name; it must be of [a-z0-9-]+, at most 63 long");
    if (d->open == NULL || d->ops == NULL)
        return arle_err_set(err, -ENOEXEC, "has no %s; fill it in the descriptor", d->open == NULL ? "open function" : "ops table");
    return 0;
}

#define NEED(obj, type, fn) do { if (!ARLE_HAS(obj, type, fn)) \
        return arle_err_set(err, -ENOEXEC, "lacks %s in its " #type "; every %s needs it", #fn, plugin_kind_name(d->kind)); } while (0)

static int check_backend(const struct arle_plugin *d, const struct arle_backend_api *b, struct arle_err *err)
{
    NEED(b, struct arle_backend_api, n_devices);
    NEED(b, struct arle_backend_api, device_info);
    NEED(b, struct arle_backend_api, open_device);
    NEED(b, struct arle_backend_api, close_device);
    NEED(b, struct arle_backend_api, ops);
    NEED(b, struct arle_backend_api, weight_create);
    NEED(b, struct arle_backend_api, weight_destroy);
    NEED(b, struct arle_backend_api, weight_data);
    NEED(b, struct arle_backend_api, weight_bytes);
    NEED(b, struct arle_backend_api, weight_predict);
    const struct arle_mem_ops *m = &b->mem;
    NEED(m, struct arle_mem_ops, alloc);
    NEED(m, struct arle_mem_ops, free);
    NEED(m, struct arle_mem_ops, stream_create);
    NEED(m, struct arle_mem_ops, stream_destroy);
    NEED(m, struct arle_mem_ops, stream_sync);
    NEED(m, struct arle_mem_ops, event_create);
    NEED(m, struct arle_mem_ops, event_destroy);
    NEED(m, struct arle_mem_ops, event_record);
    NEED(m, struct arle_mem_ops, event_query);
    NEED(m, struct arle_mem_ops, event_sync);
    NEED(m, struct arle_mem_ops, stream_wait);
    NEED(m, struct arle_mem_ops, copy);
    NEED(m, struct arle_mem_ops, fill);
    return 0;
}

static int check_model(const struct arle_plugin *d, const struct arle_model_api *m, struct arle_err *err)
{
    NEED(m, struct arle_model_api, recognise);
    NEED(m, struct arle_model_api, load);
    NEED(m, struct arle_model_api, destroy);
    NEED(m, struct arle_model_api, describe);
    NEED(m, struct arle_model_api, bind);
    NEED(m, struct arle_model_api, step);
    return 0;
}

static int check_small(const struct arle_plugin *d, struct arle_err *err)
{
    if (d->kind == ARLE_KIND_TOOL) {
        const struct arle_tool_api *t = d->ops;
        NEED(t, struct arle_tool_api, declaration);
        NEED(t, struct arle_tool_api, call);
    } else if (d->kind == ARLE_KIND_KV_STORE) {
        const struct arle_kv_store_api *s = d->ops;
        NEED(s, struct arle_kv_store_api, get);
        NEED(s, struct arle_kv_store_api, put);
        NEED(s, struct arle_kv_store_api, exists);
    }
    return 0;
}

int check_table(const struct arle_plugin *d, struct arle_err *err)
{
    switch (d->kind) {
    case ARLE_KIND_BACKEND: return check_backend(d, d->ops, err);
    case ARLE_KIND_MODEL: return check_model(d, d->ops, err);
    default: return check_small(d, err);
    }
}
