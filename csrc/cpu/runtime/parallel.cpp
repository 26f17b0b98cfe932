#include "cpu/parallel.h"

namespace fasttune {
namespace {

using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, ParallelBody, void*);
using TorchGetNumThreads = int32_t (*)(uint32_t*);

TorchParallelFor torch_parallel_for = nullptr;
TorchGetNumThreads torch_get_num_threads = nullptr;

}  // namespace

void set_thread_pool(void* parallel_for_address, void* num_threads_address) {
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(parallel_for_address);
  torch_get_num_threads = reinterpret_cast<TorchGetNumThreads>(num_threads_address);
}

int num_threads() {
  uint32_t count = 1;
  if (torch_get_num_threads == nullptr || torch_get_num_threads(&count) != 0) return 1;
  return static_cast<int>(count);
}

void parallel_for_raw(int64_t n, int64_t grain, ParallelBody body, void* context) {
  if (n <= 0) return;
  if (torch_parallel_for == nullptr || n <= grain) return body(0, n, context);
  torch_parallel_for(0, n, grain, body, context);
}

}  // namespace fasttune
