"""Lineage: what a new manifest takes over from the one before it, and how the two differ.

Old samples keep their fold and group whatever happens around them; new ones go with their group, then where they are
missing. An image that was re-encoded has new bytes, hence a new id: it is recognised by its looks.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold.data import manifest as manifests
from octofold.data.journal import Journal
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import atomic, existing
from octofold.prepare import neighbours

FILE = "fingerprints.npz"


@dataclass(frozen=True)
class Fingerprints:
    """Looks of images by id, remembered after the files are gone."""

    ids: npt.NDArray[np.str_]  # (N,) unique
    phash: npt.NDArray[np.uint64]  # (N,)
    tiny: npt.NDArray[np.uint8]  # (N, D)

    def save(self, folder: Path) -> None:
        """Write them beside a manifest, with whatever was remembered there before."""
        before = read(folder)
        fresh = ~np.isin(before.ids, self.ids)
        with atomic(folder / FILE) as temporary:
            np.savez(
                temporary,
                ids=np.concatenate([self.ids, before.ids[fresh]]),
                phash=np.concatenate([self.phash, before.phash[fresh]]),
                tiny=np.concatenate([self.tiny, before.tiny[fresh].reshape(-1, self.tiny.shape[1])]),
            )


def read(folder: Path) -> Fingerprints:
    """Read what is remembered beside a manifest; nothing, if nothing is.

    Raises:
        UserError: the file is there and is no such file.
    """
    if not (folder / FILE).exists():
        return Fingerprints(np.zeros(0, "U16"), np.zeros(0, np.uint64), np.zeros((0, 0), np.uint8))
    try:
        with np.load(folder / FILE) as data:
            return Fingerprints(data["ids"], data["phash"], data["tiny"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            folder / FILE, expected="fingerprints that prepare wrote", got=str(error), fix="remove it"
        ) from error


def same_looks(gone: Sequence[str], new: Fingerprints, folder: Path) -> dict[str, str]:
    """Match ids that are gone with new ids whose images look the same: ``{old id: new id}``, one to one.

    Args:
        gone: ids that no image has any more.
        new: looks of the images whose ids were not known before.
        folder: where the looks of the old ones are remembered.
    """
    memory = read(folder)
    old = np.isin(memory.ids, np.array(sorted(gone), dtype=str))
    if not old.any() or not len(new.ids):
        return {}
    ids = np.concatenate([memory.ids[old], new.ids])
    phash, tiny = np.concatenate([memory.phash[old], new.phash]), np.concatenate([memory.tiny[old], new.tiny])
    pairs = neighbours.near_pairs(phash, tiny)
    pairs = pairs[(pairs[:, 0] < old.sum()) & (pairs[:, 1] >= old.sum())]
    apart = np.abs(tiny[pairs[:, 0]].astype(np.int16) - tiny[pairs[:, 1]]).mean(axis=1)
    found: dict[str, str] = {}
    for row in np.argsort(apart, kind="stable"):
        one, other = (str(ids[place]) for place in pairs[row])
        if one not in found and other not in found.values():
            found[one] = other
    return found


def re_encoded(old: Manifest, prints: Fingerprints, folder: Path, judged: Iterable[str]) -> dict[str, str]:
    """Which images of the manifest before have new bytes now: ``{old id: new id}``.

    Only an image never seen before can be another's new bytes: one that was here then and was dropped, or has a
    decision of its own, is itself, however much it looks like one that is gone.

    Args:
        old: the manifest before.
        prints: looks of the images that are here now.
        folder: where the looks of the old ones are remembered.
        judged: ids with a decision of their own.
    """
    seen = {*old.sample_ids.tolist(), *read(folder).ids.tolist(), *judged}
    fresh = np.array([name not in seen for name in prints.ids.tolist()], bool)
    new = Fingerprints(prints.ids[fresh], prints.phash[fresh], prints.tiny[fresh])
    return same_looks(sorted(set(old.sample_ids.tolist()) - set(prints.ids.tolist())), new, folder)


def carry(table: pd.DataFrame, previous: Manifest, same: dict[str, str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Folds (-1 where new) and groups ('' where new or alone) that each row had before.

    A sample that was dropped and is back (its drop undone) takes the fold it had then: earlier versions are asked.

    Args:
        table: the new samples.
        previous: the manifest before.
        same: ``{old id: new id}`` of re-encoded images.
    """
    fold: dict[str, int] = {}
    group: dict[str, str] = {}
    for version in _ancestry(previous):
        names = [same.get(name, name) for name in version.sample_ids.tolist()]
        groups = version.table["group"].fillna("").astype(str) if "group" in version.table else [""] * len(names)
        for name, number, kin in zip(names, version.fold.tolist(), groups, strict=True):
            if name not in fold:
                fold[name], group[name] = number, kin
    ids = table["sample_id"].tolist()
    return np.array([fold.get(name, -1) for name in ids], np.int64), [group.get(name, "") for name in ids]


def _ancestry(manifest: Manifest) -> Iterator[Manifest]:
    """The manifest and those it was made from, as far as they are kept."""
    seen: set[str] = set()
    home = manifest.file.parent if manifest.file else None
    current: Manifest | None = manifest
    while current is not None:
        yield current
        name = str(current.info.get("previous", ""))
        path = home / "versions" / name / "manifest.csv" if home and name and name not in seen else None
        seen.add(name)
        current = manifests.read(path) if path is not None and path.exists() else None


