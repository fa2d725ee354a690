/*
 * Generation endpoints: from a checked body to queued engine requests, and from their events to the reply. Runs on the HTTP
 * threads; the engine only calls waker_wake.
 */
#include "http/gen.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include <json-c/json.h>

#include "chat/messages.h"
#include "http/messages_in.h"
#include "util/clock.h"
#include "util/jfield.h"
#include "util/log.h"

/* ---- life ---- */

static void choice_fini(struct choice *ch)
{
    answer_fini(&ch->answer);
    sbuf_fini(&ch->content);
    sbuf_fini(&ch->reasoning);
    for (uint32_t i = 0; i < ch->n_calls; i++) {
        sbuf_fini(&ch->calls[i].name);
        sbuf_fini(&ch->calls[i].args);
    }
    free(ch->calls);
    lp_fini(&ch->lp);
    sbuf_fini(&ch->token_ids);
    free(ch->drafts);
}

static void log_gen(struct gen *g)
{
    struct request_usage sum = { 0 };
    for (uint32_t i = 0; i < g->n_subs; i++) {
        sum.prompt_tokens += g->subs[i].usage.prompt_tokens;
        sum.completion_tokens += g->subs[i].usage.completion_tokens;
        sum.cached_tokens += g->subs[i].usage.cached_tokens;
    }
    struct http_server *srv = g->cn->srv;
    int64_t now = clock_mono_us();
    atomic_fetch_add(&srv->prompt_tokens, sum.prompt_tokens);
    atomic_fetch_add(&srv->completion_tokens, sum.completion_tokens);
    atomic_fetch_add(&srv->cached_tokens, sum.cached_tokens);
    histogram_add(&srv->total, now - g->cn->start_us);
    if (!g->cn->set->log_requests)
        return;
    log_write(g->failed.code != 0 ? ARLE_LOG_WARN : ARLE_LOG_INFO, "http", "generated",
              "req=%s path=%s model=%s prompt=%u cached=%u completion=%u first_ms=%.1f total_ms=%.1f end=%s", g->cn->id,
              g->cn->route->path, g->m->name, sum.prompt_tokens, sum.cached_tokens, sum.completion_tokens,
              g->first_us ? (double)(g->first_us - g->cn->start_us) / 1000 : 0.0, (double)(now - g->cn->start_us) / 1000,
              g->failed.code != 0 ? g->failed.msg : g->over ? "ok" : "disconnected");
}

static void list_gen(struct gen *g)
{
    struct http_server *srv = g->cn->srv;
    atomic_fetch_add(&srv->running, 1);
    g->counted = true;
    pthread_mutex_lock(&srv->gens_mu);
    g->next = srv->gens;
    g->link = &srv->gens;
    if (g->next != NULL)
        g->next->link = &g->next;
    srv->gens = g;
    pthread_mutex_unlock(&srv->gens_mu);
}

static void unlist_gen(struct gen *g)
{
    struct http_server *srv = g->cn->srv;
    pthread_mutex_lock(&srv->gens_mu);
    *g->link = g->next;
    if (g->next != NULL)
        g->next->link = g->link;
    pthread_mutex_unlock(&srv->gens_mu);
}

void http_server_list(struct http_server *srv, struct sbuf *out)
{
    int64_t now = clock_mono_us();
    sbuf_char(out, '[');
    pthread_mutex_lock(&srv->gens_mu);
    for (struct gen *g = srv->gens; g != NULL; g = g->next) {
        sbuf_fmt(out, "%s{\"id\":\"%s\",\"path\":\"%s\",\"prompt_tokens\":%zu,\"age_ms\":%lld,\"model\":", g == srv->gens ? "" : ",",
                 g->cn->id, g->cn->route->path, g->subs[0].prompt.ids.n, (long long)(now - g->cn->start_us) / 1000);
        sbuf_json_cstr(out, g->m->name);
        sbuf_char(out, '}');
    }
    pthread_mutex_unlock(&srv->gens_mu);
    sbuf_char(out, ']');
}

