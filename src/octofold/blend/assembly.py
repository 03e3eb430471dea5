"""Assembly: the blend's workflow. Gather a stage, judge it, speak of the test images, write and register the result."""

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold import plots
from octofold.blend import ledger, lineup, shakeup, shift, submission, succession, verdict
from octofold.blend.lineup import Lineup
from octofold.blend.shift import Outlook
from octofold.blend.verdict import Verdict
from octofold.commands import Blend
from octofold.data import manifest
from octofold.data.images import PixelSpec, load, square
from octofold.data.manifest import Manifest
from octofold.files import ROOT, write_text
from octofold.infer import serving
from octofold.infer.inference import nested
from octofold.metrics import METRICS, Metric, adopt
from octofold.nets import embedding
from octofold.track import tracking
from octofold.track.provenance import git_tags

Array = npt.NDArray[Any]
log = logging.getLogger("octofold")


@dataclass(frozen=True)
class Spoken:
    """What the models say of the test images.

    Attributes:
        votes: ``(S, T, …)`` of every fold model.
        members: ``(M, T, …)`` bagged.
        final: ``(T, …)`` blended.
        shares: per member, of its fold models.
    """

    votes: Array
    members: Array
    final: Array
    shares: list[npt.NDArray[np.float64]]


def blend(config: Blend, run: tracking.Run) -> dict[str, Any]:
    """Do the whole job and return what the entry point prints.

    Raises:
        UserError: whatever `lineup.gather`, `submission.write` or `serving` refuse.
    """
    train = manifest.read(config.manifest or ROOT / "data" / config.competition / "manifest.csv")
    name, metric = metric_of(config.metric, train)
    views, scores_of_views = (config.tta, {}) if config.tta != "auto" else lineup.best_views(config, train, metric)
    members = lineup.gather(config.competition, config.stage, config.members, train, views, config.mixed)
    rows = members.rows
    # For points original 000's regression has no meaning of its own: least squares on the simplex is the same idea.
    method = "simplex" if train.task == "keypoints" and config.method == "lr_mse" else config.method
    judged = verdict.judge(
        method, members.oof, members.names, rows.target, rows.fold, rows.groups, metric,
        members.per_seed, config.seed,
    )  # fmt: skip
    out = config.out or ROOT / "runs" / "blend" / run.id
    result: dict[str, Any] = {"run_id": run.id, "views": views, "method": judged.blend.method}
    test = lineup.test_set(train)
    outlook, extra = None, []
    if test is not None:
        said = speak(members, judged, test, config.bag)
        predicted = lineup.signed(members, test, said.final)
        result["submission"] = submission.write(
            predicted, test, out / "submission.csv", str(train.info.get("label_type", ""))
        )
        result["predictions"] = predicted.save(out / "predictions.parquet", csv=True)
        near = lineup.compare(members, judged.blend.weights, test) if config.shift else None
        if train.task == "classify":
            outlook = foresee(members, judged, said, near, name)
            extra = shaken(config, members, judged, said, outlook, metric)
        about = _about(config, run, members, judged, said, outlook, views)
        result["ledger"] = _ledger(members, test, said, near, about).save(out)
    lines = verdict.headline(judged, name, outlook) + extra + _views_told(scores_of_views, views)
    if members.left_out:
        lines.append(f"Fitted on {len(rows.table)} rows; {members.left_out} lack an honest prediction by some member.")
    result["report"] = write_text(out / "report.txt", "\n".join(lines) + "\n")
    numbers = _numbers(judged, outlook, name)
    _record(run, members, judged, numbers, [path for path in result.values() if isinstance(path, Path)])
    if config.register_model:
        result |= _register(config, run, members, judged, metric, numbers)
    for line in lines:
        log.info("%s", line)
    weights = dict(zip(members.names, np.round(judged.blend.weights, 4).tolist(), strict=True))
    return result | {"weights": weights} | numbers


def metric_of(name: str, train: Manifest) -> tuple[str, Metric]:
    """Return the metric asked for, or the task's own.

    Raises:
        UserError: unknown, or of the other task.
    """
    chosen = adopt(name or ("accuracy" if train.task == "classify" else "mse"), train.task)
    return chosen, METRICS[chosen]


