// What one body of the CPU kernels computes, line by line: a name, then numbers. test_kernel_bodies.py compares bodies.
#include <cstdio>
#include <vector>

#include "attention.h"
#include "vocabulary.h"

using namespace selfloop;

static uint32_t state = 1;

static float random_number() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.f;
}

template <typename T>
static std::vector<T> random_numbers(int num) {
    std::vector<T> out(num);
    for (T& x : out) x = narrow_one<T>(random_number());
    return out;
}

template <typename T>
static void print(const char* name, const std::vector<T>& numbers) {
    std::printf("%s", name);
    for (const T x : numbers) std::printf(" %a", static_cast<double>(widen_one(x)));
    std::printf("\n");
}

template <typename T, typename W>
static void products(const char* name) {
    constexpr int ROWS = 23, N = 100, K = 77;
    constexpr int WIDTH = (N + LANES - 1) / LANES * LANES, EVEN = (K + 1) / 2 * 2;
    const auto x = random_numbers<T>(ROWS * EVEN);
    const auto w = random_numbers<W>(N * K);
    std::vector<W> panels(EVEN * WIDTH);
    pack_panels(w.data(), K, 1, N, K, panels.data(), 0, WIDTH / LANES);
    std::vector<float> sums(ROWS * WIDTH);
    multiply(x.data(), EVEN, 0, ROWS, panels.data(), 0, WIDTH / LANES, EVEN / 2, Target<T>::set(sums.data(), WIDTH));
    print(name, sums);
}

template <typename T>
static void attention(const char* forward, const char* backward) {
    constexpr int LENGTH = 83, D = 48, NUM_PAGES = (LENGTH + PAGE - 1) / PAGE;
    const auto q = random_numbers<T>(LENGTH * D), k = random_numbers<T>(LENGTH * D), v = random_numbers<T>(LENGTH * D);
    const auto d_out = random_numbers<T>(LENGTH * D);
    std::vector<T> pages(NUM_PAGES * 2 * PAGE * D), out(LENGTH * D);
    std::vector<int32_t> table(NUM_PAGES);
    for (int i = 0; i < NUM_PAGES; ++i) table[i] = i;
    const Pages<T> cache{pages.data(), 2 * PAGE * D, 2 * PAGE * D, D};
    for (int i = 0; i < LENGTH; ++i) cache.write(i / PAGE, i % PAGE, 0, &k[i * D], &v[i * D]);
    std::vector<float> lse(LENGTH), dq(LENGTH * D), dk(LENGTH * D), dv(LENGTH * D);
    static AttendScratch<T> scratch;
    for (int at = 0; at < LENGTH; at += BLOCK) {
        const int rows = std::min(BLOCK, LENGTH - at);
        attend(Queries<T>{&q[at * D], D, rows, at, 1, &out[at * D], D, &lse[at], 1}, cache, table.data(), 0, 0.3f,
               scratch);
    }
    std::vector<char> room(head_grad_scratch<T>(LENGTH, D) + 64);
    char* aligned = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64);
    attend_backward<T>({LENGTH, D, 0.3f, q.data(), k.data(), v.data(), out.data(), d_out.data(), D, D, lse.data(), 1,
                        dq.data(), dk.data(), dv.data(), D},
                       aligned);
    print(forward, out);
    for (const auto& more : {dk, dv}) dq.insert(dq.end(), more.begin(), more.end());
    print(backward, dq);
}

int main() {
    products<bf16, bf16>("products of bfloat16");
    products<float, bf16>("products with bfloat16 weights");
    products<float, float>("products of float32");
    attention<bf16>("attention of bfloat16", "gradients of attention of bfloat16");
    attention<float>("attention of float32", "gradients of attention of float32");

    std::vector<float> x(256), e(256), s(256);
    for (int i = 0; i < 256; ++i) x[i] = -107.5f + 0.77f * i;
    for (int i = 0; i < 256; i += LANES) store(&e[i], exp(load(&x[i]))), store(&s[i], sigmoid(load(&x[i])));
    for (float& y : e) y = std::log(y);
    print("exact: whether e^x is 0", std::vector<float>{e[0] < -1e9f ? 1.f : 0.f, first_lane(exp(zero()))});
    print("logarithms of e^x", std::vector<float>(e.begin() + 10, e.end() - 20));
    print("sigmoid", s);

    std::vector<float> odd{0.f, -0.f, 1e-39f, -1e-39f, 1.00390625f, 1.01171875f, 3.4e38f, INFINITE, -INFINITE, 0.1f};
    odd.resize(LANES);
    std::vector<bf16> low(LANES);
    store(low.data(), load(odd.data()));
    print("exact: rounded to bfloat16", low);
    const auto logits = random_numbers<float>(333);
    const Softmax softmax = soften_row<float>(logits.data(), 333, nullptr);
    print("exact: largest of a row", std::vector<float>{softmax.largest});
    print("normaliser of a row", std::vector<float>{softmax.normaliser()});
    std::vector<float> tokens;
    for (const double uniform : {0., 0.1, 0.33, 0.7, 0.999}) tokens.push_back(drawn(logits.data(), 333, 0.7f, uniform));
    print("exact: drawn tokens", tokens);
    const auto rows = random_numbers<float>(20 * 32);
    std::vector<float> columns(32 * 20);
    transpose_rows(rows.data(), 32, 20, columns.data(), 20, 0, 32);
    print("exact: columns", columns);
}
