/*
 * Encoding. The steps: check UTF-8; split out added tokens; bring what lies between them to NFC; split out the added
 * tokens that are defined on normalised text; cut the rest into pieces; merge each piece.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "chat/tok_int.h"

/* ---- scratch ---- */

void tok_scratch_free(struct tok_scratch *s)
{
    if (s == NULL)
        return;
    for (int i = 0; i < TOK_MAX_STAGES; i++)
        pcre2_match_data_free(s->match[i]);
    tok_buf_fini(&s->norm);
    tok_buf_fini(&s->work);
    free(s->pieces);
    free(s);
}

static struct tok_scratch *scratch_new(void)
{
    size_t bytes = sizeof(struct tok_piece) << TOK_PIECE_BITS;
    struct tok_scratch *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->pieces = aligned_alloc(64, bytes);
    if (s->pieces == NULL) {
        free(s);
        return NULL;
    }
    memset(s->pieces, 0, bytes);
    return s;
}

/* The pool makes the piece cache outlive a call: short texts, the common case, then find it warm. */
static struct tok_scratch *scratch_take(struct tokenizer *tok)
{
    pthread_mutex_lock(&tok->mu);
    struct tok_scratch *s = tok->idle;
    if (s != NULL)
        tok->idle = s->next;
    pthread_mutex_unlock(&tok->mu);
    return s != NULL ? s : scratch_new();
}

#define KEEP_BYTES ((size_t)4 << 20)

static void scratch_give(struct tokenizer *tok, struct tok_scratch *s)
{
    if (s->norm.cap > KEEP_BYTES)
        tok_buf_fini(&s->norm);
    if (s->work.cap > KEEP_BYTES)
        tok_buf_fini(&s->work);
    pthread_mutex_lock(&tok->mu);
    s->next = tok->idle;
    tok->idle = s;
    pthread_mutex_unlock(&tok->mu);
}

/* ---- encode ---- */

/* One text on its way: what is constant over it. */
struct encoding {
    struct tok_run run;
    const uint8_t *text, *end;
    const struct tok_range *allowed;    /* NULL: everywhere */
    size_t n_allowed;
    bool match_added, plain;            /* plain: nothing in the text for NFC to touch */
};

typedef int (*gap_fn)(struct encoding *enc, const uint8_t *p, const uint8_t *end);

static const uint8_t *white_space_before(const uint8_t *from, const uint8_t *p)
{
    while (p > from) {
        const uint8_t *q = p - 1;
        unsigned len;
        while ((*q & 0xC0) == 0x80)
            q--;
        if ((tok_prop(tok_utf8(q, &len)) & TOK_WS) == 0)
            break;
        p = q;
    }
    return p;
}

static const uint8_t *white_space_after(const uint8_t *p, const uint8_t *end)
{
    unsigned len;
    for (; p < end && (tok_prop(tok_utf8(p, &len)) & TOK_WS) != 0; p += len)
        ;
    return p;
}

/* The next literal in [p, end) that lies within an allowed range. *at is the range to look at first, and moves on. */
static bool next_allowed(const struct encoding *enc, const struct tok_literals *set, const uint8_t *p,
                         const uint8_t *end, size_t *at, struct tok_hit *hit)
{
    if (enc->allowed == NULL)
        return tok_literals_next(enc->run.t, set, p, end, hit);
    for (; *at < enc->n_allowed; ++*at) {
        const uint8_t *a = enc->text + enc->allowed[*at].begin, *b = enc->text + enc->allowed[*at].end;
        if (a >= end)
            return false;
        if (tok_literals_next(enc->run.t, set, a > p ? a : p, b < end ? b : end, hit))
            return true;
    }
    return false;
}

/* Emits the literals of a set found in [p, end) and hands the gaps between them on. */
static int split_added(struct encoding *enc, const struct tok_literals *set, const uint8_t *p, const uint8_t *end,
                       gap_fn gap)
{
    const uint8_t *start = p, *done = p;
    struct tok_ids *out = enc->run.out;
    struct tok_hit hit;
    size_t at = 0;
    int r = 0;
    while (next_allowed(enc, set, p, end, &at, &hit)) {
        const uint8_t *begin = hit.begin, *stop = hit.end;
        p = hit.end;
        if (hit.tok->flags & TOK_ADDED_LSTRIP) {
            begin = white_space_before(start, begin);
            begin = begin > done ? begin : done;
        }
        if (hit.tok->flags & TOK_ADDED_RSTRIP)
            stop = white_space_after(stop, end);
        if (begin > done)
            r = gap(enc, done, begin);
        if (r == 0 && tok_ids_reserve(out, 1) < 0)
            r = arle_err_set(enc->run.err, -ENOMEM, "no memory for token ids");
        if (r < 0)
            return r;
        out->ids[out->n++] = (int32_t)hit.tok->id;
        done = stop;
    }
    return done < end ? gap(enc, done, end) : 0;
}

