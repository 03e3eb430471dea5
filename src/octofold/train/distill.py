"""Distillation: one student learns the probabilities of a whole blend (Hinton et al. 2015), and is served in its place.

The teacher is the blend's out-of-fold file, cross-fitted: no row's soft target comes from a model that trained on it.
The student is trained over folds like any member and has OOF of its own. One thing is not undone: the teacher's models
for a row of fold j did train on fold k, so a trace of fold k's labels is in what the student of fold k is taught.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from octofold import recipe
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import existing
from octofold.predictions import Predictions
from octofold.track import tracking, versions

Floats = npt.NDArray[np.float32]
TINY = 1e-7


def find_teacher(address: str) -> Path:
    """Return the local Predictions file behind an address.

    Args:
        address: a path, ``runs:/<run id>/oof/<views>.parquet``, or ``models:/<competition>.blend@production``, which
            stands for the OOF of the run that made that blend.

    Raises:
        UserError: nothing is there, or the blend's run kept no OOF.
    """
    if address.startswith("models:/"):
        run_id = _run_of(address)
        files = sorted(tracking.list_artifacts(run_id, "oof"))
        if not files:
            raise UserError(
                f"distill.teacher: {address}", expected="a blend whose run kept its OOF", got="none", fix="blend again"
            )
        return tracking.download(run_id, files[0])
    if address.startswith("runs:/"):
        return tracking.fetch_uri(address, f"distill.teacher: {address}")
    return existing(address, "the teacher's out-of-fold Predictions (parquet)", "blend first, or give models:/…")


def _run_of(address: str) -> str:
    """The run behind ``models:/NAME@alias`` or ``models:/NAME/VERSION``."""
    name, at, alias = address.removeprefix("models:/").partition("@")
    if at:
        number = str(versions.registered_model(name).aliases.get(alias, ""))
    else:
        name, _, number = name.rpartition("/")
    if not name or not number.isdigit():
        got = f"no version at alias {alias}" if at else "no version"
        raise UserError(f"distill.teacher: {address}", expected="models:/NAME/VERSION or models:/NAME@alias", got=got)
    return str(versions.existing_version(name, int(number)).run_id)


def read_teacher(config: recipe.Distill, manifest: Manifest, train: npt.NDArray[np.int64]) -> Floats:
    """Read the soft targets of a manifest's rows.

    Returns:
        ``(N, K)`` float32 probabilities in the manifest's rows and class order; NaN where the teacher said nothing.

    Raises:
        UserError: not out-of-fold, points, other classes, or not one training row.
    """
    said = Predictions.load(find_teacher(config.teacher))
    where = f"distill.teacher: {config.teacher}"
    if manifest.task != "classify" or said.is_points:
        raise UserError(where, expected="classes", got="points", fix="train a student of points on the labels alone")
    if not said.is_oof:
        raise UserError(
            where, expected="out-of-fold predictions", got="predictions that may have seen their rows",
            fix="give the OOF of the blend's run: models:/<competition>.blend@production",
        )  # fmt: skip
    said = said.reorder(manifest.classes)
    place = {name: row for row, name in enumerate(said.sample_ids.tolist())}
    soft = np.full((len(manifest.table), len(manifest.classes)), np.nan, np.float32)
    for row, name in enumerate(manifest.sample_ids.tolist()):
        if name in place:
            soft[row] = said.values[place[name]]
    if not np.isfinite(soft[train]).all(axis=1).any():
        raise UserError(
            where, expected="some of the training rows", got=f"none of them: {preview(said.sample_ids, 3)}",
            fix="the teacher must come from this competition",
        )  # fmt: skip
    return soft


def teach(
    labels: Callable[..., Tensor], logits: Tensor, soft: Tensor, counts: Tensor, config: recipe.Distill
) -> Tensor:
    """Mix the loss on the labels with the cross-entropy to the teacher's probabilities, row by row.

    Args:
        labels: gives the mean loss on the labels; of some rows, if it is given their mask.
        logits: ``(B, K)`` float.
        soft: ``(B, K)`` the teacher's probabilities; rows with NaN are taught by their labels alone.
        counts: ``(B,)`` > 0, how much each row counts in the mean that `labels` takes; in this mean it counts the same.
        config: how much and how soft.
    """
    hard = labels()
    known = torch.isfinite(soft).all(dim=1)
    if not bool(known.any()):
        return hard
    heat = config.temperature
    wanted = (soft[known].clamp_min(TINY).log() / heat).softmax(dim=1)
    # T^2 keeps the gradient's size when the temperature changes
    each = F.cross_entropy(logits[known] / heat, wanted, reduction="none") * heat**2
    heard = counts[known].sum()
    taught = (each * counts[known]).sum() / heard
    replaced = hard if bool(known.all()) else labels(known)
    return hard + config.share * heard / counts.sum() * (taught - replaced)
