// The row loops of every layer normalisation. With s the input of the norm (dropout(x) + residual, GELU(x),
// or x),
//
//   mean = Σ s / C     var = Σ (s - mean)² / C     r = 1 / √(var + eps)     h = (s - mean) r     z = h w + b
//
// and out = z or GELU(z). Backward, with dz = dout or dout GELU'(z), and g = dz w:
//
//   ds = r (g - mean(g) - h mean(g h)) [+ dsum]      dw = Σ_rows dz h      db = Σ_rows dz
//   dx = ds, mask scale ds (dropout) or ds GELU'(x);  dresidual = ds
//
// since ∂h_i/∂s_j = r (δ_ij - 1/C - h_i h_j / C). Means run over the C columns of a row.
//
// Bytes: each tensor of (rows, columns) once each way; weights and statistics are small beside them.
// Operations: about 10 an element, 30 with GELU, 11 more with dropout; memory is the bound.
//
// Tiling: a row lies in the registers of a group of warps, eight consecutive columns per thread and chunk, so
// that it is read once, in 16-byte accesses, and its statistics are exact two-pass ones. Up to 4096 columns
// the group grows with the row (one warp per 256 columns, one chunk), beyond that 16 warps take two
// chunks. Narrow rows share a block. The variance is the corrected two-pass one (Chan, Golub and LeVeque
// 1983): deviations from the rounded mean, whose own mean repairs it, so rows that lie far from 0 lose
// nothing. Backward, the grid is persistent: each thread keeps the weights of its columns and its sums for dw
// and db in registers over all its rows, each group leaves one row of partial sums, and column_sums.cuh adds
// them up. No atomics.
#pragma once
#include "cuda/column_sums.cuh"
#include "cuda/gelu_math.cuh"
#include "cuda/philox.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fasttune::cuda {

constexpr int kMaxGroupWarps = 16;
constexpr int kManyChunks = FASTTUNE_CUDA_MAX_NORM_COLUMNS / (kMaxGroupWarps * kWarpColumns);

enum class Activation { none, before, after };

// How rows are laid out over blocks: `rows` rows side by side, `warps` warps each.
struct NormShape {
  int warps, rows;

  int threads() const { return warps * rows * kWarp; }
};

inline NormShape norm_shape(int64_t columns) {
  int64_t warps = divide_up<int64_t>(columns, kWarpColumns);
  if (warps < 1) warps = 1;
  if (warps > kMaxGroupWarps) warps = kMaxGroupWarps;
  return {static_cast<int>(warps), warps >= 4 ? 1 : static_cast<int>(4 / warps)};
}

// Where a thread stands.
struct NormThread {
  int group, warps;   // which of the block's rows, and how many warps share it
  int64_t first_row;  // of this group
  int64_t stride;     // rows between one row of this group and its next

  __device__ __forceinline__ NormThread(const NormShape& shape)
      : group(warp_index() / shape.warps),
        warps(shape.warps),
        first_row(static_cast<int64_t>(blockIdx.x) * shape.rows + group),
        stride(static_cast<int64_t>(gridDim.x) * shape.rows) {}

  // First of the 256 columns that this warp holds in `chunk`; this lane's are from + 8 * lane on.
  __device__ __forceinline__ int64_t warp_column(int chunk) const {
    return (static_cast<int64_t>(chunk) * warps + warp_index() % warps) * kWarpColumns;
  }
  __device__ __forceinline__ int64_t column(int chunk) const {
    return warp_column(chunk) + kVector * lane_index();
  }
};

