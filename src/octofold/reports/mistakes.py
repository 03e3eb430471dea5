"""Mistakes: how sure probabilities are against how often they are right, which classes they mix up."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.metrics import calibration_error, confusion
from octofold.reports import axes

Array = npt.NDArray[Any]
MOST = 40
"""Classes of the confusion table."""


def calibration(probs: Array, target: Array, bins: int = 10) -> dict[str, Any]:
    """Confidence against accuracy in bins of equal width, with 95 % binomial intervals (Wilson 1927)."""
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == target
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = []
    for number in np.unique(place):
        mine = place == number
        count, share = int(mine.sum()), float(right[mine].mean())
        middle = (share + 1.92 / count) / (1 + 3.84 / count)
        half = 1.96 / (1 + 3.84 / count) * math.sqrt(share * (1 - share) / count + 0.96 / count**2)
        rows.append((float(confidence[mine].mean()), share, max(0.0, middle - half), min(1.0, middle + half), count))
    gap = float(confidence.mean() - right.mean())
    return {"rows": rows, "ece": calibration_error(probs, target), "gap": gap, "axis": axes.fit([0.0, 1.0])}


def confusions(probs: Array, target: Array, classes: Sequence[str]) -> dict[str, Any]:
    """The table of truth against prediction, and its largest wrong cells."""
    table = confusion(probs.argmax(axis=1), target, len(classes))
    wrong = table * (1 - np.eye(len(classes), dtype=table.dtype))
    total = int(wrong.sum())
    order = np.argsort(-wrong, axis=None)[: min(8, int((wrong > 0).sum()))]
    pairs = [(classes[flat // len(classes)], classes[flat % len(classes)], int(wrong.flat[flat])) for flat in order]
    both = wrong + wrong.T
    top = divmod(int(np.triu(both).argmax()), len(classes))
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    sure = (probs.max(axis=1) > 0.9) & (probs.argmax(axis=1) != target)
    return {
        "classes": list(classes),
        "table": table.tolist() if len(classes) <= MOST else None,
        "share": share.tolist(),
        "pairs": pairs,
        "errors": total,
        "top": (classes[top[0]], classes[top[1]], float(both[top] / max(1, total))),
        "sure": int(sure.sum()),
    }
