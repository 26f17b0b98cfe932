// Softmax cross-entropy of rows of logits against class indices; serves cross_entropy and
// linear_cross_entropy.
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

// Rows that share one partial sum of the bias gradient. Fixed, so that sums do not depend on the threads.
constexpr int64_t kBiasGroup = 8;

struct CrossEntropyArgs {
  DType dtype;
  int64_t rows, classes;
  const void* logits;         // (rows, classes)
  int64_t logits_stride;      // elements between rows
  const float* bias;          // (classes,) added to the logits, or null
  const int64_t* target;      // (rows,) in [0, classes) or ignore_index
  const float* class_weight;  // (classes,) or null for ones
  double class_weight_sum;    // over all classes
  int64_t ignore_index;
  float label_smoothing;
  // Forward, where `loss` is not null.
  float* loss;        // (rows,)
  float* statistics;  // (rows, 2) largest logit m, sum exp(x - m): written by the forward unless null
  // Backward, where `gradient` is not null; after a forward in the same call, or from `statistics`.
  void* gradient;  // (rows, classes); may be `logits` itself
  int64_t gradient_stride;
  const float* row_scale;  // upstream gradient: row_scale[row * row_scale_stride] * scale; null for ones
  int64_t row_scale_stride;
  float scale;
  float* bias_partial;  // (ceil(rows / kBiasGroup), classes) sums of the gradient over groups, or null
};

FASTTUNE_KERNEL(cross_entropy, CrossEntropyArgs)

struct SumRowsArgs {
  const float* x;  // (rows, columns)
  float* out;      // (columns,) added to
  int64_t rows, columns;
};

FASTTUNE_KERNEL(sum_rows, SumRowsArgs)

}  // namespace fasttune
