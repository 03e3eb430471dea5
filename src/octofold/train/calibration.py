"""Calibration: the fastest way to train this network on this machine is measured, not guessed.

No setting is best everywhere: with bf16 instructions a CPU trains resnet18 2.2x as fast in bf16 with channels last,
EfficientNet-Lite0 1.15x; without them bf16 is the slower one; compiling pays for long trainings of some networks.
A few interleaved steps tell; the times are kept in ``mlruns/calibration.json`` by network, size, batch and machine, so
that all slots of a member are trained alike.
"""

import copy
import itertools
import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from filelock import FileLock

from octofold.compute import Devices
from octofold.errors import UserError
from octofold.files import ROOT, read_json, sha256_json, write_json
from octofold.nets.models import Net
from octofold.recipe import Recipe
from octofold.train.machine import computing

log = logging.getLogger("octofold")
BUDGET_S = 8.0
ROUNDS = 5
MARGIN = 1.08
"""A way must be this much faster than plain float32, channels last, to be preferred to it."""
KERNELS = 1
"""Raised when `machine` changes how fast a way is, so that older measurements are not believed."""
COMPILE_WORTH_S = 900.0
"""A CPU takes up to a minute to compile one way: members that train for less than this are not worth finding out."""

Way = dict[str, Any]  # precision, channels_last, compile


