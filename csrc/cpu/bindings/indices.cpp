#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_indices(pybind11::module_& module) {
  // Position of the first index outside [0, size) that is not `exempt`, or -1.
  module.def(
      "first_outside",
      [](Address indices, int64_t n, int64_t size, int64_t exempt) -> int64_t {
        const int64_t* values = pointer<const int64_t>(indices);
        for (int64_t i = 0; i < n; ++i)
          if (static_cast<uint64_t>(values[i]) >= static_cast<uint64_t>(size) && values[i] != exempt)
            return i;
        return -1;
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fasttune
