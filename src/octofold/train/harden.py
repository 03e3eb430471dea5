"""Harden: which samples are easy, and so go through a stronger augmentation while the others are spared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.errors import UserError, preview
from octofold.predictions import Predictions
from octofold.recipe import Augment, Easy, Phase

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def row_presets(
    phase: Phase,
    augment: Augment,
    target: npt.NDArray[Any],
    train_rows: Ints,
    classes: Sequence[str],
    sample_ids: npt.NDArray[np.str_],
) -> str | list[str]:
    """Name the augmentation preset of each row of the manifest in a phase; one name if all rows share it.

    Args:
        phase: its `augment` and `easy_augment`.
        augment: default preset, and what is easy.
        target: ``(N,)`` int classes of the whole manifest.
        train_rows: rows in the training folds; frequencies and quantiles are taken over these alone.
        classes: class names.
        sample_ids: ``(N,)``, to look OOF predictions up.

    Raises:
        UserError: keypoints, an unknown class, or no usable OOF file.
    """
    preset = phase.augment or augment.preset
    if phase.easy_augment is None or phase.easy_augment == preset:
        return preset
    if target.ndim != 1:
        raise UserError(f"phase '{phase.name}': easy_augment", expected="classes", got="keypoints")
    easy = easy_rows(augment.easy, target, train_rows, classes, sample_ids)
    return [phase.easy_augment if is_easy else preset for is_easy in easy.tolist()]


def easy_rows(
    easy: Easy, target: Ints, train_rows: Ints, classes: Sequence[str], sample_ids: npt.NDArray[np.str_]
) -> Mask:
    """Mark the easy rows of the manifest, ``(N,)`` bool. See `recipe.Easy` for what easy means."""
    if easy.classes:
        unknown = sorted(set(easy.classes) - set(classes))
        if unknown:
            raise UserError("augment.easy.classes", expected=f"among {preview(classes, 12)}", got=preview(unknown))
        return np.isin(target, [classes.index(name) for name in easy.classes])
    if easy.by == "frequency":
        count = np.bincount(target[train_rows], minlength=len(classes))
        return np.isin(target, np.argsort(-count, kind="stable")[: easy.count])
    probs = _oof(easy, classes, sample_ids[train_rows])  # (n, K)
    right = probs.argmax(axis=1) == target[train_rows]
    if easy.by == "accuracy":
        seen = np.bincount(target[train_rows], minlength=len(classes))
        hits = np.bincount(target[train_rows][right], minlength=len(classes))
        share = np.where(seen > 0, hits / np.maximum(seen, 1), -1.0)
        return np.isin(target, np.argsort(-share, kind="stable")[: easy.count])
    sure = probs.max(axis=1)
    found = np.zeros(len(target), dtype=np.bool_)
    found[train_rows] = right & (sure > np.quantile(sure, easy.quantile))
    return found


def wanted_rows(wanted: Sequence[str], target: npt.NDArray[Any], classes: Sequence[str]) -> Mask:
    """Mark the rows a recipe trains on: all, or those of the classes it names (a pair expert), ``(N,)`` bool.

    Raises:
        UserError: an unknown class, or keypoints.
    """
    if not wanted:
        return np.ones(len(target), dtype=np.bool_)
    unknown = sorted(set(wanted) - set(classes))
    if unknown or target.ndim != 1 or len(set(wanted)) < 2:
        raise UserError("classes", expected=f"two or more of {preview(classes, 12)}", got=preview(wanted))
    return np.isin(target, [list(classes).index(name) for name in wanted])


def _oof(easy: Easy, classes: Sequence[str], sample_ids: npt.NDArray[np.str_]) -> npt.NDArray[np.float32]:
    if easy.oof is None:
        raise UserError(
            f"augment.easy.by: {easy.by}",
            expected="augment.easy.oof, the OOF Predictions file of a member trained before",
            got="none",
            fix="train a member first and give the oof/none.parquet of its run",
        )
    oof = Predictions.load(easy.oof)
    if not oof.is_oof:
        raise UserError(
            easy.oof, expected="out-of-fold predictions", got="predictions of a model that may have seen these samples"
        )
    return oof.reorder(classes).take(sample_ids).values
