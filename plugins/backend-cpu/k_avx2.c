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

static const struct kernels table = { .name = "avx2", FAST_PEAK, FAST_TABLE };

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
