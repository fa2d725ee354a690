/*
 * kv-store plugin: blocks of the KV plane in a server that speaks the Redis protocol, through hiredis. One connection, used by
 * one I/O thread of the host. Every call is one pipeline and ends by its deadline: a server that is slow, paused, full, wrong or
 * gone is an error value, the connection is dropped (replies to a call that was given up must never be read as those of the
 * next), and the next call connects anew. Contents are checked by the host, which put its own checksums into them.
 */
#include <arle/kv.h>

#include <hiredis/hiredis.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PIPELINE 256            /* commands in flight at once; bounds the memory of both sides */

struct redis {
    char *host, *path, *user, *password, *prefix;
    int port;
    int64_t db, ttl_s;
    redisContext *c;
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static void hang_up(struct redis *r)
{
    if (r->c != NULL)
        redisFree(r->c);
    r->c = NULL;
}

static struct timeval left(int64_t until_ms)
{
    int64_t ms = until_ms - now_ms();
    if (ms < 1)
        ms = 1;
    return (struct timeval){ .tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000 };
}

/* What went wrong with the connection, which is given up. */
static int conn_error(struct redis *r, int64_t until_ms, struct arle_err *err)
{
    bool late = now_ms() >= until_ms || (r->c != NULL && r->c->err == REDIS_ERR_IO && (errno == EAGAIN || errno == ETIMEDOUT));
    int code = late ? -ETIMEDOUT : -EIO;
    arle_err_set(err, code, "redis %s: %s", r->path != NULL ? r->path : r->host,
                 r->c != NULL && r->c->errstr[0] != '\0' ? r->c->errstr : late ? "deadline passed" : "no connection");
    hang_up(r);
    return code;
}

static int reply_error(struct redis *r, const redisReply *reply, struct arle_err *err)
{
    int code = strncmp(reply->str, "OOM", 3) == 0 ? -ENOSPC : -EBADMSG;
    arle_err_set(err, code, "redis %s: %.200s", r->path != NULL ? r->path : r->host, reply->str);
    return code;
}

/* Reads one reply. 0, or the connection is gone. */
static int next_reply(struct redis *r, int64_t until_ms, redisReply **out, struct arle_err *err)
{
    if (now_ms() >= until_ms)
        return conn_error(r, until_ms, err);
    redisSetTimeout(r->c, left(until_ms));
    void *reply = NULL;
    if (redisGetReply(r->c, &reply) != REDIS_OK || reply == NULL)
        return conn_error(r, until_ms, err);
    *out = reply;
    return 0;
}

static int simple(struct redis *r, int64_t until_ms, struct arle_err *err, const char *fmt, ...)
{
    va_list ap;
    redisReply *reply;
    va_start(ap, fmt);
    redisvAppendCommand(r->c, fmt, ap);
    va_end(ap);
    int e = next_reply(r, until_ms, &reply, err);
    if (e < 0)
        return e;
    if (reply->type == REDIS_REPLY_ERROR)
        e = reply_error(r, reply, err);
    freeReplyObject(reply);
    if (e < 0)
        hang_up(r);
    return e;
}

static int reach(struct redis *r, int64_t until_ms, struct arle_err *err)
{
    sigset_t pipe;
    if (r->c != NULL)
        return 0;
    /* A write to a server that went away must be an error, not a signal; this thread does nothing but these calls. */
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, NULL);
    r->c = r->path != NULL ? redisConnectUnixWithTimeout(r->path, left(until_ms)) : redisConnectWithTimeout(r->host, r->port, left(until_ms));
    if (r->c == NULL || r->c->err != 0)
        return conn_error(r, until_ms, err);
    int e = 0;
    if (r->password != NULL)
        e = r->user != NULL ? simple(r, until_ms, err, "AUTH %s %s", r->user, r->password) : simple(r, until_ms, err, "AUTH %s", r->password);
    if (e == 0 && r->db != 0)
        e = simple(r, until_ms, err, "SELECT %d", (int)r->db);
    return e;
}

enum verb { VERB_GET, VERB_PUT, VERB_EXISTS, VERB_DEL };

