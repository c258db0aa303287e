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
// shared by two blocks. No atomics, therefore: the same inputs give the same bits.
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

// ---- Prepare: a few lanes for every query of a head or key of a key head (y), 16 bytes each ----

// What is there, or zeros.
DEVICE uint4 load_chunk(const View<const uint16_t>& view, int batch, int head, int row, int chunk, bool exists) {
  if (!exists) return {0, 0, 0, 0};
  return *reinterpret_cast<const uint4*>(view.tokens(batch, head) + row * view.token_stride + 8 * chunk);
}

template <Format format>
DEVICE float add_products(float sum, uint32_t left, uint32_t right) {
  const float2 a = unpack<format>(left), b = unpack<format>(right);
  return fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
}

template <Format format>
DEVICE float dot(uint4 a, uint4 b) {
  float sum = add_products<format>(0, a.x, b.x);
  sum = add_products<format>(sum, a.y, b.y);
  sum = add_products<format>(sum, a.z, b.z);
  return add_products<format>(sum, a.w, b.w);
}

// Over so many lanes in succession.
template <int lanes>
DEVICE float sum_over(float value) {
#pragma unroll
  for (int mask = 1; mask < lanes; mask *= 2) value += shfl_xor(value, mask);
  return value;
}

template <Format format, int width, bool cosine>
__global__ void __launch_bounds__(kThreads) attention_backward_prepare(AttentionBackward call) {
  constexpr int lanes = width / 8;
  const int row = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes, chunk = threadIdx.x % lanes;
  const int batch = blockIdx.z, head = blockIdx.y, key_head = head - call.heads;
  if (head < call.heads) {
    const bool exists = row < call.query_count;
    const uint4 output = load_chunk(call.output, batch, head, row, chunk, exists);
    const uint4 d_output = load_chunk(call.d_output, batch, head, row, chunk, exists);
    const float delta = sum_over<lanes>(dot<format>(output, d_output));
    float inverse = 0;
    if constexpr (cosine) {
      const uint4 query = load_chunk(call.queries, batch, head, row, chunk, exists);
      inverse = inverse_length(sum_over<lanes>(add_squares<format>(0, query)));
    }
    if (chunk == 0 && row < padded(call.query_count)) {
      // Queries that do not exist have no weights: exp2(anything - infinity) is 0.
      QueryNumbers numbers = {inverse, INFINITY, delta, 0};
      if (exists) {
        const int64_t first = (int64_t(batch) * call.heads + head) * call.query_count;
        numbers.log_sum_exp = call.log_sum_exp[first + row] * kLog2E;
        numbers.limit = call.limits[row];
      }
      numbers_of(call, batch, head)[row] = numbers;
    }
  } else {
    const uint4 key = load_chunk(call.keys, batch, key_head, row, chunk, row < call.key_count);
    const float inverse = inverse_length(sum_over<lanes>(add_squares<format>(0, key)));
    if (chunk == 0 && row < padded(call.key_count)) key_inverse_lengths_of(call, batch, key_head)[row] = inverse;
  }
}

template <int width, bool cosine>
dim3 attention_backward_prepare_grid(const AttentionBackward& call) {
  const int rows = max(padded(call.query_count), cosine ? padded(call.key_count) : 0);
  return dim3(rows / (kThreads / (width / 8)), call.heads + (cosine ? call.key_heads : 0), call.batch);
}

// ---- What the keys and the queries kernel share ----

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

// ---- Keys: a block for every 64 keys (x), key head (y) and row of the batch (z) ----

