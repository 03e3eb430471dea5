"""A slot being trained: what it is made of, how it is opened, what each phase sets up."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from octofold.compute import Devices
from octofold.data.images import PixelCache, PixelSpec, open_cache
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.metrics import METRICS, adopt
from octofold.nets import models
from octofold.nets.tasks import Task, balanced_weights, make_task, sample_weights
from octofold.recipe import Phase, Recipe
from octofold.train import calibration, checkpoint, distill, harden, machine, optim
from octofold.train.batches import BLOCK, Batches, Features, Order, Pixels, seed_of, within_square
from octofold.train.features import FrozenTrunk

log = logging.getLogger("octofold")
Forward = Callable[[torch.Tensor], torch.Tensor]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass
class Progress:
    """Where the training stands: the next step to take, and what was seen so far.

    Attributes:
        phase, epoch, step: the next step; the epoch counts within its phase.
        losses: of this epoch's steps so far.
        history: one row per finished epoch.
        skipped: steps in a row whose gradients overflowed.
        best: ``value, epoch, weights`` of the best epoch (of the last one with ``select: last``).
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)


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
    forward: Forward
    cache: PixelCache
    target: npt.NDArray[Any]
    unit_target: npt.NDArray[Any]
    train_rows: Ints
    valid_rows: Ints
    metric: str
    runtime: dict[str, Any]
    class_weight: torch.Tensor | None
    teacher: torch.Tensor | None
    progress: Progress
    average: optim.Average
    scale: optim.LossScale
    saved: dict[str, Any] | None

    @property
    def name(self) -> str:
        """How to speak of it."""
        return f"member '{self.recipe.member}' fold {self.fold} seed {self.seed}"

    @property
    def sign(self) -> int:
        """1 if a larger metric is better, else -1."""
        return 1 if METRICS[self.metric].higher_is_better else -1

    @property
    def layout(self) -> torch.memory_format:
        """How weights and images lie in memory."""
        return torch.channels_last if self.runtime["channels_last"] else torch.contiguous_format

    @property
    def is_frozen(self) -> bool:
        """Whether no phase moves the trunk."""
        return all(phase.train == "head" for phase in self.recipe.phases)

    @property
    def held_out_rows(self) -> Ints:
        """Rows predicted out of fold: all of the held-out fold."""
        return np.flatnonzero(self.manifest.fold == self.fold)

    @property
    def scored_rows(self) -> Ints:
        """Of those, the rows the recipe is for."""
        wanted = harden.wanted_rows(self.recipe.classes, self.target, self.manifest.classes)
        return np.flatnonzero(wanted & (self.manifest.fold == self.fold))

    @cached_property
    def counts(self) -> npt.NDArray[Any]:
        """How much each row of the manifest counts in the mean that the loss takes, ``(N,)``."""
        # only of int targets it is a mean by class weights
        plain = self.recipe.augment.mixes or self.recipe.loss.name == "bce"
        weight = None if plain or self.class_weight is None else self.class_weight.cpu().numpy()
        return self.task.counts(self.target, weight)

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in the runtime's precision."""
        return machine.computing(self.devices.device.type, self.runtime["precision"])

    def laid_out(self, inputs: torch.Tensor) -> torch.Tensor:
        """Put images into the runtime's memory layout (they come channels last)."""
        plain = inputs.ndim == 4 and not self.runtime["channels_last"]
        return inputs.contiguous() if plain else inputs

    def values_so_far(self) -> list[float]:
        """The metric of each finished epoch."""
        return [row[f"valid/{self.metric}"] for row in self.progress.history]

    def state(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """All a resume needs: tensors and plain values."""
        return {
            "runtime": self.runtime,
            "progress": {name: getattr(self.progress, name) for name in Progress.__dataclass_fields__},
            "net": self.net.state_dict(),
            "average": self.average.state(),
            "scale": self.scale.state(),
            "optimizer": optimizer.state_dict() if optimizer else None,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `state` returned (the optimiser's part is put back when its phase is entered)."""
        self.progress = Progress(**saved["progress"])
        self.net.load_state_dict(saved["net"])
        self.average.restore(saved["average"], self.devices.device)
        self.scale.restore(saved["scale"])
        now = self.progress
        log.info("%s goes on at phase %d, epoch %d, step %d", self.name, now.phase, now.epoch, now.step)


@dataclass
class Part:
    """What belongs to one phase: its batches, its optimiser, what its inputs go through."""

    phase: Phase
    batches: Batches
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    sam: optim.Sam | None
    forward: Forward
    features: Floats | None

    @property
    def head_only(self) -> bool:
        """Whether the trunk is frozen."""
        return self.phase.train == "head"


# ---- opening --------------------------------------------------------------------------------------------------------


def open_job(
    recipe: Recipe,
    manifest: Manifest,
    fold: int,
    seed: int,
    folder: Path,
    devices: Devices,
    start: Path | None = None,
) -> Job:
    """Build everything a slot needs, and put the checkpoint's state in if there is one.

    Args are those of `training.train_slot`.

    Raises:
        UserError: an empty fold, a metric or views of another task, weights not there, a batch too small to share.
    """
    machine.keep_memory()
    saved = checkpoint.load(folder)
    task = make_task(manifest.task, manifest.classes, manifest.info.get("swap"))
    _check(recipe, task, devices)
    train, valid = split_rows(recipe, manifest, fold, seed)
    net = _network(recipe, task, seed, devices, start)
    runtime = calibration.settle(saved, recipe, net, devices, (len(manifest.folds), len(train)))
    if devices.world > 1 and devices.device.type == "cuda":  # else a process would normalise by its share of a batch
        net = models.synchronised(net)  # not before: the main process calibrates alone
    cache = devices.main_first(lambda: open_cache(manifest, PixelSpec.of(recipe.model)))
    target, teacher, weights = manifest.target, None, None
    if recipe.distill.teacher:
        teacher = torch.from_numpy(distill.read_teacher(recipe.distill, manifest, train))
    if recipe.loss.class_weights and task.name == "classify":
        weights = torch.from_numpy(balanced_weights(target[train], len(manifest.classes))).to(devices.device)
    job = Job(
        recipe=recipe,
        manifest=manifest,
        fold=fold,
        seed=seed,
        folder=folder,
        devices=devices,
        task=task,
        net=net,
        forward=calibration.compiled(net) if runtime["compile"] else net,
        cache=cache,
        target=target,
        unit_target=_unit_target(cache, target),
        train_rows=train,
        valid_rows=valid,
        metric=metric_of(recipe, task),
        runtime=runtime,
        class_weight=weights,
        teacher=teacher,
        progress=Progress(),
        average=optim.Average(recipe.average),
        scale=optim.LossScale(runtime["precision"] == "fp16"),
        saved=saved,
    )
    job.net.to(memory_format=job.layout)
    if saved is not None:
        job.restore(saved)
    return job


def _check(recipe: Recipe, task: Task, devices: Devices) -> None:
    """Refuse what a recipe may say, but not of this task or to so many processes."""
    if recipe.batch_size <= (few := BLOCK * (devices.world - 1)):  # the last process would never see an image
        raise UserError(f"batch_size {recipe.batch_size}", expected=f"over {few} for {devices.world} processes")
    task.check_views(recipe.tta)
    task.check_recipe(recipe)


def _network(recipe: Recipe, task: Task, seed: int, devices: Devices, start: Path | None) -> models.Net:
    torch.manual_seed(seed_of(seed))
    return models.build(recipe.model, task.outputs, start=start).to(devices.device)


def split_rows(recipe: Recipe, manifest: Manifest, fold: int, seed: int) -> tuple[Ints, Ints]:
    """Return the rows trained and the rows validated on: the folds, narrowed by `classes` and `overfit`.

    Raises:
        UserError: one side is empty, or an unknown class.
    """
    wanted = harden.wanted_rows(recipe.classes, manifest.target, manifest.classes)
    train = np.flatnonzero(wanted & (manifest.fold != fold))
    valid = np.flatnonzero(wanted & (manifest.fold == fold))
    if not len(train) or not len(valid):
        of = f" of classes {preview(recipe.classes)}" if recipe.classes else ""
        raise UserError(f"fold {fold}", expected=f"rows{of} in it and outside it", got=f"{len(valid)} and {len(train)}")
    if recipe.overfit:
        few = np.random.default_rng(seed).permutation(train)[: recipe.overfit * recipe.batch_size]
        return np.sort(few), np.sort(few)
    return train, valid


def metric_of(recipe: Recipe, task: Task) -> str:
    """Return the metric that chooses checkpoints: the recipe's, or the task's own if the recipe names none.

    Raises:
        UserError: a metric of another task, or a file that `metrics.adopt` refuses.
    """
    is_default = recipe.metric == Recipe.model_fields["metric"].default
    return task.default_metric if is_default else adopt(recipe.metric, task.name)


def _unit_target(cache: PixelCache, target: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if target.ndim == 1:
        return target
    unit = [frame.to_unit(points) for frame, points in zip(cache.frames, target, strict=True)]
    return np.asarray(unit, dtype=np.float32)


# ---- phases ---------------------------------------------------------------------------------------------------------


def enter(job: Job, number: int) -> Part:
    """Set a phase up: who moves, on which batches, by which optimiser; put its state back if it was under way."""
    recipe, phase = job.recipe, job.recipe.phases[number]
    head_only = phase.train == "head"
    for parameter in job.net.trunk_parameters():
        parameter.requires_grad_(not head_only)
    rows, ids = job.train_rows, job.manifest.sample_ids
    preset = harden.row_presets(phase, recipe.augment, job.target, rows, job.manifest.classes, ids)
    preset = "none" if recipe.overfit else preset
    features, source = None, None
    if _is_cacheable(job, preset, phase):
        features = _features(job)
        drawn = features if preset == "none" else _features(job, str(preset), phase.replicas)
        source = Features(drawn, within_square(job.unit_target))
        job.net.to(memory_format=job.layout)  # an engine may have laid the weights out otherwise
    groups = optim.parameter_groups(
        job.net, recipe.optim, head_only, models.depths(job.net) if recipe.optim.layer_decay < 1 else None
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = optim.make_optimizer(phase.optimizer or recipe.optim.name, groups, recipe.optim)
    if job.saved is not None and job.saved["progress"]["phase"] == number and job.saved["optimizer"]:
        optimizer.load_state_dict(job.saved["optimizer"])
    rho = recipe.optim.sam_rho
    part = Part(
        phase=phase,
        batches=_batches(job, phase, source or Pixels(job.cache, job.target, preset, job.task.swap)),
        optimizer=optimizer,
        parameters=parameters,
        sam=optim.Sam(parameters, rho, recipe.optim.sam_adaptive) if rho else None,
        forward=job.net.head if features is not None else _frozen(job) if head_only else job.forward,
        features=features,
    )
    set_mode(job, part)
    return part


def set_mode(job: Job, part: Part) -> None:
    """Train mode; a frozen trunk stays in eval mode, so that its BatchNorm and dropout stand still."""
    job.net.train()
    if part.head_only:
        job.net.trunk.eval()


def _batches(job: Job, phase: Phase, source: Pixels | Features) -> Batches:
    recipe, classes = job.recipe, job.manifest.classes
    draw = None
    if recipe.loss.weighted_sampler and job.task.name == "classify":
        draw = sample_weights(job.target[job.train_rows], len(classes))
    return Batches(
        Order(job.train_rows, job.seed, recipe.batch_size, recipe.optim.accumulate, draw),
        source,
        job.devices.device,
        job.runtime["workers"],
        job.devices.rank,
        job.devices.world,
        lambda rows: float(job.counts[rows].sum()),
        recipe.augment if recipe.augment.mixes else None,
        len(classes),
    )


def _frozen(job: Job) -> Forward:
    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = job.net.features(images)
        logits: torch.Tensor = job.net.head(found)
        return logits

    return forward


def _is_cacheable(job: Job, preset: str | list[str], phase: Phase) -> bool:
    """Whether a frozen trunk's features serve every epoch: nothing random, or a fixed number of random versions."""
    drawn = isinstance(preset, str) and phase.replicas > 0 and job.target.ndim == 1  # points would have to move along
    return phase.train == "head" and (preset == "none" or drawn) and not job.recipe.augment.mixes


def frozen_trunk(job: Job) -> FrozenTrunk:
    """The job's trunk with its cached features; valid while no phase moves the trunk."""
    model = job.recipe.model
    kind = f"{'highpass' if job.net.highpass else ''}{'map' if job.net.spatial else ''}"
    architecture = f"{model.name} {model.input_size} {kind}"
    # On a CPU the fastest exact engine beats eager bf16, and other recipes' heads may use the same features.
    pinned = job.recipe.runtime.precision != "auto" or job.devices.device.type != "cpu"
    precision = job.runtime["precision"] if pinned else "fp32"
    return FrozenTrunk(job.net, job.cache, job.manifest.competition, architecture, precision)


def _features(job: Job, preset: str = "none", replicas: int = 0) -> Floats:
    """Features of all rows, ``(N, F)`` or ``(replicas, N, F)``; computed by the main process, read by all."""

    def read() -> Floats:
        trunk = frozen_trunk(job)
        return trunk.of_replicas(preset, replicas) if replicas else trunk.of_views()[0]

    found = read() if job.devices.is_main else None
    job.devices.wait()
    return read() if found is None else found
