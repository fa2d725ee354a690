/* The matrix kernel on AMX instructions, and whether this machine has them. */
#include "cpu.h"
#include "amx.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#endif

/* GCC's intrinsics are assembly that says too little of the memory it reads: what was stored before must be there, and what is stored
 * later must not be. */
#define SEEN(p) __asm__ volatile("" : : "r"(p) : "memory")

#define AMX(name) amx_##name
#define TILE_CONFIG(c) do { SEEN(c); _tile_loadconfig(c); SEEN(c); } while (0)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) do { const void *from_ = (p); SEEN(from_); _tile_loadd(t, from_, stride); SEEN(from_); } while (0)
#define TILE_STORE(t, p, stride) do { void *to_ = (p); _tile_stored(t, to_, stride); SEEN(to_); } while (0)
#define TILE_DP(c, a, b) _tile_dpbf16ps(c, a, b)
#include "k_amx.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define AMX_REQ_XCOMP_PERM 0x1023       /* ARCH_REQ_XCOMP_PERM of <asm/prctl.h>, since Linux 5.16 */
#define AMX_XTILEDATA 18
#define AMX_XCR0 (3u << 17)             /* tile configuration and tile data */

static uint32_t enabled_state(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

bool amx_usable(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & 1u << 27) == 0 || (enabled_state() & AMX_XCR0) != AMX_XCR0)
        return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & 1u << 24) == 0 || (d & 1u << 22) == 0)     /* AMX-TILE, AMX-BF16 */
        return false;
    return syscall(SYS_arch_prctl, AMX_REQ_XCOMP_PERM, AMX_XTILEDATA) == 0;     /* for all threads, those to come too */
}
#else
void amx_gemm(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out)
{
}

float amx_peak(int64_t rounds, const float *start)
{
    return NAN;
}

bool amx_usable(void)
{
    return false;
}
#endif
