/*
 * The KV plane as the scheduler sees it: pages with reference counts, state slots, the prefix tree, snapshots and tiers.
 * It owns all cache memory of one model and gets its memory functions from the backend at start; it includes no backend.
 *
 * Thread: everything here is called by the engine thread, except kv_stat (any thread). Device copies are enqueued on the
 * compute stream, so a snapshot taken after step N is in order before step N+1 overwrites the record. Nothing here waits for
 * a tier: what is not on the device yet is reported as pending, and the scheduler runs others meanwhile.
 * Page 0 and slot 0 are reserved for padding rows and never handed out.
 */
#ifndef CORE_KV_KV_H
#define CORE_KV_KV_H

#include <arle/backend.h>
#include <arle/kv.h>
#include <stdbool.h>

struct kv;
struct kv_seq;

#define KV_SALT_BYTES 32        /* 16 of the tenant, 16 of the client's narrowing; opaque to callers */

enum kv_fsync { KV_FSYNC_COMMIT = 0, KV_FSYNC_NEVER = 1 };

struct kv_config {
    uint32_t page_tokens;
    uint32_t n_pages;               /* without the reserved one */
    uint32_t n_slots;               /* running sequences at once, without the reserved one */
    uint32_t n_side;                /* records for states kept from the midst of a step, see kv_seq_cut [0] */
    uint32_t max_seq_tokens;        /* longest sequence: sizes block tables */
    bool prefix_cache;
    uint64_t snapshot_bytes;        /* device budget for state snapshots */
    uint32_t snapshot_cadence;      /* tokens between snapshots inside a long prompt, multiple of 64 */
    uint64_t host_bytes;            /* pinned host tier, 0 = none */
    const char *disk_dir;           /* NULL or "" = none */
    uint64_t disk_bytes;
    const struct arle_kv_store_api *store; void *store_ctx;     /* cluster tier or NULL */
    const char *identity;           /* model, dtype, layout, adapter: part of every key; compared, not only hashed */
    uint8_t secret[32];             /* server secret for salts; from a file, so that disk entries survive a restart */
    /* From here on 0 means the default in brackets. */
    uint32_t snapshot_align;        /* snapshots of a prompt fall on multiples of this [64]; so do chunk borders */
    bool strict;                    /* remember prefilled tokens only: warm equals cold bit for bit also where a backend rounds
                                     * differently when it decodes; costs recomputing the last answer each turn [false] */
    uint32_t tenant_quota_pct;      /* share of the device pages, and of the snapshot records, one tenant may hold cached [100] */
    uint32_t host_state_pct;        /* share of the host tier for state records, the rest is for pages [50] */
    uint32_t disk_fsync;            /* enum kv_fsync: sync at every commit (survives power loss), or leave it to the kernel */
    uint32_t store_deadline_ms;     /* one batch to the cluster tier may take this long [250] */
    uint64_t store_min_bytes_s;     /* the cluster tier is left alone while it measures slower than this [1 MB/s] */
    uint32_t pin_pct;               /* share of the device pages, and of the snapshot records, that pins may hold [50] */
};

/* Why a prompt was not reused further than it was. */
enum kv_miss {
    KV_MISS_NONE, KV_MISS_OFF, KV_MISS_COLD, KV_MISS_NO_STATE, KV_MISS_EVICTED, KV_MISS_LAST_TOKEN, KV_MISS_DIVERGED,
    KV_MISS_NOT_WORTH,              /* a lower tier has more, and fetching it was not expected to be faster than computing it */
    KV_MISS_NOT_FETCHED,            /* a lower tier has more, and had no way to give it now: no room, too much at once, shut */
};

struct kv_hit {
    uint32_t cached_tokens;         /* positions [0, cached) need no computing */
    uint32_t from_device, from_host, from_disk, from_store;     /* tokens by tier, summing to cached_tokens */
    uint32_t matched_tokens;        /* depth to which tokens matched (pages), >= cached_tokens */
    enum kv_miss miss;              /* why cached_tokens stopped where it did */
};

int kv_create(struct kv **out, const struct kv_config *cfg, struct arle_device *dev, const struct arle_mem_ops *mem,
              struct arle_stream *compute, const struct arle_cache_group *groups, uint32_t n_groups, struct arle_err *err);
void kv_destroy(struct kv *kv);             /* flushes the disk tier */
void kv_binding(const struct kv *kv, struct arle_cache_binding *out);

