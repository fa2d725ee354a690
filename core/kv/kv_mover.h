/*
 * A mover: one thread that does slow reads and writes for the engine thread. Jobs go in and come back by value through two
 * bounded queues under one mutex; the engine looks at an atomic count before it takes it, so that a step with nothing to move
 * takes no lock. Host memory named by a job belongs to the mover until the job has come back.
 */
#ifndef CORE_KV_MOVER_H
#define CORE_KV_MOVER_H

#include "kv/kv_disk.h"

#include <arle/kv.h>
#include <pthread.h>
#include <stdatomic.h>

#define MOVER_JOBS 128u

enum kv_job_op { JOB_PUT = 1, JOB_GET, JOB_DEL, JOB_LOST, JOB_PROBE, JOB_PIN };

/* Which keys of a prompt the cluster has: pages first, then states. Owned by whoever holds the job. */
struct kv_probe { uint32_t n, n_pages; int root; uint32_t first; uint64_t hash; struct arle_kv_item *items; uint8_t *present; };

struct kv_job {
    uint8_t op;                 /* enum kv_job_op */
    struct kv_disk_object o;    /* disk: all of it; cluster: kind, start, n_tokens, tokens, bytes; handle: node or snapshot */
    uint8_t key[32];            /* cluster */
    uint8_t salt[32];
    void *data; int32_t host;
    struct kv_probe *probe;
    bool pinned;                /* JOB_PIN: from now on */
    int result;
    int64_t us;
};

struct kv_mover {
    pthread_t thread;
    bool started, stopped;
    pthread_mutex_t mu;         /* guards the queues, stop and stats */
    pthread_cond_t more;
    struct kv_job in[MOVER_JOBS], out[MOVER_JOBS];
    uint32_t in_head, in_tail, out_head, out_tail;
    bool stop;
    _Atomic uint32_t n_out;     /* results waiting; release by the mover, acquire by the engine */
    uint32_t in_flight;         /* engine thread only */
    struct kv_disk_stats stats;

    struct kv_disk *disk;       /* one of the two */
    const struct arle_kv_store_api *store; void *store_ctx;
    uint32_t deadline_ms;
};

int mover_start(struct kv_mover *m, struct arle_err *err);
void mover_stop(struct kv_mover *m);            /* finishes what is queued; its results may still be taken */
void mover_fini(struct kv_mover *m);            /* after mover_stop */
/** False when the queue is full. */
bool mover_submit(struct kv_mover *m, const struct kv_job *job);
bool mover_take(struct kv_mover *m, struct kv_job *out);

/* What one object looks like in the cluster: this head, its tokens, its bytes. */
#define STORE_HEAD_BYTES 72u
void store_head(uint8_t *out, const struct kv_job *j);
/** Checks everything but the key's meaning; -EBADMSG. */
int store_check(const uint8_t *data, uint64_t len, const struct kv_job *j);

#endif
