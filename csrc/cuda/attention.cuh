// What the three attention kernels share: where a block works, tiles in shared memory, and a warp's matrix
// products.
//
// Shape legend: Q queries and K keys of a sequence, H heads, D head dimension. A block owns some rows of one
// head of one sequence (queries in the forward and dQ kernels, keys in the dK, dV kernel), 16 per warp, and
// walks over tiles of the other axis, which stream through shared memory with cp.async: while one tile is
// computed the next one arrives. Both sides are padded to kDim = 64 or 128 columns, with zeros; products skip
// the 16-column steps beyond D.
//
// A warp's result of 16 x n values lies in registers as mma lays it out: float c[n / 8][4], where of lane 4 g
// + t c[j][i] is row g + 8 (i / 2), column 8 j + 2 t + i % 2. Weights in this layout are the first operand of
// the next product as they are (Dao 2023). float32 tensors take the same kernels with products by fused
// multiply-adds on the same layout: there, weights pass through shared memory.
//
// Rows in shared memory are padded by 16 bytes, so that the eight rows which one phase of ldmatrix reads, and
// the rows which neighbouring lanes read, lie in different banks.
#pragma once
#include <climits>

#include "cuda/mma.cuh"
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"

namespace fasttune::cuda {

constexpr float kLog2e = 1.4426950408889634f;

template <class T, int kDimension, bool kWithTerms>
struct Tiles {
  static constexpr bool kIsFloat = sizeof(T) == 4, kTerms = kWithTerms;
  static constexpr int kDim = kDimension;
  static constexpr int kWarps = kIsFloat ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * kWarps;  // that a block owns
  // Rows of a streamed tile. The addresses of terms take registers, which fewer scores leave free.
  static constexpr int kSteps = (kIsFloat || kTerms ? 2048 : 4096) / kDimension;
  static constexpr int kStages = kIsFloat ? 1 : 2;  // streamed tiles in shared memory
  static constexpr int kPitch = kDimension + 16 / static_cast<int>(sizeof(T));
  static constexpr int kOwned = kRows * kPitch, kStreamed = kSteps * kPitch;  // elements of one tile
  static constexpr int kScratchPitch = kSteps + 4;
  static constexpr int kScratch =
      kIsFloat ? 16 * kScratchPitch : 0;  // per warp: weights on their way to a product
};

// ---------------------------------------------------------------------------------------------------- places

// The sequence, head and tile of a block.
struct Place {
  int64_t sequence, first_query, first_key;  // first rows of the sequence in packed tensors
  int head, tile;                            // tile < 0: nothing to do
  int queries, keys;
  int64_t statistics;        // index of the sequence's first query in lse and delta
  const int32_t* positions;  // of the sequence's queries, or null: 0, 1, 2, ...

