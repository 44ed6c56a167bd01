// Vectors of float lanes, bfloat16 beside float32, and sums whose order is fixed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 16;  // TILE: accumulators that fit into the registers beside their operands
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 8;
#else
constexpr int LANES = 4, TILE = 16;
#endif

using i64 = int64_t;
struct bf16 {
    uint16_t bits;
};
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

INLINE Lanes all(float x) { return Lanes{} + x; }

INLINE Lanes fused(Lanes a, Lanes b, Lanes c) {  // a * b + c, rounded once: said outright, so that no two places differ
#if defined(__AVX512F__)
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE Lanes load(const float* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
INLINE Lanes load(const bf16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Lanes)(__builtin_convertvector(h, Ints) << 16);
}
INLINE float number(float x) { return x; }
INLINE float number(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) {  // to the nearest, ties to even; a nan stays one
    uint32_t u;
    std::memcpy(&u, &x, 4);
    p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }
INLINE void store(bf16* p, Lanes v) {
    Ints u = (Ints)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u = v != v ? Ints{} + 0x7fc0 : u;
    Halves h = __builtin_convertvector(u, Halves);
    std::memcpy(p, &h, sizeof h);
}
template <class T>
INLINE Lanes load_part(const T* p, i64 count) {  // the rest is zero
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const auto some = __mmask16((1u << count) - 1);
    if constexpr (sizeof(T) == 4) return (Lanes)_mm512_maskz_loadu_ps(some, p);
    else return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16);
#endif
    T buffer[LANES] = {};
    std::memcpy(buffer, p, count * sizeof(T));
    return load(buffer);
}
template <class T>
INLINE void store_part(T* p, Lanes v, i64 count) {
    T buffer[LANES];
    store(buffer, v);
    std::memcpy(p, buffer, count * sizeof(T));
}
template <class T>
INLINE Lanes load_some(const T* p, i64 count) { return count >= LANES ? load(p) : load_part(p, count); }
template <class T>
INLINE void store_some(T* p, Lanes v, i64 count) { count >= LANES ? store(p, v) : store_part(p, v, count); }

// Sums over the lanes: lane l with lane l ^ LANES/2, then ^ LANES/4, ... In whichever of these two forms, the same additions.
template <int D, int... L>
INLINE Lanes swapped(Lanes a, std::integer_sequence<int, L...>) { return __builtin_shufflevector(a, a, (L ^ D)...); }
template <int D, int... L>
INLINE Lanes joined(Lanes a, Lanes b, std::integer_sequence<int, L...>) {
    Lanes own = __builtin_shufflevector(a, b, (L & D ? LANES + L : L)...);
    Lanes other = __builtin_shufflevector(a, b, (L & D ? LANES + (L ^ D) : (L ^ D))...);
    return own + other;
}
template <int D = LANES / 2>
INLINE float total(Lanes v) {
    if constexpr (D == 0) return v[0];
    else return total<D / 2>(v + swapped<D>(v, std::make_integer_sequence<int, LANES>()));
}
template <int D = LANES / 2>
INLINE Lanes totals(Lanes* v) {  // lane l: the sum of v[l]
    if constexpr (D == 0) return v[0];
    else {
#pragma GCC unroll 8
        for (int l = 0; l < D; l++) v[l] = joined<D>(v[l], v[l + D], std::make_integer_sequence<int, LANES>());
        return totals<D / 2>(v);
    }
}
template <class F>
INLINE void each(i64 count, F f) {  // f(k, how many are left) for every lanes' beginning k
    for (i64 k = 0; k < count; k += LANES) f(k, count - k);
}
template <int D = LANES / 2>
INLINE float largest(Lanes v) {
    if constexpr (D == 0) return v[0];
    else {
        Lanes w = swapped<D>(v, std::make_integer_sequence<int, LANES>());
        return largest<D / 2>(v > w ? v : w);
    }
}

INLINE Lanes exponential(Lanes x) {  // Cephes' polynomial after taking out powers of 2; at most 2 units in the last place off
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const Lanes magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Lanes whole = fused(x, all(1.44269504088896341f), magic) - magic;
    Lanes r = fused(whole, all(-0.693359375f), x);
    r = fused(whole, all(2.12194440e-4f), r);
    Lanes p = all(1.9875691500e-4f);
    p = fused(p, r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    p = fused(p * r, r, r) + 1.0f;
    return p * (Lanes)((__builtin_convertvector(whole, Ints) + 127) << 23);
}

// One step of a dot product: `width` numbers of each side into the lanes of a sum.
template <class T>
struct Dot {
    using Chunk = Lanes;
    static constexpr int width = LANES;
    INLINE Chunk take(const T* p) { return load(p); }
    INLINE Chunk take_part(const T* p, i64 count) { return load_part(p, count); }
    INLINE Lanes add(Lanes sum, Chunk a, Chunk b) { return fused(a, b, sum); }
};
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <>
struct Dot<bf16> {
    using Chunk = __m512i;
    static constexpr int width = 2 * LANES;
    INLINE Chunk take(const bf16* p) { return _mm512_loadu_si512(p); }
    INLINE Chunk take_part(const bf16* p, i64 count) { return _mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << count) - 1), p); }
    INLINE Lanes add(Lanes sum, Chunk a, Chunk b) { return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif
