/*
 * Sixteen f32 lanes on AVX-512. vec_avx2.h offers the same names; k_fast.h is written against them.
 */
#ifndef CPU_VEC_H
#define CPU_VEC_H

#define VEC_ROWS 12             /* 12 rows x 2 blocks: 24 of 32 registers hold sums, the rest operands */
#define VEC_ACC 16              /* sums that a tile of attention scores keeps */
#define VEC_GDN 4               /* column vectors of a delta-net pass */
#define VEC_PV_Q 4              /* query vectors and value vectors of a tile of weighted values */
#define VEC_PV_D 4
#define VEC_BLOCKS(rows) ((rows) <= 3 ? 8u : (rows) <= 6 ? 4u : 2u)

typedef __m512 vf;

static INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
static INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
static INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static INLINE __mmask16 first_n(int64_t n) { return (__mmask16)((1u << n) - 1); }
static INLINE vf vf_loadn(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first_n(n), p); }
static INLINE void vf_storen(float *p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, first_n(n), a); }
static INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }     /* b when either is NaN */
static INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
static INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static INLINE vf vf_scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }

/* Two k of 16 columns of packed bf16 weights as f32. */
static INLINE void vf_load_pair(const void *p, vf *k0, vf *k1)
{
    __m512i w = _mm512_loadu_si512(p);
    *k0 = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    *k1 = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)));
}

static INLINE vf widen_bf16(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static INLINE __m256i narrow_bf16(vf a)
{
    __m512i u = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(r);
}

static INLINE vf vf_loadh(const uint16_t *p) { return widen_bf16(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
static INLINE vf vf_loadhn(const uint16_t *p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_n(n), p)); }
static INLINE void vf_storeh(uint16_t *p, vf a) { _mm256_storeu_si256((__m256i *)(void *)p, narrow_bf16(a)); }
static INLINE void vf_storehn(uint16_t *p, vf a, int64_t n) { _mm256_mask_storeu_epi16(p, first_n(n), narrow_bf16(a)); }
static INLINE vf vf_round_bf16(vf a) { return widen_bf16(narrow_bf16(a)); }

static INLINE vf vf_loadi8(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p))); }
static INLINE vf vf_bytes(__m128i b) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)); }

/* e4m3 bits moved under an f32 exponent and scaled by 2^120: subnormals come out right by themselves. */
static INLINE vf vf_loadf8(const void *p)
{
    __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(p));
    __m512i low = _mm512_and_si512(b, _mm512_set1_epi32(0x7f));
    __m512i bits = _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x80)), 24), _mm512_slli_epi32(low, 20));
    vf v = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
    return _mm512_mask_mov_ps(v, _mm512_cmpeq_epi32_mask(low, _mm512_set1_epi32(0x7f)), _mm512_set1_ps(NAN));
}

/* Lanes are folded in a fixed tree: 0+2, 1+3 of each quarter, then these, then quarters 0+2, 1+3, then these. */
static INLINE float vf_sum(vf a)
{
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
    a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    return _mm512_cvtss_f32(a);
}

static INLINE float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }

static INLINE vf sum_quarters(vf a, vf b, vf c, vf d)
{
    vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));     /* a02 b02 a13 b13 per quarter */
    vf cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));   /* a b c d per quarter */
}

/* out[i] = sum of the lanes of acc[i], i < VEC_ACC. */
static INLINE void vf_sums(const vf *acc, float *out)
{
    vf a = sum_quarters(acc[0], acc[1], acc[2], acc[3]), b = sum_quarters(acc[4], acc[5], acc[6], acc[7]);
    vf c = sum_quarters(acc[8], acc[9], acc[10], acc[11]), d = sum_quarters(acc[12], acc[13], acc[14], acc[15]);
    vf ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));      /* a02 a13 b02 b13 */
    vf cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    vf_store(out, _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd)));
}

/* p holds 16 groups of 4; out[j] gets member j of each. */
static INLINE void vf_load4(const float *p, vf out[4])
{
    vf z0 = vf_load(p), z1 = vf_load(p + 16), z2 = vf_load(p + 32), z3 = vf_load(p + 48);
    vf a = _mm512_shuffle_f32x4(z0, z1, 0x44), b = _mm512_shuffle_f32x4(z0, z1, 0xee);     /* quarters 0 1 | 2 3 of both */
    vf c = _mm512_shuffle_f32x4(z2, z3, 0x44), d = _mm512_shuffle_f32x4(z2, z3, 0xee);
    vf v0 = _mm512_shuffle_f32x4(a, c, 0x88), v1 = _mm512_shuffle_f32x4(a, c, 0xdd);
    vf v2 = _mm512_shuffle_f32x4(b, d, 0x88), v3 = _mm512_shuffle_f32x4(b, d, 0xdd);
    vf l01 = _mm512_unpacklo_ps(v0, v1), h01 = _mm512_unpackhi_ps(v0, v1);
    vf l23 = _mm512_unpacklo_ps(v2, v3), h23 = _mm512_unpackhi_ps(v2, v3);
    out[0] = _mm512_shuffle_ps(l01, l23, 0x44);
    out[1] = _mm512_shuffle_ps(l01, l23, 0xee);
    out[2] = _mm512_shuffle_ps(h01, h23, 0x44);
    out[3] = _mm512_shuffle_ps(h01, h23, 0xee);
}

/* By quadrant q (an integer as float): swap where odd, negate by its second bit and that of q + 1. */
static INLINE void vf_quadrant(vf q, vf s, vf c, vf *out_sin, vf *out_cos)
{
    __m512i i = _mm512_cvtps_epi32(q);
    __mmask16 odd = _mm512_test_epi32_mask(i, _mm512_set1_epi32(1));
    __m512i sign_s = _mm512_slli_epi32(_mm512_and_si512(i, _mm512_set1_epi32(2)), 30);
    __m512i sign_c = _mm512_slli_epi32(_mm512_and_si512(_mm512_add_epi32(i, _mm512_set1_epi32(1)), _mm512_set1_epi32(2)), 30);
    *out_sin = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_mask_mov_ps(s, odd, c)), sign_s));
    *out_cos = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_mask_mov_ps(c, odd, s)), sign_c));
}

/* bf16 of 32 packed E2M1 values, in the order of memory; sc holds exponents to add, times 128, in both halves of a column's lane. */
typedef __m512i vscale;
static INLINE vscale vf_fp4_scale(const uint8_t *scales)
{
    __m512i e = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)scales)),
                                                   _mm512_set1_epi32(127)), 7);
    return _mm512_or_si512(_mm512_and_si512(e, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(e, 16));
}

static INLINE void vf_fp4_row(const uint8_t *codes, vscale sc, uint16_t *out)
{
    const __m512i table = _mm512_castsi256_si512(_mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
        (short)0x8000, (short)0xbf00, (short)0xbf80, (short)0xbfc0, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0c0));
    __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)codes));
    __m512i at = _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi32(b, 12)), _mm512_set1_epi32(0x000f000f));
    __m512i v = _mm512_permutexvar_epi16(at, table);
    v = _mm512_mask_add_epi16(v, _mm512_test_epi16_mask(v, _mm512_set1_epi16(0x7fff)), v, sc);      /* zero has no exponent */
    _mm512_storeu_si512(out, v);
}

#endif
