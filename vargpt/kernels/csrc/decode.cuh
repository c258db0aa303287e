// One new token of a language model: turns its query and key by the angles of its position, appends key and value to
// the cache, and computes softmax(scale q.k) values over the `past` tokens before it and itself.
//
// What takes the time is reading the cache. Two kernels, of one warp a block:
//
// `decode_attend` is a block for every split of the cached keys, key head and row of the batch. All query heads that
// share the key head are rows of the same tensor-core products, so that every key and value is read once. A warp works
// alone, without barriers that others take part in; it has room for one tile of keys and one of values, and while it
// computes with one of them, the other is on its way. What it finds of its split, it leaves in float in a workspace.
//
// `decode_combine` is a block for every query head and row of the batch. It takes the splits together, always in the
// same order, and with them the new token, which is in no split: a token sees itself whatever the mask says, so there
// is always something to see. Only this kernel writes to the cache, and only the first one reads it.
#pragma once

#include "attention_forward.cuh"

namespace vargpt {

constexpr int kMostShare = 16;  // the rows of a tensor-core product

// Pointers and strides of the cache: whole chunks of 16 bytes; of the other views: 4 bytes; of angles and workspace:
// 8 bytes. Nothing else may lie where the cache's row `past`, the output and the workspace lie. The workspace's numbers
// may be any; without splits there is none.
struct Decode {
  View<const uint16_t> queries;               // [batch, heads, 1, width]
  View<const uint16_t> new_keys, new_values;  // [batch, key_heads, 1, width]
  View<uint16_t> cached_keys, cached_values;  // [batch, key_heads, past + 1 or more, width]
  View<uint16_t> output;                      // as queries
  const float *cosines, *sines;               // [batch, width], the rows angle_stride apart: 0 where all are the same
  const uint8_t* mask;                        // [batch, past] or more, rows mask_stride apart; 0: hidden; null: none is
  float* split_outputs;                       // [batch, heads, splits, width]: the workspace
  float2* split_sums;                         // [batch, heads, splits]: the largest logit, in base 2, and the total
  int64_t angle_stride, mask_stride;
  float scale;
  int heads, key_heads;    // heads / key_heads query heads in succession, kMostShare at most, share a key head
  int past;                // tokens that the cache holds, from 0 on
  int splits, split_keys;  // as split_keys_of_cache says
};

template <int width>
struct DecodeShared {
  static constexpr int query_bytes = Tile<width>::bytes(kMostShare), key_bytes = Tile<width>::bytes(kKeyTile);
  static constexpr int bytes = query_bytes + 2 * key_bytes;
  static constexpr int blocks_per_multiprocessor = width == 64 ? 8 : 4;
  static_assert(blocks_per_multiprocessor * (bytes + 1024) <= 164 * 1024);  // of sm_80
  static_assert(bytes <= 48 * 1024);                                        // more must be asked for
  char* data;

