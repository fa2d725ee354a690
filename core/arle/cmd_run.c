/* `arle run`: one question, one answer, on standard output. */
#include <json-c/json.h>
#include <string.h>
#include <unistd.h>

#include "arle/session.h"

static void print_text(void *arg, const struct chat_event *ev)
{
    int *last = arg;
    bool terminal = isatty(STDOUT_FILENO);
    if (ev->kind == CHAT_REASONING && terminal && *last != CHAT_REASONING)
        fputs("\033[2m", stdout);
    if (ev->kind != CHAT_REASONING && *last == CHAT_REASONING)
        fputs(terminal ? "\033[0m\n\n" : "\n\n", stdout);
    if (ev->kind == CHAT_CALL_START)
        fprintf(stdout, "%s[%.*s ", *last ? "\n" : "", (int)ev->len, ev->text);
    else
        fwrite(ev->text, 1, ev->len, stdout);
    if (ev->kind == CHAT_CALL_END)
        fputs("]\n", stdout);
    fflush(stdout);
    *last = ev->kind;
}

static void print_json(const struct session *s, const struct answer_text *t)
{
    struct sbuf b = SBUF_INIT;
    sbuf_str(&b, "{\"model\":");
    sbuf_json_cstr(&b, s->m->name);
    sbuf_str(&b, ",\"content\":");
    sbuf_json_str(&b, sbuf_text(&t->content), t->content.n);
    sbuf_str(&b, ",\"reasoning_content\":");
    sbuf_json_str(&b, sbuf_text(&t->reasoning), t->reasoning.n);
    sbuf_fmt(&b, ",\"tool_calls\":[%s],\"finish_reason\":\"%s\",\"usage\":{\"prompt_tokens\":%u,\"completion_tokens\":%u,"
             "\"cached_tokens\":%u},\"first_token_ms\":%.3f,\"total_ms\":%.3f}", sbuf_text(&t->calls), t->finish, t->prompt_tokens,
             t->completion_tokens, t->cached_tokens, (double)t->first_us / 1000, (double)t->total_us / 1000);
    puts(sbuf_text(&b));
    sbuf_fini(&b);
}

static int ask(struct session *s, const struct args *a, const char *prompt)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct answer_text t = { 0 };
    int last = 0, status = EXIT_OK;
    bool json = args_flag(a, "json");
    const char *system = args_str(a, "system");
    struct json_object *body = json_object_new_object(), *messages = json_object_new_array();
    for (int i = system == NULL; i < 2; i++) {
        struct json_object *m = json_object_new_object();
        json_object_object_add(m, "role", json_object_new_string(i == 0 ? "system" : "user"));
        json_object_object_add(m, "content", json_object_new_string(i == 0 ? system : prompt));
        json_object_array_add(messages, m);
    }
    json_object_object_add(body, "messages", messages);
    if (!session_sampling(a, body))
        status = EXIT_USAGE;
    else if (session_answer(s, body, json ? NULL : print_text, &last, &t, &err) < 0)
        status = host_dead(s->host, err.msg, sizeof err.msg) ? (cmd_fail(a, &err), EXIT_ENGINE_DIED) : cmd_fail(a, &err);
    else if (json)
        print_json(s, &t);
    else
        putchar('\n');
    answer_text_fini(&t);
    json_object_put(body);
    return status;
}

static int read_stdin(struct sbuf *text)
{
    char buf[8192];
    size_t n;
    while ((n = fread(buf, 1, sizeof buf, stdin)) > 0)
        sbuf_add(text, buf, n);
    while (text->n > 0 && text->p[text->n - 1] == '\n')
        text->p[--text->n] = '\0';
    return text->failed || ferror(stdin) ? -1 : 0;
}

static int run_run(const struct args *a)
{
    struct session s;
    struct sbuf typed = SBUF_INIT;
    const char *prompt = args_str(a, "prompt");
    if (prompt == NULL && a->n_rest > 0)
        prompt = a->rest[0];
    if (prompt == NULL && !isatty(STDIN_FILENO) && read_stdin(&typed) == 0 && typed.n > 0)
        prompt = typed.p;
    if (prompt == NULL) {
        fprintf(stderr, "arle run: give the question with --prompt, or on standard input\n");
        return EXIT_USAGE;
    }
    int status = session_open(&s, a);
    if (status == 0) {
        status = ask(&s, a, prompt);
        session_close(&s);
    }
    sbuf_fini(&typed);
    return status;
}

static const struct option_row options[] = {
    { "prompt", 'p', "TEXT", "The question; otherwise the first argument, or standard input." },
    { "system", 0, "TEXT", "System text." },
    { "json", 0, NULL, "Prints the answer, its tokens and times as one JSON object." },
    MODEL_OPTIONS, SAMPLING_OPTIONS,
    { NULL, 0, NULL, NULL },
};

const struct command cmd_run = {
    .name = "run", .args = "[TEXT]", .max_args = 1,
    .summary = "Answers one question.",
    .help = "The model runs in this process; no daemon is needed. Ctrl-C stops the answer.\n",
    .options = options, .run = run_run,
};
