"""Trials and what they say: the plan they share, who won, and whether the winner is better than noise.

Knows nothing of the search engine; `tuning` drives it.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from scipy import stats

from octofold.recipe import Recipe
from octofold.tune.space import Space, Values

Slot = tuple[int, int]  # fold, seed
NOT_BASE = {"member", "runtime", "folds", "seeds"}
"""Recipe fields that do not make a study another one: names, how fast, and what the plan's slots say."""
COUNTING = {"accuracy", "balanced_accuracy", "macro_f1", "quadratic_kappa"}
"""Metrics that count rows, and so move in steps of about one row."""


@dataclass(frozen=True)
class Plan:
    """What a study is: all that makes its trials comparable.

    Attributes:
        space: the base recipe and the ranges over it.
        slots: (fold, seed) each trial is scored on, in this order.
        folds: how many folds the manifest has (slots may use fewer).
        objectives: names of what a slot returns; the first is the score.
        higher_is_better: one per objective.
        context: whatever else scores depend on (manifest hash, metric, views …); JSON.
    """

    space: Space
    slots: tuple[Slot, ...]
    folds: int = 5
    objectives: tuple[str, ...] = ("score",)
    higher_is_better: tuple[bool, ...] = (True,)
    context: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return plain JSON; equal for equal plans. How fast a recipe runs (`runtime`) is no part of it."""
        return {
            "space": self.space.describe(),
            "base": self.space.base.model_dump(mode="json", exclude=NOT_BASE),
            "slots": [list(slot) for slot in self.slots],
            "objectives": list(self.objectives),
            **self.context,
        }


@dataclass
class Attempt:
    """One trial as the objective sees it.

    Attributes:
        number: of the trial in the study.
        purpose: ``trial``, or ``confirm`` when a finished trial is scored again on fresh seeds.
        values: searched field -> value.
        recipe: the complete recipe to train.
        is_base: whether it is the base recipe.
        notes: text kept with the trial, which comes back if it is retried (run ids).
        scores: ``f0.s0`` -> what the objective returned there, filled as it goes.
        outcome: ``full | pruned | failed | interrupted``, set before its surroundings are left.
        error: why it failed.
        keep_note: writes one note where it survives this process.
    """

    number: int
    purpose: str
    values: Values
    recipe: Recipe
    is_base: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    outcome: str = ""
    error: str = ""
    keep_note: Callable[[str, str], None] = lambda key, value: None

    def note(self, key: str, value: str) -> None:
        """Keep a text with the trial, at once."""
        self.notes[key] = value
        self.keep_note(key, value)

    @property
    def means(self) -> list[float]:
        """Mean over the slots done, one per objective; empty before the first."""
        return [float(mean) for mean in np.mean(list(self.scores.values()), axis=0)] if self.scores else []


class Record(NamedTuple):
    """A finished trial."""

    number: int
    values: Values
    scores: dict[str, list[float]]
    outcome: str
    is_base: bool

    @property
    def means(self) -> list[float]:
        """Mean over its slots, one per objective."""
        return [float(mean) for mean in np.mean(list(self.scores.values()), axis=0)]


def winner(records: Sequence[Record], higher_is_better: bool = True) -> Record | None:
    """Return the full trial with the best mean score (the earliest of equals), or None if none ran all its slots."""
    full = [record for record in records if record.outcome == "full"]
    sign = 1 if higher_is_better else -1
    return max(full, key=lambda record: (sign * record.means[0], -record.number), default=None)


def pareto(records: Sequence[Record], higher_is_better: Sequence[bool]) -> list[Record]:
    """Return the full trials that no other full trial beats in every objective at once, best score first."""
    full = [record for record in records if record.outcome == "full"]
    signs = np.where(higher_is_better, 1.0, -1.0)
    points = np.array([record.means for record in full]).reshape(len(full), -1) * signs
    front = [
        record
        for record, point in zip(full, points, strict=True)
        if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
    ]
    seen: dict[tuple[float, ...], Record] = {}
    for record in front:
        seen.setdefault(tuple(record.means), record)
    return sorted(seen.values(), key=lambda record: -signs[0] * record.means[0])


class Verdict(NamedTuple):
    """Whether a recipe beats the base recipe, from slots that chose neither.

    Attributes:
        base, best: mean score on the fresh seeds.
        gain: improvement, positive is better whatever the metric's direction.
        low, high: 95 % interval of the gain; infinite where nothing tells its spread.
        noise: standard deviation between seeds of a mean over the folds.
        apparent: the winner's score in the search; chosen as a maximum, so it flatters.
        slots: how many pairs.
    """

    base: float
    best: float
    gain: float
    low: float
    high: float
    noise: float
    apparent: float
    slots: int

    @property
    def is_separable(self) -> bool:
        """Whether the interval lies above zero."""
        return self.low > 0

    @property
    def sentence(self) -> str:
        """The finding in words."""
        pairs = f"{self.best:.4f} against {self.base:.4f} of the base recipe on {self.slots} fresh slots"
        interval = f"95 % interval {self.low:+.4f} to {self.high:+.4f}"
        if not np.isfinite(self.low):
            interval = "no interval from " + ("gains that are all the same" if self.slots > 1 else "one gain")
        pairs = f"{pairs}; gain {self.gain:+.4f}"
        if self.is_separable:
            return f"better than the base recipe: {pairs}, {interval}"
        return f"not separable from the base recipe, which therefore stays: {pairs}, {interval}"


def grain_of(metric: str, fold: npt.NDArray[np.int64], tested: Sequence[int]) -> float:
    """Return the step of a slot's score where the metric counts rows (root mean square over folds), else 0.

    Args:
        metric: row of `metrics.METRICS`.
        fold: ``(N,)`` of the rows that are scored.
        tested: the folds of the slots.
    """
    if metric not in COUNTING:
        return 0.0
    rows = np.array([(fold == one).sum() for one in tested])
    return float(np.sqrt(np.mean(1.0 / rows.clip(1) ** 2)))


def compare(
    base: dict[str, list[float]],
    best: dict[str, list[float]],
    higher_is_better: bool,
    folds: int,
    apparent: float,
    grain: float = 0.0,
) -> Verdict:
    """Compare two recipes slot by slot.

    Fold models share most of their training rows, so their differences are not independent. The interval is
    Nadeau & Bengio's corrected resampled t ("Inference for the Generalization Error", 2003): the variance of J
    differences times ``1/J + 1/(folds - 1)``, with J - 1 degrees of freedom. Of scores that count rows, equal
    differences are no sign of a small variance: it is at least that of two roundings to the grain, and where there is
    no grain and all differences are equal, there is no interval.

    Args:
        base, best: ``f0.s1`` -> [score, …] of the same slots.
        higher_is_better: direction of the score.
        folds: of the manifest; one fold is tested for each ``folds - 1`` trained on.
        apparent: the winner's score in the search.
        grain: step of a score, see `grain_of`; 0 = it has none.
    """
    keys = sorted(base.keys() & best.keys())
    sign = 1 if higher_is_better else -1
    ours, theirs = (np.array([scores[key][0] for key in keys]) for scores in (best, base))
    difference = sign * (ours - theirs)
    count = len(keys)
    half = float("inf")
    if count > 1 and (grain or np.ptp(difference) > 1e-9 * np.abs([ours, theirs]).max()):  # more than float's own error
        variance = max(difference.var(ddof=1), grain**2 / 6) * (1 / count + 1 / max(1, folds - 1))
        half = float(stats.t.ppf(0.975, count - 1) * np.sqrt(variance))
    gain = float(difference.mean())
    return Verdict(
        float(theirs.mean()), float(ours.mean()), gain, gain - half, gain + half, _noise(base), apparent, count
    )


def _noise(scores: dict[str, list[float]]) -> float:
    """Standard deviation, from seed to seed, of a recipe's mean over its folds; NaN with one seed."""
    by_seed: dict[str, list[float]] = {}
    for key, values in scores.items():
        by_seed.setdefault(key.split(".")[1], []).append(values[0])
    return float(np.std([np.mean(values) for values in by_seed.values()], ddof=1)) if len(by_seed) > 1 else float("nan")


def recipe_text(recipe: Recipe, member: str, claims: Sequence[str]) -> str:
    """Return a YAML that `train` takes as it is: only what differs from the defaults, under its claim as a comment."""
    plain = recipe.model_copy(update={"member": member}).model_dump(mode="json", exclude_defaults=True)
    plain.pop("folds", None)
    head = "".join(f"# {line}\n" for line in claims)
    return head + yaml.safe_dump({"member": member, **plain}, sort_keys=False, allow_unicode=True)


def table(records: list[Record], plan: Plan) -> str:
    """Return the trials as CSV: number, outcome, objectives, every slot's score, every searched field."""
    fields = [knob.field for knob in plan.space.knobs]
    slots = [f"f{fold}.s{seed}" for fold, seed in plan.slots]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "outcome", *plan.objectives, *slots, *fields])
    for record in records:
        scores = [record.scores[slot][0] if slot in record.scores else "" for slot in slots]
        writer.writerow(
            [record.number, record.outcome, *record.means, *scores, *(record.values.get(name, "") for name in fields)]
        )
    return text.getvalue()
