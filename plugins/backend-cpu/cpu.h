/*
 * Inside backend-cpu. An op is a driver (ops_*.c: checks arguments, cuts the work, counts what it did) over a table of kernels
 * (struct kernels) of which there is one per instruction set. k_ref.c is the readable one: plain loops that follow the formulas
 * of <arle/ops.h>; the fast ones come from k_fast.h, compiled once per instruction set.
 *
 * What makes results independent of batch, chunking and threads: work is cut by rows, heads, output columns and fixed absolute
 * key ranges only, never inside a sum; and every tiling of a matrix product adds the terms of one element in the same order.
 */
#ifndef CPU_H
#define CPU_H

#include <arle/backend.h>
#include <arle/kv.h>
#include <arle/ops.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "num.h"

/* Before a loop of few and constant rounds: arrays indexed by it then live in registers. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#define CPU_BLOCK 16            /* columns of a packed weight block */
#define CPU_MAX_ROWS 32         /* upper bound of kernels.max_rows and bf16_rows */
#define CPU_TILE_COLS 128       /* upper bound of the columns of one tile */
#define CPU_KEY_BLOCK 32        /* keys of one attention block; blocks start at absolute multiples */
#define CPU_KEY_SPLIT 512       /* keys whose softmax is summed before merging; splits start at absolute multiples */
#define CPU_MAX_HEAD 512        /* largest head_dim of attention */
#define CPU_MAX_QVEC 64         /* query vectors of one attention work item */
#define CPU_GDN_COLS 64         /* value columns of one slice of a delta-net state */
#define CPU_PEAK_SUMS 2048      /* upper bound of the sums of kernels.peak */

/* ---- thread pool (pool.c) ------------------------------------------------------------------------------------------ */

struct pool;
typedef void (*part_fn)(void *arg, unsigned part, unsigned n_parts);

/** n_threads counts the caller. With pin, worker i and the first caller are bound to one CPU each. */
int pool_create(unsigned n_threads, bool pin, struct pool **out, struct arle_err *err);
void pool_destroy(struct pool *p);
unsigned pool_threads(const struct pool *p);
/** Runs fn(arg, 0..n_parts-1, n_parts), n_parts = min(want, threads), and returns when all parts are done. When another thread is
 *  using the pool, all parts run on the caller. Any thread; fn must not call pool_run. */
void pool_run(struct pool *p, unsigned want, part_fn fn, void *arg);

/** Bounds of one of n_parts nearly equal ranges of [0, n). */
static inline int64_t part_begin(int64_t n, unsigned part, unsigned n_parts)
{
    return n * part / n_parts;
}

/* ---- kernels ------------------------------------------------------------------------------------------------------- */

enum x_kind { X_F32, X_BF16 };          /* how activations are packed for a matrix product */

/* One block of keys against query vectors that all see all of it. Carries the running softmax of every query vector. */
struct attn_block {
    const float *q;             /* [n_q][head_dim], already times the scale */
    unsigned n_q, head_dim, n_keys;
    uint32_t dtype;             /* of the rows below: ARLE_F32 or ARLE_BF16 */
    const void *k[CPU_KEY_BLOCK], *v[CPU_KEY_BLOCK];
    float *m, *l, *o;           /* [n_q], [n_q], [n_q][head_dim]: maximum, sum, weighted values */
};

/* Some value columns of one head of one sequence, over its new tokens. Row t of q, k, v, o is t * ld away. */
struct gdn_slice {
    unsigned dk, cols, n_tokens;        /* cols <= CPU_GDN_COLS */
    float *s; int64_t ld_s;             /* [dk][cols] */
    const float *q, *k, *v; int64_t ld_qkv;
    const float *gates; int64_t ld_gates;       /* per token: e^g, beta, k . q */
    float *o; int64_t ld_o;
};

struct rope_args {
    unsigned rot_dim, rot_off, interleaved;
    const float *cs;            /* [rot_dim / 2] cos, then [rot_dim / 2] sin, both times rope_scale */
};

/* Rows of a compressed entry: per channel c, softmax over the rows of g[r][c] + ape[r][c], applied to kv[r][c]. */
struct pool_rows {
    unsigned n_rows;
    int64_t n;                                  /* channels */
    const float *const *kv, *const *g, *const *ape;     /* [n_rows] rows; a NULL row of ape adds nothing */
};

