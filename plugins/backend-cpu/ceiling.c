/*
 * Measured ceilings of the machine: how fast all threads together read memory, and how fast they multiply when everything is in
 * registers and first-level cache. Figures of merit are fractions of these.
 */
#include "cpu.h"

#include <time.h>

#define READ_BYTES ((size_t)1 << 30)        /* far beyond any last-level cache */
#define READ_SEGMENT ((size_t)128 << 20)    /* one timed pass: short, so that a busy machine leaves some passes alone */
#define READ_PASSES 48                      /* a segment comes back after a gigabyte; both ways of reading see all of them */
#define FLOP_PASSES 20

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
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
    atomic_fetch_add(&j->sink, j->four_streams ? read_lines(p, n, 4, 1536) : read_lines(p, n, 1, 4096));
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

    struct flop_job fj = { .dev = dev, .bf16 = dev->k->bf16_dot, .k2 = 128, .reps = dev->k == &kernels_ref ? 20 : 4000 };
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
