/*
 * Writes conversations the way the model was trained on: roles as special tokens, three thinking modes, tools declared and
 * called in DSML. First the messages are regrouped into turns (tool results become part of a user turn), then each turn is
 * written in order. Called by the host's text plane; reentrant.
 */
#include "model.h"

#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

#define T_BOS "<｜begin▁of▁sentence｜>"
#define T_EOS "<｜end▁of▁sentence｜>"
#define T_USER "<｜User｜>"
#define T_ASSISTANT "<｜Assistant｜>"
#define T_REMINDER "<｜latest_reminder｜>"
#define T_THINK "<think>"
#define T_UNTHINK "</think>"
#define DSML "｜DSML｜"

static const char effort_max[] =
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very thorough in your thinking and "
    "comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential "
    "paths, edge cases, and adversarial scenarios.\nExplicitly write out your entire deliberation process, documenting every "
    "intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n";

static const char tools_head[] =
    "## Tools\n\nYou have access to a set of tools to help answer the user's question. You can invoke tools by writing a "
    "\"<" DSML "tool_calls>\" block like the following:\n\n<" DSML "tool_calls>\n<" DSML "invoke name=\"$TOOL_NAME\">\n<" DSML
    "parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</" DSML "parameter>\n...\n</" DSML "invoke>\n<" DSML
    "invoke name=\"$TOOL_NAME2\">\n...\n</" DSML "invoke>\n</" DSML "tool_calls>\n\nString parameters should be specified as is and "
    "set `string=\"true\"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set "
    "`string=\"false\"`.\n\nIf thinking_mode is enabled (triggered by " T_THINK "), you MUST output your complete reasoning inside "
    T_THINK "..." T_UNTHINK " BEFORE any tool calls or final response.\n\nOtherwise, output directly after " T_UNTHINK " with tool "
    "calls or final response.\n\n### Available Tool Schemas\n\n";
static const char tools_tail[] =
    "\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n";

struct part { const char *text; const char *id; bool tool_result; size_t order; };

struct turn {
    const char *role;                   /* system, user, developer, assistant, latest_reminder */
    struct json_object *msg;            /* of its first message */
    struct part *parts; size_t n_parts; /* user only */
    size_t src;
};

struct render {
    const struct arle_chat_sink *sink;
    struct arle_err *err;
    struct turn *turns; size_t n_turns;
    struct part *parts;
    struct json_object *tools;
    bool thinking, drop, generate, continue_final;
    int fail;
};

static struct json_object *get(struct json_object *o, const char *key)
{
    struct json_object *v = NULL;
    if (o == NULL || !json_object_is_type(o, json_type_object))
        return NULL;
    return json_object_object_get_ex(o, key, &v) ? v : NULL;
}

static const char *str(struct json_object *o, const char *key)
{
    struct json_object *v = get(o, key);
    return v != NULL && json_object_is_type(v, json_type_string) ? json_object_get_string(v) : "";
}

static bool filled(struct json_object *v)
{
    return v != NULL && json_object_is_type(v, json_type_array) && json_object_array_length(v) > 0;
}

static void put_n(struct render *r, const char *s, size_t n, uint32_t flags)
{
    if (r->fail == 0 && n > 0)
        r->fail = r->sink->text(r->sink->ctx, s, n, flags);
}

static void put_value(struct render *r, struct json_object *v, uint32_t flags)
{
    if (json_object_is_type(v, json_type_string))
        put_n(r, json_object_get_string(v), (size_t)json_object_get_string_len(v), flags);
}

static void tmpl(struct render *r, const char *s)
{
    put_n(r, s, strlen(s), ARLE_TEXT_TEMPLATE);
}

static void content(struct render *r, const char *s)
{
    put_n(r, s, strlen(s), ARLE_TEXT_CONTENT);
}

static void mark(struct render *r, uint32_t m)
{
    if (r->fail == 0 && r->sink->mark != NULL)
        r->fail = r->sink->mark(r->sink->ctx, m);
}

/* ---- JSON as the training data has it: ", " and ": ", nothing escaped that need not be ------------------------------------ */

