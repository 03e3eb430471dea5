"""Looking into a training on request: a profiler's trace, and event files with histograms. Off, they cost nothing."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from octofold.errors import UserError
from octofold.files import write_text

log = logging.getLogger("octofold")
WARM_UP = 10
"""Steps let pass before the trace begins (original 003: 10, then 80)."""


@contextmanager
def profile(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Give a function to call after each optimiser step; trace `steps` of them.

    Leaves ``trace.json.gz`` (chrome://tracing, Perfetto) and ``operators.txt`` (the costliest operators) in `folder`.
    A training shorter than warm-up and steps together leaves what there was of it.

    Args:
        steps: optimiser steps to trace; 0 = none.
        folder: where to.
    """
    if not steps:
        yield lambda: None
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []

    def keep(found: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / "trace.json.gz"))
        order = "self_cuda_time_total" if len(kinds) > 1 else "self_cpu_time_total"
        write_text(folder / "operators.txt", found.key_averages().table(sort_by=order, row_limit=30) + "\n")
        log.info("profiler trace and operator table in %s", folder)

    plan = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1)
    with torch.profiler.profile(activities=kinds, schedule=plan, on_trace_ready=keep) as profiler:
        yield profiler.step


@contextmanager
def events(enabled: bool, folder: Path) -> Iterator[Callable[[nn.Module, Mapping[str, float], int], None]]:
    """Give a function to call after each epoch with the network, its metrics and the epoch.

    Writes TensorBoard event files: scalars, and a histogram of every weight and of its last gradient.

    Args:
        enabled: whether to.
        folder: where to.

    Raises:
        UserError: asked for, and TensorBoard is not installed.
    """
    if not enabled:
        yield lambda net, metrics, epoch: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "runtime.tensorboard", expected="the package tensorboard", got=str(error), fix="pip install tensorboard"
        ) from error
    with SummaryWriter(str(folder)) as writer:

        def write(net: nn.Module, metrics: Mapping[str, float], epoch: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, epoch)
            for name, parameter in net.named_parameters():
                writer.add_histogram(f"weight/{name}", parameter.detach().float().cpu(), epoch)
                if parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()):
                    writer.add_histogram(f"gradient/{name}", parameter.grad.float().cpu(), epoch)
            writer.flush()

        yield write
