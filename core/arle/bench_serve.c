/*
 * `arle bench serve`: load over HTTP. Starts a server on a free loopback port in this process (or talks to --url), keeps
 * N streamed completions with token-id prompts in flight, and reports what clients see beside what the engine's steps took:
 * their difference is the cost of the server.
 */
#include "arle/bench.h"
#include "daemon/host.h"
#include "http/server.h"
#include "util/clock.h"
#include "util/place.h"
#include "util/sbuf.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct load {
    struct sockaddr_in to;
    const char *host_port, *model, *key;
    uint32_t input, output, requests, n_valid;
    _Atomic uint32_t next, failed;
    _Atomic uint64_t tokens;
    double *ttft_us, *gap_us;           /* [requests]: time to first token; mean time between tokens after it */
};

/* ---- one request ---- */

static int send_all(int fd, const char *p, size_t n)
{
    while (n > 0) {
        ssize_t k = send(fd, p, n, MSG_NOSIGNAL);
        if (k <= 0)
            return -1;
        p += k, n -= (size_t)k;
    }
    return 0;
}

static void write_request(const struct load *l, uint32_t index, struct sbuf *out)
{
    struct sbuf body = { 0 };
    int32_t *ids = malloc(l->input * sizeof *ids);
    if (ids == NULL)
        return;
    bench_prompt(ids, l->input, index * 7919ull + 3, l->n_valid);
    sbuf_fmt(&body, "{\"model\":\"%s\",\"stream\":true,\"temperature\":0,\"ignore_eos\":true,\"return_token_ids\":true,\"max_tokens\":%u,"
             "\"prompt\":[", l->model, l->output);
    for (uint32_t i = 0; i < l->input; i++)
        sbuf_fmt(&body, i ? ",%d" : "%d", ids[i]);
    sbuf_str(&body, "]}");
    sbuf_fmt(out, "POST /v1/completions HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nConnection: close\r\n%s%s%s"
             "Content-Length: %zu\r\n\r\n", l->host_port, l->key ? "Authorization: Bearer " : "", l->key ? l->key : "",
             l->key ? "\r\n" : "", body.n);
    sbuf_str(out, sbuf_text(&body));
    sbuf_fini(&body);
    free(ids);
}

/* Counts the ids of every "token_ids":[...] that is complete in buf[*at..n). prompt_token_ids is another key. */
static uint32_t count_ids(const char *buf, size_t n, size_t *at)
{
    static const char key[] = "\"token_ids\":[";
    uint32_t count = 0;
    for (;;) {
        const char *k = memmem(buf + *at, n - *at, key, sizeof key - 1);
        const char *end = k ? memchr(k, ']', n - (size_t)(k - buf)) : NULL;
        if (end == NULL)
            return count;
        const char *p = k + sizeof key - 1;
        count += p < end;
        for (; p < end; p++)
            count += *p == ',';
        *at = (size_t)(end - buf);
    }
}

static bool one_request(struct load *l, uint32_t index)
{
    struct sbuf rq = { 0 }, in = { 0 };
    char buf[65536];
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    int64_t start = clock_mono_us(), first = 0, last = 0;
    uint32_t tokens = 0;
    size_t at = 0;
    bool ok = fd >= 0 && connect(fd, (const struct sockaddr *)&l->to, sizeof l->to) == 0;
    if (ok)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    write_request(l, index, &rq);
    ok = ok && send_all(fd, sbuf_text(&rq), rq.n) == 0;
    for (ssize_t k; ok && (k = recv(fd, buf, sizeof buf, 0)) > 0;) {
        sbuf_add(&in, buf, (size_t)k);
        uint32_t got = count_ids(sbuf_text(&in), in.n, &at);
        if (got > 0) {
            last = clock_mono_us();
            first = first ? first : last;
            tokens += got;
        }
    }
    if (fd >= 0)
        close(fd);
    ok = ok && tokens == l->output && memmem(sbuf_text(&in), in.n, "[DONE]", 6) != NULL;
    if (!ok && atomic_load(&l->failed) == 0)
        fprintf(stderr, "arle bench: request %u brought %u of %u tokens: %.200s\n", index, tokens, l->output, sbuf_text(&in));
    l->ttft_us[index] = tokens > 0 ? (double)(first - start) : 0;
    l->gap_us[index] = tokens > 1 ? (double)(last - first) / (tokens - 1) : 0;
    atomic_fetch_add(&l->tokens, tokens);
    sbuf_fini(&rq);
    sbuf_fini(&in);
    return ok;
}

static void *client(void *arg)
{
    struct load *l = arg;
    for (uint32_t i; (i = atomic_fetch_add(&l->next, 1)) < l->requests;)
        if (!one_request(l, i))
            atomic_fetch_add(&l->failed, 1);
    return NULL;
}

