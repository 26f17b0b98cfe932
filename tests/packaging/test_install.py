"""Wheel, sdist and editable installs, used from inside and outside the checkout, with and without a compiler."""

import re
import resource
import sys
import tarfile
import time
import zipfile

import pytest
from installing import CHECKOUT, Environment, fresh_checkout, run, wheel_of

pytestmark = pytest.mark.slow

QUICK = {"FASTTUNE_CXXFLAGS": "-O0"}  # where the test is about the way of installing, not about the library
NO_COMPILER = {"CXX": "/bin/false"}

# Uses the installed package: the library under torch's threads, fasttune.kernels, and neither Transformers nor Triton.
USE = """
import pathlib, sys
sys.modules["transformers"] = sys.modules["triton"] = None
import torch
torch.set_num_threads(2)
from fasttune import nn, ops
from fasttune.ops import _cpp
import fasttune.kernels
assert _cpp.library is not None, _cpp.unavailable_reason
assert _cpp.library.num_threads() == 2
x = torch.randn(512, 768, requires_grad=True)
torch.manual_seed(0)
out = ops.dropout(x, dropout_p=0.1, backend="cpp")
torch.manual_seed(0)
assert torch.equal(out, ops.dropout(x, dropout_p=0.1, backend="torch"))
torch.set_num_threads(1)
assert _cpp.library.num_threads() == 1
torch.manual_seed(0)
assert torch.equal(out, ops.dropout(x, dropout_p=0.1, backend="cpp"))
assert "kernels" not in sys.modules
assert any((pathlib.Path(p) / "philox.py").exists() for p in fasttune.kernels.__path__)
print("library:", _cpp.library.__file__)
"""
USE_WITHOUT_LIBRARY = """
from fasttune import ops
from fasttune.ops import _cpp
import fasttune.kernels, torch
assert _cpp.library is None
assert ops.available_backends("dropout") == ("torch",)
assert ops.dropout(torch.ones(4, 4), dropout_p=0.5).shape == (4, 4)
print(_cpp.unavailable_reason)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return fresh_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    source = fresh_checkout(tmp_path_factory.mktemp("sdist"))
    run(sys.executable, "setup.py", "-q", "sdist", cwd=source)
    return next((source / "dist").glob("fasttune-*.tar.gz"))


@pytest.fixture(scope="module")
def built(sdist, tmp_path_factory):
    """(wheel, pip's log, processor seconds, wall seconds) of the sdist: the one full build of these tests."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    wheel, log = wheel_of(sdist, tmp_path_factory.mktemp("wheel"))
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wheel, log, processor, seconds


def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, patterns in {"csrc": ("*.cpp", "*.h", "*.inc"), "kernels": ("*.py",), "fasttune": ("*.py",)}.items():
        for pattern in patterns:
            for path in (CHECKOUT / folder).rglob(pattern):
                if "__pycache__" not in path.parts and (CHECKOUT / "fasttune/kernels") not in path.parents:
                    assert str(path.relative_to(CHECKOUT)) in names
    assert not any(name.endswith((".so", ".o")) for name in names)


def test_build_fetches_no_torch_and_is_quick(built):
    _, log, processor, seconds = built
    (installed,) = re.findall(r"Installing collected packages: (.*)", log)
    assert set(installed.split(", ")) == {"setuptools", "ninja", "pybind11"}
    print(f"full build: {seconds:.0f} s, {processor:.0f} processor seconds")
    # Two minutes on two cores. Processor time, since other work may share the machine.
    assert processor < 240, f"the full build took {processor:.0f} processor seconds; two minutes on two cores are 240"


def test_wheel_holds_one_package(built):
    names = zipfile.ZipFile(built[0]).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fasttune"}
    assert any(re.fullmatch(r"fasttune/_cpu\..*so", name) for name in names)
    for expected in ("fasttune/py.typed", "fasttune/kernels/philox.py", "fasttune/nn/attention.py"):
        assert expected in names
    assert "fasttune/kernels/__init__.py" not in names
    assert not any(name.endswith((".cpp", ".h", ".inc")) for name in names)


def test_wheel_of_the_sdist_works(built, checkout, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.install(built[0])
    assert str(environment.site) in environment.python(USE, cwd=tmp_path)
    # python -c puts the working directory first: inside the checkout, the checkout's own sources run, unbuilt
    assert "is not there" in environment.python(USE_WITHOUT_LIBRARY, cwd=checkout)
    script = tmp_path / "script.py"
    script.write_text(USE)
    assert str(environment.site) in run(environment.bin / "python", script, cwd=checkout)
    doctor = run(environment.bin / "fasttune", "doctor", cwd=tmp_path, env={"COLUMNS": "200"})
    assert "compiled library  yes" in doctor


def test_wheel_of_the_checkout_holds_the_same_files(built, checkout, tmp_path):
    wheel, _ = wheel_of(checkout, tmp_path, env=QUICK)
    files = lambda path: {name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/RECORD")}  # noqa: E731
    assert files(wheel) == files(built[0])


def test_editable_install_works_inside_and_outside(tmp_path):
    source = fresh_checkout(tmp_path / "source")
    environment = Environment(tmp_path / "venv")
    environment.install("--editable", source, env=QUICK)
    (tmp_path / "elsewhere").mkdir()
    for folder in (source, tmp_path / "elsewhere"):
        assert f"library: {source}/fasttune/_cpu" in environment.python(USE, cwd=folder)


def test_without_a_compiler_it_installs_says_so_once_and_runs(tmp_path):
    source = fresh_checkout(tmp_path / "source")
    environment = Environment(tmp_path / "venv")
    log = environment.install(source, env=NO_COMPILER)
    assert log.count("the C++ library was not built") == 1
    assert "is not there" in environment.python(USE_WITHOUT_LIBRARY, cwd=tmp_path)
    doctor = run(environment.bin / "python", "-m", "fasttune", "doctor", cwd=tmp_path, env={"COLUMNS": "200"})
    assert "compiled library  no" in doctor
    assert "The compiled CPU library: operations on CPU tensors run several times faster" in doctor


def test_the_library_may_be_demanded_or_left_out(checkout):
    """FASTTUNE_BUILD_CPP=1 fails without a compiler, =0 builds nothing and says nothing, anything else is refused."""

    def build(**env):
        command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        return run(*command, env={**NO_COMPILER, **env}, cwd=checkout, check=False)

    status, log = build(FASTTUNE_BUILD_CPP="1")
    assert status != 0
    assert "ninja" in log
    status, log = build(FASTTUNE_BUILD_CPP="0")
    assert (status, "was not built" in log) == (0, False)
    status, log = build(FASTTUNE_BUILD_CPP="maybe")
    assert status != 0
    assert "FASTTUNE_BUILD_CPP is 'maybe'; expected auto, 0 or 1" in log
