// The mean and the variance of every column of a batch, for batch normalisation (Ioffe & Szegedy 2015).
//
//   mean[j] = sum_b z[b, j] / B,   var[j] = sum_b (z[b, j] - mean[j])^2 / B
//
// z: (B, N) float32; mean, var: (N,). One pass, and no sum of squares, whose difference to the squared mean would
// cancel: the rows of a part of the batch have a count, a mean and m2, the sum of the squared deviations from that
// mean, and two parts are merged by the formula of Chan, Golub & LeVeque ("Updating formulae and a pairwise algorithm
// for computing sample variances", 1979). A row is a part of one; then the formula is Welford's (1962).
// running_mean and running_var (N,) follow the batch's as in torch.nn.BatchNorm1d: the variance with B - 1 for B.
// Bytes per element: 4. Launch: the tiles of bias_act_backward; parts of row blocks are merged by the last block.
// Everything is merged in an order that the shape and the launch give, so the same launch gives the same bits.
#pragma once
#include "bias_act.cuh"

// What merging a part of `other` rows into one of `count` needs, not both 0, for all columns.
struct Shares {
  float other;   // other / (count + other)
  float spread;  // count other / (count + other)
};

DEVICE Shares shares(float count, float other) {
  const float share = other / (count + other);
  return {share, count * share};
}

// Merges a part with the moments other_mean and other_m2; for one row they are its value and 0.
DEVICE void merge_moments(float& mean, float& m2, float other_mean, float other_m2, Shares s) {
  const float difference = other_mean - mean;
  mean += difference * s.other;
  m2 += other_m2 + difference * (difference * s.spread);  // whose square might be too large
}

struct Statistics { float *mean, *var, *running_mean, *running_var; float momentum; };  // running_*: both or neither

// Column j, of whose B rows these are the moments. No rows: NaN, and the running ones stay as they are.
DEVICE void write_statistics(const Statistics& s, index_t j, float mean, float m2, index_t B) {
  s.mean[j] = B > 0 ? mean : not_a_number();
  s.var[j] = m2 / (float)B;
  if (!s.running_mean || B == 0) return;
  const float unbiased = m2 / (float)(B > 1 ? B - 1 : 1);
  s.running_mean[j] += s.momentum * (mean - s.running_mean[j]);
  s.running_var[j] += s.momentum * (unbiased - s.running_var[j]);
}

#ifdef __CUDACC__

// How many of a thread's 4 columns, from `column` on, there are.
DEVICE int columns_left(index_t column, index_t N) {
  const index_t left = N - column;
  return left >= 4 ? 4 : left > 0 ? (int)left : 0;
}

// Accesses to them: one of 16 bytes, or `left` of 4.
template <bool VECTOR> DEVICE Pack<4> load_quad(const float* p, int left) {
  if constexpr (VECTOR) return load<4>(p);
  Pack<4> x = {};
  UNROLL for (int k = 0; k < 4; ++k) if (k < left) x[k] = p[k];
  return x;
}

template <bool VECTOR> DEVICE Pack<4> load_quad_past_l1(const float* p, int left) {
  if constexpr (VECTOR) return load_past_l1<4>(p);
  Pack<4> x = {};
  UNROLL for (int k = 0; k < 4; ++k) if (k < left) x[k] = load_past_l1<1>(p + k)[0];
  return x;
}

template <bool VECTOR> DEVICE void store_quad(float* p, const Pack<4>& x, int left) {
  if constexpr (VECTOR) {
    store(p, x);
  } else {
    UNROLL for (int k = 0; k < 4; ++k) if (k < left) p[k] = x[k];
  }
}

// The rows [begin, begin + count) of row block `block`, of which the last may have fewer, or none.
struct RowBlock {
  index_t begin;
  unsigned count;  // no memory holds as many as 2^32 for each block
  DEVICE RowBlock(index_t block, index_t B) {
    const index_t rows = quotient(B + gridDim.y - 1, gridDim.y), left = B - block * rows;
    begin = block * rows;
    count = left <= 0 ? 0u : (unsigned)(left < rows ? left : rows);
  }
};

struct Moments { float count; Pack<4> mean, m2; };  // of a thread's 4 columns

DEVICE void merge(Moments& m, const Moments& other) {
  if (other.count == 0.0f) return;
  const Shares s = shares(m.count, other.count);
  m.count += other.count;
  UNROLL for (int k = 0; k < 4; ++k) merge_moments(m.mean[k], m.m2[k], other.mean[k], other.m2[k], s);
}

