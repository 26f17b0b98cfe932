#include "cpu/log_prob.h"

#include "cpu/bindings/bindings.h"

namespace fasttune {

void bind_log_prob(pybind11::module_& module) {
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  // The arguments in the order of LogProbArgs and LogProbBackwardArgs.
  module.def(
      "log_prob",
      [](int dtype, int64_t rows, int64_t classes, Address logits, int64_t logits_stride, Address bias,
         double scale, Address ids, Address log_prob_out, Address logsumexp, Address entropy,
         Address mean_logit, Address top1, Address statistics) {
        log_prob({static_cast<DType>(dtype), rows, classes, pointer<const void>(logits), logits_stride,
                  pointer<const float>(bias), static_cast<float>(scale), pointer<const int64_t>(ids),
                  pointer<float>(log_prob_out), pointer<float>(logsumexp), pointer<float>(entropy),
                  pointer<float>(mean_logit), pointer<int64_t>(top1), pointer<float>(statistics)});
      },
      unlocked);
  module.def(
      "log_prob_backward",
      [](int dtype, int64_t rows, int64_t classes, Address logits, int64_t logits_stride, Address bias,
         double scale, Address ids, Address statistics, Address dlog_prob, Address dlogsumexp,
         Address dentropy, Address dmean_logit, Address bias_partial) {
        log_prob_backward({static_cast<DType>(dtype), rows, classes, pointer<void>(logits), logits_stride,
                           pointer<const float>(bias), static_cast<float>(scale), pointer<const int64_t>(ids),
                           pointer<const float>(statistics), pointer<const float>(dlog_prob),
                           pointer<const float>(dlogsumexp), pointer<const float>(dentropy),
                           pointer<const float>(dmean_logit), pointer<float>(bias_partial)});
      },
      unlocked);
}

}  // namespace fasttune
