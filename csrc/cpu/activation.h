// act(x + bias), alone or times a gate: act(x + bias) (gate + gate_bias), and the gradients.
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

// The numbers Python passes (fasttune/ops/_activations.py).
enum class Activation : int { gelu = 1, gelu_tanh = 2, silu = 3, relu = 4, quick_gelu = 5, relu2 = 6 };

struct ActivationArgs {
  DType dtype, bias_dtype;
  Activation activation;
  const void* x;     // (rows, columns)
  const void* gate;  // (rows, columns) or null: ones
  const void* bias;  // (columns,), with a gate (2 columns,): x's, then the gate's; or null
  void* out;         // (rows, columns), contiguous
  int64_t rows, columns;
  int64_t x_stride, gate_stride;  // elements between rows
};

struct ActivationBackwardArgs {
  DType dtype, bias_dtype;
  Activation activation;
  const void* dout;  // (rows, columns), contiguous
  const void* x;     // (rows, columns)
  const void* gate;  // (rows, columns) or null
  const void* bias;  // (columns,) or (2 columns,), or null
  void* dx;          // (rows, columns) or null: not wanted
  void* dgate;       // (rows, columns) or null: not wanted
  void* dbias;       // like bias, or null: not wanted
  int64_t rows, columns;
  int64_t x_stride, gate_stride, gradient_stride;  // the last of dx and of dgate
};

FASTTUNE_KERNEL(activation, ActivationArgs)
FASTTUNE_KERNEL(activation_backward, ActivationBackwardArgs)

}  // namespace fasttune
