/* Request bodies: every field is checked, and every refusal names its field and its kind. */
#include "tap.h"

#include <json-c/json.h>

#include "chat/messages.h"
#include "http/json_in.h"
#include "util/jfield.h"

static const struct gen_defaults defaults = { .temperature = 0.7f, .top_p = 0.95f, .repetition = 1, .top_k = 20 };

static int read_body(enum dialect d, const char *text, struct gen_params *p, struct json_object **body, struct arle_err *err)
{
    *p = (struct gen_params){ 0 };
    int r = json_text_parse_object(text, strlen(text), "the body", body, err);
    return r < 0 ? r : gen_params_read(p, d, *body, &defaults, 4096, err);
}

static void refuses(enum dialect d, const char *text, int code, const char *param)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct gen_params p;
    struct json_object *body = NULL;
    int r = read_body(d, text, &p, &body, &err);
    if (r != code || strcmp(err.param, param) != 0)
        TAP_FAIL("%s: got %d param \"%s\" (%s), expected %d \"%s\"", text, r, err.param, err.msg, code, param);
    gen_params_fini(&p);
    json_object_put(body);
}

static void values_arrive(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct gen_params p;
    struct json_object *body = NULL;
    EXPECT_EQ(read_body(DIALECT_CHAT, "{\"temperature\":0,\"top_p\":0.5,\"top_k\":-1,\"min_p\":0.1,\"presence_penalty\":1,"
                        "\"frequency_penalty\":-2,\"repetition_penalty\":1.1,\"seed\":7,\"max_completion_tokens\":9,\"n\":3,"
                        "\"stop\":[\"a\",\"b\"],\"stop_token_ids\":[1,2],\"logprobs\":true,\"top_logprobs\":5,\"stream\":true,"
                        "\"stream_options\":{\"include_usage\":true},\"logit_bias\":{\"5\":-100},\"tools\":[{}],\"user\":null,"
                        "\"priority\":-3,\"cache_salt\":\"x\"}", &p, &body, &err), 0);
    EXPECT_STR(err.msg, "");
    EXPECT_NEAR(p.sampling.temperature, 0, 0);
    EXPECT_NEAR(p.sampling.top_p, 0.5, 0);
    EXPECT_EQ(p.sampling.top_k, 0);
    EXPECT_NEAR(p.sampling.min_p, 0.1, 1e-7);
    EXPECT_NEAR(p.sampling.frequency, -2, 0);
    EXPECT_NEAR(p.sampling.repetition, 1.1, 1e-6);
    EXPECT(p.sampling.has_seed && p.sampling.seed == 7);
    EXPECT_EQ(p.max_new, 9);
    EXPECT_EQ(p.n, 3);
    EXPECT(p.stops != NULL && p.n_stop_ids == 2 && p.stop_ids[1] == 2);
    EXPECT(p.sampling.want_logprobs && p.sampling.n_top == 5);
    EXPECT(p.stream && p.include_usage && p.use_tools && p.parse_calls);
    EXPECT_EQ(p.sampling.n_bias, 1);
    EXPECT_EQ(p.sampling.bias[0].id, 5);
    EXPECT_EQ(p.priority, -3);
    EXPECT_STR(p.cache_salt, "x");
    gen_params_fini(&p);
    json_object_put(body);
}

static void defaults_come_from_the_model(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct gen_params p;
    struct json_object *body = NULL;
    EXPECT_EQ(read_body(DIALECT_COMPLETIONS, "{\"temperature\":null}", &p, &body, &err), 0);
    EXPECT_NEAR(p.sampling.temperature, 0.7, 1e-6);
    EXPECT_EQ(p.sampling.top_k, 20);
    EXPECT_EQ(p.max_new, -1);
    EXPECT_EQ(p.n, 1);
    gen_params_fini(&p);
    json_object_put(body);
}

