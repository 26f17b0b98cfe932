"""The chunk loop of linear_cross_entropy on a GPU: matrix products by torch, everything between them in one kernel.

Chunk by chunk (linear_chunks.py) cross_entropy_forward_kernel turns the logits x Wᵀ into loss and, in place, into their
gradient G, of which dx = G W and dW += Gᵀ x. The divisor of a mean is summed first and stays on the device. float16
cannot hold a gradient divided by thousands of rows: there G is that of the sum, and the products are divided, in
float32.

Nothing is read back to the host: neither the number of rows that count (ignored rows get G = 0 and pass through the
products) nor the upstream gradient, by which backward multiplies what forward left: scale_kernel looks at the factor
where it lies, and touches nothing if it is 1.

Bytes of a chunk of n rows beside the products: logits once from memory and once from L2, G once, dW twice in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttune.kernels import launch
from fasttune.kernels.cross_entropy import MEAN, NONE, float32, loss_sums, rows_forward
from fasttune.kernels.linear_chunks import narrowed, results, run_chunks, times


@triton.jit(do_not_specialize=["size"])
def scale_kernel(x, factor, size, BLOCK: tl.constexpr):
    """x *= factor, a scalar on the device; nothing is read or written if it is 1."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(x + at, (value * by).to(x.dtype.element_ty), mask=at < size)


def scale_in_place(x: Tensor, factor: Tensor) -> Tensor:
    """x, a contiguous tensor, times a factor () on its device."""
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), 4096),)](x, factor, x.numel(), BLOCK=4096, num_warps=launch.warps(8))
    return x


def _run_chunks(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    needs: tuple[bool, bool, bool],
    *,
    losses: Tensor,
    dlosses: Tensor | None = None,
    divisor: Tensor | None = None,
    scale: float = 1.0,
) -> list[Tensor | None]:
    """Fills losses (N,) and returns the gradients of input, weight and bias in float32 (input: in its dtype unless
    that is float16), None where not needed: of scale dlosses / divisor times the losses, summed."""
    after = input.dtype == torch.float16  # scale and divide after the products

    def run_rows(part: tuple[int, int, int], logits: Tensor) -> None:
        rows_forward(
            *(logits, target.narrow(*part), class_weight, ignore_index, label_smoothing, losses.narrow(*part)),
            bias=bias,
            in_place=any(needs),
            dloss=narrowed(dlosses, part),
            divisor=None if after else divisor,
            scale=1.0 if after else scale,
        )

    gradients = run_chunks(input, weight, run_rows, needs)
    return times(gradients, scale if divisor is None else scale / divisor) if after else gradients


def _waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient waits for its upstream factor in: that factor may be what keeps float16 from underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor | None,
    divisor: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fasttune::linear_cross_entropy: (loss (N,) or (), and the gradients of input, weight and bias but for "none")."""
    target, class_weight, device = target.contiguous(), float32(class_weight), input.device
    losses = torch.empty(target.shape, dtype=torch.float32, device=device)
    options = (input, weight, target, float32(bias), class_weight, ignore_index, label_smoothing)
    if reduction == NONE:
        _run_chunks(*options, (False, False, False), losses=losses)
        return losses, *results([None] * 3, [None] * 3, device)
    by = None if normalizer is None else normalizer.to(torch.float32)
    if reduction == MEAN:
        by = torch.empty((), dtype=torch.float32, device=device)
        loss_sums(None, target, class_weight, ignore_index, total=by)
    scale = 1.0 / divisor if divisor else float("inf")
    gradients = _run_chunks(*options, needs, losses=losses, divisor=by, scale=scale)
    loss = torch.empty((), dtype=torch.float32, device=device)
    loss_sums(losses, target, class_weight, ignore_index, out=loss, divisor=by, scale=scale)
    dtypes = [None if like is None else _waiting_dtype(like.dtype) for like in (input, weight, bias)]
    return loss, *results(gradients, dtypes, device)


def linear_cross_entropy_backward(
    dlosses: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::linear_cross_entropy_backward, for reduction "none": the chunks again, under dlosses (N,)."""
    target = target.contiguous()
    gradients = _run_chunks(
        *(input, weight, target, float32(bias), float32(class_weight), ignore_index, label_smoothing, needs),
        losses=torch.empty(target.shape, dtype=torch.float32, device=input.device),
        dlosses=dlosses.float().contiguous(),
    )
    dtypes = [None if like is None else like.dtype for like in (input, weight, bias)]
    dinput, dweight, dbias = results(gradients, dtypes, input.device)
    return dinput, dweight, dbias
