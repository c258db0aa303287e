// Small kernels that keep or break one rule each, for the tests of the emulator itself. Two blocks of 64 threads.
#include <cstring>

#include "ptx.cuh"

using namespace vargpt;

struct Toy {
  const float* input;  // [128]
  float* output;       // [128]
};

constexpr int kToyThreads = 64;

DEVICE float* numbers() { return reinterpret_cast<float*>(shared_memory()); }
DEVICE int me() { return threadIdx.x; }
DEVICE int everywhere() { return blockIdx.x * kToyThreads + threadIdx.x; }

// ---- Within the rules ----

__global__ void barrier_orders(Toy toy) {
  numbers()[me()] = toy.input[everywhere()];
  __syncthreads();
  toy.output[everywhere()] = numbers()[me() ^ 63];
}

__global__ void syncwarp_orders(Toy toy) {
  numbers()[me()] = toy.input[everywhere()];
  __syncwarp();
  const float other = numbers()[me() ^ 31];
  __syncwarp();
  numbers()[me()] = other;
  toy.output[everywhere()] = numbers()[me()];
}

__global__ void copies_arrive(Toy toy) {
  cp_async_16(numbers() + 4 * me(), toy.input + 4 * (me() % 32), me() % 32 != 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  toy.output[everywhere()] = numbers()[4 * (me() ^ 32) + 1];
}

// ---- Against them ----

__global__ void no_barrier(Toy toy) {
  numbers()[me()] = toy.input[everywhere()];
  toy.output[everywhere()] = numbers()[me() ^ 1];
}

__global__ void syncwarp_across_warps(Toy toy) {
  numbers()[me()] = toy.input[everywhere()];
  __syncwarp();
  toy.output[everywhere()] = numbers()[me() ^ 32];
}

__global__ void write_after_read(Toy toy) {
  numbers()[me()] = toy.input[everywhere()];
  __syncthreads();
  const float other = numbers()[me() ^ 1];
  numbers()[me()] = other;
  toy.output[everywhere()] = other;
}

__global__ void nobody_wrote(Toy toy) { toy.output[everywhere()] = numbers()[me()]; }

__global__ void barrier_in_a_branch(Toy toy) {
  if (me() < 32) {
    __syncthreads();
    toy.output[everywhere()] = 1;
  } else {
    __syncthreads();
    toy.output[everywhere()] = 2;
  }
}

__global__ void barrier_for_some(Toy toy) {
  if (me() < 32) __syncthreads();
  toy.output[everywhere()] = toy.input[everywhere()];
}

__global__ void shuffle_of_half_a_warp(Toy toy) {
  if (me() % 32 < 16) toy.output[everywhere()] = shfl_xor(toy.input[everywhere()], 1);
}

__global__ void copy_not_awaited(Toy toy) {
  cp_async_16(numbers() + 4 * me(), toy.input, true);
  cp_async_commit();
  cp_async_wait<1>();
  toy.output[everywhere()] = numbers()[4 * me()];
  cp_async_wait<0>();
}

__global__ void copy_of_another_thread(Toy toy) {
  cp_async_16(numbers() + 4 * me(), toy.input, true);
  cp_async_commit();
  cp_async_wait<0>();
  toy.output[everywhere()] = numbers()[4 * (me() ^ 1)];
}

__global__ void copy_outlives_its_thread(Toy toy) {
  toy.output[everywhere()] = 0;
  cp_async_16(numbers() + 4 * me(), toy.input, true);
}

__global__ void copy_off_its_grid(Toy toy) {
  cp_async_16(numbers() + 4 * me(), toy.input + 1, true);
  toy.output[everywhere()] = 0;
}

__global__ void reads_too_far(Toy toy) { toy.output[everywhere()] = toy.input[everywhere() + 1]; }

__global__ void writes_too_far(Toy toy) { toy.output[everywhere() + 1] = 0; }

__global__ void writes_its_input(Toy toy) { const_cast<float*>(toy.input)[everywhere()] = 0; }

__global__ void beyond_shared_memory(Toy toy) {
  numbers()[me() * 5] = 0;
  toy.output[everywhere()] = 0;
}

__global__ void threads_write_one_place(Toy toy) { toy.output[64 * blockIdx.x + me() % 63] = 0; }

__global__ void blocks_write_one_place(Toy toy) { toy.output[everywhere()] = toy.output[127 - everywhere()] = 0; }

__global__ void blocks_read_each_other(Toy toy) {
  if (blockIdx.x == 0) {
    toy.output[me()] = toy.output[64 + me()];
  } else {
    toy.output[everywhere()] = 0;
  }
}

#define TOY(name) \
  { #name, name }

extern "C" int toy_on_cpu(const Toy* toy, const char* name, uint64_t seed) {
  struct {
    const char* name;
    void (*kernel)(Toy);
  } const toys[] = {
      TOY(barrier_orders),         TOY(syncwarp_orders),        TOY(copies_arrive),
      TOY(no_barrier),             TOY(syncwarp_across_warps),  TOY(write_after_read),
      TOY(nobody_wrote),           TOY(barrier_in_a_branch),    TOY(barrier_for_some),
      TOY(shuffle_of_half_a_warp), TOY(copy_not_awaited),       TOY(copy_of_another_thread),
      TOY(copy_off_its_grid),      TOY(reads_too_far),          TOY(copy_outlives_its_thread),
      TOY(writes_too_far),         TOY(writes_its_input),       TOY(beyond_shared_memory),
      TOY(threads_write_one_place), TOY(blocks_write_one_place), TOY(blocks_read_each_other),
  };
  for (const auto& each : toys) {
    if (std::strcmp(each.name, name) == 0) {
      return cuda_on_cpu::launch(each.kernel, *toy, dim3(2), dim3(kToyThreads), 16 * kToyThreads, seed);
    }
  }
  return -1;
}

// ---- Numbers ----

extern "C" void pack_on_cpu(const float* numbers, uint16_t* packed, int count, int fp16) {
  for (int i = 0; i < count; i += 2) {
    const uint32_t pair = cuda_on_cpu::pack(numbers[i], numbers[i + 1], fp16);
    std::memcpy(packed + i, &pair, sizeof pair);
  }
}

extern "C" void unpack_on_cpu(const uint16_t* packed, float* numbers, int count, int fp16) {
  for (int i = 0; i < count; i += 2) {
    uint32_t pair;
    std::memcpy(&pair, packed + i, sizeof pair);
    const float2 two = cuda_on_cpu::unpack(pair, fp16);
    numbers[i] = two.x;
    numbers[i + 1] = two.y;
  }
}
