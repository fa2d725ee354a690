/*
 * The engine: one thread per served model that owns its sequences. Requests enter by a bounded queue, tokens leave by one
 * single-producer single-consumer ring per request. Callers (HTTP, CLI, bench) stay text; the engine stays tokens.
 */
#ifndef CORE_SCHED_ENGINE_H
#define CORE_SCHED_ENGINE_H

#include <arle/model.h>
#include <stdbool.h>

struct engine;
struct request;

struct sampling {
    uint32_t n_top;                 /* alternatives per token, 0..ARLE_MAX_TOP; logprobs wanted when want_logprobs */
    bool want_logprobs;
    bool has_seed; uint64_t seed;
    float temperature, top_p, min_p;
    int32_t top_k;
    float repetition, presence, frequency;
    uint32_t n_bias; const struct arle_bias *bias;
};

/* Filled by the caller; engine_submit copies what it keeps (arrays included). */
struct request_args {
    const int32_t *tokens; uint32_t n_tokens;
    const uint32_t *marks; uint32_t n_marks;        /* prompt positions worth a snapshot */
    uint32_t max_new;               /* tokens to generate at most; 0 = prompt only (echo) */
    uint32_t n;                     /* independent answers, >= 1 */
    struct sampling sampling;
    const int32_t *stop_ids; uint32_t n_stop_ids;   /* end tokens; reported, not hidden */
    bool ignore_eos;                /* only stop_ids end an answer, not the end tokens of the model (engine_defaults) */
    bool prompt_logprobs;           /* an event per prompt token (echo with logprobs) */
    bool drafts;                    /* report the drafter's proposals (needs a model with a drafter) */
    int32_t priority;               /* smaller runs first */
    const char *tenant, *cache_salt;
    int64_t deadline_ms;            /* from submit; 0 = the configured one */
    /* Called on the engine thread after events were pushed; must not block. */
    void (*notify)(void *arg);
    void *notify_arg;
};

enum token_event_kind { EV_PROMPT = 1, EV_TOKEN, EV_FINISH, EV_DRAFT };
enum finish_reason { FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_CANCELLED, FINISH_DEADLINE, FINISH_ERROR };

struct token_event {
    uint8_t kind;                   /* enum token_event_kind */
    uint8_t finish;                 /* with EV_FINISH */
    uint16_t n_top;
    uint32_t index;                 /* which of the n answers */
    int32_t id;                     /* EV_PROMPT/EV_TOKEN: token; EV_DRAFT: drafted id for position `pos` */
    uint32_t pos;
    float logprob;                  /* NaN when not asked or not defined (first prompt token) */
    float top_logit;                /* largest raw logit of the row */
    int32_t top_ids[ARLE_MAX_TOP];
    float top_logprobs[ARLE_MAX_TOP];
    int32_t error;                  /* EV_FINISH with FINISH_ERROR: negative errno */
};

struct request_usage {
    uint32_t prompt_tokens, completion_tokens, cached_tokens;
    uint32_t from_device, from_host, from_disk, from_store;
    const char *miss;               /* why not more was cached; static text */
    int64_t queue_us, first_token_us, total_us;
};

/**
 * Queues a request. -EAGAIN: the queue is full (err says how many wait; *retry_after_s is a guess); -E2BIG: prompt and
 * max_new exceed the context (param "prompt" or "max_tokens"); -EINVAL: names the parameter; -ESHUTDOWN: draining;
 * -EIO: the device is dead. Any thread.
 */
int engine_submit(struct engine *e, const struct request_args *args, struct request **out, int *retry_after_s,
                  struct arle_err *err);
uint64_t request_id(const struct request *rq);

/** Next event, or 0 when none is ready. One consumer thread per request. After the last EV_FINISH of all answers: -EPIPE. */
int request_next(struct request *rq, struct token_event *out);
/** Waits until an event is ready, all answers ended, or the timeout. For the CLI; HTTP uses notify. */
int request_wait(struct request *rq, int64_t timeout_ms);
/** Stops one answer (index) as finished by the text plane: stop string seen. FINISH_STOP is not reported again. Any thread. */
void request_stop(struct request *rq, uint32_t index);
/** Cancels the whole request. Any thread; idempotent. */
void request_cancel(struct request *rq);
/** True and final figures once every answer ended. */
bool request_usage(const struct request *rq, struct request_usage *out);
/**
 * The consumer is done with it; cancels it if it still runs. The engine frees it when both sides let go. After the return no
 * notify runs any more; not to be called from inside notify. Before engine_close() all consumers must have let go or ended.
 */
void request_unref(struct request *rq);

