"""Would the tests notice? One change of one place at a time, in a copy of the tree, against the tests that must see it.

    python scripts/mutants.py [--sample 60] [--seed N] [--minutes 30] [--only REGEX] [--list]

The data lie in tests/mutants/*.toml, one file for each part of the project; a new part is a new file, not new code:

    [tests]                       # files whose mutants are made here, by Cosmic Ray's operators, and who must see them
    "kernels/dropout.py" = ["tests/ops/test_dropout.py"]
    [[mutant]]                    # one made by hand, for any language; all of these run before any sample
    file, old, new, tests         # old occurs once; tests: files or node ids, {isa} being the instruction set
    equivalent = "reason"         # if no test could see it: counted, not run
    units = ["activation"]        # of a C++ header: what to compile anew, if not everything that includes it
    [[equivalent]]                # generated mutants that change nothing: a line before, the same after, and why
    file, old, new, reason
    [[passed_over]]               # lines whose mutants change speed or words alone: a pattern of lines, and why
    files, line, reason
    [run]
    interpreted = true            # under TRITON_INTERPRET=1

Of a C++ change only what it touches is compiled, for one instruction set at -O1; tests/seeded_bugs/mutant.py puts the
library in place of the built one. Python changes are made in the copy itself. A mutant is seen if a test fails that
passes without it, if the process dies, or if the tests do not end.

Exit status 1: a mutant made by hand was not seen, or less than 95 % of those that could be. Cosmic Ray has to be on
PYTHONPATH (`make mutants` sees to it); without it only those made by hand run.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import fnmatch
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "mutants"
COPY = OUT / "tree"
ISAS = ("baseline", "avx2", "avx512")
LIMIT = 600.0  # seconds for the tests of a mutant
# One change for each kind of place; most others (** for +, `is` for ==) end in an exception at once and prove nothing.
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|BitAnd_BitOr|BitOr_BitAnd"
    r"|RShift_LShift|LShift_RShift)|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot"
    r"|IsNot_Is)|ReplaceUnaryOperator_Delete_\w+|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr"
    r"|ReplaceOrWithAnd|ReplaceBreakWithContinue|ReplaceContinueWithBreak|NumberReplacer|ZeroIterationForLoop)$"
)


@dataclasses.dataclass
class Mutant:
    file: str
    line: int
    old: str  # the changed lines, or for one made by hand the changed text
    new: str
    tests: list[str]
    text: str  # the whole file, mutated
    by_hand: bool
    interpreted: bool = False
    equivalent: str = ""
    units: tuple[str, ...] = ()

    def __str__(self) -> str:
        before, after = (" ".join(part.split()) for part in (self.old, self.new))
        return f"{self.file}:{self.line}: {before}  ->  {after or '(nothing)'}"


def read_data(folder: Path) -> Iterator[tuple[dict, str]]:
    for path in sorted(folder.glob("*.toml")):
        with open(path, "rb") as file:
            yield tomllib.load(file), path.name


def by_hand(data: dict, name: str) -> Iterator[Mutant]:
    for entry in data.get("mutant", ()):
        text = (ROOT / entry["file"]).read_text()
        count = text.count(entry["old"])
        if count != 1:
            raise SystemExit(f"{name}: {entry['file']} has {entry['old']!r} {count} times; expected once")
        yield Mutant(
            *(entry["file"], text[: text.index(entry["old"])].count("\n") + 1, entry["old"], entry["new"]),
            *(entry.get("tests", []), text.replace(entry["old"], entry["new"]), True),
            interpreted=data.get("run", {}).get("interpreted", False),
            equivalent=entry.get("equivalent", ""),
            units=tuple(entry.get("units", ())),
        )


def _meaning(text: str) -> str:
    """What a module does: its tree without annotations, which nothing evaluates, and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)
    return ast.dump(tree)