  // Where a query stands in its sequence: what causality and dropout go by.
  __device__ __forceinline__ int position(int query) const {
    return positions && query < queries ? positions[query] : query;
  }
};

__device__ __forceinline__ int64_t offset_at(const fasttune_attention_args& args, const void* offsets,
                                             int64_t index) {
  return args.offsets_are_64_bit ? static_cast<const int64_t*>(offsets)[index]
                                 : static_cast<const int*>(offsets)[index];
}

// Blocks are numbered tile first, then head, then sequence. Packed, sequence s owns the tiles from
// offsets[s] / rows + s on, by the offsets of what the kernel owns: at least as many as it has, and the grid
// needs no length but the total. The last such s is found by bisection; blocks without rows get tile -1.
__device__ __forceinline__ Place locate(const fasttune_attention_args& args, int rows, int64_t tiles,
                                        bool owns_keys, int64_t block) {
  Place at;
  int64_t tile = block % tiles;
  at.head = static_cast<int>(block / tiles % args.heads);
  at.sequence = block / tiles / args.heads;
  at.first_query = at.first_key = 0;
  at.positions = nullptr;
  at.queries = static_cast<int>(args.queries);
  at.keys = static_cast<int>(args.keys);
  at.statistics = (at.sequence * args.heads + at.head) * args.queries;
  if (args.offsets) {
    const void* query_offsets = args.query_offsets ? args.query_offsets : args.offsets;
    const void* owned_offsets = owns_keys ? args.offsets : query_offsets;
    int64_t low = 0, high = args.sequences;
    while (low + 1 < high) {
      const int64_t middle = (low + high) / 2;
      if (offset_at(args, owned_offsets, middle) / rows + middle <= tile)
        low = middle;
      else
        high = middle;
    }
    at.sequence = low;
    at.first_query = offset_at(args, query_offsets, low);
    at.first_key = offset_at(args, args.offsets, low);
    at.queries = static_cast<int>(offset_at(args, query_offsets, low + 1) - at.first_query);
    at.keys = static_cast<int>(offset_at(args, args.offsets, low + 1) - at.first_key);
    if (args.query_offsets) at.positions = args.positions + at.first_query;
    tile -= (owns_keys ? at.first_key : at.first_query) / rows + low;
    at.statistics = at.head * args.queries + at.first_query;
  }
  const int owned = owns_keys ? at.keys : at.queries;
  at.tile = tile * rows < owned ? static_cast<int>(tile) : -1;
  return at;
}

inline int64_t tiles_of(const fasttune_attention_args& args, int64_t owned, int rows) {
  return args.offsets ? owned / rows + args.sequences : divide_up<int64_t>(owned, rows);
}

inline int64_t blocks_of(const fasttune_attention_args& args, int64_t tiles) {
  return tiles * args.heads * (args.offsets ? 1 : args.sequences);
}

// Where a query stands among the keys, for causality and window, is its position and this.
__device__ __forceinline__ int place_offset(const Place& at) {
  return at.positions ? 0 : at.keys - at.queries;
}

// Of its place a query sees the keys that are ahead by lower to upper. From the arguments, which cost no
// register.
__device__ __forceinline__ int sight_lower(const fasttune_attention_args& args) {
  return args.window < 0 ? INT_MIN : -args.window;
}
__device__ __forceinline__ int sight_upper(const fasttune_attention_args& args) {
  return args.causal ? 0 : args.window < 0 ? INT_MAX : args.window;
}
__device__ __forceinline__ bool hidden(const fasttune_attention_args& args, int place, int key) {
  return key - place > sight_upper(args) || key - place < sight_lower(args);
}

// Of `rows` queries: keys before `first` and from `last` on are seen by none, those from `inner` on and
// before `full` by all.
struct KeyRange {
  int first, inner, full, last;
};

__device__ __forceinline__ KeyRange keys_seen(const fasttune_attention_args& args, const Place& at,
                                              int first_query, int rows) {
  const int lowest = at.position(first_query) + place_offset(at),
            highest = at.position(min(first_query + rows, at.queries) - 1) + place_offset(at);
  KeyRange seen = {0, 0, at.keys, at.keys};
  if (args.window >= 0) {
    seen.first = min(at.keys, max(0, lowest - args.window));
    seen.inner = max(0, highest - args.window);
  }
  if (args.causal || args.window >= 0) {  // subtracted before it is added: the sum may have more than 32 bits
    const int ahead = sight_upper(args);
    seen.full = max(0, min(at.keys - 1 - ahead, lowest) + ahead + 1);
    seen.last = max(0, min(at.keys - 1 - ahead, highest) + ahead + 1);
  }
  return seen;
}

// The first query of the sequence whose position is at least `position`; it need not exist.
__device__ __forceinline__ int first_query_from(const Place& at, int position) {
  if (!at.positions) return max(0, position);
  int low = 0, high = at.queries;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (at.positions[middle] < position)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The tiles of `size` queries that see one of the keys [first_key, first_key + rows): from first on, before
// last.
struct Steps {
  int first, last;
};

__device__ __forceinline__ Steps queries_seeing(const fasttune_attention_args& args, const Place& at,
                                                int first_key, int rows, int size) {
  const int offset = place_offset(at);
  int first = 0, last = at.queries;
  if (args.causal || args.window >= 0)
    first = first_query_from(at, first_key - sight_upper(args) - offset) / size;
  if (args.window >= 0) last = min(at.queries, first_query_from(at, first_key + rows + args.window - offset));
  return {first, divide_up(last, size)};
}

template <class T>
__device__ __forceinline__ T* head_rows(const fasttune_head_rows& rows, const fasttune_attention_args& args,
                                        const Place& at, int64_t first) {
  const int64_t sequence = args.offsets ? first * rows.row : at.sequence * rows.sequence;
  return static_cast<T*>(rows.data) + sequence + at.head * rows.head;
}

template <class T>
__device__ __forceinline__ T* query_rows(const fasttune_head_rows& rows, const fasttune_attention_args& args,
                                         const Place& at) {
  return head_rows<T>(rows, args, at, at.first_query);
}

template <class T>
__device__ __forceinline__ T* key_rows(const fasttune_head_rows& rows, const fasttune_attention_args& args,
                                       const Place& at) {
  return head_rows<T>(rows, args, at, at.first_key);
}

// Whether every row of the tensor can be read and written 16 bytes at a time.
inline bool in_vectors(const fasttune_head_rows& rows, int64_t head_dim, size_t element) {
  const int64_t per_vector = static_cast<int64_t>(16 / element);
  return is_aligned(rows.data) && head_dim % per_vector == 0 && rows.sequence % per_vector == 0 &&
         rows.row % per_vector == 0 && rows.head % per_vector == 0;
}

// ----------------------------------------------------------------------------------------------------- tiles

// Rows [first, first + kCount) of a head to shared memory; zeros beyond `rows` and beyond head_dim. With
// `vectors` the copies are asynchronous and belong to the group that is committed next.
template <class P, int kCount, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* head, int64_t stride, int first, int rows,
                                          int head_dim, bool vectors) {
  constexpr int kVectorSize = 16 / sizeof(T), kPerRow = P::kDim / kVectorSize;
  static_assert(kCount * kPerRow % P::kThreads == 0, "every thread copies as many vectors");
  if (vectors) {
    FASTTUNE_UNROLL
    for (int i = 0; i < kCount * kPerRow / P::kThreads; ++i) {
      const int index = i * P::kThreads + static_cast<int>(threadIdx.x);
      const int row = index / kPerRow, column = index % kPerRow * kVectorSize;
      const bool valid = first + row < rows && column < head_dim;
      const T* from = head + (valid ? static_cast<int64_t>(first + row) * stride + column : 0);
      cp_async(tile + row * P::kPitch + column, from, valid);
    }
  } else {
    FASTTUNE_NO_UNROLL
    for (int index = static_cast<int>(threadIdx.x); index < kCount * P::kDim; index += P::kThreads) {
      const int row = index / P::kDim, column = index % P::kDim;
      const bool valid = first + row < rows && column < head_dim;
      tile[row * P::kPitch + column] =
          valid ? head[static_cast<int64_t>(first + row) * stride + column] : from_float<T>(0.0f);
    }
  }
}

// This warp's 16 rows, factor[i] times the values of rows g + 8 i, to rows [first, first + 16) of a head,
// those before `rows`. They pass through `tile`, 16 rows of shared memory that only this warp uses, so that
// the writes to memory are 16 bytes each and consecutive.
template <class P, class T>
__device__ __forceinline__ void store_rows(T* tile, const float (&values)[P::kDim / 8][4],
                                           const float (&factor)[2], T* head, int64_t stride, int first,
                                           int rows, int head_dim, bool vectors) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  __syncwarp();  // the tile's last readers are done
  FASTTUNE_UNROLL
  for (int j = 0; j < P::kDim / 8; ++j) {
    FASTTUNE_UNROLL
    for (int i = 0; i < 4; ++i)
      tile[(g + i / 2 * 8) * P::kPitch + 8 * j + 2 * t + i % 2] = from_float<T>(values[j][i] * factor[i / 2]);
  }
  __syncwarp();
  T* to = head + static_cast<int64_t>(first) * stride;
  if (vectors) {
    constexpr int kVectorSize = 16 / sizeof(T), kPerRow = P::kDim / kVectorSize;
    FASTTUNE_UNROLL
    for (int i = 0; i < 16 * kPerRow / kWarp; ++i) {
      const int index = i * kWarp + lane_index(), row = index / kPerRow,
                column = index % kPerRow * kVectorSize;
      if (first + row < rows && column < head_dim)
        *reinterpret_cast<uint4*>(to + row * stride + column) =
            *reinterpret_cast<const uint4*>(tile + row * P::kPitch + column);
    }
  } else {
    FASTTUNE_NO_UNROLL
    for (int index = lane_index(); index < 16 * P::kDim; index += kWarp) {
      const int row = index / P::kDim, column = index % P::kDim;
      if (first + row < rows && column < head_dim) to[row * stride + column] = tile[row * P::kPitch + column];
    }
  }
}

