// One of the two kernels for a new token as PTX. KERNEL, FORMAT and WIDTH say which of their instantiations.
#include "decode.cuh"

template __global__ void vargpt::KERNEL<vargpt::Format::FORMAT, WIDTH>(vargpt::Decode);
