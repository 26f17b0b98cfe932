#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/bindings/bindings.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/runtime/memory.h"

namespace py = pybind11;

namespace fasttune {
namespace {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < 3; ++i)
    if (isa_supported(static_cast<Isa>(i))) names.push_back(kIsaNames[i]);
  return names;
}

void select_isa(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name != kIsaNames[i]) continue;
    if (!isa_supported(static_cast<Isa>(i)))
      throw std::runtime_error("Instruction set '" + name +
                               "' was asked for, but this processor cannot run it.");
    return set_active_isa(static_cast<Isa>(i));
  }
  throw std::invalid_argument("Instruction set '" + name +
                              "' is unknown; expected baseline, avx2 or avx512.");
}

}  // namespace
}  // namespace fasttune

PYBIND11_MODULE(_cpu, module) {
  using namespace fasttune;
  module.def("available_isas", &available_isas);
  module.def("active_isa", [] { return kIsaNames[static_cast<int>(active_isa())]; });
  module.def("select_isa", &select_isa);
  module.def("num_threads", &num_threads);
  module.def("prefer_huge_pages", &prefer_huge_pages);
  module.def("set_thread_pool", [](Address parallel_for, Address get_num_threads) {
    set_thread_pool(pointer<void>(parallel_for), pointer<void>(get_num_threads));
  });
  bind_activation(module);
  bind_attention(module);
  bind_cross_entropy(module);
  bind_dropout(module);
  bind_embedding(module);
  bind_indices(module);
  bind_layer_norm(module);
  bind_log_prob(module);
  bind_linear_max(module);
  bind_rotary(module);
}
