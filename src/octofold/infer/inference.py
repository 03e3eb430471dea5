"""Inference: images in, probabilities or points out, over the views asked for.

Each image is decoded once, a few ahead of the model in a thread; the views are made from the decoded batch, so
memory does not grow with the number of images.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from octofold import tta
from octofold.data.images import Frame
from octofold.data.manifest import Manifest
from octofold.errors import UserError, known
from octofold.infer.ensemble import Ensemble, Voice
from octofold.infer.looks import Item, Look, Skipped, ahead, items_of, look
from octofold.nets import engine
from octofold.nets.tasks import make_task
from octofold.predictions import Predictions

if TYPE_CHECKING:
    from octofold.nets.models import ModelCard, Net

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


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

    An engine that deals images out to streams (`OpenVino`) gets all views at once: bytes wait, activations do not.

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
        turned = (tta.apply(images, view).contiguous(memory_format=torch.channels_last) for view in tta.VIEWS[views])
        if getattr(forward, "streams", 0) > 1:
            logits = forward(torch.cat(list(turned))).split(len(images))
        else:
            logits = map(forward, turned)
        passes = [task.activate(one.float()) for one in logits]
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


class Batch(NamedTuple):
    """A few images and what was said of them."""

    items: list[Item]
    values: Floats
    skipped: list[Skipped]


@dataclass(frozen=True)
class How:
    """How to look, beyond which models and images.

    Attributes:
        views: row of `tta.VIEWS`.
        batch_size: images per pass.
        engine: row of `engine.ENGINES`, or ``auto``.
        precision: ``fp32``, exact; or ``bf16``, for labels only.
        early_exit: 0 = every view of every image. 1 = an image is left as soon as no remaining view could change its
            label; smaller values take that share of the provable lead to be enough. For labels only, and for weighted
            means only: after another rule (geometric, stack …) a lead proves nothing.
    """

    views: str = "geo8"
    batch_size: int = 8
    engine: str = "auto"
    precision: str = "fp32"
    early_exit: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether probabilities come out, not just labels."""
        return self.precision == "fp32" and not self.early_exit


def stream(ensemble: Ensemble, items: Sequence[Item], how: How, total: int = 0) -> Iterator[Batch]:
    """Predict images as they come: decoded once each, a bounded number ahead, memory constant in their number.

    Args:
        ensemble: who speaks.
        items: the images; several may have the same content.
        how: views, batch size, engine.
        total: images of the whole job, if more than these: what an engine's making must pay for.

    Yields:
        Batches in order. Values are ``(B, K)`` probabilities or ``(B, P, 2)`` points in original pixels.

    Raises:
        UserError: views that these models cannot take, or an early exit of a blend that is no weighted mean.
    """
    if how.early_exit and not ensemble.is_mean:
        raise UserError(
            "--early_exit",
            expected="a model, a bag or a blend that is a weighted mean",
            got=f"{ensemble.name}, whose rule may turn on a view not yet looked at",
            fix="leave it out",
        )
    for voice in ensemble.voices:
        voice.task.check_views(how.views)

    def speak(seen: list[Look]) -> Floats:
        return predict_looks(ensemble, seen, how.views, how.early_exit) if seen else np.zeros((0,), np.float32)

    for seen, skipped, values in _spoken(ensemble, items, how, max(total, len(items)), speak):
        yield Batch([one.item for one in seen], values, skipped)


def _spoken(
    ensemble: Ensemble, items: Sequence[Item], how: How, total: int, speak: Callable[[list[Look]], T]
) -> Iterator[tuple[list[Look], list[Skipped], T]]:
    """Decode, a few images ahead, and let `speak` answer batch by batch, in order.

    Engines that deal out to streams get the next batch before the last one has ended: what is done between two of them
    (turning the squares, averaging the views) then costs nothing.
    """
    specs = ensemble.specs
    looks = ahead(lambda item: look(item, specs), items, depth=2 * how.batch_size, workers=_decoders(ensemble))

    def batches() -> Iterator[tuple[list[Look], list[Skipped]]]:
        while some := list(islice(looks, how.batch_size)):
            seen = [one for one in some if isinstance(one, Look)]
            if seen:
                equip(ensemble, seen, how, total)
            yield seen, [one for one in some if isinstance(one, Skipped)]

    def answer(batch: tuple[list[Look], list[Skipped]]) -> tuple[list[Look], list[Skipped], T]:
        return *batch, speak(batch[0])

    waiting = batches()
    if (first := next(waiting, None)) is None:
        return
    waiting = chain([first], waiting)
    if all(getattr(voice.forward, "streams", 0) > 1 for voice in ensemble.voices):
        yield from ahead(answer, waiting, depth=1, workers=2)
    else:
        yield from map(answer, waiting)


def equip(ensemble: Ensemble, looks: Sequence[Look], how: How, total: int) -> None:
    """Give every voice the fastest exact engine for a job of `total` images; the first batch measures and verifies."""
    if ensemble.equipped == (how.engine, how.precision):
        return
    for voice in ensemble.voices:
        images = _images(voice, looks)
        forwards = total * len(tta.VIEWS[how.views])
        voice.forward = engine.make(
            voice.net, voice.architecture, images, voice.task.activate, forwards, how.engine, how.precision
        )
    ensemble.equipped = (how.engine, how.precision)


