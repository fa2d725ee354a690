/* Checks and rewrites the conversation of a request; see messages.h. */
#include "chat/messages.h"

#include <ctype.h>
#include <string.h>

#include <json-c/json.h>

#include "util/jfield.h"
#include "util/sbuf.h"

enum role { SYSTEM, USER, ASSISTANT, TOOL, N_ROLES };
static const char *const role_names[N_ROLES] = { "system", "user", "assistant", "tool" };

#define PATH 64         /* as struct arle_err.param; longer paths lose their end */

static void path_of(char out[PATH], const char *at, const char *key)
{
    size_t n = strnlen(at, PATH - 1), m = strnlen(key, PATH - 1 - n);
    memcpy(out, at, n);
    memcpy(out + n, key, m);
    out[n + m] = '\0';
}

/* "at" + "key[i]." */
static void path_of_element(char out[PATH], const char *at, const char *key, size_t i)
{
    char element[PATH];
    snprintf(element, sizeof element, "%.24s[%zu].", key, i);
    path_of(out, at, element);
}

/* The path of the object whose members begin with `at`: without its last dot. */
static void path_of_object(char out[PATH], const char *at)
{
    path_of(out, at, "");
    out[strlen(out) - 1] = '\0';
}

/* ---- content ---- */

/* One part of a content list; `at` is "messages[i].content[k]." */
static int part_text(struct json_object *part, const char *at, struct sbuf *out, struct arle_err *err)
{
    const char *type = NULL, *text = NULL;
    size_t len = 0;
    if (!json_object_is_type(part, json_type_object)) {
        char path[PATH];
        path_of_object(path, at);
        return arle_err_param(err, -EPROTO, path, "'%s' must be an object, not %s", path, json_kind(part));
    }
    int r = jfield_str(part, at, "type", &type, NULL, err);
    if (r < 0)
        return r;
    char path[PATH];
    path_of(path, at, "type");
    if (r == 0)
        return arle_err_param(err, -ENODATA, path, "'%s' is missing", path);
    bool refusal = strcmp(type, "refusal") == 0;
    if (strcmp(type, "text") != 0 && !refusal)
        return arle_err_param(err, -ENOTSUP, path, "'%s': parts of type \"%.40s\" are not supported, only text", path, type);
    r = jfield_str(part, at, refusal ? "refusal" : "text", &text, &len, err);
    path_of(path, at, "text");
    if (r == 0)
        return arle_err_param(err, -ENODATA, path, "'%s' is missing", path);
    sbuf_add(out, text, r < 0 ? 0 : len);
    return r < 0 ? r : 0;
}

static int add_content(struct json_object *msg, const char *at, enum role role, struct json_object *out, struct arle_err *err)
{
    struct json_object *v = NULL, *calls;
    char path[PATH];
    path_of(path, at, "content");
    if (!jfield_get(msg, "content", &v)) {
        if (role == SYSTEM || role == USER || (role == ASSISTANT && !jfield_get(msg, "tool_calls", &calls) &&
                                               !json_object_object_get_ex(msg, "content", &v)))
            return arle_err_param(err, -ENODATA, path, "'%s' is missing", path);
        json_object_object_add(out, "content", json_object_new_string(""));
        return 0;
    }
    if (json_object_is_type(v, json_type_string)) {
        json_object_object_add(out, "content", json_object_get(v));
        return 0;
    }
    if (!json_object_is_type(v, json_type_array))
        return jfield_wrong_type(at, "content", "a string or an array of parts", v, err);
    struct sbuf text = SBUF_INIT;
    int r = 0;
    for (size_t i = 0; i < json_object_array_length(v) && r == 0; i++) {
        char part_at[PATH];
        path_of_element(part_at, at, "content", i);
        r = part_text(json_object_array_get_idx(v, i), part_at, &text, err);
    }
    if (r == 0 && (text.failed || text.n > INT32_MAX))
        r = arle_err_set(err, -ENOMEM, "no memory for the content of a message");
    if (r == 0)
        json_object_object_add(out, "content", json_object_new_string_len(sbuf_text(&text), (int)text.n));
    sbuf_fini(&text);
    return r;
}

