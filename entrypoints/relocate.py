"""relocate: mlruns/ was moved or copied to another folder or machine; its store finds its artifacts again.

    python entrypoints/relocate.py
    python entrypoints/relocate.py --old /home/me/octofold/mlruns

MLflow keeps absolute paths; they are rewritten in one transaction, all or none. Doing it again changes nothing.
A run in the experiment "housekeeping" says what was rewritten; with --dry there is none, because its files would
still go to the old place.
"""

from octofold.commands import Relocate
from octofold.config import log, run_main


def run(config: Relocate) -> dict[str, object]:
    """Rewrite, and say how much."""
    from octofold.track import storage, tracking

    changed = storage.relocate(config.old, config.dry)
    for place, count in changed.items():
        log.info("%6d  %s", count, place)
    log.info("nothing to change" if not changed else "would be changed" if config.dry else "changed")
    found: dict[str, object] = {"changed": changed, "dry": config.dry}
    if config.dry:
        return found
    with tracking.run("relocate", config, storage.HOUSEKEEPING) as run:  # after it: now the run's files land here
        run.log_metrics({"relocate/values": sum(changed.values())})
        run.log_dict(found, "relocate.json")
    return {"run_id": run.id, **found}


if __name__ == "__main__":
    run_main(Relocate, run)