// -------------------------------------------------------------------------------------------------- products

// c += A Bᵀ: A 16 rows, B 8 * kTiles rows, both of head_dim columns in shared memory.
template <class P, int kTiles, class T>
__device__ __forceinline__ void multiply_transposed(float (&c)[kTiles][4], const T* a, const T* b,
                                                    int head_dim) {
  const int lane = lane_index();
  if constexpr (P::kIsFloat) {
    const int g = lane / 4, t = lane % 4;
    FASTTUNE_NO_UNROLL
    for (int k = 0; k < head_dim; k += 4) {
      const float4 low = *reinterpret_cast<const float4*>(a + g * P::kPitch + k);
      const float4 high = *reinterpret_cast<const float4*>(a + (g + 8) * P::kPitch + k);
      FASTTUNE_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        FASTTUNE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float4 w = *reinterpret_cast<const float4*>(b + (8 * j + 2 * t + i) * P::kPitch + k);
          c[j][i] = fmaf(low.x, w.x, fmaf(low.y, w.y, fmaf(low.z, w.z, fmaf(low.w, w.w, c[j][i]))));
          c[j][2 + i] =
              fmaf(high.x, w.x, fmaf(high.y, w.y, fmaf(high.z, w.z, fmaf(high.w, w.w, c[j][2 + i]))));
        }
      }
    }
  } else {
    const T* a_row = a + lane % 16 * P::kPitch + lane / 16 * 8;
    const T* b_row = b + (lane % 8 + lane / 16 * 8) * P::kPitch + lane / 8 % 2 * 8;
    FASTTUNE_UNROLL
    for (int k = 0; k < P::kDim; k += 16) {
      if (k >= head_dim) break;
      uint32_t fragment[4];
      ldmatrix(fragment, a_row + k);
      if (FASTTUNE_SEEDED(kBugWrongFragment)) fragment[1] = fragment[2];
      FASTTUNE_UNROLL
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t pair[4];
        ldmatrix(pair, b_row + 8 * j * P::kPitch + k);
        mma<T>(c[j], fragment, pair[0], pair[1]);
        mma<T>(c[j + 1], fragment, pair[2], pair[3]);
      }
    }
  }
}

