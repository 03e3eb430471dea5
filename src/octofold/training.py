"""Training: one slot (member, fold, seed) from pixels to weights and out-of-fold predictions.

The loop is `train_slot`; it reads top to bottom. Every batch and every random draw is a pure function of (seed, phase,
epoch, step), so a checkpoint holds weights, optimiser, averages, counters and history, and nothing else: killed at any
moment, the same call ends with the same bits.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from octofold import checkpoint, harden, models, optim, profiling
from octofold.batches import Batches, Features, MicroBatch, Order, Pixels, seed_of
from octofold.compute import Devices, device_setup
from octofold.errors import UserError
from octofold.features import cached_features
from octofold.files import atomic, read_json, write_json
from octofold.images import PixelCache, PixelSpec, open_cache
from octofold.inference import predict_rows
from octofold.interrupt import StopRequest
from octofold.manifest import Manifest
from octofold.metrics import METRICS
from octofold.predictions import Predictions
from octofold.recipe import Phase, Recipe
from octofold.tasks import Task, balanced_weights, make_task, sample_weights

log = logging.getLogger("octofold")
Report = Callable[[int, dict[str, float]], None]
VALID_BATCH = 64
MOST_SKIPPED = 10
"""Steps in a row whose gradients may overflow before the training is given up."""


@dataclass
class SlotResult:
    """What a slot leaves behind.

    Attributes:
        model_folder: checkpoint folder of the chosen weights.
        oof: for each nested view set, predictions of the held-out rows.
        history: one row per epoch.
        metrics: ``oof/<metric>`` and others, by their MLflow names.
    """

    model_folder: Path
    oof: dict[str, Predictions]
    history: pd.DataFrame
    metrics: dict[str, float]


@dataclass
class Progress:
    """Where the training stands: the next step to take, and what was seen so far."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # value, epoch, weights


@dataclass
class Job:
    """A slot being trained."""

    recipe: Recipe
    manifest: Manifest
    fold: int
    seed: int
    folder: Path
    devices: Devices
    task: Task
    net: models.Net
    forward: Callable[[torch.Tensor], torch.Tensor]
    cache: PixelCache
    target: npt.NDArray[Any]
    metric: str
    runtime: dict[str, Any]
    class_weight: torch.Tensor | None
    progress: Progress
    average: optim.Average
    scale: optim.LossScale
    saved: dict[str, Any] | None

    @property
    def train_rows(self) -> npt.NDArray[np.int64]:
        """Rows trained on: the training folds', as far as the recipe wants them."""
        rows = np.flatnonzero(self._wanted & (self.manifest.fold != self.fold))
        few = self.recipe.overfit * self.recipe.batch_size
        return np.sort(np.random.default_rng(self.seed).permutation(rows)[:few]) if few else rows

    @property
    def valid_rows(self) -> npt.NDArray[np.int64]:
        """Rows validated on: the held-out fold's, as far as wanted; when overfitting, the very rows trained on."""
        return self.train_rows if self.recipe.overfit else np.flatnonzero(self._wanted & self._held_out)

    @property
    def held_out_rows(self) -> npt.NDArray[np.int64]:
        """Rows predicted out of fold: all of the held-out fold."""
        return np.flatnonzero(self._held_out)

    @property
    def _held_out(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.manifest.fold == self.fold)

    @property
    def _wanted(self) -> npt.NDArray[np.bool_]:
        return harden.wanted_rows(self.recipe.classes, self.target, self.manifest.classes)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the runtime's precision."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.runtime["precision"])
        with torch.autocast(self.devices.device.type, kind, enabled=kind is not None):
            yield

    def values_so_far(self) -> list[float]:
        """The metric of each finished epoch."""
        return [row[f"valid/{self.metric}"] for row in self.progress.history]


