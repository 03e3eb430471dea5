"""Evaluation: rows by id, scores as the metrics say, tables that add up, and the whole command."""

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import REPOSITORY, House, Outcome
from octofold import metrics
from octofold.commands import Evaluate
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.infer import evaluating
from octofold.predictions import Predictions
from octofold.track import tracking

CLASSES = ("ant", "bee", "cow")


def truth(folder: Path, count: int = 30) -> Manifest:
    """A labelled manifest with small grey photos; cow never occurs."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (24, 16), (number * 8,) * 3).save(folder / f"{number}.png")
    table = pd.DataFrame(
        {
            "sample_id": [f"s{number}" for number in range(count)],
            "path": [f"{number}.png" for number in range(count)],
            "label": [CLASSES[number % 2] for number in range(count)],
            "group": "",
            "fold": [number % 5 for number in range(count)],
        }
    )
    return Manifest(table, "classify", CLASSES, "tiny", folder)


def oof(manifest: Manifest, seed: int = 0, fold: bool = True) -> Predictions:
    """Noisy predictions of every row, in another order, columns too."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(3), len(manifest.table)) + 0.8 * np.eye(3)[manifest.target]
    probs /= probs.sum(axis=1, keepdims=True)
    order = rng.permutation(len(probs))
    return Predictions(
        manifest.sample_ids[order], probs[order][:, ::-1], CLASSES[::-1], manifest.hash, "m", "w" * 64, "none",
        fold=manifest.fold[order] if fold else None, seed=seed,
    )  # fmt: skip


def test_scores_are_those_of_the_metrics_whatever_the_order(tmp_path: Path) -> None:
    manifest = truth(tmp_path)
    said = oof(manifest)
    found = evaluating.evaluate(manifest, said)
    probs = said.reorder(CLASSES).take(manifest.sample_ids).values
    assert found.named()["oof/accuracy"] == metrics.accuracy(probs, manifest.target)
    assert found.named()["oof/log_loss"] == pytest.approx(metrics.log_loss(probs, manifest.target), abs=1e-6)
    assert found.metrics["coverage"] == 1
    assert found.loss.mean() == pytest.approx(found.metrics["log_loss"], abs=1e-6)


def test_tables_add_up(tmp_path: Path) -> None:
    found = evaluating.evaluate(truth(tmp_path), oof(truth(tmp_path)))
    table = found.tables["confusion"].to_numpy()
    per_class = found.tables["per_class"].set_index("class")
    assert table.sum() == 30
    assert per_class["count"].tolist() == [15, 15, 0]
    assert np.isnan(per_class["recall"]["cow"])  # undefined, not zero
    assert np.trace(table) / 30 == pytest.approx(found.metrics["accuracy"])
    bins = found.tables["reliability"]
    assert bins["rows"].sum() == 30
    gaps = (bins["confidence"] - bins["accuracy"]).abs() * bins["rows"]
    assert gaps.sum() / 30 == pytest.approx(found.metrics["ece"], abs=1e-6)
    assert found.tables["worst"]["loss"].is_monotonic_decreasing


@pytest.mark.parametrize(
    ("held_out", "trained_on", "split"),
    [
        (True, "the same", "oof"),
        (False, "the same", "apparent"),
        (False, "an earlier version of it", "apparent"),
        (False, "who knows", "apparent"),
        (False, "other samples", "test"),
    ],
)
def test_the_name_of_a_score_says_whether_the_model_saw_the_rows(
    tmp_path: Path, held_out: bool, trained_on: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "ROOT", tmp_path)
    manifest = truth(tmp_path)
    rows = {"an earlier version of it": np.arange(20), "other samples": np.arange(20, 30)}.get(trained_on)
    said = replace(oof(manifest, fold=held_out), manifest_hash=manifest.hash if trained_on == "the same" else "gone")
    if rows is not None:
        before = manifest.take(rows)
        home = tmp_path / "data" / manifest.competition / "versions" / before.hash[:12]
        before.save(home / "manifest.csv")
        said = replace(said, manifest_hash=before.hash).take(manifest.sample_ids[:20].tolist())
    assert evaluating.evaluate(manifest, said).split == split


@pytest.mark.parametrize(("members", "split"), [("new", "test"), ("new and old", "apparent"), ("unknown", "apparent")])
def test_rows_that_one_member_of_a_blend_trained_on_are_no_test(
    tmp_path: Path, members: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "ROOT", tmp_path)
    manifest = truth(tmp_path)
    seen = {"old": manifest.take(np.arange(25)), "new": manifest.take(np.arange(20, 30))}
    for one in seen.values():
        one.save(tmp_path / "data" / manifest.competition / "versions" / one.hash[:12] / "manifest.csv")
    hashes = [seen[name].hash if name in seen else name for name in members.split(" and ")]
    said = replace(oof(manifest, fold=False), manifest_hash=seen["new"].hash, extra={"trained_on": hashes})
    assert evaluating.evaluate(manifest, said.take(manifest.sample_ids[:20].tolist())).split == split


