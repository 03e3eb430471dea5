"""Slots on a real Ray cluster of two nodes: a worker is killed, then a node is lost, and nothing is lost or doubled."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

import servers
from conftest import House
from octofold import compute
from octofold.errors import UserError
from octofold.track import registry, tracking
from octofold.workers import Job
from world import make_world

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the ray extra"),
]
EPOCHS = 30


@pytest.fixture
def cluster() -> Iterator["Cluster"]:
    """A head and a second node on loopback, with token authentication; stopped by their own pids."""
    folder = Path(tempfile.mkdtemp(prefix="ofr", dir="/tmp"))  # Ray's sockets need a short path
    one = Cluster(folder)
    try:
        one.head = one.start("--head", f"--port={one.port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false",
                             f"--temp-dir={folder / 'r'}")  # fmt: skip
        one.second = one.start(f"--address={one.address}", "--node-ip-address=127.0.0.2")
        yield one
    finally:
        for process in one.started:
            one.kill(process)
        shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """Ray nodes as child processes of this one."""

    head: "subprocess.Popen[bytes]"
    second: "subprocess.Popen[bytes]"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = servers.free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.started: list[subprocess.Popen[bytes]] = []
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": self.address}

    def start(self, *flags: str) -> "subprocess.Popen[bytes]":
        """Start a node with one CPU and wait until it is in."""
        ray = Path(sys.executable).with_name("ray")
        environment = {**os.environ, **self.environment, "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS")
        log = self.folder / f"node{len(self.started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [ray, "start", *flags, "--num-cpus=1", "--num-gpus=0", "--disable-usage-stats", "--block"],
                env=environment, stdout=output, stderr=output, cwd=self.folder,
            )  # fmt: skip
        self.started.append(process)
        servers.wait_until(lambda: b"Ray runtime started" in log.read_bytes(), process, "ray", 120)
        return process

    def holds(self, process: "subprocess.Popen[bytes]", pid: int) -> bool:
        """Whether a pid is of this node."""
        try:
            return process.pid in [parent.pid for parent in psutil.Process(pid).parents()]
        except psutil.NoSuchProcess:
            return False

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """Lose a node: its raylet, its workers, everything at once."""
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                try:
                    child.kill()
                except psutil.NoSuchProcess:
                    continue
        process.wait()


def until(found: Callable[[], Any], process: "subprocess.Popen[str]") -> Any:
    """Wait for something to be true while a command runs."""
    limit = time.monotonic() + 240
    while not (value := found()):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < limit
        time.sleep(0.1)
    return value


def train(house: House, member: str, *flags: str) -> list[str]:
    """The command that trains three slots."""
    recipe = {
        "member": member, "model.name": "small_cnn", "model.input_size": 16, "batch_size": 12, "tta": "none",
        "phases": json.dumps([{"epochs": EPOCHS}]), "runtime.precision": "fp32", "runtime.channels_last": "on",
        "runtime.checkpoint_s": 0, "runtime.threads": 1, "manifest": house.home / "world" / "manifest.csv",
    }  # fmt: skip
    script = Path(__file__).resolve().parents[1] / "entrypoints" / "train.py"
    given = [part for key, value in recipe.items() for part in (f"--{key}", str(value))]
    return [sys.executable, str(script), *given, *flags]


def slot_runs(member: str) -> list[tracking.RunInfo]:
    return tracking.find_runs("tiny", {"entry": "train.slot", "member": member})


@pytest.mark.slow
def test_a_killed_worker_and_a_lost_node(house: House, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    make_world(house.home / "world", samples=36)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{house.home / 'mlruns' / 'mlflow.db'}")
    environment = house.environment() | cluster.environment
    log = (house.home / "log").open("w+")
    command = subprocess.Popen(
        train(house, "far", "--executor", "ray"), env=environment, stdout=log, stderr=log, text=True
    )

    def on(node: "subprocess.Popen[bytes]") -> list[int]:
        return [
            int(run.tags["pid"])
            for run in slot_runs("far")
            if run.status == "RUNNING" and "train/loss" in run.metrics and cluster.holds(node, int(run.tags["pid"]))
        ]

    try:
        here, _ = until(lambda: [*on(cluster.head), *on(cluster.second)][:2] if on(cluster.second) and on(cluster.head)
                        else None, command)  # fmt: skip
        os.kill(here, 9)
        cluster.kill(cluster.second)
        command.wait(timeout=400)
    finally:
        command.kill()
        command.wait()
        log.seek(0)
        told = log.read()
        log.close()
    assert command.returncode == 0, told
    near = subprocess.run(
        train(house, "near", "--parallel", "1"), env=house.environment(), capture_output=True, text=True
    )
    assert near.returncode == 0, near.stderr

    runs = slot_runs("far")
    assert sorted(run.tags["fold"] for run in runs) == ["0", "1", "2"]
    assert {run.status for run in runs} == {"FINISHED"}
    for run in runs:
        history = tracking.client().get_metric_history(run.id, "train/loss")
        assert sorted(item.step for item in history) == list(range(EPOCHS))
    for member in ("far", "near"):
        slots = registry.slots("tiny", [member])[member]
        assert {name: [slot.version for slot in kept] for name, kept in slots.items()} == {
            f"tiny.{member}.f{fold}.s0": [1] for fold in range(3)
        }
    far, near_ = ({run.tags["fold"]: run.tags["model_sha"] for run in slot_runs(member)} for member in ("far", "near"))
    assert far == near_


TUNE = {
    "recipe": {"member": "toy", "model": {"name": "small_cnn", "input_size": 16}, "phases": [{"epochs": 1}],
               "batch_size": 12, "select": "last",
               "runtime": {"precision": "fp32", "channels_last": "on", "threads": 1}},
    "space": {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "model.drop_rate": {"low": 0.0, "high": 0.5}},
    "folds": [0, 1], "trials": 3, "confirm_seeds": 0, "sampler": "tpe",
}  # fmt: skip


@pytest.mark.slow
def test_a_study_on_a_cluster_made_for_it_is_the_study_made_here(house: House) -> None:
    make_world(house.home / "world", samples=36)
    (house.home / "toy.yaml").write_text(json.dumps(TUNE))
    flags = ["--manifest", house.home / "world" / "manifest.csv", "--config", house.home / "toy.yaml"]
    with ThreadPoolExecutor() as at_once:
        studies = [["--study", "near"], ["--study", "far", "--executor", "ray"]]
        near, far = at_once.map(lambda more: house.run("tune", *flags, "--parallel", 1, *more).result, studies)
    tables = [
        (house.home / "mlruns" / "artifacts" / "tiny" / done["run_id"] / "artifacts" / "trials.csv").read_text()
        for done in (near, far)
    ]
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 1 + TUNE["trials"]
    assert [near[key] for key in ("trials", "slots", "search/best")] == [
        far[key] for key in ("trials", "slots", "search/best")
    ]


def test_no_cluster_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match="the head of a Ray cluster"):
        compute.map_jobs(abs, [Job("1", (-1,))], executor="ray")


def test_own_clusters_token_is_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    compute.own_token()
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert path.stat().st_mode & 0o077 == 0
    assert len(path.read_text()) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "given")
    compute.own_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == "given"
