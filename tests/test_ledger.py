"""A ledger leads each row back to who said what."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from octofold.blend import explaining, ledger
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.infer.combining import Blend
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
    with pytest.raises(UserError, match="row of the submission, such as"):
        again.row("nobody.jpg")


def test_an_exact_name_comes_before_a_stem_and_several_stems_are_refused() -> None:
    def book(*names: str) -> ledger.Ledger:
        ids = [f"id{place}" for place in range(len(names))]
        return ledger.Ledger(pd.DataFrame({"sample_id": ids, "names": [json.dumps([name]) for name in names]}), {})

    assert book("1.5", "1").row("1")["sample_id"] == "id1"
    assert book("img.v2.jpg", "img.v2").row("img.v2")["sample_id"] == "id1"
    with pytest.raises(UserError, match="one of cats/001.jpg, dogs/001.jpg"):
        book("cats/001.jpg", "dogs/001.jpg").row("001")


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


def test_nobody_is_named_whom_neither_blend_heard(tmp_path: Path) -> None:
    gate = {"a": 0, "b": 1, "coef": [1.0, 0.0, 1.0], "intercept": 0.0, "margin": 0.5, "threshold": 0.5}

    def book(
        says: dict[str, list[int]], final: list[int], weights: list[float], rule: str = "linear", **params: Any
    ) -> ledger.Ledger:
        blend = Blend("lr_mse", rule, np.array(weights), params)
        about = {"blend": blend.to_dict(), "weights": dict(zip(says, weights, strict=True))}
        about |= {"classes": list(toy_set(tmp_path).classes)}
        probs = {name: np.eye(3)[labels] for name, labels in says.items()}
        first = next(iter(probs.values()))
        return ledger.build(toy_set(tmp_path), np.eye(3)[final], probs, first[None], {1: first}, [], about)

    old = {"a": [0, 0, 0], "idle": [0, 0, 0], "pair": [0, 0, 0]}
    new = {"a": [0, 2, 0], "idle": [1, 1, 1], "pair": [1, 1, 0]}

    def blame(**second: Any) -> list[str]:
        one = book(old, [0, 0, 0], [1.0, 0.0, 0.0], voters=2, experts=[gate])
        other = book(new, [1, 2, 0], [1.0, 0.0, 0.0], **({"voters": 2, "experts": [gate]} | second))
        return ledger.differences(one, other)["who"].tolist()

    # The gate is of the first two classes and asks all three members: the second row's change is not its work.
    assert blame() == ["idle, pair", "a"]
    assert blame(rule="vote", experts=[]) == ["idle, pair", "a, idle"], "votes count whatever the weight"
    plain = [book(says, final, [1.0, 0.0, 0.0], voters=2) for says, final in ((old, [0, 0, 0]), (new, [1, 2, 0]))]
    assert ledger.differences(*plain)["who"].tolist() == ["weights", "a"]
    fewer = book({"a": [0, 0, 0]}, [0, 0, 0], [1.0])
    assert ledger.differences(fewer, plain[1])["who"].tolist() == ["weights", "a"], "neither + says anything"
    assert ledger.differences(plain[1], fewer)["who"].tolist() == ["weights", "a"]


class Steady(torch.nn.Module):
    """Says the same of every image; of the last view something else."""

    def __init__(self, probs: list[float], last: list[float]) -> None:
        super().__init__()
        self.probs, self.last = probs, last

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.log(torch.tensor([self.probs] * (len(pixels) - 1) + [self.last]))


def explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, says: dict[str, tuple[list[float], list[float]]], blend: Blend
) -> explaining.Explanation:
    """Explain one image whose fold models, two for each member, are `Steady`."""
    classes = tuple("abcd")
    card = SimpleNamespace(task="classify", classes=list(classes), swap=None)
    card.recipe = {"model": {"name": "small_cnn", "input_size": 20}}
    monkeypatch.setattr(explaining, "_slot", lambda about, pin: pin["member"])
    monkeypatch.setattr(explaining.registry, "fetch", lambda slot: slot)
    monkeypatch.setattr(explaining, "read_model", lambda member: (Steady(*says[member]), card))
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "x.png")
    table = pd.DataFrame({"sample_id": ["s"], "path": ["x.png"]})
    test = Manifest(table, "classify", classes, "toy", folder, {}, folder / "test.csv")
    test.save(folder / "test.csv")
    Manifest(table.assign(label="a", fold=0, group=""), "classify", classes, "toy", folder).save(
        folder / "manifest.csv"
    )
    members = {name: np.array([7 * np.array(most) + last]) / 8 for name, (most, last) in says.items()}
    stacked = np.stack(list(members.values()))
    models: list[dict[str, Any]] = [
        {"member": name, "share": 0.5, "name": f"toy.{name}.f{fold}.s0", "version": 1}
        for name in says
        for fold in (0, 1)
    ]
    about = {
        "blend": blend.to_dict(),
        "weights": dict(zip(says, blend.weights.tolist(), strict=True)),
        "models": models,
    }
    about |= {"views": "geo8", "method": "equal", "run_id": "r", "manifest_hash": "h", "manifest": str(folder / "x")}
    first = next(iter(members.values()))
    book = ledger.build(test, blend.apply(stacked), members, first[None], {1: first}, [], about)
    return explaining.explain(book, book.row("x.png"))


def test_a_view_is_asked_as_the_submission_was_and_of_every_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = {"a": 0, "b": 1, "coef": [0.2, 1.0], "intercept": 0.0, "margin": 0.5, "threshold": 0.5}
    gated = Blend("equal", "linear", np.array([1.0, 0.0]), {"voters": 1, "experts": [expert]})
    voter, pair = [0.40, 0.38, 0.12, 0.10], [0.02, 0.979, 0.0005, 0.0005]
    told = explained(tmp_path, monkeypatch, {"voter": (voter, voter), "pair": (pair, pair)}, gated)
    assert told.classes[0] == "b", "the expert decides"
    assert (told.views.argmax(axis=1) == 0).all()
    assert any("8 of 8 views put b first" in line for line in told.lines)
    assert any("of the 2 fold models" in line for line in told.lines), "the expert's two have no vote"

    says = {"one": ([0.36, 0.31, 0.30, 0.03], [0.30, 0.02, 0.02, 0.66])}
    told = explained(tmp_path, monkeypatch, says, Blend("equal", "linear", np.array([1.0])))
    assert told.classes == ["a", "b", "c"]
    assert any("7 of 8 views put a first" in line for line in told.lines), "the last view says d, which is not shown"


def test_points_are_explained_by_how_far_members_are_off(tmp_path: Path) -> None:
    test = Manifest(pd.DataFrame({"sample_id": ["s"], "path": ["0.png"]}), "keypoints", ("nose",), "toy", tmp_path)
    here = np.zeros((1, 1, 2), np.float32)
    about = {"weights": {"near": 0.9, "far": 0.1}, "models": [{"member": "near", "name": "n", "version": 1}]}
    about |= {"method": "simplex", "views": "none", "run_id": "r", "manifest_hash": "h"}
    both = {"near": here, "far": here + [3, 4]}
    book = ledger.build(test, here, both, np.stack([here, here + [6, 8]]), {1: here}, [], about)
    lines = explaining._lines(book, book.row("0.png"), [], [], [])
    assert "  far (weight 0.100) is 5.00 px off the blend, on average" in lines
    assert "the 1 fold models are 5.00 px off the blend, on average" in lines
