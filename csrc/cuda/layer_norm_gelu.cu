// GELU(LN(x)) and LN(GELU(x)): layer_norm.cuh with an activation behind the norm or in front of it.
#include "cuda/layer_norm.cuh"

using namespace fasttune::cuda;

extern "C" const char* fasttune_cuda_layer_norm_gelu(const fasttune_layer_norm_args* args, void* stream) {
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T,
                           return (layer_norm_forward<T, T, Activation::after>(*args, stream)));
  return nullptr;
}

extern "C" const char* fasttune_cuda_layer_norm_gelu_backward(const fasttune_layer_norm_backward_args* args,
                                                              void* stream) {
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T,
                           return (layer_norm_backward<T, T, Activation::after>(*args, stream)));
  return nullptr;
}

extern "C" const char* fasttune_cuda_gelu_layer_norm(const fasttune_layer_norm_args* args, void* stream) {
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T,
                           return (layer_norm_forward<T, T, Activation::before>(*args, stream)));
  return nullptr;
}

extern "C" const char* fasttune_cuda_gelu_layer_norm_backward(const fasttune_layer_norm_backward_args* args,
                                                              void* stream) {
  FASTTUNE_WITH_CUDA_DTYPE(args->dtype, T,
                           return (layer_norm_backward<T, T, Activation::before>(*args, stream)));
  return nullptr;
}