static void refusals_name_the_field(void)
{
    static const struct { const char *body; int code; const char *param; } rows[] = {
        { "{\"temperature\":\"hot\"}", -EPROTO, "temperature" }, { "{\"temperature\":2.1}", -ERANGE, "temperature" },
        { "{\"temperature\":true}", -EPROTO, "temperature" }, { "{\"top_p\":1.5}", -ERANGE, "top_p" },
        { "{\"top_k\":1.5}", -EPROTO, "top_k" }, { "{\"n\":0}", -ERANGE, "n" }, { "{\"n\":\"1\"}", -EPROTO, "n" },
        { "{\"max_tokens\":0}", -ERANGE, "max_tokens" }, { "{\"max_tokens\":[1]}", -EPROTO, "max_tokens" },
        { "{\"stream\":1}", -EPROTO, "stream" }, { "{\"stream_options\":{}}", -EINVAL, "stream_options" },
        { "{\"stop\":5}", -EPROTO, "stop" }, { "{\"stop\":[\"\"]}", -EINVAL, "stop" },
        { "{\"stop\":[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\",\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\",\"h\"]}",
          -ERANGE, "stop" },
        { "{\"stop_token_ids\":[4096]}", -ERANGE, "stop_token_ids" }, { "{\"stop_token_ids\":[\"1\"]}", -EPROTO, "stop_token_ids" },
        { "{\"logit_bias\":{\"x\":1}}", -ERANGE, "logit_bias" }, { "{\"logit_bias\":{\"1\":101}}", -ERANGE, "logit_bias" },
        { "{\"logit_bias\":[]}", -EPROTO, "logit_bias" }, { "{\"seed\":0.5}", -EPROTO, "seed" },
        { "{\"seed\":9223372036854775808}", -ERANGE, "seed" }, { "{\"seed\":-9223372036854775809}", -ERANGE, "seed" },
        { "{\"seed\":100000000000000000000000}", -ERANGE, "seed" }, { "{\"cache_salt\":\"a\\u0000b\"}", -EINVAL, "cache_salt" },
        { "{\"metadata\":5}", -EPROTO, "metadata" }, { "{\"metadata\":{\"a\":1}}", -EPROTO, "metadata.a" },
        { "{\"store\":\"yes\"}", -EPROTO, "store" }, { "{\"service_tier\":\"first\"}", -EINVAL, "service_tier" },
        { "{\"verbosity\":\"lo\"}", -EINVAL, "verbosity" }, { "{\"parallel_tool_calls\":1}", -EPROTO, "parallel_tool_calls" },
        { "{\"user\":3}", -EPROTO, "user" }, { "{\"temprature\":1}", -ENOKEY, "temprature" },
        { "{\"functions\":[]}", -ENOTSUP, "functions" }, { "{\"presence_penalty\":-3}", -ERANGE, "presence_penalty" },
        { "{\"min_p\":-0.1}", -ERANGE, "min_p" }, { "{\"repetition_penalty\":0}", -ERANGE, "repetition_penalty" },
        { "{\"priority\":1e12}", -ERANGE, "priority" }, { "{\"ignore_eos\":\"no\"}", -EPROTO, "ignore_eos" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        refuses(DIALECT_CHAT, rows[i].body, rows[i].code, rows[i].param);
    refuses(DIALECT_CHAT, "{\"logprobs\":3}", -EPROTO, "logprobs");
    refuses(DIALECT_CHAT, "{\"top_logprobs\":3}", -EINVAL, "top_logprobs");
    refuses(DIALECT_CHAT, "{\"logprobs\":true,\"top_logprobs\":21}", -ERANGE, "top_logprobs");
    refuses(DIALECT_CHAT, "{\"tool_choice\":\"required\"}", -ENOTSUP, "tool_choice");
    refuses(DIALECT_CHAT, "{\"tool_choice\":{\"type\":\"function\"}}", -ENOTSUP, "tool_choice");
    refuses(DIALECT_CHAT, "{\"tool_choice\":\"maybe\"}", -EINVAL, "tool_choice");
    refuses(DIALECT_CHAT, "{\"response_format\":{\"type\":\"json_object\"}}", -ENOTSUP, "response_format.type");
    refuses(DIALECT_CHAT, "{\"response_format\":\"text\"}", -EPROTO, "response_format");
    refuses(DIALECT_CHAT, "{\"modalities\":[\"audio\"]}", -ENOTSUP, "modalities");
    refuses(DIALECT_CHAT, "{\"prompt\":\"x\"}", -ENOKEY, "prompt");
    refuses(DIALECT_COMPLETIONS, "{\"messages\":[]}", -ENOKEY, "messages");
    refuses(DIALECT_COMPLETIONS, "{\"logprobs\":21}", -ERANGE, "logprobs");
    refuses(DIALECT_COMPLETIONS, "{\"max_tokens\":0}", -ERANGE, "max_tokens");
    refuses(DIALECT_COMPLETIONS, "{\"best_of\":2}", -ENOTSUP, "best_of");
    refuses(DIALECT_COMPLETIONS, "{\"suffix\":\"x\"}", -ENOTSUP, "suffix");
}

static void bodies_that_are_not_json(void)
{
    static const struct { const char *text; size_t len; int code; } rows[] = {
        { "", 0, -EBADMSG }, { "{", 1, -EBADMSG }, { "[1", 2, -EBADMSG }, { "null", 4, -EBADMSG }, { "5", 1, -EPROTO },
        { "{} x", 4, -EBADMSG }, { "{'a':1}", 7, -EBADMSG }, { "{\"a\":nan}", 9, -EBADMSG }, { "{\"a\":1,}", 8, -EBADMSG },
        { "{\"a\":\"\xff\"}", 9, -EILSEQ }, { "{\"a\":\"\xed\xa0\x80\"}", 11, -EILSEQ }, { "{\"a\":\"\xc0\x80\"}", 10, -EILSEQ },
        { "{\"a\":1}\0x", 9, -EBADMSG },
#define ROW(text, code) { text, sizeof text - 1, code }
        ROW("{\"a\":\"\\ud83e\\udd8a \\u0000\"}", 0), ROW("{\"a\":\"\\ud83e\"}", -EBADMSG), ROW("{\"a\":\"\\ud83e\\u0041\"}", -EBADMSG),
        ROW("{\"a\":\"\\udd8a\"}", -EBADMSG), ROW("{\"a\":\"\\udd8a\\ud83e\"}", -EBADMSG), ROW("{\"a\":\"\\ud83e\\udd", -EBADMSG),
        ROW("{\"a\":\"x\\", -EBADMSG), ROW("{\"a\\u0000\" :1}", -EBADMSG), ROW("{\"a\":\"x\ny\"}", -EBADMSG), ROW("{\"a\":\"x\ty\"}", -EBADMSG),
        ROW("{\"a\":1.}", -EBADMSG), ROW("{\"a\":-01}", -EBADMSG), ROW("{\"a\":00}", -EBADMSG), ROW("{\"a\":1.e5}", -EBADMSG), ROW("{\"a\":1e}", -EBADMSG),
        ROW("{\"a\":[-0.0e-7,0,10,1E+2,-1]}", 0), ROW("{\"a\":[true,false,null]}", 0), ROW("{\"a\":-}", -EBADMSG), ROW("{\"a\":\"\\\"'\"}", 0),
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct arle_err err = ARLE_ERR_INIT;
        struct json_object *body = NULL;
        int r = json_text_parse_object(rows[i].text, rows[i].len, "the body", &body, &err);
        if (r != rows[i].code)
            TAP_FAIL("row %zu: %d (%s), expected %d", i, r, err.msg, rows[i].code);
        json_object_put(body);
    }
    char deep[300];
    struct json_object *body = NULL;
    struct arle_err err = ARLE_ERR_INIT;
    memset(deep, '[', sizeof deep);
    EXPECT_EQ(json_text_parse(deep, sizeof deep, &body, &err), -EBADMSG);
    EXPECT(strstr(err.msg, "nested") != NULL);
}

static void prompts_in_four_forms(void)
{
    static const struct { const char *body; int want; uint32_t n; } rows[] = {
        { "{\"prompt\":\"a\"}", 0, 1 }, { "{\"prompt\":[\"a\",\"b\"]}", 0, 2 }, { "{\"prompt\":[1,2,3]}", 0, 1 },
        { "{\"prompt\":[[1],[2,3]]}", 0, 2 }, { "{\"prompt\":[]}", -EINVAL, 0 }, { "{\"prompt\":\"\"}", -EINVAL, 0 },
        { "{\"prompt\":[[]]}", -EINVAL, 0 }, { "{\"prompt\":[1,\"a\"]}", -EPROTO, 0 }, { "{\"prompt\":[\"a\",1]}", -EPROTO, 0 },
        { "{\"prompt\":[1,-1]}", -ERANGE, 0 }, { "{\"prompt\":[4096]}", -ERANGE, 0 }, { "{\"prompt\":5}", -EPROTO, 0 },
        { "{}", -ENODATA, 0 }, { "{\"prompt\":{}}", -EPROTO, 0 },
    };
    static struct raw_prompt out[MAX_PROMPTS];
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct arle_err err = ARLE_ERR_INIT;
        struct json_object *body = json_tokener_parse(rows[i].body);
        uint32_t n = 0;
        int r = completion_prompts(body, 4096, out, &n, &err);
        if (r != rows[i].want || (r == 0 && n != rows[i].n) || (r < 0 && strcmp(err.param, "prompt") != 0))
            TAP_FAIL("%s: %d, %u prompts, param %s", rows[i].body, r, n, err.param);
        json_object_put(body);
    }
}

static void conversation(const char *body_text, int want, const char *expect)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *body = json_tokener_parse(body_text), *out = NULL;
    int r = chat_request_from_body(body, NULL, true, &out, &err);
    const char *got = r < 0 ? err.param : json_object_to_json_string_ext(out, JSON_C_TO_STRING_PLAIN);
    if (r != want || strcmp(got, expect) != 0)
        TAP_FAIL("%s\n#   gives %d %s (%s)\n#   expected %d %s", body_text, r, got, err.msg, want, expect);
    json_object_put(out);
    json_object_put(body);
}

