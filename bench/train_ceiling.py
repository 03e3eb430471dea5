"""How near the training loop comes to the bare model: loop step and model-only step, in turns, in one process.

    python bench/train_ceiling.py --manifest data/grocery15/manifest.csv [--models resnet18 --sizes 128 --turns 8]

A loop step loads real photos from the cache, augments them (`no_color`), and takes the optimiser step. The ceiling is
the step that one would write by hand for the batch that is already in memory: same network, precision, layout, loss,
optimiser and clipping, none of the loop's own (reseeding, watching for overflow, counting). The two take turns, --turn
steps each, so a busy machine slows both; what counts is the median of the turns' ratios. On a machine shared with
others, --cpu counts the processor time of one thread instead of seconds. Tracking is measured on its own: what one
epoch's `log_metrics` into MLflow costs against an epoch of the loop.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from octofold.compute import device_setup
from octofold.data import manifest
from octofold.recipe import Recipe
from octofold.track import tracking
from octofold.train import job, training
from octofold.train.batches import MicroBatch

MODELS = ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"]


def measure(table: manifest.Manifest, name: str, size: int, flags: argparse.Namespace) -> dict[str, object]:
    """Return the ratio of ceiling to loop, and images per second, of one network."""
    clock = time.process_time if flags.cpu else time.perf_counter
    settings = {
        "model": {"name": name, "input_size": size},
        "augment": {"preset": "no_color"},
        "batch_size": flags.batch,
        "runtime": {"workers": flags.workers, "compile": flags.compile},
        "folds": table.folds[:1],
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate(settings)
        slot = job.open_job(recipe, table, table.folds[0], 0, Path(folder), device_setup())
        part = job.enter(slot, 0)
        stream = itertools.chain.from_iterable(part.batches.stream(0, epoch) for epoch in itertools.count())
        training._update(slot, part, batch := next(stream))
        bare_step(slot, part, batch)
        loop, bare = [], []
        for _ in range(flags.turns):
            begun = clock()
            for _ in range(flags.turn):
                training._update(slot, part, batch := next(stream))
            middle = clock()
            for _ in range(flags.turn):
                bare_step(slot, part, batch)
            loop.append((middle - begun) / flags.turn)
            bare.append((clock() - middle) / flags.turn)
    pairs = [round(b / a, 3) for a, b in zip(loop, bare, strict=True)]
    return {
        "model": name,
        "size": size,
        "runtime": slot.runtime,
        "loop_over_ceiling": statistics.median(pairs),
        "of_turns": pairs,
        "images_per_s": round(flags.batch / statistics.median(loop), 1),
        "steps_per_epoch": part.batches.order.steps,
    }


def bare_step(slot: job.Job, part: job.Part, batch: list[MicroBatch]) -> None:
    """The step written by hand."""
    part.optimizer.zero_grad(set_to_none=True)
    with slot.autocast():
        logits = slot.forward(slot.laid_out(batch[0].inputs))
    torch.nn.functional.cross_entropy(logits.float(), batch[0].target).backward()
    torch.nn.utils.clip_grad_norm_(part.parameters, 1.0)
    part.optimizer.step()


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
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn", type=int, default=2, help="steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, help="as the recipe's runtime.workers")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--cpu", action="store_true")
    flags = parser.parse_args()
    if flags.cpu:
        torch.set_num_threads(1)
    table = manifest.read(flags.manifest)
    torch.manual_seed(0)
    for size in flags.sizes:
        for name in flags.models:
            found = measure(table, name, size, flags)
            print(json.dumps(found), flush=True)
    epoch_s = float(str(found["steps_per_epoch"])) * flags.batch / float(str(found["images_per_s"]))
    print(json.dumps({"tracking": tracking_share(epoch_s)}))


if __name__ == "__main__":
    main()
