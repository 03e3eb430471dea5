"""The page: a competition's facts turned into the numbers of each section. What they look like is `report.html`'s."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold.blend import estimate, shakeup
from octofold.blend.blending import METHODS
from octofold.blend.estimate import Gain, Interval
from octofold.data.manifest import Manifest
from octofold.metrics import Metric
from octofold.reports import axes
from octofold.reports.chronicle import Blended, Member, Probed, Tuned, experiments
from octofold.reports.mistakes import calibration, confusions
from octofold.reports.scores import Score, rank_correlation
from octofold.track.provenance import git_tags

Array = npt.NDArray[Any]
REPS = 1000
BLEND = "newest blend"
"""Its name among the members; none of them can hold a space."""
MOST = 40
"""Rows of any list; the rest is counted."""


@dataclass
class Line:
    """One row of the leaderboard."""

    name: str
    kind: str  # blend | member
    score: Interval | None
    stage: str = ""
    weight: float | None = None
    slots: str = ""
    when: datetime | None = None
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)


@dataclass
class Facts:
    """What the page is made of."""

    competition: str
    manifest: Manifest
    metric_name: str
    metric: Metric
    members: list[Member]
    blends: list[Blended]
    tuned: list[Tuned]
    probed: list[Probed]
    recorded: list[Score]
    main: Blended | None
    blend_oof: Array | None
    weights: dict[str, float]
    text: str
    within: dict[str, Array] = field(default_factory=dict)
    """OOF of the versions that `main` blended, pair experts aside; empty where it cannot be had."""
    others: dict[str, Array] = field(default_factory=dict)
    """Cross-fitted predictions, by run, of the other `unscored` blends."""

    @property
    def known(self) -> list[Member]:
        """Members with OOF of every row; pair experts aside, who say nothing of the other classes."""
        return [member for member in self.members if member.oof is not None and not member.is_expert]


def analyse(facts: Facts, seed: int = 0) -> dict[str, Any]:
    """Turn facts into the numbers of the page, section by section."""
    candidates, target = _candidates(facts), facts.manifest.target
    names, values = list(candidates), list(candidates.values())
    groups = facts.manifest.groups
    scored = candidates | {_other(run): oof for run, oof in facts.others.items()}
    draws = (
        estimate.bootstrap(list(scored.values()), target, groups, facts.metric, REPS, seed)
        if scored
        else np.empty((0, 0))
    )
    table = {
        name: (facts.metric.score(each, target), draws[place]) for place, (name, each) in enumerate(scored.items())
    }
    lines = leaderboard(facts, table)
    best = values[0] if values else None
    page: dict[str, Any] = {
        "competition": facts.competition,
        "made": datetime.now().astimezone(),
        "manifest": facts.manifest,
        "metric": facts.metric_name,
        "higher_is_better": facts.metric.higher_is_better,
        "commit": git_tags()["git.commit"][:10],
        "headline": headline(facts, table),
        "is_blended": facts.main is not None,
        "said": facts.text.splitlines(),
        "lines": lines[:MOST],
        "hidden": max(0, len(lines) - MOST),
        "page_scale": _span(lines[:MOST]),
        "progress": progress(facts, table),
        "gains": ablations(facts, table),
        "weights": sorted(facts.weights.items(), key=lambda item: -item[1]),
        "correlation": correlation(facts),
        "boards": on_boards(facts),
        "tuned": facts.tuned[-MOST:],
        "percent": axes.fit([0.0, 100.0]),
        "unit": axes.Axis(0.0, 1.0, [], 0),
        "risk": None,
        "calibration": None,
        "confusion": None,
    }
    if best is not None and facts.manifest.task == "classify":
        page["risk"] = risk(facts, names, values, seed)
        page["calibration"] = calibration(best, target)
        page["confusion"] = confusions(best, target, facts.manifest.classes)
    page["shown"] = names[0] if names else ""
    return page


def _candidates(facts: Facts) -> dict[str, Array]:
    """What can be scored on every row, the one that the page shows first: the newest blend, else the best member."""
    found = {member.name: member.oof.values for member in facts.known if member.oof is not None}
    if facts.blend_oof is not None:
        return {BLEND: facts.blend_oof} | found
    score = {name: facts.metric.sign * facts.metric.score(each, facts.manifest.target) for name, each in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: -score[name])}


def headline(facts: Facts, table: dict[str, tuple[float, Array]]) -> dict[str, Any]:
    """The numbers of the first screen."""
    main = facts.main
    found: dict[str, Any] = {"members": float(len(facts.members)), "samples": float(len(facts.manifest.table))}
    if main is not None:
        score = cross_fitted(facts, main, table)
        found |= main.expected(facts.metric_name, facts.metric.sha256)
        found |= dict(zip(("oof", "oof/low", "oof/high"), score, strict=True))
    elif table:
        found["oof"] = max((score for score, _ in table.values()), key=lambda score: facts.metric.sign * score)
    return found


def cross_fitted(facts: Facts, blended: Blended, table: dict[str, tuple[float, Array]]) -> Interval:
    """A blend's score of the training rows in the page's metric: as it was logged, else from its predictions."""
    logged = blended.cross_fitted(facts.metric_name, facts.metric.sha256)
    own = BLEND if blended is facts.main else _other(blended.run)
    return logged if math.isfinite(logged.value) or own not in table else _interval(facts, table[own])


def _interval(facts: Facts, scored: tuple[float, Array]) -> Interval:
    return estimate.interval(*scored).within(facts.metric)


def _other(run: str) -> str:
    """What a blend that is not the newest goes by beside the members; none of their names holds a space."""
    return f"blend {run}"


def unscored(blends: Sequence[Blended], name: str, metric: Metric) -> list[Blended]:
    """The blends of the leaderboard whose run has no score of this metric: their predictions have to be scored."""
    return [one for one in _newest(blends) if not math.isfinite(one.cross_fitted(name, metric.sha256).value)]


def _newest(blends: Sequence[Blended]) -> list[Blended]:
    """The newest of each kind."""
    return list({_kind(blended): blended for blended in blends}.values())


def leaderboard(facts: Facts, table: dict[str, tuple[float, Array]]) -> list[Line]:
    """Blends and members, best first; those without comparable OOF at the end, with the reason."""
    lines = []
    alike = Counter(map(_kind, facts.blends))
    for blended in _newest(facts.blends):
        mine = cross_fitted(facts, blended, table)
        same = blended.manifest_hash == facts.manifest.hash
        lines.append(
            Line(
                name=f"blend {blended.method}" + (" (newest)" if blended is facts.main else ""),
                kind="blend",
                score=mine if same and math.isfinite(mine.value) else None,
                slots=f"{sum(key.startswith('member/') for key in blended.numbers)} members, views {blended.views}"
                + (f", newest of {alike[_kind(blended)]} runs" if alike[_kind(blended)] > 1 else ""),
                when=blended.when,
                note="" if same else "another data version",
                extra=blended.expected(facts.metric_name, facts.metric.sha256),
            )
        )
    for member in facts.members:
        score = _interval(facts, table[member.name]) if member.name in table else None
        folds, seeds = {slot.fold for slot in member.slots}, {slot.seed for slot in member.slots}
        lines.append(
            Line(
                name=member.name,
                kind="member",
                score=score,
                stage=member.stage,
                weight=facts.weights.get(member.name),
                slots=f"{len(folds)} folds, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
                when=member.when,
                note=member.missing or member.only,
            )
        )
    sign = -1 if facts.metric.higher_is_better else 1
    return sorted(lines, key=lambda line: (line.score is None, sign * line.score.value if line.score else 0.0))


def _kind(blended: Blended) -> tuple[str, ...]:
    """What tells one blend from another: rule, views, data, what it was judged by, and who is in it."""
    within = sorted(key for key in blended.numbers if key.startswith("member/"))
    return blended.method, blended.views, blended.manifest_hash, blended.tags.get("metric", ""), *within


def _span(lines: Sequence[Line]) -> axes.Axis:
    """An axis for the scores that compete; one far off would squeeze all others into a dot, so it is left outside."""
    scores = [line.score for line in lines if line.score]
    if not scores:
        return axes.fit([])
    best = scores[0].value
    off = [abs(score.value - best) for score in scores]
    reach = 8 * max(float(np.median(off)), scores[0].high - scores[0].low)
    near = [score for score, far in zip(scores, off, strict=True) if far <= reach]
    return axes.fit([bound for score in near for bound in score])


def progress(facts: Facts, table: dict[str, tuple[float, Array]]) -> dict[str, Any] | None:
    """Scores over time: members, blends, estimates with their intervals, recorded board scores."""
    name = facts.metric_name
    points: dict[str, list[tuple[datetime, float]]] = {"member": [], "blend": [], "estimate": [], "recorded": []}
    whiskers = []
    for member in facts.members:
        if member.name in table and member.when:
            points["member"].append((member.when, table[member.name][0]))
    for blended in facts.blends:
        score = cross_fitted(facts, blended, table).value
        if blended.manifest_hash == facts.manifest.hash and math.isfinite(score):
            points["blend"].append((blended.when, score))
        value, low, high, _ = blended.expected(name, facts.metric.sha256).values()
        if math.isfinite(value):
            points["estimate"].append((blended.when, value))
            whiskers += [(blended.when, low, high)] if math.isfinite(low) else []
        # What a board counts nobody says; a blend is judged by it, as far as one knows.
        for key in ("score/public", "score/private") if blended.tags.get("metric", name) == name else ():
            if math.isfinite(blended.number(key)):
                points["recorded"].append((blended.when, blended.number(key)))
    times = [when for series in points.values() for when, _ in series]
    if len(times) < 2:
        return None
    start, span = min(times).timestamp(), max(1.0, max(times).timestamp() - min(times).timestamp())
    share = {key: [(4 + 92 * (when.timestamp() - start) / span, value) for when, value in sorted(series)]
             for key, series in points.items()}  # fmt: skip
    bounds = [value for series in points.values() for _, value in series] + [b for _, *pair in whiskers for b in pair]
    return {
        "points": {key: series for key, series in share.items() if series},
        "best": _running_best(share["member"] + share["blend"], facts.metric.higher_is_better),
        "whiskers": [(4 + 92 * (when.timestamp() - start) / span, low, high) for when, low, high in whiskers],
        "axis": axes.robust(bounds, facts.metric.higher_is_better),
        "first": min(times),
        "last": max(times),
    }


def _running_best(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    best: list[tuple[float, float]] = []
    for place, value in sorted(points):
        if not best or (value > best[-1][1]) == higher_is_better and value != best[-1][1]:
            best += [(place, best[-1][1])] if best else []
            best.append((place, value))
    return [*best, (98.0, best[-1][1])] if best else []


def ablations(facts: Facts, table: dict[str, tuple[float, Array]]) -> dict[str, Any]:
    """Paired comparisons: the blend against simpler choices and without each member, and recipes against each other."""
    rows: list[tuple[str, str, Gain]] = []
    target, groups, metric = facts.manifest.target, facts.manifest.groups, facts.metric
    if facts.blend_oof is not None and facts.main is not None and len(facts.within) > 1:
        fold = facts.manifest.fold
        stacked = np.stack(list(facts.within.values()))
        rivals: dict[str, Array] = {"the plain mean": stacked.mean(axis=0)}
        rivals["the best single member"] = estimate.best_single(stacked, target, fold, metric)
        method = "auto" if facts.main.method.startswith("auto: ") else facts.main.method
        some = list(facts.within)[:12] if method in METHODS else []  # weights by hand are of all of them
        for place, name in enumerate(some):
            rest = np.delete(stacked, place, axis=0)
            rivals[f"without {name}"] = estimate.cross_fit(method, rest, target, fold, metric).values
        everyone = [facts.blend_oof, *rivals.values()]
        draws = estimate.bootstrap(everyone, target, groups, metric, REPS)
        scores = [metric.score(each, target) for each in everyone]
        for place, name in enumerate(rivals, start=1):
            found = estimate.gain(name, draws[0], draws[place], (scores[0], scores[place]), metric)
            rows.append(
                ("blend", f"over {name}" if not name.startswith("without") else f"over the blend {name}", found)
            )
    for one, other, said in experiments(facts.known)[:12]:
        mine, theirs = table[one][1], table[other][1]
        found = estimate.gain(other, mine, theirs, (table[one][0], table[other][0]), metric)
        rows.append((one, f"over {other}: {said}", found))
    rows += [(probed.arm, f"over {probed.gain.over}, by probe", probed.gain) for probed in facts.probed[-12:]]
    bounds = [bound for _, _, found in rows for bound in (found.low, found.high)]
    return {"rows": rows, "axis": axes.fit(bounds, include=[0.0])}


def correlation(facts: Facts) -> dict[str, Any] | None:
    """How alike members err: the correlation of their losses, row by row."""
    values = [member.oof.values for member in facts.known if member.oof is not None]
    if len(values) < 2:
        return None
    target, rows = facts.manifest.target, []
    is_visible = np.isfinite(target).reshape(len(target), -1).any(axis=1)  # without a point there is no loss
    for each in values[:MOST]:
        if facts.manifest.task == "classify":
            rows.append(-np.log(each[np.arange(len(target)), target].clip(1e-7)))
        else:
            squares = ((each - target) ** 2).reshape(len(target), -1)
            rows.append(np.sqrt(np.nanmean(squares[is_visible], axis=1)))
    losses = np.array(rows)
    if losses.shape[1] < 2:
        return None
    with np.errstate(invalid="ignore"):  # the same loss on every row correlates with nothing
        table = np.corrcoef(losses)
    wrong = None
    if facts.manifest.task == "classify":
        missed = np.array([each.argmax(axis=1) != target for each in values[:MOST]])
        wrong = {"all": float(missed.all(axis=0).mean()), "any": float(missed.any(axis=0).mean())}
    return {"names": [member.name for member in facts.known[:MOST]], "table": table.tolist(), "wrong": wrong}


def risk(facts: Facts, names: Sequence[str], values: Sequence[Array], seed: int) -> dict[str, Any]:
    """Accuracy against the share of rows kept, surest first; and public minus private by chance, if it has a score."""
    target, probs = facts.manifest.target, values[0]
    right = (probs.argmax(axis=1) == target)[np.argsort(-probs.max(axis=1), kind="stable")]
    kept = np.unique(np.linspace(max(1, len(right) // 50), len(right), 60).astype(int))
    curve = [(100 * count / len(right), float(right[:count].mean())) for count in kept]
    found = {
        "curve": curve,
        "axis": axes.fit([accuracy for _, accuracy in curve], include=[1.0]),
        "unsure": float((probs.max(axis=1) < 0.5).mean()),
    }
    return found | _public_board(facts, names[:4], values[:4], seed)


def _public_board(facts: Facts, names: Sequence[str], values: Sequence[Array], seed: int) -> dict[str, Any]:
    share = float(facts.main.settings.get("public_share", 0.3)) if facts.main else 0.3
    truth = np.eye(len(facts.manifest.classes), dtype=np.float32)[facts.manifest.target]
    worlds = shakeup.draw(
        values, names, truth, facts.metric, share, facts.manifest.groups, resample=True, reps=400, seed=seed
    )
    if worlds is None:
        return {"gap": None, "flips": []}
    gap = worlds.public[0] - worlds.private[0]
    counts, edges = np.histogram(gap, bins=24)
    return {
        "share": share,
        "gap": worlds.gap,
        "bars": list(zip(edges[:-1].tolist(), edges[1:].tolist(), (counts / counts.max()).tolist(), strict=True)),
        "gap_axis": axes.fit(edges.tolist(), include=[0.0]),
        "flips": [(name, worlds.flips(0, place)) for place, name in enumerate(worlds.names) if place],
        "regret": worlds.regret,
    }


def on_boards(facts: Facts) -> dict[str, Any]:
    """Estimates beside what the boards said, how often the interval held it, and public against private."""
    told = facts.recorded
    rows = []
    for score in told:
        truth = score.private if math.isfinite(score.private) else score.public
        rows.append(
            {"score": score, "has_estimate": math.isfinite(score.estimate), "inside": score.low <= truth <= score.high}
        )
    shown = told[-MOST:]
    bounds = [bound for score in shown for bound in (score.low, score.high, score.public, score.private)]
    pairs = [(score.public, score.private) for score in told]
    both = [(public, private) for public, private in pairs if math.isfinite(public) and math.isfinite(private)]
    return {
        "rows": rows[-MOST:],
        "hidden": len(rows) - len(shown),
        "axis": axes.fit(bounds),
        "inside": sum(row["inside"] for row in rows),
        "judged": sum(row["has_estimate"] for row in rows),
        "pairs": both,
        "public_axis": axes.fit([public for public, _ in both]),
        "private_axis": axes.fit([private for _, private in both]),
        "correlation": rank_correlation(*zip(*both, strict=True)) if len(both) > 2 else math.nan,
    }
