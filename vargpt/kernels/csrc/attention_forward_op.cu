// The op vargpt::attention_forward.
#include "op_inputs.cuh"
// Kernels come after torch: where g++ compiles them, names like threadIdx are macros from here on.
#include "attention_forward.cuh"

namespace vargpt {

const char* launch_attention_forward(const AttentionForward& call, Format format, int batch, int width, bool cosine,
                                     void* stream);

// Output and log-sum-exp.
std::tuple<Tensor, Tensor> attention_forward_op(Tensor queries, Tensor keys, Tensor values, Tensor limits,
                                                std::optional<Tensor> head_scales, double scale) {
  const char* name = "attention_forward";
  const Checks check(name);
  check_attention_inputs(check, queries, keys, values, limits, head_scales);

  const Device device(queries);
  const int64_t batch = queries.size(0), heads = queries.size(1), count = queries.size(2);
  const Tensor output = new_vectors(queries, heads, count), log_sum_exp = new_floats(queries, {batch, heads, count});
  AttentionForward call;
  call.queries = view_to_read(queries);
  call.keys = view_to_read(keys);
  call.values = view_to_read(values);
  call.output = view_to_write(output);
  call.log_sum_exp = numbers_to_write<float>(log_sum_exp);
  call.limits = numbers_to_read<int>(limits);
  call.head_scales = head_scales ? numbers_to_read<float>(*head_scales) : nullptr;
  call.scale = float(scale);
  call.heads = int(heads);
  call.key_heads = int(keys.size(1));
  call.query_count = int(count);
  call.key_count = int(keys.size(2));
  check_launch(name, launch_attention_forward(call, format_of(queries), int(batch), int(queries.size(3)),
                                              head_scales.has_value(), device.stream()));
  return {output, log_sum_exp};
}

REGISTER_OP("attention_forward", attention_forward_op)

}  // namespace vargpt
