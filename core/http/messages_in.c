/* Conversion of messages_in.h. What chats check again (ranges of sampling fields) is not checked here. */
#include "http/messages_in.h"

#include <string.h>

#include <json-c/json.h>

#include "config/config.h"
#include "util/jfield.h"
#include "util/sbuf.h"

static const char *const message_fields[] = {
    "model", "messages", "max_tokens", "system", "stop_sequences", "stream", "temperature", "top_p", "top_k", "tools", "tool_choice",
    "thinking", "metadata", "service_tier", NULL
};

struct conversion {
    struct json_object *list;       /* messages of the chat */
    struct arle_err *err;
};

static int refuse(struct conversion *c, int code, const char *path, const char *what)
{
    return arle_err_param(c->err, code, path, "'%s' %s", path, what);
}

static struct json_object *text_object(const struct sbuf *b)
{
    return json_object_new_string_len(sbuf_text(b), (int)b->n);
}

static struct json_object *add_message(struct conversion *c, const char *role)
{
    struct json_object *m = json_object_new_object();
    json_object_object_add(m, "role", json_object_new_string(role));
    json_object_array_add(c->list, m);
    return m;
}

/* ---- content ---- */

/* A string, or a list of text blocks, joined. */
static int read_text(struct conversion *c, struct json_object *v, const char *path, struct sbuf *out)
{
    if (json_object_is_type(v, json_type_string)) {
        sbuf_add(out, json_object_get_string(v), (size_t)json_object_get_string_len(v));
        return 0;
    }
    if (!json_object_is_type(v, json_type_array))
        return refuse(c, -EPROTO, path, "must be a string or an array of text blocks");
    for (size_t i = 0; i < json_object_array_length(v); i++) {
        struct json_object *block = json_object_array_get_idx(v, i);
        const char *type = "", *text = NULL;
        size_t len = 0;
        if (!json_object_is_type(block, json_type_object) || jfield_str(block, "", "type", &type, NULL, NULL) < 0 ||
            strcmp(type, "text") != 0)
            return refuse(c, -ENOTSUP, path, "may hold only text blocks");
        if (jfield_str(block, "", "text", &text, &len, NULL) <= 0)
            return refuse(c, -EPROTO, path, "holds a text block without text");
        sbuf_add(out, text, len);
    }
    return 0;
}

struct blocks {
    struct sbuf text, thinking;
    struct json_object *calls;
    bool any_text, any_result;
};

static int take_tool_use(struct conversion *c, struct json_object *block, const char *path, struct blocks *b)
{
    const char *id = NULL, *name = NULL;
    struct json_object *input = NULL;
    if (jfield_str(block, "", "id", &id, NULL, NULL) <= 0 || jfield_str(block, "", "name", &name, NULL, NULL) <= 0)
        return refuse(c, -ENODATA, path, "needs a string id and a name");
    if (jfield_object(block, "", "input", &input, NULL) < 0)
        return refuse(c, -EPROTO, path, "needs an object as input");
    struct json_object *call = json_object_new_object(), *fn = json_object_new_object();
    json_object_object_add(call, "id", json_object_new_string(id));
    json_object_object_add(call, "type", json_object_new_string("function"));
    json_object_object_add(fn, "name", json_object_new_string(name));
    json_object_object_add(fn, "arguments", input != NULL ? json_object_get(input) : json_object_new_object());
    json_object_object_add(call, "function", fn);
    if (b->calls == NULL)
        b->calls = json_object_new_array();
    json_object_array_add(b->calls, call);
    return 0;
}

static int take_tool_result(struct conversion *c, struct json_object *block, const char *path, struct blocks *b)
{
    const char *id = NULL;
    struct json_object *content = NULL;
    struct sbuf text = SBUF_INIT;
    if (jfield_str(block, "", "tool_use_id", &id, NULL, NULL) <= 0)
        return refuse(c, -ENODATA, path, "needs a tool_use_id");
    int r = jfield_get(block, "content", &content) ? read_text(c, content, path, &text) : 0;
    if (r == 0) {
        struct json_object *m = add_message(c, "tool");
        json_object_object_add(m, "tool_call_id", json_object_new_string(id));
        json_object_object_add(m, "content", text_object(&text));
        b->any_result = true;
    }
    sbuf_fini(&text);
    return r;
}

