"""Folds: groups never cross, classes stay balanced, old samples stay where they were."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octofold.errors import UserError
from octofold.prepare import folds


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), min_size=1, max_size=80),
    st.integers(2, 6),
    st.integers(0, 3),
)
def test_groups_never_cross(rows: list[tuple[int, str]], count: int, seed: int) -> None:
    groups, labels = [str(group) for group, _ in rows], [label for _, label in rows]
    if len(set(groups)) < count:
        with pytest.raises(UserError, match="fewer --folds"):
            folds.assign(groups, labels, count, seed)
        return
    fold = folds.assign(groups, labels, count, seed)
    assert folds.crossing(np.array(groups), fold) == []
    assert set(fold.tolist()) <= set(range(count))
    assert np.array_equal(fold, folds.assign(groups, labels, count, seed))


@given(st.lists(st.sampled_from("abcd"), min_size=6, max_size=200), st.integers(2, 6))
def test_without_groups_it_is_stratified_to_one_sample(labels: list[str], count: int) -> None:
    fold = folds.assign([str(row) for row in range(len(labels))], labels, count, 0)
    table = pd.crosstab(np.array(labels), fold).reindex(columns=range(count), fill_value=0).to_numpy()
    assert (table.max(axis=1) - table.min(axis=1)).max() <= 1
    assert np.ptp(table.sum(axis=0)) <= max(2, len(set(labels)))


def test_seed_changes_folds() -> None:
    names = [str(row) for row in range(50)]
    assert (folds.assign(names, ["a"] * 50, 5, 0) != folds.assign(names, ["a"] * 50, 5, 1)).any()


def test_old_samples_keep_their_fold_and_new_ones_follow_their_group() -> None:
    groups = ["g", "g", "h", "h", "new", "new", "x", "y", "z", "w"]
    kept = np.array([3, -1, 1, 1, -1, -1, 0, 2, 4, -1])
    fold = folds.extend(groups, ["a"] * 10, kept, kept[kept >= 0])
    assert (fold[kept >= 0] == kept[kept >= 0]).all()
    assert fold[1] == 3
    assert fold[4] == fold[5]


def test_a_new_group_that_joins_two_folds_moves_no_old_sample() -> None:
    kept = np.array([0, 1, 1, -1, 0])
    fold = folds.extend(["g", "g", "g", "g", "h"], None, kept, kept[kept >= 0])
    assert fold.tolist() == [0, 1, 1, 1, 0]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc"), st.booleans()), min_size=12, max_size=80),
    st.lists(st.integers(0, 40), min_size=2, max_size=5, unique=True),
)
def test_folds_of_any_numbers_are_extended(rows: list[tuple[int, str, bool]], numbers: list[int]) -> None:
    """Old samples stay, new ones land in folds there are, and with their group wherever that lay in one fold."""
    groups, labels = np.array([str(group) for group, _, _ in rows]), [label for _, label, _ in rows]
    before = np.array([numbers[group % len(numbers)] for group, _, _ in rows])
    kept = np.where([old for _, _, old in rows], before, -1)
    if len(set(groups.tolist())) < len(set(before.tolist())):
        return
    fold = folds.extend(groups, labels, kept, before)
    assert (fold[kept >= 0] == kept[kept >= 0]).all()
    assert set(fold.tolist()) <= set(before.tolist())
    assert folds.crossing(groups, fold) == []


def test_folds_numbered_from_one_stay_and_stay_balanced() -> None:
    before = np.arange(50) % 5 + 1
    kept = np.concatenate([before, np.full(25, -1)])
    labels = ["ab"[row // 5 % 2] for row in range(75)]
    fold = folds.extend([str(row) for row in range(75)], labels, kept, before)
    assert (fold[:50] == before).all()
    assert np.bincount(fold).tolist() == [0, 15, 15, 15, 15, 15]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35])
def test_a_held_out_part_keeps_its_share_of_each_class(share: float) -> None:
    """New images of the old classes, and of twenty new ones with three each: the share is held out of all of them."""
    old, new = np.repeat(["a", "b"], [300, 100]), np.repeat(["a", "b"], [150, 150])
    names = np.array([str(row) for row in range(760)])
    before = folds.hold_out(names[:400], old, share)
    kept = np.concatenate([before, np.full(360, -1)])
    labels = np.concatenate([old, new, np.repeat([f"new {row}" for row in range(20)], 3)])
    fold = folds.extend(names, labels, kept, before)
    assert (fold[:400] == before).all()
    for rows in (labels == "a", labels == "b", np.char.startswith(labels, "new")):
        assert abs(float((fold[rows] == 0).mean()) - share) < 0.06


@pytest.mark.parametrize("share", [0.005, 0.01, 0.02, 0.1, 0.5, 0.98, 0.995])
def test_a_share_however_small_is_held_out(share: float) -> None:
    fold = folds.hold_out([str(row) for row in range(400)], None, share)
    assert abs(float((fold == 0).mean()) - share) < 0.006


@pytest.mark.parametrize("groups", [2, 7, 10])
def test_a_share_of_few_groups_is_held_out(groups: int) -> None:
    names = np.repeat([f"patient {row}" for row in range(groups)], 12)
    fold = folds.hold_out(names, None, 0.15)
    assert not folds.crossing(names, fold)
    assert 0 < (fold == 0).sum() <= 2 * 12


def test_big_groups_stay_balanced() -> None:
    """100 groups of very different sizes over 5 folds: each fold within a tenth of a fifth."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 60, 100)
    groups = np.repeat(np.arange(100).astype(str), sizes)
    labels = np.repeat(rng.integers(0, 4, 100).astype(str), sizes)
    counts = np.bincount(folds.assign(groups, labels, 5))
    assert np.abs(counts / len(groups) - 0.2).max() < 0.02
    table = pd.crosstab(labels, folds.assign(groups, labels, 5), normalize="index").to_numpy()
    assert np.abs(table - 0.2).max() < 0.05


