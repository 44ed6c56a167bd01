// One transformer block on tokens that lie in pages of a cache: what Block.forward does, in one call. `Shape` and `Weights` are filled in
// by native.py, in this order. Shapes: n tokens, D hidden, H heads, K heads of keys and values, R latent rank, N, P, V as in attention.py.
#include "attention.hpp"
#include "experts.hpp"

struct Shape {
    i64 hidden, heads, kv_heads, nope, rope, value, rank, q_rank, latent, entry;
    i64 width, experts, chosen, groups, open_groups, normed, shared;
    double eps, latent_eps, scale, routed_scale;
};
struct Weights {  // null: there is none
    const void *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *q_b, *kv_b, *o, *o_bias, *post_norm;
    const void *gate_up, *gate_up_bias, *down, *down_bias;
    const float *router, *router_bias;
    const void *experts_gate_up, *experts_down;
};
struct Step {
    i64 n, threads, table_width, routes_stride;
    const void *x, *turn;  // [n, D]; complex [n, P / 2]
    void *out, *entries;   // [n, D]; this layer's pool
    const int32_t *tables, *row;
    const i64 *position, *slot;
    int16_t* routes;  // where the first layer with experts notes those that it chose, by slot, the next `routes_stride` behind it; or null
};

// Lanes k.. of v, plus those of a bias where there is one.
template <class T>
INLINE Lanes biased(const float* v, i64 k, i64 left, const T* bias) {
    Lanes y = load_some(v + k, left);
    return bias ? y + load_some(bias + k, left) : y;
}
template <class T>
INLINE const T* from(const T* bias, i64 j) { return bias ? bias + j : nullptr; }

template <class T>
INLINE void norm_row(const T* x, const T* weight, i64 D, float eps, T* out) {
    normalise([&](i64 k, i64 c) { return load_some(x + k, c); }, D, weight, eps, [&](i64 k, Lanes v, i64 c) { store_some(out + k, v, c); });
}
template <class T>
INLINE void norm_floats(const float* x, const T* weight, i64 D, float eps, T* out) {
    normalise([&](i64 k, i64 c) { return load_some(x + k, c); }, D, weight, eps, [&](i64 k, Lanes v, i64 c) { store_some(out + k, v, c); });
}

// Interleaved pairs (latent attention) or the two halves (grouped), turned by a token's complex numbers; `out` gets them times scale.
template <class U>
INLINE void rotate(const float* x, const float* turn, i64 P, bool pairs, float scale, U* out) {
    for (i64 i = 0; i < P / 2; i++) {
        const i64 a = pairs ? 2 * i : i, b = pairs ? 2 * i + 1 : i + P / 2;
        const float c = turn[2 * i], s = turn[2 * i + 1], u = x[a], v = x[b];
        put(out + a, std::fma(u, c, -(v * s)) * scale);
        put(out + b, std::fma(v, c, u * s) * scale);
    }
}

template <class T>
struct Block {
    const Shape& s;
    const Weights& w;
    const Step& t;
    Arena arena;
    const i64 n, D, H, C;  // C: numbers of a query against the cache
    T *h, *attn, *mixed;
    float *qkv, *q_full, *q, *x1, *scratch;
    i64 scratch_size, *band_start, bands = 0;
    Experts<T> experts;

