// Rotary position embedding: rotary.cpp. Shape legend: x (B, S, N, H, D): B sequences of S rows, N parts
// (such as query, key and value) of H heads; T = B S rows in all; tables (P, W).
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

struct RotaryArgs {
  DType dtype, table_dtype;  // table_dtype: dtype or float32
  const void* x;             // (B, S, N, H, D) with strides; the last is 1
  void* out;                 // (B, S, N, H, D)
  const void *cos, *sin;     // (P, W)
  const int64_t* row_ids;    // (T,) row of the tables, checked by the caller; or null: row t takes t mod P
  int64_t batch, sequence, parts, heads, head_dim;
  int64_t batch_stride, row_stride, part_stride, head_stride;  // of x, in elements
  int64_t table_rows, width;                                   // P, W
  int64_t rotated;  // the parts that are turned; the others are copied
  bool inverse;     // the transposed map: the gradient
};

FASTTUNE_KERNEL(rotary, RotaryArgs)

}  // namespace fasttune
