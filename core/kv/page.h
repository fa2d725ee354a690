/*
 * Numbered things with reference counts: device pages, state slots, snapshot records, host slots. A pool knows numbers and
 * counts, never memory. Number 0 can be reserved. Owner: the KV plane; engine thread only.
 */
#ifndef CORE_KV_PAGE_H
#define CORE_KV_PAGE_H

#include <stdbool.h>
#include <stdint.h>

struct page_pool {
    uint32_t n, n_free;         /* how many can be handed out, and how many are free */
    uint32_t first;             /* lowest number ever handed out */
    int32_t *stack;             /* the free ones; last in, first out, so that warm memory is used again */
    uint32_t *refs;             /* by number */
};

/** n numbers starting at `first` (1 reserves number 0). -ENOMEM. */
int page_pool_init(struct page_pool *p, uint32_t first, uint32_t n);
void page_pool_fini(struct page_pool *p);
/** A number with one reference, or -1. */
int32_t page_alloc(struct page_pool *p);
void page_ref(struct page_pool *p, int32_t id);
/** Drops a reference; true when that was the last and the number is free again. */
bool page_unref(struct page_pool *p, int32_t id);

#endif
