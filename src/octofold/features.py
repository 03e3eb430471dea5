"""Features of a frozen trunk, computed once: a probe over all folds and seeds costs one pass over the pixels."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from octofold.batches import Pixels, seed_of
from octofold.files import ROOT, atomic, sha256_json
from octofold.images import VERSION, PixelCache
from octofold.models import Net

log = logging.getLogger("octofold")
Floats = npt.NDArray[np.float32]
BATCH = 32


def trunk_sha(net: Net) -> str:
    """Return the sha256 of everything that decides a feature: the trunk's weights and the normalisation."""
    digest = hashlib.sha256(repr((net.mean, net.std, net.highpass, type(net.trunk).__name__)).encode())
    for name, value in sorted(net.trunk.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_features(
    net: Net,
    cache: PixelCache,
    competition: str,
    precision: str = "fp32",
    preset: str = "none",
    replicas: int = 0,
    seed: int = 0,
) -> Floats:
    """Return the trunk's features of every row of `cache`, from disk if they were ever computed.

    Args:
        net: the network; its trunk is put in eval mode and must not change afterwards.
        cache: pixels.
        competition: whose cache folder to use.
        precision: ``fp32`` or ``bf16`` autocast; features of different precision never mix.
        preset: augmentation; with ``none`` the centre square.
        replicas: how many augmented versions of each image; 0 = the centre square alone.
        seed: of the augmentation.

    Returns:
        ``(N, F)`` float32, or ``(replicas, N, F)``.
    """
    drawn = [preset, replicas, seed] if replicas else []
    key = sha256_json(
        [trunk_sha(net), VERSION, list(cache.spec), cache.sample_ids, precision, torch.__version__, drawn]
    )
    path = ROOT / "data" / competition / "cache" / f"features-{key[:24]}.npy"
    if not path.exists():
        values = _compute(net, cache, precision, preset, replicas, seed)
        with atomic(path) as temporary:
            np.save(temporary, values)
        log.info("features of the frozen trunk kept in %s", path)
    found: Floats = np.load(path)
    return found


def _compute(net: Net, cache: PixelCache, precision: str, preset: str, replicas: int, seed: int) -> Floats:
    device = next(net.parameters()).device
    net.trunk.eval()
    rows = np.arange(len(cache), dtype=np.int64)
    source = Pixels(cache, np.zeros(len(cache), np.int64), preset)
    total = len(rows) * max(1, replicas)
    made: list[Floats] = []
    with torch.no_grad(), tqdm(total=total, desc="features", unit="img") as bar:
        for images in _images(source, rows, replicas, seed):
            inputs = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                made.append(net.features(inputs).float().cpu().numpy())
            bar.update(len(images))
    values = np.concatenate(made)
    return values.reshape(replicas, len(rows), -1) if replicas else values


def _images(source: Pixels, rows: npt.NDArray[np.int64], replicas: int, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    for replica in range(max(1, replicas)):
        for start in range(0, len(rows), BATCH):
            block = rows[start : start + BATCH]
            if replicas:
                yield source.block(block, seed_of(seed, replica, start))[0]
            else:
                yield np.stack([source.cache.square(int(row)) for row in block])


def clear(competition: str) -> int:
    """Remove a competition's cached features; return how many files."""
    files: list[Path] = list((ROOT / "data" / competition / "cache").glob("features-*.npy"))
    for file in files:
        file.unlink()
    return len(files)
