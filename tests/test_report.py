"""The report: read back from a real MLflow store, every number defined, and nothing in it can run or phone home."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from labelled import CLASSES, make_manifest, make_oof
from octofold import predictions
from octofold.blend import lineup
from octofold.commands import Report
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import sha256_file, write_json, write_text
from octofold.metrics import METRICS
from octofold.predictions import Predictions
from octofold.reports import advice, chronicle, page, report
from octofold.track import registry, tracking, versions

SCORES = {
    "score/public": 0.91,
    "score/private": 0.88,
    "estimate/accuracy": 0.9,
    "estimate/low": 0.85,
    "estimate/high": 0.95,
}


def train(
    table: Manifest, oof: Predictions, folder: Path, member: str, promoted: bool = True, **settings: object
) -> None:
    """Leave in MLflow what training a member leaves, without training."""
    tags = {"member": member, "manifest_hash": table.hash}
    with tracking.run("train", None, "world", member, tags) as parent:
        parent.log_params({f"cfg.{key}": value for key, value in settings.items()})
        for fold in table.folds:
            with tracking.run("train.slot", None, "world", tags=tags | {"fold": fold}, parent=parent) as run:
                mine = folder / run.id
                oof.take(table.sample_ids[table.fold == fold]).save(mine / "oof" / "none.parquet")
                run.log_artifacts(mine / "oof", "oof")
                weights = mine / "model" / "model.safetensors"
                write_text(weights, f"{member} {fold} {run.id}")
                card = {"recipe": {}, "task": "classify", "classes": list(CLASSES), "competition": "world"}
                card |= {"member": member, "fold": fold, "seed": 0, "manifest_hash": table.hash}
                write_json(mine / "model" / "model.json", card | {"model_sha": sha256_file(weights)})
                slot = registry.register_slot(run, mine / "model")
                if promoted:
                    versions.set_alias(slot.name, "production", slot.version)


def test_two_finals_are_chosen_once_the_public_board_has_spoken(
    tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octofold.reports import picks

    monkeypatch.setattr(picks, "ROOT", tmp_path)
    folder = tmp_path / "data" / "world"
    table, truth = make_manifest(folder)
    table.save(folder / "test.csv")
    blend(table, make_oof(table, truth), tmp_path, {})
    assert picks.told("world") == []
    blend(table, make_oof(table, truth, 1, 0.2), tmp_path, {"score/public": 0.6})
    assert "Two final submissions" in picks.told("world")[0]
    assert picks.told("elsewhere") == []
    blend(table, make_oof(table, truth, 2, 0.5), tmp_path, {"score/public": 0.3})
    blend(table, make_oof(table, truth, 3, 0.05), tmp_path, {"score/public": 1.05})
    assert "1.0500" in picks.told("world")[0]
    losses = picks.told("world", "log_loss")  # the lowest is the best, whatever the newest blend tried for
    assert "1.0500" not in losses[0]
    assert "0.3000" in losses[0]


def test_the_best_public_score_is_that_of_all_and_blends_that_cannot_be_weighed_are_counted(
    tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octofold.reports import picks

    monkeypatch.setattr(picks, "ROOT", tmp_path)
    monkeypatch.setattr(picks, "MOST", 3)
    folder = tmp_path / "data" / "world"
    table, truth = make_manifest(folder)
    table.save(folder / "test.csv")
    lone = {"manifest_hash": table.hash, "method": "lone", "views": "none"}
    with tracking.run("blend", None, "world", tags=lone) as run:  # of a time when only registered ones kept it
        run.log_metrics({"score/public": 0.99})
    assert [line.partition(":")[0] for line in picks.told("world")] == [
        "1 blend with a public score could not be weighed"
    ]
    for place, sure in enumerate((0.6, 0.55, 0.5)):
        blend(table, make_oof(table, truth, place, sure), tmp_path, {"score/public": 0.6 + place / 100})
    blend(table, make_oof(table, truth, 9, 0.5), tmp_path, {"score/public": 0.62}, manifest_hash="other")
    blend(table, make_oof(table, truth, 4, 0.1), tmp_path, {})  # newer, but those that a board has spoken of go first
    said = picks.told("world")
    assert "Two final submissions" in said[0]
    assert said[1].startswith(f"Not the best public score (blend of {run.id[:8]}, public 0.9900): it could not be")
    assert said[2].startswith("2 blends with a public score could not be weighed")
    assert len(said) == 3
    with tracking.run("blend", None, "world", tags=lone) as run:
        run.log_params({"cfg.metric": "log_loss"})
    assert picks.told("world") == picks.told("world", "log_loss") != said, "as everywhere else, the newest blend's"


def blend(table: Manifest, oof: Predictions, folder: Path, numbers: dict[str, float], **tags: str) -> None:
    """Leave in MLflow what a blend leaves."""
    tags = {"manifest_hash": table.hash, "method": "equal", "views": "none"} | tags
    with tracking.run("blend", None, "world", tags=tags) as run:
        run.log_params({"cfg.public_share": 0.4})
        run.log_metrics({"oof/accuracy": 0.9, "oof/accuracy_low": 0.8, "oof/accuracy_high": 0.95, **numbers})
        oof.save(folder / "none.parquet")
        run.log_artifact(folder / "none.parquet", "oof")
        run.log_dict({"method": "equal", "members": ["one", "two"], "weights": [0.5, 0.5]}, "blend_weights.json")
        found = registry.resolve("world", "production")
        slots = {"one": found.get("one", []), "two": found.get("two", [])}
        run.log_dict(lineup.Lineup(slots, np.zeros(0), [], table, "none").pins, "models.json")
        run.log_text("The folds flatter: expect <less>.\nA second line.\n", "report.txt")


@pytest.fixture
def world(mlruns: Path, tmp_path: Path) -> tuple[Manifest, dict[str, Predictions]]:
    """A manifest and two members' OOF."""
    table, truth = make_manifest(tmp_path, wrong={3: 1, 7: 2})
    return table, {"one": make_oof(table, truth, 0, 0.5), "two": make_oof(table, truth, 1, 0.2)}


