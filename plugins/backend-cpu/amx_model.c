/*
 * What AMX tile instructions do, in plain C after Intel's Software Developer's Manual (volume 2, TILELOADD, TDPBF16PS), with the kernel
 * compiled over it; and the check that the processor's own are held to. The model rounds as documented: products of even and of odd
 * members of the pairs are summed apart with fused multiply-adds from zero, then added to each other, then to the element; to nearest
 * even; subnormal numbers count as zero going in and coming out.
 */
#include "amx.h"
#include "num.h"

#include <float.h>
#include <stdio.h>
#include <stdlib.h>

struct amx_config;

static _Thread_local struct {
    unsigned char tile[8][16][64];
    unsigned rows[8], row_bytes[8];
    bool configured;
    unsigned faults;
} model;

static bool rule(bool kept)
{
    model.faults += !kept;
    return kept;
}

static void model_config(const void *config);

static void model_release(void)
{
    model.configured = false;
    memset(model.tile, 0xee, sizeof model.tile);        /* nobody may count on what was there */
}

static void model_zero(unsigned t)
{
    if (rule(model.configured))
        memset(model.tile[t], 0, sizeof model.tile[t]);
}

static void model_load(unsigned t, const void *p, size_t stride)
{
    if (!rule(model.configured))
        return;
    memset(model.tile[t], 0, sizeof model.tile[t]);
    for (unsigned r = 0; r < model.rows[t]; r++)
        memcpy(model.tile[t][r], (const char *)p + r * stride, model.row_bytes[t]);
}

static void model_store(unsigned t, void *p, size_t stride)
{
    if (!rule(model.configured))
        return;
    for (unsigned r = 0; r < model.rows[t]; r++)
        memcpy((char *)p + r * stride, model.tile[t][r], model.row_bytes[t]);
}

static float flushed(float x)
{
    return fabsf(x) < FLT_MIN ? copysignf(0, x) : x;
}

static float half_at(unsigned t, unsigned row, unsigned i)
{
    uint16_t h;
    memcpy(&h, model.tile[t][row] + 2 * i, sizeof h);
    return flushed(bf16_to_f32(h));
}

static void model_dp(unsigned c, unsigned a, unsigned b)
{
    if (!rule(model.configured && model.rows[a] == model.rows[c] && model.row_bytes[b] == model.row_bytes[c]
              && model.row_bytes[a] == 4 * model.rows[b] && a != b && a != c && b != c))
        return;
    for (unsigned m = 0; m < model.rows[c]; m++)
        for (unsigned n = 0; n < model.row_bytes[c] / 4; n++) {
            float even = 0, odd = 0, sum;
            for (unsigned k = 0; k < model.rows[b]; k++) {
                even = flushed(fmaf(half_at(a, m, 2 * k), half_at(b, k, 2 * n), even));
                odd = flushed(fmaf(half_at(a, m, 2 * k + 1), half_at(b, k, 2 * n + 1), odd));
            }
            memcpy(&sum, model.tile[c][m] + 4 * n, sizeof sum);
            sum = flushed(flushed(sum) + flushed(even + odd));
            memcpy(model.tile[c][m] + 4 * n, &sum, sizeof sum);
        }
}

#define AMX(name) amx_model_##name
#define TILE_CONFIG(c) model_config(c)
#define TILE_RELEASE() model_release()
#define TILE_ZERO(t) model_zero(t)
#define TILE_LOAD(t, p, stride) model_load(t, p, stride)
#define TILE_STORE(t, p, stride) model_store(t, p, stride)
#define TILE_DP(c, a, b) model_dp(c, a, b)
#include "k_amx.h"

static void model_config(const void *config)
{
    const struct amx_config *c = config;
    memset(model.tile, 0, sizeof model.tile);
    model.configured = rule(c->palette == 1 && c->start_row == 0);
    for (unsigned t = 0; t < 8; t++) {
        model.rows[t] = c->rows[t];
        model.row_bytes[t] = c->row_bytes[t];
        rule(c->rows[t] > 0 && c->rows[t] <= 16 && c->row_bytes[t] > 0 && c->row_bytes[t] <= 64 && c->row_bytes[t] % 4 == 0);
    }
}

