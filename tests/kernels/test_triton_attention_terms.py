"""Terms of attention's scores in the Triton kernels: what few models ask for, and launches that are cut or repeated."""

import pytest
import torch
from interpreter.memory import traffic
from oracle import SWEEP_SLACK, assert_same_math

from fasttune import ops
from fasttune.kernels import attention, tuning

NAMES = ["query", "key", "value", "bias", "c2p", "p2c"]


def inputs_of(queries, keys, heads, bias_columns, width, batch=(1,)):
    torch.manual_seed(0)
    rows = [torch.randn(*batch, n, heads, d) for n, d in ((queries, 16), (keys, 16), (keys, 16))]
    terms = [torch.randn(*batch, n, heads, width) * 4.0 for n in (queries, keys)]
    return [*rows, torch.randn(heads, bias_columns), *terms]


def run(backend, names=NAMES, **options):
    def function(*tensors):
        torch.manual_seed(3)
        return ops.attention(**dict(zip(names, tensors, strict=True)), backend=backend, **options)

    return function


def check(inputs, names=NAMES, **options):
    both = [run(backend, names, **options) for backend in ("triton", "torch")]
    assert_same_math(*both, inputs, names, SWEEP_SLACK)


# A bucket for all, in no order, one distance; the bias reaches further than the buckets, or less far; one term alone.
@pytest.mark.parametrize(
    ("buckets", "bias_columns", "without"),
    [
        (torch.zeros(181), 21, ()),
        (torch.randint(7, (181,), generator=torch.Generator().manual_seed(0)), 401, ("p2c",)),
        (torch.tensor([3]), 1, ("c2p",)),
    ],
)
def test_any_map_of_buckets(buckets, bias_columns, without):
    inputs = dict(zip(NAMES, inputs_of(70, 140, 1, bias_columns, 7), strict=True))
    inputs = {name: x for name, x in inputs.items() if name not in without}
    check(list(inputs.values()), list(inputs), buckets=buckets.int())


def test_chosen_queries_far_before_and_behind_the_keys():
    """Some several times at one position, more than a tile of them; a causal one at -1 sees nothing."""
    positions = [-(2**30), -1, 0, *[7] * 70, 68, 69, 70, 2**31 - 1, -1, -1, 2, 2, 3]
    offsets = {"cu_seqlens": torch.tensor([0, 70, 73]), "cu_seqlens_q": torch.tensor([0, 77, 82])}
    inputs = inputs_of(len(positions), 73, 1, 21, 25, batch=())
    buckets = (torch.arange(-12, 13) + 12).int()
    for hidden in ({"causal": True}, {"window": 5}):
        options = {**offsets, **hidden, "positions_q": torch.tensor(positions), "buckets": buckets, "dropout_p": 0.2}
        check(inputs, **options)
        if "causal" in hidden:
            out = run("triton", **options)(*inputs)
            assert not out[[0, 1, 77, 78]].any()
            assert out[2].any()


def test_a_bias_hides_keys():
    """-inf, but for eleven distances, is a window of 5: whole tiles give nothing, and no NaN."""
    query, key, value = (torch.randn(1, 200, 1, 16) for _ in range(3))
    bias = torch.full((1, 401), -float("inf"))
    bias[:, 195:206] = 0.0
    results = []
    for given in ({"bias": bias.requires_grad_()}, {"window": 5}):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = ops.attention(*leaves, backend="triton", **given)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)])
    torch.testing.assert_close(*results)
    assert torch.isfinite(torch.autograd.grad(results[0][0].square().sum(), bias)[0]).all()


def test_launches_that_are_cut_and_repeated(monkeypatch):
    """As where a grid would be too wide, and as where tiles are timed: nothing is added twice."""
    monkeypatch.setattr(attention, "LAUNCH_BLOCKS", 2)
    monkeypatch.setattr(tuning, "choose", lambda kind, default, candidates, launch, device: launch(default) or default)
    check(inputs_of(20, 20, 3, 21, 25, batch=(3,)), buckets=(torch.arange(-12, 13) + 12).int())


@pytest.mark.parametrize(
    ("needed", "kernels"),
    [("bias", {"dq"}), ("c2p", {"dq"}), ("p2c", {"dq", "dkdv"}), ("value", {"dq", "dkdv"})],
)
def test_gradients_that_nobody_needs_are_not_computed(needed, kernels):
    inputs = dict(zip(NAMES, inputs_of(20, 20, 1, 21, 25), strict=True))
    inputs[needed].requires_grad_()
    out = run("triton", buckets=(torch.arange(-12, 13) + 12).int())(*inputs.values())
    with traffic() as moved:
        torch.autograd.grad(out.sum(), inputs[needed])
    assert {name for name, _ in moved} == {f"attention_{kernel}_kernel" for kernel in kernels}
    # δ, and the gradient; no dQ, dK or dV besides.
    assert moved["attention_dq_kernel", "store"] <= 4 * (20 + {"bias": 21 * 2, "c2p": 20 * 25 * 2}.get(needed, 0))
