// The machine behind cuda_host.h: fibers or OS threads, barriers, and the emulated instructions.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

#include "cuda/device.cuh"

#ifndef FASTTUNE_CUDA_HOST_THREADS
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#endif

#ifdef __SANITIZE_THREAD__
extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

extern "C" const char* fasttune_cuda_problem(void) { return nullptr; }

namespace fasttune::cuda::host {
namespace {

// Hides from ThreadSanitizer what happens in its scope: the means of the emulation, not the program's own
// doing.
struct Hidden {
#ifdef __SANITIZE_THREAD__
  Hidden() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Hidden() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }
#else
  Hidden() {}  // user-provided: an unused Hidden object is meant
#endif
};

#ifdef FASTTUNE_CUDA_HOST_THREADS
using Count = std::atomic<int>;  // what a futex waits on
#else
using Count = int;
#endif

struct Barrier {
  Count arrived = 0, generation = 0;
};

struct Exchange {
  Barrier barrier;
  unsigned char slots[2][32][32];
};

// Barriers and exchanges of each mask that the warp has used.
struct Warp {
  std::mutex lock;
  std::map<unsigned, Barrier> barriers;
  std::map<unsigned, Exchange> exchanges;
};

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Thread {
  std::vector<Copy> open;                // since the last commit
  std::deque<std::vector<Copy>> groups;  // committed and not waited for
};

std::mutex one_launch;
unsigned thread_count;
std::vector<Warp> warps;
std::vector<Thread> threads;
Barrier block_barrier;
std::unique_ptr<unsigned char, decltype(&std::free)> dynamic(nullptr, &std::free);
size_t dynamic_bytes;
std::mutex shared_lock;
std::vector<std::pair<void*, size_t>> shared_arrays;

void poison(void* address, size_t bytes) { std::memset(address, 0xff, bytes); }

void start_block() {
  if (dynamic_bytes) poison(dynamic.get(), dynamic_bytes);
  const std::lock_guard<std::mutex> guard(shared_lock);
  for (const auto& [address, bytes] : shared_arrays) poison(address, bytes);
}

void finish_thread() {
  const Thread& me = threads[threadIdx.x];
  if (!me.open.empty() || !me.groups.empty()) fail("a thread ends while a cp.async of its own is under way");
}

std::vector<unsigned> permutation(unsigned count, unsigned salt) {
  std::vector<unsigned> result(count);
  for (unsigned i = 0; i < count; ++i) result[i] = i;
  if (order == 1) std::reverse(result.begin(), result.end());
  if (order > 1)
    std::shuffle(result.begin(), result.end(), std::mt19937(static_cast<unsigned>(order) + salt));
  return result;
}

#ifdef FASTTUNE_CUDA_HOST_THREADS

void meet(Barrier& barrier, int expected) {
  const int generation = barrier.generation.load();
  if (barrier.arrived.fetch_add(1) + 1 == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.generation.notify_all();
  } else {
    barrier.generation.wait(generation);
  }
}

void run_blocks(unsigned blocks, unsigned count, const std::function<void()>& kernel) {
  std::vector<std::thread> workers;
  Barrier edge;
  const std::vector<unsigned> sequence = permutation(blocks, 1);
  for (unsigned i : permutation(count, 2))
    workers.emplace_back([&, i] {
      threadIdx = make_uint3(i, 0, 0);
      for (unsigned block : sequence) {
        blockIdx = make_uint3(block, 0, 0);
        meet(edge, static_cast<int>(count));
        if (i == 0) start_block();
        meet(edge, static_cast<int>(count));
        kernel();
        finish_thread();
      }
    });
  for (std::thread& worker : workers) worker.join();
}

#else

constexpr size_t kStack = 256 * 1024;

struct Fiber {
  jmp_buf state;
  ucontext_t start;
  void* stack = nullptr;
  bool started = false, done = false;
  const Barrier* waits_for = nullptr;
  int generation = 0;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
ucontext_t scheduler_start;
unsigned current;
const std::function<void()>* current_kernel;

__attribute__((noinline)) void to_scheduler() {
  if (_setjmp(fibers[current].state) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  (*current_kernel)();
  finish_thread();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(unsigned index) {
  Fiber& fiber = fibers[index];
  current = index;
  threadIdx = make_uint3(index, 0, 0);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

void meet(Barrier& barrier, int expected) {
  Fiber& fiber = fibers[current];
  fiber.generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fiber.waits_for = &barrier;
  to_scheduler();
  fiber.waits_for = nullptr;
}

void run_blocks(unsigned blocks, unsigned count, const std::function<void()>& kernel) {
  current_kernel = &kernel;
  while (fibers.size() < count) {
    fibers.emplace_back();
    fibers.back().stack =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fibers.back().stack == MAP_FAILED) fail("no memory for a fiber's stack");
  }
  const std::vector<unsigned> warp_order = permutation((count + 31) / 32, 2), lane_order = permutation(32, 3);
  for (unsigned block : permutation(blocks, 1)) {
    blockIdx = make_uint3(block, 0, 0);
    start_block();
    for (unsigned i = 0; i < count; ++i)
      fibers[i].started = fibers[i].done = false, fibers[i].waits_for = nullptr;
    unsigned left = count;
    while (left > 0) {
      bool any = false;
      for (unsigned warp : warp_order) {
        for (bool moved = true; moved;) {  // a warp goes on until all its lanes wait for others
          moved = false;
          for (unsigned lane : lane_order) {
            const unsigned index = 32 * warp + lane;
            if (index >= count || fibers[index].done) continue;
            const Barrier* barrier = fibers[index].waits_for;
            if (barrier && barrier->generation == fibers[index].generation) continue;
            resume(index);
            left -= fibers[index].done;
            moved = any = true;
          }
        }
      }
      if (!any) fail("a barrier waits for threads that do not come");
    }
  }
}

#endif

Warp& my_warp() { return warps[threadIdx.x / 32]; }

void check_mask(unsigned mask) {
  const unsigned lanes = std::min(32u, thread_count - threadIdx.x / 32 * 32);
  if (!((mask >> lane()) & 1u)) fail("a thread calls a warp operation whose mask it is not in");
  if (lanes < 32 && (mask >> lanes) != 0) fail("a mask names lanes that the block does not have");
}

float half_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (unsigned i = 0; i < 65536; ++i)
      values[i] = __half2float(std::bit_cast<__half>(static_cast<uint16_t>(i)));
    return values;
  }();
  return table[bits];
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::fflush(stderr);
  std::_Exit(70);
}

void run(unsigned blocks, unsigned count, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> guard(one_launch);
  blockDim = dim3(count);
  gridDim = dim3(blocks);
  thread_count = count;
  warps = std::vector<Warp>((count + 31) / 32);
  threads = std::vector<Thread>(count);
  block_barrier.arrived = 0;
  dynamic_bytes = shared_bytes;
  dynamic.reset(static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)));
  run_blocks(blocks, count, kernel);
}

