// The kernel for a new scale on a CPU. FORMAT, WIDTH and COSINE say which of its instantiations.
#include "next_scale.cuh"

using namespace vargpt;

struct Shape {
  dim3 grid;
  int threads, shared_bytes;
};

extern "C" void next_scale_shape(const NextScale* call, int batch, Shape* shape) {
  *shape = {next_scale_grid(*call, batch), kThreads, AttentionForwardShared<WIDTH>::bytes};
}

extern "C" int next_scale_on_cpu(const NextScale* call, int batch, uint64_t seed) {
  Shape shape;
  next_scale_shape(call, batch, &shape);
  return cuda_on_cpu::launch(next_scale<Format::FORMAT, WIDTH, COSINE>, *call, shape.grid, dim3(shape.threads),
                             shape.shared_bytes, seed);
}
