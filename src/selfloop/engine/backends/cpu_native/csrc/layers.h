// The decoder's layers, forward and backward, with low-rank adapters on ranges of rows. All threads of a team call
// these.
#pragma once

#include "attention.h"
#include "pass.h"

namespace selfloop {

constexpr int FEW_ROWS = 64;

static inline void barrier() {
#pragma omp barrier
}

template <typename T, typename W>
class Team {
  public:
    Team(const Pass<T, W>& pass, Worker me)
        : p(pass), m(*pass.model), s(*pass.model), me(me), ldu(pass.kept.low_rank_width) {}

    void forward() {
        for (int layer = 0; layer < m.num_layers; ++layer) {
            if (p.h_inputs) copy_rows(p.h, p.h_inputs + static_cast<int64_t>(layer) * p.rows * s.hidden);
            forward_layer(layer, p.h);
        }
        norm_rows(p.h, m.final_norm, p.final_unit, p.final_inverse, p.out);
        barrier();
    }

    // From d_out; adapters' gradients go where their segments say.
    void backward() {
        norm_backward(m.final_norm, p.final_unit, p.final_inverse, nullptr, p.d_out);
        barrier();
        for (int layer = m.num_layers - 1; layer >= 0; --layer) {
            if (p.h_inputs) {
                copy_rows(p.h_inputs + static_cast<int64_t>(layer) * p.rows * s.hidden, p.h_again);
                forward_layer(layer, p.h_again);
            }
            backward_layer(layer);
        }
    }

  private:
    const Pass<T, W>& p;
    const Model<W>& m;
    const Sizes s;
    const Worker me;
    const int ldu;

    const Lora<T>& lora(const Segment<T>& segment, int layer, int group) const {
        return segment.groups[layer * NUM_GROUPS + group];
    }

    template <typename Each>
    void each_row(const Each& each) const {
        int begin, end;
        me.share(p.rows, begin, end);
        for (int64_t row = begin; row < end; ++row) each(row);
    }

    void copy_rows(const float* from, float* to) const {
        each_row(
            [&](int64_t row) { std::memcpy(to + row * s.hidden, from + row * s.hidden, s.hidden * sizeof(float)); });
    }

    // --- forward

    // Adds to h what the layer makes of it.
    void forward_layer(int layer, float* h) {
        const Layer<W>& w = m.layers[layer];
        const KeptLayer<T> kept(p, layer);
        norm_rows(h, w.attention_norm, kept.attention_unit, kept.attention_inverse, p.work.x);
        barrier();
        project(layer, QKV, p.work.x, s.hidden, kept, Target<T>::set(p.work.wide, s.qkv, w.linears[QKV].bias));
        barrier();
        rotate_rows(layer, w, kept);
        barrier();
        attend_all(layer, kept);
        barrier();
        project(layer, OUT, kept.attended, s.q, kept, Target<T>::add(h, s.hidden));
        barrier();
        norm_rows(h, w.mlp_norm, kept.mlp_unit, kept.mlp_inverse, p.work.x);
        barrier();
        project(layer, GATE_UP, p.work.x, s.hidden, kept,
                Target<T>::set(p.work.wide, 2 * s.inner, w.linears[GATE_UP].bias));
        barrier();
        gate_rows(kept.gate_up);
        barrier();
        project(layer, DOWN, p.work.act, s.inner, kept, Target<T>::add(h, s.hidden));
        barrier();
    }

    // unit = h / rms(h) in bfloat16, x = weight * unit in bfloat16: as transformers rounds.
    void norm_rows(const float* h, const float* weight, T* unit, float* inverse, T* x) {
        each_row([&](int64_t row) {
            const int64_t at = row * s.hidden;
            inverse[row] = norm_row(h + at, weight, s.hidden, unit + at, x + at);
        });
    }

