// Mistakes with the instructions of mma.cuh, and beside each the same kernel without: see test_gemm.py.
#include "../../kernels/src/mma.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(64)
#define PLANTED(name, parameters, arguments)               \
  KERNEL name##_wrong parameters { name<true> arguments; } \
  KERNEL name##_right parameters { name<false> arguments; }

// y = x reversed within the block; the wrong one lets the latest group of copies be under way when it reads.
template <bool wrong> __device__ void missing_wait(const float* x, float* y) {
  __shared__ float tile[64];
  cp_async<4>(tile + threadIdx.x, x + threadIdx.x, true);
  cp_async_commit_group();
  cp_async_wait_group<wrong ? 1 : 0>();
  __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
  cp_async_wait_group<0>();
}
PLANTED(missing_wait, (const float* x, float* y), (x, y))

// The same, but the wrong one does not end the group for which it waits.
template <bool wrong> __device__ void missing_commit(const float* x, float* y) {
  __shared__ float tile[64];
  cp_async<4>(tile + threadIdx.x, x + threadIdx.x, true);
  if (!wrong) cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
  cp_async_commit_group();
  cp_async_wait_group<0>();
}
PLANTED(missing_commit, (const float* x, float* y), (x, y))

// The wrong one starts a copy into a place that others still read.
template <bool wrong> __device__ void early_copy(const float* x, float* y) {
  __shared__ float tile[64];
  cp_async<4>(tile + threadIdx.x, x + threadIdx.x, true);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncthreads();
  if (wrong) cp_async<4>(tile + threadIdx.x, x, true);
  y[threadIdx.x] = tile[63 - threadIdx.x];
  __syncthreads();
  if (!wrong) cp_async<4>(tile + threadIdx.x, x, true);
  cp_async_commit_group();
  cp_async_wait_group<0>();
}
PLANTED(early_copy, (const float* x, float* y), (x, y))

// 16 bytes from an address that only 4 divides.
template <bool wrong> __device__ void misaligned_copy(const float* x, float* y) {
  alignas(16) __shared__ float tile[256];
  cp_async<16>(tile + 4 * threadIdx.x, x + (wrong ? 1 : 0), threadIdx.x == 0);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncthreads();
  y[threadIdx.x] = threadIdx.x < 4 ? tile[3 - threadIdx.x] : tile[threadIdx.x];
}
PLANTED(misaligned_copy, (const float* x, float* y), (x, y))

// A thread returns before its copy is made.
template <bool wrong> __device__ void never_waited(const float* x, float* y) {
  __shared__ float tile[64];
  cp_async<4>(tile + threadIdx.x, x + threadIdx.x, true);
  y[threadIdx.x] = x[63 - threadIdx.x];
  cp_async_commit_group();
  if (!wrong) cp_async_wait_group<0>();
}
PLANTED(never_waited, (const float* x, float* y), (x, y))

// Half of the second warp has returned when the other half multiplies.
template <bool wrong> __device__ void part_of_an_mma(const float* x, float* y) {
  y[threadIdx.x] = x[63 - threadIdx.x];
  if (wrong && threadIdx.x >= 48) return;
  float c[4] = {};
  const unsigned a[4] = {};
  mma_m16n8k8_tf32(c, a, 0u, 0u);
  y[threadIdx.x] += c[0];
}
PLANTED(part_of_an_mma, (const float* x, float* y), (x, y))
