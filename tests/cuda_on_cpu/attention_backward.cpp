// The backward kernels on a CPU. FORMAT, WIDTH and COSINE say which of their instantiations.
#include <cstring>

#include "attention_backward_keys.cuh"
#include "attention_backward_prepare.cuh"
#include "attention_backward_queries.cuh"

using namespace vargpt;

struct Shape {
  dim3 grid;
  int threads, shared_bytes;
};

struct Kernel {
  const char* name;
  void (*function)(AttentionBackward);
  Shape shape;
};

static Kernel find(const AttentionBackward& call, const char* name) {
  constexpr int bytes = AttentionBackwardShared<WIDTH>::bytes;
  const Kernel kernels[] = {
      {"prepare", attention_backward_prepare<Format::FORMAT, WIDTH, COSINE>,
       {attention_backward_prepare_grid<WIDTH, COSINE>(call), kThreads, 0}},
      {"keys", attention_backward_keys<Format::FORMAT, WIDTH, COSINE>,
       {attention_backward_keys_grid(call), kThreads, bytes}},
      {"queries", attention_backward_queries<Format::FORMAT, WIDTH, COSINE>,
       {attention_backward_queries_grid(call), kThreads, bytes}},
      {"head_scales", attention_backward_head_scales<kHeadScaleThreads>, {dim3(call.heads), kHeadScaleThreads, 0}},
  };
  for (const Kernel& kernel : kernels) {
    if (std::strcmp(kernel.name, name) == 0) return kernel;
  }
  return {};
}

// What a launch takes, here and on a GPU.
extern "C" void attention_backward_shape(const AttentionBackward* call, const char* name, Shape* shape) {
  *shape = find(*call, name).shape;
}

extern "C" int attention_backward_on_cpu(const AttentionBackward* call, const char* name, uint64_t seed) {
  const Kernel kernel = find(*call, name);
  return cuda_on_cpu::launch(kernel.function, *call, kernel.shape.grid, dim3(kernel.shape.threads),
                             kernel.shape.shared_bytes, seed);
}
