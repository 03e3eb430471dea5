"""demo: the whole job on scikit-learn's digits: prepare, train, promote, blend, and the truth beside the estimate.

make demo
python entrypoints/demo.py
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from octofold.commands import Demo
from octofold.config import run_main
from octofold.errors import UserError

ENTRYPOINTS = Path(__file__).resolve().parent


def step(entry: str, *flags: object) -> dict[str, Any]:
    """Run one entry point as a person would; its progress goes to the terminal, its result comes back."""
    words = [str(flag) for flag in flags]
    print(f"\n$ python entrypoints/{entry}.py {' '.join(words)}", file=sys.stderr, flush=True)
    command = [sys.executable, str(ENTRYPOINTS / f"{entry}.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError(
            f"demo, step '{entry}'", expected="exit code 0", got=str(done.returncode), fix="see the lines above"
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run(config: Demo) -> dict[str, Any]:
    """Do the job in a run of its own, which holds the estimate beside the truth; each step has its run too."""
    from octofold.track import tracking

    with tracking.run("demo", config, "digits") as own:
        result = do_the_job(config)
        own.log_metrics({key: value for key, value in result.items() if key.startswith(("estimate/", "held_out/"))})
    return {**result, "run_id": own.id}


def do_the_job(config: Demo) -> dict[str, Any]:
    """Prepare, train, promote, blend; then score the submission on the digits kept aside."""
    prepared = step("prepare", "--competition", "digits", "--builtin", "digits", "--folds", config.folds)
    members = [step("train", "--manifest", prepared["manifest"], "--config", recipe) for recipe in config.configs]
    for member in members:
        step("promote", "--competition", "digits", "--member", member["member"], "--stage", config.stage)
    names = ",".join(dict.fromkeys(member["member"] for member in members))  # not what an earlier demo promoted
    blended = step("blend", "--competition", "digits", "--stage", config.stage, "--members", names, "--tta", "auto")
    truth = held_out_accuracy(Path(blended["submission"]), Path(prepared["manifest"]).with_name("test_truth.csv"))
    low, high = blended["estimate/low"], blended["estimate/high"]
    expected = f"{blended['estimate/accuracy']:.4f}  (95 % interval {low:.4f} to {high:.4f})"
    lines = {
        "estimate for the held-out digits": expected,
        "what they really gave": f"{truth:.4f}  ({'inside' if low <= truth <= high else 'outside'} the interval)",
        "submission": blended["submission"],
        "compare the runs in MLflow": "make ui    then open http://127.0.0.1:5000",
    }
    print("\n" + "\n".join(f"{what:<34}{value}" for what, value in lines.items()) + "\n", file=sys.stderr)
    return blended | {"held_out/accuracy": truth}


def held_out_accuracy(submission: Path, truth: Path) -> float:
    """Share of the submission's rows that agree with the labels prepare kept aside."""
    import csv

    with submission.open(newline="") as said, truth.open(newline="") as known:
        labels = {row["image"]: row["label"] for row in csv.DictReader(known)}
        rows = list(csv.DictReader(said))
    return sum(labels[row["image"]] == row["label"] for row in rows) / len(rows)


if __name__ == "__main__":
    run_main(Demo, run)
