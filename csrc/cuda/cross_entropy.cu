// Softmax cross-entropy with class weights w and label smoothing s over V classes. For a row x with label y
//
//     lse  = log Σ_c exp(x_c)
//     loss = (1 - s) w_y (lse - x_y) + s / V Σ_c w_c (lse - x_c)
//
// and, as d lse / dx_c = p_c = exp(x_c - lse), with upstream gradient u and W = Σ_c w_c
//
//     dx_c = u (p_c ((1 - s) w_y + s / V W) - s / V w_c - [c = y] (1 - s) w_y).
//
// exp(lse) is kept as the pair (m, z) with exp(lse) = z exp(m), m the largest logit: p_c = exp(x_c - m) / z
// then has no rounding error that grows with the logits, as x_c - lse would have. Σ_c w_c (x_c - m) is
// carried along with them.
//
// Rows with y = ignore_index have loss 0 and gradient 0, and are not read. A label that lies outside [0, V)
// and is not ignore_index is never used as an index: the row's loss and gradient are NaN.
//
// Bytes: forward the logits once; backward the logits and the gradient once each, which may be one memory.
// Operations: about 25 an element each way, half of them in the exponential; memory is the bound. Tiling: a
// block per row. A thread folds every 256th group of eight classes into its own (m, z), without looking at
// the others (Milakov and Gimelshein 2018); the pairs are merged once at the end. Vocabularies are seldom
// multiples of 8 (50257): the groups start at a row's 16-byte boundary, not at class 0, and only the ends of
// a row are read singly.
#include "cuda/vector.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr float kLowest =
    -3.402823466e+38f;  // finite, so that classes masked by -inf add nothing instead of NaN

// Of some classes of a row: the largest logit m, Σ exp(x - m), Σ w (x - m), Σ w.
struct Softmax {
  float largest, sum, weighted, weights;

  __device__ __forceinline__ void raise(float to) {
    if (!(to > largest)) return;
    sum *= expf(largest - to);
    if (weights != 0.0f) weighted -= (to - largest) * weights;
    largest = to;
  }

  __device__ __forceinline__ void merge(Softmax other) {
    raise(other.largest);
    other.raise(largest);
    sum += other.sum;
    weighted += other.weighted;
    weights += other.weights;
  }
};

__device__ __forceinline__ Softmax from_lane(const Softmax& mine, int offset) {
  Softmax other;
  other.largest = __shfl_down_sync(kFullWarp, mine.largest, offset);
  other.sum = __shfl_down_sync(kFullWarp, mine.sum, offset);
  other.weighted = __shfl_down_sync(kFullWarp, mine.weighted, offset);
  other.weights = __shfl_down_sync(kFullWarp, mine.weights, offset);
  return other;
}

// Elements from the last 16-byte boundary at or before `row` to it.
template <class T>
__device__ __forceinline__ int64_t past_boundary(const T* row) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const fasttune_cross_entropy_args args) {
  FASTTUNE_SHARED(Softmax, scratch, kWarps);
  const int64_t row = blockIdx.x, classes = args.classes, label = args.target[row];
  if (label == args.ignore_index) {
    if (threadIdx.x == 0) {
      args.loss[row] = 0.0f;
      args.statistics[2 * row] = 0.0f;
      args.statistics[2 * row + 1] = 1.0f;
    }
    return;
  }
  const T* logits = static_cast<const T*>(args.logits) + row * args.logits_stride;
  const bool smooth = args.label_smoothing != 0.0f;
  Softmax softmax = {kLowest, 0.0f, 0.0f, 0.0f};
  for (int64_t c = kVector * static_cast<int64_t>(threadIdx.x) - past_boundary(logits); c < classes;
       c += kVector * kThreads) {
    float x[kVector];
    load8(logits, c, classes, true, x);
    float largest = kLowest;
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i)
      if (c + i >= 0 && c + i < classes) largest = fmaxf(largest, x[i]);
    softmax.raise(largest);
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (c + i < 0 || c + i >= classes) continue;
      softmax.sum += expf(x[i] - softmax.largest);
      if (!smooth) continue;
      const float weight = args.class_weight ? args.class_weight[c + i] : 1.0f;
      softmax.weighted = fmaf(weight, x[i] - softmax.largest, softmax.weighted);
      softmax.weights += weight;
    }
  }
  FASTTUNE_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) softmax.merge(from_lane(softmax, offset));
  if (lane_index() == 0) scratch[warp_index()] = softmax;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) softmax.merge(scratch[i]);
  const float log_sum = logf(softmax.sum);  // lse - m
  float loss = nanf("");
  if (label >= 0 && label < classes) {
    const float weight = args.class_weight ? args.class_weight[label] : 1.0f;
    loss = (1.0f - args.label_smoothing) * weight * (softmax.largest - to_float(logits[label]) + log_sum);
    if (smooth)
      loss += args.label_smoothing / static_cast<float>(classes) *
              fmaf(softmax.weights, log_sum, -softmax.weighted);
  }
  args.loss[row] = loss;
  args.statistics[2 * row] = softmax.largest;
  args.statistics[2 * row + 1] = softmax.sum;
}

