"""Checks: look at every image once; what it is, what is odd about it, how it looks from far away."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from scipy.fft import dctn
from tqdm import tqdm

from octofold.data.decoding import (
    BROKEN,
    ID_LENGTH,
    has_alpha,
    open_bytes,
    orientation_tag,
    to_rgb,
    upright,
    upright_size,
)
from octofold.errors import UserError

SIDE = 64  # px: what brightness, blur and hashes are measured on
TINY = 8  # px: side of the descriptor
AHEAD = 512
BLACK = 2  # of 255: 16- and 32-bit values of a smaller range than decoding takes them for


@dataclass(frozen=True)
class Looks:
    """One row per file, in the order given.

    Attributes:
        table: ``file, sample_id, sha256, width, height`` (upright, px), ``mode``, ``odd`` (text, comma separated),
            ``brightness`` [0, 1], ``contrast`` (std, [0, 0.5]), ``sharpness`` (variance of the Laplacian),
            ``problem`` (why it cannot be read; empty = fine).
        phash: ``(N,)`` uint64 perceptual hash (sign of the 64 lowest DCT terms of the 32 x 32 grey image).
        tiny: ``(N, TINY * TINY * 3)`` uint8, the image shrunk to 8 x 8 RGB.
    """

    table: pd.DataFrame
    phash: npt.NDArray[np.uint64]
    tiny: npt.NDArray[np.uint8]


def look(files: Sequence[str], folder: Path, what: str = "look", progress: bool = True) -> Looks:
    """Look at every file with threads, a bounded number ahead: linear time, constant memory beside the result."""
    rows: list[dict[str, object]] = []
    phash = np.zeros(len(files), np.uint64)
    tiny = np.zeros((len(files), TINY * TINY * 3), np.uint8)
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        tqdm(total=len(files), desc=what, unit="img", disable=not progress) as bar,
    ):
        for start in range(0, len(files), AHEAD):
            block = files[start : start + AHEAD]
            for facts, mark, small in pool.map(lambda name: _look(folder / name), block):
                place = len(rows)
                rows.append({"file": files[place], **facts})
                phash[place], tiny[place] = mark, small
            bar.update(len(block))
    columns = ["file", "sample_id", "sha256", "width", "height", "mode", "odd", "brightness", "contrast", "sharpness"]
    return Looks(pd.DataFrame(rows, columns=[*columns, "problem"]), phash, tiny)


def _look(path: Path) -> tuple[dict[str, object], int, npt.NDArray[np.uint8]]:
    facts: dict[str, object] = {"sample_id": "", "sha256": "", "width": 0, "height": 0, "mode": "", "odd": ""}
    facts |= {"brightness": np.nan, "contrast": np.nan, "sharpness": np.nan, "problem": ""}
    try:
        data = path.read_bytes()
        facts["sha256"] = hashlib.sha256(data).hexdigest()
        facts["sample_id"] = str(facts["sha256"])[:ID_LENGTH]
        image = open_bytes(data, path)
        # Frames are counted in a copy: where one is cut off, Pillow would be left standing in it.
        counted = open_bytes(data, path) if hasattr(type(image), "n_frames") else image
        facts["mode"], facts["odd"] = image.mode, ", ".join(oddities(counted))
        width, height = upright_size(image, path)
        image.draft(None, (2 * SIDE, 2 * SIDE))
        pixels = to_rgb(upright(image, path), path)
    except UserError as error:
        facts["problem"] = next((line[12:] for line in str(error).splitlines() if "got: " in line), str(error))
        return facts, 0, np.zeros(TINY * TINY * 3, np.uint8)
    except OSError as error:
        facts["problem"] = error.strerror or str(error)
        return facts, 0, np.zeros(TINY * TINY * 3, np.uint8)
    facts |= {"width": width, "height": height}
    if (facts["mode"] == "F" or str(facts["mode"])[:1] == "I") and pixels.max(initial=0) <= BLACK:
        facts["odd"] = f"{facts['odd']}, comes out black"
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    grey = np.asarray(small.convert("L"), np.float32) / 255
    inner = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    facts |= {"brightness": float(grey.mean()), "contrast": float(grey.std()), "sharpness": float(inner.var())}
    return facts, _phash(np.asarray(grey, np.float32)), np.asarray(small.reduce(SIDE // TINY)).reshape(-1)


def _phash(grey: npt.NDArray[np.float32]) -> int:
    """Sign of the 8 x 8 lowest DCT terms about their median (the constant one left out of it)."""
    terms = dctn(grey.reshape(32, 2, 32, 2).mean(axis=(1, 3)), norm="ortho")[:8, :8].reshape(-1)
    bits = terms > np.median(terms[1:])
    return int(np.packbits(bits).view(">u8")[0])


def oddities(image: Image.Image) -> list[str]:
    """What is unusual about an opened image; every one of these is handled (see decoding.py), and reported."""
    found = [image.mode] if image.mode in ("CMYK", "LAB", "YCbCr", "HSV") else []
    if image.mode.startswith("I") or image.mode == "F":
        found.append("16-bit" if image.mode.startswith("I;16") else "32-bit")
    if image.mode == "P":
        found.append("palette")
    if has_alpha(image):
        found.append("alpha")
    try:
        frames = getattr(image, "n_frames", 1)
    except BROKEN:
        frames = 2  # a later one is cut off; the first is all we want
    if frames > 1:
        found.append("animated")
    if orientation_tag(image) != 1:
        found.append("EXIF-rotated")
    return found
