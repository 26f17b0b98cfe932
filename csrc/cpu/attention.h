// Scaled dot-product attention over (sequence, head) pairs, dense or packed: attention_forward.cpp and
// attention_backward.cpp. Shape legend: N sequences, H heads, D head dimension, Q and K queries and keys of a
// sequence.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/dropout.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fasttune {

constexpr int kMinHeadDim = 16, kMaxHeadDim = 128;
// Queries and keys are walked in square blocks: one operand of each product of two blocks then fits in L1 at
// any head dimension up to 128, beside what streams past it.
constexpr int kAttentionBlock = 64;

// A tensor (N, rows, H, D), or (rows, H, D) when packed, whose D is contiguous; strides in elements.
struct HeadRows {
  void* data = nullptr;
  int64_t sequence = 0, row = 0, head = 0;
};

struct AttentionArgs {
  DType dtype;
  int64_t sequences, heads, head_dim;
  int64_t queries, keys;   // of every sequence, when dense
  const int64_t* offsets;  // packed: (N + 1,) first row of each sequence, shared by q, k and v; or null
  bool causal;             // query i sees keys j <= i + K - Q
  float scale;             // of the scores
  DropoutSpec dropout;     // on the attention weights
  HeadRows query, key, value, out;
  float* lse;                           // log-sum-exp of the scores: dense (N, H, Q), packed (H, rows)
  HeadRows dout, dquery, dkey, dvalue;  // backward only; a null gradient is not computed
};

// Where one sequence lies.
struct SequenceRange {
  int64_t index;      // which sequence: also its coordinate in the dropout generator
  int64_t first_row;  // its first row in packed tensors, 0 in dense ones
  int64_t queries, keys;
};

inline SequenceRange sequence_range(const AttentionArgs& args, int64_t index) {
  if (!args.offsets) return {index, 0, args.queries, args.keys};
  const int64_t first = args.offsets[index], length = args.offsets[index + 1] - first;
  return {index, first, length, length};
}

template <class T>
T* head_row(const HeadRows& rows, const SequenceRange& sequence, int64_t head, int64_t row) {
  return static_cast<T*>(rows.data) + sequence.index * rows.sequence + (sequence.first_row + row) * rows.row +
         head * rows.head;
}

inline float* lse_row(const AttentionArgs& args, const SequenceRange& sequence, int64_t head) {
  if (args.offsets) return args.lse + head * args.offsets[args.sequences] + sequence.first_row;
  return args.lse + (sequence.index * args.heads + head) * args.queries;
}

FASTTUNE_KERNEL(attention_forward, AttentionArgs)
FASTTUNE_KERNEL(attention_backward, AttentionArgs)

}  // namespace fasttune
