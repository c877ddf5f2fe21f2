// Rows of logits: their softmax, and draws from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace selfloop {

struct Softmax {
    float largest, sum;

    // What a logprob is less than its logit.
    float normaliser() const { return largest + std::log(sum); }
};

// The largest of n numbers, and the sum of their e^(x - largest), which `weights` get unless null.
static inline Softmax soften_row(const float* x, int n, bf16* weights) {
    const f32x16 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const auto load = [&](int j) { return _mm512_mask_loadu_ps(least, first_lanes(n - j), x + j); };
    f32x16 most = least;
    for (int j = 0; j < n; j += LANES) most = _mm512_max_ps(most, load(j));
    const float largest = _mm512_reduce_max_ps(most);
    f32x16 sum = _mm512_setzero_ps(), total = sum;
    for (int j = 0; j < n; j += LANES) {
        const f32x16 w = exp_ps(_mm512_sub_ps(load(j), _mm512_set1_ps(largest)));
        if (weights) _mm256_mask_storeu_epi16(weights + j, first_lanes(n - j), narrow(w));
        sum = _mm512_add_ps(sum, w);
        // In parts: small terms would vanish beside a sum over a whole vocabulary.
        if (j % (64 * LANES) == 63 * LANES) total = _mm512_add_ps(total, sum), sum = _mm512_setzero_ps();
    }
    return {largest, _mm512_reduce_add_ps(_mm512_add_ps(total, sum))};
}

// The first of the largest.
static inline int64_t likeliest(const float* x, int n) { return std::max_element(x, x + n) - x; }

// The token whose share of the sum of e^((x - largest) / temperature) a number in [0, 1) falls into. Shares are
// float32, their sums over blocks of tokens, and over these, float64.
static inline int64_t drawn(const float* x, int n, float temperature, double uniform) {
    constexpr int BLOCK_TOKENS = 256;
    const f32x16 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    f32x16 most = least;
    for (int j = 0; j < n; j += LANES)
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(least, first_lanes(n - j), x + j));
    const f32x16 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most)), by = _mm512_set1_ps(temperature);
    const auto shares = [&](int j) {
        return exp_ps(
            _mm512_div_ps(_mm512_sub_ps(_mm512_mask_loadu_ps(least, first_lanes(n - j), x + j), largest), by));
    };
    const auto block_sum = [&](int start) {
        const int stop = std::min(start + BLOCK_TOKENS, n);
        __m512d sum = _mm512_setzero_pd();
        for (int j = start; j < stop; j += LANES) {
            const f32x16 y = shares(j);
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(y)));
            sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)));
        }
        return _mm512_reduce_add_pd(sum);
    };
    std::vector<double> until;  // the sum up to the end of each block
    double total = 0;
    for (int start = 0; start < n; start += BLOCK_TOKENS) until.push_back(total += block_sum(start));
    const double level = uniform * total;
    const size_t block = std::upper_bound(until.begin(), until.end(), level) - until.begin();
    double sum = block == 0 ? 0 : until[block - 1];
    int64_t last = 0;  // with a share
    for (int j = static_cast<int>(block) * BLOCK_TOKENS; j < n; j += LANES) {
        alignas(64) float share[LANES];
        _mm512_store_ps(share, shares(j));
        for (int i = 0; i < LANES && j + i < n; ++i) {
            if (share[i] > 0) last = j + i;
            sum += share[i];
            if (sum > level) return j + i;
        }
    }
    // Rounding alone leads here.
    return last;
}

static inline bf16 narrow_one(float x) {
    alignas(32) bf16 out[LANES];
    store_bf16(out, _mm512_set1_ps(x));
    return out[0];
}

}  // namespace selfloop
