// Layer normalisation of rows, with what stands before it (dropout and residual, or GELU) or after it (GELU)
// in the same pass, and the gradients.
#pragma once
#include <cstdint>

#include "cpu/dropout.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

enum class Gelu : int { none = 0, erf = 1, tanh = 2 };

struct LayerNormArgs {
  DType dtype;    // of residual, sum and out
  DType x_dtype;  // of x: may be 16-bit beside an fp32 residual; otherwise dtype
  DType weight_dtype, bias_dtype;
  const void* x;         // (rows, columns)
  const void* residual;  // (rows, columns) or null
  const void* weight;    // (columns,) or null: ones
  const void* bias;      // (columns,) or null: zeros
  void* out;             // (rows, columns)
  void* sum;             // (rows, columns) or null: dropout(x) + residual, the input of the norm
  float* statistics;     // (2, rows): the mean of each row, then 1 / standard deviation
  int64_t rows, columns;
  double eps;
  const int64_t* row_ids;  // (rows,) logical row of each row for the dropout, or null for 0, 1, 2, ...
  DropoutSpec dropout;
  Gelu gelu = Gelu::none;  // layer_norm_gelu and gelu_layer_norm only
};

struct LayerNormBackwardArgs {
  DType dtype;    // of dout, dsum, input and dresidual
  DType x_dtype;  // of dx
  DType weight_dtype, bias_dtype;
  const void* dout;         // (rows, columns)
  const void* dsum;         // (rows, columns) or null: the gradient that reaches the sum by itself
  const void* input;        // (rows, columns): the sum, or x where nothing was added
  const void* weight;       // (columns,) or null: ones
  const void* bias;         // (columns,) or null; read by layer_norm_gelu alone
  const float* statistics;  // (2, rows)
  void* dx;                 // (rows, columns) or null: not wanted
  void* dresidual;          // (rows, columns) or null: not wanted
  void* dweight;            // (columns,) or null: not wanted
  void* dbias;              // (columns,) or null: not wanted
  int64_t rows, columns;
  const int64_t* row_ids;
  DropoutSpec dropout;
  Gelu gelu = Gelu::none;
};

FASTTUNE_KERNEL(layer_norm, LayerNormArgs)  // LN(dropout(x) + residual)
FASTTUNE_KERNEL(layer_norm_backward, LayerNormBackwardArgs)
FASTTUNE_KERNEL(layer_norm_gelu, LayerNormArgs)  // GELU(LN(x))
FASTTUNE_KERNEL(layer_norm_gelu_backward, LayerNormBackwardArgs)
FASTTUNE_KERNEL(gelu_layer_norm, LayerNormArgs)  // LN(GELU(x))
FASTTUNE_KERNEL(gelu_layer_norm_backward, LayerNormBackwardArgs)

}  // namespace fasttune
