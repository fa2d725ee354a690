/* Commands of kv_command.h. */
#include "daemon/kv_command.h"

#include <string.h>

#include <json-c/json.h>

#include "chat/messages.h"
#include "chat/render.h"
#include "kv/kv.h"
#include "kv/kv_admin.h"
#include "sched/engine.h"

#define FLUSH_DEADLINE_MS 10000
#define WARM_DEADLINE_MS 600000
#define PIN_DEADLINE_MS 10000

static void put_u64(struct sbuf *out, const char *key, uint64_t v)
{
    sbuf_fmt(out, ",\"%s\":%llu", key, (unsigned long long)v);
}

static int say_stat(struct host *h, struct sbuf *out)
{
    static const char *const down[4] = { NULL, "demoted_host", "demoted_disk", "demoted_store" };
    static const char *const up[4] = { NULL, "promoted_host", "promoted_disk", "promoted_store" };
    size_t n;
    struct served_model *const *models = host_models(h, &n);
    sbuf_char(out, '[');
    for (size_t i = 0; i < n; i++) {
        struct kv_stats k = { 0 };
        engine_kv_stat(models[i]->engine, &k);
        sbuf_str(out, i ? ",{\"model\":" : "{\"model\":");
        sbuf_json_cstr(out, models[i]->name);
        put_u64(out, "pages", k.pages_total);
        put_u64(out, "pages_free", k.pages_free);
        put_u64(out, "pages_cached", k.pages_cached);
        put_u64(out, "slots", k.slots_total);
        put_u64(out, "slots_free", k.slots_free);
        put_u64(out, "lookups", k.lookups);
        put_u64(out, "hits", k.hits);
        put_u64(out, "lookup_tokens", k.lookup_tokens);
        put_u64(out, "hit_tokens", k.hit_tokens);
        put_u64(out, "snapshots", k.snapshots);
        put_u64(out, "snapshot_bytes", k.snapshot_bytes);
        put_u64(out, "pages_evicted", k.pages_evicted);
        put_u64(out, "pins", k.pins);
        put_u64(out, "pinned_pages", k.pinned_pages);
        put_u64(out, "pinned_states", k.pinned_states);
        put_u64(out, "pins_yielded", k.pins_yielded);
        put_u64(out, "host_bytes", k.host_bytes);
        put_u64(out, "disk_bytes", k.disk_bytes);
        put_u64(out, "disk_user_bytes", k.disk_user_bytes);
        put_u64(out, "disk_written", k.disk_written_bytes);
        put_u64(out, "store_gets", k.store_gets);
        put_u64(out, "store_puts", k.store_puts);
        put_u64(out, "store_errors", k.store_errors);
        for (int t = 1; t < 4; t++) {
            put_u64(out, down[t], k.demoted_bytes[t]);
            put_u64(out, up[t], k.promoted_bytes[t]);
        }
        sbuf_char(out, '}');
    }
    sbuf_char(out, ']');
    return 0;
}

/* ---- verify ---- */

static void put_folder(void *arg, const struct kv_admin_folder *f)
{
    struct sbuf *out = arg;
    sbuf_str(out, out->n > 1 ? ",{\"folder\":" : "{\"folder\":");
    sbuf_json_cstr(out, f->name);
    put_u64(out, "pages", f->st.pages);
    put_u64(out, "states", f->st.states);
    put_u64(out, "bytes", f->st.file_bytes);
    put_u64(out, "damaged", f->bad + f->st.bad_objects);
    put_u64(out, "skipped_bytes", f->st.skipped_bytes);
    sbuf_char(out, '}');
}

static int verify(const char *disk_dir, struct sbuf *out, struct arle_err *err)
{
    if (*disk_dir == '\0')
        return arle_err_param(err, -EINVAL, "kv.disk_dir", "there is no disk tier: kv.disk_dir is empty");
    sbuf_char(out, '[');
    int n = kv_admin_each(disk_dir, true, put_folder, out, err);
    sbuf_char(out, ']');
    return n < 0 ? n : 0;
}

/* ---- flush ---- */

