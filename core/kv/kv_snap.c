/*
 * State snapshots: copies of a sequence's state records at an exact position, hung on the tree.
 *
 * Worth of a snapshot (GreedyDual-Size): the worth of the last one evicted plus the tokens that would have to be recomputed
 * without it, more for each time it was used. All records have the same bytes, so bytes x cost orders like cost.
 */
#include "kv/kv_int.h"

#define QUOTA_SAMPLE 32u        /* records of a tenant that are compared */

void snap_copy(struct kv *kv, struct arle_stream *st, int32_t record, int32_t slot, bool restore)
{
    char *rec = kv->snap_base + (size_t)record * kv->state_total;
    for (uint32_t g = 0; g < kv->n_groups; g++) {
        if (group_is_paged(&kv->group[g]))
            continue;
        void *live = record_ptr(kv, g, slot);
        kv->mem->copy(kv->dev, st, restore ? live : rec, restore ? rec : live, kv->group[g].record_bytes, ARLE_COPY_D2D);
        rec += kv->group[g].record_bytes;
    }
}

void snap_update(struct kv *kv, int32_t i)
{
    struct kv_snap *s = &kv->snaps[i];
    if (s->node >= 0 && s->dev >= 0 && s->users == 0)
        kv_heap_put(&kv->snap_heap, i, s->prio + (s->pinned > 0 ? KV_LATE : 0));
    else
        kv_heap_remove(&kv->snap_heap, i);
    move_update_snap(kv, i);
}

static void snap_touch(struct kv *kv, int32_t i)
{
    struct kv_snap *s = &kv->snaps[i];
    s->prio = kv->snap_age + (double)s->cost * (1 + (s->hits < 7 ? s->hits : 7));
    snap_update(kv, i);
}

static uint64_t snap_hash(const struct kv *kv, const struct kv_snap *s)
{
    const struct kv_node *n = &kv->nodes[s->node];
    return ~tree_path_hash(kv->nodes[n->parent].hash, node_toks(kv, s->node), s->pos - n->start);
}

static int32_t snap_tenant(const struct kv *kv, const struct kv_snap *s)
{
    return kv->roots[kv->nodes[s->node].root].tenant;
}

static void record_release(struct kv *kv, struct kv_snap *s)
{
    if (s->dev < 0)
        return;
    page_unref(&kv->snap_pool, s->dev);
    s->dev = -1;
    kv->tenants[snap_tenant(kv, s)].dev_snaps--;
}

void snap_set_record(struct kv *kv, int32_t i, int32_t record)
{
    KV_CHECK(kv->snaps[i].dev < 0);
    kv->snaps[i].dev = record;
    kv->tenants[snap_tenant(kv, &kv->snaps[i])].dev_snaps++;
}

void snap_drop(struct kv *kv, int32_t i)
{
    struct kv_snap *s = &kv->snaps[i];
    struct kv_node *n = &kv->nodes[s->node];
    KV_CHECK(s->users == 0);
    if (s->pinned > 0)
        pin_snap_lost(kv, i);
    uint64_t hash = snap_hash(kv, s);
    kv->ghosts[hash % KV_GHOSTS] = hash;
    int32_t *at = &n->snaps, node = s->node;
    while (*at != i)
        at = &kv->snaps[*at].next;
    *at = s->next;
    record_release(kv, s);
    move_forget_snap(kv, i);
    s->node = -1;
    snap_update(kv, i);
    s->next = kv->snap_free;
    kv->snap_free = i;
    kv->st.snapshots--;
    if (n->parent >= 0)
        tree_update(kv, node);
}

/* Takes a record off the device; its snapshot lives on if a lower tier has it. */
static void evict(struct kv *kv, int32_t i)
{
    kv->st.snapshots_evicted++;
    if (snap_elsewhere(&kv->snaps[i])) {
        record_release(kv, &kv->snaps[i]);
        snap_update(kv, i);
    } else {
        snap_drop(kv, i);
    }
}

/* The least worth record goes. Only new entries and promotions ask for records, and neither is worth a pinned one. */
static bool evict_one(struct kv *kv)
{
    int32_t i = kv_heap_min(&kv->snap_heap);
    if (i < 0 || kv->snaps[i].pinned > 0)
        return false;
    if (kv->snap_heap.key[i] > kv->snap_age)
        kv->snap_age = kv->snap_heap.key[i];
    evict(kv, i);
    return true;
}

/*
 * Before a tenant's new record: one that has its share gives one of its own. Which is the least worth is told from a sample, so
 * that a step does not look at all there are.
 */