    float norm_row(const float* h, const float* weight, int n, T* unit, T* x) const {
        f32x16 squares = zero();
        for (int j = 0; j < n; j += LANES) {
            const f32x16 y = load(h + j);
            squares = plus_product(y, y, squares);
        }
        const float inverse = 1.f / std::sqrt(sum_of(squares) / n + m.eps);
        for (int j = 0; j < n; j += LANES) {
            const f32x16 u = rounded<T>(load(h + j) * all(inverse));
            store(unit + j, u);
            store(x + j, u * load(weight + j));
        }
        return inverse;
    }

    // Adds the rows' adapters; what each makes of x in its low rank is kept, scaled.
    void project(int layer, int group, const T* x, int64_t ldx, const KeptLayer<T>& kept, const Target<T>& to) {
        const Linear<W>& w = m.layers[layer].linears[group];
        const int parts = parts_of(group);
        T* u = kept.low_rank[group];
        bool adapted = false;
        // Of few rows each adapter is read by one thread, in longer stretches.
        const bool few = p.rows <= FEW_ROWS && p.num_segments >= 2 * me.count;
        int mine, others;
        me.share(p.num_segments, mine, others);
        for (int i = 0; i < p.num_segments; ++i) {
            const Segment<T>& seg = p.segments[i];
            const Lora<T>& l = lora(seg, layer, group);
            if (!l.a) continue;
            adapted = true;
            if (few && (i < mine || i >= others)) continue;
            const Grid g(few ? Worker{0, 1} : me, seg.begin, seg.end, parts * seg.padded_rank / LANES);
            multiply(x, ldx, g.row0, g.row1, l.a, g.p0, g.p1, w.in / 2, Target<T>::low(u, ldu, seg.scaling));
        }
        if (adapted) barrier();
        const Grid g(me, 0, p.rows, w.out / LANES);
        // So many columns at a time that adapters add to what is still in the cache; of few rows all, as each adapter
        // is then read in one go.
        const int step = g.row1 - g.row0 <= FEW_ROWS ? g.p1 - g.p0 : MAX_TILE_PANELS;
        Stretches::Stretch stretches[FEW_ROWS * MAX_PARTS];
        Stretches later{stretches, few ? b_panels(layer, group, g, stretches) : 0};
        for (int p0 = g.p0; p0 < g.p1; p0 += step) {
            const int p1 = std::min(p0 + step, g.p1);
            multiply(x, ldx, g.row0, g.row1, w.forward, p0, p1, w.in / 2, to, p1 < g.p1, &later);
            if (adapted) add_low_rank(layer, group, u, g.row0, g.row1, p0, p1, to);
        }
        if (to.store == Store::ADD && w.bias) add_bias(w.bias, g, to);
    }

    // Where this thread's panels of every adapter's B lie, in the order in which they are needed.
    int b_panels(int layer, int group, const Grid& g, Stretches::Stretch* out) const {
        int num = 0;
        for (int i = 0; i < std::min(p.num_segments, FEW_ROWS); ++i) {
            const Segment<T>& seg = p.segments[i];
            const Lora<T>& l = lora(seg, layer, group);
            for (int part = 0, first = 0; l.a && part < parts_of(group); ++part) {
                const int panels = s.part(group, part) / LANES;
                const int from = std::max(g.p0 - first, 0), until = std::min(g.p1 - first, panels);
                if (from < until)
                    out[num++] = {
                        reinterpret_cast<const char*>(l.b[part] + static_cast<int64_t>(from) * seg.padded_rank * LANES),
                        (until - from) * seg.padded_rank / 2 * PAIR_LINES<T>};
                first += panels;
            }
        }
        return num;
    }

    // What the adapters of these rows make of u, for these panels.
    void add_low_rank(int layer, int group, const T* u, int row0, int row1, int p0, int p1, const Target<T>& to) const {
        for (int i = 0; i < p.num_segments; ++i) {
            const Segment<T>& seg = p.segments[i];
            const Lora<T>& l = lora(seg, layer, group);
            const int first_row = std::max(row0, seg.begin), last_row = std::min(row1, seg.end);
            if (!l.a || first_row >= last_row) continue;
            int first = 0;  // panel of this part
            for (int part = 0; part < parts_of(group); ++part) {
                const int panels = s.part(group, part) / LANES;
                const int from = std::max(p0 - first, 0), until = std::min(p1 - first, panels);
                if (from < until)
                    multiply(u + part * seg.padded_rank, ldu, first_row, last_row, l.b[part], from, until,
                             seg.padded_rank / 2, Target<T>::add(static_cast<float*>(to.data) + first * LANES, to.ld));
                first += panels;
            }
        }
    }

