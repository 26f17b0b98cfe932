// out = act(x + bias), or act(x + bias) (gate + gate_bias), over (rows, columns).
//
// Backward: with z = x + bias and m = gate + gate_bias recomputed (nothing but the inputs is saved),
// dx = dout m act'(z), dgate = dout act(z), and the gradients of the biases are their sums over rows. Bytes:
// forward x, the gate and out once each, backward dout, x, the gate and their gradients once each.
// Operations: about 20 an element forward, 30 backward with a GELU, fewer with the others; memory is the
// bound. Rows have strides: the halves of one tensor are read, and their gradients written, where they lie.
// Tiling: a block covers 256 columns, a warp one row of them at a time. The biases are read once per warp and
// kept in registers. Backward, the grid is persistent: a block strides over the rows, its sums for dbias stay
// in registers, the warps' are added in shared memory in a fixed order, and column_sums.cuh adds the blocks'.
// The gate is a compile-time option, because it doubles the registers; the activation is not, because it is
// one branch for eight elements of a warp, and six times as many kernels would be built otherwise.
#include "cuda/activation_math.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/vector.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsPerWarp = 4;  // forward

// columns [column, column + 8) of x's bias or, with `gate`, of the gate's.
template <class T, class Args>
__device__ __forceinline__ void load_bias(const Args& args, bool gate, int64_t column, bool aligned,
                                          float (&out)[kVector]) {
  const int64_t size = args.bias_dtype == FASTTUNE_F32 ? sizeof(float) : sizeof(T);
  const char* bias = static_cast<const char*>(args.bias);
  if (bias && gate) bias += args.columns * size;
  parameter<T>(bias, args.bias_dtype).load(column, args.columns, aligned, 0.0f, out);
}

template <class T, bool kGated>
__global__ void __launch_bounds__(kWarps* kWarp)
    activation_kernel(const fasttune_activation_args args, bool aligned) {
  const int64_t columns = args.columns, blocks_of_columns = divide_up<int64_t>(columns, kWarpColumns);
  const int64_t column = blockIdx.x % blocks_of_columns * kWarpColumns + kVector * lane_index();
  const int64_t begin = (blockIdx.x / blocks_of_columns * kWarps + warp_index()) * kRowsPerWarp;
  float bias[kVector], gate_bias[kVector];
  load_bias<T>(args, false, column, aligned, bias);
  if constexpr (kGated) load_bias<T>(args, true, column, aligned, gate_bias);
  for (int64_t row = begin; row < begin + kRowsPerWarp && row < args.rows; ++row) {
    float value[kVector], gate[kVector];
    load8(static_cast<const T*>(args.x) + row * args.x_stride, column, columns, aligned, value);
    if constexpr (kGated)
      load8(static_cast<const T*>(args.gate) + row * args.gate_stride, column, columns, aligned, gate);
    with_activation(args.activation, [&](const auto& activation) {
      FASTTUNE_UNROLL
      for (int i = 0; i < kVector; ++i)
        value[i] = activation.value(value[i] + bias[i], kGated ? gate[i] + gate_bias[i] : 1.0f);
    });
    store8(static_cast<T*>(args.out) + row * columns, column, columns, aligned, value);
  }
}

// The warps' sums of the block's columns, added in order, to the block's line of partial sums.
__device__ __forceinline__ void add_warps(const float (&sums)[kVector], float* scratch, int64_t first,
                                          int64_t columns, float* partial) {
  FASTTUNE_UNROLL
  for (int i = 0; i < kVector; ++i)
    scratch[warp_index() * kWarpColumns + kVector * lane_index() + i] = sums[i];
  __syncthreads();
  const int64_t mine = first + threadIdx.x;  // 256 threads, 256 columns
  if (mine >= columns) return;
  float total = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp * kWarpColumns + threadIdx.x];
  partial[mine] = total;
}

static_assert(kWarps * kWarp == kWarpColumns, "one thread per column adds the warps' sums");

