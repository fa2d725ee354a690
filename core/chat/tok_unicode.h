/*
 * What the tokenizer needs of Unicode: a class per code point, canonical decomposition and composition, and UTF-8
 * decoding of text known to be valid. The tables follow the reference library, not the newest Unicode; see
 * tok_unicode_gen.py. Why not the distribution's utf8proc: it knows combining classes that the reference does not, and
 * ids would change with it.
 */
#ifndef ARLE_CHAT_TOK_UNICODE_H
#define ARLE_CHAT_TOK_UNICODE_H

#include <stddef.h>
#include <stdint.h>

enum {
    TOK_L = 1,      /* letter */
    TOK_M = 2,      /* combining mark */
    TOK_N = 4,      /* number */
    TOK_PS = 8,     /* punctuation or symbol */
    TOK_WS = 16,    /* White_Space */
    TOK_NFC = 32,   /* may change under NFC, or change what precedes it; text without any such code point is NFC */
};

struct tok_decomp {
    uint32_t cp, to[2];         /* one canonical step; to[1] = 0 for singletons */
};
struct tok_comp {
    uint32_t a, b, cp;          /* sorted by a, then b */
};
struct tok_ccc {
    uint32_t first, last, ccc;  /* canonical combining class of a run */
};

extern const uint16_t tok_prop_index[0x110000 / 128];
extern const uint8_t tok_prop_block[];
extern const struct tok_decomp tok_decomps[];
extern const struct tok_comp tok_comps[];
extern const struct tok_ccc tok_cccs[];
extern const size_t tok_n_decomps, tok_n_comps, tok_n_cccs;

/** TOK_* bits of a code point below 0x110000. */
static inline unsigned tok_prop(uint32_t cp)
{
    return tok_prop_block[(size_t)tok_prop_index[cp >> 7] * 128 + (cp & 127)];
}

/** Decodes one character of valid UTF-8; *len is 1..4. */
static inline uint32_t tok_utf8(const uint8_t *p, unsigned *len)
{
    if (p[0] < 0x80) {
        *len = 1;
        return p[0];
    }
    if (p[0] < 0xE0) {
        *len = 2;
        return (p[0] & 0x1Fu) << 6 | (p[1] & 0x3Fu);
    }
    if (p[0] < 0xF0) {
        *len = 3;
        return (p[0] & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    }
    *len = 4;
    return (p[0] & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
}

/** Writes a code point as UTF-8 and returns its length. */
static inline unsigned tok_utf8_put(uint8_t *p, uint32_t cp)
{
    if (cp < 0x80) {
        p[0] = (uint8_t)cp;
        return 1;
    }
    if (cp < 0x800) {
        p[0] = (uint8_t)(0xC0 | cp >> 6);
        p[1] = (uint8_t)(0x80 | (cp & 0x3F));
        return 2;
    }
    if (cp < 0x10000) {
        p[0] = (uint8_t)(0xE0 | cp >> 12);
        p[1] = (uint8_t)(0x80 | (cp >> 6 & 0x3F));
        p[2] = (uint8_t)(0x80 | (cp & 0x3F));
        return 3;
    }
    p[0] = (uint8_t)(0xF0 | cp >> 18);
    p[1] = (uint8_t)(0x80 | (cp >> 12 & 0x3F));
    p[2] = (uint8_t)(0x80 | (cp >> 6 & 0x3F));
    p[3] = (uint8_t)(0x80 | (cp & 0x3F));
    return 4;
}

/**
 * Length of the UTF-8 character at p, or 0 if the bytes are no character. When it is 0, *part is the length (>= 1) of
 * the maximal broken part, and *cut tells that the text ends inside what may still become a character.
 */
unsigned tok_utf8_check(const uint8_t *p, const uint8_t *end, unsigned *part, int *cut);

#endif
