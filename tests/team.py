"""Two project folders that train one member against one store, as two machines do."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY, House
from octofold.track import tracking
from world import make_world

FLAGS = [
    *("--member", "m", "--model.name", "small_cnn", "--model.input_size", "16", "--folds", "0,1"),
    *("--batch_size", "8", "--phases", '[{"epochs": 12}]', "--tta", "none", "--runtime.precision", "fp32"),
    *("--runtime.channels_last", "on", "--runtime.checkpoint_s", "0"),
]


class Team:
    """Two project folders, as on two machines, with one store."""

    def __init__(self, home: Path, store: str) -> None:
        self.home, self.store = home, store
        make_world(home / "world", samples=48)

    def start(self, name: str, *flags: str) -> "subprocess.Popen[str]":
        """Start the command in the folder `name`."""
        environment = House(self.home / name).environment() | {"MLFLOW_TRACKING_URI": self.store}
        script = str(REPOSITORY / "entrypoints" / "train.py")
        command = [sys.executable, script, "--manifest", str(self.home / "world" / "manifest.csv"), *FLAGS, *flags]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.home
        )

    def runs(self, monkeypatch: pytest.MonkeyPatch) -> list[tracking.RunInfo]:
        """What the store holds."""
        monkeypatch.setenv("MLFLOW_TRACKING_URI", self.store)
        return tracking.find_runs("tiny")


def read_until(process: "subprocess.Popen[str]", words: str) -> str:
    """What a command said until these words."""
    said = ""
    assert process.stderr is not None
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(said)


def check_shared_out(results: list[dict[str, Any]], runs: list[tracking.RunInfo], seeds: tuple[int, ...]) -> None:
    """Every slot one run and one version, one parent, and all commands give the same answer."""
    assert results[0] == results[-1]
    assert results[0]["slots"] == [f"tiny.m.f{fold}.s{seed}/1" for seed in seeds for fold in (0, 1)]
    entries = Counter((run.tags["entry"], run.tags.get("fold"), run.tags.get("seed")) for run in runs)
    assert set(entries.values()) == {1}
    assert len(entries) == 1 + 2 * len(seeds)
    assert {run.status for run in runs} == {"FINISHED"}
