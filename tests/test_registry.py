"""Slots: registered whole or not at all, once, and found in a stage by alias or by MLflow's stage."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import servers
from octofold.errors import UserError
from octofold.files import read_json, sha256_file, write_json
from octofold.predictions import Predictions
from octofold.track import promotion, registry, storage, tracking, versions
from octofold.track.registry import Slot

Register = Callable[..., Slot]


def checkpoint(folder: Path, **card: object) -> Path:
    """A checkpoint folder as train writes it, with weights that are no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(repr(sorted(card.items())).encode() * 100)
    write_json(
        folder / "model.json",
        {
            "recipe": {"model": {"name": "small_cnn"}, "folds": None},
            "task": "classify",
            "classes": ["cat", "dog"],
            "competition": "pets",
            "member": "tiny",
            "fold": 0,
            "seed": 0,
            "manifest_hash": "a" * 64,
            "model_sha": sha256_file(weights),
        }
        | card,
    )
    return folder


@pytest.fixture
def register(mlruns: Path, tmp_path: Path) -> Register:
    """Train nothing, register something: a slot's new version, from a run of its own."""

    def make(member: str = "tiny", fold: int = 0, seed: int = 0, **card: object) -> Slot:
        with tracking.run("train.slot", None, "pets", tags={"member": member}) as run:
            folder = tmp_path / run.id
            oof = Predictions(
                np.array(["x"]),
                np.array([[0.25, 0.75]]),
                ("cat", "dog"),
                "a" * 64,
                member,
                "s",
                "flip",
                np.array([fold]),
            )
            oof.save(folder / "oof" / "flip.parquet")
            run.log_artifacts(folder / "oof", "oof")
            card = {"member": member, "fold": fold, "seed": seed, "info": {"run": run.id}} | card
            return registry.register_slot(run, checkpoint(folder / "model", **card))

    return make


def place(slot: Slot, alias: str | None = None, stage: str | None = None) -> None:
    """What a person does in MLflow's UI."""
    if alias:
        versions.set_alias(slot.name, alias, slot.version)
    if stage:
        versions.set_stage(slot.name, slot.version, stage)


def standing(stage: str = "production") -> dict[str, int]:
    return {slot.name: slot.version for group in registry.resolve("pets", stage).values() for slot in group}


def test_a_slot_knows_where_it_comes_from(register: Register) -> None:
    slot = register(fold=2, seed=1)
    assert (slot.name, slot.version, slot.fold, slot.seed, slot.member) == ("pets.tiny.f2.s1", 1, 2, 1, "tiny")
    tags = versions.existing_version(slot.name, 1).tags
    assert {"competition", "member", "fold", "seed", "manifest_hash", "classes_hash", "model_sha", "git.commit"} <= set(
        tags
    )
    assert tags["manifest_hash"] == "a" * 64
    folder = registry.fetch(slot)
    assert sha256_file(folder / "model.safetensors") == slot.model_sha
    oof = registry.oof(slot, "flip")
    assert oof is not None
    assert oof.values.tolist() == [[0.25, 0.75]]
    assert registry.oof(slot, "geo8") is None


def test_registering_twice_makes_one_version(mlruns: Path, tmp_path: Path) -> None:
    with tracking.run("train.slot", None, "pets") as run:
        folder = checkpoint(tmp_path / "model")
        first = registry.register_slot(run, folder)
        assert registry.register_slot(run, folder) == first
    assert [slot.version for slot in registry.slots("pets")["tiny"]["pets.tiny.f0.s0"]] == [1]


def test_a_cut_upload_registers_nothing(mlruns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "model")

    def cut(self: tracking.Run, directory: Path, into: str = "") -> None:
        half = tmp_path / "half"
        shutil.copytree(directory, half)
        (half / "model.safetensors").write_bytes(b"half")
        whole(self, half, into)

    whole = tracking.Run.log_artifacts
    with tracking.run("train.slot", None, "pets") as run:
        monkeypatch.setattr(tracking.Run, "log_artifacts", cut)
        with pytest.raises(UserError, match="model/model.safetensors"):
            registry.register_slot(run, folder)
        assert registry.slots("pets") == {}
        monkeypatch.undo()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlruns / 'mlflow.db'}")
        assert registry.register_slot(run, folder).version == 1


@pytest.mark.parametrize(("alias", "stage"), [("production", None), (None, "Production"), ("production", "Production")])
def test_alias_or_stage_set_by_hand_is_honoured(register: Register, alias: str | None, stage: str | None) -> None:
    register()
    second = register()
    assert standing() == {}
    place(second, alias, stage)
    assert standing() == {"pets.tiny.f0.s0": 2}
    assert standing("staging") == {}


def test_two_candidates_are_refused(register: Register) -> None:
    place(register(), alias="production")
    place(register(), stage="Production")
    with pytest.raises(UserError, match=r"alias on version 1, MLflow stage on version 2"):
        standing()


@pytest.mark.parametrize("hand", [{"alias": "production"}, {"stage": "Production"}])
def test_the_hand_that_moves_last_wins_over_promote(register: Register, hand: dict[str, str]) -> None:
    register()
    with tracking.run("promote", None, "pets") as run:
        promotion.promote(run, "pets", "tiny", "production", manifest_hash="a" * 64, all_folds=[0])
    assert standing() == {"pets.tiny.f0.s0": 1}
    place(register(), **hand)
    assert standing() == {"pets.tiny.f0.s0": 2}


