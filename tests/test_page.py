"""The page: facts that need no store turned into numbers, charts and advice."""

import dataclasses
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from octofold.blend.estimate import Gain
from octofold.data.manifest import Manifest
from octofold.metrics import METRICS
from octofold.predictions import Predictions
from octofold.reports import advice, axes, boards, chronicle, mistakes, page, report
from octofold.reports.scores import Score
from octofold.track import tracking
from test_report import Reader


@pytest.mark.parametrize(
    "values",
    [[0.0], [0.913, 0.9131], [-3.0, 250.0], [0.1, 0.7, 0.4], [float("nan"), 0.5], [], [1e-6, 2e-6], [5.0, 5.0]],
)
def test_axes_hold_their_values_between_round_ticks(values: list[float]) -> None:
    scale = axes.fit(values)
    finite = [value for value in values if np.isfinite(value)]
    assert all(scale.holds(value) for value in finite)
    assert 2 <= len(scale.ticks) <= 12
    assert scale.at(scale.low) == 0.0
    assert scale.at(scale.high) == 100.0
    labels = [scale.label(tick) for tick in scale.ticks]
    assert len(set(labels)) == len(labels)


def test_points_have_a_page_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {f"{name}_{axis}": rng.uniform(0, 90, 20) for name in ("nose", "tail") for axis in "xy"}
    columns["tail_x"][3] = columns["tail_y"][3] = np.nan
    table = pd.DataFrame({"sample_id": [f"s{row}" for row in range(20)], "path": "x", "fold": np.arange(20) % 4})
    points = Manifest(
        table.assign(**columns), "keypoints", ("nose", "tail"), "world", tmp_path, file=tmp_path / "m.csv"
    )
    members = []
    for name, noise in (("one", 2.0), ("two", 4.0)):
        values = np.nan_to_num(points.target, nan=50.0) + rng.normal(0, noise, points.target.shape)
        own = Predictions(points.sample_ids, values, points.classes, points.hash, name, "s", "none", points.fold)
        members.append(chronicle.Member(name, [], "production", own))
    facts = page.Facts("world", points, "mse", METRICS["mse"], members, [], [], [], [], None, None, {}, "")
    shown = page.analyse(facts)
    assert [line.name for line in shown["lines"]] == ["one", "two"]
    text = report.render(shown | {"advice": advice.next_steps(shown, facts)})
    assert "lower is better" in Reader(text).text
    assert not re.search(r"\b(nan|inf|None)\b", Reader(text).text)


def of_classes(
    folder: Path, target: np.ndarray, classes: tuple[str, ...] = ("a", "b", "c"), group: str = ""
) -> Manifest:
    """A manifest of rows without pictures, three folds."""
    table = pd.DataFrame({"sample_id": [f"s{row}" for row in range(len(target))], "path": "x", "group": group})
    table = table.assign(label=np.array(classes)[target], fold=np.arange(len(target)) % 3)
    return Manifest(table, "classify", classes, "world", folder, file=folder / "m.csv")


def a_member(manifest: Manifest, name: str, values: np.ndarray, **settings: str) -> chronicle.Member:
    own = Predictions(manifest.sample_ids, values, manifest.classes, manifest.hash, name, "s", "none", manifest.fold)
    return chronicle.Member(name, [], "production", own, settings=settings)


def read(facts: page.Facts) -> tuple[dict[str, Any], str]:
    """The page's numbers, and its text."""
    shown = page.analyse(facts)
    return shown, " ".join(Reader(report.render(shown | {"advice": advice.next_steps(shown, facts)})).text.split())


@pytest.mark.parametrize(("group", "played"), [("", True), ("all", False)])
def test_a_board_that_cannot_be_played_has_no_section(tmp_path: Path, group: str, played: bool) -> None:
    """AUC has no score where the rare class is on one side; one group is on one side as a whole."""
    manifest = of_classes(tmp_path, (np.arange(60) < 1).astype(int), ("n", "y"), group)
    members = [a_member(manifest, name, np.random.default_rng(0).dirichlet(np.ones(2), 60)) for name in "ab"]
    facts = page.Facts("world", manifest, "auc", METRICS["auc"], members, [], [], [], [], None, None, {}, "")
    _, text = read(facts)
    assert "Risk: how sure is sure?" in text
    assert ("Risk: the public board" in text) is played
    assert "nan" not in text


