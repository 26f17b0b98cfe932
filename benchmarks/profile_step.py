"""Where the time of one training step goes, by kind of work: torch's own profiler around a step of one side.

python benchmarks/profile_step.py bert-base-classification
python benchmarks/profile_step.py gpt2-124m "stock sdpa"
"""

from __future__ import annotations

import argparse
import re
from collections import Counter

import step_workloads
import torch
from report import markdown_table
from torch.profiler import ProfilerActivity, profile
from workload import OURS

KINDS = {
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm)$",
    "attention": r"Fasttune_attention|scaled_dot_product|softmax",
    "loss": r"Fasttune_(linear_)?cross_entropy|nll_loss|log_softmax",
    "activation": r"Fasttune_bias_activation|gelu|tanh|pow",
    "norms, dropout, residual": r"Fasttune_(dropout|layer_norm)|layer_norm|dropout|bernoulli",
    "embedding": r"embedding",
    "optimizer": r"adamw",
    "bias gradients": r"aten::sum$",
    "clearing, copying, adding": r"aten::(fill_|zero_|copy_|add_?|mul|cat|clone)$",
}


def kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "everything else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=step_workloads.workloads(quick=False))
    parser.add_argument("side", nargs="?", default=OURS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = step_workloads.workloads(quick=False)[args.step]().sides[args.side]()
    step()
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    microseconds: Counter[str] = Counter()
    for event in profiled.key_averages():
        microseconds[kind(event.key)] += event.self_cpu_time_total
    whole = sum(microseconds.values())
    rows = [[name, f"{spent / 1e3:,.0f} ms", f"{spent / whole:.1%}"] for name, spent in microseconds.most_common()]
    print(
        markdown_table([f"{args.step}, {args.side}", "time", "share"], [*rows, ["all", f"{whole / 1e3:,.0f} ms", ""]])
    )


if __name__ == "__main__":
    main()
