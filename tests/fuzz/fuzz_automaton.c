/*
 * Output automaton under arbitrary text and cuts: whole and cut input must give the same events, and the arguments of every
 * call must be JSON. Byte 0 chooses syntax and mode, byte 1 seeds the cuts, the rest is the output.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <json-c/json.h>

#include "chat/automaton.h"
#include "chat/coerce.h"
#include "util/sbuf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct arle_output_syntax syntaxes[2] = {
    { .struct_size = sizeof(struct arle_output_syntax), .reason_open = "<think>", .reason_close = "</think>",
      .section_open = "<tool_call>", .section_close = "</tool_call>", .call_open = "<function=", .name_end = ">",
      .call_close = "</function>", .param_open = "<parameter=", .key_end = ">", .param_close = "</parameter>",
      .value_newlines = 1, .calls_in_reasoning = 1, .many_sections = 1 },
    { .struct_size = sizeof(struct arle_output_syntax), .reason_open = "<think>", .reason_close = "</think>",
      .section_open = "<calls>", .section_close = "</calls>", .call_open = "<invoke name=\"", .name_end = "\">",
      .call_close = "</invoke>", .param_open = "<parameter name=\"", .param_close = "</parameter>",
      .typed_open = "\" string=\"", .typed_end = "\">" },
};

struct trace {
    struct sbuf all, args;
    int kind;
};

static void on_event(void *arg, const struct chat_event *ev)
{
    struct trace *t = arg;
    if (ev->kind == CHAT_CALL_ARGS)
        sbuf_add(&t->args, ev->text, ev->len);
    if (ev->kind == CHAT_CALL_END) {
        if (!coerce_is_json(t->args.p, t->args.n) && t->args.n < 512)   /* deeper nesting than allowed cannot arise here */
            abort();
        sbuf_reset(&t->args);
    }
    if ((int)ev->kind != t->kind || ev->kind == CHAT_CALL_START)
        sbuf_fmt(&t->all, "\x01%d:", (int)ev->kind);
    t->kind = ev->kind;
    sbuf_add(&t->all, ev->text, ev->len);
}

static void follow(struct trace *t, const struct automaton_opts *base, const char *p, size_t n, uint32_t seed)
{
    struct automaton_opts o = *base;
    o.arg = t;
    struct automaton *a = automaton_create(&o);
    for (size_t at = 0; a != NULL && at < n;) {
        seed = seed * 1664525u + 1013904223u;
        size_t len = seed == 0 ? n : 1 + (seed >> 24) % 9;
        if (base->arg != NULL || len > n - at)
            len = n - at;
        automaton_push(a, p + at, len);
        at += len;
    }
    automaton_finish(a);
    automaton_destroy(a);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct json_object *tools;
    if (tools == NULL)
        tools = json_tokener_parse("[{\"function\":{\"name\":\"f\",\"parameters\":{\"properties\":{\"i\":{\"type\":\"integer\"},"
                                   "\"n\":{\"type\":\"number\"},\"o\":{\"type\":\"object\"},\"b\":{\"type\":\"boolean\"}}}}}]");
    if (size < 2)
        return 0;
    struct trace whole = { .all = SBUF_INIT }, cut = { .all = SBUF_INIT };
    struct automaton_opts o = { .syntax = &syntaxes[data[0] & 1], .tools = tools, .starts_in_reasoning = data[0] & 2,
                                .parse_calls = data[0] & 4, .fn = on_event };
    const char *p = (const char *)data + 2;
    o.arg = &whole;         /* set: one piece */
    follow(&whole, &o, p, size - 2, 0);
    o.arg = NULL;
    follow(&cut, &o, p, size - 2, data[1] + 1u);
    if (whole.all.n != cut.all.n || memcmp(sbuf_text(&whole.all), sbuf_text(&cut.all), cut.all.n) != 0)
        abort();
    sbuf_fini(&whole.all);
    sbuf_fini(&whole.args);
    sbuf_fini(&cut.all);
    sbuf_fini(&cut.args);
    return 0;
}
