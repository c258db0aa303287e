// Checks of what several ops take, and what of it their kernels take alike.
#pragma once

#include "binding.cuh"

namespace vargpt {

// On a GPU the limits' values are not looked at, since that would mean to wait for it: kernels stay within the keys
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

// Queries, and the keys and values of as many rows; key heads are shared evenly.
inline void check_queries_and_keys(const Checks& check, const Tensor& queries, const char* keys_name,
                                   const Tensor& keys, const char* values_name, const Tensor& values) {
  check.device("queries", queries);
  check.has_format("queries", queries);
  check.vectors("queries", queries);
  check.same_device(keys_name, keys, "queries", queries);
  check.type(keys_name, keys, queries.scalar_type());
  check.vectors(keys_name, keys);
  check.shape(keys_name, keys, {queries.size(0), keys.size(1), keys.size(2), queries.size(3)});
  check.like(values_name, values, keys_name, keys);
  check.require(queries.size(1) % keys.size(1) == 0, "queries has ", queries.size(1), " heads, and ", keys_name, " ",
                keys.size(1),
                ": query heads share key heads evenly, so the first number must be a multiple of the second");
}

// What attention over the first keys takes, forward and backward alike.
inline void check_attention_inputs(const Checks& check, const Tensor& queries, const Tensor& keys,
                                   const Tensor& values, const Tensor& limits,
                                   const std::optional<Tensor>& head_scales) {
  check_queries_and_keys(check, queries, "keys", keys, "values", values);
  check.same_device("limits", limits, "queries", queries);
  check.type("limits", limits, ScalarType::Int);
  check.shape("limits", limits, {queries.size(2)});
  check.contiguous("limits", limits);
  if (limits.is_cpu()) check_limits_values(check, limits, keys.size(2));
  if (head_scales) check.floats("head_scales", *head_scales, {queries.size(1)}, "queries", queries);
}

// New tokens, and a cache to which they are appended.
inline void check_new_tokens(const Checks& check, const Tensor& queries, const Tensor& new_keys,
                             const Tensor& new_values, const Tensor& cached_keys, const Tensor& cached_values,
                             int64_t past) {
  check_queries_and_keys(check, queries, "new_keys", new_keys, "new_values", new_values);
  check.shape("new_keys", new_keys, {queries.size(0), new_keys.size(1), queries.size(2), queries.size(3)});
  check.cache("cached_keys", cached_keys, past, "new_keys", new_keys);
  check.cache("cached_values", cached_values, past, "new_keys", new_keys);
  check.apart("cached_values", cached_values, "cached_keys", cached_keys);
  for (const Tensor& cached : {cached_keys, cached_values}) {
    check.apart("queries", queries, "the cache", cached);
    check.apart("new_keys", new_keys, "the cache", cached);
    check.apart("new_values", new_values, "the cache", cached);
  }
}

// The same, and the output, as kernels take them.
template <class Call>
void set_new_tokens(Call& call, const Tensor& queries, const Tensor& new_keys, const Tensor& new_values,
                    const Tensor& cached_keys, const Tensor& cached_values, const Tensor& output) {
  call.queries = view_to_read(queries);
  call.new_keys = view_to_read(new_keys);
  call.new_values = view_to_read(new_values);
  call.cached_keys = view_to_write(cached_keys);
  call.cached_values = view_to_write(cached_values);
  call.output = view_to_write(output);
}

}  // namespace vargpt
