"""Members: whole `train` commands, interrupted and repeated."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import REPOSITORY, House
from octofold.commands import Train
from octofold.data import manifest
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.nets import models
from octofold.predictions import Predictions
from octofold.recipe import Recipe
from octofold.track import registry, tracking
from octofold.train import checkpoint, members, origin, training
from world import make_world

RUNS = """
import json
from octofold.track import tracking
runs = tracking.find_runs("tiny")
found = [{"id": run.id, "entry": run.tags["entry"], "status": run.status, "tags": run.tags} for run in runs]
files = {run.id: sorted(tracking.list_artifacts(run.id)) for run in runs}
print(json.dumps({"runs": found, "files": files}))
"""
FLAGS = [
    *("--member", "m", "--model.name", "small_cnn", "--model.input_size", "16", "--folds", "0,1", "--batch_size", "8"),
    *("--phases", '[{"epochs": 3}]', "--tta", "flip", "--runtime.precision", "fp32", "--runtime.channels_last", "on"),
]


def runs_of(house: House) -> dict[str, list[dict[str, str]]]:
    """What the store holds."""
    done = subprocess.run(
        [sys.executable, "-c", RUNS], env=house.environment(), capture_output=True, text=True, check=True
    )
    found: dict[str, list[dict[str, str]]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.slow
def test_control_c_then_the_same_command_goes_on_in_the_same_runs(house: House) -> None:
    make_world(house.home, samples=48)
    flags = ["--manifest", str(house.home / "manifest.csv"), *FLAGS]
    command = [sys.executable, str(REPOSITORY / "entrypoints" / "train.py"), *flags]
    with subprocess.Popen(
        command, env=house.environment(), cwd=house.home, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "epoch 1" in line:
                running.send_signal(signal.SIGINT)
                break
        _, rest = running.communicate(timeout=300)
        assert running.returncode == 130, rest
        assert "Traceback" not in rest
        assert "the same command goes on from here" in rest
    before = runs_of(house)["runs"]
    assert {run["status"] for run in before} == {"KILLED"}
    result = house.run("train", *flags).result
    assert result["member"] == "m"
    assert result["slots"] == ["tiny.m.f0.s0/1", "tiny.m.f1.s0/1"]
    assert 0 <= result["oof/accuracy"] <= 1
    left = runs_of(house)
    after = {run["id"]: run for run in left["runs"]}
    assert {run["id"] for run in before} <= set(after)
    assert {run["status"] for run in after.values()} == {"FINISHED"}
    assert sorted(run["entry"] for run in after.values()) == ["train", "train.slot", "train.slot"]
    for run in after.values():
        if run["entry"] == "train.slot":
            assert run["tags"]["mlflow.parentRunId"] == result["run_id"]
            wanted = {"history.csv", "curves.png", "config.yaml", "oof/none.parquet", "oof/flip.parquet"}
            assert wanted <= set(left["files"][run["id"]])
    again = house.run("train", *flags)
    assert again.result["slots"] == result["slots"]
    assert again.err.count("already trained") == 2
    assert len(runs_of(house)["runs"]) == 3


@pytest.mark.slow
def test_an_interrupted_training_refuses_other_settings_before_it_touches_anything(house: House, refuses) -> None:  # type: ignore[no-untyped-def]
    make_world(house.home, samples=48)
    flags = ["--manifest", str(house.home / "manifest.csv"), *FLAGS]
    folder = house.home / "mlruns" / "work" / "tiny" / "m" / "f1.s0"
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text('{"recipe batch_size": "8", "fold": "1"}')
    refuses(house.run("train", *flags, "--optim.lr", "0.5"), "recipe optim.lr (default -> 0.5)")
    assert runs_of(house)["runs"] == []


@pytest.fixture
def table(mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A world whose members are trained in this process."""
    for module in ("data.images", "train.features", "train.calibration", "train.members", "nets.engine"):
        monkeypatch.setattr(f"octofold.{module}.ROOT", mlruns.parent)
    torch.set_num_threads(1)
    make_world(mlruns.parent, samples=18, folds=2)
    return manifest.read(mlruns.parent / "manifest.csv")


