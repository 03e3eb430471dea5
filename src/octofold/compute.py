"""Compute: which device, how many processes share a training, and jobs side by side on a machine or a cluster.

The only file that says `accelerate` or `ray`.
"""

import atexit
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from octofold.errors import UserError, redact
from octofold.workers import Job, call
from octofold.workers import run as run_workers

T = TypeVar("T")


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
        moving = [parameter for parameter in parameters if parameter.requires_grad]
        if all(parameter.grad is None for parameter in moving):  # this process had no image of a small step
            for parameter in moving:
                parameter.grad = torch.zeros_like(parameter)
        present = [parameter.grad for parameter in moving if parameter.grad is not None]
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

    def any(self, value: bool) -> bool:
        """Tell whether any process says so."""
        return value if self.world == 1 else self.sum(float(value)) > 0

    def average_buffers(self, net: nn.Module) -> None:
        """Make BatchNorm's running statistics the mean over all processes."""
        if self.world == 1:
            return
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in (module.running_mean, module.running_var):
                    if buffer is not None:
                        dist.all_reduce(buffer)
                        buffer.div_(self.world)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def main_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns here, called in the main process before the others: they find what it left."""
        made = make() if self.is_main else None
        self.wait()
        return make() if made is None else made

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


def map_jobs(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    executor: str = "local",
    workers: int | None = None,
    threads: int | None = None,
    retries: int = 2,
    title: str = "jobs",
) -> dict[str, Any]:
    """Do independent jobs side by side, here or on a Ray cluster, with the same results.

    Args:
        function: a module's function; it gets a job's arguments, and returns something small (ids, numbers, paths).
        jobs: with keys that name them for good. A job may be begun again after its process or node was lost.
        executor: ``local`` (processes of this machine) or ``ray`` (a cluster, by ``RAY_ADDRESS``, else one made here).
        workers: jobs at once; None = as many as the machine (or the cluster) bears; 1 = in this process.
        threads: CPU threads of each job; None = the cores divided by the workers.
        retries: how often a job is begun again after its process died.
        title: of the progress bar.

    Returns:
        ``{key: result}`` in the order of `jobs`.

    Raises:
        UserError: a job's own, a job whose process keeps dying, a cluster that does not answer.
        RuntimeError: a job failed otherwise.
    """
    if len({job.key for job in jobs}) != len(jobs):
        raise ValueError("job keys must be unique")
    with tqdm(total=len(jobs), desc=title, unit="job", disable=None) as bar:
        if executor == "ray":
            return _on_ray(function, jobs, workers, threads, retries, lambda _: bar.update())
        gpus = torch.cuda.device_count()
        count = min(workers or bearable(gpus), len(jobs))
        if count <= 1:
            return _in_turn(function, jobs, lambda _: bar.update())
        each = threads or max(1, (os.cpu_count() or 1) // count)
        places = [_environment(each, gpus, place) for place in range(count)]
        return run_workers(function, jobs, count, places, retries, lambda _: bar.update())


def bearable(gpus: int) -> int:
    """Return how many trainings this machine bears at once: one a GPU, else four cores and 2 GB of free memory each."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, gpus or min(cores // 4, int(psutil.virtual_memory().available // 2**31)))


def _in_turn(function: Callable[..., Any], jobs: Sequence[Job], report: Callable[[str], Any]) -> dict[str, Any]:
    results = {}
    for job in jobs:
        results[job.key] = function(*job.arguments)
        report(job.key)
    return results


def _environment(threads: int, gpus: int, place: int) -> dict[str, str]:
    """Variables of one local worker: its share of the cores, its GPU."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    told = {name: str(threads) for name in names}
    if gpus:  # of those the user lets us see, by the names they were given: numbers, or UUIDs
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        told["CUDA_VISIBLE_DEVICES"] = (visible or [str(number) for number in range(gpus)])[place % gpus]
    return told


def _on_ray(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    workers: int | None,
    threads: int | None,
    retries: int,
    report: Callable[[str], Any],
) -> dict[str, Any]:
    ray = _join_ray(workers, threads)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    # ROOT and the store are read at import, so the job's module is named, and imported after they are set.
    told = {name: os.environ[name] for name in ("OCTOFOLD_HOME", "MLFLOW_TRACKING_URI") if os.environ.get(name)}
    told = {name: value for name, value in told.items() if redact(value) == value}  # a password is each node's own
    told["OMP_NUM_THREADS"] = str(threads or 1)
    task = ray.remote(call)
    asked = {"num_cpus": threads or 1, "num_gpus": gpus, "max_retries": retries, "retry_exceptions": False}
    left = {
        task.options(name=job.key, **asked).remote(
            function.__module__, function.__qualname__, job.arguments, told
        ): job.key
        for job in jobs
    }
    results = {}
    try:
        while left:
            (ready, *_), _ = ray.wait(list(left))
            key = left.pop(ready)
            results[key] = _ray_result(ray, ready, key)
            report(key)
    finally:
        for reference in left:
            ray.cancel(reference)
        ray.shutdown()
    return {job.key: results[job.key] for job in jobs}


def _ray_result(ray: Any, reference: Any, key: str) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise RuntimeError(f"job {key} failed:\n{error}") from error
    except ray.exceptions.RayError as error:
        raise UserError(
            f"job {key}", expected="to be finished on the cluster", got=str(error).splitlines()[0],
            fix="see the node's log; the same command goes on from here",
        ) from error  # fmt: skip


def _join_ray(workers: int | None, threads: int | None) -> Any:
    """Connect to the cluster of ``RAY_ADDRESS``, or make one here; its token authentication stays on."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    address = os.environ.get("RAY_ADDRESS")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--executor ray", expected="Ray", got="not installed", fix="pip install 'octofold[ray]'"
        ) from error
    if address:
        _knock(address)
    else:
        own_token()
    count = None if address else max(1, workers or bearable(0)) * (threads or 1)
    try:
        ray.init(address=address, num_cpus=count, include_dashboard=None if address else False, log_to_driver=True)
    except Exception as error:  # Ray raises its own, gRPC's and OSError
        raise UserError(
            f"RAY_ADDRESS={address or 'a local cluster'}", expected="a Ray cluster that lets us in",
            got=str(error).strip().splitlines()[0],
            fix="same Ray version, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as its head",
        ) from error  # fmt: skip
    return ray


def _knock(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"RAY_ADDRESS={address}",
            expected="the head of a Ray cluster, host:port",
            got=str(error),
            fix="start it, or unset RAY_ADDRESS to make a cluster of this machine",
        ) from error


def own_token() -> None:
    """Give a cluster made here a token that only this user can read (Ray's own file is open to all)."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    handle, path = tempfile.mkstemp(prefix="octofold-ray-")  # mode 0600
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    atexit.register(Path(path).unlink, missing_ok=True)
    os.environ["RAY_AUTH_TOKEN_PATH"] = path
