"""Worth: did cleaning help? The same recipe, folds and seeds on the old and the new manifest, judged on trusted rows.

Which rows decide is half of the answer. Scored on the new labels of the rows that changed, the new manifest wins by
construction; so the headline is taken over rows whose label and fold nobody touched. The rows a reviewer looked at
(kept or relabelled, truth = the decision) are a second answer: what the cleaned training is worth on the hard ones.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.commands import Worth
from octofold.data import manifest as manifests
from octofold.data.journal import Journal
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import existing
from octofold.nets.tasks import make_task
from octofold.predictions import Predictions
from octofold.recipe import Recipe
from octofold.track import tracking
from octofold.train.training import metric_of
from octofold.tune import probing
from octofold.tune.probing import Finding

log = logging.getLogger("octofold")
LEAST = 20  # trusted rows below which nothing is said


def worth(settings: Worth) -> dict[str, Any]:
    """Train both (or find them trained), compare on each set of trusted rows, log and return the verdicts.

    Raises:
        UserError: manifests that are not two versions of one, or too few rows in common.
    """
    new = manifests.read(settings.manifest)
    old = manifests.read(previous(new, settings.old))
    journal = Journal(settings.journal or settings.manifest.with_name("decisions.jsonl"))
    rows = trusted_rows(old, new, journal)
    recipe = Recipe(**{name: getattr(settings, name) for name in Recipe.model_fields})
    metric = metric_of(recipe, make_task(new.task, new.classes, new.info.get("swap")))
    name = f"worth {old.hash[:8]} to {new.hash[:8]}"
    with tracking.run("worth", settings, new.competition, name, {"manifest_hash": new.hash}) as run:
        arms = {
            "old": probing.train_arm(recipe, old.file or settings.manifest, new.competition),
            "new": probing.train_arm(recipe, settings.manifest, new.competition),
        }
        answers = {
            kind: judge(arms, new.take(mask), metric, settings.worth_seed)
            for kind, mask in rows.items()
            if mask.sum() >= LEAST
        }
        if "untouched" not in answers:
            raise UserError("worth", expected=f"at least {LEAST} untouched rows held out by both", got="fewer")
        changed = {"old_samples": len(old.table), "new_samples": len(new.table), **_changes(old, new)}
        for kind, finding in answers.items():
            log.info("%s", say(kind, finding, metric))
            run.log_metrics({f"worth/{kind}/gain": finding.gain, f"worth/{kind}/rows": int(rows[kind].sum())})
        run.log_dict({**changed, **{kind: vars(finding) for kind, finding in answers.items()}}, "worth.json")
    return {
        "run_id": run.id, "metric": metric, **changed,
        **{kind: {"rows": int(rows[kind].sum()), **_shown(finding)} for kind, finding in answers.items()},
    }  # fmt: skip


def _shown(finding: Finding) -> dict[str, Any]:
    return {name: getattr(finding, name) for name in ("score", "gain", "low", "high", "verdict")}


def previous(new: Manifest, given: Path | None) -> Path:
    """Return the path of the manifest before: the one given, else the version that prepare kept when it wrote `new`.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        return existing(given, "the manifest before (CSV)")
    folder = (new.file or Path()).parent
    kept = str(new.info.get("previous", ""))
    path = folder / "versions" / kept / "manifest.csv"
    if not kept or not path.exists():
        raise UserError(
            new.file or "manifest",
            expected="a manifest that replaced another (prepare --decisions keeps the one before)",
            got="no version before it",
            fix="name the old one with --old",
        )
    return path


def trusted_rows(old: Manifest, new: Manifest, journal: Journal) -> dict[str, npt.NDArray[np.bool_]]:
    """Choose the rows of `new` that both manifests may be scored on.

    Returns:
        ``{"untouched": mask, "reviewed": mask}`` over the rows of `new`, all of them in both manifests with one fold.
        untouched: one label (or the same points) in both. reviewed: a person kept or relabelled them, and the label
        here is that decision's (points: kept, and the same in both).

    Raises:
        UserError: other tasks, classes or competitions.
    """
    if (old.task, old.competition, set(old.classes)) != (new.task, new.competition, set(new.classes)):
        raise UserError(
            "worth",
            expected="two versions of one manifest",
            got=f"{old.competition}/{old.task} and {new.competition}/{new.task}, "
            f"classes {preview(set(old.classes) ^ set(new.classes)) or 'the same'}",
        )
    place = {name: row for row, name in enumerate(old.sample_ids.tolist())}
    before = np.array([place.get(name, -1) for name in new.sample_ids.tolist()], np.int64)
    both = before >= 0
    both[both] = old.fold[before[both]] == new.fold[both]
    agreed = both.copy()
    theirs, ours = (np.array([_truth(one, row) for row in range(len(one.table))], object) for one in (old, new))
    agreed[both] = theirs[before[both]] == ours[both]
    decisions = journal.decisions()
    verdicts = {one: entry.target or entry.label for one, entry in decisions.items() if entry.action != "drop"}
    names = new.sample_ids.tolist()
    if new.task == "classify":
        reviewed = both & np.array([verdicts.get(name) == truth for name, truth in zip(names, ours, strict=True)], bool)
    else:  # a decision on points says that they are right, not which they are
        reviewed = agreed & np.array([name in verdicts for name in names], bool)
    return {"untouched": agreed, "reviewed": reviewed}


def _truth(manifest: Manifest, row: int) -> str:
    if manifest.task == "classify":
        return str(manifest.table["label"].iloc[row])
    return str(np.round(manifest.target[row], 3).tolist())


def _changes(old: Manifest, new: Manifest) -> dict[str, int]:
    was = {name: _truth(old, row) for row, name in enumerate(old.sample_ids.tolist())}
    now = {name: _truth(new, row) for row, name in enumerate(new.sample_ids.tolist())}
    relabelled = sum(was[name] != now[name] for name in was.keys() & now.keys())
    return {"relabelled": relabelled, "dropped": len(was.keys() - now.keys()), "added": len(now.keys() - was.keys())}


def judge(arms: Mapping[str, Mapping[int, Predictions]], rows: Manifest, metric: str, seed: int) -> Finding:
    """Return the finding of ``new`` against ``old`` on these rows: paired difference and its interval.

    Args:
        arms: OOF of both by training seed; the rows that not all of them held out are left out.
        rows: trusted rows, with the truth.
        metric: row of `metrics.METRICS`.
        seed: of the resampling.

    Raises:
        UserError: no row was held out by both.
    """
    held = [set(oof.sample_ids.tolist()) for seeds in arms.values() for oof in seeds.values()]
    shared = [name for name in rows.sample_ids.tolist() if all(name in ids for ids in held)]
    if not shared:
        raise UserError("worth", expected="trusted rows held out by both trainings", got="none", fix="more --folds")
    cut = {
        name: {one: dataclasses.replace(oof, manifest_hash=rows.hash).take(shared) for one, oof in seeds.items()}
        for name, seeds in arms.items()
    }
    return probing.compare(cut, rows, metric, seed)[1]


def say(kind: str, finding: Finding, metric: str) -> str:
    """Put a finding into one line."""
    return (
        f"{kind} rows: {metric} {finding.score:.4f} on the new manifest, gain {finding.gain:+.4f} "
        f"[{finding.low:+.4f}, {finding.high:+.4f}]: {finding.verdict}"
    )
