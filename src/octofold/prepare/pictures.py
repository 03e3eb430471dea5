"""Pictures of the data: what prepare shows in its run. Small thumbnails, few of each, whatever the data set's size."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from octofold import plots
from octofold.data.decoding import open_image, to_rgb, upright
from octofold.errors import UserError

SIDE = 96
PER_CLASS, PER_PAGE, MOST_CLASSES = 8, 12, 48
WORST = 10
MOST_PAIRS = 8
Pair = tuple[str, Any]


def draw(prepared: Any) -> Iterator[Pair]:
    """Yield ``(name, figure)`` for each picture of the data report.

    Args:
        prepared: a `preparing.Prepared`.
    """
    manifest, looks = prepared.manifest, prepared.looks
    paths = manifest.paths
    if "label" in manifest.table:
        counts = pd.crosstab(manifest.table["label"], manifest.table["fold"])
        counts = counts.reindex(index=list(manifest.classes), columns=manifest.folds, fill_value=0)
        folds = [f"fold {number}" for number in manifest.folds]
        yield (
            "counts",
            plots.stacked(counts.to_numpy(), manifest.classes, folds, "samples per class and fold", "samples"),
        )
        yield from _classes(manifest, paths)
    else:
        yield "samples", _points(manifest, paths)
    yield "looks", _histograms(looks, prepared.test_looks)
    page = {name: thumbnails([paths[row] for row in order]) for name, order in worst(looks).items()}
    yield "worst", plots.strips(page, "the worst of each; worst.csv names them")
    labels = manifest.table["label"].tolist() if "label" in manifest.table else [""] * len(paths)
    captions = [_caption(f"{label}\n{path.name[-24:]}") for label, path in zip(labels, paths, strict=True)]
    for name, pairs in (("near-duplicates", prepared.pairs), ("near-duplicates-embedding", prepared.twins)):
        if len(pairs):
            rows = pairs[:MOST_PAIRS].reshape(-1).tolist()
            pictures = thumbnails([paths[row] for row in rows])
            yield name, plots.grid(pictures, [captions[row] for row in rows], "pairs side by side", 4)
    yield from _groups(prepared, paths, captions)


def _caption(text: str) -> str:
    return text.replace("$", r"\$")


def _histograms(looks: pd.DataFrame, test: pd.DataFrame) -> Any:
    columns: dict[str, Any] = {}
    for name in ("width", "height", "brightness", "contrast", "sharpness"):
        columns[name] = {"train": looks[name], **({"test": test[name]} if len(test) else {})}
    return plots.histograms(columns, "size in px, brightness, contrast, sharpness")


def _classes(manifest: Any, paths: Sequence[Path]) -> Iterator[Pair]:
    places = manifest.table.groupby("label").indices
    names = [name for name in manifest.classes if name in places][:MOST_CLASSES]
    rng = np.random.default_rng(0)
    for start in range(0, len(names), PER_PAGE):
        page = {}
        for name in names[start : start + PER_PAGE]:
            some = rng.permutation(places[name])[:PER_CLASS].tolist()
            page[_caption(name[:24])] = thumbnails([paths[row] for row in some])
        yield f"classes-{start // PER_PAGE}", plots.strips(page, "a few of each class")


def _points(manifest: Any, paths: Sequence[Path]) -> Any:
    target = manifest.target
    pictures, points = [], []
    for row in range(min(12, len(paths))):
        width, height = manifest.table["width"].iat[row], manifest.table["height"].iat[row]
        factor = SIDE * 2 / max(width, height)
        left, top = (SIDE * 2 - width * factor) / 2, (SIDE * 2 - height * factor) / 2
        pictures.append(thumbnails([paths[row]], SIDE * 2)[0])
        points.append({"truth": (target[row] + 0.5) * factor + [left, top] - 0.5})
    return plots.grid(pictures, title="samples and their points", points=points)


def worst(looks: pd.DataFrame) -> dict[str, list[int]]:
    """Rows of the darkest, brightest, most blurred, flattest and oddest images, the worst first."""
    found = {}
    for name, column, sign in (
        ("darkest", "brightness", 1), ("brightest", "brightness", -1),
        ("most blurred", "sharpness", 1), ("least contrast", "contrast", 1),
    ):  # fmt: skip
        found[name] = np.argsort(sign * looks[column].to_numpy(float), kind="stable")[:WORST].tolist()
    odd = np.flatnonzero(looks["odd"] != "")[:WORST].tolist()
    return found | ({"odd": odd} if odd else {})


def worst_table(looks: pd.DataFrame) -> str:
    """The same as CSV: which list, file, and what was measured."""
    columns = ["path", "brightness", "contrast", "sharpness", "width", "height", "mode", "odd"]
    parts = [looks.iloc[rows][columns].assign(list=name) for name, rows in worst(looks).items()]
    return pd.concat(parts).set_index("list").to_csv(float_format="%.4g")


def _groups(prepared: Any, paths: Sequence[Path], captions: Sequence[str]) -> Iterator[Pair]:
    """How ``--group auto`` chose, and what it put together: the biggest groups, a few images of each."""
    chosen = prepared.grouping
    if chosen is not None and len(chosen.candidates) > 1:
        cuts = np.array([one.cut for one in chosen.candidates])
        near = np.array([one.similarity for one in chosen.candidates])
        place = chosen.candidates.index(chosen.chosen)
        names = ("cut of the clusters, cosine distance (0 = near-duplicates)", "similarity to nearest training image")
        yield (
            "groups",
            plots.scatter_line(cuts, near, chosen.test_similarity, place, names, "how new is a held-out image?"),
        )
        columns = {"similarity to nearest training image": {"held out": chosen.held, "test": chosen.test}}
        yield "groups-match", plots.histograms(columns, "held-out and test images, after grouping")
    group = prepared.manifest.table["group"].fillna("").astype(str)
    sizes = group[group != ""].value_counts()
    biggest = {name: np.flatnonzero(group == name)[:PER_CLASS].tolist() for name in sizes[sizes > 1].index[:8]}
    if biggest:
        page = {
            _caption(f"{rank}: {sizes[name]} images\n{captions[rows[0]].splitlines()[0][:20]}"): thumbnails(
                [paths[row] for row in rows]
            )
            for rank, (name, rows) in enumerate(biggest.items(), start=1)
        }
        yield "groups-biggest", plots.strips(page, "kept in one fold: the biggest groups")


def thumbnails(paths: Sequence[Path], side: int = SIDE) -> list[npt.NDArray[np.uint8]]:
    """Load small squares, photos whole on grey; one that has gone meanwhile is all grey."""
    found = []
    for path in paths:
        square = Image.new("RGB", (side, side), (128, 128, 128))
        try:
            image = open_image(path)
            image.draft(None, (side, side))
            pixels = Image.fromarray(to_rgb(upright(image, path), path))
            factor = side / max(pixels.size)
            size = (max(1, round(pixels.width * factor)), max(1, round(pixels.height * factor)))
            small = pixels.resize(size, Image.Resampling.BILINEAR)
            square.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
        except UserError:
            pass  # prepare has read it a minute ago; its place stays grey
        found.append(np.asarray(square))
    return found