    void add_bias(const float* bias, const Grid& g, const Target<T>& to) const {
        for (int row = g.row0; row < g.row1; ++row)
            for (int j = g.p0 * LANES; j < g.p1 * LANES; j += LANES) {
                float* at = static_cast<float*>(to.data) + row * to.ld + j;
                store(at, load(at) + load(bias + j));
            }
    }

    // Turns the pairs (i, i + head_dim / 2) of a head; sign -1 turns back.
    template <typename Load, typename Save>
    void turn(int row, float sign, const Load& load, const Save& save) const {
        const int half = m.head_dim / 2;
        for (int j = 0; j < half; j += LANES) {
            const int lanes = half - j;
            const f32x16 cos = load_first(p.cos + row * half + j, lanes);
            const f32x16 sin = load_first(p.sin + row * half + j, lanes) * all(sign);
            const f32x16 a = load(j, lanes), b = load(half + j, lanes);
            save(j, lanes, less_product(b, sin, a * cos));
            save(half + j, lanes, plus_product(a, sin, b * cos));
        }
    }

    void rotate_rows(int layer, const Layer<W>& w, const KeptLayer<T>& kept) {
        const int d = m.head_dim, num_qk = m.heads + m.groups;
        const Pages<T> cache{p.cache + layer * p.layer_stride, p.page_stride, 2 * PAGE * static_cast<int64_t>(d), d};
        for (int c = 0; c < p.num_chunks; ++c) {
            const Chunk& chunk = p.chunks[c];
            int begin, end;
            me.share(p.rows, begin, end);
            begin = std::max(begin, chunk.begin), end = std::min(end, chunk.end);
            for (int row = begin; row < end; ++row) {
                const float* x = p.work.wide + static_cast<int64_t>(row) * s.qkv;
                T* to = kept.qkv + static_cast<int64_t>(row) * s.qkv;
                for (int head = 0; head < num_qk; ++head) rotate_head(row, head, x + head * d, w, kept, to + head * d);
                for (int j = 0; j < s.kv; j += LANES) store(to + num_qk * d + j, load(x + num_qk * d + j));
                const int position = chunk.position + row - chunk.begin;
                for (int group = 0; group < m.groups; ++group)
                    cache.write(chunk.pages[position / PAGE], position % PAGE, group, to + (m.heads + group) * d,
                                to + (num_qk + group) * d);
            }
        }
    }

    void rotate_head(int row, int head, const float* x, const Layer<W>& w, const KeptLayer<T>& kept, T* to) const {
        const int d = m.head_dim;
        alignas(64) float normed[MAX_HEAD_DIM];
        if (w.qk_norm) {
            const int64_t at = static_cast<int64_t>(row) * (m.heads + m.groups) + head;
            T unit[MAX_HEAD_DIM], out[MAX_HEAD_DIM];
            const float inverse =
                norm_row(x, w.qk_norm + head * d, d, kept.qk_unit ? kept.qk_unit + at * d : unit, out);
            if (kept.qk_inverse) kept.qk_inverse[at] = inverse;
            for (int j = 0; j < d; j += LANES) store(normed + j, load(out + j));
            x = normed;
        }
        turn(
            row, 1.f, [&](int j, int lanes) { return load_first(x + j, lanes); },
            [&](int j, int lanes, f32x16 y) { store_first(to + j, lanes, y); });
    }

