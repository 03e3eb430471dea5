"""How near the training loop comes to the bare model: loop step and model-only step, in turns, in one process.

    python bench/train_ceiling.py --manifest data/grocery15/manifest.csv [--models resnet18 --sizes 128 --steps 20]

A loop step loads real photos from the cache, augments them (`no_color`), and takes the optimiser step. The ceiling is
the same optimiser step, same precision and layout, on the batch that is already in memory. The two alternate step by
step, so a busy machine slows both; the ratio of their medians is what counts. On a machine shared with others, --cpu
counts the processor time of one thread instead of seconds. Tracking is measured on its own: what
one epoch's `log_metrics` costs against an epoch of the loop.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from octofold.compute import device_setup
from octofold.data import manifest
from octofold.recipe import Recipe
from octofold.track import tracking
from octofold.train import job, training

MODELS = ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"]


def measure(
    table: manifest.Manifest, name: str, size: int, steps: int, batch: int, clock: Callable[[], float]
) -> dict[str, object]:
    """Return the ratio of ceiling to loop, and images per second, of one network."""
    model = {"name": name, "input_size": size}
    recipe = Recipe.model_validate({"model": model, "augment": {"preset": "no_color"}, "batch_size": batch})
    with tempfile.TemporaryDirectory() as folder:
        slot = job.open_job(recipe, table, table.folds[0], 0, Path(folder), device_setup())
        part = job.enter(slot, 0)
        stream = part.batches.stream(0, 0)
        training._update(slot, part, next(stream))
        loop, bare = [], []
        for _ in range(steps):
            begun = clock()
            micro = next(stream)
            training._update(slot, part, micro)
            middle = clock()
            training._update(slot, part, micro)
            loop.append(middle - begun)
            bare.append(clock() - middle)
    return {
        "model": name,
        "size": size,
        "runtime": slot.runtime,
        "loop_over_ceiling": round(statistics.median(bare) / statistics.median(loop), 3),
        "of_pairs": [round(b / a, 3) for a, b in zip(loop, bare, strict=True)],
        "images_per_s": round(batch / statistics.median(loop), 1),
        "steps_per_epoch": part.batches.order.steps,
    }


def tracking_share(epoch_s: float) -> dict[str, float]:
    """Return what logging an epoch costs, seconds, and as a share of an epoch."""
    with tracking.run("bench", None, "bench") as run:
        times = []
        for epoch in range(10):
            begun = time.perf_counter()
            run.log_metrics({"train/loss": 1.0, "valid/loss": 1.0, "valid/accuracy": 0.5, "lr": 0.1}, step=epoch)
            times.append(time.perf_counter() - begun)
    cost = statistics.median(times)
    return {"log_s": round(cost, 4), "share_of_an_epoch": round(cost / epoch_s, 5)}


def main() -> None:
    """Print one JSON line per network and size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 224])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cpu", action="store_true")
    flags = parser.parse_args()
    clock = time.process_time if flags.cpu else time.perf_counter
    if flags.cpu:
        torch.set_num_threads(1)
    table = manifest.read(flags.manifest)
    torch.manual_seed(0)
    for size in flags.sizes:
        for name in flags.models:
            found = measure(table, name, size, flags.steps, flags.batch, clock)
            print(json.dumps(found), flush=True)
    epoch_s = float(str(found["steps_per_epoch"])) * flags.batch / float(str(found["images_per_s"]))
    print(json.dumps({"tracking": tracking_share(epoch_s)}))


if __name__ == "__main__":
    main()
