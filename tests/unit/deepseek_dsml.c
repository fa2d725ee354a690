/*
 * DSML on the one automaton, with the syntax table of the plugin: the published outputs parse back into what renders them, the
 * same events for every way to cut them, and what malformed calls become.
 */
#include "plugin_util.h"
#include "tap.h"

#include <arle/model.h>
#include <json-c/json.h>
#include <stdbool.h>

#include "chat/automaton.h"
#include "util/sbuf.h"

#define D "｜DSML｜"
#define EOS "<｜end▁of▁sentence｜>"
#define OPEN "<" D "tool_calls>\n"
#define CLOSE "</" D "tool_calls>"
#define INVOKE(body) "<" D "invoke name=\"f\">\n" body "</" D "invoke>\n"
#define PARAM(k, t, v) "<" D "parameter name=\"" k "\" string=\"" t "\">" v "</" D "parameter>\n"

static const struct arle_model_api *api;

struct call { struct sbuf name, args; };

struct parsed {
    struct sbuf trace, reasoning, content;      /* trace: every event as text, neighbours joined */
    struct call call[8];
    uint32_t n_calls;
    int kind;
    bool truncated;
};

static void on_event(void *arg, const struct chat_event *ev)
{
    struct parsed *p = arg;
    if ((int)ev->kind != p->kind || ev->kind == CHAT_CALL_START || ev->kind == CHAT_CALL_END)
        sbuf_str(&p->trace, (const char *[]){ "", "|R:", "|C:", "|call ", "|", "|end" }[ev->kind]);
    p->kind = ev->kind;
    sbuf_add(&p->trace, ev->text, ev->len);
    if (ev->kind == CHAT_REASONING)
        sbuf_add(&p->reasoning, ev->text, ev->len);
    if (ev->kind == CHAT_CONTENT)
        sbuf_add(&p->content, ev->text, ev->len);
    if (ev->call >= 8)
        return;
    if (ev->kind == CHAT_CALL_START) {
        sbuf_add(&p->call[ev->call].name, ev->text, ev->len);
        p->n_calls = ev->call + 1;
    }
    if (ev->kind == CHAT_CALL_ARGS)
        sbuf_add(&p->call[ev->call].args, ev->text, ev->len);
}

static void parsed_fini(struct parsed *p)
{
    sbuf_fini(&p->trace);
    sbuf_fini(&p->reasoning);
    sbuf_fini(&p->content);
    for (int i = 0; i < 8; i++) {
        sbuf_fini(&p->call[i].name);
        sbuf_fini(&p->call[i].args);
    }
}

/* Cut at `a` and `b` (beyond the end: not at all); step 1 feeds single bytes instead. */
static void parse(struct parsed *p, const char *text, size_t n, bool reasoning, size_t a, size_t b, bool bytes)
{
    memset(p, 0, sizeof *p);
    struct automaton_opts o = { .syntax = api->chat_syntax(NULL), .starts_in_reasoning = reasoning, .parse_calls = true,
                                .fn = on_event, .arg = p };
    struct automaton *m = automaton_create(&o);
    for (size_t at = 0; at < n;) {
        size_t to = bytes ? at + 1 : at < a && a < n ? a : at < b && b < n ? b : n;
        EXPECT_EQ(automaton_push(m, text + at, to - at), 0);
        at = to;
    }
    EXPECT_EQ(automaton_finish(m), 0);
    p->truncated = automaton_truncated(m);
    if (p->truncated)
        sbuf_str(&p->trace, "~");
    automaton_destroy(m);
}

/* The events of text whole, which must be those of every other way to cut it. */
static void check_cuts(const char *text, size_t n, bool reasoning, const char *want)
{
    struct parsed whole, cut;
    parse(&whole, text, n, reasoning, n, n, false);
    if (want != NULL)
        EXPECT_STR(sbuf_text(&whole.trace), want);
    parse(&cut, text, n, reasoning, n, n, true);
    EXPECT_STR(sbuf_text(&cut.trace), sbuf_text(&whole.trace));
    parsed_fini(&cut);
    for (size_t i = 1; i < n && !tap_case_failed; i++) {
        parse(&cut, text, n, reasoning, i, i + 5, false);
        EXPECT_STR(sbuf_text(&cut.trace), sbuf_text(&whole.trace));
        parsed_fini(&cut);
    }
    parsed_fini(&whole);
}

