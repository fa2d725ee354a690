/*
 * The chain of answer.h: ids -> detokeniser -> automaton -> stop strings (content only) -> the caller. Without a chat
 * format the automaton is left out.
 */
#include "chat/answer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Content goes through the stop matcher; everything else ends a held-back stop prefix and passes. */
static void from_automaton(void *arg, const struct chat_event *ev)
{
    struct answer *a = arg;
    const char *text;
    size_t len;
    int matched = -1;
    if (a->stopped)
        return;
    if (ev->kind != CHAT_CONTENT) {
        struct chat_event held = { .kind = CHAT_CONTENT };
        if (stop_matcher_flush(&a->stops, &held.text, &held.len) == 0 && held.len > 0)
            a->o.fn(a->o.arg, &held);
        a->o.fn(a->o.arg, ev);
        return;
    }
    if (stop_matcher_push(&a->stops, ev->text, ev->len, &text, &len, &matched) < 0) {
        a->oom = true;
        return;
    }
    struct chat_event out = { .kind = CHAT_CONTENT, .text = text, .len = len };
    if (len > 0)
        a->o.fn(a->o.arg, &out);
    if (matched >= 0) {
        a->stopped = true;
        a->stop_index = matched;
    }
}

int answer_init(struct answer *a, const struct answer_opts *opts)
{
    *a = (struct answer){ .o = *opts, .stop_index = -1 };
    detok_init(&a->detok, opts->model->tok, opts->keep_special ? 0 : TOK_SKIP_SPECIAL);
    stop_matcher_init(&a->stops, opts->stops);
    if (!opts->chat)
        return 0;
    struct automaton_opts ao = { .syntax = opts->model->syntax, .tools = opts->tools, .parse_calls = opts->parse_calls,
                                 .starts_in_reasoning = opts->starts_in_reasoning, .fn = from_automaton, .arg = a };
    a->automaton = automaton_create(&ao);
    return a->automaton != NULL ? 0 : -ENOMEM;
}

void answer_fini(struct answer *a)
{
    automaton_destroy(a->automaton);
    detok_fini(&a->detok);
    stop_matcher_fini(&a->stops);
    sbuf_fini(&a->said);
    free(a->added);
    *a = (struct answer){ 0 };
}

static int feed(struct answer *a, const char *text, size_t len)
{
    if (a->stopped || len == 0)
        return 0;
    if (a->o.keep_calls)
        sbuf_add(&a->said, text, len);
    if (a->automaton != NULL)
        return automaton_push(a->automaton, text, len);
    from_automaton(a, &(struct chat_event){ .kind = CHAT_CONTENT, .text = text, .len = len });
    return 0;
}

/* Notes an added token whose text, if it is shown, was the last that was fed. */
static int note_added(struct answer *a, int32_t id)
{
    const char *bytes;
    size_t len = 0;
    if (!tokenizer_is_added(a->o.model->tok, id) || a->stopped)
        return 0;
    if (a->o.keep_special || !tokenizer_is_special(a->o.model->tok, id))
        (void)tokenizer_token_bytes(a->o.model->tok, id, &bytes, &len);
    if (a->n_added == a->cap_added) {
        size_t cap = a->cap_added ? 2 * a->cap_added : 16;
        struct said_token *p = realloc(a->added, cap * sizeof *p);
        if (p == NULL)
            return -ENOMEM;
        a->added = p;
        a->cap_added = cap;
    }
    a->added[a->n_added++] = (struct said_token){ .at = a->said.n - len, .len = len, .id = id };
    return 0;
}

int answer_push(struct answer *a, int32_t id)
{
    const char *text;
    size_t len;
    for (uint32_t i = 0; i < a->o.n_stop_ids; i++)
        if (a->o.stop_ids[i] == id)
            return 0;
    int r = detok_push(&a->detok, id, &text, &len);
    if (r == 0)
        r = feed(a, text, len);
    if (r == 0 && a->o.keep_calls)
        r = note_added(a, id);
    return a->oom ? -ENOMEM : r;
}

