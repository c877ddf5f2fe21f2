// Causal attention: queries against keys and values in pages of 16 tokens, and its gradient.
//
// A page holds the keys of one group as a panel over head_dim, and its values as panels over the 16 tokens. Keys are
// met in blocks of 64 from the first on, so that a row's sums do not depend on which rows are computed with it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "gemm.h"

namespace selfloop {

constexpr int PAGE = 16;
constexpr int BLOCK = 64;
constexpr int MAX_HEAD_DIM = 256;

// Keys and values of one layer.
struct Pages {
    bf16* data;
    int64_t page_stride, group_stride;
    int head_dim;

    bf16* keys(int page, int group) const { return data + page * page_stride + group * group_stride; }
    bf16* values(int page, int group) const { return keys(page, group) + PAGE * head_dim; }

    // Have a page's keys and values brought from memory meanwhile.
    void fetch(int page, int group) const {
        const char* at = reinterpret_cast<const char*>(keys(page, group));
        for (size_t line = 0; line < 2 * PAGE * head_dim * sizeof(bf16); line += 64)
            _mm_prefetch(at + line, _MM_HINT_T0);
    }

    void write(int page, int slot, int group, const bf16* k, const bf16* v) const {
        bf16 *kt = keys(page, group), *vt = values(page, group);
        for (int i = 0; i < head_dim / 2; ++i) std::memcpy(kt + (i * PAGE + slot) * 2, k + 2 * i, 4);
        for (int j = 0; j < head_dim; ++j)
            vt[((j / LANES) * (PAGE / 2) + slot / 2) * 2 * LANES + (j % LANES) * 2 + slot % 2] = v[j];
    }
};

// Up to 64 queries of one group: row i stands at position + step * i and sees the keys up to there.
struct Queries {
    const bf16* q;
    int64_t ldq;
    int rows, position, step;
    bf16* out;
    int64_t ldo;
    float* lse;  // log of the sum of e^score; not wanted when null
    int64_t ld_lse;
};

struct alignas(64) AttendScratch {
    float scores[BLOCK * BLOCK];
    float sums[BLOCK * MAX_HEAD_DIM];
    bf16 weights[BLOCK * BLOCK];
    float largest[BLOCK], total[BLOCK];
};

template <int M, int V>
static inline void weigh_tile(const bf16* p, const bf16* const* pages, int num_pages, int panel0, float* sums, int ld) {
    f32x16 acc[M][V];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = _mm512_setzero_ps();
    for (int page = 0; page < num_pages; ++page)
        for (int k = 0; k < PAGE / 2; ++k) {
            __m512bh b[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                b[v] = (__m512bh)_mm512_loadu_si512(pages[page] + ((panel0 + v) * (PAGE / 2) + k) * 2 * LANES);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                int32_t pair;
                std::memcpy(&pair, p + m * BLOCK + page * PAGE + 2 * k, 4);
                const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], a, b[v]);
            }
        }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* c = sums + m * ld + (panel0 + v) * LANES;
            _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(c), acc[m][v]));
        }
}

template <int V>
static inline void weigh_rows(int m, const bf16* p, const bf16* const* pages, int num_pages, int panel0, float* sums,
                              int ld) {
    switch (m) {
        case 1:
            return weigh_tile<1, V>(p, pages, num_pages, panel0, sums, ld);
        case 2:
            return weigh_tile<2, V>(p, pages, num_pages, panel0, sums, ld);
        case 3:
            return weigh_tile<3, V>(p, pages, num_pages, panel0, sums, ld);
        case 4:
            return weigh_tile<4, V>(p, pages, num_pages, panel0, sums, ld);
        case 5:
            return weigh_tile<5, V>(p, pages, num_pages, panel0, sums, ld);
        default:
            return weigh_tile<6, V>(p, pages, num_pages, panel0, sums, ld);
    }
}

