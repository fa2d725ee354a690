/*
 * A growing byte string, and JSON text written into it. Failure is sticky: after the first failed allocation every
 * further call does nothing and `failed` stays set, so that a writer checks once, at the end.
 */
#ifndef ARLE_UTIL_SBUF_H
#define ARLE_UTIL_SBUF_H

#include <stdbool.h>
#include <stddef.h>

struct sbuf {
    char *p;        /* NUL-terminated once anything was added; NULL before */
    size_t n, cap;
    bool failed;
};
#define SBUF_INIT { NULL, 0, 0, false }

/** Frees the memory and makes it empty and usable again. */
void sbuf_fini(struct sbuf *b);
/** Makes it empty and keeps the memory; clears `failed`. */
void sbuf_reset(struct sbuf *b);
void sbuf_add(struct sbuf *b, const void *bytes, size_t n);
void sbuf_str(struct sbuf *b, const char *text);
void sbuf_char(struct sbuf *b, char c);
void sbuf_fmt(struct sbuf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/** Removes the first n bytes (all of them if there are fewer). */
void sbuf_drop(struct sbuf *b, size_t n);
/** The text, never NULL. Valid until the next change. */
const char *sbuf_text(const struct sbuf *b);

/** Appends the inside of a JSON string: quotes, backslashes and control characters escaped, the rest as it is. */
void sbuf_json_chars(struct sbuf *b, const char *text, size_t n);
/** Appends a whole JSON string, quotes included. */
void sbuf_json_str(struct sbuf *b, const char *text, size_t n);
/** As sbuf_json_str for NUL-terminated text; NULL becomes null. */
void sbuf_json_cstr(struct sbuf *b, const char *text);
/** Appends a number with enough digits to read the same float back; NaN and infinities become null. */
void sbuf_json_num(struct sbuf *b, double v);

#endif
