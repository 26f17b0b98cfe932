// The activations of act(x) m and their gradients, by the formulas of csrc/cpu/simd/activation.inc; GELU's
// own are in gelu_math.cuh.
//
//   silu: x σ(x)      quick_gelu: x σ(1.702 x)      relu: max(x, 0)      relu2: max(x, 0)²
//   (x σ(k x))' = σ + k x σ (1 - σ)
//
// Products are taken in torch's order, dout m first and ReLU's mask last (an infinite gradient is 0 where
// x <= 0), so that no NaN comes of 0 inf where torch has none; a square is never taken for itself, because it
// may overflow where m or dout is 0. NaN stays NaN; ±inf give what torch's formulas give in float64.
#pragma once
#include "cuda/gelu_math.cuh"

namespace fasttune::cuda {

// σ(z) without the overflow of e^(-z), and in `product` σ (1 - σ) without the cancellation of 1 - σ.
__device__ __forceinline__ float logistic(float z, float* product) {
  const float e = expf(-fabsf(z)), r = 1.0f / (1.0f + e);
  *product = e * r * r;
  return z < 0.0f ? e * r : r;
}

// Each is one body of the loops: `body.value(x, m)` is act(x) m, `body.gradients(x, m, dout, &dx, &dm)` sets
// dx = dout m act'(x) and dm = dout act(x).
struct Gelu {
  bool tanh;

  __device__ __forceinline__ float value(float x, float m) const { return gelu(x, tanh) * m; }
  __device__ __forceinline__ void gradients(float x, float m, float dout, float* dx, float* dm) const {
    float slope;
    const float of_x = gelu_with_slope(x, tanh, &slope);
    *dx = dout * m * slope;
    *dm = dout * of_x;
  }
};

struct Logistic {
  float k;

  __device__ __forceinline__ float value(float x, float m) const {
    float unused;
    return x * logistic(k * x, &unused) * m;
  }
  __device__ __forceinline__ void gradients(float x, float m, float dout, float* dx, float* dm) const {
    float product;
    const float gate = logistic(k * x, &product);
    *dx = dout * m * fmaf(x, k * product, gate);
    *dm = dout * (x * gate);
  }
};

struct Relu {
  bool squared;

  __device__ __forceinline__ float value(float x, float m) const {
    const float kept = x <= 0.0f ? 0.0f : x;
    return squared ? kept * m * kept : kept * m;
  }
  __device__ __forceinline__ void gradients(float x, float m, float dout, float* dx, float* dm) const {
    const float kept = x <= 0.0f ? 0.0f : x, upstream = dout * m;
    *dx = x <= 0.0f ? 0.0f : (squared ? upstream * kept * 2.0f : upstream);
    *dm = squared ? dout * kept * kept : dout * kept;
  }
};

// body(one of the above): the activation is chosen once for eight elements.
template <class Body>
__device__ __forceinline__ void with_activation(int activation, const Body& body) {
  if (activation == FASTTUNE_GELU_ERF || activation == FASTTUNE_GELU_TANH)
    body(Gelu{activation == FASTTUNE_GELU_TANH});
  else if (activation == FASTTUNE_RELU || activation == FASTTUNE_RELU2)
    body(Relu{activation == FASTTUNE_RELU2});
  else
    body(Logistic{activation == FASTTUNE_SILU ? 1.0f : 1.702f});
}

}  // namespace fasttune::cuda