/* ---- one level of concurrency ---- */

static int measure(struct bench *b, struct load *l, uint32_t concurrency, struct engine *e)
{
    pthread_t thread[1024];
    uint32_t n = 0;
    struct engine_stats was = { 0 }, now = { 0 };
    l->requests = concurrency * (uint32_t)b->runs;
    l->ttft_us = calloc(l->requests, sizeof *l->ttft_us);
    l->gap_us = calloc(l->requests, sizeof *l->gap_us);
    if (l->ttft_us == NULL || l->gap_us == NULL)
        return EXIT_FAILED;
    atomic_store(&l->next, 0), atomic_store(&l->failed, 0), atomic_store(&l->tokens, 0);
    if (e != NULL)
        engine_stat(e, &was);
    int64_t t0 = clock_mono_us();
    while (n < concurrency && n < 1024 && pthread_create(&thread[n], NULL, client, l) == 0)
        n++;
    for (uint32_t i = 0; i < n; i++)
        pthread_join(thread[i], NULL);
    double wall = (double)(clock_mono_us() - t0);
    uint32_t answered = 0;          /* the others have no times */
    for (uint32_t i = 0; i < l->requests; i++)
        if (l->ttft_us[i] > 0) {
            l->ttft_us[answered] = l->ttft_us[i];
            l->gap_us[answered++] = l->gap_us[i];
        }
    json_object *o = bench_line(b, "serve");
    bench_add(o, "concurrency", n);
    bench_add(o, "input_tokens", l->input);
    bench_add(o, "output_tokens", l->output);
    bench_add(o, "requests", l->requests);
    bench_add(o, "failed", atomic_load(&l->failed));
    bench_add(o, "wall_s", wall / 1e6);
    bench_add(o, "output_tokens_s", (double)atomic_load(&l->tokens) / wall * 1e6);
    bench_add(o, "total_tokens_s", ((double)atomic_load(&l->tokens) + (double)l->input * answered) / wall * 1e6);
    if (answered > 0) {
        json_object *gaps = json_object_new_object();
        bench_add(o, "token_gap_median_us", bench_times(gaps, l->gap_us, answered));
        json_object_put(gaps);
        bench_times(o, l->ttft_us, answered);       /* median_us and p99_us: time to first token */
    }
    if (e != NULL) {
        engine_stat(e, &now);
        bench_add(o, "steps", (double)(now.steps - was.steps));
        bench_add(o, "steps_busy_s", (double)(now.step_us_sum - was.step_us_sum) / 1e6);
        bench_add(o, "engine_busy", (double)(now.step_us_sum - was.step_us_sum) / wall);
        bench_add(o, "graph_launches", (double)(now.graph_launches - was.graph_launches));
    }
    bench_print(b, o);
    free(l->ttft_us);
    free(l->gap_us);
    return atomic_load(&l->failed) == 0 && n == concurrency ? EXIT_OK : EXIT_FAILED;
}

/* ---- a server of our own ---- */

struct own { char dir[64]; struct config *cfg; struct host *host; struct http_server *http; struct args args; };

static int copy_file(const char *from_dir, const char *name, const char *to_dir)
{
    char path[4400], buf[65536];
    snprintf(path, sizeof path, "%s/%s", from_dir, name);
    FILE *in = fopen(path, "re");
    snprintf(path, sizeof path, "%s/%s", to_dir, name);
    FILE *out = in ? fopen(path, "we") : NULL;
    bool ok = out != NULL;
    for (size_t n; ok && (n = fread(buf, 1, sizeof buf, in)) > 0;)
        ok = fwrite(buf, 1, n, out) == n;
    if (in)
        fclose(in);
    if (out)
        ok &= fclose(out) == 0;
    return ok ? 0 : -EIO;
}

/* A shape has no folder to serve from: its config.json goes beside the shipped model's tokenizer in a temporary one. */
static int make_folder(struct bench *b, struct own *own, struct arle_err *err)
{
    char tok_dir[4096], path[128];
    snprintf(own->dir, sizeof own->dir, "/tmp/arle-bench-XXXXXX");
    if (host_default_model(tok_dir, sizeof tok_dir, err) < 0)
        return err->code;
    if (mkdtemp(own->dir) == NULL)
        return arle_err_set(err, -errno, "no folder under /tmp: %s", strerror(errno));
    snprintf(path, sizeof path, "%s/config.json", own->dir);
    FILE *f = fopen(path, "we");
    bool ok = f != NULL && fwrite(b->config_json, 1, b->config_len, f) == b->config_len;
    if (f != NULL)
        ok &= fclose(f) == 0;
    if (!ok || copy_file(tok_dir, "tokenizer.json", own->dir) < 0 || copy_file(tok_dir, "tokenizer_config.json", own->dir) < 0)
        return arle_err_set(err, -EIO, "%s cannot be written", own->dir);
    return 0;
}

