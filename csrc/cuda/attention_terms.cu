// Gradients of the terms of attention's scores (attention.cuh): with dS as attention_backward.cu has it,
//
//   dbias[h, d] = Σ dS_ij over the queries i and keys j of all sequences whose clamped distance is d
//
// A block owns a tile of queries and walks over the keys that they see, with dS computed once more: in
// the kernels of dQ and dK, dV there is no register left for it. Each tile of dS goes through shared memory,
// where other threads than those that hold it add it up in a fixed order: no atomics, the same bits every
// time.
//
// The sum of a distance runs along a diagonal, which one thread walks (queries of chosen positions: a
// diagonal with steps). What is clamped is added up by rows. A block adds its sums to a row of partial
// sums of its own, takes one tile of its head after the other, and column_sums.cu adds up the rows.
//
// Bytes: as dQ's kernel, and a row of partial sums for each block, mostly in L1. Operations: 4 Q K D a head
// for S and dP; 2 to 3 reads of shared memory for each element of dS.
#include "cuda/attention.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/reduce.cuh"

namespace fasttune::cuda {
namespace {

// Adds a tile of dS, rows of queries at `places` and columns of keys from first_key on, to the sums `row` of
// the distances that are not clamped, and to `clamped`: of this thread's query, in the first half of the
// block of the keys far before it, in the second of those far behind. Places rise.
template <class P>
__device__ __forceinline__ void add_distances(const float* ds, const int* places, int rows, int first_key,
                                              int columns, int furthest, float* row, float& clamped) {
  constexpr int kPitch = kTermsPitch<P>;
  static_assert(P::kThreads == 2 * P::kRows, "two threads for each query");
  const int thread = static_cast<int>(threadIdx.x);
  const int lowest = max(first_key - places[rows - 1], 1 - furthest),
            highest = min(first_key + columns - 1 - places[0], furthest - 1);
  FASTTUNE_NO_UNROLL
  for (int distance = lowest + thread; distance <= highest; distance += P::kThreads) {
    float sum = 0.0f;
    for (int i = 0; i < rows; ++i) {
      const int column = distance + places[i] - first_key;
      if (0 <= column && column < columns) sum += ds[i * kPitch + column];
    }
    row[distance + furthest] += sum;
  }
  const int query = thread % P::kRows;
  if (query >= rows) return;
  int first = 0, last = columns;
  if (thread < P::kRows)
    last = min(columns, places[query] - furthest - first_key + 1);
  else
    first = max(0, places[query] + max(furthest, 1) - first_key);
  float sum = 0.0f;
  for (int column = first; column < last; ++column) sum += ds[query * kPitch + column];
  clamped += sum;
}

// Block b takes the tiles b / H, b / H + slots, ... of the head b % H.
template <class P, class T>
__global__ void __launch_bounds__(P::kThreads, 2)
    attention_terms_kernel(const fasttune_attention_args args, int64_t tiles, int64_t items, int64_t slots,
                           bool vectors) {
  FASTTUNE_DYNAMIC_SHARED(shared);
  // Of each query of a tile: lse, δ, its place among the keys, and which of its weights are dropped, a byte
  // for each column modulo 16 (philox.cuh).
  FASTTUNE_SHARED(float, lse_tile, P::kRows);
  FASTTUNE_SHARED(float, delta_tile, P::kRows);
  FASTTUNE_SHARED(int, place_tile, P::kRows);
  FASTTUNE_SHARED(unsigned char, dropped_tile, P::kRows * 16);
  T* q_tile = reinterpret_cast<T*>(shared);
  T* do_tile = q_tile + P::kOwned;
  T* k_tiles = do_tile + P::kOwned;
  T* v_tiles = k_tiles + P::kStages * P::kStreamed;
  float* ds_tile = reinterpret_cast<float*>(v_tiles + P::kStages * P::kStreamed);

  const int thread = static_cast<int>(threadIdx.x), g = lane_index() / 4, t = lane_index() % 4;
  const int head_dim = static_cast<int>(args.head_dim);
  const int64_t head = blockIdx.x % args.heads, slot = blockIdx.x / args.heads;
  const int64_t distances = 2 * static_cast<int64_t>(args.furthest) + 1;
  float* sums = args.dbias_partial + (slot * args.heads + head) * distances;
  for (int64_t i = thread; i < distances; i += P::kThreads) sums[i] = 0.0f;
  float clamped = 0.0f;
  const DropoutKey dropout = dropout_key(args.dropout);

  for (int64_t item = slot; item < items; item += slots) {
    const Place at =
        locate(args, P::kRows, tiles, false, (item / tiles * args.heads + head) * tiles + item % tiles);
    if (at.tile < 0) continue;
    const int first_query = at.tile * P::kRows, rows = min(P::kRows, at.queries - first_query);
    const KeyRange seen = keys_seen(args, at, first_query, P::kRows);
    const int first_step = seen.first / P::kSteps, steps = divide_up(seen.last, P::kSteps);
    if (first_step >= steps) continue;
    const T* k_head = key_rows<T>(args.key, args, at);
    const T* v_head = key_rows<T>(args.value, args, at);
    const auto stream = [&](int step) {
      const int stage = step % P::kStages, first = step * P::kSteps;
      load_tile<P, P::kSteps>(k_tiles + stage * P::kStreamed, k_head, args.key.row, first, at.keys, head_dim,
                              vectors);
      load_tile<P, P::kSteps>(v_tiles + stage * P::kStreamed, v_head, args.value.row, first, at.keys,
                              head_dim, vectors);
      cp_async_commit();
    };
    load_tile<P, P::kRows>(q_tile, query_rows<T>(args.query, args, at), args.query.row, first_query,
                           at.queries, head_dim, vectors);
    load_tile<P, P::kRows>(do_tile, query_rows<T>(args.dout, args, at), args.dout.row, first_query,
                           at.queries, head_dim, vectors);
    stream(first_step);
    for (int i = thread; i < P::kRows; i += P::kThreads) {
      const int query = first_query + i;
      const bool valid = query < at.queries;
      lse_tile[i] = valid ? args.lse[at.statistics + query] : INFINITY;
      delta_tile[i] = valid ? args.delta[at.statistics + query] : 0.0f;
      place_tile[i] = at.position(query) + place_offset(at);
    }

    for (int step = first_step; step < steps; ++step) {
      const int first_key = step * P::kSteps, stage = step % P::kStages;
      const bool more = step + 1 < steps;
      if (P::kStages == 2 && more) stream(step + 1);
      if (dropout.threshold)
        for (int i = thread; i < P::kRows * 16; i += P::kThreads)
          dropped_tile[i] = static_cast<unsigned char>(
              dropped_bits(dropout, static_cast<uint32_t>(first_key / kDropoutBlock * 16 + i % 16),
                           static_cast<uint32_t>(at.position(first_query + i / 16)), head_number(args, at),
                           kAttentionDomain));
      if (P::kStages == 2 && more)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
      __syncthreads();

      float s[P::kSteps / 8][4], dp[P::kSteps / 8][4];
      clear(s);
      clear(dp);
      multiply_transposed<P>(s, q_tile + 16 * warp_index() * P::kPitch, k_tiles + stage * P::kStreamed,
                             head_dim);
      multiply_transposed<P>(dp, do_tile + 16 * warp_index() * P::kPitch, v_tiles + stage * P::kStreamed,
                             head_dim);
      FASTTUNE_UNROLL
      for (int j = 0; j < P::kSteps / 8; ++j) {
        FASTTUNE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * warp_index() + g + i / 2 * 8, column = 8 * j + 2 * t + i % 2,
                    key = first_key + column, place = place_tile[row];
          float p = exp2f(Terms(args, at).score(args, s[j][i], place, key) - lse_tile[row]);
          if (key >= at.keys || hidden(args, place, key)) p = 0.0f;
          if (dropout.threshold) {
            const bool dropped = (dropped_tile[row * 16 + key % 16] >> (key % kDropoutBlock / 16)) & 1;
            dp[j][i] = dropped ? 0.0f : dp[j][i] * dropout.scale;
          }
          ds_tile[row * kTermsPitch<P> + column] = p * (dp[j][i] - delta_tile[row]);
        }
      }
      __syncthreads();
      add_distances<P>(ds_tile, place_tile, rows, first_key, min(P::kSteps, at.keys - first_key),
                       args.furthest, sums, clamped);
      __syncthreads();  // before the tiles are overwritten
      if (P::kStages == 1 && more) stream(step + 1);
    }
  }

