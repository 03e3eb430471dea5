"""relocate: mlruns/ was moved or copied to another folder or machine; its store finds its artifacts again.

    python entrypoints/relocate.py
    python entrypoints/relocate.py --old /home/me/octofold/mlruns

MLflow keeps absolute paths; they are rewritten in one transaction, all or none. Doing it again changes nothing.
"""

from octofold.commands import Relocate
from octofold.config import log, run_main


def run(config: Relocate) -> dict[str, object]:
    """Rewrite, and say how much."""
    from octofold.track import storage

    changed = storage.relocate(config.old, config.dry)
    for place, count in changed.items():
        log.info("%6d  %s", count, place)
    log.info("nothing to change" if not changed else "would be changed" if config.dry else "changed")
    return {"changed": changed, "dry": config.dry}


if __name__ == "__main__":
    run_main(Relocate, run)
