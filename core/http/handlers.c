/* The route table and the endpoints that answer at once: models, health, tokenize, detokenize, render. */
#include <stdlib.h>
#include <string.h>

#include <json-c/json.h>

#include "chat/messages.h"
#include "chat/render.h"
#include "config/config.h"
#include "http/internal.h"
#include "http/json_in.h"
#include "http/messages_in.h"
#include "util/clock.h"
#include "util/jfield.h"

const struct route http_routes[] = {
    { "POST", "/v1/chat/completions", handle_chat, .generates = true },
    { "POST", "/v1/completions", handle_completions, .generates = true },
    { "POST", "/v1/messages", handle_messages, .generates = true, .messages = true },
    { "POST", "/v1/messages/count_tokens", handle_count_tokens, .messages = true },
    { "GET", "/v1/models", handle_models },
    { "GET", "/v1/models/*", handle_model },
    { "POST", "/v1/render", handle_render },
    { "POST", "/tokenize", handle_tokenize },
    { "POST", "/detokenize", handle_detokenize },
    { "GET", "/health", handle_health, .open = true },
    { "GET", "/ready", handle_ready, .open = true },
    { "GET", "/metrics", handle_metrics },
    { NULL, NULL, NULL },
};

/* ---- shared by handlers ---- */

int body_object(struct conn *cn, struct json_object **out, struct arle_err *err)
{
    if (cn->body.n == 0)
        return arle_err_set(err, -EBADMSG, "the body is empty; a JSON object is expected");
    return json_text_parse_object(sbuf_text(&cn->body), cn->body.n, "the body", out, err);
}

int find_model(struct conn *cn, const char *name, struct served_model **out, struct arle_err *err)
{
    struct http_server *srv = cn->srv;
    if (name == NULL && srv->n_models == 1) {
        *out = srv->models[0];
        return 0;
    }
    if (name == NULL)
        return arle_err_param(err, -ENODATA, "model", "'model' is missing, and more than one model is served");
    char known[256] = "";
    for (size_t i = 0; i < srv->n_models; i++) {
        if (strcmp(srv->models[i]->name, name) == 0) {
            *out = srv->models[i];
            return 0;
        }
        size_t n = strlen(known);
        snprintf(known + n, sizeof known - n, "%s%s", n ? ", " : "", srv->models[i]->name);
    }
    return arle_err_param(err, -ENOENT, "model", "the model '%.100s' is not served here; there is: %s", name, known);
}

/* ---- models ---- */

/* What OpenAI's and what Anthropic's dialect call a model, in one object. */
static void put_model(struct sbuf *b, const struct served_model *m)
{
    char created[CLOCK_STAMP_BYTES];
    sbuf_str(b, "{\"id\":");
    sbuf_json_cstr(b, m->name);
    sbuf_fmt(b, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"arle\",\"type\":\"model\",\"created_at\":\"%s\",\"display_name\":",
             (long long)m->created_s, clock_stamp(created, m->created_s));
    sbuf_json_cstr(b, m->name);
    sbuf_fmt(b, ",\"max_model_len\":%u,\"architecture\":", served_context(m));
    sbuf_json_cstr(b, engine_model(m->engine)->arch);
    sbuf_char(b, '}');
}

enum MHD_Result handle_models(struct conn *cn)
{
    struct sbuf b = SBUF_INIT;
    sbuf_str(&b, "{\"object\":\"list\",\"data\":[");
    for (size_t i = 0; i < cn->srv->n_models; i++) {
        if (i > 0)
            sbuf_char(&b, ',');
        put_model(&b, cn->srv->models[i]);
    }
    sbuf_str(&b, "],\"has_more\":false,\"first_id\":");
    sbuf_json_cstr(&b, cn->srv->models[0]->name);
    sbuf_str(&b, ",\"last_id\":");
    sbuf_json_cstr(&b, cn->srv->models[cn->srv->n_models - 1]->name);
    sbuf_char(&b, '}');
    return reply_json(cn, 200, &b);
}