def find_previous(given: Path | None, out: Path, wanted: bool) -> Manifest | None:
    """The manifest before: the one named, or, where `wanted`, the one that prepare is about to replace."""
    if given is not None:
        return _read(existing(given, "the manifest before (--previous)"))
    return _read(out / "manifest.csv") if wanted and (out / "manifest.csv").exists() else None


def _read(path: Path) -> Manifest:
    """Read a manifest; where prepare was cut between its description and its table, the version that the table is."""
    try:
        return manifests.read(path)
    except UserError:
        kept = path.parent / "versions" / manifests.read(path, by_hash=False).hash[:12] / "manifest.csv"
        if not kept.exists():
            raise
        return replace(manifests.read(kept), file=path)


def check_folds(old: Manifest, folds: int | None, holdout: float | None) -> None:
    """Refuse a number of folds, or a share held out, that samples which keep their folds cannot have.

    Raises:
        UserError: the manifest before has another number of folds.
    """
    wanted = 2 if holdout is not None else folds
    if wanted is not None and wanted != len(old.folds):
        raise UserError(
            "--previous, --decisions",
            expected=f"the {len(old.folds)} folds of {old.file}, which its samples keep",
            got=f"--folds {folds}" if holdout is None else f"--holdout {holdout}",
            fix="leave it out, or make other folds from scratch in another --out",
        )


def judged_labels(table: pd.DataFrame, decided: Journal, names: tuple[str, ...]) -> list[str]:
    """Labels where each image has several: the one that a review gave it or kept, as long as a row still says that."""
    rows = list(zip(table["sample_id"], table["label"], strict=True))
    judged = decided.decisions()
    said = {
        name: label
        for name, label in rows
        if name in judged and (judged[name].action, judged[name].label) == ("keep", label)
    }
    given = {name: entry.target for name, one in judged.items() if (entry := decided.relabel_of(one))}
    said |= {name: target for name, target in given.items() if target in names}
    return [said.get(name, label) for name, label in rows]


def applied(journal: Path | None, decided: pd.DataFrame | None, table: pd.DataFrame) -> dict[str, Any]:
    """What `check_decisions` has to know of a manifest: how many decisions changed it, and where they are.

    A keep changes a label where it confirms a relabel, and so does whatever settled an image under two (``torn``).
    """
    if decided is None:
        return {}
    torn = table["sample_id"][table["torn"]].tolist() if "torn" in table else list[str]()
    stands = ~decided["outcome"].isin(["gone", "conflict", "unknown class"])
    count = int((stands & ((decided["before"] != decided["after"]) | decided["sample_id"].isin(torn))).sum())
    return {"decisions": {"file": str(journal), "applied": count}} if count else {}


def check_decisions(old: Manifest) -> None:
    """Refuse to follow a manifest without the decisions that made it: every one would be taken back.

    Raises:
        UserError: it has some.
    """
    if made := old.info.get("decisions"):
        raise UserError(
            "--previous",
            expected=f"--decisions as well: {made['applied']} of them changed {old.file}",
            got="none: what was dropped would be back, what was relabelled would have its raw label",
            fix=f"--decisions {made['file']} (an empty file takes them all back)",
        )


def differences(old: Manifest, new: Manifest, same: dict[str, str]) -> pd.DataFrame:
    """How two versions differ: ``sample_id, path, change, before, after``, one row per change.

    ``change`` is new, gone, re-encoded, relabelled, moved (its points) or fold.
    """
    before = {same.get(str(row["sample_id"]), str(row["sample_id"])): row for row in old.table.to_dict("records")}
    after = {str(row["sample_id"]): row for row in new.table.to_dict("records")}
    encoded = {value: key for key, value in same.items()}
    rows: list[tuple[str, Any, str, str, str]] = []
    for name, row in before.items():
        if name not in after:
            rows.append((name, row["path"], "gone", str(row.get("label", "")), ""))
    for name, row in after.items():
        was = before.get(name)
        if was is None:
            rows.append((name, row["path"], "new", "", str(row.get("label", ""))))
            continue
        if name in encoded:
            rows.append((name, row["path"], "re-encoded", encoded[name], name))
        if was.get("label", "") != row.get("label", ""):
            rows.append((name, row["path"], "relabelled", str(was["label"]), str(row["label"])))
        points = new.point_columns()
        if any(
            was.get(column) != row[column] and not pd.isna([was.get(column), row[column]]).all() for column in points
        ):
            rows.append((name, row["path"], "moved", "", ""))
        if was["fold"] != row["fold"]:
            rows.append((name, row["path"], "fold", str(was["fold"]), str(row["fold"])))
    return pd.DataFrame(rows, columns=["sample_id", "path", "change", "before", "after"])


def archive(out: Path, new_hash: str) -> Path | None:
    """Keep a manifest that is about to be replaced by another: copy it to ``versions/<its hash>/``; return where."""
    path = out / "manifest.csv"
    try:
        old = manifests.read(path)
    except UserError:
        return None  # nothing there, or nothing that a hash could name
    if old.hash == new_hash:
        return None
    kept = out / "versions" / old.hash[:12]
    info = {**old.info}
    Manifest(old.table, old.task, old.classes, old.competition, old.images, info).save(kept / "manifest.csv")
    if (out / "classes.json").exists():
        with atomic(kept / "classes.json") as temporary:
            shutil.copyfile(out / "classes.json", temporary)
    return kept / "manifest.csv"