template <class T, bool kGated>
__global__ void __launch_bounds__(kWarps* kWarp, kGated ? 2 : 3)
    activation_backward_kernel(const fasttune_activation_backward_args args, bool aligned) {
  FASTTUNE_SHARED(float, scratch, kWarps* kWarpColumns);
  const int64_t columns = args.columns, blocks_of_columns = divide_up<int64_t>(columns, kWarpColumns);
  const int64_t first = blockIdx.x % blocks_of_columns * kWarpColumns,
                column = first + kVector * lane_index();
  const int64_t block = blockIdx.x / blocks_of_columns, blocks = gridDim.x / blocks_of_columns;
  float bias[kVector], gate_bias[kVector], dbias[kVector] = {}, dgate_bias[kVector] = {};
  load_bias<T>(args, false, column, aligned, bias);
  if constexpr (kGated) load_bias<T>(args, true, column, aligned, gate_bias);
  for (int64_t row = block * kWarps + warp_index(); row < args.rows; row += blocks * kWarps) {
    float value[kVector], gradient[kVector], gate[kVector];
    load8(static_cast<const T*>(args.x) + row * args.x_stride, column, columns, aligned, value);
    load8(static_cast<const T*>(args.dout) + row * columns, column, columns, aligned, gradient);
    if constexpr (kGated)
      load8(static_cast<const T*>(args.gate) + row * args.gate_stride, column, columns, aligned, gate);
    with_activation(args.activation, [&](const auto& activation) {
      FASTTUNE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        float of_x, of_gate;
        activation.gradients(value[i] + bias[i], kGated ? gate[i] + gate_bias[i] : 1.0f, gradient[i], &of_x,
                             &of_gate);
        value[i] = of_x;
        gradient[i] = of_gate;
      }
    });
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      dbias[i] += value[i];
      if constexpr (kGated) dgate_bias[i] += gradient[i];
    }
    const int64_t offset = row * args.gradient_stride;
    if (args.dx) store8(static_cast<T*>(args.dx) + offset, column, columns, aligned, value);
    if constexpr (kGated)
      if (args.dgate) store8(static_cast<T*>(args.dgate) + offset, column, columns, aligned, gradient);
  }
  if (!args.dbias) return;
  float* partial = args.dbias_partial + block * (kGated ? 2 : 1) * columns;
  add_warps(dbias, scratch, first, columns, partial);
  if constexpr (kGated) {
    __syncthreads();  // the first sums have been read
    add_warps(dgate_bias, scratch, first, columns, partial + columns);
  }
}

// Whether eight consecutive columns of every row lie on a 16-byte boundary: of x, the gate, and both halves
// of the bias.
template <class Args, class... Pointers>
bool all_aligned(const Args& args, int64_t strides, Pointers... pointers) {
  return rows_are_aligned(args.columns, args.x, args.gate, args.bias, pointers...) && strides % kVector == 0;
}

template <class T>
const char* forward(const fasttune_activation_args& args, void* stream) {
  const int64_t blocks =
      divide_up<int64_t>(args.columns, kWarpColumns) * divide_up<int64_t>(args.rows, kWarps * kRowsPerWarp);
  const bool aligned = all_aligned(args, args.x_stride | args.gate_stride, args.out);
  return launch(args.gate ? activation_kernel<T, true> : activation_kernel<T, false>, blocks, kWarps * kWarp,
                0, stream, args, aligned);
}

template <class T>
const char* backward(const fasttune_activation_backward_args& args, void* stream) {
  const int64_t blocks = divide_up<int64_t>(args.columns, kWarpColumns) * args.partials;
  const bool aligned = all_aligned(args, args.x_stride | args.gate_stride | args.gradient_stride, args.dout,
                                   args.dx, args.dgate);
  return launch(args.gate ? activation_backward_kernel<T, true> : activation_backward_kernel<T, false>,
                blocks, kWarps * kWarp, 0, stream, args, aligned);
}

}  // namespace
}  // namespace fasttune::cuda

extern "C" const char* fasttune_cuda_activation(const fasttune_activation_args* args, void* stream) {
  using namespace fasttune::cuda;
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T, return forward<T>(*args, stream));
  return nullptr;
}

extern "C" int64_t fasttune_cuda_activation_partials(int64_t rows, int64_t columns, int64_t multiprocessors) {
  using namespace fasttune::cuda;
  const int64_t across = divide_up<int64_t>(columns, kWarpColumns);
  const int64_t wanted = divide_up<int64_t>(4 * multiprocessors, across < 1 ? 1 : across);
  const int64_t most = divide_up<int64_t>(rows, kWarps);
  return wanted < most ? wanted : most;
}

extern "C" const char* fasttune_cuda_activation_backward(const fasttune_activation_backward_args* args,
                                                         void* stream) {
  using namespace fasttune::cuda;
  const char* problem = nullptr;
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T, problem = backward<T>(*args, stream));
  if (problem || !args->dbias) return problem;
  return column_sums(args->dbias_partial, args->dbias, args->bias_dtype, args->partials,
                     (args->gate ? 2 : 1) * args->columns, stream);
}