// X: x's type, T: the type of everything else in memory but the parameters.
template <class X, class T, Activation kActivation, int kChunks>
__global__ void __launch_bounds__(kMaxGroupWarps* kWarp)
    layer_norm_kernel(const fasttune_layer_norm_args args, const NormShape shape, bool aligned) {
  FASTTUNE_SHARED(float2, scratch, kMaxGroupWarps);
  const NormThread me(shape);
  const int64_t columns = args.columns, row = me.first_row;
  const bool inside = row < args.rows, tanh = args.gelu == FASTTUNE_GELU_TANH;
  const int64_t width = inside ? columns : 0;  // a group without a row reads and writes nothing
  const int64_t offset = inside ? row * columns : 0;

  float s[kChunks][kVector];
  float2 sums = make_float2(0.0f, 0.0f);
  FASTTUNE_UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t column = me.column(chunk);
    float residual[kVector] = {};
    load8(static_cast<const X*>(args.x) + offset, column, width, aligned, s[chunk]);
    if (args.residual) load8(static_cast<const T*>(args.residual) + offset, column, width, aligned, residual);
    if (args.dropout.seed) {
      const DropoutKey dropout = dropout_key(args.dropout);
      const int64_t id = args.dropout.row_ids && inside ? args.dropout.row_ids[row] : row;
      const uint32_t dropped = dropped_columns(dropout, static_cast<uint64_t>(id), me.warp_column(chunk));
      FASTTUNE_UNROLL
      for (int i = 0; i < kVector; ++i)
        s[chunk][i] = (dropped >> i) & 1u ? 0.0f : s[chunk][i] * dropout.scale;
    }
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      s[chunk][i] += residual[i];
      if constexpr (kActivation == Activation::before)
        s[chunk][i] = gelu(s[chunk][i], tanh);
      else
        s[chunk][i] =
            as_stored<T>(s[chunk][i]);  // normalise what backward will read, whether or not it is stored now
      sums.x += s[chunk][i];
    }
    if (kActivation == Activation::none && args.sum)
      store8(static_cast<T*>(args.sum) + offset, column, width, aligned, s[chunk]);
  }
  const float count = static_cast<float>(columns);
  const float rough_mean = group_sum(sums, me.group, me.warps, scratch).x / count;

  sums = make_float2(0.0f, 0.0f);
  FASTTUNE_UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const float d = me.column(chunk) + i < columns ? s[chunk][i] - rough_mean : 0.0f;
      sums.x += d;
      sums.y = fmaf(d, d, sums.y);
    }
  }
  sums = group_sum(sums, me.group, me.warps, scratch);
  const float repair = sums.x / count;
  // Fused: where the squares overflow, the repair's must not, or the variance would be 0 and not infinite.
  const float variance = fmaxf(0.0f, fmaf(-repair, repair, sums.y / count));
  const float rstd = 1.0f / sqrtf(variance + args.eps);
  if (inside && warp_index() % me.warps == 0 && lane_index() == 0) {
    args.statistics[row] = rough_mean + repair;
    args.statistics[args.rows + row] = rstd;
  }

  FASTTUNE_UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t column = me.column(chunk);
    float weight[kVector], bias[kVector];
    parameter<T>(args.weight, args.weight_dtype).load(column, columns, aligned, 1.0f, weight);
    parameter<T>(args.bias, args.bias_dtype).load(column, columns, aligned, 0.0f, bias);
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const float h = (s[chunk][i] - rough_mean - repair) * rstd;
      s[chunk][i] = fmaf(h, weight[i], bias[i]);
      if constexpr (kActivation == Activation::after) s[chunk][i] = gelu(s[chunk][i], tanh);
    }
    store8(static_cast<T*>(args.out) + offset, column, width, aligned, s[chunk]);
  }
}

template <class X, class T, Activation kActivation, int kChunks>
__global__ void __launch_bounds__(kMaxGroupWarps* kWarp)
    layer_norm_backward_kernel(const fasttune_layer_norm_backward_args args, const NormShape shape,
                               bool aligned) {
  FASTTUNE_SHARED(float2, scratch, kMaxGroupWarps);
  const NormThread me(shape);
  const int64_t columns = args.columns;
  const float count = static_cast<float>(columns);
  const bool tanh = args.gelu == FASTTUNE_GELU_TANH;
  float dweight[kChunks][kVector] = {}, dbias[kChunks][kVector] = {};

  // All groups of a block make the same number of rounds, because they meet at barriers; a group whose rows
  // have run out reads zeros and writes nothing.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * shape.rows; first < args.rows; first += me.stride) {
    const int64_t row = first + me.group;
    const bool inside = row < args.rows;
    const int64_t width = inside ? columns : 0, offset = inside ? row * columns : 0;
    const float mean = inside ? args.statistics[row] : 0.0f,
                rstd = inside ? args.statistics[args.rows + row] : 0.0f;
    float h[kChunks][kVector], g[kChunks][kVector], slope[kChunks][kVector];
    float2 sums = make_float2(0.0f, 0.0f);
    FASTTUNE_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int64_t column = me.column(chunk);
      float weight[kVector], bias[kVector];
      load8(static_cast<const T*>(args.input) + offset, column, width, aligned, h[chunk]);
      load8(static_cast<const T*>(args.dout) + offset, column, width, aligned, g[chunk]);
      parameter<T>(args.weight, args.weight_dtype).load(column, columns, aligned, 1.0f, weight);
      if constexpr (kActivation == Activation::after)
        parameter<T>(args.bias, args.bias_dtype).load(column, columns, aligned, 0.0f, bias);
      FASTTUNE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        float s = h[chunk][i];
        if constexpr (kActivation == Activation::before) s = gelu_with_slope(s, tanh, &slope[chunk][i]);
        h[chunk][i] = (s - mean) * rstd;
        if constexpr (kActivation == Activation::after) {
          float after;
          gelu_with_slope(fmaf(h[chunk][i], weight[i], bias[i]), tanh, &after);
          g[chunk][i] *= after;
        }
        dweight[chunk][i] = fmaf(g[chunk][i], h[chunk][i], dweight[chunk][i]);
        dbias[chunk][i] += g[chunk][i];
        g[chunk][i] *= weight[i];  // 0 in columns that do not exist, as dout is
        sums.x += g[chunk][i];
        sums.y = fmaf(g[chunk][i], h[chunk][i], sums.y);
      }
    }
    if (!args.dx && !args.dresidual) continue;
    sums = group_sum(sums, me.group, me.warps, scratch);
    const float mean_g = sums.x / count, mean_gh = sums.y / count;
    FASTTUNE_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int64_t column = me.column(chunk);
      float dsum[kVector] = {};
      if (args.dsum) load8(static_cast<const T*>(args.dsum) + offset, column, width, aligned, dsum);
      FASTTUNE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        g[chunk][i] = rstd * fmaf(-h[chunk][i], mean_gh, g[chunk][i] - mean_g);
        if constexpr (kActivation == Activation::before) g[chunk][i] *= slope[chunk][i];
        g[chunk][i] += dsum[i];
      }
      if (args.dresidual) store8(static_cast<T*>(args.dresidual) + offset, column, width, aligned, g[chunk]);
      if (!args.dx) continue;
      if (args.dropout.seed) {
        const DropoutKey dropout = dropout_key(args.dropout);
        const int64_t id = args.dropout.row_ids && inside ? args.dropout.row_ids[row] : row;
        const uint32_t dropped = dropped_columns(dropout, static_cast<uint64_t>(id), me.warp_column(chunk));
        FASTTUNE_UNROLL
        for (int i = 0; i < kVector; ++i)
          g[chunk][i] = (dropped >> i) & 1u ? 0.0f : g[chunk][i] * dropout.scale;
      }
      store8(static_cast<X*>(args.dx) + offset, column, width, aligned, g[chunk]);
    }
  }

  const int64_t partial =
      me.first_row * columns;  // the groups of the grid are numbered as its first rows are
  FASTTUNE_UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (args.dweight)
      store8(args.dweight_partial + partial, me.column(chunk), columns, aligned, dweight[chunk]);
    if (args.dbias) store8(args.dbias_partial + partial, me.column(chunk), columns, aligned, dbias[chunk]);
  }
}

