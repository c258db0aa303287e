// What attention's forward and backward kernels share.
//
// A product that is added to something is written as fmaf: nvcc fuses the two in any case, and g++ then does the same.
#pragma once

#include "tiles.cuh"

namespace vargpt {

// A block of four warps computes so many rows, 16 a warp.
constexpr int kRows = 64;
constexpr int kThreads = 32 * kRows / 16;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---- Lengths ----

template <Format format>
DEVICE float add_squares(float sum, uint32_t pair) {
  const float2 numbers = unpack<format>(pair);
  return fmaf(numbers.x, numbers.x, fmaf(numbers.y, numbers.y, sum));
}

template <Format format>
DEVICE float add_squares(float sum, uint4 numbers) {
  sum = add_squares<format>(sum, numbers.x);
  sum = add_squares<format>(sum, numbers.y);
  sum = add_squares<format>(sum, numbers.z);
  return add_squares<format>(sum, numbers.w);
}

constexpr float kShortest = 1e-12f;  // that of torch's normalize: vectors of zeros stay zeros

// 1 / |x|
DEVICE float inverse_length(float squares) { return 1.0f / fmaxf(sqrtf(squares), kShortest); }

// ---- Products of a warp's 16 rows and a tile ----

// Adds the products with the tile's rows (as queries times keys): of their columns 16 step .. + 15 only.
template <Format format, int eights, int width>
DEVICE void multiply_by_rows(float (&sums)[eights][4], const uint32_t (&left)[4], Tile<width> tile, int step) {
#pragma unroll
  for (int sixteen = 0; sixteen < eights / 2; ++sixteen) {
    uint32_t right[4];
    load_right_from_rows(right, tile, 16 * sixteen, step);
    mma_16x8x16<format>(sums[2 * sixteen], left, right[0], right[1]);
    mma_16x8x16<format>(sums[2 * sixteen + 1], left, right[2], right[3]);
  }
}

// Adds the products with the tile's columns (as weights times values). The layout of sums and that of left factors
// agree: weights go from one product into the next without leaving the lane.
template <Format format, int eights, int width>
DEVICE void multiply_by_columns(float (&sums)[width / 8][4], const float (&weights)[eights][4], Tile<width> tile) {
#pragma unroll
  for (int sixteen = 0; sixteen < eights / 2; ++sixteen) {
    const float(&left)[4] = weights[2 * sixteen], (&right)[4] = weights[2 * sixteen + 1];
    const uint32_t packed[4] = {pack<format>(left[0], left[1]), pack<format>(left[2], left[3]),
                                pack<format>(right[0], right[1]), pack<format>(right[2], right[3])};
#pragma unroll
    for (int step = 0; step < width / 16; ++step) {
      uint32_t columns[4];
      load_right_from_columns(columns, tile, 16 * sixteen, step);
      mma_16x8x16<format>(sums[2 * step], packed, columns[0], columns[1]);
      mma_16x8x16<format>(sums[2 * step + 1], packed, columns[2], columns[3]);
    }
  }
}

// ---- The result ----

// Writes one of a lane's two rows. The four lanes of a quad write 16 bytes side by side; that is half a sector, but
// happens once per row, where the rows of the other side are read once per 64.
template <Format format, int eights>
DEVICE void store_row(uint16_t* row, const float (&sums)[eights][4], int half, float factor) {
#pragma unroll
  for (int eight = 0; eight < eights; ++eight) {
    const float(&numbers)[4] = sums[eight];
    uint16_t* to = row + 8 * eight + column_of(0);
    *reinterpret_cast<uint32_t*>(to) = pack<format>(numbers[2 * half] * factor, numbers[2 * half + 1] * factor);
  }
}

}  // namespace vargpt
