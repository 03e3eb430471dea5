"""Shift: are the test images like the training images, and what does that do to the score?

Random folds put near-identical photos on both sides, so their score says what happens to *more of the same*. Three
views of the difference, none of which needs a test label: how well a classifier tells test from train, how far test
images are from their nearest training image beside held-out ones, and how much less sure the models are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from octofold.blend.estimate import Interval, chance
from octofold.infer.combining import softmax

Array = npt.NDArray[Any]

SURENESS, AGREEMENT = 1.4, 1.3
"""How much faster accuracy falls than calibrated confidence, and than agreement between members, on the probit scale.

Measured where the truth was known: clusters and products of grocery15's training photos held out, digits turned,
moved, blurred and made noisy, and synthetic competitions. A shift is never seen whole, so both are above 1.
"""
BLINDNESS = 0.15
"""Probit units of accuracy that may be lost unseen for each standard deviation that test is apart from train."""
ROOM = 2**25
"""Similarities in memory at once."""


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
    auc, error = adversarial_auc(own, new, seed)
    order, similarity = _nearest(new, keys, 3)
    return Distance(
        auc,
        error,
        float(_nearest(own, keys, 1)[1].mean()),
        float(similarity[:, 0].mean()),
        np.flatnonzero(~held)[order],
        similarity,
    )


def _nearest(rows: Array, keys: Array, count: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Places ``(R, count)`` of the keys most like each row, nearest first, and how like; block by block in memory."""
    step = max(1, ROOM // len(keys))
    places, values = [], []
    for start in range(0, len(rows), step):
        like = rows[start : start + step] @ keys.T
        best = np.argpartition(-like, min(count, len(keys) - 1), axis=1)[:, :count]
        near = np.take_along_axis(like, best, axis=1)
        order = np.argsort(-near, axis=1, kind="stable")
        places.append(np.take_along_axis(best, order, axis=1))
        values.append(np.take_along_axis(near, order, axis=1))
    return np.concatenate(places), np.concatenate(values)


def told(distance: Distance) -> str:
    """The distance in words."""
    return (
        f"Test against train: a classifier tells them apart with AUC {distance.auc:.2f} (0.5 = not at all); "
        f"a test image's nearest training image has similarity {distance.nn_test:.3f}, a held-out image's "
        f"{distance.nn_held:.3f}."
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

    for most in (2, 9):  # of hundreds of classes, ranks are nearly level
        if (found := float(minimize_scalar(loss, bounds=(-2, most), method="bounded").x)) < most - 0.01:
            break
    return float(np.exp(found))


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
        surely: probability that the accuracy counted on the test images is below `oof`.
    """

    accuracy: Interval
    oof: float
    parts: dict[str, float]
    distance: Distance | None = None
    about: list[str] = field(default_factory=list)
    surely: float = 0.5

    @property
    def flatter(self) -> float:
        """By how much the folds flatter."""
        return self.oof - self.accuracy.value


class Signal(NamedTuple):
    """Something that can be seen without labels and falls with accuracy: per row, on OOF rows and on test rows."""

    pace: float
    """How much faster accuracy falls, on the probit scale; paces of all signals together weigh them."""
    before: Array
    after: Array

    @property
    def fall(self) -> float:
        """What the signal says accuracy loses, in probits (negative = loses)."""
        return self.pace * (level(float(self.after.mean())) - level(float(self.before.mean())))


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
        spread: standard error of the cross-fitted accuracy (groups and seeds); NaN where all rows are of one group.
        distance: from `measure`, to be told with the rest.
        members: ``(M, N, K)`` out-of-fold and, per fold, ``(M, T, K)`` test probabilities; agreement needs two members.
        slope: how much faster accuracy falls than confidence on this data, from `rehearsal.rehearse`.
    """
    accuracy, tests = float((oof.argmax(axis=1) == target).mean()), len(test_by_fold[0])
    power = temperature(oof, target)
    sure = tempered(oof, power).max(axis=1)
    sure_test = np.mean([tempered(part, power).max(axis=1) for part in test_by_fold], axis=0)
    signals = [Signal(slope, sure, sure_test)]
    if members is not None and len(members[0]) > 1:
        agreed = np.mean([agreement(part) for part in members[1]], axis=0)
        pace = AGREEMENT * np.sqrt(slope / SURENESS)
        signals = [Signal(slope / 2, sure, sure_test), Signal(pace / 2, agreement(members[0]), agreed)]
    fall = _shrunk_fall(signals)
    counted = _counted(accuracy, spread, len(target), fall, blindness(fall, distance), tests)
    low, high = (float(end) for end in np.quantile(counted, [0.025, 0.975]))
    surely = chance(accuracy - counted)
    parts = {"oof": accuracy, "temperature": 1 / power, "confidence": float(sure_test.mean()), "slope": slope}
    parts["atc"] = float(np.mean([atc(oof, target, part) for part in test_by_fold]))
    if len(signals) > 1:
        parts |= {
            f"agreement_{name}": float(rows.mean()) for name, rows in zip(("oof", "test"), signals[1][1:], strict=True)
        }
    parts["folds_flatter"] = surely
    if distance is not None:
        parts |= {
            "adversarial_auc": distance.auc,
            "nn_similarity_held_out": distance.nn_held,
            "nn_similarity_test": distance.nn_test,
        }
    covers = ["sampling of groups", f"the {tests} test images", "shift that confidence and agreement do not show"]
    return Outlook(Interval(float(ndtr(level(accuracy) + fall)), low, high), accuracy, parts, distance, covers, surely)


def _shrunk_fall(signals: Sequence[Signal]) -> float:
    """What the signals together say accuracy loses, in probits; nothing where it is within sampling noise."""
    fall = sum(signal.fall for signal in signals)
    noise = _noise([(signal.pace, signal.before) for signal in signals])
    noise += _noise([(signal.pace, signal.after) for signal in signals])
    return fall * max(0.0, 1 - noise / max(fall**2, 1e-12))


def blindness(fall: float, distance: Distance | None) -> tuple[float, float]:
    """What the signals do not see of a shift: its standard deviation downwards and upwards, in probits.

    The scatter around them where the truth was known. Models overlook more than they imagine, so it reaches further
    down, the more so the better test and train can be told apart.
    """
    apart = np.sqrt(2) * level(max(0.5, distance.auc - 2 * distance.auc_error)) if distance is not None else 0.0
    scatter = 0.06 + 0.4 * abs(fall)
    return float(np.hypot(min(scatter, 0.4), BLINDNESS * apart)), min(scatter, 0.3)


def _counted(
    accuracy: float, spread: float, rows: int, fall: float, blind: tuple[float, float], tests: int, draws: int = 20_000
) -> Array:
    """Draw accuracies that may be counted on so many test images.

    Drawn, because near 1 nothing is normal any more: the cross-fitted accuracy from the beta distribution of as many
    independent rows as its standard error is worth (Jeffreys' prior), what the signals do not see on the probit scale,
    and the hits among the test images from the binomial distribution.
    """
    rng = np.random.default_rng(0)
    # Without an error (or a hit) the rows do not spread at all: nothing says that they are worth fewer. If all are of
    # one group (NaN), they are worth one.
    known = 1.0 if np.isnan(spread) else float(rows)
    worth = float(np.clip(accuracy * (1 - accuracy) / spread**2, 1, rows)) if spread > 0 else known
    start = ndtri(rng.beta(worth * accuracy + 0.5, worth * (1 - accuracy) + 0.5, draws))
    unseen = rng.standard_normal(draws)
    share = ndtr(start + fall + unseen * np.where(unseen < 0, *blind))
    return np.asarray(rng.binomial(tests, share) / tests)


def agreement(members: Array) -> Array:
    """Share of pairs of members ``(M, N, K)`` that put the same class first, per row ``(N,)``."""
    votes = members.argmax(axis=2)
    pairs = [votes[a] == votes[b] for a in range(len(votes)) for b in range(a)]
    found: Array = np.mean(pairs, axis=0)
    return found


def _noise(signals: Sequence[tuple[float, Array]]) -> float:
    """Sampling variance of a sum of slopes times probit levels of means over the same rows."""
    rows = sum(slope * values / _density(level(values.mean())) for slope, values in signals)
    return float(np.var(rows) / np.size(rows))


def _density(level: float) -> float:
    return float(max(np.exp(-(level**2) / 2) / np.sqrt(2 * np.pi), 1e-3))


def level(share: float) -> float:
    """Probit of a share, kept within what a few thousand rows can tell."""
    return float(ndtri(np.clip(share, 0.005, 0.9995)))
