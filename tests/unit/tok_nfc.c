/*
 * NFC against utf8proc on characters that both Unicode versions know, and the places where the reference library
 * differs.
 */
#include <utf8proc.h>

#include "chat/tok_int.h"
#include "tok_make.h"

/* Blocks without characters newer than the reference's NFC data. */
static const uint32_t blocks[][2] = {
    { 0x20, 0x7F },     { 0xA0, 0x250 },    { 0x300, 0x370 },   { 0x370, 0x530 },     { 0x591, 0x5C8 },
    { 0x900, 0x9FE },   { 0xB00, 0xB55 },   { 0xDC0, 0xE00 },   { 0xF40, 0xFC0 },     { 0x1100, 0x1200 },
    { 0x1E00, 0x2000 }, { 0x2000, 0x2003 }, { 0x2120, 0x2130 }, { 0x2ADC, 0x2ADD },   { 0x3041, 0x3100 },
    { 0xAC00, 0xAD00 }, { 0xF900, 0xFA60 }, { 0xFB1D, 0xFB50 }, { 0x1D15E, 0x1D1C0 }, { 0x2F800, 0x2FA1E },
};

static uint32_t random_cp(void)
{
    const uint32_t *b = blocks[doc_rnd(3) ? doc_rnd(sizeof blocks / sizeof blocks[0]) : 2];
    return b[0] + doc_rnd(b[1] - b[0]);
}

static void expect_nfc(const uint8_t *p, size_t n, const uint8_t *want, size_t n_want)
{
    struct tok_buf out = { 0 }, work = { 0 };
    EXPECT_EQ(tok_nfc(&out, &work, p, n), 0);
    if (out.n != n_want || memcmp(out.p, want, n_want) != 0) {
        TAP_FAIL("NFC of %zu bytes gives %zu, expected %zu", n, out.n, n_want);
        for (size_t i = 0; i < n; i++)
            printf("%s%02X", i ? " " : "#   ", p[i]);
        printf("\n");
    }
    tok_buf_fini(&out);
    tok_buf_fini(&work);
}

static void equals_utf8proc(void)
{
    unsigned n_changed = 0;
    for (int round = 0; round < 60000 && !tap_case_failed; round++) {
        uint8_t text[2048];
        size_t n = 0;
        for (uint32_t k = 1 + doc_rnd(round % 50 ? 10 : 300); k > 0; k--)
            n += tok_utf8_put(text + n, random_cp());
        text[n] = '\0';
        utf8proc_uint8_t *want = NULL;
        utf8proc_ssize_t r = utf8proc_map(text, (utf8proc_ssize_t)n, &want, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        REQUIRE(r >= 0);
        expect_nfc(text, n, want, (size_t)r);
        bool changed = (size_t)r != n || memcmp(text, want, n) != 0, plain = false;
        EXPECT_EQ(tok_scan(text, n, &plain), n);
        EXPECT(!(changed && plain));
        EXPECT_EQ(plain, tok_nfc_is_plain(text, n));
        n_changed += changed;
        free(want);
    }
    EXPECT(n_changed > 5000);
}

static void same(const char *text, const char *want)
{
    expect_nfc((const uint8_t *)text, strlen(text), (const uint8_t *)want, strlen(want));
}

static void follows_the_reference_where_unicode_moved_on(void)
{
    same("\xE0\xA3\x93\xCC\xA3", "\xE0\xA3\x93\xCC\xA3");     /* U+08D3 has class 220, but only since Unicode 11 */
    same("\xCC\x81\xE0\xA3\x93", "\xCC\x81\xE0\xA3\x93");
    same("\xF0\x91\xA4\xB5\xF0\x91\xA4\xB0", "\xF0\x91\xA4\xB5\xF0\x91\xA4\xB0");    /* composes to U+11938 since 13 */
    same("e\xCC\x81", "\xC3\xA9");
    same("\xE2\x84\xAB", "\xC3\x85");
}

static void many_marks_stay_linear(void)
{
    size_t n_pairs = 100000, n = 0;
    uint8_t *text = malloc(4 * n_pairs + 1), *want = malloc(4 * n_pairs + 1);
    text[n++] = 'x';
    for (size_t i = 0; i < n_pairs; i++) {
        memcpy(text + n, "\xCC\x81\xCC\xA3", 4); /* classes 230 and 220 in turn: all of the second kind go first */
        n += 4;
    }
    want[0] = 'x';      /* x has a composite with neither */
    for (size_t i = 0; i < n_pairs; i++) {
        memcpy(want + 1 + 2 * i, "\xCC\xA3", 2);
        memcpy(want + 1 + 2 * (n_pairs + i), "\xCC\x81", 2);
    }
    expect_nfc(text, n, want, n);
    free(text);
    free(want);
}

static void scan_finds_the_first_bad_byte(void)
{
    static const struct {
        const char *text;
        size_t len, good;
    } cases[] = {
        { "", 0, 0 },
        { "abc", 3, 3 },
        { "a\x80", 2, 1 },
        { "a\xC3", 2, 1 },
        { "\xC0\x80", 2, 0 },
        { "\xE0\x80\x80", 3, 0 },
        { "\xED\xA0\x80", 3, 0 },
        { "\xF4\x90\x80\x80", 4, 0 },
        { "\xF8\x88\x80\x80\x80", 5, 0 },
        { "\xF0\x9F\x98\x80", 4, 4 },
        { "0123456789012345678901234567890123456789\xFF", 41, 40 },
        { "\xE2\x82", 2, 0 },
        { "\xC3\xA9\xC3(", 4, 2 },
        { "a\0b", 3, 3 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        bool plain;
        EXPECT_EQ(tok_scan((const uint8_t *)cases[i].text, cases[i].len, &plain), cases[i].good);
    }
}

int main(void)
{
    RUN(equals_utf8proc);
    RUN(follows_the_reference_where_unicode_moved_on);
    RUN(many_marks_stay_linear);
    RUN(scan_finds_the_first_bad_byte);
    return tap_done();
}
