/*
 * Disk and cluster as the tree sees them: what is written there (idle pages and states that have a host copy, parents first, ends
 * on the 64-token grid only), what is read when a promotion asks, and what to believe when a tier says no. The work itself is done
 * by movers (kv_mover.c); here everything runs on the engine thread.
 */
#include "kv/kv_int.h"
#include "kv/kv_mover.h"

#include <stdlib.h>

#define CADENCE 64u                 /* only what ends on this grid leaves memory: tails are rewritten too often */
#define WRITES_PER_STEP 8u
#define MAX_QUEUED 24u              /* writes handed over at once: reads wait behind them */
#define FLUSH_MS 20000              /* at destroy */
#define PROBES 64u
#define PROBE_KEEP_US 30000000
#define BACKOFF_MIN_US 1000000
#define BACKOFF_MAX_US 30000000

struct asked { uint64_t hash; int64_t until_us; bool pending; };

struct kv_slow {
    struct kv_mover disk, store;    /* .disk / .store NULL when there is none */
    uint64_t next_id;
    uint64_t *dels; uint32_t n_dels, cap_dels;
    int32_t *marks; uint32_t n_marks, cap_marks;        /* nodes, and ~snapshots, of which the disk is told whether they are pinned */
    uint8_t (*keys)[32];            /* cluster key of each node */
    int64_t store_shut_until, store_backoff;
    struct asked asked[PROBES]; uint32_t next_asked;
    struct kv_disk_stats stats;     /* copied when results come back, so that a quiet step takes no lock */
};

/* ---- keys of the cluster ------------------------------------------------------------------------------------------------ */

static void key_step(const uint8_t parent[32], char kind, const int32_t *tokens, uint32_t n, uint8_t out[32])
{
    struct kv_blake b;
    kv_blake_init(&b, 32, parent, 32);
    kv_blake_update(&b, &kind, 1);
    kv_blake_update(&b, tokens, (size_t)n * 4);
    kv_blake_final(&b, out);
}

/* The root's key holds what must be equal between machines: identity, salt, page size. */
static void key_root(const struct kv *kv, int root, uint8_t out[32])
{
    struct kv_blake b;
    kv_blake_init(&b, 32, kv->roots[root].salt, KV_SALT_BYTES);
    kv_blake_update(&b, &kv->pt, 4);
    kv_blake_update(&b, &kv->page_total, 8);
    kv_blake_update(&b, &kv->state_total, 8);
    kv_blake_update(&b, kv->identity, strlen(kv->identity));
    kv_blake_final(&b, out);
}

static const uint8_t *key_of(struct kv *kv, int32_t node)
{
    struct kv_slow *sl = kv->slow;
    for (;;) {                      /* from the nearest ancestor that knows its key downwards, once each */
        int32_t i = node, need = -1;
        for (; !kv->nodes[i].has_key; i = kv->nodes[i].parent) {
            need = i;
            if (kv->nodes[i].fill == 0)
                break;
        }
        if (need < 0)
            return sl->keys[node];
        const struct kv_node *n = &kv->nodes[need];
        if (n->fill == 0)
            key_root(kv, n->root, sl->keys[need]);
        else
            key_step(sl->keys[n->parent], 'P', node_toks(kv, need), n->fill, sl->keys[need]);
        kv->nodes[need].has_key = 1;
    }
}

static bool store_open(const struct kv *kv)
{
    return kv->slow->store.store != NULL && clock_mono_us() >= kv->slow->store_shut_until;
}

static void store_shut(struct kv *kv)
{
    struct kv_slow *sl = kv->slow;
    sl->store_backoff = sl->store_backoff == 0 ? BACKOFF_MIN_US : sl->store_backoff * 2;
    if (sl->store_backoff > BACKOFF_MAX_US)
        sl->store_backoff = BACKOFF_MAX_US;
    sl->store_shut_until = clock_mono_us() + sl->store_backoff;
}

/* ---- what should be written --------------------------------------------------------------------------------------------- */

static void put_or_remove(struct kv_heap *h, int32_t id, bool in, double key)
{
    if (in)
        kv_heap_put(h, id, key);
    else if (h->cap > 0)
        kv_heap_remove(h, id);
}

