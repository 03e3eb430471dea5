"""Tasks: what the logits mean, what is minimised, how a view is undone, how a prediction is scored."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from octofold import recipe
from octofold.errors import UserError, known
from octofold.metrics import METRICS
from octofold.tta import VIEWS, View, is_mirrored, undo_points

Array = npt.NDArray[Any]

PERCENT = 100.0
"""Point losses are in percent of the square's side, so wing's and smooth L1's knees do not depend on its size."""


def _wing(error: Tensor, width: float = 10.0, curvature: float = 2.0) -> Tensor:
    """Wing loss (Feng et al. 2018): logarithmic near zero, L1 beyond `width`; both in percent of the side."""
    gap = width - width * math.log1p(width / curvature)
    size = error.abs()
    return torch.where(size < width, width * torch.log1p(size / curvature), size - gap)


POINT_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": torch.square,
    "l1": torch.abs,
    "smooth_l1": lambda error: F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=1.0),
    "wing": _wing,
}
CLASS_LOSSES = ("cross_entropy", "bce")


class Classify:
    """One class per image. Targets: ``(B,)`` int64, or ``(B, K)`` float shares (mixup); values: ``(B, K)`` probs."""

    name = "classify"
    default_metric = "accuracy"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.swap: list[int] | None = None
        self.outputs = len(self.classes)

    def loss(self, logits: Tensor, target: Tensor, config: recipe.Loss, class_weight: Tensor | None = None) -> Tensor:
        """Return the mean loss of a batch, in float32 whatever the logits' precision.

        Args:
            logits: ``(B, K)``.
            target: ``(B,)`` int class or ``(B, K)`` shares that sum to 1.
            config: which loss; ``bce`` scores each class on its own (one against the rest).
            class_weight: ``(K,)`` or None.

        Raises:
            UserError: a loss that is for points.
        """
        name = "cross_entropy" if config.name == "auto" else config.name
        known("loss.name for classes", name, CLASS_LOSSES)
        logits = logits.float()
        if name == "cross_entropy":
            return F.cross_entropy(logits, target, weight=class_weight, label_smoothing=config.label_smoothing)
        shares = one_hot(target, self.outputs) * (1 - config.label_smoothing) + config.label_smoothing / self.outputs
        return F.binary_cross_entropy_with_logits(logits, shares, weight=class_weight)

    def counts(self, target: Array, class_weight: Array | None = None) -> Array:
        """Return how much each row of ``(N,)`` int classes counts in the mean that `loss` takes, ``(N,)``."""
        return np.ones(len(target)) if class_weight is None else class_weight[target]

    def activate(self, logits: Tensor) -> Tensor:
        """Turn logits ``(B, K)`` into float32 probabilities."""
        return logits.float().softmax(dim=1)

    def undo(self, values: Array, view: View) -> Array:
        """Return `values` (..., K): a class does not move with the image."""
        return values

    def check_views(self, views: str) -> None:
        """Refuse an unknown view set; every known one is right for classes."""
        known("views", views, VIEWS)

    def check_recipe(self, config: recipe.Recipe) -> None:
        """Refuse what only points know."""
        if config.model.head == "heatmap":  # its outputs are places, x and y in turn
            raise UserError(
                "model.head: heatmap", expected="key points", got="classes", fix="model.head: linear or mlp"
            )

    def score(self, values: Array, target: Array, metric: str) -> float:
        """Score probabilities ``(N, K)`` against ``(N,)`` int classes."""
        return _score(self.name, values, target, metric)


