"""Scores: arrays in, one float out. `METRICS` says of each which way is better."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def accuracy(probs: Array, target: Array) -> float:
    """Share of rows whose largest probability is the target. `probs` (N, K), `target` (N,) int."""
    return float((probs.argmax(axis=1) == target).mean())


def balanced_accuracy(probs: Array, target: Array) -> float:
    """Mean over the classes present of their recall. `probs` (N, K), `target` (N,) int."""
    table = confusion(probs.argmax(axis=1), target, probs.shape[1])
    present = table.sum(axis=1) > 0
    return float((np.diag(table)[present] / table.sum(axis=1)[present]).mean())


def macro_f1(probs: Array, target: Array) -> float:
    """Mean F1 over the classes that occur in target or prediction. `probs` (N, K), `target` (N,) int."""
    table = confusion(probs.argmax(axis=1), target, probs.shape[1])
    hits, seen = np.diag(table), table.sum(axis=0) + table.sum(axis=1)
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


def log_loss(probs: Array, target: Array) -> float:
    """Mean negative log-likelihood, nats; probabilities clipped at 1e-7. `probs` (N, K), `target` (N,) int."""
    return float(-np.log(np.clip(probs[np.arange(len(target)), target], 1e-7, 1)).mean())


def brier(probs: Array, target: Array) -> float:
    """Mean squared distance to the one-hot target, 0..2. `probs` (N, K), `target` (N,) int."""
    squares = (probs**2).sum(axis=1) - 2 * probs[np.arange(len(target)), target] + 1
    return float(squares.mean())


def auc(probs: Array, target: Array) -> float:
    """Area under the ROC curve, one-vs-rest mean over the classes present (Hand & Till's macro form).

    NaN if only one class is present. `probs` (N, K), `target` (N,) int.
    """
    from scipy.stats import rankdata

    scores = []
    for column in range(probs.shape[1]) if probs.shape[1] > 2 else [1]:
        positive = target == column
        n, m = int(positive.sum()), int((~positive).sum())
        if n and m:
            scores.append((rankdata(probs[:, column])[positive].sum() - n * (n + 1) / 2) / (n * m))
    return float(np.mean(scores)) if scores else float("nan")


def quadratic_kappa(probs: Array, target: Array) -> float:
    """Cohen's kappa with quadratic weights, classes taken as ordered. `probs` (N, K), `target` (N,) int."""
    classes = probs.shape[1]
    table = confusion(probs.argmax(axis=1), target, classes).astype(np.float64)
    distance = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    chance = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    expected = float((distance * chance).sum())
    return 1 - float((distance * table).sum()) / expected if expected else 1.0


def calibration_error(probs: Array, target: Array, bins: int = 15) -> float:
    """Expected calibration error of the top class over equal-width bins (Guo et al. 2017), 0..1."""
    confidence, hit = probs.max(axis=1), probs.argmax(axis=1) == target
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[place == b].mean() - hit[place == b].mean()) * (place == b).sum() for b in np.unique(place)]
    return float(np.sum(gaps) / len(target))


def point_mse(points: Array, target: Array) -> float:
    """Mean squared error per coordinate, px². `points`, `target` (N, P, 2); NaN targets are not counted."""
    return float(np.nanmean((points - target) ** 2))


def point_nme(points: Array, target: Array) -> float:
    """Mean distance over each sample's own spread of points (box diagonal). `points`, `target` (N, P, 2)."""
    low, high = np.nanmin(target, axis=1), np.nanmax(target, axis=1)
    size = np.linalg.norm(high - low, axis=1)
    distance = np.linalg.norm(points - target, axis=2)
    return float(np.nanmean(distance / np.maximum(size, 1e-6)[:, None]))


def confusion(predicted: Array, target: Array, classes: int) -> npt.NDArray[np.int64]:
    """Count rows: ``table[t, p]`` is how often target ``t`` was called ``p``. Both (N,) int; returns (K, K)."""
    return np.bincount(target * classes + predicted, minlength=classes**2).reshape(classes, classes)


class Metric(NamedTuple):
    """A score and its direction."""

    score: Callable[[Array, Array], float]
    higher_is_better: bool
    task: str  # classify | keypoints


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, True, "classify"),
    "balanced_accuracy": Metric(balanced_accuracy, True, "classify"),
    "macro_f1": Metric(macro_f1, True, "classify"),
    "log_loss": Metric(log_loss, False, "classify"),
    "brier": Metric(brier, False, "classify"),
    "auc": Metric(auc, True, "classify"),
    "quadratic_kappa": Metric(quadratic_kappa, True, "classify"),
    "ece": Metric(calibration_error, False, "classify"),
    "mse": Metric(point_mse, False, "keypoints"),
    "nme": Metric(point_nme, False, "keypoints"),
}
