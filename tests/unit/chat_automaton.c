/* The output automaton: events of well-formed, malformed and cut-off output, the same for every way to cut the input. */
#include "tap.h"

#include <json-c/json.h>

#include "chat/automaton.h"
#include "chat/coerce.h"
#include "util/sbuf.h"

static const struct arle_output_syntax untyped = {
    .struct_size = sizeof(struct arle_output_syntax),
    .reason_open = "<think>", .reason_close = "</think>",
    .section_open = "<tool_call>", .section_close = "</tool_call>",
    .call_open = "<function=", .name_end = ">", .call_close = "</function>",
    .param_open = "<parameter=", .key_end = ">", .param_close = "</parameter>",
    .value_newlines = 1, .calls_in_reasoning = 1, .many_sections = 1,
};

static const struct arle_output_syntax typed = {
    .struct_size = sizeof(struct arle_output_syntax),
    .reason_open = "<think>", .reason_close = "</think>",
    .section_open = "<|X|calls>", .section_close = "</|X|calls>",
    .call_open = "<|X|invoke name=\"", .name_end = "\">", .call_close = "</|X|invoke>",
    .param_open = "<|X|parameter name=\"", .param_close = "</|X|parameter>",
    .typed_open = "\" string=\"", .typed_end = "\">",
};

static const char tools_json[] =
    "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"type\":\"object\",\"properties\":{"
    "\"s\":{\"type\":\"string\"},\"i\":{\"type\":\"integer\"},\"n\":{\"type\":\"number\"},\"b\":{\"type\":\"boolean\"},"
    "\"o\":{\"type\":\"object\"},\"a\":{\"type\":\"array\"},\"u\":{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"string\"}]},"
    "\"m\":{\"type\":[\"boolean\",\"string\"]},\"x\":{}}}}}]";
static struct json_object *tools;

/* Events as text: R(..) reasoning, C(..) content, name{args} calls ended by ';', '~' truncated. Neighbours are joined. */
struct trace {
    struct sbuf out;
    int kind;
    uint32_t call;
};

static void close_text(struct trace *t)
{
    if (t->kind == CHAT_REASONING || t->kind == CHAT_CONTENT)
        sbuf_char(&t->out, ')');
    t->kind = 0;
}

static void on_event(void *arg, const struct chat_event *ev)
{
    struct trace *t = arg;
    if (ev->kind != CHAT_REASONING && ev->kind != CHAT_CONTENT)
        close_text(t);
    if (ev->kind == CHAT_CALL_START)
        sbuf_fmt(&t->out, "%u:", ev->call);
    else if ((ev->kind == CHAT_REASONING || ev->kind == CHAT_CONTENT) && (int)ev->kind != t->kind) {
        close_text(t);
        sbuf_str(&t->out, ev->kind == CHAT_REASONING ? "R(" : "C(");
        t->kind = ev->kind;
    }
    sbuf_add(&t->out, ev->text, ev->len);
    if (ev->kind == CHAT_CALL_END)
        sbuf_char(&t->out, ';');
}

static void follow(struct sbuf *out, const struct arle_output_syntax *syn, bool reasoning, bool calls, const char *in, size_t n,
                   const size_t *cuts, size_t n_cuts)
{
    struct trace t = { .out = SBUF_INIT };
    struct automaton_opts o = { .syntax = syn, .tools = tools, .starts_in_reasoning = reasoning, .parse_calls = calls,
                                .fn = on_event, .arg = &t };
    struct automaton *a = automaton_create(&o);
    size_t from = 0;
    for (size_t i = 0; i <= n_cuts; i++) {
        size_t to = i < n_cuts ? cuts[i] : n;
        EXPECT_EQ(automaton_push(a, in + from, to - from), 0);
        from = to;
    }
    EXPECT_EQ(automaton_finish(a), 0);
    close_text(&t);
    if (automaton_truncated(a))
        sbuf_char(&t.out, '~');
    automaton_destroy(a);
    *out = t.out;
}

