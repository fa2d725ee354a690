/* Sequences: block tables, slots, snapshot positions, and the calls the scheduler makes each step. */
#include "kv/kv_int.h"

#include <stdlib.h>

static struct kv_seq *seq_new(struct kv *kv)
{
    struct kv_seq *s = kv->spare;
    if (s != NULL) {
        kv->spare = s->next;
        *s = (struct kv_seq){ .kv = kv, .tokens = s->tokens, .pages = s->pages, .hpages = s->hpages, .ev = s->ev,
                              .slot = -1, .hstate = -1, .root = -1, .cursor = -1 };
        return s;
    }
    s = aligned_alloc(_Alignof(struct kv_seq), sizeof *s);
    if (s == NULL)
        return NULL;
    *s = (struct kv_seq){ .kv = kv, .slot = -1, .hstate = -1, .root = -1, .cursor = -1 };
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
    struct kv_seq **list = s->moving ? &kv->zombies : &kv->spare;
    s->next = *list;
    *list = s;
}

/* A record starts as zero bytes, in stream order behind whoever had the slot before. */
static void slot_clear(struct kv *kv, int32_t slot)
{
    for (uint32_t g = 0; g < kv->n_groups; g++)
        if (!group_is_paged(&kv->group[g]))
            kv->mem->fill(kv->dev, kv->compute, record_ptr(kv, g, slot), 0, kv->group[g].record_bytes);
}

/* Where the prompt meets what is remembered. */
struct attach {
    int root;
    struct kv_match m;
    uint32_t shared;            /* whole pages that are taken over */
    uint32_t need;              /* pages of its own */
    enum kv_miss left;          /* why more that a lower tier has was left there; KV_MISS_NONE: it was not */
};

/* Whether a snapshot on the grid in (from, to] was here once: its path hash is among the ghosts. */
static bool lost_state(const struct kv *kv, const int32_t *tokens, int root, uint32_t from, uint32_t to)
{
    uint64_t hash = kv->nodes[kv->roots[root].node].hash;
    uint32_t align = kv->cfg.snapshot_align, start = 0;
    for (uint32_t pos = align; pos <= to; pos += align) {
        while (start + kv->pt < pos) {
            hash = tree_path_hash(hash, tokens + start, kv->pt);
            start += kv->pt;
        }
        if (pos > from && tree_is_ghost(kv, ~tree_path_hash(hash, tokens + start, pos - start)))
            return true;
    }
    return false;
}

static enum kv_miss miss_reason(const struct kv *kv, const int32_t *tokens, uint32_t n, const struct attach *a)
{
    const struct kv_match *m = &a->m;
    if (a->left != KV_MISS_NONE)
        return a->left;
    if (m->depth >= n - 1 && m->pos == n - 1)
        return KV_MISS_LAST_TOKEN;
    if (m->depth > m->pos && kv->has_state) {
        /* Pages are there, state is not: it may be the alignment of the last token, a snapshot that went, or never was. */
        uint32_t align = kv->cfg.snapshot_align, best = (m->depth < n - 1 ? m->depth : n - 1) / align * align;
        if (m->pos >= best)
            return m->depth >= n - 1 ? KV_MISS_LAST_TOKEN : tree_is_ghost(kv, m->next_hash) ? KV_MISS_EVICTED : KV_MISS_DIVERGED;
        return lost_state(kv, tokens, a->root, m->pos, best) ? KV_MISS_EVICTED : KV_MISS_NO_STATE;
    }
    if (tree_is_ghost(kv, m->next_hash))
        return KV_MISS_EVICTED;
    return m->depth == 0 ? KV_MISS_COLD : KV_MISS_DIVERGED;
}

/* The first n entries of the block table become the pages of the path that ends in node. */
static void take_shared(struct kv_seq *s, int32_t node, uint32_t n)
{
    struct kv *kv = s->kv;
    s->n_pages = n;
    for (uint32_t i = n; i > 0; i--, node = kv->nodes[node].parent) {
        s->pages[i - 1] = kv->nodes[node].page;
        page_ref(&kv->pages, s->pages[i - 1]);
    }
}