static int take_block(struct conversion *c, struct json_object *block, const char *path, bool assistant, struct blocks *b)
{
    const char *type = NULL, *text = NULL;
    size_t len = 0;
    if (!json_object_is_type(block, json_type_object))
        return refuse(c, -EPROTO, path, "must be an object");
    if (jfield_str(block, "", "type", &type, NULL, NULL) <= 0)
        return refuse(c, -ENODATA, path, "needs a type");
    bool is_text = strcmp(type, "text") == 0;
    if (is_text || (assistant && strcmp(type, "thinking") == 0)) {
        if (jfield_str(block, "", type, &text, &len, NULL) <= 0)
            return refuse(c, -ENODATA, path, "has no text");
        sbuf_add(is_text ? &b->text : &b->thinking, text, len);
        b->any_text |= is_text;
        return 0;
    }
    if (assistant && strcmp(type, "redacted_thinking") == 0)
        return 0;
    if (assistant && strcmp(type, "tool_use") == 0)
        return take_tool_use(c, block, path, b);
    if (!assistant && strcmp(type, "tool_result") == 0)
        return take_tool_result(c, block, path, b);
    return refuse(c, -ENOTSUP, path, "is of a type that is not supported here");
}

static int take_content(struct conversion *c, struct json_object *content, size_t i, bool assistant, struct blocks *b)
{
    char path[64];
    int r = 0;
    if (json_object_is_type(content, json_type_string)) {
        b->any_text = true;
        return read_text(c, content, "", &b->text);
    }
    snprintf(path, sizeof path, "messages[%zu].content", i);
    if (!json_object_is_type(content, json_type_array))
        return refuse(c, -EPROTO, path, "must be a string or an array of blocks");
    for (size_t k = 0; k < json_object_array_length(content) && r == 0; k++) {
        snprintf(path, sizeof path, "messages[%zu].content[%zu]", i, k);
        r = take_block(c, json_object_array_get_idx(content, k), path, assistant, b);
    }
    return r;
}

static int take_message(struct conversion *c, struct json_object *msg, size_t i)
{
    char path[64];
    const char *role = NULL;
    struct json_object *content = NULL;
    struct blocks b = { .any_text = false };
    snprintf(path, sizeof path, "messages[%zu]", i);
    if (!json_object_is_type(msg, json_type_object))
        return refuse(c, -EPROTO, path, "must be an object");
    snprintf(path, sizeof path, "messages[%zu].role", i);
    if (jfield_str(msg, "", "role", &role, NULL, NULL) <= 0)
        return refuse(c, -ENODATA, path, "must be a string");
    bool assistant = strcmp(role, "assistant") == 0;
    if (!assistant && strcmp(role, "user") != 0)
        return refuse(c, -EINVAL, path, "must be user or assistant");
    snprintf(path, sizeof path, "messages[%zu].content", i);
    if (!jfield_get(msg, "content", &content))
        return refuse(c, -ENODATA, path, "is missing");
    int r = take_content(c, content, i, assistant, &b);
    if (r == 0 && (assistant || b.any_text || !b.any_result)) {
        struct json_object *m = add_message(c, role);
        json_object_object_add(m, "content", text_object(&b.text));
        if (b.thinking.n > 0)
            json_object_object_add(m, "reasoning_content", text_object(&b.thinking));
        if (b.calls != NULL)
            json_object_object_add(m, "tool_calls", json_object_get(b.calls));
    }
    json_object_put(b.calls);
    sbuf_fini(&b.text);
    sbuf_fini(&b.thinking);
    return r;
}

/* An answer goes on where the last message ends, if that is the assistant's. */
static int take_last(struct conversion *c, size_t i, struct json_object *out)
{
    struct json_object *last = json_object_array_get_idx(c->list, json_object_array_length(c->list) - 1), *v;
    char path[64];
    if (!jfield_get(last, "role", &v) || strcmp(json_object_get_string(v), "assistant") != 0)
        return 0;
    snprintf(path, sizeof path, "messages[%zu].content", i);
    if (jfield_get(last, "tool_calls", &v))
        return refuse(c, -EINVAL, path, "ends with a tool_use; its tool_result must follow");
    json_object_object_add(out, "continue_final_message", json_object_new_boolean(true));
    return 0;
}