struct kernels {
    const char *name;
    unsigned max_rows;                          /* rows of a full tile of a matrix product */
    unsigned tile_blocks[CPU_MAX_ROWS + 1];     /* column blocks to hand over at once, by rows */
    bool bf16_dot;                              /* gemm_bf16 exists: bf16 activations stay bf16 */
    unsigned bf16_rows, bf16_blocks;            /* 0, or gemm_bf16 has tiles of its own: rows, blocks, x packed as amx.h says */

    /* `rounds` rounds of the set's fastest multiply-add on registers alone, peak_flop operations each: chains of sums that begin at
     * start[0..CPU_PEAK_SUMS) and grow by peak_step in a round. start[i] is i, which the compiler must not know: it would make one
     * chain of all. Returns the growth, or NaN when two sums differ. Exact while sums stay below 2^24. */
    float (*peak)(int64_t rounds, const float *start);
    unsigned peak_flop, peak_step;

    /* Matrix tiles: out[r][c] = sum_k x[r][k] w[c][k] for `rows` packed rows and `blocks` column blocks. k2 = ceil(K / 2).
     * x packed as [k2][rows][2]; w as blocks of [k2][16][2] (bf16) or [k2][2][16] (f32), block_bytes apart. out is
     * [rows][blocks * 16]. One accumulation chain per element, in k order, whatever the tile. */
    void (*gemm_f32_wbf16)(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out);
    void (*gemm_f32_wf32)(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out);
    void (*gemm_bf16_wbf16)(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out);
    /* For many rows, or NULL: to_panel makes f32 of k2 pairs of a bf16 block, [k2][16][2] -> [k2][2][16]. gemm_panel is gemm_f32_wf32
     * with a pointer per block; with `more` the sums go on from what out holds, so that k may be cut anywhere between pairs. The
     * next call's x is `ahead` bytes further. */
    void (*to_panel)(const void *w, int64_t k2, float *out);
    void (*gemm_panel)(const float *x, unsigned rows, int64_t k2, const float *const *w, unsigned blocks, bool more,
                       size_t ahead, float *out);
    /* y[c] = round(acc[c] (+ y[c])), c < n, of act type or f32. */
    void (*store_row)(const float *acc, int64_t n, void *y, uint32_t dtype, bool accumulate);
    /* out[c] = round(silu(g) * u), both rounded first when round_in; limit as in ops.h; times weight unless it is 1. */
    void (*silu_mul)(const float *g, const float *u, int64_t n, float limit, float weight, void *out, uint32_t dtype,
                     uint32_t round_dtype);
    void (*to_f32)(const void *x, uint32_t dtype, int64_t n, float *out);
    void (*rmsnorm)(const void *x, int64_t n, float eps, float w_offset, const float *w, void *out, uint32_t dtype);
    /* y += w * x, f32 */
    void (*axpy)(int64_t n, float w, const float *x, float *y);
    float (*dot)(int64_t n, const float *a, const float *b);
    void (*sincos)(int64_t n, float pos, const float *inv_freq, float scale, float *cs);
    void (*rope)(const struct rope_args *a, float *x);
    void (*attn)(const struct attn_block *b);
    bool attn_f32;              /* attn is faster on f32 keys and values, by enough to widen bf16 for several query vectors */
    /* o *= 1 / l, times sigmoid(gate) when gate is not NULL (act type), rounded to out */
    void (*attn_finish)(int64_t n, const float *o, float l, const void *gate, void *out, uint32_t dtype);
    void (*dequant)(const void *codes, const void *scales, uint32_t kv_dtype, unsigned head_dim, float *out);
    /* y[c] = round(silu(sum_i w[c][i] u[i][c])), u[i] rows of act type, y f32 */
    void (*conv)(const void *const u[4], const float *w, int64_t n, uint32_t dtype, float *y);
    /* x *= scale / sqrt(sum x^2 + eps) */
    void (*l2norm)(int64_t n, float eps, float scale, float *x);
    void (*gdn)(const struct gdn_slice *s);
    /* out = round(o * rho * w * silu(z)) */
    void (*gated_norm)(int64_t n, const float *o, const void *z, const float *w, float eps, void *out, uint32_t dtype);
    float (*max)(int64_t n, const float *x);
    /* sum of exp((x - m) * inv_t), each block of 4096 summed on its own and added in order */
    double (*sum_exp)(int64_t n, const float *x, float m, float inv_t);
    void (*exps)(int64_t n, const float *x, float m, float inv_t, float *out);      /* out[i] = exp((x[i] - m) * inv_t) */
    /* The halves of attn, for callers that see all scores before they weigh; m, l, v (scores) and k, m, l (weigh) are not used.
     * s and p are [n_q][CPU_KEY_BLOCK]: s[i][j] = q_i . k_j (rest of the row undefined), o_i += sum_j p[i][j] v_j in key order. */
    void (*scores)(const struct attn_block *b, float *s);
    void (*weigh)(const struct attn_block *b, const float *p);
    void (*pool)(const struct pool_rows *r, float *out);
    /* out[j] = sum_h max(s[h][j], 0) w[h], j < CPU_KEY_BLOCK, s as above; `round` rounds every factor, product and the sum to bf16 */
    void (*index_sum)(unsigned n_heads, const float *s, const float *w, bool round, float *out);
    /* Packed E2M1 of n_groups groups of 16 code rows, [16 k2][16] bytes and [16] E8M0 per group, as bf16 [k2][16][2]. */
    void (*widen)(const uint8_t *codes, const uint8_t *scales, int64_t n_groups, uint16_t *out);
};

