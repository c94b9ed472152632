// A random permutation of an index, of which each element is computed alone.
//
//   out[i] = index[p(i)],  p a bijection of [0, N) that (seed, epoch, N) alone decide
//
// p is an alternating Feistel network over b bits, N <= 2^b: the position's low b / 2 bits and the others take turns,
// and each round xors one half with a mix of the other half and of a round key. Every round is its own inverse, so
// the network is a bijection of [0, 2^b); where it leaves [0, N) it is applied again, until it is back (cycle
// walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): from N = 129 on less than once more on
// average. The mix is murmur3's finalizer. The keys come from one call of Philox4x32, counter (epoch, 0, 0, 1), key =
// seed, and go on from round to round by a Weyl sequence.
// Mitchell et al., "Bandwidth-optimal random shuffling for GPUs", 2021, shuffle by such a network, too. Theirs has 24
// rounds of Philox and the fewest bits for N, and a prefix sum closes the gaps that positions from N on leave; here
// they walk, so that no element waits for another. Integers alone are computed with: all devices have the same order.
//
// 8 rounds, and at least 8 bits, however small N is: with the 2 or 3 bits that 4 or 5 elements need, the permutations
// of a handful of elements are visibly not equally likely, even after 14 rounds; with 8 bits they are.
// If N is a power of two from 256 on, p is an even permutation: a round swaps pairs in even numbers.
//
// index, out: (N,) int32, N <= 2^31. Bytes per element: 8, of which 4 are read anywhere in the index. Launch: flat,
// grid-stride, one element at a time.
#pragma once
#include "common.cuh"
#include "random.cuh"

constexpr int SHUFFLE_ROUNDS = 8, SHUFFLE_LEAST_BITS = 8;

// murmur3's fmix32 (Appleby): each bit of x changes each bit of the result with a probability of about 1/2.
DEVICE unsigned mix32(unsigned x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

struct Bijection {
  unsigned keys[4], low_bits, low_mask, high_mask;

  DEVICE unsigned key(int round) const { return keys[round % 4] + (unsigned)round * 0x9E3779B9u; }

  // One walk's step; the result may lie outside [0, N).
  DEVICE unsigned operator()(unsigned x) const {
    unsigned low = x & low_mask, high = x >> low_bits;
    UNROLL for (int round = 0; round < SHUFFLE_ROUNDS; round += 2) {
      low ^= mix32(high ^ key(round)) & low_mask;
      high ^= mix32(low ^ key(round + 1)) & high_mask;
    }
    return high << low_bits | low;
  }
};

DEVICE Bijection bijection(index_t N, unsigned seed_low, unsigned seed_high, unsigned epoch) {
  Bijection p{{epoch, 0u, 0u, FOR_SHUFFLE}, 0u, 0u, 0u};
  philox4x32(p.keys, seed_low, seed_high);
  unsigned bits = SHUFFLE_LEAST_BITS;
  while ((index_t)1 << bits < N) ++bits;
  p.low_bits = bits / 2;
  p.low_mask = (1u << p.low_bits) - 1u;
  p.high_mask = (1u << (bits - p.low_bits)) - 1u;
  return p;
}

#ifdef __CUDACC__

DEVICE void shuffle_grid(const int* index, int* out, index_t N, unsigned seed_low, unsigned seed_high,
                         unsigned epoch) {
  const Bijection p = bijection(N, seed_low, seed_high, epoch);
  const index_t thread = blockIdx.x * (index_t)blockDim.x + threadIdx.x;
  ROLLED for (index_t i = thread; i < N; i += gridDim.x * (index_t)blockDim.x) {
    unsigned x = p((unsigned)i);
    while (x >= N) x = p(x);
    out[i] = index[x];
  }
}

#else

constexpr int SHUFFLE_BLOCK = 2048;  // fits the L1 cache three times, and few of its steps are of less than a vector

// Up to SHUFFLE_BLOCK elements from `begin` on. Each step of the walks is taken by all elements that are not back yet,
// side by side, so that it vectorises; without a branch on who is back, which nothing could predict.
DEVICE void shuffle_block(const Bijection& p, const int* index, int* out, index_t N, index_t begin, int count) {
  constexpr int LANES = 16;
  unsigned x[SHUFFLE_BLOCK] = {}, place[SHUFFLE_BLOCK];  // of those that walk: where they are, and whose walk it is
  unsigned value[SHUFFLE_BLOCK];                         // where each is, and in the end has ended
  for (int k = 0; k < count; ++k) {
    x[k] = (unsigned)(begin + k);
    place[k] = (unsigned)k;
  }
  for (int left = count; left > 0;) {
    for (int k = 0; k < left; k += LANES)  // whole vectors: what is beyond `left` is computed for nothing
      INDEPENDENT for (int j = 0; j < LANES; ++j) x[k + j] = p(x[k + j]);
    int walking = 0;
    for (int k = 0; k < left; ++k) {
      const unsigned here = x[k], whose = place[k];
      value[whose] = here;
      x[walking] = here;
      place[walking] = whose;
      walking += here >= N;
    }
    left = walking;
  }
  for (int k = 0; k < count; ++k) out[begin + k] = index[value[k]];
}

#endif
