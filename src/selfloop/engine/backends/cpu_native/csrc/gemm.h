// Products of bfloat16 matrices, summed in float32.
//
// The right side lies in panels of 16 columns: [panel][k / 2][16][2], so that one instruction multiplies a pair of k
// of 16 columns with the same pair of a row. Every element of the result is one sum in the order of k, whatever the
// number of rows, their neighbours or the threads: a row has the same bits in training, in a prompt and in decoding.
#pragma once

#include <algorithm>

#include "simd.h"

namespace selfloop {

constexpr int MAX_TILE_ROWS = 6;
constexpr int MAX_TILE_PANELS = 4;
constexpr int MAX_PAIRS = 1024;
constexpr int FETCH_DISTANCE = 24;      // cache lines
constexpr int MAX_FETCHED_AHEAD = 128;  // cache lines

enum class Store { SET, ADD, BF16 };

// A share of the work for one of a team's threads.
struct Worker {
    int index, count;

    void share(int total, int& begin, int& end) const {
        begin = static_cast<int>(static_cast<int64_t>(total) * index / count);
        end = static_cast<int>(static_cast<int64_t>(total) * (index + 1) / count);
    }
};

// What becomes of the sums: float32 set or added, or bfloat16 times a scale.
struct Target {
    void* data;
    int64_t ld;
    Store store;
    float scale;
    const float* bias;

    static Target set(float* c, int64_t ld, const float* bias = nullptr) { return {c, ld, Store::SET, 1.f, bias}; }
    static Target add(float* c, int64_t ld) { return {c, ld, Store::ADD, 1.f, nullptr}; }
    static Target bf16_of(bf16* c, int64_t ld, float scale = 1.f) { return {c, ld, Store::BF16, scale, nullptr}; }
};

// Two runs of cache lines that will be needed soon, to be brought from memory beside other work.
struct Ahead {
    const bf16 *first, *second;
    int lines;
};

// What will be needed later, handed out in parts for that.
struct Stretches {
    struct Stretch {
        const bf16* from;
        int lines;
    };
    const Stretch* all;
    int num, at = 0, done = 0;

    Ahead take(int lines) {
        while (at < num && done == all[at].lines) ++at, done = 0;
        if (at == num) return {nullptr, nullptr, 0};
        const int half = std::min(lines, (all[at].lines - done + 1) / 2);
        const bf16* from = all[at].from + static_cast<int64_t>(done) * 32;
        done = std::min(done + 2 * half, all[at].lines);
        return {from, from + half * 32, half};
    }
};

template <int M, int V>
static inline void tile(const bf16* x, int64_t ldx, const bf16* const* panels, int pairs, const Target& to, int row,
                        int column, Ahead ahead) {
    f32x16 acc[M][V];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = _mm512_setzero_ps();
    const bf16* p[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) p[v] = panels[v];
    for (int k = 0; k < pairs; ++k) {
        if (k < ahead.lines) {
            _mm_prefetch(reinterpret_cast<const char*>(ahead.first + k * 32), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(ahead.second + k * 32), _MM_HINT_T1);
        }
        // Of so few rows memory is what is waited for, and it is not fetched across pages by itself.
        if constexpr (M <= 2)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                _mm_prefetch(reinterpret_cast<const char*>(p[v] + (k + FETCH_DISTANCE) * 32), _MM_HINT_T0);
        __m512bh b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(p[v] + k * 32);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            int32_t pair;
            std::memcpy(&pair, x + m * ldx + 2 * k, 4);
            const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], a, b[v]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const int64_t at = (row + m) * to.ld + column + v * LANES;
            f32x16 y = acc[m][v];
            if (to.store == Store::BF16) {
                store_bf16(static_cast<bf16*>(to.data) + at, _mm512_mul_ps(y, _mm512_set1_ps(to.scale)));
                continue;
            }
            float* c = static_cast<float*>(to.data) + at;
            if (to.store == Store::ADD)
                y = _mm512_add_ps(_mm512_loadu_ps(c), y);
            else if (to.bias)
                y = _mm512_add_ps(y, _mm512_loadu_ps(to.bias + column + v * LANES));
            _mm512_storeu_ps(c, y);
        }
}