static void events(const char *text, bool reasoning, const char *want)
{
    check_cuts(text, strlen(text), reasoning, want);
}

static int on_text(void *ctx, const char *s, size_t n, uint32_t flags)
{
    sbuf_add(ctx, s, n);
    return 0;
}

/* What was parsed as the last message of a conversation; *out is the prompt and the answer as the model wrote it. */
static void render_back(const struct parsed *p, bool thinking, struct sbuf *out)
{
    struct sbuf rq = SBUF_INIT;
    sbuf_fmt(&rq, "{\"options\":{\"enable_thinking\":%s,\"drop_thinking\":false},\"add_generation_prompt\":false,\"messages\":["
             "{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"reasoning_content\":", thinking ? "true" : "false");
    sbuf_json_str(&rq, sbuf_text(&p->reasoning), p->reasoning.n);
    sbuf_str(&rq, ",\"content\":");
    sbuf_json_str(&rq, sbuf_text(&p->content), p->content.n);
    sbuf_str(&rq, ",\"tool_calls\":[");
    for (uint32_t i = 0; i < p->n_calls; i++) {
        sbuf_fmt(&rq, "%s{\"id\":\"c%u\",\"type\":\"function\",\"function\":{\"name\":", i ? "," : "", i);
        sbuf_json_str(&rq, sbuf_text(&p->call[i].name), p->call[i].name.n);
        sbuf_fmt(&rq, ",\"arguments\":%s}}", sbuf_text(&p->call[i].args));
    }
    sbuf_str(&rq, "]}]}");
    const struct arle_chat_sink sink = { out, on_text, NULL };
    struct arle_chat_result res = { .struct_size = sizeof res };
    struct arle_err err = ARLE_ERR_INIT;
    EXPECT_EQ(api->chat_render(NULL, sbuf_text(&rq), rq.n, &sink, &res, &err), 0);
    if (err.code < 0)
        printf("# %s\n", err.msg);
    sbuf_fini(&rq);
}

static void round_trip(const char *answer, size_t n, bool thinking)
{
    struct parsed p;
    struct sbuf got = SBUF_INIT, want = SBUF_INIT;
    parse(&p, answer, n, thinking, n, n, false);
    EXPECT(!p.truncated);
    render_back(&p, thinking, &got);
    sbuf_str(&want, "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>");
    sbuf_str(&want, thinking ? "<think>" : "</think>");
    sbuf_add(&want, answer, n);
    sbuf_str(&want, EOS);
    EXPECT_STR(sbuf_text(&got), sbuf_text(&want));
    sbuf_fini(&got);
    sbuf_fini(&want);
    parsed_fini(&p);
}

/* Every answer of the published conversations. */
static void published_outputs_parse_back(void)
{
    static const char think[] = "<｜Assistant｜><think>", plain[] = "<｜Assistant｜></think>";
    uint32_t answers = 0, with_calls = 0;
    for (int i = 1; i <= 4; i++) {
        char path[256];
        size_t len;
        snprintf(path, sizeof path, "%s/tests/golden/deepseek-encoding/test_output_%d.txt", getenv("top_srcdir"), i);
        char *text = read_file(path, &len);
        REQUIRE(text != NULL);
        for (char *at = text; (at = strstr(at, "<｜Assistant｜>")) != NULL;) {
            bool thinking = strncmp(at, think, strlen(think)) == 0, direct = strncmp(at, plain, strlen(plain)) == 0;
            at += strlen(thinking ? think : direct ? plain : "<｜Assistant｜>");
            char *end = strstr(at, EOS);
            if (end == NULL || (!thinking && !direct))
                continue;
            round_trip(at, (size_t)(end - at), thinking);
            check_cuts(at, (size_t)(end - at), thinking, NULL);
            answers++;
            with_calls += memmem(at, (size_t)(end - at), "tool_calls>", 11) != NULL;
        }
        free(text);
    }
    printf("# %u answers, %u of them with calls\n", answers, with_calls);
    EXPECT(answers >= 6 && with_calls >= 2);
}