static void enforce_quota(struct kv *kv, int32_t tenant)
{
    uint32_t limit = (uint32_t)((uint64_t)kv->snap_pool.n * kv->cfg.tenant_quota_pct / 100);
    int32_t least = -1;
    if (kv->cfg.tenant_quota_pct >= 100 || kv->tenants[tenant].dev_snaps < (limit > 0 ? limit : 1))
        return;
    for (uint32_t seen = 0, own = 0; seen < kv->snaps_used && own < QUOTA_SAMPLE; seen++) {
        kv->quota_clock = (kv->quota_clock + 1) % kv->snaps_used;
        int32_t i = (int32_t)kv->quota_clock;
        const struct kv_snap *s = &kv->snaps[i];
        if (s->node < 0 || s->dev < 0 || s->users > 0 || s->pinned > 0 || snap_tenant(kv, s) != tenant)
            continue;
        if (least < 0 || s->prio < kv->snaps[least].prio)
            least = i;
        own++;
    }
    if (least >= 0)
        evict(kv, least);
}

int32_t snap_record_get(struct kv *kv)
{
    while (kv->snap_pool.n_free == 0)
        if (!evict_one(kv))
            return -1;
    return page_alloc(&kv->snap_pool);
}

/* One that has to make place for a new one: first one that only slow tiers have, else the least on the device. -1: none. */
static int32_t snap_victim(struct kv *kv)
{
    for (uint32_t i = 0; i < kv->n_snaps && i < 4096; i++) {
        kv->snap_clock = (kv->snap_clock + 1) % kv->n_snaps;
        const struct kv_snap *s = &kv->snaps[kv->snap_clock];
        if (s->node >= 0 && s->dev < 0 && s->host < 0 && s->users == 0 && s->pinned == 0)
            return (int32_t)kv->snap_clock;
    }
    int32_t i = kv_heap_min(&kv->snap_heap);
    return i >= 0 && kv->snaps[i].pinned == 0 ? i : -1;
}

int32_t snap_new(struct kv *kv, int32_t node, uint32_t pos, uint32_t cost)
{
    int32_t i = kv->snap_free;
    if (i >= 0)
        kv->snap_free = kv->snaps[i].next;
    else if (kv->snaps_used < kv->n_snaps)
        i = (int32_t)kv->snaps_used++;
    else if ((i = snap_victim(kv)) >= 0) {
        snap_drop(kv, i);
        kv->snap_free = kv->snaps[i].next;
    }
    if (i < 0)
        return -1;
    kv->snaps[i] = (struct kv_snap){ .node = node, .next = kv->nodes[node].snaps, .pos = pos, .cost = cost > 0 ? cost : 1,
                                     .dev = -1, .host = -1 };
    kv->nodes[node].snaps = i;
    kv->st.snapshots++;
    return i;
}

int32_t snap_find(const struct kv *kv, int32_t node, uint32_t pos)
{
    for (int32_t i = kv->nodes[node].snaps; i >= 0; i = kv->snaps[i].next)
        if (kv->snaps[i].pos == pos)
            return i;
    return -1;
}

void snap_used(struct kv *kv, int32_t i)
{
    kv->snaps[i].hits++;
    kv->snaps[i].no_disk = kv->snaps[i].no_store = 0;
    snap_touch(kv, i);
}

bool tree_snapshot(struct kv_seq *s, uint32_t pos, int32_t slot)
{
    struct kv *kv = s->kv;
    if (kv->snap_pool.n == 0)
        return false;
    int32_t node = tree_node_at(s, pos);
    if (node < 0)
        return false;
    int32_t i = snap_find(kv, node, pos);
    if (i >= 0 && (kv->snaps[i].dev >= 0 || kv->snaps[i].busy > 0)) {
        s->last_snap = pos;
        snap_touch(kv, i);
        return true;
    }
    tree_use(kv, node);                 /* making room must not take the ground from under it */
    enforce_quota(kv, kv->roots[s->root].tenant);
    int32_t rec = snap_record_get(kv);
    if (rec >= 0 && (i = snap_find(kv, node, pos)) < 0 && (i = snap_new(kv, node, pos, pos - s->last_snap)) < 0)
        page_unref(&kv->snap_pool, rec);
    if (rec >= 0 && i >= 0) {
        snap_set_record(kv, i, rec);
        snap_copy(kv, kv->compute, rec, slot, false);
        s->last_snap = pos;
        kv->st.snapshots_taken++;
        snap_touch(kv, i);
    }
    tree_unuse(kv, node);
    return rec >= 0 && i >= 0;
}
