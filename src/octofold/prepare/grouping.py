"""Grouping: how far apart must folds be, so that a held-out image is as new to its models as a test image is?

Clusters of embeddings, cut where the similarity of held-out images to their nearest training image is distributed as
that of the test images is: nearest-neighbour distance matching (Milà et al. 2022, "Nearest neighbour distance
matching leave-one-out cross-validation"; k-fold: Linnenbrink et al. 2024), with the Wasserstein distance. Where train
and test are exchangeable it keeps plain folds, as it should. Linear time: clusters of many images are made of
`LEADERS` averages, and similarities are asked of `ASKED` images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import wasserstein_distance

from octofold.blend.shift import adversarial_auc
from octofold.prepare.neighbours import components

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
CUTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # cosine distance of cluster means
ASKED = 1500
LEADERS = 4000
LARGEST = 0.5  # no group may hold more than this share: it could not be balanced


@dataclass(frozen=True)
class Candidate:
    """One way to group.

    Attributes:
        cut: cosine distance of the clustering; 0 = near-duplicates alone.
        groups: how many. largest: share of the images in the biggest.
        similarity: mean of the held-out images' nearest similarity.
        distance: Wasserstein distance of that distribution to the test images' (NaN without test images).
    """

    cut: float
    groups: int
    largest: float
    similarity: float
    distance: float


@dataclass(frozen=True)
class Grouping:
    """What was chosen, and what else there was.

    Attributes:
        component: ``(N,)`` int, the group of each image.
        chosen: the candidate taken.
        candidates: all that were measured.
        test_similarity: mean nearest similarity of test images to the training images (NaN without).
        held, test: the two distributions, for a picture: nearest similarities under the chosen folds, and of test.
        plain: the first of these under near-duplicate folds.
        auc: of a classifier that tells test from training images by their embedding; 0.5 = alike (NaN without test).
        reason: in words.
    """

    component: Ints
    chosen: Candidate
    candidates: list[Candidate]
    test_similarity: float
    held: Floats = field(repr=False)
    test: Floats = field(repr=False)
    plain: Floats = field(repr=False)
    auc: float = float("nan")
    reason: str = ""


Assign = Callable[[Ints], Ints]  # (N,) group numbers -> (N,) folds


def choose(train: Floats, test: Floats | None, pairs: Ints, assign: Assign, folds: int, seed: int = 0) -> Grouping:
    """Choose the grouping whose held-out images are as far from their training folds as test is from train.

    Args:
        train: ``(N, F)`` embeddings of the training images.
        test: ``(T, F)`` of the test images, or None: then near-duplicates alone are kept together.
        pairs: ``(P, 2)`` rows that are near-duplicates whatever the embedding says.
        assign: makes the folds that a grouping would get.
        folds: how many; a grouping needs more groups than that.
        seed: of the images asked.
    """
    own, new = _unit(train, test)
    plain = components(len(own), pairs)
    rng = np.random.default_rng(seed)
    asked = np.sort(rng.permutation(len(own))[:ASKED])
    far = np.zeros(0, np.float32) if new is None else nearest(new[rng.permutation(len(new))[:ASKED]], own)
    options: list[tuple[float, Ints]] = [(0.0, plain)]
    if new is not None:
        options += [(cut, _joined(part, pairs)) for cut, part in zip(CUTS, _clusters(own, seed), strict=True)]
    options = [one for one in options if one[0] == 0 or _possible(one[1], folds)]
    held = _held_out(own, asked, [assign(part) for _, part in options])
    candidates = [
        Candidate(
            cut, int(part.max()) + 1, float(np.bincount(part).max() / len(part)), float(near.mean()),
            float(wasserstein_distance(near, far)) if len(far) else float("nan"),
        )
        for (cut, part), near in zip(options, held, strict=True)
    ]  # fmt: skip
    best = 0 if not len(far) else _parsimonious(candidates, held, far, rng)
    reason = _reason(candidates, best, far)
    mean = float(far.mean()) if len(far) else float("nan")
    auc = adversarial_auc(own[asked], new[rng.permutation(len(new))[:ASKED]])[0] if new is not None else float("nan")
    return Grouping(options[best][1], candidates[best], candidates, mean, held[best], far, held[0], auc, reason)


def _unit(train: Floats, test: Floats | None) -> tuple[Floats, Floats | None]:
    """Centre on the training images and scale rows to length 1: cosine similarity is then a product."""
    centre = train.mean(axis=0)

    def scaled(rows: Floats) -> Floats:
        part = rows - centre
        part /= np.linalg.norm(part, axis=1, keepdims=True).clip(1e-9)
        unit: Floats = part.astype(np.float32)
        return unit

    return scaled(train), scaled(test) if test is not None and len(test) else None


def nearest(rows: Floats, others: Floats, block: int = 256) -> Floats:
    """``(R,)`` cosine similarity of each row to its nearest among `others`."""
    parts = [(rows[start : start + block] @ others.T).max(axis=1) for start in range(0, len(rows), block)]
    return np.concatenate(parts).astype(np.float32)


def _held_out(own: Floats, asked: Ints, folds: Sequence[Ints], block: int = 256) -> list[Floats]:
    """Per fold assignment, the asked images' similarity to the nearest image of another fold."""
    found: list[list[Any]] = [[] for _ in folds]
    for start in range(0, len(asked), block):
        rows = asked[start : start + block]
        similarity = own[rows] @ own.T
        for place, fold in enumerate(folds):
            apart = np.where(fold[rows][:, None] != fold[None], similarity, -1)
            found[place].append(apart.max(axis=1))
    return [np.concatenate(part).astype(np.float32) for part in found]