    void attend_all(int layer, const KeptLayer<T>& kept) {
        const int d = m.head_dim, per_group = m.heads / m.groups;
        const float scale = 1.f / std::sqrt(static_cast<float>(d));
        const Pages<T> cache{p.cache + layer * p.layer_stride, p.page_stride, 2 * PAGE * static_cast<int64_t>(d), d};
        AttendScratch<T>& scratch =
            *reinterpret_cast<AttendScratch<T>*>(p.work.threads + me.index * p.work.thread_bytes);
        // The blocks of a long sequence differ in cost: dealt out there and back they come out even.
        int item = 0;
        const auto mine = [&] {
            const int round = item / me.count, at = item % me.count;
            ++item;
            return (round % 2 ? me.count - 1 - at : at) == me.index;
        };
        for (int c = 0; c < p.num_chunks; ++c) {
            const Chunk& chunk = p.chunks[c];
            const int num = chunk.end - chunk.begin;
            const auto queries = [&](int row, int head, int rows, int64_t ldq, int64_t ldo, int step) {
                float* lse = kept.lse ? kept.lse + static_cast<int64_t>(row) * m.heads + head : nullptr;
                return Queries<T>{kept.qkv + static_cast<int64_t>(row) * s.qkv + head * d,
                                  ldq,
                                  rows,
                                  chunk.position + row - chunk.begin,
                                  step,
                                  kept.attended + static_cast<int64_t>(row) * s.q + head * d,
                                  ldo,
                                  lse,
                                  step ? m.heads : 1};
            };
            if (num == 1) {
                for (int group = 0; group < m.groups; ++group)
                    if (mine())
                        attend(queries(chunk.begin, group * per_group, per_group, d, d, 0), cache, chunk.pages, group,
                               scale, scratch);
                continue;
            }
            for (int head = 0; head < m.heads; ++head)
                for (int at = 0; at < num; at += BLOCK)
                    if (mine())
                        attend(queries(chunk.begin + at, head, std::min(BLOCK, num - at), s.qkv, s.q, 1), cache,
                               chunk.pages, head / per_group, scale, scratch);
        }
    }

    // act = silu(gate) * up
    void gate_rows(T* keep) {
        each_row([&](int64_t row) {
            const float* gate = p.work.wide + row * 2 * s.inner;
            T* act = p.work.act + row * s.inner;
            T* kept = keep ? keep + row * 2 * s.inner : nullptr;
            for (int j = 0; j < s.inner; j += LANES) {
                // What is kept is what is used, so that the backward's numbers are the forward's.
                const f32x16 g = rounded<T>(load(gate + j)), u = rounded<T>(load(gate + s.inner + j));
                store(act + j, (g * sigmoid(g)) * u);
                if (kept) store(kept + j, g), store(kept + s.inner + j, u);
            }
        });
    }

    // --- backward; p.h is the gradient of the layer's output, and in the end that of its input

    void backward_layer(int layer) {
        const Layer<W>& w = m.layers[layer];
        const KeptLayer<T> kept(p, layer);
        gate_again(kept.gate_up);
        narrow_h();
        barrier();
        back(layer, DOWN, p.work.act, s.inner, p.work.d_low, kept, Target<T>::set(p.work.wide, s.inner));
        barrier();
        gate_backward(kept.gate_up);
        weigh_units(kept.mlp_unit, w.mlp_norm);
        barrier();
        back(layer, GATE_UP, p.work.x, s.hidden, p.work.d_wide, kept, Target<T>::set(p.work.d_narrow, s.hidden));
        barrier();
        norm_backward(w.mlp_norm, kept.mlp_unit, kept.mlp_inverse, p.work.d_narrow, nullptr);
        narrow_h();
        barrier();
        back(layer, OUT, kept.attended, s.q, p.work.d_low, kept, Target<T>::low(p.work.d_wide, s.q));
        barrier();
        attend_back(kept);
        weigh_units(kept.attention_unit, w.attention_norm);
        barrier();
        rotate_back(w, kept);
        barrier();
        // Nothing before the first layer is trained.
        Target<T> to = Target<T>::set(p.work.d_narrow, s.hidden);
        if (layer == 0) to.data = nullptr;
        back(layer, QKV, p.work.x, s.hidden, p.work.d_wide, kept, to);
        barrier();
        if (layer > 0)
            norm_backward(w.attention_norm, kept.attention_unit, kept.attention_inverse, p.work.d_narrow, nullptr);
    }

