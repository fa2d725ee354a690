/*
 * Stop strings: several literals searched in a stream of bytes, across the borders of the pieces it arrives in. Text is
 * passed on as soon as it cannot be the start of a stop any more; the stop itself and what follows it never is.
 */
#ifndef ARLE_CHAT_STOPSTR_H
#define ARLE_CHAT_STOPSTR_H

#include <stddef.h>

#include <arle/err.h>

struct stop_set;        /* the compiled strings; constant, shared by the choices of a request */

struct stop_matcher {
    const struct stop_set *set;     /* borrowed; NULL passes everything */
    unsigned state;                 /* node of the automaton; its depth is the number of bytes held back */
    int matched;                    /* index of the stop that ended the stream, or -1 */
    char *buf;
    size_t cap;
};

/**
 * Compiles stop strings.
 *
 * stops, lens  [n_stops] the strings (any bytes) and their lengths; copied. Empty strings are refused with -EINVAL.
 * Returns 0, -EINVAL, -E2BIG (more than 1 MiB in all), -ENOMEM. The caller owns *out_set. Thread: any; the set is
 * constant.
 */
int stop_set_create(struct stop_set **out_set, const char *const *stops, const size_t *lens, size_t n_stops,
                    struct arle_err *err);
void stop_set_destroy(struct stop_set *set);

/** Prepares a matcher in the caller's memory. set may be NULL (no stops). */
void stop_matcher_init(struct stop_matcher *m, const struct stop_set *set);
void stop_matcher_fini(struct stop_matcher *m);

/**
 * Feeds bytes; yields those that are certain to lie before any stop.
 *
 * *out_text    [*out_len] bytes, NUL after them, valid until the next call on m. Held-back bytes of earlier calls come
 *              first. Only the longest suffix that is a proper prefix of some stop is held back.
 * *out_matched index of the stop found, or -1. The stop that ends first in the stream wins; of those that end at the
 *              same byte, the longest (it starts first). Once a stop is found, further input is swallowed and the
 *              index stays.
 *
 * If the input is valid UTF-8 in whole characters and so are the stops, the output is too.
 * Linear time in the input. Returns 0 or -ENOMEM (then nothing was consumed). Thread: one at a time.
 */
int stop_matcher_push(struct stop_matcher *m, const char *text, size_t len, const char **out_text, size_t *out_len,
                      int *out_matched);

/** End of the stream: yields what was held back (nothing once a stop was found). Ready for a new stream after. */
int stop_matcher_flush(struct stop_matcher *m, const char **out_text, size_t *out_len);

#endif
