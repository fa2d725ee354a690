/* Rendering of render.h: collects what the plugin writes, then tokenises it whole. */
#include "chat/render.h"

#include <stdlib.h>
#include <string.h>

#include <json-c/json.h>

#include "chat/calls.h"

struct sink {
    struct sbuf *text;
    struct tok_range *ranges; size_t n_ranges, cap_ranges;      /* where special tokens count */
    size_t *marks; size_t n_marks, cap_marks;                   /* byte offsets */
    bool content_too;
};

void prompt_fini(struct prompt *p)
{
    sbuf_fini(&p->text);
    tok_ids_fini(&p->ids);
    free(p->marks);
    *p = (struct prompt){ 0 };
}

static int grow(void **array, size_t *cap, size_t n, size_t elem)
{
    if (n < *cap)
        return 0;
    size_t want = *cap ? *cap * 2 : 16;
    void *p = realloc(*array, want * elem);
    if (p == NULL)
        return -ENOMEM;
    *array = p;
    *cap = want;
    return 0;
}

static int sink_text(void *ctx, const char *text, size_t len, uint32_t flags)
{
    struct sink *s = ctx;
    size_t from = s->text->n;
    sbuf_add(s->text, text, len);
    if (s->text->failed)
        return -ENOMEM;
    if (len == 0 || (flags & ARLE_TEXT_LITERAL) != 0 || (!(flags & ARLE_TEXT_TEMPLATE) && !s->content_too))
        return 0;
    /* Pieces that touch make one range: a template may write one literal in two calls. */
    if (s->n_ranges > 0 && s->ranges[s->n_ranges - 1].end == from) {
        s->ranges[s->n_ranges - 1].end = s->text->n;
        return 0;
    }
    if (grow((void **)&s->ranges, &s->cap_ranges, s->n_ranges, sizeof *s->ranges) < 0)
        return -ENOMEM;
    s->ranges[s->n_ranges++] = (struct tok_range){ from, s->text->n };
    return 0;
}

static int sink_mark(void *ctx, uint32_t mark)
{
    struct sink *s = ctx;
    if (s->n_marks > 0 && s->marks[s->n_marks - 1] == s->text->n)
        return 0;
    if (grow((void **)&s->marks, &s->cap_marks, s->n_marks, sizeof *s->marks) < 0)
        return -ENOMEM;
    s->marks[s->n_marks++] = s->text->n;
    return 0;
}

static size_t token_len(const struct tokenizer *tok, int32_t id)
{
    const char *bytes;
    size_t n = 0;
    return tokenizer_token_bytes(tok, id, &bytes, &n) == 0 ? n : 0;
}

/*
 * Byte offsets -> token positions. When the tokens spell the text byte for byte, a mark is the last token border at or
 * before it. Normalisation may have changed the text; then the position is the number of leading tokens that the text up to
 * the mark shares with the whole, found by tokenising that part (marks after the first few changed ones are given up).
 */
static int place_marks(struct prompt *p, const struct served_model *m, const struct sink *s)
{
    size_t total = 0;
    for (size_t i = 0; i < p->ids.n; i++)
        total += token_len(m->tok, p->ids.ids[i]);
    if (s->n_marks == 0)
        return 0;
    p->marks = calloc(s->n_marks, sizeof *p->marks);
    if (p->marks == NULL)
        return -ENOMEM;
    bool exact = total == p->text.n;
    size_t at = 0, tok = 0, slow = 0;
    for (size_t i = 0; i < s->n_marks; i++) {
        size_t common = 0;
        if (exact) {
            for (size_t len; tok < p->ids.n && at + (len = token_len(m->tok, p->ids.ids[tok])) <= s->marks[i]; tok++)
                at += len;
            common = tok;
        } else if (slow++ < 4) {
            struct tok_ids part = TOK_IDS_INIT;
            size_t n = 0;
            while (n < s->n_ranges && s->ranges[n].end <= s->marks[i])
                n++;
            if (tokenizer_encode_ranges(m->tok, p->text.p, s->marks[i], s->ranges, n, &part, NULL) == 0)
                while (common < part.n && common < p->ids.n && part.ids[common] == p->ids.ids[common])
                    common++;
            tok_ids_fini(&part);
        }
        if (common > 0 && (p->n_marks == 0 || p->marks[p->n_marks - 1] < common))
            p->marks[p->n_marks++] = (uint32_t)common;
    }
    return 0;
}

int prompt_render(struct prompt *p, const struct served_model *m, const char *tenant, struct json_object *conversation,
                  struct arle_err *err)
{
    if (!ARLE_HAS(m->api, struct arle_model_api, chat_render))
        return arle_err_param(err, -ENOTSUP, "messages", "model %s has no chat format; use /v1/completions", m->name);
    struct sink s = { .text = &p->text, .content_too = m->special_in_content };
    struct arle_chat_sink out = { .ctx = &s, .text = sink_text, .mark = sink_mark };
    struct arle_chat_result res = { .struct_size = sizeof res };
    size_t len;
    call_memory_recall(m->calls, tenant, conversation);
    const char *json = json_object_to_json_string_length(conversation, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE,
                                                         &len);
    int r = json == NULL ? arle_err_set(err, -ENOMEM, "no memory for the conversation")
                         : m->api->chat_render(m->api_ctx, json, len, &out, &res, err);
    if (r == 0)
        r = tokenizer_encode_ranges(m->tok, sbuf_text(&p->text), p->text.n, s.ranges, s.n_ranges, &p->ids, err);
    if (r == 0 && place_marks(p, m, &s) < 0)
        r = arle_err_set(err, -ENOMEM, "no memory for the prompt");
    p->starts_in_reasoning = res.starts_in_reasoning;
    free(s.ranges);
    free(s.marks);
    return r < 0 ? r : 0;
}

int prompt_from_text(struct prompt *p, const struct served_model *m, const char *text, size_t len, struct arle_err *err)
{
    sbuf_add(&p->text, text, len);
    if (p->text.failed)
        return arle_err_set(err, -ENOMEM, "no memory for the prompt");
    return tokenizer_encode(m->tok, text, len, TOK_ALLOW_SPECIAL, &p->ids, err);
}
