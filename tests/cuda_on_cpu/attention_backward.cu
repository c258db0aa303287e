// One of the backward kernels as PTX; KERNEL is its name, with template arguments.
#include "attention_backward_keys.cuh"
#include "attention_backward_prepare.cuh"
#include "attention_backward_queries.cuh"

namespace vargpt {
template __global__ void KERNEL(AttentionBackward);
}
