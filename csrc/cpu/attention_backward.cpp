// Gradients of attention per (sequence, head), recomputing the weights from lse: no K x Q tensor exists.
//
// With P = exp(scale Q K^T - lse), Pd = dropout(P) and O = Pd V:
//     dV = Pd^T dO
//     dPd = dO V^T, and through the dropout dP = mask * dPd / (1 - p)
//     dS = P * (dP - delta),  delta = rowsum(P * dP) = rowsum(dO * O)
//     dQ = scale dS K
//     dK = scale dS^T Q
// Rows that see no key have lse = -inf: their P is 0 and so is every gradient.
//
// 10 Q K D operations against q, k, v, out, dout read and dq, dk, dv written once: bound by the
// multiply-adds. Tiling: a task owns one segment of keys of one head, about 640 KB in L2 (K, K^T, V^T, dK, dV
// in fp32), and walks the query blocks of the sequence past it, 64 queries x 64 keys at a time. dK and dV
// therefore belong to one task. dQ sums over segments in their order: a task adds its share of a query block
// after its predecessor did, which by then is ahead of it; with a window, the first segment that it sees
// starts. So the bits do not depend on the number of threads, nothing is computed twice, and sequences within
// one segment (512 keys at D = 64) wait for nobody.
//
// Terms of the scores (simd/attention_terms.inc) start S, and the blocks of dS are taken apart into their
// gradients: p2c's belongs to the task as dK does, c2p's sums over segments as dQ does, and of the bias's
// each task has a share for every distance that the call meets, at most 2 K + 1 numbers to K D of its keys;
// they are summed in their order.
#include "cpu/attention.h"

#include <thread>

#include "cpu/simd/begin.h"
#include "cpu/simd/attention.inc"
#include "cpu/simd/attention_terms.inc"

constexpr int64_t kBlock = kAttentionBlock;

struct BackwardTask {
  SequenceRange sequence;
  int64_t head, first_key, keys;
  float* partial;                  // sums over segments of dQ (Q, ld), then dc2p (Q, bucket_ld); null if one
  std::atomic<int64_t>* finished;  // query blocks from this one on are done; [-1] is the segment before
  float* dbias;                    // (2 reach + 1,) share of the bias's gradient, or null
};

struct BackwardScratch {
  float *query, *dout, *dquery;  // (64, ld)
  float *lse, *delta;            // (64,)
  float *key, *key_t, *value_t;  // (segment, ld), (segment / 64, D, 64) twice
  float *dkey, *dvalue;          // (segment, ld)
  float *weights, *dscores;      // (64, 64)
  KeptBits* kept;
  float* diagonals;    // sums of dS by distance, as TermTables lays them out
  float *dc2p, *dp2c;  // (64, bucket_ld), (segment, bucket_ld) sums of it by bucket
  int64_t bucket_ld;
};

inline int64_t carve(const AttentionArgs& args, int64_t segment, const TermTables& tables, float* memory,
                     BackwardScratch* s) {
  const int64_t ld = round_up(args.head_dim, kLanes);
  Carver carver{memory};
  for (float** block : {&s->query, &s->dout, &s->dquery}) *block = carver.take(kBlock * ld);
  for (float** rows : {&s->lse, &s->delta}) *rows = carver.take(kBlock);
  for (float** keys : {&s->key, &s->dkey, &s->dvalue}) *keys = carver.take(segment * ld);
  for (float** keys : {&s->key_t, &s->value_t}) *keys = carver.take(segment * args.head_dim);
  for (float** square : {&s->weights, &s->dscores}) *square = carver.take(kBlock * kBlock);
  s->kept = reinterpret_cast<KeptBits*>(carver.take(sizeof(KeptBits) / sizeof(float)));
  const AttentionTerms& terms = args.terms;
  s->bucket_ld = round_up(tables.buckets.count, kLanes);
  s->diagonals = carver.take(terms.dbias ? tables.of_bias.span() : 0);
  s->dc2p = carver.take(terms.dc2p.data ? kBlock * s->bucket_ld : 0);
  s->dp2c = carver.take(terms.dp2c.data ? segment * s->bucket_ld : 0);
  return carver.used;
}

