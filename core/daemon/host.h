/*
 * Start and stop in one place: configuration -> plugins -> engines -> served models. arled, `arle serve`, `arle run` and
 * `arle bench` all begin here, so that a model behaves the same under each of them.
 */
#ifndef CORE_DAEMON_HOST_H
#define CORE_DAEMON_HOST_H

#include "chat/served.h"
#include "config/config.h"
#include "http/server.h"
#include "plugin/registry.h"

struct host;

/**
 * Opens the registry and every model of cfg (borrowed for the life of the host). Starts threads; call it from a process
 * that has none yet. progress writes a line on the terminal while weights load. A model with required = no that cannot be
 * opened is logged and left out; no model at all is -ENOENT.
 */
int host_open(struct host **out, const struct config *cfg, bool progress, struct arle_err *err);

struct served_model *const *host_models(const struct host *h, size_t *n);
struct registry *host_registry(const struct host *h);
/** True once an engine's device is dead; reason (cap bytes) says why. */
bool host_dead(const struct host *h, char *reason, size_t cap);
/** Stops admission and lets requests finish until the deadline. Returns how many were cut off. */
int host_drain(struct host *h, int64_t deadline_ms);
void host_close(struct host *h);        /* takes NULL */

/** The HTTP options of a configuration. *keys_text holds the keys and belongs to the caller (host_forget_keys). */
int host_http_options(const struct config *cfg, struct http_options *out, char **keys_text, struct arle_err *err);
void host_forget_keys(char *keys_text);

/**
 * The model that a program uses when none is named: models/DEFAULT of the data directory, or of $ARLE_MODELS. Writes a path
 * that holds a config.json. -ENOENT says where it looked.
 */
int host_default_model(char *out, size_t cap, struct arle_err *err);

#endif
