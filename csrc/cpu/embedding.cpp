// out[r] = sum over tables t of weights[t][ids[t][r]], and the gradient of one table.
//
// Backward: dweight[i] = sum of dout[r] over the rows r with id i. The caller groups the rows by id (a stable
// sort), so that each gradient row is summed in fp32 by one task, in the order of r, and written once: no
// atomics, and the same bits on any number of threads. Forward moves tables + 1 rows of C per output row and
// is bound by memory, as is backward. Tiling: forward splits the rows; backward splits columns in blocks of
// 128 (two cache lines per row at worst are shared by none) and groups, because one id may own most rows
// (token types) while most ids own one.
#include "cpu/embedding.h"

#include "cpu/simd/begin.h"

constexpr int64_t kColumnBlock = 128, kGroupBlock = 64;

template <class T>
F load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_n(p, n);
}

template <class T>
void store_some(T* p, F x, int64_t n) {
  if (n >= kLanes) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

template <class T>
void sum_row(const EmbeddingSumArgs& args, int64_t row) {
  const T* sources[kMaxTables];
  for (int64_t t = 0; t < args.tables; ++t)
    sources[t] = static_cast<const T*>(args.weights[t]) + args.ids[t][row] * args.columns;
  T* out = static_cast<T*>(args.out) + row * args.columns;
  for (int64_t i = 0; i < args.columns; i += kLanes) {
    const int64_t n = args.columns - i;
    F sum = load_some(sources[0] + i, n);
    for (int64_t t = 1; t < args.tables; ++t) sum = sum + load_some(sources[t] + i, n);
    store_some(out + i, sum, n);
  }
}

void embedding_sum(const EmbeddingSumArgs& args) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, args.columns));
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) FT_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      FASTTUNE_WITH_DTYPE(args.dtype, T, sum_row<T>(args, row));
    }
  });
}

template <class T>
void sum_group(const EmbeddingGradientArgs& args, int64_t group, int64_t column, int64_t width) {
  const T* dout = static_cast<const T*>(args.dout) + column;
  T* gradient = static_cast<T*>(args.gradient) + args.targets[group] * args.columns + column;
  float sums[kColumnBlock] = {};
  for (int64_t k = args.offsets[group]; k < args.offsets[group + 1]; ++k) {
    const T* source = dout + args.order[k] * args.columns;
    for (int64_t i = 0; i < width; i += kLanes)
      store(sums + i, load(sums + i) + load_some(source + i, width - i));
  }
  for (int64_t i = 0; i < width; i += kLanes) store_some(gradient + i, load(sums + i), width - i);
}

void embedding_gradient(const EmbeddingGradientArgs& args) {
  const int64_t column_blocks = (args.columns + kColumnBlock - 1) / kColumnBlock;
  const int64_t group_blocks = (args.groups + kGroupBlock - 1) / kGroupBlock;
  parallel_tasks(column_blocks * group_blocks, [&](int64_t task) FT_LAMBDA {
    const int64_t column = task % column_blocks * kColumnBlock, first = task / column_blocks * kGroupBlock;
    const int64_t width = std::min(kColumnBlock, args.columns - column);
    for (int64_t group = first; group < std::min(args.groups, first + kGroupBlock); ++group) {
      FASTTUNE_WITH_DTYPE(args.dtype, T, sum_group<T>(args, group, column, width));
    }
  });
}

#include "cpu/simd/end.h"
