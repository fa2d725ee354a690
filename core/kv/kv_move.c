/*
 * Between device and host: copies down before the device runs full, copies up when a prompt asks for them, and which host copy
 * goes next. Copies run on their own stream, behind an event of the compute stream, in batches of one event each. Whatever is
 * being copied is in use in the tree until the event has passed.
 */
#include "kv/kv_int.h"

#include <inttypes.h>
#include <stdlib.h>

#define PROMO_KEEP_US 5000000       /* a promoted prefix nobody came back for is let go: sooner when somebody needs the room */
#define TAIL_LATER 1e15             /* more than any worth: what slower tiers take goes down before what they do not */
#define STAGE_PAGES 256u            /* host places at least, when there are slower tiers */
#define STAGE_STATES 8u
#define MIN_FETCH_TOKENS 16         /* shorter gains are not worth the trouble */

static int host_alloc(struct kv *kv, struct arle_err *err)
{
    uint64_t bytes = kv->cfg.host_bytes, state_bytes = 0;
    uint32_t pct = kv->cfg.host_state_pct > 0 && kv->cfg.host_state_pct < 100 ? kv->cfg.host_state_pct : 50;
    if (kv->has_state)
        state_bytes = kv->page_total > 0 ? bytes / 100 * pct : bytes;
    uint64_t n_pages = kv->page_total > 0 ? (bytes - state_bytes) / kv->page_total : 0;
    uint64_t n_states = kv->has_state ? state_bytes / kv->state_total : 0;
    if (kv->disk_dir[0] != '\0' || kv->cfg.store != NULL) {      /* slower tiers are reached through host memory */
        n_pages = kv->page_total > 0 && n_pages < STAGE_PAGES ? STAGE_PAGES : n_pages;
        n_states = kv->has_state && n_states < STAGE_STATES ? STAGE_STATES : n_states;
    }
    if (n_pages > INT32_MAX / 2 || n_states > INT32_MAX / 2)
        return arle_err_param(err, -EINVAL, "host_bytes", "host tier of %" PRIu64 " bytes has too many places", bytes);
    if (page_pool_init(&kv->host_pages, 0, (uint32_t)n_pages) < 0 || page_pool_init(&kv->host_states, 0, (uint32_t)n_states) < 0)
        return arle_err_set(err, -ENOMEM, "no memory for the books of the host tier");
    int r = 0;
    if (n_pages > 0)
        r = kv->mem->alloc(kv->dev, ARLE_MEM_PINNED, n_pages * kv->page_total, (void **)&kv->host_page_base, err);
    if (r == 0 && n_states > 0)
        r = kv->mem->alloc(kv->dev, ARLE_MEM_PINNED, n_states * kv->state_total, (void **)&kv->host_state_base, err);
    return r;
}

