/*
 * Streaming detokeniser: ids in, whole UTF-8 characters out. One per sequence; the concatenation of everything pushed
 * and flushed equals tokenizer_decode(..., TOK_LOSSY_UTF8) of the same ids, whatever the split.
 */
#ifndef ARLE_CHAT_DETOK_H
#define ARLE_CHAT_DETOK_H

#include "chat/tokenizer.h"

struct detok {
    const struct tokenizer *tok;    /* borrowed */
    unsigned flags;
    unsigned n_held;                /* bytes of an unfinished character, 0..3 */
    unsigned char held[4];
    char *buf;
    size_t cap;
};

/**
 * Prepares a detokeniser in the caller's memory. flags: 0 or TOK_SKIP_SPECIAL. Borrows tok until detok_fini.
 * Allocates nothing until the first push.
 */
void detok_init(struct detok *d, const struct tokenizer *tok, unsigned flags);

/** Frees its buffer. A zeroed struct is fine. */
void detok_fini(struct detok *d);

/**
 * Text that became certain with this token.
 *
 * id         any id; one that names no token, or a special one under TOK_SKIP_SPECIAL, yields nothing
 * *out_text  [*out_len] whole characters of valid UTF-8, NUL after them; valid until the next call on d
 *
 * Up to 3 trailing bytes that may still become a character are held back. Bytes that cannot be UTF-8 any more yield
 * U+FFFD, one per maximal broken part, as soon as that is certain.
 * Returns 0 or -ENOMEM (then nothing was consumed). Thread: one at a time.
 */
int detok_push(struct detok *d, int32_t id, const char **out_text, size_t *out_len);

/** As detok_push, for bytes that did not come from a token of this tokenizer. */
int detok_push_bytes(struct detok *d, const char *bytes, size_t len, const char **out_text, size_t *out_len);

/** End of the stream: a held unfinished character yields one U+FFFD. Otherwise empty. Ready for a new stream after. */
int detok_flush(struct detok *d, const char **out_text, size_t *out_len);

#endif