void slow_update_node(struct kv *kv, int32_t i)
{
    const struct kv_node *n = &kv->nodes[i];
    bool idle = n->parent >= 0 && n->users == 0 && n->host >= 0 && n->busy == 0;
    const struct kv_node *up = n->parent >= 0 ? &kv->nodes[n->parent] : NULL;
    bool root_above = up != NULL && up->fill == 0;
    if (kv->slow->disk.disk != NULL)
        put_or_remove(&kv->disk_heap, i, idle && !n->no_disk && n->disk == 0 && n->disk_new == 0 && (root_above || up->disk || up->disk_new)
                      && (n->fill == kv->pt || (n->start + n->fill) % CADENCE == 0), n->start);
    if (kv->slow->store.store != NULL)
        put_or_remove(&kv->store_heap, i, idle && !n->no_store && !n->store && !n->store_new && n->fill == kv->pt
                      && (root_above || up->store || up->store_new), n->start);
}

void slow_update_snap(struct kv *kv, int32_t i)
{
    const struct kv_snap *s = &kv->snaps[i];
    bool idle = s->node >= 0 && s->users == 0 && s->host >= 0 && s->pos % CADENCE == 0;
    const struct kv_node *n = s->node >= 0 ? &kv->nodes[s->node] : NULL;
    if (kv->slow->disk.disk != NULL)
        put_or_remove(&kv->snap_disk_heap, i, idle && !s->no_disk && s->disk == 0 && s->disk_new == 0 && (n->disk || n->disk_new), s->pos);
    if (kv->slow->store.store != NULL)
        put_or_remove(&kv->snap_store_heap, i, idle && !s->no_store && !s->store && !s->store_new && (n->store || n->store_new)
                      && s->pos == n->start + kv->pt, s->pos);
}

static void update_below(struct kv *kv, int32_t node)
{
    for (int32_t k = kv->nodes[node].child; k >= 0; k = kv->nodes[k].next)
        slow_update_node(kv, k);
    for (int32_t s = kv->nodes[node].snaps; s >= 0; s = kv->snaps[s].next)
        slow_update_snap(kv, s);
}

/* Pins and counts what a job is about, and fills in what both tiers want to know. */
static void job_node(struct kv *kv, struct kv_job *j, int op, int32_t node, int32_t host)
{
    struct kv_node *n = &kv->nodes[node];
    *j = (struct kv_job){ .op = (uint8_t)op, .host = host, .data = host_page_ptr(kv, host),
                          .o = { .kind = KV_DISK_PAGE, .start = n->start, .n_tokens = n->fill, .tokens = node_toks(kv, node),
                                 .bytes = kv->page_total, .handle = node } };
    memcpy(j->salt, kv->roots[n->root].salt, KV_SALT_BYTES);
    n->busy++;
    tree_hold(kv, node);
}

static void job_snap(struct kv *kv, struct kv_job *j, int op, int32_t snap, int32_t host)
{
    struct kv_snap *s = &kv->snaps[snap];
    *j = (struct kv_job){ .op = (uint8_t)op, .host = host, .data = host_state_ptr(kv, host),
                          .o = { .kind = KV_DISK_STATE, .start = s->pos, .bytes = kv->state_total, .handle = snap } };
    s->busy++;
    s->users++;
    snap_update(kv, snap);
    tree_hold(kv, s->node);
}

static void submit(struct kv_mover *m, const struct kv_job *j)
{
    KV_CHECK(mover_submit(m, j));       /* callers look at in_flight first */
}

static void write_disk(struct kv *kv)
{
    struct kv_slow *sl = kv->slow;
    struct kv_job j;
    for (uint32_t i = 0; i < WRITES_PER_STEP && sl->disk.in_flight < MAX_QUEUED; i++) {
        int32_t node = kv_heap_min(&kv->disk_heap), snap = kv->has_state ? kv_heap_min(&kv->snap_disk_heap) : -1;
        if (snap >= 0) {
            job_snap(kv, &j, JOB_PUT, snap, kv->snaps[snap].host);
            j.o.parent = kv->nodes[kv->snaps[snap].node].disk ? kv->nodes[kv->snaps[snap].node].disk : kv->nodes[kv->snaps[snap].node].disk_new;
            j.o.id = kv->snaps[snap].disk_new = sl->next_id++;
            page_ref(&kv->host_states, j.host);
            slow_update_snap(kv, snap);
        } else if (node >= 0) {
            const struct kv_node *up = &kv->nodes[kv->nodes[node].parent];
            job_node(kv, &j, JOB_PUT, node, kv->nodes[node].host);
            j.o.parent = up->disk ? up->disk : up->disk_new;
            j.o.id = kv->nodes[node].disk_new = sl->next_id++;
            page_ref(&kv->host_pages, j.host);
            slow_update_node(kv, node);
            update_below(kv, node);
        } else {
            return;
        }
        submit(&sl->disk, &j);
    }
}

