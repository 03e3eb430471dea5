"""Engines: ways to run one network forward, exact by default, chosen by measurement.

No setting is best everywhere: depthwise nets gain 4 to 7x from OpenVINO on a CPU, plain convolutions 2x, some nothing.
So the first big job with an architecture measures the engines that are there, on the job's own images, and keeps
what it found in ``mlruns/engines.json``. An engine that changes a probability by more than 1e-5 against eager
float32 is refused, for these very weights, whatever was measured before.
"""

import contextlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from octofold.errors import UserError, known
from octofold.files import ROOT, read_json, write_json

log = logging.getLogger("octofold")

Forward = Callable[[Tensor], Tensor]  # (B, 3, S, S) uint8 -> (B, outputs) float32 logits
Activate = Callable[[Tensor], Tensor]  # logits to probabilities or unit points
_CANNOT = (
    RuntimeError,
    TypeError,
    ValueError,
    NotImplementedError,
)  # what engines raise at an operator unknown to them
EXACT = 1e-5  # largest difference of a probability (or unit coordinate) that still counts as the same
WORTH_S = 4.0  # eager jobs shorter than this are not worth a measurement
FIRST_LOOK = "eager, first pass"  # noted until the engines are measured: too slow, but the same for every part of a job
COMPILE_WORTH_S = 240.0  # torch.compile takes up to two minutes to make


class Eager:
    """The network as it is, in float32 or bfloat16 autocast."""

    def __init__(self, net: nn.Module, precision: str = "fp32", channels_last: bool = False) -> None:
        self.net = net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).eval()
        self.device = next(net.parameters()).device.type
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.half = precision == "bf16"

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits."""
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            logits: Tensor = self.net(images.contiguous(memory_format=self.format))
        return logits.float()


class Compiled(Eager):
    """torch.compile, channels last. Batches of a new size are padded to the first one: each size would compile anew."""

    def __init__(self, net: nn.Module, precision: str = "fp32") -> None:
        super().__init__(net, precision, channels_last=True)
        self.compiled = torch.compile(self.net, dynamic=False)
        self.rows = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits."""
        count = len(images)
        self.rows = max(self.rows, count)
        padded = images if count == self.rows else torch.cat([images, images[:1].expand(self.rows - count, -1, -1, -1)])
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            logits: Tensor = self.compiled(padded.contiguous(memory_format=self.format))
        return logits[:count].float()


