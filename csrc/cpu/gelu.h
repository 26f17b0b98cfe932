// GELU(x + bias), erf or tanh form, and its gradients.
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

struct BiasGeluArgs {
  DType dtype, bias_dtype;
  const void* x;     // (rows, columns)
  const void* bias;  // (columns,) or null
  void* out;         // (rows, columns)
  int64_t rows, columns;
  bool tanh;
};

struct BiasGeluBackwardArgs {
  DType dtype, bias_dtype;
  const void* dout;  // (rows, columns)
  const void* x;     // (rows, columns)
  const void* bias;  // (columns,) or null
  void* dx;          // (rows, columns) or null: not wanted
  void* dbias;       // (columns,) or null: not wanted
  int64_t rows, columns;
  bool tanh;
};

FASTTUNE_KERNEL(bias_gelu, BiasGeluArgs)
FASTTUNE_KERNEL(bias_gelu_backward, BiasGeluBackwardArgs)

}  // namespace fasttune