    Block(const Shape& s, const Weights& w, const Step& t)
        : s(s), w(w), t(t), n(t.n), D(s.hidden), H(s.heads), C(s.latent ? s.rank + s.rope : s.nope),
          experts{s.hidden, s.width, s.experts, s.chosen, s.groups, s.open_groups, s.normed, s.shared, float(s.routed_scale), w.router,
                  w.router_bias, (const T*)w.experts_gate_up, (const T*)w.experts_down} {
        for (int pass = 0; pass < 2; pass++) {  // first the sizes, then the memory
            h = arena.take<T>(n * D);
            qkv = arena.take<float>(n * qkv_width());
            q_full = s.q_rank ? arena.take<float>(n * H * (s.nope + s.rope)) : qkv;
            attn = arena.take<T>(n * (H * s.value + s.q_rank));
            mixed = s.latent ? arena.take<T>(n * H * s.rank) : attn;
            q = arena.take<float>(n * H * C);
            x1 = arena.take<float>(n * D);
            scratch_size = attention_scratch(C, s.latent ? s.rank : s.value) + 16;
            scratch = arena.take<float>(t.threads * scratch_size);
            band_start = arena.take<i64>(n + 1);
            experts.place(arena, n);
            if (!pass) arena.settle();
        }
        // Tokens of one row that stand side by side read its pages together.
        const i64 most = QUERIES / least(s.latent ? H : H / s.kv_heads, QUERIES);
        for (i64 i = 0; i < n; i++)
            if (!i || t.row[i] != t.row[i - 1] || i - band_start[bands - 1] == most) band_start[bands++] = i;
        band_start[bands] = n;
    }
    i64 qkv_width() const {
        return s.latent ? (s.q_rank ? s.q_rank : H * (s.nope + s.rope)) + s.rank + s.rope : H * s.nope + s.kv_heads * (s.nope + s.value);
    }
    const float* turn(i64 i) const { return (const float*)t.turn + i * s.rope; }
    T* entry(i64 i) const { return (T*)t.entries + t.slot[i] * s.entry; }

    void forward() {
        const T* x = (const T*)t.x;
#pragma omp for schedule(static)
        for (i64 i = 0; i < n; i++) norm_row(x + i * D, (const T*)w.input_norm, D, float(s.eps), h + i * D);
        const T* b = (const T*)w.qkv_bias;
        const i64 W = qkv_width();
        product<T>([&](i64 i) { return h + i * D; }, n, (const T*)w.qkv, W, D,
                   [&](i64 i, i64 j, const float* v, i64 c) {
                       each(c, [&](i64 k, i64 left) { store_some(qkv + i * W + j + k, biased(v, k, left, from(b, j)), left); });
                   });
        s.latent ? latent_entries() : grouped_entries();
        mix();
        if (s.latent) expand();
        const T* ob = (const T*)w.o_bias;
        product<T>([&](i64 i) { return attn + i * H * s.value; }, n, (const T*)w.o, D, H * s.value,
                   [&](i64 i, i64 j, const float* v, i64 c) {
                       each(c, [&](i64 k, i64 left) {
                           store_some(x1 + i * D + j + k, load_some(x + i * D + j + k, left) + biased(v, k, left, from(ob, j)), left);
                       });
                   });
        feed_forward();
    }

