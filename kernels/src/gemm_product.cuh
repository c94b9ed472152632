// C (M, N) = A (M, K) B (K, N) on tensor cores, up to what becomes of C: gemm.cuh.
//
// A block makes ROWS x 64 of C from tiles of A and B in shared memory, which come from the L2 cache: 4 (ROWS + 64) bytes
// for the 128 ROWS operations of each k, 16 operations per byte with 64 rows and 21 with 128. A warp adds 32 x 32 and
// reads 256 bytes of shared memory for 2048 operations, 8 per byte; 32 x 16 would be 5.3, and shared memory is what
// holds such a product up. 64 rows have four parts of 32 x 32, so two groups of 4 warps take half of the k each, and add
// their sums in the end.
//
// Launch: blocks of 8 warps. x: tiles, those of one row of tiles side by side, so that blocks that run at the same time
// share A. y: parts of K. The layers are small, 512 x 400 is 56 tiles of 64 x 64 with all of K before each of them: so
// tiles are large only where those fill the GPU, and where not even the small ones do, several blocks share a tile's K.
// Each leaves its sums in memory, and the last to arrive adds them, always in the same order.
//
// Shared memory holds as many tiles of A and B as fit 96 KiB, five or six: one at work, the others on their way by
// cp.async, and a barrier per tile. The factors stay float32 up to the registers, where they are rounded: an array in
// another precision would have to be written and read once more.
#pragma once
#include "gemm_operand.cuh"

#if TENSOR_CORES

constexpr int GEMM_COLUMNS = 64;  // the same number as in kernels/gemm.py
constexpr int SHARED_FLOATS = 24 * 1024;       // dynamic; 96 KiB, as in kernels/gemm.py

DEVICE float* dynamic_shared() {
#ifdef __SIMT__  // has none, and static memory of any size
  alignas(16) __shared__ float floats[SHARED_FLOATS];
  return floats;
#else
  extern __shared__ float4 packs[];
  return reinterpret_cast<float*>(packs);
#endif
}

