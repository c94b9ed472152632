// The instructions of mma.cuh and common.cuh for simt.h, written from the PTX ISA and not from the kernels that use them.
//
// What it models
//   cp.async: from its start until the wait that covers it, `to` holds NaN, as it holds anything on a GPU; the copy is
//   made at the wait. So a missing wait, or a place that is still read when the next copy into it starts, gives wrong
//   results, and ThreadSanitizer sees a write at both times. It stops at an address that the size does not divide, and
//   where a thread returns while copies are under way.
//   ldmatrix and mma: the lanes' registers and addresses are exchanged in a meeting of the whole warp. mma ignores what
//   TF32 has no bits for, as tensor cores do, and adds the exact products one after the other in float32.
// What it does not model
//   When a copy happens between the two times, and the order and the rounding in which tensor cores add.
#pragma once
#include <cstdint>
#include <vector>

namespace simt {

struct Copy {
  float* to;
  const float* from;
  int bytes;
  bool inside;
  unsigned group;  // how many groups of this thread were ended before
};
extern thread_local std::vector<Copy> copies_under_way;
extern thread_local unsigned copy_groups;

inline void check_address(const char* instruction, const void* p, int size, int line) {
  if ((std::uintptr_t)p % size) fail("%s (line %d): %d does not divide the address", instruction, line, size);
}

inline const Exchange& exchange_all(const char* instruction, const Words& words, int line) {
  const Exchange& said = exchange(instruction, 0xffffffffu, words, line);
  if (said.lanes != 0xffffffffu) fail("%s (line %d): lanes of the warp have returned", instruction, line);
  return said;
}

// The registers of an mma as its lanes say them, and an element of a or b by its lane, register and place in it.
inline Words mma_words(const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const auto pair = [](std::uint64_t low, std::uint64_t high) { return low | high << 32; };
  return {{pair(a[0], a[1]), pair(a[2], a[3]), pair(b0, b1)}};
}
inline unsigned register_of(const Exchange& said, int lane, int index) {
  return (unsigned)(said.values[lane].of[index / 2] >> 32 * (index % 2));
}
inline float tf32(const Exchange& said, int lane, int index) {
  return from_bits<float>(register_of(said, lane, index) & 0xffffe000u);
}
inline float bf16(const Exchange& said, int lane, int index, int half) {
  return from_bits<float>((std::uint64_t)(register_of(said, lane, index) >> 16 * half & 0xffffu) << 16);
}

}  // namespace simt

namespace {

#define LINE int line = __builtin_LINE()
template <int BYTES> void cp_async(float* to, const float* from, bool inside, LINE) {
  simt::check_address("cp.async", to, BYTES, line);
  if (inside) simt::check_address("cp.async", from, BYTES, line);
  std::memset(to, 0xff, BYTES);
  simt::copies_under_way.push_back({to, from, BYTES, inside, simt::copy_groups});
}
inline void cp_async_commit_group() { ++simt::copy_groups; }
template <unsigned PENDING> void cp_async_wait_group() {
  std::vector<simt::Copy> left;
  for (const simt::Copy& c : simt::copies_under_way) {
    if (c.group + PENDING >= simt::copy_groups) left.push_back(c);
    else if (c.inside) std::memcpy(c.to, c.from, c.bytes);
    else std::memset(c.to, 0, c.bytes);
  }
  simt::copies_under_way.swap(left);
}

inline unsigned cvt_rna_tf32(float x) {
  if (std::isnan(x)) return 0x7fffffffu;
  return (__float_as_uint(x) + (std::isinf(x) ? 0u : 0x1000u)) & 0xffffe000u;
}
inline unsigned cvt_rn_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline unsigned cvt_rn_bf16x2(float low, float high) { return cvt_rn_bf16(low) | cvt_rn_bf16(high) << 16; }

inline void ldmatrix_x4(unsigned (&r)[4], const float* row, LINE) {
  simt::check_address("ldmatrix", row, 16, line);
  const simt::Exchange& said = simt::exchange_all("ldmatrix", {{simt::to_bits(row)}}, line);
  const int lane = (int)simt::lane();
  for (int m = 0; m < 4; ++m)
    r[m] = __float_as_uint(simt::from_bits<const float*>(said.values[8 * m + lane / 4].of[0])[lane % 4]);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, LINE) {
  const simt::Exchange& said = simt::exchange_all("mma.m16n8k8", simt::mma_words(a, b0, b1), line);
  const int lane = (int)simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k)
      c[i] += simt::tf32(said, row % 8 * 4 + k % 4, row / 8 + k / 4 * 2) *
              simt::tf32(said, column * 4 + k % 4, 4 + k / 4);
  }
}
inline void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, LINE) {
  const simt::Exchange& said = simt::exchange_all("mma.m16n8k16", simt::mma_words(a, b0, b1), line);
  const int lane = (int)simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      c[i] += simt::bf16(said, row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) *
              simt::bf16(said, column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
  }
}
#undef LINE

inline unsigned atom_add_acq_rel(unsigned* counter, unsigned x) {
  __threadfence();
  const unsigned old = atomicAdd(counter, x);
  __threadfence();
  return old;
}

}  // namespace
