/*
 * The one automaton that follows the output of a chat answer: text in, reasoning, content and tool calls out. How output is
 * written is data (struct arle_output_syntax); dialects only translate the events. It never sees tokens: the caller
 * detokenises with the literals of tags kept.
 *
 *   - The events of a text do not depend on how it is cut into pieces, apart from where text events are cut.
 *   - Nothing is held back but what may still become a tag, whitespace that a call would swallow, and values whose type
 *     must be known whole.
 *   - Malformed output is never an error: what is not a well-formed call head is content; missing closers are supplied;
 *     output that ends inside a call closes it, so that its arguments are JSON, and says `truncated`.
 */
#ifndef ARLE_CHAT_AUTOMATON_H
#define ARLE_CHAT_AUTOMATON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <arle/model.h>

struct json_object;

enum chat_event_kind {
    CHAT_REASONING = 1,     /* text: a piece of the reasoning */
    CHAT_CONTENT,           /* text: a piece of the answer */
    CHAT_CALL_START,        /* text: name of the tool; call: its number, counting from 0 */
    CHAT_CALL_ARGS,         /* text: a piece of the JSON object of arguments */
    CHAT_CALL_END,          /* the pieces of `call` are complete JSON now */
};

struct chat_event {
    enum chat_event_kind kind;
    uint32_t call;
    const char *text;       /* [len], valid during the callback */
    size_t len;
};

typedef void (*chat_event_fn)(void *arg, const struct chat_event *ev);

/* Where a call stands in the output: byte offsets into everything that was pushed. */
struct call_span {
    size_t from, to;        /* from its section_open or call_open; up to its last tag, a section_close included */
    bool opens;             /* it begins a section; otherwise it stands in the section of the call before */
    bool complete;          /* it was not cut off by the end of the output */
};

struct automaton_opts {
    const struct arle_output_syntax *syntax;    /* borrowed; NULL: everything is content */
    struct json_object *tools;                  /* borrowed; schemas for coercion, or NULL */
    bool starts_in_reasoning;                   /* the prompt left a reasoning block open */
    bool parse_calls;                           /* false: calls are content like any other text */
    chat_event_fn fn;
    void *arg;
};

struct automaton;

/** NULL without memory. Thread: one at a time. */
struct automaton *automaton_create(const struct automaton_opts *opts);
void automaton_destroy(struct automaton *a);

/** Feeds text (any bytes; whole UTF-8 characters in give whole characters out). 0 or -ENOMEM, then it is of no more use. */
int automaton_push(struct automaton *a, const char *text, size_t len);

/** End of output: decides what was held back, closes an open call. 0 or -ENOMEM. */
int automaton_finish(struct automaton *a);

/** Calls that ended with a closer of their own (or were followed by one). */
uint32_t automaton_calls(const struct automaton *a);
/** The next text belongs to the reasoning, as far as known. */
bool automaton_in_reasoning(const struct automaton *a);
/** The output ended inside a call. */
bool automaton_truncated(const struct automaton *a);
/** The white space that the automaton skips around tags. */
static inline bool automaton_is_ws(char c)
{
    return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f' || c == '\v';
}
/** [*n], one per call that began. Lives until the next push. */
const struct call_span *automaton_spans(const struct automaton *a, uint32_t *n);
/** Offset at which reasoning and the newlines after it ended; -1 when the output has none that ended. */
int64_t automaton_reasoning_end(const struct automaton *a);

#endif