def test_archiving_by_hand_takes_a_slot_out(register: Register) -> None:
    slot = register()
    with tracking.run("promote", None, "pets") as run:
        promotion.promote(run, "pets", "tiny", "production", manifest_hash="a" * 64, all_folds=[0])
    place(slot, stage="Archived")
    assert standing() == {}


def test_one_version_may_stand_in_both_stages(register: Register) -> None:
    slot = register()
    place(slot, "production", "Production")
    place(slot, "staging")
    assert standing("production") == standing("staging") == {slot.name: 1}


def test_members_are_told_apart_by_name_not_pattern(register: Register) -> None:
    place(register(member="a_b"), alias="production")
    place(register(member="a-b"), alias="production")
    assert set(registry.resolve("pets", "production", ["a_b"])) == {"a_b"}
    assert registry.resolve("pet", "production") == {}
    with pytest.raises(UserError, match=r"member 'nobody' of pets"):
        registry.resolve("pets", "production", ["nobody"])


@pytest.fixture
def served(mlruns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server, so that what is fetched is kept in the house."""
    monkeypatch.setattr(registry, "ROOT", mlruns.parent)
    server = servers.MlflowServer(f"sqlite:///{mlruns / 'mlflow.db'}", tmp_path).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    yield
    server.stop()


@pytest.mark.slow
def test_versions_registered_by_hand_are_kept_apart(
    served: None, mlruns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fold in (0, 1):
        name = registry.slot_name("hand", "tiny", fold, 0)
        with tracking.run("train.slot", None, "hand") as run:
            run.log_artifacts(checkpoint(tmp_path / str(fold), fold=fold), "model")
            versions.ensure_registered(name, {})
            made = tracking.client().create_model_version(name, f"{run.artifact_uri}/model", run_id=run.id)
        versions.set_alias(name, "production", made.version)  # without tags, as MLflow's UI does
    kept = [registry.fetch(slot) for slot in registry.resolve("hand", "production")["tiny"] * 2]
    assert [read_json(folder / "model.json")["fold"] for folder in kept] == [0, 1, 0, 1]
    assert {folder.parent for folder in kept} == {mlruns / "cache"}
    assert kept[:2] == kept[2:]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlruns / 'mlflow.db'}")
    assert not [item for item in storage.rubbish() if "cache" in item.path.parts]


def test_weights_that_are_not_the_ones_registered_are_refused(register: Register, mlruns: Path) -> None:
    slot = register()
    (card,) = mlruns.rglob("model.json")
    write_json(card, read_json(card) | {"model_sha": "f" * 64})
    with pytest.raises(UserError, match=r"(?s)version 1.*model.json of ffffffffffff"):
        registry.fetch(slot)


def test_deleted_under_the_reader(register: Register, mlruns: Path) -> None:
    slot, other = register(), register(fold=1)
    tracking.client().delete_registered_model(slot.name)
    with pytest.raises(UserError, match=r"pets.tiny.f0.s0 version 1"):
        registry.fetch(slot)
    shutil.rmtree(mlruns / "artifacts")
    with pytest.raises(UserError, match=r"pets.tiny.f1.s0 version 1"):
        registry.fetch(other)


def test_an_alias_goes_with_its_version(register: Register) -> None:
    slot = register()
    place(slot, alias="production")
    tracking.client().delete_model_version(slot.name, "1")
    assert standing() == {}


def test_a_promoted_version_that_was_deleted_is_missed_until_the_slot_is_promoted_again(register: Register) -> None:
    def promote() -> None:
        with tracking.run("promote", None, "pets") as run:
            promotion.promote(run, "pets", "tiny", "production", manifest_hash="a" * 64, all_folds=[0, 1])

    first, other = register(), register(fold=1)
    register()
    promote()
    tracking.client().delete_model_version(first.name, "2")
    with pytest.raises(UserError, match=r"(?s)alias production of pets.tiny.f0.s0.*version 2.*deleted.*promote again"):
        standing()
    promote()
    assert standing() == {first.name: 1, other.name: 1}
    tracking.client().delete_model_version(first.name, "1")
    with pytest.raises(UserError, match=r"tag octofold.production"):
        standing()
    tracking.client().delete_registered_model_tag(first.name, "octofold.production")
    assert standing() == {other.name: 1}


def test_no_checkpoint_no_version(mlruns: Path, tmp_path: Path) -> None:
    with tracking.run("train.slot", None, "pets") as run, pytest.raises(UserError, match="a checkpoint folder"):
        registry.register_slot(run, tmp_path)


def test_recipe_hash_ignores_how_fast_and_how_many() -> None:
    recipe = {"optim": {"lr": 1.0}, "folds": [0], "runtime": {"threads": 1}, "member": "a"}
    assert registry.recipe_hash(recipe) == registry.recipe_hash(recipe | {"folds": None, "runtime": {}, "member": "b"})
    assert registry.recipe_hash(recipe) != registry.recipe_hash(recipe | {"optim": {"lr": 2.0}})
