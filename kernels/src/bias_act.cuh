// act(z + bias) and its backward pass with the bias gradient.
//
//   forward    y[r, j]  = act(z[r, j] + bias[j])
//   backward   dz[r, j] = dy[r, j] act'(u[r, j]),  dbias[j] = sum_r dz[r, j]
//
// u is the pre-activation z + bias. Backward takes saved = u, or saved = z with the bias again; for relu,
// leaky_relu and identity saved = y serves as well, because y and u have the same sign.
// z, dy, saved, y, dz: (B, N) float32; bias, dbias: (N,).
// Bytes per element: forward 8; backward 12 (8 where dz is not wanted).
// Launch: forward flat and grid-stride. Backward in tiles of columns, 4 columns and every so many rows per thread. Few
// rows: tiles of 8 columns or more that have all rows, so that one block has a column's sum. Many rows: tiles of up to
// 128 columns x as many row blocks as fill the GPU; partial sums of a column then meet in the last block.
#pragma once
#include "common.cuh"

struct Identity {
  DEVICE static float value(float u) { return u; }
  DEVICE static float backward(float dy, float) { return dy; }
};

struct Relu {
  DEVICE static float value(float u) { return 0.0f > u ? 0.0f : u; }  // this way round NaN stays NaN
  DEVICE static float backward(float dy, float u) { return u <= 0.0f ? 0.0f : dy; }
};

struct LeakyRelu {
  static constexpr float slope = 0.01f;
  DEVICE static float value(float u) { return u > 0.0f ? u : slope * u; }
  DEVICE static float backward(float dy, float u) { return u > 0.0f ? dy : slope * dy; }
};

struct Logistic { float value, slope; };

// sigmoid(u) and its derivative. 1 - sigmoid(u) would cancel for u >> 0, where silu' and gelu_tanh' multiply it
// by up to 35; and exp(-|u|) cannot overflow.
DEVICE Logistic logistic(float u) {
  const float e = exponential(-fabsf(u)), r = 1.0f / (1.0f + e);
  return {u < 0.0f ? e * r : r, e * r * r};
}

struct Silu {  // u sigmoid(u): Hendrycks & Gimpel 2016; "swish", Ramachandran et al. 2017
  DEVICE static float value(float u) { return u / (1.0f + exponential(-u)); }
  DEVICE static float backward(float dy, float u) {
    const Logistic s = logistic(u);
    return dy * (s.value + u * s.slope);
  }
};

struct Gelu {  // u Phi(u), Phi the normal distribution function: Hendrycks & Gimpel 2016
  static constexpr float root_half = 0.70710678118654752f, root_inverse_2pi = 0.39894228040143268f;
  DEVICE static float cdf(float u) { return 0.5f * (1.0f + error_function(root_half * u)); }
  DEVICE static float value(float u) { return u * cdf(u); }
  DEVICE static float backward(float dy, float u) {
    return dy * (cdf(u) + u * (root_inverse_2pi * exponential(-0.5f * u * u)));
  }
};

struct GeluTanh {  // 0.5 (1 + tanh(a)) = sigmoid(2a): one exponential, and no cancellation for u << 0
  static constexpr float two_root_2_over_pi = 1.5957691216057308f, cubic = 0.044715f;
  DEVICE static float exponent(float u) { return two_root_2_over_pi * (u + cubic * u * u * u); }
  DEVICE static float value(float u) { return u / (1.0f + exponential(-exponent(u))); }
  DEVICE static float backward(float dy, float u) {
    const Logistic s = logistic(exponent(u));
    return dy * (s.value + u * s.slope * two_root_2_over_pi * (1.0f + 3.0f * cubic * u * u));
  }
};

template <class Act> DEVICE void bias_act_rows(Rows rows, const float* z, const float* bias, float* y) {
  const auto fetch = [=](auto width, auto i) { return load<decltype(width)::value>(z + i); };
  const bool whole = rows.columns % 4 == 0 && aligned16(bias);  // packs of a row, which do not wrap
  rows.for_each(aligned16(z, y), fetch, [=](auto width, auto i, auto j, auto x) {
    constexpr int W = decltype(width)::value;
    if (W == 4 && whole) {
      const Pack<W> shift = load<W>(bias + j);
      UNROLL for (int k = 0; k < W; ++k) x[k] = Act::value(x[k] + shift[k]);
    } else {
      UNROLL for (int k = 0; k < W; ++k) x[k] = Act::value(x[k] + bias[rows.wrap(j + k)]);
    }
    store(y + i, x);
  });
}

