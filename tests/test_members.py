"""Members: whole `train` commands, interrupted and repeated."""

import json
import signal
import subprocess
import sys

import pytest

from conftest import REPOSITORY, House
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
