// The op vargpt::attention_backward.
#include "op_inputs.cuh"
// Kernels come after torch: where g++ compiles them, names like threadIdx are macros from here on.
#include "attention_backward.cuh"

namespace vargpt {

const char* launch_attention_backward(const AttentionBackward& call, Format format, int width, bool cosine,
                                      void* stream);

// The gradients of queries, keys, values and head scales; without these, the last one is empty. Takes what
// attention_forward took and gave, and the gradient of its output.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_op(Tensor d_output, Tensor queries, Tensor keys,
                                                                 Tensor values, Tensor limits,
                                                                 std::optional<Tensor> head_scales, double scale,
                                                                 Tensor output, Tensor log_sum_exp) {
  const char* name = "attention_backward";
  const Checks check(name);
  check_attention_inputs(check, queries, keys, values, limits, head_scales);
  const int64_t batch = queries.size(0), heads = queries.size(1), count = queries.size(2), width = queries.size(3);
  const int64_t key_heads = keys.size(1), key_count = keys.size(2);
  check.require(heads + key_heads <= kMostBlocks, "queries and keys have ", heads, " and ", key_heads,
                " heads, and at most ", kMostBlocks, " together can be computed at once: split them");
  const int64_t rows = padded(int(count));
  check.require(batch * rows < int64_t(1) << 31, "queries has ", batch, " times ", count,
                " tokens, and at most 2147483647 can be computed at once: split the batch");
  check.like("d_output", d_output, "queries", queries);
  check.like("output", output, "queries", queries);
  check.floats("log_sum_exp", log_sum_exp, {batch, heads, count}, "queries", queries);

  const Device device(queries);
  const Tensor d_queries = new_vectors(queries, heads, count);
  const Tensor d_keys = new_vectors(keys, key_heads, key_count), d_values = new_vectors(values, key_heads, key_count);
  const int64_t of_cosine = head_scales ? 1 : 0;  // what is only there with head scales is empty without
  const Tensor d_head_scales = new_floats(queries, {of_cosine * heads});
  const Tensor query_numbers = new_floats(queries, {batch, heads, rows, 4});
  const Tensor key_inverse_lengths = new_floats(queries, {of_cosine * batch, key_heads, padded(int(key_count))});
  const Tensor head_scale_parts = new_floats(queries, {of_cosine * heads, batch, rows / 16});

  AttentionBackward call;
  call.queries = view_to_read(queries);
  call.keys = view_to_read(keys);
  call.values = view_to_read(values);
  call.output = view_to_read(output);
  call.d_output = view_to_read(d_output);
  call.d_queries = view_to_write(d_queries);
  call.d_keys = view_to_write(d_keys);
  call.d_values = view_to_write(d_values);
  call.log_sum_exp = numbers_to_read<float>(log_sum_exp);
  call.limits = numbers_to_read<int>(limits);
  call.head_scales = head_scales ? numbers_to_read<float>(*head_scales) : nullptr;
  call.d_head_scales = numbers_to_write<float>(d_head_scales);
  call.query_numbers = reinterpret_cast<QueryNumbers*>(numbers_to_write<float>(query_numbers));
  call.key_inverse_lengths = numbers_to_write<float>(key_inverse_lengths);
  call.head_scale_parts = numbers_to_write<float>(head_scale_parts);
  call.scale = float(scale);
  call.batch = int(batch);
  call.heads = int(heads);
  call.key_heads = int(key_heads);
  call.query_count = int(count);
  call.key_count = int(key_count);
  check_launch(name, launch_attention_backward(call, format_of(queries), int(width), head_scales.has_value(),
                                               device.stream()));
  return {d_queries, d_keys, d_values, d_head_scales};
}

REGISTER_OP("attention_backward", attention_backward_op)

}  // namespace vargpt
