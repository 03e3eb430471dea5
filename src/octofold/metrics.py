"""Scores: arrays in, one float out. `METRICS` says of each which way is better; `adopt` adds the user's own to it."""

import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octofold.errors import UserError
from octofold.files import existing, sha256_file

Array = npt.NDArray[Any]


def accuracy(probs: Array, target: Array) -> float:
    """Share of rows whose largest probability is the target. `probs` (N, K), `target` (N,) int."""
    return float((probs.argmax(axis=1) == target).mean())


def balanced_accuracy(probs: Array, target: Array) -> float:
    """Mean over the classes present of their recall. `probs` (N, K), `target` (N,) int."""
    table = confusion(probs.argmax(axis=1), target, probs.shape[1])
    present = table.sum(axis=1) > 0
    return float((np.diag(table)[present] / table.sum(axis=1)[present]).mean())


def macro_f1(probs: Array, target: Array) -> float:
    """Mean F1 over the classes that occur in target or prediction. `probs` (N, K), `target` (N,) int."""
    table = confusion(probs.argmax(axis=1), target, probs.shape[1])
    hits, seen = np.diag(table), table.sum(axis=0) + table.sum(axis=1)
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


def log_loss(probs: Array, target: Array) -> float:
    """Mean negative log-likelihood, nats; probabilities clipped at 1e-7. `probs` (N, K), `target` (N,) int."""
    return float(-np.log(np.clip(probs[np.arange(len(target)), target], 1e-7, 1)).mean())


def brier(probs: Array, target: Array) -> float:
    """Mean squared distance to the one-hot target, 0..2. `probs` (N, K), `target` (N,) int."""
    squares = (probs**2).sum(axis=1) - 2 * probs[np.arange(len(target)), target] + 1
    return float(squares.mean())


def auc(probs: Array, target: Array) -> float:
    """Area under the ROC curve, one-vs-rest mean over the classes present (Hand & Till's macro form).

    NaN if only one class is present. `probs` (N, K), `target` (N,) int.
    """
    from scipy.stats import rankdata

    scores = []
    for column in range(probs.shape[1]) if probs.shape[1] > 2 else [1]:
        positive = target == column
        n, m = int(positive.sum()), int((~positive).sum())
        if n and m:
            scores.append((rankdata(probs[:, column])[positive].sum() - n * (n + 1) / 2) / (n * m))
    return float(np.mean(scores)) if scores else float("nan")


def quadratic_kappa(probs: Array, target: Array) -> float:
    """Cohen's kappa with quadratic weights, classes taken as ordered. `probs` (N, K), `target` (N,) int."""
    classes = probs.shape[1]
    table = confusion(probs.argmax(axis=1), target, classes).astype(np.float64)
    distance = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    chance = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    expected = float((distance * chance).sum())
    return 1 - float((distance * table).sum()) / expected if expected else 1.0


def calibration_error(probs: Array, target: Array, bins: int = 15) -> float:
    """Expected calibration error of the top class over equal-width bins (Guo et al. 2017), 0..1."""
    confidence, hit = probs.max(axis=1), probs.argmax(axis=1) == target
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[place == b].mean() - hit[place == b].mean()) * (place == b).sum() for b in np.unique(place)]
    return float(np.sum(gaps) / len(target))


def point_mse(points: Array, target: Array) -> float:
    """Mean squared error per coordinate, px². `points`, `target` (N, P, 2); NaN targets are not counted."""
    return float(np.nanmean((points - target) ** 2))


def point_nme(points: Array, target: Array) -> float:
    """Mean distance over each sample's own spread of points (box diagonal). `points`, `target` (N, P, 2).

    A sample without a spread (one visible point) has no scale and is not counted; NaN if none has.
    """
    low, high = np.nanmin(target, axis=1), np.nanmax(target, axis=1)
    size = np.linalg.norm(high - low, axis=1)
    share = np.linalg.norm(points - target, axis=2)[size > 0] / size[size > 0, None]
    return float(np.nanmean(share)) if np.isfinite(share).any() else math.nan


def confusion(predicted: Array, target: Array, classes: int) -> npt.NDArray[np.int64]:
    """Count rows: ``table[t, p]`` is how often target ``t`` was called ``p``. Both (N,) int; returns (K, K)."""
    return np.bincount(target * classes + predicted, minlength=classes**2).reshape(classes, classes)


