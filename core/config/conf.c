/* Checks values against their keys: types, units, ranges, choices. No file is read here. */
#include "config/conf.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

struct unit { const char *name; double factor; };
static const struct unit byte_units[] = {
    { "", 1 }, { "B", 1 }, { "KiB", 1024 }, { "MiB", 1048576 }, { "GiB", 1073741824 }, { "TiB", 1099511627776 },
    { "KB", 1e3 }, { "MB", 1e6 }, { "GB", 1e9 }, { "TB", 1e12 }, { NULL, 0 }
};
static const struct unit time_units[] = {      /* a bare number is only right for 0: "10" of what? */
    { "ms", 1 }, { "s", 1000 }, { "m", 60000 }, { "h", 3600000 }, { "d", 86400000 }, { NULL, 0 }
};

static bool parse_bool(const char *text, int64_t *out)
{
    static const char *const words[2][4] = { { "no", "false", "off", "0" }, { "yes", "true", "on", "1" } };
    for (int v = 0; v < 2; v++) {
        for (int i = 0; i < 4; i++) {
            if (strcasecmp(text, words[v][i]) == 0) {
                *out = v;
                return true;
            }
        }
    }
    return false;
}

/* Number and unit; false when either is not understood. strtod alone would take hex, inf and nan. */
static bool parse_scaled(const char *text, const struct unit *units, double *out)
{
    char *end;
    if (!isdigit((unsigned char)text[0]) || (text[0] == '0' && (text[1] == 'x' || text[1] == 'X')))
        return false;
    double v = strtod(text, &end);
    while (*end == ' ')
        end++;
    for (; units->name != NULL; units++) {
        if (strcasecmp(end, units->name) == 0) {
            *out = v * units->factor;
            return true;
        }
    }
    return false;
}

static bool parse_i64(const char *text, int64_t *out)
{
    char *end;
    const char *digits = text[0] == '-' ? text + 1 : text;
    if (!isdigit((unsigned char)digits[0]))
        return false;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (errno != 0 || *end != '\0')
        return false;
    *out = v;
    return true;
}

static bool parse_f64(const char *text, double *out)
{
    char *end;
    if (text[0] == '\0' || strchr("+-.0123456789", text[0]) == NULL || strpbrk(text, "xXnN") != NULL)
        return false;
    *out = strtod(text, &end);
    return *end == '\0' && isfinite(*out);
}

static bool is_choice(const char *choices, const char *text)
{
    size_t len = strlen(text);
    for (const char *c = choices; *c != '\0';) {
        size_t n = strcspn(c, "|");
        if (n == len && memcmp(c, text, n) == 0)
            return true;
        c += n + (c[n] == '|');
    }
    return false;
}

/* True when text has the key's type; the number then is in out. */
static bool parse_typed(const struct arle_conf_key *key, const char *text, struct conf_value *out)
{
    double v;
    switch (key->type) {
    case ARLE_CONF_STR:
        return true;
    case ARLE_CONF_ENUM:
        return is_choice(key->choices, text);
    case ARLE_CONF_BOOL:
        return parse_bool(text, &out->i64);
    case ARLE_CONF_I64:
        return parse_i64(text, &out->i64);
    case ARLE_CONF_F64:
        return parse_f64(text, &out->f64);
    case ARLE_CONF_BYTES:
    case ARLE_CONF_DURATION:
        if (key->type == ARLE_CONF_DURATION && strcmp(text, "0") == 0)
            return true;
        if (!parse_scaled(text, key->type == ARLE_CONF_BYTES ? byte_units : time_units, &v) || v > 9e18)
            return false;
        out->i64 = (int64_t)v;
        return true;
    default:
        return false;
    }
}

static void format_amount(const struct arle_conf_key *key, double v, char *buf, size_t cap)
{
    static const struct unit bytes[] = { { "TiB", 1099511627776 }, { "GiB", 1073741824 }, { "MiB", 1048576 }, { "KiB", 1024 } };
    static const struct unit times[] = { { "d", 86400000 }, { "h", 3600000 }, { "m", 60000 }, { "s", 1000 }, { "ms", 1 } };
    const struct unit *units = key->type == ARLE_CONF_BYTES ? bytes : times;
    size_t n = key->type == ARLE_CONF_BYTES ? 4 : 5;
    if (v != 0 && (key->type == ARLE_CONF_BYTES || key->type == ARLE_CONF_DURATION)) {
        for (size_t i = 0; i < n; i++) {
            if (v >= units[i].factor && fmod(v, units[i].factor) == 0) {
                snprintf(buf, cap, "%.0f%s", v / units[i].factor, units[i].name);
                return;
            }
        }
    }
    snprintf(buf, cap, "%.10g", v);
}

const char *config_key_type(const struct arle_conf_key *key, char *buf, size_t cap)
{
    static const char *const names[] = { "", "text", "yes or no", "whole number", "number", "bytes (512, 64KiB, 20GiB)",
        "time (250ms, 10s, 5m, 1h)" };
    if (key->type == ARLE_CONF_ENUM) {
        snprintf(buf, cap, "one of %s", key->choices);
        return buf;
    }
    int n = snprintf(buf, cap, "%s", key->type < sizeof names / sizeof names[0] ? names[key->type] : "?");
    bool number = key->type >= ARLE_CONF_I64 && key->type <= ARLE_CONF_DURATION;
    if (number && key->min != key->max && n > 0 && (size_t)n < cap) {
        char lo[32], hi[32];
        format_amount(key, key->min, lo, sizeof lo);
        format_amount(key, key->max, hi, sizeof hi);
        snprintf(buf + n, cap - (size_t)n, ", %s to %s", lo, hi);
    }
    return buf;
}

