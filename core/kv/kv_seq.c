/* Sequences: block tables, slots, snapshot positions, and the calls the scheduler makes each step. */
#include "kv/kv_int.h"

#include <stdlib.h>

static struct kv_seq *seq_new(struct kv *kv)
{
    struct kv_seq *s = kv->spare;
    if (s != NULL) {
        kv->spare = s->next;
        int32_t *tokens = s->tokens, *pages = s->pages;
        *s = (struct kv_seq){ .kv = kv, .tokens = tokens, .pages = pages, .slot = -1 };
        return s;
    }
    s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->kv = kv;
    s->slot = -1;
    s->tokens = calloc(kv->cfg.max_seq_tokens, sizeof *s->tokens);
    s->pages = calloc(kv->max_pages, sizeof *s->pages);
    if (s->tokens == NULL || s->pages == NULL) {
        free(s->tokens);
        free(s->pages);
        free(s);
        return NULL;
    }
    return s;
}

static void seq_link(struct kv_seq *s)
{
    s->prev = NULL;
    s->next = s->kv->seqs;
    if (s->next != NULL)
        s->next->prev = s;
    s->kv->seqs = s;
}

static void seq_retire(struct kv_seq *s)
{
    struct kv *kv = s->kv;
    if (s->prev != NULL)
        s->prev->next = s->next;
    else
        kv->seqs = s->next;
    if (s->next != NULL)
        s->next->prev = s->prev;
    s->next = kv->spare;
    kv->spare = s;
}

/* A record starts as zero bytes, in stream order behind whoever had the slot before. */
static void slot_clear(struct kv *kv, int32_t slot)
{
    for (uint32_t g = 0; g < kv->n_groups; g++)
        if (!group_is_paged(&kv->group[g]))
            kv->mem->fill(kv->dev, kv->compute, record_ptr(kv, g, slot), 0, kv->group[g].record_bytes);
}

int kv_seq_open(struct kv *kv, const uint8_t salt[KV_SALT_BYTES], const int32_t *tokens, uint32_t n, struct kv_seq **out,
                struct kv_hit *hit, struct arle_err *err)
{
    uint32_t need = pages_for(kv, n);
    if (n == 0)
        return arle_err_set(err, -EINVAL, "empty prompt");
    if (n > kv->cfg.max_seq_tokens || need > kv->pages.n)
        return arle_err_set(err, -E2BIG, "%u tokens need %u pages; sequences may have %u tokens and the pool has %u pages", n, need,
                            kv->cfg.max_seq_tokens, kv->pages.n);
    if (kv->slots.n_free == 0 || kv->pages.n_free < need)
        return arle_err_set(err, -EAGAIN, "%u pages and a slot needed, %u and %u are free", need, kv->pages.n_free, kv->slots.n_free);
    struct kv_seq *s = seq_new(kv);
    if (s == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for a sequence");
    memcpy(s->tokens, tokens, n * sizeof *tokens);
    s->n_tokens = s->n_prompt = n;
    s->slot = page_alloc(&kv->slots);
    while (s->n_pages < need)
        s->pages[s->n_pages++] = page_alloc(&kv->pages);
    slot_clear(kv, s->slot);
    seq_link(s);
    kv->st.lookups++;
    kv->st.lookup_tokens += n;
    *hit = (struct kv_hit){ .miss = kv->cfg.prefix_cache ? KV_MISS_COLD : KV_MISS_OFF };
    *out = s;
    return 0;
}

void kv_seq_mark(struct kv_seq *s, uint32_t pos)
{
    uint32_t i;
    pos -= pos % s->kv->cfg.snapshot_align;
    if (pos <= s->cached || pos > s->n_prompt || s->n_marks == KV_MAX_MARKS)
        return;
    for (i = s->n_marks; i > 0 && s->marks[i - 1] >= pos; i--)
        if (s->marks[i - 1] == pos)
            return;
    memmove(&s->marks[i + 1], &s->marks[i], (s->n_marks - i) * sizeof s->marks[0]);
    s->marks[i] = pos;
    s->n_marks++;
}

/* The first snapshot position > from, or UINT32_MAX. */
static uint32_t next_due(const struct kv_seq *s, uint32_t from)
{
    uint32_t due = UINT32_MAX;
    for (uint32_t i = 0; i < s->n_marks && due == UINT32_MAX; i++)
        if (s->marks[i] > from)
            due = s->marks[i];
    if (s->cadence > 0) {
        uint32_t c = (from / s->cadence + 1) * s->cadence;
        if (c <= s->n_prompt && c < due)
            due = c;
    }
    return due;
}

uint32_t kv_seq_cut(const struct kv_seq *s, uint32_t from, uint32_t want)
{
    if (from >= s->n_prompt || want <= from)
        return want;
    uint32_t due = next_due(s, from);
    if (due <= want)
        return due;
    if (want >= s->n_prompt)
        return s->n_prompt;
    uint32_t cut = want - want % s->kv->cfg.snapshot_align;
    return cut > from ? cut : from;
}

int kv_seq_reserve(struct kv_seq *s, uint32_t n_tokens)
{
    struct kv *kv = s->kv;
    if (n_tokens > kv->cfg.max_seq_tokens)
        return -E2BIG;
    uint32_t need = pages_for(kv, n_tokens);
    if (need > s->n_pages && need - s->n_pages > kv->pages.n_free)
        return -EAGAIN;
    while (s->n_pages < need)
        s->pages[s->n_pages++] = page_alloc(&kv->pages);
    return 0;
}

int kv_seq_push(struct kv_seq *s, int32_t token)
{
    if (s->n_tokens >= s->kv->cfg.max_seq_tokens)
        return -E2BIG;
    s->tokens[s->n_tokens++] = token;
    return 0;
}

void kv_seq_computed(struct kv_seq *s, uint32_t n)
{
    KV_CHECK(n >= s->n_computed);
    s->n_computed = n;
}

void kv_seq_truncate(struct kv_seq *s, uint32_t n)
{
    KV_CHECK(n >= s->n_computed && n >= s->n_prompt);
    if (n < s->n_tokens)
        s->n_tokens = n;
}

void kv_seq_close(struct kv_seq *s, bool keep)
{
    struct kv *kv = s->kv;
    for (uint32_t i = 0; i < s->n_pages; i++)
        page_unref(&kv->pages, s->pages[i]);
    s->n_pages = 0;
    if (s->slot > 0)
        page_unref(&kv->slots, s->slot);
    seq_retire(s);
}

int kv_seq_park(struct kv_seq *s)
{
    return -ENOSPC;             /* there is no host tier to park in */
}

int kv_seq_resume(struct kv_seq *s)
{
    return s->slot > 0 ? 0 : -EAGAIN;
}

const int32_t *kv_seq_pages(const struct kv_seq *s, uint32_t *out_n)
{
    *out_n = s->n_pages;
    return s->pages;
}

int32_t kv_seq_slot(const struct kv_seq *s)
{
    return s->slot;
}

const int32_t *kv_seq_tokens(const struct kv_seq *s, uint32_t *out_n)
{
    *out_n = s->n_tokens;
    return s->tokens;
}

int kv_poll(struct kv *kv)
{
    return 0;
}

void kv_step_end(struct kv *kv)
{
    kv_publish_stats(kv);
}

void kv_flush(struct kv *kv)
{
}

void kv_report_prefill(struct kv *kv, uint32_t n_tokens, int64_t us)
{
}

int kv_settle(struct kv *kv, int64_t deadline_ms)
{
    kv_publish_stats(kv);
    return 0;
}
