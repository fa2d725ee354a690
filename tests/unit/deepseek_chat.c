/* The published encoding vectors of DeepSeek-V4, byte for byte, and the edges they do not reach. */
#include "plugin_util.h"
#include "tap.h"

#include <arle/model.h>
#include <json-c/json.h>
#include <stdbool.h>

static const struct arle_model_api *api;

struct sink_text { char *text; size_t len, cap; uint32_t marks[8]; size_t stable_at; };

static int on_text(void *ctx, const char *s, size_t n, uint32_t flags)
{
    struct sink_text *t = ctx;
    if (t->len + n + 1 > t->cap) {
        t->cap = 2 * (t->len + n + 1);
        t->text = realloc(t->text, t->cap);
    }
    memcpy(t->text + t->len, s, n);
    t->len += n;
    t->text[t->len] = '\0';
    return 0;
}

static int on_mark(void *ctx, uint32_t mark)
{
    struct sink_text *t = ctx;
    t->marks[mark % 8]++;
    if (mark == ARLE_MARK_STABLE)
        t->stable_at = t->len;
    return 0;
}

static char *render(const char *request, struct arle_chat_result *out, int *r, struct sink_text *keep)
{
    struct sink_text t = { 0 };
    const struct arle_chat_sink sink = { &t, on_text, on_mark };
    struct arle_err err = ARLE_ERR_INIT;
    on_text(&t, "", 0, 0);
    *r = api->chat_render(NULL, request, strlen(request), &sink, out, &err);
    if (keep)
        *keep = t;
    return t.text;
}

static void vector(int i, bool thinking)
{
    char path[256];
    snprintf(path, sizeof path, "%s/tests/golden/deepseek-encoding/test_input_%d.json", getenv("top_srcdir"), i);
    struct json_object *in = json_object_from_file(path), *rq = json_object_new_object(), *opt = json_object_new_object();
    REQUIRE(in != NULL);
    if (json_object_is_type(in, json_type_array)) {
        json_object_object_add(rq, "messages", json_object_get(in));
    } else {
        json_object_object_foreach(in, key, v)
            json_object_object_add(rq, key, json_object_get(v));
    }
    json_object_object_add(opt, "enable_thinking", json_object_new_boolean(thinking));
    json_object_object_add(rq, "options", opt);
    snprintf(path, sizeof path, "%s/tests/golden/deepseek-encoding/test_output_%d.txt", getenv("top_srcdir"), i);
    size_t want_len;
    char *want = read_file(path, &want_len);
    struct arle_chat_result res = { .struct_size = sizeof res };
    int r;
    char *got = render(json_object_to_json_string(rq), &res, &r, NULL);
    EXPECT_EQ(r, 0);
    REQUIRE(want != NULL);
    EXPECT_STR(got, want);
    free(got);
    free(want);
    json_object_put(rq);
    json_object_put(in);
}

static void tools_and_thinking(void) { vector(1, true); }
static void dropped_reasoning(void) { vector(2, true); }
static void developer_and_reminder(void) { vector(3, true); }
static void action_task(void) { vector(4, false); }

static void generation_prompt_opens_reasoning(void)
{
    struct arle_chat_result res = { .struct_size = sizeof res };
    struct sink_text t;
    int r;
    char *s = render("{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}", &res, &r, &t);
    EXPECT_EQ(r, 0);
    EXPECT_STR(s, "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>");
    EXPECT_EQ(res.starts_in_reasoning, 1);
    EXPECT_EQ(t.stable_at, strlen("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>"));
    free(s);
    s = render("{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"options\":{\"reasoning_effort\":\"none\"}}", &res, &r, NULL);
    EXPECT_STR(s, "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>");
    EXPECT_EQ(res.starts_in_reasoning, 0);
    free(s);
}

static void effort_prefix_only_for_max(void)
{
    struct arle_chat_result res = { .struct_size = sizeof res };
    int r;
    char *s = render("{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"options\":{\"reasoning_effort\":\"max\"}}", &res, &r, NULL);
    EXPECT(strstr(s, "Reasoning Effort: Absolute maximum") == s + strlen("<｜begin▁of▁sentence｜>"));
    free(s);
    s = render("{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"options\":{\"reasoning_effort\":\"high\"}}", &res, &r, NULL);
    EXPECT(strstr(s, "Reasoning Effort") == NULL);
    free(s);
}

static void results_follow_the_order_of_calls(void)
{
    struct arle_chat_result res = { .struct_size = sizeof res };
    int r;
    char *s = render("{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"content\":\"\",\"tool_calls\":["
                     "{\"id\":\"a\",\"name\":\"f\",\"arguments\":{\"x\":1}},{\"id\":\"b\",\"name\":\"g\",\"arguments\":{}}]},"
                     "{\"role\":\"tool\",\"tool_call_id\":\"b\",\"content\":\"B\"},{\"role\":\"tool\",\"tool_call_id\":\"a\",\"content\":\"A\"},"
                     "{\"role\":\"user\",\"content\":\"more\"}]}", &res, &r, NULL);
    EXPECT_EQ(r, 0);
    EXPECT(strstr(s, "<｜User｜><tool_result>A</tool_result>\n\n<tool_result>B</tool_result>\n\nmore<｜Assistant｜>") != NULL);
    EXPECT(strstr(s, "<｜DSML｜parameter name=\"x\" string=\"false\">1</｜DSML｜parameter>\n") != NULL);
    EXPECT(strstr(s, "<｜DSML｜invoke name=\"g\">\n\n</｜DSML｜invoke>\n") != NULL);
    free(s);
}

