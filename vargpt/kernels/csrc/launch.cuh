// How kernels are launched. Like ptx.cuh, this file has two bodies: nvcc takes the first, g++ (for the tests) the second.
#pragma once

#include <cstddef>

#include "ptx.cuh"

namespace vargpt {

// Enqueues a kernel on a stream (a cudaStream_t). Returns null, or what is wrong: in the words of the CUDA runtime, or
// of the emulator, which has then seen all that the kernel did.
template <class Call>
const char* launch_kernel(void (*kernel)(Call), const Call& call, dim3 grid, int threads, int shared_bytes,
                          void* stream) {
#ifdef __CUDACC__
  // More than 48 KiB of shared memory must be asked for.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(call);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  (void)stream;  // the emulator returns when all is done
  return cuda_on_cpu::launch(kernel, call, grid, dim3(threads), shared_bytes, 0) ? cuda_on_cpu_reports() : nullptr;
#endif
}

// Says that the next kernel may read these bytes, or write them, too. The emulator reports every other access.
inline void lend(const void* data, size_t bytes, bool writable) {
#ifdef __CUDACC__
  (void)data, (void)bytes, (void)writable;
#else
  cuda_on_cpu_tensor(data, bytes, writable);
#endif
}

}  // namespace vargpt
