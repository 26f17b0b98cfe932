// Runs every kernel of csrc/cuda once through the C ABI, on buffers of exactly the right size, and prints for
// each case a hash of all outputs and how many of them are NaN. Builds of this program differ in what they
// can see: race conditions (ThreadSanitizer, one OS thread per CUDA thread), accesses out of bounds and
// undefined behaviour (AddressSanitizer, UndefinedBehaviorSanitizer), dependence on the order of threads
// (--order). Since kernels are deterministic, all of them have to print the same.
//
//   drive [--case PREFIX] [--order N] [--bug N]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "cuda/device.cuh"
#include "cuda/vector.cuh"

namespace {

using namespace fasttune::cuda;

const char* only = "";
uint32_t noise = 1;

float next() {  // in [-1, 1)
  noise = noise * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(noise)) / 2147483648.0f;
}

size_t element_size(int dtype) { return dtype == FASTTUNE_F32 ? 4 : 2; }

// malloc'ed to the byte, so that AddressSanitizer sees the first access beyond it.
class Buffer {
 public:
  Buffer(int dtype, int64_t count) : dtype_(dtype), count_(count), data_(std::malloc(bytes()), &std::free) {
    std::memset(data_.get(), 0xff, bytes());
  }

  Buffer& random(float scale = 1.0f) {
    for (int64_t i = 0; i < count_; ++i) set(i, scale * next());
    return *this;
  }

  void set(int64_t i, float value) {
    if (dtype_ == FASTTUNE_F32) static_cast<float*>(data())[i] = value;
    if (dtype_ == FASTTUNE_BF16) static_cast<__nv_bfloat16*>(data())[i] = from_float<__nv_bfloat16>(value);
    if (dtype_ == FASTTUNE_F16) static_cast<__half*>(data())[i] = from_float<__half>(value);
  }

  float get(int64_t i) const {
    if (dtype_ == FASTTUNE_F32) return static_cast<const float*>(data_.get())[i];
    if (dtype_ == FASTTUNE_BF16) return to_float(static_cast<const __nv_bfloat16*>(data_.get())[i]);
    return to_float(static_cast<const __half*>(data_.get())[i]);
  }

  void* data() const { return data_.get(); }
  float* floats() const { return static_cast<float*>(data_.get()); }
  int64_t count() const { return count_; }
  size_t bytes() const { return element_size(dtype_) * static_cast<size_t>(count_); }

 private:
  int dtype_;
  int64_t count_;
  std::unique_ptr<void, decltype(&std::free)> data_;
};

void check(const char* problem) {
  if (!problem) return;
  std::printf("a kernel did not start: %s\n", problem);
  std::exit(1);
}