// This thread's share of a row block. Loads of ROWS rows are on their way together.
template <bool VECTOR>
DEVICE Moments moments_of_rows(const float* z, RowBlock rows, index_t column, index_t N) {
  enum { ROWS = VECTOR ? ROWS_AT_ONCE : 1 };
  Moments m = {};
  const index_t step = blockDim.y * N;
  const int left = columns_left(column, N);
  if (left == 0) return m;
  const float* from = z + (rows.begin + threadIdx.y) * N + column;
  ROLLED for (index_t r = threadIdx.y; r < rows.count; r += ROWS * blockDim.y, from += ROWS * step) {
    Pack<4> x[ROWS];
    UNROLL for (int n = 0; n < ROWS; ++n)
      if (r + n * blockDim.y < rows.count) x[n] = load_quad<VECTOR>(from + n * step, left);
    UNROLL for (int n = 0; n < ROWS; ++n)
      if (r + n * blockDim.y < rows.count) merge(m, {1.0f, x[n], {}});
  }
  return m;
}

// Merges the row groups' moments into those of group 0, half of the groups into the other half at a time.
DEVICE void merge_row_groups(Moments& m) {
  __shared__ Moments groups[TILE_THREADS];  // 9 words each: no two of a warp's lanes meet in a bank
  const int place = threadIdx.y * blockDim.x + threadIdx.x;
  ROLLED for (int left = blockDim.y; left > 1;) {
    const int half = (left + 1) / 2;
    groups[place] = m;
    __syncthreads();
    if ((int)threadIdx.y + half < left) merge(m, groups[place + half * (int)blockDim.x]);
    __syncthreads();
    left = half;
  }
}

// This row group's share of the row blocks' moments: partial has (gridDim.y, N) means, and as many m2.
template <bool VECTOR>
DEVICE Moments moments_of_row_blocks(const float* partial, index_t B, index_t column, index_t N) {
  enum { PARTS = VECTOR ? 2 : 1 };
  Moments m = {};
  const index_t means = gridDim.y * N;
  const int left = columns_left(column, N);
  if (left == 0) return m;
  ROLLED for (unsigned b = threadIdx.y; b < gridDim.y; b += PARTS * blockDim.y) {
    Moments part[PARTS] = {};
    UNROLL for (int n = 0; n < PARTS; ++n) {
      const index_t block = b + n * blockDim.y;
      if (block >= gridDim.y) continue;
      const float* const from = partial + block * N + column;
      part[n] = {(float)RowBlock(block, B).count, load_quad_past_l1<VECTOR>(from, left),
                 load_quad_past_l1<VECTOR>(from + means, left)};
    }
    UNROLL for (int n = 0; n < PARTS; ++n) merge(m, part[n]);
  }
  return m;
}

// partial: (2, gridDim.y, N) floats of scratch, and counters: gridDim.x zeros, where gridDim.y > 1.
DEVICE void batch_norm_stats_block(const float* z, const Statistics& s, float* partial, unsigned* counters, index_t B,
                                   index_t N) {
  const index_t column = 4 * (blockIdx.x * (index_t)blockDim.x + threadIdx.x);
  const int left = columns_left(column, N);
  const bool vector = N % 4 == 0 && aligned16(z);
  const RowBlock rows(blockIdx.y, B);
  Moments m = vector ? moments_of_rows<true>(z, rows, column, N) : moments_of_rows<false>(z, rows, column, N);
  merge_row_groups(m);
  if (gridDim.y > 1) {
    if (threadIdx.y == 0) {
      float* const to = partial + blockIdx.y * N + column;
      store_quad<false>(to, m.mean, left);
      store_quad<false>(to + gridDim.y * N, m.m2, left);
    }
    if (!is_last_block(counters + blockIdx.x, gridDim.y)) return;
    if (vector) m = moments_of_row_blocks<true>(partial, B, column, N);
    else m = moments_of_row_blocks<false>(partial, B, column, N);
    merge_row_groups(m);
  }
  if (threadIdx.y == 0) {
    UNROLL for (int k = 0; k < 4; ++k) if (k < left) write_statistics(s, column + k, m.mean[k], m.m2[k], B);
  }
}

#else

// One worker's rows: their mean (N,) and m2 (N,).
DEVICE void moments_of_rows(Rows rows, const float* z, float* mean, float* m2) {
  for (index_t j = 0; j < rows.columns; ++j) mean[j] = m2[j] = 0.0f;
  for (index_t r = rows.begin; r < rows.end; ++r) {
    const Shares s = shares((float)(r - rows.begin), 1.0f);
    const float* const row = z + r * rows.columns;
    INDEPENDENT for (index_t j = 0; j < rows.columns; ++j) merge_moments(mean[j], m2[j], row[j], 0.0f, s);
  }
}

#endif
