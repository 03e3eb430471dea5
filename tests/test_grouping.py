"""Groups: bursts found where the test set has other scenes, plain folds kept where it has not."""

from pathlib import Path

import numpy as np
import pytest

from octofold.prepare import folds, grouping, kinship, lineage, neighbours

NO_PAIRS = np.zeros((0, 2), np.int64)


def bursts(count: int, size: int, seed: int, noise: float = 0.25, width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """`count` scenes of `size` near-identical shots each: embeddings and scene numbers."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, width))
    scene = np.repeat(np.arange(count), size)
    rows = centres[scene] + noise * rng.normal(size=(count * size, width))
    return rows.astype(np.float32), scene


def assign(part: np.ndarray) -> np.ndarray:
    return folds.assign(part.astype(str), None, 5, 0)


def test_new_scenes_in_test_ask_for_groups_that_are_the_scenes() -> None:
    train, scene = bursts(60, 6, 0)
    test, _ = bursts(40, 6, 1)
    made = grouping.choose(train, test, NO_PAIRS, assign, 5)
    assert made.chosen.cut > 0
    crossing = folds.crossing(scene.astype(str), assign(made.component))
    assert len(crossing) <= 2
    assert abs(made.chosen.similarity - made.test_similarity) < 0.05
    assert made.candidates[0].similarity > made.test_similarity + 0.3
    assert "cut at" in made.reason


def test_the_same_scenes_in_test_ask_for_plain_folds() -> None:
    rows, _ = bursts(60, 12, 0)
    order = np.random.default_rng(0).permutation(len(rows))
    made = grouping.choose(rows[order[:480]], rows[order[480:]], NO_PAIRS, assign, 5)
    assert made.chosen.cut == 0
    assert "alike" in made.reason


def test_near_duplicates_stay_together_whatever_is_chosen() -> None:
    train, _ = bursts(30, 4, 0)
    pairs = np.array([[0, 100], [5, 77]])
    for test in (None, bursts(20, 4, 1)[0], train[::2]):
        part = grouping.choose(train, test, pairs, assign, 5).component
        assert part[0] == part[100]
        assert part[5] == part[77]


def test_without_test_images_it_says_so() -> None:
    train, _ = bursts(10, 3, 0)
    made = grouping.choose(train, None, NO_PAIRS, assign, 5)
    assert made.chosen.cut == 0
    assert len(set(made.component.tolist())) == 30
    assert "without test images" in made.reason


def test_many_images_are_clustered_through_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """More images than LEADERS: the same scenes come out, without a matrix of all pairs."""
    monkeypatch.setattr(grouping, "LEADERS", 200)
    train, scene = bursts(60, 12, 0, noise=0.1)
    test, _ = bursts(40, 6, 1, noise=0.1)
    made = grouping.choose(train, test, NO_PAIRS, assign, 5)
    assert made.chosen.cut > 0
    assert len(folds.crossing(scene.astype(str), assign(made.component))) <= 2


def test_degenerate_embeddings_do_not_break_it() -> None:
    for train in (np.zeros((20, 4), np.float32), np.ones((20, 1), np.float32)):
        made = grouping.choose(train, train[:5], NO_PAIRS, assign, 5)
        assert made.chosen.cut == 0 or made.component.max() >= 5


def test_follow_joins_the_nearest_old_group_only_when_it_is_near() -> None:
    old = np.eye(4, dtype=np.float32)
    new = np.array([[0.9, 0.1, 0, 0], [0, 0, 0.05, 1], [-1, -1, -1, -1]], np.float32)
    assert grouping.follow(["a", "b", "c", "d"], new, old, 0.3) == ["a", "d", ""]
    assert grouping.follow(["a", "b", "c", "d"], new, old, 0) == ["", "", ""]


def looks_of(rows: np.ndarray) -> kinship.Rows:
    """Images whose shrunken pictures are these embeddings, so that ``pixels`` gives them back (up to rounding)."""
    tiny = np.clip(127 + 30 * rows, 0, 255).astype(np.uint8)
    names = [f"{row:04x}" for row in range(len(rows))]
    prints = lineage.Fingerprints(np.array(names), np.zeros(len(rows), np.uint64), tiny)
    return kinship.Rows(names, [Path(name) for name in names], prints)


def test_new_bursts_are_groups_of_their_own_after_an_earlier_manifest(tmp_path: Path) -> None:
    """Old scenes 0 … 39; then one more shot of scene 0, two bursts of new scenes and a picture alone."""
    old, scene = bursts(40, 3, 0)
    fresh, burst = bursts(2, 10, 7, noise=0.1)
    rows = looks_of(np.concatenate([old, old[:1] + 0.05, fresh, bursts(1, 1, 9)[0]]))
    is_old = np.arange(len(rows.ids)) < len(old)
    groups = [f"near-{rows.ids[3 * one]}" for one in scene] + [""] * (len(rows.ids) - len(old))
    known = {"cut": 0.4, "embedding": "pixels"}
    named = kinship.follow(rows, NO_PAIRS, is_old, groups, known, tmp_path)
    assert named[: len(old)] == groups[: len(old)]
    assert named[len(old)] == groups[0]
    assert named[len(old) + 1 : -1] == [f"near-{rows.ids[len(old) + 1 + 10 * one]}" for one in burst]
    assert named[-1] == ""
    pair = np.array([[len(old) + 1, len(rows.ids) - 1]])  # a near-duplicate of the first burst, whatever its embedding
    assert kinship.follow(rows, pair, is_old, groups, known, tmp_path)[-1] == named[len(old) + 1]


def test_a_new_group_takes_no_name_that_an_old_one_has(tmp_path: Path) -> None:
    """The sample that named an old group was dropped, is back, and looks like nobody there any more."""
    fresh, _ = bursts(1, 4, 7, noise=0.1)
    rows = looks_of(np.concatenate([bursts(20, 1, 0)[0], fresh]))
    is_old = np.arange(len(rows.ids)) < 20
    groups = [f"near-{rows.ids[20]}"] * 2 + [""] * 22
    for cut in (0.4, 0.0):
        pairs = np.array([[20, 21], [21, 22], [22, 23]]) if cut == 0 else NO_PAIRS
        named = kinship.follow(rows, pairs, is_old, groups, {"cut": cut, "embedding": "pixels"}, tmp_path)
        assert named[:2] == groups[:2]
        assert set(named[20:]) == {f"near-{rows.ids[20]}-2"}


def test_a_shipment_of_another_kind_of_picture_is_not_one_group() -> None:
    """Far more new images than old, all of them in one corner: no group is more than half of everything."""
    rows = np.concatenate([bursts(10, 1, 0)[0], 8 + bursts(30, 4, 5)[0]])
    new = np.arange(10, len(rows))
    for cut in (0.7, 1.9):
        part = grouping.gather(rows, new, NO_PAIRS, cut)
        assert np.bincount(part).max() <= len(rows) / 2
    assert len(grouping.gather(rows, new[:0], NO_PAIRS, 0.4)) == 0
    assert grouping.gather(rows, new[:1], NO_PAIRS, 0.4).tolist() == [0]


def test_many_equal_images_grow_no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "LEADERS", 10)
    assert [part.tolist() for part in grouping._clusters(np.ones((20, 3), np.float32), 0, (0.1,))] == [[0] * 20]


def test_nearest_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    rows, others = rng.normal(size=(700, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32)
    assert np.allclose(grouping.nearest(rows, others), (rows @ others.T).max(axis=1))


def test_joined_merges_clusters_over_pairs() -> None:
    part = grouping._joined(np.array([0, 0, 1, 2, 3]), np.array([[1, 2]]))
    assert part.tolist() == [0, 0, 0, 1, 2]
    assert neighbours.components(3, NO_PAIRS).tolist() == [0, 1, 2]
