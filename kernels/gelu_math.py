"""GELU and its derivative on float32 values, by the error function or by the tanh approximation.

erf:  gelu(x) = x Φ(x),  gelu'(x) = Φ(x) + x φ(x),  Φ and φ the normal distribution and its density.
tanh: gelu(x) = x (1 + tanh u) / 2 = x σ(2u),  u = √(2/π) (x + 0.044715 x³),
      gelu'(x) = σ(2u) + 2 x σ(2u) (1 - σ(2u)) u',  u' = √(2/π) (1 + 0.134145 x²).
Source: Hendrycks and Gimpel 2016, "Gaussian error linear units". Beyond |x| = 10 both are x or 0 in float32; u is taken
at the clamped x there, so that neither its cube nor exp(2u) can overflow. Below -10 x is multiplied by 0: the product
of a huge x with what is left of σ or of 1 + erf would be another number. That, and x - x in the slope, give an infinity
the NaN that it has by the formulas: -inf · 0.
"""

import triton
import triton.language as tl

ERF = tl.constexpr(1)
TANH = tl.constexpr(2)


def kind(tanh: bool) -> int:
    """The constexpr that the kernels take."""
    return 2 if tanh else 1


@triton.jit
def _near(x):
    """x between -10 and 10; a NaN stays one, as it would not in tl.minimum."""
    return tl.where(x > 10.0, 10.0, tl.where(x < -10.0, -10.0, x))


@triton.jit
def gelu(x, KIND: tl.constexpr):
    if KIND == ERF:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        near = _near(x)
        y = x * tl.sigmoid(1.5957691216057308 * (near + 0.044715 * near * near * near))
    return tl.where(x < -10.0, x * 0.0, y)


@triton.jit
def gelu_derivative(x, KIND: tl.constexpr):
    near = _near(x)
    if KIND == ERF:
        density = 0.3989422804014327 * tl.exp(-0.5 * near * near)
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + near * density
    else:
        square = near * near
        u2 = 1.5957691216057308 * (near + 0.044715 * near * square)
        e = tl.exp(-tl.abs(u2))  # σ (1 - σ) = e / (1 + e)², without the cancellation of 1 - σ
        inverse = 1.0 / (1.0 + e)
        s = tl.where(u2 >= 0.0, inverse, e * inverse)
        slope = s + near * (e * inverse * inverse) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    return tl.where(x < -10.0, 0.0, slope) + (x - x)