// c += W B: W 16 x 8 * kTiles weights in registers, B 8 * kTiles rows of head_dim columns in shared memory.
// scratch: of this warp, for float32.
template <class P, int kTiles, class T>
__device__ __forceinline__ void multiply(float (&c)[P::kDim / 8][4], const float (&w)[kTiles][4], const T* b,
                                         int head_dim, T* scratch) {
  const int lane = lane_index();
  if constexpr (P::kIsFloat) {
    const int g = lane / 4, t = lane % 4;
    __syncwarp();
    FASTTUNE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      FASTTUNE_UNROLL
      for (int i = 0; i < 4; ++i)
        scratch[(g + i / 2 * 8) * P::kScratchPitch + 8 * j + 2 * t + i % 2] = w[j][i];
    }
    __syncwarp();
    FASTTUNE_NO_UNROLL
    for (int k = 0; k < 8 * kTiles; ++k) {
      const float low = scratch[g * P::kScratchPitch + k], high = scratch[(g + 8) * P::kScratchPitch + k];
      FASTTUNE_UNROLL
      for (int j = 0; j < P::kDim / 8; ++j) {
        if (8 * j >= head_dim) break;
        const float2 pair = *reinterpret_cast<const float2*>(b + k * P::kPitch + 8 * j + 2 * t);
        c[j][0] = fmaf(low, pair.x, c[j][0]);
        c[j][1] = fmaf(low, pair.y, c[j][1]);
        c[j][2] = fmaf(high, pair.x, c[j][2]);
        c[j][3] = fmaf(high, pair.y, c[j][3]);
      }
    }
  } else {
    const T* b_row = b + lane % 16 * P::kPitch + lane / 16 * 8;
    FASTTUNE_UNROLL
    for (int k = 0; k < kTiles; k += 2) {
      const uint32_t fragment[4] = {pack<T>(w[k][0], w[k][1]), pack<T>(w[k][2], w[k][3]),
                                    pack<T>(w[k + 1][0], w[k + 1][1]), pack<T>(w[k + 1][2], w[k + 1][3])};
      FASTTUNE_UNROLL
      for (int j = 0; j < P::kDim / 8; j += 2) {
        if (8 * j >= head_dim) break;
        uint32_t pair[4];
        ldmatrix_transposed(pair, b_row + 8 * k * P::kPitch + 8 * j);
        mma<T>(c[j], fragment, pair[0], pair[1]);
        mma<T>(c[j + 1], fragment, pair[2], pair[3]);
      }
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&c)[kTiles][4]) {
  FASTTUNE_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    FASTTUNE_UNROLL
    for (int i = 0; i < 4; ++i) c[j][i] = 0.0f;
  }
}

// --------------------------------------------------------------------------------------------------- dropout

// Which weights of a lane's two queries (rows g and g + 8 of a warp) are dropped, for the 128 keys of one
// block of counters: a lane needs the columns 2t, 2t + 1, 2t + 8 and 2t + 9 modulo 16, so four counters per
// query, all of whose bits it uses.
struct DroppedKeys {
  uint32_t bits[2];

