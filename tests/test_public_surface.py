"""What users may import, and what importing must not do. A name added or lost here is a decision, not an accident."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fasttune
from fasttune import nn, ops

PACKAGE = Path(fasttune.__file__).parent

OPS = {
    "LinearLogProb",
    "PackedBatch",
    "attention",
    "attention_packed_qkv",
    "available_backends",
    "bias_activation",
    "bias_gelu",
    "cross_entropy",
    "dropout",
    "dropout_add_layer_norm",
    "embedding",
    "gated_activation",
    "gelu_layer_norm",
    "layer_norm",
    "layer_norm_gelu",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_max",
    "pack",
    "rotary",
    "unpack",
}
NN = {
    "BiasGELU",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "DropoutAddLayerNorm",
    "LayerNorm",
    "LayerNormGELU",
    "LayerNormMLP",
    "LinearCrossEntropyLoss",
    "SelfAttention",
}
TOP = {"UnsupportedModelError", "Verification", "__version__", "patch", "patched", "report", "unpatch", "verify"}


@pytest.mark.parametrize(("module", "names"), [(fasttune, TOP), (ops, OPS), (nn, NN)], ids=["fasttune", "ops", "nn"])
def test_public_names(module, names):
    assert set(module.__all__) == names
    assert all(hasattr(module, name) for name in names)


def fresh_process(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_operations_work_without_triton_and_transformers():
    fresh_process(
        "import sys; sys.modules['triton'] = sys.modules['transformers'] = None\n"
        "import torch\n"
        "from fasttune import nn, ops\n"
        "x = torch.randn(3, 8, requires_grad=True)\n"
        "ops.dropout(x, dropout_p=0.5).sum().backward()\n"
        "nn.LayerNorm(8)(x).sum().backward()\n"
        "assert 'triton' not in ops.available_backends('dropout')\n"
    )


@pytest.mark.parametrize("module", ["fasttune", "fasttune.ops", "fasttune.nn", "fasttune.cli", "fasttune.verification"])
def test_importing_brings_in_neither_transformers_nor_triton(module):
    """Both take seconds; torch itself, where it imports lazily, must not have been made to."""
    fresh_process(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        f"import {module}\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not added & {'transformers', 'triton', 'matplotlib', 'numpy'}, added\n"
    )


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


# patching -> nn -> ops -> kernels: nothing imports what stands above it.
FORBIDDEN = {
    "ops": ("transformers", "fasttune.nn", "fasttune.patching", "fasttune.cli"),
    "nn": ("transformers", "fasttune.patching", "fasttune.cli"),
    "../kernels": ("transformers", "fasttune.ops", "fasttune.nn", "fasttune.patching"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder):
    files = list((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            assert not name.startswith(FORBIDDEN[folder]), f"{path} imports {name}"


def test_kernels_is_no_package_that_transformers_could_find():
    assert not (PACKAGE.parent / "kernels" / "__init__.py").exists()
    fresh_process("import fasttune.kernels, sys; assert 'kernels' not in sys.modules")
