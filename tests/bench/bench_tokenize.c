/*
 * Speed of encoding, one thread, as JSON lines: English-like text, and a few kinds that take the slower paths.
 * Usage: bench_tokenize MODEL_DIR [TEXT_FILE]. With a file, only its text is measured.
 *
 * The English text is made from the common words below by a fixed generator with word frequencies like those of prose
 * (Zipf), capitals, contractions, numbers and punctuation, plus rare made-up words, so that the piece cache sees misses
 * as in prose.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "chat/tokenizer.h"

static const char *const common[] = {
    "the",        "of",          "and",         "to",        "a",          "in",         "that",       "is",
    "was",        "he",          "for",         "it",        "with",       "as",         "his",        "on",
    "be",         "at",          "by",          "I",         "this",       "had",        "not",        "are",
    "but",        "from",        "or",          "have",      "an",         "they",       "which",      "one",
    "you",        "were",        "her",         "all",       "she",        "there",      "would",      "their",
    "we",         "him",         "been",        "has",       "when",       "who",        "will",       "more",
    "no",         "if",          "out",         "so",        "said",       "what",       "up",         "its",
    "about",      "into",        "than",        "them",      "can",        "only",       "other",      "new",
    "some",       "could",       "time",        "these",     "two",        "may",        "then",       "do",
    "first",      "any",         "my",          "now",       "such",       "like",       "our",        "over",
    "man",        "me",          "even",        "most",      "made",       "after",      "also",       "did",
    "many",       "before",      "must",        "through",   "back",       "years",      "where",      "much",
    "your",       "way",         "well",        "down",      "should",     "because",    "each",       "just",
    "those",      "people",      "how",         "too",       "little",     "state",      "good",       "very",
    "make",       "world",       "still",       "own",       "see",        "men",        "work",       "long",
    "get",        "here",        "between",     "both",      "life",       "being",      "under",      "never",
    "day",        "same",        "another",     "know",      "while",      "last",       "might",      "us",
    "great",      "old",         "year",        "off",       "come",       "since",      "against",    "go",
    "came",       "right",       "used",        "take",      "three",      "question",   "government", "important",
    "children",   "development", "information", "something", "understand", "difference", "experience", "everything",
    "particular", "themselves",  "possible",    "language",  "computer",
};
#define N_COMMON (sizeof common / sizeof common[0])

static uint64_t state = 88172645463325252u;
static uint32_t rnd(uint32_t n)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)((state >> 33) % n);
}

static double clock_of(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double now(void)
{
    return clock_of(CLOCK_MONOTONIC);
}

/* A rare word from syllables: tens of thousands of different ones, so most are new to the cache. */
static size_t rare_word(char *p)
{
    static const char *const syl[] = { "ba",   "con", "der", "est", "fi", "gra",  "hol", "in",  "ju",
                                       "ker",  "lo",  "men", "no",  "or", "pre",  "qui", "ran", "ser",
                                       "tion", "un",  "ver", "wil", "ex", "yond", "zen", "ly" };
    size_t n = 0;
    for (uint32_t k = 2 + rnd(3); k > 0; k--) {
        const char *s = syl[rnd(sizeof syl / sizeof syl[0])];
        memcpy(p + n, s, strlen(s));
        n += strlen(s);
    }
    return n;
}

static size_t english(char *p, size_t cap)
{
    size_t n = 0;
    int in_sentence = 0;
    while (n + 64 < cap) {
        if (n > 0 && p[n - 1] != '\n')
            p[n++] = ' ';
        size_t start = n;
        if (rnd(100) < 12) {
            n += rare_word(p + n);
        } else if (rnd(100) < 2) {
            n += (size_t)sprintf(p + n, "%u", rnd(3000));
        } else {
            uint32_t k = rnd(N_COMMON + 1);                 /* 1/rank by repeated halving of the range */
            const char *w = common[k < 2 ? 0 : rnd(rnd(k) + 1)];
            n += (size_t)sprintf(p + n, "%s%s", w, rnd(80) == 0 ? "'s" : rnd(80) == 0 ? "n't" : "");
        }
        if (in_sentence == 0 && p[start] >= 'a' && p[start] <= 'z')
            p[start] = (char)(p[start] - 32);
        if (++in_sentence > 6 && rnd(10) == 0) {
            p[n++] = '.';
            in_sentence = 0;
            if (rnd(5) == 0) {
                p[n++] = '\n';
                p[n++] = '\n';
            }
        } else if (rnd(12) == 0) {
            p[n++] = ',';
        }
    }
    return n;
}

