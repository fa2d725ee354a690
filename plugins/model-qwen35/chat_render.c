/*
 * Renders a conversation in the published Qwen3.5 format (docs/model-qwen35.md, "Chat"). Two template versions: 3.5 writes tool
 * arguments as Python would print them, 3.6 as JSON. What the template says goes out as ARLE_TEXT_TEMPLATE, what a client
 * said as ARLE_TEXT_CONTENT, so that the host can decide whether special tokens count there.
 */
#include "chat.h"
#include "chat_text.h"
#include "chat_tools.h"
#include "entry.h"

#include <limits.h>
#include <string.h>

#define MAX_DEPTH 256

struct render {
    const struct arle_chat_sink *sink;
    struct arle_err *err;
    int r;                          /* first failure; later output is dropped */
    struct json_object *messages, *tools;
    size_t n;                       /* messages */
    size_t n_system;                /* leading system and developer messages, rendered as one */
    size_t last_query;
    bool thinking, preserve, json_arguments, generate, continue_final;
};

/* ---- output --------------------------------------------------------------------------------------------------------- */

static void emit(struct render *rd, struct span s, uint32_t flags)
{
    if (rd->r < 0 || s.n == 0)
        return;
    int r = rd->sink->text(rd->sink->ctx, s.p, s.n, flags);
    if (r < 0)
        rd->r = arle_err_set(rd->err, r, "the rendered chat could not be taken");
}

static void put(struct render *rd, const char *text)
{
    emit(rd, (struct span){ text, strlen(text) }, ARLE_TEXT_TEMPLATE);
}

static void content(struct render *rd, struct span s)
{
    emit(rd, s, ARLE_TEXT_CONTENT);
}

static void content_take(struct render *rd, struct text *t)
{
    if (t->failed && rd->r == 0)
        rd->r = arle_err_set(rd->err, -ENOMEM, "no memory to render the chat");
    content(rd, (struct span){ t->p, t->n });
    text_free(t);
}

static void mark(struct render *rd, uint32_t what)
{
    if (rd->r < 0 || rd->sink->mark == NULL)
        return;
    int r = rd->sink->mark(rd->sink->ctx, what);
    if (r < 0)
        rd->r = arle_err_set(rd->err, r, "the rendered chat could not be taken");
}

/* ---- input ---------------------------------------------------------------------------------------------------------- */

static struct json_object *get(struct json_object *obj, const char *key)
{
    struct json_object *v = NULL;
    return json_object_is_type(obj, json_type_object) && json_object_object_get_ex(obj, key, &v) ? v : NULL;
}

static struct json_object *message(const struct render *rd, size_t i)
{
    return json_object_array_get_idx(rd->messages, i);
}

static const char *role(const struct render *rd, size_t i)
{
    struct json_object *v = get(message(rd, i), "role");
    return json_object_is_type(v, json_type_string) ? json_object_get_string(v) : "";
}

static bool is_role(const struct render *rd, size_t i, const char *what)
{
    return strcmp(role(rd, i), what) == 0;
}

static bool is_system(const struct render *rd, size_t i)
{
    return is_role(rd, i, "system") || is_role(rd, i, "developer");
}

static struct span raw_text(struct json_object *v)
{
    if (!json_object_is_type(v, json_type_string))
        return (struct span){ "", 0 };
    return (struct span){ json_object_get_string(v), (size_t)json_object_get_string_len(v) };
}

static struct span message_text(const struct render *rd, size_t i)
{
    struct json_object *part = get(message(rd, i), "raw_content");
    return span_strip(raw_text(part != NULL ? part : get(message(rd, i), "content")));
}

static int refuse(struct render *rd, size_t i, const char *field, const char *why)
{
    char path[96];
    snprintf(path, sizeof path, "messages[%zu]%s%s", i, field[0] ? "." : "", field);
    return arle_err_param(rd->err, -EINVAL, path, "%s: %s", path, why);
}

