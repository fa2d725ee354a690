/*
 * The memory of generated tool calls. A call leaves the server as a name and JSON arguments; when a client sends it back
 * as history, the chat format would write it in its own regular way, which need not be the way in which the model wrote it.
 * So the text of each call is kept by its id and handed to the chat format again ("raw" of a call in <arle/model.h>).
 *
 * The unit is a section: the calls that the model wrote between one section_open and its section_close, with the white
 * space before them and what follows up to the next section. One memory per served model. Thread: any.
 */
#ifndef ARLE_CHAT_CALLS_H
#define ARLE_CHAT_CALLS_H

#include <stdbool.h>
#include <stdint.h>

#include "chat/tokenizer.h"
#include "util/sbuf.h"

struct json_object;
struct call_memory;

/* One call as the client got it. */
struct given_call {
    char id[32];
    struct sbuf name, args;
};

/* A section of calls, as sampled. Start zeroed; free with call_section_fini. */
struct call_section {
    struct sbuf lead;                   /* white space before it */
    bool has_lead;                      /* false: it follows reasoning directly; the chat format separates them */
    bool follows_content, follows_section;      /* what stands before `lead`; neither: the beginning of the answer */
    struct sbuf text;                   /* the section, then what follows it */
    size_t text_len;                    /* bytes of the section alone */
    struct tok_range *added; size_t n_added;    /* ascending: where `text` was sampled as added tokens */
    struct sbuf shown;                  /* what of the text after the section went to the client as content */
};
void call_section_fini(struct call_section *s);

/** At most max_calls calls in max_bytes bytes are kept; the least recently used go first. NULL without memory. */
struct call_memory *call_memory_create(uint32_t max_calls, size_t max_bytes);
void call_memory_destroy(struct call_memory *mem);      /* takes NULL */

/**
 * Keeps a section and the calls in it. Takes over the contents of *s, whatever happens; copies calls [n_calls]. What cannot
 * be kept (an id that is known already, a section beyond the bounds, no memory) is forgotten: then history is rendered
 * without it.
 */
void call_memory_keep(struct call_memory *mem, const char *tenant, struct call_section *s, const struct given_call *calls,
                      uint32_t n_calls);

/**
 * Adds "raw" to the tool calls of a canonical conversation (messages.h) that are known under this tenant and were not
 * changed: whole sections, in order, with the same names and arguments equal as JSON values. Where a message's content
 * ends with what the model wrote after its calls, that part stands in "raw", and the rest in "raw_content" of the message.
 * NULL memory changes nothing.
 */
void call_memory_recall(struct call_memory *mem, const char *tenant, struct json_object *conversation);

struct call_memory_stats {
    uint64_t calls, bytes;              /* kept now */
    uint64_t recalled, unknown;         /* calls of histories that were rendered as sampled, and that were not */
};
void call_memory_stat(struct call_memory *mem, struct call_memory_stats *out);      /* NULL memory: zeros */

#endif