struct engine_config {
    const char *name;                       /* served name */
    const char *model_dir;
    uint32_t max_seqs, max_tokens, page_tokens, max_queue, context;
    uint64_t kv_bytes;                      /* device memory for pages and slots, 0 = a share of what is free */
    uint64_t kv_snapshot_bytes, kv_host_bytes, kv_disk_bytes;
    uint32_t kv_snapshot_cadence;
    uint32_t kv_pin_pct;                    /* share of pages and of snapshot records that pins may hold; 0 = 50 */
    uint32_t kv_tenant_quota_pct, kv_host_state_pct, kv_store_deadline_ms;      /* as in struct kv_config; 0 = its default */
    uint64_t kv_store_min_bytes_s;
    bool kv_strict, kv_disk_no_sync;
    const char *kv_disk_dir, *kv_dtype, *compute;
    const char *secret_file;
    bool prefix_cache, random_weights, drafts, parity;
    const struct arle_kv_store_api *store; void *store_ctx;
    int64_t deadline_ms;
    int64_t queue_deadline_ms;              /* longest wait for admission; 0 = none */
    bool step_graphs, run_ahead;
    const char *config_json; size_t config_len;     /* NULL: model_dir/config.json */
    void (*progress)(void *arg, uint64_t done, uint64_t total);
    void *progress_arg;
    int64_t watchdog_ms;                    /* a step longer than this is logged and counted; 0 = 10 s */
    int64_t aging_ms;                       /* waiting this long is worth one priority level; 0 = 5 s */
    void (*on_dead)(void *arg);             /* called once, on the engine thread, when the device died */
    void *on_dead_arg;
    /* For tests: virtual time in microseconds, and no thread: the caller drives engine_turn(). */
    int64_t (*clock_us)(void *arg);
    void *clock_arg;
    bool manual;
};

/**
 * Opens device, weights, caches and model and starts the thread. backend and model come from the plugin registry.
 * Everything that can be refused is refused here, with the reason.
 */
int engine_open(struct engine **out, const struct engine_config *cfg,
                const struct arle_backend_api *backend, void *backend_ctx, uint32_t device_index,
                const struct arle_model_api *model, void *model_ctx, struct arle_err *err);
/** Stops admission, lets requests finish until deadline_ms, cancels the rest. Any thread; waits. Returns requests cut off. */
int engine_drain(struct engine *e, int64_t deadline_ms);
void engine_close(struct engine *e);
const struct arle_model_desc *engine_model(const struct engine *e);
/** Positions a request may use: the model's context, or less when the page pool cannot hold one sequence of that length. */
uint32_t engine_context(const struct engine *e);
const char *engine_compute(const struct engine *e);      /* "f32" or "bf16" */
/** Cancels the request of that id if it is still here. Any thread. -ENOMEM, else 0 (it may have ended meanwhile). */
int engine_cancel(struct engine *e, uint64_t id);
/** Has the engine thread drop what no sequence uses from the local tiers, and waits for it. -ETIMEDOUT, -ENOMEM. Not in manual mode. */
int engine_kv_flush(struct engine *e, int64_t deadline_ms);

/* A prompt to pin or to let go, as in request_args. */
enum pin_what { PIN_TAKE = 1, PIN_RELEASE, PIN_RELEASE_ALL };
struct pin_args {
    enum pin_what what;             /* with PIN_RELEASE_ALL the rest is unused */
    const int32_t *tokens; uint32_t n_tokens;
    const uint32_t *marks; uint32_t n_marks;        /* PIN_TAKE only */
    const char *tenant, *cache_salt;
};
struct kv_pinned;
/**
 * Has the engine thread pin what is remembered of a prompt (kv_pin), or end its pin or all of them, and waits for it. Computes
 * nothing. Errors of kv_pin and kv_unpin; -ETIMEDOUT: nothing was done and nothing will be; -ENOMEM; -ESHUTDOWN: the engine closes.
 * Any thread but the engine's; not in manual mode.
 */
int engine_kv_pin(struct engine *e, const struct pin_args *args, struct kv_pinned *out, int64_t deadline_ms, struct arle_err *err);
/** Manual mode: one turn of the loop, at most one step. 1: something was done, 0: idle, -EIO: dead. */
int engine_turn(struct engine *e);

/* generation_config.json, with the usual defaults where it is silent; `eos` also from config.json. */
#define GEN_MAX_EOS 16
struct generation_defaults {
    float temperature, top_p, min_p, repetition;
    int32_t top_k;
    int32_t eos[GEN_MAX_EOS]; uint32_t n_eos;
};
const struct generation_defaults *engine_defaults(const struct engine *e);
/** Parses both texts (either may be NULL). -EINVAL names the field. */
int generation_parse(const char *gen_json, size_t gen_len, const char *config_json, size_t config_len,
                     struct generation_defaults *out, struct arle_err *err);

struct engine_stats {
    uint64_t steps, step_tokens, decode_rows, prefill_tokens, requests, finished, cancelled, rejected, errors, preempted;
    uint64_t graph_launches, graph_captures, ahead_steps;
    uint32_t running, waiting, parked;
    uint64_t step_us_sum;           /* time in which a step was in flight; overlap counts once */
    uint64_t plan_us_sum;
    bool dead;
    char dead_reason[256];
    uint64_t completion_tokens, slow_steps, resumed, recomputed_tokens;
    int64_t longest_gap_us;                 /* longest time between two tokens of an answer so far, preemption included */
    uint64_t collect_us_sum;                /* time spent waiting for steps */
    int64_t step_age_us;                    /* how long the step that is waited for has been running; 0 when none is */
    bool stalled;                           /* step_age_us is past the watchdog */
    uint32_t n_pages, page_tokens;
};

/* Counts per upper bound in microseconds; the last bucket has no bound. */
#define HIST_BUCKETS 20
extern const int64_t hist_bounds_us[HIST_BUCKETS - 1];
struct hist { uint64_t count, sum_us, bucket[HIST_BUCKETS]; };
struct engine_hists { struct hist first_token, inter_token, queue, step; };
void engine_hist(const struct engine *e, struct engine_hists *out);     /* any thread; as of the last step */

void engine_stat(const struct engine *e, struct engine_stats *out);     /* any thread; a copy made once per step */
struct kv_stats;
void engine_kv_stat(const struct engine *e, struct kv_stats *out);

#endif
