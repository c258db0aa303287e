// The backward kernel for d_queries, and the one that then adds up d_head_scales.
#pragma once

#include "attention_backward.cuh"

namespace vargpt {

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
