/* gemm_wide: matrix products of many tokens on compute capability 9.0 with an epilogue of their own, and those of routed experts. */
#ifndef BACKEND_CUDA_GEMM_WIDE_CUH
#define BACKEND_CUDA_GEMM_WIDE_CUH

#include "gemm.cuh"

/* Tiles of routed experts, for the one who counts them: so many tokens at most, so many rows of W. */
enum { GEMM_WIDE_TOKENS = 256, GEMM_WIDE_SILU_ROWS = 128, GEMM_WIDE_PLAIN_ROWS = 256 };

/** Whether gemm_wide takes this product: GEMM_SILU or GEMM_BF16, rows of 16-byte pieces, no scale, not in deterministic mode. */
bool gemm_wide_fits(arle_device *dev, const gemm_args &a, int out);
/** A product that fits. With groups: GEMM_SILU takes its rows through src and stores in the order of the list; GEMM_BF16 the reverse. */
int gemm_wide(arle_device *dev, cudaStream_t st, const gemm_args &a, int out);

#endif
