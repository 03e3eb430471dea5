"""Validation: what the held-out rows say of the present weights."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from octofold.errors import UserError
from octofold.train.job import Job

VALID_BATCH = 64


def validate(job: Job, features: npt.NDArray[np.float32] | None) -> dict[str, float]:
    """Score the held-out rows: ``valid/loss`` (without smoothing or class weights) and the metrics."""
    job.net.eval()
    rows = job.devices.share(job.valid_rows)  # type: ignore[arg-type]
    plain = job.recipe.loss.model_copy(update={"label_smoothing": 0.0})
    parts, loss, weight = [], 0.0, 0.0
    with torch.inference_mode(), job.autocast():
        for some in chunks(np.asarray(rows), VALID_BATCH):
            if features is not None:
                logits = job.net.head(torch.from_numpy(features[some]).to(job.devices.device))
            else:
                images = torch.from_numpy(np.stack([job.cache.square(row) for row in some.tolist()]))
                images = job.laid_out(images.to(job.devices.device).permute(0, 3, 1, 2))
                logits = job.net(images)  # never compiled: the last batch has a shape of its own
            wanted, share = job.unit_target[some], float(job.task.counts(job.unit_target[some]).sum())
            loss += share * float(job.task.loss(logits.float(), torch.from_numpy(wanted).to(logits.device), plain))
            weight += share
            parts.append(job.task.activate(logits).float().cpu().numpy())
    gathered = job.devices.gather((np.asarray(rows), np.concatenate(parts) if parts else None, loss, weight))
    order = np.concatenate([part[0] for part in gathered])
    values = np.concatenate([part[1] for part in gathered if part[1] is not None])[np.argsort(order)]
    if not np.isfinite(values).all():
        raise diverged(job, math.nan)
    order = np.sort(order)
    if values.ndim == 3:
        values = np.stack([job.cache.frames[row].to_pixels(v) for row, v in zip(order, values, strict=True)])
    metrics = {"valid/loss": sum(part[2] for part in gathered) / (sum(part[3] for part in gathered) or 1.0)}
    for name in dict.fromkeys([job.metric, job.task.default_metric]):
        metrics[f"valid/{name}"] = job.task.score(values, job.target[order], name)
    if math.isnan(metrics[f"valid/{job.metric}"]) and job.recipe.needs_metric:
        raise _scoreless(job)
    return metrics


def _scoreless(job: Job) -> UserError:
    """NaN is never a gain: the first epoch would be kept, whatever the later ones learn."""
    return UserError(
        f"{job.name}: metric {job.metric}",
        expected="a number on the held-out fold, to choose the epoch by",
        got=f"NaN from finite outputs: fold {job.fold} lacks what {job.metric} needs (auc: two classes; nme: a sample"
        " with two visible points)",
        fix="choose another metric by --metric, or have every fold hold what it needs",
    )


def diverged(job: Job, loss: float) -> UserError:
    now = job.progress
    return UserError(
        f"{job.name}: phase {now.phase} epoch {now.epoch} step {now.step}",
        expected="a finite loss",
        got=str(loss),
        fix=f"lower optim.lr (now {job.recipe.optim.lr:g}), lengthen the warm-up, set optim.clip_norm, or "
        "--runtime.precision fp32",
    )


def chunks(rows: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
