"""Worth: which rows decide, and who wins on them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from labelled import CLASSES, make_manifest, make_oof
from octofold.data.journal import Entry, Journal
from octofold.data.manifest import Manifest, read
from octofold.data.replay import replay
from octofold.errors import UserError
from octofold.tune import worth
from world import make_world

WRONG = {4: 2, 9: 1, 20: 0}


def versions(folder: Path) -> tuple[Manifest, Manifest, Journal, np.ndarray]:
    """A manifest with wrong labels, and the one after a review that mended them, dropped one and kept ten."""
    old, truth = make_manifest(folder, WRONG)
    ids, label = old.sample_ids.tolist(), old.table["label"].tolist()
    journal = Journal(folder / "decisions.jsonl")
    journal.append(
        [
            *(Entry(ids[row], "relabel", label=label[row], target=CLASSES[truth[row]]) for row in WRONG),
            Entry(ids[30], "drop", label=label[30]),
            *(Entry(ids[row], "keep", label=label[row]) for row in range(10, 20)),
        ]
    )
    table = replay(journal, old.table, CLASSES).table
    return old, dataclasses.replace(old, table=table, info={"previous": old.hash[:12]}), journal, truth


def test_trusted_rows(tmp_path: Path) -> None:
    old, new, journal, _ = versions(tmp_path)
    rows = worth.trusted_rows(old, new, journal)
    mended = set(old.sample_ids[list(WRONG)].tolist())
    assert set(new.sample_ids[~rows["untouched"]].tolist()) == mended
    assert set(new.sample_ids[rows["reviewed"]].tolist()) == mended | set(old.sample_ids[10:20].tolist())


def test_a_row_that_changed_its_fold_decides_nothing(tmp_path: Path) -> None:
    old, new, journal, _ = versions(tmp_path)
    moved = new.table.copy()
    moved.loc[[10, 25], "fold"] += 1
    rows = worth.trusted_rows(old, dataclasses.replace(new, table=moved), journal)
    assert not rows["untouched"][[10, 25]].any()
    assert not rows["reviewed"][10]


def test_the_better_training_wins_on_the_rows_both_held_out(tmp_path: Path) -> None:
    old, new, journal, truth = versions(tmp_path)
    rows = worth.trusted_rows(old, new, journal)
    shown = truth[[old.sample_ids.tolist().index(name) for name in new.sample_ids]]
    good = make_oof(new, shown, sure=0.9)
    guess = np.random.default_rng(0).permutation(shown)
    arms = {"old": {0: make_oof(new, guess, sure=0.9)}, "new": {0: good}}
    finding = worth.judge(arms, new.take(rows["untouched"]), "accuracy", 0)
    assert finding.score == 1
    assert finding.verdict == "better"
    same = worth.judge({"old": {0: good}, "new": {0: good}}, new.take(rows["untouched"]), "accuracy", 0)
    assert (same.gain, same.verdict) == (0, "not separable")
    assert "not separable" in worth.say("untouched", same, "accuracy")
    half = {"old": {0: good.take(new.sample_ids[:20].tolist())}, "new": {0: good.take(new.sample_ids[20:].tolist())}}
    with pytest.raises(UserError, match="held out by both"):
        worth.judge(half, new, "accuracy", 0)


def test_the_manifest_before_is_found(tmp_path: Path) -> None:
    old, new, _, _ = versions(tmp_path)
    path = tmp_path / "manifest.csv"
    new.save(path)
    with pytest.raises(UserError, match="--old"):
        worth.previous(read(path), None)
    kept = tmp_path / "versions" / old.hash[:12] / "manifest.csv"
    old.save(kept)
    assert worth.previous(read(path), None) == kept
    assert worth.previous(new, kept) == kept


def test_two_different_problems_are_not_compared(tmp_path: Path) -> None:
    old, new, journal, _ = versions(tmp_path)
    for other in ({"competition": "other"}, {"classes": (*CLASSES, "plum")}):
        with pytest.raises(UserError, match="two versions of one manifest"):
            worth.trusted_rows(old, dataclasses.replace(new, **other), journal)


def test_points_that_a_person_kept_are_reviewed(tmp_path: Path) -> None:
    table = make_world(tmp_path, task="keypoints")
    ids = table.sample_ids.tolist()
    journal = Journal(tmp_path / "decisions.jsonl")
    journal.append([*(Entry(name, "keep") for name in ids[:30]), Entry(ids[30], "drop")])
    moved = table.table.copy()
    moved.loc[5, "tip_x"] += 3
    rows = worth.trusted_rows(table, dataclasses.replace(table, table=moved), journal)
    assert rows["reviewed"].nonzero()[0].tolist() == [row for row in range(30) if row != 5]
