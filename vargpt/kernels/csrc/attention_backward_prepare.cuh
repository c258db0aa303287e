// The first backward kernel: what belongs to a query or a key alone. A few lanes for every query of a head or key of a
// key head (y), 16 bytes each.
#pragma once

#include "attention_backward.cuh"

namespace vargpt {

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

}  // namespace vargpt
