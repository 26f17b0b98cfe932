// Second stage of every parameter gradient: float32 partial sums (rows, columns) to (columns,), in a fixed
// order.
//
// The first stage leaves one row of partial sums for each group of warps of a persistent grid, so nothing is
// added with atomics, and the order of additions depends on the device's number of multiprocessors alone. A
// warp reads 32 consecutive columns, the eight warps of a block take every eighth row. A few hundred rows: a
// small fraction of the traffic of the first stage.
#include "cuda/column_sums.cuh"

#include "cuda/vector.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kSumWarps = 8;

template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp)
    column_sums_kernel(const float* partial, T* out, int64_t rows, int64_t columns) {
  FASTTUNE_SHARED(float, scratch, kSumWarps* kWarp);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane_index();
  float total = 0.0f;
  if (column < columns)
    for (int64_t row = warp_index(); row < rows; row += kSumWarps) total += partial[row * columns + column];
  scratch[threadIdx.x] = total;
  __syncthreads();
  if (warp_index() != 0 || column >= columns) return;
  total = 0.0f;
  for (int i = 0; i < kSumWarps; ++i) total += scratch[i * kWarp + lane_index()];
  out[column] = from_float<T>(total);
}

}  // namespace

const char* column_sums(const float* partial, void* out, int dtype, int64_t rows, int64_t columns,
                        void* stream) {
  FASTTUNE_WITH_CUDA_DTYPE(
      dtype, T,
      return launch(column_sums_kernel<T>, divide_up<int64_t>(columns, kWarp), kSumWarps * kWarp, 0, stream,
                    partial, static_cast<T*>(out), rows, columns));
  return nullptr;
}

}  // namespace fasttune::cuda
