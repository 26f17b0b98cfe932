// out = dropout(x) + residual, elementwise over (rows, columns).
//
// Backward: dx = dropout(dout) with the same seed and row ids (the mask is regenerated, never stored) and
// dresidual = dout, so this one kernel serves both directions.
// Moves two or three tensors once and is bound by memory; the generator costs about 0.6 instructions per
// element. Tiling: threads take ranges of rows; a row is walked in blocks of 128 columns, the generator's
// natural unit.
#include "cpu/dropout.h"

#include "cpu/simd/begin.h"

template <class T>
void dropout_row(const DropoutArgs& args, int64_t row) {
  const int64_t offset = row * args.columns;
  const T* x = static_cast<const T*>(args.x) + offset;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + offset : nullptr;
  T* out = static_cast<T*>(args.out) + offset;
  const uint64_t id = static_cast<uint64_t>(args.row_ids ? args.row_ids[row] : row);
  const F scale = set1(args.dropout.scale);
  DropoutBlock random;
  for (int64_t block = 0; block * kDropoutBlock < args.columns; ++block) {
    philox_block(args.dropout, static_cast<uint32_t>(block), static_cast<uint32_t>(id),
                 static_cast<uint32_t>(id >> 32), kElementwiseDomain, &random);
    const int64_t first = block * kDropoutBlock,
                  width = std::min<int64_t>(kDropoutBlock, args.columns - first);
    for (int64_t i = 0; i < width; i += kLanes) {
      const M kept = kept_lanes(args.dropout, random, static_cast<int>(i / kLanes));
      const int64_t n = width - i;
      if (n >= kLanes) {
        F value = keep(kept, load(x + first + i) * scale);
        if (residual) value = value + load(residual + first + i);
        store(out + first + i, value);
      } else {
        F value = keep(kept, load_n(x + first + i, n) * scale);
        if (residual) value = value + load_n(residual + first + i, n);
        store_n(out + first + i, value, n);
      }
    }
  }
}

void dropout(const DropoutArgs& args) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, args.columns));
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) FT_LAMBDA {
    for (int64_t row = begin; row < end; ++row) {
      FASTTUNE_WITH_DTYPE(args.dtype, T, dropout_row<T>(args, row));
    }
  });
}

#include "cpu/simd/end.h"