def speak(members: Lineup, judged: Verdict, test: Manifest, bag: str) -> Spoken:
    """Predict the test images by every fold model, bag them, blend them."""
    votes = lineup.votes(members, test)
    shares = lineup.shares(members, bag, judged.blend.params.get("per_fold"))
    bagged = lineup.bagged(votes, shares)
    return Spoken(votes, bagged, judged.blend.apply(bagged), shares)


def foresee(members: Lineup, judged: Verdict, said: Spoken, near: lineup.Near | None, name: str) -> Outlook:
    """Estimate the accuracy on the test images themselves."""
    parts = list(lineup.by_fold(members, said.votes).values())
    folds = [judged.blend.apply(part) for part in parts]
    accuracy = METRICS["accuracy"]
    error = judged.standard_error if name == "accuracy" else verdict.standard_error(
        judged.cross.values, members.rows, accuracy
    )  # fmt: skip
    distance = near.distance if near is not None else None
    slope = rehearsed(members.rows) if near is not None else shift.SURENESS
    return shift.foresee(judged.cross.values, members.rows.target, folds, error, distance, (members.oof, parts), slope)


def rehearsed(rows: Manifest, most: int = 3000) -> float:
    """Return how fast accuracy falls with confidence on these photos, by `shift.rehearse`.

    The embedding knows nothing of the labels: ImageNet's where `prepare` could use it (then it is cached), else pixels.
    """
    some = rows.take(np.linspace(0, len(rows.table) - 1, min(most, len(rows.table))).astype(int))
    sized = {"width", "height"} <= set(some.table)
    sides = some.table[["width", "height"]].min(axis=1).to_numpy() if sized else np.zeros(0)
    name = embedding.choose(sides)
    tiny = np.zeros((len(some.table), 0), np.uint8)
    if name == "pixels":
        tiny = np.stack([square(load(path, PixelSpec(16, "squash"))[0], 16).reshape(-1) for path in some.paths])
    folder = ROOT / "data" / rows.competition / "cache"
    features, _ = embedding.embed_or_pixels(name, some.sample_ids.tolist(), some.paths, tiny, folder)
    return shift.rehearse(features, some.target)


def shaken(
    config: Blend, members: Lineup, judged: Verdict, said: Spoken, outlook: Outlook, metric: Metric
) -> list[str]:
    """Play the public and the private board for the submissions that could be made from these members."""
    chance = shift.calibrated(said.final, outlook.accuracy.value)
    best = int(
        np.argmax([judged.members[name].value * (1 if metric.higher_is_better else -1) for name in members.names])
    )
    candidates = {judged.blend.method: said.final}
    if len(members.names) > 1:
        candidates |= {"equal": said.members.mean(axis=0)} if judged.blend.method != "equal" else {}
        candidates[members.names[best]] = said.members[best]
    worlds = shakeup.draw(
        list(candidates.values()), list(candidates), chance, metric, config.public_share, reps=400, seed=config.seed
    )
    return shakeup.told(worlds, config.public_share)


def _views_told(scores: dict[str, float], chosen: str) -> list[str]:
    if not scores:
        return []
    listed = ", ".join(f"{views} {score:.4f}" for views, score in scores.items())
    return [f"Views chosen by OOF: {chosen} (plain mean of members: {listed})."]


def _about(
    config: Blend,
    run: tracking.Run,
    members: Lineup,
    judged: Verdict,
    said: Spoken,
    outlook: Outlook | None,
    views: str,
) -> dict[str, Any]:
    flat = np.concatenate(said.shares)
    models = [pin | {"share": float(share)} for pin, share in zip(members.pins, flat, strict=True)]
    return {
        "run_id": run.id,
        "competition": config.competition,
        "stage": config.stage,
        "method": judged.blend.method,
        "views": views,
        "bag": config.bag,
        "blend": judged.blend.to_dict(),
        "weights": dict(zip(members.names, judged.blend.weights.tolist(), strict=True)),
        "models": models,
        "manifest_hash": members.rows.hash,
        "manifest": str(members.rows.file or ""),
        "git": git_tags(),
        "estimate": outlook.accuracy._asdict() if outlook is not None else judged.score._asdict(),
    }


