"""Resident memory while training on many images: 100,000 samples, a cache on disk, one epoch at a time.

    python bench/train_memory.py [--samples 100000 --side 32 --steps 400]

The cache is written directly with random pixels (decoding is not what is measured). Pages of the memory-mapped cache
count as shared file pages, which the system takes back when it needs them; what must stay flat is the rest (anonymous
memory, `RssAnon`).
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from octofold.compute import device_setup
from octofold.data import images
from octofold.data.manifest import Manifest
from octofold.files import sha256_json
from octofold.recipe import Recipe
from octofold.train import job, training


def memory() -> dict[str, float]:
    """Anonymous and file-backed resident memory, MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def write_cache(folder: Path, table: Manifest, spec: images.PixelSpec) -> int:
    """Write a cache of random pixels where `open_cache` looks for it; return its bytes."""
    ids = table.sample_ids
    name = f"{spec.size}-{spec.fit}-{sha256_json([images.VERSION, list(spec)])[:8]}"
    made = folder / f"{name}-{sha256_json(sorted(ids.tolist()))[:16]}"
    made.mkdir(parents=True)
    random = np.random.default_rng(0)
    each = spec.size * spec.size * 3
    with (made / "pixels.bin").open("wb") as file:
        for start in range(0, len(ids), 1000):
            file.write(random.integers(0, 256, each * min(1000, len(ids) - start), dtype=np.uint8).data)
    np.savez(
        made / "index.npz",
        ids=ids,
        shapes=np.full((len(ids), 2), spec.size),
        offsets=np.arange(len(ids)) * each,
        frames=np.tile([1 / spec.size, 1 / spec.size, 0, 0], (len(ids), 1)),
    )
    return each * len(ids)


def main() -> None:
    """Print memory before, and every tenth of the steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    flags = parser.parse_args()
    number = np.arange(flags.samples)
    columns = {"sample_id": [f"{n:016d}" for n in number], "path": "x.png", "fold": number % 5}
    frame = pd.DataFrame(columns | {"label": np.where(number % 2, "a", "b")})
    table = Manifest(frame, "classify", ("a", "b"), "memory", Path("."))
    with tempfile.TemporaryDirectory() as home:
        images.ROOT = Path(home)
        recipe = Recipe.model_validate(
            {
                "model": {"name": "small_cnn", "input_size": flags.side},
                "augment": {"preset": "baseline"},
                "runtime": {"precision": "fp32", "channels_last": "on"},
            }
        )
        folder = Path(home) / "data" / "memory" / "cache"
        size = write_cache(folder, table, images.PixelSpec.of(recipe.model))
        slot = job.open_job(recipe, table, 0, 0, Path(home), device_setup())
        part = job.enter(slot, 0)
        print(json.dumps({"cache_mb": round(size / 2**20), "before": memory()}))
        for step, micro in enumerate(part.batches.stream(0, 0)):
            training._update(slot, part, micro)
            if step % (flags.steps // 10) == 0:
                print(json.dumps({"step": step, **{key: round(value) for key, value in memory().items()}}), flush=True)
            if step == flags.steps:
                return


if __name__ == "__main__":
    main()
