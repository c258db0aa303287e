// One of the backward kernels as PTX; KERNEL is its name, with template arguments.
#include "attention_backward.cuh"

namespace vargpt {
template __global__ void KERNEL(AttentionBackward);
}