static void append(struct redis *r, enum verb verb, const struct arle_kv_item *item)
{
    static const char *const names[] = { "GET", "SET", "EXISTS", "DEL" };
    size_t plen = strlen(r->prefix);
    char key[128], ttl[24];
    memcpy(key, r->prefix, plen);
    memcpy(key + plen, item->key, 32);
    const char *argv[5] = { names[verb], key, item->data, "EX", ttl };
    size_t len[5] = { strlen(names[verb]), plen + 32, (size_t)item->len, 2, 0 };
    int argc = 2;
    if (verb == VERB_PUT) {
        argc = r->ttl_s > 0 ? 5 : 3;
        len[4] = (size_t)snprintf(ttl, sizeof ttl, "%" PRId64, r->ttl_s);
    }
    redisAppendCommandArgv(r->c, argc, argv, len);
}

/* What a reply means for its item; an odd type is a wrong server. */
static int take(struct redis *r, enum verb verb, struct arle_kv_item *item, uint8_t *present, const redisReply *reply, struct arle_err *err)
{
    if (reply->type == REDIS_REPLY_ERROR)
        return reply_error(r, reply, err);
    if (verb == VERB_GET) {
        item->len = 0;
        if (reply->type == REDIS_REPLY_STRING && reply->len <= item->cap) {     /* longer is not what we put there */
            memcpy(item->data, reply->str, reply->len);
            item->len = reply->len;
            return 0;
        }
        return reply->type == REDIS_REPLY_NIL || reply->type == REDIS_REPLY_STRING ? 0 : arle_err_set(err, -EBADMSG, "redis: odd reply to GET");
    }
    if (verb == VERB_EXISTS)
        *present = reply->type == REDIS_REPLY_INTEGER && reply->integer > 0;
    return 0;
}

static int run_all(struct redis *r, enum verb verb, struct arle_kv_item *items, uint32_t n, uint8_t *present, int64_t until,
                   struct arle_err *err)
{
    int e = reach(r, until, err), first = 0;
    if (e < 0)
        return e;
    for (uint32_t at = 0; at < n; at += PIPELINE) {
        uint32_t end = at + PIPELINE < n ? at + PIPELINE : n;
        for (uint32_t i = at; i < end; i++)
            append(r, verb, &items[i]);
        for (uint32_t i = at; i < end; i++) {
            redisReply *reply;
            if ((e = next_reply(r, until, &reply, err)) < 0)
                return e;
            e = take(r, verb, &items[i], present != NULL ? &present[i] : NULL, reply, err);
            freeReplyObject(reply);
            first = first != 0 ? first : e;
        }
    }
    return first;
}

/* A connection that went stale between calls (a server that was restarted) is no fault of the server that is there now. */
static int pipeline(struct redis *r, enum verb verb, struct arle_kv_item *items, uint32_t n, uint8_t *present, int64_t deadline_ms,
                    struct arle_err *err)
{
    int64_t until = now_ms() + deadline_ms;
    bool old = r->c != NULL;
    int e = run_all(r, verb, items, n, present, until, err);
    return e == -EIO && old ? run_all(r, verb, items, n, present, until, err) : e;
}

static int redis_get(void *ctx, struct arle_kv_item *items, uint32_t n, int64_t deadline_ms, struct arle_err *err)
{
    return pipeline(ctx, VERB_GET, items, n, NULL, deadline_ms, err);
}

static int redis_put(void *ctx, const struct arle_kv_item *items, uint32_t n, int64_t deadline_ms, struct arle_err *err)
{
    return pipeline(ctx, VERB_PUT, (struct arle_kv_item *)items, n, NULL, deadline_ms, err);
}

static int redis_exists(void *ctx, const struct arle_kv_item *items, uint32_t n, uint8_t *present, int64_t deadline_ms, struct arle_err *err)
{
    return pipeline(ctx, VERB_EXISTS, (struct arle_kv_item *)items, n, present, deadline_ms, err);
}

static int redis_remove(void *ctx, const struct arle_kv_item *items, uint32_t n, int64_t deadline_ms, struct arle_err *err)
{
    return pipeline(ctx, VERB_DEL, (struct arle_kv_item *)items, n, NULL, deadline_ms, err);
}

/* ---- life --------------------------------------------------------------------------------------------------------------- */

static void redis_close(void *ctx)
{
    struct redis *r = ctx;
    if (r == NULL)
        return;
    hang_up(r);
    free(r->host);
    free(r->path);
    free(r->user);
    free(r->password);
    free(r->prefix);
    free(r);
}

