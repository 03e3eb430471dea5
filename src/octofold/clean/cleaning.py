"""Cleaning: what models, neighbours and duplicates say of each label becomes one ranked queue, with reasons.

Labels are never changed here: a queue is read, decisions go to the journal, prepare replays them.
"""

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold.clean import suspicion
from octofold.clean.evidence import Evidence, Near, of_classes, of_points
from octofold.clean.vectors import Embeddings
from octofold.data.journal import Entry, Journal
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import atomic
from octofold.nets.models import read_card
from octofold.predictions import Predictions
from octofold.track import registry

log = logging.getLogger("octofold")
Array = npt.NDArray[Any]
SHOWN = 6  # neighbours on the page
GUESSES = 5
VIEWS = "none"  # of the OOF: every slot stores it


@dataclass(frozen=True)
class Item:
    """One image of the queue.

    Attributes:
        sample_id, path, label: from the manifest (label "" for keypoints).
        score: suspicion in [0, 1.05]; above 0.5 something else is likelier than the label.
        flagged: worth a look.
        kinds: keys of `evidence.KINDS`. reasons: the same in words, strongest first.
        guesses: ``[(class, probability)]``, likeliest first; belief of models and neighbours together.
        neighbours: ``[(sample_id, cosine similarity)]``, nearest first.
    """

    sample_id: str
    path: str
    label: str
    score: float
    flagged: bool
    kinds: tuple[str, ...]
    reasons: tuple[str, ...]
    guesses: tuple[tuple[str, float], ...]
    neighbours: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Queue:
    """All images, the most doubtful first.

    Attributes:
        items: in order of review.
        notes: what the ranking is made of, and what was missing.
        guessed_points: ``{sample_id: (P, 2)}`` the models' points in pixels (keypoints only).
    """

    items: list[Item]
    notes: list[str]
    guessed_points: dict[str, Array] = field(default_factory=dict)

    @property
    def flagged(self) -> int:
        """How many are worth a look."""
        return sum(item.flagged for item in self.items)

    def write(self, path: Path) -> Path:
        """Write `table` as CSV, whole or not at all, and return the path."""
        with atomic(path) as temporary:
            self.table().to_csv(temporary, index=False, lineterminator="\n")
        return path

    def table(self) -> pd.DataFrame:
        """Columns ``rank, sample_id, path, label, suggestion, score, flagged, kinds, reasons``."""
        rows = [
            {
                "rank": rank,
                "sample_id": item.sample_id,
                "path": item.path,
                "label": item.label,
                "suggestion": item.guesses[0][0] if item.guesses else "",
                "score": round(item.score, 4),
                "flagged": item.flagged,
                "kinds": " ".join(item.kinds),
                "reasons": "; ".join(item.reasons),
            }
            for rank, item in enumerate(self.items, start=1)
        ]
        names = ["rank", "sample_id", "path", "label", "suggestion", "score", "flagged", "kinds", "reasons"]
        return pd.DataFrame(rows, columns=names)


def rank(
    manifest: Manifest,
    oof: Sequence[Predictions],
    embeddings: Embeddings | None = None,
    journal: Journal | None = None,
    limit: int = 0,
) -> Queue:
    """Rank the samples of a manifest by how doubtful their labels are.

    Args:
        manifest: with labels or points.
        oof: out-of-fold predictions, in any number of files (folds, seeds, members); matched by id and class name.
            Rows of samples that are gone are left out, samples without a row are judged by their neighbours alone.
        embeddings: one vector per image; None = no neighbours, no outliers.
        journal: decisions so far; one whose label has changed since brings its image back.
        limit: length of the queue; 0 = all.

    Raises:
        UserError: no labels, or predictions that are not out-of-fold or of another task.
    """
    if not manifest.is_labelled:
        raise UserError(manifest.file or "manifest", expected="labels to review", got="a table without labels (test?)")
    members, notes = _members(manifest, oof)
    near = _neighbours(manifest, embeddings, notes)
    evidence = (of_points if manifest.task == "keypoints" else of_classes)(manifest, members, near, notes)
    for sample_id, entry in _stale(journal, manifest).items():
        row = int(np.flatnonzero(manifest.sample_ids == sample_id)[0])
        text = f"{entry.reviewer or 'somebody'} judged it as '{entry.label}' before; the label has changed since"
        evidence.add(row, "stale", text, first=True)
    items = _items(manifest, evidence, near)
    return Queue(items[: limit or None], notes, evidence.guessed_points)


