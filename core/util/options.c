/* See options.h. */
#include "util/options.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static const struct option_row common[] = {
    { "config", 'c', "FILE", "Reads this configuration file, see arle.ini(5)." },
    { "set", 0, "SECTION.KEY=VALUE", "Sets a configuration key on top of the file; may be given often. `arle help keys` lists them." },
    { "plugin-dir", 0, "DIR", "Looks for plugins here; several are separated by colons. Short for --set plugins.dir=DIR." },
    { "help", 'h', NULL, "Prints this text." },
    { NULL, 0, NULL, NULL },
};
static const struct option_row bare[] = {
    { "help", 'h', NULL, "Prints this text." },
    { NULL, 0, NULL, NULL },
};
static const struct option_row none[] = { { NULL, 0, NULL, NULL } };

const struct option_row *common_options(void)
{
    return common;
}

static const struct option_row *own_rows(const struct command *cmd)
{
    return cmd->options != NULL ? cmd->options : none;
}

static const struct option_row *shared_rows(const struct command *cmd)
{
    return cmd->bare ? bare : common;
}

/* Row number over own and shared rows, -1 when there is none. len counts in `name`; letter 0 goes by name. */
static int find_row(const struct command *cmd, const char *name, size_t len, char letter, const struct option_row **out)
{
    int i = 0;
    const struct option_row *tables[] = { own_rows(cmd), shared_rows(cmd) };
    for (int t = 0; t < 2; t++) {
        for (const struct option_row *r = tables[t]; r->name != NULL; r++, i++) {
            bool hit = letter != 0 ? r->letter == letter : strlen(r->name) == len && memcmp(r->name, name, len) == 0;
            if (hit && i < ARGS_MAX_OPTIONS) {
                *out = r;
                return i;
            }
        }
    }
    return -1;
}

static void print_row(FILE *out, const struct option_row *r)
{
    char left[64];
    snprintf(left, sizeof left, "%c%c%s--%s%s%s", r->letter != 0 ? '-' : ' ', r->letter != 0 ? r->letter : ' ',
             r->letter != 0 ? ", " : "  ", r->name, r->arg != NULL ? " " : "", r->arg != NULL ? r->arg : "");
    if (strlen(left) > 30)
        fprintf(out, "  %s\n%34s%s\n", left, "", r->help);
    else
        fprintf(out, "  %-30s  %s\n", left, r->help);
}

static void usage_line(FILE *out, const char *program, const struct command *cmd)
{
    bool sub = strcmp(program, cmd->name) != 0;
    fprintf(out, "usage: %s%s%s [OPTION]...%s%s\n", program, sub ? " " : "", sub ? cmd->name : "", cmd->args[0] != '\0' ? " " : "",
            cmd->args);
}

void command_help(FILE *out, const char *program, const struct command *cmd)
{
    usage_line(out, program, cmd);
    fprintf(out, "%s\n", cmd->summary);
    if (cmd->help[0] != '\0')
        fprintf(out, "\n%s\n", cmd->help);
    fputs("\noptions:\n", out);
    for (const struct option_row *r = own_rows(cmd); r->name != NULL; r++)
        print_row(out, r);
    for (const struct option_row *r = shared_rows(cmd); r->name != NULL; r++)
        print_row(out, r);
}

/* Roff takes '-' for a hyphen and a leading '.' for a request. */
static void roff_text(FILE *out, const char *s)
{
    for (; *s != '\0'; s++) {
        if (*s == '-' || *s == '\\')
            fputc('\\', out);
        fputc(*s, out);
    }
}

void command_man(FILE *out, const struct command *cmd)
{
    for (const struct option_row *r = own_rows(cmd); r->name != NULL; r++) {
        fputs(".TP\n\\fB", out);
        if (r->letter != 0)
            fprintf(out, "\\-%c\\fR, \\fB", r->letter);
        fputs("\\-\\-", out);
        roff_text(out, r->name);
        fprintf(out, "\\fR%s\\fI", r->arg != NULL ? " " : "");
        roff_text(out, r->arg != NULL ? r->arg : "");
        fputs("\\fR\n", out);
        roff_text(out, r->help);
        fputc('\n', out);
    }
}

static enum args_outcome usage(const char *program, const struct command *cmd, const char *what, const char *word)
{
    bool sub = strcmp(program, cmd->name) != 0;
    fprintf(stderr, "%s%s%s: %s %s (see %s%s%s --help)\n", program, sub ? " " : "", sub ? cmd->name : "", what, word, program,
            sub ? " " : "", sub ? cmd->name : "");
    return ARGS_USAGE;
}