// A tile of P and dS into `weights` (after dropout, without its scale; before, the terms may lie there) and
// `dscores`.
template <bool kTerms>
struct WeightTile {
  const BackwardScratch& s;
  const DropoutSpec& dropout;
  const float *key_t, *value_t;
  int64_t ld, head_dim, dropout_column;
  const Visible& visible;
  const Addend& addend;

  template <int R, int V>
  void tile(int64_t row, int64_t column) const {
    Tile<R, V> sum;
    if constexpr (kTerms)
      sum = addend.tile<R, V>(row, column);
    else
      sum = zero_tile<R, V>();
    multiply<false>(s.query + row * ld, ld, key_t + column, kBlock, 0, head_dim, &sum);
    float* weights = s.weights + row * kBlock + column;
    float* dscores = s.dscores + row * kBlock + column;
    // What the first row sees all rows see, but for what lies before the last one's keys.
    const int64_t all_visible = visible.of(row), from_all = visible.from(row + R - 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F lse = set1(s.lse[row + r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(weights + r * kBlock + v * kLanes, exp(sum.at[r][v] - lse));
    }
    if (column + V * kLanes > all_visible || column < from_all)
      for (int r = 0; r < R; ++r) {
        const int64_t seen = visible.of(row + r), from = visible.from(row + r);
        for (int v = 0; v < V; ++v) {
          float* weight = weights + r * kBlock + v * kLanes;
          const F seen_weight = keep(lanes_below(seen, column + v * kLanes), load(weight));
          store(weight, select(lanes_below(from, column + v * kLanes), zero(), seen_weight));
        }
      }
    sum = zero_tile<R, V>();
    multiply<false>(s.dout + row * ld, ld, value_t + column, kBlock, 0, head_dim, &sum);
    const F scale = set1(dropout.scale);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F delta = set1(s.delta[row + r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const int64_t at = r * kBlock + v * kLanes;
        const F weight = load(weights + at);
        F dweight = sum.at[r][v];
        if (dropout.active()) {
          const M kept = s.kept->lanes(row + r, dropout_column + column + v * kLanes);
          dweight = keep(kept, dweight * scale);
          store(weights + at, keep(kept, weight));
        }
        store(dscores + at, weight * (dweight - delta));
      }
    }
  }
};

// One block of queries against one block of keys.
template <bool kTerms>
void backward_block(const AttentionArgs& args, const BackwardScratch& s, int64_t rows, int64_t key,
                    const Visible& visible, int64_t dropout_column, const Addend& addend) {
  const int64_t head_dim = args.head_dim, ld = round_up(head_dim, kLanes);
  const int64_t keys = visible.keys;
  const Band band = visible.band();
  const WeightTile<kTerms> weights{s,     args.dropout, s.key_t + key * head_dim, s.value_t + key * head_dim,
                                   ld,    head_dim,     dropout_column,           visible,
                                   addend};
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, rows - row);
    const int64_t vectors = (visible.of_rows(row, count) + kLanes - 1) / kLanes;
    const int64_t from = visible.from_rows(row);
    for (int64_t v = from / kLanes; v < vectors; v += kTileVectors)
      run_tile(weights, count, std::min<int64_t>(kTileVectors, vectors - v), row, v * kLanes);
    const auto clear = [&](int64_t column, int64_t columns) FT_LAMBDA {  // read as part of whole tiles below
      for (int64_t r = row; columns > 0 && r < row + count; ++r) {
        std::memset(s.weights + r * kBlock + column, 0, sizeof(float) * columns);
        std::memset(s.dscores + r * kBlock + column, 0, sizeof(float) * columns);
      }
    };
    clear(0, from);
    clear(vectors * kLanes, kBlock - vectors * kLanes);
  }
  // A row that sees just one key gives it the weight 1 whatever the score: dS is exactly 0, and not the
  // difference of two roundings of dP.
  const bool windowed = args.window >= 0, may_be_one = windowed || visible.sequence.first == 0;
  for (int64_t r = 0; may_be_one && r < rows; ++r) {
    if (visible.sees_one(r))
      std::memset(s.dscores + r * kBlock, 0, sizeof(float) * kBlock);
    else if (!windowed && visible.of(r) > 1)
      break;  // later rows see more
  }
  if (args.dvalue.data)
    Accumulate<true>{band, s.dvalue + key * ld, ld, s.weights, kBlock, s.dout, ld, rows}.run(keys, ld);
  if (args.dkey.data)
    Accumulate<true>{band, s.dkey + key * ld, ld, s.dscores, kBlock, s.query, ld, rows}.run(keys, ld);
  if (args.dquery.data)
    Accumulate<false>{band, s.dquery, ld, s.dscores, kBlock, s.key + key * ld, ld, keys}.run(rows, ld);
}

