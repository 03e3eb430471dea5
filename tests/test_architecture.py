"""The house stands as drawn: arrows point down, heavy dependencies live in one file each, names are right."""

import ast
from pathlib import Path

import pytest

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "octofold"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")

LOOKS_INTO = {  # a room, and the rooms it may import from besides the hall (the modules at the top of the package)
    "hall": set(),
    "track": set(),
    "data": set(),
    "nets": {"data"},
    "infer": {"data", "nets", "track"},
    "prepare": {"data", "nets", "blend"},  # `shift` tells how unlike the test images are
    "train": {"data", "nets", "infer", "track"},
    "blend": {"data", "nets", "infer", "track"},
    "clean": {"data", "nets", "train", "track"},
    "tune": {"data", "nets", "train", "blend", "track"},
    "reports": {"data", "blend", "track"},
}
HOME = {  # a heavy dependency and the one file that may say its name (beside the code that MLflow itself runs)
    "mlflow": {"tracking", "served", "serving"},
    "optuna": {"studies", "tuning"},
    "accelerate": {"compute"},
    "ray": {"compute"},
    "timm": {"models"},
    "albumentations": {"augment"},
    "openvino": {"engine"},
    "flask": {"review"},
    "matplotlib": {"plots"},
}


def room(path: Path) -> str:
    """The room a module is in."""
    return path.parent.name if path.parent != PACKAGE else "hall"


PLACE = {path.stem: room(path) for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names if node.module.startswith("octofold")}
    return found


def neighbours_of(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "octofold" and len(parts) > 1:
            found |= {parts[2]} if parts[1] in LOOKS_INTO and len(parts) > 2 else {parts[1]}
    return found & set(PLACE)


def test_names_are_unique_and_rooms_are_known() -> None:
    assert len(PLACE) == len(FILES), "two modules of one name"
    assert set(PLACE.values()) <= set(LOOKS_INTO)
    assert all((PACKAGE / name / "__init__.py").read_text().startswith('"""') for name in LOOKS_INTO if name != "hall")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arrows_point_down(path: Path) -> None:
    for other in neighbours_of(path) - {path.stem}:
        allowed = LOOKS_INTO[room(path)] | {room(path), "hall"}
        assert PLACE[other] in allowed, f"{room(path)}/{path.stem} looks into {PLACE[other]}/{other}"


def test_rooms_have_an_order() -> None:
    done: set[str] = set()
    while free := {name for name, others in LOOKS_INTO.items() if name not in done and others <= done}:
        done |= free
    assert done == set(LOOKS_INTO), f"a cycle among {sorted(set(LOOKS_INTO) - done)}"


def test_no_cycles() -> None:
    graph = {path.stem: neighbours_of(path) - {path.stem} for path in FILES}
    while leaves := {module for module, others in graph.items() if not others}:
        graph = {module: others - leaves for module, others in graph.items() if module not in leaves}
    assert not graph, f"a cycle among {sorted(graph)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_heavy_dependencies_live_in_one_file(path: Path) -> None:
    for name in imports_of(path):
        top = name.split(".")[0]
        assert path.stem in HOME.get(top, {path.stem}), f"{path.stem} imports {top}, which belongs to {HOME[top]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_small(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= 400, f"{path.stem} has {lines} lines: move a wall"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "entrypoints").glob("*.py")), ids=lambda path: path.stem)
def test_entry_points_are_light_to_import(path: Path) -> None:
    tree = ast.parse(path.read_text())
    top = {name for node in tree.body if isinstance(node, ast.Import) for name in (alias.name for alias in node.names)}
    top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    ours = {name for name in top if name.startswith("octofold")}
    assert ours <= {"octofold.commands", "octofold.config", "octofold.errors", "octofold.files"}, ours
    assert not {name.split(".")[0] for name in top} & (set(HOME) | {"torch", "pandas", "numpy", "sklearn"})


def test_no_rag_bag() -> None:
    assert not {"utils", "common", "helpers", "base", "misc"} & (set(PLACE) | set(LOOKS_INTO))
