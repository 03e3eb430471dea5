"""Blends: how members are combined. A table of methods, each fitted on out-of-fold predictions only.

To add a method, write ``fit(members, target, fold, rows, metric) -> Blend`` and add a row; its tests are automatic.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.blend import solvers, stacking
from octofold.errors import UserError, known
from octofold.infer.combining import Blend
from octofold.metrics import METRICS, Metric

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.bool_] | None
Pairs = Sequence[tuple[int, int]]
MOST = 200_000
"""Rows that searching methods look at."""
BY_HAND = "by hand "
"""How a method begins whose weights a person gave, in order of the members, as JSON."""


def by_hand(weights: Mapping[str, float], names: Sequence[str]) -> str:
    """Return the method that gives each member the weight a person named; nothing is fitted.

    Raises:
        UserError: another set of members, a negative weight, or a sum that is not 1 (to 1e-3).
    """
    if set(weights) != set(names):
        raise UserError("--weights", expected=f"a weight for each of {', '.join(names)}", got=", ".join(weights))
    if not all(value >= 0 for value in weights.values()) or abs(sum(weights.values()) - 1) > 1e-3:
        total = f"a sum of {sum(weights.values()):g}, smallest {min(weights.values()):g}"
        raise UserError(
            "--weights", expected="shares: none negative, 1 in all", got=total, fix="divide them by their sum"
        )
    return BY_HAND + json.dumps([weights[name] / sum(weights.values()) for name in names])


def fit(
    method: str,
    members: Array,
    target: Array,
    fold: Array | None = None,
    rows: Rows = None,
    metric: Metric | None = None,
    experts: Pairs = (),
) -> Blend:
    """Fit one row of `METHODS`, and gates for the pair experts among the members.

    Args:
        method: name of the row, or what `by_hand` gave.
        members: ``(M, N, K)`` probabilities or ``(M, N, P, 2)`` points, **out-of-fold**: a row must come from models
            that did not train on it, or the weights favour whoever overfits. May be a memmap.
        target: ``(N,)`` int class indices, or ``(N, P, 2)`` points, NaN where missing.
        fold: ``(N,)`` int; methods with settings of their own choose them across these folds. None = one fold.
        rows: ``(N,)`` bool, the rows that may be seen; None = all.
        metric: what searching methods look at; None = accuracy, or mse for points.
        experts: for each of the **last** members that was trained on two classes only, their indices. Such a member
            has no say in the method; where its two classes lead by a small margin it may divide their probability
            anew, if that helps across the folds (`stacking.fit_experts`).

    Raises:
        UserError: unknown method, a method that cannot blend points, or nothing to fit on.
    """
    given = json.loads(method.removeprefix(BY_HAND)) if method.startswith(BY_HAND) else None
    points = members.ndim == 4
    if given is None:
        known("blend method", method, METHODS)
    if points and given is None and method not in POINT_METHODS:
        raise UserError(
            f"blend method '{method}'", expected=f"for points one of {', '.join(POINT_METHODS)}", got=method
        )
    if members.shape[0] == 0 or members.shape[1] == 0 or (rows is not None and not rows.any()):
        raise UserError(f"blend method '{method}'", expected="at least one member and one row", got=str(members.shape))
    fold = np.zeros(members.shape[1], int) if fold is None else fold
    metric = metric or METRICS["mse" if points else "accuracy"]
    voters = members[: len(members) - len(experts)]
    if given is not None or len(voters) == 1:  # nothing to weigh
        blend = Blend(method, "linear", np.array(given or [1.0]))
    else:
        blend = METHODS[method](voters, target, fold, rows, metric)
    return _gated(blend, members, target, fold, rows, metric, experts) if experts else blend


def _gated(
    blend: Blend, members: Array, target: Array, fold: Array, rows: Rows, metric: Metric, experts: Pairs
) -> Blend:
    """The blend with a gate for each pair that a member was trained on, and the experts themselves at weight 0."""
    seen, truth = _seen(members, target, rows)
    kept = _sample(members, rows, MOST)
    weights = np.r_[blend.weights, np.zeros(len(experts))]
    gated = replace(blend, weights=weights, params=blend.params | {"voters": len(members) - len(experts)})
    inner = _inner(fold, target, rows)[kept]
    found = stacking.fit_experts(seen, truth, inner, gated.apply(seen), metric, list(dict.fromkeys(experts)))
    return replace(gated, params=gated.params | {"experts": [*gated.params.get("experts", []), *found]})


def _equal(members: Array, *_: Any) -> npt.NDArray[np.float64]:
    return np.full(members.shape[0], 1 / members.shape[0])


def equal(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """The plain mean: nothing fitted, nothing to overfit."""
    return Blend("equal", "linear", _equal(members))


def soft_vote(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Original 001's soft voting: the mean of probabilities, under its own name."""
    return Blend("soft_vote", "linear", _equal(members))


