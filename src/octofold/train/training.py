"""Training: one slot (member, fold, seed) from pixels to weights and out-of-fold predictions.

The loop is `train_slot`; it reads top to bottom. Every batch and every random draw is a pure function of (seed, phase,
epoch, step), so a checkpoint holds weights, optimiser, averages, counters and history, and nothing else: killed at any
moment, the same call ends with the same bits.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octofold.compute import Devices, device_setup
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.recipe import Recipe
from octofold.train import checkpoint, optim, profiling
from octofold.train.batches import MicroBatch, seed_of
from octofold.train.distill import teach
from octofold.train.interrupt import StopRequest
from octofold.train.job import Job, Part, enter, open_job, set_mode
from octofold.train.job import metric_of as metric_of
from octofold.train.outcome import SlotResult as SlotResult
from octofold.train.outcome import finish, read_result
from octofold.train.validation import diverged, validate

log = logging.getLogger("octofold")
Report = Callable[[int, dict[str, float]], None]
MOST_SKIPPED = 10
"""Steps in a row whose gradients may overflow before the training is given up."""


# ---- the loop -------------------------------------------------------------------------------------------------------


def train_slot(
    recipe: Recipe,
    manifest: Manifest,
    fold: int,
    seed: int,
    folder: Path,
    report: Report,
    devices: Devices | None = None,
    start: Path | None = None,
) -> SlotResult:
    """Train one slot, or go on with it, or return it if it is done.

    Args:
        recipe: how.
        manifest: on what.
        fold: held out.
        seed: of the weights' start, the batches and the augmentation.
        folder: where the checkpoint, the model and the OOF go.
        report: called after each epoch with its number (0-based over all phases) and metrics; may raise to stop.
        devices: from `compute.device_setup`; None = as the recipe's runtime says.
        start: file or checkpoint folder to start from, where the recipe names one that had to be looked up.

    Raises:
        UserError: a loss that is not finite, one image alone before BatchNorm, or a checkpoint of another recipe,
            manifest or code.
        KeyboardInterrupt: asked to stop; the checkpoint is written.
    """
    identity = checkpoint.identity(recipe, manifest, fold, seed, start)
    checkpoint.claim(folder, identity)
    if (folder / "done.json").exists():
        return read_result(folder)
    devices = devices or device_setup(recipe.runtime.device, recipe.runtime.threads)
    job = open_job(recipe, manifest, fold, seed, folder, devices, start)
    now, clock = job.progress, checkpoint.Clock(recipe.runtime.checkpoint_s)
    traced = profiling.profile(recipe.runtime.profile_steps, folder / "profile")
    watched = profiling.events(recipe.runtime.tensorboard, folder / "tensorboard")
    with StopRequest(folder, folder.parent) as stop, traced as tick, watched as write_events:
        for number, phase in enumerate(recipe.phases):
            if number < now.phase:
                continue
            part = enter(job, number)
            if phase.keep_start and now.epoch == now.step == 0:
                _keep_best(job, validate(job, part.features)[f"valid/{job.metric}"], len(now.history) - 1)
                set_mode(job, part)
            while now.epoch < phase.epochs and not _is_over(job):
                for batch in part.batches.stream(number, now.epoch, now.step):
                    optim.set_lr(part.optimizer, _rate(job, part, now.epoch * part.batches.order.steps + now.step))
                    now.losses.append(_update(job, part, batch))
                    tick()
                    now.step += 1
                    if (asked := job.devices.any(stop.is_set())) or clock.is_due():
                        _save(job, clock, part)
                    if asked:
                        raise KeyboardInterrupt
                metrics = _finish_epoch(job, part)
                write_events(job.net, metrics, len(now.history) - 1)
                now.epoch, now.step, now.losses = now.epoch + 1, 0, []
                report(len(now.history) - 1, metrics)
                if clock.is_due():
                    _save(job, clock, part)
            now.phase, now.epoch = number + 1, 0
            job.saved = None
    _save(job, checkpoint.Clock(0), None)
    return finish(job)


def _update(job: Job, part: Part, batch: list[MicroBatch]) -> float:
    """Take one optimiser step; return the step's mean loss. Overflowing gradients skip the step."""
    now = job.progress
    seed = seed_of(job.seed, now.phase, now.epoch, now.step)
    part.optimizer.zero_grad(set_to_none=True)
    loss = _gradients(job, part, batch, seed)
    if part.sam is not None and part.sam.ascend():
        part.optimizer.zero_grad(set_to_none=True)
        with optim.frozen_statistics(job.net):
            _gradients(job, part, batch, seed)  # the same images, mixing and dropout, at the worst point nearby
        part.sam.descend()
    if job.scale.value != 1:
        for parameter in part.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(job.scale.value)
    norm = optim.gradient_norm(part.parameters)
    finite = bool(torch.isfinite(norm))
    if finite:
        if job.recipe.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(part.parameters, job.recipe.optim.clip_norm, norm)
        part.optimizer.step()
        if job.average.recipe.kind == "ema":
            job.average.update(job.net)
    job.scale.update(overflowed=not finite)
    _count_skipped(job, finite)
    return loss


