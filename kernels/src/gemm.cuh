// The products of a layer on tensor cores, each in one launch with what the layer does to the result.
//
//   forward          z = x w,  y = act(z + bias)                          x (B, K), w (K, N) -> y, z (B, N)
//   input gradient   dx = (dz w^T) act'(u),  dbias[j] = sum_r dx[r, j]    dz (B, N), w (K, N) -> dx (B, K)
//   weight gradient  dw = x^T dz                                          x (B, K), dz (B, N) -> dw (K, N)
//
// act, u, saved and bias are those of bias_act.cuh. All arrays are float32 and C-contiguous, of any size and alignment.
// The factors are rounded to TF32 or bfloat16 on their way into the tensor cores, which add in float32: the error of an
// element is that of the roundings, 2^-11 or 2^-8 of each factor at most, and of K float32 additions.
//
// Of the product C (M, N) = A (M, K) B (K, N), bytes: 4 (M K + K N + M N) at least, for 2 M N K operations: 512 x 784 x
// 400 has 87 operations per byte. A pass of its own would move 8 bytes more per element of C, forward and backward;
// here the bias, the activation and its derivative are applied in registers, and only saved is read.
// Launch shape and tiles: gemm_product.cuh.
#pragma once
#include "bias_act.cuh"
#include "gemm_product.cuh"

#if TENSOR_CORES

// f(Act{}) for the activation with this place in kernels.ACTIVATIONS: one branch for all that a thread has.
template <class F> DEVICE void with_activation(int activation, F f) {
  switch (activation) {
    case 0: return f(Identity{});
    case 1: return f(Relu{});
    case 2: return f(LeakyRelu{});
    case 3: return f(Silu{});
    case 4: return f(Gelu{});
    default: return f(GeluTanh{});
  }
}

// A block's tile of C, and what a layer does with it.
template <class Precision, bool A_K_RUNS, bool B_K_RUNS, int ROWS>
struct Result : Product<Precision, A_K_RUNS, B_K_RUNS, ROWS> {
  typedef Product<Precision, A_K_RUNS, B_K_RUNS, ROWS> P;
  using P::P, P::row, P::column, P::column_in_tile, P::M, P::N, P::y, P::PAIRS, P::BLOCKS;
  using P::column_tiles, P::tile_row, P::tile_column, P::warp_row, P::group;

  // A pair of an array like C; where that ends, zeros. `paired`: 8 bytes at once.
  DEVICE Pack<2> load_pair(const float* array, int p, bool paired) const {
    const float* const from = array + row(p) * N + column(p);
    if (row(p) >= M || column(p) >= N) return {{0.0f, 0.0f}};
    if (paired) {
      const float2 x = two(from);
      return {{x.x, x.y}};
    }
    return {{from[0], column(p) + 1 < N ? from[1] : 0.0f}};
  }
  DEVICE void store_pairs(float* array, bool paired) const {
    UNROLL for (int p = 0; p < PAIRS; ++p) {
      float* const to = array + row(p) * N + column(p);
      if (row(p) >= M || column(p) >= N) continue;
      if (paired) {
        *reinterpret_cast<float2*>(to) = make_float2(y[p][0], y[p][1]);
      } else {
        to[0] = y[p][0];
        if (column(p) + 1 < N) to[1] = y[p][1];
      }
    }
  }
  template <class... Arrays> DEVICE bool paired(const Arrays*... arrays) const {
    return N % 2 == 0 && ((reinterpret_cast<unsigned long long>(arrays) | ...) & 7) == 0;
  }

  // y = f(Act{}, pair, place in it, y, bias of the column) for every element.
  template <class F> DEVICE void each_element(const float* bias, int activation, F f) {
    Pack<2> shift[4];
    UNROLL for (int p = 0; p < 4; ++p) {
      UNROLL for (int k = 0; k < 2; ++k) shift[p][k] = bias && column(p) + k < N ? bias[column(p) + k] : 0.0f;
    }
    with_activation(activation, [&](auto act) {
      UNROLL for (int p = 0; p < PAIRS; ++p) {
        UNROLL for (int k = 0; k < 2; ++k) y[p][k] = f(act, p, k, y[p][k], shift[p % 4][k]);
      }
    });
  }