def hard_vote(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Original 001's hard voting: the most frequent label; ties go to the higher mean probability."""
    return Blend("hard_vote", "vote", _equal(members))


def geometric(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Mean of log-probabilities, renormalised."""
    return Blend("geometric", "geometric", _equal(members))


def rank(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Mean of ranks, as quantiles of each member's OOF, so that one image alone can be blended too."""
    levels = np.linspace(0, 1, 129)
    seen = _sample(members, rows, 20_000)
    knots = [[np.quantile(column, levels).tolist() for column in part.T] for part in members[:, seen]]
    return Blend("rank", "rank", _equal(members), {"knots": knots})


def lr_mse(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Original 000's LR(MSE): non-negative least squares to the one-hot target, then divided by the sum."""
    return Blend("lr_mse", "linear", solvers.non_negative(solvers.gram(members, target, rows)))


def lr_mse_per_fold(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Original 000's cv5 variant: `lr_mse` on each fold alone; fold model f votes with fold f's weights.

    Where fold models are already bagged (and in the cross-fitted score) the folds' mean weights stand in.
    """
    seen = np.ones(len(fold), bool) if rows is None else rows
    table = {
        int(f): solvers.non_negative(solvers.gram(members, target, seen & (fold == f))) for f in np.unique(fold[seen])
    }
    params = {"per_fold": {str(f): weights.tolist() for f, weights in table.items()}}
    return Blend("lr_mse_per_fold", "linear", np.mean(list(table.values()), axis=0), params)


def simplex(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Least squares with weights on the simplex, exact: the best Brier score, or the best mse for points."""
    return Blend("simplex", "linear", solvers.simplex(solvers.gram(members, target, rows).residual))


def log_loss(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """The best log-loss on the simplex, exact (Newton on the same program)."""
    return Blend("log_loss", "linear", solvers.log_loss(members, target, rows))


def hill_climb(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Caruana's greedy selection with replacement: by squared error first, then by the metric itself."""
    start = solvers.greedy(solvers.gram(members, target, rows).residual)
    return Blend("hill_climb", "linear", stacking.climb(*_seen(members, target, rows), start, metric))


def cwr(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Original 000's class-wise ridge: a weight per class and member, features divided by frequency^0.2."""
    table, scale = stacking.classwise_ridge(members, target, rows)
    return Blend("cwr", "classwise", solvers.normalised(np.mean(table, axis=0)), {"table": table, "scale": scale})


def stack(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """A logistic meta-model on probabilities, margins and entropies; its ridge chosen across the folds."""
    params = stacking.fit_logistic(
        *_seen(members, target, rows), _inner(fold, target, rows)[_sample(members, rows, MOST)]
    )
    return Blend("stack", "stack", stacking.influence(params, members.shape[0], members.shape[2]), params)


def dirichlet(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """Random weights from the simplex scored by the metric, then a bias per class in coordinate steps."""
    weights, bias = stacking.search(*_seen(members, target, rows), metric)
    return Blend("dirichlet", "biased", weights, {"bias": bias})


def pair_gate(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """`simplex`, and for the pairs it confuses an expert that speaks only in close calls (original 000)."""
    weights = simplex(members, target, fold, rows, metric).weights
    seen, truth = _seen(members, target, rows)
    base = np.tensordot(weights, seen, 1)
    inner = _inner(fold, target, rows)[_sample(members, rows, MOST)]
    experts = stacking.fit_experts(seen, truth, inner, base, metric)
    return Blend("pair_gate", "gate", weights, {"experts": experts})


def best_single(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """The one member with the best score."""
    seen = slice(None) if rows is None else rows
    scores = [metric.sign * metric.score(np.asarray(member[seen]), target[seen]) for member in members]
    return Blend("best_single", "linear", np.eye(len(members))[int(np.argmax(scores))])


def auto(members: Array, target: Array, fold: Array, rows: Rows, metric: Metric) -> Blend:
    """The simplest of `CANDIDATES` that no later one beats separably, cross-fitted within the rows it may see.

    Being a method like any other, its choice is made anew, unseen, for each fold of the outer estimate.
    """
    seen = np.ones(members.shape[1], bool) if rows is None else rows
    inner = _inner(fold, target, rows)
    folds = np.unique(inner[seen])
    chosen, gains = CANDIDATES[0], {}
    for name in CANDIDATES if len(folds) > 1 else ():
        parts = []
        for held in folds:
            inside, outside = seen & (inner != held), seen & (inner == held)
            part = members[:, outside]
            parts.append(
                _gains(METHODS[name](members, target, fold, inside, metric).apply(part), target[outside], metric)
            )
        gains[name] = np.concatenate(parts)
        ahead = gains[name] - gains[chosen]
        if ahead.mean() > 1.96 * ahead.std() / np.sqrt(len(ahead)) + 1e-12:
            chosen = name
    fitted = METHODS[chosen](members, target, fold, rows, metric)
    return replace(fitted, method=f"auto: {chosen}")


def _inner(fold: Array, target: Array, rows: Rows) -> Array:
    """``(N,)`` folds to choose across: those of the rows that may be seen, or two halves where they are all of one.

    Of two folds one is held out for the estimate. Without halves a method would choose nothing on the other, and the
    estimate would be another method's than the one fitted on both. Each class is halved in the order of its rows, so
    that no half lacks a class and neighbours (of a group, mostly) stay together.
    """
    seen = np.arange(len(fold)) if rows is None else np.flatnonzero(rows)
    if len(np.unique(fold[seen])) > 1:
        return fold
    halves = np.zeros(len(fold), int)
    for label in np.unique(target[seen]):
        own = seen[target[seen] == label]
        halves[own[(len(own) + 1) // 2 :]] = 1
    return halves


def _gains(values: Array, target: Array, metric: Metric) -> Array:
    """How good each row is, more is better: the metric's own row where it is a mean over rows, else being right."""
    if values.ndim == 3:
        found: Array = -np.nanmean((values - target) ** 2, axis=(1, 2))
        return found
    chance = values[np.arange(len(target)), target]
    if metric is METRICS["log_loss"]:
        return np.asarray(np.log(chance.clip(1e-7)))
    if metric is METRICS["brier"]:
        return np.asarray(2 * chance - (values**2).sum(axis=1))
    return np.asarray(values.argmax(axis=1) == target, dtype=float)


def _seen(members: Array, target: Array, rows: Rows) -> tuple[Array, Array]:
    """The rows searching methods work on, in memory: all of them up to `MOST`, else an even sample."""
    kept = _sample(members, rows, MOST)
    return np.asarray(members[:, kept], np.float32), target[kept]


def _sample(members: Array, rows: Rows, most: int) -> Array:
    kept = np.arange(members.shape[1]) if rows is None else np.flatnonzero(rows)
    return kept if len(kept) <= most else kept[np.linspace(0, len(kept) - 1, most).astype(int)]


CANDIDATES = ("equal", "lr_mse", "log_loss")
"""What `auto` tries, simplest first."""

METHODS: dict[str, Callable[[Array, Array, Array, Rows, Metric], Blend]] = {
    "equal": equal,
    "best_single": best_single,
    "soft_vote": soft_vote,
    "hard_vote": hard_vote,
    "geometric": geometric,
    "rank": rank,
    "lr_mse": lr_mse,
    "lr_mse_per_fold": lr_mse_per_fold,
    "simplex": simplex,
    "log_loss": log_loss,
    "hill_climb": hill_climb,
    "cwr": cwr,
    "dirichlet": dirichlet,
    "pair_gate": pair_gate,
    "stack": stack,
    "auto": auto,
}
"""Simplest first: where two cannot be told apart, the earlier row wins."""

POINT_METHODS = ("equal", "best_single", "simplex")
"""The rows that blend points as well: a plain mean, and least squares on coordinates."""
