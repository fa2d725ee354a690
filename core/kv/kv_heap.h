/*
 * A binary heap of small integers ordered by a key, smallest first, with removal by integer. Sized once, allocates nothing after.
 * Ids with a key of KV_LATE or more are counted: they leave after all others, whatever those are worth.
 */
#ifndef CORE_KV_HEAP_H
#define CORE_KV_HEAP_H

#include <stdbool.h>
#include <stdint.h>

#define KV_LATE 1e15            /* more than any worth */

struct kv_heap {
    int32_t *ids;           /* the heap */
    uint32_t *pos;          /* by id: place + 1, or 0 when it is not in the heap */
    double *key;            /* by id */
    uint32_t n, cap;
    uint32_t n_late;        /* of n */
};

int kv_heap_init(struct kv_heap *h, uint32_t cap);      /* ids 0..cap-1; -ENOMEM */
void kv_heap_fini(struct kv_heap *h);
void kv_heap_put(struct kv_heap *h, int32_t id, double key);    /* inserts or moves */
void kv_heap_remove(struct kv_heap *h, int32_t id);             /* no effect when absent */
int32_t kv_heap_min(const struct kv_heap *h);                   /* -1 when empty */
static inline bool kv_heap_has(const struct kv_heap *h, int32_t id)
{
    return h->pos[id] != 0;
}

#endif