int http_server_cancel(struct http_server *srv, const char *id)
{
    int r = -ENOENT;
    pthread_mutex_lock(&srv->gens_mu);
    for (struct gen *g = srv->gens; g != NULL; g = g->next) {
        if (strcmp(g->cn->id, id) != 0)
            continue;
        for (uint32_t i = 0; i < g->n_subs; i++)
            request_cancel(g->subs[i].rq);
        r = 0;
    }
    pthread_mutex_unlock(&srv->gens_mu);
    return r;
}

void gen_destroy(struct gen *g)
{
    if (g == NULL)
        return;
    if (g->counted)
        unlist_gen(g);
    for (uint32_t i = 0; i < g->n_subs; i++) {
        if (g->subs[i].rq != NULL)
            request_unref(g->subs[i].rq);
        prompt_fini(&g->subs[i].prompt);
        lp_fini(&g->subs[i].lp);
        free(g->subs[i].drafts);
    }
    if (g->counted) {
        log_gen(g);
        atomic_fetch_sub(&g->cn->srv->running, 1);
    }
    for (uint32_t i = 0; i < g->n_choices; i++)
        choice_fini(&g->choices[i]);
    if (g->waker != NULL)
        waker_give(g->cn->srv, g->waker);
    free(g->choices);
    free(g->subs);
    free(g->stop_ids);
    gen_params_fini(&g->p);
    sbuf_fini(&g->out);
    json_object_put(g->body);
    free(g);
}

static void make_id(char *out, size_t cap, const char *prefix)
{
    unsigned char r[12] = { 0 };
    if (getrandom(r, sizeof r, 0) < 0)
        r[0] = (unsigned char)clock_mono_us();
    int n = snprintf(out, cap, "%s", prefix);
    for (size_t i = 0; i < sizeof r && (size_t)n + 3 <= cap; i++)
        n += snprintf(out + n, cap - (size_t)n, "%02x", r[i]);
}

/* ---- prompts ---- */