#define TAIL ",\"options\":{},\"add_generation_prompt\":true,\"continue_final\":false}"

static void conversations_become_canonical(void)
{
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}", 0,
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]" TAIL);
    conversation("{\"messages\":[{\"role\":\"developer\",\"content\":\"a\"},{\"role\":\"system\",\"content\":\"b\"},"
                 "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"x\"},{\"type\":\"text\",\"text\":\"y\"}]}]}", 0,
                 "{\"messages\":[{\"role\":\"system\",\"content\":\"a\\n\\nb\"},{\"role\":\"user\",\"content\":\"xy\"}]" TAIL);
    conversation("{\"messages\":[{\"role\":\"assistant\",\"content\":null,\"reasoning\":\"r\",\"tool_calls\":[{\"id\":\"c1\","
                 "\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"b\\\":1,\\\"a\\\":[2]}\"}}]},"
                 "{\"role\":\"tool\",\"tool_call_id\":\"c1\",\"content\":\"ok\"}]}", 0,
                 "{\"messages\":[{\"role\":\"assistant\",\"content\":\"\",\"reasoning_content\":\"r\",\"tool_calls\":[{\"id\":\"c1\","
                 "\"name\":\"f\",\"arguments\":{\"b\":1,\"a\":[2]}}]},{\"role\":\"tool\",\"content\":\"ok\",\"tool_call_id\":\"c1\"}]"
                 TAIL);
    /* What only the host may say is dropped; a name that a model made up is taken back. */
    conversation("{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\",\"raw_content\":\"b\",\"raw\":{},\"tool_calls\":[{\"id\":\"c1\","
                 "\"raw\":{\"text\":[\"<|im_end|>\"]},\"function\":{\"name\":\"do it\",\"raw\":{\"text\":[]},\"arguments\":{}}}]}]}", 0,
                 "{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[{\"id\":\"c1\",\"name\":\"do it\",\"arguments\":{}}]}]"
                 TAIL);
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"reasoning_effort\":\"none\","
                 "\"chat_template_kwargs\":{\"k\":1}}", 0,
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"options\":{\"reasoning_effort\":\"none\","
                 "\"enable_thinking\":false,\"k\":1},\"add_generation_prompt\":true,\"continue_final\":false}");
}

