/*
 * arle.ini, and (inputs that start with '=') one --set per line. A refusal has a reason; what was accepted is dumped, read
 * again and dumped to the same text.
 */
#include "config/config.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char *dump(const struct config *cfg)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    config_dump(cfg, f, false);
    fclose(f);
    return text;
}

static struct config *open_text(const char *text, size_t len, const char *const *sets, size_t n_sets)
{
    struct config *cfg = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    FILE *f = len > 0 ? fmemopen((void *)(uintptr_t)text, len, "r") : NULL;
    int r = config_open_file(&cfg, f, "input", sets, n_sets, &err);
    if (f != NULL)
        fclose(f);
    if (r < 0 && (err.code != r || err.msg[0] == '\0' || cfg != NULL))
        abort();
    return cfg;
}

static struct config *open_sets(const uint8_t *data, size_t size)
{
    const char *sets[32];
    size_t n = 0;
    char *copy = strndup((const char *)data, size), *rest = copy;
    for (char *line; n < 32 && (line = strsep(&rest, "\n")) != NULL;)
        sets[n++] = line;
    struct config *cfg = open_text(NULL, 0, sets, n);
    free(copy);
    return cfg;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    bool sets = size > 0 && data[0] == '=';
    struct config *cfg = sets ? open_sets(data + 1, size - 1) : open_text((const char *)data, size, NULL, 0);
    if (cfg == NULL)
        return 0;
    char *once = dump(cfg);
    struct config *again = open_text(once, strlen(once), NULL, 0);
    if (!sets) {
        if (again == NULL)
            abort();
        if (config_str(cfg, "auth", "keys")[0] == '\0') {
            char *twice = dump(again);
            if (strcmp(once, twice) != 0)
                abort();
            free(twice);
        }
    }
    config_close(again);
    config_close(cfg);
    free(once);
    return 0;
}
