// Variations of the images of a batch: affine maps and noise, given or drawn at random.
//
// A map takes an output pixel's position (u, v), column and row from the centre of a square image, to the source's:
//   column = a00 u + a01 v + a02,  row = a10 u + a11 v + a12     (the inverse map, in pixels, as in torch's affine_grid)
// whose value is bilinear, 0 outside. A random one is
//   (a00 a01; a10 a11) = R(angle) (1 shear; 0 1) diag(zoom, zoom'),   (a02 a12) = shift
// with angle, shear and shifts uniform around 0 and the zooms around 1. It is computed by multiply_adds in this order
// wherever it is drawn, so that every device has the same matrix, to the bit.
//
// The random numbers are Philox's (random.cuh) under the key `seed`: noise has those of counter (pixel / 4, number,
// draw, FOR_NOISE), and what an image has one of those of (0 or 1, number, draw, FOR_AUGMENT). `number` is the image's
// index, or where images are a part of a data set `numbers` (M,) are theirs in the whole; `draw` is what the caller
// counts, such as epochs. They depend on nothing else, so a run can be replayed with any batch size on any device.
#pragma once
#include "common.cuh"
#include "random.cuh"

struct Augmentation {
  const int* numbers;                 // null: the images' indices
  const float* affine;                // (B, 2, 3) maps, or null
  float noise_sigma;                  // standard deviation of the noise
  int noise_uniform;                  // whether each image's is noise_sigma times a number from (0, 1)
  int random;                         // whether maps are drawn, from
  float rotation, zoom, shear, shift; // ranges on either side: radians, of 1, pixels per pixel, pixels
  unsigned draw, seed_low, seed_high;
  int side;                           // of a square image
};

struct Map { float a[6]; };

struct Position { float column, row; };

DEVICE unsigned number_of(const Augmentation& s, index_t image) {
  return (unsigned)(s.numbers ? s.numbers[image] : image);
}

DEVICE void image_bits(unsigned (&bits)[4], const Augmentation& s, unsigned number, unsigned block) {
  bits[0] = block;
  bits[1] = number;
  bits[2] = s.draw;
  bits[3] = FOR_AUGMENT;
  philox4x32(bits, s.seed_low, s.seed_high);
}

// Uniform in (middle - range, middle + range).
DEVICE float around(float middle, unsigned bits, float range) {
  return multiply_add(multiply_add(2.0f, unit_interval(bits), -1.0f), range, middle);
}

DEVICE Map random_map(const Augmentation& s, unsigned number) {
  unsigned first[4], second[4];
  image_bits(first, s, number, 0);
  image_bits(second, s, number, 1);
  const Direction r = direction(around(0.0f, first[0], s.rotation));
  const float shear = around(0.0f, first[1], s.shear);
  const float zoom_u = around(1.0f, first[2], s.zoom), zoom_v = around(1.0f, first[3], s.zoom);
  return {{multiply_add(r.cosine, zoom_u, 0.0f), multiply_add(multiply_add(r.cosine, shear, -r.sine), zoom_v, 0.0f),
           around(0.0f, second[0], s.shift),
           multiply_add(r.sine, zoom_u, 0.0f), multiply_add(multiply_add(r.sine, shear, r.cosine), zoom_v, 0.0f),
           around(0.0f, second[1], s.shift)}};
}

// The map of row b of the batch, whose image has this number.
DEVICE Map map_of(const Augmentation& s, index_t b, unsigned number) {
  if (s.random) return random_map(s, number);
  const float* const a = s.affine + 6 * b;
  return {{a[0], a[1], a[2], a[3], a[4], a[5]}};
}

DEVICE float noise_of(const Augmentation& s, unsigned number) {
  if (!s.noise_uniform) return s.noise_sigma;
  unsigned bits[4];
  image_bits(bits, s, number, 1);
  return s.noise_sigma * unit_interval(bits[2]);
}

DEVICE Position source_position(const Map& m, float u, float v, float centre) {
  return {m.a[0] * u + m.a[1] * v + m.a[2] + centre, m.a[3] * u + m.a[4] * v + m.a[5] + centre};
}

// Between four pixels, as far to the right of the left ones and below the upper ones as fx and fy say.
DEVICE float bilinear(float upper_left, float upper_right, float lower_left, float lower_right, float fx, float fy) {
  const float upper = upper_left * (1.0f - fx) + upper_right * fx;
  const float lower = lower_left * (1.0f - fx) + lower_right * fx;
  return upper * (1.0f - fy) + lower * fy;
}

#ifdef __CUDACC__

DEVICE float pixel_or_zero(const unsigned char* image, int column, int row, int side) {
  return column >= 0 && column < side && row >= 0 && row < side ? (float)image[row * side + column] : 0.0f;
}

DEVICE float warped_pixel(const unsigned char* image, const Map& map, int d, int side) {
  const float centre = 0.5f * (side - 1);
  const Position p = source_position(map, d % side - centre, d / side - centre, centre);
  if (!(p.column > -1.0f && p.column < side && p.row > -1.0f && p.row < side)) return 0.0f;
  const float left = floorf(p.column), top = floorf(p.row);
  const int c = (int)left, r = (int)top;
  return bilinear(pixel_or_zero(image, c, r, side), pixel_or_zero(image, c + 1, r, side),
                  pixel_or_zero(image, c, r + 1, side), pixel_or_zero(image, c + 1, r + 1, side), p.column - left,
                  p.row - top);
}

#else
#include "host/augment.h"
#endif
