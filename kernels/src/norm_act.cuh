// Activation with batch normalisation before it and dropout behind it, and the backward pass of all three.
//
//   u[b, j]  = z[b, j] + bias[j],   or with batch normalisation   xhat[b, j] weight[j] + bias[j],
//   xhat     = (z - mean) / sqrt(var + eps)                       (Ioffe & Szegedy 2015)
//   y        = act(u) keep / (1 - p)                              (Srivastava et al. 2014)
//   du       = dy keep / (1 - p) act'(u),   dbias[j] = sum_b du[b, j],   dweight[j] = sum_b du[b, j] xhat[b, j]
//   dz       = du,   or   weight / sqrt(var + eps) (du - dbias / B - xhat dweight / B),   through mean and var, too
//
// keep is 0 or 1 as dropout.cuh says: computed again where it is needed, never stored.
// z, dy, y, dz: (B, N) float32; the others (N,). Bytes per element: forward 8; backward 12, and with normalisation, of
// which dz needs both sums of its column, 12 more for a second pass.
// Launch: forward and the second pass flat, as bias_act. The first pass in the tiles of bias_act_backward, where a
// thread has the 4 columns of one Philox counter. Whether there is normalisation or dropout are branches that all
// threads take alike, not kernels: there are as many of those as activations already.
#pragma once
#include "batch_norm.cuh"
#include "dropout.cuh"

struct Norm { const float *mean, *var, *weight; float eps; };  // null: none

// What W columns of u need: u = (z - mean) slope + bias, with slope = rstd weight. Without normalisation that is
// (z - 0) 1 + bias, which is z + bias to the bit.
template <int W> struct Columns {
  Pack<W> mean, rstd, slope, bias;
  DEVICE float deviation(float z, int k) const { return z - mean[k]; }
  DEVICE float pre_activation(float deviation, int k) const { return deviation * slope[k] + bias[k]; }
};

// get(p): the W columns of an array (N,).
template <int W, class Get> DEVICE Columns<W> columns(const Norm& norm, const float* bias, Get get) {
  Columns<W> c;
  c.bias = get(bias);
  if (norm.mean) {
    c.mean = get(norm.mean);
    c.rstd = get(norm.var);
    c.slope = get(norm.weight);
    UNROLL for (int k = 0; k < W; ++k) {
      c.rstd[k] = inverse_root(c.rstd[k] + norm.eps);
      c.slope[k] *= c.rstd[k];
    }
  } else {
    UNROLL for (int k = 0; k < W; ++k) {
      c.mean[k] = 0.0f;
      c.rstd[k] = c.slope[k] = 1.0f;
    }
  }
  return c;
}

template <class Act> DEVICE float norm_act_element(float u, float factor) { return Act::value(u) * factor; }

// dz of one element with normalisation, in column k of c: the sums are dbias and dweight.
template <int W>
DEVICE float norm_input_gradient_element(float du, float z, const Columns<W>& c, int k, float du_sum, float du_xhat_sum,
                                         float inverse_B) {
  return c.slope[k] * (du - du_sum * inverse_B - c.deviation(z, k) * (c.rstd[k] * du_xhat_sum * inverse_B));
}

#ifdef __CUDACC__

// get(p) for the W columns from j on of a flat launch. A pack of a whole row reads 16 bytes, and another may wrap.
template <int W> DEVICE auto columns_from(Rows rows, index_t j, bool whole) {
  return [=](const float* p) {
    if (W == 4 && whole) return load<W>(p + j);
    Pack<W> x;
    UNROLL for (int k = 0; k < W; ++k) x[k] = p[rows.wrap(j + k)];
    return x;
  };
}

template <class Act>
DEVICE void norm_act_rows(Rows rows, const float* z, const float* bias, const Norm& norm, const Dropout& dropout,
                          float* y) {
  const auto fetch = [=](auto width, auto i) { return load<decltype(width)::value>(z + i); };
  const bool whole = rows.columns % 4 == 0 && aligned16(bias, norm.mean, norm.var, norm.weight);
  // A pack that is not the four columns of one counter would take up to three; so there, each element takes one.
  const bool vector = aligned16(z, y) && (whole || dropout.threshold == 0);
  rows.for_each(vector, fetch, [=](auto width, auto i, auto j, auto x) {
    constexpr int W = decltype(width)::value;
    const index_t b = W == 4 ? (unsigned)i / (unsigned)rows.columns : quotient(i, rows.columns);
    const auto c = columns<W>(norm, bias, columns_from<W>(rows, j, whole));
    Pack<4> factors = {{1.0f, 1.0f, 1.0f, 1.0f}};
    if (dropout.threshold) factors = dropout_factors(dropout, dropout.step(), (unsigned)b, (unsigned)j / 4);
    UNROLL for (int k = 0; k < W; ++k) {
      const float factor = W == 4 ? factors[k] : factor_of(factors, j % 4);
      x[k] = norm_act_element<Act>(c.pre_activation(c.deviation(x[k], k), k), factor);
    }
    store(y + i, x);
  });
}

