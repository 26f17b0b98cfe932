// out[n, v] = max over the tokens t of sequence n of x_t . w_v + b_v, and its gradients. x_t . w_v comes from
// the vendor's product, a block of rows and classes at a time; T x V logits never exist.
//
// Let t(n, v) be the first token that attains the maximum and g = dL/dout. As only that token's logit moves
// out[n, v],
//
//     db_v = sum_n g[n, v]
//     dw_v = sum_n g[n, v] x_t(n, v)
//     dx_t = sum over (n, v) with t(n, v) = t of g[n, v] w_v:
//
// products with a matrix that has one number for each (n, v), not one for each (t, v): 2 N V C multiply-adds
// at most where those with the logits' dense gradient take 2 T V C, and a (n, v) with g = 0 costs none.
// SPLADE's relu makes most of them 0.
//
// Maximum: each logit is read once, from the caches that the product left it in; add, compare and two
// selects, against 2 C operations in the product. A task is a sequence and a strip of four vectors of
// classes: maxima, tokens and bias then stay in registers while the rows go by. Rows are counted in float
// lanes from the block's first, which is exact below 2^24.
//
// Gradients: multiply-adds with one load each, so what counts is where the loads come from. dw: a task is the
// 16 classes that share a cache line of g and t, which are so read once. Rows of x are gathered, whole and
// four at a time: four streams that the prefetcher follows, and the sum is loaded and stored once for four
// products. N V C elements of x at most, mostly from L2 and L3 (x is T C), and V C of dw written once. dx: a
// task is 256 columns of a group of sequences. The classes go by in chunks whose columns of w (kChunk x 256)
// stay in L2 while each sequence takes what it needs of them, so w is streamed once a group, not once a
// sequence; there are no more groups than keep the threads busy. In a chunk the classes of a sequence are
// grouped by token (a counting sort, so in order), that dx_t is loaded and stored once a chunk and not for
// each product.
//
// Sums are taken in fp32 in two levels (64 terms of dw, a chunk of dx), as a product by blocks would, for a
// token may win most of the vocabulary; db in fp64. The order of every sum is that of n or v alone: no bit
// depends on the threads.
#include "cpu/linear_max.h"

#include <type_traits>

#include "cpu/simd/begin.h"
#include "cpu/simd/rows.inc"

constexpr int kStrip = 4;  // vectors
constexpr int64_t kClassBlock = 16, kTermsPerFold = 64, kChunk = 256, kColumnBlock = 256;

// Rows [0, rows) of a sequence, `values` the first; it `begins` there unless earlier calls have seen some of
// it.
template <int kVectors, class T, class Lanes>
FT_INLINE void update(const T* values, int64_t stride, int64_t rows, bool begins, const float* bias,
                      float* best, int32_t* token, int64_t first_token, int64_t columns, Lanes lanes) {
  F shift[kVectors], top[kVectors],
      at[kVectors];  // at: the row, or -1 while the earlier rows' maximum stands
  for (int i = 0; i < kVectors; ++i) {
    shift[i] = bias ? load(bias + i * kLanes, lanes) : zero();
    top[i] = begins ? load(values + i * kLanes, lanes) + shift[i] : load(best + i * kLanes, lanes);
    at[i] = begins ? zero() : set1(-1.0f);
  }
  for (int64_t row = begins ? 1 : 0; row < rows; ++row) {
    const T* line = values + row * stride;
    const F number = set1(static_cast<float>(row));
    for (int i = 0; i < kVectors; ++i) {
      const F value = load(line + i * kLanes, lanes) + shift[i];
      const M higher = exceeds(value, top[i]);
      top[i] = select(higher, value, top[i]);
      at[i] = select(higher, number, at[i]);
    }
  }
  float numbers[kVectors * kLanes];
  for (int i = 0; i < kVectors; ++i) {
    store(best + i * kLanes, top[i], lanes);
    store(numbers + i * kLanes, at[i]);
  }
  for (int64_t i = 0; i < columns; ++i)
    if (numbers[i] >= 0.0f) token[i] = static_cast<int32_t>(first_token + static_cast<int64_t>(numbers[i]));
}