static void write_store(struct kv *kv)
{
    struct kv_slow *sl = kv->slow;
    struct kv_job j;
    for (uint32_t i = 0; i < WRITES_PER_STEP && sl->store.in_flight < MAX_QUEUED; i++) {
        int32_t node = kv_heap_min(&kv->store_heap), snap = kv->has_state ? kv_heap_min(&kv->snap_store_heap) : -1;
        if (snap >= 0) {
            job_snap(kv, &j, JOB_PUT, snap, kv->snaps[snap].host);
            key_step(key_of(kv, kv->snaps[snap].node), 'S', NULL, 0, j.key);
            kv->snaps[snap].store_new = 1;
            page_ref(&kv->host_states, j.host);
            slow_update_snap(kv, snap);
        } else if (node >= 0) {
            job_node(kv, &j, JOB_PUT, node, kv->nodes[node].host);
            memcpy(j.key, key_of(kv, node), 32);
            kv->nodes[node].store_new = 1;
            page_ref(&kv->host_pages, j.host);
            slow_update_node(kv, node);
            update_below(kv, node);
        } else {
            return;
        }
        submit(&sl->store, &j);
    }
}

/* Says what holds now: marks may be handled in any order, and more than once. */
static void tell_pinned(struct kv *kv, int32_t mark)
{
    uint64_t id = mark >= 0 ? kv->nodes[mark].disk : kv->snaps[~mark].disk;
    bool pinned = (mark >= 0 ? kv->nodes[mark].pinned : kv->snaps[~mark].pinned) > 0;
    struct kv_job j = { .op = JOB_PIN, .o = { .id = id, .parent = 1 }, .pinned = pinned };
    if (id != 0)
        submit(&kv->slow->disk, &j);
}

static void mark_pinned(struct kv *kv, int32_t mark)
{
    struct kv_slow *sl = kv->slow;
    if (sl->n_marks == sl->cap_marks) {
        uint32_t cap = sl->cap_marks ? sl->cap_marks * 2 : 1024;
        int32_t *more = realloc(sl->marks, cap * sizeof *more);
        if (more == NULL)
            return;                 /* its segment goes in its turn */
        sl->marks = more;
        sl->cap_marks = cap;
    }
    sl->marks[sl->n_marks++] = mark;
}

void slow_pinned_node(struct kv *kv, int32_t i)
{
    if (kv->slow != NULL && kv->slow->disk.disk != NULL && kv->nodes[i].disk != 0)
        mark_pinned(kv, i);
}

void slow_pinned_snap(struct kv *kv, int32_t i)
{
    if (kv->slow != NULL && kv->slow->disk.disk != NULL && kv->snaps[i].disk != 0)
        mark_pinned(kv, ~i);
}

void slow_write(struct kv *kv)
{
    struct kv_slow *sl = kv->slow;
    if (sl->disk.disk != NULL) {
        while (sl->n_dels > 0 && sl->disk.in_flight < MAX_QUEUED) {
            struct kv_job j = { .op = JOB_DEL, .o = { .id = sl->dels[--sl->n_dels], .parent = 1 } };
            submit(&sl->disk, &j);
        }
        while (sl->n_marks > 0 && sl->disk.in_flight < MAX_QUEUED)
            tell_pinned(kv, sl->marks[--sl->n_marks]);
        write_disk(kv);
    }
    if (sl->store.store != NULL && (kv->store_heap.n > 0 || kv->snap_store_heap.n > 0) && store_open(kv))
        write_store(kv);
}

static void forget_id(struct kv *kv, uint64_t id)
{
    struct kv_slow *sl = kv->slow;
    if (id == 0)
        return;
    if (sl->n_dels == sl->cap_dels) {
        uint64_t *more = realloc(sl->dels, (size_t)sl->cap_dels * 2 * sizeof *more);
        if (more == NULL)
            return;                 /* it stays on disk until its segment goes; it is true, only unknown */
        sl->dels = more;
        sl->cap_dels *= 2;
    }
    sl->dels[sl->n_dels++] = id;
}

void slow_orphan_snaps(struct kv *kv, int32_t node)
{
    for (int32_t i = kv->nodes[node].snaps, next; i >= 0; i = next) {
        struct kv_snap *s = &kv->snaps[i];
        next = s->next;
        if (s->disk == 0 && s->disk_new == 0)
            continue;
        s->disk = s->disk_new = 0;
        if (s->dev < 0 && !snap_elsewhere(s) && s->users == 0)
            snap_drop(kv, i);
        else
            snap_update(kv, i);
    }
}

void slow_forget_node(struct kv *kv, int32_t i)
{
    struct kv_node *n = &kv->nodes[i];
    slow_orphan_snaps(kv, i);
    forget_id(kv, n->disk);
    n->disk = n->disk_new = 0;          /* one being written is dropped when it comes back under an id nobody has */
    n->store = n->store_new = 0;
    if (n->parent >= 0)
        slow_update_node(kv, i);
}

