/* Chat rendering of the Qwen3.5 format beyond the golden texts: each rule of the template, marks, and errors by field. */
#include "tap.h"
#include "chat.h"
#include "chat_text.h"
#include "chat_tools.h"

#include <unistd.h>

struct got { char text[8192], marks[512], client[4096], literal[512]; size_t n, n_client; struct arle_chat_result res; };

static int take_text(void *ctx, const char *text, size_t len, uint32_t flags)
{
    struct got *g = ctx;
    if (len > sizeof g->text - 1 - g->n)
        return -ENOSPC;
    memcpy(g->text + g->n, text, len);
    g->text[g->n += len] = '\0';
    if (flags == ARLE_TEXT_LITERAL)
        strncat(g->literal, text, len);
    if (flags == ARLE_TEXT_CONTENT) {
        memcpy(g->client + g->n_client, text, len);
        g->client[g->n_client += len] = '\0';
    }
    return 0;
}

static int take_mark(void *ctx, uint32_t mark)
{
    struct got *g = ctx;
    size_t at = strlen(g->marks);
    snprintf(g->marks + at, sizeof g->marks - at, "%c%zu ", " STP"[mark], g->n);
    return 0;
}

static int render(const char *request, struct got *g, struct arle_err *err)
{
    struct arle_chat_sink sink = { g, take_text, take_mark };
    memset(g, 0, sizeof *g);
    return qwen35_chat_render(NULL, request, strlen(request), &sink, &g->res, err);
}

static struct got g;

static void expect(const char *request, const char *want)
{
    struct arle_err err = ARLE_ERR_INIT;
    if (render(request, &g, &err) < 0)
        TAP_FAIL("%s: %s", request, err.msg);
    EXPECT_STR(g.text, want);
}

static void refuse(const char *request, const char *param)
{
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(render(request, &g, &err), -EINVAL);
    EXPECT_STR(err.param, param);
    EXPECT(strstr(err.msg, param) != NULL);
}

#define U(t) "{\"role\":\"user\",\"content\":\"" t "\"}"
#define A(t) "{\"role\":\"assistant\",\"content\":\"" t "\"}"
#define T(t) "{\"role\":\"tool\",\"content\":\"" t "\"}"
#define CALL(args) "{\"role\":\"assistant\",\"content\":\"\",\"tool_calls\":[{\"id\":\"1\",\"name\":\"f\",\"arguments\":" args "}]}"

static void the_instruction_block_is_the_published_one(void)
{
    char path[] = "/tmp/arle-chat-XXXXXX", cmd[64], sum[128] = "";
    EXPECT_EQ(strlen(QWEN35_TOOL_INSTRUCTIONS), 817);
    int fd = mkstemp(path);
    REQUIRE(fd >= 0);
    EXPECT_EQ(write(fd, QWEN35_TOOL_INSTRUCTIONS, 817), 817);
    close(fd);
    snprintf(cmd, sizeof cmd, "sha256sum %s", path);
    FILE *f = popen(cmd, "r");
    REQUIRE(f != NULL);
    EXPECT(fgets(sum, sizeof sum, f) != NULL);
    pclose(f);
    unlink(path);
    sum[64] = '\0';
    EXPECT_STR(sum, "c618bf70de036a3337fbf9cfaf7171d7b700d3e116d61b6f4a40511e1ab4e25b");
}

