"""Probing: is one idea better than another? Same folds, same seeds, paired rows, and "not separable" when it is not."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from octofold import config, plots
from octofold.blend import estimate
from octofold.commands import Probe, Train
from octofold.data import manifest
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import existing
from octofold.metrics import METRICS
from octofold.nets.tasks import make_task
from octofold.predictions import Predictions, concatenate
from octofold.recipe import Recipe
from octofold.track import registry, tracking
from octofold.train import harden, members
from octofold.train.training import metric_of

log = logging.getLogger("octofold")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Finding:
    """One arm beside the first.

    Attributes:
        arm: its member name.
        score: mean over seeds of its OOF score.
        gain: how much better than the first arm, positive = better whatever the metric's direction; low and high: its
            interval, which holds for all arms together with 95 %.
        seed_spread: standard deviation of the gain over seeds; NaN with one seed.
        chance: share of resamples in which it is ahead.
        verdict: ``better``, ``worse`` or ``not separable``; the first arm's is ``reference``.
    """

    arm: str
    score: float
    gain: float
    low: float
    high: float
    seed_spread: float
    chance: float
    verdict: str


def probe(settings: Probe) -> dict[str, Any]:
    """Train every arm as a member, compare their OOF, log table, chart and verdicts.

    Returns:
        ``run_id``, ``metric`` and, for each arm, score, gain, interval and verdict.

    Raises:
        UserError: nothing to compare, or whatever training raises.
    """
    table = manifest.read(settings.manifest)
    base = Recipe(**{name: getattr(settings, name) for name in Recipe.model_fields})
    recipes = arms(base, settings.field, settings.values, settings.others)
    metric = metric_of(base, make_task(table.task, table.classes, table.info.get("swap")))
    title = (
        f"{settings.field}: {', '.join(settings.values)}" if settings.field else " / ".join(a.member for a in recipes)
    )
    with tracking.run("probe", settings, table.competition, title[:200]) as run:
        oofs = {arm.member: train_arm(arm, settings.manifest, table.competition) for arm in recipes}
        wanted = [harden.wanted_rows(arm.classes, table.target, table.classes) for arm in recipes]
        findings = compare(oofs, table, metric, settings.probe_seed, np.logical_and.reduce(wanted))
        text = summary(findings, metric, len(base.seeds))
        log.info("%s", text)
        _log(run, findings, metric, text)
    shown = ("score", "gain", "low", "high", "verdict")
    return {
        "run_id": run.id,
        "metric": metric,
        "arms": {finding.arm: {name: getattr(finding, name) for name in shown} for finding in findings},
    }


def train_arm(arm: Recipe, path: Path, competition: str) -> dict[int, Predictions]:
    """Train an arm (or find it trained) and return its OOF by training seed."""
    plain = {name: getattr(arm, name) for name in Recipe.model_fields}
    filled = members.train(Train(**plain, manifest=path))["slots"]
    known = registry.slots(competition, [arm.member]).get(arm.member, {})
    slots = [slot for versions in known.values() for slot in versions if f"{slot.name}/{slot.version}" in filled]
    parts: dict[int, list[Predictions]] = {}
    for slot in slots:
        oof = registry.oof(slot, arm.tta)
        if oof is not None:
            parts.setdefault(int(slot.seed), []).append(oof)
    return {seed: concatenate(found) for seed, found in parts.items()}


def _log(run: tracking.Run, findings: Sequence[Finding], metric: str, text: str) -> None:
    rest = findings[1:]
    for finding in findings:
        run.log_metrics({f"{finding.arm}/{metric}": finding.score, f"{finding.arm}/gain": finding.gain})
    run.log_text(pd.DataFrame([vars(finding) for finding in findings]).to_csv(index=False), "probe.csv")
    run.log_text(text + "\n", "verdict.txt")
    chart = plots.intervals(
        [f"{finding.arm}  ({finding.verdict})" for finding in rest],
        [(finding.low, finding.gain, finding.high) for finding in rest],
        title=f"gain over {findings[0].arm} ({metric} {findings[0].score:.4g})",
        label="paired difference; right of 0 is better",
    )
    run.log_figure(chart, "probe.png")
    run.set_tags({f"verdict.{finding.arm}": finding.verdict for finding in rest})


def arms(base: Recipe, field: str, values: Sequence[str], others: Sequence[Any]) -> list[Recipe]:
    """Return the recipes to compare, the reference first, on the base's folds and seeds.

    Args:
        base: the recipe varied, or the reference.
        field: dotted recipe field (``augment.preset``, ``phases.0.lr``), or "" to compare whole recipes.
        values: at least two values of `field`, as text.
        others: YAML files of recipes to set beside `base`.

    Raises:
        UserError: nothing to compare, an unknown field or value, or two arms of one name.
    """
    if bool(field) == bool(others) or (field and len(values) < 2):
        raise UserError(
            "probe",
            expected="--field NAME --values A,B (one recipe varied), or --others recipe.yaml (recipes compared)",
            got=f"field '{field}', {len(values)} values, {len(others)} others",
        )
    if field:
        found = [_varied(base, field, value) for value in values]
    else:
        paths = [existing(path, "a recipe (YAML)") for path in others]
        found = [base, *(config.build(Recipe, config.read_yaml(path), path) for path in paths)]
        found = [arm.model_copy(update={"folds": base.folds, "seeds": base.seeds, "tta": base.tta}) for arm in found]
    for arm in found:
        if arm.overfit:
            expected = "overfit: 0, since nothing is compared on rows trained on"
            raise UserError(f"probe: {arm.member}", expected=expected, got=str(arm.overfit))
    names = [arm.member for arm in found]
    if len(set(names)) < len(names):
        raise UserError("probe", expected="arms with different member names", got=preview(names, 12))
    return found


def _varied(base: Recipe, field: str, text: str) -> Recipe:
    """The recipe with one field at another value, called ``<member>-<value>``."""
    plain = base.model_dump(mode="json")
    inner: Any = plain
    *path, last = field.split(".")
    try:
        for name in path:
            inner = inner[int(name)] if isinstance(inner, list) else inner[name]
        known = isinstance(inner, dict) and last in inner
    except (KeyError, IndexError, ValueError, TypeError):
        known = False
    if not known:
        raise UserError(
            f"--field {field}", expected="a field of the recipe, such as augment.preset", got="no such field"
        )
    inner[last] = None if text == "null" else json.loads(text) if text[:1] in ("[", "{") else text
    slug = re.sub(r"[^A-Za-z0-9_\-]+", "_", text).strip("_") or "empty"
    plain["member"] = f"{base.member[: 59 - len(slug[:40])]}-{slug[:40]}"
    return config.build(Recipe, plain, f"--field {field} --values {text}")


def compare(
    oofs: Mapping[str, Mapping[int, Predictions]],
    table: Manifest,
    metric: str,
    seed: int = 0,
    wanted: npt.NDArray[np.bool_] | None = None,
) -> list[Finding]:
    """Compare arms on the rows all of them predicted out of fold.

    Rows are resampled in whole groups, the same for every arm, and scores averaged over training seeds. The interval is
    the resamples' own: where every fortieth of them shows no gain, as with one to three differing rows, there is none.
    With several seeds it is widened by the spread of the paired gain over them (Student's t). With more than two arms
    the intervals are Bonferroni's, so that "better" is not the luck of having looked often.

    Args:
        oofs: OOF by arm and training seed; the first arm is the reference. Every arm has the same seeds and rows.
        table: holds the truth and the groups.
        metric: row of `metrics.METRICS`.
        seed: of the resampling.
        wanted: ``(N,)`` the rows every arm is for, where some are for a few classes only (pair experts).

    Raises:
        UserError: arms that differ in seeds or rows, or not one row that all are for.
    """
    names = list(oofs)
    seeds = sorted(oofs[names[0]])
    values, target, groups = _aligned(oofs, table, seeds, np.ones(len(table.table), bool) if wanted is None else wanted)
    measure = METRICS[metric]
    sign = 1 if measure.higher_is_better else -1
    draws = estimate.bootstrap(values, target, groups, measure, seed=seed).reshape(len(names), len(seeds), -1)
    scores = np.array([measure.score(one, target) for one in values]).reshape(len(names), len(seeds))
    tail = 0.025 / max(1, len(names) - 1)
    found = [Finding(names[0], float(scores[0].mean()), 0.0, 0.0, 0.0, float("nan"), 0.5, "reference")]
    for arm in range(1, len(names)):
        paired = sign * (draws[arm] - draws[0]).mean(axis=0)  # (R,)
        paired = paired[np.isfinite(paired)]  # rows of one group have none, nor has a resample without some class
        gains = sign * (scores[arm] - scores[0])  # (S,)
        spread = float(gains.std(ddof=1)) if len(seeds) > 1 else float("nan")
        # Few seeds tell their own spread badly: Student's t, at the tail the interval has for all its looks.
        wide = float(stats.t.ppf(1 - tail, len(seeds) - 1)) if len(seeds) > 1 else 0.0
        extra = wide * spread / np.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
        gain = float(gains.mean())
        # Not re-centred on the gain: where few rows differ, an end is exactly 0, and by chance it would be beside it.
        ends = np.quantile(paired, [tail, 1 - tail]) if len(paired) else (np.nan, np.nan)
        low, high = gain - float(np.hypot(gain - ends[0], extra)), gain + float(np.hypot(ends[1] - gain, extra))
        chance = estimate.chance(paired)
        verdict = "better" if low > 0 else "worse" if high < 0 else "not separable"
        found.append(Finding(names[arm], float(scores[arm].mean()), gain, low, high, spread, chance, verdict))
    return found


def _aligned(
    oofs: Mapping[str, Mapping[int, Predictions]],
    table: Manifest,
    seeds: Sequence[int],
    wanted: npt.NDArray[np.bool_],
) -> tuple[list[Array], Array, Array]:
    """Values of every arm and seed on the same rows, arm by arm; the truth and groups of those rows."""
    names = list(oofs)
    first = oofs[names[0]][seeds[0]]
    values = []
    for name in names:
        if sorted(oofs[name]) != list(seeds):
            raise UserError(f"arm '{name}'", expected=f"seeds {list(seeds)}", got=str(sorted(oofs[name])))
        for training_seed in seeds:
            oof = oofs[name][training_seed]
            if set(oof.sample_ids.tolist()) != set(first.sample_ids.tolist()):
                raise UserError(f"arm '{name}'", expected="the same held-out rows as the first arm", got="others")
            values.append(oof.reorder(table.classes).take(first.sample_ids).values)
    place = {name: row for row, name in enumerate(table.sample_ids.tolist())}
    rows = np.array([place[name] for name in first.sample_ids.tolist()])
    kept = wanted[rows]
    if not kept.any():
        raise UserError("probe", expected="held-out rows of classes that every arm trains on", got="none")
    rows = rows[kept]
    return [part[kept] for part in values], table.target[rows], table.groups[rows]


def summary(findings: Sequence[Finding], metric: str, seeds: int) -> str:
    """Say in a few lines what was found."""
    reference = findings[0]
    width = max(len(finding.arm) for finding in findings)
    lines = [f"{reference.arm:<{width}}  {metric} {reference.score:.4f}  (reference)"]
    for finding in findings[1:]:
        lines.append(
            f"{finding.arm:<{width}}  {metric} {finding.score:.4f}  gain {finding.gain:+.4f} "
            f"[{finding.low:+.4f}, {finding.high:+.4f}]  {finding.verdict}"
        )
    if seeds == 1:
        lines.append("one seed: the luck of a training is not in these intervals; add --seeds 0,1,2")
    return "\n".join(lines)
