/*
 * The prefix tree: which token paths are remembered, where a prompt leaves them, and which device page goes next.
 * Snapshots hang on its nodes (kv_snap.c); where the bytes are below the device is the business of kv_move.c.
 *
 * Worth of a page (GreedyDual-Size): the worth of the last page evicted plus its cost to recompute per byte. All pages have the
 * same bytes, and recomputing one costs a little more the deeper it lies, so that this is recency with an edge for depth. Pages
 * leave from the leaves up: a page without its ancestors is of no use.
 */
#include "kv/kv_int.h"

#include <stdlib.h>

#define SCAN_KIDS 512           /* children looked at for a match inside a page; hot ones stand in front */
#define SCAN_SIBLINGS 64

uint64_t tree_path_hash(uint64_t parent, const int32_t *tokens, uint32_t n)
{
    return kv_hash64(parent, tokens, n * sizeof *tokens);
}

int tree_init(struct kv *kv, uint32_t n_nodes, uint32_t n_snaps, uint32_t n_dev_snaps, struct arle_err *err)
{
    uint32_t buckets = 64;
    while (buckets < n_nodes)
        buckets *= 2;
    kv->n_nodes = n_nodes;
    kv->n_snaps = n_snaps;
    kv->node_free = kv->snap_free = -1;
    kv->nodes = calloc(n_nodes, sizeof *kv->nodes);
    kv->node_tokens = calloc((size_t)n_nodes * kv->pt, sizeof *kv->node_tokens);
    kv->snaps = calloc((size_t)n_snaps + 1, sizeof *kv->snaps);
    kv->table = malloc(buckets * sizeof *kv->table);
    kv->table_mask = buckets - 1;
    kv->page_node = malloc(((size_t)kv->cfg.n_pages + 1) * sizeof *kv->page_node);
    kv->ghosts = calloc(KV_GHOSTS, sizeof *kv->ghosts);
    if (kv->nodes == NULL || kv->node_tokens == NULL || kv->snaps == NULL || kv->table == NULL || kv->page_node == NULL
        || kv->ghosts == NULL || kv_heap_init(&kv->dev_heap, n_nodes) < 0 || kv_heap_init(&kv->snap_heap, n_snaps) < 0
        || page_pool_init(&kv->snap_pool, 0, n_dev_snaps) < 0)
        return arle_err_set(err, -ENOMEM, "no memory for a prefix tree of %u nodes", n_nodes);
    memset(kv->table, 0xFF, buckets * sizeof *kv->table);
    memset(kv->page_node, 0xFF, ((size_t)kv->cfg.n_pages + 1) * sizeof *kv->page_node);
    return 0;
}

void tree_fini(struct kv *kv)
{
    free(kv->nodes);
    free(kv->node_tokens);
    free(kv->snaps);
    free(kv->table);
    free(kv->page_node);
    free(kv->ghosts);
    free(kv->roots);
    free(kv->tenants);
    kv_heap_fini(&kv->dev_heap);
    kv_heap_fini(&kv->snap_heap);
    page_pool_fini(&kv->snap_pool);
}

/* ---- nodes ---------------------------------------------------------------------------------------------------------- */

static struct kv_tenant *tenant_of(const struct kv *kv, const struct kv_node *n)
{
    return &kv->tenants[kv->roots[n->root].tenant];
}

/* Nobody uses it, and so nothing below it either. */
static bool node_idle(const struct kv_node *n)
{
    return n->parent >= 0 && n->users == 0 && n->pinned == 0;
}

/*
 * A leaf nobody uses, looked for from where the last search ended: those that hold no device page first, then others, and where
 * many pages of one long path lie side by side, the end of that path.
 */
static int32_t node_victim(struct kv *kv)
{
    for (int pass = 0; pass < 3; pass++)
        for (uint32_t i = 0; i < kv->nodes_used && i < 4096; i++) {
            kv->clock = (kv->clock + 1) % kv->nodes_used;
            int32_t at = (int32_t)kv->clock;
            if (!node_idle(&kv->nodes[at]) || (pass < 2 && kv->nodes[at].kids > 0))
                continue;
            while (kv->nodes[at].child >= 0)
                at = kv->nodes[at].child;
            if (kv->nodes[at].page < 0 || (pass > 0 && kv->pages.refs[kv->nodes[at].page] == 1))
                return at;
            i += pass < 2 ? 0 : 511;        /* paths are long: a few are enough */
        }
    return -1;
}