/* ---- tool calls ---- */

/* Arguments arrive as JSON text (OpenAI) or as an object; models want an object with its keys in order. */
static int add_arguments(struct json_object *fn, const char *at, struct json_object *out, struct arle_err *err)
{
    struct json_object *v, *args = NULL;
    char path[PATH];
    path_of(path, at, "arguments");
    if (!jfield_get(fn, "arguments", &v)) {
        args = json_object_new_object();
    } else if (json_object_is_type(v, json_type_object)) {
        args = json_object_get(v);
    } else if (json_object_is_type(v, json_type_string)) {
        struct arle_err why = ARLE_ERR_INIT;
        size_t len = (size_t)json_object_get_string_len(v);
        if (len == 0)
            args = json_object_new_object();
        else if (json_text_parse_object(json_object_get_string(v), len, "it", &args, &why) < 0)
            return arle_err_param(err, -EINVAL, path, "'%s' must be the text of a JSON object: %.300s", path, why.msg);
    } else {
        return jfield_wrong_type(at, "arguments", "a string with a JSON object", v, err);
    }
    if (args == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for tool call arguments");
    json_object_object_add(out, "arguments", args);
    return 0;
}

static bool tool_name_ok(const char *name, size_t len)
{
    if (len == 0 || len > 64)
        return false;
    for (size_t i = 0; i < len; i++)
        if (!isalnum((unsigned char)name[i]) && (name[i] == '\0' || strchr("_.:/-", name[i]) == NULL))
            return false;
    return true;
}

/* A history may hold what a model made up: any name that a call can be written with. */
static bool called_name_ok(const char *name, size_t len)
{
    if (len == 0 || len > 256)
        return false;
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)name[i] < 0x20 || strchr("<>\"", name[i]) != NULL)
            return false;
    return true;
}

static int add_call(struct json_object *call, const char *at, struct json_object *calls, struct arle_err *err)
{
    struct json_object *fn = NULL;
    const char *name = NULL, *id = NULL, *type = "function";
    size_t len = 0;
    char path[PATH], fn_at[PATH];
    path_of_object(path, at);
    if (!json_object_is_type(call, json_type_object))
        return arle_err_param(err, -EPROTO, path, "'%s' must be an object, not %s", path, json_kind(call));
    int r = jfield_str(call, at, "type", &type, NULL, err);
    if (r >= 0 && strcmp(type, "function") != 0) {
        path_of(path, at, "type");
        return arle_err_param(err, -ENOTSUP, path, "'%s': only calls of type function are supported, not \"%.40s\"", path, type);
    }
    if (r >= 0)
        r = jfield_object(call, at, "function", &fn, err);
    if (r < 0)
        return r;
    path_of(path, at, "function");
    if (r == 0)
        return arle_err_param(err, -ENODATA, path, "'%s' is missing; only function calls are supported", path);
    path_of(fn_at, at, "function.");
    r = jfield_str(fn, fn_at, "name", &name, &len, err);
    if (r < 0)
        return r;
    path_of(path, fn_at, "name");
    if (r == 0 || !called_name_ok(name, len))
        return arle_err_param(err, r == 0 ? -ENODATA : -EINVAL, path,
                              "'%s' must be a name of 1 to 256 bytes, without control characters, quotes and angle brackets", path);
    r = jfield_str(call, at, "id", &id, NULL, err);
    if (r < 0)
        return r;
    struct json_object *out = json_object_new_object();
    if (r > 0)
        json_object_object_add(out, "id", json_object_new_string(id));
    json_object_object_add(out, "name", json_object_new_string(name));
    json_object_array_add(calls, out);
    return add_arguments(fn, fn_at, out, err);
}

