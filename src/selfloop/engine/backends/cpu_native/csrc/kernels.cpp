// What Python calls; see library.py for the other side of these structures.
#include <omp.h>

#include "layers.h"
#include "vocabulary.h"

using namespace selfloop;

template <typename Each>
static void in_team(int num_threads, const Each& each) {
#pragma omp parallel num_threads(num_threads)
    each(Worker{omp_get_thread_num(), omp_get_num_threads()});
}

// What rows and base weights are.
enum Kind { LOW_IN_LOW, FULL_IN_LOW, FULL_IN_FULL };

// Calls `each` with a null pointer of the type of rows and one of that of base weights.
template <typename Each>
static auto of_kind(int32_t kind, const Each& each) {
    const bf16* low = nullptr;
    const float* full = nullptr;
    return kind == LOW_IN_LOW ? each(low, low) : kind == FULL_IN_LOW ? each(full, low) : each(full, full);
}

// Calls `each` with a null pointer of the type of a matrix, whose elements take so many bytes.
template <typename Each>
static void of_item(int32_t item_bytes, const Each& each) {
    if (item_bytes == sizeof(bf16))
        each(static_cast<const bf16*>(nullptr));
    else
        each(static_cast<const float*>(nullptr));
}

template <typename Pointer>
using Pointed = std::remove_cv_t<std::remove_pointer_t<Pointer>>;

extern "C" {

// Raised when one of the structures or functions changes.
int32_t selfloop_kernels_version() { return 3; }

// Bytes of scratch that a thread needs where the longest sequence of a backward has `length` tokens.
int64_t selfloop_thread_bytes(int32_t kind, int32_t length, int32_t head_dim) {
    return of_kind(kind, [&](auto t, auto) {
        using T = Pointed<decltype(t)>;
        const int64_t forward = sizeof(AttendScratch<T>);
        const int64_t backward = length ? head_grad_scratch<T>(length, head_dim) : 0;
        return (std::max(forward, backward) + 63) / 64 * 64;
    });
}

// Element (column, k) of w lies at column * n_stride + k * k_stride; `out` holds ceil(n / 16) panels of ceil(k / 2)
// pairs.
void selfloop_pack(int32_t item_bytes, const void* w, int64_t n_stride, int64_t k_stride, int32_t n, int32_t k,
                   void* out, int32_t threads) {
    of_item(item_bytes, [&](auto t) {
        using W = Pointed<decltype(t)>;
        in_team(threads, [&](Worker me) {
            int begin, end;
            me.share((n + LANES - 1) / LANES, begin, end);
            pack_panels(static_cast<const W*>(w), n_stride, k_stride, n, k, static_cast<W*>(out), begin, end);
        });
    });
}

// The panels back as (n, k), row by row.
void selfloop_unpack(int32_t item_bytes, const void* panels, int32_t n, int32_t k, void* out) {
    of_item(item_bytes, [&](auto t) {
        using W = Pointed<decltype(t)>;
        const int64_t size = round_up(k, 2) * LANES;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < k; ++j)
                static_cast<W*>(out)[i * k + j] =
                    static_cast<const W*>(panels)[i / LANES * size + panel_at<W>(j, i % LANES)];
    });
}

// Many packings at once: the eight numbers of each are from, n_stride, k_stride, n, k, pairs, to, panel_stride.
void selfloop_pack_all(int32_t item_bytes, const int64_t* packs, int32_t num, int32_t threads) {
    of_item(item_bytes, [&](auto t) {
        using T = Pointed<decltype(t)>;
        in_team(threads, [&](Worker me) {
            for (int i = me.index; i < num; i += me.count) {
                const int64_t* a = packs + 8 * i;
                pack_panels(reinterpret_cast<const T*>(a[0]), a[1], a[2], static_cast<int>(a[3]),
                            static_cast<int>(a[4]), static_cast<int>(a[5]), reinterpret_cast<T*>(a[6]), a[7], 0,
                            static_cast<int>(a[3] + LANES - 1) / LANES);
            }
        });
    });
}