static size_t repeat(char *p, size_t cap, const char *unit)
{
    size_t k = strlen(unit), n = 0;
    for (; n + k < cap; n += k)
        memcpy(p + n, unit, k);
    return n;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(const struct tokenizer *tok, const char *name, const char *text, size_t len, int runs)
{
    struct tok_ids ids = TOK_IDS_INIT;
    struct arle_err err = ARLE_ERR_INIT;
    double t[64], cpu[64];     /* processor time too: on a shared machine the wall clock measures the neighbours */
    for (int i = -2; i < runs; i++) {
        ids.n = 0;
        double t0 = now(), c0 = clock_of(CLOCK_THREAD_CPUTIME_ID);
        if (tokenizer_encode(tok, text, len, TOK_ALLOW_SPECIAL, &ids, &err) < 0) {
            fprintf(stderr, "bench_tokenize: %s\n", err.msg);
            exit(1);
        }
        if (i >= 0) {
            t[i] = now() - t0;
            cpu[i] = clock_of(CLOCK_THREAD_CPUTIME_ID) - c0;
        }
    }
    qsort(t, (size_t)runs, sizeof t[0], by_value);
    qsort(cpu, (size_t)runs, sizeof cpu[0], by_value);
    printf("{\"bench\":\"tokenize\",\"text\":\"%s\",\"bytes\":%zu,\"tokens\":%zu,\"pretokenizer\":\"%s\",\"vocab\":%d,"
           "\"warmups\":2,\"runs\":%d,\"median_ms\":%.3f,\"best_ms\":%.3f,\"worst_ms\":%.3f,\"mb_per_s\":%.1f,\"mb_per_cpu_s\":%.1f}\n",
           name, len, ids.n, tokenizer_pretok_name(tok), tokenizer_vocab_size(tok), runs, 1e3 * t[runs / 2], 1e3 * t[0],
           1e3 * t[runs - 1], 1e-6 * (double)len / t[runs / 2], 1e-6 * (double)len / cpu[runs / 2]);
    tok_ids_fini(&ids);
}

/* Opening: parsed, and from a cache that the first open of the second kind writes. */
static void measure_open(const char *dir, const char *cache_dir, const char *name)
{
    struct arle_err err = ARLE_ERR_INIT;
    double t[20];
    bool cached = false;
    for (int i = -1; i < 20; i++) {
        struct tokenizer *tok;
        double t0 = now();
        if (tokenizer_open_opts(&tok, &(struct tokenizer_opts){ dir, cache_dir }, &err) < 0) {
            fprintf(stderr, "bench_tokenize: %s\n", err.msg);
            exit(1);
        }
        if (i >= 0)
            t[i] = now() - t0;
        cached = tokenizer_from_cache(tok);
        tokenizer_close(tok);
    }
    qsort(t, 20, sizeof t[0], by_value);
    printf("{\"bench\":\"tokenizer_open\",\"kind\":\"%s\",\"from_cache\":%s,\"runs\":20,\"median_ms\":%.3f}\n", name,
           cached ? "true" : "false", 1e3 * t[10]);
}

static char *whole_file(const char *path, size_t *len)
{
    FILE *f = fopen(path, "rb");
    char *p = malloc((size_t)64 << 20);
    if (f == NULL || p == NULL) {
        fprintf(stderr, "bench_tokenize: cannot read %s\n", path);
        exit(1);
    }
    *len = fread(p, 1, (size_t)64 << 20, f);
    fclose(f);
    return p;
}

int main(int argc, char **argv)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct tokenizer *tok;
    if (argc < 2 || tokenizer_open_opts(&tok, &(struct tokenizer_opts){ argv[1], "" }, &err) < 0) {
        fprintf(stderr, "bench_tokenize: %s\n", argc < 2 ? "usage: bench_tokenize MODEL_DIR [TEXT_FILE]" : err.msg);
        return argc < 2 ? 2 : 1;
    }
    size_t cap = (size_t)8 << 20, len;
    char *text = malloc(cap);
    if (text == NULL)
        return 1;
    if (argc > 2) {
        free(text);
        text = whole_file(argv[2], &len);
        measure(tok, "file", text, len, 15);
    } else {
        len = english(text, cap);
        measure(tok, "english 8 MB", text, len, 15);
        measure(tok, "english 4 kB", text, 4096, 63);
        measure(tok, "russian", text, repeat(text, cap / 4, "Съешь ещё этих мягких французских булок, да выпей чаю. "),
                7);
        measure(tok, "chinese", text, repeat(text, cap / 4, "今天天气很好，我们去公园散步吧。"), 7);
        measure(tok, "decomposed (needs NFC)", text,
                repeat(text, cap / 8,
                       "Ti\xCC\x82"
                       "e\xCC\x82\xCC\x81ng Vie\xCC\xA3\xCC\x82t "),
                7);
        measure(tok, "one letter, 1 MB", text, repeat(text, 1 << 20, "a"), 5);
        measure(tok, "one line of letters, 1 MB", text, repeat(text, 1 << 20, "thequickbrownfoxjumpsoverthelazydog"),
                5);
        measure(tok, "spaces, 1 MB", text, repeat(text, 1 << 20, " "), 5);
        measure_open(argv[1], "", "parse");
        char dir[] = "/tmp/bench_tokenize.XXXXXX";
        if (mkdtemp(dir) != NULL) {
            measure_open(argv[1], dir, "cache");
            char cmd[64];
            snprintf(cmd, sizeof cmd, "rm -r %s", dir);
            if (system(cmd) != 0)
                fprintf(stderr, "bench_tokenize: %s left behind\n", dir);
        }
    }
    free(text);
    tokenizer_close(tok);
    return 0;
}
