"""Fitted parts of the richer blends: search by metric, class-wise ridge, a logistic meta-model, pair experts.

Everything here sees out-of-fold rows only, and whatever it chooses it chooses across the folds it was given; the
outer cross-fit of `estimate` then scores it on a fold it never saw.
"""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.blend import solvers
from octofold.infer.combining import apply_expert, pair_odds, softmax, stack_features
from octofold.metrics import Metric, confusion, log_loss

Array = npt.NDArray[Any]
Experts = list[dict[str, Any]]


def gain(metric: Metric, probs: Array, target: Array) -> float:
    """The metric, signed so that more is better, with a thousandth of log-loss to break ties."""
    score = metric.score(probs, target)
    return (score if metric.higher_is_better else -score) - 1e-3 * log_loss(probs, target)


def climb(members: Array, target: Array, start: Array, metric: Metric, steps: int = 20) -> Array:
    """Greedy steps by the metric from `start`, each moving a tenth of the weight to one member while that helps."""
    if members.shape[1] > 10_000:  # differences that more rows would settle are not worth having
        few = np.linspace(0, members.shape[1] - 1, 10_000).astype(int)
        members, target = members[:, few], target[few]
    weights, blended = start, np.tensordot(start.astype(np.float32), members, 1)
    best = gain(metric, blended, target)
    for _ in range(steps):
        scores = [gain(metric, 0.9 * blended + 0.1 * member, target) for member in members]
        pick = int(np.argmax(scores))
        if scores[pick] <= best + 1e-9:
            break
        best, blended = scores[pick], 0.9 * blended + 0.1 * members[pick]
        weights = 0.9 * weights + 0.1 * (np.arange(len(start)) == pick)
    return solvers.normalised(weights)


def search(
    members: Array, target: Array, metric: Metric, trials: int = 400, seed: int = 0
) -> tuple[Array, list[float]]:
    """Random weights from Dirichlet distributions, then a bias per class in shrinking coordinate steps (original 000).

    Returns:
        weights ``(M,)``, and the bias added to the log-probability of each of the K classes.
    """
    count, classes = members.shape[0], members.shape[2]
    if members.shape[1] > 5000:  # the search is noise-limited long before
        few = np.linspace(0, members.shape[1] - 1, 5000).astype(int)
        members, target = members[:, few], target[few]
    rng = np.random.default_rng(seed)
    sharp = rng.choice([0.3, 1.0, 3.0], size=trials)
    tries = [np.full(count, 1 / count), *(rng.dirichlet(np.full(count, a)) for a in sharp)]
    scores = [gain(metric, np.tensordot(w, members, 1), target) for w in tries]
    weights = tries[int(np.argmax(scores))]
    logs = np.log(np.tensordot(weights, members, 1).clip(1e-7))
    bias, best = np.zeros(classes), max(scores)
    table = confusion(logs.argmax(axis=1), target, classes)
    worst = np.argsort(np.diag(table) / table.sum(axis=1).clip(1))[:8]
    for size in (0.2, 0.1, 0.05):
        for column, sign in itertools.product(worst, (1, -1)):
            trial = bias + sign * size * (np.arange(classes) == column)
            score = gain(metric, softmax(logs + trial), target)
            if score > best + 2 / len(target):  # one more row right is luck
                best, bias = score, trial
    return solvers.normalised(weights), bias.tolist()


def classwise_ridge(
    members: Array, target: Array, rows: npt.NDArray[np.bool_] | None, alpha: float = 1.0, power: float = 0.2
) -> tuple[list[list[float]], list[float]]:
    """Ridge without intercept per class on the members' column of that class over ``frequency^power``.

    Returns:
        the table ``(K, M)``, non-negative, rows summing to 1, and the K divisors.
    """
    count, classes = members.shape[0], members.shape[2]
    square, overlap = np.zeros((classes, count, count)), np.zeros((classes, count))
    counts = np.zeros(classes)
    for start in range(0, members.shape[1], solvers.CHUNK):
        part, truth = solvers.chunk_of(members, target, rows, start)
        columns = part.transpose(2, 0, 1)  # (K, M, n)
        square += columns @ columns.transpose(0, 2, 1)
        np.add.at(overlap, truth, part[:, np.arange(len(truth)), truth].T)
        counts += np.bincount(truth, minlength=classes)
    # A class that no row has is rare for all we know, but nothing shows it: it is raised least, not most.
    scale = (np.where(counts > 0, counts, counts.max()) / counts.sum()) ** power
    ridge = square / scale[:, None, None] ** 2 + alpha * np.eye(count)
    raw = np.linalg.solve(ridge, (overlap / scale[:, None])[..., None])[..., 0].clip(0)
    return [solvers.normalised(row).tolist() for row in raw], scale.tolist()


