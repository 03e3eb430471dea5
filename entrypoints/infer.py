"""infer: models over a folder of images, one image or a manifest become Predictions.

    python entrypoints/infer.py --model models:/grocery15.blend@production --images photos/
    python entrypoints/infer.py --competition grocery15 --member lite0 --images data/grocery15/test.csv --tta geo8
    python entrypoints/infer.py --model mlruns/work/grocery15/lite0/f0.s0/model --images photo.jpg --sort_into sorted/

An image that cannot be read is named and left out. The same command goes on where it was stopped.
"""

from octofold.commands import Infer
from octofold.config import log, run_main


def run(config: Infer) -> dict[str, object]:
    """Find the models, predict, write, log."""
    from octofold.errors import known
    from octofold.files import ROOT
    from octofold.infer import crews, inference, looks, results, shards
    from octofold.track import tracking
    from octofold.tta import VIEWS

    known("views", config.tta or "geo8", VIEWS)
    source = looks.find(config.images)
    crew = crews.muster(config)
    views = config.tta or crew.views
    how = crews.how(config, crew)
    if config.sort_into:
        results.check_sorting(crew.task, source, config.sort_into)
    competition = config.competition or crew.voices[0].card.competition
    with tracking.run("infer", config, competition, name=f"infer {crew.name}") as run:
        agreement = {} if how.is_exact else inference.agreement(crew, source.items, how)
        crews.side_by_side(config, crew, source, how)
        result = shards.run(crew, source, how, config.shards, config.shard)
        if result is None:
            return {"run_id": run.id, "shard": config.shard, "predictions": None}
        out = config.out or ROOT / "runs" / "infer" / run.id
        paths = (results.write if how.is_exact else results.write_labels)(result, out)
        copied = results.sort_into(result, source, config.sort_into) if config.sort_into else 0
        for path in paths.values():
            run.log_artifact(path)
        shards.clear(result)
        run.log_metrics({"infer/images": len(result.files), "infer/skipped": len(result.skipped), **agreement})
        skipped = [{"file": one.name, "reason": one.reason} for one in result.skipped]
        for one in result.skipped:
            log.warning("skipped %s: %s", one.name, one.reason)
        return {
            "run_id": run.id, **paths, "images": len(result.files), "skipped": skipped, "sorted": copied,
            "models": [voice.name for voice in crew.voices], "views": views, **agreement,
        }  # fmt: skip


if __name__ == "__main__":
    run_main(Infer, run)