static void json_string(struct render *r, const char *s, size_t n)
{
    static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
    content(r, "\"");
    size_t run = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        const char *at = c ? strchr(from, c) : NULL;
        if (c >= 0x20 && at == NULL)
            continue;
        char esc[8];
        if (at != NULL)
            snprintf(esc, sizeof esc, "\\%c", to[at - from]);
        else
            snprintf(esc, sizeof esc, "\\u%04x", c);
        put_n(r, s + run, i - run, ARLE_TEXT_CONTENT);
        content(r, esc);
        run = i + 1;
    }
    put_n(r, s + run, n - run, ARLE_TEXT_CONTENT);
    content(r, "\"");
}

static void json_value(struct render *r, struct json_object *v)
{
    switch (json_object_get_type(v)) {
    case json_type_object: {
        bool first = true;
        content(r, "{");
        json_object_object_foreach(v, key, member) {
            content(r, first ? "" : ", ");
            json_string(r, key, strlen(key));
            content(r, ": ");
            json_value(r, member);
            first = false;
        }
        content(r, "}");
        break;
    }
    case json_type_array:
        content(r, "[");
        for (size_t i = 0; i < json_object_array_length(v); i++) {
            content(r, i ? ", " : "");
            json_value(r, json_object_array_get_idx(v, i));
        }
        content(r, "]");
        break;
    case json_type_string:
        json_string(r, json_object_get_string(v), (size_t)json_object_get_string_len(v));
        break;
    default:
        content(r, v == NULL ? "null" : json_object_to_json_string_ext(v, JSON_C_TO_STRING_PLAIN));
    }
}

/* ---- regrouping ---------------------------------------------------------------------------------------------------------------- */

static bool user_like(const struct turn *t)
{
    return strcmp(t->role, "user") == 0 || strcmp(t->role, "developer") == 0;
}

static int check_role(const char *role, size_t i, struct arle_err *err)
{
    static const char *const roles[] = { "system", "user", "developer", "assistant", "tool", "latest_reminder" };
    char param[64];
    for (size_t k = 0; k < sizeof roles / sizeof roles[0]; k++)
        if (strcmp(role, roles[k]) == 0)
            return 0;
    snprintf(param, sizeof param, "messages[%zu].role", i);
    return arle_err_param(err, -EINVAL, param, "%s: role \"%s\" is not known", param, role);
}

/* Tool messages become parts of a user turn; following tool and plain user messages join it, unless a task closes it. */
static int regroup(struct render *r, struct json_object *messages)
{
    size_t n = json_object_array_length(messages), n_parts = 0;
    r->turns = calloc(n + 2, sizeof *r->turns);
    r->parts = calloc(n + 1, sizeof *r->parts);
    if (r->turns == NULL || r->parts == NULL)
        return arle_err_set(r->err, -ENOMEM, "no memory to render %zu messages", n);
    for (size_t i = 0; i < n; i++) {
        struct json_object *m = json_object_array_get_idx(messages, i);
        const char *role = str(m, "role");
        int e = check_role(role, i, r->err);
        if (e < 0)
            return e;
        bool tool = strcmp(role, "tool") == 0, user = strcmp(role, "user") == 0;
        struct turn *last = r->n_turns ? &r->turns[r->n_turns - 1] : NULL;
        bool join = (tool || user) && last != NULL && strcmp(last->role, "user") == 0 && get(last->msg, "task") == NULL;
        if (!join) {
            last = &r->turns[r->n_turns++];
            *last = (struct turn){ .role = tool ? "user" : json_object_get_string(get(m, "role")), .msg = m, .src = i,
                                   .parts = &r->parts[n_parts] };
        }
        if (tool || user) {
            r->parts[n_parts++] = (struct part){ .text = str(m, "content"), .id = str(m, "tool_call_id"), .tool_result = tool };
            last->n_parts++;
        }
        if (join && get(m, "task") != NULL)
            last->msg = m;
    }
    return 0;
}