/** Mixes tenant and client salt with the server secret. tenant, client: "" if none. Pure; any thread. */
void kv_salt(const struct kv *kv, const char *tenant, const char *client, uint8_t out[KV_SALT_BYTES]);

/**
 * Opens a sequence over its prompt: finds the deepest usable prefix (at most n - 1 tokens, since the last token's logits
 * are always computed), takes references on its pages and a slot, restores the state into the slot. tokens is copied.
 * -EAGAIN: no slot or not enough pages now even after eviction (`needs` pages beyond the prefix are reserved at once for the
 * prompt); -EINPROGRESS: a deeper prefix is being promoted from a slower tier, call again with the same arguments after
 * kv_poll() said so; -E2BIG: longer than max_seq_tokens or than the whole pool.
 */
int kv_seq_open(struct kv *kv, const uint8_t salt[KV_SALT_BYTES], const int32_t *tokens, uint32_t n, struct kv_seq **out,
                struct kv_hit *hit, struct arle_err *err);

/** Marks a position of the prompt as worth a snapshot (end of system prompt, turn end, prompt end). Before computing it. */
void kv_seq_mark(struct kv_seq *seq, uint32_t pos);

/* Snapshot positions inside a chunk, ascending. */
#define KV_MAX_SAVES 8
struct kv_saves { uint32_t n, pos[KV_MAX_SAVES]; };

/**
 * Where a chunk that starts at `from` and could run to `want` must stop: at the prompt's end, or at the largest multiple of
 * snapshot_align <= want. Snapshot positions on the way go to *saves, for the step to keep the states there, as long as there are
 * fewer than `room` and they lie multiples of snapshot_align from `from`; at the next one the chunk stops. The result is `from`
 * when want reaches none of these: leave the sequence out of this step (so that chunk borders are absolute and warm equals
 * cold). A step must be able to give snapshot_align tokens to one sequence. Positions past the prompt are not cut. saves may be NULL where room is 0.
 */
uint32_t kv_seq_cut(const struct kv_seq *seq, uint32_t from, uint32_t want, uint32_t room, struct kv_saves *saves);

/** Slot number of the i-th record for states kept from the midst of a step, i < n_side. They belong to nobody between steps. */
int32_t kv_side_slot(const struct kv *kv, uint32_t i);

/** Makes sure that pages exist for positions < n_tokens. -EAGAIN when the pool is exhausted (the scheduler then parks someone). */
int kv_seq_reserve(struct kv_seq *seq, uint32_t n_tokens);

/** The engine appended a sampled token (it will be computed by a later step). */
int kv_seq_push(struct kv_seq *seq, int32_t token);

/**
 * Positions < n are computed (enqueued on the compute stream) and final: they will not be truncated, and the slot's records
 * hold the state after exactly n tokens in stream order. Full pages enter the tree; due snapshots are enqueued. n may run ahead
 * of the pushed tokens when the engine does; what is not pushed yet is remembered once it is.
 */
void kv_seq_computed(struct kv_seq *seq, uint32_t n);

/** As kv_seq_computed for a snapshot position inside the chunk: the state after exactly n tokens is in the i-th side record. Before
 *  kv_seq_computed for the chunk's end, in the order of positions. */
void kv_seq_saved(struct kv_seq *seq, uint32_t n, uint32_t i);

/** Gives the last tokens back (rejected drafts): positions >= n are forgotten; n >= what was reported as computed. State
 *  groups must be restored by the caller, before it reports the position as computed. */
void kv_seq_truncate(struct kv_seq *seq, uint32_t n);

/** Ends a sequence: keep = true leaves its pages (and a final snapshot) in the tree. Work already enqueued may still touch its
 *  pages; they are reused only behind it in the compute stream. */
void kv_seq_close(struct kv_seq *seq, bool keep);

const int32_t *kv_seq_tokens(const struct kv_seq *seq, uint32_t *out_n);     /* prompt and pushed tokens */

/** Moves a running sequence away to the host tier whole, so that its slot and pages are free; it can be resumed. -ENOSPC: no room. */
int kv_seq_park(struct kv_seq *seq);
/** 0: back on the device; -EAGAIN: no room; -EINPROGRESS: under way. */
int kv_seq_resume(struct kv_seq *seq);

