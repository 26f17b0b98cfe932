// Gradients of the terms of attention's scores (attention.cuh): with dS as attention_backward.cu has it and b
// the bucket of the distance of i and j,
//
//   dbias[h, d] = Σ dS_ij over the queries i and keys j of all sequences whose clamped distance is d
//   dc2p[i, h, b] = scale Σ_j dS_ij     dp2c[j, h, b] = scale Σ_i dS_ij     over those of bucket b
//
// A block owns a tile of queries (for dbias and dc2p) or of keys (dp2c) and walks over the other axis, with
// dS computed once more: the kernels of dQ and of dK, dV have no register left. Each tile of dS goes through
// shared memory, where other threads than those that hold it add it up in a fixed order: no atomics, the same
// bits every time.
//
// A distance's sum runs along a diagonal, which one thread walks (queries of chosen positions: a diagonal
// with steps). What is clamped is added up by rows. A block takes one tile of its head after the other, adds
// their sums to a row of partial sums of its own, and column_sums.cu adds up the rows.
//
// A bucket's sum is of one row, which one thread walks: a run of elements of one bucket is added up in a
// register and written when the next one begins. Where buckets follow the order of distances, as those of a
// model do, each is written once; if one comes again, what it has is read, and rounded once more.
//
// Bytes: as the kernels of dQ and of dK, dV, dc2p and dp2c once behind what sets them to zero, and a row of
// partial sums for each block. Operations: 4 Q K D a head for S and dP, for each axis; one to three reads of
// shared memory for each element of dS. A row is walked by one thread of two, and near the diagonal, where
// distances have a bucket each, writes an element at a time: latency is the bound, which other blocks hide.
#include "cuda/attention.cuh"
#include "cuda/column_sums.cuh"
#include "cuda/reduce.cuh"

namespace fasttune::cuda {
namespace {

// Adds a tile of dS, rows of queries at `places` and columns of keys from first_key on, to the sums of the
// distances that are not clamped, and to `clamped`: of this thread's query, in the first half of the block
// of the keys far before it, in the second of those far behind. Places rise.
template <class P>
__device__ __forceinline__ void add_distances(const float* ds, const int* places, int rows, int first_key,
                                              int columns, int furthest, float* sums, float& clamped) {
  static_assert(P::kThreads == 2 * P::kRows, "two threads for each query");
  const int thread = static_cast<int>(threadIdx.x);
  const int lowest = max(first_key - places[rows - 1], 1 - furthest),
            highest = min(first_key + columns - 1 - places[0], furthest - 1);
  FASTTUNE_NO_UNROLL
  for (int distance = lowest + thread; distance <= highest; distance += P::kThreads) {
    float sum = 0.0f;
    for (int i = 0; i < rows; ++i) {
      const int column = distance + places[i] - first_key;
      if (0 <= column && column < columns) sum += ds[i * kTermsPitch<P> + column];
    }
    sums[distance + furthest] += sum;
  }
  const int query = thread % P::kRows;
  if (query >= rows) return;
  int first = 0, last = columns;
  if (thread < P::kRows)
    last = min(columns, places[query] - furthest - first_key + 1);
  else
    first = max(0, places[query] + max(furthest, 1) - first_key);
  float sum = 0.0f;
  for (int column = first; column < last; ++column) sum += ds[query * kTermsPitch<P> + column];
  clamped += sum;
}

// The sums of a row by bucket, whose elements come one after the other.
template <class T>
struct Runs {
  T* row;
  float scale, sum = 0.0f;
  int bucket = -1, lowest = INT_MAX, highest = -1;  // of this run; of all that are written

  __device__ __forceinline__ void write() {
    if (bucket < 0) return;
    sum *= scale;
    if (lowest <= bucket && bucket <= highest) sum += to_float(row[bucket]);
    row[bucket] = from_float<T>(sum);
    lowest = min(lowest, bucket);
    highest = max(highest, bucket);
  }

