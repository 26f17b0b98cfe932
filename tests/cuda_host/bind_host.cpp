// What the harness's module adds to the library's functions.
#include <pybind11/pybind11.h>

#include "cuda/device.cuh"

namespace fasttune::cuda {

void bind_host(pybind11::module_& module) {
  module.def("seed_bug", [](int bug) { host::seeded_bug = bug; });
}

}  // namespace fasttune::cuda