def config(table: Manifest, folder: Path) -> Report:
    return Report(competition="world", manifest=table.file, out=folder / "out")


class Reader(HTMLParser):
    """Collects tags and text, and sees that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "line", "rect", "circle", "path", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle", "path", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.mark.slow
def test_the_page_is_whole_self_contained_and_inert(
    world: tuple[Manifest, dict[str, Predictions]], tmp_path: Path
) -> None:
    table, oof = world
    for name, own in oof.items():
        train(table, own, tmp_path, name, **{"optim.lr": 0.1 if name == "one" else 0.2})
    blend(table, predictions.average(list(oof.values())), tmp_path, SCORES | {"member/one": 0.9, "member/two": 0.8})
    with tracking.run("report", None, "world") as run:
        result = report.write(config(table, tmp_path), run)
    text = Path(result["report"]).read_text()
    read = Reader(text)
    assert "report.html" in tracking.list_artifacts(run.id)
    assert not [tag for tag, _ in read.tags if tag in ("script", "link", "iframe", "object", "base", "form", "img")]
    assert not [name for _, attrs in read.tags for name in attrs if name.startswith("on")]
    links = [attrs[name] for _, attrs in read.tags for name in ("href", "src") if name in attrs]
    assert links
    assert all(str(link).startswith("#") for link in links)
    ids = {attrs["id"] for _, attrs in read.tags if "id" in attrs}
    assert {str(link)[1:] for link in links} <= ids
    assert "url(" not in text
    assert not re.search(r"\b(nan|inf|None|undefined)\b", read.text)
    assert "<b>kiwi</b>" in read.text  # the class name as text, not as markup
    for words in ("0.900", "The folds flatter: expect <less>.", "optim.lr 0.1 for 0.2", "over the plain mean",
                  "over the blend without two", "equal", "public 0.9100", "inside the interval"):  # fmt: skip
        assert words in read.text, words


def test_a_competition_with_nothing_in_it_says_where_to_begin(
    world: tuple[Manifest, dict[str, Predictions]], tmp_path: Path
) -> None:
    table, _ = world
    facts = report.collect(config(table, tmp_path))
    shown = page.analyse(facts)
    steps = advice.next_steps(shown, facts)
    assert steps[0].what == "Train a first member"
    text = report.render(shown | {"advice": steps})
    assert "nothing is trained yet" in Reader(text).text


@pytest.mark.slow
def test_what_cannot_be_compared_is_listed_with_the_reason(
    world: tuple[Manifest, dict[str, Predictions]], tmp_path: Path
) -> None:
    table, oof = world
    train(table, oof["one"], tmp_path, "one")
    fewer = table.take(table.fold != 0)
    members = {member.name: member for member in chronicle.members("world", fewer, "none")}
    assert members["one"].oof is None
    assert members["one"].missing == "another data version"
    members = {member.name: member for member in chronicle.members("world", table, "geo8")}
    assert members["one"].missing == "no OOF with views geo8"
    whole = chronicle.members("world", table, "none")[0]
    assert whole.oof is not None
    np.testing.assert_array_equal(whole.oof.sample_ids, table.sample_ids)
    np.testing.assert_allclose(whole.oof.values, oof["one"].values, atol=1e-6)
    facts = report.collect(config(table, tmp_path))
    steps = advice.next_steps(page.analyse(facts), facts)
    assert steps[0].what == "Blend the members in production"


@pytest.mark.slow
def test_what_was_trained_since_is_not_shown_as_what_stands_in_production(
    world: tuple[Manifest, dict[str, Predictions]], tmp_path: Path
) -> None:
    table, oof = world
    for name, own in oof.items():
        train(table, own, tmp_path, name, **{"optim.lr": 0.1, "batch_size": 8 if name == "one" else 4})
    blend(table, predictions.average(list(oof.values())), tmp_path, {})
    with tracking.run("train", None, "world", "one", {"member": "one"}) as run:  # no slot came of it
        run.log_params({"cfg.optim.lr": 9, "cfg.batch_size": 8})
    worse = make_oof(table, np.roll(table.target, 1), 3)
    train(table, worse, tmp_path, "one", promoted=False, **{"optim.lr": 0.3, "batch_size": 8})
    members = chronicle.members("world", table, "none")
    assert members[0].oof is not None
    np.testing.assert_allclose(members[0].oof.values, oof["one"].values, atol=1e-6)
    assert chronicle.experiments(members) == [("one", "two", "batch_size 8 for 4")]
    for slot in registry.newest("world")["one"]:
        versions.set_alias(slot.name, "production", slot.version)
    facts = report.collect(config(table, tmp_path))
    assert facts.known[0].oof is not None
    np.testing.assert_allclose(facts.known[0].oof.values, worse.values, atol=1e-6)
    np.testing.assert_allclose(facts.within["one"], oof["one"].values, atol=1e-6)
    facts.within = {}
    shown = page.analyse(facts)["gains"]["rows"]
    assert not [over for name, over, _ in shown if name == "blend"], "without the versions there is nothing to compare"


def test_scores_of_another_text_of_ones_own_metric_are_made_anew(
    world: tuple[Manifest, dict[str, Predictions]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, oof = world
    monkeypatch.delitem(METRICS, "hits", raising=False)  # and afterwards, what adopt puts there
    own = tmp_path / "own.py"
    own.write_text("def hits(values, target):\n    return float((values.argmax(1) == target).mean())\n")
    told = {"oof/hits": 0.5, "oof/hits_low": 0.4, "oof/hits_high": 0.6, "estimate/hits": 0.5}
    old, new = ({"metric": "hits", "metric.sha256": text} for text in ("of old", sha256_file(own)))
    blend(table, oof["one"], tmp_path, told, method="rank", **old)
    blend(table, oof["two"], tmp_path, told, method="stack", **new)
    for place, name in enumerate(("one", "two")):
        blend(table, oof[name], tmp_path, told, method="equal", **(old if place else new))
    asked = config(table, tmp_path).model_copy(update={"metric": f"{own}:hits"})
    facts = report.collect(asked)
    assert facts.main is not None
    scored = METRICS["hits"].score
    shown = page.analyse(facts)
    lines = {line.name: line for line in shown["lines"]}
    anew = {"blend rank": scored(oof["one"].values, table.target), "blend stack": 0.5}
    anew |= {"blend equal (newest)": scored(oof["two"].values, table.target)}
    assert {name: line.score.value for name, line in lines.items() if line.score} == pytest.approx(anew)
    assert shown["headline"]["oof"] == pytest.approx(anew["blend equal (newest)"])
    assert not np.isfinite(shown["headline"]["estimate"]), "it was made with the old text"
    assert [value for _, value in shown["progress"]["points"]["estimate"]] == [0.5, 0.5]
    facts = report.collect(config(table, tmp_path).model_copy(update={"metric": "accuracy"}))
    assert [line.score is None for line in page.analyse(facts)["lines"]] == [False] * 3


def test_a_page_of_another_metric_leaves_out_estimates_in_the_boards(
    world: tuple[Manifest, dict[str, Predictions]], tmp_path: Path
) -> None:
    table, oof = world
    blend(table, oof["one"], tmp_path, {"score/public": 0.4, "estimate/log_loss": 0.5}, metric="log_loss")
    asked = config(table, tmp_path)
    assert report.collect(asked).recorded[0].estimate == 0.5
    facts = report.collect(asked.model_copy(update={"metric": "accuracy"}))
    assert [(score.public, np.isfinite(score.estimate)) for score in facts.recorded] == [(0.4, False)]


def test_a_metric_of_the_other_task_and_a_missing_manifest_are_told(
    world: tuple[Manifest, dict[str, Predictions]], tmp_path: Path
) -> None:
    table, _ = world
    assert report.collect(Report(competition="world", manifest=table.file)).metric_name == "accuracy"
    with pytest.raises(UserError, match="metric 'mse'"):
        report.collect(Report(competition="world", manifest=table.file, metric="mse"))
    bare = dataclasses.replace(table, table=table.table.drop(columns=["label", "fold"]))
    bare.save(tmp_path / "test.csv")
    with pytest.raises(UserError, match="manifest of the training images"):
        report.collect(Report(competition="world", manifest=tmp_path / "test.csv"))
    with pytest.raises(UserError, match="manifest"):
        report.collect(Report(competition="world", manifest=tmp_path / "none.csv"))
