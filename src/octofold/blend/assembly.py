"""Assembly: the blend's workflow. Gather a stage, judge it, speak of the test images, write and register the result."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold import plots
from octofold.blend import blending, choice, forecast, ledger, lineup, nearness, shift, submission, succession, verdict
from octofold.blend.estimate import Interval
from octofold.blend.forecast import Forecast
from octofold.blend.lineup import Lineup, Spoken
from octofold.blend.nearness import Near
from octofold.blend.verdict import Verdict
from octofold.commands import Blend
from octofold.data import manifest
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import ROOT, write_text
from octofold.infer import serving
from octofold.infer.passes import nested
from octofold.metrics import METRICS, Metric, adopt, fingerprint
from octofold.predictions import Predictions
from octofold.track import tracking
from octofold.track.provenance import git_tags

Array = npt.NDArray[Any]
log = logging.getLogger("octofold")


def blend(config: Blend, run: tracking.Run) -> dict[str, Any]:
    """Do the whole job and return what the entry point prints.

    Raises:
        UserError: whatever `lineup.gather`, `submission.write` or `serving` refuse.
    """
    train = manifest.read(config.manifest or ROOT / "data" / config.competition / "manifest.csv")
    name, metric = metric_of(config.metric, train)
    chosen = choice.choose(config, train, metric)
    members, rows = chosen.lineup, chosen.lineup.rows
    # For points original 000's regression has no meaning of its own: least squares on the simplex is the same idea.
    method = "simplex" if train.task == "keypoints" and config.method == "lr_mse" else config.method
    if config.weights:
        method = blending.by_hand(config.weights, members.names[: members.voters])
    judged = verdict.judge(
        method, members.oof, members.names, rows.target, rows.fold, rows.groups, metric,
        members.per_seed, config.seed, chosen.instead, members.experts,
    )  # fmt: skip
    out = config.out or ROOT / "runs" / "blend" / run.id
    result: dict[str, Any] = {"run_id": run.id, "views": members.views, "method": judged.blend.method}
    test = lineup.test_set(train)
    expected, shaken = None, list[str]()
    lines = [f"No test images: {name} is cross-fitted, and holds for images like the training ones."]
    if test is not None:
        made, expected, lines, shaken = _submit(config, run, members, judged, test, name, out)
        result |= made
    if config.weights:
        lines.append("Weights given by hand: what was looked at to choose them is not in the estimate.")
    lines += verdict.told(judged, name) + shaken + chosen.told() + _members_told(members, judged)
    result["report"] = write_text(out / "report.txt", "\n".join(lines) + "\n")
    numbers = _numbers(judged, expected, name)
    _record(run, members, judged, numbers, [path for path in result.values() if isinstance(path, Path)])
    of = "test" if expected is not None and expected.is_known else "oof"  # what `estimate/…` speaks of
    run.set_tags({"metric": name, "metric.sign": metric.sign, "estimate.of": of} | fingerprint(config.metric))
    oof = _keep_oof(run, members, judged)
    if config.register_model:
        result |= _register(config, run, members, judged, metric, numbers, oof)
    for line in lines:
        log.info("%s", line)
    weights = dict(zip(members.names, np.round(judged.blend.weights, 4).tolist(), strict=True))
    return result | {"weights": weights} | numbers


def _submit(
    config: Blend, run: tracking.Run, members: Lineup, judged: Verdict, test: Manifest, name: str, out: Path
) -> tuple[dict[str, Any], Forecast | None, list[str], list[str]]:
    """Predict the test images; write submission, predictions and ledger; say what to expect, and of the boards."""
    said = lineup.speak(members, judged.blend, test, config.bag)
    predicted = lineup.signed(members, test, said.final)
    made = {
        "submission": submission.write(
            predicted, test, out / "submission.csv", str(members.rows.info.get("label_type", ""))
        ),
        "predictions": predicted.save(out / "predictions.parquet", csv=True),
    }
    near = nearness.compare(members, judged.blend.weights, test) if config.shift else None
    expected, shaken = None, list[str]()
    if members.rows.task == "classify":
        expected = forecast.forecast(judged, members, said, near, name, config.seed)
        lines = expected.told(judged)
        shaken = forecast.shaken(config, members, judged, said, expected, METRICS[name])
    else:
        lines = [f"No estimate for these test images: shift is estimated for accuracy alone. {name} is cross-fitted."]
    lines += [shift.told(near.distance)] if near is not None else []
    about = _about(config, run, members, judged, said, expected)
    made["ledger"] = _ledger(members, test, said, near, about).save(out)
    return made, expected, lines, shaken


def _members_told(members: Lineup, judged: Verdict) -> list[str]:
    lines = []
    for name, (a, b) in zip(members.names[members.voters :], members.experts, strict=True):
        gates = [
            gate
            for gate in judged.blend.params.get("experts", [])
            if (gate["a"], gate["b"], len(gate["coef"])) == (a, b, len(members.names))  # `pair_gate`'s own: voters only
        ]
        pair = f"{members.rows.classes[a]} and {members.rows.classes[b]}"
        where = f"where they lead by at most {gates[0]['margin']:g}" if gates else "nowhere: it helps too little"
        lines.append(f"Expert {name} for {pair} is heard {where}.")
    if members.left_out:
        count = len(members.rows.table)
        lines.append(f"Fitted on {count} rows; {members.left_out} lack an honest prediction by some member.")
    return lines


def metric_of(name: str, train: Manifest) -> tuple[str, Metric]:
    """Return the metric asked for, or the task's own.

    Raises:
        UserError: unknown, of the other task, or without a value on these samples.
    """
    chosen = adopt(name or ("accuracy" if train.task == "classify" else "mse"), train.task)
    if chosen == "nme" and (visible := int(np.isfinite(train.target).all(axis=2).sum(axis=1).max())) < 2:
        raise UserError(
            "metric 'nme'",
            expected="samples with two visible points or more: their distance is what errors are divided by",
            got=f"at most {visible} point{'' if visible == 1 else 's'} a sample",
            fix="use --metric mse",
        )
    return chosen, METRICS[chosen]


def _about(
    config: Blend,
    run: tracking.Run,
    members: Lineup,
    judged: Verdict,
    said: Spoken,
    expected: Forecast | None,
) -> dict[str, Any]:
    flat = np.concatenate(said.shares)
    models = [pin | {"share": float(share)} for pin, share in zip(members.pins, flat, strict=True)]
    return {
        "run_id": run.id,
        "competition": config.competition,
        "classes": list(members.rows.classes),
        "stage": config.stage,
        "method": judged.blend.method,
        "views": members.views,
        "bag": config.bag,
        "blend": judged.blend.to_dict(),
        "weights": dict(zip(members.names, judged.blend.weights.tolist(), strict=True)),
        "models": models,
        "manifest_hash": members.rows.hash,
        "manifest": str(members.rows.file or ""),
        "git": git_tags(),
        "estimate": _best_known(judged, expected)._asdict(),
    }


def _ledger(members: Lineup, test: Manifest, said: Spoken, near: Near | None, about: dict[str, Any]) -> ledger.Ledger:
    voters = slice(0, members.voters)
    running = {
        count: lineup.bagged(lineup.votes(members, test, views), said.shares)[voters].mean(axis=0)
        for views, count in nested(members.views).items()
    }
    bagged = dict(zip(members.names, said.members, strict=True))
    speakers = sum(len(members.slots[name]) for name in members.names[voters])
    return ledger.build(test, said.final, bagged, said.votes[:speakers], running, near.images if near else [], about)


def _best_known(judged: Verdict, expected: Forecast | None) -> Interval:
    """What to expect of the test images, else of images like the training ones."""
    return expected.score if expected is not None and expected.is_known else judged.score


def _numbers(judged: Verdict, expected: Forecast | None, name: str) -> dict[str, float]:
    """The metrics of the run and of the JSON line."""
    best = _best_known(judged, expected)
    found = {
        f"oof/{name}": judged.score.value,
        f"oof/{name}_low": judged.score.low,
        f"oof/{name}_high": judged.score.high,
        f"apparent/{name}": judged.apparent,
        f"estimate/{name}": best.value,
        "estimate/low": best.low,
        "estimate/high": best.high,
    }
    for gain in judged.gains:
        label = "equal" if gain.over == "equal" else "best_single"
        found |= {f"gain/over_{label}": gain.value, f"gain/over_{label}_probability": gain.probability}
    if expected is not None:
        found |= {"estimate/accuracy": expected.outlook.accuracy.value}
        found |= {f"shift/{key}": value for key, value in expected.outlook.parts.items()}
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


def _keep_oof(run: tracking.Run, members: Lineup, judged: Verdict) -> Predictions:
    """The cross-fitted predictions, as an artifact of the run: what the finals are chosen by, registered or not."""
    oof = lineup.signed_oof(members, judged.cross.values)
    with tempfile.TemporaryDirectory() as scratch:
        run.log_artifact(oof.save(Path(scratch) / f"{members.views}.parquet"), "oof")
    return oof


def _register(
    config: Blend,
    run: tracking.Run,
    members: Lineup,
    judged: Verdict,
    metric: Metric,
    numbers: dict[str, float],
    oof: Predictions,
) -> dict[str, Any]:
    """Pack the blend as one model, register it, and let it take its stage if it has earned that.

    Members of no weight stay out of the model where the rule is a plain average.
    """
    shares = lineup.shares(members, config.bag, judged.blend.params.get("per_fold"))
    fitted, kept = judged.blend, np.arange(len(members.names))
    if fitted.is_mean:
        kept = np.flatnonzero(fitted.weights > 0)
        fitted = replace(fitted, weights=fitted.weights[kept], params={})
    names = [members.names[place] for place in kept]
    with tempfile.TemporaryDirectory() as scratch:
        whole = serving.write_blend(
            Path(scratch) / "blend",
            f"{config.competition}.blend",
            fitted,
            {name: members.slots[name] for name in names},
            {name: shares[place].tolist() for name, place in zip(names, kept, strict=True)},
            members.views,
            members.rows.hash,
            {"run_id": run.id, "estimate": numbers},
            members.rows.classes,
        )
        name, version = serving.log_blend(run, serving.pack(whole, Path(scratch) / "packed"))
    decision = succession.succeed(
        run, name, version, config.stage, oof, members.rows, metric, config.force, config.seed
    )
    return {"model": f"models:/{name}/{version}", "in_stage": decision.moved, "succession": decision.reason}