void print(const std::string& name, std::initializer_list<const Buffer*> outputs) {
  uint64_t hash = 1469598103934665603ull;
  int64_t nans = 0;
  for (const Buffer* output : outputs) {
    const auto* bytes = static_cast<const unsigned char*>(output->data());
    for (size_t i = 0; i < output->bytes(); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
    for (int64_t i = 0; i < output->count(); ++i) nans += output->get(i) != output->get(i);
  }
  std::printf("%s %016llx nan=%lld\n", name.c_str(), static_cast<unsigned long long>(hash),
              static_cast<long long>(nans));
}

// Whether to run the case; its inputs do not depend on which others run.
bool wanted(const std::string& name) {
  noise = 1;
  for (char letter : name) noise = noise * 31u + static_cast<unsigned char>(letter);
  return name.rfind(only, 0) == 0;
}

const char* dtype_name(int dtype) {
  return dtype == FASTTUNE_F32 ? "f32" : dtype == FASTTUNE_BF16 ? "bf16" : "f16";
}

std::string label(const char* operation, int dtype, int64_t size) {
  return std::string(dtype_name(dtype)) + "/" + operation + "/" + std::to_string(size);
}

constexpr int64_t kSeed = -987654321012345;

fasttune_dropout_options dropout_options(const int64_t* row_ids = nullptr) {
  return {&kSeed, row_ids, 13107, 65536.0f / (65536 - 13107)};
}

void dropout(int dtype, int64_t columns) {
  const std::string name = label("dropout", dtype, columns);
  if (!wanted(name)) return;
  const int64_t rows = 35;
  Buffer x(dtype, rows * columns), residual(dtype, rows * columns), out(dtype, rows * columns);
  x.random();
  residual.random();
  const fasttune_dropout_args args{dtype, x.data(), residual.data(),  out.data(),
                                   rows,  columns,  dropout_options()};
  check(fasttune_cuda_dropout(&args, nullptr));
  print(name, {&out});
}

// Gated: x and the gate are the halves of one tensor, their gradients of another.
void activation(const char* kind, int number, int dtype, int64_t columns, bool gated) {
  const std::string name = label(kind, dtype, columns);
  if (!wanted(name)) return;
  const int64_t rows = 37, wide = gated ? 2 * columns : columns;
  Buffer x(dtype, rows * wide), bias(dtype, wide), out(dtype, rows * columns), dout(dtype, rows * columns),
      dx(dtype, rows * wide), dbias(dtype, wide);
  x.random(3.0f);
  bias.random();
  dout.random();
  const auto half = [&](Buffer& whole) -> void* {
    return gated ? static_cast<char*>(whole.data()) + columns * (dtype == FASTTUNE_F32 ? 4 : 2) : nullptr;
  };
  const fasttune_activation_args args{dtype,      dtype, number,  x.data(), half(x), bias.data(),
                                      out.data(), rows,  columns, wide,     wide};
  check(fasttune_cuda_activation(&args, nullptr));
  const int64_t partials = fasttune_cuda_activation_partials(rows, columns, 3);
  Buffer partial(FASTTUNE_F32, partials * wide);
  const fasttune_activation_backward_args backward{
      dtype,     dtype,    number,       dout.data(),      x.data(), half(x), bias.data(),
      dx.data(), half(dx), dbias.data(), partial.floats(), partials, rows,    columns,
      wide,      wide,     wide};
  check(fasttune_cuda_activation_backward(&backward, nullptr));
  print(name, {&out, &dx, &dbias});
}

using LayerNorm = const char* (*)(const fasttune_layer_norm_args*, void*);
using LayerNormBackward = const char* (*)(const fasttune_layer_norm_backward_args*, void*);

void layer_norm(const char* operation, LayerNorm forward, LayerNormBackward backward, int dtype, int64_t rows,
                int64_t columns, bool fused) {
  const std::string name = label(operation, dtype, columns);
  if (!wanted(name)) return;
  Buffer x(dtype, rows * columns), residual(dtype, rows * columns), weight(dtype, columns),
      bias(dtype, columns), out(dtype, rows * columns), sum(dtype, rows * columns),
      statistics(FASTTUNE_F32, 2 * rows), dout(dtype, rows * columns), dsum(dtype, rows * columns),
      dx(dtype, rows * columns), dresidual(dtype, rows * columns), dweight(dtype, columns),
      dbias(dtype, columns);
  x.random();
  residual.random();
  weight.random();
  bias.random();
  dout.random();
  dsum.random();
  fasttune_layer_norm_args args{};
  args.dtype = args.x_dtype = args.weight_dtype = args.bias_dtype = dtype;
  args.x = x.data();
  args.weight = weight.data();
  args.bias = bias.data();
  args.out = out.data();
  args.statistics = statistics.floats();
  args.rows = rows;
  args.columns = columns;
  args.eps = 1e-5f;
  args.gelu = FASTTUNE_GELU_ERF;
  if (fused) {
    args.residual = residual.data();
    args.sum = sum.data();
    args.dropout = dropout_options();
  }
  check(forward(&args, nullptr));
  const int64_t partials = fasttune_cuda_layer_norm_partials(rows, columns, 1);
  Buffer dweight_partial(FASTTUNE_F32, partials * columns), dbias_partial(FASTTUNE_F32, partials * columns);
  fasttune_layer_norm_backward_args gradients{};
  gradients.dtype = gradients.x_dtype = gradients.weight_dtype = gradients.bias_dtype = dtype;
  gradients.dout = dout.data();
  gradients.input = fused ? sum.data() : x.data();
  gradients.weight = weight.data();
  gradients.bias = bias.data();
  gradients.statistics = statistics.floats();
  gradients.dx = dx.data();
  gradients.dweight = dweight.data();
  gradients.dbias = dbias.data();
  gradients.dweight_partial = dweight_partial.floats();
  gradients.dbias_partial = dbias_partial.floats();
  gradients.partials = partials;
  gradients.rows = rows;
  gradients.columns = columns;
  gradients.gelu = FASTTUNE_GELU_ERF;
  if (fused) {
    gradients.dsum = dsum.data();
    gradients.dresidual = dresidual.data();
    gradients.dropout = dropout_options();
  }
  check(backward(&gradients, nullptr));
  if (fused)
    print(name, {&out, &sum, &statistics, &dx, &dresidual, &dweight, &dbias});
  else
    print(name, {&out, &statistics, &dx, &dweight, &dbias});
}

void cross_entropy(int dtype, int64_t classes) {
  const std::string name = label("cross_entropy", dtype, classes);
  if (!wanted(name)) return;
  const int64_t rows = 4, labels[] = {classes - 1, -100, 0, classes / 2};
  Buffer logits(dtype, rows * classes), weight(FASTTUNE_F32, classes), loss(FASTTUNE_F32, rows),
      statistics(FASTTUNE_F32, 2 * rows), loss_sum(FASTTUNE_F32, 1), total(FASTTUNE_F32, 1),
      one(FASTTUNE_F32, 1), weight_sum(FASTTUNE_F32, 1);
  logits.random(5.0f);
  float sum = 0.0f;
  for (int64_t i = 0; i < classes; ++i) {
    weight.set(i, 1.5f + next());
    sum += weight.get(i);
  }
  weight_sum.set(0, sum);
  one.set(0, 1.0f);
  const fasttune_cross_entropy_args args{
      dtype, rows, classes,       logits.data(),       classes,           labels,        weight.floats(),
      -100,  0.1f, loss.floats(), statistics.floats(), loss_sum.floats(), total.floats()};
  check(fasttune_cuda_cross_entropy(&args, nullptr));
  const fasttune_cross_entropy_backward_args backward{dtype,
                                                      rows,
                                                      classes,
                                                      logits.data(),
                                                      classes,
                                                      labels,
                                                      weight.floats(),
                                                      weight_sum.floats(),
                                                      -100,
                                                      0.1f,
                                                      statistics.floats(),
                                                      one.floats(),
                                                      0,
                                                      total.floats(),
                                                      logits.data(),  // in place
                                                      classes};
  check(fasttune_cuda_cross_entropy_backward(&backward, nullptr));
  print(name, {&loss, &statistics, &loss_sum, &total, &logits});
}

void log_prob(int dtype, int64_t classes) {
  const std::string name = label("log_prob", dtype, classes);
  if (!wanted(name)) return;
  const int64_t rows = 4, ids[] = {classes - 1, -100, 0, classes / 2};
  Buffer logits(dtype, rows * classes), bias(FASTTUNE_F32, classes), statistics(FASTTUNE_F32, 3 * rows),
      upstream(FASTTUNE_F32, rows), divisor(FASTTUNE_F32, 1);
  Buffer found[] = {{FASTTUNE_F32, rows}, {FASTTUNE_F32, rows}, {FASTTUNE_F32, rows}, {FASTTUNE_F32, rows}};
  int64_t top1[rows];
  logits.random(5.0f);
  bias.random();
  upstream.random();
  divisor.set(0, 0.75f);
  const fasttune_log_prob_args args{dtype,
                                    rows,
                                    classes,
                                    logits.data(),
                                    classes,
                                    bias.floats(),
                                    0.5f,
                                    ids,
                                    -100,
                                    found[0].floats(),
                                    found[1].floats(),
                                    found[2].floats(),
                                    found[3].floats(),
                                    top1,
                                    statistics.floats()};
  check(fasttune_cuda_log_prob(&args, nullptr));
  const fasttune_log_prob_backward_args backward{dtype,
                                                 rows,
                                                 classes,
                                                 logits.data(),
                                                 classes,
                                                 bias.floats(),
                                                 0.5f,
                                                 0.5f,
                                                 ids,
                                                 -100,
                                                 statistics.floats(),
                                                 upstream.floats(),
                                                 found[0].floats(),
                                                 upstream.floats(),
                                                 found[2].floats(),
                                                 divisor.floats()};
  check(fasttune_cuda_log_prob_backward(&backward, nullptr));
  print(name, {&found[0], &found[1], &found[2], &found[3], &statistics, &logits});
}

// Two parts of three are turned, of rows that are not next to each other, by tables' rows in no order.
void rotary(int dtype, int64_t head_dim, int64_t width, int table_dtype) {
  const std::string name = label("rotary", dtype, head_dim);
  if (!wanted(name)) return;
  const int64_t rows = 9, parts = 3, heads = 5, positions = 7, gap = 8;
  const int64_t row_stride = parts * heads * head_dim + gap;
  const int64_t ids[rows] = {0, 6, 2, 2, 5, 1, 0, 3, 4};
  Buffer x(dtype, rows * row_stride - gap), out(dtype, rows * parts * heads * head_dim),
      dx(dtype, out.count()), cos(table_dtype, positions * width), sin(table_dtype, positions * width);
  x.random();
  cos.random();
  sin.random();
  fasttune_rotary_args args{};
  args.dtype = dtype;
  args.table_dtype = table_dtype;
  args.x = x.data();
  args.out = out.data();
  args.cos = cos.data();
  args.sin = sin.data();
  args.row_ids = ids;
  args.batch = 1;
  args.sequence = rows;
  args.parts = parts;
  args.heads = heads;
  args.head_dim = head_dim;
  args.batch_stride = rows * row_stride;
  args.row_stride = row_stride;
  args.part_stride = heads * head_dim;
  args.head_stride = head_dim;
  args.table_rows = positions;
  args.width = width;
  args.rotated = 2;
  check(fasttune_cuda_rotary(&args, nullptr));
  args.x = out.data();
  args.out = dx.data();
  args.row_stride = parts * heads * head_dim;
  args.inverse = 1;
  check(fasttune_cuda_rotary(&args, nullptr));
  print(name, {&out, &dx});
}

// All terms of a dense call, by buckets that come in order, but for the last. One row of partial sums: a
// block takes several tiles of queries.
struct AttentionTerms {
  static constexpr int64_t kWidth = 9, kFurthest = 20, kDistances = 2 * kFurthest + 1;
  Buffer bias, dbias, partial, c2p, dc2p, p2c, dp2c;
  int32_t buckets[kDistances] = {};

  explicit AttentionTerms(fasttune_attention_args& args)
      : bias(FASTTUNE_F32, args.heads * kDistances),
        dbias(FASTTUNE_F32, args.heads * kDistances),
        partial(FASTTUNE_F32, args.heads * kDistances),
        c2p(args.dtype, args.sequences * args.queries * args.heads * kWidth),
        dc2p(args.dtype, c2p.count()),
        p2c(args.dtype, args.sequences * args.keys * args.heads * kWidth),
        dp2c(args.dtype, p2c.count()) {
    const auto rows_of = [&](const Buffer& buffer, int64_t rows) {
      const int64_t width = args.heads * kWidth;
      return fasttune_head_rows{buffer.data(), rows * width, width, kWidth};
    };
    for (int64_t i = 0; i < kDistances - 1; ++i) buckets[i] = static_cast<int32_t>(i * kWidth / kDistances);
    bias.random();
    c2p.random(2.0f);
    p2c.random(2.0f);
    std::memset(dc2p.data(), 0, dc2p.bytes());
    std::memset(dp2c.data(), 0, dp2c.bytes());
    args.bias = bias.floats();
    args.bias_furthest = args.buckets_furthest = kFurthest;
    args.buckets = buckets;
    args.c2p = rows_of(c2p, args.queries);
    args.p2c = rows_of(p2c, args.keys);
    args.dbias = dbias.floats();
    args.dbias_partial = partial.floats();
    args.partials = 1;
    args.dc2p = rows_of(dc2p, args.queries);
    args.dp2c = rows_of(dp2c, args.keys);
  }
};

void attention(const char* operation, int dtype, int64_t sequences, int64_t queries, int64_t keys,
               int64_t heads, int64_t head_dim, std::vector<int> offsets, std::vector<int> query_offsets = {},
               std::vector<int> positions = {}, int window = -1, bool with_terms = false) {
  const std::string name = label(operation, dtype, head_dim);
  if (!wanted(name)) return;
  const int64_t width = heads * head_dim;
  const auto rows_of = [&](const Buffer& buffer, int64_t rows) {
    return fasttune_head_rows{buffer.data(), offsets.empty() ? rows * width : 0, width, head_dim};
  };
  const int64_t batch = offsets.empty() ? sequences : 1;
  Buffer query(dtype, batch * queries * width), key(dtype, batch * keys * width),
      value(dtype, batch * keys * width), out(dtype, batch * queries * width),
      lse(FASTTUNE_F32, batch * heads * queries), delta(FASTTUNE_F32, batch * heads * queries),
      dout(dtype, batch * queries * width), dquery(dtype, batch * queries * width),
      dkey(dtype, batch * keys * width), dvalue(dtype, batch * keys * width);
  query.random(2.0f);
  key.random(2.0f);
  value.random();
  dout.random();
  fasttune_attention_args args{};
  args.dtype = dtype;
  args.sequences = sequences;
  args.queries = queries;
  args.keys = keys;
  args.heads = heads;
  args.head_dim = head_dim;
  args.offsets = offsets.empty() ? nullptr : offsets.data();
  args.query_offsets = query_offsets.empty() ? nullptr : query_offsets.data();
  args.positions = positions.empty() ? nullptr : positions.data();
  args.causal = 1;
  args.window = window;
  args.scale = 0.3f;
  args.dropout = dropout_options();
  args.query = rows_of(query, queries);
  args.key = rows_of(key, keys);
  args.value = rows_of(value, keys);
  args.out = rows_of(out, queries);
  args.lse = lse.floats();
  args.dout = rows_of(dout, queries);
  args.dquery = rows_of(dquery, queries);
  args.dkey = rows_of(dkey, keys);
  args.dvalue = rows_of(dvalue, keys);
  args.delta = delta.floats();
  std::unique_ptr<AttentionTerms> terms;
  if (with_terms) terms = std::make_unique<AttentionTerms>(args);
  check(fasttune_cuda_attention_forward(&args, nullptr));
  check(fasttune_cuda_attention_backward(&args, nullptr));
  if (terms)
    print(name, {&out, &dquery, &dkey, &dvalue, &terms->dbias, &terms->dc2p, &terms->dp2c});
  else
    print(name, {&out, &lse, &delta, &dquery, &dkey, &dvalue});
}

}  // namespace

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (int i = 1; i + 1 < count; i += 2) {
    if (!std::strcmp(arguments[i], "--case")) only = arguments[i + 1];
    if (!std::strcmp(arguments[i], "--order")) host::order = std::atoi(arguments[i + 1]);
    if (!std::strcmp(arguments[i], "--bug")) host::seeded_bug = std::atoi(arguments[i + 1]);
  }
  for (int dtype : {FASTTUNE_F32, FASTTUNE_BF16, FASTTUNE_F16}) {
    dropout(dtype, 261);
    dropout(dtype, 512);
    for (int64_t columns : {261, 264}) {
      activation("bias_gelu", FASTTUNE_GELU_ERF, dtype, columns, false);
      activation("gated_gelu", FASTTUNE_GELU_TANH, dtype, columns, true);
      activation("gated_silu", FASTTUNE_SILU, dtype, columns, true);
    }
    // One warp a row and four rows a block, two and two, three and one, sixteen warps with several chunks.
    for (int64_t columns : {200, 301, 520}) {
      layer_norm("layer_norm", fasttune_cuda_layer_norm, fasttune_cuda_layer_norm_backward, dtype, 11,
                 columns, true);
      layer_norm("layer_norm_gelu", fasttune_cuda_layer_norm_gelu, fasttune_cuda_layer_norm_gelu_backward,
                 dtype, 11, columns, false);
      layer_norm("gelu_layer_norm", fasttune_cuda_gelu_layer_norm, fasttune_cuda_gelu_layer_norm_backward,
                 dtype, 11, columns, false);
    }
    layer_norm("layer_norm_wide", fasttune_cuda_layer_norm, fasttune_cuda_layer_norm_backward, dtype, 2, 4104,
               true);
    cross_entropy(dtype, 3);
    cross_entropy(dtype, 5003);
    log_prob(dtype, 3);
    log_prob(dtype, 5003);
    rotary(dtype, 64, 64, FASTTUNE_F32);
    rotary(dtype, 37, 22, dtype);
    attention("attention", dtype, 1, 70, 100, 1, 40, {});
    attention("attention_packed", dtype, 4, 110, 110, 1, 72, {0, 20, 20, 85, 110});
    attention("attention_chosen", dtype, 4, 6, 110, 1, 24, {0, 20, 20, 85, 110}, {0, 1, 1, 5, 6},
              {19, 0, 30, 31, 64, 3});
    attention("attention_window", dtype, 1, 150, 150, 1, 24, {}, {}, {}, 9);
    attention("attention_terms", dtype, 1, 70, 80, 1, 24, {}, {}, {}, -1, true);
  }
  return 0;
}