// A block's ROWS x 64 of C, in registers. GROUPS of warps share its k; a warp adds 32 x 32, of which in the end it keeps
// BLOCKS of 16 rows.
template <class Precision, bool A_K_RUNS, bool B_K_RUNS, int ROWS> struct Product {
  static constexpr int GROUPS = 128 / ROWS, BLOCKS = 2 / GROUPS, WARPS = 8 / GROUPS;
  static constexpr int PART = 16, DEPTH = PART * GROUPS;  // of k: a group's part of a tile, and all of them
  static constexpr int PAIRS = 8 * BLOCKS;
  typedef Operand<Precision, true, A_K_RUNS, ROWS, DEPTH> A;
  typedef Operand<Precision, false, B_K_RUNS, GEMM_COLUMNS, DEPTH> B;
  static constexpr int STAGE = A::FLOATS + B::FLOATS, STAGES = SHARED_FLOATS / STAGE;
  static_assert(STAGES >= 2 && WARPS * 32 * 32 == ROWS * GEMM_COLUMNS, "");

  index_t M, N;
  unsigned column_tiles;
  index_t tile_row, tile_column;
  int group, warp_row, warp_column;  // within the tile
  Pack<2> y[PAIRS];

  DEVICE Product(index_t M, index_t N)
      : M(M), N(N), column_tiles((unsigned)((N + GEMM_COLUMNS - 1) / GEMM_COLUMNS)),
        tile_row(blockIdx.x / column_tiles * (index_t)ROWS),
        tile_column(blockIdx.x % column_tiles * (index_t)GEMM_COLUMNS), group(threadIdx.x / 32 / WARPS),
        warp_row(threadIdx.x / 32 % WARPS / 2 * 32), warp_column(threadIdx.x / 32 % 2 * 32) {}

  // Of pair p: two neighbouring columns, in p = (block of 16 rows * 2 + row o of the lane's) * 4 + block of 8 columns.
  DEVICE index_t row(int p) const { return tile_row + warp_row + 16 * (group + p / 8) + A::outer_of(p / 4 % 2); }
  DEVICE int column_in_tile(int p) const { return warp_column + 8 * (p % 4) + 2 * (threadIdx.x % 4); }
  DEVICE index_t column(int p) const { return tile_column + column_in_tile(p); }

  // y = A B over this block's part of K, `depth` of it, a multiple of 32. Returns whether it is complete: where blocks
  // share a tile, to the one that has added all parts. partial: a tile for each block, counters: a zero for each tile,
  // where gridDim.y > 1.
  DEVICE bool multiply(const float* a_array, const float* b_array, index_t K, index_t depth, float* partial,
                       unsigned* counters) {
    const index_t first = blockIdx.y * depth, rest = K - first < depth ? K - first : depth;
    A a(a_array, M, K, tile_row, first);
    B b(b_array, N, K, tile_column, first);
    float* const stages = dynamic_shared();
    const int count = (int)((rest + DEPTH - 1) / DEPTH);
    const auto fetch = [&](int slot, int t) {
      const index_t left = rest - t * (index_t)DEPTH;
      a.fetch(stages + slot * STAGE, left < DEPTH ? (int)left : DEPTH);
      b.fetch(stages + slot * STAGE + A::FLOATS, left < DEPTH ? (int)left : DEPTH);
    };
    ROLLED for (int t = 0; t < STAGES - 1; ++t) {
      if (t < count) fetch(t, t);
      cp_async_commit_group();  // a group for each tile, also where there is none, so that they can be counted
    }
    float c[2][4][4] = {};
    int slot = 0;
    ROLLED for (int t = 0; t < count; ++t) {
      cp_async_wait_group<STAGES - 2>();
      __syncthreads();  // tile t is there for all, and nobody needs tile t - 1, whose place the next one takes
      add_tile(c, stages + slot * STAGE, [&] {
        if (t + STAGES - 1 < count) fetch(slot == 0 ? STAGES - 1 : slot - 1, t + STAGES - 1);
        cp_async_commit_group();
      });
      slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
    add_groups(c);
    return GROUPS == 1 || gridDim.y == 1 || add_parts(partial, counters);  // large tiles never share K
  }

  // meanwhile() is what there is to do while the first fragments are on their way from shared memory.
  template <class F> DEVICE void add_tile(float (&c)[2][4][4], const float* stage, F meanwhile) const {
    constexpr int STEPS = PART / Precision::K;
    typename A::Fragment a[2][2];  // of this step and the next
    typename B::Fragment b[2][2];
    const auto read = [&](int step) {
      UNROLL for (int i = 0; i < 2; ++i) {
        const int k = PART * group + Precision::K * step;
        a[step % 2][i] = Precision::template read<A>(stage, warp_row + 16 * i, k);
        b[step % 2][i] = Precision::template read<B>(stage + A::FLOATS, warp_column + 16 * i, k);
      }
    };
    read(0);
    meanwhile();
    UNROLL for (int s = 0; s < STEPS; ++s) {
      if (s + 1 < STEPS) read(s + 1);
      UNROLL for (int i = 0; i < 2; ++i) {
        UNROLL for (int n = 0; n < 4; ++n)
          Precision::mma(c[i][n], a[s % 2][i].r, b[s % 2][n / 2].r[n % 2 * 2], b[s % 2][n / 2].r[n % 2 * 2 + 1]);
      }
    }
  }

  // y = the sum of the groups' c: each gives the other the rows that it does not keep.
  DEVICE void add_groups(const float (&c)[2][4][4]) {
    UNROLL for (int p = 0; p < PAIRS; ++p) {
      const int i = p / 8, o = p / 4 % 2, n = p % 4;
      UNROLL for (int k = 0; k < 2; ++k) y[p][k] = GROUPS == 2 && group ? c[1][n][2 * o + k] : c[i][n][2 * o + k];
    }
    if constexpr (GROUPS == 2) {
      float* const given = dynamic_shared();
      __syncthreads();  // nobody reads the last tiles any more
      UNROLL for (int n = 0; n < 4; ++n) {
        UNROLL for (int k = 0; k < 4; ++k)
          given[(4 * n + k) * GEMM_THREADS + threadIdx.x] = group ? c[0][n][k] : c[1][n][k];
      }
      __syncthreads();
      UNROLL for (int p = 0; p < PAIRS; ++p) {
        UNROLL for (int k = 0; k < 2; ++k)
          y[p][k] += given[(4 * (p % 4) + 2 * (p / 4) + k) * GEMM_THREADS + (threadIdx.x ^ 128)];
      }
    }
  }

  // Partial tiles lie as the threads have them, so that all accesses are whole lines.
  DEVICE bool add_parts(float* partial, unsigned* counters) {
    constexpr int TILE = ROWS * GEMM_COLUMNS;
    float* const parts = partial + blockIdx.x * (index_t)gridDim.y * TILE + 4 * threadIdx.x;
    UNROLL for (int p = 0; p < PAIRS; p += 2)
      store(parts + blockIdx.y * (index_t)TILE + p * 2 * GEMM_THREADS,
            Pack<4>{{y[p][0], y[p][1], y[p + 1][0], y[p + 1][1]}});
    if (!is_last_block(counters + blockIdx.x, gridDim.y)) return false;
    UNROLL for (int p = 0; p < PAIRS; ++p) y[p] = {{0.0f, 0.0f}};
    ROLLED for (unsigned part = 0; part < gridDim.y; ++part) {
      UNROLL for (int p = 0; p < PAIRS; p += 2) {
        const Pack<4> x = load_past_l1<4>(parts + part * (index_t)TILE + p * 2 * GEMM_THREADS);
        y[p] = {{y[p][0] + x[0], y[p][1] + x[1]}};
        y[p + 1] = {{y[p + 1][0] + x[2], y[p + 1][1] + x[3]}};
      }
    }
    return true;
  }
};

#endif
