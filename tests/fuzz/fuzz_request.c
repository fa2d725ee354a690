/*
 * Request bodies of the HTTP dialects: parsing, parameters, prompts and conversations, for both dialects. What is accepted
 * must survive being written and read again.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <json-c/json.h>

#include "chat/messages.h"
#include "http/json_in.h"
#include "http/messages_in.h"
#include "util/jfield.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_as(enum dialect d, struct json_object *body)
{
    static const struct gen_defaults defaults = { .temperature = 1, .top_p = 1, .repetition = 1 };
    static struct raw_prompt prompts[MAX_PROMPTS];
    struct arle_err err = ARLE_ERR_INIT;
    struct gen_params p;
    uint32_t n = 0;
    int r = gen_params_read(&p, d, body, &defaults, 4096, &err);
    if ((r < 0) != (err.code < 0) || (r < 0 && err.msg[0] == '\0'))
        abort();
    gen_params_fini(&p);
    completion_prompts(body, 4096, prompts, &n, &err);
}

static void read_conversation(struct json_object *body)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *out = NULL, *again = NULL;
    if (chat_request_from_body(body, NULL, true, &out, &err) < 0) {
        if (err.code == 0)
            abort();
        return;
    }
    size_t len;
    const char *text = json_object_to_json_string_length(out, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE, &len);
    if (utf8_invalid_at(text, len) != len)
        abort();
    /* Arguments given as text may nest once more by their depth. */
    struct json_tokener *tok = json_tokener_new_ex(3 * JSON_TEXT_DEPTH);
    again = json_tokener_parse_ex(tok, text, (int)len);
    if (again == NULL)
        abort();
    json_tokener_free(tok);
    json_object_put(again);
    json_object_put(out);
}

static void read_messages(struct json_object *body)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *chat = NULL;
    if (messages_to_chat(body, true, &chat, &err) < 0) {
        if (err.code == 0)
            abort();
        return;
    }
    read_as(DIALECT_CHAT, chat);
    read_conversation(chat);
    json_object_put(chat);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *body = NULL;
    if (json_text_parse_object((const char *)data, size, "the body", &body, &err) < 0)
        return 0;
    read_as(DIALECT_CHAT, body);
    read_as(DIALECT_COMPLETIONS, body);
    read_conversation(body);
    read_messages(body);
    json_object_put(body);
    return 0;
}
