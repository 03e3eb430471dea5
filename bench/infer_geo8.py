"""geo8 from JPEG files to Predictions, ours against an eager torch loop over ttach's d4, on the same files and weights.

    pip install ttach                      # only here; nothing in the package needs it
    python bench/infer_geo8.py --images DIR [--model tf_efficientnet_lite0 --size 224 --images_count 256]

Both read the same files, decode with the same function and run the same weights. ttach's loop is what people write:
a DataLoader of decoded float tensors, `ClassificationTTAWrapper(net, d4_transform())`, eager, float32. Each side is
timed whole, from file names to an array, in alternating rounds; medians and the range of the rounds' ratios are
printed. Beside it: eight bare forward passes of the engine in use on squares already in memory, the memory at two
image counts, and the largest difference of a probability from ttach's.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from octofold import recipe
from octofold.data.decoding import open_bytes
from octofold.data.images import fit, square
from octofold.infer import ensemble, inference, looks
from octofold.infer.inference import How
from octofold.nets import models


def write_checkpoint(folder: Path, name: str, size: int) -> None:
    """A fold model with ImageNet weights where a package has them, else random; speed does not depend on it."""
    torch.manual_seed(0)
    weights = "package" if "lite" in name else "none"
    settings = recipe.Recipe(model=recipe.Model(name=name, input_size=size, weights=weights))
    classes = tuple(f"class {number}" for number in range(15))
    card = models.ModelCard(settings.model_dump(mode="json"), "classify", classes, "bench", "bench", 0, 0, "none")
    models.write_model(folder, models.build(settings.model, len(classes)), card)


class Photos(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What a ttach user's data set does, with our decoding."""

    def __init__(self, items: list[looks.Item], crew: ensemble.Ensemble) -> None:
        self.items, self.spec = items, crew.specs[0]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> torch.Tensor:
        path = self.items[row].path
        pixels, _ = fit(open_bytes(path.read_bytes(), path), self.spec, path)
        return torch.from_numpy(np.ascontiguousarray(square(pixels, self.spec.size).transpose(2, 0, 1))).float()


def theirs(crew: ensemble.Ensemble, items: list[looks.Item], batch: int, workers: int) -> np.ndarray:
    """The eager loop over ttach's d4."""
    import ttach

    net = crew.voices[0].net.to(memory_format=torch.contiguous_format)
    wrapped = ttach.ClassificationTTAWrapper(
        torch.nn.Sequential(net, torch.nn.Softmax(1)), ttach.aliases.d4_transform()
    )
    loader = torch.utils.data.DataLoader(Photos(items, crew), batch_size=batch, num_workers=workers)
    with torch.inference_mode():
        return np.concatenate([wrapped(images).numpy() for images in loader])


def ours(crew: ensemble.Ensemble, items: list[looks.Item], how: How) -> np.ndarray:
    """What infer does."""
    return np.concatenate([batch.values for batch in inference.stream(crew, items, how, total=1_000_000)])


def bare(crew: ensemble.Ensemble, items: list[looks.Item], batch: int, clock: Callable[[], float]) -> float:
    """Seconds of eight forward passes of the engine over as many squares, already decoded and turned."""
    voice = crew.voices[0]
    squares = np.stack([looks.look(item, crew.specs).squares[voice.spec] for item in items[:batch]])  # type: ignore[union-attr]
    images = torch.from_numpy(squares).permute(0, 3, 1, 2)
    at_once = 8 if getattr(voice.forward, "streams", 0) > 1 else 1  # views, as `predict_views` gives them
    images = images.repeat(at_once, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    start = clock()
    for _ in range(len(items) // batch * 8 // at_once):
        voice.forward(images)
    return (clock() - start) * len(items) / (len(items) // batch * batch)


def main() -> None:
    """Measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images_count", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--their_batch", type=int, default=32)
    parser.add_argument("--their_workers", type=int, default=0)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of all threads; on a busy machine"
    )
    asked = parser.parse_args()
    clock = time.perf_counter if asked.clock == "wall" else time.process_time
    items = (looks.find(asked.images).items * 100)[: asked.images_count]
    how = How("geo8", asked.batch_size, asked.engine, asked.precision)
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch), asked.model, asked.size)
        crew, plain = ensemble.load(scratch), ensemble.load(scratch)
    ours(crew, items[: 2 * asked.batch_size], how)  # chooses the engine
    theirs(plain, items[: asked.their_batch], asked.their_batch, 0)
    rounds = []
    for _ in range(asked.rounds):
        start = clock()
        mine = ours(crew, items, how)
        mine_s = clock() - start
        start = clock()
        other = theirs(plain, items, asked.their_batch, asked.their_workers)
        other_s = clock() - start
        rounds.append((mine_s, other_s, bare(crew, items, asked.batch_size, clock)))
    count = len(items)
    ratios = [other_s / mine_s for mine_s, other_s, _ in rounds]
    shares = [bare_s / mine_s for mine_s, _, bare_s in rounds]
    at = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(4):
        ours(crew, items, how)
    print(
        json.dumps(
            {
                "model": asked.model,
                "size": asked.size,
                "engine": type(crew.voices[0].forward).__name__,
                "precision": asked.precision,
                "clock": asked.clock,
                "threads": torch.get_num_threads(),
                "images": count,
                "ours_img_s": round(count / statistics.median(m for m, _, _ in rounds), 2),
                "ttach_img_s": round(count / statistics.median(o for _, o, _ in rounds), 2),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "bare_forwards_over_ours": round(statistics.median(shares), 3),
                "bare_range": [round(min(shares), 3), round(max(shares), 3)],
                "largest_difference": float(np.abs(mine - other).max()),
                "same_labels": float((mine.argmax(1) == other.argmax(1)).mean()),
                "rss_mb_growth_over_4x_more_images": round(
                    (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at) / 1024, 1
                ),
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
