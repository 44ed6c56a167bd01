// The router and the routed experts of many tokens: sorted by expert, so that each expert's weights are read once, in place.
#pragma once
#include <cstdlib>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "matmul.hpp"

INLINE i64 own() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Memory of one calling thread, kept between calls.
struct Arena {
    struct Store {
        char* base = nullptr;
        i64 size = 0;
        ~Store() { std::free(base); }
    };
    static Store& store() {
        static thread_local Store own;
        return own;
    }
    char* base = nullptr;
    i64 used = 0;
    template <class U>
    U* take(i64 count) {
        U* here = (U*)(base + used);
        used += (count * i64(sizeof(U)) + 127) / 64 * 64;
        return here;
    }
    void settle() {
        Store& kept = store();
        if (kept.size < used) {
            std::free(kept.base);
            kept.size = used + used / 4;
            kept.base = (char*)std::aligned_alloc(64, (kept.size + 63) / 64 * 64);
            if (!kept.base) std::abort();
        }
        base = kept.base;
        used = 0;
    }
};

constexpr i64 GATES = 16;  // columns of the gate in one task, and as many of up
constexpr i64 CHUNK = 64;  // rows of one

// silu(gate x) * up x, columns from..to-1, of rows 0..n-1 <= CHUNK; w holds the gate's rows, then those of up. Arrays: [2 * width, D].
template <class T, class Row, class Out>
static void gated(Row row, i64 n, const T* w, const T* bias, i64 D, i64 width, i64 from, i64 to, Out out) {
    alignas(64) float side[2][CHUNK * GATES];
    for (int up = 0; up < 2; up++) {
        const T* b = bias ? bias + up * width : nullptr;
        multiply<T>(row, n, w + up * width * D, D, D, from, to, [&](i64 i, i64 j, const float* v, i64 c) {
            for (i64 k = 0; k < c; k++) side[up][i * GATES + j - from + k] = b ? v[k] + number(b[j + k]) : v[k];
        });
    }
    for (i64 i = 0; i < n; i++)
        for (i64 k = 0; k < to - from; k += LANES) {
            Lanes g = load_some(side[0] + i * GATES + k, to - from - k), u = load_some(side[1] + i * GATES + k, to - from - k);
            store_some(out(i) + from + k, g / (exponential(-g) + 1.0f) * u, to - from - k);
        }
}

constexpr i64 TOGETHER = 1024;  // tokens sorted at a time

template <class T>
struct Experts {
    struct Segment {  // rows first..first+count-1 of those sorted, or tokens of the shared expert (-1)
        i64 expert, first, count;
    };
    i64 D, width, E, K, groups, open_groups, normed, shared_width;
    float routed_scale;
    const float *router, *router_bias;
    const T *gate_up, *down;
    // Of a call. A row is one (token, k), sorted by expert; hidden and y belong to rows, hidden_shared and y_shared to tokens.
    T *h, *hidden, *hidden_shared;
    float *h_float, *logits, *weight, *y, *y_shared;
    int32_t *chosen, *row_of, *token_of, *start;
    Segment* segments;
    i64 segment_count;

    void place(Arena& arena, i64 n) {
        hidden = arena.take<T>(E ? least(n, TOGETHER) * K * width : n * width);
        if (!E) return;
        n = least(n, TOGETHER);
        h = arena.take<T>(n * D);
        h_float = arena.take<float>(sizeof(T) == 4 ? 0 : n * D);
        hidden_shared = arena.take<T>(n * shared_width);
        logits = arena.take<float>(n * E);
        weight = arena.take<float>(n * K);
        y = arena.take<float>(n * K * D);
        y_shared = arena.take<float>(shared_width ? n * D : 0);
        chosen = arena.take<int32_t>(n * K);
        row_of = arena.take<int32_t>(n * K);
        token_of = arena.take<int32_t>(n * K);
        start = arena.take<int32_t>(E + 1);
        segments = arena.take<Segment>(E + n * K / CHUNK + n / CHUNK + 1);
    }

    // out = x + the chosen experts, weighted, + the shared one, of norm(x); all [n, D]. routes, unless null, gets the chosen of token i
    // at K slot[i].
    void forward(const float* x, const T* norm, float eps, const T* shared_gate_up, const T* shared_down, T* out, i64 n, const i64* slot,
                 int16_t* routes) {
        for (i64 first = 0; first < n; first += TOGETHER)
            some(x + first * D, norm, eps, shared_gate_up, shared_down, out + first * D, least(TOGETHER, n - first), slot + first, routes);
    }

