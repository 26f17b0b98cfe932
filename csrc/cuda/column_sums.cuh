// Second stage of every parameter gradient: column_sums.cu.
#pragma once
#include "cuda/device.cuh"

namespace fasttune::cuda {

// Sums over the rows of float32 (rows, columns), to (columns,) of `dtype`. Returns null or what went wrong.
const char* column_sums(const float* partial, void* out, int dtype, int64_t rows, int64_t columns,
                        void* stream);

}  // namespace fasttune::cuda