def _gradients(job: Job, part: Part, batch: list[MicroBatch], seed: int) -> float:
    """Add up the gradients of a step's micro-batches over all processes; return the mean loss."""
    total = torch.zeros((), device=job.devices.device)
    for number, micro in enumerate(batch):
        _reseed(seed_of(seed, number, job.devices.rank), job.devices.device)
        logits = _forward(job, part, micro)
        if job.teacher is None:
            loss = _on_labels(job, micro, logits.float())
        else:
            soft = job.teacher[torch.from_numpy(micro.rows)].to(logits.device)
            counts = torch.from_numpy(job.counts[micro.rows]).to(logits.device, torch.float32)
            labels = partial(_on_labels, job, micro, logits.float())
            loss = teach(labels, logits.float(), soft, counts, job.recipe.distill)
        (loss * (micro.share * job.scale.value)).backward()  # type: ignore[no-untyped-call]
        total += loss.detach() * micro.share
    job.devices.sum_gradients(part.parameters)
    mean = job.devices.sum(total.item())
    if not math.isfinite(mean):
        raise diverged(job, mean)
    return mean


def _forward(job: Job, part: Part, micro: MicroBatch) -> torch.Tensor:
    """The logits of a micro-batch; BatchNorm's complaint about one image whose maps are one pixel, in words."""
    try:
        with job.autocast():
            return part.forward(job.laid_out(micro.inputs))
    except (ValueError, RuntimeError) as error:  # the latter from a compiled network
        if "more than 1 value per channel" not in str(error):
            raise
        model, rows = job.recipe.model, len(job.train_rows)
        raise UserError(
            f"{job.name}: batch_size {job.recipe.batch_size}",
            expected=f"two images or more at once: {model.name} has BatchNorm on maps of 1x1 at {model.input_size} px",
            got=f"one of {rows} training row{'s' * (rows > 1)}",
            fix="raise batch_size" if rows > 1 else "leave more rows to train on",
        ) from error


def _on_labels(job: Job, micro: MicroBatch, logits: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The mean loss of a micro-batch, or of some of its rows (a mask)."""
    target = micro.target
    if rows is not None:
        logits, target = logits[rows], target[rows]
    return job.task.loss(logits, target, job.recipe.loss, job.class_weight)


def _reseed(seed: int, device: torch.device) -> None:
    """Do what `torch.manual_seed` does, without its stack trace for each kind of device that is absent (3 ms)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _rate(job: Job, part: Part, step: int) -> float:
    phase = part.phase
    peak = phase.lr or job.recipe.optim.lr
    drops = optim.plateau_drops(_values_of_phase(job), phase.patience, job.sign > 0)
    return optim.lr_at(phase, peak, step, part.batches.order.steps, drops)


def _is_over(job: Job) -> bool:
    """Whether `early_stop` epochs of this phase went by without a gain; the next phase has its own."""
    values, patience = _values_of_phase(job), job.recipe.early_stop
    if patience is None or not values:
        return False
    gains = np.array(values) * job.sign
    return len(values) - 1 - int(gains.argmax()) >= patience


def _values_of_phase(job: Job) -> list[float]:
    return job.values_so_far()[len(job.progress.history) - job.progress.epoch :]


def _count_skipped(job: Job, finite: bool) -> None:
    now = job.progress
    now.skipped = 0 if finite else now.skipped + 1
    if now.skipped and not job.scale.enabled:
        log.warning("phase %d epoch %d step %d: gradients overflowed, step left out", now.phase, now.epoch, now.step)
    if now.skipped >= MOST_SKIPPED * (3 if job.scale.enabled else 1):
        raise diverged(job, math.inf)


# ---- epochs ---------------------------------------------------------------------------------------------------------


def _finish_epoch(job: Job, part: Part) -> dict[str, float]:
    """Validate, keep the best weights, write the epoch into the history; return its metrics."""
    now, recipe = job.progress, job.recipe
    job.devices.average_buffers(job.net)
    if recipe.average.kind == "swa" and len(now.history) >= recipe.average.start_epoch:
        job.average.update(job.net)
    rate = part.optimizer.param_groups[0]["lr"] / (part.optimizer.param_groups[0].get("factor") or 1)
    row: dict[str, Any] = {"phase": part.phase.name, "train/loss": float(np.mean(now.losses)), "lr": rate}
    averaged = recipe.average.kind == "ema" and bool(job.average.mean)
    moved = any(phase.train == "all" for phase in recipe.phases[: now.phase])
    with _weights(job, job.average.mean if averaged else None):
        row |= validate(job, None if averaged and moved else part.features)  # features are of the trunk as it is
        _keep_best(job, row[f"valid/{job.metric}"], len(now.history))
    set_mode(job, part)
    now.history.append(row)
    return {name: value for name, value in row.items() if isinstance(value, float)}


@contextmanager
def _weights(job: Job, other: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Look through other weights for a while."""
    if other is None:
        yield
        return
    own = {name: value.detach().clone() for name, value in job.net.state_dict().items()}
    job.net.load_state_dict(other)
    try:
        yield
    finally:
        job.net.load_state_dict(own)


def _keep_best(job: Job, value: float, epoch: int) -> None:
    best, sign = job.progress.best, job.sign
    if job.recipe.select == "last" or not best or sign * value > sign * best["value"]:
        weights = {name: tensor.detach().cpu().clone() for name, tensor in job.net.state_dict().items()}
        job.progress.best = {"value": value, "epoch": epoch, "weights": weights}


def _save(job: Job, clock: checkpoint.Clock, part: Part | None) -> None:
    if job.devices.is_main:
        clock.save(job.folder, job.state(part.optimizer if part else None))
