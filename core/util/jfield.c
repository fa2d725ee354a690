/* Typed JSON reading of jfield.h. Users: the request readers of the HTTP dialects, the messages of a chat, control lines. */
#include "util/jfield.h"

#include <math.h>
#include <string.h>

#include <json-c/json.h>

/* ---- whole texts ---- */

size_t utf8_invalid_at(const char *text, size_t len)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t i = 0;
    while (i < len) {
        unsigned c = p[i];
        if (c < 0x80) {
            i++;
            continue;
        }
        size_t n = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
        if (c < 0xc2 || c > 0xf4 || len - i < n)
            return i;
        unsigned lo = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80, hi = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
        if (p[i + 1] < lo || p[i + 1] > hi)
            return i;
        for (size_t k = 2; k < n; k++)
            if ((p[i + k] & 0xc0) != 0x80)
                return i;
        i += n;
    }
    return len;
}

/* json-c takes 'single quotes' around keys even when strict. */
static bool has_bare_apostrophe(const char *text, size_t len)
{
    bool in_string = false;
    for (size_t i = 0; i < len; i++) {
        if (in_string && text[i] == '\\')
            i++;
        else if (text[i] == '"')
            in_string = !in_string;
        else if (text[i] == '\'' && !in_string)
            return true;
    }
    return false;
}

int json_text_parse(const char *text, size_t len, struct json_object **out, struct arle_err *err)
{
    size_t bad = utf8_invalid_at(text, len);
    if (bad < len)
        return arle_err_set(err, -EILSEQ, "the body is not valid UTF-8 at byte %zu", bad);
    if (memchr(text, '\0', len) != NULL)       /* json-c would take it for the end */
        return arle_err_set(err, -EBADMSG, "the JSON holds a NUL byte");
    if (has_bare_apostrophe(text, len))
        return arle_err_set(err, -EBADMSG, "not valid JSON: strings stand in double quotes");
    if (len > INT32_MAX - 1)
        return arle_err_set(err, -EBADMSG, "the body is too long to be parsed");
    struct json_tokener *tok = json_tokener_new_ex(JSON_TEXT_DEPTH);
    if (tok == NULL)
        return arle_err_set(err, -ENOMEM, "no memory to parse the body");
    json_tokener_set_flags(tok, JSON_TOKENER_STRICT);
    struct json_object *v = json_tokener_parse_ex(tok, text, (int)len);
    enum json_tokener_error e = json_tokener_get_error(tok);
    if (e == json_tokener_continue)     /* a number ends only when something follows it */
        v = json_tokener_parse_ex(tok, " ", 1), e = json_tokener_get_error(tok);
    size_t end = json_tokener_get_parse_end(tok);
    json_tokener_free(tok);
    if (e == json_tokener_success && v != NULL) {
        *out = v;
        return 0;
    }
    json_object_put(v);
    if (e == json_tokener_error_depth)
        return arle_err_set(err, -EBADMSG, "the JSON is nested deeper than %d levels", JSON_TEXT_DEPTH);
    if (e == json_tokener_continue)
        return arle_err_set(err, -EBADMSG, "the JSON ends too early");
    return arle_err_set(err, -EBADMSG, "not valid JSON at byte %zu: %s", end,
                        e == json_tokener_success ? "null" : json_tokener_error_desc(e));
}

int json_text_parse_object(const char *text, size_t len, const char *what, struct json_object **out, struct arle_err *err)
{
    struct json_object *v;
    int r = json_text_parse(text, len, &v, err);
    if (r < 0)
        return r;
    if (!json_object_is_type(v, json_type_object)) {
        r = arle_err_set(err, -EPROTO, "%s must be a JSON object, not %s", what, json_kind(v));
        json_object_put(v);
        return r;
    }
    *out = v;
    return 0;
}

/* ---- members ---- */

const char *json_kind(struct json_object *v)
{
    switch (json_object_get_type(v)) {
    case json_type_null: return "null";
    case json_type_boolean: return "a boolean";
    case json_type_double: return "a number";
    case json_type_int: return "an integer";
    case json_type_object: return "an object";
    case json_type_array: return "an array";
    default: return "a string";
    }
}