// The first tile of queries some of which see a key from first_key on; limits never decrease.
template <int rows>
DEVICE int first_tile_that_sees(const AttentionBackward& call, int first_key) {
  int first = 0, end = (call.query_count + rows - 1) / rows;
  while (first < end) {
    const int middle = (first + end) / 2;
    if (call.limits[min((middle + 1) * rows, call.query_count) - 1] > first_key) {
      end = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

template <Format format, int width, bool cosine>
__global__ void __launch_bounds__(kThreads, AttentionBackwardShared<width>::blocks_per_multiprocessor)
    attention_backward_keys(AttentionBackward call) {
  using Shared = AttentionBackwardShared<width>;
  constexpr int walked_rows = Shared::walked_rows;
  const Shared shared{shared_memory()};
  const Tile<width> keys = shared.kept(0), values = shared.kept(1);
  const int batch = blockIdx.z, key_head = blockIdx.y, share = call.heads / call.key_heads;
  // The first keys are seen by most queries: no long block is left over at the end.
  const int first_key = blockIdx.x * kRows;
  const int first_tile = first_tile_that_sees<walked_rows>(call, first_key);
  const int tiles = (call.query_count + walked_rows - 1) / walked_rows - first_tile;  // of a head; 0: nobody sees them
  const int steps = share * tiles;                                                    // head after head

  const auto head_of = [&](int step) { return key_head * share + step / tiles; };
  const auto load_queries = [&](int step) {
    const int stage = step % 2, head = head_of(step), first_query = (first_tile + step % tiles) * walked_rows;
    load_rows<walked_rows, kThreads>(shared.walked(0, stage), call.queries.tokens(batch, head),
                                     call.queries.token_stride, first_query, call.query_count);
    load_rows<walked_rows, kThreads>(shared.walked(1, stage), call.d_output.tokens(batch, head),
                                     call.d_output.token_stride, first_query, call.query_count);
    if (threadIdx.x < walked_rows) {
      cp_async_16(shared.query_numbers(stage) + threadIdx.x, numbers_of(call, batch, head) + first_query + threadIdx.x,
                  true);
    }
  };
  load_rows<kRows, kThreads>(keys, call.keys.tokens(batch, key_head), call.keys.token_stride, first_key,
                             call.key_count);
  load_rows<kRows, kThreads>(values, call.values.tokens(batch, key_head), call.values.token_stride, first_key,
                             call.key_count);
  if (steps > 0) load_queries(0);
  cp_async_commit();

  float inverse_lengths[2] = {1, 1};
  if constexpr (cosine) {
    const float* of_block = key_inverse_lengths_of(call, batch, key_head) + first_key;
    for (int half = 0; half < 2; ++half) inverse_lengths[half] = of_block[16 * warp() + row_of(half)];
  }
  float d_keys[width / 8][4] = {}, d_values[width / 8][4] = {};
  cp_async_wait<0>();  // this thread's part of the keys, and of the first queries, is here
  __syncthreads();     // that of the other threads, too: all the keys
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2;
    const Tile<width> queries = shared.walked(0, stage), d_output = shared.walked(1, stage);
    const QueryNumbers* numbers = shared.query_numbers(stage);
    const float head_scale = cosine ? call.head_scales[head_of(step)] : call.scale;

    float weights[walked_rows / 8][4] = {};  // rows are keys, columns are queries
    multiply<format>(weights, keys, queries);
#pragma unroll
    for (int eight = 0; eight < walked_rows / 8; ++eight) {
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        const QueryNumbers& query = numbers[8 * eight + column_of(element)];
        const float factor = cosine ? head_scale * kLog2E * query.inverse_length : head_scale * kLog2E;
        const float product = weights[eight][element] * inverse_lengths[half_of(element)];
        weights[eight][element] = exp2_approx(fmaf(product, factor, -query.log_sum_exp));
      }
    }
    if (numbers[0].limit < first_key + kRows) {  // limits never decrease
      const int warp_key = first_key + 16 * warp();
      hide(weights, [&](int half, int column) { return warp_key + row_of(half) < numbers[column].limit; });
    }
    // Not as the first thing of a step: on sm_100 some registers would spill. Three of the step's four products are
    // left to compute while the copies are on their way.
    if (step + 1 < steps) load_queries(step + 1);
    cp_async_commit();
    multiply_by_columns<format>(d_values, weights, d_output);

    float d_logits[walked_rows / 8][4] = {};
    multiply<format>(d_logits, values, d_output);
#pragma unroll
    for (int eight = 0; eight < walked_rows / 8; ++eight) {
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        const QueryNumbers& query = numbers[8 * eight + column_of(element)];
        float& number = d_logits[eight][element];
        number = weights[eight][element] * (number - query.delta);
        if constexpr (cosine) number *= head_scale * finite<format>(query.inverse_length);
      }
    }
    multiply_by_columns<format>(d_keys, d_logits, queries);
    cp_async_wait<0>();  // this thread's part of the next queries is here
    __syncthreads();     // everybody's is, and everybody is done with these queries: their stage is free
  }

  if constexpr (cosine) {
    float along[2];
    unnormalize<format>(d_keys, along, keys, inverse_lengths);
  }
  uint16_t *keys_to = call.d_keys.tokens(batch, key_head), *values_to = call.d_values.tokens(batch, key_head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + 16 * warp() + row_of(half);
    if (key < call.key_count) {
      store_row<format>(keys_to + key * call.d_keys.token_stride, d_keys, half, cosine ? 1.0f : call.scale);
      store_row<format>(values_to + key * call.d_values.token_stride, d_values, half, 1.0f);
    }
  }
}

