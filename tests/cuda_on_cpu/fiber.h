// A fiber: a stack of its own, and the place where it stopped. Switching costs a few nanoseconds, so a CUDA block of
// hundreds of threads runs on one CPU thread. For x86-64, by the calling convention of Linux.
#pragma once

#include <cstddef>

struct Fiber {
  void* stack_pointer = nullptr;
};

// Saves the registers that a function must keep on the stack, the stack pointer in `*from`, and goes on where `to`
// stopped. In assembly, in runtime.cpp.
extern "C" void switch_stack(void** from, void* to);

inline void switch_fiber(Fiber& from, Fiber& to) { switch_stack(&from.stack_pointer, to.stack_pointer); }

// Makes `fiber` start in `entry`, which must never return, when it is first switched to.
inline void start_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 1;  // as after a call: 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  fiber.stack_pointer = top;
}
