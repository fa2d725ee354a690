/*
 * Argument coercion of coerce.h. Text that already is JSON is passed on byte for byte, so that numbers of any length and
 * the model's own spacing survive; only what must change is rewritten.
 */
#include "chat/coerce.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <json-c/json.h>

#define MAX_DEPTH 64

/* ---- schema -> plan ---- */

static bool starts(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

static bool one_of(const char *s, const char *const *words)
{
    for (; *words != NULL; words++)
        if (strcmp(s, *words) == 0)
            return true;
    return false;
}

static int type_of_word(const char *word)
{
    static const char *const booleans[] = { "boolean", "bool", "binary", NULL };
    static const char *const objects[] = { "object", "array", "arr", NULL };
    char low[24];
    size_t n = 0;
    for (; word[n] != '\0' && n + 1 < sizeof low; n++)
        low[n] = (char)tolower((unsigned char)word[n]);
    low[n] = '\0';
    if (starts(low, "int") || starts(low, "uint") || starts(low, "long") || starts(low, "short") || starts(low, "unsigned"))
        return COERCE_INTEGER;
    if (starts(low, "num") || starts(low, "float") || starts(low, "double"))
        return COERCE_NUMBER;
    if (one_of(low, booleans))
        return COERCE_BOOLEAN;
    if (one_of(low, objects) || starts(low, "dict") || starts(low, "list"))
        return COERCE_JSON;
    return COERCE_STRING;
}

static void plan_add(struct coerce_plan *plan, int type)
{
    if (plan->n < sizeof plan->types)
        plan->types[plan->n++] = (unsigned char)type;
}

static void plan_add_word(struct coerce_plan *plan, struct json_object *word)
{
    const char *w = json_object_is_type(word, json_type_string) ? json_object_get_string(word) : "string";
    if (strcmp(w, "null") != 0)         /* the text "null" is null under every plan */
        plan_add(plan, type_of_word(w));
}

static void plan_add_schema(struct coerce_plan *plan, struct json_object *schema, int depth)
{
    struct json_object *v;
    if (depth > 4 || !json_object_is_type(schema, json_type_object))
        return;
    if (json_object_object_get_ex(schema, "type", &v)) {
        if (!json_object_is_type(v, json_type_array)) {
            plan_add_word(plan, v);
            return;
        }
        for (size_t i = 0; i < json_object_array_length(v); i++)
            plan_add_word(plan, json_object_array_get_idx(v, i));
        return;
    }
    if ((json_object_object_get_ex(schema, "anyOf", &v) || json_object_object_get_ex(schema, "oneOf", &v)) &&
        json_object_is_type(v, json_type_array))
        for (size_t i = 0; i < json_object_array_length(v); i++)
            plan_add_schema(plan, json_object_array_get_idx(v, i), depth + 1);
}

static struct json_object *parameter_schema(struct json_object *tools, const char *name, const char *key)
{
    if (!json_object_is_type(tools, json_type_array))
        return NULL;
    for (size_t i = 0; i < json_object_array_length(tools); i++) {
        struct json_object *tool = json_object_array_get_idx(tools, i), *fn, *v;
        if (!json_object_is_type(tool, json_type_object))
            continue;
        if (!json_object_object_get_ex(tool, "function", &fn) || !json_object_is_type(fn, json_type_object))
            fn = tool;
        if (!json_object_object_get_ex(fn, "name", &v) || !json_object_is_type(v, json_type_string) ||
            strcmp(json_object_get_string(v), name) != 0)
            continue;
        if (!json_object_object_get_ex(fn, "parameters", &v) && !json_object_object_get_ex(fn, "input_schema", &v))
            return NULL;
        if (!json_object_is_type(v, json_type_object) || !json_object_object_get_ex(v, "properties", &v) ||
            !json_object_is_type(v, json_type_object) || !json_object_object_get_ex(v, key, &v))
            return NULL;
        return v;
    }
    return NULL;
}

struct coerce_plan coerce_plan_for(struct json_object *tools, const char *name, const char *key)
{
    struct coerce_plan plan = { 0 };
    struct json_object *schema = parameter_schema(tools, name, key);
    if (schema != NULL)
        plan_add_schema(&plan, schema, 0);
    if (plan.n == 0)
        plan_add(&plan, COERCE_STRING);
    return plan;
}

bool coerce_is_string(const struct coerce_plan *plan)
{
    return plan->n == 0 || plan->types[0] == COERCE_STRING;
}

/* ---- literals: JSON, and what Python prints ---- */

struct lit {
    const char *p, *end;
    bool python;            /* also accept Python spellings */
    struct sbuf *out;       /* NULL: only judge */
};

static bool literal(struct lit *l, int depth);

static void put(struct lit *l, const void *p, size_t n)
{
    if (l->out != NULL)
        sbuf_add(l->out, p, n);
}

static void skip_ws(struct lit *l)
{
    while (l->p < l->end && (*l->p == ' ' || *l->p == '\t' || *l->p == '\n' || *l->p == '\r'))
        l->p++;
}

static bool take(struct lit *l, char c)
{
    skip_ws(l);
    if (l->p == l->end || *l->p != c)
        return false;
    l->p++;
    return true;
}

static bool word(struct lit *l, const char *w, const char *as)
{
    size_t n = strlen(w);
    if ((size_t)(l->end - l->p) < n || memcmp(l->p, w, n) != 0)
        return false;
    if (l->p + n < l->end && (isalnum((unsigned char)l->p[n]) || l->p[n] == '_'))
        return false;
    l->p += n;
    put(l, as, strlen(as));
    return true;
}

static bool digits(struct lit *l)
{
    const char *from = l->p;
    while (l->p < l->end && isdigit((unsigned char)*l->p))
        l->p++;
    return l->p > from;
}

static bool number(struct lit *l)
{
    const char *from = l->p;
    if (l->p < l->end && *l->p == '-')
        l->p++;
    const char *int_part = l->p;
    if (!digits(l) || (*int_part == '0' && l->p - int_part > 1))
        return false;
    if (l->p < l->end && *l->p == '.') {
        l->p++;
        if (!digits(l))
            return false;
    }
    if (l->p < l->end && (*l->p == 'e' || *l->p == 'E')) {
        l->p++;
        if (l->p < l->end && (*l->p == '+' || *l->p == '-'))
            l->p++;
        if (!digits(l))
            return false;
    }
    put(l, from, (size_t)(l->p - from));
    return true;
}

static bool hex4(const char *p, const char *end)
{
    if (end - p < 4)
        return false;
    for (int i = 0; i < 4; i++)
        if (!isxdigit((unsigned char)p[i]))
            return false;
    return true;
}

static bool escape(struct lit *l, char quote)
{
    char c = l->p < l->end ? *l->p++ : '\0';
    if (c == 'u' && hex4(l->p, l->end)) {
        put(l, "\\u", 2);
        put(l, l->p, 4);
        l->p += 4;
        return true;
    }
    if (c != '\0' && strchr("\"\\/bfnrt", c) != NULL) {
        char esc[2] = { '\\', c };
        put(l, esc, 2);
        return true;
    }
    if (quote == '\'' && c == '\'') {
        put(l, "'", 1);
        return true;
    }
    return false;
}

static bool string(struct lit *l)
{
    char quote = *l->p++;
    put(l, "\"", 1);
    while (l->p < l->end && *l->p != quote) {
        unsigned char c = (unsigned char)*l->p++;
        if (c < 0x20)
            return false;
        if (c == '\\') {
            if (!escape(l, quote))
                return false;
        } else if (c == '"') {
            put(l, "\\\"", 2);
        } else {
            put(l, &c, 1);
        }
    }
    if (l->p == l->end)
        return false;
    l->p++;
    put(l, "\"", 1);
    return true;
}

/* Elements up to `close`; objects have keys. Python allows a trailing comma and tuples. */
static bool list(struct lit *l, char close, const char *out_pair, int depth)
{
    bool object = out_pair[0] == '{';
    l->p++;
    put(l, out_pair, 1);
    for (bool first = true; !take(l, close); first = false) {
        if (!first && !take(l, ','))
            return false;
        if (!first && l->python && take(l, close))
            break;
        if (!first)
            put(l, ", ", 2);
        skip_ws(l);
        if (object) {
            if (l->p == l->end || (*l->p != '"' && !(l->python && *l->p == '\'')) || !string(l) || !take(l, ':'))
                return false;
            put(l, ": ", 2);
        }
        if (!literal(l, depth + 1))
            return false;
    }
    put(l, out_pair + 1, 1);
    return true;
}

static bool literal(struct lit *l, int depth)
{
    skip_ws(l);
    if (l->p == l->end || depth > MAX_DEPTH)
        return false;
    switch (*l->p) {
    case '{': return list(l, '}', "{}", depth);
    case '[': return list(l, ']', "[]", depth);
    case '(': return l->python && list(l, ')', "[]", depth);
    case '"': return string(l);
    case '\'': return l->python && string(l);
    case 't': return word(l, "true", "true");
    case 'f': return word(l, "false", "false");
    case 'n': return word(l, "null", "null");
    case 'T': return l->python && word(l, "True", "true");
    case 'F': return l->python && word(l, "False", "false");
    case 'N': return l->python && word(l, "None", "null");
    default: return number(l);
    }
}

static bool whole_literal(struct lit *l)
{
    if (!literal(l, 0))
        return false;
    skip_ws(l);
    return l->p == l->end;
}

bool coerce_is_json(const char *text, size_t len)
{
    struct lit l = { .p = text, .end = text + len };
    return whole_literal(&l);
}

bool coerce_literal(const char *text, size_t len, struct sbuf *out)
{
    if (coerce_is_json(text, len)) {
        sbuf_add(out, text, len);
        return true;
    }
    struct lit judge = { .p = text, .end = text + len, .python = true };
    if (!whole_literal(&judge))
        return false;
    struct lit write = { .p = text, .end = text + len, .python = true, .out = out };
    return whole_literal(&write);
}

/* ---- text -> value ---- */

static void trim(const char **text, size_t *len)
{
    while (*len > 0 && isspace((unsigned char)**text))
        (*text)++, (*len)--;
    while (*len > 0 && isspace((unsigned char)(*text)[*len - 1]))
        (*len)--;
}

static bool same_word(const char *text, size_t len, const char *word_)
{
    return len == strlen(word_) && strncasecmp(text, word_, len) == 0;
}

static bool put_integer(const char *text, size_t len, struct sbuf *out)
{
    trim(&text, &len);
    bool minus = len > 0 && *text == '-';
    if (len > 0 && (*text == '-' || *text == '+'))
        text++, len--;
    if (len == 0 || len > 4000)
        return false;
    for (size_t i = 0; i < len; i++)
        if (!isdigit((unsigned char)text[i]))
            return false;
    while (len > 1 && *text == '0')
        text++, len--;
    if (minus && !(len == 1 && *text == '0'))
        sbuf_char(out, '-');
    sbuf_add(out, text, len);
    return true;
}

static bool put_number(const char *text, size_t len, struct sbuf *out)
{
    if (put_integer(text, len, out))
        return true;
    trim(&text, &len);
    struct lit l = { .p = text, .end = text + len };
    char buf[64], *end;
    if (len == 0 || len >= sizeof buf)
        return false;
    memcpy(buf, text, len);
    buf[len] = '\0';
    if (strpbrk(buf, "xXpPnN") != NULL)         /* strtod also reads hexadecimal, inf and nan */
        return false;
    double v = strtod(buf, &end);
    if (*end != '\0' || !isfinite(v))
        return false;
    if (number(&l) && l.p == l.end)
        sbuf_add(out, text, len);
    else
        sbuf_fmt(out, "%.17g", v);
    return true;
}

static bool put_boolean(const char *text, size_t len, bool only_choice, struct sbuf *out)
{
    trim(&text, &len);
    bool yes = same_word(text, len, "true");
    if (!yes && !only_choice && !same_word(text, len, "false"))
        return false;
    sbuf_str(out, yes ? "true" : "false");
    return true;
}

static bool put_typed(int type, const char *text, size_t len, bool only_choice, struct sbuf *out)
{
    switch (type) {
    case COERCE_INTEGER: return put_integer(text, len, out);
    case COERCE_NUMBER: return put_number(text, len, out);
    case COERCE_JSON: return coerce_literal(text, len, out);
    case COERCE_BOOLEAN: return put_boolean(text, len, only_choice, out);
    default:
        sbuf_json_str(out, text, len);
        return true;
    }
}

void coerce_value(const struct coerce_plan *plan, const char *text, size_t len, struct sbuf *out)
{
    if (same_word(text, len, "null")) {
        sbuf_str(out, "null");
        return;
    }
    for (unsigned i = 0; i < plan->n; i++)
        if (put_typed(plan->types[i], text, len, plan->n == 1, out))
            return;
    sbuf_json_str(out, text, len);
}
