"""Two processes of an `accelerate launch` train one slot as one process does, to rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import REPOSITORY, House
from world import make_world

FLAGS = [
    *("--model.name", "vit_tiny_patch16_224", "--model.input_size", "32", "--augment.preset", "baseline"),
    *("--augment.mixup_prob", "0.5", "--augment.mixup_alpha", "0.4", "--optim.sam_rho", "0.05"),
    *("--optim.accumulate", "2", "--batch_size", "16", "--average.kind", "ema", "--average.decay", "0.9"),
    *("--phases", '[{"epochs": 2}]', "--folds", "0", "--tta", "none", "--select", "last", "--optim.name", "sgd"),
    *(
        "--runtime.device",
        "cpu",
        "--runtime.precision",
        "fp32",
        "--runtime.channels_last",
        "on",
        "--runtime.threads",
        "1",
    ),
]


@pytest.mark.slow
def test_two_processes_equal_one(house: House) -> None:
    make_world(house.home, samples=96, side=32)
    outcomes = {}
    for name, launcher in (
        ("alone", []),
        ("together", ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                      "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]),
    ):  # fmt: skip
        command = [sys.executable, *launcher, str(REPOSITORY / "entrypoints" / "train.py")]
        flags = ["--manifest", str(house.home / "manifest.csv"), "--member", name, *FLAGS]
        done = subprocess.run(
            [*command, *flags], env=house.environment(), cwd=house.home, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outcomes[name] = json.loads(done.stdout.strip().splitlines()[-1])
    weights = {}
    for name in outcomes:
        files = [path for path in (house.home / "mlruns").rglob("model.safetensors") if holds(path, name)]
        weights[name] = load_file(files[0])
    apart = max(float((weights["alone"][key] - weights["together"][key]).abs().max()) for key in weights["alone"])
    assert apart < 1e-5, apart
    assert outcomes["alone"]["oof/accuracy"] == pytest.approx(outcomes["together"]["oof/accuracy"], abs=0.05)


def holds(path: Path, member: str) -> bool:
    """Whether a checkpoint folder is this member's."""
    return json.loads(path.with_name("model.json").read_text())["member"] == member
