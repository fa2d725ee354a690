/*
 * The AMX matrix kernel over the model of its instructions, on every machine: layout, edges, odd sizes, the documented arithmetic, and the
 * same bits in every tiling; then the backend's own driver with this kernel in its table. Where the machine has AMX, the instructions
 * are held to the same check. Links the plugin's own objects.
 */
#include "../../plugins/backend-cpu/amx.h"
#include "../../plugins/backend-cpu/cpu.h"
#include "tap.h"

#include <float.h>
#include <stdlib.h>

static void the_kernel_passes_its_check(void)
{
    const char *why = amx_check(amx_model_gemm);
    if (why != NULL)
        TAP_FAIL("%s", why);
    EXPECT_EQ(amx_model_faults(), 0);
    EXPECT(amx_model_released());
}

/* Kernels as they must not be: what a wrong layout, a lost row or a wrong instruction would give. */
static void pairs_swapped(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out)
{
    size_t n = (size_t)(k2 + 15) / 16 * 16 * rows * 2;
    uint16_t *t = malloc(n * sizeof *t);
    for (size_t i = 0; i < n; i++)
        t[i] = ((const uint16_t *)x)[i ^ 1];
    amx_model_gemm(t, rows, k2, w, block_bytes, blocks, out);
    free(t);
}

static void last_pairs_lost(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out)
{
    if (k2 < 16)
        amx_model_gemm(x, rows, k2, w, block_bytes, blocks, out);
    else
        amx_model_gemm(x, rows, k2 / 16 * 16, w, block_bytes, blocks, out);
}

static void last_row_odd(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out)
{
    amx_model_gemm(x, rows, k2, w, block_bytes, blocks, out);
    if (rows == 31)
        out[30 * blocks * 16 + 3] = nextafterf(out[30 * blocks * 16 + 3], 100);
}

static void the_check_sees_wrong_kernels(void)
{
    EXPECT(amx_check(pairs_swapped) != NULL);
    EXPECT(amx_check(last_pairs_lost) != NULL);
    EXPECT_STR(amx_check(last_row_odd), "tile products depend on the tiling");
}

static float flush(float x)
{
    return fabsf(x) < FLT_MIN ? copysignf(0, x) : x;
}

/* The chain of one element as the manual has it, written apart from the model. */
static float chain(const uint16_t *x, const uint16_t *w, int64_t k2, int64_t w_step)
{
    float sum = 0;
    for (int64_t s = 0; s < k2; s += 16) {
        float part[2] = { 0, 0 };
        for (int64_t i = s; i < s + 16; i++)
            for (int j = 0; j < 2; j++) {
                float a = i < k2 ? flush(bf16_to_f32(x[2 * i + j])) : 0, b = i < k2 ? flush(bf16_to_f32(w[i * w_step + j])) : 0;
                part[j] = flush(fmaf(a, b, part[j]));
            }
        sum = flush(sum + flush(part[0] + part[1]));
    }
    return sum;
}

/* Values from subnormal to large, of both signs, so that order, flushing and rounding show. */
static void the_arithmetic_is_the_documented_one(void)
{
    enum { K2 = 53, STEPS = 4, ROWS = 19, BLOCKS = 3 };
    static uint16_t x[ROWS][STEPS * 32], packed[STEPS * ROWS * 32], w[BLOCKS][K2 * 32];
    static float out[ROWS * BLOCKS * 16];
    uint64_t z = 3;
    for (int small = 0; small < 2; small++) {
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < K2 * 2; i++) {
                z = z * 6364136223846793005u + 1442695040888963407u;
                x[r][i] = (uint16_t)((z >> 48 & 0x807f) | ((small ? z >> 40 & 3 : 112 + (z >> 40) % 30) << 7));
            }
        for (int b = 0; b < BLOCKS; b++)
            for (int i = 0; i < K2 * 32; i++) {
                z = z * 6364136223846793005u + 1442695040888963407u;
                w[b][i] = (uint16_t)((z >> 48 & 0x807f) | ((112 + (z >> 40) % 30) << 7));
            }
        for (int s = 0; s < STEPS; s++)
            for (int r = 0; r < ROWS; r++)
                memcpy(packed + (s * ROWS + r) * 32, x[r] + s * 32, 64);
        amx_model_gemm(packed, ROWS, K2, w, sizeof w[0], BLOCKS, out);
        unsigned zeros = 0;
        for (int r = 0; r < ROWS; r++)
            for (int n = 0; n < BLOCKS * 16; n++) {
                float want = chain(x[r], w[n / 16] + n % 16 * 2, K2, 32);
                EXPECT_EQ(f32_bits(out[r * BLOCKS * 16 + n]), f32_bits(want));
                zeros += want == 0;
            }
        EXPECT(zeros < ROWS * BLOCKS * 16 / 4);
    }
    memset(packed, 0, sizeof packed);
    packed[0] = 0x0040;                 /* 2^-127 counts as zero, whatever it meets */
    w[0][0] = 0x7f00;
    amx_model_gemm(packed, 1, 1, w, sizeof w[0], 1, out);
    EXPECT_EQ(f32_bits(out[0]), 0);
    EXPECT_EQ(amx_model_faults(), 0);
}

