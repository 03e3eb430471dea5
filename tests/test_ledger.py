"""A ledger leads each row back to who said what."""

import json
from pathlib import Path

import numpy as np
import pytest

from octofold.blend import ledger
from octofold.errors import UserError
from test_blending import members
from test_submission import NAMES, toy_set


def made(folder: Path, seed: int = 0) -> ledger.Ledger:
    probs, _, _ = members((1.0, 2.0), rows=3, classes=3)
    rng = np.random.default_rng(seed)
    probs = rng.permuted(probs, axis=2) if seed else probs
    votes = np.concatenate([probs, probs])
    about = {"run_id": "r1", "manifest_hash": "h1", "models": [{"name": "toy.a.f0.s0", "version": 3}]}
    nested = {1: probs[0], 2: probs.mean(axis=0)}
    near = [[("train/x.jpg", 0.9)], [], [("train/y.jpg", 0.5)]]
    return ledger.build(
        toy_set(folder), probs.mean(axis=0), dict(zip("ab", probs, strict=True)), votes, nested, near, about
    )


def test_round_trip_and_rows_by_any_name(tmp_path: Path) -> None:
    book = made(tmp_path)
    book.save(tmp_path)
    again = (
        ledger.load(tmp_path / "submission.csv") if (tmp_path / "submission.csv").exists() else ledger.load(tmp_path)
    )
    assert again.about == book.about
    for name in ("copy of a.jpg", "a.jpg", "a", "s2"):
        assert again.row(name)["sample_id"] == "s2"
    row = again.row("b")
    assert row["label"] == row["top1"]
    assert row["p1"] >= row["p2"] >= row["p3"]
    assert {row["vote.a"], row["vote.b"]} <= {"1", "2", "10"}
    assert json.loads(row["nearest"]) == [["train/x.jpg", 0.9]]
    assert 0 <= row["disagreement"] <= 1
    with pytest.raises(UserError, match="a row of the submission"):
        again.row("nobody.jpg")


def test_no_ledger_is_told(tmp_path: Path) -> None:
    (tmp_path / "submission.csv").write_text("image,label\n")
    with pytest.raises(UserError, match="ledger beside"):
        ledger.load(tmp_path / "submission.csv")


def test_blocks_of_views_average_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    views = rng.random((8, 5))
    nested = {count: views[:count].mean(axis=0) for count in (1, 2, 4, 8)}
    blocks, share = ledger.view_blocks(nested)
    np.testing.assert_allclose(blocks[2], views[2:4].mean(axis=0))
    np.testing.assert_allclose((blocks * share).sum(axis=0), views.mean(axis=0))


def test_differences_name_who_changed(tmp_path: Path) -> None:
    one, other = made(tmp_path), made(tmp_path, seed=3)
    changed = ledger.differences(one, other)
    assert len(changed) == (one.rows["label"].to_numpy() != other.rows["label"].to_numpy()).sum() > 0
    assert set(", ".join(changed["who"]).split(", ")) <= {"a", "b", "weights"}
    assert ledger.differences(one, one).empty
    assert len(NAMES) == 3