    void gate_again(const T* gate_up) {
        each_row([&](int64_t row) {
            const T* gate = gate_up + row * 2 * s.inner;
            for (int j = 0; j < s.inner; j += LANES) {
                const f32x16 g = load(gate + j), u = load(gate + s.inner + j);
                store(p.work.act + row * s.inner + j, (g * sigmoid(g)) * u);
            }
        });
    }

    void gate_backward(const T* gate_up) {
        each_row([&](int64_t row) {
            const T* gate = gate_up + row * 2 * s.inner;
            const float* d_act = p.work.wide + row * s.inner;
            T* to = p.work.d_wide + row * 2 * s.inner;
            const f32x16 one = all(1.f);
            for (int j = 0; j < s.inner; j += LANES) {
                const f32x16 g = load(gate + j), u = load(gate + s.inner + j), d = load(d_act + j);
                const f32x16 open = sigmoid(g);
                const f32x16 slope = open * plus_product(g, one - open, one);
                store(to + j, (d * u) * slope);
                store(to + s.inner + j, d * (g * open));
            }
        });
    }

    void narrow_h() {
        each_row([&](int64_t row) {
            for (int64_t j = row * s.hidden; j < (row + 1) * s.hidden; j += LANES)
                store(p.work.d_low + j, load(p.h + j));
        });
    }

    void weigh_units(const T* unit, const float* weight) {
        each_row([&](int64_t row) {
            for (int j = 0; j < s.hidden; j += LANES) {
                const int64_t at = row * s.hidden + j;
                store(p.work.x + at, load(unit + at) * load(weight + j));
            }
        });
    }

    // h += (w dy - unit mean(w dy unit)) / rms; dy is float32 or bfloat16, and replaces h in the latter case.
    void norm_backward(const float* weight, const T* unit, const float* inverse, const float* dy, const T* dy_low) {
        each_row([&](int64_t row) {
            const int64_t at = row * s.hidden;
            const auto grad = [&](int j) {
                return (dy ? load(dy + at + j) : load(dy_low + at + j)) * load(weight + j);
            };
            f32x16 along = zero();
            for (int j = 0; j < s.hidden; j += LANES) along = plus_product(grad(j), load(unit + at + j), along);
            const f32x16 mean = all(sum_of(along) / s.hidden), by = all(inverse[row]);
            for (int j = 0; j < s.hidden; j += LANES) {
                const f32x16 dx = less_product(load(unit + at + j), mean, grad(j)) * by;
                store(p.h + at + j, dy ? (load(p.h + at + j) + dx) : dx);
            }
        });
    }