static void the_ceiling_adds_up(void)
{
    float start[AMX_CHAINS * 256];
    for (int i = 0; i < AMX_CHAINS * 256; i++)
        start[i] = (float)i;
    EXPECT(amx_model_peak(3, start) == 96);
    EXPECT(amx_model_released());
    if (amx_usable())
        EXPECT(amx_peak(65536, start) == 65536 * 32);
}

static void the_instructions_pass_the_check(void)
{
    if (!amx_usable()) {
        printf("# this machine has no AMX: only the model ran\n");
        return;
    }
    const char *why = amx_check(amx_gemm);
    if (why != NULL)
        TAP_FAIL("%s", why);
}

/* ---- the driver ----------------------------------------------------------------------------------------------------- */

enum { ROWS = 70 };

static uint16_t *halves(uint64_t seed, int64_t n)
{
    uint16_t *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        x[i] = f32_to_bf16((float)(int32_t)(seed >> 32) * 0x1p-31f);
    }
    return x;
}

static uint64_t counted(struct arle_device *dev, const char *name)
{
    struct arle_counter c[N_COUNTERS];
    uint32_t n = cpu_api.counters(dev, c, N_COUNTERS);
    for (uint32_t i = 0; i < n; i++)
        if (strcmp(c[i].name, name) == 0)
            return c[i].value;
    return 0;
}

/* Rows together, in groups and alone give the same bits, near the sums in double. */
static void product(struct arle_device *dev, int64_t n, int64_t k)
{
    static const uint32_t counts[] = { ROWS, 33, 32, 17, 16, 5, 1 };
    uint16_t *x = halves(5, ROWS * k), *wd = halves(6, n * k);
    float *whole = calloc((size_t)(ROWS * n), 4), *y = calloc((size_t)(ROWS * n), 4);
    struct arle_tensor t = { .name = "w", .dtype = ARLE_BF16, .n_dims = 2, .dim = { n, k }, .data = wd, .bytes = (size_t)(n * k) * 2 };
    struct arle_weight_part p = { .t = &t, .n_rows = n, .scale2 = 1 };
    struct arle_weight_desc d = { .struct_size = sizeof d, .role = ARLE_W_LINEAR, .n_experts = 1, .n_parts = 1, .parts = &p, .k = k, .name = "w" };
    struct arle_weight *w = NULL;
    REQUIRE(cpu_weight_create(dev, &d, &w, NULL) == 0);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (uint32_t r = 0; r + counts[i] <= ROWS; r += counts[i]) {
            struct arle_linear_args a = { .dtype = ARLE_BF16, .out_dtype = ARLE_F32, .n_tokens = counts[i], .x = x + r * k, .ld_x = k, .w = w,
                                          .y = i == 0 ? whole : y, .ld_y = n };
            EXPECT_EQ(cpu_linear(dev, NULL, &a), 0);
            EXPECT(i == 0 || memcmp(y, whole + r * n, (size_t)(counts[i] * n) * 4) == 0);
        }
    for (int64_t i = 0; i < ROWS * n; i++) {
        double sum = 0;
        for (int64_t c = 0; c < k; c++)
            sum += (double)bf16_to_f32(x[i / n * k + c]) * bf16_to_f32(wd[i % n * k + c]);
        EXPECT_NEAR(whole[i], sum, 1e-4);       /* 1100 terms of 1 and less */
    }
    cpu_weight_destroy(dev, w);
    free(x);
    free(wd);
    free(whole);
    free(y);
}

static void the_driver_feeds_it(void)
{
    struct arle_err err = ARLE_ERR_INIT;
    struct kernels k = kernels_ref;
    struct cpu_ctx cx = { .k = &k };
    struct arle_device *dev = NULL;
    k.bf16_dot = true;
    k.bf16_rows = AMX_ROWS;
    k.bf16_blocks = AMX_BLOCKS;
    k.gemm_bf16_wbf16 = amx_model_gemm;
    REQUIRE(pool_create(2, false, &cx.pool, &err) == 0);
    cx.n_threads = pool_threads(cx.pool);
    REQUIRE(cpu_api.open_device(&cx, 0, &dev, &err) == 0);
    product(dev, 83, 259);
    product(dev, 40, 1100);
    product(dev, 150, 64);              /* a single row lies packed already */
    product(dev, 1, 1);
    EXPECT(counted(dev, "linear_amx") > 0);
    EXPECT_EQ(counted(dev, "linear_avx512bf16") + counted(dev, "linear_ref"), 0);
    EXPECT_EQ(amx_model_faults(), 0);
    cpu_api.close_device(dev);
    pool_destroy(cx.pool);
}

int main(void)
{
    RUN(the_kernel_passes_its_check);
    RUN(the_check_sees_wrong_kernels);
    RUN(the_arithmetic_is_the_documented_one);
    RUN(the_ceiling_adds_up);
    RUN(the_instructions_pass_the_check);
    RUN(the_driver_feeds_it);
    return tap_done();
}
