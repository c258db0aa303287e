// The forward kernel on a CPU. FORMAT, WIDTH and COSINE say which of its instantiations.
#include "attention_forward.cuh"

using namespace vargpt;

struct Shape {
  dim3 grid;
  int threads, shared_bytes;
};

// What a launch takes, here and on a GPU.
extern "C" void attention_forward_shape(const AttentionForward* call, int batch, Shape* shape) {
  *shape = {attention_forward_grid(*call, batch), kThreads, AttentionForwardShared<WIDTH>::bytes};
}

extern "C" int attention_forward_on_cpu(const AttentionForward* call, int batch, uint64_t seed) {
  Shape shape;
  attention_forward_shape(call, batch, &shape);
  return cuda_on_cpu::launch(attention_forward<Format::FORMAT, WIDTH, COSINE>, *call, shape.grid, dim3(shape.threads),
                             shape.shared_bytes, seed);
}