    // dx = dy W + dy B A, and the gradients of A and B. `to` without data: dx is not wanted.
    void back(int layer, int group, const T* x, int ldx, const T* dy, const KeptLayer<T>& kept, const Target<T>& to) {
        const Linear<W>& w = m.layers[layer].linears[group];
        const int parts = parts_of(group);
        T* du = p.work.d_low_rank;
        for (int i = 0; i < p.num_segments; ++i) {
            const Segment<T>& seg = p.segments[i];
            const Lora<T>& l = lora(seg, layer, group);
            if (!l.a) continue;
            int column = 0;
            for (int part = 0; part < parts; ++part) {
                const Grid g(me, seg.begin, seg.end, seg.padded_rank / LANES);
                multiply(dy + column, w.out, g.row0, g.row1, l.b_back[part], g.p0, g.p1, s.part(group, part) / 2,
                         Target<T>::low(du + part * seg.padded_rank, ldu, seg.scaling));
                column += s.part(group, part);
            }
        }
        barrier();
        if (to.data) {
            // Summed in float32 also where the result is bfloat16.
            const bool low = to.store == Store::LOW;
            const Target<T> sum = low ? Target<T>::set(p.work.d_narrow, to.ld) : to;
            const Grid g(me, 0, p.rows, w.in / LANES);
            for (int p0 = g.p0; p0 < g.p1; p0 += MAX_TILE_PANELS) {
                const int p1 = std::min(p0 + MAX_TILE_PANELS, g.p1);
                multiply_block(dy, w.out, g.row0, g.row1, w.backward, p0, p1, w.out / 2, sum, p1 < g.p1);
                for (int i = 0; i < p.num_segments; ++i) {
                    const Segment<T>& seg = p.segments[i];
                    const Lora<T>& l = lora(seg, layer, group);
                    const int row0 = std::max(g.row0, seg.begin), row1 = std::min(g.row1, seg.end);
                    if (l.a && row0 < row1)
                        multiply_block(du, ldu, row0, row1, l.a_back, p0, p1, parts * seg.padded_rank / 2,
                                       Target<T>::add(static_cast<float*>(sum.data), sum.ld), false);
                }
            }
            if (low)
                for (int64_t row = g.row0; row < g.row1; ++row)
                    for (int64_t j = g.p0 * LANES; j < g.p1 * LANES; j += LANES)
                        store(static_cast<T*>(to.data) + row * to.ld + j,
                              load(static_cast<float*>(sum.data) + row * to.ld + j));
        }
        for (int i = 0; i < p.num_segments; ++i) grads(layer, group, p.segments[i], x, ldx, dy, w.out, kept);
    }

    // dA = du^T x, dB = dy^T u: sums over the segment's own rows, in their order.
    void grads(int layer, int group, const Segment<T>& seg, const T* x, int ldx, const T* dy, int ldy,
               const KeptLayer<T>& kept) {
        const Lora<T>& l = lora(seg, layer, group);
        if (!l.a) return;
        const int rows = seg.end - seg.begin, pairs = (rows + 1) / 2, ldt = round_up(rows, 2), parts = parts_of(group);
        const int width = parts * seg.padded_rank;
        const Linear<W>& w = m.layers[layer].linears[group];
        int begin, end;
        me.share(w.in / LANES, begin, end);
        pack_panels(x + static_cast<int64_t>(seg.begin) * ldx, 1, ldx, w.in, rows, p.work.x_panels, begin, end);
        me.share(w.out / LANES, begin, end);
        pack_panels(dy + static_cast<int64_t>(seg.begin) * ldy, 1, ldy, w.out, rows, p.work.dy_panels, begin, end);
        me.share(width / LANES, begin, end);
        begin *= LANES, end *= LANES;
        const int64_t first = static_cast<int64_t>(seg.begin) * ldu;
        transpose_rows(p.work.d_low_rank + first, ldu, rows, p.work.dy_turned, ldt, begin, end);
        transpose_rows(kept.low_rank[group] + first, ldu, rows, p.work.x_turned, ldt, begin, end);
        barrier();
        int column = 0;
        for (int part = 0; part < parts; ++part) {
            const int64_t own = static_cast<int64_t>(part) * seg.padded_rank * ldt;
            const Grid a(me, 0, seg.rank, w.in / LANES);
            multiply(p.work.dy_turned + own, ldt, a.row0, a.row1, p.work.x_panels, a.p0, a.p1, pairs,
                     Target<T>::low(seg.grads + l.at_a + static_cast<int64_t>(part) * seg.rank * w.in, w.in));
            const int out = s.part(group, part);
            int p0, p1;
            me.share(out / LANES, p0, p1);
            multiply(p.work.x_turned + own, ldt, 0, seg.rank,
                     p.work.dy_panels + static_cast<int64_t>(column) * 2 * pairs, p0, p1, pairs,
                     Target<T>::set(p.work.grad_b, out));
            for (int j = p0 * LANES; j < p1 * LANES; j += LANES)
                for (int r = 0; r < seg.rank; r += LANES) {
                    f32x16 block[LANES];
                    for (int q = 0; q < LANES; ++q)
                        block[q] =
                            r + q < seg.rank ? load(p.work.grad_b + static_cast<int64_t>(r + q) * out + j) : zero();
                    transpose(block);
                    for (int q = 0; q < LANES; ++q)
                        store_first(seg.grads + l.at_b[part] + static_cast<int64_t>(j + q) * seg.rank + r, seg.rank - r,
                                    block[q]);
                }
            column += out;
            barrier();
        }
    }

