"""A linear layer and softmax cross-entropy in one operation that never holds more than one chunk of the logits.

Rows whose label is ignored are dropped first. The rest goes through in chunks: logits = x W^T into one buffer that all
chunks share, the softmax kernel turns them into their own gradient in place, and two more products give the chunk's
input gradient and add to the weight gradient. For scalar losses this all happens in forward: the upstream gradient is
one number, by which backward multiplies what forward left. reduction="none" recomputes the chunks in backward.

Source: the chunking is that of Hsu et al. 2024 (Liger Kernel, arXiv:2410.10989), the loss Szegedy et al. 2015.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _backends, _cpp, _triton
from fasttune.ops._checks import autocasts, check_linear, check_number, describe
from fasttune.ops._indices import check_range
from fasttune.ops._linear_chunks import empty_gradients, gradient_dtype, rows_that_count, run_chunks
from fasttune.ops._operator import Operator, must_be_traced
from fasttune.ops._reference.cross_entropy import linear_cross_entropy as linear_cross_entropy_reference
from fasttune.ops.cross_entropy import MEAN, NONE, REDUCTIONS, SUM, as_float32, check_loss_arguments, divide

# Shape legend: as in _linear_chunks.py; class weight (V,); target (N,).


def _run_chunks(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    *,
    scale: float,
    row_scale: Tensor | None = None,
    losses: Tensor | None = None,
    dinput: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> float:
    """Fills the results that are there and returns the sum of the losses. dweight and dbias are float32.

    The gradients are those of the sum of scale * row_scale * loss over the rows.
    """
    kept = rows_that_count(target, ignore_index)
    if losses is not None and kept is not None:
        losses.zero_()
    want_gradient = dinput is not None or dweight is not None or dbias is not None
    loss_sum = 0.0

    def run_rows(select: slice | Tensor, logits: Tensor, partial: Tensor | None) -> None:
        nonlocal loss_sum
        (n, classes), labels = logits.shape, target[select]
        scales = None if row_scale is None else row_scale[select]
        loss = torch.empty(n, dtype=torch.float32)
        gradient = logits.data_ptr() if want_gradient else 0
        loss_sum += _cpp.library.cross_entropy(
            *(_cpp.DTYPE_CODES[logits.dtype], n, classes, logits.data_ptr(), classes, _cpp.address(bias)),
            *(labels.data_ptr(), _cpp.address(class_weight), ignore_index, label_smoothing, loss.data_ptr(), 0),
            *(gradient, classes, _cpp.address(scales), 1, scale, _cpp.address(partial)),
        )
        if losses is not None:
            losses[select] = loss

    run_chunks(
        *(input, weight, kept, run_rows),
        bias_sums=dbias is not None,
        dinput=dinput,
        dweight=dweight,
        dbias=dbias,
    )
    return loss_sum


def _cpp_linear_cross_entropy(
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
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target, class_weight = target.contiguous(), as_float32(class_weight)
    check_range("linear_cross_entropy", "target", target, weight.shape[0], ignore_index)
    options = (input, weight, target, as_float32(bias), class_weight, ignore_index, label_smoothing)
    if reduction == NONE:
        losses = torch.empty(target.shape, dtype=torch.float32)
        _run_chunks(*options, scale=1.0, losses=losses)
        return losses, torch.empty(0), torch.empty(0), torch.empty(0)
    if reduction == MEAN:
        rows = target.shape[0]
        divisor = _cpp.library.label_weight_sum(target.data_ptr(), rows, _cpp.address(class_weight), ignore_index)
    elif normalizer is not None:
        divisor = float(normalizer)
    gradients = empty_gradients(input, weight, bias, (needs_input, needs_weight, needs_bias))
    dinput, dweight, dbias = gradients
    loss_sum = _run_chunks(*options, scale=divide(1.0, divisor), dinput=dinput, dweight=dweight, dbias=dbias)
    loss = torch.scalar_tensor(divide(loss_sum, divisor), dtype=torch.float32)
    for i, like in ((1, weight), (2, bias)):
        gradient = gradients[i]
        if gradient is not None and like is not None:
            gradients[i] = gradient.to(gradient_dtype(like.dtype))
    first, second, third = (torch.empty(0) if gradient is None else gradient for gradient in gradients)
    return loss, first, second, third


def _fake(
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
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = input.new_empty(target.shape if reduction == NONE else (), dtype=torch.float32)
    gradients = [
        like.new_empty(like.shape, dtype=gradient_dtype(like.dtype))
        if needed and like is not None and reduction != NONE
        else input.new_empty(0, dtype=torch.float32)
        for needed, like in ((needs_input, input), (needs_weight, weight), (needs_bias, bias))
    ]
    return loss, gradients[0], gradients[1], gradients[2]


def _zero(*tensors: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=next(x.device for x in tensors if x is not None))


# The gradients that forward leaves are constants to autograd. Where backward is asked for their graph, this zero ties
# them to what they depend on; it keeps none of its inputs and refuses to be differentiated.
_anchor = Operator(
    "linear_cross_entropy_gradient",
    "(Tensor? input, Tensor? weight, Tensor? bias) -> Tensor",
    dict.fromkeys(("cpp", "triton"), _zero),
    _zero,
)
_scale = _triton.lazy("linear_cross_entropy", "scale_in_place")


def _setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    input, weight, target, bias, class_weight = args[:5]
    ctx.ignore_index, ctx.label_smoothing, ctx.reduction = args[7:10]
    ctx.needs, ctx.backend = args[10:13], args[13]
    ctx.dtypes = [None if like is None else like.dtype for like in (input, weight, bias)]
    ctx.gradients = None
    if ctx.reduction == NONE:
        ctx.save_for_backward(input, weight, target, bias, class_weight)
    elif must_be_traced(outputs[0]):
        ctx.save_for_backward(*outputs[1:], input, weight, bias)
    else:
        # Held here, not among the saved tensors, they are provably ours alone: no hook has seen them. Backward may
        # then hand them out or scale them in place. `target` is saved so that autograd notices a second backward.
        ctx.save_for_backward(target)
        ctx.gradients = outputs[1:]
        with torch.enable_grad():  # keeps the way to the inputs, and none of them
            ctx.anchor = _anchor(input, weight, bias, ctx.backend)


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if ctx.reduction == NONE:
        gradients = _linear_cross_entropy_backward(
            dloss, *saved, ctx.ignore_index, ctx.label_smoothing, *ctx.needs, ctx.backend
        )
    elif ctx.gradients is None:
        gradients, inputs = saved[:3], saved[3:]
        if torch.is_grad_enabled():
            dloss = dloss + _anchor(*inputs, ctx.backend)
        gradients = tuple(gradient * dloss for gradient in gradients)
    elif torch.is_grad_enabled():
        gradients = tuple(gradient * (dloss + ctx.anchor) for gradient in ctx.gradients)
    else:
        gradients = ctx.gradients
        once = not torch._C._autograd._get_current_graph_task_keep_graph()
        if once:
            ctx.gradients = ()
        # On a GPU the factor stays there; on a CPU looking is free, and it is mostly 1.
        factor = float(dloss) if dloss.device.type == "cpu" else dloss
        if once and not isinstance(factor, float):
            gradients = tuple(_scale(gradient, factor) for gradient in gradients)
        elif once and factor != 1.0:
            gradients = tuple(gradient.mul_(factor) for gradient in gradients)
        elif not once:
            gradients = tuple(gradient * factor for gradient in gradients)
    dinput, dweight, dbias = (
        gradient.to(dtype) if needed and dtype is not None else None
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
    )
    return dinput, dweight, None, dbias, *(None,) * 9


def _cpp_backward(
    dlosses: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dinput, dweight, dbias = empty_gradients(input, weight, bias, (needs_input, needs_weight, needs_bias))
    _run_chunks(
        *(
            input,
            weight,
            target.contiguous(),
            as_float32(bias),
            as_float32(class_weight),
            ignore_index,
            label_smoothing,
        ),
        scale=1.0,
        row_scale=dlosses.float().contiguous(),
        dinput=dinput,
        dweight=dweight,
        dbias=dbias,
    )
    first, second, third = (
        torch.empty(0) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in ((dinput, input), (dweight, weight), (dbias, bias))
    )
    return first, second, third


def _fake_backward(
    dlosses: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        like.new_empty(like.shape) if needed and like is not None else input.new_empty(0, dtype=torch.float32)
        for needed, like in ((needs_input, input), (needs_weight, weight), (needs_bias, bias))
    )
    return first, second, third


_linear_cross_entropy = Operator(
    "linear_cross_entropy",
    "(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, Tensor? normalizer,"
    " float divisor, int ignore_index, float label_smoothing, int reduction, bool needs_input, bool needs_weight,"
    " bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    {
        "cpp": _cpp_linear_cross_entropy,
        "triton": _triton.lazy("linear_cross_entropy", "linear_cross_entropy"),
    },
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_linear_cross_entropy_backward = Operator(
    "linear_cross_entropy_backward",
    "(Tensor dlosses, Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight,"
    " int ignore_index, float label_smoothing, bool needs_input, bool needs_weight, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor)",
    {"cpp": _cpp_backward, "triton": _triton.lazy("linear_cross_entropy", "linear_cross_entropy_backward")},
    _fake_backward,
    public=3,
)
_backends.declare("linear_cross_entropy", *_linear_cross_entropy.implementations)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target) without the logits in memory.

    input: (..., C), float32, bfloat16 or float16 (float64 on the torch backend); under autocast cast as linear would.
    linear_weight: (V, C), linear_bias: (V,); in the input's dtype or float32. Weight gradients add up in float32.
    target: integers (...), each from 0 to V - 1 or ignore_index; on a CPU rows with ignore_index cost no product.
    weight: (V,), rescales each class; a constant, it gets no gradient.
    label_smoothing: share of the target spread evenly over the classes.
    reduction: "mean" (divides by the sum of the labels' weights; NaN if no row counts), "sum" or "none".
    normalizer: number or tensor with one element, a constant, by which the sum is divided in place of the mean's
        divisor; not with reduction "none".
    backend: "cpp", "triton", "torch" or None to choose.

    Returns a scalar, or (...) for reduction "none"; in the input's dtype, under autocast in float32.
    On a GPU rows with ignore_index pass through the products with gradient 0: leaving them out there would take their
    number to the host, which stalls the device. Callers that know the rows pass only those.

    Raises IndexError for a label out of range (on CPU, naming its position), TypeError and ValueError for arguments
    that do not fit together, all before anything is computed, and RuntimeError for a backend that cannot run here.
    """
    _check(input, linear_weight, target, linear_bias, weight, label_smoothing, reduction, normalizer, ignore_index)
    device = input.device
    chosen = _backends.choose("linear_cross_entropy", input, backend)
    autocast = autocasts(device)
    if autocast and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device.type))
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().reshape(())
    shape, labels = target.shape, (target if target.dtype == torch.int64 else target.long())
    if device.type == "cpu" and (len(shape) != 1 or chosen == "torch") and not must_be_traced(labels):
        check_range("linear_cross_entropy", "target", labels, linear_weight.shape[0], ignore_index)
    if input.dim() != 2:
        input, labels = input.reshape(-1, input.shape[-1]), labels.reshape(-1)
    if chosen == "torch":
        loss = linear_cross_entropy_reference(
            input, linear_weight, labels, linear_bias, weight, ignore_index, label_smoothing, reduction, normalizer
        )
    else:
        code, divisor, divisor_tensor = REDUCTIONS[reduction], 1.0, None
        if isinstance(normalizer, Tensor):
            code, divisor_tensor = SUM, normalizer
        elif normalizer is not None:
            code, divisor = SUM, float(normalizer)
        grad = torch.is_grad_enabled()
        loss = _linear_cross_entropy(
            *(input, linear_weight, labels, linear_bias, weight, divisor_tensor, divisor),
            *(ignore_index, label_smoothing, code, grad and input.requires_grad, grad and linear_weight.requires_grad),
            *(grad and linear_bias is not None and linear_bias.requires_grad, chosen),
        )
    if loss.dtype != input.dtype and not autocast:
        loss = loss.to(input.dtype)
    return loss.view(shape) if reduction == "none" else loss


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    normalizer: float | Tensor | None,
    ignore_index: int,
) -> None:
    name = "linear_cross_entropy"
    check_linear(name, input, linear_weight, linear_bias)
    device, classes = input.device, linear_weight.shape[0]
    check_loss_arguments(
        name, target, input.shape[:-1], classes, device, weight, label_smoothing, reduction, ignore_index
    )
    if normalizer is not None:
        if reduction == "none":
            raise ValueError(f"{name}: normalizer divides a sum; with reduction 'none' there is none. Leave one out.")
        if not isinstance(normalizer, Tensor):
            check_number(name, "normalizer", normalizer)
        elif normalizer.numel() != 1:
            raise ValueError(f"{name}: normalizer is {describe(normalizer)}; expected a number or one element.")