template <int V>
static inline void tile_rows(int m, const bf16* x, int64_t ldx, const bf16* const* panels, int pairs, const Target& to,
                             int row, int column, Ahead ahead) {
    switch (m) {
        case 1:
            return tile<1, V>(x, ldx, panels, pairs, to, row, column, ahead);
        case 2:
            return tile<2, V>(x, ldx, panels, pairs, to, row, column, ahead);
        case 3:
            return tile<3, V>(x, ldx, panels, pairs, to, row, column, ahead);
        case 4:
            return tile<4, V>(x, ldx, panels, pairs, to, row, column, ahead);
        case 5:
            return tile<5, V>(x, ldx, panels, pairs, to, row, column, ahead);
        default:
            return tile<6, V>(x, ldx, panels, pairs, to, row, column, ahead);
    }
}

// Rows [0, rows) of x (bfloat16, row by row, ldx apart) times up to four panels, which may lie anywhere.
// `next` are the panels that the same rows meet afterwards.
static inline void multiply_panels(const bf16* x, int64_t ldx, int rows, const bf16* const* panels, int num_panels,
                                   int pairs, const Target& to, int row, int column, const bf16* const* next = nullptr,
                                   Stretches* later = nullptr) {
    const int tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int t = 0, begin = 0; t < tiles; ++t) {
        const int end = static_cast<int>(static_cast<int64_t>(rows) * (t + 1) / tiles);
        const bf16* xt = x + begin * ldx;
        // Fewer than seven rows wait for memory in any case.
        Ahead ahead{nullptr, nullptr, 0};
        if (next && tiles > 1 && t < MAX_TILE_PANELS)
            ahead = {next[t], tiles < 4 && t + tiles < 4 ? next[t + tiles] : next[t], pairs};
        else if (later && tiles > 1)
            ahead = later->take(pairs);
        switch (num_panels) {
            case 1:
                tile_rows<1>(end - begin, xt, ldx, panels, pairs, to, row + begin, column, ahead);
                break;
            case 2:
                tile_rows<2>(end - begin, xt, ldx, panels, pairs, to, row + begin, column, ahead);
                break;
            case 3:
                tile_rows<3>(end - begin, xt, ldx, panels, pairs, to, row + begin, column, ahead);
                break;
            default:
                tile_rows<4>(end - begin, xt, ldx, panels, pairs, to, row + begin, column, ahead);
        }
        begin = end;
    }
}

// Rows [row0, row1) of x times panels [p0, p1) of w, at most four, whose first column is that of the target.
// A long sum is made in parts, whose panels stay in the cache while all rows meet them. Are there `more` panels behind
// these that the rows meet next, they are fetched meanwhile.
static inline void multiply_block(const bf16* x, int64_t ldx, int row0, int row1, const bf16* w, int p0, int p1,
                                  int pairs, const Target& to, bool more, Stretches* later = nullptr) {
    const int64_t panel_size = static_cast<int64_t>(pairs) * 2 * LANES;
    const int part = to.store == Store::BF16 ? pairs : MAX_PAIRS, num = p1 - p0;
    Target at = to;
    for (int k = 0; k < pairs; k += part) {
        const bf16 *panels[MAX_TILE_PANELS], *next[MAX_TILE_PANELS];
        const bool last = k + part >= pairs;
        for (int v = 0; v < MAX_TILE_PANELS; ++v) {
            panels[v] = w + (p0 + v) * panel_size + static_cast<int64_t>(k) * 2 * LANES;
            next[v] =
                last ? w + (p0 + MAX_TILE_PANELS + v) * panel_size : panels[v] + static_cast<int64_t>(part) * 2 * LANES;
        }
        if (k > 0) at.store = Store::ADD;
        // Short panels of few rows: the next ones would come too late by themselves.
        if (more && pairs * MAX_TILE_PANELS <= MAX_FETCHED_AHEAD && row1 - row0 <= MAX_TILE_ROWS)
            for (int line = 0; line < pairs * MAX_TILE_PANELS; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(next[0] + line * 32), _MM_HINT_T0);
        multiply_panels(x + row0 * ldx + 2 * k, ldx, row1 - row0, panels, num, last ? pairs - k : part, at, row0,
                        p0 * LANES, last && !more ? nullptr : next, later);
    }
}