#define RAW(lead, text) "{\"id\":\"1\",\"name\":\"f\",\"arguments\":{\"k\":1},\"raw\":{" lead "\"text\":" text "}}"

static void sampled(const char *message, const char *want)
{
    char rq[1024];
    struct arle_chat_result res = { .struct_size = sizeof res };
    int r;
    snprintf(rq, sizeof rq, "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"},{\"role\":\"assistant\",%s}],\"options\":"
             "{\"enable_thinking\":false}}", message);
    char *s = render(rq, &res, &r, NULL);
    EXPECT_EQ(r, 0);
    const char *at = strstr(s, "</think>");
    EXPECT_STR(at != NULL ? at + strlen("</think>") : s, want);
    free(s);
}

static void calls_as_they_were_sampled(void)
{
    sampled("\"content\":\"t\",\"tool_calls\":[" RAW("\"lead\":\"\\n\",", "[\"x\",\"<y>\"]") "," RAW("\"lead\":\"\",", "[]") "]",
            "t\nx<y><｜end▁of▁sentence｜>");
    sampled("\"content\":\"\",\"tool_calls\":[" RAW("", "[\"x\"]") "]", "\n\nx<｜end▁of▁sentence｜>");
    sampled("\"content\":\"be fore\",\"raw_content\":\"be\",\"tool_calls\":[" RAW("", "[\"x fore\"]") "]",
            "be\n\nx fore<｜end▁of▁sentence｜>");
    /* One call that is not as sampled: all are written anew, into one section. */
    sampled("\"content\":\"be fore\",\"raw_content\":\"be\",\"tool_calls\":[" RAW("", "[\"x\"]") ",{\"name\":\"g\",\"arguments\":{}}]",
            "be fore\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"k\" string=\"false\">1</｜DSML｜parameter>\n"
            "</｜DSML｜invoke>\n<｜DSML｜invoke name=\"g\">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>");
}

static void bad_input_names_the_field(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct sink_text t = { 0 };
    const struct arle_chat_sink sink = { &t, on_text, on_mark };
    struct arle_chat_result res = { .struct_size = sizeof res };
    const char *bad = "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"alien\",\"content\":\"x\"}]}";
    EXPECT_EQ(api->chat_render(NULL, bad, strlen(bad), &sink, &res, &err), -EINVAL);
    EXPECT_STR(err.param, "messages[1].role");
    EXPECT_EQ(api->chat_render(NULL, "{}", 2, &sink, &res, &err), -EINVAL);
    EXPECT_STR(err.param, "messages");
    EXPECT_EQ(api->chat_render(NULL, "nonsense", 8, &sink, &res, &err), -EINVAL);
    free(t.text);
}

static void configs_are_recognised(void)
{
    static const struct { const char *file; int want; } files[] = {
        { "tests/golden/deepseek-configs/flash.json", 1 }, { "tests/golden/deepseek-configs/pro.json", 1 },
        { "models/deepseek-v4-tiny/config.json", 1 }, { "models/qwen35-tiny/config.json", 0 } };
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        char path[256];
        size_t n;
        struct arle_err err = ARLE_ERR_INIT;
        snprintf(path, sizeof path, "%s/%s", getenv("top_srcdir"), files[i].file);
        char *json = read_file(path, &n);
        REQUIRE(json != NULL);
        EXPECT_EQ(api->recognise(NULL, json, n, &err), files[i].want);
        if (err.msg[0])
            printf("# %s\n", err.msg);
        free(json);
    }
}

static void uncovered_configs_are_refused_by_name(void)
{
    size_t n;
    char path[256];
    snprintf(path, sizeof path, "%s/tests/golden/deepseek-configs/flash.json", getenv("top_srcdir"));
    char *json = read_file(path, &n);
    REQUIRE(json != NULL);
    static const struct { const char *key, *value; } bad[] = {
        { "dspark_block_size", "5" }, { "hidden_size", "\"x\"" }, { "attention_bias", "true" }, { "num_experts_per_tok", "999" },
        { "compress_ratios", "[0,0,4]" }, { "scoring_func", "\"softmax\"" }, { "tie_word_embeddings", "true" } };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct json_object *o = json_tokener_parse(json);
        struct arle_err err = ARLE_ERR_INIT;
        json_object_object_add(o, bad[i].key, json_tokener_parse(bad[i].value));
        const char *s = json_object_to_json_string(o);
        EXPECT_EQ(api->recognise(NULL, s, strlen(s), &err), -EINVAL);
        EXPECT_STR(err.param, bad[i].key);
        json_object_put(o);
    }
    free(json);
}

int main(void)
{
    api = plugin_api("model-deepseek-v4", ARLE_KIND_MODEL);
    if (api == NULL) {
        printf("1..0 # SKIP model-deepseek-v4 was not built\n");
        return 0;
    }
    RUN(tools_and_thinking);
    RUN(dropped_reasoning);
    RUN(developer_and_reminder);
    RUN(action_task);
    RUN(generation_prompt_opens_reasoning);
    RUN(effort_prefix_only_for_max);
    RUN(results_follow_the_order_of_calls);
    RUN(calls_as_they_were_sampled);
    RUN(bad_input_names_the_field);
    RUN(configs_are_recognised);
    RUN(uncovered_configs_are_refused_by_name);
    return tap_done();
}