// The sum of all losses and of the labels' weights: one block, in a fixed order, in float64 so that it does
// not matter how many rows there are.
constexpr int kSumThreads = 512;

__global__ void __launch_bounds__(kSumThreads) loss_sum_kernel(const fasttune_cross_entropy_args args) {
  FASTTUNE_SHARED(double2, scratch, kSumThreads);
  double2 sums = make_double2(0.0, 0.0);
  for (int64_t row = threadIdx.x; row < args.rows; row += kSumThreads) {
    sums.x += args.loss[row];
    const int64_t label = args.target[row];
    if (label == args.ignore_index || label < 0 || label >= args.classes) continue;
    sums.y += args.class_weight ? args.class_weight[label] : 1.0f;
  }
  scratch[threadIdx.x] = sums;
  __syncthreads();
  for (int stride = kSumThreads / 2; stride > 0; stride /= 2) {
    if (threadIdx.x < static_cast<unsigned>(stride)) {
      scratch[threadIdx.x].x += scratch[threadIdx.x + stride].x;
      scratch[threadIdx.x].y += scratch[threadIdx.x + stride].y;
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const double2 totals = scratch[0];
  if (args.total) *args.total = static_cast<float>(totals.y);
  if (args.loss_sum) *args.loss_sum = static_cast<float>(args.total ? totals.x / totals.y : totals.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_backward_kernel(const fasttune_cross_entropy_backward_args args) {
  const int64_t row = blockIdx.x, classes = args.classes, label = args.target[row];
  const T* logits = static_cast<const T*>(args.logits) + row * args.logits_stride;
  T* gradient = static_cast<T*>(args.dlogits) + row * args.dlogits_stride;
  const bool ignored = label == args.ignore_index, wrong = !ignored && (label < 0 || label >= classes);
  const float smoothing = args.label_smoothing / static_cast<float>(classes);
  float upstream = ignored ? 0.0f : args.dloss[row * args.dloss_stride];
  if (args.total && !ignored) upstream /= *args.total;
  if (wrong) upstream = nanf("");
  const float weight = ignored || wrong || !args.class_weight ? 1.0f : args.class_weight[label];
  const float hit = upstream * (1.0f - args.label_smoothing) * weight;
  const float spread = upstream * smoothing;
  // Without smoothing the other classes' weights do not count, not even one that is NaN.
  const bool smooth_weights = args.class_weight && smoothing != 0.0f;
  const float weights =
      smooth_weights && args.class_weight_sum ? *args.class_weight_sum : static_cast<float>(classes);
  const float largest = args.statistics[2 * row];
  const float slope = fmaf(spread, weights, hit) / args.statistics[2 * row + 1];
  const int64_t shift = past_boundary(logits);
  const bool same_boundaries = shift == past_boundary(static_cast<const T*>(gradient));
  for (int64_t c = kVector * static_cast<int64_t>(threadIdx.x) - shift; c < classes;
       c += kVector * kThreads) {
    float x[kVector] = {};
    if (!ignored) {
      load8(logits, c, classes, true, x);
      FASTTUNE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        const bool weighted = smooth_weights && c + i >= 0 && c + i < classes;
        x[i] = fmaf(expf(x[i] - largest), slope, -spread * (weighted ? args.class_weight[c + i] : 1.0f));
        if (c + i == label) x[i] -= hit;
      }
    }
    store8(gradient, c, classes, same_boundaries, x);
  }
}

}  // namespace
}  // namespace fasttune::cuda

extern "C" const char* fasttune_cuda_cross_entropy(const fasttune_cross_entropy_args* args, void* stream) {
  using namespace fasttune::cuda;
  const char* problem = nullptr;
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T,
                           problem = launch(cross_entropy_kernel<T>, args->rows, kThreads, 0, stream, *args));
  if (problem || (!args->loss_sum && !args->total)) return problem;
  return launch(loss_sum_kernel, 1, kSumThreads, 0, stream, *args);
}

extern "C" const char* fasttune_cuda_cross_entropy_backward(const fasttune_cross_entropy_backward_args* args,
                                                            void* stream) {
  using namespace fasttune::cuda;
  FASTTUNE_WITH_CUDA_DTYPE(
      args->dtype, T,
      return launch(cross_entropy_backward_kernel<T>, args->rows, kThreads, 0, stream, *args));
  return nullptr;
}
