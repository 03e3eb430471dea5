"""Features of a frozen trunk, computed once: a probe over all folds and seeds costs one pass over the pixels.

They lie in ``data/<competition>/cache/features-<key>.npy``, one row per sample, NaN where nobody asked yet. The key
holds the trunk's weights, the pixels, the view or the augmentation with its code, and the precision.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from octofold import tta
from octofold.data.images import VERSION, PixelCache
from octofold.files import ROOT, atomic, sha256_file, sha256_json
from octofold.nets import augment, engine
from octofold.nets.models import Net
from octofold.train.batches import Pixels, seed_of

log = logging.getLogger("octofold")
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
BATCH = 16


class _Trunk(nn.Module):
    """The trunk as a network of its own, for the engines."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.input_size = net, net.input_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net.features(images)


@dataclass
class FrozenTrunk:
    """A trunk that does not change any more, and the features it has been asked for.

    Attributes:
        net: the network; neither its trunk's weights nor its mode may change while this lives.
        cache: pixels.
        competition: whose cache folder to use.
        architecture: what the speed of an engine depends on.
        precision: ``fp32`` (the fastest engine that equals eager), ``bf16`` or ``fp16`` autocast; never mixed.
    """

    net: Net
    cache: PixelCache
    competition: str
    architecture: str
    precision: str = "fp32"

    def of_views(self, views: str = "none", rows: Ints | None = None) -> Floats:
        """Return the features of rows (None = all) in each view: ``(V, N, F)`` float32."""
        rows = np.arange(len(self.cache)) if rows is None else rows
        found = []
        for view in tta.VIEWS[views]:

            def draw(some: Ints, view: tta.View = view) -> npt.NDArray[np.uint8]:
                images = torch.from_numpy(np.stack([self.cache.square(int(row)) for row in some]))
                return np.ascontiguousarray(tta.apply(images.permute(0, 3, 1, 2), view).permute(0, 2, 3, 1).numpy())

            found.append(self._stored(["view", *view], rows, draw, len(tta.VIEWS[views]))[rows])
        return np.stack(found)

    def of_replicas(self, preset: str, replicas: int) -> Floats:
        """Return the features of `replicas` augmented versions of every row: ``(R, N, F)`` float32."""
        source = Pixels(self.cache, np.zeros(len(self.cache), np.int64), preset)
        code = [sha256_file(augment.__file__), version("albumentations")]  # the preset's name does not say what it does
        rows = np.arange(len(self.cache))
        found = []
        for replica in range(replicas):

            def draw(some: Ints, replica: int = replica) -> npt.NDArray[np.uint8]:
                return source.block(some, seed_of(replica, int(some[0])))[0]

            found.append(self._stored([preset, replica, *code], rows, draw, replicas))
        return np.stack(found)

    @cached_property
    def sha(self) -> str:
        """Sha256 of everything that decides a feature: the trunk's weights, the normalisation, the pixels."""
        net = self.net
        digest = hashlib.sha256(repr((net.mean, net.std, net.highpass, self.architecture, VERSION)).encode())
        digest.update(sha256_json([list(self.cache.spec), self.cache.sample_ids]).encode())
        for name, value in sorted(net.trunk.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _stored(self, how: list[Any], rows: Ints, draw: Callable[[Ints], npt.NDArray[np.uint8]], times: int) -> Floats:
        """Return all rows' features of one kind, computing those of `rows` that are missing."""
        key = sha256_json([self.sha, how, self.precision, torch.__version__])[:24]
        path = ROOT / "data" / self.competition / "cache" / f"features-{key}.npy"
        values: Floats | None = np.load(path) if path.exists() else None
        missing = rows if values is None else rows[np.isnan(values[rows, 0])]
        if len(missing):
            fresh = np.concatenate(list(self._computed(missing, draw, len(missing) * times)))
            if values is None:
                values = np.full((len(self.cache), fresh.shape[1]), np.nan, np.float32)
            values[missing] = fresh
            with atomic(path) as temporary:
                np.save(temporary, values)
        assert values is not None
        return values

    def _computed(self, rows: Ints, draw: Callable[[Ints], npt.NDArray[np.uint8]], forwards: int) -> Iterator[Floats]:
        device = next(self.net.parameters()).device
        self.net.trunk.eval()
        with torch.no_grad(), tqdm(total=len(rows), desc="features", unit="img") as bar:
            for start in range(0, len(rows), BATCH):
                some = rows[start : start + BATCH]
                images = torch.from_numpy(draw(some)).to(device).permute(0, 3, 1, 2)
                yield self._forward(images, forwards)(images).float().cpu().numpy()
                bar.update(len(some))

    def _forward(self, images: torch.Tensor, forwards: int) -> engine.Forward:
        """The engine, chosen when the first images are there to measure it with."""
        if "_engine" not in self.__dict__:
            if self.precision == "fp32":
                scale: list[torch.Tensor] = []

                def activate(features: torch.Tensor) -> torch.Tensor:  # to 1e-4 of their spread, 1e-5 of a probability
                    scale.append(10 * features.std().clamp_min(1e-6)) if not scale else None
                    return features / scale[0]

                made = engine.make(_Trunk(self.net), f"{self.architecture} trunk", images, activate, forwards)
            else:
                made = self._halved
            self.__dict__["_engine"] = made
        found: engine.Forward = self.__dict__["_engine"]
        return found

    def _halved(self, images: torch.Tensor) -> torch.Tensor:
        kind = torch.bfloat16 if self.precision == "bf16" else torch.float16
        with torch.autocast(images.device.type, kind):
            return self.net.features(images)


def cached_features(net: Net, cache: PixelCache, competition: str) -> Floats:
    """Return the trunk's exact features of every row, as validation sees it: ``(N, F)`` float32, from disk if known."""
    net.eval()
    features: Floats = FrozenTrunk(net, cache, competition, type(net.trunk).__name__).of_views()[0]
    return features


def clear(competition: str) -> int:
    """Remove a competition's cached features; return how many files."""
    files: list[Path] = list((ROOT / "data" / competition / "cache").glob("features-*.npy"))
    for file in files:
        file.unlink()
    return len(files)