static int check_call(struct render *rd, size_t i, size_t j, struct json_object *call)
{
    char field[48];
    struct json_object *fn = get(call, "function") != NULL ? get(call, "function") : call;
    struct json_object *args = get(fn, "arguments");
    struct span name = raw_text(get(fn, "name"));
    snprintf(field, sizeof field, "tool_calls[%zu].name", j);
    if (name.n == 0)
        return refuse(rd, i, field, "must be the name of a function");
    snprintf(field, sizeof field, "tool_calls[%zu].arguments", j);
    if (args != NULL && !json_object_is_type(args, json_type_object))
        return refuse(rd, i, field, "must be an object");
    return 0;
}

static int check_message(struct render *rd, size_t i)
{
    struct json_object *m = message(rd, i), *v;
    if (!json_object_is_type(m, json_type_object))
        return refuse(rd, i, "", "must be an object");
    bool assistant = is_role(rd, i, "assistant");
    if (!is_system(rd, i) && !assistant && !is_role(rd, i, "user") && !is_role(rd, i, "tool"))
        return refuse(rd, i, "role", "must be system, developer, user, assistant or tool");
    if (is_system(rd, i) && i > rd->n_system)
        return refuse(rd, i, "role", "system messages must come first");
    if ((v = get(m, "content")) != NULL && !json_object_is_type(v, json_type_string))
        return refuse(rd, i, "content", "must be text");
    if ((v = get(m, "reasoning_content")) != NULL && !json_object_is_type(v, json_type_string))
        return refuse(rd, i, "reasoning_content", "must be text");
    if (!assistant || (v = get(m, "tool_calls")) == NULL)
        return 0;
    if (!json_object_is_type(v, json_type_array))
        return refuse(rd, i, "tool_calls", "must be a list");
    int r = 0;
    for (size_t j = 0; r == 0 && j < json_object_array_length(v); j++)
        r = check_call(rd, i, j, json_object_array_get_idx(v, j));
    return r;
}

static int check_tools(struct render *rd, struct json_object *tools)
{
    if (tools != NULL && !json_object_is_type(tools, json_type_array))
        return arle_err_param(rd->err, -EINVAL, "tools", "tools: must be a list");
    for (size_t i = 0; tools != NULL && i < json_object_array_length(tools); i++)
        if (!json_object_is_type(json_object_array_get_idx(tools, i), json_type_object)) {
            char path[32];
            snprintf(path, sizeof path, "tools[%zu]", i);
            return arle_err_param(rd->err, -EINVAL, path, "%s: must be an object", path);
        }
    rd->tools = tools != NULL && json_object_array_length(tools) > 0 ? tools : NULL;
    return 0;
}

static int get_flag(struct render *rd, struct json_object *obj, const char *prefix, const char *key, bool *inout)
{
    struct json_object *v = get(obj, key);
    if (v == NULL)
        return 0;
    if (!json_object_is_type(v, json_type_boolean)) {
        char path[64];
        snprintf(path, sizeof path, "%s%s", prefix, key);
        return arle_err_param(rd->err, -EINVAL, path, "%s: must be true or false", path);
    }
    *inout = json_object_get_boolean(v);
    return 0;
}