    void some(const float* x, const T* norm, float eps, const T* shared_gate_up, const T* shared_down, T* out, i64 n, const i64* slot,
              int16_t* routes) {
#pragma omp for schedule(dynamic, 1)
        for (i64 i = 0; i < parts(n, 4); i++) {
            route(x, norm, eps, 4 * i, least(4, n - 4 * i));
            for (i64 p = 4 * i * K; routes && p < least(4 * (i + 1), n) * K; p++) routes[slot[p / K] * K + p % K] = int16_t(chosen[p]);
        }
#pragma omp single
        sort(n);
        const i64 wide = parts(width > shared_width ? width : shared_width, GATES);
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < segment_count * wide; task++) {
            const Segment g = segments[task / wide];
            const i64 from = task % wide * GATES, size = g.expert < 0 ? shared_width : width, to = least(from + GATES, size);
            if (from >= size) continue;
            if (g.expert < 0)
                gated<T>([&](i64 i) { return h + (g.first + i) * D; }, g.count, shared_gate_up, (const T*)nullptr, D, size, from, to,
                         [&](i64 i) { return hidden_shared + (g.first + i) * size; });
            else
                gated<T>([&](i64 i) { return h + token_of[g.first + i] * D; }, g.count, gate_up + g.expert * 2 * size * D, (const T*)nullptr, D,
                         size, from, to, [&](i64 i) { return hidden + (g.first + i) * size; });
        }
        const i64 step = columns<T>(width), tall = parts(D, step);
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < segment_count * tall; task++) {
            const Segment g = segments[task / tall];
            const i64 from = task % tall * step, to = least(from + step, D), size = g.expert < 0 ? shared_width : width;
            const T* from_rows = (g.expert < 0 ? hidden_shared : hidden) + g.first * size;
            float* to_rows = (g.expert < 0 ? y_shared : y) + g.first * D;
            multiply<T>([&](i64 i) { return from_rows + i * size; }, g.count, g.expert < 0 ? shared_down : down + g.expert * D * size, size, size,
                        from, to, [&](i64 i, i64 j, const float* v, i64 c) { std::memcpy(to_rows + i * D + j, v, c * sizeof(float)); });
        }
#pragma omp for schedule(static)
        for (i64 i = 0; i < n; i++) collect(x + i * D, out + i * D, i);
    }

    void route(const float* x, const T* norm, float eps, i64 first, i64 m) {
        const float* rows = sizeof(T) == 4 ? (const float*)h : h_float;
        for (i64 i = first; i < first + m; i++)
            normalise([&](i64 k, i64 c) { return load_some(x + i * D + k, c); }, D, norm, eps, [&](i64 k, Lanes v, i64 c) {
                store_some(h + i * D + k, v, c);
                if (sizeof(T) != 4) store_some(h_float + i * D + k, load_some(h + i * D + k, c), c);
            });
        multiply<float>([&](i64 i) { return rows + (first + i) * D; }, m, router, D, D, 0, E,
                        [&](i64 i, i64 j, const float* v, i64 c) { std::memcpy(logits + (first + i) * E + j, v, c * sizeof(float)); });
        for (i64 i = first; i < first + m; i++) choose(logits + i * E, chosen + i * K, weight + i * K);
    }

    // The K experts of a token in rising order, and their weights. `score` comes as logits. (Router.forward says it in PyTorch.)
    void choose(float* score, int32_t* own_chosen, float* own_weight) {
        constexpr i64 MOST = 1024;
        float choice[MOST];
        for (i64 e = 0; e < E; e++) {
            score[e] = 1.0f / (1.0f + exponential(all(-score[e]))[0]);
            choice[e] = score[e] + router_bias[e];
        }
        if (groups > 1) close_groups(choice);
        for (i64 k = 0; k < K; k++) {
            i64 best = -1;
            for (i64 e = 0; e < E; e++)
                if (!std::isinf(choice[e]) && (best < 0 || choice[e] > choice[best])) best = e;
            best = best < 0 ? k : best;  // only where scores are no numbers
            choice[best] = -INFINITY;
            i64 at = k;
            for (; at > 0 && own_chosen[at - 1] > best; at--) own_chosen[at] = own_chosen[at - 1];
            own_chosen[at] = int32_t(best);
        }
        float sum = 1e-20f;
        for (i64 k = 0; k < K; k++) sum += score[own_chosen[k]];
        for (i64 k = 0; k < K; k++) own_weight[k] = score[own_chosen[k]] / (normed ? sum : 1.0f) * routed_scale;
    }

    void close_groups(float* choice) {
        constexpr i64 MOST = 1024;
        const i64 size = E / groups;
        float best[MOST];
        bool open[MOST] = {};
        for (i64 g = 0; g < groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (i64 e = g * size; e < (g + 1) * size; e++)
                if (choice[e] > first) second = first, first = choice[e];
                else if (choice[e] > second) second = choice[e];
            best[g] = first + second;
        }
        for (i64 k = 0; k < open_groups; k++) {
            i64 top = -1;
            for (i64 g = 0; g < groups; g++)
                if (!open[g] && (top < 0 || best[g] > best[top])) top = g;
            open[top] = true;
        }
        for (i64 e = 0; e < E; e++)
            if (!open[e / size]) choice[e] = -INFINITY;
    }

    void sort(i64 n) {
        for (i64 e = 0; e <= E; e++) start[e] = 0;
        for (i64 p = 0; p < n * K; p++) start[chosen[p] + 1]++;
        for (i64 e = 0; e < E; e++) start[e + 1] += start[e];
        segment_count = 0;
        for (i64 e = 0; e < E; e++)
            for (i64 first = start[e]; first < start[e + 1]; first += CHUNK)
                segments[segment_count++] = {e, first, least(CHUNK, start[e + 1] - first)};
        for (i64 first = 0; shared_width && first < n; first += CHUNK) segments[segment_count++] = {-1, first, least(CHUNK, n - first)};
        for (i64 p = 0; p < n * K; p++) {
            row_of[p] = start[chosen[p]]++;
            token_of[row_of[p]] = int32_t(p / K);
        }
    }

    void collect(const float* x, T* out, i64 i) {
        for (i64 j = 0; j < D; j += LANES) {
            Lanes sum = {};
            for (i64 k = 0; k < K; k++) sum = fused(all(weight[i * K + k]), load_some(y + row_of[i * K + k] * D + j, D - j), sum);
            if (shared_width) sum += load_some(y_shared + i * D + j, D - j);
            store_some(out + j, load_some(x + j, D - j) + sum, D - j);
        }
    }
};
