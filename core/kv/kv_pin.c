/*
 * Pins: prompts that an operator wants to stay. A pin is a list of ends, places where a prompt could start; each of them counts in
 * its state and in all pages that lead to it, so that pins that overlap are right after one of them has gone. What the counts mean
 * for eviction is said where things are evicted: kv_tree.c, kv_snap.c, kv_move.c, and kv_disk.c for its segments.
 */
#include "kv/kv_int.h"

#include <stdlib.h>

#define MAX_PINS 1024u          /* pins are looked through one by one when something pinned is lost */

/* ---- counts ---------------------------------------------------------------------------------------------------------- */

static void path_count(struct kv *kv, int32_t node, int by)
{
    for (int32_t i = node; i >= 0 && kv->nodes[i].fill > 0; i = kv->nodes[i].parent) {
        struct kv_node *n = &kv->nodes[i];
        bool was = n->pinned > 0;
        KV_CHECK(by > 0 || was);
        n->pinned += (uint32_t)by;
        if (was == (n->pinned > 0))
            continue;
        kv->pinned_nodes += (uint32_t)by;
        n->no_disk = n->no_store = 0;
        tree_update(kv, i);
        slow_pinned_node(kv, i);
    }
}

static void snap_count(struct kv *kv, int32_t i, int by)
{
    struct kv_snap *s = &kv->snaps[i];
    bool was = s->pinned > 0;
    KV_CHECK(by > 0 || was);
    s->pinned += (uint32_t)by;
    if (was == (s->pinned > 0))
        return;
    kv->pinned_snaps += (uint32_t)by;
    s->no_disk = s->no_store = 0;
    snap_update(kv, i);
    slow_pinned_snap(kv, i);
}

static void end_count(struct kv *kv, const struct kv_pin_end *e, int by)
{
    path_count(kv, e->node, by);
    if (e->snap >= 0)
        snap_count(kv, e->snap, by);
}

static void ends_count(struct kv *kv, const struct kv_pin *p, int by)
{
    for (uint32_t i = 0; i < p->n_ends; i++)
        end_count(kv, &p->end[i], by);
}

static void pin_drop(struct kv *kv, struct kv_pin *p)
{
    ends_count(kv, p, -1);
    free(p->end);
    *p = kv->pins[--kv->n_pins];
}

void pin_fini(struct kv *kv)
{
    for (uint32_t i = 0; i < kv->n_pins; i++)
        free(kv->pins[i].end);
    free(kv->pins);
}

/* ---- what the tree loses --------------------------------------------------------------------------------------------- */

/* The end goes; a pin without ends goes too. Callers run over the pins from the last to the first. */
static void end_drop(struct kv *kv, struct kv_pin *p, uint32_t i)
{
    end_count(kv, &p->end[i], -1);
    p->end[i] = p->end[--p->n_ends];
    if (p->n_ends == 0)
        pin_drop(kv, p);
}

void pin_snap_lost(struct kv *kv, int32_t snap)
{
    for (uint32_t k = kv->n_pins; k > 0; k--)
        for (uint32_t i = kv->pins[k - 1].n_ends; i > 0; i--)
            if (kv->pins[k - 1].end[i - 1].snap == snap) {
                end_drop(kv, &kv->pins[k - 1], i - 1);      /* once per pin: its ends differ */
                break;
            }
    KV_CHECK(kv->snaps[snap].pinned == 0);
}

void pin_node_lost(struct kv *kv, int32_t node)
{
    int32_t up = kv->nodes[node].parent;
    for (uint32_t k = kv->n_pins; k > 0; k--)
        for (uint32_t i = kv->pins[k - 1].n_ends; i > 0; i--) {
            struct kv_pin *p = &kv->pins[k - 1];
            if (p->end[i - 1].node != node)
                continue;
            if (kv->nodes[up].fill > 0) {
                path_count(kv, up, 1);
                path_count(kv, node, -1);
                p->end[i - 1].node = up;
            } else {
                end_drop(kv, p, i - 1);
                break;
            }
        }
    KV_CHECK(kv->nodes[node].pinned == 0);
}

