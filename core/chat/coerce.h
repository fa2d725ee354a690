/*
 * Types of tool arguments: a model that writes arguments as untyped text is coerced by the JSON schema of the tool that
 * it called. The automaton asks for the plan of a parameter once, and converts its text when it is complete.
 */
#ifndef ARLE_CHAT_COERCE_H
#define ARLE_CHAT_COERCE_H

#include <stdbool.h>
#include <stddef.h>

#include "util/sbuf.h"

struct json_object;

enum coerce_type { COERCE_STRING = 0, COERCE_INTEGER, COERCE_NUMBER, COERCE_BOOLEAN, COERCE_JSON };

/* Types to try in order; a string always succeeds and ends the list. */
struct coerce_plan {
    unsigned char n;
    unsigned char types[7];
};

/**
 * Plan of parameter `key` of tool `name`.
 *
 * tools  array of {"type":"function","function":{"name","parameters":{"properties":{...}}}} or of bare functions; may be
 *        NULL. Borrowed for the call.
 * `type` may be a word or a list of words; without it the branches of anyOf or oneOf are tried in order. A tool, parameter
 * or type that is not known is a string. Thread: any, as long as nobody changes `tools`.
 */
struct coerce_plan coerce_plan_for(struct json_object *tools, const char *name, const char *key);

/** True if the plan is a plain string, whose text can be passed on before it is complete. */
bool coerce_is_string(const struct coerce_plan *plan);

/** Appends the JSON value that `text` stands for. The text "null" in any case is null under every plan. */
void coerce_value(const struct coerce_plan *plan, const char *text, size_t len, struct sbuf *out);

/** True if text is exactly one JSON value (RFC 8259), surrounding whitespace allowed, nested at most 64 deep. */
bool coerce_is_json(const char *text, size_t len);

/** Appends `text` as JSON if it is JSON, or a Python literal (True, None, 'quoted', tuples); false if it is neither. */
bool coerce_literal(const char *text, size_t len, struct sbuf *out);

#endif
