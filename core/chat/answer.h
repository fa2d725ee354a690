/*
 * One answer of a request, seen as text: sampled ids go in, chat events come out, with the end tokens hidden, stop strings
 * obeyed and tool calls parsed. HTTP, the terminal and tests use the same one.
 */
#ifndef ARLE_CHAT_ANSWER_H
#define ARLE_CHAT_ANSWER_H

#include "chat/automaton.h"
#include "chat/calls.h"
#include "chat/detok.h"
#include "chat/served.h"
#include "chat/stopstr.h"

struct answer_opts {
    const struct served_model *model;   /* borrowed */
    bool chat;                          /* parse reasoning and calls; false: all text is CHAT_CONTENT */
    bool parse_calls, starts_in_reasoning;
    bool keep_special;                  /* special tokens show as their literals */
    bool keep_calls;                    /* the text is kept for answer_section */
    struct json_object *tools;          /* borrowed, or NULL */
    const struct stop_set *stops;       /* borrowed, or NULL; they apply to content only */
    const int32_t *stop_ids; uint32_t n_stop_ids;   /* tokens that end it and are not shown */
    chat_event_fn fn;
    void *arg;
};

/* An added token in the text of an answer. */
struct said_token {
    size_t at, len;                     /* in `said`; hidden tokens have no length */
    int32_t id;
};

struct answer {
    struct answer_opts o;
    struct detok detok;
    struct stop_matcher stops;
    struct automaton *automaton;        /* NULL: plain text */
    bool stopped;                       /* a stop string was met: no more events; the caller stops the engine */
    int stop_index;                     /* which one, or -1 */
    bool oom;
    struct sbuf said;                   /* keep_calls: all text that the automaton got */
    struct said_token *added; size_t n_added, cap_added;        /* and the added tokens in it, ascending */
};

int answer_init(struct answer *a, const struct answer_opts *opts);
/** Frees what it holds. A zeroed struct is fine. */
void answer_fini(struct answer *a);
/** One sampled token. Events are delivered before it returns. -ENOMEM. */
int answer_push(struct answer *a, int32_t id);
/** No more tokens: delivers what was held back. */
int answer_end(struct answer *a);

/**
 * With keep_calls, after answer_end: the next section of tool calls, beginning with call number *call. Returns the number
 * of calls in it, and fills *out (zeroed by the caller; call_section_fini) unless the section was cut off: then out->text
 * is empty and there is nothing to keep. *call moves on. 0: there are no more sections.
 */
uint32_t answer_section(const struct answer *a, uint32_t *call, struct call_section *out);

/** "stop", "length", "tool_calls", ... for an ended answer, as OpenAI names it. */
const char *answer_finish_name(const struct answer *a, enum finish_reason finish);

#endif
