// CUDA for an ordinary C++ compiler: runs __global__ functions on the host, one OS thread per CUDA thread.
//
// For finding mistakes, not for speed. simt.cpp runs one thread of a block at a time and switches where CUDA
// threads meet, so a run is reproducible, and a missing barrier gives wrong results even without a sanitizer.
// ThreadSanitizer is told of the orderings that CUDA promises and of no others: it reports a race although
// the threads never run at the same time.
//
// What it models
//   1-, 2- and 3-D grids and blocks; __shared__ arrays of fixed size; __syncthreads; __syncwarp, shuffles and
//   votes with masks; atomics; __threadfence; vector types with CUDA's alignment. Blocks run one after another
//   in an order that the seed picks, and so do the threads between two meetings.
//   It stops with one sentence where threads wait at different barriers or for threads that have returned, where
//   a lane is missing from its mask, and where it reads a lane that is not taking part.
//   Shared memory holds a pattern, not zero, when a block starts.
//   The instructions of mma.cuh: see simt_ptx.h.
// What it does not model
//   The memory model between blocks: each block sees all writes of the blocks that ran before it. Threads that
//   wait for others by polling memory (they would wait forever), and warps that run in lockstep without
//   __syncwarp. -ftz=true, fused multiply-add and CUDA's own elementary functions: last digits differ from a
//   GPU's. Dynamic shared memory, cooperative groups, textures, streams, device printf.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __CUDACC__  // from here on this is a CUDA compiler, as far as the kernels can tell
#define __SIMT__    // but not one that knows PTX
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time, so one copy is enough

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace simt {

extern thread_local dim3 thread_index, block_index, block_size, grid_size;

struct Words { std::uint64_t of[3]; };

// What the lanes of a warp said at a meeting, and which of them were there.
struct Exchange {
  unsigned lanes;
  Words values[32];
};

// Each lane of `mask` says `words` and gets what all of them said; this orders no memory accesses. `line` is the
// caller's, for messages.
const Exchange& exchange(const char* intrinsic, unsigned mask, const Words& words, int line);
void sync_threads(int line);
void sync_warp(unsigned mask, int line);
void fence();
unsigned lane();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <class T> std::uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <class T> T from_bits(std::uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// `source(lane, first and last lane of its segment)` is the lane that is read, or -1 for the caller's own value.
template <class T, class F> T shuffle(const char* intrinsic, unsigned mask, T x, int width, int line, F source) {
  const int me = (int)lane(), first = me & -width, from = source(me, first, first + width - 1);
  const Exchange& said = exchange(intrinsic, mask, {{to_bits(x)}}, line);
  if (from < 0) return x;
  if (!(said.lanes >> from & 1))
    fail("%s (line %d): lane %d reads lane %d, which does not take part", intrinsic, line, me, from);
  return from_bits<T>(said.values[from].of[0]);
}

inline unsigned ballot(const char* intrinsic, unsigned mask, bool predicate, int line, unsigned* lanes) {
  const Exchange& said = exchange(intrinsic, mask, {{predicate}}, line);
  unsigned votes = 0;
  for (int k = 0; k < 32; ++k) votes |= (said.lanes >> k & 1 && said.values[k].of[0] ? 1u : 0u) << k;
  if (lanes) *lanes = said.lanes;
  return votes;
}

// Relaxed, as in CUDA. f gets the old value and gives the new one.
template <class T, class F> T atomic_update(T* p, F f) {
  T old, desired;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do desired = f(old);
  while (!__atomic_compare_exchange(p, &old, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size
constexpr int warpSize = 32;

namespace {  // ahead of what newer C libraries call the same, and the kernels are in here with them

#define LINE int line = __builtin_LINE()
inline void __syncthreads(LINE) { simt::sync_threads(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, LINE) { simt::sync_warp(mask, line); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }

template <class T> T __shfl_sync(unsigned mask, T x, int source, int width = 32, LINE) {
  const int k = source & (width - 1);
  return simt::shuffle("__shfl_sync", mask, x, width, line, [=](int, int first, int) { return first + k; });
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, LINE) {  // earlier segments, too
  const auto source = [=](int me, int, int last) { return (me ^ bits) <= last ? me ^ bits : -1; };
  return simt::shuffle("__shfl_xor_sync", mask, x, width, line, source);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, LINE) {
  const auto source = [=](int me, int first, int) { return me - (int)delta >= first ? me - (int)delta : -1; };
  return simt::shuffle("__shfl_up_sync", mask, x, width, line, source);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, LINE) {
  const auto source = [=](int me, int, int last) { return me + (int)delta <= last ? me + (int)delta : -1; };
  return simt::shuffle("__shfl_down_sync", mask, x, width, line, source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, LINE) {
  return simt::ballot("__ballot_sync", mask, predicate, line, nullptr);
}
inline int __any_sync(unsigned mask, int predicate, LINE) {
  return simt::ballot("__any_sync", mask, predicate, line, nullptr) != 0;
}
inline int __all_sync(unsigned mask, int predicate, LINE) {
  unsigned lanes;
  return simt::ballot("__all_sync", mask, predicate, line, &lanes) == lanes;
}
#undef LINE

#define ATOMIC(name, result)                                           \
  template <class T, class U> T name(T* p, U x) {                      \
    const T value = (T)x;                                              \
    return simt::atomic_update(p, [=](T old) -> T { return result; }); \
  }
ATOMIC(atomicAdd, old + value)
ATOMIC(atomicMax, old < value ? value : old)
ATOMIC(atomicMin, value < old ? value : old)
ATOMIC(atomicExch, (void(old), value))
#undef ATOMIC
template <class T, class U, class V> T atomicCAS(T* p, U expected, V x) {
  return simt::atomic_update(p, [=](T old) { return old == (T)expected ? (T)x : old; });
}

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T x) { *p = x; }
inline float __int_as_float(int x) { return simt::from_bits<float>((std::uint32_t)x); }
inline int __float_as_int(float x) { return simt::from_bits<int>(simt::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return simt::from_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return simt::from_bits<unsigned>(simt::to_bits(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float cospif(float x) { return (float)std::cos(3.14159265358979323846 * x); }
inline float sinpif(float x) { return (float)std::sin(3.14159265358979323846 * x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

}  // namespace

#include "simt_ptx.h"
