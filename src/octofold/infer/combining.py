"""A fitted blend: members' predictions in, one prediction out. Plain numbers, so it can be stored and served."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
TINY = 1e-7


@dataclass(frozen=True)
class Blend:
    """What a method learned from OOF.

    Attributes:
        method: row of `blending.METHODS` that fitted it.
        rule: row of `RULES` that applies it.
        weights: ``(M,)`` float64, each member's share, >= 0, summing to 1. For rules that are not an average
            (stack, hard_vote) a description, not the whole truth.
        params: whatever else the rule needs; lists and numbers only. ``voters``: the rule hears only so many first
            members, the others are pair experts. ``experts``: speak after the rule (see `apply_expert`).
    """

    method: str
    rule: str
    weights: npt.NDArray[np.float64]
    params: dict[str, Any] = field(default_factory=dict)

    def apply(self, members: Array) -> npt.NDArray[np.float32]:
        """Blend ``(M, N, K)`` probabilities (rows of the result sum to 1) or ``(M, N, P, 2)`` points."""
        parts = [
            self._piece(np.asarray(members[:, i : i + 8192], np.float64)) for i in range(0, members.shape[1], 8192)
        ]
        shape = (0, *members.shape[2:])
        return np.concatenate(parts).astype(np.float32) if parts else np.zeros(shape, np.float32)

    def _piece(self, members: Array) -> Array:
        blended = RULES[self.rule](members[: self.params.get("voters")], self)
        for expert in self.params.get("experts", ()):
            blended = apply_expert(blended, members, expert)
        return blended

    @property
    def is_mean(self) -> bool:
        """Whether it is the weighted mean of the members and nothing else: one of no weight then has no say."""
        return RULES[self.rule] is _linear and not self.params.get("experts")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self) | {"weights": self.weights.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Blend":
        """Read what `to_dict` gave."""
        return cls(**(values | {"weights": np.array(values["weights"], dtype=np.float64)}))


def _linear(members: Array, blend: Blend) -> Array:
    return np.tensordot(blend.weights[: len(members)], members, axes=1)


def _geometric(members: Array, blend: Blend) -> Array:
    return softmax(np.tensordot(blend.weights[: len(members)], np.log(members.clip(TINY)), axes=1))


def _rank(members: Array, blend: Blend) -> Array:
    """Each probability becomes its quantile in that member's OOF column (knots in params), then the mean.

    A value that many rows share, such as 0, has many quantiles: the middle one, or a class that nobody names would rank
    at the top of its own zeros.
    """
    knots = np.array(blend.params["knots"])  # (M, K, Q)
    level = np.linspace(0, 1, knots.shape[2])
    mean = np.zeros(members.shape[1:])
    for member, share in enumerate(blend.weights[: len(members)]):
        for column in range(members.shape[2]):
            values, own = members[member, :, column], knots[member, column]
            highest, lowest = np.interp(values, own, level), 1 - np.interp(-values, -own[::-1], level)
            mean[:, column] += share * (highest + lowest) / 2
    return _rows_to_one(mean + TINY)


def _vote(members: Array, blend: Blend) -> Array:
    """Share of members that put each class first; ties go to the higher mean probability."""
    votes = np.zeros(members.shape[1:])
    for part in members:
        votes[np.arange(len(votes)), part.argmax(axis=1)] += 1
    return _rows_to_one(votes + 1e-2 * members.mean(axis=0))


def _biased(members: Array, blend: Blend) -> Array:
    """Weighted average, then a bias per class on the log scale."""
    return softmax(np.log(_linear(members, blend).clip(TINY)) + np.array(blend.params["bias"]))


def _classwise(members: Array, blend: Blend) -> Array:
    """A weight per class and member: ``sum_m W[c, m] p_m[c] / freq_c^power`` (original 000's CWR)."""
    table = np.array(blend.params["table"])  # (K, M)
    mixed = np.einsum("km,mnk->nk", table, members) / np.array(blend.params["scale"])
    return _rows_to_one(mixed.clip(1e-12))


def _stack(members: Array, blend: Blend) -> Array:
    features = stack_features(members)
    scaled = (features - np.array(blend.params["mean"])) / np.array(blend.params["spread"])
    return softmax(scaled @ np.array(blend.params["coef"]).T + np.array(blend.params["intercept"]))


def apply_expert(base: Array, members: Array, expert: dict[str, Any]) -> Array:
    """Let one pair's expert speak where it may: the pair is on top and the margin is at most ``margin``.

    Args:
        base: ``(N, K)`` blended probabilities.
        members: ``(M, N, K)``.
        expert: ``a, b`` class indices; ``coef, intercept`` of a logistic model on the log-odds of a against b of the
            members it was fitted on: all, or (`pair_gate`) the voters, which come first; ``margin``, ``threshold``.
    """
    a, b = expert["a"], expert["b"]
    order = np.argsort(base, axis=1)[:, -2:]
    first, second = (np.take_along_axis(base, order[:, i : i + 1], 1)[:, 0] for i in (1, 0))
    called = (np.sort(order, axis=1) == sorted((a, b))).all(axis=1) & (first - second <= expert["margin"])
    coef = np.array(expert["coef"])
    says_a = pair_odds(members[: len(coef), called], a, b).T @ coef + expert["intercept"]
    chance = 1 / (1 + np.exp(-says_a.clip(-30, 30)))
    # Shift the odds so that the chosen threshold is the even point: the label flips exactly where it should.
    cut = min(max(expert["threshold"], 1e-3), 1 - 1e-3)
    share = chance * (1 - cut) / (chance * (1 - cut) + (1 - chance) * cut)
    result, both = base.copy(), base[called, a] + base[called, b]
    result[called, a], result[called, b] = both * share, both * (1 - share)
    return result


def pair_odds(members: Array, a: int, b: int) -> Array:
    """Return ``(M, N)`` log-odds of class `a` against class `b`."""
    odds: Array = np.log(members[:, :, a].clip(TINY)) - np.log(members[:, :, b].clip(TINY))
    return odds


def stack_features(members: Array) -> Array:
    """Return ``(N, M*(K+3) + K)``: log-probabilities, top, margin and entropy of each member, and the mean."""
    logs = np.log(members.clip(1e-4))
    top = np.sort(members, axis=2)[:, :, -2:]
    entropy = -(members * np.log(members.clip(TINY))).sum(axis=2)
    sure, margin = top[:, :, 1], top[:, :, 1] - top[:, :, 0]
    columns = [*logs, sure.T, margin.T, entropy.T]
    found: Array = np.concatenate([*columns, members.mean(axis=0)], axis=1)
    return found


def softmax(scores: Array) -> Array:
    """Exponentiate and normalise the last axis, safely."""
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def _rows_to_one(values: Array) -> Array:
    found: Array = values / values.sum(axis=1, keepdims=True)
    return found


RULES: dict[str, Callable[[Array, Blend], Array]] = {
    "linear": _linear,
    "geometric": _geometric,
    "rank": _rank,
    "vote": _vote,
    "biased": _biased,
    "classwise": _classwise,
    "stack": _stack,
    "gate": _linear,  # and then its experts, as after any rule
}
