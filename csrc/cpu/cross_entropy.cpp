// Softmax cross-entropy with class weights w and label smoothing s over V classes. For a row x with label y
//
//     lse  = log sum_c exp(x_c)
//     loss = (1 - s) w_y (lse - x_y) + s / V sum_c w_c (lse - x_c)
//
// and, as d lse / dx_c = p_c = exp(x_c - lse), with upstream gradient u and W = sum_c w_c
//
//     dx_c = u (p_c ((1 - s) w_y + s / V W) - s / V w_c - [c = y] (1 - s) w_y).
//
// With label smoothing the logits are summed relative to m: W (m + log z) and sum_c w_c x_c would cancel
// where they lie far from 0.
//
// exp(lse) is kept as the pair (m, z) with exp(lse) = z exp(m), m the largest logit: p_c = exp(x_c - m) / z
// then has no rounding error that grows with the logits, as x_c - lse would have.
//
// Rows with y = ignore_index have loss 0 and gradient 0, and are not read.
//
// The forward reads the logits once: an online softmax over blocks of 1024 classes, which are still in L1
// when their maximum is known and their exponentials are summed. Backward reads and writes each element once.
// A row belongs to one thread, which runs forward and backward back to back when both are asked for: the row
// (200 KB at GPT-2's vocabulary) is then still in L2, so that memory sees one read and one write. About 25
// fp32 operations per element, half of them in each of the two exponentials.
#include "cpu/cross_entropy.h"

#include "cpu/simd/begin.h"

constexpr int64_t kBlock = 1024;
// Gradients of probabilities below this become 0. They change nothing, but the products that follow would
// run into subnormal numbers: with logits of spread 16 the three products of linear_cross_entropy took 60
// times as long.
constexpr float kNegligible = 7.888609052210118e-31f;  // 2^-100, and for tiny upstream gradients
constexpr float kShare = 8.271806125530277e-25f;       // 2^-80 of the row's largest

// x_c + bias_c for kLanes classes from c on, n of them valid.
template <class T>
FT_INLINE F logit(const T* x, const float* bias, int64_t c, int64_t n) {
  if (n >= kLanes) return bias ? load(x + c) + load(bias + c) : load(x + c);
  return bias ? load_n(x + c, n) + load_n(bias + c, n) : load_n(x + c, n);
}

template <class T>
FT_INLINE float logit_at(const T* x, const float* bias, int64_t c) {
  return logit(x, bias, c, 1).v[0];
}

FT_INLINE M lanes_that_exist(int64_t n) { return less_than(lane_index(), set1_u(static_cast<uint32_t>(n))); }

struct RowStatistics {
  float largest;
  double sum;       // of exp(x_c - largest)
  double weighted;  // sum_c w_c (x_c - largest), where label smoothing needs it
};

