/*
 * Anthropic's message dialect as requests: a body of /v1/messages becomes a body of /v1/chat/completions, so that both are
 * checked, rendered and run by the same code. Only the wire differs (gen_messages.c).
 */
#ifndef ARLE_HTTP_MESSAGES_IN_H
#define ARLE_HTTP_MESSAGES_IN_H

#include <arle/err.h>
#include <stdbool.h>

struct json_object;

/**
 * Converts; *out is the caller's. count_only: max_tokens may be absent (count_tokens). Refusals as in util/jfield.h, with
 * paths of the body that came in.
 */
int messages_to_chat(struct json_object *body, bool count_only, struct json_object **out, struct arle_err *err);

#endif