def _markers(text: str) -> list[tuple[int, int]]:
    """How many parameters of each function stand before a `/` and behind a `*`, which look like operators."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return [(len(node.args.posonlyargs), len(node.args.kwonlyargs)) for node in functions]


def places(data: dict, only: str) -> Iterator[tuple[str, int, list]]:
    """(file, line, [(operator, occurrence)]) for what Cosmic Ray could change in the files under [tests]."""
    import parso
    from cosmic_ray.ast import ast_nodes
    from cosmic_ray.plugins import get_operator, operator_names

    operators = [get_operator(name)() for name in operator_names() if OPERATORS.match(name)]
    for file in data.get("tests", {}):
        if not re.search(only, file):
            continue
        text = (ROOT / file).read_text()
        lines, nodes = text.splitlines(), list(ast_nodes(parso.parse(text)))
        passed_over = [each["line"] for each in data.get("passed_over", ()) if _matches(file, each["files"])]
        found: dict[int, list] = {}
        for operator in operators:
            positions = [at for node in nodes for at in operator.mutation_positions(node)]
            for occurrence, ((line, _), _) in enumerate(positions):
                if not any(re.search(pattern, lines[line - 1]) for pattern in passed_over):
                    found.setdefault(line, []).append((operator, occurrence))
        for line, candidates in sorted(found.items()):
            yield file, line, candidates


def generate(data: dict, file: str, line: int, operator: object, occurrence: int) -> Mutant | None:
    """The mutant, or None where it is not one: no Python, or an annotation that nothing evaluates, or a marker."""
    from cosmic_ray.mutating import mutate_code

    text = (ROOT / file).read_text()
    mutated = mutate_code(text, operator, occurrence)
    try:
        if mutated is None or _meaning(mutated) == _meaning(text):
            return None
        if _markers(mutated) != _markers(text):
            return None
    except SyntaxError:
        return None
    before, after = text.splitlines(), mutated.splitlines()
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    old, new = ("\n".join(part[i] for i in changed).strip() for part in (before, after))
    equivalent = [
        each["reason"]
        for each in data.get("equivalent", ())
        if each["file"] == file and (each["old"].strip(), each["new"].strip()) == (old, new)
    ]
    return Mutant(
        *(file, line, old, new, data["tests"][file], mutated, False),
        interpreted=data.get("run", {}).get("interpreted", False),
        equivalent=equivalent[0] if equivalent else "",
    )


def _matches(file: str, patterns: str | list[str]) -> bool:
    return any(fnmatch.fnmatch(file, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def copy_tree() -> None:
    """The checkout as it stands, without what git ignores but with the libraries that are built."""
    shutil.rmtree(COPY, ignore_errors=True)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, COPY / name
        if not os.path.lexists(source):
            continue  # deleted and not yet committed
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    for library in (ROOT / "fasttune").glob("_cpu*.so"):
        shutil.copy2(library, COPY / "fasttune")


class CppBuild:
    """The C++ library of one instruction set, object by object."""

    def __init__(self, isa: str) -> None:
        import pybind11

        self.isa, self.out = isa, OUT / f"objects-{isa}"
        self.compiler = os.environ.get("CXX", "g++")
        includes = (COPY / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"])
        self.flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w"]
        self.flags += [f"-DFASTTUNE_ISA_{isa.upper()}", *(f"-I{path}" for path in includes)]
        self.units = {p.stem: p for p in sorted((COPY / "csrc/cpu").glob("*.cpp"))}
        for folder in ("runtime", "bindings"):
            self.units |= {f"{folder}_{p.stem}": p for p in sorted((COPY / "csrc/cpu" / folder).glob("*.cpp"))}
        self.out.mkdir(parents=True, exist_ok=True)
        # From a copy that is made anew every time: what has not changed since is not compiled again.
        for unit, source in self.units.items():
            depends = self._dependencies(unit) or [source]
            target = self.out / f"{unit}.o"
            newest = max((path.stat().st_mtime for path in depends if path.exists()), default=time.time())
            if not target.exists() or newest > target.stat().st_mtime or not all(path.exists() for path in depends):
                self._compile(source, target, [])

    def _compile(self, source: Path, target: Path, first: list[str]) -> None:
        extra = ["-MMD", "-MF", str(target.with_suffix(".d"))]
        done = subprocess.run(
            [self.compiler, *first, *self.flags, *extra, "-c", str(source), "-o", str(target)],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])

    def _dependencies(self, unit: str) -> list[Path]:
        depends = self.out / f"{unit}.d"
        if not depends.exists():
            return []
        return [Path(word) for word in depends.read_text().replace("\\\n", " ").split()[1:]]

    def library(self, mutant: Mutant | None) -> Path:
        target = OUT / f"mutant-{self.isa}.so"
        objects = {unit: self.out / f"{unit}.o" for unit in self.units}
        first: dict[str, Path] = {}
        if mutant is not None:
            overlay = OUT / "overlay"
            shutil.rmtree(overlay, ignore_errors=True)
            path = overlay / Path(mutant.file).relative_to("csrc")
            path.parent.mkdir(parents=True)
            path.write_text(mutant.text)
            original = COPY / mutant.file
            for unit, source in self.units.items():
                if source == original or (mutant.units and unit in mutant.units):
                    wanted = True
                else:
                    wanted = not mutant.units and original in self._dependencies(unit)
                if wanted:
                    first[unit] = overlay / f"{unit}.o"
                    self._compile(path if source == original else source, first[unit], [f"-I{overlay}"])
            if not first:
                raise RuntimeError(f"nothing includes {mutant.file} on {self.isa}")
        # Mutated objects stand first, so that inline functions which several units share are taken from them. The other
        # instruction sets are neither there nor called: their symbols stay open.
        rest = [path for unit, path in objects.items() if unit not in first]
        link = [self.compiler, "-shared", "-Wl,-z,lazy", *map(str, (*first.values(), *rest)), "-o", str(target)]
        subprocess.run(link, check=True)
        return target


class Runner:
    def __init__(self, available: tuple[str, ...]) -> None:
        self.available = available
        self.builds: dict[str, CppBuild] = {}
        self.pass_without: set[tuple[object, ...]] = set()  # tests that pass without a mutant

    def isa(self, mutant: Mutant) -> str:
        for isa in ISAS:
            if Path(mutant.file).name == f"vec_{isa}.inc":
                return isa
        return "avx2" if "avx2" in self.available else "baseline"

    def _pytest(self, mutant: Mutant, library: Path | None, *options: str) -> tuple[str, str]:
        """("passed", "failed", "died", "timed out" or "nothing ran", the end of the output)."""
        isa = self.isa(mutant)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # tests ask for two threads, whose spinning a busy machine pays for
        environment["PYTHONPATH"] = str(COPY / "tests/seeded_bugs")
        environment.pop("TRITON_INTERPRET", None)
        if mutant.interpreted:
            environment["TRITON_INTERPRET"] = "1"
        elif self.available:
            environment["FASTTUNE_CPU_ISA"] = isa
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--tb=line"]
        if library is not None:
            environment["FASTTUNE_MUTANT"] = str(library)
            command += ["-p", "mutant"]
        if not mutant.interpreted:
            command += ["-k", " and ".join(f"not {other}" for other in ISAS if other != isa)]
        name = "triton" if mutant.interpreted else isa
        command += [*options, *(test.replace("{isa}", name) for test in mutant.tests)]
        try:
            done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "timed out", ""
        output = done.stdout[-3000:] + done.stderr[-1500:]
        outcomes = {0: "passed", 1: "failed", 2: "failed", 4: "nothing ran", 5: "nothing ran"}
        if done.returncode == 4 and "ImportError while loading conftest" in output:
            return "failed", output  # the mutant breaks the import itself
        return outcomes.get(done.returncode, "died"), output

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        cpp = mutant.file.startswith("csrc/cpu")
        isa = self.isa(mutant)
        if isa not in self.available and cpp:
            return "cannot run here", f"this processor has no {isa}"
        if cpp and isa not in self.builds:
            self.builds[isa] = CppBuild(isa)
        if cpp:
            try:
                library = self.builds[isa].library(mutant)
            except RuntimeError as error:
                raise SystemExit(f"{mutant} does not compile:\n{error}") from None
            outcome, output = self._pytest(mutant, library)
        else:
            path = COPY / mutant.file
            right = path.read_text()
            path.write_text(mutant.text)
            try:
                outcome, output = self._pytest(mutant, None)
            finally:
                path.write_text(right)
        if outcome == "nothing ran":
            raise SystemExit(f"{mutant}: no test ran: {' '.join(mutant.tests)}\n{output}")
        if outcome == "failed":
            self._passes_without(mutant, output, cpp)
        return ("not seen" if outcome == "passed" else "seen"), outcome

    def _passes_without(self, mutant: Mutant, output: str, cpp: bool) -> None:
        """The test that failed, or its file's collection, passes without the mutant."""
        isa = self.isa(mutant)
        for test in re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE):
            key = (test, mutant.interpreted, cpp, isa)
            if key in self.pass_without:
                continue
            alone = dataclasses.replace(mutant, tests=[test])
            library = self.builds[isa].library(None) if cpp else None
            outcome, output = self._pytest(alone, library, *(() if "::" in test else ("--collect-only",)))
            if outcome != "passed":
                raise SystemExit(f"without a mutant: {outcome}: {test}\n{output}")
            self.pass_without.add(key)


