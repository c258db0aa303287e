// What kernel source sees where g++ compiles it in the place of nvcc: CUDA's keywords, and declarations.
//
// All bodies lie in files that are compiled apart (runtime.cpp, checker.cpp, instructions.cpp), without
// -fsanitize=thread, so that the compiler's hooks fire at the memory accesses of kernels, and at no others.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace cuda_on_cpu {

// ---- What a thread asks of the machine ----
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
char* shared_memory();
void syncthreads();
void syncwarp();

// ---- Instructions (the other body of csrc/ptx.cuh) ----
void cp_async_16(void* to, const void* from, bool exists);
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix_x4(uint32_t* matrices, const void* row, bool transposed);
void mma_16x8x16(float* sums, const uint32_t* left, uint32_t right_upper, uint32_t right_lower, bool fp16);
float shfl_xor(float value, int mask);
uint32_t pack(float first, float second, bool fp16);
float2 unpack(uint32_t pair, bool fp16);
float exp2_approx(float x);
float log2_approx(float x);

// ---- Launching ----
// Runs `body(call)` once for every thread of every block; returns the number of reports. A seed of 0 runs threads and
// blocks in a fixed order, any other in a random one.
int run_grid(void (*body)(const void*), const void* call, dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed);

template <class Call>
struct Launch {
  void (*kernel)(Call);
  Call call;
};

template <class Call>
__attribute__((no_sanitize("thread"))) void run_thread(const void* launch) {
  const auto* typed = static_cast<const Launch<Call>*>(launch);
  typed->kernel(typed->call);
}

template <class Call>
__attribute__((no_sanitize("thread"))) int launch(void (*kernel)(Call), const Call& call, dim3 grid, dim3 block,
                                                  size_t shared_bytes, uint64_t seed) {
  const Launch<Call> launch{kernel, call};
  return run_grid(run_thread<Call>, &launch, grid, block, shared_bytes, seed);
}

}  // namespace cuda_on_cpu

// Memory that the next launch may read, or write too; and the last launch's reports, a line each.
extern "C" void cuda_on_cpu_tensor(const void* data, size_t bytes, int writable);
extern "C" const char* cuda_on_cpu_reports();

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define blockDim (cuda_on_cpu::block_size())
#define gridDim (cuda_on_cpu::grid_size())
#define __syncthreads() cuda_on_cpu::syncthreads()
#define __syncwarp() cuda_on_cpu::syncwarp()