  DEVICE Tile<width> queries() const { return {data}; }
  DEVICE Tile<width> keys() const { return {data + query_bytes}; }
  DEVICE Tile<width> values() const { return {data + query_bytes + key_bytes}; }
};

// ---- Positions ----

DEVICE uint32_t* pair_of(uint16_t* token, int pair) { return reinterpret_cast<uint32_t*>(token) + pair; }
DEVICE const uint32_t* pair_of(const uint16_t* token, int pair) {
  return reinterpret_cast<const uint32_t*>(token) + pair;
}

// Channels 2 pair and 2 pair + 1 of a token, turned: channel i by the angle it has in common with i + width / 2.
template <Format format, int width>
DEVICE float2 rotate(const Decode& call, int batch, const uint16_t* token, int pair) {
  const float2 own = unpack<format>(*pair_of(token, pair));
  const float2 other = unpack<format>(*pair_of(token, pair ^ width / 4));  // of the other half
  const float2 cosine = reinterpret_cast<const float2*>(call.cosines + batch * call.angle_stride)[pair];
  const float2 sine = reinterpret_cast<const float2*>(call.sines + batch * call.angle_stride)[pair];
  const float sign = pair < width / 4 ? -1.0f : 1.0f;
  return {fmaf(sign * other.x, sine.x, own.x * cosine.x), fmaf(sign * other.y, sine.y, own.y * cosine.y)};
}

// ---- The cached keys: a block for every split (x), key head (y) and row of the batch (z) ----

// Starts to copy a tile, all lanes together, a few rows at a time: the places of all at once need too many registers.
template <int width>
DEVICE void load_tile(Tile<width> tile, const uint16_t* matrix, int64_t stride, int first_row, int end) {
  constexpr int rows = 16;
#pragma unroll 1
  for (int row = 0; row < kKeyTile; row += rows) {
    const Tile<width> part{tile.at(row, 0)};  // a tile itself: its rows are swapped around as those of the whole
    load_rows<rows, 32>(part, matrix, stride, first_row + row, end);
  }
}

// The turned queries of all heads that share the key head, a row each, and zeros in the rows that remain.
template <Format format, int width>
DEVICE void load_queries(const Decode& call, Tile<width> tile, int batch, int first_head, int share) {
#pragma unroll
  for (int i = 0; i < width / 64; ++i) {
    const int pair = lane() + 32 * i;
    for (int row = 0; row < kMostShare; ++row) {
      uint32_t numbers = 0;
      if (row < share) {
        const float2 turned = rotate<format, width>(call, batch, call.queries.tokens(batch, first_head + row), pair);
        numbers = pack<format>(turned.x, turned.y);
      }
      reinterpret_cast<uint32_t*>(tile.at(row, pair / 4))[pair % 4] = numbers;
    }
  }
}

// Which of a lane's columns of a tile may be seen, a bit each: those of keys before the end that are not masked.
DEVICE uint32_t visible_columns(const uint8_t* mask, int first_key, int end_key) {
  uint32_t visible = 0;
#pragma unroll
  for (int column = 0; column < kKeyTile / 4; ++column) {
    const int key = first_key + 8 * (column / 2) + column_of(column % 2);
    if (key < end_key && (!mask || mask[key])) visible |= 1u << column;
  }
  return visible;
}

DEVICE void hide_columns(Logits& logits, uint32_t visible) {
#pragma unroll
  for (int eight = 0; eight < kKeyTile / 8; ++eight) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      if (!(visible >> (2 * eight + element % 2) & 1)) logits[eight][element] = -INFINITY;
    }
  }
}

// Where nothing is visible, the largest logit stays at this, which is less than any: the weights exp2(-inf - this) are
// 0, and so is what the split counts for.
constexpr float kNothing = -1e38f;

template <Format format, int width>
DEVICE void store_split(const Decode& call, const RunningSoftmax<width>& softmax, int batch, int first_head,
                        int share, int split) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_of(half);
    const float total = quad_sum(softmax.total[half]);
    if (row < share) {
      const int64_t place = (int64_t(batch) * call.heads + first_head + row) * call.splits + split;
#pragma unroll
      for (int eight = 0; eight < width / 8; ++eight) {
        float* to = call.split_outputs + place * width + 8 * eight + column_of(0);
        *reinterpret_cast<float2*>(to) = {softmax.output[eight][2 * half], softmax.output[eight][2 * half + 1]};
      }
      if (lane() % 4 == 0) call.split_sums[place] = {softmax.largest[half], total};
    }
  }
}

template <Format format, int width>
__global__ void __launch_bounds__(32, DecodeShared<width>::blocks_per_multiprocessor) decode_attend(Decode call) {
  const DecodeShared<width> shared{shared_memory()};
  const int batch = blockIdx.z, key_head = blockIdx.y, split = blockIdx.x;
  const int share = call.heads / call.key_heads, first_head = key_head * share;
  const int first_key = split * call.split_keys, end_key = min(first_key + call.split_keys, call.past);
  const uint8_t* mask = call.mask ? call.mask + batch * call.mask_stride : nullptr;

  const auto load = [&](Tile<width> tile, View<uint16_t> cached, int key) {
    if (key < end_key) load_tile(tile, cached.tokens(batch, key_head), cached.token_stride, key, end_key);
    cp_async_commit();  // after the last tile an empty group, so that there are always two
  };
  load(shared.keys(), call.cached_keys, first_key);
  load(shared.values(), call.cached_values, first_key);

  load_queries<format>(call, shared.queries(), batch, first_head, share);
  __syncwarp();  // every lane has written queries, and will read those of others
  uint32_t queries[width / 16][4];
#pragma unroll
  for (int step = 0; step < width / 16; ++step) load_left(queries[step], shared.queries(), 0, step);
  const float row_scales[2] = {call.scale * kLog2E, call.scale * kLog2E};

  RunningSoftmax<width> softmax;
  softmax.largest[0] = softmax.largest[1] = kNothing;
  for (int key = first_key; key < end_key; key += kKeyTile) {
    const uint32_t visible = visible_columns(mask, key, end_key);  // read while keys and values are on their way
    cp_async_wait<1>();  // this lane's part of the keys is here; values may be on their way
    __syncwarp();        // the other lanes' keys, too
    Logits logits = {};
    multiply_queries_and_keys<format>(logits, queries, shared.keys());
    __syncwarp();  // everybody is done with the keys
    load(shared.keys(), call.cached_keys, key + kKeyTile);
    scale_logits<false>(logits, row_scales, nullptr);
    hide_columns(logits, visible);
    softmax.take(logits);
    cp_async_wait<1>();  // the values are here; the next keys may be on their way
    __syncwarp();        // the other lanes' values, too
    multiply_by_columns<format>(softmax.output, logits, shared.values());
    __syncwarp();  // everybody is done with the values
    load(shared.values(), call.cached_values, key + kKeyTile);
  }
  store_split<format>(call, softmax, batch, first_head, share, split);
}