class Keypoints:
    """P points per image. Targets: ``(B, P, 2)`` in the unit square, NaN where missing; values: the same."""

    name = "keypoints"
    default_metric = "mse"

    def __init__(self, classes: Sequence[str], swap: Sequence[int] | None = None) -> None:
        self.classes = tuple(classes)
        self.swap = None if swap is None else check_swap(swap, self.classes)
        self.outputs = 2 * len(self.classes)

    def loss(self, logits: Tensor, target: Tensor, config: recipe.Loss, class_weight: Tensor | None = None) -> Tensor:
        """Return the mean loss over the coordinates that are there, in (a function of) percent of the side.

        Args:
            logits: ``(B, 2P)``.
            target: ``(B, P, 2)`` unit coordinates; a point with a NaN is missing and counts nothing.
            config: which loss.
            class_weight: ``(P,)`` weight per point, or None.

        Raises:
            UserError: a loss that is for classes.
        """
        name = "mse" if config.name == "auto" else config.name
        known("loss.name for points", name, POINT_LOSSES)
        there = torch.isfinite(target).all(dim=-1, keepdim=True).expand_as(target)  # (B, P, 2)
        wanted = torch.where(there, target, torch.full_like(target, 0.5))
        each = POINT_LOSSES[name]((self.activate(logits) - wanted.float()) * PERCENT)
        weight = there.float() if class_weight is None else there * class_weight.view(1, -1, 1)
        return (each * weight).sum() / weight.sum().clamp(min=1e-12)

    def counts(self, target: Array, class_weight: Array | None = None) -> Array:
        """Return how much each row of ``(N, P, 2)`` points counts in the mean that `loss` takes, ``(N,)``."""
        there = np.isfinite(target).all(axis=-1)
        return np.asarray(there.sum(axis=1) if class_weight is None else there @ class_weight)

    def activate(self, logits: Tensor) -> Tensor:
        """Turn logits ``(B, 2P)`` into float32 points ``(B, P, 2)``; logit 0 is the middle of the square."""
        return logits.float().reshape(len(logits), -1, 2) + 0.5

    def undo(self, values: Array, view: View) -> Array:
        """Take unit points ``(..., P, 2)`` found in a view back to the image."""
        return undo_points(values, view, self.swap)

    def check_views(self, views: str) -> None:
        """Refuse mirrored views where nobody said which points are each other's twins.

        Raises:
            UserError: an unknown view set, or one that mirrors while there is no swap table.
        """
        known("views", views, VIEWS)
        if self.swap is None and any(is_mirrored(view) for view in VIEWS[views]):
            raise UserError(
                f"views '{views}' on keypoints",
                expected="a swap table, because mirrored views turn left points into right ones",
                got="none in the manifest",
                fix="give prepare the pairs (--swap none if no point has a twin), or use tta: none",
            )

    def check_recipe(self, config: recipe.Recipe) -> None:
        """Refuse what only classes know, rather than pass it over."""
        if config.augment.mixes:
            raise UserError("augment.mixup_prob, augment.cutmix_prob", expected="0: points cannot be mixed")
        asked = [
            name for name in ("class_weights", "weighted_sampler", "label_smoothing") if getattr(config.loss, name)
        ]
        if asked:
            where = ", ".join(f"loss.{name}" for name in asked)
            raise UserError(where, expected="classes", got="key points", fix="leave it out: points have no classes")
        if any(phase.replicas for phase in config.phases):
            raise UserError("phases[].replicas", expected="0: points would have to move along", fix="leave it out")

    def score(self, values: Array, target: Array, metric: str) -> float:
        """Score points ``(N, P, 2)`` against the truth, both in original pixels; missing points are not counted."""
        return _score(self.name, values, target, metric)


Task = Classify | Keypoints
TASKS: dict[str, type[Classify] | type[Keypoints]] = {"classify": Classify, "keypoints": Keypoints}


def make_task(task_name: str, classes: Sequence[str], swap: Sequence[int] | None = None) -> Task:
    """Make the task a manifest or a model card names.

    Args:
        task_name: ``classify`` or ``keypoints``.
        classes: class or point names, in the order of the outputs.
        swap: keypoints: the index of each point's mirror twin (its own, if it has none); None = unknown.

    Raises:
        UserError: an unknown task, or a swap table that is no involution of the points.
    """
    known("task", task_name, TASKS)
    return Keypoints(classes, swap) if task_name == "keypoints" else Classify(classes)


def check_swap(swap: Sequence[int], classes: Sequence[str]) -> list[int]:
    """Return the table as a list; applying it twice must give every point back.

    Raises:
        UserError: another length, an index out of range, or a twin whose twin is somebody else.
    """
    table, count = [int(twin) for twin in swap], len(classes)
    if len(table) != count or any(not 0 <= twin < count for twin in table):
        raise UserError("swap table", expected=f"{count} indices in 0..{count - 1}", got=str(table[:12]))
    odd = [classes[point] for point, twin in enumerate(table) if table[twin] != point]
    if odd:
        raise UserError("swap table", expected="twins of each other", got=f"one-sided: {', '.join(odd[:5])}")
    return table


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Return targets as float shares ``(B, K)``: ints become one-hot, shares pass through."""
    return target.float() if target.ndim == 2 else F.one_hot(target, classes).float()


def balanced_weights(target: Array, classes: int) -> npt.NDArray[np.float32]:
    """Weigh classes by ``n / (K n_c)``, scaled so that the largest is 1 (original 000); absent classes get 0.

    Args:
        target: ``(N,)`` int classes of the **training** folds only; the original counted held-out rows too.
        classes: K.
    """
    count = np.bincount(target, minlength=classes).astype(np.float64)
    raw = np.divide(len(target), classes * count, out=np.zeros(classes), where=count > 0)
    return np.asarray(raw / max(float(raw.max()), 1e-12), dtype=np.float32)


def sample_weights(target: Array, classes: int) -> npt.NDArray[np.float64]:
    """Chance of each training row under the weighted sampler, ``(N,)``, summing to 1: every class equally often."""
    chance = balanced_weights(target, classes).astype(np.float64)[target]
    return np.asarray(chance / chance.sum())


def _score(task: str, values: Array, target: Array, metric: str) -> float:
    known(f"metric for {task}", metric, [name for name, row in METRICS.items() if row.task == task])
    return METRICS[metric].score(values, target)
