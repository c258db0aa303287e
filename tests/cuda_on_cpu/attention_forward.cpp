// The forward kernel on a CPU. FORMAT, WIDTH and COSINE say which of its instantiations.
#include "attention_forward.cuh"

using namespace vargpt;

extern "C" int attention_forward_on_cpu(const AttentionForward* call, int batch, uint64_t seed) {
  return cuda_on_cpu::launch(attention_forward<Format::FORMAT, WIDTH, COSINE>, *call,
                             attention_forward_grid(*call, batch), dim3(kThreads),
                             AttentionForwardShared<WIDTH>::bytes, seed);
}
