/*
 * Finding the literals of added tokens in text: leftmost, and the longest of those that start there. The literals are
 * sorted, so matching narrows a range of the list byte by byte; nothing is built for it but 257 starting points.
 */
#include <string.h>

#include "chat/tok_int.h"

static inline const uint8_t *literal(const struct tok_tables *t, const struct tok_added *a, size_t *len)
{
    uint32_t off = t->text_off[a->id];
    *len = t->text_off[a->id + 1] - off;
    return t->blob + off;
}

void tok_literals_index(const struct tok_tables *t, struct tok_literals *set)
{
    uint32_t i = 0;
    unsigned n_bytes = 0;
    for (unsigned b = 0; b < 256; b++) {
        size_t len;
        set->first[b] = i;
        while (i < set->n && literal(t, &set->list[i], &len)[0] == b)
            i++;
        if (i != set->first[b]) {
            n_bytes++;
            set->only_byte = (int)b;
        }
    }
    set->first[256] = i;
    if (n_bytes != 1)
        set->only_byte = -1;
}

/* Byte `at` of a literal, or -1 past its end (which sorts first). */
static inline int byte_at(const struct tok_tables *t, const struct tok_added *a, size_t at)
{
    size_t len;
    const uint8_t *p = literal(t, a, &len);
    return at < len ? p[at] : -1;
}

/* First of [lo, hi), which agree on all bytes before `at`, whose byte there is >= want. */
static uint32_t narrow(const struct tok_tables *t, const struct tok_literals *set, uint32_t lo, uint32_t hi, size_t at,
                       int want)
{
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (byte_at(t, &set->list[mid], at) < want)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest literal at p, or NULL. */
static const struct tok_added *longest_at(const struct tok_tables *t, const struct tok_literals *set, const uint8_t *p,
                                          const uint8_t *end, size_t *out_len)
{
    uint32_t lo = set->first[p[0]], hi = set->first[p[0] + 1];
    const struct tok_added *best = NULL;
    for (size_t at = 1; lo < hi; at++) {
        size_t len;
        literal(t, &set->list[lo], &len);
        if (len == at) {                /* the shortest of the range sorts first */
            best = &set->list[lo];
            *out_len = len;
            lo++;
        }
        if (p + at == end)
            break;
        lo = narrow(t, set, lo, hi, at, p[at]);
        hi = narrow(t, set, lo, hi, at, p[at] + 1);
    }
    return best;
}

bool tok_literals_next(const struct tok_tables *t, const struct tok_literals *set, const uint8_t *p, const uint8_t *end,
                       struct tok_hit *out)
{
    while (set->n > 0 && p < end) {
        if (set->only_byte >= 0) {
            p = memchr(p, set->only_byte, (size_t)(end - p));
            if (p == NULL)
                return false;
        } else {
            while (p < end && set->first[*p] == set->first[*p + 1])
                p++;
            if (p == end)
                return false;
        }
        size_t len;
        const struct tok_added *a = longest_at(t, set, p, end, &len);
        if (a != NULL) {
            *out = (struct tok_hit){ p, p + len, a };
            return true;
        }
        p++;
    }
    return false;
}
