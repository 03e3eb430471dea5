"""Sources: what the user has (a CSV with images, class folders, a sample submission) read into one plain table.

Every name in a user's file is checked here: it must lead to a file inside the folder it is relative to.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from octofold.data.folders import SUFFIXES, find_images, refuse_unseen
from octofold.errors import UserError, preview
from octofold.files import existing, read_json
from octofold.prepare.places import locate

WHOLE = re.compile(r"[+-]?\d+(\.0+)?")
PADDED = re.compile(r"0[0-9]+")  # 001: a number to us, but a submission has to write it so
RESERVED = {"sample_id", "path", "fold", "file", "name", "names", "width", "height", "group", "label", "row"} | {
    "torn", "sha256", "mode", "odd", "brightness", "contrast", "sharpness", "problem"}  # fmt: skip
POINT = re.compile(r"(.+)_([xyXY])")


@dataclass(frozen=True)
class Source:
    """Labelled images before anyone looked at a pixel.

    Attributes:
        table: ``file`` (posix path relative to `images`) and ``label`` (text) or ``<point>_x, <point>_y`` (float,
            NaN = occluded), then the user's other columns as text.
        images: folder, absolute.
        names: class names in their stored order, or point names.
        info: ``label_type`` (int or str), ``spelling`` (how they write what we write otherwise: ``{"1": "001"}``),
            ``point_suffixes`` as the user writes them, ``renamed`` (columns of theirs that would hide ours, and their
            new names), and what else is worth keeping.
    """

    table: pd.DataFrame
    images: Path
    names: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)


def read_table(path: Path | str, what: str = "a CSV file") -> pd.DataFrame:
    """Read a CSV (comma, semicolon or tab) as text, every cell as it is written; nothing is repaired in silence.

    A column name that comes twice gets ``.1``, as pandas would name it.

    Raises:
        UserError: no file, not UTF-8, no header, broken quotes, rows longer or shorter than the header.
    """
    path = existing(path, what)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(path, expected=f"{what}, UTF-8 text", got=str(error), fix="save it as UTF-8") from error
    head = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",\t;", key=head.count), strict=True)
    rows = []
    try:
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                raise csv.Error(f"{len(row)} fields in line {reader.line_num}, the header has {len(header)}")
            if row:
                rows.append(row)
    except csv.Error as error:
        raise UserError(path, expected=f"{what}: a header and rows as long", got=str(error)) from error
    if not any(header):
        raise UserError(path, expected=f"{what}: a header and rows as long", got="no header")
    columns: list[str] = []
    for name in header:
        twins = header[: len(columns)].count(name)
        columns.append(f"{name}.{twins}" if twins else name)
    if len(set(columns)) != len(columns):
        raise UserError(path, expected="distinct column names", got=preview(columns, 12))
    if columns[0] == "scorer":
        return _landmarks(header, rows, path)
    return pd.DataFrame(rows, columns=columns, dtype=str)


def _landmarks(header: list[str], rows: list[list[str]], path: Path) -> pd.DataFrame:
    """DeepLabCut's and Lightning Pose's tables: three or four header rows, ``<point>_x, <point>_y`` afterwards.

    The first columns name the image (newer ones in three parts); likelihoods are left out.
    """
    heads = {row[0]: row for row in rows[:3] if row[0] in ("individuals", "bodyparts", "coords")}
    if not {"bodyparts", "coords"} <= set(heads):
        raise UserError(
            path, expected="header rows scorer, bodyparts, coords", got=preview([row[0] for row in rows[:3]])
        )
    names = [column for column in range(1, len(header)) if not heads["coords"][column]]
    table = {"image": ["/".join([row[0], *(row[column] for column in names)]) for row in rows[len(heads) :]]}
    for column in range(1, len(header)):
        if heads["coords"][column] in ("x", "y"):
            who = [heads[kind][column] for kind in ("individuals", "bodyparts") if kind in heads]
            name = "_".join([*who, heads["coords"][column]])
            if name in table:
                raise UserError(path, expected="each point once", got=f"'{name}' twice")
            table[name] = [row[column] for row in rows[len(heads) :]]
    return pd.DataFrame(table, dtype=str)


def column(table: pd.DataFrame, name: str, path: object, flag: str) -> "pd.Series[str]":
    """Return a column, or refuse and say which flag names it.

    Raises:
        UserError: no such column.
    """
    if name not in table:
        raise UserError(
            path, expected=f"a column '{name}'", got=f"columns {preview(table.columns, 12)}", fix=f"name it by --{flag}"
        )
    return table[name]


def from_csv(path: Path, images: Path, image_column: str, label_column: str, task: str) -> Source:
    """Read labels and find each row's image.

    Raises:
        UserError: see `read_table` and `locate`; no such column, an empty label, a point that is no number.
    """
    images = existing(images, "the folder of images (--images)").resolve()
    table = read_table(path, "labels (CSV)")
    if table.empty:
        raise UserError(path, expected="labels", got="a header and no rows")
    names_given = column(table, image_column, path, "image_column")
    files = locate(names_given, images, path)
    if label_column == image_column and task == "classify":
        raise UserError(path, expected="two columns, image and label", got=f"'{label_column}' for both")
    rest, renamed = _make_room(table.drop(columns=[image_column]), label_column if task == "classify" else "")
    rest = rest.assign(file=files, name=names_given.str.strip())
    more = {"renamed": renamed} if renamed else {}
    if task == "keypoints":
        source = _points(rest, images, path)
        return replace(source, info={**source.info, **more})
    labels = column(table, label_column, path, "label_column").str.strip()
    empty = np.flatnonzero(labels == "")
    if len(empty):
        raise UserError(
            path, expected=f"a label in every row of '{label_column}'", got=f"none in line {preview(empty + 2)}"
        )
    labels, names, known = classes_of(labels, path)
    return Source(rest.drop(columns=[label_column]).assign(label=labels), images, names, {**known, **more})


def _make_room(table: pd.DataFrame, label_column: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rename the user's own columns where ours would overwrite them: ``fold`` becomes ``user_fold``; say which."""
    renamed: dict[str, str] = {}
    for name in sorted(RESERVED & set(table.columns) - {label_column}):
        new = f"user_{name}"
        while new in table or new in renamed.values():
            new = f"user_{new}"
        renamed[name] = new
    return table.rename(columns=renamed), renamed


