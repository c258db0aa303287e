// The instructions of csrc/ptx.cuh, by the layouts of the PTX ISA.
#include <cstring>

#include "machine.h"
#include "numbers.h"

namespace cuda_on_cpu {

// ---- cp.async ----
// The data is lost from sight at once and arrives as late as it may: until wait_group, NaN stands in its place.

void cp_async_16(void* to, const void* from, bool exists) {
  const void* site = __builtin_return_address(0);
  Thread& thread = *machine.current;
  const Copy copy{static_cast<char*>(to), exists ? static_cast<const char*>(from) : nullptr};
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
    report("cp.async at an address that is no multiple of 16", site);
    stop_launch();
  }
  if (copy.from) check_access(thread, copy.from, 16, false, site);
  check_access(thread, to, 16, true, site);
  check_copy_issued(copy, site);
  std::memset(to, 0xff, 16);
  thread.open_copies.push_back(copy);
  if (exists) counters.copied_bytes += 16;
}

void cp_async_commit() {
  Thread& thread = *machine.current;
  thread.groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void cp_async_wait(int pending) {
  std::deque<std::vector<Copy>>& groups = machine.current->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.from) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
      check_copy_landed(copy);
    }
  }
}

// ---- ldmatrix ----

struct LdmatrixOperands {
  uint32_t* matrices;
  const void* row;
  bool transposed;
};

// Eight rows are read at once, unless two lie on the same banks: each then costs one more pass.
int bank_conflicts(const Thread* lanes) {
  unsigned places = 0;
  for (int i = 0; i < 8; ++i) {
    const void* row = static_cast<const LdmatrixOperands*>(lanes[i].operands)->row;
    places |= 1u << (reinterpret_cast<uintptr_t>(row) / 16 % 8);
  }
  return 8 - __builtin_popcount(places);
}

void execute_ldmatrix(Thread* lanes) {
  uint16_t matrices[4][8][8];
  for (int i = 0; i < kLanes; ++i) {
    const void* row = static_cast<LdmatrixOperands*>(lanes[i].operands)->row;
    if (reinterpret_cast<uintptr_t>(row) % 16) {
      report("ldmatrix at an address that is no multiple of 16", lanes[i].site);
      stop_launch();
    }
    check_access(lanes[i], row, 16, false, lanes[i].site);
    std::memcpy(matrices[i / 8][i % 8], row, 16);
    if (i % 8 == 0) counters.bank_conflicts += bank_conflicts(lanes + i);
  }
  ++counters.ldmatrix;
  for (int i = 0; i < kLanes; ++i) {
    const auto* operands = static_cast<LdmatrixOperands*>(lanes[i].operands);
    const int row = i / 4, column = i % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const auto& matrix = matrices[m];
      const uint32_t first = operands->transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t second = operands->transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      operands->matrices[m] = first | second << 16;
    }
  }
}

void ldmatrix_x4(uint32_t* matrices, const void* row, bool transposed) {
  LdmatrixOperands operands{matrices, row, transposed};
  meet(Meeting::ldmatrix, &operands, execute_ldmatrix, __builtin_return_address(0));
}

// ---- mma.sync ----

struct MmaOperands {
  float* sums;
  const uint32_t* left;
  uint32_t right[2];
  bool fp16;
};

// Products of 16-bit numbers are exact in float; they are added one after the other, and the sum to the accumulator.
// The hardware adds in an order, and with a rounding, that NVIDIA does not state.
void execute_mma(Thread* lanes) {
  float left[16][16], right_columns[8][16];
  for (int i = 0; i < kLanes; ++i) {
    const auto* operands = static_cast<MmaOperands*>(lanes[i].operands);
    const int row = i / 4, column = i % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const float2 pair = unpack(operands->left[m], operands->fp16);
      left[row + m % 2 * 8][column + m / 2 * 8] = pair.x;
      left[row + m % 2 * 8][column + m / 2 * 8 + 1] = pair.y;
    }
    for (int m = 0; m < 2; ++m) {
      const float2 pair = unpack(operands->right[m], operands->fp16);
      right_columns[row][column + m * 8] = pair.x;
      right_columns[row][column + m * 8 + 1] = pair.y;
    }
  }
  ++counters.mma;
  for (int i = 0; i < kLanes; ++i) {
    float* sums = static_cast<MmaOperands*>(lanes[i].operands)->sums;
    for (int element = 0; element < 4; ++element) {
      const float* row = left[i / 4 + element / 2 * 8];
      const float* column = right_columns[i % 4 * 2 + element % 2];
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      sums[element] += sum;
    }
  }
}

void mma_16x8x16(float* sums, const uint32_t* left, uint32_t right_upper, uint32_t right_lower, bool fp16) {
  MmaOperands operands{sums, left, {right_upper, right_lower}, fp16};
  meet(Meeting::mma, &operands, execute_mma, __builtin_return_address(0));
}

// ---- shfl ----

struct ShuffleOperands {
  float value;
  int mask;
  float received;
};

void execute_shuffle(Thread* lanes) {
  for (int i = 0; i < kLanes; ++i) {
    auto* operands = static_cast<ShuffleOperands*>(lanes[i].operands);
    operands->received = static_cast<ShuffleOperands*>(lanes[i ^ operands->mask].operands)->value;
  }
}

float shfl_xor(float value, int mask) {
  ShuffleOperands operands{value, mask, 0};
  meet(Meeting::shuffle, &operands, execute_shuffle, __builtin_return_address(0));
  return operands.received;
}

// ---- Numbers ----

uint32_t pack(float first, float second, bool fp16) {
  if (fp16) return to_fp16(first) | uint32_t(to_fp16(second)) << 16;
  return to_bf16(first) | uint32_t(to_bf16(second)) << 16;
}

float2 unpack(uint32_t pair, bool fp16) {
  if (fp16) return {from_fp16(pair & 0xffff), from_fp16(pair >> 16)};
  return {from_bf16(pair & 0xffff), from_bf16(pair >> 16)};
}

// .ftz: numbers too small for a normal float are zero. Otherwise exact to the last place, unlike the hardware.
float exp2_approx(float x) { return x < -126 ? 0 : exp2f(x); }
float log2_approx(float x) { return log2f(x); }

}  // namespace cuda_on_cpu

// For the interpreter of PTX, which must not differ in these.
extern "C" {
void cuda_on_cpu_exp2(float* numbers, size_t count) {
  for (size_t i = 0; i < count; ++i) numbers[i] = cuda_on_cpu::exp2_approx(numbers[i]);
}
void cuda_on_cpu_log2(float* numbers, size_t count) {
  for (size_t i = 0; i < count; ++i) numbers[i] = cuda_on_cpu::log2_approx(numbers[i]);
}
}
