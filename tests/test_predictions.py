"""Predictions: whatever is saved is read back the same; whatever is wrong is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold import predictions
from octofold.errors import UserError
from octofold.predictions import Predictions, align, average, concatenate


def made(
    ids: list[str], seed: int = 0, fold: int | None = 0, member: str = "m", classes: tuple[str, ...] = ("a", "b", "c")
) -> Predictions:
    values = np.random.default_rng(seed).dirichlet(np.ones(len(classes)), len(ids)).astype(np.float32)
    folds = None if fold is None else np.full(len(ids), fold)
    return Predictions(np.array(ids), values, classes, "h" * 64, member, f"sha{seed}", "geo8", folds, 0)


@given(st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=8, unique=True), st.booleans())
def test_save_and_load_are_inverse(tmp_path: Path, names: list[str], is_oof: bool) -> None:
    names = [name.encode("utf-8", "ignore").decode().replace("\x00", "") or "x" for name in names]
    names = [f"{row}{name}" for row, name in enumerate(names)]
    classes = tuple(names[::-1]) if len(names) > 1 else ("one", "two")
    before = made(names, fold=2 if is_oof else None, classes=classes)
    after = Predictions.load(before.save(tmp_path / "p.parquet", csv=True))
    assert after.sample_ids.tolist() == before.sample_ids.tolist()
    assert after.classes == before.classes
    np.testing.assert_array_equal(after.values, before.values)
    assert (after.fold is None) == (before.fold is None)
    assert (after.member, after.views, after.manifest_hash, after.model_sha) == ("m", "geo8", "h" * 64, "sha0")
    assert (tmp_path / "p.csv").read_text(encoding="utf-8").startswith("sample_id,")


def test_points_survive_the_file(tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(0, 300, (4, 2, 2)).astype(np.float32)
    before = Predictions(np.array(list("abcd")), points, ("nose", "tail"), "h", "m", "s", "none")
    after = Predictions.load(before.save(tmp_path / "points.parquet"))
    np.testing.assert_array_equal(after.values, points)
    assert after.is_points
    assert not after.is_oof


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample_ids": np.array(["a", "a"])}, "repeated: a"),
        ({"values": np.array([[0.5, 0.5, np.nan], [1, 0, 0]])}, "NaN or infinite at a"),
        ({"values": np.array([[0.5, 0.5, 0.5], [1, 0, 0]])}, "rows that do not: a"),
        ({"values": np.array([[1.5, -0.5, 0], [1, 0, 0]])}, "rows that do not: a"),
        ({"values": np.ones((2, 2)) / 2}, "values of shape (2, 3)"),
        ({"classes": ("a", "a", "b")}, "distinct class names"),
        ({"fold": np.array([0])}, "one fold per row"),
    ],
)
def test_a_broken_rule_is_refused_by_name(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(made(["a", "b"]), **change)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.parametrize("change", [{"new": 1}, {"views": None}])
def test_a_header_of_another_version_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    import pyarrow.parquet as pq

    path = made(["a", "b"]).save(tmp_path / "x.parquet")
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"octofold"]) | change
    header = {name: value for name, value in header.items() if value is not None or name == "seed"}
    pq.write_table(table.replace_schema_metadata({b"octofold": json.dumps(header).encode()}), path)
    with pytest.raises(UserError, match=next(iter(change))):
        Predictions.load(path)


@given(st.binary(max_size=300))
def test_any_bytes_as_a_file_are_refused(tmp_path: Path, blob: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(blob)
    with pytest.raises(UserError, match="x.parquet"):
        Predictions.load(tmp_path / "x.parquet")


@given(st.permutations(list("abcdef")), st.permutations(["x", "y", "z"]))
def test_alignment_goes_by_id_and_class_never_by_position(ids: list[str], classes: list[str]) -> None:
    one = made(list("abcdef"), classes=("x", "y", "z"))
    other = one.take(ids).reorder(classes)
    values, names, kept = align([one, replace(other, member="n")])
    np.testing.assert_array_equal(values[0], values[1])
    assert names.tolist() == list("abcdef")
    assert kept == ("x", "y", "z")


def test_folds_join_with_each_id_once() -> None:
    joined = concatenate([made(["a", "b"], fold=0), made(["c"], seed=1, fold=1)])
    assert joined.sample_ids.tolist() == ["a", "b", "c"]
    assert joined.fold is not None
    assert joined.fold.tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="repeated: b"):
        concatenate([made(["a", "b"], fold=0), made(["b"], seed=1, fold=1)])


def test_a_bag_is_the_mean_by_id() -> None:
    one, two = made(["a", "b"], seed=1, fold=None), made(["b", "a"], seed=2, fold=None)
    bag = average([one, two])
    np.testing.assert_allclose(bag.values, (one.values + two.values[::-1]) / 2, atol=1e-6)
    np.testing.assert_allclose(
        average([one, two], [0.25, 0.75]).values, one.values / 4 + two.values[::-1] * 0.75, atol=1e-6
    )
    assert bag.model_sha == predictions.bag_sha(["sha2", "sha1"])
    with pytest.raises(UserError, match="sum to 1"):
        average([one, two], [0.5, 0.6])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"manifest_hash": "k" * 64}, "the same manifest_hash"),
        ({"views": "none"}, "the same views"),
        ({"classes": ("a", "b", "d")}, "the same class names"),
        ({"sample_ids": np.array(["a", "z"])}, "that only one has"),
    ],
)
def test_members_that_do_not_fit_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        align([made(["a", "b"], member="first"), replace(made(["a", "b"]), member="second", **change)])  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "second" in str(caught.value)


def test_nothing_to_join_is_said() -> None:
    with pytest.raises(UserError, match="at least one"):
        concatenate([])
