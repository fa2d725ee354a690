/*
 * libmicrohttpd and its connections: listening, the life of a request from its first byte to its last, suspended
 * connections and who wakes them. What a request means is in the handlers.
 */
#include "http/server.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "http/internal.h"
#include "util/clock.h"
#include "util/log.h"

#define WATCH_MS 100            /* how soon a hang-up of a suspended connection is noticed */
#define MAX_DISCARD (256u << 20)        /* a refused body is read up to this, so that the client sees the reply */

/* ---- wakers ---- */

struct waker *waker_take(struct http_server *srv, struct MHD_Connection *c)
{
    pthread_mutex_lock(&srv->wakers_mu);
    struct waker *w = srv->free_wakers;
    if (w != NULL) {
        srv->free_wakers = w->next_free;
    } else if ((w = calloc(1, sizeof *w)) != NULL) {
        pthread_mutex_init(&w->mu, NULL);
        w->next_all = srv->all_wakers;
        srv->all_wakers = w;
    }
    pthread_mutex_unlock(&srv->wakers_mu);
    if (w == NULL)
        return NULL;
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD);
    pthread_mutex_lock(&w->mu);
    w->c = c;
    w->fd = info != NULL ? info->connect_fd : -1;
    w->suspended = w->pending = w->hangup = w->ping = w->stream = false;
    w->last_us = clock_mono_us();
    pthread_mutex_unlock(&w->mu);
    return w;
}

void waker_give(struct http_server *srv, struct waker *w)
{
    pthread_mutex_lock(&w->mu);
    w->c = NULL;
    w->fd = -1;
    w->suspended = false;
    pthread_mutex_unlock(&w->mu);
    pthread_mutex_lock(&srv->wakers_mu);
    w->next_free = srv->free_wakers;
    srv->free_wakers = w;
    pthread_mutex_unlock(&srv->wakers_mu);
}

/* Caller holds w->mu. */
static void wake_locked(struct waker *w)
{
    w->pending = true;
    if (w->c == NULL || !w->suspended)
        return;
    w->suspended = false;
    MHD_resume_connection(w->c);
}

void waker_wake(void *waker)
{
    struct waker *w = waker;
    pthread_mutex_lock(&w->mu);
    wake_locked(w);
    pthread_mutex_unlock(&w->mu);
}

bool waker_sleep(struct waker *w)
{
    pthread_mutex_lock(&w->mu);
    bool sleep = !w->pending;
    w->pending = false;
    if (sleep) {
        w->suspended = true;
        MHD_suspend_connection(w->c);
    }
    pthread_mutex_unlock(&w->mu);
    return sleep;
}

/* A suspended connection hears nothing from its socket, so this thread asks the sockets, and wakes silent streams. */
static void watch_one(struct waker *w, int64_t keepalive_us)
{
    pthread_mutex_lock(&w->mu);
    if (w->c != NULL && w->fd >= 0 && w->suspended) {
        struct pollfd p = { .fd = w->fd, .events = POLLRDHUP };
        if (poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0)
            w->hangup = true;
        if (w->stream && clock_mono_us() - w->last_us > keepalive_us)
            w->ping = true;
        if (w->hangup || w->ping)
            wake_locked(w);
    }
    pthread_mutex_unlock(&w->mu);
}

static void *watcher(void *arg)
{
    struct http_server *srv = arg;
    struct pollfd stop = { .fd = srv->watcher_pipe[0], .events = POLLIN };
    while (poll(&stop, 1, WATCH_MS) <= 0) {
        struct settings *s = settings_ref(srv);
        int64_t keepalive_us = s->keepalive_ms * 1000;
        settings_unref(s);
        pthread_mutex_lock(&srv->wakers_mu);
        struct waker *w = srv->all_wakers;      /* only ever grows at its head, and is never freed while this runs */
        pthread_mutex_unlock(&srv->wakers_mu);
        for (; w != NULL; w = w->next_all)
            watch_one(w, keepalive_us);
    }
    return NULL;
}

/* ---- life of a request ---- */

