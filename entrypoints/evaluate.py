"""evaluate: a member, a run or a Predictions file against the truth: scores, tables, pictures.

python entrypoints/evaluate.py --manifest data/grocery15/manifest.csv --competition grocery15 --member lite0
python entrypoints/evaluate.py --manifest data/grocery15/manifest.csv --run 0123abcd…
python entrypoints/evaluate.py --manifest data/grocery15/manifest.csv --predictions runs/infer/…/predictions.parquet
"""

from pathlib import Path
from typing import Any

from octofold.commands import Evaluate
from octofold.config import run_main


def run(config: Evaluate) -> dict[str, object]:
    """Gather the predictions, score, write, log."""
    from octofold.data import manifest
    from octofold.files import ROOT
    from octofold.infer import evaluating
    from octofold.metrics import adopt, fingerprint
    from octofold.track import tracking

    truth = manifest.read(config.manifest)
    if config.metric:
        adopt(config.metric, truth.task)
    found = evaluating.evaluate(truth, _predictions(config))
    with tracking.run(
        "evaluate", config, truth.competition, name=f"evaluate {found.predictions.member}",
        tags={"member": found.predictions.member, "manifest_hash": truth.hash, "views": found.predictions.views}
        | fingerprint(config.metric),
    ) as run:  # fmt: skip
        out = config.out or ROOT / "runs" / "evaluate" / run.id
        paths = evaluating.write(found, out)
        run.log_metrics(found.named())
        for path in paths.values():
            run.log_artifact(path)
        return {"run_id": run.id, **paths, **found.named(), "member": found.predictions.member}


def _predictions(config: Evaluate) -> Any:
    """What the flags name, as one Predictions."""
    from octofold.errors import UserError
    from octofold.infer import evaluating
    from octofold.predictions import Predictions

    named = [bool(config.predictions), bool(config.run), bool(config.competition and config.member)]
    if sum(named) != 1:
        raise UserError(
            "evaluate",
            expected="one of --predictions, --run, or --competition with --member",
            got=f"{sum(named)} of them",
        )
    if config.predictions:
        loaded = Predictions.load(config.predictions)
        if config.tta not in ("", loaded.views):
            raise UserError(config.predictions, expected=f"views '{config.tta}' (--tta)", got=f"'{loaded.views}'")
        return loaded
    if config.run:
        return _oof_of_run(config.run, config.tta)
    from octofold.track import registry

    slots = registry.resolve(config.competition, config.stage, [config.member])[config.member]
    runs = {slot.name: slot.run_id for slot in slots}
    return evaluating.gather(_stored(list(runs.values()), config.tta, f"member '{config.member}'"))


def _oof_of_run(run_id: str, views: str) -> Any:
    """The OOF of a slot's or a blend's run, or of the slots of a member's."""
    from octofold.infer import evaluating
    from octofold.track import tracking

    asked = tracking.get_run(run_id)
    if tracking.list_artifacts(asked.id, "oof"):
        return evaluating.gather(_stored([asked.id], views, f"run {run_id}"))
    children = tracking.find_runs(
        asked.tags.get("competition", ""), {"mlflow.parentRunId": asked.id}, statuses=("FINISHED",)
    )
    newest = {(child.tags.get("fold"), child.tags.get("seed")): child.id for child in reversed(children)}
    return evaluating.gather(_stored(list(newest.values()), views, f"run {run_id}"))


def _stored(runs: list[str], views: str, where: str) -> list[Any]:
    """The OOF files of these runs in one set of views: the one asked for, or the largest that all have."""
    from octofold.errors import UserError, preview
    from octofold.predictions import Predictions
    from octofold.track import tracking
    from octofold.tta import NESTED, VIEWS

    order = ["geo8_original", *NESTED]  # the last one that is there is chosen
    there = [{Path(path).stem for path in tracking.list_artifacts(one, "oof")} for one in runs]
    shared = sorted(set(VIEWS).intersection(*there), key=order.index) if there else []
    if not shared or (views and views not in shared):
        wanted = f"OOF with views {views}" if views else "OOF"
        got = f"views {preview(shared)}" if shared else "none"
        raise UserError(where, expected=wanted, got=got, fix="evaluate with --tta of those, or train with these views")
    return [Predictions.load(tracking.download(one, f"oof/{views or shared[-1]}.parquet")) for one in runs]


if __name__ == "__main__":
    run_main(Evaluate, run)
