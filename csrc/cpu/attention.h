// Scaled dot-product attention over (sequence, head) pairs, dense or packed: attention_forward.cpp and
// attention_backward.cpp. Shape legend: N sequences, H heads, D head dimension, Q and K queries and keys of a
// sequence.
#pragma once
#include <algorithm>
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

// Terms of the scores by the distance d = j - p of a key j and a query at place p, each null where it is not
// there: score = scale (q k + c2p[p, b] + p2c[j, b]) + bias[d] with b = buckets[d], distances clamped to
// those of the table.
struct AttentionTerms {
  const float* bias;  // (H, 2 bias_reach + 1)
  int64_t bias_reach;
  HeadRows c2p, p2c;       // rows of the queries and of the keys, `width` buckets for D
  const int32_t* buckets;  // (2 buckets_reach + 1,)
  int64_t width, buckets_reach;
  float* dbias;  // backward only, like those of AttentionArgs
  HeadRows dc2p, dp2c;

  bool by_bucket() const { return c2p.data || p2c.data; }
  bool any() const { return bias || by_bucket(); }
};

struct AttentionArgs {
  DType dtype;
  int64_t sequences, heads, head_dim;
  int64_t queries, keys;   // of every sequence, when dense
  const int64_t* offsets;  // packed: (N + 1,) first row of each sequence, shared by q, k and v; or null
  // Packed, with queries of some positions only: (N + 1,) first query of each sequence, and each query's
  // position in its sequence, never falling; or both null.
  const int64_t* query_offsets;
  const int32_t* positions;
  bool causal;     // query i sees keys j <= i + K - Q, or j <= positions[i]
  int64_t window;  // and those alone that are at most so far from there; -1 for any
  float scale;     // of the scores
  AttentionTerms terms;
  DropoutSpec dropout;  // on the attention weights
  HeadRows query, key, value, out;
  float* lse;                           // log-sum-exp of the scores: dense (N, H, Q), packed (H, rows)
  HeadRows dout, dquery, dkey, dvalue;  // backward only; a null gradient is not computed
};

// Where one sequence lies.
struct SequenceRange {
  int64_t index;                   // which sequence: also its coordinate in the dropout generator
  int64_t first_query, first_key;  // its first rows in packed tensors, 0 in dense ones
  int64_t queries, keys;
  const int32_t* positions;  // of its queries, or null: 0, 1, 2, ...
};

inline SequenceRange sequence_range(const AttentionArgs& args, int64_t index) {
  if (!args.offsets) return {index, 0, 0, args.queries, args.keys, nullptr};
  const int64_t first = args.offsets[index], length = args.offsets[index + 1] - first;
  if (!args.query_offsets) return {index, first, first, length, length, nullptr};
  const int64_t query = args.query_offsets[index];
  return {index, query, first, args.query_offsets[index + 1] - query, length, args.positions + query};
}

// Where a query stands among the keys, for causality and window.
inline int64_t place_of(const SequenceRange& sequence, int64_t query) {
  return sequence.positions ? sequence.positions[query] : query + sequence.keys - sequence.queries;
}

// How far a query sees beyond its place and before it; far more than any sequence has if nothing bounds it.
constexpr int64_t kUnbounded = int64_t{1} << 40;
inline int64_t sight_ahead(const AttentionArgs& args) {
  return args.causal ? 0 : args.window < 0 ? kUnbounded : args.window;
}
inline int64_t sight_behind(const AttentionArgs& args) { return args.window < 0 ? kUnbounded : args.window; }

// The keys that some query of [query, query + count) sees, first <= j < last. Where none is seen the range
// lies at the end that is next to them: last <= 0, or the last key.
struct KeyRange {
  int64_t first, last;
};
inline KeyRange keys_seen(const AttentionArgs& args, const SequenceRange& sequence, int64_t query,
                          int64_t count) {
  const int64_t lowest = place_of(sequence, query) - sight_behind(args);
  const int64_t highest = place_of(sequence, query + count - 1) + sight_ahead(args);
  return {std::min(std::max<int64_t>(0, lowest), sequence.keys - 1), std::min(sequence.keys, highest + 1)};
}

template <class T>
T* head_row(const HeadRows& rows, const SequenceRange& sequence, int64_t row, int64_t head) {
  return static_cast<T*>(rows.data) + sequence.index * rows.sequence + row * rows.row + head * rows.head;
}
template <class T>
T* query_row(const HeadRows& rows, const SequenceRange& sequence, int64_t head, int64_t query) {
  return head_row<T>(rows, sequence, sequence.first_query + query, head);
}
template <class T>
T* key_row(const HeadRows& rows, const SequenceRange& sequence, int64_t head, int64_t key) {
  return head_row<T>(rows, sequence, sequence.first_key + key, head);
}

inline float* lse_row(const AttentionArgs& args, const SequenceRange& sequence, int64_t head) {
  const int64_t* offsets = args.query_offsets ? args.query_offsets : args.offsets;
  if (offsets) return args.lse + head * offsets[args.sequences] + sequence.first_query;
  return args.lse + (sequence.index * args.heads + head) * args.queries;
}

FASTTUNE_KERNEL(attention_forward, AttentionArgs)
FASTTUNE_KERNEL(attention_backward, AttentionArgs)

}  // namespace fasttune
