"""Exact resume: whatever kills or stops a training, the same call ends with the same bits and leaves one trace."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import REPOSITORY
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.recipe import Recipe
from octofold.train import checkpoint, training
from world import make_world

LEFT_BEHIND = """
import json
from octofold.track import tracking
api = tracking.client()
runs = []
for run in tracking.find_runs("tiny"):
    points = [(key, point) for key in run.metrics for point in api.get_metric_history(run.id, key)]
    history = sorted((key, point.step, point.value) for key, point in points)
    steps = [(key, point.step) for key, point in points]
    runs.append({"status": run.status, "tags": run.tags, "steps": steps, "history": history})
names = [model.name for model in api.search_registered_models()]
versions = {name: len(api.search_model_versions(f"name='{name}'")) for name in names}
print(json.dumps({"runs": runs, "versions": versions}))
"""


def python(*arguments: str, home: Path) -> str:
    """Run Python in a house and return its stdout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment = kept | {"OCTOFOLD_HOME": str(home), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bits_and_one_trace(tmp_path: Path) -> None:
    kills = json.loads(python(str(REPOSITORY / "tests" / "killing.py"), str(tmp_path), "3", home=tmp_path))
    assert sum(kills.values()) >= 20, kills
    left = json.loads(python("-c", LEFT_BEHIND, home=tmp_path))
    slots = {run["tags"]["member"]: run for run in left["runs"] if run["tags"]["entry"] == "train.slot"}
    runs = Counter((run["tags"]["member"], run["tags"]["entry"]) for run in left["runs"])
    assert set(runs.values()) == {1}, f"more than one run for a slot: {runs}"
    assert {run["status"] for run in left["runs"]} == {"FINISHED"}
    assert set(left["versions"].values()) == {1}, left["versions"]
    for run in left["runs"]:
        steps = Counter(map(tuple, run["steps"]))
        assert set(steps.values()) <= {1}, f"a metric logged twice: {steps.most_common(3)}"
    for member in kills:
        whole = slots[f"{member.partition('-')[0]}-whole"]
        assert slots[member]["tags"]["model_sha"] == whole["tags"]["model_sha"], member
        assert slots[member]["history"] == whole["history"], member
    resumed = "".join(log.read_text() for log in tmp_path.glob("*-killed*.log"))
    assert "goes on at phase" in resumed  # not merely begun anew each time


RECIPE: dict[str, Any] = {
    "model": {"name": "small_cnn", "input_size": 16},
    "augment": {"preset": "baseline"},
    "optim": {"sam_rho": 0.05},
    "phases": [{"epochs": 2}, {"name": "more", "epochs": 1, "optimizer": "sgd"}],
    "batch_size": 8,
    "tta": "none",
    "runtime": {"precision": "fp32", "channels_last": "on"},
}


def train(home: Path, folder: str, report: Any = None, **changes: Any) -> training.SlotResult:
    """Train fold 0 of the tiny world in `folder`."""
    recipe = Recipe.model_validate(RECIPE | changes)
    return training.train_slot(recipe, manifest_of(home), 0, 0, home / folder, report or (lambda *_: None))


def manifest_of(home: Path) -> Manifest:
    """The tiny world, with its pixel cache inside `home`."""
    return make_world(home, samples=48)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A house for in-process trainings."""
    for module in ("data.images", "train.features", "train.calibration", "nets.engine"):
        monkeypatch.setattr(f"octofold.{module}.ROOT", tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """All tensors and plain values of a checkpoint."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{name}.{key}")]
    if isinstance(value, list):
        return [leaf for place, item in enumerate(value) for leaf in leaves(item, f"{name}.{place}")]
    return [(name, value)]


