/*
 * What the files of the HTTP server share: server, connection, waker. Not for others.
 *
 * A request lives in one struct conn from its first byte to MHD's completion callback. A handler that has to wait for
 * tokens suspends the connection; whoever has news calls waker_wake().
 */
#ifndef ARLE_HTTP_INTERNAL_H
#define ARLE_HTTP_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include <microhttpd.h>

#include "chat/served.h"
#include "http/server.h"
#include "util/sbuf.h"

struct conn;
struct gen;

/* ---- wakers ---- */

/*
 * Between an engine and a suspended connection. Wakers are recycled and freed only with the server, so that a notify that
 * comes late wakes somebody for nothing at worst, and never touches freed memory.
 */
struct waker {
    pthread_mutex_t mu;         /* guards everything but the links */
    struct MHD_Connection *c;   /* NULL while nobody uses it */
    int fd;
    bool suspended;
    bool pending;               /* woken while not suspended */
    bool hangup;                /* the client has gone */
    bool ping;                  /* a silent stream is due for a comment */
    bool stream;
    int64_t last_us;            /* last time that something was written */
    struct waker *next_free;    /* guarded by http_server.wakers_mu */
    struct waker *next_all;
};

struct waker *waker_take(struct http_server *srv, struct MHD_Connection *c);
void waker_give(struct http_server *srv, struct waker *w);
void waker_wake(void *waker);               /* the engine's notify */
/** Suspends, unless it was woken since the last call; then returns false and the caller looks again. */
bool waker_sleep(struct waker *w);

/* ---- settings that may change, counted ---- */

struct api_key {
    char *tenant, *key;
};

struct settings {
    atomic_uint refs;
    uint64_t max_body;
    int64_t deadline_ms, keepalive_ms;
    char *cors;
    char *keys_text;            /* what the keys point into */
    struct api_key *keys; size_t n_keys;
    bool log_requests;
};

struct settings *settings_ref(struct http_server *srv);
void settings_unref(struct settings *s);
int settings_create(struct settings **out, const struct http_options *opts, struct arle_err *err);

/* ---- server ---- */

#define N_BUCKETS 12
extern const double latency_buckets[N_BUCKETS];     /* seconds */

struct histogram {
    _Atomic uint64_t counts[N_BUCKETS + 1];
    _Atomic uint64_t sum_us;
};
void histogram_add(struct histogram *h, int64_t us);

#define N_STATUS 8
struct http_server {
    struct MHD_Daemon *mhd;
    int fd;                         /* listening socket */
    char url[160];
    char *unix_path;
    struct served_model *const *models; size_t n_models;
    pthread_mutex_t settings_mu;    /* guards settings */
    struct settings *settings;
    pthread_mutex_t wakers_mu;      /* guards the lists */
    struct waker *free_wakers, *all_wakers;
    pthread_t watcher; bool has_watcher;
    int watcher_pipe[2];
    pthread_mutex_t gens_mu;                /* guards gens and the requests of listed generations */
    struct gen *gens;
    atomic_bool draining, stopping;
    atomic_uint running;
    _Atomic uint64_t *status_counts;        /* [n_routes + 1][N_STATUS] */
    _Atomic uint64_t prompt_tokens, completion_tokens, cached_tokens, disconnects;
    struct histogram first_token, total;
    int64_t start_us;
};

/* ---- connection ---- */

struct route {
    const char *method, *path;      /* a path that ends in '*' matches what follows */
    enum MHD_Result (*handle)(struct conn *cn);
    bool open;                      /* needs no key */
    bool generates;                 /* refused while draining */
    bool messages;                  /* errors and replies in Anthropic's shape */
};
extern const struct route http_routes[];
bool route_matches(const struct route *r, const char *url);

struct conn {
    struct http_server *srv;
    struct MHD_Connection *c;
    struct settings *set;
    const struct route *route;      /* NULL: no such path or method */
    const char *tail;               /* what '*' of the route matched; lives in `url` */
    char *url;
    char method[12];
    const char *tenant;             /* lives in `set`; "" without keys */
    char id[40];                    /* X-Request-Id */
    struct sbuf body;
    struct arle_err refused;        /* set before the body is read; answered after it */
    bool head_seen, handled, log_done;
    int status;
    int64_t start_us;
    struct gen *gen;                /* a generation in progress */
};

/* ---- replies (reply.c) ---- */

/** Queues a JSON reply; empties `json`. */
enum MHD_Result reply_json(struct conn *cn, int status, struct sbuf *json);
enum MHD_Result reply_text(struct conn *cn, int status, const char *type, struct sbuf *text);
/** Queues an error in OpenAI's shape; the status comes from err->code. retry_after_s > 0 adds the header. */
enum MHD_Result reply_error(struct conn *cn, const struct arle_err *err, int retry_after_s);
/** Adds the headers that every reply has. */
void reply_headers(struct conn *cn, struct MHD_Response *resp);
/** Appends text of an error as a JSON string, whatever bytes are in it; NULL becomes null. */
void reply_error_text(struct sbuf *out, const char *text);
/** Appends {"error":{...}} for err. */
void error_json(struct sbuf *out, const struct arle_err *err);
int error_status(const struct arle_err *err);
/** As error_json, in Anthropic's shape (gen_messages.c). */
void messages_error(struct sbuf *out, const struct arle_err *err);
/** Counts and logs a finished reply, once. */
void conn_done(struct conn *cn);

/* ---- handlers ---- */

enum MHD_Result handle_chat(struct conn *cn);
enum MHD_Result handle_completions(struct conn *cn);
enum MHD_Result handle_messages(struct conn *cn);
enum MHD_Result handle_count_tokens(struct conn *cn);
enum MHD_Result handle_models(struct conn *cn);
enum MHD_Result handle_model(struct conn *cn);
enum MHD_Result handle_health(struct conn *cn);
enum MHD_Result handle_ready(struct conn *cn);
enum MHD_Result handle_metrics(struct conn *cn);
enum MHD_Result handle_tokenize(struct conn *cn);
enum MHD_Result handle_detokenize(struct conn *cn);
enum MHD_Result handle_render(struct conn *cn);

/** The model a body asks for; without `model` the only one there is. -ENOENT names those there are. */
int find_model(struct conn *cn, const char *name, struct served_model **out, struct arle_err *err);
/** Parses the body as an object; *out is the caller's. */
int body_object(struct conn *cn, struct json_object **out, struct arle_err *err);

/** Continues a generation after a wake-up; queues the reply when it is complete. */
enum MHD_Result gen_continue(struct gen *g);
void gen_destroy(struct gen *g);            /* cancels what still runs; NULL is fine */

/* auth.c */
/** Checks the key of a request; sets *tenant. -EACCES. */
int auth_check(const struct settings *s, struct MHD_Connection *c, const char **tenant, struct arle_err *err);

#endif
