"""Pixels: the one way a photo on disk becomes an array, used by the cache, validation, test and serving alike.

A resize that differs between training and inference costs more accuracy than half precision does, so there is
one `load`. What is odd about a photo is decided in `decoding`.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from octofold.data.decoding import open_image, to_rgb, upright, upright_size
from octofold.errors import UserError
from octofold.files import ROOT, sha256_json
from octofold.recipe import Model

if TYPE_CHECKING:
    from octofold.data.manifest import Manifest

Pixels = npt.NDArray[np.uint8]
LONGEST = 4  # a strip longer than 4:1 is cut about its centre before `crop` blows up its short side
GREY = 128  # of the bars that `pad` adds
AHEAD = 256  # photos decoded between two writes
VERSION = 3  # of the pixels: another decode or resize must not find old caches


class PixelSpec(NamedTuple):
    """How a photo becomes a square; everything `load` depends on."""

    size: int
    fit: str = "crop"
    crop_pct: float = 1.0

    @classmethod
    def of(cls, model: Model) -> "PixelSpec":
        """The spec of a recipe's `model` section."""
        return cls(model.input_size, model.fit, model.crop_pct)

    @property
    def short_side(self) -> int:
        """``crop`` only: short side after the resize, px."""
        return round(self.size / self.crop_pct)


class Frame(NamedTuple):
    """Where the square lies on the original photo: ``unit = (pixel + 0.5) * scale + offset`` per axis.

    A point on the centre of the photo's first pixel is (0, 0) in pixels; unit coordinates run over [0, 1] from
    edge to edge of the square, so that a flip is exactly ``1 - x``.
    """

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    def to_unit(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points ``(…, 2)`` in original pixels to unit coordinates of the square; NaN stays NaN."""
        scale, offset = np.array(self, np.float64).reshape(2, 2)
        unit: npt.NDArray[np.float64] = (np.asarray(points, np.float64) + 0.5) * scale + offset
        return unit

    def to_pixels(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Undo `to_unit`."""
        scale, offset = np.array(self, np.float64).reshape(2, 2)
        pixels: npt.NDArray[np.float64] = (np.asarray(points, np.float64) - offset) / scale - 0.5
        return pixels


def load(path: Path | str, spec: PixelSpec, sample_id: str = "") -> tuple[Pixels, Frame]:
    """Decode and resize one photo.

    Args:
        path: the file.
        spec: size and fit.
        sample_id: what a manifest calls it; then it is refused where its content is another one now.

    Returns:
        ``(H, W, 3)`` uint8 RGB: ``crop`` keeps the aspect with the short side at `spec.short_side`, ``squash``
        and ``pad`` give ``(size, size)``; and the frame of the centre square (what `square` cuts).

    Raises:
        UserError: no such file, not an image, truncated, larger than 300 megapixels, or changed since prepare.
    """
    return fit(open_image(path, sample_id), spec, path)


def fit(image: Image.Image, spec: PixelSpec, path: Path | str = "image") -> tuple[Pixels, Frame]:
    """Decode and resize an opened photo; `path` is only what errors call it. Returns and raises as `load`."""
    width, height = upright_size(image, path)  # before drafting: the frame speaks of the photo as it is
    image.draft(None, _scaled(*image.size, spec))  # big JPEGs: decode at 1/2, 1/4 or 1/8
    image = upright(image, path)
    pixels = to_rgb(image, path)
    margin_x = margin_y = 0
    if spec.fit == "crop":
        (pixels, margin_x, margin_y) = _shorten(pixels)
    step_x, step_y = width / image.width, height / image.height  # original pixels per decoded pixel
    new_width, new_height = _scaled(pixels.shape[1], pixels.shape[0], spec)
    left, top = (new_width - spec.size) // 2, (new_height - spec.size) // 2
    scale_x = new_width / (pixels.shape[1] * step_x) / spec.size
    scale_y = new_height / (pixels.shape[0] * step_y) / spec.size
    offset_x = -left / spec.size - margin_x * step_x * scale_x
    frame = Frame(scale_x, scale_y, offset_x, -top / spec.size - margin_y * step_y * scale_y)
    pixels = resize(pixels, new_height, new_width)
    if spec.fit == "pad":
        canvas = np.full((spec.size, spec.size, 3), GREY, np.uint8)
        canvas[-top : new_height - top, -left : new_width - left] = pixels
        pixels = canvas
    return pixels, frame


def square(image: Pixels, size: int) -> Pixels:
    """Cut the centre ``(size, size, 3)``: what validation, test and serving see."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    if top < 0 or left < 0:
        raise ValueError(f"a {image.shape[1]}x{image.shape[0]} image holds no square of {size} px")
    return image[top : top + size, left : left + size]


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Bilinear with antialiasing on uint8 ``(H, W, 3)``: the best quality per millisecond that was measured."""
    import torch

    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]  # channels-last in memory
    planes = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(planes[0].permute(1, 2, 0).numpy())


def _scaled(width: int, height: int, spec: PixelSpec) -> tuple[int, int]:
    """(width, height) after the resize."""
    if spec.fit == "squash":
        return spec.size, spec.size
    side = spec.short_side if spec.fit == "crop" else spec.size
    factor = side / (min(width, height) if spec.fit == "crop" else max(width, height))
    new_width, new_height = max(1, round(width * factor)), max(1, round(height * factor))
    if spec.fit == "crop":  # rounding must not leave the short side a pixel short of the square
        new_width, new_height = max(new_width, spec.size), max(new_height, spec.size)
    return new_width, new_height