template <class T>
void update_strip(const LinearMaxArgs& args, int64_t sequence, int64_t column) {
  const int64_t begin = std::max(args.offsets[sequence], args.first_row),
                end = std::min(args.offsets[sequence + 1], args.first_row + args.rows);
  if (begin >= end) return;
  const bool begins = args.offsets[sequence] >= args.first_row;
  const int64_t last = std::min(args.classes, column + kStrip * kLanes);
  const T* values = static_cast<const T*>(args.logits) + (begin - args.first_row) * args.logits_stride;
  float* best = args.best + sequence * args.best_stride;
  int32_t* token = args.token + sequence * args.token_stride;
  const auto run = [&](auto vectors, auto lanes, int64_t columns) FT_BODY {
    update<decltype(vectors)::value>(values + column, args.logits_stride, end - begin, begins,
                                     args.bias ? args.bias + column : nullptr, best + column, token + column,
                                     begin, columns, lanes);
  };
  if (column + kStrip * kLanes <= last) {
    run(std::integral_constant<int, kStrip>{}, AllLanes{}, kStrip * kLanes);
    return;
  }
  for (; column + kLanes <= last; column += kLanes)
    run(std::integral_constant<int, 1>{}, AllLanes{}, static_cast<int64_t>(kLanes));
  if (column < last) run(std::integral_constant<int, 1>{}, FirstLanes{last - column}, last - column);
}

void linear_max(const LinearMaxArgs& args) {
  const int64_t strips = (args.classes + kStrip * kLanes - 1) / (kStrip * kLanes);
  parallel_tasks(args.sequences * strips, [&](int64_t task) FT_LAMBDA {
    const int64_t sequence = task / strips, column = task % strips * kStrip * kLanes;
    FASTTUNE_WITH_DTYPE(args.dtype, T, update_strip<T>(args, sequence, column));
  });
}

// A row of the source, and what it is multiplied with.
struct Term {
  int32_t row;
  float factor;
};

// to = from + the sum of kTerms products, without `from` if it is null; to += that where Add.
template <int kTerms, bool Add, class T>
FT_INLINE void add_some(const Term* terms, const T* source, int64_t stride, int64_t columns,
                        const float* from, float* to) {
  const T* rows[kTerms];
  F factors[kTerms];
  for (int k = 0; k < kTerms; ++k) {
    rows[k] = source + terms[k].row * stride;
    factors[k] = set1(terms[k].factor);
  }
  for_each_vector(0, columns, [&](int64_t i, auto lanes) FT_BODY {
    F sum = from ? load(from + i, lanes) : zero();
    for (int k = 0; k < kTerms; ++k) sum = fma(factors[k], load(rows[k] + i, lanes), sum);
    store(to + i, Add ? load(to + i, lanes) + sum : sum, lanes);
  });
}

// total += the sum of factor * source[row] over the terms, in their order, kTermsPerFold at a time through
// `fresh`.
template <class T>
void add_terms(const Term* terms, int64_t count, const T* source, int64_t stride, int64_t columns,
               float* fresh, float* total) {
  for (int64_t k = 0; k < count;) {
    const float* from = k % kTermsPerFold ? fresh : nullptr;
    const int64_t left = std::min(count - k, kTermsPerFold - k % kTermsPerFold);
    if (left > 4) {
      add_some<4, false>(terms + k, source, stride, columns, from, fresh);
      k += 4;
      continue;
    }
    if (left == 4) add_some<4, true>(terms + k, source, stride, columns, from, total);
    if (left == 3) add_some<3, true>(terms + k, source, stride, columns, from, total);
    if (left == 2) add_some<2, true>(terms + k, source, stride, columns, from, total);
    if (left == 1) add_some<1, true>(terms + k, source, stride, columns, from, total);
    k += left;
  }
}

template <class X, class W>
void weight_gradient(const LinearMaxGradientArgs& args, int64_t first, Term* terms, float* fresh,
                     float* total) {
  const int64_t last = std::min(args.classes, first + kClassBlock);
  int64_t counts[kClassBlock] = {};
  double sums[kClassBlock] = {};
  for (int64_t n = 0; n < args.sequences; ++n) {
    const float* g = args.dout + n * args.classes;
    const int32_t* token = args.token + n * args.classes;
    for (int64_t v = first; v < last; ++v) {
      if (g[v] == 0.0f || token[v] < 0 || token[v] >= args.rows) continue;
      const int64_t i = v - first;
      terms[i * args.sequences + counts[i]++] = {token[v], g[v]};
      sums[i] += g[v];
    }
  }
  for (int64_t v = first; v < last; ++v) {
    if (args.dbias) args.dbias[v] = static_cast<float>(sums[v - first]);
    if (!args.dweight) continue;
    std::memset(total, 0, args.features * sizeof(float));
    add_terms(terms + (v - first) * args.sequences, counts[v - first], static_cast<const X*>(args.input),
              args.input_stride, args.features, fresh, total);
    W* out = static_cast<W*>(args.dweight) + v * args.features;
    for_each_vector(0, args.features,
                    [&](int64_t i, auto lanes) FT_BODY { store(out + i, load(total + i, lanes), lanes); });
  }
}