// dz of one element. `shift` is the bias that is still missing from saved.
template <class Act> DEVICE float bias_act_backward_element(float dy, float saved, float shift) {
  return Act::backward(dy, saved + shift);
}

#ifdef __CUDACC__

enum { TILE_THREADS = 256, ROWS_AT_ONCE = 3, PARTS_AT_ONCE = 4 };  // no constexpr, of which not all users use all

// A block has 4 blockDim.x columns, 4 per thread, and blockDim.y row groups, each with every blockDim.y-th row.
// Without packs a thread's columns lie blockDim.x apart, so that neighbouring threads read neighbouring elements.
template <bool VECTOR> DEVICE int tile_column(int k) {
  return VECTOR ? 4 * threadIdx.x + k : threadIdx.x + blockDim.x * k;
}

// This thread's share of a block's `rows` rows, of which `row` is the first element: dz, and into acc the sums of its
// columns. The loads of ROWS_AT_ONCE rows come before the first store; see Range.
template <class Act, bool VECTOR>
DEVICE void bias_act_backward_rows(const float* dy, const float* saved, const float* bias, float* dz, float (&acc)[4],
                                   unsigned rows, index_t row, index_t first, index_t N) {
  constexpr int W = VECTOR ? 4 : 1, PACKS = 4 / W, ROWS = VECTOR ? ROWS_AT_ONCE : 1;
  const index_t step = blockDim.y * N;
  float shift[4];
  bool exists[PACKS];
  UNROLL for (int k = 0; k < 4; ++k) {
    const index_t j = first + tile_column<VECTOR>(k);
    exists[k / W] = j < N;
    shift[k] = bias && j < N ? bias[j] : 0.0f;
  }
  if (!exists[0]) return;  // where a thread's first column does not exist, no other does
  row += threadIdx.y * N + first;
  ROLLED for (unsigned r = threadIdx.y; r < rows; r += ROWS * blockDim.y, row += ROWS * step) {
    Pack<W> g[ROWS][PACKS], s[ROWS][PACKS];
    UNROLL for (int n = 0; n < ROWS; ++n) {
      UNROLL for (int k = 0; k < PACKS; ++k) {
        if (r + n * blockDim.y >= rows || !exists[k]) continue;
        const index_t i = row + n * step + tile_column<VECTOR>(W * k);
        g[n][k] = load<W>(dy + i);
        s[n][k] = load<W>(saved + i);
      }
    }
    UNROLL for (int n = 0; n < ROWS; ++n) {
      UNROLL for (int k = 0; k < PACKS; ++k) {
        if (r + n * blockDim.y >= rows || !exists[k]) continue;
        UNROLL for (int w = 0; w < W; ++w) {
          float& x = g[n][k][w];
          x = bias_act_backward_element<Act>(x, s[n][k][w], shift[W * k + w]);
          acc[W * k + w] += x;
        }
        if (dz) store(dz + row + n * step + tile_column<VECTOR>(W * k), g[n][k]);
      }
    }
  }
}

// Adds the row groups' sums, in a fixed order, into those of group 0: of up to 8 groups at a time, because one thread
// that adds 128 numbers makes all the others wait.
DEVICE void add_row_groups(float (&sums)[4][TILE_THREADS], float (&acc)[4]) {
  const int place = threadIdx.y * blockDim.x + threadIdx.x;
  ROLLED for (int groups = blockDim.y; groups > 1;) {
    const int left = (groups + 7) / 8;
    UNROLL for (int k = 0; k < 4; ++k) sums[k][place] = acc[k];
    __syncthreads();
    if (threadIdx.y < left) {
      UNROLL for (int more = 1; more < 8; ++more) {
        if (threadIdx.y + more * left >= groups) continue;
        UNROLL for (int k = 0; k < 4; ++k) acc[k] += sums[k][place + more * left * (int)blockDim.x];
      }
    }
    __syncthreads();
    groups = left;
  }
}

