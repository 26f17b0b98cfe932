"""What nvcc made of the CUDA kernels: registers, spills, shared memory, and the instructions that matter.

    python scripts/cuda_report.py            a table of every kernel on every architecture

Reads the assembler's remarks that setup.py leaves beside the objects of build/temp*/cuda, and disassembles the objects
where a cuobjdump is found (on PATH, in CUDA_HOME, or in Triton's package). Builds first what is not up to date.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float": "float32", "__nv_bfloat16": "bfloat16", "__half": "float16"}
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128", "LDL", "STL")
DISASSEMBLED = ("sm_80", "sm_90a")  # seconds an architecture


@dataclasses.dataclass
class Kernel:
    kernel: str  # its name
    arguments: str  # of the template
    target: str  # "sm80", "sm86", "sm89", "sm90", "sm100"
    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes a block, static and dynamic
    instructions: dict[str, int] | None = None  # occurrences of each of INSTRUCTIONS, where they were looked for

    @property
    def facts(self) -> dict[str, object]:
        """The conditions of benchmarks/gpu_budgets.toml."""
        facts: dict[str, object] = {"kernel": self.kernel, "target": self.target}
        names = re.findall(r"__nv_bfloat16|__half|float", self.arguments)
        if names:
            facts["dtype"] = DTYPES[names[-1]]
        tiles = re.search(r"Tiles<\w+, (?:\(int\))?(\d+), (?:\(bool\))?(\w+)>", self.arguments)
        if tiles:
            facts["head_dim"] = int(tiles[1])
            facts["terms"] = tiles[2] in ("true", "1")
            facts["dropout"] = self.arguments.rstrip(">").rstrip().endswith(("true", "1"))
        return facts

    @property
    def mma(self) -> str:
        """The kind of matrix instruction, as the budget file names it."""
        return "mma.sync" if self.instructions and self.instructions["HMMA"] else ""


def missing() -> str | None:
    """Why there is nothing to report here, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    if any(map(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"])):
        return None
    return "nvcc was found neither in CUDA_HOME nor on PATH"


def cuobjdump() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = ["cuobjdump", *([str(Path(home) / "bin" / "cuobjdump")] if home else [])]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next(filter(None, map(shutil.which, candidates)), None)


def build() -> Path:
    """Builds the library in place and returns the folder of its objects."""
    environment = {**os.environ, "FASTTUNE_BUILD_CPP": "0", "FASTTUNE_BUILD_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return max((ROOT / "build").glob("temp*/cuda"), key=lambda folder: folder.stat().st_mtime)


@functools.cache
def demangled(name: str) -> tuple[str, str]:
    """(kernel, template arguments) of a mangled kernel."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    match = re.search(r"(\w+_kernel)(<.*>)?\(", full)
    if match is None:
        raise ValueError(f"{full!r} is not the name of a kernel.")
    return match[1], match[2] or ""


def _target(architecture: str) -> str:
    return architecture.replace("_", "").rstrip("a")


def _remarks(text: str) -> list[tuple[str, Kernel]]:
    """(mangled name, kernel) for each entry function in the output of ptxas -v."""
    kernels = []
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for name, architecture, stores, loads, registers, rest in pattern.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernel, arguments = demangled(name)
        static = int(shared[1]) if shared else 0
        kernels.append(
            (name, Kernel(kernel, arguments, _target(architecture), int(registers), int(stores) + int(loads), static))
        )
    return kernels


def _count(tool: str, file: Path, architecture: str) -> dict[tuple[str, str], dict[str, int]]:
    """(target, mangled name) -> occurrences of each of INSTRUCTIONS in the object's machine code."""
    command = [tool, "-sass", "-arch", architecture, str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts: dict[tuple[str, str], dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in listing.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            current = counts[_target(architecture), found[1]] = dict.fromkeys(INSTRUCTIONS, 0)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            for name in INSTRUCTIONS:
                if all(part in found[1].split(".") for part in name.split(".")):
                    current[name] += 1
    return counts


def kernels(folder: Path, sass: bool = True) -> list[Kernel]:
    """Every kernel of the library on every architecture."""
    sys.path.insert(0, str(ROOT))
    from fasttune.ops import _cuda

    tool = cuobjdump() if sass else None
    found = []
    sources = {source.stem for source in (ROOT / "csrc" / "cuda").glob("*.cu")}  # an older build may have left others
    for remarks in sorted(file for file in folder.glob("*.ptxas") if file.name.split(".")[0] in sources):
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for architecture in DISASSEMBLED if tool else ():
            counts.update(_count(str(tool), remarks.with_suffix(""), architecture))
        for name, kernel in _remarks(remarks.read_text()):
            kernel.instructions = counts.get((kernel.target, name))
            facts = kernel.facts
            if "head_dim" in facts:
                which = {"attention_forward_kernel": 0, "attention_terms_kernel": 2}.get(kernel.kernel, 1)
                code = DTYPE_CODES[str(facts["dtype"])]
                kernel.shared += _cuda.library.attention_shared_bytes(code, facts["head_dim"], which, facts["terms"])
            found.append(kernel)
    return found


def main() -> None:
    reason = missing()
    if reason is not None:
        raise SystemExit(f"cuda_report: nothing to report, {reason}.")
    print(f"{'kernel':32} {'target':6} {'registers':>9} {'spills':>6} {'shared':>7}  instructions")
    for kernel in sorted(kernels(build()), key=lambda k: (k.kernel, k.arguments, k.target)):
        what = {key: value for key, value in kernel.facts.items() if key not in ("kernel", "target")}
        counts = {key: value for key, value in (kernel.instructions or {}).items() if value}
        row = f"{kernel.kernel:32} {kernel.target:6} {kernel.registers:9} {kernel.spills:6} {kernel.shared:7}"
        print(f"{row}  {what} {counts}")


if __name__ == "__main__":
    main()