// sums (rows, head_dim) += weights (rows, 16 * num_pages) times the values of these pages.
static inline void weigh(const bf16* weights, int rows, const bf16* const* pages, int num_pages, int head_dim,
                         float* sums) {
    const int panels = head_dim / LANES, tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int t = 0, begin = 0; t < tiles; ++t) {
        const int end = rows * (t + 1) / tiles;
        const bf16* p = weights + begin * BLOCK;
        float* to = sums + begin * head_dim;
        for (int v = 0; v < panels; v += MAX_TILE_PANELS) switch (std::min(panels - v, MAX_TILE_PANELS)) {
                case 1:
                    weigh_rows<1>(end - begin, p, pages, num_pages, v, to, head_dim);
                    break;
                case 2:
                    weigh_rows<2>(end - begin, p, pages, num_pages, v, to, head_dim);
                    break;
                case 3:
                    weigh_rows<3>(end - begin, p, pages, num_pages, v, to, head_dim);
                    break;
                default:
                    weigh_rows<4>(end - begin, p, pages, num_pages, v, to, head_dim);
            }
        begin = end;
    }
}

// A row of scores becomes weights relative to the largest score so far; returns what earlier sums are to be scaled by.
static inline float soften(const float* scores, int width, int num_visible, float scale, float& largest, float& total,
                           bf16* weights) {
    const f32x16 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    f32x16 s[BLOCK / LANES], most = hidden;
    for (int i = 0; i < width / LANES; ++i) {
        const __mmask16 visible = first_lanes(std::clamp(num_visible - i * LANES, 0, LANES));
        const f32x16 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + i * LANES), _mm512_set1_ps(scale));
        s[i] = _mm512_mask_mov_ps(hidden, visible, scaled);
        most = _mm512_max_ps(most, s[i]);
    }
    const float now = std::max(largest, _mm512_reduce_max_ps(most));
    const float rescale = _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(largest - now)));
    f32x16 sum = _mm512_setzero_ps();
    for (int i = 0; i < width / LANES; ++i) {
        const f32x16 w = exp_ps(_mm512_sub_ps(s[i], _mm512_set1_ps(now)));
        sum = _mm512_add_ps(sum, w);
        store_bf16(weights + i * LANES, w);
    }
    total = total * rescale + _mm512_reduce_add_ps(sum);
    largest = now;
    return rescale;
}

static inline void attend(const Queries& r, const Pages& cache, const int32_t* table, int group, float scale,
                          AttendScratch& s) {
    const int d = cache.head_dim, num_keys = r.position + r.step * (r.rows - 1) + 1;
    std::fill_n(s.largest, r.rows, -std::numeric_limits<float>::infinity());
    std::fill_n(s.total, r.rows, 0.f);
    std::fill_n(s.sums, r.rows * d, 0.f);
    const int all_pages = (num_keys + PAGE - 1) / PAGE;
    for (int page = 0; page < std::min(all_pages, BLOCK / PAGE); ++page) cache.fetch(table[page], group);
    for (int start = 0; start < num_keys; start += BLOCK) {
        for (int page = start / PAGE + BLOCK / PAGE; page < std::min(all_pages, (start + 2 * BLOCK) / PAGE); ++page)
            cache.fetch(table[page], group);
        const int num_pages = std::min(BLOCK / PAGE, (num_keys - start + PAGE - 1) / PAGE);
        const bf16 *keys[BLOCK / PAGE], *values[BLOCK / PAGE];
        for (int i = 0; i < num_pages; ++i) {
            const int page = table[start / PAGE + i];
            keys[i] = cache.keys(page, group), values[i] = cache.values(page, group);
        }
        multiply_panels(r.q, r.ldq, r.rows, keys, num_pages, d / 2, Target::set(s.scores, BLOCK), 0, 0);
        for (int i = 0; i < r.rows; ++i) {
            const int num_visible = r.position + r.step * i - start + 1;
            const float rescale = soften(s.scores + i * BLOCK, num_pages * PAGE, num_visible, scale, s.largest[i],
                                         s.total[i], s.weights + i * BLOCK);
            if (rescale == 1.f) continue;
            for (float* at = s.sums + i * d; at < s.sums + (i + 1) * d; at += LANES)
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(rescale)));
        }
        weigh(s.weights, r.rows, values, num_pages, d, s.sums);
    }
    for (int i = 0; i < r.rows; ++i) {
        const f32x16 total = _mm512_set1_ps(s.total[i]);
        for (int j = 0; j < d; j += LANES)
            store_bf16(r.out + i * r.ldo + j, _mm512_div_ps(_mm512_loadu_ps(s.sums + i * d + j), total));
        if (r.lse) r.lse[i * r.ld_lse] = s.largest[i] + std::log(s.total[i]);
    }
}

