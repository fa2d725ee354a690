/* A model in this process for the terminal; see session.h. */
#include "arle/session.h"

#include <json-c/json.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "chat/answer.h"
#include "chat/messages.h"
#include "chat/render.h"
#include "http/json_in.h"
#include "util/clock.h"
#include "util/jfield.h"
#include "util/log.h"

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig)
{
    interrupted = 1;
}

/* ---- opening ---- */

/* The last part of the path, without slashes at its end. */
static void base_name(const char *dir, char *out, size_t cap)
{
    char full[PATH_MAX];
    if (realpath(dir, full) == NULL)
        snprintf(full, sizeof full, "%s", dir);
    const char *slash = strrchr(full, '/');
    const char *base = slash != NULL && slash[1] != '\0' ? slash + 1 : full;
    size_t n = strnlen(base, cap - 1);
    memcpy(out, base, n);
    out[n] = '\0';
}

int session_config(const struct args *args, bool with_default, const char *served_name, struct config **out)
{
    struct args *a = (struct args *)(uintptr_t)args;        /* main()'s own variable; presets live in it */
    const char *dir = args_str(a, "model"), *backend = args_str(a, "backend");
    char path[PATH_MAX], name[NAME_MAX + 1] = "";
    struct arle_err err = ARLE_ERR_INIT;
    with_default &= dir == NULL && access(ARLE_SYSCONF_DIR "/arle.ini", R_OK) == 0;
    if (dir == NULL && args_str(a, "config") == NULL && !with_default) {
        if (host_default_model(path, sizeof path, &err) < 0)
            return cmd_fail(a, &err);
        dir = path;
    }
    /* Each preset goes in front of the earlier ones, so the one that makes the model comes last. */
    if (dir != NULL)
        base_name(dir, name, sizeof name);
    const char *dot = dir != NULL ? "." : "";
    if (backend != NULL)
        args_preset(a, "model.%s%sbackend=%s", name, dot, backend);
    if (served_name != NULL)
        args_preset(a, "model.%s%sserved_name=%s", name, dot, served_name);
    if (dir != NULL)
        args_preset(a, "model.%s.path=%s", name, dir);
    return cmd_config(a, with_default, out);
}

int session_open(struct session *s, const struct args *a)
{
    struct arle_err err = ARLE_ERR_INIT;
    size_t n;
    *s = (struct session){ 0 };
    int status = session_config(a, true, NULL, &s->cfg);
    if (status != 0)
        return status;
    if (!config_is_set(s->cfg, "log", "level"))
        log_set_level(ARLE_LOG_WARN);           /* a person reads this terminal */
    if (host_open(&s->host, s->cfg, true, &err) < 0) {
        session_close(s);
        return cmd_fail(a, &err);
    }
    s->m = host_models(s->host, &n)[0];
    return 0;
}

void session_close(struct session *s)
{
    host_close(s->host);
    config_close(s->cfg);
    *s = (struct session){ 0 };
}

/* ---- one answer ---- */

struct run {
    struct answer_text *out;
    chat_event_fn on_text;
    void *arg;
    bool in_call;
};

static void collect(void *arg, const struct chat_event *ev)
{
    struct run *r = arg;
    struct answer_text *t = r->out;
    switch (ev->kind) {
    case CHAT_REASONING:
        sbuf_add(&t->reasoning, ev->text, ev->len);
        break;
    case CHAT_CONTENT:
        sbuf_add(&t->content, ev->text, ev->len);
        break;
    case CHAT_CALL_START:
        sbuf_str(&t->calls, t->calls.n ? ",{\"name\":" : "{\"name\":");
        sbuf_json_str(&t->calls, ev->text, ev->len);
        sbuf_str(&t->calls, ",\"arguments\":");
        break;
    case CHAT_CALL_ARGS:
        sbuf_add(&t->calls, ev->text, ev->len);
        break;
    case CHAT_CALL_END:
        sbuf_char(&t->calls, '}');
        break;
    }
    if (r->on_text != NULL)
        r->on_text(r->arg, ev);
}

void answer_text_fini(struct answer_text *t)
{
    sbuf_fini(&t->content);
    sbuf_fini(&t->reasoning);
    sbuf_fini(&t->calls);
    *t = (struct answer_text){ 0 };
}

