/* Typed JSON reading of jfield.h. Users: the request readers of the HTTP dialects, the messages of a chat, control lines. */
#include "util/jfield.h"
#include "util/hex.h"

#include <ctype.h>
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

/*
 * What json-c lets through even when strict: 'single quotes', control characters in strings, halves of surrogate pairs
 * (which it replaces), names with a NUL (which it cuts), and numbers such as 1. and -01. All else is left to json-c.
 */
struct lexer {
    const char *text;
    size_t len, at;
    const char *fault;
};

/* Value of the four hexadecimal digits at `at`, or -1. */
static int hex4(const struct lexer *lx, size_t at)
{
    int v = 0;
    if (lx->len < 4 || at > lx->len - 4)
        return -1;
    for (size_t i = at; i < at + 4; i++) {
        int digit = hex_digit(lx->text[i]);
        if (digit < 0)
            return -1;
        v = v * 16 + digit;
    }
    return v;
}

/* The escape whose backslash stands at lx->at. Returns its code unit, or -1 where it is none. */
static int lex_escape(struct lexer *lx)
{
    int unit = lx->at + 1 < lx->len && lx->text[lx->at + 1] == 'u' ? hex4(lx, lx->at + 2) : -1;
    if (unit < 0) {
        lx->at += 2;
        return -1;
    }
    if (unit < 0xd800 || unit > 0xdfff) {
        lx->at += 6;
        return unit;
    }
    bool pair = unit < 0xdc00 && lx->at + 7 < lx->len && memcmp(lx->text + lx->at + 6, "\\u", 2) == 0;
    int low = pair ? hex4(lx, lx->at + 8) : -1;
    if (low < 0xdc00 || low > 0xdfff)
        lx->fault = "half of a surrogate pair";
    lx->at += 12;
    return unit;
}

static void lex_string(struct lexer *lx)
{
    bool nul = false;
    for (lx->at++; lx->at < lx->len && lx->text[lx->at] != '"' && lx->fault == NULL;) {
        if (lx->text[lx->at] == '\\')
            nul |= lex_escape(lx) == 0;
        else if ((unsigned char)lx->text[lx->at] < 0x20)
            lx->fault = "a control character in a string";
        else
            lx->at++;
    }
    if (lx->fault != NULL || lx->at >= lx->len)
        return;
    lx->at++;
    size_t next = lx->at;
    while (nul && next < lx->len && strchr(" \t\r\n", lx->text[next]) != NULL)
        next++;
    if (nul && next < lx->len && lx->text[next] == ':')
        lx->fault = "a name with a NUL character";
}

static size_t digits(struct lexer *lx)
{
    size_t from = lx->at;
    while (lx->at < lx->len && isdigit((unsigned char)lx->text[lx->at]))
        lx->at++;
    return lx->at - from;
}

static bool lex_char(struct lexer *lx, const char *set)
{
    bool found = lx->at < lx->len && lx->text[lx->at] != '\0' && strchr(set, lx->text[lx->at]) != NULL;
    lx->at += found;
    return found;
}

static void lex_number(struct lexer *lx)
{
    bool minus = lex_char(lx, "-");
    if (minus && lx->at < lx->len && lx->text[lx->at] == 'I')
        return;                         /* -Infinity: out of every field's range */
    bool good = lex_char(lx, "0") ? digits(lx) == 0 : digits(lx) > 0;
    if (good && lex_char(lx, "."))
        good = digits(lx) > 0;
    if (good && lex_char(lx, "eE")) {
        lex_char(lx, "+-");
        good = digits(lx) > 0;
    }
    if (!good)
        lx->fault = "a malformed number";
}

/* NULL, or what is wrong at *at. */
static const char *lexical_fault(const char *text, size_t len, size_t *at)
{
    struct lexer lx = { .text = text, .len = len };
    while (lx.at < len && lx.fault == NULL) {
        *at = lx.at;
        char c = text[lx.at];
        if (c == '"')
            lex_string(&lx);
        else if (c == '-' || isdigit((unsigned char)c))
            lex_number(&lx);
        else if (c == '\'')
            lx.fault = "strings stand in double quotes";
        else if (isalpha((unsigned char)c))
            while (lx.at < len && isalnum((unsigned char)text[lx.at]))
                lx.at++;
        else
            lx.at++;
    }
    return lx.fault;
}

int json_text_parse(const char *text, size_t len, struct json_object **out, struct arle_err *err)
{
    size_t bad = utf8_invalid_at(text, len);
    if (bad < len)
        return arle_err_set(err, -EILSEQ, "the body is not valid UTF-8 at byte %zu", bad);
    if (memchr(text, '\0', len) != NULL)       /* json-c would take it for the end */
        return arle_err_set(err, -EBADMSG, "the JSON holds a NUL byte");
    const char *fault = lexical_fault(text, len, &bad);
    if (fault != NULL)
        return arle_err_set(err, -EBADMSG, "not valid JSON at byte %zu: %s", bad, fault);
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
    bool beyond = !whole && (i == INT64_MIN || (i > 0 && json_object_get_uint64(v) > INT64_MAX));   /* json-c clamps */
    if (beyond || i < min || i > max)
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
    const char *text = json_object_get_string(v);
    size_t len = (size_t)json_object_get_string_len(v);
    char path[64];
    if (out_len == NULL && memchr(text, '\0', len) != NULL)
        return arle_err_param(err, -EINVAL, path_of(path, sizeof path, at, key), "'%s%s' holds a NUL character", at, key);
    *out = text;
    if (out_len != NULL)
        *out_len = len;
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