def blended_twice(
    folder: Path, metric: str, numbers: dict[str, float], tags: dict[str, str] | None = None, seed: int = 0
) -> page.Facts:
    """Two members and their plain mean, blended under these numbers and tags; the page is in `metric`."""
    rng = np.random.default_rng(seed)
    target = rng.integers(3, size=90)
    manifest = of_classes(folder, target)
    members = [a_member(manifest, name, 0.5 * np.eye(3)[target] + 0.5 * rng.dirichlet(np.ones(3), 90)) for name in "xy"]
    within = {member.name: member.oof.values for member in members if member.oof is not None}
    mean, when = np.mean(list(within.values()), axis=0), datetime.now().astimezone()
    main = chronicle.Blended("r", when, "equal", "none", manifest.hash, numbers, tags or {}, {})
    weights = dict.fromkeys(within, 0.5)
    return page.Facts(
        "world", manifest, metric, METRICS[metric], members, [main], [], [], [], main, mean, weights, "", within
    )


ACCURATE = {"oof/accuracy": 0.9, "oof/accuracy_low": 0.8, "oof/accuracy_high": 0.95}
ACCURATE |= {"estimate/accuracy": 0.88, "estimate/low": 0.8, "estimate/high": 0.93}


def test_another_metric_than_the_blends_is_scored_anew(tmp_path: Path) -> None:
    facts = blended_twice(tmp_path, "log_loss", ACCURATE, {"metric": "accuracy"})
    shown, text = read(facts)
    assert facts.blend_oof is not None
    score = METRICS["log_loss"].score(facts.blend_oof, facts.manifest.target)
    assert shown["headline"]["oof"] == pytest.approx(score)
    assert f"{score:.3f} cross-fitted log_loss of the newest blend, 95 % interval" in text
    assert next(line for line in shown["lines"] if line.kind == "blend").score is not None
    assert "nothing is blended yet" not in text
    assert "nan" not in text

    losses = {"oof/log_loss": 0.5, "estimate/log_loss": 0.55, "estimate/accuracy": 0.88, "estimate/low": 0.5}
    facts = blended_twice(tmp_path, "accuracy", losses | {"estimate/high": 0.6}, {"metric": "log_loss"})
    _, text = read(facts)
    assert "0.880 expected on the test images" in text
    assert "nan" not in text
    facts.blends.append(dataclasses.replace(facts.blends[0], tags={"metric": "accuracy"}))
    assert len({page._kind(one) for one in facts.blends}) == 2


def test_a_score_of_the_folds_is_not_called_one_of_the_test_images(tmp_path: Path) -> None:
    shown, text = read(blended_twice(tmp_path, "accuracy", ACCURATE, {"estimate.of": "oof"}))
    assert "0.900 cross-fitted accuracy of the newest blend, 95 % interval 0.800 to 0.950" in text
    assert "test images" not in text
    assert shown["progress"] is None, "one cross-fitted point, no estimate beside it"
    info = tracking.RunInfo("r", "FINISHED", "blend", {"estimate.of": "oof"}, {}, {**ACCURATE, "score/public": 0.7})
    assert not np.isfinite([boards._score(info).estimate, boards._score(info).low]).any()
    info.tags["estimate.of"] = "test"
    assert boards._score(info).estimate == 0.88


def test_an_expert_is_listed_but_not_compared_with_those_who_know_all_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(3, size=90)
    manifest = of_classes(tmp_path, target)
    pair = np.array([[0.95, 0.05, 0.0], [0.05, 0.95, 0.0], [0.5, 0.5, 0.0]])[target]
    members = [a_member(manifest, "a_pair", pair, classes="['a', 'b']")]
    for name, sure in (("bad", 0.1), ("good", 0.6), ("fair", 0.4)):
        members.append(a_member(manifest, name, sure * np.eye(3)[target] + (1 - sure) * rng.dirichlet(np.ones(3), 90)))
    facts = page.Facts("w", manifest, "accuracy", METRICS["accuracy"], members, [], [], [], [], None, None, {}, "")
    shown, text = read(facts)
    assert shown["shown"] == "good", "nothing is blended: the best member is shown"
    assert shown["correlation"]["names"] == ["bad", "good", "fair"]
    assert not any("a_pair" in (one, over) for one, over, _ in shown["gains"]["rows"])
    assert [line.name for line in shown["lines"]] == ["good", "fair", "bad", "a_pair"]
    assert "an expert for 'a', 'b'" in text