def _clusters(own: Floats, seed: int, cuts: Sequence[float] = CUTS) -> list[Ints]:
    """Average-linkage clusters at each cut; of cluster averages where there are too many images for all pairs."""
    leader = np.arange(len(own), dtype=np.int64)
    means = own
    if len(own) > LEADERS:
        leader, means = _leaders(own, seed)
    if len(means) < 2:  # one image, or thousands that are all the same: no tree grows from that
        return [np.zeros(len(own), np.int64) for _ in cuts]
    apart = np.clip(1 - means @ means.T, 0, 2)
    tree = linkage(apart[np.triu_indices(len(means), 1)], "average")
    return [np.asarray(fcluster(tree, cut, "distance"), np.int64)[leader] - 1 for cut in cuts]


def _leaders(own: Floats, seed: int) -> tuple[Ints, Floats]:
    """`LEADERS` small clusters: each image goes with its nearest of as many drawn images, then their means."""
    drawn = own[np.random.default_rng(seed).permutation(len(own))[:LEADERS]]
    blocks = [(own[start : start + 2048] @ drawn.T).argmax(axis=1) for start in range(0, len(own), 2048)]
    _, leader = np.unique(np.concatenate(blocks), return_inverse=True)
    sums = np.zeros((int(leader.max()) + 1, own.shape[1]), np.float64)
    np.add.at(sums, leader, own)
    return leader.astype(np.int64), (sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-9)).astype(np.float32)


def _joined(cluster: Ints, pairs: Ints) -> Ints:
    """Clusters joined by near-duplicate pairs, numbered 0 … G-1."""
    links = np.stack([cluster[pairs[:, 0]], cluster[pairs[:, 1]]], axis=1) if len(pairs) else pairs
    merged = components(int(cluster.max()) + 1, links)[cluster]
    return np.unique(merged, return_inverse=True)[1].astype(np.int64)


def _possible(part: Ints, folds: int) -> bool:
    sizes = np.bincount(part)
    return len(sizes) >= 2 * folds and bool(sizes.max() <= max(LARGEST * len(part), 1))


def _parsimonious(candidates: list[Candidate], held: list[Floats], far: Floats, rng: np.random.Generator) -> int:
    """The least grouping that is as good as the best up to the noise of having asked so few images."""
    distances = np.array([one.distance for one in candidates])
    best = int(np.argmin(distances))
    again = [
        wasserstein_distance(rng.choice(held[best], len(held[best])), rng.choice(far, len(far))) for _ in range(30)
    ]
    return int(np.flatnonzero(distances <= distances[best] + float(np.std(again)))[0])


def _reason(candidates: list[Candidate], best: int, far: Floats) -> str:
    chosen, plain = candidates[best], candidates[0]
    if not len(far):
        return "near-duplicates kept together; without test images there is nothing to match the distance to"
    test = f"test images are {far.mean():.3f} like their nearest training image, held-out ones"
    if best == 0:
        return f"{test} {plain.similarity:.3f} in plain folds: train and test are alike, near-duplicates kept together"
    return f"{test} {plain.similarity:.3f} in plain folds and {chosen.similarity:.3f} with groups cut at {chosen.cut:g}"


def follow(known: Sequence[str], new: Floats, old: Floats, cut: float) -> list[str]:
    """Group new images with old ones: each goes to the group of its nearest old image if that is nearer than `cut`.

    Args:
        known: ``(N,)`` group names of the old images.
        new: ``(M, F)`` embeddings. old: ``(N, F)``.
        cut: cosine distance the old groups were cut at; 0 = never by embedding.

    Returns:
        ``(M,)`` group names, '' where no old image is near.
    """
    if cut <= 0 or not len(new) or not len(old):
        return [""] * len(new)
    mine, theirs = _unit(old, new)
    assert theirs is not None  # there are new images
    found = []
    for start in range(0, len(theirs), 256):
        similarity = theirs[start : start + 256] @ mine.T
        best = similarity.argmax(axis=1)
        near = similarity[np.arange(len(best)), best] > 1 - cut
        found += [known[row] if close else "" for row, close in zip(best.tolist(), near.tolist(), strict=True)]
    return found


def gather(rows: Floats, new: Ints, pairs: Ints, cut: float) -> Ints:
    """Group new images among themselves, as `choose` groups images at its cut.

    Args:
        rows: ``(N, F)`` embeddings of all training images: the new ones are seen from the middle of all of them.
        new: ``(M,)`` which of them to group.
        pairs: ``(P, 2)`` places in `new` that belong together whatever the embedding says.
        cut: cosine distance the old groups were cut at. A finer one is taken where it would make a group of more
            than `LARGEST` of all images: a shipment of another kind of picture is no scene.

    Returns:
        ``(M,)`` int, the group of each.
    """
    own, _ = _unit(rows, None)
    cuts = [cut, *(one for one in reversed(CUTS) if one < cut)]
    options = [_joined(part, pairs) for part in _clusters(own[new], 0, cuts)] if len(new) else []
    fitting = (part for part in options if np.bincount(part).max() <= max(LARGEST * len(rows), 1))
    return next(fitting, components(len(new), pairs))
