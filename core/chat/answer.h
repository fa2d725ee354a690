/*
 * One answer of a request, seen as text: sampled ids go in, chat events come out, with the end tokens hidden, stop strings
 * obeyed and tool calls parsed. HTTP, the terminal and tests use the same one.
 */
#ifndef ARLE_CHAT_ANSWER_H
#define ARLE_CHAT_ANSWER_H

#include "chat/automaton.h"
#include "chat/detok.h"
#include "chat/served.h"
#include "chat/stopstr.h"

struct answer_opts {
    const struct served_model *model;   /* borrowed */
    bool chat;                          /* parse reasoning and calls; false: all text is CHAT_CONTENT */
    bool parse_calls, starts_in_reasoning;
    bool keep_special;                  /* special tokens show as their literals */
    struct json_object *tools;          /* borrowed, or NULL */
    const struct stop_set *stops;       /* borrowed, or NULL; they apply to content only */
    const int32_t *stop_ids; uint32_t n_stop_ids;   /* tokens that end it and are not shown */
    chat_event_fn fn;
    void *arg;
};

struct answer {
    struct answer_opts o;
    struct detok detok;
    struct stop_matcher stops;
    struct automaton *automaton;        /* NULL: plain text */
    bool stopped;                       /* a stop string was met: no more events; the caller stops the engine */
    int stop_index;                     /* which one, or -1 */
    bool oom;
};

int answer_init(struct answer *a, const struct answer_opts *opts);
/** Frees what it holds. A zeroed struct is fine. */
void answer_fini(struct answer *a);
/** One sampled token. Events are delivered before it returns. -ENOMEM. */
int answer_push(struct answer *a, int32_t id);
/** No more tokens: delivers what was held back. */
int answer_end(struct answer *a);

/** "stop", "length", "tool_calls", ... for an ended answer, as OpenAI names it. */
const char *answer_finish_name(const struct answer *a, enum finish_reason finish);

#endif
