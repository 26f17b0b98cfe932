#include "cpu/dropout.h"

#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_dropout(pybind11::module_& module) {
  module.def(
      "dropout",
      [](int dtype, Address x, Address residual, Address out, int64_t rows, int64_t columns, Address row_ids,
         Address seed, double dropout_p) {
        dropout({static_cast<DType>(dtype), pointer<const void>(x), pointer<const void>(residual),
                 pointer<void>(out), rows, columns, pointer<const int64_t>(row_ids),
                 make_dropout(read_seed(seed), dropout_p)});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fasttune
