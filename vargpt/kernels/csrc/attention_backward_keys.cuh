// The backward kernel for d_keys and d_values: a block for every 64 keys (x), key head (y) and row of the batch (z).
#pragma once

#include "attention_backward.cuh"

namespace vargpt {

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

}  // namespace vargpt
