/*
 * Histories with tool calls: what a model sampled goes through the answer's chain, comes back as a client's JSON, and must
 * render to the same tokens, in both dialects of calls. Then the memory itself: bounds, order of use, tenants, threads.
 */
#include "plugin_util.h"
#include "tap.h"

#include <json-c/json.h>
#include <pthread.h>

#include "chat/answer.h"
#include "chat/render.h"

static struct served_model qwen, deepseek;

static const char *turn_end(const struct served_model *m)
{
    return m == &qwen ? "<|im_end|>" : "<\xef\xbd\x9c" "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>";
}

static void no_event(void *arg, const struct chat_event *ev) { }

/* What a client would have got. */
struct client { struct given_call calls[8]; uint32_t n; struct sbuf content, reasoning; };

static void on_event(void *arg, const struct chat_event *ev)
{
    struct client *c = arg;
    if (ev->kind == CHAT_CONTENT)
        sbuf_add(&c->content, ev->text, ev->len);
    if (ev->kind == CHAT_REASONING)
        sbuf_add(&c->reasoning, ev->text, ev->len);
    if (ev->kind == CHAT_CALL_START && c->n < 8) {
        snprintf(c->calls[c->n].id, sizeof c->calls[0].id, "call_%u", c->n);
        sbuf_add(&c->calls[c->n++].name, ev->text, ev->len);
    }
    if (ev->kind == CHAT_CALL_ARGS && ev->call < 8)
        sbuf_add(&c->calls[ev->call].args, ev->text, ev->len);
}

static void client_fini(struct client *c)
{
    for (uint32_t i = 0; i < c->n; i++) {
        sbuf_fini(&c->calls[i].name);
        sbuf_fini(&c->calls[i].args);
    }
    sbuf_fini(&c->content);
    sbuf_fini(&c->reasoning);
}

/* Samples ids as an answer and keeps its calls, as the server does. */
static void sample(struct served_model *m, const struct tok_ids *ids, bool reasoning, struct client *c)
{
    struct answer a;
    struct answer_opts o = { .model = m, .chat = true, .parse_calls = true, .keep_calls = true, .starts_in_reasoning = reasoning,
                             .fn = on_event, .arg = c };
    struct call_section s = { .has_lead = false };
    uint32_t next = 0, first, n;
    EXPECT_EQ(answer_init(&a, &o), 0);
    for (size_t i = 0; i < ids->n; i++)
        EXPECT_EQ(answer_push(&a, ids->ids[i]), 0);
    EXPECT_EQ(answer_end(&a), 0);
    while (first = next, (n = answer_section(&a, &next, &s)) > 0) {
        if (s.text.n > 0)
            call_memory_keep(m->calls, "", &s, &c->calls[first], n);
        call_section_fini(&s);
    }
    answer_fini(&a);
}

static struct json_object *message_of(const struct client *c)
{
    struct json_object *msg = json_object_new_object(), *list = json_object_new_array();
    json_object_object_add(msg, "role", json_object_new_string("assistant"));
    json_object_object_add(msg, "content", json_object_new_string_len(sbuf_text(&c->content), (int)c->content.n));
    if (c->reasoning.n > 0)
        json_object_object_add(msg, "reasoning_content", json_object_new_string(c->reasoning.p));
    for (uint32_t i = 0; i < c->n; i++) {
        struct json_object *call = json_object_new_object();
        json_object_object_add(call, "id", json_object_new_string(c->calls[i].id));
        json_object_object_add(call, "name", json_object_new_string(sbuf_text(&c->calls[i].name)));
        json_object_object_add(call, "arguments", json_tokener_parse(sbuf_text(&c->calls[i].args)));
        json_object_array_add(list, call);
    }
    json_object_object_add(msg, "tool_calls", list);
    return msg;
}

