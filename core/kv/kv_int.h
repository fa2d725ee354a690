/*
 * Inside the KV plane: what kv.c (life and books), kv_seq.c (sequences), kv_tree.c (what is remembered) and kv_move.c (tiers)
 * share. Nobody else includes it but tests. Everything belongs to the engine thread.
 */
#ifndef CORE_KV_INT_H
#define CORE_KV_INT_H

#include "kv/kv.h"
#include "kv/kv_check.h"
#include "kv/kv_hash.h"
#include "kv/kv_heap.h"
#include "kv/kv_disk.h"
#include "kv/page.h"
#include "util/clock.h"

#include <stddef.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define KV_MAX_MARKS 64

#define KV_GHOSTS 65536u

enum kv_tier { TIER_DEVICE, TIER_HOST, TIER_DISK, TIER_STORE, N_TIERS };

/*
 * One page of the tree: the tokens of page `start / pt` under one parent. Full nodes (fill == pt) have children and are found by
 * the hash of their whole path; partial ones are leaves that end at a snapshot. A sequence that writes on in a page that it
 * shares with a partial node only adds positions past `fill`. Of one parent's children none is meant to be a prefix of another.
 * A root has start = fill = 0 and no data. Every other node has its data in at least one tier.
 */
struct kv_node {
    int32_t parent, child, next, prev, hnext;   /* family, and chain of the hash table; -1 = none. parent -2: free */
    int32_t root;                       /* which entry of kv.roots */
    int32_t page, host;                 /* device page, host page slot; -1 = none */
    int32_t snaps;                      /* its snapshots, ascending is not promised */
    uint32_t start, fill;
    uint32_t users;                     /* sequences, promotions and moves that stand on it or below */
    uint32_t held;                      /* of these: slow moves, which need the node and not its device page */
    uint32_t dev_kids, host_kids, kids; /* children with a device page, with a host copy, at all */
    uint32_t busy;                      /* moves under way; each of them also is a user */
    uint32_t pinned;                    /* ends of pins at it or below (kv_pin.c) */
    int32_t tprev, tnext;               /* its tenant's list of evictable nodes, pinned ones left out */
    uint64_t hash;                      /* of the whole path */
    uint64_t disk, disk_new;            /* id of the disk object; of the one being written; 0 = none */
    uint8_t store;                      /* the cluster tier has it */
    uint8_t origin;                     /* enum kv_tier it was promoted from and not yet counted */
    uint8_t no_disk, no_store;          /* the tier refused or evicted it: not again before it is used again */
    uint8_t rising;                     /* its page is being copied up */
    uint8_t store_new;                  /* being put there */
    uint8_t has_key;                    /* kv.keys holds its key */
    uint8_t idle, idle_pinned;          /* counted in kv.idle_pages, in kv.idle_pinned */
    uint8_t listed;                     /* in its tenant's list */
    double prio;                        /* worth when it was last let go */
};

/* State records at exactly `pos` tokens, which lie on the path of `node` (node.start < pos <= node.start + fill). */
struct kv_snap {
    int32_t node, next;                 /* node -1: free (next chains the free list) */
    uint32_t pos, cost;                 /* cost: tokens to recompute without it */
    uint32_t hits, busy;
    uint32_t users;                     /* moves and promotions that need it */
    uint32_t pinned;                    /* pins that hold it */
    int32_t dev, host;                  /* record slots, -1 = none */
    uint64_t disk, disk_new;
    uint8_t store, store_new, origin, no_disk, no_store;
    double prio;
};

/* One batch of copies between device and host, done when its event has passed. */
#define MOVE_ITEMS 16
#define N_MOVES 16
struct kv_move {
    struct arle_event *ev;
    uint32_t n;                         /* 0: free */
    bool up;                            /* host to device */
    int64_t start_us;
    uint64_t bytes;
    struct { int32_t node, snap, dev, host; uint32_t fill; } item[MOVE_ITEMS];      /* node or snap is -1 */
};

/* A prefix on its way up, so that an open can use it. */
#define N_PROMOS 64
struct kv_promo {
    int32_t node, snap;                 /* node -1: free */
    bool ready;
    int64_t since_us;                   /* asked for; when it is ready: since then */
};

