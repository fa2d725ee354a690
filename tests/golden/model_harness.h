/*
 * Runs a model plugin on a backend without the engine: opens both through the registry, allocates caches for a few
 * sequences with interleaved pages, and runs steps over any cut of their tokens. For golden and invariance tests.
 */
#ifndef TESTS_GOLDEN_MODEL_HARNESS_H
#define TESTS_GOLDEN_MODEL_HARNESS_H

#include <arle/model.h>
#include <json-c/json.h>
#include <stdbool.h>

struct harness;

struct harness_options {
    const char *model_dir;          /* config.json and, unless random, the checkpoint */
    const char *config_json;        /* instead of model_dir/config.json */
    bool random;
    uint32_t compute, kv_dtype, page_tokens, max_tokens, n_seqs, seq_tokens;
    bool drafts, parity;
    bool graphs;                    /* steps of one token a sequence are captured once per number of sequences and replayed */
    const char *sets[4];            /* configuration overrides, e.g. "backend-cpu.threads=1" */
};

int harness_open(struct harness **out, const struct harness_options *o, struct arle_err *err);
void harness_close(struct harness *h);
const struct arle_model_desc *harness_desc(const struct harness *h);
const struct arle_model_api *harness_api(const struct harness *h);
/* A counter of the backend, 0 when it has none of that name. */
uint64_t harness_counter(const struct harness *h, const char *name);
/* Bytes of the weights that the backend really made during the load, to hold against desc.weight_bytes. */
uint64_t harness_weight_bytes_created(const struct harness *h);

/* Forgets sequence s: its records become zero. */
void harness_reset(struct harness *h, uint32_t s);

struct harness_piece { uint32_t seq; uint32_t pos; const int32_t *tokens; uint32_t n; };

/* One step over pieces, decode rows (n == 1) first as the contract asks: the caller orders them. Logits of every token in
 * order, [sum n, vocab], valid until the next step; drafts likewise when they were asked for. */
int harness_step(struct harness *h, const struct harness_piece *p, uint32_t n, const float **out_logits, const int32_t **out_drafts,
                 struct arle_err *err);

/* Copies of all state records and the used pages of a sequence, for restoring it elsewhere. */
struct harness_snapshot;
struct harness_snapshot *harness_save(struct harness *h, uint32_t s, uint32_t n_tokens);
void harness_restore(struct harness *h, uint32_t s, const struct harness_snapshot *snap);
void harness_snapshot_free(struct harness_snapshot *snap);

/* ---- golden files ---- */
struct golden;
struct golden_case {
    const char *name, *text;
    const int32_t *ids, *argmax, *greedy, *drafts;      /* drafts NULL when the file has none */
    const int32_t *top_ids;                             /* last position, best first */
    const double *margin, *top_logits;
    uint32_t n_top, n_ids, n_greedy, n_drafts;
    double mean_nll;
    const float *logits; uint32_t n_logit_rows, vocab;  /* last rows, f32; NULL for cases that keep only top_logits */
};
int golden_open(struct golden **out, const char *dir, struct arle_err *err);
uint32_t golden_count(const struct golden *g);
const struct golden_case *golden_at(const struct golden *g, uint32_t i);
void golden_close(struct golden *g);

/* What a comparison saw, so that tests can print figures. */
struct golden_result {
    double worst_logit;             /* largest |ours - reference| over kept rows and last top ids */
    double nll_diff;                /* |mean NLL - reference| */
    uint32_t argmax_wrong;          /* positions where the reference leads by more than 0.02 and we differ (kept rows) */
    uint32_t greedy_equal, greedy_must;     /* equal steps, and steps before the first margin under the bound */
    uint32_t drafts_wrong, drafts_seen;
};
/* Prefill in chunks of `chunk`, then greedy decode token by token. */
int golden_run(struct harness *h, const struct golden_case *c, uint32_t chunk, double margin_bound, bool drafts,
               struct golden_result *out, struct arle_err *err);

#endif
