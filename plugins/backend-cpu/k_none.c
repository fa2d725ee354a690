#include "cpu.h"
const struct kernels *kernels_avx2(void) { return NULL; }
const struct kernels *kernels_avx512(void) { return NULL; }
const struct kernels *kernels_avx512bf16(void) { return NULL; }