/* user: hi, [the message] -> prompt. Takes msg. */
static void render(const struct served_model *m, const char *tenant, struct json_object *msg, bool thinking, struct prompt *p)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *rq = json_object_new_object(), *messages = json_object_new_array(), *options = json_object_new_object();
    json_object_array_add(messages, json_tokener_parse("{\"role\":\"user\",\"content\":\"hi\"}"));
    if (msg != NULL)
        json_object_array_add(messages, msg);
    json_object_object_add(rq, "messages", messages);
    json_object_object_add(options, "enable_thinking", json_object_new_boolean(thinking));
    json_object_object_add(rq, "options", options);
    json_object_object_add(rq, "add_generation_prompt", json_object_new_boolean(msg == NULL));
    if (prompt_render(p, m, tenant, rq, &err) < 0)
        TAP_FAIL("render: %s", err.msg);
    json_object_put(rq);
}

static void fresh(struct served_model *m)
{
    call_memory_destroy(m->calls);
    m->calls = call_memory_create(1000, 1 << 20);
}

static void ids_of(const struct served_model *m, const char *text, unsigned flags, struct tok_ids *out)
{
    struct arle_err err = ARLE_ERR_INIT;
    if (tokenizer_encode(m->tok, text, strlen(text), flags, out, &err) < 0)
        TAP_FAIL("%s", err.msg);
}

/* The prompt and the answer, token by token, and then the end of the turn: is that how the history begins? */
static void same_tokens(const struct served_model *m, const struct prompt *before, const struct tok_ids *said, const struct prompt *after)
{
    size_t n = before->ids.n, k = 0;
    if (after->ids.n >= n + said->n && memcmp(after->ids.ids, before->ids.ids, n * sizeof *said->ids) == 0)
        while (k < said->n && after->ids.ids[n + k] == said->ids[k])
            k++;
    if (k < said->n)
        TAP_FAIL("token %zu of %zu differs; the history is %s", k, said->n, sbuf_text(&after->text));
    char *text = NULL;
    size_t len = 0;
    EXPECT_EQ(tokenizer_decode(m->tok, said->ids, said->n, 0, &text, &len, NULL), 0);
    const char *rest = sbuf_text(&after->text) + before->text.n;
    EXPECT(strncmp(rest, text, len) == 0 && strncmp(rest + len, turn_end(m), strlen(turn_end(m))) == 0);
    free(text);
}

static void round_trip_ids(struct served_model *m, const struct tok_ids *said, bool thinking)
{
    struct client c = { .n = 0 };
    struct prompt before = { 0 }, after = { 0 };
    fresh(m);
    render(m, "", NULL, thinking, &before);
    sample(m, said, before.starts_in_reasoning, &c);
    EXPECT(c.n > 0);
    render(m, "", message_of(&c), thinking, &after);
    same_tokens(m, &before, said, &after);
    prompt_fini(&before);
    prompt_fini(&after);
    client_fini(&c);
}

static void round_trip(struct served_model *m, const char *text, bool thinking)
{
    struct tok_ids said = TOK_IDS_INIT;
    ids_of(m, text, TOK_ALLOW_SPECIAL, &said);
    round_trip_ids(m, &said, thinking);
    if (tap_case_failed)
        printf("# in: %s\n", text);
    tok_ids_fini(&said);
}

#define NEED(m) do { if ((m)->tok == NULL) SKIP("plugin or checkpoint is not here"); } while (0)

static void sampled_text_comes_back(void)
{
    NEED(&qwen);
    static const char *const said[] = {
        "<tool_call>\n<function=f>\n<parameter=k>\nv\n</parameter>\n</function>\n</tool_call>",
        "<tool_call><function=f><parameter=k>v</parameter></function></tool_call>",        /* no newlines at all */
        "Sure.\n<tool_call>\n<function=f>\n<parameter=k>\n 1.50 \n</parameter>\n</function>\n</tool_call>\n\n",
        "<tool_call>\n<function=f>\n<parameter=k>\n{\"b\":1,  \"a\":[ 2]}\n</parameter>\n<parameter=k>\nagain\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=k>\nno closer</function> </tool_call>",
        "a\n\n<tool_call>\n<function=f>\n</function>\n</tool_call>\n\n\n<tool_call>\n<function=g>\n<parameter=k>\nnull\n</parameter>\n</function>\n</tool_call>\n",
        "<tool_call>\n<function=f>\n</function>\n<function=g>\n</function>\n</tool_call> \n",   /* two in one section */
        "<function=f>\n<parameter=k>\nv\n</parameter>\n</function>",                        /* no section at all */
        "one\n<tool_call>\n<function=f>\n</function>\n</tool_call>\ntwo <b>\n<tool_call>\n<function=g>\n</function>\n</tool_call> three",
        "<tool_call>\n<function=f>\n<parameter=k>\n\xc3\xa9\xf0\x9f\xa6\x8a\n</parameter>\n</function>\n</tool_call>",
    };
    for (size_t i = 0; i < sizeof said / sizeof said[0]; i++)
        round_trip(&qwen, said[i], false);
    round_trip(&qwen, "why\n</think>\n\n<tool_call><function=f></function></tool_call>", true);
    round_trip(&qwen, "why\n</think>\n\nSo.\n\n\n<tool_call><function=f></function></tool_call>", true);
}