inline dim3 attention_backward_keys_grid(const AttentionBackward& call) {
  return dim3(padded(call.key_count) / kRows, call.key_heads, call.batch);
}

// ---- Queries: a block for every 64 queries (x), head (y) and row of the batch (z) ----

template <Format format, int width, bool cosine>
__global__ void __launch_bounds__(kThreads, AttentionBackwardShared<width>::blocks_per_multiprocessor)
    attention_backward_queries(AttentionBackward call) {
  using Shared = AttentionBackwardShared<width>;
  constexpr int walked_rows = Shared::walked_rows;
  const Shared shared{shared_memory()};
  const Tile<width> queries = shared.kept(0), d_output = shared.kept(1);
  const int batch = blockIdx.z, head = blockIdx.y, key_head = head / (call.heads / call.key_heads);
  // The last queries see the most keys: no long block is left over at the end.
  const int first_query = (gridDim.x - 1 - blockIdx.x) * kRows;
  const int all_see = call.limits[first_query];  // limits never decrease
  const int last_sees = call.limits[min(first_query + kRows, call.query_count) - 1];
  const int some_see = min(last_sees, call.key_count);  // should limits be wrong, nothing beyond the keys is read
  const int tiles = (some_see + walked_rows - 1) / walked_rows;

  const auto load_keys = [&](int tile) {
    const int stage = tile % 2, first_key = tile * walked_rows;
    load_rows<walked_rows, kThreads>(shared.walked(0, stage), call.keys.tokens(batch, key_head),
                                     call.keys.token_stride, first_key, call.key_count);
    load_rows<walked_rows, kThreads>(shared.walked(1, stage), call.values.tokens(batch, key_head),
                                     call.values.token_stride, first_key, call.key_count);
    if (cosine && threadIdx.x < walked_rows / 4) {
      cp_async_16(shared.key_inverse_lengths(stage) + 4 * threadIdx.x,
                  key_inverse_lengths_of(call, batch, key_head) + first_key + 4 * threadIdx.x, true);
    }
  };
  load_rows<kRows, kThreads>(queries, call.queries.tokens(batch, head), call.queries.token_stride, first_query,
                             call.query_count);
  load_rows<kRows, kThreads>(d_output, call.d_output.tokens(batch, head), call.d_output.token_stride, first_query,
                             call.query_count);
  load_keys(0);
  cp_async_commit();

  const QueryNumbers* of_block = numbers_of(call, batch, head) + first_query + 16 * warp();
  const QueryNumbers numbers[2] = {of_block[row_of(0)], of_block[row_of(1)]};
  const float inverse_lengths[2] = {numbers[0].inverse_length, numbers[1].inverse_length};
  const float head_scale = cosine ? call.head_scales[head] : call.scale;
  float factors[2] = {head_scale * kLog2E, head_scale * kLog2E};
  if constexpr (cosine) {
    factors[0] *= inverse_lengths[0];
    factors[1] *= inverse_lengths[1];
  }
  float d_queries[width / 8][4] = {};
  cp_async_wait<0>();  // this thread's part of the queries, and of the first keys, is here
  __syncthreads();     // that of the other threads, too: all the queries
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % 2, first_key = tile * walked_rows;
    if (tile + 1 < tiles) load_keys(tile + 1);
    cp_async_commit();
    const Tile<width> keys = shared.walked(0, stage), values = shared.walked(1, stage);
    const float* key_inverse_lengths = shared.key_inverse_lengths(stage);

    float weights[walked_rows / 8][4] = {};  // rows are queries, columns are keys
    multiply<format>(weights, queries, keys);
#pragma unroll
    for (int eight = 0; eight < walked_rows / 8; ++eight) {
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        const int column = 8 * eight + column_of(element);
        float factor = factors[half_of(element)];
        if constexpr (cosine) factor *= key_inverse_lengths[column];
        float& number = weights[eight][element];
        number = exp2_approx(fmaf(number, factor, -numbers[half_of(element)].log_sum_exp));
      }
    }
    if (first_key + walked_rows > all_see) {
      hide(weights, [&](int half, int column) { return first_key + column < numbers[half].limit; });
    }

    float d_logits[walked_rows / 8][4] = {};
    multiply<format>(d_logits, d_output, values);
