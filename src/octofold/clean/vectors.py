"""Vectors: one per image of a manifest, tied to its id, from whatever weights are at hand."""

import logging
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from octofold.data.images import PixelCache, PixelSpec, open_cache, resize
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import ROOT, existing
from octofold.nets import embedding
from octofold.nets.models import read_model
from octofold.recipe import Model
from octofold.train.features import cached_features

log = logging.getLogger("octofold")


class Embeddings(NamedTuple):
    """One vector per image; rows are found by id, never by position."""

    sample_ids: npt.NDArray[np.str_]  # (M,)
    values: npt.NDArray[np.float32]  # (M, F)


def embed(manifest: Manifest, source: str = "auto") -> Embeddings | None:
    """Compute (or find) one vector per image that is still there.

    Args:
        source: ``auto``: the ImageNet features that prepare groups by, where the `offline` extra is installed and the
            images are no tiny scans, else ``plain``: colours and coarse shape; ``none``; or a checkpoint folder.

    Returns:
        None for ``none``, or where the images cannot be read (said in the log).

    Raises:
        UserError: no such checkpoint.
    """
    here = np.array([path.is_file() for path in manifest.paths], bool)
    if not here.all():
        log.warning("%d images of the manifest are gone (first: %s)", (~here).sum(), manifest.paths[here.argmin()])
    if source == "none" or not here.any():
        return None
    present = manifest.take(here)
    if source not in ("auto", "plain"):
        net, card = read_model(existing(source, "a checkpoint folder, or auto, plain, none"))
        cache = open_cache(present, PixelSpec.of(Model(**card.recipe["model"])))
        return Embeddings(present.sample_ids, cached_features(net, cache, present.competition))
    try:
        return Embeddings(present.sample_ids, _ready_made(present, source))
    except UserError as error:
        log.warning("no neighbours and no outliers, the images cannot all be read: %s", error)
        return None


def _ready_made(manifest: Manifest, source: str) -> npt.NDArray[np.float32]:
    table = manifest.table
    known = {"width", "height"} <= set(table.columns)
    sides = table[["width", "height"]].astype(float).min(axis=1).to_numpy() if known else np.full(len(table), 224.0)
    name = "pixels" if source == "plain" else embedding.choose(sides)
    if name == "pixels":
        side = int(np.clip(np.median(sides), 8, 64))
        return plain_features(open_cache(manifest, PixelSpec(side, "squash")))
    folder = ROOT / "data" / manifest.competition / "cache"
    none = np.zeros((len(table), 0), np.uint8)
    return embedding.embed(name, manifest.sample_ids.tolist(), manifest.paths, none, folder)


def plain_features(cache: PixelCache) -> npt.NDArray[np.float32]:
    """``(N, 256)`` colours and coarse shape, for when no trained weights are at hand: better than nothing."""
    rows = []
    for row in range(len(cache)):
        square = np.array(cache.square(row))
        bins = (square >> 6).reshape(-1, 3).astype(np.int64) @ np.array([16, 4, 1])
        colours = np.sqrt(np.bincount(bins, minlength=64) / len(bins))
        small = resize(square, 8, 8).astype(np.float32).reshape(-1) / 255
        rows.append(np.concatenate([colours, small - small.mean()]))
    return np.asarray(rows, np.float32)