def groups(source: Source, name: str, label_column: str, path: object) -> "pd.Series[str]":
    """The user's own column that says which samples belong together (``--group``); never one that we have made.

    Raises:
        UserError: the user has no such column.
    """
    theirs = source.info.get("renamed", {}).get(name, name)
    ours = ["file", "name"] if label_column == "label" else ["file", "name", "label"]
    return column(source.table.drop(columns=ours, errors="ignore"), theirs, path, "group").str.strip()


def classes_of(labels: "pd.Series[str]", path: object) -> tuple["pd.Series[str]", tuple[str, ...], dict[str, Any]]:
    """Labels as text, class names in order, their type and spelling: numbers sort as numbers (9 before 10).

    One name in two Unicode forms (a Mac's folders, a PC's table) is one class.

    Raises:
        UserError: ``1`` and ``01`` side by side: nobody says whether they are one class.
    """
    if not labels.map(lambda text: WHOLE.fullmatch(text) is not None).all():
        plain, spelling = as_labels(labels, "str"), _forms(labels, "str")
        return plain, tuple(sorted(set(plain))), {"label_type": "str"} | ({"spelling": spelling} if spelling else {})
    bare = as_labels(labels, "int")
    digits = labels[labels.str.fullmatch("[0-9]+")].drop_duplicates()
    twice = sorted(digits[as_labels(digits, "int").duplicated(keep=False)])
    if twice:
        fix = "write each class one way (or, if they are different classes, by names that are no numbers)"
        raise UserError(path, expected="one spelling of each label", got=preview(twice), fix=fix)
    spelling = _forms(labels, "int")
    return bare, tuple(sorted(set(bare), key=int)), {"label_type": "int"} | ({"spelling": spelling} if spelling else {})


