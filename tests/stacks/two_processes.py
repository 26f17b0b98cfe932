"""Data-parallel runs on two CPU processes over gloo. test_distributed.py starts

    python tests/stacks/two_processes.py FOLDER RANK

twice; each process runs every case with a stock and with a patched model, and rank 0 writes what it saw to FOLDER.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn

WORLD = 2
CAUSAL, MASKED, CLASSIFIER = "GPT2LMHeadModel", "BertForMaskedLM", "BertForSequenceClassification"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    base = model.base_model
    return list(base.h if hasattr(base, "h") else base.encoder.layer)


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


def sharded(
    *, blocks: bool = True, head: bool = False, policy: Any = None, **options: Any
) -> Callable[[nn.Module], nn.Module]:
    """FSDP2: the root, and before it each block and the vocabulary projection if asked for."""

    def wrap(model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        options["mp_policy"] = MixedPrecisionPolicy(**(policy or {}))
        for block in blocks_of(model) if blocks else ():
            fully_shard(block, **options)
        if head:
            fully_shard(model.cls.predictions, **options)
        return fully_shard(model, **options)

    return wrap


def loss_of_model(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).loss


def loss_outside(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The loss computed from the wrapped model's logits, as Trainer does for label smoothing."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), inputs["labels"].view(-1))


def with_unused_parameter(model: nn.Module) -> None:
    model.unused = nn.Linear(3, 3)


def untied(model: nn.Module) -> None:
    decoder = model.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())


def checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def frozen_half(model: nn.Module) -> None:
    for part in (model.get_input_embeddings(), blocks_of(model)[0]):
        part.requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """wrap: makes the model data-parallel. patch_last: after wrapping. micro: backward passes for each step, gradients
    exchanged in the last. prepare: of the stock model, before anything else."""

    head: str
    wrap: Callable[[nn.Module], nn.Module]
    patch_last: bool = False
    micro: int = 1
    prepare: Callable[[nn.Module], Any] = lambda model: None
    dtype: torch.dtype = torch.float32
    loss_of: Callable[[Any, dict[str, Any]], torch.Tensor] = loss_of_model

    @property
    def parts(self) -> int:
        """Batches for each step, over processes and backward passes."""
        return WORLD * self.micro


def _cases() -> dict[str, Case]:
    cases = {}
    for head in (CAUSAL, MASKED, CLASSIFIER):
        cases |= {
            f"ddp, {head}": Case(head, ddp()),
            f"ddp, unused parameters, {head}": Case(
                head, ddp(find_unused_parameters=True), prepare=with_unused_parameter
            ),
            f"ddp, checkpointed, {head}": Case(head, ddp(), prepare=checkpointed),
            f"fsdp2, blocks and root, {head}": Case(head, sharded()),
            f"fsdp2, checkpointed, {head}": Case(head, sharded(), prepare=checkpointed),
            f"fsdp2, bfloat16, {head}": Case(
                head, sharded(policy={"param_dtype": torch.bfloat16}), dtype=torch.bfloat16
            ),
        }
    for head in (CAUSAL, MASKED):
        cases |= {
            f"ddp, static graph, {head}": Case(head, ddp(static_graph=True)),
            f"ddp, patched after wrapping, {head}": Case(head, ddp(), patch_last=True),
            f"ddp, accumulation without sync, {head}": Case(head, ddp(), micro=2),
            f"ddp, frozen half, {head}": Case(head, ddp(), prepare=frozen_half),
            f"fsdp2, root alone, {head}": Case(head, sharded(blocks=False)),
            f"fsdp2, patched after sharding, {head}": Case(head, sharded(), patch_last=True),
            f"fsdp2, resharded root, {head}": Case(head, sharded(reshard_after_forward=True)),
            f"fsdp2, accumulation without sync, {head}": Case(head, sharded(), micro=2),
        }
    cases |= {
        "ddp, gradients as views of buckets": Case(MASKED, ddp(gradient_as_bucket_view=True)),
        "ddp, loss outside": Case(MASKED, ddp(), loss_of=loss_outside),
        "ddp, unused parameters, loss outside": Case(
            MASKED, ddp(find_unused_parameters=True), prepare=with_unused_parameter, loss_of=loss_outside
        ),
        "ddp, static graph, loss outside": Case(MASKED, ddp(static_graph=True), loss_of=loss_outside),
        "fsdp2, loss outside": Case(MASKED, sharded(), loss_of=loss_outside),
        "fsdp2, a head of its own": Case(MASKED, sharded(head=True), prepare=untied),
    }
    return cases


CASES = _cases()


def exchanging(model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients travel in the last backward pass of a step only."""
    if hasattr(model, "no_sync"):
        return contextlib.nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def train(case: Case, *, patched: bool) -> dict[str, Any]:
    from models import build
    from runs import Run, batches, sgd

    import fasttune
    from fasttune.patching.promises.loss import LinearRows

    logits = 0

    def compute(rows: LinearRows, ids: torch.Tensor | None) -> torch.Tensor:
        nonlocal logits
        logits += rows.features == model.config.vocab_size
        return compute_rows(rows, ids)

    compute_rows = LinearRows.compute
    rank = distributed.get_rank()
    model = build(case.head)
    case.prepare(model)
    if patched and not case.patch_last:
        fasttune.patch(model)
    wrapped = case.wrap(model)
    if patched and case.patch_last:
        fasttune.patch(wrapped)
    optimizer, run = sgd(wrapped), Run()
    for parts in batches(case.head, case.parts):
        optimizer.zero_grad()
        loss_sum = torch.zeros((), dtype=torch.float64)
        for i, inputs in enumerate(parts[rank :: distributed.get_world_size()]):
            computing = mock.patch.object(LinearRows, "compute", compute)
            with exchanging(wrapped, i == case.micro - 1), computing:
                loss = case.loss_of(wrapped, inputs) / case.micro
                loss.backward()
            loss_sum += loss.detach().double()
        distributed.all_reduce(loss_sum)
        # On FSDP2 a gradient is a DTensor; DDP's names carry its own prefix.
        run.note(loss_sum / WORLD, model.named_parameters())
        optimizer.step()
    for step in run.gradients:
        for name, gradient in step.items():
            step[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    notes = [(row.modules, row.runs, row.note) for row in fasttune.report(wrapped).rows]
    if patched:
        fasttune.unpatch(wrapped)
        case.loss_of(wrapped, parts[0])  # still works, and is stock
        left = [name for name, module in model.named_modules() if "_fasttune" in vars(module)]
        left += [name for name, module in model.named_modules() if "fasttune" in str(type(module).__mro__)]
        assert not left, left
    return {"losses": run.losses, "gradients": run.gradients, "report": notes, "logits": logits}


def main(folder: Path, rank: int, wanted: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    import transformers

    transformers.logging.set_verbosity_error()
    for number, (name, case) in enumerate(CASES.items()):
        if wanted not in name:
            continue
        result: dict[str, Any] = {}
        for side in ("stock", "ours"):
            try:
                result[side] = train(case, patched=side == "ours")
            except Exception:
                result[side] = {"error": traceback.format_exc()}
        if rank == 0:
            torch.save(result, folder / f"{number}.pt")
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