void pin_node_merged(struct kv *kv, int32_t from, int32_t to)
{
    for (uint32_t k = 0; k < kv->n_pins; k++)
        for (uint32_t i = 0; i < kv->pins[k].n_ends; i++)
            if (kv->pins[k].end[i].node == from) {
                path_count(kv, to, 1);
                path_count(kv, from, -1);
                kv->pins[k].end[i].node = to;
            }
}

/* ---- what an operator asks ------------------------------------------------------------------------------------------- */

static void pin_id(const uint8_t salt[KV_SALT_BYTES], const int32_t *tokens, uint32_t n, uint8_t out[16])
{
    struct kv_blake b;
    kv_blake_init(&b, 16, salt, KV_SALT_BYTES);
    kv_blake_update(&b, tokens, (size_t)n * sizeof *tokens);
    kv_blake_final(&b, out);
}

static struct kv_pin *pin_find(struct kv *kv, const uint8_t id[16])
{
    for (uint32_t i = 0; i < kv->n_pins; i++)
        if (memcmp(kv->pins[i].id, id, 16) == 0)
            return &kv->pins[i];
    return NULL;
}

/* The deepest place at most `limit` deep, unless p has it already. Returns its position. */
static uint32_t end_add(struct kv *kv, struct kv_pin *p, int root, const int32_t *tokens, uint32_t n, uint32_t limit)
{
    struct kv_match m;
    tree_match(kv, root, tokens, n, limit, false, &m);
    if (m.pos == 0)
        return 0;
    for (uint32_t i = 0; i < p->n_ends; i++)
        if (p->end[i].node == m.node && p->end[i].snap == m.snap)
            return m.pos;
    p->end[p->n_ends++] = (struct kv_pin_end){ .node = m.node, .snap = m.snap };
    return m.pos;
}

/* Ends for a prompt of n tokens: where the same prompt starts, and where those do that share it up to a mark. Records of states are
 * few, so that the one after exactly n tokens, which only longer prompts can use, is not taken for it. */
