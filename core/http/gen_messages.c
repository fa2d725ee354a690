/*
 * Replies in Anthropic's message dialect: blocks of thinking, text and tool use, whole or as named events. One answer per
 * request; usage stands in the last message_delta, when it is final.
 */
#include <string.h>

#include <json-c/json.h>

#include "http/gen.h"
#include "util/jfield.h"

static const char *stop_reason(const struct choice *ch)
{
    if (ch->finish == FINISH_LENGTH)
        return "max_tokens";
    if (ch->answer.stopped)
        return "stop_sequence";
    return strcmp(answer_finish_name(&ch->answer, ch->finish), "tool_calls") == 0 ? "tool_use" : "end_turn";
}

static void put_stop(const struct gen *g, struct sbuf *b)
{
    const struct choice *ch = &g->choices[0];
    struct json_object *stops;
    sbuf_fmt(b, "\"stop_reason\":\"%s\",\"stop_sequence\":", stop_reason(ch));
    if (ch->answer.stopped && ch->answer.stop_index >= 0 && jfield_get(g->body, "stop", &stops) &&
        json_object_is_type(stops, json_type_array))
        sbuf_json_cstr(b, json_object_get_string(json_object_array_get_idx(stops, (size_t)ch->answer.stop_index)));
    else
        sbuf_str(b, "null");
}

static void put_usage(const struct gen *g, struct sbuf *b)
{
    const struct request_usage *u = &g->subs[0].usage;
    sbuf_fmt(b, "{\"input_tokens\":%u,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":%u,\"output_tokens\":%u}",
             u->prompt_tokens - u->cached_tokens, u->cached_tokens, u->completion_tokens);
}

static void put_head(const struct gen *g, struct sbuf *b)
{
    sbuf_fmt(b, "{\"id\":\"%s\",\"type\":\"message\",\"role\":\"assistant\",\"model\":", g->id);
    sbuf_json_cstr(b, g->m->name);
}

/* ---- streamed ---- */

void messages_begin(struct choice *ch)
{
    struct sbuf *b = &ch->g->out;
    if (ch->begun)
        return;
    ch->begun = true;
    sbuf_str(b, "event: message_start\ndata: {\"type\":\"message_start\",\"message\":");
    put_head(ch->g, b);
    sbuf_fmt(b, ",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{\"input_tokens\":%zu,\"output_tokens\":0}}}\n\n",
             ch->g->subs[0].prompt.ids.n);
}

static void close_block(struct choice *ch)
{
    if (ch->block != 0)
        sbuf_fmt(&ch->g->out, "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":%u}\n\n", ch->n_blocks - 1);
    ch->block = 0;
}

/* Makes `kind` the open block; `head` is the JSON of an empty one. */
static void open_block(struct choice *ch, int kind, const char *head)
{
    if (ch->block == kind && kind != CHAT_CALL_START)
        return;
    close_block(ch);
    ch->block = kind;
    sbuf_fmt(&ch->g->out, "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":%u,\"content_block\":%s}\n\n",
             ch->n_blocks++, head);
}

static void delta(struct choice *ch, const char *type, const char *field, const char *text, size_t len)
{
    struct sbuf *b = &ch->g->out;
    sbuf_fmt(b, "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":%u,\"delta\":{\"type\":\"%s\",\"%s\":",
             ch->n_blocks - 1, type, field);
    sbuf_json_str(b, text, len);
    sbuf_str(b, "}}\n\n");
}

void messages_event(struct choice *ch, const struct chat_event *ev)
{
    struct sbuf head = SBUF_INIT;
    messages_begin(ch);
    switch (ev->kind) {
    case CHAT_REASONING:
        open_block(ch, ev->kind, "{\"type\":\"thinking\",\"thinking\":\"\",\"signature\":\"\"}");
        delta(ch, "thinking_delta", "thinking", ev->text, ev->len);
        break;
    case CHAT_CONTENT:
        open_block(ch, ev->kind, "{\"type\":\"text\",\"text\":\"\"}");
        delta(ch, "text_delta", "text", ev->text, ev->len);
        break;
    case CHAT_CALL_START:
        if (ev->call >= ch->n_calls)
            break;
        sbuf_fmt(&head, "{\"type\":\"tool_use\",\"id\":\"%s\",\"input\":{},\"name\":", ch->calls[ev->call].id);
        sbuf_json_str(&head, ev->text, ev->len);
        sbuf_char(&head, '}');
        open_block(ch, ev->kind, sbuf_text(&head));
        sbuf_fini(&head);
        break;
    case CHAT_CALL_ARGS:
        delta(ch, "input_json_delta", "partial_json", ev->text, ev->len);
        break;
    case CHAT_CALL_END:
        close_block(ch);
        break;
    }
}

void messages_choice_end(struct choice *ch)
{
    messages_begin(ch);
    close_block(ch);
}

void messages_stream_end(struct gen *g)
{
    struct sbuf *b = &g->out;
    if (g->failed.code != 0) {
        sbuf_str(b, "event: error\ndata: ");
        messages_error(b, &g->failed);
        sbuf_str(b, "\n\n");
        return;
    }
    sbuf_str(b, "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{");
    put_stop(g, b);
    sbuf_str(b, "},\"usage\":");
    put_usage(g, b);
    sbuf_str(b, "}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n");
}

/* ---- whole ---- */

static void put_block(struct sbuf *b, bool *first, const char *type, const struct sbuf *text)
{
    if (text->n == 0)
        return;
    sbuf_fmt(b, "%s{\"type\":\"%s\",\"%s\":", *first ? "" : ",", type, type);
    sbuf_json_str(b, text->p, text->n);
    sbuf_str(b, strcmp(type, "thinking") == 0 ? ",\"signature\":\"\"}" : "}");
    *first = false;
}

void messages_reply(struct gen *g, struct sbuf *out)
{
    const struct choice *ch = &g->choices[0];
    bool first = true;
    put_head(g, out);
    sbuf_str(out, ",\"content\":[");
    put_block(out, &first, "thinking", &ch->reasoning);
    put_block(out, &first, "text", &ch->content);
    for (uint32_t i = 0; i < ch->n_calls; i++) {
        sbuf_fmt(out, "%s{\"type\":\"tool_use\",\"id\":\"%s\",\"name\":", first ? "" : ",", ch->calls[i].id);
        sbuf_json_str(out, sbuf_text(&ch->calls[i].name), ch->calls[i].name.n);
        sbuf_str(out, ",\"input\":");
        sbuf_add(out, sbuf_text(&ch->calls[i].args), ch->calls[i].args.n);
        sbuf_char(out, '}');
        first = false;
    }
    sbuf_str(out, "],");
    put_stop(g, out);
    sbuf_str(out, ",\"usage\":");
    put_usage(g, out);
    sbuf_char(out, '}');
}

void messages_error(struct sbuf *out, const struct arle_err *err)
{
    int status = error_status(err);
    const char *type = status == 401 ? "authentication_error" : status == 404 ? "not_found_error" : status == 413 ? "request_too_large"
                       : status == 429 ? "rate_limit_error" : status == 503 ? "overloaded_error" : status == 504 ? "timeout_error"
                       : status >= 500 ? "api_error" : "invalid_request_error";
    sbuf_fmt(out, "{\"type\":\"error\",\"error\":{\"type\":\"%s\",\"message\":", type);
    reply_error_text(out, err->msg);
    sbuf_str(out, ",\"param\":");
    reply_error_text(out, err->param[0] ? err->param : NULL);
    sbuf_str(out, "}}");
}
