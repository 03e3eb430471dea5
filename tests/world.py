"""A tiny world made in code: coloured blobs whose class and whose points are known. No files are shipped."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from octofold.data.manifest import Manifest

CLASSES = ("ash", "birch", "cedar")


def make_world(folder: Path, samples: int = 60, side: int = 20, folds: int = 3, task: str = "classify") -> Manifest:
    """Write `samples` PNGs of `side` px and their manifest ``manifest.csv`` into `folder`.

    A class is a colour of blob on noise; the one key point, ``tip``, is its centre, missing in every ninth image.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = []
    for number in range(samples):
        kind = number % len(CLASSES)
        x, y = random.integers(4, side - 4, 2)
        pixels = random.integers(0, 90, (side, side, 3), dtype=np.uint8)
        pixels[y - 3 : y + 3, x - 3 : x + 3, kind] = 230
        Image.fromarray(pixels).save(images / f"{number:03d}.png")
        row = {"sample_id": f"s{number:015d}", "path": f"{number:03d}.png", "group": "", "fold": number // 3 % folds}
        there = number % 9 != 8
        point = {"tip_x": x - 0.5 if there else np.nan, "tip_y": y - 0.5 if there else np.nan}
        rows.append(row | ({"label": CLASSES[kind]} if task == "classify" else point))
    manifest = Manifest(
        table=pd.DataFrame(rows),
        task=task,
        classes=CLASSES if task == "classify" else ("tip",),
        competition="tiny",
        images=images,
        info={} if task == "classify" else {"swap": [0]},
    )
    manifest.save(folder / "manifest.csv")
    return manifest
