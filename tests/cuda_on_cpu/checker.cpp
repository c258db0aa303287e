// What may not happen to memory: accesses outside of everything, reads of what nobody wrote, and two accesses, one of
// them a write, with nothing between that orders them.
//
// g++ -fsanitize=thread calls __tsan_read4(address) and the like before every access of the kernel. Here these hooks
// are our own. For every two bytes of shared memory and of the tensors that a kernel may write, a cell remembers who
// wrote and who read last, and how many barriers had been passed then. Barriers always hold up the whole block, so two
// accesses of one block are ordered if and only if a barrier lies between, or a __syncwarp of their common warp.
// Nothing orders two blocks of one launch.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <set>

#include "machine.h"

namespace cuda_on_cpu {

constexpr size_t kCellBytes = 2;

// Who did it, and when.
struct Access {
  int block = -1;  // -1: nobody
  int thread = 0;
  unsigned barriers = 0, syncwarps = 0;

  bool happened() const { return block >= 0; }
  int warp() const { return thread / kLanes; }
};

struct Cell {
  Access write, read;  // the last ones
  // Others that read since the last write, after the same barrier and __syncwarp.
  bool many_lanes = false, many_warps = false, many_blocks = false;
  bool copying = false;  // a cp.async will write here
};

struct Tensor {
  uintptr_t begin, end;
  std::vector<Cell> cells;  // none: the kernel may only read it
  // Of every two bytes: 1 + the block that loaded them last, 0 if none did. From calloc, so that what nobody looks at
  // takes no memory: a view may span gigabytes.
  std::unique_ptr<int[], void (*)(void*)> loaded;
  bool writable() const { return !cells.empty(); }
};

std::vector<Tensor> tensors;  // of the next launch
std::vector<Cell> shared_cells;
std::set<std::string> reports;

// ---- Reports ----

// An address as its offset in this library, which addr2line understands; - 1: of the call, not of what follows it.
std::string place_of(const void* site) {
  Dl_info info;
  if (!site || !dladdr(site, &info)) return "";
  char text[32];
  std::snprintf(text, sizeof text, " @%#zx", static_cast<const char*>(site) - static_cast<char*>(info.dli_fbase) - 1);
  return text;
}

std::string describe(const Access& access) {
  if (access.block != machine.block_number) return "block " + std::to_string(access.block);
  return "thread " + std::to_string(access.thread);
}

// Of the many accesses that one mistake lets go wrong, the first tells enough.
void report(const std::string& what, const void* site) {
  static std::set<std::pair<std::string, const void*>> seen;
  if (reports.empty()) seen.clear();
  if (!seen.insert({what.substr(0, what.find(':')), site}).second) return;
  const dim3 block = machine.block_index;
  reports.insert("block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                 std::to_string(block.z) + ") thread " + std::to_string(machine.current->index) + " " + what +
                 place_of(site));
}

// ---- Order ----

Access access_now(const Thread& thread) {
  return {machine.block_number, thread.index, machine.barriers, machine.warps[thread.warp()].syncwarps};
}

bool ordered(const Access& before, const Access& now) {
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.barriers < now.barriers) return true;
  return before.warp() == now.warp() && before.syncwarps < now.syncwarps;
}

// Whether all reads that a cell remembers are ordered before an access.
bool reads_ordered(const Cell& cell, const Access& now) {
  if (!cell.read.happened()) return true;
  if (cell.many_blocks || cell.read.block != now.block) return false;
  if (cell.read.barriers < now.barriers) return true;
  if (cell.many_warps || cell.read.warp() != now.warp()) return false;
  return cell.read.syncwarps < now.syncwarps || (!cell.many_lanes && cell.read.thread == now.thread);
}

void remember_read(Cell& cell, const Access& now) {
  const Access last = cell.read;
  if (last.happened() && last.block != now.block) {
    cell.many_blocks = true;
  } else if (!last.happened() || last.barriers < now.barriers) {
    cell.many_lanes = cell.many_warps = false;
  } else if (last.warp() != now.warp()) {
    cell.many_warps = true;
  } else if (last.syncwarps < now.syncwarps) {
    cell.many_lanes = false;
  } else if (last.thread != now.thread) {
    cell.many_lanes = true;
  }
  cell.read = now;
}

void remember_write(Cell& cell, const Access& now) {
  cell = Cell();
  cell.write = now;
}

// ---- Accesses ----

void check_cell(Cell& cell, const Access& now, bool writes, bool in_shared, const void* site) {
  const char* verb = writes ? "writes" : "reads";
  const char* memory = in_shared ? "shared memory" : "a tensor";
  if (cell.copying) {
    report(verb + std::string(" where a cp.async has not arrived: that of ") + describe(cell.write), site);
  } else if (cell.write.happened() && !ordered(cell.write, now)) {
    report(std::string("race in ") + memory + ", " + verb + " after an unordered write: of " + describe(cell.write),
           site);
  } else if (!writes && !cell.write.happened() && in_shared) {
    report("reads shared memory that nobody wrote", site);
  }
  if (writes && !reads_ordered(cell, now)) {
    report(std::string("race in ") + memory + ", writes after an unordered read: of " + describe(cell.read), site);
  }
  if (writes) {
    remember_write(cell, now);
  } else {
    remember_read(cell, now);
  }
}

