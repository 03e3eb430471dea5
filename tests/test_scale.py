"""The same code against a server: PostgreSQL behind `mlflow server`, many workers, outages, cuts, planted passwords."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import servers
from conftest import REPOSITORY
from octofold import workers
from octofold.errors import UserError
from octofold.files import sha256_file, write_json
from octofold.track import registry, tracking, versions
from octofold.workers import Job
from team import Team, check_shared_out, read_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.postgres,
    pytest.mark.skipif(servers.binaries() is None, reason="needs PostgreSQL's server (apt-get install postgresql)"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.MlflowServer]:
    """One server for this file."""
    with servers.postgres() as url:
        one = servers.MlflowServer(url, tmp_path_factory.mktemp("server")).start()
        try:
            yield one
        finally:
            one.stop()


@pytest.fixture
def remote(server: servers.MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> servers.MlflowServer:
    """The server as this process's store: `MLFLOW_TRACKING_URI` is all that changes."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("OCTOFOLD_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setattr(tracking, "_SPOOL", tmp_path / "spool")
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    return server


def fill(competition: str, fold: int, seed: int, folder: str, kill: bool = False) -> list[object]:
    """What training a slot does to the store, without the training: find the run or make it, log, register."""
    mine = {"fold": str(fold), "seed": str(seed), "entry": "train.slot"}
    known = tracking.find_runs(competition, mine)
    seen_before = len(registry.slots(competition, ["tiny"]))
    with tracking.run(
        "train.slot", None, competition, tags=mine, parent=None, resume_id=known[0].id if known else None
    ) as run:
        done = run.metric_steps("loss")
        for step in range(3):
            if step not in done:
                run.log_metrics({"loss": 1.0 / (1 + step)}, step)
        model = Path(folder) / f"f{fold}.s{seed}"
        _checkpoint(model, competition, fold, seed)
        if kill and not known:
            run.log_artifact(model / "model.json", "model")
            os.kill(os.getpid(), signal.SIGKILL)
        slot = registry.register_slot(run, model)
    return [run.id, slot.version, seen_before]


