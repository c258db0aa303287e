// The hardware instructions that the kernels use, one thin function each.
//
// This file has two bodies. nvcc takes the first: inline PTX that every GPU from sm_80 on executes. g++ takes the second:
// the same instruction on a CPU, for the tests (tests/cuda_on_cpu/README.md). So have launch.cuh and binding.cuh, on the
// host; kernels are one text for both.
//
// Shapes and layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix". Every function that speaks of a
// warp must be called by all of its 32 lanes together.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "cuda_on_cpu.h"
#endif

#define DEVICE __device__ __forceinline__

namespace vargpt {

// The two ways to spend 16 bits on a number. Memory holds them as uint16_t, registers two at a time as uint32_t, the
// first of the two in the lower bits.
enum class Format { bf16, fp16 };

// ---- Shared memory ----

// The block's dynamic shared memory.
DEVICE char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) char dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return cuda_on_cpu::shared_memory();
#endif
}

#ifdef __CUDACC__
// The 32-bit address by which PTX knows a place in shared memory.
DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }
#endif

// Starts a copy of 16 bytes from global to shared memory that passes by the registers, or fills in zeros where there
// is nothing to copy; `from` is then not read, but must be a valid address all the same.
DEVICE void cp_async_16(void* to, const void* from, bool exists) {
#ifdef __CUDACC__
  const int bytes = exists ? 16 : 0;  // to be read; the rest of the 16 that are written is zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#else
  cuda_on_cpu::cp_async_16(to, from, exists);
#endif
}

// Makes one group of all copies that this thread has started since the last call.
DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_on_cpu::cp_async_commit();
#endif
}

// Waits until at most the newest `pending` of this thread's groups are on their way. What other threads copied is
// only known to be there after a barrier that they passed with the same promise.
template <int pending>
DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  cuda_on_cpu::cp_async_wait(pending);
#endif
}

// ---- Warp-wide instructions ----
// They are volatile so that the compiler never moves one into a branch that only some lanes take.

// Loads four 8x8 matrices of 16-bit numbers. Lane i gives the address of row i % 8 of matrix i / 8, and receives of
// each matrix the two neighbouring numbers at row lane / 4, columns 2 (lane % 4) and one more.
DEVICE void ldmatrix_x4(uint32_t (&matrices)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
#else
  cuda_on_cpu::ldmatrix_x4(matrices, row, false);
#endif
}

// The same, with each matrix transposed on the way.
DEVICE void ldmatrix_x4_transposed(uint32_t (&matrices)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
#else
  cuda_on_cpu::ldmatrix_x4(matrices, row, true);
#endif
}

// sums (16x8, float) += left (16x16) times right (16x8): one tensor-core instruction of a warp.
//
// A lane holds of `sums` rows lane / 4 (first two numbers) and lane / 4 + 8 (last two), columns 2 (lane % 4) and one
// more. `left` are four 8x8 matrices as ldmatrix_x4 gives them: top left, bottom left, top right, bottom right;
// `right` are two, upper and lower, whose rows are its columns.
template <Format format>
DEVICE void mma_16x8x16(float (&sums)[4], const uint32_t (&left)[4], uint32_t right_upper, uint32_t right_lower) {
#ifdef __CUDACC__
  if constexpr (format == Format::bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_upper), "r"(right_lower));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_upper), "r"(right_lower));
  }
#else
  cuda_on_cpu::mma_16x8x16(sums, left, right_upper, right_lower, format == Format::fp16);
#endif
}

// The value that the lane whose number differs in the bits of `mask` passes.
DEVICE float shfl_xor(float value, int mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  return cuda_on_cpu::shfl_xor(value, mask);
#endif
}

// ---- Numbers ----

// Two floats, each rounded to the nearest number of the format.
template <Format format>
DEVICE uint32_t pack(float first, float second) {
#ifdef __CUDACC__
  uint32_t pair;  // PTX names the upper half first
  if constexpr (format == Format::bf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  return cuda_on_cpu::pack(first, second, format == Format::fp16);
#endif
}

// The two numbers of a pair, exactly.
template <Format format>
DEVICE float2 unpack(uint32_t pair) {
#ifdef __CUDACC__
  float2 numbers;
  if constexpr (format == Format::bf16) {  // a bfloat16 is the upper half of a float
    numbers = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    asm("cvt.f32.f16 %0, %1;" : "=f"(numbers.x) : "h"(static_cast<uint16_t>(pair)));
    asm("cvt.f32.f16 %0, %1;" : "=f"(numbers.y) : "h"(static_cast<uint16_t>(pair >> 16)));
  }
  return numbers;
#else
  return cuda_on_cpu::unpack(pair, format == Format::fp16);
#endif
}

// 2^x to about two units in the last place; results too small for a normal float are 0.
DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return cuda_on_cpu::exp2_approx(x);
#endif
}

// The logarithm of base 2 of a normal float, to about 2^-22.
DEVICE float log2_approx(float x) {
#ifdef __CUDACC__
  float logarithm;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(logarithm) : "f"(x));
  return logarithm;
#else
  return cuda_on_cpu::log2_approx(x);
#endif
}

}  // namespace vargpt
