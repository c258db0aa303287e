// The forward kernel as PTX. FORMAT, WIDTH and COSINE say which of its instantiations.
#include "attention_forward.cuh"

template __global__ void vargpt::attention_forward<vargpt::Format::FORMAT, WIDTH, COSINE>(vargpt::AttentionForward);
