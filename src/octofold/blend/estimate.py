"""What to expect: every choice made without the fold it is scored on, and intervals from whole groups.

The apparent score of a blend is measured on the rows its weights were fitted to. The cross-fitted one is not: fold k
is predicted by a blend fitted on the other folds. What stays in-sample is each member's own choice of epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octofold.blend import blending
from octofold.errors import UserError
from octofold.infer.combining import Blend
from octofold.metrics import METRICS, Metric

Array = npt.NDArray[Any]


class Interval(NamedTuple):
    """A number and where it may lie (95 %)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"

    @property
    def standard_error(self) -> float:
        """Of the value, if the interval was not cut."""
        return (self.high - self.low) / 3.92

    def within(self, metric: Metric) -> "Interval":
        """Cut off the scores that the metric cannot give."""
        low, high = np.maximum(self.low, metric.least), np.minimum(self.high, metric.most)  # NaN stays NaN
        return Interval(self.value, float(np.minimum(low, self.value)), float(np.maximum(high, self.value)))


@dataclass(frozen=True)
class CrossFit:
    """A method scored without seeing.

    Attributes:
        values: ``(N, K)`` or ``(N, P, 2)`` float32; fold k's rows come from the blend fitted without fold k.
        blends: the blend fitted without each fold, in the order of the folds.
    """

    values: Array
    blends: list[Blend]


def cross_fit(
    method: str,
    members: Array,
    target: Array,
    fold: Array,
    metric: Metric,
    instead: Mapping[int, Array] | None = None,
    experts: blending.Pairs = (),
) -> CrossFit:
    """Fit a method on all folds but one, blend that one, and so round.

    Args:
        method: row of `blending.METHODS`.
        members: ``(M, N, K)`` or ``(M, N, P, 2)`` out-of-fold predictions.
        target: ``(N,)`` or ``(N, P, 2)``.
        fold: ``(N,)`` int.
        metric: what searching methods look at.
        instead: for some folds, other arrays like `members`, to fit and to blend when that fold is held out: where
            the predictions themselves were chosen (which views), the choice made without the fold.
        experts: see `blending.fit`.

    Raises:
        UserError: fewer than two folds: nothing is left to fit on.
    """
    folds = folds_of(fold)
    values, blends = np.empty(members.shape[1:], np.float32), []
    for held in folds:
        rows, own = fold == held, (instead or {}).get(held, members)
        blend = blending.fit(method, own, target, fold, ~rows, metric, experts)
        values[rows] = blend.apply(own[:, rows])
        blends.append(blend)
    return CrossFit(values, blends)


def best_single(
    members: Array, target: Array, fold: Array, metric: Metric, instead: Mapping[int, Array] | None = None
) -> Array:
    """For each fold, the member that is best on the other folds: ``(N, …)`` values, chosen without seeing."""
    return cross_fit("best_single", members, target, fold, metric, instead).values


def folds_of(fold: Array) -> list[int]:
    """The folds that occur, at least two.

    Raises:
        UserError: only one.
    """
    folds = sorted(set(fold.tolist()))
    if len(folds) < 2:
        raise UserError(
            "folds", expected="OOF of at least two folds: one to fit on, one to score", got=f"only fold {folds}"
        )
    return folds


def bootstrap(
    candidates: Sequence[Array],
    target: Array,
    groups: Array,
    metric: Metric,
    reps: int = 1000,
    seed: int = 0,
    weights: Array | None = None,
) -> Array:
    """Score every candidate on the same resamples of whole groups: rows of one group come or go together.

    Args:
        candidates: C arrays of ``(N, …)`` predictions of the same rows.
        target: ``(N,)`` or ``(N, P, 2)``.
        groups: ``(N,)`` any labels.
        metric: the score.
        reps: resamples; fewer are drawn where rows are very many.
        seed: of the draw.
        weights: ``(N,)`` non-negative importance of rows, or None. Only for scores that are means over rows.

    Returns:
        ``(C, R)`` float64 scores; differences along the first axis are paired. NaN where all rows are of one group:
        its resamples are all the same, which says nothing of how sure a score is.
    """
    rng = np.random.default_rng(seed)
    _, place = np.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    if count == 1:
        return np.full((len(candidates), reps), np.nan)
    pairs = [row_losses(values, target, metric) for values in candidates]
    if all(pair is not None for pair in pairs):
        reps = int(np.clip(4e8 / count, 100, reps))
        own = np.ones(len(place)) if weights is None else weights
        above = np.stack([np.bincount(place, own * pair[0], count) for pair in pairs if pair is not None])
        below = np.stack([np.bincount(place, own * pair[1], count) for pair in pairs if pair is not None])
        scores = []
        for _ in range(0, reps, 50):
            draws = rng.multinomial(count, np.full(count, 1 / count), size=50).T.astype(np.float64)
            scores.append((above @ draws) / (below @ draws).clip(1e-12))
        return np.concatenate(scores, axis=1)[:, :reps]
    reps = int(np.clip(2e8 / candidates[0].size, 50, reps))
    members_of = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1])
    table = []
    for _ in range(reps):
        rows = np.concatenate([members_of[g] for g in rng.integers(count, size=count)])
        table.append([metric.score(values[rows], target[rows]) for values in candidates])
    return np.array(table).T


def row_losses(values: Array, target: Array, metric: Metric) -> tuple[Array, Array] | None:
    """Numerator and denominator per row of a score that is a mean over rows, else None."""
    n = len(target)
    if metric is METRICS["accuracy"]:
        return (values.argmax(axis=1) == target).astype(float), np.ones(n)
    if metric is METRICS["log_loss"]:
        return -np.log(values[np.arange(n), target].clip(1e-7, 1)), np.ones(n)
    if metric is METRICS["brier"]:
        return (values**2).sum(axis=1) - 2 * values[np.arange(n), target] + 1, np.ones(n)
    if metric is METRICS["mse"]:
        known = np.isfinite(target)
        return np.where(known, (values - target) ** 2, 0).sum(axis=(1, 2)), known.sum(axis=(1, 2)).astype(float)
    return None


def interval(value: float, draws: Array, spread: float = 0.0) -> Interval:
    """95 % of the draws, re-centred on the value, widened by an independent standard deviation `spread`."""
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws - draws.mean(), [0.025, 0.975]) if len(draws) else (np.nan, np.nan)
    extra = 1.96 * spread
    return Interval(value, value - float(np.hypot(low, extra)), value + float(np.hypot(high, extra)))


class Gain(NamedTuple):
    """A paired comparison: how much better (positive = better, whatever the metric's direction)."""

    over: str
    value: float
    low: float
    high: float
    probability: float

    @property
    def separable(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        verdict = "" if self.separable else "; not separable"
        return (
            f"gain over {self.over} {self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}], "
            f"P(gain > 0) {self.probability:.2f}{verdict}"
        )


def gain(over: str, mine: Array, theirs: Array, score: tuple[float, float], metric: Metric) -> Gain:
    """Compare paired bootstrap draws ``(R,)`` of two candidates whose scores are `score`."""
    draws = metric.sign * (mine - theirs)
    draws = draws[np.isfinite(draws)]  # a resample without some class has no such score
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (np.nan, np.nan)
    return Gain(over, metric.sign * (score[0] - score[1]), float(low), float(high), chance(draws))


def chance(draws: Array) -> float:
    """Share of draws above 0, NaN of none. Ties count half: two equal candidates have an even chance, not none."""
    return float((draws > 0).mean() + 0.5 * (draws == 0).mean()) if len(draws) else float("nan")
