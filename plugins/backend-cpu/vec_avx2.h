/*
 * Sixteen f32 lanes as two AVX2 registers. The same names as vec_avx512.h.
 */
#ifndef CPU_VEC_H
#define CPU_VEC_H

#define VEC_ROWS 6              /* 6 rows x 1 block: 12 of 16 registers hold sums */
#define VEC_ACC 4               /* vf_sums adds four */
#define VEC_GDN 2
#define VEC_PV_Q 2
#define VEC_PV_D 2
#define VEC_BLOCKS(rows) ((rows) <= 1 ? 4u : (rows) <= 3 ? 2u : 1u)

typedef struct { __m256 a, b; } vf;

#define VF(x, y) ((vf) { (x), (y) })
static INLINE vf vf_set1(float x) { return VF(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static INLINE vf vf_zero(void) { return VF(_mm256_setzero_ps(), _mm256_setzero_ps()); }
static INLINE vf vf_load(const float *p) { return VF(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
static INLINE vf vf_loadn(const float *p, int64_t n)
{
    float t[16] = { 0 };
    memcpy(t, p, (size_t)n * sizeof *t);
    return vf_load(t);
}
static INLINE void vf_storen(float *p, vf v, int64_t n)
{
    float t[16];
    vf_store(t, v);
    memcpy(p, t, (size_t)n * sizeof *t);
}
static INLINE vf vf_add(vf x, vf y) { return VF(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
static INLINE vf vf_sub(vf x, vf y) { return VF(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
static INLINE vf vf_mul(vf x, vf y) { return VF(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
static INLINE vf vf_div(vf x, vf y) { return VF(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
static INLINE vf vf_min(vf x, vf y) { return VF(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
static INLINE vf vf_max(vf x, vf y) { return VF(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
static INLINE vf vf_fma(vf x, vf y, vf z) { return VF(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
static INLINE vf vf_fnma(vf x, vf y, vf z) { return VF(_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)); }
#define VEC_ROUND8(x) _mm256_round_ps((x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
static INLINE vf vf_round(vf x) { return VF(VEC_ROUND8(x.a), VEC_ROUND8(x.b)); }

/* x * 2^n for |n| < 250, in two steps so that neither factor leaves the range. */
static INLINE __m256 scale8(__m256 x, __m256 n)
{
    __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
    __m256i bias = _mm256_set1_epi32(127);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
static INLINE vf vf_scale2(vf x, vf n) { return VF(scale8(x.a, n.a), scale8(x.b, n.b)); }

static INLINE void vf_load_pair(const void *p, vf *k0, vf *k1)
{
    __m256i x = _mm256_loadu_si256(p), y = _mm256_loadu_si256((const __m256i *)p + 1), high = _mm256_set1_epi32((int)0xffff0000);
    *k0 = VF(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)));
    *k1 = VF(_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(y, high)));
}

static INLINE __m256 widen8(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }

static INLINE __m256i narrow8(__m256 x)      /* bf16 in the low half of each lane */
{
    __m256i u = _mm256_castps_si256(x), hi = _mm256_srli_epi32(u, 16), odd = _mm256_and_si256(hi, _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_or_si256(hi, _mm256_set1_epi32(0x40)), nan);
}

static INLINE vf vf_loadh(const uint16_t *p)
{
    return VF(widen8(_mm_loadu_si128((const __m128i *)(const void *)p)), widen8(_mm_loadu_si128((const __m128i *)(const void *)(p + 8))));
}
static INLINE vf vf_loadhn(const uint16_t *p, int64_t n)
{
    uint16_t t[16] = { 0 };
    memcpy(t, p, (size_t)n * sizeof *t);
    return vf_loadh(t);
}
static INLINE void vf_storeh(uint16_t *p, vf v)
{
    __m256i packed = _mm256_packus_epi32(narrow8(v.a), narrow8(v.b));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
static INLINE void vf_storehn(uint16_t *p, vf v, int64_t n)
{
    uint16_t t[16];
    vf_storeh(t, v);
    memcpy(p, t, (size_t)n * sizeof *t);
}
static INLINE vf vf_round_bf16(vf v)
{
    return VF(_mm256_castsi256_ps(_mm256_slli_epi32(narrow8(v.a), 16)), _mm256_castsi256_ps(_mm256_slli_epi32(narrow8(v.b), 16)));
}

static INLINE vf vf_bytes(__m128i b)
{
    return VF(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))));
}
static INLINE vf vf_loadi8(const void *p) { return vf_bytes(_mm_loadu_si128(p)); }

static INLINE __m256 f8_lanes(__m256i b)
{
    __m256i low = _mm256_and_si256(b, _mm256_set1_epi32(0x7f));
    __m256i bits = _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(b, _mm256_set1_epi32(0x80)), 24), _mm256_slli_epi32(low, 20));
    __m256 v = _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f));
    __m256 nan = _mm256_castsi256_ps(_mm256_cmpeq_epi32(low, _mm256_set1_epi32(0x7f)));
    return _mm256_blendv_ps(v, _mm256_set1_ps(NAN), nan);
}
static INLINE vf vf_loadf8(const void *p)
{
    __m128i b = _mm_loadu_si128(p);
    return VF(f8_lanes(_mm256_cvtepu8_epi32(b)), f8_lanes(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))));
}

static INLINE float vf_sum(vf v)
{
    __m256 x = _mm256_add_ps(v.a, v.b);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

static INLINE float vf_hmax(vf v)
{
    __m256 x = _mm256_max_ps(v.a, v.b);
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

static INLINE __m128 half_sum(vf v)
{
    __m256 x = _mm256_add_ps(v.a, v.b);
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}

/* Four sums side by side, each added in the order of vf_sum. */
static INLINE void vf_sums(const vf *acc, float *out)
{
    __m128 a = half_sum(acc[0]), b = half_sum(acc[1]), c = half_sum(acc[2]), d = half_sum(acc[3]);
    __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));       /* a02 b02 a13 b13 */
    __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

static INLINE void load4_half(const float *p, __m256 out[4])
{
    __m256 y0 = _mm256_loadu_ps(p), y1 = _mm256_loadu_ps(p + 8), y2 = _mm256_loadu_ps(p + 16), y3 = _mm256_loadu_ps(p + 24);
    __m256 v0 = _mm256_permute2f128_ps(y0, y2, 0x20), v1 = _mm256_permute2f128_ps(y0, y2, 0x31);
    __m256 v2 = _mm256_permute2f128_ps(y1, y3, 0x20), v3 = _mm256_permute2f128_ps(y1, y3, 0x31);
    __m256 l01 = _mm256_unpacklo_ps(v0, v1), h01 = _mm256_unpackhi_ps(v0, v1);
    __m256 l23 = _mm256_unpacklo_ps(v2, v3), h23 = _mm256_unpackhi_ps(v2, v3);
    out[0] = _mm256_shuffle_ps(l01, l23, 0x44);
    out[1] = _mm256_shuffle_ps(l01, l23, 0xee);
    out[2] = _mm256_shuffle_ps(h01, h23, 0x44);
    out[3] = _mm256_shuffle_ps(h01, h23, 0xee);
}

static INLINE void vf_load4(const float *p, vf out[4])
{
    __m256 lo[4], hi[4];
    load4_half(p, lo);
    load4_half(p + 32, hi);
    for (int i = 0; i < 4; i++)
        out[i] = VF(lo[i], hi[i]);
}

static INLINE void quadrant8(__m256 q, __m256 s, __m256 c, __m256 *out_sin, __m256 *out_cos)
{
    __m256i i = _mm256_cvtps_epi32(q), one = _mm256_set1_epi32(1), two = _mm256_set1_epi32(2);
    __m256 odd = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(i, one), one));
    __m256i sign_s = _mm256_slli_epi32(_mm256_and_si256(i, two), 30);
    __m256i sign_c = _mm256_slli_epi32(_mm256_and_si256(_mm256_add_epi32(i, one), two), 30);
    *out_sin = _mm256_xor_ps(_mm256_blendv_ps(s, c, odd), _mm256_castsi256_ps(sign_s));
    *out_cos = _mm256_xor_ps(_mm256_blendv_ps(c, s, odd), _mm256_castsi256_ps(sign_c));
}
static INLINE void vf_quadrant(vf q, vf s, vf c, vf *out_sin, vf *out_cos)
{
    quadrant8(q.a, s.a, c.a, &out_sin->a, &out_cos->a);
    quadrant8(q.b, s.b, c.b, &out_sin->b, &out_cos->b);
}

typedef struct { __m128i q[4]; } vscale;      /* see vec_avx512.h; four columns each */
static INLINE vscale vf_fp4_scale(const uint8_t *scales)
{
    vscale out;
    for (int i = 0; i < 4; i++) {
        int32_t four;
        memcpy(&four, scales + 4 * i, sizeof four);
        __m128i e = _mm_slli_epi32(_mm_sub_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)), _mm_set1_epi32(127)), 7);
        out.q[i] = _mm_or_si128(_mm_and_si128(e, _mm_set1_epi32(0xffff)), _mm_slli_epi32(e, 16));
    }
    return out;
}

static INLINE __m128i fp4_scaled(__m128i v, __m128i sc)
{
    __m128i zero = _mm_cmpeq_epi16(_mm_and_si128(v, _mm_set1_epi16(0x7fff)), _mm_setzero_si128());
    return _mm_add_epi16(v, _mm_andnot_si128(zero, sc));
}

static INLINE void vf_fp4_row(const uint8_t *codes, vscale sc, uint16_t *out)
{
    const __m128i high = _mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, (char)0x80, (char)0xbf, (char)0xbf, (char)0xbf,
                                       (char)0xc0, (char)0xc0, (char)0xc0, (char)0xc0);
    const __m128i low = _mm_setr_epi8(0, 0, (char)0x80, (char)0xc0, 0, 0x40, (char)0x80, (char)0xc0, 0, 0, (char)0x80, (char)0xc0, 0,
                                      0x40, (char)0x80, (char)0xc0);
    __m128i b = _mm_loadu_si128((const __m128i *)(const void *)codes), mask = _mm_set1_epi8(15);
    __m128i even = _mm_and_si128(b, mask), odd = _mm_and_si128(_mm_srli_epi16(b, 4), mask), *o = (__m128i *)(void *)out;
    __m128i eh = _mm_shuffle_epi8(high, even), el = _mm_shuffle_epi8(low, even);
    __m128i oh = _mm_shuffle_epi8(high, odd), ol = _mm_shuffle_epi8(low, odd);
    __m128i e0 = _mm_unpacklo_epi8(el, eh), e1 = _mm_unpackhi_epi8(el, eh), o0 = _mm_unpacklo_epi8(ol, oh), o1 = _mm_unpackhi_epi8(ol, oh);
    _mm_storeu_si128(o, fp4_scaled(_mm_unpacklo_epi16(e0, o0), sc.q[0]));
    _mm_storeu_si128(o + 1, fp4_scaled(_mm_unpackhi_epi16(e0, o0), sc.q[1]));
    _mm_storeu_si128(o + 2, fp4_scaled(_mm_unpacklo_epi16(e1, o1), sc.q[2]));
    _mm_storeu_si128(o + 3, fp4_scaled(_mm_unpackhi_epi16(e1, o1), sc.q[3]));
}

#endif
