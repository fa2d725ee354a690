/*
 * Errors as values. Functions that can fail return 0 or a negative errno code and take `struct arle_err *err` last.
 * The place that understands the failure writes the text; callers pass it on. Header-only: plugins need no library.
 */
#ifndef ARLE_ERR_H
#define ARLE_ERR_H

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

struct arle_err {
    int code;          /* negative errno, 0 while unset */
    char param[64];    /* the field, tensor or key at fault; "" if none */
    char msg[512];     /* one line for a person: what, where, and the cure */
};

#define ARLE_ERR_INIT { 0, "", "" }

/** Stores the reason and returns `code`, so that callers can write `return arle_err_set(err, -EINVAL, ...)`. err may be NULL. */
static inline int __attribute__((format(printf, 3, 4)))
arle_err_set(struct arle_err *err, int code, const char *fmt, ...)
{
    if (err != NULL) {
        va_list ap;
        err->code = code;
        err->param[0] = '\0';
        va_start(ap, fmt);
        vsnprintf(err->msg, sizeof err->msg, fmt, ap);
        va_end(ap);
    }
    return code;
}

/** As arle_err_set, and names the field at fault in err->param. */
static inline int __attribute__((format(printf, 4, 5)))
arle_err_param(struct arle_err *err, int code, const char *param, const char *fmt, ...)
{
    if (err != NULL) {
        va_list ap;
        err->code = code;
        snprintf(err->param, sizeof err->param, "%s", param);
        va_start(ap, fmt);
        vsnprintf(err->msg, sizeof err->msg, fmt, ap);
        va_end(ap);
    }
    return code;
}

/** *out = a * b; -EOVERFLOW when it does not fit. For sizes that come from files and requests. */
static inline int arle_mul_size(size_t *out, size_t a, size_t b)
{
    return __builtin_mul_overflow(a, b, out) ? -EOVERFLOW : 0;
}

#ifdef __cplusplus
}
#endif
#endif