// Query block, dO, lse and delta into scratch.
template <class T>
void load_queries(const AttentionArgs& args, const BackwardTask& task, int64_t first, int64_t rows,
                  const BackwardScratch& s) {
  const int64_t head_dim = args.head_dim, ld = round_up(head_dim, kLanes);
  pack_rows(query_row<const T>(args.query, task.sequence, task.head, first), args.query.row, rows, head_dim,
            args.scale, s.query, ld);
  pack_rows(query_row<const T>(args.dout, task.sequence, task.head, first), args.dout.row, rows, head_dim,
            1.0f, s.dout, ld);
  const float* lse = lse_row(args, task.sequence, task.head) + first;
  const T* out = query_row<const T>(args.out, task.sequence, task.head, first);
  for (int64_t row = 0; row < rows; ++row, out += args.out.row) {
    F delta = zero();
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes)
      delta = fma(load(out + d), load(s.dout + row * ld + d), delta);
    if (d < head_dim) delta = fma(load_n(out + d, head_dim - d), load(s.dout + row * ld + d), delta);
    s.delta[row] = reduce_add(delta);
    s.lse[row] =
        std::isinf(lse[row]) ? std::numeric_limits<float>::infinity() : lse[row];  // exp(S - inf) = 0
  }
  std::memset(s.dquery, 0, sizeof(float) * rows * ld);
  if (args.terms.dc2p.data) std::memset(s.dc2p, 0, sizeof(float) * rows * s.bucket_ld);
}

// Sums by bucket, times `scale`, to rows of all `width` buckets.
template <class T>
void unpack_buckets(const Buckets& buckets, const float* from, int64_t ld, int64_t rows, float scale,
                    int64_t width, T* to, int64_t stride) {
  const int64_t behind = buckets.first + buckets.count;
  for (int64_t row = 0; row < rows; ++row) {
    std::memset(to + row * stride, 0, sizeof(T) * buckets.first);
    std::memset(to + row * stride + behind, 0, sizeof(T) * (width - behind));
  }
  unpack_rows(from, ld, rows, buckets.count, scale, to + buckets.first, stride);
}

// Adds this segment's share of a query block of dQ and dc2p to the earlier ones'; the last one writes the
// result.
template <class T>
void store_queries(const AttentionArgs& args, const BackwardTask& task, const Buckets& buckets, int64_t first,
                   int64_t rows, const KeyRange& seen, const BackwardScratch& s) {
  const AttentionTerms& terms = args.terms;
  const int64_t ld = round_up(args.head_dim, kLanes);
  const bool starts = task.first_key <= std::max<int64_t>(0, seen.first);
  const bool ends = task.first_key + task.keys >= seen.last;
  while (!starts && task.finished[-1].load(std::memory_order_acquire) > first) std::this_thread::yield();
  const auto add = [&](float* own, int64_t width, int64_t offset) FT_LAMBDA {
    float* partial = task.partial ? task.partial + offset + first * width : nullptr;
    for (int64_t i = 0; !starts && i < rows * width; i += kLanes)
      store(own + i, load(partial + i) + load(own + i));
    if (!ends) std::memcpy(partial, own, sizeof(float) * rows * width);
  };
  if (args.dquery.data) {
    add(s.dquery, ld, 0);
    if (ends)
      unpack_rows(s.dquery, ld, rows, args.head_dim, args.scale,
                  query_row<T>(args.dquery, task.sequence, task.head, first), args.dquery.row);
  }
  if (terms.dc2p.data) {
    add(s.dc2p, s.bucket_ld, task.sequence.queries * ld);
    if (ends)
      unpack_buckets(buckets, s.dc2p, s.bucket_ld, rows, args.scale, terms.width,
                     query_row<T>(terms.dc2p, task.sequence, task.head, first), terms.dc2p.row);
  }
  task.finished->store(first, std::memory_order_release);
}

