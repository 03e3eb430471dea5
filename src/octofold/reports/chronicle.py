"""Chronicle: what was trained, blended, tuned and scored in a competition, read back from MLflow as plain records."""

import ast
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from typing import Any

import numpy as np

from octofold.blend.estimate import Gain, Interval
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.predictions import Predictions, average, concatenate
from octofold.track import registry, tracking
from octofold.track.registry import Slot
from octofold.tta import NESTED


@dataclass(frozen=True)
class Member:
    """A registered member, as it stands in its stage.

    Attributes:
        name: recipe name.
        slots: per fold and seed the version in production, else in staging, else the newest.
        stage: ``production``, ``staging`` or empty.
        oof: aligned to the manifest, seeds averaged; None if folds, rows or views are missing.
        missing: why `oof` is None.
        when: start of the newest training run of these slots, or None.
        settings: recipe fields of that run, as text.
    """

    name: str
    slots: list[Slot]
    stage: str
    oof: Predictions | None
    missing: str = ""
    when: datetime | None = None
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def is_expert(self) -> bool:
        """Whether it was trained on some classes only: its probabilities of the others say nothing."""
        return bool(self.only)

    @property
    def only(self) -> str:
        """The classes it was trained on, in words, where they are not all."""
        named = self.settings.get("classes", "").strip("[]")
        return f"an expert for {named}" if named else ""


@dataclass(frozen=True)
class Blended:
    """A finished run of `blend`.

    Attributes:
        numbers: its metrics by MLflow name, ``estimate/low`` and the recorded scores among them.
    """

    run: str
    when: datetime
    method: str
    views: str
    manifest_hash: str
    numbers: dict[str, float]
    tags: dict[str, str]
    settings: dict[str, str]

    def number(self, *names: str) -> float:
        """The first of these metrics that the run has, or NaN."""
        return next((self.numbers[name] for name in names if name in self.numbers), float("nan"))

    def is_judged_by(self, sha256: str) -> bool:
        """Whether its numbers are of this text of the user's own metric; of one of ours (no sha256) they always are."""
        return not sha256 or self.tags.get("metric.sha256") == sha256

    def cross_fitted(self, metric: str, sha256: str = "") -> Interval:
        """Its score of the training rows as logged; NaN in another metric, or another text of the user's own."""
        if not self.is_judged_by(sha256):
            return Interval(math.nan, math.nan, math.nan)
        return Interval(*(self.number(f"oof/{metric}{end}") for end in ("", "_low", "_high")))

    def expected(self, metric: str, sha256: str = "") -> dict[str, float]:
        """What the blend expected of the test images in a metric; no interval where it was judged by another.

        NaN where it only said again how it did on the training images, or used another text of the user's own metric.
        """
        if self.tags.get("estimate.of") == "oof" or not self.is_judged_by(sha256):
            return dict.fromkeys(("estimate", "estimate/low", "estimate/high", "folds_flatter"), math.nan)
        ends = ("estimate/low", "estimate/high") if self.tags.get("metric", metric) == metric else ("", "")
        low, high = (self.number(end) for end in ends)
        return {
            "estimate": self.number(f"estimate/{metric}"),
            "estimate/low": low,
            "estimate/high": high,
            "folds_flatter": self.number("shift/folds_flatter"),
        }


@dataclass(frozen=True)
class Tuned:
    """A finished study."""

    run: str
    when: datetime
    study: str
    verdict: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Probed:
    """One arm of a probe beside its reference."""

    run: str
    arm: str
    gain: Gain


