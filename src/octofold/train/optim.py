"""Optimisation: parameter groups, the learning-rate schedule, SAM, averaged weights, scaled gradients.

Everything here is either a pure function or a small object whose `state()` is all there is to save.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from octofold.recipe import Average as AverageRecipe
from octofold.recipe import Optim, Phase

Tensor = torch.Tensor


class HasParts(Protocol):
    """What a network must tell about its parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def head_parameters(self) -> Iterable[nn.Parameter]: ...


def lr_at(phase: Phase, peak: float, step: int, steps_per_epoch: int, drops: int = 0) -> float:
    """Return the learning rate of one optimiser step; nothing but the arguments decides it.

    Args:
        phase: schedule, warm-up and length.
        peak: the largest learning rate.
        step: 0-based optimiser step within the phase.
        steps_per_epoch: optimiser steps in one pass over the training folds.
        drops: ``plateau`` only: how often the metric has stood still so far (see `plateau_drops`).
    """
    warmup = round(phase.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    epoch = step // steps_per_epoch
    if phase.schedule == "cosine":
        progress = (step - warmup) / max(1, phase.epochs * steps_per_epoch - warmup)
        return peak * (phase.final_lr + (1 - phase.final_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)
    if phase.schedule == "step":
        drops = sum(epoch >= at for at in phase.step_epochs) if phase.step_epochs else epoch // phase.step_every
    return peak if phase.schedule == "constant" else peak * phase.step_factor**drops


def plateau_drops(values: Iterable[float], patience: int, higher_is_better: bool) -> int:
    """Count the drops a plateau schedule has made after these epochs' metrics, oldest first.

    A drop comes when `patience` epochs in a row bring no gain; then the count starts anew.
    """
    best, idle, drops = -math.inf, 0, 0
    for value in values:
        gain = value if higher_is_better else -value
        best, idle = (gain, 0) if gain > best else (best, idle + 1)
        if idle >= patience:
            drops, idle = drops + 1, 0
    return drops


def parameter_groups(
    net: HasParts, optim: Optim, head_only: bool = False, depths: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Sort trainable parameters into groups by weight decay and learning-rate factor.

    Vectors (norms, biases) are not decayed. With `optim.layer_decay` below 1 a parameter ``d`` levels below the head
    gets the factor ``layer_decay ** d``.

    Args:
        net: the network.
        optim: weight decay and layer decay.
        head_only: leave the trunk out.
        depths: `models.depths`, the level of each parameter, 0 next to the pixels; needed for layer decay.

    Returns:
        torch parameter groups, each with the extra key `factor`, the share of the scheduled learning rate it gets.
    """
    head = {id(parameter) for parameter in net.head_parameters()}
    depths = depths or {}
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad or (head_only and id(parameter) not in head):
            continue
        decay = optim.weight_decay if parameter.ndim > 1 else 0.0
        factor = optim.layer_decay ** (deepest - depths.get(name, deepest))
        groups.setdefault((decay, factor), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "factor": factor} for (decay, factor), params in groups.items()]


def make_optimizer(name: str, groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    """Build AdamW, Adam or SGD over `groups`; the fused kernel where the parameters' device has one."""
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    if name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.momentum > 0, fused=fused)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(groups, lr=optim.lr, amsgrad=optim.amsgrad, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients together, a scalar tensor."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(grads, foreach=None) if grads else torch.zeros(())


class Sam:
    """Sharpness-aware minimisation (Foret et al. 2021; adaptive: Kwon et al. 2021), as two verbs.

    `ascend` moves the weights to the worst point within `rho`; take the gradient there; `descend` puts them back.
    They are put back from a copy, not by subtraction, so nothing drifts and no rank departs from the others.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rho: float, adaptive: bool = False) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.rho, self.adaptive = rho, adaptive
        self._home: list[Tensor] = []

    @torch.no_grad()
    def ascend(self) -> bool:
        """Climb along the gradient to distance `rho`; False, and no move, if the gradient is not finite."""
        moving = [parameter for parameter in self.parameters if parameter.grad is not None]
        scale = [parameter.abs() if self.adaptive else torch.ones((), device=parameter.device) for parameter in moving]
        slopes = [parameter.grad * by for parameter, by in zip(moving, scale, strict=True)]  # type: ignore[operator]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(slope) for slope in slopes]))
        if not torch.isfinite(norm):
            return False
        self._home = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, slope, by in zip(moving, slopes, scale, strict=True):
            parameter.add_(slope * by * (self.rho / (norm + 1e-12)))
        return True

    @torch.no_grad()
    def descend(self) -> None:
        """Put the weights back; the gradients of the second pass stay for the optimiser."""
        for parameter, home in zip(self.parameters, self._home, strict=True):
            parameter.copy_(home)
        self._home = []


@contextmanager
def frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Leave BatchNorm's running statistics alone, while it still normalises by the batch: for SAM's second pass."""
    norms = [
        module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class Average:
    """A running mean of weights: EMA and SWA differ only in the weight a newcomer gets.

    EMA: ``1 - min(decay, (1 + n) / (10 + n))`` per optimiser step, so that the random start is soon forgotten.
    SWA: ``1 / (n + 1)`` per epoch (Izmailov et al. 2018). Floating-point buffers (BatchNorm's) are averaged alike;
    after SWA their statistics are counted afresh by `refresh_statistics`.
    """

    def __init__(self, recipe: AverageRecipe) -> None:
        self.recipe, self.count = recipe, 0
        self.mean: dict[str, Tensor] = {}

    def share(self) -> float:
        """Weight of the next newcomer."""
        if self.recipe.kind == "swa" or self.count == 0:
            return 1 / (self.count + 1)
        return 1 - min(self.recipe.decay, (1 + self.count) / (10 + self.count))

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take the present weights in."""
        weights = net.state_dict()
        if not self.mean:
            self.mean = {name: value.detach().clone() for name, value in weights.items()}
        share, self.count = self.share(), self.count + 1
        floating = [name for name, value in weights.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.mean[name] for name in floating], [weights[name] for name in floating], share)
        for name in weights.keys() - set(floating):
            self.mean[name].copy_(weights[name])

    def state(self) -> dict[str, Any]:
        """All there is to save."""
        return {"count": self.count, "mean": self.mean}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from `state`."""
        self.count = state["count"]
        self.mean = {name: value.to(device) for name, value in state["mean"].items()}


@torch.no_grad()
def refresh_statistics(net: nn.Module, batches: Iterable[Tensor], part: nn.Module) -> None:
    """Count BatchNorm's running statistics afresh over batches of network inputs.

    Args:
        net: the network.
        batches: its inputs; the statistics are a plain mean over them, so they should be of one size.
        part: the part of `net` to do it in, or all of it; the rest stays in eval mode.
    """
    norms = [module for module in part.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    kept = [norm.momentum for norm in norms]
    was_training = net.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: cumulative mean
    net.eval()
    part.train()
    for images in batches:
        net(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    net.train(was_training)


class LossScale:
    """Keeps half-precision gradients above zero: multiply the loss, divide the gradients; halve on overflow.

    Our own five lines rather than `torch.amp.GradScaler`, which cannot unscale twice in a step as SAM needs.
    """

    GROW_AFTER = 2000

    def __init__(self, enabled: bool) -> None:
        self.value, self.calm = (65536.0 if enabled else 1.0), 0
        self.enabled = enabled

    def update(self, overflowed: bool) -> None:
        """After a step: halve if its gradients overflowed, double after a long calm."""
        if self.enabled:
            self.calm = 0 if overflowed else self.calm + 1
            self.value *= 0.5 if overflowed else 1.0
            if self.calm >= self.GROW_AFTER:
                self.value, self.calm = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        """All there is to save."""
        return {"value": self.value, "calm": self.calm}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.value, self.calm = state["value"], state["calm"]
