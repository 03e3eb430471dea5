"""Shake-up: what the public board will say, what the private one will, and which two submissions to choose.

Worlds are drawn, not assumed: in each, labels of the whole test set and its split into a public and a private part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.metrics import Metric

Array = npt.NDArray[Any]
MOST = 50_000
"""Rows with labels that worlds are drawn from; more would say no more, and take minutes."""
FEWEST = 30
"""Worlds with a score on both boards that quantiles need."""


@dataclass(frozen=True)
class Worlds:
    """Scores of C candidates in R drawn worlds.

    Attributes:
        names: C candidates.
        public, private: ``(C, R)`` scores, as the metric gives them.
        sign: 1 if more is better, else -1.
    """

    names: list[str]
    public: Array
    private: Array
    sign: int

    @property
    def gap(self) -> tuple[float, float, float]:
        """Public minus private of the first candidate: 2.5 %, median, 97.5 %."""
        low, middle, high = np.quantile(self.public[0] - self.private[0], [0.025, 0.5, 0.975])
        return float(low), float(middle), float(high)

    def flips(self, one: int, other: int) -> float:
        """Probability that the boards order two candidates differently (a tie on either counts half)."""
        public, private = (np.sign(part[one] - part[other]) for part in (self.public, self.private))
        return float(((public * private < 0) + 0.5 * (public * private == 0) * (public != private)).mean())

    @property
    def regret(self) -> float:
        """What picking the public best costs on average against the private best, in the metric's units, >= 0."""
        private = self.sign * self.private
        picked = (self.sign * self.public).argmax(axis=0)
        return float((private.max(axis=0) - private[picked, np.arange(private.shape[1])]).mean())


def draw(
    candidates: Sequence[Array],
    names: Sequence[str],
    chance: Array,
    metric: Metric,
    public_share: float,
    groups: Array | None = None,
    resample: bool = False,
    drift: float = 0.0,
    tests: int | None = None,
    reps: int = 1000,
    seed: int = 0,
) -> Worlds | None:
    """Draw worlds for submissions of the same images.

    Args:
        candidates: C arrays ``(T, K)`` of probabilities, the first being the one of interest.
        names: C names.
        chance: ``(T, K)`` what the labels may be: one-hot rows where they are known (OOF rows as a stand-in for the
            test set), or calibrated probabilities (`drawing.calibrated`). The latter are somebody's opinion: under its
            own probabilities a candidate is better than all others, so they are for the boards of one alone.
        metric: of the board.
        public_share: of the test set, 0..1.
        groups: ``(T,)``; rows of one group stay on one side. None = every row by itself.
        resample: for labels that are known. Each world is a population drawn from these rows, whole groups with
            replacement, and each side a sample of that population: so a candidate that is better than its OOF says is
            so on both boards. Without it a good public part would leave a bad private one.
        drift: standard deviation of what the move from these rows to the real test set does to each candidate by
            itself, on both boards alike; the larger, the more the public board teaches.
        tests: with `resample`, images of the test set that the rows stand for; None = as many.
        reps: worlds; those in which a board has no score (a part without some class) are left out.
        seed: of the draw.

    Returns:
        None where there is nothing to play: one group alone, or hardly a world in which both boards have a score.
    """
    rng = np.random.default_rng(seed)
    tests = tests or len(chance)
    _, place = np.unique(np.arange(len(chance)) if groups is None else groups, return_inverse=True)
    if resample and len(place) > MOST:
        some = np.flatnonzero(_part(place, MOST / len(place), rng))
        candidates, chance = [values[some] for values in candidates], chance[some]
        _, place = np.unique(place[some], return_inverse=True)
    rows = len(chance)
    if place.max(initial=0) < 1:  # it cannot be on both boards
        return None
    steps, given = chance.cumsum(axis=1), chance.argmax(axis=1)
    hits = _hits(candidates, metric)
    public, private = np.empty((len(candidates), reps)), np.empty((len(candidates), reps))
    for rep in range(reps):
        target = given if resample else (rng.random((rows, 1)) * steps[:, -1:] > steps).sum(axis=1)
        is_open = _part(place, public_share, rng)
        sides = [np.flatnonzero(side) for side in (is_open, ~is_open)]
        if resample:
            sides = _resampled(sides, place, rng, tests / rows)
        for row, values in enumerate(candidates):
            for board, side in zip((public, private), sides, strict=True):
                if hits is not None:
                    board[row, rep] = (hits[row, side] == target[side]).mean()
                else:
                    board[row, rep] = metric.score(values[side], target[side])
    moved = drift * rng.standard_normal(public.shape)
    public, private = public + moved, private + moved
    sound = np.isfinite(public).all(axis=0) & np.isfinite(private).all(axis=0)
    if sound.sum() < min(FEWEST, reps):
        return None
    return Worlds(list(names), public[:, sound], private[:, sound], 1 if metric.higher_is_better else -1)