// A norm with a GELU has one chunk only: in its backward, two do not fit into the registers.
template <Activation kActivation>
const char* too_wide(int64_t columns) {
  if constexpr (kActivation == Activation::none)
    return columns > FASTTUNE_CUDA_MAX_NORM_COLUMNS ? "a row of a layer norm has more than 8192 columns"
                                                    : nullptr;
  else
    return columns > FASTTUNE_CUDA_MAX_NORM_GELU_COLUMNS
               ? "a row of a layer norm with a GELU has more than 4096 columns"
               : nullptr;
}

template <class X, class T, Activation kActivation>
const char* layer_norm_forward(const fasttune_layer_norm_args& args, void* stream) {
  if (const char* problem = too_wide<kActivation>(args.columns)) return problem;
  const NormShape shape = norm_shape(args.columns);
  const bool aligned =
      rows_are_aligned(args.columns, args.x, args.residual, args.weight, args.bias, args.out, args.sum);
  constexpr int kMany = kActivation == Activation::none ? kManyChunks : 1;
  const auto kernel = args.columns <= kMaxGroupWarps * kWarpColumns
                          ? layer_norm_kernel<X, T, kActivation, 1>
                          : layer_norm_kernel<X, T, kActivation, kMany>;
  return launch(kernel, divide_up<int64_t>(args.rows, shape.rows), shape.threads(), 0, stream, args, shape,
                aligned);
}

template <class X, class T, Activation kActivation>
const char* layer_norm_backward(const fasttune_layer_norm_backward_args& args, void* stream) {
  if (const char* problem = too_wide<kActivation>(args.columns)) return problem;
  const NormShape shape = norm_shape(args.columns);
  const bool aligned =
      rows_are_aligned(args.columns, args.dout, args.dsum, args.input, args.weight, args.bias, args.dx,
                       args.dresidual, args.dweight_partial, args.dbias_partial);
  constexpr int kMany = kActivation == Activation::none ? kManyChunks : 1;
  const auto kernel = args.columns <= kMaxGroupWarps * kWarpColumns
                          ? layer_norm_backward_kernel<X, T, kActivation, 1>
                          : layer_norm_backward_kernel<X, T, kActivation, kMany>;
  const char* problem =
      launch(kernel, args.partials / shape.rows, shape.threads(), 0, stream, args, shape, aligned);
  if (!problem && args.dweight)
    problem = column_sums(args.dweight_partial, args.dweight, args.weight_dtype, args.partials, args.columns,
                          stream);
  if (!problem && args.dbias)
    problem =
        column_sums(args.dbias_partial, args.dbias, args.bias_dtype, args.partials, args.columns, stream);
  return problem;
}

}  // namespace fasttune::cuda
