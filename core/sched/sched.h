/*
 * Inside the scheduler: what its files share. Everything here belongs to the engine thread unless a comment says otherwise.
 *
 *   request.c  what callers hold: submit, events, stop, cancel      queue.c   who waits: mailbox, priorities, tenants
 *   admit.c    who runs: pages, slots, preemption, ends             plan.c    what a step does, packed for one copy
 *   step.c     launch, graphs, wait, collect                        engine.c  the loop, its thread, watchdog, figures
 *   open.c     device, weights, sizes                               generation_config.c   defaults of a checkpoint
 */
#ifndef CORE_SCHED_SCHED_H
#define CORE_SCHED_SCHED_H

#include "kv/kv.h"
#include "sched/engine.h"
#include "sched/ring.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

#define SIDE_RECORDS 8u              /* records for states from the midst of a step, on an accelerator */
#define SIDE_RECORDS_HOST 2u
#define SCHED_ALIGN 64u             /* prefill chunks end on multiples of this inside a prompt; see kv_seq_cut */
#define MAX_ANSWERS 128u
#define MAX_STOP_IDS 64u
#define MAX_BIAS 1024u
#define MAX_GRAPHS 96u
#define CACHE_LINE 64u

enum seq_state { SEQ_WAITING = 1, SEQ_PARKED, SEQ_RUNNING, SEQ_DONE };

/*
 * One answer of a request: a timeline of tokens. Memory lives in its request. The first cache line is all that taking a token
 * touches, the second what planning a row adds.
 */
struct seq {
    _Alignas(CACHE_LINE) struct request *rq;
    struct kv_seq *kv;
    int32_t *tokens;                /* prompt, then output; capacity n_limit */
    uint32_t n_prompt, n_tokens, n_limit;
    uint32_t n_computed;            /* positions enqueued on the device */
    uint32_t pending_row;           /* row of the newest pending token in the last launched step */
    uint32_t index;
    uint8_t pending;                /* sampled on the device, not read yet: 0..2 */
    uint8_t inflight;               /* launched steps that hold this sequence: 0..2 */
    uint8_t state;                  /* enum seq_state */
    uint8_t finish;                 /* enum finish_reason, set when SEQ_DONE */
    bool moving;                    /* a tier move is under way: ask again after kv_poll() */
    bool reaped;                    /* its KV sequence is closed; a step in flight still names it */
    bool opened;                    /* had a KV sequence at least once: figures of the first hit are kept */
    int64_t last_token_us;

    uint64_t seed;
    uint64_t seated;                /* number of its admission: its pages do not change, only grow, until it leaves */
    int32_t hist;                   /* place in the device history buffers, -1 none */
    uint32_t n_reported, n_drafted; /* prompt events and drafts already given out (a recomputed prompt repeats none) */

    struct seq *next, *prev;        /* waiting list */
    const struct seq *leader;       /* runs, and computes a prefix that this waiting answer shares up to lead_until */
    uint32_t lead_until;
    int64_t since_us;               /* submitted; its age counts from here, also after it lost its place */
    int64_t prio;                   /* aged priority when it was admitted */
};

_Static_assert(offsetof(struct seq, seed) == CACHE_LINE && offsetof(struct seq, next) <= 2 * CACHE_LINE, "lines of struct seq");

/* Service used by one tenant, for fairness. */
struct tenant {
    struct tenant *next;
    uint64_t service;               /* virtual tokens served; see docs/scheduler.md */
    uint32_t live;                  /* answers waiting or running */
    char name[];
};

/* As of a seq: two cache lines for taking a token, one more for planning a row. */
struct request {
    _Alignas(CACHE_LINE) struct ring ring;
    struct tenant *tenant;          /* in the table; set by the engine */
    int32_t *stop_ids; uint32_t n_stop_ids;
    uint32_t max_new;
    bool ignore_eos, prompt_logprobs, drafts, penalties, touched, left_queue, private_salt;
    _Atomic uint32_t notify_state;  /* 0 free, 1 running, 2 closed: request_unref waits for a running one */
    void (*notify)(void *arg);
    void *notify_arg;
    struct sampling sampling;