def _hits(candidates: Sequence[Array], metric: Metric) -> Array | None:
    from octofold.metrics import METRICS

    return np.stack([c.argmax(axis=1) for c in candidates]) if metric is METRICS["accuracy"] else None


def _part(place: Array, share: float, rng: np.random.Generator) -> Array:
    """A random set of whole groups that holds about `share` of the rows, never none and never all."""
    order = rng.permutation(int(place.max()) + 1)
    sizes = np.bincount(place)[order].cumsum()
    cut = int(np.clip(np.searchsorted(sizes, share * len(place)) + 1, 1, len(order) - 1))
    chosen = np.zeros(len(order), bool)
    chosen[order[:cut]] = True
    found: Array = chosen[place]
    return found


def _resampled(sides: Sequence[Array], place: Array, rng: np.random.Generator, scale: float) -> list[Array]:
    """Rows of each side anew, `scale` times as many: groups of a population that is itself a bootstrap of groups."""
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(int(place.max()) + 2))
    population = rng.integers(len(starts) - 1, size=len(starts) - 1)
    found = []
    for side in sides:
        chosen = rng.choice(population, size=max(1, round(scale * len(np.unique(place[side])))))
        sizes = starts[chosen + 1] - starts[chosen]
        first = np.repeat(starts[chosen] - (sizes.cumsum() - sizes), sizes)
        found.append(order[first + np.arange(sizes.sum())])
    return found


def two_finals(worlds: Worlds) -> tuple[int, int]:
    """Choose the pair whose better private score is best on average over the worlds, the better estimate first.

    A hedge errs elsewhere; a twin of the first, however good, adds nothing. (Equal indices where there is only one.)
    """
    private = worlds.sign * worlds.private
    mean = private.mean(axis=1)
    pairs = [(np.maximum(private[a], private[b]).mean(), a, b) for a in range(len(mean)) for b in range(a)]
    _, a, b = max(pairs, default=(0.0, 0, 0))
    return (a, b) if mean[a] >= mean[b] else (b, a)


def told(alone: Worlds | None, rivals: Worlds | None, public_share: float) -> list[str]:
    """The shake-up in words; none where nothing could be played.

    Args:
        alone: the first candidate on the boards of the test images themselves: how far chance parts its two scores.
        rivals: all of them on boards of OOF rows: which is better, and how surely a board says so.
        public_share: of the test set, 0..1.
    """
    lines = []
    if alone is not None:
        low, _, high = alone.gap
        lines.append(
            f"With {public_share:.0%} of the test set public, public minus private of {alone.names[0]} will lie in "
            f"[{low:+.4f}, {high:+.4f}] (95 %) by chance alone."
        )
    if rivals is None or len(rivals.names) < 2:
        return lines
    lines += [
        f"The boards order {rivals.names[0]} and {name} differently with probability {rivals.flips(0, other):.2f}."
        for other, name in enumerate(rivals.names)
        if other
    ]
    first, second = two_finals(rivals)
    lines.append(f"Picking the public best of these {len(rivals.names)} costs {rivals.regret:.4f} on average.")
    return [*lines, f"Two final submissions: {rivals.names[first]} (best estimate), {rivals.names[second]} (hedge)."]
