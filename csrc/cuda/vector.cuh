// Eight consecutive elements of a row: the unit in which the row-wise kernels read and write. A warp covers
// 256 columns with one such access of each lane: one 16-byte access per lane for 16-bit types, two for
// float32.
#pragma once
#include <string.h>

#include "cuda/device.cuh"

namespace fasttune::cuda {

constexpr int kVector = 8;
constexpr int kWarpColumns = kWarp * kVector;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// x as it will be read again from memory.
template <class T>
__device__ __forceinline__ float as_stored(float x) {
  return to_float(from_float<T>(x));
}

// Two values of type T in one register, `low` at the lower address.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// One 16-byte store. Written as an instruction, because the compiler splits it where it shares code with the
// stores of single elements beside it.
__device__ __forceinline__ void store16(void* to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
#ifdef FASTTUNE_CUDA_HOST
  *static_cast<uint4*>(to) = make_uint4(x, y, z, w);
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x), "r"(y),
               "r"(z), "r"(w)
               : "memory");
#endif
}

template <class T>
struct alignas(16) Packed {
  T values[kVector];
};

// columns [column, column + 8) of a row, zeros outside [0, columns). aligned: row + column is on a 16-byte
// boundary.
template <class T>
__device__ __forceinline__ void load8(const T* row, int64_t column, int64_t columns, bool aligned,
                                      float (&out)[kVector]) {
  if (aligned && column >= 0 && column + kVector <= columns) {
    Packed<T> packed;
    constexpr int kAccesses = sizeof(Packed<T>) / 16;
    const uint4* from = reinterpret_cast<const uint4*>(row + column);
    FASTTUNE_UNROLL
    for (int i = 0; i < kAccesses; ++i) reinterpret_cast<uint4*>(&packed)[i] = from[i];
    FASTTUNE_UNROLL
    for (int i = 0; i < kVector; ++i) out[i] = to_float(packed.values[i]);
    return;
  }
  FASTTUNE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const int64_t c = column + i;
    out[i] = c >= 0 && c < columns ? to_float(row[c]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store8(T* row, int64_t column, int64_t columns, bool aligned,
                                       const float (&in)[kVector]) {
  if (aligned && column >= 0 && column + kVector <= columns) {
    if constexpr (sizeof(T) == 4) {
      store16(row + column, bits_of(in[0]), bits_of(in[1]), bits_of(in[2]), bits_of(in[3]));
      store16(row + column + 4, bits_of(in[4]), bits_of(in[5]), bits_of(in[6]), bits_of(in[7]));
    } else {
      store16(row + column, pack<T>(in[0], in[1]), pack<T>(in[2], in[3]), pack<T>(in[4], in[5]),
              pack<T>(in[6], in[7]));
    }
    return;
  }
  FASTTUNE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const int64_t c = column + i;
    if (c >= 0 && (c < columns || (FASTTUNE_SEEDED(kBugOffByOne) && c == columns)))
      row[c] = from_float<T>(in[i]);
  }
}

// A weight or bias: in the activations' type T or in float32, or absent.
template <class T>
struct Parameter {
  const void* data;
  bool is_float;

  __device__ __forceinline__ void load(int64_t column, int64_t columns, bool aligned, float absent,
                                       float (&out)[kVector]) const {
    if (data == nullptr) {
      FASTTUNE_UNROLL
      for (int i = 0; i < kVector; ++i) out[i] = absent;
    } else if (is_float) {
      load8(static_cast<const float*>(data), column, columns, aligned, out);
    } else {
      load8(static_cast<const T*>(data), column, columns, aligned, out);
    }
  }
};

template <class T>
__device__ __forceinline__ Parameter<T> parameter(const void* data, int dtype) {
  return {data, dtype == FASTTUNE_F32};
}

// Whether rows of `columns` elements, and every tensor named, start on 16-byte boundaries.
template <class... Pointers>
bool rows_are_aligned(int64_t columns, Pointers... pointers) {
  return columns % kVector == 0 && (is_aligned(pointers) && ...);
}

}  // namespace fasttune::cuda
