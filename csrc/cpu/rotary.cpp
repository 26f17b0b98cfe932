// Of every head of the first `rotated` parts of x, with h = W / 2 and a row of cos and sin for each row of x:
//   out[d]     = x[d] cos[d]         - x[d + h] sin[d]
//   out[d + h] = x[d + h] cos[d + h] + x[d] sin[d + h]      for d < h
// and out = x in the columns from W on and in the other parts. Computed in fp32, rounded once.
//
// Backward: the map is linear, and dx is its transpose applied to dout:
//   dx[d]     = dout[d] cos[d]         + dout[d + h] sin[d + h]
//   dx[d + h] = dout[d + h] cos[d + h] - dout[d] sin[d]
// which is the forward map with (-sin[d + h], -sin[d]) for (sin[d], sin[d + h]): one kernel serves both
// directions, and backward needs neither x nor the output. Bytes: x and out once each, a row of the tables
// once for all heads; 4 operations per turned element, so memory is the bound. Tiling: threads take ranges of
// rows; a row's table is put in a line of fp32 in the first-level cache, in the order of the products, and
// its heads go past it one after another.
#include "cpu/rotary.h"

#include "cpu/simd/begin.h"
#include "cpu/simd/rows.inc"

// line: cos (W,), then the factors (W,) of the other half's element, whose sign is that of the forward map.
template <class Table>
void rotary_line(const RotaryArgs& args, int64_t id, float* line) {
  const int64_t half = args.width / 2;
  const Table* cos = static_cast<const Table*>(args.cos) + id * args.width;
  const Table* sin = static_cast<const Table*>(args.sin) + id * args.width;
  float* factors = line + args.width;
  for_each_vector(0, args.width,
                  [=](int64_t i, auto lanes) FT_BODY { store(line + i, load(cos + i, lanes), lanes); });
  for_each_vector(0, half, [=, &args](int64_t i, auto lanes) FT_BODY {
    const F low = load(sin + i, lanes), high = load(sin + half + i, lanes);
    store(factors + i, args.inverse ? zero() - high : low, lanes);
    store(factors + half + i, args.inverse ? zero() - low : high, lanes);
  });
}

template <class T>
void rotary_head(const T* x, T* out, const float* line, int64_t width, int64_t head_dim) {
  const int64_t half = width / 2;
  const float* factors = line + width;
  for_each_vector(0, half, [=](int64_t i, auto lanes) FT_BODY {
    const F low = load(x + i, lanes), high = load(x + half + i, lanes);
    const F at_low = low * load(line + i, lanes), at_high = high * load(line + half + i, lanes);
    store(out + i, fnma(high, load(factors + i, lanes), at_low), lanes);
    store(out + half + i, fma(low, load(factors + half + i, lanes), at_high), lanes);
  });
  std::memcpy(out + width, x + width, static_cast<size_t>(head_dim - width) * sizeof(T));
}

template <class T>
void rotary_row(const RotaryArgs& args, int64_t row, const float* line) {
  const T* x = static_cast<const T*>(args.x) + row / args.sequence * args.batch_stride +
               row % args.sequence * args.row_stride;
  T* out = static_cast<T*>(args.out) + row * args.parts * args.heads * args.head_dim;
  for (int64_t part = 0; part < args.parts; ++part) {
    const int64_t width = part < args.rotated ? args.width : 0;
    for (int64_t head = 0; head < args.heads; ++head, out += args.head_dim)
      rotary_head(x + part * args.part_stride + head * args.head_stride, out, line, width, args.head_dim);
  }
}

void rotary(const RotaryArgs& args) {
  const int64_t elements = args.parts * args.heads * args.head_dim;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements));
  parallel_for(args.batch * args.sequence, grain, [&](int64_t begin, int64_t end) FT_LAMBDA {
    const Scratch<float> line(static_cast<size_t>(2 * args.width));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t id = args.row_ids ? args.row_ids[row] : row % args.table_rows;
      FASTTUNE_WITH_DTYPE(args.table_dtype, Table, rotary_line<Table>(args, id, line.get()));
      FASTTUNE_WITH_DTYPE(args.dtype, T, rotary_row<T>(args, row, line.get()));
    }
  });
}

#include "cpu/simd/end.h"
