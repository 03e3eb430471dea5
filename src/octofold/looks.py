"""Looks: which images there are, and decoding each once, a few ahead of whoever waits for them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from octofold.errors import UserError
from octofold.files import existing, sha256_file
from octofold.images import SUFFIXES, Frame, PixelSpec, find_images, load, square
from octofold.manifest import ID_LENGTH, Manifest
from octofold.manifest import read as read_manifest

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
U = TypeVar("U")


class Item(NamedTuple):
    """An image to look at: its name for people, its file, and its id where a manifest gives one."""

    name: str
    path: Path
    sample_id: str = ""


@dataclass(frozen=True)
class Source:
    """What there is to predict: a folder, a single image, or a manifest's rows."""

    items: list[Item]
    where: Path
    is_manifest: bool


def find(images: Path | str) -> Source:
    """List the images under a folder (recursively), of a manifest CSV, or the one image given.

    Raises:
        UserError: nothing there, or no image in it.
    """
    path = existing(images, "a folder of images, an image, or a manifest (CSV)")
    if path.is_dir():
        items = [Item(file.relative_to(path).as_posix(), file) for file in find_images(path)]
        if not items:
            raise UserError(path, expected=f"images ({', '.join(SUFFIXES)}) in it or below", got="none")
        return Source(items, path, False)
    if path.suffix.lower() == ".csv":
        return Source(items_of(read_manifest(path)), path, True)
    return Source([Item(path.name, path)], path.parent, False)


def items_of(manifest: Manifest) -> list[Item]:
    """The rows of a manifest, in order, under their ids."""
    rows = zip(manifest.table["path"], manifest.paths, manifest.sample_ids, strict=True)
    return [Item(str(name), path, str(sample_id)) for name, path, sample_id in rows]


class Look(NamedTuple):
    """A decoded image: one square and frame per distinct `PixelSpec`."""

    item: Item
    squares: dict[PixelSpec, Bytes]
    frames: dict[PixelSpec, Frame]


class Skipped(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


def look(item: Item, specs: Sequence[PixelSpec]) -> Look | Skipped:
    """Decode one image for every spec; give it its content's id where it has none."""
    try:
        views = {spec: load(item.path, spec) for spec in specs}
    except UserError as error:
        return Skipped(item.name, str(error).partition("got:")[2].partition("\n")[0].strip() or str(error))
    known_item = item if item.sample_id else item._replace(sample_id=sha256_file(item.path)[:ID_LENGTH])
    squares = {spec: square(pixels, spec.size) for spec, (pixels, _) in views.items()}
    return Look(known_item, squares, {spec: frame for spec, (_, frame) in views.items()})


def ahead(function: Callable[[T], U], items: Iterable[T], depth: int, workers: int = 1) -> Iterator[U]:
    """Map in order with at most `depth` results waiting, computed by threads while the caller works."""
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