/* Fields that change nothing here must have their type all the same. */
static int check_unused(struct conversion *c, struct json_object *body)
{
    struct json_object *metadata = NULL;
    const char *text = NULL;
    int r = jfield_object(body, "", "metadata", &metadata, c->err);
    if (r > 0) {
        json_object_object_foreach(metadata, key, value)
            if (value != NULL && strcmp(key, "user_id") != 0)
                return refuse(c, -ENOKEY, "metadata", "may hold user_id only");
        r = jfield_str(metadata, "metadata.", "user_id", &text, NULL, c->err);
    }
    if (r >= 0)
        r = jfield_str(body, "", "service_tier", &text, NULL, c->err);
    if (r > 0 && strcmp(text, "auto") != 0 && strcmp(text, "standard_only") != 0)
        return refuse(c, -EINVAL, "service_tier", "must be auto or standard_only");
    return r < 0 ? r : 0;
}

static int take_messages(struct conversion *c, struct json_object *body, struct json_object *out)
{
    struct json_object *list = NULL, *system = NULL;
    int r = jfield_array(body, "", "messages", &list, c->err);
    if (r < 0)
        return r;
    if (r == 0 || json_object_array_length(list) == 0)
        return refuse(c, r == 0 ? -ENODATA : -EINVAL, "messages", "must hold at least one message");
    if (jfield_get(body, "system", &system)) {
        struct sbuf text = SBUF_INIT;
        r = read_text(c, system, "system", &text);
        if (r == 0)
            json_object_object_add(add_message(c, "system"), "content", text_object(&text));
        sbuf_fini(&text);
        if (r < 0)
            return r;
    }
    r = 0;
    for (size_t i = 0; i < json_object_array_length(list) && r == 0; i++)
        r = take_message(c, json_object_array_get_idx(list, i), i);
    return r < 0 ? r : take_last(c, json_object_array_length(list) - 1, out);
}

/* ---- the rest of the body ---- */

static int take_tools(struct conversion *c, struct json_object *body, struct json_object *out)
{
    struct json_object *list = NULL;
    int r = jfield_array(body, "", "tools", &list, c->err);
    if (r <= 0)
        return r;
    struct json_object *tools = json_object_new_array();
    json_object_object_add(out, "tools", tools);
    for (size_t i = 0; i < json_object_array_length(list); i++) {
        struct json_object *tool = json_object_array_get_idx(list, i), *v;
        const char *type = "custom";
        char path[64];
        snprintf(path, sizeof path, "tools[%zu]", i);
        if (!json_object_is_type(tool, json_type_object))
            return refuse(c, -EPROTO, path, "must be an object");
        if (jfield_str(tool, "", "type", &type, NULL, NULL) < 0 || strcmp(type, "custom") != 0)
            return refuse(c, -ENOTSUP, path, "is a tool of the server's; only custom tools are supported");
        struct json_object *fn = json_object_new_object(), *envelope = json_object_new_object();
        json_object_object_add(envelope, "type", json_object_new_string("function"));
        json_object_object_add(envelope, "function", fn);
        json_object_array_add(tools, envelope);
        const char *text;
        int bad = jfield_str(tool, "", "description", &text, NULL, NULL);
        if (bad < 0)
            return refuse(c, bad, path, "has a description that is not text");
        static const char *const pairs[][2] = { { "name", "name" }, { "description", "description" }, { "input_schema", "parameters" } };
        for (size_t k = 0; k < 3; k++)
            if (jfield_get(tool, pairs[k][0], &v))
                json_object_object_add(fn, pairs[k][1], json_object_get(v));
    }
    return 0;
}

