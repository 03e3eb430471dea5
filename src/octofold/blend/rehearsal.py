"""Rehearsal: a shift played with training data alone, to learn how much faster accuracy falls than confidence."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.blend.shift import SURENESS, level, temperature, tempered

Array = npt.NDArray[Any]


def rehearse(features: Array, target: Array, reps: int = 8, seed: int = 0) -> float:
    """Return how much faster accuracy falls than confidence on this data.

    Each class is cut into sub-clusters; in turn one of each is held out whole, a logistic regression learns the rest,
    and what confidence and accuracy lose from ordinary held-out rows to those never seen are set side by side.

    Args:
        features: ``(N, F)`` of an embedding that did not learn these labels: ImageNet's, or pixels.
        target: ``(N,)``.
        reps: rehearsals.
        seed: of the cuts.

    Returns:
        The slope on the probit scale, between 1 and 3.5; `shift.SURENESS` where classes are too small to be cut.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    width = min(40, features.shape[1], len(features) // 4)
    rows = StandardScaler().fit_transform(PCA(width, random_state=seed).fit_transform(features))
    cut = np.zeros(len(target), int)
    for label in np.unique(target):
        own = np.flatnonzero(target == label)
        parts = min(3, max(1, len(own) // 8))
        cut[own] = 100 * label + KMeans(parts, n_init=1, random_state=seed).fit_predict(rows[own])
    pairs = [_rehearsal(rows, target, cut, rng) for _ in range(reps)]
    falls = np.array([pair for pair in pairs if pair is not None and pair[0] < -0.02])
    if len(falls) < 3:
        return SURENESS
    steep = float((falls[:, 0] * falls[:, 1]).sum() / (falls[:, 0] ** 2).sum())
    return float(np.clip(steep, 1.0, 3.5))


def _rehearsal(rows: Array, target: Array, cut: Array, rng: np.random.Generator) -> tuple[float, float] | None:
    """What confidence and accuracy lose, on the probit scale, on one held-out sub-cluster of each class."""
    from sklearn.linear_model import LogisticRegression

    away = np.zeros(len(target), bool)
    for label in np.unique(target):
        parts = np.unique(cut[target == label])
        away |= (cut == rng.choice(parts)) if len(parts) > 1 else False
    near = ~away & (rng.random(len(target)) < 0.3)
    learn = ~away & ~near
    if min(away.sum(), near.sum()) < 20 or len(np.unique(target[learn])) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged to the last digit is near enough
        model = LogisticRegression(C=0.1, max_iter=60, tol=1e-3).fit(rows[learn], target[learn])
    levels: list[tuple[float, float]] = []
    power = 1.0
    for part in (near, away):
        probs = np.zeros((part.sum(), int(target.max()) + 1))
        probs[:, model.classes_] = model.predict_proba(rows[part])
        power = temperature(probs, target[part]) if not levels else power
        hit, sure = (probs.argmax(axis=1) == target[part]).mean(), tempered(probs, power).max(axis=1).mean()
        levels.append((level(sure), level(hit)))
    return levels[1][0] - levels[0][0], levels[1][1] - levels[0][1]
