// A factor of a matrix product on tensor cores: tiles of it in shared memory, and what a lane takes from there in one of
// the two precisions. gemm.cuh has the product, and says why the tiles are what they are.
//
// "Outer" is the row of A and the column of B. K_RUNS: k is the index that runs along the lines of the array in memory.
// A fragment is what a warp needs of 16 outer indices by the K of one mma, and of them lane 4 g + t
//   outer  g + 8 o, as the mma has them, or, of A where the outer index runs along the lines, 2 g + o
//   k      as the mma has them (mma.cuh), h being its later half
// so that it reads 8 bytes at once, or the warp four matrices by one instruction, where memory allows. Lines in shared
// memory are longer than the tile by 4 or 8 numbers: the one of the two with which lanes read from different banks.
#pragma once
#include "mma.cuh"

#if TENSOR_CORES

constexpr int GEMM_THREADS = 256;  // the same number as in kernels/launches.py

// Registers in the order of the mma: of an A one matrix of 16 rows, of a B two of 8 columns, one after the other.
template <bool IS_A> struct Fragment {
  unsigned r[4];
  DEVICE static int place(int o, int h) { return IS_A ? o + 2 * h : 2 * o + h; }
};

template <class Precision, bool IS_A, bool K_RUNS_, int OUTER, int DEPTH> struct Operand {
  static constexpr bool K_RUNS = K_RUNS_, PAIRS = IS_A && !K_RUNS;
  static constexpr int LINES = K_RUNS ? OUTER : DEPTH, LENGTH = K_RUNS ? DEPTH : OUTER;
  static constexpr int PITCH = LENGTH + Precision::template padding<K_RUNS>(), FLOATS = LINES * PITCH;
  typedef ::Fragment<IS_A> Fragment;
  const float* from;   // this thread's first element of the next tile
  index_t length;      // of the array's lines
  int line, place;     // that element in the tile
  int outer;           // outer indices of the tile that the array has
  bool vector;         // 16 bytes at once

  DEVICE Operand(const float* array, index_t outers, index_t K, index_t first_outer, index_t first_k)
      : length(K_RUNS ? K : outers), vector(length % 4 == 0 && aligned16(array)) {
    line = threadIdx.x / (vector ? LENGTH / 4 : LENGTH);
    place = vector ? threadIdx.x % (LENGTH / 4) * 4 : threadIdx.x % LENGTH;
    outer = (int)(outers - first_outer < OUTER ? outers - first_outer : OUTER);
    from = array + ((K_RUNS ? first_outer : first_k) + line) * length + (K_RUNS ? first_k : first_outer) + place;
  }

  // Starts the copy of the next tile, of which the array has `depth` numbers along k; zeros beyond the array's ends,
  // because each of them adds 0 to every sum.
  DEVICE void fetch(float* tile, int depth) {
    if (vector && depth >= DEPTH) copy<4>(tile, DEPTH);  // the rule: what is compared with a constant costs nothing
    else if (vector) copy<4>(tile, depth);
    else copy<1>(tile, depth);
    from += K_RUNS ? DEPTH : DEPTH * length;
  }
  template <int W> DEVICE void copy(float* tile, int depth) const {
    constexpr int DOWN = GEMM_THREADS * W / LENGTH, PASSES = LINES / DOWN;  // lines that the block copies at once
    const int lines = K_RUNS ? outer : depth;
    const bool inside = place < (K_RUNS ? depth : outer);
    const float* source = from;
    float* to = tile + line * PITCH + place;
    const auto pass = [&](int q) {
      cp_async<4 * W>(to, source, inside && line + q * DOWN < lines);
      source += DOWN * length;
      to += DOWN * PITCH;
    };
    if constexpr (PASSES <= 4) {
      UNROLL for (int q = 0; q < PASSES; ++q) pass(q);
    } else {  // unrolled, the addresses of all passes would take registers
      ROLLED for (int q = 0; q < PASSES; ++q) pass(q);
    }
  }

  DEVICE static int outer_of(int o) { return PAIRS ? 2 * (threadIdx.x % 32 / 4) + o : threadIdx.x % 32 / 4 + 8 * o; }
  DEVICE static const float* at(const float* tile, int outer, int k) {
    return tile + (K_RUNS ? outer * PITCH + k : k * PITCH + outer);
  }
};

DEVICE float2 two(const float* p) { return *reinterpret_cast<const float2*>(p); }

struct Tf32 {
  static constexpr int K = 8;
  template <bool K_RUNS> static constexpr int padding() { return K_RUNS ? 4 : 8; }

  template <class T> DEVICE static typename T::Fragment read(const float* tile, int outer, int k) {
    typename T::Fragment f;
    const int lane = threadIdx.x % 32, t = lane % 4;
    if constexpr (T::K_RUNS) {  // the place of (o, h) is the matrix that holds it
      const int o = f.place(0, 1) == 2 ? lane / 8 % 2 : lane / 16, h = f.place(0, 1) == 2 ? lane / 16 : lane / 8 % 2;
      ldmatrix_x4(f.r, T::at(tile, outer + lane % 8 + 8 * o, k + 4 * h));
    } else {
      UNROLL for (int h = 0; h < 2; ++h) {
        const float* const p = T::at(tile, outer + T::outer_of(0), k + t + 4 * h);
        const float2 x = T::PAIRS ? two(p) : make_float2(p[0], p[8]);
        f.r[f.place(0, h)] = __float_as_uint(x.x);
        f.r[f.place(1, h)] = __float_as_uint(x.y);
      }
    }
    UNROLL for (int i = 0; i < 4; ++i) f.r[i] = cvt_rna_tf32(__uint_as_float(f.r[i]));
    return f;
  }
  DEVICE static void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_m16n8k8_tf32(c, a, b0, b1);
  }
};

struct Bf16 {
  static constexpr int K = 16;
  template <bool K_RUNS> static constexpr int padding() { return K_RUNS ? 8 : 4; }

  template <class T> DEVICE static typename T::Fragment read(const float* tile, int outer, int k) {
    typename T::Fragment f;
    const int t = threadIdx.x % 4;
    UNROLL for (int h = 0; h < 2; ++h) {
      const int first = k + 2 * t + 8 * h;
      if constexpr (T::PAIRS) {
        const float2 x = two(T::at(tile, outer + T::outer_of(0), first));
        const float2 y = two(T::at(tile, outer + T::outer_of(0), first + 1));
        f.r[f.place(0, h)] = cvt_rn_bf16x2(x.x, y.x);
        f.r[f.place(1, h)] = cvt_rn_bf16x2(x.y, y.y);
      } else {
        UNROLL for (int o = 0; o < 2; ++o) {
          const float* const p = T::at(tile, outer + T::outer_of(o), first);
          const float2 x = T::K_RUNS ? two(p) : make_float2(p[0], p[T::PITCH]);
          f.r[f.place(o, h)] = cvt_rn_bf16x2(x.x, x.y);
        }
      }
    }
    return f;
  }
  DEVICE static void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_m16n8k16_bf16(c, a, b0, b1);
  }
};

#endif