/* Tool results of a turn go into the order of the calls that they answer; unknown ids first, text parts stay in place. */
static void order_results(struct turn *t, struct json_object *calls)
{
    size_t n_calls = filled(calls) ? json_object_array_length(calls) : 0, slots[64], n = 0;
    for (size_t i = 0; i < t->n_parts && n < 64; i++) {
        if (!t->parts[i].tool_result)
            continue;
        t->parts[i].order = 0;
        for (size_t c = 0; c < n_calls; c++)
            if (strcmp(str(json_object_array_get_idx(calls, c), "id"), t->parts[i].id) == 0 && t->parts[i].id[0])
                t->parts[i].order = c;
        slots[n++] = i;
    }
    for (size_t i = 1; i < n; i++)          /* insertion sort: stable, and a turn has few results */
        for (size_t j = i; j > 0 && t->parts[slots[j - 1]].order > t->parts[slots[j]].order; j--) {
            struct part tmp = t->parts[slots[j]];
            t->parts[slots[j]] = t->parts[slots[j - 1]];
            t->parts[slots[j - 1]] = tmp;
        }
}

/* ---- writing ---------------------------------------------------------------------------------------------------------------------- */

static void tools_block(struct render *r, struct json_object *tools)
{
    tmpl(r, tools_head);
    for (size_t i = 0; i < json_object_array_length(tools); i++) {
        struct json_object *t = json_object_array_get_idx(tools, i), *f = get(t, "function");
        json_value(r, f ? f : t);
        tmpl(r, "\n");
    }
    tmpl(r, tools_tail);
}

static void tools_and_format(struct render *r, struct json_object *msg, struct json_object *tools)
{
    struct json_object *own = get(msg, "tools"), *format = get(msg, "response_format");
    if (filled(own))
        tools = own;
    if (filled(tools)) {
        tmpl(r, "\n\n");
        tools_block(r, tools);
    }
    if (format != NULL) {
        tmpl(r, "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n");
        json_value(r, format);
    }
}

static void parameter(struct render *r, const char *key, struct json_object *v)
{
    bool text = json_object_is_type(v, json_type_string);
    tmpl(r, "<" DSML "parameter name=\"");
    content(r, key);
    tmpl(r, text ? "\" string=\"true\">" : "\" string=\"false\">");
    if (text)
        put_n(r, json_object_get_string(v), (size_t)json_object_get_string_len(v), ARLE_TEXT_CONTENT);
    else
        json_value(r, v);
    tmpl(r, "</" DSML "parameter>\n");
}

static void one_call(struct render *r, struct json_object *call)
{
    struct json_object *f = get(call, "function"), *args = get(f ? f : call, "arguments"), *parsed = NULL;
    tmpl(r, "<" DSML "invoke name=\"");
    content(r, str(f ? f : call, "name"));
    tmpl(r, "\">\n");
    if (args != NULL && json_object_is_type(args, json_type_string)) {
        parsed = json_tokener_parse(json_object_get_string(args));
        if (parsed != NULL && json_object_is_type(parsed, json_type_object))
            args = parsed;
    }
    size_t n = 0;
    if (args != NULL && json_object_is_type(args, json_type_object)) {
        json_object_object_foreach(args, key, v) {
            parameter(r, key, v);
            n++;
        }
    } else if (args != NULL) {
        parameter(r, "arguments", args);
        n = 1;
    }
    tmpl(r, n == 0 ? "\n</" DSML "invoke>\n" : "</" DSML "invoke>\n");
    json_object_put(parsed);
}

/* The sections as they were sampled (arle/model.h): pieces of ordinary text and added tokens in turn. */
static void sampled_calls(struct render *r, struct json_object *calls)
{
    for (size_t c = 0; c < json_object_array_length(calls); c++) {
        struct json_object *raw = get(json_object_array_get_idx(calls, c), "raw");
        struct json_object *lead = get(raw, "lead"), *list = get(raw, "text");
        put_value(r, lead, ARLE_TEXT_LITERAL);
        tmpl(r, lead == NULL ? "\n\n" : "");
        for (size_t k = 0; k < json_object_array_length(list); k++)
            put_value(r, json_object_array_get_idx(list, k), k % 2 == 0 ? ARLE_TEXT_LITERAL : ARLE_TEXT_TEMPLATE);
    }
}

