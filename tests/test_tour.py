"""The whole house, room by room, through `mlflow run . -e ENTRY`: from another folder, a path with spaces, one store.

What each command does is tested elsewhere; here, that every entry point of MLproject takes its parameters from the
command line, ends well, and leaves exactly the run that MLflow opened for it, with its entry, params and end.
"""

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY, House

pytestmark = pytest.mark.slow
ENTRIES = set(yaml.safe_load((REPOSITORY / "MLproject").read_text())["entry_points"])
SHORT = '[{"name":"short","epochs":1}]'

Go = Callable[..., dict[str, Any]]


@pytest.fixture
def project(house: House) -> Path:
    """What git holds of the project, in a folder whose path has a space; its store is the house's empty one."""
    for name in ("MLproject", "conda.yaml", "src", "entrypoints", "configs"):
        source = REPOSITORY / name
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        (
            shutil.copytree(source, house.home / name, ignore=ignore)
            if source.is_dir()
            else shutil.copy(source, house.home)
        )
    return house.home


@pytest.fixture
def went() -> set[str]:
    """The entry points that ran."""
    return set()


@pytest.fixture
def go(
    project: Path, went: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Go]:
    """Run an entry point as the `mlflow run` command does, and return the JSON object of its last line."""
    import mlflow

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name, value in House(project).environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # as after `activate`
    monkeypatch.delenv("OCTOFOLD_HOME", raising=False)  # a project run from its own folder is its own home
    store, before = f"sqlite:///{project}/mlruns/mlflow.db", mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)  # MLflow prefers what this process said last to the variable

    def run(entry: str, **params: object) -> dict[str, Any]:
        capfd.readouterr()
        given = {name.replace("__", "."): str(value) for name, value in params.items()}
        done = mlflow.projects.run(
            str(project), entry, parameters=given, env_manager="local", experiment_name="digits", run_name=entry
        )
        said = capfd.readouterr()
        assert done.get_status() == "FINISHED", said.err
        result: dict[str, Any] = json.loads(said.out.strip().splitlines()[-1])
        logged = mlflow.MlflowClient().get_run(done.run_id)
        assert result["run_id"] == logged.data.tags.get("continued_in", done.run_id)
        logged = mlflow.MlflowClient().get_run(result["run_id"])
        assert logged.data.tags["entry"] == {"main": "train"}.get(entry, entry)
        assert any(key.startswith("cfg.") for key in logged.data.params)
        assert logged.info.status == "FINISHED"
        went.add(entry)
        return result

    yield run
    mlflow.set_tracking_uri(before)


def test_every_entry_point_through_mlflow(go: Go, went: set[str], project: Path) -> None:
    go("demo", folds=2, configs='["configs/digits/wide.yaml"]')
    manifest = project / "data" / "digits" / "manifest.csv"
    short = {"manifest": manifest, "phases": SHORT}
    go("train", manifest=manifest, config="configs/digits/wide.yaml")  # as the demo did: nothing is trained again
    go("main", config="configs/digits/cnn.yaml", **short)
    go("promote", competition="digits", member="cnn", stage="production")
    blend, other = (
        go("blend", competition="digits", tta="none", method=method)["submission"] for method in ("lr_mse", "equal")
    )
    go("compare", submission=blend, other=other)
    with open(blend, newline="") as file:
        first = next(csv.DictReader(file))
    go("explain", submission=blend, image=next(iter(first.values())))
    go("score", competition="digits", submission=blend, public=0.98)
    go("report", competition="digits")
    go("evaluate", manifest=manifest, competition="digits", member="cnn")
    go("infer", images=manifest.with_name("test.csv"), model="models:/digits.cnn.f0.s0@production", tta="flip")
    go("clean", manifest=manifest, serve="false", limit=20)
    go("probe", field="loss.label_smoothing", values="0.0,0.1", folds=0, config="configs/digits/wide.yaml", **short)
    small = project / "small.yaml"
    small.write_text("recipe: {member: small, model: {name: small_cnn, input_size: 16}, augment: {preset: upright}}\n")
    space = '{"optim.lr": {"low": 1e-3, "high": 1e-2, "log": true}}'
    go("tune", manifest=manifest, config=small, space=space, trials=1, folds=0, confirm_seeds=0, recipe__phases=SHORT)
    bundle = go("export", competition="digits", member="cnn", out=project / "cnn.zip")["bundle"]
    assert go("import", bundle=bundle, manifest=manifest)["new"] == 0
    journal = manifest.with_name("decisions.jsonl")
    journal.write_text(dropped(manifest))
    go("prepare", competition="digits", builtin="digits", folds=2, decisions=journal)
    go("worth", config="configs/digits/wide.yaml", folds=0, journal=journal, **short)
    go("relocate")
    go("gc")
    assert ENTRIES == went


def dropped(manifest: Path) -> str:
    """A journal that drops the manifest's first image."""
    from octofold.data.journal import Entry

    with manifest.open(newline="") as file:
        row = next(csv.DictReader(file))
    return Entry(sample_id=row["sample_id"], action="drop", label=row["label"], reviewer="me", entry="e1").line()
