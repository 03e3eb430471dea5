"""Predictions: the joint on which all hangs. One writer, one reader, every check here.

Members meet through these files only. Rows are matched by `sample_id` and columns by class name, never by position.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.errors import UserError, preview
from octofold.files import atomic, existing

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Predictions:
    """What one model (or bag) says of some samples.

    Attributes:
        sample_ids: ``(N,)`` text, unique.
        values: ``(N, K)`` float32 probabilities in [0, 1], rows sum to 1; or ``(N, P, 2)`` float32 points,
            x and y in pixels of the original image, for keypoints.
        classes: the K class names, or the P point names, in column order.
        manifest_hash: of the manifest the model trained on.
        member: recipe name.
        model_sha: sha256 of the weights that spoke (of the sorted list, for a bag).
        views: row of `tta.VIEWS` they were averaged over.
        fold: ``(N,)`` int, the fold each row was **held out** of while its model trained (out-of-fold),
            or None: the rows are new to the model (test).
        seed: of the training, or None for a bag of seeds.
        extra: anything else worth carrying (engine, precision, run id …); JSON.
    """

    sample_ids: Ids
    values: Floats
    classes: tuple[str, ...]
    manifest_hash: str
    member: str
    model_sha: str
    views: str
    fold: npt.NDArray[np.int64] | None = None
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_ids", np.asarray(self.sample_ids, dtype=str))
        object.__setattr__(self, "values", np.ascontiguousarray(self.values, dtype=np.float32))
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        if self.fold is not None:
            object.__setattr__(self, "fold", np.asarray(self.fold, dtype=np.int64))
        self._check()

    @property
    def is_oof(self) -> bool:
        """Whether the rows are out-of-fold predictions of training samples."""
        return self.fold is not None

    @property
    def is_points(self) -> bool:
        """Whether the values are points, not probabilities."""
        return self.values.ndim == 3

    def _check(self) -> None:
        where = f"predictions of member '{self.member}'"
        n, shape = len(self.sample_ids), self.values.shape
        columns = (n, len(self.classes), 2) if self.is_points else (n, len(self.classes))
        if self.sample_ids.ndim != 1 or shape != columns:
            raise UserError(where, expected=f"values of shape {columns}", got=str(shape))
        if len(set(self.classes)) != len(self.classes):
            raise UserError(where, expected="distinct class names", got=preview(self.classes))
        ids, counts = np.unique(self.sample_ids, return_counts=True)
        if (counts > 1).any():
            raise UserError(where, expected="each sample id once", got=f"repeated: {preview(ids[counts > 1])}")
        if self.fold is not None and self.fold.shape != (n,):
            raise UserError(where, expected=f"one fold per row ({n})", got=str(self.fold.shape))
        bad = ~np.isfinite(self.values).all(axis=tuple(range(1, self.values.ndim)))
        if bad.any():
            raise UserError(where, expected="finite values", got=f"NaN or infinite at {preview(self.sample_ids[bad])}")
        if not self.is_points and n:
            off = (np.abs(self.values.sum(axis=1) - 1) > 1e-3) | (self.values.min(axis=1) < -1e-6)
            if off.any():
                raise UserError(
                    where,
                    expected="probabilities that sum to 1",
                    got=f"rows that do not: {preview(self.sample_ids[off])}",
                )

    def take(self, sample_ids: Sequence[str] | Ids) -> "Predictions":
        """Return these rows in the order asked for.

        Raises:
            UserError: an id that is not here.
        """
        place = {name: row for row, name in enumerate(self.sample_ids.tolist())}
        missing = [name for name in map(str, sample_ids) if name not in place]
        if missing:
            raise UserError(
                f"predictions of member '{self.member}'",
                expected=f"{len(sample_ids)} sample ids",
                got=f"{len(missing)} missing: {preview(missing)}",
            )
        rows = np.array([place[str(name)] for name in sample_ids], dtype=np.int64)
        return replace(
            self,
            sample_ids=self.sample_ids[rows],
            values=self.values[rows],
            fold=None if self.fold is None else self.fold[rows],
        )

    def reorder(self, classes: Sequence[str]) -> "Predictions":
        """Return the columns in the order of `classes`.

        Raises:
            UserError: the names differ.
        """
        if set(classes) != set(self.classes):
            odd = sorted(set(classes) ^ set(self.classes))
            raise UserError(
                f"predictions of member '{self.member}'",
                expected="the same class names",
                got=f"different: {preview(odd)}",
            )
        columns = [self.classes.index(name) for name in classes]
        return replace(self, classes=tuple(classes), values=self.values[:, columns])

    def save(self, path: Path | str, csv: bool = False) -> Path:
        """Write parquet (atomically), with a readable CSV beside it if asked; return the parquet's path."""
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"sample_id": self.sample_ids.astype(object)}
        if self.fold is not None:
            columns["fold"] = self.fold
        flat = self.values.reshape(len(self.sample_ids), len(self._column_names()))  # -1 cannot tell where N is 0
        columns |= {name: flat[:, column] for column, name in enumerate(self._column_names())}
        frame = pd.DataFrame(columns)
        header = {name: getattr(self, name) for name in _HEADER} | {"is_points": self.is_points}
        table = pa.Table.from_pandas(frame, preserve_index=False)
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), b"octofold": json.dumps(header).encode()}
        )
        path = Path(path).with_suffix(".parquet")
        with atomic(path) as temporary:
            pq.write_table(table, temporary)
        if csv:
            with atomic(path.with_suffix(".csv")) as temporary:
                frame.to_csv(temporary, index=False)
        return path

    def _column_names(self) -> list[str]:
        if self.is_points:
            return [f"{name}_{axis}" for name in self.classes for axis in "xy"]
        return [f"p_{name}" for name in self.classes]

    @classmethod
    def load(cls, path: Path | str) -> "Predictions":
        """Read what `save` wrote, checking everything again.

        Raises:
            UserError: no file, not such a file, or contents that break a rule.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = existing(path, "a predictions file (.parquet)")
        try:
            table = pq.read_table(path)
            header = json.loads((table.schema.metadata or {})[b"octofold"])
            points = bool(header.pop("is_points"))
            if odd := set(header) ^ set(_HEADER):
                raise ValueError(f"more or fewer facts than this version knows: {preview(sorted(odd))}")
            count = len(header["classes"]) * (2 if points else 1)
            frame = table.to_pandas()
            values = frame.iloc[:, -count:].to_numpy(np.float32)
            fold = frame["fold"].to_numpy(np.int64) if "fold" in frame.columns[:2] else None
            ids = frame["sample_id"].to_numpy(str)
        except (pa.ArrowException, KeyError, ValueError, OSError, TypeError, IndexError) as error:
            raise UserError(path, expected="a predictions file written by infer or train", got=str(error)) from error
        shape = (len(frame), len(header["classes"]), 2) if points else (len(frame), len(header["classes"]))
        return cls(sample_ids=ids, values=values.reshape(shape), fold=fold, **header)


_HEADER = ("classes", "manifest_hash", "member", "model_sha", "views", "seed", "extra")


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Join the folds of one member and seed into one OOF; each id exactly once.

    Raises:
        UserError: nothing to join, other classes, views or manifests, or an id held out twice.
    """
    first = _agreeing(parts)
    parts = [part.reorder(first.classes) for part in parts]
    fold = None
    if all(part.fold is not None for part in parts):
        fold = np.concatenate([part.fold for part in parts if part.fold is not None])
    return replace(
        first,
        sample_ids=np.concatenate([part.sample_ids for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        fold=fold,
        model_sha=bag_sha([part.model_sha for part in parts]),
    )


def average(parts: Sequence[Predictions], weights: Sequence[float] | None = None) -> Predictions:
    """Bag predictions of the same samples (seeds, or fold models on test rows): weighted mean, aligned by id and class.

    Raises:
        UserError: the parts disagree on ids, classes, views or manifest, or weights do not fit.
    """
    first = _agreeing(parts)
    share = np.full(len(parts), 1 / len(parts)) if weights is None else np.asarray(weights, dtype=np.float64)
    if share.shape != (len(parts),) or (share < 0).any() or not np.isclose(share.sum(), 1, atol=1e-6):
        raise UserError("bag weights", expected=f"{len(parts)} numbers >= 0 that sum to 1", got=str(share.tolist()))
    aligned = [part.reorder(first.classes).take(first.sample_ids) for part in parts]
    if any(len(part.sample_ids) != len(first.sample_ids) for part in parts):
        raise UserError(
            f"bag of member '{first.member}'", expected="the same samples in each part", got="different counts"
        )
    mean = sum(weight * part.values.astype(np.float64) for weight, part in zip(share, aligned, strict=True))
    seeds = {part.seed for part in parts}
    return replace(
        first,
        values=np.asarray(mean, dtype=np.float32),
        model_sha=bag_sha([part.model_sha for part in parts]),
        seed=first.seed if len(seeds) == 1 else None,
    )


def align(members: Sequence[Predictions]) -> tuple[Floats, Ids, tuple[str, ...]]:
    """Stack members over the same samples.

    Returns:
        values ``(M, N, K)`` or ``(M, N, P, 2)`` float32, ids ``(N,)`` in the first member's order, its classes.

    Raises:
        UserError: members differ in samples, classes, views or manifest hash; the message names which and how.
    """
    first = _agreeing(members)
    for other in members[1:]:
        odd = set(first.sample_ids.tolist()) ^ set(other.sample_ids.tolist())
        if odd:
            raise UserError(
                f"members '{first.member}' and '{other.member}'",
                expected="the same samples",
                got=f"{len(odd)} that only one has (first: {preview(sorted(odd), 3)})",
                fix="train the missing folds, or leave one member out",
            )
    aligned = [member.reorder(first.classes).take(first.sample_ids) for member in members]
    return np.stack([member.values for member in aligned]), first.sample_ids, first.classes


def bag_sha(shas: Sequence[str]) -> str:
    """Name a set of weights: one sha as it is, several as the sha256 of their sorted list."""
    import hashlib

    names = sorted(set(shas))
    return names[0] if len(names) == 1 else hashlib.sha256("\n".join(names).encode()).hexdigest()


def _agreeing(parts: Sequence[Predictions]) -> Predictions:
    if not parts:
        raise UserError("predictions", expected="at least one file", got="none")
    first = parts[0]
    for other in parts[1:]:
        for name in ("manifest_hash", "views"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise UserError(
                    f"members '{first.member}' and '{other.member}'",
                    expected=f"the same {name}",
                    got=f"{mine[:12]} and {theirs[:12]}",
                    fix="train both on one manifest and predict both with the same views, or leave one member out",
                )
        if first.is_points != other.is_points:
            raise UserError(
                f"members '{first.member}' and '{other.member}'", expected="one task", got="classes and points"
            )
    return first