static void calls_of(struct render *r, struct json_object *msg, struct json_object *calls)
{
    bool raw = true;            /* all or none: calls of the regular form share one section */
    for (size_t c = 0; c < json_object_array_length(calls); c++)
        raw &= json_object_is_type(get(get(json_object_array_get_idx(calls, c), "raw"), "text"), json_type_array);
    content(r, str(msg, raw && get(msg, "raw_content") != NULL ? "raw_content" : "content"));
    if (raw) {
        sampled_calls(r, calls);
        return;
    }
    tmpl(r, "\n\n<" DSML "tool_calls>\n");
    for (size_t c = 0; c < json_object_array_length(calls); c++)
        one_call(r, json_object_array_get_idx(calls, c));
    tmpl(r, "</" DSML "tool_calls>");
}

static void assistant(struct render *r, size_t i, size_t last_user, bool has_user)
{
    struct turn *t = &r->turns[i];
    bool after_task = i > 0 && get(r->turns[i - 1].msg, "task") != NULL;
    if (r->thinking && !after_task && (!r->drop || (has_user && i > last_user))) {
        content(r, str(t->msg, "reasoning_content"));
        tmpl(r, T_UNTHINK);
    }
    struct json_object *calls = get(t->msg, "tool_calls");
    if (filled(calls))
        calls_of(r, t->msg, calls);
    else
        content(r, str(t->msg, "content"));
    bool open_end = json_object_get_boolean(get(t->msg, "wo_eos")) || (r->continue_final && i + 1 == r->n_turns);
    if (!open_end)
        tmpl(r, T_EOS);
}

static void user(struct render *r, struct turn *t)
{
    tmpl(r, T_USER);
    if (strcmp(t->role, "developer") == 0) {
        content(r, str(t->msg, "content"));
        tools_and_format(r, t->msg, NULL);
        return;
    }
    for (size_t p = 0; p < t->n_parts; p++) {
        tmpl(r, p ? "\n\n" : "");
        if (t->parts[p].tool_result)
            tmpl(r, "<tool_result>");
        content(r, t->parts[p].text);
        if (t->parts[p].tool_result)
            tmpl(r, "</tool_result>");
    }
}

static const char *task_token(const char *task)
{
    static const char *const known[][2] = { { "query", "<｜query｜>" }, { "authority", "<｜authority｜>" }, { "domain", "<｜domain｜>" },
        { "title", "<｜title｜>" }, { "read_url", "<｜read_url｜>" } };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(known[i][0], task) == 0)
            return known[i][1];
    return "";
}

/* What stands between a turn and the answer that follows it. Returns true when it leaves reasoning open. */
static bool transition(struct render *r, size_t i, size_t last_user)
{
    struct turn *t = &r->turns[i], *next = i + 1 < r->n_turns ? &r->turns[i + 1] : NULL;
    const char *task = str(t->msg, "task");
    if (next != NULL && strcmp(next->role, "assistant") != 0 && strcmp(next->role, "latest_reminder") != 0)
        return false;
    if (next == NULL && !r->generate)
        return false;
    if (task[0] != '\0' && strcmp(task, "action") != 0) {
        tmpl(r, task_token(task));
        return false;
    }
    if (!user_like(t))
        return false;
    tmpl(r, T_ASSISTANT);
    if (next == NULL)
        mark(r, ARLE_MARK_STABLE);
    bool think = r->thinking && (task[0] != '\0' || !r->drop || i >= last_user);
    tmpl(r, think ? T_THINK : T_UNTHINK);
    if (task[0] != '\0')
        tmpl(r, "<｜action｜>");
    return think;
}

static bool has_tools(const struct render *r)
{
    for (size_t i = 0; i < r->n_turns; i++)
        if (filled(get(r->turns[i].msg, "tools")))
            return true;
    return filled(r->tools);
}

