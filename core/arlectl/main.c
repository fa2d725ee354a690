/* arlectl: the operator's view of a running daemon, over its control socket. */
#include <json-c/json.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ctl/ctl.h"
#include "util/options.h"

static const struct option_row options[] = {
    { "socket", 's', "PATH", "Control socket of the daemon; otherwise $ARLE_CONTROL, /run/arle/control.sock, then XDG_RUNTIME_DIR." },
    { "json", 0, NULL, "Prints the daemon's answer as it is." },
    { "count", 'n', "N", "With top: stops after N pictures." },
    { NULL, 0, NULL, NULL },
};

static const char *const words[] = { "status", "models", "plugins", "kv", "config", "drain", "reload", "cancel", "top", NULL };

static bool known(const char *word)
{
    for (int i = 0; words[i] != NULL; i++)
        if (strcmp(words[i], word) == 0)
            return true;
    return false;
}

static int ask(const char *path, const char *line, struct json_object **out)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct sbuf text = SBUF_INIT;
    int r = ctl_ask(path, line, &text, &err);
    if (r == 0 && (*out = json_tokener_parse(sbuf_text(&text))) == NULL)
        r = arle_err_set(&err, -EPROTO, "the daemon's answer is not JSON");
    sbuf_fini(&text);
    if (r < 0)
        fprintf(stderr, "arlectl: %s\n", err.msg);
    return r;
}

/* ---- for people ---- */

static const char *scalar(struct json_object *v)
{
    return v == NULL ? "-" : json_object_is_type(v, json_type_string) ? json_object_get_string(v)
                                                                     : json_object_to_json_string_ext(v, JSON_C_TO_STRING_PLAIN);
}

/* Rows of objects as columns; all rows have the keys of the first. */
static void print_table(struct json_object *rows, const char *indent)
{
    size_t n = json_object_array_length(rows);
    if (n == 0) {
        printf("%snone\n", indent);
        return;
    }
    json_object_object_foreach(json_object_array_get_idx(rows, 0), name, unused) {
        (void)unused;
        printf("%s%-14s", indent, name);
        for (size_t i = 0; i < n; i++) {
            struct json_object *v = NULL;
            json_object_object_get_ex(json_object_array_get_idx(rows, i), name, &v);
            printf("  %-24s", scalar(v));
        }
        putchar('\n');
    }
}

static void print_answer(struct json_object *o)
{
    struct json_object *v;
    if (json_object_is_type(o, json_type_array)) {
        print_table(o, "");
    } else if (json_object_object_get_ex(o, "config", &v)) {
        fputs(json_object_get_string(v), stdout);
    } else {
        json_object_object_foreach(o, name, value) {
            if (json_object_is_type(value, json_type_array) && json_object_array_length(value) > 0 &&
                json_object_is_type(json_object_array_get_idx(value, 0), json_type_object)) {
                printf("%s:\n", name);
                print_table(value, "  ");
            } else {
                printf("%-18s %s\n", name, scalar(value));
            }
        }
    }
}

/* Plugins read better one per line than as columns. */
static void print_plugins(struct json_object *list)
{
    for (size_t i = 0; i < json_object_array_length(list); i++) {
        struct json_object *p = json_object_array_get_idx(list, i), *state = NULL, *name = NULL, *version = NULL, *detail = NULL;
        json_object_object_get_ex(p, "state", &state);
        json_object_object_get_ex(p, "name", &name);
        json_object_object_get_ex(p, "version", &version);
        json_object_object_get_ex(p, "detail", &detail);
        printf("%-8s %-20s %-8s %s\n", scalar(state), scalar(name), scalar(version), scalar(detail));
    }
}

static int top(const char *path, long long count)
{
    bool terminal = isatty(STDOUT_FILENO);
    for (long long i = 0; count == 0 || i < count; i++) {
        struct json_object *o = NULL;
        if (i > 0)
            sleep(1);
        if (ask(path, "status", &o) < 0)
            return 1;
        if (terminal)
            fputs("\033[H\033[2J", stdout);
        print_answer(o);
        fflush(stdout);
        json_object_put(o);
    }
    return 0;
}

/* ---- command line ---- */

static int run(const struct args *a)
{
    char path[PATH_MAX], line[CTL_MAX_LINE];
    const char *word = a->n_rest > 0 ? a->rest[0] : "status";
    long long count = 0;
    bool cancel = strcmp(word, "cancel") == 0, kv = strcmp(word, "kv") == 0;
    if (!known(word)) {
        fprintf(stderr, "arlectl: unknown command %s (see arlectl --help)\n", word);
        return 2;
    }
    if (!kv && a->n_rest != (a->n_rest == 0 ? 0 : cancel ? 2 : 1)) {
        fprintf(stderr, cancel ? "arlectl: cancel wants the id of a generation\n" : "arlectl: %s takes no argument\n", word);
        return 2;
    }
    if (!args_int(a, "count", 1, 1000000, 0, &count))
        return 2;
    if (args_str(a, "socket") != NULL)
        snprintf(path, sizeof path, "%s", args_str(a, "socket"));
    else
        ctl_default_path(path, sizeof path, true);
    if (path[0] == '\0') {
        fprintf(stderr, "arlectl: no control socket found; name it with --socket\n");
        return 1;
    }
    if (strcmp(word, "top") == 0)
        return top(path, count);
    size_t len = (size_t)snprintf(line, sizeof line, "%s", word);
    for (int i = 1; i < (int)a->n_rest && len < sizeof line; i++)
        len += (size_t)snprintf(line + len, sizeof line - len, " %s", a->rest[i]);
    if (len >= sizeof line) {
        fprintf(stderr, "arlectl: the command is too long\n");
        return 2;
    }
    struct json_object *o = NULL;
    if (ask(path, line, &o) < 0)
        return 1;
    if (args_flag(a, "json"))
        puts(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
    else if (strcmp(word, "plugins") == 0)
        print_plugins(o);
    else
        print_answer(o);
    json_object_put(o);
    return 0;
}

static const struct command arlectl_command = {
    .name = "arlectl", .args = "[COMMAND]", .max_args = 4, .bare = true,
    .summary = "Looks after a running arled.",
    .help = "commands:\n"
            "  status       what runs now (default)\n"
            "  models       models, with their sizes\n"
            "  plugins      plugins, with the reasons of refusals\n"
            "  kv [stat]    pages, state slots, the prefix cache and its tiers\n"
            "  kv verify    read every byte of the disk tier and compare checksums\n"
            "  kv flush     forget every computed prefix that nobody uses and no pin holds\n"
            "  kv warm FILE [TENANT]  compute the prompt of a chat request, whose body is in FILE\n"
            "  kv pin FILE [TENANT]   like warm, and keep it in the cache; the last to go when room is short\n"
            "  kv unpin FILE [TENANT] | all   end that pin, or all of them\n"
            "  config       the configuration in force\n"
            "  drain        stop taking requests, finish those that run, exit\n"
            "  reload       read the configuration again; says what needs a restart\n"
            "  cancel ID    end a generation; status lists the ids\n"
            "  top          status once a second\n",
    .options = options, .run = run,
};

int main(int argc, char **argv)
{
    struct args args;
    enum args_outcome o = args_parse(&args, "arlectl", &arlectl_command, argc, argv);
    int status = o == ARGS_RUN ? run(&args) : o == ARGS_DONE ? 0 : 2;
    args_fini(&args);
    return status;
}
