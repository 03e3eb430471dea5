"""The lineup: who speaks for a member whose fold models differ from the others' in seeds, folds, data or classes."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from labelled import CLASSES, make_manifest, make_oof
from octofold import recipe
from octofold.blend import assembly, lineup
from octofold.blend.estimate import CrossFit, Interval
from octofold.blend.lineup import Lineup
from octofold.blend.verdict import Verdict
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.infer.combining import Blend
from octofold.metrics import accuracy
from octofold.nets import models
from octofold.predictions import Predictions
from octofold.track import registry, tracking, versions

OLD = "0" * 64


def slot(
    folder: Path,
    table: Manifest,
    member: str,
    fold: int,
    seed: int = 0,
    oof: Predictions | None = None,
    classes: tuple[str, ...] = (),
) -> registry.Slot:
    """Register an untrained fold model, in production, with these out-of-fold predictions; none = it stored none."""
    torch.manual_seed(10 * fold + seed)
    settings = recipe.Recipe(
        member=member, model=recipe.Model(name="small_cnn", weights="none", input_size=16), classes=list(classes)
    )
    card = models.ModelCard(
        settings.model_dump(mode="json"), "classify", table.classes, "world", member, fold, seed,
        oof.manifest_hash if oof is not None else table.hash,
    )  # fmt: skip
    place = folder / f"{member}{fold}{seed}"
    models.write_model(place / "model", models.build(settings.model, len(CLASSES)), card)
    with tracking.run("train.slot", None, "world") as run:
        made = registry.register_slot(run, place / "model")
        if oof is not None:
            own = replace(oof, fold=np.full(len(oof.sample_ids), fold), seed=seed, member=member)
            run.log_artifact(own.save(place / "none.parquet"), "oof")
    versions.set_alias(made.name, "production", made.version)
    return made


@pytest.fixture
def world(mlruns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Manifest, Predictions]:
    """A manifest of five folds, and predictions of its rows that are all right."""
    for module in ("blend.lineup", "data.images", "nets.engine"):
        monkeypatch.setattr(f"octofold.{module}.ROOT", tmp_path)
    table, truth = make_manifest(tmp_path / "world")
    return table, make_oof(table, truth)


def test_seeds_of_a_fold_are_weighed_each_by_its_own_score(world: tuple[Manifest, Predictions], tmp_path: Path) -> None:
    table, right = world
    rng = np.random.default_rng(0)
    halves = replace(right, values=rng.permuted(right.values, axis=1))
    slots, expected = [], []
    for fold in (0, 1):
        held = np.flatnonzero(table.fold == fold)
        for seed, said in enumerate((right, halves)):
            slots.append(slot(tmp_path, table, "net", fold, seed, said.take(table.sample_ids[held[::-1]])))
            expected.append(accuracy(said.values[held], table.target[held]))
    mean = (right.values + halves.values) / 2
    [shares] = lineup.shares(Lineup({"net": slots}, mean[None], [], table, "none"), "oof_acc")
    assert shares[0] > shares[1]
    np.testing.assert_allclose(shares, np.array(expected) / sum(expected))


@pytest.mark.slow
def test_seeds_are_told_apart_where_other_data_leave_rows_out(
    world: tuple[Manifest, Predictions], tmp_path: Path
) -> None:
    """The newer member's predictions are made now: its folds are the manifest's, whatever rows are left."""
    table, right = world
    old = replace(right, manifest_hash=OLD)
    for fold, seed in itertools.product(table.folds, (0, 1)):
        held = table.sample_ids[(table.fold == fold) & (np.arange(len(table.table)) > 0)]
        slot(tmp_path, table, "new", fold, seed)
        slot(tmp_path, table, "old", fold, seed, old.take(held))
    found = lineup.gather("world", "production", [], table, "none", mixed=True)
    assert found.left_out == 1
    assert [part.shape for part in found.per_seed] == [found.oof.shape] * 2
    np.testing.assert_allclose(np.mean(found.per_seed, axis=0), found.oof, atol=1e-6)


def test_a_pair_expert_for_a_class_that_was_renamed_is_refused_in_words(
    world: tuple[Manifest, Predictions], tmp_path: Path
) -> None:
    table, right = world
    was = replace(table, classes=("yew", *CLASSES[1:]))
    for fold in table.folds:
        slot(tmp_path, table, "voter", fold, oof=right.take(table.sample_ids[table.fold == fold]))
    old = replace(right, manifest_hash=OLD, classes=was.classes)
    slot(tmp_path, was, "pair", 0, oof=old, classes=("yew", CLASSES[1]))
    with pytest.raises(UserError, match="'pair'.*(?s:.)*'yew', which it lacks.*(?s:.)*--members"):
        lineup.gather("world", "production", [], table, "none", mixed=True)


def test_members_without_a_common_fold_number_speak_together_by_rank(tmp_path: Path) -> None:
    table, _ = make_manifest(tmp_path)

    def lined(**folds: tuple[int, ...]) -> Lineup:
        slots = {
            name: [registry.Slot("world", name, fold, seed, "", 1, "", "", "", "") for fold in own for seed in (0, 1)]
            for name, own in folds.items()
        }
        return Lineup(slots, np.zeros((2, len(table.table), 3)), [], table, "none")

    said = np.arange(10.0)[:, None, None] * np.ones((1, 4, 3))
    apart = lineup.by_fold(lined(new=(0, 1, 2), old=(3, 4)), said)
    assert [part[:, 0, 0].tolist() for part in apart] == [[0.5, 6.5], [2.5, 8.5]]
    common = lineup.by_fold(lined(new=(0, 1, 2), old=(2, 4)), said)
    assert [part[:, 0, 0].tolist() for part in common] == [[4.5, 6.5]]


def test_a_gate_of_the_voters_is_not_reported_as_the_experts(tmp_path: Path) -> None:
    table, _ = make_manifest(tmp_path)
    lined = Lineup({"one": [], "two": [], "pair": []}, np.zeros(0), [], table, "none", experts=((0, 1),))
    gate = {"a": 0, "b": 1, "intercept": 0.0, "threshold": 0.5}
    own, trained = gate | {"coef": [1.0] * 2, "margin": 0.3}, gate | {"coef": [1.0] * 3, "margin": 0.1}
    for words, gates in {"nowhere": [own], "by at most 0.1": [own, trained]}.items():
        blend = Blend("pair_gate", "gate", np.array([0.5, 0.5, 0]), {"voters": 2, "experts": gates})
        none = Interval(0, 0, 0)
        judged = Verdict(blend, CrossFit(np.zeros(0), []), 0, none, 0, {}, [], 0)
        assert words in assembly._members_told(lined, judged)[0]
