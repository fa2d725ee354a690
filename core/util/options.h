/*
 * Command lines from tables: one row per option feeds the parser, --help, the manual pages and completion. Used by all
 * programs, so that --config, --set, --plugin-dir and --help mean the same everywhere.
 */
#ifndef CORE_UTIL_OPTIONS_H
#define CORE_UTIL_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

struct option_row {
    const char *name;           /* without dashes; NULL ends a table */
    char letter;                /* 0: none */
    const char *arg;            /* "FILE"; NULL: a flag */
    const char *help;           /* one sentence */
};

struct args;

struct command {
    const char *name;           /* "serve"; the program's name when it has no subcommands */
    const char *args;           /* positional arguments for people: "[FILE.so]"; "" if none */
    int max_args;               /* how many of them are accepted, -1 any number */
    const char *summary;        /* one line for lists */
    const char *help;           /* paragraphs for --help and the manual page; "" if none */
    const struct option_row *options;
    bool bare;                  /* without the common options --config, --set and --plugin-dir */
    int (*run)(const struct args *args);    /* returns the exit status */
};

enum { ARGS_MAX_OPTIONS = 48, ARGS_MAX_SETS = 256 };

struct args {
    const struct command *cmd;
    const char *value[ARGS_MAX_OPTIONS];    /* by row: own options, then common ones; "" for a flag that is given */
    const char *sets[ARGS_MAX_SETS];        /* --set and --plugin-dir, in order, as config_open wants them */
    size_t n_sets;
    char *owned[ARGS_MAX_SETS];             /* strings that sets point to */
    size_t n_owned;
    char **rest;                            /* positional arguments */
    int n_rest;
};

enum args_outcome { ARGS_RUN = 0, ARGS_DONE, ARGS_USAGE };

/**
 * Parses argv[1..]. program: "arle" or "arled", for messages ("arle serve: ..."). ARGS_DONE: --help was printed, exit 0.
 * ARGS_USAGE: a line on stderr says what is wrong, exit 2. An option's value may be --name=VALUE or the next argument.
 */
enum args_outcome args_parse(struct args *a, const char *program, const struct command *cmd, int argc, char **argv);
void args_fini(struct args *a);
/** Value of --name, NULL when it was not given. Asking for a row that is not in the table is a bug and aborts. */
const char *args_str(const struct args *a, const char *name);
bool args_flag(const struct args *a, const char *name);
/** Whole number within [lo, hi], or `otherwise` when not given; prints and returns false when it is no such number. */
bool args_int(const struct args *a, const char *name, long long lo, long long hi, long long otherwise, long long *out);
/** Adds SECTION.KEY=VALUE before all others from the command line (made with printf). */
void args_preset(struct args *a, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

void command_help(FILE *out, const char *program, const struct command *cmd);
/** The options of cmd as manual page text: .TP paragraphs. */
void command_man(FILE *out, const struct command *cmd);
const struct option_row *common_options(void);

#endif