    void attend_back(const KeptLayer<T>& kept) {
        const int d = m.head_dim, per_group = m.heads / m.groups;
        char* scratch = p.work.threads + me.index * p.work.thread_bytes;
        const T* d_attended = p.work.d_wide;
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int c = 0; c < p.num_chunks; ++c)
            for (int head = 0; head < m.heads; ++head) {
                const Chunk& chunk = p.chunks[c];
                const int64_t row = chunk.begin;
                const T* qkv = kept.qkv + row * s.qkv;
                const int group = head / per_group;
                const int64_t at = row * s.q + head * d;
                attend_backward<T>({chunk.end - chunk.begin, d, 1.f / std::sqrt(static_cast<float>(d)), qkv + head * d,
                                    qkv + (m.heads + group) * d, qkv + (m.heads + m.groups + group) * d,
                                    kept.attended + at, d_attended + at, s.qkv, s.q, kept.lse + row * m.heads + head,
                                    m.heads, p.work.dq + at, p.work.dk + at, p.work.dv + at, s.q},
                                   scratch);
            }
    }

    // The heads of a group share its keys and values: their gradients add up, in the order of the heads.
    void rotate_back(const Layer<W>& w, const KeptLayer<T>& kept) {
        const int d = m.head_dim, per_group = m.heads / m.groups;
        each_row([&](int64_t row) {
            T* to = p.work.d_wide + row * s.qkv;
            alignas(64) float grad[MAX_HEAD_DIM];
            const auto heads_of = [&](const float* from, int group) {
                for (int j = 0; j < d; j += LANES) {
                    f32x16 sum = zero();
                    for (int i = 0; i < per_group; ++i)
                        sum = sum + load(from + row * s.q + (group * per_group + i) * d + j);
                    store(grad + j, sum);
                }
            };
            for (int head = 0; head < m.heads + m.groups; ++head) {
                if (head < m.heads)
                    std::memcpy(grad, p.work.dq + row * s.q + head * d, d * sizeof(float));
                else
                    heads_of(p.work.dk, head - m.heads);
                turn(
                    static_cast<int>(row), -1.f, [&](int j, int lanes) { return load_first(grad + j, lanes); },
                    [&](int j, int lanes, f32x16 y) { store_first(grad + j, lanes, y); });
                if (w.qk_norm) qk_norm_backward(w, kept, row, head, grad);
                for (int j = 0; j < d; j += LANES) store(to + head * d + j, load(grad + j));
            }
            for (int group = 0; group < m.groups; ++group) {
                heads_of(p.work.dv, group);
                for (int j = 0; j < d; j += LANES) store(to + (m.heads + m.groups + group) * d + j, load(grad + j));
            }
        });
    }

    void qk_norm_backward(const Layer<W>& w, const KeptLayer<T>& kept, int64_t row, int head, float* grad) const {
        const int d = m.head_dim;
        const int64_t at = row * (m.heads + m.groups) + head;
        const T* unit = kept.qk_unit + at * d;
        const float* weight = w.qk_norm + head * d;
        f32x16 along = zero();
        const auto weighed = [&](int j) { return load(grad + j) * load(weight + j); };
        for (int j = 0; j < d; j += LANES) along = plus_product(weighed(j), load(unit + j), along);
        const f32x16 mean = all(sum_of(along) / d), by = all(kept.qk_inverse[at]);
        for (int j = 0; j < d; j += LANES) store(grad + j, less_product(load(unit + j), mean, weighed(j)) * by);
    }
};

}  // namespace selfloop
