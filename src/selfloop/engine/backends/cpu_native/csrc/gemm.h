// Products of matrices, summed in float32. Rows are bfloat16 or float32 (T), and so is the right side (W).
//
// The right side lies in panels of 16 columns. In bfloat16 that is [panel][k / 2][16][2], so that one instruction can
// multiply a pair of k of 16 columns with the same pair of a row; in float32 it is [panel][k][16]. Every element of the
// result is one sum in the order of k, whatever the number of rows, their neighbours or the threads: a row has the same
// bits in training, in a prompt and in decoding.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace selfloop {

// A tile's sums, a row of its panels and an element of x are in registers.
constexpr int MAX_TILE_ROWS = std::min(6, (REGISTERS - 1) / PARTS - 1);
constexpr int MAX_TILE_PANELS = 4;
constexpr int MAX_PAIRS = 1024;
constexpr int PAIR = 2 * LANES;  // elements of a panel that a pair of k has
constexpr int LINE_BYTES = 64;
constexpr int FETCH_DISTANCE = 24;      // pairs
constexpr int MAX_FETCHED_AHEAD = 128;  // pairs

// What is compiled once, not in every place that calls it.
#define NOT_INLINE static __attribute__((noinline))

// LOW: as rows are, times a scale.
enum class Store { SET, ADD, LOW };

// A share of the work for one of a team's threads.
struct Worker {
    int index, count;

    void share(int total, int& begin, int& end) const {
        begin = static_cast<int>(static_cast<int64_t>(total) * index / count);
        end = static_cast<int>(static_cast<int64_t>(total) * (index + 1) / count);
    }
};

// What becomes of the sums: float32 set or added, or T times a scale.
template <typename T>
struct Target {
    void* data;
    int64_t ld;
    Store store;
    float scale;
    const float* bias;

    static Target set(float* c, int64_t ld, const float* bias = nullptr) { return {c, ld, Store::SET, 1.f, bias}; }
    static Target add(float* c, int64_t ld) { return {c, ld, Store::ADD, 1.f, nullptr}; }
    static Target low(T* c, int64_t ld, float scale = 1.f) { return {c, ld, Store::LOW, scale, nullptr}; }
};

// Where element (k, column) of a panel lies.
template <typename W>
static inline int64_t panel_at(int64_t k, int column) {
    if constexpr (sizeof(W) == sizeof(bf16))
        return (k / 2 * LANES + column) * 2 + k % 2;
    else
        return k * LANES + column;
}

// Cache lines of a pair of a panel.
template <typename W>
constexpr int PAIR_LINES = PAIR * sizeof(W) / LINE_BYTES;

template <typename W>
static inline void fetch_pair(const W* p) {
    for (int line = 0; line < PAIR_LINES<W>; ++line) fetch(p + line * (LINE_BYTES / sizeof(W)));
}

// Two runs of cache lines that will be needed soon, to be brought from memory beside other work.
struct Ahead {
    const char *first, *second;
    int lines;

    void fetch_line(int line) const {
        if (line >= lines) return;
        fetch_far(first + line * LINE_BYTES);
        fetch_far(second + line * LINE_BYTES);
    }
};

// What will be needed later, handed out in parts for that.
struct Stretches {
    struct Stretch {
        const char* from;
        int lines;
    };
    const Stretch* all;
    int num, at = 0, done = 0;

    Ahead take(int lines) {
        while (at < num && done == all[at].lines) ++at, done = 0;
        if (at == num) return {nullptr, nullptr, 0};
        const int half = std::min(lines, (all[at].lines - done + 1) / 2);
        const char* from = all[at].from + static_cast<int64_t>(done) * LINE_BYTES;
        done = std::min(done + 2 * half, all[at].lines);
        return {from, from + half * LINE_BYTES, half};
    }
};

// acc[m][v] += the pair of k of row m that begins at x + m ldx, times the one of panel v at p[v].
template <int M, int V, typename T, typename W>
static inline void add_pair(f32x16 (&acc)[M][V], const T* x, int64_t ldx, const W* const (&p)[V], int64_t at) {
#ifdef SELFLOOP_PAIR_PRODUCTS
    if constexpr (sizeof(T) == sizeof(bf16) && sizeof(W) == sizeof(bf16)) {
        bf16_pairs b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load_pairs(p[v] + at);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const bf16_pairs a = all_pairs(x + m * ldx);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[m][v] = plus_products(a, b[v], acc[m][v]);
        }
        return;
    }
#endif
    const auto row = [&](auto s) {
        constexpr int S = decltype(s)::value;
        f32x16 b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = panel_row<S>(p[v] + at);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const f32x16 a = all(widen_one(x[m * ldx + S]));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[m][v] = plus_product(a, b[v], acc[m][v]);
        }
    };
    row(std::integral_constant<int, 0>{});
    row(std::integral_constant<int, 1>{});
}