static struct conn *conn_create(struct http_server *srv, struct MHD_Connection *c, const char *url, const char *method)
{
    static atomic_uint counter;     /* makes ids differ even without randomness */
    struct conn *cn = calloc(1, sizeof *cn);
    if (cn == NULL || (cn->url = strdup(url)) == NULL) {
        free(cn);
        return NULL;
    }
    uint32_t random[2] = { 0 };
    if (getrandom(random, sizeof random, 0) < 0)
        random[0] = (uint32_t)clock_mono_us();
    snprintf(cn->id, sizeof cn->id, "%08x%08x%06x", random[0], random[1], atomic_fetch_add(&counter, 1) & 0xffffffu);
    snprintf(cn->method, sizeof cn->method, "%s", method);
    cn->srv = srv;
    cn->c = c;
    cn->set = settings_ref(srv);
    cn->tenant = "";
    cn->start_us = clock_mono_us();
    return cn;
}

static void conn_destroy(struct conn *cn)
{
    conn_done(cn);
    gen_destroy(cn->gen);
    sbuf_fini(&cn->body);
    settings_unref(cn->set);
    free(cn->url);
    free(cn);
}

static void completed(void *cls, struct MHD_Connection *c, void **con_cls, enum MHD_RequestTerminationCode why)
{
    struct conn *cn = *con_cls;
    *con_cls = NULL;
    if (cn == NULL)
        return;
    if (cn->gen != NULL && why != MHD_REQUEST_TERMINATED_COMPLETED_OK)
        atomic_fetch_add(&cn->srv->disconnects, 1);
    conn_destroy(cn);
}

static bool path_matches(const struct route *r, const char *url, const char **tail)
{
    size_t n = strlen(r->path);
    *tail = "";
    if (n > 0 && r->path[n - 1] == '*') {
        *tail = url + n - 1;
        return strncmp(url, r->path, n - 1) == 0 && url[n - 1] != '\0';
    }
    return strcmp(url, r->path) == 0;
}

bool route_matches(const struct route *r, const char *url)
{
    const char *tail;
    return path_matches(r, url, &tail);
}

static void find_route(struct conn *cn)
{
    const char *method = strcmp(cn->method, "HEAD") == 0 ? "GET" : cn->method;
    bool path_known = false;
    for (const struct route *r = http_routes; r->path != NULL; r++) {
        if (!path_matches(r, cn->url, &cn->tail))
            continue;
        path_known = true;
        if (strcmp(r->method, method) == 0) {
            cn->route = r;
            return;
        }
    }
    if (path_known)
        arle_err_set(&cn->refused, -EPERM, "method %s is not allowed for %.100s", cn->method, cn->url);
    else
        arle_err_set(&cn->refused, -ENOSYS, "there is no %s %.100s", cn->method, cn->url);
}

static enum MHD_Result count_length(void *cls, enum MHD_ValueKind kind, const char *key, const char *value)
{
    int *n = cls;
    *n += strcasecmp(key, "Content-Length") == 0 || strcasecmp(key, "Transfer-Encoding") == 0;
    return MHD_YES;
}

/* Everything that can be said before the body is read. Refusals wait in cn->refused until it was. */
static enum MHD_Result first_call(struct conn *cn)
{
    struct MHD_Connection *c = cn->c;
    find_route(cn);
    if (strcmp(cn->method, "OPTIONS") == 0 && *cn->set->cors != '\0')
        arle_err_set(&cn->refused, 0, "%s", "");
    else if (cn->route == NULL || !cn->route->open) {
        struct arle_err why = ARLE_ERR_INIT;
        if (auth_check(cn->set, c, &cn->tenant, &why) < 0)      /* a stranger does not learn which paths there are */
            cn->refused = why;
    }
    const char *length = MHD_lookup_connection_value(c, MHD_HEADER_KIND, "Content-Length");
    uint64_t n = length != NULL ? strtoull(length, NULL, 10) : 0;
    if (cn->refused.code == 0 && n > cn->set->max_body)
        arle_err_set(&cn->refused, -EMSGSIZE, "the body has %llu bytes; at most %llu are accepted", (unsigned long long)n,
                     (unsigned long long)cn->set->max_body);
    /* A proxy in front might end the body elsewhere, and take the rest for a request of somebody else's. */
    int n_lengths = 0;
    MHD_get_connection_values(c, MHD_HEADER_KIND, count_length, &n_lengths);
    if (n_lengths > 1)
        arle_err_param(&cn->refused, -EINVAL, "Content-Length", "the length of the body is given more than once");
    /* A client that waits for 100 Continue, or would send without end, hears the refusal now. */
    const char *expect = MHD_lookup_connection_value(c, MHD_HEADER_KIND, "Expect");
    if (cn->refused.code != 0 && (expect != NULL || n > MAX_DISCARD || n_lengths > 1)) {
        cn->handled = true;
        return reply_error(cn, &cn->refused, 0);
    }
    return MHD_YES;
}