void slow_forget_snap(struct kv *kv, int32_t i)
{
    forget_id(kv, kv->snaps[i].disk);
    kv->snaps[i].disk = kv->snaps[i].disk_new = 0;
    kv->snaps[i].store = kv->snaps[i].store_new = 0;
}

/* ---- reading ------------------------------------------------------------------------------------------------------------ */

static bool read_node(struct kv *kv, int32_t i)
{
    struct kv_node *n = &kv->nodes[i];
    struct kv_slow *sl = kv->slow;
    struct kv_mover *m = n->disk != 0 ? &sl->disk : &sl->store;
    struct kv_job j;
    if (m->in_flight >= MOVER_JOBS / 2)
        return true;
    if (n->disk == 0 && !store_open(kv))
        return false;
    int32_t host = host_page_get(kv);
    if (host < 0)
        return sl->disk.in_flight + sl->store.in_flight + kv->in_flight > 0;       /* some will be free soon, or never */
    job_node(kv, &j, JOB_GET, i, host);
    j.o.id = n->disk;
    j.o.parent = 1;
    if (n->disk == 0)
        memcpy(j.key, key_of(kv, i), 32);
    submit(m, &j);
    return true;
}

static bool read_snap(struct kv *kv, int32_t i)
{
    struct kv_snap *s = &kv->snaps[i];
    struct kv_slow *sl = kv->slow;
    struct kv_mover *m = s->disk != 0 ? &sl->disk : &sl->store;
    struct kv_job j;
    if (m->in_flight >= MOVER_JOBS / 2)
        return true;
    if (s->disk == 0 && !store_open(kv))
        return false;
    int32_t host = host_state_get(kv);
    if (host < 0)
        return sl->disk.in_flight + sl->store.in_flight + kv->in_flight > 0;
    job_snap(kv, &j, JOB_GET, i, host);
    j.o.id = s->disk;
    j.o.parent = 1;
    if (s->disk == 0)
        key_step(key_of(kv, s->node), 'S', NULL, 0, j.key);
    submit(m, &j);
    return true;
}

bool slow_read(struct kv *kv, int32_t node, int32_t snap)
{
    if (snap >= 0) {
        const struct kv_snap *s = &kv->snaps[snap];
        if (s->dev < 0 && s->host < 0 && s->busy == 0 && (s->disk || s->store) && !read_snap(kv, snap))
            return false;
    }
    uint32_t len = move_path(kv, node);
    for (uint32_t i = 0; i < len; i++) {        /* from the root down, as they will be copied up */
        const struct kv_node *n = &kv->nodes[kv->path[i]];
        if (n->page < 0 && n->host < 0 && n->busy == 0 && (n->disk || n->store) && !read_node(kv, kv->path[i]))
            return false;
    }
    return true;
}

/* ---- asking the cluster -------------------------------------------------------------------------------------------------- */

static void probe_free(struct kv_probe *p)
{
    if (p == NULL)
        return;
    free(p->items);
    free(p->present);
    free(p);
}

/* The node that the question starts below: the deepest full page that is known. */
static int32_t known_until(const struct kv *kv, int root, const int32_t *tokens, uint32_t n, uint32_t *depth)
{
    int32_t at = kv->roots[root].node;
    struct kv_match m;
    tree_match(kv, root, tokens, n, n, false, &m);
    uint32_t full = m.depth / kv->pt * kv->pt;
    for (*depth = 0; *depth < full; *depth += kv->pt) {
        int32_t next = kv->nodes[at].child;
        while (next >= 0 && (kv->nodes[next].fill < kv->pt || memcmp(node_toks(kv, next), tokens + *depth, kv->pt * 4) != 0))
            next = kv->nodes[next].next;
        if (next < 0)
            break;
        at = next;
    }
    return at;
}

static struct kv_probe *probe_new(struct kv *kv, int root, const int32_t *tokens, uint32_t n)
{
    struct kv_probe *p = calloc(1, sizeof *p);
    uint32_t depth, most = n / kv->pt;
    int32_t at = known_until(kv, root, tokens, n, &depth);
    uint8_t key[32];
    if (p == NULL || most * kv->pt <= depth)
        goto none;
    p->items = calloc((size_t)most * 2, sizeof *p->items);
    p->present = calloc((size_t)most * 2, 1);
    if (p->items == NULL || p->present == NULL)
        goto none;
    p->root = root;
    p->first = depth;
    p->n_pages = most - depth / kv->pt;
    memcpy(key, key_of(kv, at), 32);
    for (uint32_t i = 0; i < p->n_pages; i++) {
        key_step(key, 'P', tokens + depth + i * kv->pt, kv->pt, p->items[i].key);
        memcpy(key, p->items[i].key, 32);
    }
    p->n = p->n_pages;
    for (uint32_t i = 0; kv->has_state && i < p->n_pages; i++)
        key_step(p->items[i].key, 'S', NULL, 0, p->items[p->n++].key);
    return p;
none:
    probe_free(p);
    return NULL;
}

