/*
 * Measured ceilings of the machine: how fast all threads together read memory, and how fast they multiply when everything is in
 * registers and first-level cache. Figures of merit are fractions of these.
 */
#include "cpu.h"

#include <time.h>

#define READ_BYTES ((size_t)1 << 30)    /* far beyond any last-level cache */
#define READ_PASSES 6
#define FLOP_PASSES 5

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

struct read_job {
    const char *data;
    size_t bytes;
    unsigned streams;           /* places that each thread reads from in turn */
    _Atomic uint64_t sink;
};

static void read_part(void *arg, unsigned part, unsigned n_parts)
{
    struct read_job *j = arg;
    typedef uint64_t v8 __attribute__((vector_size(64), aligned(64), may_alias));
    size_t n = j->bytes / 64 / n_parts / j->streams;
    const v8 *p = (const v8 *)(const void *)j->data + n * j->streams * part;
    v8 sum = { 0 };
    for (size_t i = 0; i < n; i++)
        for (unsigned s = 0; s < j->streams; s++) {
            __builtin_prefetch((const char *)(p + s * n + i) + 1536);
            sum ^= p[s * n + i];
        }
    atomic_fetch_add(&j->sink, sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7]);
}

struct flop_job {
    struct arle_device *dev;
    bool bf16;
    int64_t k2;
    unsigned reps;
};

/* Full tiles over operands that stay in the first-level cache: what the kernels could do if memory were free. */
static void flop_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct flop_job *j = arg;
    const struct kernels *k = j->dev->k;
    char *x = thread_scratch(j->dev, part), *w = x + (1 << 18);
    _Alignas(64) float acc[CPU_MAX_ROWS * CPU_TILE_COLS];
    unsigned blocks = k->tile_blocks[k->max_rows];
    for (unsigned r = 0; r < j->reps; r++)
        (j->bf16 ? k->gemm_bf16_wbf16 : k->gemm_f32_wbf16)(x, k->max_rows, j->k2, w, (size_t)j->k2 * 64, blocks, acc);
}

int cpu_ceiling(struct arle_device *dev, double *read_bytes_s, double *bf16_flop_s, struct arle_err *err)
{
    char *data = pages_alloc(READ_BYTES);
    if (data == NULL)
        return arle_err_set(err, -ENOMEM, "no memory for a %zu byte read test", READ_BYTES);
    memset(data, 1, READ_BYTES);
    struct read_job rj = { .data = data, .bytes = READ_BYTES };
    double best = 1e9;
    for (int i = 0; i < READ_PASSES; i++) {             /* one stream or eight: which is faster depends on the machine */
        rj.streams = i % 2 ? 8 : 1;
        double t = now_s();
        pool_run(dev->pool, dev->n_threads, read_part, &rj);
        t = now_s() - t;
        best = t < best ? t : best;
    }
    pages_free(data, READ_BYTES);
    *read_bytes_s = (double)READ_BYTES / best;

    struct flop_job fj = { .dev = dev, .bf16 = dev->k->bf16_dot, .k2 = 128, .reps = dev->k == &kernels_ref ? 50 : 20000 };
    for (unsigned i = 0; i < dev->n_threads; i++)
        memset(thread_scratch(dev, i), 0, 1 << 20);
    best = 1e9;
    for (int i = 0; i < FLOP_PASSES; i++) {
        double t = now_s();
        pool_run(dev->pool, dev->n_threads, flop_part, &fj);
        t = now_s() - t;
        best = t < best ? t : best;
    }
    double flop = 2.0 * dev->k->max_rows * dev->k->tile_blocks[dev->k->max_rows] * CPU_BLOCK * 2.0 * (double)fj.k2 * fj.reps;
    *bf16_flop_s = flop * dev->n_threads / best;
    return 0;
}
