/* Test helpers: opens a built plugin without the registry, and reads a whole file. */
#ifndef ARLE_TESTS_PLUGIN_UTIL_H
#define ARLE_TESTS_PLUGIN_UTIL_H

#include <arle/plugin.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The descriptor of .plugins/NAME.so, or NULL when it was not built. */
static inline const struct arle_plugin *plugin_descriptor(const char *name)
{
    char path[512];
    const char *dir = getenv("ARLE_TEST_PLUGINS");
    snprintf(path, sizeof path, "%s/%s.so", dir ? dir : ".plugins", name);
    void *so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (so == NULL)
        printf("# %s\n", dlerror());
    return so ? dlsym(so, "arle_plugin_v1") : NULL;
}

static inline const void *plugin_api(const char *name, uint32_t kind)
{
    const struct arle_plugin *p = plugin_descriptor(name);
    return p != NULL && p->kind == kind ? p->ops : NULL;
}

/* NUL-terminated contents, or NULL; the caller frees. */
static inline char *read_file(const char *path, size_t *out_len)
{
    FILE *f = fopen(path, "rb");
    char *s = NULL;
    size_t n = 0;
    if (f == NULL)
        return NULL;
    if (fseek(f, 0, SEEK_END) == 0 && (s = malloc((size_t)ftell(f) + 1)) != NULL) {
        n = (size_t)ftell(f);
        rewind(f);
        if (fread(s, 1, n, f) != n) {
            free(s);
            s = NULL;
        } else {
            s[n] = '\0';
        }
    }
    fclose(f);
    *out_len = n;
    return s;
}

#endif
