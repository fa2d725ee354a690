/*
 * The memory of calls.h: sections with a reference count in a list by last use, and a search tree (tsearch) over their
 * calls. The lock is held for tree and list only; comparing and copying go on outside it.
 */
#include "chat/calls.h"

#include <pthread.h>
#include <search.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>

#include <json-c/json.h>

#include "util/jfield.h"

struct kept_section;

struct kept_call {
    const char *tenant, *id;            /* the key; they live in the section */
    struct kept_section *section;
    uint32_t index;
    struct given_call given;
};

struct kept_section {
    TAILQ_ENTRY(kept_section) by_use;   /* guarded by call_memory.mu */
    atomic_uint refs;                   /* the memory's, and one per recall that looks; the rest is constant */
    char *tenant;
    struct call_section s;
    struct kept_call *calls; uint32_t n_calls;
    size_t bytes;
};

struct call_memory {
    pthread_mutex_t mu;                 /* guards everything below */
    void *tree;                         /* of struct kept_call */
    TAILQ_HEAD(, kept_section) by_use;  /* the least recently used first */
    uint32_t max_calls;
    size_t max_bytes;
    struct call_memory_stats st;
};

/* ---- life ---- */

void call_section_fini(struct call_section *s)
{
    sbuf_fini(&s->lead);
    sbuf_fini(&s->text);
    sbuf_fini(&s->shown);
    free(s->added);
    *s = (struct call_section){ 0 };
}

static void section_unref(struct kept_section *k)
{
    if (k == NULL || atomic_fetch_sub(&k->refs, 1) > 1)
        return;
    for (uint32_t i = 0; i < k->n_calls; i++) {
        sbuf_fini(&k->calls[i].given.name);
        sbuf_fini(&k->calls[i].given.args);
    }
    call_section_fini(&k->s);
    free(k->calls);
    free(k->tenant);
    free(k);
}

struct call_memory *call_memory_create(uint32_t max_calls, size_t max_bytes)
{
    struct call_memory *mem = calloc(1, sizeof *mem);
    if (mem == NULL)
        return NULL;
    pthread_mutex_init(&mem->mu, NULL);
    TAILQ_INIT(&mem->by_use);
    mem->max_calls = max_calls;
    mem->max_bytes = max_bytes;
    return mem;
}

static int by_key(const void *x, const void *y)
{
    const struct kept_call *a = x, *b = y;
    int d = strcmp(a->id, b->id);
    return d != 0 ? d : strcmp(a->tenant, b->tenant);
}

/* Caller holds mu. */
static void forget(struct call_memory *mem, struct kept_section *k)
{
    for (uint32_t i = 0; i < k->n_calls; i++)
        tdelete(&k->calls[i], &mem->tree, by_key);
    TAILQ_REMOVE(&mem->by_use, k, by_use);
    mem->st.calls -= k->n_calls;
    mem->st.bytes -= k->bytes;
    section_unref(k);
}

void call_memory_destroy(struct call_memory *mem)
{
    if (mem == NULL)
        return;
    while (!TAILQ_EMPTY(&mem->by_use))
        forget(mem, TAILQ_FIRST(&mem->by_use));
    pthread_mutex_destroy(&mem->mu);
    free(mem);
}

void call_memory_stat(struct call_memory *mem, struct call_memory_stats *out)
{
    *out = (struct call_memory_stats){ 0 };
    if (mem == NULL)
        return;
    pthread_mutex_lock(&mem->mu);
    *out = mem->st;
    pthread_mutex_unlock(&mem->mu);
}

/* ---- keeping ---- */

static void copy_text(struct sbuf *to, const struct sbuf *from)
{
    sbuf_add(to, sbuf_text(from), from->n);
}

