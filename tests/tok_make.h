/*
 * Makes small tokenizer.json texts for the tokenizer's tests: the 256 byte symbols (ids 0..255), then the products of
 * the merges in order, then added tokens.
 */
#ifndef ARLE_TESTS_TOK_MAKE_H
#define ARLE_TESTS_TOK_MAKE_H

#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "chat/tokenizer.h"
#include "tap.h"

struct doc {
    char *p;
    size_t n, cap;
};

__attribute__((format(printf, 2, 3))) static inline void doc_add(struct doc *d, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (d->n + (size_t)n + 1 > d->cap) {
        d->cap = 2 * d->cap + (size_t)n + 4096;
        d->p = realloc(d->p, d->cap);
    }
    va_start(ap, fmt);
    vsnprintf(d->p + d->n, (size_t)n + 1, fmt, ap);
    va_end(ap);
    d->n += (size_t)n;
}

/* The alphabet's code point of a byte: printable bytes are themselves, the others follow from U+0100 in order. */
static inline unsigned doc_symbol(unsigned byte)
{
    unsigned extra = 0;
    for (unsigned b = 0; b < 256; b++) {
        int printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (b == byte)
            return printable ? b : 256 + extra;
        extra += !printable;
    }
    return 0;
}

/* Bytes as JSON string contents in the byte alphabet. */
static inline void doc_bytes(struct doc *d, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        doc_add(d, "\\u%04x", doc_symbol((uint8_t)bytes[i]));
}

#define DOC_SPLIT_LM "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?[\\\\p{L}\\\\p{M}]+|\\\\p{N}" \
    "| ?[^\\\\s\\\\p{L}\\\\p{M}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"
#define DOC_BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"
#define DOC_PRE_LM \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" DOC_SPLIT_LM \
    "\"},\"behavior\":\"Isolated\",\"invert\":false}," DOC_BYTES "]}"

struct doc_opts {
    const char *const *merges;  /* pairs of byte strings, NULL at the end */
    const char *added;          /* elements of added_tokens */
    const char *normalizer, *pre, *decoder, *post;  /* JSON; NULL: NFC, DOC_PRE_LM, ByteLevel, null */
    const char *model;          /* more members of model, with a comma at the end */
};

/* Caller frees. */
static inline char *doc_make(const struct doc_opts *o)
{
    static const char *const none[] = { NULL };
    const char *const *m = o->merges ? o->merges : none;
    struct doc d = { 0 };
    doc_add(&d,
            "{\"version\":\"1.0\",\"added_tokens\":[%s],\"normalizer\":%s,\"pre_tokenizer\":%s,\"post_processor\":%s,"
            "\"decoder\":%s,\"model\":{\"type\":\"BPE\",%s\"vocab\":{",
            o->added ? o->added : "", o->normalizer ? o->normalizer : "{\"type\":\"NFC\"}",
            o->pre ? o->pre : DOC_PRE_LM, o->post ? o->post : "null",
            o->decoder ? o->decoder : "{\"type\":\"ByteLevel\"}", o->model ? o->model : "");
    for (unsigned b = 0; b < 256; b++)
        doc_add(&d, "%s\"\\u%04x\":%u", b ? "," : "", doc_symbol(b), b);
    for (unsigned i = 0; m[2 * i] != NULL; i++) {
        doc_add(&d, ",\"");
        doc_bytes(&d, m[2 * i], strlen(m[2 * i]));
        doc_bytes(&d, m[2 * i + 1], strlen(m[2 * i + 1]));
        doc_add(&d, "\":%u", 256 + i);
    }
    doc_add(&d, "},\"merges\":[");
    for (unsigned i = 0; m[2 * i] != NULL; i++) {
        /* Both published forms of a merge, in turn. */
        doc_add(&d, "%s%s\"", i ? "," : "", i % 2 ? "[" : "");
        doc_bytes(&d, m[2 * i], strlen(m[2 * i]));
        doc_add(&d, i % 2 ? "\",\"" : " ");
        doc_bytes(&d, m[2 * i + 1], strlen(m[2 * i + 1]));
        doc_add(&d, i % 2 ? "\"]" : "\"");
    }
    doc_add(&d, "]}}");
    return d.p;
}

/* Opens one; a failure is reported and gives NULL. */
static inline struct tokenizer *doc_open(const struct doc_opts *o)
{
    struct tokenizer *tok = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    char *json = doc_make(o);
    if (tokenizer_open_mem(&tok, json, strlen(json), NULL, 0, &err) < 0)
        TAP_FAIL("open: %s", err.msg);
    free(json);
    return tok;
}

static inline struct tok_ids doc_encode(const struct tokenizer *tok, const char *text, size_t len, unsigned flags)
{
    struct tok_ids ids = TOK_IDS_INIT;
    struct arle_err err = ARLE_ERR_INIT;
    if (tokenizer_encode(tok, text, len, flags, &ids, &err) < 0)
        TAP_FAIL("encode: %s", err.msg);
    return ids;
}

/* Compares ids with a list that -1 ends. */
static inline void doc_expect(const struct tok_ids *ids, const int32_t *want, const char *what)
{
    size_t n = 0;
    while (want[n] >= 0)
        n++;
    if (ids->n != n || (n > 0 && memcmp(ids->ids, want, n * sizeof *want) != 0)) {
        TAP_FAIL("%s: other ids than expected", what);
        for (size_t i = 0; i < ids->n; i++)
            printf("#   got %d\n", ids->ids[i]);
    }
}

static uint64_t doc_state = 0x853C49E6748FEA9Bu;
static inline uint32_t doc_rnd(uint32_t n)
{
    doc_state ^= doc_state << 13;
    doc_state ^= doc_state >> 7;
    doc_state ^= doc_state << 17;
    return (uint32_t)((doc_state >> 33) % n);
}

#endif
