"""explain: one row of a submission, led back to members, views, models, weights, data and code, with a picture.

python entrypoints/explain.py --submission runs/blend/<run id>/submission.csv --image test_00042.jpg
"""

from typing import Any

from octofold.commands import Explain
from octofold.config import log, run_main


def run(config: Explain) -> dict[str, Any]:
    """Find the row, ask the models view by view, draw."""
    from octofold import plots
    from octofold.blend import explaining, ledger
    from octofold.files import ROOT
    from octofold.track import tracking

    book = ledger.load(config.submission)
    row = book.row(config.image)
    with tracking.run("explain", config, str(book.about["competition"]), name=f"explain {config.image}") as run:
        told = explaining.explain(book, row, config.views)
        path = config.out or ROOT / "runs" / "explain" / f"{run.id}.png"
        figure = plots.explanation(told.image, told.caption, told.views, told.classes, told.nearest)
        plots.save(figure, path)
        run.log_artifact(path)
        run.log_text("\n".join(told.lines) + "\n", "explanation.txt")
        for line in told.lines:
            log.info("%s", line)
        return {"run_id": run.id, "picture": path, "image": config.image, "row": row}


if __name__ == "__main__":
    run_main(Explain, run)
