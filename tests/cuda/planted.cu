// Kernels with planted mistakes, and beside each the same kernel without: what the detectors must find, and what
// they must not report. test_planted_bugs.py runs them. Nothing here is used for anything else.

#define KERNEL extern "C" __global__ void __launch_bounds__(64)
#define PLANTED(name, parameters, arguments)               \
  KERNEL name##_wrong parameters { name<true> arguments; } \
  KERNEL name##_right parameters { name<false> arguments; }

// y = x reversed within the block, through shared memory.
template <bool wrong> __device__ void missing_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!wrong) __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}
PLANTED(missing_barrier, (const float* x, float* y), (x, y))

// The second round writes the tile while slower threads still read the first.
template <bool wrong> __device__ void missing_second_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  for (int round = 0; round < 2; ++round) {
    if (!wrong) __syncthreads();
    tile[threadIdx.x] = x[threadIdx.x] + round;
    __syncthreads();
    y[64 * round + threadIdx.x] = tile[63 - threadIdx.x];
  }
}
PLANTED(missing_second_barrier, (const float* x, float* y), (x, y))

// In place: a shuffle orders no memory accesses, so the reads of x need a __syncwarp before the writes.
template <bool wrong> __device__ void missing_warp_sync(float* x) {
  const int lane = threadIdx.x % 32;
  const float neighbour = x[lane == 31 ? 0 : lane + 1];
  const float total = neighbour + __shfl_xor_sync(0xffffffffu, neighbour, 1);
  if (!wrong) __syncwarp();
  x[lane] = total;
}
PLANTED(missing_warp_sync, (float* x), (x))

// Every thread of the block adds to one counter.
template <bool wrong> __device__ void plain_add(int* count) {
  if (wrong) *count += 1;
  else atomicAdd(count, 1);
}
PLANTED(plain_add, (int* count), (count))

// y = 2 x; the wrong one also writes y[n].
template <bool wrong> __device__ void off_by_one(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (wrong ? i <= n : i < n) y[i] = i < n ? 2.0f * x[i] : 0.0f;
}
PLANTED(off_by_one, (const float* x, float* y, int n), (x, y, n))

// y = x; the wrong one reads x[-1] and drops it.
template <bool wrong> __device__ void reads_before(const float* x, float* y) {
  const int i = threadIdx.x;
  const float before = wrong || i > 0 ? x[i - 1] : 0.0f;
  y[i] = before > 1e30f ? before : x[i];
}
PLANTED(reads_before, (const float* x, float* y), (x, y))

// The last thread reads past the end of a shared array.
template <bool wrong> __device__ void past_shared(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[wrong ? threadIdx.x + 1 : threadIdx.x];
}
PLANTED(past_shared, (const float* x, float* y), (x, y))

// y = x in packs of 4; the wrong one trusts that x starts on 16 bytes.
template <bool wrong> __device__ void misaligned(const float* x, float* y) {
  const int i = 4 * threadIdx.x;
  if (wrong) *reinterpret_cast<float4*>(y + i) = *reinterpret_cast<const float4*>(x + i);
  else for (int k = 0; k < 4; ++k) y[i + k] = x[i + k];
}
PLANTED(misaligned, (const float* x, float* y), (x, y))

// The sum of a row of 64, of which the wrong one forgets to write the last into shared memory.
template <bool wrong> __device__ void uninitialised_shared(const float* x, float* y) {
  __shared__ float tile[64];
  if (!wrong || threadIdx.x < 63) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = 0.0f;
  for (int k = 0; k < 64; ++k) sum = fmaxf(sum, tile[k]);  // passes a NaN over
  y[threadIdx.x] = sum;
}
PLANTED(uninitialised_shared, (const float* x, float* y), (x, y))

// Running maxima that start from what the output held before.
template <bool wrong> __device__ void uninitialised_output(const float* x, float* y) {
  y[threadIdx.x] = fmaxf(wrong ? y[threadIdx.x] : 0.0f, x[threadIdx.x]);
}
PLANTED(uninitialised_output, (const float* x, float* y), (x, y))

// Half of the block leaves before the barrier.
template <bool wrong> __device__ void left_before_barrier(float* x) {
  if (wrong && threadIdx.x >= 32) return;
  __syncthreads();
  x[threadIdx.x] = 1.0f;
}
PLANTED(left_before_barrier, (float* x), (x))

