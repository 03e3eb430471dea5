"""Shards: a big inference job cut into parts that are finished one by one, so that a broken job goes on.

A part is a Predictions file written whole. The folder of parts is named after everything the result depends on
(weights, views, precision, the files and their sizes), so another job never finds them. Several machines that
share the project folder may take one shard each; whoever finds all parts there joins them.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from octofold.errors import UserError, preview
from octofold.files import ROOT, sha256_json
from octofold.infer import inference
from octofold.infer.ensemble import Ensemble
from octofold.infer.inference import How
from octofold.infer.looks import Item, Skipped, Source
from octofold.predictions import Predictions

ROWS = 2048  # images a part when the number of shards is left to us: a minute or two of work on two cores


@dataclass(frozen=True)
class Result:
    """What a whole job found.

    Attributes:
        predictions: one row per distinct content.
        files: every file that could be read, as (name, sample id).
        skipped: every file that could not, and why.
    """

    predictions: Predictions
    files: list[tuple[str, str]]
    skipped: list[Skipped]


def run(
    ensemble: Ensemble,
    source: Source,
    how: How,
    shards: int = 0,
    shard: int | None = None,
    progress: bool = True,
) -> Result | None:
    """Predict a source, part by part, going on where an earlier call of the same job stopped.

    Args:
        ensemble: who speaks.
        source: what to look at.
        how: views, batch size, engine, precision.
        shards: how many parts; 0 = one per 2048 images.
        shard: make only this one (0-based); None = all, then join.
        progress: a bar on stderr.

    Returns:
        The joined result, or None when `shard` was given and other parts are still missing.

    Raises:
        UserError: no such shard, or not one readable image.
    """
    parts = _cut(source.items, shards)
    if shard is not None and not 0 <= shard < len(parts):
        raise UserError("--shard", expected=f"a number in 0..{len(parts) - 1}", got=str(shard))
    work = ROOT / "mlruns" / "work" / "infer" / _key(ensemble, source, how, len(parts))
    wanted = [shard] if shard is not None else list(range(len(parts)))
    done = sum(len(parts[place]) for place in wanted if _file(work, place).exists())
    with tqdm(
        total=sum(len(parts[place]) for place in wanted), initial=done, unit="img", disable=not progress, mininterval=1
    ) as bar:
        for place in wanted:
            if not _file(work, place).exists():
                _one(ensemble, parts[place], how, bar).save(_file(work, place))
    if any(not _file(work, place).exists() for place in range(len(parts))):
        return None
    result = _join([Predictions.load(_file(work, place)) for place in range(len(parts))], source)
    shutil.rmtree(work)
    return result


def missing(ensemble: Ensemble, source: Source, how: How, shards: int = 0) -> list[int]:
    """Return the numbers of the parts that no earlier call of the same job has made."""
    count = len(_cut(source.items, shards))
    work = ROOT / "mlruns" / "work" / "infer" / _key(ensemble, source, how, count)
    return [place for place in range(count) if not _file(work, place).exists()]


def make(ensemble: Ensemble, source: Source, how: How, shards: int, place: int) -> str:
    """Make one part, unless it is made, and leave joining to others; return its file."""
    parts = _cut(source.items, shards)
    file = _file(ROOT / "mlruns" / "work" / "infer" / _key(ensemble, source, how, len(parts)), place)
    if not file.exists():
        with tqdm(total=len(parts[place]), disable=True) as bar:
            _one(ensemble, parts[place], how, bar).save(file)
    return str(file)


def _cut(items: Sequence[Item], shards: int) -> list[Sequence[Item]]:
    count = min(len(items), shards) if shards else -(-len(items) // ROWS)
    edges = np.linspace(0, len(items), max(1, count) + 1).astype(int)
    return [items[low:high] for low, high in zip(edges[:-1], edges[1:], strict=True)]


def _file(work: Path, place: int) -> Path:
    return work / f"part-{place:05d}.parquet"


def _key(ensemble: Ensemble, source: Source, how: How, parts: int) -> str:
    files = []
    for item in source.items:
        stat = os.stat(item.path) if item.path.exists() else None
        files.append([item.name, item.sample_id, str(item.path), *((stat.st_size, stat.st_mtime_ns) if stat else ())])
    settings = (how.views, how.precision, how.early_exit)  # not the engine: every exact one gives the same
    return sha256_json([ensemble.model_sha, ensemble.name, ensemble.about, *settings, parts, files])[:20]


def _one(ensemble: Ensemble, items: Sequence[Item], how: How, bar: "tqdm[Any]") -> Predictions:
    """Predict one part; its file names and failures travel in `extra` until the parts are joined."""
    ids: dict[str, None] = {}
    rows: list[inference.Floats] = []
    files: list[tuple[str, str]] = []
    skipped: list[Skipped] = []
    for batch in inference.stream(ensemble, items, how, total=int((bar.total or 0) - bar.n)):
        fresh = []
        for place, item in enumerate(batch.items):
            files.append((item.name, item.sample_id))
            if item.sample_id not in ids:
                ids[item.sample_id] = None
                fresh.append(place)
        rows += [batch.values[fresh]] if fresh else []
        skipped += batch.skipped
        bar.update(len(batch.items) + len(batch.skipped))
    points = ensemble.task == "keypoints"
    empty = np.zeros((0, len(ensemble.classes), 2) if points else (0, len(ensemble.classes)), np.float32)
    return Predictions(
        sample_ids=np.array(list(ids), dtype=str),
        values=np.concatenate(rows) if rows else empty,
        classes=ensemble.classes,
        manifest_hash=ensemble.manifest_hash,
        member=ensemble.name,
        model_sha=ensemble.model_sha,
        views=how.views,
        seed=ensemble.seed,
        extra={"precision": how.precision, "early_exit": how.early_exit, "files": files, "skipped": skipped},
    )


def _join(parts: Sequence[Predictions], source: Source) -> Result:
    files = [(str(name), str(one)) for part in parts for name, one in part.extra["files"]]
    skipped = [Skipped(*entry) for part in parts for entry in part.extra["skipped"]]
    if not files:
        reasons = preview([f"{one.name} ({one.reason})" for one in skipped], 3)
        raise UserError(source.where, expected="at least one readable image", got=f"none: {reasons}")
    ids = np.concatenate([part.sample_ids for part in parts])
    values = np.concatenate([part.values for part in parts])
    _, first = np.unique(ids, return_index=True)  # one content may have fallen into two parts
    keep = np.sort(first)
    extra = {name: value for name, value in parts[0].extra.items() if name not in ("files", "skipped")}
    return Result(replace(parts[0], sample_ids=ids[keep], values=values[keep], extra=extra), files, skipped)


def rows(result: Result) -> Iterator[tuple[str, str, np.ndarray]]:
    """Walk the readable files with what was said of each: name, sample id, ``(K,)`` or ``(P, 2)`` values."""
    place = {name: row for row, name in enumerate(result.predictions.sample_ids.tolist())}
    for name, sample_id in result.files:
        yield name, sample_id, result.predictions.values[place[sample_id]]
