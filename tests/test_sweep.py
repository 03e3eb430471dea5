"""The tune command on coloured squares: what it leaves in MLflow and on disk, also after a kill."""

import csv
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import REPOSITORY, House, Outcome
from labelled import make_manifest
from octofold import commands, config
from octofold.data import manifest
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.nets import models
from octofold.recipe import Model, Recipe
from octofold.train import outcome, training
from octofold.tune import sweep
from world import make_world

TUNE = """
recipe:
  member: toy
  model: {name: small_cnn, input_size: 16}
  augment: {preset: none}
  phases: [{name: scratch, epochs: 2}]
  batch_size: 256
  select: last
space:
  optim.lr: {low: 1e-4, high: 1e-1, log: true}
  model.drop_rate: {low: 0.0, high: 0.5}
warm_start: [{optim.lr: 0.01}]
folds: [0, 1]
trials: 4
objectives: [score, inference_ms]
confirm_seeds: 1
sampler: tpe
"""
# Killed at the third trial's second slot, when one epoch is done.
KILLED = f"""
import os, signal, sys
sys.argv[0] = "tune.py"
sys.path.insert(0, {str(REPOSITORY / "entrypoints")!r})
from octofold import commands, config
from octofold.train import training
from octofold.tune import sweep
from octofold.train import training
begun = []
real = training.train_slot
def train_slot(recipe, table, fold, seed, folder, report, devices, start=None):
    begun.append(fold)
    def told(epoch, metrics):
        report(epoch, metrics)
        if len(begun) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(recipe, table, fold, seed, folder, told, devices, start)
training.train_slot = train_slot
sweep.tune(config.load(commands.Tune, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def tuned(shared_house: House) -> tuple[House, Outcome]:
    """A house where tune was killed once and then ran to its end."""
    manifest = str(make_manifest(shared_house.home / "data")[0].file)
    (shared_house.home / "toy.yaml").write_text(TUNE)
    flags = ["--manifest", manifest, "--config", str(shared_house.home / "toy.yaml")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *flags],
        cwd=shared_house.home,
        env=shared_house.environment() | {"PYTHONPATH": str(REPOSITORY / "src")},
        stderr=subprocess.PIPE,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    return shared_house, shared_house.run("tune", *flags)


def runs(house: House) -> list[dict[str, Any]]:
    """Every run of the tune command as its tags, with `status`, `id` and its parent."""
    with sqlite3.connect(house.home / "mlruns" / "mlflow.db") as store:
        found = {
            run: {"id": run, "status": status} for run, status in store.execute("SELECT run_uuid, status FROM runs")
        }
        for run, key, value in store.execute("SELECT run_uuid, key, value FROM tags"):
            found[run][key] = value
    return [run for run in found.values() if run["entry"].startswith("tune")]


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_by_a_kill(tuned: tuple[House, Outcome]) -> None:
    house, outcome = tuned
    result = outcome.result
    assert result["trials"] == 4
    found = runs(house)
    assert {run["status"] for run in found} == {"FINISHED"}
    parents = [run for run in found if run["entry"] == "tune"]
    assert [run["id"] for run in parents] == [result["run_id"]]
    of_trials = [run for run in found if run["entry"] == "tune.trial"]
    assert {run["mlflow.parentRunId"] for run in of_trials} == {result["run_id"]}
    named = Counter((run["purpose"], run["trial"]) for run in of_trials)
    assert set(named.values()) == {1}
    assert sum(purpose == "trial" for purpose, _ in named) == 4
    of_slots = [run for run in found if run["entry"] == "tune.slot"]
    assert set(Counter((run["purpose"], run["trial"], run["fold"], run["seed"]) for run in of_slots).values()) == {1}
    assert sum(run["purpose"] == "trial" for run in of_slots) == result["slots"] == 8
    assert {run["mlflow.parentRunId"] for run in of_slots} == {run["id"] for run in of_trials}
    assert not list((house.home / "mlruns" / "work").rglob("*.pt"))


@pytest.mark.slow
def test_the_recipe_is_ready_to_train_and_says_what_is_known(tuned: tuple[House, Outcome]) -> None:
    house, outcome = tuned
    result = outcome.result
    text = Path(result["recipe"]).read_text()
    best = config.build(Recipe, yaml.safe_load(text), "best.yaml")
    assert best.phases[0].name == "scratch"
    assert result["run_id"] in text
    assert "base recipe" in result["verdict"]
    front = [config.build(Recipe, yaml.safe_load(Path(path).read_text()), path) for path in result["pareto"]]
    assert 1 <= len(front) <= 4
    artifacts = house.home / "mlruns" / "artifacts" / "world" / result["run_id"] / "artifacts"
    pictures = {path.stem for path in (artifacts / "plots").glob("*.png")}
    assert pictures >= {"history", "slice", "parallel", "timeline", "pareto"}
    with (artifacts / "trials.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["optim.lr"]) for row in table[:2]] == [Recipe().optim.lr, 0.01]  # the base recipe, then the known
    full = [float(row["score"]) for row in table if row["outcome"] == "full"]
    assert all(float(row["inference_ms"]) > 0 for row in table)
    assert max(full) == pytest.approx(result["search/best"])


@pytest.mark.slow
def test_mistakes_are_told_and_secrets_are_not(
    tuned: tuple[House, Outcome], refuses: Callable[[Outcome, str], None]
) -> None:
    house, _ = tuned
    manifest = house.home / "data" / "manifest.csv"
    flags = ["--manifest", manifest, "--config", house.home / "toy.yaml"]
    before = len(runs(house))
    secret = "-".join(["planted", "word"])  # in one piece, it would be in the diff of this file that runs keep
    refuses(house.run("tune", *flags, "--storage", f"postgresql://octo:{secret}@127.0.0.1:1/studies"), "127.0.0.1")
    (house.home / "toy.yaml").write_text(TUNE.replace("high: 0.5", "high: 0.6"))
    outcome = house.run("tune", *flags)
    refuses(outcome, "model.drop_rate")
    assert len(runs(house)) == before
    assert not [path for path in house.home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


# ---- in this process ------------------------------------------------------------------------------------------------


@pytest.fixture
def table(mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A world whose studies run in this process."""
    for module in ("data.images", "train.features", "train.calibration", "tune.sweep", "tune.place", "nets.engine"):
        monkeypatch.setattr(f"octofold.{module}.ROOT", mlruns.parent)
    torch.set_num_threads(1)
    make_world(mlruns.parent, samples=18, folds=2)
    return manifest.read(mlruns.parent / "manifest.csv")


