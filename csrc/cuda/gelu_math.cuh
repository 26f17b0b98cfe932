// GELU(x) = x Φ(x) and its derivative, in the erf form and in the tanh form (Hendrycks and Gimpel, "Gaussian
// Error Linear Units", 2016), by the formulas of csrc/cpu/simd/gelu.inc: Φ and 1 + tanh keep their relative
// precision in the left tail, where 1 + erf and 1 + tanh cancel.
#pragma once
#include "cuda/device.cuh"

namespace fasttune::cuda {

// Φ(x) = Q(-x), Q(z) = e^(-z²/2) R(z) for z >= 0, where R(z) = erfcx(z / √2) / 2 falls smoothly from 1/2 like
// 1/z: P4 / Q5 fits it on [0, 14.5] to a relative 6e-9. All coefficients are positive, so nothing cancels,
// and e^(-z²/2), which becomes `gaussian`, is needed for the derivative anyway. A third of the instructions
// of erfcf. |x| <= 16.
__device__ __forceinline__ float normal_cdf(float x, float* gaussian) {
  const float z = fabsf(x);
  *gaussian = expf(-0.5f * x * x);
  float p = 0.004116352094319301f;
  p = fmaf(p, z, 0.0406335269488714f);
  p = fmaf(p, z, 0.18323603590676005f);
  p = fmaf(p, z, 0.4382961668044659f);
  p = fmaf(p, z, 0.5f);
  float q = 0.010318044811418382f;
  q = fmaf(q, z, 0.10185959428177835f);
  q = fmaf(q, z, 0.46947299531221304f);
  q = fmaf(q, z, 1.2025068794306557f);
  q = fmaf(q, z, 1.6744773146579566f);
  q = fmaf(q, z, 1.0f);
  const float tail = *gaussian * p / q;
  return x < 0.0f ? tail : 1.0f - tail;
}

// (1 + tanh v) / 2 = 1 / (1 + e^(-2v)), 2v = √(8/π) (x + 0.044715 x³). `exponential` becomes e^(-2v).
__device__ __forceinline__ float tanh_gate(float x, float* exponential) {
  *exponential = expf(x * fmaf(x * x, -0.07135481627260025f, -1.5957691216057308f));
  return 1.0f / (1.0f + *exponential);
}

// Beyond ±16 both forms are saturated in float32; clamped there, no intermediate overflows. At
// -16 the gate is 0, and x times it -0, or NaN for -inf. NaN stays NaN.
__device__ __forceinline__ float gelu_clamp(float x) { return x > 16.0f ? 16.0f : (x < -16.0f ? -16.0f : x); }

__device__ __forceinline__ float gelu(float x, bool tanh) {
  const float inside = gelu_clamp(x);
  float unused;
  const float gate = tanh ? tanh_gate(inside, &unused) : normal_cdf(inside, &unused);
  return x * gate;
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
    float gaussian;
    gate = normal_cdf(inside, &gaussian);
    *slope = fmaf(inside * 0.3989422804014327f, gaussian, gate);
  }
  *slope += x - x;  // an infinity times the density: NaN, as in stock's formula
  return x * gate;
}

}  // namespace fasttune::cuda
