// Sixteen float32 lanes at a time, and what is bfloat16 in memory. All that depends on the CPU is here: a body with
// AVX-512 registers, and one whose lanes lie in several registers (AVX2 with FMA, NEON, or what the compiler has).
//
// Sums and products are the same operations in the same order in each, but for two: without FMA a product is rounded
// before it is added, and only AVX512-BF16 multiplies pairs of bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace selfloop {

using bf16 = uint16_t;

constexpr int LANES = 16;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// For what would be called with its lanes in memory where they are several registers.
#define ALWAYS_INLINE static inline __attribute__((always_inline))

static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Have a cache line brought from memory meanwhile, as near as it goes or one cache farther.
static inline void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }
static inline void fetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace selfloop

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#else
#include "simd_parts.h"
#endif

namespace selfloop {

static inline f32x16 zero() { return all(0.f); }

static inline float widen_one(float x) { return x; }
static inline float widen_one(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// What a number is once it is stored as T.
template <typename T>
static inline f32x16 rounded(f32x16 x) {
    if constexpr (sizeof(T) == sizeof(float))
        return x;
    else
        return round_to_bf16(x);
}

template <typename T>
static inline T narrow_one(float x) {
    T out[LANES];
    store(out, all(x));
    return out[0];
}

// e^x within 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]; exactly 1 at 0 and 0 below -104.
ALWAYS_INLINE f32x16 exp(f32x16 x) {
    const f32x16 n = nearest(x * all(1.44269504f));
    f32x16 r = less_product(n, all(0.693359375f), x);
    r = less_product(n, all(-2.12194440e-4f), r);
    f32x16 y = all(1.f / 5040);
    for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = plus_product(y, r, all(c));
    return zero_below(x, -104.f, times_power(y, n));
}

ALWAYS_INLINE f32x16 sigmoid(f32x16 x) { return all(1.f) / (all(1.f) + exp(zero() - x)); }

}  // namespace selfloop