static int32_t node_alloc(struct kv *kv)
{
    int32_t i = kv->node_free;
    if (i < 0 && kv->nodes_used < kv->n_nodes) {
        i = (int32_t)kv->nodes_used++;
    } else {
        if (i < 0) {
            int32_t victim = node_victim(kv);
            if (victim < 0)
                return -1;
            tree_remove(kv, victim);
            i = kv->node_free;
        }
        kv->node_free = kv->nodes[i].next;
    }
    kv->nodes[i] = (struct kv_node){ .parent = -1, .child = -1, .next = -1, .prev = -1, .hnext = -1, .page = -1, .host = -1,
                                     .snaps = -1, .tprev = -1, .tnext = -1, .root = -1 };
    return i;
}

static void node_free(struct kv *kv, int32_t i)
{
    kv->nodes[i].parent = -2;
    kv->nodes[i].next = kv->node_free;
    kv->node_free = i;
}

static void kid_link(struct kv *kv, int32_t parent, int32_t kid)
{
    struct kv_node *p = &kv->nodes[parent], *k = &kv->nodes[kid];
    k->parent = parent;
    k->prev = -1;
    k->next = p->child;
    if (p->child >= 0)
        kv->nodes[p->child].prev = kid;
    p->child = kid;
    p->kids++;
}

static void kid_unlink(struct kv *kv, int32_t kid)
{
    struct kv_node *k = &kv->nodes[kid], *p = &kv->nodes[k->parent];
    if (k->prev >= 0)
        kv->nodes[k->prev].next = k->next;
    else
        p->child = k->next;
    if (k->next >= 0)
        kv->nodes[k->next].prev = k->prev;
    p->kids--;
}

static void kid_to_front(struct kv *kv, int32_t kid)
{
    int32_t parent = kv->nodes[kid].parent;
    if (parent < 0 || kv->nodes[parent].child == kid)
        return;
    kid_unlink(kv, kid);
    kid_link(kv, parent, kid);
}

static void table_add(struct kv *kv, int32_t i)
{
    int32_t *bucket = &kv->table[kv->nodes[i].hash & kv->table_mask];
    kv->nodes[i].hnext = *bucket;
    *bucket = i;
}

static void table_remove(struct kv *kv, int32_t i)
{
    int32_t *at = &kv->table[kv->nodes[i].hash & kv->table_mask];
    while (*at != i)
        at = &kv->nodes[*at].hnext;
    *at = kv->nodes[i].hnext;
}

/* The full child of parent with these tokens: found by hash, believed by comparison. */
static int32_t full_child(const struct kv *kv, int32_t parent, uint64_t hash, const int32_t *tokens)
{
    if (kv->nodes[parent].child < 0)        /* most answers walk where nobody was; the table would be a cache miss for nothing */
        return -1;
    for (int32_t i = kv->table[hash & kv->table_mask]; i >= 0; i = kv->nodes[i].hnext)
        if (kv->nodes[i].hash == hash && kv->nodes[i].parent == parent
            && memcmp(node_toks(kv, i), tokens, kv->pt * sizeof *tokens) == 0)
            return i;
    return -1;
}

static uint32_t common(const int32_t *a, const int32_t *b, uint32_t n)
{
    uint32_t i = 0;
    while (i < n && a[i] == b[i])
        i++;
    return i;
}

static void tenant_list_remove(struct kv *kv, int32_t i)
{
    struct kv_node *n = &kv->nodes[i];
    struct kv_tenant *t = tenant_of(kv, n);
    if (n->tprev >= 0)
        kv->nodes[n->tprev].tnext = n->tnext;
    else
        t->head = n->tnext;
    if (n->tnext >= 0)
        kv->nodes[n->tnext].tprev = n->tprev;
    else
        t->tail = n->tprev;
    n->tprev = n->tnext = -1;
}

