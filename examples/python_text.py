"""Real text that every Python carries: docstrings of the standard library, and the language reference.

Nothing is downloaded, and one Python always yields the same examples in the same order.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "tarfile", "unittest", "urllib", "wsgiref", "xml")

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Example:
    text: str
    label: int


def _held_out(key: str, share: float) -> bool:
    """Decided by the key's hash: the same for ever, whatever else is in the data."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def _sources(package: str) -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted((library / package).rglob("*.py")) or [library / f"{package}.py"]
    return [path for path in files if not {"test", "tests"} & set(path.relative_to(library).parts)]


def docstrings(package: str, min_words: int = 5) -> list[str]:
    """The distinct docstrings of a standard-library package, in the order of its files."""
    found: dict[str, None] = {}
    for path in _sources(package):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, _DOCUMENTED):
                text = ast.get_docstring(node)
                if text is not None and len(text.split()) >= min_words:
                    found[text] = None
    return list(found)


def docstring_examples(
    packages: tuple[str, ...] = PACKAGES, held_out: float = 0.15
) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples: a docstring and the index of the package that it comes from.

    A docstring that stands in two packages has no one answer and is left out.
    """
    by_package = [docstrings(package) for package in packages]
    owners = Counter(text for texts in by_package for text in texts)
    examples = [Example(text, label) for label, texts in enumerate(by_package) for text in texts if owners[text] == 1]
    train = [example for example in examples if not _held_out(example.text, held_out)]
    return train, [example for example in examples if _held_out(example.text, held_out)]


@dataclass(frozen=True)
class Named:
    """A function or class by the words of its qualified name, and its docstring."""

    name: str
    text: str


def _words(name: str) -> str:
    """ "asyncio.BaseEventLoop.run_in_executor" as "asyncio base event loop run in executor"."""
    return " ".join(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[._]+", " ", name).lower().split())


def _named(package: str, path: Path, min_words: int) -> Iterator[Named]:
    def walk(node: ast.AST, outer: str) -> Iterator[Named]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{outer}.{child.name}"
                text = ast.get_docstring(child)
                if text is not None and len(text.split()) >= min_words and not child.name.startswith("_"):
                    yield Named(_words(name), " ".join(text.split()))
                yield from walk(child, name)

    return walk(ast.parse(path.read_bytes()), f"{package}.{path.stem}".removesuffix(".__init__"))


def named_docstrings(
    packages: tuple[str, ...] = PACKAGES, held_out: float = 0.3, min_words: int = 8
) -> tuple[list[Named], list[Named]]:
    """(training, held-out) pairs for retrieval: what a thing is called, what is said about it. Names and docstrings
    that stand in two places have no one answer and are left out."""
    pairs = [pair for package in packages for path in _sources(package) for pair in _named(package, path, min_words)]
    names, texts = Counter(pair.name for pair in pairs), Counter(pair.text for pair in pairs)
    pairs = [pair for pair in pairs if names[pair.name] == texts[pair.text] == 1]
    train = [pair for pair in pairs if not _held_out(pair.text, held_out)]
    return train, [pair for pair in pairs if _held_out(pair.text, held_out)]


def language_reference(every: int = 10) -> tuple[list[str], list[str]]:
    """(training, held-out) passages of the Python language reference, as `help("while")` prints it.

    Topics quote one another at length: a paragraph is kept where it comes first, so none is on both sides. Of the
    passages (some 2,000 characters of one topic) every tenth is held out.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    passages: list[str] = []
    for name in sorted(topics):
        passages.append("")
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())  # quotations are indented and wrapped anew
            if words and words not in seen:
                seen.add(words)
                if len(passages[-1]) > 2000:
                    passages.append("")
                passages[-1] += paragraph.strip("\n") + "\n\n"
    passages = [passage for passage in passages if passage]
    return [passage for number, passage in enumerate(passages) if number % every], passages[::every]