int conf_parse(const struct arle_conf_key *key, const char *text, struct conf_value *out, char *why, size_t cap)
{
    char type[160];
    out->i64 = 0;
    out->f64 = 0;
    if (!parse_typed(key, text, out)) {
        snprintf(why, cap, "\"%.60s\" is not right: wants %s", text, config_key_type(key, type, sizeof type));
        return -EINVAL;
    }
    if (key->type == ARLE_CONF_STR || key->type == ARLE_CONF_ENUM || key->type == ARLE_CONF_BOOL)
        return 0;
    if (key->type == ARLE_CONF_F64)
        out->i64 = 0;
    else
        out->f64 = (double)out->i64;
    if (key->min != key->max && (out->f64 < key->min || out->f64 > key->max)) {
        snprintf(why, cap, "\"%.60s\" is out of range: wants %s", text, config_key_type(key, type, sizeof type));
        return -EINVAL;
    }
    return 0;
}

int conf_init(struct arle_conf *conf, const char *section, const struct arle_conf_key *keys, struct arle_err *err)
{
    size_t n = 0;
    while (keys[n].name != NULL)
        n++;
    memset(conf, 0, sizeof *conf);
    conf->keys = keys;
    conf->section = strdup(section);
    conf->values = calloc(n + 1, sizeof *conf->values);
    if (conf->section == NULL || conf->values == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for section [%s]", section);
    conf->n = n;
    for (size_t i = 0; i < n; i++) {
        char why[256];
        const char *def = keys[i].def != NULL ? keys[i].def : "";
        if (conf_parse(&keys[i], def, &conf->values[i], why, sizeof why) < 0)
            return arle_err_param(err, -EINVAL, keys[i].name, "default of %s.%s: %s", section, keys[i].name, why);
        conf->values[i].text = strdup(def);
        if (conf->values[i].text == NULL)
            return arle_err_set(err, -ENOMEM, "no memory for section [%s]", section);
    }
    return 0;
}

void conf_fini(struct arle_conf *conf)
{
    for (size_t i = 0; i < conf->n; i++)
        free(conf->values[i].text);
    for (size_t i = 0; i < conf->n_arena; i++)
        free(conf->arena[i]);
    free(conf->arena);
    free(conf->own_keys);
    free(conf->values);
    free(conf->section);
    memset(conf, 0, sizeof *conf);
}

int conf_index(const struct arle_conf *conf, const char *key)
{
    for (size_t i = 0; i < conf->n; i++) {
        if (strcmp(conf->keys[i].name, key) == 0)
            return (int)i;
    }
    return -1;
}

static int unknown_key(const struct arle_conf *conf, const char *key, const char *where, const char *param, struct arle_err *err)
{
    const char *words[256];
    size_t n = 0;
    for (; n < conf->n && n < 256; n++)
        words[n] = conf->keys[n].name;
    const char *near = nearest_word(key, words, n);
    return arle_err_param(err, -EINVAL, param, "%s: unknown key \"%.48s\" in [%s]%s%s%s", where, key, conf->section,
                          near != NULL ? "; did you mean \"" : "", near != NULL ? near : "", near != NULL ? "\"?" : "");
}

int conf_set(struct arle_conf *conf, const char *key, const char *text, const char *where, int line, struct arle_err *err)
{
    char param[128], why[256];
    snprintf(param, sizeof param, "%s.%s", conf->section, key);
    int i = conf_index(conf, key);
    if (i < 0)
        return unknown_key(conf, key, where, param, err);
    struct conf_value *v = &conf->values[i], parsed = { 0 };
    if (line > 0 && v->set)
        return arle_err_param(err, -EINVAL, param, "%s: %s is set twice, first in line %d", where, param, v->line);
    if (conf_parse(&conf->keys[i], text, &parsed, why, sizeof why) < 0)
        return arle_err_param(err, -EINVAL, param, "%s: %s: %s", where, param, why);
    parsed.text = strdup(text);
    if (parsed.text == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for %s", param);
    free(v->text);
    parsed.set = true;
    parsed.line = line;
    *v = parsed;
    return 0;
}

const char *conf_str(const struct arle_conf *conf, const char *key)
{
    int i = conf != NULL ? conf_index(conf, key) : -1;
    return i < 0 ? "" : conf->values[i].text;
}

int64_t conf_i64(const struct arle_conf *conf, const char *key)
{
    int i = conf != NULL ? conf_index(conf, key) : -1;
    return i < 0 ? 0 : conf->values[i].i64;
}

double conf_f64(const struct arle_conf *conf, const char *key)
{
    int i = conf != NULL ? conf_index(conf, key) : -1;
    return i < 0 ? 0 : conf->values[i].f64;
}

void conf_close(struct arle_conf *conf)
{
    if (conf != NULL) {
        conf_fini(conf);
        free(conf);
    }
}
