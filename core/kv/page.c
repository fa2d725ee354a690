/* Pools of numbers with reference counts; see page.h. */
#include "kv/page.h"
#include "kv/kv_check.h"

#include <errno.h>
#include <stdlib.h>

int page_pool_init(struct page_pool *p, uint32_t first, uint32_t n)
{
    *p = (struct page_pool){ .n = n, .n_free = n, .first = first };
    p->stack = calloc((size_t)n + 1, sizeof *p->stack);
    p->refs = calloc((size_t)first + n, sizeof *p->refs + 1);
    if (p->stack == NULL || p->refs == NULL) {
        page_pool_fini(p);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < n; i++)
        p->stack[i] = (int32_t)(first + n - 1 - i);     /* the lowest number leaves first */
    return 0;
}

void page_pool_fini(struct page_pool *p)
{
    free(p->stack);
    free(p->refs);
    *p = (struct page_pool){ 0 };
}

int32_t page_alloc(struct page_pool *p)
{
    if (p->n_free == 0)
        return -1;
    int32_t id = p->stack[--p->n_free];
    KV_CHECK(p->refs[id] == 0);
    p->refs[id] = 1;
    return id;
}

void page_ref(struct page_pool *p, int32_t id)
{
    KV_CHECK(p->refs[id] > 0);
    p->refs[id]++;
}

bool page_unref(struct page_pool *p, int32_t id)
{
    KV_CHECK(p->refs[id] > 0);
    if (--p->refs[id] > 0)
        return false;
    p->stack[p->n_free++] = id;
    return true;
}