    struct request_usage usage;
    struct engine *eng;
    uint64_t id;
    _Atomic int refs;               /* engine and consumer */
    _Atomic uint32_t cancel;        /* set by anyone; release, read by the engine after its mailbox bell */
    _Atomic bool ended;             /* release after the last event and the usage were written */
    struct request *mail_next;      /* submit mailbox */
    uint32_t ended_seen;            /* consumer: EV_FINISH popped */
    uint32_t n, n_unfinished, n_unreleased, n_unadmitted;
    struct seq *seq;                /* [n] */
    _Atomic uint8_t *stop;          /* [n] set by request_stop */
    int32_t *prompt_mem; size_t prompt_bytes;       /* token memory of all answers */
    struct arle_bias *bias;
    uint32_t *marks; uint32_t n_marks;
    uint32_t n_prompt;
    int32_t priority;
    struct tenant *tenant_own;      /* made by submit; NULL once the engine's table has adopted it */
    uint8_t salt[KV_SALT_BYTES];
    int64_t submit_us, deadline_us; /* absolute; INT64_MAX none */
    int64_t queue_deadline_us;      /* as deadline_us, until the first answer is admitted */
};

_Static_assert(offsetof(struct request, sampling) + offsetof(struct sampling, has_seed) <= 2 * CACHE_LINE &&
               offsetof(struct request, usage) <= 3 * CACHE_LINE, "lines of struct request");

/* A pin that somebody waits for. Two sides hold it, and the one that lets go last frees it. */
struct pin_order {
    _Atomic uint32_t state;         /* enum pin_state; whoever moves it away from PIN_ASKED has decided */
    _Atomic uint32_t refs;
    enum pin_what what;
    uint8_t salt[KV_SALT_BYTES];
    uint32_t n_tokens, n_marks;
    struct kv_pinned out;           /* these three: written before PIN_DONE (release), read after it (acquire) */
    struct arle_err err;
    int result;
    int32_t *tokens; uint32_t *marks;       /* behind the struct */
};
enum pin_state { PIN_ASKED, PIN_BUSY, PIN_DONE, PIN_GIVEN_UP };

/* Mail to the engine that is not a request. */
struct note { struct note *next; uint64_t cancel_id; bool flush; struct pin_order *pin; };  /* one of the three; flush: the prefix cache */

struct row { struct seq *seq; uint32_t pos; bool sample; };
struct part { struct seq *seq; uint32_t from, n; };

/* Where the arrays of a step lie in its input buffer: one function of these sizes, so that a captured step finds them again. */
struct layout { size_t table, ids, pos, seq_of, cu, ctx_len, slot, rows, srows, bias, end; };

/* What a row of a staged block table holds: entries below n of the sequence that was admitted as number `seated`. */
struct shadow { uint64_t seated; uint32_t n; };

struct step {
    uint64_t no;
    uint32_t n_tokens, n_seqs, n_decode, n_rows;        /* as the device sees them, padding included */
    uint32_t n_parts, n_real_rows, n_sampled, n_prefill, max_new, max_ctx, stride;
    bool graph;                     /* decode rows only, one sampled row each: padded to a bucket */
    bool drafts, any_top, any_draw, any_edit, in_flight;
    struct layout at;
    uint32_t n_bias;
    struct part *part;              /* [max_seqs] */
    struct shadow *shadow;          /* [max_seqs] */
    uint32_t shadow_stride;
    struct row *row;                /* [max_rows] */
    uint32_t n_saves;
    struct arle_save save[ARLE_MAX_SAVES];      /* the i-th goes to the i-th side record of the KV plane */
    uint8_t *in;                    /* pinned staging */
    uint8_t *out;                   /* pinned results: row results, then drafts */
    struct arle_event *done;
    int64_t launch_us;
};

