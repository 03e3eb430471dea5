"""gc: list what nothing in mlruns/ refers to any more, with its size, and remove it if you say so.

    python entrypoints/gc.py
    python entrypoints/gc.py --yes

Never touched: a run a registered version comes from, and whatever is not in mlruns/. A run in the experiment
"housekeeping" keeps the list and says whether it was removed.
"""

import sys

from octofold.commands import Gc
from octofold.config import log, run_main


def run(config: Gc) -> dict[str, object]:
    """List, ask, remove."""
    from octofold.track import storage, tracking

    found = storage.rubbish(config.work_days)
    total = sum(item.bytes for item in found)
    listed = [{"path": str(item.path), "why": item.why, "bytes": item.bytes} for item in found]
    with tracking.run("gc", config, storage.HOUSEKEEPING) as run:
        for item in found:
            log.info("%8.1f MB  %s  (%s)", item.bytes / 1e6, item.path, item.why)
        log.info("%8.1f MB in %d place(s)", total / 1e6, len(found))
        agreed = config.yes or (bool(found) and sys.stdin.isatty() and _ask())
        freed = storage.remove(found) if agreed else 0
        run.log_metrics({"gc/places": len(found), "gc/bytes": total, "gc/freed": freed})
        run.log_dict({"removed": agreed, "found": listed}, "gc.json")
    return {"run_id": run.id, "found": [str(item.path) for item in found], "bytes": total, "freed": freed}


def _ask() -> bool:
    print("Remove all of these? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


if __name__ == "__main__":
    run_main(Gc, run)