static char *copy_or_null(const char *s)
{
    return s != NULL && s[0] != '\0' ? strdup(s) : NULL;
}

static int parse_address(struct redis *r, const char *address, struct arle_err *err)
{
    if (address[0] == '/') {
        r->path = strdup(address);
        return r->path != NULL ? 0 : arle_err_set(err, -ENOMEM, "no memory");
    }
    const char *colon = strrchr(address, ':');
    char *end = NULL;
    long port = colon != NULL ? strtol(colon + 1, &end, 10) : 0;
    if (colon == NULL || colon == address || end == colon + 1 || *end != '\0' || port < 1 || port > 65535)
        return arle_err_param(err, -EINVAL, "address", "address \"%s\" is neither HOST:PORT nor the path of a socket", address);
    r->host = strndup(address, (size_t)(colon - address));
    r->port = (int)port;
    return r->host != NULL ? 0 : arle_err_set(err, -ENOMEM, "no memory");
}

/* Does not connect: a server that is down at start is reached later. */
static int redis_open(const struct arle_host *host, const struct arle_conf *conf, void **out_ctx, struct arle_err *err)
{
    const struct arle_conf_service *cs = arle_host_conf(host);
    if (cs == NULL)
        return arle_err_set(err, -ENOSYS, "the host has no service \"conf\" 1");
    struct redis *r = calloc(1, sizeof *r);
    if (r == NULL)
        return arle_err_set(err, -ENOMEM, "no memory");
    const char *address = cs->str(conf, "address"), *prefix = cs->str(conf, "prefix");
    r->user = copy_or_null(cs->str(conf, "user"));
    r->password = copy_or_null(cs->str(conf, "password"));
    r->prefix = strdup(prefix != NULL ? prefix : "");
    r->db = cs->i64(conf, "db");
    r->ttl_s = cs->i64(conf, "ttl") / 1000;
    int e = r->prefix == NULL ? arle_err_set(err, -ENOMEM, "no memory") : 0;
    if (e == 0 && strlen(r->prefix) > 64)
        e = arle_err_param(err, -EINVAL, "prefix", "prefix is longer than 64 bytes");
    if (e == 0)
        e = parse_address(r, address != NULL ? address : "", err);
    if (e < 0) {
        redis_close(r);
        return e;
    }
    *out_ctx = r;
    return 0;
}

static int redis_probe(const struct arle_host *host, struct arle_probe *out, struct arle_err *err)
{
    (void)host; (void)err;
    out->usable = 1;
    snprintf(out->detail, sizeof out->detail, "hiredis %d.%d.%d", HIREDIS_MAJOR, HIREDIS_MINOR, HIREDIS_PATCH);
    return 0;
}

static const struct arle_conf_key keys[] = {
    { .name = "address", .type = ARLE_CONF_STR, .def = "127.0.0.1:6379", .unit = "", .help = "HOST:PORT, or the path of a Unix socket." },
    { .name = "user", .type = ARLE_CONF_STR, .def = "", .unit = "", .help = "User name for AUTH; empty for servers without users." },
    { .name = "password", .type = ARLE_CONF_STR, .def = "", .unit = "", .help = "Password for AUTH; empty sends none." },
    { .name = "db", .type = ARLE_CONF_I64, .def = "0", .min = 0, .max = 1023, .unit = "", .help = "Number of the database to select." },
    { .name = "prefix", .type = ARLE_CONF_STR, .def = "arle:kv:", .unit = "", .help = "What every key begins with." },
    { .name = "ttl", .type = ARLE_CONF_DURATION, .def = "24h", .unit = "", .help = "How long the server keeps a block; 0 leaves eviction to it." },
    { .name = NULL },
};

static const struct arle_kv_store_api api = {
    .struct_size = sizeof api, .get = redis_get, .put = redis_put, .exists = redis_exists, .remove = redis_remove,
};

ARLE_EXPORT extern const struct arle_plugin arle_plugin_v1;
const struct arle_plugin arle_plugin_v1 = {
    ARLE_PLUGIN_HEAD(ARLE_KIND_KV_STORE),
    .name = "kv-redis", .version = "0.1.0", .license = "MIT",
    .summary = "Cluster tier of the prefix cache in a server that speaks the Redis protocol.",
    .keys = keys, .probe = redis_probe, .open = redis_open, .close = redis_close, .ops = &api,
};
