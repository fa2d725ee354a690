/* Binary heap with positions; see kv_heap.h. */
#include "kv/kv_heap.h"

#include <errno.h>
#include <stdlib.h>

int kv_heap_init(struct kv_heap *h, uint32_t cap)
{
    *h = (struct kv_heap){ .cap = cap };
    h->ids = calloc((size_t)cap + 1, sizeof *h->ids);
    h->pos = calloc((size_t)cap + 1, sizeof *h->pos);
    h->key = calloc((size_t)cap + 1, sizeof *h->key);
    if (h->ids != NULL && h->pos != NULL && h->key != NULL)
        return 0;
    kv_heap_fini(h);
    return -ENOMEM;
}

void kv_heap_fini(struct kv_heap *h)
{
    free(h->ids);
    free(h->pos);
    free(h->key);
    *h = (struct kv_heap){ 0 };
}

static void place(struct kv_heap *h, uint32_t at, int32_t id)
{
    h->ids[at] = id;
    h->pos[id] = at + 1;
}

static void sift(struct kv_heap *h, uint32_t at, int32_t id)
{
    double key = h->key[id];
    while (at > 0 && h->key[h->ids[(at - 1) / 2]] > key) {
        place(h, at, h->ids[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (;;) {
        uint32_t kid = 2 * at + 1;
        if (kid >= h->n)
            break;
        if (kid + 1 < h->n && h->key[h->ids[kid + 1]] < h->key[h->ids[kid]])
            kid++;
        if (h->key[h->ids[kid]] >= key)
            break;
        place(h, at, h->ids[kid]);
        at = kid;
    }
    place(h, at, id);
}

void kv_heap_put(struct kv_heap *h, int32_t id, double key)
{
    if (h->pos[id] != 0)
        h->n_late -= h->key[id] >= KV_LATE;
    h->n_late += key >= KV_LATE;
    h->key[id] = key;
    sift(h, h->pos[id] != 0 ? h->pos[id] - 1 : h->n++, id);
}

void kv_heap_remove(struct kv_heap *h, int32_t id)
{
    if (h->pos[id] == 0)
        return;
    h->n_late -= h->key[id] >= KV_LATE;
    uint32_t at = h->pos[id] - 1;
    int32_t last = h->ids[--h->n];
    h->pos[id] = 0;
    if (last != id)
        sift(h, at, last);
}

int32_t kv_heap_min(const struct kv_heap *h)
{
    return h->n > 0 ? h->ids[0] : -1;
}
