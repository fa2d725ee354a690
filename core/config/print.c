/* The effective configuration as text, and the difference of two. */
#include "config/config_impl.h"

#include <string.h>

static void print_help(FILE *out, const struct arle_conf_key *key)
{
    char type[160];
    fprintf(out, "# %s\n# %s; default %s%s\n", key->help, config_key_type(key, type, sizeof type),
            key->def[0] != '\0' ? key->def : "empty", (key->flags & ARLE_CONF_RELOAD) != 0 ? "; may change while running" : "");
}

/* True when the reader would read back just this text. */
static bool fits_a_file(const char *name, const char *text)
{
    size_t n = strlen(text);
    if (strlen(name) + 1 + n > 190 || strpbrk(text, "\r\n") != NULL || strstr(text, " ;") != NULL || strstr(text, "\t;") != NULL)
        return false;
    return n == 0 || (strchr(" \t", text[0]) == NULL && strchr(" \t", text[n - 1]) == NULL);
}

static void dump_value(FILE *out, const char *name, const char *text)
{
    if (!fits_a_file(name, text))
        fprintf(out, "; --set %s=... holds what a line of a file cannot\n", name);
    else if (text[0] == ';' || strlen(name) + strlen(text) > 180)
        fprintf(out, "%s=%s\n", name, text);       /* " ;" would begin a comment, and lines have a limit */
    else
        fprintf(out, "%s = %s\n", name, text);
}

static void dump_section(const struct arle_conf *conf, FILE *out, bool with_help)
{
    fprintf(out, "[%s]\n", conf->section);
    for (size_t i = 0; i < conf->n; i++) {
        const struct arle_conf_key *key = &conf->keys[i];
        if (with_help)
            print_help(out, key);
        if ((key->flags & ARLE_CONF_SECRET) != 0 && conf->values[i].text[0] != '\0')
            fprintf(out, "; %s is set and not shown\n", key->name);
        else
            dump_value(out, key->name, conf->values[i].text);
    }
    fputc('\n', out);
}

void config_dump(const struct config *cfg, FILE *out, bool with_help)
{
    for (size_t i = 0; i < cfg->n_fixed; i++)
        dump_section(&cfg->fixed[i], out, with_help);
    for (size_t i = 0; i < cfg->n_plugins; i++) {
        const struct raw_section *rs = &cfg->plugins[i];
        fprintf(out, "[plugin %s]\n", rs->name);
        for (size_t k = 0; k < rs->n; k++)
            dump_value(out, rs->values[k].key, rs->values[k].text);
        fputc('\n', out);
    }
    for (size_t i = 0; i < cfg->n_models; i++)
        dump_section(&cfg->models[i], out, with_help);
}

static void diff_conf(const struct arle_conf *was, const struct arle_conf *is, config_diff_fn fn, void *arg)
{
    for (size_t i = 0; i < is->n; i++) {
        if (strcmp(was->values[i].text, is->values[i].text) != 0)
            fn(arg, is->section, &is->keys[i], was->values[i].text, is->values[i].text);
    }
}

static const struct arle_conf *model_of(const struct config *cfg, const char *section)
{
    for (size_t i = 0; i < cfg->n_models; i++) {
        if (strcmp(cfg->models[i].section, section) == 0)
            return &cfg->models[i];
    }
    return NULL;
}

/* Plugin sections are compared as text: a plugin reads its keys once, when it is opened. */
static void diff_plugins(const struct config *a, const struct config *b, bool only_missing, config_diff_fn fn, void *arg)
{
    for (size_t i = 0; i < a->n_plugins; i++) {
        for (size_t k = 0; k < a->plugins[i].n; k++) {
            const struct raw_value *v = &a->plugins[i].values[k];
            const char *other = config_plugin_text(b, a->plugins[i].name, v->key);
            struct arle_conf_key key = { .name = v->key, .type = ARLE_CONF_STR, .def = "", .unit = "", .help = "" };
            char header[176];
            snprintf(header, sizeof header, "plugin %s", a->plugins[i].name);
            if (other == NULL)
                fn(arg, header, &key, only_missing ? "" : v->text, only_missing ? v->text : "");
            else if (!only_missing && strcmp(other, v->text) != 0)
                fn(arg, header, &key, v->text, other);
        }
    }
}

void config_diff(const struct config *was, const struct config *is, config_diff_fn fn, void *arg)
{
    static const struct arle_conf_key whole = { .name = "", .type = ARLE_CONF_STR, .def = "", .unit = "", .help = "the whole section" };
    for (size_t i = 0; i < is->n_fixed; i++)
        diff_conf(&was->fixed[i], &is->fixed[i], fn, arg);
    for (size_t i = 0; i < is->n_models; i++) {
        const struct arle_conf *old = model_of(was, is->models[i].section);
        if (old != NULL)
            diff_conf(old, &is->models[i], fn, arg);
        else
            fn(arg, is->models[i].section, &whole, "", "present");
    }
    for (size_t i = 0; i < was->n_models; i++) {
        if (model_of(is, was->models[i].section) == NULL)
            fn(arg, was->models[i].section, &whole, "present", "");
    }
    diff_plugins(was, is, false, fn, arg);
    diff_plugins(is, was, true, fn, arg);
}
