"""Passes: one network over batches of squares in the views asked for, and what the views say together."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from octofold import tta
from octofold.data.images import Frame
from octofold.errors import UserError, known
from octofold.nets.tasks import make_task

if TYPE_CHECKING:
    from octofold.nets.models import ModelCard, Net

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


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
