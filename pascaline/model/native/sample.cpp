// From logits to tokens: what engine/sampler.py says in PyTorch, a row at a time, each alone.
#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>
#include "lanes.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

static uint64_t mix(uint64_t x) {  // splitmix64
    x += 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

INLINE Lanes logarithm(Lanes x) {  // of positive numbers; Cephes' polynomial for the part between sqrt(1/2) and sqrt(2)
    Ints bits = (Ints)x, e = (bits >> 23) - 126;
    Lanes m = (Lanes)((bits & 0x7fffff) | 0x3f000000);  // [0.5, 1)
    Ints low = m < 0.70710678f;
    e += low;  // a true lane is -1
    m = low ? m + m : m;
    Lanes r = m - 1.0f, z = r * r, p = all(7.0376836292e-2f);
    for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
                    -2.4999993993e-1f, 3.3333331174e-1f})
        p = fused(p, r, all(c));
    Lanes f = __builtin_convertvector(e, Lanes);
    Lanes y = fused(f, all(-2.12194440e-4f), p * r * z);
    y = fused(z, all(-0.5f), y) + r;
    return fused(f, all(0.693359375f), y);
}

// Exp(1) of (key, token id) for the ids that lie in `id`: -log(1 - u), exact where u is small.
INLINE Lanes exponentials(uint64_t key, const uint64_t* id) {
    float u[LANES];
    for (int l = 0; l < LANES; l++) u[l] = float(uint32_t(mix(id[l] * 0xD1B54A32D192ED03 ^ key) >> 32));
    Lanes y = (load(u) + 0.5f) * -0x1p-32f, w = y + 1.0f;
    Lanes by_log = logarithm(w > 0.0f ? w : all(1.0f)) * (y / (w == 1.0f ? all(1.0f) : w - 1.0f));
    Lanes e = -(w == 1.0f ? y : by_log);
    return w > 0.0f ? e : all(INFINITY);
}

static float maximum(const float* x, i64 V, i64& where) {  // of those alike the first
    Lanes most = all(-INFINITY);
    for (i64 k = 0; k < V; k += LANES) {
        Lanes v = V - k >= LANES ? load(x + k) : [&] {
            float rest[LANES];
            std::fill(rest, rest + LANES, -INFINITY);
            std::copy(x + k, x + V, rest);
            return load(rest);
        }();
        most = v > most ? v : most;
    }
    float m = most[0];
    for (int l = 1; l < LANES; l++) m = std::max(m, float(most[l]));
    where = std::find(x, x + V, m) - x;
    if (where == V) where = 0;  // no numbers
    return m;
}

// p = exp((x - most) / temperature), and their sum.
static float exponents(const float* x, i64 V, float most, float temperature, float* p) {
    Lanes sum = {};
    for (i64 k = 0; k < V; k += LANES) {
        Lanes z = (load_some(x + k, V - k) - most) / temperature, e = z < -87.0f ? Lanes{} : exponential(z);
        if (V - k < LANES)
            for (i64 l = V - k; l < LANES; l++) e[l] = 0.0f;
        sum += e;
        if (p) store_some(p + k, e, V - k);
    }
    return total(sum);
}

struct Cut {
    float top_p, min_p;
    i64 top_k;
};

// The race among `count` tokens, all of them if there is no `id`: the largest p / E wins, of those alike the first.
static i64 race(const float* p, const uint64_t* id, i64 count, uint64_t key) {
    float best = -1.0f;
    i64 winner = 0;
    for (i64 k = 0; k < count; k += LANES) {
        uint64_t some[LANES];
        for (int l = 0; l < LANES; l++) some[l] = !id ? uint64_t(k + l) : k + l < count ? id[k + l] : 0;
        Lanes score = load_some(p + k, count - k) / exponentials(key, some);
        if (!(largest(score) > best)) continue;
        for (int l = 0; l < LANES && l < count - k; l++)
            if (score[l] > best) best = score[l], winner = i64(some[l]);
    }
    return winner;
}

