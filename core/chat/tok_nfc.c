/*
 * Normalisation form C, and the scan that tells whether any is needed. Almost all text takes only the scan.
 * Source: Unicode Standard Annex 15; Hangul arithmetic from chapter 3.12 of the standard.
 */
#include <stdlib.h>
#include <string.h>

#include "chat/tok_int.h"

unsigned tok_utf8_check(const uint8_t *p, const uint8_t *end, unsigned *part, int *cut)
{
    unsigned c = p[0], need, lo = 0x80, hi = 0xBF;
    *part = 1;
    *cut = 0;
    if (c < 0x80)
        return 1;
    if (c < 0xC2 || c > 0xF4)
        return 0;
    need = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    if (c == 0xE0)
        lo = 0xA0;          /* overlong */
    else if (c == 0xED)
        hi = 0x9F;          /* surrogates */
    else if (c == 0xF0)
        lo = 0x90;          /* overlong */
    else if (c == 0xF4)
        hi = 0x8F;          /* above U+10FFFF */
    for (unsigned i = 1; i < need; i++) {
        if (p + i == end) {
            *cut = 1;
            return 0;
        }
        if (p[i] < lo || p[i] > hi)
            return 0;
        *part = i + 1;
        lo = 0x80;
        hi = 0xBF;
    }
    return need;
}

/* First byte at or after p that is not ASCII. */
static const uint8_t *skip_ascii(const uint8_t *p, const uint8_t *end)
{
    while (end - p >= 32) {
        uint64_t w[4];
        memcpy(w, p, sizeof w);
        if ((w[0] | w[1] | w[2] | w[3]) & UINT64_C(0x8080808080808080))
            break;
        p += 32;
    }
    while (p < end && *p < 0x80)
        p++;
    return p;
}

size_t tok_scan(const uint8_t *p, size_t n, bool *plain)
{
    const uint8_t *q = p, *end = p + n;
    unsigned seen = 0;
    while ((q = skip_ascii(q, end)) < end) {
        do {
            unsigned part, len;
            int cut;
            if (tok_utf8_check(q, end, &part, &cut) == 0)
                return (size_t)(q - p);
            seen |= tok_prop(tok_utf8(q, &len));
            q += len;
        } while (q < end && *q >= 0x80);
    }
    *plain = (seen & TOK_NFC) == 0;
    return n;
}

bool tok_nfc_is_plain(const uint8_t *p, size_t n)
{
    const uint8_t *end = p + n;
    while ((p = skip_ascii(p, end)) < end) {
        unsigned len;
        if (tok_prop(tok_utf8(p, &len)) & TOK_NFC)
            return false;
        p += len;
    }
    return true;
}

static unsigned ccc_of(uint32_t cp)
{
    size_t lo = 0, hi = tok_n_cccs;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (cp > tok_cccs[mid].last)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < tok_n_cccs && cp >= tok_cccs[lo].first ? tok_cccs[lo].ccc : 0;
}

static const struct tok_decomp *decomp_of(uint32_t cp)
{
    size_t lo = 0, hi = tok_n_decomps;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (tok_decomps[mid].cp < cp)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < tok_n_decomps && tok_decomps[lo].cp == cp ? &tok_decomps[lo] : NULL;
}

enum { HS = 0xAC00, HL = 0x1100, HV = 0x1161, HT = 0x11A7, HLN = 19, HVN = 21, HTN = 28, HSN = HLN * HVN * HTN };

/* The primary composite of a pair, or 0. */
static uint32_t compose(uint32_t a, uint32_t b)
{
    if (a - HL < HLN && b - HV < HVN)
        return HS + ((a - HL) * HVN + (b - HV)) * HTN;
    if (a - HS < HSN && (a - HS) % HTN == 0 && b - (HT + 1) < HTN - 1)
        return a + (b - HT);
    size_t lo = 0, hi = tok_n_comps;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (tok_comps[mid].a < a || (tok_comps[mid].a == a && tok_comps[mid].b < b))
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < tok_n_comps && tok_comps[lo].a == a && tok_comps[lo].b == b ? tok_comps[lo].cp : 0;
}

/* A code point with its combining class in the top byte: class << 24 | cp. */
static uint32_t with_ccc(uint32_t cp)
{
    return (uint32_t)ccc_of(cp) << 24 | cp;
}

/* Full canonical decomposition of one code point; at most 4 results in any Unicode version. */
static unsigned decompose(uint32_t cp, uint32_t *out)
{
    if (cp - HS < HSN) {
        uint32_t s = cp - HS, t = s % HTN;
        out[0] = HL + s / (HVN * HTN);
        out[1] = HV + s % (HVN * HTN) / HTN;
        out[2] = HT + t;
        return t ? 3 : 2;
    }
    const struct tok_decomp *d = decomp_of(cp);
    if (d == NULL) {
        out[0] = with_ccc(cp);
        return 1;
    }
    unsigned n = decompose(d->to[0], out);      /* steps nest to the left */
    if (d->to[1] != 0)
        n += decompose(d->to[1], out + n);
    return n;
}

/* Canonical order of a run of marks: stable by class. Long runs are counted, so that no input makes this quadratic. */
static void order_marks(uint32_t *cp, size_t n, uint32_t *tmp)
{
    if (n <= 32) {
        for (size_t i = 1; i < n; i++) {
            uint32_t v = cp[i];
            size_t j = i;
            for (; j > 0 && cp[j - 1] >> 24 > v >> 24; j--)
                cp[j] = cp[j - 1];
            cp[j] = v;
        }
        return;
    }
    size_t at[257] = { 0 };
    for (size_t i = 0; i < n; i++)
        at[(cp[i] >> 24) + 1]++;
    for (size_t i = 1; i < 257; i++)
        at[i] += at[i - 1];
    for (size_t i = 0; i < n; i++)
        tmp[at[cp[i] >> 24]++] = cp[i];
    memcpy(cp, tmp, n * sizeof *cp);
}

/* Composes in place and strips the classes; returns the new count. */
static size_t compose_all(uint32_t *cp, size_t n)
{
    size_t out = 0, starter = SIZE_MAX;
    unsigned last = 0;                          /* class of the last mark kept after the starter; 0: none yet */
    for (size_t i = 0; i < n; i++) {
        uint32_t c = cp[i] & 0xFFFFFF;
        unsigned k = cp[i] >> 24;
        bool adjacent = starter != SIZE_MAX && out == starter + 1;
        if (starter != SIZE_MAX && (adjacent || last < k)) {    /* not blocked */
            uint32_t joined = compose(cp[starter], c);
            if (joined != 0) {
                cp[starter] = joined;
                continue;
            }
        }
        if (k == 0) {
            starter = out;
            last = 0;
        } else {
            last = k;
        }
        cp[out++] = c;
    }
    return out;
}

/* Normalises [p, end), which starts at a boundary, into out. */
static int nfc_segment(struct tok_buf *out, struct tok_buf *work, const uint8_t *p, const uint8_t *end)
{
    size_t most = 2 * (size_t)(end - p) + 4;    /* code points; the worst is 2 bytes that become 3 (U+0390) */
    work->n = 0;
    int r = tok_buf_reserve(work, 2 * most * sizeof(uint32_t));
    if (r < 0)
        return r;
    uint32_t *cp = (uint32_t *)(void *)work->p, *tmp = cp + most;
    size_t n = 0, marks = 0;
    while (p < end) {
        unsigned len;
        n += decompose(tok_utf8(p, &len), cp + n);
        p += len;
    }
    for (size_t i = 0; i <= n; i++) {
        if (i < n && cp[i] >> 24 != 0) {
            marks++;
        } else if (marks != 0) {
            order_marks(cp + i - marks, marks, tmp);
            marks = 0;
        }
    }
    n = compose_all(cp, n);
    r = tok_buf_reserve(out, 4 * n);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n; i++)
        out->n += tok_utf8_put(out->p + out->n, cp[i]);
    return 0;
}

int tok_nfc(struct tok_buf *out, struct tok_buf *work, const uint8_t *p, size_t n)
{
    const uint8_t *end = p + n, *kept = p;      /* [kept, p) is not yet in out */
    const uint8_t *last = p;                    /* start of the last character that is a boundary */
    int r = tok_buf_reserve(out, n);
    while (r == 0 && p < end) {
        const uint8_t *q = skip_ascii(p, end);
        if (q != p) {
            last = q - 1;
            p = q;
            continue;
        }
        unsigned len;
        if ((tok_prop(tok_utf8(p, &len)) & TOK_NFC) == 0) {
            last = p;
            p += len;
            continue;
        }
        /* A character that NFC may touch: redo from the boundary before it up to the next one. */
        do {
            p += len;
        } while (p < end && (tok_prop(tok_utf8(p, &len)) & TOK_NFC) != 0);
        r = tok_buf_reserve(out, (size_t)(last - kept));
        if (r < 0)
            return r;
        memcpy(out->p + out->n, kept, (size_t)(last - kept));
        out->n += (size_t)(last - kept);
        r = nfc_segment(out, work, last, p);
        kept = last = p;
    }
    if (r == 0)
        r = tok_buf_reserve(out, (size_t)(end - kept));
    if (r < 0)
        return r;
    memcpy(out->p + out->n, kept, (size_t)(end - kept));
    out->n += (size_t)(end - kept);
    return 0;
}
