/*
 * Merging against a slow reference that follows the definition, on random vocabularies; and what it costs on one long
 * piece.
 */
#include <time.h>

#include "tok_make.h"

#define MAX_MERGES 60
#define MAX_TEXT 400

/* A random vocabulary over four letters. Several pairs may lead to one token, as in real files. */
struct vocab {
    char text[2 * MAX_MERGES + 1][16];
    const char *pair[2 * MAX_MERGES + 1];
    unsigned n;
};

static void random_vocab(struct vocab *v)
{
    v->n = 0;
    unsigned want = 2 + doc_rnd(MAX_MERGES - 2);
    for (unsigned tries = 0; v->n < want && tries < 2000; tries++) {
        char half[2][16];
        for (int h = 0; h < 2; h++) {
            if (v->n == 0 || doc_rnd(2))
                snprintf(half[h], 16, "%c", 'a' + doc_rnd(4));
            else {
                unsigned k = doc_rnd(v->n);
                snprintf(half[h], 16, "%.7s%.7s", v->text[2 * k], v->text[2 * k + 1]);
            }
        }
        if (strlen(half[0]) + strlen(half[1]) > 7)
            continue;
        int seen = 0;   /* vocabulary entries must differ for ids to be 256 + i */
        for (unsigned i = 0; i < v->n; i++) {
            char a[32], b[32];
            snprintf(a, sizeof a, "%s%s", v->text[2 * i], v->text[2 * i + 1]);
            snprintf(b, sizeof b, "%s%s", half[0], half[1]);
            seen |= strcmp(a, b) == 0;
        }
        if (seen)
            continue;
        for (int h = 0; h < 2; h++) {
            snprintf(v->text[2 * v->n + (unsigned)h], 16, "%.15s", half[h]);
            v->pair[2 * v->n + (unsigned)h] = v->text[2 * v->n + (unsigned)h];
        }
        v->n++;
    }
    v->pair[2 * v->n] = NULL;
}

/* The definition: again and again, over all merges in order of rank, the leftmost pair that is that merge. */
static size_t slow_bpe(const struct vocab *v, const char *text, size_t n, int32_t *out)
{
    static char sym[MAX_TEXT][16];
    for (size_t i = 0; i < n; i++)
        snprintf(sym[i], 16, "%c", text[i]);
again:
    for (unsigned m = 0; m < v->n; m++)
        for (size_t i = 0; i + 1 < n; i++)
            if (strcmp(sym[i], v->pair[2 * m]) == 0 && strcmp(sym[i + 1], v->pair[2 * m + 1]) == 0) {
                strcat(sym[i], v->pair[2 * m + 1]);
                memmove(sym[i + 1], sym[i + 2], (n - i - 2) * sizeof sym[0]);
                n--;
                goto again;
            }
    for (size_t i = 0; i < n; i++) {
        out[i] = (uint8_t)sym[i][0];
        for (unsigned m = 0; m < v->n && sym[i][1] != '\0'; m++) {
            size_t k = strlen(v->pair[2 * m]);
            if (strncmp(sym[i], v->pair[2 * m], k) == 0 && strcmp(sym[i] + k, v->pair[2 * m + 1]) == 0)
                out[i] = (int32_t)(256 + m);
        }
    }
    return n;
}

static void equals_the_definition(void)
{
    static int32_t want[MAX_TEXT + 1];
    unsigned n_long = 0, n_merged = 0;
    for (int round = 0; round < 60; round++) {
        struct vocab v;
        random_vocab(&v);
        struct tokenizer *tok = doc_open(&(struct doc_opts){ .merges = v.pair });
        REQUIRE(tok != NULL);
        for (int k = 0; k < 60; k++) {
            char text[MAX_TEXT];
            size_t n = 1 + doc_rnd(k % 6 == 0 ? MAX_TEXT - 2 : 40);   /* both ways of merging, and the piece cache */
            uint32_t letters = 1 + doc_rnd(4);
            for (size_t i = 0; i < n; i++)
                text[i] = (char)('a' + doc_rnd(letters));
            size_t n_want = slow_bpe(&v, text, n, want);
            want[n_want] = -1;
            for (int twice = 0; twice < 2; twice++) {
                struct tok_ids ids = doc_encode(tok, text, n, 0);
                doc_expect(&ids, want, "random text");
                tok_ids_fini(&ids);
            }
            n_long += n > 48;
            n_merged += n_want < n;
        }
        tokenizer_close(tok);
    }
    EXPECT(n_long > 300);
    EXPECT(n_merged > 1000);
}