static void sampled_text_comes_back_typed(void)
{
    NEED(&deepseek);
#define D "\xef\xbd\x9c" "DSML" "\xef\xbd\x9c"
#define PARAM(k, s, v) "<" D "parameter name=\"" k "\" string=\"" s "\">" v "</" D "parameter>"
    static const char *const said[] = {
        "\n\n<" D "tool_calls>\n<" D "invoke name=\"f\">\n" PARAM("k", "true", "v") "\n</" D "invoke>\n</" D "tool_calls>",
        "Well.\n<" D "tool_calls><" D "invoke name=\"f\">" PARAM("k", "false", "[1,2.0, 3]") PARAM("j", "false", "{bad") "</" D "invoke></" D "tool_calls>\n",
        "\n\n<" D "tool_calls>\n<" D "invoke name=\"f\">\n</" D "invoke>\n\n<" D "invoke name=\"g\">" PARAM("k", "false", " 1e2") "</" D "invoke>\n</" D "tool_calls>",
        "\n\n<" D "tool_calls>\n<" D "invoke name=\"f\">\n</" D "invoke>\n</" D "tool_calls>\nafter it",
    };
    for (size_t i = 0; i < sizeof said / sizeof said[0]; i++)
        round_trip(&deepseek, said[i], false);
    round_trip(&deepseek, "why</think>\n\n<" D "tool_calls><" D "invoke name=\"f\"></" D "invoke></" D "tool_calls>", true);
    round_trip(&deepseek, "why</think>x\n<" D "tool_calls><" D "invoke name=\"f\"></" D "invoke></" D "tool_calls>", true);
}

static void append(struct tok_ids *to, const struct tok_ids *from)
{
    to->ids = realloc(to->ids, (to->n + from->n) * sizeof *to->ids);
    memcpy(to->ids + to->n, from->ids, from->n * sizeof *to->ids);
    to->n += from->n;
    to->cap = to->n;
}

/* Letters that spell a special token stay letters, the token itself stays one, shown or hidden. */
static void special_tokens_are_what_they_were(void)
{
    NEED(&qwen);
    struct tok_ids said = TOK_IDS_INIT, piece = TOK_IDS_INIT;
    int32_t end = tokenizer_added_id(qwen.tok, "<|im_start|>");
    REQUIRE(end >= 0);
    ids_of(&qwen, "<tool_call>\n<function=f>\n<parameter=k>\na", TOK_ALLOW_SPECIAL, &said);
    ids_of(&qwen, " <|im_end|> <tool_call> b", 0, &piece);
    append(&said, &piece);
    append(&said, &(struct tok_ids){ .ids = &end, .n = 1 });
    tok_ids_fini(&piece);
    ids_of(&qwen, " c\n</parameter>\n</function>\n</tool_call>", TOK_ALLOW_SPECIAL, &piece);
    append(&said, &piece);
    round_trip_ids(&qwen, &said, false);
    qwen.special_in_content = true;
    round_trip_ids(&qwen, &said, false);
    qwen.special_in_content = false;
    tok_ids_fini(&said);
    tok_ids_fini(&piece);
}

/* ---- what a client may change ---- */

static const char two_calls[] = "ok\n<tool_call><function=f><parameter=k>1.0</parameter><parameter=j>x</parameter></function></tool_call>"
                                " <tool_call><function=g></function></tool_call>";

