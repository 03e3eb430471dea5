"""How long does a blend of a million rows take, and in how much memory? Beside scipy's SLSQP and scikit-learn.

    python bench/blend_speed.py --rows 1000000 --classes 15 --members 20

Members live on disk as a float32 memmap ``(M, N, K)`` and are streamed. Each method runs in a process of its own, so
that its peak resident memory (which counts the mapped file's pages) is its own. One member is a duplicate and one is
constant, because registries hold such members. The general solvers get a tenth of the rows: they hold them in memory.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("equal", "lr_mse", "simplex", "log_loss", "hill_climb", "cwr")
OTHERS = ("scipy SLSQP", "sklearn positive")


def make(folder: Path, rows: int, classes: int, members: int) -> None:
    """Write members of varied quality, in pieces."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, classes, rows)
    np.save(folder / "target.npy", target)
    shape = (members, rows, classes)
    probs = np.lib.format.open_memmap(folder / "members.npy", "w+", np.float32, shape)
    for start in range(0, rows, 50_000):
        truth = target[start : start + 50_000]
        for member in range(members):
            logits = rng.standard_normal((len(truth), classes), dtype=np.float32)
            logits[np.arange(len(truth)), truth] += 0.5 + 2.5 * member / members
            logits = np.exp(1.5 * logits)
            probs[member, start : start + len(truth)] = logits / logits.sum(axis=1, keepdims=True)
        probs[1, start : start + len(truth)] = probs[members - 1, start : start + len(truth)]
        probs[0, start : start + len(truth)] = 1 / classes
    probs.flush()


def fit(folder: Path, method: str) -> dict[str, Any]:
    """Time one method and measure its score on every hundredth row."""
    from octofold.blend import blending
    from octofold.metrics import brier

    members, target = np.load(folder / "members.npy", mmap_mode="r"), np.load(folder / "target.npy")
    few = slice(None, None, 10)
    started = time.perf_counter()
    if method in METHODS:
        blend = blending.fit(method, members, target)
        seconds = time.perf_counter() - started
        score = brier(blend.apply(np.asarray(members[:, ::100])), target[::100])
    else:
        weights = _slsqp(members[:, few], target[few]) if "SLSQP" in method else _sklearn(members[:, few], target[few])
        seconds = time.perf_counter() - started
        score = brier(np.tensordot(weights, np.asarray(members[:, ::100]), 1), target[::100])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"method": method, "seconds": round(seconds, 2), "peak_gib": round(peak, 2), "brier": round(score, 6)}


def _slsqp(members: np.ndarray, target: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize

    parts = np.asarray(members)
    truth = np.eye(parts.shape[2], dtype=np.float32)[target]
    count = len(parts)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        off = np.tensordot(weights.astype(np.float32), parts, 1) - truth
        return float((off**2).sum()) / len(target), 2 * np.tensordot(parts, off, ([1, 2], [0, 1])).astype(float) / len(
            target
        )

    return minimize(
        loss, np.full(count, 1 / count), jac=True, bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    ).x  # fmt: skip


def _sklearn(members: np.ndarray, target: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LinearRegression

    parts = np.asarray(members)
    truth = np.eye(parts.shape[2], dtype=np.float32)[target].ravel()
    raw = LinearRegression(fit_intercept=False, positive=True).fit(parts.reshape(len(parts), -1).T, truth).coef_
    return raw / raw.sum()


def main() -> None:
    """Make the data, time every method, print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=15)
    parser.add_argument("--members", type=int, default=20)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), flags.rows, flags.classes, flags.members)
        for method in (*METHODS, *OTHERS):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(json.dumps(pool.apply(fit, (Path(scratch), method))), flush=True)


if __name__ == "__main__":
    main()
