"""Inference: images in, probabilities or points out, over the views asked for.

Each image is decoded once, a few ahead of the model in a thread; the views are made from the decoded batch, so
memory does not grow with the number of images.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from octofold import tta
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.infer.ensemble import Ensemble, Voice
from octofold.infer.looks import Item, Look, Skipped, ahead, items_of, look
from octofold.infer.passes import Floats, nested, predict_views, to_pixels
from octofold.nets import engine
from octofold.predictions import Predictions

T = TypeVar("T")


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

    Engines are chosen as for all the images: those of a few would be others than the job's.

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
        [batch.values for batch in stream(ensemble, items[:rows], one, len(items)) if len(batch.items)]
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