extern const struct kernels kernels_ref;
/* NULL when this build or this machine lacks the instructions. */
const struct kernels *kernels_avx2(void);
const struct kernels *kernels_avx512(void);
const struct kernels *kernels_avx512bf16(void);
/* avx512bf16 with bf16 products in AMX tiles. NULL too when the instructions fail the check of amx.h, with *why set. */
const struct kernels *kernels_amx(const char **why);

/* ---- device -------------------------------------------------------------------------------------------------------- */

#define CPU_COUNTERS(X) \
    X(linear_ref) X(linear_avx2) X(linear_avx512) X(linear_avx512bf16) X(linear_amx) X(linear_gemv) X(linear_gemm) X(linear_f32_weight) X(linear_panel) X(linear_helped) \
    X(gate_up) X(embed) X(rmsnorm) X(silu_mul) X(attn_prepare) X(attn_tile) X(attn_split) X(attn_quant) X(gdn_decode) X(gdn_prefill) \
    X(moe_route) X(moe_experts) X(seq_shift) X(sample_argmax) X(sample_draw) X(sample_edit) X(parallel_ops) X(copied_bytes) \
    X(hc_pre) X(compress) X(index_all) X(index_scored) X(linear_fp4) X(attn_latent)
#define CPU_COUNTER_ENUM_(name) N_##name,
enum counter_id { CPU_COUNTERS(CPU_COUNTER_ENUM_) N_COUNTERS };

#define CPU_THREAD_SCRATCH ((size_t)26 << 20)   /* per thread; committed by the kernel only as it is touched */
#define CPU_PACK_BYTES ((size_t)16 << 20)       /* packed activations of one matrix product; partial results of attention */
#define CPU_MAX_K ((int64_t)(CPU_PACK_BYTES / 4 / CPU_MAX_ROWS))    /* columns of a weight: one tile of rows must fit */
#define CPU_MAX_VOCAB 1000000u

struct cpu_ctx {
    const struct arle_host *host;
    const struct kernels *k;
    struct pool *pool;
    unsigned n_threads;
    uint32_t compute;           /* enum arle_dtype, 0: measured preference */
};

/* What is left of one part's share of a job that may be shared out again: first unit in the low half, end in the high one. Counts only,
 * so relaxed. */
struct share {
    _Alignas(64) _Atomic uint64_t span;
};

struct arle_device {
    struct cpu_ctx *cx;
    const struct kernels *k;
    struct pool *pool;
    unsigned n_threads;
    struct share *shares;       /* n_threads */
    char *pack;                 /* CPU_PACK_BYTES */
    char *scratch;              /* n_threads * CPU_THREAD_SCRATCH */
    _Atomic uint64_t counter[N_COUNTERS];
};

static inline void count(struct arle_device *dev, enum counter_id id, uint64_t n)
{
    atomic_fetch_add_explicit(&dev->counter[id], n, memory_order_relaxed);
}

