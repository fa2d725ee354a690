/*
 * The chain of answer.h: ids -> detokeniser -> automaton -> stop strings (content only) -> the caller. Without a chat
 * format the automaton is left out.
 */
#include "chat/answer.h"

#include <errno.h>
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
    *a = (struct answer){ 0 };
}

static int feed(struct answer *a, const char *text, size_t len)
{
    if (a->stopped || len == 0)
        return 0;
    if (a->automaton != NULL)
        return automaton_push(a->automaton, text, len);
    from_automaton(a, &(struct chat_event){ .kind = CHAT_CONTENT, .text = text, .len = len });
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

const char *answer_finish_name(const struct answer *a, enum finish_reason finish)
{
    if (finish == FINISH_LENGTH)
        return "length";
    if (a->automaton != NULL && !a->stopped && automaton_calls(a->automaton) > 0)
        return "tool_calls";
    return "stop";
}
