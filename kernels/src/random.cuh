// Counter-based random numbers: the same bits on every device, for any order and number of threads.
//
//   philox4x32: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), which turns a
//   counter of 128 bits into 128 random ones under a key of 64 bits.
//   normals: four standard normal numbers of one counter's bits, by Box-Muller.
//
// The last word of a counter says what its bits are for, so that no two uses of a seed share any.
#pragma once
#include "common.cuh"

constexpr unsigned FOR_NOISE = 0, FOR_SHUFFLE = 1, FOR_AUGMENT = 2, FOR_DROPOUT = 3;

struct Normals { float v[4]; };

struct WideProduct { unsigned high, low; };

DEVICE WideProduct product(unsigned a, unsigned b) {
  const unsigned long long p = (unsigned long long)a * b;
  return {(unsigned)(p >> 32), (unsigned)p};
}

// Word: unsigned, or on the host a vector of them with a product() of its own.
template <class Word> DEVICE void philox4x32(Word (&c)[4], unsigned k0, unsigned k1) {
  UNROLL for (int round = 0; round < 10; ++round) {
    const auto first = product(c[0], 0xD2511F53u), second = product(c[2], 0xCD9E8D57u);
    c[0] = second.high ^ c[1] ^ k0;
    c[1] = second.low;
    c[2] = first.high ^ c[3] ^ k1;
    c[3] = first.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// 23 bits of x as a number in (0, 1), never 0 or 1: exact in float32, so every device agrees.
DEVICE float unit_interval(unsigned x) { return ((float)(int)(x >> 9) + 0.5f) * (1.0f / 8388608.0f); }

struct Direction { float cosine, sine; };

// Cosine and sine of an angle of up to 45 degrees, in radians, to about 1 ulp (Cephes cosf and sinf). Each operation is
// a multiply_add, which no compiler can fuse with another: the same bits on every device.
DEVICE Direction direction(float angle) {
  const float square = multiply_add(angle, angle, 0.0f);
  float c = multiply_add(2.443315711809948e-5f, square, -1.388731625493765e-3f);
  c = multiply_add(c, square, 4.166664568298827e-2f);
  float s = multiply_add(-1.9515295891e-4f, square, 8.3321608736e-3f);
  s = multiply_add(s, square, -1.6666654611e-1f);
  return {multiply_add(multiply_add(square, square, 0.0f), c, multiply_add(-0.5f, square, 1.0f)),
          multiply_add(multiply_add(square, angle, 0.0f), s, angle)};
}

// Cosine and sine of x turns, 0 <= x <= 1.
#ifdef __CUDACC__
DEVICE Direction direction_of_turns(float x) { return {cospif(2.0f * x), sinpif(2.0f * x)}; }
#else
DEVICE Direction direction_of_turns(float x) {
  const int q = (int)(4.0f * x + 0.5f);  // the nearest quarter
  const Direction d = direction(6.2831853071795865f * (x - 0.25f * (float)q));
  const float cosine = q & 1 ? d.sine : d.cosine, sine = q & 1 ? d.cosine : d.sine;
  return {(q + 1) & 2 ? -cosine : cosine, q & 2 ? -sine : sine};
}
#endif

DEVICE Normals normals(const unsigned (&bits)[4]) {
  Normals n;
  UNROLL for (int k = 0; k < 4; k += 2) {
    const float radius = sqrtf(-2.0f * logarithm(unit_interval(bits[k])));
    const Direction d = direction_of_turns(unit_interval(bits[k + 1]));
    n.v[k] = radius * d.cosine;
    n.v[k + 1] = radius * d.sine;
  }
  return n;
}

#ifndef __CUDACC__
#include "host/philox.h"
#endif