template <class T>
RowStatistics row_statistics(const CrossEntropyArgs& args, const T* x) {
  const bool smooth = args.label_smoothing != 0.0f;
  const float lowest = std::numeric_limits<float>::lowest();
  float largest = lowest;  // finite, so that classes masked by -inf add nothing instead of NaN
  double sum = 0.0, weighted = 0.0, seen = 0.0;  // seen: sum of the weights so far
  for (int64_t begin = 0; begin < args.classes; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, args.classes),
                  whole = begin + (end - begin) / kLanes * kLanes;
    F top0 = set1(lowest), top1 = top0;
    int64_t c = begin;
    for (; c + 2 * kLanes <= whole; c += 2 * kLanes) {
      top0 = max(logit(x, args.bias, c, kLanes), top0);
      top1 = max(logit(x, args.bias, c + kLanes, kLanes), top1);
    }
    for (; c < whole; c += kLanes) top0 = max(logit(x, args.bias, c, kLanes), top0);
    float block_largest = reduce_max(max(top0, top1));
    for (c = whole; c < end; ++c) block_largest = std::max(block_largest, logit_at(x, args.bias, c));
    if (block_largest > largest) {
      sum *= std::exp(static_cast<double>(largest) - block_largest);
      if (seen != 0.0) weighted -= seen * (static_cast<double>(block_largest) - largest);
      largest = block_largest;
    }
    const F shift = set1(largest);
    F sum0 = zero(), sum1 = zero();
    for (c = begin; c + 2 * kLanes <= whole; c += 2 * kLanes) {
      sum0 = sum0 + exp(logit(x, args.bias, c, kLanes) - shift);
      sum1 = sum1 + exp(logit(x, args.bias, c + kLanes, kLanes) - shift);
    }
    for (; c < whole; c += kLanes) sum0 = sum0 + exp(logit(x, args.bias, c, kLanes) - shift);
    if (whole < end) {
      const int64_t n = end - whole;
      float lanes[kLanes];
      store(lanes, exp(logit(x, args.bias, whole, n) - shift));
      for (int64_t i = 0; i < n; ++i) sum += lanes[i];
    }
    sum += reduce_add(sum0 + sum1);
    if (smooth) {
      F partial = zero(), weights = zero();
      for (c = begin; c < end; c += kLanes) {
        const int64_t n = end - c;
        const F value = logit(x, args.bias, c, n) - shift;
        if (!args.class_weight) {
          partial = partial + (n >= kLanes ? value : keep(lanes_that_exist(n), value));
        } else {
          const F w =
              n >= kLanes ? load(args.class_weight + c) : load_n(args.class_weight + c, n);  // zeros beyond
          partial = fma(value, w, partial);
          weights = weights + w;
        }
      }
      weighted += reduce_add(partial);
      seen = args.class_weight ? seen + reduce_add(weights) : static_cast<double>(end);
    }
  }
  return {largest, sum, weighted};
}

// gradient = exp(x_c - shift) * slope - smoothing * w_c, without the label's own term; added to `partial` too
// if not null.
template <class T>
FT_INLINE void gradient_lanes(const T* x, T* gradient, const CrossEntropyArgs& args, float* partial,
                              int64_t c, int64_t n, F shift, F slope, F negligible, F smoothing) {
  F value = exp(logit(x, args.bias, c, n) - shift) * slope;
  value = select(abs(value) < negligible, zero(), value);  // NaN stays
  if (args.label_smoothing != 0.0f) {
    if (!args.class_weight)
      value = value - smoothing;
    else
      value = fnma(n >= kLanes ? load(args.class_weight + c) : load_n(args.class_weight + c, n), smoothing,
                   value);
  }
  if (n >= kLanes) {
    store(gradient + c, value);
    if (partial) store(partial + c, load(partial + c) + value);
  } else {
    store_n(gradient + c, value, n);
    if (partial) store_n(partial + c, load_n(partial + c, n) + value, n);
  }
}

