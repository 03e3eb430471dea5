"""Runs: opened, nested, resumed, closed rightly, and telling nothing they should not."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest
from matplotlib.figure import Figure

from octofold.config import Section
from octofold.errors import UserError
from octofold.track import store, tracking, versions
from octofold.track.provenance import identity
from octofold.track.spool import Spool


class Settings(Section):
    """Something to log."""

    lr: float = 3e-4
    storage: str = ""


def test_a_run_tells_what_it_was(mlruns: Path) -> None:
    with tracking.run("train", Settings(), "digits", name="cnn", tags={"member": "cnn"}) as run:
        run.log_metrics({"valid/loss": 1.0}, step=0)
        run.log_metrics({"valid/loss": 0.5, "lr": 1e-3}, step=1)
        run.log_text("hello", "deep/note.txt")
        run.log_dict({"a": 1}, "numbers.json")
        run.log_dataset(pd.DataFrame({"a": [1, 2], "b": ["x", None]}), "digits", "training", mlruns / "manifest.csv")
        figure = Figure()
        figure.subplots().plot([0, 1])
        run.log_figure(figure, "pictures/line.png")
        assert run.metric_steps("valid/loss") == {0, 1}
    found = tracking.get_run(run.id)
    assert (found.status, found.name) == ("FINISHED", "cnn")
    assert found.params == {"cfg.lr": "0.0003", "cfg.storage": ""}
    assert found.metrics == {"valid/loss": 0.5, "lr": 1e-3}
    assert {"competition", "entry", "member", "git.commit", "git.dirty", "pid", "host", "boot_id"} <= set(found.tags)
    files = set(tracking.list_artifacts(run.id)) - {"git.diff"}
    assert files == {"config.yaml", "deep/note.txt", "numbers.json", "pictures/line.png"}
    local = tracking.download(run.id, "deep/note.txt")
    assert local.read_text() == "hello"
    assert local.is_relative_to(mlruns / "artifacts" / "digits")
    assert not list((mlruns / "spool").glob("*"))


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("broken"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "FAILED")]
)
def test_status_says_how_it_ended(mlruns: Path, error: BaseException, status: str) -> None:
    opened = tracking.run("train", None, "digits")
    run = opened.__enter__()
    assert not opened.__exit__(type(error), error, None)
    assert tracking.get_run(run.id).status == status


def test_children_are_nested_and_found_by_tags(mlruns: Path) -> None:
    with tracking.run("train", None, "digits") as parent:
        for fold in range(2):
            above = parent if fold else parent.id
            with tracking.run("train.slot", None, "digits", tags={"fold": fold}, parent=above) as child:
                child.log_metrics({"oof/accuracy": fold}, 0)
    found = tracking.find_runs("digits", {"entry": "train.slot", "fold": "1"})
    assert [info.metrics for info in found] == [{"oof/accuracy": 1.0}]
    assert found[0].tags["mlflow.parentRunId"] == parent.id
    assert len(tracking.find_runs("digits", {"mlflow.parentRunId": parent.id})) == 2
    assert tracking.find_runs("other") == []


def test_a_resumed_run_is_the_same_run(mlruns: Path) -> None:
    with tracking.run("train", Settings(), "digits") as run:
        run.log_metrics({"loss": 1.0}, 0)
    with tracking.run("train", Settings(lr=1.0), "digits", resume_id=run.id) as again:
        again.log_metrics({"loss": 0.5}, 1)
    assert again.id == run.id
    found = tracking.get_run(run.id)
    assert found.status == "FINISHED"
    assert found.params["cfg.lr"] == "0.0003"  # a param never changes
    assert again.metric_steps("loss") == {0, 1}


def test_the_run_of_mlflow_run_is_adopted_once(mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tracking.client().create_run(tracking.experiment("other"))
    monkeypatch.setenv("MLFLOW_RUN_ID", given.info.run_id)
    with tracking.run("prepare", Settings(), "digits") as run:
        assert run.id == given.info.run_id
        assert "MLFLOW_RUN_ID" not in os.environ
        with tracking.run("part", None, "digits", parent=run) as child:
            assert child.id != run.id
    assert [info.id for info in tracking.find_runs("digits", {"entry": "prepare"})] == [run.id]


def test_a_planted_secret_reaches_nothing(mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2-hunter2"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
    settings = Settings(storage=f"postgresql://me:{secret}@db/optuna")
    with tracking.run("tune", settings, "digits", tags={"note": secret}) as run:
        run.log_text(f"connecting with {secret}", "log.txt")
        run.set_tags({"storage": settings.storage})
    with pytest.raises(ValueError, match="refused"), tracking.run("tune", settings, "digits"):
        raise ValueError(f"refused {settings.storage} {secret}")
    assert tracking.get_run(run.id).params["cfg.storage"] == "postgresql://me:***@db/optuna"
    for path in mlruns.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_orphans_are_closed_at_the_next_start(mlruns: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    gone = identity() | {"pid": str(dead.pid), "pid.started": f"{psutil.Process(dead.pid).create_time():.2f}"}
    dead.wait()
    place, api = tracking.experiment("digits"), tracking.client()
    orphan = api.create_run(place, tags={"competition": "digits"} | gone).info.run_id
    alive = api.create_run(place, tags={"competition": "digits"} | identity()).info.run_id
    elsewhere = api.create_run(place, tags={"competition": "digits"} | gone | {"host": "other"}).info.run_id
    with tracking.run("blend", None, "digits"):
        pass
    assert [tracking.get_run(one).status for one in (orphan, alive, elsewhere)] == ["KILLED", "RUNNING", "RUNNING"]


def test_metrics_survive_an_outage_in_order(mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.run("train", None, "digits") as run:
        real = tracking._send
        monkeypatch.setattr(tracking, "_send", _away)
        monkeypatch.setattr(tracking, "PAUSE_S", 0.0)
        for step in range(3):
            run.log_metrics({"loss": 3.0 - step}, step)
        assert run.metric_steps("loss") == set()
        monkeypatch.setattr(tracking, "_send", real)
        run.log_metrics({"loss": 0.0}, 3)
        history = tracking.client().get_metric_history(run.id, "loss")
        assert [(item.step, item.value) for item in history] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.0)]


def _away(run_id: str, notes: object) -> None:
    raise ConnectionRefusedError("nobody there")


def test_commands_that_share_a_run_log_its_params_at_once(mlruns: Path) -> None:
    with tracking.run("train", None, "digits") as run, ThreadPoolExecutor(4) as pool:
        at_once = threading.Barrier(4)

        def log(part: int) -> None:
            at_once.wait()
            run.log_params({f"cfg.{part}.{number}": number for number in range(8)})

        for part in range(6):
            list(pool.map(log, [part] * 4))
        assert len(tracking.get_run(run.id).params) == 48


def test_what_a_dead_process_left_is_delivered_by_the_next(mlruns: Path) -> None:
    made = tracking.client().create_run(
        tracking.experiment("digits"), tags={"competition": "digits"} | identity() | {"boot_id": "before"}
    )
    spool = Spool(mlruns / "spool" / f"{made.info.run_id}.jsonl")
    spool.append({"kind": "metrics", "rows": [["loss", 0.25, 1000, 7]]})
    spool.append({"kind": "end", "status": "FINISHED", "time": 2000})
    with tracking.run("blend", None, "digits"):
        pass
    found = tracking.get_run(made.info.run_id)
    assert (found.status, found.metrics) == ("FINISHED", {"loss": 0.25})
    assert not spool.path.exists()


def test_what_was_told_by_whoever_took_a_run_over_is_not_told_twice(mlruns: Path) -> None:
    """The dead process wrote epoch 1 down and did not tell it; its successor elsewhere trained the epoch anew."""
    tags = {"competition": "digits"} | identity() | {"boot_id": "before"}
    made = tracking.client().create_run(tracking.experiment("digits"), tags=tags)
    spool = Spool(mlruns / "spool" / f"{made.info.run_id}.jsonl")
    spool.append({"kind": "metrics", "rows": [["loss", 0.25, 1000, 1]]})
    spool.append({"kind": "end", "status": "KILLED", "time": 1001})
    for step in range(3):
        tracking.client().log_metric(made.info.run_id, "loss", 0.25, timestamp=2000 + step, step=step)
    tracking.client().set_terminated(made.info.run_id, "FINISHED")
    with tracking.run("blend", None, "digits"):
        pass
    history = tracking.client().get_metric_history(made.info.run_id, "loss")
    assert sorted(item.step for item in history) == [0, 1, 2]
    assert tracking.get_run(made.info.run_id).status == "FINISHED"
    assert not spool.path.exists()


def test_a_run_that_goes_on_tells_nothing_twice(mlruns: Path) -> None:
    with tracking.run("train", None, "digits") as parent, pytest.raises(KeyboardInterrupt):
        with tracking.run("train.slot", None, "digits", parent=parent) as run:
            raise KeyboardInterrupt
    # A worker was killed between writing an epoch down and telling it; the next worker of the same command goes on.
    Spool(mlruns / "spool" / f"{run.id}.jsonl").append({"kind": "metrics", "rows": [["loss", 0.5, 1000, 3]]})
    with tracking.run("train.slot", None, "digits", parent=parent, resume_id=run.id) as again:
        assert again.metric_steps("loss") == {3}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:9", "a tracking server that answers"),
        ("postgresql://me:hidden9@127.0.0.1:9/db", "a tracking server that answers"),
        ("file:///tmp/mlruns", "given up its file store"),
    ],
)
def test_no_server_is_a_users_error(mlruns: Path, monkeypatch: pytest.MonkeyPatch, address: str, words: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match=words) as error, tracking.run("train", None, "digits"):
        pass
    assert "hidden9" not in str(error.value)


def test_a_file_that_is_no_database(mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mlruns / "broken.db").write_text("this is not a database, but long enough to look like a file of some kind" * 20)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlruns / 'broken.db'}")
    with pytest.raises(UserError, match="an MLflow store"):
        tracking.client()


def test_missing_things_are_named(mlruns: Path) -> None:
    with pytest.raises(UserError, match="run '0123'"):
        tracking.get_run("0123")
    with tracking.run("train", None, "digits") as run:
        pass
    with pytest.raises(UserError, match="oof/geo8.parquet"):
        tracking.download(run.id, "oof/geo8.parquet")


def test_a_deleted_experiment_is_named(mlruns: Path) -> None:
    tracking.client().delete_experiment(tracking.experiment("digits"))
    with pytest.raises(UserError, match="deleted in MLflow"):
        tracking.experiment("digits")


@pytest.mark.slow
def test_many_processes_meet_on_an_empty_store(tmp_path: Path) -> None:
    code = "from octofold.track import tracking\nwith tracking.run('train', None, 'digits'): pass"
    environment = {**os.environ, "OCTOFOLD_HOME": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
        assert [info.status for info in tracking.find_runs("digits")] == ["FINISHED"] * 2
        default = tracking.client().get_experiment("0").artifact_location
    assert default == (tmp_path / "mlruns" / "artifacts" / "0").as_uri()
    assert store.database(f"sqlite:///{tmp_path}/mlruns/mlflow.db").exists()


@pytest.mark.slow
def test_four_processes_log_one_dataset_at_once(mlruns: Path) -> None:
    """MLflow looks whether a data set is known and then inserts it: whoever is second must not fail."""
    with tracking.run("train", None, "race") as run:
        pass
    program = (
        "import sys, pandas as pd; from octofold.track import tracking;"
        " run = tracking.Run(sys.argv[1], 'race', '', '0'); table = pd.DataFrame({'label': ['a', 'b']});"
        " tracking.client(); print('ready', flush=True); sys.stdin.readline();"
        " [run.log_dataset(table, f'data{n}', 'training') for n in range(8)]"
    )
    command = [sys.executable, "-c", program, run.id]
    pipe = subprocess.PIPE
    crowd = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(4)]
    for one in crowd:
        assert one.stdout
        assert one.stdout.readline() == "ready\n"
    for one in crowd:
        assert one.stdin
        one.stdin.write("go\n")
        one.stdin.flush()
    said = [one.communicate(timeout=300)[1] for one in crowd]
    assert [one.returncode for one in crowd] == [0] * 4, "\n".join(said)
    assert len(tracking.client().get_run(run.id).inputs.dataset_inputs) == 8


def test_names_with_quotes_are_looked_up_or_refused(mlruns: Path) -> None:
    with tracking.run("tune", None, "pets", tags={"study": "it's"}) as run:
        pass
    assert [info.id for info in tracking.find_runs("pets", {"study": "it's"})] == [run.id]
    assert versions.registered_models("pets.it's.") == versions.versions_of(["pets.it's.f0.s0"]) == []
    with pytest.raises(UserError, match="a name without quotes"):
        tracking.find_runs("pets", {"study": 'it\'s "it"'})