def _checkpoint(folder: Path, competition: str, fold: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(f"{fold} {seed}".encode() * 1000)
    slot = {"competition": competition, "member": "tiny", "fold": fold, "seed": seed}
    model = {"recipe": {}, "task": "classify", "classes": ["a", "b"], "manifest_hash": "m"}
    write_json(folder / "model.json", slot | model | {"model_sha": sha256_file(folder / "model.safetensors")})


def fill_all(
    tmp_path: Path, competition: str, folds: int, seeds: int, count: int, kill: bool = False
) -> dict[str, object]:
    jobs = [
        Job(f"f{fold}.s{seed}", (competition, fold, seed, str(tmp_path), kill))
        for fold in range(folds)
        for seed in range(seeds)
    ]
    return workers.run(fill, jobs, count, [{"OMP_NUM_THREADS": "1"}] * count, 1, lambda _: None)


def test_eight_workers_on_forty_slots(remote: servers.MlflowServer, tmp_path: Path) -> None:
    first = fill_all(tmp_path, "many", 5, 8, 8)
    assert len(first) == 40
    runs = tracking.find_runs("many", {"entry": "train.slot"})
    assert len(runs) == len({(run.tags["fold"], run.tags["seed"]) for run in runs}) == 40
    assert {run.status for run in runs} == {"FINISHED"}
    assert {run.metrics["loss"] for run in runs} == {1.0 / 3}
    slots = registry.slots("many")["tiny"]
    assert {name: [slot.version for slot in kept] for name, kept in slots.items()} == {
        f"many.tiny.f{fold}.s{seed}": [1] for fold in range(5) for seed in range(8)
    }


def test_an_upload_that_is_killed_leaves_no_version(remote: servers.MlflowServer, tmp_path: Path) -> None:
    (result,) = fill_all(tmp_path, "cut", 1, 1, 1, kill=True).values()
    assert isinstance(result, list)
    run_id, version, seen_before = result
    assert (version, seen_before) == (1, 0)  # the second try found the run, and no half version
    (run,) = tracking.find_runs("cut")
    assert (run.id, run.status) == (run_id, "FINISHED")
    (slot,) = registry.slots("cut")["tiny"]["cut.tiny.f0.s0"]
    local = registry.fetch(slot)
    assert sha256_file(local / "model.safetensors") == slot.model_sha
    assert registry.fetch(slot) == local == tmp_path / "mlruns" / "cache" / slot.model_sha


def test_the_server_stops_in_mid_training(remote: servers.MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PAUSE_S", 0.0)
    with tracking.run("train", None, "outage") as run:
        run.log_metrics({"loss": 1.0}, 0)
        remote.stop()
        for step in range(1, 5):
            run.log_metrics({"loss": 1.0 / (1 + step)}, step)
        assert len(list((tracking._SPOOL).glob("*.jsonl"))) == 1
        remote.start()
        run.log_text("uploads wait, metrics are kept", "note.txt")
        run.log_metrics({"loss": 0.0}, 5)
    history = tracking.client().get_metric_history(run.id, "loss")
    assert [item.step for item in history] == [0, 1, 2, 3, 4, 5]
    assert tracking.get_run(run.id).status == "FINISHED"
    assert not list((tracking._SPOOL).glob("*.jsonl"))


def test_one_of_two_train_commands_is_killed(
    remote: servers.MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = Team(tmp_path, remote.url)
    killed = team.start("one", "--seeds", "0,1")
    read_until(killed, "m f0 s0 epoch 1:")
    killed.send_signal(signal.SIGSTOP)  # or it might be done with its slots before the other has begun
    other = team.start("two", "--seeds", "0,1")
    read_until(other, "epoch 0:")  # each is about a slot of its own
    killed.kill()
    killed.communicate()
    out, err = other.communicate(timeout=900)
    assert other.returncode == 0, err
    assert "taken over from" in err
    again, said = team.start("one", "--seeds", "0,1").communicate(timeout=900)
    assert "m f" not in said  # nothing was trained
    check_shared_out([json.loads(text.splitlines()[-1]) for text in (out, again)], team.runs(monkeypatch), (0, 1))
    for run in tracking.find_runs("tiny", {"entry": "train.slot", "member": "m"}):
        history = tracking.client().get_metric_history(run.id, "train/loss")
        assert sorted(item.step for item in history) == list(range(12))


def test_stages_by_hand_and_by_promote_on_the_server(remote: servers.MlflowServer) -> None:
    with tracking.run("train.slot", None, "hand") as run:
        for fold in range(2):
            versions.ensure_registered(f"hand.tiny.f{fold}.s0", {})
            source = f"{run.artifact_uri}/model"
            tracking.client().create_model_version(f"hand.tiny.f{fold}.s0", source, run_id=run.id)
    versions.set_alias("hand.tiny.f0.s0", "production", 1)
    versions.set_stage("hand.tiny.f1.s0", 1, "Production")
    assert [slot.fold for slot in registry.resolve("hand", "production")["tiny"]] == [0, 1]


def test_the_database_directly_and_its_password(
    remote: servers.MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", remote.store)
    with tracking.run("train", None, "direct", tags={"storage": remote.store}) as run:
        run.log_text(remote.store, "storage.txt")
    assert tracking.get_run(run.id).tags["storage"].startswith("postgresql://octofold:***@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", remote.store.replace(servers.PASSWORD, "wrong-password-1"))
    with pytest.raises(UserError, match="a database that lets us in") as error:
        tracking.client()
    assert "wrong-password-1" not in str(error.value)
    dump = subprocess.run(
        [str(servers.binaries()) + "/pg_dump", remote.store], capture_output=True, check=True, text=True
    ).stdout
    assert "direct" in dump
    assert servers.PASSWORD not in dump
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or servers.PASSWORD.encode() not in path.read_bytes()


def test_unreachable_at_the_start_is_told_by_a_command(tmp_path: Path) -> None:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://me:{servers.PASSWORD}@127.0.0.1:9"}
    command = [sys.executable, str(REPOSITORY / "entrypoints" / "promote.py"), "--competition", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "a tracking server that answers" in done.stderr
    assert "Traceback" not in done.stderr
    assert servers.PASSWORD not in done.stderr
