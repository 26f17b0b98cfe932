// out = softmax(scale Q K^T) V per (sequence, head), with dropout on the weights, by tiled online softmax.
//
// For a block of queries the scores of one block of keys exist at a time: S = scale Q K^T; P = exp(S - m)
// with m a running reference near the row maximum; O += dropout(P) V and l += rowsum(P) without dropout. In
// the end out = O / l and lse = m + log l, which is all that backward needs (Milakov and Gimelshein 2018,
// Rabe and Staats 2021, Dao et al. 2022). When the row maximum passes m by more than kSlack, m rises to it
// and O and l are rescaled; below that exp(S - m) <= e^8 loses nothing in fp32 and the rescaling is spared.
// Rows that see no key have l = 0: out = 0, lse = -inf.
//
// Moves q, k, v and out once and does 4 Q K D operations: bound by the multiply-adds, not by memory.
// Tiling: a task owns up to kChunk queries of one head, so no two tasks write the same place and a row's
// arithmetic does not depend on the split. It packs kSegment keys at a time as fp32 (K transposed, so that
// scores come out of broadcast multiply-adds), which stay in L2, and walks blocks of 64 queries x 64 keys,
// whose operands stay in L1. Keys that causality or a window hides are skipped by block, then by row group.
// Terms of the scores (simd/attention_terms.inc) start a tile's sums in place of zero.
#include "cpu/attention.h"

#include "cpu/simd/begin.h"
#include "cpu/simd/attention.inc"
#include "cpu/simd/attention_terms.inc"

constexpr int64_t kChunk = 512, kSegment = 512;
constexpr float kSlack = 8.0f;
constexpr int64_t kBlock = kAttentionBlock;

struct ForwardScratch {
  float *query, *out;      // (chunk, ld)
  float *reference, *sum;  // m (chunk,), l as kLanes partial sums (chunk, kLanes)
  float *key_t, *value;    // (segment / 64, D, 64), (segment, ld)
  float* weights;          // (64, 64)
  KeptBits* kept;
};

inline int64_t carve(const AttentionArgs& args, int64_t chunk, int64_t segment, float* memory,
                     ForwardScratch* scratch) {
  const int64_t ld = round_up(args.head_dim, kLanes);
  Carver carver{memory};
  scratch->query = carver.take(chunk * ld);
  scratch->out = carver.take(chunk * ld);
  scratch->reference = carver.take(chunk);
  scratch->sum = carver.take(chunk * kLanes);
  scratch->key_t = carver.take(segment * args.head_dim);
  scratch->value = carver.take(segment * ld);
  scratch->weights = carver.take(kBlock * kBlock);
  scratch->kept = reinterpret_cast<KeptBits*>(carver.take(sizeof(KeptBits) / sizeof(float)));
  return carver.used;
}

// A tile of scores into `scores`; with terms it starts from them, which may lie there.
template <bool kTerms>
struct ScoreTile {
  const float* query;
  int64_t ld, head_dim;
  const float* key_t;
  float* scores;
  const Addend& addend;

