"""Shift: are the test images like the training images, and what does that do to the score?

Random folds put near-identical photos on both sides, so their score says what happens to *more of the same*. Three
views of the difference, none of which needs a test label: how well a classifier tells test from train, how far test
images are from their nearest training image beside held-out ones, and how much less sure the models are.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from octofold.blend.estimate import Interval
from octofold.infer.combining import softmax

Array = npt.NDArray[Any]

SURENESS, AGREEMENT = 1.4, 1.3
"""How much faster accuracy falls than calibrated confidence, and than agreement between members, on the probit scale.

Measured where the truth was known: clusters and products of grocery15's training photos held out, digits turned,
moved, blurred and made noisy, and synthetic competitions. A shift is never seen whole, so both are above 1.
"""
BLINDNESS = 0.15
"""Probit units of accuracy that may be lost unseen for each standard deviation that test is apart from train."""


@dataclass(frozen=True)
class Distance:
    """Test against train in a model's embedding.

    Attributes:
        auc: of a classifier that tells test rows from held-out training rows, cross-validated; 0.5 = exchangeable.
        auc_error: its standard error.
        nn_held: mean cosine similarity of held-out rows to their nearest row among those the model trained on.
        nn_test: the same of test rows.
        nearest: ``(T, 3)`` rows of the training features nearest to each test row, nearest first.
        similarity: ``(T, 3)`` their cosine similarity.
    """

    auc: float
    auc_error: float
    nn_held: float
    nn_test: float
    nearest: npt.NDArray[np.int64]
    similarity: Array


def measure(train: Array, held: Array, test: Array, seed: int = 0) -> Distance:
    """Compare test with held-out rows, both as one fold model sees them.

    Args:
        train: ``(N, F)`` features of all training rows.
        held: ``(N,)`` bool, the rows held out of this model. Rows it trained on look unlike any new row, so only
            these are compared with the test rows.
        test: ``(T, F)`` features.
        seed: of the cross-validation.
    """
    base = train[~held]
    centre = base.mean(axis=0)
    keys, own, new = (_unit(part - centre) for part in (base, train[held], test))
    similarity = new @ keys.T
    auc, error = adversarial_auc(own, new, seed)
    order = np.argsort(-similarity, axis=1)[:, :3]
    return Distance(
        auc,
        error,
        float((own @ keys.T).max(axis=1).mean()),
        float(similarity.max(axis=1).mean()),
        np.flatnonzero(~held)[order],
        np.take_along_axis(similarity, order, axis=1),
    )


def pooled(parts: Sequence[Distance]) -> Distance:
    """Average what several fold models see; `nearest` is the first one's."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(part, name) for part in parts]))

    # The test rows are the same in each part, so the errors are not independent: the mean error stands.
    first = parts[0]
    return Distance(mean("auc"), mean("auc_error"), mean("nn_held"), mean("nn_test"), first.nearest, first.similarity)


