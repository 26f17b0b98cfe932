#include "cpu/cross_entropy.h"

#include <numeric>

#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_cross_entropy(pybind11::module_& module) {
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  module.attr("bias_group") = kBiasGroup;
  // The arguments in the order of CrossEntropyArgs; returns the sum of the losses, 0 where there are none.
  module.def(
      "cross_entropy",
      [](int dtype, int64_t rows, int64_t classes, Address logits, int64_t logits_stride, Address bias,
         Address target, Address class_weight, int64_t ignore_index, double label_smoothing, Address loss,
         Address statistics, Address gradient, int64_t gradient_stride, Address row_scale,
         int64_t row_scale_stride, double scale, Address bias_partial) {
        const float* weights = pointer<const float>(class_weight);
        const double weight_sum =
            weights ? std::accumulate(weights, weights + classes, 0.0) : static_cast<double>(classes);
        float* losses = pointer<float>(loss);
        cross_entropy({static_cast<DType>(dtype), rows, classes, pointer<const void>(logits), logits_stride,
                       pointer<const float>(bias), pointer<const int64_t>(target), weights, weight_sum,
                       ignore_index, static_cast<float>(label_smoothing), losses, pointer<float>(statistics),
                       pointer<void>(gradient), gradient_stride, pointer<const float>(row_scale),
                       row_scale_stride, static_cast<float>(scale), pointer<float>(bias_partial)});
        return losses ? std::accumulate(losses, losses + rows, 0.0) : 0.0;
      },
      unlocked);
  // What a mean divides by: the weights of the labels that count, summed.
  module.def(
      "label_weight_sum",
      [](Address target, int64_t rows, Address class_weight, int64_t ignore_index) {
        const int64_t* labels = pointer<const int64_t>(target);
        const float* weights = pointer<const float>(class_weight);
        double sum = 0.0;
        for (int64_t row = 0; row < rows; ++row)
          if (labels[row] != ignore_index) sum += weights ? weights[labels[row]] : 1.0;
        return sum;
      },
      unlocked);
  module.def(
      "sum_rows",
      [](Address x, Address out, int64_t rows, int64_t columns) {
        sum_rows({pointer<const float>(x), pointer<float>(out), rows, columns});
      },
      unlocked);
}

}  // namespace fasttune
