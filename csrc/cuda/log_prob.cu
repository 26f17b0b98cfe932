// Of a row of logits x_c = s (u_c + b_c), c of V classes, with m = max_c x_c, d_c = x_c - m,
// z = Σ_c exp(d_c), p_c = exp(d_c) / z, e = Σ_c p_c d_c and y the row's id:
//
//     log_prob = d_y - log z              logsumexp = m + log z
//     entropy  = -Σ_c p_c log p_c = log z - e
//     mean     = Σ_c x_c / V              top1 = the first c with x_c = m
//
// Backward, with upstream gradients a, l, h and g of the first four, as ∂entropy/∂x_c = -p_c (d_c - e):
//
//     du_c = s (p_c (l - a - h (d_c - e)) + g / V + [c = y] a).
//
// m, z and e are kept for it. csrc/cpu/log_prob.cpp has the derivation. A class masked by -inf adds nothing.
// Rows with y = ignore_index are 0 and get gradient 0, and are not read. An id that lies outside [0, V) and
// is not ignore_index is never used as an index: log_prob is NaN, and so is the row's gradient from it.
//
// Bytes: forward the logits once; backward the logits, replaced by their gradient; about 60 more a row, and
// the bias once a row, from L2. About 25 operations an element each way: memory is the bound. Tiling as in
// cross_entropy.cu: a block per row, a thread folds every 256th group of eight classes into sums of its own,
// merged once at the end; groups start at a row's 16-byte boundary.
#include "cuda/vector.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr float kLowest = -3.402823466e+38f;  // finite, as in cross_entropy.cu
constexpr float kFarBelow = -128.0f;          // exp is 0 from here on; d is never -inf

// Of some classes of a row: the largest logit m and its first class, Σ exp(d), Σ exp(d) d, Σ x.
struct Sums {
  float largest, sum, below, total;
  int64_t top;

  __device__ __forceinline__ void raise(float to) {
    if (!(to > largest)) return;
    const float shrink = expf(largest - to);
    below = shrink * fmaf(fmaxf(largest - to, kFarBelow), sum, below);
    sum *= shrink;
    largest = to;
  }

  __device__ __forceinline__ void merge(Sums other) {
    if (other.largest > largest || (other.largest == largest && other.top < top)) top = other.top;
    raise(other.largest);
    other.raise(largest);
    sum += other.sum;
    below += other.below;
    total += other.total;
  }
};

__device__ __forceinline__ Sums from_lane(const Sums& mine, int offset) {
  Sums other;
  other.largest = __shfl_down_sync(kFullWarp, mine.largest, offset);
  other.sum = __shfl_down_sync(kFullWarp, mine.sum, offset);
  other.below = __shfl_down_sync(kFullWarp, mine.below, offset);
  other.total = __shfl_down_sync(kFullWarp, mine.total, offset);
  other.top = __shfl_down_sync(kFullWarp, mine.top, offset);
  return other;
}