int slow_ask(struct kv *kv, int root, const int32_t *tokens, uint32_t n, const struct kv_match *m)
{
    struct kv_slow *sl = kv->slow;
    if (sl->store.store == NULL || m->pos + CADENCE >= n || kv->host_pages.n == 0 || !store_open(kv))
        return 0;
    uint64_t hash = kv_hash64(kv->nodes[kv->roots[root].node].hash, tokens, (size_t)n * 4);
    int64_t now = clock_mono_us();
    for (uint32_t i = 0; i < PROBES; i++)
        if (sl->asked[i].hash == hash && sl->asked[i].until_us > now)
            return sl->asked[i].pending ? -EINPROGRESS : 0;
    if (sl->store.in_flight >= MOVER_JOBS / 2)
        return 0;
    struct kv_probe *p = probe_new(kv, root, tokens, n);
    if (p == NULL)
        return 0;
    struct asked *a = &sl->asked[sl->next_asked++ % PROBES];
    *a = (struct asked){ .hash = hash, .until_us = now + PROBE_KEEP_US, .pending = true };
    p->hash = hash;
    /* The tokens must outlive this call: the answer is entered into the tree from the copy behind the items. */
    int32_t *copy = malloc((size_t)n * 4);
    struct kv_job j = { .op = JOB_PROBE, .probe = p, .data = copy, .o = { .n_tokens = n } };
    if (copy == NULL) {
        probe_free(p);
        a->pending = false;
        return 0;
    }
    memcpy(copy, tokens, (size_t)n * 4);
    tree_use(kv, kv->roots[root].node);         /* the answer is for this salt, whoever comes meanwhile */
    submit(&sl->store, &j);
    return -EINPROGRESS;
}

/* Enters what the cluster has, as far as it is whole from the start (and, with state groups, up to its last state). */
static void probe_enter(struct kv *kv, const struct kv_probe *p, const int32_t *tokens, uint32_t n)
{
    uint32_t depth, pages = 0;
    while (pages < p->n_pages && p->present[pages])
        pages++;
    if (kv->has_state)
        while (pages > 0 && !p->present[p->n_pages + pages - 1])
            pages--;
    int32_t at = known_until(kv, p->root, tokens, n, &depth);
    for (uint32_t i = (depth - p->first) / kv->pt; depth >= p->first && i < pages; i++) {
        int32_t node = tree_enter(kv, at, tokens + p->first + i * kv->pt, kv->pt);
        if (node < 0)
            return;
        kv->nodes[node].store = 1;
        memcpy(kv->slow->keys[node], p->items[i].key, 32);
        kv->nodes[node].has_key = 1;
        if (kv->has_state && p->present[p->n_pages + i]) {
            int32_t snap = snap_new(kv, node, p->first + (i + 1) * kv->pt, kv->pt);
            if (snap >= 0) {
                kv->snaps[snap].store = 1;
                snap_update(kv, snap);
            }
        }
        tree_update(kv, node);
        at = node;
    }
}

/* ---- results --------------------------------------------------------------------------------------------------------------- */

static void drop_if_lost(struct kv *kv, uint32_t kind, int32_t i)
{
    if (kind == KV_DISK_PAGE) {
        const struct kv_node *n = &kv->nodes[i];
        if (n->parent >= 0 && n->page < 0 && !node_elsewhere(n) && n->users == 0)
            tree_remove(kv, i);
    } else {
        const struct kv_snap *s = &kv->snaps[i];
        if (s->node >= 0 && s->dev < 0 && !snap_elsewhere(s) && s->users == 0)
            snap_drop(kv, i);
    }
}

static void disk_lost(struct kv *kv, const struct kv_job *j)
{
    int32_t i = j->o.handle;
    if (i < 0)
        return;
    if (j->o.kind == KV_DISK_PAGE && (uint32_t)i < kv->nodes_used && kv->nodes[i].disk == j->o.id) {
        kv->nodes[i].disk = 0;
        kv->nodes[i].no_disk = 1;       /* or memory and disk would play ball with it */
        tree_update(kv, i);
    } else if (j->o.kind == KV_DISK_STATE && (uint32_t)i < kv->snaps_used && kv->snaps[i].disk == j->o.id) {
        kv->snaps[i].disk = 0;
        kv->snaps[i].no_disk = 1;
        move_update_snap(kv, i);
    } else {
        return;
    }
    drop_if_lost(kv, j->o.kind, i);
}

