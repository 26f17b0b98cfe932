"""The rooms of fasttune/patching import one way only, from the engine down to what a patch leaves behind."""

import ast
from pathlib import Path

import fasttune.patching

ROOT = Path(fasttune.patching.__file__).parent
# From the top: a room may import itself and the rooms below it.
ROOMS = ("__init__", "engine", "families", "layers", "promises", "padding", "marks", "premises", "options")


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path):
    """Modules of the package that a file imports, as file paths; those under TYPE_CHECKING are annotations only."""
    tree = ast.parse(path.read_text())
    annotations = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[:2] == ["fasttune", "patching"]:
                file = ROOT.joinpath(*parts[2:])
                if file.with_suffix(".py").exists():
                    yield file.with_suffix(".py")


FILES = {path: sorted(set(imports_of(path))) for path in sorted(ROOT.rglob("*.py"))}


def test_every_file_lies_in_a_room():
    assert {room_of(path) for path in FILES} == set(ROOMS)


def test_rooms_import_downwards():
    upwards = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path, others in FILES.items()
        for other in others
        if ROOMS.index(room_of(other)) < ROOMS.index(room_of(path))
    ]
    assert not upwards


def test_no_circle_inside_a_room():
    done, open_ = set(), []

    def visit(path):
        assert path not in open_, " -> ".join(str(p.relative_to(ROOT)) for p in (*open_, path))
        if path in done:
            return
        open_.append(path)
        for other in FILES[path]:
            visit(other)
        done.add(open_.pop())

    for path in FILES:
        visit(path)


def test_nothing_below_knows_patching():
    """Operations, modules and kernels do not know who calls them."""
    package = ROOT.parent
    below = [path for room in ("ops", "nn") for path in (package / room).rglob("*.py")]
    assert below
    assert not [path for path in below if "fasttune.patching" in path.read_text()]