FILES, LABELS = ["a.png", "b.png", "c.png"], ["x", "y", "x"]


def test_a_folds_file_is_taken_as_it_is() -> None:
    table = pd.DataFrame({"file": ["c.png", "a.png", "b.png"], "label": ["x", "x", "y"], "fold": ["2", "0", "1.0"]})
    assert folds.from_file(table, FILES, LABELS, "f.csv").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fold": ["0", "one", "1"]}, "'one'"),
        ({"fold": ["0", "-1", "1"]}, "'-1'"),
        ({"fold": ["0", "0.5", "1"]}, "'0.5'"),
        ({"fold": ["0", "", "1"]}, "whole fold numbers"),
        ({"fold": ["0", "1e99", "1"]}, "1e99"),
        ({"fold": ["1", "1", "1"]}, "at least two folds"),
        ({"file": ["a.png", "b.png", "z.png"]}, "c.png"),
        ({"file": ["a.png", "b.png", "b.png"]}, "two for b.png"),
        ({"label": ["x", "x", "x"]}, "b.png (x, labels say y)"),
    ],
)
def test_a_wrong_folds_file_is_refused_by_name(change: dict[str, list[str]], words: str) -> None:
    table = pd.DataFrame({"file": FILES, "label": LABELS, "fold": ["0", "1", "2"]} | change)
    with pytest.raises(UserError) as caught:
        folds.from_file(table, FILES, LABELS, "f.csv")
    assert words in str(caught.value)


@given(st.lists(st.tuples(st.sampled_from(FILES), st.text(max_size=8)), max_size=8))
def test_fuzzed_folds_are_right_or_refused(rows: list[tuple[str, str]]) -> None:
    table = pd.DataFrame(rows, columns=["file", "fold"], dtype=str)
    try:
        fold = folds.from_file(table, FILES, LABELS, "f.csv")
    except UserError:
        return
    said = dict(rows)
    assert [float(said[name]) for name in FILES] == fold.tolist()
