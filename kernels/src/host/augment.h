// The variations of augment.cuh on the host, an image at a time, in loops that vectorise.
#pragma once
#include <vector>

// The pixels' positions in square images, u and v from the centre. Without maps, side is 0.
struct PixelGrid {
  int side;
  std::vector<float> u, v;
  explicit PixelGrid(int side) : side(side), u(side * side), v(side * side) {
    for (int d = 0; d < side * side; ++d) {
      u[d] = d % side - 0.5f * (side - 1);
      v[d] = d / side - 0.5f * (side - 1);
    }
  }
};

// An image as its quadruples of neighbours, one word each: the pixel at (column, row) and those right of it, below it,
// and below that one, for columns and rows from -1 to side, with zeros around the image. So a bilinear value takes one
// load, and no test whether it is inside.
class Neighbours {
 public:
  explicit Neighbours(const PixelGrid& grid)
      : grid_(grid), stride_(grid.side + 3), bytes_(stride_ * stride_), words_((grid.side + 2) * stride_ - 1) {}

  void load(const unsigned char* image) {
    const int side = grid_.side, stride = stride_, count = (int)words_.size();
    for (int r = 0; r < side; ++r) std::memcpy(&bytes_[(r + 1) * stride + 1], image + r * side, side);
    const unsigned char* const b = bytes_.data();
    unsigned* const w = words_.data();
    INDEPENDENT for (int i = 0; i < count; ++i)
      w[i] = b[i] | b[i + 1] << 8 | b[i + stride] << 16 | (unsigned)b[i + stride + 1] << 24;
  }

  // out[k] = the value at the map's source of pixel begin + k, for k < count.
  void warp(const Map& map, float* out, int begin, int count) const {
    const float* const u = grid_.u.data() + begin;
    const float* const v = grid_.v.data() + begin;
    const unsigned* const words = words_.data();
    const float side = (float)grid_.side, centre = 0.5f * (side - 1.0f);
    const int stride = stride_;
    INDEPENDENT for (int k = 0; k < count; ++k) {
      Position p = source_position(map, u[k], v[k], centre);
      p.column = p.column > -1.0f ? p.column : -1.0f;  // NaN, too
      p.row = p.row > -1.0f ? p.row : -1.0f;
      p.column = p.column < side ? p.column : side;
      p.row = p.row < side ? p.row : side;
      const float left = std::floor(p.column), top = std::floor(p.row);
      const unsigned w = words[((int)top + 1) * stride + (int)left + 1];
      out[k] = bilinear((float)(int)(w & 255), (float)(int)(w >> 8 & 255), (float)(int)(w >> 16 & 255),
                        (float)(int)(w >> 24), p.column - left, p.row - top);
    }
  }

 private:
  const PixelGrid& grid_;
  const int stride_;
  std::vector<unsigned char> bytes_;
  std::vector<unsigned> words_;
};

// x[k] += sigma times the noise of pixel begin + k, for k < count <= 4 PHILOX_MANY; begin is a multiple of 4.
inline void add_noise(const Augmentation& s, unsigned number, float* x, int begin, int count) {
  const float sigma = noise_of(s, number);
  const int quads = (count + 3) / 4;
  unsigned word[4][PHILOX_MANY];
  float noise[4 * PHILOX_MANY];
  philox4x32_many(word, (unsigned)begin / 4, quads, number, s.draw, FOR_NOISE, s.seed_low, s.seed_high);
  INDEPENDENT for (int q = 0; q < quads; ++q) {
    const Normals n = normals({word[0][q], word[1][q], word[2][q], word[3][q]});
    for (int k = 0; k < 4; ++k) noise[4 * q + k] = n.v[k];
  }
  INDEPENDENT for (int k = 0; k < count; ++k) x[k] += sigma * noise[k];
}
