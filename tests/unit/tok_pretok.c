/*
 * The hand-written splitters against PCRE2 with the pattern they stand for, on random strings. The alphabet holds
 * characters of every class the patterns name, all old enough that every Unicode version classifies them alike.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "chat/tok_int.h"
#include "tok_make.h"

static const struct {
    enum tok_stage_kind kind;
    const char *pattern;
} stages[] = {
    { TOK_STAGE_SPLIT_LM, "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}"
                          "| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+" },
    { TOK_STAGE_SPLIT_L, "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
                         "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+" },
    { TOK_STAGE_SPLIT_L_N3, "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
                            "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+" },
    { TOK_STAGE_BYTELEVEL, "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+" },
    { TOK_STAGE_DIGITS3, "\\p{N}{1,3}" },
    { TOK_STAGE_CJK, "[\xE4\xB8\x80-\xE9\xBE\xA5\xE3\x81\x80-\xE3\x82\x9F\xE3\x82\xA0-\xE3\x83\xBF]+" },
    { TOK_STAGE_SPLIT_PS,
      "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
      "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+" },
};
#define N_STAGES (sizeof stages / sizeof stages[0])

static const char *const alphabet[] = {
    "a",
    "b",
    "s",
    "S",
    "t",
    "r",
    "e",
    "v",
    "l",
    "L",
    "m",
    "d",
    "Z",
    " ",
    " ",
    " ",
    "\n",
    "\r",
    "\t",
    "'",
    "'",
    "0",
    "7",
    "!",
    ".",
    "<",
    "|",
    "_",
    "~",
    "$",
    "+",
    "\xC2\xA0",
    "\xC2\x85",
    "\xE3\x80\x80",
    "\xE2\x80\xA8",
    "\xC3\xA9",
    "\xC5\xBF",
    "\xE2\x84\xAA",
    "\xCC\x81",
    "\xCC\xA3",
    "\xD7\x91",
    "\xE0\xA5\x8D",
    "\xE0\xA4\x95",
    "\xE4\xBD\xA0",
    "\xE9\xBE\xA5",
    "\xE9\xBE\xA6",
    "\xE3\x81\x82",
    "\xE3\x83\xBB",
    "\xE3\x82\xA0",
    "\xE3\x82\x99",
    "\xE3\x80\x87",
    "\xC2\xBD",
    "\xD9\xA3",
    "\xE2\x85\xA3",
    "\xE2\x82\xAC",
    "\xE2\x80\x9C",
    "\xF0\x9F\x98\x80",
    "\xF0\x9D\x9F\x98",
    "\x01",
    "\x7F",
    "\xC2\xAD",
    "\xE2\x80\x8B",
    "\xEE\x80\x80",
    "\xEF\xBF\xBF",
};

static size_t random_text(char *p, size_t most)
{
    size_t n = 0;
    for (size_t k = 1 + doc_rnd((uint32_t)most); k > 0; k--) {
        const char *c = alphabet[doc_rnd(doc_rnd(3) ? 20 : sizeof alphabet / sizeof alphabet[0])];
        for (uint32_t times = doc_rnd(12) ? 1 : 1 + doc_rnd(40); times > 0; times--) {
            memcpy(p + n, c, strlen(c));
            n += strlen(c);
        }
    }
    return n;
}

/* Ends of the pieces by PCRE2: matches and the gaps between them. */
static size_t pieces_by_pcre2(const pcre2_code *code, pcre2_match_data *md, const char *p, size_t n, size_t *ends)
{
    size_t done = 0, k = 0;
    while (done < n && pcre2_match(code, (PCRE2_SPTR)p, n, done, 0, md, NULL) > 0) {
        const PCRE2_SIZE *v = pcre2_get_ovector_pointer(md);
        if (v[0] > done)
            ends[k++] = v[0];
        ends[k++] = done = v[1];
    }
    if (done < n)
        ends[k++] = n;
    return k;
}

static void compare(size_t stage, const pcre2_code *code, pcre2_match_data *md, const char *text, size_t n)
{
    static size_t ends[8192];
    size_t k = pieces_by_pcre2(code, md, text, n, ends);
    const uint8_t *p = (const uint8_t *)text, *end = p + n;
    for (size_t i = 0; i < k; i++) {
        if (p >= end)
            break;
        p = tok_stage_next(stages[stage].kind, p, end);
        if ((size_t)(p - (const uint8_t *)text) != ends[i]) {
            TAP_FAIL("stage %zu: piece %zu ends at %zu, expected %zu", stage, i, (size_t)(p - (const uint8_t *)text),
                     ends[i]);
            for (size_t j = 0; j < n; j++)
                printf("%s%02X", j ? " " : "#   ", (uint8_t)text[j]);
            printf("\n");
            return;
        }
    }
    EXPECT(p == end);
}