static void tenant_list_add(struct kv *kv, int32_t i)
{
    struct kv_node *n = &kv->nodes[i];
    struct kv_tenant *t = tenant_of(kv, n);
    n->tprev = t->tail;
    n->tnext = -1;
    if (t->tail >= 0)
        kv->nodes[t->tail].tnext = i;
    else
        t->head = i;
    t->tail = i;
}

void tree_update(struct kv *kv, int32_t i)
{
    struct kv_node *n = &kv->nodes[i];
    bool unused = n->users == 0 || (n->users == n->held && node_elsewhere(n));
    uint8_t idle = n->parent >= 0 && n->page >= 0 && unused && kv->pages.refs[n->page] == 1;
    bool can = idle && n->dev_kids == 0, list = can && n->pinned == 0;
    uint8_t idle_pinned = idle && n->pinned > 0;
    kv->idle_pages += idle - n->idle;
    kv->idle_pinned += idle_pinned - n->idle_pinned;
    n->idle = idle;
    n->idle_pinned = idle_pinned;
    if (can) {
        /* A tail that no snapshot makes usable is worth nothing more than the place it takes. */
        bool barren = kv->has_state && n->kids == 0 && n->snaps < 0;
        kv_heap_put(&kv->dev_heap, i, (barren && n->prio > kv->dev_age ? kv->dev_age : n->prio) + (n->pinned > 0 ? KV_LATE : 0));
    } else {
        kv_heap_remove(&kv->dev_heap, i);
    }
    if (list && !n->listed)
        tenant_list_add(kv, i);
    else if (!list && n->listed)
        tenant_list_remove(kv, i);
    n->listed = list;
    move_update_node(kv, i);
}

void tree_set_page(struct kv *kv, int32_t i, int32_t page)
{
    struct kv_node *n = &kv->nodes[i];
    KV_CHECK(n->page < 0 && kv->page_node[page] < 0);
    n->page = page;
    kv->page_node[page] = i;
    kv->nodes[n->parent].dev_kids++;
    tenant_of(kv, n)->dev_pages++;
    tree_update(kv, n->parent);
    tree_update(kv, i);
}

/* Lets go of the device page, whatever becomes of the node. */
static void page_release(struct kv *kv, int32_t i)
{
    struct kv_node *n = &kv->nodes[i];
    int32_t page = n->page;
    if (page < 0)
        return;
    n->page = -1;
    kv->page_node[page] = -1;
    tenant_of(kv, n)->dev_pages--;
    tree_update(kv, i);                 /* out of heap and list while the page's count still stands */
    kv->nodes[n->parent].dev_kids--;
    page_unref(&kv->pages, page);
    tree_update(kv, n->parent);
}

bool tree_is_ghost(const struct kv *kv, uint64_t hash)
{
    return hash != 0 && kv->ghosts[hash % KV_GHOSTS] == hash;
}

static void leaf_remove(struct kv *kv, int32_t i)
{
    struct kv_node *n = &kv->nodes[i];
    KV_CHECK(n->users == 0 && n->kids == 0);
    while (n->snaps >= 0)
        snap_drop(kv, n->snaps);
    if (n->pinned > 0)
        pin_node_lost(kv, i);
    page_release(kv, i);
    move_forget_node(kv, i);
    kv->ghosts[n->hash % KV_GHOSTS] = n->hash;
    if (n->fill == kv->pt)
        table_remove(kv, i);
    int32_t parent = n->parent;
    kid_unlink(kv, i);
    n->parent = -1;
    tree_update(kv, i);
    node_free(kv, i);
    tree_update(kv, parent);
}

void tree_remove(struct kv *kv, int32_t top)
{
    for (;;) {
        int32_t i = top;
        while (kv->nodes[i].child >= 0)
            i = kv->nodes[i].child;
        leaf_remove(kv, i);
        if (i == top)
            return;
    }
}

void tree_drop_page(struct kv *kv, int32_t i)
{
    kv->st.pages_evicted++;
    if (node_elsewhere(&kv->nodes[i]))
        page_release(kv, i);
    else
        tree_remove(kv, i);
}