static int follow(struct session *s, struct request *rq, struct answer *answer, struct answer_text *out, struct arle_err *err)
{
    struct token_event ev;
    int64_t start = clock_mono_us();
    bool ended = false;
    int r;
    while ((r = request_next(rq, &ev)) >= 0) {
        if (interrupted && !out->interrupted) {
            out->interrupted = true;
            request_cancel(rq);
        }
        if (r == 0) {
            request_wait(rq, 50);
            continue;
        }
        if (ev.kind == EV_TOKEN && !ended) {
            if (out->first_us == 0)
                out->first_us = clock_mono_us() - start;
            if (answer_push(answer, ev.id) < 0)
                return arle_err_set(err, -ENOMEM, "no memory for the answer");
            if (answer->stopped) {
                ended = true;
                request_stop(rq, 0);
            }
        }
        if (ev.kind == EV_FINISH && ev.finish == FINISH_ERROR)
            return arle_err_set(err, ev.error < 0 ? ev.error : -EIO, "the model failed while it answered");
        if (ev.kind == EV_FINISH)
            out->finish = ev.finish == FINISH_CANCELLED ? "interrupted" : answer_finish_name(answer, (enum finish_reason)ev.finish);
    }
    answer_end(answer);
    if (out->finish == NULL || strcmp(out->finish, "stop") == 0)
        out->finish = answer_finish_name(answer, FINISH_STOP);
    out->total_us = clock_mono_us() - start;
    struct request_usage u = { 0 };
    if (request_usage(rq, &u)) {
        out->prompt_tokens = u.prompt_tokens;
        out->completion_tokens = u.completion_tokens;
        out->cached_tokens = u.cached_tokens;
    }
    return 0;
}

static int submit(struct session *s, const struct gen_params *p, const struct prompt *prompt, struct json_object *tools,
                  struct run *run, struct arle_err *err)
{
    struct answer answer;
    struct request *rq = NULL;
    uint32_t context = served_context(s->m), n = (uint32_t)prompt->ids.n;
    if (n >= context)
        return arle_err_set(err, -E2BIG, "the conversation has %u tokens; the model's context length is %u", n, context);
    struct answer_opts o = { .model = s->m, .chat = true, .parse_calls = p->parse_calls, .tools = tools, .stops = p->stops,
                             .starts_in_reasoning = prompt->starts_in_reasoning, .stop_ids = s->m->eos, .n_stop_ids = s->m->n_eos,
                             .fn = collect, .arg = run };
    struct request_args ra = {
        .tokens = prompt->ids.ids, .n_tokens = n, .marks = prompt->marks, .n_marks = prompt->n_marks,
        .max_new = p->max_new < 0 || p->max_new > (int64_t)(context - n) ? context - n : (uint32_t)p->max_new, .n = 1,
        .sampling = p->sampling, .stop_ids = s->m->eos, .n_stop_ids = s->m->n_eos, .tenant = "", .cache_salt = "",
    };
    int retry, r = answer_init(&answer, &o);
    if (r < 0)
        return arle_err_set(err, r, "no memory for the answer");
    r = engine_submit(s->m->engine, &ra, &rq, &retry, err);
    if (r == 0) {
        r = follow(s, rq, &answer, run->out, err);
        request_unref(rq);
    }
    answer_fini(&answer);
    return r;
}

int session_answer(struct session *s, struct json_object *body, chat_event_fn on_text, void *arg, struct answer_text *out,
                   struct arle_err *err)
{
    struct json_object *conversation = NULL, *tools = NULL;
    struct prompt prompt = { 0 };
    struct gen_params p;
    struct run run = { .out = out, .on_text = on_text, .arg = arg };
    struct sigaction act = { .sa_handler = on_interrupt }, before;
    *out = (struct answer_text){ 0 };
    int r = gen_params_read(&p, DIALECT_CHAT, body, &s->m->defaults, served_vocab(s->m), err);
    if (r == 0)
        r = chat_request_from_body(body, s->m->chat_options, p.use_tools, &conversation, err);
    if (r == 0)
        r = prompt_render(&prompt, s->m, "", conversation, err);
    if (r == 0 && p.use_tools)
        json_object_object_get_ex(body, "tools", &tools);
    if (r == 0) {
        interrupted = 0;
        sigaction(SIGINT, &act, &before);
        r = submit(s, &p, &prompt, tools, &run, err);
        sigaction(SIGINT, &before, NULL);
    }
    prompt_fini(&prompt);
    json_object_put(conversation);
    gen_params_fini(&p);
    return r;
}

bool session_sampling(const struct args *a, struct json_object *body)
{
    long long n = -1, seed = -1;
    const char *t = args_str(a, "temperature");
    char *end = NULL;
    if (!args_int(a, "max-tokens", 1, INT32_MAX, -1, &n) || !args_int(a, "seed", 0, INT64_MAX, -1, &seed))
        return false;
    double temperature = t != NULL ? strtod(t, &end) : 0;
    if (t != NULL && (*t == '\0' || *end != '\0' || !(temperature >= 0 && temperature <= 2))) {
        fprintf(stderr, "arle %s: --temperature wants a number between 0 and 2\n", a->cmd->name);
        return false;
    }
    if (t != NULL)
        json_object_object_add(body, "temperature", json_object_new_double(temperature));
    if (n > 0)
        json_object_object_add(body, "max_tokens", json_object_new_int64(n));
    if (seed >= 0)
        json_object_object_add(body, "seed", json_object_new_int64(seed));
    if (args_flag(a, "think")) {
        struct json_object *k = json_object_new_object();
        json_object_object_add(k, "enable_thinking", json_object_new_boolean(true));
        json_object_object_add(body, "chat_template_kwargs", k);
    }
    return true;
}