  template <int R, int V>
  void tile(int64_t row, int64_t column) const {
    Tile<R, V> sum;
    if constexpr (kTerms)
      sum = addend.tile<R, V>(row, column);
    else
      sum = zero_tile<R, V>();
    multiply<false>(query + row * ld, ld, key_t + column, kBlock, 0, head_dim, &sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(scores + (row + r) * kBlock + column + v * kLanes, sum.at[r][v]);
  }
};

// Turns a row of scores into weights and updates its m and l; of `vectors` vectors only the columns from
// `from` on and before `visible` count.
inline void softmax_row(float* scores, int64_t vectors, int64_t from, int64_t visible, float* reference,
                        float* sum, float* out, int64_t ld) {
  const F hidden = set1(-std::numeric_limits<float>::infinity());
  for (int64_t column = 0; column < std::min(from, vectors * kLanes); column += kLanes)
    store(scores + column, select(lanes_below(from, column), hidden, load(scores + column)));
  if (visible < vectors * kLanes) {
    for (int64_t column = visible / kLanes * kLanes; column < vectors * kLanes; column += kLanes)
      store(scores + column, select(lanes_below(visible, column), load(scores + column), hidden));
  }
  F top = load(scores);
  for (int64_t v = 1; v < vectors; ++v) top = max(load(scores + v * kLanes), top);
  const float row_max = reduce_max(top);
  F total = load(sum);
  if (row_max > *reference + kSlack) {
    const F shrink = exp(set1(*reference - row_max));
    *reference = row_max;
    total = total * shrink;
    for (int64_t d = 0; d < ld; d += kLanes) store(out + d, load(out + d) * shrink);
  }
  const F shift = set1(*reference);
  for (int64_t v = 0; v < vectors; ++v) {
    const F weight = exp(load(scores + v * kLanes) - shift);
    total = total + weight;
    store(scores + v * kLanes, weight);
  }
  store(sum, total);
}

// One block of queries against one block of keys.
template <bool kTerms>
void forward_block(const AttentionArgs& args, const ForwardScratch& s, int64_t chunk_row, int64_t rows,
                   int64_t segment_key, const Visible& visible, int64_t dropout_column,
                   const Addend& addend) {
  const int64_t ld = round_up(args.head_dim, kLanes);
  const ScoreTile<kTerms> scores{
      s.query + chunk_row * ld, ld, args.head_dim, s.key_t + segment_key * args.head_dim, s.weights, addend};
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, rows - row);
    const int64_t from = visible.from_rows(row), widest = visible.of_rows(row, count);
    if (from >= widest) continue;
    const int64_t vectors = (widest - from + kLanes - 1) / kLanes;
    for (int64_t v = 0; v < vectors; v += kTileVectors)
      run_tile(scores, count, std::min<int64_t>(kTileVectors, vectors - v), row, from + v * kLanes);
    for (int64_t r = row; r < row + count; ++r) {
      float* weights = s.weights + r * kBlock + from;
      const int64_t i = chunk_row + r;
      softmax_row(weights, vectors, visible.from(r) - from, visible.of(r) - from, s.reference + i,
                  s.sum + i * kLanes, s.out + i * ld, ld);
      if (args.dropout.active())
        for (int64_t v = 0; v < vectors; ++v)
          store(weights + v * kLanes,
                keep(s.kept->lanes(r, dropout_column + from + v * kLanes), load(weights + v * kLanes)));
    }
  }
  const float* value = s.value + segment_key * ld;
  Accumulate<false>{visible.band(), s.out + chunk_row * ld, ld, s.weights, kBlock, value, ld, visible.keys}
      .run(rows, ld);
}

