// out = GELU(x + bias) over (rows, columns), and its gradients.
//
// Backward: with z = x + bias, which is computed again rather than stored,
//   dx = dout GELU'(z)      dbias = the sum of dx over rows
// Forward reads x and writes out; backward reads dout and x and writes dx, with dbias in the same pass. That
// is 8 and 12 bytes per fp32 element against about 35 and 50 instructions per *vector*, so memory is the
// limit. Tiling: fixed blocks of rows (simd/rows.inc). Every block sums dbias into a line of its own that
// stays in the L1 cache (12 KB at 3072 columns); the lines are added in order afterwards, so dbias has the
// same bits on any number of threads.
#include "cpu/gelu.h"

#include "cpu/simd/begin.h"
#include "cpu/simd/rows.inc"
#include "cpu/simd/gelu.inc"

template <class T, bool kTanh>
void bias_gelu_rows(const BiasGeluArgs& args, const float* bias, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.columns;
    T* out = static_cast<T*>(args.out) + row * args.columns;
    for_each_vector(0, args.columns, [=](int64_t i, auto lanes) FT_BODY {
      store(out + i, gelu<kTanh>(load(x + i, lanes) + load(bias + i, lanes)), lanes);
    });
  }
}

// dbias: the block's line of sums, or null; fresh: that of its latest rows. Both zeros on entry.
template <class T, bool kTanh>
void bias_gelu_backward_rows(const BiasGeluBackwardArgs& args, const float* bias, float* dbias, float* fresh,
                             int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* dout = static_cast<const T*>(args.dout) + row * args.columns;
    const T* x = static_cast<const T*>(args.x) + row * args.columns;
    T* dx = args.dx ? static_cast<T*>(args.dx) + row * args.columns : nullptr;
    for_each_vector(0, args.columns, [=](int64_t i, auto lanes) FT_BODY {
      F slope;
      gelu_with_slope<kTanh>(load(x + i, lanes) + load(bias + i, lanes), &slope);
      const F gradient = load(dout + i, lanes) * slope;
      if (dx) store(dx + i, gradient, lanes);
      if (dbias) store(fresh + i, load(fresh + i, lanes) + gradient, lanes);
    });
    if (dbias && ((row + 1 - begin) % kRowsPerFold == 0 || row + 1 == end)) fold(fresh, dbias, args.columns);
  }
}

void bias_gelu(const BiasGeluArgs& args) {
  const Scratch<float> line(args.columns);
  const float* bias = float_parameter(args.bias_dtype, args.bias, 0.0f, args.columns, line.get());
  const RowBlocks blocks(args.rows, args.columns);
  parallel_tasks(blocks.count, [&](int64_t block) FT_LAMBDA {
    const int64_t begin = blocks.begin(block), end = blocks.end(block);
    FASTTUNE_WITH_DTYPE(args.dtype, T, {
      args.tanh ? bias_gelu_rows<T, true>(args, bias, begin, end)
                : bias_gelu_rows<T, false>(args, bias, begin, end);
    });
  });
}

void bias_gelu_backward(const BiasGeluBackwardArgs& args) {
  const int64_t columns = args.columns;
  const Scratch<float> line(columns);
  const float* bias = float_parameter(args.bias_dtype, args.bias, 0.0f, columns, line.get());
  const RowBlocks blocks(args.rows, columns);
  const Scratch<float> partials(args.dbias ? blocks.count * columns : 0);
  parallel_tasks(blocks.count, columns, [&](int64_t block, float* fresh) FT_LAMBDA {
    const int64_t begin = blocks.begin(block), end = blocks.end(block);
    float* dbias = args.dbias ? partials.get() + block * columns : nullptr;
    if (dbias) {
      std::fill_n(dbias, columns, 0.0f);
      std::fill_n(fresh, columns, 0.0f);
    }
    FASTTUNE_WITH_DTYPE(args.dtype, T, {
      args.tanh ? bias_gelu_backward_rows<T, true>(args, bias, dbias, fresh, begin, end)
                : bias_gelu_backward_rows<T, false>(args, bias, dbias, fresh, begin, end);
    });
  });
  if (args.dbias) sum_blocks(partials.get(), blocks.count, columns, columns, args.bias_dtype, args.dbias);
}

#include "cpu/simd/end.h"
