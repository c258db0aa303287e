// The op vargpt::decode.
#include "op_inputs.cuh"
// Kernels come after torch: where g++ compiles them, names like threadIdx are macros from here on.
#include "decode.cuh"

namespace vargpt {

Splits decode_splits(int batch, int key_heads, int past, int width);
const char* launch_decode(const Decode& call, Format format, int batch, int width, void* stream);

// Output. The cache holds `past` tokens, and then also the new one. Angles are those of every row, or one for all; the
// mask is false at keys that are hidden.
Tensor decode_op(Tensor queries, Tensor new_keys, Tensor new_values, Tensor cached_keys, Tensor cached_values,
                 int64_t past, Tensor cosines, Tensor sines, std::optional<Tensor> mask, double scale) {
  const char* name = "decode";
  const Checks check(name);
  check_new_tokens(check, queries, new_keys, new_values, cached_keys, cached_values, past);
  const int64_t batch = queries.size(0), heads = queries.size(1), width = queries.size(3), key_heads = new_keys.size(1);
  check.require(queries.size(2) == 1, "queries has ", queries.size(2),
                " tokens, and one is computed at a time: call attention_forward");
  check.require(heads / key_heads <= kMostShare, "queries has ", heads, " heads, and keys ", key_heads, ": at most ",
                kMostShare, " query heads may share a key head here: call attention_forward");
  const int64_t angles = cosines.dim() > 0 && cosines.size(0) == 1 ? 1 : batch;
  check.floats("cosines", cosines, {angles, width}, "queries", queries);
  check.floats("sines", sines, {angles, width}, "queries", queries);
  check.aligned("cosines", cosines, sizeof(float2));  // kernels read them in pairs
  check.aligned("sines", sines, sizeof(float2));
  if (mask) {
    check.same_device("mask", *mask, "queries", queries);
    check.type("mask", *mask, ScalarType::Bool);
    check.shape("mask", *mask, {batch, past + 1});
    check.contiguous("mask", *mask);
  }

  const Device device(queries);
  const Splits splits = decode_splits(int(batch), int(key_heads), int(past), int(width));
  const Tensor split_outputs = new_floats(queries, {batch, heads, splits.count, width});
  const Tensor split_sums = new_floats(queries, {batch, heads, splits.count, 2});
  const Tensor output = new_vectors(queries, heads, 1);
  Decode call;
  set_new_tokens(call, queries, new_keys, new_values, cached_keys, cached_values, output);
  call.cosines = numbers_to_read<float>(cosines);
  call.sines = numbers_to_read<float>(sines);
  call.mask = mask ? numbers_to_read<uint8_t>(*mask) : nullptr;
  call.split_outputs = numbers_to_write<float>(split_outputs);
  call.split_sums = reinterpret_cast<float2*>(numbers_to_write<float>(split_sums));
  call.angle_stride = angles == 1 ? 0 : width;
  call.mask_stride = past + 1;
  call.scale = float(scale);
  call.heads = int(heads);
  call.key_heads = int(key_heads);
  call.past = int(past);
  call.splits = splits.count;
  call.split_keys = splits.keys;
  check_launch(name, launch_decode(call, format_of(queries), int(batch), int(width), device.stream()));
  return output;
}

REGISTER_OP("decode", decode_op)

}  // namespace vargpt