def _ledger(
    members: Lineup, test: Manifest, said: Spoken, near: lineup.Near | None, about: dict[str, Any]
) -> ledger.Ledger:
    running = {
        count: lineup.bagged(lineup.votes(members, test, views), said.shares).mean(axis=0)
        for views, count in nested(members.views).items()
    }
    bagged = dict(zip(members.names, said.members, strict=True))
    return ledger.build(test, said.final, bagged, said.votes, running, near.images if near else [], about)


def _numbers(judged: Verdict, outlook: Outlook | None, name: str) -> dict[str, float]:
    """The metrics of the run and of the JSON line."""
    found = {
        f"oof/{name}": judged.score.value,
        f"oof/{name}_low": judged.score.low,
        f"oof/{name}_high": judged.score.high,
        f"apparent/{name}": judged.apparent,
    }
    best = outlook.accuracy if outlook is not None else judged.score
    key = "accuracy" if outlook is not None else name
    found |= {f"estimate/{key}": best.value, "estimate/low": best.low, "estimate/high": best.high}
    for gain in judged.gains:
        label = "equal" if gain.over == "equal" else "best_single"
        found |= {f"gain/over_{label}": gain.value, f"gain/over_{label}_probability": gain.probability}
    if outlook is not None:
        found |= {f"shift/{key}": value for key, value in outlook.parts.items()}
    return found


def _record(run: tracking.Run, members: Lineup, judged: Verdict, numbers: dict[str, float], files: list[Path]) -> None:
    run.log_metrics(numbers | {f"member/{name}": score.value for name, score in judged.members.items()})
    run.log_figure(plots.bar(members.names, judged.blend.weights, "Blend weights", "share"), "weights.png")
    scores = {"blend (cross-fitted)": judged.score, **judged.members}
    errors = [[s.value - s.low for s in scores.values()], [s.high - s.value for s in scores.values()]]
    run.log_figure(
        plots.bar(list(scores), [s.value for s in scores.values()], "OOF score, 95 % interval", "score", errors),
        "scores.png",
    )
    run.log_dict(judged.blend.to_dict() | {"members": members.names}, "blend_weights.json")
    run.log_dict(members.pins, "models.json")
    run.set_tags({"manifest_hash": members.rows.hash, "views": members.views, "method": judged.blend.method})
    for file in files:
        run.log_artifact(file)


def _register(
    config: Blend, run: tracking.Run, members: Lineup, judged: Verdict, metric: Metric, numbers: dict[str, float]
) -> dict[str, Any]:
    """Pack the blend as one model, register it, and let it take its stage if it has earned that.

    Members of no weight stay out of the model where the rule is a plain average.
    """
    oof = lineup.signed_oof(members, judged.cross.values)
    shares = lineup.shares(members, config.bag, judged.blend.params.get("per_fold"))
    fitted, kept = judged.blend, np.arange(len(members.names))
    if fitted.rule == "linear":
        kept = np.flatnonzero(fitted.weights > 0)
        fitted = replace(fitted, weights=fitted.weights[kept], params={})
    names = [members.names[place] for place in kept]
    with tempfile.TemporaryDirectory() as scratch:
        run.log_artifact(oof.save(Path(scratch) / f"{members.views}.parquet"), "oof")
        whole = serving.write_blend(
            Path(scratch) / "blend",
            f"{config.competition}.blend",
            fitted,
            {name: members.slots[name] for name in names},
            {name: shares[place].tolist() for name, place in zip(names, kept, strict=True)},
            members.views,
            members.rows.hash,
            {"run_id": run.id, "estimate": numbers},
        )
        name, version = serving.log_blend(run, serving.pack(whole, Path(scratch) / "packed"))
    decision = succession.succeed(
        run, name, version, config.stage, oof, members.rows, metric, config.force, config.seed
    )
    return {"model": f"models:/{name}/{version}", "in_stage": decision.moved, "succession": decision.reason}
