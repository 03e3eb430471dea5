"""Images per second of one training epoch, ours beside plain torch, timm's loaders, fastai and Lightning.

    pip install fastai lightning                # only here
    python bench/train_peers.py --manifest data/grocery15/manifest.csv --model resnet18 --size 128 [--rounds 3]

Every peer is a process of its own, with its own defaults and no flag given by its user; they take turns, A B C A B C,
on the same photos, the same timm network (random weights: speed does not depend on them), AdamW and batch size.
`timm_expert` is timm's loader with what its expert would ask for: bf16 and channels_last. Ours is timed after
calibration and after the photos are in the cache; both costs are printed beside it. Epochs are cut at --steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PEERS = ("ours", "plain", "timm", "timm_expert", "fastai", "lightning")
CLASSES = 15


def timed(steps: Iterator[int], batch: int) -> dict[str, float]:
    """Drive `steps` and return images per second, the first two steps left out."""
    marks = [time.perf_counter() for _ in steps]
    return {"images_per_s": batch * (len(marks) - 2) / (marks[-1] - marks[1])}


def network(flags: argparse.Namespace) -> Any:
    """The timm network all peers train."""
    import timm

    sized = {"img_size": flags.size} if flags.model.startswith("vit") else {}
    return timm.create_model(flags.model, num_classes=CLASSES, **sized)


def loop(loader: Any, flags: argparse.Namespace, expert: bool = False) -> Iterator[int]:
    """The loop everybody writes; an expert adds bf16 and channels_last."""
    import torch

    net = network(flags).train()
    if expert:
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step, (images, target) in enumerate(loader):
        images = images.contiguous(memory_format=torch.channels_last) if expert else images
        with torch.autocast("cpu", torch.bfloat16) if expert else nullcontext():
            loss = torch.nn.functional.cross_entropy(net(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step
        if step + 1 == flags.steps:
            return


def plain(flags: argparse.Namespace) -> dict[str, float]:
    """torch, torchvision's ImageFolder and a DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    change = [
        T.RandomResizedCrop(flags.size),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize([0.5] * 3, [0.5] * 3),
    ]
    photos = ImageFolder(flags.folder, T.Compose(change))
    loader = DataLoader(photos, flags.batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
    return timed(loop(loader, flags), flags.batch)


def timm(flags: argparse.Namespace, expert: bool = False) -> dict[str, float]:
    """The loaders of timm's training script (colour jitter and all) with its plain loop."""
    from timm.data import create_dataset, create_loader

    photos = create_dataset("", root=flags.folder, is_training=True)
    loader = create_loader(
        photos, (3, flags.size, flags.size), flags.batch, is_training=True, use_prefetcher=False,
        num_workers=os.cpu_count() or 1, device="cpu", persistent_workers=False,
    )  # fmt: skip
    return timed(loop(loader, flags, expert), flags.batch)


def timm_expert(flags: argparse.Namespace) -> dict[str, float]:
    """The same, told to use bf16 and channels_last."""
    return timm(flags, expert=True)


def fastai(flags: argparse.Namespace) -> dict[str, float]:
    """A fastai Learner over the same network."""
    from fastai.vision.all import (
        Callback,
        CancelFitException,
        ImageDataLoaders,
        Learner,
        Normalize,
        RandomResizedCrop,
    )

    marks: list[float] = []

    class Clock(Callback):  # type: ignore[misc]
        def after_batch(self) -> None:
            if self.training:
                marks.append(time.perf_counter())
                if len(marks) == flags.steps:
                    raise CancelFitException

    data = ImageDataLoaders.from_folder(
        flags.folder, valid_pct=0.05, seed=0, item_tfms=RandomResizedCrop(flags.size), bs=flags.batch,
        batch_tfms=Normalize.from_stats([0.5] * 3, [0.5] * 3), num_workers=os.cpu_count() or 1,
    )  # fmt: skip
    learner = Learner(data, network(flags), cbs=Clock())
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1)
    return {"images_per_s": flags.batch * (len(marks) - 2) / (marks[-1] - marks[1])}


def lightning(flags: argparse.Namespace) -> dict[str, float]:
    """A Lightning Trainer over the same network and plain's data."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    marks: list[float] = []

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

    change = [
        T.RandomResizedCrop(flags.size),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize([0.5] * 3, [0.5] * 3),
    ]
    photos = ImageFolder(flags.folder, T.Compose(change))
    loader = DataLoader(photos, flags.batch, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True)
    L.Trainer(
        max_epochs=1, max_steps=flags.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu",
    ).fit(Module(), loader)  # fmt: skip
    return {"images_per_s": flags.batch * (len(marks) - 2) / (marks[-1] - marks[1])}


def ours(flags: argparse.Namespace) -> dict[str, Any]:
    """The loop of `training.train_slot`, nothing asked for."""
    from octofold.compute import device_setup
    from octofold.data import manifest
    from octofold.recipe import Recipe
    from octofold.train import job, training

    model = {"name": flags.model, "input_size": flags.size}
    recipe = Recipe.model_validate({"model": model, "augment": {"preset": "no_color"}, "batch_size": flags.batch})
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        slot = job.open_job(recipe, manifest.read(flags.manifest), 0, 0, Path(folder), device_setup())
        part = job.enter(slot, 0)
        ready = time.perf_counter() - begun

        def steps() -> Iterator[int]:
            for step, batch in enumerate(part.batches.stream(0, 0)):
                training._update(slot, part, batch)
                yield step
                if step + 1 == flags.steps:
                    return

        return timed(steps(), flags.batch) | {"ready_s": round(ready, 1), "runtime": slot.runtime}


def class_folders(manifest_file: Path, folder: Path) -> None:
    """Lay the photos out as class folders, what every peer reads."""
    from octofold.data import manifest

    table = manifest.read(manifest_file)
    for path, label in zip(table.paths, table.table["label"], strict=True):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / path.name).symlink_to(path)


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
    parser.add_argument("--only", choices=PEERS)
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    if flags.only:
        print(json.dumps(globals()[flags.only](flags)))
        return
    speeds: dict[str, list[float]] = {peer: [] for peer in flags.peers}
    with tempfile.TemporaryDirectory() as folder:
        class_folders(flags.manifest, Path(folder))
        for _ in range(flags.rounds):
            for peer in flags.peers:
                command = [sys.executable, __file__, *sys.argv[1:], "--only", peer, "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(json.dumps({"peer": peer, "failed": done.stderr.strip().splitlines()[-1:]}), flush=True)
                    continue
                found = json.loads(done.stdout.strip().splitlines()[-1])
                speeds[peer].append(found["images_per_s"])
                print(json.dumps({"peer": peer, **found}), flush=True)
    there = {peer: values for peer, values in speeds.items() if values}
    ratios = {
        peer: round(statistics.median(a / b for a, b in zip(there["ours"], values, strict=False)), 2)
        for peer, values in there.items()
        if "ours" in there
    }
    medians = {peer: round(statistics.median(values), 1) for peer, values in there.items()}
    print(json.dumps({"model": flags.model, "size": flags.size, "images_per_s": medians, "ours_over": ratios}))


if __name__ == "__main__":
    main()