static void splitters_equal_their_patterns(void)
{
    static char text[8192];
    for (size_t s = 0; s < N_STAGES; s++) {
        int e;
        PCRE2_SIZE at;
        pcre2_code *code =
            pcre2_compile((PCRE2_SPTR)stages[s].pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &e, &at, NULL);
        REQUIRE(code != NULL);
        pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
        pcre2_match_data *md = pcre2_match_data_create_from_pattern(code, NULL);
        for (int round = 0; round < 6000 && !tap_case_failed; round++)
            compare(s, code, md, text, random_text(text, round % 10 ? 12 : 40));
        pcre2_match_data_free(md);
        pcre2_code_free(code);
    }
}

static void known_patterns_are_recognised_exactly(void)
{
    for (size_t s = 0; s < N_STAGES; s++) {
        size_t n = strlen(stages[s].pattern);
        EXPECT_EQ(tok_stage_known(stages[s].pattern, n), stages[s].kind);
        EXPECT_EQ(tok_stage_known(stages[s].pattern, n - 1), TOK_STAGE_PCRE2);
    }
    EXPECT_EQ(tok_stage_known("\\p{N}{1,4}", 10), TOK_STAGE_PCRE2);
    EXPECT_EQ(tok_stage_known("", 0), TOK_STAGE_PCRE2);
    char raw[512];      /* newlines as themselves */
    size_t n = 0;
    for (const char *p = stages[6].pattern; *p != '\0'; p++) {
        bool newline = p[0] == '\\' && (p[1] == 'r' || p[1] == 'n');
        raw[n++] = (char)(!newline ? *p : *++p == 'r' ? '\r' : '\n');
    }
    EXPECT(n < strlen(stages[6].pattern));
    EXPECT_EQ(tok_stage_known(raw, n), TOK_STAGE_SPLIT_PS);
    raw[n - 1] = '*';
    EXPECT_EQ(tok_stage_known(raw, n), TOK_STAGE_PCRE2);
}

/* The same splits written differently go through PCRE2 and must give the same ids. */
static void known_and_unknown_patterns_agree(void)
{
    static const char *const merges[] = {
        "a", "b", " ", "a", " a", "b", "'", "s", "\n", "\n", "7", "7", "e", "r", NULL
    };
    static const char other[] =
        "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?:" DOC_SPLIT_LM
        ")\"},"
        "\"behavior\":\"Isolated\",\"invert\":false}," DOC_BYTES "]}";
    struct tokenizer *known = doc_open(&(struct doc_opts){ .merges = merges });
    struct tokenizer *unknown = doc_open(&(struct doc_opts){ .merges = merges, .pre = other });
    REQUIRE(known != NULL && unknown != NULL);
    EXPECT_STR(tokenizer_pretok_name(known), "split-lm");
    EXPECT_STR(tokenizer_pretok_name(unknown), "pcre2");
    static char text[8192];
    for (int i = 0; i < 3000 && !tap_case_failed; i++) {
        size_t n = random_text(text, 20);
        struct tok_ids a = doc_encode(known, text, n, 0), b = doc_encode(unknown, text, n, 0);
        EXPECT(a.n == b.n && memcmp(a.ids, b.ids, a.n * sizeof a.ids[0]) == 0);
        tok_ids_fini(&a);
        tok_ids_fini(&b);
    }
    tokenizer_close(known);
    tokenizer_close(unknown);
}

/* Stages see the pieces of the one before as whole strings: "12a" splits at the digits first. */
static void stages_nest(void)
{
    static const char pre[] =
        "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{N}{1,3}\"},"
        "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a?[0-9]\"},"
        "\"behavior\":\"Isolated\",\"invert\":false}," DOC_BYTES "]}";
    static const char *const merges[] = { "1", "2", "a", "1", "12", "a", NULL };
    struct tokenizer *tok = doc_open(&(struct doc_opts){ .merges = merges, .pre = pre });
    REQUIRE(tok != NULL);
    struct tok_ids a = doc_encode(tok, "a12a1", 5, 0);      /* a|12|a|1, then the second cuts 12 into 1|2 */
    doc_expect(&a, (const int32_t[]){ 'a', '1', '2', 'a', '1', -1 }, "a12a1");
    tok_ids_fini(&a);
    tokenizer_close(tok);
}

int main(void)
{
    RUN(splitters_equal_their_patterns);
    RUN(known_patterns_are_recognised_exactly);
    RUN(known_and_unknown_patterns_agree);
    RUN(stages_nest);
    return tap_done();
}
