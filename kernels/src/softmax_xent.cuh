// Softmax cross-entropy: loss and gradient in one pass over the logits.
//
//   loss       = scale sum_r w[label[r]] (log sum_j exp(x[r, j]) - sum_j target[r, j] x[r, j])
//   dlogits[r] = scale w[label[r]] (softmax(x[r]) - target[r]),   target[r] = (1 - e) onehot(label[r]) + e / C
//
// w: a weight for each class, or 1; e: label smoothing (Szegedy et al., "Rethinking the Inception architecture", 2016),
// without which there is nothing to add up over the row for the second sum.
// x: the first C of the N columns of logits, (B, N) float32; label: (B,) int32. The other columns are padding, with
// which rows start on 16 bytes (47 classes in 48 columns): not read, and 0 in dlogits.
// Everything is computed from x - max(x), so logits of +-1e4 are exact. A label outside [0, C) or a NaN logit makes its
// row's gradient and the loss NaN.
// Bytes per element: 8. Launch: one warp per row, grid-stride, 8 warps per block. A row of up to 1024
// classes lives in registers (47 classes: 2 per lane); longer rows keep exp(x - max) in dlogits.
// With `confusion`, (C, C) counts, a row adds 1 at [label, prediction], the first largest logit: whole numbers, so
// the order of the atomic additions changes nothing.
// Row losses are added in a fixed order: warp, block, and at the end all blocks by the last one.
#pragma once
#include "common.cuh"

// Where a group keeps its row between the passes over it: this lane's columns in registers, first the logits and then
// their exponentials. All loads are on their way at once, and none waits for the label ...
template <int ITEMS> struct InRegisters {
  static constexpr int items = ITEMS;
  float v[ITEMS];
  DEVICE void fetch(const float* x, int C) { Group::for_each<ITEMS>(C, [&](int k, int j) { v[k] = x[j]; }); }
  DEVICE float logit(const float*, int k, int) const { return v[k]; }
  DEVICE float& at(int k, int) { return v[k]; }
};

// ... or the exponentials in the output row itself.
struct InMemory {
  static constexpr int items = 0;
  float* row;
  DEVICE void fetch(const float*, int) {}
  DEVICE float logit(const float* x, int, int j) const { return x[j]; }
  DEVICE float& at(int, int j) { return row[j]; }
};

struct RowResult {
  float loss;  // without the scale; NaN for a label out of range
  int correct; // 1 where the label is the first largest logit
};

struct Targets {
  float scale;
  float kept, shared;   // 1 - e, of the label; e / C, of every class
  const float* weights; // of the classes, or null
};

template <class Row>
DEVICE RowResult softmax_xent_row(Row row, const float* x, float* dx, int C, int label, const Targets& t) {
  constexpr int K = Row::items;
  const bool valid = label >= 0 && label < C;
  row.fetch(x, C);
  const float largest = Group::max<K>(C, [&](int k, int j) { return row.logit(x, k, j); });
  const float own = valid ? Group::at<K>(C, label, [&](int k, int j) { return row.logit(x, k, j); }) : not_a_number();
  const bool beaten = Group::any<K>(C, [&](int k, int j) { return row.logit(x, k, j) == largest && j < label; });
  const bool right = own == largest && !beaten;
  float below = t.kept * (largest - own);  // how far the mean logit under the target is below the largest
  if (t.shared != 0.0f)
    below += t.shared * Group::sum<K>(C, [&](int k, int j) { return largest - row.logit(x, k, j); });
  Group::sync();  // dx may be x, and another lane writes where `own` was read

  Group::for_each<K>(C, [&](int k, int j) { row.at(k, j) = exponential(row.logit(x, k, j) - largest); });
  const float total = Group::sum<K>(C, [&](int k, int j) { return row.at(k, j); });
  const float loss = logf(total) + below, weight = valid && t.weights ? t.weights[label] : 1.0f;
  const float scale = t.scale * weight, factor = valid ? scale / total : not_a_number();
  const float every = t.shared * scale, own_part = t.kept * scale;
  Group::for_each<K>(C, [&](int k, int j) {
    dx[j] = row.at(k, j) * factor - every - (j == label ? own_part : 0.0f);  // a choice of two numbers spills on 10.0
  });
  return {weight * loss, right && loss == loss ? 1 : 0};
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

// Sum of the row losses and number of correct rows.
struct Tally {
  double loss, correct;
  DEVICE void add(const Tally& other) {
    loss += other.loss;
    correct += other.correct;
  }
};

// The sum of all lanes, by a butterfly: every lane gets it.
DEVICE Tally sum_of_lanes(Tally x) {
  UNROLL for (int d = 16; d > 0; d >>= 1) {
    x.add({__shfl_xor_sync(0xffffffffu, x.loss, d), __shfl_xor_sync(0xffffffffu, x.correct, d)});
  }
  return x;
}

// The sum of x of lane 0 of all warps, for every thread. Between two calls must be a barrier.
DEVICE Tally sum_of_warps(const Tally& x) {
  __shared__ Tally tallies[XENT_THREADS / 32];
  if (Group::lane() == 0) tallies[threadIdx.x / 32] = x;
  __syncthreads();
  Tally sum = tallies[0];
  UNROLL for (int w = 1; w < XENT_THREADS / 32; ++w) sum.add(tallies[w]);
  return sum;
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
                               index_t B, int C, int N, const Targets& targets) {
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
      result = softmax_xent_row(InRegisters<ITEMS>{}, logits + r * N, dx, C, labels[r], targets);
    } else {
      result = softmax_xent_row(InMemory{dx}, logits + r * N, dx, C, labels[r], targets);
    }
    losses += result.loss;
    correct += result.correct;
  });
  const Tally block = sum_of_warps({losses, (double)correct});
  if (threadIdx.x == 0) {
    partial[2 * blockIdx.x] = (float)block.loss;
    partial[2 * blockIdx.x + 1] = (float)block.correct;
  }
  if (!is_last_block(counter, gridDim.x)) return;
  Tally sum = {0.0, 0.0};
  for (unsigned b = threadIdx.x; b < gridDim.x; b += XENT_THREADS) {
    sum.add({__ldcg(partial + 2 * b), __ldcg(partial + 2 * b + 1)});
  }
  sum = sum_of_warps(sum_of_lanes(sum));
  if (threadIdx.x == 0) {
    *loss = (float)(sum.loss * targets.scale);
    if (totals) {
      totals[0] += sum.loss;
      totals[1] += sum.correct;
    }
  }
}

#endif
