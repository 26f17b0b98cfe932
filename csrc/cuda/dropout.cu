// out = dropout(x) [+ residual] over (rows, columns), with the shared generator; its own backward.
//
// Bytes: x, residual and out once each. Operations: 15 an element, most of them the generator's.
// Tiling: a warp takes 256 columns of a row, so that one counter per lane serves all of them (philox.cuh),
// and eight rows of them one after another, for loads in flight.
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kRowsPerWarp = 8;

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    dropout_kernel(const fasttune_dropout_args args, bool aligned) {
  const int64_t blocks_of_columns = divide_up<int64_t>(args.columns, kWarpColumns);
  const int64_t first = blockIdx.x % blocks_of_columns * kWarpColumns,
                column = first + kVector * lane_index();
  const int64_t begin = (blockIdx.x / blocks_of_columns * kWarps + warp_index()) * kRowsPerWarp;
  const DropoutKey dropout = dropout_key(args.dropout);
  for (int64_t row = begin; row < begin + kRowsPerWarp && row < args.rows; ++row) {
    const int64_t id = args.dropout.row_ids ? args.dropout.row_ids[row] : row;
    float value[kVector], residual[kVector] = {};
    load8(static_cast<const T*>(args.x) + row * args.columns, column, args.columns, aligned, value);
    if (args.residual)
      load8(static_cast<const T*>(args.residual) + row * args.columns, column, args.columns, aligned,
            residual);
    const uint32_t dropped = dropped_columns(dropout, static_cast<uint64_t>(id), first);
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i)
      value[i] = ((dropped >> i) & 1u ? 0.0f : value[i] * dropout.scale) + residual[i];
    store8(static_cast<T*>(args.out) + row * args.columns, column, args.columns, aligned, value);
  }
}

}  // namespace
}  // namespace fasttune::cuda

extern "C" const char* fasttune_cuda_dropout(const fasttune_dropout_args* args, void* stream) {
  using namespace fasttune::cuda;
  const int64_t blocks =
      divide_up<int64_t>(args->columns, kWarpColumns) * divide_up<int64_t>(args->rows, kWarps * kRowsPerWarp);
  const bool aligned = rows_are_aligned(args->columns, args->x, args->residual, args->out);
  FASTTUNE_WITH_CUDA_DTYPE(
      args->dtype, T, return launch(dropout_kernel<T>, blocks, kWarps * kWarp, 0, stream, *args, aligned));
  return nullptr;
}