/* Takes *s. NULL without memory. */
static struct kept_section *section_create(const char *tenant, struct call_section *s, const struct given_call *calls,
                                           uint32_t n)
{
    struct kept_section *k = calloc(1, sizeof *k);
    if (k == NULL) {
        call_section_fini(s);
        return NULL;
    }
    atomic_init(&k->refs, 1);
    k->s = *s;
    *s = (struct call_section){ 0 };
    k->tenant = strdup(tenant);
    k->calls = calloc(n, sizeof *k->calls);
    bool good = k->tenant != NULL && k->calls != NULL && !k->s.lead.failed && !k->s.text.failed && !k->s.shown.failed;
    k->bytes = sizeof *k + strlen(tenant) + k->s.lead.cap + k->s.text.cap + k->s.shown.cap +
               k->s.n_added * sizeof *k->s.added;
    for (uint32_t i = 0; i < n && good; i++) {
        struct kept_call *c = &k->calls[k->n_calls++];
        *c = (struct kept_call){ .tenant = k->tenant, .id = c->given.id, .section = k, .index = i };
        memcpy(c->given.id, calls[i].id, sizeof c->given.id);
        copy_text(&c->given.name, &calls[i].name);
        copy_text(&c->given.args, &calls[i].args);
        good = !c->given.name.failed && !c->given.args.failed;
        k->bytes += sizeof *c + c->given.name.cap + c->given.args.cap;
    }
    if (!good) {
        section_unref(k);
        return NULL;
    }
    return k;
}

/* Caller holds mu. False: an id is known already, or there is no memory for the tree; nothing has changed then. */
static bool insert(struct call_memory *mem, struct kept_section *k)
{
    for (uint32_t i = 0; i < k->n_calls; i++) {
        struct kept_call *const *at = tsearch(&k->calls[i], &mem->tree, by_key);
        if (at != NULL && *at == &k->calls[i])
            continue;
        while (i-- > 0)
            tdelete(&k->calls[i], &mem->tree, by_key);
        return false;
    }
    TAILQ_INSERT_TAIL(&mem->by_use, k, by_use);
    mem->st.calls += k->n_calls;
    mem->st.bytes += k->bytes;
    return true;
}

void call_memory_keep(struct call_memory *mem, const char *tenant, struct call_section *s, const struct given_call *calls,
                      uint32_t n_calls)
{
    struct kept_section *k = section_create(tenant, s, calls, n_calls);
    if (k == NULL || n_calls == 0 || n_calls > mem->max_calls || k->bytes > mem->max_bytes) {
        section_unref(k);
        return;
    }
    pthread_mutex_lock(&mem->mu);
    while (mem->st.calls + n_calls > mem->max_calls || mem->st.bytes + k->bytes > mem->max_bytes)
        forget(mem, TAILQ_FIRST(&mem->by_use));
    bool kept = insert(mem, k);
    pthread_mutex_unlock(&mem->mu);
    if (!kept)
        section_unref(k);
}

/* ---- comparing ---- */

static struct json_object *member(struct json_object *o, const char *key)
{
    struct json_object *v = NULL;
    return json_object_is_type(o, json_type_object) && json_object_object_get_ex(o, key, &v) ? v : NULL;
}

static bool is_number(struct json_object *v)
{
    return json_object_is_type(v, json_type_int) || json_object_is_type(v, json_type_double);
}

/* 1, 1.0 and 1e0 are one number: clients write them anew. */
static bool same_number(struct json_object *a, struct json_object *b)
{
    if (json_object_is_type(a, json_type_int) && json_object_is_type(b, json_type_int))
        return json_object_get_int64(a) == json_object_get_int64(b) &&
               json_object_get_uint64(a) == json_object_get_uint64(b);
    double x = json_object_get_double(a), y = json_object_get_double(b);
    return !(x < y) && !(x > y);
}

/* Equal as JSON values: the order of members does not count. Depth is bounded by the parser's. */
static bool same_value(struct json_object *a, struct json_object *b)
{
    if (is_number(a) && is_number(b))
        return same_number(a, b);
    if (json_object_get_type(a) != json_object_get_type(b))
        return false;
    if (json_object_is_type(a, json_type_array)) {
        size_t n = json_object_array_length(a);
        if (n != json_object_array_length(b))
            return false;
        for (size_t i = 0; i < n; i++)
            if (!same_value(json_object_array_get_idx(a, i), json_object_array_get_idx(b, i)))
                return false;
        return true;
    }
    if (!json_object_is_type(a, json_type_object))
        return json_object_equal(a, b);
    if (json_object_object_length(a) != json_object_object_length(b))
        return false;
    json_object_object_foreach(a, key, value) {
        struct json_object *other;
        if (!json_object_object_get_ex(b, key, &other) || !same_value(value, other))
            return false;
    }
    return true;
}

