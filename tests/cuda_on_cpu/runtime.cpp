// Blocks, threads as fibers, barriers: who runs when.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "machine.h"

asm(R"(
.text
.hidden switch_stack
.globl switch_stack
.type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stack, . - switch_stack
)");

namespace cuda_on_cpu {

Machine machine;
Counters counters;

// ---- The scheduler ----

uint64_t next_random() {  // xorshift64
  uint64_t& x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

// The next thread to run: any one under a random schedule, otherwise the one that became ready last. Null: none can.
Thread* take_ready() {
  std::vector<int>& ready = machine.ready;
  if (ready.empty()) return nullptr;
  if (machine.random) std::swap(ready[next_random() % ready.size()], ready.back());
  Thread* thread = &machine.threads[ready.back()];
  ready.pop_back();
  return thread;
}

Fiber& fiber_of(Thread* thread) { return thread ? thread->fiber : machine.launcher; }

// Runs another thread, or the launcher where none can run; returns when this one's turn comes again.
void switch_away() {
  Thread* const from = machine.current;
  Thread* const to = take_ready();
  if (to == from) return;
  ++counters.switches;
  machine.current = to;
  switch_fiber(fiber_of(from), fiber_of(to));
}

void stop_launch() {
  Thread* const from = machine.current;
  machine.stopped = true;
  machine.current = nullptr;
  switch_fiber(from->fiber, machine.launcher);
  std::abort();  // nobody switches back
}

// Makes the threads [begin, end) ready, the current one among them, which goes on at once unless the order is random.
void release(int begin, int end) {
  for (int i = end - 1; i >= begin; --i) {
    machine.threads[i].meeting = Meeting::none;
    if (&machine.threads[i] != machine.current) machine.ready.push_back(i);
  }
  if (machine.random) {
    machine.ready.push_back(machine.current->index);
    switch_away();
  }
}

// ---- Where threads wait for each other ----

const char* name_of(Meeting meeting) {
  const char* names[] = {"nothing", "shfl", "mma.sync", "ldmatrix", "__syncwarp", "__syncthreads"};
  return names[static_cast<int>(meeting)];
}

void wait_at(Meeting meeting, void* operands, const void* site) {
  Thread& thread = *machine.current;
  thread.meeting = meeting;
  thread.operands = operands;
  thread.site = site;
}

// Threads that wait for each other must have come to the same call in the kernel.
void check_same_place(int begin, int end) {
  const Thread& mine = *machine.current;
  for (int i = begin; i < end; ++i) {
    const Thread& other = machine.threads[i];
    if (other.meeting == mine.meeting && other.site == mine.site) continue;
    report(std::string("divergence: waits in ") + name_of(mine.meeting) + ", thread " + std::to_string(i) + " in " +
               (other.meeting == mine.meeting ? "another " : "") + name_of(other.meeting),
           mine.site);
    stop_launch();
  }
}

void meet(Meeting meeting, void* operands, void (*execute)(Thread* lanes), const void* site) {
  wait_at(meeting, operands, site);
  const int first = machine.current->warp() * kLanes;
  Warp& warp = machine.warps[machine.current->warp()];
  if (++warp.waiting < kLanes) return switch_away();
  warp.waiting = 0;
  check_same_place(first, first + kLanes);
  execute(&machine.threads[first]);
  release(first, first + kLanes);
}

void syncwarp() {
  const auto execute = [](Thread* lanes) { ++machine.warps[lanes->warp()].syncwarps; };
  meet(Meeting::syncwarp, nullptr, execute, __builtin_return_address(0));
}

void syncthreads() {
  wait_at(Meeting::syncthreads, nullptr, __builtin_return_address(0));
  const int threads = static_cast<int>(machine.threads.size());
  if (++machine.waiting < threads) return switch_away();
  machine.waiting = 0;
  check_same_place(0, threads);
  ++machine.barriers;
  release(0, threads);
}

// ---- Launching ----

dim3 thread_index() { return machine.current->position; }
dim3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block; }
dim3 grid_size() { return machine.grid; }
char* shared_memory() { return machine.shared; }

void run_thread() {
  machine.body(machine.call);
  Thread& thread = *machine.current;
  const auto has_copies = [](const std::vector<Copy>& group) { return !group.empty(); };
  if (has_copies(thread.open_copies) || std::any_of(thread.groups.begin(), thread.groups.end(), has_copies)) {
    report("ends while a cp.async is on its way", nullptr);
  }
  thread.finished = true;
  ++machine.finished;
  switch_away();
  std::abort();  // a finished thread is never ready
}

void start_thread(Thread& thread, int index, char* stacks) {
  const dim3 size = machine.block;
  thread = Thread();
  thread.index = index;
  thread.position = dim3(index % size.x, index / size.x % size.y, index / size.x / size.y);
  thread.stack = stacks + index * kStackBytes;
  start_fiber(thread.fiber, thread.stack, kStackBytes, run_thread);
}

void report_deadlock() {
  for (Thread& thread : machine.threads) {
    if (thread.finished) continue;
    machine.current = &thread;
    report(std::string("deadlock: waits for ever in ") + name_of(thread.meeting), thread.site);
  }
  machine.current = nullptr;
}

void run_block(int number, uint64_t seed, char* stacks) {
  const dim3 grid = machine.grid;
  const int threads = static_cast<int>(machine.threads.size());
  machine.block_number = number;
  machine.block_index = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
  machine.random = seed ? (seed * 0x9E3779B97F4A7C15u ^ (number + 1) * 0xD1B54A32D192ED03u) | 1 : 0;
  machine.finished = machine.waiting = machine.barriers = 0;
  machine.warps.assign(threads / kLanes, Warp());
  machine.ready.clear();
  std::memset(machine.shared, 0xff, machine.shared_bytes);  // NaN in every format
  start_checking_block();
  for (int i = threads - 1; i >= 0; --i) {
    start_thread(machine.threads[i], i, stacks);
    machine.ready.push_back(i);
  }
  switch_away();
  if (!machine.stopped && machine.finished < threads) report_deadlock();
}

int run_grid(void (*body)(const void*), const void* call, dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed) {
  const int threads = block.x * block.y * block.z;
  if (threads % kLanes) std::abort();  // not modelled
  machine = Machine();
  machine.grid = grid;
  machine.block = block;
  machine.body = body;
  machine.call = call;
  machine.threads.resize(threads);
  machine.shared_bytes = shared_bytes;
  machine.shared = static_cast<char*>(std::aligned_alloc(1024, (shared_bytes / 1024 + 1) * 1024));
  char* stacks = static_cast<char*>(std::aligned_alloc(4096, kStackBytes * threads));
  counters = Counters();
  start_checking_launch();

  std::vector<int> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if ((machine.random = seed)) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
  for (int number : order) {
    run_block(number, seed, stacks);
    if (machine.stopped) break;
  }
  std::free(stacks);
  std::free(machine.shared);
  return finish_checking();
}

}  // namespace cuda_on_cpu

extern "C" void cuda_on_cpu_counters(cuda_on_cpu::Counters* result) { *result = cuda_on_cpu::counters; }
