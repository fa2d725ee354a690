/*
 * Op tests that any backend can be put through. A case makes seeded inputs, runs ops of the backend on them, and computes what
 * they should give with plain double-precision loops of its own; nothing here knows which backend it drives.
 *
 *   struct ops_backend b;
 *   ops_open(&b, "backend-cuda.so", (const char *[]) { "deterministic", "yes", NULL }, &err);
 *   for (i < ops_n_cases) { ops_run(&b, &ops_cases[i], ARLE_BF16, &res); ... res.part[j].got, .want, .tol ...; ops_result_free(&res); }
 *   ops_close(&b);
 */
#ifndef ARLE_TESTS_OPS_CASES_H
#define ARLE_TESTS_OPS_CASES_H

#include <arle/backend.h>
#include <arle/kv.h>
#include <arle/ops.h>
#include <stdbool.h>

#define OPS_MAX_BUFS 256
#define OPS_MAX_PARTS 24

struct ops_conf { const char *const *pairs; };

struct ops_backend {
    void *dl;
    const struct arle_plugin *plugin;
    const struct arle_backend_api *api;
    void *ctx;
    struct arle_device *dev;
    struct arle_stream *st;
    struct ops_conf conf;
    void *buf[OPS_MAX_BUFS];                    /* device memory of the running case */
    unsigned n_bufs;
    struct arle_weight *weight[OPS_MAX_BUFS];
    unsigned n_weights;
    uint32_t act_quant;                         /* for the weights that ops_weight makes from here on */
    int failed;                                 /* first error of the running case */
    char why[256];
};

/* One output of a case. Error measure: max |got - want| / max(|want|, 1e-3) over the part (max-norm). */
struct ops_part {
    const char *what;
    int64_t n;
    float *got;
    double *want;
    double tol_f32, tol_bf16;       /* against the exact result */
    double tol_other;               /* between two backends, where that is more; 0: the same */
};

struct ops_result {
    unsigned n_parts;
    struct ops_part part[OPS_MAX_PARTS];
};

struct ops_case {
    const char *name;
    void (*run)(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out);
    int p[10];                                  /* sizes and switches; each runner says which */
};

extern const struct ops_case ops_cases[];
extern const unsigned ops_n_cases;

/** Opens plugin file `so` with configuration pairs {"key", "value", ..., NULL}; NULL conf: defaults. */
int ops_open(struct ops_backend *b, const char *so, const char *const *conf, struct arle_err *err);
void ops_close(struct ops_backend *b);
/** 0; -ENOTSUP if the backend lacks an op of the case; or the error of a call, with the reason in b->why. */
int ops_run(struct ops_backend *b, const struct ops_case *c, uint32_t dtype, struct ops_result *out);
void ops_result_free(struct ops_result *r);
double ops_error(const struct ops_part *p);
/** Value of a counter of the backend, 0 when it has none of that name. */
uint64_t ops_counter(struct ops_backend *b, const char *name);

/* Invariants, bit for bit. Each returns the number of values that differ (0 is right), or -1 with b->why. */
int64_t ops_rows_alone(struct ops_backend *b, uint32_t dtype);          /* linear, gate_up, norms: a row alone and among others */
int64_t ops_gdn_chunks(struct ops_backend *b, uint32_t dtype);          /* a sequence whole and in pieces: outputs and states */
int64_t ops_attn_chunks(struct ops_backend *b, uint32_t dtype, uint32_t kv_dtype);
int64_t ops_moe_alone(struct ops_backend *b, uint32_t dtype);
int64_t ops_padding(struct ops_backend *b, uint32_t dtype);             /* NaN in unused pages, slots and padding rows */

/* ---- building blocks, for tests of single ops ---------------------------------------------------------------------- */

float ops_random(uint64_t *state);              /* uniform in [-1, 1) */
void *ops_alloc(struct ops_backend *b, size_t bytes);
void *ops_put(struct ops_backend *b, const void *data, size_t bytes);
void ops_get(struct ops_backend *b, void *out, const void *dev, size_t bytes);
/** Uploads n floats as act values; with rounded not NULL it receives what they became. */
void *ops_put_act(struct ops_backend *b, uint32_t dtype, const float *x, int64_t n, float *rounded);
void ops_get_act(struct ops_backend *b, uint32_t dtype, const void *dev, int64_t n, float *out);
/** Packs a matrix [n, k] of the given checkpoint dtype; x is replaced by the values that the dtype holds. */
struct arle_weight *ops_weight(struct ops_backend *b, uint32_t role, uint32_t w_dtype, float *x, int64_t n, int64_t k, uint32_t n_experts);
void ops_release(struct ops_backend *b);        /* frees buffers and weights of the running case */
#define OPS_CALL(b, op, args) \
    ops_check((b), ARLE_HAS((b)->api->ops, struct arle_ops, op) ? (b)->api->ops->op((b)->dev, (b)->st, (args)) : -ENOTSUP, #op)
void ops_check(struct ops_backend *b, int r, const char *what);

#endif
