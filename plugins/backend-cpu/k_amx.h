/*
 * The matrix kernel of AMX, over tile operations that the including file defines:
 *
 *   TILE_CONFIG(c)         describes the eight tiles of this thread (struct amx_config); all become zero
 *   TILE_RELEASE()         gives the tile state up, so that a thread switch saves none of it
 *   TILE_ZERO(t), TILE_LOAD(t, p, stride), TILE_STORE(t, p, stride)
 *   TILE_DP(c, a, b)       C[m][n] += sum over 16 pairs of A[m][pair] . B[pair][n]
 *
 * Tile numbers are constants. Sixteen pairs of a weight block, [16][16][2] bf16, are B as they lie in memory. The chain of an element is
 * one TILE_DP per sixteen pairs, in the order of k from absolute multiples of 16, whatever the rows and blocks: decode and prefill agree
 * bit for bit. Missing pairs at the end are zeros on both sides.
 *
 * Tile state belongs to the thread and lives from the start to the end of one call: no caller and no worker ever sees it.
 */
#include "amx.h"

#include <string.h>

#define AMX_STEPS 16            /* of 16 pairs between stores of sums: 512 k of 32 rows are 32 KiB, which the first cache level keeps */
#define AMX_AHEAD 2048          /* bytes of a block fetched ahead when few rows leave memory the bottleneck; not measured yet */

struct amx_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct amx_config) == 64, "the processor reads 64 bytes");

/* What one call works on. */
struct amx_job {
    const char *x, *w;
    unsigned rows;
    int64_t k2, steps;
    size_t block_bytes;
    float *out;
    size_t ld;                  /* bytes between rows of out */
    char *pad;                  /* two B tiles: the last pairs of a block, zeros behind them */
};

/* Tiles 0..3 hold sums, of `low` and `high` rows in a square and of `low` in a strip; 4 is A and 5 the lower half of A, or a B. */
static void AMX(config)(unsigned low, unsigned high)
{
    struct amx_config c = { .palette = 1 };
    const unsigned square[8] = { low, low, high, high, low, high, 16, 16 }, strip[8] = { low, low, low, low, low, 16, 16, 16 };
    for (int t = 0; t < 8; t++) {
        c.row_bytes[t] = 64;
        c.rows[t] = (uint8_t)(high ? square : strip)[t];
    }
    TILE_CONFIG(&c);
}

/* Pairs [16 s, 16 s + 16) of a block: in the weight, or copied when they are fewer. */
static inline const char *AMX(pairs)(const struct amx_job *j, unsigned block, int64_t s, unsigned slot)
{
    const char *p = j->w + block * j->block_bytes + s * 1024;
    int64_t left = j->k2 - s * 16;
    if (left >= 16)
        return p;
    char *pad = j->pad + slot * 1024;
    memcpy(pad, p, (size_t)left * 64);
    memset(pad + left * 64, 0, 1024 - (size_t)left * 64);
    return pad;
}

/* 17 to 32 rows x two blocks, or one, over steps [s0, s1). */
static void AMX(square)(const struct amx_job *j, unsigned block, bool two, int64_t s0, int64_t s1)
{
    const char *x = j->x + s0 * j->rows * 64;
    float *o0 = j->out + block * 16, *o1 = (float *)(void *)((char *)o0 + 16 * j->ld);
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    if (s0 > 0) {
        TILE_LOAD(0, o0, j->ld);
        TILE_LOAD(2, o1, j->ld);
        if (two) {
            TILE_LOAD(1, o0 + 16, j->ld);
            TILE_LOAD(3, o1 + 16, j->ld);
        }
    }
    for (int64_t s = s0; s < s1; s++, x += j->rows * 64) {
        TILE_LOAD(4, x, 64);
        TILE_LOAD(5, x + 1024, 64);
        TILE_LOAD(6, AMX(pairs)(j, block, s, 0), 64);
        TILE_DP(0, 4, 6);
        TILE_DP(2, 5, 6);
        if (two) {
            TILE_LOAD(7, AMX(pairs)(j, block + 1, s, 1), 64);
            TILE_DP(1, 4, 7);
            TILE_DP(3, 5, 7);
        }
    }
    TILE_STORE(0, o0, j->ld);
    TILE_STORE(2, o1, j->ld);
    if (two) {
        TILE_STORE(1, o0 + 16, j->ld);
        TILE_STORE(3, o1 + 16, j->ld);
    }
}

