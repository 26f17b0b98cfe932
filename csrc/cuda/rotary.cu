// Of every head of the first `rotated` parts of x, with h = W / 2 and a row of cos and sin for each row of x:
//   out[d]     = x[d] cos[d]         - x[d + h] sin[d]
//   out[d + h] = x[d + h] cos[d + h] + x[d] sin[d + h]      for d < h
// and out = x in the columns from W on and in the other parts. Computed in float32, rounded once.
//
// Backward: the map is linear and dx is its transpose applied to dout, which is the forward map with
// (-sin[d + h], -sin[d]) for (sin[d], sin[d + h]): one kernel serves both, and needs neither x nor the
// output. Bytes: x and out once each, a row of the tables, and 8 for its number, once for all heads.
// Operations: 4 a turned element. Tiling: a thread takes eight columns of each half of a head, or eight of
// those that are copied, keeps the tables' values for them in registers and walks the heads of its row. Up to
// eight heads of a row are walked side by side, and a block takes as many rows as its threads allow, so that
// short rows fill it too. An id out of range reads nothing: NaN where the row would be turned.
#include "cuda/vector.cuh"

namespace fasttune::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 8;

struct RotaryTiling {
  int pairs;    // vectors of columns d < h
  int vectors;  // those, and vectors of columns from W on
  int lanes;    // threads beside each other in a head
  int slots;    // heads side by side
  int rows;     // of a block
  bool aligned;
};

// What one thread turns its columns by.
struct Turn {
  float cos_low[kVector], cos_high[kVector], sin_low[kVector], sin_high[kVector];
};

template <class T>
__device__ __forceinline__ void load_turn(const fasttune_rotary_args& args, int64_t id, int64_t column,
                                          bool aligned, Turn* turn) {
  const int64_t half = args.width / 2;
  const bool known = id >= 0 && id < args.table_rows;
  const int64_t row = known ? id * args.width : 0,
                end = known ? half : 0;  // nothing is read of an unknown row
  const T *cos = static_cast<const T*>(args.cos) + row, *sin = static_cast<const T*>(args.sin) + row;
  load8(cos, column, end, aligned, turn->cos_low);
  load8(cos + half, column, end, aligned, turn->cos_high);
  load8(sin, column, end, aligned, turn->sin_low);
  load8(sin + half, column, end, aligned, turn->sin_high);
  FASTTUNE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const float low = turn->sin_low[i], high = turn->sin_high[i];
    if (args.inverse) {
      turn->sin_low[i] = FASTTUNE_SEEDED(kBugSameHalf) ? -low : -high;
      turn->sin_high[i] = FASTTUNE_SEEDED(kBugSameHalf) ? -high : -low;
    }
    if (!known) turn->cos_low[i] = turn->cos_high[i] = nanf("");
  }
}

template <class T, class Table>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const fasttune_rotary_args args, const RotaryTiling tiling) {
  const int thread = static_cast<int>(threadIdx.x), group = thread / tiling.lanes;
  const int64_t row = int64_t{blockIdx.x} * tiling.rows + group / tiling.slots;
  if (group / tiling.slots >= tiling.rows || row >= args.batch * args.sequence) return;
  const int64_t half = args.width / 2;
  const int heads = static_cast<int>(args.heads), all_heads = static_cast<int>(args.parts) * heads,
            turned_heads = static_cast<int>(args.rotated) * heads;
  const T* x = static_cast<const T*>(args.x) + row / args.sequence * args.batch_stride +
               row % args.sequence * args.row_stride;
  T* out = static_cast<T*>(args.out) + row * all_heads * args.head_dim;
  for (int vector = thread % tiling.lanes; vector < tiling.vectors; vector += tiling.lanes) {
    const bool turns = vector < tiling.pairs;
    const int64_t column = turns ? vector * kVector : args.width + (vector - tiling.pairs) * kVector;
    Turn turn{};
    if (turns)
      load_turn<Table>(args, args.row_ids ? args.row_ids[row] : row % args.table_rows, column, tiling.aligned,
                       &turn);
    for (int head = group % tiling.slots; head < all_heads; head += tiling.slots) {
      const T* from = x + head / heads * args.part_stride + head % heads * args.head_stride;
      T* to = out + head * args.head_dim;
      float low[kVector], high[kVector];
      if (!turns) {
        load8(from, column, args.head_dim, tiling.aligned, low);
        store8(to, column, args.head_dim, tiling.aligned, low);
        continue;
      }
      load8(from, column, half, tiling.aligned, low);
      load8(from + half, column, half, tiling.aligned, high);
      if (head < turned_heads) {
        FASTTUNE_UNROLL
        for (int i = 0; i < kVector; ++i) {
          const float before = low[i];
          low[i] = fmaf(-high[i], turn.sin_low[i], before * turn.cos_low[i]);
          high[i] = fmaf(before, turn.sin_high[i], high[i] * turn.cos_high[i]);
        }
      }
      store8(to, column, half, tiling.aligned, low);
      store8(to + half, column, half, tiling.aligned, high);
    }
  }
}

RotaryTiling rotary_tiling(const fasttune_rotary_args& args) {
  const int64_t half = args.width / 2, all_heads = args.parts * args.heads;
  RotaryTiling tiling{};
  tiling.pairs = static_cast<int>(divide_up<int64_t>(half, kVector));
  tiling.vectors = tiling.pairs + static_cast<int>(divide_up<int64_t>(args.head_dim - args.width, kVector));
  tiling.lanes = tiling.vectors < kThreads ? tiling.vectors : kThreads;
  tiling.slots = kThreads / tiling.lanes < kHeads ? kThreads / tiling.lanes : kHeads;
  if (all_heads < tiling.slots) tiling.slots = static_cast<int>(all_heads);
  tiling.rows = kThreads / (tiling.lanes * tiling.slots);
  const auto whole = [](int64_t elements) { return elements % kVector == 0; };
  tiling.aligned = whole(half) && whole(args.head_dim) && whole(args.batch_stride) &&
                   whole(args.row_stride) && whole(args.part_stride) && whole(args.head_stride) &&
                   is_aligned(args.x) && is_aligned(args.out) && is_aligned(args.cos) && is_aligned(args.sin);
  return tiling;
}

template <class T>
const char* rotary(const fasttune_rotary_args& args, void* stream) {
  const RotaryTiling tiling = rotary_tiling(args);
  const int64_t blocks = divide_up<int64_t>(args.batch * args.sequence, tiling.rows);
  if (args.table_dtype == FASTTUNE_F32)
    return launch(rotary_kernel<T, float>, blocks, kThreads, 0, stream, args, tiling);
  return launch(rotary_kernel<T, T>, blocks, kThreads, 0, stream, args, tiling);
}

}  // namespace
}  // namespace fasttune::cuda

extern "C" const char* fasttune_cuda_rotary(const fasttune_rotary_args* args, void* stream) {
  using namespace fasttune::cuda;
  if (args->parts * args->heads <= 0) return nullptr;
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T, return rotary<T>(*args, stream));
  return nullptr;
}
