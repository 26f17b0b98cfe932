// The Python face of the CPU library: each function takes raw addresses as integers, sizes and options, fills
// an argument struct and calls the dispatcher with the GIL released. Checks live in Python (fasttune/ops).
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/dtype.h"

namespace fasttune {

using Address = uintptr_t;  // 0 stands for a tensor that is not there

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline int64_t read_seed(Address seed) { return seed ? *pointer<const int64_t>(seed) : 0; }

void bind_activation(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_cross_entropy(pybind11::module_& module);
void bind_dropout(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_indices(pybind11::module_& module);
void bind_layer_norm(pybind11::module_& module);
void bind_log_prob(pybind11::module_& module);
void bind_linear_max(pybind11::module_& module);
void bind_rotary(pybind11::module_& module);

}  // namespace fasttune
