/* `arle chat`, and `arle` alone: a conversation at the terminal. */
#include <json-c/json.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arle/session.h"
#include "config.h"

#ifdef HAVE_LIBEDIT
#include <editline/readline.h>
#endif

/* One line without its newline; NULL at the end of input. The caller frees it. */
static char *read_line(const char *prompt)
{
#ifdef HAVE_LIBEDIT
    if (isatty(STDIN_FILENO)) {
        char *line = readline(prompt);
        if (line != NULL && *line != '\0')
            add_history(line);
        return line;
    }
#endif
    char *line = NULL;
    size_t cap = 0;
    if (isatty(STDIN_FILENO)) {
        fputs(prompt, stdout);
        fflush(stdout);
    }
    ssize_t n = getline(&line, &cap, stdin);
    if (n < 0) {
        free(line);
        return NULL;
    }
    line[strcspn(line, "\n")] = '\0';
    return line;
}

static void print_text(void *arg, const struct chat_event *ev)
{
    int *last = arg;
    bool terminal = isatty(STDOUT_FILENO);
    if (terminal && ev->kind == CHAT_REASONING && *last != CHAT_REASONING)
        fputs("\033[2m", stdout);
    if (ev->kind != CHAT_REASONING && *last == CHAT_REASONING)
        fputs(terminal ? "\033[0m\n" : "\n", stdout);
    fwrite(ev->text, 1, ev->len, stdout);
    fflush(stdout);
    *last = ev->kind;
}

static void add_message(struct json_object *messages, const char *role, const char *text)
{
    struct json_object *m = json_object_new_object();
    json_object_object_add(m, "role", json_object_new_string(role));
    json_object_object_add(m, "content", json_object_new_string(text));
    json_object_array_add(messages, m);
}

/* One turn; the answer joins the conversation unless it failed. */
static bool turn(struct session *s, const struct args *a, struct json_object *messages, const char *line)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct answer_text t = { 0 };
    struct json_object *body = json_object_new_object();
    int last = 0;
    size_t n = json_object_array_length(messages);
    add_message(messages, "user", line);
    json_object_object_add(body, "messages", json_object_get(messages));
    bool ok = session_sampling(a, body);
    if (ok && session_answer(s, body, print_text, &last, &t, &err) < 0) {
        fprintf(stderr, "arle chat: %s\n", err.msg);
        json_object_array_del_idx(messages, n, 1);
    } else if (ok) {
        puts(t.interrupted ? "\n[stopped]" : "");
        add_message(messages, "assistant", sbuf_text(&t.content));
    }
    answer_text_fini(&t);
    json_object_put(body);
    return ok;
}

static const char help_text[] = "/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer.";

static int talk(struct session *s, const struct args *a)
{
    const char *system = args_str(a, "system");
    struct json_object *messages = json_object_new_array();
    if (isatty(STDIN_FILENO))
        printf("%s. %s\n", s->m->name, help_text);
    if (system != NULL)
        add_message(messages, "system", system);
    int status = EXIT_OK;
    for (char *line; status == EXIT_OK && (line = read_line("> ")) != NULL; free(line)) {
        if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) {
            free(line);
            break;
        }
        if (strcmp(line, "/new") == 0)
            json_object_array_del_idx(messages, 0, json_object_array_length(messages));
        else if (line[0] == '/')
            puts(help_text);
        else if (line[0] != '\0' && !turn(s, a, messages, line))
            status = EXIT_USAGE;
        char reason[300];
        if (host_dead(s->host, reason, sizeof reason)) {
            fprintf(stderr, "arle chat: %s\n", reason);
            status = EXIT_ENGINE_DIED;
        }
    }
    json_object_put(messages);
    return status;
}

static int run_chat(const struct args *a)
{
    struct session s;
    int status = session_open(&s, a);
    if (status != 0)
        return status;
    status = talk(&s, a);
    session_close(&s);
    return status;
}

static const struct option_row options[] = {
    { "system", 0, "TEXT", "System text." },
    MODEL_OPTIONS, SAMPLING_OPTIONS,
    { NULL, 0, NULL, NULL },
};

const struct command cmd_chat = {
    .name = "chat", .args = "", .max_args = 0,
    .summary = "Talks with a model; what arle does without a command.",
    .help = "The model runs in this process; no daemon is needed.\n",
    .options = options, .run = run_chat,
};