/*
 * One operator's pin: the places where a prompt like it could start (the deepest one, and one for each of its marks). Each of
 * them counts in `pinned` of its state and of every page from the root down to it.
 */
struct kv_pin_end { int32_t node, snap; };                  /* snap -1: the model has no states */
struct kv_pin { uint8_t id[16]; struct kv_pin_end *end; uint32_t n_ends; };      /* id: of salt and tokens */

struct kv_root { uint8_t salt[KV_SALT_BYTES]; int32_t node, tenant; };      /* node -1: free entry */
struct kv_tenant { uint8_t tag[16]; uint32_t n_roots, dev_snaps; int64_t dev_pages; int32_t head, tail; };

struct kv_seq {
    /* Every step, one cache line: */
    _Alignas(64) struct kv *kv;
    int32_t *tokens;                    /* [max_seq_tokens] */
    int32_t *pages;                     /* block table [max_pages] */
    uint32_t n_tokens, n_prompt, n_computed;
    uint32_t n_pages;
    uint32_t published;                 /* tokens up to the end of cursor */
    int32_t cursor;                     /* deepest full node of its path in the tree; -1 when nothing is remembered of it */
    int32_t slot;                       /* -1 while parked */
    bool mute;                          /* the tree was full: stop publishing */
    bool parked, moving;                /* moving: ev is behind copies that use the host slots */
    /* Now and then: */
    struct kv_seq *prev, *next;         /* list of open sequences */
    uint32_t cached;                    /* positions that were attached at open */
    int root;
    /* Parked, or host slots not yet given back: */
    int32_t *hpages; uint32_t n_hpages; /* host page slots [max_pages] */
    int32_t hstate;                     /* host state slot or -1 */
    struct arle_event *ev;
    uint32_t last_snap;
    uint32_t marks[KV_MAX_MARKS], n_marks;      /* ascending snapshot positions */
    uint32_t cadence;                   /* and every multiple of this inside the prompt; 0 = none */
};
_Static_assert(offsetof(struct kv_seq, prev) <= 64, "what every step touches of a sequence is one line");

struct kv {
    struct kv_config cfg;
    char *identity, *disk_dir;
    struct arle_device *dev;
    const struct arle_mem_ops *mem;
    struct arle_stream *compute;

    uint32_t n_groups;
    struct arle_cache_group group[ARLE_MAX_CACHE_GROUPS];
    void *base[ARLE_MAX_CACHE_GROUPS];
    bool has_state;                     /* some group is state or window */
    uint64_t page_total, state_total;   /* bytes of one page in all paged groups, of one record in all state groups */
    uint32_t pt, max_pages;             /* page_tokens; pages of the longest sequence */

    struct page_pool pages, slots;
    int32_t *page_node;                 /* by page: its node in the tree or -1 */
    struct kv_seq *seqs, *spare;        /* open ones; closed ones kept for reuse */

    /* the tree */
    struct kv_node *nodes; uint32_t n_nodes, nodes_used; int32_t node_free;
    int32_t *node_tokens;               /* [n_nodes * pt] */
    uint32_t clock;                     /* where the search for a victim goes on when nodes run out */
    int32_t *table; uint32_t table_mask;        /* full nodes by path hash */
    struct kv_root *roots; uint32_t n_roots, roots_cap;
    struct kv_tenant *tenants; uint32_t n_tenants, tenants_cap;
    uint64_t idle_pages, idle_pinned;   /* pages in the tree that no sequence uses; pinned ones among them */
    struct kv_pin *pins; uint32_t n_pins, pins_cap;
    uint32_t pinned_nodes, pinned_snaps;        /* each counted once */
    struct kv_heap dev_heap;            /* nodes whose device page could go */
    double dev_age;                     /* worth of the last page evicted: newcomers start from here */
    uint64_t *ghosts;                   /* [KV_GHOSTS] path hashes of what was dropped, for the reason of a miss */

    /* snapshots */
    struct kv_snap *snaps; uint32_t n_snaps, snaps_used; int32_t snap_free;
    struct page_pool snap_pool;         /* device records */
    char *snap_base;
    struct kv_heap snap_heap; double snap_age;
    uint32_t snap_clock;                /* where the search for a victim goes on when entries run out */
    uint32_t quota_clock;               /* where the next sample of a tenant's records begins */

