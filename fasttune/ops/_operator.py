"""One operator of namespace `fasttune`: registered with torch.library, and callable directly in eager mode.

A call through the dispatcher with registered autograd costs about 80 µs on a 2.8 GHz core, the same forward and
backward inside a plain torch.autograd.Function about 20 µs. So eager calls on plain tensors take the second road, and
only those that something must see or trace (torch.compile, tensor subclasses, dispatch and functorch modes) the first.
Both run the same implementation, context and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("fasttune", "DEF")

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def must_be_traced(*tensors: torch.Tensor) -> bool:
    """Whether a mode, a transform or the kind of a tensor asks for calls through the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(type(tensor) not in _PLAIN for tensor in tensors)
    )


class Operator:
    """`implementations[backend](*args)` as `torch.ops.fasttune.<name>(*args, backend)`.

    schema: the arguments and results in torch's schema language, without the closing `str backend`.
    fake: the same signature as an implementation; returns empty tensors of the right shape and dtype.
    setup_context(ctx, args, outputs), backward(ctx, *grads): as for torch.library.register_autograd; `args` includes
        the backend. `backward` returns one gradient per argument *without* the backend.
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
        self.implementations = implementations
        self.public = public
        inputs, outputs = schema.split("->")
        arguments = inputs.strip().removesuffix(")")
        LIBRARY.define(f"{name}{arguments}, str backend) -> {outputs}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fasttune::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)
        self._operator = getattr(torch.ops.fasttune, name).default
        self._apply: Callable[..., Any] | None = None
        if backward is not None:
            assert setup_context is not None
            # Function.apply unwraps functorch's wrappers first; there are none where this is called, and it costs 4 µs.
            function = _eager_function(name, self._run, setup_context, backward, public)
            self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
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
        traced, differentiable = must_be_traced(), False
        for arg in args:
            if isinstance(arg, torch.Tensor):
                differentiable = differentiable or arg.requires_grad
                traced = traced or type(arg) not in _PLAIN
        if traced:
            outputs = self._operator(*args)
        elif differentiable and self._apply is not None and torch.is_grad_enabled():
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

    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return (*backward_rule(ctx, *grads), None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Fasttune_{name}", (torch.autograd.Function,), members)
