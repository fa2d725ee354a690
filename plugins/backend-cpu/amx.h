/*
 * Matrix tiles of AMX. The kernel (k_amx.h) is written over a thin layer of tile operations and compiled twice: over the
 * instructions (k_amx.c), and over a model of what their documentation says (amx_model.c), which every machine can run.
 */
#ifndef CPU_AMX_H
#define CPU_AMX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define AMX_ROWS 32             /* rows of a full tile of a product: two tiles high, two wide, so a load serves two products */
#define AMX_BLOCKS 8            /* column blocks to hand over at once */
#define AMX_CHAINS 6            /* of amx_peak: latency is about 52 cycles, a product starts every 16 (Intel's optimisation manual) */

/* Activations are packed as [ceil(k2 / 16)][rows][16][2] with zeros behind the last k, weights as kernels.gemm_bf16_wbf16 has them. */
typedef void (*amx_gemm_fn)(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out);

/* The instructions. Call only when amx_usable() said so. */
void amx_gemm(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out);
float amx_peak(int64_t rounds, const float *start);

/** Whether build, processor and system have AMX-TILE and AMX-BF16. Asks the system for tile data on the process's behalf. */
bool amx_usable(void);

/* The model. Breaking a rule that the processor would answer with a fault is counted instead. */
void amx_model_gemm(const void *x, unsigned rows, int64_t k2, const void *w, size_t block_bytes, unsigned blocks, float *out);
float amx_model_peak(int64_t rounds, const float *start);
unsigned amx_model_faults(void);        /* of this thread so far */
bool amx_model_released(void);          /* no tile state is left behind */

/**
 * Multiplies small matrices with `gemm`, in many tilings, and compares: every tiling bit for bit with rows and blocks one by one, and all
 * with sums in double. Returns NULL, or what was wrong. Any thread; takes a few milliseconds.
 */
const char *amx_check(amx_gemm_fn gemm);

#endif
