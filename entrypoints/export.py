"""export: a member's fold models and OOF become one bundle, checked by sha256, that another machine imports.

python entrypoints/export.py --competition grocery15 --member lite0
python entrypoints/export.py --competition grocery15 --member lite0 --stage production --out lite0.zip
"""

from octofold.commands import Export
from octofold.config import run_main


def run(config: Export) -> dict[str, object]:
    """Write the bundle."""
    from octofold.track import tracking
    from octofold.train import bundles

    with tracking.run("export", config, config.competition, name=f"export {config.member}") as run:
        done = bundles.export(config)
        run.log_dict(done, "export.json")
        run.log_metrics({"files": done["files"], "bytes": done["bytes"]})
        return {"run_id": run.id, **done}


if __name__ == "__main__":
    run_main(Export, run)