static void bad_conversations_are_refused(void)
{
    conversation("{}", -ENODATA, "messages");
    conversation("{\"messages\":[]}", -EINVAL, "messages");
    conversation("{\"messages\":{}}", -EPROTO, "messages");
    conversation("{\"messages\":[3]}", -EPROTO, "messages[0]");
    conversation("{\"messages\":[{}]}", -ENODATA, "messages[0].role");
    conversation("{\"messages\":[{\"role\":\"bard\",\"content\":\"\"}]}", -EINVAL, "messages[0].role");
    conversation("{\"messages\":[{\"role\":\"user\"}]}", -ENODATA, "messages[0].content");
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":null}]}", -ENODATA, "messages[0].content");
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":5}]}", -EPROTO, "messages[0].content");
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", -ENOTSUP,
                 "messages[0].content[0].type");
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]}", -ENODATA, "messages[0].content[0].text");
    conversation("{\"messages\":[{\"role\":\"tool\",\"content\":\"x\"}]}", -ENODATA, "messages[0].tool_call_id");
    conversation("{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":\"{\"}}]}]}",
                 -EINVAL, "messages[0].tool_calls[0].function.arguments");
    conversation("{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"a>b\"}}]}]}", -EINVAL,
                 "messages[0].tool_calls[0].function.name");
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"tools\":[{\"type\":\"function\"}]}", -ENODATA,
                 "tools[0].function");
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"tools\":[{\"type\":\"search\"}]}", -ENOTSUP,
                 "tools[0].type");
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"tools\":[{\"function\":{\"name\":\"f\"}},"
                 "{\"function\":{\"name\":\"f\"}}]}", -EINVAL, "tools");
    conversation("{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"reasoning_effort\":\"huge\"}", -EINVAL,
                 "reasoning_effort");
}

int main(void)
{
    RUN(values_arrive);
    RUN(defaults_come_from_the_model);
    RUN(refusals_name_the_field);
    RUN(bodies_that_are_not_json);
    RUN(prompts_in_four_forms);
    RUN(conversations_become_canonical);
    RUN(bad_conversations_are_refused);
    return tap_done();
}
