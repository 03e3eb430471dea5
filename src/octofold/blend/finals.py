"""Finals: which two submissions to choose once the public board has spoken, by out-of-fold and public scores together.

Out-of-fold rows are many, but they are not the test images; the public part is the real thing, but small. Both are
measurements of the same thing, and each is believed by its precision.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from octofold.blend import estimate
from octofold.metrics import Metric

Array = npt.NDArray[Any]

DRIFTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""How far candidates may move against each other from OOF to test, as multiples of the public board's own noise."""
FEWEST = 30
"""Resamples that a covariance needs; fewer are left where most lack a class that the metric asks for."""
RIDGE = 0.05
"""Of that noise, independent for each candidate: near-twins differ on test by rows that OOF did not have."""


class Belief(NamedTuple):
    """What is thought of the private scores of C submissions; more is better, whatever the metric.

    Attributes:
        mean: ``(C,)`` expected.
        cov: ``(C, C)`` of their private scores, the finite private part included.
        drift: how far, on average over `DRIFTS`, candidates moved against each other from OOF to test.
    """

    mean: Array
    cov: Array
    drift: float


def believe(
    candidates: Sequence[Array],
    target: Array,
    groups: Array,
    metric: Metric,
    public: Array,
    tests: int,
    public_share: float,
    seed: int = 0,
) -> Belief | None:
    """Weigh out-of-fold scores and public scores by their precision.

    The prior is the out-of-fold score of each candidate with its covariance over groups, a shift that all share, and a
    drift of its own, of unknown size; the public board measures all of them on the same few rows. How large the drift
    is, the public scores themselves say: each size counts by the likelihood of what was seen.

    Args:
        candidates: C arrays ``(N, …)`` of out-of-fold predictions.
        target, groups: of these rows.
        metric: of the board.
        public: ``(C,)`` scores that came back, NaN where a candidate was not submitted.
        tests: test images.
        public_share: of them, 0..1.
        seed: of the resampling.

    Returns:
        None where nothing can be believed: these rows are too few, or of too few classes, for the metric.
    """
    score = metric.sign * np.array([metric.score(values, target) for values in candidates])
    over_groups = _finite(estimate.bootstrap(candidates, target, groups, metric, seed=seed))
    over_rows = _finite(estimate.bootstrap(candidates, target, np.arange(len(target)), metric, seed=seed))
    if min(over_groups.shape[1], over_rows.shape[1]) < FEWEST:
        return None
    apart, row = np.atleast_2d(np.cov(over_groups)), np.atleast_2d(np.cov(over_rows)) * len(target)
    noise = row / max(1.0, public_share * tests)
    known = np.isfinite(public)
    mean, cov, drift = _posterior(score, apart, noise, metric.sign * public[known], known)
    cov = cov + row / max(1.0, (1 - public_share) * tests)
    return Belief(mean, cov, drift) if np.isfinite(mean).all() and np.isfinite(cov).all() else None


def _finite(draws: Array) -> Array:
    """The draws in which every candidate has a score: a resample without some class may have none."""
    found: Array = draws[:, np.isfinite(draws).all(axis=0)]
    return found


def _posterior(prior: Array, apart: Array, noise: Array, seen: Array, known: Array) -> tuple[Array, Array, float]:
    """Condition on what was seen, for every size of drift, and average by likelihood."""
    size = max(float(np.trace(noise)) / len(prior), 1e-12)  # candidates without a fault have no noise at all
    shared = np.full_like(noise, 1e3 * size)
    off = seen - prior[known]
    likely, means, covs = [], [], []
    for drift in DRIFTS:
        before = apart + drift * noise + shared
        across = before[:, known]
        told = before[np.ix_(known, known)] + noise[np.ix_(known, known)] + RIDGE * size * np.eye(len(off))
        likely.append(-0.5 * float(np.linalg.slogdet(told)[1] + off @ np.linalg.solve(told, off)))
        means.append(prior + across @ np.linalg.solve(told, off))
        covs.append(before - across @ np.linalg.solve(told, across.T))
    share = np.exp(np.array(likely) - max(likely))
    share /= share.sum()
    mean = share @ np.array(means)
    away = np.array(means) - mean
    return mean, np.tensordot(share, covs, 1) + away.T @ (share[:, None] * away), float(share @ np.array(DRIFTS))


def best_two(belief: Belief) -> tuple[int, int]:
    """The pair with the best expected maximum (Clark 1961), the better mean first; equal if there is only one.

    Where one is far ahead no other adds anything, not even the worst: then the next best mean goes with it.
    """
    mean, own = belief.mean, np.diag(belief.cov)
    apart = np.sqrt((own[:, None] + own[None] - 2 * belief.cov).clip(1e-18))
    ahead = (mean[:, None] - mean[None]) / apart
    either = mean[:, None] * norm.cdf(ahead) + mean[None] * norm.cdf(-ahead) + apart * norm.pdf(ahead)
    np.fill_diagonal(either, -np.inf if len(mean) > 1 else 0.0)
    level = either >= either.max() - 1e-6 * apart.max()
    one, other = divmod(int(np.where(level, mean[:, None] + mean[None], -np.inf).argmax()), len(mean))
    return (one, other) if mean[one] >= mean[other] else (other, one)