  __device__ __forceinline__ void add(int next, float value) {
    if (next != bucket) {
      write();
      bucket = next;
      sum = 0.0f;
    }
    sum += value;
  }
};

// Block b takes the tiles b / H, b / H + slots, ... of the head b % H.
template <class P, class T>
__global__ void __launch_bounds__(P::kThreads, 2)
    attention_terms_kernel(const fasttune_attention_args args, int64_t tiles, int64_t items, int64_t slots,
                           bool vectors, bool owns_keys) {
  FASTTUNE_DYNAMIC_SHARED(shared);
  // Of each query of a tile: lse, δ, its place among the keys, and which of its weights are dropped, a byte
  // for each column modulo 16 (philox.cuh).
  static_assert(P::kSteps <= P::kRows, "queries are owned or streamed");
  FASTTUNE_SHARED(float, lse_tile, P::kRows);
  FASTTUNE_SHARED(float, delta_tile, P::kRows);
  FASTTUNE_SHARED(int, place_tile, P::kRows);
  FASTTUNE_SHARED(unsigned char, dropped_tile, P::kRows * 16);
  // Owned q and dO, streamed k and v, or the other way round.
  T* qk_tile = reinterpret_cast<T*>(shared);
  T* dov_tile = qk_tile + P::kOwned;
  T* kq_tiles = dov_tile + P::kOwned;
  T* vdo_tiles = kq_tiles + P::kStages * P::kStreamed;
  float* ds_tile = reinterpret_cast<float*>(vdo_tiles + P::kStages * P::kStreamed);

  const int thread = static_cast<int>(threadIdx.x), g = lane_index() / 4, t = lane_index() % 4;
  const int head_dim = static_cast<int>(args.head_dim);
  const int64_t head = blockIdx.x % args.heads, slot = blockIdx.x / args.heads;
  const int64_t distances = 2 * static_cast<int64_t>(args.bias_furthest) + 1;
  float *sums = nullptr, clamped = 0.0f;
  if (!owns_keys && args.dbias) {
    sums = args.dbias_partial + (slot * args.heads + head) * distances;
    for (int64_t i = thread; i < distances; i += P::kThreads) sums[i] = 0.0f;
  }
  const DropoutKey dropout = dropout_key(args.dropout);

  for (int64_t item = slot; item < items; item += slots) {
    const Place at =
        locate(args, P::kRows, tiles, owns_keys, (item / tiles * args.heads + head) * tiles + item % tiles);
    if (at.tile < 0) continue;
    const int first_owned = at.tile * P::kRows, owned = owns_keys ? at.keys : at.queries,
              streamed = owns_keys ? at.queries : at.keys, rows = min(P::kRows, owned - first_owned);
    Steps steps;
    if (owns_keys) {
      steps = queries_seeing(args, at, first_owned, P::kRows, P::kSteps);
    } else {
      const KeyRange seen = keys_seen(args, at, first_owned, P::kRows);
      steps = {seen.first / P::kSteps, divide_up(seen.last, P::kSteps)};
    }
    if (steps.first >= steps.last) continue;

    const T* q_head = query_rows<T>(args.query, args, at);
    const T* do_head = query_rows<T>(args.dout, args, at);
    const T* k_head = key_rows<T>(args.key, args, at);
    const T* v_head = key_rows<T>(args.value, args, at);
    const auto load_queries = [&](int first, int count) {
      for (int i = thread; i < count; i += P::kThreads) {
        const int query = first + i;
        const bool valid = query < at.queries;
        lse_tile[i] = valid ? args.lse[at.statistics + query] : INFINITY;
        delta_tile[i] = valid ? args.delta[at.statistics + query] : 0.0f;
        place_tile[i] = at.position(query) + place_offset(at);
      }
    };
    const auto stream = [&](int step) {
      const int stage = step % P::kStages, first = step * P::kSteps;
      load_tile<P, P::kSteps>(kq_tiles + stage * P::kStreamed, owns_keys ? q_head : k_head,
                              owns_keys ? args.query.row : args.key.row, first, streamed, head_dim, vectors);
      load_tile<P, P::kSteps>(vdo_tiles + stage * P::kStreamed, owns_keys ? do_head : v_head,
                              owns_keys ? args.dout.row : args.value.row, first, streamed, head_dim, vectors);
      cp_async_commit();
    };
    load_tile<P, P::kRows>(qk_tile, owns_keys ? k_head : q_head, owns_keys ? args.key.row : args.query.row,
                           first_owned, owned, head_dim, vectors);
    load_tile<P, P::kRows>(dov_tile, owns_keys ? v_head : do_head, owns_keys ? args.value.row : args.dout.row,
                           first_owned, owned, head_dim, vectors);
    stream(steps.first);
    if (!owns_keys) load_queries(first_owned, P::kRows);
    const fasttune_head_rows gradient = owns_keys ? args.dp2c : args.dc2p;
    Runs<T> runs = {nullptr, args.scale};
    if (gradient.data && thread < rows)
      runs.row = head_rows<T>(gradient, args, at, owns_keys ? at.first_key : at.first_query) +
                 (first_owned + thread) * gradient.row;

    for (int step = steps.first; step < steps.last; ++step) {
      const int first_streamed = step * P::kSteps, stage = step % P::kStages,
                columns = min(P::kSteps, streamed - first_streamed);
      const int first_query = owns_keys ? first_streamed : first_owned,
                first_key = owns_keys ? first_owned : first_streamed;
      const bool more = step + 1 < steps.last;
      if (P::kStages == 2 && more) stream(step + 1);
      if (owns_keys) load_queries(first_query, P::kSteps);
      if (dropout.threshold)
        for (int i = thread; i < (owns_keys ? P::kSteps : P::kRows) * 16; i += P::kThreads)
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
      multiply_transposed<P>(s, qk_tile + 16 * warp_index() * P::kPitch, kq_tiles + stage * P::kStreamed,
                             head_dim);
      multiply_transposed<P>(dp, dov_tile + 16 * warp_index() * P::kPitch, vdo_tiles + stage * P::kStreamed,
                             head_dim);
      FASTTUNE_UNROLL
      for (int j = 0; j < P::kSteps / 8; ++j) {
        FASTTUNE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * warp_index() + g + i / 2 * 8, column = 8 * j + 2 * t + i % 2,
                    query = owns_keys ? column : row, key = first_key + (owns_keys ? row : column),
                    place = place_tile[query];
          float p = exp2f(Terms<T>(args, at).score(args, at, s[j][i], place, first_query + query, key) -
                          lse_tile[query]);
          if (key >= at.keys || hidden(args, place, key)) p = 0.0f;
          if (dropout.threshold) {
            const bool dropped = (dropped_tile[query * 16 + key % 16] >> (key % kDropoutBlock / 16)) & 1;
            dp[j][i] = dropped ? 0.0f : dp[j][i] * dropout.scale;
          }
          ds_tile[row * kTermsPitch<P> + column] = p * (dp[j][i] - delta_tile[query]);
        }
      }
      __syncthreads();
      if (sums)
        add_distances<P>(ds_tile, place_tile, rows, first_key, columns, args.bias_furthest, sums, clamped);
      if (runs.row) {
        for (int column = 0; column < columns; ++column) {
          const int distance =
              owns_keys ? first_key + thread - place_tile[column] : first_key + column - place_tile[thread];
          runs.add(args.buckets[in_table(distance, args.buckets_furthest)],
                   ds_tile[thread * kTermsPitch<P> + column]);
        }
      }
      __syncthreads();  // before the tiles are overwritten
      if (P::kStages == 1 && more) stream(step + 1);
    }
    if (runs.row) runs.write();
  }