static int flush(struct host *h, struct sbuf *out, struct arle_err *err)
{
    size_t n;
    struct served_model *const *models = host_models(h, &n);
    for (size_t i = 0; i < n; i++) {
        int r = engine_kv_flush(models[i]->engine, FLUSH_DEADLINE_MS);
        if (r < 0)
            return arle_err_set(err, r, "%s did not get to it: %s", models[i]->name, strerror(-r));
    }
    uint64_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        struct kv_stats k = { 0 };
        engine_kv_stat(models[i]->engine, &k);
        kept += k.pinned_pages;
    }
    sbuf_fmt(out, "{\"flushed\":true,\"pinned_pages\":%llu}", (unsigned long long)kept);
    return 0;
}

/* ---- warm ---- */

static int find_served(struct host *h, struct json_object *body, struct served_model **out, struct arle_err *err)
{
    size_t n;
    struct served_model *const *models = host_models(h, &n);
    struct json_object *name = NULL;
    json_object_object_get_ex(body, "model", &name);
    for (size_t i = 0; i < n; i++) {
        if (name == NULL ? n > 1 : strcmp(models[i]->name, json_object_get_string(name)) != 0)
            continue;
        *out = models[i];
        return 0;
    }
    return arle_err_param(err, -ENOENT, "model", name == NULL ? "several models are served: name one in \"model\"" : "no such model is served");
}

/* A prompt that a command is about: the one of a request body in a file. body owns what cache_salt points to. */
struct subject {
    struct served_model *m;
    struct json_object *body;
    struct prompt p;
    const char *tenant, *cache_salt;
};

static void subject_fini(struct subject *s)
{
    prompt_fini(&s->p);
    json_object_put(s->body);
}

static int subject_read(struct subject *s, struct host *h, const char *file, const char *tenant, struct arle_err *err)
{
    struct json_object *conversation = NULL, *salt = NULL;
    *s = (struct subject){ .tenant = tenant, .cache_salt = "", .body = json_object_from_file(file) };
    int r = json_object_is_type(s->body, json_type_object) ? 0
            : arle_err_set(err, -EINVAL, "%.400s: cannot be read, or is not the body of a chat request", file);
    if (r == 0 && json_object_object_get_ex(s->body, "cache_salt", &salt) && salt != NULL) {
        s->cache_salt = json_object_get_string(salt);
        if (!json_object_is_type(salt, json_type_string))
            r = arle_err_param(err, -EINVAL, "cache_salt", "cache_salt must be a string");
    }
    if (r == 0)
        r = find_served(h, s->body, &s->m, err);
    if (r == 0)
        r = chat_request_from_body(s->body, s->m->chat_options, true, &conversation, err);
    if (r == 0)
        r = prompt_render(&s->p, s->m, tenant, conversation, err);
    json_object_put(conversation);
    return r;
}

/* Like a request of the HTTP interface that asks for one token, so that what it leaves is what such a request finds. */
static int compute(const struct subject *s, struct request_usage *usage, struct arle_err *err)
{
    struct request *rq = NULL;
    struct token_event ev;
    struct request_args a = {
        .tokens = s->p.ids.ids, .n_tokens = (uint32_t)s->p.ids.n, .marks = s->p.marks, .n_marks = s->p.n_marks, .max_new = 1, .n = 1,
        .sampling = { .top_p = 1, .repetition = 1 }, .tenant = s->tenant, .cache_salt = s->cache_salt, .deadline_ms = WARM_DEADLINE_MS,
    };
    int retry = 0, r = engine_submit(s->m->engine, &a, &rq, &retry, err);
    if (r < 0)
        return r;
    int failed = 0;
    while ((r = request_next(rq, &ev)) != -EPIPE) {
        if (r == 0)
            request_wait(rq, 1000);
        else if (ev.kind == EV_FINISH && ev.finish != FINISH_STOP && ev.finish != FINISH_LENGTH)
            failed = ev.error < 0 ? ev.error : -ECANCELED;
    }
    bool known = request_usage(rq, usage);
    request_unref(rq);
    return failed == 0 && known ? 0 : arle_err_set(err, failed ? failed : -EIO, "the prompt was not computed to its end");
}

static int warm(const struct subject *s, struct sbuf *out, struct arle_err *err)
{
    struct request_usage u = { 0 };
    int r = compute(s, &u, err);
    if (r == 0)
        sbuf_fmt(out, "{\"prompt_tokens\":%u,\"cached_tokens\":%u,\"ms\":%lld}", u.prompt_tokens, u.cached_tokens,
                 (long long)u.total_us / 1000);
    return r;
}

/* ---- pin ---- */

