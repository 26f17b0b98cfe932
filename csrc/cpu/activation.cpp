// out = act(x + bias), or act(x + bias) (gate + gate_bias), over (rows, columns), and its gradients.
//
// Backward: with z = x + bias and m = gate + gate_bias, which are computed again rather than stored,
//   dx = dout m act'(z)      dgate = dout act(z)      the gradients of the biases: their sums over rows
// Forward reads x (and the gate) and writes out; backward reads dout and x (and the gate) and writes dx (and
// dgate), with dbias in the same pass. That is 8 and 12 bytes per fp32 element, gated 12 and 20, against
// about 35 and 50 instructions per *vector* for a GELU and fewer for the others, so memory is the limit. Rows
// have strides, so that the halves of one tensor are read, and their gradients written, where they lie.
// Tiling: fixed blocks of rows (simd/rows.inc). Every block sums dbias into a line of its own that stays in
// the L1 cache (12 KB at 3072 columns); the lines are added in order afterwards, so dbias has the same bits
// on any number of threads. The activation is chosen outside of the loops, the gate inside: a second set of
// loops would double the code for a branch that is always predicted.
#include "cpu/activation.h"

#include <type_traits>

#include "cpu/simd/begin.h"
#include "cpu/simd/rows.inc"
#include "cpu/simd/gelu.inc"
#include "cpu/simd/activation.inc"

template <class T, Activation kKind, bool kGated>
void activation_rows(const ActivationArgs& args, const float* bias, int64_t begin, int64_t end) {
  const int64_t columns = args.columns;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    const T* gate = kGated ? static_cast<const T*>(args.gate) + row * args.gate_stride : nullptr;
    T* out = static_cast<T*>(args.out) + row * columns;
    for_each_vector(0, columns, [=](int64_t i, auto lanes) FT_BODY {
      const F m = kGated ? load(gate + i, lanes) + load(bias + columns + i, lanes) : set1(1.0f);
      store(out + i, activate<kKind>(load(x + i, lanes) + load(bias + i, lanes), m), lanes);
    });
  }
}

// dbias: the block's line of sums, or null; fresh: that of its latest rows. Both zeros on entry.
template <class T, Activation kKind>
void activation_backward_rows(const ActivationBackwardArgs& args, const float* bias, float* dbias,
                              float* fresh, int64_t begin, int64_t end) {
  const int64_t columns = args.columns;
  for (int64_t row = begin; row < end; ++row) {
    const T* dout = static_cast<const T*>(args.dout) + row * columns;
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    const T* gate = args.gate ? static_cast<const T*>(args.gate) + row * args.gate_stride : nullptr;
    T* dx = args.dx ? static_cast<T*>(args.dx) + row * args.gradient_stride : nullptr;
    T* dgate = args.dgate ? static_cast<T*>(args.dgate) + row * args.gradient_stride : nullptr;
    for_each_vector(0, columns, [=](int64_t i, auto lanes) FT_BODY {
      F of_x, of_gate;
      const F m = gate ? load(gate + i, lanes) + load(bias + columns + i, lanes) : set1(1.0f);
      gradients<kKind>(load(x + i, lanes) + load(bias + i, lanes), m, load(dout + i, lanes), &of_x, &of_gate);
      if (dx) store(dx + i, of_x, lanes);
      if (dgate) store(dgate + i, of_gate, lanes);
      if (!dbias) return;
      store(fresh + i, load(fresh + i, lanes) + of_x, lanes);
      if (gate) store(fresh + columns + i, load(fresh + columns + i, lanes) + of_gate, lanes);
    });
    if (dbias && ((row + 1 - begin) % kRowsPerFold == 0 || row + 1 == end))
      fold(fresh, dbias, gate ? 2 * columns : columns);
  }
}

// body(std::integral_constant<Activation, activation>)
template <class Body>
void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>());
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>());
    case Activation::quick_gelu:
      return body(std::integral_constant<Activation, Activation::quick_gelu>());
    case Activation::relu2:
      return body(std::integral_constant<Activation, Activation::relu2>());
  }
}

void activation(const ActivationArgs& args) {
  const int64_t biases = args.gate ? 2 * args.columns : args.columns;
  const Scratch<float> line(biases);
  const float* bias = float_parameter(args.bias_dtype, args.bias, 0.0f, biases, line.get());
  const RowBlocks blocks(args.rows, args.columns);
  parallel_tasks(blocks.count, [&](int64_t block) FT_LAMBDA {
    const int64_t begin = blocks.begin(block), end = blocks.end(block);
    with_activation(args.activation, [&](auto kind) FT_LAMBDA {
      FASTTUNE_WITH_DTYPE(args.dtype, T,
                          (args.gate ? activation_rows<T, kind(), true>(args, bias, begin, end)
                                     : activation_rows<T, kind(), false>(args, bias, begin, end)));
    });
  });
}

void activation_backward(const ActivationBackwardArgs& args) {
  const int64_t biases = args.gate ? 2 * args.columns : args.columns;
  const Scratch<float> line(biases);
  const float* bias = float_parameter(args.bias_dtype, args.bias, 0.0f, biases, line.get());
  const RowBlocks blocks(args.rows, args.columns);
  const Scratch<float> partials(args.dbias ? blocks.count * biases : 0);
  parallel_tasks(blocks.count, biases, [&](int64_t block, float* fresh) FT_LAMBDA {
    const int64_t begin = blocks.begin(block), end = blocks.end(block);
    float* dbias = args.dbias ? partials.get() + block * biases : nullptr;
    if (dbias) {
      std::fill_n(dbias, biases, 0.0f);
      std::fill_n(fresh, biases, 0.0f);
    }
    with_activation(args.activation, [&](auto kind) FT_LAMBDA {
      FASTTUNE_WITH_DTYPE(args.dtype, T,
                          (activation_backward_rows<T, kind()>(args, bias, dbias, fresh, begin, end)));
    });
  });
  if (args.dbias) sum_blocks(partials.get(), blocks.count, biases, biases, args.bias_dtype, args.dbias);
}

#include "cpu/simd/end.h"