static void render_changed(const char *path, const char *value, bool drop, char *out, size_t cap)
{
    struct client c = { .n = 0 };
    struct prompt p = { 0 };
    struct tok_ids said = TOK_IDS_INIT;
    fresh(&qwen);
    ids_of(&qwen, two_calls, TOK_ALLOW_SPECIAL, &said);
    sample(&qwen, &said, false, &c);
    struct json_object *msg = message_of(&c), *calls, *v = value != NULL ? json_tokener_parse(value) : NULL;
    json_object_object_get_ex(msg, "tool_calls", &calls);
    struct json_object *first = json_object_array_get_idx(calls, 0);
    if (strcmp(path, "content") == 0)
        json_object_object_add(msg, "content", v);
    else if (*path != '\0')
        json_object_object_add(first, path, v);
    if (drop)
        json_object_array_del_idx(calls, 0, 1);
    render(&qwen, strcmp(path, "tenant") == 0 ? "other" : "", msg, false, &p);
    const char *at = strstr(sbuf_text(&p.text), "</think>\n\n");
    snprintf(out, cap, "%s", at != NULL ? at + strlen("</think>\n\n") : "");
    prompt_fini(&p);
    tok_ids_fini(&said);
    client_fini(&c);
}

static void expect_changed(const char *path, const char *value, bool drop, const char *want)
{
    char got[1024];
    render_changed(path, value, drop, got, sizeof got);
    EXPECT_STR(got, want);
}

#define RAW_F "<tool_call><function=f><parameter=k>1.0</parameter><parameter=j>x</parameter></function></tool_call>"
#define RAW_G "<tool_call><function=g></function></tool_call>"
#define REG_F "<tool_call>\n<function=f>\n<parameter=k>\n1.0\n</parameter>\n<parameter=j>\nx\n</parameter>\n</function>\n</tool_call>"
#define REG_G "<tool_call>\n<function=g>\n</function>\n</tool_call>"
#define END "<|im_end|>\n"

static void edits_are_rendered(void)
{
    NEED(&qwen);
    expect_changed("", NULL, false, "ok\n" RAW_F " " RAW_G END);
    expect_changed("arguments", "{\"j\":\"x\",\"k\":\"1.0\"}", false, "ok\n" RAW_F " " RAW_G END);       /* order is no edit */
    expect_changed("arguments", "{\"k\":\"2\"}", false, "ok\n\n<tool_call>\n<function=f>\n<parameter=k>\n2\n</parameter>\n</function>\n"
                   "</tool_call>\n" RAW_G END);
    expect_changed("name", "\"h\"", false, "ok\n\n<tool_call>\n<function=h>\n<parameter=k>\n1.0\n</parameter>\n<parameter=j>\nx\n"
                   "</parameter>\n</function>\n</tool_call>\n" RAW_G END);
    expect_changed("id", "\"call_7\"", false, "ok\n\n" REG_F "\n" RAW_G END);
    expect_changed("tenant", NULL, false, "ok\n\n" REG_F "\n" REG_G END);
    expect_changed("content", "\"\"", false, RAW_F " " RAW_G END);
    expect_changed("content", "\"no\"", false, "no\n" RAW_F " " RAW_G END);
    expect_changed("", NULL, true, "ok\n\n" RAW_G END);
}

static void numbers_are_compared_by_value(void)
{
    NEED(&deepseek);
    struct client c = { .n = 0 };
    struct tok_ids said = TOK_IDS_INIT;
    static const char *const args[] = { "{\"k\":1}", "{\"k\":1.0}", "{\"k\":1e0}", "{\"k\":\"1\"}", "{\"k\":2}", "{\"k\":[1]}", "{}", "{\"k\":null}" };
    fresh(&deepseek);
    ids_of(&deepseek, "<" D "tool_calls><" D "invoke name=\"f\">" PARAM("k", "false", "1.00") "</" D "invoke></" D "tool_calls>",
           TOK_ALLOW_SPECIAL, &said);
    sample(&deepseek, &said, false, &c);
    for (size_t i = 0; i < sizeof args / sizeof args[0]; i++) {
        struct prompt p = { 0 };
        struct json_object *msg = message_of(&c), *calls;
        json_object_object_get_ex(msg, "tool_calls", &calls);
        json_object_object_add(json_object_array_get_idx(calls, 0), "arguments", json_tokener_parse(args[i]));
        render(&deepseek, "", msg, false, &p);
        EXPECT_EQ(strstr(sbuf_text(&p.text), ">1.00<") != NULL, i < 3);
        prompt_fini(&p);
    }
    tok_ids_fini(&said);
    client_fini(&c);
}

