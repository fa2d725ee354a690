/*
 * The HTTP server: libmicrohttpd's threads parse, validate, tokenise and write; tokens come from the engines by rings.
 * The daemon and `arle serve` start one over the models that they opened.
 */
#ifndef ARLE_HTTP_SERVER_H
#define ARLE_HTTP_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <arle/err.h>

struct served_model;
struct http_server;

/* All strings are copied. */
struct http_options {
    const char *listen;             /* HOST:PORT, [IPV6]:PORT or unix:PATH; port 0 takes a free one */
    bool force_open;                /* allow an address beyond loopback without keys */
    uint32_t threads;               /* 0: one per two processors */
    uint32_t max_connections;
    int64_t idle_timeout_ms;
    /* These may change while it runs: http_server_update. */
    uint64_t max_body;
    int64_t deadline_ms, keepalive_ms;
    const char *cors;               /* origins separated by spaces, "*", or "" */
    const char *keys;               /* KEY or TENANT:KEY, separated by white space; "" needs no key */
    bool log_requests;
};

/**
 * Opens the port and starts the threads. models [n_models] are borrowed until http_server_stop.
 * -EACCES: beyond loopback without a key; -EADDRINUSE and other errno of the socket; -EINVAL: `listen`.
 */
int http_server_start(struct http_server **out, const struct http_options *opts, struct served_model *const *models,
                      size_t n_models, struct arle_err *err);

/** The address in use as URL, with the real port: "http://127.0.0.1:43121". Lives with the server. */
const char *http_server_url(const struct http_server *srv);

/** Takes over what may change while running; requests in flight keep what they began with. Any thread. */
int http_server_update(struct http_server *srv, const struct http_options *opts, struct arle_err *err);

/** From now on /ready says 503 and new generation requests get 503. Any thread. */
void http_server_drain(struct http_server *srv);

/** Requests that are being answered now (generation endpoints only). Any thread. */
uint32_t http_server_running(const struct http_server *srv);

/** Appends a JSON array of the generations in progress: id, model, path, prompt, age_ms. Any thread. */
struct sbuf;
void http_server_list(struct http_server *srv, struct sbuf *out);

/** Cancels the generation with that id (X-Request-Id). -ENOENT: none. Any thread. */
int http_server_cancel(struct http_server *srv, const char *id);

/** Ends all connections and threads. Requests that still run are cancelled. Call after the engines were drained. */
void http_server_stop(struct http_server *srv);

/** Frees a stopped server. Call after the engines are closed: a late notify may still touch its wakers. NULL is fine. */
void http_server_destroy(struct http_server *srv);

#endif
