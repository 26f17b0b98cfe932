// The largest logit of each (sequence, class) over the sequence's tokens, and its gradients.
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

// Takes logits of some rows and classes into maxima that earlier rows may have begun.
struct LinearMaxArgs {
  DType dtype;
  int64_t sequences, rows, classes;
  int64_t first_row;       // the number of the first of these rows among all; rows < 2^24
  const void* logits;      // (rows, classes)
  int64_t logits_stride;   // elements between rows
  const float* bias;       // (classes,) added to the logits, or null
  const int64_t* offsets;  // (sequences + 1,) first row of each sequence, and the end
  float* best;             // (sequences, classes); written where a sequence has some of these rows
  int64_t best_stride;
  int32_t* token;  // (sequences, classes) row of the maximum among all
  int64_t token_stride;
};

FASTTUNE_KERNEL(linear_max, LinearMaxArgs)

struct LinearMaxGradientArgs {
  DType input_dtype, weight_dtype;
  int64_t sequences, rows, classes, features;
  const int64_t* offsets;  // (sequences + 1,)
  const int32_t* token;    // (sequences, classes) row of the maximum, negative where there is none
  const float* dout;       // (sequences, classes)
  const void* input;       // (rows, features)
  int64_t input_stride;
  const void* weight;  // (classes, features)
  int64_t weight_stride;
  float* dinput;  // (rows, features) added to, or null
  void* dweight;  // (classes, features) in weight_dtype, or null
  float* dbias;   // (classes,) or null
};

FASTTUNE_KERNEL(linear_max_input_gradient, LinearMaxGradientArgs)
FASTTUNE_KERNEL(linear_max_weight_gradient, LinearMaxGradientArgs)

}  // namespace fasttune
