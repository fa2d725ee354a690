/*
 * Pre-tokenisation: text is cut into pieces, and merges never cross a cut. The patterns that published models use are
 * matched by hand, in one pass without backtracking; any other goes through PCRE2.
 *
 * A pattern is a list of alternatives, the first that matches wins. The comments beside the code give the alternative
 * it stands for; a piece that no alternative matches reaches to the next match. Stages run one inside the other: each
 * sees the pieces of the one before as whole strings, so that the end of a piece is the end of text to a look-ahead.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "chat/tok_int.h"

#define INLINE static inline __attribute__((always_inline))

static const struct {
    const char *pattern;
    enum tok_stage_kind kind;
} known[] = {
    { "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*"
      "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", TOK_STAGE_SPLIT_LM },
    { "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
      "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", TOK_STAGE_SPLIT_L },
    { "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
      "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", TOK_STAGE_SPLIT_L_N3 },
    { "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", TOK_STAGE_BYTELEVEL },
    { "\\p{N}{1,3}", TOK_STAGE_DIGITS3 },
    { "[\xE4\xB8\x80-\xE9\xBE\xA5\xE3\x81\x80-\xE3\x82\x9F\xE3\x82\xA0-\xE3\x83\xBF]+", TOK_STAGE_CJK },
    { "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
      "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", TOK_STAGE_SPLIT_PS },
};

/* Files write a newline in a pattern as \n or as itself; it means the same. */
static bool same_pattern(const char *known_text, const char *p, size_t len)
{
    const char *k = known_text, *end = p + len;
    for (; p < end && *k != '\0'; p++) {
        if (*p == *k) {
            k++;
        } else if ((*p == '\n' || *p == '\r') && k[0] == '\\' && k[1] == (*p == '\n' ? 'n' : 'r')) {
            k += 2;
        } else {
            return false;
        }
    }
    return p == end && *k == '\0';
}

enum tok_stage_kind tok_stage_known(const char *pattern, size_t len)
{
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (same_pattern(known[i].pattern, pattern, len))
            return known[i].kind;
    return TOK_STAGE_PCRE2;
}

/* ---- runs ---- */

INLINE unsigned prop_at(const uint8_t *p, unsigned *len)
{
    if (*p < 0x80) {
        *len = 1;
        return tok_prop_block[*p];      /* the first block of the table is ASCII */
    }
    return tok_prop(tok_utf8(p, len));
}

/* ASCII letters at p, 16 at a time. */
INLINE const uint8_t *ascii_letters(const uint8_t *p, const uint8_t *end)
{
#if defined(__SSE2__)
    while (end - p >= 16) {
        __m128i v = _mm_or_si128(_mm_loadu_si128((const __m128i *)(const void *)p), _mm_set1_epi8(0x20));
        /* Shifted so that 'a'..'z' are the 26 smallest signed bytes. */
        __m128i w = _mm_add_epi8(v, _mm_set1_epi8((char)(0x80 - 'a')));
        unsigned not_letter =
            (unsigned)_mm_movemask_epi8(_mm_cmplt_epi8(w, _mm_set1_epi8((char)(-128 + 26)))) ^ 0xFFFFu;
        if (not_letter != 0)
            return p + __builtin_ctz(not_letter);
        p += 16;
    }
#endif
    while (p < end && ((*p | 0x20u) - 'a') < 26u)
        p++;
    return p;
}

/* First byte at or after p that is an ASCII digit or not ASCII. */
INLINE const uint8_t *skip_to_digit(const uint8_t *p, const uint8_t *end)
{
#if defined(__SSE2__)
    for (; end - p >= 16; p += 16) {
        __m128i v = _mm_loadu_si128((const __m128i *)(const void *)p);
        __m128i d = _mm_sub_epi8(v, _mm_set1_epi8('0'));
        __m128i digit = _mm_cmpeq_epi8(_mm_min_epu8(d, _mm_set1_epi8(9)), d);
        unsigned stop = (unsigned)_mm_movemask_epi8(_mm_or_si128(v, digit));
        if (stop != 0)
            return p + __builtin_ctz(stop);
    }
#endif
    while (p < end && *p < 0x80 && (unsigned)(*p - '0') > 9)
        p++;
    return p;
}

/* First byte at or after p that could begin a CJK character (U+3000 and up: lead bytes from E3). */
INLINE const uint8_t *skip_to_e3(const uint8_t *p, const uint8_t *end)
{
#if defined(__SSE2__)
    for (; end - p >= 16; p += 16) {
        __m128i v = _mm_loadu_si128((const __m128i *)(const void *)p);
        unsigned stop = (unsigned)_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_max_epu8(v, _mm_set1_epi8((char)0xE3)), v));
        if (stop != 0)
            return p + __builtin_ctz(stop);
    }