static bool same_text(struct json_object *v, const struct sbuf *text)
{
    return json_object_is_type(v, json_type_string) && (size_t)json_object_get_string_len(v) == text->n &&
           memcmp(json_object_get_string(v), sbuf_text(text), text->n) == 0;
}

static const char *id_of(struct json_object *call)
{
    struct json_object *id = member(call, "id");
    return json_object_is_type(id, json_type_string) ? json_object_get_string(id) : NULL;
}

static bool unchanged(struct json_object *call, const struct given_call *given)
{
    const char *id = id_of(call);
    struct json_object *args = NULL;
    if (id == NULL || strcmp(id, given->id) != 0 || !same_text(member(call, "name"), &given->name))
        return false;
    if (json_text_parse_object(sbuf_text(&given->args), given->args.n, "it", &args, NULL) < 0)
        return false;
    bool same = same_value(args, member(call, "arguments"));
    json_object_put(args);
    return same;
}

/* ---- recalling ---- */

/* One message on its way: its calls, and per call the section that is written in its place. */
struct recall {
    struct json_object *msg, *list;
    struct kept_section **at;           /* [n] referenced where a section begins; the calls in it follow */
    size_t n;
};

/* The section that begins with that call, referenced and marked as used; or NULL. */
static struct kept_section *look_up(struct call_memory *mem, const char *tenant, const char *id)
{
    struct kept_call key = { .tenant = tenant, .id = id };
    struct kept_section *k = NULL;
    pthread_mutex_lock(&mem->mu);
    struct kept_call *const *found = tfind(&key, &mem->tree, by_key);
    if (found != NULL && (*found)->index == 0) {
        k = (*found)->section;
        atomic_fetch_add(&k->refs, 1);
        TAILQ_REMOVE(&mem->by_use, k, by_use);
        TAILQ_INSERT_TAIL(&mem->by_use, k, by_use);
    }
    pthread_mutex_unlock(&mem->mu);
    return k;
}

static bool section_unchanged(const struct recall *rc, size_t i, const struct kept_section *k)
{
    if (k->n_calls > rc->n - i)
        return false;
    for (uint32_t j = 0; j < k->n_calls; j++)
        if (!unchanged(json_object_array_get_idx(rc->list, i + j), &k->calls[j].given))
            return false;
    return true;
}

/* Returns the number of calls that are known and unchanged. */
static size_t find_sections(struct call_memory *mem, const char *tenant, struct recall *rc)
{
    size_t known = 0;
    for (size_t i = 0; i < rc->n;) {
        const char *id = id_of(json_object_array_get_idx(rc->list, i));
        struct kept_section *k = id != NULL ? look_up(mem, tenant, id) : NULL;
        if (k != NULL && section_unchanged(rc, i, k)) {
            rc->at[i] = k;
            known += k->n_calls;
            i += k->n_calls;
        } else {
            section_unref(k);
            i++;
        }
    }
    return known;
}

/* Clients get all content in one string. What stood behind the calls goes back there, if the string still ends so. */
static bool part_content(const struct recall *rc)
{
    struct json_object *content = member(rc->msg, "content");
    struct sbuf shown = SBUF_INIT;
    for (size_t i = 0; i < rc->n; i++)
        if (rc->at[i] != NULL)
            copy_text(&shown, &rc->at[i]->s.shown);
    size_t len = json_object_is_type(content, json_type_string) ? (size_t)json_object_get_string_len(content) : 0;
    const char *text = len > 0 ? json_object_get_string(content) : "";
    bool parted = shown.n > 0 && shown.n <= len && memcmp(text + len - shown.n, shown.p, shown.n) == 0;
    if (parted)
        json_object_object_add(rc->msg, "raw_content", json_object_new_string_len(text, (int)(len - shown.n)));
    sbuf_fini(&shown);
    return parted;
}

