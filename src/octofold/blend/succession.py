"""Succession: the rule by which a new blend replaces the one in production, and the record of it.

A blend that only looks better is not: it takes the place only when the cross-fitted gain over the blend that stands
there, on the rows both predicted, leaves zero outside its 95 % interval; or when a person says so, which is recorded.
"""

import logging
from dataclasses import dataclass

import numpy as np

from octofold.blend import estimate
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.metrics import Metric
from octofold.predictions import Predictions
from octofold.track import tracking, versions

log = logging.getLogger("octofold")

FEWEST = 10
"""Groups that both blends predicted, at least: the resamples of fewer say too little of how sure a gain is."""


@dataclass(frozen=True)
class Decision:
    """What became of a new version.

    Attributes:
        moved: whether the alias now points at it.
        reason: in words, for people and for the version's tag.
        over: the version it was compared with, or None.
        gain: the paired comparison, or None where there was nothing to compare.
    """

    moved: bool
    reason: str
    over: int | None = None
    gain: estimate.Gain | None = None


def succeed(
    run: tracking.Run,
    name: str,
    version: int,
    stage: str,
    oof: Predictions,
    rows: Manifest,
    metric: Metric,
    force: bool = False,
    seed: int = 0,
) -> Decision:
    """Put a registered blend in a stage if it has earned it.

    Args:
        run: the new blend's run; keeps the decision.
        name: ``<competition>.blend``.
        version: the new one.
        stage: ``staging`` takes any; ``production`` asks for a separable gain over the version there,
            on at least `FEWEST` groups.
        oof: cross-fitted predictions of the new blend.
        rows: the samples behind `oof`, in its order (truth and groups).
        metric: what "better" means.
        force: move it anyhow.
        seed: of the bootstrap.
    """
    current = versions.registered_model(name).aliases.get(stage)
    over = int(current) if current not in (None, "") else None
    gain = None
    if over is None or over == version:
        moved, reason = True, f"nobody stood in {stage}"
    elif stage != "production":
        moved, reason = True, f"{stage} takes any blend"
    else:
        gain, reason = _gain(name, over, oof, rows, metric, seed)
        moved = gain is not None and gain.separable and gain.value > 0
    if force and not moved:
        moved, reason = True, f"forced: {reason}"
    if moved:
        versions.set_alias(name, stage, version)
        log.info("%s version %d is in %s (%s)", name, version, stage, reason)
    else:
        log.info("%s version %d does not replace version %s in %s: %s", name, version, over, stage, reason)
        log.info("--force puts it there anyhow; that is recorded")
    run.set_tags(
        {"succession.moved": str(moved).lower(), "succession.reason": reason, "succession.over": str(over or "")}
    )
    return Decision(moved, reason, over, gain)


def _gain(
    name: str, over: int, oof: Predictions, rows: Manifest, metric: Metric, seed: int
) -> tuple[estimate.Gain | None, str]:
    """Compare with the blend in place on the rows that both predicted without seeing them; what came of it in words."""
    label = f"version {over}"
    nothing = f"{label} has no out-of-fold predictions of these rows"
    stored = versions.existing_version(name, over)
    files = tracking.list_artifacts(stored.run_id, "oof")
    if not files:
        return None, nothing
    theirs = Predictions.load(tracking.download(stored.run_id, sorted(files)[0]))
    shared = np.isin(oof.sample_ids, theirs.sample_ids)
    if not shared.any() or set(theirs.classes) != set(oof.classes) or theirs.is_points != oof.is_points:
        return None, nothing
    if not np.array_equal(oof.sample_ids, rows.sample_ids):
        raise UserError(f"blend {name}", expected="out-of-fold rows in the manifest's order", got="another order")
    kept = rows.take(shared)
    count = len(np.unique(kept.groups))
    if count < FEWEST:
        return None, f"not separable from {label}: both predicted {count} of the same groups, and {FEWEST} are needed"
    mine = oof.values[shared]
    other = theirs.reorder(oof.classes).take(kept.sample_ids).values
    draws = estimate.bootstrap([mine, other], kept.target, kept.groups, metric, seed=seed)
    scores = (metric.score(mine, kept.target), metric.score(other, kept.target))
    found = estimate.gain(label, draws[0], draws[1], scores, metric)
    return found, str(found)