bool tree_make_room(struct kv *kv, uint32_t want, bool pins)
{
    if (kv->pages.n_free + kv->idle_pages - (pins ? 0 : kv->idle_pinned) < want)
        return false;
    while (kv->pages.n_free < want) {
        int32_t i = kv_heap_min(&kv->dev_heap);
        bool pinned = i >= 0 && kv->nodes[i].pinned > 0;
        if (i < 0 || (pinned && !pins))
            return false;
        if (!pinned && kv->dev_heap.key[i] > kv->dev_age)
            kv->dev_age = kv->dev_heap.key[i];
        uint32_t before = kv->pinned_nodes;
        tree_drop_page(kv, i);
        if (pinned)         /* where there is no other copy, the pages before it are of no use any more and not pinned either */
            kv->st.pins_yielded += before > kv->pinned_nodes ? before - kv->pinned_nodes : 1;
    }
    return true;
}

void tree_page_released(struct kv *kv, int32_t page)
{
    if (kv->page_node[page] >= 0)
        tree_update(kv, kv->page_node[page]);
}

void tree_use(struct kv *kv, int32_t i)
{
    for (; i >= 0; i = kv->nodes[i].parent)
        if (kv->nodes[i].users++ == kv->nodes[i].held)
            tree_update(kv, i);
}

void tree_unuse(struct kv *kv, int32_t i)
{
    for (; i >= 0; i = kv->nodes[i].parent) {
        struct kv_node *n = &kv->nodes[i];
        KV_CHECK(n->users > n->held);
        if (--n->users == n->held) {
            n->prio = node_worth_now(kv, n);
            tree_update(kv, i);
        }
    }
}

void tree_hold(struct kv *kv, int32_t i)
{
    for (; i >= 0; i = kv->nodes[i].parent) {
        kv->nodes[i].held++;
        if (kv->nodes[i].users++ == 0)
            tree_update(kv, i);
    }
}

void tree_unhold(struct kv *kv, int32_t i)
{
    for (; i >= 0; i = kv->nodes[i].parent) {
        KV_CHECK(kv->nodes[i].held > 0);
        kv->nodes[i].held--;
        if (--kv->nodes[i].users == 0)
            tree_update(kv, i);
    }
}

/* ---- roots ---------------------------------------------------------------------------------------------------------- */

static int tenant_find(struct kv *kv, const uint8_t tag[16])
{
    int spare = -1;
    for (uint32_t i = 0; i < kv->n_tenants; i++) {
        if (kv->tenants[i].n_roots > 0 && memcmp(kv->tenants[i].tag, tag, 16) == 0)
            return (int)i;
        if (kv->tenants[i].n_roots == 0)
            spare = (int)i;
    }
    if (spare < 0) {
        if (kv->n_tenants == kv->tenants_cap) {
            uint32_t cap = kv->tenants_cap ? kv->tenants_cap * 2 : 16;
            struct kv_tenant *t = realloc(kv->tenants, cap * sizeof *t);
            if (t == NULL)
                return -ENOMEM;
            kv->tenants = t;
            kv->tenants_cap = cap;
        }
        spare = (int)kv->n_tenants++;
    }
    kv->tenants[spare] = (struct kv_tenant){ .head = -1, .tail = -1 };
    memcpy(kv->tenants[spare].tag, tag, 16);
    return spare;
}

/* Gives back roots under which nothing is left. */
static void roots_sweep(struct kv *kv)
{
    for (uint32_t i = 0; i < kv->n_roots; i++) {
        struct kv_root *r = &kv->roots[i];
        if (r->node >= 0 && kv->nodes[r->node].kids == 0 && kv->nodes[r->node].users == 0) {
            node_free(kv, r->node);
            r->node = -1;
            kv->tenants[r->tenant].n_roots--;
        }
    }
}

