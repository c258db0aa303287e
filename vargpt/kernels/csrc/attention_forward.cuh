// Attention over the first keys, forward: softmax(logits) values, and the log-sum-exp of the logits.
//
// Query i sees the first limits[i] keys: one number instead of a row of a mask. Its logits are
//     scale q.k,  or with cosine  head_scales[head] (q / |q|).(k / |k|).
//
// A block of four warps computes 64 queries of one head, 16 a warp. It walks over the keys, 64 at a time, and keeps
// for every query the largest logit so far, the total of the weights exp(logit - largest), and the weights times the
// values; when a larger logit comes, total and output shrink (FlashAttention, arXiv 2205.14135). Nothing of the size
// queries x keys is ever written. While one tile of keys and values is computed, the next one is copied.
//
// Two decisions on numbers. Lengths are divided out of the logits, not out of queries and keys: these stay as they are,
// and no rounding to 16 bits comes in between. Logits are kept in base 2, since exp2 is the hardware's exponential.
#pragma once

#include "attention.cuh"

namespace vargpt {

struct AttentionForward {
  View<const uint16_t> queries, keys, values;  // pointers and strides: whole chunks of 16 bytes
  View<uint16_t> output;
  float* log_sum_exp;        // [batch, heads, query_count], natural logarithm
  const int* limits;         // [query_count], from 1 to key_count, never decreasing
  const float* head_scales;  // [heads]; read with cosine
  float scale;               // read without
  int heads, key_heads;      // heads / key_heads query heads in succession share a key head
  int query_count, key_count;
};

constexpr int kQueryTile = kRows, kKeyTile = 64;

inline __host__ __device__ int tiles_of(int keys) { return (keys + kKeyTile - 1) / kKeyTile; }

// What a block keeps in shared memory. Keys and values have two stages: one is computed while the other is copied.
template <int width>
struct AttentionForwardShared {
  static constexpr int query_bytes = Tile<width>::bytes(kQueryTile), key_bytes = Tile<width>::bytes(kKeyTile);
  static constexpr int bytes = query_bytes + 4 * key_bytes + kKeyTile * int(sizeof(float));
  // So many fit into the 164 KiB of sm_80, of which each takes 1 KiB more than it asks for. The compiler is told, and
  // gives a thread no more registers than let as many blocks run.
  static constexpr int blocks_per_multiprocessor = width == 64 ? 3 : 2;
  static_assert(blocks_per_multiprocessor * (bytes + 1024) <= 164 * 1024);
  char* data;

  DEVICE Tile<width> queries() const { return {data}; }
  DEVICE Tile<width> keys(int stage) const { return {data + query_bytes + stage * key_bytes}; }
  DEVICE Tile<width> values(int stage) const { return {data + query_bytes + (2 + stage) * key_bytes}; }
  DEVICE float* inverse_lengths() const { return reinterpret_cast<float*>(data + query_bytes + 4 * key_bytes); }
};

// ---- Queries, and lengths ----

// 1 / |query| of a lane's two rows. Each lane of a quad holds other columns of them.
template <Format format, int steps>
DEVICE void measure_queries(float (&inverse_lengths)[2], const uint32_t (&queries)[steps][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float squares = 0;
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      squares = add_squares<format>(squares, queries[step][half]);      // left columns
      squares = add_squares<format>(squares, queries[step][half + 2]);  // right columns
    }
    inverse_lengths[half] = inverse_length(quad_sum(squares));
  }
}

// The warp's 16 queries, and what the logits of a lane's two rows are to be multiplied by, for base 2 (with cosine, the
// keys' inverse lengths come later). Any kernel's call that has a scale and head_scales.
template <Format format, bool cosine, int width, class Call>
DEVICE void read_queries(uint32_t (&queries)[width / 16][4], float (&row_scales)[2], Tile<width> tile,
                         const Call& call, int head) {
#pragma unroll
  for (int step = 0; step < width / 16; ++step) load_left(queries[step], tile, 16 * warp(), step);
  row_scales[0] = row_scales[1] = call.scale * kLog2E;
  if constexpr (cosine) {
    measure_queries<format>(row_scales, queries);
    row_scales[0] *= call.head_scales[head] * kLog2E;
    row_scales[1] *= call.head_scales[head] * kLog2E;
  }
}

