/*
 * Cache groups: what a model tells the KV plane, so that it can page, share, snapshot and move any architecture; the
 * quantised forms of paged entries; and the kv-store plugin kind (a remote tier).
 */
#ifndef ARLE_KV_H
#define ARLE_KV_H

#include <arle/plugin.h>
#include <arle/tensor.h>

#ifdef __cplusplus
extern "C" {
#endif

enum arle_cache_kind {
    ARLE_CACHE_PAGED = 1,   /* one entry per `tokens_per_entry` tokens, addressed through the block table */
    ARLE_CACHE_STATE = 2,   /* one fixed-size record per sequence, valid only at the position it was computed for */
    ARLE_CACHE_WINDOW = 3,  /* record holding the last w tokens: fixed size, treated as state by the KV plane */
};

/*
 * One group. For a paged group page_bytes is what one page of page_tokens positions takes, all layers together; a page id
 * means the same positions in every paged group. For state and window groups record_bytes is the size of one sequence's
 * record. A record starts as zero bytes; all records of a sequence share one slot number and are snapshotted together.
 */
struct arle_cache_group {
    const char *name;           /* "kv", "delta", ... ; [a-z0-9_]+ */
    uint32_t kind;
    uint32_t tokens_per_entry;  /* paged: 1, 4, 128 ...; page_tokens must be a multiple */
    uint32_t dtype;             /* of paged entries, for identity and statistics */
    uint32_t window;            /* ARLE_CACHE_WINDOW: w */
    uint64_t page_bytes;        /* paged */
    uint64_t record_bytes;      /* state, window */
};

#define ARLE_MAX_CACHE_GROUPS 16

/* Memory of the groups, in the order of the model's description; fixed while the model lives. */
struct arle_cache_binding {
    uint32_t struct_size, n_groups;
    struct { void *base; uint64_t stride; } group[ARLE_MAX_CACHE_GROUPS];      /* page or record i at base + i * stride */
};

/*
 * Quantised paged entries [n_vec, head_dim] (n_vec = 2 * n_kv vectors): codes of all vectors, then one f32 scale per vector.
 *   ARLE_I8      code = rne(x / s), s = amax / 127                              head_dim + 4 bytes per vector
 *   ARLE_F8E4M3  code = e4m3(x / s), s = amax / 448                             head_dim + 4 bytes
 *   ARLE_I4G     the vector is multiplied by a fixed orthonormal Hadamard rotation of its 128-wide halves, then per group of 32
 *                code = rne(x / s) + 8 clamped to 1..15, s = amax / 7, s stored as f16     head_dim / 2 + head_dim / 16 bytes
 *                Sylvester order, divided by sqrt(width); heads that 128 does not divide use the largest power of two that does
 *                (head_dim is a multiple of 32). Element 2i is the low nibble of byte i. The scales of a vector are adjacent
 *                ([n_vec][head_dim / 32] f16 after all codes), and a group of zeros has scale 0.
 */
static inline size_t arle_kv_vector_bytes(uint32_t dtype, uint32_t head_dim)
{
    switch (dtype) {
    case ARLE_F32: return (size_t)head_dim * 4;
    case ARLE_BF16: return (size_t)head_dim * 2;
    case ARLE_I8: case ARLE_F8E4M3: return (size_t)head_dim + 4;
    case ARLE_I4G: return (size_t)head_dim / 2 + head_dim / 16;
    default: return 0;
    }
}

/*
 * kv-store plugins: a remote tier of opaque blocks named by 32-byte keys. Calls come from one I/O thread of the host and may
 * block up to the deadline; a late, wrong or missing server is -ETIMEDOUT, -EBADMSG or -EIO and never an exit.
 */
struct arle_kv_item {
    uint8_t key[32];
    void *data;                 /* get: buffer of cap bytes; put: bytes to store */
    uint64_t len, cap;          /* get: len is set to the stored length, 0 when absent */
};

struct arle_kv_store_api {
    uint32_t struct_size;
    int (*get)(void *ctx, struct arle_kv_item *items, uint32_t n, int64_t deadline_ms, struct arle_err *err);
    int (*put)(void *ctx, const struct arle_kv_item *items, uint32_t n, int64_t deadline_ms, struct arle_err *err);
    /** present[i] = 1 if the store has the key; one round trip. */
    int (*exists)(void *ctx, const struct arle_kv_item *items, uint32_t n, uint8_t *present, int64_t deadline_ms,
                  struct arle_err *err);
    int (*remove)(void *ctx, const struct arle_kv_item *items, uint32_t n, int64_t deadline_ms, struct arle_err *err);
};

#ifdef __cplusplus
}
#endif
#endif