static void cut_off_calls_are_not_kept(void)
{
    NEED(&qwen);
    struct client c = { .n = 0 };
    struct call_memory_stats st;
    struct tok_ids said = TOK_IDS_INIT;
    fresh(&qwen);
    ids_of(&qwen, RAW_G "\n<tool_call>\n<function=f>\n<parameter=k>\nv", TOK_ALLOW_SPECIAL, &said);
    sample(&qwen, &said, false, &c);
    call_memory_stat(qwen.calls, &st);
    EXPECT_EQ(c.n, 2);
    EXPECT_EQ(st.calls, 1);
    tok_ids_fini(&said);
    client_fini(&c);
}

/* ---- the memory ---- */

static void keep_one(struct call_memory *mem, const char *tenant, const char *id, size_t bytes)
{
    struct call_section s = { .text_len = bytes };
    struct given_call g = { .name = SBUF_INIT };
    snprintf(g.id, sizeof g.id, "%s", id);
    sbuf_str(&g.name, "f");
    sbuf_str(&g.args, "{}");
    for (size_t i = 0; i < bytes; i++)
        sbuf_char(&s.text, 'x');
    call_memory_keep(mem, tenant, &s, &g, 1);
    sbuf_fini(&g.name);
    sbuf_fini(&g.args);
}

/* Does a message with that call get its text back? */
static bool known(struct call_memory *mem, const char *tenant, const char *id)
{
    struct json_object *rq = json_tokener_parse("{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{\"name\":\"f\",\"arguments\":{}}]}]}");
    struct json_object *messages, *calls, *call, *raw;
    json_object_object_get_ex(rq, "messages", &messages);
    json_object_object_get_ex(json_object_array_get_idx(messages, 0), "tool_calls", &calls);
    call = json_object_array_get_idx(calls, 0);
    json_object_object_add(call, "id", json_object_new_string(id));
    call_memory_recall(mem, tenant, rq);
    bool found = json_object_object_get_ex(call, "raw", &raw);
    json_object_put(rq);
    return found;
}

static void the_least_recently_used_goes_first(void)
{
    struct call_memory *mem = call_memory_create(3, 1 << 20);
    struct call_memory_stats st;
    keep_one(mem, "", "a", 10);
    keep_one(mem, "", "b", 10);
    keep_one(mem, "", "c", 10);
    EXPECT(known(mem, "", "a"));
    keep_one(mem, "", "d", 10);
    EXPECT(known(mem, "", "a") && !known(mem, "", "b") && known(mem, "", "c") && known(mem, "", "d"));
    call_memory_stat(mem, &st);
    EXPECT_EQ(st.calls, 3);
    EXPECT_EQ(st.recalled, 4);
    EXPECT_EQ(st.unknown, 1);
    call_memory_destroy(mem);
}

static void bytes_are_bounded(void)
{
    struct call_memory *mem = call_memory_create(1000, 100000);
    struct call_memory_stats st;
    char id[8];
    for (int i = 0; i < 100; i++) {
        snprintf(id, sizeof id, "%d", i);
        keep_one(mem, "", id, 9000);
        call_memory_stat(mem, &st);
        EXPECT(st.bytes <= 100000);
    }
    EXPECT(st.calls >= 3 && st.calls <= 11);
    EXPECT(known(mem, "", "99") && !known(mem, "", "0"));
    keep_one(mem, "", "huge", 200000);
    EXPECT(!known(mem, "", "huge") && known(mem, "", "99"));
    call_memory_destroy(mem);
    mem = NULL;
    call_memory_recall(mem, "", NULL);
    call_memory_stat(mem, &st);
    EXPECT_EQ(st.bytes, 0);
}

