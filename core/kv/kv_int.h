/*
 * Inside the KV plane: what kv.c (life and books), kv_seq.c (sequences), kv_tree.c (what is remembered) and kv_move.c (tiers)
 * share. Nobody else includes it but tests. Everything belongs to the engine thread.
 */
#ifndef CORE_KV_INT_H
#define CORE_KV_INT_H

#include "kv/kv.h"
#include "kv/kv_check.h"
#include "kv/kv_hash.h"
#include "kv/page.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define KV_MAX_MARKS 64

struct kv_seq {
    struct kv *kv;
    struct kv_seq *prev, *next;         /* list of open sequences */
    int32_t slot;                       /* -1 while parked */
    int32_t *tokens;                    /* [max_seq_tokens] */
    uint32_t n_tokens, n_prompt, n_computed;
    int32_t *pages;                     /* block table [max_pages] */
    uint32_t n_pages;
    uint32_t cached;                    /* positions that were attached at open */
    uint32_t marks[KV_MAX_MARKS], n_marks;      /* ascending snapshot positions */
    uint32_t cadence;                   /* and every multiple of this inside the prompt; 0 = none */
};

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
    struct kv_seq *seqs, *spare;        /* open ones; closed ones kept for reuse */

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

/** Copies the current counters to where kv_stat finds them. */
void kv_publish_stats(struct kv *kv);

#endif