// One head of one sequence: bfloat16 rows of what the forward had, float32 rows of what the gradients are.
struct HeadGrad {
    int length, head_dim;
    float scale;
    const bf16 *q, *k, *v, *out, *d_out;
    int64_t ld_qkv, ld_out;
    const float* lse;
    int64_t ld_lse;
    float *dq, *dk, *dv;
    int64_t ld_grad;
};

static inline int64_t head_grad_scratch(int length, int head_dim) {
    const int64_t rows = round_up(length, BLOCK);
    return 5 * rows * head_dim * sizeof(bf16) + rows * sizeof(float) +
           BLOCK * BLOCK * (2 * sizeof(float) + 3 * sizeof(bf16)) + 64;
}

// P = e^(scale q k^T - lse), dP = d_out v^T, dS = scale P (dP - sum(d_out out)); dq = dS k, dk = dS^T q, dv = P^T
// d_out. Dao, FlashAttention-2 (https://arxiv.org/abs/2307.08691), algorithm 2.
static inline void attend_backward(const HeadGrad& g, char* scratch) {
    const int d = g.head_dim, n = g.length, padded = round_up(n, BLOCK), blocks = padded / BLOCK;
    const int64_t panels_size = static_cast<int64_t>(padded) * d;
    float* delta = reinterpret_cast<float*>(scratch);
    float *scores = delta + padded, *d_weights = scores + BLOCK * BLOCK;
    bf16* weights_t = reinterpret_cast<bf16*>(d_weights + BLOCK * BLOCK);
    bf16 *ds = weights_t + BLOCK * BLOCK, *ds_t = ds + BLOCK * BLOCK;
    // Over head_dim: keys and values as columns. Over tokens: dimensions as columns, block by block of 64 tokens.
    bf16 *k_cols = ds_t + BLOCK * BLOCK, *v_cols = k_cols + panels_size;
    bf16 *k_rows = v_cols + panels_size, *q_rows = k_rows + panels_size, *do_rows = q_rows + panels_size;
    pack_panels(g.k, g.ld_qkv, 1, n, d, k_cols, 0, padded / LANES);
    pack_panels(g.v, g.ld_qkv, 1, n, d, v_cols, 0, padded / LANES);
    for (int b = 0; b < blocks; ++b) {
        const int at = b * BLOCK, num = std::min(BLOCK, n - at);
        const int64_t to = static_cast<int64_t>(b) * BLOCK * d;
        // Of a block with fewer tokens the rest must be zero, not absent: panels have 32 pairs.
        if (num < BLOCK)
            for (bf16* x : {k_rows, q_rows, do_rows}) std::fill_n(x + to, BLOCK * d, bf16{0});
        const auto pack = [&](const bf16* x, int64_t ld, bf16* out) {
            if (num == BLOCK) return pack_panels(x + at * ld, 1, ld, d, BLOCK, out + to, 0, d / LANES);
            for (int j = 0; j < d; ++j)
                for (int t = 0; t < num; ++t)
                    out[to + ((j / LANES) * (BLOCK / 2) + t / 2) * 32 + (j % LANES) * 2 + t % 2] = x[(at + t) * ld + j];
        };
        pack(g.k, g.ld_qkv, k_rows), pack(g.q, g.ld_qkv, q_rows), pack(g.d_out, g.ld_out, do_rows);
    }
    for (int i = 0; i < n; ++i) {
        f32x16 sum = _mm512_setzero_ps();
        for (int j = 0; j < d; j += LANES)
            sum = _mm512_fmadd_ps(load_bf16(g.out + i * g.ld_out + j), load_bf16(g.d_out + i * g.ld_out + j), sum);
        delta[i] = _mm512_reduce_add_ps(sum);
        for (float* x : {g.dq, g.dk, g.dv}) std::fill_n(x + i * g.ld_grad, d, 0.f);
    }
    const int64_t rows_size = static_cast<int64_t>(BLOCK) * d;
    for (int kb = 0; kb < blocks; ++kb)
        for (int qb = kb; qb < blocks; ++qb) {
            const int k0 = kb * BLOCK, q0 = qb * BLOCK;
            const int num_q = std::min(BLOCK, n - q0), num_k = std::min(BLOCK, n - k0);
            const int panels = (num_k + LANES - 1) / LANES;
            const auto against = [&](const bf16* x, int64_t ld, const bf16* columns, float* to) {
                const bf16* at[BLOCK / LANES];
                for (int p = 0; p < panels; ++p) at[p] = columns + static_cast<int64_t>(k0 + p * LANES) * d;
                multiply_panels(x + q0 * ld, ld, num_q, at, panels, d / 2, Target::set(to, BLOCK), 0, 0);
            };
            against(g.q, g.ld_qkv, k_cols, scores);
            against(g.d_out, g.ld_out, v_cols, d_weights);
            const f32x16 scale = _mm512_set1_ps(g.scale), zero = _mm512_setzero_ps();
            for (int c = 0; c < BLOCK; c += LANES)
                for (int t = 0; t < BLOCK; t += LANES) {
                    f32x16 p[LANES], s[LANES];
                    for (int i = 0; i < LANES; ++i) {
                        const int row = t + i;
                        const int visible = row < num_q ? std::min(q0 + row - k0 + 1, num_k) - c : 0;
                        if (visible <= 0) {
                            p[i] = s[i] = zero;
                        } else {
                            const __mmask16 mask = first_lanes(std::min(visible, LANES));
                            const f32x16 lse = _mm512_set1_ps(g.lse[(q0 + row) * g.ld_lse]);
                            const f32x16 x = _mm512_loadu_ps(scores + row * BLOCK + c);
                            p[i] = _mm512_maskz_mov_ps(mask, exp_ps(_mm512_fmsub_ps(x, scale, lse)));
                            const f32x16 dp = _mm512_loadu_ps(d_weights + row * BLOCK + c);
                            const f32x16 less = _mm512_sub_ps(dp, _mm512_set1_ps(delta[q0 + row]));
                            s[i] = _mm512_maskz_mul_ps(mask, _mm512_mul_ps(p[i], less), scale);
                        }
                        store_bf16(ds + row * BLOCK + c, s[i]);
                    }
                    transpose(p), transpose(s);
                    for (int i = 0; i < LANES; ++i) {
                        store_bf16(weights_t + (c + i) * BLOCK + t, p[i]);
                        store_bf16(ds_t + (c + i) * BLOCK + t, s[i]);
                    }
                }
            const auto add = [&](const bf16* x, int rows, const bf16* tokens, float* to, int at) {
                multiply(x, BLOCK, 0, rows, tokens, 0, d / LANES, BLOCK / 2,
                         Target::add(to + at * g.ld_grad, g.ld_grad));
            };
            add(ds, num_q, k_rows + kb * rows_size, g.dq, q0);
            add(ds_t, num_k, q_rows + qb * rows_size, g.dk, k0);
            add(weights_t, num_k, do_rows + qb * rows_size, g.dv, k0);
        }
}

}  // namespace selfloop