/* Block table: shared pages by reference, a copy of the page the prefix ends in, new pages for the rest. */
static void attach_pages(struct kv_seq *s, const struct attach *a)
{
    struct kv *kv = s->kv;
    uint32_t tail = a->m.pos % kv->pt;
    int32_t node = a->m.node;
    int32_t source = tail > 0 ? kv->nodes[node].page : -1;
    if (tail > 0)
        node = kv->nodes[node].parent;
    take_shared(s, node, a->shared);
    for (uint32_t i = 0; i < a->need; i++)
        s->pages[s->n_pages++] = page_alloc(&kv->pages);
    if (source >= 0)
        for (uint32_t g = 0; g < kv->n_groups; g++)
            if (group_is_paged(&kv->group[g]))
                kv->mem->copy(kv->dev, kv->compute, page_ptr(kv, g, s->pages[a->shared]), page_ptr(kv, g, source),
                              kv->group[g].page_bytes, ARLE_COPY_D2D);
}

/* Tokens by the tier they came from; a page that was promoted for this prompt counts for its tier once. */
static void count_tiers(struct kv *kv, const struct attach *a, struct kv_hit *hit)
{
    uint32_t by[N_TIERS] = { 0 }, end = a->m.pos;
    for (int32_t i = a->m.node; i >= 0 && kv->nodes[i].fill > 0; i = kv->nodes[i].parent) {
        by[kv->nodes[i].origin] += end - kv->nodes[i].start;
        end = kv->nodes[i].start;
        kv->nodes[i].origin = TIER_DEVICE;
        kv->nodes[i].no_disk = kv->nodes[i].no_store = 0;
    }
    hit->from_device = by[TIER_DEVICE];
    hit->from_host = by[TIER_HOST];
    hit->from_disk = by[TIER_DISK];
    hit->from_store = by[TIER_STORE];
}

/* The cadence grows with the prompt, so that one long prompt takes at most a quarter of the device's snapshot records. */
static uint32_t cadence_for(const struct kv *kv, uint32_t n)
{
    uint32_t align = kv->cfg.snapshot_align, cadence = kv->cfg.snapshot_cadence / align * align;
    uint32_t quarter = kv->snap_pool.n / 4 > 0 ? kv->snap_pool.n / 4 : 1;
    uint32_t least = (n / quarter + align) / align * align;
    return cadence == 0 || kv->snap_pool.n == 0 ? 0 : cadence > least ? cadence : least;
}

/* Positions of the prompt whose state is worth keeping whatever the template says: its end, and where it left known ground. */
static void mark_defaults(struct kv_seq *s, const struct attach *a)
{
    s->cadence = cadence_for(s->kv, s->n_prompt);
    kv_seq_mark(s, s->n_prompt);
    kv_seq_mark(s, s->n_prompt - 1);
    if (a->m.depth > a->m.pos)
        kv_seq_mark(s, a->m.depth);
}

/* If the deepest match is not all on the device: fetch it, or do with what is. -EINPROGRESS. */
static int bring_up(struct kv *kv, const int32_t *tokens, uint32_t n, struct attach *a)
{
    if (move_here(kv, &a->m))
        return 0;
    struct kv_match here;
    tree_match(kv, a->root, tokens, n, n - 1, true, &here);
    if (!move_here(kv, &here))
        here.pos = 0;
    bool worth = move_pending(kv, &a->m) || move_worth(kv, &a->m, a->m.pos - here.pos);
    int r = worth ? move_fetch(kv, &a->m) : -EAGAIN;
    if (r == -EINPROGRESS)
        return r;
    if (r < 0) {
        uint32_t deepest = a->m.pos;
        tree_match(kv, a->root, tokens, n, n - 1, true, &a->m);     /* again: a fetch that failed may have changed the tree */
        if (!move_here(kv, &a->m)) {            /* a page in the middle of the path is being fetched for someone else */
            a->m.node = a->m.snap = -1;
            a->m.pos = 0;
        }
        if (a->m.pos < deepest)
            a->left = worth ? KV_MISS_NOT_FETCHED : KV_MISS_NOT_WORTH;
    }
    return 0;
}

static int find_prefix(struct kv *kv, const uint8_t *salt, const int32_t *tokens, uint32_t n, struct attach *a, struct arle_err *err)
{
    *a = (struct attach){ .root = -1, .m = { .node = -1, .snap = -1 } };
    if (kv->cfg.prefix_cache) {
        a->root = tree_root(kv, salt);
        if (a->root < 0)
            return arle_err_set(err, -ENOMEM, "no memory for another tenant in the prefix tree");
        tree_match(kv, a->root, tokens, n, n - 1, false, &a->m);
        int r = kv->slow != NULL ? slow_ask(kv, a->root, tokens, n, &a->m) : 0;
        if (r == 0)
            r = bring_up(kv, tokens, n, a);
        if (r < 0)
            return arle_err_set(err, r, "a longer prefix is on its way to the device");
    }
    a->shared = a->m.pos / kv->pt;
    a->need = pages_for(kv, n) - a->shared;
    return 0;
}