def _forms(labels: Iterable[str], kind: str) -> dict[str, str]:
    """How labels are written that we write otherwise: ``{"1": "001"}``, or a name in another Unicode form only."""
    texts = set(labels)
    if kind == "int":
        return {str(int(text)): text for text in texts if PADDED.fullmatch(text)}
    plain = {text: unicodedata.normalize("NFC", text) for text in sorted(texts)}
    return {name: text for text, name in plain.items() if name not in texts}


def _spelling(shown: Iterable[str], names: Sequence[str], train: Mapping[str, str], kind: str) -> dict[str, str]:
    """How a submission writes each class: as train does, but as the sample does where it shows otherwise."""
    texts = pd.Series(list(shown), dtype=str).str.strip().drop_duplicates()
    seen = texts[as_labels(texts, kind).isin(names)]
    forms = _forms(seen, kind)
    is_bare = any(train.get(name, text) != text for name, text in zip(as_labels(seen, kind), seen, strict=True))
    return {} if is_bare and not forms else dict(train) | forms


def as_labels(values: "pd.Series[str]", kind: str) -> "pd.Series[str]":
    """Labels as the manifest writes them: bare text (NFC), and for ``int`` without ``+``, leading zeros or ``.0``."""
    bare = values.str.strip().map(lambda text: unicodedata.normalize("NFC", text))
    if kind != "int":
        return bare
    return bare.map(lambda text: str(int(text.partition(".")[0])) if WHOLE.fullmatch(text) else text)


def _points(table: pd.DataFrame, images: Path, path: object) -> Source:
    """Columns ``<point>_x, <point>_y`` (either case) become floats; empty means occluded."""
    found: dict[str, dict[str, str]] = {}
    for name in table.columns:
        if match := POINT.fullmatch(name):
            found.setdefault(match[1], {})[match[2].lower()] = name
    half = [name for name, axes in found.items() if len(axes) < 2]
    if half or not found:
        got = f"only one of the two for {preview(half)}" if half else f"columns {preview(table.columns, 12)}"
        raise UserError(path, expected="columns <point>_x and <point>_y", got=got)
    columns: dict[str, Any] = {}
    for name, axes in found.items():
        for axis in "xy":
            text = table[axes[axis]].str.strip()
            blank = text.str.lower().isin(["", "nan"])
            number = pd.to_numeric(text.where(~blank), errors="coerce")
            odd = np.flatnonzero((number.isna() & ~blank) | np.isinf(number))
            if len(odd):
                got = f"{preview(text.iloc[odd])} in line {preview(odd + 2)}"
                raise UserError(path, expected=f"numbers (or nothing) in '{axes[axis]}'", got=got)
            columns[f"{name}_{axis}"] = number.astype(float)
    lone = [name for name in found if (columns[f"{name}_x"].isna() != columns[f"{name}_y"].isna()).any()]
    if lone:
        raise UserError(path, expected="both x and y of a point, or neither", got=f"one alone for {preview(lone)}")
    used = [name for axes in found.values() for name in axes.values()]
    suffixes = ["_x", "_y"] if all(name.endswith(("_x", "_y")) for name in used) else ["_X", "_Y"]
    table = pd.concat([table.drop(columns=used), pd.DataFrame(columns, index=table.index)], axis=1)
    return Source(table, images, tuple(found), {"label_type": "points", "point_suffixes": suffixes})


