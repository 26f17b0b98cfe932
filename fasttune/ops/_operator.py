"""One operator of namespace `fasttune`: registered with torch.library, and callable directly in eager mode.

A call through the dispatcher with registered autograd costs about 80 µs on a 2.8 GHz core, the same forward and
backward inside a plain torch.autograd.Function about 20 µs. So eager calls on plain tensors take the second road, and
only those that something must see or trace (torch.compile, tensor subclasses, dispatch and functorch modes) the first.
Both run the same implementation, context and backward.

A backward kernel is an operator without a derivative: where somebody asks for its graph (create_graph=True), its
results hang on all that they were computed from, and differentiating them raises. `_transforms` refuses the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fasttune.ops import _transforms

LIBRARY = torch.library.Library("fasttune", "DEF")

_is_batched = torch._C._functorch.is_legacy_batchedtensor
_modes = torch._C._len_torch_dispatch_stack
_peek = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def must_be_traced(*tensors: torch.Tensor) -> bool:
    """Whether a mode, a transform or the kind of a tensor asks for calls through the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or _modes() > 0
        or _peek() is not None
        or any(type(tensor) not in _PLAIN for tensor in tensors)
    )


class Operator:
    """`implementations[backend](*args)` as `torch.ops.fasttune.<name>(*args, backend)`.

    schema: the arguments and results in torch's schema language, without the closing `str backend`.
    fake: the same signature as an implementation; returns empty tensors of the right shape and dtype.
    setup_context(ctx, args, outputs), backward(ctx, *grads): as for torch.library.register_autograd; `args` includes
        the backend. `backward` returns one gradient per argument *without* the backend; it calls operators alone, so
        that its own derivative is right or refused. Without them the operator has no derivative, and says so.
    public: how many of the results, from the first on, callers see and can differentiate; the rest is for `backward`.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        implementations: dict[str, Callable[..., Any]],
        fake: Callable[..., Any],
        *,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        public: int = 1,
    ) -> None:
        self.name = name
        self.implementations = implementations
        self.public = public
        inputs, outputs = schema.split("->")
        arguments = inputs.strip().removesuffix(")")
        LIBRARY.define(f"{name}{arguments}, str backend) -> {outputs}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fasttune::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)
        self._operator = getattr(torch.ops.fasttune, name).default
        self.differentiable = backward is not None  # once, that is
        if backward is None or setup_context is None:
            setup_context, backward = _save_nothing, _refusal(name)
        # Function.apply unwraps functorch's wrappers first; there are none where this is called, and it costs 4 µs.
        function = _eager_function(name, self._run, setup_context, backward, public)
        self._apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        torch.library.register_autograd(
            f"fasttune::{name}",
            lambda ctx, *grads: (*backward(ctx, *grads[:public]), None),
            setup_context=lambda ctx, inputs, output: setup_context(ctx, inputs, output),
            lib=LIBRARY,
        )

    def _run(self, *args: Any) -> Any:
        return self.implementations[args[-1]](*args[:-1])

    def __call__(self, *args: Any) -> Any:
        """Runs the operator; `args` ends with the backend. Returns the public results, a single one bare."""
        compiling = torch.compiler.is_compiling()
        if not compiling and (_tracing() is not None or _peek() is not None or forward_ad._current_level >= 0):
            _transforms.refuse(self.name, args)
        traced, differentiable = compiling or _modes() > 0, False
        for arg in args:
            if isinstance(arg, torch.Tensor):
                differentiable = differentiable or arg.requires_grad
                traced = traced or type(arg) not in _PLAIN
        if traced:
            outputs = self._operator(*args)
        elif differentiable and torch.is_grad_enabled():
            return self._apply(*args)
        else:
            outputs = self._run(*args)
        if isinstance(outputs, torch.Tensor):
            return outputs
        return outputs[0] if self.public == 1 else tuple(outputs[: self.public])


def _eager_function(
    name: str, run: Callable[..., Any], setup: Callable[..., None], backward_rule: Callable[..., Any], public: int
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        outputs = run(*args)
        setup(ctx, args, outputs)
        if isinstance(outputs, torch.Tensor):
            return outputs
        return outputs[0] if public == 1 else tuple(outputs[:public])

    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        for grad in grads:  # is_grads_batched brings tensors that have no address
            if grad is not None and _is_batched(grad):
                _transforms.refuse_transform(name)
        return (*backward_rule(ctx, *grads), None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Fasttune_{name}", (torch.autograd.Function,), members)


def _save_nothing(ctx: Any, args: tuple[Any, ...], outputs: Any) -> None:
    pass


def _refusal(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise RuntimeError(
            f"fasttune: {_transforms.public_name(name)} has no second derivative; use backend='torch' or"
            " FASTTUNE_BACKEND=torch, or fasttune.unpatch(model), to differentiate twice."
        )

    return backward
