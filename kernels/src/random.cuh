// Counter-based random numbers: the same bits on every device, for any order and number of threads.
//
//   philox4x32: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), which turns a
//   counter of 128 bits into 128 random ones under a key of 64 bits.
//   normals: four standard normal numbers of one counter, by Box-Muller.
//
// The last word of a counter says what its bits are for, so that no two uses of a seed share any.
#pragma once
#include "common.cuh"

constexpr unsigned FOR_NOISE = 0, FOR_SHUFFLE = 1;

struct Normals { float v[4]; };

DEVICE unsigned multiply_high(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }

DEVICE void philox4x32(unsigned (&c)[4], unsigned k0, unsigned k1) {
  for (int round = 0; round < 10; ++round) {
    const unsigned h0 = multiply_high(0xD2511F53u, c[0]), l0 = 0xD2511F53u * c[0];
    const unsigned h1 = multiply_high(0xCD9E8D57u, c[2]), l1 = 0xCD9E8D57u * c[2];
    c[0] = h1 ^ c[1] ^ k0;
    c[1] = l1;
    c[2] = h0 ^ c[3] ^ k1;
    c[3] = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// 23 bits of x as a number in (0, 1), never 0 or 1: exact in float32, so every device agrees.
DEVICE float unit_interval(unsigned x) { return ((float)(x >> 9) + 0.5f) * (1.0f / 8388608.0f); }

DEVICE Normals normals(unsigned quad, unsigned image, unsigned seed_low, unsigned seed_high) {
  unsigned c[4] = {quad, image, 0u, FOR_NOISE};
  philox4x32(c, seed_low, seed_high);
  Normals n;
  UNROLL for (int k = 0; k < 4; k += 2) {
    const float radius = sqrtf(-2.0f * logf(unit_interval(c[k])));
    n.v[k] = radius * cosine_of_turns(unit_interval(c[k + 1]));
    n.v[k + 1] = radius * sine_of_turns(unit_interval(c[k + 1]));
  }
  return n;
}