def test_a_member_may_be_called_blend_and_two_may_never_err(tmp_path: Path) -> None:
    facts = blended_twice(tmp_path, "accuracy", ACCURATE)
    perfect = 0.9 * np.eye(3)[facts.manifest.target] + 0.1 / 3
    facts.members = [a_member(facts.manifest, name, perfect) for name in ("blend", "other")]
    facts.weights = {"blend": 0.5, "other": 0.5}
    shown, text = read(facts)
    assert {line.name for line in shown["lines"]} == {"blend equal (newest)", "blend", "other"}
    assert "nan" not in text


def test_of_many_scores_the_newest_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    facts = blended_twice(tmp_path, "accuracy", ACCURATE)
    facts.recorded = [Score(f"s{number}.csv", 0.5 + number / 200) for number in range(45)]
    shown, text = read(facts)
    assert [row["score"].submission for row in shown["boards"]["rows"]] == [f"s{number}.csv" for number in range(5, 45)]
    assert "and 5 older" in text


@pytest.mark.parametrize(
    ("method", "low", "high", "words"),
    [
        ("lr_mse", -0.3, -0.1, "they are worse"),
        ("lr_mse", -0.1, 0.1, "not separable"),
        ("lr_mse", 0.1, 0.3, ""),
        ("equal", 0.0, 0.0, ""),
        ("auto: equal", 0.0, 0.0, ""),
        ("soft_vote", 0.0, 0.0, ""),
    ],
)
def test_the_plain_mean_is_advised_where_it_is_not_beaten_and_not_taken(
    tmp_path: Path, method: str, low: float, high: float, words: str
) -> None:
    facts = blended_twice(tmp_path, "accuracy", ACCURATE)
    assert facts.main is not None
    facts.main = dataclasses.replace(facts.main, method=method)
    shown = page.analyse(facts)
    shown["gains"]["rows"] = [
        ("blend", "over the plain mean", Gain("the plain mean", (low + high) / 2, low, high, 0.5))
    ]
    said = [step.why for step in advice.next_steps(shown, facts, 20) if step.what == "Take the plain mean"]
    assert len(said) == bool(words)
    assert words in "".join(said)


@pytest.mark.parametrize(
    ("method", "compared"), [("auto: lr_mse", True), ("equal", True), ("by hand [0.6, 0.4]", False)]
)
def test_ablations_are_among_the_voters(tmp_path: Path, method: str, compared: bool) -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(3, size=90)
    table = pd.DataFrame({"sample_id": [f"s{row}" for row in range(90)], "path": "x", "fold": np.arange(90) % 3})
    table = table.assign(label=np.array(list("abc"))[target], group="")
    manifest = Manifest(table, "classify", ("a", "b", "c"), "world", tmp_path, file=tmp_path / "m.csv")
    members = []
    for name, settings in (("one", {}), ("two", {"classes": "[]"}), ("pair", {"classes": "['a', 'b']"})):
        values = 0.5 * np.eye(3)[target] + 0.5 * rng.dirichlet(np.ones(3), 90)
        own = Predictions(
            manifest.sample_ids, values, manifest.classes, manifest.hash, name, "s", "none", manifest.fold
        )
        members.append(chronicle.Member(name, [], "production", own, settings=settings))
    main = chronicle.Blended("r", datetime.now().astimezone(), method, "none", manifest.hash, {}, {}, {})
    accuracy = METRICS["accuracy"]
    weights = {"one": 0.6, "two": 0.4, "pair": 0.0}
    mean = np.mean([member.oof.values for member in members[:2] if member.oof is not None], axis=0)
    within = {member.name: member.oof.values for member in members[:2] if member.oof is not None}
    facts = page.Facts(
        "world", manifest, "accuracy", accuracy, members, [main], [], [], [], main, mean, weights, "", within
    )
    gains = {over: found for _, over, found in page.analyse(facts)["gains"]["rows"]}
    assert gains["over the plain mean"].value == 0, "the expert is no part of it"
    assert ("over the blend without one" in gains) is compared
    assert "over the blend without pair" not in gains