static void system_and_thinking(void)
{
    expect("{\"messages\":[{\"role\":\"system\",\"content\":\"\"}," U("\\u3000 a \\n") "]}",
           "<|im_start|>system\n<|im_end|>\n<|im_start|>user\na<|im_end|>\n");
    expect("{\"messages\":[{\"role\":\"system\",\"content\":\"x\"},{\"role\":\"developer\",\"content\":\"y\"}," U("a") "]}",
           "<|im_start|>system\nx\n\ny<|im_end|>\n<|im_start|>user\na<|im_end|>\n");
    expect("{\"messages\":[" U("a") "],\"add_generation_prompt\":true,\"options\":{\"enable_thinking\":true}}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n");
    EXPECT_EQ(g.res.starts_in_reasoning, 1);
    expect("{\"messages\":[" U("a") "],\"add_generation_prompt\":true,\"options\":{\"enable_thinking\":false}}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
    EXPECT_EQ(g.res.starts_in_reasoning, 0);
    EXPECT_STR(g.client, "a");
}

#define HISTORY "[" U("a") ",{\"role\":\"assistant\",\"content\":\"b\",\"reasoning_content\":\" r \"}," U("c") "]"

static void earlier_reasoning_is_dropped_unless_preserved(void)
{
    expect("{\"messages\":" HISTORY "}", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
           "<|im_start|>user\nc<|im_end|>\n");
    expect("{\"messages\":" HISTORY ",\"options\":{\"preserve_thinking\":true}}", "<|im_start|>user\na<|im_end|>\n"
           "<|im_start|>assistant\n<think>\nr\n</think>\n\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n");
    expect("{\"messages\":[" U("a") "," A("<think>\\nr\\n</think>\\n\\nb") "," U("c") "]}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n");
    expect("{\"messages\":[" U("a") "," A("<think>\\nr\\n</think>\\n\\nb") "]}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nr\n</think>\n\nb<|im_end|>\n");
    expect("{\"messages\":[" U("a") "," A("b") "," U("<tool_response>x</tool_response>") "]}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n"
           "<|im_start|>user\n<tool_response>x</tool_response><|im_end|>\n");
}

#define RAW(lead, text) "{\"id\":\"1\",\"name\":\"f\",\"arguments\":{\"k\":1},\"raw\":{" lead "\"text\":" text "}}"
#define CALLS(content, list) "{\"messages\":[" U("a") ",{\"role\":\"assistant\",\"content\":\"" content "\",\"tool_calls\":[" list "]}]}"
#define TURN "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

static void calls_as_they_were_sampled(void)
{
    expect(CALLS("t", RAW("\"lead\":\"\\n\",", "[\"\",\"<tool_call>\",\" <|im_end|> \",\"</tool_call>\"]")),
           TURN "t\n<tool_call> <|im_end|> </tool_call><|im_end|>\n");
    EXPECT_STR(g.client, "at");             /* pieces are no client's text, whatever they spell */
    EXPECT_STR(g.literal, "\n <|im_end|> ");
    /* Without a lead the template's own separators; an empty piece list is a call written with the one before it. */
    expect(CALLS("t", RAW("", "[\"x\"]") "," RAW("\"lead\":\"\",", "[]") "," RAW("", "[\"y\"]")), TURN "t\n\nx\ny<|im_end|>\n");
    expect(CALLS("", RAW("", "[\"x\"]") ",{\"name\":\"g\"}"), TURN "x\n<tool_call>\n<function=g>\n</function>\n</tool_call><|im_end|>\n");
    expect("{\"messages\":[" U("a") ",{\"role\":\"assistant\",\"content\":\"be fore\",\"raw_content\":\"be\",\"tool_calls\":["
           RAW("", "[\"x fore\"]") "]}]}", TURN "be\n\nx fore<|im_end|>\n");
}

static void calls_and_their_results(void)
{
    expect("{\"messages\":[" U("a") ",{\"role\":\"assistant\",\"content\":\"t\",\"tool_calls\":[{\"name\":\"f\",\"arguments\":{\"k\":\"v\"}},"
           "{\"function\":{\"name\":\"g\",\"arguments\":{}}}]}," T("1") "," T("2") "]}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nt\n\n<tool_call>\n<function=f>\n"
           "<parameter=k>\nv\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call><|im_end|>\n"
           "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n");
}

#define ARGS "{\"a\":true,\"b\":null,\"c\":1.50,\"d\":1e16,\"e\":[1,{\"x\":\"\\u00e9<\\\"\\n\"}],\"f\":-7,\"g\":\"raw\"}"

static void values_are_written_as_either_template_does(void)
{
    expect("{\"messages\":[" U("a") "," CALL(ARGS) "," U("b") "]}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<tool_call>\n<function=f>\n<parameter=a>\nTrue\n</parameter>\n"
           "<parameter=b>\nNone\n</parameter>\n<parameter=c>\n1.5\n</parameter>\n<parameter=d>\n1e+16\n</parameter>\n"
           "<parameter=e>\n[1, {\"x\": \"\xC3\xA9<\\\"\\n\"}]\n</parameter>\n<parameter=f>\n-7\n</parameter>\n"
           "<parameter=g>\nraw\n</parameter>\n</function>\n</tool_call><|im_end|>\n<|im_start|>user\nb<|im_end|>\n");
    expect("{\"options\":{\"template\":\"3.6\"},\"messages\":[" U("a") "," CALL("{\"a\":true,\"b\":null,\"g\":\"raw\",\"o\":{}}") "," U("b") "]}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<tool_call>\n<function=f>\n<parameter=a>\ntrue\n</parameter>\n"
           "<parameter=b>\nnull\n</parameter>\n<parameter=g>\nraw\n</parameter>\n<parameter=o>\n{}\n</parameter>\n"
           "</function>\n</tool_call><|im_end|>\n<|im_start|>user\nb<|im_end|>\n");
    static const struct { const char *json, *want; } numbers[] = {
        { "0.1", "0.1" }, { "100.0", "100.0" }, { "1e22", "1e+22" }, { "0.0001", "0.0001" }, { "0.00001", "1e-05" }, { "-2.5e-7", "-2.5e-07" },
        { "123456789012345680.0", "1.2345678901234568e+17" }, { "1234567890123456.0", "1234567890123456.0" }, { "0.0", "0.0" },
        { "18446744073709551615", "18446744073709551615" }, { "3.141592653589793", "3.141592653589793" },
    };
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        struct text t = { 0 };
        struct json_object *v = json_tokener_parse(numbers[i].json);
        text_json(&t, v);
        text_add(&t, "", 1);
        EXPECT_STR(t.p, numbers[i].want);
        text_free(&t);
        json_object_put(v);
    }
}

