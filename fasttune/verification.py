"""verify: one step of the user's own model on the user's own batch, stock against patched.

Bound. x64 is the value that the step of a float64 copy of the stock model gives. A row (the loss, an output, a
gradient) is in order if

    max |patched - x64| <= 2 max |stock - x64| + 1 unit in the last place of max |x64|

where stock and patched run in the model's own dtype, under the caller's autocast if there is one. The error of a single
step is a random number, and stock is right by luck in one tensor of some hundred: where a row is beyond its bound, the
largest errors over several draws are compared, each draw with all weights moved at random by up to 1 % (a patched step
that is wrong in earnest is so in any number of them). Where x64 is 0 but for rounding (the gradient of a key's bias,
which softmax does not see), the unit is that of the model's largest gradient. Integers and booleans have no unit.

Where no float64 step can be had, stock itself is the reference, and its error is what it moves by when each weight
moves by one unit in the last place, the largest of three times:

    max |patched - stock| <= 3 max |moved stock - stock| + 1 unit in the last place of max |stock|

(3 is the 2 from above and 1 for stock's own distance from the truth.) `Verification.reference` says which it was.

Each side is a deep copy that lives no longer than needed: the caller's model is not touched. A model that cannot be
copied lends itself, with weights of its own in place of the caller's, and gets everything back.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fasttune._batches import call, leaves, own_loss, projection, synchronize, tensors, twin
from fasttune._untouched import (
    available_bytes,
    by_a_percent,
    by_one_ulp,
    lent,
    move_weights,
    random_state,
    seed_all,
    without_dropout,
)

if TYPE_CHECKING:
    from fasttune.patching import PatchReport

Kind = Literal["loss", "output", "gradient", "dropout"]
Loss = Callable[[Any, Any], Tensor]

FLOOR_ULPS = 1.0
FACTOR = {"float64": 2.0, "stock": 3.0}  # of stock's error, by reference
DRAWS = 9  # at most
DECIDED = 64.0  # no luck of stock's explains an error so many times the bound
MOVED_STOCK = 3  # steps of stock with every weight one unit off, where there is no float64
DROPOUT_DRAWS = 32
FEWEST = 8  # steps with dropout: fewer know their own spread too badly
DEVIATIONS = 5.0  # of a difference of means; one comparison of a million or so is beyond by chance
WARM_UP = 2
SHOWN = 6  # rows of the table that are in order, the worst
ALWAYS_SHOWN = ("loss", "dropout")
SEED = 20_240


@dataclass(frozen=True)
class Row:
    """One comparison. Errors are the largest over the tensor's elements (over the draws, too); infinite where the two
    differ in shape, dtype or presence, or in being finite, and `note` says in what."""

    name: str
    kind: Kind
    stock_error: float
    patched_error: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return math.isfinite(self.patched_error) and self.patched_error <= self.bound

    @property
    def share(self) -> float:
        """The patched error as a multiple of the bound."""
        if self.bound > 0:
            return self.patched_error / self.bound
        return 0.0 if self.patched_error == 0 else math.inf


@dataclass(frozen=True)
class Verification:
    """What `fasttune.verify` found; true if every row is within its bound, `str()` is a table.

    rows: worst first. reference: what errors are measured against. draws: how many sets of weights were compared.
    stock_seconds, patched_seconds: medians of a step; speedup: the median of the pairs' ratios; None if not timed.
    report: `fasttune.report` of the patched copy after its step, the comparison's own reads included. notes: what else
    there is to say, in sentences.
    """

    model: str
    rows: tuple[Row, ...]
    reference: Literal["float64", "stock"]
    draws: int
    stock_seconds: float | None
    patched_seconds: float | None
    speedup: float | None
    report: PatchReport
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        failing = [row for row in self.rows if not row.ok]
        passing = [row for row in self.rows if row.ok]
        shown = [row for row in passing if row in passing[:SHOWN] or row.kind in ALWAYS_SHOWN]
        verdict = f"{len(failing)} of {len(self.rows)} values beyond their bound" if failing else "the numbers agree"
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("kind", no_wrap=True)
        table.add_column("value", overflow="fold")
        for heading in ("stock", "patched", "bound", "÷ bound"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row in failing + shown:
            name = f"{row.name}\n{row.note}" if row.note else row.name
            numbers = (f"{value:.2g}" for value in (row.stock_error, row.patched_error, row.bound, row.share))
            table.add_row(row.kind, name, *numbers, "" if row.ok else "BEYOND")
        text = StringIO()
        console = Console(file=text, width=100, markup=False, highlight=False)
        console.print(f"fasttune.verify on {self.model}: {verdict}")
        console.print(table)
        if len(passing) > len(shown):
            console.print(f"... and {len(passing) - len(shown)} more within their bounds")
        console.print(f"Columns stock and patched: largest error against {self._measure()}.")
        if self.speedup is not None and self.stock_seconds is not None and self.patched_seconds is not None:
            console.print(
                f"A step takes {_milliseconds(self.stock_seconds)} stock, {_milliseconds(self.patched_seconds)}"
                f" patched: {self.speedup:.2f}× as fast."
            )
        for note in self.notes:
            console.print(note)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    def _measure(self) -> str:
        draws = "" if self.draws == 1 else f", the largest over {self.draws} draws of the weights"
        if self.reference == "float64":
            return f"the same step in float64 (bound: twice stock's error + 1 ulp{draws})"
        return f"stock, which has no float64 step here (bound: 3 × what stock moves by with its weights{draws} + 1 ulp)"


def verify(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    dropout: bool | int = False,
    repeats: int = 5,
    **options: Any,
) -> Verification:
    """Runs one training step of your model on your batch, stock and patched, and compares the loss, all outputs at all
    positions (in evaluation, too) and every gradient, with dropout off; then times the step, with dropout as it is.

    model: what `fasttune.patch` accepts, patched or not. If it is patched and no options are given, its patch is what
        is verified. The model is left exactly as it was, random generators included, also after an exception: copies
        run. (They run your hooks, as any step does. Of a DistributedDataParallel, the module inside runs.)
    batch: a mapping, for `model(**batch)`; a tuple, for `model(*batch)`; or a tensor, for `model(batch)`. Each step
        gets a copy.
    loss: `loss(outputs, batch)` gives a scalar. None: `outputs.loss` or `outputs["loss"]`, or if there is none, a
        fixed random projection of all floating outputs.
    dropout: how often to run either side with dropout, and compare mean and spread of the losses and gradient norms;
        True is 32 times. Each mean has to agree within five standard errors.
    repeats: pairs of timed steps, stock and patched in turns; 0 to time nothing.
    options: as of `fasttune.patch`; the patched copy is patched with them.

    A model in evaluation mode is verified as `model.train()` leaves it, for that is how it trains.

    The bounds are in the docstring of `fasttune.verification`. Memory beyond your own: up to six times the weights in
    float32 for copies and gradients, plus the outputs in float64, on the CPU; copies live one after the other, and two
    at a time while they are timed. Without room for float64, stock is the reference.

    Raises TypeError or ValueError for arguments, whatever `fasttune.patch` raises, and whatever a step raises.
    """
    _check(model, batch, loss, dropout, repeats)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    with random_state(), torch.inference_mode(False), torch.enable_grad():
        verifier = _Verifier(model, batch, loss, options)
        try:
            return verifier.run(DROPOUT_DRAWS if dropout is True else int(dropout), repeats)
        finally:
            verifier.give_back()


def _check(model: Any, batch: Any, loss: Any, dropout: Any, repeats: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: model is a {type(model).__name__}; expected a torch.nn.Module.")
    if not isinstance(batch, (Mapping, tuple, Tensor)):
        raise TypeError(
            f"verify: batch is a {type(batch).__name__}; expected a mapping, which is called as model(**batch), a"
            " tuple, as model(*batch), or a tensor. Take one batch out of a DataLoader with next(iter(loader))."
        )
    if loss is not None and not callable(loss):
        raise TypeError(
            f"verify: loss is a {type(loss).__name__}; expected None or a function loss(outputs, batch) that returns a"
            " scalar tensor. Patch options go by name, packing=True for example."
        )
    if not isinstance(dropout, bool) and not (isinstance(dropout, int) and (dropout == 0 or dropout >= FEWEST)):
        raise ValueError(f"verify: dropout is {dropout!r}; expected False, True or at least {FEWEST} steps.")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
        raise ValueError(f"verify: repeats is {repeats!r}; expected how many pairs of steps to time, 0 for none.")


# ---------------------------------------------------------------------------------------------------- running the sides


class _Verifier:
    """One call of `verify`."""

    def __init__(self, model: nn.Module, batch: Any, loss: Loss | None, options: dict[str, Any]) -> None:
        from fasttune import patching

        self.patching = patching
        self.model, self.batch, self.loss, self.options = model, batch, loss, options
        self.theirs = {id(parameter) for parameter in model.parameters()}
        self.notes: list[str] = []
        self.was_patched = bool(patching.report(model).rows)
        self.copyable = True
        self.reference: Literal["float64", "stock"] = "float64"
        self.report: PatchReport | None = None
        self.foreign: dict[int, tuple[Tensor, Tensor | None]] = {}  # leaves of the caller's, with their gradients
        try:
            probe = copy.deepcopy(model)
        except Exception as error:
            if self.was_patched:
                raise ValueError(
                    f"verify: model is patched and cannot be copied ({_said(error)}), so verify cannot take the patch"
                    " off and put it back as it was. Call fasttune.unpatch(model) first and pass the options here."
                ) from error
            self.copyable = False
            self.notes.append(f"The model ran in place of copies of it, for it cannot be copied ({_said(error)}).")
        else:
            self._patch(probe)  # what patch has to object comes before any work

    def run(self, dropout: int, repeats: int) -> Verification:
        rows, draws = self._rows()
        if dropout:
            rows += self._dropout_rows(dropout)
        stock_seconds, patched_seconds, speedup = self._times(repeats) if repeats else (None, None, None)
        assert self.report is not None
        return Verification(
            type(self.model).__name__,
            tuple(sorted(rows, key=lambda row: (row.ok, -row.share))),
            self.reference,
            draws,
            stock_seconds,
            patched_seconds,
            speedup,
            self.report,
            tuple(self.notes),
        )

    def _patch(self, side: nn.Module) -> nn.Module:
        if self.options or not self.was_patched:
            self.patching.patch(side, **self.options)
        return side

    @contextmanager
    def _side(
        self,
        which: Literal["stock", "patched"],
        *,
        dropout: bool = False,
        double: bool = False,
        moved: int | None = None,
        ulps: int | None = None,
    ) -> Iterator[nn.Module]:
        """A model to run in training mode.

        double: in float64. moved, ulps: seeds of a move of each weight, by up to 1 % or by one unit in the last place.
        """
        with ExitStack() as stack:
            side = copy.deepcopy(self.model) if self.copyable else stack.enter_context(lent(self.model))
            if which == "stock":
                self.patching.unpatch(side)
            if not self.model.training:
                side.train()
            if not dropout:
                stack.enter_context(without_dropout(side))
            if moved is not None:
                move_weights(side, moved, by_a_percent)
            if ulps is not None:
                move_weights(side, ulps, by_one_ulp)
            if double:
                side.double()
            if which == "patched":
                self._patch(side)
                if not self.copyable:
                    stack.callback(self.patching.unpatch, side)
            yield side

    def _step(self, side: nn.Module, double: bool = False) -> tuple[Any, Any, Tensor]:
        """(batch, outputs, loss) after one forward and backward."""
        batch = twin(self.batch, double)
        outputs = call(side, batch)
        loss = self._loss(outputs, batch)
        self._set_aside(side, batch, loss)
        loss.backward()
        return batch, outputs, loss

    def _loss(self, outputs: Any, batch: Any) -> Tensor:
        if self.loss is not None:
            loss = self.loss(outputs, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise TypeError(f"verify: loss(outputs, batch) returned {what}; expected a tensor of one element.")
        else:
            found = own_loss(outputs)
            if found is None:
                found = projection(outputs)
            if found is None or found.numel() != 1:
                raise TypeError(
                    f"verify: the model returned a {type(outputs).__name__} without a scalar loss or any floating"
                    " output with a gradient; expected one of them. Put labels into the batch, or pass"
                    " loss=lambda outputs, batch: ..."
                )
            loss = found
        if not loss.requires_grad:
            raise ValueError(
                "verify: the loss has no gradient; expected one that depends on a trainable parameter. Is every"
                " parameter frozen, or does the forward run under torch.no_grad?"
            )
        return loss

    def _set_aside(self, side: nn.Module, batch: Any, loss: Tensor) -> None:
        """Takes the gradients from the caller's own leaves that the loss depends on (a head that `loss` holds)."""
        own = {id(leaf) for leaf in (*side.parameters(), *(value for _, value in tensors(batch)))} | self.foreign.keys()
        for leaf in leaves(loss):
            if id(leaf) in self.theirs:
                raise ValueError(
                    "verify: a step of a copy of the model leads back to the parameters of the model itself. Has a"
                    " forward been replaced on an instance, or does loss hold the model? Let loss use its arguments"
                    " alone, and pass the model as it was before it was wrapped."
                )
            if id(leaf) not in own:
                self.foreign[id(leaf)] = leaf, leaf.grad
                leaf.grad = None
                own.add(id(leaf))

    def give_back(self) -> None:
        for leaf, grad in self.foreign.values():
            leaf.grad = grad

    def _run(
        self,
        which: Literal["stock", "patched"],
        *,
        double: bool = False,
        moved: int | None = None,
        ulps: int | None = None,
    ) -> dict[tuple[Kind, str], Tensor]:
        """The values of a step of a copy that is gone afterwards; arguments as of `_side`."""
        with self._side(which, double=double, moved=moved, ulps=ulps) as side:
            values = self._values(side, double=double)
            if which == "patched" and self.report is None:
                self.report = self.patching.report(side)
        return values

    def _values(self, side: nn.Module, *, double: bool = False) -> dict[tuple[Kind, str], Tensor]:
        """Everything that the step gives, on the CPU."""
        seed_all(SEED)
        batch, outputs, loss = self._step(side, double)
        found: dict[tuple[Kind, str], Tensor] = {("loss", "loss"): _kept(loss)}
        hidden = self.loss is None and own_loss(outputs) is not None
        for name, value in tensors(outputs):
            if not (hidden and name == "loss"):
                found["output", name or "outputs"] = _kept(value)
        for name, parameter in side.named_parameters():
            if parameter.grad is not None:
                found["gradient", name] = _kept(parameter.grad)
                parameter.grad = None
        for name, value in tensors(batch):
            if value.is_leaf and value.grad is not None:
                found["gradient", f"batch: {name}" if name else "batch"] = _kept(value.grad)
        del batch, outputs, loss
        side.eval()
        with torch.no_grad():
            outputs = call(side, twin(self.batch, double))
        for name, value in tensors(outputs):
            found["output", f"in evaluation: {name or 'outputs'}"] = _kept(value)
        return found

    def _rows(self) -> tuple[list[Row], int]:
        errors: dict[tuple[Kind, str], _Errors] = {}
        draw = 0
        while True:
            self._draw(draw, errors)
            draw += 1
            rows = [found.row(kind, name, self.reference) for (kind, name), found in errors.items()]
            if draw == DRAWS or all(row.ok or row.share > DECIDED for row in rows):
                return rows, draw

    def _draw(self, draw: int, errors: dict[tuple[Kind, str], _Errors]) -> None:
        """One comparison, with the weights as they are (draw 0) or moved."""
        moved = draw or None
        exact = self._exact(moved) if self.reference == "float64" else None
        seed_all(SEED)
        before = torch.random.get_rng_state()
        stock = self._run("stock", moved=moved)
        if draw == 0 and not torch.equal(torch.random.get_rng_state(), before):
            self.notes.append(
                "Stock draws random numbers even with dropout off (a module of yours?); both sides had the same seed,"
                " but agree only if they draw in the same order."
            )
        spread = []
        if exact is None:
            spread = [self._run("stock", moved=moved, ulps=seed) for seed in range(MOVED_STOCK)]
        try:
            patched = self._run("patched", moved=moved)
        except Exception as error:
            error.add_note("fasttune.verify: the patched copy raised this; the same step ran on the stock copy.")
            raise
        _compare(errors, patched, stock, exact, spread)

    def _exact(self, moved: int | None) -> dict[tuple[Kind, str], Tensor] | None:
        """The float64 step; None, with a note, if there can be none."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        needed, available = 2 * 8 * count, available_bytes(device)
        if available is not None and needed > 0.8 * available:
            why = f"weights and gradients take {needed / 1e9:.1f} GB of the {available / 1e9:.1f} GB that are free"
        else:
            try:
                return self._run("stock", double=True, moved=moved)
            except (RuntimeError, TypeError, NotImplementedError, MemoryError) as error:
                why = _said(error)
        self.reference = "stock"
        self.notes.append(f"There is no float64 step: {why}.")
        return None

    # ----------------------------------------------------------------------------------------------- dropout and time

    def _dropout_rows(self, count: int) -> list[Row]:
        """Losses and gradient norms with dropout as it is: a difference of means in standard errors, and of spreads."""
        drawn: dict[str, tuple[list[float], list[float]]] = {}
        eps = 0.0
        for which in ("stock", "patched"):
            losses, norms = [], []
            with self._side(which, dropout=True) as side:
                for seed in range(count):
                    seed_all(SEED + seed)
                    loss = self._step(side)[2]
                    eps = torch.finfo(loss.dtype).eps
                    losses.append(loss.item())
                    grads = [p.grad for p in side.parameters() if p.grad is not None]
                    norms.append(math.sqrt(sum(_kept(grad).double().square().sum().item() for grad in grads)))
                    side.zero_grad(set_to_none=True)
            drawn[which] = losses, norms
        rows = []
        for what, stock, patched in zip(("loss", "gradient norm"), *drawn.values(), strict=True):
            means = statistics.fmean(stock), statistics.fmean(patched)
            spreads = statistics.stdev(stock), statistics.stdev(patched)
            floor = 16 * eps * abs(means[0])  # rounding, for a model that has no dropout
            mean_error = math.hypot(*spreads) / math.sqrt(count)
            rows.append(
                Row(
                    f"mean {what} of {count} steps with dropout",
                    "dropout",
                    spreads[0] / math.sqrt(count),
                    abs(means[0] - means[1]),
                    DEVIATIONS * mean_error + floor,
                    f"{means[0]:.6g} stock, {means[1]:.6g} patched",
                )
            )
            # A standard deviation is known to 1 / sqrt(2 (n - 1)) of itself, the difference of two to sqrt(2) of that.
            spread_error = spreads[0] / math.sqrt(count - 1)
            rows.append(
                Row(
                    f"spread of the {what} of {count} steps with dropout",
                    "dropout",
                    spread_error / math.sqrt(2),
                    abs(spreads[0] - spreads[1]),
                    DEVIATIONS * spread_error + floor,
                    f"{spreads[0]:.3g} stock, {spreads[1]:.3g} patched",
                )
            )
        if not any(statistics.stdev(values) > 16 * eps * abs(statistics.fmean(values)) for values in drawn["stock"]):
            self.notes.append("Stock's steps do not differ: the model has no dropout.")
        return rows

    def _times(self, pairs: int) -> tuple[float, float, float]:
        with ExitStack() as stack:
            stock = stack.enter_context(self._side("stock", dropout=True))
            patched = stock
            if self.copyable:
                patched = stack.enter_context(self._side("patched", dropout=True))

            def timed(side: nn.Module) -> float:
                batch = twin(self.batch)
                synchronize(batch)
                start = time.perf_counter()
                side.zero_grad(set_to_none=True)
                self._loss(call(side, batch), batch).backward()
                synchronize(batch)
                return time.perf_counter() - start

            def stock_time() -> float:
                if not self.copyable:
                    self.patching.unpatch(stock)
                    timed(stock)
                return timed(stock)

            def patched_time() -> float:
                if not self.copyable:
                    self._patch(patched)
                    timed(patched)
                return timed(patched)

            for _ in range(WARM_UP if self.copyable else 0):
                stock_time()
                patched_time()
            measured = [(stock_time(), patched_time()) for _ in range(pairs)]
            if not self.copyable:
                self.patching.unpatch(stock)
        ours, theirs = (statistics.median(times) for times in zip(*measured, strict=True))
        return ours, theirs, statistics.median(a / b for a, b in measured)


# ------------------------------------------------------------------------------------------------------------ comparing


@dataclass
class _Errors:
    """Of one value, the largest over the draws."""

    stock: float = 0.0
    patched: float = 0.0
    floor: float = 0.0
    note: str = ""

    def row(self, kind: Kind, name: str, reference: str) -> Row:
        return Row(name, kind, self.stock, self.patched, FACTOR[reference] * self.stock + self.floor, self.note)


Values = Mapping[tuple[Kind, str], Tensor]


def _compare(
    errors: dict[tuple[Kind, str], _Errors],
    patched: Values,
    stock: Values,
    exact: Values | None,
    moved_stock: Sequence[Values],
) -> None:
    """Adds a draw to `errors`."""
    truth = stock if exact is None else exact
    largest = max((_largest(value) for (kind, _), value in truth.items() if kind == "gradient"), default=0.0)
    for key in dict.fromkeys([*stock, *patched]):
        into = errors.setdefault(key, _Errors())
        if key not in stock or key not in patched:
            into.patched = math.inf
            into.note = "stock has one, patched has none" if key in stock else "patched has one, stock has none"
            continue
        ours, theirs = patched[key], stock[key]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            into.patched = math.inf
            into.note = f"patched is {_described(ours)}, stock {_described(theirs)}"
            continue
        true = truth.get(key, theirs)
        if true.shape != theirs.shape:
            true = theirs
        true = true.to(_wide(true))
        counts = torch.isfinite(true) & torch.isfinite(theirs)
        sides = [theirs] if exact is not None else [side[key] for side in moved_stock if key in side]
        into.stock = max([into.stock, *(_error(side, true, counts & torch.isfinite(side)) for side in sides)])
        into.patched = max(into.patched, _error(ours, true, counts))
        if not torch.isfinite(ours[counts]).all():
            into.note = "patched is not finite where stock is"
        if torch.isfinite(ours[~torch.isfinite(true) & ~torch.isfinite(theirs)]).any():
            into.patched, into.note = math.inf, "stock is not finite where patched is"
        if ours.dtype.is_floating_point or ours.dtype.is_complex:
            scale = _largest(true[counts])
            if key[0] == "gradient" and scale < 1e-10 * largest:
                scale = largest
            into.floor = max(into.floor, FLOOR_ULPS * torch.finfo(theirs.dtype).eps * scale)


def _error(actual: Tensor, true: Tensor, counts: Tensor) -> float:
    """Largest |actual - true| where it counts; infinite if one is not finite."""
    difference = (actual.to(true.dtype) - true).abs()[counts]
    if not difference.numel():
        return 0.0
    largest = difference.max().item()
    return largest if math.isfinite(largest) else math.inf


def _wide(value: Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64


def _largest(value: Tensor) -> float:
    finite = value[torch.isfinite(value)].abs()
    return finite.max().item() if finite.numel() else 0.0


def _described(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _kept(value: Tensor) -> Tensor:
    """A tensor's values, on the CPU."""
    value = value.detach()
    value = value.to_dense() if value.layout != torch.strided else value
    return value.to("cpu", copy=True)


def _said(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
