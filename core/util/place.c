/* See place.h. */
#include "util/place.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The first of built_in and the folders relative to the program that exists; built_in when none does. */
static const char *choose(const char *built_in, const char *const *beside, char *buf, size_t cap)
{
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (access(built_in, F_OK) == 0 || n <= 0)
        return built_in;
    self[n] = '\0';
    char *slash = strrchr(self, '/');
    *(slash != NULL ? slash : self) = '\0';
    for (; *beside != NULL; beside++)
        if ((size_t)snprintf(buf, cap, "%s/%s", self, *beside) < cap && access(buf, F_OK) == 0)
            return buf;
    return built_in;
}

const char *place_plugins(void)
{
    static char buf[PATH_MAX + 64];
    static const char *found;
    static const char *const beside[] = { "../lib/arle/plugins", ".plugins", NULL };
    if (found == NULL)
        found = choose(ARLE_PLUGIN_DIR, beside, buf, sizeof buf);
    return found;
}

const char *place_models(void)
{
    static char buf[PATH_MAX + 64];
    static const char *found;
    static const char *const beside[] = { "../share/arle/models", "../models", NULL };
    if (found == NULL)
        found = choose(ARLE_DATA_DIR "/models", beside, buf, sizeof buf);
    return found;
}
