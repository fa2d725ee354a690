/* See latent_math.h. */
#include "latent_math.h"
#include "cpu.h"


_Static_assert(LAT_SCRATCH * sizeof(float) <= CPU_THREAD_SCRATCH, "latent ops work in the scratch of their thread");

static _Thread_local float *part_scratch;

struct lat_job {
    struct arle_device *dev;
    uint32_t n;
    lat_fn fn;
    void *arg;
};

static void lat_part(void *arg, unsigned part, unsigned n_parts)
{
    const struct lat_job *j = arg;
    part_scratch = thread_scratch(j->dev, part);
    j->fn(j->dev->k, j->arg, (uint32_t)part_begin(j->n, part, n_parts), (uint32_t)part_begin(j->n, part + 1, n_parts));
}

int lat_parallel(struct arle_device *dev, uint32_t n, double cost_ns, lat_fn fn, void *arg)
{
    struct lat_job j = { dev, n, fn, arg };
    if (n > 0)
        run_parts(dev, n * cost_ns, lat_part, &j);
    return 0;
}

float *lat_scratch(size_t n)
{
    return n <= LAT_SCRATCH ? part_scratch : NULL;
}

void lat_load(uint32_t dtype, const void *src, size_t at, float *dst, size_t n)
{
    if (dtype == ARLE_F32) {
        memcpy(dst, (const float *)src + at, n * sizeof *dst);
        return;
    }
    const uint16_t *s = (const uint16_t *)src + at;
    for (size_t i = 0; i < n; i++)
        dst[i] = bf16_to_f32(s[i]);
}

void lat_store(uint32_t dtype, void *dst, size_t at, const float *src, size_t n)
{
    if (dtype == ARLE_F32) {
        memcpy((float *)dst + at, src, n * sizeof *src);
        return;
    }
    uint16_t *d = (uint16_t *)dst + at;
    for (size_t i = 0; i < n; i++)
        d[i] = f32_to_bf16(src[i]);
}

void lat_round(uint32_t dtype, float *x, size_t n)
{
    if (dtype == ARLE_F32)
        return;
    for (size_t i = 0; i < n; i++)
        x[i] = bf16_to_f32(f32_to_bf16(x[i]));
}

void lat_rmsnorm(uint32_t dtype, float *x, uint32_t n, float eps, const float *w)
{
    float sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    float r = 1.0f / sqrtf(sum / (float)n + eps);
    for (uint32_t i = 0; i < n; i++)
        x[i] = w ? w[i] * (x[i] * r) : x[i] * r;
    lat_round(dtype, x, n);
}

void lat_rope(uint32_t dtype, float *x, uint32_t rot_dim, int32_t pos, const float *inv_freq, uint32_t inverse)
{
    for (uint32_t j = 0; j < rot_dim / 2; j++) {
        float angle = (float)pos * inv_freq[j], c = cosf(angle), s = inverse ? -sinf(angle) : sinf(angle);
        float a = x[2 * j], b = x[2 * j + 1];
        x[2 * j] = a * c - b * s;
        x[2 * j + 1] = a * s + b * c;
    }
    lat_round(dtype, x, rot_dim);
}

/* Adding 1.5 * 2^k to a small f32 and taking it away again rounds to multiples of 2^(k - 23), to nearest even. */
static inline float round_to_step(float x, float magic)
{
    return (x + magic) - magic;
}

float lat_e4m3_round(float x)
{
    float m = fabsf(x);
    if (!(m < 448.0f))
        return isnan(x) ? x : copysignf(448.0f, x);
    if (m < 0x1p-6f)
        return copysignf(round_to_step(m, 0x1.8p14f), x);       /* subnormals step by 2^-9 */
    uint32_t u = f32_bits(x);                                   /* three mantissa bits */
    u = (u + 0x7ffffu + (u >> 20 & 1)) & ~0xfffffu;
    return bits_f32(u);
}

float lat_e2m1_round(float x)
{
    float m = fabsf(x);
    m = m < 6.0f ? m : 6.0f;
    return copysignf(m < 2.0f ? round_to_step(m, 0x1.8p22f) : m < 4.0f ? round_to_step(m, 0x1.8p23f) : round_to_step(m, 0x1.8p24f), x);
}

float lat_pow2_scale(float amax, float inv_top)
{
    uint32_t b;
    float t = amax * inv_top;
    memcpy(&b, &t, sizeof b);
    int e = (int)(b >> 23 & 255) - 127 + ((b & 0x7fffff) != 0);
    return ldexpf(1.0f, e);
}

void lat_quant_fp8(float *x, size_t n, size_t block)
{
    for (size_t at = 0; at < n; at += block) {
        size_t len = n - at < block ? n - at : block;
        float amax = 1e-4f;
        for (size_t i = 0; i < len; i++)
            amax = fmaxf(amax, fabsf(x[at + i]));
        float s = lat_pow2_scale(amax, 1.0f / 448.0f), inv = 1.0f / s;      /* powers of two: exact */
        for (size_t i = 0; i < len; i++)
            x[at + i] = lat_e4m3_round(x[at + i] * inv) * s;
    }
}

void lat_quant_fp4(float *x, size_t n)
{
    for (size_t at = 0; at < n; at += 32) {
        size_t len = n - at < 32 ? n - at : 32;
        float amax = ldexpf(6.0f, -126);
        for (size_t i = 0; i < len; i++)
            amax = fmaxf(amax, fabsf(x[at + i]));
        float s = lat_pow2_scale(amax, 1.0f / 6.0f), inv = 1.0f / s;
        for (size_t i = 0; i < len; i++)
            x[at + i] = lat_e2m1_round(x[at + i] * inv) * s;
    }
}

void lat_hadamard(float *x, uint32_t n)
{
    for (uint32_t h = 1; h < n; h *= 2)
        for (uint32_t i = 0; i < n; i += 2 * h)
            for (uint32_t j = i; j < i + h; j++) {
                float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    float s = 1.0f / sqrtf((float)n);
    for (uint32_t i = 0; i < n; i++)
        x[i] *= s;
}

void lat_fake_quant(uint32_t dtype, float *x, uint32_t n, uint32_t rot_dim, uint32_t quant)
{
    if (quant == ARLE_FQ_FP8) {
        lat_quant_fp8(x, n - rot_dim, 64);
    } else if (quant == ARLE_FQ_FP4_HADAMARD) {
        lat_hadamard(x, n);
        lat_round(dtype, x, n);
        lat_quant_fp4(x, n);
    }
    lat_round(dtype, x, n);
}
