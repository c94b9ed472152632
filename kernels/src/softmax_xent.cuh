// Softmax cross-entropy: loss and gradient in one pass over the logits.
//
//   loss       = scale sum_r (log sum_j exp(x[r, j]) - x[r, label[r]])
//   dlogits[r] = scale (softmax(x[r]) - onehot(label[r]))
//
// x: the first C of the N columns of logits, (B, N) float32; label: (B,) int32. The other columns are padding, with
// which rows start on 16 bytes (47 classes in 48 columns): not read, and 0 in dlogits.
// Everything is computed from x - max(x), so logits of +-1e4 are exact. A label outside [0, C) or a NaN logit makes its
// row's gradient and the loss NaN.
// Bytes per element: 8. Launch: one warp per row, grid-stride, 8 warps per block. A row of up to 1024
// classes lives in registers (47 classes: 2 per lane); longer rows keep exp(x - max) in dlogits.
// With `confusion`, (C, C) counts, a row adds 1 at [label, prediction], the first largest logit: whole numbers, so
// the order of the atomic additions changes nothing.
// Row losses are added in a fixed order: lane, warp, block, and at the end by the last block.
#pragma once
#include "common.cuh"

// Where a group keeps its row between the passes over it: this lane's columns in registers ...
template <int ITEMS> struct InRegisters {
  static constexpr int items = ITEMS;
  float v[ITEMS];
  DEVICE float& at(int k, int) { return v[k]; }
};

// ... or the output row itself.
struct InMemory {
  static constexpr int items = 0;
  float* row;
  DEVICE float& at(int, int j) { return row[j]; }
};

struct RowResult {
  float loss;  // without the scale; NaN for a label out of range
  int correct; // 1 where the label is the first largest logit
};

template <class Row>
DEVICE RowResult softmax_xent_row(Row row, const float* x, float* dx, int C, int label, float scale) {
  constexpr int K = Row::items;
  const bool valid = label >= 0 && label < C;
  const float own = valid ? x[label] : not_a_number();
  const float largest = Group::max<K>(C, [&](int, int j) { return x[j]; });
  const bool beaten = Group::any<K>(C, [&](int, int j) { return x[j] == largest && j < label; });
  Group::sync();  // dx may be x, and another lane writes where `own` was read

  Group::for_each<K>(C, [&](int k, int j) { row.at(k, j) = exponential(x[j] - largest); });
  const float total = Group::sum<K>(C, [&](int k, int j) { return row.at(k, j); });
  const float loss = logf(total) + (largest - own);
  const float factor = valid ? scale / total : not_a_number();
  Group::for_each<K>(C, [&](int k, int j) { dx[j] = row.at(k, j) * factor - (j == label ? scale : 0.0f); });
  return {loss, own == largest && !beaten && loss == loss ? 1 : 0};
}

// Ahead of softmax_xent_row, for the calls that want it: the row's count in `confusion`, unless that is null, and zeros
// in its columns from C on. A pass of its own, which leaves the logits in the cache, because within that function it
// would take registers from every call.
DEVICE void confusion_and_padding(const float* x, float* dx, int C, int N, int label, unsigned long long* confusion) {
  if (confusion && label >= 0 && label < C) {
    const float largest = Group::max<0>(C, [&](int, int j) { return x[j]; });
    const int first = Group::first<0>(C, [&](int, int j) { return x[j] == largest; });
    if (Group::lane() == 0) add_one(confusion + (index_t)label * C + (first < C ? first : 0));  // 0 if all are NaN
  }
  Group::for_each<0>(N - C, [&](int, int j) { dx[C + j] = 0.0f; });
}

#ifdef __CUDACC__

constexpr int XENT_THREADS = 256;

// Adds up to XENT_THREADS values in a fixed tree; the result is thread 0's.
template <class T> DEVICE T block_sum(T x) {
  __shared__ T sums[XENT_THREADS];
  sums[threadIdx.x] = x;
  __syncthreads();
  for (unsigned half = XENT_THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return threadIdx.x == 0 ? sums[0] : T();
}

// f(r) for every row of this warp.
template <class F> DEVICE void each_row(index_t B, F f) {
  const int warps = XENT_THREADS / 32;
  for (index_t r = blockIdx.x * (index_t)warps + threadIdx.x / 32; r < B; r += gridDim.x * (index_t)warps) f(r);
}

// loss: one float. totals: null, or 2 doubles to which the sum of the row losses and the number of correct
// rows are added. partial: (gridDim.x, 2) floats of scratch; counter: one zero.
template <int ITEMS>
DEVICE void softmax_xent_block(const float* logits, const int* labels, float* dlogits, float* loss,
                               double* totals, unsigned long long* confusion, float* partial, unsigned* counter,
                               index_t B, int C, int N, float scale) {
  if (confusion || N > C) {
    each_row(B, [&](index_t r) {
      confusion_and_padding(logits + r * N, dlogits + r * N, C, N, labels[r], confusion);
    });
  }
  float losses = 0.0f;
  int correct = 0;
  each_row(B, [&](index_t r) {
    float* const dx = dlogits + r * N;
    RowResult result;
    if constexpr (ITEMS > 0) {
      result = softmax_xent_row(InRegisters<ITEMS>{}, logits + r * N, dx, C, labels[r], scale);
    } else {
      result = softmax_xent_row(InMemory{dx}, logits + r * N, dx, C, labels[r], scale);
    }
    losses += result.loss;
    correct += result.correct;
  });
  const bool counts = Group::lane() == 0;
  const float block_loss = block_sum(counts ? losses : 0.0f);
  const int block_correct = block_sum(counts ? correct : 0);
  if (threadIdx.x == 0) {
    partial[2 * blockIdx.x] = block_loss;
    partial[2 * blockIdx.x + 1] = (float)block_correct;
  }
  if (!is_last_block(counter, gridDim.x)) return;
  double sum = 0.0, hits = 0.0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += XENT_THREADS) {
    sum += __ldcg(partial + 2 * b);
    hits += __ldcg(partial + 2 * b + 1);
  }
  sum = block_sum(sum);
  hits = block_sum(hits);
  if (threadIdx.x == 0) {
    *loss = (float)(sum * scale);
    if (totals) {
      totals[0] += sum;
      totals[1] += hits;
    }
  }
}

#endif
