/* Chats in the published Qwen3.5 format: rendering of requests, and the table by which output is read. */
#ifndef MODEL_QWEN35_CHAT_H
#define MODEL_QWEN35_CHAT_H

#include <arle/model.h>

/** See chat_render in <arle/model.h>. ctx: struct qwen35_ctx, NULL for built-in defaults. */
int qwen35_chat_render(void *ctx, const char *request_json, size_t len, const struct arle_chat_sink *sink,
                       struct arle_chat_result *out, struct arle_err *err);
const struct arle_output_syntax *qwen35_chat_syntax(void *ctx);

#endif
