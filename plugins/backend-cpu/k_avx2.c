/* The fast kernels for AVX2 and FMA. */
#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define INLINE inline __attribute__((always_inline))
#define FAST(name) avx2_##name
#include "vec_avx2.h"
#include "k_fast.h"

static void avx2_to_panel(const void *wp, int64_t k2, float *out)
{
    const char *w = wp;
    for (int64_t k = 0; k < k2; k++, w += 64, out += 2 * CPU_BLOCK) {
        vf k0, k1;
        vf_load_pair(w, &k0, &k1);
        vf_store(out, k0);
        vf_store(out + CPU_BLOCK, k1);
    }
}

/* Up to 6 rows x 16 columns. Weights that need no widening leave the two multiply-add units nothing else to do: 98 % of their rate
 * over first-level cache on one core of a Zen 3 server, 2026-11; with the shifts and masks of tile_f32_wbf16 it was 71 %. */
static INLINE void tile_panel(const float *x, unsigned rows, int64_t k2, const float *w, bool more, size_t ahead, float *out,
                              unsigned ld_out)
{
    vf acc[VEC_ROWS];
    UNROLL for (unsigned r = 0; r < rows; r++)
        acc[r] = more ? vf_load(out + r * ld_out) : vf_zero();
    for (int64_t k = 0; k < k2; k++) {
        __builtin_prefetch((const char *)x + ahead);
        UNROLL for (unsigned i = 0; i < 2; i++) {
            vf wk = vf_load(w + i * CPU_BLOCK);
            UNROLL for (unsigned r = 0; r < rows; r++)
                acc[r] = vf_fma(vf_set1(x[r * 2 + i]), wk, acc[r]);
        }
        w += 2 * CPU_BLOCK;
        x += rows * 2;
    }
    UNROLL for (unsigned r = 0; r < rows; r++)
        vf_store(out + r * ld_out, acc[r]);
}

typedef void (*panel_fn)(const float *x, int64_t k2, const float *w, bool more, size_t ahead, float *out, unsigned ld_out);

#define PANEL_FN(R) \
    static void panel_##R(const float *x, int64_t k2, const float *w, bool more, size_t ahead, float *out, unsigned ld_out) \
    { tile_panel(x, R, k2, w, more, ahead, out, ld_out); }
PANEL_FN(1) PANEL_FN(2) PANEL_FN(3) PANEL_FN(4) PANEL_FN(5) PANEL_FN(6)

/* The next tile's rows come from the third cache level: fetched during the first block, or each tile would begin with misses. */
static void avx2_gemm_panel(const float *x, unsigned rows, int64_t k2, const float *const *w, unsigned blocks, bool more, size_t ahead,
                            float *out)
{
    static const panel_fn tile[VEC_ROWS + 1] = { NULL, panel_1, panel_2, panel_3, panel_4, panel_5, panel_6 };
    for (unsigned b = 0; b < blocks; b++)
        tile[rows](x, k2, w[b], more, b == 0 ? ahead : 0, out + b * CPU_BLOCK, blocks * CPU_BLOCK);
}

static const struct kernels table = {
    .name = "avx2", .to_panel = avx2_to_panel, .gemm_panel = avx2_gemm_panel, .attn_f32 = true, FAST_PEAK, FAST_TABLE
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const struct kernels *kernels_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &table : NULL;
}
#else
const struct kernels *kernels_avx2(void)
{
    return NULL;
}
#endif
