"""The manifest: the table of samples, with a hash that everything derived from it carries."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold.errors import UserError, preview
from octofold.files import atomic, existing, read_json, sha256_json, write_json


@dataclass(frozen=True)
class Manifest:
    """Samples of one competition, train or test.

    Attributes:
        table: columns ``sample_id, path, [label | <point>_x, <point>_y …], group, fold`` plus the user's own.
            `sample_id` unique; `path` relative to `images`; `fold` int (train only); missing points NaN.
        task: ``classify`` or ``keypoints``.
        classes: class names in the model's column order, or point names.
        competition: name of the problem.
        images: folder that `path` is relative to.
        info: whatever else prepare wants to keep (sample submission, label type, swap table …); JSON.
        file: where it was read from.
    """

    table: pd.DataFrame
    task: str
    classes: tuple[str, ...]
    competition: str
    images: Path
    info: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None

    @property
    def sample_ids(self) -> npt.NDArray[np.str_]:
        """``(N,)`` text, unique."""
        return self.table["sample_id"].to_numpy(str)

    @property
    def fold(self) -> npt.NDArray[np.int64]:
        """``(N,)`` int, the fold each sample is held out of."""
        return self.table["fold"].to_numpy(np.int64)

    @property
    def folds(self) -> list[int]:
        """Fold numbers that occur, sorted."""
        return sorted(set(self.fold.tolist()))

    @property
    def groups(self) -> npt.NDArray[np.str_]:
        """``(N,)`` text: the group of each sample (its own id where it has none)."""
        group = self.table["group"] if "group" in self.table else pd.Series([""] * len(self.table))
        return np.where(group.fillna("").astype(str) == "", self.sample_ids, group.astype(str)).astype(str)

    @property
    def paths(self) -> list[Path]:
        """Absolute path of each sample's image."""
        return [self.images / name for name in self.table["path"]]

    @property
    def is_labelled(self) -> bool:
        """Whether the truth is here (train) or not (test)."""
        return "label" in self.table or (bool(self.classes) and f"{self.classes[0]}_x" in self.table)

    @property
    def target(self) -> npt.NDArray[Any]:
        """``(N,)`` int64 class index, or ``(N, P, 2)`` float32 points in original pixels, NaN where missing."""
        if self.task == "classify":
            place = {name: column for column, name in enumerate(self.classes)}
            return np.array([place[name] for name in self.table["label"]], dtype=np.int64)
        columns = [f"{name}_{axis}" for name in self.classes for axis in "xy"]
        return self.table[columns].to_numpy(np.float32).reshape(len(self.table), -1, 2)

    @property
    def hash(self) -> str:
        """Hex sha256 of what training sees: ids, targets, groups, folds, class order; not paths, not row order."""
        counted = [name for name in ("label", "fold", *self.point_columns()) if name in self.table]
        rows = self.table.assign(group=self.groups)[["sample_id", "group", *counted]].sort_values("sample_id")
        text = rows.to_csv(index=False, float_format="%.4f", lineterminator="\n")
        return sha256_json([self.task, list(self.classes), text])

    def point_columns(self) -> list[str]:
        """``<point>_x, <point>_y …`` for keypoints, none for classes."""
        return [f"{name}_{axis}" for name in self.classes for axis in "xy"] if self.task == "keypoints" else []

    def take(self, rows: npt.NDArray[Any]) -> "Manifest":
        """Return the samples at these positions (or under this mask), in that order."""
        return replace(
            self, table=self.table.iloc[np.flatnonzero(rows) if rows.dtype == bool else rows].reset_index(drop=True)
        )

    def save(self, path: Path | str) -> Path:
        """Write the CSV and, beside it, ``<name>.json`` with task, classes and image folder.

        Each is whole or as it was; both are ready before either is replaced, the table last.
        """
        path = Path(path)
        about = {
            "task": self.task,
            "classes": list(self.classes),
            "competition": self.competition,
            "images": _portable(self.images, path.parent),
            "info": self.info,
            "hash": self.hash if "fold" in self.table else "",
        }
        text = self.table.to_csv(index=False, lineterminator="\n")
        if "\r" in text:  # csv would leave it bare, and a reader would see a line's end
            text = self.table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)
        with atomic(path) as temporary:
            temporary.write_bytes(text.encode())
            write_json(path.with_suffix(".json"), about)
        return path


def _portable(images: Path, folder: Path) -> str:
    """The image folder relative to the manifest where it lies inside or beside it, so that both can move together."""
    images, folder = images.resolve(), folder.resolve()
    return str(images.relative_to(folder)) if images.is_relative_to(folder) else str(images)


