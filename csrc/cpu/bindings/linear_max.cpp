#include "cpu/linear_max.h"

#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_linear_max(pybind11::module_& module) {
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  module.def(
      "linear_max",
      [](int dtype, int64_t sequences, int64_t rows, int64_t classes, int64_t first_row, Address logits,
         int64_t logits_stride, Address bias, Address offsets, Address best, int64_t best_stride,
         Address token, int64_t token_stride) {
        linear_max({static_cast<DType>(dtype), sequences, rows, classes, first_row,
                    pointer<const void>(logits), logits_stride, pointer<const float>(bias),
                    pointer<const int64_t>(offsets), pointer<float>(best), best_stride,
                    pointer<int32_t>(token), token_stride});
      },
      unlocked);
  // The gradients whose addresses are not 0.
  module.def(
      "linear_max_gradient",
      [](int input_dtype, int weight_dtype, int64_t sequences, int64_t rows, int64_t classes,
         int64_t features, Address offsets, Address token, Address dout, Address input, int64_t input_stride,
         Address weight, int64_t weight_stride, Address dinput, Address dweight, Address dbias) {
        const LinearMaxGradientArgs args{static_cast<DType>(input_dtype),
                                         static_cast<DType>(weight_dtype),
                                         sequences,
                                         rows,
                                         classes,
                                         features,
                                         pointer<const int64_t>(offsets),
                                         pointer<const int32_t>(token),
                                         pointer<const float>(dout),
                                         pointer<const void>(input),
                                         input_stride,
                                         pointer<const void>(weight),
                                         weight_stride,
                                         pointer<float>(dinput),
                                         pointer<void>(dweight),
                                         pointer<float>(dbias)};
        if (dinput) linear_max_input_gradient(args);
        if (dweight || dbias) linear_max_weight_gradient(args);
      },
      unlocked);
}

}  // namespace fasttune
