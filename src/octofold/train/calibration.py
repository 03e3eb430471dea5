"""Calibration: the fastest way to train this network on this machine is measured, not guessed.

No setting is best everywhere: on a CPU with bf16 instructions dense convolutions gain 2.2x from bf16 with channels
last, depthwise ones more from float32 with channels last. A few interleaved steps tell; the answer is kept in
``mlruns/calibration.json`` by network, size, batch and machine, so that all slots of a member are trained alike.
"""

import copy
import itertools
import logging
import platform
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from filelock import FileLock

from octofold.files import ROOT, read_json, sha256_json, write_json
from octofold.nets.models import Net
from octofold.recipe import Recipe

log = logging.getLogger("octofold")
BUDGET_S = 8.0
ROUNDS = 5
MARGIN = 1.08
"""A way must be this much faster than plain float32, channels last, to be preferred to it."""

Way = dict[str, Any]  # precision, channels_last, compile


def choose(recipe: Recipe, net: Net, device: torch.device) -> dict[str, Any]:
    """Resolve the recipe's `runtime`: pinned values stay, the rest is measured or looked up.

    Returns:
        ``precision, channels_last, compile, workers, threads``, and ``speedup`` over plain float32 where measured.
    """
    asked, cuda = recipe.runtime, device.type == "cuda"
    rest = {
        "workers": (min(8, max(1, _cores() - 1)) if cuda else 0) if asked.workers is None else asked.workers,
        "threads": torch.get_num_threads(),
    }
    ways = _candidates(recipe, device)
    if len(ways) == 1:
        return ways[0] | rest
    trains = any(phase.train == "all" for phase in recipe.phases)
    if not trains:  # only a head moves: nothing worth measuring, and features should be exact
        exact = [way for way in ways if way["precision"] == "fp32" and not way["compile"]]
        return (exact or ways)[0] | rest
    return _measured(recipe, net, device, ways) | rest


def _candidates(recipe: Recipe, device: torch.device) -> list[Way]:
    """The ways that are not ruled out by a pinned value or the device; the first is the plain one."""
    asked = recipe.runtime
    precisions = ["fp32", "bf16"] if asked.precision == "auto" else [asked.precision]
    if device.type == "mps" and asked.precision == "auto":
        precisions = ["fp32"]
    layouts = {"auto": [True, False], "on": [True], "off": [False]}[asked.channels_last]
    compiled = {"auto": [False], "on": [True], "off": [False]}[asked.compile]
    if asked.compile == "auto" and device.type == "cuda":
        compiled = [False, True]
    return [
        {"precision": precision, "channels_last": layout, "compile": compile_}
        for precision, layout, compile_ in itertools.product(precisions, layouts, compiled)
    ]


def _measured(recipe: Recipe, net: Net, device: torch.device, ways: list[Way]) -> Way:
    size = recipe.model.input_size
    key = sha256_json(
        [recipe.model.model_dump(exclude={"weights"}), recipe.batch_size, machine(device), torch.__version__, ways]
    )[:16]
    path = ROOT / "mlruns" / "calibration.json"
    known = read_json(path, "calibrations") if path.exists() else {}
    if key in known:
        return _chosen(known[key])
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # slots that start together must not choose differently
        known = read_json(path, "calibrations") if path.exists() else {}
        if key in known:
            return _chosen(known[key])
        times = _race(net, device, size, recipe.batch_size, ways)
        order = sorted(range(len(ways)), key=lambda place: times[place])
        best = order[0] if times[0] > MARGIN * times[order[0]] else 0
        if times[best] == float("inf"):
            best = 0  # none could be timed: let the training itself say what is wrong
        found = {
            "model": recipe.model.name,
            "size": size,
            "batch": recipe.batch_size,
            "machine": machine(device),
            "chosen": ways[best],
            "ms_per_step": {_label(w): round(1000 * t, 2) for w, t in zip(ways, times, strict=True) if t < 1e9},
            "speedup": round(times[0] / times[best], 3) if times[0] < 1e9 else 1.0,
        }
        write_json(path, known | {key: found})
    log.info(
        "fastest way to train %s at %d px here: %s, %.2fx plain float32 (of %s ms per step)",
        recipe.model.name,
        size,
        _label(ways[best]),
        found["speedup"],
        found["ms_per_step"],
    )
    return _chosen(found)


def _chosen(found: dict[str, Any]) -> Way:
    way: Way = found["chosen"]
    return way | {"speedup": found["speedup"]}


def _label(way: Way) -> str:
    layout = "channels_last" if way["channels_last"] else "contiguous"
    return "+".join([way["precision"], layout, *(["compile"] if way["compile"] else [])])


@lru_cache(maxsize=4)
def machine(device: torch.device) -> str:
    """Name the machine as far as speed depends on it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({torch.version.cuda})"
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith(("model name", "Hardware")))
    except (OSError, StopIteration):
        pass
    return f"{model} {torch.backends.cpu.get_cpu_capability()} x{torch.get_num_threads()}"


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def _race(net: Net, device: torch.device, size: int, batch: int, ways: list[Way]) -> list[float]:
    """Time a training step of each way, in turns, so that a busy moment hits all alike; return the best seconds."""
    state = torch.get_rng_state()
    steps: dict[int, Callable[[], float]] = {}
    for place, way in enumerate(ways):
        try:
            step = _stepper(net, device, size, batch, way)
            step()  # the first call allocates (and compiles)
            steps[place] = step
        except (RuntimeError, NotImplementedError) as error:  # too little memory, no compiler, no such kernel
            log.info("%s left out: %s", _label(way), str(error).splitlines()[0] if str(error) else type(error).__name__)
    begun, times = time.perf_counter(), [float("inf")] * len(ways)
    for done in range(ROUNDS):
        for place, step in steps.items():
            times[place] = min(times[place], step())
        if time.perf_counter() - begun > BUDGET_S and done:
            break
    torch.set_rng_state(state)
    return times


def _stepper(net: Net, device: torch.device, size: int, batch: int, way: Way) -> Callable[[], float]:
    """Return a function that takes one training step on a copy of the network and says how long it took."""
    layout = torch.channels_last if way["channels_last"] else torch.contiguous_format
    own = copy.deepcopy(net).to(memory_format=layout).train()
    forward = torch.compile(own) if way["compile"] else own
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=device.type in ("cpu", "cuda"))
    images = torch.randint(0, 256, (max(2, batch), size, size, 3), dtype=torch.uint8, device=device)
    images = images.permute(0, 3, 1, 2)
    images = images if way["channels_last"] else images.contiguous()
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(way["precision"])

    def step() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, kind, enabled=kind is not None):
            logits = forward(images)
        logits.float().square().mean().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return step
