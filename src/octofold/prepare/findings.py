"""Findings: everything odd about the images, by file name, and what was done about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold.data.folders import left_out
from octofold.errors import UserError, preview

Ints = npt.NDArray[np.int64]
COLUMNS = ("set", "file", "sample_id", "kind", "detail", "action")


@dataclass
class Findings:
    """Rows of ``problems.csv``: ``set`` (train, test, journal), ``file, sample_id, kind, detail, action``."""

    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, where: str, row: Any, kind: str, detail: str = "", action: str = "kept") -> None:
        """Note something about a row that has ``file`` (or ``path``) and ``sample_id``."""
        file = getattr(row, "file", None) or getattr(row, "path", "")
        self.rows.append((where, str(file), str(row.sample_id), kind, detail, action))

    def absent(self, where: str, folder: Path) -> None:
        """Note the files under a folder of images that nobody looks at."""
        self.unseen(where, left_out(folder))

    def unseen(self, where: str, names: list[tuple[str, str]]) -> None:
        """Note files and folders that nobody looks at, and why."""
        self.rows += [(where, name, "", "not looked at", why, "left out") for name, why in names]

    def group(self, name: str) -> None:
        """Note a group that lies in several folds."""
        self.rows.append(
            ("train", "", name.removeprefix("near-"), "group crosses folds", name, "kept: those folds were given")
        )

    def line(self, journal: Path, number: int, what: str) -> None:
        """Note a line of the journal of decisions that is no entry."""
        self.rows.append(("journal", journal.name, "", "damaged line", f"line {number}: {what}", "left out"))

    def table(self) -> pd.DataFrame:
        """All of them."""
        return pd.DataFrame(self.rows, columns=list(COLUMNS))


def settle(table: pd.DataFrame, targets: list[str], conflicts: str, found: Findings) -> Ints:
    """Decide which rows stay: readable, each content once, no content under two labels.

    Args:
        table: ``file, sample_id, odd, problem``, the columns `targets`, perhaps ``fold``; a fresh index.
        targets: columns that must agree between copies of one image.
        conflicts: ``drop`` or ``refuse``.
        found: takes what was found.

    Returns:
        positions of the rows that stay.

    Raises:
        UserError: `conflicts` is ``refuse`` and there are some; copies in two folds of a folds file.
    """
    for row in table[(table["odd"] != "") & (table["problem"] == "")].itertuples():
        found.add("train", row, str(row.odd))
    for row in table[table["problem"] != ""].itertuples():
        found.add("train", row, "unreadable", str(row.problem), "left out")
    good = table[table["problem"] == ""]
    copies = good[good["sample_id"].duplicated(keep=False)]
    distinct = copies.drop_duplicates(["sample_id", *targets])
    torn = set(distinct["sample_id"][distinct["sample_id"].duplicated()])
    if torn and conflicts == "refuse":
        raise UserError(
            "labels",
            expected="one label per image content",
            got=f"{len(torn)} images under two: {preview(copies['file'][copies['sample_id'].isin(torn)])}",
            fix="mend the labels, or --conflicts drop",
        )
    for name, same in copies.groupby("sample_id", sort=False):
        _settle_copies(same, name in torn, found)
    kept = ~good["sample_id"].isin(torn) & ~good["sample_id"].duplicated()
    return good.index[kept].to_numpy(np.int64)


def _settle_copies(same: pd.DataFrame, torn: bool, found: Findings) -> None:
    files = same["file"].tolist()
    labels = f"; labels {preview(sorted(set(same['label'])))}" if torn and "label" in same else ""
    for row in same.itertuples() if torn else same.iloc[1:].itertuples():
        twin = files[0] if row.file != files[0] else files[1]
        found.add(
            "train",
            row,
            "two labels" if torn else "copy",
            f"same bytes as {twin}{labels}",
            "left out" if torn else "merged",
        )
    if "fold" in same and same["fold"].nunique() > 1:
        raise UserError("folds file", expected="copies of an image in one fold", got=f"several for {preview(files)}")


def report_outside(table: pd.DataFrame, points: Sequence[str], found: Findings) -> None:
    """Note points that lie outside their picture by more than a pixel: the picture was turned or scaled since?

    Args:
        table: ``file, sample_id, width, height`` (upright, px) and ``<point>_x, <point>_y``.
        points: their names.
        found: takes what was found.
    """
    xy = table[[f"{name}_{axis}" for name in points for axis in "xy"]].to_numpy(float).reshape(len(table), -1, 2)
    size = table[["width", "height"]].to_numpy(float)[:, None]
    outside = np.any((xy < -1) | (xy > size), axis=2)  # NaN is neither
    for row, marks, out in zip(table.itertuples(), xy, outside, strict=True):
        if out.any():
            which = [f"{points[n]} ({marks[n, 0]:g}, {marks[n, 1]:g})" for n in np.flatnonzero(out).tolist()]
            found.add("train", row, "points outside", f"{preview(which)} of {row.width} x {row.height} px")


def report_pairs(table: pd.DataFrame, pairs: Ints, found: Findings) -> None:
    """Note near-duplicates among the training images, and whether their labels or folds differ."""
    files, fold = table["file"].tolist(), table["fold"].tolist()
    labels = table["label"].tolist() if "label" in table else [""] * len(table)
    rows = list(table[["file", "sample_id"]].itertuples())
    for one, other in pairs.tolist():
        kind = "near-duplicate, other label" if labels[one] != labels[other] else "near-duplicate"
        action = "kept" if fold[one] == fold[other] else f"kept, but in folds {fold[one]} and {fold[other]}"
        found.add("train", rows[other], kind, f"looks like {files[one]}", action)


def report_alike(
    table: pd.DataFrame, test: pd.DataFrame | None, pairs: Ints, similarity: npt.NDArray[Any], found: Findings
) -> None:
    """Note what only the embedding shows to be nearly the same; each image once, beside the one it is most like.

    Args:
        table: the training samples.
        test: the test samples, or None.
        pairs: rows of both, test rows counted after the training rows; the most alike first.
        similarity: of each pair.
    """
    columns = ["sample_id", "file", "label", "fold"]
    rows = table.assign(label=table["label"] if "label" in table else "")[columns]
    if test is not None:
        rows = pd.concat([rows, test[["sample_id", "path"]].set_axis(["sample_id", "file"], axis=1)], ignore_index=True)
    listed = list(rows.itertuples())
    _, first = np.unique(pairs[:, 1], return_index=True)
    for place in np.sort(first).tolist():
        one, other = (listed[row] for row in pairs[place].tolist())
        if pairs[place, 0] >= len(table):
            continue  # two test images
        text = f"similarity {similarity[place]:.2f} to"
        if pairs[place, 1] >= len(table):
            found.add("train", one, "near-duplicate in test (embedding)", f"{text} {other.file}")
            continue
        kind = "near-duplicate (embedding)" + (", other label" if one.label != other.label else "")
        same = one.fold == other.fold
        action = "kept" if same else f"kept, but in folds {one.fold:.0f} and {other.fold:.0f}"
        found.add("train", other, kind, f"{text} {one.file}", action)


def report_shared(table: pd.DataFrame, test: pd.DataFrame, pairs: Ints, found: Findings) -> None:
    """Note copies and near-duplicates across train and test: no error, but the score on them says little.

    Args:
        table: the training samples.
        test: the test samples, ``sample_id, path``.
        pairs: near-duplicates among both, test rows counted after the training rows.
    """
    place: Mapping[str, str] = dict(zip(test["sample_id"], test["path"], strict=True))
    for row in table[table["sample_id"].isin(place)].itertuples():
        found.add("train", row, "copy in test", f"same bytes as {place[str(row.sample_id)]}")
    rows, twins = list(table[["file", "sample_id"]].itertuples()), list(test[["path", "sample_id"]].itertuples())
    for one, other in pairs[(pairs[:, 0] < len(rows)) & (pairs[:, 1] >= len(rows))].tolist():
        twin = twins[other - len(rows)]
        if rows[one].sample_id != twin.sample_id:
            found.add("train", rows[one], "near-duplicate in test", f"looks like {twin.path}")