static int take_tool_choice(struct conversion *c, struct json_object *body, struct json_object *out)
{
    struct json_object *choice = NULL;
    const char *type = NULL;
    int r = jfield_object(body, "", "tool_choice", &choice, c->err);
    if (r <= 0)
        return r;
    if (jfield_str(choice, "", "type", &type, NULL, NULL) <= 0)
        return refuse(c, -ENODATA, "tool_choice.type", "must be a string");
    if (strcmp(type, "auto") != 0 && strcmp(type, "none") != 0)
        return refuse(c, -ENOTSUP, "tool_choice.type", "must be auto or none: this server does not constrain output");
    json_object_object_add(out, "tool_choice", json_object_new_string(type));
    return 0;
}

static int take_thinking(struct conversion *c, struct json_object *body, struct json_object *out)
{
    struct json_object *thinking = NULL;
    const char *type = NULL;
    int64_t budget;
    int r = jfield_object(body, "", "thinking", &thinking, c->err);
    if (r <= 0)
        return r;
    if (jfield_i64(thinking, "thinking.", "budget_tokens", 1, INT32_MAX, &budget, c->err) < 0)
        return c->err->code;
    if (jfield_str(thinking, "", "type", &type, NULL, NULL) <= 0)
        return refuse(c, -ENODATA, "thinking.type", "must be a string");
    bool on = strcmp(type, "enabled") == 0 || strcmp(type, "adaptive") == 0;
    if (!on && strcmp(type, "disabled") != 0)
        return refuse(c, -EINVAL, "thinking.type", "must be enabled, adaptive or disabled");
    struct json_object *kwargs = json_object_new_object();
    json_object_object_add(kwargs, "enable_thinking", json_object_new_boolean(on));
    json_object_object_add(out, "chat_template_kwargs", kwargs);
    return 0;
}

static int check_fields(struct conversion *c, struct json_object *body)
{
    size_t n = sizeof message_fields / sizeof message_fields[0] - 1;
    json_object_object_foreach(body, key, value) {
        bool found = value == NULL;
        for (size_t i = 0; i < n; i++)
            found |= strcmp(message_fields[i], key) == 0;
        const char *near = found ? NULL : nearest_word(key, message_fields, n);
        if (!found)
            return arle_err_param(c->err, -ENOKEY, key, "unknown field '%.80s'%s%s%s", key, near ? "; did you mean '" : "",
                                  near ? near : "", near ? "'?" : "");
    }
    return 0;
}

static int take_body(struct conversion *c, struct json_object *body, bool count_only, struct json_object *out)
{
    static const char *const same[][2] = { { "model", "model" }, { "stream", "stream" }, { "temperature", "temperature" },
                                           { "top_p", "top_p" }, { "top_k", "top_k" }, { "max_tokens", "max_tokens" },
                                           { "stop_sequences", "stop" } };
    struct json_object *v;
    int r = check_fields(c, body);
    if (r == 0 && !count_only && !jfield_get(body, "max_tokens", &v))
        r = refuse(c, -ENODATA, "max_tokens", "is missing");
    if (r == 0 && jfield_get(body, "stop_sequences", &v) && !json_object_is_type(v, json_type_array))
        r = refuse(c, -EPROTO, "stop_sequences", "must be an array of strings");
    for (size_t i = 0; i < sizeof same / sizeof same[0] && r == 0; i++)
        if (jfield_get(body, same[i][0], &v))
            json_object_object_add(out, same[i][1], json_object_get(v));
    if (r == 0)
        r = check_unused(c, body);
    if (r == 0)
        r = take_messages(c, body, out);
    if (r == 0)
        r = take_tools(c, body, out);
    if (r == 0)
        r = take_tool_choice(c, body, out);
    return r == 0 ? take_thinking(c, body, out) : r;
}

int messages_to_chat(struct json_object *body, bool count_only, struct json_object **out, struct arle_err *err)
{
    struct arle_err unused = ARLE_ERR_INIT;
    struct json_object *chat = json_object_new_object();
    struct conversion c = { .list = json_object_new_array(), .err = err != NULL ? err : &unused };
    json_object_object_add(chat, "messages", c.list);
    int r = take_body(&c, body, count_only, chat);
    if (r < 0) {
        json_object_put(chat);
        return r;
    }
    *out = chat;
    return 0;
}