    void latent_entries() {
        const i64 W = qkv_width(), head = s.nope + s.rope, at = W - s.rank - s.rope;
        if (s.q_rank) {
            T* low = attn + n * H * s.value;
#pragma omp for schedule(static)
            for (i64 i = 0; i < n; i++) norm_floats(qkv + i * W, (const T*)w.q_norm, s.q_rank, float(s.latent_eps), low + i * s.q_rank);
            product<T>([&](i64 i) { return low + i * s.q_rank; }, n, (const T*)w.q_b, H * head, s.q_rank,
                       [&](i64 i, i64 j, const float* v, i64 c) { std::memcpy(q_full + i * H * head + j, v, c * sizeof(float)); });
        }
        const i64 Q = s.q_rank ? H * head : W;
        const float scale = float(s.scale);
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < parts(n, 4) * H; task++) {
            const i64 first = task / H * 4, a = task % H, m = least(4, n - first);
            const float* from[4];
            float* to[4];
            for (i64 i = 0; i < m; i++) {
                from[i] = q_full + (first + i) * Q + a * head;
                to[i] = q + ((first + i) * H + a) * C;
                rotate(from[i] + s.nope, turn(first + i), s.rope, true, scale, to[i] + s.rank);
                if (a == 0) {
                    const float* own = qkv + (first + i) * W + at;
                    norm_floats(own, (const T*)w.k_norm, s.rank, float(s.latent_eps), entry(first + i));
                    rotate(own + s.rank, turn(first + i), s.rope, true, 1.0f, entry(first + i) + s.rank);
                }
            }
            const T* up = (const T*)w.kv_b + a * (s.nope + s.value) * s.rank;
            if (m == 4) spread<T, 4>(from, up, s.nope, s.rank, scale, to);
            else for (i64 i = 0; i < m; i++) spread<T, 1>(from + i, up, s.nope, s.rank, scale, to + i);
        }
    }

    void grouped_entries() {
        const i64 W = qkv_width(), K = s.kv_heads;
#pragma omp for schedule(static)
        for (i64 i = 0; i < n; i++) {
            for (i64 a = 0; a < H + K; a++) {
                float* x = qkv + i * W + a * C;
                const T* weight = (const T*)(a < H ? w.q_norm : w.k_norm);
                if (weight)
                    normalise([&](i64 k, i64 c) { return load_some(x + k, c); }, C, weight, float(s.eps),
                              [&](i64 k, Lanes v, i64 c) { store_some(x + k, v, c); });
                if (a < H) rotate(x, turn(i), C, false, float(s.scale), q + (i * H + a) * C);
                else rotate(x, turn(i), C, false, 1.0f, entry(i) + (a - H) * C);
            }
            for (i64 k = 0; k < K * s.value; k++) put(entry(i) + K * C + k, qkv[i * W + (H + K) * C + k]);
        }
    }

    void mix() {
        const i64 K = s.latent ? 1 : s.kv_heads, G = H / K, V = s.latent ? s.rank : s.value;
        i64 size = least(G, QUERIES);
        while (size > 1 && bands * K * parts(G, size) < 2 * t.threads) size = parts(size, 2);
        const i64 pieces = parts(G, size), tasks = bands * K * pieces;
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < tasks; task++) {
            const i64 i = band_start[task / (K * pieces)], tokens = band_start[task / (K * pieces) + 1] - i;
            const i64 a = task / pieces % K, g = task % pieces * size, heads = least(size, G - g), first = a * G + g;
            const Pages pages{t.tables + t.row[i] * t.table_width, s.entry, s.latent ? 0 : a * C, s.latent ? 0 : K * C + a * V, C, V};
            const float* queries[QUERIES];
            for (i64 k = 0; k < tokens; k++) queries[k] = q + ((i + k) * H + first) * C;
            attend<T>(queries, tokens, heads, t.position + i, (const T*)t.entries, pages, scratch + own() * scratch_size,
                      [&](i64 m, i64 k, Lanes v, i64 c) { store_some(mixed + ((i + m / heads) * H + first + m % heads) * V + k, v, c); });
        }
    }

    void expand() {  // from the latent space to each head's values
        const i64 V = s.value, tasks = parts(n, ROWS) * H;
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < tasks; task++) {
            const i64 first = task / H * ROWS, a = task % H;
            const T* weight = (const T*)w.kv_b + (a * (s.nope + V) + s.nope) * s.rank;
            multiply<T>([&](i64 i) { return mixed + ((first + i) * H + a) * s.rank; }, least(ROWS, n - first), weight, s.rank, s.rank, 0, V,
                        [&](i64 i, i64 j, const float* v, i64 c) {
                            T* own = attn + ((first + i) * H + a) * V + j;
                            each(c, [&](i64 k, i64 left) { store_some(own + k, load_some(v + k, left), left); });
                        });
        }
    }

    void feed_forward() {
        T* out = (T*)t.out;
        if (s.experts) {
            experts.forward(x1, (const T*)w.post_norm, float(s.eps), (const T*)w.gate_up, (const T*)w.down, out, n, t.slot, t.routes);
            return;
        }
#pragma omp for schedule(static)
        for (i64 i = 0; i < n; i++) norm_floats(x1 + i * D, (const T*)w.post_norm, D, float(s.eps), h + i * D);
        const i64 size = GATES, wide = parts(s.width, size), tasks = wide * parts(n, CHUNK);
        const T* b = (const T*)w.down_bias;
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < tasks; task++) {
            const i64 first = task / wide * CHUNK, from = task % wide * size;
            gated<T>([&](i64 i) { return h + (first + i) * D; }, least(CHUNK, n - first), (const T*)w.gate_up, (const T*)w.gate_up_bias, D, s.width,
                     from, least(from + size, s.width), [&](i64 i) { return experts.hidden + (first + i) * s.width; });
        }
        product<T>([&](i64 i) { return experts.hidden + i * s.width; }, n, (const T*)w.down, D, s.width,
                   [&](i64 i, i64 j, const float* v, i64 c) {
                       each(c, [&](i64 k, i64 left) {
                           store_some(out + i * D + j + k, load_some(x1 + i * D + j + k, left) + biased(v, k, left, from(b, j)), left);
                       });
                   });
    }
};