template <int M, int V, typename T, typename W>
NOT_INLINE void tile(const T* x, int64_t ldx, const W* const* panels, int pairs, const Target<T>& to, int row,
                     int column, Ahead ahead) {
    f32x16 acc[M][V];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = zero();
    const W* p[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) p[v] = panels[v];
    for (int k = 0; k < pairs; ++k) {
        for (int line = 0; line < PAIR_LINES<W>; ++line) ahead.fetch_line(k * PAIR_LINES<W> + line);
        // Of so few rows memory is what is waited for, and it is not fetched across pages by itself.
        if constexpr (M <= 2)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) fetch_pair(p[v] + (k + FETCH_DISTANCE) * PAIR);
        add_pair<M, V>(acc, x + 2 * k, ldx, p, k * PAIR);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const int64_t at = (row + m) * to.ld + column + v * LANES;
            f32x16 y = acc[m][v];
            if (to.store == Store::LOW) {
                store(static_cast<T*>(to.data) + at, y * all(to.scale));
                continue;
            }
            float* c = static_cast<float*>(to.data) + at;
            if (to.store == Store::ADD)
                y = load(c) + y;
            else if (to.bias)
                y = y + load(to.bias + column + v * LANES);
            store(c, y);
        }
}

// Calls `each` with the number of panels that M rows meet at once, and the first of them.
template <int M, typename Each>
static inline void in_panels(int num_panels, const Each& each) {
    // Of a single row each panel is done with before the next one is there.
    constexpr int room = M == 1 ? REGISTERS / PARTS - 2 : (REGISTERS - 1) / ((M + 1) * PARTS);
    constexpr int V = std::clamp(room, 1, MAX_TILE_PANELS);
    int first = 0;
    for (; first + V <= num_panels; first += V) each(std::integral_constant<int, V>{}, first);
    if constexpr (V > 3)
        if (num_panels - first == 3) return each(std::integral_constant<int, 3>{}, first);
    if constexpr (V > 2)
        if (num_panels - first == 2) return each(std::integral_constant<int, 2>{}, first);
    if constexpr (V > 1)
        if (num_panels - first == 1) return each(std::integral_constant<int, 1>{}, first);
}

// Calls `each` with the number of rows, at most MAX_TILE_ROWS, as a constant.
template <int M = 1, typename Each>
static inline void of_rows(int num_rows, const Each& each) {
    if constexpr (M < MAX_TILE_ROWS)
        if (num_rows > M) return of_rows<M + 1>(num_rows, each);
    each(std::integral_constant<int, M>{});
}

// Calls `each` with the begin and end of every tile of rows, all about as high.
template <typename Each>
static inline void in_tiles(int rows, const Each& each) {
    const int tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int t = 0, begin = 0; t < tiles; ++t) {
        const int end = static_cast<int>(static_cast<int64_t>(rows) * (t + 1) / tiles);
        each(t, tiles, begin, end);
        begin = end;
    }
}

// Rows [0, rows) of x (row by row, ldx apart) times up to four panels, which may lie anywhere.
// `next` are the panels that the same rows meet afterwards.
template <typename T, typename W>
NOT_INLINE void multiply_panels(const T* x, int64_t ldx, int rows, const W* const* panels, int num_panels, int pairs,
                                const Target<T>& to, int row, int column, const W* const* next = nullptr,
                                Stretches* later = nullptr) {
    in_tiles(rows, [&](int t, int tiles, int begin, int end) {
        const T* xt = x + begin * ldx;
        // Rows of one tile wait for memory in any case.
        Ahead ahead{nullptr, nullptr, 0};
        if (next && tiles > 1 && t < MAX_TILE_PANELS)
            ahead = {reinterpret_cast<const char*>(next[t]),
                     reinterpret_cast<const char*>(tiles < 4 && t + tiles < 4 ? next[t + tiles] : next[t]),
                     pairs * PAIR_LINES<W>};
        else if (later && tiles > 1)
            ahead = later->take(pairs * PAIR_LINES<W>);
        of_rows(end - begin, [&](auto m) {
            constexpr int M = decltype(m)::value;
            in_panels<M>(num_panels, [&](auto v, int first) {
                constexpr int V = decltype(v)::value;
                tile<M, V>(xt, ldx, panels + first, pairs, to, row + begin, column + first * LANES, ahead);
                ahead.lines = 0;
            });
        });
    });
}