/* Configuration first, then the checkpoint that was loaded, then the request. */
static int read_options(struct render *rd, const struct qwen35_ctx *ctx, struct json_object *root)
{
    struct json_object *opts = get(root, "options");
    if (opts != NULL && !json_object_is_type(opts, json_type_object))
        return arle_err_param(rd->err, -EINVAL, "options", "options: must be an object");
    if (ctx != NULL) {
        rd->thinking = __atomic_load_n(&ctx->thinks, __ATOMIC_RELAXED);
        rd->json_arguments = __atomic_load_n(&ctx->json_arguments, __ATOMIC_RELAXED);
    }
    struct json_object *v = get(opts, "template");
    if (v != NULL) {
        struct span s = raw_text(v);
        bool is35 = s.n == 3 && memcmp(s.p, "3.5", 3) == 0, is36 = s.n == 3 && memcmp(s.p, "3.6", 3) == 0;
        if (!is35 && !is36)
            return arle_err_param(rd->err, -EINVAL, "options.template", "options.template: must be \"3.5\" or \"3.6\"");
        rd->json_arguments = is36;
    }
    if (get_flag(rd, opts, "options.", "enable_thinking", &rd->thinking) < 0
        || get_flag(rd, opts, "options.", "preserve_thinking", &rd->preserve) < 0
        || get_flag(rd, root, "", "add_generation_prompt", &rd->generate) < 0
        || get_flag(rd, root, "", "continue_final", &rd->continue_final) < 0)
        return -EINVAL;
    if (ctx != NULL && ctx->template_conf != QWEN35_TEMPLATE_AUTO)
        rd->json_arguments = ctx->template_conf == QWEN35_TEMPLATE_36;
    if (ctx != NULL && get(opts, "enable_thinking") == NULL && ctx->thinking_conf != QWEN35_THINKING_AUTO)
        rd->thinking = ctx->thinking_conf == QWEN35_THINKING_ON;
    return 0;
}

/* A user message that asks something, and does not only carry results of tools in the old form. */
static bool is_query(const struct render *rd, size_t i)
{
    if (!is_role(rd, i, "user"))
        return false;
    struct span s = message_text(rd, i);
    return !(span_starts(s, "<tool_response>") && span_ends(s, "</tool_response>"));
}

static int read_messages(struct render *rd, struct json_object *root)
{
    rd->messages = get(root, "messages");
    if (!json_object_is_type(rd->messages, json_type_array) || json_object_array_length(rd->messages) == 0)
        return arle_err_param(rd->err, -EINVAL, "messages", "messages: must be a list with at least one message");
    rd->n = json_object_array_length(rd->messages);
    while (rd->n_system < rd->n && is_system(rd, rd->n_system))
        rd->n_system++;
    for (size_t i = 0; i < rd->n; i++) {
        int r = check_message(rd, i);
        if (r < 0)
            return r;
    }
    size_t q = rd->n;
    while (q > 0 && !is_query(rd, q - 1))
        q--;
    if (q == 0)
        return arle_err_param(rd->err, -EINVAL, "messages", "messages: no message of role user asks anything");
    rd->last_query = q - 1;
    if (!rd->continue_final)
        return 0;
    if (rd->generate)
        return arle_err_param(rd->err, -EINVAL, "continue_final", "continue_final: excludes add_generation_prompt");
    struct json_object *calls = get(message(rd, rd->n - 1), "tool_calls");
    if (!is_role(rd, rd->n - 1, "assistant"))
        return refuse(rd, rd->n - 1, "role", "continue_final needs an assistant message at the end");
    return calls != NULL && json_object_array_length(calls) > 0
           ? refuse(rd, rd->n - 1, "tool_calls", "continue_final cannot go on after tool calls") : 0;
}

/* ---- the template --------------------------------------------------------------------------------------------------- */

/* Text of all leading system messages, joined by an empty line. */
static void system_text(struct render *rd, struct text *out)
{
    for (size_t i = 0; i < rd->n_system; i++) {
        struct span s = message_text(rd, i);
        if (s.n > 0 && out->n > 0)
            text_str(out, "\n\n");
        text_add(out, s.p, s.n);
    }
}

static void head(struct render *rd)
{
    struct text sys = { 0 };
    if (rd->tools == NULL && rd->n_system == 0)
        return;
    system_text(rd, &sys);
    put(rd, "<|im_start|>system\n");
    if (rd->tools != NULL) {
        put(rd, "# Tools\n\nYou have access to the following functions:\n\n<tools>");
        for (size_t i = 0; i < json_object_array_length(rd->tools); i++) {
            struct text t = { 0 };
            put(rd, "\n");
            text_json(&t, json_object_array_get_idx(rd->tools, i));
            content_take(rd, &t);
        }
        put(rd, "\n</tools>" QWEN35_TOOL_INSTRUCTIONS);
        if (sys.n > 0)
            put(rd, "\n\n");
    }
    content_take(rd, &sys);
    put(rd, "<|im_end|>\n");
    mark(rd, ARLE_MARK_SYSTEM_END);
}

