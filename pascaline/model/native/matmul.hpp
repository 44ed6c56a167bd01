// x w^T for rows of x found anywhere. Every output number is a sum over K in lanes, added up at the end: the same additions in the same
// order whatever rows and columns are computed beside it.
#pragma once
#include "lanes.hpp"

// MR rows of x with NR rows of w -> out[MR * NR].
template <class T, int MR, int NR>
INLINE void tile(const T* const* x, const T* w, i64 stride, i64 K, float* out) {
    using D = Dot<T>;
    Lanes sum[MR * NR] = {};
    i64 k = 0;
    for (; k + D::width <= K; k += D::width) {
        typename D::Chunk a[MR];
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) a[i] = D::take(x[i] + k);
#pragma GCC unroll 16
        for (int j = 0; j < NR; j++) {
            typename D::Chunk b = D::take(w + j * stride + k);
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) sum[i * NR + j] = D::add(sum[i * NR + j], a[i], b);
        }
    }
    if (k < K) {
        typename D::Chunk a[MR];
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) a[i] = D::take_part(x[i] + k, K - k);
#pragma GCC unroll 16
        for (int j = 0; j < NR; j++) {
            typename D::Chunk b = D::take_part(w + j * stride + k, K - k);
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) sum[i * NR + j] = D::add(sum[i * NR + j], a[i], b);
        }
    }
    if constexpr (MR * NR % LANES == 0) {
#pragma GCC unroll 4
        for (int t = 0; t < MR * NR; t += LANES) store(out + t, totals(sum + t));
    } else {
        for (int t = 0; t < MR * NR; t++) out[t] = total(sum[t]);
    }
}

constexpr i64 WIDE = 64;  // columns that are handed on at a time

template <class T, int MR, class Store>
static void band(const T* const* x, i64 first, const T* w, i64 stride, i64 K, i64 from, i64 to, Store put_row) {
    constexpr int NR = TILE / MR;
    alignas(64) float out[MR][WIDE], square[TILE];
    for (; from < to; from += WIDE) {
        const i64 count = to - from < WIDE ? to - from : WIDE;
        i64 j = 0;
        for (; j + NR <= count; j += NR) {
            tile<T, MR, NR>(x, w + (from + j) * stride, stride, K, square);
            for (int i = 0; i < MR; i++) std::memcpy(out[i] + j, square + i * NR, NR * sizeof(float));
        }
        for (; j < count; j++) {
            tile<T, MR, 1>(x, w + (from + j) * stride, stride, K, square);
            for (int i = 0; i < MR; i++) out[i][j] = square[i];
        }
        for (int i = 0; i < MR; i++) put_row(first + i, from, out[i], count);
    }
}

// Rows 0..n-1 (row(i) is where row i begins) with rows from..to-1 of w; put_row(i, j, values, count) gets columns j.. of row i, at most WIDE.
template <class T, class Row, class Store>
static void multiply(Row row, i64 n, const T* w, i64 stride, i64 K, i64 from, i64 to, Store put_row) {
    i64 i = 0;
    if constexpr (TILE >= 16)
        for (; i + 4 <= n; i += 4) {
            const T* x[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
            band<T, 4>(x, i, w, stride, K, from, to, put_row);
        }
    for (; i + 2 <= n; i += 2) {
        const T* x[2] = {row(i), row(i + 1)};
        band<T, 2>(x, i, w, stride, K, from, to, put_row);
    }
    if (i < n) {
        const T* x[1] = {row(i)};
        band<T, 1>(x, i, w, stride, K, from, to, put_row);
    }
}

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
constexpr i64 ROWS = 128;  // of one task
// Columns of one task: what of w stays in the first-level cache.
template <class T>
INLINE i64 columns(i64 K) {
    i64 fit = 32768 / (K * i64(sizeof(T))) / TILE * TILE;
    return fit < TILE ? TILE : least(fit, WIDE);
}
INLINE i64 parts(i64 n, i64 size) { return (n + size - 1) / size; }

// The whole product, shared out among the threads of the parallel region it is called in; all wait at its end.
template <class T, class Row, class Store>
static void product(Row row, i64 n, const T* w, i64 N, i64 K, Store put_row) {
    const i64 size = columns<T>(K), wide = parts(N, size), tasks = wide * parts(n, ROWS);
#pragma omp for schedule(dynamic, 1)
    for (i64 t = 0; t < tasks; t++) {
        const i64 first = t / wide * ROWS, from = t % wide * size;
        multiply<T>([&](i64 i) { return row(first + i); }, least(ROWS, n - first), w, K, K, from, least(from + size, N),
                    [&](i64 i, i64 j, const float* v, i64 count) { put_row(first + i, j, v, count); });
    }
}

// m <= 4 rows q[i] (N floats) times w [N, R], each number summed in the order of N; out[i] gets R floats times `scale`.
template <class T, int MR>
static void spread(const float* const* q, const T* w, i64 N, i64 R, float scale, float* const* out) {
    for (i64 r = 0; r < R; r += 2 * LANES) {
        const i64 left = least(R - r, LANES), right = R - r - LANES;
        Lanes sum[MR][2] = {};
        for (i64 k = 0; k < N; k++) {
            const T* at = w + k * R + r;
            Lanes b = load_some(at, left), c = right > 0 ? load_some(at + LANES, right) : Lanes{};
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) {
                Lanes a = all(q[i][k]);
                sum[i][0] = fused(a, b, sum[i][0]);
                sum[i][1] = fused(a, c, sum[i][1]);
            }
        }
        for (int i = 0; i < MR; i++) {
            store_some(out[i] + r, sum[i][0] * scale, left);
            if (right > 0) store_some(out[i] + r + LANES, sum[i][1] * scale, right);
        }
    }
}

// x / sqrt(mean(x^2) + eps) * weight of one row; `get(k, count)` gives the lanes at k, `set(k, lanes, count)` takes them.
template <class T, class Get, class Set>
INLINE void normalise(Get get, i64 D, const T* weight, float eps, Set set) {
    Lanes sum = {};
    for (i64 k = 0; k < D; k += LANES) {
        Lanes v = get(k, D - k);
        sum = fused(v, v, sum);
    }
    const float scale = 1.0f / std::sqrt(total(sum) / float(D) + eps);
    for (i64 k = 0; k < D; k += LANES) set(k, get(k, D - k) * scale * load_some(weight + k, D - k), D - k);
}
