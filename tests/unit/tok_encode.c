/* Encoding and decoding as callers use them: added tokens, ranges, bad input, several threads on one tokenizer. */
#include <pthread.h>

#include "tok_make.h"

#define ADDED(id, text, more) "{\"id\":" #id ",\"content\":\"" text "\",\"normalized\":false" more "}"
static const char *const merges[] = { "a", "b", " ", "ab", "<", "|", "\n", "\n", "\n\n", "#", "e", "r", NULL };
enum {
    T_AB = 256,
    T_SP_AB,
    T_LT_BAR,
    T_NL2,
    T_NL2_HASH,
    T_ER,
    T_END = 262,
    T_ENDING = 263,
    T_THINK = 264,
    T_LEFT = 265,
    T_NORM = 266
};
static const char added[] =
    ADDED(262, "<|end|>", ",\"special\":true") "," ADDED(263, "<|end|>ing", "") "," ADDED(264, "<think>", "") ","
    ADDED(265, "@left", ",\"lstrip\":true") ",{\"id\":266,\"content\":\"norm\",\"normalized\":true}";

static struct tokenizer *tok;

#define ENCODES(text, flags, ...) encodes(text, sizeof text - 1, flags, (const int32_t[]){ __VA_ARGS__, -1 }, __LINE__)
static void encodes(const char *text, size_t n, unsigned flags, const int32_t *want, int line)
{
    char what[64];
    snprintf(what, sizeof what, "line %d", line);
    struct tok_ids ids = doc_encode(tok, text, n, flags);
    doc_expect(&ids, want, what);
    tok_ids_fini(&ids);
}

static void added_tokens_match_only_when_allowed(void)
{
    ENCODES("ab<|end|>ab", TOK_ALLOW_SPECIAL, T_AB, T_END, T_AB);
    ENCODES("ab<|end|>ab", 0, T_AB, T_LT_BAR, 'e', 'n', 'd', '|', '>', T_AB);
    ENCODES("<think>", TOK_ALLOW_SPECIAL, T_THINK);
    ENCODES("<think>", 0, '<', 't', 'h', 'i', 'n', 'k', '>');
}

static void longest_literal_wins(void)
{
    ENCODES("<|end|>ing<|end|>in", TOK_ALLOW_SPECIAL, T_ENDING, T_END, 'i', 'n');
    ENCODES("<<|end|><|en", TOK_ALLOW_SPECIAL, '<', T_END, T_LT_BAR, 'e', 'n');
    ENCODES("<|end<|end|>", TOK_ALLOW_SPECIAL, T_LT_BAR, 'e', 'n', 'd', T_END);
}

static void strip_flags_and_normalised_tokens(void)
{
    ENCODES("ab \n @left ab", TOK_ALLOW_SPECIAL, T_AB, T_LEFT, T_SP_AB);
    ENCODES("abnormab", TOK_ALLOW_SPECIAL, T_AB, T_NORM, T_AB);
    ENCODES("a\xCC\x81norm", TOK_ALLOW_SPECIAL, 0xC3, 0xA1, T_NORM);
}

static void normalises_between_added_tokens_only(void)
{
    ENCODES("e\xCC\x81", 0, 0xC3, 0xA9);
    ENCODES("e<|end|>\xCC\x81", TOK_ALLOW_SPECIAL, 'e', T_END, 0xCC, 0x81);
    ENCODES("", 0, -1);
    ENCODES("a\0b", 0, 'a', 0, 'b');
}

/* A range border that is no token must not be visible in the ids: "\n\n#" merges across it. */
static void ranges_only_say_where_literals_count(void)
{
    static const char text[] = "<|end|>\n\n# <|end|> <think><|end|>";
    const struct tok_range allowed[] = { { 0, 7 }, { 7, 8 }, { 18, 26 }, { 26, 33 } };
    struct tok_ids ids = TOK_IDS_INIT;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(tokenizer_encode_ranges(tok, text, sizeof text - 1, allowed, 4, &ids, &err), 0);
    doc_expect(&ids,
               (const int32_t[]){ T_END, T_NL2, '#', ' ', T_LT_BAR, 'e', 'n', 'd', '|', '>', ' ', T_THINK, T_END, -1 },
               "first and last literals allowed");
    ids.n = 0;
    EXPECT_EQ(tokenizer_encode_ranges(tok, text, sizeof text - 1, NULL, 0, &ids, &err), 0);
    struct tok_ids plain = doc_encode(tok, text, sizeof text - 1, 0);
    EXPECT(ids.n == plain.n && memcmp(ids.ids, plain.ids, ids.n * sizeof ids.ids[0]) == 0);
    ids.n = 0;
    const struct tok_range all = { 0, sizeof text - 1 };
    EXPECT_EQ(tokenizer_encode_ranges(tok, text, sizeof text - 1, &all, 1, &ids, &err), 0);
    tok_ids_fini(&plain);
    plain = doc_encode(tok, text, sizeof text - 1, TOK_ALLOW_SPECIAL);
    EXPECT(ids.n == plain.n && memcmp(ids.ids, plain.ids, ids.n * sizeof ids.ids[0]) == 0);
    tok_ids_fini(&plain);
    /* A literal that sticks out of its range is text. */
    ids.n = 0;
    const struct tok_range cut = { 0, 6 };
    EXPECT_EQ(tokenizer_encode_ranges(tok, "<|end|>", 7, &cut, 1, &ids, &err), 0);
    EXPECT_EQ(ids.n, 6);
    static const struct tok_range bad[][2] = { { { 5, 4 }, { 6, 7 } },
                                               { { 0, 5 }, { 4, 7 } },
                                               { { 0, 5 }, { 6, 99 } } };
    for (int i = 0; i < 3; i++)
        EXPECT_EQ(tokenizer_encode_ranges(tok, text, sizeof text - 1, bad[i], 2, &ids, &err), -EINVAL);
    EXPECT_EQ(ids.n, 6);
    tok_ids_fini(&ids);
}

