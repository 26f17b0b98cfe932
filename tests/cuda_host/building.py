"""Builds the kernels of csrc/cuda for the host with g++: a Python module, and drivers under sanitizers.

Needs CUDA's headers (its types, conversions of bfloat16 and float16), no nvcc and no GPU. Everything lands in
build/cuda_host and is rebuilt when a source changes.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "tests" / "cuda_host"
OUT = ROOT / "build" / "cuda_host"
ON_GPU = os.environ.get("FASTTUNE_TEST_DEVICE") == "cuda"  # then the tests run the library itself, on a GPU

# The host's compiler is asked for the arithmetic that the sources write, no contraction beyond fmaf, so that every
# build gives the same bits. A fortified longjmp would refuse to switch fibers.
FLAGS = [
    *("-std=c++20", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-pthread", "-DFASTTUNE_CUDA_HOST"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"),
]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-DFASTTUNE_CUDA_HOST_THREADS"]
BUILDS = {
    "module": ["-O2", "-g0", "-fvisibility=hidden", "-DFASTTUNE_CUDA_MODULE=cuda_host"],
    "plain": ["-O1", "-g0"],
    "threads": [*SANITIZED, "-fsanitize=thread"],
    "memory": [*SANITIZED, "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
}


def cuda_include() -> Path | None:
    """The folder of CUDA's headers, or None."""
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and Path(nvcc).parents[1],
        "/usr/local/cuda",
    ]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_runtime.h").is_file():
            return Path(home) / "include"
    return None


def missing() -> str | None:
    """Why the harness cannot be built here, or None."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler was found"
    if cuda_include() is None:
        return "CUDA's headers (cuda_runtime.h) were not found: install the CUDA toolkit or set CUDA_HOME"
    return None


@functools.cache
def build(name: str) -> Path:
    """Builds one of BUILDS and returns the path of the module or executable."""
    import ninja
    import pybind11
    from ninja.ninja_syntax import Writer

    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    is_module = name == "module"
    output = folder / (f"cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}" if is_module else "drive")
    sources = [source for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if source.stem != "runtime"]
    sources.append(HARNESS / "cuda_host.cpp")
    if is_module:
        sources += [HARNESS / "bind_host.cpp", ROOT / "csrc" / "cuda" / "bindings" / "module.cpp"]
    else:
        sources.append(HARNESS / "drive.cpp")
    includes = [f"-I{ROOT / 'csrc'}", f"-I{HARNESS}", f"-isystem{cuda_include()}"]
    if is_module:
        includes += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    with open(folder / "build.ninja", "w") as file:
        writer = Writer(file)
        writer.variable("cxx", os.environ.get("CXX", "g++"))
        writer.variable("flags", " ".join([*FLAGS, *BUILDS[name], *includes]))
        writer.rule("compile", "$cxx -MMD -MF $out.d $flags -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
        writer.rule("link", f"$cxx $flags $in -o $out{' -shared' if is_module else ''}")
        objects = [f"{source.stem}.o" for source in sources]
        for target, source in zip(objects, sources, strict=True):
            writer.build(target, "compile", str(source))
        writer.build(str(output), "link", objects)
    jobs = os.environ.get("MAX_JOBS")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the harness build {name!r} failed:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    return output


@functools.cache
def module():
    """The harness as a Python module: the CUDA library's functions, run on the host, and what bind_host.cpp adds."""
    spec = importlib.util.spec_from_file_location("cuda_host", build("module"))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
