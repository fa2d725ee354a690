/*
 * Scalar number formats: bf16, f16, e4m3, e8m0, e2m1, and rounding to the activation type. The vector forms live with the
 * kernels; both round to nearest even and agree bit for bit.
 */
#ifndef CPU_NUM_H
#define CPU_NUM_H

#include <arle/tensor.h>
#include <math.h>
#include <string.h>

static inline uint32_t f32_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float bits_f32(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline float bf16_to_f32(uint16_t h)
{
    return bits_f32((uint32_t)h << 16);
}

/** To nearest even; NaN stays NaN. */
static inline uint16_t f32_to_bf16(float x)
{
    uint32_t u = f32_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 0x3ff;
    if (e == 0)
        return bits_f32(sign | f32_bits((float)m * 0x1p-24f));
    if (e == 31)
        return bits_f32(sign | 0x7f800000u | m << 13);
    return bits_f32(sign | (e + 112) << 23 | m << 13);
}

/** To nearest even; overflow becomes infinity. */
static inline uint16_t f32_to_f16(float x)
{
    uint32_t u = f32_bits(x), a = u & 0x7fffffffu;
    uint16_t sign = (uint16_t)((u >> 16) & 0x8000);
    if (a > 0x7f800000u)
        return sign | 0x7e00;
    if (a >= 0x477ff000u)
        return sign | 0x7c00;
    if (a < 0x38800000u)        /* subnormal: count units of 2^-24 */
        return sign | (uint16_t)lrintf(bits_f32(a) * 0x1p24f);
    return sign | (uint16_t)((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13);
}

static inline float e4m3_to_f32(uint8_t b)
{
    uint32_t e = (b >> 3) & 15, m = b & 7;
    float v = e == 15 && m == 7 ? NAN : e == 0 ? (float)m * 0x1p-9f : bits_f32((e + 120) << 23 | m << 20);
    return b & 0x80 ? -v : v;
}

/** To nearest even, saturating at 448; NaN becomes 0x7f. */
static inline uint8_t f32_to_e4m3(float x)
{
    uint32_t u = f32_bits(x), a = u & 0x7fffffffu;
    uint8_t sign = (uint8_t)(u >> 24) & 0x80;
    if (a > 0x7f800000u)
        return sign | 0x7f;
    if (a >= 0x43e00000u)       /* 448 */
        return sign | 0x7e;
    if (a < 0x3c800000u)        /* below 2^-6: units of 2^-9 */
        return sign | (uint8_t)lrintf(bits_f32(a) * 0x1p9f);
    uint32_t r = (a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1)) >> 20;
    return sign | (uint8_t)(r > 0x7e ? 0x7e : r);
}

static inline float e8m0_to_f32(uint8_t b)
{
    return b == 255 ? NAN : b == 0 ? 0x1p-127f : bits_f32((uint32_t)b << 23);
}

static inline float e2m1_to_f32(unsigned nibble)
{
    static const float v[8] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6 };
    return nibble & 8 ? -v[nibble & 7] : v[nibble & 7];
}

/** Element i of an activation row. */
static inline float act_get(const void *p, uint32_t dtype, int64_t i)
{
    return dtype == ARLE_BF16 ? bf16_to_f32(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static inline void act_set(void *p, uint32_t dtype, int64_t i, float v)
{
    if (dtype == ARLE_BF16)
        ((uint16_t *)p)[i] = f32_to_bf16(v);
    else
        ((float *)p)[i] = v;
}

static inline float act_round(uint32_t dtype, float v)
{
    return dtype == ARLE_BF16 ? bf16_to_f32(f32_to_bf16(v)) : v;
}

static inline size_t act_size(uint32_t dtype)
{
    return dtype == ARLE_BF16 ? 2 : 4;
}

/** Address of element `i` of row `row`. */
static inline const void *act_at(const void *p, uint32_t dtype, int64_t row, int64_t ld, int64_t i)
{
    return (const char *)p + (size_t)(row * ld + i) * act_size(dtype);
}

static inline void *act_at_w(void *p, uint32_t dtype, int64_t row, int64_t ld, int64_t i)
{
    return (char *)p + (size_t)(row * ld + i) * act_size(dtype);
}

static inline float silu_f32(float x)
{
    return x / (1.0f + expf(-x));
}

static inline float sigmoid_f32(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

static inline float softplus_f32(float x)
{
    return x > 20.0f ? x : log1pf(expf(x));
}

#endif
