"""The documentation agrees with the code where a machine can tell."""

import re
from pathlib import Path

import pytest

import fasttune
from fasttune import nn, ops

CHECKOUT = Path(__file__).parents[1]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for folder in ("fasttune", "csrc", "kernels", "scripts", "setup.py")
    for path in ((CHECKOUT / folder).rglob("*") if (CHECKOUT / folder).is_dir() else [CHECKOUT / folder])
    if path.suffix in {".py", ".cpp", ".h", ".inc", ".sh"}
]


def test_every_environment_variable_is_documented():
    read = set()
    for path in SOURCES:
        # names in quotes, or exported by a script: preprocessor symbols look alike but are not in quotes
        read |= set(re.findall(r"""["'](FASTTUNE_[A-Z_]+)["']""", path.read_text()))
    page = (CHECKOUT / "docs" / "environment.md").read_text()
    documented = set(re.findall(r"`(FASTTUNE_[A-Z_]+)`", page))
    assert read == documented


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target in re.findall(r"`((?:docs|fasttune|csrc|kernels|tests|benchmarks|examples|scripts)/[\w./-]+)`", text):
        assert "NAME" in target or (CHECKOUT / target).exists(), f"{page.name} speaks of {target}"


@pytest.mark.parametrize("module", [fasttune, ops, nn], ids=lambda module: module.__name__)
def test_the_api_page_lists_every_name(module):
    page = (CHECKOUT / "docs" / "api.md").read_text()
    for name in module.__all__:
        assert re.search(rf"`{name}\b", page), f"docs/api.md does not list {module.__name__}.{name}"


@pytest.mark.parametrize("module", [ops, nn], ids=lambda module: module.__name__)
def test_every_name_has_a_docstring(module):
    for name in module.__all__:
        assert (getattr(module, name).__doc__ or "").strip(), f"{module.__name__}.{name}"