static struct kv_seq *seq_build(struct kv *kv, const int32_t *tokens, uint32_t n, const struct attach *a)
{
    struct kv_seq *s = seq_new(kv);
    if (s == NULL)
        return NULL;
    memcpy(s->tokens, tokens, n * sizeof *tokens);
    s->n_tokens = s->n_prompt = n;
    s->cached = s->n_computed = s->last_snap = a->m.pos;
    s->root = a->root;
    if (a->root >= 0) {
        s->cursor = a->m.node < 0 ? kv->roots[a->root].node : a->m.pos % kv->pt == 0 ? a->m.node : kv->nodes[a->m.node].parent;
        s->published = a->shared * kv->pt;
        tree_use(kv, s->cursor);
    }
    return s;
}

/*
 * Room for a sequence that starts or goes on. Not for it: what copies held that have passed, then what was fetched for prompts
 * whose owner has not come back for it (but that of `node`), and at last pins. Who is ready and has the better claim was opened before.
 */
static bool room_to_start(struct kv *kv, uint32_t n, int32_t node)
{
    if (tree_make_room(kv, n, false))
        return true;
    moves_finish(kv);
    do
        if (tree_make_room(kv, n, false))
            return true;
    while (move_end_ready(kv, node));
    return tree_make_room(kv, n, true);
}

int kv_seq_open(struct kv *kv, const uint8_t salt[KV_SALT_BYTES], const int32_t *tokens, uint32_t n, struct kv_seq **out,
                struct kv_hit *hit, struct arle_err *err)
{
    struct attach a;
    if (n == 0)
        return arle_err_set(err, -EINVAL, "empty prompt");
    if (n > kv->cfg.max_seq_tokens || pages_for(kv, n) > kv->pages.n)
        return arle_err_set(err, -E2BIG, "%u tokens need %u pages; sequences may have %u tokens and the pool has %u pages", n,
                            pages_for(kv, n), kv->cfg.max_seq_tokens, kv->pages.n);
    if (kv->slots.n_free == 0)
        return arle_err_set(err, -EAGAIN, "no sequence slot is free");
    int r = find_prefix(kv, salt, tokens, n, &a, err);
    if (r < 0)
        return r;

    tree_use(kv, a.m.node);             /* what is attached must outlive the search for room */
    bool room = room_to_start(kv, a.need, a.m.node);
    struct kv_seq *s = room ? seq_build(kv, tokens, n, &a) : NULL;
    if (s == NULL) {
        tree_unuse(kv, a.m.node);
        return room ? arle_err_set(err, -ENOMEM, "no memory for a sequence")
                    : arle_err_set(err, -EAGAIN, "%u pages needed, %u are free", a.need, kv->pages.n_free);
    }
    s->slot = page_alloc(&kv->slots);
    attach_pages(s, &a);
    if (a.m.snap >= 0) {
        snap_copy(kv, kv->compute, kv->snaps[a.m.snap].dev, s->slot, true);
        snap_used(kv, a.m.snap);
        kv->st.snapshots_restored++;
    } else {
        slot_clear(kv, s->slot);
    }
    tree_unuse(kv, a.m.node);
    move_fetched(kv, a.m.node);
    seq_link(s);
    mark_defaults(s, &a);
    *hit = (struct kv_hit){ .cached_tokens = a.m.pos, .matched_tokens = a.m.depth,
                            .miss = kv->cfg.prefix_cache ? miss_reason(kv, tokens, n, &a) : KV_MISS_OFF };
    count_tiers(kv, &a, hit);
    kv->st.lookups++;
    kv->st.lookup_tokens += n;
    kv->st.hits += a.m.pos > 0;
    kv->st.hit_tokens += a.m.pos;
    *out = s;
    return 0;
}

static void mark_at(struct kv_seq *s, uint32_t pos)
{
    uint32_t i;
    if (pos <= s->cached || pos > s->n_prompt || s->n_marks == KV_MAX_MARKS || s->kv->snap_pool.n == 0)
        return;
    for (i = s->n_marks; i > 0 && s->marks[i - 1] >= pos; i--)
        if (s->marks[i - 1] == pos)
            return;
    memmove(&s->marks[i + 1], &s->marks[i], (s->n_marks - i) * sizeof s->marks[0]);
    s->marks[i] = pos;
    s->n_marks++;
}

