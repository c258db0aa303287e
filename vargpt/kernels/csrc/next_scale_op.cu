// The op vargpt::next_scale.
#include "op_inputs.cuh"
// Kernels come after torch: where g++ compiles them, names like threadIdx are macros from here on.
#include "next_scale.cuh"

namespace vargpt {

const char* launch_next_scale(const NextScale& call, Format format, int batch, int width, bool cosine, void* stream);

// Output. The cache holds `past` tokens, and then also the new ones.
Tensor next_scale_op(Tensor queries, Tensor new_keys, Tensor new_values, Tensor cached_keys, Tensor cached_values,
                     int64_t past, std::optional<Tensor> head_scales, double scale) {
  const char* name = "next_scale";
  const Checks check(name);
  check_new_tokens(check, queries, new_keys, new_values, cached_keys, cached_values, past);
  const int64_t batch = queries.size(0), heads = queries.size(1), count = queries.size(2);
  if (head_scales) check.floats("head_scales", *head_scales, {heads}, "queries", queries);

  const Device device(queries);
  const Tensor output = new_vectors(queries, heads, count);
  NextScale call;
  set_new_tokens(call, queries, new_keys, new_values, cached_keys, cached_values, output);
  call.head_scales = head_scales ? numbers_to_read<float>(*head_scales) : nullptr;
  call.scale = float(scale);
  call.heads = int(heads);
  call.key_heads = int(new_keys.size(1));
  call.past = int(past);
  call.count = int(count);
  check_launch(name, launch_next_scale(call, format_of(queries), int(batch), int(queries.size(3)),
                                       head_scales.has_value(), device.stream()));
  return output;
}

REGISTER_OP("next_scale", next_scale_op)

}  // namespace vargpt
