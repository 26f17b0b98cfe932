// The Python face of the CUDA library: each function takes addresses as integers, sizes and options, in the
// order of the CPU library's (csrc/cpu/bindings) where it has a counterpart, then the stream; fills an
// argument struct and calls the C ABI with the GIL released. Checks live in Python (fasttune/ops). Needs no
// CUDA header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/api.h"

#ifndef FASTTUNE_CUDA_MODULE
#define FASTTUNE_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

namespace fasttune::cuda {
void bind_host(py::module_& module);  // tests/cuda_host

namespace {

using Address = uintptr_t;               // 0 stands for a tensor that is not there
using Rows = std::array<int64_t, 4>;     // address and strides of sequence, row and head
using Offsets = std::array<Address, 3>;  // cu_seqlens, cu_seqlens_q, positions_q

// Terms of attention's scores: bias and its furthest distance, buckets and theirs, c2p, p2c.
using Terms = std::tuple<Address, int, Address, int, Rows, Rows>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

fasttune_head_rows head_rows(const Rows& rows) {
  return {pointer<void>(static_cast<Address>(rows[0])), rows[1], rows[2], rows[3]};
}

fasttune_dropout_options dropout_options(Address seed, Address row_ids, double dropout_p) {
  fasttune_dropout_options options{};
  options.seed = pointer<const int64_t>(seed);
  options.row_ids = pointer<const int64_t>(row_ids);
  options.threshold = static_cast<uint32_t>(dropout_p * 65536.0 + 0.5);
  options.scale =
      options.threshold >= 65536 ? 0.0f : 65536.0f / static_cast<float>(65536 - options.threshold);
  return options;
}

void check(const char* problem) {
  if (problem)
    throw std::runtime_error(std::string("The CUDA library could not start a kernel: ") + problem + ".");
}

using LayerNorm = const char* (*)(const fasttune_layer_norm_args*, void*);
using LayerNormBackward = const char* (*)(const fasttune_layer_norm_backward_args*, void*);

template <LayerNorm kernel>
void layer_norm(int dtype, int x_dtype, int weight_dtype, int bias_dtype, Address x, Address residual,
                Address weight, Address bias, Address out, Address sum, Address statistics, int64_t rows,
                int64_t columns, double eps, Address row_ids, Address seed, double dropout_p, int gelu,
                Address stream) {
  fasttune_layer_norm_args args{};
  args.dtype = dtype;
  args.x_dtype = x_dtype;
  args.weight_dtype = weight_dtype;
  args.bias_dtype = bias_dtype;
  args.x = pointer<const void>(x);
  args.residual = pointer<const void>(residual);
  args.weight = pointer<const void>(weight);
  args.bias = pointer<const void>(bias);
  args.out = pointer<void>(out);
  args.sum = pointer<void>(sum);
  args.statistics = pointer<float>(statistics);
  args.rows = rows;
  args.columns = columns;
  args.eps = static_cast<float>(eps);
  args.dropout = dropout_options(seed, row_ids, dropout_p);
  args.gelu = gelu;
  check(kernel(&args, pointer<void>(stream)));
}

template <LayerNormBackward kernel>
void layer_norm_backward(int dtype, int x_dtype, int weight_dtype, int bias_dtype, Address dout, Address dsum,
                         Address input, Address weight, Address bias, Address statistics, Address dx,
                         Address dresidual, Address dweight, Address dbias, Address dweight_partial,
                         Address dbias_partial, int64_t partials, int64_t rows, int64_t columns,
                         Address row_ids, Address seed, double dropout_p, int gelu, Address stream) {
  fasttune_layer_norm_backward_args args{};
  args.dtype = dtype;
  args.x_dtype = x_dtype;
  args.weight_dtype = weight_dtype;
  args.bias_dtype = bias_dtype;
  args.dout = pointer<const void>(dout);
  args.dsum = pointer<const void>(dsum);
  args.input = pointer<const void>(input);
  args.weight = pointer<const void>(weight);
  args.bias = pointer<const void>(bias);
  args.statistics = pointer<const float>(statistics);
  args.dx = pointer<void>(dx);
  args.dresidual = pointer<void>(dresidual);
  args.dweight = pointer<void>(dweight);
  args.dbias = pointer<void>(dbias);
  args.dweight_partial = pointer<float>(dweight_partial);
  args.dbias_partial = pointer<float>(dbias_partial);
  args.partials = partials;
  args.rows = rows;
  args.columns = columns;
  args.dropout = dropout_options(seed, row_ids, dropout_p);
  args.gelu = gelu;
  check(kernel(&args, pointer<void>(stream)));
}

fasttune_attention_args attention_args(int dtype, const std::array<int64_t, 5>& sizes, const Rows& query,
                                       const Rows& key, const Rows& value, const Rows& out, Address lse,
                                       const Offsets& offsets, bool offsets_are_64_bit, bool causal,
                                       int window, double scale, Address seed, double dropout_p,
                                       const Terms& terms) {
  fasttune_attention_args args{};
  args.dtype = dtype;
  args.sequences = sizes[0];
  args.queries = sizes[1];
  args.keys = sizes[2];
  args.heads = sizes[3];
  args.head_dim = sizes[4];
  args.offsets = pointer<const void>(offsets[0]);
  args.query_offsets = pointer<const void>(offsets[1]);
  args.positions = pointer<const int32_t>(offsets[2]);
  args.offsets_are_64_bit = offsets_are_64_bit;
  args.causal = causal;
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.dropout = dropout_options(seed, 0, dropout_p);
  args.query = head_rows(query);
  args.key = head_rows(key);
  args.value = head_rows(value);
  args.out = head_rows(out);
  args.lse = pointer<float>(lse);
  const auto& [bias, bias_furthest, buckets, buckets_furthest, c2p, p2c] = terms;
  args.bias = pointer<const float>(bias);
  args.bias_furthest = bias_furthest;
  args.buckets = pointer<const int32_t>(buckets);
  args.buckets_furthest = buckets_furthest;
  args.c2p = head_rows(c2p);
  args.p2c = head_rows(p2c);
  return args;
}

}  // namespace
}  // namespace fasttune::cuda