static inline const char *AMX(fetched)(const struct amx_job *j, unsigned block, int64_t s, unsigned slot)
{
    const char *p = AMX(pairs)(j, block, s, slot);
    for (int i = 0; i < 16; i++)
        __builtin_prefetch(p + AMX_AHEAD + i * 64);
    return p;
}

/* 1 to 16 rows x four blocks, or one. */
static void AMX(strip)(const struct amx_job *j, unsigned block, bool four)
{
    const char *x = j->x;
    float *o = j->out + block * 16;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t s = 0; s < j->steps; s++, x += j->rows * 64) {
        TILE_LOAD(4, x, 64);
        TILE_LOAD(5, AMX(fetched)(j, block, s, 0), 64);
        TILE_DP(0, 4, 5);
        if (four) {
            TILE_LOAD(6, AMX(fetched)(j, block + 1, s, 1), 64);
            TILE_DP(1, 4, 6);
            TILE_LOAD(7, AMX(fetched)(j, block + 2, s, 0), 64);
            TILE_DP(2, 4, 7);
            TILE_LOAD(5, AMX(fetched)(j, block + 3, s, 1), 64);
            TILE_DP(3, 4, 5);
        }
    }
    TILE_STORE(0, o, j->ld);
    if (four) {
        TILE_STORE(1, o + 16, j->ld);
        TILE_STORE(2, o + 32, j->ld);
        TILE_STORE(3, o + 48, j->ld);
    }
}

void AMX(gemm)(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out)
{
    _Alignas(64) char pad[2048];
    struct amx_job j = { .x = x, .w = w, .rows = rows, .k2 = k2, .steps = (k2 + 15) / 16, .block_bytes = block_bytes, .out = out,
                         .ld = (size_t)blocks * 64, .pad = pad };
    AMX(config)(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 0);
    if (rows > 16)
        for (int64_t s0 = 0; s0 < j.steps; s0 += AMX_STEPS)
            for (unsigned b = 0; b < blocks; b += 2)
                AMX(square)(&j, b, b + 1 < blocks, s0, s0 + AMX_STEPS < j.steps ? s0 + AMX_STEPS : j.steps);
    else
        for (unsigned b = 0, n; b < blocks; b += n) {
            n = blocks - b >= 4 ? 4 : 1;
            AMX(strip)(&j, b, n == 4);
        }
    TILE_RELEASE();
}

/* kernels.peak: products of ones, 32 to every sum. */
float AMX(peak)(int64_t rounds, const float *start)
{
    enum { SUMS = 256 };
    _Alignas(64) float sum[AMX_CHAINS * SUMS];
    _Alignas(64) uint32_t ones[SUMS];
    float one = start[1];
    uint32_t half;
    memcpy(&half, &one, sizeof half);
    for (int i = 0; i < SUMS; i++)
        ones[i] = half | half >> 16;
    AMX(config)(16, 16);
    TILE_LOAD(0, start, 64);
    TILE_LOAD(1, start + SUMS, 64);
    TILE_LOAD(2, start + 2 * SUMS, 64);
    TILE_LOAD(3, start + 3 * SUMS, 64);
    TILE_LOAD(4, start + 4 * SUMS, 64);
    TILE_LOAD(5, start + 5 * SUMS, 64);
    TILE_LOAD(6, ones, 64);
    TILE_LOAD(7, ones, 64);
    for (int64_t i = 0; i < rounds; i++) {
        TILE_DP(0, 6, 7);
        TILE_DP(1, 6, 7);
        TILE_DP(2, 6, 7);
        TILE_DP(3, 6, 7);
        TILE_DP(4, 6, 7);
        TILE_DP(5, 6, 7);
    }
    TILE_STORE(0, sum, 64);
    TILE_STORE(1, sum + SUMS, 64);
    TILE_STORE(2, sum + 2 * SUMS, 64);
    TILE_STORE(3, sum + 3 * SUMS, 64);
    TILE_STORE(4, sum + 4 * SUMS, 64);
    TILE_STORE(5, sum + 5 * SUMS, 64);
    TILE_RELEASE();
    for (int i = 1; i < AMX_CHAINS * SUMS; i++)
        if (sum[i] - start[i] != sum[0] - start[0])
            return NAN;
    return sum[0] - start[0];
}
