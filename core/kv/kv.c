/*
 * Life and books of the KV plane: allocation of all cache memory, the binding for the model, salts, statistics.
 * Sequences are in kv_seq.c.
 */
#include "kv/kv_int.h"

#include <stdlib.h>

#define ROOT_NODES 4096u        /* nodes for roots, one per tenant and client salt in use */
#define MAX_NODES (1u << 21)
#define MAX_SNAPS (1u << 18)
#define MAX_DEV_SNAPS 65536u
#define STORE_SNAPS 4096u       /* states that only the cluster has */

static int check_config(const struct kv_config *c, const struct arle_cache_group *g, uint32_t n_groups, struct arle_err *err)
{
    if (n_groups == 0 || n_groups > ARLE_MAX_CACHE_GROUPS)
        return arle_err_set(err, -EINVAL, "a model must have 1 to %d cache groups, this one has %u", ARLE_MAX_CACHE_GROUPS, n_groups);
    if (c->page_tokens == 0 || c->page_tokens > 4096)
        return arle_err_param(err, -EINVAL, "page_tokens", "page_tokens is %u, must be 1 to 4096", c->page_tokens);
    if (c->n_pages == 0 || c->n_pages > INT32_MAX / 2)
        return arle_err_param(err, -EINVAL, "n_pages", "%u cache pages", c->n_pages);
    if (c->n_slots == 0 || c->n_slots > 1u << 20)
        return arle_err_param(err, -EINVAL, "n_slots", "%u sequence slots", c->n_slots);
    if (c->max_seq_tokens == 0 || c->max_seq_tokens > INT32_MAX / 2)
        return arle_err_param(err, -EINVAL, "max_seq_tokens", "longest sequence of %u tokens", c->max_seq_tokens);
    for (uint32_t i = 0; i < n_groups; i++) {
        bool paged = g[i].kind == ARLE_CACHE_PAGED;
        if (!paged && g[i].kind != ARLE_CACHE_STATE && g[i].kind != ARLE_CACHE_WINDOW)
            return arle_err_param(err, -EINVAL, g[i].name, "cache group of unknown kind %u", g[i].kind);
        if ((paged ? g[i].page_bytes : g[i].record_bytes) == 0)
            return arle_err_param(err, -EINVAL, g[i].name, "cache group without bytes");
        if (paged && g[i].tokens_per_entry != 0 && c->page_tokens % g[i].tokens_per_entry != 0)
            return arle_err_param(err, -EINVAL, "page_tokens", "page_tokens %u is no multiple of the %u tokens per entry of group %s",
                                  c->page_tokens, g[i].tokens_per_entry, g[i].name);
    }
    return 0;
}