/* A call as it was sampled (arle/model.h): its pieces are ordinary text and added tokens in turn. */
static void sampled(struct render *rd, struct json_object *pieces)
{
    for (size_t i = 0; i < json_object_array_length(pieces); i++)
        emit(rd, raw_text(json_object_array_get_idx(pieces, i)), i % 2 == 0 ? ARLE_TEXT_LITERAL : ARLE_TEXT_TEMPLATE);
}

static void call(struct render *rd, struct json_object *one)
{
    struct json_object *fn = get(one, "function") != NULL ? get(one, "function") : one;
    struct json_object *args = get(fn, "arguments");
    put(rd, "<tool_call>\n<function=");
    content(rd, raw_text(get(fn, "name")));
    put(rd, ">\n");
    if (args != NULL) {
        json_object_object_foreach(args, key, value) {
            struct text t = { 0 };
            put(rd, "<parameter=");
            content(rd, (struct span){ key, strlen(key) });
            put(rd, ">\n");
            if (rd->json_arguments && !json_object_is_type(value, json_type_string))
                text_json(&t, value);
            else
                text_python(&t, value);
            content_take(rd, &t);
            put(rd, "\n</parameter>\n");
        }
    }
    put(rd, "</function>\n</tool_call>");
}

/* Reasoning comes in its own field, or inside the text between <think> and </think>. */
static void split_reasoning(const struct render *rd, size_t i, struct span *reason, struct span *text)
{
    struct json_object *v = get(message(rd, i), "reasoning_content");
    *text = message_text(rd, i);
    *reason = raw_text(v);
    const char *close = span_first(*text, "</think>");
    if (v == NULL && close != NULL) {
        struct span before = span_rstrip_newlines((struct span){ text->p, (size_t)(close - text->p) });
        const char *open = span_last(before, "<think>");
        const char *from = open != NULL ? open + strlen("<think>") : before.p;
        *reason = span_lstrip_newlines((struct span){ from, (size_t)(before.p + before.n - from) });
        const char *rest = span_last(*text, "</think>") + strlen("</think>");
        *text = span_lstrip_newlines((struct span){ rest, (size_t)(text->p + text->n - rest) });
    }
    *reason = span_strip(*reason);
}

/* Returns true when the turn was left open inside its reasoning (a final message that goes on). */
static bool assistant(struct render *rd, size_t i)
{
    struct span reason, text;
    struct json_object *calls = get(message(rd, i), "tool_calls");
    bool open = rd->continue_final && i + 1 == rd->n;
    split_reasoning(rd, i, &reason, &text);
    put(rd, "<|im_start|>assistant\n");
    if (i > rd->last_query || rd->preserve) {
        put(rd, "<think>\n");
        content(rd, reason);
        if (open && text.n == 0 && reason.n > 0)
            return true;
        put(rd, "\n</think>\n\n");
    }
    content(rd, text);
    for (size_t j = 0; calls != NULL && j < json_object_array_length(calls); j++) {
        struct json_object *one = json_object_array_get_idx(calls, j), *raw = get(one, "raw");
        struct json_object *lead = get(raw, "lead"), *pieces = get(raw, "text");
        if (lead != NULL)
            emit(rd, raw_text(lead), ARLE_TEXT_LITERAL);
        else
            put(rd, j > 0 ? "\n" : text.n > 0 ? "\n\n" : "");
        if (json_object_is_type(pieces, json_type_array))
            sampled(rd, pieces);
        else
            call(rd, one);
    }
    if (!open) {
        put(rd, "<|im_end|>\n");
        mark(rd, ARLE_MARK_TURN_END);
    }
    return false;
}

