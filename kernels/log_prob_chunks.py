"""linear_log_prob over chunks of rows on a GPU, whichever backend's row kernels stand between the products.

float16 cannot hold p times a small upstream gradient. There the rows get their share of the largest one, and the
products are multiplied by it and by the scale of the logits, in float32; the factor stays on the device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasttune.kernels.linear_chunks import narrowed, results, run_chunks, times


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def forward(
    rows_forward: Callable[..., None],
    input: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    bias: Tensor | None,
    scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """fasttune::linear_log_prob: log_prob (N,), empty without ids, logsumexp, entropy, mean_logit and top1 (N,), and
    statistics (N, 3). rows_forward(logits, bias, scale, ids, ignore_index, those of these rows) fills them."""
    ids, bias, rows = None if ids is None else ids.contiguous(), _float32(bias), input.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=input.device)

    log_prob, statistics = empty(0 if ids is None else rows), empty(rows, 3)
    logsumexp, entropy, mean_logit, top1 = empty(rows), empty(rows), empty(rows), empty(rows, dtype=torch.int64)
    filled = (None if ids is None else log_prob, logsumexp, entropy, mean_logit, top1, statistics)

    def run_rows(part: tuple[int, int, int], logits: Tensor) -> None:
        rows_forward(logits, bias, scale, narrowed(ids, part), ignore_index, [narrowed(x, part) for x in filled])

    run_chunks(input, weight, run_rows, (False, False, False))
    return log_prob, logsumexp, entropy, mean_logit, top1, statistics


def _largest(upstream: Sequence[Tensor | None]) -> Tensor:
    """Of all |upstream gradients|, a scalar on their device; 1 if they are all 0."""
    largest = torch.stack([x.abs().max() for x in upstream if x is not None]).max()
    return torch.where(largest == 0.0, 1.0, largest)


def backward(
    rows_backward: Callable[..., None],
    dlog_prob: Tensor | None,
    dlogsumexp: Tensor | None,
    dentropy: Tensor | None,
    dmean_logit: Tensor | None,
    input: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    scale: float,
    ignore_index: int,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """fasttune::linear_log_prob_backward: the gradients of input, weight and bias. rows_backward(logits, bias, scale,
    ids, ignore_index, statistics, upstream, largest, gain) replaces logits by gain times their gradient by
    scale * logits, of upstream gradients over `largest` where that is not None."""
    ids, added = None if ids is None else ids.contiguous(), _float32(bias)
    upstream = [_float32(x) for x in (dlog_prob, dlogsumexp, dentropy, dmean_logit)]
    after = input.dtype == torch.float16 and input.shape[0] > 0 and any(x is not None for x in upstream)
    largest = _largest(upstream) if after else None

    def run_rows(part: tuple[int, int, int], logits: Tensor) -> None:
        rows_backward(
            *(logits, added, scale, narrowed(ids, part), ignore_index, narrowed(statistics, part)),
            *([narrowed(x, part) for x in upstream], largest, 1.0 if after else scale),
        )

    gradients = run_chunks(input, weight, run_rows, needs)
    if largest is not None:
        gradients = times(gradients, scale * largest)
    dtypes = [None if like is None else like.dtype for like in (input, weight, bias)]
    dinput, dweight, dbias = results(gradients, dtypes, input.device)
    return dinput, dweight, dbias
