"""The verdict on a blend: its scores with intervals, what it gains over simpler ones, and whether that is real."""

from collections.abc import Sequence
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
        score: cross-fitted, with its 95 % interval over groups (and seeds, where there are several).
        members: each member's own OOF score.
        gains: over the best single member (chosen without the fold it is scored on) and over the plain mean.
        seed_spread: standard deviation over training seeds of the blended score; NaN with one seed.
    """

    blend: Blend
    cross: CrossFit
    apparent: float
    score: Interval
    members: dict[str, Interval]
    gains: list[Gain]
    seed_spread: float

    @property
    def standard_error(self) -> float:
        """Of the cross-fitted score."""
        return (self.score.high - self.score.low) / 3.92


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
    """
    blend = blending.fit(method, members, target, fold, None, metric)
    cross = estimate.cross_fit(method, members, target, fold, metric)
    rivals = {"the best single member": estimate.best_single(members, target, fold, metric)}
    if method != "equal" and len(members) > 1:
        rivals["equal"] = members.mean(axis=0)
    everyone = [cross.values, *rivals.values(), *members]
    draws = estimate.bootstrap(everyone, target, groups, metric, seed=seed)
    scores = [metric.score(values, target) for values in everyone]
    spread = _seed_spread(blend, per_seed, target, metric)
    widened = 0.0 if np.isnan(spread) else spread / np.sqrt(len(per_seed))
    first = 1 + len(rivals)
    return Verdict(
        blend=blend,
        cross=cross,
        apparent=metric.score(blend.apply(members), target),
        score=estimate.interval(scores[0], draws[0], widened),
        members={name: estimate.interval(scores[first + i], draws[first + i]) for i, name in enumerate(names)},
        gains=[
            estimate.gain(name, draws[0], draws[1 + i], (scores[0], scores[1 + i]), metric)
            for i, name in enumerate(rivals)
        ],
        seed_spread=spread,
    )


def standard_error(values: Array, rows: Manifest, metric: Metric) -> float:
    """Standard error over groups of a score of out-of-fold values ``(N, …)``."""
    return float(estimate.bootstrap([values], rows.target, rows.groups, metric)[0].std())


def _seed_spread(blend: Blend, per_seed: Sequence[Array], target: Array, metric: Metric) -> float:
    if len(per_seed) < 2:
        return float("nan")
    return float(np.std([metric.score(blend.apply(members), target) for members in per_seed], ddof=1))


def headline(verdict: Verdict, metric_name: str, outlook: Any) -> list[str]:
    """The report's first lines: what to expect of the test images, and by how much the folds flatter.

    Args:
        verdict: from `judge`.
        metric_name: of the verdict's score.
        outlook: `shift.Outlook` for the test images, or None.
    """
    lines = []
    if outlook is not None:
        expected = outlook.accuracy
        if outlook.flatter > 0.01 and expected.high < outlook.oof:
            lines.append(
                f"The folds flatter: cross-validation says {outlook.oof:.3f}, but expect {expected.value:.3f} on these "
                f"test images (95 % interval {expected.low:.3f} to {expected.high:.3f}), {outlook.flatter:.3f} less."
            )
        else:
            lines.append(
                f"Expect accuracy {expected.value:.3f} on these test images (95 % interval {expected.low:.3f} to "
                f"{expected.high:.3f}); cross-validation says {outlook.oof:.3f}."
            )
        lines.append("The interval covers " + ", ".join(outlook.about) + ".")
        if outlook.distance is not None:
            d = outlook.distance
            lines.append(
                f"Test against train: a classifier tells them apart with AUC {d.auc:.2f} (0.5 = not at all); a test "
                f"image's nearest training image has similarity {d.nn_test:.3f}, a held-out image's {d.nn_held:.3f}."
            )
    lines.append(
        f"{metric_name} of {verdict.blend.method}: cross-fitted {verdict.score}, apparent {verdict.apparent:.4f}."
    )
    lines += [f"{gain}." for gain in verdict.gains]
    if np.isnan(verdict.seed_spread):
        lines.append("One training seed: the intervals leave out what another seed would have given.")
    else:
        lines.append(f"Over training seeds the blend's score varies by {verdict.seed_spread:.4f} (standard deviation).")
    return lines