// Elements from the last 16-byte boundary at or before `row` to it.
template <class T>
__device__ __forceinline__ int64_t past_boundary(const T* row) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// s (u + b) of classes [c, c + 8); those outside [0, classes) are not to be used.
template <class T>
__device__ __forceinline__ void load_logits(const T* logits, const float* bias, float scale, int64_t c,
                                            int64_t classes, float (&x)[kVector]) {
  load8(logits, c, classes, true, x);
  FASTTUNE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    if (bias && c + i >= 0 && c + i < classes) x[i] += bias[c + i];
    x[i] *= scale;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) log_prob_kernel(const fasttune_log_prob_args args) {
  FASTTUNE_SHARED(Sums, scratch, kWarps);
  const int64_t row = blockIdx.x, classes = args.classes;
  const int64_t id = args.ids ? args.ids[row] : -1;
  if (args.ids && id == args.ignore_index) {
    if (threadIdx.x != 0) return;
    args.log_prob[row] = args.logsumexp[row] = args.entropy[row] = args.mean_logit[row] = 0.0f;
    args.top1[row] = 0;
    args.statistics[3 * row] = args.statistics[3 * row + 2] = 0.0f;
    args.statistics[3 * row + 1] = 1.0f;
    return;
  }
  const T* logits = static_cast<const T*>(args.logits) + row * args.logits_stride;
  Sums sums = {kLowest, 0.0f, 0.0f, 0.0f, classes};
  for (int64_t c = kVector * static_cast<int64_t>(threadIdx.x) - past_boundary(logits); c < classes;
       c += kVector * kThreads) {
    float x[kVector];
    load_logits(logits, args.bias, args.scale, c, classes, x);
    float largest = sums.largest;
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (c + i < 0 || c + i >= classes || !(x[i] > largest)) continue;
      largest = x[i];
      sums.top = c + i;
    }
    sums.raise(largest);
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (c + i < 0 || c + i >= classes) continue;
      const float d = x[i] - sums.largest, exponential = expf(d);
      sums.sum += exponential;
      sums.below = fmaf(exponential, fmaxf(d, kFarBelow), sums.below);
      sums.total += x[i];
    }
  }
  FASTTUNE_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sums.merge(from_lane(sums, offset));
  if (lane_index() == 0) scratch[warp_index()] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) sums.merge(scratch[i]);
  const float log_sum = logf(sums.sum), mean_below = sums.below / sums.sum;
  if (args.ids) {
    float x = nanf("");
    if (id >= 0 && id < classes) x = (to_float(logits[id]) + (args.bias ? args.bias[id] : 0.0f)) * args.scale;
    args.log_prob[row] = x - sums.largest - log_sum;
  }
  args.logsumexp[row] = sums.largest + log_sum;
  args.entropy[row] = log_sum - mean_below;
  args.mean_logit[row] = sums.total / static_cast<float>(classes);
  args.top1[row] = sums.top < classes ? sums.top : 0;
  args.statistics[3 * row] = sums.largest;
  args.statistics[3 * row + 1] = sums.sum;
  args.statistics[3 * row + 2] = mean_below;
}

__device__ __forceinline__ float upstream(const float* gradient, int64_t row, const float* divisor) {
  if (!gradient) return 0.0f;
  return divisor ? gradient[row] / *divisor : gradient[row];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    log_prob_backward_kernel(const fasttune_log_prob_backward_args args) {
  const int64_t row = blockIdx.x, classes = args.classes, id = args.ids ? args.ids[row] : -1;
  const bool ignored = args.ids && id == args.ignore_index;
  T* logits = static_cast<T*>(args.logits) + row * args.logits_stride;
  float a = ignored ? 0.0f : upstream(args.dlog_prob, row, args.divisor);
  if (args.dlog_prob && !ignored && (id < 0 || id >= classes)) a = nanf("");
  const float h = upstream(args.dentropy, row, args.divisor);
  const float largest = args.statistics[3 * row], sum = args.statistics[3 * row + 1];
  const float constant =
      args.gain * (upstream(args.dlogsumexp, row, args.divisor) - a + h * args.statistics[3 * row + 2]) / sum;
  const float linear = -args.gain * h / sum, at_id = args.gain * a;
  const float even = args.gain * upstream(args.dmean_logit, row, args.divisor) / static_cast<float>(classes);
  for (int64_t c = kVector * static_cast<int64_t>(threadIdx.x) - past_boundary(logits); c < classes;
       c += kVector * kThreads) {
    float x[kVector] = {};
    if (!ignored) {
      load_logits(logits, args.bias, args.scale, c, classes, x);
      FASTTUNE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        const float d = x[i] - largest;
        x[i] = fmaf(expf(d), fmaf(linear, fmaxf(d, kFarBelow), constant), even);
        if (c + i == id) x[i] += at_id;
      }
    }
    store8(logits, c, classes, true, x);
  }
}

}  // namespace
}  // namespace fasttune::cuda

extern "C" const char* fasttune_cuda_log_prob(const fasttune_log_prob_args* args, void* stream) {
  using namespace fasttune::cuda;
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T,
                           return launch(log_prob_kernel<T>, args->rows, kThreads, 0, stream, *args));
  return nullptr;
}

extern "C" const char* fasttune_cuda_log_prob_backward(const fasttune_log_prob_backward_args* args,
                                                       void* stream) {
  using namespace fasttune::cuda;
  FASTTUNE_WITH_CUDA_DTYPE(
      args->dtype, T, return launch(log_prob_backward_kernel<T>, args->rows, kThreads, 0, stream, *args));
  return nullptr;
}
