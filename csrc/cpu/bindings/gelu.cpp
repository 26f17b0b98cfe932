#include "cpu/gelu.h"

#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_gelu(pybind11::module_& module) {
  module.def(
      "bias_gelu",
      [](int dtype, int bias_dtype, Address x, Address bias, Address out, int64_t rows, int64_t columns,
         bool tanh) {
        bias_gelu({static_cast<DType>(dtype), static_cast<DType>(bias_dtype), pointer<const void>(x),
                   pointer<const void>(bias), pointer<void>(out), rows, columns, tanh});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def(
      "bias_gelu_backward",
      [](int dtype, int bias_dtype, Address dout, Address x, Address bias, Address dx, Address dbias,
         int64_t rows, int64_t columns, bool tanh) {
        bias_gelu_backward({static_cast<DType>(dtype), static_cast<DType>(bias_dtype),
                            pointer<const void>(dout), pointer<const void>(x), pointer<const void>(bias),
                            pointer<void>(dx), pointer<void>(dbias), rows, columns, tanh});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fasttune
