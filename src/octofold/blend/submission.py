"""Submissions: predictions written in the sample submission's rows and columns, and checked against it row by row."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import atomic, existing
from octofold.nets import landmarks
from octofold.predictions import Predictions


def write(predictions: Predictions, test: Manifest, path: Path | str, label_type: str = "") -> Path:
    """Write the submission, whole or not at all.

    Args:
        predictions: one row per test `sample_id`; columns are matched by class name.
        test: what `prepare` wrote as ``test.csv``: column ``names`` lists every file name of that content, and `info`
            says where the sample submission is and what its columns mean.
        path: the CSV to write.
        label_type: ``int`` or ``str``; empty = what the test manifest says.

    Raises:
        UserError: a row without a prediction, columns that mean nothing to us, or a written file that does not match
            the sample row by row.
    """
    path = Path(path)
    rows = row_names(test)
    order, columns, source, separator = _wanted(test, rows)
    missing = [name for name in order if name not in rows]
    if missing:
        raise UserError(
            source,
            expected="a test image for every row",
            got=f"{len(missing)} without one: {preview(missing)}",
            fix="put the images in the folder of --test_images and run prepare again",
        )
    speaks = predictions.reorder(test.classes) if test.classes else predictions
    place = {sample_id: row for row, sample_id in enumerate(speaks.sample_ids.tolist())}
    silent = [name for name in order if rows[name] not in place]
    if silent:
        raise UserError(
            f"member '{speaks.member}'", expected="a prediction for every row", got=f"none: {preview(silent)}"
        )
    values = speaks.values[[place[rows[name]] for name in order]]  # one content under two names: two equal rows
    table = pd.DataFrame(_columns(values, speaks.classes, test, columns, order, label_type), columns=columns)
    with atomic(path) as temporary:
        table.to_csv(temporary, sep=separator, index=False, lineterminator="\n", float_format="%.7g")
        _check(temporary, order, columns, test, source, separator)
    return path


def row_names(test: Manifest) -> dict[str, str]:
    """Return which sample each name in the submission stands for: ``{name: sample_id}``.

    Raises:
        UserError: one name for two samples.
    """
    where = test.file or "test manifest"
    found: dict[str, str] = {}
    ids = test.sample_ids.tolist()
    lists = test.table["names"].map(json.loads) if "names" in test.table else test.table["path"].map(lambda p: [p])
    for sample_id, names in zip(ids, lists, strict=True):
        for name in names:
            if found.setdefault(str(name), sample_id) != sample_id:
                raise UserError(where, expected="each row of the submission once", got=f"two images for {name!r}")
    return found


def _wanted(test: Manifest, rows: dict[str, str]) -> tuple[list[str], list[str], object, str]:
    """The submission's row names in order, its columns, where that was read, and what separates its cells."""
    sample = test.info.get("sample_submission")
    if not sample and test.info.get("style") == landmarks.STYLE:
        asked = len(_asked(test)[next(iter(rows))])
        return (
            list(rows),
            [str(test.info["image_column"]), *landmarks.columns(asked)],
            test.file or "test manifest",
            ",",
        )
    if not sample:
        label = [f"{p}{s}" for p in test.classes for s in _suffixes(test)] if test.task == "keypoints" else ["label"]
        return list(rows), ["image", *label], test.file or "test manifest", ","
    beside = test.file.parent / str(sample) if test.file else Path(str(sample))
    path = existing(beside, "the sample submission (CSV)", "run prepare again with --sample_submission")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, sep=None, engine="python", encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        raise UserError(path, expected="a CSV", got=str(error)) from error
    key = str(test.info.get("image_column", table.columns[0]))
    if key not in table:
        raise UserError(path, expected=f"a column '{key}'", got=preview(table.columns, 12))
    repeated = table[key][table[key].duplicated()]
    if len(repeated):
        raise UserError(path, expected=f"each id of '{key}' once", got=f"two rows for {preview(repeated)}")
    columns = [str(name) for name in table.columns]
    return table[key].tolist(), columns, path, _separator(path, columns)


def _separator(path: Path, columns: list[str]) -> str:
    """What gives a sample's first line these columns; pandas finds it out, but does not tell."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line in filter(str.strip, file):
            return next((one for one in ",;\t| " if next(csv.reader([line], delimiter=one)) == columns), ",")
    return ","


def _asked(test: Manifest) -> dict[str, list[int]]:
    """The points each row of the submission is asked for, by its name."""
    return {name: found for text in test.table["points"] for name, found in json.loads(text).items()}


def _suffixes(test: Manifest) -> list[str]:
    return list(test.info.get("point_suffixes", ["_x", "_y"]))


def _columns(
    values: npt.NDArray[np.float32],
    classes: tuple[str, ...],
    test: Manifest,
    columns: list[str],
    order: list[str],
    label_type: str,
) -> dict[str, Any]:
    """Fill every column: the id, then the label, or a probability per class, or two coordinates per point."""
    key = str(test.info.get("image_column", columns[0]))
    filled: dict[str, Any] = {key: order}
    # of labels like 001, which are numbers to us, and of names in another Unicode form
    spelling = test.info.get("spelling", {})
    if test.info.get("style") == landmarks.STYLE:
        lists = _asked(test)
        picked = landmarks.chosen(values, [lists[name] for name in order])
        filled |= dict(zip(landmarks.columns(picked.shape[1] // 2), picked.T, strict=True))
    elif values.ndim == 3:
        for place, point in enumerate(classes):
            for axis in (0, 1):
                names = {f"{point}_{'xy'[axis]}", f"{point}_{'XY'[axis]}", f"{point}{_suffixes(test)[axis]}"}
                filled |= {name: values[:, place, axis] for name in names if name in columns}
    elif test.info.get("style") == "probabilities":
        filled |= {spelling.get(name, name): values[:, place] for place, name in enumerate(classes)}
    else:
        labels = np.array(classes, dtype=object)[values.argmax(axis=1)]
        whole = (label_type or test.info.get("label_type")) == "int"
        label = str(test.info.get("label_column", "label"))
        filled[label] = [spelling.get(name, int(name) if whole else name) for name in labels]
    unknown = [name for name in columns if name not in filled]
    lost = [name for name in filled if name not in columns]
    if unknown or lost:
        raise UserError(
            str(test.info.get("sample_submission", "sample submission")),
            expected=f"columns {preview(filled, 12)}",
            got=(f"also {preview(unknown)}" if unknown else f"no {preview(lost)}"),
            fix="remove what is not to be predicted, or name the columns by prepare's --image_column, --label_column",
        )
    return filled


def _check(path: Path, order: list[str], columns: list[str], test: Manifest, source: object, separator: str) -> None:
    """Read the written file back as a stranger would and hold it against the sample."""
    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    where = f"the submission against {source}"
    if list(table.columns) != columns:
        raise UserError(where, expected=f"columns {columns}", got=str(list(table.columns)))
    key = str(test.info.get("image_column", columns[0]))
    odd = [row for row, (mine, theirs) in enumerate(zip(table[key], order, strict=False)) if mine != theirs]
    if len(table) != len(order) or odd:
        at = f"first difference in row {odd[0] + 2}" if odd else f"{len(table)} rows"
        raise UserError(where, expected=f"{len(order)} rows in the sample's order", got=at)
    empty = [name for name in columns if (table[name] == "").any()]
    if empty:
        raise UserError(where, expected="no empty field", got=f"some in {preview(empty)}")
