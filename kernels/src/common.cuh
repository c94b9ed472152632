// The vocabulary every kernel is written in: groups, packs and index loops.
//
// One source, two compilers. Under NVRTC or nvcc a group is a warp of 32 lanes and a loop is
// grid-strided with 16-byte accesses. Under g++ or clang (host/vocabulary.h) a group is one lane
// and a loop is a plain contiguous one that the compiler vectorises. Formulas see only these names.
#pragma once

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define INDEPENDENT
#else
#define DEVICE inline __attribute__((always_inline))
#define UNROLL
#define ROLLED
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(enable) interleave(enable)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
#endif

typedef long long index_t;

template <int W> struct Width { static constexpr int value = W; };

// W consecutive floats: one 16-byte access for W = 4.
template <int W> struct Pack {
  float v[W];
  DEVICE float& operator[](int k) { return v[k]; }
  DEVICE float operator[](int k) const { return v[k]; }
};

#ifndef __CUDACC__
#include "host/vocabulary.h"
#else

template <int W> DEVICE Pack<W> load(const float* p) {
  Pack<W> r;
  if constexpr (W == 4) {
    const float4 q = *reinterpret_cast<const float4*>(p);
    r.v[0] = q.x; r.v[1] = q.y; r.v[2] = q.z; r.v[3] = q.w;
  } else {
    UNROLL for (int k = 0; k < W; ++k) r.v[k] = p[k];
  }
  return r;
}

// What other blocks of the launch have written: past the multiprocessor's own cache, which may hold what was there before.
template <int W> DEVICE Pack<W> load_past_l1(const float* p) {
  if constexpr (W == 4) {
    const float4 q = __ldcg(reinterpret_cast<const float4*>(p));
    return {{q.x, q.y, q.z, q.w}};
  } else {
    Pack<W> r;
    UNROLL for (int k = 0; k < W; ++k) r.v[k] = __ldcg(p + k);
    return r;
  }
}

template <int W> DEVICE void store(float* p, const Pack<W>& x) {
  if constexpr (W == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
  } else {  // in braces: to NVRTC 12.1 a pragma after `else` does not precede a statement
    UNROLL for (int k = 0; k < W; ++k) p[k] = x.v[k];
  }
}

DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }
DEVICE unsigned float_bits(float x) { return (unsigned)__float_as_int(x); }
DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }  // never a part of a fused multiply-add
DEVICE void add_one(unsigned long long* count) { atomicAdd(count, 1ull); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // rounded once
DEVICE float exponential(float x) { return expf(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE float inverse_root(float x) { return rsqrtf(x); }
// x, from which nothing is computed ahead of a loop and kept: ten round keys of Philox, say, in twenty registers.
DEVICE unsigned not_hoisted(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}
DEVICE float error_function(float x) { return erff(x); }

template <class... P> DEVICE bool aligned16(const P*... p) {
  return ((reinterpret_cast<unsigned long long>(p) | ...) & 15) == 0;
}

// The warp that works on one row of C columns: lane l has the columns l, l + 32, ..., and f(k, j) gets the
// k-th of them, j. With ITEMS > 0 (C <= 32 ITEMS) the loops unroll, so that k can index registers.
// Reductions are butterflies: every lane gets the result, always added in the same order.
struct Group {
  DEVICE static int lane() { return threadIdx.x & 31; }
  template <int ITEMS, class F> DEVICE static void for_each(int C, F f) {
    if constexpr (ITEMS > 0) {
      UNROLL for (int k = 0; k < ITEMS; ++k) if (lane() + 32 * k < C) f(k, lane() + 32 * k);
    } else {
      for (int j = lane(); j < C; j += 32) f(0, j);
    }
  }
  template <int ITEMS, class F> DEVICE static float sum(int C, F f) {
    float x = 0.0f;
    for_each<ITEMS>(C, [&](int k, int j) { x += f(k, j); });
    UNROLL for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
  }
  template <int ITEMS, class F> DEVICE static float max(int C, F f) {  // NaN is passed over
    float x = -infinity();
    for_each<ITEMS>(C, [&](int k, int j) { x = fmaxf(x, f(k, j)); });
    UNROLL for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
  }
  template <int ITEMS, class F> DEVICE static bool any(int C, F f) {
    bool x = false;
    for_each<ITEMS>(C, [&](int k, int j) { x |= f(k, j); });
    return __any_sync(0xffffffffu, x);
  }
  template <int ITEMS, class F> DEVICE static float at(int C, int j, F f) {  // of column j, for every lane
    if constexpr (ITEMS == 0) {
      return f(0, j);
    } else {  // no second load, behind that of j
      float mine = 0.0f;
      for_each<ITEMS>(C, [&](int k, int i) { mine = i == j ? f(k, i) : mine; });
      return __shfl_sync(0xffffffffu, mine, j & 31);
    }
  }
  template <int ITEMS, class F> DEVICE static int first(int C, F f) {  // the first column of which f is true, or C
    int x = C;
    for_each<ITEMS>(C, [&](int k, int j) { x = j < x && f(k, j) ? j : x; });
    UNROLL for (int d = 16; d > 0; d >>= 1) {
      const int other = __shfl_xor_sync(0xffffffffu, x, d);
      x = other < x ? other : x;
    }
    return x;
  }
  // What any lane reads before comes before what any lane writes after; a shuffle or a vote promises less.
  DEVICE static void sync() { __syncwarp(); }
};

// a / b and a % b for a >= 0, b > 0: in 32 bits where both numbers fit, which is the rule. In 64 bits a division is a
// subroutine that takes longer than a load from memory.
DEVICE index_t quotient(index_t a, index_t b) { return (a | b) >> 32 ? a / b : (unsigned)a / (unsigned)b; }
DEVICE index_t remainder_of(index_t a, index_t b) { return (a | b) >> 32 ? a % b : (unsigned)a % (unsigned)b; }

// The elements [0, n) of flat arrays that belong to this thread: f(Width<W>, i), W elements from i on.
// `vector` says that every array starts on 16 bytes. The loops stay rolled: outputs may be inputs, so no load can
// move before the store of the iteration ahead of it, and unrolling would buy nothing for its registers.
struct Range {
  index_t n;
  // f(Width<W>, i, fetch(Width<W>, i), prepare()): the first loads are on their way while `prepare` computes.
  template <class Fetch, class Prepare, class F>
  DEVICE void for_each(bool vector, Fetch fetch, Prepare prepare, F f) const {
    const index_t thread = blockIdx.x * (index_t)blockDim.x + threadIdx.x;
    const index_t threads = gridDim.x * (index_t)blockDim.x;
    const index_t packed = vector ? n / 4 : 0;
    index_t q = thread;
    decltype(fetch(Width<4>{}, q)) fetched{};
    if (q < packed) fetched = fetch(Width<4>{}, 4 * q);
    const auto prepared = prepare();
    ROLLED while (q < packed) {
      f(Width<4>{}, 4 * q, fetched, prepared);
      q += threads;
      if (q < packed) fetched = fetch(Width<4>{}, 4 * q);
    }
    ROLLED for (index_t i = 4 * packed + thread; i < n; i += threads)
      f(Width<1>{}, i, fetch(Width<1>{}, i), prepared);
  }
  template <class F> DEVICE void for_each(bool vector, F f) const {
    const index_t thread = blockIdx.x * (index_t)blockDim.x + threadIdx.x;
    const index_t threads = gridDim.x * (index_t)blockDim.x;
    const index_t packed = vector ? n / 4 : 0;
    ROLLED for (index_t q = thread; q < packed; q += threads) f(Width<4>{}, 4 * q);
    ROLLED for (index_t i = 4 * packed + thread; i < n; i += threads) f(Width<1>{}, i);
  }
};

// The elements of a C-contiguous (rows, columns) array, flat, with the column of the first one:
// f(Width<W>, i, j, fetch(Width<W>, i)). A pack may wrap into the next row; wrap(j + k) is then its k-th column.
// Two packs are fetched before f stores the first; see Range. From 2^31 elements on there are no packs, because 64-bit
// indices of two would take more registers than there are.
struct Rows {
  index_t rows, columns;
  template <class I> DEVICE I wrap(I j) const { return j < (I)columns ? j : j - (I)columns; }
  template <class Fetch, class F> DEVICE void for_each(bool vector, Fetch fetch, F f) const {
    const index_t n = rows * columns;
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    const unsigned width = (unsigned)columns;
    const unsigned packed = vector && columns >= 4 && n >> 31 == 0 ? (unsigned)n / 4 : 0;
    ROLLED for (unsigned q = thread; q < packed; q += 2 * threads) {
      const unsigned i = 4 * q, next = i + 4 * threads;
      const bool two = q + threads < packed;
      const auto x = fetch(Width<4>{}, i), y = fetch(Width<4>{}, two ? next : i);
      f(Width<4>{}, i, i % width, x);
      if (two) f(Width<4>{}, next, next % width, y);
    }
    ROLLED for (index_t i = 4 * (index_t)packed + thread; i < n; i += threads)
      f(Width<1>{}, i, remainder_of(i, columns), fetch(Width<1>{}, i));
  }
};

#ifndef __SIMT__  // there, host/simt_ptx.h has it

// Adds to a counter, and returns what it was; acquires and releases for all threads of the GPU (PTX ISA: "atom"). Two
// __threadfence() around an atomicAdd() would be sequentially consistent, which nobody needs, and slower.
DEVICE unsigned atom_add_acq_rel(unsigned* counter, unsigned x) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(x) : "memory");
  return old;
}

#endif

// Cross-block reductions without float atomics: each block leaves its partial result in global
// memory, and the block that arrives last adds them all, always in the same order. The counter is
// zero before the launch and zero again after it. Pattern: CUDA sample threadFenceReduction, with the addition in the
// place of its fences: it releases what the block has written and acquires what the others have. It is that of the one
// thread that speaks for its block: the barriers order it with the other threads' accesses.
DEVICE bool is_last_block(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    last = atom_add_acq_rel(counter, 1u) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}

#endif  // __CUDACC__
