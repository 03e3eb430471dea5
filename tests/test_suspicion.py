"""Suspicion: rows stay with their samples, and what is wrong comes first."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.cluster import DBSCAN
from sklearn.neighbors import NearestNeighbors

from octofold.clean import suspicion


def world(seed: int = 0, flips: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features and probabilities of 3 clusters of 30, labels with some flipped, and which."""
    rng = np.random.default_rng(seed)
    truth = np.arange(90) % 3
    features = (np.eye(3)[truth] * 4) @ rng.normal(size=(3, 50)) + rng.normal(size=(90, 50))
    probs = 0.7 * np.eye(3)[truth] + 0.3 * rng.dirichlet(np.ones(3), 90)
    label, bad = truth.copy(), np.zeros(90, bool)
    bad[rng.choice(90, flips, replace=False)] = True
    label[bad] = (label[bad] + 1) % 3
    return features, probs, label, bad


def score(features: np.ndarray, probs: np.ndarray, label: np.ndarray) -> np.ndarray:
    rows, near = suspicion.nearest(suspicion.normalise(features))
    return suspicion.combine(probs, suspicion.votes(rows, near, label, 3), label)[1]


METHODS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "combined": score,
    "neighbours": lambda x, p, y: score(x, np.full_like(p, np.nan), y),
    "margin": lambda x, p, y: -suspicion.margin(p, y),
    "confident": lambda x, p, y: (suspicion.confident_joint(p, y)[1] != y).astype(float),
    "isolation forest": lambda x, p, y: suspicion.isolated(suspicion.normalise(x, 8), y),
    "DBSCAN": lambda x, p, y: suspicion.stray(suspicion.normalise(x, 8), y).astype(float),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_wrong_comes_first(name: str) -> None:
    features, probs, label, bad = world()
    found = METHODS[name](features, probs, label)
    assert found[bad].mean() > 2 * max(0.0, found[~bad].mean()) or found[bad].min() > found[~bad].max()


@pytest.mark.parametrize("name", ["combined", "neighbours", "margin", "confident", "DBSCAN"])
def test_rows_stay_with_their_samples(name: str) -> None:
    """Original 002 attached features to the wrong ids; here a shuffle shuffles the answer and changes nothing."""
    features, probs, label, _ = world()
    shuffle = np.random.default_rng(3).permutation(len(label))
    straight = METHODS[name](features, probs, label)
    shuffled = METHODS[name](features[shuffle], probs[shuffle], label[shuffle])
    np.testing.assert_allclose(shuffled, straight[shuffle], atol=2e-3)


def test_features_on_the_wrong_ids_find_nothing() -> None:
    """Why the isolation forest of original 002 looked useless."""
    features, probs, label, bad = world()
    odd = METHODS["isolation forest"](features[np.random.default_rng(0).permutation(90)], probs, label)
    assert abs(odd[bad].mean() - odd[~bad].mean()) < 1


def test_confident_joint_counts_as_cleanlab_does() -> None:
    count = pytest.importorskip("cleanlab.count", reason="needs the clean extra")
    for seed in range(5):
        _, probs, label, _ = world(seed, flips=20)
        theirs = count.compute_confident_joint(label, probs, calibrate=False)
        np.testing.assert_array_equal(suspicion.confident_joint(probs, label)[0], theirs)


def test_margin_and_disagreement_by_hand() -> None:
    probs = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(suspicion.margin(probs, np.array([0, 1])), [0.5, -0.7])
    same = np.stack([probs, probs])
    np.testing.assert_allclose(suspicion.disagreement(same), 0, atol=1e-9)
    opposed = np.stack([np.eye(2)[[0]], np.eye(2)[[1]]])
    np.testing.assert_allclose(suspicion.disagreement(opposed), 1)


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_nearest_is_exact_in_blocks(rows: int) -> None:
    unit = suspicion.normalise(np.random.default_rng(0).normal(size=(rows, 6)))
    found, near = suspicion.nearest(unit, 4, block=16)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    k = min(4, rows - 1)
    assert found.shape == near.shape == (rows, k)
    np.testing.assert_allclose(near, -np.sort(-similarity, axis=1)[:, :k], atol=1e-6)
    assert not (found == np.arange(rows)[:, None]).any(), "nobody is his own neighbour"
    shares = suspicion.votes(found, near, np.zeros(rows, np.int64), 3)
    np.testing.assert_allclose(shares.sum(axis=1), 1)


def test_neighbours_in_cells_are_nearly_all_and_never_wrong() -> None:
    rng = np.random.default_rng(0)
    scenes = rng.normal(size=(150, 24))
    unit = suspicion.normalise(np.repeat(scenes, 20, axis=0) + 0.6 * rng.normal(size=(3000, 24)))
    rows, near = suspicion.nearest(unit, 10, exact=100)
    exact, best = suspicion.nearest(unit, 10)
    np.testing.assert_allclose(near, (unit[rows] * unit[:, None]).sum(axis=2), atol=1e-5)
    assert not (rows == np.arange(3000)[:, None]).any()
    assert (np.sort(rows, axis=1)[:, 1:] != np.sort(rows, axis=1)[:, :-1]).all()
    found = np.mean([len(set(a) & set(b)) for a, b in zip(rows.tolist(), exact.tolist(), strict=True)]) / 10
    assert found > 0.95
    assert (best - near).max() < 0.5
    same = np.ones((500, 4)) / 2
    assert suspicion.nearest(same, 7, exact=100)[0].shape == (500, 7)


def test_stray_is_what_dbscan_calls_noise() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = rng.choice([0.1, 0.5, 2.0], 200)[:, None]
        unit = suspicion.normalise(rng.normal(size=(4, 6))[rng.integers(0, 4, 200)] + sizes * rng.normal(size=(200, 6)))
        distance = NearestNeighbors(n_neighbors=4).fit(unit).kneighbors()[0]
        theirs = DBSCAN(eps=2 * np.median(distance[:, -1]), min_samples=4).fit_predict(unit) < 0
        ours = suspicion.stray(unit, np.zeros(200, np.int64))
        assert (ours != theirs).sum() <= 1, "rounding at the radius alone"


def test_silence_is_no_suspicion() -> None:
    label = np.array([0, 1, 2])
    belief, doubt = suspicion.combine(None, None, label)
    np.testing.assert_array_equal(belief, np.eye(3))
    np.testing.assert_array_equal(doubt, 0)
    probs = np.array([[np.nan] * 3, [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    belief, doubt = suspicion.combine(probs, None, label)
    assert doubt[0] == 0
    assert doubt[1] == pytest.approx(0.9)
    np.testing.assert_allclose(belief.sum(axis=1), 1)


def test_tiny_classes_and_constant_features_do_not_break() -> None:
    label = np.array([0] * 20 + [1, 2])
    features = np.zeros((22, 5))
    unit = suspicion.normalise(features)
    assert np.isfinite(unit).all()
    assert not suspicion.isolated(unit, label)[20:].any()
    assert not suspicion.stray(unit, label).any()


def test_point_errors_are_in_usual_distances() -> None:
    truth = np.random.default_rng(0).uniform(0, 100, (30, 2, 2))
    guess = truth + np.array([1.0, 0.0])
    guess[3, 1] += 49
    truth[5, 0] = np.nan
    errors = suspicion.point_errors(truth, guess)
    assert np.isnan(errors[5, 0])
    assert errors[3, 1] > 50
    assert np.nanmedian(errors) == pytest.approx(1)
