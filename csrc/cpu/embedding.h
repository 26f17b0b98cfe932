// Sums of embedding rows and their gradient: embedding.cpp. Shape legend: R rows of output, C columns.
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

constexpr int kMaxTables = 3;

struct EmbeddingSumArgs {
  DType dtype;
  int64_t rows, columns;
  int64_t tables;                   // 1 to kMaxTables
  const int64_t* ids[kMaxTables];   // (R,) each, checked by the caller
  const void* weights[kMaxTables];  // (size, C) each
  void* out;                        // (R, C)
};

struct EmbeddingGradientArgs {
  DType dtype;
  int64_t groups, columns;
  const int64_t* order;    // rows of dout, grouped by id, ascending inside a group
  const int64_t* offsets;  // (groups + 1,) into order
  const int64_t* targets;  // (groups,) the row of the gradient that each group sums into
  const void* dout;        // (R, C)
  void* gradient;          // rows of C; rows that are no target are left alone
};

FASTTUNE_KERNEL(embedding_sum, EmbeddingSumArgs)
FASTTUNE_KERNEL(embedding_gradient, EmbeddingGradientArgs)

}  // namespace fasttune