int tree_root(struct kv *kv, const uint8_t salt[KV_SALT_BYTES])
{
    int spare = -1;
    for (uint32_t i = 0; i < kv->n_roots; i++) {
        if (kv->roots[i].node >= 0 && memcmp(kv->roots[i].salt, salt, KV_SALT_BYTES) == 0)
            return (int)i;
        if (kv->roots[i].node < 0)
            spare = (int)i;
    }
    if (spare < 0 && kv->n_roots == kv->roots_cap) {
        roots_sweep(kv);
        for (uint32_t i = 0; i < kv->n_roots && spare < 0; i++)
            if (kv->roots[i].node < 0)
                spare = (int)i;
    }
    if (spare < 0 && kv->n_roots == kv->roots_cap) {
        uint32_t cap = kv->roots_cap ? kv->roots_cap * 2 : 64;
        struct kv_root *r = realloc(kv->roots, cap * sizeof *r);
        if (r == NULL)
            return -ENOMEM;
        kv->roots = r;
        kv->roots_cap = cap;
    }
    int tenant = tenant_find(kv, salt);
    int32_t node = tenant < 0 ? -1 : node_alloc(kv);
    if (node < 0)
        return -ENOMEM;
    if (spare < 0)
        spare = (int)kv->n_roots++;
    kv->roots[spare] = (struct kv_root){ .node = node, .tenant = tenant };
    memcpy(kv->roots[spare].salt, salt, KV_SALT_BYTES);
    kv->tenants[tenant].n_roots++;
    kv->nodes[node].root = spare;
    kv->nodes[node].hash = kv_hash64(kv_hash64(1, kv->cfg.secret, sizeof kv->cfg.secret), salt, KV_SALT_BYTES);
    return spare;
}

/* ---- matching ------------------------------------------------------------------------------------------------------- */