class Metric(NamedTuple):
    """A score, its direction and its range; for the user's own, the sha256 of the file it was read from."""

    score: Callable[[Array, Array], float]
    higher_is_better: bool
    task: str  # classify | keypoints
    sha256: str = ""
    least: float = -math.inf
    most: float = math.inf

    @property
    def sign(self) -> int:
        """1 if more is better, else -1."""
        return 1 if self.higher_is_better else -1


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, True, "classify", least=0, most=1),
    "balanced_accuracy": Metric(balanced_accuracy, True, "classify", least=0, most=1),
    "macro_f1": Metric(macro_f1, True, "classify", least=0, most=1),
    "log_loss": Metric(log_loss, False, "classify", least=0),
    "brier": Metric(brier, False, "classify", least=0, most=2),
    "auc": Metric(auc, True, "classify", least=0, most=1),
    "quadratic_kappa": Metric(quadratic_kappa, True, "classify", least=-1, most=1),
    "ece": Metric(calibration_error, False, "classify", least=0, most=1),
    "mse": Metric(point_mse, False, "keypoints", least=0),
    "nme": Metric(point_nme, False, "keypoints", least=0),
}


def adopt(name: str, task: str) -> str:
    """Return the row of `METRICS` that a ``--metric`` means, reading the user's own function into it first.

    Args:
        name: a row, or ``path/to/file.py:function``. The function takes ``(values, target)``: ``(N, K)`` probabilities
            (rows sum to 1) and ``(N,)`` int classes, or ``(N, P, 2)`` points in px and as many with NaN where a point
            is missing; both read-only. It returns one finite number for any rows, also where a class is absent.
            Higher is better, unless ``function.lower_is_better = True``. It may be called thousands of times.
        task: ``classify`` or ``keypoints``.

    Raises:
        UserError: no such row for this task, no such file or function, or a file that cannot be run.
    """
    if ".py:" not in name:
        fitting = [row for row, metric in METRICS.items() if metric.task == task]
        if name not in fitting:
            wanted = f"for {task} one of {', '.join(fitting)}, or path/to/file.py:function"
            raise UserError(f"metric '{name}'", expected=wanted, got=name)
        return name
    place, _, label = name.rpartition(":")
    path = existing(place, "a Python file with the metric, as path/to/file.py:function")
    sha = sha256_file(path)
    known = METRICS.get(label)
    if known is not None and not known.sha256:
        raise UserError(f"metric '{name}'", expected="a name of its own", got=f"'{label}', which is ours", fix="rename")
    if known is None or known.sha256 != sha or known.task != task:
        function = _read(path, label)
        METRICS[label] = Metric(
            _guarded(function, path, label), not getattr(function, "lower_is_better", False), task, sha
        )
    return label


def fingerprint(name: str) -> dict[str, str]:
    """Return what a run's tags say of the user's own metric: ``{"metric.sha256": …}``; nothing of a row of ours."""
    return {"metric.sha256": sha256_file(existing(name.rpartition(":")[0], "the metric"))} if ".py:" in name else {}


def _read(path: Path, label: str) -> Callable[[Array, Array], Any]:
    spec = importlib.util.spec_from_file_location(f"octofold_metric_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(path, expected="a Python file", got="something else")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise UserError(path, expected="a Python file that runs", got=_blame(error, path)) from error
    function = getattr(module, label, None)
    if not callable(function):
        others = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[:1] != "_"]
        got = f"functions: {', '.join(others) or 'none'}"
        raise UserError(path, expected=f"a function '{label}(values, target) -> float'", got=got)
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        got = f"{label}{inspect.signature(function)}"
        raise UserError(path, expected=f"{label}(values, target) -> float", got=got) from error
    return function  # type: ignore[no-any-return]


def _guarded(function: Callable[[Array, Array], Any], path: Path, label: str) -> Callable[[Array, Array], float]:
    """The user's function, kept from writing into our arrays; what it does wrong is said as its own mistake."""

    def score(values: Array, target: Array) -> float:
        views = [np.asarray(part).view() for part in (values, target)]
        for view in views:
            view.flags.writeable = False
        try:
            found = function(*views)
        except Exception as error:  # whatever the user's function does
            rows = f" on values {values.shape}, target {target.shape}"
            raise UserError(f"metric {path}:{label}", expected="a score", got=_blame(error, path) + rows) from error
        try:
            number = float(found)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"metric {path}:{label}", expected="one finite number for any rows", got=repr(found)[:80])
        return number

    return score


def _blame(error: Exception, path: Path) -> str:
    """The error in words, with the line of the user's file it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")