static int start(struct bench *b, struct own *own, uint32_t most, struct arle_err *err)
{
    const char *backend = args_str(b->args, "backend");
    struct http_options ho;
    char *keys = NULL;
    size_t n;
    int r = b->dir[0] ? 0 : make_folder(b, own, err);
    if (r < 0)
        return r;
    own->args = *b->args;
    own->args.n_owned = 0;
    /* Each preset goes in front of the earlier ones; the one that makes the model comes last. */
    args_preset(&own->args, "server.listen=127.0.0.1:0");
    args_preset(&own->args, "model.bench.max_seqs=%u", most);
    args_preset(&own->args, "model.bench.random_weights=%s", b->random ? "yes" : "no");
    if (backend != NULL)
        args_preset(&own->args, "model.bench.backend=%s", backend);
    args_preset(&own->args, "model.bench.path=%s", b->dir[0] ? b->dir : own->dir);
    r = config_open(&own->cfg, NULL, own->args.sets, own->args.n_sets, err);
    if (r == 0)
        r = host_open(&own->host, own->cfg, true, err);
    if (r == 0)
        r = bench_use_plugins(b, host_registry(own->host), err);
    if (r == 0)
        r = host_http_options(own->cfg, &ho, &keys, err);
    if (r == 0) {
        struct served_model *const *models = host_models(own->host, &n);
        r = http_server_start(&own->http, &ho, models, n, err);
    }
    host_forget_keys(keys);
    return r;
}

static void stop(struct own *own)
{
    char path[128];
    if (own->http != NULL)
        http_server_stop(own->http);
    if (own->host != NULL)
        host_close(own->host);
    http_server_destroy(own->http);
    config_close(own->cfg);
    for (size_t i = 0; i < own->args.n_owned; i++)
        free(own->args.owned[i]);
    static const char *const files[] = { "config.json", "tokenizer.json", "tokenizer_config.json" };
    for (size_t i = 0; own->dir[0] && i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", own->dir, files[i]);
        unlink(path);
    }
    if (own->dir[0])
        rmdir(own->dir);
}

static int parse_url(const char *url, struct load *l, char *host_port, size_t cap)
{
    char host[64];
    unsigned port;
    if (sscanf(url, "http://%63[0-9.]:%u", host, &port) != 2 || port > 65535 || inet_pton(AF_INET, host, &l->to.sin_addr) != 1)
        return -EINVAL;
    l->to.sin_family = AF_INET;
    l->to.sin_port = htons((uint16_t)port);
    snprintf(host_port, cap, "%s:%u", host, port);
    l->host_port = host_port;
    return 0;
}

int bench_serve(struct bench *b)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct own own = { 0 };
    struct load l = { .model = "bench", .n_valid = 4000 };
    struct engine *e = NULL;
    char host_port[96];
    long long output;
    uint32_t most = 1;
    const char *url = args_str(b->args, "url");
    if (!args_int(b->args, "output", 1, 1 << 20, 128, &output))
        return EXIT_USAGE;
    for (uint32_t i = 0; i < b->n_batch; i++)
        most = b->batch[i] > most ? b->batch[i] : most;
    int status = EXIT_OK;
    if (url == NULL) {
        size_t n;
        status = bench_find_model(b);       /* the server opens the plugins: only one registry may, before a GPU is in use */
        if (status == EXIT_OK && start(b, &own, most, &err) < 0)
            status = cmd_fail(b->args, &err);
        if (status == EXIT_OK) {
            e = host_models(own.host, &n)[0]->engine;
            l.n_valid = engine_model(e)->n_valid;
            url = http_server_url(own.http);
        }
    } else {
        l.model = args_str(b->args, "model") ? args_str(b->args, "model") : "";
        l.key = args_str(b->args, "key");
    }
    if (status == EXIT_OK && parse_url(url, &l, host_port, sizeof host_port) < 0) {
        fprintf(stderr, "arle bench: --url wants http://ADDRESS:PORT\n");
        status = EXIT_USAGE;
    }
    l.output = (uint32_t)output;
    for (uint32_t c = 0; status == EXIT_OK && c < b->n_context; c++)
        for (uint32_t i = 0; status == EXIT_OK && i < b->n_batch; i++) {
            l.input = b->context[c];
            status = measure(b, &l, b->batch[i], e);
        }
    stop(&own);
    return status;
}
