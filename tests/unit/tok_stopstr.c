/* Stop strings in a stream, against a search over the whole text after every byte. */
#include "chat/stopstr.h"
#include "tok_make.h"

#define MAX_STOPS 5

struct stops {
    char text[MAX_STOPS][16];
    const char *p[MAX_STOPS];
    size_t len[MAX_STOPS], n;
};

static void random_stops(struct stops *s, uint32_t letters)
{
    s->n = 1 + doc_rnd(MAX_STOPS);
    for (size_t i = 0; i < s->n; i++) {
        s->len[i] = 1 + doc_rnd(doc_rnd(3) ? 4 : 12);
        for (size_t k = 0; k < s->len[i]; k++)
            s->text[i][k] = (char)('a' + doc_rnd(letters));
        s->p[i] = s->text[i];
    }
}

/* The first place where any stop ends; of several there the longest; of equal ones the first. */
static int slow_find(const struct stops *s, const char *text, size_t n, size_t *begin)
{
    for (size_t end = 1; end <= n; end++) {
        int best = -1;
        for (size_t i = 0; i < s->n; i++)
            if (s->len[i] <= end && memcmp(text + end - s->len[i], s->p[i], s->len[i]) == 0 &&
                (best < 0 || s->len[i] > s->len[best]))
                best = (int)i;
        if (best >= 0) {
            *begin = end - s->len[best];
            return best;
        }
    }
    *begin = n;
    return -1;
}

/* Bytes at the end of text that may still become a stop. */
static size_t slow_held(const struct stops *s, const char *text, size_t n)
{
    for (size_t k = n < 16 ? n : 16; k > 0; k--)
        for (size_t i = 0; i < s->n; i++)
            if (k < s->len[i] && memcmp(text + n - k, s->p[i], k) == 0)
                return k;
    return 0;
}

static void one_stream(const struct stops *s, const struct stop_set *set, const char *text, size_t n)
{
    struct stop_matcher m;
    char got[512];
    size_t at = 0, n_got = 0, begin, len;
    const char *out;
    int matched = -1, want = slow_find(s, text, n, &begin);
    stop_matcher_init(&m, set);
    while (at < n) {
        size_t k = doc_rnd(6);
        k = k < n - at ? k : n - at;
        EXPECT_EQ(stop_matcher_push(&m, text + at, k, &out, &len, &matched), 0);
        EXPECT_EQ(out[len], 0);
        memcpy(got + n_got, out, len);
        n_got += len;
        at += k;
        size_t b;
        int now = slow_find(s, text, at, &b);
        EXPECT_EQ(matched, now);
        EXPECT_EQ(n_got, now >= 0 ? b : at - slow_held(s, text, at));    /* not a byte more held back, not one less */
    }
    EXPECT_EQ(stop_matcher_flush(&m, &out, &len), 0);
    memcpy(got + n_got, out, len);
    n_got += len;
    EXPECT_EQ(matched, want);
    EXPECT(n_got == begin && memcmp(got, text, begin) == 0);
    stop_matcher_fini(&m);
}

static void equals_a_search_of_the_whole_text(void)
{
    unsigned n_found = 0;
    for (int round = 0; round < 3000 && !tap_case_failed; round++) {
        struct stops s;
        struct stop_set *set = NULL;
        uint32_t letters = 1 + doc_rnd(4);
        random_stops(&s, letters);
        EXPECT_EQ(stop_set_create(&set, s.p, s.len, s.n, NULL), 0);
        for (int k = 0; k < 8; k++) {
            char text[256];
            size_t n = doc_rnd(k % 2 ? 12 : 200), b;
            for (size_t i = 0; i < n; i++)
                text[i] = (char)('a' + doc_rnd(letters + 1));
            one_stream(&s, set, text, n);
            n_found += slow_find(&s, text, n, &b) >= 0;
        }
        stop_set_destroy(set);
    }
    EXPECT(n_found > 2000);
}