static int pin_make(struct kv *kv, struct kv_pin *p, int root, const int32_t *tokens, uint32_t n, const uint32_t *marks,
                    uint32_t n_marks, uint32_t *out_tokens, struct arle_err *err)
{
    p->end = calloc((size_t)n_marks + 1, sizeof *p->end);
    p->n_ends = 0;
    if (p->end == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for a pin");
    *out_tokens = end_add(kv, p, root, tokens, n, kv->has_state ? n - 1 : n);
    for (uint32_t i = 0; i < n_marks && kv->has_state; i++)
        end_add(kv, p, root, tokens, n, marks[i] < n ? marks[i] : n);
    if (p->n_ends > 0)
        return 0;
    free(p->end);
    return arle_err_set(err, -ENOENT, "nothing is remembered of this prompt of %u tokens: it was not computed, has gone again, or is "
                        "too short to leave anything", n);
}

static int check_bound(const struct kv *kv, struct arle_err *err)
{
    uint32_t pct = kv->cfg.pin_pct;
    uint64_t pages = (uint64_t)kv->pages.n * pct / 100, states = (uint64_t)kv->snap_pool.n * pct / 100;
    if (kv->pinned_nodes > pages)
        return arle_err_param(err, -ENOSPC, "kv.pin_pct", "pins would hold %u of the %u cache pages; kv.pin_pct = %u allows %u",
                              kv->pinned_nodes, kv->pages.n, pct, (uint32_t)pages);
    if (kv->pinned_snaps > states)
        return arle_err_param(err, -ENOSPC, "kv.pin_pct", "pins would hold %u of the %u state snapshots that kv.snapshot_bytes has "
                              "room for; kv.pin_pct = %u allows %u", kv->pinned_snaps, kv->snap_pool.n, pct, (uint32_t)states);
    return 0;
}

/* Worth as if it had been used now, so that the pin given last is the last to yield. */
static void pin_touch(struct kv *kv, const struct kv_pin *p)
{
    for (uint32_t e = 0; e < p->n_ends; e++)
        for (int32_t i = p->end[e].node; i >= 0 && kv->nodes[i].fill > 0; i = kv->nodes[i].parent)
            if (kv->nodes[i].users == 0) {
                kv->nodes[i].prio = node_worth_now(kv, &kv->nodes[i]);
                tree_update(kv, i);
            }
}

static void pin_report(const struct kv *kv, const struct kv_pin *p, uint32_t tokens, struct kv_pinned *out)
{
    *out = (struct kv_pinned){ .tokens = tokens, .pins = kv->n_pins, .all_pages = kv->pinned_nodes, .all_states = kv->pinned_snaps };
    for (uint32_t e = 0; p != NULL && e < p->n_ends; e++) {
        uint32_t pages = kv->nodes[p->end[e].node].start / kv->pt + 1;
        out->pages = pages > out->pages ? pages : out->pages;
        out->states += p->end[e].snap >= 0;
    }
}

static bool pins_grow(struct kv *kv)
{
    if (kv->n_pins < kv->pins_cap)
        return true;
    uint32_t cap = kv->pins_cap ? kv->pins_cap * 2 : 16;
    struct kv_pin *more = realloc(kv->pins, cap * sizeof *more);
    if (more == NULL)
        return false;
    kv->pins = more;
    kv->pins_cap = cap;
    return true;
}

int kv_pin(struct kv *kv, const uint8_t salt[KV_SALT_BYTES], const int32_t *tokens, uint32_t n, const uint32_t *marks,
           uint32_t n_marks, struct kv_pinned *out, struct arle_err *err)
{
    struct kv_pin fresh = { 0 }, *old;
    uint32_t depth = 0;
    if (!kv->cfg.prefix_cache)
        return arle_err_param(err, -EINVAL, "kv.prefix_cache", "kv.prefix_cache is off: nothing is remembered that could be pinned");
    if (n == 0)
        return arle_err_set(err, -EINVAL, "empty prompt");
    int root = tree_root(kv, salt);
    if (root < 0 || !pins_grow(kv))
        return arle_err_set(err, -ENOMEM, "no memory for a pin");
    pin_id(salt, tokens, n, fresh.id);
    old = pin_find(kv, fresh.id);
    if (old == NULL && kv->n_pins == MAX_PINS)
        return arle_err_set(err, -ENOSPC, "%u prompts are pinned, more cannot be", MAX_PINS);
    int r = pin_make(kv, &fresh, root, tokens, n, marks, n_marks, &depth, err);
    if (r < 0)
        return r;
    ends_count(kv, &fresh, 1);
    if (old != NULL)
        ends_count(kv, old, -1);
    r = check_bound(kv, err);
    if (r < 0) {
        if (old != NULL)
            ends_count(kv, old, 1);
        ends_count(kv, &fresh, -1);
        free(fresh.end);
        return r;
    }
    pin_touch(kv, &fresh);
    if (old != NULL)
        free(old->end);
    else
        old = &kv->pins[kv->n_pins++];
    *old = fresh;
    pin_report(kv, old, depth, out);
    kv_publish_stats(kv);
    return 0;
}

int kv_unpin(struct kv *kv, const uint8_t salt[KV_SALT_BYTES], const int32_t *tokens, uint32_t n, struct kv_pinned *out,
             struct arle_err *err)
{
    uint8_t id[16];
    pin_id(salt, tokens, n, id);
    struct kv_pin *p = pin_find(kv, id);
    if (p == NULL)
        return arle_err_set(err, -ENOENT, "this prompt of %u tokens is not pinned (any more)", n);
    pin_drop(kv, p);
    pin_report(kv, NULL, 0, out);
    kv_publish_stats(kv);
    return 0;
}

uint32_t kv_unpin_all(struct kv *kv)
{
    uint32_t n = kv->n_pins;
    while (kv->n_pins > 0)
        pin_drop(kv, &kv->pins[kv->n_pins - 1]);
    kv_publish_stats(kv);
    return n;
}