static bool add_set(struct args *a, const char *set, bool first)
{
    if (a->n_sets == ARGS_MAX_SETS)
        return false;
    if (first)
        memmove(a->sets + 1, a->sets, a->n_sets * sizeof a->sets[0]);
    a->sets[first ? 0 : a->n_sets] = set;
    a->n_sets++;
    return true;
}

static const char *own(struct args *a, const char *fmt, va_list ap)
{
    char *s = NULL;
    if (a->n_owned == ARGS_MAX_SETS || vasprintf(&s, fmt, ap) < 0)
        return NULL;
    return a->owned[a->n_owned++] = s;
}

static bool store(struct args *a, int i, const struct option_row *r, const char *value)
{
    a->value[i] = value;
    if (a->cmd->bare)
        return true;
    if (r == &common[1])
        return add_set(a, value, false);
    if (r == &common[2]) {
        char *s = NULL;
        if (a->n_owned == ARGS_MAX_SETS || asprintf(&s, "plugins.dir=%s", value) < 0)
            return false;
        a->owned[a->n_owned++] = s;
        return add_set(a, s, false);
    }
    return true;
}

/* One option at argv[*at]; moves *at over a value taken from the next argument. */
static enum args_outcome take(struct args *a, const char *program, int argc, char **argv, int *at)
{
    const char *arg = argv[*at], *value = NULL;
    const struct option_row *r = NULL;
    int i;
    if (arg[1] == '-') {
        size_t len = strcspn(arg + 2, "=");
        i = find_row(a->cmd, arg + 2, len, 0, &r);
        value = arg[2 + len] == '=' ? arg + 3 + len : NULL;
    } else {
        i = find_row(a->cmd, NULL, 0, arg[1], &r);
        value = arg[2] != '\0' ? arg + 2 : NULL;
    }
    if (i < 0)
        return usage(program, a->cmd, "unknown option", arg);
    if (r->arg == NULL && value != NULL)
        return usage(program, a->cmd, "no value goes with", arg);
    if (r->arg != NULL && value == NULL) {
        if (*at + 1 >= argc)
            return usage(program, a->cmd, "value is missing after", arg);
        value = argv[++*at];
    }
    return store(a, i, r, value != NULL ? value : "") ? ARGS_RUN : usage(program, a->cmd, "too many of", arg);
}

enum args_outcome args_parse(struct args *a, const char *program, const struct command *cmd, int argc, char **argv)
{
    memset(a, 0, sizeof *a);
    a->cmd = cmd;
    a->rest = calloc((size_t)argc + 1, sizeof *a->rest);
    if (a->rest == NULL)
        return usage(program, cmd, "no memory for", "the command line");
    bool only_rest = false;
    for (int i = 1; i < argc; i++) {
        if (only_rest || argv[i][0] != '-' || argv[i][1] == '\0') {
            a->rest[a->n_rest++] = argv[i];
        } else if (strcmp(argv[i], "--") == 0) {
            only_rest = true;
        } else {
            enum args_outcome o = take(a, program, argc, argv, &i);
            if (o != ARGS_RUN)
                return o;
            if (args_flag(a, "help")) {
                command_help(stdout, program, cmd);
                return ARGS_DONE;
            }
        }
    }
    if (cmd->max_args >= 0 && a->n_rest > cmd->max_args)
        return usage(program, cmd, "unexpected argument", a->rest[cmd->max_args]);
    return ARGS_RUN;
}

void args_fini(struct args *a)
{
    for (size_t i = 0; i < a->n_owned; i++)
        free(a->owned[i]);
    free(a->rest);
    memset(a, 0, sizeof *a);
}

const char *args_str(const struct args *a, const char *name)
{
    const struct option_row *r;
    int i = find_row(a->cmd, name, strlen(name), 0, &r);
    if (i < 0) {
        fprintf(stderr, "bug: command %s has no option --%s\n", a->cmd->name, name);
        abort();
    }
    return a->value[i];
}

bool args_flag(const struct args *a, const char *name)
{
    return args_str(a, name) != NULL;
}

bool args_int(const struct args *a, const char *name, long long lo, long long hi, long long otherwise, long long *out)
{
    const char *s = args_str(a, name);
    char *end;
    *out = otherwise;
    if (s == NULL)
        return true;
    errno = 0;
    long long v = strtoll(s, &end, 10);
    if (errno != 0 || end == s || *end != '\0' || v < lo || v > hi) {
        fprintf(stderr, "%s: --%s %s: wants a whole number from %lld to %lld\n", a->cmd->name, name, s, lo, hi);
        return false;
    }
    *out = v;
    return true;
}

void args_preset(struct args *a, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    const char *s = own(a, fmt, ap);
    va_end(ap);
    if (s == NULL || !add_set(a, s, true)) {
        fputs("no memory for the command line\n", stderr);
        abort();
    }
}