#endif
    while (p < end && *p < 0xE3)
        p++;
    return p;
}

/* The run of characters at p that have (or, with want = false, lack) any of the given properties. */
INLINE const uint8_t *run_of(const uint8_t *p, const uint8_t *end, unsigned mask, bool want)
{
    while (p < end) {
        unsigned len;
        if (((prop_at(p, &len) & mask) != 0) != want)
            break;
        p += len;
    }
    return p;
}

INLINE const uint8_t *run_letters(const uint8_t *p, const uint8_t *end, unsigned mask)
{
    for (;;) {
        p = ascii_letters(p, end);
        if (p == end || *p < 0x80)
            return p;
        const uint8_t *q = p;
        do {
            unsigned len;
            if ((tok_prop(tok_utf8(q, &len)) & mask) == 0)
                return q;
            q += len;
        } while (q < end && *q >= 0x80);
        p = q;
    }
}

INLINE const uint8_t *run_newlines(const uint8_t *p, const uint8_t *end)
{
    while (p < end && (*p == '\r' || *p == '\n'))
        p++;
    return p;
}

/* \s*[\r\n]+ | \s+(?!\S) | \s+  at a white space character. With newlines = false the first of them is not there. */
INLINE const uint8_t *white_space(const uint8_t *p, const uint8_t *end, bool newlines)
{
    const uint8_t *q = p, *after_newline = NULL, *last = p;
    while (q < end) {
        unsigned len;
        if ((prop_at(q, &len) & TOK_WS) == 0)
            break;
        last = q;
        if (newlines && (*q == '\r' || *q == '\n'))
            after_newline = q + 1;
        q += len;
    }
    if (after_newline != NULL)
        return after_newline;           /* greedy \s* gives back only up to the last newline */
    if (q == end || last == p)
        return q;
    return last;                        /* the last one is left to what follows */
}