def call(table: Manifest, **changes: Any) -> Train:
    """A member of two folds, of one epoch each."""
    settings: dict[str, Any] = {
        "member": "m", "model": {"name": "small_cnn", "input_size": 16}, "augment": {"preset": "none"},
        "phases": [{"epochs": 1}], "batch_size": 8, "tta": "none", "manifest": table.file, "parallel": 1,
        "runtime": {"precision": "fp32", "channels_last": "on", "device": "cpu", "threads": 1},
    }  # fmt: skip
    return Train.model_validate(settings | changes)


def train(table: Manifest, **changes: Any) -> dict[str, Any]:
    """Train it."""
    return members.train(call(table, **changes))


@pytest.mark.slow
def test_what_is_promoted_is_what_is_reported(table: Manifest) -> None:
    first = train(table, batch_size=6)
    train(table, batch_size=9)
    again = train(table, batch_size=6, stage="production")
    assert again["slots"] == first["slots"] == ["tiny.m.f0.s0/1", "tiny.m.f1.s0/1"]
    assert [slot.version for slot in registry.resolve("tiny", "production")["m"]] == [1, 1]


@pytest.mark.slow
def test_a_slot_whose_version_was_deleted_is_trained_again(table: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    train(table, stage="production")
    tracking.client().delete_model_version("tiny.m.f1.s0", "1")
    with pytest.raises(UserError, match="deleted"):
        registry.resolve("tiny", "production")
    again = train(table, stage="production")
    assert "tiny.m.f1.s0/1 was deleted" in caplog.text
    first, second = again["slots"]
    assert first == "tiny.m.f0.s0/1"
    assert [f"{slot.name}/{slot.version}" for slot in registry.resolve("tiny", "production")["m"]] == [first, second]
    caplog.clear()
    assert train(table)["slots"] == again["slots"]
    assert "deleted" not in caplog.text


@pytest.mark.slow
def test_the_member_shows_the_score_of_the_last_call_and_of_which_slots(table: Manifest) -> None:
    few = train(table, folds=[0])
    every = train(table)
    parent = tracking.get_run(every["run_id"])
    assert few["run_id"] == every["run_id"]
    assert parent.metrics["oof/accuracy"] == every["oof/accuracy"]
    assert (parent.tags["folds"], parent.tags["seeds"]) == ("0,1", "0")
    assert "cfg.batch_size" in parent.params
    assert not {"cfg.folds", "cfg.seeds"} & parent.params.keys(), "those of the first call, for good"
    with tracking.run("train", None, "tiny") as run:
        for value in (0.5, 0.75, 0.75, float("nan"), float("nan")):
            members._log_latest(run, {"oof/accuracy": value})
        assert run.metric_steps("oof/accuracy") == {0, 1, 2}


@pytest.mark.slow
def test_views_that_were_not_predicted_are_asked_for_in_words(table: Manifest) -> None:
    train(table, folds=[0], tta="flip")
    assert "oof.none/accuracy" in train(table, tta="none"), "fold 1 knows nothing of flip"
    with pytest.raises(UserError, match=r"(?s)tiny.m.f0.s0/1.*geo8.*flip, none.*--restart true"):
        train(table, tta="geo8")
    assert "oof.geo8/accuracy" in train(table, tta="geo8", restart=True)


@pytest.mark.slow
def test_weights_that_saw_the_held_out_rows_are_no_start(table: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    train(table)
    network = {"name": "small_cnn", "input_size": 16}
    with pytest.raises(UserError, match=r"(?s)fold 1 of tiny.*m of fold 0.*use \{fold\}"):
        train(table, member="next", model=network | {"weights": "models:/tiny.m.f0.s0/1"})
    assert not registry.models("tiny", ["next"]), "refused before the first slot"
    train(table, member="next", model=network | {"weights": "models:/tiny.m.f{fold}.s0/1"})
    assert "was trained on manifest" not in caplog.text
    kept = registry.fetch(registry.newest("tiny", ["m"])["m"][0])
    recipe = Recipe()
    other = Manifest(table.table, table.task, table.classes, "elsewhere", table.images)
    origin.check(recipe, other, 1, kept)
    origin.check(recipe, table, 1, kept / "other.pth")
    with pytest.raises(UserError, match="would flatter"):
        origin.check(recipe, table, 1, kept / "model.safetensors")
    models.write_model(kept, *_of_other_manifest(kept))
    origin.check(recipe, table, 0, kept)
    assert "was trained on manifest elder" in caplog.text


@pytest.mark.slow
def test_other_weights_at_the_same_address_are_another_training(table: Manifest) -> None:
    """An alias that moved, a file that was replaced."""
    network = {"name": "small_cnn", "input_size": 16, "weights": "models:/tiny.m.f{fold}.s0@best"}
    train(table, folds=[0])
    train(table, folds=[0], batch_size=4)
    store = tracking.client()
    store.set_registered_model_alias("tiny.m.f0.s0", "best", "1")
    first = train(table, member="next", model=network, folds=[0])["slots"]
    assert train(table, member="next", model=network, folds=[0])["slots"] == first == ["tiny.next.f0.s0/1"]
    store.set_registered_model_alias("tiny.m.f0.s0", "best", "2")
    assert train(table, member="next", model=network, folds=[0])["slots"] == ["tiny.next.f0.s0/2"]
    store.set_registered_model_alias("tiny.m.f0.s0", "best", "1")
    assert train(table, member="next", model=network, folds=[0])["slots"] == first


def test_another_swap_table_is_another_training(table: Manifest) -> None:
    one, two = (dataclasses.replace(table, info={"swap": swap}) for swap in ([1, 0], [0, 1]))
    for found in (lambda rows: members._tags(Recipe(), rows), lambda rows: checkpoint.identity(Recipe(), rows, 0, 0)):
        assert found(one) == found(one) != found(two) != found(table)


@pytest.mark.slow
def test_a_slot_stopped_before_it_was_registered_has_the_views_it_has(table: Manifest) -> None:
    recipe = Recipe(**{name: getattr(call(table), name) for name in Recipe.model_fields})
    folder = members._folder(table, recipe, 0, 0)
    training.train_slot(recipe, table, 0, 0, folder, lambda *_: None)
    with pytest.raises(UserError, match=r"(?s)f0.s0: already trained.*views flip"):
        train(table, folds=[0], tta="flip")
    assert "oof.none/accuracy" in train(table, folds=[0])


def _of_other_manifest(folder: Path) -> tuple[models.Net, models.ModelCard]:
    net, card = models.read_model(folder)
    card.manifest_hash = "elder"
    return net, card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (lambda path: {"distill": {"teacher": path}}, "distill.teacher.sha256"),
        (lambda path: {"augment": {"easy": {"by": "accuracy", "oof": path}}}, "augment.easy.oof.sha256"),
    ],
    ids=["teacher", "easy"],
)
def test_a_file_learned_from_counts_by_its_contents(
    table: Manifest, tmp_path: Path, changes: Callable[[str], dict[str, Any]], name: str
) -> None:
    def learn(seed: int) -> tuple[list[str], dict[str, str]]:
        values = np.random.default_rng(seed).dirichlet(np.ones(3), len(table.table)).astype(np.float32)
        said = Predictions(table.sample_ids, values, table.classes, table.hash, "b", "w", "none", table.fold)
        path = str(said.save(tmp_path / "oof.parquet"))
        recipe = Recipe.model_validate(changes(path))
        return train(table, folds=[0], **changes(path))["slots"], checkpoint.identity(recipe, table, 0, 0)

    (first, one), (same, _), (other, two) = learn(0), learn(0), learn(1)
    assert first == same == ["tiny.m.f0.s0/1"]
    assert other == ["tiny.m.f0.s0/2"]
    assert [key for key in one if one[key] != two[key]] == [name]
    assert not checkpoint.fingerprints(Recipe())
