// A row of gather_batch on the host: through a block in the L1 cache, which each step passes over in a loop of its own.
#pragma once
#include "../batch.cuh"
#include "stream.h"

inline void gather_row(const GatherSettings& s, const Augmentation& a, Neighbours& neighbours,
                       const unsigned char* images, index_t source, index_t b, float* row) {
  if (!is_image(source, s.M)) {
    std::fill_n(row, s.D, not_a_number());
    return;
  }
  const unsigned char* const image = images + source * s.D;
  const unsigned number = number_of(a, source);
  const bool mapped = a.affine || a.random, noisy = a.noise_sigma != 0.0f;
  Map map;
  if (mapped) {
    map = map_of(a, b, number);
    neighbours.load(image);
  }
  static_assert(STREAM_BLOCK <= 4 * PHILOX_MANY);  // what add_noise takes
  alignas(64) float block[STREAM_BLOCK];
  for (int d = 0; d < s.D; d += STREAM_BLOCK) {
    const int count = std::min<int>(STREAM_BLOCK, s.D - d);
    if (mapped) neighbours.warp(map, block, d, count);
    if (!mapped && !noisy) {
      INDEPENDENT for (int k = 0; k < count; ++k) block[k] = normalise(brightness(image[d + k]), s);
    } else {
      if (mapped) {
        INDEPENDENT for (int k = 0; k < count; ++k) block[k] = brightness(block[k]);
      } else {
        INDEPENDENT for (int k = 0; k < count; ++k) block[k] = brightness(image[d + k]);
      }
      if (noisy) add_noise(a, number, block, d, count);
      INDEPENDENT for (int k = 0; k < count; ++k) block[k] = normalise(block[k], s);
    }
    stream(row + d, block, count);
  }
}
