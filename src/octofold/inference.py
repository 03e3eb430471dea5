"""Inference: images in, probabilities or points out, over the views asked for.

Each image is decoded once, a few ahead of the model in a thread; the views are made from the decoded batch, so
memory does not grow with the number of images.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from octofold import tta
from octofold.ensemble import Ensemble, Voice
from octofold.errors import UserError, known
from octofold.files import existing, sha256_file
from octofold.images import SUFFIXES, Frame, PixelSpec, find_images, load, square
from octofold.manifest import ID_LENGTH, Manifest
from octofold.manifest import read as read_manifest
from octofold.predictions import Predictions
from octofold.tasks import make_task

if TYPE_CHECKING:
    from octofold.models import ModelCard, Net

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
U = TypeVar("U")


def nested(views: str) -> dict[str, int]:
    """Return the view sets that one pass over `views` gives, with how many views each has.

    Example:
        >>> nested("geo8")
        {'none': 1, 'flip': 2, 'geo4': 4, 'geo8': 8}

    Raises:
        UserError: `views` is not a row of `tta.VIEWS`.
    """
    wanted = tta.VIEWS[known("views", views, tta.VIEWS)]
    sets = {name: row for name, row in tta.VIEWS.items() if row == wanted[: len(row)]}
    return {name: len(row) for name, row in sorted(sets.items(), key=lambda item: len(item[1]))}


def predict_views(forward: Any, task: Any, images: torch.Tensor, views: str) -> dict[str, Floats]:
    """Predict one batch in every view, one view at a time: the memory of a single forward pass.

    Args:
        forward: ``(B, 3, S, S)`` uint8 to logits; a `Net` or an `engine.Engine`.
        task: from `tasks.make_task`.
        images: ``(B, 3, S, S)`` uint8, on the device of `forward`.
        views: row of `tta.VIEWS`.

    Returns:
        For each nested view set, the mean over its views: ``(B, K)`` probabilities or ``(B, P, 2)`` unit points.
    """
    with torch.inference_mode():
        # The outputs are tiny beside the images: keep all views' on the device, fetch them at once.
        passes = [
            task.activate(forward(tta.apply(images, view).contiguous(memory_format=torch.channels_last)).float())
            for view in tta.VIEWS[views]
        ]
        outputs = torch.stack(passes).cpu().numpy().astype(np.float64)  # (V, B, K) or (V, B, P, 2)
    undone = np.stack([task.undo(values, view) for values, view in zip(outputs, tta.VIEWS[views], strict=True)])
    return {name: undone[:count].mean(axis=0).astype(np.float32) for name, count in nested(views).items()}


def predict_rows(
    net: "Net",
    card: "ModelCard",
    squares: Iterable[Bytes],
    frames: Sequence[Frame] | None = None,
    views: str = "geo8",
    precision: str = "fp32",
) -> dict[str, Floats]:
    """Predict many images with one model, streaming.

    Args:
        net: the model, on its device; put in eval mode here and left so.
        card: its card (task, classes, swap).
        squares: batches ``(B, S, S, 3)`` uint8 RGB, as `images.square` makes them; taken one at a time.
        frames: of all N images in order; needed for keypoints, whose points come back in pixels of the originals.
        views: row of `tta.VIEWS`.
        precision: ``fp32``, or ``bf16`` autocast (labels may differ in close calls).

    Returns:
        For each view set nested in `views` (one pass over geo8 gives none, flip, geo4 and geo8):
        ``(N, K)`` float32 probabilities, or ``(N, P, 2)`` float32 points in original pixels.

    Raises:
        UserError: keypoints without frames, or an output that is not finite.
    """
    task = make_task(card.task, card.classes, card.swap)
    task.check_views(views)
    device = next(net.parameters()).device
    net.eval()
    parts: dict[str, list[Floats]] = {name: [] for name in nested(views)}
    for batch in squares:
        images = torch.from_numpy(np.ascontiguousarray(batch)).to(device).permute(0, 3, 1, 2)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for name, values in predict_views(net, task, images, views).items():
                parts[name].append(values)
    width = (len(card.classes), 2) if card.task == "keypoints" else (len(card.classes),)
    whole = {name: np.concatenate(rows) if rows else np.zeros((0, *width), np.float32) for name, rows in parts.items()}
    if card.task == "keypoints":
        whole = {name: to_pixels(points, frames) for name, points in whole.items()}
    for values in whole.values():
        if not np.isfinite(values).all():
            raise UserError(
                f"member '{card.member}' fold {card.fold} seed {card.seed}",
                expected="finite outputs",
                got="NaN or infinite",
                fix="the weights have diverged: train this slot again with a smaller learning rate",
            )
    return whole


def to_pixels(points: Floats, frames: Sequence[Frame] | None) -> Floats:
    """Take points ``(N, P, 2)`` from the unit square to pixels of the N original images.

    Raises:
        UserError: not one frame per row.
    """
    if frames is None or len(frames) != len(points):
        got = "none" if frames is None else str(len(frames))
        raise UserError("keypoints", expected=f"a frame per image ({len(points)})", got=got)
    if not len(points):
        return points
    return np.stack([frame.to_pixels(rows) for frame, rows in zip(frames, points, strict=True)]).astype(np.float32)


class Item(NamedTuple):
    """An image to look at: its name for people, its file, and its id where a manifest gives one."""

    name: str
    path: Path
    sample_id: str = ""


@dataclass(frozen=True)
class Source:
    """What there is to predict: a folder, a single image, or a manifest's rows."""

    items: list[Item]
    where: Path
    is_manifest: bool


