// The body for AVX-512 (F, BW, VL, DQ), with or without its bfloat16 instructions. Included by simd.h.
#pragma once

#include <immintrin.h>

namespace selfloop {

constexpr int REGISTERS = 32, PARTS = 1;

using f32x16 = __m512;

static inline __mmask16 first_lanes(int n) {
    return n >= LANES ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

static inline f32x16 all(float x) { return _mm512_set1_ps(x); }

static inline f32x16 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// To nearest, ties to even; subnormal numbers become zero.
static inline __m256i narrow(f32x16 x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i exponent = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f800000));
    const __mmask16 tiny = _mm512_cmpeq_epi32_mask(exponent, _mm512_setzero_si512());
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i out = _mm512_mask_and_epi32(up, tiny, bits, _mm512_set1_epi32(static_cast<int>(0x80000000u)));
    out = _mm512_mask_or_epi32(out, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
#endif
}

static inline f32x16 round_to_bf16(f32x16 x) { return widen(narrow(x)); }

static inline f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
static inline f32x16 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x); }
static inline void store(bf16* p, f32x16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }

// The first n lanes; the others are `beyond`.
static inline f32x16 load_first(const float* p, int n, float beyond = 0.f) {
    return _mm512_mask_loadu_ps(all(beyond), first_lanes(n), p);
}
static inline void store_first(float* p, int n, f32x16 x) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
static inline void store_first(bf16* p, int n, f32x16 x) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x)); }

// x in the first n lanes, `beyond` in the others.
static inline f32x16 only_first(int n, f32x16 x, float beyond = 0.f) {
    return _mm512_mask_mov_ps(all(beyond), first_lanes(n), x);
}

// a b + c, a b - c, c - a b.
static inline f32x16 plus_product(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline f32x16 product_less(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmsub_ps(a, b, c); }
static inline f32x16 less_product(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fnmadd_ps(a, b, c); }

static inline f32x16 larger(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }

// The upper half of the lanes is added to the lower, and so on.
static inline float sum_of(f32x16 x) { return _mm512_reduce_add_ps(x); }
static inline float largest_of(f32x16 x) { return _mm512_reduce_max_ps(x); }

static inline float first_lane(f32x16 x) { return _mm512_cvtss_f32(x); }

static inline f32x16 nearest(f32x16 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
static inline f32x16 times_power(f32x16 y, f32x16 n) { return _mm512_scalef_ps(y, n); }
static inline f32x16 zero_below(f32x16 x, float limit, f32x16 y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, all(limit), _CMP_LT_OQ), _mm512_setzero_ps());
}

// Sixteen columns of row 2 k (S = 0) or 2 k + 1 of a panel, from where that pair of rows lies.
template <int S>
static inline f32x16 panel_row(const float* pair) {
    return load(pair + S * LANES);
}
template <int S>
static inline f32x16 panel_row(const bf16* pair) {
    const __m512i both = _mm512_loadu_si512(pair);
    return _mm512_castsi512_ps(S ? _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
                                 : _mm512_slli_epi32(both, 16));
}

// Two rows of sixteen columns as a pair of a panel.
static inline void store_pair(bf16* pair, const bf16* even, const bf16* odd) {
    const auto row = [](const bf16* r) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(r)));
    };
    _mm512_storeu_si512(pair, _mm512_or_si512(row(even), _mm512_slli_epi32(row(odd), 16)));
}

#ifdef __AVX512BF16__
// One instruction multiplies a pair of a row with the pairs of sixteen columns.
#define SELFLOOP_PAIR_PRODUCTS
using bf16_pairs = __m512bh;

static inline bf16_pairs load_pairs(const bf16* p) { return (bf16_pairs)_mm512_loadu_si512(p); }
static inline bf16_pairs all_pairs(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return (bf16_pairs)_mm512_set1_epi32(pair);
}
static inline f32x16 plus_products(bf16_pairs a, bf16_pairs b, f32x16 c) { return _mm512_dpbf16_ps(c, a, b); }
#endif

// Sums of float32 numbers in float64.
struct f64x8 {
    __m512d x = _mm512_setzero_pd();

    void add(f32x16 y) {
        x = _mm512_add_pd(x, _mm512_cvtps_pd(_mm512_castps512_ps256(y)));
        x = _mm512_add_pd(x, _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)));
    }
    double sum() const { return _mm512_reduce_add_pd(x); }
};

// Turns 16 rows of 16 lanes into their columns.
static inline void transpose(f32x16 (&r)[16]) {
    f32x16 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace selfloop
