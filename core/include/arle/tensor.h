/*
 * Element types, tensor views, and the read-only view of a checkpoint that the host hands to a model plugin.
 */
#ifndef ARLE_TENSOR_H
#define ARLE_TENSOR_H

#include <arle/abi.h>
#include <arle/err.h>

#ifdef __cplusplus
extern "C" {
#endif

enum arle_dtype {
    ARLE_F32 = 1, ARLE_BF16, ARLE_F16,
    ARLE_F8E4M3,        /* 1-4-3, bias 7, no infinity, 0x7F/0xFF NaN, largest 448 */
    ARLE_F8E8M0,        /* 2^(b-127), 0xFF NaN */
    ARLE_I8, ARLE_U8, ARLE_I32, ARLE_I64, ARLE_BOOL,
    ARLE_I4G,           /* 4-bit KV form, see <arle/kv.h>; not a checkpoint dtype */
    ARLE_F16_PAIR_RESERVED, ARLE_I16, ARLE_U16, ARLE_U32, ARLE_U64, ARLE_F64,
};

/** Bytes of one element; 0 for unknown types and for types whose elements are not whole bytes. */
static inline size_t arle_dtype_size(uint32_t dtype)
{
    switch (dtype) {
    case ARLE_F32: case ARLE_I32: case ARLE_U32: return 4;
    case ARLE_BF16: case ARLE_F16: case ARLE_I16: case ARLE_U16: return 2;
    case ARLE_F8E4M3: case ARLE_F8E8M0: case ARLE_I8: case ARLE_U8: case ARLE_BOOL: return 1;
    case ARLE_I64: case ARLE_U64: case ARLE_F64: return 8;
    default: return 0;
    }
}

#define ARLE_MAX_DIMS 6

/* One tensor of a checkpoint: host memory (usually a mapped file), row-major, contiguous; data NULL for random weights. */
struct arle_tensor {
    const char *name;
    uint32_t dtype;
    uint32_t n_dims;
    int64_t dim[ARLE_MAX_DIMS];
    const void *data;
    size_t bytes;
    uint64_t rand_seed;         /* random mode: what arle_weights.want() declared; the backend fills the values */
    double rand_mean, rand_std; /* uniform with this mean and standard deviation, from a counter hash of seed and index */
};

/*
 * The checkpoint that a model is being loaded from. Lives until the model is destroyed; any thread.
 * A model takes every tensor it understands with find(); the loader reports tensors that were never taken nor ignored as
 * unknown, which is an error.
 */
struct arle_weights {
    uint32_t struct_size;
    void *ctx;
    /** The tensor, marked as taken; NULL if the checkpoint has none of that name. */
    const struct arle_tensor *(*find)(const struct arle_weights *w, const char *name);
    /** Marks every tensor whose name starts with `prefix` as known but unused (a vision tower, say). Returns their count. */
    size_t (*ignore)(const struct arle_weights *w, const char *prefix);
    /** i-th tensor in name order without marking it, or NULL past the end: for scans. */
    const struct arle_tensor *(*at)(const struct arle_weights *w, size_t i);
    /** True when there is no file: find() makes any tensor the model asks for through want() and weights are random. */
    uint32_t random;
    uint32_t reserved;
    /** Declares name, shape and dtype before find() in random mode; no effect otherwise. scale: standard deviation. */
    int (*want)(const struct arle_weights *w, const char *name, uint32_t dtype, uint32_t n_dims, const int64_t *dim,
                double mean, double scale, struct arle_err *err);
    /** Drops the resident pages of a mapped tensor after it was packed. Optional. */
    void (*done)(const struct arle_weights *w, const struct arle_tensor *t);
};

#ifdef __cplusplus
}
#endif
#endif
