// The decoder's layers, forward and backward, with low-rank adapters on ranges of rows. All threads of a team call
// these.
#pragma once

#include <cstdint>

#include "simd.h"

namespace selfloop {

constexpr int MAX_PARTS = 3;
enum Group { QKV, OUT, GATE_UP, DOWN, NUM_GROUPS };

// Rows (activations, adapters, keys and values) are T, base weights W: bfloat16 or float32.

// y = x W^T + bias; `backward` holds W^T, null as long as nothing trains.
template <typename W>
struct Linear {
    const W *forward, *backward;
    const float* bias;
    int32_t in, out;
};

template <typename W>
struct Layer {
    const float *attention_norm, *mlp_norm, *qk_norm;
    Linear<W> linears[NUM_GROUPS];
};

template <typename W>
struct Model {
    int32_t num_layers, hidden, inner, heads, groups, head_dim;
    float eps;
    const Layer<W>* layers;
    const float* final_norm;
};

// One group of one layer of one adapter: A and each B in panels, forward and transposed. No A: nothing is adapted.
template <typename T>
struct Lora {
    const T *a, *a_back;
    const T *b[MAX_PARTS], *b_back[MAX_PARTS];
    int64_t at_a, at_b[MAX_PARTS];  // where A and each B lie, plain, in the adapter's parameters
};

// Rows [begin, end) go through an adapter, whose rank is padded to a multiple of 16 in panels.
template <typename T>
struct Segment {
    int32_t begin, end, rank, padded_rank;
    float scaling;
    const Lora<T>* groups;  // [layer][group]
    T* grads;               // of all of the adapter's parameters; written by a backward
};

// Rows [begin, end) are a sequence's tokens from `position` on; `pages` is its page table.
struct Chunk {
    int32_t begin, end, position;
    const int32_t* pages;
};

// Where a pass leaves what its backward needs, layer behind layer; unless it `keeps`, each layer overwrites the one
// before.
template <typename T>
struct Kept {
    T *attention_unit, *qkv, *attended, *mlp_unit, *gate_up, *low_rank, *qk_unit;
    float *attention_inverse, *mlp_inverse, *lse, *qk_inverse;
    int32_t keeps;
    int32_t low_rank_width;
};

template <typename T>
struct Work {
    T *x, *act;           // (rows, hidden), (rows, inner)
    float* wide;          // (rows, widest projection)
    T* d_wide;            // (rows, widest projection)
    float* d_narrow;      // (rows, hidden or heads * head_dim)
    T* d_low;             // (rows, hidden or heads * head_dim)
    float *dq, *dk, *dv;  // (rows, heads * head_dim)
    T* d_low_rank;        // (rows, low_rank_width)
    T *x_panels, *dy_panels, *x_turned, *dy_turned;
    float* grad_b;
    char* threads;  // thread_bytes for each thread
    int64_t thread_bytes;
};

template <typename T, typename W>
struct Pass {
    const Model<W>* model;
    int32_t rows, num_segments, num_chunks, num_threads;
    float* h;                   // (rows, hidden)
    float *h_inputs, *h_again;  // what goes into each layer, and room for one, where the backward computes layers again
    const float *cos, *sin;     // (rows, head_dim / 2)
    const Segment<T>* segments;
    const Chunk* chunks;
    T* cache;
    int64_t page_stride, layer_stride;  // layer_stride 0: one layer's pages, used by each in turn
    Kept<T> kept;
    Work<T> work;
    T* final_unit;
    float* final_inverse;
    T* out;          // (rows, hidden)
    const T* d_out;  // the gradient of that
};

static inline int parts_of(int group) { return group == QKV ? 3 : group == GATE_UP ? 2 : 1; }

struct Sizes {
    int q, kv, qkv, hidden, inner;

    template <typename W>
    explicit Sizes(const Model<W>& m)
        : q(m.heads * m.head_dim), kv(m.groups * m.head_dim), qkv(q + 2 * kv), hidden(m.hidden), inner(m.inner) {}

    int part(int group, int index) const {
        switch (group) {
            case QKV:
                return index == 0 ? q : kv;
            case GATE_UP:
                return inner;
            default:
                return hidden;
        }
    }
};

// One layer's view of what is kept.
template <typename T>
struct KeptLayer {
    T *attention_unit, *qkv, *attended, *mlp_unit, *gate_up, *low_rank[NUM_GROUPS], *qk_unit;
    float *attention_inverse, *mlp_inverse, *lse, *qk_inverse;

    template <typename W>
    KeptLayer(const Pass<T, W>& p, int layer) {
        const Sizes s(*p.model);
        const int64_t rows = p.rows, at = p.kept.keeps ? layer * rows : 0;
        const int heads = p.model->heads, num_qk = heads + p.model->groups;
        attention_unit = p.kept.attention_unit + at * s.hidden;
        mlp_unit = p.kept.mlp_unit + at * s.hidden;
        qkv = p.kept.qkv + at * s.qkv;
        attended = p.kept.attended + at * s.q;
        gate_up = p.kept.gate_up ? p.kept.gate_up + at * 2 * s.inner : nullptr;
        lse = p.kept.lse ? p.kept.lse + at * heads : nullptr;
        attention_inverse = p.kept.attention_inverse + at;
        mlp_inverse = p.kept.mlp_inverse + at;
        qk_unit = p.kept.qk_unit ? p.kept.qk_unit + at * num_qk * p.model->head_dim : nullptr;
        qk_inverse = p.kept.qk_inverse ? p.kept.qk_inverse + at * num_qk : nullptr;
        for (int group = 0; group < NUM_GROUPS; ++group)
            low_rank[group] = p.kept.low_rank + (at * NUM_GROUPS + group * rows) * p.kept.low_rank_width;
    }
};

}  // namespace selfloop