  // position: of the two queries.
  __device__ __forceinline__ void draw(const DropoutKey& dropout, int first_key, const int (&position)[2],
                                       uint32_t head) {
    const int t = lane_index() % 4;
    FASTTUNE_UNROLL
    for (int row = 0; row < 2; ++row) {
      bits[row] = 0;
      FASTTUNE_UNROLL
      for (int i = 0; i < 4; ++i)
        bits[row] |=
            dropped_bits(dropout,
                         static_cast<uint32_t>(first_key / kDropoutBlock * 16 + 2 * t + i % 2 + i / 2 * 8),
                         static_cast<uint32_t>(position[row]), head, kAttentionDomain)
            << (8 * i);
    }
  }

  // Of c[j][i] in a tile of keys from first_key on.
  __device__ __forceinline__ bool operator()(int first_key, int j, int i) const {
    const int sixteen = first_key % kDropoutBlock / 16 + j / 2;
    return (bits[i / 2] >> (8 * (i % 2 + j % 2 * 2) + sixteen)) & 1u;
  }
};

// The number of sequence and head in the generator's coordinates.
__device__ __forceinline__ uint32_t head_number(const fasttune_attention_args& args, const Place& at) {
  return static_cast<uint32_t>(at.sequence * args.heads + at.head);
}

// ----------------------------------------------------------------------------------------------------- terms

// Where a distance stands in a table of -furthest to furthest.
__device__ __forceinline__ int in_table(int distance, int furthest) {
  return min(max(distance, -furthest), furthest) + furthest;
}

// What stands in a head's scores beside q · k, by the distance of key and query: a bias, and a number of the
// query and one of the key that the distance's bucket picks. A null pointer is a term that is not there.
template <class T>
struct Terms {
  const float* bias;
  const T *c2p, *p2c;

  __device__ __forceinline__ Terms(const fasttune_attention_args& args, const Place& at)
      : bias(args.bias ? args.bias + at.head * (2 * static_cast<int64_t>(args.bias_furthest) + 1) : nullptr),
        c2p(args.c2p.data ? query_rows<T>(args.c2p, args, at) : nullptr),
        p2c(args.p2c.data ? key_rows<T>(args.p2c, args, at) : nullptr) {}

  // The score, to base 2, of a query at `place` among the keys. Rows that do not exist get one of some row.
  __device__ __forceinline__ float score(const fasttune_attention_args& args, const Place& at, float product,
                                         int place, int query, int key) const {
    if (args.buckets) {
      const int bucket = args.buckets[in_table(key - place, args.buckets_furthest)];
      if (c2p) product += to_float(c2p[min(query, at.queries - 1) * args.c2p.row + bucket]);
      if (p2c) product += to_float(p2c[min(key, at.keys - 1) * args.p2c.row + bucket]);
    }
    product *= args.scale * kLog2e;
    return bias ? fmaf(bias[in_table(key - place, args.bias_furthest)], kLog2e, product) : product;
  }
};

inline bool has_terms(const fasttune_attention_args& args) { return args.bias || args.buckets; }

// Enqueues attention_terms.cu: the gradients of the terms. Returns null or what went wrong.
const char* attention_terms_backward(const fasttune_attention_args& args, void* stream);

// Dynamic shared memory in bytes: two owned tiles (forward: one), two streamed ones in every stage, the
// scratch.
template <class P, class T>
constexpr size_t shared_bytes(bool backward) {
  return sizeof(T) *
         ((backward ? 2 : 1) * P::kOwned + 2 * P::kStages * P::kStreamed + P::kWarps * P::kScratch);
}

// The terms' gradients: without scratch, but with a float32 tile of dS, whose pitch is odd so that the
// elements of a column lie in different banks, too.
template <class P>
constexpr int kTermsPitch = P::kSteps + 1;

template <class P, class T>
constexpr size_t terms_shared_bytes() {
  return sizeof(T) * 2 * (P::kOwned + P::kStages * P::kStreamed) + sizeof(float) * P::kRows * kTermsPitch<P>;
}

// Calls body(tile type, element).
template <class Body>
const char* with_tiles(int dtype, int64_t head_dim, bool terms, const Body& body) {
  if (head_dim < 1 || head_dim > 128) return "the head dimension is not between 16 and 128";
  FASTTUNE_WITH_CUDA_DTYPE(dtype, T, {
    if (terms) return head_dim <= 64 ? body(Tiles<T, 64, true>(), T()) : body(Tiles<T, 128, true>(), T());
    return head_dim <= 64 ? body(Tiles<T, 64, false>(), T()) : body(Tiles<T, 128, false>(), T());
  });
  return nullptr;
}

}  // namespace fasttune::cuda
