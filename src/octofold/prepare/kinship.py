"""Kinship: which samples belong together, by their looks, by their embedding, or as an earlier manifest had it."""

from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octofold.nets import embedding
from octofold.prepare import grouping, neighbours
from octofold.prepare.lineage import Fingerprints

Ints = npt.NDArray[np.int64]


CROWD = 0.1  # share of the images; a chain of twins that is longer is no set of copies


class Rows(NamedTuple):
    """Images to be grouped."""

    ids: list[str]
    paths: list[Path]
    prints: Fingerprints


NO_TWINS = np.zeros((0, 2), np.int64), np.zeros(0, np.float32)


def twins(
    train: Rows, test: Rows | None, sides: npt.NDArray[Any], folder: Path, known: Ints
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Find images that differ pixel by pixel and yet show the same, by their embedding.

    Scans too small for an embedding have none: their pixels were compared as they are.

    Args:
        train, test, sides, folder: as for `choose`.
        known: ``(P, 2)`` pairs of train that need no embedding.

    Returns:
        ``(P, 2)`` other pairs, test rows counted after the training rows, and their similarity; most alike first.
    """
    name = embedding.choose(sides)
    ids = train.ids + (test.ids if test else [])
    paths = train.paths + (test.paths if test else [])
    if name != "pixels":
        vectors, name = embedding.embed_or_pixels(name, ids, paths, np.zeros((len(ids), 1), np.uint8), folder)
    if name == "pixels":
        return NO_TWINS
    vectors -= vectors[: len(train.ids)].mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)
    found, similarity = neighbours.alike_pairs(vectors)
    seen = set(map(tuple, known.tolist()))
    new = [pair not in seen and ids[pair[0]] != ids[pair[1]] for pair in map(tuple, found.tolist())]
    return found[new], similarity[new]


def joined(rows: Rows, pairs: Ints, more: Ints, is_old: npt.NDArray[np.bool_] | None = None) -> Ints:
    """Return `pairs` with `more`, unless these would chain a crowd together that no fold could hold.

    Args:
        rows: all images.
        pairs: near-duplicate rows.
        more: twins.
        is_old: rows that an earlier manifest had; what it left apart stays apart.
    """
    both = np.concatenate([pairs, more])
    if not len(more) or np.bincount(neighbours.components(len(rows.ids), both)).max() > max(2, CROWD * len(rows.ids)):
        return pairs
    return both if is_old is None else np.concatenate([pairs, more[~is_old[more].all(axis=1)]])


def choose(
    train: Rows, test: Rows | None, pairs: Ints, sides: npt.NDArray[Any], assign: Callable[[Ints], Ints],
    folds: int, seed: int, folder: Path,
) -> tuple[list[str], tuple[grouping.Grouping, str] | None]:  # fmt: skip
    """Group training images so that folds are as far apart as the test images are from train.

    Args:
        train, test: images; without test images, near-duplicates alone are grouped.
        pairs: near-duplicate rows of train.
        sides: ``(N,)`` short sides, px: they decide what embedding makes sense.
        assign: group numbers to folds.
        folds, seed: of the assignment.
        folder: where embeddings are kept.

    Returns:
        group names ('' = alone), and what was chosen by which embedding.
    """
    if test is None:
        return neighbours.group_names(neighbours.components(len(train.ids), pairs), train.ids), None
    name = embedding.choose(sides)
    own, name = embedding.embed_or_pixels(name, train.ids, train.paths, train.prints.tiny, folder)
    new, _ = embedding.embed_or_pixels(name, test.ids, test.paths, test.prints.tiny, folder)
    chosen = grouping.choose(own, new, pairs, assign, folds, seed)
    return neighbours.group_names(chosen.component, train.ids), (chosen, name)


def follow(
    rows: Rows, pairs: Ints, is_old: npt.NDArray[np.bool_], group: list[str], known: dict[str, Any], folder: Path
) -> list[str]:
    """Group where there was a manifest before: old samples keep their group, new ones join the nearest, or each other.

    Args:
        rows: all images.
        pairs: near-duplicate rows.
        is_old: ``(N,)`` which rows the earlier manifest had.
        group: ``(N,)`` their groups then, '' = alone (or new).
        known: ``cut`` and ``embedding`` of the earlier grouping, if it was chosen by one.
        folder: where embeddings are kept.

    Returns:
        ``(N,)`` group names.
    """
    component = neighbours.components(len(rows.ids), pairs)
    looks = neighbours.group_names(component, rows.ids)
    home: dict[int, str] = {}  # the group that each set of near-duplicates belongs to
    for row in np.flatnonzero(is_old).tolist():
        home.setdefault(int(component[row]), group[row] or looks[row])
    cut = float(known.get("cut", 0))
    fresh = np.flatnonzero(~is_old)
    vectors = None
    lone: dict[str, str] = {}  # old samples that get company
    if cut > 0 and len(fresh):
        vectors, _ = embedding.embed_or_pixels(str(known["embedding"]), rows.ids, rows.paths, rows.prints.tiny, folder)
        old = np.flatnonzero(is_old).tolist()
        names = [group[row] or looks[row] or f"near-{rows.ids[row]}" for row in old]
        for row, name in zip(fresh.tolist(), grouping.follow(names, vectors[fresh], vectors[old], cut), strict=True):
            if name and int(component[row]) not in home:
                home[int(component[row])] = name
                lone[name.removeprefix("near-")] = name
    homeless = np.array([row for row in fresh.tolist() if int(component[row]) not in home], np.int64)
    taken = {*group, *home.values()}
    own = dict(zip(homeless.tolist(), _new_groups(rows, homeless, pairs, vectors, cut, taken), strict=True))
    return [
        (group[row] or looks[row] or lone.get(rows.ids[row], "")) if is_old[row]
        else home.get(int(component[row])) or own.get(row, "")
        for row in range(len(rows.ids))
    ]  # fmt: skip


def _new_groups(
    rows: Rows, new: Ints, pairs: Ints, vectors: npt.NDArray[np.float32] | None, cut: float, taken: set[str]
) -> list[str]:
    """``(M,)`` names for new samples that no old group takes in: grouped among themselves, under names of their own.

    Args:
        rows, pairs: as for `follow`. new: ``(M,)`` places in `rows`, ascending.
        vectors: ``(N, F)`` embeddings of all rows, or None: near-duplicates alone are grouped.
        cut: cosine distance the old groups were cut at.
        taken: names that old groups have.
    """
    mine = np.searchsorted(new, pairs[np.isin(pairs, new).all(axis=1)])
    part = neighbours.components(len(new), mine) if vectors is None else grouping.gather(vectors, new, mine, cut)
    if not len(new):
        return []
    names = neighbours.group_names(part, [rows.ids[row] for row in new.tolist()])
    # an id that was dropped, left its name to a group and is back must not take that group over
    free = {name: _unused(name, taken) for name in set(names) - {""}}
    return [free.get(name, "") for name in names]


def _unused(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it where it is taken."""
    return next(one for one in chain([name], (f"{name}-{number}" for number in count(2))) if one not in taken)