#pragma unroll
    for (int eight = 0; eight < walked_rows / 8; ++eight) {
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        float& number = d_logits[eight][element];
        number = weights[eight][element] * (number - numbers[half_of(element)].delta);
        if constexpr (cosine) number *= finite<format>(key_inverse_lengths[8 * eight + column_of(element)]);
      }
    }
    multiply_by_columns<format>(d_queries, d_logits, keys);
    cp_async_wait<0>();  // this thread's part of the next keys is here
    __syncthreads();     // everybody's is, and everybody is done with these keys: their stage is free
  }

  if constexpr (cosine) {
    float along[2];
    unnormalize<format>(d_queries, along, queries, inverse_lengths);
    float sum = along[0] + along[1];  // of queries that do not exist: 0
    for (int mask = 4; mask < 32; mask *= 2) sum += shfl_xor(sum, mask);  // lanes of a quad hold the same
    const int parts = padded(call.query_count) / 16;
    float* to = call.head_scale_parts + (int64_t(head) * call.batch + batch) * parts;
    if (lane() == 0) to[first_query / 16 + warp()] = sum;
  }
  uint16_t* queries_to = call.d_queries.tokens(batch, head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first_query + 16 * warp() + row_of(half);
    if (query < call.query_count) {
      store_row<format>(queries_to + query * call.d_queries.token_stride, d_queries, half, head_scale);
    }
  }
}

inline dim3 attention_backward_queries_grid(const AttentionBackward& call) {
  return dim3(padded(call.query_count) / kRows, call.heads, call.batch);
}

// ---- Head scales: a warp for every head (x) ----

constexpr int kHeadScaleThreads = 32;

template <int threads>
__global__ void __launch_bounds__(threads) attention_backward_head_scales(AttentionBackward call) {
  const int head = blockIdx.x, parts = call.batch * padded(call.query_count) / 16;
  const float* of_head = call.head_scale_parts + int64_t(head) * parts;
  float sum = 0;
  for (int i = threadIdx.x; i < parts; i += threads) sum += of_head[i];
  sum = sum_over<threads>(sum);
  if (threadIdx.x == 0) call.d_head_scales[head] = sum;
}

}  // namespace vargpt
