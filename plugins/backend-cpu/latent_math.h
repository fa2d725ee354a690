/*
 * Row helpers of op_latent.c and of activation quantisation: widening loads, rounding stores, norms, rotation, and the
 * FP8 and FP4 grids. Pure functions on f32 rows; `dtype` is the activation type that results are rounded to.
 */
#ifndef BACKEND_CPU_LATENT_MATH_H
#define BACKEND_CPU_LATENT_MATH_H

#include <arle/ops.h>

/* n elements from element `at` of an act array to f32, and back with rounding to nearest even. */
void lat_load(uint32_t dtype, const void *src, size_t at, float *dst, size_t n);
void lat_store(uint32_t dtype, void *dst, size_t at, const float *src, size_t n);
/* Rounds f32 values to the grid of dtype in place (nothing for ARLE_F32). */
void lat_round(uint32_t dtype, float *x, size_t n);

/* x *= rsqrt(mean x^2 + eps) (* w when given), rounded. */
void lat_rmsnorm(uint32_t dtype, float *x, uint32_t n, float eps, const float *w);
/* Rotates neighbouring pairs of x[rot_dim] by f32(pos) * inv_freq[j]; inverse negates the angle; rounded. */
void lat_rope(uint32_t dtype, float *x, uint32_t rot_dim, int32_t pos, const float *inv_freq, uint32_t inverse);
/* enum arle_fake_quant of a head of n values whose last rot_dim stay as they are for ARLE_FQ_FP8. */
void lat_fake_quant(uint32_t dtype, float *x, uint32_t n, uint32_t rot_dim, uint32_t quant);

/* Nearest E4M3 value (ties to even), saturating at 448; NaN stays NaN. */
float lat_e4m3_round(float x);
/* Nearest E2M1 value (ties to even code), saturating at 6. */
float lat_e2m1_round(float x);
/* 2^ceil(log2(amax / top)), the power-of-two scale of a block; amax must be positive. inv_top = f32(1 / top). */
float lat_pow2_scale(float amax, float inv_top);
/* x <- e4m3(x / s) * s per block of `block` values, s = lat_pow2_scale(max(amax, 1e-4), 1/448). */
void lat_quant_fp8(float *x, size_t n, size_t block);
/* As above with E2M1, blocks of 32, amax floor 6 * 2^-126. */
void lat_quant_fp4(float *x, size_t n);
/* x <- H x / sqrt(n), n a power of two. */
void lat_hadamard(float *x, uint32_t n);

/* Scratch of the running part of lat_parallel: n floats, the same memory at every call. Callers check LAT_SCRATCH first. */
float *lat_scratch(size_t n);
#define LAT_SCRATCH ((size_t)5 << 20)   /* floats */
/* Splits [0, n) statically over the device's workers; cost_ns is about what one item takes. */
struct kernels;
typedef void (*lat_fn)(const struct kernels *k, void *arg, uint32_t i0, uint32_t i1);
int lat_parallel(struct arle_device *dev, uint32_t n, double cost_ns, lat_fn fn, void *arg);

#endif
