"""Compute: which device, and how many processes share a training. The only file that says `accelerate` or `ray`."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from octofold.errors import UserError


@dataclass(frozen=True)
class Devices:
    """This process's device and its place among the processes of one training.

    Attributes:
        device: where to compute.
        rank: 0 in the process that writes files and speaks to MLflow.
        world: number of processes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in one message per dtype."""
        if self.world == 1:
            return
        grads = [parameter.grad for parameter in parameters if parameter.requires_grad]
        present = [grad for grad in grads if grad is not None]
        for dtype in sorted({grad.dtype for grad in present}, key=str):
            some = [grad for grad in present if grad.dtype == dtype]
            flat = torch.cat([grad.reshape(-1) for grad in some])
            dist.all_reduce(flat)
            for grad, part in zip(some, torch.split(flat, [grad.numel() for grad in some]), strict=True):
                grad.copy_(part.view_as(grad))

    def sum(self, value: float) -> float:
        """Add a number up over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device="cpu" if self.device.type != "cuda" else self.device)
        dist.all_reduce(total)
        return float(total.item())

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Return the main process's value."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            dist.barrier()

    def share(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return this process's part of `rows`: every `world`-th."""
        return rows[self.rank :: self.world]


def device_setup(device: str = "auto", threads: int | None = None) -> Devices:
    """Choose the device through accelerate (CUDA, MPS or CPU) and join the other processes of a launch.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        threads: torch threads; None = leave as it is.

    Raises:
        UserError: a device this machine does not have.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device != "auto" and not there[device]:
        raise UserError("runtime.device", expected=f"one of {', '.join(k for k, v in there.items() if v)}", got=device)
    if threads:
        torch.set_num_threads(threads)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        best = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
        return Devices(torch.device(best if device == "auto" else device))
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return Devices(state.device, state.process_index, state.num_processes)
