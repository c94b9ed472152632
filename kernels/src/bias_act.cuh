// act(z + bias) and its backward pass with the bias gradient.
//
//   forward    y[r, j]  = act(z[r, j] + bias[j])
//   backward   dz[r, j] = dy[r, j] act'(u[r, j]),  dbias[j] = sum_r dz[r, j]
//
// u is the pre-activation z + bias. Backward takes saved = u, or saved = z with the bias again; for relu,
// leaky_relu and identity saved = y serves as well, because y and u have the same sign.
// z, dy, saved, y, dz: (B, N) float32; bias, dbias: (N,).
// Bytes per element: forward 8; backward 12 (8 where dz is not wanted).
// Launch: forward flat and grid-stride. Backward in tiles of 128 columns x as many row blocks as fill the
// GPU, 32 x 8 threads, 4 columns per lane; rows cross blocks, so partial sums meet in the last block.
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
  rows.for_each(aligned16(z, y), [=](auto width, index_t i, index_t j) {
    constexpr int W = decltype(width)::value;
    Pack<W> x = load<W>(z + i);
    UNROLL for (int k = 0; k < W; ++k) x[k] = Act::value(x[k] + bias[rows.wrap(j + k)]);
    store(y + i, x);
  });
}

// dz of one element. `shift` is the bias that is still missing from saved.
template <class Act> DEVICE float bias_act_backward_element(float dy, float saved, float shift) {
  return Act::backward(dy, saved + shift);
}

#ifdef __CUDACC__

constexpr int TILE_COLUMNS = 128, TILE_ROWS = 8;

// Adds the 8 row groups' sums of each of the tile's columns, in order, in the threads of the first group.
DEVICE void add_row_groups(float (&sums)[TILE_ROWS][TILE_COLUMNS], float (&acc)[4], const int (&slot)[4]) {
  UNROLL for (int k = 0; k < 4; ++k) sums[threadIdx.y][slot[k]] = acc[k];
  __syncthreads();
  if (threadIdx.y == 0) {
    UNROLL for (int k = 0; k < 4; ++k) {
      acc[k] = 0.0f;
      UNROLL for (int g = 0; g < TILE_ROWS; ++g) acc[k] += sums[g][slot[k]];
    }
  }
  __syncthreads();
}

// partial: (gridDim.y, N) floats of scratch; counters: gridDim.x zeros. dz may be null or equal dy.
template <class Act>
DEVICE void bias_act_backward_block(const float* dy, const float* saved, const float* bias, float* dz,
                                    float* dbias, float* partial, unsigned* counters, index_t B, index_t N) {
  __shared__ float sums[TILE_ROWS][TILE_COLUMNS];
  const index_t first = blockIdx.x * (index_t)TILE_COLUMNS;
  const bool vector = N % 4 == 0 && aligned16(dy, saved, dz);
  float shift[4], acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  int slot[4];  // this lane's columns within the tile: neighbours where packs are used, else strided
  UNROLL for (int k = 0; k < 4; ++k) {
    slot[k] = vector ? 4 * threadIdx.x + k : threadIdx.x + TILE_COLUMNS / 4 * k;
    shift[k] = bias && first + slot[k] < N ? bias[first + slot[k]] : 0.0f;
  }
  const index_t rows_per_block = (B + gridDim.y - 1) / gridDim.y;
  const index_t begin = blockIdx.y * rows_per_block;
  const index_t end = begin + rows_per_block < B ? begin + rows_per_block : B;
  ROLLED for (index_t r = begin + threadIdx.y; r < end; r += TILE_ROWS) {
    const index_t row = r * N + first;
    if (vector) {
      if (first + slot[0] < N) {
        Pack<4> g = load<4>(dy + row + slot[0]);
        const Pack<4> s = load<4>(saved + row + slot[0]);
        UNROLL for (int k = 0; k < 4; ++k) {
          g[k] = bias_act_backward_element<Act>(g[k], s[k], shift[k]);
          acc[k] += g[k];
        }
        if (dz) store(dz + row + slot[0], g);
      }
    } else {
      UNROLL for (int k = 0; k < 4; ++k) {
        if (first + slot[k] < N) {
          const float g = bias_act_backward_element<Act>(dy[row + slot[k]], saved[row + slot[k]], shift[k]);
          acc[k] += g;
          if (dz) dz[row + slot[k]] = g;
        }
      }
    }
  }
  add_row_groups(sums, acc, slot);
  float* const out = gridDim.y == 1 ? dbias : partial + blockIdx.y * N;
  if (threadIdx.y == 0) {
    UNROLL for (int k = 0; k < 4; ++k) if (first + slot[k] < N) out[first + slot[k]] = acc[k];
  }
  if (gridDim.y == 1 || !is_last_block(counters + blockIdx.x, gridDim.y)) return;
  UNROLL for (int k = 0; k < 4; ++k) {
    acc[k] = 0.0f;
    if (first + slot[k] < N)
      for (unsigned b = threadIdx.y; b < gridDim.y; b += TILE_ROWS) acc[k] += __ldcg(partial + b * N + first + slot[k]);
  }
  add_row_groups(sums, acc, slot);
  if (threadIdx.y == 0) {
    UNROLL for (int k = 0; k < 4; ++k) if (first + slot[k] < N) dbias[first + slot[k]] = acc[k];
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
