"""Builds the compiled CPU library with ninja. Everything declarative lives in pyproject.toml.

The library is optional: without a working compiler the package installs all the same and runs on its torch backend.
FASTTUNE_BUILD_CPP=auto (default) tries and says so when it fails, =1 turns a failure into an error, =0 skips it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = Path("csrc/cpu")
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}
# One translation unit per (operation, instruction set); the ISA is chosen at run time (csrc/cpu/isa.h).
ISAS = ("baseline", "avx2", "avx512") if IS_X86 else ("baseline",)


class NinjaBuild(build_ext):
    """Writes build.ninja for csrc/cpu and runs it; all translation units compile in parallel."""

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("FASTTUNE_BUILD_CPP", "auto")
        if mode not in {"auto", "0", "1"}:
            raise ValueError(f"FASTTUNE_BUILD_CPP is {mode!r}; expected auto, 0 or 1.")
        if mode == "0":
            return
        try:
            self._build(ext)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if mode == "1":
                raise
            print(
                f"\nfasttune: the C++ library was not built ({error}). fasttune still installs and runs on its torch"
                " backend; `fasttune doctor` shows what is active. Install a C++17 compiler and reinstall to get it.\n",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        import ninja
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
        jobs = os.environ.get("MAX_JOBS")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir), *(["-j", jobs] if jobs else [])]
        subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("fasttune._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