// c (rows, n) float32 = x (rows, k) times panels, ldc apart; columns up to a multiple of 16 are written.
void selfloop_multiply(int32_t kind, const void* x, int64_t ldx, int32_t rows, const void* panels, int32_t n, int32_t k,
                       float* c, int64_t ldc, int32_t threads) {
    of_kind(kind, [&](auto t, auto w) {
        using T = Pointed<decltype(t)>;
        in_team(threads, [&](Worker me) {
            const Grid g(me, 0, rows, (n + LANES - 1) / LANES);
            multiply(static_cast<const T*>(x), ldx, g.row0, g.row1, static_cast<decltype(w)>(panels), g.p0, g.p1,
                     (k + 1) / 2, Target<T>::set(c, ldc));
        });
    });
}

// For each row of logits (rows, n): the logprob of its target, what is taken off logits to that end and, unless null,
// `weights` (rows, n) as rows are: e^(logit - largest), less their sum at the target; `sums` are those sums.
void selfloop_target_logprobs(int32_t kind, const float* logits, int64_t ld, int32_t rows, int32_t n,
                              const int64_t* targets, float* logprobs, float* normalisers, void* weights, int64_t ldw,
                              float* sums, int32_t threads) {
    of_kind(kind, [&](auto t, auto) {
        using T = Pointed<decltype(t)>;
        in_team(threads, [&](Worker me) {
            int begin, end;
            me.share(rows, begin, end);
            for (int64_t row = begin; row < end; ++row) {
                const float* x = logits + row * ld;
                T* w = weights ? static_cast<T*>(weights) + row * ldw : nullptr;
                const Softmax softmax = soften_row(x, n, w);
                const float chosen = x[targets[row]];
                normalisers[row] = softmax.normaliser();
                logprobs[row] = chosen - normalisers[row];
                sums[row] = softmax.sum;
                if (w) w[targets[row]] = narrow_one<T>(std::exp(chosen - softmax.largest) - softmax.sum);
            }
        });
    });
}

// Draws a token from each row of logits (rows, n), of which only the first `num_tokens` can be drawn: at a temperature
// above 0 that into whose share of the whole the row's uniform number falls, tokens by id, else the likeliest. Its
// logprob is that without temperature, among all n.
void selfloop_draw(const float* logits, int64_t ld, int32_t rows, int32_t n, int32_t num_tokens,
                   const float* temperatures, const double* uniforms, int64_t* tokens, float* logprobs,
                   float* normalisers, int32_t threads) {
    in_team(threads, [&](Worker me) {
        for (int64_t row = me.index; row < rows; row += me.count) {
            const float* x = logits + row * ld;
            const Softmax softmax = soften_row<float>(x, n, nullptr);
            const int64_t token = temperatures[row] > 0 ? drawn(x, num_tokens, temperatures[row], uniforms[row])
                                                        : likeliest(x, num_tokens);
            tokens[row] = token;
            normalisers[row] = softmax.normaliser();
            logprobs[row] = x[token] - normalisers[row];
        }
    });
}

void selfloop_forward(int32_t kind, const void* pass) {
    of_kind(kind, [&](auto t, auto w) {
        const auto& p = *static_cast<const Pass<Pointed<decltype(t)>, Pointed<decltype(w)>>*>(pass);
        in_team(p.num_threads, [&](Worker me) { Team(p, me).forward(); });
    });
}

void selfloop_backward(int32_t kind, const void* pass) {
    of_kind(kind, [&](auto t, auto w) {
        const auto& p = *static_cast<const Pass<Pointed<decltype(t)>, Pointed<decltype(w)>>*>(pass);
        in_team(p.num_threads, [&](Worker me) { Team(p, me).backward(); });
    });
}
}
