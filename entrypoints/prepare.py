"""prepare: images and labels become a manifest with folds, and a report of what is odd about them.

    python entrypoints/prepare.py --competition digits --builtin digits
    python entrypoints/prepare.py --competition grocery15 --images photos/train --labels photos/train.csv \\
        --test_images photos/test --sample_submission photos/sample_submission.csv
    python entrypoints/prepare.py --competition pets --images folder_of_class_folders/
    python entrypoints/prepare.py --competition pets --source hf:timm/oxford-iiit-pet
    python entrypoints/prepare.py --competition birds --source kaggle:bird-competition
    python entrypoints/prepare.py --competition pets --images folder_of_class_folders/ --decisions decisions.jsonl

Raw data stays as it is. A sample's id comes from its content, so moving or renaming a file changes nothing.
"""

from octofold.commands import Prepare
from octofold.config import log, run_main


def run(config: Prepare) -> dict[str, object]:
    """Read, look, fold, write, log."""
    from octofold.prepare import importing, pictures, preparing
    from octofold.prepare.findings import Findings
    from octofold.track import tracking

    preparing.check(config)
    with tracking.run("prepare", config, config.competition, name=f"prepare {config.competition}") as run:
        found = Findings()
        source = importing.fetch(config, found)
        prepared = preparing.prepare(source, found)
        paths = preparing.write(prepared, source)
        manifest = prepared.manifest
        run.log_dataset(manifest.table, config.competition, "training", manifest.images)
        if prepared.test is not None:
            run.log_dataset(prepared.test.table, f"{config.competition}-test", "test", prepared.test.images)
        run.set_tags({"manifest_hash": manifest.hash})
        differences = prepared.summary.get("train_test_differences", {})
        numbers = {key: value for key, value in prepared.summary.items() if isinstance(value, (int, float))}
        numbers |= {f"ks_{key}": value for key, value in differences.items()}
        run.log_metrics({f"data/{key}": value for key, value in numbers.items() if value == value})  # no NaN
        for path in paths.values():
            run.log_artifact(path, "data")
        run.log_text(pictures.worst_table(prepared.looks), "report/worst.csv")
        for name, figure in pictures.draw(prepared):
            run.log_figure(figure, f"report/{name}.png")
        for kind, count in prepared.summary["problems"].items():
            log.info("%6d  %s", count, kind)
        log.info("groups: %s", prepared.summary.get("grouping", config.group))
        return {"run_id": run.id, **paths, "manifest_hash": manifest.hash, **prepared.summary}


if __name__ == "__main__":
    run_main(Prepare, run)
