"""The unit costs that the arithmetic of docs/scale.md multiplies, one JSON line: bytes, and CPU seconds of one thread.

    OMP_NUM_THREADS=1 python bench/unit_costs.py --photo ../shared/data/grocery15/test/test_00007.jpg

CPU time and not wall time, so that a busy machine tells nearly the same. Geo8's images per second come from
bench/infer_geo8.py, the registry's times from bench/registry.py.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def cpu(act: Callable[[], object], repeats: int) -> float:
    """CPU seconds of one call: the least of three rounds."""
    rounds = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(repeats):
            act()
        rounds.append((time.process_time() - start) / repeats)
    return min(rounds)


def photos(photo: Path, folder: Path) -> dict[str, float]:
    """Decoding and resizing for training at 192 px, from a small photo and from a phone's."""
    from octofold.data.images import PixelSpec, load

    spec, found = PixelSpec(192), {}
    for name, size, repeats in (("500x375", (500, 375), 100), ("12MP", (4000, 3000), 10)):
        path = folder / f"{name}.jpg"
        Image.open(photo).convert("RGB").resize(size).save(path, quality=85)
        found[f"decode {name}, ms"] = 1000 * cpu(lambda path=path: load(path, spec), repeats)
    return found | {"cached pixels 4:3, bytes": float(load(folder / "500x375.jpg", spec)[0].nbytes)}


def predictions(folder: Path, rows: int = 100_000, classes: int = 15) -> dict[str, float]:
    """A Predictions file: what softmax outputs take, whose digits do not compress as rounded ones would."""
    from octofold.predictions import Predictions

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, classes)) * 3
    values = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.array([rng.bytes(8).hex() for _ in range(rows)])
    names = tuple(f"class {number}" for number in range(classes))
    said = Predictions(ids, values.astype(np.float32), names, "m" * 64, "lite0", "s" * 64, "geo8")
    path = folder / "predictions.parquet"
    wrote, read = cpu(lambda: said.save(path), 1), cpu(lambda: Predictions.load(path), 1)
    return {
        "Predictions, bytes a row": path.stat().st_size / rows,
        "Predictions written, us a row": 1e6 * wrote / rows,
        "Predictions read, us a row": 1e6 * read / rows,
    }


def weights(rows: int = 20_000, classes: int = 15, members: int = 100) -> dict[str, float]:
    """A blend's Gram matrix, and the weights on it."""
    from octofold.blend import solvers

    rng = np.random.default_rng(0)
    said = rng.dirichlet(np.ones(classes), (members, rows)).astype(np.float32)
    target = rng.integers(0, classes, rows)
    table = solvers.gram(said, target)
    return {
        "Gram of 100 members, us a row": 1e6 * cpu(lambda: solvers.gram(said, target), 1) / rows,
        "100 weights on it, ms": 1000 * cpu(lambda: solvers.simplex(table.residual), 5),
    }


def store(folder: Path, runs: int = 24, epochs: int = 30) -> dict[str, float]:
    """The database's growth by a slot's run: a recipe's params, eight metrics an epoch."""
    from octofold.recipe import Recipe
    from octofold.track import tracking

    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"
    file = folder / "mlruns" / "mlflow.db"
    sizes = []
    for number in range(runs + 1):  # the first makes the tables and the experiment
        with tracking.run("train.slot", Recipe(), "bench", name=f"run {number}") as run:
            for epoch in range(epochs):
                run.log_metrics({f"valid/metric{i}": 0.1 * i for i in range(8)}, step=epoch)
        sizes.append(file.stat().st_size)
    return {f"a run of {epochs} epochs, bytes": (sizes[-1] - sizes[0]) / runs}


def checkpoints(folder: Path) -> dict[str, float]:
    """Bytes of a fold model."""
    from octofold.nets import models
    from octofold.recipe import Recipe

    found = {}
    for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite1"):
        recipe = Recipe.model_validate({"model": {"name": name, "input_size": 192, "weights": "none"}})
        classes = tuple(f"class {number}" for number in range(15))
        card = models.ModelCard(recipe.model_dump(mode="json"), "classify", classes, "bench", "m", 0, 0, "none")
        models.write_model(folder / name, models.build(recipe.model, 15), card)
        found[f"{name}, MB"] = (folder / name / "model.safetensors").stat().st_size / 1e6
    return found


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, required=True, help="any photo; it is resized to the sizes measured")
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "mlruns").mkdir()
        found = photos(asked.photo, place) | predictions(place) | weights() | store(place) | checkpoints(place)
    print(json.dumps({name: float(f"{value:.3g}") for name, value in found.items()}))


if __name__ == "__main__":
    main()
