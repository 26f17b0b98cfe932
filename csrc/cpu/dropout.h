// Dropout by the shared counter-based generator: docs/dropout.md.
#pragma once
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

// Domains of the fourth counter word: one per kind of coordinate, so that no two masks of a seed overlap.
constexpr uint32_t kElementwiseDomain = 0;
constexpr uint32_t kAttentionDomain = 1;

// A 16-bit uniform below `threshold` = round(65536 p) drops its element; kept elements are scaled by
// 65536 / (65536 - threshold), the inverse of the probability that is really used, so that the mean is exact.
struct DropoutSpec {
  uint32_t key0 = 0, key1 = 0;
  uint32_t threshold = 0;
  float scale = 1.0f;
  bool active() const { return threshold != 0; }
};

inline DropoutSpec make_dropout(int64_t seed, double dropout_p) {
  DropoutSpec spec;
  spec.key0 = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  spec.key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  spec.threshold = static_cast<uint32_t>(dropout_p * 65536.0 + 0.5);
  spec.scale = spec.threshold >= 65536 ? 0.0f : 65536.0f / static_cast<float>(65536 - spec.threshold);
  return spec;
}

struct DropoutArgs {
  DType dtype;
  const void* x;         // (rows, columns)
  const void* residual;  // (rows, columns) or null: added after the dropout
  void* out;             // (rows, columns)
  int64_t rows, columns;
  const int64_t* row_ids;  // (rows,) logical row of each row, or null for 0, 1, 2, ...
  DropoutSpec dropout;
};

FASTTUNE_KERNEL(dropout, DropoutArgs)

}  // namespace fasttune
