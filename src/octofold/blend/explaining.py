"""Explaining: why a row of a submission says what it says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octofold import tta
from octofold.blend.ledger import Ledger
from octofold.data import manifest
from octofold.data.images import PixelSpec, load, square
from octofold.errors import UserError
from octofold.files import ROOT
from octofold.infer.combining import Blend
from octofold.nets.models import read_model
from octofold.nets.tasks import make_task
from octofold.recipe import Model
from octofold.track import registry

Array = npt.NDArray[Any]
SHOWN = PixelSpec(224, "pad")


@dataclass(frozen=True)
class Explanation:
    """One row, explained.

    Attributes:
        lines: in words.
        image: ``(224, 224, 3)`` uint8.
        caption: under it.
        views: ``(V, 3)`` blended probability of the row's top classes in each view alone; empty if not asked.
        classes: those classes.
        nearest: training images most like it, ``(224, 224, 3)`` uint8 each, with a caption.
    """

    lines: list[str]
    image: Array
    caption: str
    views: Array
    classes: list[str]
    nearest: list[tuple[Array, str]]


def explain(book: Ledger, row: dict[str, Any], ask_models: bool = True) -> Explanation:
    """Gather what is known of one row.

    Args:
        book: the submission's ledger.
        row: from `Ledger.row`.
        ask_models: let the pinned fold models look at the image once more, view by view.

    Raises:
        UserError: the test or training images are gone, the image has changed since, or a pinned model is gone.
    """
    about = book.about
    folder = Path(about["manifest"]).parent if about.get("manifest") else ROOT / "data" / about["competition"]
    test, train = manifest.read(folder / "test.csv"), manifest.read(folder / "manifest.csv")
    place = np.flatnonzero(test.sample_ids == row["sample_id"])
    if not len(place):
        raise UserError(folder / "test.csv", expected=f"sample {row['sample_id']}", got="none", fix="prepare again")
    path = test.paths[int(place[0])]
    picture = _picture(path, str(row["sample_id"]))  # refused where the submission speaks of another
    shown = [str(row[f"top{n}"]) for n in (1, 2, 3) if f"top{n}" in row]
    whole = _by_view(about, path, test.classes) if ask_models and shown else np.zeros((0, len(test.classes)))
    views = whole[:, [test.classes.index(name) for name in shown]]
    firsts = [test.classes[best] for best in whole.argmax(axis=1)]
    near = json.loads(row["nearest"])
    by_path = dict(zip(train.table["path"], zip(train.paths, _labels(train), strict=True), strict=True))
    nearest = [
        (_picture(by_path[name][0]), f"{by_path[name][1]}  {score:.2f}") for name, score in near if name in by_path
    ]
    caption = f"{shown[0]}  {row['p1']:.3f}" if shown else "points"
    return Explanation(_lines(book, row, firsts, shown, near), picture, caption, views, shown, nearest)


def _labels(train: manifest.Manifest) -> list[str]:
    return [str(name) for name in train.table["label"]] if "label" in train.table else [""] * len(train.table)


def _picture(path: Path, sample_id: str = "") -> Array:
    return square(load(path, SHOWN, sample_id)[0], SHOWN.size)


def _by_view(about: dict[str, Any], path: Path, classes: tuple[str, ...]) -> Array:
    """``(V, K)``: what the blend would say of each view alone."""
    blend, names = Blend.from_dict(about["blend"]), list(about["weights"])
    views = tta.VIEWS[about["views"] if len(tta.VIEWS[about["views"]]) > 1 else "geo8"]
    members = np.zeros((len(names), len(views), len(classes)))
    unheard = {name for name, weight in about["weights"].items() if not weight} if blend.is_mean else set()
    for pin in about["models"]:
        if not pin["share"] or pin["member"] in unheard:
            continue
        net, card = read_model(registry.fetch(_slot(about, pin)))
        task = make_task(card.task, card.classes, card.swap)
        spec = PixelSpec.of(Model.model_validate(card.recipe["model"]))
        pixels = torch.from_numpy(square(load(path, spec)[0], spec.size).copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            seen = torch.cat([tta.apply(pixels, view) for view in views])
            said = task.activate(net(seen)).numpy()
        order = [card.classes.index(name) for name in classes]
        members[names.index(pin["member"])] += pin["share"] * said[:, order]
    found: Array = blend.apply(members)
    return found


def _slot(about: dict[str, Any], pin: dict[str, Any]) -> registry.Slot:
    for versions in registry.slots(about["competition"], [pin["member"]]).get(pin["member"], {}).values():
        for slot in versions:
            if (slot.name, slot.version) == (pin["name"], pin["version"]):
                return slot
    raise UserError(
        f"{pin['name']} version {pin['version']}", expected="in the registry", got="deleted", fix="--views false"
    )


def _said(about: dict[str, Any], row: dict[str, Any], firsts: list[str], shown: list[str]) -> list[str]:
    """What members, fold models and views say of the row; pair experts have no vote, so they are not counted."""
    voters = list(about["weights"])[: about.get("blend", {}).get("params", {}).get("voters")]
    count = sum(pin["member"] in voters for pin in about["models"])
    lines = []
    if not shown:
        for name, weight in about["weights"].items():
            lines.append(f"  {name} (weight {weight:.3f}) is {row[f'off_px.{name}']:.2f} px off the blend, on average")
        return [*lines, f"the {count} fold models are {row['disagreement']:.2f} px off the blend, on average"]
    tops = ", ".join(f"{row[f'top{n + 1}']} {row[f'p{n + 1}']:.3f}" for n in range(len(shown)))
    lines.append(f"label {row['label']}: {tops}")
    for name, weight in about["weights"].items():
        lines.append(
            f"  {name} (weight {weight:.3f}) says {row[f'vote.{name}']}; {shown[0]} gets {row[f'p.{name}']:.3f}"
        )
    lines.append(f"{row['disagreement']:.0%} of the {count} fold models put another class first")
    if firsts:
        agree = sum(name == shown[0] for name in firsts)
        spread = row["views_spread"]
        lines.append(f"{agree} of {len(firsts)} views put {shown[0]} first; spread over views {spread:.3f}")
    return lines


def _lines(book: Ledger, row: dict[str, Any], firsts: list[str], shown: list[str], near: list[Any]) -> list[str]:
    about = book.about
    lines = [f"{', '.join(json.loads(row['names']))}  (sample {row['sample_id']})", *_said(about, row, firsts, shown)]
    for name, score in near:
        lines.append(f"looks like training image {name} (similarity {score:.3f})")
    models = sorted({f"{pin['name']} v{pin['version']}" for pin in about["models"]})
    git = about.get("git", {})
    lines += [
        f"method {about['method']}, views {about['views']}, run {about['run_id']}",
        f"manifest {about['manifest_hash'][:12]}, code {str(git.get('git.commit', ''))[:12]}"
        + (" with local changes" if git.get("git.dirty") == "true" else ""),
        f"models {', '.join(models)}",
    ]
    return lines