/* Results of tools in a row become one user turn. */
static void tool(struct render *rd, size_t i)
{
    if (i > 0 && !is_role(rd, i - 1, "tool"))
        put(rd, "<|im_start|>user");
    put(rd, "\n<tool_response>\n");
    content(rd, message_text(rd, i));
    put(rd, "\n</tool_response>");
    if (i + 1 == rd->n || !is_role(rd, i + 1, "tool")) {
        put(rd, "<|im_end|>\n");
        mark(rd, ARLE_MARK_TURN_END);
    }
}

static void user(struct render *rd, size_t i)
{
    put(rd, "<|im_start|>user\n");
    content(rd, message_text(rd, i));
    put(rd, "<|im_end|>\n");
    mark(rd, ARLE_MARK_TURN_END);
}

/* Returns whether the prompt ends inside a reasoning block. */
static bool conversation(struct render *rd)
{
    bool open = false;
    head(rd);
    for (size_t i = rd->n_system; i < rd->n && rd->r == 0; i++) {
        if (is_role(rd, i, "assistant"))
            open = assistant(rd, i);
        else if (is_role(rd, i, "tool"))
            tool(rd, i);
        else
            user(rd, i);
        /* What follows the last query loses its reasoning once there is a newer one; what precedes it already has. */
        if (i == rd->last_query && !rd->preserve)
            mark(rd, ARLE_MARK_STABLE);
    }
    if (rd->preserve && !rd->continue_final)
        mark(rd, ARLE_MARK_STABLE);
    if (!rd->generate)
        return open;
    put(rd, "<|im_start|>assistant\n<think>\n");
    if (!rd->thinking)
        put(rd, "\n</think>\n\n");
    return rd->thinking;
}

static struct json_object *parse_request(const char *json, size_t len)
{
    struct json_tokener *tok = len > 0 && len <= INT_MAX ? json_tokener_new_ex(MAX_DEPTH) : NULL;
    if (tok == NULL)
        return NULL;
    struct json_object *root = json_tokener_parse_ex(tok, json, (int)len);
    if (json_tokener_get_error(tok) != json_tokener_success || !json_object_is_type(root, json_type_object)) {
        json_object_put(root);
        root = NULL;
    }
    json_tokener_free(tok);
    return root;
}

int qwen35_chat_render(void *ctx, const char *request_json, size_t len, const struct arle_chat_sink *sink,
                       struct arle_chat_result *out, struct arle_err *err)
{
    struct render rd = { .sink = sink, .err = err };
    struct json_object *root = parse_request(request_json, len);
    if (root == NULL)
        return arle_err_set(err, -EINVAL, "the chat request is not a JSON object (or is nested deeper than %d)", MAX_DEPTH);
    bool open = false;
    rd.r = read_options(&rd, ctx, root);
    if (rd.r == 0)
        rd.r = check_tools(&rd, get(root, "tools"));
    if (rd.r == 0)
        rd.r = read_messages(&rd, root);
    if (rd.r == 0)
        open = conversation(&rd);
    json_object_put(root);
    if (rd.r < 0)
        return rd.r;
    if (out != NULL)
        *out = (struct arle_chat_result){ .struct_size = sizeof *out, .starts_in_reasoning = open };
    return 0;
}

const struct arle_output_syntax *qwen35_chat_syntax(void *ctx)
{
    static const struct arle_output_syntax syntax = {
        .struct_size = sizeof syntax,
        .reason_open = "<think>", .reason_close = "</think>",
        .section_open = "<tool_call>", .section_close = "</tool_call>",
        .call_open = "<function=", .name_end = ">", .call_close = "</function>",
        .param_open = "<parameter=", .key_end = ">", .param_close = "</parameter>",
        .value_newlines = 1, .calls_in_reasoning = 1, .many_sections = 1,
    };
    return &syntax;
}