DEVICE void norm_input_gradient_rows(Rows rows, const float* z, const Norm& norm, const float* bias_grad,
                                     const float* weight_grad, float inverse_B, float* dz) {
  const auto fetch = [=](auto width, auto i) {
    constexpr int W = decltype(width)::value;
    struct { Pack<W> du, z; } x = {load<W>(dz + i), load<W>(z + i)};
    return x;
  };
  const bool whole = rows.columns % 4 == 0 && aligned16(norm.mean, norm.var, norm.weight, bias_grad, weight_grad);
  rows.for_each(aligned16(z, dz), fetch, [=](auto width, auto i, auto j, auto x) {
    constexpr int W = decltype(width)::value;
    const auto get = columns_from<W>(rows, j, whole);
    const auto c = columns<W>(norm, bias_grad, get);  // its bias is the sum of du
    const Pack<W> du_xhat = get(weight_grad);
    UNROLL for (int k = 0; k < W; ++k)
      x.du[k] = norm_input_gradient_element(x.du[k], x.z[k], c, k, c.bias[k], du_xhat[k], inverse_B);
    store(dz + i, x.du);
  });
}

struct ColumnSums { Pack<4> bias, weight; };  // of du, and of du xhat, in a thread's 4 columns

// This thread's share of a row block: du into dz, and the sums. One row at a time: there are registers for no more.
template <class Act, bool VECTOR>
DEVICE void norm_act_backward_rows(const float* dy, const float* z, const float* bias, const Norm& norm,
                                   const Dropout& dropout, float* dz, RowBlock rows, index_t column, index_t N,
                                   ColumnSums& sums) {
  const int left = columns_left(column, N);
  if (left == 0) return;
  const auto c = columns<4>(norm, bias, [=](const float* p) { return load_quad<false>(p + column, left); });
  ROLLED for (unsigned r = threadIdx.y; r < rows.count; r += blockDim.y) {
    const index_t i = (rows.begin + r) * N + column;
    Pack<4> g = load_quad<VECTOR>(dy + i, left);
    const Pack<4> x = load_quad<VECTOR>(z + i, left);
    if (dropout.threshold) {  // applied at once, because the factors would take registers that are not there
      const auto factors = dropout_factors(dropout, dropout.step(), (unsigned)rows.begin + r, (unsigned)column / 4);
      UNROLL for (int k = 0; k < 4; ++k) g[k] *= factors[k];
    }
    UNROLL for (int k = 0; k < 4; ++k) {
      const float deviation = c.deviation(x[k], k);
      g[k] = Act::backward(g[k], c.pre_activation(deviation, k));
      sums.bias[k] += g[k];
      sums.weight[k] += g[k] * deviation;
    }
    store_quad<VECTOR>(dz + i, g, left);
  }
  if (!norm.mean) return;
  const Pack<4> var = load_quad<false>(norm.var + column, left);  // again, for fewer registers in the loop
  UNROLL for (int k = 0; k < 4; ++k) sums.weight[k] *= inverse_root(var[k] + norm.eps);
}

// The sums of a row block's row groups, or where there are several row blocks their sums in the last one.
// partial: (2, gridDim.y, N) floats of scratch, and counters: gridDim.x zeros, where gridDim.y > 1. dz may be dy.
template <class Act>
DEVICE void norm_act_backward_block(const float* dy, const float* z, const float* bias, const Norm& norm,
                                    const Dropout& dropout, float* dz, float* bias_grad, float* weight_grad,
                                    float* partial, unsigned* counters, index_t B, index_t N) {
  __shared__ float shared[4][TILE_THREADS];
  const index_t first = blockIdx.x * (index_t)(4 * blockDim.x), column = first + 4 * threadIdx.x;
  const bool vector = N % 4 == 0 && aligned16(dy, z, dz);
  const RowBlock rows(blockIdx.y, B);
  ColumnSums sums = {};
  if (vector) norm_act_backward_rows<Act, true>(dy, z, bias, norm, dropout, dz, rows, column, N, sums);
  else norm_act_backward_rows<Act, false>(dy, z, bias, norm, dropout, dz, rows, column, N, sums);
  add_row_groups(shared, sums.bias.v);
  if (norm.mean) add_row_groups(shared, sums.weight.v);
  if (threadIdx.y == 0) {
    const index_t to = blockIdx.y * N + column;
    const int left = columns_left(column, N);
    store_quad<false>(gridDim.y == 1 ? bias_grad + column : partial + to, sums.bias, left);
    if (norm.mean)
      store_quad<false>(gridDim.y == 1 ? weight_grad + column : partial + gridDim.y * N + to, sums.weight, left);
  }
  if (gridDim.y == 1 || !is_last_block(counters + blockIdx.x, gridDim.y)) return;
  ROLLED for (int which = 0; which < (norm.mean ? 2 : 1); ++which) {
    const float* const parts = partial + which * gridDim.y * N;
    float acc[4];
    if (vector) add_row_blocks<true>(parts, first, N, acc);
    else add_row_blocks<false>(parts, first, N, acc);
    add_row_groups(shared, acc);
    if (threadIdx.y) continue;
    UNROLL for (int k = 0; k < 4; ++k) {
      const index_t j = first + (vector ? tile_column<true>(k) : tile_column<false>(k));
      if (j < N) (which ? weight_grad : bias_grad)[j] = acc[k];
    }
  }
}

