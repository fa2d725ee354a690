/*
 * A fake model over the fake device, by which every byte that the KV plane restores can be checked. The entry of position p is
 * the hash of all tokens up to p, salted per tenant; the state after n tokens is the hash of n tokens; a second paged group has one
 * entry per four tokens. A step checks what it was given (state, all earlier entries through the block table) before it adds its
 * own. `border` in the state is folded with every chunk border, as rounding would be in a chunked kernel: when the KV plane
 * promises that warm equals cold bit for bit, it must come out as a pure function of the prompt.
 */
#ifndef ARLE_TESTS_KV_MODEL_H
#define ARLE_TESTS_KV_MODEL_H

#include "kv/kv.h"
#include "kv_fake.h"
#include "tap.h"

struct fm_state { uint64_t pos, hash, border, fill[5]; };

struct fm {
    struct arle_device dev;
    struct arle_stream *compute;
    struct arle_cache_group groups[3];
    uint32_t n_groups, pt;
    bool has_state, check_border;
    struct arle_cache_binding bind;
    struct kv *kv;
    struct arle_err err;
    uint64_t wrong;             /* bytes that were not what they had to be */
    uint64_t steps, computed;
    char first_wrong[200];
};

static inline uint64_t fm_mix(uint64_t h, uint64_t x)
{
    h ^= x + 0x9e3779b97f4a7c15u + (h << 6) + (h >> 2);
    h *= 0xff51afd7ed558ccdu;
    return h ^ h >> 31;
}

static inline uint64_t fm_salt(const uint8_t salt[KV_SALT_BYTES])
{
    uint64_t h = 7;
    for (int i = 0; i < KV_SALT_BYTES; i++)
        h = fm_mix(h, salt[i]);
    return h;
}

struct fm_job {
    struct fm *fm;
    uint64_t h0;
    uint32_t from, to, n_pages;
    int32_t slot, *tokens, *pages;
    struct kv_saves saves;
};

#define FM_SIDE 3

static inline void fm_bad(struct fm *fm, const char *what, uint32_t pos, const struct fm_job *j)
{
    if (fm->wrong++ == 0)
        snprintf(fm->first_wrong, sizeof fm->first_wrong, "%s at %u of a step [%u, %u)", what, pos, j->from, j->to);
}

static inline uint64_t *fm_entry(struct fm *fm, uint32_t group, uint32_t tpe, int32_t page, uint32_t pos)
{
    return (uint64_t *)((char *)fm->bind.group[group].base + (size_t)page * fm->bind.group[group].stride) + pos % fm->pt / tpe;
}

static inline struct fm_state *fm_state_at(struct fm *fm, int32_t slot)
{
    return (struct fm_state *)((char *)fm->bind.group[2].base + (size_t)slot * fm->bind.group[2].stride);
}

static inline uint64_t fm_borders(uint64_t b, uint32_t from, uint32_t to)
{
    while (from < to) {
        from = from + 64 < to ? from + 64 : to;
        b = fm_mix(b, from);
    }
    return b;
}

static inline uint64_t fm_hash(const struct fm_job *j, uint32_t n)
{
    uint64_t h = j->h0;
    for (uint32_t p = 0; p < n; p++)
        h = fm_mix(h, (uint64_t)(uint32_t)j->tokens[p]);
    return h;
}

/* Runs in stream order on the fake device. */
static inline void fm_run_job(void *arg, uint64_t a, uint64_t b)
{
    (void)a; (void)b;
    struct fm_job *j = arg;
    struct fm *fm = j->fm;
    uint64_t h = j->h0;
    struct fm_state *st = fm->has_state ? fm_state_at(fm, j->slot) : NULL;
    for (uint32_t p = 0; p < j->to; p++) {
        if (p == j->from && st != NULL && (p > 0 ? st->pos != p || st->hash != h : st->pos != 0 || st->hash != 0 || st->border != 0))
            fm_bad(fm, "state", p, j);
        h = fm_mix(h, (uint64_t)(uint32_t)j->tokens[p]);
        uint64_t *e = fm_entry(fm, 0, 1, j->pages[p / fm->pt], p), *e4 = fm_entry(fm, 1, 4, j->pages[p / fm->pt], p);
        if (p >= j->from)
            *e = h;
        else if (*e != h)
            fm_bad(fm, "entry", p, j);
        if (p % 4 == 3) {
            if (p >= j->from)
                *e4 = ~h;
            else if (*e4 != ~h)
                fm_bad(fm, "entry of four", p, j);
        }
    }
    if (st != NULL) {
        st->pos = j->to;
        st->hash = h;
        for (uint32_t i = 0; i < j->saves.n; i++)
            *fm_state_at(fm, kv_side_slot(fm->kv, i)) = (struct fm_state){
                .pos = j->saves.pos[i], .hash = fm_hash(j, j->saves.pos[i]), .border = fm_borders(st->border, j->from, j->saves.pos[i]) };
        st->border = fm_borders(st->border, j->from, j->to);
    }
    fm->computed += j->to - j->from;
    free(j->tokens);
    free(j->pages);
    free(j);
}

