// The kernel for a new scale as PTX. FORMAT, WIDTH and COSINE say which of its instantiations.
#include "next_scale.cuh"

template __global__ void vargpt::next_scale<vargpt::Format::FORMAT, WIDTH, COSINE>(vargpt::NextScale);
