"""Builds and installs fasttune the way a stranger does, in throwaway virtual environments.

They see the torch of the environment that runs the tests through a .pth file, so nothing large is fetched or copied;
pip reads the .pth files of a site folder alone, so an editable fasttune of that environment stays out of sight.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SHIPPED = ("csrc", "fasttune", "kernels")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")


def run(*command, env=None, check=True, cwd=None):
    """Runs a command and returns its output, stdout and stderr together; raises with that output when it fails."""
    full = {**os.environ, "FASTTUNE_BUILD_CUDA": "0", **(env or {})}  # minutes a build, where there is an nvcc
    for variable in ("PYTHONPATH", "FASTTUNE_BACKEND", "FASTTUNE_CPU_ISA"):
        full.pop(variable, None)
    result = subprocess.run(
        [str(part) for part in command], env=full, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert not check or result.returncode == 0, f"{command} failed with {result.returncode}:\n{result.stdout}"
    return result.stdout if check else (result.returncode, result.stdout)


def fresh_checkout(target):
    """What git would give: the sources without anything that was built in place."""
    junk = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SHIPPED:
        shutil.copytree(CHECKOUT / name, target / name, symlinks=True, ignore=junk)
    for name in FILES:
        shutil.copy(CHECKOUT / name, target / name)
    return target


def wheel_of(source, folder, env=None, check=True):
    """(wheel, pip's log): `pip wheel` with ordinary build isolation."""
    command = (sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", folder, source)
    log = run(*command, env=env, check=check)
    wheels = list(Path(folder).glob("fasttune-*.whl"))
    return (wheels[0] if wheels else None), log


class Environment:
    """A virtual environment without pip that sees this one's packages."""

    def __init__(self, folder):
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.bin = folder / "bin"
        self.site = next((folder / "lib").glob("python*/site-packages"))
        (self.site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def install(self, *what, env=None):
        # --force-reinstall: a fasttune of the outer environment must not count as installed
        command = (sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--verbose", "--no-deps")
        return run(*command, "--force-reinstall", *what, env=env)

    def python(self, code, cwd, env=None, check=True):
        return run(self.bin / "python", "-c", code, cwd=cwd, env=env, check=check)
