// What the emulator keeps of the machine: one block at a time, its warps and threads. Private to the runtime's files.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"
#include "fiber.h"

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

// Operations at which threads wait for each other.
enum class Meeting { none, shuffle, mma, ldmatrix, syncwarp, syncthreads };

struct Copy {
  char* to;
  const char* from;  // null: zeros
};

struct Thread {
  int index = 0;
  dim3 position;
  Fiber fiber;
  char* stack = nullptr;
  bool finished = false;
  // Where it waits, if it does: for what, called from where, with which operands.
  Meeting meeting = Meeting::none;
  const void* site = nullptr;
  void* operands = nullptr;
  // Its cp.async: those of no group yet, and groups on their way, oldest first.
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> groups;

  int lane() const { return index % kLanes; }
  int warp() const { return index / kLanes; }
};

struct Warp {
  int waiting = 0;
  unsigned syncwarps = 0;  // passed so far
};

struct Machine {
  dim3 grid, block, block_index;
  int block_number = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int finished = 0, waiting = 0;  // threads; `waiting` in __syncthreads
  unsigned barriers = 0;          // __syncthreads that the block has passed

  char* shared = nullptr;
  size_t shared_bytes = 0;

  std::vector<int> ready;     // threads that could run, one of which is next
  Thread* current = nullptr;  // null: the launcher itself runs
  Fiber launcher;
  uint64_t random = 0;  // state of the generator; 0: no random schedule
  bool stopped = false;  // by an error after which nothing makes sense

  void (*body)(const void*) = nullptr;
  const void* call = nullptr;
};

extern Machine machine;

// What happened in the last launch; for tests of efficiency.
struct Counters {
  int64_t switches, mma, ldmatrix, bank_conflicts, copied_bytes;
  // Of tensors, by plain loads and stores. What several threads of a block load counts once: its cache serves the rest.
  int64_t loaded_bytes, stored_bytes;
};
extern Counters counters;

// Lets all 32 lanes of the current warp arrive at `meeting`; the last one runs `execute` on them, then all go on.
void meet(Meeting meeting, void* operands, void (*execute)(Thread* lanes), const void* site);

// Ends the launch at once: control returns to the launcher, and no fiber runs any more.
[[noreturn]] void stop_launch();

// ---- The checker ----
void start_checking_launch();
void start_checking_block();
int finish_checking();  // the number of reports

// A report on the current thread; `site` is a return address in the kernel. The same report is made once a launch.
void report(const std::string& what, const void* site);

// Checks an access of `thread`, and stops the launch where it is outside of everything. Returns the tensor that was
// accessed; null: it was other memory.
struct Tensor;
Tensor* check_access(Thread& thread, const void* address, size_t bytes, bool writes, const void* site);

// A cp.async from its issue to its wait_group: nobody may touch where it goes.
void check_copy_issued(const Copy& copy, const void* site);
void check_copy_landed(const Copy& copy);

}  // namespace cuda_on_cpu