static double encode_seconds(const struct tokenizer *tok, const char *text, size_t n, size_t *out_ids)
{
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    struct tok_ids ids = doc_encode(tok, text, n, 0);
    clock_gettime(CLOCK_MONOTONIC, &b);
    *out_ids = ids.n;
    tok_ids_fini(&ids);
    return (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
}

static void a_megabyte_of_one_letter_is_not_quadratic(void)
{
    static const char *const merges[] = { "a", "a", "aa", "aa", "aaaa", "aaaa", NULL };
    struct tokenizer *tok = doc_open(&(struct doc_opts){ .merges = merges });
    REQUIRE(tok != NULL);
    size_t n = 1 << 20, n_ids;
    char *text = malloc(n);
    memset(text, 'a', n);
    double s = encode_seconds(tok, text, n, &n_ids);
    EXPECT_EQ(n_ids, n / 8);
    printf("# 1 MiB of one letter: %.3f s\n", s);
    EXPECT(s < 20);         /* quadratic would be hours; a loaded machine with sanitizers is not */
    free(text);
    tokenizer_close(tok);
}

static void the_last_of_two_equal_merges_counts(void)
{
    /* "ab" and "bc" compete for "abc". ab is listed first and again last: the later, worse rank is the one in force. */
    char *json = doc_make(&(struct doc_opts){ .merges = (const char *const[]){ "a", "b", "b", "c", NULL } });
    char *at = strstr(json, "\"merges\":[");
    REQUIRE(at != NULL);
    struct doc d = { 0 };
    doc_add(&d, "%.*s\"merges\":[\"a b\",\"b c\",\"a b\"]}}", (int)(at - json), json);
    struct tokenizer *tok = NULL;
    EXPECT_EQ(tokenizer_open_mem(&tok, d.p, d.n, NULL, 0, NULL), 0);
    REQUIRE(tok != NULL);
    struct tok_ids ids = doc_encode(tok, "abc", 3, 0);
    doc_expect(&ids, (const int32_t[]){ 'a', 257, -1 }, "abc");
    tok_ids_fini(&ids);
    tokenizer_close(tok);
    free(d.p);
    free(json);
}

static void ignore_merges_takes_whole_entries(void)
{
    static const char *const merges[] = { "a", "b", "b", "c", "a", "bc", NULL }; /* abc merges as ab + c otherwise */
    struct tokenizer *plain = doc_open(&(struct doc_opts){ .merges = merges });
    struct tokenizer *whole = doc_open(&(struct doc_opts){ .merges = merges, .model = "\"ignore_merges\":true," });
    REQUIRE(plain != NULL && whole != NULL);
    struct tok_ids a = doc_encode(plain, "abc", 3, 0), b = doc_encode(whole, "abc", 3, 0),
                   c = doc_encode(whole, "abca", 4, 0);
    doc_expect(&a, (const int32_t[]){ 256, 'c', -1 }, "with merges");
    doc_expect(&b, (const int32_t[]){ 258, -1 }, "whole entry");
    doc_expect(&c, (const int32_t[]){ 256, 'c', 'a', -1 }, "no such entry");
    tok_ids_fini(&a);
    tok_ids_fini(&b);
    tok_ids_fini(&c);
    tokenizer_close(plain);
    tokenizer_close(whole);
}

static void every_byte_has_a_way_in_and_out(void)
{
    struct tokenizer *tok = doc_open(&(struct doc_opts){ .normalizer = "null" });
    REQUIRE(tok != NULL);
    char text[256 * 4];
    size_t n = 0;
    for (unsigned cp = 0; cp < 0x110000; cp += cp < 0x800 ? 1 : 0x401) {
        if (cp >= 0xD800 && cp < 0xE000)
            continue;
        n = 0;
        if (cp < 0x80)
            text[n++] = (char)cp;
        else if (cp < 0x800)
            n += (size_t)sprintf(text, "%c%c", 0xC0 | cp >> 6, 0x80 | (cp & 63));
        else if (cp < 0x10000)
            n += (size_t)sprintf(text, "%c%c%c", 0xE0 | cp >> 12, 0x80 | (cp >> 6 & 63), 0x80 | (cp & 63));
        else
            n += (size_t)sprintf(text, "%c%c%c%c", 0xF0 | cp >> 18, 0x80 | (cp >> 12 & 63), 0x80 | (cp >> 6 & 63),
                                 0x80 | (cp & 63));
        struct tok_ids ids = doc_encode(tok, text, n, 0);
        EXPECT_EQ(ids.n, n);
        for (size_t i = 0; i < n && i < ids.n; i++)
            EXPECT_EQ(ids.ids[i], (uint8_t)text[i]);
        tok_ids_fini(&ids);
    }
    tokenizer_close(tok);
}

int main(void)
{
    RUN(equals_the_definition);
    RUN(a_megabyte_of_one_letter_is_not_quadratic);
    RUN(the_last_of_two_equal_merges_counts);
    RUN(ignore_merges_takes_whole_entries);
    RUN(every_byte_has_a_way_in_and_out);
    return tap_done();
}