static int add_calls(struct json_object *msg, const char *at, struct json_object *out, struct arle_err *err)
{
    struct json_object *list = NULL;
    int r = jfield_array(msg, at, "tool_calls", &list, err);
    if (r <= 0)
        return r;
    if (json_object_array_length(list) == 0)
        return 0;
    struct json_object *calls = json_object_new_array();
    json_object_object_add(out, "tool_calls", calls);
    for (size_t i = 0; i < json_object_array_length(list); i++) {
        char call_at[PATH];
        path_of_element(call_at, at, "tool_calls", i);
        r = add_call(json_object_array_get_idx(list, i), call_at, calls, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* ---- messages ---- */

static int read_role(struct json_object *msg, const char *at, enum role *out, struct arle_err *err)
{
    const char *role = NULL;
    char path[PATH];
    path_of(path, at, "role");
    int r = jfield_str(msg, at, "role", &role, NULL, err);
    if (r < 0)
        return r;
    if (r == 0)
        return arle_err_param(err, -ENODATA, path, "'%s' is missing", path);
    if (strcmp(role, "developer") == 0)
        role = "system";
    for (int i = 0; i < N_ROLES; i++)
        if (strcmp(role, role_names[i]) == 0) {
            *out = (enum role)i;
            return 0;
        }
    return arle_err_param(err, -EINVAL, path, "'%s' must be system, developer, user, assistant or tool, not \"%.40s\"", path,
                          role);
}

/* What a message may hold beside the members that are read: with its type, or not at all where it would say something. */
static int check_others(struct json_object *msg, const char *at, enum role role, struct arle_err *err)
{
    static const char *const not_here[] = { "function_call", "audio" };
    struct json_object *v;
    const char *text;
    char path[PATH];
    int r = jfield_str(msg, at, "name", &text, NULL, err);
    if (r >= 0)
        r = jfield_str(msg, at, "refusal", &text, NULL, err);
    for (size_t i = 0; r >= 0 && i < sizeof not_here / sizeof not_here[0]; i++)
        if (jfield_get(msg, not_here[i], &v)) {
            path_of(path, at, not_here[i]);
            return arle_err_param(err, -ENOTSUP, path, "'%s' is not supported by this server", path);
        }
    if (r < 0 || role == ASSISTANT || !jfield_get(msg, "tool_calls", &v) ||
        (json_object_is_type(v, json_type_array) && json_object_array_length(v) == 0))
        return r < 0 ? r : 0;
    path_of(path, at, "tool_calls");
    return arle_err_param(err, -EINVAL, path, "'%s': only messages of the assistant's have tool calls", path);
}

static int add_assistant(struct json_object *msg, const char *at, struct json_object *out, struct arle_err *err)
{
    const char *text = NULL;
    size_t len = 0;
    int r = jfield_str(msg, at, "reasoning_content", &text, &len, err);
    if (r == 0)
        r = jfield_str(msg, at, "reasoning", &text, &len, err);
    if (r < 0)
        return r;
    if (r > 0)
        json_object_object_add(out, "reasoning_content", json_object_new_string_len(text, (int)len));
    return add_calls(msg, at, out, err);
}

static int add_tool_result(struct json_object *msg, const char *at, struct json_object *out, struct arle_err *err)
{
    const char *id = NULL;
    char path[PATH];
    int r = jfield_str(msg, at, "tool_call_id", &id, NULL, err);
    if (r < 0)
        return r;
    path_of(path, at, "tool_call_id");
    if (r == 0)
        return arle_err_param(err, -ENODATA, path, "'%s' is missing", path);
    json_object_object_add(out, "tool_call_id", json_object_new_string(id));
    return 0;
}

/* System messages at the start become one: chat formats know one system text. */
static bool merge_system(struct json_object *out, struct json_object *msg)
{
    size_t n = json_object_array_length(out);
    struct json_object *first = n == 1 ? json_object_array_get_idx(out, 0) : NULL, *role, *a, *b;
    if (first == NULL || !json_object_object_get_ex(first, "role", &role) || strcmp(json_object_get_string(role), "system") != 0)
        return false;
    json_object_object_get_ex(first, "content", &a);
    json_object_object_get_ex(msg, "content", &b);
    struct sbuf both = SBUF_INIT;
    sbuf_add(&both, json_object_get_string(a), (size_t)json_object_get_string_len(a));
    if (both.n > 0 && json_object_get_string_len(b) > 0)
        sbuf_str(&both, "\n\n");
    sbuf_add(&both, json_object_get_string(b), (size_t)json_object_get_string_len(b));
    json_object_object_add(first, "content", json_object_new_string_len(sbuf_text(&both), (int)both.n));
    sbuf_fini(&both);
    json_object_put(msg);
    return true;
}

static int add_message(struct json_object *msg, size_t i, struct json_object *list, struct arle_err *err)
{
    char at[PATH], path[PATH];
    enum role role = USER;
    path_of_element(at, "", "messages", i);
    path_of_object(path, at);
    if (!json_object_is_type(msg, json_type_object))
        return arle_err_param(err, -EPROTO, path, "'%s' must be an object, not %s", path, json_kind(msg));
    int r = read_role(msg, at, &role, err);
    if (r < 0)
        return r;
    struct json_object *out = json_object_new_object();
    if (out == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for messages");
    json_object_object_add(out, "role", json_object_new_string(role_names[role]));
    r = add_content(msg, at, role, out, err);
    if (r == 0)
        r = check_others(msg, at, role, err);
    if (r == 0 && role == ASSISTANT)
        r = add_assistant(msg, at, out, err);
    if (r == 0 && role == TOOL)
        r = add_tool_result(msg, at, out, err);
    if (r < 0)
        json_object_put(out);
    else if (role != SYSTEM || !merge_system(list, out))
        json_object_array_add(list, out);
    return r;
}

static int add_messages(struct json_object *body, struct json_object *out, struct arle_err *err)
{
    struct json_object *in = NULL, *list;
    int r = jfield_array(body, "", "messages", &in, err);
    if (r < 0)
        return r;
    if (r == 0)
        return arle_err_param(err, -ENODATA, "messages", "'messages' is missing");
    if (json_object_array_length(in) == 0)
        return arle_err_param(err, -EINVAL, "messages", "'messages' is empty; at least one message is needed");
    list = json_object_new_array();
    json_object_object_add(out, "messages", list);
    for (size_t i = 0; i < json_object_array_length(in); i++) {
        r = add_message(json_object_array_get_idx(in, i), i, list, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* ---- tools and options ---- */

static int check_tool(struct json_object *tool, const char *at, const char **out_name, struct arle_err *err)
{
    const char *type = "function", *name = NULL, *text;
    struct json_object *fn = NULL, *schema = NULL;
    size_t len = 0;
    bool strict;
    char path[PATH], fn_at[PATH];
    path_of_object(path, at);
    if (!json_object_is_type(tool, json_type_object))
        return arle_err_param(err, -EPROTO, path, "'%s' must be an object, not %s", path, json_kind(tool));
    int r = jfield_str(tool, at, "type", &type, NULL, err);
    if (r < 0)
        return r;
    if (strcmp(type, "function") != 0) {
        path_of(path, at, "type");
        return arle_err_param(err, -ENOTSUP, path, "'%s': only tools of type function are supported, not \"%.40s\"", path, type);
    }
    r = jfield_object(tool, at, "function", &fn, err);
    path_of(path, at, "function");
    if (r <= 0)
        return r < 0 ? r : arle_err_param(err, -ENODATA, path, "'%s' is missing", path);
    path_of(fn_at, at, "function.");
    r = jfield_str(fn, fn_at, "name", &name, &len, err);
    path_of(path, fn_at, "name");
    if (r < 0)
        return r;
    if (r == 0 || !tool_name_ok(name, len))
        return arle_err_param(err, r == 0 ? -ENODATA : -EINVAL, path, "'%s' must be a name of 1 to 64 letters, digits and _.:/-",
                              path);
    *out_name = name;
    r = jfield_str(fn, fn_at, "description", &text, NULL, err);
    if (r >= 0)
        r = jfield_bool(fn, fn_at, "strict", &strict, err);
    if (r >= 0)
        r = jfield_object(fn, fn_at, "parameters", &schema, err);
    return r < 0 ? r : 0;
}

int chat_check_tools(struct json_object *tools, struct arle_err *err)
{
    size_t n = json_object_array_length(tools);
    if (n > 1024)
        return arle_err_param(err, -ERANGE, "tools", "'tools' holds %zu tools; at most 1024 are accepted", n);
    struct json_object *seen = json_object_new_object();
    int r = 0;
    for (size_t i = 0; i < n && r == 0; i++) {
        char at[PATH];
        const char *name = NULL;
        path_of_element(at, "", "tools", i);
        r = check_tool(json_object_array_get_idx(tools, i), at, &name, err);
        if (r == 0 && json_object_object_get_ex(seen, name, NULL))
            r = arle_err_param(err, -EINVAL, "tools", "'%sfunction.name': \"%s\" is declared twice", at, name);
        if (r == 0)
            json_object_object_add(seen, name, NULL);
    }
    json_object_put(seen);
    return r;
}

static void merge_options(struct json_object *into, struct json_object *from)
{
    json_object_object_foreach(from, key, value)
        json_object_object_add(into, key, json_object_get(value));
}

static int add_options(struct json_object *body, struct json_object *defaults, struct json_object *out, struct arle_err *err)
{
    static const char *const efforts[] = { "none", "minimal", "low", "medium", "high", "xhigh" };
    struct json_object *options = json_object_new_object(), *kwargs = NULL;
    const char *effort = NULL;
    json_object_object_add(out, "options", options);
    if (defaults != NULL)
        merge_options(options, defaults);
    int r = jfield_str(body, "", "reasoning_effort", &effort, NULL, err);
    if (r < 0)
        return r;
    if (r > 0) {
        bool known = false;
        for (size_t i = 0; i < sizeof efforts / sizeof efforts[0]; i++)
            known |= strcmp(effort, efforts[i]) == 0;
        if (!known)
            return arle_err_param(err, -EINVAL, "reasoning_effort",
                                  "'reasoning_effort' must be none, minimal, low, medium, high or xhigh, not \"%.40s\"", effort);
        json_object_object_add(options, "reasoning_effort", json_object_new_string(effort));
        json_object_object_add(options, "enable_thinking", json_object_new_boolean(strcmp(effort, "none") != 0));
    }
    r = jfield_object(body, "", "chat_template_kwargs", &kwargs, err);
    if (r > 0) {
        bool thinking;
        r = jfield_bool(kwargs, "chat_template_kwargs.", "enable_thinking", &thinking, err);
        if (r >= 0)
            merge_options(options, kwargs);
    }
    return r < 0 ? r : 0;
}

static int add_flags(struct json_object *body, struct json_object *out, struct arle_err *err)
{
    bool prompt = true, final = false;
    int r = jfield_bool(body, "", "add_generation_prompt", &prompt, err);
    if (r >= 0)
        r = jfield_bool(body, "", "continue_final_message", &final, err);
    if (r < 0)
        return r;
    if (final)
        prompt = false;
    json_object_object_add(out, "add_generation_prompt", json_object_new_boolean(prompt));
    json_object_object_add(out, "continue_final", json_object_new_boolean(final));
    return 0;
}

int chat_request_from_body(struct json_object *body, struct json_object *defaults, bool use_tools, struct json_object **out,
                           struct arle_err *err)
{
    struct json_object *rq = json_object_new_object(), *tools = NULL;
    if (rq == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the conversation");
    int r = add_messages(body, rq, err);
    if (r == 0)
        r = jfield_array(body, "", "tools", &tools, err);
    if (r > 0)
        r = chat_check_tools(tools, err);
    if (r == 0 && use_tools && tools != NULL && json_object_array_length(tools) > 0)
        json_object_object_add(rq, "tools", json_object_get(tools));
    if (r == 0)
        r = add_options(body, defaults, rq, err);
    if (r == 0)
        r = add_flags(body, rq, err);
    if (r < 0) {
        json_object_put(rq);
        return r;
    }
    *out = rq;
    return 0;
}
