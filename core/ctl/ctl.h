/*
 * The control socket: a versioned line protocol between arlectl and a running daemon.
 *
 *   request   "1 COMMAND [ARGUMENT]...\n"          one line, at most 4096 bytes
 *   reply     "1 ok LENGTH\n" and LENGTH bytes of JSON, or "1 error MESSAGE\n"; then the next request
 *
 * The socket belongs to the daemon's user (mode 0600), and only that user and root are answered.
 */
#ifndef CORE_CTL_CTL_H
#define CORE_CTL_CTL_H

#include <arle/err.h>

#include "util/sbuf.h"

#define CTL_VERSION 1
#define CTL_MAX_LINE 4096

struct ctl_server;

/** Answers one command: JSON into `out`, or a negative errno with err. Runs on the control thread. */
typedef int (*ctl_handler_fn)(void *arg, const char *command, const char *argument, struct sbuf *out, struct arle_err *err);

/** Opens the socket (a stale one is replaced) and starts its thread. */
int ctl_start(struct ctl_server **out, const char *path, ctl_handler_fn handler, void *arg, struct arle_err *err);
/** Ends the thread and removes the socket. NULL is fine. */
void ctl_stop(struct ctl_server *ctl);

/** Splits a request line. 0; -EPROTO: not this protocol or another version; -EINVAL: no command. Changes `line`. */
int ctl_parse(char *line, const char **command, const char **argument, struct arle_err *err);

/** Sends one command to the daemon at `path` and returns its JSON. -EREMOTEIO: the daemon's own refusal. */
int ctl_ask(const char *path, const char *command, struct sbuf *out, struct arle_err *err);

/** Where the socket is when nobody says: for the daemon (to make it) or for a client (the first that exists). "" if nowhere. */
void ctl_default_path(char *out, size_t cap, bool client);

#endif