def sample(everything: list[dict], only: str, count: int, generator: random.Random) -> list[Mutant]:
    """A mutant each of `count` places, which are lines, in the order drawn."""
    drawn = [(data, *place) for data in everything for place in places(data, only)] if count else []
    generator.shuffle(drawn)
    mutants: list[Mutant] = []
    for data, file, line, candidates in drawn:
        if len(mutants) == count:
            break
        generator.shuffle(candidates)
        made = (generate(data, file, line, *candidate) for candidate in candidates)
        mutants += [mutant for mutant in [next(filter(None, made), None)] if mutant is not None]
    return mutants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sample", type=int, default=60, help="generated mutants, each of another line")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=30.0, help="no mutant is begun after so long")
    parser.add_argument("--only", default="", help="a pattern of the files to change")
    parser.add_argument("--data", type=Path, default=ROOT / "tests" / "mutants")
    parser.add_argument("--no-hand", action="store_true", help="the sample alone")
    parser.add_argument("--list", action="store_true", help="print the mutants that would run")
    arguments = parser.parse_args()
    began = time.monotonic()
    print(f"seed {arguments.seed}, at most {arguments.minutes:g} minutes", flush=True)

    data = list(read_data(arguments.data))
    generator = random.Random(arguments.seed)
    hand = [mutant for each in data for mutant in by_hand(*each) if re.search(arguments.only, str(mutant))]
    chosen = [] if arguments.no_hand else generator.sample(hand, len(hand))
    try:
        chosen += sample([each for each, _ in data], arguments.only, arguments.sample, generator)
    except ImportError as error:
        print(f"no generated mutants: {error}", flush=True)
    if arguments.list:
        print(*chosen, sep="\n")
        return 0

    from fasttune.ops import _cpp

    copy_tree()
    runner = Runner(tuple(_cpp.library.available_isas()) if _cpp.library is not None else ())
    counts = dict.fromkeys(("seen", "not seen", "equivalent", "cannot run here", "not begun"), 0)
    missed = []
    for mutant in chosen:
        if mutant.equivalent:
            verdict, why = "equivalent", mutant.equivalent
        elif time.monotonic() - began > 60 * arguments.minutes:
            verdict, why = "not begun", ""
        else:
            verdict, why = runner.judge(mutant)
        counts[verdict] += 1
        if verdict == "not seen":
            missed.append(mutant)
        if verdict != "not begun":
            print(f"{verdict:10} {mutant}" + (f"  ({why})" if why and verdict != "not seen" else ""), flush=True)
    judged = counts["seen"] + counts["not seen"]
    share = counts["seen"] / judged if judged else 1.0
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    print(f"\n{summary}: {share:.1%} of {judged} seen")
    for mutant in missed:
        print(f"\nnot seen: {mutant}\n  by {' '.join(mutant.tests)}")
    return 1 if share < 0.95 or any(mutant.by_hand for mutant in missed) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