template <class T>
void cross_entropy_row(const CrossEntropyArgs& args, int64_t row, float* partial) {
  const T* x = static_cast<const T*>(args.logits) + row * args.logits_stride;
  T* gradient = args.gradient ? static_cast<T*>(args.gradient) + row * args.gradient_stride : nullptr;
  const int64_t label = args.target[row], classes = args.classes;
  if (label == args.ignore_index) {
    if (args.loss) args.loss[row] = 0.0f;
    if (args.loss && args.statistics) args.statistics[2 * row] = args.statistics[2 * row + 1] = 0.0f;
    if (gradient) std::memset(static_cast<void*>(gradient), 0, classes * sizeof(T));
    return;
  }
  const float label_weight =
      (args.class_weight ? args.class_weight[label] : 1.0f) * (1.0f - args.label_smoothing);
  const float smoothing = args.label_smoothing / static_cast<float>(classes);
  // Without smoothing the other classes' weights do not count, not even one that is NaN.
  const float total_weight = smoothing != 0.0f ? static_cast<float>(args.class_weight_sum) : 0.0f;
  const float label_logit = logit_at(x, args.bias, label);
  float largest, sum;
  if (args.loss) {
    const RowStatistics row_is = row_statistics(args, x);
    largest = row_is.largest;
    sum = static_cast<float>(row_is.sum);
    const double log_sum = std::log(row_is.sum), above_label = static_cast<double>(largest) - label_logit;
    double loss = label_weight * (above_label + log_sum);
    if (smoothing != 0.0f) loss += smoothing * (args.class_weight_sum * log_sum - row_is.weighted);
    args.loss[row] = static_cast<float>(loss);
    if (args.statistics) args.statistics[2 * row] = largest, args.statistics[2 * row + 1] = sum;
  } else {
    largest = args.statistics[2 * row];
    sum = args.statistics[2 * row + 1];
  }
  if (!gradient) return;

  const float upstream = args.scale * (args.row_scale ? args.row_scale[row * args.row_scale_stride] : 1.0f);
  const float slope = upstream * (label_weight + smoothing * total_weight) / sum;
  const F shift = set1(largest), slope_lanes = set1(slope), smoothing_lanes = set1(upstream * smoothing);
  const F negligible = set1(std::min(kNegligible, kShare * std::abs(slope)));
  int64_t c = 0;
  for (; c + 2 * kLanes <= classes; c += 2 * kLanes) {
    gradient_lanes(x, gradient, args, partial, c, kLanes, shift, slope_lanes, negligible, smoothing_lanes);
    gradient_lanes(x, gradient, args, partial, c + kLanes, kLanes, shift, slope_lanes, negligible,
                   smoothing_lanes);
  }
  for (; c < classes; c += kLanes)
    gradient_lanes(x, gradient, args, partial, c, classes - c, shift, slope_lanes, negligible,
                   smoothing_lanes);
  // The label's own term, from the logit read above: what was stored may already be rounded.
  float at_label = slope * std::exp(label_logit - largest) - upstream * label_weight;
  at_label -= upstream * smoothing * (args.class_weight ? args.class_weight[label] : 1.0f);
  store_n(gradient + label, set1(at_label), 1);
  if (partial) partial[label] -= upstream * label_weight;
}

void cross_entropy(const CrossEntropyArgs& args) {
  const int64_t group_rows = args.bias_partial ? kBiasGroup : 1;
  const int64_t groups = (args.rows + group_rows - 1) / group_rows;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, args.classes * group_rows));
  parallel_for(groups, grain, [&](int64_t begin, int64_t end) FT_LAMBDA {
    for (int64_t group = begin; group < end; ++group) {
      float* partial = args.bias_partial ? args.bias_partial + group * args.classes : nullptr;
      if (partial) std::memset(partial, 0, args.classes * sizeof(float));
      const int64_t last = std::min(args.rows, (group + 1) * group_rows);
      for (int64_t row = group * group_rows; row < last; ++row) {
        FASTTUNE_WITH_DTYPE(args.dtype, T, cross_entropy_row<T>(args, row, partial));
      }
    }
  });
}

// out += the sum of x over its rows. Threads take ranges of columns, each summed in the order of the rows.
void sum_rows(const SumRowsArgs& args) {
  parallel_for(args.columns, 1024, [&](int64_t begin, int64_t end) FT_LAMBDA {
    for (int64_t c = begin; c < end; c += kLanes) {
      const int64_t n = end - c;
      F sum = zero();
      for (int64_t row = 0; row < args.rows; ++row) {
        const float* x = args.x + row * args.columns + c;
        sum = sum + (n >= kLanes ? load(x) : load_n(x, n));
      }
      if (n >= kLanes)
        store(args.out + c, load(args.out + c) + sum);
      else
        store_n(args.out + c, load_n(args.out + c, n) + sum, n);
    }
  });
}

#include "cpu/simd/end.h"