@dataclass
class Part:
    """What belongs to one phase: its batches, its optimiser, what its inputs go through."""

    phase: Phase
    batches: Batches
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    sam: optim.Sam | None
    forward: Callable[[torch.Tensor], torch.Tensor]
    features: npt.NDArray[np.float32] | None


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
        UserError: a loss that is not finite, or a checkpoint of another recipe, manifest or code.
        KeyboardInterrupt: asked to stop; the checkpoint is written.
    """
    identity = checkpoint.identity(recipe, manifest.hash, fold, seed, start)
    checkpoint.claim(folder, identity)
    if (folder / "done.json").exists():
        return read_result(folder)
    job = _open(recipe, manifest, fold, seed, folder, devices or _devices(recipe), start)
    now, clock = job.progress, checkpoint.Clock(recipe.runtime.checkpoint_s)
    traced = profiling.profile(recipe.runtime.profile_steps, folder / "profile")
    watched = profiling.events(recipe.runtime.tensorboard, folder / "tensorboard")
    with StopRequest(folder, folder.parent) as stop, traced as tick, watched as write_events:
        for number, phase in enumerate(recipe.phases):
            if number < now.phase or _is_over(job):
                continue
            part = _enter(job, number, phase)
            if phase.keep_start and now.epoch == now.step == 0:
                _keep_best(job, _validate(job, part.features)[f"valid/{job.metric}"], len(now.history) - 1)
                _set_mode(job, phase.train == "head")
            while now.epoch < phase.epochs and not _is_over(job):
                for batch in part.batches.stream(number, now.epoch, now.step):
                    optim.set_lr(part.optimizer, _rate(job, part, now.epoch * part.batches.order.steps + now.step))
                    now.losses.append(_update(job, part, batch))
                    tick()
                    now.step += 1
                    if (asked := stop.is_set()) or clock.is_due():
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
    return _finish(job)


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
        with job.autocast():
            logits = part.forward(_laid_out(job, micro.inputs))
        loss = job.task.loss(logits.float(), micro.target, job.recipe.loss, job.class_weight)
        (loss * (micro.share * job.scale.value)).backward()  # type: ignore[no-untyped-call]
        total += loss.detach() * micro.share
    job.devices.sum_gradients(part.parameters)
    mean = job.devices.sum(total.item())
    if not math.isfinite(mean):
        raise _diverged(job, mean)
    return mean


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
    since = job.values_so_far()[len(job.progress.history) - job.progress.epoch :]
    drops = optim.plateau_drops(since, phase.patience, METRICS[job.metric].higher_is_better)
    return optim.lr_at(phase, peak, step, part.batches.order.steps, drops)


def _is_over(job: Job) -> bool:
    """Whether `early_stop` epochs went by without a gain."""
    values, patience = job.values_so_far(), job.recipe.early_stop
    if patience is None or not values:
        return False
    gains = np.array(values) * (1 if METRICS[job.metric].higher_is_better else -1)
    return len(values) - 1 - int(gains.argmax()) >= patience


def _diverged(job: Job, loss: float) -> UserError:
    now = job.progress
    return UserError(
        f"member '{job.recipe.member}' fold {job.fold} seed {job.seed}: phase '{job.recipe.phases[now.phase].name}' "
        f"epoch {now.epoch} step {now.step}",
        expected="a finite loss",
        got=str(loss),
        fix=f"lower optim.lr (now {job.recipe.optim.lr:g}), lengthen the warm-up, set optim.clip_norm, or "
        "--runtime.precision fp32",
    )


def _count_skipped(job: Job, finite: bool) -> None:
    now = job.progress
    now.skipped = 0 if finite else now.skipped + 1
    if now.skipped and not job.scale.enabled:
        log.warning("phase %d epoch %d step %d: gradients overflowed, step left out", now.phase, now.epoch, now.step)
    if now.skipped >= MOST_SKIPPED * (3 if job.scale.enabled else 1):
        raise _diverged(job, math.inf)


# ---- beginning ------------------------------------------------------------------------------------------------------


def _devices(recipe: Recipe) -> Devices:
    return device_setup(recipe.runtime.device, recipe.runtime.threads)


def _open(
    recipe: Recipe, manifest: Manifest, fold: int, seed: int, folder: Path, devices: Devices, start: Path | None
) -> Job:
    """Build everything a slot needs and put the checkpoint's state in, if there is one."""
    saved = checkpoint.load(folder)
    task = make_task(manifest.task, manifest.classes, manifest.info.get("swap"))
    task.check_views(recipe.tta)
    train = manifest.fold != fold
    if not (harden.wanted_rows(recipe.classes, manifest.target, manifest.classes) & train).any():
        raise UserError(
            "classes", expected="training rows of these classes", got=f"none in fold {fold}'s training rows"
        )
    if not train.any() or train.all():
        raise UserError(f"fold {fold}", expected="rows in it and rows outside it", got="one side is empty")
    torch.manual_seed(seed_of(seed))
    net = models.build(recipe.model, task.outputs, start=start).to(devices.device)
    runtime = saved["runtime"] if saved else _runtime(recipe, devices)
    net = net.to(memory_format=torch.channels_last if runtime["channels_last"] else torch.contiguous_format)
    cache = open_cache(manifest, PixelSpec.of(recipe.model))
    balance = None
    if recipe.loss.class_weights and manifest.task == "classify":
        balance = torch.from_numpy(balanced_weights(manifest.target[train], len(manifest.classes))).to(devices.device)
    job = Job(
        recipe=recipe,
        manifest=manifest,
        fold=fold,
        seed=seed,
        folder=folder,
        devices=devices,
        task=task,
        net=net,
        forward=torch.compile(net) if runtime["compile"] else net,
        cache=cache,
        target=manifest.target,
        metric=metric_of(recipe, task),
        runtime=runtime,
        class_weight=balance,
        progress=Progress(),
        average=optim.Average(recipe.average),
        scale=optim.LossScale(runtime["precision"] == "fp16"),
        saved=saved,
    )
    if saved is not None:
        job.progress = Progress(**saved["progress"])
        job.net.load_state_dict(saved["net"])
        job.average.restore(saved["average"], devices.device)
        job.scale.restore(saved["scale"])
        log.info("going on at phase %d, epoch %d, step %d", *_where(job))
    return job


