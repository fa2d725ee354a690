/* The fast kernels for AVX-512, and the tiles of the bf16 dot instruction where the machine has it. */
#include "cpu.h"
#include "amx.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
#define INLINE inline __attribute__((always_inline))
#define FAST(name) avx512_##name
#include "vec_avx512.h"
#include "k_fast.h"

/* Products of two bf16 pairs per lane and step; x is [k2][rows] pairs, the weights are as they lie in memory. */
static INLINE void tile_bf16_wbf16(const uint32_t *x, unsigned rows, int64_t k2, const char *w, size_t block_bytes, unsigned blocks,
                                   float *out, unsigned ld_out)
{
    vf acc[VEC_ROWS * 8];
    UNROLL for (unsigned i = 0; i < rows * blocks; i++)
        acc[i] = vf_zero();
    for (int64_t k = 0; k < k2; k++) {
        __m512bh wv[8];
        UNROLL for (unsigned b = 0; b < blocks; b++) {
            wv[b] = (__m512bh)_mm512_loadu_si512(w + b * block_bytes);
            if (rows == 1)
                __builtin_prefetch(w + b * block_bytes + PREFETCH_AHEAD);
        }
        UNROLL for (unsigned r = 0; r < rows; r++) {
            __m512bh xv = (__m512bh)_mm512_set1_epi32((int)x[r]);
            UNROLL for (unsigned b = 0; b < blocks; b++)
                acc[r * blocks + b] = _mm512_dpbf16_ps(acc[r * blocks + b], xv, wv[b]);
        }
        w += 64;
        x += rows;
    }
    UNROLL for (unsigned i = 0; i < rows * blocks; i++)
        vf_store(out + i / blocks * ld_out + i % blocks * CPU_BLOCK, acc[i]);
}

GEMM(gemm_bf16_wbf16, tile_bf16_wbf16, uint32_t)

/* The bf16 dot instruction may take six cycles and start twice in each: 24 chains, of 32 registers. */
static float FAST(peak_bf16)(int64_t rounds, const float *start)
{
    enum { CHAINS = 24 };
    vf acc[CHAINS];
    __m512bh one = (__m512bh)_mm512_set1_epi32((int)(f32_to_bf16(start[1]) * 0x10001u));
    UNROLL for (unsigned i = 0; i < CHAINS; i++)
        acc[i] = vf_load(start + 16 * i);
    for (int64_t k = 0; k < rounds; k++)
        UNROLL for (unsigned i = 0; i < CHAINS; i++)
            acc[i] = _mm512_dpbf16_ps(acc[i], one, one);
    return peak_end(acc, CHAINS, start);
}

static const struct kernels table = { .name = "avx512", FAST_PEAK, FAST_TABLE };
static const struct kernels table_bf16 = {
    .name = "avx512bf16", .bf16_dot = true, .gemm_bf16_wbf16 = FAST(gemm_bf16_wbf16),
    .peak = FAST(peak_bf16), .peak_flop = 24 * 16 * 4, .peak_step = 2, FAST_TABLE
};
static const struct kernels table_amx = {
    .name = "avx512bf16+amx", .bf16_dot = true, .bf16_rows = AMX_ROWS, .bf16_blocks = AMX_BLOCKS, .gemm_bf16_wbf16 = amx_gemm,
    .peak = amx_peak, .peak_flop = AMX_CHAINS * 16 * 16 * 32 * 2, .peak_step = 32, FAST_TABLE
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const struct kernels *kernels_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") ? &table : NULL;
}

const struct kernels *kernels_avx512bf16(void)
{
    return kernels_avx512() != NULL && __builtin_cpu_supports("avx512bf16") ? &table_bf16 : NULL;
}

const struct kernels *kernels_amx(const char **why)
{
    *why = NULL;
    if (kernels_avx512bf16() == NULL || !amx_usable())
        return NULL;
    *why = amx_check(amx_gemm);
    return *why == NULL ? &table_amx : NULL;
}
#else
const struct kernels *kernels_avx512(void)
{
    return NULL;
}

const struct kernels *kernels_avx512bf16(void)
{
    return NULL;
}

const struct kernels *kernels_amx(const char **why)
{
    *why = NULL;
    return NULL;
}
#endif
