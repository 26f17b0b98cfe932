"""Whether two twins of a case are the same model.

As everywhere (tests/patching/model_parity.py): the truth is stock in float64; against it our error may be twice
stock's, plus a floor of 4 ulps. A draw that misses it is judged with more of them: the errors of one are random
numbers, and a shortcut that is wrong is wrong in all.
"""

import torch
from model_parity import SEEDS, beyond_the_bound, note_errors
from modes import LOW_PRECISION
from run import Run

UNSHORTENED = {"packing": False, "trim": False, "loss": False}
DRAWS = (1, *SEEDS, 27)


def check(case, run_exact, run_stock, run_ours):
    """Each a function of the draw that makes a Run which has gone. Raises AssertionError with what is beyond."""
    errors = {}
    computed_in = torch.bfloat16 if case.mode in LOW_PRECISION else None
    for draw in range(DRAWS[-1]):
        if draw in DRAWS and not beyond_the_bound(errors):
            return
        exact, stock, ours = run_exact(draw), run_stock(draw), run_ours(draw)
        _same_names(ours, stock, exact)
        for kind in ("values", "gradients"):
            runs = [getattr(run, kind) for run in (ours, stock, exact)]
            ours_, stock_, exact_ = _finite(*runs)
            note_errors(errors, ours_, [stock_], exact_, computed_in)
    found = beyond_the_bound(errors)
    assert not found, "\n".join(found)


def _same_names(ours, stock, exact):
    """Values that are gone because the weights were written may be missing, nothing else."""
    assert stock.values.keys() == exact.values.keys()
    assert ours.values.keys() <= stock.values.keys()
    assert not ours.differentiable or ours.values.keys() == stock.values.keys()
    assert ours.gradients.keys() == stock.gradients.keys(), ours.gradients.keys() ^ stock.gradients.keys()


def _finite(ours, stock, exact):
    """Without what is not defined: a mean over no label, and what it does to gradients. There ours is not either."""
    kept = []
    for name in ours:
        assert ours[name].shape == stock[name].shape, f"{name}: {ours[name].shape}, stock {stock[name].shape}"
        if torch.isfinite(exact[name]).all() and torch.isfinite(stock[name]).all():
            kept.append(name)
        else:
            assert torch.equal(torch.isfinite(ours[name]), torch.isfinite(stock[name])), f"{name}: not finite"
    return [{name: side[name] for name in kept} for side in (ours, stock, exact)]


def check_values(case, **options):
    """With dropout off, against stock."""
    check(
        case,
        lambda draw: Run(case, draw, torch.float64).go(),
        lambda draw: Run(case, draw).go(),
        lambda draw: Run(case, draw, options=options).go(),
    )


def check_dropout(case, first=()):
    """With dropout on, against a patched model that leaves nothing out: one seed, one set of masks. first: who reads
    before."""

    def run(dtype, options, first=()):
        return lambda draw: Run(case, draw, dtype, options, dropout=0.1, seed=5).go(first)

    check(
        case,
        run(torch.float64, {**UNSHORTENED, "backend": "torch"}),
        run(torch.float32, UNSHORTENED),
        run(torch.float32, {}, first),
    )
