// Attention of one token over the pages of its row: blocks of BLOCK positions in their absolute order, the softmax rescaled between them,
// so that a token's numbers do not depend on which step, batch or chunk it is computed in.
#pragma once
#include "matmul.hpp"

constexpr i64 BLOCK = 16;
constexpr i64 QUERIES = 16;  // of one task

struct Pages {                // of one row and one head of keys and values
    const int32_t* table;     // its blocks
    i64 stride, key, value;   // numbers an entry has; where in it the keys begin, and the values
    i64 key_size, value_size;
};

INLINE i64 attention_scratch(i64 key_size, i64 value_size) { return BLOCK * (key_size + value_size) + QUERIES * (BLOCK + value_size); }

template <class T>
INLINE const float* as_floats(const T* p, i64 stride, i64 count, i64 size, float* buffer, i64& out_stride) {
    if constexpr (sizeof(T) == 4) {
        out_stride = stride;
        return p;
    } else {
        for (i64 i = 0; i < count; i++)
            for (i64 k = 0; k < size; k += LANES) store_some(buffer + i * size + k, load_some(p + i * stride + k, size - k), size - k);
        out_stride = size;
        return buffer;
    }
}

// m <= QUERIES queries q[m, key_size], scaled already, against positions 0..last; out(g, k, lanes, count) gets what is mixed.
template <class T, class Out>
static void attend(const float* q, i64 m, const T* entries, const Pages& p, i64 last, float* scratch, Out out) {
    const i64 V = p.value_size;
    float *keys = scratch, *values = keys + BLOCK * p.key_size, *scores = values + BLOCK * V, *mixed = scores + QUERIES * BLOCK;
    float top[QUERIES], weight[QUERIES];
    std::memset(mixed, 0, m * V * sizeof(float));
    for (i64 g = 0; g < m; g++) top[g] = -INFINITY, weight[g] = 0.0f;
    for (i64 block = 0; block <= last / BLOCK; block++) {
        const i64 count = least(BLOCK, last + 1 - block * BLOCK);
        const T* at = entries + p.table[block] * BLOCK * p.stride;
        i64 key_stride, value_stride;
        const float* k = as_floats(at + p.key, p.stride, count, p.key_size, keys, key_stride);
        const bool same = p.key == p.value && k == keys;  // latent entries are keys and values at once
        const float* v = same ? k : as_floats(at + p.value, p.stride, count, V, values, value_stride);
        if (same) value_stride = key_stride;
        multiply<float>([&](i64 g) { return q + g * p.key_size; }, m, k, key_stride, p.key_size, 0, count,
                        [&](i64 g, i64 j, const float* s, i64 c) { std::memcpy(scores + g * BLOCK + j, s, c * sizeof(float)); });
        for (i64 g = 0; g < m; g++) {
            float* s = scores + g * BLOCK;
            for (i64 j = count; j < BLOCK; j++) s[j] = -INFINITY;
            float most = top[g];
            for (i64 j = 0; j < BLOCK; j += LANES) {
                float here = largest(load(s + j));
                most = here > most ? here : most;
            }
            const float decay = block ? exponential(all(top[g] - most))[0] : 0.0f;
            Lanes sum = {};
            for (i64 j = 0; j < BLOCK; j += LANES) {
                Lanes x = load(s + j);
                x = x == -INFINITY ? Lanes{} : exponential(x - most);
                store(s + j, x);
                sum += x;
            }
            top[g] = most;
            weight[g] = std::fma(weight[g], decay, total(sum));
            for (i64 c = 0; c < V; c += LANES) {
                float* o = mixed + g * V + c;
                Lanes acc = load_some(o, V - c) * decay;
                for (i64 j = 0; j < count; j++) acc = fused(all(s[j]), load_some(v + j * value_stride + c, V - c), acc);
                store_some(o, acc, V - c);
            }
        }
    }
    for (i64 g = 0; g < m; g++)
        for (i64 c = 0; c < V; c += LANES) out(g, c, load_some(mixed + g * V + c, V - c) / weight[g], V - c);
}
