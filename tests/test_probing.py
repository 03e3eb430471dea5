"""Probing: the gain is paired, its interval knows groups, seeds and looks, and luck alone is rarely called better."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import House
from octofold import recipe
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.predictions import Predictions
from octofold.tune.probing import arms, compare, summary

CLASSES = ("a", "b")


def make_manifest(rows: int, per_group: int = 1) -> Manifest:
    ids = [f"s{n:04d}" for n in range(rows)]
    table = pd.DataFrame({"sample_id": ids, "path": ids, "label": [CLASSES[n % 2] for n in range(rows)]})
    table["group"] = [f"g{n // per_group}" for n in range(rows)]
    return Manifest(table.assign(fold=0), "classify", CLASSES, "toy", Path("/"))


def make_oof(manifest: Manifest, right: np.ndarray, member: str, seed: int = 0) -> Predictions:
    """OOF that is right where told, its rows in an order of its own."""
    said = np.where(right, manifest.target, 1 - manifest.target)
    order = np.random.default_rng(len(member)).permutation(len(said))
    return Predictions(
        sample_ids=manifest.sample_ids[order],
        values=np.eye(2)[said][order] * 0.8 + 0.1,
        classes=CLASSES,
        manifest_hash="h",
        member=member,
        model_sha="s",
        views="none",
        fold=np.zeros(len(said), np.int64),
        seed=seed,
    )


def draw(share: float, rows: int, seed: int, per_group: int = 1) -> np.ndarray:
    return np.repeat(np.random.default_rng(seed).random(rows // per_group) < share, per_group)


def test_a_large_paired_gain_is_better_and_its_mirror_worse() -> None:
    table = make_manifest(400)
    low, high = draw(0.7, 400, 1), draw(0.9, 400, 2)
    better = compare({"x": {0: make_oof(table, low, "x")}, "yy": {0: make_oof(table, high, "yy")}}, table, "accuracy")
    worse = compare({"yy": {0: make_oof(table, high, "yy")}, "x": {0: make_oof(table, low, "x")}}, table, "accuracy")
    assert [f.verdict for f in better] == ["reference", "better"]
    assert [f.verdict for f in worse] == ["reference", "worse"]
    assert better[1].gain == pytest.approx(high.mean() - low.mean()) == -worse[1].gain
    assert better[1].low < better[1].gain < better[1].high
    logloss = compare({"x": {0: make_oof(table, low, "x")}, "yy": {0: make_oof(table, high, "yy")}}, table, "log_loss")
    assert logloss[1].gain > 0, "less loss is a gain"
    assert "one seed" in summary(better, "accuracy", 1)
    assert "one seed" not in summary(better, "accuracy", 2)


def test_an_arm_against_itself_is_not_separable() -> None:
    table = make_manifest(50)
    right = draw(0.8, 50, 0)
    found = compare({"x": {0: make_oof(table, right, "x")}, "yy": {0: make_oof(table, right, "yy")}}, table, "accuracy")
    assert (found[1].gain, found[1].low, found[1].high, found[1].chance) == (0, 0, 0, 0.5)
    assert found[1].verdict == "not separable"


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
@pytest.mark.parametrize("rows", [60, 600])
@pytest.mark.parametrize("differing", [1, 2, 3])
def test_a_handful_of_differing_rows_is_no_finding(differing: int, rows: int, metric: str) -> None:
    """The sign test gives them 0.125 or more, whichever arm they favour and however the resamples fall."""
    table = make_manifest(rows)
    some, fewer = np.arange(rows) >= rows // 6 + differing, np.arange(rows) >= rows // 6
    for seed in range(8):
        mine, theirs = make_oof(table, some, "x"), make_oof(table, fewer, "yy")
        better = compare({"x": {0: mine}, "yy": {0: theirs}}, table, metric, seed)[1]
        worse = compare({"yy": {0: theirs}, "x": {0: mine}}, table, metric, seed)[1]
        assert [better.verdict, worse.verdict] == ["not separable"] * 2
        assert better.low <= 0 < better.gain < better.high
        assert worse.low < worse.gain < 0 <= worse.high


def test_equal_ideas_are_seldom_called_different() -> None:
    """60 comparisons of two arms of the same true accuracy on grouped rows; 5 % of them may err."""
    table = make_manifest(300, per_group=3)
    called = 0
    for trial in range(60):
        pair = {
            name: {0: make_oof(table, draw(0.8, 300, 2 * trial + k, 3), name)} for k, name in enumerate(("x", "yy"))
        }
        called += compare(pair, table, "accuracy", seed=trial)[1].verdict != "not separable"
    assert called <= 8


def test_groups_seeds_and_looks_widen_the_interval() -> None:
    table, grouped = make_manifest(300), make_manifest(300, per_group=10)
    right = {"x": draw(0.75, 300, 5, 10), "yy": draw(0.8, 300, 6, 10), "zzz": draw(0.8, 300, 7, 10)}

    def width(manifest: Manifest, names: str = "x yy", shifts: tuple[float, ...] = (0.0,)) -> float:
        rng = np.random.default_rng(0)
        oofs = {
            name: {
                seed: make_oof(manifest, right[name] & (rng.random(300) >= (shift if name == "yy" else 0)), name, seed)
                for seed, shift in enumerate(shifts)
            }
            for name in names.split()
        }
        found = compare(oofs, manifest, "accuracy")[1]
        return found.high - found.low

    assert width(grouped) > 1.5 * width(table), "ten rows that come together count as one"
    assert width(table, "x yy zzz") > width(table), "two looks are more than one"
    assert width(table, shifts=(0.0, 0.2)) > 1.3 * width(table), "seeds that disagree"


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.slow
def test_the_luck_of_few_seeds_is_seldom_called_a_difference(seeds: int) -> None:
    """120 comparisons of equal ideas whose trainings vary (sd 0.03); 1.96 instead of t calls a tenth different."""
    table = make_manifest(400)
    rng = np.random.default_rng(0)
    called = 0
    for trial in range(120):
        pair = {
            name: {
                seed: make_oof(table, rng.random(400) < min(0.99, 0.9 + rng.normal(0, 0.03)), name, seed)
                for seed in range(seeds)
            }
            for name in ("x", "yy")
        }
        called += compare(pair, table, "accuracy", seed=trial)[1].verdict != "not separable"
    assert called <= 8


def test_arms_for_a_few_classes_are_compared_on_those() -> None:
    """Right on the rows both are for, wrong on the others: only the former count."""
    table = make_manifest(200)
    wanted = table.target == 0
    oofs = {"x": {0: make_oof(table, ~wanted, "x")}, "yy": {0: make_oof(table, wanted, "yy")}}
    assert compare(oofs, table, "accuracy")[1].verdict == "not separable"
    found = compare(oofs, table, "accuracy", wanted=wanted)
    assert [one.score for one in found] == [0.0, 1.0]
    assert found[1].verdict == "better"
    with pytest.raises(UserError, match="every arm"):
        compare(oofs, table, "accuracy", wanted=np.zeros(200, bool))


def test_rows_of_one_group_separate_nothing() -> None:
    table, right = make_manifest(60, per_group=60), np.arange(60) < 30
    arms = {"x": {0: make_oof(table, right, "x")}, "yy": {0: make_oof(table, right | True, "yy")}}
    found = compare(arms, table, "accuracy")[1]
    assert found.verdict == "not separable"
    assert np.isnan([found.low, found.high, found.chance]).all()


def test_arms_must_agree_on_rows_and_seeds() -> None:
    table = make_manifest(20)
    oof = make_oof(table, draw(0.8, 20, 0), "x")
    with pytest.raises(UserError, match="seeds"):
        compare({"x": {0: oof}, "yy": {1: oof}}, table, "accuracy")
    with pytest.raises(UserError, match="same held-out rows"):
        compare({"x": {0: oof}, "yy": {0: oof.take(oof.sample_ids[:9])}}, table, "accuracy")


def test_arms_are_the_recipe_with_one_field_at_each_value(tmp_path: Path) -> None:
    base = recipe.Recipe(member="m", seeds=[3])
    presets = arms(base, "augment.preset", ["no_color", "full"], [])
    assert [(arm.member, arm.augment.preset) for arm in presets] == [("m-no_color", "no_color"), ("m-full", "full")]
    rates = arms(base, "phases.0.lr", ["3e-4", "null"], [])
    assert [arm.phases[0].lr for arm in rates] == [3e-4, None]
    other = tmp_path / "b.yaml"
    other.write_text("member: b\nseeds: [0]\n")
    assert [(arm.member, arm.seeds) for arm in arms(base, "", [], [other])] == [("m", [3]), ("b", [3])]
    other.write_text("member: b\noverfit: 1\n")
    with pytest.raises(UserError, match="rows trained on"):
        arms(base, "", [], [other])


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("augment.presett", ["a", "b"], "no such field"),
        ("member.o", ["0", "1"], "no such field"),
        ("phases.7.lr", ["1", "2"], "no such field"),
        ("optim.lr", ["1e-3"], "--values A,B"),
        ("optim.lr", ["1e-3", "-1"], "greater than 0"),
        ("", [], "--others"),
        ("optim.lr", ["1e-3", "1e-3"], "different member names"),
        ("overfit", ["0", "1"], "rows trained on"),
    ],
)
def test_what_cannot_be_compared_is_refused(field: str, values: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        arms(recipe.Recipe(), field, values, [])


@pytest.mark.slow
def test_one_command_trains_the_arms_and_says_what_it_found(house: House) -> None:
    """Colour decides the class; an arm that may learn and one that may not are separable, and nothing runs twice."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    for number in range(48):
        folder = house.home / "photos" / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 100, (20, 20, 3), np.uint8) + (0 if number % 2 else 120)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    table = house.run("prepare", "--competition", "toy", "--images", "photos", "--folds", 2, "--group", "none").result
    flags = ["--manifest", table["manifest"], "--model.name", "small_cnn", "--model.input_size", 16, "--tta", "none"]
    flags += ["--phases", '[{"epochs": 3}]', "--batch_size", 8, "--augment.preset", "none", "--select", "last"]
    flags += ["--metric", "log_loss", "--field", "optim.lr", "--values", "3e-3,1e-9"]
    first = house.run("probe", *flags).result
    arms_found = first["arms"]
    assert arms_found["baseline-3e-3"]["verdict"] == "reference"
    assert arms_found["baseline-3e-3"]["score"] < 0.5
    assert arms_found["baseline-1e-9"]["verdict"] == "worse"
    again = house.run("probe", *flags)
    assert again.result["arms"] == arms_found
    assert "already trained" in again.err
