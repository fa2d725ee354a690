/* The JSON scanner of checkpoint headers; scan.h says why it exists. */
#include "weights/scan.h"
#include "util/hex.h"

#include <string.h>

#define MAX_DEPTH 32

void scan_init(struct scan *s, const char *data, size_t len)
{
    *s = (struct scan){ .p = data, .start = data, .end = data + len };
}

bool scan_fail(struct scan *s, const char *fault)
{
    if (s->fault == NULL)
        s->fault = fault;
    return false;
}

size_t scan_offset(const struct scan *s)
{
    return (size_t)(s->p - s->start);
}

static void skip_space(struct scan *s)
{
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\n' || *s->p == '\r' || *s->p == '\t'))
        s->p++;
}

bool scan_try(struct scan *s, char c)
{
    if (s->fault != NULL)
        return false;
    skip_space(s);
    if (s->p == s->end || *s->p != c)
        return false;
    s->p++;
    return true;
}

bool scan_take(struct scan *s, char c)
{
    if (scan_try(s, c))
        return true;
    switch (c) {
    case '{': return scan_fail(s, "expected {");
    case '}': return scan_fail(s, "expected , or }");
    case '[': return scan_fail(s, "expected [");
    case ']': return scan_fail(s, "expected , or ]");
    case ':': return scan_fail(s, "expected :");
    case '"': return scan_fail(s, "expected a string");
    default: return scan_fail(s, "unexpected character");
    }
}

bool scan_at_end(struct scan *s)
{
    skip_space(s);
    return s->fault == NULL && s->p == s->end;
}

/* The character after a backslash; -1 on a fault, and for what lies beyond printable ASCII. */
static int unescape(struct scan *s)
{
    if (s->p == s->end)
        return -1;
    char c = *s->p++;
    if (c == '"' || c == '\\' || c == '/')
        return c;
    if (c != 'u' || s->end - s->p < 4)
        return -1;
    int v = 0;
    for (int i = 0; i < 4; i++) {
        int d = hex_digit(s->p[i]);
        if (d < 0)
            return -1;
        v = v * 16 + d;
    }
    s->p += 4;
    return v;
}

bool scan_string(struct scan *s, char *buf, size_t cap, size_t *out_len)
{
    if (!scan_take(s, '"'))
        return false;
    for (size_t n = 0; s->p < s->end; n++) {
        int c = (unsigned char)*s->p++;
        if (c == '"') {
            buf[n] = '\0';
            *out_len = n;
            return true;
        }
        if (c == '\\')
            c = unescape(s);
        if (c < 0x20 || c > 0x7E)
            return scan_fail(s, "a name with characters beyond printable ASCII");
        if (n + 1 >= cap)
            return scan_fail(s, "a name that is too long");
        buf[n] = (char)c;
    }
    return scan_fail(s, "a string without end");
}

bool scan_size(struct scan *s, uint64_t *out)
{
    if (s->fault != NULL)
        return false;
    skip_space(s);
    if (s->p == s->end || *s->p < '0' || *s->p > '9')
        return scan_fail(s, "expected a whole number");
    bool leading_zero = *s->p == '0';
    uint64_t v = 0;
    int digits = 0;
    for (; s->p < s->end && *s->p >= '0' && *s->p <= '9'; s->p++, digits++) {
        if (v > (INT64_MAX - 9) / 10)
            return scan_fail(s, "a number that is too large");
        v = v * 10 + (uint64_t)(*s->p - '0');
    }
    if (leading_zero && digits > 1)
        return scan_fail(s, "a number with a leading zero");
    if (s->p < s->end && (*s->p == '.' || *s->p == 'e' || *s->p == 'E'))
        return scan_fail(s, "expected a whole number");
    *out = v;
    return true;
}

static bool skip_string(struct scan *s)
{
    if (!scan_take(s, '"'))
        return false;
    while (s->p < s->end) {
        char c = *s->p++;
        if (c == '"')
            return true;
        if (c == '\\' && s->p < s->end)
            s->p++;
    }
    return scan_fail(s, "a string without end");
}

/* Numbers, true, false, null: any run of the characters these are made of. */
static bool skip_word(struct scan *s)
{
    const char *from = s->p;
    while (s->p < s->end && (strchr("+-.", *s->p) != NULL || (*s->p >= '0' && *s->p <= '9')
                             || (*s->p >= 'a' && *s->p <= 'z') || *s->p == 'E') && *s->p != '\0')
        s->p++;
    return s->p > from ? true : scan_fail(s, "expected a value");
}

static bool skip_value(struct scan *s, int depth)
{
    if (depth > MAX_DEPTH)
        return scan_fail(s, "nested too deep");
    if (scan_try(s, '{')) {
        if (scan_try(s, '}'))
            return true;
        do {
            skip_space(s);
            if (!skip_string(s) || !scan_take(s, ':') || !skip_value(s, depth + 1))
                return false;
        } while (scan_try(s, ','));
        return scan_take(s, '}');
    }
    if (scan_try(s, '[')) {
        if (scan_try(s, ']'))
            return true;
        do {
            if (!skip_value(s, depth + 1))
                return false;
        } while (scan_try(s, ','));
        return scan_take(s, ']');
    }
    if (s->fault != NULL)
        return false;
    return s->p < s->end && *s->p == '"' ? skip_string(s) : skip_word(s);
}

bool scan_skip(struct scan *s)
{
    return skip_value(s, 0);
}
