// How kernels are launched. Like ptx.cuh, this file has two bodies, one for nvcc, one for g++, which tests use.
#pragma once

#include <cstddef>
#include <vector>

#include "ptx.cuh"

namespace vargpt {

// Of the current device.
inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#else
  return 4;
#endif
}

#ifndef __CUDACC__
// What the kernels of an op may touch: the emulator reports every access to other memory.
struct Lent {
  const void* data;
  size_t bytes;
  bool writable;
};
inline std::vector<Lent> lent;
#endif

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
  for (const Lent& memory : lent) cuda_on_cpu_tensor(memory.data, memory.bytes, memory.writable);
  return cuda_on_cpu::launch(kernel, call, grid, dim3(threads), shared_bytes, 0) ? cuda_on_cpu_reports() : nullptr;
#endif
}

}  // namespace vargpt
