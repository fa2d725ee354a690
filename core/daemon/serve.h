/*
 * A server from start to exit: signals, models, HTTP, control socket, drain. arled and `arle serve` are this with different
 * ways to get a configuration.
 */
#ifndef CORE_DAEMON_SERVE_H
#define CORE_DAEMON_SERVE_H

#include "config/config.h"

struct serve_opts {
    const char *program;            /* for messages */
    const char *const *sets; size_t n_sets;     /* what came on top of the file, for reload */
    bool banner;                    /* say on stderr where to reach it */
};

/**
 * Serves until SIGTERM or SIGINT (drains within server.drain_deadline) or until a device dies. SIGHUP reloads. *cfg is
 * replaced by a reload and belongs to the caller. Returns the exit status: 0, 1 (could not start), 75 (device died).
 */
int serve(struct config **cfg, const struct serve_opts *opts);

#endif