PYBIND11_MODULE(FASTTUNE_CUDA_MODULE, module) {
  using namespace fasttune::cuda;
  const py::call_guard<py::gil_scoped_release> without_gil;
  module.attr("max_norm_columns") = FASTTUNE_CUDA_MAX_NORM_COLUMNS;
  module.attr("max_norm_gelu_columns") = FASTTUNE_CUDA_MAX_NORM_GELU_COLUMNS;
  module.def("problem", [] {
    const char* problem = fasttune_cuda_problem();
    return std::string(problem ? problem : "");
  });
  module.def(
      "dropout",
      [](int dtype, Address x, Address residual, Address out, int64_t rows, int64_t columns, Address row_ids,
         Address seed, double dropout_p, Address stream) {
        const fasttune_dropout_args args{dtype,
                                         pointer<const void>(x),
                                         pointer<const void>(residual),
                                         pointer<void>(out),
                                         rows,
                                         columns,
                                         dropout_options(seed, row_ids, dropout_p)};
        check(fasttune_cuda_dropout(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def(
      "activation",
      [](int dtype, int bias_dtype, int kind, Address x, Address gate, Address bias, Address out,
         int64_t rows, int64_t columns, int64_t x_stride, int64_t gate_stride, Address stream) {
        const fasttune_activation_args args{dtype,
                                            bias_dtype,
                                            kind,
                                            pointer<const void>(x),
                                            pointer<const void>(gate),
                                            pointer<const void>(bias),
                                            pointer<void>(out),
                                            rows,
                                            columns,
                                            x_stride,
                                            gate_stride};
        check(fasttune_cuda_activation(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def("activation_partials", &fasttune_cuda_activation_partials);
  module.def(
      "activation_backward",
      [](int dtype, int bias_dtype, int kind, Address dout, Address x, Address gate, Address bias, Address dx,
         Address dgate, Address dbias, Address dbias_partial, int64_t partials, int64_t rows, int64_t columns,
         int64_t x_stride, int64_t gate_stride, int64_t gradient_stride, Address stream) {
        const fasttune_activation_backward_args args{dtype,
                                                     bias_dtype,
                                                     kind,
                                                     pointer<const void>(dout),
                                                     pointer<const void>(x),
                                                     pointer<const void>(gate),
                                                     pointer<const void>(bias),
                                                     pointer<void>(dx),
                                                     pointer<void>(dgate),
                                                     pointer<void>(dbias),
                                                     pointer<float>(dbias_partial),
                                                     partials,
                                                     rows,
                                                     columns,
                                                     x_stride,
                                                     gate_stride,
                                                     gradient_stride};
        check(fasttune_cuda_activation_backward(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def("layer_norm_partials", &fasttune_cuda_layer_norm_partials);
  module.def("layer_norm", &layer_norm<fasttune_cuda_layer_norm>, without_gil);
  module.def("layer_norm_backward", &layer_norm_backward<fasttune_cuda_layer_norm_backward>, without_gil);
  module.def("layer_norm_gelu", &layer_norm<fasttune_cuda_layer_norm_gelu>, without_gil);
  module.def("layer_norm_gelu_backward", &layer_norm_backward<fasttune_cuda_layer_norm_gelu_backward>,
             without_gil);
  module.def("gelu_layer_norm", &layer_norm<fasttune_cuda_gelu_layer_norm>, without_gil);
  module.def("gelu_layer_norm_backward", &layer_norm_backward<fasttune_cuda_gelu_layer_norm_backward>,
             without_gil);
  module.def(
      "cross_entropy",
      [](int dtype, int64_t rows, int64_t classes, Address logits, int64_t logits_stride, Address target,
         Address class_weight, int64_t ignore_index, double label_smoothing, Address loss, Address statistics,
         Address loss_sum, Address total, Address stream) {
        const fasttune_cross_entropy_args args{dtype,
                                               rows,
                                               classes,
                                               pointer<const void>(logits),
                                               logits_stride,
                                               pointer<const int64_t>(target),
                                               pointer<const float>(class_weight),
                                               ignore_index,
                                               static_cast<float>(label_smoothing),
                                               pointer<float>(loss),
                                               pointer<float>(statistics),
                                               pointer<float>(loss_sum),
                                               pointer<float>(total)};
        check(fasttune_cuda_cross_entropy(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def(
      "cross_entropy_backward",
      [](int dtype, int64_t rows, int64_t classes, Address logits, int64_t logits_stride, Address target,
         Address class_weight, Address class_weight_sum, int64_t ignore_index, double label_smoothing,
         Address statistics, Address dloss, int64_t dloss_stride, Address total, Address dlogits,
         int64_t dlogits_stride, Address stream) {
        const fasttune_cross_entropy_backward_args args{dtype,
                                                        rows,
                                                        classes,
                                                        pointer<const void>(logits),
                                                        logits_stride,
                                                        pointer<const int64_t>(target),
                                                        pointer<const float>(class_weight),
                                                        pointer<const float>(class_weight_sum),
                                                        ignore_index,
                                                        static_cast<float>(label_smoothing),
                                                        pointer<const float>(statistics),
                                                        pointer<const float>(dloss),
                                                        dloss_stride,
                                                        pointer<const float>(total),
                                                        pointer<void>(dlogits),
                                                        dlogits_stride};
        check(fasttune_cuda_cross_entropy_backward(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def(
      "log_prob",
      [](int dtype, int64_t rows, int64_t classes, Address logits, int64_t logits_stride, Address bias,
         double scale, Address ids, int64_t ignore_index, Address log_prob, Address logsumexp,
         Address entropy, Address mean_logit, Address top1, Address statistics, Address stream) {
        const fasttune_log_prob_args args{dtype,
                                          rows,
                                          classes,
                                          pointer<const void>(logits),
                                          logits_stride,
                                          pointer<const float>(bias),
                                          static_cast<float>(scale),
                                          pointer<const int64_t>(ids),
                                          ignore_index,
                                          pointer<float>(log_prob),
                                          pointer<float>(logsumexp),
                                          pointer<float>(entropy),
                                          pointer<float>(mean_logit),
                                          pointer<int64_t>(top1),
                                          pointer<float>(statistics)};
        check(fasttune_cuda_log_prob(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def(
      "log_prob_backward",
      [](int dtype, int64_t rows, int64_t classes, Address logits, int64_t logits_stride, Address bias,
         double scale, double gain, Address ids, int64_t ignore_index, Address statistics, Address dlog_prob,
         Address dlogsumexp, Address dentropy, Address dmean_logit, Address divisor, Address stream) {
        const fasttune_log_prob_backward_args args{dtype,
                                                   rows,
                                                   classes,
                                                   pointer<void>(logits),
                                                   logits_stride,
                                                   pointer<const float>(bias),
                                                   static_cast<float>(scale),
                                                   static_cast<float>(gain),
                                                   pointer<const int64_t>(ids),
                                                   ignore_index,
                                                   pointer<const float>(statistics),
                                                   pointer<const float>(dlog_prob),
                                                   pointer<const float>(dlogsumexp),
                                                   pointer<const float>(dentropy),
                                                   pointer<const float>(dmean_logit),
                                                   pointer<const float>(divisor)};
        check(fasttune_cuda_log_prob_backward(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def(
      "rotary",
      [](int dtype, int table_dtype, Address x, Address out, Address cos, Address sin, Address row_ids,
         const std::array<int64_t, 5>& sizes, const std::array<int64_t, 4>& strides, int64_t table_rows,
         int64_t width, int64_t rotated, bool inverse, Address stream) {
        const fasttune_rotary_args args{dtype,
                                        table_dtype,
                                        pointer<const void>(x),
                                        pointer<void>(out),
                                        pointer<const void>(cos),
                                        pointer<const void>(sin),
                                        pointer<const int64_t>(row_ids),
                                        sizes[0],
                                        sizes[1],
                                        sizes[2],
                                        sizes[3],
                                        sizes[4],
                                        strides[0],
                                        strides[1],
                                        strides[2],
                                        strides[3],
                                        table_rows,
                                        width,
                                        rotated,
                                        inverse};
        check(fasttune_cuda_rotary(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def("attention_shared_bytes", &fasttune_cuda_attention_shared_bytes);
  module.def(
      "attention_forward",
      [](int dtype, const std::array<int64_t, 5>& sizes, const Rows& query, const Rows& key,
         const Rows& value, const Rows& out, Address lse, const Offsets& offsets, bool offsets_are_64_bit,
         bool causal, int window, double scale, Address seed, double dropout_p, const Terms& terms,
         Address stream) {
        const fasttune_attention_args args =
            attention_args(dtype, sizes, query, key, value, out, lse, offsets, offsets_are_64_bit, causal,
                           window, scale, seed, dropout_p, terms);
        check(fasttune_cuda_attention_forward(&args, pointer<void>(stream)));
      },
      without_gil);
  module.def(
      "attention_backward",
      [](int dtype, const std::array<int64_t, 5>& sizes, const Rows& query, const Rows& key,
         const Rows& value, const Rows& out, Address lse, const Rows& dout, const Rows& dquery,
         const Rows& dkey, const Rows& dvalue, Address delta, const Offsets& offsets, bool offsets_are_64_bit,
         bool causal, int window, double scale, Address seed, double dropout_p, const Terms& terms,
         Address dbias, Address dbias_partial, int64_t partials, const Rows& dc2p, const Rows& dp2c,
         Address stream) {
        fasttune_attention_args args =
            attention_args(dtype, sizes, query, key, value, out, lse, offsets, offsets_are_64_bit, causal,
                           window, scale, seed, dropout_p, terms);
        args.dout = head_rows(dout);
        args.dquery = head_rows(dquery);
        args.dkey = head_rows(dkey);
        args.dvalue = head_rows(dvalue);
        args.delta = pointer<float>(delta);
        args.dbias = pointer<float>(dbias);
        args.dbias_partial = pointer<float>(dbias_partial);
        args.partials = partials;
        args.dc2p = head_rows(dc2p);
        args.dp2c = head_rows(dp2c);
        check(fasttune_cuda_attention_backward(&args, pointer<void>(stream)));
      },
      without_gil);
#ifdef FASTTUNE_CUDA_HOST
  bind_host(module);
#endif
}