def test_experiments_are_pairs_that_differ_in_few_fields() -> None:
    def member(name: str, **settings: str) -> chronicle.Member:
        return chronicle.Member(name, [], "", None, settings=settings)

    one = member("a", **{"optim.lr": "0.1", "member": "a", "phases": "[{'epochs': 6, 'lr': None}]"})
    two = member("b", **{"optim.lr": "0.1", "member": "b", "phases": "[{'epochs': 9, 'lr': None, 'replicas': 0}]"})
    far = member("c", **{"optim.lr": "9", "batch_size": "1", "phases": "[{'epochs': 1, 'lr': 3, 'x': 2}, {}]"})
    assert chronicle.experiments([one, two, far]) == [("a", "b", "phases.0.epochs 6 for 9")]
    assert chronicle.experiments([one, member("imported")]) == []


def test_one_failed_blend_does_not_squeeze_the_others() -> None:
    scale = axes.robust([0.99, 0.985, 0.988, 0.36], higher_is_better=True)
    assert scale.low > 0.9
    assert scale.at(0.36) == 0.0


def test_rows_without_a_point_do_not_make_members_err_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"sample_id": [f"s{row}" for row in range(300)], "path": "x", "fold": np.arange(300) % 3})
    table = table.assign(**{f"{point}_{axis}": rng.uniform(0, 90, 300) for point in ("nose", "tail") for axis in "xy"})
    columns = [name for name in table if name[-2:] in ("_x", "_y")]
    table.loc[::3, columns] = np.nan
    points = Manifest(table, "keypoints", ("nose", "tail"), "world", tmp_path, file=tmp_path / "m.csv")
    values = {name: np.nan_to_num(points.target, nan=50.0) + rng.normal(0, 5, (300, 2, 2)) for name in "ab"}
    members = [a_member(points, name, own) for name, own in values.items()]
    facts = page.Facts("world", points, "mse", METRICS["mse"], members, [], [], [], [], None, None, {}, "")
    seen = np.isfinite(points.target).all(axis=(1, 2))
    losses = [np.sqrt(((own - points.target)[seen] ** 2).mean(axis=(1, 2))) for own in values.values()]
    found = page.correlation(facts)
    assert found is not None
    assert found["table"][0][1] == pytest.approx(np.corrcoef(losses)[0, 1], abs=1e-5)
    assert abs(found["table"][0][1]) < 0.2
    facts.manifest = dataclasses.replace(points, table=points.table.assign(**dict.fromkeys(columns, np.nan)))
    assert page.correlation(facts) is None, "no row has a loss"


def test_a_board_is_drawn_among_scores_of_its_own_metric_alone(tmp_path: Path) -> None:
    losses = {"oof/log_loss": 0.5, "estimate/accuracy": 0.88, "score/public": 0.41}
    facts = blended_twice(tmp_path, "accuracy", losses, {"metric": "log_loss"})
    facts.blends.append(dataclasses.replace(facts.blends[0], run="s", tags={"metric": "accuracy"}, numbers=ACCURATE))
    facts.blends.append(dataclasses.replace(facts.blends[1], run="t", numbers=ACCURATE | {"score/public": 0.93}))
    shown = page.analyse(facts)
    assert [value for _, value in shown["progress"]["points"]["recorded"]] == [0.93]


def test_wilson_bars_and_confusions_add_up() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), 200).astype(np.float32)
    target = rng.integers(0, 3, 200)
    found = mistakes.calibration(probs, target)
    assert sum(row[4] for row in found["rows"]) == 200
    assert all(0 <= low <= share <= high <= 1 for _, share, low, high, _ in found["rows"])
    wrong = mistakes.confusions(probs, target, ("a", "b", "c"))
    assert wrong["errors"] == int((probs.argmax(axis=1) != target).sum()) == sum(count for *_, count in wrong["pairs"])
