// Attention over the first keys, backward: from d_output, the gradient of what attention_forward.cuh computes, to
// d_queries, d_keys, d_values, and with cosine d_head_scales.
//
// The weights of the softmax were never written: they are computed again, from the logits and their log-sum-exp. With
//     d_weights = d_output values^T,  delta[query] = output . d_output  (the sum of a row's weights times d_weights)
//     d_logits = weights (d_weights - delta),
// the gradients are weights^T d_output of the values, d_logits keys of the queries, and d_logits^T queries of the keys,
// times what the logits were multiplied by (FlashAttention, arXiv 2205.14135). There are four kernels:
//     prepare      what belongs to a query or a key alone: delta, and lengths
//     keys         d_keys and d_values: a block keeps 64 keys of a key head, and walks over all queries that see them
//     queries      d_queries: a block keeps 64 queries of a head, and walks over all keys that they see
//     head_scales  adds up what the blocks of the kernel before say of d_head_scales
// Seven products of tiles instead of five, since two of them are computed in both keys and queries; but no sum is ever
// shared by two blocks. No atomics, therefore: the same inputs give the same bits. The kernels are in files of their
// own, attention_backward_*.cuh; here is what they share.
//
// With cosine the logits are head_scale (q / |q|).(k / |k|), and lengths are again divided out of numbers between the
// products, not out of queries and keys. What comes out is the gradient g of q / |q|; that of q is what of it is
// orthogonal to q, divided by the length: (g - q^ (q^ . g)) / |q|, where q^ = q / |q|. Vectors shorter than 1e-12 are
// divided by that instead, as by torch's normalize, and so are their gradients: those of vectors of zeros are infinite
// in half precision.
#pragma once

#include "attention.cuh"

namespace vargpt {

// What the keys and queries kernels need to know of a query; 16 bytes, so that one cp.async copies it.
struct alignas(16) QueryNumbers {
  float inverse_length;  // with cosine
  float log_sum_exp;     // of base 2
  float delta;
  int limit;
};

struct AttentionBackward {
  View<const uint16_t> queries, keys, values, output, d_output;  // pointers and strides: whole chunks of 16 bytes
  View<uint16_t> d_queries, d_keys, d_values;  // likewise; all of them is written, and may overlap with nothing else
  const float* log_sum_exp;  // [batch, heads, query_count], as the forward kernel wrote it
  const int* limits;         // [query_count], from 1 to key_count, never decreasing
  const float* head_scales;  // [heads]; read with cosine
  float* d_head_scales;      // [heads]; written with cosine

  // Room for what one kernel leaves for the next, on a grid of 16 bytes. Nothing need stand there.
  QueryNumbers* query_numbers;  // [batch, heads, padded(query_count)]
  float* key_inverse_lengths;   // with cosine: [batch, key_heads, padded(key_count)]
  float* head_scale_parts;      // with cosine: [heads, batch, padded(query_count) / 16], one of every warp

  float scale;  // read without cosine
  int batch, heads, key_heads;  // heads / key_heads query heads in succession share a key head
  int query_count, key_count;
};

// Whole blocks.
__host__ DEVICE constexpr int padded(int rows) { return (rows + kRows - 1) / kRows * kRows; }

DEVICE QueryNumbers* numbers_of(const AttentionBackward& call, int batch, int head) {
  return call.query_numbers + (int64_t(batch) * call.heads + head) * padded(call.query_count);
}

DEVICE float* key_inverse_lengths_of(const AttentionBackward& call, int batch, int key_head) {
  return call.key_inverse_lengths + (int64_t(batch) * call.key_heads + key_head) * padded(call.key_count);
}

// What a block keeps in shared memory: 64 rows of two matrices for good, and of two others, over which it walks, two
// stages: one is computed while the other is copied.
template <int width>
struct AttentionBackwardShared {
  // Of width 128, tiles of 64 would leave room for one block on a multiprocessor instead of two; and in the keys kernel
  // the products with them, beside two sums of 64 x 128, would not fit into registers.
  static constexpr int walked_rows = width == 64 ? 64 : 32;
  static constexpr int kept_bytes = Tile<width>::bytes(kRows), walked_bytes = Tile<width>::bytes(walked_rows);
  static constexpr int number_bytes = walked_rows * int(sizeof(QueryNumbers));
  static constexpr int bytes = 2 * kept_bytes + 4 * walked_bytes + 2 * number_bytes;
  // So many fit into the 164 KiB of sm_80, of which each takes 1 KiB more than it asks for; the compiler is told. Of
  // width 64 three would fit, but not with the registers of the keys kernel, which would spill some.
  static constexpr int blocks_per_multiprocessor = 2;
  static_assert(blocks_per_multiprocessor * (bytes + 1024) <= 164 * 1024);
  char* data;

