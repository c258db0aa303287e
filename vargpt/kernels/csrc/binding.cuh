// What the ops share: tensors of torch, checked, and turned into what kernels take.
//
// Only LibTorch's stable ABI is used: one build serves every later torch and every Python. An op's schema, and what
// autograd and torch.compile know of it, are in ../cuda.py.
//
// A check's text names the op, the argument, the bad value, and what to do. It becomes a ValueError.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "launch.cuh"
#include "tiles.cuh"

// nvcc builds the kernels for GPUs, g++ those that the tests run on CPUs. Without the latter, a tensor on a CPU still
// reaches the op: its first check says what to do.
#ifdef __CUDACC__
#define REGISTER_OP(name, function)                                                              \
  STABLE_TORCH_LIBRARY_IMPL(vargpt, CUDA, library) { library.impl(name, TORCH_BOX(&function)); } \
  STABLE_TORCH_LIBRARY_IMPL(vargpt, CPU, library) { library.impl(name, TORCH_BOX(&function)); }
#else
#define REGISTER_OP(name, function) \
  STABLE_TORCH_LIBRARY_IMPL(vargpt, CPU, library) { library.impl(name, TORCH_BOX(&function)); }
#endif

namespace vargpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where an op's kernels run. Until it is destroyed, the device of a tensor is the current one, and kernels belong on
// torch's current stream there.
class Device {
 public:
#ifdef __CUDACC__
  static constexpr const char* kind = "cuda";
  static bool has(const Tensor& tensor) { return tensor.is_cuda(); }
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#else
  static constexpr const char* kind = "cpu";
  static bool has(const Tensor& tensor) { return tensor.is_cpu(); }
  explicit Device(const Tensor&) { lent.clear(); }  // what other ops had
#endif
  void* stream() const { return stream_; }

 private:
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// What messages print; nothing is spelled out before there is something to say.
struct Shape {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    const char* between = "[";
    for (int64_t size : shape.tensor.sizes()) out << between << size, between = ", ";
    return out << (shape.tensor.dim() ? "]" : "[]");
  }
};

struct Place {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& out, const Place& place) {
    if (place.tensor.is_cuda()) return out << "cuda:" << place.tensor.get_device_index();
    return out << (place.tensor.is_cpu() ? "cpu" : "a device of another kind");
  }
};

inline bool in_one_place(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// The memory from a tensor's first number to its last, in bytes.
struct Span {
  const char *begin, *end;
};

inline Span span_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return {nullptr, nullptr};
  int64_t numbers = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) numbers += (tensor.size(axis) - 1) * tensor.stride(axis);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + numbers * int64_t(tensor.element_size())};
}

// ---- Checks of one op ----

constexpr int64_t kMostBlocks = 65535;    // of a grid, along y and z: rows of a batch, heads
constexpr int64_t kMostTokens = 1 << 30;  // tokens are counted in int; numbers in memory, in 64 bits
constexpr int64_t kChunk = 16;            // bytes that kernels copy at once
constexpr int64_t kChunkNumbers = kChunk / 2;

