"""Builds the compiled libraries, CPU and CUDA, with ninja. Everything declarative lives in pyproject.toml.

Both are optional: without a working compiler the package installs all the same and runs on its torch backend.
FASTTUNE_BUILD_CPP=auto (default) tries and says so when it fails, =1 turns a failure into an error, =0 skips it.
FASTTUNE_BUILD_CUDA means the same for the CUDA library; auto does not try where there is no nvcc. FASTTUNE_CUDA_TARGETS
names the architectures to build for, FASTTUNE_NVCCFLAGS adds options.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = Path("csrc/cpu")
CUDA_SOURCES = Path("csrc/cuda")
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}
# One translation unit per (operation, instruction set); the ISA is chosen at run time (csrc/cpu/isa.h).
ISAS = ("baseline", "avx2", "avx512") if IS_X86 else ("baseline",)
# sm_86 and sm_89 share the code that is generated for sm_80 up to the assembler; so do GPUs to come, which assemble the
# PTX (code=compute_80) when they load it.
CUDA_TARGETS = {
    "sm_80": "arch=compute_80,code=[compute_80,sm_80,sm_86,sm_89]",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_100a": "arch=compute_100a,code=sm_100a",
}


class NinjaBuild(build_ext):
    """Writes build.ninja for csrc/cpu or csrc/cuda and runs it; all translation units compile in parallel."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fasttune._cuda":
            self._try("FASTTUNE_BUILD_CUDA", "CUDA", "working nvcc", self._build_cuda, ext)
        else:
            self._try("FASTTUNE_BUILD_CPP", "C++", "C++17 compiler", self._build, ext)

    def _try(self, variable: str, name: str, needed: str, build: Callable[[Extension], None], ext: Extension) -> None:
        mode = os.environ.get(variable, "auto")
        if mode not in {"auto", "0", "1"}:
            raise ValueError(f"{variable} is {mode!r}; expected auto, 0 or 1.")
        if mode == "0" or (mode == "auto" and name == "CUDA" and find_nvcc() is None):
            return
        try:
            build(ext)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if mode == "1":
                raise
            print(
                f"\nfasttune: the {name} library was not built ({error}). fasttune still installs and runs on its other"
                f" backends; `fasttune doctor` shows what is active. Install a {needed} and reinstall to get it.\n",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        import pybind11
        from ninja.ninja_syntax import Writer

        build_dir = Path(self.build_temp).resolve() / "cpu"
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
        flags = [
            *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0"),
            "-ffp-contract=off",  # kernels write fma where they mean it; elsewhere forward and backward must agree
            *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"),
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns about its own intrinsics headers
            *(f"-I{path}" for path in includes),
            *os.environ.get("FASTTUNE_CXXFLAGS", "").split(),
        ]
        link_flags = ["-shared", *os.environ.get("FASTTUNE_LDFLAGS", "").split()]
        if sys.platform == "darwin":
            link_flags += ["-undefined", "dynamic_lookup"]
        with open(build_dir / "build.ninja", "w") as file:
            writer = Writer(file)
            writer.variable("cxx", os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++"))
            writer.variable("flags", " ".join(flags))
            writer.rule(
                "compile",
                "$cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="$out",
            )
            # Linked beside the target and renamed, so that a running process keeps the library it loaded.
            writer.rule(
                "link",
                f"$cxx $in {' '.join(link_flags)} -o $out.new && mv -f $out.new $out",
                description="fasttune._cpu",
            )
            objects = []
            for source in sorted((ROOT / CPU_SOURCES).glob("*.cpp")):
                for isa in ISAS:
                    target = f"{source.stem}.{isa}.o"
                    writer.build(target, "compile", str(source), variables={"extra": f"-DFASTTUNE_ISA_{isa.upper()}"})
                    objects.append(target)
            for folder in ("runtime", "bindings"):
                for source in sorted((ROOT / CPU_SOURCES / folder).glob("*.cpp")):
                    # These only pass pointers on: optimising them costs build time and gains nothing.
                    target = f"{folder}_{source.stem}.o"
                    writer.build(target, "compile", str(source), variables={"extra": "-O1"})
                    objects.append(target)
            writer.build(str(output), "link", objects)
        run_ninja(build_dir)

    def _build_cuda(self, ext: Extension) -> None:
        import pybind11
        from ninja.ninja_syntax import Writer

        nvcc = find_nvcc()
        if nvcc is None:
            raise FileNotFoundError("nvcc was found neither in CUDA_HOME nor on PATH")
        build_dir = Path(self.build_temp).resolve() / "cuda"
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        targets = (os.environ.get("FASTTUNE_CUDA_TARGETS") or ",".join(CUDA_TARGETS)).split(",")
        unknown = sorted(set(targets) - set(CUDA_TARGETS))
        if unknown:
            raise ValueError(
                f"FASTTUNE_CUDA_TARGETS has {', '.join(unknown)}; expected some of {', '.join(CUDA_TARGETS)}."
            )
        host = f"-ccbin {os.environ['CXX']}" if os.environ.get("CXX") else ""
        flags = [
            *("-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *("-Xptxas", "-v", *(f"-gencode {CUDA_TARGETS[target]}" for target in targets)),
            *os.environ.get("FASTTUNE_NVCCFLAGS", "").split(),
        ]
        includes = [ROOT / "csrc", Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
        with open(build_dir / "build.ninja", "w") as file:
            writer = Writer(file)
            writer.variable("nvcc", f"{nvcc} {host}")
            writer.variable("cxx", os.environ.get("CXX", "g++"))
            writer.variable("flags", " ".join(flags))
            # What the assembler says of registers and spills stays beside the object: scripts/cuda_report.py reads it.
            writer.rule(
                "cuda",
                "$nvcc -MD -MF $out.d $flags -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas; exit 1)",
                depfile="$out.d",
                deps="gcc",
                description="$out",
            )
            writer.rule(
                "cxx",
                f"$cxx -MMD -MF $out.d -std=c++17 -O1 -fPIC -fvisibility=hidden {' '.join(f'-I{i}' for i in includes)}"
                " -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="$out",
            )
            writer.rule(
                "link", "$nvcc -shared -cudart static $in -o $out.new && mv -f $out.new $out", description=ext.name
            )
            objects = []
            # The longest first: the other core then has the short ones to itself.
            sources = sorted((ROOT / CUDA_SOURCES).glob("*.cu"), key=lambda path: ("attention" not in path.stem, path))
            for source in sources:
                writer.build(f"{source.stem}.o", "cuda", str(source))
                objects.append(f"{source.stem}.o")
            writer.build("bindings.o", "cxx", str(ROOT / CUDA_SOURCES / "bindings" / "module.cpp"))
            writer.build(str(output), "link", [*objects, "bindings.o"])
        run_ninja(build_dir)


def find_nvcc() -> str | None:
    """CUDA_HOME's nvcc, else the one on PATH, else the usual place's; None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next(filter(None, map(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)


def run_ninja(folder: Path) -> None:
    import ninja

    jobs = os.environ.get("MAX_JOBS")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    subprocess.run(command, check=True)


setup(
    ext_modules=[
        Extension("fasttune._cpu", sources=[], optional=True),
        Extension("fasttune._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