def _where(job: Job) -> tuple[int, int, int]:
    return job.progress.phase, job.progress.epoch, job.progress.step


def metric_of(recipe: Recipe, task: Task) -> str:
    """Return the metric that chooses checkpoints: the recipe's, or the task's own if the recipe names none."""
    fits = recipe.metric in METRICS and METRICS[recipe.metric].task == task.name
    if fits:
        return recipe.metric
    if recipe.metric == Recipe.model_fields["metric"].default:
        return task.default_metric
    names = ", ".join(name for name, row in METRICS.items() if row.task == task.name)
    raise UserError("metric", expected=f"one for {task.name}: {names}", got=recipe.metric)


def _runtime(recipe: Recipe, devices: Devices) -> dict[str, Any]:
    """Resolve what `runtime` leaves open."""
    asked, cuda = recipe.runtime, devices.device.type == "cuda"
    return {
        "precision": ("bf16" if cuda else "fp32") if asked.precision == "auto" else asked.precision,
        "channels_last": asked.channels_last != "off",
        "compile": asked.compile == "on",
        "workers": (4 if cuda else 0) if asked.workers is None else asked.workers,
    }


def _enter(job: Job, number: int, phase: Phase) -> Part:
    """Set a phase up: who moves, on which batches, by which optimiser; put back its state if it was under way."""
    recipe, head_only = job.recipe, phase.train == "head"
    for parameter in job.net.trunk_parameters():
        parameter.requires_grad_(not head_only)
    train = job.train_rows
    preset = harden.row_presets(phase, recipe.augment, job.target, train, job.manifest.classes, job.manifest.sample_ids)
    preset = "none" if recipe.overfit else preset
    draw = None
    if recipe.loss.weighted_sampler and job.manifest.task == "classify":
        draw = sample_weights(job.target[train], len(job.manifest.classes))
    order = Order(train, job.seed, recipe.batch_size, recipe.optim.accumulate, draw)
    features = _features(job) if head_only and _is_cacheable(job, preset, phase) else None
    if features is not None:
        drawn = features if preset == "none" else _features(job, str(preset), phase.replicas)
        source: Pixels | Features = Features(drawn, _unit_target(job))
    else:
        source = Pixels(job.cache, job.target, preset, job.task.swap)
    batches = Batches(
        order,
        source,
        job.devices.device,
        job.runtime["workers"],
        job.devices.rank,
        job.devices.world,
        _weigh(job),
        recipe.augment if _mixes(job) else None,
        len(job.manifest.classes),
    )
    groups = optim.parameter_groups(
        job.net, recipe.optim, head_only, models.depths(job.net) if recipe.optim.layer_decay < 1 else None
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = optim.make_optimizer(phase.optimizer or recipe.optim.name, groups, recipe.optim)
    if job.saved is not None and job.saved["progress"]["phase"] == number:
        optimizer.load_state_dict(job.saved["optimizer"])
    rho = recipe.optim.sam_rho
    forward: Callable[[torch.Tensor], torch.Tensor] = job.forward
    if features is not None:
        forward = job.net.head
    elif head_only:
        forward = _frozen_forward(job.net)
    _set_mode(job, head_only)
    return Part(
        phase=phase,
        batches=batches,
        optimizer=optimizer,
        parameters=parameters,
        sam=optim.Sam(parameters, rho, recipe.optim.sam_adaptive) if rho else None,
        forward=forward,
        features=features,
    )


def _frozen_forward(net: models.Net) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = net.features(images)
        logits: torch.Tensor = net.head(found)
        return logits

    return forward


def _set_mode(job: Job, head_only: bool) -> None:
    """Train mode; a frozen trunk stays in eval mode, so that its BatchNorm and dropout stand still."""
    job.net.train()
    if head_only:
        job.net.trunk.eval()


def _is_cacheable(job: Job, preset: str | list[str], phase: Phase) -> bool:
    """Whether a frozen trunk's features serve every epoch: nothing random, or a fixed number of random versions."""
    drawn = isinstance(preset, str) and phase.replicas > 0 and job.target.ndim == 1  # points would have to move along
    return (preset == "none" or drawn) and not _mixes(job)


def _features(job: Job, preset: str = "none", replicas: int = 0) -> npt.NDArray[np.float32]:
    """Features of all rows, ``(N, F)`` or ``(replicas, N, F)``; computed by the main process, read by all."""
    how = job.net, job.cache, job.manifest.competition, job.runtime["precision"], preset, replicas
    if job.devices.is_main:
        found = cached_features(*how)
    job.devices.wait()
    return found if job.devices.is_main else cached_features(*how)


def _mixes(job: Job) -> bool:
    return job.recipe.augment.mixup_prob + job.recipe.augment.cutmix_prob > 0


def _unit_target(job: Job) -> npt.NDArray[Any]:
    if job.target.ndim == 1:
        return job.target
    unit = [frame.to_unit(points) for frame, points in zip(job.cache.frames, job.target, strict=True)]
    return np.asarray(unit, dtype=np.float32)


def _weigh(job: Job) -> Callable[[npt.NDArray[np.int64]], float]:
    """What rows count in the mean that the loss takes."""
    if job.class_weight is None or _mixes(job) or job.recipe.loss.name == "bce":
        return len
    weight = job.class_weight.cpu().numpy()
    return lambda rows: float(weight[job.target[rows]].sum())


def _laid_out(job: Job, inputs: torch.Tensor) -> torch.Tensor:
    return inputs if job.runtime["channels_last"] or inputs.ndim == 2 else inputs.contiguous()


# ---- epochs ---------------------------------------------------------------------------------------------------------


def _finish_epoch(job: Job, part: Part) -> dict[str, float]:
    """Validate, keep the best weights, write the epoch into the history; return its metrics."""
    now, recipe = job.progress, job.recipe
    if recipe.average.kind == "swa" and len(now.history) >= recipe.average.start_epoch:
        job.average.update(job.net)
    rate = part.optimizer.param_groups[0]["lr"] / (part.optimizer.param_groups[0].get("factor") or 1)
    row: dict[str, Any] = {"phase": part.phase.name, "train/loss": float(np.mean(now.losses)), "lr": rate}
    averaged = recipe.average.kind == "ema" and bool(job.average.mean)
    with _weights(job, job.average.mean if averaged else None):
        row |= _validate(job, part.features)
        _keep_best(job, row[f"valid/{job.metric}"], len(now.history))
    _set_mode(job, part.phase.train == "head")
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


def _validate(job: Job, features: npt.NDArray[np.float32] | None) -> dict[str, float]:
    """Score the held-out rows: ``valid/loss`` (without smoothing or class weights) and the metrics."""
    job.net.eval()
    rows = job.devices.share(job.valid_rows)  # type: ignore[arg-type]
    plain = job.recipe.loss.model_copy(update={"label_smoothing": 0.0})
    target = _unit_target(job)
    parts, loss = [], 0.0
    with torch.inference_mode(), job.autocast():
        for start in range(0, len(rows), VALID_BATCH):
            some = np.asarray(rows[start : start + VALID_BATCH])
            if features is not None:
                logits = job.net.head(torch.from_numpy(features[some]).to(job.devices.device))
            else:
                images = torch.from_numpy(np.stack([job.cache.square(int(row)) for row in some]))
                logits = job.forward(_laid_out(job, images.to(job.devices.device).permute(0, 3, 1, 2)))
            wanted = torch.from_numpy(target[some]).to(job.devices.device)
            loss += float(job.task.loss(logits.float(), wanted, plain)) * len(some)
            parts.append(job.task.activate(logits).float().cpu().numpy())
    gathered = job.devices.gather((np.asarray(rows), np.concatenate(parts) if parts else None, loss))
    order = np.concatenate([part[0] for part in gathered])
    values = np.concatenate([part[1] for part in gathered if part[1] is not None])[np.argsort(order)]
    if not np.isfinite(values).all():
        raise _diverged(job, math.nan)
    order = np.sort(order)
    if values.ndim == 3:
        values = np.stack([job.cache.frames[row].to_pixels(v) for row, v in zip(order, values, strict=True)])
    metrics = {"valid/loss": sum(part[2] for part in gathered) / len(order)}
    for name in dict.fromkeys([job.metric, job.task.default_metric]):
        metrics[f"valid/{name}"] = job.task.score(values, job.target[order], name)
    return metrics


def _keep_best(job: Job, value: float, epoch: int) -> None:
    best, sign = job.progress.best, 1 if METRICS[job.metric].higher_is_better else -1
    if job.recipe.select == "last" or not best or sign * value > sign * best["value"]:
        weights = {name: tensor.detach().cpu().clone() for name, tensor in job.net.state_dict().items()}
        job.progress.best = {"value": value, "epoch": epoch, "weights": weights}


def _save(job: Job, clock: checkpoint.Clock, part: Part | None) -> None:
    if not job.devices.is_main:
        return
    progress = {name: getattr(job.progress, name) for name in Progress.__dataclass_fields__}
    state = {
        "runtime": job.runtime,
        "progress": progress,
        "net": job.net.state_dict(),
        "average": job.average.state(),
        "scale": job.scale.state(),
        "optimizer": part.optimizer.state_dict() if part else None,
    }
    clock.save(job.folder, state)


# ---- the end --------------------------------------------------------------------------------------------------------


def _finish(job: Job) -> SlotResult:
    """Choose the weights, predict the held-out rows, write everything, and only then say that it is done."""
    chosen = _choose(job)
    if job.devices.is_main:
        _save(job, checkpoint.Clock(0), None)
        best = job.progress.best
        card = models.ModelCard(
            recipe=job.recipe.model_dump(mode="json", include=set(Recipe.model_fields)),
            task=job.manifest.task,
            classes=job.manifest.classes,
            competition=job.manifest.competition,
            member=job.recipe.member,
            fold=job.fold,
            seed=job.seed,
            manifest_hash=job.manifest.hash,
            swap=job.manifest.info.get("swap"),
            info={"chosen": chosen, "epoch": best["epoch"], f"valid/{job.metric}": best["value"], **job.runtime},
        )
        card = models.write_model(job.folder / "model", job.net, card)
        oof = _predict_held_out(job, card)
        for views, predictions in oof.items():
            predictions.save(job.folder / "oof" / f"{views}.parquet")
        history = pd.DataFrame(job.progress.history)
        history.insert(0, "epoch", np.arange(len(history)))
        with atomic(job.folder / "history.csv") as temporary:
            history.to_csv(temporary, index=False)
        write_json(
            job.folder / "done.json",
            {"metrics": _oof_metrics(job, oof), "model_sha": card.model_sha, "views": list(oof)},
        )
        (job.folder / "checkpoint.pt").unlink(missing_ok=True)
    job.devices.wait()
    return read_result(job.folder)


def _oof_metrics(job: Job, oof: dict[str, Predictions]) -> dict[str, float]:
    """``oof/<metric>`` with the recipe's views, and ``oof.<views>/<metric>`` for each set nested in them."""
    rows = np.flatnonzero(job._held_out & job._wanted)
    truth, ids = job.target[rows], job.manifest.sample_ids[rows]
    metrics = {}
    for name in dict.fromkeys([job.metric, job.task.default_metric]):
        for views, predictions in oof.items():
            metrics[f"oof.{views}/{name}"] = job.task.score(predictions.take(ids).values, truth, name)
        metrics[f"oof/{name}"] = metrics[f"oof.{job.recipe.tta}/{name}"]
    return metrics


def _choose(job: Job) -> str:
    """Put the chosen weights into the network: the best epoch's, the last, or the averaged ones if they are better."""
    best, sign = job.progress.best, 1 if METRICS[job.metric].higher_is_better else -1
    if job.recipe.average.kind == "swa" and job.average.mean:
        job.net.load_state_dict(job.average.mean)
        with job.autocast():
            optim.refresh_statistics(job.net, _plain_batches(job))
        value = _validate(job, None)[f"valid/{job.metric}"]
        if job.recipe.select == "last" or sign * value >= sign * best["value"]:
            job.progress.best = best | {"value": value}
            return "swa"
    job.net.load_state_dict(best["weights"])
    return "last" if job.recipe.select == "last" else "best"


def _plain_batches(job: Job) -> Iterator[torch.Tensor]:
    """Training rows as validation would see them, in order."""
    rows = job.train_rows
    for start in range(0, len(rows), VALID_BATCH):
        images = np.stack([job.cache.square(int(row)) for row in rows[start : start + VALID_BATCH]])
        yield torch.from_numpy(images).to(job.devices.device).permute(0, 3, 1, 2)


def _predict_held_out(job: Job, card: models.ModelCard) -> dict[str, Predictions]:
    rows = job.held_out_rows
    squares = (
        np.stack([job.cache.square(int(row)) for row in rows[start : start + 8]]) for start in range(0, len(rows), 8)
    )
    frames = [job.cache.frames[row] for row in rows]
    values = predict_rows(job.net, card, squares, frames, job.recipe.tta)
    return {
        views: Predictions(
            sample_ids=job.manifest.sample_ids[rows],
            values=found,
            classes=job.manifest.classes,
            manifest_hash=card.manifest_hash,
            member=card.member,
            model_sha=card.model_sha,
            views=views,
            fold=np.full(len(rows), job.fold),
            seed=job.seed,
        )
        for views, found in values.items()
    }


def read_result(folder: Path) -> SlotResult:
    """Read a finished slot back.

    Raises:
        UserError: it is not finished.
    """
    done = read_json(folder / "done.json", "a finished slot")
    oof = {views: Predictions.load(folder / "oof" / f"{views}.parquet") for views in done["views"]}
    return SlotResult(folder / "model", oof, pd.read_csv(folder / "history.csv"), done["metrics"])
