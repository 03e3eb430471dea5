"""Folds: who is held out together. Groups never cross, classes stay balanced, old samples keep their fold."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold.errors import UserError, preview

Ints = npt.NDArray[np.int64]


def assign(
    groups: Sequence[str] | npt.NDArray[np.str_],
    labels: Sequence[str] | npt.NDArray[np.str_] | None,
    folds: int,
    seed: int = 0,
) -> Ints:
    """Give each sample a fold.

    Biggest groups first (equal sizes in an order drawn from `seed`), each to the fold that has least of its classes
    so far: with groups of one this is stratified k-fold, exact to one sample per class and fold.

    Args:
        groups: ``(N,)`` text; samples of one group share a fold.
        labels: ``(N,)`` text to stratify by, or None (points).
        folds: how many.
        seed: of the order.

    Returns:
        ``(N,)`` int, 0 … folds-1.

    Raises:
        UserError: fewer groups than folds.
    """
    group, label = _numbered(groups, labels, folds)
    return _deal(np.full(len(group), -1, np.int64), group, label, folds, seed)


def extend(
    groups: Sequence[str] | npt.NDArray[np.str_],
    labels: Sequence[str] | npt.NDArray[np.str_] | None,
    kept: Ints,
    before: Ints,
    seed: int = 0,
) -> Ints:
    """Give new samples a fold of an earlier manifest, whatever its numbers; folds keep their shares of each class.

    Args:
        groups, labels, seed: as in `assign`.
        kept: ``(N,)`` folds of the earlier manifest, -1 where the sample is new. Old samples keep theirs even where
            a new group joins two folds; a new sample goes with its group's old members (the fold most of them have).
        before: ``(M,)`` the folds of all samples of that manifest; how big each is says what share it is to have.

    Returns:
        ``(N,)`` int, numbers from `before` (or `kept`).

    Raises:
        UserError: fewer groups than folds.
    """
    numbers, sizes = np.unique(np.concatenate([before, kept[kept >= 0]]), return_counts=True)
    group, label = _numbered(groups, labels, len(numbers))
    fold = np.where(kept >= 0, np.searchsorted(numbers, kept), -1).astype(np.int64)
    _follow_group(fold, group, len(numbers))
    owner = _parts(sizes / sizes.sum())
    part = np.full(len(fold), -1, np.int64)
    for place in range(len(numbers)):  # what a fold has lies evenly in its parts: all of them want more alike
        rows, mine = np.flatnonzero(fold == place), np.flatnonzero(owner == place)
        alone = np.arange(len(rows), dtype=np.int64)
        part[rows] = mine[_deal(np.full(len(rows), -1, np.int64), alone, label[rows], len(mine), seed)]
    found: Ints = numbers[owner[_deal(part, group, label, len(owner), seed)]].astype(np.int64)
    return found


def _parts(shares: npt.NDArray[np.float64]) -> Ints:
    """``(P,)`` the fold each of P equal parts belongs to: the fewest parts that give folds their shares within 5 %."""

    def whole(count: int) -> Ints:
        return np.maximum(np.round(shares * count), 1).astype(np.int64)

    def error(count: int) -> float:
        mine = whole(count)
        return float(np.abs(mine / mine.sum() / shares - 1).max())

    counts = range(len(shares), len(shares) + 100)
    best = next((count for count in counts if error(count) <= 0.05), min(counts, key=error))
    return np.repeat(np.arange(len(shares), dtype=np.int64), whole(best))


def _numbered(
    groups: Sequence[str] | npt.NDArray[np.str_], labels: Sequence[str] | npt.NDArray[np.str_] | None, folds: int
) -> tuple[Ints, Ints]:
    """``(N,)`` numbers of groups and of labels, 0 …; refuses fewer groups than folds."""
    group = pd.factorize(np.asarray(groups, dtype=str))[0].astype(np.int64)
    label = np.zeros(len(group), np.int64) if labels is None else pd.factorize(np.asarray(labels, dtype=str))[0]
    count = int(group.max(initial=-1)) + 1
    if count < folds:
        raise UserError(
            "folds",
            expected=f"at least {folds} groups for {folds} folds",
            got=f"{count}",
            fix="fewer --folds, or another --group",
        )
    return group, label.astype(np.int64)


def _deal(fold: Ints, group: Ints, label: Ints, folds: int, seed: int) -> Ints:
    """Fill in ``(N,)`` folds that are -1, as `assign` says; in place, and returned."""
    counts = np.zeros((folds, int(label.max(initial=0)) + 1))
    np.add.at(counts, (fold[fold >= 0], label[fold >= 0]), 1)
    target = np.maximum(np.bincount(label, minlength=counts.shape[1]), 1)
    rows = np.flatnonzero(fold < 0)
    rows = rows[np.argsort(group[rows], kind="stable")]
    starts = np.flatnonzero(np.r_[True, np.diff(group[rows]) != 0]) if len(rows) else np.array([], np.int64)
    parts = np.split(rows, starts[1:]) if len(rows) else []
    sizes = np.array([len(part) for part in parts], np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(parts))
    for place in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        part = parts[place]
        mine, amount = np.unique(label[part], return_counts=True)
        # what the squared imbalance grows by, per fold: of the classes first, then of the totals
        growth = (counts[:, mine] / target[mine]) @ amount + 1e-3 * counts.sum(axis=1) / len(group) * len(part)
        chosen = int(np.argmin(growth))
        fold[part] = chosen
        counts[chosen, mine] += amount
    return fold


def hold_out(
    groups: Sequence[str] | npt.NDArray[np.str_],
    labels: Sequence[str] | npt.NDArray[np.str_] | None,
    share: float,
    seed: int = 0,
) -> Ints:
    """Hold a share out as fold 0, stratified and by whole groups; the rest is fold 1. Arguments as in `assign`."""

    def held_of(count: int) -> int:
        return min(max(1, round(share * count)), count - 1)  # neither fold is ever empty

    most = min(200, len(np.unique(np.asarray(groups, dtype=str))))
    parts = min(
        range(2, max(2, most) + 1), key=lambda count: (max(0.0, abs(held_of(count) / count - share) - 0.005), count)
    )
    return np.asarray(assign(groups, labels, parts, seed) >= held_of(parts), dtype=np.int64)


def _follow_group(fold: Ints, group: Ints, folds: int) -> None:
    """New samples (fold -1) whose group has old members take the fold most of those have; in place."""
    old = fold >= 0
    if not old.any() or old.all():
        return
    votes = pd.crosstab(group[old], fold[old]).reindex(columns=range(folds), fill_value=0)
    leader = dict(zip(votes.index.tolist(), votes.to_numpy().argmax(axis=1).tolist(), strict=True))
    for row in np.flatnonzero(~old):
        fold[row] = leader.get(int(group[row]), -1)


def crossing(groups: npt.NDArray[np.str_], fold: Ints) -> list[str]:
    """Names of the groups that lie in more than one fold."""
    spread = pd.Series(np.asarray(fold)).groupby(np.asarray(groups, dtype=str)).nunique()
    return [str(name) for name in spread.index[spread > 1]]


def from_file(table: pd.DataFrame, files: Sequence[str], labels: Sequence[str] | None, where: object) -> Ints:
    """Take folds from a table ``image, [label,] fold`` whose images were already located.

    Args:
        table: columns ``file`` (as in `files`), ``fold`` and perhaps ``label``, text.
        files: ``(N,)`` the files that need a fold.
        labels: ``(N,)`` what the labels say, checked against the table's where it has them.
        where: what errors call the table.

    Raises:
        UserError: a fold that is no whole number, two folds for an image, none for one, another label.
    """
    number = pd.to_numeric(table["fold"], errors="coerce")
    odd = number.isna() | (number < 0) | (number != number.round()) | (number > 1000)
    if odd.any():
        raise UserError(where, expected="whole fold numbers >= 0", got=preview(table["fold"][odd].map(repr)))
    given = pd.DataFrame({"file": table["file"], "fold": number.astype(int)}).drop_duplicates()
    twice = given["file"][given["file"].duplicated()]
    if len(twice):
        raise UserError(where, expected="one fold per image", got=f"two for {preview(twice)}")
    place = dict(zip(given["file"], given["fold"], strict=True))
    missing = [name for name in files if name not in place]
    if missing:
        raise UserError(
            where, expected="a fold for every labelled image", got=f"{len(missing)} without: {preview(missing)}"
        )
    if labels is not None and "label" in table:
        said = dict(zip(table["file"], table["label"], strict=True))
        other = [
            f"{name} ({said[name]}, labels say {label})"
            for name, label in zip(files, labels, strict=True)
            if said[name] != label
        ]
        if other:
            raise UserError(where, expected="the same labels as --labels", got=f"{len(other)} differ: {preview(other)}")
    fold = np.array([place[name] for name in files], np.int64)
    if len(set(fold.tolist())) < 2:
        raise UserError(where, expected="at least two folds", got=f"{len(set(fold.tolist()))}")
    return fold