def adversarial_auc(one: Array, other: Array, seed: int = 0) -> tuple[float, float]:
    """Cross-validated AUC of telling two sets of rows apart, and its standard error (Hanley and McNeil 1982)."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n, m = len(one), len(other)
    if min(n, m) < 10:
        return 0.5, 0.5
    rows, label = np.concatenate([one, other]), np.r_[np.zeros(n, int), np.ones(m, int)]
    width = min(50, rows.shape[1], len(rows) // 10 + 1)
    model = make_pipeline(
        PCA(width, random_state=seed), StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced")
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    auc = float(roc_auc_score(label, cross_val_predict(model, rows, label, cv=folds, method="decision_function")))
    a, b = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (n - 1) * (b - auc**2) + (m - 1) * (a - auc**2)) / (n * m)
    return auc, float(np.sqrt(max(variance, 1e-8)))


def _unit(rows: Array) -> Array:
    found: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)
    return found


def temperature(probs: Array, target: Array) -> float:
    """The power that makes probabilities ``(N, K)`` best calibrated by log-loss (Guo et al. 2017)."""
    logs = np.log(probs.astype(np.float64).clip(1e-9))
    every = np.arange(len(target))

    def loss(log_power: float) -> float:
        return -float(np.log(softmax(logs * np.exp(log_power))[every, target].clip(1e-12)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2, 2), method="bounded").x))


def tempered(probs: Array, power: float) -> Array:
    """Raise probabilities to a power and renormalise rows."""
    return softmax(np.log(probs.astype(np.float64).clip(1e-9)) * power)


def atc(oof: Array, target: Array, test: Array) -> float:
    """Average thresholded confidence: the share of test rows surer than the level that OOF accuracy sits at.

    Garg et al. 2022, "Leveraging Unlabeled Data to Predict Out-of-Distribution Performance".

    Args:
        oof: ``(N, K)`` out-of-fold probabilities.
        target: ``(N,)``.
        test: ``(T, K)`` probabilities of **one** fold model (or blend of one fold's models): a bag of several is less
            sure than each of them, and the level would not fit.
    """
    sure, level = _negative_entropy(oof), float((oof.argmax(axis=1) != target).mean())
    return float((_negative_entropy(test) > np.quantile(sure, level)).mean())


def _negative_entropy(probs: Array) -> Array:
    return np.asarray((probs * np.log(probs.clip(1e-12))).sum(axis=1))


@dataclass(frozen=True)
class Outlook:
    """What to expect on the actual test images.

    Attributes:
        accuracy: the estimate with its 95 % interval.
        oof: the cross-fitted accuracy on the training folds.
        parts: the figures it was made of, by name.
        distance: test against train, or None without embeddings.
        about: what the interval covers, in words.
    """

    accuracy: Interval
    oof: float
    parts: dict[str, float]
    distance: Distance | None = None
    about: list[str] = field(default_factory=list)

    @property
    def flatter(self) -> float:
        """By how much the folds flatter."""
        return self.oof - self.accuracy.value


def foresee(
    oof: Array,
    target: Array,
    test_by_fold: Sequence[Array],
    spread: float,
    distance: Distance | None = None,
    members: tuple[Array, Sequence[Array]] | None = None,
    slope: float = SURENESS,
) -> Outlook:
    """Estimate accuracy on the test images themselves, from how sure the models are of them and how much they agree.

    Start at the cross-fitted accuracy; move it by what mean confidence and the members' agreement lose between
    out-of-fold rows and test rows (difference of confidences, Guillory et al. 2021; agreement on the line, Baek et al.
    2022; both on the probit scale). A difference within sampling noise is shrunk to nothing (James and Stein).

    Args:
        oof: ``(N, K)`` cross-fitted blended out-of-fold probabilities.
        target: ``(N,)``.
        test_by_fold: per fold, ``(T, K)`` the blend of that fold's models only: as many models as speak in `oof`.
        spread: standard error of the cross-fitted accuracy (groups and seeds).
        distance: from `measure`, to be told with the rest.
        members: ``(M, N, K)`` out-of-fold and, per fold, ``(M, T, K)`` test probabilities; agreement needs two members.
        slope: how much faster accuracy falls than confidence on this data, from `rehearse`.
    """
    accuracy, rows = float((oof.argmax(axis=1) == target).mean()), len(test_by_fold[0])
    power = temperature(oof, target)
    sure = tempered(oof, power).max(axis=1)
    sure_test = np.mean([tempered(part, power).max(axis=1) for part in test_by_fold], axis=0)
    signals = [(slope, sure, sure_test)]
    if members is not None and len(members[0]) > 1:
        agreed = np.mean([agreement(part) for part in members[1]], axis=0)
        pace = AGREEMENT * np.sqrt(slope / SURENESS)
        signals = [(slope / 2, sure, sure_test), (pace / 2, agreement(members[0]), agreed)]
    fall = sum(slope * (_level(new.mean()) - _level(old.mean())) for slope, old, new in signals)
    noise = _noise([(slope, old) for slope, old, _ in signals]) + _noise([(slope, new) for slope, _, new in signals])
    fall *= max(0.0, 1 - noise / max(fall**2, 1e-12))
    centre = _level(accuracy) + fall
    value = float(ndtr(centre))
    own = spread / _density(_level(accuracy))
    finite = np.sqrt(value * (1 - value) / rows) / _density(centre)
    # What these signals do not see of a shift: the scatter around them where the truth was known. Models overlook more
    # than they imagine, so it reaches further down, the more so the better test and train can be told apart.
    apart = 0.0
    if distance is not None:
        apart = np.sqrt(2) * _level(max(0.5, distance.auc - 2 * distance.auc_error))
    blind_down = np.hypot(min(0.06 + 0.4 * abs(fall), 0.4), BLINDNESS * apart)
    blind_up = min(0.06 + 0.4 * abs(fall), 0.3)
    down, up = (1.96 * float(np.sqrt(own**2 + finite**2 + blind**2)) for blind in (blind_down, blind_up))
    parts = {"oof": accuracy, "temperature": 1 / power, "confidence": float(sure_test.mean()), "slope": slope}
    parts["atc"] = float(np.mean([atc(oof, target, part) for part in test_by_fold]))
    if len(signals) > 1:
        parts |= {"agreement_oof": float(signals[1][1].mean()), "agreement_test": float(signals[1][2].mean())}
    if distance is not None:
        parts |= {
            "adversarial_auc": distance.auc,
            "nn_similarity_held_out": distance.nn_held,
            "nn_similarity_test": distance.nn_test,
        }
    covers = ["sampling of groups", f"the {rows} test images", "shift that confidence and agreement do not show"]
    bounds = Interval(value, float(ndtr(centre - down)), float(ndtr(centre + up)))
    return Outlook(bounds, accuracy, parts, distance, covers)


def rehearse(features: Array, target: Array, reps: int = 8, seed: int = 0) -> float:
    """Rehearse a shift with training data alone: how much faster does accuracy fall than confidence here?

    Each class is cut into sub-clusters; in turn one of each is held out whole, a logistic regression learns the rest,
    and what confidence and accuracy lose from ordinary held-out rows to those never seen are set side by side.

    Args:
        features: ``(N, F)`` of an embedding that did not learn these labels: ImageNet's, or pixels.
        target: ``(N,)``.
        reps: rehearsals.
        seed: of the cuts.

    Returns:
        The slope on the probit scale, between 1 and 3.5; `SURENESS` where classes are too small to be cut.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    width = min(40, features.shape[1], len(features) // 4)
    rows = StandardScaler().fit_transform(PCA(width, random_state=seed).fit_transform(features))
    cut = np.zeros(len(target), int)
    for label in np.unique(target):
        own = np.flatnonzero(target == label)
        parts = min(3, max(1, len(own) // 8))
        cut[own] = 100 * label + KMeans(parts, n_init=1, random_state=seed).fit_predict(rows[own])
    pairs = [_rehearsal(rows, target, cut, rng) for _ in range(reps)]
    falls = np.array([pair for pair in pairs if pair is not None and pair[0] < -0.02])
    if len(falls) < 3:
        return SURENESS
    steep = float((falls[:, 0] * falls[:, 1]).sum() / (falls[:, 0] ** 2).sum())
    return float(np.clip(0.9 * steep, 1.0, 3.5))  # a whole sub-cluster never seen is harsher than another visit


def _rehearsal(rows: Array, target: Array, cut: Array, rng: np.random.Generator) -> tuple[float, float] | None:
    """What confidence and accuracy lose, on the probit scale, on one held-out sub-cluster of each class."""
    from sklearn.linear_model import LogisticRegression

    away = np.zeros(len(target), bool)
    for label in np.unique(target):
        parts = np.unique(cut[target == label])
        away |= (cut == rng.choice(parts)) if len(parts) > 1 else False
    near = ~away & (rng.random(len(target)) < 0.3)
    learn = ~away & ~near
    if min(away.sum(), near.sum()) < 20 or len(np.unique(target[learn])) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged to the last digit is near enough
        model = LogisticRegression(C=0.1, max_iter=60, tol=1e-3).fit(rows[learn], target[learn])
    levels: list[tuple[float, float]] = []
    power = 1.0
    for part in (near, away):
        probs = np.zeros((part.sum(), int(target.max()) + 1))
        probs[:, model.classes_] = model.predict_proba(rows[part])
        power = temperature(probs, target[part]) if not levels else power
        hit, sure = (probs.argmax(axis=1) == target[part]).mean(), tempered(probs, power).max(axis=1).mean()
        levels.append((_level(sure), _level(hit)))
    return levels[1][0] - levels[0][0], levels[1][1] - levels[0][1]


def agreement(members: Array) -> Array:
    """Share of pairs of members ``(M, N, K)`` that put the same class first, per row ``(N,)``."""
    votes = members.argmax(axis=2)
    pairs = [votes[a] == votes[b] for a in range(len(votes)) for b in range(a)]
    found: Array = np.mean(pairs, axis=0)
    return found


def _noise(signals: Sequence[tuple[float, Array]]) -> float:
    """Sampling variance of a sum of slopes times probit levels of means over the same rows."""
    rows = sum(slope * values / _density(_level(values.mean())) for slope, values in signals)
    return float(np.var(rows) / np.size(rows))


def _density(level: float) -> float:
    return float(max(np.exp(-(level**2) / 2) / np.sqrt(2 * np.pi), 1e-3))


def _level(share: float) -> float:
    return float(ndtri(np.clip(share, 0.005, 0.9995)))


def calibrated(probs: Array, accuracy: float) -> Array:
    """Temper probabilities ``(T, K)`` until their mean maximum is the accuracy expected of them."""

    def gap(log_power: float) -> float:
        return abs(float(tempered(probs, np.exp(log_power)).max(axis=1).mean()) - accuracy)

    return tempered(probs, float(np.exp(minimize_scalar(gap, bounds=(-3, 3), method="bounded").x)))


def expected_score(probs: Array, accuracy: float, score: Any, reps: int = 40, seed: int = 0) -> float:
    """Any score on the test images, were their labels drawn from probabilities that fit an expected accuracy.

    The probabilities are tempered until their mean maximum is `accuracy`; then labels are drawn and scored.

    Args:
        probs: ``(T, K)`` the submission's probabilities.
        accuracy: from `foresee`.
        score: ``score(probs, target) -> float``.
        reps: draws.
        seed: of the draws.
    """

    chance = calibrated(probs, accuracy)
    steps, rng = chance.cumsum(axis=1), np.random.default_rng(seed)
    draws = [(rng.random((len(probs), 1)) > steps).sum(axis=1).clip(0, probs.shape[1] - 1) for _ in range(reps)]
    return float(np.mean([score(probs, draw) for draw in draws]))