static void put_node_done(struct kv *kv, const struct kv_job *j, bool disk)
{
    struct kv_node *n = &kv->nodes[j->o.handle];
    n->busy--;
    if (disk && n->disk_new == j->o.id) {
        n->disk_new = 0;
        n->disk = j->result == 0 ? j->o.id : 0;
        n->no_disk = j->result < 0;
        if (n->pinned > 0)
            slow_pinned_node(kv, j->o.handle);
    } else if (disk && j->result == 0) {
        forget_id(kv, j->o.id);
    } else if (!disk && n->store_new) {
        n->store_new = 0;
        n->store = j->result == 0;
        n->no_store = j->result < 0;
    }
    page_unref(&kv->host_pages, j->host);
    tree_unhold(kv, j->o.handle);
    tree_update(kv, j->o.handle);
    if (j->result < 0)
        update_below(kv, j->o.handle);
}

static void put_snap_done(struct kv *kv, const struct kv_job *j, bool disk)
{
    struct kv_snap *s = &kv->snaps[j->o.handle];
    s->busy--;
    s->users--;
    if (disk && s->disk_new == j->o.id) {
        s->disk_new = 0;
        s->disk = j->result == 0 ? j->o.id : 0;
        s->no_disk = j->result < 0;
        if (s->pinned > 0)
            slow_pinned_snap(kv, j->o.handle);
    } else if (!disk && s->store_new) {
        s->store_new = 0;
        s->store = j->result == 0;
        s->no_store = j->result < 0;
    }
    page_unref(&kv->host_states, j->host);
    snap_update(kv, j->o.handle);
    tree_unhold(kv, s->node);
}

static void get_node_done(struct kv *kv, const struct kv_job *j, bool disk)
{
    struct kv_node *n = &kv->nodes[j->o.handle];
    n->busy--;
    if (j->result == 0 && n->host < 0 && n->fill == j->o.n_tokens) {
        n->origin = disk ? TIER_DISK : TIER_STORE;
        node_set_host(kv, j->o.handle, j->host);
    } else {
        page_unref(&kv->host_pages, j->host);
        if (j->result < 0 && disk)
            n->disk = 0;
        if (j->result < 0 && !disk)
            n->store = 0;
    }
    tree_unhold(kv, j->o.handle);
    tree_update(kv, j->o.handle);
}

static void get_snap_done(struct kv *kv, const struct kv_job *j, bool disk)
{
    struct kv_snap *s = &kv->snaps[j->o.handle];
    s->busy--;
    s->users--;
    if (j->result == 0 && s->host < 0) {
        s->origin = disk ? TIER_DISK : TIER_STORE;
        s->host = j->host;
    } else {
        page_unref(&kv->host_states, j->host);
        if (j->result < 0 && disk)
            s->disk = 0;
        if (j->result < 0 && !disk)
            s->store = 0;
    }
    snap_update(kv, j->o.handle);
    tree_unhold(kv, s->node);
}

static void probe_done(struct kv *kv, struct kv_job *j)
{
    struct kv_slow *sl = kv->slow;
    for (uint32_t i = 0; i < PROBES; i++)
        if (sl->asked[i].hash == j->probe->hash)
            sl->asked[i].pending = false;
    if (j->result == 0)
        probe_enter(kv, j->probe, j->data, j->o.n_tokens);
    tree_unuse(kv, kv->roots[j->probe->root].node);
    probe_free(j->probe);
    free(j->data);
}

/* Books of a tier: bytes, bandwidth, and whether the cluster has earned to be asked again. */
static void account(struct kv *kv, const struct kv_job *j, bool disk)
{
    enum kv_tier tier = disk ? TIER_DISK : TIER_STORE;
    struct kv_slow *sl = kv->slow;
    if (j->op == JOB_GET && j->result == 0) {
        kv->st.promoted_bytes[tier] += j->o.bytes;
        move_measured(kv, tier, j->o.bytes, j->us);
    }
    if (j->op == JOB_PUT && j->result == 0)
        kv->st.demoted_bytes[tier] += j->o.bytes;
    if (disk)
        return;
    kv->st.store_gets += j->op == JOB_GET;
    kv->st.store_puts += j->op == JOB_PUT;
    if (j->result < 0 && j->result != -ENOENT)
        kv->st.store_errors++;
    if (j->result == 0 && j->op != JOB_PROBE)
        sl->store_backoff = 0;
    uint64_t least = kv->cfg.store_min_bytes_s > 0 ? kv->cfg.store_min_bytes_s : 1000000;
    bool slow = j->result == 0 && j->op == JOB_GET && kv->tier_bytes_s[TIER_STORE] < (double)least;
    if ((slow || (j->result < 0 && j->result != -ENOENT && j->result != -EBADMSG)) && clock_mono_us() >= sl->store_shut_until)
        store_shut(kv);
    if (slow)
        kv->tier_bytes_s[TIER_STORE] = (double)least * 2;      /* measured anew when it is tried again */
}

