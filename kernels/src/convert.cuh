// float32 to bfloat16, which is float32 without its last 16 bits: rounded to nearest, ties to even.
//
//   y = (bits(x) + 0x7FFF + (bits(x) >> 16 & 1)) >> 16;  NaN: bits(x) >> 16, with the quiet bit set
//
// The sum carries into the bits that stay just where they must grow, through the exponent if need be: from the largest
// numbers to infinity. Infinities and zeros keep their bits, and a NaN must not be carried into one. Integers alone
// are computed with, so denormals are rounded like other numbers, although the GPU is told to flush them.
//
// x: (n,) float32, y: (n,) uint16. Bytes per element: 6. Launch: flat, grid-stride, 4 elements per thread.
#pragma once
#include "common.cuh"

DEVICE unsigned bfloat16_bits(float x) {
  const unsigned bits = float_bits(x);
  const unsigned rounded = bits + 0x7FFFu + (bits >> 16 & 1u), quiet = bits | 0x00400000u;
  return ((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded) >> 16;
}

DEVICE void to_bfloat16_range(Range range, const float* x, unsigned short* y) {
  range.for_each(aligned16(x, y), [=](auto width, index_t i) {
    constexpr int W = decltype(width)::value;
    const Pack<W> v = load<W>(x + i);
    if constexpr (W == 4) {  // little-endian, as every GPU is
      const unsigned low = bfloat16_bits(v[0]) | bfloat16_bits(v[1]) << 16;
      const unsigned high = bfloat16_bits(v[2]) | bfloat16_bits(v[3]) << 16;
      *reinterpret_cast<unsigned long long*>(y + i) = (unsigned long long)high << 32 | low;
    } else {
      y[i] = (unsigned short)bfloat16_bits(v[0]);
    }
  });
}
