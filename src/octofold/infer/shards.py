"""Shards: a big inference job cut into parts that are finished one by one, so that a broken job goes on.

A part is a Predictions file written whole. The folder of parts is named after everything the result depends on
(weights, views, precision, the files and their sizes), so another job never finds them. Several machines that
share the project folder may take one shard each; whoever finds all parts there joins them.

The bytes of the result do not depend on the number of parts: they are cut between batches, because the last bits of
a float depend on how many images share a pass, and each chooses its engine as for the whole job.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from octofold.config import log
from octofold.errors import UserError, preview
from octofold.files import ROOT, sha256_json
from octofold.infer import inference
from octofold.infer.ensemble import Ensemble
from octofold.infer.inference import How
from octofold.infer.looks import Item, Skipped, Source
from octofold.infer.passes import Floats
from octofold.predictions import Predictions

ROWS = 2048  # images a part when the number of shards is left to us: a minute or two of work on two cores


@dataclass(frozen=True)
class Result:
    """What a whole job found.

    Attributes:
        predictions: one row per distinct content.
        files: every file that could be read, as (name, sample id).
        skipped: every file that could not, or was not looked at, and why.
        work: the folder of the finished parts; `clear` removes it once the result is written.
    """

    predictions: Predictions
    files: list[tuple[str, str]]
    skipped: list[Skipped]
    work: Path


def clear(result: Result) -> None:
    """Remove the parts of a result that is written: until then they are all there is of the work."""
    shutil.rmtree(result.work, ignore_errors=True)  # another machine may be doing the same


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
        The joined result, or None: `shard` was given, and other parts are still missing, or another call has joined
        them and removed them since.

    Raises:
        UserError: no such shard, or not one readable image.
    """
    cut = plan(ensemble, source, how, shards)
    if shard is not None and not 0 <= shard < len(cut.parts):
        raise UserError("--shard", expected=f"a number in 0..{len(cut.parts) - 1}", got=str(shard))
    wanted = [shard] if shard is not None else list(range(len(cut.parts)))
    while True:
        _make_missing(ensemble, cut, how, wanted, progress)
        try:
            parts = [] if cut.missing() else [Predictions.load(cut.file(place)) for place in range(len(cut.parts))]
        except (UserError, OSError):
            if not cut.missing():
                raise
            parts = []
            log.warning("another call of this job has joined its parts and removed them")
        if parts:
            return _join(parts, source, cut.work)
        if shard is not None:
            return None
        # An equal command was done first and cleared the parts that we found: its result may lie elsewhere.


def _make_missing(ensemble: Ensemble, cut: "Plan", how: How, wanted: Sequence[int], progress: bool) -> None:
    missing = [place for place in cut.missing() if place in wanted]
    total = sum(len(cut.parts[place]) for place in wanted)
    done = total - sum(len(cut.parts[place]) for place in missing)
    with tqdm(total=total, initial=done, unit="img", disable=not progress, mininterval=1) as bar:
        for place in missing:
            make(ensemble, cut, how, place, bar)


@dataclass(frozen=True)
class Plan:
    """A job cut into parts: the images of each, and the folder where the finished ones lie."""

    parts: Sequence[Sequence[Item]]
    work: Path
    images: int

    def file(self, place: int) -> Path:
        """Return where a part is, or will be."""
        return self.work / f"part-{place:05d}.parquet"

    def missing(self) -> list[int]:
        """Return the numbers of the parts that nobody has made."""
        return [place for place in range(len(self.parts)) if not self.file(place).exists()]


def plan(ensemble: Ensemble, source: Source, how: How, shards: int = 0) -> Plan:
    """Cut a job between batches into `shards` parts (0 = one per 2048 images), no more than it has batches."""
    items = source.items
    batches = -(-len(items) // how.batch_size)
    count = max(1, min(batches, shards or -(-len(items) // ROWS)))
    edges = np.minimum(np.linspace(0, batches, count + 1).astype(int) * how.batch_size, len(items))
    parts = [items[low:high] for low, high in zip(edges[:-1], edges[1:], strict=True)]
    work = ROOT / "mlruns" / "work" / "infer" / _key(ensemble, source, how, count)
    return Plan(parts, work, len(items))


def make(ensemble: Ensemble, cut: Plan, how: How, place: int, bar: "tqdm[Any] | None" = None) -> str:
    """Make one part, unless it is made, and leave joining to others; return its file."""
    if not cut.file(place).exists():
        _one(ensemble, cut.parts[place], how, cut.images, bar).save(cut.file(place))
    return str(cut.file(place))


def _key(ensemble: Ensemble, source: Source, how: How, parts: int) -> str:
    files = []
    for item in source.items:
        stat = os.stat(item.path) if item.path.exists() else None
        files.append([item.name, item.sample_id, str(item.path), *((stat.st_size, stat.st_mtime_ns) if stat else ())])
    # How often a voice speaks counts too: `model_sha` names a set of weights.
    bags = sorted(
        [member, ensemble.voices[place].card.model_sha, share]
        for member, shares in ensemble.bags.items()
        for place, share in shares
    )
    said = [ensemble.model_sha, ensemble.name, ensemble.about, ensemble.classes, bags]
    settings = [how.views, how.precision, how.early_exit, how.batch_size]  # any exact engine gives the same
    return sha256_json([*said, *settings, parts, files])[:20]


def _one(ensemble: Ensemble, items: Sequence[Item], how: How, total: int, bar: "tqdm[Any] | None") -> Predictions:
    """Predict one part; its file names and failures travel in `extra` until the parts are joined."""
    ids: dict[str, None] = {}
    rows: list[Floats] = []
    files: list[tuple[str, str]] = []
    skipped: list[Skipped] = []
    for batch in inference.stream(ensemble, items, how, total):
        fresh = []
        for place, item in enumerate(batch.items):
            files.append((item.name, item.sample_id))
            if item.sample_id not in ids:
                ids[item.sample_id] = None
                fresh.append(place)
        rows += [batch.values[fresh]] if fresh else []
        skipped += batch.skipped
        if bar is not None:
            bar.update(len(batch.items) + len(batch.skipped))
    about = {"precision": how.precision, "early_exit": how.early_exit, "trained_on": ensemble.trained_on}
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
        extra={**about, "files": files, "skipped": skipped},
    )


def _join(parts: Sequence[Predictions], source: Source, work: Path) -> Result:
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
    said = replace(parts[0], sample_ids=ids[keep], values=values[keep], extra=extra)
    return Result(said, files, [*skipped, *source.left_out], work)


def rows(result: Result) -> Iterator[tuple[str, str, np.ndarray]]:
    """Walk the readable files with what was said of each: name, sample id, ``(K,)`` or ``(P, 2)`` values."""
    place = {name: row for row, name in enumerate(result.predictions.sample_ids.tolist())}
    for name, sample_id in result.files:
        yield name, sample_id, result.predictions.values[place[sample_id]]