static void job_done(struct kv *kv, struct kv_job *j, bool disk)
{
    if (j->op == JOB_LOST) {
        disk_lost(kv, j);
        return;
    }
    if (j->op == JOB_DEL || j->op == JOB_PIN)
        return;
    account(kv, j, disk);
    if (j->op == JOB_PROBE)
        probe_done(kv, j);
    else if (j->o.kind == KV_DISK_PAGE)
        (j->op == JOB_PUT ? put_node_done : get_node_done)(kv, j, disk);
    else
        (j->op == JOB_PUT ? put_snap_done : get_snap_done)(kv, j, disk);
}

static void copy_stats(struct kv_slow *sl)
{
    pthread_mutex_lock(&sl->disk.mu);
    sl->stats = sl->disk.stats;
    pthread_mutex_unlock(&sl->disk.mu);
}

bool slow_poll(struct kv *kv)
{
    struct kv_job j;
    bool probed = false;
    bool news = false;
    while (kv->slow->disk.disk != NULL && mover_take(&kv->slow->disk, &j)) {
        job_done(kv, &j, true);
        news = true;
    }
    if (news)
        copy_stats(kv->slow);
    while (kv->slow->store.store != NULL && mover_take(&kv->slow->store, &j)) {
        probed = probed || j.op == JOB_PROBE;
        job_done(kv, &j, false);
    }
    return probed;
}

bool slow_idle(const struct kv *kv)
{
    const struct kv_slow *sl = kv->slow;
    bool disk = sl->disk.disk == NULL
                || (sl->disk.in_flight == 0 && sl->n_dels == 0 && sl->n_marks == 0 && kv->disk_heap.n == 0 && kv->snap_disk_heap.n == 0);
    bool shut = sl->store.store == NULL || !store_open(kv);
    return disk && (sl->store.store == NULL || (sl->store.in_flight == 0
                    && (shut || (kv->store_heap.n == 0 && kv->snap_store_heap.n == 0))));
}

void slow_stats(const struct kv *kv, struct kv_stats *st)
{
    const struct kv_disk_stats *d = &kv->slow->stats;
    st->disk_bytes = d->file_bytes;
    st->disk_user_bytes = d->user_bytes;
    st->disk_written_bytes = d->written_bytes;
}

/* ---- life -------------------------------------------------------------------------------------------------------------------- */

struct load { struct kv *kv; uint64_t *ids; int32_t *nodes; uint32_t n, cap; };

/* The node of an object, -1 when it has none: none was made, or it lost its place to a later one. */
static int32_t load_find(const struct load *l, uint64_t id)
{
    uint32_t lo = 0, hi = l->n;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (l->ids[mid] < id)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < l->n && l->ids[lo] == id && l->kv->nodes[l->nodes[lo]].disk == id ? l->nodes[lo] : -1;
}

static void load_page(struct load *l, struct kv_disk_object *o)
{
    struct kv *kv = l->kv;
    int root = o->parent == 0 ? tree_root(kv, o->salt) : 0;
    int32_t up = o->parent == 0 ? (root < 0 ? -1 : kv->roots[root].node) : load_find(l, o->parent);
    if (up < 0 || o->n_tokens == 0 || o->n_tokens > kv->pt || o->bytes != kv->page_total || o->start % kv->pt != 0)
        return;
    if (o->start != kv->nodes[up].start + kv->nodes[up].fill || (o->parent != 0 && kv->nodes[up].fill != kv->pt))
        return;
    int32_t node = tree_enter(kv, up, o->tokens, o->n_tokens);
    if (node < 0 || kv->nodes[node].disk != 0)
        return;
    kv->nodes[node].disk = o->id;
    o->handle = node;
    if (l->n < l->cap) {
        l->ids[l->n] = o->id;
        l->nodes[l->n++] = node;
    }
}

