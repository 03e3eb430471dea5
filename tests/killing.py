"""Train members while they are killed again and again at random points; tell what is left. Run by test_resume.py.

Each attempt is a forked process that dies after a random share of the processor time a whole training takes (SIGPROF,
whose default is to end the process at once), or by SIGKILL inside the first call of a chosen function.
"""

import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

HOME = Path(sys.argv[1])
RANDOM_KILLS = int(sys.argv[2])  # per recipe
os.environ |= {"OCTOFOLD_HOME": str(HOME), "NO_ALBUMENTATIONS_UPDATE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

import mlflow  # noqa: E402, F401  (imported before the forks: once for all attempts)
import numpy as np  # noqa: E402
import torch  # noqa: E402

import world  # noqa: E402
from octofold import config, plots  # noqa: E402
from octofold.commands import Train  # noqa: E402
from octofold.train import checkpoint, members  # noqa: E402

BASE = {
    "model": {"name": "small_cnn", "input_size": 16, "drop_rate": 0.2},
    "batch_size": 12,
    "folds": [0],
    "tta": "flip",
    "runtime": {"checkpoint_s": 0, "precision": "fp32", "channels_last": "on", "threads": 1},
}
RECIPES: dict[str, dict[str, Any]] = {
    "sam": {
        "augment": {"preset": "baseline"},
        "optim": {"sam_rho": 0.05, "accumulate": 2, "lr": 3e-3},
        "phases": [
            {"name": "probe", "epochs": 1, "train": "head", "augment": "none"},
            {"epochs": 2, "warmup_epochs": 1},
        ],
        "batch_size": 8,
    },
    "swa": {
        "augment": {"preset": "no_color", "mixup_alpha": 0.4, "mixup_prob": 0.5, "cutmix_alpha": 1, "cutmix_prob": 0.3},
        "average": {"kind": "swa", "start_epoch": 1},
        "phases": [{"epochs": 3, "schedule": "step", "step_every": 1}],
    },
    "ema": {
        "augment": {"preset": "baseline"},
        "average": {"kind": "ema", "decay": 0.9},
        "loss": {"weighted_sampler": True, "label_smoothing": 0.1},
        "optim": {"name": "sgd", "lr": 0.05},
        "phases": [
            {"epochs": 2, "schedule": "plateau", "patience": 1},
            {"name": "b", "epochs": 1, "optimizer": "adam"},
        ],
        "select": "last",
    },
    "probe": {"phases": [{"epochs": 4, "train": "head", "augment": "none", "lr": 0.01}], "tta": "geo8"},
}
EARLY = {  # places to die at before the random ones: between SAM's passes, in a checkpoint's writing …
    "sam": ["Sam.descend", "Clock.save"],
    "swa": ["Average.update"],
    "ema": ["Average.update", "Spool.deliver"],
    "probe": ["FrozenTrunk._stored"],
}
LATE = {  # … and after them: while the outcome is written and registered
    "sam": ["register_slot"],
    "swa": ["refresh_statistics", "write_model"],
    "ema": ["log_once"],
    "probe": ["ensure_registered", "rmtree"],
}


def train(recipe: dict[str, Any], member: str) -> None:
    """Train a member, as the entry point does."""
    settings = {**BASE, **recipe, "member": member, "manifest": str(HOME / "manifest.csv")}
    members.train(config.build(Train, settings, "test"))


def attempt(recipe: dict[str, Any], member: str, at: float | str | None) -> tuple[bool, float]:
    """Train in a fork that dies after `at` processor seconds, or inside the first call of that name.

    Returns:
        Whether it finished, and the processor seconds it took if so.
    """
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:

        def look(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code.co_qualname == at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            log = os.open(HOME / f"{member}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            logging.basicConfig(level=logging.INFO, format="%(message)s")
            if isinstance(at, str):
                sys.setprofile(look)
            elif at is not None:
                signal.setitimer(signal.ITIMER_PROF, at)
            begun = time.process_time()
            train(recipe, member)
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(writer, str(time.process_time() - begun).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    seen = os.read(reader, 64)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{member}: failed\n{(HOME / f'{member}.log').read_text()[-3000:]}")
    return os.WIFEXITED(status), float(seen or b"0")


def main() -> None:
    """Train each recipe once in peace and once with kills; print how many struck each killed member."""
    torch.set_num_threads(1)
    plots.curves = lambda *arguments, **options: plots.new_figure(1, 1)  # the costliest second of a tiny training
    versions = checkpoint.code_versions()
    checkpoint.code_versions = lambda: versions  # as imported, whoever edits the files meanwhile
    world.make_world(HOME, samples=48)
    random = np.random.default_rng(int(os.environ.get("KILL_SEED", "0")))
    kills = {}
    for name, recipe in RECIPES.items():
        _, seconds = attempt(recipe, f"{name}-whole", None)
        plan = [*EARLY[name], *random.uniform(0.1 * seconds, 0.6 * seconds, RANDOM_KILLS).tolist(), *LATE[name]]
        number = 0
        for at in plan:
            member = f"{name}-killed{number}"
            finished, _ = attempt(recipe, member, at)
            kills[member] = kills.get(member, 0) + (not finished)
            number += finished  # it got through: the next kill needs another one to strike
        if not finished:
            attempt(recipe, member, None)
    print(json.dumps(kills))


if __name__ == "__main__":
    main()