def find(images: Path | str) -> Source:
    """List the images under a folder (recursively), of a manifest CSV, or the one image given.

    Raises:
        UserError: nothing there, or no image in it.
    """
    path = existing(images, "a folder of images, an image, or a manifest (CSV)")
    if path.is_dir():
        items = [Item(file.relative_to(path).as_posix(), file) for file in find_images(path)]
        if not items:
            raise UserError(path, expected=f"images ({', '.join(SUFFIXES)}) in it or below", got="none")
        return Source(items, path, False)
    if path.suffix.lower() == ".csv":
        return Source(_items(read_manifest(path)), path, True)
    return Source([Item(path.name, path)], path.parent, False)


def _items(manifest: Manifest) -> list[Item]:
    rows = zip(manifest.table["path"], manifest.paths, manifest.sample_ids, strict=True)
    return [Item(str(name), path, str(sample_id)) for name, path, sample_id in rows]


class Look(NamedTuple):
    """A decoded image: one square and frame per distinct `PixelSpec`."""

    item: Item
    squares: dict[PixelSpec, Bytes]
    frames: dict[PixelSpec, Frame]


class Skipped(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """A few images and what was said of them."""

    items: list[Item]
    values: Floats
    skipped: list[Skipped]


def look(item: Item, specs: Sequence[PixelSpec]) -> Look | Skipped:
    """Decode one image for every spec; give it its content's id where it has none."""
    try:
        views = {spec: load(item.path, spec) for spec in specs}
    except UserError as error:
        return Skipped(item.name, str(error).partition("got:")[2].partition("\n")[0].strip() or str(error))
    known_item = item if item.sample_id else item._replace(sample_id=sha256_file(item.path)[:ID_LENGTH])
    squares = {spec: square(pixels, spec.size) for spec, (pixels, _) in views.items()}
    return Look(known_item, squares, {spec: frame for spec, (_, frame) in views.items()})


def ahead(function: Callable[[T], U], items: Iterable[T], depth: int, workers: int = 1) -> Iterator[U]:
    """Map in order with at most `depth` results waiting, computed by threads while the caller works."""
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def stream(
    ensemble: Ensemble, items: Iterable[Item], views: str = "geo8", batch_size: int = 8, workers: int = 1
) -> Iterator[Batch]:
    """Predict images as they come: decoded once each, a bounded number ahead, memory constant in their number.

    Args:
        ensemble: who speaks.
        items: the images; several may have the same content.
        views: row of `tta.VIEWS`.
        batch_size: images per pass.
        workers: decoding threads.

    Yields:
        Batches in order. Values are ``(B, K)`` probabilities or ``(B, P, 2)`` points in original pixels.
    """
    for voice in ensemble.voices:
        voice.task.check_views(views)
    specs = ensemble.specs
    looks = ahead(lambda item: look(item, specs), items, depth=2 * batch_size, workers=workers)
    while some := list(islice(looks, batch_size)):
        seen = [one for one in some if isinstance(one, Look)]
        skipped = [one for one in some if isinstance(one, Skipped)]
        values = predict_looks(ensemble, seen, views) if seen else np.zeros((0,), np.float32)
        yield Batch([one.item for one in seen], values, skipped)


def predict_looks(ensemble: Ensemble, looks: Sequence[Look], views: str) -> Floats:
    """Predict a few decoded images: every voice in every view, then bagged and combined.

    Returns:
        ``(B, K)`` probabilities or ``(B, P, 2)`` points in original pixels, float32.
    """
    return ensemble.speak([said[views] for said in say(ensemble, looks, views)])


def say(ensemble: Ensemble, looks: Sequence[Look], views: str) -> list[dict[str, Floats]]:
    """Let every voice speak of a few decoded images.

    Returns:
        Per voice, for each view set nested in `views`: ``(B, K)`` probabilities in the order of the voice's own
        classes, or ``(B, P, 2)`` points in original pixels.
    """
    stacked = {spec: np.stack([one.squares[spec] for one in looks]) for spec in ensemble.specs}
    said = []
    for voice in ensemble.voices:
        device = next(voice.net.parameters()).device
        images = torch.from_numpy(stacked[voice.spec]).to(device).permute(0, 3, 1, 2)
        values = predict_views(voice.forward, voice.task, images, views)
        if ensemble.task == "keypoints":
            frames = [one.frames[voice.spec] for one in looks]
            values = {name: to_pixels(points, frames) for name, points in values.items()}
        said.append(values)
    return said


def predict_manifest(
    ensemble: Ensemble, manifest: Manifest, views: str = "geo8", batch_size: int = 8, progress: bool = True
) -> list[dict[str, Predictions]]:
    """Predict every row of a manifest by every voice on its own: what a blend bags and weighs.

    Each image is decoded once for all voices.

    Returns:
        Per voice (in the order of `ensemble.voices`), for each view set nested in `views`, Predictions of all rows.

    Raises:
        UserError: a row's image cannot be read.
    """
    for voice in ensemble.voices:
        voice.task.check_views(views)
    items = _items(manifest)
    parts: list[dict[str, list[Floats]]] = [{name: [] for name in nested(views)} for _ in ensemble.voices]
    looks = ahead(lambda item: look(item, ensemble.specs), items, depth=2 * batch_size)
    with tqdm(total=len(items), unit="img", disable=not progress, mininterval=1) as bar:
        while some := list(islice(looks, batch_size)):
            if lost := [one for one in some if isinstance(one, Skipped)]:
                where = f"{manifest.images}/{lost[0].name}"
                raise UserError(where, expected="a readable image", got=lost[0].reason, fix="run prepare again")
            said = say(ensemble, [one for one in some if isinstance(one, Look)], views)
            for kept, values in zip(parts, said, strict=True):
                for name in kept:
                    kept[name].append(values[name])
            bar.update(len(some))
    return [
        {name: _signed(voice, manifest, np.concatenate(rows), name) for name, rows in kept.items()}
        for voice, kept in zip(ensemble.voices, parts, strict=True)
    ]


def _signed(voice: Voice, manifest: Manifest, values: Floats, views: str) -> Predictions:
    """What a voice said, under its name."""
    card = voice.card
    return Predictions(
        manifest.sample_ids, values, tuple(card.classes), card.manifest_hash, card.member, card.model_sha, views,
        seed=card.seed, extra={"fold_model": card.fold},
    )  # fmt: skip


def pick_device(name: str = "auto") -> str:
    """Return ``cuda``, ``mps`` or ``cpu``: the one asked for, or the best there is.

    Raises:
        UserError: asked for one that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_there in there.items() if is_there)
    if not there.get(name):
        raise UserError(
            "--device", expected=f"one of {', '.join(d for d, is_there in there.items() if is_there)}", got=name
        )
    return name
