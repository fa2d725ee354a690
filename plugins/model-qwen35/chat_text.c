/* Values as text, the way the chat templates' language writes them. See chat_text.h. */
#include "chat_text.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void text_add(struct text *t, const char *p, size_t n)
{
    if (t->failed || n == 0)
        return;
    if (n > t->cap - t->n) {
        size_t cap = t->cap ? t->cap : 256;
        while (cap - t->n < n) {
            if (cap > SIZE_MAX / 2) {
                t->failed = true;
                return;
            }
            cap *= 2;
        }
        char *q = realloc(t->p, cap);
        if (q == NULL) {
            t->failed = true;
            return;
        }
        t->p = q;
        t->cap = cap;
    }
    memcpy(t->p + t->n, p, n);
    t->n += n;
}

void text_str(struct text *t, const char *s)
{
    text_add(t, s, strlen(s));
}

void text_free(struct text *t)
{
    free(t->p);
    *t = (struct text){ 0 };
}

/* ---- spans ---------------------------------------------------------------------------------------------------------- */

/* Bytes of the white space character at p (Python's str.isspace), 0 if there is none. */
static size_t space_len(const unsigned char *p, size_t n)
{
    if (n == 0)
        return 0;
    if ((p[0] >= 0x09 && p[0] <= 0x0D) || (p[0] >= 0x1C && p[0] <= 0x20))
        return 1;
    if (n >= 2 && p[0] == 0xC2)
        return p[1] == 0x85 || p[1] == 0xA0 ? 2 : 0;
    if (n < 3)
        return 0;
    unsigned c = (p[0] & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    if (p[0] < 0xE1 || p[0] > 0xE3 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80)
        return 0;
    bool space = c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F
                 || c == 0x3000;
    return space ? 3 : 0;
}

struct span span_strip(struct span s)
{
    size_t k;
    while ((k = space_len((const unsigned char *)s.p, s.n)) > 0) {
        s.p += k;
        s.n -= k;
    }
    for (;;) {
        size_t len = 0;
        for (size_t w = 1; w <= 3 && w <= s.n && len == 0; w++)
            if (space_len((const unsigned char *)s.p + s.n - w, w) == w)
                len = w;
        if (len == 0)
            return s;
        s.n -= len;
    }
}

struct span span_lstrip_newlines(struct span s)
{
    for (; s.n > 0 && s.p[0] == '\n'; s.n--)
        s.p++;
    return s;
}

struct span span_rstrip_newlines(struct span s)
{
    while (s.n > 0 && s.p[s.n - 1] == '\n')
        s.n--;
    return s;
}

const char *span_first(struct span s, const char *word)
{
    size_t len = strlen(word);
    const char *end = s.p + s.n;
    for (const char *p = s.p; (size_t)(end - p) >= len && (p = memchr(p, word[0], (size_t)(end - p))) != NULL; p++)
        if ((size_t)(end - p) >= len && memcmp(p, word, len) == 0)
            return p;
    return NULL;
}

const char *span_last(struct span s, const char *word)
{
    const char *last = NULL;
    size_t len = strlen(word);
    for (const char *p; (p = span_first(s, word)) != NULL; s.n -= (size_t)(p - s.p) + len, s.p = p + len)
        last = p;
    return last;
}

bool span_starts(struct span s, const char *word)
{
    return s.n >= strlen(word) && memcmp(s.p, word, strlen(word)) == 0;
}

bool span_ends(struct span s, const char *word)
{
    size_t n = strlen(word);
    return s.n >= n && memcmp(s.p + s.n - n, word, n) == 0;
}

/* ---- values --------------------------------------------------------------------------------------------------------- */

static void zeros(struct text *t, int n)
{
    while (n-- > 0)
        text_add(t, "0", 1);
}

/* repr(float): the shortest digits that read back the same; exponents from 1e16 and below 1e-4. */
static void float_text(struct text *t, double v, bool json)
{
    if (!isfinite(v)) {
        text_str(t, isnan(v) ? (json ? "NaN" : "nan") : v > 0 ? (json ? "Infinity" : "inf") : (json ? "-Infinity" : "-inf"));
        return;
    }
    char e[40], digits[24];
    int prec = 0;
    do
        snprintf(e, sizeof e, "%.*e", prec, v);
    while (strtod(e, NULL) != v && ++prec < 17);

    int n = 0;
    const char *p = e + (e[0] == '-');
    for (; *p != 'e'; p++)
        if (*p >= '0' && *p <= '9')
            digits[n++] = *p;
    int exp = atoi(p + 1);
    while (n > 1 && digits[n - 1] == '0')
        n--;

    if (signbit(v))
        text_add(t, "-", 1);
    if (exp < -4 || exp >= 16) {
        char tail[16];
        snprintf(tail, sizeof tail, "e%c%02d", exp < 0 ? '-' : '+', abs(exp));
        text_add(t, digits, 1);
        text_add(t, ".", n > 1);
        text_add(t, digits + 1, (size_t)n - 1);
        text_str(t, tail);
    } else if (exp < 0) {
        text_str(t, "0.");
        zeros(t, -exp - 1);
        text_add(t, digits, (size_t)n);
    } else if (n <= exp + 1) {
        text_add(t, digits, (size_t)n);
        zeros(t, exp + 1 - n);
        text_str(t, ".0");
    } else {
        text_add(t, digits, (size_t)exp + 1);
        text_add(t, ".", 1);
        text_add(t, digits + exp + 1, (size_t)(n - exp - 1));
    }
}

static void json_string(struct text *t, const char *p, size_t n)
{
    text_add(t, "\"", 1);
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)p[i];
        if (c >= 0x20 && c != '"' && c != '\\')
            continue;
        char esc[8] = { '\\', 0 };
        switch (c) {
        case '"': esc[1] = '"'; break;
        case '\\': esc[1] = '\\'; break;
        case '\n': esc[1] = 'n'; break;
        case '\r': esc[1] = 'r'; break;
        case '\t': esc[1] = 't'; break;
        case '\b': esc[1] = 'b'; break;
        case '\f': esc[1] = 'f'; break;
        default: snprintf(esc, sizeof esc, "\\u%04x", c);
        }
        text_add(t, p + from, i - from);
        text_str(t, esc);
        from = i + 1;
    }
    text_add(t, p + from, n - from);
    text_add(t, "\"", 1);
}

