// Runs the kernels of csrc/cuda on the host, as ordinary C++. csrc/cuda/device.cuh includes this header where
// FASTTUNE_CUDA_HOST is defined; the kernels themselves are the same sources that nvcc compiles.
//
// The threads of a block are
//   fibers       (default) one at a time on one OS thread, switched at barriers and warp operations: fast and
//                deterministic. The order of threads, warps and blocks can be permuted: results must not
//                depend on it.
//   OS threads   (FASTTUNE_CUDA_HOST_THREADS) one per CUDA thread, so that ThreadSanitizer is a checker of
//   races in
//                shared and global memory within a block.
// Blocks run one after another.
//
// What a GPU leaves undefined is made visible: shared memory starts every block as NaN; a cp.async poisons
// its target when it is issued and copies when it is waited for, and not before; shuffles, ldmatrix and mma
// order nothing in memory (only __syncwarp and __syncthreads do, for ThreadSanitizer too); misaligned vector
// accesses, calls from outside a mask, threads that leave while others wait, and copies that nobody waits for
// end the process with a message.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __launch_bounds__(...)
#define FASTTUNE_SHARED(type, name, count)                                \
  static ::fasttune::cuda::host::Shared<type, (count)> name##_of_a_block; \
  type* const name = name##_of_a_block.values
#define FASTTUNE_DYNAMIC_SHARED(name) unsigned char* const name = ::fasttune::cuda::host::dynamic_shared()
#define FASTTUNE_SEEDED(bug) (::fasttune::cuda::host::seeded_bug == (bug))

inline thread_local uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

namespace fasttune::cuda {

using std::max;
using std::min;

// Bugs that a test can seed, to see the check that must catch them fail.
constexpr int kBugMissingSync = 1;         // reduce.cuh: no barrier before shared memory is written again
constexpr int kBugUnorderedReduction = 2;  // reduce.cuh: no barrier before the other warps' sums are read
constexpr int kBugOffByOne = 3;            // vector.cuh: one column too many is written
constexpr int kBugWrongFragment = 4;       // attention.cuh: two registers of an mma operand are mixed up
constexpr int kBugMissingWait = 5;         // attention_forward.cu: a tile is read before it has arrived
constexpr int kBugMissingTileSync = 6;  // attention_forward.cu: a tile is read that other threads are writing
constexpr int kBugSameHalf = 7;         // rotary.cu: the gradient takes each half's own sine
constexpr int kBugMissingScoresSync = 8;  // attention_terms.cu: dS is read that other threads are writing
constexpr int kBugShiftedDiagonal = 9;    // attention_terms.cu: a distance takes its neighbour's dS
constexpr int kBugLostClamp = 10;         // attention_terms.cu: what is clamped is not added up
constexpr int kBugLostRun = 11;           // attention_terms.cu: a row's last run is not written
constexpr int kBugOverwrittenRun = 12;    // attention_terms.cu: a bucket that comes again forgets what it has

namespace host {

inline int seeded_bug = 0;
inline int order = 0;  // 0: ascending, 1: descending, others seed a permutation

void run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);
[[noreturn]] void fail(const char* what);

unsigned char* dynamic_shared();
void register_shared(void* address, size_t bytes);  // poisons it now and at the start of every block

template <class T, size_t kCount>
struct Shared {
  alignas(16) T values[kCount];
  Shared() { register_shared(values, sizeof(values)); }
};

void sync_threads();
void sync_warp(unsigned mask);

// Publishes `bytes` (at most 32) of this lane and returns once all lanes of the mask have: 32 slots of 32
// bytes, valid until this lane's next exchange with that mask. Orders no other memory.
const unsigned char (*exchange(unsigned mask, const void* value, size_t bytes))[32];

void read_slot(const unsigned char (*slots)[32], unsigned lane, void* value, size_t bytes);

template <class T>
T from_slot(const unsigned char (*slots)[32], unsigned lane) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 32);
  T value;
  read_slot(slots, lane, &value, sizeof(T));
  return value;
}

inline unsigned lane() { return threadIdx.x % 32; }

// The value of lane `from`, which has to be in the mask.
template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  const auto slots = exchange(mask, &value, sizeof(T));
  if (!((mask >> from) & 1u)) fail("a shuffle reads a lane outside its mask");
  return from_slot<T>(slots, from);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_half);
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(size_t pending);

}  // namespace host

inline void ldmatrix(uint32_t (&r)[4], const void* row) { host::load_matrices(r, row, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) { host::load_matrices(r, row, true); }
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::multiply_accumulate(c, a, b0, b1, std::is_same_v<T, __half>);
}
inline void cp_async(void* shared, const void* global, bool valid) {
  host::copy_async(shared, global, valid);
}
inline void cp_async_commit() { host::copy_commit(); }
template <int kPending>
void cp_async_wait() {
  host::copy_wait(kPending);
}

}  // namespace fasttune::cuda

inline void __syncthreads() { fasttune::cuda::host::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { fasttune::cuda::host::sync_warp(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return fasttune::cuda::host::shuffle(mask, value,
                                       fasttune::cuda::host::lane() ^ static_cast<unsigned>(offset));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  const unsigned lane = fasttune::cuda::host::lane();
  return fasttune::cuda::host::shuffle(mask, value, lane + offset < 32 ? lane + offset : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto slots = fasttune::cuda::host::exchange(mask, &predicate, sizeof(predicate));
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i) & 1u)
      result |= static_cast<unsigned>(fasttune::cuda::host::from_slot<int>(slots, i) != 0) << i;
  return result;
}