// Blocks one after the other on the same tokens: shapes and weights of each, its layer of the pool `stride` bytes behind the one before.
template <class T>
static void run_blocks(i64 count, const Shape* const* shapes, const Weights* const* weights, const Step* step, i64 stride) {
    Step t = *step;
    for (i64 i = 0; i < count; i++) {
        Block<T> block(*shapes[i], *weights[i], t);
#pragma omp parallel num_threads(t.threads)
        block.forward();
        t.x = t.out;
        t.entries = (char*)t.entries + stride;
        if (t.routes && shapes[i]->experts) t.routes += t.routes_stride;
    }
}

template <class T>
static void run_linear(const T* x, const T* w, const T* bias, T* out, i64 n, i64 N, i64 K, i64 threads) {
#pragma omp parallel num_threads(threads)
    product<T>([&](i64 i) { return x + i * K; }, n, w, N, K,
               [&](i64 i, i64 j, const float* v, i64 c) {
                   each(c, [&](i64 k, i64 left) { store_some(out + i * N + j + k, biased(v, k, left, from(bias, j)), left); });
               });
}

template <class T>
static void run_norm(const T* x, const T* w, T* out, i64 n, i64 D, double eps, i64 threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * D > 16384)
    for (i64 i = 0; i < n; i++) norm_row(x + i * D, w, D, float(eps), out + i * D);
}

#define EXPORT __attribute__((visibility("default")))
extern "C" {
EXPORT void blocks_float32(i64 count, const Shape* const* s, const Weights* const* w, const Step* t, i64 stride) {
    run_blocks<float>(count, s, w, t, stride);
}
EXPORT void blocks_bfloat16(i64 count, const Shape* const* s, const Weights* const* w, const Step* t, i64 stride) {
    run_blocks<bf16>(count, s, w, t, stride);
}
EXPORT void linear_float32(const float* x, const float* w, const float* b, float* out, i64 n, i64 N, i64 K, i64 threads) {
    run_linear(x, w, b, out, n, N, K, threads);
}
EXPORT void linear_bfloat16(const bf16* x, const bf16* w, const bf16* b, bf16* out, i64 n, i64 N, i64 K, i64 threads) {
    run_linear(x, w, b, out, n, N, K, threads);
}
EXPORT void norm_float32(const float* x, const float* w, float* out, i64 n, i64 D, double eps, i64 threads) { run_norm(x, w, out, n, D, eps, threads); }
EXPORT void norm_bfloat16(const bf16* x, const bf16* w, bf16* out, i64 n, i64 D, double eps, i64 threads) { run_norm(x, w, out, n, D, eps, threads); }
// The complex numbers that positions multiply each pair by, [n, P / 2] (rope.turns).
EXPORT void turns(const i64* position, const float* inverse, float amplitude, float* out, i64 n, i64 pairs) {
    for (i64 i = 0; i < n; i++)
        for (i64 k = 0; k < pairs; k++) {
            const float angle = float(position[i]) * inverse[k];
            out[2 * (i * pairs + k)] = amplitude * std::cos(angle);
            out[2 * (i * pairs + k) + 1] = amplitude * std::sin(angle);
        }
}
}
