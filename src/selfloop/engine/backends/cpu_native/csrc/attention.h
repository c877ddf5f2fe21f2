// Causal attention: queries against keys and values in pages of 16 tokens, and its gradient.
//
// A page holds the keys of one group as a panel over head_dim, and its values as panels over the 16 tokens. Keys are
// met in blocks of 64 from the first on, so that a row's sums do not depend on which rows are computed with it.
#pragma once

#include <algorithm>
#include <cmath>

#include "gemm.h"

namespace selfloop {

constexpr int PAGE = 16;
constexpr int BLOCK = 64;
constexpr int MAX_HEAD_DIM = 256;

// Keys and values of one layer.
template <typename T>
struct Pages {
    T* data;
    int64_t page_stride, group_stride;
    int head_dim;

    T* keys(int page, int group) const { return data + page * page_stride + group * group_stride; }
    T* values(int page, int group) const { return keys(page, group) + PAGE * head_dim; }

    // Have a page's keys and values brought from memory meanwhile.
    void fetch_page(int page, int group) const {
        const char* at = reinterpret_cast<const char*>(keys(page, group));
        for (size_t line = 0; line < 2 * PAGE * head_dim * sizeof(T); line += 64) fetch(at + line);
    }

    void write(int page, int slot, int group, const T* k, const T* v) const {
        T *kt = keys(page, group), *vt = values(page, group);
        for (int i = 0; i < head_dim; ++i) kt[panel_at<T>(i, slot)] = k[i];
        for (int j = 0; j < head_dim; ++j) vt[(j / LANES) * (PAGE / 2) * PAIR + panel_at<T>(slot, j % LANES)] = v[j];
    }
};

// Up to 64 queries of one group: row i stands at position + step * i and sees the keys up to there.
template <typename T>
struct Queries {
    const T* q;
    int64_t ldq;
    int rows, position, step;
    T* out;
    int64_t ldo;
    float* lse;  // log of the sum of e^score; not wanted when null
    int64_t ld_lse;
};

template <typename T>
struct alignas(64) AttendScratch {
    float scores[BLOCK * BLOCK];
    float sums[BLOCK * MAX_HEAD_DIM];
    T weights[BLOCK * BLOCK];
    float largest[BLOCK], total[BLOCK];
};

template <int M, int V, typename T>
NOT_INLINE void weigh_tile(const T* p, const T* const* pages, int num_pages, int panel0, float* sums, int ld) {
    f32x16 acc[M][V];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = zero();
    for (int page = 0; page < num_pages; ++page) {
        const T* panels[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) panels[v] = pages[page] + (panel0 + v) * (PAGE / 2) * PAIR;
        for (int k = 0; k < PAGE / 2; ++k) add_pair<M, V>(acc, p + page * PAGE + 2 * k, BLOCK, panels, k * PAIR);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* c = sums + m * ld + (panel0 + v) * LANES;
            store(c, load(c) + acc[m][v]);
        }
}

// sums (rows, head_dim) += weights (rows, 16 * num_pages) times the values of these pages.
template <typename T>
static inline void weigh(const T* weights, int rows, const T* const* pages, int num_pages, int head_dim, float* sums) {
    in_tiles(rows, [&](int, int, int begin, int end) {
        of_rows(end - begin, [&](auto m) {
            constexpr int M = decltype(m)::value;
            in_panels<M>(head_dim / LANES, [&](auto v, int first) {
                constexpr int V = decltype(v)::value;
                weigh_tile<M, V>(weights + begin * BLOCK, pages, num_pages, first, sums + begin * head_dim, head_dim);
            });
        });
    });
}

// A row of scores becomes weights relative to the largest score so far; returns what earlier sums are to be scaled by.
template <typename T>
static inline float soften(const float* scores, int width, int num_visible, float scale, float& largest, float& total,
                           T* weights) {
    f32x16 s[BLOCK / LANES], most = all(-INFINITE);
    for (int i = 0; i < width / LANES; ++i) {
        s[i] = only_first(num_visible - i * LANES, load(scores + i * LANES) * all(scale), -INFINITE);
        most = larger(most, s[i]);
    }
    const float now = std::max(largest, largest_of(most));
    const float rescale = first_lane(exp(all(largest - now)));
    f32x16 sum = zero();
    for (int i = 0; i < width / LANES; ++i) {
        const f32x16 w = exp(s[i] - all(now));
        sum = sum + w;
        store(weights + i * LANES, w);
    }
    total = total * rescale + sum_of(sum);
    largest = now;
    return rescale;
}

template <typename T>
NOT_INLINE void attend(const Queries<T>& r, const Pages<T>& cache, const int32_t* table, int group, float scale,
                       AttendScratch<T>& s) {
    const int d = cache.head_dim, num_keys = r.position + r.step * (r.rows - 1) + 1;
    std::fill_n(s.largest, r.rows, -INFINITE);
    std::fill_n(s.total, r.rows, 0.f);
    std::fill_n(s.sums, r.rows * d, 0.f);
    const int all_pages = (num_keys + PAGE - 1) / PAGE;
    for (int page = 0; page < std::min(all_pages, BLOCK / PAGE); ++page) cache.fetch_page(table[page], group);
    for (int start = 0; start < num_keys; start += BLOCK) {
        for (int page = start / PAGE + BLOCK / PAGE; page < std::min(all_pages, (start + 2 * BLOCK) / PAGE); ++page)
            cache.fetch_page(table[page], group);
        const int num_pages = std::min(BLOCK / PAGE, (num_keys - start + PAGE - 1) / PAGE);
        const T *keys[BLOCK / PAGE], *values[BLOCK / PAGE];
        for (int i = 0; i < num_pages; ++i) {
            const int page = table[start / PAGE + i];
            keys[i] = cache.keys(page, group), values[i] = cache.values(page, group);
        }
        multiply_panels(r.q, r.ldq, r.rows, keys, num_pages, d / 2, Target<T>::set(s.scores, BLOCK), 0, 0);
        for (int i = 0; i < r.rows; ++i) {
            const int num_visible = r.position + r.step * i - start + 1;
            const float rescale = soften(s.scores + i * BLOCK, num_pages * PAGE, num_visible, scale, s.largest[i],
                                         s.total[i], s.weights + i * BLOCK);
            if (rescale == 1.f) continue;
            for (float* at = s.sums + i * d; at < s.sums + (i + 1) * d; at += LANES) store(at, load(at) * all(rescale));
        }
        weigh(s.weights, r.rows, values, num_pages, d, s.sums);
    }
    for (int i = 0; i < r.rows; ++i) {
        const f32x16 total = all(s.total[i]);
        for (int j = 0; j < d; j += LANES) store(r.out + i * r.ldo + j, load(s.sums + i * d + j) / total);
        if (r.lse) r.lse[i * r.ld_lse] = s.largest[i] + std::log(s.total[i]);
    }
}

// One head of one sequence: rows of what the forward had, float32 rows of what the gradients are.
template <typename T>
struct HeadGrad {
    int length, head_dim;
    float scale;
    const T *q, *k, *v, *out, *d_out;
    int64_t ld_qkv, ld_out;
    const float* lse;
    int64_t ld_lse;
    float *dq, *dk, *dv;
    int64_t ld_grad;
};

template <typename T>
static inline int64_t head_grad_scratch(int length, int head_dim) {
    const int64_t rows = round_up(length, BLOCK);
    return 5 * rows * head_dim * sizeof(T) + rows * sizeof(float) +
           BLOCK * BLOCK * (2 * sizeof(float) + 3 * sizeof(T)) + 64;
}

// P = e^(scale q k^T - lse), dP = d_out v^T, dS = scale P (dP - sum(d_out out)); dq = dS k, dk = dS^T q, dv = P^T
// d_out. Dao, FlashAttention-2 (https://arxiv.org/abs/2307.08691), algorithm 2.
template <typename T>
NOT_INLINE void attend_backward(const HeadGrad<T>& g, char* scratch) {
    const int d = g.head_dim, n = g.length, padded = round_up(n, BLOCK), blocks = padded / BLOCK;
    const int64_t panels_size = static_cast<int64_t>(padded) * d;
    float* delta = reinterpret_cast<float*>(scratch);
    float *scores = delta + padded, *d_weights = scores + BLOCK * BLOCK;
    T* weights_t = reinterpret_cast<T*>(d_weights + BLOCK * BLOCK);
    T *ds = weights_t + BLOCK * BLOCK, *ds_t = ds + BLOCK * BLOCK;
    // Over head_dim: keys and values as columns. Over tokens: dimensions as columns, block by block of 64 tokens.
    T *k_cols = ds_t + BLOCK * BLOCK, *v_cols = k_cols + panels_size;
    T *k_rows = v_cols + panels_size, *q_rows = k_rows + panels_size, *do_rows = q_rows + panels_size;
    pack_panels(g.k, g.ld_qkv, 1, n, d, k_cols, 0, padded / LANES);
    pack_panels(g.v, g.ld_qkv, 1, n, d, v_cols, 0, padded / LANES);
    for (int b = 0; b < blocks; ++b) {
        const int at = b * BLOCK, num = std::min(BLOCK, n - at);
        const int64_t to = static_cast<int64_t>(b) * BLOCK * d;
        // Of a block with fewer tokens the rest must be zero, not absent: panels have 32 pairs.
        if (num < BLOCK)
            for (T* x : {k_rows, q_rows, do_rows}) std::fill_n(x + to, BLOCK * d, T{0});
        const auto pack = [&](const T* x, int64_t ld, T* out) {
            if (num == BLOCK) return pack_panels(x + at * ld, 1, ld, d, BLOCK, out + to, 0, d / LANES);
            for (int j = 0; j < d; ++j)
                for (int t = 0; t < num; ++t)
                    out[to + (j / LANES) * (BLOCK / 2) * PAIR + panel_at<T>(t, j % LANES)] = x[(at + t) * ld + j];
        };
        pack(g.k, g.ld_qkv, k_rows), pack(g.q, g.ld_qkv, q_rows), pack(g.d_out, g.ld_out, do_rows);
    }
    for (int i = 0; i < n; ++i) {
        f32x16 sum = zero();
        for (int j = 0; j < d; j += LANES)
            sum = plus_product(load(g.out + i * g.ld_out + j), load(g.d_out + i * g.ld_out + j), sum);
        delta[i] = sum_of(sum);
        for (float* x : {g.dq, g.dk, g.dv}) std::fill_n(x + i * g.ld_grad, d, 0.f);
    }
    const int64_t rows_size = static_cast<int64_t>(BLOCK) * d;
    for (int kb = 0; kb < blocks; ++kb)
        for (int qb = kb; qb < blocks; ++qb) {
            const int k0 = kb * BLOCK, q0 = qb * BLOCK;
            const int num_q = std::min(BLOCK, n - q0), num_k = std::min(BLOCK, n - k0);
            const int panels = (num_k + LANES - 1) / LANES;
            const auto against = [&](const T* x, int64_t ld, const T* columns, float* to) {
                const T* at[BLOCK / LANES];
                for (int p = 0; p < panels; ++p) at[p] = columns + static_cast<int64_t>(k0 + p * LANES) * d;
                multiply_panels(x + q0 * ld, ld, num_q, at, panels, d / 2, Target<T>::set(to, BLOCK), 0, 0);
            };
            against(g.q, g.ld_qkv, k_cols, scores);
            against(g.d_out, g.ld_out, v_cols, d_weights);
            const f32x16 scale = all(g.scale);
            for (int c = 0; c < BLOCK; c += LANES)
                for (int t = 0; t < BLOCK; t += LANES) {
                    f32x16 p[LANES], s[LANES];
                    for (int i = 0; i < LANES; ++i) {
                        const int row = t + i;
                        const int visible = row < num_q ? std::min(q0 + row - k0 + 1, num_k) - c : 0;
                        if (visible <= 0) {
                            p[i] = s[i] = zero();
                        } else {
                            const f32x16 lse = all(g.lse[(q0 + row) * g.ld_lse]);
                            const f32x16 x = load(scores + row * BLOCK + c);
                            p[i] = only_first(visible, exp(product_less(x, scale, lse)));
                            const f32x16 dp = load(d_weights + row * BLOCK + c);
                            const f32x16 less = dp - all(delta[q0 + row]);
                            s[i] = only_first(visible, p[i] * less * scale);
                        }
                        store(ds + row * BLOCK + c, s[i]);
                    }
                    transpose(p), transpose(s);
                    for (int i = 0; i < LANES; ++i) {
                        store(weights_t + (c + i) * BLOCK + t, p[i]);
                        store(ds_t + (c + i) * BLOCK + t, s[i]);
                    }
                }
            const auto add = [&](const T* x, int rows, const T* tokens, float* to, int at) {
                multiply(x, BLOCK, 0, rows, tokens, 0, d / LANES, BLOCK / 2,
                         Target<T>::add(to + at * g.ld_grad, g.ld_grad));
            };
            add(ds, num_q, k_rows + kb * rows_size, g.dq, q0);
            add(ds_t, num_k, q_rows + qb * rows_size, g.dk, k0);
            add(weights_t, num_k, do_rows + qb * rows_size, g.dv, k0);
        }
}

}  // namespace selfloop