static uint32_t divisor(uint32_t a, uint32_t b)
{
    return b == 0 ? a : divisor(b, a % b);
}

void kv_seq_mark(struct kv_seq *s, uint32_t pos)
{
    const struct kv *kv = s->kv;
    uint32_t align = kv->cfg.snapshot_align;
    mark_at(s, pos - pos % align);
    if (kv->cfg.store == NULL || !kv->has_state || align % kv->pt == 0)
        return;
    /* Pages are larger than the grid, and the cluster takes states at their ends only: one there too. */
    uint64_t end = (uint64_t)align / divisor(align, kv->pt) * kv->pt;
    mark_at(s, (uint32_t)(pos - pos % end));
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

uint32_t kv_seq_cut(const struct kv_seq *s, uint32_t from, uint32_t want, uint32_t room, struct kv_saves *saves)
{
    if (saves != NULL)
        saves->n = 0;
    if (from >= s->n_prompt || want <= from)
        return want;
    uint32_t end = want >= s->n_prompt ? s->n_prompt : want - want % s->kv->cfg.snapshot_align;
    for (uint32_t due = next_due(s, from); due < end; due = next_due(s, due)) {
        if (saves == NULL || saves->n == room || saves->n == KV_MAX_SAVES || (due - from) % s->kv->cfg.snapshot_align != 0)
            return due;
        saves->pos[saves->n++] = due;
    }
    return end > from ? end : from;
}

int32_t kv_side_slot(const struct kv *kv, uint32_t i)
{
    KV_CHECK(i < kv->cfg.n_side);
    return (int32_t)(kv->cfg.n_slots + 1 + i);      /* behind the slots that page_alloc gives out */
}

/* Room for a running sequence, which outranks what it holds twice itself, promotions, and at last pins. */
static bool room_to_run(struct kv_seq *s, uint32_t n)
{
    if (tree_make_room(s->kv, n, false))
        return true;
    tree_share(s);
    if (tree_make_room(s->kv, n, false))
        return true;
    move_end_promos(s->kv);
    return room_to_start(s->kv, n, -1);
}

int kv_seq_reserve(struct kv_seq *s, uint32_t n_tokens)
{
    struct kv *kv = s->kv;
    if (n_tokens > kv->cfg.max_seq_tokens)
        return -E2BIG;
    if (n_tokens <= s->n_pages * kv->pt)
        return 0;
    uint32_t need = pages_for(kv, n_tokens);
    if (!room_to_run(s, need - s->n_pages))
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
    if (tree_due(s))            /* the engine ran ahead */
        tree_publish(s);
    return 0;
}

static void computed(struct kv_seq *s, uint32_t n, int32_t slot)
{
    KV_CHECK(n >= s->n_computed && !s->parked);
    uint32_t from = s->n_computed;
    s->n_computed = n;
    if (tree_due(s))
        tree_publish(s);
    if (s->kv->has_state && from < s->n_prompt && next_due(s, from) == n)
        tree_snapshot(s, n, slot);
}

void kv_seq_computed(struct kv_seq *s, uint32_t n)
{
    computed(s, n, s->slot);
}

void kv_seq_saved(struct kv_seq *s, uint32_t n, uint32_t i)
{
    computed(s, n, kv_side_slot(s->kv, i));
    s->kv->st.snapshots_inside++;
}

void kv_seq_truncate(struct kv_seq *s, uint32_t n)
{
    KV_CHECK(n >= s->n_computed && n >= s->n_prompt);
    if (n < s->n_tokens)
        s->n_tokens = n;
}

/* The last state of a sequence that ends: the next turn of its chat goes on from there, if it renders the same. */
static void final_snapshot(struct kv_seq *s)
{
    uint32_t n = s->n_computed;
    if (!s->kv->has_state || s->slot <= 0 || n > s->n_tokens || n <= s->last_snap)
        return;
    if (s->kv->cfg.strict && (n > s->n_prompt || n % s->kv->cfg.snapshot_align != 0))
        return;
    tree_snapshot(s, n, s->slot);
}

/* Positions that may be remembered of a sequence that ends. */
static uint32_t final_pos(const struct kv_seq *s)
{
    uint32_t n = s->n_computed < s->n_tokens ? s->n_computed : s->n_tokens;
    return s->kv->cfg.strict && n > s->n_prompt ? s->n_prompt : n;
}

/* Pages, slot and its place in the tree; host slots stay. */
static void leave_device(struct kv_seq *s)
{
    struct kv *kv = s->kv;
    if (s->cursor >= 0)
        tree_unuse(kv, s->cursor);
    s->cursor = -1;
    for (uint32_t i = 0; i < s->n_pages; i++)
        if (!page_unref(&kv->pages, s->pages[i]))
            tree_page_released(kv, s->pages[i]);
    s->n_pages = 0;
    if (s->slot > 0)
        page_unref(&kv->slots, s->slot);
    s->slot = -1;
}

static void host_slots_free(struct kv_seq *s)
{
    while (s->n_hpages > 0)
        page_unref(&s->kv->host_pages, s->hpages[--s->n_hpages]);
    if (s->hstate >= 0)
        page_unref(&s->kv->host_states, s->hstate);
    s->hstate = -1;
}

/* A parked sequence stands on the root of its salt only, which would otherwise be given to another when nothing is left below. */
static void hold_root(struct kv_seq *s, bool hold)
{
    if (s->root < 0)
        return;
    (hold ? tree_use : tree_unuse)(s->kv, s->kv->roots[s->root].node);
}

void kv_seq_close(struct kv_seq *s, bool keep)
{
    struct kv *kv = s->kv;
    if (keep && !s->parked) {
        tree_publish(s);
        if (kv->has_state)
            final_snapshot(s);
        else
            tree_node_at(s, final_pos(s));
    }
    leave_device(s);
    if (s->parked)
        hold_root(s, false);
    s->parked = false;
    if (!s->moving)
        host_slots_free(s);
    seq_retire(s);
}

/* ---- parking --------------------------------------------------------------------------------------------------------- */

/*
 * The copies run on the compute stream: whatever uses the freed pages and slot next is enqueued behind them, so that both are
 * free at once. Host slots are given back when the event behind the copies has passed.
 */
static void state_copy(struct kv_seq *s, bool up)
{
    struct kv *kv = s->kv;
    char *at = host_state_ptr(kv, s->hstate);
    for (uint32_t g = 0; g < kv->n_groups; g++) {
        if (group_is_paged(&kv->group[g]))
            continue;
        void *live = record_ptr(kv, g, s->slot);
        kv->mem->copy(kv->dev, kv->compute, up ? live : (void *)at, up ? (void *)at : live, kv->group[g].record_bytes,
                      up ? ARLE_COPY_H2D : ARLE_COPY_D2H);
        at += kv->group[g].record_bytes;
    }
}

static bool host_slots_get(struct kv_seq *s, uint32_t n)
{
    struct kv *kv = s->kv;
    if (kv->copy == NULL)
        return false;
    if (s->hpages == NULL)
        s->hpages = calloc(kv->max_pages, sizeof *s->hpages);
    if (s->hpages == NULL || (s->ev == NULL && kv->mem->event_create(kv->dev, &s->ev, NULL) < 0))
        return false;
    if (kv->has_state && (s->hstate = host_state_get(kv)) < 0)
        return false;
    while (s->n_hpages < n) {
        int32_t slot = host_page_get(kv);
        if (slot < 0) {
            host_slots_free(s);
            return false;
        }
        s->hpages[s->n_hpages++] = slot;
    }
    return true;
}

static void mark_moving(struct kv_seq *s)
{
    s->kv->mem->event_record(s->kv->dev, s->ev, s->kv->compute);
    s->kv->n_moving += !s->moving;
    s->moving = true;
}

void seq_moved(struct kv_seq *s)
{
    s->moving = false;
    s->kv->n_moving--;
    if (!s->parked)
        host_slots_free(s);
}

int kv_seq_park(struct kv_seq *s)
{
    struct kv *kv = s->kv;
    uint32_t used = pages_for(kv, s->n_computed);
    if (s->parked)
        return -EALREADY;
    if (s->moving)
        return -ENOSPC;         /* its last resume still reads the host slots */
    tree_publish(s);
    if (!host_slots_get(s, used))
        return -ENOSPC;
    for (uint32_t i = 0; i < used; i++)
        page_copy_host(kv, kv->compute, s->pages[i], s->hpages[i], false);
    if (kv->has_state)
        state_copy(s, false);
    mark_moving(s);
    kv->st.demoted_bytes[TIER_HOST] += used * kv->page_total + kv->state_total;
    kv->st.parked++;
    s->parked = true;
    hold_root(s, true);
    leave_device(s);
    return 0;
}

int kv_seq_resume(struct kv_seq *s)
{
    struct kv *kv = s->kv;
    if (!s->parked)
        return 0;
    uint32_t used = pages_for(kv, s->n_computed), want = pages_for(kv, s->n_tokens), shared = 0;
    int32_t node = -1;
    if (kv->slots.n_free == 0)
        return -EAGAIN;
    if (s->root >= 0) {         /* what the tree still has on the device is shared again instead of copied */
        uint32_t known = s->n_computed < s->n_tokens ? s->n_computed : s->n_tokens;
        node = tree_walk(kv, s->root, s->tokens, known);
        shared = (kv->nodes[node].start + kv->nodes[node].fill) / kv->pt;
        tree_use(kv, node);
    }
    if (want < used)
        want = used;
    if (!room_to_start(kv, want - shared, -1)) {
        if (node >= 0)
            tree_unuse(kv, node);
        return -EAGAIN;
    }
    s->slot = page_alloc(&kv->slots);
    s->cursor = node;
    s->published = shared * kv->pt;
    take_shared(s, node, shared);
    while (s->n_pages < want)
        s->pages[s->n_pages++] = page_alloc(&kv->pages);
    for (uint32_t i = shared; i < used; i++)
        page_copy_host(kv, kv->compute, s->pages[i], s->hpages[i], true);
    if (kv->has_state)
        state_copy(s, true);
    mark_moving(s);
    kv->st.promoted_bytes[TIER_HOST] += (used - shared) * kv->page_total + kv->state_total;
    kv->st.resumed++;
    s->parked = false;
    hold_root(s, false);
    return 0;
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

void kv_seq_prefetch(const struct kv_seq *s)
{
    if (s != NULL)
        __builtin_prefetch(s);
}

void kv_seq_prefetch_end(const struct kv_seq *s)
{
    if (s != NULL)
        __builtin_prefetch(s->tokens + s->n_tokens, 1);
}

const int32_t *kv_seq_tokens(const struct kv_seq *s, uint32_t *out_n)
{
    *out_n = s->n_tokens;
    return s->tokens;
}

int kv_poll(struct kv *kv)
{
    return move_poll(kv);
}

void kv_step_end(struct kv *kv)
{
    move_down(kv);
    if (kv->slow != NULL)
        slow_write(kv);
    kv_publish_stats(kv);
}

/* The states of a pinned page that no pin holds. */
static bool flush_states(struct kv *kv, int32_t node)
{
    bool any = false;
    for (int32_t s = kv->nodes[node].snaps, next; s >= 0; s = next) {
        next = kv->snaps[s].next;
        if (kv->snaps[s].pinned == 0 && kv->snaps[s].users == 0) {
            snap_drop(kv, s);
            any = true;
        }
    }
    return any;
}

void kv_flush(struct kv *kv)
{
    move_end_promos(kv);
    /* From the leaves up, again and again: what a leaf leaves behind becomes one. */
    for (bool any = true; any;) {
        any = false;
        for (uint32_t i = 0; i < kv->nodes_used; i++) {
            const struct kv_node *n = &kv->nodes[i];
            if (n->parent >= 0 && n->pinned > 0)
                any |= flush_states(kv, (int32_t)i);
            else if (n->parent >= 0 && n->users == 0 && n->kids == 0 && (n->page < 0 || kv->pages.refs[n->page] == 1)) {
                tree_remove(kv, (int32_t)i);
                any = true;
            }
        }
    }
    kv_publish_stats(kv);
}

void kv_report_prefill(struct kv *kv, uint32_t n_tokens, int64_t us)
{
    if (n_tokens == 0 || us <= 0)
        return;
    double now = n_tokens * 1e6 / (double)us;
    kv->prefill_tokens_s = kv->prefill_tokens_s > 0 ? kv->prefill_tokens_s * 0.9 + now * 0.1 : now;
}

int kv_settle(struct kv *kv, int64_t deadline_ms)
{
    int64_t end = clock_mono_us() + deadline_ms * 1000;
    for (;; kv_poll(kv)) {
        kv_step_end(kv);
        kv_poll(kv);
        if (move_idle(kv))
            break;
        if (clock_mono_us() > end)
            return -ETIMEDOUT;
        nanosleep(&(struct timespec){ .tv_nsec = 50000 }, NULL);
    }
    kv_publish_stats(kv);
    return 0;
}