void check_cells(std::vector<Cell>& cells, size_t offset, size_t bytes, Thread& thread, bool writes, bool in_shared,
                 const void* site) {
  const Access now = access_now(thread);
  for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    check_cell(cells[i], now, writes, in_shared, site);
  }
}

bool inside(uintptr_t address, size_t bytes, uintptr_t begin, uintptr_t end) {
  return begin <= address && address + bytes <= end;
}

Tensor* check_access(Thread& thread, const void* pointer, size_t bytes, bool writes, const void* site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t stack = reinterpret_cast<uintptr_t>(thread.stack);
  const uintptr_t shared = reinterpret_cast<uintptr_t>(machine.shared);
  if (inside(address, bytes, stack, stack + kStackBytes)) return nullptr;  // registers and local arrays
  Thread* const running = machine.current;
  machine.current = &thread;  // whom reports are about: a warp's instruction is executed by its last lane
  if (inside(address, bytes, shared, shared + machine.shared_bytes)) {
    check_cells(shared_cells, address - shared, bytes, thread, writes, true, site);
    machine.current = running;
    return nullptr;
  }
  for (Tensor& tensor : tensors) {
    if (!inside(address, bytes, tensor.begin, tensor.end)) continue;
    if (writes && !tensor.writable()) break;
    if (tensor.writable()) check_cells(tensor.cells, address - tensor.begin, bytes, thread, writes, false, site);
    machine.current = running;
    return &tensor;
  }
  report(writes ? "writes outside of all that it may write" : "reads outside of all tensors", site);
  machine.current = running;
  stop_launch();
}

void mark_copying(const Copy& copy, bool copying) {
  const size_t first = (copy.to - machine.shared) / kCellBytes;
  for (size_t i = first; i < first + 16 / kCellBytes; ++i) {
    remember_write(shared_cells[i], access_now(*machine.current));
    shared_cells[i].copying = copying;
  }
}

void check_copy_issued(const Copy& copy, const void* site) {
  if (!inside(reinterpret_cast<uintptr_t>(copy.to), 16, reinterpret_cast<uintptr_t>(machine.shared),
              reinterpret_cast<uintptr_t>(machine.shared) + machine.shared_bytes)) {
    report("cp.async to what is not shared memory", site);
    stop_launch();
  }
  mark_copying(copy, true);
}

void check_copy_landed(const Copy& copy) { mark_copying(copy, false); }

// ---- Launches ----

void start_checking_launch() { reports.clear(); }

void start_checking_block() { shared_cells.assign(machine.shared_bytes / kCellBytes + 1, Cell()); }

int finish_checking() {
  tensors.clear();
  return static_cast<int>(reports.size());
}

void count_access(Tensor& tensor, size_t offset, size_t bytes, bool writes) {
  if (writes) {
    counters.stored_bytes += bytes;
    return;
  }
  for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    if (tensor.loaded[i] == machine.block_number + 1) continue;
    tensor.loaded[i] = machine.block_number + 1;
    counters.loaded_bytes += kCellBytes;
  }
}

void check_hook(const void* address, size_t bytes, bool writes, const void* site) {
  if (!machine.current) return;
  Tensor* tensor = check_access(*machine.current, address, bytes, writes, site);
  if (tensor) count_access(*tensor, reinterpret_cast<uintptr_t>(address) - tensor->begin, bytes, writes);
}

}  // namespace cuda_on_cpu

// ---- What Python calls ----

extern "C" {

// Memory that the next launch may read, and may write if `writable`.
void cuda_on_cpu_tensor(const void* data, size_t bytes, int writable) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const size_t cells = bytes / cuda_on_cpu::kCellBytes + 1;
  cuda_on_cpu::Tensor tensor{begin, begin + bytes, {}, {static_cast<int*>(std::calloc(cells, sizeof(int))), std::free}};
  if (!tensor.loaded) throw std::bad_alloc();
  if (writable) tensor.cells.resize(cells);
  cuda_on_cpu::tensors.push_back(std::move(tensor));
}

// The reports of the last launch, one a line.
const char* cuda_on_cpu_reports() {
  static std::string text;
  text.clear();
  for (const std::string& report : cuda_on_cpu::reports) text += report + "\n";
  return text.c_str();
}

// ---- What g++ -fsanitize=thread calls ----

#define HOOK(name, bytes, writes) \
  void name(void* p) { cuda_on_cpu::check_hook(p, bytes, writes, __builtin_return_address(0)); }
#define HOOKS(bytes)                          \
  HOOK(__tsan_read##bytes, bytes, false)      \
  HOOK(__tsan_write##bytes, bytes, true)      \
  HOOK(__tsan_unaligned_read##bytes, bytes, false) \
  HOOK(__tsan_unaligned_write##bytes, bytes, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  cuda_on_cpu::check_hook(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  cuda_on_cpu::check_hook(p, bytes, true, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