// What the cuts leave: `p` and `id` get the kept ones, best first; how many.
static i64 keep(float* p, uint64_t* id, i64 V, float sum, const Cut& cut) {
    float floor = cut.min_p * *std::max_element(p, p + V), mass = sum, ahead = 0.0f;
    const i64 most_kept = cut.top_k > 0 && cut.top_k < V ? cut.top_k : V;
    if (most_kept < V) {  // top_p is of what top_k leaves, those below min_p among it
        static thread_local std::vector<float> ranked;
        ranked.assign(p, p + V);
        std::nth_element(ranked.begin(), ranked.begin() + most_kept - 1, ranked.end(), std::greater<float>());
        std::sort(ranked.begin(), ranked.begin() + most_kept, std::greater<float>());
        mass = std::accumulate(ranked.begin(), ranked.begin() + most_kept, 0.0f);
        floor = std::max(floor, ranked[most_kept - 1]);
    }
    std::vector<std::pair<float, uint64_t>> heap;
    for (i64 v = 0; v < V; v++)
        if (p[v] >= floor) heap.emplace_back(p[v], ~uint64_t(v));  // of those alike the first comes first
    std::make_heap(heap.begin(), heap.end());
    i64 count = 0;
    while (!heap.empty() && count < most_kept && ahead < cut.top_p * mass) {
        std::pop_heap(heap.begin(), heap.end());
        p[count] = heap.back().first, id[count++] = ~heap.back().second;
        ahead += heap.back().first;
        heap.pop_back();
    }
    return count;
}

// What the tokens hold that come before token c, best first, of those alike the first.
static float before(const float* p, i64 V, i64 c) {
    const float own = p[c];
    Lanes sum = {};
    for (i64 k = 0; k < V; k += LANES) {
        Lanes v = load_some(p + k, V - k);
        sum += v > own ? v : Lanes{};
    }
    return total(sum) + own * float(std::count(p, p + c, own));
}

constexpr int TRIES = 16;

// The race of those that top_p and min_p leave, without sorting: the winner of all is mostly among them, and if it is not, the next is.
// Who is taken out has less than any that is left in, so it is missed by none of them. -1 after TRIES.
static i64 race_and_look(float* p, i64 V, float sum, const Cut& cut, uint64_t key) {
    const float floor = cut.min_p * *std::max_element(p, p + V);
    for (int i = 0; i < TRIES; i++) {
        const i64 c = race(p, nullptr, V, key);
        if (p[c] >= floor && before(p, V, c) < cut.top_p * sum) return c;
        p[c] = 0.0f;
    }
    return -1;
}

static i64 draw(const float* x, i64 V, float temperature, const Cut& cut, uint64_t key) {
    static thread_local std::vector<float> values;
    static thread_local std::vector<uint64_t> names;
    if (i64(values.size()) < V) values.resize(V), names.resize(V);
    float* p = values.data();
    i64 best;
    const float most = maximum(x, V, best);
    if (temperature == 0.0f) return best;
    const float sum = exponents(x, V, most, temperature, p);
    if (cut.top_p >= 1.0f && cut.top_k <= 0 && cut.min_p <= 0.0f) return race(p, nullptr, V, key);
    if (cut.top_k <= 0) {
        const i64 c = race_and_look(p, V, sum, cut, key);
        if (c >= 0) return c;
    }
    return race(p, names.data(), keep(p, names.data(), V, sum, cut), key);
}

// log(sum(exp(x))).
static float log_sum(const float* x, i64 V) {
    i64 where;
    const float most = maximum(x, V, where);
    return most + std::log(exponents(x, V, most, 1.0f, nullptr));
}

// Tokens [n] of logits x [n, V] under each row's temperature and cuts (top_k 0: none), seed and position. Where `own`
// is given, each token's log-probability by those logits, too.
EXPORT void draws(const float* x, const float* own, i64 n, i64 V, const double* temperature, const double* top_p, const double* min_p,
                  const double* top_k, const uint64_t* seed, const uint64_t* position, i64* token, float* logprob, i64 threads) {
#pragma omp parallel for num_threads(n < threads ? n : threads) schedule(dynamic, 1)
    for (i64 i = 0; i < n; i++) {
        const Cut cut{float(top_p[i]), float(min_p[i]), i64(top_k[i])};
        token[i] = draw(x + i * V, V, float(temperature[i]), cut, mix(seed[i] + mix(position[i])));
        if (own) logprob[i] = own[i * V + token[i]] - log_sum(own + i * V, V);
    }
}