    /* host tier */
    struct page_pool host_pages, host_states;
    char *host_page_base, *host_state_base;
    struct arle_stream *copy;           /* between device and host; behind the compute stream where they share memory */
    struct arle_event *behind;
    struct kv_heap host_heap, down_heap;        /* nodes whose host copy could go; nodes that should be copied down */
    struct kv_heap snap_host_heap, snap_down_heap;
    struct kv_move move[N_MOVES];
    uint32_t in_flight;                 /* items in moves */
    int32_t *path;                      /* [max_pages + 1] scratch: a path from the root down */
    struct kv_promo promo[N_PROMOS]; uint32_t n_promos;
    struct kv_seq *zombies;             /* closed, but their host slots are still being copied */
    uint32_t n_moving;
    /* disk and cluster (kv_slow.c) */
    struct kv_slow *slow;
    struct kv_heap disk_heap, store_heap;       /* nodes to be written there */
    struct kv_heap snap_disk_heap, snap_store_heap;
    double prefill_tokens_s;            /* 0: not reported yet */
    double tier_bytes_s[N_TIERS];

    struct kv_stats st;                 /* counters; gauges are filled in when published */
    _Atomic uint32_t pub_seq;           /* seqlock around pub: odd while it is written */
    _Atomic uint64_t pub[sizeof(struct kv_stats) / sizeof(uint64_t)];
};

static inline bool group_is_paged(const struct arle_cache_group *g)
{
    return g->kind == ARLE_CACHE_PAGED;
}

static inline void *page_ptr(const struct kv *kv, uint32_t g, int32_t page)
{
    return (char *)kv->base[g] + (size_t)page * kv->group[g].page_bytes;
}

static inline void *record_ptr(const struct kv *kv, uint32_t g, int32_t slot)
{
    return (char *)kv->base[g] + (size_t)slot * kv->group[g].record_bytes;
}

static inline uint32_t pages_for(const struct kv *kv, uint32_t n_tokens)
{
    return (n_tokens + kv->pt - 1) / kv->pt;
}

static inline int32_t *node_toks(const struct kv *kv, int32_t node)
{
    return kv->node_tokens + (size_t)node * kv->pt;
}

/* Whether tree_publish has a page more to enter than last time: asked at every token, answered without a call. */
static inline bool tree_due(const struct kv_seq *s)
{
    uint32_t end = s->published + s->kv->pt;
    return s->n_computed >= end && s->n_tokens >= end && (!s->kv->cfg.strict || s->n_prompt >= end);
}

static inline bool node_elsewhere(const struct kv_node *n)      /* its data is in some tier below the device */
{
    return n->host >= 0 || n->disk != 0 || n->store;
}

static inline bool snap_elsewhere(const struct kv_snap *s)
{
    return s->host >= 0 || s->disk != 0 || s->store;
}

/* What a node is worth when it is let go, or used: the deeper the more, among those of one time. */
static inline double node_worth_now(const struct kv *kv, const struct kv_node *n)
{
    return kv->dev_age + 1.0 + n->start / 65536.0;
}

/* ---- kv_tree.c: what is remembered ---------------------------------------------------------------------------------- */

struct kv_match {
    uint32_t depth;             /* tokens that match, whatever can be reused of them */
    int32_t node;               /* attach here ... */
    uint32_t pos;               /* ... with this many positions; 0 = nothing to attach */
    int32_t snap;               /* state to restore, -1 without state groups */
    uint64_t next_hash;         /* path hash of the first full page that was not found, 0 = none */
};

int tree_init(struct kv *kv, uint32_t n_nodes, uint32_t n_snaps, uint32_t n_dev_snaps, struct arle_err *err);
void tree_fini(struct kv *kv);
/** Index into kv.roots of the tree of this salt, made when it is new. -ENOMEM. */
int tree_root(struct kv *kv, const uint8_t salt[KV_SALT_BYTES]);
/** Finds how far tokens are known, and the deepest place at most `limit` positions deep where a sequence can start; dev_only:
 *  with what is on the device. */