static void swallows_all_after_a_stop(void)
{
    struct stop_set *set;
    struct stop_matcher m;
    const char *out;
    size_t len;
    int matched;
    EXPECT_EQ(stop_set_create(&set, (const char *const[]){ "</s>", "\n\n" }, (const size_t[]){ 4, 2 }, 2, NULL), 0);
    stop_matcher_init(&m, set);
    EXPECT_EQ(stop_matcher_push(&m, "one\n", 4, &out, &len, &matched), 0);
    EXPECT_STR(out, "one");
    EXPECT_EQ(stop_matcher_push(&m, "two<", 4, &out, &len, &matched), 0);
    EXPECT_STR(out, "\ntwo");
    EXPECT_EQ(stop_matcher_push(&m, "/s>more", 7, &out, &len, &matched), 0);
    EXPECT_STR(out, "");
    EXPECT_EQ(matched, 0);
    EXPECT_EQ(stop_matcher_push(&m, "\n\nmore", 6, &out, &len, &matched), 0);
    EXPECT_STR(out, "");
    EXPECT_EQ(matched, 0);
    EXPECT_EQ(stop_matcher_flush(&m, &out, &len), 0);
    EXPECT_STR(out, "");
    stop_matcher_fini(&m);
    stop_set_destroy(set);
}

static void no_stops_pass_everything(void)
{
    struct stop_matcher m;
    struct stop_set *empty = NULL;
    const char *out;
    size_t len;
    int matched;
    EXPECT_EQ(stop_set_create(&empty, NULL, NULL, 0, NULL), 0);
    for (int i = 0; i < 2; i++) {
        stop_matcher_init(&m, i ? empty : NULL);
        EXPECT_EQ(stop_matcher_push(&m, "abc", 3, &out, &len, &matched), 0);
        EXPECT_STR(out, "abc");
        EXPECT_EQ(matched, -1);
        EXPECT_EQ(stop_matcher_flush(&m, &out, &len), 0);
        EXPECT_EQ(len, 0);
        stop_matcher_fini(&m);
    }
    stop_set_destroy(empty);
}

static void bad_stops_are_refused(void)
{
    struct stop_set *set = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(stop_set_create(&set, (const char *const[]){ "a", "" }, (const size_t[]){ 1, 0 }, 2, &err), -EINVAL);
    EXPECT_STR(err.param, "stop");
    size_t big = (2u << 20);
    char *p = calloc(1, big);
    EXPECT_EQ(stop_set_create(&set, (const char *const[]){ p }, &big, 1, &err), -E2BIG);
    free(p);
    EXPECT(set == NULL);
}

/* aaaa...b against a stream of a's: naive restarting would be quadratic. */
static void stays_linear(void)
{
    size_t n = 1 << 19;
    char *stop = malloc(n), *text = malloc(8 * n);
    memset(stop, 'a', n);
    stop[n - 1] = 'b';
    memset(text, 'a', 8 * n);
    struct stop_set *set;
    struct stop_matcher m;
    const char *out;
    size_t len, total = 0;
    int matched;
    EXPECT_EQ(stop_set_create(&set, (const char *const[]){ stop }, &n, 1, NULL), 0);
    stop_matcher_init(&m, set);
    EXPECT_EQ(stop_matcher_push(&m, text, 8 * n, &out, &len, &matched), 0);
    total += len;
    EXPECT_EQ(stop_matcher_push(&m, "b", 1, &out, &len, &matched), 0);
    EXPECT_EQ(matched, 0);
    EXPECT_EQ(total + len, 8 * n + 1 - n);
    stop_matcher_fini(&m);
    stop_set_destroy(set);
    free(stop);
    free(text);
}

int main(void)
{
    RUN(equals_a_search_of_the_whole_text);
    RUN(swallows_all_after_a_stop);
    RUN(no_stops_pass_everything);
    RUN(bad_stops_are_refused);
    RUN(stays_linear);
    return tap_done();
}