int answer_end(struct answer *a)
{
    const char *text;
    size_t len;
    int r = detok_flush(&a->detok, &text, &len);
    if (r == 0)
        r = feed(a, text, len);
    if (r == 0 && a->automaton != NULL && !a->stopped)
        r = automaton_finish(a->automaton);
    if (r == 0 && !a->stopped) {
        struct chat_event held = { .kind = CHAT_CONTENT };
        r = stop_matcher_flush(&a->stops, &held.text, &held.len);
        if (r == 0 && held.len > 0)
            a->o.fn(a->o.arg, &held);
    }
    return a->oom ? -ENOMEM : r;
}

/* ---- calls as they were sampled ---- */

/* Appends said[from, to) to the section's text, with the added tokens in it, hidden ones included. */
static bool add_said(const struct answer *a, size_t from, size_t to, struct call_section *out)
{
    for (size_t i = 0; i < a->n_added && a->added[i].at < to; i++) {
        const struct said_token *t = &a->added[i];
        const char *bytes = "";
        size_t len = 0;
        if (t->at < from)
            continue;
        sbuf_add(&out->text, a->said.p + from, t->at - from);
        (void)tokenizer_token_bytes(a->o.model->tok, t->id, &bytes, &len);
        struct tok_range *p = realloc(out->added, (out->n_added + 1) * sizeof *p);
        if (p == NULL)
            return false;
        out->added = p;
        p[out->n_added++] = (struct tok_range){ out->text.n, out->text.n + len };
        sbuf_add(&out->text, bytes, len);
        from = t->at + t->len;
    }
    sbuf_add(&out->text, a->said.p + from, to - from);
    return !out->text.failed;
}

/* White space before `at`, not beyond `floor`. */
static size_t before_ws(const struct answer *a, size_t at, size_t floor)
{
    while (at > floor && automaton_is_ws(a->said.p[at - 1]))
        at--;
    return at;
}

uint32_t answer_section(const struct answer *a, uint32_t *call, struct call_section *out)
{
    uint32_t total = 0, first = *call, n = 1;
    if (a->automaton == NULL || !a->o.keep_calls || a->said.failed)
        return 0;
    const struct call_span *spans = automaton_spans(a->automaton, &total);
    if (first >= total)
        return 0;
    bool whole = spans[first].complete;
    for (; first + n < total && !spans[first + n].opens; n++)
        whole &= spans[first + n].complete;
    *call = first + n;
    if (!whole)
        return n;
    int64_t reasoning_end = automaton_reasoning_end(a->automaton);
    size_t from = spans[first].from, to = spans[first + n - 1].to;
    size_t floor = first > 0 ? spans[first - 1].to : reasoning_end > 0 ? (size_t)reasoning_end : 0;
    size_t lead = before_ws(a, from, floor);
    out->follows_section = first > 0;
    out->follows_content = first == 0 && lead > floor;
    out->has_lead = first > 0 || reasoning_end < 0 || lead > floor;
    sbuf_add(&out->lead, a->said.p + lead, from - lead);
    /* What follows, up to the white space before the next section. A stop string made it something else for the client. */
    size_t end = first + n < total ? before_ws(a, spans[first + n].from, to) : a->stopped ? to : a->said.n;
    bool good = add_said(a, from, to, out);
    out->text_len = out->text.n;
    good = good && add_said(a, to, end, out);
    while (to < end && automaton_is_ws(a->said.p[to]))
        to++;
    sbuf_add(&out->shown, a->said.p + to, end - to);
    if (!good)
        call_section_fini(out);
    return n;
}

const char *answer_finish_name(const struct answer *a, enum finish_reason finish)
{
    if (finish == FINISH_LENGTH)
        return "length";
    if (a->automaton != NULL && !a->stopped && automaton_calls(a->automaton) > 0)
        return "tool_calls";
    return "stop";
}
