#include "cpu/embedding.h"

#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_embedding(pybind11::module_& module) {
  module.def(
      "embedding_sum",
      [](int dtype, int64_t rows, int64_t columns, Address ids0, Address weight0, Address ids1,
         Address weight1, Address ids2, Address weight2, Address out) {
        EmbeddingSumArgs args{static_cast<DType>(dtype), rows, columns, 0, {}, {}, pointer<void>(out)};
        const Address tables[][2] = {{ids0, weight0}, {ids1, weight1}, {ids2, weight2}};
        for (const auto& table : tables) {
          if (!table[1]) continue;
          args.ids[args.tables] = pointer<const int64_t>(table[0]);
          args.weights[args.tables++] = pointer<const void>(table[1]);
        }
        embedding_sum(args);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def(
      "embedding_gradient",
      [](int dtype, int64_t groups, int64_t columns, Address order, Address offsets, Address targets,
         Address dout, Address gradient) {
        embedding_gradient({static_cast<DType>(dtype), groups, columns, pointer<const int64_t>(order),
                            pointer<const int64_t>(offsets), pointer<const int64_t>(targets),
                            pointer<const void>(dout), pointer<void>(gradient)});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace fasttune
