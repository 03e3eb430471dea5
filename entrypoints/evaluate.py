"""evaluate: a member, a run or a Predictions file against the truth: scores, tables, pictures.

python entrypoints/evaluate.py --manifest data/grocery15/manifest.csv --competition grocery15 --member lite0
python entrypoints/evaluate.py --manifest data/grocery15/manifest.csv --run 0123abcd…
python entrypoints/evaluate.py --manifest data/grocery15/manifest.csv --predictions runs/infer/…/predictions.parquet
"""

from typing import Any

from octofold.commands import Evaluate
from octofold.config import run_main


def run(config: Evaluate) -> dict[str, object]:
    """Gather the predictions, score, write, log."""
    from octofold import evaluating, manifest, tracking
    from octofold.files import ROOT

    truth = manifest.read(config.manifest)
    found = evaluating.evaluate(truth, _predictions(config))
    with tracking.run(
        "evaluate", config, truth.competition, name=f"evaluate {found.predictions.member}",
        tags={"member": found.predictions.member, "manifest_hash": truth.hash, "views": found.predictions.views},
    ) as run:  # fmt: skip
        out = config.out or ROOT / "runs" / "evaluate" / run.id
        paths = evaluating.write(found, out)
        run.log_metrics(found.named())
        for path in paths.values():
            run.log_artifact(path)
        return {"run_id": run.id, **paths, **found.named(), "member": found.predictions.member}


def _predictions(config: Evaluate) -> Any:
    """What the flags name, as one Predictions."""
    from octofold import evaluating, tracking
    from octofold.errors import UserError
    from octofold.predictions import Predictions

    named = [bool(config.predictions), bool(config.run), bool(config.competition and config.member)]
    if sum(named) != 1:
        raise UserError(
            "evaluate",
            expected="one of --predictions, --run, or --competition with --member",
            got=f"{sum(named)} of them",
        )
    if config.predictions:
        return Predictions.load(config.predictions)
    artifact = f"oof/{config.tta}.parquet"
    if config.run:
        asked = tracking.get_run(config.run)
        runs = [asked.id]
        if artifact not in tracking.list_artifacts(asked.id, "oof"):
            competition = asked.tags.get("competition", "")
            children = tracking.find_runs(competition, {"mlflow.parentRunId": asked.id}, statuses=("FINISHED",))
            runs = [child.id for child in children if artifact in tracking.list_artifacts(child.id, "oof")]
        if not runs:
            raise UserError(f"run {config.run}", expected=f"OOF ({artifact}), its own or its slots'", got="none")
        return evaluating.gather([Predictions.load(tracking.download(one, artifact)) for one in runs])
    from octofold import registry

    slots = registry.resolve(config.competition, config.stage, [config.member])[config.member]
    held = {slot.name: registry.oof(slot, config.tta) for slot in slots}
    missing = [name for name, oof in held.items() if oof is None]
    if missing:
        raise UserError(
            f"member '{config.member}'", expected=f"OOF with views {config.tta}", got=f"none from {', '.join(missing)}",
            fix="evaluate with --tta none, or train with these views",
        )  # fmt: skip
    return evaluating.gather([oof for oof in held.values() if oof is not None])


if __name__ == "__main__":
    run_main(Evaluate, run)
