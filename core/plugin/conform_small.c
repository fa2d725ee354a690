/* Tools and kv-stores: declarations and refusals. */
#include "plugin/conform.h"

#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

void conform_tool(struct conform *c)
{
    const struct arle_tool_api *api = c->self->ops;
    const char *text = api->declaration(c->self->ctx);
    struct json_object *root = text != NULL ? json_tokener_parse(text) : NULL, *v = NULL;
    bool named = root != NULL && json_object_object_get_ex(root, "name", &v) && json_object_is_type(v, json_type_string);
    bool schema = root != NULL && json_object_object_get_ex(root, "parameters", &v) && json_object_is_type(v, json_type_object);
    conform_case(c, named && schema, "declaration() is JSON with name and parameters", "");
    json_object_put(root);
    char out[64];
    size_t len = 0;
    struct arle_err err = ARLE_ERR_INIT;
    int r = api->call(c->self->ctx, "{\"no_such_argument\": 1}", out, sizeof out, &len, 1000, &err);
    conform_case(c, r < 0 && err.msg[0] != '\0', "a call with wrong arguments is refused with a reason", err.msg);
}

void conform_store(struct conform *c)
{
    const struct arle_kv_store_api *api = c->self->ops;
    unsigned char data[32] = "conformance", back[32] = "";
    struct arle_kv_item put = { .data = data, .len = sizeof data }, get = { .data = back, .cap = sizeof back };
    struct arle_err err = ARLE_ERR_INIT;
    memset(put.key, 0xC7, sizeof put.key);
    memset(get.key, 0xC7, sizeof get.key);
    int r = api->put(c->self->ctx, &put, 1, 1000, &err);
    if (r < 0) {
        conform_case(c, err.msg[0] != '\0', "put() without its server is an error with a reason", "no reason was given");
        conform_skip(c, "what was put is got back", err.msg);
        return;
    }
    r = api->get(c->self->ctx, &get, 1, 1000, &err);
    conform_case(c, r == 0 && get.len == sizeof data && memcmp(back, data, sizeof data) == 0, "what was put is got back", err.msg);
    memset(get.key, 0x11, sizeof get.key);
    r = api->get(c->self->ctx, &get, 1, 1000, &err);
    conform_case(c, r == 0 && get.len == 0, "an unknown key is absent and no error", err.msg);
}