template <class T>
void backward_segment(const AttentionArgs& args, const BackwardTask& task, const TermTables& tables,
                      const BackwardScratch& s) {
  const int64_t head_dim = args.head_dim, ld = round_up(head_dim, kLanes), keys = task.keys;
  const SequenceRange& sequence = task.sequence;
  const uint32_t sequence_head = static_cast<uint32_t>(sequence.index * args.heads + task.head);
  for (int64_t key = 0; key < keys; key += kBlock) {
    const int64_t count = std::min(kBlock, keys - key);
    const T* from = key_row<const T>(args.key, sequence, task.head, task.first_key + key);
    pack_rows(from, args.key.row, count, head_dim, 1.0f, s.key + key * ld, ld);
    pack_transposed(from, args.key.row, count, head_dim, s.key_t + key * head_dim);
    pack_transposed(key_row<const T>(args.value, sequence, task.head, task.first_key + key), args.value.row,
                    count, head_dim, s.value_t + key * head_dim);
  }
  std::memset(s.dkey, 0, sizeof(float) * keys * ld);
  std::memset(s.dvalue, 0, sizeof(float) * keys * ld);
  const AttentionTerms& terms = args.terms;
  if (terms.dbias) std::memset(s.diagonals, 0, sizeof(float) * tables.of_bias.span());
  if (terms.dp2c.data) std::memset(s.dp2c, 0, sizeof(float) * keys * s.bucket_ld);

  // Backwards, so that under causality, where later segments meet fewer queries, all segments start together.
  for (int64_t first = (sequence.queries + kBlock - 1) / kBlock * kBlock - kBlock; first >= 0;
       first -= kBlock) {
    const int64_t rows = std::min(kBlock, sequence.queries - first);
    const KeyRange seen = keys_seen(args, sequence, first, rows);
    if (task.first_key > 0 && seen.last <= task.first_key) break;  // sees none of it, nor do those before
    if (seen.first >= task.first_key + keys) continue;             // sees later ones alone
    load_queries<T>(args, task, first, rows, s);
    const int64_t begin = std::max<int64_t>(0, (seen.first - task.first_key) / kBlock * kBlock);
    for (int64_t key = begin; key < std::min(keys, seen.last - task.first_key); key += kBlock) {
      const int64_t position = task.first_key + key;
      if (args.dropout.active() && (position % kDropoutBlock == 0 || key == begin))
        draw_kept_bits(args.dropout, sequence, first, rows, position, sequence_head, s.kept);
      const Visible visible = visible_keys(args, sequence, first, position, std::min(kBlock, keys - key));
      Addend addend;
      if (!terms.any()) {
        backward_block<false>(args, s, rows, key, visible, position % kDropoutBlock, addend);
        continue;
      }
      const TermBlock block =
          term_block(args, tables, sequence, task.head, first, rows, position, visible.keys);
      make_addend<T>(block, s.weights, &addend);
      backward_block<true>(args, s, rows, key, visible, position % kDropoutBlock, addend);
      if (terms.dbias) add_diagonals(block, s.dscores, s.diagonals);
      if (terms.dc2p.data) add_dc2p(block, s.dscores, s.bucket_ld, s.dc2p);
      if (terms.dp2c.data) add_dp2c(block, s.dscores, s.bucket_ld, s.dp2c + key * s.bucket_ld);
    }
    store_queries<T>(args, task, tables.buckets, first, rows, seen, s);
  }

  if (args.dkey.data)
    unpack_rows(s.dkey, ld, keys, head_dim, 1.0f, key_row<T>(args.dkey, sequence, task.head, task.first_key),
                args.dkey.row);
  if (args.dvalue.data)
    unpack_rows(s.dvalue, ld, keys, head_dim, args.dropout.scale,
                key_row<T>(args.dvalue, sequence, task.head, task.first_key), args.dvalue.row);
  if (terms.dp2c.data)
    unpack_buckets(tables.buckets, s.dp2c, s.bucket_ld, keys, args.scale, terms.width,
                   key_row<T>(terms.dp2c, sequence, task.head, task.first_key), terms.dp2c.row);
  if (terms.dbias) {
    std::memset(task.dbias, 0, sizeof(float) * (2 * tables.of_bias.reach + 1));
    for (int64_t i = 0; i < tables.of_bias.span(); ++i) task.dbias[tables.of_bias.entry(i)] += s.diagonals[i];
  }
}

