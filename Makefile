# Everything a developer or CI runs. Works in a fresh clone; every target may be repeated.
#
#   make demo       two fine-tunings, stock and patched, side by side (examples/demo.py)
#   make test       linters, types and the test-suite
#   make slow       the tests that take minutes each
#   make triton     the Triton kernels, compiled for every GPU and run in its interpreter
#   make cuda-host  the CUDA kernels, run on the host: against float64, under sanitizers, with seeded bugs
#   make cuda-build the CUDA kernels, as nvcc builds them, against their budgets
#   make seeded-bugs  the tests of the operations, each against a C++ kernel with a bug that it has to see
#   make mutants    changes of one place, chosen and drawn, that the tests have to see: MUTANTS="--sample 20 --minutes 10"
#   make sanitize   the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make gpu-report docs/gpu-report.md: what the compilers make of every Triton kernel, for each GPU
#   make triton36   the Triton kernels compiled by the oldest supported Triton
#   make package    wheel, sdist and editable installs, with and without a compiler
#   make bench      benchmarks, as JSON and a Markdown page in out/
#   make clean      removes what the targets above made
#
# PYTHON=python3.12 chooses the interpreter of the virtual environment, VENV its folder, MAX_JOBS the compiler
# processes. PIP_ARGS goes to pip: without a GPU, PIP_ARGS="--extra-index-url <torch's CPU index>" fetches torch's CPU
# build (200 MB) instead of its CUDA build (several GB).

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
# Two processes of one thread each; a file's tests share what they set up. Tests of threads ask for theirs, and where
# these wait without spinning the processes leave each other the cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile
# The build requirements of pyproject.toml: here the library is built in place, file by file as they change.
BUILD_REQUIRES := "setuptools>=77" "ninja>=1.11" "pybind11>=2.13"
# The version whose interpreter tests/interpreter mends. Without its dependents' consent: torch's CUDA build asks for 3.7.1.
TRITON := triton==3.9.0
# The oldest that pyproject.toml promises: GPU images lag behind.
OLDEST_TRITON := triton==3.6.0
# Makes mutants of Python files; apart from the environment, since only scripts/mutants.py imports it.
COSMIC_RAY := cosmic-ray==8.7.0
MUTANTS ?=
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort)

.PHONY: help demo test slow triton lint cuda-host cuda-build seeded-bugs mutants sanitize gpu-report triton36 package bench build clean
.DEFAULT_GOAL := help

help:
	@sed -n '3,16s/^# *//p' Makefile

$(BIN)/python:
	@echo "== creating $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: pip runs again only when the requirements change.
$(VENV)/.installed-%: $(BIN)/python pyproject.toml constraints.txt
	@echo "== installing fasttune[$*] and what it needs into $(VENV)"
	FASTTUNE_BUILD_CPP=0 FASTTUNE_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt $(BUILD_REQUIRES) -e ".[$*]"
	if [ $* = dev ] && [ "$$(uname -s)" = Linux ]; then $(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps $(TRITON); fi
	@touch $@

build:
	@echo "== building the C++ library, and with an nvcc the CUDA library"
	@$(BIN)/python setup.py -q build_ext --inplace

demo: $(VENV)/.installed-demo build
	$(BIN)/python examples/demo.py

lint: $(VENV)/.installed-dev
	@echo "== linting and type-checking"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# What the other targets test, and what takes minutes, is not in `make test`.
SUITE := $(PYTEST) $(foreach folder,packaging kernels compiled cuda_host cuda_build seeded_bugs,--ignore=tests/$(folder))

test: $(VENV)/.installed-dev build lint
	@echo "== testing"
	$(SUITE) -m "not slow"

slow: $(VENV)/.installed-dev build
	@echo "== testing what takes minutes: the demo, a rehearsal of the check on a GPU, torch.compile, two processes, the benchmarks"
	$(SUITE) -m slow

triton: $(VENV)/.installed-dev build
	@echo "== compiling the Triton kernels for GPUs that need not be here"
	$(PYTEST) --dist load tests/compiled
	@echo "== testing the Triton kernels in its interpreter"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels tests/ops

cuda-host: $(VENV)/.installed-dev
	@echo "== running the CUDA kernels on the host"
	$(BIN)/python -m pytest tests/cuda_host

cuda-build: $(VENV)/.installed-dev
	@echo "== holding what nvcc makes of the CUDA kernels against their budgets"
	$(BIN)/python -m pytest tests/cuda_build

seeded-bugs: $(VENV)/.installed-dev build
	@echo "== seeing that the tests of the C++ kernels can fail"
	$(BIN)/python -m pytest tests/seeded_bugs

$(VENV)/cosmic-ray/.installed: $(VENV)/.installed-dev
	@echo "== installing $(COSMIC_RAY) into $(VENV)/cosmic-ray"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --target $(VENV)/cosmic-ray $(COSMIC_RAY)
	@touch $@

mutants: $(VENV)/.installed-dev $(VENV)/cosmic-ray/.installed build
	@echo "== seeing that the tests notice a change of one place"
	PYTHONPATH=$(VENV)/cosmic-ray $(BIN)/python scripts/mutants.py $(MUTANTS)

sanitize: $(VENV)/.installed-dev
	@echo "== testing the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	PYTHON=$(BIN)/python scripts/sanitize.sh

gpu-report: $(VENV)/.installed-dev
	@echo "== compiling every Triton kernel for every target"
	$(BIN)/python scripts/gpu_report.py --out docs/gpu-report.md

# Triton alone, in a folder that goes before the environment's own: torch and the rest come from the environment.
$(VENV)/triton36/.installed: $(VENV)/.installed-dev
	@echo "== installing $(OLDEST_TRITON) into $(VENV)/triton36"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps --target $(VENV)/triton36 $(OLDEST_TRITON)
	@touch $@

triton36: $(VENV)/triton36/.installed
	@echo "== compiling the Triton kernels with $(OLDEST_TRITON)"
	PYTHONPATH=$(VENV)/triton36 $(BIN)/python scripts/oldest_triton.py

package: $(VENV)/.installed-dev
	@echo "== testing wheel, sdist and editable installs"
	$(BIN)/python -m pytest tests/packaging

bench: $(VENV)/.installed-bench build
	@mkdir -p out
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-json=out/benchmarks.json
	$(BIN)/python benchmarks/report.py out/benchmarks.json --out out

clean:
	rm -rf $(VENV) build dist out *.egg-info fasttune/_cpu*.so fasttune/_cuda*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