// Rows [row0, row1) of x times panels [p0, p1) of w, at most four, whose first column is that of the target.
// A long sum is made in parts, whose panels stay in the cache while all rows meet them. Are there `more` panels behind
// these that the rows meet next, they are fetched meanwhile.
template <typename T, typename W>
NOT_INLINE void multiply_block(const T* x, int64_t ldx, int row0, int row1, const W* w, int p0, int p1, int pairs,
                               const Target<T>& to, bool more, Stretches* later = nullptr) {
    const int64_t panel_size = static_cast<int64_t>(pairs) * PAIR;
    const int part = to.store == Store::LOW ? pairs : MAX_PAIRS, num = p1 - p0;
    Target<T> at = to;
    for (int k = 0; k < pairs; k += part) {
        const W *panels[MAX_TILE_PANELS], *next[MAX_TILE_PANELS];
        const bool last = k + part >= pairs;
        for (int v = 0; v < MAX_TILE_PANELS; ++v) {
            panels[v] = w + (p0 + v) * panel_size + static_cast<int64_t>(k) * PAIR;
            next[v] =
                last ? w + (p0 + MAX_TILE_PANELS + v) * panel_size : panels[v] + static_cast<int64_t>(part) * PAIR;
        }
        if (k > 0) at.store = Store::ADD;
        // Short panels of few rows: the next ones would come too late by themselves.
        if (more && pairs * MAX_TILE_PANELS <= MAX_FETCHED_AHEAD && row1 - row0 <= MAX_TILE_ROWS)
            for (int pair = 0; pair < pairs * MAX_TILE_PANELS; ++pair) fetch_pair(next[0] + pair * PAIR);
        multiply_panels(x + row0 * ldx + 2 * k, ldx, row1 - row0, panels, num, last ? pairs - k : part, at, row0,
                        p0 * LANES, last && !more ? nullptr : next, later);
    }
}

template <typename T, typename W>
static inline void multiply(const T* x, int64_t ldx, int row0, int row1, const W* w, int p0, int p1, int pairs,
                            const Target<T>& to, bool more = false, Stretches* later = nullptr) {
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
template <typename W>
NOT_INLINE void pack_panels(const W* w, int64_t n_stride, int64_t k_stride, int n, int k, int pairs, W* out,
                            int64_t panel_stride, int p0, int p1) {
    constexpr bool LOW = sizeof(W) == sizeof(bf16);
    for (int p = p0; p < p1; ++p) {
        W* to = out + p * panel_stride;
        const W* from = w + p * LANES * n_stride;
        const bool whole = (p + 1) * LANES <= n;
        int done = 0;  // of k
        if (whole && n_stride == 1)
            for (; done + 1 < k; done += 2) {
                const W *even = from + done * k_stride, *odd = even + k_stride;
                if constexpr (LOW)
                    store_pair(to + done * LANES, even, odd);
                else
                    store(to + done * LANES, load(even)), store(to + (done + 1) * LANES, load(odd));
            }
        // Sixteen times four bytes of a column at a time, which are one or two of its elements.
        constexpr int STEP = LOW ? 2 * LANES : LANES;
        if (whole && k_stride == 1)
            for (; done + STEP <= k; done += STEP) {
                f32x16 rows[LANES];
                for (int j = 0; j < LANES; ++j)
                    rows[j] = load(reinterpret_cast<const float*>(from + j * n_stride + done));
                transpose(rows);
                float* at = reinterpret_cast<float*>(to + done * LANES);
                for (int i = 0; i < LANES; ++i) store(at + i * LANES, rows[i]);
            }
        for (int at = done; at < 2 * pairs; ++at)
            for (int j = 0; j < LANES; ++j)
                to[panel_at<W>(at, j)] = p * LANES + j < n && at < k ? from[j * n_stride + at * k_stride] : W{0};
    }
}

// All panels of w, one after another.
template <typename W>
static inline void pack_panels(const W* w, int64_t n_stride, int64_t k_stride, int n, int k, W* out, int p0, int p1) {
    const int pairs = (k + 1) / 2;
    pack_panels(w, n_stride, k_stride, n, k, pairs, out, static_cast<int64_t>(pairs) * PAIR, p0, p1);
}

// (rows, columns) to (columns, ldo): what is beyond the rows, up to an even number, is zero. Columns are a multiple
// of 16.
template <typename T>
NOT_INLINE void transpose_rows(const T* x, int64_t ldx, int rows, T* out, int64_t ldo, int column0, int column1) {
    for (int c = column0; c < column1; c += LANES)
        for (int t = 0; t < rows; t += LANES) {
            f32x16 block[LANES];
            const int num = rows - t < LANES ? rows - t : LANES;
            for (int i = 0; i < LANES; ++i) block[i] = i < num ? load(x + (t + i) * ldx + c) : zero();
            transpose(block);
            for (int i = 0; i < LANES; ++i) store_first(out + (c + i) * ldo + t, round_up(num, 2), block[i]);
        }
}

}  // namespace selfloop
