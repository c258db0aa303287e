// Checks of what attention over the first keys takes, forward and backward alike.
#pragma once

#include "binding.cuh"
// Kernels come after torch: where g++ compiles them, names like threadIdx are macros from here on.
#include "attention_forward.cuh"

namespace vargpt {

// On a GPU the limits' values are not looked at, since that would mean to wait for it: the kernel stays within the keys
// whatever they are.
inline void check_limits_values(const Checks& check, const Tensor& limits, int64_t key_count) {
  const int* values = static_cast<const int*>(limits.const_data_ptr());
  int before = 1;
  for (int64_t query = 0; query < limits.size(0); ++query) {
    check.require(values[query] >= before, "limits[", query, "] is ", values[query], ", and must be at least ", before,
                  ": limits are positive and never decrease");
    check.require(values[query] <= key_count, "limits[", query, "] is ", values[query], ", but there are ", key_count,
                  " keys: a query sees these at most");
    before = values[query];
  }
}

inline void check_attention_inputs(const Checks& check, const Tensor& queries, const Tensor& keys,
                                   const Tensor& values, const Tensor& limits,
                                   const std::optional<Tensor>& head_scales) {
  check.device("queries", queries);
  check.has_format("queries", queries);
  check.vectors("queries", queries);
  check.same_device("keys", keys, "queries", queries);
  check.type("keys", keys, queries.scalar_type());
  check.vectors("keys", keys);
  const int64_t batch = queries.size(0), heads = queries.size(1), count = queries.size(2), width = queries.size(3);
  check.shape("keys", keys, {batch, keys.size(1), keys.size(2), width});
  check.like("values", values, "keys", keys);
  check.require(heads % keys.size(1) == 0, "queries has ", heads, " heads, and keys ", keys.size(1),
                ": query heads share key heads evenly, so the first number must be a multiple of the second");
  check.same_device("limits", limits, "queries", queries);
  check.type("limits", limits, ScalarType::Int);
  check.shape("limits", limits, {count});
  check.contiguous("limits", limits);
  if (limits.is_cpu()) check_limits_values(check, limits, keys.size(2));
  if (head_scales) check.floats("head_scales", *head_scales, {heads}, "queries", queries);
}

}  // namespace vargpt
