/* The kv commands of the control socket: what the prefix cache holds, and what an operator does to it. */
#ifndef CORE_DAEMON_KV_COMMAND_H
#define CORE_DAEMON_KV_COMMAND_H

#include "daemon/host.h"
#include "util/sbuf.h"

/**
 * argument: "" or "stat", "verify", "flush", "warm FILE [TENANT]", "pin FILE [TENANT]", "unpin FILE [TENANT]", "unpin all". JSON into
 * out. Runs on the control thread, which waits for flush, warm and the pins, and reads the whole disk tier for verify. -EINVAL: no
 * such command; others with the reason.
 */
int kv_command(struct host *h, const char *disk_dir, const char *argument, struct sbuf *out, struct arle_err *err);

#endif
