// What every kernel file starts from: CUDA's types, shared memory, launches, and errors as sentences.
//
// The same sources run on the host: tests/cuda_host compiles them with FASTTUNE_CUDA_HOST and a header that
// emulates threads, barriers, shuffles and the instructions of mma.cuh. So shared memory and launches go
// through the names here.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdint.h>

#include "cuda/api.h"

#ifdef FASTTUNE_CUDA_HOST
#include "cuda_host.h"
#else
#define FASTTUNE_SHARED(type, name, count) __shared__ type name[count]
#define FASTTUNE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FASTTUNE_SEEDED(bug) false  // the harness can break a kernel on purpose, to see its checks fail
#endif

#define FASTTUNE_UNROLL _Pragma("unroll")
#define FASTTUNE_NO_UNROLL _Pragma("unroll 1")

namespace fasttune::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int64_t kMaxBlocks = 2147483647;  // of a grid's first dimension

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

template <class I>
__host__ __device__ constexpr I divide_up(I a, I b) {
  return (a + b - 1) / b;
}

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Enqueues kernel(args...). Returns null, or why it was not launched.
template <class... Parameters, class... Args>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   void* stream, const Args&... args) {
  if (blocks <= 0) return nullptr;
  if (blocks > kMaxBlocks) return "the tensor needs more thread blocks than a grid may have (2147483647)";
#ifdef FASTTUNE_CUDA_HOST
  (void)stream;
  host::run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes,
            [&] { kernel(args...); });
  return nullptr;
#else
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  // clang-format off
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace fasttune::cuda

// Runs the statement with `T` bound to the element type that `dtype` names.
#define FASTTUNE_WITH_CUDA_DTYPE(dtype, T, ...) \
  switch (dtype) {                              \
    case FASTTUNE_F32: {                        \
      using T = float;                          \
      __VA_ARGS__;                              \
      break;                                    \
    }                                           \
    case FASTTUNE_BF16: {                       \
      using T = __nv_bfloat16;                  \
      __VA_ARGS__;                              \
      break;                                    \
    }                                           \
    default: {                                  \
      using T = __half;                         \
      __VA_ARGS__;                              \
      break;                                    \
    }                                           \
  }