  // out[j] = sum over the rows of C. Rows cross tiles, so each leaves its sums (row tiles, N), and the last tile of a
  // column of tiles adds them. counters: a zero for each column of tiles.
  DEVICE void add_columns(float* out, float* sums, unsigned* counters) const {
    typedef float Columns[GEMM_COLUMNS];
    Columns* const part = reinterpret_cast<Columns*>(dynamic_shared());  // four, of 16 BLOCKS rows each
    const unsigned row_tiles = gridDim.x / column_tiles;
    __syncthreads();  // nobody reads tiles or what groups gave any more
    UNROLL for (int n = 0; n < 4; ++n) {
      UNROLL for (int k = 0; k < 2; ++k) {
        float x = 0.0f;
        UNROLL for (int p = n; p < PAIRS; p += 4) if (row(p) < M) x += y[p][k];
        UNROLL for (int d = 4; d < 32; d <<= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
        if (threadIdx.x % 32 < 4) part[warp_row / (16 * BLOCKS) + group][column_in_tile(n) + k] = x;
      }
    }
    __syncthreads();
    const int j = threadIdx.x % GEMM_COLUMNS, quarter = threadIdx.x / GEMM_COLUMNS;
    const index_t column = tile_column + j;
    const bool stores = quarter == 0 && column < N;
    float* const to = row_tiles == 1 ? out : sums + tile_row / ROWS * N;
    if (stores) to[column] = part[0][j] + part[1][j] + part[2][j] + part[3][j];
    if (row_tiles == 1 || !is_last_block(counters + tile_column / GEMM_COLUMNS, row_tiles)) return;
    float x = 0.0f;
    if (column < N)
      for (unsigned r = quarter; r < row_tiles; r += 4) x += __ldcg(sums + r * N + column);
    part[quarter][j] = x;
    __syncthreads();
    if (stores) out[column] = part[0][j] + part[1][j] + part[2][j] + part[3][j];
  }
};

// y = act(A B + bias), and where z is not null z = A B. bias may be null.
template <class Precision, int ROWS>
DEVICE void gemm_forward(const float* a, const float* b, const float* bias, float* y, float* z, float* partial,
                         unsigned* counters, index_t M, index_t N, index_t K, index_t depth, int activation) {
  Result<Precision, true, false, ROWS> c(M, N);
  if (!c.multiply(a, b, K, depth, partial, counters)) return;
  const bool paired = c.paired(y, z);
  if (z) c.store_pairs(z, paired);
  c.each_element(bias, activation, [&](auto act, int, int, float x, float shift) { return act.value(x + shift); });
  c.store_pairs(y, paired);
}

// dx = (A B) act'(saved + bias), B stored as its transpose, and where dbias is not null its column sums. saved and
// bias may be null; without saved there is no act'. counters: a zero for each column of tiles, then those of multiply.
template <class Precision, int ROWS>
DEVICE void gemm_input_gradient(const float* a, const float* b, const float* saved, const float* bias, float* dx,
                                float* dbias, float* sums, float* partial, unsigned* counters, index_t M, index_t N,
                                index_t K, index_t depth, int activation) {
  Result<Precision, true, true, ROWS> c(M, N);
  if (!c.multiply(a, b, K, depth, partial, counters + c.column_tiles)) return;
  const bool paired = c.paired(dx, saved);
  if (saved) {
    Pack<2> u[c.PAIRS];
    UNROLL for (int p = 0; p < c.PAIRS; ++p) u[p] = c.load_pair(saved, p, paired);
    c.each_element(bias, activation, [&](auto act, int p, int k, float x, float shift) {
      return bias_act_backward_element<decltype(act)>(x, u[p][k], shift);
    });
  }
  c.store_pairs(dx, paired);
  if (dbias) c.add_columns(dbias, sums, counters);
}

// dw = A B, A stored as its transpose.
template <class Precision, int ROWS>
DEVICE void gemm_weight_gradient(const float* a, const float* b, float* dw, float* partial, unsigned* counters,
                                 index_t M, index_t N, index_t K, index_t depth) {
  Result<Precision, false, false, ROWS> c(M, N);
  if (c.multiply(a, b, K, depth, partial, counters)) c.store_pairs(dw, c.paired(dw));
}

#endif