def fit_logistic(members: Array, target: Array, fold: Array) -> dict[str, Any]:
    """Multinomial logistic regression on `stack_features`, ridge strength chosen across the folds by log-loss.

    Returns:
        ``mean, spread, coef (K, D), intercept (K,)`` as lists. A class absent from the target gets an intercept that
        keeps it improbable.
    """
    features = stack_features(members)
    mean, spread = features.mean(axis=0), features.std(axis=0).clip(1e-3)
    scaled, classes = (features - mean) / spread, members.shape[2]
    strengths, folds = (0.001, 0.01, 0.1), np.unique(fold)
    losses = np.zeros(len(strengths))
    for held in folds if len(folds) > 1 else []:
        inside = fold != held
        for place, strength in enumerate(strengths):
            coef, intercept = _logistic(scaled[inside], target[inside], classes, strength)
            probs = softmax(scaled[~inside] @ coef.T + intercept)
            losses[place] += log_loss(probs, target[~inside]) * (~inside).sum()
    coef, intercept = _logistic(scaled, target, classes, strengths[int(losses.argmin())])
    return {
        "mean": mean.tolist(),
        "spread": spread.tolist(),
        "coef": coef.tolist(),
        "intercept": intercept.tolist(),
    }


def _logistic(features: Array, target: Array, classes: int, strength: float) -> tuple[Array, Array]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    coef, intercept = np.zeros((classes, features.shape[1])), np.full(classes, -12.0)
    present = np.unique(target)
    if len(present) == 1:
        intercept[present] = 0
        return coef, intercept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a ridge this strong is close enough long before
        model = LogisticRegression(C=strength, max_iter=200).fit(features, target)
    if len(present) == 2:  # one row of coefficients: the log-odds of the second class
        coef[present[1]], intercept[present] = model.coef_[0], [0, model.intercept_[0]]
    else:
        coef[present], intercept[present] = model.coef_, model.intercept_
    return coef, intercept


def influence(params: dict[str, Any], count: int, classes: int) -> Array:
    """Each member's share of a stack's absolute coefficients: a description for charts."""
    size = np.abs(np.array(params["coef"])).sum(axis=0)
    own, rest = size[: count * classes].reshape(count, classes).sum(axis=1), size[count * classes :]
    return solvers.normalised(own + rest[: 3 * count].reshape(3, count).sum(axis=0))


def fit_experts(
    members: Array,
    target: Array,
    fold: Array,
    base: Array,
    metric: Metric,
    pairs: Sequence[tuple[int, int]] | None = None,
    most: int = 3,
) -> Experts:
    """Give pairs of classes that a blend ``(N, K)`` confuses a gated expert, where that helps across folds.

    The pairs are those that members were trained on (`pairs`), or the ones confused most.

    An expert is a logistic model on the members' log-odds of the two classes. Margin and threshold are chosen on
    expert outputs that are themselves out-of-fold, and an expert is kept only if it mends more than it breaks by
    at least three rows and by twice the square root of those it changes: less is luck.
    """
    table = confusion(base.argmax(axis=1), target, base.shape[1])
    both = table + table.T
    if pairs is None:
        pairs = [divmod(int(cell), len(both)) for cell in np.argsort(np.triu(both, 1), axis=None)[::-1][:most]]
    experts: Experts = []
    for a, b in pairs:
        if both[a, b] >= 4 and (expert := _fit_expert(base, members, target, fold, a, b, metric)) is not None:
            experts.append(expert)
            base = apply_expert(base, members, expert)
    return experts


def _fit_expert(
    base: Array, members: Array, target: Array, fold: Array, a: int, b: int, metric: Metric
) -> dict[str, Any] | None:
    pair = (target == a) | (target == b)
    odds = pair_odds(members, a, b).T  # (N, M)
    held_out = {}
    for held in np.unique(fold):
        inside = pair & (fold != held)
        if len(np.unique(target[inside])) < 2:
            return None
        held_out[held] = _pair_model(odds[inside], target[inside] == a)
    best, chosen, before, better = gain(metric, base, target) + 3 / len(target), None, base, base
    for margin, threshold in itertools.product((0.02, 0.05, 0.1, 0.2, 0.3), (0.3, 0.4, 0.5, 0.6, 0.7)):
        after = before.copy()
        for held, (coef, intercept) in held_out.items():
            rows = fold == held
            trial = _expert(a, b, coef, intercept, margin, threshold)
            after[rows] = apply_expert(before[rows], members[:, rows], trial)
        if (score := gain(metric, after, target)) > best:
            best, chosen, better = score, (margin, threshold), after
    turned = (better.argmax(axis=1) == target).astype(int) - (before.argmax(axis=1) == target)
    if chosen is None or turned.sum() < 2 * np.sqrt(np.abs(turned).sum()):
        return None
    return _expert(a, b, *_pair_model(odds[pair], target[pair] == a), *chosen)


def _expert(a: int, b: int, coef: list[float], intercept: float, margin: float, threshold: float) -> dict[str, Any]:
    return {"a": a, "b": b, "coef": coef, "intercept": intercept, "margin": margin, "threshold": threshold}


def _pair_model(odds: Array, is_a: Array) -> tuple[list[float], float]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=0.1, class_weight="balanced").fit(odds.clip(-15, 15), is_a)
    return model.coef_[0].tolist(), float(model.intercept_[0])