static void same(const struct arle_output_syntax *syn, bool reasoning, bool calls, const char *in, const char *want,
                 const size_t *cuts, size_t n_cuts)
{
    struct sbuf got;
    follow(&got, syn, reasoning, calls, in, strlen(in), cuts, n_cuts);
    if (strcmp(sbuf_text(&got), want) != 0 && !tap_case_failed) {
        TAP_FAIL("input %s", in);
        EXPECT_STR(sbuf_text(&got), want);
        for (size_t i = 0; i < n_cuts && i < 8; i++)
            printf("# cut at %zu\n", cuts[i]);
    }
    sbuf_fini(&got);
}

/* Whole, byte by byte, every single cut and every pair of cuts. */
static void check(const struct arle_output_syntax *syn, bool reasoning, bool calls, const char *in, const char *want)
{
    size_t n = strlen(in), all[1024];
    for (size_t i = 0; i < n && i < 1024; i++)
        all[i] = i;
    same(syn, reasoning, calls, in, want, NULL, 0);
    same(syn, reasoning, calls, in, want, all, n);
    for (size_t i = 0; i <= n; i++) {
        same(syn, reasoning, calls, in, want, &i, 1);
        for (size_t j = i + 1; j <= n; j++)
            same(syn, reasoning, calls, in, want, (size_t[]){ i, j }, 2);
    }
}

static void plain_text_is_content(void)
{
    check(&untyped, false, true, "Hello, <b>world</b>.\n", "C(Hello, <b>world</b>.\n)");
    check(&untyped, false, true, "", "");
    check(&untyped, false, true, "a <tool_ b <tool_call> c", "C(a <tool_ b <tool_call> c)");
    check(&untyped, false, true, "cut <tool_c", "C(cut <tool_c)");
    check(&untyped, false, true, "  lead and trail \n\n", "C(  lead and trail \n\n)");
    check(&untyped, false, false, "<tool_call>\n<function=f>\n</function>\n</tool_call>",
          "C(<tool_call>\n<function=f>\n</function>\n</tool_call>)");
    check(NULL, false, true, "<think>x</think>", "C(<think>x</think>)");
}

static void reasoning_is_split_off(void)
{
    check(&untyped, true, true, "I add.\n</think>\n\n4", "R(I add.)C(4)");
    check(&untyped, true, true, "<think>\nI add.\n</think>\n\n\n4", "R(I add.)C(\n4)");
    check(&untyped, false, true, "<think>\nI add.\n</think>4", "R(I add.)C(4)");
    check(&untyped, true, true, "never closed </thin", "R(never closed </thin)");
    check(&untyped, true, true, "\n\n</think>\n\nx", "C(x)");
    check(&untyped, true, false, "a\n\nb \n</think>\n\nx", "R(a\n\nb )C(x)");
    check(&untyped, false, true, "x</think>", "C(x</think>)");
    check(&untyped, true, true, "I could write <tool_call> here\n</think>\n\nx", "R(I could write <tool_call> here)C(x)");
    check(&untyped, true, true, "go\n<tool_call>\n<function=f>\n</function>\n</tool_call>", "R(go)0:f{};");
}

#define CALL(body) "<tool_call>\n<function=f>\n" body "</function>\n</tool_call>"
#define PARAM(k, v) "<parameter=" k ">\n" v "\n</parameter>\n"

static void calls_become_json(void)
{
    check(&untyped, false, true, CALL(PARAM("s", "ls -l | \"wc\"")), "0:f{\"s\": \"ls -l | \\\"wc\\\"\"};");
    check(&untyped, false, true, "I look.\n\n" CALL(PARAM("s", "a\n\nb\n") PARAM("i", "7")),
          "C(I look.)0:f{\"s\": \"a\\n\\nb\\n\", \"i\": 7};");
    check(&untyped, false, true, CALL("") "\n" CALL(PARAM("b", "TRUE")) "\n", "0:f{};1:f{\"b\": true};");
    check(&untyped, true, true, "t\n</think>\n\n" CALL(PARAM("s", "null")) " after", "R(t)0:f{\"s\": null};C(after)");
    check(&untyped, false, true, CALL(PARAM("s", "nul") PARAM("zz", "nulls") PARAM("s", "again")),
          "0:f{\"s\": \"nul\", \"zz\": \"nulls\"};");
    check(&untyped, false, true, "<tool_call><function=g><parameter=k>v</parameter></function></tool_call>",
          "0:g{\"k\": \"v\"};");
    check(&untyped, false, true, CALL(PARAM("s", "<parameter <tool_call> </para>")),
          "0:f{\"s\": \"<parameter <tool_call> </para>\"};");
}

