/*
 * A strict JSON scanner over bytes in memory, for safetensors headers and their index. Why not the JSON library: headers
 * reach tens of megabytes, and a tensor that is named twice must be an error, where a library keeps the last one.
 * Nothing is allocated; a scan stops at the first fault and remembers where.
 */
#ifndef CORE_WEIGHTS_SCAN_H
#define CORE_WEIGHTS_SCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct scan {
    const char *p, *end, *start;
    const char *fault;          /* NULL, or what is wrong at p; static text */
};

void scan_init(struct scan *s, const char *data, size_t len);

/** Skips white space and takes the character c; otherwise a fault. */
bool scan_take(struct scan *s, char c);
/** Skips white space and takes c if it is next; no fault if it is not. */
bool scan_try(struct scan *s, char c);
/** True when only white space is left. */
bool scan_at_end(struct scan *s);

/**
 * Reads a string and decodes it into buf. Faults: longer than cap - 1 bytes, control characters or anything beyond ASCII
 * (names of tensors and files are plain text). *out_len excludes the closing NUL.
 */
bool scan_string(struct scan *s, char *buf, size_t cap, size_t *out_len);
/** Reads a non-negative integer below 2^63; signs, fractions and exponents are faults. */
bool scan_size(struct scan *s, uint64_t *out);
/** Skips any value, nested at most 32 deep. Strings in it may hold any bytes. */
bool scan_skip(struct scan *s);

/** Records a fault of the caller's own at the present place; returns false. */
bool scan_fail(struct scan *s, const char *fault);
/** Offset of the fault or of the next byte. */
size_t scan_offset(const struct scan *s);

#endif