// ---- The new token, and all together: a block for every query head (x) and row of the batch (y) ----

DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

template <Format format, int width>
__global__ void __launch_bounds__(32) decode_combine(Decode call) {
  const int batch = blockIdx.y, head = blockIdx.x, share = call.heads / call.key_heads, key_head = head / share;
  const bool appends = head % share == 0;  // one block for every key head
  const uint16_t* query = call.queries.tokens(batch, head);
  const uint16_t *new_key = call.new_keys.tokens(batch, key_head), *value = call.new_values.tokens(batch, key_head);
  uint16_t* key_to = call.cached_keys.tokens(batch, key_head) + call.past * call.cached_keys.token_stride;
  uint16_t* value_to = call.cached_values.tokens(batch, key_head) + call.past * call.cached_values.token_stride;

  float2 output[width / 64];  // a lane has every 32nd pair of channels
  float product = 0;
#pragma unroll
  for (int i = 0; i < width / 64; ++i) {
    const int pair = lane() + 32 * i;
    const float2 turned_query = rotate<format, width>(call, batch, query, pair);
    const float2 turned_key = rotate<format, width>(call, batch, new_key, pair);
    const uint32_t key = pack<format>(turned_key.x, turned_key.y);
    const float2 rounded = unpack<format>(key);  // as later tokens will see it
    product = fmaf(turned_query.x, rounded.x, fmaf(turned_query.y, rounded.y, product));
    output[i] = unpack<format>(*pair_of(value, pair));
    if (appends) {
      *pair_of(key_to, pair) = key;
      *pair_of(value_to, pair) = *pair_of(value, pair);
    }
  }
  const float logit = warp_sum(product) * (call.scale * kLog2E);

  const int64_t place = (int64_t(batch) * call.heads + head) * call.splits;
  const float2* sums = call.split_sums + place;
  float largest = logit;
  for (int split = 0; split < call.splits; ++split) largest = fmaxf(largest, sums[split].x);

  float total = exp2_approx(logit - largest);
#pragma unroll
  for (int i = 0; i < width / 64; ++i) output[i] = {output[i].x * total, output[i].y * total};
  for (int split = 0; split < call.splits; ++split) {
    const float weight = exp2_approx(sums[split].x - largest);
    total = fmaf(weight, sums[split].y, total);
    const float2* numbers = reinterpret_cast<const float2*>(call.split_outputs + (place + split) * width);
#pragma unroll
    for (int i = 0; i < width / 64; ++i) {
      const float2 pair = numbers[lane() + 32 * i];
      output[i] = {fmaf(weight, pair.x, output[i].x), fmaf(weight, pair.y, output[i].y)};
    }
  }
  const float inverse = 1.0f / total;
#pragma unroll
  for (int i = 0; i < width / 64; ++i) {
    *pair_of(call.output.tokens(batch, head), lane() + 32 * i) =
        pack<format>(output[i].x * inverse, output[i].y * inverse);
  }
}

// ---- How the work is divided ----

struct Splits {
  int count, keys;  // keys of each, in whole tiles; the last one may have fewer, but has some
};

// As many splits as give all multiprocessors what they can run at the same time, but none of less than a tile.
template <int width>
Splits split_keys_of_cache(int batch, int key_heads, int past, int multiprocessors) {
  const int tiles = tiles_of(past);
  const int64_t rows = int64_t(batch) * key_heads;
  const int blocks = multiprocessors * DecodeShared<width>::blocks_per_multiprocessor;
  const int wanted = blocks > rows ? int(blocks / rows) : 1;
  const int tiles_each = tiles > wanted ? (tiles + wanted - 1) / wanted : 1;
  return {(tiles + tiles_each - 1) / tiles_each, tiles_each * kKeyTile};
}

inline dim3 decode_attend_grid(const Decode& call, int batch) { return dim3(call.splits, call.key_heads, batch); }
inline dim3 decode_combine_grid(const Decode& call, int batch) { return dim3(call.heads, batch); }

}  // namespace vargpt