static void values_by_their_type(void)
{
    events("I look.\n\n" OPEN INVOKE(PARAM("a", "true", "7") PARAM("b", "false", "7") PARAM("c", "false", "{\"x\": [1, null]}")) CLOSE, false,
           "|C:I look.|call f|{\"a\": \"7\", \"b\": 7, \"c\": {\"x\": [1, null]}}|end");
    events("t</think>\n\n" OPEN INVOKE(PARAM("a", "true", "\n<b> & \"q\"\n")) CLOSE, true,
           "|R:t|call f|{\"a\": \"\\n<b> & \\\"q\\\"\\n\"}|end");
    round_trip("t</think>x\n\n" OPEN INVOKE(PARAM("a", "true", "\n<b>\n") PARAM("b", "false", "[1, {\"k\": \"v\"}, true]")) CLOSE,
               strlen("t</think>x\n\n" OPEN INVOKE(PARAM("a", "true", "\n<b>\n") PARAM("b", "false", "[1, {\"k\": \"v\"}, true]")) CLOSE), true);
}

static void what_is_not_json_stays_text(void)
{
    events("\n\n" OPEN INVOKE(PARAM("a", "false", "{oops") PARAM("b", "false", "")) CLOSE, false, "|call f|{\"a\": \"{oops\", \"b\": \"\"}|end");
    events("\n\n" OPEN INVOKE(PARAM("a", "maybe", "12")) CLOSE, false, "|call f|{\"a\": 12}|end");
}

static void a_call_may_have_no_parameters(void)
{
    events("\n\n" OPEN INVOKE("\n") INVOKE("") CLOSE, false, "|call f|{}|end|call f|{}|end");
    round_trip("r</think>\n\n" OPEN INVOKE("\n") CLOSE, strlen("r</think>\n\n" OPEN INVOKE("\n") CLOSE), true);
}

static void dsml_in_reasoning_is_text(void)
{
    events("I could write\n\n" OPEN INVOKE(PARAM("a", "true", "x")) CLOSE " here</think>Done.", true,
           "|R:I could write\n\n" OPEN INVOKE(PARAM("a", "true", "x")) CLOSE " here|C:Done.");
}

static void missing_closers_are_supplied(void)
{
    events("\n\n" OPEN "<" D "invoke name=\"f\">\n<" D "parameter name=\"a\" string=\"true\">half", false, "|call f|{\"a\": \"half\"}|end~");
    events("\n\n" OPEN "<" D "invoke name=\"f\">\n" PARAM("a", "false", "1"), false, "|call f|{\"a\": 1}|end~");
    events("\n\n" OPEN INVOKE(PARAM("a", "true", "x")), false, "|call f|{\"a\": \"x\"}|end");
    events("\n\n" OPEN "<" D "invoke name=\"f\">\n" PARAM("a", "true", "x") CLOSE, false, "|call f|{\"a\": \"x\"}|end");
    events("Say.\n\n<" D "tool_ca", false, "|C:Say.\n\n<" D "tool_ca");
}

int main(void)
{
    api = plugin_api("model-deepseek-v4", ARLE_KIND_MODEL);
    if (api == NULL) {
        printf("1..0 # SKIP model-deepseek-v4 was not built\n");
        return 0;
    }
    RUN(published_outputs_parse_back);
    RUN(values_by_their_type);
    RUN(what_is_not_json_stays_text);
    RUN(a_call_may_have_no_parameters);
    RUN(dsml_in_reasoning_is_text);
    RUN(missing_closers_are_supplied);
    return tap_done();
}
