"""The activations of act(x) m and their gradients on float32 values; GELU's own formulas are in gelu_math.py.

silu: x σ(x),  quick_gelu: x σ(1.702 x),  (x σ(k x))' = σ + k x σ (1 - σ);  relu: max(x, 0),  relu2: max(x, 0)².
Products are taken in torch's order, dout m first and ReLU's mask last (an infinite gradient is 0 where x <= 0), so that
no NaN comes of 0 inf where torch has none; a square is never taken for itself, because it may overflow where m or dout
is 0. NaN stays NaN; the infinities give what torch's formulas give in float64.
"""

import triton
import triton.language as tl

from fasttune.kernels.gelu_math import gelu, gelu_derivative

# The numbers of fasttune/ops/_activations.py; 1 and 2 are gelu_math's.
GELU_TANH = tl.constexpr(2)
SILU = tl.constexpr(3)
RELU = tl.constexpr(4)
RELU2 = tl.constexpr(6)


@triton.jit
def _logistic(z):
    """(σ(z), σ (1 - σ)), without the overflow of e^(-z) and the cancellation of 1 - σ."""
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    return tl.where(z < 0.0, e * r, r), e * r * r


@triton.jit
def activate(x, m, KIND: tl.constexpr):
    """act(x) m"""
    if KIND <= GELU_TANH:
        y = gelu(x, KIND) * m
    elif KIND == RELU:
        y = tl.where(x <= 0.0, 0.0, x) * m
    elif KIND == RELU2:
        kept = tl.where(x <= 0.0, 0.0, x)
        y = kept * m * kept
    else:
        sigmoid, _ = _logistic(x if KIND == SILU else 1.702 * x)
        y = x * sigmoid * m
    return y


@triton.jit
def gradients(x, m, dout, KIND: tl.constexpr):
    """(dout m act'(x), dout act(x))"""
    dx = dout * m
    if KIND <= GELU_TANH:
        dx *= gelu_derivative(x, KIND)
        dm = dout * gelu(x, KIND)
    elif KIND == RELU:
        dx = tl.where(x <= 0.0, 0.0, dx)
        dm = dout * tl.where(x <= 0.0, 0.0, x)
    elif KIND == RELU2:
        kept = tl.where(x <= 0.0, 0.0, x)
        dx = tl.where(x <= 0.0, 0.0, dx * kept * 2.0)
        dm = dout * kept * kept
    else:
        sigmoid, product = _logistic(x if KIND == SILU else 1.702 * x)
        dx *= sigmoid + x * (product if KIND == SILU else 1.702 * product)
        dm = dout * (x * sigmoid)
    return dx, dm
