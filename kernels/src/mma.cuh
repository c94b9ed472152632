// Instructions for tensor cores and asynchronous copies that CUDA C++ has no function for, each as a function with the
// name of the PTX instruction (PTX ISA: "cp.async", "cvt", "ldmatrix", "Matrix multiply-accumulate operation using mma").
// Compute capability 8.0 or newer. On a CPU, host/simt_ptx.h has the same functions.
//
// In a warp, lane l = 4 g + t holds of the matrices of an mma, with registers counted from 0 (g < 8, t < 4):
//   m16n8k8   a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)      b: (t, g) (t + 4, g)
//   m16n8k16  a: (g, p) (g + 8, p) (g, p + 8) (g + 8, p + 8)      b: (p, g) (p + 8, g), for p = 2 t and 2 t + 1,
//             the lower p in the lower half of the register
//   both      c: (g, 2 t) (g, 2 t + 1) (g + 8, 2 t) (g + 8, 2 t + 1)
// as (row, column); a has 16 rows, b 8 columns.
#pragma once
#include "common.cuh"

#if defined __SIMT__ || __CUDA_ARCH__ >= 800
#define TENSOR_CORES 1
#else
#define TENSOR_CORES 0  // 7.5 has some, for half precision alone
#endif

#ifndef __SIMT__

// Starts a copy of BYTES (4, or 16 with both addresses on 16 bytes) into shared memory; zeros where `inside` is false,
// and `from` is not read then. Until a wait for it, and for other threads a barrier after that, `to` holds anything.
template <int BYTES> DEVICE void cp_async(float* to, const float* from, bool inside) {
  static_assert(BYTES == 4 || BYTES == 16, "");
  const unsigned address = (unsigned)__cvta_generic_to_shared(to);
  const int bytes = inside ? BYTES : 0;
  if constexpr (BYTES == 16) {  // past L1: each byte is read once by a block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  }
}

// Ends this thread's group of copies.
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the PENDING latest of this thread's groups are under way.
template <int PENDING> DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The nearest TF32 number (8 bits of exponent, 10 of fraction), ties away from zero.
DEVICE unsigned cvt_rna_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// The nearest bfloat16 numbers (8 bits of exponent, 7 of fraction), ties to even.
DEVICE unsigned cvt_rn_bf16x2(float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Four 8 x 4 matrices of 32-bit numbers from shared memory, whose rows, 16 bytes each, start where the lanes say: those of
// matrix m where lanes 8 m to 8 m + 7 do. Lane (g, t) gets the number (g, t) of each.
DEVICE void ldmatrix_x4(unsigned (&r)[4], const float* row) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

#define MMA(name, instruction)                                                                                  \
  DEVICE void name(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {                           \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                               \
  }
// c += a b of a whole warp, a and b as cvt_rna_tf32 and cvt_rn_bf16x2 make them, sums in float32.
MMA(mma_m16n8k8_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
MMA(mma_m16n8k16_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
#undef MMA

#endif