template <class T>
void forward_chunk(const AttentionArgs& args, const SequenceRange& sequence, int64_t head, int64_t first,
                   int64_t count, int64_t segment, const TermTables& tables, const ForwardScratch& s) {
  const int64_t head_dim = args.head_dim, ld = round_up(head_dim, kLanes);
  const uint32_t sequence_head = static_cast<uint32_t>(sequence.index * args.heads + head);
  pack_rows(query_row<const T>(args.query, sequence, head, first), args.query.row, count, head_dim,
            args.scale, s.query, ld);
  std::memset(s.out, 0, sizeof(float) * count * ld);
  std::memset(s.sum, 0, sizeof(float) * count * kLanes);
  // Low enough for every real score to raise it, finite so that hidden scores have weight exp(-inf) = 0.
  std::fill_n(s.reference, count, std::numeric_limits<float>::lowest());

  const KeyRange seen = keys_seen(args, sequence, first, count);
  for (int64_t start = seen.first / kBlock * kBlock; start < seen.last; start += segment) {
    const int64_t end = std::min(seen.last, start + segment);
    for (int64_t key = start; key < end; key += kBlock)
      pack_transposed(key_row<const T>(args.key, sequence, head, key), args.key.row,
                      std::min(kBlock, sequence.keys - key), head_dim, s.key_t + (key - start) * head_dim);
    pack_rows(key_row<const T>(args.value, sequence, head, start), args.value.row, end - start, head_dim,
              1.0f, s.value, ld);
    for (int64_t row = 0; row < count; row += kBlock) {
      const int64_t rows = std::min(kBlock, count - row);
      const KeyRange block = keys_seen(args, sequence, first + row, rows);
      const int64_t begin = std::max(start, block.first / kBlock * kBlock);
      for (int64_t key = begin; key < std::min(end, block.last); key += kBlock) {
        if (args.dropout.active() && (key % kDropoutBlock == 0 || key == begin))
          draw_kept_bits(args.dropout, sequence, first + row, rows, key, sequence_head, s.kept);
        const Visible visible = visible_keys(args, sequence, first + row, key, std::min(kBlock, end - key));
        Addend addend;
        if (args.terms.any()) {
          const TermBlock block =
              term_block(args, tables, sequence, head, first + row, rows, key, visible.keys);
          make_addend<T>(block, s.weights, &addend);
          forward_block<true>(args, s, row, rows, key - start, visible, key % kDropoutBlock, addend);
        } else {
          forward_block<false>(args, s, row, rows, key - start, visible, key % kDropoutBlock, addend);
        }
      }
    }
  }

  float* lse = lse_row(args, sequence, head) + first;
  for (int64_t row = 0; row < count; ++row) {
    const float total = reduce_add(load(s.sum + row * kLanes));
    lse[row] = total == 0.0f ? -std::numeric_limits<float>::infinity() : s.reference[row] + std::log(total);
    const float factor = total == 0.0f           ? 0.0f
                         : args.dropout.active() ? args.dropout.scale / total
                                                 : 1.0f / total;
    unpack_rows(s.out + row * ld, ld, 1, head_dim, factor,
                query_row<T>(args.out, sequence, head, first + row), args.out.row);
  }
}

struct ForwardTask {
  SequenceRange sequence;
  int64_t head, first, count;
};

void attention_forward(const AttentionArgs& args) {
  // Smaller chunks where there are few heads, so that every thread has work: rows do not notice.
  int64_t longest = 0, rows = 0, reach = 0;
  for (int64_t n = 0; n < args.sequences; ++n) {
    const SequenceRange sequence = sequence_range(args, n);
    longest = std::max(longest, sequence.queries);
    reach = std::max(reach, sequence.keys);
    rows += sequence.queries * args.heads;
  }
  int64_t chunk = std::min(kChunk, round_up(longest, kBlock));
  while (chunk > kBlock && rows < 4 * num_threads() * chunk) chunk = round_up(chunk / 2, kBlock);
  const int64_t segment = std::min(kSegment, round_up(reach, kBlock));

  std::vector<ForwardTask> tasks;
  for (int64_t n = 0; n < args.sequences; ++n) {
    const SequenceRange sequence = sequence_range(args, n);
    for (int64_t head = 0; head < args.heads; ++head)
      for (int64_t first = 0; first < sequence.queries; first += chunk)
        tasks.push_back({sequence, head, first, std::min(chunk, sequence.queries - first)});
  }
  const TermTables tables(args);
  ForwardScratch scratch;
  const int64_t floats = carve(args, chunk, segment, nullptr, &scratch);
  parallel_tasks(static_cast<int64_t>(tasks.size()), floats, [&](int64_t i, float* memory) FT_LAMBDA {
    ForwardScratch own;
    carve(args, chunk, segment, memory, &own);
    const ForwardTask& task = tasks[i];
    FASTTUNE_WITH_DTYPE(
        args.dtype, T,
        forward_chunk<T>(args, task.sequence, task.head, task.first, task.count, segment, tables, own));
  });
}

#include "cpu/simd/end.h"