static void ranges_see_normalised_tokens_too(void)
{
    const struct tok_range second = { 5, 9 };
    struct tok_ids ids = TOK_IDS_INIT;
    EXPECT_EQ(tokenizer_encode_ranges(tok, "norm norm", 9, &second, 1, &ids, NULL), 0);
    doc_expect(&ids, (const int32_t[]){ 'n', 'o', 'r', 'm', ' ', T_NORM, -1 }, "second norm only");
    tok_ids_fini(&ids);
}

static void bad_utf8_is_refused_with_its_place(void)
{
    struct tok_ids ids = doc_encode(tok, "ab", 2, 0);
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(tokenizer_encode(tok, "abc\xED\xA0\x80", 6, 0, &ids, &err), -EILSEQ);
    EXPECT(strstr(err.msg, "byte 3") != NULL);
    doc_expect(&ids, (const int32_t[]){ T_AB, -1 }, "ids of before");
    EXPECT_EQ(tokenizer_encode(tok, " ab", 3, 0, &ids, &err), 0);
    doc_expect(&ids, (const int32_t[]){ T_AB, T_SP_AB, -1 }, "appended");
    tok_ids_fini(&ids);
}

static void decodes(const int32_t *ids, size_t n, unsigned flags, const char *want)
{
    char *text = NULL;
    size_t len = 0;
    EXPECT_EQ(tokenizer_decode(tok, ids, n, flags, &text, &len, NULL), 0);
    EXPECT_STR(text, want);
    EXPECT_EQ(len, strlen(want));
    free(text);
}

static void decoding_options(void)
{
    const int32_t ids[] = { T_AB, T_END, T_THINK, 9999, -1, 261 + 50, T_SP_AB };
    decodes(ids, 7, 0, "ab<|end|><think> ab");
    decodes(ids, 7, TOK_SKIP_SPECIAL, "ab<think> ab");
    const int32_t broken[] = { 'a', 0xE2, 0x82, 'b', 0xFF, 0xF0, 0x9F, 0x98 };
    decodes(broken, 8, 0, "a\xE2\x82" "b\xFF\xF0\x9F\x98");
    decodes(broken, 8, TOK_LOSSY_UTF8, "a\xEF\xBF\xBD" "b\xEF\xBF\xBD\xEF\xBF\xBD");
    decodes(NULL, 0, TOK_LOSSY_UTF8, "");
    const char *bytes;
    size_t len;
    EXPECT_EQ(tokenizer_token_bytes(tok, T_NL2_HASH, &bytes, &len), 0);
    EXPECT(len == 3 && memcmp(bytes, "\n\n#", 3) == 0);
    EXPECT_EQ(tokenizer_token_bytes(tok, 267, &bytes, &len), -ENOENT);
    EXPECT_EQ(tokenizer_token_bytes(tok, -1, &bytes, &len), -ENOENT);
}

/* Many threads, each with its own texts; every answer must be the one a lone thread gets. */
#define N_THREADS 6
static char texts[40][1600];
static size_t text_len[40];
static struct tok_ids alone[40];

struct worker {
    pthread_t thread;
    unsigned first;
    size_t n_wrong;
};

static void *encode_many(void *arg)
{
    struct worker *w = arg;
    struct tok_ids ids = TOK_IDS_INIT;
    for (unsigned round = 0; round < 400; round++) {
        unsigned k = (round * 7 + w->first) % 40;
        ids.n = 0;
        if (tokenizer_encode(tok, texts[k], text_len[k], TOK_ALLOW_SPECIAL, &ids, NULL) < 0 || ids.n != alone[k].n ||
            memcmp(ids.ids, alone[k].ids, ids.n * sizeof ids.ids[0]) != 0)
            w->n_wrong++;
    }
    tok_ids_fini(&ids);
    return NULL;
}

static void threads_share_a_tokenizer(void)
{
    static const char *const part[] = {
        "ab", " ", "<|end|>", "er", "\n\n#", "e\xCC\x81", "42", "abababababababababababababababababababababababababab"
    };
    for (int k = 0; k < 40; k++) {
        while (text_len[k] < 1500) {
            const char *p = part[doc_rnd(8)];
            memcpy(texts[k] + text_len[k], p, strlen(p));
            text_len[k] += strlen(p);
        }
        alone[k] = doc_encode(tok, texts[k], text_len[k], TOK_ALLOW_SPECIAL);
    }
    struct worker w[N_THREADS];
    for (unsigned i = 0; i < N_THREADS; i++) {
        w[i] = (struct worker){ .first = 5 * i };
        EXPECT_EQ(pthread_create(&w[i].thread, NULL, encode_many, &w[i]), 0);
    }
    for (int i = 0; i < N_THREADS; i++) {
        pthread_join(w[i].thread, NULL);
        EXPECT_EQ(w[i].n_wrong, 0);
    }
    for (int k = 0; k < 40; k++)
        tok_ids_fini(&alone[k]);
}

int main(void)
{
    tok = doc_open(&(struct doc_opts){ .merges = merges, .added = added });
    if (tok == NULL)
        return 1;
    RUN(added_tokens_match_only_when_allowed);
    RUN(longest_literal_wins);
    RUN(strip_flags_and_normalised_tokens);
    RUN(normalises_between_added_tokens_only);
    RUN(ranges_only_say_where_literals_count);
    RUN(ranges_see_normalised_tokens_too);
    RUN(bad_utf8_is_refused_with_its_place);
    RUN(decoding_options);
    RUN(threads_share_a_tokenizer);
    tokenizer_close(tok);
    return tap_done();
}
