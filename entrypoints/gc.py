"""gc: list what nothing in mlruns/ refers to any more, with its size, and remove it if you say so.

    python entrypoints/gc.py
    python entrypoints/gc.py --yes

Never touched: a run a registered version comes from, and whatever is not in mlruns/.
"""

import sys

from octofold.commands import Gc
from octofold.config import log, run_main


def run(config: Gc) -> dict[str, object]:
    """List, ask, remove."""
    from octofold.track import storage

    found = storage.rubbish(config.work_days)
    for item in found:
        log.info("%8.1f MB  %s  (%s)", item.bytes / 1e6, item.path, item.why)
    total = sum(item.bytes for item in found)
    log.info("%8.1f MB in %d place(s)", total / 1e6, len(found))
    agreed = config.yes or (bool(found) and sys.stdin.isatty() and _ask())
    freed = storage.remove(found) if agreed else 0
    return {"found": [str(item.path) for item in found], "bytes": total, "freed": freed}


def _ask() -> bool:
    print("Remove all of these? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


if __name__ == "__main__":
    run_main(Gc, run)