def read(path: Path | str, by_hash: bool = True) -> Manifest:
    """Read a manifest and check it.

    Args:
        path: the CSV; its description lies beside it.
        by_hash: hold its hash against the description's too.

    Raises:
        UserError: missing files or columns, repeated ids, an unknown label, a fold that is no number, or a table
            that was edited by hand after prepare (its hash differs).
    """
    path = existing(path, "a manifest (CSV)", "run prepare first")
    header = read_json(path.with_suffix(".json"), "the manifest's description (JSON)")
    try:
        table = pd.read_csv(
            path, dtype={"sample_id": str, "path": str, "label": str, "group": str}, keep_default_na=False, na_values={}
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        raise UserError(path, expected="a CSV that prepare wrote", got=str(error)) from error
    _check_header(header, path.with_suffix(".json"))
    manifest = Manifest(
        table=table,
        task=header["task"],
        classes=tuple(header["classes"]),
        file=path,
        competition=header["competition"],
        images=(path.parent / header["images"]).resolve(),
        info=header["info"],
    )
    _check(manifest, path)
    if by_hash and header.get("hash") and header["hash"] != manifest.hash:
        raise UserError(
            path,
            expected=f"manifest hash {header['hash'][:12]}",
            got=manifest.hash[:12],
            fix="run prepare again (labels are changed by decisions, never by hand)",
        )
    return manifest


def _check_header(header: Any, path: Path) -> None:
    kinds = {"task": str, "classes": list, "competition": str, "images": str, "info": dict, "hash": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(header, dict) or type(header.get(name)) is not kind]
    if wrong:
        raise UserError(path, expected=", ".join(kinds), got=f"no (or odd) {preview(wrong)}", fix="run prepare again")
    names = header["classes"]
    if header["task"] not in ("classify", "keypoints") or not all(isinstance(name, str) for name in names):
        raise UserError(path, expected="task classify or keypoints, class names as text", got=str(header["task"]))
    if len(set(names)) != len(names) or "\0" in header["images"]:
        raise UserError(path, expected="distinct class names", got=preview(names))


def _check(manifest: Manifest, path: Path) -> None:
    table = manifest.table
    missing = [name for name in ("sample_id", "path") if name not in table]
    if missing:
        raise UserError(path, expected="columns sample_id, path", got=f"no {', '.join(missing)}")
    outside = [name for name in table["path"] if name.startswith("/") or "\0" in name or ".." in name.split("/")]
    if outside:
        raise UserError(path, expected=f"paths inside {manifest.images}", got=preview(map(repr, outside)))
    repeated = table["sample_id"][table["sample_id"].duplicated()]
    if len(repeated):
        raise UserError(path, expected="each sample_id once", got=f"repeated: {preview(repeated)}")
    if "label" in table:
        unknown = sorted(set(table["label"]) - set(manifest.classes))
        if unknown:
            raise UserError(path, expected=f"labels among {preview(manifest.classes, 8)}", got=preview(unknown))
    for name in manifest.point_columns() if manifest.is_labelled else []:
        if name not in table:
            raise UserError(path, expected=f"column {name}", got=preview(table.columns, 12))
        number = pd.to_numeric(table[name], errors="coerce")
        odd = number.isna() & (table[name].astype(str).str.strip() != "") & table[name].notna()
        if odd.any() or np.isinf(number).any():
            raise UserError(
                path,
                expected=f"numbers (or nothing) in column {name}",
                got=preview(table[name][odd | np.isinf(number)]),
            )
        table[name] = number
    if "fold" in table:
        fold = pd.to_numeric(table["fold"], errors="coerce")
        if fold.isna().any() or (fold != fold.round()).any() or (fold < 0).any():
            raise UserError(
                path, expected="whole fold numbers >= 0", got=preview(table["fold"][fold.isna() | (fold < 0)])
            )
        table["fold"] = fold.astype(np.int64)


def check_folds(manifest: Manifest, folds: Sequence[int] | None) -> list[int]:
    """Return the folds asked for (all, if None), refusing numbers the manifest does not have.

    Raises:
        UserError: an unknown fold, or none at all.
    """
    wanted = manifest.folds if folds is None else sorted(set(folds))
    unknown = sorted(set(wanted) - set(manifest.folds))
    if not wanted:
        raise UserError("folds", expected=f"fold numbers in {manifest.folds}", got="none", fix="leave it out for all")
    if unknown:
        raise UserError("folds", expected=f"fold numbers in {manifest.folds}", got=preview(unknown))
    return wanted
