// What a row of logits says without being kept: log-probability of a class, log-sum-exp, entropy, mean and
// largest class; serves linear_log_prob.
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

// A row's logits are x_c = scale (logits_c + bias_c).
struct LogProbArgs {
  DType dtype;
  int64_t rows, classes;
  const void* logits;     // (rows, classes)
  int64_t logits_stride;  // elements between rows
  const float* bias;      // (classes,) or null
  float scale;
  const int64_t* ids;  // (rows,) in [0, classes), or null
  float* log_prob;     // (rows,), where there are ids
  float* logsumexp;    // (rows,)
  float* entropy;      // (rows,)
  float* mean_logit;   // (rows,)
  int64_t* top1;       // (rows,)
  float* statistics;   // (rows, 3) largest logit m, z = sum exp(x - m), sum p (x - m)
};

FASTTUNE_KERNEL(log_prob, LogProbArgs)

struct LogProbBackwardArgs {
  DType dtype;
  int64_t rows, classes;
  void* logits;  // (rows, classes), replaced by their gradient
  int64_t logits_stride;
  const float* bias;
  float scale;
  const int64_t* ids;
  const float* statistics;  // (rows, 3)
  const float* dlog_prob;   // upstream gradients (rows,), each null for zeros
  const float* dlogsumexp;
  const float* dentropy;
  const float* dmean_logit;
  float* bias_partial;  // (ceil(rows / kBiasGroup), classes) sums of the gradient over groups, or null
};

FASTTUNE_KERNEL(log_prob_backward, LogProbBackwardArgs)

}  // namespace fasttune