static int chat_prompt(struct gen *g, struct arle_err *err)
{
    struct json_object *conversation = NULL;
    g->n_subs = 1;
    g->subs = calloc(1, sizeof *g->subs);
    if (g->subs == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the prompt");
    int r = chat_request_from_body(g->body, g->m->chat_options, g->p.use_tools, &conversation, err);
    if (r == 0)
        r = prompt_render(&g->subs[0].prompt, g->m, g->cn->tenant, conversation, err);
    json_object_put(conversation);
    if (r == 0 && g->p.use_tools)
        json_object_object_get_ex(g->body, "tools", &g->tools);
    return r;
}

static int ids_to_prompt(struct prompt *p, const struct served_model *m, struct json_object *ids, bool with_text,
                         struct arle_err *err)
{
    size_t n = json_object_array_length(ids);
    char *text = NULL;
    p->ids.ids = calloc(n, sizeof *p->ids.ids);
    if (p->ids.ids == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the prompt");
    p->ids.cap = p->ids.n = n;
    for (size_t i = 0; i < n; i++)
        p->ids.ids[i] = json_object_get_int(json_object_array_get_idx(ids, i));
    size_t len = 0;
    if (!with_text)
        return 0;
    int r = tokenizer_decode(m->tok, p->ids.ids, n, TOK_LOSSY_UTF8, &text, &len, err);
    if (r == 0)
        sbuf_add(&p->text, text, len);
    free(text);
    return r;
}

static int completion_prompt(struct gen *g, struct arle_err *err)
{
    struct raw_prompt *raw = calloc(MAX_PROMPTS, sizeof *raw);
    uint32_t n = 0;
    if (raw == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the prompts");
    int r = completion_prompts(g->body, served_vocab(g->m), raw, &n, err);
    if (r == 0 && (g->subs = calloc(n, sizeof *g->subs)) == NULL)
        r = arle_err_set(err, -ENOMEM, "no memory for the prompts");
    if (r == 0)
        g->n_subs = n;
    for (uint32_t i = 0; i < n && r == 0; i++)
        r = raw[i].ids != NULL ? ids_to_prompt(&g->subs[i].prompt, g->m, raw[i].ids, g->p.echo, err)
                               : prompt_from_text(&g->subs[i].prompt, g->m, raw[i].text, raw[i].len, err);
    free(raw);
    return r;
}

static int check_length(struct gen *g, struct arle_err *err)
{
    uint32_t context = served_context(g->m);
    const char *field = g->dialect == DIALECT_CHAT ? "messages" : "prompt";
    for (uint32_t i = 0; i < g->n_subs; i++) {
        size_t n = g->subs[i].prompt.ids.n;
        if (n == 0)
            return arle_err_param(err, -EINVAL, field, "'%s' holds no tokens", field);
        if (n > context || (n == context && g->p.max_new != 0))
            return arle_err_param(err, -E2BIG, field, "'%s' has %zu tokens; the model's context length is %u", field, n, context);
        if (g->p.max_new > 0 && n + (uint64_t)g->p.max_new > context)
            return arle_err_param(err, -E2BIG, "max_tokens",
                                  "%zu prompt tokens and 'max_tokens' %lld exceed the model's context length of %u", n,
                                  (long long)g->p.max_new, context);
    }
    return 0;
}

/* ---- submission ---- */

static int collect_stop_ids(struct gen *g, struct arle_err *err)
{
    uint32_t n_eos = g->p.ignore_eos ? 0 : g->m->n_eos;
    g->stop_ids = calloc(n_eos + g->p.n_stop_ids + 1, sizeof *g->stop_ids);
    if (g->stop_ids == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for stop ids");
    for (uint32_t i = 0; i < n_eos; i++)
        g->stop_ids[g->n_stop_ids++] = g->m->eos[i];
    for (uint32_t i = 0; i < g->p.n_stop_ids; i++)
        g->stop_ids[g->n_stop_ids++] = g->p.stop_ids[i];
    return 0;
}

static int open_choices(struct gen *g, struct arle_err *err)
{
    g->n_choices = 0;
    g->choices = calloc((size_t)g->n_subs * g->p.n, sizeof *g->choices);
    if (g->choices == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for %u choices", g->n_subs * g->p.n);
    for (uint32_t i = 0; i < g->n_subs * g->p.n; i++) {
        struct choice *ch = &g->choices[g->n_choices++];
        *ch = (struct choice){ .g = g, .index = i, .prompt = i / g->p.n };
        struct answer_opts o = {
            .model = g->m, .chat = g->dialect == DIALECT_CHAT, .parse_calls = g->p.parse_calls,
            .starts_in_reasoning = g->subs[ch->prompt].prompt.starts_in_reasoning, .keep_special = g->p.keep_special,
            .keep_calls = g->p.parse_calls && g->m->calls != NULL,
            .tools = g->tools, .stops = g->p.stops, .stop_ids = g->stop_ids, .n_stop_ids = g->n_stop_ids,
            .fn = write_event, .arg = ch,
        };
        if (answer_init(&ch->answer, &o) < 0)
            return arle_err_set(err, -ENOMEM, "no memory for a choice");
    }
    return 0;
}

#define DEFAULT_COMPLETION 16u      /* tokens of /v1/completions without max_tokens, as OpenAI has it */

static uint32_t tokens_wanted(const struct gen *g, uint32_t room)
{
    if (g->p.max_new >= 0)
        return g->p.max_new < (int64_t)room ? (uint32_t)g->p.max_new : room;
    return g->dialect == DIALECT_CHAT || room < DEFAULT_COMPLETION ? room : DEFAULT_COMPLETION;
}

static int submit(struct gen *g, int *retry_after_s, struct arle_err *err)
{
    uint32_t context = served_context(g->m);
    for (uint32_t i = 0; i < g->n_subs; i++) {
        struct sub *s = &g->subs[i];
        struct request_args a = {
            .tokens = s->prompt.ids.ids, .n_tokens = (uint32_t)s->prompt.ids.n,
            .marks = s->prompt.marks, .n_marks = s->prompt.n_marks,
            .max_new = tokens_wanted(g, context - (uint32_t)s->prompt.ids.n),
            .n = g->p.n, .sampling = g->p.sampling, .stop_ids = g->stop_ids, .n_stop_ids = g->n_stop_ids,
            .ignore_eos = g->p.ignore_eos && g->n_stop_ids == 0,
            .prompt_logprobs = g->p.echo && g->p.sampling.want_logprobs, .drafts = g->p.return_drafts,
            .priority = g->p.priority, .tenant = g->cn->tenant, .cache_salt = g->p.cache_salt,
            .deadline_ms = g->cn->set->deadline_ms, .notify = waker_wake, .notify_arg = g->waker,
        };
        int r = engine_submit(g->m->engine, &a, &s->rq, retry_after_s, err);
        if (r < 0) {
            if (r == -E2BIG && g->dialect == DIALECT_CHAT && strcmp(err->param, "prompt") == 0)
                snprintf(err->param, sizeof err->param, "messages");
            return r;
        }
    }
    return 0;
}

/* ---- events ---- */

static void cancel_all(struct gen *g)
{
    for (uint32_t i = 0; i < g->n_subs; i++)
        if (g->subs[i].rq != NULL)
            request_cancel(g->subs[i].rq);
}

static void fail(struct gen *g, const struct arle_err *err)
{
    if (g->failed.code == 0)
        g->failed = *err;
    g->over = true;
    cancel_all(g);
}

static void fail_code(struct gen *g, int code, const char *why)
{
    struct arle_err err;
    arle_err_set(&err, code, "%s", why);
    fail(g, &err);
}

static void keep_draft(int32_t **list, uint32_t *n, uint32_t pos, int32_t id)
{
    if (pos < 2 || pos > 1u << 24)
        return;
    uint32_t at = pos - 2;
    if (at >= *n) {
        int32_t *p = realloc(*list, (at + 1) * sizeof *p);
        if (p == NULL)
            return;
        for (uint32_t i = *n; i <= at; i++)
            p[i] = -1;
        *list = p;
        *n = at + 1;
    }
    (*list)[at] = id;
}

/* Before the client sees the end of the answer, so that its next request finds them. */
static void keep_calls(struct choice *ch)
{
    struct call_section s = { .has_lead = false };
    uint32_t next = 0, first, n;
    while (first = next, (n = answer_section(&ch->answer, &next, &s)) > 0) {
        if (s.text.n > 0 && next <= ch->n_calls)
            call_memory_keep(ch->g->m->calls, ch->g->cn->tenant, &s, &ch->calls[first], n);
        call_section_fini(&s);
    }
}

static void end_choice(struct choice *ch, enum finish_reason finish)
{
    if (ch->ended)
        return;
    if (answer_end(&ch->answer) < 0)
        fail_code(ch->g, -ENOMEM, "no memory for the answer");
    else
        keep_calls(ch);
    ch->ended = true;
    ch->finish = finish;
    if (ch->g->p.stream)
        write_choice_end(ch);
}

static void on_token(struct gen *g, struct choice *ch, const struct token_event *ev)
{
    if (ch->ended)
        return;
    if (g->first_us == 0) {
        g->first_us = clock_mono_us();
        histogram_add(&g->cn->srv->first_token, g->first_us - g->cn->start_us);
    }
    ch->n_tokens++;
    if (ch->answer.automaton != NULL && automaton_in_reasoning(ch->answer.automaton))
        ch->n_reasoning++;
    if (g->p.stream)
        write_choice_begin(ch);
    if (g->p.return_token_ids)
        sbuf_fmt(&ch->token_ids, ch->token_ids.n ? ",%d" : "%d", ev->id);
    if (g->p.sampling.want_logprobs)
        write_logprob(g, &ch->lp, ev);
    if (answer_push(&ch->answer, ev->id) < 0)
        fail_code(g, -ENOMEM, "no memory for the answer");
    if (ch->answer.stopped) {
        request_stop(g->subs[ch->prompt].rq, ev->index);
        end_choice(ch, FINISH_STOP);
    }
}

static void on_finish(struct gen *g, struct choice *ch, const struct token_event *ev)
{
    if (ch->ended)
        return;
    switch (ev->finish) {
    case FINISH_ERROR:
        fail_code(g, ev->error < 0 ? ev->error : -EIO, "the model failed while it answered this request");
        return;
    case FINISH_CANCELLED:
        fail_code(g, -ECANCELED, "the request was cancelled by the server");
        return;
    case FINISH_DEADLINE:
        if (ch->n_tokens == 0)
            fail_code(g, -ETIME, "the deadline passed before the first token");
        else
            end_choice(ch, FINISH_LENGTH);
        return;
    default:
        end_choice(ch, (enum finish_reason)ev->finish);
    }
}

static void on_event(struct gen *g, uint32_t sub, const struct token_event *ev)
{
    struct choice *ch = &g->choices[sub * g->p.n + (ev->index < g->p.n ? ev->index : 0)];
    struct sub *s = &g->subs[sub];
    switch (ev->kind) {
    case EV_PROMPT:
        if (ev->index == 0)
            write_logprob(g, &s->lp, ev);
        break;
    case EV_TOKEN:
        on_token(g, ch, ev);
        break;
    case EV_DRAFT:
        if (ev->pos <= s->prompt.ids.n)
            keep_draft(&s->drafts, &s->n_drafts, ev->pos, ev->id);
        else
            keep_draft(&ch->drafts, &ch->n_drafts, ev->pos, ev->id);
        break;
    case EV_FINISH:
        on_finish(g, ch, ev);
        break;
    }
}

static void drain_sub(struct gen *g, uint32_t i)
{
    struct sub *s = &g->subs[i];
    struct token_event ev;
    int r = 0;
    while (!s->over && g->failed.code == 0 && (r = request_next(s->rq, &ev)) > 0)
        on_event(g, i, &ev);
    if (r < 0 && request_usage(s->rq, &s->usage))
        s->over = true;
}

/* Takes all events that are ready. Afterwards g->over says whether the reply is complete. */
static void drain(struct gen *g)
{
    bool all = true;
    for (uint32_t i = 0; i < g->n_subs; i++) {
        drain_sub(g, i);
        all &= g->subs[i].over;
    }
    for (uint32_t i = 0; g->p.stream && i < g->n_choices; i++)
        write_choice_rest(&g->choices[i]);
    for (uint32_t i = 0; all && i < g->n_choices; i++)
        end_choice(&g->choices[i], FINISH_STOP);        /* stopped ones have ended; nothing else is left open */
    g->over |= all;
    if (atomic_load(&g->cn->srv->stopping) && !g->over)
        fail_code(g, -ESHUTDOWN, "the server is shutting down");
}

static bool client_gone(struct gen *g)
{
    pthread_mutex_lock(&g->waker->mu);
    bool gone = g->waker->hangup;
    pthread_mutex_unlock(&g->waker->mu);
    return gone;
}

/* ---- streamed replies ---- */

static void note_written(struct gen *g, bool *ping)
{
    pthread_mutex_lock(&g->waker->mu);
    *ping = g->waker->ping;
    g->waker->ping = false;
    g->waker->last_us = clock_mono_us();
    pthread_mutex_unlock(&g->waker->mu);
}

static ssize_t stream_read(void *cls, uint64_t pos, char *buf, size_t max)
{
    struct gen *g = cls;
    for (;;) {
        bool ping = false;
        if (g->out_at == g->out.n && !g->out_closed) {
            sbuf_reset(&g->out);
            g->out_at = 0;
            if (client_gone(g)) {
                cancel_all(g);
                return MHD_CONTENT_READER_END_WITH_ERROR;
            }
            drain(g);
            if (g->over) {
                write_stream_end(g);
                g->out_closed = true;
            }
            note_written(g, &ping);
            if (ping && g->out.n == 0)
                sbuf_str(&g->out, ": keep-alive\n\n");
            if (g->out.failed)
                return MHD_CONTENT_READER_END_WITH_ERROR;
        }
        if (g->out_at < g->out.n) {
            size_t n = g->out.n - g->out_at < max ? g->out.n - g->out_at : max;
            memcpy(buf, g->out.p + g->out_at, n);
            g->out_at += n;
            return (ssize_t)n;
        }
        if (g->out_closed)
            return MHD_CONTENT_READER_END_OF_STREAM;
        if (waker_sleep(g->waker))
            return 0;
    }
}

static enum MHD_Result begin_stream(struct gen *g)
{
    struct MHD_Response *resp = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 32 << 10, stream_read, g, NULL);
    if (resp == NULL)
        return MHD_NO;
    MHD_add_response_header(resp, "Content-Type", "text/event-stream; charset=utf-8");
    MHD_add_response_header(resp, "Cache-Control", "no-cache");
    MHD_add_response_header(resp, "X-Accel-Buffering", "no");
    reply_headers(g->cn, resp);
    g->waker->stream = true;
    g->cn->status = 200;
    enum MHD_Result r = MHD_queue_response(g->cn->c, 200, resp);
    MHD_destroy_response(resp);
    return r;
}

/* ---- the way of a request ---- */

enum MHD_Result gen_continue(struct gen *g)
{
    do {
        if (client_gone(g))
            return MHD_NO;
        drain(g);
        if (g->over) {
            if (g->failed.code != 0)
                return reply_error(g->cn, &g->failed, 0);
            struct sbuf out = SBUF_INIT;
            write_reply(g, &out);
            return reply_json(g->cn, 200, &out);
        }
    } while (!waker_sleep(g->waker));
    return MHD_YES;
}

static int chat_of_messages(struct gen *g, struct arle_err *err)
{
    struct json_object *chat = NULL;
    int r = messages_to_chat(g->body, false, &chat, err);
    if (r < 0)
        return r;
    json_object_put(g->body);
    g->body = chat;
    return 0;
}

static int prepare(struct gen *g, struct arle_err *err)
{
    const char *name = NULL;
    int r = body_object(g->cn, &g->body, err);
    if (r == 0 && gen_is_messages(g))
        r = chat_of_messages(g, err);
    if (r == 0)
        r = gen_model_name(g->body, &name, err);
    if (r == 0)
        r = find_model(g->cn, name, &g->m, err);
    if (r == 0)
        r = gen_params_read(&g->p, g->dialect, g->body, &g->m->defaults, served_vocab(g->m), err);
    if (r == 0 && g->p.return_drafts && !engine_model(g->m->engine)->has_drafter)
        r = arle_err_param(err, -ENOTSUP, "return_drafts", "'return_drafts': model %s has no drafter", g->m->name);
    if (r == 0)
        r = g->dialect == DIALECT_CHAT ? chat_prompt(g, err) : completion_prompt(g, err);
    if (r == 0)
        r = check_length(g, err);
    if (r == 0)
        r = collect_stop_ids(g, err);
    return r < 0 ? r : open_choices(g, err);
}

static enum MHD_Result generate(struct conn *cn, enum dialect dialect, const char *id_prefix)
{
    struct arle_err err = ARLE_ERR_INIT;
    int retry_after_s = 0;
    struct gen *g = calloc(1, sizeof *g);
    if (g == NULL)
        return MHD_NO;
    g->cn = cn;
    g->dialect = dialect;
    g->created_s = clock_wall_ms() / 1000;
    g->p.cache_salt = "";
    make_id(g->id, sizeof g->id, id_prefix);
    int r = prepare(g, &err);
    sbuf_fini(&cn->body);
    if (r == 0 && (g->waker = waker_take(cn->srv, cn->c)) == NULL)
        r = arle_err_set(&err, -ENOMEM, "no memory for the request");
    if (r == 0)
        r = submit(g, &retry_after_s, &err);
    if (r < 0) {
        if (gen_is_messages(g) && strcmp(err.param, "stop") == 0)
            snprintf(err.param, sizeof err.param, "stop_sequences");
        gen_destroy(g);
        return reply_error(cn, &err, r == -EAGAIN && retry_after_s < 1 ? 1 : retry_after_s);
    }
    list_gen(g);
    cn->gen = g;
    return g->p.stream ? begin_stream(g) : gen_continue(g);
}

enum MHD_Result handle_chat(struct conn *cn)
{
    return generate(cn, DIALECT_CHAT, "chatcmpl-");
}

enum MHD_Result handle_completions(struct conn *cn)
{
    return generate(cn, DIALECT_COMPLETIONS, "cmpl-");
}

enum MHD_Result handle_messages(struct conn *cn)
{
    return generate(cn, DIALECT_CHAT, "msg_");
}