static void load_object(void *arg, struct kv_disk_object *o)
{
    struct load *l = arg;
    struct kv *kv = l->kv;
    if (o->kind == KV_DISK_PAGE) {
        load_page(l, o);
        return;
    }
    int32_t node = load_find(l, o->parent);
    if (node < 0 || o->bytes != kv->state_total || o->start <= kv->nodes[node].start
        || o->start > kv->nodes[node].start + kv->nodes[node].fill)
        return;
    int32_t snap = snap_new(kv, node, o->start, kv->pt * 4);
    if (snap < 0)
        return;
    kv->snaps[snap].disk = o->id;
    o->handle = snap;
    snap_update(kv, snap);
}

static int open_disk(struct kv *kv, struct arle_err *err)
{
    struct kv_slow *sl = kv->slow;
    char identity[1200];
    /* The layout is part of what must be equal, beside the identity that the engine names. */
    int n = snprintf(identity, sizeof identity, "%s|page_tokens=%u|page_bytes=%llu|state_bytes=%llu", kv->identity, kv->pt,
                     (unsigned long long)kv->page_total, (unsigned long long)kv->state_total);
    if (n < 0 || (size_t)n >= sizeof identity)
        return arle_err_set(err, -EINVAL, "the model's identity is too long for the disk tier");
    struct kv_disk_config cfg = { .dir = kv->disk_dir, .identity = identity, .budget = kv->cfg.disk_bytes, .fsync = kv->cfg.disk_fsync };
    int r = kv_disk_open(&sl->disk.disk, &cfg, err);
    if (r < 0)
        return r;
    struct kv_disk_stats st;
    kv_disk_stat(sl->disk.disk, &st);
    struct load l = { .kv = kv, .cap = (uint32_t)st.pages };
    l.ids = calloc((size_t)l.cap + 1, sizeof *l.ids);
    l.nodes = calloc((size_t)l.cap + 1, sizeof *l.nodes);
    if (l.ids != NULL && l.nodes != NULL)
        kv_disk_each(sl->disk.disk, load_object, &l);
    free(l.ids);
    free(l.nodes);
    sl->next_id = kv_disk_max_id(sl->disk.disk) + 1;
    kv_disk_stat(sl->disk.disk, &sl->stats);
    return mover_start(&sl->disk, err);
}

int slow_init(struct kv *kv, struct arle_err *err)
{
    bool disk = kv->disk_dir[0] != '\0' && kv->cfg.prefix_cache, store = kv->cfg.store != NULL && kv->cfg.prefix_cache;
    if (!disk && !store)
        return 0;
    struct kv_slow *sl = calloc(1, sizeof *sl);
    if (sl == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the slow tiers");
    kv->slow = sl;
    sl->cap_dels = 65536;
    sl->dels = calloc(sl->cap_dels, sizeof *sl->dels);
    sl->keys = store ? calloc(kv->n_nodes, sizeof *sl->keys) : NULL;
    int r = sl->dels == NULL || (store && sl->keys == NULL) ? -ENOMEM : 0;
    if (r == 0 && disk)
        r = kv_heap_init(&kv->disk_heap, kv->n_nodes) < 0 || kv_heap_init(&kv->snap_disk_heap, kv->n_snaps) < 0 ? -ENOMEM : 0;
    if (r == 0 && store)
        r = kv_heap_init(&kv->store_heap, kv->n_nodes) < 0 || kv_heap_init(&kv->snap_store_heap, kv->n_snaps) < 0 ? -ENOMEM : 0;
    if (r < 0)
        return arle_err_set(err, r, "no memory for the books of the slow tiers");
    if (disk)
        r = open_disk(kv, err);
    if (r == 0 && store) {
        sl->store.store = kv->cfg.store;
        sl->store.store_ctx = kv->cfg.store_ctx;
        sl->store.deadline_ms = kv->cfg.store_deadline_ms > 0 ? kv->cfg.store_deadline_ms : 250;
        r = mover_start(&sl->store, err);
    }
    return r;
}

void slow_fini(struct kv *kv)
{
    struct kv_slow *sl = kv->slow;
    if (sl == NULL)
        return;
    if (sl->disk.started)
        kv_settle(kv, FLUSH_MS);
    struct kv_job j;
    mover_stop(&sl->disk);
    mover_stop(&sl->store);
    while (mover_take(&sl->store, &j))
        if (j.op == JOB_PROBE) {
            probe_free(j.probe);
            free(j.data);
        }
    mover_fini(&sl->disk);
    mover_fini(&sl->store);
    kv_disk_close(sl->disk.disk);
    kv_heap_fini(&kv->disk_heap);
    kv_heap_fini(&kv->store_heap);
    kv_heap_fini(&kv->snap_disk_heap);
    kv_heap_fini(&kv->snap_store_heap);
    free(sl->dels);
    free(sl->marks);
    free(sl->keys);
    free(sl);
    kv->slow = NULL;
}
