"""clean: what models and neighbours think of the labels becomes a queue, a review page, and a journal of decisions.

    python entrypoints/clean.py --manifest data/grocery15/manifest.csv
    python entrypoints/clean.py --manifest data/grocery15/manifest.csv --oof oof.parquet --serve false
    python entrypoints/clean.py --manifest data/grocery15/manifest.csv --host 0.0.0.0 --reviewer anna

Works before anything is trained (the images alone rank it) and better after. No label is changed here: give the
journal to `prepare --decisions`, which writes a new manifest. docs/cleaning.md tells more.
"""

from octofold.commands import Clean
from octofold.config import log, run_main


def run(config: Clean) -> dict[str, object]:
    """Gather OOF, rank, write the queue, serve the page until it is closed."""
    from octofold.clean import cleaning, desk, review, vectors
    from octofold.data import manifest
    from octofold.data.journal import Journal
    from octofold.files import ROOT
    from octofold.track import tracking

    table = manifest.read(config.manifest)
    journal = Journal(config.journal or config.manifest.with_name("decisions.jsonl"))
    competition = config.competition or table.competition
    oof = cleaning.find_oof(competition, config.oof, config.stage)
    with tracking.run(
        "clean", config, competition, name=f"clean {competition}", tags={"manifest_hash": table.hash}
    ) as run:
        queue = cleaning.rank(table, oof, vectors.embed(table, config.embed), journal, config.limit)
        path = queue.write((config.out or ROOT / "runs" / "clean" / run.id) / "queue.csv")
        run.log_artifact(path)
        run.log_text("\n".join(queue.notes), "notes.txt")
        for note in queue.notes:
            log.info("%s", note)
        if config.serve:
            page = desk.Desk(queue, table, journal, config.reviewer or desk.login())
            review.Server(page, config.host, config.port).serve()
        done = desk.progress(journal, queue, table)
        run.log_metrics({"clean/flagged": queue.flagged, **{f"clean/{name}": count for name, count in done.items()}})
        return {
            "run_id": run.id, "queue": str(path), "journal": str(journal.path), "samples": len(queue.items),
            "flagged": queue.flagged, **done, "notes": queue.notes,
        }  # fmt: skip


if __name__ == "__main__":
    run_main(Clean, run)
