"""Suspicion: arrays in, how much each label is in doubt out. Pure numpy and scikit-learn; rows never move.

Every function takes and returns row i for sample i. (Original 002 computed features in one order and attached them
to ids in another; its isolation forest looked useless ever after.)
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEIGHBOURS = 20
EXACT = 20_000  # rows: beyond it neighbours are looked for in PROBES cells around one's own
PROBES = 120
WIDTH = 0.1  # of the neighbours' kernel, in cosine similarity
SMALLEST_CLASS = 12  # below it, "unlike its class" means nothing
ODD = 4.0  # robust standard deviations from its class
ODD_WEIGHT = 0.05  # lifts odd images over quiet ones; moved no flipped label out of the first tenth
TWIN = 0.95  # cosine similarity of images that are nearly the same picture


def margin(probs: Array, label: Ints) -> Array:
    """``(N,)`` in [-1, 1]: probability of the label less the best other one; below 0, something else is likelier."""
    rows = np.arange(len(label))
    others = probs.copy()
    others[rows, label] = -np.inf
    found: Array = probs[rows, label] - others.max(axis=1)
    return found


def confident_joint(probs: Array, label: Ints) -> tuple[Array, Ints]:
    """Count the samples labelled i that are confidently j: confident learning.

    Source: Northcutt, Jiang, Chuang (2021), "Confident Learning: Estimating Uncertainty in Dataset Labels",
    J. Artif. Intell. Res. 70, 1373-1411, section 3.1. A sample is confidently j when its probability of j reaches
    the mean probability of j among the samples labelled j; of several such j, the likeliest.

    Args:
        probs: ``(N, K)`` out-of-fold probabilities.
        label: ``(N,)`` class index.

    Returns:
        joint ``(K, K)`` counts, given label by confident class; and ``(N,)`` that class, -1 where none is confident.
    """
    classes = probs.shape[1]
    count = np.bincount(label, minlength=classes)
    threshold = np.full(classes, np.inf)
    for one in np.flatnonzero(count):
        threshold[one] = probs[label == one, one].mean()
    above = np.where(probs >= threshold - 1e-9, probs, -1.0)
    confident = np.where(above.max(axis=1) >= 0, above.argmax(axis=1), -1)
    joint = np.zeros((classes, classes))
    sure = confident >= 0
    np.add.at(joint, (label[sure], confident[sure]), 1)
    return joint, confident.astype(np.int64)


def disagreement(members: Array) -> Array:
    """``(N,)`` in [0, 1]: how much ``(M, N, K)`` members and seeds differ (mutual information over log K).

    Entropy of the mean less the mean entropy (Houlsby et al. 2011, "Bayesian Active Learning for Classification and
    Preference Learning"): 0 where all say the same, however unsure.
    """

    def entropy(probs: Array) -> Array:
        found: Array = -(probs * np.log(np.clip(probs, 1e-12, None))).sum(axis=-1)
        return found

    gap = entropy(members.mean(axis=0)) - entropy(members).mean(axis=0)
    return np.asarray(np.clip(gap, 0, None) / math.log(max(2, members.shape[-1])))


def normalise(features: Array, width: int = 128) -> Array:
    """Centre ``(N, F)`` features, keep their `width` main directions, scale rows to length 1; float32."""
    centred = np.asarray(features, np.float32) - np.asarray(features, np.float32).mean(axis=0)
    if min(centred.shape) > width:
        from sklearn.decomposition import PCA

        centred = PCA(width, svd_solver="randomized", random_state=0).fit_transform(centred)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.where(length > 0, length, 1), np.float32)


def nearest(unit: Array, count: int = NEIGHBOURS, block: int = 0, exact: int = EXACT) -> tuple[Ints, Array]:
    """Find each row's nearest other rows by cosine similarity, in bounded memory.

    Up to `exact` rows every pair is compared. Past that, rows are sorted into cells, and looked for in their own
    and the `PROBES` nearest ones: time grows as N^1.5, and some neighbours are missed.

    Args:
        unit: ``(N, F)`` rows of length 1.
        count: how many.
        block: rows compared at once; 0 = as many as keep the comparison under some 200 MB.
        exact: rows up to which every pair is compared.

    Returns:
        ``(N, k)`` row numbers and similarities, nearest first; k is `count`, or fewer where there are fewer rows.
    """
    total = len(unit)
    k = max(0, min(count, total - 1))
    rows, near = np.zeros((total, k), np.int64), np.zeros((total, k), np.float32)
    if k == 0:
        return rows, near
    everybody = np.arange(total)
    for members, others in [(everybody, everybody)] if total <= exact else _cells(unit, k):
        size = block or max(16, min(1024, 12_000_000 // len(others)))
        for start in range(0, len(members), size):
            some = members[start : start + size]
            similarity = unit[some] @ unit[others].T
            similarity[np.arange(len(some)), np.searchsorted(others, some)] = -np.inf
            best = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
            found = np.take_along_axis(similarity, best, axis=1)
            order = np.argsort(-found, axis=1, kind="stable")
            rows[some] = others[np.take_along_axis(best, order, axis=1)]
            near[some] = np.take_along_axis(found, order, axis=1)
    return rows, near


def _cells(unit: Array, k: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield the rows of a cell, and the rows (sorted, more than `k`, these among them) to look for neighbours in."""
    centre = unit[np.sort(np.random.default_rng(0).permutation(len(unit))[: 4 * math.isqrt(len(unit))])]
    for _ in range(2):  # two steps of k-means: a drawn row is a poor centre
        cell = _nearest_centre(unit, centre)
        sums = np.zeros_like(centre)
        np.add.at(sums, cell, unit)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centre = np.where(length > 0, sums / np.maximum(length, 1e-9), centre)
    cell = _nearest_centre(unit, centre)
    order = np.argsort(cell, kind="stable")
    first = np.searchsorted(cell[order], np.arange(len(centre) + 1))
    for number in np.unique(cell).tolist():
        nearby = np.argsort(-(centre @ centre[number]), kind="stable")
        nearby = np.r_[number, nearby[nearby != number]]
        sizes = np.cumsum(first[nearby + 1] - first[nearby])
        probes = max(PROBES + 1, int(np.searchsorted(sizes, k, side="right")) + 1)
        others = np.concatenate([order[first[one] : first[one + 1]] for one in nearby[:probes].tolist()])
        yield order[first[number] : first[number + 1]], np.sort(others)


def _nearest_centre(unit: Array, centre: Array) -> Ints:
    blocks = [(unit[start : start + 2048] @ centre.T).argmax(axis=1) for start in range(0, len(unit), 2048)]
    return np.concatenate(blocks)


def votes(rows: Ints, similarity: Array, label: Ints, classes: int) -> Array:
    """``(N, K)`` class shares among each sample's neighbours (its own label has no vote), nearer ones counting more."""
    shares = np.zeros((len(label), classes))
    if rows.shape[1] == 0:
        return shares + 1 / classes
    weight = np.exp((similarity - similarity[:, :1]) / WIDTH)
    for column in range(rows.shape[1]):
        shares[np.arange(len(label)), label[rows[:, column]]] += weight[:, column]
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def isolated(features: Array, label: Ints, seed: int = 0) -> Array:
    """``(N,)`` how odd a sample is in its class by an isolation forest, in robust standard deviations; 0 = typical.

    One forest per class (original 002 grew one for all, where a rare class is an outlier as a whole).
    """
    from sklearn.ensemble import IsolationForest

    odd = np.zeros(len(label))
    for one in _big_classes(label):
        mine = np.flatnonzero(label == one)
        forest = IsolationForest(n_estimators=100, max_samples=min(256, len(mine)), random_state=seed).fit(
            features[mine]
        )
        depth = -forest.score_samples(features[mine])
        spread = 1.4826 * np.median(np.abs(depth - np.median(depth)))
        odd[mine] = np.clip((depth - np.median(depth)) / max(spread, 1e-9), 0, None)
    return odd


def stray(unit: Array, label: Ints, least: int = 4) -> Bools:
    """``(N,)`` whether DBSCAN would call a sample noise within its class (Ester et al. 1996).

    The radius of a class is twice the median distance to the `least`-th neighbour: dense classes get a small one. What
    is no core has fewer than `least` samples around it, itself among them; so its `least` nearest neighbours tell
    whether a core is near, and the quadratic search of a whole DBSCAN is not needed.
    """
    noise = np.zeros(len(label), bool)
    for one in _big_classes(label):
        mine = np.flatnonzero(label == one)
        rows, similarity = nearest(unit[mine], least)
        distance = np.sqrt(np.clip(2 - 2 * similarity.astype(np.float64), 0, None))
        radius = 2 * float(np.median(distance[:, -1]))
        if radius > 0:
            core = distance[:, least - 2] <= radius  # with itself that makes `least`
            noise[mine] = ~core & ~((distance <= radius) & core[rows]).any(axis=1)
    return noise


def _big_classes(label: Ints) -> list[int]:
    return [int(one) for one in np.flatnonzero(np.bincount(label) >= SMALLEST_CLASS)]


def combine(probs: Array | None, shares: Array | None, label: Ints) -> tuple[Array, Array]:
    """One belief from models and neighbours, and one score from the belief.

    The plain mean: models see what a class looks like anywhere, neighbours see what was photographed in the same
    minute; each catches what the other excuses (`docs/cleaning.md` has the numbers).

    Args:
        probs: ``(N, K)`` mean out-of-fold probabilities, NaN rows where no model has spoken; or None.
        shares: ``(N, K)`` the neighbours' votes; or None.
        label: ``(N,)`` class index.

    Returns:
        belief ``(N, K)``, rows sum to 1 (the label itself where nothing is known); suspicion ``(N,)`` in [0, 1],
        above 0.5 where another class is likelier than the label.
    """
    classes = max(
        (part.shape[1] for part in (probs, shares) if part is not None), default=int(label.max(initial=0)) + 1
    )
    total, weight = np.zeros((len(label), classes)), np.zeros((len(label), 1))
    for part in (probs, shares):
        if part is not None:
            spoken = np.isfinite(part).all(axis=1, keepdims=True)
            total += np.where(spoken, part, 0)
            weight += spoken
    silent = weight[:, 0] == 0
    total[silent, label[silent]] = 1
    belief = total / np.maximum(weight, 1)
    if classes < 2:
        return belief, np.zeros(len(label))
    return belief, (1 - margin(belief, label)) / 2


def point_errors(points: Array, guess: Array) -> Array:
    """``(N, P)`` distance of each guess from its point, in units of that point's median distance; NaN where missing.

    A value of 10 means: ten times what is usual for this body part.
    """
    distance = np.linalg.norm(guess.astype(np.float64) - points, axis=-1)
    seen = np.isfinite(distance).any(axis=0)
    usual = np.full(distance.shape[1], np.nan)
    usual[seen] = np.nanmedian(distance[:, seen], axis=0)
    return np.asarray(distance / np.maximum(usual, 1e-6))