void tree_match(const struct kv *kv, int root, const int32_t *tokens, uint32_t n, uint32_t limit, bool dev_only, struct kv_match *out);
/** The deepest full node on the path of tokens [0, n) that has a device page. */
int32_t tree_walk(const struct kv *kv, int root, const int32_t *tokens, uint32_t n);
/** Adds or takes a user on node and all its ancestors. */
void tree_use(struct kv *kv, int32_t node);
void tree_unuse(struct kv *kv, int32_t node);
/** The same for somebody who needs the nodes to stay in the tree, while device pages may go that are elsewhere too. */
void tree_hold(struct kv *kv, int32_t node);
void tree_unhold(struct kv *kv, int32_t node);
/** Enters the full pages of s that are final and known: as long as tree_due. */
void tree_publish(struct kv_seq *s);
/* Lets the nodes s stands on use its pages instead of second copies of their own. */
void tree_share(struct kv_seq *s);
/** Remembers the state that s's slot holds now at pos = computed tokens; enqueues the copy. False when there was no room. */
bool tree_snapshot(struct kv_seq *s, uint32_t pos, int32_t slot);
/** A node for exactly the tokens [0, pos) of s. -1: no room. */
int32_t tree_node_at(struct kv_seq *s, uint32_t pos);
/** The child of parent with these tokens, found or made without data; the caller gives it some at once. -1: the tree is full. */
int32_t tree_enter(struct kv *kv, int32_t parent, const int32_t *tokens, uint32_t n);
/**
 * Drops cached device pages until `want` are free; false when that is not possible. What cannot be enough is not begun. Pinned
 * pages are left alone unless `pins`, and then go last: only for a sequence that runs or is about to.
 */
bool tree_make_room(struct kv *kv, uint32_t want, bool pins);
/** A page whose last other holder let go may be evictable now. */
void tree_page_released(struct kv *kv, int32_t page);
/** Re-evaluates whether node can be evicted from the device. */
void tree_update(struct kv *kv, int32_t node);
/** Takes the node and everything below out of the tree; nothing of it may be in use. */
void tree_remove(struct kv *kv, int32_t node);
/** The node gives up its device page. It must have its data elsewhere, or it is removed with its descendants. */
void tree_drop_page(struct kv *kv, int32_t node);
void tree_set_page(struct kv *kv, int32_t node, int32_t page);     /* takes over one reference of page */
void snap_drop(struct kv *kv, int32_t snap);
/** A device record for a snapshot, evicting a lesser one; -1: all are in use. */
int32_t snap_record_get(struct kv *kv);
void snap_set_record(struct kv *kv, int32_t i, int32_t record);
void snap_update(struct kv *kv, int32_t snap);
void snap_copy(struct kv *kv, struct arle_stream *st, int32_t record, int32_t slot, bool restore);
int32_t snap_find(const struct kv *kv, int32_t node, uint32_t pos);
int32_t snap_new(struct kv *kv, int32_t node, uint32_t pos, uint32_t cost);     /* without any data yet; -1: none left */
void snap_used(struct kv *kv, int32_t snap);
bool tree_is_ghost(const struct kv *kv, uint64_t hash);
uint64_t tree_path_hash(uint64_t parent, const int32_t *tokens, uint32_t n);

/* ---- kv_pin.c: what an operator wants to stay ----------------------------------------------------------------------- */

void pin_fini(struct kv *kv);
/** A pinned snapshot leaves the tree: whoever pinned it lets go of it and of the pages that lead to it. */
void pin_snap_lost(struct kv *kv, int32_t snap);
/** A pinned page leaves the tree, its states are gone already: pins that ended there end before it. */
void pin_node_lost(struct kv *kv, int32_t node);
/** What `from` held is at its sibling `to` now. */
void pin_node_merged(struct kv *kv, int32_t from, int32_t to);

/* ---- kv_move.c: device and host ------------------------------------------------------------------------------------- */

