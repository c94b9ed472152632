// A training batch from a uint8 dataset: gather, cast, optional affine map and noise, normalise.
//
//   x[b, d] = (pixel / 255 + sigma n(b, d) - mean) scale,   y[b] = labels[index[b]]
//
// images: (M, D) uint8; index, labels: int32; x: (B, D) float32. pixel is images[index[b], d], or the value at the
// source position of a map, and n is standard normal: see augment.cuh. An index outside [0, M) gives a NaN row and
// label -1.
// With `offset`, one number on the device, the batch is index[offset : offset + B] instead of the whole index, so that
// a captured launch goes on from step to step; a position outside the index is no image either. advance() moves it.
// Bytes per element: 5. Launch: flat, grid-stride, 4 pixels at a time; in whole words, a thread has five such words
// under way, because it waits for the index before it can load any. gather_augmented, with maps and noise, is a kernel
// of its own, whose registers this one does not pay for. There each thread draws anew what its image has one of: some
// hundreds of operations, which take less time than another launch.
#pragma once
#include "augment.cuh"
#include "common.cuh"

struct GatherSettings {
  float mean, scale;
  int D;
  index_t M;
};

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

DEVICE int gather_label(const int* labels, index_t source, index_t M) {
  return is_image(source, M) ? labels[source] : -1;
}

#ifdef __CUDACC__

// In the place of an Augmentation: images as they are.
struct AsTheyAre {};

// pixel / 255 of the 4 pixels from d on of an image, and of its last one where there are fewer ...
DEVICE Pack<4> quad_of(const AsTheyAre&, const unsigned char* image, int D, index_t, index_t, int d) {
  Pack<4> p;
  UNROLL for (int k = 0; k < 4; ++k) p[k] = brightness(image[d + k < D ? d + k : D - 1]);
  return p;
}

// ... mapped and with noise, for row b of the batch.
DEVICE Pack<4> quad_of(const Augmentation& a, const unsigned char* image, int D, index_t source, index_t b, int d) {
  const unsigned number = number_of(a, source);
  Pack<4> p;
  if (a.affine || a.random) {
    const Map map = map_of(a, b, number);
    UNROLL for (int k = 0; k < 4; ++k) p[k] = brightness(warped_pixel(image, map, d + k < D ? d + k : D - 1, a.side));
  } else {
    p = quad_of(AsTheyAre{}, image, D, source, b, d);
  }
  if (a.noise_sigma != 0.0f) {
    unsigned bits[4] = {(unsigned)d / 4, number, a.draw, FOR_NOISE};
    philox4x32(bits, a.seed_low, a.seed_high);
    const Normals n = normals(bits);
    const float sigma = noise_of(a, number);
    UNROLL for (int k = 0; k < 4; ++k) p[k] += sigma * n.v[k];
  }
  return p;
}

// The up to 4 pixels from d on of row b of the batch, which is at x.
template <class How>
DEVICE void gather_quad(const GatherSettings& s, const How& how, const unsigned char* images, index_t source, index_t b,
                        float* x, int d) {
  if (!is_image(source, s.M)) {
    for (int k = 0; k < 4 && d + k < s.D; ++k) x[d + k] = not_a_number();
    return;
  }
  Pack<4> p = quad_of(how, images + source * s.D, s.D, source, b, d);
  UNROLL for (int k = 0; k < 4; ++k) p[k] = normalise(p[k], s);
  if (s.D % 4 == 0 && aligned16(x)) store(x + d, p);
  else for (int k = 0; k < 4 && d + k < s.D; ++k) x[d + k] = p[k];
}

constexpr int WORDS_AT_ONCE = 5;

// Images as they are, 4 pixels a word. After the batch's words come its labels: they are words as well, and
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

// The batch in quads; `begin()` gives the offset.
template <class How, class Begin>
DEVICE void gather_quads(const GatherSettings& s, const How& how, const unsigned char* images, const int* labels,
                         const int* index, Begin begin, float* x, int* y, index_t B, index_t N) {
  const index_t quads = (s.D + 3) / 4, total = B * quads;
  const index_t thread = blockIdx.x * (index_t)blockDim.x + threadIdx.x;
  for (index_t q = thread; q < total; q += gridDim.x * (index_t)blockDim.x) {
    const index_t b = quotient(q, quads);
    const int d = 4 * (int)(q - b * quads);
    const int source = source_of(index, N, begin(), b);
    gather_quad(s, how, images, source, b, x + b * s.D, d);
    if (d == 0) y[b] = gather_label(labels, source, s.M);
  }
}

DEVICE void gather_grid(const GatherSettings& s, const unsigned char* images, const int* labels, const int* index,
                        const index_t* offset, float* x, int* y, index_t B, index_t N) {
  const index_t words = B * (s.D / 4) + B;
  if (s.D % 4 == 0 && aligned16(images, x) && words >> 31 == 0) {
    gather_words(s, images, labels, index, offset ? *offset : 0, x, y, (unsigned)B, N);
  } else {
    gather_quads(s, AsTheyAre{}, images, labels, index, [=] { return offset ? *offset : 0; }, x, y, B, N);
  }
}

#endif