// The bias's gradient: the tasks' shares, in the order of the tasks.
inline void sum_dbias(const AttentionArgs& args, const std::vector<BackwardTask>& tasks, int64_t reach) {
  const int64_t entries = 2 * args.terms.bias_reach + 1;
  parallel_for(args.heads, 1, [&](int64_t begin, int64_t end) FT_LAMBDA {
    std::memset(args.terms.dbias + begin * entries, 0, sizeof(float) * (end - begin) * entries);
    for (const BackwardTask& task : tasks) {
      if (task.head < begin || task.head >= end) continue;
      float* to = args.terms.dbias + task.head * entries + args.terms.bias_reach - reach;
      for (int64_t i = 0; i <= 2 * reach; ++i) to[i] += task.dbias[i];
    }
  });
}

void attention_backward(const AttentionArgs& args) {
  const TermTables tables(args);
  // Of a query's sums over segments: its row of dQ and of dc2p.
  const int64_t partial_width =
      round_up(args.head_dim, kLanes) + (args.terms.dc2p.data ? round_up(tables.buckets.count, kLanes) : 0);
  const int64_t longest_segment = 32768 / round_up(args.head_dim, 64) / kDropoutBlock * kDropoutBlock;
  int64_t longest = 0, segments = 0, partial_rows = 0;
  for (int64_t n = 0; n < args.sequences; ++n) {
    const SequenceRange sequence = sequence_range(args, n);
    longest = std::max(longest, sequence.keys);
    const int64_t count = std::max<int64_t>(1, (sequence.keys + longest_segment - 1) / longest_segment);
    segments += count * args.heads;
    if (count > 1) partial_rows += sequence.queries * args.heads;
  }
  const int64_t segment = std::min(longest_segment, round_up(longest, kBlock));

  const int64_t dbias_entries = args.terms.dbias ? 2 * tables.of_bias.reach + 1 : 0;
  const Scratch<float> dbias(static_cast<size_t>(segments * dbias_entries));
  const Scratch<float> partial(static_cast<size_t>(partial_rows * partial_width));
  std::vector<std::atomic<int64_t>> progress(static_cast<size_t>(segments));
  std::vector<BackwardTask> tasks;
  tasks.reserve(static_cast<size_t>(segments));
  float* next_partial = partial.get();
  for (int64_t n = 0; n < args.sequences; ++n) {
    const SequenceRange sequence = sequence_range(args, n);
    for (int64_t head = 0; head < args.heads; ++head) {
      const bool split = sequence.keys > segment;
      int64_t key = 0;
      do {
        const int64_t keys = std::min(segment, sequence.keys - key);
        std::atomic<int64_t>* own = &progress[tasks.size()];
        own->store(std::numeric_limits<int64_t>::max(), std::memory_order_relaxed);
        float* own_dbias = dbias_entries ? dbias.get() + tasks.size() * dbias_entries : nullptr;
        tasks.push_back({sequence, head, key, keys, split ? next_partial : nullptr, own, own_dbias});
        key += keys;
      } while (key < sequence.keys);
      if (split) next_partial += sequence.queries * partial_width;
    }
  }
  BackwardScratch scratch;
  const int64_t floats = carve(args, segment, tables, nullptr, &scratch);
  parallel_tasks(static_cast<int64_t>(tasks.size()), floats, [&](int64_t i, float* memory) FT_LAMBDA {
    BackwardScratch own;
    carve(args, segment, tables, memory, &own);
    FASTTUNE_WITH_DTYPE(args.dtype, T, backward_segment<T>(args, tasks[i], tables, own));
  });
  if (dbias_entries) sum_dbias(args, tasks, tables.of_bias.reach);
}

#include "cpu/simd/end.h"
