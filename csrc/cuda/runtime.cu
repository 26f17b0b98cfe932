// Whether kernels can run here at all.
#include "cuda/device.cuh"

extern "C" const char* fasttune_cuda_problem(void) {
  int devices = 0, device = 0, major = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices == 0) return "the CUDA driver finds no device";
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return major >= 8 ? nullptr
                    : "the device is older than compute capability 8.0, for which the kernels are built";
}