static int gap_pretok(struct encoding *enc, const uint8_t *p, const uint8_t *end)
{
    return tok_pretok(&enc->run, p, end);
}

/* Normalises a gap if it needs it; `readable` follows the text into the scratch buffer and back. */
static int gap_normalise(struct encoding *enc, const uint8_t *p, const uint8_t *end)
{
    const struct tok_tables *t = enc->run.t;
    bool normal = enc->match_added && enc->allowed == NULL && t->normal.n > 0;
    bool changed = t->nfc && !enc->plain && !tok_nfc_is_plain(p, (size_t)(end - p));
    const uint8_t *readable = enc->run.readable;
    int r = 0;
    if (changed) {
        struct tok_buf *norm = &enc->run.s->norm;
        norm->n = 0;
        r = tok_nfc(norm, &enc->run.s->work, p, (size_t)(end - p));
        if (r < 0)
            return arle_err_set(enc->run.err, r, "no memory to normalise text");
        p = norm->p;
        end = p + norm->n;
        enc->run.readable = end + TOK_BUF_SLACK / 2;
        memset(norm->p + norm->n, 0, TOK_BUF_SLACK / 2);
    }
    r = normal ? split_added(enc, &t->normal, p, end, gap_pretok) : tok_pretok(&enc->run, p, end);
    enc->run.readable = readable;
    return r;
}

/*
 * With ranges, literals defined on normalised text are looked for before normalising too: ranges count bytes of the
 * input.
 */
static int gap_ranges(struct encoding *enc, const uint8_t *p, const uint8_t *end)
{
    return split_added(enc, &enc->run.t->normal, p, end, gap_normalise);
}

static int encode(const struct tokenizer *ctok, struct encoding *enc, struct tok_ids *out, struct arle_err *err)
{
    struct tokenizer *tok = (struct tokenizer *)ctok;   /* only the pool changes, under its mutex */
    size_t len = (size_t)(enc->end - enc->text), n_before = out->n;
    size_t good = tok_scan(enc->text, len, &enc->plain);
    if (good != len)
        return arle_err_set(err, -EILSEQ, "text is not valid UTF-8 at byte %zu", good);
    struct tok_scratch *s = scratch_take(tok);
    if (s == NULL)
        return arle_err_set(err, -ENOMEM, "no memory to encode text");
    enc->run = (struct tok_run){ .t = &tok->t, .s = s, .out = out, .readable = enc->end, .err = err };
    int r = 0;
    if (tok_ids_reserve(out, len / 3 + 16) < 0)         /* English needs less; the rest grows */
        r = arle_err_set(err, -ENOMEM, "no memory for token ids");
    else if (!enc->match_added)
        r = len > 0 ? gap_normalise(enc, enc->text, enc->end) : 0;
    else
        r = split_added(enc, &tok->t.raw, enc->text, enc->end, enc->allowed ? gap_ranges : gap_normalise);
    scratch_give(tok, s);
    if (r < 0)
        out->n = n_before;
    return r;
}

int tokenizer_encode(const struct tokenizer *tok, const char *text, size_t len, unsigned flags, struct tok_ids *out,
                     struct arle_err *err)
{
    struct encoding enc = { .text = (const uint8_t *)text, .match_added = (flags & TOK_ALLOW_SPECIAL) != 0 };
    enc.end = enc.text + len;
    return encode(tok, &enc, out, err);
}

int tokenizer_encode_ranges(const struct tokenizer *tok, const char *text, size_t len, const struct tok_range *allowed,
                            size_t n_allowed, struct tok_ids *out, struct arle_err *err)
{
    size_t last = 0;
    for (size_t i = 0; i < n_allowed; i++) {
        if (allowed[i].begin < last || allowed[i].end < allowed[i].begin || allowed[i].end > len)
            return arle_err_set(err, -EINVAL, "range %zu of added tokens is not ascending within the text", i);
        last = allowed[i].end;
    }
    struct encoding enc = { .text = (const uint8_t *)text, .allowed = allowed, .n_allowed = n_allowed,
                            .match_added = n_allowed > 0 };
    enc.end = enc.text + len;
    return encode(tok, &enc, out, err);
}
