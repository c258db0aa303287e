// Tiles of matrices: in global memory, in shared memory, and in the registers of a warp.
#pragma once

#include "ptx.cuh"

namespace vargpt {

DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }

// A tensor [batch, head, token, width] in global memory. The numbers of a token lie side by side; the strides of the
// other axes are free (counted in numbers), so that slices of a fused projection or of a cache need no copy.
template <class Number>
struct View {
  Number* data;
  int64_t batch_stride, head_stride, token_stride;

  DEVICE Number* tokens(int batch, int head) const { return data + batch * batch_stride + head * head_stride; }
};

// Rows of `width` 16-bit numbers in shared memory, in chunks of 8 numbers (16 bytes). Places are counted without a
// sign: division by powers of two is then a shift.
//
// ldmatrix reads the same chunk of 8 rows at once. Stored row after row, these would lie 128 bytes or a multiple of
// that apart, all on the same 4 of the 32 banks, and be read one after the other. Therefore the chunks of a row are
// swapped around by the row's number: any 8 rows in succession hold the same chunk at 8 different places modulo 128.
template <int width_>
struct Tile {
  static constexpr int width = width_, chunks = width / 8;
  static_assert(chunks % 8 == 0, "the swizzle mixes 8 chunks");
  char* data;

  static constexpr int bytes(int rows) { return rows * width * int(sizeof(uint16_t)); }
  DEVICE char* at(unsigned row, unsigned chunk) const { return data + 16 * (row * chunks + (chunk ^ (row % 8))); }
};

// Starts to copy rows first_row, first_row + 1, ... of a matrix into the `rows` rows of a tile, all threads of the
// block together: each copies the same chunk of every so many rows. Rows from `end` on do not exist: they become zeros,
// since anything else, times a weight of 0, may be NaN.
template <int rows, int threads, int width>
DEVICE void load_rows(Tile<width> tile, const uint16_t* matrix, int64_t stride, int first_row, int end) {
  constexpr int chunks = Tile<width>::chunks, rows_at_once = threads / chunks;
  static_assert(threads % chunks == 0 && rows % rows_at_once == 0, "every thread copies as many chunks");
  const unsigned chunk = threadIdx.x % chunks;
#pragma unroll
  for (int i = 0; i < rows / rows_at_once; ++i) {
    const int row = i * rows_at_once + threadIdx.x / chunks;
    const bool exists = first_row + row < end;
    const uint16_t* from = matrix + (exists ? (first_row + row) * stride : 0) + 8 * chunk;
    cp_async_16(tile.at(row, chunk), from, exists);
  }
}

// ---- Fragments: what a warp's lanes hold of a tile for mma_16x8x16 ----

// The left factor: rows first_row .. + 15, columns 16 step .. + 15.
template <int width>
DEVICE void load_left(uint32_t (&fragment)[4], Tile<width> tile, int first_row, int step) {
  ldmatrix_x4(fragment, tile.at(first_row + lane() % 16, 2 * step + lane() / 16));
}

// Two right factors side by side whose columns are the tile's rows (as keys are in queries times keys): rows
// first_row .. + 7 make the first, in fragment[0] and [1], the 8 rows after them the second, in [2] and [3].
template <int width>
DEVICE void load_right_from_rows(uint32_t (&fragment)[4], Tile<width> tile, int first_row, int step) {
  ldmatrix_x4(fragment, tile.at(first_row + lane() / 16 * 8 + lane() % 8, 2 * step + lane() / 8 % 2));
}

// Two right factors side by side whose columns are the tile's columns (as those of the values are in weights times
// values): rows first_row .. + 15; columns 16 step .. + 7 make the first, the 8 columns after them the second.
template <int width>
DEVICE void load_right_from_columns(uint32_t (&fragment)[4], Tile<width> tile, int first_row, int step) {
  ldmatrix_x4_transposed(fragment, tile.at(first_row + lane() % 16, 2 * step + lane() / 16));
}

// ---- What lanes hold of sums: [column / 8][4], see mma_16x8x16 ----
// Four lanes, a quad, share a row. A lane knows two rows, 8 apart; what belongs to rows comes as [2].

// Which of the two rows a lane's element is of.
DEVICE constexpr int half_of(int element) { return element / 2; }

// The row of a lane's half among the warp's 16, and an element's column among 8.
DEVICE int row_of(int half) { return lane() / 4 + 8 * half; }
DEVICE int column_of(int element) { return 2 * (lane() % 4) + element % 2; }

DEVICE float quad_sum(float value) {
  value += shfl_xor(value, 1);
  return value + shfl_xor(value, 2);
}

DEVICE float quad_max(float value) {
  value = fmaxf(value, shfl_xor(value, 1));
  return fmaxf(value, shfl_xor(value, 2));
}

}  // namespace vargpt
