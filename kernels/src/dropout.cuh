// Dropout (Srivastava et al. 2014): which elements of a batch are kept, and what those are multiplied by.
//
//   factor[b, j] = keep[b, j] / (1 - p),   keep[b, j] = 1 where word j % 4 of the counter is at least p 2^32, else 0
//
// The counter is (j / 4, row + b, step, FOR_DROPOUT + 256 layer), the key the seed (Philox4x32-10: random.cuh). So a
// mask depends on the seed, the layer, the step, the row's number in the whole batch and the column alone: not on the
// size of a batch or of its chunks, nor on the launch or the device, and the backward pass computes it again.
#pragma once
#include "random.cuh"

struct Dropout {
  unsigned threshold;  // 0: no dropout
  float scale;         // 1 / (1 - p)
  unsigned seed_low, seed_high;
  float number;
  const float* pointer;  // if not null, where the step is read
  unsigned layer, row;

  // The step as a word of a counter: what no word can be goes to the nearest that can.
  DEVICE unsigned step() const {
    const float x = pointer ? *pointer : number;
    return x > 0.0f ? (unsigned)(x < 4294967040.0f ? x : 4294967040.0f) : 0u;
  }
  DEVICE unsigned use() const { return FOR_DROPOUT + 256u * layer; }
  DEVICE float factor(unsigned word) const { return word >= threshold ? scale : 0.0f; }
};

#ifdef __CUDACC__

// What act(u) is multiplied by in 4 columns of row b: NaN stays NaN, dropped or not.
DEVICE Pack<4> dropout_factors(const Dropout& d, unsigned step, unsigned b, unsigned quad) {
  unsigned c[4] = {quad, d.row + b, step, d.use()};
  philox4x32(c, not_hoisted(d.seed_low), not_hoisted(d.seed_high));
  Pack<4> factors;
  UNROLL for (int k = 0; k < 4; ++k) factors[k] = d.factor(c[k]);
  return factors;
}

DEVICE float factor_of(const Pack<4>& x, int k) { return k & 2 ? (k & 1 ? x[3] : x[2]) : (k & 1 ? x[1] : x[0]); }

#else

// The factors of 4 `quads` columns of row b, for quads <= PHILOX_MANY: loops that vectorise, once for all activations.
__attribute__((noinline)) inline void dropout_row(const Dropout& dropout, unsigned b, unsigned first_quad, int quads,
                                                  float* factors) {
  const Dropout d = dropout;  // which no store to the factors can change
  unsigned word[4][PHILOX_MANY];
  philox4x32_many(word, first_quad, quads, d.row + b, d.step(), d.use(), d.seed_low, d.seed_high);
  INDEPENDENT for (int q = 0; q < quads; ++q)
    for (int k = 0; k < 4; ++k) factors[4 * q + k] = d.factor(word[k][q]);
}

#endif