/* 's|'t|'re|'ve|'m|'ll|'d at an apostrophe: end of the match or NULL. Folding maps U+017F (long s) to s. */
INLINE const uint8_t *contraction(const uint8_t *p, const uint8_t *end, bool fold)
{
    if (end - p < 2)
        return NULL;
    unsigned a = fold ? p[1] | 0x20u : p[1];
    if (p[1] < 0x80 && (a == 's' || a == 't' || a == 'm' || a == 'd'))
        return p + 2;
    if (end - p < 3)
        return NULL;
    if (fold && p[1] == 0xC5 && p[2] == 0xBF)
        return p + 3;
    if (p[1] >= 0x80 || p[2] >= 0x80)
        return NULL;
    unsigned b = fold ? p[2] | 0x20u : p[2];
    if (((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l'))
        return p + 3;
    return NULL;
}

INLINE const uint8_t *digits(const uint8_t *p, const uint8_t *end, int most)
{
    for (int i = 0; i < most && p < end; i++) {
        unsigned len;
        if ((prop_at(p, &len) & TOK_N) == 0)
            break;
        p += len;
    }
    return p;
}

/* ---- one stage each ---- */

/* The family of (?i:'s|..)|[^\r\n\p{L}\p{N}]?LETTERS+|\p{N}{1,n}| ?[^\s LETTERS \p{N}]+[\r\n]*|\s.. */
INLINE const uint8_t *next_split(const uint8_t *p, const uint8_t *end, unsigned letters, int most_digits)
{
    unsigned len, c = *p, k = prop_at(p, &len);
    const uint8_t *q = p + len;
    if (k & letters)
        return run_letters(q, end, letters);
    if (c == '\'') {
        const uint8_t *m = contraction(p, end, true);
        if (m != NULL)
            return m;
    }
    if (k & TOK_N)
        return digits(p, end, most_digits);
    if (q < end && c != '\r' && c != '\n') {
        unsigned len1, k1 = prop_at(q, &len1);
        if (k1 & letters)
            return run_letters(q + len1, end, letters);
        if (c == ' ' && (k1 & (TOK_WS | letters | TOK_N)) == 0)
            return run_newlines(run_of(q + len1, end, TOK_WS | letters | TOK_N, false), end);
    }
    if (k & TOK_WS)
        return white_space(p, end, true);
    return run_newlines(run_of(q, end, TOK_WS | letters | TOK_N, false), end);
}

static const uint8_t *next_split_lm(const uint8_t *p, const uint8_t *end)
{
    return next_split(p, end, TOK_L | TOK_M, 1);
}

static const uint8_t *next_split_l(const uint8_t *p, const uint8_t *end)
{
    return next_split(p, end, TOK_L, 1);
}

static const uint8_t *next_split_l_n3(const uint8_t *p, const uint8_t *end)
{
    return next_split(p, end, TOK_L, 3);
}

/* 's|'t|..| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static const uint8_t *next_bytelevel(const uint8_t *p, const uint8_t *end)
{
    if (*p == '\'') {
        const uint8_t *m = contraction(p, end, false);
        if (m != NULL)
            return m;
    }
    const uint8_t *q = p + (*p == ' ');
    if (q == end)
        return q;
    unsigned len, k = prop_at(q, &len);
    if (k & TOK_L)
        return run_letters(q + len, end, TOK_L);
    if (k & TOK_N)
        return run_of(q + len, end, TOK_N, true);
    if ((k & TOK_WS) == 0)
        return run_of(q + len, end, TOK_WS | TOK_L | TOK_N, false);
    return white_space(p, end, false);
}

/* \p{N}{1,3} */
static const uint8_t *next_digits3(const uint8_t *p, const uint8_t *end)
{
    const uint8_t *q = digits(p, end, 3);
    if (q != p)
        return q;
    while ((q = skip_to_digit(q, end)) < end) {
        unsigned len;
        if (prop_at(q, &len) & TOK_N)
            break;
        q += len;
    }
    return q;
}

static bool is_cjk(uint32_t cp)
{
    return (cp >= 0x4E00 && cp <= 0x9FA5) || (cp >= 0x3040 && cp <= 0x30FF);
}

/* [U+4E00-U+9FA5 U+3040-U+309F U+30A0-U+30FF]+ */
static const uint8_t *next_cjk(const uint8_t *p, const uint8_t *end)
{
    unsigned len;
    if (!is_cjk(tok_utf8(p, &len))) {
        do {
            p = skip_to_e3(p + len, end);
        } while (p < end && !is_cjk(tok_utf8(p, &len)));
        return p;
    }
    do {
        p += len;
    } while (p < end && is_cjk(tok_utf8(p, &len)));
    return p;
}

/*
 * [ASCII punctuation][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s..: end of the match at p
 * or NULL.
 */
INLINE const uint8_t *match_ps(const uint8_t *p, const uint8_t *end)
{
    unsigned len, c = *p, k = prop_at(p, &len);
    const uint8_t *q = p + len;
    if (k & (TOK_L | TOK_M))
        return run_letters(q, end, TOK_L | TOK_M);
    if (k & TOK_PS) {
        if (c < 0x80 && q < end) {
            const uint8_t *m = ascii_letters(q, end);
            if (m != q)
                return m;
        }
        return run_newlines(run_of(q, end, TOK_PS, true), end);
    }
    if (q < end && c != '\r' && c != '\n') {
        unsigned len1, k1 = prop_at(q, &len1);
        if (k1 & (TOK_L | TOK_M))
            return run_letters(q + len1, end, TOK_L | TOK_M);
        if (c == ' ' && (k1 & TOK_PS))
            return run_newlines(run_of(q + len1, end, TOK_PS, true), end);
    }
    return k & TOK_WS ? white_space(p, end, true) : NULL;
}

INLINE const uint8_t *next_split_ps(const uint8_t *p, const uint8_t *end)
{
    const uint8_t *m = match_ps(p, end);
    if (m != NULL)
        return m;
    do {
        unsigned len;
        prop_at(p, &len);
        p += len;
    } while (p < end && match_ps(p, end) == NULL);
    return p;
}

typedef const uint8_t *(*next_fn)(const uint8_t *p, const uint8_t *end);

static const next_fn next_of[] = {
    [TOK_STAGE_SPLIT_LM] = next_split_lm,     [TOK_STAGE_SPLIT_L] = next_split_l,
    [TOK_STAGE_SPLIT_L_N3] = next_split_l_n3, [TOK_STAGE_BYTELEVEL] = next_bytelevel,
    [TOK_STAGE_DIGITS3] = next_digits3,       [TOK_STAGE_CJK] = next_cjk,
    [TOK_STAGE_SPLIT_PS] = next_split_ps,
};

const uint8_t *tok_stage_next(enum tok_stage_kind kind, const uint8_t *p, const uint8_t *end)
{
    return next_of[kind](p, end);
}

/* ---- stages one inside the other ---- */

static int run_stage(struct tok_run *run, uint32_t i, const uint8_t *p, const uint8_t *end);

static inline int pass_on(struct tok_run *run, uint32_t i, const uint8_t *p, const uint8_t *end)
{
    if (p == end)
        return 0;
    if (i + 1 < run->t->n_stages)
        return run_stage(run, i + 1, p, end);
    return tok_bpe_piece(run, p, (size_t)(end - p));
}

static int run_pcre2(struct tok_run *run, uint32_t i, const uint8_t *p, const uint8_t *end)
{
    const struct tok_stage *st = &run->t->stage[i];
    if (run->s->match[i] == NULL)
        run->s->match[i] = pcre2_match_data_create_from_pattern(st->code, NULL);
    if (run->s->match[i] == NULL)
        return arle_err_set(run->err, -ENOMEM, "no memory for pattern matching");
    size_t n = (size_t)(end - p), done = 0, at = 0;
    while (at < n) {
        int rc = pcre2_match(st->code, p, n, at, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, run->s->match[i], NULL);
        if (rc == PCRE2_ERROR_NOMATCH)
            break;
        if (rc < 0)
            return arle_err_set(run->err, -E2BIG, "pre-tokeniser pattern gave up on this text (PCRE2 error %d)", rc);
        const PCRE2_SIZE *v = pcre2_get_ovector_pointer(run->s->match[i]);
        size_t from = v[0], to = v[1];
        if (from < done || to <= from)      /* \K inside a look-around can do that */
            return arle_err_set(run->err, -ENOTSUP, "pre-tokeniser pattern makes matches that go backwards");
        int r = pass_on(run, i, p + done, p + from);
        if (r == 0)
            r = pass_on(run, i, p + from, p + to);
        if (r < 0)
            return r;
        done = at = to;
    }
    return pass_on(run, i, p + done, end);
}

/* One loop per known last stage, so that the splitter is inlined into it. */
#define LAST_STAGE_LOOP(next)                                           \
    while (r == 0 && p < end) {                                         \
        const uint8_t *q = next;                                        \
        r = tok_bpe_piece(run, p, (size_t)(q - p));                     \
        p = q;                                                          \
    }                                                                   \
    return r

static int run_stage(struct tok_run *run, uint32_t i, const uint8_t *p, const uint8_t *end)
{
    uint32_t kind = run->t->stage[i].kind;
    int r = 0;
    if (kind == TOK_STAGE_PCRE2)
        return run_pcre2(run, i, p, end);
    if (i + 1 == run->t->n_stages) {
        switch (kind) {
        case TOK_STAGE_SPLIT_LM:
            LAST_STAGE_LOOP(next_split(p, end, TOK_L | TOK_M, 1));
        case TOK_STAGE_SPLIT_L:
            LAST_STAGE_LOOP(next_split(p, end, TOK_L, 1));
        case TOK_STAGE_SPLIT_PS:
            LAST_STAGE_LOOP(next_split_ps(p, end));
        default:
            break;
        }
    }
    next_fn next = next_of[kind];
    while (r == 0 && p < end) {
        const uint8_t *q = next(p, end);
        r = pass_on(run, i, p, q);
        p = q;
    }
    return r;
}

int tok_pretok(struct tok_run *run, const uint8_t *p, const uint8_t *end)
{
    if (p == end)
        return 0;
    if (run->t->n_stages == 0)
        return tok_bpe_piece(run, p, (size_t)(end - p));
    return run_stage(run, 0, p, end);
}

int tok_stages_compile(struct tok_tables *t, struct arle_err *err)
{
    for (uint32_t i = 0; i < t->n_stages; i++) {
        struct tok_stage *st = &t->stage[i];
        if (st->kind != TOK_STAGE_PCRE2)
            continue;
        int code;
        PCRE2_SIZE at;
        st->code = pcre2_compile(t->blob + st->pattern_off, st->pattern_len, PCRE2_UTF | PCRE2_UCP, &code, &at, NULL);
        if (st->code == NULL) {
            char why[128];
            pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
            return arle_err_param(err, -ENOTSUP, "pre_tokenizer.pattern", "pre_tokenizer pattern, offset %zu: %s", at,
                                  why);
        }
        uint32_t empty = 0;
        if (pcre2_pattern_info(st->code, PCRE2_INFO_MATCHEMPTY, &empty) != 0 || empty)
            return arle_err_param(err, -ENOTSUP, "pre_tokenizer.pattern",
                                  "pre_tokenizer pattern can match nothing at all");
        pcre2_jit_compile(st->code, PCRE2_JIT_COMPLETE);    /* without JIT the interpreter does the same */
    }
    return 0;
}

void tok_stages_free(struct tok_tables *t)
{
    for (uint32_t i = 0; i < t->n_stages; i++) {
        pcre2_code_free(t->stage[i].code);
        t->stage[i].code = NULL;
    }
}