  if (!sums) return;
  __syncthreads();  // blocks without a tile: the sums are zero
  ds_tile[thread] = clamped;
  __syncthreads();
  if (warp_index() != 0) return;
  for (int side = 0; side < 2; ++side) {
    float sum = 0.0f;
    for (int i = lane_index(); i < P::kRows; i += kWarp) sum += ds_tile[side * P::kRows + i];
    sum = warp_sum(sum);
    if (lane_index() == 0) sums[side * (distances - 1)] += sum;
  }
}

}  // namespace

const char* attention_terms_backward(const fasttune_attention_args& args, void* stream) {
  return with_tiles(args.dtype, args.head_dim, true, [&](auto shape, auto element) -> const char* {
    using P = decltype(shape);
    using T = decltype(element);
    const char* problem = nullptr;
    if constexpr (P::kTerms) {
      const bool vectors = in_vectors(args.query, args.head_dim, sizeof(T)) &&
                           in_vectors(args.key, args.head_dim, sizeof(T)) &&
                           in_vectors(args.value, args.head_dim, sizeof(T)) &&
                           in_vectors(args.dout, args.head_dim, sizeof(T));
      const auto run = [&](bool owns_keys, int64_t most) {
        const int64_t tiles = tiles_of(args, owns_keys ? args.keys : args.queries, P::kRows),
                      items = tiles * (args.offsets ? 1 : args.sequences),
                      slots = items < most ? items : most;
        problem = launch(attention_terms_kernel<P, T>, slots * args.heads, P::kThreads,
                         terms_shared_bytes<P, T>(), stream, args, tiles, items, slots, vectors, owns_keys);
        return slots;
      };
      if (args.dbias) {
        const int64_t rows = run(false, args.partials);
        if (!problem)
          problem = column_sums(args.dbias_partial, args.dbias, FASTTUNE_F32, rows,
                                args.heads * (2 * static_cast<int64_t>(args.bias_furthest) + 1), stream);
      } else if (args.dc2p.data) {
        run(false, INT64_MAX);
      }
      if (!problem && args.dp2c.data) run(true, INT64_MAX);
    }
    return problem;
  });
}

}  // namespace fasttune::cuda
