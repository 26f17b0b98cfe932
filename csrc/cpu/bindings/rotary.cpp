#include "cpu/rotary.h"

#include <pybind11/stl.h>

#include <array>

#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_rotary(pybind11::module_& module) {
  module.def(
      "rotary",
      [](int dtype, int table_dtype, Address x, Address out, Address cos, Address sin, Address row_ids,
         const std::array<int64_t, 5>& sizes, const std::array<int64_t, 4>& strides, int64_t table_rows,
         int64_t width, int64_t rotated, bool inverse) {
        rotary({static_cast<DType>(dtype),
                static_cast<DType>(table_dtype),
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
                inverse});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fasttune