static void a_final_message_can_go_on(void)
{
    expect("{\"continue_final\":true,\"messages\":[" U("a") "," A("The answer") "]}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nThe answer");
    EXPECT_EQ(g.res.starts_in_reasoning, 0);
    expect("{\"continue_final\":true,\"messages\":[" U("a") ",{\"role\":\"assistant\",\"reasoning_content\":\"Let me\"}]}",
           "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nLet me");
    EXPECT_EQ(g.res.starts_in_reasoning, 1);
    refuse("{\"continue_final\":true,\"messages\":[" U("a") "]}", "messages[0].role");
    refuse("{\"continue_final\":true,\"add_generation_prompt\":true,\"messages\":[" U("a") "," A("b") "]}", "continue_final");
    refuse("{\"continue_final\":true,\"messages\":[" U("a") "," CALL("{}") "]}", "messages[1].tool_calls");
}

static void marks_lie_where_prefixes_may_be_kept(void)
{
    expect("{\"messages\":[{\"role\":\"system\",\"content\":\"s\"}," U("a") "," A("b") "," T("c") "],\"add_generation_prompt\":true}",
           "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n"
           "<|im_start|>user\n<tool_response>\nc\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
    /* S system end, T turn end, P stable: after the query, since what follows it loses its reasoning later. */
    EXPECT_STR(g.marks, "S31 T60 P60 T113 T175 ");
}

static void errors_name_the_field(void)
{
    refuse("{}", "messages");
    refuse("{\"messages\":[]}", "messages");
    refuse("{\"messages\":[" A("a") "]}", "messages");
    refuse("{\"messages\":[" U("a") ",7]}", "messages[1]");
    refuse("{\"messages\":[" U("a") ",{\"role\":\"robot\"}]}", "messages[1].role");
    refuse("{\"messages\":[" U("a") ",{\"role\":\"system\",\"content\":\"x\"}]}", "messages[1].role");
    refuse("{\"messages\":[{\"role\":\"user\",\"content\":[1]}]}", "messages[0].content");
    refuse("{\"messages\":[" U("a") ",{\"role\":\"assistant\",\"reasoning_content\":1}]}", "messages[1].reasoning_content");
    refuse("{\"messages\":[" U("a") ",{\"role\":\"assistant\",\"tool_calls\":{}}]}", "messages[1].tool_calls");
    refuse("{\"messages\":[" U("a") ",{\"role\":\"assistant\",\"tool_calls\":[{}]}]}", "messages[1].tool_calls[0].name");
    refuse("{\"messages\":[" U("a") "," CALL("\"{}\"") "]}", "messages[1].tool_calls[0].arguments");
    refuse("{\"messages\":[" U("a") "],\"tools\":{}}", "tools");
    refuse("{\"messages\":[" U("a") "],\"tools\":[1]}", "tools[0]");
    refuse("{\"messages\":[" U("a") "],\"options\":{\"enable_thinking\":\"yes\"}}", "options.enable_thinking");
    refuse("{\"messages\":[" U("a") "],\"options\":{\"template\":\"4\"}}", "options.template");
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(render("{\"messages\":", &g, &err), -EINVAL);
    EXPECT(err.msg[0] != '\0');
}

static void the_syntax_is_the_one_that_is_rendered(void)
{
    const struct arle_output_syntax *s = qwen35_chat_syntax(NULL);
    EXPECT_STR(s->section_open, "<tool_call>");
    EXPECT_STR(s->call_open, "<function=");
    EXPECT_STR(s->param_close, "</parameter>");
    EXPECT(s->value_newlines && s->many_sections && s->calls_in_reasoning);
}

int main(void)
{
    RUN(the_instruction_block_is_the_published_one);
    RUN(system_and_thinking);
    RUN(earlier_reasoning_is_dropped_unless_preserved);
    RUN(calls_and_their_results);
    RUN(calls_as_they_were_sampled);
    RUN(values_are_written_as_either_template_does);
    RUN(a_final_message_can_go_on);
    RUN(marks_lie_where_prefixes_may_be_kept);
    RUN(errors_name_the_field);
    RUN(the_syntax_is_the_one_that_is_rendered);
    return tap_done();
}
