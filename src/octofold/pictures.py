"""Pictures of the data: what prepare shows in its run. Small thumbnails, few of each, whatever the data set's size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold import plots
from octofold.errors import UserError
from octofold.images import PixelSpec, load
from octofold.manifest import Manifest

THUMBNAIL = PixelSpec(96, "pad")
PER_CLASS = 8
MOST_CLASSES = 40
WORST = 18


def draw(prepared: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, figure)`` for each picture of the data report.

    Args:
        prepared: a `preparing.Prepared`.
    """
    manifest, looks = prepared.manifest, prepared.looks
    if "label" in manifest.table:
        counts = pd.crosstab(manifest.table["label"], manifest.table["fold"])
        counts = counts.reindex(index=list(manifest.classes), columns=manifest.folds, fill_value=0)
        folds = [f"fold {number}" for number in manifest.folds]
        yield (
            "counts",
            plots.stacked(counts.to_numpy(), manifest.classes, folds, "samples per class and fold", "samples"),
        )
    sides: dict[str, Any] = {name: {"train": looks[name]} for name in ("width", "height")}
    if prepared.test is not None:
        for name in sides:
            sides[name]["test"] = prepared.test.table[name]
    light = {name: looks[name] for name in ("brightness", "contrast", "sharpness")}
    yield "sizes", plots.histograms({**sides, **light}, "sizes (px), brightness, contrast, sharpness")
    yield from _classes(manifest)
    for name, order, note in _worst(looks):
        paths = [manifest.images / path for path in looks["path"].iloc[order]]
        yield name, plots.grid(thumbnails(paths), [note(row) for row in order], name)
    if len(prepared.pairs):
        rows = prepared.pairs[: WORST // 2].reshape(-1)
        captions = [_caption(manifest, row) for row in rows.tolist()]
        yield (
            "near-duplicates",
            plots.grid(thumbnails([manifest.paths[row] for row in rows]), captions, "pairs side by side"),
        )


def _caption(manifest: Manifest, row: int) -> str:
    label = f"{manifest.table['label'].iat[row]}\n" if "label" in manifest.table else ""
    return (label + manifest.paths[row].name[-24:]).replace("$", r"\$")


def _classes(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    if "label" not in manifest.table:
        rows = list(range(min(WORST, len(manifest.table))))
        yield "samples", _points(manifest, rows)
        return
    groups = manifest.table.groupby("label").indices
    names = [name for name in manifest.classes if name in groups]
    rng = np.random.default_rng(0)
    for start in range(0, min(len(names), MOST_CLASSES), 10):
        rows, captions = [], []
        for name in names[start : start + 10]:
            some = rng.permutation(groups[name])[:PER_CLASS].tolist()
            rows += some
            captions += [name.replace("$", r"\$")[:24]] * len(some)
        pictures = thumbnails([manifest.paths[row] for row in rows])
        yield f"classes-{start // 10}", plots.grid(pictures, captions, "a few of each class", PER_CLASS)


def _points(manifest: Manifest, rows: list[int]) -> Any:
    pictures, points = [], []
    for row in rows:
        pixels, frame = load(manifest.paths[row], THUMBNAIL)
        pictures.append(pixels)
        points.append({"truth": frame.to_unit(manifest.target[row]) * THUMBNAIL.size - 0.5})
    return plots.grid(pictures, title="samples and their points", points=points)


def _worst(looks: pd.DataFrame) -> Iterator[tuple[str, list[int], Any]]:
    for name, column, ascending in (
        ("darkest", "brightness", True),
        ("brightest", "brightness", False),
        ("most blurred", "sharpness", True),
        ("least contrast", "contrast", True),
    ):
        values = looks[column].to_numpy(float)
        order = np.argsort(values if ascending else -values, kind="stable")[:WORST].tolist()
        yield name, order, lambda row, values=values: f"{values[row]:.3g}"
    odd = np.flatnonzero(looks["odd"] != "")[:WORST].tolist()
    if odd:
        yield "odd", odd, lambda row: str(looks["odd"].iat[row])


def thumbnails(paths: list[Path]) -> list[npt.NDArray[np.uint8]]:
    """Load small pictures; one that has gone meanwhile is grey."""
    found = []
    for path in paths:
        try:
            found.append(load(path, THUMBNAIL)[0])
        except UserError:
            found.append(np.full((THUMBNAIL.size, THUMBNAIL.size, 3), 128, np.uint8))
    return found