static int alloc_groups(struct kv *kv, struct arle_err *err)
{
    for (uint32_t i = 0; i < kv->n_groups; i++) {
        const struct arle_cache_group *g = &kv->group[i];
        size_t bytes, count = group_is_paged(g) ? (size_t)kv->cfg.n_pages + 1 : (size_t)kv->cfg.n_slots + 1 + kv->cfg.n_side;
        if (arle_mul_size(&bytes, count, group_is_paged(g) ? g->page_bytes : g->record_bytes) < 0)
            return arle_err_param(err, -EOVERFLOW, g->name, "cache group %s is too large", g->name);
        int r = kv->mem->alloc(kv->dev, ARLE_MEM_DEVICE, bytes, &kv->base[i], err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Everything a step may need is counted here once: nodes for every page in every tier, snapshots for every record. */
static int size_tree(struct kv *kv, struct arle_err *err)
{
    uint64_t snaps = kv->has_state && kv->cfg.prefix_cache ? kv->cfg.snapshot_bytes / kv->state_total : 0;
    if (snaps > MAX_DEV_SNAPS)
        snaps = MAX_DEV_SNAPS;
    uint64_t nodes = (uint64_t)kv->cfg.n_pages + ROOT_NODES, more_snaps = 0;
    if (kv->page_total > 0)
        nodes += (kv->cfg.host_bytes + (kv->disk_dir[0] != '\0' ? kv->cfg.disk_bytes : 0)) / kv->page_total;
    if (kv->has_state)
        more_snaps = (kv->cfg.host_bytes + (kv->disk_dir[0] != '\0' ? kv->cfg.disk_bytes : 0)) / kv->state_total;
    if (kv->has_state && kv->cfg.store != NULL)
        more_snaps += STORE_SNAPS;
    nodes = nodes > MAX_NODES ? MAX_NODES : nodes;
    more_snaps = more_snaps > MAX_SNAPS ? MAX_SNAPS : more_snaps;
    int r = tree_init(kv, (uint32_t)nodes, (uint32_t)(snaps + more_snaps), (uint32_t)snaps, err);
    if (r == 0 && snaps > 0)
        r = kv->mem->alloc(kv->dev, ARLE_MEM_DEVICE, snaps * kv->state_total, (void **)&kv->snap_base, err);
    return r;
}

int kv_create(struct kv **out, const struct kv_config *cfg, struct arle_device *dev, const struct arle_mem_ops *mem,
              struct arle_stream *compute, const struct arle_cache_group *groups, uint32_t n_groups, struct arle_err *err)
{
    int r = check_config(cfg, groups, n_groups, err);
    if (r < 0)
        return r;
    struct kv *kv = calloc(1, sizeof *kv);
    if (kv == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the KV plane");
    kv->cfg = *cfg;
    kv->dev = dev;
    kv->mem = mem;
    kv->compute = compute;
    kv->n_groups = n_groups;
    memcpy(kv->group, groups, n_groups * sizeof *groups);
    for (uint32_t i = 0; i < n_groups; i++) {
        if (group_is_paged(&groups[i]))
            kv->page_total += groups[i].page_bytes;
        else
            kv->state_total += groups[i].record_bytes;
    }
    kv->has_state = kv->state_total > 0;
    kv->pt = cfg->page_tokens;
    kv->max_pages = pages_for(kv, cfg->max_seq_tokens);
    if (kv->cfg.snapshot_align == 0)
        kv->cfg.snapshot_align = 64;
    if (kv->cfg.tenant_quota_pct == 0 || kv->cfg.tenant_quota_pct > 100)
        kv->cfg.tenant_quota_pct = 100;
    if (kv->cfg.pin_pct == 0 || kv->cfg.pin_pct > 100)
        kv->cfg.pin_pct = 50;
    kv->identity = strdup(cfg->identity != NULL ? cfg->identity : "");
    kv->disk_dir = strdup(cfg->disk_dir != NULL ? cfg->disk_dir : "");
    if (kv->identity == NULL || kv->disk_dir == NULL)
        r = arle_err_set(err, -ENOMEM, "no memory for the KV plane");
    if (r == 0 && (page_pool_init(&kv->pages, 1, cfg->n_pages) < 0 || page_pool_init(&kv->slots, 1, cfg->n_slots) < 0))
        r = arle_err_set(err, -ENOMEM, "no memory for the books of %u cache pages", cfg->n_pages);
    if (r == 0)
        r = alloc_groups(kv, err);
    if (r == 0)
        r = size_tree(kv, err);
    if (r == 0)
        r = move_init(kv, err);
    if (r == 0)
        r = slow_init(kv, err);
    if (r < 0) {
        kv_destroy(kv);
        return r;
    }
    kv_publish_stats(kv);
    *out = kv;
    return 0;
}

static void seq_list_free(struct kv_seq *s)
{
    while (s != NULL) {
        struct kv_seq *next = s->next;
        free(s->tokens);
        free(s->pages);
        free(s->hpages);
        if (s->ev != NULL)
            s->kv->mem->event_destroy(s->kv->dev, s->ev);
        free(s);
        s = next;
    }
}

void kv_destroy(struct kv *kv)
{
    if (kv == NULL)
        return;
    slow_fini(kv);
    move_fini(kv);
    seq_list_free(kv->seqs);
    seq_list_free(kv->spare);
    seq_list_free(kv->zombies);
    for (uint32_t i = 0; i < kv->n_groups; i++)
        if (kv->base[i] != NULL)
            kv->mem->free(kv->dev, ARLE_MEM_DEVICE, kv->base[i]);
    if (kv->snap_base != NULL)
        kv->mem->free(kv->dev, ARLE_MEM_DEVICE, kv->snap_base);
    pin_fini(kv);
    tree_fini(kv);
    page_pool_fini(&kv->pages);
    page_pool_fini(&kv->slots);
    free(kv->identity);
    free(kv->disk_dir);
    free(kv);
}

void kv_binding(const struct kv *kv, struct arle_cache_binding *out)
{
    *out = (struct arle_cache_binding){ .struct_size = sizeof *out, .n_groups = kv->n_groups };
    for (uint32_t i = 0; i < kv->n_groups; i++) {
        out->group[i].base = kv->base[i];
        out->group[i].stride = group_is_paged(&kv->group[i]) ? kv->group[i].page_bytes : kv->group[i].record_bytes;
    }
}

static void salt_half(const struct kv *kv, const char *what, const char *text, uint8_t out[16])
{
    struct kv_blake b;
    kv_blake_init(&b, 16, kv->cfg.secret, sizeof kv->cfg.secret);
    kv_blake_update(&b, what, strlen(what) + 1);
    kv_blake_update(&b, text != NULL ? text : "", strlen(text != NULL ? text : ""));
    kv_blake_final(&b, out);
}

void kv_salt(const struct kv *kv, const char *tenant, const char *client, uint8_t out[KV_SALT_BYTES])
{
    salt_half(kv, "tenant", tenant, out);
    salt_half(kv, "client", client, out + 16);
}

void kv_publish_stats(struct kv *kv)
{
    struct kv_stats s = kv->st;
    s.pages_total = kv->pages.n;
    s.pages_free = kv->pages.n_free;
    s.pages_cached = kv->idle_pages;
    s.host_bytes = (uint64_t)(kv->host_pages.n - kv->host_pages.n_free) * kv->page_total
                   + (uint64_t)(kv->host_states.n - kv->host_states.n_free) * kv->state_total;
    if (kv->slow != NULL)
        slow_stats(kv, &s);
    s.snapshot_bytes = (uint64_t)(kv->snap_pool.n - kv->snap_pool.n_free) * kv->state_total;
    s.pins = kv->n_pins;
    s.pinned_pages = kv->pinned_nodes;
    s.pinned_states = kv->pinned_snaps;
    s.slots_total = kv->slots.n;
    s.slots_free = kv->slots.n_free;
    uint64_t words[sizeof s / sizeof(uint64_t)];
    memcpy(words, &s, sizeof s);
    /* Odd while writing. Pairs with the loads in kv_stat: a reader that saw the same even number twice has a whole copy. */
    uint32_t seq = atomic_load_explicit(&kv->pub_seq, memory_order_relaxed);
    atomic_store_explicit(&kv->pub_seq, seq + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    for (size_t i = 0; i < sizeof s / sizeof(uint64_t); i++)
        atomic_store_explicit(&kv->pub[i], words[i], memory_order_relaxed);
    atomic_store_explicit(&kv->pub_seq, seq + 2, memory_order_release);
}

uint32_t kv_pages_lost(const struct kv *kv)
{
    uint32_t lost = 0;
    for (uint32_t i = 0; i < kv->pages.n; i++) {
        int32_t page = (int32_t)(kv->pages.first + i);
        uint32_t refs = kv->page_node[page] >= 0;
        for (const struct kv_seq *s = kv->seqs; s != NULL; s = s->next)
            for (uint32_t k = 0; k < s->n_pages; k++)
                refs += s->pages[k] == page;
        for (int m = 0; m < N_MOVES; m++)
            for (uint32_t k = 0; k < kv->move[m].n; k++)
                refs += kv->move[m].up && kv->move[m].item[k].node >= 0 && kv->move[m].item[k].dev == page;
        for (uint32_t k = 0; k < kv->pages.n_free; k++)
            refs += kv->pages.stack[k] == page;
        lost += refs != (kv->pages.refs[page] > 0 ? kv->pages.refs[page] : 1u);
    }
    return lost;
}

void kv_stat(const struct kv *kv, struct kv_stats *out)
{
    uint64_t words[sizeof *out / sizeof(uint64_t)];
    uint32_t before, after;
    do {
        before = atomic_load_explicit(&kv->pub_seq, memory_order_acquire);
        for (size_t i = 0; i < sizeof *out / sizeof(uint64_t); i++)
            words[i] = atomic_load_explicit(&kv->pub[i], memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire);
        after = atomic_load_explicit(&kv->pub_seq, memory_order_relaxed);
    } while (before != after || (before & 1) != 0);
    memcpy(out, words, sizeof *out);
}

const char *kv_miss_text(enum kv_miss miss)
{
    switch (miss) {
    case KV_MISS_NONE: return "none";
    case KV_MISS_OFF: return "prefix cache is off";
    case KV_MISS_COLD: return "prompt not seen before";
    case KV_MISS_NO_STATE: return "no state snapshot at the point of divergence";
    case KV_MISS_EVICTED: return "evicted";
    case KV_MISS_LAST_TOKEN: return "last token is always computed";
    case KV_MISS_DIVERGED: return "prompt diverges from what is remembered";
    case KV_MISS_NOT_WORTH: return "computing was expected to be faster than fetching";
    case KV_MISS_NOT_FETCHED: return "could not be fetched from a lower tier now";
    }
    return "unknown";
}
