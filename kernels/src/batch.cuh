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
// Bytes per element: 5. Launch: flat, grid-stride, 4 pixels at a time; without warp and noise, and in whole words, a
// thread has five such words under way, because it waits for the index before it can load any. gather_part, with
// numbers, is a kernel of its own, because they take a register more.
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

// Rounded before anything else is done, so that all ways to a pixel give the same bits.
DEVICE float brightness(float pixel) { return rounded_product(pixel, 1.0f / 255.0f); }

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
    p[k] = brightness(affine ? warped_pixel(image, affine, e, s.side) : (float)image[e]);
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

constexpr int WORDS_AT_ONCE = 5;

// Images without warp and noise, 4 pixels a word. After the batch's words come its labels: they are words as well, and
// take as long to get. The loads of WORDS_AT_ONCE words are under way together, each behind that of its index.
DEVICE void gather_words(const GatherSettings& s, const unsigned char* images, const int* labels, const int* index,
                         index_t begin, float* x, int* y, unsigned B, index_t N) {
  const unsigned words = (unsigned)s.D / 4, pixels = B * words, all = pixels + B;
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  ROLLED for (unsigned i = thread; i < all; i += WORDS_AT_ONCE * threads) {
    int source[WORDS_AT_ONCE], place[WORDS_AT_ONCE], word[WORDS_AT_ONCE];  // place: within the image, -1 for a label
    UNROLL for (int k = 0; k < WORDS_AT_ONCE; ++k) {
      const unsigned q = i + k * threads;
      const unsigned b = q < pixels ? q / words : q - pixels;
      source[k] = q < all ? source_of(index, N, begin, b) : -1;
      place[k] = q < pixels ? (int)(q - b * words) : -1;
    }
    UNROLL for (int k = 0; k < WORDS_AT_ONCE; ++k) {
      if (!is_image(source[k], s.M)) source[k] = word[k] = -1;
      else if (place[k] < 0) word[k] = labels[source[k]];
      else word[k] = reinterpret_cast<const int*>(images)[source[k] * (index_t)words + place[k]];
    }
    UNROLL for (int k = 0; k < WORDS_AT_ONCE; ++k) {
      const unsigned q = i + k * threads;
      if (q < pixels) {
        Pack<4> p;
        UNROLL for (int b = 0; b < 4; ++b)
          p[b] = source[k] >= 0 ? normalise(brightness(word[k] >> 8 * b & 255), s) : not_a_number();
        store(x + 4 * (index_t)q, p);
      } else if (q < all) {
        y[q - pixels] = word[k];
      }
    }
  }
}

template <bool PART>
DEVICE void gather_grid(const GatherSettings& s, const unsigned char* images, const int* labels, const int* index,
                        const index_t* offset, const float* affine, float* x, int* y, index_t B, index_t N) {
  const index_t quads = (s.D + 3) / 4, total = B * quads;
  if (!affine && s.noise_sigma == 0.0f && s.D % 4 == 0 && aligned16(images, x) && (total + B) >> 31 == 0) {
    gather_words(s, images, labels, index, offset ? *offset : 0, x, y, (unsigned)B, N);
    return;
  }
  const index_t thread = blockIdx.x * (index_t)blockDim.x + threadIdx.x;
  for (index_t q = thread; q < total; q += gridDim.x * (index_t)blockDim.x) {
    const index_t b = quotient(q, quads);
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
  INDEPENDENT for (int d = 0; d < count; ++d) out[d] = normalise(brightness(image[begin + d]), s);
}

#endif