/* ["ordinary", "added", "ordinary", ...] of the first n bytes of the text. */
static struct json_object *pieces(const struct call_section *s, size_t n)
{
    struct json_object *list = json_object_new_array();
    size_t at = 0;
    for (size_t i = 0; i < s->n_added && s->added[i].begin < n; i++) {
        const struct tok_range *r = &s->added[i];
        json_object_array_add(list, json_object_new_string_len(s->text.p + at, (int)(r->begin - at)));
        json_object_array_add(list, json_object_new_string_len(s->text.p + r->begin, (int)(r->end - r->begin)));
        at = r->end;
    }
    if (at < n)
        json_object_array_add(list, json_object_new_string_len(s->text.p + at, (int)(n - at)));
    return list;
}

/* The white space before a section belongs to what stood there when it was sampled. */
static bool lead_fits(const struct recall *rc, size_t i, const struct call_section *s, bool after_raw)
{
    struct json_object *part = member(rc->msg, "raw_content");
    struct json_object *content = part != NULL ? part : member(rc->msg, "content");
    if (!s->has_lead)
        return false;
    if (s->follows_section || i > 0)
        return s->follows_section && after_raw;
    bool has_content = json_object_is_type(content, json_type_string) && json_object_get_string_len(content) > 0;
    return has_content == s->follows_content;
}

static void add_raw(struct json_object *call, struct json_object *lead, struct json_object *text)
{
    struct json_object *raw = json_object_new_object();
    if (lead != NULL)
        json_object_object_add(raw, "lead", lead);
    json_object_object_add(raw, "text", text);
    json_object_object_add(call, "raw", raw);
}

static void write_sections(const struct recall *rc, bool all)
{
    bool parted = all && part_content(rc), after_raw = false;
    for (size_t i = 0; i < rc->n;) {
        const struct kept_section *k = rc->at[i];
        if (k == NULL) {
            after_raw = false;
            i++;
            continue;
        }
        const struct call_section *s = &k->s;
        struct json_object *lead = lead_fits(rc, i, s, after_raw)
                                       ? json_object_new_string_len(sbuf_text(&s->lead), (int)s->lead.n) : NULL;
        size_t n = parted || s->shown.n == 0 ? s->text.n : s->text_len;
        add_raw(json_object_array_get_idx(rc->list, i), lead, pieces(s, n));
        for (uint32_t j = 1; j < k->n_calls; j++)       /* written with the first of the section */
            add_raw(json_object_array_get_idx(rc->list, i + j), json_object_new_string(""), json_object_new_array());
        i += k->n_calls;
        after_raw = true;
    }
}

static void recall_message(struct call_memory *mem, const char *tenant, struct json_object *msg)
{
    struct recall rc = { .msg = msg, .list = member(msg, "tool_calls") };
    rc.n = json_object_is_type(rc.list, json_type_array) ? json_object_array_length(rc.list) : 0;
    if (rc.n == 0 || (rc.at = calloc(rc.n, sizeof *rc.at)) == NULL)
        return;
    size_t known = find_sections(mem, tenant, &rc);
    write_sections(&rc, known == rc.n);
    for (size_t i = 0; i < rc.n; i++)
        section_unref(rc.at[i]);
    free(rc.at);
    pthread_mutex_lock(&mem->mu);
    mem->st.recalled += known;
    mem->st.unknown += rc.n - known;
    pthread_mutex_unlock(&mem->mu);
}

void call_memory_recall(struct call_memory *mem, const char *tenant, struct json_object *conversation)
{
    struct json_object *messages = member(conversation, "messages");
    size_t n = mem != NULL && json_object_is_type(messages, json_type_array) ? json_object_array_length(messages) : 0;
    for (size_t i = 0; i < n; i++)
        recall_message(mem, tenant, json_object_array_get_idx(messages, i));
}
