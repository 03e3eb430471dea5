"""The house stands as drawn: arrows point down, heavy dependencies live in one file each, names are right."""

import ast
from pathlib import Path

import pytest

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "octofold"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

FOUNDATION = {"errors", "files", "config", "store", "outage", "provenance", "spool", "workers"}
LEAVES = {"recipe", "commands", "metrics", "tta", "tracking", "compute", "plots", "profiling"}
PARTS = {
    "validation",
    "distill",
    "calibration",
    "job",
    "interrupt",
    "features",
    "checkpoint",
    "batches",
    "versions",
    "registry",
    "sources",
    "archives",
    "hub",
    "findings",
    "lineage",
    "grouping",
    "embedding",
    "kinship",
    "checks",
    "neighbours",
    "manifest",
    "images",
    "folds",
    "tasks",
    "augment",
    "models",
    "harden",
    "gallery",
    "landmarks",
    "networks",
    "weights",
    "optim",
    "predictions",
    "engine",
    "space",
    "studies",
    "trials",
    "journal",
    "suspicion",
    "evidence",
    "combining",
    "solvers",
    "stacking",
    "blending",
    "estimate",
    "shift",
    "verdict",
    "submission",
    "ledger",
    "shakeup",
    "scores",
    "chronicle",
    "axes",
    "page",
    "advice",
    "ensemble",
    "looks",
}
HOME = {  # a heavy dependency and the one file that may say its name
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
BETWEEN_WORKFLOWS = {  # the exceptions, each because one writes what the other is for
    ("training", "outcome"),  # the loop, and what it leaves behind
    ("outcome", "inference"),
    ("probing", "members"),  # an arm of a probe is a member,
    ("probing", "estimate"),  # and its gain a paired resample
    ("probing", "registry"),
    ("probing", "training"),
    ("members", "training"),  # a member is trained slots, tracked
    ("bundles", "serving"),  # an imported slot is packed as a trained one is
    ("bundles", "training"),
    ("worth", "probing"),  # old and new manifest are the arms of a probe
    ("worth", "training"),
    ("review", "cleaning"),
    ("review", "desk"),  # the page without the web framework
    ("desk", "cleaning"),
    ("cleaning", "vectors"),
    ("vectors", "features"),
    ("vectors", "embedding"),
    ("report", "boards"),  # the page shows what the boards said
    ("sweep", "tuning"),  # a sweep is a study
    ("sweep", "training"),  # over trainings
    ("lineup", "inference"),  # a lineup is what a stage's models say, so it has to ask them
    ("assembly", "lineup"),  # the blend's workflow, from a stage
    ("assembly", "inference"),
    ("assembly", "serving"),  # to one registered model
    ("assembly", "succession"),
    ("serving", "inference"),
    ("served", "inference"),
    ("succession", "estimate"),
    ("members", "serving"),
    ("serving", "registry"),
    ("shards", "inference"),  # a big job is inference cut into parts,
    ("results", "inference"),  # and what it leaves behind
    ("results", "shards"),
    ("crews", "shards"),  # parts of a job side by side
    ("crews", "inference"),
    ("crews", "looks"),
    ("members", "promotion"),  # train --stage
}


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names if node.module == "octofold"}
    return found


def rooms_of(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    names = {name.split(".")[1] for name in imports_of(path) if name.startswith("octofold.")}
    return names & set(MODULES)


def floor(module: str) -> int:
    """Height of a module: an import must go to a lower floor (or, among parts, sideways without a cycle)."""
    return 0 if module in FOUNDATION else 1 if module in LEAVES else 2 if module in PARTS else 3


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    for other in rooms_of(PACKAGE / f"{module}.py"):
        if floor(module) == floor(other) == 3:
            assert (module, other) in BETWEEN_WORKFLOWS, f"{module} -> {other}: workflows do not import each other"
        elif (module, other) == ("commands", "recipe"):
            continue  # train's flags are a recipe's fields
        elif floor(module) != 2 and floor(module) != 0:
            assert floor(other) < floor(module), f"{module} -> {other} does not point down"
        else:
            assert floor(other) <= floor(module), f"{module} -> {other} points up"


def test_no_cycles() -> None:
    graph = {module: rooms_of(PACKAGE / f"{module}.py") - {module} for module in MODULES}
    while leaves := [module for module, others in graph.items() if not others]:
        for leaf in leaves:
            del graph[leaf]
        graph = {module: others - set(leaves) for module, others in graph.items()}
    assert not graph, f"a cycle among {sorted(graph)}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_dependencies_live_in_one_file(module: str) -> None:
    for name in imports_of(PACKAGE / f"{module}.py"):
        top = name.split(".")[0]
        assert module in HOME.get(top, {module}), f"{module} imports {top}, which belongs to {HOME[top]}"


@pytest.mark.parametrize("module", MODULES)
def test_rooms_are_small(module: str) -> None:
    lines = (PACKAGE / f"{module}.py").read_text().count("\n")
    assert lines <= 400, f"{module} has {lines} lines: move a wall"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "entrypoints").glob("*.py")), ids=lambda path: path.stem)
def test_entry_points_are_light_to_import(path: Path) -> None:
    tree = ast.parse(path.read_text())
    top = {name for node in tree.body if isinstance(node, ast.Import) for name in (alias.name for alias in node.names)}
    top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    ours = {name for name in top if name.startswith("octofold")}
    assert ours <= {"octofold.commands", "octofold.config", "octofold.errors", "octofold.files"}, ours
    assert not {name.split(".")[0] for name in top} & (set(HOME) | {"torch", "pandas", "numpy", "sklearn"})


def test_no_rag_bag() -> None:
    assert not {"utils", "common", "helpers", "base", "misc"} & set(MODULES)
