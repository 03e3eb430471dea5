"""A small labelled world for the tests of cleaning and review: coloured squares, some under a wrong name."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from octofold.clean.vectors import Embeddings
from octofold.data.manifest import Manifest
from octofold.files import sha256_file
from octofold.predictions import Predictions

CLASSES = ("apple", "<b>kiwi</b>", "лимон 🍋")
COLOURS = ((200, 30, 30), (60, 160, 40), (230, 210, 40))
EACH = 14


def make_manifest(folder: Path, wrong: dict[int, int] | None = None) -> tuple[Manifest, np.ndarray]:
    """Write ``3 x EACH`` images; sample `row` shows class ``row % 3``, but is labelled ``wrong[row]`` where named.

    Returns:
        the manifest (saved), and what each image truly shows.
    """
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    truth = np.arange(3 * EACH) % 3
    rows = []
    for row, shown in enumerate(truth.tolist()):
        name = f"{'<img src=x onerror=document.title=1>' if row == 1 else 'photo'} {row:02d} ж.png"
        colour = np.clip(np.array(COLOURS[shown]) + rng.integers(-20, 20, (96, 96, 3)), 0, 255).astype(np.uint8)
        colour[10 : 10 + row, 20:40] = 255
        Image.fromarray(colour).save(images / name)
        label = CLASSES[(wrong or {}).get(row, shown)]
        rows.append([sha256_file(images / name)[:16], name, label, "", row % 5])
    table = pd.DataFrame(rows, columns=["sample_id", "path", "label", "group", "fold"])
    manifest = Manifest(table, "classify", CLASSES, "world", images, file=folder / "manifest.csv")
    manifest.save(folder / "manifest.csv")
    return manifest, truth


def make_oof(manifest: Manifest, truth: np.ndarray, seed: int = 0, sure: float = 0.8) -> Predictions:
    """Out-of-fold predictions of a model that mostly sees what the images show."""
    noise = np.random.default_rng(seed).dirichlet(np.ones(3), len(truth))
    values = sure * np.eye(3)[truth] + (1 - sure) * noise
    return Predictions(
        manifest.sample_ids, values, CLASSES, manifest.hash, "net", f"{seed:064d}", "none", manifest.fold, seed
    )


def make_embeddings(manifest: Manifest, truth: np.ndarray) -> Embeddings:
    """Vectors that cluster by what the images show."""
    rng = np.random.default_rng(1)
    values = np.eye(3)[truth] @ rng.normal(size=(3, 40)) * 2 + rng.normal(size=(len(truth), 40)) * 0.5
    return Embeddings(manifest.sample_ids, values.astype(np.float32))
