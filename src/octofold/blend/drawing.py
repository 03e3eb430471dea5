"""Drawing: labels that images without labels may have, and what another score than accuracy makes of them."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtr

from octofold.blend.estimate import Interval
from octofold.blend.shift import Outlook, level, tempered
from octofold.metrics import Metric

Array = npt.NDArray[Any]
POWERS = -3.0, 9.0
"""Logarithms of the powers that may be needed: votes are too sure, ranks of hundreds of classes nearly level."""
MOST = 20_000
"""Out-of-fold rows on which the drawing itself is tried."""


def calibrated(probs: Array, accuracy: float) -> Array:
    """Temper probabilities ``(T, K)`` until their mean maximum is the accuracy expected of them, if they can be."""

    def gap(log_power: float) -> float:
        return float(tempered(probs, np.exp(log_power)).max(axis=1).mean()) - accuracy

    flat, sharp = POWERS
    if gap(flat) >= 0:
        return tempered(probs, np.exp(flat))
    if gap(sharp) <= 0:
        return tempered(probs, np.exp(sharp))
    return tempered(probs, np.exp(brentq(gap, flat, sharp, xtol=1e-4)))


def derived(
    probs: Array,
    outlook: Outlook,
    metric: Metric,
    oof: Array,
    target: Array,
    groups: Array | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Interval:
    """Derive another score on the test images from the estimate of accuracy.

    Accuracies are drawn from the estimate's interval; for each, the probabilities are tempered until their mean
    maximum is that accuracy, labels are drawn from them, and the submission is scored on these. A blend's errors need
    not fall where its probabilities say (votes and ranks are no probabilities): what the same drawing gets wrong on
    out-of-fold rows, whose score is known, is taken out.

    Args:
        probs: ``(T, K)`` the submission's probabilities.
        outlook: from `shift.foresee`.
        metric: any score of classes.
        oof: ``(N, K)`` cross-fitted out-of-fold probabilities of the same blend.
        target: ``(N,)`` their classes.
        groups: ``(N,)`` what belongs together among them; None = every row by itself.
        draws: worlds.
        seed: of the draws.

    Returns:
        NaN where no draw has such a score.
    """
    value, low, high = (level(share) for share in outlook.accuracy)
    rng = np.random.default_rng(seed)
    away = rng.standard_normal(draws) / 1.96
    scores = _drawn(probs, ndtr(value + away * np.where(away < 0, value - low, high - value)), metric, rng)
    some = np.linspace(0, len(target) - 1, min(MOST, len(target))).astype(int)
    _, together = np.unique(np.arange(len(target)) if groups is None else groups, return_inverse=True)
    lack, error = _lack(oof[some], target[some], together[some], metric, rng)
    scores = scores + lack + error * rng.standard_normal(len(scores))
    middle, low, high = np.quantile(scores, [0.5, 0.025, 0.975]) if len(scores) else (np.nan, np.nan, np.nan)
    return Interval(float(middle), float(low), float(high)).within(metric)


def _drawn(probs: Array, shares: Array, metric: Metric, rng: np.random.Generator) -> Array:
    """Scores of probabilities on labels drawn from them, once for each share of hits expected, if there is a score."""
    knots = np.unique(np.quantile(shares, np.linspace(0, 1, 17)))
    steps = [calibrated(probs, float(knot)).cumsum(axis=1) for knot in knots]
    scores = []
    for share in shares:
        step = steps[int(np.abs(knots - share).argmin())]
        labels = (rng.random((len(probs), 1)) * step[:, -1:] > step).sum(axis=1)
        scores.append(metric.score(probs, labels))
    return np.array(scores)[np.isfinite(scores)]  # labels of one class alone have no AUC


def _lack(oof: Array, target: Array, groups: Array, metric: Metric, rng: np.random.Generator) -> tuple[float, float]:
    """What drawing misses of the score of rows with labels, and the error of that, accuracy being given.

    What is within two standard errors is shrunk to nothing.
    """
    accuracy = float((oof.argmax(axis=1) == target).mean())
    scores = _drawn(oof, np.full(50, accuracy), metric, rng)
    lack = metric.score(oof, target) - float(scores.mean()) if len(scores) else np.nan
    rows_of = np.split(np.argsort(groups, kind="stable"), np.unique(np.sort(groups), return_index=True)[1][1:])
    seen = []
    for _ in range(100):
        rows = np.concatenate([rows_of[group] for group in rng.integers(len(rows_of), size=len(rows_of))])
        seen.append((metric.score(oof[rows], target[rows]), float((oof[rows].argmax(axis=1) == target[rows]).mean())))
    found = np.array([pair for pair in seen if np.isfinite(pair[0])]).reshape(-1, 2)
    if not np.isfinite(lack) or len(found) < 2:
        return 0.0, 0.0
    slope = np.cov(found.T)[0, 1] / max(float(found[:, 1].var(ddof=1)), 1e-12)
    error = float(np.std(found[:, 0] - slope * found[:, 1]))
    return lack * max(0.0, 1 - 4 * error**2 / max(lack**2, 1e-18)), error