static void take_body(struct conn *cn, const char *data, size_t len)
{
    if (cn->refused.code == 0 && cn->body.n + len > cn->set->max_body)
        arle_err_set(&cn->refused, -EMSGSIZE, "the body is longer than the accepted %llu bytes",
                     (unsigned long long)cn->set->max_body);
    if (cn->refused.code == 0)
        sbuf_add(&cn->body, data, len);
    else
        sbuf_fini(&cn->body);
}

static enum MHD_Result preflight(struct conn *cn)
{
    struct sbuf none = SBUF_INIT;
    return reply_text(cn, 204, "text/plain", &none);
}

static enum MHD_Result dispatch(struct conn *cn)
{
    if (cn->gen != NULL)
        return gen_continue(cn->gen);
    cn->handled = true;
    if (strcmp(cn->method, "OPTIONS") == 0 && *cn->set->cors != '\0' && cn->refused.code == 0)
        return preflight(cn);
    if (cn->body.failed)
        arle_err_set(&cn->refused, -ENOMEM, "no memory for the body");
    if (cn->refused.code != 0)
        return reply_error(cn, &cn->refused, 0);
    if (cn->route->generates && atomic_load(&cn->srv->draining)) {
        struct arle_err err;
        arle_err_set(&err, -ESHUTDOWN, "the server is shutting down");
        return reply_error(cn, &err, 1);
    }
    return cn->route->handle(cn);
}

static enum MHD_Result on_request(void *cls, struct MHD_Connection *c, const char *url, const char *method, const char *version,
                                  const char *data, size_t *size, void **con_cls)
{
    struct conn *cn = *con_cls;
    if (cn == NULL) {
        cn = *con_cls = conn_create(cls, c, url, method);
        return cn != NULL ? first_call(cn) : MHD_NO;
    }
    if (*size > 0) {
        take_body(cn, data, *size);
        *size = 0;
        return MHD_YES;
    }
    return dispatch(cn);
}

/* ---- listening ---- */

static bool is_loopback(const struct sockaddr *sa)
{
    if (sa->sa_family == AF_INET)
        return (ntohl(((const struct sockaddr_in *)(const void *)sa)->sin_addr.s_addr) >> 24) == 127;
    if (sa->sa_family == AF_INET6)
        return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr);
    return sa->sa_family == AF_UNIX;
}

static int listen_unix(struct http_server *srv, const char *path, struct arle_err *err)
{
    struct sockaddr_un sa = { .sun_family = AF_UNIX };
    struct stat st;
    if (strlen(path) >= sizeof sa.sun_path)
        return arle_err_param(err, -EINVAL, "server.listen", "the path %.60s... is too long for a socket", path);
    memcpy(sa.sun_path, path, strlen(path) + 1);
    if (lstat(path, &st) == 0 && S_ISSOCK(st.st_mode))
        unlink(path);           /* left behind by a killed server */
    srv->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (srv->fd < 0 || bind(srv->fd, (struct sockaddr *)&sa, sizeof sa) < 0 || listen(srv->fd, 1024) < 0)
        return arle_err_param(err, -errno, "server.listen", "cannot listen on %s: %s", path, strerror(errno));
    srv->unix_path = strdup(path);
    snprintf(srv->url, sizeof srv->url, "unix:%s", path);
    return 0;
}

/* HOST:PORT or [IPV6]:PORT */
static int split_address(const char *text, char *host, size_t cap, const char **port, struct arle_err *err)
{
    const char *colon = strrchr(text, ':');
    size_t n = colon != NULL ? (size_t)(colon - text) : 0;
    if (colon == NULL || colon[1] == '\0' || strspn(colon + 1, "0123456789") != strlen(colon + 1) || atol(colon + 1) > 65535)
        return arle_err_param(err, -EINVAL, "server.listen", "\"%.100s\" is not HOST:PORT", text);
    if (n >= 2 && text[0] == '[' && text[n - 1] == ']')
        text++, n -= 2;
    else if (memchr(text, ':', n) != NULL)
        return arle_err_param(err, -EINVAL, "server.listen", "\"%.100s\": write an IPv6 address as [ADDRESS]:PORT", text);
    if (n >= cap)
        return arle_err_param(err, -EINVAL, "server.listen", "the host name is too long");
    memcpy(host, text, n);
    host[n] = '\0';
    *port = colon + 1;
    return 0;
}

