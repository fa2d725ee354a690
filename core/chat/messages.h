/*
 * The conversation of a request: what the wire dialect sent, checked and written as the canonical request that model plugins
 * render (struct arle_model_api.chat_render in <arle/model.h>). Nothing here knows how a model writes a chat.
 */
#ifndef ARLE_CHAT_MESSAGES_H
#define ARLE_CHAT_MESSAGES_H

#include <arle/err.h>
#include <stdbool.h>

struct json_object;

/**
 * Reads messages, tools and template options of an OpenAI chat body.
 *
 * body        the request object; borrowed
 * defaults    JSON object of template options that the checkpoint names, or NULL
 * use_tools   false leaves the tools out of the prompt (tool_choice none)
 * *out        canonical request, the caller's (json_object_put)
 *
 *   - content may be a string, null (not for user and system), or a list of text parts, which are joined;
 *   - `developer` is `system`; system messages at the start become one, joined by an empty line;
 *   - tool call arguments may be JSON text or an object and become an object; `reasoning` is `reasoning_content`;
 *   - reasoning_effort and chat_template_kwargs become options; effort "none" turns thinking off.
 * Refusals as in jfield.h, err->param is the path ("messages[3].content[0].type"). Any thread.
 */
int chat_request_from_body(struct json_object *body, struct json_object *defaults, bool use_tools, struct json_object **out,
                           struct arle_err *err);

/** Checks a list of tools: functions with a name of [A-Za-z0-9_.:/-]{1,64} and object schemas, no name twice. */
int chat_check_tools(struct json_object *tools, struct arle_err *err);

#endif
