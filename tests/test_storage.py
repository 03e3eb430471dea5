"""mlruns/ can be moved, and cleaned of what nothing refers to, of nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest

from conftest import House
from octofold.errors import UserError
from octofold.track import storage, tracking, versions


def _use(monkeypatch: pytest.MonkeyPatch, mlruns: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlruns / 'mlflow.db'}")


@pytest.fixture
def filled(mlruns: Path) -> dict[str, str]:
    """A store with a registered run and a loose one; returns their ids."""
    ids = {}
    for name in ("registered", "loose"):
        with tracking.run("train.slot", None, "pets", name=name) as run:
            run.log_text("weights", "model/model.safetensors")
            run.log_text("{}", "model/model.json")
            ids[name] = run.id
    versions.ensure_registered("pets.tiny.f0.s0", {})
    place = tracking.get_run(ids["registered"]).artifact_uri
    tracking.client().create_model_version("pets.tiny.f0.s0", f"{place}/model", run_id=ids["registered"])
    return ids


@pytest.mark.parametrize("named", [False, True])
def test_a_moved_store_finds_its_artifacts(
    mlruns: Path, filled: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool
) -> None:
    new = tmp_path / "another house" / "mlruns"
    new.parent.mkdir()
    shutil.move(mlruns, new)
    _use(monkeypatch, new)
    with pytest.raises(UserError, match="relocate"):
        tracking.download(filled["loose"], "model")
    dry = storage.relocate(dry=True)
    changed = storage.relocate(str(mlruns) if named else "")
    assert changed == dry
    assert {"experiments.artifact_location", "runs.artifact_uri", "model_versions.source"} <= set(changed)
    assert tracking.download(filled["loose"], "model").is_relative_to(new)
    source = versions.existing_version("pets.tiny.f0.s0", 1).source
    assert (tracking.fetch_uri(source, "it") / "model.safetensors").read_text() == "weights"
    assert storage.relocate() == storage.relocate(str(mlruns)) == {}
    with tracking.run("train", None, "pets") as run:
        run.log_text("new", "new.txt")
    assert tracking.download(run.id, "new.txt").is_relative_to(new)


def test_a_neighbour_with_a_longer_name_is_left_alone(mlruns: Path, filled: dict[str, str]) -> None:
    beside = f"{mlruns.as_uri()}-old/artifacts/x"
    tracking.client().create_experiment("beside", artifact_location=beside)
    storage.relocate()
    assert tracking.client().get_experiment_by_name("beside").artifact_location == beside


@pytest.mark.parametrize(
    ("address", "old", "words"),
    [
        ("http://127.0.0.1:9", "", "a local sqlite store"),
        ("sqlite:////nowhere/mlruns/mlflow.db", "", "the store that was moved"),
        ("", "never/was/here", "nothing in the store is there"),
        ("", "/never/was/here", "nothing in the store is there"),
    ],
)
def test_relocate_refuses(mlruns: Path, monkeypatch: pytest.MonkeyPatch, address: str, old: str, words: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address or f"sqlite:///{mlruns / 'mlflow.db'}")
    with pytest.raises(UserError, match=words):
        storage.relocate(old)


def test_gc_finds_rubbish_and_nothing_else(mlruns: Path, filled: dict[str, str]) -> None:
    assert storage.rubbish() == []
    unknown = mlruns / "artifacts" / "pets" / ("0" * 32)
    work = [mlruns / "work" / "pets" / "tiny" / name for name in ("f0.s0", "f1.s0")]
    cached = mlruns / "cache" / "f00d"
    for folder in (unknown, *work, cached):
        folder.mkdir(parents=True)
        (folder / "file").write_text("something")
    os.utime(work[0] / "file", (0, 0))
    for run_id in filled.values():
        tracking.client().delete_run(run_id)  # the registered one is still needed
    (mlruns / "work" / "pets" / "tiny" / "f2.s0").mkdir()  # made just now, and nothing in it yet
    found = storage.rubbish()
    loose = mlruns / "artifacts" / "pets" / filled["loose"]
    assert {item.path for item in found} == {unknown, work[0], cached, loose}
    assert {item.run_id for item in found} == {"", filled["loose"]}


def test_gc_leaves_deleted_experiments_and_what_lies_elsewhere(
    mlruns: Path, filled: dict[str, str], tmp_path: Path
) -> None:
    api = tracking.client()
    elsewhere = api.create_experiment("elsewhere", artifact_location=(tmp_path / "outside").as_uri())
    theirs = api.create_run(elsewhere).info.run_id
    api.log_text(theirs, "mine", "file.txt")
    for run_id in (theirs, filled["loose"]):
        api.delete_run(run_id)
    api.delete_experiment(api.get_experiment_by_name("pets").experiment_id)
    found = storage.rubbish()
    assert {item.run_id for item in found} == {filled["loose"]}
    storage.remove(found)
    assert tracking.get_run(filled["registered"]).artifact_uri
    assert tracking.get_run(theirs).artifact_uri
    assert list((tmp_path / "outside").rglob("file.txt"))


def test_gc_knows_the_runs_of_other_stores_in_the_same_folder(
    mlruns: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_store, mlruns.parent / "second.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlruns.parent / 'second.db'}")
    for competition in ("pets", "birds"):
        with tracking.run("train.slot", None, competition) as run:
            run.log_text("weights", "model/model.json")
    assert Path(tracking.download(run.id, "model")).is_relative_to(mlruns)
    assert storage.rubbish() == []
    _use(monkeypatch, mlruns)
    tracking.experiment("pets")
    assert storage.rubbish() == []
    (mlruns.parent / "second.db").unlink()
    (found,) = storage.rubbish()
    assert found.path.parent == mlruns / "artifacts" / "pets"


def test_gc_leaves_a_run_that_began_while_it_looked(mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(prefix: str) -> list[object]:
        with tracking.run("train.slot", None, "pets") as run:
            run.log_text("weights", "model/model.json")
        return real(prefix)

    real = versions.registered_models
    tracking.experiment("pets")
    monkeypatch.setattr(versions, "registered_models", slow)
    assert storage.rubbish() == []


def test_gc_leaves_a_run_that_was_restored_after_the_listing(filled: dict[str, str]) -> None:
    tracking.client().delete_run(filled["loose"])
    found = storage.rubbish()
    tracking.client().restore_run(filled["loose"])
    assert storage.remove(found) == 0
    assert tracking.download(filled["loose"], "model").exists()


@pytest.mark.slow
def test_gc_removes_it(mlruns: Path, filled: dict[str, str]) -> None:
    tracking.client().delete_run(filled["loose"])
    found = storage.rubbish()
    assert storage.remove(found) == sum(item.bytes for item in found) > 0
    assert storage.rubbish() == []
    with pytest.raises(UserError, match="run"):
        tracking.get_run(filled["loose"])
    assert tracking.download(filled["registered"], "model").exists()


@pytest.mark.slow
def test_the_commands_keep_a_record_of_what_they_did(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    mlruns = house.home / "mlruns"
    _use(monkeypatch, mlruns)
    tracking.experiment("pets")
    unknown = mlruns / "artifacts" / "pets" / ("0" * 32)
    unknown.mkdir(parents=True)
    (unknown / "file").write_text("something")
    listed = house.run("gc").result
    assert (listed["found"], listed["freed"]) == ([str(unknown)], 0)
    removed = house.run("gc", "--yes").result  # the run before is no rubbish, nor is its own
    assert (removed["found"], removed["freed"], unknown.exists()) == ([str(unknown)], 9, False)
    new = House(house.home.with_name("another house"))
    house.home.rename(new.home)
    assert "run_id" not in new.run("relocate", "--dry").result
    moved = new.run("relocate").result
    _use(monkeypatch, new.home / "mlruns")
    for done, name, key in (
        (listed, "gc.json", "found"),
        (removed, "gc.json", "found"),
        (moved, "relocate.json", "changed"),
    ):
        info = tracking.get_run(done["run_id"])
        assert (info.status, info.tags["competition"]) == ("FINISHED", storage.HOUSEKEEPING)
        kept = json.loads(tracking.download(info.id, name).read_text())
        assert kept[key]
    assert tracking.get_run(removed["run_id"]).metrics["gc/freed"] == 9
    assert tracking.get_run(removed["run_id"]).params["cfg.yes"] == "True"
    assert tracking.get_run(moved["run_id"]).metrics["relocate/values"] == sum(moved["changed"].values())
