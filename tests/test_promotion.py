"""Promotion: gated, told, audited, finished after a cut, and undone to exactly what was."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import House, Outcome
from octofold.errors import UserError
from octofold.track import promotion, registry, tracking, versions
from world import make_world

HASH = "a" * 64


@pytest.fixture
def register(mlruns: Path) -> Callable[..., None]:
    """Put a version in the registry as `registry.register_slot` does, without weights."""

    def make(member: str = "tiny", folds: Sequence[int] = (0, 1), seed: int = 0, **tags: str) -> None:
        for fold in folds:
            name = registry.slot_name("pets", member, fold, seed)
            versions.ensure_registered(name, {"competition": "pets"})
            own = {"manifest_hash": HASH, "classes_hash": "c", "recipe_hash": "r", "model_sha": "s"} | tags
            tracking.client().create_model_version(name, "file:///nowhere", tags=own)

    return make


def promote(member: str = "tiny", stage: str = "production", **options: object) -> list[promotion.Move]:
    settings = {"manifest_hash": HASH, "all_folds": [0, 1]} | options
    with tracking.run("promote", None, "pets") as run:
        return promotion.promote(run, "pets", member, stage, **settings)  # type: ignore[arg-type]


def rollback(member: str = "", stage: str = "production") -> list[promotion.Move]:
    with tracking.run("promote", None, "pets") as run:
        return promotion.rollback(run, "pets", member, stage)


def standing(stage: str = "production") -> dict[str, int]:
    found = registry.resolve("pets", stage)
    return {slot.name.removeprefix("pets."): slot.version for group in found.values() for slot in group}


def everything() -> dict[str, object]:
    """All that a promotion may change, as MLflow has it."""
    return {
        model.name: (
            dict(model.aliases),
            {key: value for key, value in model.tags.items() if value},
            sorted((int(v.version), v.current_stage) for v in versions.versions_of([model.name])),
        )
        for model in versions.registered_models("pets.")
    }


def test_moves_alias_and_stage_and_says_what_it_replaced(register: Callable[..., None]) -> None:
    register()
    assert [(move.version, move.replaced) for move in promote()] == [(1, None), (1, None)]
    register()
    assert [(move.version, move.replaced) for move in promote()] == [(2, 1), (2, 1)]
    assert standing() == {"tiny.f0.s0": 2, "tiny.f1.s0": 2}
    stages = {v.version: v.current_stage for v in versions.versions_of(["pets.tiny.f0.s0"])}
    assert stages == {1: "Archived", 2: "Production"}


@pytest.mark.slow
def test_rollback_restores_exactly_step_by_step(register: Callable[..., None]) -> None:
    register()
    register(member="other")
    states = [everything()]
    promote(stage="staging")
    states.append(everything())
    promote()  # staging moves on to production
    states.append(everything())
    register()
    states.append(everything())
    promote("")  # both members at once
    assert standing() == {"tiny.f0.s0": 2, "tiny.f1.s0": 2, "other.f0.s0": 1, "other.f1.s0": 1}
    promote("")  # again: nothing to do, and nothing a rollback would stop at
    rollback()
    assert everything() == states[3]
    rollback("tiny")
    rollback(stage="staging")
    with pytest.raises(UserError, match="an earlier promotion"):
        rollback()
    assert [version for _, _, version in everything().values()] == [
        [(1, "None")], [(1, "None")], [(1, "None"), (2, "None")], [(1, "None"), (2, "None")],
    ]  # fmt: skip


def test_a_newer_version_in_production_leaves_staging_what_was_in_both(register: Callable[..., None]) -> None:
    register()
    promote()
    promote(stage="staging")
    register()
    before = everything()
    promote()
    assert standing() == {"tiny.f0.s0": 2, "tiny.f1.s0": 2}
    assert standing("staging") == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}
    rollback()
    assert everything() == before


def test_rollback_of_one_member_leaves_the_way_back_of_the_other(register: Callable[..., None]) -> None:
    register()
    register(member="other")
    promote("")
    assert {move.member for move in rollback("other")} == {"other"}
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}
    assert {move.member for move in rollback()} == {"tiny"}
    assert standing() == {}


def test_rollback_does_not_undo_somebody_elses_choice(register: Callable[..., None]) -> None:
    register()
    register()
    promote()
    versions.set_alias("pets.tiny.f0.s0", "production", 1)
    with pytest.raises(UserError, match="moved since"):
        rollback()


def test_nor_the_choice_somebody_made_by_mlflows_stage(register: Callable[..., None]) -> None:
    register()
    promote()
    register()
    promote()
    register(folds=[0])
    versions.set_stage("pets.tiny.f0.s0", 3, "Production")
    assert standing() == {"tiny.f0.s0": 3, "tiny.f1.s0": 2}
    with pytest.raises(UserError, match="MLflow stage on version 3, moved since"):
        rollback()
    assert standing() == {"tiny.f0.s0": 3, "tiny.f1.s0": 2}


def test_rollback_of_staging_leaves_production_to_what_moved_on_to_it(register: Callable[..., None]) -> None:
    register()
    promote()
    register()
    promote(stage="staging")
    promote()  # staging moves on, and is as empty as before
    before = everything()
    with pytest.raises(UserError, match="version none, moved since"):
        rollback(stage="staging")
    assert everything() == before
    rollback()
    rollback(stage="staging")
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}


def test_rollback_of_production_leaves_what_was_staged_since(register: Callable[..., None]) -> None:
    register()
    promote()
    register()
    promote(stage="staging")
    promote()
    register()
    promote(stage="staging")
    rollback()
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}
    assert standing("staging") == {"tiny.f0.s0": 3, "tiny.f1.s0": 3}
    assert everything()["pets.tiny.f0.s0"] == (
        {"production": 1, "staging": 3},
        {"competition": "pets", "octofold.production": "1", "octofold.staging": "3"},
        [(1, "Production"), (2, "Archived"), (3, "Staging")],
    )
    rollback(stage="staging")
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}
    assert standing("staging") == {}


def test_rollback_of_production_leaves_its_version_in_staging_if_it_was_put_there_since(
    register: Callable[..., None],
) -> None:
    register()
    promote()
    register()
    promote()
    promote(stage="staging")
    rollback()
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}
    assert standing("staging") == {"tiny.f0.s0": 2, "tiny.f1.s0": 2}


def test_rollback_of_staging_leaves_what_was_put_in_production_since(register: Callable[..., None]) -> None:
    register()
    promote()
    promote(stage="staging")  # one version in both
    register()
    promote(stage="staging")
    register()
    promote()
    assert standing("staging") == {"tiny.f0.s0": 2, "tiny.f1.s0": 2}
    rollback(stage="staging")
    assert standing() == {"tiny.f0.s0": 3, "tiny.f1.s0": 3}
    assert standing("staging") == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}


def test_a_rollback_cut_half_way_is_finished_by_the_same_command(
    register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    promote()
    register()
    promote()
    register()
    promote(stage="staging")

    def cut(name: str, alias: str, version: int | None) -> None:
        if name == "pets.tiny.f1.s0":
            raise KeyboardInterrupt
        real(name, alias, version)

    real = versions.set_alias
    with monkeypatch.context() as patch:
        patch.setattr(versions, "set_alias", cut)
        with pytest.raises(KeyboardInterrupt):
            rollback()
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 2}
    rollback()
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}
    assert standing("staging") == {"tiny.f0.s0": 3, "tiny.f1.s0": 3}


def test_rollback_onto_a_deleted_version_moves_nothing(register: Callable[..., None]) -> None:
    register()
    promote()
    register()
    promote()
    tracking.client().delete_model_version("pets.tiny.f1.s0", "1")
    before = everything()
    with pytest.raises(UserError, match=r"deleted: pets.tiny.f1.s0 version 1; nothing was moved"):
        rollback()
    assert everything() == before


def test_a_promotion_cut_twice_still_has_its_way_back(
    register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    promote()
    register()
    before = everything()

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("_apply", "_begin"):  # the second one before its own audit was written
        with monkeypatch.context() as patch:
            patch.setattr(promotion, function, cut)
            with pytest.raises(KeyboardInterrupt):
                promote()
    versions.set_alias("pets.tiny.f0.s0", "production", 2)
    rollback()
    assert everything() == before


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"folds": [0]}, {}, "fold 1 seed 0"),
        ({}, {"all_folds": [0, 1, 2]}, "fold 2 seed 0"),
        ({}, {"seeds": [0, 1]}, "fold 0 seed 1"),
        ({"manifest_hash": "b" * 64}, {}, "from manifest bbbbbbbbbbbb"),
        ({}, {"manifest_hash": None, "all_folds": None}, "a manifest to compare with"),
    ],
)
def test_the_gate(
    register: Callable[..., None], change: dict[str, object], options: dict[str, object], words: str
) -> None:
    register(**change)
    before = everything()
    with pytest.raises(UserError, match=words):
        promote(**options)
    assert everything() == before
    assert promote(**options, force=True)
    assert standing()


def test_slots_of_two_recipes_need_force(register: Callable[..., None]) -> None:
    register()
    register(folds=[0], recipe_hash="another")
    with pytest.raises(UserError, match="different recipes"):
        promote()
    promote(force=True)
    assert standing() == {"tiny.f0.s0": 2, "tiny.f1.s0": 1}


def test_some_seeds_do_not_bring_a_second_recipe_into_a_stage(register: Callable[..., None]) -> None:
    for seed in (0, 1):
        register(seed=seed)
    promote()
    register(recipe_hash="another")
    with pytest.raises(UserError, match="different recipes"):
        promote(seeds=[0])
    promote(seeds=[0], force=True)
    assert standing() == {"tiny.f0.s0": 2, "tiny.f1.s0": 2, "tiny.f0.s1": 1, "tiny.f1.s1": 1}


def test_the_versions_that_were_filled_move_though_newer_ones_are_there(register: Callable[..., None]) -> None:
    register()
    register(recipe_hash="another")
    filled = [f"pets.tiny.f{fold}.s0/1" for fold in (0, 1)]
    assert [(move.name, move.version) for move in promote(filled=filled)] == [
        ("pets.tiny.f0.s0", 1),
        ("pets.tiny.f1.s0", 1),
    ]
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}
    rollback()
    assert standing() == {}
    with pytest.raises(UserError, match="nothing registered as pets.tiny.f0.s0/9"):
        promote(filled=["pets.tiny.f0.s0/9"])
    with pytest.raises(UserError, match="among those folds"):
        promote(filled=[])


def test_a_newer_version_of_another_manifest_is_passed_over(register: Callable[..., None]) -> None:
    register()
    register(manifest_hash="b" * 64)  # as `worth` does, when it trains on the manifest before
    promote()
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1}


def test_what_stands_in_the_other_slots_counts_at_the_gate_and_stays(register: Callable[..., None]) -> None:
    register()
    promote()
    register(seed=1)
    register(folds=[0])  # newer, but nobody asked for it
    seeded = [f"pets.tiny.f{fold}.s1/1" for fold in (0, 1)]
    assert {move.name for move in promote(filled=seeded)} == {"pets.tiny.f0.s1", "pets.tiny.f1.s1"}
    assert standing() == {"tiny.f0.s0": 1, "tiny.f1.s0": 1, "tiny.f0.s1": 1, "tiny.f1.s1": 1}
    register(recipe_hash="another")
    with pytest.raises(UserError, match="different recipes"):
        promote(filled=["pets.tiny.f0.s0/3", "pets.tiny.f1.s0/2"])
    register(seed=2)
    with pytest.raises(UserError, match="fold 1 seed 2"):
        promote(filled=["pets.tiny.f0.s2/1"])


def test_unknown_member_and_empty_choice(register: Callable[..., None]) -> None:
    register()
    with pytest.raises(UserError, match="members there: tiny"):
        promote("nobody")
    with pytest.raises(UserError, match="among those folds"):
        promote(folds=[7], force=True)


def test_the_audit_says_who_moved_what(register: Callable[..., None]) -> None:
    register()
    promote()
    (info,) = tracking.find_runs("pets", {"promotion.stage": "production"})
    assert info.tags["promotion.members"] == "tiny"
    assert info.tags[promotion.STATE] == "done"
    stored = json.loads(tracking.download(info.id, promotion.AUDIT).read_text())
    assert [(move["name"], move["version"]) for move in stored["moves"]] == [
        ("pets.tiny.f0.s0", 1),
        ("pets.tiny.f1.s0", 1),
    ]
    assert versions.existing_version("pets.tiny.f0.s0", 1).tags["promotion.production"] == info.id


@pytest.mark.parametrize("finish", [True, False], ids=["finished by the same command", "rolled back at once"])
def test_a_cut_promotion(register: Callable[..., None], monkeypatch: pytest.MonkeyPatch, finish: bool) -> None:
    register()
    promote()
    register()
    before = everything()
    calls = []

    def cut(name: str, version: int, stage: str) -> None:
        calls.append(name)
        if len(calls) > 2:
            raise KeyboardInterrupt
        real(name, version, stage)

    real = versions.set_stage
    monkeypatch.setattr(versions, "set_stage", cut)
    with pytest.raises(KeyboardInterrupt):
        promote()
    monkeypatch.setattr(versions, "set_stage", real)
    assert everything() != before
    if finish:
        promote()
        assert standing() == {"tiny.f0.s0": 2, "tiny.f1.s0": 2}
    rollback()
    assert everything() == before


def test_two_versions_put_in_one_stage_by_hand(register: Callable[..., None]) -> None:
    for _ in range(3):
        register(folds=[0])
    versions.set_stage("pets.tiny.f0.s0", 1, "Production")
    versions.set_stage("pets.tiny.f0.s0", 2, "Production")
    before = everything()
    assert standing() == {"tiny.f0.s0": 2}
    promote(force=True)
    assert standing() == {"tiny.f0.s0": 3}
    rollback()
    assert everything() == before


def test_promoting_everybody_reads_the_registry_once(
    register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for member in ("tiny", "other", "third"):
        register(member=member)
        register(member=member)
    asked: list[str] = []

    def counted(prefix: str) -> list[object]:
        asked.append(prefix)
        return real(prefix)

    real = versions.registered_models
    monkeypatch.setattr(versions, "registered_models", counted)
    monkeypatch.setattr(versions, "versions_of", lambda names, also="": pytest.fail("asked for versions"))
    assert {move.version for move in promote("")} == {2}
    assert asked == ["pets."]


@pytest.mark.slow
def test_the_command(house: House, monkeypatch: pytest.MonkeyPatch, refuses: Callable[[Outcome, str], None]) -> None:
    manifest = make_world(house.home / "data" / "tiny", samples=12, folds=2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{house.home / 'mlruns' / 'mlflow.db'}")
    for fold in manifest.folds:
        name = registry.slot_name("tiny", "m", fold, 0)
        versions.ensure_registered(name, {})
        tags = {"manifest_hash": manifest.hash, "classes_hash": "c", "recipe_hash": "r"}
        tracking.client().create_model_version(name, "file:///nowhere", tags=tags)
    refuses(house.run("promote", "--competition", "tiny", "--member", "m", "--folds", "0"), "--force with it")
    refuses(house.run("promote", "--competition", "tiny", "--rollback", "--folds", "0"), "a whole promotion")
    done = house.run("promote", "--competition", "tiny", "--member", "m", "--stage", "production")
    assert done.result["moved"] == [{"name": f"tiny.m.f{fold}.s0", "version": 1, "replaced": None} for fold in (0, 1)]
    assert "tiny.m.f0.s0: version 1 replaces nothing" in done.err
    assert tracking.get_run(done.result["run_id"]).params["cfg.stage"] == "production"
    assert len(registry.resolve("tiny", "production")["m"]) == 2
    back = house.run("promote", "--competition", "tiny", "--rollback").result
    assert [move["replaced"] for move in back["moved"]] == [1, 1]
    assert registry.resolve("tiny", "production") == {}
