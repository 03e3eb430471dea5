"""Images per second of one training epoch, ours beside plain torch, timm's loaders, fastai and Lightning.

    pip install fastai lightning                # only here
    python bench/train_peers.py --manifest data/grocery15/manifest.csv --model resnet18 --size 128 [--rounds 3]

Every peer is a process of its own, with its own defaults and no flag given by its user; they take turns, A B C A B C,
on the same photos, the same timm network (random weights: speed does not depend on them), AdamW and batch size.
`timm_expert` is timm's loader with what its expert would ask for: bf16 and channels_last. Ours is timed after
calibration and after the photos are in the cache; both costs are printed beside it. Epochs are cut at --steps, the
first two steps are not counted. With --record FILE an interrupted bench goes on.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import turns

CORES = os.cpu_count() or 1
Marks = list[float]  # when each step ended


def network(flags: argparse.Namespace) -> Any:
    """The timm network all peers train."""
    import timm

    sized = {"img_size": flags.size} if flags.model.startswith("vit") else {}
    return timm.create_model(flags.model, num_classes=15, **sized)


def folder_loader(flags: argparse.Namespace) -> Any:
    """torchvision's ImageFolder and a DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    change = [
        T.RandomResizedCrop(flags.size),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize([0.5] * 3, [0.5] * 3),
    ]
    photos = ImageFolder(flags.folder / "train", T.Compose(change))
    return DataLoader(photos, flags.batch, shuffle=True, num_workers=CORES, drop_last=True)


def loop(loader: Any, flags: argparse.Namespace, expert: bool = False) -> Marks:
    """The loop everybody writes; an expert adds bf16 and channels_last."""
    import torch

    net, marks = network(flags).train(), []
    if expert:
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for images, target in loader:
        images = images.contiguous(memory_format=torch.channels_last) if expert else images
        with torch.autocast("cpu", torch.bfloat16) if expert else nullcontext():
            loss = torch.nn.functional.cross_entropy(net(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        marks.append(time.perf_counter())
        if len(marks) == flags.steps:
            break
    return marks


def plain(flags: argparse.Namespace) -> Marks:
    """torch and torchvision."""
    return loop(folder_loader(flags), flags)


def timm(flags: argparse.Namespace, expert: bool = False) -> Marks:
    """The loaders of timm's training script (colour jitter and all) with its plain loop."""
    from timm.data import create_dataset, create_loader

    photos = create_dataset("", root=str(flags.folder / "train"), is_training=True)
    loader = create_loader(
        photos, (3, flags.size, flags.size), flags.batch, is_training=True, use_prefetcher=False,
        num_workers=CORES, device="cpu", persistent_workers=False,
    )  # fmt: skip
    return loop(loader, flags, expert)


def timm_expert(flags: argparse.Namespace) -> Marks:
    """The same, told to use bf16 and channels_last."""
    return timm(flags, expert=True)


def fastai(flags: argparse.Namespace) -> Marks:
    """A fastai Learner over the same network."""
    from fastai.vision.all import Callback, CancelFitException, ImageDataLoaders, Learner, Normalize, RandomResizedCrop

    marks: Marks = []

    class Clock(Callback):  # type: ignore[misc]
        def after_batch(self) -> None:
            if self.training:
                marks.append(time.perf_counter())
                if len(marks) == flags.steps:
                    raise CancelFitException

    data = ImageDataLoaders.from_folder(
        flags.folder / "train", valid_pct=0.05, seed=0, item_tfms=RandomResizedCrop(flags.size), bs=flags.batch,
        batch_tfms=Normalize.from_stats([0.5] * 3, [0.5] * 3), num_workers=CORES,
    )  # fmt: skip
    learner = Learner(data, network(flags), cbs=Clock())
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1)
    return marks


def lightning(flags: argparse.Namespace) -> Marks:
    """A Lightning Trainer over the same network and plain's data."""
    import lightning as L
    import torch

    marks: Marks = []

    class Module(L.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network(flags)

        def training_step(self, batch: Any, index: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            marks.append(time.perf_counter())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_epochs=1, max_steps=flags.steps, accelerator="cpu", **quiet).fit(Module(), folder_loader(flags))
    return marks


def ours(flags: argparse.Namespace) -> Marks:
    """The loop of `training.train_slot`, nothing asked for."""
    from octofold.compute import device_setup
    from octofold.data import manifest
    from octofold.recipe import Recipe
    from octofold.train import job, training

    model = {"name": flags.model, "input_size": flags.size}
    recipe = Recipe.model_validate({"model": model, "augment": {"preset": "no_color"}, "batch_size": flags.batch})
    begun = time.perf_counter()

    def steps() -> Iterator[float]:
        for batch in part.batches.stream(0, 0):
            training._update(slot, part, batch)
            yield time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        slot = job.open_job(recipe, manifest.read(flags.manifest), 0, 0, Path(folder), device_setup())
        part = job.enter(slot, 0)
        flags.beside = {"ready_s": round(time.perf_counter() - begun, 1), "runtime": slot.runtime}
        return [mark for _, mark in zip(range(flags.steps), steps(), strict=False)]


PEERS = {peer.__name__: peer for peer in (ours, plain, timm, timm_expert, fastai, lightning)}


def main() -> None:
    """Run the peers in turns; print every number, then medians and ours over each peer, round by round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--only", choices=PEERS, help="what a turn calls")
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    if flags.only:
        flags.beside = {}
        marks = PEERS[flags.only](flags)
        speed = flags.batch * (len(marks) - 2) / (marks[-1] - marks[1])
        print(json.dumps({"images_per_s": round(speed, 2), **flags.beside}))
        return
    asked = [f"--{name}={getattr(flags, name)}" for name in ("manifest", "model", "size", "batch", "steps")]
    with tempfile.TemporaryDirectory() as spare, turns.class_folders(flags.manifest) as folder:
        record = flags.record or Path(spare, "record.jsonl")
        turns.take_turns(
            flags.peers, range(flags.rounds),
            lambda peer, _: turns.alone(__file__, *asked, f"--only={peer}", f"--folder={folder}"), record,
        )  # fmt: skip
        speeds: dict[str, dict[int, float]] = {}
        for line in turns.lines(record):
            speeds.setdefault(line["name"], {})[line["round"]] = line["images_per_s"]
    medians = {peer: round(statistics.median(found.values()), 1) for peer, found in speeds.items()}
    mine = speeds.get("ours", {})
    ratios = {
        peer: [round(mine[number] / speed, 2) for number, speed in found.items() if number in mine]
        for peer, found in speeds.items()
    }
    print(json.dumps({"model": flags.model, "size": flags.size, "images_per_s": medians, "ours_over": ratios}))


if __name__ == "__main__":
    main()
