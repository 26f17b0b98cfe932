// LN(dropout(x) + residual), and plain LN: layer_norm.cuh with every pair of types that the operators meet.
#include <type_traits>

#include "cuda/layer_norm.cuh"

namespace fasttune::cuda {
namespace {

// body(x's type, everything else's type) as null pointers of those types.
template <class Body>
const char* with_types(int dtype, int x_dtype, const Body& body) {
  using bf16 = __nv_bfloat16;
  using f16 = __half;
  if (dtype == FASTTUNE_BF16) return body(static_cast<bf16*>(nullptr), static_cast<bf16*>(nullptr));
  if (dtype == FASTTUNE_F16) return body(static_cast<f16*>(nullptr), static_cast<f16*>(nullptr));
  if (x_dtype == FASTTUNE_BF16) return body(static_cast<bf16*>(nullptr), static_cast<float*>(nullptr));
  if (x_dtype == FASTTUNE_F16) return body(static_cast<f16*>(nullptr), static_cast<float*>(nullptr));
  return body(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
}

}  // namespace
}  // namespace fasttune::cuda

extern "C" int64_t fasttune_cuda_layer_norm_partials(int64_t rows, int64_t columns, int64_t multiprocessors) {
  using namespace fasttune::cuda;
  const NormShape shape = norm_shape(columns);
  const int64_t wanted = 2 * multiprocessors, most = divide_up<int64_t>(rows, shape.rows);
  return (wanted < most ? wanted : most) * shape.rows;
}

extern "C" const char* fasttune_cuda_layer_norm(const fasttune_layer_norm_args* args, void* stream) {
  using namespace fasttune::cuda;
  return with_types(args->dtype, args->x_dtype, [&](auto* x, auto* t) {
    return layer_norm_forward<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(t)>,
                              Activation::none>(*args, stream);
  });
}

extern "C" const char* fasttune_cuda_layer_norm_backward(const fasttune_layer_norm_backward_args* args,
                                                         void* stream) {
  using namespace fasttune::cuda;
  return with_types(args->dtype, args->x_dtype, [&](auto* x, auto* t) {
    return layer_norm_backward<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(t)>,
                               Activation::none>(*args, stream);
  });
}