def _images(voice: Voice, looks: Sequence[Look]) -> torch.Tensor:
    """``(B, 3, S, S)`` uint8, channels last in memory, on the voice's device."""
    squares = torch.from_numpy(np.stack([one.squares[voice.spec] for one in looks]))
    return squares.to(next(voice.net.parameters()).device).permute(0, 3, 1, 2)


def _decoders(ensemble: Ensemble) -> int:
    """Decoding threads: one beside a CPU that is busy anyway, many before an accelerator."""
    on_cpu = next(ensemble.voices[0].net.parameters()).device.type == "cpu"
    return 1 if on_cpu else min(16, os.cpu_count() or 1)


def predict_looks(ensemble: Ensemble, looks: Sequence[Look], views: str, early_exit: float = 0.0) -> Floats:
    """Predict a few decoded images: every voice in every view, then bagged and combined.

    Returns:
        ``(B, K)`` probabilities or ``(B, P, 2)`` points in original pixels, float32. With `early_exit`, whose meaning
        is `How`'s, the mean over the views that were looked at: its largest column is all it is good for.
    """
    if not early_exit:
        return ensemble.speak([said[views] for said in say(ensemble, looks, views)])
    rows, found = np.arange(len(looks)), np.zeros((len(looks), len(ensemble.classes)), np.float32)
    images = [_images(voice, looks) for voice in ensemble.voices]
    sums = [np.zeros(found.shape) for _ in images]
    for count, view in enumerate(tta.VIEWS[views], start=1):
        for voice, own, total in zip(ensemble.voices, images, sums, strict=True):
            with torch.inference_mode():
                turned = tta.apply(own[rows], view).contiguous(memory_format=torch.channels_last)
                total[rows] += voice.task.activate(voice.forward(turned)).cpu().numpy()
        found[rows] = ensemble.speak([(total[rows] / count).astype(np.float32) for total in sums])
        best = np.sort(found[rows], axis=1)
        lead = count * (best[:, -1] - best[:, -2]) if found.shape[1] > 1 else np.full(len(rows), np.inf)
        rows = rows[lead < early_exit * (len(tta.VIEWS[views]) - count)]
        if not len(rows):
            break
    return found


def say(ensemble: Ensemble, looks: Sequence[Look], views: str) -> list[dict[str, Floats]]:
    """Let every voice speak of a few decoded images.

    Returns:
        Per voice, for each view set nested in `views`: ``(B, K)`` probabilities in the order of the voice's own
        classes, or ``(B, P, 2)`` points in original pixels.
    """
    said = []
    for voice in ensemble.voices:
        values = predict_views(voice.forward, voice.task, _images(voice, looks), views)
        if ensemble.task == "keypoints":
            frames = [one.frames[voice.spec] for one in looks]
            values = {name: to_pixels(points, frames) for name, points in values.items()}
        said.append(values)
    return said


def predict_manifest(
    ensemble: Ensemble,
    manifest: Manifest,
    views: str = "geo8",
    batch_size: int = 8,
    progress: bool = True,
    engine: str = "auto",
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
    items, how = items_of(manifest), How(views, batch_size, engine)
    parts: list[dict[str, list[Floats]]] = [{name: [] for name in nested(views)} for _ in ensemble.voices]

    def speak(seen: list[Look]) -> list[dict[str, Floats]]:
        return say(ensemble, seen, views) if seen else []

    with tqdm(total=len(items), unit="img", disable=not progress, mininterval=1) as bar:
        for seen, lost, said in _spoken(ensemble, items, how, len(items), speak):
            if lost:
                where = f"{manifest.images}/{lost[0].name}"
                raise UserError(where, expected="a readable image", got=lost[0].reason, fix="run prepare again")
            for kept, values in zip(parts, said, strict=True):
                for name in kept:
                    kept[name].append(values[name])
            bar.update(len(seen))
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


def agreement(ensemble: Ensemble, items: Sequence[Item], how: How, rows: int = 64) -> dict[str, float]:
    """Measure what a fast way costs: its labels on the first images against float32 in every view.

    Returns:
        ``agreement/labels`` (share of equal labels), ``agreement/change`` (largest change of a probability) and
        ``agreement/images`` (how many were compared).

    Raises:
        UserError: points have no labels to agree on, or not one image is readable.
    """
    if ensemble.task == "keypoints":
        raise UserError(
            "--precision, --early_exit", expected="a classifier", got="a model of points", fix="leave them out"
        )
    plain, fast = (
        [batch.values for batch in stream(ensemble, items[:rows], one) if len(batch.items)]
        for one in (How(how.views, how.batch_size), how)
    )
    if not plain:
        return {"agreement/images": 0.0}
    exact, quick = np.concatenate(plain), np.concatenate(fast)
    return {
        "agreement/labels": float((exact.argmax(axis=1) == quick.argmax(axis=1)).mean()),
        "agreement/change": float(np.abs(exact - quick).max()),
        "agreement/images": float(len(exact)),
    }


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
