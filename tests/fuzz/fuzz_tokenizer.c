/*
 * The tokenizer on bytes we did not write. Input that starts with 'T' is text for a small built-in tokenizer (no
 * normaliser), on which encoding and decoding must be inverse and every way to ask must agree. Anything else is
 * tokenizer.json, then perhaps after a NUL tokenizer_config.json, then after another NUL a text; what opens must encode
 * it and keep its promises.
 */
#include <stdlib.h>
#include <string.h>

#include "chat/detok.h"
#include "chat/stopstr.h"
#include "tok_make.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(int ok)
{
    if (!ok)
        abort();
}

static int same(const struct tok_ids *a, const struct tok_ids *b)
{
    return a->n == b->n && (a->n == 0 || memcmp(a->ids, b->ids, a->n * sizeof a->ids[0]) == 0);
}

/* The streaming detokeniser must add up to the lossy decoding. */
static void check_stream(const struct tokenizer *tok, const struct tok_ids *ids)
{
    char *whole;
    size_t len, at = 0, k;
    const char *piece;
    struct detok d;
    check(tokenizer_decode(tok, ids->ids, ids->n, TOK_LOSSY_UTF8, &whole, &len, NULL) == 0);
    detok_init(&d, tok, 0);
    for (size_t i = 0; i <= ids->n; i++) {
        check((i < ids->n ? detok_push(&d, ids->ids[i], &piece, &k) : detok_flush(&d, &piece, &k)) == 0);
        check(at + k <= len && memcmp(whole + at, piece, k) == 0);
        at += k;
    }
    check(at == len);
    detok_fini(&d);
    free(whole);
}

/* The first half of the text as a stop string must be found in it, at its first place. */
static void check_stop(const char *text, size_t n)
{
    struct stop_set *set;
    struct stop_matcher m;
    const char *out;
    size_t half = n / 2, len;
    int matched;
    if (half == 0 || half > 1000)
        return;
    check(stop_set_create(&set, &text, &half, 1, NULL) == 0);
    stop_matcher_init(&m, set);
    check(stop_matcher_push(&m, text, n, &out, &len, &matched) == 0 && matched == 0 && len == 0);
    stop_matcher_fini(&m);
    stop_set_destroy(set);
}

static void check_text(const struct tokenizer *tok, const char *text, size_t n, int inverse)
{
    struct tok_ids with = TOK_IDS_INIT, ranges = TOK_IDS_INIT, without = TOK_IDS_INIT;
    int r = tokenizer_encode(tok, text, n, TOK_ALLOW_SPECIAL, &with, NULL);
    const struct tok_range all = { 0, n };
    int r2 = tokenizer_encode_ranges(tok, text, n, &all, 1, &ranges, NULL);
    int r3 = tokenizer_encode(tok, text, n, 0, &without, NULL);
    check(r == r2 && r == r3);
    for (size_t i = 0; i < with.n; i++)
        check(with.ids[i] >= 0 && with.ids[i] < tokenizer_vocab_size(tok));
    if (r == 0 && inverse) {
        check(same(&with, &ranges));
        char *back;
        size_t len;
        for (int k = 0; k < 2; k++) {
            const struct tok_ids *ids = k ? &without : &with;
            check(tokenizer_decode(tok, ids->ids, ids->n, 0, &back, &len, NULL) == 0);
            check(len == n && memcmp(back, text, n) == 0);
            free(back);
        }
    }
    if (r == 0)
        check_stream(tok, &with);
    check_stop(text, n);
    tok_ids_fini(&with);
    tok_ids_fini(&ranges);
    tok_ids_fini(&without);
}

static const struct tokenizer *built_in(void)
{
    static struct tokenizer *tok;
    static const char *const merges[] = { "a", "b",  "ab", "ab",   " ",    "t", " t", "h", "e",
                                          "r", "\n", "\n", "\xC3", "\xA9", "<", "|",  NULL };
    if (tok == NULL)
        tok =
            doc_open(&(struct doc_opts){ .merges = merges,
                                         .normalizer = "null",
                                         .added = "{\"id\":300,\"content\":\"<|a|>\",\"special\":true},{\"id\":301,"
                                                  "\"content\":\"<|a|>b\"},{\"id\":302,\"content\":\"<\xC3\xA9>\"}" });
    return tok;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *p = (const char *)data, *end = p + size;
    if (size > 0 && p[0] == 'T') {
        check_text(built_in(), p + 1, size - 1, 1);
        return 0;
    }
    const char *a = size ? memchr(p, '\0', size) : NULL;
    const char *config = a ? a + 1 : NULL, *b = a ? memchr(config, '\0', (size_t)(end - config)) : NULL;
    const char *text = b ? b + 1 : end;
    struct tokenizer *tok = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    int r = tokenizer_open_mem(&tok, p, a ? (size_t)(a - p) : size, config,
                               config ? (size_t)((b ? b : end) - config) : 0, &err);
    check(r == 0 ? tok != NULL : r < 0 && tok == NULL && err.msg[0] != '\0');
    if (tok != NULL)
        check_text(tok, text, (size_t)(end - text), 0);
    tokenizer_close(tok);
    return 0;
}