def from_class_folders(images: Path, test: Path | None = None) -> Source:
    """One folder per class under `images`; a class's images may lie deeper.

    Args:
        images: the folder.
        test: the test images; where they lie in a folder under `images`, they are no class.

    Raises:
        UserError: no folders, links to some, no images, or images beside the class folders.
    """
    images = existing(images, "the folder of class folders (--images)").resolve()
    refuse_unseen(images)
    paths = find_images(images)
    if test is not None and images in (test := existing(test, "the folder of test images").resolve()).parents:
        paths = [path for path in paths if not path.is_relative_to(test)]
    files = [path.relative_to(images).as_posix() for path in paths]
    locate(files, images, images)  # links that lead out of the folder are refused here
    loose = [name for name in files if "/" not in name]
    if not files or loose:
        got = f"images outside any class folder: {preview(loose)}" if loose else "no images"
        raise UserError(
            images, expected="one folder per class, images inside", got=got, fix="or give --labels FILE.csv"
        )
    labels, names, known = classes_of(pd.Series([name.partition("/")[0] for name in files]), images)
    return Source(pd.DataFrame({"file": files, "name": files, "label": labels}), images, names, known)


def fix_classes(source: Source, path: Path) -> Source:
    """Take the class order from a file (JSON list, or one name per line) instead of the sorted labels.

    Raises:
        UserError: a repeated name, or a label that is not in the list.
    """
    path = existing(path, "the class list (--classes)")
    value = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").split("\n")
    value = value.get("classes") if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise UserError(path, expected="a list of class names", got=type(value).__name__)
    given = pd.Series([str(name) for name in value if str(name).strip()], dtype=str)
    names = tuple(as_labels(given, str(source.info["label_type"])))
    if len(set(names)) != len(names):
        raise UserError(path, expected="each class once", got=f"{len(names) - len(set(names))} repeated")
    unknown = sorted(set(source.table["label"]) - set(names))
    if unknown:
        raise UserError(path, expected=f"every label among {preview(names, 8)}", got=f"unknown: {preview(unknown)}")
    return Source(source.table, source.images, names, source.info)


def from_test(
    images: Path, sample: Path | None, image_column: str, label_column: str, source: Source, task: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read the test set: the sample submission's rows if there is one, else every image in the folder.

    Returns:
        table ``file, name`` (name as the sample submission writes it), and info for writing the submission.

    Raises:
        UserError: two rows for one id, an id without an image, columns for some of the classes, no images.
    """
    images = existing(images, "the folder of test images (--test_images)").resolve()
    if sample is None:
        refuse_unseen(images)
        files = [path.relative_to(images).as_posix() for path in find_images(images)]
        if not files:
            raise UserError(images, expected="test images", got="none")
        return pd.DataFrame({"file": locate(files, images, images), "name": files}), {}
    table = read_table(sample, "the sample submission (CSV)")
    id_column = image_column if image_column in table else str(table.columns[0])
    ids = table[id_column]
    repeated = ids[ids.duplicated()]
    if table.empty or len(repeated):
        got = f"two rows for {preview(repeated)}" if len(repeated) else "no rows"
        raise UserError(sample, expected=f"each id of '{id_column}' once", got=got)
    others = [name for name in table.columns if name != id_column]
    if not others:
        raise UserError(sample, expected="an id column and what to predict", got=f"only '{id_column}'")
    label = label_column if label_column in others else others[0]
    kind, train = str(source.info.get("label_type", "")), source.info.get("spelling", {})
    lacking = [name for name in source.names if name not in set(as_labels(pd.Series(others), kind))]
    wide = task == "classify" and len(others) > 1 and not lacking
    if task == "classify" and len(others) > 1 and label_column not in others and 0 < len(lacking) < len(source.names):
        got = f"none for {preview(lacking)}"
        raise UserError(
            sample, expected="a column for every class, or for the label", got=got, fix="mend one of the two"
        )
    spelling = _spelling(others if wide else table[label], source.names, train, kind) if task == "classify" else {}
    info = {
        "image_column": id_column,
        "label_column": label,
        "columns": list(table.columns),
        "style": "points" if task == "keypoints" else "probabilities" if wide else "labels",
        "id_style": "name" if ids.str.lower().str.endswith(SUFFIXES).all() else "stem",
        **({"spelling": spelling} if spelling or train else {}),
    }
    return pd.DataFrame({"file": locate(ids, images, sample), "name": ids}), info