#else

// What all columns need, prepared: four arrays (N,), of which one worker's rows take a column at a time.
struct PreparedColumns {
  const float *mean, *rstd, *slope, *bias;
  DEVICE Columns<1> operator[](index_t j) const { return {{{mean[j]}}, {{rstd[j]}}, {{slope[j]}}, {{bias[j]}}}; }
};

DEVICE PreparedColumns prepare_columns(const Norm& norm, const float* bias, index_t N, float* scratch) {
  float *const mean = scratch, *const rstd = scratch + N, *const slope = scratch + 2 * N;
  for (index_t j = 0; j < N; ++j) {
    const auto c = columns<1>(norm, bias, [=](const float* p) { return load<1>(p + j); });
    mean[j] = c.mean[0];
    rstd[j] = c.rstd[0];
    slope[j] = c.slope[0];
  }
  return {mean, rstd, slope, bias};
}

// f(i, j, factor) for one worker's elements, in blocks of columns whose factors come first.
template <class F> DEVICE void for_each_with_factor(Rows rows, const Dropout& dropout, F f) {
  constexpr index_t COLUMNS = 512;
  static_assert(COLUMNS <= 4 * PHILOX_MANY);  // what dropout_row takes
  float factors[COLUMNS];
  for (float& factor : factors) factor = 1.0f;
  for (index_t b = rows.begin; b < rows.end; ++b) {
    for (index_t j = 0; j < rows.columns; j += COLUMNS) {
      const index_t count = rows.columns - j < COLUMNS ? rows.columns - j : COLUMNS;
      if (dropout.threshold) dropout_row(dropout, (unsigned)b, (unsigned)j / 4, (int)(count + 3) / 4, factors);
      INDEPENDENT for (index_t k = 0; k < count; ++k) f(b * rows.columns + j + k, j + k, factors[k]);
    }
  }
}

template <class Act>
DEVICE void norm_act_rows(Rows rows, const float* z, PreparedColumns columns, const Dropout& dropout, float* y) {
  for_each_with_factor(rows, dropout, [=](index_t i, index_t j, float factor) {
    const Columns<1> c = columns[j];
    y[i] = norm_act_element<Act>(c.pre_activation(c.deviation(z[i], 0), 0), factor);
  });
}

// du into dz, which may be dy, and into the arrays (N,) the sums of du and of du xhat.
template <class Act>
DEVICE void norm_act_backward_rows(Rows rows, const float* dy, const float* z, PreparedColumns columns,
                                   const Dropout& dropout, float* dz, float* bias_sums, float* weight_sums) {
  for (index_t j = 0; j < rows.columns; ++j) bias_sums[j] = weight_sums[j] = 0.0f;
  for_each_with_factor(rows, dropout, [=](index_t i, index_t j, float factor) {
    const Columns<1> c = columns[j];
    const float deviation = c.deviation(z[i], 0);
    const float du = Act::backward(dy[i] * factor, c.pre_activation(deviation, 0));
    bias_sums[j] += du;
    weight_sums[j] += du * (deviation * c.rstd[0]);
    dz[i] = du;
  });
}

DEVICE void norm_input_gradient_rows(Rows rows, const float* z, PreparedColumns columns, const float* bias_grad,
                                     const float* weight_grad, float inverse_B, float* dz) {
  rows.for_each(true, [=](auto, index_t i, index_t j) {
    dz[i] = norm_input_gradient_element(dz[i], z[i], columns[j], 0, bias_grad[j], weight_grad[j], inverse_B);
  });
}

#endif