def choose(recipe: Recipe, net: Net, device: torch.device, steps: int = 0) -> dict[str, Any]:
    """Resolve the recipe's `runtime`: pinned values stay, the rest is measured or looked up.

    Args:
        recipe: its runtime says what is pinned.
        net: the network; it is copied, not trained.
        device: where it will be trained.
        steps: batches the whole member will train the trunk on; they decide whether compiling pays on a CPU.

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
    best, seconds, speedup = _fastest(recipe, net, device, ways)
    if asked.compile == "auto" and device.type == "cpu" and steps * seconds > COMPILE_WORTH_S:
        compiled = [way | {"compile": True} for way in ways if way["channels_last"] or asked.channels_last == "off"]
        best, _, gain = _fastest(recipe, net, device, [best, *compiled], steps)
        speedup *= gain
    return best | rest | {"speedup": round(speedup, 3)}


def settle(
    saved: dict[str, Any] | None, recipe: Recipe, net: Net, devices: Devices, size: tuple[int, int]
) -> dict[str, Any]:
    """Return what the checkpoint `saved` was made with, else the fastest way found; the same in all processes.

    Args:
        saved: the checkpoint, or None.
        recipe, net: as in `choose`.
        devices: the main process chooses.
        size: folds of the manifest, and rows trained on, for `steps_of`.

    Raises:
        UserError: the recipe pins something else than the checkpoint was made with.
    """
    if saved is not None:
        _check_pinned(recipe, saved["runtime"])
        torch.set_num_threads(saved["runtime"]["threads"])  # the number of threads decides the order of sums
        return dict(saved["runtime"])
    found = choose(recipe, net, devices.device, steps_of(recipe, *size)) if devices.is_main else {}
    return dict(devices.from_main(found))


def _check_pinned(recipe: Recipe, then: dict[str, Any]) -> None:
    """Refuse to go on in another way than was asked for: half a training in each would be neither."""
    asked = recipe.runtime
    was = {name: ("off", "on")[value] if isinstance(value, bool) else value for name, value in then.items()}
    other = [
        name
        for name in ("precision", "channels_last", "compile", "threads")
        if getattr(asked, name) not in ("auto", None, was[name])
    ]
    if other:
        raise UserError(
            ", ".join(f"runtime.{name}" for name in other),
            expected=f"what the checkpoint was made with: {', '.join(str(was[name]) for name in other)}",
            got=", ".join(str(getattr(asked, name)) for name in other),
            fix="begin anew with --restart true, or leave it out to go on from the checkpoint",
        )


def steps_of(recipe: Recipe, folds: int, rows: int) -> int:
    """Batches that a whole member trains its trunk on, about: all its folds (else `folds`) and seeds, `rows` each."""
    epochs = sum(phase.epochs for phase in recipe.phases if phase.train == "all")
    slots = len(recipe.folds or range(folds)) * len(recipe.seeds)
    return epochs * slots * max(1, rows // recipe.batch_size) * (2 if recipe.optim.sam_rho else 1)


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


def _fastest(
    recipe: Recipe, net: Net, device: torch.device, ways: list[Way], steps: int = 0
) -> tuple[Way, float, float]:
    """Return the way by which `steps` steps are done first, its seconds per step, and its speed over the first way's.

    With 0 steps the time to make a way does not count. The first way is preferred unless another is faster by `MARGIN`.
    """
    found = _measured(recipe, net, device, ways)
    ms, makes = ([found[what][_label(way)] for way in ways] for what in ("ms_per_step", "s_to_make"))
    best = first_done(ms, makes, steps)
    return ways[best], (ms[best] or math.inf) / 1000, (ms[0] / ms[best] if ms[0] and ms[best] else 1.0)


def first_done(ms: Sequence[float | None], makes: Sequence[float | None], steps: int) -> int:
    """Return the place of the way that is done first, or 0 unless that gains more than `MARGIN`.

    Args:
        ms: milliseconds per step of each way, None where it fails.
        makes: seconds to make each.
        steps: how many steps; 0 = one, and the time to make does not count.
    """
    costs = [
        math.inf if time is None else max(1, steps) * time / 1000 + (made or 0 if steps else 0)
        for time, made in zip(ms, makes, strict=True)
    ]
    best = min(range(len(costs)), key=lambda place: costs[place])
    # Where none could be timed it is 0 too: let the training itself say what is wrong.
    return best if math.isfinite(costs[best]) and costs[0] > MARGIN * costs[best] else 0


def _measured(recipe: Recipe, net: Net, device: torch.device, ways: list[Way]) -> dict[str, Any]:
    """Return what each way costs, milliseconds per step and seconds to make, None where it fails; measured once."""
    size = recipe.model.input_size
    key = sha256_json(
        [recipe.model.model_dump(exclude={"weights"}), recipe.batch_size, machine(device), torch.__version__, KERNELS]
        + ways
    )[:16]
    path = ROOT / "mlruns" / "calibration.json"
    known: dict[str, dict[str, Any]] = read_json(path, "calibrations") if path.exists() else {}
    if "s_to_make" in known.get(key, {}):
        return known[key]
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # slots that start together must not choose differently
        known = read_json(path, "calibrations") if path.exists() else {}
        if "s_to_make" in known.get(key, {}):
            return known[key]
        times, makes = _race(net, device, size, recipe.batch_size, ways)
        labels = [_label(way) for way in ways]
        found: dict[str, Any] = {
            "model": recipe.model.name,
            "size": size,
            "batch": recipe.batch_size,
            "machine": machine(device),
            "ms_per_step": {label: _finite(1000 * time) for label, time in zip(labels, times, strict=True)},
            "s_to_make": {label: _finite(made) for label, made in zip(labels, makes, strict=True)},
        }
        write_json(path, known | {key: found})
    ranked = sorted((ms, label) for label, ms in found["ms_per_step"].items() if ms is not None)
    shown = ", ".join(f"{label} {ms:.0f}" for ms, label in ranked)
    log.info("fastest ways to train %s at %d px here, ms per step: %s", recipe.model.name, size, shown)
    return found


def _finite(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None


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


def _race(net: Net, device: torch.device, size: int, batch: int, ways: list[Way]) -> tuple[list[float], list[float]]:
    """Time a training step of each way, in turns, so that a busy moment hits all alike.

    Returns:
        The best seconds per step, and how long the first step took, which allocates and compiles.
    """
    state = torch.get_rng_state()
    steps: dict[int, Callable[[], float]] = {}
    times, makes = [math.inf] * len(ways), [math.inf] * len(ways)
    for place, way in enumerate(ways):
        try:
            step = _stepper(net, device, size, batch, way)
            makes[place] = step()
            steps[place] = step
        except (RuntimeError, NotImplementedError) as error:  # too little memory, no compiler, no such kernel
            log.info("%s left out: %s", _label(way), str(error).splitlines()[0] if str(error) else type(error).__name__)
    begun = time.perf_counter()
    for done in range(ROUNDS):
        for place, step in steps.items():
            times[place] = min(times[place], step())
        if time.perf_counter() - begun > BUDGET_S and done:
            break
    torch.set_rng_state(state)
    return times, makes


def compiled(net: Net) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network compiled for one shape of batch: every step of a phase has the same."""
    made: Callable[[torch.Tensor], torch.Tensor] = torch.compile(net, dynamic=False)
    return made


def _stepper(net: Net, device: torch.device, size: int, batch: int, way: Way) -> Callable[[], float]:
    """Return a function that takes one training step on a copy of the network and says how long it took."""
    layout = torch.channels_last if way["channels_last"] else torch.contiguous_format
    own = copy.deepcopy(net).to(memory_format=layout).train()
    forward = compiled(own) if way["compile"] else own
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=device.type in ("cpu", "cuda"))
    images = torch.randint(0, 256, (max(2, batch), size, size, 3), dtype=torch.uint8, device=device)
    images = images.permute(0, 3, 1, 2)
    images = images if way["channels_last"] else images.contiguous()

    def step() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with computing(device.type, way["precision"]):
            logits = forward(images)
        logits.float().square().mean().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return step