static void name_url(struct http_server *srv)
{
    struct sockaddr_storage sa;
    socklen_t len = sizeof sa;
    char host[80], port[16];
    if (getsockname(srv->fd, (struct sockaddr *)&sa, &len) < 0 ||
        getnameinfo((struct sockaddr *)&sa, len, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return;
    bool v6 = sa.ss_family == AF_INET6;
    snprintf(srv->url, sizeof srv->url, "http://%s%s%s:%s", v6 ? "[" : "", host, v6 ? "]" : "", port);
}

static int listen_tcp(struct http_server *srv, const struct http_options *o, struct arle_err *err)
{
    char host[256];
    const char *port = "0";
    int r = split_address(o->listen, host, sizeof host, &port, err), on = 1;
    if (r < 0)
        return r;
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE }, *ai = NULL;
    int e = getaddrinfo(*host ? host : NULL, port, &hints, &ai);
    if (e != 0)
        return arle_err_param(err, -EINVAL, "server.listen", "%s: %s", o->listen, gai_strerror(e));
    if (!is_loopback(ai->ai_addr) && srv->settings->n_keys == 0 && !o->force_open)
        r = arle_err_param(err, -EACCES, "server.listen",
                           "%s can be reached from other machines and no API key is set; set auth.keys or auth.keys_file, or "
                           "server.force_open = yes", o->listen);
    if (r == 0) {
        srv->fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (srv->fd >= 0)
            setsockopt(srv->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (srv->fd < 0 || bind(srv->fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(srv->fd, 1024) < 0)
            r = arle_err_param(err, -errno, "server.listen", "cannot listen on %s: %s", o->listen, strerror(errno));
    }
    freeaddrinfo(ai);
    if (r == 0)
        name_url(srv);
    return r;
}

/* ---- start and stop ---- */

static void log_mhd(void *arg, const char *fmt, va_list ap)
{
    char text[256];
    vsnprintf(text, sizeof text, fmt, ap);
    text[strcspn(text, "\n")] = '\0';
    log_debug("http", "library", "text=\"%s\"", text);
}

static int start_threads(struct http_server *srv, const struct http_options *o, struct arle_err *err)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned threads = o->threads ? o->threads : cpus > 1 ? (unsigned)cpus / 2 : 1;
    unsigned idle_s = (unsigned)((o->idle_timeout_ms + 999) / 1000);
    unsigned flags = MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ITC | MHD_USE_ERROR_LOG;
    unsigned max = o->max_connections < threads ? threads : o->max_connections;
    if (threads == 1)
        threads = 0;        /* MHD: a pool has two threads or more */
    srv->mhd = MHD_start_daemon(flags, 0, NULL, NULL, on_request, srv, MHD_OPTION_EXTERNAL_LOGGER, log_mhd, NULL,
                                MHD_OPTION_LISTEN_SOCKET, srv->fd, MHD_OPTION_NOTIFY_COMPLETED, completed, NULL,
                                MHD_OPTION_THREAD_POOL_SIZE, threads, MHD_OPTION_CONNECTION_LIMIT, max,
                                MHD_OPTION_CONNECTION_TIMEOUT, idle_s, MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)64 << 10,
                                MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_END);
    if (srv->mhd == NULL)
        return arle_err_set(err, -EIO, "the HTTP library did not start on %s", o->listen);
    if (pipe2(srv->watcher_pipe, O_CLOEXEC) < 0 || pthread_create(&srv->watcher, NULL, watcher, srv) != 0)
        return arle_err_set(err, -EAGAIN, "cannot start the thread that watches connections");
    srv->has_watcher = true;
    return 0;
}

int http_server_start(struct http_server **out, const struct http_options *o, struct served_model *const *models, size_t n_models,
                      struct arle_err *err)
{
    struct http_server *srv = calloc(1, sizeof *srv);
    size_t n_routes = 0;
    while (http_routes[n_routes].path != NULL)
        n_routes++;
    if (srv == NULL || (srv->status_counts = calloc((n_routes + 1) * N_STATUS, sizeof *srv->status_counts)) == NULL) {
        free(srv);
        return arle_err_set(err, -ENOMEM, "no memory for the HTTP server");
    }
    srv->fd = srv->watcher_pipe[0] = srv->watcher_pipe[1] = -1;
    srv->models = models;
    srv->n_models = n_models;
    srv->start_us = clock_mono_us();
    pthread_mutex_init(&srv->settings_mu, NULL);
    pthread_mutex_init(&srv->wakers_mu, NULL);
    pthread_mutex_init(&srv->gens_mu, NULL);
    int r = settings_create(&srv->settings, o, err);
    if (r == 0)
        r = strncmp(o->listen, "unix:", 5) == 0 ? listen_unix(srv, o->listen + 5, err) : listen_tcp(srv, o, err);
    if (r == 0)
        r = start_threads(srv, o, err);
    if (r < 0) {
        http_server_stop(srv);
        http_server_destroy(srv);
        return r;
    }
    *out = srv;
    return 0;
}

const char *http_server_url(const struct http_server *srv)
{
    return srv->url;
}

int http_server_update(struct http_server *srv, const struct http_options *o, struct arle_err *err)
{
    struct settings *fresh, *old;
    int r = settings_create(&fresh, o, err);
    if (r < 0)
        return r;
    pthread_mutex_lock(&srv->settings_mu);
    old = srv->settings;
    srv->settings = fresh;
    pthread_mutex_unlock(&srv->settings_mu);
    settings_unref(old);
    return 0;
}

void http_server_drain(struct http_server *srv)
{
    atomic_store(&srv->draining, true);
}

uint32_t http_server_running(const struct http_server *srv)
{
    return atomic_load(&srv->running);
}

/* MHD demands that nothing is suspended when it stops; woken handlers see `stopping` and end. */
static void resume_all(struct http_server *srv)
{
    pthread_mutex_lock(&srv->wakers_mu);
    struct waker *w = srv->all_wakers;
    pthread_mutex_unlock(&srv->wakers_mu);
    for (; w != NULL; w = w->next_all)
        waker_wake(w);
}

void http_server_stop(struct http_server *srv)
{
    atomic_store(&srv->draining, true);
    if (srv->has_watcher) {
        if (write(srv->watcher_pipe[1], "x", 1) == 1)
            pthread_join(srv->watcher, NULL);
        srv->has_watcher = false;
    }
    if (srv->mhd != NULL) {
        MHD_socket fd = MHD_quiesce_daemon(srv->mhd);
        if (fd != MHD_INVALID_SOCKET)
            srv->fd = fd;
        /* Finished replies may still be on their way out; give them a moment before the connections are closed. */
        for (int i = 0; i < 20 && atomic_load(&srv->running) > 0; i++) {
            resume_all(srv);
            usleep(10000);
        }
        atomic_store(&srv->stopping, true);
        for (int i = 0; i < 100 && atomic_load(&srv->running) > 0; i++) {
            resume_all(srv);
            usleep(5000);
        }
        resume_all(srv);
        MHD_stop_daemon(srv->mhd);
        srv->mhd = NULL;
    }
    if (srv->fd >= 0)
        close(srv->fd);
    srv->fd = -1;
    if (srv->unix_path != NULL)
        unlink(srv->unix_path);
}

void http_server_destroy(struct http_server *srv)
{
    if (srv == NULL)
        return;
    for (struct waker *w = srv->all_wakers, *next; w != NULL; w = next) {
        next = w->next_all;
        pthread_mutex_destroy(&w->mu);
        free(w);
    }
    for (int i = 0; i < 2; i++)
        if (srv->watcher_pipe[i] >= 0)
            close(srv->watcher_pipe[i]);
    settings_unref(srv->settings);
    pthread_mutex_destroy(&srv->settings_mu);
    pthread_mutex_destroy(&srv->wakers_mu);
    pthread_mutex_destroy(&srv->gens_mu);
    free((void *)srv->status_counts);
    free(srv->unix_path);
    free(srv);
}