enum MHD_Result handle_model(struct conn *cn)
{
    struct arle_err err;
    struct served_model *m;
    struct sbuf b = SBUF_INIT;
    if (find_model(cn, cn->tail, &m, &err) < 0)
        return reply_error(cn, &err, 0);
    put_model(&b, m);
    return reply_json(cn, 200, &b);
}

/* ---- health ---- */

static const char *dead_reason(const struct http_server *srv, struct engine_stats *st)
{
    for (size_t i = 0; i < srv->n_models; i++) {
        engine_stat(srv->models[i]->engine, st);
        if (st->dead)
            return st->dead_reason;
    }
    return NULL;
}

static enum MHD_Result say_status(struct conn *cn, int status, const char *word, const char *reason)
{
    struct sbuf b = SBUF_INIT;
    sbuf_fmt(&b, "{\"status\":\"%s\"", word);
    if (reason != NULL) {
        sbuf_str(&b, ",\"reason\":");
        sbuf_json_cstr(&b, reason);
    }
    sbuf_char(&b, '}');
    return reply_json(cn, status, &b);
}

enum MHD_Result handle_health(struct conn *cn)
{
    struct engine_stats st;
    const char *dead = dead_reason(cn->srv, &st);
    return dead != NULL ? say_status(cn, 503, "dead", dead) : say_status(cn, 200, "ok", NULL);
}

enum MHD_Result handle_ready(struct conn *cn)
{
    struct engine_stats st;
    const char *dead = dead_reason(cn->srv, &st);
    if (dead != NULL)
        return say_status(cn, 503, "dead", dead);
    if (atomic_load(&cn->srv->draining))
        return say_status(cn, 503, "draining", NULL);
    return say_status(cn, 200, "ready", NULL);
}

/* ---- tokenizer ---- */

static int open_body(struct conn *cn, struct json_object **body, struct served_model **m, struct arle_err *err)
{
    const char *name = NULL;
    int r = body_object(cn, body, err);
    if (r == 0)
        r = gen_model_name(*body, &name, err);
    return r < 0 ? r : find_model(cn, name, m, err);
}

static void put_ids(struct sbuf *b, const int32_t *ids, size_t n)
{
    sbuf_char(b, '[');
    for (size_t i = 0; i < n; i++)
        sbuf_fmt(b, i ? ",%d" : "%d", ids[i]);
    sbuf_char(b, ']');
}

static int render_body(struct conn *cn, struct prompt *p, const struct served_model *m, struct json_object *body,
                       struct arle_err *err)
{
    struct json_object *conversation = NULL;
    int r = chat_request_from_body(body, m->chat_options, true, &conversation, err);
    if (r == 0)
        r = prompt_render(p, m, cn->tenant, conversation, err);
    json_object_put(conversation);
    return r;
}

static int tokenize_body(struct conn *cn, struct prompt *p, const struct served_model *m, struct json_object *body,
                         struct arle_err *err)
{
    struct json_object *v;
    const char *text = NULL;
    size_t len = 0;
    bool special = true;
    if (jfield_get(body, "messages", &v))
        return render_body(cn, p, m, body, err);
    int r = jfield_str(body, "", "prompt", &text, &len, err);
    if (r == 0)
        r = jfield_str(body, "", "text", &text, &len, err);
    if (r == 0)
        r = jfield_str(body, "", "content", &text, &len, err);
    if (r < 0)
        return r;
    if (r == 0)
        return arle_err_param(err, -ENODATA, "prompt", "'prompt' is missing; give the text to tokenize, or 'messages'");
    r = jfield_bool(body, "", "allow_special", &special, err);
    if (r < 0)
        return r;
    return special ? prompt_from_text(p, m, text, len, err) : tokenizer_encode(m->tok, text, len, 0, &p->ids, err);
}