def members(competition: str, manifest: Manifest, views: str) -> list[Member]:
    """Return every registered member, those in production first.

    Args:
        competition: name of the problem.
        manifest: rows and truth; members of another data version get no `oof`.
        views: preferred view set of the OOF; members that did not store it get none.
    """
    slots = registry.newest(competition)
    standing: dict[str, str] = {}
    for stage in ("staging", "production"):  # what stands there is what is blended, whatever was trained since
        placed = registry.resolve(competition, stage)
        standing |= dict.fromkeys(placed, stage)
        slots |= placed
    parents = {run.id: run for run in tracking.find_runs(competition, {"entry": "train"})}
    children = tracking.find_runs(competition, {"entry": "train.slot"}) if parents else []
    above = {child.id: child.tags.get("mlflow.parentRunId", "") for child in children}
    found = []
    for name, own in slots.items():
        oof, missing = _oof(own, manifest, views, standing.get(name, ""))
        run = _training(own, above, parents)
        found.append(
            Member(
                name,
                own,
                standing.get(name, ""),
                oof,
                missing,
                _time(run.start_time) if run else None,
                _settings(run.params) if run else {},
            )
        )
    order = {"production": 0, "staging": 1, "": 2}
    return sorted(found, key=lambda member: (order[member.stage], member.name))


def _training(
    slots: Sequence[Slot], above: dict[str, str], parents: dict[str, tracking.RunInfo]
) -> tracking.RunInfo | None:
    """The newest run of train that made one of these very slots; None where they were imported."""
    made = {above.get(slot.run_id, "") for slot in slots}
    return max((parents[one] for one in made if one in parents), key=lambda run: run.start_time, default=None)


def common_views(competition: str, preferred: str) -> str:
    """Return `preferred` if given, else the richest view set that any slot stored."""
    if preferred:
        return preferred
    stored: set[str] = set()
    for slots in registry.newest(competition).values():
        if slots[0].run_id:
            listed = tracking.list_artifacts(slots[0].run_id, "oof")
            stored |= {path.rpartition("/")[2].removesuffix(".parquet") for path in listed}
    return next((views for views in reversed(NESTED) if views in stored), "none")


def _oof(slots: Sequence[Slot], manifest: Manifest, views: str, stage: str = "") -> tuple[Predictions | None, str]:
    if any(slot.manifest_hash != manifest.hash for slot in slots):
        return None, "another data version"
    lacking = sorted(set(manifest.folds) - {slot.fold for slot in slots})
    if lacking:
        return None, f"fold {', '.join(map(str, lacking))} not {f'in {stage}' if stage else 'trained'}"
    by_seed: dict[int, list[Predictions]] = {}
    for slot in slots:
        part = registry.oof(slot, views)
        if part is None:
            return None, f"no OOF with views {views}"
        by_seed.setdefault(slot.seed, []).append(part)
    whole = [concatenate(parts) for parts in by_seed.values() if len(parts) == len(manifest.folds)]
    if not whole:
        return None, "no seed has all folds"
    try:
        return average(whole).reorder(manifest.classes).take(manifest.sample_ids), ""
    except UserError as error:
        return None, str(error).splitlines()[0]


def blends(competition: str) -> list[Blended]:
    """Return the finished blends, oldest first."""
    found = tracking.find_runs(competition, {"entry": "blend"}, ("FINISHED",))
    return [
        Blended(
            run.id,
            _time(run.start_time),
            run.tags.get("method", ""),
            run.tags.get("views", ""),
            run.tags.get("manifest_hash", ""),
            run.metrics,
            run.tags,
            _settings(run.params),
        )
        for run in sorted(found, key=lambda run: run.start_time)
    ]


def blend_oof(blended: Blended, manifest: Manifest) -> Predictions | None:
    """Return a blend's cross-fitted predictions of the manifest's rows, or None if they are of other rows."""
    if blended.manifest_hash != manifest.hash:
        return None
    paths = sorted(tracking.list_artifacts(blended.run, "oof"))
    if not paths:
        return None
    oof = Predictions.load(tracking.download(blended.run, paths[0])).reorder(manifest.classes)
    known = np.isin(manifest.sample_ids, oof.sample_ids)
    return oof.take(manifest.sample_ids) if known.all() else None


def blend_text(blended: Blended, name: str) -> str:
    """Return a text artifact of a blend's run, or nothing where it was deleted."""
    try:
        return tracking.download(blended.run, name).read_text(encoding="utf-8")
    except UserError:
        return ""


def blend_weights(blended: Blended) -> dict[str, float]:
    """Return member -> weight."""
    text = blend_text(blended, "blend_weights.json")
    plain: dict[str, Any] = json.loads(text) if text else {}
    return dict(zip(plain.get("members", []), map(float, plain.get("weights", [])), strict=False))