def test_a_stop_file_and_control_c_leave_the_same_state(home: Path) -> None:
    whole = train(home, "whole")

    def stop_file(epoch: int, metrics: dict[str, float]) -> None:
        (home / "stopped" / "stop").touch()

    def control_c(epoch: int, metrics: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    for folder, report in (("stopped", stop_file), ("broken", control_c)):
        with pytest.raises(KeyboardInterrupt):
            train(home, folder, report)
    ours, theirs = (dict(leaves(checkpoint.load(home / folder))) for folder in ("stopped", "broken"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name
    sha = (whole.model_folder / "model.safetensors").read_bytes()
    for folder in ("stopped", "broken"):
        assert (train(home, folder).model_folder / "model.safetensors").read_bytes() == sha
    assert not (home / "stopped" / "stop").exists()


def test_stopped_where_a_phase_ends_early_it_ends_with_the_same_bits(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = {"name": "probe", "epochs": 5, "train": "head", "lr": 1e-9, "schedule": "constant"}
    changes: dict[str, Any] = {"phases": [probe, {"epochs": 3, "lr": 1e-3}], "early_stop": 1}
    changes["runtime"] = RECIPE["runtime"] | {"checkpoint_s": 0}
    whole = train(home, "whole", **changes)
    assert list(whole.history["phase"])[:3] == ["probe", "probe", "finetune"]

    def stop(epoch: int, metrics: dict[str, float]) -> None:
        (home / "slot" / "stop").touch()

    real = training.enter

    def enter(made: Any, number: int) -> Any:
        if number == 1:  # the checkpoint is still that of the phase before
            raise KeyboardInterrupt
        return real(made, number)

    with monkeypatch.context() as patch:
        patch.setattr(training, "enter", enter)
        with pytest.raises(KeyboardInterrupt):
            train(home, "slot", **changes)
    with pytest.raises(KeyboardInterrupt):  # after the first step of the phase's second epoch
        train(home, "slot", stop, **changes)
    result = train(home, "slot", **changes)
    assert list(result.history["valid/accuracy"]) == list(whole.history["valid/accuracy"])
    sha = (whole.model_folder / "model.safetensors").read_bytes()
    assert (result.model_folder / "model.safetensors").read_bytes() == sha


def test_stopped_before_batchnorm_is_counted_it_ends_with_the_same_bits(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stochastic depth is at work while it is counted."""
    changes: dict[str, Any] = {
        "model": {"name": "mobilenetv3_small_050", "input_size": 32, "drop_path": 0.5},
        "average": {"kind": "swa", "start_epoch": 0},
        "phases": [{"epochs": 1}],
        "select": "last",
    }
    whole = train(home, "whole", **changes)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("octofold.train.optim.refresh_statistics", stop)
        with pytest.raises(KeyboardInterrupt):
            train(home, "stopped", **changes)
    sha = (whole.model_folder / "model.safetensors").read_bytes()
    assert (train(home, "stopped", **changes).model_folder / "model.safetensors").read_bytes() == sha


def test_a_changed_recipe_manifest_or_code_is_refused_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(epoch: int, metrics: dict[str, float]) -> None:
        (home / "slot" / "stop").touch()

    with pytest.raises(KeyboardInterrupt):
        train(home, "slot", stop)
    with pytest.raises(UserError, match=r"recipe optim\.lr \(default -> 0\.01\)"):
        train(home, "slot", optim={"sam_rho": 0.05, "lr": 0.01})
    table = manifest_of(home)
    table.table.loc[0, "label"] = "birch"
    with pytest.raises(UserError, match="manifest hash"):
        training.train_slot(Recipe.model_validate(RECIPE), table, 0, 0, home / "slot", lambda *_: None)
    before = checkpoint.code_versions()
    monkeypatch.setattr(checkpoint, "code_versions", lambda: before | {"code training.py": "other"})
    with pytest.raises(UserError, match=r"code training\.py"):
        train(home, "slot")
    monkeypatch.setattr(checkpoint, "code_versions", lambda: before)
    train(home, "slot", member="renamed", runtime={"precision": "fp32", "channels_last": "on", "checkpoint_s": 1})


def test_a_way_pinned_that_is_not_the_checkpoints_is_refused(home: Path) -> None:
    def stop(epoch: int, metrics: dict[str, float]) -> None:
        (home / "slot" / "stop").touch()

    with pytest.raises(KeyboardInterrupt):
        train(home, "slot", stop)
    for changes, words in (
        ({"precision": "bf16"}, r"runtime\.precision\n.*: fp32\n.*bf16\n.*--restart true"),
        ({"channels_last": "off", "compile": "on"}, r"channels_last, runtime\.compile\n.*on, off\n.*off, on\n"),
        ({"threads": 2}, r"runtime\.threads\n.*: 1\n.*2\n"),
    ):
        with pytest.raises(UserError, match=words):
            train(home, "slot", runtime=RECIPE["runtime"] | changes)
    train(home, "slot", runtime={"workers": 1})  # all left to the checkpoint, but what changes nothing


def test_a_damaged_checkpoint_is_refused(home: Path) -> None:
    home.joinpath("slot").mkdir()
    (home / "slot" / "checkpoint.pt").write_bytes(b"half a checkpo")
    with pytest.raises(UserError, match="--restart"):
        train(home, "slot")


def test_a_finished_slot_is_returned_not_trained(home: Path) -> None:
    first = train(home, "slot")
    again = train(home, "slot", lambda *_: pytest.fail("trained again"))
    assert again.metrics == first.metrics
    assert (again.oof["none"].values == first.oof["none"].values).all()
