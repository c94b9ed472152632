// Philox of many counters side by side.
//
// A compiler sees that the loop over counters can be vectorised, but not that AVX2 has the product it needs, of the low
// halves of 64-bit lanes, and multiplies whole ones: with that instruction it takes half the time.
#pragma once
#ifdef __AVX2__
#include <immintrin.h>
#endif

constexpr int PHILOX_MANY = 256;  // counters at a time: 4 KB of bits, which stay in the L1 cache

#ifdef __AVX2__

// Four words, each in the low half of a lane; what is in the high half means nothing.
struct PhiloxLanes {
  typedef unsigned long long Vector __attribute__((vector_size(32)));
  Vector lanes;
  friend PhiloxLanes operator^(PhiloxLanes a, PhiloxLanes b) { return {a.lanes ^ b.lanes}; }
  friend PhiloxLanes operator^(PhiloxLanes a, unsigned b) { return {a.lanes ^ b}; }
};
struct LanesProduct { PhiloxLanes high, low; };

DEVICE LanesProduct product(PhiloxLanes a, unsigned b) {
  const PhiloxLanes::Vector p = (PhiloxLanes::Vector)_mm256_mul_epu32((__m256i)a.lanes, _mm256_set1_epi64x(b));
  return {{p >> 32}, {p}};
}

#endif

// word[w][k] = word w of the random bits of counter (first + k, c1, c2, c3), for k < count <= PHILOX_MANY. What follows
// in `word` may be overwritten.
inline void philox4x32_many(unsigned (&word)[4][PHILOX_MANY], unsigned first, int count, unsigned c1, unsigned c2,
                            unsigned c3, unsigned k0, unsigned k1) {
#ifdef __AVX2__
  typedef unsigned Words __attribute__((vector_size(16)));
  constexpr int VECTORS = 4;  // at once: a product waits for the one before
  for (int k = 0; k < count; k += 4 * VECTORS) {
    PhiloxLanes c[VECTORS][4];
    for (int v = 0; v < VECTORS; ++v) {
      constexpr PhiloxLanes::Vector each = {0, 1, 2, 3}, zero = {};
      c[v][0].lanes = each + (first + (unsigned)(k + 4 * v));
      c[v][1].lanes = zero + c1;
      c[v][2].lanes = zero + c2;
      c[v][3].lanes = zero + c3;
    }
    for (int v = 0; v < VECTORS; ++v) philox4x32(c[v], k0, k1);
    for (int v = 0; v < VECTORS; ++v)
      for (int w = 0; w < 4; ++w) {
        const Words low = __builtin_convertvector(c[v][w].lanes, Words);
        std::memcpy(&word[w][k + 4 * v], &low, sizeof low);
      }
  }
#else
  INDEPENDENT for (int k = 0; k < count; ++k) {
    unsigned c[4] = {first + (unsigned)k, c1, c2, c3};
    philox4x32(c, k0, k1);
    for (int w = 0; w < 4; ++w) word[w][k] = c[w];
  }
#endif
}
