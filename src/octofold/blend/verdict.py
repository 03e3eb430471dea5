"""The verdict on a blend: its scores with intervals, what it gains over simpler ones, and whether that is real."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.blend import blending, estimate
from octofold.blend.estimate import CrossFit, Gain, Interval
from octofold.data.manifest import Manifest
from octofold.infer.combining import Blend
from octofold.metrics import Metric

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Verdict:
    """A blend and what is known of it from OOF alone.

    Attributes:
        blend: fitted on all rows; what the test images get.
        cross: the same method, each fold blended without having been seen.
        apparent: score on the rows the weights were fitted to; never the headline.
        score: cross-fitted, with its 95 % interval over groups (and seeds, where there are several), cut to the
            metric's range.
        standard_error: of that score, from the interval before it was cut.
        members: each member's own OOF score.
        gains: over the best single member (chosen without the fold it is scored on) and over the plain mean.
        seed_spread: standard deviation over training seeds of the blended score; NaN with one seed.
    """

    blend: Blend
    cross: CrossFit
    apparent: float
    score: Interval
    standard_error: float
    members: dict[str, Interval]
    gains: list[Gain]
    seed_spread: float


def judge(
    method: str,
    members: Array,
    names: Sequence[str],
    target: Array,
    fold: Array,
    groups: Array,
    metric: Metric,
    per_seed: Sequence[Array] = (),
    seed: int = 0,
    instead: Mapping[int, Array] | None = None,
    experts: blending.Pairs = (),
) -> Verdict:
    """Fit a method, cross-fit it, and compare it with the simpler choices on the same resamples.

    Args:
        method: row of `blending.METHODS`.
        members: ``(M, N, K)`` or ``(M, N, P, 2)`` out-of-fold.
        names: M names.
        target: ``(N,)`` or ``(N, P, 2)``.
        fold: ``(N,)`` int.
        groups: ``(N,)``, what the bootstrap resamples.
        metric: the score.
        per_seed: arrays like `members`, one for each training seed.
        seed: of the bootstrap.
        instead: OOF in the views chosen without a fold, see `estimate.cross_fit`.
        experts: the pairs of the last members, see `blending.fit`.
    """
    blend = blending.fit(method, members, target, fold, None, metric, experts)
    cross = estimate.cross_fit(method, members, target, fold, metric, instead, experts)
    voters = members[: len(members) - len(experts)]
    heard = {held: own[: len(voters)] for held, own in (instead or {}).items()}
    rivals = {"the best single member": estimate.best_single(voters, target, fold, metric, heard)}
    if (method != "equal" and len(voters) > 1) or experts:
        rivals["equal"] = estimate.cross_fit("equal", voters, target, fold, metric, heard).values
    everyone = [cross.values, *rivals.values(), *members]
    draws = estimate.bootstrap(everyone, target, groups, metric, seed=seed)
    scores = [metric.score(values, target) for values in everyone]
    spread = _seed_spread(blend, per_seed, target, metric)
    score = estimate.interval(scores[0], draws[0], _widened(spread, per_seed))
    first = 1 + len(rivals)
    return Verdict(
        blend=blend,
        cross=cross,
        apparent=metric.score(blend.apply(members), target),
        score=score.within(metric),
        standard_error=score.standard_error,
        members={
            name: estimate.interval(scores[first + i], draws[first + i]).within(metric) for i, name in enumerate(names)
        },
        gains=[
            estimate.gain(name, draws[0], draws[1 + i], (scores[0], scores[1 + i]), metric)
            for i, name in enumerate(rivals)
        ],
        seed_spread=spread,
    )


def standard_error(judged: Verdict, rows: Manifest, per_seed: Sequence[Array], metric: Metric) -> float:
    """Standard error of the blend's cross-fitted score by another metric, over groups and seeds as in `judge`."""
    draws = estimate.bootstrap([judged.cross.values], rows.target, rows.groups, metric)[0]
    spread = _seed_spread(judged.blend, per_seed, rows.target, metric)
    return estimate.interval(0.0, draws, _widened(spread, per_seed)).standard_error


def _widened(spread: float, per_seed: Sequence[Array]) -> float:
    """Standard deviation of a mean over the training seeds at hand; 0 where there is one."""
    return 0.0 if np.isnan(spread) else spread / float(np.sqrt(len(per_seed)))


def _seed_spread(blend: Blend, per_seed: Sequence[Array], target: Array, metric: Metric) -> float:
    if len(per_seed) < 2:
        return float("nan")
    return float(np.std([metric.score(blend.apply(members), target) for members in per_seed], ddof=1))


def told(verdict: Verdict, metric_name: str) -> list[str]:
    """What is known of the blend from out-of-fold predictions, in words."""
    lines = [f"{metric_name} of {verdict.blend.method}: cross-fitted {verdict.score}, apparent {verdict.apparent:.4f}."]
    lines += [f"{gain}." for gain in verdict.gains]
    if np.isnan(verdict.seed_spread):
        lines.append("One training seed: the intervals leave out what another seed would have given.")
    else:
        lines.append(f"Over training seeds the blend's score varies by {verdict.seed_spread:.4f} (standard deviation).")
    return lines