def test_a_part_of_the_rows_is_scored_and_said(tmp_path: Path) -> None:
    manifest = truth(tmp_path)
    found = evaluating.evaluate(manifest, oof(manifest).take(["s3", "s9", "s4"]))
    assert found.metrics["rows"] == 3
    assert found.metrics["coverage"] == 0.1
    with pytest.raises(UserError, match="21 it does not have"):
        evaluating.evaluate(manifest.take(np.arange(9)), oof(manifest))


def test_folds_are_joined_and_seeds_averaged(tmp_path: Path) -> None:
    manifest = truth(tmp_path)
    parts = []
    for seed in (0, 1):
        whole = oof(manifest, seed)
        assert whole.fold is not None
        parts += [whole.take(whole.sample_ids[whole.fold == fold]) for fold in range(5)]
    joined = evaluating.gather(parts).reorder(CLASSES).take(manifest.sample_ids)
    mean = np.mean([oof(manifest, s).reorder(CLASSES).take(manifest.sample_ids).values for s in (0, 1)], axis=0)
    np.testing.assert_allclose(joined.values, mean, atol=1e-6)
    assert joined.seed is None
    assert joined.is_oof


def test_points(tmp_path: Path) -> None:
    truth(tmp_path)
    points = {"nose_x": [5.0, 6.0], "nose_y": [5.0, 7.0], "tail_x": [20.0, np.nan], "tail_y": [10.0, np.nan]}
    table = pd.DataFrame({"sample_id": ["a", "b"], "path": ["1.png", "2.png"], "fold": [0, 1], **points})
    manifest = Manifest(table, "keypoints", ("nose", "tail"), "mouse", tmp_path)
    values = np.array([[[8.0, 9.0], [20.0, 10.0]], [[6.0, 7.0], [1.0, 1.0]]], np.float32)
    said = Predictions(["b", "a"], values[::-1], ("nose", "tail"), "", "m", "w", "none", fold=[1, 0])  # type: ignore[arg-type]
    found = evaluating.evaluate(manifest, said)
    assert found.metrics["mse"] == pytest.approx((9 + 16) / 6)
    assert found.loss.tolist() == pytest.approx([0.0, 2.5])  # a missing point counts nowhere
    assert found.tables["per_point"]["count"].tolist() == [2, 1]
    paths = evaluating.write(found, tmp_path / "out")
    assert {Path(path).name for path in paths.values()} == {"per_point.csv", "worst.csv", "worst.png", "per_point.png"}


def test_a_run_stands_for_its_own_oof_or_that_of_its_slots(mlruns: Path, tmp_path: Path) -> None:
    """A blend's or slot's run has OOF; a member's run has slots, of which the newest of each fold counts."""
    command = runpy.run_path(str(REPOSITORY / "entrypoints" / "evaluate.py"))["_predictions"]
    manifest = truth(tmp_path / "photos", 10)
    whole = oof(manifest)
    assert whole.fold is not None
    with tracking.run("train", None, "tiny") as parent:
        for fold in (0, 0, 1, 2, 3, 4):  # fold 0 was trained twice
            with tracking.run("train.slot", None, "tiny", tags={"fold": fold, "seed": 0}, parent=parent) as slot:
                part = whole.take(whole.sample_ids[whole.fold == fold])
                for views in ("none", "flip"):
                    path = replace(part, views=views).save(tmp_path / slot.id / f"{views}.parquet")
                    slot.log_artifact(path, "oof")
    config = {"manifest": Path("x"), "run": parent.id}
    found = command(Evaluate(**config))
    assert found.views == "flip"  # the most that are stored
    assert sorted(found.sample_ids) == sorted(manifest.sample_ids)
    assert command(Evaluate(**config, tta="none")).views == "none"
    assert command(Evaluate(manifest=Path("x"), run=slot.id)).fold.tolist() == [4, 4]
    with pytest.raises(UserError, match="views none, flip"):
        command(Evaluate(**config, tta="geo8"))
    with tracking.run("train", None, "tiny") as empty:
        pass
    with pytest.raises(UserError, match="got:      none"):
        command(Evaluate(manifest=Path("x"), run=empty.id))


@pytest.mark.slow
def test_the_command(house: House, refuses: Callable[[Outcome, str], None]) -> None:
    manifest = truth(house.home / "photos")
    file = manifest.save(house.home / "manifest.csv")
    oof(manifest).save(house.home / "oof.parquet")
    result = house.run("evaluate", "--manifest", file, "--predictions", "oof.parquet").result
    assert 0 < result["oof/accuracy"] <= 1
    for name in ("confusion_csv", "per_class_csv", "confusion_png", "reliability_png", "worst_png"):
        assert Path(result[name]).stat().st_size > 0
    refuses(house.run("evaluate", "--manifest", file), "one of --predictions")
    refuses(house.run("evaluate", "--manifest", file, "--predictions", "oof.parquet", "--tta", "geo4"), "views 'geo4'")
    (house.home / "photos" / "3.png").unlink()
    (house.home / "manifest.csv").unlink()
    refuses(house.run("evaluate", "--manifest", file, "--predictions", "oof.parquet"), "no such file")
