"""The numerics of blend weights: one small matrix, summed over the data in pieces, and exact programs on it.

With weights that sum to one, ``||sum_m w_m P_m - Y||^2 = w' C w`` where ``C_ij = <P_i - Y, P_j - Y>``. So a million
rows come down to an M x M matrix that adds up over chunks, folds and machines.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.bool_]
CHUNK = 4096
"""Rows read at once: small enough to stay in the processor's cache with twenty members."""


class Gram(NamedTuple):
    """What least squares needs to know of members and target.

    Attributes:
        residual: ``(M, M)`` float64, ``<P_i - Y, P_j - Y>``.
        overlap: ``(M,)`` float64, ``<P_i, Y>``.
        energy: ``<Y, Y>``; the number of rows for classes.
        rows: how many rows were summed.
    """

    residual: Array
    overlap: Array
    energy: float
    rows: int


def gram(members: Array, target: Array, rows: Rows | None = None) -> Gram:
    """Sum the Gram matrix in one pass over the data, which may be a memmap.

    Args:
        members: ``(M, N, K)`` probabilities, or ``(M, N, P, 2)`` points.
        target: ``(N,)`` int classes, or ``(N, P, 2)`` points, NaN where missing (then not counted).
        rows: ``(N,)`` bool, the rows to count; None = all.
    """
    count = members.shape[0]
    residual, overlap, energy, seen = np.zeros((count, count)), np.zeros(count), 0.0, 0
    for start in range(0, members.shape[1], CHUNK):
        part, truth = chunk_of(members, target, rows, start)
        n = part.shape[1]
        if n == 0:
            continue
        if truth.ndim == 1:
            every = np.arange(n)
            overlap += part[:, every, truth].sum(axis=1, dtype=np.float64)
            energy += n
            part[:, every, truth] -= 1
        else:
            known = np.isfinite(truth)
            truth = np.where(known, truth, 0)
            part = np.where(known, part, 0)
            overlap += (part * truth).reshape(count, -1).sum(axis=1, dtype=np.float64)
            energy += float((truth.astype(np.float64) ** 2).sum())
            part = part - truth
        flat = part.reshape(count, -1)
        residual += flat @ flat.T
        seen += n
    return Gram(residual, overlap, energy, seen)


def chunk_of(members: Array, target: Array, rows: Rows | None, start: int) -> tuple[Array, Array]:
    """Copy the wanted rows among ``start .. start + CHUNK`` as float32 members and their target."""
    window = slice(start, start + CHUNK)
    part, truth = np.array(members[:, window], dtype=np.float32), target[window]
    return (part, truth) if rows is None else (part[:, rows[window]], truth[rows[window]])


def simplex(residual: Array) -> Array:
    """Minimise ``w' C w`` over ``w >= 0, sum(w) = 1`` exactly; singular C (equal members) is fine.

    Homogenised non-negative least squares: ``min_u>=0 ||R u||^2 + (1'u - 1)^2`` with ``C = R'R`` has the same
    direction as the wanted optimum, because the best scale of a direction with value q leaves ``q / (1 + q)``.

    Args:
        residual: ``(M, M)`` symmetric, positive semidefinite.

    Returns:
        ``(M,)`` float64 weights; those below 1e-6 are exactly 0.
    """
    count, scale = len(residual), float(np.trace(residual))
    if scale <= 0:  # every member is perfect
        return np.full(count, 1 / count)
    values, vectors = np.linalg.eigh(residual / scale * count)
    root = vectors.T * np.sqrt(values.clip(0))[:, None]
    raw, _ = nnls(np.vstack([root, np.ones(count)]), np.r_[np.zeros(count), 1.0])
    return normalised(raw)


def non_negative(table: Gram) -> Array:
    """Regress the one-hot target on the members with non-negative weights, then divide by their sum (original 000).

    Not the same problem as `simplex`: the raw sum need not be 1. Uniform if every weight is 0.
    """
    square = table.residual + table.overlap[:, None] + table.overlap[None] - table.energy
    values, vectors = np.linalg.eigh(square)
    kept = values > values.max() * 1e-10
    root = np.sqrt(values[kept])
    raw, _ = nnls(vectors[:, kept].T * root[:, None], (vectors[:, kept].T @ table.overlap) / root)
    return normalised(raw)


def log_loss(members: Array, target: Array, rows: Rows | None = None, steps: int = 50) -> Array:
    """Minimise the mean negative log of the weighted average's probability of the truth, on the simplex, exactly.

    Newton steps, each a simplex program on the Hessian, with backtracking. Only each member's probability of the
    truth matters, so N x M numbers are held.
    """
    count = members.shape[0]
    pieces = []
    for start in range(0, members.shape[1], CHUNK):
        part, truth = chunk_of(members, target, rows, start)
        pieces.append(part[:, np.arange(part.shape[1]), truth].T)
    chance = np.concatenate(pieces).clip(1e-7)  # (N, M)
    weights = np.full(count, 1 / count)
    if len(chance) > 50_000:  # nearly there after a look at few rows; the rest is a step or two
        weights = _newton(chance[:: len(chance) // 20_000], weights, steps)
    return normalised(_newton(chance, weights, steps))


def _newton(chance: Array, weights: Array, steps: int) -> Array:
    """Minimise the mean of ``-log(chance @ weights)`` on the simplex; `chance` is ``(N, M)``, float32 and positive."""
    value = -float(np.log(chance @ weights).mean())
    for _ in range(steps):
        ratio = chance / (chance @ weights)[:, None].astype(np.float32)
        hessian = (ratio.T @ ratio).astype(np.float64) / len(ratio)
        gradient = -ratio.mean(axis=0, dtype=np.float64)
        # The quadratic model is v'Hv + 4g'v with Hw = -g and w'Hw = 1. On the simplex 4g'v = v'(2g1' + 2 1g')v, and
        # 4 * 11' adds a constant; together they are T'HT with T = I - 2w1', positive semidefinite: one simplex program.
        program = hessian + 2 * (gradient[:, None] + gradient[None]) + 4
        step = simplex(program) - weights
        if abs(float(gradient @ step)) < 1e-8:  # below what single precision tells apart
            break
        length, before = 1.0, value
        while length > 1e-6:
            value = -float(np.log(chance @ (weights + length * step)).mean())
            if value <= before:
                break
            length /= 2
        if length <= 1e-6:
            break
        weights = weights + length * step
    return weights


def greedy(residual: Array, steps: int = 100) -> Array:
    """Caruana's forward selection with replacement on the squared error: the counts, normalised.

    Caruana et al. 2004, "Ensemble Selection from Libraries of Models".
    """
    count = len(residual)
    chosen, cross = np.zeros(count), np.zeros(count)
    value = 0.0
    best, best_error = chosen, np.inf
    for step in range(1, steps + 1):
        errors = (value + 2 * cross + np.diag(residual)) / step**2
        pick = int(errors.argmin())
        value += 2 * cross[pick] + residual[pick, pick]
        cross += residual[:, pick]
        chosen = chosen + (np.arange(count) == pick)
        if errors[pick] < best_error:
            best, best_error = chosen, float(errors[pick])
    return normalised(best)


def normalised(raw: Array) -> Array:
    """Return non-negative weights that sum to 1, dust below 1e-6 removed; uniform if nothing is left."""
    raw = np.where(np.isfinite(raw), raw, 0).clip(0)
    if raw.sum() <= 0:
        return np.full(len(raw), 1 / len(raw))
    weights = raw / raw.sum()
    weights = np.where(weights < 1e-6, 0, weights)
    return np.asarray(weights / weights.sum(), dtype=np.float64)