static inline void *thread_scratch(struct arle_device *dev, unsigned part)
{
    return dev->scratch + part * CPU_THREAD_SCRATCH;
}

/* How many parts pay for waking others; cost is in nanoseconds of one thread, roughly. */
static inline unsigned parts_for(const struct arle_device *dev, double cost_ns)
{
    return cost_ns < 6000 ? 1 : cost_ns / 3000 < dev->n_threads ? (unsigned)(cost_ns / 3000) : dev->n_threads;
}

/* Runs fn in so many parts. */
static inline void run_parts(struct arle_device *dev, double cost_ns, part_fn fn, void *arg)
{
    unsigned want = parts_for(dev, cost_ns);
    if (want > 1 && dev->n_threads > 1)
        count(dev, N_parallel_ops, 1);
    pool_run(dev->pool, want, fn, arg);
}

/** Zeroed memory on huge pages where the system has them; for large blocks. NULL when there is none. */
void *pages_alloc(size_t bytes);
void pages_free(void *p, size_t bytes);

extern const struct arle_backend_api cpu_api;           /* device.c */
extern const struct arle_ops cpu_ops;                   /* entry.c */
uint32_t cpu_n_devices(void *ctx);
int cpu_device_info(void *ctx, uint32_t index, struct arle_device_info *out, struct arle_err *err);
int cpu_ceiling(struct arle_device *dev, double *read_bytes_s, double *bf16_flop_s, struct arle_err *err);

#define CPU_FP4 ARLE_U8         /* packed E2M1 pairs with E8M0 scales per 32 columns, experts only */

/* ---- weights (weight.c) -------------------------------------------------------------------------------------------- */

struct arle_weight {
    uint32_t role, dtype;       /* of the packing: ARLE_BF16, ARLE_F32 or CPU_FP4 */
    uint32_t n_experts, act_quant;
    int64_t n, k, k2;           /* rows per expert (gate and up together), columns, ceil(k / 2) */
    int64_t n_blocks;           /* per expert */
    size_t block_bytes, expert_bytes, bytes;
    char *data;
};

int cpu_weight_create(struct arle_device *dev, const struct arle_weight_desc *d, struct arle_weight **out, struct arle_err *err);
void cpu_weight_destroy(struct arle_device *dev, struct arle_weight *w);
const float *cpu_weight_data(const struct arle_weight *w);
uint64_t cpu_weight_bytes(const struct arle_weight *w);
uint64_t cpu_weight_predict(struct arle_device *dev, const struct arle_weight_desc *d);
/** Row `row` of a packed weight of role EMBED or LINEAR as act values. */
void weight_row(const struct arle_weight *w, int64_t row, void *out, uint32_t dtype);

/* ---- matrix products (mm.c) -------------------------------------------------------------------------------- */

enum mm_form { MM_STORE, MM_GATE };     /* gate: silu(gate) * up of a GATE_UP weight */

struct mm {
    enum mm_form form;
    uint32_t dtype, out_dtype;
    bool accumulate;
    uint32_t n_rows;
    const void *x; int64_t ld_x;
    const int32_t *x_rows, *y_rows;     /* which rows to read and write; NULL: 0..n_rows-1 */
    const struct arle_weight *w;
    uint32_t expert;
    float limit;
    const float *row_weight;            /* MM_GATE: factor of each row of y, or NULL */
    void *y; int64_t ld_y;
};
void mm_run(struct arle_device *dev, const struct mm *m);

/* The ops this backend has: a new one gets its name here and a function cpu_<name>. */
#define CPU_OPS(X) \
    X(embed) X(rmsnorm) X(linear) X(norm_linear) X(silu_mul) X(gate_up) X(attn_prepare) X(attn_paged) \
    X(gdn) X(moe_route) X(moe_experts) X(seq_shift) X(sample) \
    X(hc_expand) X(hc_pre) X(hc_post) X(hc_head) X(head_rope) X(window_store) X(compress) X(index_select) X(attn_latent) \
    X(norm_moe) X(gdn_keep) X(seq_shift_keep)
#define CPU_OP_(name) int cpu_##name(struct arle_device *dev, struct arle_stream *st, const struct arle_##name##_args *a);
CPU_OPS(CPU_OP_)

#endif
