#include "cpu/activation.h"

#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_activation(pybind11::module_& module) {
  module.def(
      "activation",
      [](int dtype, int bias_dtype, int kind, Address x, Address gate, Address bias, Address out,
         int64_t rows, int64_t columns, int64_t x_stride, int64_t gate_stride) {
        activation({static_cast<DType>(dtype), static_cast<DType>(bias_dtype), static_cast<Activation>(kind),
                    pointer<const void>(x), pointer<const void>(gate), pointer<const void>(bias),
                    pointer<void>(out), rows, columns, x_stride, gate_stride});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def(
      "activation_backward",
      [](int dtype, int bias_dtype, int kind, Address dout, Address x, Address gate, Address bias, Address dx,
         Address dgate, Address dbias, int64_t rows, int64_t columns, int64_t x_stride, int64_t gate_stride,
         int64_t gradient_stride) {
        activation_backward({static_cast<DType>(dtype), static_cast<DType>(bias_dtype),
                             static_cast<Activation>(kind), pointer<const void>(dout), pointer<const void>(x),
                             pointer<const void>(gate), pointer<const void>(bias), pointer<void>(dx),
                             pointer<void>(dgate), pointer<void>(dbias), rows, columns, x_stride, gate_stride,
                             gradient_stride});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fasttune