/* The deepest snapshot of node at most `limit` positions deep, if deeper than out->pos. */
static void best_snap(const struct kv *kv, int32_t node, uint32_t limit, bool dev_only, struct kv_match *out)
{
    if (dev_only && kv->nodes[node].page < 0)
        return;
    for (int32_t s = kv->nodes[node].snaps; s >= 0; s = kv->snaps[s].next)
        if (kv->snaps[s].pos <= limit && kv->snaps[s].pos > out->pos && (!dev_only || kv->snaps[s].dev >= 0)) {
            out->pos = kv->snaps[s].pos;
            out->node = node;
            out->snap = s;
        }
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* Looks at the children of `parent`, whose tokens end at depth, for the longest match inside their page. */
static uint32_t scan_kids(const struct kv *kv, int32_t parent, const int32_t *tokens, uint32_t depth, uint32_t n, uint32_t limit,
                          uint32_t max_kids, bool dev_only, int32_t *out_kid, struct kv_match *out)
{
    uint32_t longest = 0, seen = 0;
    for (int32_t k = kv->nodes[parent].child; k >= 0 && seen < max_kids; k = kv->nodes[k].next, seen++) {
        uint32_t l = common(node_toks(kv, k), tokens + depth, min_u32(kv->nodes[k].fill, n - depth));
        if (l > longest) {
            longest = l;
            *out_kid = k;
        }
        if (l > 0 && kv->has_state)
            best_snap(kv, k, min_u32(depth + l, limit), dev_only, out);
    }
    return longest;
}

void tree_match(const struct kv *kv, int root, const int32_t *tokens, uint32_t n, uint32_t limit, bool dev_only, struct kv_match *out)
{
    *out = (struct kv_match){ .node = -1, .snap = -1 };
    int32_t at = kv->roots[root].node, kid = -1;
    uint32_t depth = 0;
    while (n - depth >= kv->pt) {
        uint64_t hash = tree_path_hash(kv->nodes[at].hash, tokens + depth, kv->pt);
        int32_t next = full_child(kv, at, hash, tokens + depth);
        if (next < 0) {
            out->next_hash = hash;
            break;
        }
        at = next;
        depth += kv->pt;
    }
    out->depth = depth;
    if (depth < n)
        out->depth += scan_kids(kv, at, tokens, depth, n, limit, SCAN_KIDS, dev_only, &kid, out);
    if (!kv->has_state) {
        out->pos = min_u32(out->depth, limit);
        if (kv->cfg.strict)
            out->pos -= out->pos % kv->cfg.snapshot_align;
        int32_t x = kid >= 0 ? kid : at;
        while (kv->nodes[x].fill > 0 && (kv->nodes[x].start >= out->pos || (dev_only && kv->nodes[x].page < 0))) {
            out->pos = min_u32(out->pos, kv->nodes[x].start);
            x = kv->nodes[x].parent;
        }
        out->node = out->pos > 0 ? x : -1;
        return;
    }
    /* A prompt that shares only part of a page with its neighbour may find its snapshot on the neighbour: look there too. */
    for (; out->pos == 0 && kv->nodes[at].fill > 0; at = kv->nodes[at].parent) {
        best_snap(kv, at, limit, dev_only, out);
        if (out->pos == 0)
            scan_kids(kv, kv->nodes[at].parent, tokens, kv->nodes[at].start, n, limit, SCAN_SIBLINGS, dev_only, &kid, out);
    }
}

int32_t tree_walk(const struct kv *kv, int root, const int32_t *tokens, uint32_t n)
{
    int32_t at = kv->roots[root].node;
    for (uint32_t depth = 0; n - depth >= kv->pt; depth += kv->pt) {
        int32_t next = full_child(kv, at, tree_path_hash(kv->nodes[at].hash, tokens + depth, kv->pt), tokens + depth);
        if (next < 0 || kv->nodes[next].page < 0)
            break;
        at = next;
    }
    return at;
}

/* ---- entering ------------------------------------------------------------------------------------------------------- */

/* Moves the snapshots of `from`, whose tokens are a prefix of those of `to`, there, and drops `from`. */
static void merge(struct kv *kv, int32_t from, int32_t to)
{
    slow_orphan_snaps(kv, from);
    while (kv->nodes[from].snaps >= 0) {
        int32_t s = kv->nodes[from].snaps;
        kv->nodes[from].snaps = kv->snaps[s].next;
        kv->snaps[s].node = to;
        kv->snaps[s].next = kv->nodes[to].snaps;
        kv->nodes[to].snaps = s;
    }
    if (kv->nodes[from].pinned > 0)
        pin_node_merged(kv, from, to);
    tree_remove(kv, from);
}

/*
 * The child of s's cursor that holds its tokens [start, start + len): found, grown or made over s's own page.
 * -1: the tree is full.
 */
static int32_t child_for(struct kv_seq *s, uint32_t start, uint32_t len)
{
    struct kv *kv = s->kv;
    const int32_t *tokens = s->tokens + start;
    int32_t page = s->pages[start / kv->pt], mine = -1, next, seen = 0;
    for (int32_t k = kv->nodes[s->cursor].child; k >= 0 && seen < SCAN_KIDS; k = kv->nodes[k].next, seen++) {
        uint32_t l = common(node_toks(kv, k), tokens, min_u32(kv->nodes[k].fill, len));
        if (l == len)
            return k;
        if (l == kv->nodes[k].fill && kv->nodes[k].page == page)
            mine = k;
    }
    uint64_t hash = tree_path_hash(kv->nodes[s->cursor].hash, tokens, len);
    if (mine < 0) {
        /* A page can back one node only; it backs another one when that node was in use while it should have grown. */
        mine = kv->page_node[page] < 0 ? node_alloc(kv) : -1;
        if (mine < 0)
            return -1;
        kv->nodes[mine].root = kv->nodes[s->cursor].root;
        kv->nodes[mine].start = start;
        kv->nodes[mine].prio = kv->dev_age + 1.0;
        kid_link(kv, s->cursor, mine);
        page_ref(&kv->pages, page);
        tree_set_page(kv, mine, page);
    }
    struct kv_node *n = &kv->nodes[mine];
    move_forget_node(kv, mine);         /* copies below hold fewer tokens than the page does now */
    memcpy(node_toks(kv, mine), tokens, len * sizeof *tokens);
    n->fill = len;
    n->hash = hash;
    n->has_key = 0;
    if (len == kv->pt)
        table_add(kv, mine);
    for (int32_t k = kv->nodes[s->cursor].child; k >= 0; k = next) {
        next = kv->nodes[k].next;
        if (k != mine && kv->nodes[k].fill < len && kv->nodes[k].users == 0
            && common(node_toks(kv, k), tokens, kv->nodes[k].fill) == kv->nodes[k].fill)
            merge(kv, k, mine);
        if (--seen < 0)
            break;
    }
    tree_update(kv, mine);
    return mine;
}

int32_t tree_enter(struct kv *kv, int32_t parent, const int32_t *tokens, uint32_t n)
{
    uint64_t hash = tree_path_hash(kv->nodes[parent].hash, tokens, n);
    int32_t i = n == kv->pt ? full_child(kv, parent, hash, tokens) : -1;
    if (i >= 0)
        return i;
    tree_use(kv, parent);
    i = node_alloc(kv);
    tree_unuse(kv, parent);
    if (i < 0)
        return -1;
    struct kv_node *k = &kv->nodes[i];
    k->root = kv->nodes[parent].root;
    k->start = kv->nodes[parent].start + kv->nodes[parent].fill;
    k->fill = n;
    k->hash = hash;
    k->prio = kv->dev_age;
    memcpy(node_toks(kv, i), tokens, n * sizeof *tokens);
    kid_link(kv, parent, i);
    if (n == kv->pt)
        table_add(kv, i);
    return i;
}

static void enforce_quota(struct kv *kv, int root)
{
    struct kv_tenant *t = &kv->tenants[kv->roots[root].tenant];
    int64_t limit = (int64_t)kv->pages.n * kv->cfg.tenant_quota_pct / 100;
    while (t->dev_pages > limit && t->head >= 0)
        tree_drop_page(kv, t->head);
}

/*
 * A sequence that computed again what the tree has on the device (its state was gone) would hold every page twice, and keep the
 * tree's from being evicted by standing on them. The node takes the sequence's page and lets go of its own.
 */
static void share_own(struct kv *kv, int32_t i, int32_t page)
{
    struct kv_node *n = &kv->nodes[i];
    if (n->page < 0 || n->page == page || n->busy > 0 || kv->pages.refs[n->page] > 1 || kv->page_node[page] >= 0)
        return;
    page_release(kv, i);
    page_ref(&kv->pages, page);
    tree_set_page(kv, i, page);
}

void tree_share(struct kv_seq *s)
{
    struct kv *kv = s->kv;
    for (int32_t i = s->cursor; i >= 0 && kv->nodes[i].fill == kv->pt; i = kv->nodes[i].parent) {
        int32_t page = s->pages[kv->nodes[i].start / kv->pt], tail = kv->page_node[page];
        if (tail >= 0 && tail != i && kv->nodes[tail].users == 0 && kv->nodes[tail].kids == 0) {
            kv->st.pins_yielded += kv->nodes[tail].pinned > 0;
            tree_remove(kv, tail);      /* a remembered tail is worth less than a sequence that cannot go on */
        }
        share_own(kv, i, page);
    }
}

void tree_publish(struct kv_seq *s)
{
    struct kv *kv = s->kv;
    uint32_t before = s->published;
    while (s->cursor >= 0 && !s->mute && tree_due(s)) {
        uint32_t start = s->published;
        uint64_t hash = tree_path_hash(kv->nodes[s->cursor].hash, s->tokens + start, kv->pt);
        int32_t page = s->pages[start / kv->pt], next = full_child(kv, s->cursor, hash, s->tokens + start);
        if (next < 0)
            next = child_for(s, start, kv->pt);
        if (next < 0) {
            s->mute = true;
            break;
        }
        if (kv->nodes[next].page < 0 && kv->page_node[page] < 0) {
            page_ref(&kv->pages, page);         /* known from a lower tier only, and just computed: as good as promoted */
            tree_set_page(kv, next, page);
        }
        share_own(kv, next, page);
        if (kv->nodes[next].users++ == kv->nodes[next].held)        /* the ancestors have this sequence as a user already */
            tree_update(kv, next);
        s->cursor = next;
        s->published += kv->pt;
        kid_to_front(kv, next);
    }
    if (s->cursor >= 0 && s->published != before && kv->cfg.tenant_quota_pct < 100)
        enforce_quota(kv, kv->nodes[s->cursor].root);
}

int32_t tree_node_at(struct kv_seq *s, uint32_t pos)
{
    struct kv *kv = s->kv;
    if (s->cursor < 0 || s->mute || pos == 0)
        return -1;
    if (pos == s->published)
        return kv->nodes[s->cursor].fill > 0 ? s->cursor : -1;
    if (pos < s->published || pos > s->published + kv->pt)
        return -1;
    int32_t node = child_for(s, s->published, pos - s->published);
    if (node >= 0)
        kid_to_front(kv, node);
    return node;
}