// This row group's share of the row blocks' sums, in acc. Loads of PARTS_AT_ONCE blocks are on their way together,
// because nobody else is left to hide how long they take.
template <bool VECTOR>
DEVICE void add_row_blocks(const float* partial, index_t first, index_t N, float (&acc)[4]) {
  constexpr int W = VECTOR ? 4 : 1, PACKS = 4 / W, PARTS = VECTOR ? PARTS_AT_ONCE : 1;
  const index_t step = blockDim.y * N;
  const float* from = partial + threadIdx.y * N + first;
  UNROLL for (int k = 0; k < 4; ++k) acc[k] = 0.0f;
  ROLLED for (unsigned b = threadIdx.y; b < gridDim.y; b += PARTS * blockDim.y, from += PARTS * step) {
    Pack<W> part[PARTS][PACKS] = {};
    UNROLL for (int n = 0; n < PARTS; ++n) {
      UNROLL for (int k = 0; k < PACKS; ++k) {
        const int j = tile_column<VECTOR>(W * k);
        if (b + n * blockDim.y < gridDim.y && first + j < N) part[n][k] = load_past_l1<W>(from + n * step + j);
      }
    }
    UNROLL for (int n = 0; n < PARTS; ++n) {
      UNROLL for (int k = 0; k < 4; ++k) acc[k] += part[n][k / W][k % W];
    }
  }
}

// partial: (gridDim.y, N) floats of scratch, and counters: gridDim.x zeros, where gridDim.y > 1. dz may be null or dy.
template <class Act>
DEVICE void bias_act_backward_block(const float* dy, const float* saved, const float* bias, float* dz,
                                    float* dbias, float* partial, unsigned* counters, index_t B, index_t N) {
  __shared__ float sums[4][TILE_THREADS];
  const index_t first = blockIdx.x * (index_t)(4 * blockDim.x);
  const bool vector = N % 4 == 0 && aligned16(dy, saved, dz);
  const index_t rows_per_block = quotient(B + gridDim.y - 1, gridDim.y);
  const index_t begin = blockIdx.y * rows_per_block;
  const index_t left = B - begin, rows = left < rows_per_block ? left : rows_per_block;  // maybe none
  float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (rows > 0) {  // and always less than 2^32, because no memory holds as many for each block
    if (vector) bias_act_backward_rows<Act, true>(dy, saved, bias, dz, acc, (unsigned)rows, begin * N, first, N);
    else bias_act_backward_rows<Act, false>(dy, saved, bias, dz, acc, (unsigned)rows, begin * N, first, N);
  }
  add_row_groups(sums, acc);
  index_t column[4];
  UNROLL for (int k = 0; k < 4; ++k) column[k] = first + (vector ? tile_column<true>(k) : tile_column<false>(k));
  float* const out = gridDim.y == 1 ? dbias : partial + blockIdx.y * N;
  if (threadIdx.y == 0) {
    UNROLL for (int k = 0; k < 4; ++k) if (column[k] < N) out[column[k]] = acc[k];
  }
  if (gridDim.y == 1 || !is_last_block(counters + blockIdx.x, gridDim.y)) return;
  if (vector) add_row_blocks<true>(partial, first, N, acc);
  else add_row_blocks<false>(partial, first, N, acc);
  add_row_groups(sums, acc);
  if (threadIdx.y == 0) {
    UNROLL for (int k = 0; k < 4; ++k) if (column[k] < N) dbias[column[k]] = acc[k];
  }
}

#else

// One worker's rows: dz, and into sums (N,) their column sums. dz may be dy.
template <class Act>
DEVICE void bias_act_backward_rows(Rows rows, const float* dy, const float* saved, const float* bias, float* dz,
                                   float* sums) {
  for (index_t j = 0; j < rows.columns; ++j) sums[j] = 0.0f;
  const auto element = [=](index_t i, index_t j, float shift) {
    const float g = bias_act_backward_element<Act>(dy[i], saved[i], shift);
    sums[j] += g;
    dz[i] = g;
  };
  // Two loops, because a choice inside the loop keeps it from being vectorised.
  if (bias) rows.for_each(true, [=](auto, index_t i, index_t j) { element(i, j, bias[j]); });
  else rows.for_each(true, [=](auto, index_t i, index_t j) { element(i, j, 0.0f); });
}

#endif