/** Block table, host memory. Entries do not change while the sequence runs, the table only grows; kv_seq_resume makes a new one. */
const int32_t *kv_seq_pages(const struct kv_seq *seq, uint32_t *out_n);
int32_t kv_seq_slot(const struct kv_seq *seq);
/** Asks the caches for what the calls of a step read of a sequence, first its head and, when that has come, where the next token
 *  goes; NULL is fine. Hints: they change nothing. */
void kv_seq_prefetch(const struct kv_seq *seq);
void kv_seq_prefetch_end(const struct kv_seq *seq);

/** Handles finished moves. Returns how many sequences or promotions became ready. Never waits. */
int kv_poll(struct kv *kv);
/** Enqueues deferred page reuse and demotion work; once per step, after the step was enqueued. */
void kv_step_end(struct kv *kv);

/* Pages that are neither free nor accounted for, reference by reference, by sequences, tree and copies up. Slow: for tests. */
uint32_t kv_pages_lost(const struct kv *kv);

struct kv_stats {
    uint64_t pages_total, pages_free, pages_cached;         /* cached: in the tree, used by nobody */
    uint64_t slots_total, slots_free;
    uint64_t hits, hit_tokens, lookups, lookup_tokens;
    uint64_t snapshots, snapshot_bytes, snapshots_taken, snapshots_evicted, snapshots_restored;
    uint64_t snapshots_inside;      /* positions inside a chunk whose states a step kept */
    uint64_t host_bytes, disk_bytes, store_gets, store_puts, store_errors;
    uint64_t demoted_bytes[4], promoted_bytes[4];           /* by tier: device, host, disk, store */
    uint64_t pages_evicted, parked, resumed;
    uint64_t disk_user_bytes, disk_written_bytes;           /* their quotient is the write amplification */
    uint64_t pins, pinned_pages, pinned_states;             /* prompts that are pinned; what they hold, wherever it is */
    uint64_t pins_yielded;                                  /* pinned pages that a sequence took off the device */
};
void kv_stat(const struct kv *kv, struct kv_stats *out);
/** Drops everything that no sequence uses and no pin holds, from every local tier. */
void kv_flush(struct kv *kv);

/* What a pin holds after the call. */
struct kv_pinned {
    uint32_t tokens;            /* of its prompt that a request like it finds */
    uint32_t pages, states;
    uint32_t pins;              /* in all */
    uint64_t all_pages, all_states;
};

/**
 * Pins what is remembered of a prompt: the deepest place where the same prompt could start (a state and all pages before it; without
 * state groups the pages alone), and likewise for each of its marks, so that a prompt which shares the beginning only finds its place
 * too. Pinning the same prompt again renews: the pin moves to what is remembered now.
 *
 * What is pinned leaves the device only for a sequence that runs or is being opened, after everything else that could go; it then
 * keeps its places in lower tiers like any other entry. It stays pinned until kv_unpin, or until no tier has it any more. Pins that
 * overlap count. The tenant's quota counts pinned pages and does not evict them. Pins live as long as the plane: no restart.
 *
 * tokens, marks: copied. -EINVAL: the prefix cache is off (param "kv.prefix_cache"); -ENOENT: nothing of the prompt is remembered;
 * -ENOSPC: pins would hold more than pin_pct (param "kv.pin_pct"), or there are too many; -ENOMEM. Then nothing has changed.
 * Thread: engine thread, not on the path of a step: it allocates, and walks the tree once per mark.
 */
int kv_pin(struct kv *kv, const uint8_t salt[KV_SALT_BYTES], const int32_t *tokens, uint32_t n, const uint32_t *marks,
           uint32_t n_marks, struct kv_pinned *out, struct arle_err *err);
/** Ends the pin of exactly this prompt; what it held becomes an entry like others. -ENOENT: it is not pinned. */
int kv_unpin(struct kv *kv, const uint8_t salt[KV_SALT_BYTES], const int32_t *tokens, uint32_t n, struct kv_pinned *out,
             struct arle_err *err);
/** Ends all pins. Returns how many there were. */
uint32_t kv_unpin_all(struct kv *kv);

/** The engine reports how fast it prefills (tokens computed in how long); promotion is weighed against it. */
void kv_report_prefill(struct kv *kv, uint32_t n_tokens, int64_t us);

/** Waits until every queued move is done, or the deadline: for tests, drain and shutdown; not while stepping. -ETIMEDOUT. */
int kv_settle(struct kv *kv, int64_t deadline_ms);

const char *kv_miss_text(enum kv_miss miss);        /* static text for usage and logs */

#endif