unsigned char* dynamic_shared() { return dynamic.get(); }

void register_shared(void* address, size_t bytes) {
  poison(address, bytes);
  const std::lock_guard<std::mutex> guard(shared_lock);
  shared_arrays.emplace_back(address, bytes);
}

void sync_threads() { meet(block_barrier, static_cast<int>(thread_count)); }

void sync_warp(unsigned mask) {
  check_mask(mask);
  Barrier* barrier;
  {
    const Hidden hidden;
    const std::lock_guard<std::mutex> guard(my_warp().lock);
    barrier = &my_warp().barriers[mask];
  }
  meet(*barrier, std::popcount(mask));
}

const unsigned char (*exchange(unsigned mask, const void* value, size_t bytes))[32] {
  check_mask(mask);
  const Hidden hidden;
  Exchange* shared;
  {
    const std::lock_guard<std::mutex> guard(my_warp().lock);
    shared = &my_warp().exchanges[mask];
  }
  // Two sets of slots in turn: a lane may publish again while others still read.
  unsigned char (*slots)[32] = shared->slots[shared->barrier.generation % 2];
  std::memcpy(slots[lane()], value, bytes);
  meet(shared->barrier, std::popcount(mask));
  return slots;
}

void read_slot(const unsigned char (*slots)[32], unsigned lane, void* value, size_t bytes) {
  const Hidden hidden;
  std::memcpy(value, slots[lane], bytes);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail("ldmatrix reads from an address that is no multiple of 16");
  const auto slots = exchange(kFullWarp, &row, sizeof(row));
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned line = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      pair[i] = static_cast<const uint16_t*>(from_slot<const void*>(slots, 8 * matrix + line))[column];
    }
    r[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_half) {
  const Hidden hidden;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto slots = exchange(kFullWarp, mine, sizeof(mine));
  const auto element = [&](unsigned from, unsigned word, unsigned half) {
    uint16_t bits;
    std::memcpy(&bits, slots[from] + 4 * word + 2 * half, 2);
    return is_half ? half_to_float(bits) : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  };
  const unsigned g = lane() / 4, t = lane() % 4;
  float rows[2][16], columns[2][16];
  for (unsigned k = 0; k < 16; ++k)
    for (unsigned i = 0; i < 2; ++i) {
      rows[i][k] = element(4 * g + k % 8 / 2, i + k / 8 * 2, k % 2);
      columns[i][k] = element(4 * (2 * t + i) + k % 8 / 2, 4 + k / 8, k % 2);
    }
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 16; ++k) c[i] += rows[i / 2][k] * columns[i % 2][k];
}

void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("cp.async copies from or to an address that is no multiple of 16");
  poison(shared, 16);
  threads[threadIdx.x].open.push_back({shared, global, valid});
}

void copy_commit() {
  Thread& me = threads[threadIdx.x];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void copy_wait(size_t pending) {
  Thread& me = threads[threadIdx.x];
  for (; me.groups.size() > pending; me.groups.pop_front())
    for (const Copy& copy : me.groups.front()) {
      if (copy.valid)
        std::memcpy(copy.shared, copy.global, 16);
      else
        std::memset(copy.shared, 0, 16);
    }
}

}  // namespace fasttune::cuda::host
