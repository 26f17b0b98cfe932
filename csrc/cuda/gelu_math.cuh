// GELU(x) = x Φ(x) and its derivative, in the erf form and in the tanh form (Hendrycks and Gimpel, "Gaussian
// Error Linear Units", 2016). Φ comes from erfc and 1 + tanh from an exponential, so that the left tail,
// where 1 + erf and 1 + tanh cancel, keeps its relative precision.
#pragma once
#include "cuda/device.cuh"

namespace fasttune::cuda {

// (1 + tanh v) / 2 = 1 / (1 + e^(-2v)), 2v = √(8/π) (x + 0.044715 x³). `exponential` becomes e^(-2v).
__device__ __forceinline__ float tanh_gate(float x, float* exponential) {
  *exponential = expf(x * fmaf(x * x, -0.07135481627260025f, -1.5957691216057308f));
  return 1.0f / (1.0f + *exponential);
}

// Beyond ±16 both forms are saturated in float32; clamped there, no intermediate overflows. NaN stays NaN.
__device__ __forceinline__ float gelu_clamp(float x) { return x > 16.0f ? 16.0f : (x < -16.0f ? -16.0f : x); }

__device__ __forceinline__ float gelu(float x, bool tanh) {
  const float inside = gelu_clamp(x);
  float exponential;
  const float gate = tanh ? tanh_gate(inside, &exponential) : 0.5f * erfcf(-0.7071067811865476f * inside);
  return (x < -16.0f ? inside : x) * gate;
}

// gelu(x), and in `slope` its derivative.
//   erf:  Φ(x) + x e^(-x²/2) / √(2π)
//   tanh: g + x g (1 - g) (2v)', with 1 - g = g e^(-2v) (no cancellation) and (2v)' = √(8/π) (1 + 3 *
//   0.044715 x²)
__device__ __forceinline__ float gelu_with_slope(float x, bool tanh, float* slope) {
  const float inside = gelu_clamp(x);
  float gate;
  if (tanh) {
    float exponential;
    gate = tanh_gate(inside, &exponential);
    const float rest = gate * fminf(exponential, 1e30f);  // where e^(-2v) is infinite, gate is 0
    const float inner = fmaf(inside * inside, 0.21406444881780076f, 1.5957691216057308f);
    *slope = fmaf(inside * inner, gate * rest, gate);
  } else {
    gate = 0.5f * erfcf(-0.7071067811865476f * inside);
    *slope = fmaf(inside * 0.3989422804014327f, expf(-0.5f * inside * inside), gate);
  }
  return (x < -16.0f ? inside : x) * gate;
}

}  // namespace fasttune::cuda
