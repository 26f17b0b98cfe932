// Of a row of logits x_c = s (u_c + b_c), c of V classes, with m = max_c x_c, d_c = x_c - m,
// z = sum_c exp(d_c), p_c = exp(d_c) / z and e = sum_c p_c d_c:
//
//     logsumexp = m + log z                log_prob  = d_y - log z, y the row's id
//     entropy   = -sum_c p_c log p_c = log z - e
//     mean      = sum_c x_c / V            top1 = the first c with x_c = m
//
// Backward, with upstream gradients a of log_prob, l of logsumexp, h of entropy and g of mean. As
// d log_prob / dx_c = [c = y] - p_c, d logsumexp / dx_c = p_c and d entropy / dx_c = -p_c (log p_c + entropy)
// = -p_c (d_c - e),
//
//     du_c = s (p_c (l - a - h (d_c - e)) + g / V + [c = y] a).
//
// The statistics kept for it are m, z and e: p_c = exp(d_c) / z has no rounding error that grows with the
// logits, and d_c - e needs neither logarithm nor entropy. The mean sums the logits themselves: relative to m
// a small mean would cancel. A class masked by -inf has p_c = 0 and counts as 0 in e, where 0 * -inf would be
// NaN.
//
// Forward reads the logits once from memory: online sums over blocks of 1024 classes, which are still in L1
// when their maximum is known; when it rises by r, z becomes z exp(-r), and sum exp(d) d becomes
// exp(-r) (sum exp(d) d - r z). Backward reads and writes each element once. About 25 fp32 operations per
// element each way, half of them in the exponential. A row belongs to one thread.
#include "cpu/log_prob.h"

#include "cpu/cross_entropy.h"
#include "cpu/simd/begin.h"

constexpr int64_t kBlock = 1024;
// Vectors whose logits are summed in float32: their sum may cancel from block to block, those of the
// exponentials do not.
constexpr int64_t kStrip = 16;
// exp is 0 from here on; below, d is this, and never -inf.
constexpr float kFarBelow = -128.0f;
// Gradients of probabilities below this become 0, for the products that follow; see cross_entropy.cpp.
constexpr float kNegligible = 7.888609052210118e-31f;  // 2^-100, and for tiny upstream gradients
constexpr float kShare = 8.271806125530277e-25f;       // 2^-80 of the row's factors

template <class T>
struct Row {
  const T* logits;
  const float* bias;
  float scale;

  // x of kLanes classes from c on, n of them valid.
  FT_INLINE F lanes(int64_t c, int64_t n) const {
    const F x = n >= kLanes ? load(logits + c) : load_n(logits + c, n);
    if (!bias) return x * set1(scale);
    return (x + (n >= kLanes ? load(bias + c) : load_n(bias + c, n))) * set1(scale);
  }
  FT_INLINE float at(int64_t c) const { return lanes(c, 1).v[0]; }
};

FT_INLINE M lanes_that_exist(int64_t n) { return less_than(lane_index(), set1_u(static_cast<uint32_t>(n))); }

template <class T>
FT_INLINE int64_t first_class_with(const Row<T>& x, float value, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c)
    if (x.at(c) == value) return c;
  return begin;
}

struct Sums {
  F exps, weighted, logits;  // of exp(d), exp(d) d, x

  FT_INLINE void add(F x, F shift) {
    const F d = x - shift, e = exp(d);
    exps = exps + e;
    weighted = fma(e, max(set1(kFarBelow), d), weighted);  // NaN stays
    logits = logits + x;
  }
  FT_INLINE void add_first(F x, F shift, int64_t n) {
    const M exist = lanes_that_exist(n);
    const F d = x - shift, e = keep(exist, exp(d));
    exps = exps + e;
    weighted = weighted + keep(exist, e * max(set1(kFarBelow), d));
    logits = logits + keep(exist, x);
  }
};

template <class T>
void log_prob_row(const LogProbArgs& args, int64_t row) {
  const Row<T> x = {static_cast<const T*>(args.logits) + row * args.logits_stride, args.bias, args.scale};
  const float lowest = std::numeric_limits<float>::lowest();
  float largest = lowest;  // finite, so that classes masked by -inf add nothing instead of NaN
  double sum = 0.0, weighted = 0.0, total = 0.0;
  int64_t top_begin = 0, top_end = 0;  // the block that holds the largest logit
  for (int64_t begin = 0; begin < args.classes; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, args.classes),
                  whole = begin + (end - begin) / kLanes * kLanes;
    F top0 = set1(lowest), top1 = top0;
    int64_t c = begin;
    for (; c + 2 * kLanes <= whole; c += 2 * kLanes) {
      top0 = max(x.lanes(c, kLanes), top0);
      top1 = max(x.lanes(c + kLanes, kLanes), top1);
    }
    for (; c < whole; c += kLanes) top0 = max(x.lanes(c, kLanes), top0);
    float block_largest = reduce_max(max(top0, top1));
    for (c = whole; c < end; ++c) block_largest = std::max(block_largest, x.at(c));
    if (block_largest > largest) {
      const double rise = static_cast<double>(block_largest) - largest, shrink = std::exp(-rise);
      weighted = shrink * (weighted - rise * sum);
      sum *= shrink;
      largest = block_largest;
      top_begin = begin;
      top_end = end;
    }
    const F shift = set1(largest);
    Sums sums0 = {zero(), zero(), zero()}, sums1 = sums0;
    for (c = begin; c < whole;) {
      const int64_t stop = std::min(whole, c + kStrip * kLanes);
      for (; c + 2 * kLanes <= stop; c += 2 * kLanes) {
        sums0.add(x.lanes(c, kLanes), shift);
        sums1.add(x.lanes(c + kLanes, kLanes), shift);
      }
      for (; c < stop; c += kLanes) sums0.add(x.lanes(c, kLanes), shift);
      total += reduce_add(sums0.logits + sums1.logits);
      sums0.logits = sums1.logits = zero();
    }
    if (whole < end) sums1.add_first(x.lanes(whole, end - whole), shift, end - whole);
    total += reduce_add(sums1.logits);
    sum += reduce_add(sums0.exps + sums1.exps);
    weighted += reduce_add(sums0.weighted + sums1.weighted);
  }
  const double log_sum = std::log(sum), mean_below = weighted / sum;
  if (args.ids)
    args.log_prob[row] = static_cast<float>(static_cast<double>(x.at(args.ids[row])) - largest - log_sum);
  args.logsumexp[row] = static_cast<float>(largest + log_sum);
  args.entropy[row] = static_cast<float>(log_sum - mean_below);
  args.mean_logit[row] = static_cast<float>(total / static_cast<double>(args.classes));
  args.top1[row] = first_class_with(x, largest, top_begin, top_end);
  args.statistics[3 * row] = largest;
  args.statistics[3 * row + 1] = static_cast<float>(sum);
  args.statistics[3 * row + 2] = static_cast<float>(mean_below);
}