void linear_max_weight_gradient(const LinearMaxGradientArgs& args) {
  const int64_t blocks = (args.classes + kClassBlock - 1) / kClassBlock;
  const int64_t line = (args.features + 15) / 16 * 16;
  parallel_tasks(blocks, 2 * line, [&](int64_t block, float* lines) FT_LAMBDA {
    const Scratch<Term> terms(static_cast<size_t>(kClassBlock * args.sequences));
    FASTTUNE_WITH_DTYPE(args.input_dtype, X, {
      FASTTUNE_WITH_DTYPE(args.weight_dtype, W,
                          weight_gradient<X, W>(args, block * kClassBlock, terms.get(), lines, lines + line));
    });
  });
}

// Columns [column, column + width) of dx in one sequence, from the classes [first, last).
template <class W>
void input_gradient(const LinearMaxGradientArgs& args, int64_t sequence, int64_t first, int64_t last,
                    int64_t column, int64_t width, float* fresh) {
  const int64_t begin = args.offsets[sequence], length = args.offsets[sequence + 1] - begin;
  const float* g = args.dout + sequence * args.classes;
  const int32_t* token = args.token + sequence * args.classes;
  const auto counts = [&](int64_t v) FT_BODY {
    return g[v] != 0.0f && static_cast<uint64_t>(token[v] - begin) < static_cast<uint64_t>(length);
  };
  // ends[t]: after the terms of token t; filled from behind, so that it becomes where they start.
  const Scratch<int32_t> ends(static_cast<size_t>(length + 1));
  std::memset(ends.get(), 0, (length + 1) * sizeof(int32_t));
  for (int64_t v = first; v < last; ++v)
    if (counts(v)) ++ends[token[v] - begin];
  for (int64_t t = 1; t <= length; ++t) ends[t] += ends[t - 1];
  Term terms[kChunk];
  for (int64_t v = last - 1; v >= first; --v)
    if (counts(v)) terms[--ends[token[v] - begin]] = {static_cast<int32_t>(v), g[v]};
  const W* weight = static_cast<const W*>(args.weight) + column;
  for (int64_t t = 0; t < length; ++t) {
    const int64_t start = ends[t], count = ends[t + 1] - start;
    if (count)
      add_terms(terms + start, count, weight, args.weight_stride, width, fresh,
                args.dinput + (begin + t) * args.features + column);
  }
}

void linear_max_input_gradient(const LinearMaxGradientArgs& args) {
  // Just so many groups of sequences as keep the threads busy; the grouping changes no bit.
  const int64_t pieces = (args.features + kColumnBlock - 1) / kColumnBlock;
  const int64_t wanted = (2 * num_threads() + pieces - 1) / std::max<int64_t>(1, pieces);
  const int64_t group = std::max<int64_t>(1, (args.sequences + wanted - 1) / wanted);
  const int64_t groups = (args.sequences + group - 1) / group;
  parallel_tasks(groups * pieces, kColumnBlock, [&](int64_t task, float* fresh) FT_LAMBDA {
    const int64_t column = task % pieces * kColumnBlock,
                  width = std::min(kColumnBlock, args.features - column);
    const int64_t begin = task / pieces * group, end = std::min(args.sequences, begin + group);
    for (int64_t first = 0; first < args.classes; first += kChunk) {
      const int64_t last = std::min(args.classes, first + kChunk);
      for (int64_t sequence = begin; sequence < end; ++sequence) {
        FASTTUNE_WITH_DTYPE(args.weight_dtype, W,
                            input_gradient<W>(args, sequence, first, last, column, width, fresh));
      }
    }
  });
}

#include "cpu/simd/end.h"