static void values_follow_the_schema(void)
{
    check(&untyped, false, true, CALL(PARAM("i", "007") PARAM("n", "5")), "0:f{\"i\": 7, \"n\": 5};");
    check(&untyped, false, true, CALL(PARAM("n", "-1.50") PARAM("i", "x1")), "0:f{\"n\": -1.50, \"i\": \"x1\"};");
    check(&untyped, false, true, CALL(PARAM("b", "no") PARAM("m", "no")), "0:f{\"b\": false, \"m\": \"no\"};");
    check(&untyped, false, true, CALL(PARAM("o", "{\"k\": [1,2]}")), "0:f{\"o\": {\"k\": [1,2]}};");
    check(&untyped, false, true, CALL(PARAM("a", "['x', True, None]")), "0:f{\"a\": [\"x\", true, null]};");
    check(&untyped, false, true, CALL(PARAM("o", "{oops")), "0:f{\"o\": \"{oops\"};");
    check(&untyped, false, true, CALL(PARAM("u", "12") PARAM("u2", "12")), "0:f{\"u\": 12, \"u2\": \"12\"};");
    check(&untyped, false, true, CALL(PARAM("x", "3")), "0:f{\"x\": \"3\"};");
}

static void missing_closers_are_supplied(void)
{
    check(&untyped, false, true, "x\n<function=f>\n<parameter=i>\n3\n</function>\n", "C(x)0:f{\"i\": 3};");
    check(&untyped, false, true, "x <function=f>", "C(x <function=f>)");
    check(&untyped, false, true, "<tool_call>\n<function=f>\n<parameter=s>a<parameter=i>3</tool_call>rest",
          "0:f{\"s\": \"a\", \"i\": \"3</tool_call>rest\"};~");
    check(&untyped, false, true, "<tool_call>\n<function=f>\n</tool_call>\n\nrest", "0:f{};C(rest)");
    check(&untyped, false, true, "<tool_call>\n<function=f>\njunk\n<tool_call>\n<function=g>\n</function>", "0:f{};1:g{};");
    check(&untyped, false, true, "<tool_call>\n<function=f>\n</function>\nprose", "0:f{};C(prose)");
}

static void cut_output_closes_the_call(void)
{
    check(&untyped, false, true, "ok\n<tool_call>", "C(ok)~");
    check(&untyped, false, true, "ok <tool_call>\n<function=f", "C(ok)~");
    check(&untyped, false, true, "<tool_call>\n<function=f>", "0:f{};~");
    check(&untyped, false, true, "<tool_call>\n<function=f>\n<parameter=s", "0:f{};~");
    check(&untyped, false, true, "<tool_call>\n<function=f>\n<parameter=s>\nhalf a", "0:f{\"s\": \"half a\"};~");
    check(&untyped, false, true, "<tool_call>\n<function=f>\n<parameter=i>\n12", "0:f{\"i\": 12};~");
    check(&untyped, false, true, "<tool_call>\n<function=f>\n<parameter=i>", "0:f{\"i\": \"\"};~");
    check(&untyped, false, true, "<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n", "0:f{\"s\": \"a\"};~");
}

#define TCALL(body) "<|X|invoke name=\"f\">\n" body "</|X|invoke>\n"
#define TPARAM(k, t, v) "<|X|parameter name=\"" k "\" string=\"" t "\">" v "</|X|parameter>\n"

