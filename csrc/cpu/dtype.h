// Element types of tensors. Arithmetic is always fp32; these types only exist in memory.
#pragma once
#include <cstdint>

namespace fasttune {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The numbers Python passes (fasttune/ops/_cpp.py: DTYPE_CODES).
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace fasttune

// Runs the statement with `T` bound to the element type that `dtype` names.
#define FASTTUNE_WITH_DTYPE(dtype, T, ...) \
  switch (dtype) {                         \
    case ::fasttune::DType::f32: {         \
      using T = float;                     \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    case ::fasttune::DType::bf16: {        \
      using T = ::fasttune::bf16;          \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    case ::fasttune::DType::f16: {         \
      using T = ::fasttune::f16;           \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
  }