def blended_members(blended: Blended, manifest: Manifest, members: Sequence[Member]) -> dict[str, Predictions]:
    """Return the OOF of the versions a blend was made of, pair experts aside; nothing if any cannot be had.

    Args:
        blended: its run names the versions; members may have been trained or promoted since.
        manifest: rows of the OOF.
        members: as they stand; those that stood so when they were blended are not read again.
    """
    texts = [blend_text(blended, name) for name in ("blend_weights.json", "models.json")]
    if not all(texts):
        return {}
    plain, pins = map(json.loads, texts)
    standing = {frozenset((slot.name, slot.version) for slot in member.slots): member.oof for member in members}
    found: dict[str, Predictions] = {}
    for name in plain.get("members", [])[: plain.get("params", {}).get("voters")]:
        own = [_pinned(pin) for pin in pins if pin["member"] == name]
        oof = standing.get(frozenset((slot.name, slot.version) for slot in own))
        if oof is None:
            oof, _ = _oof(own, manifest, blended.views)
        if oof is None:
            return {}
        found[name] = oof
    return found


def _pinned(pin: dict[str, Any]) -> Slot:
    """The slot that a blend's ``models.json`` names, as far as its OOF needs it."""
    return Slot(
        "", pin["member"], pin["fold"], pin["seed"], pin["name"], pin["version"], pin["run_id"], pin["manifest_hash"],
        "", pin["sha256"],
    )  # fmt: skip


def studies(competition: str) -> list[Tuned]:
    """Return the finished tuning runs, oldest first."""
    found = tracking.find_runs(competition, {"entry": "tune"}, ("FINISHED",))
    return [
        Tuned(run.id, _time(run.start_time), run.tags.get("study", ""), run.tags.get("verdict", ""), run.metrics)
        for run in sorted(found, key=lambda run: run.start_time)
    ]


def probes(competition: str) -> list[Probed]:
    """Return what probes found of each arm beside their first, oldest first."""
    found = []
    for run in reversed(tracking.find_runs(competition, {"entry": "probe"}, ("FINISHED",))):
        try:
            text = tracking.download(run.id, "probe.csv").read_text(encoding="utf-8")
        except UserError:
            continue  # its artifacts were deleted
        first, *rest = list(csv.DictReader(io.StringIO(text)))
        for row in rest:
            numbers = [float(row[key]) for key in ("gain", "low", "high", "chance")]
            found.append(Probed(run.id, row["arm"], Gain(first["arm"], *numbers)))
    return found


def experiments(members: Sequence[Member]) -> list[tuple[str, str, str]]:
    """Pairs of members whose recipes differ in at most three fields, and those fields: experiments, as it were."""
    found = []
    for one, other in combinations(members, 2):
        mine, theirs = _fields(one.settings), _fields(other.settings)
        odd = sorted(key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key])
        if odd and len(odd) <= 3:  # a field that only one of them has came with newer code, at its default
            said = ", ".join(f"{key} {mine[key]} for {theirs[key]}" for key in odd)
            found.append((one.name, other.name, said))
    return found


def _fields(settings: dict[str, str]) -> dict[str, str]:
    """The recipe fields among a run's params, each phase's under its own name: ``phases.0.epochs``."""
    if not settings:  # nothing is known of an imported member, not even how many phases it had
        return {}
    aside = ("member", "config", "manifest", "folds", "seeds", "stage", "restart", "executor", "parallel", "tta")
    kept = {key: text for key, text in settings.items() if key.split(".")[0] not in (*aside, "runtime")}
    try:
        phases = ast.literal_eval(kept.pop("phases", "[]"))
    except (SyntaxError, ValueError):  # cut off by MLflow at 6000 characters
        return kept
    for place, phase in enumerate(phases):
        kept |= {f"phases.{place}.{key}": str(value) for key, value in phase.items()}
    return kept | {"phases": str(len(phases))}


def _settings(params: dict[str, str]) -> dict[str, str]:
    return {key.removeprefix("cfg."): value for key, value in params.items() if key.startswith("cfg.")}


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000).astimezone()
