/*
 * `arle help`: everything that is written about commands and configuration keys comes from their tables. The hidden topics
 * man-arle, man-ini and completion make the installed files at build time; markdown makes tables of docs/configuration.md.
 */
#include "arle/cmd.h"

#include <string.h>

static int list_commands(void)
{
    puts("usage: arle COMMAND [OPTION]...\nRuns large language models on this machine.\n\ncommands:");
    for (size_t i = 0; commands[i] != NULL; i++)
        printf("  %-10s %s\n", commands[i]->name, commands[i]->summary);
    puts("\narle help COMMAND explains one; arle help keys lists all configuration keys; arle --version.");
    return EXIT_OK;
}

static void help_keys_section(const struct config_section *s)
{
    printf("[%s%s]  %s\n", s->name, s->named ? " NAME" : "", s->help);
    for (const struct arle_conf_key *k = s->keys; k->name != NULL; k++) {
        char type[160];
        printf("  %-18s %s\n  %-18s %s; default %s%s\n", k->name, k->help, "", config_key_type(k, type, sizeof type),
               k->def[0] != '\0' ? k->def : "empty", (k->flags & ARLE_CONF_RELOAD) != 0 ? "; may change while running" : "");
    }
    if (strcmp(s->name, "plugin") == 0) {
        puts("  and for every backend plugin:");
        const struct arle_conf_key *k = config_plugin_keys(ARLE_KIND_BACKEND) + 1;
        char type[160];
        printf("  %-18s %s\n  %-18s %s; default %s\n", k->name, k->help, "", config_key_type(k, type, sizeof type), k->def);
    }
    putchar('\n');
}

static int help_keys(void)
{
    size_t n;
    const struct config_section *t = config_table(&n);
    for (size_t i = 0; i < n; i++)
        help_keys_section(&t[i]);
    return EXIT_OK;
}

/* ---- manual pages ---- */

static void roff(const char *s)
{
    bool line_start = true;
    for (; *s != '\0'; s++) {
        if (line_start && (*s == '.' || *s == '\''))
            fputs("\\&", stdout);
        if (*s == '-' || *s == '\\')
            putchar('\\');
        putchar(*s);
        line_start = *s == '\n';
    }
}

static void roff_common(void)
{
    struct command c = { .name = "", .options = common_options() };
    command_man(stdout, &c);
}

static int man_arle(void)
{
    puts(".TH ARLE 1 \"\" \"arle " ARLE_VERSION "\" \"User Commands\"\n.SH NAME\narle \\- runs large language models on this machine\n"
         ".SH SYNOPSIS\n.B arle\n.I COMMAND\n[\\fIOPTION\\fR]...\n.SH COMMANDS");
    for (size_t i = 0; commands[i] != NULL; i++) {
        const struct command *c = commands[i];
        printf(".SS \"arle ");
        roff(c->name);
        printf("%s", c->args[0] != '\0' ? " " : "");
        roff(c->args);
        puts("\"");
        roff(c->summary);
        putchar('\n');
        if (c->help[0] != '\0') {
            puts(".PP");
            roff(c->help);
            putchar('\n');
        }
        command_man(stdout, c);
    }
    puts(".SH COMMON OPTIONS");
    roff_common();
    puts(".SH EXIT STATUS\n0 ok, 1 failed, 2 wrong usage, 75 the engine died and a supervisor should restart it.\n"
         ".SH FILES\n" ARLE_SYSCONF_DIR "/arle.ini, " ARLE_PLUGIN_DIR "\n.SH SEE ALSO\n"
         ".BR arle.ini (5),\n.BR arled (8),\n.BR arlectl (8)");
    return EXIT_OK;
}

static void man_key(const struct arle_conf_key *k)
{
    char type[160];
    printf(".TP\n.B ");
    roff(k->name);
    putchar('\n');
    roff(k->help);
    puts("");
    roff(config_key_type(k, type, sizeof type));
    printf("; default ");
    roff(k->def[0] != '\0' ? k->def : "empty");
    puts((k->flags & ARLE_CONF_RELOAD) != 0 ? "; may change while running." : ".");
}

static int man_ini(void)
{
    size_t n;
    const struct config_section *t = config_table(&n);
    puts(".TH ARLE.INI 5 \"\" \"arle " ARLE_VERSION "\" \"File Formats\"\n.SH NAME\narle.ini \\- configuration of ARLE\n.SH DESCRIPTION\n"
         "Lines are [SECTION], KEY = VALUE, or comments that begin with # or ; (a ; after a space begins one inside a line, too).\n"
         "Lines hold at most 190 bytes. Unknown sections and keys, values of the wrong type and keys set twice stop the start with\n"
         "file and line. \\fB\\-\\-set\\fR \\fISECTION.KEY=VALUE\\fR on a command line sets any key on top of the file:\n"
         "\\fImodel.NAME.KEY\\fR for models (\\fImodel.KEY\\fR when there is one), \\fIPLUGIN.KEY\\fR for plugins.");
    for (size_t i = 0; i < n; i++) {
        printf(".SH [%s%s]\n", t[i].name, t[i].named ? " NAME" : "");
        roff(t[i].help);
        putchar('\n');
        for (const struct arle_conf_key *k = t[i].keys; k->name != NULL; k++)
            man_key(k);
    }
    puts("And for every backend plugin:");
    man_key(config_plugin_keys(ARLE_KIND_BACKEND) + 1);
    puts(".SH SEE ALSO\n.BR arle (1),\n.BR arled (8)");
    return EXIT_OK;
}