def tune(table: Manifest, recipe: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Search a toy's learning rate, one trial if not told otherwise."""
    base: dict[str, Any] = {
        "member": "toy", "model": {"name": "small_cnn", "input_size": 16}, "augment": {"preset": "none"},
        "phases": [{"epochs": 1}], "batch_size": 8,
        "runtime": {"precision": "fp32", "channels_last": "on", "device": "cpu", "threads": 1},
    }  # fmt: skip
    settings: dict[str, Any] = {
        "manifest": table.file, "config": Path("toy.yaml"), "recipe": base | (recipe or {}), "trials": 1,
        "space": {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}, "confirm_seeds": 0, "sampler": "random",
        "parallel": 1, "folds": [0], "out": table.images.parent / "found",
    }  # fmt: skip
    return sweep.tune(commands.Tune.model_validate(settings | changes))


def test_weights_that_saw_the_held_out_rows_are_no_start(table: Manifest, tmp_path: Path) -> None:
    network = Model(name="small_cnn", input_size=16)
    for fold in table.folds:
        card = models.ModelCard({}, "classify", table.classes, "tiny", "m", fold, 0, table.hash)
        models.write_model(tmp_path / f"f{fold}", models.build(network, 3), card)
    model = network.model_dump() | {"weights": str(tmp_path / "f1")}
    with pytest.raises(UserError, match=r"(?s)fold 0 of tiny.*m of fold 1.*use \{fold\}"):
        tune(table, {"model": model}, study="leaks")
    found = tune(table, {"model": model | {"weights": str(tmp_path / "f{fold}")}}, study="sound", folds=[0, 1])
    assert found["slots"] == 2


@pytest.mark.parametrize("average", ["none", "swa"])
def test_without_views_the_last_validation_is_the_score_whatever_select_says(
    table: Manifest, monkeypatch: pytest.MonkeyPatch, average: str
) -> None:
    seen: list[dict[str, float]] = []
    chosen: list[str] = []

    def train_slot(recipe: Recipe, *rest: Any) -> training.SlotResult:
        chosen.append(recipe.select)
        told = rest[4]

        def report(epoch: int, metrics: dict[str, float]) -> None:
            seen.append(metrics | {"valid/accuracy": 0.9 - epoch / 10})
            told(epoch, seen[-1])

        return real(recipe, *rest[:4], report, *rest[5:])

    real = training.train_slot
    monkeypatch.setattr(training, "train_slot", train_slot)
    recipe = {"phases": [{"epochs": 3}], "select": "best", "average": {"kind": average, "start_epoch": 1}}
    found = tune(table, recipe)
    assert chosen == ["last"]
    assert len(seen) == 3
    assert average == "swa" or found["search/best"] == pytest.approx(0.7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ends",
    [{}, {"early_stop": 1, "phases": [{"epochs": 30, "lr": 0.03}]}, {"average": {"kind": "swa", "start_epoch": 1}}],
)
def test_a_slot_is_scored_by_its_last_validation_also_when_it_was_stopped_on_its_way(
    table: Manifest, monkeypatch: pytest.MonkeyPatch, ends: dict[str, Any]
) -> None:
    """In bf16 a validation and the float32 pass over the held-out rows tell different losses."""
    stop_in: list[int] = []
    validated: list[float] = []
    real, look = training.train_slot, outcome.validate

    def train_slot(recipe: Recipe, *rest: Any) -> training.SlotResult:
        def report(epoch: int, metrics: dict[str, float]) -> None:
            validated.append(metrics["valid/log_loss"])
            if epoch in stop_in:
                stop_in.remove(epoch)
                rest[3].mkdir(parents=True, exist_ok=True)
                (rest[3] / "stop").touch()
            rest[4](epoch, metrics)

        return real(recipe, *rest[:4], report, *rest[5:])

    def at_the_end(*rest: Any) -> dict[str, float]:
        found = look(*rest)
        validated.append(found["valid/log_loss"])
        return found

    monkeypatch.setattr(training, "train_slot", train_slot)
    monkeypatch.setattr(outcome, "validate", at_the_end)
    runtime = {"precision": "bf16", "channels_last": "on", "device": "cpu", "threads": 1, "compile": "off"}
    recipe = {"metric": "log_loss", "phases": [{"epochs": 4}], "runtime": runtime} | ends
    whole = tune(table, recipe, study="whole")
    assert whole["search/best"] == validated[-1]
    stop_in.append(0)
    with pytest.raises(KeyboardInterrupt):
        tune(table, recipe, study="stopped")
    assert list((table.images.parent / "mlruns" / "work").rglob("checkpoint.pt"))
    assert tune(table, recipe, study="stopped")["search/best"] == whole["search/best"]


def test_a_recipe_that_overfits_is_no_base(table: Manifest) -> None:
    with pytest.raises(UserError, match=r"recipe\.overfit"):
        tune(table, {"overfit": 1})


@pytest.mark.slow
def test_a_killed_trial_takes_nothing_from_an_earlier_study_of_its_name(
    table: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[float] = []

    def train_slot(recipe: Recipe, *rest: Any) -> training.SlotResult:
        trained.append(recipe.optim.lr)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(recipe, *rest)

    real = training.train_slot
    monkeypatch.setattr(training, "train_slot", train_slot)
    first = tune(table, {"optim": {"lr": 1e-2}})
    (table.images.parent / "mlruns" / "optuna.db").unlink()
    with pytest.raises(KeyboardInterrupt):
        tune(table, {"optim": {"lr": 1e-4}})
    second = tune(table, {"optim": {"lr": 1e-4}})
    assert trained == [1e-2, 1e-4, 1e-4]
    assert second["run_id"] != first["run_id"]


def test_a_warm_start_of_a_field_that_is_not_searched_is_refused(table: Manifest) -> None:
    with pytest.raises(UserError, match=r"(?s)searched fields: optim\.lr.*optim\.momentum"):
        tune(table, warm_start=[{"optim.momentum": 0.5}])