/* Enqueues the step that computes [from, to) of s; the states at saves (or NULL) go to side records. */
static inline void fm_step_saving(struct fm *fm, struct kv_seq *s, const uint8_t *salt, uint32_t from, uint32_t to, const struct kv_saves *saves)
{
    struct fm_job *j = calloc(1, sizeof *j);
    uint32_t n;
    const int32_t *t = kv_seq_tokens(s, &n), *pages;
    *j = (struct fm_job){ .fm = fm, .h0 = fm_salt(salt), .from = from, .to = to, .slot = kv_seq_slot(s) };
    if (saves != NULL)
        j->saves = *saves;
    j->tokens = calloc(n, sizeof *t);
    memcpy(j->tokens, t, n * sizeof *t);
    pages = kv_seq_pages(s, &j->n_pages);
    j->pages = calloc(j->n_pages, sizeof *pages);
    memcpy(j->pages, pages, j->n_pages * sizeof *pages);
    if (j->slot <= 0 || to > n || (uint64_t)j->n_pages * fm->pt < to)
        fm_bad(fm, "books", to, j);
    fm->steps++;
    fake_call(&fm->dev, fm->compute, fm_run_job, j, 0, 0);
}

static inline void fm_step(struct fm *fm, struct kv_seq *s, const uint8_t *salt, uint32_t from, uint32_t to)
{
    fm_step_saving(fm, s, salt, from, to, NULL);
}

/* One chunk of a prompt as a scheduler does it, with room for so many states from its midst; where it ended. */
static inline uint32_t fm_chunk(struct fm *fm, struct kv_seq *s, const uint8_t *salt, uint32_t from, uint32_t want, uint32_t room)
{
    struct kv_saves saves;
    uint32_t end = kv_seq_cut(s, from, want, room, &saves);
    if (end == from)
        return end;
    fm_step_saving(fm, s, salt, from, end, &saves);
    for (uint32_t i = 0; i < saves.n; i++)
        kv_seq_saved(s, saves.pos[i], i);
    kv_seq_computed(s, end);
    return end;
}

/* The border hash after a prompt of n tokens that was computed cold with chunk borders at multiples of 64. */
static inline uint64_t fm_border(uint32_t n)
{
    return fm_borders(0, 0, n);
}

static inline int fm_init(struct fm *fm, struct kv_config *cfg, bool has_state, bool lazy)
{
    static const char secret[32] = "tests of the prefix memory";
    fm->pt = cfg->page_tokens;
    fm->has_state = has_state;
    fm->dev.lazy = lazy;
    if (fm->dev.rng == 0)
        fm->dev.rng = 88172645463325252u;
    if (fm->compute == NULL)
        fake_stream_create(&fm->dev, &fm->compute, NULL);
    fm->n_groups = has_state ? 3 : 2;
    fm->groups[0] = (struct arle_cache_group){ .name = "kv", .kind = ARLE_CACHE_PAGED, .tokens_per_entry = 1, .page_bytes = fm->pt * 8 };
    fm->groups[1] = (struct arle_cache_group){ .name = "ckv", .kind = ARLE_CACHE_PAGED, .tokens_per_entry = 4, .page_bytes = fm->pt * 2 };
    fm->groups[2] = (struct arle_cache_group){ .name = "delta", .kind = ARLE_CACHE_STATE, .record_bytes = sizeof(struct fm_state) };
    if (cfg->identity == NULL)
        cfg->identity = "fake model 1";
    memcpy(cfg->secret, secret, sizeof cfg->secret);
    cfg->n_side = FM_SIDE;
    int r = kv_create(&fm->kv, cfg, &fm->dev, &fake_mem, fm->compute, fm->groups, fm->n_groups, &fm->err);
    if (r == 0)
        kv_binding(fm->kv, &fm->bind);
    return r;
}

static inline void fm_fini(struct fm *fm)
{
    kv_destroy(fm->kv);
    fm->kv = NULL;
    if (fm->compute != NULL)
        fake_stream_destroy(&fm->dev, fm->compute);
    fm->compute = NULL;
}

