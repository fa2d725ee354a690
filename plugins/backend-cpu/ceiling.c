/*
 * Measured ceilings of the machine: how fast all threads together read memory, and how fast they multiply and add when nothing
 * leaves the registers. Neither runs a kernel of an op, so that a slow kernel cannot lower what it is compared with.
 */
#include "cpu.h"

#include <sched.h>
#include <time.h>

#define READ_BYTES ((size_t)1 << 30)        /* far beyond any last-level cache */
#define READ_SEGMENT ((size_t)128 << 20)    /* one timed pass: short, so that a busy machine leaves some passes alone */
#define READ_PASSES 48                      /* a segment comes back after a gigabyte; both ways of reading see all of them */
#define FLOP_ROUNDS 65536                   /* times peak_step: every sum stays an integer that f32 holds */
#define FLOP_PASSES 400
#define FLOP_PASS_S 1e-3                    /* short, so that a busy machine leaves some passes alone */

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

/* Sends the thread to the part's own CPU: a busy system may keep two threads of ours on one and never notice. Returns whether `old` must
 * be restored; a pinned thread stays where it is. */
static bool go_to_cpu(unsigned part, unsigned n_parts, cpu_set_t *old)
{
    cpu_set_t one;
    if (sched_getaffinity(0, sizeof *old, old) != 0 || CPU_COUNT(old) < (int)n_parts)
        return false;
    for (int c = 0; c < CPU_SETSIZE; c++)
        if (CPU_ISSET(c, old) && part-- == 0) {
            CPU_ZERO(&one);
            CPU_SET(c, &one);
            return sched_setaffinity(0, sizeof one, &one) == 0;
        }
    return false;
}

static void come_back(bool moved, const cpu_set_t *old)
{
    if (moved)
        sched_setaffinity(0, sizeof *old, old);
}

struct read_job {
    const char *data;
    size_t bytes;
    bool four_streams;
    _Atomic uint64_t sink;
};

/* Reads n cache lines in `streams` places by turns; a constant count of these keeps the sums in registers. */
static inline __attribute__((always_inline)) uint64_t read_lines(const char *data, size_t n, unsigned streams, size_t ahead)
{
    typedef uint64_t v2 __attribute__((vector_size(16), aligned(16), may_alias));
    v2 sum[4] = { { 0 } };
    size_t each = n / streams;
    for (size_t i = 0; i < each; i++)
        UNROLL for (unsigned s = 0; s < streams; s++) {
            const v2 *p = (const v2 *)(const void *)(data + (s * each + i) * 64);
            __builtin_prefetch((const char *)p + ahead);
            sum[s] ^= p[0] ^ p[1] ^ p[2] ^ p[3];
        }
    sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
    return sum[0][0] + sum[0][1];
}

static void read_part(void *arg, unsigned part, unsigned n_parts)
{
    struct read_job *j = arg;
    size_t n = j->bytes / 64 / n_parts;
    const char *p = j->data + n * 64 * part;
    cpu_set_t old;
    bool moved = go_to_cpu(part, n_parts, &old);
    atomic_fetch_add(&j->sink, j->four_streams ? read_lines(p, n, 4, 1536) : read_lines(p, n, 1, 4096));
    come_back(moved, &old);
}

struct flop_job {
    const struct kernels *k;
    unsigned reps;
    float start[CPU_PEAK_SUMS];     /* see kernels.peak */
    _Atomic bool wrong;
};

/* The kernel set's fastest multiply-add on registers, no loads: what no matrix product can exceed. */
static void flop_part(void *arg, unsigned part, unsigned n_parts)
{
    struct flop_job *j = arg;
    cpu_set_t old;
    bool moved = go_to_cpu(part, n_parts, &old);
    for (unsigned r = 0; r < j->reps; r++)
        if (j->k->peak(FLOP_ROUNDS, j->start) != (float)(FLOP_ROUNDS * j->k->peak_step))
            atomic_store(&j->wrong, true);
    come_back(moved, &old);
}

static int flop_ceiling(struct arle_device *dev, double *out, struct arle_err *err)
{
    struct flop_job j = { .k = dev->k, .reps = 1 };
    for (int i = 0; i < CPU_PEAK_SUMS; i++)
        j.start[i] = (float)i;
    double best = 1e9, t = now_s();
    flop_part(&j, 0, 1);            /* wakes the vector units, and tells how often a pass must repeat */
    t = now_s() - t;
    j.reps = t < FLOP_PASS_S ? (unsigned)(FLOP_PASS_S / (t + 1e-6)) + 1 : 1;
    for (int i = 0; i < FLOP_PASSES; i++) {
        t = now_s();
        pool_run(dev->pool, dev->n_threads, flop_part, &j);
        t = now_s() - t;
        best = t < best ? t : best;
    }
    if (j.wrong)
        return arle_err_set(err, -EIO, "%s: the multiply-adds of the ceiling add up to something else", dev->k->name);
    *out = (double)dev->k->peak_flop * FLOP_ROUNDS * j.reps * dev->n_threads / best;
    return 0;
}

int cpu_ceiling(struct arle_device *dev, double *read_bytes_s, double *bf16_flop_s, struct arle_err *err)
{
    char *data = pages_alloc(READ_BYTES);
    if (data == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for a %zu byte read test", READ_BYTES);
    memset(data, 1, READ_BYTES);
    struct read_job rj = { .data = data, .bytes = READ_SEGMENT };
    double best = 1e9;
    for (int i = 0; i < READ_PASSES; i++) {
        rj.data = data + (size_t)i * READ_SEGMENT % READ_BYTES;
        rj.four_streams = i / 8 % 2;
        double t = now_s();
        pool_run(dev->pool, dev->n_threads, read_part, &rj);
        t = now_s() - t;
        best = t < best ? t : best;
    }
    pages_free(data, READ_BYTES);
    *read_bytes_s = (double)READ_SEGMENT / best;
    return flop_ceiling(dev, bf16_flop_s, err);
}
