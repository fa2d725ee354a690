/* The growing byte string of sbuf.h. Used by the text plane, the HTTP replies and the control socket. */
#include "util/sbuf.h"

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool reserve(struct sbuf *b, size_t more)
{
    if (b->failed)
        return false;
    if (more < b->cap - b->n)       /* strictly: one byte stays for the NUL */
        return true;
    size_t want;
    if (__builtin_add_overflow(b->n, more, &want) || want > SIZE_MAX / 2 - 64) {
        b->failed = true;
        return false;
    }
    size_t cap = b->cap < 64 ? 64 : b->cap;
    while (cap <= want)
        cap *= 2;
    char *p = realloc(b->p, cap);
    if (p == NULL) {
        b->failed = true;
        return false;
    }
    b->p = p;
    b->cap = cap;
    return true;
}

void sbuf_fini(struct sbuf *b)
{
    free(b->p);
    *b = (struct sbuf)SBUF_INIT;
}

void sbuf_reset(struct sbuf *b)
{
    b->n = 0;
    b->failed = false;
    if (b->p != NULL)
        b->p[0] = '\0';
}

void sbuf_add(struct sbuf *b, const void *bytes, size_t n)
{
    if (!reserve(b, n))
        return;
    if (n > 0)
        memcpy(b->p + b->n, bytes, n);
    b->n += n;
    b->p[b->n] = '\0';
}

void sbuf_str(struct sbuf *b, const char *text)
{
    sbuf_add(b, text, strlen(text));
}

void sbuf_char(struct sbuf *b, char c)
{
    sbuf_add(b, &c, 1);
}

void sbuf_fmt(struct sbuf *b, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int need = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (need < 0 || !reserve(b, (size_t)need)) {
        b->failed = true;
        return;
    }
    va_start(ap, fmt);
    vsnprintf(b->p + b->n, (size_t)need + 1, fmt, ap);
    va_end(ap);
    b->n += (size_t)need;
}

void sbuf_drop(struct sbuf *b, size_t n)
{
    if (n > b->n)
        n = b->n;
    if (n == 0)
        return;
    memmove(b->p, b->p + n, b->n - n);
    b->n -= n;
    b->p[b->n] = '\0';
}

const char *sbuf_text(const struct sbuf *b)
{
    return b->p != NULL ? b->p : "";
}

void sbuf_json_chars(struct sbuf *b, const char *text, size_t n)
{
    static const char hex[] = "0123456789abcdef";
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f)
            continue;
        sbuf_add(b, text + from, i - from);
        from = i + 1;
        char esc[6] = { '\\', (char)c };
        size_t len = 2;
        switch (c) {
        case '\n': esc[1] = 'n'; break;
        case '\t': esc[1] = 't'; break;
        case '\r': esc[1] = 'r'; break;
        case '"': case '\\': break;
        default:
            memcpy(esc, "\\u00", 4);
            esc[4] = hex[c >> 4];
            esc[5] = hex[c & 15];
            len = 6;
        }
        sbuf_add(b, esc, len);
    }
    sbuf_add(b, text + from, n - from);
}

void sbuf_json_str(struct sbuf *b, const char *text, size_t n)
{
    sbuf_char(b, '"');
    sbuf_json_chars(b, text, n);
    sbuf_char(b, '"');
}

void sbuf_json_cstr(struct sbuf *b, const char *text)
{
    if (text == NULL)
        sbuf_str(b, "null");
    else
        sbuf_json_str(b, text, strlen(text));
}

void sbuf_json_num(struct sbuf *b, double v)
{
    if (!isfinite(v))
        sbuf_str(b, "null");
    else
        sbuf_fmt(b, "%.9g", v);
}
