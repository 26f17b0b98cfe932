#include "cpu/layer_norm.h"

#include "cpu/bindings/bindings.h"

namespace fasttune {
namespace {

using Kernel = void (*)(const LayerNormArgs&);
using BackwardKernel = void (*)(const LayerNormBackwardArgs&);

template <Kernel kernel>
void fused_forward(int dtype, int weight_dtype, int bias_dtype, Address x, Address weight, Address bias,
                   Address out, Address statistics, int64_t rows, int64_t columns, double eps, bool tanh) {
  LayerNormArgs args{};
  args.dtype = args.x_dtype = static_cast<DType>(dtype);
  args.weight_dtype = static_cast<DType>(weight_dtype);
  args.bias_dtype = static_cast<DType>(bias_dtype);
  args.x = pointer<const void>(x);
  args.weight = pointer<const void>(weight);
  args.bias = pointer<const void>(bias);
  args.out = pointer<void>(out);
  args.statistics = pointer<float>(statistics);
  args.rows = rows;
  args.columns = columns;
  args.eps = eps;
  args.gelu = tanh ? Gelu::tanh : Gelu::erf;
  kernel(args);
}

template <BackwardKernel kernel>
void fused_backward(int dtype, int weight_dtype, int bias_dtype, Address dout, Address x, Address weight,
                    Address bias, Address statistics, Address dx, Address dweight, Address dbias,
                    int64_t rows, int64_t columns, bool tanh) {
  LayerNormBackwardArgs args{};
  args.dtype = args.x_dtype = static_cast<DType>(dtype);
  args.weight_dtype = static_cast<DType>(weight_dtype);
  args.bias_dtype = static_cast<DType>(bias_dtype);
  args.dout = pointer<const void>(dout);
  args.input = pointer<const void>(x);
  args.weight = pointer<const void>(weight);
  args.bias = pointer<const void>(bias);
  args.statistics = pointer<const float>(statistics);
  args.dx = pointer<void>(dx);
  args.dweight = pointer<void>(dweight);
  args.dbias = pointer<void>(dbias);
  args.rows = rows;
  args.columns = columns;
  args.gelu = tanh ? Gelu::tanh : Gelu::erf;
  kernel(args);
}

}  // namespace

void bind_layer_norm(pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def(
      "layer_norm",
      [](int dtype, int x_dtype, int weight_dtype, int bias_dtype, Address x, Address residual,
         Address weight, Address bias, Address out, Address sum, Address statistics, int64_t rows,
         int64_t columns, double eps, Address row_ids, Address seed, double dropout_p) {
        layer_norm({static_cast<DType>(dtype), static_cast<DType>(x_dtype), static_cast<DType>(weight_dtype),
                    static_cast<DType>(bias_dtype), pointer<const void>(x), pointer<const void>(residual),
                    pointer<const void>(weight), pointer<const void>(bias), pointer<void>(out),
                    pointer<void>(sum), pointer<float>(statistics), rows, columns, eps,
                    pointer<const int64_t>(row_ids), make_dropout(read_seed(seed), dropout_p)});
      },
      without_gil);
  module.def(
      "layer_norm_backward",
      [](int dtype, int x_dtype, int weight_dtype, int bias_dtype, Address dout, Address dsum, Address input,
         Address weight, Address statistics, Address dx, Address dresidual, Address dweight, Address dbias,
         int64_t rows, int64_t columns, Address row_ids, Address seed, double dropout_p) {
        layer_norm_backward({static_cast<DType>(dtype), static_cast<DType>(x_dtype),
                             static_cast<DType>(weight_dtype), static_cast<DType>(bias_dtype),
                             pointer<const void>(dout), pointer<const void>(dsum), pointer<const void>(input),
                             pointer<const void>(weight), nullptr, pointer<const float>(statistics),
                             pointer<void>(dx), pointer<void>(dresidual), pointer<void>(dweight),
                             pointer<void>(dbias), rows, columns, pointer<const int64_t>(row_ids),
                             make_dropout(read_seed(seed), dropout_p)});
      },
      without_gil);
  module.def("layer_norm_gelu", &fused_forward<layer_norm_gelu>, without_gil);
  module.def("layer_norm_gelu_backward", &fused_backward<layer_norm_gelu_backward>, without_gil);
  module.def("gelu_layer_norm", &fused_forward<gelu_layer_norm>, without_gil);
  module.def("gelu_layer_norm_backward", &fused_backward<gelu_layer_norm_backward>, without_gil);
}

}  // namespace fasttune
