"""Landmarks: which points a row asks for, which points are each other's mirror twins, and the integers handed in.

Original 004 asks for 30 of 971 points per photo, another 30 each time, as whole pixels of the original image.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold.errors import UserError, preview
from octofold.files import existing, read_json

Array = npt.NDArray[Any]
STYLE = "point_list"
"""Value of a test manifest's ``info["style"]`` when each row has its own list of points."""


def read_asked(path: Path, points: int, image_column: str) -> dict[str, list[int]]:
    """Read which points each test image is asked for.

    Args:
        path: tab- or comma-separated, ``file_name`` and one column with a list, ``[3, 14, 15]`` or ``3 14 15``.
        points: how many there are.
        image_column: name of the first column, if it has a header of that name; else the first column is taken.

    Returns:
        ``{file name: point indices}``; every list equally long.

    Raises:
        UserError: no such file, an index out of range, lists of different lengths, a name twice.
    """
    path = existing(path, "the points asked for (--test_points)")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        if table.shape[1] == 1:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        raise UserError(path, expected="a table of file names and point lists", got=str(error)) from error
    if table.shape[1] != 2:
        raise UserError(path, expected="two columns, name and points", got=preview(table.columns))
    key = image_column if image_column in table else str(table.columns[0])
    other = next(name for name in table.columns if name != key)
    asked: dict[str, list[int]] = {}
    for line, (name, text) in enumerate(zip(table[key], table[other], strict=True), start=2):
        words = text.strip().strip("[]()").replace(",", " ").split()
        if not words or not all(word.isdigit() and int(word) < points for word in words):
            raise UserError(f"{path} line {line}", expected=f"point numbers in 0..{points - 1}", got=repr(text[:60]))
        if name in asked:
            raise UserError(f"{path} line {line}", expected="each image once", got=f"'{name}' again")
        asked[name] = [int(word) for word in words]
    lengths = {len(found) for found in asked.values()}
    if len(lengths) != 1:
        raise UserError(path, expected="as many points in every row", got=f"{preview(sorted(lengths))} points")
    return asked


def columns(asked: int) -> list[str]:
    """Names of the coordinate columns: ``Point_M0_X, Point_M0_Y, …`` for that many points a row."""
    return [f"Point_M{place}_{axis}" for place in range(asked) for axis in "XY"]


def chosen(values: Array, lists: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Take each row's own points, as whole pixels, **rounded**: cutting off cost the original 0.42 of MSE.

    Args:
        values: ``(N, P, 2)`` points in original pixels.
        lists: the N rows' point indices, equally many.

    Returns:
        ``(N, 2 n)`` int64, x before y.
    """
    rows = np.arange(len(values))[:, None]
    picked = values[rows, np.asarray(lists, dtype=np.int64)]  # (N, n, 2)
    return np.rint(picked).astype(np.int64).reshape(len(values), -1)


def swap_table(text: str, names: Sequence[str]) -> list[int] | None:
    """Read which points change places in a mirror.

    Args:
        text: "" = not known, so that views and augmentations that mirror are left out or refused; ``none`` = no point
            has a twin; ``left_eye:right_eye,left_ear:right_ear``; or a JSON file with a list of such pairs, or with
            the index of every point's twin; an empty list = ``none``.
        names: of the points.

    Returns:
        The index of every point's twin (its own, if it has none), or None.

    Raises:
        UserError: an unknown name, or pairs that contradict each other.
    """
    if not text:
        return None
    if text == "none":
        return list(range(len(names)))
    if text.endswith(".json"):
        from octofold.nets.tasks import check_swap  # brings torch along

        found = read_json(text, "the swap table (--swap)")
        if isinstance(found, list) and found and all(type(item) is int for item in found):
            return check_swap(found, names)
        if not isinstance(found, list) or not all(isinstance(pair, list) for pair in found):
            expected = "a list of pairs of names, or of the index of every point's twin"
            raise UserError(text, expected=expected, got=json.dumps(found)[:60])
        pairs = [tuple(map(str, pair)) for pair in found]
    else:
        pairs = [tuple(part.strip().split(":")) for part in text.split(",")]
    table = list(range(len(names)))
    place = {name: index for index, name in enumerate(names)}
    for pair in pairs:
        if len(pair) != 2 or not set(pair) <= set(place):
            raise UserError("--swap", expected=f"pairs of {preview(names, 8)}, as LEFT:RIGHT", got=":".join(pair))
        one, other = place[pair[0]], place[pair[1]]
        if table[one] != one or table[other] != other or one == other:
            raise UserError("--swap", expected="each point in one pair", got=":".join(pair))
        table[one], table[other] = other, one
    return table
