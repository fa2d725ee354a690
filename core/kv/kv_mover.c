/* The movers of the disk and of the cluster tier; see kv_mover.h. */
#include "kv/kv_mover.h"
#include "kv/kv_hash.h"
#include "util/clock.h"

#include <stdlib.h>
#include <string.h>

#define BATCH 32u

/* ---- what a cluster object looks like --------------------------------------------------------------------------------- */

void store_head(uint8_t *out, const struct kv_job *j)
{
    uint32_t w[4] = { j->o.kind, j->o.start, j->o.n_tokens, 0 };
    memset(out, 0, STORE_HEAD_BYTES);
    memcpy(out, "ARLEKVO1", 8);
    memcpy(out + 8, w, 16);
    memcpy(out + 24, &j->o.bytes, 8);
    memcpy(out + 32, j->key, 32);
    uint32_t crc = kv_crc32c(0, j->o.tokens, (size_t)j->o.n_tokens * 4);
    crc = kv_crc32c(crc, j->data, j->o.bytes);
    memcpy(out + 64, &crc, 4);
    crc = kv_crc32c(0, out, 68);
    memcpy(out + 68, &crc, 4);
}

int store_check(const uint8_t *data, uint64_t len, const struct kv_job *j)
{
    uint32_t w[4], crc;
    uint64_t bytes;
    if (len != STORE_HEAD_BYTES + (uint64_t)j->o.n_tokens * 4 + j->o.bytes || memcmp(data, "ARLEKVO1", 8) != 0)
        return -EBADMSG;
    memcpy(&crc, data + 68, 4);
    memcpy(w, data + 8, 16);
    memcpy(&bytes, data + 24, 8);
    if (crc != kv_crc32c(0, data, 68) || w[0] != j->o.kind || w[1] != j->o.start || w[2] != j->o.n_tokens || bytes != j->o.bytes
        || memcmp(data + 32, j->key, 32) != 0)
        return -EBADMSG;
    memcpy(&crc, data + 64, 4);
    if (crc != kv_crc32c(0, data + STORE_HEAD_BYTES, len - STORE_HEAD_BYTES))
        return -EBADMSG;
    return j->o.n_tokens == 0 || memcmp(data + STORE_HEAD_BYTES, j->o.tokens, (size_t)j->o.n_tokens * 4) == 0 ? 0 : -EBADMSG;
}

/* ---- doing jobs ---------------------------------------------------------------------------------------------------------- */

static void do_disk(struct kv_mover *m, struct kv_job *j)
{
    struct arle_err err = ARLE_ERR_INIT;
    int64_t start = clock_mono_us();
    if (j->o.parent == 0)
        j->o.salt = j->salt;
    if (j->op == JOB_PUT)
        j->result = kv_disk_put(m->disk, &j->o, j->data, &err);
    else if (j->op == JOB_GET)
        j->result = kv_disk_get(m->disk, j->o.id, j->data, j->o.bytes, &err);
    else if (j->op == JOB_PIN)
        kv_disk_pin(m->disk, j->o.id, j->pinned);
    else
        kv_disk_remove(m->disk, j->o.id);
    j->us = clock_mono_us() - start;
}

static int store_get(struct kv_mover *m, struct kv_job *jobs, uint32_t n, struct arle_kv_item *items)
{
    struct arle_err err = ARLE_ERR_INIT;
    for (uint32_t i = 0; i < n; i++) {
        items[i].cap = STORE_HEAD_BYTES + (uint64_t)jobs[i].o.n_tokens * 4 + jobs[i].o.bytes;
        items[i].data = malloc(items[i].cap);
        if (items[i].data == NULL)
            return -ENOMEM;
    }
    int r = m->store->get(m->store_ctx, items, n, m->deadline_ms, &err);
    for (uint32_t i = 0; i < n; i++) {
        struct kv_job *j = &jobs[i];
        j->result = r < 0 ? r : items[i].len == 0 ? -ENOENT : store_check(items[i].data, items[i].len, j);
        if (j->result == 0)
            memcpy(j->data, (uint8_t *)items[i].data + STORE_HEAD_BYTES + (size_t)j->o.n_tokens * 4, j->o.bytes);
    }
    return r;
}

static int store_put(struct kv_mover *m, struct kv_job *jobs, uint32_t n, struct arle_kv_item *items)
{
    struct arle_err err = ARLE_ERR_INIT;
    for (uint32_t i = 0; i < n; i++) {
        const struct kv_job *j = &jobs[i];
        size_t toks = (size_t)j->o.n_tokens * 4;
        items[i].len = STORE_HEAD_BYTES + toks + j->o.bytes;
        uint8_t *p = items[i].data = malloc(items[i].len);
        if (p == NULL)
            return -ENOMEM;
        store_head(p, j);
        if (toks > 0)
            memcpy(p + STORE_HEAD_BYTES, j->o.tokens, toks);
        memcpy(p + STORE_HEAD_BYTES + toks, j->data, j->o.bytes);
    }
    int r = m->store->put(m->store_ctx, items, n, m->deadline_ms, &err);
    for (uint32_t i = 0; i < n; i++)
        jobs[i].result = r < 0 ? r : 0;
    return r;
}