class OpenVino:
    """OpenVINO on the CPU: uint8 NHWC in, normalisation inside the graph.

    A batch is dealt out to streams of one or a few threads each, which wait for nobody: on two cores that took 0.4 to
    0.65 of the time that all threads on the whole batch took. Two threads may call at once: the streams then go from
    one batch to the next without a pause.
    """

    PIXELS = 2**17  # of a request: more leave a core's cache, fewer leave its products small (six networks measured)

    def __init__(self, net: nn.Module, precision: str = "fp32") -> None:
        import warnings

        import openvino

        class Bytes(nn.Module):
            """Takes ``(B, S, S, 3)``, as decoded."""

            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, pixels: Tensor) -> Tensor:
                logits: Tensor = self.net(pixels.permute(0, 3, 1, 2))
                return logits

        side = int(getattr(net, "input_size", 32))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every Python number in timm's networks
            example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
            self.model = openvino.convert_model(Bytes().eval(), example_input=example)
        threads = torch.get_num_threads()
        self.streams = min(threads, 4)
        self.options = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": str(self.streams),
            "INFERENCE_NUM_THREADS": threads,
        }
        self.core = openvino.Core()
        self.queues: dict[tuple[int, ...], Any] = {}  # shape of a chunk: its queue
        self.dealing = threading.Lock()  # whole batches in turn, so that the first to come is the first to end

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits."""
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()  # no copy: images are channels last
        rows = min(max(self.PIXELS // pixels.shape[1] ** 2, 2), 16, -(-len(pixels) // self.streams))
        found: dict[int, npt.NDArray[np.float32]] = {}
        busy = []
        with self.dealing:
            for start in range(0, len(pixels), rows):
                chunk = pixels[start : start + rows]
                busy.append(self._queue(chunk.shape))
                busy[-1].start_async([chunk], userdata=(found, start), share_inputs=True)
        for queue in dict.fromkeys(busy):
            queue.wait_all()  # raises what a request raised
        return torch.from_numpy(np.concatenate([found[start] for start in sorted(found)]))

    def _queue(self, shape: tuple[int, ...]) -> Any:
        import openvino

        if shape not in self.queues:
            self.model.reshape(list(shape))
            queue = openvino.AsyncInferQueue(self.core.compile_model(self.model, "CPU", self.options), self.streams)
            queue.set_callback(_keep)
            self.queues[shape] = queue
        return self.queues[shape]


def _keep(request: Any, place: tuple[dict[int, npt.NDArray[np.float32]], int]) -> None:
    found, start = place
    found[start] = np.array(request.get_output_tensor(0).data, dtype=np.float32)  # its memory is used again


ENGINES: dict[str, Callable[[nn.Module, str], Forward]] = {
    "eager": lambda net, precision: Eager(net, precision),
    "channels_last": lambda net, precision: Eager(net, precision, channels_last=True),
    "compile": Compiled,
    "openvino": OpenVino,
}


@dataclass(frozen=True)
class Measured:
    """What an engine did on this machine.

    Attributes:
        image_ms: wall milliseconds for an image in one view.
        build_s: seconds to make it ready.
        difference: largest change of an activated output against eager float32.
    """

    image_ms: float
    build_s: float
    difference: float


def make(
    net: nn.Module,
    architecture: str,
    images: Tensor,
    activate: Activate,
    forwards: int,
    engine: str = "auto",
    precision: str = "fp32",
    notes: Path | None = None,
) -> Forward:
    """Return the fastest exact way to run a network `forwards` times, counting the time it takes to make.

    Args:
        net: on its device.
        architecture: what the measurements depend on: name, input size, head.
        images: ``(B, 3, S, S)`` uint8 real rows of the job, on the network's device; they time and verify.
        activate: logits to probabilities or unit points, for the comparison.
        forwards: images times views still to come.
        engine: row of `ENGINES`, or ``auto``.
        precision: ``fp32``: only engines that equal eager to 1e-5. ``bf16``: any difference goes.
        notes: JSON of earlier measurements; None = ``mlruns/engines.json``.

    Raises:
        UserError: the engine asked for is not installed, fails, or is not exact on these weights.
    """
    if engine != "auto":
        known("engine", engine, ENGINES)
        if engine == "openvino" and (find_spec("openvino") is None or images.device.type != "cpu"):
            raise UserError(
                "--engine openvino", expected="the package, and --device cpu", got="not both",
                fix="pip install 'octofold[openvino]'",
            )  # fmt: skip
        return _exact(net, engine, images, activate, precision)
    if images.device.type == "cuda" and precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # its convolutions keep 10 bits of 23: not the same probabilities
    notes = notes or ROOT / "mlruns" / "engines.json"
    key = f"{architecture}|{precision}|batch {len(images)}|{machine(images.device.type)}"
    eager_s = _eager_ms(key, net, images, precision, notes) / 1000 * forwards
    if eager_s < WORTH_S:
        return Eager(net, precision)
    table = measurements(key, net, images, activate, precision, eager_s, notes)
    ranked = sorted(table, key=lambda name: table[name].build_s + table[name].image_ms / 1000 * forwards)
    for name in ranked:
        if precision != "fp32" or table[name].difference <= EXACT:
            try:
                return _exact(net, name, images, activate, precision)
            except UserError as error:  # exact for other weights, not for these
                log.info("%s", error)
    return Eager(net, precision)


def _eager_ms(key: str, net: nn.Module, images: Tensor, precision: str, notes: Path) -> float:
    """Return what eager takes for an image, as noted: a job that is begun again must choose as it did before."""
    noted = read_json(notes) if notes.exists() else {}
    told = noted.get(key, {})
    if before := told.get("eager") or told.get(FIRST_LOOK):
        return float(before["image_ms"])
    start = time.perf_counter()
    Eager(net, precision)(images).cpu()
    image_ms = (time.perf_counter() - start) / len(images) * 1000
    with contextlib.suppress(UserError):  # a folder that cannot be written: then it is measured again
        write_json(notes, {**noted, key: {**told, FIRST_LOOK: asdict(Measured(image_ms, 0.0, 0.0))}})
    return image_ms


def measurements(
    key: str, net: nn.Module, images: Tensor, activate: Activate, precision: str, eager_s: float,
    notes: Path,
) -> dict[str, Measured]:  # fmt: skip
    """Return what is known of each engine here, measuring those that a job of `eager_s` seconds makes worth it."""
    known_before = read_json(notes) if notes.exists() else {}
    table = {name: Measured(**found) for name, found in known_before.get(key, {}).items() if name in ENGINES}
    wanted = ["eager", "channels_last"]
    if images.device.type == "cpu" and find_spec("openvino") is not None:
        wanted.append("openvino")
    fastest_s = eager_s
    if {"openvino", "channels_last"} & set(table):
        fastest_s = min(one.image_ms for one in table.values()) / max(table["eager"].image_ms, 1e-9) * eager_s
    if fastest_s > COMPILE_WORTH_S and "openvino" not in wanted:
        wanted.append("compile")
    fresh = {name: _measure(net, name, images, activate, precision) for name in wanted if name not in table}
    if fresh:
        table |= {name: found for name, found in fresh.items() if found is not None}
        written = read_json(notes) if notes.exists() else {}
        write_json(notes, {**written, key: {name: asdict(found) for name, found in table.items()}})
        speeds = ", ".join(f"{name} {found.image_ms:.1f} ms" for name, found in table.items())
        log.info("engines for %s: %s an image", key.partition("|")[0], speeds)
    return table


def _measure(net: nn.Module, name: str, images: Tensor, activate: Activate, precision: str) -> Measured | None:
    plain = reference(net, images, activate)
    start = time.perf_counter()
    try:
        forward = ENGINES[name](net, precision)
        change = difference(forward, images, activate, plain)
    except _CANNOT as error:
        log.info("engine %s: left out (%s)", name, _first_line(error))
        return None
    build_s = time.perf_counter() - start
    times = []
    for _ in range(3):
        start = time.perf_counter()
        forward(images).cpu()  # waits for an accelerator
        times.append(time.perf_counter() - start)
    return Measured(min(times) / len(images) * 1000, build_s, change)


def difference(forward: Forward, images: Tensor, activate: Activate, plain: Tensor) -> float:
    """Return the largest change of an activated output against `plain`, what eager float32 said."""
    with torch.inference_mode():
        ours = activate(forward(images)).cpu()
    change: npt.NDArray[np.float32] = (ours - plain).abs().numpy()
    return float(np.nan_to_num(change, nan=np.inf).max())


def reference(net: nn.Module, images: Tensor, activate: Activate) -> Tensor:
    """Return what eager float32 says: the measure of exactness."""
    with torch.inference_mode():
        return activate(Eager(net)(images)).cpu()


def _exact(net: nn.Module, name: str, images: Tensor, activate: Activate, precision: str) -> Forward:
    """Make an engine and check it on real rows with the real weights."""
    plain = reference(net, images, activate)  # before the engine: it lays the weights out anew
    try:
        forward = ENGINES[name](net, precision)
        change = difference(forward, images, activate, plain)
    except _CANNOT as error:
        raise UserError(
            f"engine {name}", expected="to run this network", got=_first_line(error), fix="use --engine auto"
        ) from error
    if precision == "fp32" and change > EXACT:
        raise UserError(
            f"engine {name}", expected=f"eager's probabilities to {EXACT:g}", got=f"a difference of {change:.2g}",
            fix="use --engine eager",
        )  # fmt: skip
    return forward


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@lru_cache(maxsize=4)
def machine(device: str) -> str:
    """Name what a measurement depends on besides the network: processor, threads, device, library versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    parts = [name, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if device == "cuda":
        parts.append(torch.cuda.get_device_name())
    elif find_spec("openvino") is not None:
        from importlib.metadata import version

        parts.append(f"openvino {version('openvino')}")
    return ", ".join(parts)
