// Attention of one new scale to everything so far, at inference: appends the new keys and values to the cache, and
// computes softmax(logits) values over old and new. Every new query sees every key. Logits, softmax and tiles are those
// of attention_forward.cuh.
//
// Blocks of one launch are ordered by nothing, so no block may read what another one writes. Old keys are read from the
// cache, new ones from where they came, and a tile of keys is of one kind or the other: where both kinds end within a
// tile, that is one tile more at most. In return a block has the new tile that it appends in shared memory, for it
// computes with it in any case: the new keys and values are not read again.
#pragma once

#include "attention_forward.cuh"

namespace vargpt {

// All pointers and strides: whole chunks of 16 bytes. Nothing else may lie where the cache's rows from `past` to
// past + count - 1 and the output lie. With cosine, the cache holds keys as they come, of any length.
struct NextScale {
  View<const uint16_t> queries;               // [batch, heads, count, width]
  View<const uint16_t> new_keys, new_values;  // [batch, key_heads, count, width]
  View<uint16_t> cached_keys, cached_values;  // [batch, key_heads, past + count or more, width]
  View<uint16_t> output;                      // as queries
  const float* head_scales;                   // [heads]; read with cosine
  float scale;                                // read without
  int heads, key_heads;  // heads / key_heads query heads in succession share a key head
  int past, count;       // tokens that the cache holds, from 0 on, and new ones, from 1 on
};

// Writes the first `count` rows of a tile to rows first_row, first_row + 1, ... of a matrix, all threads together.
template <int width>
DEVICE void append_rows(uint16_t* matrix, int64_t stride, int first_row, Tile<width> tile, int count) {
  constexpr int chunks = Tile<width>::chunks, rows_at_once = kThreads / chunks;
  const unsigned chunk = threadIdx.x % chunks;
#pragma unroll
  for (int i = 0; i < kKeyTile / rows_at_once; ++i) {
    const int row = i * rows_at_once + threadIdx.x / chunks;
    uint16_t* to = matrix + (first_row + row) * stride + 8 * chunk;
    if (row < count) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(tile.at(row, chunk));
  }
}

// Writes a lane's two rows of the output.
template <Format format, int width>
DEVICE void store_output(const NextScale& call, const RunningSoftmax<width>& softmax, int batch, int head,
                         int warp_row) {
  uint16_t* output = call.output.tokens(batch, head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = warp_row + row_of(half);
    const float inverse = 1.0f / quad_sum(softmax.total[half]);
    if (query < call.count) {
      store_row<format>(output + query * call.output.token_stride, softmax.output, half, inverse);
    }
  }
}

// ---- The kernel: a block for every 64 queries (x), head (y) and row of the batch (z) ----

template <Format format, int width, bool cosine>
__global__ void __launch_bounds__(kThreads, AttentionForwardShared<width>::blocks_per_multiprocessor)
    next_scale(NextScale call) {
  static_assert(kQueryTile == kKeyTile, "there are as many tiles of queries as of new keys");
  const AttentionForwardShared<width> shared{shared_memory()};
  const int share = call.heads / call.key_heads;
  const int batch = blockIdx.z, head = blockIdx.y, key_head = head / share;
  const int first_query = blockIdx.x * kQueryTile, warp_row = first_query + 16 * warp();
  const int old_tiles = tiles_of(call.past), tiles = old_tiles + tiles_of(call.count);
  // Every new tile is appended by one block: of the first query head, the one whose queries it goes with.
  const int mine = head % share == 0 ? old_tiles + int(blockIdx.x) : -1;

  const auto load_keys_and_values = [&](int tile) {
    const int stage = tile % 2;
    const auto load = [&](Tile<width> to, View<uint16_t> old, View<const uint16_t> fresh) {
      if (tile < old_tiles) {
        load_rows<kKeyTile, kThreads>(to, old.tokens(batch, key_head), old.token_stride, tile * kKeyTile, call.past);
      } else {
        load_rows<kKeyTile, kThreads>(to, fresh.tokens(batch, key_head), fresh.token_stride,
                                      (tile - old_tiles) * kKeyTile, call.count);
      }
    };
    load(shared.keys(stage), call.cached_keys, call.new_keys);
    load(shared.values(stage), call.cached_values, call.new_values);
    cp_async_commit();
  };
  load_rows<kQueryTile, kThreads>(shared.queries(), call.queries.tokens(batch, head), call.queries.token_stride,
                                  first_query, call.count);
  cp_async_commit();
  load_keys_and_values(0);

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
    // How many of its keys exist: all, but in the last tile of each kind.
    const int exist = tile < old_tiles ? call.past - tile * kKeyTile : call.count - (tile - old_tiles) * kKeyTile;
    Logits logits = {};
    multiply_queries_and_keys<format>(logits, queries, shared.keys(stage));
    scale_logits<cosine>(logits, row_scales, shared.inverse_lengths());
    if (exist < kKeyTile) hide_keys(logits, {exist, exist}, 0);
    softmax.take(logits);
    multiply_by_columns<format>(softmax.output, logits, shared.values(stage));
    if (tile == mine) {
      append_rows(call.cached_keys.tokens(batch, key_head), call.cached_keys.token_stride, call.past + first_query,
                  shared.keys(stage), exist);
      append_rows(call.cached_values.tokens(batch, key_head), call.cached_values.token_stride, call.past + first_query,
                  shared.values(stage), exist);
    }
  }
  store_output<format>(call, softmax, batch, head, warp_row);
}

// How many blocks a launch needs.
inline dim3 next_scale_grid(const NextScale& call, int batch) { return dim3(tiles_of(call.count), call.heads, batch); }

}  // namespace vargpt