enum MHD_Result handle_tokenize(struct conn *cn)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *body = NULL;
    struct served_model *m;
    struct prompt p = { 0 };
    struct sbuf b = SBUF_INIT;
    int r = open_body(cn, &body, &m, &err);
    if (r == 0)
        r = tokenize_body(cn, &p, m, body, &err);
    if (r == 0) {
        sbuf_fmt(&b, "{\"count\":%zu,\"max_model_len\":%u,\"tokens\":", p.ids.n, served_context(m));
        put_ids(&b, p.ids.ids, p.ids.n);
        sbuf_char(&b, '}');
    }
    prompt_fini(&p);
    json_object_put(body);
    return r < 0 ? reply_error(cn, &err, 0) : reply_json(cn, 200, &b);
}

enum MHD_Result handle_count_tokens(struct conn *cn)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *body = NULL, *chat = NULL;
    struct served_model *m;
    struct prompt p = { 0 };
    struct sbuf b = SBUF_INIT;
    int r = open_body(cn, &body, &m, &err);
    if (r == 0)
        r = messages_to_chat(body, true, &chat, &err);
    if (r == 0)
        r = render_body(cn, &p, m, chat, &err);
    if (r == 0)
        sbuf_fmt(&b, "{\"input_tokens\":%zu}", p.ids.n);
    prompt_fini(&p);
    json_object_put(chat);
    json_object_put(body);
    return r < 0 ? reply_error(cn, &err, 0) : reply_json(cn, 200, &b);
}

static int detokenize_body(struct sbuf *b, const struct served_model *m, struct json_object *body, struct arle_err *err)
{
    struct json_object *list = NULL;
    int r = jfield_array(body, "", "tokens", &list, err);
    if (r < 0)
        return r;
    if (r == 0)
        return arle_err_param(err, -ENODATA, "tokens", "'tokens' is missing");
    if ((r = check_token_ids(list, "tokens", served_vocab(m), err)) < 0)
        return r;
    size_t n = json_object_array_length(list), len = 0;
    int32_t *ids = calloc(n ? n : 1, sizeof *ids);
    char *text = NULL;
    if (ids == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for tokens");
    for (size_t i = 0; i < n; i++)
        ids[i] = json_object_get_int(json_object_array_get_idx(list, i));
    r = tokenizer_decode(m->tok, ids, n, TOK_LOSSY_UTF8, &text, &len, err);
    if (r == 0) {
        sbuf_str(b, "{\"prompt\":");
        sbuf_json_str(b, text, len);
        sbuf_str(b, ",\"text\":");         /* two servers that clients know name it differently */
        sbuf_json_str(b, text, len);
        sbuf_char(b, '}');
    }
    free(text);
    free(ids);
    return r;
}

enum MHD_Result handle_detokenize(struct conn *cn)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *body = NULL;
    struct served_model *m;
    struct sbuf b = SBUF_INIT;
    int r = open_body(cn, &body, &m, &err);
    if (r == 0)
        r = detokenize_body(&b, m, body, &err);
    json_object_put(body);
    return r < 0 ? reply_error(cn, &err, 0) : reply_json(cn, 200, &b);
}

enum MHD_Result handle_render(struct conn *cn)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct json_object *body = NULL;
    struct served_model *m;
    struct prompt p = { 0 };
    struct sbuf b = SBUF_INIT;
    int r = open_body(cn, &body, &m, &err);
    if (r == 0)
        r = render_body(cn, &p, m, body, &err);
    if (r == 0) {
        sbuf_str(&b, "{\"prompt\":");
        sbuf_json_str(&b, sbuf_text(&p.text), p.text.n);
        sbuf_str(&b, ",\"token_ids\":");
        put_ids(&b, p.ids.ids, p.ids.n);
        sbuf_str(&b, ",\"marks\":[");
        for (uint32_t i = 0; i < p.n_marks; i++)
            sbuf_fmt(&b, i ? ",%u" : "%u", p.marks[i]);
        sbuf_fmt(&b, "],\"starts_in_reasoning\":%s}", p.starts_in_reasoning ? "true" : "false");
    }
    prompt_fini(&p);
    json_object_put(body);
    return r < 0 ? reply_error(cn, &err, 0) : reply_json(cn, 200, &b);
}