static void tenants_do_not_meet(void)
{
    struct call_memory *mem = call_memory_create(10, 1 << 20);
    keep_one(mem, "alice", "x", 10);
    EXPECT(known(mem, "alice", "x") && !known(mem, "", "x") && !known(mem, "bob", "x"));
    keep_one(mem, "bob", "x", 20);
    EXPECT(known(mem, "alice", "x") && known(mem, "bob", "x"));
    keep_one(mem, "bob", "x", 30);          /* an id that is taken: the first one stays */
    struct call_memory_stats st;
    call_memory_stat(mem, &st);
    EXPECT_EQ(st.calls, 2);
    call_memory_destroy(mem);
}

static void *worker(void *arg)
{
    struct call_memory *mem = arg;
    char id[24], tenant[8];
    unsigned seed = (unsigned)(uintptr_t)pthread_self();
    for (int i = 0; i < 3000; i++) {
        int n = rand_r(&seed) % 200;
        snprintf(id, sizeof id, "call_%d", n);
        snprintf(tenant, sizeof tenant, "%d", n % 3);
        if (rand_r(&seed) % 2)
            keep_one(mem, tenant, id, (size_t)(rand_r(&seed) % 500) + 1);
        else
            known(mem, tenant, id);
    }
    return NULL;
}

static void threads_share_it(void)
{
    struct call_memory *mem = call_memory_create(50, 60000);
    struct call_memory_stats st;
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        EXPECT_EQ(pthread_create(&t[i], NULL, worker, mem), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    call_memory_stat(mem, &st);
    EXPECT(st.calls <= 50 && st.bytes <= 60000 && st.recalled > 0 && st.unknown > 0);
    call_memory_destroy(mem);
}

static void nothing_is_kept_unasked(void)
{
    NEED(&qwen);
    struct answer a;
    struct answer_opts o = { .model = &qwen, .chat = true, .parse_calls = true, .fn = no_event };
    struct call_section s = { .has_lead = false };
    struct tok_ids said = TOK_IDS_INIT;
    uint32_t next = 0;
    ids_of(&qwen, RAW_G, TOK_ALLOW_SPECIAL, &said);
    EXPECT_EQ(answer_init(&a, &o), 0);
    for (size_t i = 0; i < said.n; i++)
        EXPECT_EQ(answer_push(&a, said.ids[i]), 0);
    EXPECT_EQ(answer_end(&a), 0);
    EXPECT_EQ(answer_section(&a, &next, &s), 0);
    EXPECT_EQ(a.said.n, 0);
    answer_fini(&a);
    tok_ids_fini(&said);
}

/* ---- two models without an engine ---- */

static void open_model(struct served_model *m, const char *plugin, const char *folder)
{
    struct arle_err err = ARLE_ERR_INIT;
    char path[512];
    const char *models = getenv("ARLE_TEST_MODELS");
    const struct arle_model_api *api = plugin_api(plugin, ARLE_KIND_MODEL);
    snprintf(path, sizeof path, "%s/%s", models != NULL ? models : "models", folder);
    *m = (struct served_model){ .name = (char *)(uintptr_t)folder, .api = api };
    if (api == NULL || tokenizer_open(&m->tok, path, &err) < 0)
        return;
    m->syntax = api->chat_syntax(NULL);
    m->calls = call_memory_create(1000, 1 << 20);
}

static void close_model(struct served_model *m)
{
    tokenizer_close(m->tok);
    call_memory_destroy(m->calls);
}

int main(void)
{
    open_model(&qwen, "model-qwen35", "qwen35-tiny");
    open_model(&deepseek, "model-deepseek-v4", "deepseek-v4-tiny");
    RUN(sampled_text_comes_back);
    RUN(sampled_text_comes_back_typed);
    RUN(special_tokens_are_what_they_were);
    RUN(edits_are_rendered);
    RUN(numbers_are_compared_by_value);
    RUN(cut_off_calls_are_not_kept);
    RUN(nothing_is_kept_unasked);
    RUN(the_least_recently_used_goes_first);
    RUN(bytes_are_bounded);
    RUN(tenants_do_not_meet);
    RUN(threads_share_it);
    close_model(&qwen);
    close_model(&deepseek);
    return tap_done();
}