def find_oof(competition: str, files: Sequence[Path], stage: str) -> list[Predictions]:
    """Return the OOF to judge by: the files given, else of the members in `stage`, else of all that were trained.

    Experts for some classes are left out: what they say of the others means nothing.

    Raises:
        UserError: a file that is none, or two that speak of the same rows in the name of one member and seed.
    """
    if files:
        return _told_once(files)
    members = registry.resolve(competition, stage)
    if not members:
        members = registry.newest(competition)
        if members:
            log.info("no member stands in %s: the newest version of each slot speaks", stage)
    whole = {
        name: slots for name, slots in members.items() if not read_card(registry.fetch(slots[0])).recipe.get("classes")
    }
    found = [registry.oof(slot, VIEWS) for slots in whole.values() for slot in slots]
    return [oof for oof in found if oof is not None]


def _told_once(files: Sequence[Path]) -> list[Predictions]:
    loaded = [Predictions.load(file) for file in files]
    for place, one in enumerate(loaded):
        for before, other in enumerate(loaded[:place]):
            if (one.member, one.seed) == (other.member, other.seed):
                twice = np.intersect1d(one.sample_ids, other.sample_ids)
                if len(twice):
                    said = f"member '{one.member}', seed {one.seed} predicts {len(twice)} rows in {files[before]} too"
                    raise UserError(files[place], expected="each row once by a member and seed", got=said)
    return loaded


def undecided(journal: Journal, manifest: Manifest) -> set[str]:
    """Return the ids of samples that no standing decision speaks about."""
    done = set(journal.decisions()) - set(_stale(journal, manifest))
    return set(manifest.sample_ids.tolist()) - done


def _stale(journal: Journal | None, manifest: Manifest) -> dict[str, Entry]:
    """Decisions that judged a label the sample no longer has. A drop judges the image: never stale."""
    if journal is None or manifest.task != "classify":  # keypoints have no label to change
        return {}
    label = dict(zip(manifest.sample_ids.tolist(), manifest.table["label"].astype(str), strict=True))
    return {
        sample_id: entry
        for sample_id, entry in journal.decisions().items()
        if sample_id in label and is_stale(journal, entry, label[sample_id])
    }


def is_stale(journal: Journal, decision: Entry, label: str) -> bool:
    """Whether a standing decision judged another label than this; a relabel judged its old and its new one."""
    judged = journal.relabel_of(decision) or decision
    label = unicodedata.normalize("NFC", label)  # as a journal's are read; a manifest may be older than that
    return judged.action != "drop" and label not in (judged.label, judged.target or judged.label)