static int order(const struct subject *s, enum pin_what what, struct kv_pinned *k, struct arle_err *err)
{
    struct pin_args a = {
        .what = what, .tokens = s->p.ids.ids, .n_tokens = (uint32_t)s->p.ids.n, .marks = s->p.marks, .n_marks = s->p.n_marks,
        .tenant = s->tenant, .cache_salt = s->cache_salt,
    };
    return engine_kv_pin(s->m->engine, &a, k, PIN_DEADLINE_MS, err);
}

/* All of the model's, after an order. */
static void put_pins(struct sbuf *out, const struct kv_pinned *k)
{
    put_u64(out, "pins", k->pins);
    put_u64(out, "pinned_pages", k->all_pages);
    put_u64(out, "pinned_states", k->all_states);
}

static int pin(const struct subject *s, struct sbuf *out, struct arle_err *err)
{
    struct request_usage u = { 0 };
    struct kv_pinned k = { 0 };
    int r = compute(s, &u, err);        /* costs one token when it is all remembered */
    if (r == 0)
        r = order(s, PIN_TAKE, &k, err);
    if (r < 0)
        return r;
    sbuf_fmt(out, "{\"prompt_tokens\":%u,\"pinned_tokens\":%u,\"pages\":%u,\"states\":%u", u.prompt_tokens, k.tokens, k.pages, k.states);
    put_pins(out, &k);
    sbuf_char(out, '}');
    return 0;
}

static int unpin(const struct subject *s, struct sbuf *out, struct arle_err *err)
{
    struct kv_pinned k = { 0 };
    int r = order(s, PIN_RELEASE, &k, err);
    if (r < 0)
        return r;
    sbuf_str(out, "{\"unpinned\":true");
    put_pins(out, &k);
    sbuf_char(out, '}');
    return 0;
}

static int unpin_all(struct host *h, struct sbuf *out, struct arle_err *err)
{
    size_t n;
    struct served_model *const *models = host_models(h, &n);
    for (size_t i = 0; i < n; i++) {
        struct pin_args a = { .what = PIN_RELEASE_ALL };
        struct kv_pinned k;
        int r = engine_kv_pin(models[i]->engine, &a, &k, PIN_DEADLINE_MS, err);
        if (r < 0)
            return r;
    }
    sbuf_str(out, "{\"unpinned\":true}");
    return 0;
}

/* ---- all of them ---- */

typedef int (*subject_fn)(const struct subject *s, struct sbuf *out, struct arle_err *err);

/* "FILE" or "FILE TENANT"; a name with spaces cannot be said, as the protocol splits at them. */
static int with_file(struct host *h, const char *word, const char *argument, subject_fn fn, struct sbuf *out, struct arle_err *err)
{
    struct subject s;
    char file[4096];
    size_t len = strcspn(argument, " ");
    snprintf(file, sizeof file, "%.*s", (int)len, argument);
    if (len == 0 || file[0] != '/')
        return arle_err_set(err, -EINVAL, "%s wants the absolute path of a file with the body of a chat request", word);
    int r = subject_read(&s, h, file, argument + len + strspn(argument + len, " "), err);
    if (r == 0)
        r = fn(&s, out, err);
    subject_fini(&s);
    return r;
}

int kv_command(struct host *h, const char *disk_dir, const char *argument, struct sbuf *out, struct arle_err *err)
{
    static const struct { const char *word; subject_fn fn; } files[] = { { "warm", warm }, { "pin", pin }, { "unpin", unpin } };
    size_t len = strcspn(argument, " ");
    const char *rest = argument + len + strspn(argument + len, " ");
    if (*argument == '\0' || strcmp(argument, "stat") == 0)
        return say_stat(h, out);
    if (strcmp(argument, "verify") == 0)
        return verify(disk_dir, out, err);
    if (strcmp(argument, "flush") == 0)
        return flush(h, out, err);
    if (strcmp(argument, "unpin all") == 0)
        return unpin_all(h, out, err);
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++)
        if (strlen(files[i].word) == len && strncmp(argument, files[i].word, len) == 0)
            return with_file(h, files[i].word, rest, files[i].fn, out, err);
    return arle_err_set(err, -EINVAL, "unknown command \"kv %.60s\"; there is stat, verify, flush, warm FILE [TENANT], pin FILE [TENANT], "
                        "unpin FILE [TENANT], unpin all", argument);
}
