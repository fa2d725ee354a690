/*
 * The commands of `arle`. Each lives in its own cmd_NAME.c, which exports one `const struct command cmd_NAME`; its row in
 * commands.c is all that main.c, `arle help`, the manual page and completion need.
 * Exit status: 0 ok, 1 failed, 2 usage, 75 the engine died.
 */
#ifndef CORE_ARLE_CMD_H
#define CORE_ARLE_CMD_H

#include "config/config.h"
#include "util/options.h"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_ENGINE_DIED = 75 };

extern const struct command cmd_chat, cmd_bench, cmd_doctor, cmd_help, cmd_kv, cmd_plugins, cmd_run, cmd_serve, cmd_tokenize;

/** All commands in the order of `arle help`; ends with NULL. */
extern const struct command *const commands[];

/** The configuration of the command line. 0, or the exit status after one line on stderr. with_default: /etc/arle.ini when
 *  it exists and --config is absent. */
int cmd_config(const struct args *a, bool with_default, struct config **out);
/** Prints "arle NAME: message" and returns EXIT_FAILED. */
int cmd_fail(const struct args *a, const struct arle_err *err);

#endif