/* Opens, waiting for promotions the way a scheduler would. */
static inline int fm_open(struct fm *fm, const uint8_t *salt, const int32_t *tokens, uint32_t n, struct kv_seq **s, struct kv_hit *hit)
{
    int r;
    for (int i = 0; i < 20000; i++) {
        r = kv_seq_open(fm->kv, salt, tokens, n, s, hit, &fm->err);
        if (r != -EINPROGRESS && (r != -EAGAIN || i > 61))
            return r;
        if (r == -EAGAIN && i >= 60)            /* no room may be for the moment: moves hold pages */
            kv_settle(fm->kv, 2000);
        kv_poll(fm->kv);
        kv_step_end(fm->kv);
        fake_pump(&fm->dev, 8);
        if (r == -EINPROGRESS && i > 100)
            nanosleep(&(struct timespec){ .tv_nsec = 20000 }, NULL);
    }
    return r;
}

/* Prefills what is left of the prompt in chunks of at most `budget`; false when the plane never let it go on. */
static inline bool fm_prefill(struct fm *fm, struct kv_seq *s, const uint8_t *salt, uint32_t from, uint32_t n, uint32_t budget)
{
    for (uint32_t at = from; at < n;) {
        uint32_t end = fm_chunk(fm, s, salt, at, at + budget < n ? at + budget : n, fm->steps % 3 == 0 ? 0 : FM_SIDE);
        if (end == at)
            return false;
        kv_step_end(fm->kv);
        kv_poll(fm->kv);
        at = end;
    }
    return true;
}

/* One decoded token: pushed as sampled, its predecessor's step enqueued. */
static inline int fm_decode(struct fm *fm, struct kv_seq *s, const uint8_t *salt, int32_t token)
{
    uint32_t n;
    kv_seq_tokens(s, &n);
    int r = kv_seq_reserve(s, n + 1);
    if (r == 0)
        r = kv_seq_push(s, token);
    if (r < 0)
        return r;
    fm_step(fm, s, salt, n, n + 1);
    kv_seq_computed(s, n + 1);
    kv_step_end(fm->kv);
    kv_poll(fm->kv);
    return 0;
}

/* A whole request: prompt, `gen` made-up answer tokens from `next`, close. Returns the hit; cached is UINT32_MAX when it failed. */
static inline struct kv_hit fm_request(struct fm *fm, const uint8_t *salt, const int32_t *tokens, uint32_t n, const uint32_t *marks,
                                       uint32_t n_marks, const int32_t *answer, uint32_t gen)
{
    struct kv_seq *s;
    struct kv_hit hit = { .cached_tokens = UINT32_MAX };
    if (fm_open(fm, salt, tokens, n, &s, &hit) < 0)
        return (struct kv_hit){ .cached_tokens = UINT32_MAX };
    for (uint32_t i = 0; i < n_marks; i++)
        kv_seq_mark(s, marks[i]);
    if (!fm_prefill(fm, s, salt, hit.cached_tokens, n, 256))
        hit.cached_tokens = UINT32_MAX;
    if (fm->check_border && fm->has_state) {
        fake_run_all(&fm->dev);
        struct fm_state *st = (struct fm_state *)((char *)fm->bind.group[2].base + (size_t)kv_seq_slot(s) * fm->bind.group[2].stride);
        if (st->border != fm_border(n) && fm->wrong++ == 0)
            snprintf(fm->first_wrong, sizeof fm->first_wrong, "chunk borders of a prompt of %u, %u cached", n, hit.cached_tokens);
    }
    for (uint32_t i = 0; i < gen; i++)
        if (fm_decode(fm, s, salt, answer[i]) < 0)
            break;
    kv_seq_close(s, true);
    kv_step_end(fm->kv);
    return hit;
}

/** fm_init on a zeroed fm; says why not. */
static inline bool fm_start(struct fm *fm, struct kv_config cfg, bool has_state, bool lazy)
{
    memset(fm, 0, sizeof *fm);
    if (fm_init(fm, &cfg, has_state, lazy) == 0)
        return true;
    printf("# %s\n", fm->err.msg);
    return false;
}

/** Lets go of everything; what was borrowed must be back, and nothing may have been wrong. */
static inline void fm_stop(struct fm *fm)
{
    struct kv_stats st;
    fake_run_all(&fm->dev);
    EXPECT_EQ(kv_settle(fm->kv, 5000), 0);
    kv_unpin_all(fm->kv);
    kv_flush(fm->kv);
    kv_step_end(fm->kv);
    kv_stat(fm->kv, &st);
    EXPECT_EQ(st.pages_free, st.pages_total);
    EXPECT_EQ(st.slots_free, st.slots_total);
    EXPECT_EQ(st.snapshots, 0);
    EXPECT_EQ(st.host_bytes, 0);
    EXPECT_EQ(st.pins + st.pinned_pages + st.pinned_states, 0);
    EXPECT_EQ(kv_pages_lost(fm->kv), 0);
    EXPECT_EQ(fm->wrong, 0);
    if (fm->wrong > 0)
        printf("# %s\n", fm->first_wrong);
    fm_fini(fm);
}

#endif