// 1 / |key| of all keys of a tile, two threads a key, each of which takes every other run of four chunks: then 8
// threads in succession, whose 16-byte reads the hardware serves together, read from different banks.
template <Format format, int width>
DEVICE void measure_keys(float* inverse_lengths, Tile<width> keys) {
  static_assert(kThreads == 2 * kKeyTile, "two threads a key");
  const int key = threadIdx.x / 2, part = threadIdx.x % 2;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < Tile<width>::chunks / 2; ++i) {
    const int chunk = i / 4 * 8 + part * 4 + i % 4;
    squares = add_squares<format>(squares, *reinterpret_cast<const uint4*>(keys.at(key, chunk)));
  }
  squares += shfl_xor(squares, 1);
  if (part == 0) inverse_lengths[key] = inverse_length(squares);
}

// ---- One tile of keys ----

using Logits = float[kKeyTile / 8][4];

template <Format format, int width>
DEVICE void multiply_queries_and_keys(Logits& logits, const uint32_t (&queries)[width / 16][4], Tile<width> keys) {
#pragma unroll
  for (int step = 0; step < width / 16; ++step) multiply_by_rows<format>(logits, queries[step], keys, step);
}

template <bool cosine>
DEVICE void scale_logits(Logits& logits, const float (&row_scales)[2], const float* inverse_lengths) {
#pragma unroll
  for (int eight = 0; eight < kKeyTile / 8; ++eight) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      logits[eight][element] *= row_scales[half_of(element)];
      if constexpr (cosine) logits[eight][element] *= inverse_lengths[8 * eight + column_of(element)];
    }
  }
}

DEVICE void hide_keys(Logits& logits, const int (&limits)[2], int first_key) {
#pragma unroll
  for (int eight = 0; eight < kKeyTile / 8; ++eight) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      const int key = first_key + 8 * eight + column_of(element);
      if (key >= limits[half_of(element)]) logits[eight][element] = -INFINITY;
    }
  }
}

// The softmax so far of a lane's two rows. `total` counts the lane's own columns only, until the end.
template <int width>
struct RunningSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};
  float output[width / 8][4] = {};

  // Takes the logits of a tile in; they become its weights. Every query sees the first key, and with it one of the
  // first tile: from then on `largest` is finite, and no difference of infinities is taken.
  DEVICE void take(Logits& logits) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_largest = -INFINITY;
#pragma unroll
      for (int eight = 0; eight < kKeyTile / 8; ++eight) {
        tile_largest = fmaxf(tile_largest, fmaxf(logits[eight][2 * half], logits[eight][2 * half + 1]));
      }
      const float before = largest[half];
      largest[half] = fmaxf(before, quad_max(tile_largest));
      const float shrink = exp2_approx(before - largest[half]);

      float tile_total = 0;
#pragma unroll
      for (int eight = 0; eight < kKeyTile / 8; ++eight) {
#pragma unroll
        for (int element = 2 * half; element < 2 * half + 2; ++element) {
          logits[eight][element] = exp2_approx(logits[eight][element] - largest[half]);
          tile_total += logits[eight][element];
        }
      }
      total[half] = fmaf(total[half], shrink, tile_total);
#pragma unroll
      for (int eight = 0; eight < width / 8; ++eight) {
        output[eight][2 * half] *= shrink;
        output[eight][2 * half + 1] *= shrink;
      }
    }
  }
};

// ---- The result ----

