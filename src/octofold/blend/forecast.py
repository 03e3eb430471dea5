"""Forecast: what to expect of a blend on the test images themselves, and what their two boards may make of it."""

import math
from dataclasses import dataclass

import numpy as np

from octofold.blend import drawing, lineup, rehearsal, shakeup, shift, verdict
from octofold.blend.estimate import Interval
from octofold.blend.lineup import Lineup, Spoken
from octofold.blend.nearness import Near
from octofold.blend.shift import Outlook
from octofold.blend.verdict import Verdict
from octofold.commands import Blend
from octofold.data.images import PixelSpec, load, square
from octofold.data.manifest import Manifest
from octofold.files import ROOT
from octofold.metrics import METRICS, Metric
from octofold.nets import embedding

WARN = 0.9
"""How sure one must be that the folds flatter to say so first. In the simulation (docs/estimate.md) the warning came in
1 % of exchangeable competitions, 6 % of grouped ones, and in two of three where folds flattered by more than 0.02."""


@dataclass(frozen=True)
class Forecast:
    """What is expected on the test images, in the metric the blend is judged by.

    Attributes:
        name: of the metric.
        score: with its 95 % interval.
        outlook: the estimate of accuracy it is, or was derived from.
    """

    name: str
    score: Interval
    outlook: Outlook

    @property
    def is_known(self) -> bool:
        """Whether the metric has a score on these images: no draw of labels for one image alone has an AUC."""
        return math.isfinite(self.score.value)

    def told(self, judged: Verdict) -> list[str]:
        """The report's first lines: what to expect, by how much the folds flatter, and what the interval covers."""
        metric, score = METRICS[self.name], self.score
        flatter = metric.sign * (judged.score.value - score.value)
        surely = self.outlook.surely
        change = "less" if metric.higher_is_better else "more"
        if not self.is_known:
            lines = [
                f"No estimate of {self.name} for these test images: no draw of their labels has one. Cross-validation "
                f"says {judged.score.value:.3f}."
            ]
        elif flatter > 0.01 and surely > WARN:
            lines = [
                f"The folds flatter (probability {surely:.2f}): cross-validation says {judged.score.value:.3f}, but "
                f"expect {score.value:.3f} on these test images (95 % interval {score.low:.3f} to {score.high:.3f}), "
                f"{flatter:.3f} {change}."
            ]
        else:
            lines = [
                f"Expect {self.name} {score.value:.3f} on these test images (95 % interval {score.low:.3f} to "
                f"{score.high:.3f}); cross-validation says {judged.score.value:.3f}."
            ]
        if self.name != "accuracy":
            accuracy = self.outlook.accuracy
            follows = (
                f"; {self.name} follows from it by drawing labels that fit. Trust it less." if self.is_known else "."
            )
            lines.append(
                f"Shift is estimated for accuracy alone, {accuracy.value:.3f} ({accuracy.low:.3f} to "
                f"{accuracy.high:.3f}){follows}"
            )
        return [*lines, "The interval covers " + ", ".join(self.outlook.about) + "."]


def forecast(judged: Verdict, members: Lineup, said: Spoken, near: Near | None, name: str, seed: int = 0) -> Forecast:
    """Estimate the accuracy on the test images themselves, and from it whatever metric is asked for."""
    parts = lineup.by_fold(members, said.votes)
    folds = [judged.blend.apply(part) for part in parts]
    error = judged.standard_error
    if name != "accuracy":
        error = verdict.standard_error(judged, members.rows, members.per_seed, METRICS["accuracy"])
    slope = rehearsed(members.rows) if near is not None else shift.SURENESS
    voters = slice(0, members.voters)
    outlook = shift.foresee(
        judged.cross.values, members.rows.target, folds, error, near.distance if near is not None else None,
        (members.oof[voters], [part[voters] for part in parts]), slope,
    )  # fmt: skip
    if name == "accuracy":
        return Forecast(name, outlook.accuracy, outlook)
    known = judged.cross.values, members.rows.target, members.rows.groups
    return Forecast(name, drawing.derived(said.final, outlook, METRICS[name], *known, seed=seed), outlook)


def rehearsed(rows: Manifest, most: int = 3000) -> float:
    """Return how fast accuracy falls with confidence on these photos, by `rehearsal.rehearse`.

    The embedding knows nothing of the labels: ImageNet's where `prepare` could use it (then it is cached), else pixels.
    """
    some = rows.take(np.linspace(0, len(rows.table) - 1, min(most, len(rows.table))).astype(int))
    sized = {"width", "height"} <= set(some.table)
    sides = some.table[["width", "height"]].min(axis=1).to_numpy() if sized else np.zeros(0)
    name = embedding.choose(sides)
    tiny = np.zeros((len(some.table), 0), np.uint8)
    if name == "pixels":
        spec, files = PixelSpec(16, "squash"), zip(some.paths, some.sample_ids.tolist(), strict=True)
        tiny = np.stack([square(load(path, spec, sample)[0], 16).reshape(-1) for path, sample in files])
    folder = ROOT / "data" / rows.competition / "cache"
    features, _ = embedding.embed_or_pixels(name, some.sample_ids.tolist(), some.paths, tiny, folder)
    return rehearsal.rehearse(features, some.target)


def shaken(
    config: Blend, members: Lineup, judged: Verdict, said: Spoken, expected: Forecast, metric: Metric
) -> list[str]:
    """Play the public and the private board for the submissions that could be made from these members.

    How far the two boards part is a matter of how many test images there are, and how hard. Which submission is better,
    only rows whose labels are known can say: the blend's own opinion of the test images is always for the blend.
    """
    method, share = judged.blend.method, config.public_share
    chance = drawing.calibrated(said.final, expected.outlook.accuracy.value)
    alone = shakeup.draw([said.final], [method], chance, metric, share, reps=400, seed=config.seed)
    voters = members.names[: members.voters]
    best = int(np.argmax([metric.sign * judged.members[name].value for name in voters]))
    candidates = [(method, judged.cross.values)]
    if len(voters) > 1:
        candidates += [("equal", members.oof[: len(voters)].mean(axis=0))] if method != "equal" else []
        candidates += [(f"member {voters[best]}", members.oof[best])]
    names, values = zip(*candidates, strict=True)
    truth = np.eye(len(members.rows.classes), dtype=np.float32)[members.rows.target]
    rivals = shakeup.draw(
        values, names, truth, metric, share, members.rows.groups, True, tests=len(said.final), reps=400,
        seed=config.seed,
    )  # fmt: skip
    return shakeup.told(alone, rivals, share)