/* n jobs of one kind in one round trip. */
static void do_store(struct kv_mover *m, struct kv_job *jobs, uint32_t n)
{
    struct arle_kv_item items[BATCH] = { 0 };
    struct arle_err err = ARLE_ERR_INIT;
    int64_t start = clock_mono_us();
    int r = 0;
    for (uint32_t i = 0; i < n; i++)
        memcpy(items[i].key, jobs[i].key, 32);
    if (jobs[0].op == JOB_PROBE) {
        struct kv_probe *p = jobs[0].probe;
        r = m->store->exists(m->store_ctx, p->items, p->n, p->present, m->deadline_ms, &err);
        jobs[0].result = r < 0 ? r : 0;
    } else {
        r = jobs[0].op == JOB_GET ? store_get(m, jobs, n, items) : store_put(m, jobs, n, items);
        if (r == -ENOMEM)
            for (uint32_t i = 0; i < n; i++)
                jobs[i].result = r;
    }
    for (uint32_t i = 0; i < n; i++) {
        jobs[i].us = (clock_mono_us() - start) / n;
        free(items[i].data);
    }
}

static uint32_t take_batch(struct kv_mover *m, struct kv_job *jobs)
{
    uint32_t n = 0;
    pthread_mutex_lock(&m->mu);
    while (m->in_head == m->in_tail && !m->stop)
        pthread_cond_wait(&m->more, &m->mu);
    while (n < BATCH && m->in_head != m->in_tail) {
        const struct kv_job *next = &m->in[m->in_head % MOVER_JOBS];
        if (n > 0 && (next->op != jobs[0].op || next->op == JOB_PROBE))
            break;
        jobs[n++] = *next;
        m->in_head++;
    }
    pthread_mutex_unlock(&m->mu);
    return n;
}

static void give_back(struct kv_mover *m, const struct kv_job *jobs, uint32_t n)
{
    pthread_mutex_lock(&m->mu);
    for (uint32_t i = 0; i < n; i++)            /* in_flight <= MOVER_JOBS / 2: there is always room for results */
        m->out[m->out_tail++ % MOVER_JOBS] = jobs[i];
    struct kv_job lost = { .op = JOB_LOST };
    while (m->disk != NULL && m->out_tail - m->out_head < MOVER_JOBS / 2
           && kv_disk_next_lost(m->disk, &lost.o.id, &lost.o.kind, &lost.o.handle))
        m->out[m->out_tail++ % MOVER_JOBS] = lost;
    if (m->disk != NULL)
        kv_disk_stat(m->disk, &m->stats);
    atomic_store_explicit(&m->n_out, m->out_tail - m->out_head, memory_order_release);
    pthread_mutex_unlock(&m->mu);
}

static void *mover_main(void *arg)
{
    struct kv_mover *m = arg;
    struct kv_job jobs[BATCH];
    for (uint32_t n; (n = take_batch(m, jobs)) > 0;) {
        if (m->disk != NULL) {
            for (uint32_t i = 0; i < n; i++)
                do_disk(m, &jobs[i]);
            if (jobs[0].op == JOB_PUT)
                kv_disk_sync(m->disk);
        } else {
            do_store(m, jobs, n);
        }
        give_back(m, jobs, n);
    }
    return NULL;
}

int mover_start(struct kv_mover *m, struct arle_err *err)
{
    pthread_mutex_init(&m->mu, NULL);
    pthread_cond_init(&m->more, NULL);
    if (m->disk != NULL)
        kv_disk_stat(m->disk, &m->stats);
    int r = pthread_create(&m->thread, NULL, mover_main, m);
    if (r != 0)
        return arle_err_set(err, -r, "cannot start a mover thread: %s", strerror(r));
    m->started = true;
    return 0;
}

void mover_stop(struct kv_mover *m)
{
    if (!m->started)
        return;
    pthread_mutex_lock(&m->mu);
    m->stop = true;
    pthread_cond_signal(&m->more);
    pthread_mutex_unlock(&m->mu);
    pthread_join(m->thread, NULL);
    m->started = false;
    m->stopped = true;
}

void mover_fini(struct kv_mover *m)
{
    if (!m->stopped)
        return;
    pthread_mutex_destroy(&m->mu);
    pthread_cond_destroy(&m->more);
    m->stopped = false;
}

bool mover_submit(struct kv_mover *m, const struct kv_job *job)
{
    if (m->in_flight >= MOVER_JOBS / 2)
        return false;
    pthread_mutex_lock(&m->mu);
    m->in[m->in_tail++ % MOVER_JOBS] = *job;
    pthread_cond_signal(&m->more);
    pthread_mutex_unlock(&m->mu);
    m->in_flight++;
    return true;
}

bool mover_take(struct kv_mover *m, struct kv_job *out)
{
    if (atomic_load_explicit(&m->n_out, memory_order_acquire) == 0)
        return false;
    pthread_mutex_lock(&m->mu);
    *out = m->out[m->out_head++ % MOVER_JOBS];
    atomic_store_explicit(&m->n_out, m->out_tail - m->out_head, memory_order_release);
    pthread_mutex_unlock(&m->mu);
    if (out->op != JOB_LOST)
        m->in_flight--;
    return true;
}