/* Results of n rows, structure of arrays; ids first, so that the next step finds them at a fixed place. */
struct results { int32_t *ids; float *logprob, *target, *top_logit; int32_t *top_ids; float *top_logprobs; size_t bytes, bytes_top; };

struct graph_key { uint32_t n_seqs, stride, flags; };
struct graph { struct graph_key key; struct arle_graph *g; uint32_t seen; bool refused; };

struct engine {
    struct engine_config cfg;
    const struct arle_backend_api *be;
    const struct arle_mem_ops *mem;
    struct arle_device *dev;
    struct arle_device_info info;
    const struct arle_model_api *api;
    void *be_ctx, *model_ctx;
    uint32_t device_index, compute, kv_dtype;
    struct arle_model *model;
    struct arle_model_desc desc;
    struct generation_defaults gen;
    struct arle_weights *weights;
    struct arle_stream *stream;
    struct kv *kv;
    char *name;
    uint32_t context, page_tokens, max_rows, max_stride, n_pages;
    uint32_t n_side;                /* states that a step may keep from its midst */
    uint64_t seed_salt;             /* makes unseeded requests differ between runs */
    bool ahead, graphs_on;

    /* Device buffers. */
    uint8_t *d_in; size_t in_bytes;
    uint8_t *d_out; size_t out_bytes, draft_at;
    float *d_logits;
    int32_t *d_hist; uint32_t hist_slots, hist_stride;
    int32_t *hist_free; uint32_t n_hist_free;
    uint32_t bias_cap;
    struct step step[2], *prev;     /* prev: launched, not collected */
    uint64_t step_no, n_seated;
    struct graph graph[MAX_GRAPHS]; uint32_t n_graphs;

    struct seq **run; uint32_t n_run;       /* by rank: priority, then arrival */
    struct seq *wait_head; uint32_t n_wait, n_parked;
    struct tenant *tenants; uint32_t n_tenants;
    struct request **touched; uint32_t n_touched, cap_touched;
    struct seq *done_head;          /* done, their KV sequence still open */
    bool admit_again;               /* something changed since admission last failed */
    uint32_t growth;                /* tokens that each running answer should find pages for; learned, see admit.c */
    uint64_t growth_step;           /* when it last changed */
    bool hold;                      /* pages ran out: nobody new before somebody leaves */
    bool moving;                    /* someone waits for a tier */
    uint32_t n_followers;           /* waiting answers with a leader */
    int64_t next_deadline_us;

    /* Reached by other threads. */
    _Atomic(struct request *) mail;         /* stack of submitted requests */
    _Atomic(struct note *) notes;
    _Atomic uint64_t flushes;               /* of the prefix cache, done */
    _Atomic uint32_t attention;             /* a cancel or stop flag was set somewhere */
    _Atomic uint32_t bell, sleeping;
    _Atomic uint32_t queued;                /* requests that no answer of has been admitted */
    _Atomic uint64_t live;                  /* requests not ended */
    _Atomic uint64_t next_id;
    _Atomic uint64_t rejected;
    _Atomic int64_t mean_request_us;        /* moving average, for Retry-After */
    _Atomic bool draining, cut, closing, is_dead;
    _Atomic int64_t step_started_us;        /* 0 when no step is enqueued or waited for */
    pthread_t thread, watch_thread;
    bool thread_on, watch_on;
    pthread_mutex_t watch_mu; pthread_cond_t watch_cv;     /* watch_mu guards watch_stop */
    bool watch_stop;

    struct engine_stats st;                 /* engine thread's own */
    struct engine_hists hists;
    bool unpublished;
    pthread_mutex_t pub_mu;                 /* guards pub, pub_hists; the engine thread only tries it while running */
    struct engine_stats pub;
    struct engine_hists pub_hists;
    int64_t device_us;                      /* of this turn: time inside backend and model calls, not the scheduler's own */
    int64_t last_done_us;           /* when the step before was collected */
};

