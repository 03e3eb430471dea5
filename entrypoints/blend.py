"""blend: every member in a stage becomes one submission, with an estimate for the actual test images.

    mlflow run . -e blend --env-manager local -P competition=grocery15
    python entrypoints/blend.py --competition grocery15 --stage production --method lr_mse --tta geo8

The report's first line says what to expect on the test images, and by how much the folds flatter.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octofold.commands import Blend
from octofold.config import run_main

if TYPE_CHECKING:
    from octofold.lineup import Lineup
    from octofold.manifest import Manifest
    from octofold.shift import Outlook
    from octofold.tracking import Run
    from octofold.verdict import Verdict

log = logging.getLogger("octofold")


def run(config: Blend) -> dict[str, Any]:
    """Gather, judge, predict, foresee, write, log."""
    import numpy as np

    from octofold import blending, lineup, manifest, metrics, submission, tracking, verdict
    from octofold.errors import known
    from octofold.files import ROOT, write_json, write_text
    from octofold.tta import VIEWS

    known("blend method", config.method, blending.METHODS)
    known("views", config.tta, [*VIEWS, "auto"])
    train = manifest.read(config.manifest or ROOT / "data" / config.competition / "manifest.csv")
    name = config.metric or ("accuracy" if train.task == "classify" else "mse")
    metric = metrics.METRICS[known("metric", name, metrics.METRICS)]
    with tracking.run("blend", config, config.competition) as run:
        views = config.tta if config.tta != "auto" else lineup.best_views(config, train, metric)
        members = lineup.gather(config.competition, config.stage, config.members, train, views, config.mixed)
        rows = members.rows
        judged = verdict.judge(
            config.method, members.oof, members.names, rows.target, rows.fold, rows.groups, metric,
            members.per_seed, config.seed,
        )  # fmt: skip
        out = config.out or ROOT / "runs" / "blend" / run.id
        result: dict[str, Any] = {"run_id": run.id, "views": views, "method": judged.blend.method}
        test = lineup.test_set(train)
        outlook = None
        if test is not None:
            said = lineup.votes(members, test)
            parts = lineup.shares(members, config.bag, judged.blend.params.get("per_fold"))
            final = judged.blend.apply(lineup.bagged(members, said, parts))
            predicted = lineup.signed(members, test, final)
            result["predictions"] = predicted.save(out / "predictions.parquet", csv=True)
            result["submission"] = submission.write(
                predicted, test, out / "submission.csv", str(train.info.get("label_type", ""))
            )
            if train.task == "classify":
                outlook = _outlook(config, members, judged, said, test)
        lines = verdict.headline(judged, name, outlook)
        if members.left_out:
            lines.append(
                f"Fitted on {len(rows.table)} rows; {members.left_out} have no honest prediction by every member."
            )
        result["report"] = write_text(out / "report.txt", "\n".join(lines) + "\n")
        blend_file = write_json(out / "blend_weights.json", judged.blend.to_dict() | {"members": members.pins})
        numbers = _numbers(judged, outlook, name)
        _log(run, members, judged, numbers, [blend_file, *(p for p in result.values() if isinstance(p, Path))])
        for line in lines:
            log.info("%s", line)
        if config.register:
            result |= _register(run, config, members, judged, name, numbers)
        weights = dict(zip(members.names, np.round(judged.blend.weights, 4).tolist(), strict=True))
        return result | {"weights": weights} | numbers


def _register(
    run: "Run", config: Blend, members: "Lineup", judged: "Verdict", metric: str, numbers: dict[str, float]
) -> dict[str, Any]:
    """Pack the blend as one model, register it, and let it take its stage if it has earned that."""
    import tempfile

    from octofold import lineup, metrics, serving, succession

    oof = lineup.signed_oof(members, judged.cross.values)
    with tempfile.TemporaryDirectory() as scratch:
        run.log_artifact(oof.save(Path(scratch) / f"{members.views}.parquet"), "oof")
        shares = lineup.shares(members, config.bag, judged.blend.params.get("per_fold"))
        whole = serving.write_blend(
            Path(scratch) / "blend", f"{config.competition}.blend", judged.blend, members.slots,
            dict(zip(members.names, shares, strict=True)), members.views, members.rows.hash,
            {"run_id": run.id, "estimate": numbers},
        )  # fmt: skip
        name, version = serving.log_blend(run, serving.pack(whole, Path(scratch) / "packed"))
    decision = succession.succeed(
        run, name, version, config.stage, oof, members.rows, metrics.METRICS[metric], config.force, config.seed
    )
    return {"model": f"models:/{name}/{version}", "in_stage": decision.moved, "succession": decision.reason}


def _outlook(config: Blend, members: "Lineup", judged: "Verdict", said: Any, test: "Manifest") -> "Outlook":
    from octofold import lineup, shift

    distance = lineup.distance(members, judged.blend.weights, test) if config.shift else None
    folds = [judged.blend.apply(part) for part in lineup.by_fold(members, said).values()]
    error = judged.standard_error if config.metric in ("", "accuracy") else 0.01
    return shift.foresee(judged.cross.values, members.rows.target, folds, error, distance)


def _numbers(judged: "Verdict", outlook: "Outlook | None", name: str) -> dict[str, float]:
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


def _log(run: "Run", members: "Lineup", judged: "Verdict", numbers: dict[str, float], files: list[Path]) -> None:
    from octofold import plots

    run.log_metrics(numbers | {f"member/{name}": score.value for name, score in judged.members.items()})
    run.log_figure(plots.bar(members.names, judged.blend.weights, "Blend weights", "share"), "weights.png")
    scores = {"blend (cross-fitted)": judged.score, **judged.members}
    errors = [[s.value - s.low for s in scores.values()], [s.high - s.value for s in scores.values()]]
    run.log_figure(
        plots.bar(list(scores), [s.value for s in scores.values()], "OOF score, 95 % interval", "score", errors),
        "scores.png",
    )
    run.log_dict(members.pins, "models.json")
    run.set_tags({"manifest_hash": members.rows.hash, "views": members.views, "method": judged.blend.method})
    for file in files:
        run.log_artifact(file)


if __name__ == "__main__":
    run_main(Blend, run)