unsigned amx_model_faults(void)
{
    return model.faults;
}

bool amx_model_released(void)
{
    return !model.configured;
}

/* ---- the check ------------------------------------------------------------------------------------------------------ */

enum { MAX_K2 = 300, MAX_STEPS = (MAX_K2 + 15) / 16, MAX_BLOCKS = 5 };

struct check {
    uint16_t x[AMX_ROWS][MAX_STEPS * 32];               /* zeros behind the last k */
    uint16_t w[MAX_BLOCKS][MAX_K2 * 32];
    uint16_t packed[MAX_STEPS * AMX_ROWS * 32];
    float one[AMX_ROWS][MAX_BLOCKS * 16], got[AMX_ROWS * MAX_BLOCKS * 16];
};

static void check_pack(struct check *c, unsigned row0, unsigned rows, int64_t k2)
{
    for (int64_t s = 0; s < (k2 + 15) / 16; s++)
        for (unsigned r = 0; r < rows; r++)
            memcpy(c->packed + (s * rows + r) * 32, c->x[row0 + r] + s * 32, 64);
}

static void check_fill(struct check *c, int64_t k2)
{
    uint64_t z = 7;
    memset(c, 0, sizeof *c);
    for (unsigned r = 0; r < AMX_ROWS; r++)
        for (int64_t i = 0; i < k2 * 2; i++) {
            z = z * 6364136223846793005u + 1442695040888963407u;
            c->x[r][i] = f32_to_bf16((float)(int32_t)(z >> 32) * 0x1p-31f);
        }
    for (unsigned b = 0; b < MAX_BLOCKS; b++)
        for (int64_t i = 0; i < k2 * 32; i++) {
            z = z * 6364136223846793005u + 1442695040888963407u;
            c->w[b][i] = f32_to_bf16((float)(int32_t)(z >> 32) * 0x1p-31f);
        }
}

/* One by one, against double: a swapped pair or a lost row is an error of the size of a term, rounding one of 1e-6. */
static bool check_values(struct check *c, amx_gemm_fn gemm, int64_t k2)
{
    for (unsigned r = 0; r < AMX_ROWS; r++) {
        check_pack(c, r, 1, k2);
        for (unsigned b = 0; b < MAX_BLOCKS; b++)
            gemm(c->packed, 1, k2, c->w[b], sizeof c->w[b], 1, c->one[r] + b * 16);
        for (unsigned n = 0; n < MAX_BLOCKS * 16; n++) {
            double sum = 0;
            for (int64_t i = 0; i < k2 * 2; i++)
                sum += (double)bf16_to_f32(c->x[r][i]) * bf16_to_f32(c->w[n / 16][(i / 2 * 16 + n % 16) * 2 + i % 2]);
            if (!(fabs(c->one[r][n] - sum) <= 2e-5))     /* up to 600 terms of 1/3 and less, sums stay below 30 */
                return false;
        }
    }
    return true;
}

static bool check_tilings(struct check *c, amx_gemm_fn gemm, int64_t k2)
{
    static const unsigned rows[] = { 2, 7, 15, 16, 17, 23, 31, 32 };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (unsigned blocks = 1; blocks <= MAX_BLOCKS; blocks++) {
            check_pack(c, AMX_ROWS - rows[i], rows[i], k2);
            gemm(c->packed, rows[i], k2, c->w, sizeof c->w[0], blocks, c->got);
            for (unsigned r = 0; r < rows[i]; r++)
                if (memcmp(c->got + r * blocks * 16, c->one[AMX_ROWS - rows[i] + r], blocks * 64) != 0)
                    return false;
        }
    return true;
}

const char *amx_check(amx_gemm_fn gemm)
{
    static const int64_t k2[] = { 1, 16, 37, 300 };
    const char *why = NULL;
    struct check *c = malloc(sizeof *c);
    if (c == NULL)
        return "no memory for the check";
    for (size_t i = 0; i < sizeof k2 / sizeof *k2 && why == NULL; i++) {
        check_fill(c, k2[i]);
        if (!check_values(c, gemm, k2[i]))
            why = "tile products differ from sums in double";
        else if (!check_tilings(c, gemm, k2[i]))
            why = "tile products depend on the tiling";
    }
    free(c);
    return why;
}
