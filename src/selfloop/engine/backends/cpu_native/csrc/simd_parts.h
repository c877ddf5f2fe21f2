// The body whose sixteen lanes lie in several registers: AVX2 with FMA, NEON, or what the compiler makes of vectors of
// four. Included by simd.h.
#pragma once

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace selfloop {

// PART lanes are a register.
#if defined(__AVX2__) && defined(__FMA__)
constexpr int REGISTERS = 16, PART = 8;
#elif defined(__ARM_NEON)
constexpr int REGISTERS = 32, PART = 4;
#else
constexpr int REGISTERS = 16, PART = 4;
#endif

constexpr int PARTS = LANES / PART;

typedef float part __attribute__((vector_size(PART * 4)));
typedef int32_t int_part __attribute__((vector_size(PART * 4)));
typedef float quarter __attribute__((vector_size(16)));

// c + a b, and the largest of each pair of numbers: rounded once where the CPU can.
static inline part fused(part a, part b, part c) {
#if defined(__AVX2__) && defined(__FMA__)
    return (part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (part)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

static inline part larger(part a, part b) {
#if defined(__AVX2__) && defined(__FMA__)
    return (part)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

struct f32x16 {
    part p[PARTS];
};

template <typename Each>
static inline f32x16 each_part(const Each& each) {
    f32x16 y;
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; ++i) y.p[i] = each(i);
    return y;
}

static inline f32x16 operator+(f32x16 a, f32x16 b) {
    return each_part([&](int i) { return a.p[i] + b.p[i]; });
}
static inline f32x16 operator-(f32x16 a, f32x16 b) {
    return each_part([&](int i) { return a.p[i] - b.p[i]; });
}
static inline f32x16 operator*(f32x16 a, f32x16 b) {
    return each_part([&](int i) { return a.p[i] * b.p[i]; });
}
static inline f32x16 operator/(f32x16 a, f32x16 b) {
    return each_part([&](int i) { return a.p[i] / b.p[i]; });
}

static inline f32x16 all(float x) {
    return each_part([&](int) { return x - part{}; });
}

// a b + c, a b - c, c - a b.
static inline f32x16 plus_product(f32x16 a, f32x16 b, f32x16 c) {
    return each_part([&](int i) { return fused(a.p[i], b.p[i], c.p[i]); });
}
static inline f32x16 product_less(f32x16 a, f32x16 b, f32x16 c) {
    return each_part([&](int i) { return fused(a.p[i], b.p[i], -c.p[i]); });
}
static inline f32x16 less_product(f32x16 a, f32x16 b, f32x16 c) {
    return each_part([&](int i) { return fused(-a.p[i], b.p[i], c.p[i]); });
}

static inline f32x16 larger(f32x16 a, f32x16 b) {
    return each_part([&](int i) { return larger(a.p[i], b.p[i]); });
}

// Part by part: a copy of the whole would keep it in memory.
static inline f32x16 load(const float* p) {
    return each_part([&](int i) {
        part y;
        std::memcpy(&y, p + i * PART, sizeof y);
        return y;
    });
}
static inline void store(float* p, f32x16 x) {
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; ++i) std::memcpy(p + i * PART, &x.p[i], sizeof x.p[i]);
}

static inline f32x16 load(const bf16* p) {
    f32x16 y;
    uint32_t bits[LANES];
    for (int i = 0; i < LANES; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&y, bits, sizeof y);
    return y;
}

// Bits whose upper half is the number to nearest, ties to even; subnormal numbers become zero.
static inline int_part round_part(part x) {
    const int_part bits = (int_part)x;
    const int_part up = bits + 0x7fff + ((bits >> 16) & 1);
    const int_part tiny = (bits & 0x7f800000) == 0, nan = x != x;
    const int_part out = (tiny & bits & INT32_MIN) | (~tiny & up);
    return ((nan & (bits | 0x400000)) | (~nan & out)) & static_cast<int32_t>(0xffff0000u);
}
static inline f32x16 round_to_bf16(f32x16 x) {
    return each_part([&](int i) { return (part)round_part(x.p[i]); });
}
static inline void store(bf16* p, f32x16 x) {
    const f32x16 y = round_to_bf16(x);
    uint32_t bits[LANES];
    std::memcpy(bits, &y, sizeof y);
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<bf16>(bits[i] >> 16);
}

// x in the first n lanes, `beyond` in the others.
static inline f32x16 only_first(int n, f32x16 x, float beyond = 0.f) {
    if (n >= LANES) return x;
    float lanes[LANES];
    store(lanes, x);
    for (int i = std::max(n, 0); i < LANES; ++i) lanes[i] = beyond;
    return load(lanes);
}

// The first n lanes; the others are `beyond`.
static inline f32x16 load_first(const float* p, int n, float beyond = 0.f) {
    if (n >= LANES) return load(p);
    float lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = i < n ? p[i] : beyond;
    return load(lanes);
}
template <typename T>
static inline void store_first(T* p, int n, f32x16 x) {
    if (n >= LANES) return store(p, x);
    T lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// The upper half of the lanes is added to the lower, and so on.
static inline float sum_of(f32x16 x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
static inline float largest_of(f32x16 x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

static inline float first_lane(f32x16 x) { return x.p[0][0]; }

// To the nearest whole number. What is as large as 2^22 stays as it is or becomes another number as large.
static inline f32x16 nearest(f32x16 x) {
    constexpr float shift = 12582912.f;  // 1.5 * 2^23: what is beside it has no fraction
    return each_part([&](int i) { return (x.p[i] + shift) - shift; });
}

// y 2^n, in two steps as a power alone may be beyond float32.
static inline f32x16 times_power(f32x16 y, f32x16 n) {
    return each_part([&](int i) {
        part at = n.p[i];
        at = at < -252.f ? -252.f - part{} : at;
        at = at > 254.f ? 254.f - part{} : at;
        const int_part whole = __builtin_convertvector(at, int_part), half = whole >> 1;
        return y.p[i] * (part)((half + 127) << 23) * (part)((whole - half + 127) << 23);
    });
}
static inline f32x16 zero_below(f32x16 x, float limit, f32x16 y) {
    return each_part([&](int i) { return (part)((int_part)y.p[i] & ~(int_part)(x.p[i] < limit)); });
}

// Sixteen columns of row 2 k (S = 0) or 2 k + 1 of a panel, from where that pair of rows lies.
template <int S>
static inline f32x16 panel_row(const float* pair) {
    return load(pair + S * LANES);
}
template <int S>
static inline f32x16 panel_row(const bf16* pair) {
    return each_part([&](int i) {
        int_part both;
        std::memcpy(&both, pair + i * 2 * PART, sizeof both);
        return (part)(S ? both & static_cast<int32_t>(0xffff0000u) : both << 16);
    });
}

// Two rows of sixteen columns as a pair of a panel.
static inline void store_pair(bf16* pair, const bf16* even, const bf16* odd) {
    for (int j = 0; j < LANES; ++j) pair[2 * j] = even[j], pair[2 * j + 1] = odd[j];
}

// Sums of float32 numbers in float64.
struct f64x8 {
    double x[LANES / 2] = {};

    void add(f32x16 y) {
        float lanes[LANES];
        store(lanes, y);
        for (int i = 0; i < LANES / 2; ++i) x[i] = (x[i] + lanes[i]) + lanes[i + LANES / 2];
    }
    double sum() const {
        double y[LANES / 2];
        std::copy_n(x, LANES / 2, y);
        for (int half = LANES / 4; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) y[i] += y[i + half];
        return y[0];
    }
};

// Turns 16 rows of 16 lanes into their columns, in squares of four.
static inline void transpose(f32x16 (&r)[16]) {
    quarter from[16][4], to[16][4];
    static_assert(sizeof from == sizeof r);
    std::memcpy(from, r, sizeof from);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const quarter a = from[4 * i][j], b = from[4 * i + 1][j], c = from[4 * i + 2][j], d = from[4 * i + 3][j];
            const quarter ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            const quarter ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            const quarter cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            const quarter cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            to[4 * j][i] = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
            to[4 * j + 1][i] = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
            to[4 * j + 2][i] = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
            to[4 * j + 3][i] = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
        }
    std::memcpy(r, to, sizeof to);
}

}  // namespace selfloop
