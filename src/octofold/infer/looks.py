"""Looks: which images there are, and decoding each once, a few ahead of whoever waits for them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from octofold.data.decoding import check_content, content_id, open_bytes
from octofold.data.folders import NOT_UTF8, SUFFIXES, find_images, is_utf8, left_out, told
from octofold.data.images import Frame, PixelSpec, fit, square
from octofold.data.manifest import Manifest
from octofold.data.manifest import read as read_manifest
from octofold.errors import UserError, preview
from octofold.files import existing

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
    left_out: Sequence["Skipped"] = ()  # files that are no images by their names, and folders not entered


def find(images: Path | str) -> Source:
    """List the images under a folder (recursively), of a manifest CSV, or the one image given.

    Raises:
        UserError: nothing there, no image in it, or a path that is not UTF-8.
    """
    path = existing(images, "a folder of images, an image, or a manifest (CSV)")
    if not is_utf8(str(path)):
        raise UserError(
            told(str(path)), expected="a path in UTF-8", got=NOT_UTF8, fix="rename it, or copy it elsewhere"
        )
    if path.is_dir():
        items = [Item(file.relative_to(path).as_posix(), file) for file in find_images(path)]
        other = [Skipped(*found) for found in left_out(path)]
        if not items:
            named = preview(f"{one.name} ({one.reason})" for one in other)
            got = f"none, but {len(other)} others: {named}" if other else "none"
            raise UserError(path, expected=f"images ({', '.join(SUFFIXES)}) in it or below", got=got)
        return Source(items, path, False, other)
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
    """Read one file once and decode it for every spec; give it its content's id where it has none.

    Raises:
        UserError: its content is another one than a manifest says: nothing could be said of that sample.
    """
    try:
        data = item.path.read_bytes()
    except OSError as error:
        return Skipped(item.name, error.strerror or str(error))
    check_content(data, item.sample_id, item.path)
    try:
        return decode(data, item.path, specs, item)
    except OSError as error:
        return Skipped(item.name, error.strerror or str(error))
    except UserError as error:
        return Skipped(item.name, str(error).partition("got:")[2].partition("\n")[0].strip() or str(error))


def decode(data: bytes, where: Path | str, specs: Sequence[PixelSpec], item: Item | None = None) -> Look:
    """Decode the bytes of an image file for every spec.

    Args:
        data: as a camera wrote them.
        where: what errors call it.
        specs: the pixels wanted.
        item: whose bytes these are, if a file's.

    Raises:
        UserError: not an image, or a broken one.
    """
    named = item or Item(str(where), Path())
    if not named.sample_id:
        named = named._replace(sample_id=content_id(data))
    views = {spec: fit(open_bytes(data, where), spec, where) for spec in specs}
    squares = {spec: square(pixels, spec.size) for spec, (pixels, _) in views.items()}
    return Look(named, squares, {spec: frame for spec, (_, frame) in views.items()})


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