class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  template <class... Parts>
  void require(bool fine, const Parts&... parts) const {
    if (!fine) throw std::invalid_argument(join(op_, ": ", parts...));
  }

  // The tensor that says where everything is: on a device of the kind that kernels were built for.
  void device(const char* name, const Tensor& tensor) const {
    require(Device::has(tensor), name, " is on ", Place{tensor}, ", and these kernels run on ", Device::kind,
            " only: move it there, or call vargpt.kernels.attention, which finds a backend for every device");
  }

  void same_device(const char* name, const Tensor& tensor, const char* of, const Tensor& first) const {
    require(in_one_place(tensor, first), name, " is on ", Place{tensor}, ", but ", of, " on ", Place{first},
            ": move it there");
  }

  void type(const char* name, const Tensor& tensor, ScalarType type) const {
    require(tensor.scalar_type() == type, name, " holds ", toString(tensor.scalar_type()), ", not ", toString(type),
            ": convert it with .to()");
  }

  void shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) const {
    const auto has = tensor.sizes();
    if (std::equal(has.begin(), has.end(), sizes.begin(), sizes.end())) return;
    std::string expected;
    for (int64_t size : sizes) expected += join(expected.empty() ? "" : ", ", size);
    require(false, name, " has shape ", Shape{tensor}, ", and must have [", expected, "]");
  }

  // Floats that kernels count through.
  void floats(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* of,
              const Tensor& first) const {
    same_device(name, tensor, of, first);
    type(name, tensor, ScalarType::Float);
    shape(name, tensor, sizes);
    contiguous(name, tensor);
  }

  // Vectors, as many and of the same kind as others that were checked.
  void like(const char* name, const Tensor& tensor, const char* of, const Tensor& first) const {
    same_device(name, tensor, of, first);
    type(name, tensor, first.scalar_type());
    vectors(name, tensor);
    shape(name, tensor, {first.size(0), first.size(1), first.size(2), first.size(3)});
  }

  // A cache of keys or values, of which `past` tokens are there, and which has room for `count` more. Kernels write to
  // it: no number may lie in two places, and nothing else where it lies.
  void cache(const char* name, const Tensor& tensor, int64_t past, const char* of, const Tensor& fresh) const {
    same_device(name, tensor, of, fresh);
    type(name, tensor, fresh.scalar_type());
    vectors(name, tensor);
    shape(name, tensor, {fresh.size(0), fresh.size(1), tensor.size(2), fresh.size(3)});
    require(past >= 0, "past is ", past, ": give the number of tokens in the cache");
    require(past <= tensor.size(2) - fresh.size(2), name, " has room for ", tensor.size(2), " tokens, and ", past,
            " and ", fresh.size(2), " are too many: make a longer cache");
    std::pair<int64_t, int64_t> axes[3];  // stride, size
    for (int64_t axis = 0; axis < 3; ++axis) axes[axis] = {tensor.stride(axis), tensor.size(axis)};
    std::sort(axes, axes + 3);
    int64_t end = tensor.size(3);
    for (const auto& [stride, size] : axes) {
      if (size == 1) continue;
      require(stride >= end, name, " has a stride of ", stride, ", so that numbers lie in the same place: ",
              "call .clone(memory_format=torch.contiguous_format)");
      end = stride * size;
    }
  }

  void apart(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) const {
    const Span mine = span_of(tensor), its = span_of(other);
    require(mine.end <= its.begin || its.end <= mine.begin, name, " and ", other_name,
            " lie in the same memory: call .clone() on one of them");
  }

  void contiguous(const char* name, const Tensor& tensor) const {
    require(tensor.is_contiguous(), name, " does not lie in memory without gaps: call .contiguous()");
  }

  void aligned(const char* name, const Tensor& tensor, int64_t bytes) const {
    const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    require(address % bytes == 0, name, " begins ", address % bytes, " bytes off a multiple of ", bytes,
            ": call .clone()");
  }

  void has_format(const char* name, const Tensor& tensor) const {
    const ScalarType type = tensor.scalar_type();
    require(type == ScalarType::BFloat16 || type == ScalarType::Half, name, " holds ", toString(type),
            ", and kernels take BFloat16 or Half: convert it with .bfloat16() or .half()");
  }

  // [batch, head, token, width]: vectors of 64 or 128 numbers, each a row of whole chunks.
  void vectors(const char* name, const Tensor& tensor) const {
    require(tensor.dim() == 4, name, " has shape ", Shape{tensor},
            ", and must have four axes: batch, head, token, width");
    require(tensor.numel() > 0, name, " has shape ", Shape{tensor}, ", and must hold something");
    const int64_t width = tensor.size(3);
    require(width == 64 || width == 128, name, " has vectors of ", width,
            " numbers, and kernels are built for 64 and 128: call vargpt.kernels.attention, which takes every width");
    require(tensor.size(0) <= kMostBlocks, name, " has ", tensor.size(0), " rows, and at most ", kMostBlocks,
            " can be computed at once: split the batch");
    require(tensor.size(1) <= kMostBlocks, name, " has ", tensor.size(1), " heads, and at most ", kMostBlocks,
            " can be computed at once: split them");
    require(tensor.size(2) <= kMostTokens, name, " has ", tensor.size(2), " tokens, and at most ", kMostTokens,
            " are counted: split them");
    require(tensor.stride(3) == 1, name, " has vectors whose numbers lie ", tensor.stride(3),
            " apart, not side by side: call .contiguous()");
    aligned(name, tensor, kChunk);
    for (int64_t axis = 0; axis < 3; ++axis) {
      require(tensor.size(axis) == 1 || tensor.stride(axis) % kChunkNumbers == 0, name, " has a stride of ",
              tensor.stride(axis), " along axis ", axis, ", not a multiple of ", kChunkNumbers,
              ": call .clone(memory_format=torch.contiguous_format)");
    }
  }

 private:
  const char* op_;
};

// ---- What kernels take ----

inline Format format_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 ? Format::bf16 : Format::fp16;
}

inline void lend(const Tensor& tensor, bool writable) {
#ifdef __CUDACC__
  (void)tensor, (void)writable;
#else
  const Span memory = span_of(tensor);
  lent.push_back({memory.begin, size_t(memory.end - memory.begin), writable});
#endif
}

inline View<const uint16_t> view_to_read(const Tensor& tensor) {
  lend(tensor, false);
  return {static_cast<const uint16_t*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline View<uint16_t> view_to_write(const Tensor& tensor) {
  lend(tensor, true);
  return {static_cast<uint16_t*>(tensor.mutable_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The numbers of a contiguous tensor.
template <class Number>
const Number* numbers_to_read(const Tensor& tensor) {
  lend(tensor, false);
  return static_cast<const Number*>(tensor.const_data_ptr());
}

template <class Number>
Number* numbers_to_write(const Tensor& tensor) {
  lend(tensor, true);
  return static_cast<Number*>(tensor.mutable_data_ptr());
}

// New vectors [batch, head, token, width] that lie in memory as [batch, token, head, width]: as the projection that
// comes next, or came before, wants them.
inline Tensor new_vectors(const Tensor& like, int64_t heads, int64_t tokens) {
  return torch::stable::transpose(torch::stable::new_empty(like, {like.size(0), tokens, heads, like.size(3)}), 1, 2);
}

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

// What launching says becomes an error, if anything went wrong.
inline void check_launch(const char* op, const char* error) {
  if (error) throw std::runtime_error(join(op, ": ", error));
}

}  // namespace vargpt