template <Format format, int width>
DEVICE void store(const AttentionForward& call, const RunningSoftmax<width>& softmax, int batch, int head,
                  int warp_row) {
  uint16_t* output = call.output.tokens(batch, head);
  float* log_sum_exp = call.log_sum_exp + (int64_t(batch) * call.heads + head) * call.query_count;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = warp_row + row_of(half);
    const float total = quad_sum(softmax.total[half]), inverse = 1.0f / total;
    if (query < call.query_count) {
      store_row<format>(output + query * call.output.token_stride, softmax.output, half, inverse);
      if (lane() % 4 == 0) log_sum_exp[query] = (softmax.largest[half] + log2_approx(total)) * kLn2;
    }
  }
}

// ---- The kernel: a block for every 64 queries (x), head (y) and row of the batch (z) ----

template <Format format, int width, bool cosine>
__global__ void __launch_bounds__(kThreads, AttentionForwardShared<width>::blocks_per_multiprocessor)
    attention_forward(AttentionForward call) {
  const AttentionForwardShared<width> shared{shared_memory()};
  const int batch = blockIdx.z, head = blockIdx.y, key_head = head / (call.heads / call.key_heads);
  // The last queries see the most keys: with these first, no long block is left over at the end.
  const int first_query = (gridDim.x - 1 - blockIdx.x) * kQueryTile;
  const int end_query = min(first_query + kQueryTile, call.query_count);
  const int warp_row = first_query + 16 * warp();

  const auto load_keys_and_values = [&](int tile) {
    const int stage = tile % 2, first_key = tile * kKeyTile;
    load_rows<kKeyTile, kThreads>(shared.keys(stage), call.keys.tokens(batch, key_head), call.keys.token_stride,
                                  first_key, call.key_count);
    load_rows<kKeyTile, kThreads>(shared.values(stage), call.values.tokens(batch, key_head), call.values.token_stride,
                                  first_key, call.key_count);
    cp_async_commit();
  };
  load_rows<kQueryTile, kThreads>(shared.queries(), call.queries.tokens(batch, head), call.queries.token_stride,
                                  first_query, call.query_count);
  cp_async_commit();
  load_keys_and_values(0);

  int limits[2];
  for (int half = 0; half < 2; ++half) {  // rows beyond the last query go through the motions, and are not stored
    limits[half] = call.limits[min(warp_row + row_of(half), call.query_count - 1)];
  }
  // Limits never decrease. Should they be wrong, there is still a first tile, and none beyond the keys.
  const int all_see = call.limits[first_query];
  const int some_see = max(1, min(call.limits[end_query - 1], call.key_count));
  const int tiles = tiles_of(some_see);

  cp_async_wait<1>();  // the queries are here; keys and values may be on their way
  __syncthreads();     // the other threads' queries, too
  uint32_t queries[width / 16][4];
  float row_scales[2];
  read_queries<format, cosine>(queries, row_scales, shared.queries(), call, head);

  RunningSoftmax<width> softmax;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % 2;
    cp_async_wait<0>();  // this thread's part of the tile is here
    __syncthreads();     // everybody's is, and everybody is done with the tile before: its stage is free
    if (tile + 1 < tiles) load_keys_and_values(tile + 1);
    if constexpr (cosine) {
      measure_keys<format>(shared.inverse_lengths(), shared.keys(stage));
      __syncthreads();  // lengths of keys are measured by one warp and read by all
    }
    Logits logits = {};
    multiply_queries_and_keys<format>(logits, queries, shared.keys(stage));
    scale_logits<cosine>(logits, row_scales, shared.inverse_lengths());
    if ((tile + 1) * kKeyTile > all_see) hide_keys(logits, limits, tile * kKeyTile);
    softmax.take(logits);
    multiply_by_columns<format>(softmax.output, logits, shared.values(stage));
  }
  store<format>(call, softmax, batch, head, warp_row);
}

// How many blocks a launch needs.
inline dim3 attention_forward_grid(const AttentionForward& call, int batch) {
  return dim3((call.query_count + kQueryTile - 1) / kQueryTile, call.heads, batch);
}

}  // namespace vargpt
