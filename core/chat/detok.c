/* Streaming detokeniser: appends token bytes to what was held back and emits the characters that are whole. */
#include <stdlib.h>
#include <string.h>

#include "chat/detok.h"
#include "chat/tok_unicode.h"

void detok_init(struct detok *d, const struct tokenizer *tok, unsigned flags)
{
    *d = (struct detok){ .tok = tok, .flags = flags };
}

void detok_fini(struct detok *d)
{
    free(d->buf);
    *d = (struct detok){ 0 };
}

static int reserve(struct detok *d, size_t need)
{
    if (need <= d->cap)
        return 0;
    char *p = realloc(d->buf, 2 * need + 64);
    if (p == NULL)
        return -ENOMEM;
    d->buf = p;
    d->cap = 2 * need + 64;
    return 0;
}

/* A view of held bytes followed by new ones, so that neither is copied together first. */
static size_t window(const struct detok *d, const char *bytes, size_t len, size_t at, uint8_t out[4])
{
    size_t n = 0;
    for (; n < 4 && at < d->n_held + len; at++)
        out[n++] = at < d->n_held ? d->held[at] : (uint8_t)bytes[at - d->n_held];
    return n;
}

int detok_push_bytes(struct detok *d, const char *bytes, size_t len, const char **out_text, size_t *out_len)
{
    size_t total = d->n_held + len, at = 0, n = 0;
    if (reserve(d, 3 * total + 1) < 0)      /* every byte may become a replacement character */
        return -ENOMEM;
    while (at < total) {
        uint8_t w[4];
        unsigned part;
        int cut;
        size_t k = window(d, bytes, len, at, w);
        unsigned c = tok_utf8_check(w, w + k, &part, &cut);
        if (cut)
            break;
        memcpy(d->buf + n, c ? (const char *)w : "\xEF\xBF\xBD", c ? c : 3);
        n += c ? c : 3;
        at += c ? c : part;
    }
    unsigned n_held = (unsigned)(total - at);
    uint8_t rest[4] = { 0 };
    window(d, bytes, len, at, rest);
    memcpy(d->held, rest, sizeof d->held);
    d->n_held = n_held;
    d->buf[n] = '\0';
    *out_text = d->buf;
    *out_len = n;
    return 0;
}

int detok_push(struct detok *d, int32_t id, const char **out_text, size_t *out_len)
{
    const char *bytes = "";
    size_t len = 0;
    if (!((d->flags & TOK_SKIP_SPECIAL) != 0 && tokenizer_is_special(d->tok, id)))
        (void)tokenizer_token_bytes(d->tok, id, &bytes, &len);  /* ids without a token have no text */
    return detok_push_bytes(d, bytes, len, out_text, out_len);
}

int detok_flush(struct detok *d, const char **out_text, size_t *out_len)
{
    if (reserve(d, 4) < 0)
        return -ENOMEM;
    size_t n = d->n_held ? 3 : 0;       /* what is held is always one unfinished character */
    memcpy(d->buf, "\xEF\xBF\xBD", n);
    d->buf[n] = '\0';
    d->n_held = 0;
    *out_text = d->buf;
    *out_len = n;
    return 0;
}
