/*
 * The streaming detokeniser: whatever the split, the pieces add up to the lossy decoding of the whole, in whole
 * characters.
 */
#include "chat/detok.h"
#include "chat/tok_unicode.h"
#include "tok_make.h"

static struct tokenizer *tok;

/*
 * What the reference does at the end, written as a rule of its own: a broken part is the longest prefix of a character.
 */
static size_t slow_lossy(const uint8_t *p, size_t n, char *out)
{
    size_t done = 0;
    for (size_t i = 0; i < n;) {
        size_t best = 1, full = 0;
        for (size_t k = 1; k <= 4 && i + k <= n && full == 0; k++) {
            unsigned part;
            int cut;
            unsigned c = tok_utf8_check(p + i, p + i + k, &part, &cut);
            full = c == k ? k : 0;
            best = cut ? k : best;
        }
        memcpy(out + done, full ? (const char *)p + i : "\xEF\xBF\xBD", full ? full : 3);
        done += full ? full : 3;
        i += full ? full : best;
    }
    return done;
}

static void push(struct detok *d, const char *bytes, size_t n, char *all, size_t *n_all)
{
    const char *out;
    size_t len;
    EXPECT_EQ(detok_push_bytes(d, bytes, n, &out, &len), 0);
    EXPECT_EQ(out[len], 0);
    for (size_t i = 0; i < len;) {
        unsigned part;
        int cut;
        unsigned c = tok_utf8_check((const uint8_t *)out + i, (const uint8_t *)out + len, &part, &cut);
        EXPECT(c > 0);
        i += c ? c : 1;
    }
    memcpy(all + *n_all, out, len);
    *n_all += len;
    EXPECT(d->n_held < 4);
}

static void any_split_gives_the_same_text(void)
{
    static const char *const part[] = {
        "a",    "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\xE2\x82", "\xF0\x9F\x98", "\xF0\x9F", "\xC3",
        "\x80", "\xFF",     "\xED\xA0\x80", "\xF4\x90",         "\xC0\xAF", "\xE0\x80",     "z"
    };
    for (int round = 0; round < 20000 && !tap_case_failed; round++) {
        char text[128], want[512], all[512];
        size_t n = 0, n_all = 0, at = 0;
        for (uint32_t k = doc_rnd(12); k > 0; k--) {
            const char *p = part[doc_rnd(sizeof part / sizeof part[0])];
            memcpy(text + n, p, strlen(p));
            n += strlen(p);
        }
        size_t n_want = slow_lossy((const uint8_t *)text, n, want);
        struct detok d;
        detok_init(&d, tok, 0);
        while (at < n) {
            size_t k = doc_rnd(5);
            k = k < n - at ? k : n - at;
            push(&d, text + at, k, all, &n_all);
            at += k;
        }
        const char *out;
        size_t len;
        EXPECT_EQ(detok_flush(&d, &out, &len), 0);
        memcpy(all + n_all, out, len);
        n_all += len;
        EXPECT_EQ(detok_flush(&d, &out, &len), 0);
        EXPECT_EQ(len, 0);
        EXPECT(n_all == n_want && memcmp(all, want, n_want) == 0);
        detok_fini(&d);
    }
}

static void pushes(struct detok *d, int32_t id, const char *want)
{
    const char *out = NULL;
    size_t len = 0;
    EXPECT_EQ(detok_push(d, id, &out, &len), 0);
    EXPECT_STR(out, want);
    EXPECT_EQ(len, strlen(want));
}

static void characters_wait_until_they_are_whole(void)
{
    struct detok d;
    detok_init(&d, tok, 0);
    pushes(&d, 0xE2, "");
    pushes(&d, 0x82, "");
    pushes(&d, 0xAC, "\xE2\x82\xAC");
    pushes(&d, 0xE2, "");
    pushes(&d, 'x', "\xEF\xBF\xBDx");       /* certain now */
    pushes(&d, 0xF0, "");
    pushes(&d, 256, "\xEF\xBF\xBD<end>");
    pushes(&d, 0xF0, "");
    const char *out;
    size_t len;
    EXPECT_EQ(detok_flush(&d, &out, &len), 0);
    EXPECT_STR(out, "\xEF\xBF\xBD");
    detok_fini(&d);
}

static void special_tokens_can_be_skipped(void)
{
    struct detok d;
    detok_init(&d, tok, TOK_SKIP_SPECIAL);
    pushes(&d, 256, "");
    pushes(&d, 257, "<think>");
    pushes(&d, 9999, "");
    pushes(&d, -1, "");
    pushes(&d, 0xC3, "");
    pushes(&d, 256, "");        /* nothing at all: a character may still be finished after it */
    pushes(&d, 0xA9, "\xC3\xA9");
    detok_fini(&d);
}

int main(void)
{
    tok = doc_open(&(struct doc_opts){
        .added = "{\"id\":256,\"content\":\"<end>\",\"special\":true},{\"id\":257,\"content\":\"<think>\"}" });
    if (tok == NULL)
        return 1;
    RUN(any_split_gives_the_same_text);
    RUN(characters_wait_until_they_are_whole);
    RUN(special_tokens_can_be_skipped);
    tokenizer_close(tok);
    return tap_done();
}