  DEVICE Tile<width> kept(int which) const { return {data + which * kept_bytes}; }
  DEVICE Tile<width> walked(int which, int stage) const {
    return {data + 2 * kept_bytes + (2 * which + stage) * walked_bytes};
  }
  // What belongs to the rows of walked tiles: of queries all of this, of keys the inverse length alone.
  DEVICE QueryNumbers* query_numbers(int stage) const {
    return reinterpret_cast<QueryNumbers*>(data + 2 * kept_bytes + 4 * walked_bytes + stage * number_bytes);
  }
  DEVICE float* key_inverse_lengths(int stage) const { return reinterpret_cast<float*>(query_numbers(stage)); }
};

// ---- Sums and products ----

// Over so many lanes in succession.
template <int lanes>
DEVICE float sum_over(float value) {
#pragma unroll
  for (int mask = 1; mask < lanes; mask *= 2) value += shfl_xor(value, mask);
  return value;
}

// The products of the warp's 16 rows of one tile and all rows of another.
template <Format format, int eights, int width>
DEVICE void multiply(float (&sums)[eights][4], Tile<width> rows, Tile<width> columns) {
#pragma unroll
  for (int step = 0; step < width / 16; ++step) {
    uint32_t left[4];
    load_left(left, rows, 16 * warp(), step);
    multiply_by_rows<format>(sums, left, columns, step);
  }
}

// Weights are 0 where a lane's row and column do not see each other.
template <int eights, class Sees>
DEVICE void hide(float (&weights)[eights][4], const Sees& sees) {
#pragma unroll
  for (int eight = 0; eight < eights; ++eight) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      if (!sees(half_of(element), 8 * eight + column_of(element))) weights[eight][element] = 0;
    }
  }
}

DEVICE bool too_short(float inverse_length) { return inverse_length >= 1.0f / kShortest; }

// An inverse length as a factor of d_logits, which must stay finite in the format: infinity times a vector of zeros is
// NaN. In half precision nothing but zeros is as short; and these are zeros, whatever they are multiplied by.
template <Format format>
DEVICE float finite(float inverse_length) {
  return format == Format::fp16 && too_short(inverse_length) ? 0.0f : inverse_length;
}

// Makes the gradient of vectors of that of the same vectors brought to length 1; a lane's two rows of the warp's 16.
// `along` becomes the products of the latter gradient and the vectors brought to length 1.
template <Format format, int width>
DEVICE void unnormalize(float (&gradient)[width / 8][4], float (&along)[2], Tile<width> vectors,
                        const float (&inverse_lengths)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp() + row_of(half);
    const auto pair = [&](int eight) {
      return unpack<format>(*reinterpret_cast<const uint32_t*>(vectors.at(row, eight) + 2 * column_of(0)));
    };
    float product = 0;
#pragma unroll
    for (int eight = 0; eight < width / 8; ++eight) {
      const float2 vector = pair(eight);
      product = fmaf(vector.x, gradient[eight][2 * half], fmaf(vector.y, gradient[eight][2 * half + 1], product));
    }
    const float inverse = inverse_lengths[half];
    along[half] = quad_sum(product) * inverse;
    const float removed = too_short(inverse) ? 0.0f : -along[half] * inverse;
#pragma unroll
    for (int eight = 0; eight < width / 8; ++eight) {
      const float2 vector = pair(eight);
      gradient[eight][2 * half] = fmaf(vector.x, removed, gradient[eight][2 * half]) * inverse;
      gradient[eight][2 * half + 1] = fmaf(vector.y, removed, gradient[eight][2 * half + 1]) * inverse;
    }
  }
}

}  // namespace vargpt
