/*
 * How the published chat templates turn values into text: the template language's own conventions (Python's), which decide
 * single bytes and therefore tokens. Used by chat_render.c. Thread: any; no state.
 */
#ifndef MODEL_QWEN35_CHAT_TEXT_H
#define MODEL_QWEN35_CHAT_TEXT_H

#include <json-c/json.h>
#include <stdbool.h>
#include <stddef.h>

struct span { const char *p; size_t n; };

/* Growing text. After a failed allocation `failed` is set and appends do nothing. */
struct text { char *p; size_t n, cap; bool failed; };

void text_add(struct text *t, const char *p, size_t n);
void text_str(struct text *t, const char *s);
void text_free(struct text *t);

/** Without leading and trailing Unicode white space, as str.strip(). */
struct span span_strip(struct span s);
/** Without leading (trailing) newlines, as str.lstrip("\n") and str.rstrip("\n"). */
struct span span_lstrip_newlines(struct span s);
struct span span_rstrip_newlines(struct span s);
/** First and last occurrence of a word; NULL if none. */
const char *span_first(struct span s, const char *word);
const char *span_last(struct span s, const char *word);
bool span_starts(struct span s, const char *word);
bool span_ends(struct span s, const char *word);

/** JSON with ", " and ": ", keys in given order, nothing escaped that JSON does not require. */
void text_json(struct text *t, struct json_object *v);
/** As str(): strings raw, True, False, None, numbers as repr(); objects and lists as JSON. */
void text_python(struct text *t, struct json_object *v);

#endif