int move_init(struct kv *kv, struct arle_err *err);
void move_fini(struct kv *kv);
/** Called when a node or snapshot leaves the tree or changed: gives its places in the lower tiers back. */
void move_forget_node(struct kv *kv, int32_t node);
void move_forget_snap(struct kv *kv, int32_t snap);
/** Re-evaluates what could be evicted from the host, and what should be copied down. */
void move_update_node(struct kv *kv, int32_t node);
void move_update_snap(struct kv *kv, int32_t snap);
/** Starts copies down when the device runs full. Once per step. */
void move_down(struct kv *kv);
/** Handles finished copies and goes on with promotions; returns how many became ready. */
int move_poll(struct kv *kv);
/** Puts the pages of the path to node into kv.path, from the root down; returns how many. */
uint32_t move_path(struct kv *kv, int32_t node);
/** True when all that m needs is on the device. */
bool move_here(const struct kv *kv, const struct kv_match *m);
/** True when m is being fetched already: what is left of the way no longer says whether it was worth it. */
bool move_pending(const struct kv *kv, const struct kv_match *m);
/** Whether fetching everything that `m` needs and is not on the device costs less time than computing `tokens` tokens. */
bool move_worth(const struct kv *kv, const struct kv_match *m, uint32_t tokens);
/** 0: all of m is on the device now; -EINPROGRESS: on its way; -EAGAIN: no room or too many at once. */
int move_fetch(struct kv *kv, const struct kv_match *m);
/** An open took it (or will not): the promotion of this node ends. */
void move_fetched(struct kv *kv, int32_t node);
/** Lets go of everything that was fetched for prompts which have not been opened yet. */
void move_end_promos(struct kv *kv);
/** Lets go of the one that has been ready longest and is not for `node`; false when there is none. */
bool move_end_ready(struct kv *kv, int32_t node);
/** Takes results of copies that have passed, so that what they held may go. Not while a batch is being put together. */
void moves_finish(struct kv *kv);
/** True when nothing is under way. */
bool move_idle(const struct kv *kv);
int32_t host_page_get(struct kv *kv);       /* a host slot, evicting lesser copies; -1: none */
int32_t host_state_get(struct kv *kv);
void node_set_host(struct kv *kv, int32_t node, int32_t slot);
static inline char *host_page_ptr(const struct kv *kv, int32_t slot)
{
    return kv->host_page_base + (size_t)slot * kv->page_total;
}
static inline char *host_state_ptr(const struct kv *kv, int32_t slot)
{
    return kv->host_state_base + (size_t)slot * kv->state_total;
}
void page_copy_host(struct kv *kv, struct arle_stream *st, int32_t page, int32_t slot, bool up);
/** The event behind a sequence's park or resume has passed. */
void seq_moved(struct kv_seq *s);

/* ---- kv_slow.c: disk and cluster ------------------------------------------------------------------------------------- */

/** Opens the disk tier, enters what it holds into the tree, starts the movers. */
int slow_init(struct kv *kv, struct arle_err *err);
/** Writes what is still to be written, for at most a while, and stops the movers. */
void slow_fini(struct kv *kv);
/** Hands work to the movers. Once per step; takes a lock only when there is some. */
void slow_write(struct kv *kv);
/** Takes results back; false when there were none. */
bool slow_poll(struct kv *kv);
/** Starts reading what the path to node, and snap, have in slow tiers only. False: cannot be had. */
bool slow_read(struct kv *kv, int32_t node, int32_t snap);
/** Whether the cluster may know more of this prompt than m says: 0 nothing to wait for, -EINPROGRESS asked. */
int slow_ask(struct kv *kv, int root, const int32_t *tokens, uint32_t n, const struct kv_match *m);
/** The disk object of this node goes, and those of its states with it: whoever stays in the tree is written again. */
void slow_orphan_snaps(struct kv *kv, int32_t node);
void slow_forget_node(struct kv *kv, int32_t node);
void slow_forget_snap(struct kv *kv, int32_t snap);
/** The disk is told whether the object of a page or state is pinned, whenever that or its place there changes. */
void slow_pinned_node(struct kv *kv, int32_t node);
void slow_pinned_snap(struct kv *kv, int32_t snap);
void slow_update_node(struct kv *kv, int32_t node);
void slow_update_snap(struct kv *kv, int32_t snap);
void snap_set_host(struct kv *kv, int32_t snap, int32_t slot);
bool slow_idle(const struct kv *kv);
void slow_stats(const struct kv *kv, struct kv_stats *st);
void move_measured(struct kv *kv, enum kv_tier tier, uint64_t bytes, int64_t us);

/** Copies the current counters to where kv_stat finds them. */
void kv_publish_stats(struct kv *kv);

#endif