void log_prob(const LogProbArgs& args) {
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, args.classes));
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) FT_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      FASTTUNE_WITH_DTYPE(args.dtype, T, log_prob_row<T>(args, row));
    }
  });
}

// du_c = exp(d_c) (constant + linear d_c) + even for every class.
struct Slopes {
  float largest, constant, linear, even, negligible;
};

template <class T>
FT_INLINE void gradient_lanes(const Row<T>& x, T* gradient, float* partial, int64_t c, int64_t n,
                              const Slopes& is) {
  const F d = x.lanes(c, n) - set1(is.largest);
  const F bounded = max(set1(kFarBelow), d);
  F value = exp(d) * fma(set1(is.linear), bounded, set1(is.constant));
  value = select(abs(value) < set1(is.negligible), zero(), value) + set1(is.even);  // NaN stays
  if (n >= kLanes) {
    store(gradient + c, value);
    if (partial) store(partial + c, load(partial + c) + value);
  } else {
    store_n(gradient + c, value, n);
    if (partial) store_n(partial + c, load_n(partial + c, n) + value, n);
  }
}

FT_INLINE float upstream(const float* gradient, int64_t row) { return gradient ? gradient[row] : 0.0f; }

template <class T>
void log_prob_backward_row(const LogProbBackwardArgs& args, int64_t row, float* partial) {
  T* gradient = static_cast<T*>(args.logits) + row * args.logits_stride;
  const Row<T> x = {gradient, args.bias, args.scale};
  const float largest = args.statistics[3 * row], sum = args.statistics[3 * row + 1],
              mean_below = args.statistics[3 * row + 2];
  const float a = upstream(args.dlog_prob, row), h = upstream(args.dentropy, row);
  Slopes is;
  is.largest = largest;
  is.constant = args.scale * (upstream(args.dlogsumexp, row) - a + h * mean_below) / sum;
  is.linear = -args.scale * h / sum;
  is.even = args.scale * upstream(args.dmean_logit, row) / static_cast<float>(args.classes);
  is.negligible = std::min(kNegligible, kShare * (std::abs(is.constant) + std::abs(is.linear)));
  const int64_t id = args.dlog_prob ? args.ids[row] : -1;
  const float id_below = id >= 0 ? x.at(id) - largest : 0.0f;
  int64_t c = 0;
  for (; c + 2 * kLanes <= args.classes; c += 2 * kLanes) {
    gradient_lanes(x, gradient, partial, c, kLanes, is);
    gradient_lanes(x, gradient, partial, c + kLanes, kLanes, is);
  }
  for (; c < args.classes; c += kLanes) gradient_lanes(x, gradient, partial, c, args.classes - c, is);
  if (id < 0) return;
  // The id's own term, from the logit read above: what was stored may already be rounded.
  const float of_p = std::exp(id_below) * (is.constant + is.linear * std::max(kFarBelow, id_below));
  store_n(gradient + id, set1(of_p + is.even + args.scale * a), 1);
  if (partial) partial[id] += args.scale * a;
}

void log_prob_backward(const LogProbBackwardArgs& args) {
  const int64_t group_rows = args.bias_partial ? kBiasGroup : 1;
  const int64_t groups = (args.rows + group_rows - 1) / group_rows;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, args.classes * group_rows));
  parallel_for(groups, grain, [&](int64_t begin, int64_t end) FT_LAMBDA {
    for (int64_t group = begin; group < end; ++group) {
      float* partial = args.bias_partial ? args.bias_partial + group * args.classes : nullptr;
      if (partial) std::memset(partial, 0, args.classes * sizeof(float));
      const int64_t last = std::min(args.rows, (group + 1) * group_rows);
      for (int64_t row = group * group_rows; row < last; ++row) {
        FASTTUNE_WITH_DTYPE(args.dtype, T, log_prob_backward_row<T>(args, row, partial));
      }
    }
  });
}

#include "cpu/simd/end.h"