static inline void multiply(const bf16* x, int64_t ldx, int row0, int row1, const bf16* w, int p0, int p1, int pairs,
                            const Target& to, bool more = false, Stretches* later = nullptr) {
    for (int p = p0; p < p1; p += MAX_TILE_PANELS) {
        const int end = std::min(p + MAX_TILE_PANELS, p1);
        multiply_block(x, ldx, row0, row1, w, p, end, pairs, to, more || end < p1, later);
    }
}

// A grid over rows and panels in which each of a team's threads has one cell.
struct Grid {
    int row0, row1, p0, p1;

    Grid(Worker me, int begin, int end, int panels) {
        int across = panels / 2 < 1 ? 1 : panels / 2;
        if (across > me.count) across = me.count;
        while (me.count % across) --across;
        const Worker rows{me.index / across, me.count / across}, columns{me.index % across, across};
        rows.share(end - begin, row0, row1);
        row0 += begin, row1 += begin;
        columns.share(panels, p0, p1);
    }
};

// Panels [p0, p1) from w, whose element (column, k) lies at column * n_stride + k * k_stride; a panel starts
// panel_stride after the one before and gets `pairs` pairs. Columns beyond n and what is beyond k are zero.
static inline void pack_panels(const bf16* w, int64_t n_stride, int64_t k_stride, int n, int k, int pairs, bf16* out,
                               int64_t panel_stride, int p0, int p1) {
    for (int p = p0; p < p1; ++p) {
        bf16* to = out + p * panel_stride;
        const bf16* from = w + p * LANES * n_stride;
        const bool whole = (p + 1) * LANES <= n;
        int q = 0;
        if (whole && n_stride == 1)
            for (; 2 * q + 1 < k; ++q) {
                const auto row = [&](int at) {
                    const bf16* r = from + at * k_stride;
                    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(r)));
                };
                _mm512_storeu_si512(to + q * 32, _mm512_or_si512(row(2 * q), _mm512_slli_epi32(row(2 * q + 1), 16)));
            }
        if (whole && k_stride == 1)
            for (; 2 * q + 2 * LANES <= k; q += LANES) {
                f32x16 rows[LANES];
                for (int j = 0; j < LANES; ++j) rows[j] = _mm512_loadu_ps(from + j * n_stride + 2 * q);
                transpose(rows);
                for (int i = 0; i < LANES; ++i) _mm512_storeu_ps(to + (q + i) * 32, rows[i]);
            }
        for (; q < pairs; ++q)
            for (int j = 0; j < LANES; ++j)
                for (int s = 0; s < 2; ++s) {
                    const int at = 2 * q + s;
                    const bool there = p * LANES + j < n && at < k;
                    to[(q * LANES + j) * 2 + s] = there ? from[j * n_stride + at * k_stride] : 0;
                }
    }
}

// All panels of w, one after another.
static inline void pack_panels(const bf16* w, int64_t n_stride, int64_t k_stride, int n, int k, bf16* out, int p0,
                               int p1) {
    const int pairs = (k + 1) / 2;
    pack_panels(w, n_stride, k_stride, n, k, pairs, out, static_cast<int64_t>(pairs) * 2 * LANES, p0, p1);
}

// (rows, columns) to (columns, ldo): what is beyond the rows, up to an even number, is zero. Columns are a multiple
// of 16.
static inline void transpose_rows(const bf16* x, int64_t ldx, int rows, bf16* out, int64_t ldo, int column0,
                                  int column1) {
    for (int c = column0; c < column1; c += LANES)
        for (int t = 0; t < rows; t += LANES) {
            f32x16 block[LANES];
            const int num = rows - t < LANES ? rows - t : LANES;
            for (int i = 0; i < LANES; ++i) block[i] = i < num ? load_bf16(x + (t + i) * ldx + c) : _mm512_setzero_ps();
            transpose(block);
            const __mmask16 there = first_lanes(round_up(num, 2));
            for (int i = 0; i < LANES; ++i) _mm256_mask_storeu_epi16(out + (c + i) * ldo + t, there, narrow(block[i]));
        }
}

}  // namespace selfloop