int jfield_get(struct json_object *obj, const char *key, struct json_object **out)
{
    struct json_object *v;
    if (!json_object_object_get_ex(obj, key, &v) || v == NULL)
        return 0;
    *out = v;
    return 1;
}

static const char *path_of(char *buf, size_t cap, const char *at, const char *key)
{
    snprintf(buf, cap, "%s%s", at, key);
    return buf;
}

int jfield_wrong_type(const char *at, const char *key, const char *wanted, struct json_object *got, struct arle_err *err)
{
    char path[64];
    return arle_err_param(err, -EPROTO, path_of(path, sizeof path, at, key), "'%s%s' must be %s, not %s", at, key, wanted,
                          json_kind(got));
}

int jfield_bool(struct json_object *obj, const char *at, const char *key, bool *out, struct arle_err *err)
{
    struct json_object *v;
    if (!jfield_get(obj, key, &v))
        return 0;
    if (!json_object_is_type(v, json_type_boolean))
        return jfield_wrong_type(at, key, "a boolean", v, err);
    *out = json_object_get_boolean(v);
    return 1;
}

int jfield_i64(struct json_object *obj, const char *at, const char *key, int64_t min, int64_t max, int64_t *out,
               struct arle_err *err)
{
    struct json_object *v;
    char path[64];
    if (!jfield_get(obj, key, &v))
        return 0;
    /* 16.0 is an integer for clients whose language knows only one kind of number. */
    double d = json_object_is_type(v, json_type_double) ? json_object_get_double(v) : 0.5;
    bool whole = fabs(d) < 9e15 && d == floor(d);
    if (!json_object_is_type(v, json_type_int) && !whole)
        return jfield_wrong_type(at, key, "an integer", v, err);
    int64_t i = whole ? (int64_t)d : json_object_get_int64(v);
    if (i < min || i > max)
        return arle_err_param(err, -ERANGE, path_of(path, sizeof path, at, key), "'%s%s' must be between %lld and %lld, not %s",
                              at, key, (long long)min, (long long)max, json_object_get_string(v));
    *out = i;
    return 1;
}

int jfield_f64(struct json_object *obj, const char *at, const char *key, double min, double max, double *out,
               struct arle_err *err)
{
    struct json_object *v;
    char path[64];
    if (!jfield_get(obj, key, &v))
        return 0;
    if (!json_object_is_type(v, json_type_int) && !json_object_is_type(v, json_type_double))
        return jfield_wrong_type(at, key, "a number", v, err);
    double d = json_object_get_double(v);
    if (!(d >= min && d <= max))
        return arle_err_param(err, -ERANGE, path_of(path, sizeof path, at, key), "'%s%s' must be between %g and %g, not %s", at,
                              key, min, max, json_object_get_string(v));
    *out = d;
    return 1;
}

int jfield_str(struct json_object *obj, const char *at, const char *key, const char **out, size_t *out_len,
               struct arle_err *err)
{
    struct json_object *v;
    if (!jfield_get(obj, key, &v))
        return 0;
    if (!json_object_is_type(v, json_type_string))
        return jfield_wrong_type(at, key, "a string", v, err);
    *out = json_object_get_string(v);
    if (out_len != NULL)
        *out_len = (size_t)json_object_get_string_len(v);
    return 1;
}

int jfield_array(struct json_object *obj, const char *at, const char *key, struct json_object **out, struct arle_err *err)
{
    struct json_object *v;
    if (!jfield_get(obj, key, &v))
        return 0;
    if (!json_object_is_type(v, json_type_array))
        return jfield_wrong_type(at, key, "an array", v, err);
    *out = v;
    return 1;
}

int jfield_object(struct json_object *obj, const char *at, const char *key, struct json_object **out, struct arle_err *err)
{
    struct json_object *v;
    if (!jfield_get(obj, key, &v))
        return 0;
    if (!json_object_is_type(v, json_type_object))
        return jfield_wrong_type(at, key, "an object", v, err);
    *out = v;
    return 1;
}
