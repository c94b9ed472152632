// A training batch from a uint8 dataset: gather, cast, optional affine warp and noise, normalise.
//
//   x[b, d] = (pixel / 255 + noise_sigma n(b, d) - mean) scale,   y[b] = labels[index[b]]
//
// images: (M, D) uint8; index, labels: int32; x: (B, D) float32. pixel is images[index[b], d], or with
// `affine` the bilinear value at the source position of output pixel (column, row) of a square image, 0
// outside it: affine[b] = (a00 a01 a02; a10 a11 a12) maps output (column, row) to source (column, row),
// both relative to the image centre (the inverse map, as in torch's affine_grid, but in pixels).
// n is standard normal (random.cuh), counter (pixel / 4, index[b], 0, 0), key = seed: it depends on the seed, the
// image and the pixel alone, so a run can be replayed with any batch size on any device. Where the images are a part of
// a data set, `numbers` (M,) are their indices in the whole, and count in the place of index[b].
// An index outside [0, M) gives a NaN row and label -1.
// With `offset`, one number on the device, the batch is index[offset : offset + B] instead of the whole index, so that
// a captured launch goes on from step to step; a position outside the index is no image either. advance() moves it.
// Bytes per element: 5. Launch: flat, grid-stride, one thread per 4 pixels; gather_part, with numbers, is a kernel of
// its own, because it takes more registers.
#pragma once
#include "common.cuh"
#include "random.cuh"

struct GatherSettings {
  float mean, scale, noise_sigma;
  unsigned seed_low, seed_high;
  int D, side;          // side: sqrt(D) where affine is used
  index_t M;
  const int* numbers;
};

DEVICE float pixel_or_zero(const unsigned char* image, int column, int row, int side) {
  return column >= 0 && column < side && row >= 0 && row < side ? (float)image[row * side + column] : 0.0f;
}

DEVICE float warped_pixel(const unsigned char* image, const float* a, int d, int side) {
  const float centre = 0.5f * (side - 1);
  const float u = d % side - centre, v = d / side - centre;
  const float column = a[0] * u + a[1] * v + a[2] + centre, row = a[3] * u + a[4] * v + a[5] + centre;
  if (!(column > -1.0f && column < side && row > -1.0f && row < side)) return 0.0f;
  const float left = floorf(column), top = floorf(row), fx = column - left, fy = row - top;
  const int c = (int)left, r = (int)top;
  const float upper = pixel_or_zero(image, c, r, side) * (1.0f - fx) + pixel_or_zero(image, c + 1, r, side) * fx;
  const float lower =
      pixel_or_zero(image, c, r + 1, side) * (1.0f - fx) + pixel_or_zero(image, c + 1, r + 1, side) * fx;
  return upper * (1.0f - fy) + lower * fy;
}

DEVICE float normalise(float p, const GatherSettings& s) { return (p - s.mean) * s.scale; }

DEVICE bool is_image(index_t source, index_t M) { return source >= 0 && source < M; }

// The image in row b of the batch, from an index of N: -1 where position offset + b lies outside. Unsigned, the sum may
// wrap, and a negative position is a large one.
DEVICE int source_of(const int* index, index_t N, index_t offset, index_t b) {
  const unsigned long long position = (unsigned long long)offset + (unsigned long long)b;
  return position < (unsigned long long)N ? index[position] : -1;
}

// What changes from step to step, moved on where a captured launch reads it. The sum wraps, as NumPy's does.
DEVICE void advance_step(index_t* offset, index_t by, float* step) {
  *offset = (index_t)((unsigned long long)*offset + (unsigned long long)by);
  if (step) *step += 1.0f;
}

// The up to 4 pixels from d on of one row of the batch. `affine` is the row's matrix or null. PART: there are numbers.
template <bool PART>
DEVICE void gather_quad(const GatherSettings& s, const unsigned char* images, index_t source, const float* affine,
                        float* x, int d) {
  if (!is_image(source, s.M)) {
    for (int k = 0; k < 4 && d + k < s.D; ++k) x[d + k] = not_a_number();
    return;
  }
  const unsigned char* const image = images + source * s.D;
  Pack<4> p;
  UNROLL for (int k = 0; k < 4; ++k) {
    const int e = d + k < s.D ? d + k : s.D - 1;
    p[k] = (affine ? warped_pixel(image, affine, e, s.side) : (float)image[e]) * (1.0f / 255.0f);
  }
  if (s.noise_sigma != 0.0f) {
    const Normals n = normals(d / 4, (unsigned)(PART ? s.numbers[source] : source), s.seed_low, s.seed_high);
    UNROLL for (int k = 0; k < 4; ++k) p[k] += s.noise_sigma * n.v[k];
  }
  UNROLL for (int k = 0; k < 4; ++k) p[k] = normalise(p[k], s);
  if (s.D % 4 == 0 && aligned16(x)) store(x + d, p);
  else for (int k = 0; k < 4 && d + k < s.D; ++k) x[d + k] = p[k];
}

DEVICE int gather_label(const int* labels, index_t source, index_t M) {
  return is_image(source, M) ? labels[source] : -1;
}

#ifdef __CUDACC__

template <bool PART>
DEVICE void gather_grid(const GatherSettings& s, const unsigned char* images, const int* labels, const int* index,
                        const index_t* offset, const float* affine, float* x, int* y, index_t B, index_t N) {
  const index_t quads = (s.D + 3) / 4, total = B * quads;
  const index_t thread = blockIdx.x * (index_t)blockDim.x + threadIdx.x;
  for (index_t q = thread; q < total; q += gridDim.x * (index_t)blockDim.x) {
    const index_t b = q / quads;
    const int d = 4 * (int)(q - b * quads);
    // Read for each quad: kept over the loop, the offset would take registers that warp and noise need.
    const int source = source_of(index, N, offset ? *offset : 0, b);
    gather_quad<PART>(s, images, source, affine ? affine + 6 * b : nullptr, x + b * s.D, d);
    if (d == 0) y[b] = gather_label(labels, source, s.M);
  }
}

#else

// The pixels [begin, begin + count) of one row without warp and noise: a loop that vectorises.
DEVICE void gather_pixels(const GatherSettings& s, const unsigned char* image, float* out, int begin, int count) {
  INDEPENDENT for (int d = 0; d < count; ++d) out[d] = normalise(image[begin + d] * (1.0f / 255.0f), s);
}

#endif