static void json_list(struct text *t, struct json_object *v)
{
    text_add(t, "[", 1);
    for (size_t i = 0; i < json_object_array_length(v); i++) {
        if (i > 0)
            text_add(t, ", ", 2);
        text_json(t, json_object_array_get_idx(v, i));
    }
    text_add(t, "]", 1);
}

static void json_map(struct text *t, struct json_object *v)
{
    const char *sep = "{";
    json_object_object_foreach(v, key, value) {
        text_str(t, sep);
        json_string(t, key, strlen(key));
        text_add(t, ": ", 2);
        text_json(t, value);
        sep = ", ";
    }
    text_str(t, sep[0] == '{' ? "{}" : "}");
}

void text_json(struct text *t, struct json_object *v)
{
    switch (json_object_get_type(v)) {
    case json_type_null: text_str(t, "null"); break;
    case json_type_boolean: text_str(t, json_object_get_boolean(v) ? "true" : "false"); break;
    case json_type_double: float_text(t, json_object_get_double(v), true); break;
    case json_type_int: text_str(t, json_object_to_json_string(v)); break;
    case json_type_string: json_string(t, json_object_get_string(v), (size_t)json_object_get_string_len(v)); break;
    case json_type_array: json_list(t, v); break;
    case json_type_object: json_map(t, v); break;
    }
}

void text_python(struct text *t, struct json_object *v)
{
    switch (json_object_get_type(v)) {
    case json_type_null: text_str(t, "None"); break;
    case json_type_boolean: text_str(t, json_object_get_boolean(v) ? "True" : "False"); break;
    case json_type_double: float_text(t, json_object_get_double(v), false); break;
    case json_type_string: text_add(t, json_object_get_string(v), (size_t)json_object_get_string_len(v)); break;
    default: text_json(t, v);
    }
}
