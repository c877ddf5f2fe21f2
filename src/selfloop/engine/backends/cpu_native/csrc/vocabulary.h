// Rows of logits: their softmax, and draws from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace selfloop {

struct Softmax {
    float largest, sum;

    // What a logprob is less than its logit.
    float normaliser() const { return largest + std::log(sum); }
};

// The largest of n numbers, and the sum of their e^(x - largest), which `weights` get unless null.
template <typename T>
static inline Softmax soften_row(const float* x, int n, T* weights) {
    const auto at = [&](int j) { return load_first(x + j, n - j, -INFINITE); };
    f32x16 most = all(-INFINITE);
    for (int j = 0; j < n; j += LANES) most = larger(most, at(j));
    const float largest = largest_of(most);
    f32x16 sum = zero(), total = sum;
    for (int j = 0; j < n; j += LANES) {
        const f32x16 w = exp(at(j) - all(largest));
        if (weights) store_first(weights + j, n - j, w);
        sum = sum + w;
        // In parts: small terms would vanish beside a sum over a whole vocabulary.
        if (j % (64 * LANES) == 63 * LANES) total = total + sum, sum = zero();
    }
    return {largest, sum_of(total + sum)};
}

// The first of the largest.
static inline int64_t likeliest(const float* x, int n) { return std::max_element(x, x + n) - x; }

// The token whose share of the sum of e^((x - largest) / temperature) a number in [0, 1) falls into. Shares are
// float32, their sums over blocks of tokens, and over these, float64.
static inline int64_t drawn(const float* x, int n, float temperature, double uniform) {
    constexpr int BLOCK_TOKENS = 256;
    const auto at = [&](int j) { return load_first(x + j, n - j, -INFINITE); };
    f32x16 most = all(-INFINITE);
    for (int j = 0; j < n; j += LANES) most = larger(most, at(j));
    const f32x16 largest = all(largest_of(most)), by = all(temperature);
    const auto shares = [&](int j) { return exp((at(j) - largest) / by); };
    const auto block_sum = [&](int start) {
        const int stop = std::min(start + BLOCK_TOKENS, n);
        f64x8 sum;
        for (int j = start; j < stop; j += LANES) sum.add(shares(j));
        return sum.sum();
    };
    std::vector<double> until;  // the sum up to the end of each block
    double total = 0;
    for (int start = 0; start < n; start += BLOCK_TOKENS) until.push_back(total += block_sum(start));
    const double level = uniform * total;
    const size_t block = std::upper_bound(until.begin(), until.end(), level) - until.begin();
    double sum = block == 0 ? 0 : until[block - 1];
    int64_t last = 0;  // with a share
    for (int j = static_cast<int>(block) * BLOCK_TOKENS; j < n; j += LANES) {
        float share[LANES];
        store(share, shares(j));
        for (int i = 0; i < LANES && j + i < n; ++i) {
            if (share[i] > 0) last = j + i;
            sum += share[i];
            if (sum > level) return j + i;
        }
    }
    // Rounding alone leads here.
    return last;
}

}  // namespace selfloop
