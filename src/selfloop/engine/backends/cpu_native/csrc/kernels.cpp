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

extern "C" {

// Raised when one of the structures or functions changes.
int32_t selfloop_kernels_version() { return 2; }

// Bytes of scratch that a thread needs where the longest sequence of a backward has `length` tokens.
int64_t selfloop_thread_bytes(int32_t length, int32_t head_dim) {
    const int64_t forward = sizeof(AttendScratch), backward = length ? head_grad_scratch(length, head_dim) : 0;
    return (std::max(forward, backward) + 63) / 64 * 64;
}

// Element (column, k) of w lies at column * n_stride + k * k_stride; `out` holds ceil(n / 16) panels of ceil(k / 2)
// pairs.
void selfloop_pack(const bf16* w, int64_t n_stride, int64_t k_stride, int32_t n, int32_t k, bf16* out,
                   int32_t threads) {
    in_team(threads, [&](Worker me) {
        int begin, end;
        me.share((n + LANES - 1) / LANES, begin, end);
        pack_panels(w, n_stride, k_stride, n, k, out, begin, end);
    });
}

// The panels back as (n, k), row by row.
void selfloop_unpack(const bf16* panels, int32_t n, int32_t k, bf16* out) {
    const int64_t pairs = (k + 1) / 2;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j)
            out[i * k + j] = panels[((i / LANES * pairs + j / 2) * LANES + i % LANES) * 2 + j % 2];
}

// Many packings at once: the eight numbers of each are from, n_stride, k_stride, n, k, pairs, to, panel_stride.
void selfloop_pack_all(const int64_t* packs, int32_t num, int32_t threads) {
    in_team(threads, [&](Worker me) {
        for (int i = me.index; i < num; i += me.count) {
            const int64_t* a = packs + 8 * i;
            pack_panels(reinterpret_cast<const bf16*>(a[0]), a[1], a[2], static_cast<int>(a[3]), static_cast<int>(a[4]),
                        static_cast<int>(a[5]), reinterpret_cast<bf16*>(a[6]), a[7], 0,
                        static_cast<int>(a[3] + LANES - 1) / LANES);
        }
    });
}

// c (rows, n) float32 = x (rows, k) times panels, ldc apart; columns up to a multiple of 16 are written.
void selfloop_multiply(const bf16* x, int64_t ldx, int32_t rows, const bf16* panels, int32_t n, int32_t k, float* c,
                       int64_t ldc, int32_t threads) {
    in_team(threads, [&](Worker me) {
        const Grid g(me, 0, rows, (n + LANES - 1) / LANES);
        multiply(x, ldx, g.row0, g.row1, panels, g.p0, g.p1, (k + 1) / 2, Target::set(c, ldc));
    });
}

// For each row of logits (rows, n): the logprob of its target, what is taken off logits to that end and, unless null,
// `weights` (rows, n) in bfloat16: e^(logit - largest), less their sum at the target; `sums` are those sums.
void selfloop_target_logprobs(const float* logits, int64_t ld, int32_t rows, int32_t n, const int64_t* targets,
                              float* logprobs, float* normalisers, bf16* weights, int64_t ldw, float* sums,
                              int32_t threads) {
    in_team(threads, [&](Worker me) {
        int begin, end;
        me.share(rows, begin, end);
        for (int64_t row = begin; row < end; ++row) {
            const float* x = logits + row * ld;
            bf16* w = weights ? weights + row * ldw : nullptr;
            const Softmax softmax = soften_row(x, n, w);
            const float chosen = x[targets[row]];
            normalisers[row] = softmax.normaliser();
            logprobs[row] = chosen - normalisers[row];
            sums[row] = softmax.sum;
            if (w) w[targets[row]] = narrow_one(std::exp(chosen - softmax.largest) - softmax.sum);
        }
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
            const Softmax softmax = soften_row(x, n, nullptr);
            const int64_t token = temperatures[row] > 0 ? drawn(x, num_tokens, temperatures[row], uniforms[row])
                                                        : likeliest(x, num_tokens);
            tokens[row] = token;
            normalisers[row] = softmax.normaliser();
            logprobs[row] = x[token] - normalisers[row];
        }
    });
}

void selfloop_forward(const Pass* pass) {
    in_team(pass->num_threads, [&](Worker me) { Team(*pass, me).forward(); });
}

void selfloop_backward(const Pass* pass) {
    in_team(pass->num_threads, [&](Worker me) { Team(*pass, me).backward(); });
}
}