int move_init(struct kv *kv, struct arle_err *err)
{
    for (int i = 0; i < N_PROMOS; i++)
        kv->promo[i].node = -1;
    kv->tier_bytes_s[TIER_HOST] = 5e9;          /* guesses until measured */
    kv->tier_bytes_s[TIER_DISK] = 1e9;
    kv->tier_bytes_s[TIER_STORE] = 1e8;
    if (kv_heap_init(&kv->host_heap, kv->n_nodes) < 0 || kv_heap_init(&kv->down_heap, kv->n_nodes) < 0
        || kv_heap_init(&kv->snap_host_heap, kv->n_snaps) < 0 || kv_heap_init(&kv->snap_down_heap, kv->n_snaps) < 0)
        return arle_err_set(err, -ENOMEM, "no memory for the books of the host tier");
    kv->path = calloc((size_t)kv->max_pages + 1, sizeof *kv->path);
    if (kv->path == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for the books of the host tier");
    int r = host_alloc(kv, err);
    if (r < 0 || (kv->host_pages.n == 0 && kv->host_states.n == 0))
        return r;
    r = kv->mem->stream_create(kv->dev, &kv->copy, err);
    if (r == 0)
        r = kv->mem->event_create(kv->dev, &kv->behind, err);
    for (int i = 0; i < N_MOVES && r == 0; i++)
        r = kv->mem->event_create(kv->dev, &kv->move[i].ev, err);
    return r;
}

void move_fini(struct kv *kv)
{
    if (kv->copy != NULL)
        kv->mem->stream_destroy(kv->dev, kv->copy);
    if (kv->behind != NULL)
        kv->mem->event_destroy(kv->dev, kv->behind);
    for (int i = 0; i < N_MOVES; i++)
        if (kv->move[i].ev != NULL)
            kv->mem->event_destroy(kv->dev, kv->move[i].ev);
    if (kv->host_page_base != NULL)
        kv->mem->free(kv->dev, ARLE_MEM_PINNED, kv->host_page_base);
    if (kv->host_state_base != NULL)
        kv->mem->free(kv->dev, ARLE_MEM_PINNED, kv->host_state_base);
    free(kv->path);
    page_pool_fini(&kv->host_pages);
    page_pool_fini(&kv->host_states);
    kv_heap_fini(&kv->host_heap);
    kv_heap_fini(&kv->down_heap);
    kv_heap_fini(&kv->snap_host_heap);
    kv_heap_fini(&kv->snap_down_heap);
}

/* ---- places on the host --------------------------------------------------------------------------------------------- */

static void put_or_remove(struct kv_heap *h, int32_t id, bool in, double key)
{
    if (in)
        kv_heap_put(h, id, key);
    else
        kv_heap_remove(h, id);
}

void move_update_node(struct kv *kv, int32_t i)
{
    const struct kv_node *n = &kv->nodes[i];
    bool idle = n->parent >= 0 && n->users == 0;
    bool barren = kv->has_state && n->kids == 0 && n->snaps < 0;
    /* A pinned page that has left the device is not pushed out of a host tier. In the staging area everything has to pass. */
    bool stay = n->pinned > 0 && n->page < 0 && kv->cfg.host_bytes > 0;
    double late = n->pinned == 0 ? 0 : n->page >= 0 || n->disk != 0 || n->store ? KV_LATE : 2 * KV_LATE;
    put_or_remove(&kv->host_heap, i, idle && n->host >= 0 && n->host_kids == 0 && !stay, n->prio + late);
    /* What a slower tier has is not copied again: device and host would pass it round. Without a host tier of its own the host
     * takes only what can go further. */
    bool stays = n->disk == 0 && !n->store
                 && (kv->cfg.host_bytes > 0 || n->fill == kv->pt || (n->start + n->fill) % 64 == 0);
    put_or_remove(&kv->down_heap, i, kv->host_pages.n > 0 && idle && n->page >= 0 && n->host < 0 && !barren && stays
                  && kv->pages.refs[n->page] == 1, n->prio + (n->pinned > 0 ? KV_LATE : 0));
    if (kv->slow != NULL)
        slow_update_node(kv, i);
}

void move_update_snap(struct kv *kv, int32_t i)
{
    const struct kv_snap *s = &kv->snaps[i];
    bool idle = s->node >= 0 && s->users == 0;
    bool stay = s->pinned > 0 && s->dev < 0 && kv->cfg.host_bytes > 0;
    double late = s->pinned == 0 ? 0 : s->dev >= 0 || s->disk != 0 || s->store ? KV_LATE : 2 * KV_LATE;
    put_or_remove(&kv->snap_host_heap, i, idle && s->host >= 0 && !stay, s->prio + late);
    put_or_remove(&kv->snap_down_heap, i, kv->host_states.n > 0 && idle && s->dev >= 0 && s->host < 0
                  && s->disk == 0 && !s->store && (kv->cfg.host_bytes > 0 || s->pos % 64 == 0),
                  s->pinned > 0 ? s->prio + KV_LATE : kv->slow != NULL && s->pos % 64 == 0 ? s->prio - TAIL_LATER : s->prio);
    if (kv->slow != NULL)
        slow_update_snap(kv, i);
}

void node_set_host(struct kv *kv, int32_t i, int32_t slot)
{
    struct kv_node *n = &kv->nodes[i];
    int32_t old = n->host;
    if (old == slot)
        return;
    n->host = slot;
    if (n->parent >= 0 && (old < 0) != (slot < 0)) {
        kv->nodes[n->parent].host_kids += slot >= 0 ? 1 : -1;
        move_update_node(kv, n->parent);
    }
    if (old >= 0)
        page_unref(&kv->host_pages, old);
    tree_update(kv, i);
}

void snap_set_host(struct kv *kv, int32_t i, int32_t slot)
{
    if (kv->snaps[i].host >= 0)
        page_unref(&kv->host_states, kv->snaps[i].host);
    kv->snaps[i].host = slot;
    move_update_snap(kv, i);
}

void move_forget_node(struct kv *kv, int32_t i)
{
    if (kv->nodes[i].host >= 0)
        node_set_host(kv, i, -1);
    if (kv->slow != NULL)
        slow_forget_node(kv, i);
}

void move_forget_snap(struct kv *kv, int32_t i)
{
    if (kv->snaps[i].host >= 0)
        snap_set_host(kv, i, -1);
    if (kv->slow != NULL)
        slow_forget_snap(kv, i);
}

int32_t host_page_get(struct kv *kv)
{
    while (kv->host_pages.n_free == 0) {
        int32_t i = kv_heap_min(&kv->host_heap);
        if (i < 0)
            return -1;
        const struct kv_node *n = &kv->nodes[i];
        if (n->page >= 0 || n->disk != 0 || n->store)
            node_set_host(kv, i, -1);
        else
            tree_remove(kv, i);
    }
    return page_alloc(&kv->host_pages);
}

int32_t host_state_get(struct kv *kv)
{
    while (kv->host_states.n_free == 0) {
        int32_t i = kv_heap_min(&kv->snap_host_heap);
        if (i < 0)
            return -1;
        const struct kv_snap *s = &kv->snaps[i];
        if (s->dev >= 0 || s->disk != 0 || s->store)
            snap_set_host(kv, i, -1);
        else
            snap_drop(kv, i);
    }
    return page_alloc(&kv->host_states);
}

/* ---- copies --------------------------------------------------------------------------------------------------------- */

void page_copy_host(struct kv *kv, struct arle_stream *st, int32_t page, int32_t slot, bool up)
{
    char *at = host_page_ptr(kv, slot);
    for (uint32_t g = 0; g < kv->n_groups; g++) {
        if (!group_is_paged(&kv->group[g]))
            continue;
        void *dev = page_ptr(kv, g, page);
        kv->mem->copy(kv->dev, st, up ? dev : (void *)at, up ? (void *)at : dev, kv->group[g].page_bytes,
                      up ? ARLE_COPY_H2D : ARLE_COPY_D2H);
        at += kv->group[g].page_bytes;
    }
}

static void state_copy_host(struct kv *kv, int32_t record, int32_t slot, bool up)
{
    char *rec = kv->snap_base + (size_t)record * kv->state_total, *at = host_state_ptr(kv, slot);
    kv->mem->copy(kv->dev, kv->copy, up ? rec : at, up ? at : rec, kv->state_total, up ? ARLE_COPY_H2D : ARLE_COPY_D2H);
}

static struct kv_move *move_new(struct kv *kv, bool up)
{
    for (int i = 0; i < N_MOVES; i++)
        if (kv->move[i].n == 0) {
            kv->move[i].up = up;
            kv->move[i].bytes = 0;
            kv->move[i].start_us = clock_mono_us();
            /* Everything enqueued so far may read or write the memory that is about to be copied. */
            kv->mem->event_record(kv->dev, kv->behind, kv->compute);
            kv->mem->stream_wait(kv->dev, kv->copy, kv->behind);
            return &kv->move[i];
        }
    return NULL;
}

static void move_add(struct kv *kv, struct kv_move *m, int32_t node, int32_t snap, int32_t dev, int32_t host)
{
    m->item[m->n].node = node;
    m->item[m->n].snap = snap;
    m->item[m->n].dev = dev;
    m->item[m->n].host = host;
    if (node >= 0) {
        m->item[m->n].fill = kv->nodes[node].fill;
        kv->nodes[node].busy++;
        kv->nodes[node].rising = m->up;
        tree_use(kv, node);
        page_copy_host(kv, kv->copy, dev, host, m->up);
        m->bytes += kv->page_total;
    } else {
        kv->snaps[snap].busy++;
        kv->snaps[snap].users++;
        snap_update(kv, snap);
        tree_use(kv, kv->snaps[snap].node);
        state_copy_host(kv, dev, host, m->up);
        m->bytes += kv->state_total;
    }
    m->n++;
    kv->in_flight++;
}

static void node_moved(struct kv *kv, bool up, int32_t node, int32_t dev, int32_t host, uint32_t fill)
{
    struct kv_node *n = &kv->nodes[node];
    n->busy--;
    if (up)
        n->rising = 0;
    if (up && n->page < 0 && n->fill == fill) {
        tree_set_page(kv, node, dev);
        if (n->origin == TIER_DEVICE)
            n->origin = TIER_HOST;
    } else if (up) {
        page_unref(&kv->pages, dev);
    } else if (n->host < 0 && n->fill == fill) {
        node_set_host(kv, node, host);
    } else {
        page_unref(&kv->host_pages, host);      /* it grew meanwhile, or another copy was first */
    }
    tree_unuse(kv, node);
}

static void snap_moved(struct kv *kv, bool up, int32_t snap, int32_t dev, int32_t host)
{
    struct kv_snap *s = &kv->snaps[snap];
    s->busy--;
    s->users--;
    if (up && s->dev < 0)
        snap_set_record(kv, snap, dev);
    else if (up)
        page_unref(&kv->snap_pool, dev);
    else if (s->host < 0)
        s->host = host;
    else
        page_unref(&kv->host_states, host);
    snap_update(kv, snap);
    tree_unuse(kv, s->node);
}

void move_measured(struct kv *kv, enum kv_tier tier, uint64_t bytes, int64_t us)
{
    double now = (double)bytes * 1e6 / (double)(us > 0 ? us : 1);
    kv->tier_bytes_s[tier] = kv->tier_bytes_s[tier] * 0.8 + now * 0.2;
}

static void move_done(struct kv *kv, struct kv_move *m)
{
    for (uint32_t i = 0; i < m->n; i++) {
        if (m->item[i].node >= 0)
            node_moved(kv, m->up, m->item[i].node, m->item[i].dev, m->item[i].host, m->item[i].fill);
        else
            snap_moved(kv, m->up, m->item[i].snap, m->item[i].dev, m->item[i].host);
    }
    if (m->up)
        kv->st.promoted_bytes[TIER_HOST] += m->bytes;
    else
        kv->st.demoted_bytes[TIER_HOST] += m->bytes;
    if (m->up)
        move_measured(kv, TIER_HOST, m->bytes, clock_mono_us() - m->start_us);
    kv->in_flight -= m->n;
    m->n = 0;
}

/* ---- down ----------------------------------------------------------------------------------------------------------- */

/* Whether the host's least copy costs nothing. Pinned ones stay where there is a host tier; the staging area only passes things on. */
static bool spare_copy(const struct kv *kv, bool lower, uint32_t pinned)
{
    return lower && (pinned == 0 || kv->cfg.host_bytes == 0);
}

/*
 * Pages go down while the host has places that are free or hold what is on disk too, and otherwise until half of the device
 * could be free at once. What is least worth goes first in both directions, so that the clean half is the one that is evicted.
 * Pinned pages are not evicted for anyone but a running sequence: they count for neither half, and go down last.
 */
static bool pages_should_go(const struct kv *kv)
{
    int32_t least = kv_heap_min(&kv->host_heap);
    bool free_place = kv->host_pages.n_free > 0
                      || (least >= 0 && spare_copy(kv, kv->nodes[least].disk || kv->nodes[least].store, kv->nodes[least].pinned));
    uint32_t dirty = kv->down_heap.n - kv->down_heap.n_late;
    uint64_t clean = kv->pages.n_free + kv->idle_pages - kv->idle_pinned - dirty;
    return kv->down_heap.n > 0 && (free_place || (dirty > 0 && clean < (kv->pages.n - kv->idle_pinned) / 2));
}

static bool states_should_go(const struct kv *kv)
{
    int32_t least = kv_heap_min(&kv->snap_host_heap);
    bool free_place = kv->host_states.n_free > 0
                      || (least >= 0 && spare_copy(kv, kv->snaps[least].disk || kv->snaps[least].store, kv->snaps[least].pinned));
    uint32_t dirty = kv->snap_down_heap.n - kv->snap_down_heap.n_late;
    uint32_t clean = kv->snap_pool.n_free + kv->snap_heap.n - kv->snap_heap.n_late - dirty;
    /* A tail can go no further than the host: it would keep places from those that are on their way to a slower tier. */
    int32_t next = kv_heap_min(&kv->snap_down_heap);
    bool tail = kv->slow != NULL && next >= 0 && kv->snaps[next].pos % 64 != 0;
    return next >= 0 && ((free_place && !tail) || (dirty > 0 && clean < (kv->snap_pool.n - kv->snap_heap.n_late) / 2));
}

void move_down(struct kv *kv)
{
    if (kv->copy == NULL)
        return;
    bool pages = pages_should_go(kv), states = states_should_go(kv);
    /* What is being copied cannot be evicted: never more than an eighth of the pool at once. */
    if ((!pages && !states) || kv->in_flight > kv->pages.n / 8 + 1)
        return;
    struct kv_move *m = move_new(kv, false);
    if (m == NULL)
        return;
    while (m->n < 2 && states_should_go(kv)) {
        int32_t host = host_state_get(kv), snap = host >= 0 ? kv_heap_min(&kv->snap_down_heap) : -1;
        if (snap < 0) {
            if (host >= 0)
                page_unref(&kv->host_states, host);
            break;
        }
        move_add(kv, m, -1, snap, kv->snaps[snap].dev, host);
    }
    while (pages && m->n < MOVE_ITEMS && kv->down_heap.n > 0) {
        int32_t host = host_page_get(kv), node = host >= 0 ? kv_heap_min(&kv->down_heap) : -1;
        if (node < 0) {
            if (host >= 0)
                page_unref(&kv->host_pages, host);
            break;
        }
        move_add(kv, m, node, -1, kv->nodes[node].page, host);
    }
    if (m->n > 0)
        kv->mem->event_record(kv->dev, m->ev, kv->copy);
}

/* ---- up ------------------------------------------------------------------------------------------------------------- */

static bool all_here(const struct kv *kv, int32_t node, int32_t snap)
{
    for (int32_t i = node; i >= 0 && kv->nodes[i].fill > 0; i = kv->nodes[i].parent)
        if (kv->nodes[i].page < 0)
            return false;
    return snap < 0 || kv->snaps[snap].dev >= 0;
}

bool move_here(const struct kv *kv, const struct kv_match *m)
{
    return all_here(kv, m->node, m->snap);
}

bool move_pending(const struct kv *kv, const struct kv_match *m)
{
    for (int i = 0; i < N_PROMOS && kv->n_promos > 0; i++)
        if (kv->promo[i].node == m->node && kv->promo[i].snap == m->snap)
            return true;
    return false;
}

bool move_worth(const struct kv *kv, const struct kv_match *m, uint32_t tokens)
{
    double fetch_s = 50e-6, rate = kv->prefill_tokens_s > 0 ? kv->prefill_tokens_s : 1000;
    if (tokens < MIN_FETCH_TOKENS)
        return false;
    for (int32_t i = m->node; i >= 0 && kv->nodes[i].fill > 0; i = kv->nodes[i].parent) {
        const struct kv_node *n = &kv->nodes[i];
        if (n->page < 0)
            fetch_s += (double)kv->page_total / kv->tier_bytes_s[n->host >= 0 ? TIER_HOST : n->disk != 0 ? TIER_DISK : TIER_STORE];
    }
    if (m->snap >= 0 && kv->snaps[m->snap].dev < 0) {
        const struct kv_snap *s = &kv->snaps[m->snap];
        fetch_s += (double)kv->state_total / kv->tier_bytes_s[s->host >= 0 ? TIER_HOST : s->disk != 0 ? TIER_DISK : TIER_STORE];
    }
    return fetch_s < tokens / rate;
}

uint32_t move_path(struct kv *kv, int32_t node)
{
    uint32_t n = kv->nodes[node].start / kv->pt + 1;
    KV_CHECK(n <= kv->max_pages);
    for (uint32_t i = n; i > 0; i--, node = kv->nodes[node].parent)
        kv->path[i - 1] = node;
    return n;
}

/* One more copy up, in the open batch or a new one. -EAGAIN: all batches are under way; -ENOSPC: no room on the device. */
static int raise_one(struct kv *kv, struct kv_move **m, int32_t node, int32_t snap)
{
    if (*m == NULL && (*m = move_new(kv, true)) == NULL)
        return -EAGAIN;
    int32_t dev = node < 0 ? snap_record_get(kv) : tree_make_room(kv, 1, false) ? page_alloc(&kv->pages) : -1;
    if (dev < 0)
        return -ENOSPC;
    move_add(kv, *m, node, snap, dev, node >= 0 ? kv->nodes[node].host : kv->snaps[snap].host);
    if ((*m)->n == MOVE_ITEMS) {
        kv->mem->event_record(kv->dev, (*m)->ev, kv->copy);
        *m = NULL;
    }
    return 0;
}

/*
 * Starts the copies up of what is on the host, ancestors first and without gaps, so that the device always holds whole beginnings.
 * False when the device has no room.
 */
static bool start_up(struct kv *kv, const struct kv_promo *p)
{
    struct kv_move *m = NULL;
    uint32_t n = move_path(kv, p->node);
    int r = 0;
    for (uint32_t i = 0; i < n && r == 0; i++) {
        const struct kv_node *node = &kv->nodes[kv->path[i]];
        if (node->page >= 0 || node->rising)
            continue;
        if (node->host < 0)
            break;
        r = raise_one(kv, &m, kv->path[i], -1);
    }
    if (p->snap >= 0 && r == 0) {
        const struct kv_snap *s = &kv->snaps[p->snap];
        if (s->dev < 0 && s->busy == 0 && s->host >= 0)
            r = raise_one(kv, &m, -1, p->snap);
    }
    if (m != NULL && m->n > 0)
        kv->mem->event_record(kv->dev, m->ev, kv->copy);
    return r != -ENOSPC;
}

static void promo_end(struct kv *kv, struct kv_promo *p)
{
    tree_unuse(kv, p->node);
    if (p->snap >= 0) {
        kv->snaps[p->snap].users--;
        snap_update(kv, p->snap);
    }
    p->node = -1;
    kv->n_promos--;
}

/* The page nearest the root on the path that no tier has any more, -1 when all is well. */
static int32_t path_lost(const struct kv *kv, int32_t node)
{
    int32_t lost = -1;
    for (int32_t i = node; kv->nodes[i].fill > 0; i = kv->nodes[i].parent)
        if (kv->nodes[i].page < 0 && !node_elsewhere(&kv->nodes[i]) && kv->nodes[i].busy == 0)
            lost = i;
    return lost;
}

/* Ends a promotion whose data a tier has lost, and forgets what can never be used again. */
static bool promo_lost(struct kv *kv, struct kv_promo *p)
{
    int32_t lost = path_lost(kv, p->node), snap = p->snap;
    bool state = snap >= 0 && kv->snaps[snap].dev < 0 && !snap_elsewhere(&kv->snaps[snap]) && kv->snaps[snap].busy == 0;
    if (lost < 0 && !state)
        return false;
    promo_end(kv, p);
    if (state && kv->snaps[snap].users == 0)
        snap_drop(kv, snap);
    if (lost >= 0 && kv->nodes[lost].users == 0)
        tree_remove(kv, lost);
    return true;
}

void move_end_promos(struct kv *kv)
{
    for (int i = 0; i < N_PROMOS; i++)
        if (kv->promo[i].node >= 0)
            promo_end(kv, &kv->promo[i]);
}

bool move_end_ready(struct kv *kv, int32_t node)
{
    struct kv_promo *oldest = NULL;
    for (int i = 0; i < N_PROMOS && kv->n_promos > 0; i++) {
        struct kv_promo *p = &kv->promo[i];
        if (p->node >= 0 && p->node != node && p->ready && (oldest == NULL || p->since_us < oldest->since_us))
            oldest = p;
    }
    if (oldest != NULL)
        promo_end(kv, oldest);
    return oldest != NULL;
}

/* Returns 1 when it has just become ready, or ended: the prompt can be opened now with what there is. */
static int promo_advance(struct kv *kv, struct kv_promo *p)
{
    if (!p->ready) {
        if (promo_lost(kv, p))
            return 1;
        if (kv->slow != NULL && !slow_read(kv, p->node, p->snap)) {
            promo_end(kv, p);
            return 1;
        }
        /* Waiting for room while holding half of a prefix could block others that do the same: give up instead. */
        if (!start_up(kv, p)) {
            promo_end(kv, p);
            return 1;
        }
        if (all_here(kv, p->node, p->snap)) {
            p->ready = true;
            p->since_us = clock_mono_us();
            return 1;
        }
    }
    if (clock_mono_us() - p->since_us > PROMO_KEEP_US)
        promo_end(kv, p);
    return 0;
}

void moves_finish(struct kv *kv)
{
    for (int i = 0; i < N_MOVES; i++)
        if (kv->move[i].n > 0 && kv->mem->event_query(kv->dev, kv->move[i].ev) != 0)
            move_done(kv, &kv->move[i]);        /* a dead device counts as done: nobody will read what it holds */
}

int move_fetch(struct kv *kv, const struct kv_match *m)
{
    struct kv_promo *p = NULL;
    for (int i = 0; i < N_PROMOS; i++)
        if (kv->promo[i].node == m->node && kv->promo[i].snap == m->snap)
            p = &kv->promo[i];
    if (p == NULL) {
        if (kv->n_promos == N_PROMOS)
            move_end_ready(kv, -1);
        for (int i = 0; i < N_PROMOS && p == NULL; i++)
            if (kv->promo[i].node < 0)
                p = &kv->promo[i];
        if (p == NULL)
            return -EAGAIN;
        *p = (struct kv_promo){ .node = m->node, .snap = m->snap, .since_us = clock_mono_us() };
        kv->n_promos++;
        tree_use(kv, p->node);
        if (p->snap >= 0) {
            kv->snaps[p->snap].users++;
            snap_update(kv, p->snap);
        }
        promo_advance(kv, p);
        moves_finish(kv);       /* where copies are immediate, this is all it takes */
        if (p->node >= 0)
            promo_advance(kv, p);
    }
    return p->node < 0 ? -EAGAIN : p->ready ? 0 : -EINPROGRESS;
}

void move_fetched(struct kv *kv, int32_t node)
{
    for (int i = 0; i < N_PROMOS && kv->n_promos > 0; i++)
        if (kv->promo[i].node >= 0 && kv->promo[i].node == node && kv->promo[i].ready)
            promo_end(kv, &kv->promo[i]);
}

/* Host slots of sequences whose copies have passed. */
static void seqs_finish(struct kv *kv)
{
    for (struct kv_seq *s = kv->seqs; s != NULL && kv->n_moving > 0; s = s->next)
        if (s->moving && kv->mem->event_query(kv->dev, s->ev) != 0)
            seq_moved(s);
    for (struct kv_seq **at = &kv->zombies; *at != NULL && kv->n_moving > 0;) {
        struct kv_seq *s = *at;
        if (kv->mem->event_query(kv->dev, s->ev) == 0) {
            at = &s->next;
            continue;
        }
        *at = s->next;
        seq_moved(s);
        s->next = kv->spare;
        kv->spare = s;
    }
}

int move_poll(struct kv *kv)
{
    int ready = 0;
    if (kv->copy == NULL)
        return 0;
    moves_finish(kv);
    if (kv->slow != NULL)
        ready += slow_poll(kv);
    if (kv->n_moving > 0)
        seqs_finish(kv);
    for (int i = 0; i < N_PROMOS && kv->n_promos > 0; i++)
        if (kv->promo[i].node >= 0)
            ready += promo_advance(kv, &kv->promo[i]);
    return ready;
}

bool move_idle(const struct kv *kv)
{
    for (int i = 0; i < N_PROMOS; i++)
        if (kv->promo[i].node >= 0 && !kv->promo[i].ready)
            return false;
    bool more = kv->copy != NULL
                && ((kv->host_pages.n_free > 0 && pages_should_go(kv)) || (kv->host_states.n_free > 0 && states_should_go(kv)));
    return !more && kv->in_flight == 0 && kv->n_moving == 0 && (kv->slow == NULL || slow_idle(kv));
}