static inline int64_t engine_now(const struct engine *e)
{
    return e->cfg.clock_us(e->cfg.clock_arg);
}

/*
 * Between two steps the caches have seen other things, and what a pass over the running sequences needs lies in some ten lines
 * each. Asked for a few sequences ahead, it is there when the pass arrives: a tenth less time per step on 2 busy cores of a
 * Zen 3 server, 2026-11.
 */
#define PREFETCH_FAR 12u
#define PREFETCH_NEAR 6u
#define SEQ_HOT (2 * CACHE_LINE)
#define REQUEST_HOT (2 * CACHE_LINE)

static inline void prefetch_lines(const void *p, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += CACHE_LINE)
        __builtin_prefetch((const char *)p + i);
}

static inline void queue_charge(struct seq *sq, uint32_t tokens)
{
    sq->rq->tenant->service += tokens;
}

/* queue.c */
void queue_wake(struct engine *e);                      /* any thread */
bool queue_intake(struct engine *e);                    /* mail, cancels, stops, deadlines; true when anything came */
void queue_add(struct engine *e, struct seq *sq);
void queue_remove(struct engine *e, struct seq *sq);
int64_t queue_aged(const struct engine *e, const struct seq *sq, int64_t now);
bool queue_follow(struct engine *e, struct seq *sq);    /* true: it waits for one that runs to compute their common prefix */
void queue_unfollow(struct engine *e, const struct seq *leader);
struct seq *queue_best(struct engine *e, int64_t now);
void queue_leave_tenant(struct engine *e, struct seq *sq);      /* once per answer, when it ended */
void queue_tenants_free(struct engine *e);
void queue_notes_free(struct engine *e);                /* after the thread's end: mail that came too late */

/* admit.c */
void admit(struct engine *e);
bool admit_reserve(struct engine *e);                   /* pages for this step's decode rows; preempts. False: device died */
void seq_finish(struct engine *e, struct seq *sq, enum finish_reason why, int error);
void seq_reap(struct engine *e);                        /* gives pages and slots of finished sequences back */
void seq_release(struct engine *e, struct seq *sq);
void seq_emit(struct engine *e, struct seq *sq, struct token_event *ev);      /* fills ev->index */
void seq_emit_token(struct engine *e, struct seq *sq, int32_t id, float logprob, float top_logit);    /* without alternatives */
void seq_all_fail(struct engine *e, enum finish_reason why, int error);
void seq_flush_events(struct engine *e);                /* publishes what was emitted and calls notify */

/* plan.c */
struct layout plan_layout(uint32_t n_tokens, uint32_t n_seqs, uint32_t n_rows, uint32_t stride, uint32_t n_bias);
bool plan_step(struct engine *e, struct step *s);       /* false: nothing to do */
bool seq_ready(const struct seq *sq);                   /* has a position that a step could compute now */
void sample_row(const struct engine *e, const struct row *row, struct arle_sample_row *out);
struct results results_at(uint8_t *base, uint32_t n_rows);
size_t results_bytes(uint32_t n_rows);                  /* alternatives included */

/* step.c */
int step_launch(struct engine *e, struct step *s);
int step_collect(struct engine *e, struct step *s);
int engine_wait_step(struct engine *e, struct step *s, struct arle_err *err);
void step_abandon(struct engine *e, struct step *s, int error);     /* ends all its sequences with that error */
void step_graphs_free(struct engine *e);
uint32_t step_bucket(const struct engine *e, uint32_t n);

/* engine.c */
void engine_die(struct engine *e, const struct arle_err *err);
void hist_add(struct hist *h, int64_t us, uint64_t times);
int engine_start(struct engine *e, struct arle_err *err);
void engine_halt(struct engine *e);                     /* stops the threads; all requests are ended then */

/* request.c */
void request_drop(struct request *rq);

#endif
