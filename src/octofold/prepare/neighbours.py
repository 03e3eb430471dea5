"""Neighbours: which images are nearly the same picture. Linear time: hashes meet in buckets, never all pairs."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ints = npt.NDArray[np.int64]
BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # (first bit, bits)
MOST_BITS = len(BANDS) - 1  # two hashes at most this far apart agree on some whole band (pigeonhole)
MOST_DIFFERENCE = 10.0  # mean absolute difference of the 8 x 8 RGB pictures, of 255
BUCKET = 200  # a fuller bucket (blank images) is chained, not paired
ALIKE = 0.9  # cosine similarity of centred embeddings: a mirrored or brightened copy has more, another photo rarely
TABLES, CELL = 24, 8  # tables of hyperplanes, images that share a cell in the mean: at ALIKE 97 % meet among 100,000


def near_pairs(phash: npt.NDArray[np.uint64], tiny: npt.NDArray[np.uint8]) -> Ints:
    """Find near-duplicates.

    Args:
        phash: ``(N,)`` perceptual hashes.
        tiny: ``(N, D)`` uint8, the images shrunk.

    Returns:
        ``(P, 2)`` pairs (i < j): hashes differ in at most 4 of 64 bits and the shrunken images by at most 10 of 255.
    """
    chain, leaders = _same(phash, tiny)
    found = [chain]
    for first, bits in BANDS:
        key = (phash[leaders] >> np.uint64(first)) & np.uint64((1 << bits) - 1)
        found.append(_close(leaders[_bucket_pairs(key)], phash, tiny))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _same(phash: npt.NDArray[np.uint64], tiny: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Chain images that look exactly alike (a thousand blank ones) in pairs; return those and one of each."""
    rows = np.ascontiguousarray(np.concatenate([phash[:, None].view(np.uint8).reshape(len(phash), 8), tiny], axis=1))
    key = rows.view(np.dtype((np.void, rows.shape[1]))).reshape(-1)
    order = np.argsort(key, kind="stable")
    same = key[order][1:] == key[order][:-1]
    chain = np.stack([order[:-1][same], order[1:][same]], axis=1).astype(np.int64)
    return chain, np.sort(order[np.r_[True, ~same]]) if len(order) else order


def _bucket_pairs(key: npt.NDArray[np.uint64], most: int = BUCKET) -> Ints:
    """All pairs inside buckets of equal key, vectorised by distance in sorted order; of a fuller one those nearby."""
    order = np.argsort(key, kind="stable")
    ranked = key[order]
    found = []
    for step in range(1, min(most, len(order))):
        same = np.flatnonzero(ranked[step:] == ranked[:-step])
        if not len(same):
            break
        found.append(np.stack([order[same], order[same + step]], axis=1))
    return np.sort(np.concatenate(found), axis=1) if found else np.zeros((0, 2), np.int64)


def _close(pairs: Ints, phash: npt.NDArray[np.uint64], tiny: npt.NDArray[np.uint8]) -> Ints:
    kept = [pairs[:0]]
    for start in range(0, len(pairs), 100_000):
        part = pairs[start : start + 100_000]
        part = part[np.bitwise_count(phash[part[:, 0]] ^ phash[part[:, 1]]) <= MOST_BITS]
        apart = np.abs(tiny[part[:, 0]].astype(np.int16) - tiny[part[:, 1]]).mean(axis=1)
        kept.append(part[apart <= MOST_DIFFERENCE])
    return np.concatenate(kept)


def alike_pairs(unit: npt.NDArray[np.float32], seed: int = 0) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Find images whose embeddings nearly coincide: mirrored, recoloured, cut, or photographed twice.

    Who lies on the same side of a few random hyperplanes meets in a bucket (Charikar 2002, "Similarity estimation
    techniques from rounding algorithms"); who meets is compared, first by all its sides, then exactly.

    Args:
        unit: ``(N, F)`` embeddings, centred, rows of length 1.
        seed: of the hyperplanes.

    Returns:
        ``(P, 2)`` pairs (i < j) and ``(P,)`` their cosine similarity, at least `ALIKE`; the most alike first.
    """
    bits = int(np.clip(math.log2(max(2, len(unit) / CELL)), 1, 16))
    planes = np.random.default_rng(seed).standard_normal((unit.shape[1], TABLES * bits)).astype(np.float32)
    side = np.concatenate([unit[start : start + 4096] @ planes > 0 for start in range(0, max(1, len(unit)), 4096)])
    packed, share = np.packbits(side, axis=1), math.acos(ALIKE) / math.pi
    most = TABLES * bits * share + 3 * math.sqrt(TABLES * bits * share * (1 - share))
    found = [np.zeros((0, 2), np.int64)]
    for table in range(TABLES):
        key = side[:, table * bits : (table + 1) * bits] @ (1 << np.arange(bits, dtype=np.uint64))
        pairs = _bucket_pairs(key, 8 * CELL)
        for start in range(0, len(pairs), 100_000):
            part = pairs[start : start + 100_000]
            apart = np.bitwise_count(packed[part[:, 0]] ^ packed[part[:, 1]]).sum(axis=1, dtype=np.int64)
            found.append(part[apart <= most])
    pairs = np.unique(np.concatenate(found), axis=0)
    blocks = [pairs[start : start + 10_000] for start in range(0, max(1, len(pairs)), 10_000)]
    similarity = np.concatenate([np.einsum("pf,pf->p", unit[part[:, 0]], unit[part[:, 1]]) for part in blocks])
    order = np.argsort(-similarity, kind="stable")
    order = order[similarity[order] >= ALIKE]
    return pairs[order], similarity[order]


def components(count: int, pairs: Ints) -> Ints:
    """``(count,)`` the number of each item's connected component."""
    ones = np.ones(len(pairs), np.int8)
    graph = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def group_names(component: Ints, sample_ids: Sequence[str]) -> list[str]:
    """Name each component by its smallest sample id: the name does not depend on row order; singles get ''."""
    names = np.asarray(sample_ids, dtype=str)
    order = np.lexsort((names, component))
    first = np.flatnonzero(np.r_[True, np.diff(component[order]) != 0])
    leader = dict(zip(component[order][first].tolist(), names[order][first].tolist(), strict=True))
    size = np.bincount(component)
    return [f"near-{leader[number]}" if size[number] > 1 else "" for number in component.tolist()]