// The two halves of the block meet at different barriers.
template <bool wrong> __device__ void divergent_barriers(float* x) {
  if (wrong && threadIdx.x >= 32) {
    x[threadIdx.x] = 1.0f;
    __syncthreads();
  } else {
    __syncthreads();
    x[threadIdx.x] = 1.0f;
  }
}
PLANTED(divergent_barriers, (float* x), (x))

// A quarter of the block goes past the first barrier, among them half of a warp.
template <bool wrong> __device__ void part_of_a_warp(float* x) {
  if (!wrong || threadIdx.x < 48) {
    x[threadIdx.x] = 1.0f;
    __syncthreads();
  }
  __syncthreads();
  x[threadIdx.x] = 2.0f;
}
PLANTED(part_of_a_warp, (float* x), (x))

// Half of the warp is gone when the other half shuffles with the whole warp.
template <bool wrong> __device__ void wrong_mask(float* x) {
  const int lane = threadIdx.x % 32;
  if (lane >= 16) return;
  x[lane] = __shfl_xor_sync(wrong ? 0xffffffffu : 0xffffu, x[lane], wrong ? 16 : 8);
}
PLANTED(wrong_mask, (float* x), (x))

// The upper half of the warp votes with the lower half's mask.
template <bool wrong> __device__ void not_in_mask(int* x) {
  const int lane = threadIdx.x % 32;
  x[lane] = __any_sync(wrong || lane < 16 ? 0xffffu : 0xffff0000u, lane == 20);
}
PLANTED(not_in_mask, (int* x), (x))

// The total of all blocks' results, taken by block 0, or by the block that arrives last.
template <bool wrong> __device__ void assumes_block_order(const float* x, float* partial, unsigned* counter, float* y) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    __threadfence();
    const bool is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
    last = wrong ? blockIdx.x == gridDim.x - 1 : is_last;
  }
  __syncthreads();
  if (!last || threadIdx.x > 0) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
  *y = sum;
}
PLANTED(assumes_block_order, (const float* x, float* partial, unsigned* counter, float* y), (x, partial, counter, y))

// Waits for a thread that never comes.
template <bool wrong> __device__ void endless(int* flag) {
  if (threadIdx.x == 0) while (wrong && atomicAdd(flag, 0) == 0) {}
  atomicExch(flag, 1);
}
PLANTED(endless, (int* flag), (flag))

// An index that overflows 32 bits on its way to a 64-bit one.
template <bool wrong> __device__ void overflow(float* x, int rows) {
  const long long offset = wrong ? rows * 65536 : rows * 65536LL;
  if (offset >= 0) x[threadIdx.x] = (float)offset;
}
PLANTED(overflow, (float* x, int rows), (x, rows))

// Every built-in that the other kernels here do not use: 11 rows of 32 results for each warp.
KERNEL vocabulary(int* y) {
  const int lane = threadIdx.x % 32;
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  int* out = y + 32 * (threadIdx.x / 32) * 11 + lane;
  out[0] = __shfl_sync(half, lane, 3, 16);
  out[32] = __shfl_up_sync(0xffffffffu, lane, 2u);
  out[64] = __shfl_down_sync(0xffffffffu, lane, 2u);
  out[96] = __shfl_xor_sync(0xffffffffu, lane, 5);
  out[128] = (int)__ballot_sync(half, lane % 3 == 0);
  out[160] = __all_sync(half, lane < 16);
  out[192] = __any_sync(half, lane == 17);
  out[224] = blockDim.x * gridDim.y + blockIdx.y;
  out[256] = (int)(__shfl_xor_sync(0xffffffffu, 1e10 + lane, 1) - 1e10);
  __syncwarp(half);
  out[288] = __float_as_int(__int_as_float(lane));
  out[320] = __shfl_xor_sync(0xffffffffu, lane, 16, 16);
}

// Atomics, on one word each from every thread.
KERNEL atomics(int* sum, unsigned* largest, int* smallest, float* total, unsigned* winner) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(sum, i);
  atomicMax(largest, (unsigned)i);
  atomicMin(smallest, -i);
  atomicAdd(total, 0.5f);
  atomicCAS(winner, 0u, (unsigned)i + 1u);
}