/* ---- the tables of docs/configuration.md ---- */

static void markdown_row(const struct arle_conf_key *k)
{
    char type[160];
    config_key_type(k, type, sizeof type);
    printf("| `%s` | ", k->name);
    for (const char *c = type; *c != '\0'; c++)
        printf("%s%c", *c == '|' ? "\\" : "", *c);
    /* Directories depend on how the program was configured: the page names none. */
    bool place = strcmp(k->def, ARLE_PLUGIN_DIR) == 0;
    printf(" | %s%s%s | %s%s |\n", place || k->def[0] == '\0' ? "" : "`", place ? "the installed one" : k->def,
           place || k->def[0] == '\0' ? "" : "`", k->help, (k->flags & ARLE_CONF_RELOAD) != 0 ? " *May change while running.*" : "");
}

static int markdown(void)
{
    size_t n;
    const struct config_section *t = config_table(&n);
    for (size_t i = 0; i < n; i++) {
        printf("### [%s%s]\n%s\n\n| key | type | default | meaning |\n|---|---|---|---|\n", t[i].name, t[i].named ? " NAME" : "", t[i].help);
        for (const struct arle_conf_key *k = t[i].keys; k->name != NULL; k++)
            markdown_row(k);
        if (i + 1 < n)
            putchar('\n');
    }
    markdown_row(config_plugin_keys(ARLE_KIND_BACKEND) + 1);
    return EXIT_OK;
}

/* ---- completion ---- */

static void words_of_options(const struct command *c)
{
    const struct option_row *tables[] = { c->options, c->bare ? NULL : common_options() };
    for (int t = 0; t < 2; t++) {
        for (const struct option_row *r = tables[t]; r != NULL && r->name != NULL; r++)
            printf("--%s ", r->name);
    }
    if (c->bare)
        printf("--help");
}

/* Options whose value has the form `arg` ("DIR"), as a pattern of case: "-DIR|--a|--b". The first only starts the list. */
static void pattern_of(const char *arg)
{
    printf("    -%s", arg);
    for (size_t i = 0; commands[i] != NULL; i++) {
        const struct option_row *tables[] = { commands[i]->options, i == 0 ? common_options() : NULL };
        for (int t = 0; t < 2; t++) {
            for (const struct option_row *r = tables[t]; r != NULL && r->name != NULL; r++) {
                if (r->arg != NULL && strcmp(r->arg, arg) == 0)
                    printf("|--%s", r->name);
            }
        }
    }
    putchar(')');
}

static int completion(void)
{
    size_t n;
    const struct config_section *t = config_table(&n);
    printf("# bash completion for arle and arled, made from their tables.\n_arle_keys=\"");
    for (size_t i = 0; i < n; i++) {
        for (const struct arle_conf_key *k = t[i].keys; strcmp(t[i].name, "plugin") != 0 && k->name != NULL; k++)
            printf("%s.%s= ", t[i].name, k->name);
    }
    puts("\"\n_arle() {\n    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=\n"
         "    case $prev in\n    --set) COMPREPLY=($(compgen -W \"$_arle_keys\" -- \"$cur\")); compopt -o nospace; return ;;");
    pattern_of("FILE");
    puts(" COMPREPLY=($(compgen -f -- \"$cur\")); return ;;");
    pattern_of("DIR");
    puts(" COMPREPLY=($(compgen -d -- \"$cur\")); return ;;\n    esac\n"
         "    if [ \"${COMP_WORDS[0]##*/}\" = arled ]; then");
    printf("        words=\"--check-config ");
    for (const struct option_row *r = common_options(); r->name != NULL; r++)
        printf("--%s ", r->name);
    printf("\"\n    elif [ $COMP_CWORD = 1 ]; then words=\"");
    for (size_t i = 0; commands[i] != NULL; i++)
        printf("%s ", commands[i]->name);
    puts("\"\n    else case ${COMP_WORDS[1]} in");
    for (size_t i = 0; commands[i] != NULL; i++) {
        printf("        %s) words=\"", commands[i]->name);
        words_of_options(commands[i]);
        puts("\" ;;");
    }
    puts("        esac\n    fi\n    COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
         "    [ ${#COMPREPLY[@]} != 0 ] || COMPREPLY=($(compgen -f -- \"$cur\"))\n}\ncomplete -F _arle arle arled");
    return EXIT_OK;
}

static int run_help(const struct args *args)
{
    static const struct { const char *name; int (*fn)(void); } topics[] = {
        { "keys", help_keys }, { "man-arle", man_arle }, { "man-ini", man_ini }, { "markdown", markdown }, { "completion", completion },
    };
    if (args->n_rest == 0)
        return list_commands();
    for (size_t i = 0; i < sizeof topics / sizeof topics[0]; i++) {
        if (strcmp(args->rest[0], topics[i].name) == 0)
            return topics[i].fn();
    }
    for (size_t i = 0; commands[i] != NULL; i++) {
        if (strcmp(args->rest[0], commands[i]->name) == 0) {
            command_help(stdout, "arle", commands[i]);
            return EXIT_OK;
        }
    }
    fprintf(stderr, "arle help: there is no command or topic %s\n", args->rest[0]);
    return EXIT_USAGE;
}

const struct command cmd_help = {
    .name = "help", .args = "[COMMAND|keys]", .max_args = 1, .summary = "Explains commands and configuration keys.", .help = "",
    .bare = true, .run = run_help,
};
