/*
 * `arle bench`: what its parts share. Every measurement is one JSON line (or one line for people) that says where it was
 * made: commit, device, model, shape, warm-ups, runs, median, 99th percentile.
 */
#ifndef CORE_ARLE_BENCH_H
#define CORE_ARLE_BENCH_H

#include "arle/cmd.h"
#include "plugin/registry.h"
#include "sched/engine.h"
#include <json-c/json.h>

#define BENCH_MAX_LIST 16

struct bench {
    const struct args *args;
    struct config *cfg;
    struct registry *reg;
    const struct plugin_info *backend, *model;
    struct arle_device_info info;
    char *config_json; size_t config_len;
    char dir[4096];             /* model folder, "" for a shape */
    char label[128];            /* shape or folder name */
    bool random, json;
    double read_bytes_s, bf16_flop_s;       /* ceilings, 0 until measured */
    long long warmups, runs, chunk;
    uint32_t batch[BENCH_MAX_LIST], n_batch, context[BENCH_MAX_LIST], n_context;
};

/* Needs a model: opens plugins, reads the configuration of --model or --shape. 0 or exit status, with a line on stderr. */
int bench_need_model(struct bench *b);
/* Only the configuration of --model or --shape; and backend, model and device from a registry that somebody else opened. */
int bench_find_model(struct bench *b);
int bench_use_plugins(struct bench *b, struct registry *reg, struct arle_err *err);
/** An engine that the caller turns by hand, without prefix cache unless asked for. */
int bench_engine(struct bench *b, uint32_t max_seqs, uint32_t context, bool prefix, struct engine **out);
/** Measures the device's ceilings and keeps the best so far: asked before and after a run, since other work disturbs both. */
int bench_ceilings(struct bench *b);

/* A line: begin, add, print. */
json_object *bench_line(const struct bench *b, const char *what);
void bench_add(json_object *o, const char *key, double value);
/** Sorts times (microseconds) and adds runs, median_us and p99_us. Returns the median. */
double bench_times(json_object *o, double *us, size_t n);
void bench_print(const struct bench *b, json_object *o);

/** A prompt of valid random ids. */
void bench_prompt(int32_t *out, uint32_t n, uint64_t seed, uint32_t n_valid);
struct request *bench_submit(struct engine *e, const int32_t *tokens, uint32_t n, uint32_t max_new, const uint32_t *marks,
                             uint32_t n_marks);

int bench_step(struct bench *b);
int bench_prefill(struct bench *b);
int bench_agent(struct bench *b);
int bench_tokenize(struct bench *b);
int bench_ceiling(struct bench *b);
int bench_serve(struct bench *b);

#endif