static void typed_values_say_what_they_are(void)
{
    check(&typed, false, true, "Sure.\n\n<|X|calls>\n" TCALL(TPARAM("s", "true", "null")) "</|X|calls>",
          "C(Sure.)0:f{\"s\": \"null\"};");
    check(&typed, true, true, "t</think><|X|calls>\n" TCALL(TPARAM("z", "false", "[1]") TPARAM("y", "true", "\n1\n"))
          TCALL("") "</|X|calls> x", "R(t)0:f{\"z\": [1], \"y\": \"\\n1\\n\"};1:f{};C(x)");
    check(&typed, false, true, "<|X|calls>\n" TCALL(TPARAM("z", "false", "oops")) "</|X|calls>", "0:f{\"z\": \"oops\"};");
    check(&typed, false, true, "<|X|calls>\n" TCALL("") "</|X|calls><|X|calls>\n" TCALL("") "</|X|calls>",
          "0:f{};C(<|X|calls>\n" TCALL("") "</|X|calls>)");
}

static void nothing_waits_without_need(void)
{
    struct trace t = { .out = SBUF_INIT };
    struct automaton_opts o = { .syntax = &untyped, .tools = tools, .parse_calls = true, .fn = on_event, .arg = &t };
    struct automaton *a = automaton_create(&o);
    automaton_push(a, "Hello wor", 9);
    EXPECT_STR(sbuf_text(&t.out), "C(Hello wor");
    automaton_push(a, "ld <x", 5);
    EXPECT_STR(sbuf_text(&t.out), "C(Hello world <x");
    automaton_push(a, "\n<tool_call>\n<function=f>\n<parameter=s>\nabc", 43);
    EXPECT_STR(sbuf_text(&t.out), "C(Hello world <x)0:f{\"s\": \"abc");
    automaton_push(a, "\ndef\n</par", 10);
    EXPECT_STR(sbuf_text(&t.out), "C(Hello world <x)0:f{\"s\": \"abc\\ndef");
    EXPECT_EQ(automaton_calls(a), 0);
    automaton_push(a, "ameter></function>", 18);
    EXPECT_EQ(automaton_calls(a), 1);
    automaton_destroy(a);
    sbuf_fini(&t.out);
}

static void coercion_table(void)
{
    static const struct { const char *key, *text, *want; } rows[] = {
        { "s", "NULL", "null" }, { "s", "", "\"\"" }, { "i", "-0", "0" }, { "i", "+12", "12" }, { "i", "1.5", "\"1.5\"" },
        { "i", "123456789012345678901234567890", "123456789012345678901234567890" }, { "n", "1e3", "1e3" },
        { "n", "nan", "\"nan\"" }, { "n", "0x10", "\"0x10\"" }, { "n", ".5", "0.5" }, { "b", "1", "false" },
        { "a", "[1, 2", "\"[1, 2\"" }, { "a", "(1, 'a\"b')", "[1, \"a\\\"b\"]" }, { "o", "{'a': {'b': False}}",
        "{\"a\": {\"b\": false}}" }, { "o", "{\"a\":1,}", "{\"a\": 1}" }, { "u", "x", "\"x\"" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct sbuf out = SBUF_INIT;
        struct coerce_plan plan = coerce_plan_for(tools, "f", rows[i].key);
        coerce_value(&plan, rows[i].text, strlen(rows[i].text), &out);
        EXPECT_STR(sbuf_text(&out), rows[i].want);
        EXPECT(coerce_is_json(out.p, out.n));
        sbuf_fini(&out);
    }
    EXPECT(!coerce_is_json("[1,]", 4));
    EXPECT(!coerce_is_json("01", 2));
    EXPECT(!coerce_is_json("{} x", 4));
}

static void deep_literals_are_refused(void)
{
    char deep[400];
    memset(deep, '[', 200);
    memset(deep + 200, ']', 200);
    EXPECT(!coerce_is_json(deep, 400));
    EXPECT(coerce_is_json(deep + 170, 60));
}

int main(void)
{
    tools = json_tokener_parse(tools_json);
    RUN(plain_text_is_content);
    RUN(reasoning_is_split_off);
    RUN(calls_become_json);
    RUN(values_follow_the_schema);
    RUN(missing_closers_are_supplied);
    RUN(cut_output_closes_the_call);
    RUN(typed_values_say_what_they_are);
    RUN(nothing_waits_without_need);
    RUN(coercion_table);
    RUN(deep_literals_are_refused);
    json_object_put(tools);
    return tap_done();
}