  __syncthreads();  // blocks without a tile: the row is zero
  ds_tile[thread] = clamped;
  __syncthreads();
  if (warp_index() != 0) return;
  for (int side = 0; side < 2; ++side) {
    float sum = 0.0f;
    for (int i = lane_index(); i < P::kRows; i += kWarp) sum += ds_tile[side * P::kRows + i];
    sum = warp_sum(sum);
    if (lane_index() == 0) sums[side * 2 * static_cast<int64_t>(args.furthest)] += sum;
  }
}

}  // namespace

const char* attention_terms_backward(const fasttune_attention_args& args, void* stream) {
  if (!args.dbias) return nullptr;
  return with_tiles(args.dtype, args.head_dim, true, [&](auto shape, auto element) -> const char* {
    using P = decltype(shape);
    using T = decltype(element);
    if constexpr (P::kTerms) {
      const bool vectors = in_vectors(args.query, args.head_dim, sizeof(T)) &&
                           in_vectors(args.key, args.head_dim, sizeof(T)) &&
                           in_vectors(args.value, args.head_dim, sizeof(T)) &&
                           in_vectors(args.dout, args.head_dim, sizeof(T));
      const int64_t tiles = tiles_of(args, args.queries, P::kRows),
                    items = tiles * (args.offsets ? 1 : args.sequences),
                    slots = items < args.partials ? items : args.partials;
      const char* problem = launch(attention_terms_kernel<P, T>, slots * args.heads, P::kThreads,
                                   terms_shared_bytes<P, T>(), stream, args, tiles, items, slots, vectors);
      if (problem) return problem;
      return column_sums(args.dbias_partial, args.dbias, FASTTUNE_F32, slots,
                         args.heads * (2 * static_cast<int64_t>(args.furthest) + 1), stream);
    }
    return nullptr;
  });
}

}  // namespace fasttune::cuda
