// The CUDA vocabulary of common.cuh for an ordinary C++ compiler: a group is one lane, a range is one
// worker's contiguous chunk, and elementary functions are branch-free so that loops over them vectorise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

template <int W> DEVICE Pack<W> load(const float* p) {
  Pack<W> r;
  for (int k = 0; k < W; ++k) r.v[k] = p[k];
  return r;
}

template <int W> DEVICE void store(float* p, const Pack<W>& x) {
  for (int k = 0; k < W; ++k) p[k] = x.v[k];
}

template <class... P> DEVICE bool aligned16(const P*...) { return true; }

DEVICE float infinity() { return HUGE_VALF; }
DEVICE float not_a_number() { return NAN; }
DEVICE float rounded_product(float a, float b) { return a * b; }
// Rounded once where that is an instruction, as on every x86 since 2013 and every 64-bit ARM; elsewhere it would take
// as long as twenty.
DEVICE float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
DEVICE void add_one(unsigned long long* count) { __atomic_fetch_add(count, 1ull, __ATOMIC_RELAXED); }
DEVICE unsigned float_bits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// exp(x) to about 1 ulp, denormal results included: 2^n * p(r) with |r| <= ln(2)/2 (Cephes expf;
// Moshier, "Methods and Programs for Mathematical Functions", 1989). 2^n is applied in two halves, so
// that the results below 2^-126 and above 2^127 come out right. libm's expf would not vectorise.
DEVICE float power_of_two(int n) {
  const int32_t bits = (n + 127) << 23;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

DEVICE float exponential(float x) {
  const float finite = x == x ? x : 0.0f;
  const float low = finite < -104.0f ? -104.0f : finite;
  const float bounded = low > 89.0f ? 89.0f : low;
  const float n = std::nearbyint(bounded * 1.44269504088896341f);
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int exponent = (int)n, half = exponent / 2;
  const float result = p * power_of_two(half) * power_of_two(exponent - half);
  return x == x ? result : x;
}

// erf(x) = x P(x^2) / Q(x^2) up to |x| = 3.74, where it is 2 ulp below 1: the rational minimax approximation
// of Eigen and XLA (erf_float), error below 4 ulp. From 3.84 on the nearest float32 is 1, and it must be: gelu
// multiplies 1 - erf by u.
DEVICE float error_function(float x) {
  const float low = x < -3.7439211627767994f ? -3.7439211627767994f : x;
  const float c = low > 3.7439211627767994f ? 3.7439211627767994f : low;
  const float s = c * c;
  float p = 2.2905065861350646e-4f;
  p = p * s + 3.4082910107109506e-3f;
  p = p * s + 5.0955695062380861e-2f;
  p = p * s + 1.8520832239976145e-1f;
  p = p * s + 1.128379143519084f;
  float q = -1.1791602954361697e-7f;
  q = q * s + 2.3547966471313185e-5f;
  q = q * s + 1.0179625278914885e-3f;
  q = q * s + 1.4070470171167667e-2f;
  q = q * s + 1.1098505178285362e-1f;
  q = q * s + 4.9746925110067538e-1f;
  q = q * s + 1.0f;
  const float r = c * p / q, upper = x > 3.84f ? 1.0f : r;
  return x < -3.84f ? -1.0f : upper;
}

// log(x) of a normal number above 0, to about 1 ulp: the exponent, and log(1 + m) of a mantissa in [sqrt(1/2), sqrt(2))
// (Cephes logf). libm's logf would not vectorise.
DEVICE float logarithm(float x) {
  const unsigned bits = float_bits(x) - 0x3f3504f3u;  // from sqrt(1/2) on
  const int exponent = (int)bits >> 23;
  const unsigned mantissa = (bits & 0x007fffffu) + 0x3f3504f3u;
  float m;
  std::memcpy(&m, &mantissa, sizeof m);
  m -= 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m, n = (float)exponent;
  p = p * m * square - 2.12194440e-4f * n - 0.5f * square;
  return m + p + 0.693359375f * n;
}
DEVICE float inverse_root(float x) { return 1.0f / std::sqrt(x); }

// One worker on one row of C columns: f(0, j) for each. The reductions keep LANES partial results, as a
// SIMD register does, and add them as a tree; an ordinary running sum would forbid vectorising.
struct Group {
  static constexpr int LANES = 16;
  DEVICE static int lane() { return 0; }
  DEVICE static void sync() {}
  template <int, class F> DEVICE static void for_each(int C, F f) {
    INDEPENDENT for (int j = 0; j < C; ++j) f(0, j);
  }
  template <int N, class Combine> DEVICE static float tree(float (&x)[LANES], Combine combine) {
    if constexpr (N > 1) {
      for (int k = 0; k < N / 2; ++k) x[k] = combine(x[k], x[k + N / 2]);
      tree<N / 2>(x, combine);
    }
    return x[0];
  }
  template <class Combine, class F> DEVICE static float reduce(int C, float start, Combine combine, F f) {
    float x[LANES];
    for (int k = 0; k < LANES; ++k) x[k] = start;
    int j = 0;
    for (; j + LANES <= C; j += LANES)
      for (int k = 0; k < LANES; ++k) x[k] = combine(x[k], f(0, j + k));
    for (int k = 0; j + k < C; ++k) x[k] = combine(x[k], f(0, j + k));
    return tree<LANES>(x, combine);
  }
  template <int, class F> DEVICE static float sum(int C, F f) {
    return reduce(C, 0.0f, [](float a, float b) { return a + b; }, f);
  }
  template <int, class F> DEVICE static float max(int C, F f) {  // NaN is passed over
    return reduce(C, -infinity(), [](float a, float b) { return b > a ? b : a; }, f);
  }
  template <int, class F> DEVICE static bool any(int C, F f) {
    int found = 0;
    for (int j = 0; j < C; ++j) found |= f(0, j);
    return found;
  }
  template <int, class F> DEVICE static float at(int, int j, F f) { return f(0, j); }  // of column j
  template <int, class F> DEVICE static int first(int C, F f) {  // the first column of which f is true, or C
    int x = C;
    for (int j = 0; j < C; ++j) {
      const int here = f(0, j) ? j : C;
      x = here < x ? here : x;
    }
    return x;
  }
};

// This worker's elements [begin, end) of flat arrays.
struct Range {
  index_t begin, end;
  template <class Fetch, class Prepare, class F>
  DEVICE void for_each(bool, Fetch fetch, Prepare prepare, F f) const {
    const auto prepared = prepare();
    INDEPENDENT for (index_t i = begin; i < end; ++i) f(Width<1>{}, i, fetch(Width<1>{}, i), prepared);
  }
  template <class F> DEVICE void for_each(bool, F f) const {
    INDEPENDENT for (index_t i = begin; i < end; ++i) f(Width<1>{}, i);
  }
};

// This worker's rows [begin, end) of a C-contiguous array.
struct Rows {
  index_t begin, end, columns;
  DEVICE index_t wrap(index_t j) const { return j; }
  template <class F> DEVICE void for_each(bool, F f) const {
    for (index_t r = begin; r < end; ++r) {
      INDEPENDENT for (index_t j = 0; j < columns; ++j) f(Width<1>{}, r * columns + j, j);
    }
  }
  template <class Fetch, class F> DEVICE void for_each(bool vector, Fetch fetch, F f) const {
    for_each(vector, [=](auto width, index_t i, index_t j) { f(width, i, j, fetch(width, i)); });
  }
};