static void read_options(struct render *r, struct json_object *root, bool *max_effort)
{
    struct json_object *opt = get(root, "options"), *v;
    const char *effort = str(opt, "reasoning_effort");
    r->thinking = (v = get(opt, "enable_thinking")) != NULL ? json_object_get_boolean(v) : true;
    if ((v = get(opt, "thinking")) != NULL && json_object_is_type(v, json_type_boolean))
        r->thinking = json_object_get_boolean(v);
    if (strcmp(effort, "none") == 0)
        r->thinking = false;
    *max_effort = r->thinking && (strcmp(effort, "max") == 0 || strcmp(effort, "xhigh") == 0);
    r->drop = (v = get(opt, "drop_thinking")) != NULL ? json_object_get_boolean(v) : true;
    r->tools = get(root, "tools");
    r->generate = (v = get(root, "add_generation_prompt")) == NULL || json_object_get_boolean(v);
    r->continue_final = json_object_get_boolean(get(root, "continue_final"));
}

static bool write_turns(struct render *r, bool max_effort)
{
    size_t last_user = 0;
    bool has_user = false, open = false, tools_due = filled(r->tools);
    struct json_object *calls = NULL;
    for (size_t i = 0; i < r->n_turns; i++)
        if (user_like(&r->turns[i]))
            last_user = i, has_user = true;
    tmpl(r, T_BOS);
    tmpl(r, max_effort ? effort_max : "");
    if (tools_due && strcmp(r->turns[0].role, "system") != 0) {      /* tools belong to a system message: an empty one */
        tools_and_format(r, NULL, r->tools);
        tools_due = false;
        mark(r, ARLE_MARK_SYSTEM_END);
    }
    for (size_t i = 0; i < r->n_turns; i++) {
        struct turn *t = &r->turns[i];
        if (strcmp(t->role, "system") == 0) {
            content(r, str(t->msg, "content"));
            tools_and_format(r, t->msg, tools_due ? r->tools : NULL);
            tools_due = false;
            mark(r, ARLE_MARK_SYSTEM_END);
        } else if (strcmp(t->role, "latest_reminder") == 0) {
            tmpl(r, T_REMINDER);
            content(r, str(t->msg, "content"));
        } else if (strcmp(t->role, "assistant") == 0) {
            assistant(r, i, last_user, has_user);
            if (filled(get(t->msg, "tool_calls")))
                calls = get(t->msg, "tool_calls");
        } else if (strcmp(t->role, "developer") != 0 || !r->thinking || !r->drop || i >= last_user) {
            order_results(t, calls);
            user(r, t);
        } else {
            continue;                   /* developer messages go with the reasoning */
        }
        mark(r, ARLE_MARK_TURN_END);
        open = transition(r, i, last_user);
    }
    return open;
}

int ds_chat_render(void *ctx, const char *json, size_t len, const struct arle_chat_sink *sink, struct arle_chat_result *out,
                   struct arle_err *err)
{
    struct json_tokener *tok = json_tokener_new_ex(64);
    struct json_object *root = tok && len < INT32_MAX ? json_tokener_parse_ex(tok, json, (int)len) : NULL;
    struct json_object *messages = get(root, "messages");
    struct render r = { .sink = sink, .err = err };
    bool max_effort, open = false;
    int e = 0;
    if (!filled(messages)) {
        e = arle_err_param(err, -EINVAL, "messages", "messages must be a non-empty array");
    } else if ((e = regroup(&r, messages)) == 0) {
        read_options(&r, root, &max_effort);
        if (has_tools(&r))
            r.drop = false;
        open = write_turns(&r, max_effort);
        e = r.fail;
    }
    if (e == 0 && out != NULL)
        out->starts_in_reasoning = open;
    free(r.turns);
    free(r.parts);
    json_object_put(root);
    if (tok)
        json_tokener_free(tok);
    return e;
}

const struct arle_output_syntax *ds_chat_syntax(void *ctx)
{
    static const struct arle_output_syntax syntax = {
        .struct_size = sizeof syntax, .reason_open = T_THINK, .reason_close = T_UNTHINK,
        .section_open = "<" DSML "tool_calls>", .section_close = "</" DSML "tool_calls>",
        .call_open = "<" DSML "invoke name=\"", .name_end = "\">", .call_close = "</" DSML "invoke>",
        .param_open = "<" DSML "parameter name=\"", .key_end = "\"", .param_close = "</" DSML "parameter>",
        .typed_open = "\" string=\"", .typed_end = "\">",
    };
    return &syntax;
}
