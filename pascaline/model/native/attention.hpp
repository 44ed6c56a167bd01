// Attention of tokens over the pages of their row: blocks of BLOCK positions in their absolute order, the softmax rescaled between them,
// so that a token's numbers do not depend on which step, batch or chunk it is computed in.
#pragma once
#include "matmul.hpp"

constexpr i64 BLOCK = 16;
constexpr i64 QUERIES = 32;  // of one task

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

// o[g] = o[g] * decay[g] + sum over j of p[g][j] v[j], in the order of j, for MG queries of one token.
template <int MG>
INLINE void accumulate(const float* p, const float* decay, const float* v, i64 stride, i64 count, i64 V, float* o) {
    for (i64 c = 0; c < V; c += 2 * LANES) {
        const i64 left = least(V - c, LANES), right = V - c - LANES;
        Lanes sum[MG][2];
#pragma GCC unroll 4
        for (int g = 0; g < MG; g++) {
            sum[g][0] = load_some(o + g * V + c, left) * decay[g];
            sum[g][1] = right > 0 ? load_some(o + g * V + c + LANES, right) * decay[g] : Lanes{};
        }
        for (i64 j = 0; j < count; j++) {
            const float* at = v + j * stride + c;
            Lanes a = load_some(at, left), b = right > 0 ? load_some(at + LANES, right) : Lanes{};
#pragma GCC unroll 4
            for (int g = 0; g < MG; g++) {
                Lanes weight = all(p[g * BLOCK + j]);
                sum[g][0] = fused(weight, a, sum[g][0]);
                sum[g][1] = fused(weight, b, sum[g][1]);
            }
        }
        for (int g = 0; g < MG; g++) {
            store_some(o + g * V + c, sum[g][0], left);
            if (right > 0) store_some(o + g * V + c + LANES, sum[g][1], right);
        }
    }
}

// Scores s[0..count-1] -> weights against the largest so far, `top`; `weight` is their sum so far; what the earlier ones shrink by.
INLINE float soften(float* s, i64 count, float& top, float& weight) {
    for (i64 j = count; j < BLOCK; j++) s[j] = -INFINITY;
    float most = top;
    for (i64 j = 0; j < BLOCK; j += LANES) {
        float here = largest(load(s + j));
        most = here > most ? here : most;
    }
    const float decay = top == most ? 1.0f : top == -INFINITY ? 0.0f : exponential(all(top - most))[0];
    Lanes sum = {};
    for (i64 j = 0; j < BLOCK; j += LANES) {
        Lanes x = load(s + j);
        x = x == -INFINITY ? Lanes{} : exponential(x - most);
        store(s + j, x);
        sum += x;
    }
    top = most;
    weight = std::fma(weight, decay, total(sum));
    return decay;
}

// Ask for a page that is read next: it lies anywhere, so that the processor does not guess it.
template <class T>
INLINE void fetch(const T* at, const Pages& p) {
    constexpr i64 line = 64 / sizeof(T);
    for (i64 j = 0; j < BLOCK; j++, at += p.stride) {
        for (i64 k = 0; k < p.key_size; k += line) __builtin_prefetch(at + p.key + k);
        if (p.key != p.value)
            for (i64 k = 0; k < p.value_size; k += line) __builtin_prefetch(at + p.value + k);
    }
}

// Tokens of one row, token i at position last[i] and with `heads` queries; q [tokens * heads <= QUERIES, key_size], scaled already.
// out(query, k, lanes, count) gets what is mixed.
template <class T, class Out>
static void attend(const float* const* q, i64 tokens, i64 heads, const i64* last, const T* entries, const Pages& p, float* scratch, Out out) {
    const i64 V = p.value_size, m = tokens * heads;
    float *keys = scratch, *values = keys + BLOCK * p.key_size, *scores = values + BLOCK * V, *mixed = scores + QUERIES * BLOCK;
    float top[QUERIES], weight[QUERIES], decay[QUERIES];
    std::memset(mixed, 0, m * V * sizeof(float));
    for (i64 g = 0; g < m; g++) top[g] = -INFINITY, weight[g] = 0.0f;
    i64 end = 0;
    for (i64 i = 0; i < tokens; i++) end = last[i] >= end ? last[i] + 1 : end;
    for (i64 block = 0; block * BLOCK < end; block++) {
        const i64 first = block * BLOCK, count = least(BLOCK, end - first);
        const T* at = entries + p.table[block] * BLOCK * p.stride;
        if (first + BLOCK < end) fetch(entries + p.table[block + 1] * BLOCK * p.stride, p);
        i64 key_stride, value_stride;
        const float* k = as_floats(at + p.key, p.stride, count, p.key_size, keys, key_stride);
        const bool same = p.key == p.value && k == keys;  // latent entries are keys and values at once
        const float* v = same ? k : as_floats(at + p.value, p.stride, count, V, values, value_stride);
        if (same) value_stride = key_stride;
        multiply<float>([&](i64 g) { return q[g / heads] + g % heads * p.key_size; }, m, k, key_stride, p.key_size, 0, count,
                        [&](i64 g, i64 j, const float* s, i64 c) { std::memcpy(scores + g * BLOCK + j, s, c * sizeof(float)); });
        for (i64 i = 0; i < tokens; i++) {
            const i64 seen = least(BLOCK, last[i] + 1 - first), from = i * heads, to = from + heads;
            if (seen <= 0) continue;
            for (i64 g = from; g < to; g++) decay[g] = soften(scores + g * BLOCK, seen, top[g], weight[g]);
            i64 g = from;
            for (; g + 4 <= to; g += 4) accumulate<4>(scores + g * BLOCK, decay + g, v, value_stride, seen, V, mixed + g * V);
            for (; g < to; g++) accumulate<1>(scores + g * BLOCK, decay + g, v, value_stride, seen, V, mixed + g * V);
        }
    }
    for (i64 g = 0; g < m; g++)
        for (i64 c = 0; c < V; c += LANES) out(g, c, load_some(mixed + g * V + c, V - c) / weight[g], V - c);
}
