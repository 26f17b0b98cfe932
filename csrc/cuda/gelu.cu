// out = GELU(x + bias) over (rows, columns), by erf or tanh.
//
// Backward: dx = dout GELU'(x + bias), recomputed from x (nothing but x and bias is saved), dbias = Σ_rows
// dx. Bytes: forward x and out once each, backward dout, x and dx once each. Operations: about 20 an element
// forward, 30 backward; memory is the bound. Tiling: a block covers 256 columns, a warp one row of them at a
// time. The bias is read once per warp and kept in registers. Backward, the grid is persistent: a block
// strides over the rows, its sums for dbias stay in registers, the warps' are added in shared memory in a
// fixed order, and column_sums.cuh adds the blocks'.
#include "cuda/column_sums.cuh"
#include "cuda/gelu_math.cuh"
#include "cuda/vector.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsPerWarp = 4;  // forward

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    bias_gelu_kernel(const fasttune_bias_gelu_args args, bool aligned) {
  const int64_t columns = args.columns, blocks_of_columns = divide_up<int64_t>(columns, kWarpColumns);
  const int64_t column = blockIdx.x % blocks_of_columns * kWarpColumns + kVector * lane_index();
  const int64_t begin = (blockIdx.x / blocks_of_columns * kWarps + warp_index()) * kRowsPerWarp;
  const bool tanh = args.gelu == FASTTUNE_GELU_TANH;
  float bias[kVector];
  parameter<T>(args.bias, args.bias_dtype).load(column, columns, aligned, 0.0f, bias);
  for (int64_t row = begin; row < begin + kRowsPerWarp && row < args.rows; ++row) {
    float value[kVector];
    load8(static_cast<const T*>(args.x) + row * columns, column, columns, aligned, value);
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) value[i] = gelu(value[i] + bias[i], tanh);
    store8(static_cast<T*>(args.out) + row * columns, column, columns, aligned, value);
  }
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, 3)
    bias_gelu_backward_kernel(const fasttune_bias_gelu_backward_args args, bool aligned) {
  FASTTUNE_SHARED(float, scratch, kWarps* kWarpColumns);
  const int64_t columns = args.columns, blocks_of_columns = divide_up<int64_t>(columns, kWarpColumns);
  const int64_t first = blockIdx.x % blocks_of_columns * kWarpColumns,
                column = first + kVector * lane_index();
  const int64_t block = blockIdx.x / blocks_of_columns, blocks = gridDim.x / blocks_of_columns;
  const bool tanh = args.gelu == FASTTUNE_GELU_TANH;
  float bias[kVector], dbias[kVector] = {};
  parameter<T>(args.bias, args.bias_dtype).load(column, columns, aligned, 0.0f, bias);
  for (int64_t row = block * kWarps + warp_index(); row < args.rows; row += blocks * kWarps) {
    float value[kVector], gradient[kVector];
    load8(static_cast<const T*>(args.x) + row * columns, column, columns, aligned, value);
    load8(static_cast<const T*>(args.dout) + row * columns, column, columns, aligned, gradient);
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      float slope;
      gelu_with_slope(value[i] + bias[i], tanh, &slope);
      gradient[i] *= slope;
      dbias[i] += gradient[i];
    }
    if (args.dx) store8(static_cast<T*>(args.dx) + row * columns, column, columns, aligned, gradient);
  }
  if (!args.dbias) return;
  FASTTUNE_UNROLL
  for (int i = 0; i < kVector; ++i)
    scratch[warp_index() * kWarpColumns + kVector * lane_index() + i] = dbias[i];
  __syncthreads();
  const int64_t mine = first + threadIdx.x;  // 256 threads, 256 columns
  if (mine >= columns) return;
  float total = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp * kWarpColumns + threadIdx.x];
  args.dbias_partial[block * columns + mine] = total;
}

static_assert(kWarps * kWarp == kWarpColumns, "one thread per column adds the warps' sums");

}  // namespace
}  // namespace fasttune::cuda

extern "C" const char* fasttune_cuda_bias_gelu(const fasttune_bias_gelu_args* args, void* stream) {
  using namespace fasttune::cuda;
  const int64_t blocks =
      divide_up<int64_t>(args->columns, kWarpColumns) * divide_up<int64_t>(args->rows, kWarps * kRowsPerWarp);
  const bool aligned = rows_are_aligned(args->columns, args->x, args->bias, args->out);
  FASTTUNE_WITH_CUDA_DTYPE(
      args->dtype, T, return launch(bias_gelu_kernel<T>, blocks, kWarps * kWarp, 0, stream, *args, aligned));
  return nullptr;
}

extern "C" int64_t fasttune_cuda_bias_gelu_partials(int64_t rows, int64_t columns, int64_t multiprocessors) {
  using namespace fasttune::cuda;
  const int64_t across = divide_up<int64_t>(columns, kWarpColumns);
  const int64_t wanted = divide_up<int64_t>(4 * multiprocessors, across < 1 ? 1 : across);
  const int64_t most = divide_up<int64_t>(rows, kWarps);
  return wanted < most ? wanted : most;
}

extern "C" const char* fasttune_cuda_bias_gelu_backward(const fasttune_bias_gelu_backward_args* args,
                                                        void* stream) {
  using namespace fasttune::cuda;
  const int64_t blocks = divide_up<int64_t>(args->columns, kWarpColumns) * args->partials;
  const bool aligned = rows_are_aligned(args->columns, args->x, args->dout, args->bias, args->dx);
  const char* problem = nullptr;
  FASTTUNE_WITH_CUDA_DTYPE(
      args->dtype, T,
      problem = launch(bias_gelu_backward_kernel<T>, blocks, kWarps * kWarp, 0, stream, *args, aligned));
  if (problem || !args->dbias) return problem;
  return column_sums(args->dbias_partial, args->dbias, args->bias_dtype, args->partials, args->columns,
                     stream);
}