def _members(manifest: Manifest, oof: Sequence[Predictions]) -> tuple[dict[str, Array], list[str]]:
    """``{"lite0 seed 0": (N, K) or (N, P, 2)}``, NaN where a member has not spoken, and notes about the match."""
    place = {name: row for row, name in enumerate(manifest.sample_ids.tolist())}
    members: dict[str, Array] = {}
    notes = []
    for part in oof:
        where = f"predictions of member '{part.member}'"
        if not part.is_oof:
            fix = "give the OOF files that train wrote (oof/<views>.parquet)"
            raise UserError(where, expected="out-of-fold predictions", got="predictions without folds", fix=fix)
        if part.is_points != (manifest.task == "keypoints"):
            raise UserError(where, expected=manifest.task, got="points" if part.is_points else "classes")
        shared = [column for column, name in enumerate(part.classes) if name in manifest.classes]
        if not shared:
            raise UserError(where, expected=f"classes {preview(manifest.classes)}", got=preview(part.classes))
        target = [manifest.classes.index(part.classes[column]) for column in shared]
        name = part.member if part.seed is None else f"{part.member} seed {part.seed}"
        shape = (len(place), len(manifest.classes), *part.values.shape[2:])
        values = members.setdefault(name, np.full(shape, np.nan))
        known = [(row, place[one]) for row, one in enumerate(part.sample_ids.tolist()) if one in place]
        if known:
            source, goal = map(np.array, zip(*known, strict=True))
            values[goal] = np.nan if part.is_points else 0.0
            values[goal[:, None], target] = part.values[source][:, shared]
        if part.manifest_hash != manifest.hash:
            gone = len(part.sample_ids) - len(known)
            notes.append(
                f"{name}: trained on manifest {part.manifest_hash[:12]}, this one is {manifest.hash[:12]}; "
                f"{len(known)} samples are in both, {gone} are gone"
            )
    spoken = sum(np.isfinite(values).any(axis=tuple(range(1, values.ndim))) for values in members.values())
    silent = int((np.asarray(spoken) == 0).sum()) if members else len(place)
    names = ", ".join(sorted(members)) or "none yet: the ranking stands on the images alone; train, then clean again"
    notes.insert(0, f"models: {names}")
    if members and silent:
        notes.append(f"{silent} of {len(place)} samples have no out-of-fold prediction yet")
    return members, notes


def _neighbours(manifest: Manifest, embeddings: Embeddings | None, notes: list[str]) -> Near | None:
    if embeddings is None or len(manifest.table) == 0:
        notes.append("neighbours: no embedding")
        return None
    position = {name: row for row, name in enumerate(embeddings.sample_ids.tolist())}
    place = np.array([row for row, one in enumerate(manifest.sample_ids.tolist()) if one in position], np.int64)
    if len(place) < 2:
        notes.append("neighbours: no embedding of these images")
        return None
    mine = [position[one] for one in manifest.sample_ids[place].tolist()]
    unit = suspicion.normalise(embeddings.values[mine])
    rows, similarity = suspicion.nearest(unit)
    missing = len(manifest.table) - len(place)
    notes.append(f"neighbours: {len(place)} images" + (f", {missing} without an embedding" if missing else ""))
    return Near(place, unit, place[rows], similarity)


def _items(manifest: Manifest, evidence: Evidence, near: Near | None) -> list[Item]:
    ids, label = manifest.sample_ids.tolist(), manifest.table.get("label", pd.Series([""] * len(manifest.table)))
    around: dict[int, int] = {} if near is None else {row: place for place, row in enumerate(near.place.tolist())}
    stale = np.array(["stale" in kinds for kinds in evidence.kinds], bool)
    items = []
    for row in np.lexsort((ids, -evidence.score, ~evidence.flagged, ~stale)).tolist():
        guesses: list[tuple[str, float]] = []
        if evidence.belief is not None:
            best = np.argsort(-evidence.belief[row], kind="stable")[:GUESSES]
            guesses = [(manifest.classes[one], round(float(evidence.belief[row, one]), 4)) for one in best.tolist()]
        neighbours: list[tuple[str, float]] = []
        if near is not None and row in around:
            place = around[row]
            pairs = zip(near.rows[place][:SHOWN].tolist(), near.similarity[place][:SHOWN].tolist(), strict=True)
            neighbours = [(ids[other], round(similarity, 3)) for other, similarity in pairs]
        item = Item(
            ids[row], str(manifest.table["path"].iloc[row]), str(label.iloc[row]), float(evidence.score[row]),
            bool(evidence.flagged[row]), tuple(evidence.kinds[row]), tuple(evidence.reasons[row]),
            tuple(guesses), tuple(neighbours),
        )  # fmt: skip
        items.append(item)
    return items