def _shorten(pixels: Pixels) -> tuple[Pixels, int, int]:
    """Cut an extreme strip to LONGEST:1 about its centre; returns it with the margins cut off (left, top)."""
    height, width = pixels.shape[:2]
    left = max(0, width - LONGEST * height) // 2
    top = max(0, height - LONGEST * width) // 2
    return pixels[top : height - top or None, left : width - left or None], left, top


class PixelCache:
    """Resized photos of a manifest in one memory-mapped file; row i is sample i of the manifest.

    ``cache[i]`` is ``(H, W, 3)`` uint8 RGB (what `load` returned), read-only.
    """

    def __init__(self, folder: Path, sample_ids: Sequence[str], spec: PixelSpec) -> None:
        self.folder, self.spec, self.sample_ids = folder, spec, list(sample_ids)
        index = np.load(folder / "index.npz")
        place = {name: row for row, name in enumerate(index["ids"].tolist())}
        rows = np.array([place[name] for name in self.sample_ids], dtype=np.int64)
        self.offsets: npt.NDArray[np.int64] = index["offsets"][rows]
        self.shapes: npt.NDArray[np.int64] = index["shapes"][rows]
        self.frames = [Frame(*map(float, numbers)) for numbers in index["frames"][rows]]
        self._bytes = np.memmap(folder / "pixels.bin", np.uint8, "r")

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, row: int) -> Pixels:
        height, width = map(int, self.shapes[row])
        start = int(self.offsets[row])
        return self._bytes[start : start + height * width * 3].reshape(height, width, 3)

    def square(self, row: int) -> Pixels:
        """``(size, size, 3)``: the centre square of sample `row`."""
        return square(self[row], self.spec.size)

    def __reduce__(self) -> Any:  # a worker process maps the file again instead of being sent the pixels
        return PixelCache, (self.folder, self.sample_ids, self.spec)


def open_cache(manifest: "Manifest", spec: PixelSpec, folder: Path | None = None, progress: bool = True) -> PixelCache:
    """Open the pixels of a manifest, decoding what no earlier cache holds.

    The cache is found by sample ids and spec, so a manifest with fewer rows, another order, other labels or
    other folds uses the same one. Interrupted, the next call goes on where it stopped.

    Args:
        manifest: train or test.
        spec: size and fit.
        folder: where caches live; None = ``data/<competition>/cache``.
        progress: show a bar on stderr.

    Raises:
        UserError: a photo that is gone, cannot be read or has changed since prepare, a full disk.
    """
    from filelock import FileLock

    folder = folder or ROOT / "data" / manifest.competition / "cache"
    ids = manifest.sample_ids.tolist()
    name = f"{spec.size}-{spec.fit}-{sha256_json([VERSION, list(spec)])[:8]}"
    if found := _covering(folder, name, ids):
        return PixelCache(found, ids, spec)
    made = folder / f"{name}-{sha256_json(sorted(ids))[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{made.name}.lock"):  # two jobs that start together decode once
            if not made.exists():
                _build(manifest, spec, made, progress)
    except OSError as error:
        raise UserError(
            made,
            expected="room for the pixel cache",
            got=error.strerror or str(error),
            fix="free disk space, or point OCTOFOLD_HOME at another disk; the next call goes on from here",
        ) from error
    return PixelCache(made, ids, spec)


def _covering(folder: Path, name: str, ids: list[str]) -> Path | None:
    for index in sorted(folder.glob(f"{name}-*/index.npz")):
        if set(ids) <= set(np.load(index)["ids"].tolist()):
            return index.parent
    return None


def _build(manifest: "Manifest", spec: PixelSpec, made: Path, progress: bool) -> None:
    """Decode in threads, a bounded number ahead, by sample id: another order of the samples goes on with the part."""
    from tqdm import tqdm

    part = made.with_name(f".{made.name}.by-id.part")
    part.mkdir(exist_ok=True)
    rows = _finished(part)
    manifest = manifest.take(np.argsort(manifest.sample_ids))
    files, todo = list(zip(manifest.paths, manifest.sample_ids, strict=True)), range(len(rows), len(manifest.table))
    with (
        (part / "pixels.bin").open("r+b" if rows else "wb") as pixels,
        (part / "rows.jsonl").open("a") as log,
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        tqdm(total=len(manifest.table), initial=len(rows), desc="decode", unit="img", disable=not progress) as bar,
    ):
        pixels.seek(sum(int(row[0] * row[1]) * 3 for row in rows))
        pixels.truncate()
        for start in range(0, len(todo), AHEAD):
            block = [files[row] for row in todo[start : start + AHEAD]]
            fresh = []
            for image, frame in pool.map(lambda file: load(file[0], spec, str(file[1])), block):
                pixels.write(image.data)
                fresh.append([*image.shape[:2], *frame])
            pixels.flush()  # pixels first: a line in rows.jsonl promises that they are there
            log.writelines(json.dumps(row) + "\n" for row in fresh)
            log.flush()
            rows += fresh
            bar.update(len(block))
    shapes = np.array([row[:2] for row in rows], np.int64).reshape(-1, 2)
    sizes = shapes.prod(axis=1) * 3
    np.savez(
        part / "index.npz",
        ids=manifest.sample_ids,
        shapes=shapes,
        offsets=np.cumsum(sizes) - sizes,
        frames=np.array([row[2:] for row in rows], np.float64).reshape(-1, 4),
    )
    (part / "rows.jsonl").unlink()
    part.replace(made)


def _finished(part: Path) -> list[list[float]]:
    """Rows an interrupted build left behind, up to the first line that was cut."""
    rows: list[list[float]] = []
    log = part / "rows.jsonl"
    if log.exists() and (part / "pixels.bin").exists():
        for line in log.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            rows.append(json.loads(line))
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
